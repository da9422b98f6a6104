"""`nbtune export`: a trained model in a format that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

console = Console()


def export(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id or label, its folder, or an adapter's.")],
    format: Annotated[
        Literal["adapter", "merged", "gguf", "gguf-lora"],
        typer.Argument(help="A copy; one model for transformers; a file for llama.cpp; a LoRA beside a GGUF base."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder or .gguf file to make; nothing is overwritten.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="f32, f16, bf16; for gguf also q8_0, q4_1, q4_0. Default: merged bf16, gguf f16."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest file of a merged model: 500MB, 4GB.")] = "4GB",
    push_to: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Make this repository on the model hub and upload to it, once proved."),
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Who sees that repository.")] = True,
    runs_dir: Annotated[
        Path | None, typer.Option("--runs-dir", envvar="NBTUNE_RUNS", help="Folder of the runs; default ./runs.")
    ] = None,
) -> None:
    """Write a trained model for other programs, read it back, and say how near it is to the original."""
    from nbtune.export import export as write
    from nbtune.run import Run, default_runs_dir

    folder = runs_dir or default_runs_dir()
    is_adapter = (Path(run_id) / "adapter_config.json").exists()
    what = run_id if is_adapter else Run.open(run_id, runs_dir=folder)
    done = write(
        what,
        format,
        out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        push_to=push_to,
        private=private,
        runs_dir=folder,
        on_status=_say,
    )
    if done.pushed_to is not None:
        console.print(f"pushed to {done.pushed_to}", highlight=False, markup=False)


def _say(message: str) -> None:
    console.print(message, style="dim", highlight=False, markup=False)
