"""What every benchmark prints and writes: its options, its figures, the versions and the machine."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _side_by_side import Comparison, Measured

PACKAGES = ("nbtune", "torch", "transformers", "peft", "trl", "accelerate", "triton")


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that every benchmark has: --json, --page, --threads, --rounds."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one JSON object")
    options.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="the Plotly page; without it a file in the system's folder for temporary files",
    )
    options.add_argument("--threads", type=int, help="torch's threads; without it torch's own choice")
    options.add_argument("--rounds", type=int, default=defaults.pop("rounds", 10), help="timed rounds of each side")
    options.add_argument(
        "--one-process", action="store_true", help="all sides in this process; their memory cannot be told apart then"
    )
    options.set_defaults(**defaults)
    return options


def finish(
    name: str,
    comparison: Comparison,
    arguments: argparse.Namespace,
    *,
    whole_memory: bool = False,
    dtype: str = "bfloat16",
    **more: Any,
) -> dict[str, Any]:
    """Print the figures, write the JSON and the page, return the object.

    Args:
        name: Of the benchmark, such as "step".
        comparison: What was measured.
        arguments: Of `parser`; all of them are recorded.
        whole_memory: Compare whole peaks, not those above the loaded model.
        dtype: Whose matrix rate the MFU is a share of.
        more: Further entries of the object.
    """
    figures = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        **_ratios(comparison, whole_memory),
        "ours": _figures(comparison, comparison[0], dtype),
        "theirs": _figures(comparison, comparison.rivals[0], dtype),
        "others": [_figures(comparison, rival, dtype) for rival in comparison.rivals[1:]],
        "matrix_rate_flops": comparison.matrix_rates,
        **more,
        "versions": versions(),
        "machine": machine(),
    }
    _print(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    write_page(figures, arguments.page)
    return figures


def write_page(figures: Mapping[str, Any], path: Path | None) -> None:
    """The Plotly page of a benchmark's figures; told where plotly is missing and no page was asked for."""
    if path is None:
        if importlib.util.find_spec("plotly") is None:
            print("no page: plotly is not installed")
            return
        path = Path(tempfile.gettempdir()) / f"nbtune-{figures['benchmark']}.html"
    from _page import page

    path.write_text(page(figures), encoding="utf-8")
    print(f"page: {path}")


def _ratios(comparison: Comparison, whole: bool) -> dict[str, Any]:
    """The first rival's ratios, and everyone's."""
    against = {
        rival.name: {
            "speed_ratio": comparison.speed_ratio(rival),
            "memory_ratio": comparison.memory_ratio(rival, whole=whole),
        }
        for rival in comparison.rivals
    }
    return {**against[comparison.rivals[0].name], "against": against}


def _figures(comparison: Comparison, side: Measured, dtype: str) -> dict[str, Any]:
    """One side, in plain values."""
    found: dict[str, Any] = {
        "name": side.name,
        "seconds": side.median_seconds,
        "least_seconds": min(side.seconds),
        "all_seconds": side.seconds,
        "loaded_bytes": side.loaded_bytes,
        "peak_bytes": side.peak_bytes,
        "above_loaded_bytes": side.above_bytes,
        **side.ready,
    }
    if "tokens" in side.values[-1]:
        found["tokens_per_second"] = side.per_second("tokens")
    for name in ("loss", "grad_norm"):
        if name in side.values[-1]:
            found[name] = [values[name] for values in side.values]
    if "flops" in side.values[-1]:
        found["model_flops_per_second"] = side.per_second("flops")
        found["mfu"] = side.per_second("flops") / comparison.matrix_rates[dtype]
    return found


def versions() -> dict[str, str]:
    """Of Python and the packages that matter here, as far as they are installed."""
    installed = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
    found = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU, and how busy it was."""
    processor = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": processor[1] if processor else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": 1024 * int(memory[1]) if memory else None,
        "load_average": list(os.getloadavg()),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def _print(figures: Mapping[str, Any]) -> None:
    print(f"\n{figures['benchmark']}, {figures['date']}, {figures['machine']['processor']}")
    print("| | s / round | tokens/s | loaded GB | peak GB | above GB | MFU |\n|---|---|---|---|---|---|---|")
    for side in (figures["ours"], figures["theirs"], *figures["others"]):
        memory = " | ".join(f"{side[key] / 1e9:.2f}" for key in ("loaded_bytes", "peak_bytes", "above_loaded_bytes"))
        speed = f"{side['tokens_per_second']:.0f}" if "tokens_per_second" in side else "-"
        share = f"{side['mfu']:.0%}" if "mfu" in side else "-"
        print(f"| {side['name']} | {side['seconds']:.4g} | {speed} | {memory} | {share} |")
    for name, ratios in figures["against"].items():
        print(f"against {name}: {ratios['speed_ratio']:.2f}x as fast, {ratios['memory_ratio']:.2f}x the memory")
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in figures["matrix_rate_flops"].items())
    print(f"matrix rate: {rates}; load average {figures['machine']['load_average'][0]:.1f}")
