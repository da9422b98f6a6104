"""Two or more sides of one benchmark, run in turns, each in a process of its own; medians, ratios, peak memory.

A side is a generator function at the top level of the script. It prepares (imports, loads, attaches), yields once when
it is ready, and then yields once a round, with what that round came to. Only the rounds are timed:

    def ours(dtype: str) -> Iterator[Values]:
        import torch
        model = load(dtype)
        yield {}                                     # ready: the memory held now counts as loaded
        for block in blocks():
            loss = step(model, block)
            yield {"loss": loss, "grad_norm": norm, "tokens": block.numel(), "data": fingerprint(block)}

    def main() -> None:                              # `parser` and `finish` are in _report.py
        arguments = parser(__doc__).parse_args()
        sides = [Side("nbtune", ours, {"dtype": "bfloat16"}), Side("peft", theirs, {"dtype": "bfloat16"})]
        comparison = compare(sides, rounds=10, threads=arguments.threads)     # A B A B ...; the first is ours
        comparison.require_same("data")              # the same tokens in the same order
        comparison.require_positive("grad_norm")
        comparison.require_close("loss", 0.01)       # ours is within 1 % of each other side's, round for round
        finish("step", comparison, arguments)        # prints, and writes --json and --page

    if __name__ == "__main__":                       # children import the script again
        main()

Work that calls back (a trainer, a run) becomes such a generator with `paced`. One side alone is measured as well:
`compare([side], rounds=3)[0].peak_bytes`. `speed_ratio` is the median over the rounds of their seconds (a token, where
rounds tell their "tokens") over ours, and `memory_ratio` our peak over theirs, above the loaded model (or whole, with
`finish(..., whole_memory=True)`). Rounds that tell their model "flops" get a share of the machine's matrix rate (MFU).

The peak on Linux is the kernel's own (VmHWM, reset before each round), elsewhere a thread reads RSS every 5 ms; on a
GPU it is `torch.cuda.max_memory_allocated`. These files need torch only, and plotly where a page is written.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from _process import Child, Rounds, Side, Values, matrix_rate

__all__ = ["Comparison", "DisagreementError", "Measured", "Side", "Values", "compare", "matrix_rate", "paced"]


class DisagreementError(AssertionError):
    """The sides did not do the same work, so their times must not be compared."""


@dataclass
class Measured:
    """One side's rounds, those of the warm-up left out of `seconds` but not of the memory."""

    name: str
    loaded_bytes: int  # held when it was ready
    ready: Values  # what it told then
    peak_bytes: int = 0  # the most that was held, the loaded model included
    seconds: list[float] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)  # of every round, the warm-up's too

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def above_bytes(self) -> int:
        """The peak above the loaded model."""
        return self.peak_bytes - self.loaded_bytes

    @property
    def timed(self) -> list[Values]:
        """The values of the timed rounds."""
        return self.values[-len(self.seconds) :]

    @property
    def paces(self) -> list[float]:
        """Seconds of each timed round, or a token of it where rounds count tokens."""
        pairs = zip(self.seconds, self.timed, strict=True)
        return [seconds / values.get("tokens", 1) for seconds, values in pairs]

    def per_second(self, name: str) -> float:
        """What the timed rounds came to, such as tokens, over the time they took."""
        return sum(values[name] for values in self.timed) / sum(self.seconds)


