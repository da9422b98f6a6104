"""What the methods that train a prompt share, and how a prompt gets into the base model.

A prompt hangs at the input embedding, whose output it leaves alone: so adding, switching, saving and freezing are those
of every adapter. `prompted` puts it before the tokens with forward hooks on the one model object, which last for one
call. Generation, which only calls `forward`, thus needs nothing of its own: it counts the tokens that it was given.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from nbtune._transformers import PreTrainedModel
from nbtune.errors import AdapterError
from nbtune.modules.virtual_tokens import Arguments, before_each_text, before_embeddings, longer_mask, text_config
from nbtune.peft.config import PromptLearningConfig, invalid
from nbtune.peft.layer import BASE, ActiveAdapters, Adapter, AdapterLayer, SavedModule
from nbtune.peft.methods import adapter_class
from nbtune.peft.targets import with_task_heads

KEY = "prompt_embeddings"  # of the prompt in a file, without a prefix


class Prompt(Adapter):
    """Virtual tokens: `embedding` itself, or what `encoder` makes of it. Only what it makes is saved, as in PEFT.

    Here they are input embeddings [num_virtual_tokens * submodules, token_dim], of which a model with an encoder and a
    decoder reads the first num_virtual_tokens, in its encoder. A method overrides `create`.
    """

    bases = (nn.Embedding,)

    def __init__(self, embedding: Tensor, config: PromptLearningConfig, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)
        self.encoder = encoder
        self.length = config.num_virtual_tokens

    def tokens(self) -> Tensor:
        return self.embedding if self.encoder is None else self.encoder(self.embedding)

    @classmethod
    def facts(cls, model: PreTrainedModel) -> dict[str, int]:
        """What a config of this method says about the model it is for."""
        config, embedding = text_config(model), cast("Any", model.get_input_embeddings())
        sizes = {"num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}
        return {"token_dim": embedding.embedding_dim, **sizes}

    @classmethod
    def hooked(cls, model: PreTrainedModel) -> dict[nn.Module, Callable[[Prompted, Arguments], Arguments]]:
        """The modules whose arguments change, and how."""
        if not model.config.is_encoder_decoder:
            return {model: Prompted.before_embeddings}
        decoder_mask = "encoder_attention_mask"
        return {
            model.get_encoder(): Prompted.before_embeddings,
            model.get_decoder(): lambda prompted, arguments: longer_mask(arguments, prompted.length, decoder_mask),
        }

    @classmethod
    def packed(cls, prompted: Prompted, arguments: Arguments) -> tuple[Arguments, Tensor | slice]:
        """What the function `packed` gives with such a prompt."""
        return before_each_text(prompted.model, prompted.tokens(1)[:, : prompted.length], arguments)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y

    @classmethod
    def forward_rows(cls, adapters: Any, group: Any, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y

    def merged_weight(self, weight: Tensor, base: nn.Module) -> Tensor:
        message = f"{type(self).__name__} puts a prompt before the text; no weight of the model can hold it."
        raise AdapterError("A prompt cannot be merged", message, "Save the adapter and load it with the model.")

    def file_prefix(self, path: str) -> str:
        return ""

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        training = self.training
        self.eval()  # without dropout
        tokens = torch.func.functional_call(_Tokens(self), {f"prompt.{name}": state[name] for name in state}, ())
        self.train(training)
        return {KEY: tokens.detach()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if KEY in tensors and self.encoder is not None:
            message = "The file holds the virtual tokens; the network that makes them cannot be found from them."
            remedy = "Use load_adapter, which goes on with the virtual tokens themselves."
            raise AdapterError("Not into a prompt encoder", message, remedy)
        if KEY in tensors:
            self.embedding.copy_(tensors[KEY])


class _Tokens(nn.Module):
    """Makes `tokens` a module's forward, whose parameters torch.func can replace."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.prompt = prompt

    def forward(self) -> Tensor:
        return self.prompt.tokens()


class SavedBesidePrompt(SavedModule):
    """A head that is trained together with a prompt; PEFT writes its path without `model.`."""

    def file_prefix(self, path: str) -> str:
        return f"base_model.{path}."


