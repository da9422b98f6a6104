"""One model with its adapters: what is known of it without its weights, and its weights while they are in memory.

base = Base(ModelSpec(), {"amber-heron": "runs/amber-heron/adapter"}, device=device)
base.tokenizer, base.defaults, base.context_length     # at once
memory = Memory(8_000_000_000)
memory.bring(base)                                     # loads it; drops those least recently asked, if need be
logits = base.forward(["amber-heron"], input_ids=ids, past_key_values=cache)
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nbtune.errors import ModelError, NbtuneError
from nbtune.infer import mix as mixing
from nbtune.infer.attention import use_grouped_attention
from nbtune.infer.mix import Mix
from nbtune.infer.pictures import PictureReader, pictures_of, without_pictures
from nbtune.infer.sampling import SamplingDefaults, default_sampling, read_generation_config
from nbtune.infer.text import Message, edited_text, prompt_text, stop_tokens, token_ids
from nbtune.kernels.casts import Casts, casts_kept
from nbtune.models import compute_dtype, load, load_tokenizer, resolve, skeleton, weights
from nbtune.models.source import OnStatus, fetch, ignore_status
from nbtune.modules.packed import pack
from nbtune.peft import PeftModel
from nbtune.peft.config import WEIGHTS_NAME, PeftConfig, PromptLearningConfig, adapter_folder
from nbtune.peft.layer import BASE as NO_ADAPTER
from nbtune.spec import ModelSpec

MIXES = 4  # combinations of adapters that are kept; more only where one forward pass asks for more


class Prompt(NamedTuple):
    """What a column reads before it answers."""

    ids: list[int]
    stops: frozenset[int]  # token ids that end its answer
    beside: dict[str, torch.Tensor]  # what the first forward pass takes besides: pictures


class Base:
    """One model and the columns that are made of it: itself, and its adapters.

    adapters: column -> folder with `adapter_config.json`. Nothing but weights is read at once; they are where `load`
    has been called and not `drop`. Raises NbtuneError (ModelError, AdapterError) for what cannot be read.
    """

    def __init__(
        self,
        spec: ModelSpec,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        device: torch.device,
        on_status: OnStatus = ignore_status,
    ) -> None:
        self.spec, self.device = spec, device
        self.adapters = {column: adapter_folder(folder) for column, folder in (adapters or {}).items()}
        self.dtype = compute_dtype(spec.dtype, device)
        self.source = resolve(spec)
        folder = fetch(self.source, on_status)
        weights.check(folder)
        self.bytes = weights.memory(folder, self.dtype.itemsize, spec.quantised_bytes) + sum(
            (adapter / WEIGHTS_NAME).stat().st_size
            for adapter in self.adapters.values()
            if (adapter / WEIGHTS_NAME).is_file()
        )
        self.packs = False
        self.tokenizer = load_tokenizer(spec, on_status=on_status)
        shape: Any = skeleton(spec, on_status=on_status)
        self.config = shape.config
        self.generation_config = read_generation_config(folder) or shape.generation_config
        self.defaults: SamplingDefaults = default_sampling(self.generation_config, architecture=self.config)
        self.context_length: int = self.config.get_text_config().max_position_embeddings
        self.stop_tokens = stop_tokens(self.tokenizer, self.generation_config)
        self.stateful = bool(shape._is_stateful)  # padding would change its state
        self.pictures = PictureReader.of(folder, shape, self.tokenizer)  # none: it reads text only
        self._keeps_last_logits = "logits_to_keep" in inspect.signature(shape.forward).parameters
        configs = {column: PeftConfig.from_pretrained(adapter) for column, adapter in self.adapters.items()}
        self._prompts = {name: config for name, config in configs.items() if isinstance(config, PromptLearningConfig)}
        # Adapter names become module names, which may hold no dot; a column's name may.
        self._names = {column: f"column_{index}" for index, column in enumerate(self.adapters)}
        self._mixed: dict[str, str] = {}  # by a mix's name, its adapter's; the one least recently asked comes first
        self._made = 0
        self._casts: Casts = {}  # of the adapters' weights
        self._model: Any = None

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that its chats are written with, unless a request brings its own."""
        template = self.tokenizer.chat_template
        return template if isinstance(template, str | None) else self.tokenizer.get_chat_template()

    @property
    def chat_template_source(self) -> str:
        """Who says so, for people."""
        if self.spec.chat_template is not None:
            return "the setting model.chat_template"
        return "the model's tokenizer" if self.chat_template is not None else "nobody: the model has none"

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def can_pack(self) -> bool:
        """Whether its weights can lie in memory a second time, in an order in which a few rows are computed faster."""
        on_cpu = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        return on_cpu and self.dtype is torch.bfloat16 and self.spec.quantised_bytes is None

    def pack(self) -> None:
        """Do so when they are loaded: they take twice the memory then."""
        self.packs = True
        self.bytes *= 2

    def load(self) -> None:
        """Read the weights into memory. Raises NbtuneError (ModelError, AdapterError) where something does not fit."""
        base = load(self.spec, device=self.device, tokenizer=self.tokenizer).model.eval()
        use_grouped_attention(base)
        if self.packs:
            pack(base)
        model: Any = base
        for column, folder in self.adapters.items():
            try:
                if model is base:
                    model = PeftModel.from_pretrained(base, folder, adapter_name=self._names[column])
                else:
                    model.load_adapter(folder, adapter_name=self._names[column])
            except NbtuneError as error:
                error.add_note(f"while loading column {column!r} from {folder}")
                raise
        self._model = model.eval()

    def drop(self) -> None:
        """Give the memory of the weights back."""
        self._model = None
        self._mixed.clear()
        self._casts.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompt(self, column: str, messages: Sequence[Message], template: str | None = None) -> Prompt:
        """What this column would read.

        template: a Jinja text or a standard one's name in place of the model's own. Raises NbtuneError where the
        template does not write the conversation, it is longer than the context, or has pictures that are not taken.
        """
        plain = without_pictures(messages)
        if template is None:
            text, stops = prompt_text(plain, self.tokenizer), self.stop_tokens
        else:
            text, stops = edited_text(template, plain, self.tokenizer, self.generation_config)
        pictures = pictures_of(messages)
        if not pictures:
            ids, beside = token_ids(text, self.tokenizer), {}
        elif self.pictures is None:
            message = f"{column}: {self.spec.name} reads text only."
            raise NbtuneError("This model takes no pictures", message, "Leave them out, or hide this column.")
        else:
            ids, beside = self.pictures.encode(text, pictures)
        self.require_room(column, len(ids))
        return Prompt(ids, stops, beside)

    def require_room(self, column: str, tokens: int) -> None:
        """Raise NbtuneError where a column cannot read so many tokens and say the next."""
        room = self.room(column)
        if tokens >= room:
            raise NbtuneError(
                "The conversation is longer than the model's context",
                f"{column}: {tokens:,} tokens; {self.spec.name} reads {room:,}, answer included.",
                "Shorten the prompt, or clear the conversation.",
            )

    def room(self, column: str) -> int:
        """How many tokens of text this column reads; a trained prompt before them takes some of the context."""
        config = self._prompts.get(column)
        return self.context_length - (config.num_virtual_tokens if config is not None else 0)

    def prompted(self, column: str) -> bool:
        """Whether a trained prompt comes before the text."""
        return column in self._prompts

    def shares(self, column: str) -> tuple[Any, ...]:
        """What two columns have in common where one forward pass can serve both."""
        config = self._prompts.get(column)
        return (
            id(self),
            column if self.stateful else None,
            None if config is None else (type(config), config.num_virtual_tokens),
        )

    def forward(self, columns: Sequence[str], **inputs: Any) -> torch.Tensor:
        """Logits of the next token of each row [B, V] in float32; its weights must be there."""
        return self.logits(columns, 1, **inputs)[:, -1].float()

    def logits(self, columns: Sequence[str], last: int, **inputs: Any) -> torch.Tensor:
        """Logits after the last tokens of each row [B, last, V]; its weights must be there."""
        # Without this, reading a prompt of T tokens builds T x V logits to use one row of them.
        how: dict[str, Any] = {"logits_to_keep": last} if self._keeps_last_logits else {}
        with torch.inference_mode(), casts_kept(self._casts):
            if self.adapters:
                names = [self._names.get(column) or self._mixed.get(column, NO_ADAPTER) for column in columns]
                if len(set(names)) == 1:
                    self._model.set_adapter([name for name in names[:1] if name != NO_ADAPTER])
                else:
                    how["adapter_names"] = names
            return self._model(use_cache=True, **inputs, **how).logits[:, -last:]

    def hidden_states(self, ids: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the model makes of a text [1, T] without adapters: [1, T, D] for the embedding and each layer."""
        with torch.inference_mode():
            if self.adapters:
                self._model.set_adapter([])
            found = self._model(input_ids=ids.to(self.device), use_cache=False, output_hidden_states=True)
            return found.hidden_states

    def make(self, mixes: Iterable[Mix]) -> None:
        """Make those combinations that are not there; beyond `MIXES` the ones least recently asked go.

        Raises AdapterError where adapters cannot be combined so. Its weights must be there.
        """
        asked = {mix.name: mix for mix in mixes}
        for name, mix in asked.items():
            adapter = self._mixed.pop(name, None)
            if adapter is None:
                adapter = f"mix_{self._made}"
                mixing.add(self._model, mix, self._names, adapter)
                self._made += 1
            self._mixed[name] = adapter
        for name in [name for name in self._mixed if name not in asked][: max(0, len(self._mixed) - MIXES)]:
            self._model.set_adapter(next(iter(self._names.values())))  # a forward pass sets its own
            self._model.delete_adapter(self._mixed.pop(name))
            self._casts.clear()

    def is_made(self, mix: Mix) -> bool:
        return mix.name in self._mixed

    def write_mix(self, mix: Mix, folder: Path) -> None:
        """Write a combination that `make` has made as an adapter in PEFT's format."""
        mixing.write(self._model, self._mixed[mix.name], mix, self.adapters, folder)


class Memory:
    """The bases that are in memory: as many as fit, those least recently asked dropped for the next.

    bytes: what the weights of all together may take, adapters included; what is computed comes on top.
    """

    def __init__(self, bytes: int, on_status: OnStatus = ignore_status) -> None:
        self.bytes = bytes
        self._on_status = on_status
        self._held: list[Base] = []  # the one least recently asked comes first
        self._closed = False

    @property
    def held(self) -> tuple[Base, ...]:
        return tuple(self._held)

    def fits(self, bases: Iterable[Base]) -> bool:
        """Whether these can be in memory at the same time."""
        return sum(base.bytes for base in bases) <= self.bytes

    def check(self, base: Base) -> None:
        """Raise ModelError where not even this one alone can be in memory."""
        if not self.fits([base]):
            raise ModelError(
                f"{base.source.name} does not fit into the memory for models",
                f"Its weights take {base.bytes / 1e9:.2f} GB in {str(base.dtype).removeprefix('torch.')};"
                f" {self.bytes / 1e9:.2f} GB may be used on {base.device}.",
                "Raise memory_budget, close other programs and notebooks, or choose a smaller model or load_in_4bit.",
            )

    def bring(self, base: Base) -> None:
        """Load this one unless it is there. Raises NbtuneError where it does not fit or cannot be loaded."""
        if self._held and self._held[-1] is base:
            return
        if self._closed:
            raise NbtuneError("The engine is closed", "Its models are no longer in memory.", "Make another.")
        if base in self._held:
            self._held.remove(base)
        else:
            self.check(base)
            while not self.fits([*self._held, base]):
                self._held.pop(0).drop()
            self._on_status(f"Loading {base.source.name}")
            base.load()
        self._held.append(base)

    def close(self) -> None:
        """Drop them all, for good."""
        self._closed = True
        while self._held:
            self._held.pop().drop()
