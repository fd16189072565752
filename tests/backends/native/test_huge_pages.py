from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fastserve import _native

SMAPS = Path("/proc/self/smaps")


def bytes_that_ask_for_huge_pages() -> int:
    """Of all mappings with the flag of MADV_HUGEPAGE (proc_pid_smaps(5))."""
    sizes = re.findall(
        r"^Size: +(\d+) kB$(?:\n(?!VmFlags).*)*\nVmFlags:.* hg\b", SMAPS.read_text(), re.MULTILINE
    )
    return 1024 * sum(map(int, sizes))


@pytest.mark.skipif(sys.platform != "linux" or not SMAPS.exists(), reason="reads /proc")
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages"
)
def test_large_buffers_ask_for_huge_pages_and_small_ones_do_not() -> None:
    before = bytes_that_ask_for_huge_pages()
    pools = [_native.KvPool(1, num_blocks, 2, 16, "f32") for num_blocks in (4, 2**12)]
    after = bytes_that_ask_for_huge_pages()
    large = 2 * 2**12 * 32 * 2 * 16 * 4
    assert large - 2**22 <= after - before <= large
    assert len(pools) == 2
