from __future__ import annotations

import re
import subprocess
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
    # In a process of its own: what others have freed is not taken again.
    done = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True)
    large = 2 * 2**12 * 32 * 2 * 16 * 4
    assert large - 2**22 <= int(done.stdout) <= large


if __name__ == "__main__":
    before = bytes_that_ask_for_huge_pages()
    pools = [_native.KvPool(1, num_blocks, 2, 16, "f32") for num_blocks in (4, 2**12)]
    print(bytes_that_ask_for_huge_pages() - before)
