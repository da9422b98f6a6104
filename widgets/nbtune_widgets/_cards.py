"""Pieces of HTML that the wizard shows: the model, a row of the data with its loss, the plan, problems, the code."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from nbtune_widgets._style import chip, duration, gigabytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nbtune.check import Problem
    from nbtune.data import Example, Rows
    from nbtune.models import ModelInfo
    from nbtune.plan import Plan
    from nbtune.spec import RunSpec

SHOWN_TOKENS = 220
_COLORS = {
    "base weights": "#8796ad",
    "adapter": "#4878d8",
    "gradients": "#8fb0ee",
    "optimiser": "#6b93e0",
    "activations": "#2f9461",
    "loss": "#7bbf98",
    "overhead": "#b3bac6",
}


def model(info: ModelInfo) -> str:
    """What the chosen model is, read from its config."""
    facts = [
        ("Architecture", info.architecture),
        ("Parameters", f"{info.parameters:,}"),
        ("Layers", f"{info.layers} of width {info.hidden_size:,}"),
        ("Vocabulary", f"{info.vocabulary:,} tokens" + (", tied to the output" if info.tied_embeddings else "")),
        ("Context", f"{info.context_length:,} tokens" if info.context_length else "no limit stated"),
        ("Weights", info.dtype or "not stated"),
        ("Chat template", "its own" if info.has_chat_template else "none: rows must be prompt and completion"),
        ("From", str(info.source.path or info.source.name)),
    ]
    rows = "".join(f'<span class="nt-soft">{name}</span><span>{escape(text)}</span>' for name, text in facts)
    return f'<div class="nt-facts">{rows}</div>'


def data(rows: Rows, example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Counts, the form that was found, and the first row with every token coloured by whether it carries loss."""
    chips = [f"form: {rows.format}", f"{len(rows.train):,} train · {len(rows.eval):,} held out"]
    chips += [f"{count:,} dropped: {reason}" for reason, count in rows.dropped.items()]
    top = f'<div class="nt-row" style="margin:6px 0 8px">{"".join(map(chip, chips))}</div>'
    tokens = _tokens(example, tokenizer)
    length = len(example)
    carried = example.supervised
    note = f"row {rows.train_numbers[0]:,} · {length:,} tokens, {carried:,} with loss"
    if length > SHOWN_TOKENS:
        note += f" · the first {SHOWN_TOKENS} shown"
    if length > max_length:
        note += f" · cut at {max_length:,}"
    legend = (
        '<span class="nt-t1">&nbsp;learnt&nbsp;</span> '
        '<span class="nt-tE">&nbsp;end of turn&nbsp;</span> <span class="nt-t0">context, no loss</span>'
    )
    return f'{top}<div class="nt-tokens">{tokens}</div><div class="nt-soft nt-small">{legend} · {note}</div>'


