"""vLLM's CPU build: bfloat16, float32 where that is asked for, W8A8 where the model's folder has it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        # Read when vLLM is imported.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{job['threads'] - 1}")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import vllm

        self.version = vllm.__version__
        self.weights = "f32" if job["weights"] == "f32" else "bf16"
        if "quantization_config" in json.loads((Path(job["model"]) / "config.json").read_text()):
            self.weights = "int8 per channel (W8A8); head and embedding bf16"
        self._vllm = vllm
        self._llm = vllm.LLM(
            model=job["model"],
            dtype="float32" if job["weights"] == "f32" else "bfloat16",
            max_model_len=job["context_length"],
            max_num_seqs=job["max_sequences"],
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=max_tokens, min_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
