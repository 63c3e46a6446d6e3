"""The Hub: what is in its cache on this machine, and downloads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class HubUnreachable(Exception):
    """The Hub did not give the files; the text says why."""


def cached_folder(repository: str, revision: str, patterns: Sequence[str]) -> Path | None:
    """The folder of the Hub's cache that holds this branch of the repository, whole or in part; None without one.

    Newer versions of the Hub's client say None as well where they know that a file of these patterns is missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def list_files(repository: str, revision: str) -> dict[str, int]:
    """The files of a branch of a repository, with their sizes in bytes.

    Raises:
        HubUnreachable: no network, no such repository or branch, or no access to it.
    """
    from huggingface_hub import HfApi

    try:
        # Not `list_repo_tree`, which tries again and again for half a minute where there is no network.
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
        return {file.rfilename: file.size or 0 for file in info.siblings or ()}
    except Exception as error:  # as in `download`
        raise _unreachable(error) from error


def download(repository: str, revision: str, patterns: Sequence[str], folder: Path | None = None) -> Path:
    """Download the files that match one of the patterns, into ``folder`` or the Hub's cache.

    A file appears whole or not at all; files that are there already are kept.

    Returns:
        The folder below which the files lie as they do in the repository.

    Raises:
        HubUnreachable: no network, no such repository or no access to it, or the folder cannot be written.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        if folder is not None:
            # Without a network snapshot_download hands back a folder that holds anything, as if it were complete.
            HfApi().repo_info(repository, repo_type="dataset", revision=revision)
        return Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(patterns),
                local_dir=folder,
            )
        )
    except Exception as error:  # which ones depends on the HTTP library below, another in each version of the client
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> HubUnreachable:
    cause = error.__cause__ or error
    return HubUnreachable(f"{type(cause).__name__}: {' '.join(str(cause).split()).rstrip('.')}")
