"""Names for runs: sortable by time, and sayable."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

_COLOURS = (
    "amber azure brisk calm clear coral cosy dusky early fleet gentle golden hazel indigo ivory jade keen lilac "
    "lively lucid mellow misty mossy noble ochre opal pearl plain proud quick quiet rosy russet sage sandy silver "
    "spry still sunny sleek tawny tidal umber velvet vivid warm witty"
).split()
_ANIMALS = (
    "badger bittern crane curlew deer dove egret elk falcon ferret finch fox gecko grebe hare heron ibis jackdaw "
    "jay kite lark lemur lynx marten merlin mole newt ocelot osprey otter owl panda plover puffin quail raven robin "
    "seal shrew sparrow stoat stork swift tapir teal tern vole wren"
).split()


def new_id(runs_dir: Path) -> str:
    """An id that no run in `runs_dir` has, such as `20261122-061403-amber-heron`.

    In a trial of a sweep it begins with the trial's number, which `NBTUNE_TRIAL` tells: `003-amber-heron`.
    """
    choose = random.SystemRandom()  # not the generator that a user has seeded
    while True:
        first = os.environ.get("NBTUNE_TRIAL") or time.strftime("%Y%m%d-%H%M%S")
        name = f"{first}-{choose.choice(_COLOURS)}-{choose.choice(_ANIMALS)}"
        if not (runs_dir / name).exists():
            return name
