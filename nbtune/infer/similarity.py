"""How near a prompt is to the prompts that an adapter was trained on.

    embedder = Embedder.of_model(ModelSpec())
    index = Index.of_texts(questions, embedder)
    index.save(run.path); index = Index.read(run.path)
    nearest = Nearest({"amber-heron": index, "quiet-otter": other}, embedder)
    nearest.scores("What does os.path.join do?")     # {"amber-heron": 0.71, "quiet-otter": 0.32}

A prompt becomes one vector: the mean of the base model's own hidden states at three quarters of its depth. Input
embeddings cost nothing, but tell a way of asking better than a subject (docs/chat.md has the figures).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from nbtune import _files
from nbtune.errors import NbtuneError
from nbtune.models import load
from nbtune.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ROWS = 256  # of an index, spread evenly over the data
MAX_CHARACTERS = 4000  # of a prompt that are looked at, and at most
MAX_TOKENS = 256
NEIGHBOURS = 5  # rows that make a score
DEPTH = 0.75  # of the model, where the hidden states are taken
EMBEDDING = "mean hidden state at 0.75 of the depth"
_FORMAT = 1


class Embedder:
    """Texts to vectors by a base model without adapters.

    states: token ids [1, T] to the hidden states after the embedding and after each layer, [1, T, D] each. origin: the
    model's name, which an index is held against.
    """

    def __init__(
        self, states: Callable[[torch.Tensor], Sequence[torch.Tensor]], tokenizer: PreTrainedTokenizerBase, origin: str
    ) -> None:
        self.states = states
        self.tokenizer = tokenizer
        self.origin = origin
        self._control = frozenset(tokenizer.all_special_ids)
        # The first token of any text gathers attention and says nothing of it: one that is no part of the text.
        self._first = next(
            token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if isinstance(token, int)
        )

    @classmethod
    def of_model(cls, spec: ModelSpec, *, device: str | torch.device | None = None) -> Embedder:
        """Load the base model. Raises ModelError as `load` does."""
        loaded = load(spec, device=device)
        model: Any = loaded.model.eval()

        def states(ids: torch.Tensor) -> Sequence[torch.Tensor]:
            return model(input_ids=ids.to(model.device), use_cache=False, output_hidden_states=True).hidden_states

        return cls(states, loaded.tokenizer, loaded.source.origin)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, D], float32 on the CPU. A text without tokens, or of control tokens alone, is the zero vector."""
        return torch.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> torch.Tensor:
        readable = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        ids = self.tokenizer(readable, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [token for token in ids if token not in self._control][:MAX_TOKENS]
        with torch.inference_mode():
            states = self.states(torch.tensor([[self._first, *ids]]))
            state = states[round(DEPTH * (len(states) - 1))][0, 1:]  # [T, D]
            return (state.float().sum(0) / max(len(ids), 1)).cpu()


@dataclasses.dataclass(frozen=True)
class Index:
    """The prompts of one adapter's training data, as vectors."""

    vectors: torch.Tensor  # [N, D]
    model: str  # whose embeddings they are
    data: str  # what the data is called
    total: int  # prompts that there were

    @classmethod
    def of_texts(cls, texts: Sequence[str], embedder: Embedder, data: str = "") -> Index:
        """An index of at most `MAX_ROWS` different texts. Raises NbtuneError where there are fewer than two."""
        different = list(dict.fromkeys(text for text in texts if text.strip()))
        if len(different) < 2:
            raise NbtuneError(
                "There are too few prompts to compare with",
                f"{data or 'The data'} has {len(different)} different.",
                "Route by a rule or a pattern, or give more data.",
            )
        step = max(len(different) / MAX_ROWS, 1)
        chosen = [different[int(place * step)] for place in range(min(len(different), MAX_ROWS))]
        return cls(embedder(chosen), embedder.origin, data, len(different))

    def save(self, folder: Path) -> None:
        """Write `router.safetensors` and `router.json` into the folder."""
        from safetensors.torch import save

        about = {"format": _FORMAT, "embedding": EMBEDDING, "model": self.model, "data": self.data, "total": self.total}
        _files.write_bytes(folder / "router.safetensors", save({"vectors": self.vectors.half().contiguous()}))
        _files.write_text(folder / "router.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Index:
        """What `save` wrote. Raises NbtuneError where it is missing, damaged, or of another form."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            about = json.loads((folder / "router.json").read_text(encoding="utf-8"))
            vectors = load_file(folder / "router.safetensors")["vectors"].float()
            known = about["format"] == _FORMAT and about["embedding"] == EMBEDDING
            index = cls(vectors, str(about["model"]), str(about["data"]), int(about["total"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(folder, f"{type(error).__name__}: {error}") from error
        if not known or vectors.ndim != 2 or len(vectors) < 2 or not vectors.isfinite().all():
            raise _unreadable(folder, "It is not of the form that this version writes.")
        return index


class Nearest:
    """Scores of a prompt against several indexes of one base model.

    A score is the mean cosine to the `NEIGHBOURS` nearest training prompts, after what the prompts of all indexes have
    in common is taken away. Raises NbtuneError for an index of another model.
    """

    def __init__(self, indexes: Mapping[str, Index], embedder: Embedder) -> None:
        for name, index in indexes.items():
            if index.model != embedder.origin:
                raise NbtuneError(
                    f"The index of {name} is of another model",
                    f"It was made with {index.model}; the prompts are embedded with {embedder.origin}.",
                    "Make it again: nt.router(..., refresh=True).",
                )
        self.embedder = embedder
        means = torch.stack([index.vectors.mean(0) for index in indexes.values()])
        # One index alone has nothing in common with others: its own mean would take away what it is about.
        self._common = means.mean(0) if len(means) > 1 else torch.zeros_like(means[0])
        self._rows = {name: self._directions(index.vectors) for name, index in indexes.items()}  # [N, D], of length 1
        self.least = {name: self._least(name) for name in indexes}

    def scores(self, prompt: str) -> dict[str, float]:
        """From -1 to 1 for each index; 0 for a prompt without text."""
        vector = self.embedder([prompt])
        if not vector.any():
            return dict.fromkeys(self._rows, 0.0)
        direction = self._directions(vector)
        return {name: float(_nearest(direction @ rows.T)) for name, rows in self._rows.items()}

    def _directions(self, vectors: torch.Tensor) -> torch.Tensor:
        return functional.normalize(vectors - self._common, dim=-1)

    def _least(self, name: str) -> float:
        """The score from which a prompt counts as near.

        Half way between what 19 of 20 of its own prompts reach, each held against the others, and what 19 of 20 prompts
        of the other indexes stay below; without others, the first of the two.
        """
        rows = self._rows[name]
        own = float(_nearest((rows @ rows.T).fill_diagonal_(-1)).quantile(0.05))
        foreign = [float(_nearest(other @ rows.T).quantile(0.95)) for key, other in self._rows.items() if key != name]
        return (own + max(foreign)) / 2 if foreign else own


def _nearest(cosines: torch.Tensor) -> torch.Tensor:
    """[M] from [M, N]: the mean of each row's largest."""
    return cosines.topk(min(NEIGHBOURS, max(cosines.shape[1] - 1, 1)), dim=-1).values.mean(dim=-1)


def _unreadable(folder: Path, why: str) -> NbtuneError:
    return NbtuneError(
        "The router's index cannot be read",
        f"{folder / 'router.json'}: {why}",
        "Make it again: nt.router(..., refresh=True).",
    )
