from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fastserve.engine import tier as tier_module
from fastserve.engine.tier import HostTier, SlowTier, SpillFile, default_spill_folder, file_system_of
from fastserve.errors import MemoryLimitError, OptionError

NUM_BLOCKS, BLOCK_BYTES = 7, 10_007

MakeTier = Callable[[], SlowTier]


@pytest.fixture
def spill_file(tmp_path: Path) -> Iterator[SpillFile]:
    tier = SpillFile(num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, folder=tmp_path)
    yield tier
    tier.close()


@pytest.fixture(params=["host", "file"])
def tier(request: pytest.FixtureRequest, spill_file: SpillFile) -> SlowTier:
    return spill_file if request.param == "file" else HostTier(num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES)


def check_blocks(tier: SlowTier, *, num_writes: int = 100) -> None:
    """Write to random blocks; every block reads what was written to it last."""
    rng = np.random.default_rng(3)
    expected: dict[int, bytes] = {}
    for _ in range(num_writes):
        block, data = int(rng.integers(NUM_BLOCKS)), rng.integers(0, 256, BLOCK_BYTES, np.uint8)
        tier.write(block, data)
        expected[block] = data.tobytes()
        data.fill(0)  # the tier has a copy
    assert len(expected) == NUM_BLOCKS
    for block, data_bytes in expected.items():
        out = np.empty(BLOCK_BYTES, np.uint8)
        tier.read(block, out)
        assert out.tobytes() == data_bytes


def descriptor_of(tier: SpillFile) -> int:
    return tier._file.fileno()


def refuse(number: int) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


def test_a_block_reads_what_was_last_written_to_it(tier: SlowTier) -> None:
    check_blocks(tier)


def test_a_block_that_there_is_not_is_a_defect(tier: SlowTier) -> None:
    for block in (-1, NUM_BLOCKS):
        with pytest.raises(AssertionError, match=f"block {block} of {NUM_BLOCKS}"):
            tier.read(block, np.empty(BLOCK_BYTES, np.uint8))
        with pytest.raises(AssertionError, match=f"block {block} of {NUM_BLOCKS}"):
            tier.write(block, np.empty(BLOCK_BYTES, np.uint8))


def test_a_tier_may_be_closed_again(tier: SlowTier) -> None:
    tier.close()
    tier.close()


def test_the_spill_file_has_no_name_and_is_its_owners_alone(spill_file: SpillFile, tmp_path: Path) -> None:
    status = os.fstat(descriptor_of(spill_file))
    assert list(tmp_path.iterdir()) == []
    assert status.st_nlink == 0
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert not os.get_inheritable(descriptor_of(spill_file))


def test_the_spill_file_has_all_of_its_space_from_the_beginning(spill_file: SpillFile) -> None:
    status = os.fstat(descriptor_of(spill_file))
    assert status.st_size == NUM_BLOCKS * BLOCK_BYTES
    assert status.st_blocks * 512 >= NUM_BLOCKS * BLOCK_BYTES


def test_nothing_is_left_of_the_spill_file_when_it_is_closed(spill_file: SpillFile, tmp_path: Path) -> None:
    descriptor = descriptor_of(spill_file)
    spill_file.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_nothing_is_left_of_the_spill_file_of_a_process_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from fastserve.engine.tier import SpillFile\n"
        "tier = SpillFile(num_blocks=4, block_bytes=4096, folder=sys.argv[1])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert result.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_nameless_files_has_it_unlinked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile._O_TMPFILE_WORKS", False)
    tier = SpillFile(num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, folder=tmp_path)
    test_the_spill_file_has_no_name_and_is_its_owners_alone(tier, tmp_path)
    check_blocks(tier)
    tier.close()


def test_transfers_that_stop_short_go_on(spill_file: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1001], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, outs, offset: preadv(fd, [outs[0][:999]], offset))
    check_blocks(spill_file)


