"""Run as a script by `cache.py`: GGUF to a folder of safetensors, config and tokenizer.

python -P _convert.py MODEL.gguf FOLDER float32
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype))

    # The weights are plain tensors now, but transformers still calls the model quantised and refuses to save it.
    vars(model.config).pop("quantization_config", None)
    vars(model.config).pop("_model_name_or_path", None)  # the name of a training run of its makers
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType] - set by transformers itself

    if not folder.is_dir():  # whoever asked was killed, and somebody else has cleared up
        sys.exit(f"{folder} is gone")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
