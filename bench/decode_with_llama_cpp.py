"""One timed run of llama.cpp for decode_against_llama_cpp.py: reads a job as JSON, writes its rates.

Runs in an interpreter that has llama-cpp-python, and calls the C library without the layers above it.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp


class Session:
    """A model with a context; batch size, threads and KV as for our own run."""

    def __init__(self, job: dict[str, Any]) -> None:
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = job["repacks_weights"]
        model = llama_cpp.llama_model_load_from_file(job["model"].encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = job["context_length"]
        params.n_threads = params.n_threads_batch = job["threads"]
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def step(self, token_ids: list[int]) -> int:
        """Append tokens; the likeliest next one."""
        tokens = (llama_cpp.llama_token * len(token_ids))(*token_ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(token_ids))
        if llama_cpp.llama_decode(self._context, batch) != 0:
            sys.exit("llama.cpp cannot run the batch")
        return int(llama_cpp.llama_sampler_sample(self._sampler, self._context, -1))


def run_prefill(session: Session, prompt_ids: list[int]) -> dict[str, Any]:
    session.step(prompt_ids)  # warms up
    session.clear()
    start = time.perf_counter()
    session.step(prompt_ids)
    return {"tokens_per_second": len(prompt_ids) / (time.perf_counter() - start)}


def run_decode(session: Session, prompt_ids: list[int], num_tokens: int) -> dict[str, Any]:
    """The rate from the first token to the last. The prompt, which is not timed, goes in token by token."""
    next_id = [session.step([token_id]) for token_id in prompt_ids][-1]
    token_ids = [next_id]
    start = time.perf_counter()
    for _ in range(num_tokens - 1):
        next_id = session.step([next_id])
        token_ids.append(next_id)
    rate = (num_tokens - 1) / (time.perf_counter() - start)
    return {"tokens_per_second": rate, "token_ids": token_ids}


def quantize(model: str, target: str) -> dict[str, Any]:
    """Write a model as Q8_0."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(model.encode(), target.encode(), ctypes.byref(params)) != 0:
        sys.exit(f"llama.cpp cannot quantize {model}")
    features = llama_cpp.llama_print_system_info().decode().strip(" |")
    return {"llama_cpp_python": llama_cpp.__version__, "features": features}


def main() -> None:
    silence = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silence, None)
    job = json.load(sys.stdin)
    if job["task"] == "quantize":
        result = quantize(job["model"], job["target"])
    elif job["task"] == "prefill":
        result = run_prefill(Session(job), job["prompt_ids"])
    else:
        result = run_decode(Session(job), job["prompt_ids"], job["num_tokens"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
