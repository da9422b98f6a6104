"""The steps that rows go through before they are trained on. A recipe is part of the spec and is replayed exactly.

    DataSpec(source="rows.jsonl", recipe=[
        {"step": "filter", "where": "len(output) > 20"},
        {"step": "deduplicate", "similarity": 0.8},
        {"step": "sample", "rows": 10_000},
    ])

Declared here; `nbtune.data.recipe` follows them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nbtune._expression import Condition

Part = Literal["row", "question", "answer"]


class _Step(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Filter(_Step):
    """Keep the rows for which a condition on their columns holds."""

    step: Literal["filter"] = "filter"
    where: str = Field(description='Which rows to keep: len(output) > 20 and "http" not in lower(output).')

    @field_validator("where")
    @classmethod
    def _understood(cls, value: str) -> str:
        Condition(value)  # raises a ValueError that names what it does not understand
        return value


class Length(_Step):
    """Keep the rows that are neither too short nor too long."""

    step: Literal["length"] = "length"
    of: Part = Field("row", description="What is measured: the whole row, what is asked, or what is answered.")
    unit: Literal["characters", "words", "tokens"] = Field(
        "characters", description="Tokens are those of the model; of a row, with what its chat template writes."
    )
    at_least: int | None = Field(None, ge=0, description="Shortest to keep.")
    at_most: int | None = Field(None, ge=1, description="Longest to keep.")

    @model_validator(mode="after")
    def _limited(self) -> Length:
        if self.at_least is None and self.at_most is None:
            raise ValueError("the step length needs at_least or at_most")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least is {self.at_least}, more than at_most, {self.at_most}")
        return self


class Deduplicate(_Step):
    """Keep the first of the rows that are the same, up to case and white space, or nearly the same."""

    step: Literal["deduplicate"] = "deduplicate"
    of: Part = Field("row", description="What is compared: the whole row, what is asked, or what is answered.")
    similarity: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of their runs of three words that two rows have in common (Jaccard); 1 drops copies only.",
    )


class Decontaminate(_Step):
    """Drop training rows whose question is also held out, or has as many words in a row in common with one that is.

    Done after the split, wherever it stands in the recipe.
    """

    step: Literal["decontaminate"] = "decontaminate"
    words: int = Field(13, ge=1, description="Words in a row that a question must not share with a held-out one.")
    source: str | None = Field(None, description="A further file or hub dataset with questions to keep out.")


class Sample(_Step):
    """Keep rows drawn at random, the same ones every time."""

    step: Literal["sample"] = "sample"
    rows: int = Field(ge=1, description="How many rows to keep.")
    seed: int = Field(0, ge=0, description="Another seed draws others.")


class Usable(_Step):
    """Drop the rows that cannot be used, for which a run would otherwise not start."""

    step: Literal["usable"] = "usable"


Step = Annotated[Filter | Length | Deduplicate | Decontaminate | Sample | Usable, Field(discriminator="step")]
