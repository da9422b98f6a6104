"""Sweeps: one notebook, executed once per trial.

From the top: `sweep.py` is the door and the folder; `scheduler.py` decides what is next; `local.py` runs jobs
(`job.py`), each in a process of its own (`worker.py`); `ledger.py` remembers. `space.py`, `search.py` and `halving.py`
know nothing of notebooks.
"""