@dataclass
class Comparison:
    """All sides of one benchmark, ours first, and the machine's rate at matrix products in the same minutes."""

    sides: list[Measured]
    matrix_rates: dict[str, float]  # FLOP/s by dtype

    def __getitem__(self, index: int) -> Measured:
        return self.sides[index]

    @property
    def rivals(self) -> list[Measured]:
        return self.sides[1:]

    def speed_ratio(self, rival: Measured) -> float:
        """How many times faster ours is, a token where rounds count tokens: the median over rounds run in turns."""
        pairs = zip(self[0].paces, rival.paces, strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    def memory_ratio(self, rival: Measured, *, whole: bool = False) -> float:
        """Our peak over theirs, above the loaded model or whole."""
        if whole:
            return self[0].peak_bytes / rival.peak_bytes
        return self[0].above_bytes / rival.above_bytes

    def require_same(self, name: str, rivals: Sequence[Measured] | None = None) -> None:
        """Raise DisagreementError where a value differs in any round."""
        for rival in self.rivals if rivals is None else rivals:
            for number, (ours, theirs) in enumerate(zip(self[0].values, rival.values, strict=True)):
                if ours[name] != theirs[name]:
                    raise DisagreementError(
                        f"{name} of round {number} is {ours[name]}, with {rival.name} {theirs[name]}"
                    )

    def require_positive(self, name: str) -> None:
        """Raise DisagreementError where a value of any side is not above zero."""
        for side in self.sides:
            for number, values in enumerate(side.values):
                if not values[name] > 0:
                    raise DisagreementError(f"{name} of {side.name} in round {number} is {values[name]}")

    def require_close(self, name: str, tolerance: float, rivals: Sequence[Measured] | None = None) -> None:
        """Raise DisagreementError where ours is further from a rival's than `tolerance` (relative) in any round."""
        for rival in self.rivals if rivals is None else rivals:
            worst = self.deviation(name, rival)
            if not worst <= tolerance:
                raise DisagreementError(f"{name} differs from {rival.name}'s by {worst:.2%}; allowed {tolerance:.0%}")

    def deviation(self, name: str, rival: Measured) -> float:
        """The largest relative difference of a value in any round."""
        pairs = zip(self[0].values, rival.values, strict=True)
        return max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for ours, theirs in pairs)


def compare(
    sides: Sequence[Side],
    *,
    rounds: int,
    warmup: int = 1,
    threads: int | None = None,
    device: str | None = None,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    apart: bool = True,
) -> Comparison:
    """Run the sides in turns: `warmup` rounds that are not timed, then `rounds` that are.

    Args:
        sides: Ours first.
        rounds: Timed rounds; every side must yield `1 + warmup + rounds` times.
        warmup: Rounds before them.
        threads: Of torch, in every process; None leaves torch's own choice.
        device: "cpu" or "cuda", for the memory and the matrix rates; None is CUDA where there is one.
        dtypes: Whose matrix rates are measured between the rounds, while all sides sleep.
        apart: Each side in a process of its own; else all in this one, where their memory cannot be told apart.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    children = [Child(side, device, threads) if apart else Rounds(side, device) for side in sides]
    try:
        measured = [Measured(child.name, *child.ready()) for child in children]
        rates: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
        for number in range(warmup + rounds):
            for child, side in zip(children, measured, strict=True):
                seconds, peak, values = child.round()
                side.peak_bytes = max(side.peak_bytes, peak)
                side.values.append(values)
                if number >= warmup:
                    side.seconds.append(seconds)
            for dtype, found in rates.items():
                found.append(matrix_rate(dtype, device))
    finally:
        for child in children:
            child.close()
    return Comparison(measured, {dtype: statistics.median(found) for dtype, found in rates.items()})


def paced(work: Callable[[Callable[[Values], None]], None]) -> Iterator[Values]:
    """A generator over what `work(report)` reports; between two rounds `work` stands still inside `report`."""
    reports: list[Values | BaseException | None] = []
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    def report(values: Values) -> None:
        reports.append(values)
        done.release()
        go.acquire()

    def run() -> None:
        go.acquire()
        end: BaseException | None = None
        try:
            work(report)
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            end = error
        reports.append(end)
        done.release()

    threading.Thread(target=run, daemon=True).start()
    while True:
        go.release()
        done.acquire()
        match reports.pop():
            case None:
                return
            case BaseException() as error:
                raise error
            case values:
                yield values
