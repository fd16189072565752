"""Machines that the simulator knows: what their steps cost and what they hold, as data in `machines/`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastserve.engine.cost import StepCost
from fastserve.engine.turn import Turn
from fastserve.errors import OptionError
from fastserve.evaluate.arrival import Arrival
from fastserve.option import check_integer, check_kind, check_number
from fastserve.types import Limits

MACHINE_NAMES = ("cpu", "a100")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCost:
    """Seconds of a step, as a sum over its rows.

    Finer than the scheduler's own StepCost, which is fitted to these seconds as to those of a real machine:
    prompts and decodes read keys at a different price.

    Attributes:
        fixed_seconds: of any step.
        prefill_seconds: a row of a prompt.
        decode_seconds: a row that continues a completion.
        prefill_context_seconds: a token that lies before a prompt's chunk, once a chunk.
        prefill_attended_seconds: a key that a prompt's row reads.
        decode_attended_seconds: a key that a decode reads.
    """

    fixed_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prefill_context_seconds: float = 0.0
    prefill_attended_seconds: float = 0.0
    decode_attended_seconds: float = 0.0

    def seconds(self, turns: Iterable[Turn]) -> float:
        """Of the step that runs these turns."""
        prefill = decode = chunk_context = prefill_attended = decode_attended = 0
        for turn in turns:
            sequence, n = turn.sequence, turn.num_tokens
            start = sequence.num_computed_tokens
            if n == 1 and start >= sequence.num_prompt_tokens:
                decode += 1
                decode_attended += start + 1
            else:
                prefill += n
                chunk_context += start
                prefill_attended += n * start + n * (n + 1) // 2
        return (
            self.fixed_seconds
            + self.prefill_seconds * prefill
            + self.decode_seconds * decode
            + self.prefill_context_seconds * chunk_context
            + self.prefill_attended_seconds * prefill_attended
            + self.decode_attended_seconds * decode_attended
        )

    def prefill_work_seconds(self, num_tokens: int, max_tokens: int) -> float:
        """What a prompt's first tokens add to steps that have other rows too, in chunks of `max_tokens`."""
        num_chunks = -(-num_tokens // max_tokens)
        chunk_context = max_tokens * num_chunks * (num_chunks - 1) // 2
        return (
            self.prefill_seconds * num_tokens
            + self.prefill_context_seconds * chunk_context
            + self.prefill_attended_seconds * (num_tokens * (num_tokens + 1) // 2)
        )

    def decode_work_seconds(self, prompt_tokens: int, num_decodes: int) -> float:
        """What so many decodes after a prompt add to steps that have other rows too."""
        attended = num_decodes * prompt_tokens + num_decodes * (num_decodes + 1) // 2
        return self.decode_seconds * num_decodes + self.decode_attended_seconds * attended

    def to_step_cost(self) -> StepCost:
        """The scheduler's first idea of it, before it has seen a step."""
        return StepCost(
            fixed_seconds=self.fixed_seconds,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            attended_seconds=self.decode_attended_seconds,
            prefill_attended_seconds=self.prefill_attended_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedMachine:
    """A machine with a model on it.

    Attributes:
        source: where the numbers are from.
        max_tokens: rows of one step.
        max_sequences: sequences of one step.
        block_size: tokens of a KV block.
        num_blocks: of the fast pool.
        num_slow_blocks: of the slow tier; 0 is none.
        swap_seconds_per_block: in either direction.
        is_swap_duplex: whether both directions go on at once.
    """

    name: str
    source: str
    cost: SimulatedCost
    max_tokens: int
    max_sequences: int
    block_size: int
    num_blocks: int
    num_slow_blocks: int
    swap_seconds_per_block: float
    is_swap_duplex: bool

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def limits(self) -> Limits:
        return Limits(
            max_tokens=self.max_tokens,
            max_outputs=self.max_sequences,
            max_sequences=self.max_sequences,
            num_blocks=self.num_blocks,
            max_context=self.kv_tokens,
        )

    def with_kv_tokens(self, kv_tokens: int) -> SimulatedMachine:
        """The same with so much room in its fast pool, and a slow tier of the same proportion.

        Raises:
            OptionError: less than a block.
        """
        check_integer("kv_tokens", kv_tokens, low=self.block_size)
        num_blocks = kv_tokens // self.block_size
        num_slow_blocks = num_blocks * self.num_slow_blocks // self.num_blocks
        return replace(self, num_blocks=num_blocks, num_slow_blocks=num_slow_blocks)

    def can_hold(self, arrival: Arrival) -> bool:
        """Whether a request fits the fast pool, alone."""
        return arrival.num_tokens <= self.kv_tokens

    def work_seconds(self, arrival: Arrival) -> float:
        """What a request adds to steps that are full anyway; its first token comes with its prompt."""
        decodes = arrival.completion_tokens - 1
        return self.cost.prefill_work_seconds(
            arrival.prompt_tokens, self.max_tokens
        ) + self.cost.decode_work_seconds(arrival.prompt_tokens, decodes)

    def isolated_seconds(self, arrival: Arrival) -> float:
        """From a request's arrival to its last token, where it is alone on the machine."""
        num_chunks = -(-arrival.prompt_tokens // self.max_tokens)
        num_steps = num_chunks + arrival.completion_tokens - 1
        return self.cost.fixed_seconds * num_steps + self.work_seconds(arrival)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_machine(name: str) -> SimulatedMachine:
    """One of MACHINE_NAMES, or what `fastserve bench fit-cost --json` wrote to a file.

    Raises:
        OptionError: there is none, or its numbers are wrong.
    """
    if name in MACHINE_NAMES:
        return parse_machine(
            json.loads((files("fastserve.evaluate") / "machines" / f"{name}.json").read_text())
        )
    try:
        document = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"cost {name!r} is neither {' nor '.join(MACHINE_NAMES)} nor a file of costs: {error}",
            hint="write one with `fastserve bench fit-cost MODEL --json`",
        ) from None
    return parse_machine(document)


def parse_machine(document: object) -> SimulatedMachine:
    """Check a machine as JSON. What it holds beyond the fields of SimulatedMachine is let be.

    Raises:
        OptionError: a field is missing or wrong.
    """
    if not isinstance(document, Mapping):
        raise OptionError("a machine is a JSON object", hint="write one with `fastserve bench fit-cost`")
    fields_of_cost = _take(document.get("cost"), SimulatedCost, "cost of the machine")
    for name, value in fields_of_cost.items():
        check_number(f"cost.{name}", value, 0.0, 1000.0)
    values = _take(document, SimulatedMachine, "machine")
    for name in ("max_tokens", "max_sequences", "block_size", "num_blocks"):
        check_integer(name, values[name], low=1)
    check_integer("num_slow_blocks", values["num_slow_blocks"], low=0)
    check_number("swap_seconds_per_block", values["swap_seconds_per_block"], 0.0, 1000.0)
    check_kind("is_swap_duplex", values["is_swap_duplex"], bool, "true or false")
    cost = SimulatedCost(**fields_of_cost)
    if cost.fixed_seconds + min(cost.prefill_seconds, cost.decode_seconds) <= 0:
        raise OptionError("a step of the machine takes no time", hint="give fixed_seconds above 0")
    return SimulatedMachine(**{**values, "cost": cost})


def _take(document: object, kind: type[Any], what: str) -> dict[str, Any]:
    """The fields of a dataclass in a JSON object; those with a default may be missing."""
    if not isinstance(document, Mapping):
        raise OptionError(f"the {what} is not an object", hint="write one with `fastserve bench fit-cost`")
    names = {field.name for field in fields(kind)}
    taken = {name: document[name] for name in names & document.keys()}
    try:
        kind(**taken)
    except TypeError as error:
        raise OptionError(f"the {what} lacks a field: {error}", hint="see docs/scheduling.md") from None
    return taken
