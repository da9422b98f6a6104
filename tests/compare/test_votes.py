from __future__ import annotations

import dataclasses
import math
import multiprocessing
import random
import threading
from pathlib import Path

import choix
import numpy as np
import pytest
from mlflow import MlflowClient

from nbtune.compare.standings import PRIOR, groups, standings
from nbtune.compare.vote_tracking import VoteTracker, metric_name
from nbtune.compare.votes import Ballots, Vote
from nbtune.errors import NbtuneError
from nbtune.spec import TrackingSpec

MODEL = "smollm2-135m-instruct"


def vote(columns, *best, **more):
    values = {"question": "What does os.path.join do?", "blind": True, "model": MODEL, **more}
    return Vote(columns=tuple(columns), best=best, **values)


def ranked(votes, columns):
    return {standing.column: standing for standing in standings(votes, columns)}


# The file


def test_a_vote_comes_back_as_it_was_given(tmp_path):
    ballots = Ballots(tmp_path / "runs" / "votes.jsonl")
    assert ballots.read() == ([], 0)
    first = vote("ab", "b", sampling={"temperature": 0.2, "top_k": 0}, seed=7, system="Be brief.\n")
    second = vote(["b", "quiet.otter (2)"], question='Zwei Zeilen\nund "Ä" \u2028 𝄞')
    for given in (first, second):
        ballots.add(given)
    assert ballots.read() == ([first, second], 0)
    assert len(ballots.path.read_bytes().split(b"\n")) == 3
    assert ballots.votes(["a", "b", "c"]) == [first]
    assert ballots.votes(model="another") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": ("a",), "best": ()}, "1 column was shown; it takes two"),
        ({"columns": ("a", "a"), "best": ()}, "columns: a, a"),
        ({"best": ("a", "a")}, "best: a, a"),
        ({"best": ("c",)}, "It is for 'c'; there were: a, b"),
        ({"question": " "}, "Its question is empty"),
        ({"model": ""}, "Its model is empty"),
        ({"at": "yesterday"}, "'yesterday' is not a time"),
        ({"at": "2026-11-22T12:00:00"}, "does not say its time zone"),
    ],
)
def test_a_vote_that_makes_no_sense_is_refused(change, said):
    with pytest.raises(NbtuneError, match=said):
        dataclasses.replace(vote("ab", "a"), **change)


def test_a_torn_line_is_counted_and_spoils_no_other(tmp_path):
    ballots = Ballots(tmp_path / "votes.jsonl")
    ballots.add(vote("ab", "a"))
    whole = ballots.path.read_bytes()
    with ballots.path.open("ab") as file:
        file.write(whole[:40])  # a process was killed here
    ballots.add(vote("ab", "b"))
    with ballots.path.open("ab") as file:
        file.write(b'\xff\xfe\n{"columns": 3}\n' + whole.replace(b'"best":["a"]', b'"best":["z"]') + b"[" * 100_000)
    ballots.add(vote("ab"))
    votes, unreadable = ballots.read()
    assert [found.best for found in votes] == [("a",), ("b",), ()]
    assert unreadable == 5
    assert ballots.path.read_bytes().startswith(whole)


def test_a_vote_that_was_sent_twice_counts_once(tmp_path):
    ballots = Ballots(tmp_path / "votes.jsonl")
    given = vote("ab", "a")
    ballots.add(given)
    ballots.add(given)
    assert ballots.votes() == [given]


def test_what_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NbtuneError, match="not kept"):
        Ballots(tmp_path / "file" / "votes.jsonl").add(vote("ab", "a"))
    with pytest.raises(NbtuneError, match="not kept"):
        Ballots(tmp_path / "votes.jsonl").add(vote("ab", "a", question="half a pair: \ud800"))


def _add_many(path, start):
    for number in range(start, start + 20):
        Ballots(path).add(vote("ab", "a", question=f"{number} " + "x" * 20_000))


