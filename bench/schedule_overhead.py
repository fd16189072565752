"""What scheduling costs a step of 64 sequences: making the turns, and accounting for them after it."""

from __future__ import annotations

import time
from itertools import product

import numpy as np

from fastserve.config import ScheduleOptions
from fastserve.engine.policy import POLICY_NAMES
from fastserve.engine.schedule import make_scheduler
from fastserve.engine.sequence import Sequence
from fastserve.types import Limits
from report import make_parser, publish

LIMITS = Limits(max_tokens=512, max_outputs=64, max_sequences=64, num_blocks=4000, max_context=8192)
STEP_SECONDS = 0.02
NUM_WARM_UP_STEPS = 200


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--policies", nargs="+", default=list(POLICY_NAMES))
    parser.add_argument("--waiting", nargs="+", type=int, default=[256, 1000])
    parser.add_argument("--tenants", nargs="+", type=int, default=[1, 8], help="whose sequences they are")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    rows = []
    settings = product(arguments.policies, arguments.waiting, arguments.tenants)
    for policy, num_waiting, num_tenants in settings:
        schedule, commit = measure(policy, num_waiting + LIMITS.max_sequences, num_tenants, arguments.steps)
        name = f"{policy}, {num_waiting} waiting, {num_tenants} {'tenant' if num_tenants == 1 else 'tenants'}"
        results[name] = {"schedule_seconds": schedule, "commit_seconds": commit}
        text = f"{1e6 * schedule:.0f} + {1e6 * commit:.0f} microseconds"
        rows.append((f"{name}: turns + accounts, medians", text))
    publish(arguments, results, rows)


def measure(policy: str, num_sequences: int, num_tenants: int, num_steps: int) -> tuple[float, float]:
    """Median seconds of `schedule` and of `commit`."""
    scheduler = make_scheduler(LIMITS, block_size=32, options=ScheduleOptions(policy=policy))
    for index in range(num_sequences):
        length = 100 + index % 300
        sequence = Sequence(
            sequence_id=index,
            token_ids=[(7 * index + position) % 1000 for position in range(length)],
            num_prompt_tokens=length,
            max_tokens=3000,
            arrival_seconds=index * 0.001,
            tenant=str(index % num_tenants),
        )
        scheduler.add(sequence, 0.0)
    schedules, commits = [], []
    for step in range(num_steps):
        now = step * STEP_SECONDS
        start = time.perf_counter()
        turns = scheduler.schedule(now)
        between = time.perf_counter()
        scheduler.commit(turns, seconds=STEP_SECONDS, now=now + STEP_SECONDS)
        end = time.perf_counter()
        for turn in turns:
            for sequence in turn.outputs:
                sequence.token_ids.append(5)
        if step >= NUM_WARM_UP_STEPS:
            schedules.append(between - start)
            commits.append(end - between)
    return float(np.median(schedules)), float(np.median(commits))


if __name__ == "__main__":
    main()
