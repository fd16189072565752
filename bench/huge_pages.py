"""What huge pages do for a step: decoding and prefill with and without them, in interleaved pairs.

Weights are packed in memory of their own, where pages may be huge, or mapped from the packed cache, whose
pages are those of the file system; buffers, keys and values may lie in huge pages either way.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.evaluate.estimate import estimate_ratio
from fastserve.evaluate.worker import FASTSERVE, Worker
from fastserve.evaluate.workload import DECODER_MEASURES
from fastserve.hub.resolve import resolve
from fastserve.models.family import read_config
from report import DEFAULT_MODEL, make_parser, publish

MEASURES = ("decode_1_tokens_per_second", "prefill_512_tokens_per_second")
_PR_SET_THP_DISABLE = 41  # prctl(2); a child process inherits it

# Whether pages may be huge, and whether weights come from the packed cache.
KINDS: Mapping[str, tuple[bool, bool]] = {
    "small pages": (False, False),
    "huge pages": (True, False),
    "cache, small pages": (False, True),
    "cache, huge pages": (True, True),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    path = resolve(arguments.model)
    vocab_size = read_config(open_checkpoint(path).config).vocab_size
    job = {
        "model": str(path),
        "weights": arguments.weights,
        "threads": arguments.threads,
        "context_length": 1024,
        "max_sequences": 1,
    }
    rates: dict[str, dict[str, list[float]]] = {name: {m: [] for m in MEASURES} for name in KINDS}
    with ExitStack() as stack:
        workers = {}
        for name, (is_huge, is_cached) in KINDS.items():
            with pages(is_huge), cache(is_cached):
                workers[name] = stack.enter_context(Worker(FASTSERVE, Path(sys.executable)))
                workers[name].open(job)
        for measure in MEASURES:
            for index in range(1 + arguments.pairs):
                for name in list(workers)[:: -1 if index % 2 else 1]:
                    rate = DECODER_MEASURES[measure].run(workers[name], vocab_size)
                    if index:  # the first warms up
                        rates[name][measure].append(rate)
    rows: list[tuple[str, object]] = []
    ratios = {}
    for name in list(KINDS)[1:]:
        for measure in MEASURES:
            ratio = estimate_ratio(rates[name][measure], rates["small pages"][measure])
            ratios[f"{name}, {measure}"] = asdict(ratio)
            rows.append((f"{measure}: {name} over small pages", ratio))
    publish(arguments, {"ratios": ratios, "rates": rates}, rows)


@contextmanager
def pages(is_huge: bool) -> Iterator[None]:
    """Processes that are started here get huge pages where they ask for them, or never do."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_THP_DISABLE, 0 if is_huge else 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)


@contextmanager
def cache(is_used: bool) -> Iterator[None]:
    """Processes that are started here map the packed weights of earlier starts, or pack them."""
    os.environ["FASTSERVE_PACKED_CACHE"] = "1" if is_used else "0"
    try:
        yield
    finally:
        del os.environ["FASTSERVE_PACKED_CACHE"]


if __name__ == "__main__":
    main()
