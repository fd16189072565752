"""From what a user writes where a model is wanted to the path that a checkpoint reader opens."""

from __future__ import annotations

from pathlib import Path

from fastserve.hub.download import download
from fastserve.hub.folder_source import is_model
from fastserve.hub.location import is_offline
from fastserve.hub.origin import check_not_empty
from fastserve.hub.progress import Progress


def resolve(
    name_or_path: str | Path,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The folder, or the .gguf file, of a model given by path, by name or by source.

    A path that holds a model wins over a name. A name or source that is not here is downloaded, unless the
    network is off (`offline`, FASTSERVE_OFFLINE=1).

    Raises:
        OptionError: a badly formed source, or FASTSERVE_OFFLINE is neither yes nor no.
        ModelNotFoundError: no such path or name.
        OfflineError, DownloadError: see `fastserve.hub.download.download`.
    """
    offline = is_offline() or offline  # read first: a bad value is refused whatever the model is
    text = str(name_or_path)
    check_not_empty(text)
    path = Path(text).expanduser()
    if is_model(path):
        return path
    return download(text, offline=offline, progress=progress).path
