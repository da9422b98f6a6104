"""Pictures in a chat: read from untrusted files, and handed to a model that takes them.

A message with pictures has parts: `[{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]`.
The chat template writes a mark for each; the model's processor turns marks into tokens and pictures into tensors.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbtune.errors import NbtuneError
from nbtune.infer.text import Message, prompt_text, token_ids

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # of one picture, looked at before it is decoded
_CONFIGS = ("processor_config.json", "preprocessor_config.json")
_PIXELS, _TOKENS = "pixel_values", ("input_ids", "attention_mask")


def open_picture(name: str, data: bytes) -> Image:
    """The picture in a file, upright, in RGB. Raises NbtuneError where it is damaged, too large, or of another kind."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as found:
            width, height = found.size
            if width * height > MAX_PIXELS:
                raise NbtuneError(
                    f"{name} is too large",
                    f"It has {width:,} x {height:,} pixels; up to {MAX_PIXELS / 1e6:.0f} million are read.",
                    "Make it smaller.",
                )
            return ImageOps.exif_transpose(found).convert("RGB")
    except UnidentifiedImageError as error:
        raise NbtuneError(
            f"{name} cannot be read", f"It is no picture of these kinds: {', '.join(FORMATS)}.", "Save it as PNG."
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NbtuneError(f"{name} is damaged", f"{error}.", "Save it again.") from error


def pictures_of(messages: Sequence[Message]) -> list[Image]:
    """The pictures of a conversation, in their order."""
    return [part["image"] for message in messages for part in _parts(message) if "image" in part]


def without_pictures(messages: Sequence[Message]) -> list[Message]:
    """The messages as chat templates take them: where a picture stands, and not the picture."""
    return [
        {**message, "content": [{key: value for key, value in part.items() if key != "image"} for part in parts]}
        if (parts := _parts(message))
        else message
        for message in messages
    ]


def _parts(message: Message) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    return () if content is None or isinstance(content, str) else content


class PictureReader:
    """What a model makes of pictures: tokens among those of the text, and tensors beside them."""

    def __init__(self, processor: Any, names: frozenset[str]) -> None:
        self._processor = processor
        self._names = names  # of what the model's forward pass takes

    @classmethod
    def of(cls, folder: Path, shape: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PictureReader | None:
        """That of the model in `folder`; none where it takes no pictures, or counts positions in them its own way."""
        names = frozenset(inspect.signature(shape.forward).parameters)
        if _PIXELS not in names or "image_grid_thw" in names or not any((folder / name).exists() for name in _CONFIGS):
            return None
        from transformers import AutoProcessor

        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        processor.tokenizer = tokenizer
        return cls(processor, names)

    def encode(self, text: str, pictures: Sequence[Image]) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids of a prompt with a mark for each picture, and what the model reads beside them.

        Raises NbtuneError where there are more or fewer marks than pictures.
        """
        try:
            found = self._processor(text=[text], images=[list(pictures)], return_tensors="pt", add_special_tokens=False)
        except ValueError as error:
            raise NbtuneError(
                "The chat template does not write where pictures stand", str(error), "Use the model's own template."
            ) from error
        beside = {name: found[name] for name in found if name in self._names and name not in _TOKENS}
        if _PIXELS not in beside:
            raise NbtuneError("The chat template does not write where pictures stand", "", "Use the model's own.")
        return found["input_ids"][0].tolist(), beside

    def tokens(self, picture: Image) -> int:
        """How many tokens of the context a picture takes."""
        tokenizer = self._processor.tokenizer
        marked, bare = (
            prompt_text([{"role": "user", "content": [part]}], tokenizer)
            for part in ({"type": "image"}, {"type": "text", "text": ""})
        )
        return len(self.encode(marked, [picture])[0]) - len(token_ids(bare, tokenizer))
