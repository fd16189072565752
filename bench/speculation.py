"""What speculation does to decoding: the same requests with and without it, step by step in turns, and that
their completions are the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.gguf_tokenizer import build_from_gguf
from fastserve.config import EngineOptions
from fastserve.engine.draft_model import DraftModel
from fastserve.engine.engine import Engine
from fastserve.engine.load import load_model
from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.prompt import encode_chat
from fastserve.evaluate.model_folder import write_model_folder
from fastserve.hub.resolve import resolve
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import expected_parameters
from fastserve.types import Batch, Executable, Float32Array, SamplingParams, StepResult
from report import DEFAULT_MODEL, make_parser, publish

NUM_CHAT_TOKENS = 64
NUM_RANDOM_TOKENS = 48
RANDOM_PROMPT_TOKENS = 64
MOST_EDITED_TOKENS = 160
PARAGRAPH_CHARACTERS = range(400, 900)
SEED = 1
_LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class Request:
    prompt_ids: Sequence[int]
    params: SamplingParams


@dataclass
class Case:
    """Pairs of runs of like requests."""

    batch: int
    requests: Callable[[int], list[Request]]  # of a round
    rounds: int
    decode_ratios: list[float] = field(default_factory=list)  # tokens a second, with over without
    whole_ratios: list[float] = field(default_factory=list)  # the same, prompts included
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    completion_tokens: int = 0
    guess_seconds: float = 0.0  # of a draft model
    seconds: float = 0.0  # of the sides with speculation


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTSERVE_TEST_DATA"))
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=["edit", "summarize", "chat", "random"],
        choices=["edit", "summarize", "chat", "random", "random-greedy"],
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 32], help="of chat and random")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of a batch of chat and random")
    parser.add_argument("--texts", type=int, default=8, help="to edit and to summarize, a pair each")
    parser.add_argument("--weights", default="auto", help="of the model")
    parser.add_argument("--max-draft-tokens", type=int, default=EngineOptions().max_draft_tokens)
    parser.add_argument("--draft-model", help="by default the model itself, with the next two")
    parser.add_argument("--draft-layers", type=int)
    parser.add_argument("--draft-weights", default="auto")
    parser.add_argument(
        "--idle-layers",
        type=int,
        default=0,
        help="that are added behind the model's own, and change nothing: as dear as they look",
    )
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data names the folder of the texts")
    options = EngineOptions(
        **draft_options(arguments),
        weights=arguments.weights,
        max_draft_tokens=arguments.max_draft_tokens,
        threads=arguments.threads,
        prefix_cache="off",  # every pair computes its prompts twice
        kv_memory="1GiB",
        context_length=2048,
    )
    with TemporaryDirectory() as folder:
        path = resolve(arguments.model)
        if arguments.idle_layers:
            os.environ["FASTSERVE_PACKED_CACHE"] = "0"  # it is gone when it is loaded
            path = add_idle_layers(path, Path(folder), arguments.idle_layers)
        model = load_model(path, options)
    cases = make_cases(model, arguments.data, arguments)
    measure(model, options, cases)
    results = {name: summarize(case) for name, case in cases.items()}
    rows: list[tuple[str, object]] = [
        (f"{name}: decode with over without", describe(result)) for name, result in results.items()
    ]
    publish(arguments, results, [*rows, ("completions", "identical")])


def draft_options(arguments: Any) -> dict[str, Any]:
    drafts = {
        "draft_model": arguments.draft_model and resolve(arguments.draft_model),
        "draft_layers": arguments.draft_layers,
        "draft_weights": arguments.draft_weights,
    }
    if all(value in (None, "auto") for value in drafts.values()):
        return {"speculation": "prompt-lookup"}
    return {"speculation": "draft", **drafts}


def add_idle_layers(path: Path, folder: Path, num_layers: int) -> Path:
    """The model of a .gguf file with more layers, whose last products are zero: it says the same, and takes
    longer, as a large model beside a small one of like mind does."""
    checkpoint = open_checkpoint(path)
    num_own = checkpoint.config["num_hidden_layers"]
    config = {**checkpoint.config, "num_hidden_layers": num_own + num_layers}
    shapes = expected_parameters(build_graph(read_config(config)))

    def blocks(name: str) -> list[Float32Array]:
        index, rest = "0", name
        if name.startswith(_LAYERS):
            index, rest = name.removeprefix(_LAYERS).split(".", 1)
            name = f"{_LAYERS}{int(index) % num_own}.{rest}"
        values = to_f32(checkpoint.tensors[name])
        is_idle = int(index) >= num_own and ("o_proj" in rest or "down_proj" in rest)
        return [np.zeros_like(values) if is_idle else values]

    assert checkpoint.metadata is not None
    tokenizer, special_tokens = build_from_gguf(checkpoint.metadata)
    write_model_folder(folder, config, tokenizer.to_str(), shapes, blocks)
    chat = {**special_tokens, "chat_template": checkpoint.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(chat), encoding="utf-8")
    return folder


def make_cases(model: LoadedModel, data: Path, arguments: Any) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for workload in arguments.workloads:
        if workload in ("edit", "summarize"):
            requests = edits(model, data) if workload == "edit" else summaries(model, data)
            cases[f"{workload}, batch 1"] = Case(1, requests, arguments.texts)
            continue
        for batch in arguments.batches:
            if workload == "chat":
                requests = chats(model, data, batch)
            else:
                requests = random_prompts(model, batch, is_greedy=workload == "random-greedy")
            cases[f"{workload}, batch {batch}"] = Case(batch, requests, arguments.rounds)
    return cases


def edits(model: LoadedModel, data: Path) -> Callable[[int], list[Request]]:
    """Paragraphs of wikitext-2, to be copied with their spacing corrected; greedy."""
    lines = (data / "lm_wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    paragraphs = [line.strip() for line in lines if len(line) in PARAGRAPH_CHARACTERS]
    task = "Correct the spacing and punctuation of this text, and change nothing else:\n\n"
    params = SamplingParams(max_tokens=MOST_EDITED_TOKENS)
    return lambda index: [chat_request(model, task + paragraphs[7 * index % len(paragraphs)], params)]


def summaries(model: LoadedModel, data: Path) -> Callable[[int], list[Request]]:
    """Abstracts of SciTLDR; greedy."""
    lines = (data / "sum_scitldr_A" / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    params = SamplingParams(max_tokens=MOST_EDITED_TOKENS)

    def make(index: int) -> list[Request]:
        text = " ".join(json.loads(lines[5 * index % len(lines)])["source"])
        return [chat_request(model, f"Summarize this text:\n\n{text}", params)]

    return make


def chats(model: LoadedModel, data: Path, batch: int) -> Callable[[int], list[Request]]:
    """Questions of MT-bench; at a temperature."""
    lines = (data / "eval_mtbench" / "question.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["turns"][0] for line in lines]

    def make(index: int) -> list[Request]:
        numbers = range(index * batch, (index + 1) * batch)
        return [
            chat_request(model, questions[n % len(questions)], drawn(NUM_CHAT_TOKENS, seed=n))
            for n in numbers
        ]

    return make


def random_prompts(model: LoadedModel, batch: int, *, is_greedy: bool) -> Callable[[int], list[Request]]:
    """Tokens that mean nothing."""

    def make(index: int) -> list[Request]:
        rng = np.random.default_rng(SEED + index)
        ids = rng.integers(1000, model.executable.vocab_size, (batch, RANDOM_PROMPT_TOKENS))
        greedy = SamplingParams(max_tokens=NUM_RANDOM_TOKENS, ignore_eos=True)
        return [
            Request(row.tolist(), greedy if is_greedy else drawn(NUM_RANDOM_TOKENS, seed=n))
            for n, row in enumerate(ids)
        ]

    return make


def drawn(max_tokens: int, *, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.8, top_p=0.95, seed=seed, ignore_eos=True)


def chat_request(model: LoadedModel, text: str, params: SamplingParams) -> Request:
    return Request(list(encode_chat(model, [{"role": "user", "content": text}])), params)


class Half:
    """One half of an executable's KV pool, so that two engines can take turns step by step: whatever slows
    the machine down for longer than a step then slows both."""

    def __init__(self, executable: Executable, index: int) -> None:
        self._executable = executable
        self.limits = replace(executable.limits, num_blocks=executable.limits.num_blocks // 2)
        self._offset = index * self.limits.num_blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executable, name)

    def run(self, batch: Batch) -> StepResult:
        return self._executable.run(replace(batch, block_tables=batch.block_tables + np.int32(self._offset)))


@dataclass
class Side:
    """An engine, and what the requests of one round have cost it."""

    engine: Engine
    ids: list[int] = field(default_factory=list)
    started: set[int] = field(default_factory=set)
    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    decode_tokens: int = 0  # of the steps after all had their first token
    decode_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second. How many had come before, while others' prompts were read, differs."""
        return self.decode_tokens / self.decode_seconds

    def step(self) -> None:
        is_decode = len(self.started) == len(self.ids)
        start = time.perf_counter()
        chunks = self.engine.step()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.decode_seconds += seconds * is_decode
        self.decode_tokens += len(chunks) * is_decode
        for chunk in chunks:
            self.started.add(chunk.request_id)
            if chunk.completion is not None:
                self.tokens[chunk.request_id] = chunk.completion.token_ids


