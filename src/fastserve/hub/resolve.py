"""From what a user writes where a model is wanted to the path that a checkpoint reader opens."""

from __future__ import annotations

from pathlib import Path

from fastserve.errors import ModelNotFoundError
from fastserve.hub.download import download
from fastserve.hub.folder_source import is_model
from fastserve.hub.location import is_offline
from fastserve.hub.origin import check_not_empty, find_origin
from fastserve.hub.progress import Progress
from fastserve.hub.registry import Registry


def resolve(
    name_or_path: str | Path,
    *,
    offline: bool = False,
    download_missing: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The folder, or the .gguf file, of a model given by path, by name or by source.

    A path that holds a model wins over a name. A name or source that is not here is downloaded, unless
    `download_missing` is off or the network is (`offline`, FASTSERVE_OFFLINE=1).

    Raises:
        OptionError: a badly formed source, or FASTSERVE_OFFLINE is neither yes nor no.
        ModelNotFoundError: no such path or name; or it is not here and `download_missing` is off.
        OfflineError, DownloadError: see `fastserve.hub.download.download`.
    """
    offline = is_offline() or offline  # read first: a bad value is refused whatever the model is
    text = str(name_or_path)
    check_not_empty(text)
    path = Path(text).expanduser()
    if is_model(path):
        return path
    registry = Registry.of_user()
    origin = find_origin(text, registry)
    record = registry.find(origin.name)
    if not download_missing and (record is None or record.damaged_files()):
        raise ModelNotFoundError(f"{origin.name} is not downloaded", hint=f"run `fastserve download {text}`")
    return download(text, offline=offline, progress=progress).path
