"""An export uploaded to the model hub: a repository of its own, made for it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from nbtune.errors import ExportError
from nbtune.export.card import CARD, card
from nbtune.export.outcome import Export
from nbtune.export.precision import Precision
from nbtune.models.source import HUB_TIMEOUT, OnStatus
from nbtune.models.trained import Trained

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


def check_name(repository: str) -> None:
    """Raise ExportError where this is no name for a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("It has no owner.")
    except HFValidationError as error:
        raise ExportError(
            f"{repository!r} is no name of a repository", str(error), "Name it owner/name, with your name on the hub."
        ) from error


def push(
    done: Export, trained: Trained, precision: Precision | None, repository: str, private: bool, on_status: OnStatus
) -> str:
    """Make `repository`, upload the export with its card and its proof in one commit, return its address.

    The token is where huggingface_hub looks for it. Raises ExportError for a hub that cannot be reached, refuses, or
    has a repository of that name; nothing on this machine is touched.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode():
        raise _unpushed(done, repository, private, "HF_HUB_OFFLINE is set.", "Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise _unpushed(done, repository, private, "There is no token for the hub.", "Run `hf auth login`.")
    api = HfApi()
    on_status(f"Asking the hub for {repository}")
    try:
        if _exists(api, repository):
            why = f"{repository} exists already, and nothing is ever overwritten."
            raise _unpushed(done, f"{repository}-2", private, why, "Choose another name.")
        address = api.create_repo(repository, private=private)
        on_status(f"Uploading {done.bytes / 1e6:,.1f} MB to {repository}")
        message = f"{done.source}: {done.format} by nbtune"
        api.create_commit(repository, _files(done, trained, precision), commit_message=message)
    except HfHubHTTPError as error:
        said = error.server_message or str(error).splitlines()[0]
        why = f"The hub answered {error.response.status_code}: {said}"
        raise _unpushed(done, repository, private, why, "Check the name and what your token may do.") from error
    except ExportError:
        raise
    # The hub's client passes on the errors of its HTTP library, which it has changed twice.
    except Exception as error:
        why = f"The hub cannot be reached: {type(error).__name__}: {error}".splitlines()[0]
        raise _unpushed(done, repository, private, why, "Check the network.") from error
    return str(address)


def _exists(api: HfApi, repository: str) -> bool:
    """Whether the hub has it. Asked first, for it is the one question that does not wait for ever."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        api.model_info(repository, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError:
        return False
    return True


def _files(done: Export, trained: Trained, precision: Precision | None) -> list[CommitOperationAdd]:
    """A folder's files; a file with its proof and a card."""
    from huggingface_hub import CommitOperationAdd

    if done.path.is_dir():
        return [CommitOperationAdd(path.name, path) for path in sorted(done.path.iterdir())]
    text = card(trained, done.format, precision).encode()
    files = [CommitOperationAdd(path.name, path) for path in (done.path, done.report)]
    return [CommitOperationAdd(CARD, text), *files]


def _unpushed(done: Export, repository: str, private: bool, why: str, remedy: str) -> ExportError:
    where = [str(done.path), "."] if done.path.is_dir() else [str(done.path)]
    command = shlex.join(["hf", "upload", repository, *where, *(["--private"] if private else [])])
    return ExportError(
        "The export was not pushed to the hub",
        f"{why} On this machine it is whole and proved: {done.path}",
        f"{remedy} Then: {command}",
    )
