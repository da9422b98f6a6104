"""What is drawn of a run, as numbers: the figure, its SVG twin, and the thinning of points."""

import json
import math
import random
import xml.etree.ElementTree as ET

import plotly.graph_objects as go
import pytest
import replay

from nbtune_widgets import charts


def figure(events, **view):
    return charts.bundle(events, charts.View(**view))[charts.PLOTLY]


def trace(drawn, name):
    return next(found for found in drawn["data"] if found["name"] == name)


def test_the_figure_is_valid_plotly():
    drawn = figure(replay.events(100), log=True, window=50)
    valid = go.Figure({"data": drawn["data"], "layout": drawn["layout"]})
    assert len(valid.data) == len(drawn["data"]) == 8
    assert drawn["config"]["displayModeBar"] is False


def test_traces_carry_the_events_numbers():
    events = replay.events(60)
    drawn = figure(events)
    steps = [event for event in events if event["type"] == "train"]
    assert trace(drawn, "loss")["x"] == list(range(1, 61))
    assert trace(drawn, "loss")["y"] == pytest.approx([event["loss"] for event in steps], rel=1e-4)
    assert trace(drawn, "in use")["y"][-1] == pytest.approx(steps[-1]["memory_bytes"] / 1e9, rel=1e-4)
    assert trace(drawn, "held out")["x"] == [0, 20, 40, 60]
    assert set(trace(drawn, "planned")["y"]) == {1.6}


def test_titles_say_the_current_numbers():
    text = charts.bundle(replay.events(100))["text/plain"]
    assert "held out" in text
    assert "(was 3.73)" in text
    assert "planned 1.60" in text


def test_nothing_yet_is_an_empty_chart_not_an_error():
    for events in ([], replay.events(0)[:1], replay.events(1)):
        assert charts.bundle(events)["image/svg+xml"].startswith("<svg")


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_step_without_a_loss_is_left_out_and_said(bad):
    events = replay.events(10)
    events[-1]["loss"] = bad
    bundle = charts.bundle(events)
    assert trace(bundle[charts.PLOTLY], "loss")["x"] == list(range(1, 10))
    assert "NaN" not in json.dumps(bundle)
    if bad is not None:
        assert f"{bad} at step 10" in bundle["text/plain"]


def test_smoothing_is_not_drawn_towards_zero():
    events = [{"type": "train", "step": step, "loss": 3.0} for step in range(1, 20)]
    assert trace(figure(events, smoothing=0.9), "smoothed")["y"] == pytest.approx([3.0] * 19)
    assert [found["name"] for found in figure(events, smoothing=0)["data"]] == ["loss"]


def test_window_shows_the_last_steps():
    drawn = figure(replay.events(300), window=50)
    assert trace(drawn, "loss")["x"][0] == 250
    assert drawn["layout"]["xaxis"]["range"] == [250, 300]


def test_log_scale_leaves_out_what_has_no_logarithm():
    events = replay.events(10)
    events[3]["grad_norm"] = 0.0
    drawn = figure(events, log=True)
    assert drawn["layout"]["yaxis"]["type"] == "log"
    assert min(trace(drawn, "gradient norm")["y"]) > 0


def test_decimation_keeps_ends_and_extremes():
    rng = random.Random(1)
    points = [(step, rng.random()) for step in range(10_000)]
    points[4321], points[777] = (4321, 50.0), (777, -50.0)
    kept = charts.decimated(points, 500)
    assert len(kept) <= 500
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (4321, 50.0) in kept
    assert (777, -50.0) in kept
    assert kept == sorted(kept)
    assert charts.decimated(points[:500], 500) == points[:500]


def test_a_long_run_stays_small():
    bundle = charts.bundle(replay.events(10_000))
    drawn = bundle[charts.PLOTLY]
    assert max(len(found["x"]) for found in drawn["data"]) <= 500
    assert len(json.dumps(drawn)) < 80_000
    assert len(bundle["image/svg+xml"]) < 14_000


def test_the_twin_is_well_formed_and_shows_every_panel():
    events = replay.events(100)
    for log in (False, True):
        root = ET.fromstring(charts.bundle(events, charts.View(log=log))["image/svg+xml"])
        tag = "{http://www.w3.org/2000/svg}"
        assert len(root.findall(f"{tag}polyline")) == 7
        assert len(root.findall(f"{tag}circle")) == 6
        names = {node.text for node in root.iter(f"{tag}tspan")}
        assert names == {"Loss", "Memory", "Tokens/s", "Learning rate", "Gradient norm"}
        points = [p.split(",") for line in root.findall(f"{tag}polyline") for p in line.get("points").split()]
        assert all(0 <= float(x) <= 900 and -1 <= float(y) <= charts.HEIGHT for x, y in points)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.414, "2.41"), (0.00018, "0.00018"), (1530.4, "1,530"), (0, "0"), (812.3, "812"), (math.nan, "nan")],
)
def test_numbers_for_people(value, text):
    assert charts.number(value) == text


def test_ticks_are_round():
    assert charts.nice_ticks(2.31, 3.97, 5) == [2.5, 3.0, 3.5]
    assert charts.nice_ticks(1, 1, 5) == [1]


def test_a_spark_is_one_small_curve_with_the_evaluations_on_it():
    spark = charts.spark(replay.events(10_000, evals=100))
    root = ET.fromstring(spark)
    tag = "{http://www.w3.org/2000/svg}"
    points = [tuple(map(float, pair.split(","))) for pair in root.find(f"{tag}polyline").get("points").split()]
    assert len(points) <= charts.SPARK_POINTS
    assert len(root.findall(f"{tag}circle")) <= charts.SPARK_DOTS
    assert all(0 <= x <= 94 and 0 <= y <= 28 for x, y in points)
    assert points[0][1] < points[-1][1]  # down on the screen: the loss fell
    assert len(spark) < 1500
    assert charts.spark([]) == ""


def test_curves_of_runs_over_each_other():
    bundle = charts.overlay(
        [(f"run {seed}", replay.events(2000, seed=seed)) for seed in range(9)], charts.View(log=True)
    )
    drawn = bundle[charts.PLOTLY]
    valid = go.Figure({"data": drawn["data"], "layout": drawn["layout"]})
    assert len(valid.data) == 18
    assert max(len(found["x"]) for found in drawn["data"]) <= 500
    assert drawn["layout"]["yaxis"]["type"] == "log"
    colors = [found["line"]["color"] for found in drawn["data"]]
    assert colors[:9] == colors[9:] == [*charts.COLORS, charts.COLORS[0]]
    ET.fromstring(bundle["image/svg+xml"])
    empty = charts.overlay([("a", []), ("b", [])])
    assert empty[charts.PLOTLY]["data"] == []
    ET.fromstring(empty["image/svg+xml"])