def measure(model: LoadedModel, options: EngineOptions, cases: dict[str, Case]) -> None:
    defaults = {field.name: getattr(EngineOptions(), field.name) for field in fields(EngineOptions)}
    changed = {name: value for name, value in defaults.items() if "draft" in name}
    off = replace(options, speculation="off", **changed)
    engines = [make_engine(model, side, index) for index, side in enumerate((off, options))]
    first = next(iter(cases.values()))
    run(engines, first.requests(first.rounds))  # the cost of a step is learned, memory is touched
    for index in range(max(case.rounds for case in cases.values())):
        for case in cases.values():
            if index < case.rounds:
                measure_round(case, engines, case.requests(index))


def make_engine(model: LoadedModel, options: EngineOptions, index: int) -> Engine:
    return Engine(
        Half(model.executable, index),
        eos_token_ids=model.checkpoint.eos_token_ids,
        make_decoder=model.tokenizer.stream_decoder,
        context_length=model.context_length,
        options=options,
        draft_model=DraftModel(model.draft.executable) if options.speculation == "draft" else None,
    )


def measure_round(case: Case, engines: Sequence[Engine], requests: Sequence[Request]) -> None:
    before = engines[1].status().speculation
    without, with_ = run(engines, requests)
    after = engines[1].status().speculation
    tokens = [[side.tokens[request_id] for request_id in side.ids] for side in (without, with_)]
    assert tokens[0] == tokens[1], "speculation has changed a completion"
    case.completion_tokens += sum(map(len, tokens[1]))
    case.drafted_tokens += after.drafted_tokens - before.drafted_tokens
    case.accepted_tokens += after.accepted_tokens - before.accepted_tokens
    case.guess_seconds += after.guess_seconds - before.guess_seconds
    case.seconds += with_.seconds
    case.decode_ratios.append(with_.decode_rate / without.decode_rate)
    case.whole_ratios.append(without.seconds / with_.seconds)


