"""What is freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, os, sys
from threading import Thread
from fastserve.engine.heap import share_heap, trim_heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def fill():
    places = [libc.malloc(2000) for _ in range(20_000)]
    for place in places:
        ctypes.memset(place, 1, 2000)
    kept.append(places.pop())  # the top of the heap stays, so that nothing goes back by itself
    for place in places:
        libc.free(place)

kept = []
if sys.argv[1] == "shared":
    share_heap()
before = resident()
for _ in range(4):
    thread = Thread(target=fill)
    thread.start()
    thread.join()
full = resident()
trim_heap()
print(full - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory where Linux shows it")
@pytest.mark.parametrize("heap", ["own", "shared"])
def test_what_was_freed_below_what_stays_goes_back(heap: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, heap], check=True, capture_output=True, text=True)
    held, kept = map(int, done.stdout.split())
    assert held > 30_000_000
    assert kept < held / 4
