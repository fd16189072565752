"""One timed run of FastServe for decode_against_llama_cpp.py: reads a job as JSON, writes its rates."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from fastserve import LLM, SamplingParams


def run_prefill(llm: LLM, prompt_ids: list[int]) -> dict[str, Any]:
    start = time.perf_counter()
    llm.generate(prompt_ids, SamplingParams(max_tokens=1))
    return {"tokens_per_second": len(prompt_ids) / (time.perf_counter() - start)}


def run_decode(llm: LLM, prompt_ids: list[int], num_tokens: int) -> dict[str, Any]:
    """The rate from the first token to the last."""
    arrivals, token_ids = [], []
    for chunk in llm.stream(prompt_ids, SamplingParams(max_tokens=num_tokens, ignore_eos=True)):
        arrivals.append(time.perf_counter())
        token_ids.append(chunk.token_id)
    rate = (num_tokens - 1) / (arrivals[-1] - arrivals[0])
    return {"tokens_per_second": rate, "token_ids": token_ids}


def main() -> None:
    job = json.load(sys.stdin)
    with LLM(
        job["model"],
        weights="int8",
        threads=job["threads"],
        context_length=job["context_length"],
        prefix_cache="off",
    ) as llm:
        llm.generate(job["prompt_ids"], SamplingParams(max_tokens=4))  # warms up
        if job["task"] == "prefill":
            result = run_prefill(llm, job["prompt_ids"])
        else:
            result = run_decode(llm, job["prompt_ids"], job["num_tokens"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