def test_several_processes_and_threads_vote_at_once(tmp_path):
    path = tmp_path / "votes.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_many, args=(path, start)) for start in (0, 20)]
    workers += [threading.Thread(target=_add_many, args=(path, start)) for start in (40, 60)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    votes, unreadable = Ballots(path).read()
    assert unreadable == 0
    assert sorted(int(found.question.split()[0]) for found in votes) == list(range(80))


# The model


@pytest.mark.parametrize(("wins", "losses", "ties"), [(1, 0, 0), (7, 3, 0), (50, 0, 0), (4, 4, 5), (0, 0, 0)])
def test_two_columns_have_a_closed_form(wins, losses, ties):
    votes = [vote("ab", "a")] * wins + [vote("ba", "b")] * losses + [vote("ab", "a", "b")] * ties
    won, lost = wins + ties / 2 + PRIOR, losses + ties / 2 + PRIOR
    a, b = ranked(votes, "ab")["a"], ranked(votes, "ab")["b"]
    assert a.strength == pytest.approx(math.log(won / lost), abs=1e-8)
    assert a.error == pytest.approx(math.sqrt(1 / won + 1 / lost), abs=1e-8)
    assert a.probability == pytest.approx(won / (won + lost))
    assert a.probability + b.probability == pytest.approx(1)
    assert (a.lower, a.upper) == pytest.approx((1 - b.upper, 1 - b.lower))
    assert (a.votes, a.wins, a.ties, a.losses) == (wins + losses + ties, wins, ties, losses)
    assert a.win_rate == (None if not votes else pytest.approx((wins + ties / 2) / len(votes)))
    assert [standing.column for standing in standings(votes, "ab")] == (["b", "a"] if wins < losses else ["a", "b"])


def test_the_strengths_are_those_of_choix():
    draw = random.Random(3)
    names = ("a", "b", "c", "d")
    truth = dict(zip(names, (1.2, 0.3, 0.0, -0.8), strict=True))
    votes = []
    for _ in range(60):
        shown = draw.sample(names, draw.choice((2, 3, 4)))
        votes.append(vote(shown, *draw.choices(shown, [math.exp(truth[name]) for name in shown])))
    votes += [vote("ab", "a", "b"), vote("acd", "c", "d"), vote("abcd")]
    # The likeliest strengths stay when all votes are counted 12 times over: no fraction of a vote is left.
    index = names.index
    data = [
        (index(best), tuple(index(name) for name in found.columns if name != best))
        for found in votes
        for best in found.best
        for _ in range(12 // len(found.best))
    ]
    data += [(i, (j,)) for i in range(4) for j in range(4) if i != j for _ in range(2)]  # 0.5 / 3 of a vote, 12 times
    expected = choix.ilsr_top1(4, data)
    found = ranked(votes, names)
    for name, strength in zip(names, expected, strict=True):
        others = [value for other, value in zip(names, expected, strict=True) if other != name]
        assert found[name].strength == pytest.approx(strength - np.mean(others), abs=1e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Best of three, 40 votes, 400 times; one interval in twenty may miss."""
    rng = np.random.default_rng(0)
    truth = np.array([1.0, 0.2, -0.8])
    against = (3 * truth - truth.sum()) / 2
    each = [vote("abc", name) for name in "abc"]
    hits = 0
    for _ in range(400):
        counts = rng.multinomial(40, np.exp(truth) / np.exp(truth).sum())
        found = ranked([one for one, count in zip(each, counts, strict=True) for _ in range(count)], "abc")
        hits += sum(
            abs(found[name].strength - right) < 1.959964 * found[name].error
            for name, right in zip("abc", against, strict=True)
        )
    assert 0.93 < hits / 1200 < 0.97


def test_counts_of_a_vote_on_three():
    found = ranked([vote("abc", "a"), vote("abc", "a", "b"), vote("abc")], "abc")
    assert [(s.votes, s.all_bad, s.wins, s.ties, s.losses) for s in (found[name] for name in "abc")] == [
        (3, 1, 3, 1, 0),
        (3, 1, 1, 1, 1),
        (3, 1, 0, 0, 3),
    ]
    assert found["a"].probability > found["b"].probability > found["c"].probability


def test_all_bad_says_nothing_of_the_order():
    some = [vote("ab", "a"), vote("ab", "b"), vote("ab", "a")]
    with_bad = ranked([*some, vote("ab"), vote("ab")], "ab")
    assert with_bad["a"].strength == ranked(some, "ab")["a"].strength
    assert (with_bad["a"].votes, with_bad["a"].all_bad) == (5, 2)


def test_a_vote_on_more_columns_says_what_it_says_of_these():
    votes = [vote("abc", "a"), vote("abc", "c"), vote("ac", "a"), vote("abc", "b", "c")]
    assert standings(votes, "ab") == standings([vote("ab", "a"), vote("ab", "b")], "ab")


def test_columns_that_were_never_compared_are_equal_and_unsure():
    votes = [vote("ab", "a")] * 30 + [vote("cd", "c")] * 30 + [vote("ace")]
    found = ranked(votes, "abcde")
    assert groups(votes, "abcde") == [("a", "b"), ("c", "d"), ("e",)]
    assert groups([*votes, vote("bd", "b")], "abcde") == [("a", "b", "c", "d"), ("e",)]
    assert found["a"].strength == pytest.approx(found["c"].strength, abs=1e-6)
    assert found["e"].probability == pytest.approx(0.5)
    assert found["e"].win_rate is None
    assert found["e"].upper - found["e"].lower > 0.9
    assert found["a"].lower < 0.5  # a beat b 30 times, but the others may be better still


def test_more_votes_narrow_the_interval_and_always_winning_stays_finite():
    widths = []
    for count in (0, 1, 10, 100, 1000, 10_000):
        first = standings([vote("abc", "a")] * count, "abc")[0]
        assert 0 < first.lower < first.probability < first.upper < 1
        widths.append(first.upper - first.lower)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0.9
    assert widths[1] > 0.7  # one vote is hardly anything


def test_what_a_page_shows():
    votes = [vote("ab", "a")] * 20 + [vote("ab", "b")] * 8
    assert [standing.text for standing in standings(votes, "ab")] == ["a 0.71 ± 0.16", "b 0.29 ± 0.16"]


def test_ranking_nonsense_is_refused():
    with pytest.raises(NbtuneError, match="nothing to rank"):
        standings([], ["a"])
    with pytest.raises(NbtuneError, match="nothing to rank"):
        standings([], ["a", "a"])
    with pytest.raises(NbtuneError, match="several base models"):
        standings([vote("ab", "a"), vote("ab", "a", model="qwen")], "ab")


# MLflow


def curve(client, run, metric):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]


def test_mlflow_has_every_vote_once(tmp_path):
    columns = ("base", "quiet.otter (2)")
    ballots, warnings = Ballots(tmp_path / "votes.jsonl"), []
    ballots.add(vote(columns, "base"))
    tracker = VoteTracker(ballots, MODEL, TrackingSpec(experiment="mine"), on_warning=warnings.append)
    for _ in range(2):
        ballots.add(vote(columns, "quiet.otter (2)"))
        tracker.changed()
    tracker.close()
    ballots.add(vote(columns, *columns))
    ballots.add(vote(columns, "base", model="another"))
    (tmp_path / "kept").mkdir()
    VoteTracker(ballots, MODEL, TrackingSpec(experiment="mine"), on_warning=warnings.append).close()
    assert warnings == []

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "arena votes"
    assert run.info.status == "FINISHED"
    assert run.data.tags["nbtune.votes.model"] == MODEL
    name = metric_name("quiet.otter (2)")
    assert curve(client, run, "votes") == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert curve(client, run, f"win_rate/{name}") == [(1, 0), (2, 0.5), (3, pytest.approx(2 / 3)), (4, 0.625)]
    last = ranked(ballots.votes(model=MODEL), columns)["quiet.otter (2)"]
    for metric, value in (("win_probability", last.probability), ("lower", last.lower), ("upper", last.upper)):
        assert curve(client, run, f"{metric}/{name}")[-1] == (4, pytest.approx(value))
    kept = client.download_artifacts(run.info.run_id, "votes.jsonl", str(tmp_path / "kept"))
    assert Path(kept).read_bytes() == ballots.path.read_bytes()


def test_without_votes_there_is_no_store(tmp_path):
    VoteTracker(Ballots(tmp_path / "votes.jsonl"), MODEL, on_warning=pytest.fail).close()
    assert list(tmp_path.iterdir()) == []


def test_a_lost_server_is_told_once_and_delays_nobody(tmp_path):
    ballots, warnings = Ballots(tmp_path / "votes.jsonl"), []
    tracking = TrackingSpec(tracking_uri="http://127.0.0.1:9")
    ballots.add(vote("ab", "a"))
    tracker = VoteTracker(ballots, MODEL, tracking, on_warning=warnings.append)
    tracker.changed()
    tracker.close()
    (warning,) = warnings
    assert warning.startswith("MLflow lacks votes (RunError: The MLflow server does not answer)")
    assert str(ballots.path) in warning


def test_names_of_metrics_are_safe_and_their_own():
    assert metric_name("20261122-0614-amber-heron") == "20261122-0614-amber-heron"
    names = ["quiet.otter (2)", "quiet.otter [2]", "quiet.otter _2_", "..", ".", "ü" * 300, "a/../b", "\ud800"]
    safe = [metric_name(name) for name in names]
    assert len(set(safe)) == len(names)
    from mlflow.utils.validation import _validate_metric_name

    for name in safe:
        _validate_metric_name(f"win_probability/{name}")
