"""Logits at every position of a text by llama.cpp: a JSON line with model and token ids in, a .npy file out.

Runs in an interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def main() -> None:
    job = json.loads(sys.stdin.readline())
    model = llama_cpp.Llama(
        job["model"], n_ctx=len(job["token_ids"]), logits_all=True, verbose=False, n_threads=job["threads"]
    )
    model.eval(job["token_ids"])
    np.save(job["output"], np.asarray(model.scores[: len(job["token_ids"])], np.float32))


if __name__ == "__main__":
    main()
