"""From a pretrained encoder to a small archive that serves: tuned, pruned, int8, archived.

    python examples/compress_minilm.py --train train.jsonl --dev dev.jsonl --output my-archive
    python examples/compress_minilm.py --rows 16 --epochs 1      # on sentences that it makes up

Files hold rows such as {"text": "a fine film", "label": "positive"}. Needs fastserve-llm[compress].
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from fastserve.compress import CompressData, compress
from fastserve.compress.report import report_rows
from fastserve.tune import TuneOptions, tune

RECIPE = """
description: 60 %% of the weights zero, by SparseGPT on the training texts; then int8, embeddings too
calibration: {sequences: %d, length: 64}
steps:
  - sparsegpt: {sparsity: 0.6}
  - rtn: {bits: 8, targets: {tables: true}}
"""
GOOD, BAD = ("a fine film", "moving and funny", "a joy"), ("a dull film", "slow and cold", "a bore")


def made_up_rows(folder: Path, name: str, numbers: range) -> Path:
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in numbers:
            text, label = ((GOOD, "positive"), (BAD, "negative"))[i % 2]
            file.write(json.dumps({"text": f"{text[i // 2 % 3]}, {i}", "label": label}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="to make up, where no file is given")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = given.train or made_up_rows(folder, "train", range(given.rows))
        dev = given.dev or made_up_rows(folder, "dev", range(given.rows, given.rows + 12))
        options = TuneOptions(epochs=given.epochs, metric="accuracy", max_length=64)
        tuned = folder / "tuned"
        tune("text-classification", model=given.model, train=train, dev=dev, output=tuned, options=options)

        recipe = folder / "sparse60-int8.yaml"
        recipe.write_text(RECIPE % min(given.rows, 128), encoding="utf-8")
        archive = given.output or folder / "archive"
        result = compress(
            tuned,
            recipe=recipe,
            output=archive,
            data=CompressData(calibration=train, judged=dev),
            archive=True,
        )
        for row in report_rows(result.report):
            print(" | ".join(row))
        for text, label in ask_served(archive, ["what a joy to watch", "slow, cold and dull"]).items():
            print(f"{text}: {label}")


def ask_served(model: Path, texts: list[str]) -> dict[str, str]:
    """The labels that a server of the model gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastserve.cli.main", "serve", str(model), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health/ready", server)
        body = json.dumps({"model": model.name, "input": texts}).encode()
        request = Request(f"http://127.0.0.1:{port}/v1/classify", body, {"content-type": "application/json"})
        with urlopen(request) as answer:
            data = json.load(answer)["data"]
    finally:
        server.terminate()
        server.wait()
    return {text: found["label"] for text, found in zip(texts, data, strict=True)}


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urlopen(url).close()
        except URLError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the server ended with exit code {server.returncode}")


if __name__ == "__main__":
    main()
