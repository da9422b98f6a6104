"""The space of a sweep: what is written, what is tried, and what Optuna makes of results."""

import json
import math

import pytest

from nbtune.errors import SweepError
from nbtune.sweep.search import OptunaSearch
from nbtune.sweep.space import Range, check_space, draw, grid, read_value, read_values


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("r=4,8", "r", [4, 8]),
        ("learning_rate=1e-4,3e-4", "learning_rate", [1e-4, 3e-4]),  # texts, to YAML
        ("learning_rate=1e-5..1e-3:log", "learning_rate", Range(1e-5, 1e-3, log=True)),
        ("r=2..64:log:6", "r", Range(2, 64, 6, log=True)),
        ("warmup_ratio=0.1..0.5:3", "warmup_ratio", Range(0.1, 0.5, 3)),
        ("target_modules=[q_proj],[q_proj,v_proj]", "target_modules", [["q_proj"], ["q_proj", "v_proj"]]),
        ("data=../rows.jsonl,b.csv", "data", ["../rows.jsonl", "b.csv"]),
        ("packing=true,false", "packing", [True, False]),
        ("method=lora", "method", ["lora"]),
    ],
)
def test_a_command_line_says_values_and_ranges(text, name, values):
    assert read_values(text) == (name, values)


def test_a_value_by_itself():
    assert [read_value(text) for text in ("1e-4", "3", "lora", "[a, 1]", "null")] == [1e-4, 3, "lora", ["a", 1], None]


@pytest.mark.parametrize("text", ["r", "r=", "r=[4", "data=a..b", "r=8..4"])
def test_what_cannot_be_read_is_said(text):
    with pytest.raises(SweepError):
        read_values(text)


def test_a_range_has_whole_or_rounded_numbers_with_both_ends():
    assert Range(2, 64, 6, log=True).values() == [2, 4, 8, 16, 32, 64]
    assert Range(1, 3, 9).values() == [1, 2, 3]
    assert Range(1e-5, 1e-3, 5, log=True).values() == [1e-05, 3.16228e-05, 0.0001, 0.000316228, 0.001]
    assert Range(0.0, 1.0, 3).values() == [0.0, 0.5, 1.0]
    with pytest.raises(SweepError, match="every number"):
        Range(0.0, 1.0).values()


@pytest.mark.parametrize(
    "bounds", [{"low": 2, "high": 2}, {"low": 0, "high": 1, "log": True}, {"low": 0, "high": 1, "n": 1}]
)
def test_an_impossible_range_is_refused(bounds):
    with pytest.raises(SweepError):
        Range(**bounds)


def test_a_grid_is_every_combination_the_last_name_fastest():
    points = grid({"r": [4, 8], "learning_rate": Range(1e-4, 4e-4, 2)})
    assert points == [
        {"r": 4, "learning_rate": 1e-4},
        {"r": 4, "learning_rate": 4e-4},
        {"r": 8, "learning_rate": 1e-4},
        {"r": 8, "learning_rate": 4e-4},
    ]


def test_random_points_are_the_same_for_a_seed_and_never_twice():
    space = {"learning_rate": Range(1e-5, 1e-3, log=True), "r": [4, 8]}
    points = draw(space, 12, seed=3)
    assert points[:5] == draw(space, 5, seed=3)
    assert points != draw(space, 12, seed=4)
    rates = [point["learning_rate"] for point in points]
    assert len(set(rates)) == 12
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 2 < sum(rate < 1e-4 for rate in rates) < 10  # even in the logarithm
    assert len(draw({"r": [4, 8], "packing": [True, False]}, 9, seed=0)) == 4
    assert json.loads(json.dumps(points)) == points


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "space is empty"),
        ({"r": []}, "r has no values"),
        ({"r": (4, 8)}, "nt.Range"),
        ({"method": "lora"}, "list of values"),
        ({"r": [4, 4]}, "twice"),
    ],
)
def test_an_empty_or_unclear_space_is_refused(space, words):
    with pytest.raises(SweepError, match=words):
        check_space(space)


def test_a_search_learns_from_results_and_tries_nothing_twice():
    space = {"learning_rate": Range(1e-5, 1e-2, log=True), "target": [["q"], ["q", "v"], ["o"]]}

    def loss(point):
        return abs(math.log10(point["learning_rate"]) + 3) + len(point["target"])

    tried = []
    for _ in range(30):
        point = OptunaSearch(space, "tpe", seed=0).next(tried)  # made anew each time, as after a kill
        tried.append((point, loss(point)))
    assert sum(value for _, value in tried[-10:]) < 0.7 * sum(value for _, value in tried[:10])
    assert len({repr(point) for point, _ in tried}) == 30


def test_a_search_of_few_points_ends():
    search = OptunaSearch({"r": [4, 8]}, "tpe", seed=0)
    assert search.next([({"r": 4}, 1.0)]) == {"r": 8}
    assert search.next([({"r": 4}, 1.0), ({"r": 8}, None)]) is None


def test_an_unknown_sampler_is_refused():
    with pytest.raises(SweepError, match="tpe"):
        OptunaSearch({"r": [4]}, "annealing", seed=0)
