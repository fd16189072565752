"""llama.cpp through llama-cpp-python, of which it uses the C library's own functions."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp

# As many bits as ours; head and embedding too.
_FILE_TYPES = {"int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
_FILE_TYPES |= {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16}
_FILE_TYPES |= {"f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "auto": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
_NAMES = {"int8": "Q8_0", "auto": "Q8_0", "int4": "Q4_0, head and embedding Q8_0"}
_SMALL_BATCH = 32  # its repacked kernels for several rows run from 4 rows on


def prepare(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Quantize the model, and see whether the kernels for repacked weights run here: matrix units that a
    virtual machine announces but does not have crash them in batches."""
    target = job["model"]
    if job["weights"] != "stored":
        target = str(Path(folder) / "quantized.gguf")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = _FILE_TYPES[job["weights"].partition(":")[0]]
        params.allow_requantize = True
        if job["weights"].startswith("int4"):  # as ours: head and embedding int8
            params.output_tensor_type = params.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
        if llama_cpp.llama_model_quantize(job["model"].encode(), target.encode(), ctypes.byref(params)) != 0:
            sys.exit(f"llama.cpp cannot quantize {job['model']}")
    changed = {**job, "model": target}
    trial = subprocess.run([sys.executable, __file__], input=json.dumps(changed), text=True, check=False)
    return {"model": target, "repacks_batches": trial.returncode >= 0}


class Engine:
    """Where kernels for repacked weights crash in batches, prompts and batches run without them, and only the
    decoding of one prompt, which they make faster, runs with them, its prompt token by token."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.version = llama_cpp.__version__
        self.weights = _NAMES.get(job["weights"].partition(":")[0], job["weights"])
        self._repacks_batches = job["repacks_batches"]
        self._job = job
        self._sessions: dict[bool, Session] = {}
        self._session(repacks=True)

    def _session(self, *, repacks: bool) -> Session:
        if repacks not in self._sessions:
            for other in self._sessions.values():  # two at once would count twice in the peak of memory
                other.close()
            self._sessions.clear()
            self._sessions[repacks] = Session(self._job, repacks_weights=repacks)
        return self._sessions[repacks]

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        if self._repacks_batches:
            return self._session(repacks=True).generate(prompts, max_tokens)
        is_decoding = len(prompts) == 1 and len(prompts[0]) < _SMALL_BATCH
        if is_decoding:
            return self._session(repacks=True).generate(prompts, max_tokens, rows_per_step=1)
        return self._session(repacks=False).generate(prompts, max_tokens)


class Session:
    def __init__(self, job: dict[str, Any], *, repacks_weights: bool) -> None:
        self._num_sequences = job["max_sequences"]
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = repacks_weights
        model = llama_cpp.llama_model_load_from_file(job["model"].encode(), model_params)
        if not model:
            sys.exit(f"llama.cpp cannot load {job['model']}")
        params = llama_cpp.llama_context_default_params()
        # Sequences share the context: enough for one of all its tokens, or for 32 of 256.
        params.n_ctx = max(job["context_length"], 32 * 256 if self._num_sequences > 1 else 0)
        params.n_batch, params.n_ubatch = params.n_ctx, 512
        params.n_seq_max = self._num_sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = job["threads"]
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._batch_tokens = params.n_batch
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self._model = model

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_sampler_free(self._sampler)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def generate(
        self, prompts: list[list[int]], max_tokens: int, rows_per_step: int | None = None
    ) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        rows = [
            (token_id, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token_id in enumerate(prompt)
        ]
        step = rows_per_step or self._batch_tokens
        next_ids: list[int] = []
        for start in range(0, len(rows), step):
            next_ids += self._step(rows[start : start + step])
        completions = [[token_id] for token_id in next_ids]
        for index in range(1, max_tokens):
            rows = [
                (completion[-1], len(prompts[sequence]) + index - 1, sequence, True)
                for sequence, completion in enumerate(completions)
            ]
            for completion, token_id in zip(completions, self._step(rows), strict=True):
                completion.append(token_id)
        return completions

    def _step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run rows of token id, position, sequence and whether a token is wanted; the likeliest ones."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token_id, position, sequence, is_wanted) in enumerate(rows):
            batch.token[index] = token_id
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = is_wanted
        if llama_cpp.llama_decode(self._context, batch) != 0:
            sys.exit("llama.cpp cannot run the batch")
        wanted = [index for index, row in enumerate(rows) if row[3]]
        return [self._likeliest(index) for index in wanted]

    def _likeliest(self, index: int) -> int:
        return int(llama_cpp.llama_sampler_sample(self._sampler, self._context, index))


if __name__ == "__main__":  # the trial of `prepare`
    Session(json.load(sys.stdin), repacks_weights=True).generate([[1] * _SMALL_BATCH], 1)
