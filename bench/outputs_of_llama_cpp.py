"""Outputs of llama.cpp at every position of a text, in float32: a JSON line in, a .npy file out.

Runs in an interpreter that has cyllama. Of an encoder the vectors of tokens [tokens, width], else logits
[tokens, vocab]; an encoder-decoder writes the text that it reads.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from cyllama.llama import llama_cpp

_F32 = 0  # enum ggml_type


class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
    """With an attribute that version 0.2.18 reads and lacks."""

    @property
    def n_vocab(self) -> int:
        return int(self.get_vocab().n_vocab)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    token_ids, is_encoder = job["token_ids"], job["kind"] == "encoder"
    llama_cpp.disable_logging()
    llama_cpp.llama_backend_init()
    model_params, params = llama_cpp.LlamaModelParams(), llama_cpp.LlamaContextParams()
    model_params.n_gpu_layers = 0
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(token_ids))
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = _F32
    params.flash_attn_type = 0
    if is_encoder:
        params.embeddings, params.pooling_type = True, 0
    context = llama_cpp.LlamaContext(Model(job["model"], model_params, verbose=False), params, verbose=False)
    if job["kind"] != "decoder":
        context.encode(batch_of(token_ids))
    if not is_encoder:
        context.decode(batch_of(token_ids))
    read = context.get_embeddings_ith if is_encoder else context.get_logits_ith
    np.save(job["output"], np.asarray([read(index) for index in range(len(token_ids))], np.float32))


def batch_of(token_ids: list[int]) -> llama_cpp.LlamaBatch:
    batch = llama_cpp.LlamaBatch(n_tokens=len(token_ids), embd=0, n_seq_max=1)
    batch.set_batch(token_ids, 0, True)
    return batch


if __name__ == "__main__":
    main()