def resolve(model: nn.Module, config: PromptLearningConfig) -> PromptLearningConfig:
    """The config with the facts of the base model, which PEFT reads from the file.

    Raises AdapterError where the model cannot have such a prompt, or is not the one that the config is for.
    """
    if not isinstance(model, PreTrainedModel):
        message = f"{type(model).__name__} is no model of transformers; {config.peft_type} needs its embeddings."
        raise AdapterError("No place for a prompt", message, "Use a method that adapts layers, such as LORA.")
    kind = adapter_class(config)
    assert issubclass(kind, Prompt)
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    facts: dict[str, Any] = kind.facts(model)
    if given["token_dim"] not in (None, facts["token_dim"]):
        raise invalid("token_dim", given["token_dim"], f"is {facts['token_dim']} in this model; leave it out")
    seq2seq = config.task_type == "SEQ_2_SEQ_LM" or (config.task_type is None and model.config.is_encoder_decoder)
    facts["num_transformer_submodules"] = 2 if seq2seq else 1
    if model.can_generate():  # PEFT puts no prompt before a model whose task the file does not name
        facts["task_type"] = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    if given.get("prompt_tuning_init") == "TEXT":
        facts["tokenizer_name_or_path"] = model.name_or_path
    if "encoder_hidden_size" in given:
        facts["encoder_hidden_size"] = facts["token_dim"]
    missing = {name: value for name, value in facts.items() if given[name] is None}
    return config.replace(modules_to_save=with_task_heads(config), **missing)


@contextmanager
def prompted(model: nn.Module, state: ActiveAdapters) -> Iterator[None]:
    """Inside, calls of the base model begin with the active prompt, if there is one. Raises what `_active` does."""
    with ExitStack() as stack:
        if (active := _active(model, state)) is not None:
            for module, change in active.prompts[0].hooked(active.model).items():
                hook = module.register_forward_pre_hook(active.hook(change), with_kwargs=True)
                stack.callback(hook.remove)
        yield


def packed(model: PreTrainedModel, arguments: Arguments) -> tuple[Arguments, Tensor | slice]:
    """A decoder's arguments for a packed row in which every segment begins with the active prompt, if there is one.

    The arguments are input_ids and position_ids [1, T], and the segments as transformers passes them to an attention
    (kernels.attention, which also takes the keys and values of a prefix). Of the result, T tokens are those of the row,
    at the places that are returned too; the others are virtual.
    """
    embedding = model.get_input_embeddings()
    active = _active(model, embedding.state) if isinstance(embedding, AdapterLayer) else None
    return (arguments, slice(None)) if active is None else active.prompts[0].packed(active, arguments)


def _active(model: nn.Module, state: ActiveAdapters) -> Prompted | None:
    """The prompts of the next call.

    Raises AdapterError for more than one, and for rows with and without a prompt or with prompts of other lengths.
    """
    rows = state.applied if state.rows is None else state.rows.names
    names = [name for name in rows if name != BASE and isinstance(state.configs[name], PromptLearningConfig)]
    if not names:
        return None
    assert isinstance(model, PreTrainedModel)
    if len(names) > 1 and state.rows is None:
        message = f"{', '.join(names)} are active, and each is a prompt of its own."
        raise AdapterError("More than one prompt", message, "Activate one of them with set_adapter.")
    distinct = list(dict.fromkeys(names))
    adapters: Any = model.get_input_embeddings().adapters
    prompts: list[Prompt] = [adapters[name] for name in distinct]
    kinds = {(type(prompt).hooked, prompt.length) for prompt in prompts}
    if state.rows is not None and (len(names) < len(rows) or len(kinds) > 1):
        message = "Rows of one batch need prompts of one length and one place (input embeddings or keys and values)."
        raise AdapterError("Rows with different prompts", message, "Put such rows into batches of their own.")
    return Prompted(model, prompts, [distinct.index(name) for name in names])


@dataclasses.dataclass(frozen=True)
class Prompted:
    """The prompts that are active during one call of a model."""

    model: PreTrainedModel
    prompts: Sequence[Prompt]
    which: Sequence[int]  # for each row a number in the list of prompts, or [0] for all rows

    @property
    def length(self) -> int:
        return self.prompts[0].length

    def before_embeddings(self, arguments: Arguments) -> Arguments:
        return before_embeddings(self.model, self.length, self.tokens, arguments)

    def hook(self, change: Callable[[Prompted, Arguments], Arguments]) -> Callable[..., tuple[tuple[()], Arguments]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> tuple[tuple[()], Arguments]:
            arguments = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
            if arguments.get("cu_seq_lens_q") is not None:
                message = "Several texts are packed into one row, and the prompt would only reach the first."
                raise AdapterError("A prompt before packed texts", message, "Give each text a row of its own.")
            return (), change(self, arguments)

        return before

    def tokens(self, rows: int) -> Tensor:
        """The virtual tokens of each of these rows [rows, ...]; generation repeats rows for its beams."""
        stack = torch.stack([prompt.tokens() for prompt in self.prompts])
        which = torch.tensor(self.which, device=stack.device).repeat_interleave(rows // len(self.which))
        return stack[which]
