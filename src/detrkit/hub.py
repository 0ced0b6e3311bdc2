"""Models on the Hugging Face hub: fetched into its cache, and uploaded. Only files travel; nothing of them is executed.

All is done by `huggingface_hub` (extra `hub`), with its settings: HF_HOME and HF_HUB_CACHE say where the cache lies,
HF_HUB_OFFLINE=1 forbids the network, HF_TOKEN or `hf auth login` gives the token.
"""

from __future__ import annotations

import re
from pathlib import Path

from detrkit.errors import Error, MissingExtraError, ModelError, UsageError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""What a model is called on the hub: organisation or user, and name."""

_DESCRIPTIONS = ["config.json", "preprocessor_config.json"]
_SAFE, _PICKLED = ["*.safetensors"], ["*.pth", "*.bin"]


def is_name(text: str) -> bool:
    """Whether a text could be a name on the hub: `organisation/name`, perhaps with `@revision`."""
    return NAME.fullmatch(text.partition("@")[0]) is not None


def fetch(name: str) -> Path:
    """The folder in the cache with a model's description and weights, brought up to date where the hub can be reached.

    Args:
        name: `organisation/name`, or `organisation/name@revision` with a branch, a tag or a commit.

    Returns:
        A folder that is called after the commit. Pickled weights are in it only where there are no others.

    Raises:
        MissingExtraError: `huggingface_hub` is not installed.
        ModelError: neither in the cache nor to be had, each with its reason; or it holds no weights.
    """
    folder = _snapshot(name, _SAFE)
    if not any(folder.glob(_SAFE[0])):
        folder = _snapshot(name, _PICKLED)
    if not any(file for pattern in (*_SAFE, *_PICKLED) for file in folder.glob(pattern)):
        raise ModelError(
            "There are no weights in this model's folder",
            where=name,
            got=", ".join(sorted(file.name for file in folder.iterdir())) or "an empty folder",
            expected="*.safetensors, *.pth or *.bin",
            remedy="If it was fetched without a network, connect once and try again." if _offline() else "",
        )
    return folder


def upload(folder: Path, name: str, *, private: bool = False) -> str:
    """Put the files of a folder into a model repository, which is made if it is not there.

    Args:
        folder: what to upload; all of it.
        name: `organisation/name`.
        private: a new repository is visible to its owners only; one that exists stays as it is.

    Returns:
        The address of the model's page.

    Raises:
        MissingExtraError: `huggingface_hub` is not installed.
        ModelError: the hub cannot be reached, or refuses.
        UsageError: no such name is possible, or there is no token.
    """
    if not NAME.fullmatch(name):
        raise UsageError("This is no name for a model on the hub", got=repr(name), expected="organisation/name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hub", "Uploading a model") from error
    if huggingface_hub.get_token() is None:
        raise UsageError(
            "There is no token for the Hugging Face hub",
            where=name,
            remedy="Make one with the right to write at https://huggingface.co/settings/tokens, then: hf auth login "
            "(or set HF_TOKEN).",
        )
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(name, private=private or None, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload with detrkit")
    except Exception as error:  # classes of several packages, down to the sockets
        raise _refused(name, error) from error
    return f"{hub.endpoint}/{name}"


def _snapshot(name: str, weights: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hub", f"Fetching {name} from the Hugging Face hub") from error
    repository, _, revision = name.partition("@")

    def look(local_only: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=[*_DESCRIPTIONS, *weights],
                ignore_patterns=["*/*"],
                local_files_only=local_only,
            )
        )

    try:
        return look(local_only=False)
    except Exception as error:  # classes of several packages, down to the sockets
        if _answered(error):
            raise _unavailable(name, error) from error
        try:  # the connection may have broken in the middle
            return look(local_only=True)
        except Exception:
            raise _unavailable(name, error) from error


def _answered(error: Exception) -> bool:
    """Whether the hub itself said no, or the name is none: then an older copy is no answer."""
    from huggingface_hub import errors

    return isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError)


def _unavailable(name: str, error: Exception) -> ModelError:
    """Why a model cannot be had, and what to do."""
    from huggingface_hub import constants, errors

    repository, _, revision = name.partition("@")
    if isinstance(error, errors.HFValidationError):
        return ModelError("This is no name of a model on the hub", where=name, got=_line(error))
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            "Its owners give this model only to those who have asked for it",
            where=name,
            remedy=f"Ask at https://huggingface.co/{repository}, then: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError("The model has no such revision on the hub", where=repository, got=repr(revision))
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            "There is neither such a path here nor such a model on the hub, or it is private",
            where=name,
            remedy="Check the name; for a private model: hf auth login",
        )
    offline = _offline()
    return ModelError(
        "The model is not in the cache, and "
        + ("HF_HUB_OFFLINE forbids to fetch it" if offline else "the Hugging Face hub cannot be reached"),
        where=name,
        got="" if offline else _line(error),
        expected=f"a path here, or a copy in {constants.HF_HUB_CACHE}",
        remedy=("Unset HF_HUB_OFFLINE" if offline else "Connect")
        + " to fetch it once, or copy its folder from another machine and give the path.",
    )


def _refused(name: str, error: Exception) -> Error:
    """Why an upload failed, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return UsageError("This is no name for a model on the hub", got=repr(name), expected=_line(error))
    if status == 401:
        return ModelError(
            "The hub does not know the token", where=name, remedy="Log in anew with: hf auth login (or set HF_TOKEN)."
        )
    if status in (403, 404):
        return ModelError(
            f"The token gives no right to write to {name.partition('/')[0]!r}",
            where=name,
            got=_line(error),
            remedy="Use your own user name or organisation, and a token with the right to write.",
        )
    if status is not None:
        return ModelError("The hub refused the upload", where=name, got=_line(error))
    return ModelError(
        "The Hugging Face hub cannot be reached",
        where=name,
        got=_line(error),
        remedy="Unset HF_HUB_OFFLINE." if _offline() else "Connect and try again; --dry-run writes what would travel.",
    )


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _line(error: Exception) -> str:
    """The first line of what an error says, without a full stop."""
    return next(filter(None, (line.strip().rstrip(".") for line in str(error).splitlines())), type(error).__name__)
