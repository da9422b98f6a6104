"""How the next token is chosen: the settings, where their defaults come from, and the choice itself.

    defaults = default_sampling(model.generation_config)   # .sampling, .source, .text
    sampler = Sampler(defaults.sampling, seed=0, device=model.device)
    token = sampler(ids, logits)

The processors are transformers' own, in the order of its `generate`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nbtune.errors import NbtuneError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

SettingSource = Literal["generation_config", "nbtune's default"]


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
    source: SettingSource
    named: tuple[str, ...]  # the fields that the source names; the others are neutral

    @property
    def text(self) -> str:
        """For people: `temperature 0.2 from generation_config`."""
        return f"{settings_text(self.sampling, self.named)} from {self.source}"


def default_sampling(config: GenerationConfig) -> SamplingDefaults:
    """The model's own settings where its generation_config names any, else temperature 0.2 and top_p 0.9.

    0.2 and 0.9 are what the card of SmolLM2-Instruct recommends: small models wander at higher temperatures. A model
    that names only some settings gets neutral values for the others.
    """
    given = {name: value for name, value in config.to_diff_dict().items() if name in Sampling.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return SamplingDefaults(Sampling(), "nbtune's default", ("temperature", "top_p"))
    return SamplingDefaults(Sampling.of(**{**NEUTRAL.model_dump(), **given}), "generation_config", tuple(given))


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
