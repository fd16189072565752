"""FastServe itself."""

from __future__ import annotations

from typing import Any

from fastserve._version import __version__
from fastserve.engine.llm import LLM
from fastserve.types import Float32Array, SamplingParams

OPTIONS = (
    "weights",
    "threads",
    "context_length",
    "max_sequences",
    "kv_memory",
    "kv_spill",
    "spill_dir",
)


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        self.version = __version__
        options = {name: job[name] for name in OPTIONS if name in job}
        self._llm = LLM(job["model"], offline=True, prefix_cache="off", **options)
        self.weights = job["weights"]

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        completions = self._llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        return [list(completion.token_ids) for completion in completions]

    def embed(self, texts: list[list[int]]) -> list[Float32Array]:
        from fastserve.engine.encoder import Encoder, EncoderInput

        encoder = Encoder(self._llm.model.executable, self._llm.model.settings.head)
        return [row.reshape(-1) for row in encoder.run_all([EncoderInput(text) for text in texts])]

    def cost(self, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
        """What the calls of a run did, by op and shape; `max_tokens` 0 embeds."""
        from dataclasses import asdict

        from fastserve.backends.native.executable import NativeExecutable

        executable = self._llm.model.executable
        assert isinstance(executable, NativeExecutable)
        with executable.profiling() as calls:
            if max_tokens:
                self.generate(prompts, max_tokens)
            else:
                self.embed(prompts)
        return [asdict(call) for call in calls]
