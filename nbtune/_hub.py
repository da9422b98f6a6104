"""Files of a hub repository."""

from __future__ import annotations

from pathlib import Path

from nbtune.errors import AdapterError


def downloaded(repository: str, revision: str | None, files: list[str]) -> Path:
    """The folder with those of the named files that an adapter's repository has. Raises AdapterError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:  # what huggingface_hub raises: no such repository, no network, bad id
        message = f"There is no folder {repository}, and the hub says: {error}"
        raise AdapterError("No such adapter", message, "Check the name, or the network.") from error
