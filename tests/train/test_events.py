"""The event file survives a kill in the middle of a line and forgets what a resume did again."""

import json

from nbtune.train.events import EventLog, EventReader, read_events


def steps(path, **options):
    return [(event["type"], event["step"]) for event in read_events(path, **options)]


def write(path, *events):
    log = EventLog(path)
    for kind, step in events:
        log.append({"type": kind, "step": step})
    log.close()


def test_reads_what_was_written_in_order(tmp_path):
    write(tmp_path, ("start", 0), ("train", 1), ("train", 2))
    assert steps(tmp_path) == [("start", 0), ("train", 1), ("train", 2)]
    assert all(event["time"] > 1.6e9 for event in read_events(tmp_path))


def test_a_resume_drops_the_steps_it_does_again_and_the_earlier_end(tmp_path):
    write(tmp_path, ("start", 0), ("eval", 0), ("train", 1), ("train", 2), ("train", 3), ("end", 3))
    write(tmp_path, ("resume", 2), ("train", 3), ("train", 4))
    assert steps(tmp_path) == [
        ("start", 0), ("eval", 0), ("train", 1), ("train", 2), ("resume", 2), ("train", 3), ("train", 4),
    ]  # fmt: skip
    assert len(steps(tmp_path, all_lives=True)) == 9


def test_a_resume_without_a_checkpoint_starts_anew(tmp_path):
    write(tmp_path, ("start", 0), ("eval", 0), ("train", 1))
    write(tmp_path, ("resume", 0), ("start", 0), ("eval", 0))
    assert steps(tmp_path) == [("resume", 0), ("start", 0), ("eval", 0)]


def test_a_torn_last_line_is_not_read_and_is_cut_before_the_next_event(tmp_path):
    write(tmp_path, ("train", 1))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"type": "train", "st')
    assert steps(tmp_path) == [("train", 1)]
    write(tmp_path, ("resume", 1))
    assert steps(tmp_path) == [("train", 1), ("resume", 1)]


def test_numbers_json_cannot_hold_become_null(tmp_path):
    log = EventLog(tmp_path)
    log.append({"type": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["loss"], event["grad_norm"]) == (None, None)


def test_no_file_is_no_events(tmp_path):
    assert read_events(tmp_path) == []


def test_a_reader_that_looks_again_and_again_has_what_one_look_has(tmp_path):
    reader = EventReader(tmp_path)
    assert reader.read() == []
    lives = ["start 0, train 1", "train 2, end 2", "resume 1", "train 2", "resume 0, start 0"]
    for life in lives:
        write(tmp_path, *((kind, int(step)) for kind, step in map(str.split, life.split(", "))))
        assert reader.read() == read_events(tmp_path)
        assert reader.read() is reader.read()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"type": "train", "st')
        file.flush()
        assert reader.read() == read_events(tmp_path)
        file.write('ep": 1}\n')
    assert reader.read()[-1] == {"type": "train", "step": 1}
