"""Virtual tokens before the text: what becomes of the arguments of a transformers model's forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbtune._transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from nbtune.errors import AdapterError
from nbtune.kernels.attention import segment_arguments

Arguments = dict[str, Any]  # of a module's forward, by name


def text_config(model: PreTrainedModel) -> Any:
    """The config of the layers that read or write text; of the decoder, where there is one."""
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    return decoder.config.get_text_config(decoder=True)


def before_each(first: Tensor, row: Tensor, lengths: Sequence[int]) -> Tensor:
    """For first [1, n, ...] and the segments s1, s2, ... of row [1, T, ...]: first, s1, first, s2, ..."""
    return torch.cat([part for segment in row.split(lengths, dim=1) for part in (first, segment)], dim=1)


def before_each_text(model: PreTrainedModel, tokens: Tensor, arguments: Arguments) -> tuple[Arguments, Tensor]:
    """The arguments for a packed row with virtual tokens [1, n, dim] before each of its texts; the texts' places then.

    The arguments are input_ids and position_ids [1, T], and the segments as transformers passes them to an attention.
    """
    length, lengths = tokens.shape[1], arguments["cu_seq_lens_q"].diff().tolist()
    ids, positions = arguments["input_ids"], arguments["position_ids"]
    embeds = model.get_input_embeddings()(ids)
    first = torch.arange(length, device=ids.device)[None]
    places = before_each(torch.zeros_like(first), torch.ones_like(ids), lengths)[0].nonzero()[:, 0]
    borders = torch.tensor([0, *lengths], dtype=torch.int32)
    borders[1:] += length
    changes: Arguments = {"position_ids": before_each(first, positions + length, lengths)}
    changes |= segment_arguments(borders.cumsum(0, dtype=torch.int32), max(lengths) + length)
    changes |= {"input_ids": None, "inputs_embeds": before_each(tokens.to(embeds.dtype), embeds, lengths)}
    return {**arguments, **changes}, places


def longer_mask(arguments: Arguments, length: int, name: str = "attention_mask") -> Arguments:
    """The attention mask [B, T] of this name as [B, length + T]."""
    mask = arguments.get(name)
    if mask is None:
        return arguments
    if not torch.is_tensor(mask) or mask.ndim != 2:
        message = f"{name} is not a tensor [batch, tokens], to which a prompt can be added."
        raise AdapterError("Unknown attention mask", message, "Use no static cache, and no masks of your own.")
    return {**arguments, name: torch.cat([mask.new_ones(len(mask), length), mask], dim=1)}


def is_fresh(arguments: Arguments) -> bool:
    """Whether nothing has been read yet, so that the prompt is still to come."""
    cache = arguments.get("past_key_values")
    return cache is None or cache.get_seq_length() == 0


def before_embeddings(
    model: PreTrainedModel, length: int, tokens: Callable[[int], Tensor], arguments: Arguments
) -> Arguments:
    """The arguments with virtual tokens before the input embeddings, and with what goes with each token.

    `tokens` gives those of a number of rows [B, n, dim]; the first `length` are read.

    Labels of tokens begin with -100, so that logits are [B, length + T, ...], as in PEFT.
    """
    arguments = longer_mask(arguments, length)
    positions = arguments.get("position_ids")
    if positions is not None:
        arguments["position_ids"] = positions + length
    if not is_fresh(arguments):
        return arguments
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(ids)
    rows, count = embeds.shape[:2]
    virtual = tokens(rows)[:, :length].to(embeds.dtype)
    arguments |= {"input_ids": None, "inputs_embeds": torch.cat([virtual, embeds], dim=1)}

    if positions is not None:
        first = torch.arange(length, device=positions.device).expand(*positions.shape[:-1], length)
        arguments["position_ids"] = torch.cat([first, arguments["position_ids"]], dim=-1)
    if (types := arguments.get("token_type_ids")) is not None:
        arguments["token_type_ids"] = torch.cat([types.new_zeros(len(types), length), types], dim=1)
    labels = arguments.get("labels")
    if labels is not None and labels.shape == (rows, count) and not labels.is_floating_point():
        arguments["labels"] = torch.cat([labels.new_full((rows, length), -100), labels], dim=1)
    for name in ("start_positions", "end_positions"):  # of the answer to a question, in tokens
        if (answer := arguments.get(name)) is not None:
            arguments[name] = answer + length
    return arguments


def before_keys(
    model: PreTrainedModel,
    length: int,
    pairs: Callable[[int], Sequence[tuple[Tensor, Tensor]]],
    arguments: Arguments,
) -> Arguments:
    """The arguments with a cache that begins with a prefix; of an encoder and a decoder, that of the decoder.

    `pairs` gives, for a number of rows, the keys and values [B, heads, length, head_dim] of each layer.
    """
    two = model.config.is_encoder_decoder
    of = "decoder_" if two else ""
    arguments = longer_mask(arguments, length, f"{of}attention_mask")
    if (positions := arguments.get(f"{of}position_ids")) is not None:
        arguments[f"{of}position_ids"] = positions + length
    cache: Any = arguments.get("past_key_values")
    if arguments.get("use_cache") is False:
        cache = None  # models return it all the same, and generation then passes it on beside all tokens
    elif not is_fresh(arguments):
        return arguments
    config = text_config(model)
    if cache is None:
        cache = DynamicCache(config=config)
        cache = EncoderDecoderCache(cache, DynamicCache(config=config)) if two else cache
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    rows = next(len(arguments[name]) for name in names if arguments.get(name) is not None)
    for layer, (keys, values) in enumerate(pairs(rows)[: config.num_hidden_layers]):
        (cache.self_attention_cache if two else cache).update(keys, values, layer)
    return {**arguments, "past_key_values": cache}


@functools.cache
def _forward_takes_cache(kind: type[nn.Module]) -> bool:
    return "past_key_values" in inspect.signature(kind.forward).parameters


def takes_cache(model: nn.Module) -> bool:
    return _forward_takes_cache(type(model))
