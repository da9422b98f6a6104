"""The package as a whole: quick to import, whole in its promises."""

import subprocess
import sys
from pathlib import Path

import nbtune

HEAVY = ("torch", "transformers", "gradio", "mlflow", "datasets", "plotly", "ipywidgets", "papermill")


def test_import_is_quick_and_brings_nothing_heavy():
    code = f"""
import sys, time
began = time.perf_counter()
import nbtune
seconds = time.perf_counter() - began
print([name for name in {HEAVY} if name in sys.modules])
assert seconds < 1, seconds
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in nbtune.__all__:
        assert getattr(nbtune, name) is not None


def test_functions_stay_functions_after_their_modules_are_imported():
    import nbtune.check
    import nbtune.plan
    import nbtune.train.events

    assert all(callable(getattr(nbtune, name)) for name in ("check", "plan", "train"))


def test_peft_is_never_imported():
    code = "import nbtune.run, nbtune.train.session, nbtune.infer, sys; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_threads_may_need_transformers_first():
    code = """
import threading
from nbtune.spec import ModelSpec
failures, barrier = [], threading.Barrier(4)
def need(how):
    barrier.wait()
    try:
        how()
    except BaseException as error:
        failures.append(error)
def describe():
    from nbtune.models import describe
    describe(ModelSpec())
def adapters():
    from nbtune.peft import get_peft_model
def session():
    import nbtune.train.session
threads = [threading.Thread(target=need, args=(how,)) for how in (describe, adapters, session, describe)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failures, failures
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_adapter_engine_can_be_read_in_an_afternoon():
    """Every method of PEFT, whose own code is 65,900 lines."""
    files = (Path(nbtune.__file__).parent / "peft").rglob("*.py")
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) < 6_000