def _tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Neighbouring tokens of one colour are one span: some characters are spread over several tokens."""
    special = set(tokenizer.all_special_ids)
    spans: list[tuple[str, list[int]]] = []
    pairs = zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    for token, label in list(pairs)[:SHOWN_TOKENS]:
        look = "nt-t0" if label == -100 else "nt-tE" if token in special else "nt-t1"
        if spans and spans[-1][0] == look:
            spans[-1][1].append(token)
        else:
            spans.append((look, [token]))
    text = ((look, str(tokenizer.decode(ids, skip_special_tokens=False))) for look, ids in spans)
    return "".join(f'<span class="{look}">{escape(part)}</span>' for look, part in text)


def plan(planned: Plan) -> str:
    """Memory by part as a bar, its share of what is free as a line under it, and the sums beside it."""
    peak = planned.peak_bytes
    parts = [(name, size) for name, size in planned.parts.items() if size]
    bar = "".join(
        f'<div style="width:{100 * size / peak:.2f}%;background:{_COLORS.get(name, "#b3bac6")}" '
        f'title="{escape(name)} {gigabytes(size)}">{escape(name) if size > 0.16 * peak else ""}</div>'
        for name, size in parts
    )
    keys = "".join(
        f'<span><i style="background:{_COLORS.get(name, "#b3bac6")}"></i>{escape(name)} {gigabytes(size)}</span>'
        for name, size in parts
    )
    share = min(1.0, peak / planned.available_bytes) if planned.available_bytes else 1.0
    color = "var(--nt-red)" if peak > planned.available_bytes else "var(--nt-soft)"
    gauge = f'<div class="nt-gauge"><div style="width:{100 * share:.1f}%;background:{color}"></div></div>'
    return f'<div class="nt-plan"><div class="nt-parts">{bar}</div>{gauge}<div class="nt-keys">{keys}</div></div>'


def sums(planned: Plan, spec: RunSpec) -> str:
    """1.6 GB of 23.4 GB · about 4 min, and what that is made of."""
    free, training = planned.available_bytes, spec.training
    about = f" · about {duration(planned.seconds)}" if planned.seconds is not None else ""
    packed = ", packed" if training.packing else ""
    steps = f"{training.max_steps:,} steps" if training.max_steps > 0 else _epochs(training.num_train_epochs)
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return (
        f'<div class="nt-right"><div class="nt-b">{gigabytes(planned.peak_bytes)} of {gigabytes(free)}{about}</div>'
        f'<div class="nt-soft nt-small">{steps} of {rows} x {training.max_length} tokens{packed}</div></div>'
    )


def _epochs(count: float) -> str:
    return f"{count:g} epoch" + ("" if count == 1 else "s")


def problem(found: Problem) -> str:
    kind = "nt-error" if found.severity == "error" else ""
    lines = "".join(f"<div>{escape(line)}</div>" for line in (found.message, found.remedy) if line)
    return f'<div class="nt-problem {kind}"><span class="nt-b">{escape(found.title)}</span>{lines}</div>'


def python(spec: RunSpec) -> str:
    """The run as a program: what differs from the defaults, and nothing else."""
    arguments = [f"    model={_part(spec, 'model', 'name', 'nt.ModelSpec')},"]
    if spec.data.rows is None:
        arguments.append(f"    data={_part(spec, 'data', 'source', 'nt.DataSpec')},")
    else:
        arguments.append("    data=rows,  # the rows that were given to this wizard")
    if spec.method == "full":
        arguments.append('    method="full",')
    else:
        changes = _differences(spec.method.to_dict(), type(spec.method)().to_dict())
        arguments.append(f"    method={_call(f'nt.{type(spec.method).__name__}', changes)},")
    for part in ("training", "tracking"):
        changes = _changes(spec, part)
        if changes:
            arguments.append(f"    {part}={changes!r},")
    return "\n".join(
        ["import nbtune as nt", "", "spec = nt.RunSpec(", *arguments, ")", "run = nt.train(spec)", "run.watch()"]
    )


def _part(spec: RunSpec, part: str, key: str, cls: str) -> str:
    changes = _changes(spec, part)
    value = spec.to_dict()[part][key]
    changes.pop(key, None)
    return _call(cls, {key: value, **changes}) if changes else repr(value)


def _changes(spec: RunSpec, part: str) -> dict[str, Any]:
    return _differences(spec.to_dict()[part], type(spec)().to_dict()[part])


def _differences(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != defaults[name]}


def _call(name: str, arguments: dict[str, Any]) -> str:
    """name(a=1, b=2), one argument a line where that is long."""
    parts = [f"{key}={_literal(value)}" for key, value in arguments.items()]
    line = f"{name}({', '.join(parts)})"
    if len(line) < 80:
        return line
    return f"{name}(\n" + "".join(f"        {part},\n" for part in parts) + "    )"


def _literal(value: Any) -> str:
    """As a person writes it: a run of numbers as a range."""
    numbers = isinstance(value, list) and len(value) > 3 and all(isinstance(item, int) for item in value)
    if numbers and value == list(range(value[0], value[-1] + 1)):
        return f"list(range({value[0]}, {value[-1] + 1}))"
    return repr(value)


def pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
