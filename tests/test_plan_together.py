"""What the plan of a group says: one base, as many runs in a pass as fit, and when that is faster."""

from __future__ import annotations

import pytest

from nbtune.plan import ROOM
from nbtune.plan.together import PASS_TOKENS, GroupPlan, plan_together
from nbtune.spec import RunSpec
from nbtune.together import groups

LARGE = 10**11


def specs(tokens: int, count: int = 4, steps: int = 4) -> list[RunSpec]:
    training = {"max_length": tokens, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
                "max_steps": steps}  # fmt: skip
    return [RunSpec(model={"dtype": "float32"}, method={"r": 4 + number}, training=training, tracking={"mlflow": False})
            for number in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def short() -> GroupPlan:
    return plan_together(specs(128), available_bytes=LARGE, in_new_process=True)


def test_short_micro_batches_share_passes_and_save_a_quarter(short):
    assert short.width == 4
    assert short.ratio is not None
    assert short.ratio < 0.75
    assert str(short).startswith("4 runs on one base, 4 in a pass:")
    assert str(short).endswith("of the time of one after the other")


def test_long_ones_go_through_one_by_one_and_cost_no_more(short):
    long = plan_together(specs(PASS_TOKENS["cpu"]), available_bytes=LARGE, in_new_process=True)
    assert long.width == 1
    assert short.ratio is not None
    assert long.ratio is not None
    assert short.ratio < long.ratio <= 1.0
    longer = plan_together(specs(PASS_TOKENS["cpu"], steps=4000), available_bytes=LARGE, in_new_process=True)
    assert longer.ratio == pytest.approx(1.0, abs=0.01)  # the loading is nothing then


def test_the_base_is_counted_once_and_adapters_all(short):
    alone = short.plans
    for name in ("adapter", "optimiser", "gradients"):
        assert short.whole.parts[name] == sum(planned.parts[name] for planned in alone)
    assert short.whole.parts["base weights"] == alone[0].parts["base weights"]
    assert short.whole.peak_bytes < sum(planned.peak_bytes for planned in alone) / 2
    assert short.whole.parts["activations"] == sum(planned.parts["activations"] for planned in alone)


def test_where_memory_is_scarce_passes_are_narrower_and_groups_smaller(short):
    scarce = int((short.whole.peak_bytes - 1) / ROOM)
    narrower = plan_together(specs(128), available_bytes=scarce, in_new_process=True)
    assert 1 <= narrower.width < 4
    assert narrower.fits
    none = plan_together(specs(128), available_bytes=short.whole.parts["base weights"], in_new_process=True)
    assert not none.fits
    assert groups(specs(128), available_bytes=LARGE) == [[0, 1, 2, 3]]
    assert groups(specs(128), available_bytes=10**6) == [[0], [1], [2], [3]]


def test_groups_are_of_what_can_share_a_base():
    a, b = specs(128, 2)
    long, full = specs(256, 1)[0], a.model_copy(update={"method": "full"})
    compiled = b.updated(torch_compile=True)
    found = groups([a, long, b, full, compiled, long.updated(seed=3), a.updated(learning_rate=1e-5)],
                   available_bytes=LARGE)  # fmt: skip
    assert found == [[0, 2, 6], [1, 5], [3], [4]]


def test_where_the_data_decide_on_the_steps_no_time_is_told():
    planned = plan_together([spec.updated(max_steps=-1) for spec in specs(128, 2)], available_bytes=LARGE)
    assert planned.ratio is None
    assert planned.seconds is None
    assert "of the time" not in str(planned)
