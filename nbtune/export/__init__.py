"""Adapters, merged models and GGUF files, each with a numeric proof."""
