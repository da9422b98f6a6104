"""Read datasets of the hub, and say within seconds where it cannot be reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nbtune.data.values import Row
from nbtune.errors import DataError
from nbtune.spec import SourceSpec

HUB_TIMEOUT = 5.0  # seconds until an unanswered look-up counts as no network


def read_hub(spec: SourceSpec, on_status: Callable[[str], None]) -> list[Row]:
    """All rows of the split `spec.split` of a dataset. Raises DataError."""
    import datasets

    name = spec.source
    on_status(f"Reading the dataset {name}")
    _look_up(name)
    try:
        table = datasets.load_dataset(name, split=spec.split)
    # `datasets` raises what its readers, pyarrow, fsspec and the hub's client raise; each is shown as it is.
    except Exception as error:
        text = str(error).strip().splitlines()
        raise DataError(
            f"The dataset {name} cannot be read",
            f"{type(error).__name__}: {text[0] if text else ''}",
            "Check its page on the hub for its splits and configurations, or download one of its files and name it.",
        ) from error
    rows = table.to_list()
    if not rows:
        raise DataError("The data is empty", f"The split {spec.split!r} of {name} has no rows.", "Name another split.")
    return rows


def _look_up(name: str) -> None:
    """Fail in seconds where the hub cannot be reached and the dataset is not in the local cache."""
    import datasets.config
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    folder = name.replace("/", "___")
    if (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir():
        return
    if constants.is_offline_mode():
        raise _offline(name, "HF_HUB_OFFLINE is set, so it cannot be downloaded.")
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise DataError(
            f"The dataset {name} is gated",
            "Its owner asks you to accept terms first.",
            f"Accept them on https://huggingface.co/datasets/{name}, then run `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"There is no file and no hub dataset {name}",
            "",
            "Check the name. A private dataset needs a token: run `hf auth login`.",
        ) from error
    # The hub's client has changed its HTTP library twice (requests, httpx, httpx2) and passes that library's errors on.
    except Exception as error:
        raise _offline(name, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _offline(name: str, why: str) -> DataError:
    return DataError(
        f"There is no file {name}, and the dataset hub cannot be reached",
        why,
        "Check the path or the network, or use stdlib-docs, which needs neither.",
    )
