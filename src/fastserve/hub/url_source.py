"""`https://HOST/PATH`: a .gguf file, or an archive (.zip, .tar, .tar.gz) of a model's folder, anywhere."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self
from urllib.parse import unquote, urlsplit

from fastserve.errors import DownloadError, OptionError
from fastserve.hub import archive, tar_archive
from fastserve.hub.hf_source import HfSource
from fastserve.hub.http_download import download_file
from fastserve.hub.payload import choose_payload
from fastserve.hub.progress import Progress
from fastserve.hub.record import FileRecord, sha256_of
from fastserve.hub.source import Fetched, Source

PREFIXES = ("https://", "http://")

_TARS = (".tar.gz", ".tgz", ".tar")
_SUFFIXES = (".gguf", ".zip", *_TARS)
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_PATH = re.compile(
    r"/(?P<repository>[\w.-]+/[\w.-]+)"
    r"(/(tree|blob|resolve)/(?P<revision>[\w.-]+)(/(?P<file>[^@]+\.gguf)|/[^@]*)?)?/?"
)
_DIGEST = re.compile(r"sha256=(?P<sha256>[0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A model at an address. With `sha256` the file must have that checksum; without, that of the first
    download is recorded, and a later download of a damaged copy must match it.
    """

    url: str
    sha256: str | None = None
    is_pinned_by_user: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `https://HOST/PATH/FILE[#sha256=HEX]`.

        Raises:
            OptionError: the address is malformed, carries a password, leads to no kind of file that can be a
                model, or is not safe from tampering (http without a checksum).
        """
        parts = urlsplit(text)
        digest = _DIGEST.fullmatch(parts.fragment)
        if parts.fragment and digest is None:
            raise OptionError(f"{text} ends in #{parts.fragment}", hint="write #sha256= and 64 hex digits")
        if not parts.hostname:
            raise OptionError(f"{text} names no server", hint="write https://HOST/PATH/FILE.gguf")
        if parts.username is not None or parts.password is not None:
            raise OptionError(
                "the address carries a user name, which would be kept in the model's record",
                hint="download the file yourself, and give its path",
            )
        if not _file_name(parts.path).lower().endswith(_SUFFIXES):
            raise OptionError(
                f"{text} leads to no file of {', '.join(_SUFFIXES)}",
                hint="name a .gguf file, or an archive of a folder with config.json and .safetensors files",
            )
        if parts.scheme == "http" and digest is None:
            raise OptionError(
                f"{text} is not encrypted: anybody on the way could send another model",
                hint="use https, or add the file's checksum: #sha256=HEX",
            )
        url = parts._replace(fragment="").geturl()
        return cls(url, digest["sha256"].lower() if digest else None, is_pinned_by_user=digest is not None)

    @property
    def spec(self) -> str:
        return f"{self.url}#sha256={self.sha256}" if self.is_pinned_by_user else self.url

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        file = _file_name(urlsplit(self.url).path)
        suffix = next(suffix for suffix in _SUFFIXES if file.lower().endswith(suffix))
        return file[: -len(suffix)]

    @property
    def is_local(self) -> bool:
        return False

    def pinned_to(self, archives: Sequence[FileRecord]) -> UrlSource:
        """This source with the checksum of an earlier download."""
        if self.sha256 is not None or len(archives) != 1:
            return self
        return replace(self, sha256=archives[0].sha256)

    def fetch(self, staging: Path, progress: Progress | None) -> Fetched:
        """See `Source.fetch`. Goes on with what an earlier one left, if the server has the same file."""
        file = staging / _file_name(urlsplit(self.url).path)
        download_file(self.url, file, sha256=self.sha256, step=self.name, progress=progress)
        record = FileRecord(file.name, file.stat().st_size, self.sha256 or sha256_of(file))
        files = staging / "files"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        if file.suffix.lower() == ".gguf":
            file.rename(files / file.name)
            return Fetched(folder=files, files=(file.name,), archives=(record,))
        payload = self._unpack(file, files)
        file.unlink()
        return Fetched(folder=files, files=tuple(payload), archives=(record,))

    def _unpack(self, file: Path, files: Path) -> dict[str, str]:
        if file.name.lower().endswith(_TARS):
            payload = choose_payload(tar_archive.member_names(file))
            self._check_payload(payload)
            tar_archive.extract(file, payload, files)
        else:
            with archive.open_archive(file) as opened:
                payload = choose_payload(opened.namelist())
                self._check_payload(payload)
                archive.extract(opened, payload, files)
        return payload

    def _check_payload(self, payload: dict[str, str]) -> None:
        if not payload:
            raise DownloadError(
                f"{self.url} holds no model: no .gguf file, no .safetensors file beside a config.json",
                hint="name an archive of a model's folder",
            )


def parse_url(text: str) -> Source:
    """The source at an address; pages and files of the Hugging Face hub are repositories there.

    Raises:
        OptionError: see `UrlSource.parse`; or it is a page of the hub that is no model's.
    """
    parts = urlsplit(text)
    if parts.hostname not in _HUB_HOSTS:
        return UrlSource.parse(text)
    match = _HUB_PATH.fullmatch(unquote(parts.path))
    if match is None or match["repository"].split("/")[0] in ("datasets", "spaces"):
        raise OptionError(
            f"{text} is no model of the Hugging Face hub",
            hint="copy the address of the model's page, https://huggingface.co/owner/name",
        )
    revision = None if match["revision"] == "main" else match["revision"]
    return HfSource(repository=match["repository"], file=match["file"], revision=revision)


def _file_name(path: str) -> str:
    """The last part of a path, with nothing in it that a file's name cannot have."""
    return re.sub(r"[^\w.+-]", "_", PurePosixPath(unquote(path)).name).lstrip(".")
