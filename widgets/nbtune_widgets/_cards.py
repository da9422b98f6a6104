"""Pieces of HTML that the wizard shows: the model, a row of the data with its loss, the plan, problems, changes."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Literal

from nbtune.spec import settings
from nbtune_widgets._style import chip, duration, gigabytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nbtune.check import Problem
    from nbtune.data import Example, Rows
    from nbtune.models import ModelInfo
    from nbtune.plan import Plan
    from nbtune.spec import RunSpec

SHOWN_TOKENS = 220
TIGHT = 0.2  # of the memory there is: with less than that to spare, other programs decide
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
        ("Stored as", info.dtype or "not stated"),
        ("Licence", info.licence or "its files state none"),
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
    share = min(1.0, peak / planned.available_bytes) if planned.available_bytes else 1.0
    color = "var(--nt-red)" if peak > planned.available_bytes else "var(--nt-soft)"
    gauge = f'<div class="nt-gauge"><div style="width:{100 * share:.1f}%;background:{color}"></div></div>'
    bar = f'<div class="nt-parts">{_bar(planned, peak)}</div>'
    return f'<div class="nt-plan">{bar}{gauge}<div class="nt-keys">{_keys(planned)}</div></div>'


def memory(planned: Plan) -> str:
    """Memory by part as a bar as long as the machine's memory, what is left of it, and how the step is laid out."""
    peak, there = planned.peak_bytes, planned.available_bytes
    whole = max(peak, there)
    limit = "" if peak <= there else f'<i class="nt-limit" style="left:{100 * there / whole:.2f}%"></i>'
    bar = f'<div class="nt-parts nt-scale">{_bar(planned, whole)}{limit}</div>'
    kind, text = fit(planned)
    needs = f"{gigabytes(peak)} of {gigabytes(there)}"
    head = f'<span class="nt-b">{needs}</span> <span class="nt-fit nt-{kind}">{text}</span>'
    again = f"{planned.checkpointed_layers} of {planned.layers} layers computed again"
    parts = [
        f"micro-batches of {planned.micro_batch_size} x {planned.accumulation}",
        f"{planned.packing_length:,} tokens in each",
        again if planned.checkpointed_layers else "no layer computed again",
        *([] if planned.traced else ["activations estimated"]),
    ]
    layout = ", ".join(parts)
    return f'{head}{bar}<div class="nt-keys">{_keys(planned)}</div><div class="nt-soft nt-small">{layout}</div>'


def fit(planned: Plan) -> tuple[Literal["fits", "tight", "no"], str]:
    """Whether a run fits into the memory there is, and by how much."""
    spare = planned.available_bytes - planned.peak_bytes
    if spare < 0:
        return "no", f"does not fit, {gigabytes(-spare)} short"
    if spare < TIGHT * planned.available_bytes or planned.chosen:
        return "tight", f"tight, {gigabytes(spare)} to spare"
    return "fits", f"fits, {gigabytes(spare)} to spare"


def size(count: float) -> str:
    """Bytes in as few figures as tell sizes apart: 0.27 GB, 15.2 GB, 47 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else gigabytes(count)


def _bar(planned: Plan, whole: int) -> str:
    return "".join(
        f'<div style="width:{100 * part / whole:.2f}%;background:{_COLORS.get(name, "#b3bac6")}" '
        f'title="{escape(name)} {gigabytes(part)}">{escape(name) if part > 0.16 * whole else ""}</div>'
        for name, part in planned.parts.items()
        if part
    )


def _keys(planned: Plan) -> str:
    return "".join(
        f'<span><i style="background:{_COLORS.get(name, "#b3bac6")}"></i>{escape(name)} {gigabytes(part)}</span>'
        for name, part in planned.parts.items()
        if part
    )


def sums(planned: Plan, spec: RunSpec, before: int | None = None) -> str:
    """1.6 GB of 23.4 GB · about 4 min, and what that is made of; `before` is the last plan's peak in bytes."""
    free, training = planned.available_bytes, spec.training
    about = f" · about {duration(planned.seconds)}" if planned.seconds is not None else ""
    packed = ", packed" if training.packing else ""
    steps = f"{training.max_steps:,} steps" if training.max_steps > 0 else _epochs(training.num_train_epochs)
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    change = planned.peak_bytes - (before if before is not None else planned.peak_bytes)
    sign = f' <span class="nt-soft">({"+" if change > 0 else "−"}{gigabytes(abs(change))})</span>'
    return (
        f'<div class="nt-right"><div class="nt-b">{gigabytes(planned.peak_bytes)}{sign if abs(change) > 1e6 else ""}'
        f" of {gigabytes(free)}{about}</div>"
        f'<div class="nt-soft nt-small">{steps} of {rows} x {training.max_length} tokens{packed}</div></div>'
    )


def _epochs(count: float) -> str:
    return f"{count:g} epoch" + ("" if count == 1 else "s")


def problem(found: Problem) -> str:
    kind = "nt-error" if found.severity == "error" else ""
    lines = "".join(f"<div>{escape(line)}</div>" for line in (found.message, found.remedy) if line)
    return f'<div class="nt-problem {kind}"><span class="nt-b">{escape(found.title)}</span>{lines}</div>'


def differences(before: RunSpec, after: RunSpec) -> list[tuple[str, str, str]]:
    """The settings in which two specs differ: (label, old value, new value)."""
    old, new = before.to_dict(), after.to_dict()
    another = before.method_name != after.method_name
    found = [("Method", before.method_name, after.method_name)] if another else []
    for setting in settings(after.method):
        if another and setting.part == "method":
            continue
        one, two = old[setting.part].get(setting.name), new[setting.part].get(setting.name)
        if one != two:
            found.append((setting.label, _said(one), _said(two)))
    return found


def changed(why: str, differing: list[tuple[str, str, str]]) -> str:
    """What a preset or a remedy did, in a line."""
    parts = " · ".join(
        f'{escape(label)} <span class="nt-soft">{escape(old)} →</span> <span class="nt-b">{escape(new)}</span>'
        for label, old, new in differing
    )
    parts = parts or "all of it is set already"
    return f'<div class="nt-problem nt-info" role="status"><span class="nt-b">{escape(why)}</span>: {parts}</div>'


def _said(value: Any) -> str:
    words = {True: "yes", False: "no", None: "none"}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):  # steps of a recipe, sources
        return ", ".join(str(item.get("step") or item.get("source")) for item in value) or "none"
    text = words[value] if isinstance(value, bool | None) else f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) < 48 else f"{text[:45]}..."


def pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
