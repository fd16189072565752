from __future__ import annotations

import hashlib
import io
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.errors import DownloadError, OptionError
from fastserve.hub import http_download
from fastserve.hub.download import download
from fastserve.hub.hf_source import HfSource
from fastserve.hub.origin import parse_source
from fastserve.hub.registry import Registry
from fastserve.hub.source import SourceUnavailableError
from fastserve.hub.url_source import UrlSource, parse_url
from hub.web_server import WebServer, running
from hub.wheel_index import MODEL_FILES, zip_bytes

GGUF = bytes(range(256)) * 300
SHA256 = hashlib.sha256(GGUF).hexdigest()


@pytest.fixture
def server() -> Iterator[WebServer]:
    with running() as server:
        server.files["m/Tiny.Q8_0.gguf"] = GGUF
        yield server


@pytest.fixture
def url(server: WebServer) -> str:
    return f"{server.url('m/Tiny.Q8_0.gguf')}#sha256={SHA256}"


def tar_bytes(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def unverified(url: str) -> UrlSource:
    """A source without a checksum, which `parse` grants to https alone."""
    return UrlSource(url)


def test_a_gguf_file_is_brought_checked_and_registered_under_its_name(url: str) -> None:
    record = download(url)
    assert record.name == "Tiny.Q8_0"
    assert record.source == url
    assert record.path.read_bytes() == GGUF
    assert [file.sha256 for file in record.files] == [SHA256]
    assert download("tiny.q8_0") == record


def test_a_file_of_another_checksum_is_refused_and_removed(server: WebServer, store: Path) -> None:
    server.files["m/Tiny.Q8_0.gguf"] = GGUF[:-1] + b"x"
    with pytest.raises(DownloadError, match=rf"has the sha256 [0-9a-f]+, not {SHA256}"):
        download(f"{server.url('m/Tiny.Q8_0.gguf')}#sha256={SHA256}")
    assert not list(store.rglob("*.gguf*.part"))
    assert not Registry.of_user().records()


def test_a_download_that_breaks_off_goes_on_where_it_was(server: WebServer, url: str) -> None:
    server.break_after = 50_000
    assert download(url).path.read_bytes() == GGUF
    assert [asked for _, asked in server.requests] == [None, "bytes=50000-"]


def test_what_an_earlier_run_left_is_used_if_the_file_is_the_same(server: WebServer, tmp_path: Path) -> None:
    source = unverified(server.url("m/Tiny.Q8_0.gguf"))
    for etag, second_range in (('"1"', "bytes=40000-"), ('"2"', "bytes=40000-")):
        folder = tmp_path / etag.strip('"')
        folder.mkdir()
        server.requests.clear()
        server.etag, server.break_after = '"1"', 40_000
        with pytest.raises(SourceUnavailableError, match="broke off after 40000 of 76800 bytes"):
            http_download._fetch(source.url, folder / "f.part", is_pinned=False, step="", progress=None)
        server.etag = etag
        http_download.download_file(source.url, folder / "f", sha256=None, step="", progress=None)
        assert (folder / "f").read_bytes() == GGUF
        assert [asked for _, asked in server.requests] == [None, second_range]


def test_without_a_mark_of_the_file_nothing_is_pieced_together(server: WebServer, tmp_path: Path) -> None:
    server.etag, server.break_after = None, 40_000
    http_download.download_file(
        server.url("m/Tiny.Q8_0.gguf"), tmp_path / "f", sha256=None, step="", progress=None
    )
    assert (tmp_path / "f").read_bytes() == GGUF
    assert [asked for _, asked in server.requests] == [None, None]


def test_more_than_was_announced_or_is_allowed_is_refused(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.announced = -1
    monkeypatch.setattr(http_download, "MAX_UNANNOUNCED_BYTES", 1000)
    with pytest.raises(DownloadError, match="sends more than 1000 bytes"):
        unverified(server.url("m/Tiny.Q8_0.gguf")).fetch(tmp_path, None)
    server.announced = 10**15
    with pytest.raises(DownloadError, match="too full"):
        unverified(server.url("m/Tiny.Q8_0.gguf")).fetch(tmp_path, None)


def test_a_missing_file_and_a_missing_server_are_told_apart(server: WebServer) -> None:
    with pytest.raises(DownloadError, match="answers 404"):
        download(f"{server.url('other.gguf')}#sha256={SHA256}")
    with pytest.raises(DownloadError, match=r"could not be fetched: .*refused"):
        download(f"http://127.0.0.1:9/other.gguf#sha256={SHA256}")


def test_redirects_are_followed_to_servers_alone(server: WebServer) -> None:
    server.redirect_to = server.url("m/Tiny.Q8_0.gguf")
    assert download(f"{server.url('moved.gguf')}#sha256={SHA256}").path.read_bytes() == GGUF
    server.redirect_to = "file:///etc/passwd"
    with pytest.raises(DownloadError, match="file:///etc/passwd' is not allowed"):
        download(f"{server.url('away.gguf')}#sha256={SHA256}")
    secure, plain = urllib.request.Request("https://host.example/a.gguf"), "http://host.example/b"
    with pytest.raises(urllib.error.URLError, match=f"leads on to {plain}, which is not encrypted"):
        http_download._SafeRedirects().redirect_request(secure, None, 302, "", {}, plain)


@pytest.mark.parametrize("name", ["My-Model.zip", "My-Model.tar", "My-Model.tar.gz", "My-Model.tgz"])
@pytest.mark.parametrize("prefix", ["", "./", "models/My-Model/"])
def test_an_archive_of_a_folder_is_unpacked(server: WebServer, name: str, prefix: str) -> None:
    files = {f"{prefix}{path}": data for path, data in {**MODEL_FILES, "notes.log": b"x"}.items()}
    data = (
        zip_bytes(files)
        if name.endswith("zip")
        else tar_bytes(files, "w" if name.endswith("tar") else "w:gz")
    )
    server.files[name] = data
    record = download(f"{server.url(name)}#sha256={hashlib.sha256(data).hexdigest()}")
    assert record.name == "My-Model"
    assert {file.path: (record.folder / file.path).read_bytes() for file in record.files} == MODEL_FILES
    assert record.archives[0].sha256 == hashlib.sha256(data).hexdigest()


def test_a_damaged_copy_is_replaced_by_the_same_file_or_not_at_all(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = unverified(server.url("m/Tiny.Q8_0.gguf"))
    monkeypatch.setattr("fastserve.hub.origin.parse_url", lambda text: source)
    record = download(source.url)
    record.path.write_bytes(b"cut")
    assert download(source.url).path.read_bytes() == GGUF
    record.path.write_bytes(b"cut")
    server.files["m/Tiny.Q8_0.gguf"] = GGUF[::-1]
    with pytest.raises(DownloadError, match=rf"not {SHA256}"):
        download(source.url)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"../config.json": b"{}"}, "leaves its folder"),
        ({"/config.json": b"{}"}, "absolute path"),
        ({"a/readme.md": b""}, "holds no model"),
    ],
)
def test_an_archive_that_is_not_safe_or_no_model_is_refused(
    server: WebServer, files: dict[str, bytes], says: str
) -> None:
    server.files["a.tar.gz"] = data = tar_bytes(files)
    with pytest.raises(DownloadError, match=says):
        download(f"{server.url('a.tar.gz')}#sha256={hashlib.sha256(data).hexdigest()}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://host.example/model.bin", "leads to no file of .gguf, .zip"),
        ("https://host.example/", "leads to no file"),
        ("https://user:secret@host.example/a.gguf", "carries a user name"),
        ("http://host.example/a.gguf", "not encrypted.*#sha256="),
        ("https://host.example/a.gguf#sha256=12", "ends in #sha256=12"),
        ("https:///a.gguf", "names no server"),
        ("https://huggingface.co/datasets/a/b", "no model of the Hugging Face hub"),
        ("https://huggingface.co/", "no model of the Hugging Face hub"),
    ],
)
def test_an_address_that_is_no_source_says_why(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        parse_source(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("page", "spec"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "hf:Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "hf:Qwen/Qwen3-0.6B"),
        ("https://hf.co/Qwen/Qwen3-0.6B/tree/v1", "hf:Qwen/Qwen3-0.6B@v1"),
        ("https://huggingface.co/o/n/resolve/main/m.Q4_K.gguf?download=true", "hf:o/n/m.Q4_K.gguf"),
        ("https://huggingface.co/o/n/blob/abc/sub/m.gguf", "hf:o/n/sub/m.gguf@abc"),
        ("https://huggingface.co/o/n/blob/main/model.safetensors", "hf:o/n"),
    ],
)
def test_pages_of_the_hub_are_repositories(page: str, spec: str) -> None:
    source = parse_url(page)
    assert isinstance(source, HfSource)
    assert source.spec == spec


def test_the_name_has_nothing_that_a_folder_cannot_have() -> None:
    assert UrlSource.parse("https://h.example/a%2F..%2f..%2fevil%20name.gguf?x=1").name == "evil_name"
    assert UrlSource.parse("https://h.example/x/Model.TAR.GZ").name == "Model"
