"""What constraints cost a step: streams that all write JSON by a schema, beside as many without one, step by
step in turns; and the share of the time in which masks are filled and tokens are taken note of."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastserve.config import EngineOptions
from fastserve.constraint import JsonSchema
from fastserve.engine import batch
from fastserve.engine.engine import Engine
from fastserve.engine.engine_of_model import make_constraint_compiler, make_engine
from fastserve.engine.guide import Guide
from fastserve.engine.load import load_model
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.prompt import encode_chat
from fastserve.hub.resolve import resolve
from fastserve.types import SamplingParams
from report import DEFAULT_MODEL, make_parser, publish
from speculation import Half

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z.]+@[a-z]+\\.(org|com)$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 100}  # longer than any completion
TASK = "Write a JSON list of people with name, age, email, tags and address."


class Stopwatch:
    """Seconds within some functions, on the way of whoever calls them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def around(self, owner: Any, *names: str) -> Any:
        originals = {name: getattr(owner, name) for name in names}
        for name, original in originals.items():
            setattr(owner, name, self._timed(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(owner, name, original)

    def _timed(self, function: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    options = EngineOptions(
        threads=arguments.threads, kv_memory="1GiB", context_length=1024, prefix_cache="off"
    )
    model = load_model(resolve(arguments.model), options)
    results = {f"batch {size}": measure(model, options, size, arguments.tokens) for size in arguments.batches}
    rows = [(name, describe(result)) for name, result in results.items()]
    publish(arguments, results, rows)


def measure(model: LoadedModel, options: EngineOptions, size: int, num_tokens: int) -> dict[str, float]:
    compiler = make_constraint_compiler(model)
    start = time.perf_counter()
    constraint = JsonSchema(SCHEMA)
    compiler.compile(constraint)
    first_seconds = time.perf_counter() - start
    free, constrained = (make_side(model, options, index) for index in range(2))
    for seed in range(size):
        sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": seed, "max_tokens": num_tokens}
        prompt_ids = encode_chat(model, [{"role": "user", "content": TASK}])
        free.add(prompt_ids, SamplingParams(**sampling, ignore_eos=True))
        params = SamplingParams(**sampling, constraint=constraint)
        constrained.add(prompt_ids, params, guide=compiler.compile(constraint))
    watch = Stopwatch()
    seconds: tuple[list[float], list[float]] = [], []
    own: list[float] = []
    with watch.around(batch, "build_masks"), watch.around(Guide, "advance"):
        while free.has_work and constrained.has_work:
            for engine, steps in zip((free, constrained), seconds, strict=True):
                before, start = watch.seconds, time.perf_counter()
                num_chunks = len(engine.step())
                if num_chunks == size:
                    steps.append(time.perf_counter() - start)
                    if engine is constrained:
                        own.append(watch.seconds - before)
    return {
        "compile_seconds": first_seconds,
        "step_milliseconds": 1e3 * statistics.median(seconds[1]),
        "step_without_milliseconds": 1e3 * statistics.median(seconds[0]),
        "ratio": statistics.median(b / a for a, b in zip(*seconds, strict=False)),
        "share_of_step": sum(own) / sum(seconds[1]),
    }


def make_side(model: LoadedModel, options: EngineOptions, index: int) -> Engine:
    half: Any = Half(model.executable, index)
    return make_engine(replace(model, executable=half), options)


def describe(result: dict[str, float]) -> str:
    return (
        f"step {result['step_milliseconds']:.2f} ms, without {result['step_without_milliseconds']:.2f} ms: "
        f"{result['ratio']:.3f}; masks and grammar {100 * result['share_of_step']:.1f} % of a step; "
        f"the first compilation {1e3 * result['compile_seconds']:.0f} ms"
    )


if __name__ == "__main__":
    main()
