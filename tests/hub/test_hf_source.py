from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from fastserve.errors import DownloadError, OptionError
from fastserve.hub.download import download
from fastserve.hub.hf_source import HfSource
from fastserve.hub.registry import list_models
from hub.wheel_index import MODEL_FILES

COMMIT = "c0ffee" * 6 + "0000"


class FakeHub:
    """A repository as huggingface_hub shows it; `served` is what its files really hold."""

    def __init__(self) -> None:
        self.files = {**MODEL_FILES, "README.md": b"# Model", "pytorch_model.bin": b"pickle"}
        self.served = dict(self.files)
        self.requests: list[tuple[str, str]] = []
        self.failure: Exception | None = None

    def model_info(self, repository: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        siblings = [
            SimpleNamespace(rfilename=name, size=len(data), lfs=self._lfs(name, data))
            for name, data in self.files.items()
        ]
        return SimpleNamespace(sha=COMMIT, siblings=siblings, card_data={"license": "mit"})

    def hf_hub_download(self, repository: str, name: str, *, revision: str, local_dir: Path) -> str:
        self.requests.append((name, revision))
        if self.failure:
            raise self.failure
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(self.served[name])
        return str(local_dir / name)

    @staticmethod
    def _lfs(name: str, data: bytes) -> SimpleNamespace | None:
        return SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if "model." in name else None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("hf:owner/name", HfSource(repository="owner/name")),
        ("hf:owner/name@v1.0", HfSource(repository="owner/name", revision="v1.0")),
        ("hf:owner/name-GGUF/m.Q8_0.gguf", HfSource(repository="owner/name-GGUF", file="m.Q8_0.gguf")),
        ("hf:o/n/q8/m.gguf@main", HfSource(repository="o/n", file="q8/m.gguf", revision="main")),
    ],
)
def test_a_source_is_read_and_written_the_same(spec: str, source: HfSource) -> None:
    assert HfSource.parse(spec) == source
    assert source.spec == spec


@pytest.mark.parametrize("spec", ["hf:", "hf:name", "hf:owner/name/x.json", "hf:owner/name@", "hf:a b/c"])
def test_a_badly_formed_source_is_refused(spec: str) -> None:
    with pytest.raises(OptionError, match="hf:owner/name"):
        download(spec)


def test_only_the_files_of_the_model_are_fetched_all_from_one_commit(hub: FakeHub) -> None:
    record = download("hf:owner/name@main")
    assert sorted(hub.requests) == [(name, COMMIT) for name in sorted(MODEL_FILES)]
    assert (record.name, record.revision, record.licence) == ("owner/name@main", COMMIT, "mit")
    assert {p.name: p.read_bytes() for p in record.path.iterdir()} == MODEL_FILES


@pytest.mark.parametrize(
    ("content", "problem"), [(b"short", "has 5 bytes, not"), (bytes(16394), "does not match its sha256")]
)
def test_a_file_that_is_not_what_the_hub_states_is_refused(
    hub: FakeHub, content: bytes, problem: str
) -> None:
    hub.served["model.safetensors"] = content
    with pytest.raises(DownloadError, match=f"model.safetensors {problem}"):
        download("hf:owner/name")
    assert list_models() == []
    hub.served["model.safetensors"] = MODEL_FILES["model.safetensors"]
    assert download("hf:owner/name").damaged_files() == []


def test_a_hub_that_does_not_answer_is_named_in_one_line(hub: FakeHub) -> None:
    hub.failure = ConnectionError("cannot reach the hub\nrequest id 1")
    with pytest.raises(DownloadError) as caught:
        download("hf:owner/name")
    assert caught.value.message.endswith("hf:owner/name could not be fetched: cannot reach the hub")
    assert "HF_TOKEN" in (caught.value.hint or "")


def test_a_disk_that_runs_full_is_said_to_be_so(hub: FakeHub) -> None:
    hub.failure = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DownloadError, match="ran full"):
        download("hf:owner/name")


def test_a_repository_without_weights_we_read_is_refused(hub: FakeHub) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(DownloadError, match="holds no model"):
        download("hf:owner/name")


def test_one_gguf_file_of_several_is_fetched_when_named(hub: FakeHub) -> None:
    hub.files = hub.served = {"q4.gguf": b"GGUF 4", "q8.gguf": b"GGUF 8"}
    with pytest.raises(DownloadError, match=r"2 \.gguf files to choose from") as caught:
        download("hf:owner/name")
    assert "hf:owner/name/FILE.gguf" in (caught.value.hint or "")
    assert download("hf:owner/name/q8.gguf").path.read_bytes() == b"GGUF 8"
