"""OpenVINO GenAI, continuous batching; models are exported by optimum-intel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

_FORMATS = {
    "int8": "int8",
    "auto": "int8",
    "int4": "int4",
    "stored": "int4",
    "bf16": "fp16",
    "f16": "fp16",
    "f32": "fp32",
}
_NAMES = {
    "int8": "int8 per channel, asymmetric",
    "int4": "int4 groups of 64, symmetric; head and embedding int8",
    "fp16": "f16",
    "fp32": "f32",
}


def prepare(job: dict[str, Any], folder: str) -> dict[str, Any]:
    target = Path(folder) / "openvino"
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    command += ["--model", job["model"], "--task", "text-generation-with-past"]
    weight_format = _FORMATS[job["weights"].partition(":")[0]]
    command += ["--weight-format", weight_format]
    if weight_format == "int4":  # as ours: symmetric, groups of 64; head and embedding int8 as by default
        command += ["--group-size", "64", "--sym"]
    subprocess.run([*command, str(target)], check=True, stdout=sys.stderr)
    return {"model": str(target)}


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self.version = openvino_genai.__version__
        self.weights = _NAMES[_FORMATS[job["weights"].partition(":")[0]]]
        self._openvino, self._genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = job["max_sequences"]
        scheduler.max_num_batched_tokens = max(512, job["context_length"])
        # One context of all its tokens, or 32 of 256; blocks hold 32 tokens, the cache is grown as needed.
        tokens = max(job["context_length"], 32 * 256 if job["max_sequences"] > 1 else 0)
        scheduler.num_kv_blocks = tokens // 32 + job["max_sequences"]
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            job["model"], scheduler, "CPU", {"INFERENCE_NUM_THREADS": job["threads"]}
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        import numpy as np

        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        inputs = [self._openvino.Tensor(np.asarray([prompt], np.int64)) for prompt in prompts]
        results = self._pipeline.generate(inputs, [config] * len(prompts))
        return [list(map(int, result.m_generation_ids[0])) for result in results]
