"""The Hub: what is in its cache on this machine, and downloads."""

from __future__ import annotations

from pathlib import Path

from postern.data._catalogue import DataSet, Files


class HubUnreachable(Exception):
    """The Hub did not give the files; the text says why."""


def cached_folder(data_set: DataSet, files: Files) -> Path | None:
    """The folder of the Hub's cache that holds this branch of the repository, whole or in part; None without one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(data_set.repository),
                repo_type="dataset",
                revision=files.revision,
                allow_patterns=[files.pattern],
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def download(data_set: DataSet, files: Files, folder: Path | None = None) -> Path:
    """Download the files of one split, into ``folder`` or the Hub's cache.

    A file appears whole or not at all; files that are there already are kept.

    Returns:
        The folder below which the files lie as they do in the repository.

    Raises:
        HubUnreachable: no network, no such repository or no access to it, or the folder cannot be written.
    """
    from huggingface_hub import HfApi, snapshot_download

    repository = str(data_set.repository)
    try:
        if folder is not None:
            # Without a network snapshot_download hands back a folder that holds anything, as if it were complete.
            HfApi().repo_info(repository, repo_type="dataset", revision=files.revision)
        return Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=files.revision,
                allow_patterns=[files.pattern],
                local_dir=folder,
            )
        )
    except Exception as error:  # which ones depends on the HTTP library below, another in each version of the client
        cause = error.__cause__ or error
        raise HubUnreachable(f"{type(cause).__name__}: {' '.join(str(cause).split()).rstrip('.')}") from error
