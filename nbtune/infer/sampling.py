"""How the next token is chosen: the settings, where their defaults come from, and the choice itself.

    defaults = default_sampling(model.generation_config, architecture=model.config)   # .sampling, .source, .text
    sampler = Sampler(defaults.sampling, seed=0, device=model.device)
    token = sampler(ids, logits)

The processors are transformers' own, in the order of its `generate`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nbtune.errors import NbtuneError
from nbtune.infer.families import family_of

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig

OWN_FILE = "generation_config.json"


class Sampling(BaseModel):
    """How the next token is chosen. The neutral value of each field leaves the model's distribution as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        default=0.2,
        ge=0,
        le=2,
        description="0 always takes the likeliest token; 1 is the model's own distribution.",
    )
    top_p: float = Field(default=0.9, gt=0, le=1, description="Keep the likeliest tokens up to this probability.")
    top_k: int = Field(default=0, ge=0, le=1000, description="Keep this many of the likeliest tokens; 0 keeps all.")
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Drop tokens below this share of the likeliest; 0 drops none.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.5,
        le=2,
        description="Above 1, tokens that were already used become less likely; 1 changes nothing.",
    )

    @classmethod
    def of(cls, **values: Any) -> Sampling:
        """A checked `Sampling`. Raises NbtuneError naming the setting that is out of range, and its range."""
        try:
            return cls(**values)
        except ValidationError as error:
            found = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
            raise NbtuneError(
                "Sampling setting out of range", "; ".join(found), "Choose a value in the range."
            ) from error

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling(temperature=0, top_p=1)
NEUTRAL = Sampling(temperature=1, top_p=1)


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """The settings that a model starts with, and who says so."""

    sampling: Sampling
    source: str  # "generation_config", "the base's generation_config", "the model card of ...", "nbtune's default"
    named: tuple[str, ...]  # the fields that the source names; the others are neutral
    ignored: str = ""  # what a source before it says that cannot be used, and why

    @property
    def text(self) -> str:
        """For people: `temperature 0.2, top_p 0.9 from generation_config`."""
        said = f"{settings_text(self.sampling, self.named)} from {self.source}"
        return f"{said} ({self.ignored})" if self.ignored else said


def default_sampling(
    config: GenerationConfig,
    *,
    base: GenerationConfig | None = None,
    architecture: PretrainedConfig | None = None,
) -> SamplingDefaults:
    """What a model starts with, from the first of these that names a setting.

    `config`, its own; `base`, that of the model it was made from; what the maker publishes for models of its
    `architecture`; else temperature 0.2 and top_p 0.9, which the card of SmolLM2-Instruct recommends: small models
    wander at higher temperatures. A source that names only some settings leaves the others neutral. One that names a
    value out of range is passed over, and `ignored` says so: nobody can mend a file of the hub.
    """
    ignored = ""
    for source, given in _sources(config, base, architecture):
        if not given:
            continue
        try:
            sampling = Sampling.of(**{**NEUTRAL.model_dump(), **given})
        except NbtuneError as error:
            ignored = ignored or f"{source} is not used: {error.message}"
            continue
        return SamplingDefaults(sampling, source, tuple(given), ignored)
    return SamplingDefaults(Sampling(), "nbtune's default", ("temperature", "top_p"), ignored)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation_config.json of a model's or an adapter's folder; none where there is no such file.

    Raises NbtuneError where the file is not JSON.
    """
    if not (folder / OWN_FILE).is_file():
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        raise NbtuneError(
            "The sampling settings cannot be read", f"{folder / OWN_FILE}: {error}", "Mend the file, or delete it."
        ) from error


def _sources(
    config: GenerationConfig, base: GenerationConfig | None, architecture: PretrainedConfig | None
) -> list[tuple[str, dict[str, Any]]]:
    """Who may say something, and what they say, the nearest to the model first."""
    sources = [("generation_config", _named(config))]
    if base is not None:
        sources.append(("the base's generation_config", _named(base)))
    if architecture is not None and (family := family_of(architecture)):
        sources.append((family.published, dict(family.settings)))
    return sources


def _named(config: GenerationConfig) -> dict[str, Any]:
    """The settings that a config names. One that says `do_sample: false` is greedy, whatever else stands in it."""
    named = config.to_diff_dict()
    given = {name: named[name] for name in Sampling.model_fields if named.get(name) is not None}
    if named.get("do_sample") is False:
        return {**given, "temperature": 0}
    return given


def settings_text(sampling: Sampling, names: tuple[str, ...]) -> str:
    """`temperature 0.2, top_p 0.9`, or `greedy` where the likeliest token is always taken."""
    if sampling.greedy:
        return "greedy (temperature 0)"
    return ", ".join(f"{name} {getattr(sampling, name):g}" for name in names)


class Sampler:
    """Chooses one token at a time, with its own random numbers, so that a seed means the same text in any company."""

    def __init__(self, sampling: Sampling, seed: int, device: torch.device) -> None:
        import torch
        from transformers.generation import logits_process as process

        self.greedy = sampling.greedy
        self.generator = torch.Generator(device).manual_seed(seed)
        self.processors = process.LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self.processors.append(process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if self.greedy:
            return
        if sampling.temperature != 1:
            self.processors.append(process.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.processors.append(process.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.processors.append(process.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self.processors.append(process.MinPLogitsWarper(sampling.min_p))

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token. ids: [1, T], everything so far; logits: [1, V], float32, changed in place."""
        import torch

        scores = self.processors(ids, logits)  # pyright: ignore[reportArgumentType]
        if self.greedy:
            return int(scores.argmax(dim=-1))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))
