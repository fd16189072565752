"""Quantizes a model by the GPTQ of llm-compressor, in an interpreter that has it: see compress_quality.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="token ids of each sequence, as JSON")
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True, help="0: whole rows")
    quantize(parser.parse_args())


def quantize(arguments: argparse.Namespace) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    sequences = json.loads(arguments.calibration.read_text(encoding="utf-8"))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    weights = QuantizationArgs(
        num_bits=arguments.bits,
        type="int",
        symmetric=True,
        strategy="group" if arguments.group_size else "channel",
        group_size=arguments.group_size or None,
        actorder="static",
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=0.01)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, sequences)),
    )
    model.save_pretrained(arguments.output, save_compressed=arguments.bits in (4, 8))


if __name__ == "__main__":
    main()