@pytest.mark.parametrize("missing", [("posix_fallocate",), ("posix_fallocate", "pwrite", "preadv")])
def test_systems_without_positional_transfers_have_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    for name in missing:
        monkeypatch.delattr(os, name)
    tier = SpillFile(num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, folder=tmp_path)
    test_the_spill_file_has_all_of_its_space_from_the_beginning(tier)
    check_blocks(tier)
    tier.close()


def test_a_file_that_was_cut_is_an_error_and_not_old_bytes(spill_file: SpillFile) -> None:
    os.ftruncate(descriptor_of(spill_file), BLOCK_BYTES + 5)
    out = np.empty(BLOCK_BYTES, np.uint8)
    spill_file.read(0, out)
    with pytest.raises(OSError, match="shorter than it was made"):
        spill_file.read(1, out)


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path: Path) -> None:
    free_bytes = shutil.disk_usage(tmp_path).free
    num_blocks = 2 * free_bytes // 4096
    with pytest.raises(MemoryLimitError) as raised:
        SpillFile(num_blocks=num_blocks, block_bytes=4096, folder=tmp_path)
    assert (
        f"kv_spill needs {num_blocks * 4096 / 2**20:.1f} MiB on the disk of {tmp_path}"
        in raised.value.message
    )
    assert "MiB free" in raised.value.message
    assert "spill_dir" in str(raised.value.hint)
    assert shutil.disk_usage(tmp_path).free > free_bytes // 2


def test_a_disk_that_runs_full_while_the_file_is_made_is_told_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    temporary_file = tier_module.tempfile.TemporaryFile
    monkeypatch.setattr(
        "tempfile.TemporaryFile", lambda **options: opened.append(temporary_file(**options)) or opened[-1]
    )
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(
        MemoryLimitError, match=rf"needs 4.0 MiB on the disk of {tmp_path}, which has .* MiB free"
    ):
        SpillFile(num_blocks=1024, block_bytes=4096, folder=tmp_path)
    assert [file.closed for file in opened] == [True]


def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from fastserve.engine.tier import SpillFile\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "SpillFile(num_blocks=4, block_bytes=4096, folder=sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert "MemoryLimitError: kv_spill needs 0.0 MiB on the disk of" in result.stderr


@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "No such file or directory"), ("file", "Not a directory")]
)
def test_a_folder_that_is_none_is_refused_by_its_name(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=f"{tmp_path / name}.*{reason}"):
        SpillFile(num_blocks=1, block_bytes=1, folder=tmp_path / name)


def test_host_memory_that_is_not_there_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "available_memory_bytes", lambda: 2**20)
    with pytest.raises(MemoryLimitError, match=r"kv_spill needs 2.0 MiB of memory; 1.0 MiB are available"):
        HostTier(num_blocks=2, block_bytes=2**20)


def test_the_default_folder_is_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[Path, str | None] = {Path("/var/tmp"): "ext4"}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(tier_module, "file_system_of", lambda folder: kinds.get(folder))
    assert default_spill_folder() == tmp_path
    kinds[tmp_path] = "tmpfs"
    assert default_spill_folder() == Path("/var/tmp")
    kinds[Path("/var/tmp")] = "tmpfs"
    with pytest.raises(OptionError, match=f"kv_spill has no disk: {tmp_path} and /var/tmp lie in memory"):
        default_spill_folder()


def test_a_folder_in_memory_that_was_named_is_taken_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tier_module, "file_system_of", lambda folder: "tmpfs")
    SpillFile(num_blocks=1, block_bytes=1, folder=tmp_path).close()
    assert f"spill_dir={tmp_path} lies in memory" in caplog.text


def test_the_kind_of_a_file_system_is_that_of_the_folders_device(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "21 1 0:1 / /proc rw shared:3 - proc proc rw\n"
        f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw master:1 shared:2 - xfs /dev/root rw\n"
    )
    assert file_system_of(tmp_path, mounts=mounts) == "xfs"
    assert file_system_of(Path("/proc"), mounts=mounts) != "xfs"
    assert file_system_of(tmp_path, mounts=tmp_path / "none") is None


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="the system has no /dev/shm")
def test_shared_memory_is_known_as_memory() -> None:
    assert file_system_of(Path("/dev/shm")) == "tmpfs"
