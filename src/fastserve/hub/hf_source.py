"""`hf:owner/name[/FILE.gguf][@revision]`: a repository of the Hugging Face hub."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fastserve.errors import DownloadError, OptionError
from fastserve.hub.disk import require_free_bytes
from fastserve.hub.payload import choose_payload
from fastserve.hub.progress import Progress, watch_folder
from fastserve.hub.record import sha256_of
from fastserve.hub.source import Fetched, SourceUnavailableError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

PREFIX = "hf:"

_SPEC = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(/(?P<file>[^@]+\.gguf))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class HfSource:
    """A model in a repository of the hub that huggingface_hub is configured for (HF_ENDPOINT, HF_TOKEN)."""

    repository: str  # owner/name
    file: str | None = None  # one .gguf of several
    revision: str | None = None  # branch, tag or commit; None is the main branch

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Read `hf:owner/name[/FILE.gguf][@revision]`.

        Raises:
            OptionError: it is not of that form.
        """
        match = _SPEC.fullmatch(spec.removeprefix(PREFIX))
        if match is None:
            raise OptionError(
                f"{spec!r} is not a source of the form hf:owner/name[@revision]",
                hint="copy owner/name from the model's page, as in hf:HuggingFaceTB/SmolLM2-135M-Instruct",
            )
        return cls(**match.groupdict())

    @property
    def spec(self) -> str:
        return PREFIX + self.name

    @property
    def name(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.repository}{file}" + (f"@{self.revision}" if self.revision else "")

    @property
    def is_local(self) -> bool:
        return False

    def fetch(self, staging: Path, progress: Progress | None) -> Fetched:
        """See `Source.fetch`. huggingface_hub resumes files that an earlier fetch began."""
        files = staging / "repository"
        files.mkdir(exist_ok=True)
        try:
            return self._fetch(files, progress)
        except DownloadError:
            raise
        except Exception as error:
            # The hub's client fails with errors of its own, of its HTTP library and of the system's sockets;
            # which ones depends on its version. Only a failing disk is not the source's fault.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise SourceUnavailableError(
                f"{self.spec} could not be fetched: {reason}",
                hint="check the name and the network; a private or gated model needs HF_TOKEN",
            ) from error

    def _fetch(self, files: Path, progress: Progress | None) -> Fetched:
        from huggingface_hub import HfApi, hf_hub_download

        info = HfApi().model_info(self.repository, revision=self.revision, files_metadata=True)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        wanted = self._choose(siblings)
        total_bytes = sum(siblings[name].size or 0 for name in wanted)
        require_free_bytes(files, total_bytes)
        with _hub_bars_hidden(), watch_folder(files, self.repository, progress, total_bytes=total_bytes):
            for name in wanted:
                # The commit, not the branch: files of two commits must not mix when the branch moves
                # meanwhile.
                hf_hub_download(self.repository, name, revision=info.sha, local_dir=files)
                _verify(files / name, siblings[name])
        shutil.rmtree(files / ".cache", ignore_errors=True)
        licence = info.card_data.get("license") if info.card_data else None
        return Fetched(folder=files, files=tuple(wanted), licence=licence, revision=info.sha)

    def _choose(self, names: Iterable[str]) -> list[str]:
        if self.file is not None:
            names = [
                name for name in names if name == self.file or not name.endswith((".gguf", ".safetensors"))
            ]
        payload = choose_payload(names)
        if not payload or any(path != name for path, name in payload.items()):
            raise SourceUnavailableError(
                f"{self.spec} holds no model: no .gguf file, and no .safetensors file beside a config.json",
                hint="choose a repository with weights in one of these formats",
            )
        return list(payload)


@contextmanager
def _hub_bars_hidden() -> Iterator[None]:
    """Switch off huggingface_hub's own progress bars, which would be drawn over ours."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _verify(path: Path, sibling: RepoSibling) -> None:
    """Check what came against the size, and for large files the sha256, that the hub states."""
    if sibling.size is not None and path.stat().st_size != sibling.size:
        problem = f"has {path.stat().st_size} bytes, not {sibling.size}"
    elif sibling.lfs is not None and sha256_of(path) != sibling.lfs.sha256:
        problem = f"does not match its sha256 {sibling.lfs.sha256}"
    else:
        return
    path.unlink()
    raise DownloadError(f"{sibling.rfilename} {problem}", hint="download it again; the bad file was removed")
