"""A corpus larger than memory: streamed, sorted and rid of duplicates by `fastserve prepare`, with the most
memory that this took.

    python bench/prepare_large.py [--size 2GB] [--row-bytes 1000] [--order random] [--near-duplicates 0.8]

Every fifth row repeats an earlier one, however far back: what is kept is counted against what was made. Exits
1 where a row is missing or twice, the order is wrong, or the peak is above --limit.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from fastserve.config import parse_bytes
from report import make_parser, publish

_REPEAT_EVERY = 5
_SEED = 20261127


def make_rows(num_bytes: int, row_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Lines of JSON until they have `num_bytes`, and whether a line is new."""
    random = Random(_SEED)
    words = [f"{random.choice('bcdfglmnprst')}{random.choice('aeiou')}{number}" for number in range(50_000)]
    written = number = 0
    while written < num_bytes:
        is_new = number % _REPEAT_EVERY != _REPEAT_EVERY - 1 or number < _REPEAT_EVERY
        # A text follows from its number alone, so that a repetition needs nothing kept.
        of = number if is_new else _earlier(random.randrange(number))
        line = _make_line(of, words, row_bytes)
        yield line, is_new
        written += len(line)
        number += 1


def _earlier(number: int) -> int:
    """A number that has a text of its own."""
    is_repetition = number % _REPEAT_EVERY == _REPEAT_EVERY - 1 and number >= _REPEAT_EVERY
    return number - 1 if is_repetition else number


def _make_line(number: int, words: list[str], row_bytes: int) -> bytes:
    random = Random(number)
    text = " ".join(random.choices(words, k=max(row_bytes // 8, 1)))
    return json.dumps({"text": f"{number} {text}"}).encode() + b"\n"


def check_output(path: Path, order: str) -> tuple[int, list[str]]:
    """How many rows there are, and what is wrong with them."""
    wrong = []
    seen: set[bytes] = set()
    before: int | bytes = b"" if order == "random" else 0
    num_rows = 0
    with path.open("rb") as file:
        for line in file:
            num_rows += 1
            digest = hashlib.blake2b(line, digest_size=8).digest()
            if digest in seen:
                wrong.append(f"row {num_rows} is there twice")
            seen.add(digest)
            key: int | bytes = len(line) if order == "length" else b""
            if order == "length" and key < before:  # type: ignore[operator]
                wrong.append(f"row {num_rows} is shorter than the one before")
            before = key
    return num_rows, wrong[:5]


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--size", default="2GB", help="of the corpus")
    parser.add_argument("--row-bytes", type=int, default=1000, help="of a row, about")
    parser.add_argument("--memory", default="256MiB", help="for sorting and looking for duplicates")
    parser.add_argument("--limit", default="1GB", help="of the peak of memory")
    parser.add_argument("--order", default="length", choices=["input", "length", "random"])
    parser.add_argument("--near-duplicates", type=float, help="similarity")
    parser.add_argument("--folder", type=Path, help="where to work; four times the size is needed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        corpus, output = Path(folder) / "corpus.jsonl", Path(folder) / "output"
        num_rows = num_new = 0
        with corpus.open("wb") as file:
            for line, is_new in make_rows(parse_bytes("size", arguments.size), arguments.row_bytes):
                file.write(line)
                num_rows += 1
                num_new += is_new
        size = corpus.stat().st_size
        command = [sys.executable, "-m", "fastserve.cli.main", "prepare", str(corpus), "--task", "causal-lm"]
        command += ["--output", str(output), "--order", arguments.order, "--memory", arguments.memory]
        command += ["--dev-ratio", "0", "--test-ratio", "0", "--json"]
        if arguments.near_duplicates is not None:
            command += ["--near-duplicates", str(arguments.near_duplicates)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        kept, wrong = check_output(output / "train.jsonl", arguments.order)
    if kept != num_new:
        wrong.append(f"{kept} rows were kept of {num_new} different ones")
    if peak_bytes > parse_bytes("limit", arguments.limit):
        wrong.append(f"the peak of {peak_bytes / 1e6:.0f} MB is above {arguments.limit}")
    results = {
        "corpus_bytes": size,
        "rows": num_rows,
        "kept": kept,
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak_bytes,
    }
    table = [
        ("corpus", f"{size / 1e9:.3f} GB, {num_rows} rows"),
        ("kept", f"{kept} rows of {num_new} different ones"),
        ("time", f"{seconds:.0f} s, of the processor {results['processor_seconds']:.0f} s"),
        ("peak of memory", f"{peak_bytes / 1e6:.0f} MB"),
    ]
    publish(arguments, results, table)
    for message in wrong:
        print(f"wrong: {message}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
