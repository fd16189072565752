"""What a step's turns never do, whatever the policy; that they keep the limits of a step FakeExecutable
asserts."""

from __future__ import annotations

from fake_executable import make_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.policy import POLICY_NAMES
from fastserve.types import SamplingParams

REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 60),  # tokens of the prompt
        st.integers(1, 12),  # of the completion
        st.integers(0, 30),  # the step before which it comes
        st.sampled_from("ab"),  # tenant
        st.sampled_from(["interactive", "standard"]),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(requests=REQUESTS, policy=st.sampled_from(POLICY_NAMES))
def test_where_there_are_rows_and_blocks_for_all_no_prompt_takes_a_row_from_one_that_decodes(
    requests, policy
) -> None:
    options = ScheduleOptions(policy=policy, target_gap_seconds=0.01)
    engine = make_engine(options=options, max_tokens=24, num_blocks=512)
    for step in range(400):
        for prompt, completion, arrival, tenant, priority_class in requests:
            if arrival == step:
                params = SamplingParams(max_tokens=completion)
                token_ids = [(step + n) % 90 for n in range(prompt)]
                engine.add(token_ids, params, tenant=tenant, priority_class=priority_class)
        decodes = {s: s.num_completion_tokens for s in engine.scheduler.sequences if s.num_completion_tokens}
        engine.step()
        assert all(s.num_completion_tokens == before + 1 for s, before in decodes.items())
        if step > 30 and not engine.has_work:
            return
    raise AssertionError("a sequence is stuck")