def run(engines: Sequence[Engine], requests: Sequence[Request]) -> list[Side]:
    """The same requests through engines that take turns."""
    sides = [Side(engine) for engine in engines]
    for side in sides:
        side.ids = [side.engine.add(request.prompt_ids, request.params) for request in requests]
    while any(side.engine.has_work for side in sides):
        for side in sides:
            if side.engine.has_work:
                side.step()
    return sides


def summarize(case: Case) -> dict[str, Any]:
    return {
        "decode_ratio_median": float(np.median(case.decode_ratios)),
        "decode_ratio_least": min(case.decode_ratios),
        "decode_ratio_greatest": max(case.decode_ratios),
        "whole_ratio_median": float(np.median(case.whole_ratios)),
        "whole_ratio_least": min(case.whole_ratios),
        "drafted_tokens": case.drafted_tokens,
        "accepted_tokens": case.accepted_tokens,
        "completion_tokens": case.completion_tokens,
        "guess_share": case.guess_seconds / case.seconds,
    }


def describe(result: Mapping[str, Any]) -> str:
    spread = f"{result['decode_ratio_least']:.2f}-{result['decode_ratio_greatest']:.2f}"
    return (
        f"{result['decode_ratio_median']:.2f} ({spread}), "
        f"prompts included {result['whole_ratio_median']:.2f}; "
        f"{result['accepted_tokens']} of {result['drafted_tokens']} drafts, "
        f"{result['completion_tokens']} tokens; guesses took {100 * result['guess_share']:.0f} % of the time"
    )


if __name__ == "__main__":
    main()
