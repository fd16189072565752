"""Writes the performance tables of the documents from the results in `results/kernels/`."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "bench" / "results" / "kernels"
NOT_MEASURED = "Not measured yet: `make bench-peers`."

MODELS = {
    "llama-3.2-1b": "Llama-3.2-1B shape",
    "smollm2-135m": "SmolLM2-135M",
    "minilm": "MiniLM",
    "bert-base": "BERT-base shape",
}
MEASURES = {
    "decode_1_tokens_per_second": "decode, tokens/s",
    "prefill_512_tokens_per_second": "prefill 512, tokens/s",
    "batch_32_tokens_per_second": "32 at once, tokens/s",
    "equal_32_sentences_per_second": "32 equal sentences, sentences/s",
    "ragged_32_sentences_per_second": "32 ragged sentences, sentences/s",
}
SHARES = {
    "decode_1_share_of_bandwidth": "decode, share of read bandwidth",
    "prefill_512_share_of_int8_peak": "prefill 512, share of int8 peak",
}
# What issue 3 asks for: ratios to the best peer at their lower bound, shares of the limits.
RATIO_TARGETS: Mapping[str, Mapping[str, float]] = {
    "llama-3.2-1b-int8": {"decode_1": 1.0, "prefill_512": 1.2, "batch_32": 1.7},
    "llama-3.2-1b-int4": {"decode_1": 1.15, "prefill_512": 1.2, "batch_32": 1.7},
    "smollm2-135m-int8": {"decode_1": 1.7, "prefill_512": 1.1, "batch_32": 1.7},
    "smollm2-135m-int4": {"decode_1": 1.7, "prefill_512": 1.1, "batch_32": 1.7},
    "minilm-int8": {"equal_32": 1.2, "ragged_32": 1.5},
    "bert-base-int8": {"equal_32": 1.2, "ragged_32": 1.5},
}
SHARE_TARGETS: Mapping[str, Mapping[str, float]] = {
    "llama-3.2-1b-int8": {"decode_1": 0.85, "prefill_512": 0.65},
    "llama-3.2-1b-int4": {"decode_1": 0.85, "prefill_512": 0.55},
}
START_TARGET_SECONDS = 1.0  # of SmolLM2
# Of linears alone: by weights and rows, the share that counts, over the shapes of the 1B model by their time.
KERNEL_TARGETS = {
    ("int8", 1): ("share_of_read", 0.85),
    ("int8", 32): ("share_of_operations", 0.60),
    ("int8", 512): ("share_of_operations", 0.80),
    ("int4", 512): ("share_of_operations", 0.70),
}
SPARSITY_TARGETS = {"int8": 1.4, "int4": 1.2}  # half of the weights zero, one row
KL_TARGET = 0.01  # of int8 to float32, SmolLM2
EXCESS_TARGET = 0.05  # beyond the CPU that a busy neighbour takes

CHINESE = {
    "model": "模型",
    "weights": "权重",
    "best peer": "最好的同类",
    "times as fast": "速度之比",
    "decode, tokens/s": "解码，词元/秒",
    "prefill 512, tokens/s": "预填充 512，词元/秒",
    "32 at once, tokens/s": "同时 32 个请求，词元/秒",
    "32 equal sentences, sentences/s": "32 个等长句子，句/秒",
    "32 ragged sentences, sentences/s": "32 个长短不一的句子，句/秒",
    "start to first token, s": "启动到首个词元，秒",
    "peak memory, MB": "内存峰值，MB",
}

BATCH = "-batch"  # ends the names of documents that have only many requests at once

Document = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if a table is stale"
    )
    is_checking = parser.parse_args().check
    documents = read_results(RESULTS)
    performance = performance_table(documents)
    tables = {
        "performance": performance,
        "performance-zh": to_chinese(performance),
        "targets": target_table(documents),
    }
    stale = False
    for path in (CHECKOUT / name for name in ("README.md", "README.zh-CN.md", "bench/README.md")):
        text = path.read_text(encoding="utf-8")
        updated = insert(text, tables)
        stale |= updated != text
        if not is_checking:
            path.write_text(updated, encoding="utf-8")
    if is_checking and stale:
        sys.exit("the tables differ from the results; run python bench/performance_table.py")


def read_results(folder: Path) -> dict[str, Document]:
    """The results by the names of their files, models last, in the order of MODELS."""
    names = ["kernels", "sparsity", "quality", "busy_neighbour"]
    for model in MODELS:
        for weights in ("int8", "int4"):
            names += [f"{model}-{weights}", f"{model}-{weights}{BATCH}"]
    paths = {name: folder / f"{name}.json" for name in names}
    return {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()
    }


def insert(text: str, tables: Mapping[str, str]) -> str:
    """The text with what is between `<!-- table NAME -->` and `<!-- end of table -->` replaced."""
    for name, table in tables.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end of table -->)"
        text = re.sub(
            pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL
        )
    return text


def performance_table(documents: Mapping[str, Document]) -> str:
    """For readers: every measure beside the best peer's."""
    header = ("model", "weights", "", "FastServe", "best peer", "times as fast")
    rows = []
    for name, results in model_results(documents).items():
        for measure, label in MEASURES.items():
            if measure in results:
                peer = best_peer(results, measure)
                ratio = results["peers"][peer]["ratios"][measure] if peer else None
                theirs = f"{peer} {number(results['peers'][peer][measure])}" if peer else ""
                rows.append(
                    [*title(name), label, number(results[measure]), theirs, interval(ratio) if ratio else ""]
                )
        rows += [[*title(name), *cells, ""] for cells in resource_rows(results)]
    return to_markdown(header, rows) if rows else NOT_MEASURED


def resource_rows(results: Document) -> Iterator[Sequence[str]]:
    """Start and memory, ours and the least of the peers'."""
    labels = {
        "start_to_first_token_seconds": "start to first token, s",
        "peak_memory_bytes": "peak memory, MB",
    }
    for key, label in labels.items():
        scale = 1e6 if key.endswith("bytes") else 1
        peers = {peer: speed[key] for peer, speed in results["peers"].items()}
        least = min(peers, key=peers.__getitem__, default=None)
        theirs = f"{least} {number(peers[least] / scale)}" if least else ""
        yield label, number(results[key] / scale), theirs


def to_chinese(table: str) -> str:
    """For README.zh-CN.md. Names of models, formats and peers stay as they are."""
    for english, chinese in CHINESE.items():
        table = table.replace(f"| {english} |", f"| {chinese} |")
    return table


def target_table(documents: Mapping[str, Document]) -> str:
    """Everything that has a target, with whether it is met."""
    header = ("model", "weights", "", "target", "measured", "met")
    rows = list(kernel_rows(documents))
    for name, results in model_results(documents).items():
        for prefix, target in SHARE_TARGETS.get(name, {}).items():
            measure = next(key for key in SHARES if key.startswith(prefix))
            if measure in results:
                share = results[measure]
                rows.append(
                    [*title(name), SHARES[measure], f"≥ {target:.0%}", f"{share:.1%}", met(share >= target)]
                )
        for prefix, target in RATIO_TARGETS.get(name, {}).items():
            measure = next(key for key in MEASURES if key.startswith(prefix))
            peer = best_peer(results, measure) if measure in results else None
            if peer:
                ratio = results["peers"][peer]["ratios"][measure]
                cells = [f"{MEASURES[measure]} against {peer}", f"≥ {target}", interval(ratio)]
                rows.append([*title(name), *cells, met(ratio["low"] >= target)])
        memory = results["peak_memory_bytes"]
        least = min((speed["peak_memory_bytes"] for speed in results["peers"].values()), default=None)
        if least and name in RATIO_TARGETS:
            cells = ["peak memory, MB", f"< {number(least / 1e6)}", number(memory / 1e6)]
            rows.append([*title(name), *cells, met(memory < least)])
        if name == "smollm2-135m-int8":
            seconds = results["start_to_first_token_seconds"]
            cells = ["start to first token, s", f"≤ {START_TARGET_SECONDS}", number(seconds)]
            rows.append([*title(name), *cells, met(seconds <= START_TARGET_SECONDS)])
    return to_markdown(header, rows) if rows else NOT_MEASURED


def model_results(documents: Mapping[str, Document]) -> dict[str, Document]:
    """Of the documents of models, what was measured; with what a document of their batches adds."""
    results = {}
    for name, document in documents.items():
        if name.rpartition("-")[0] in MODELS:
            results[name] = document["results"]
            if f"{name}{BATCH}" in documents:
                results[name] = _add_batch(results[name], documents[f"{name}{BATCH}"]["results"])
    return results


def _add_batch(results: Document, batch: Document) -> Document:
    measures = [measure for measure in MEASURES if measure in batch]
    peers = dict(results["peers"])
    for name, speed in batch["peers"].items():
        known = peers.get(name, {**speed, "runs": {}, "ratios": {}})
        peers[name] = {
            **known,
            **{measure: speed[measure] for measure in measures},
            "runs": {**known["runs"], **speed["runs"]},
            "ratios": {**known["ratios"], **speed["ratios"]},
        }
    return {**results, **{measure: batch[measure] for measure in measures}, "peers": peers}


def kernel_rows(documents: Mapping[str, Document]) -> Iterator[list[str]]:
    """What has a target and is of no whole model."""
    results = {name: document["results"] for name, document in documents.items()}
    for (weights, num_rows), (share_name, target) in KERNEL_TARGETS.items() if "kernels" in results else ():
        share = mean_share(results["kernels"]["kernels"], weights, num_rows, share_name)
        label = f"linear alone, {num_rows} rows, {share_name.replace('_', ' ')} limit"
        yield [
            MODELS["llama-3.2-1b"],
            weights,
            label,
            f"≥ {target:.0%}",
            f"{share:.1%}",
            met(share >= target),
        ]
    for weights, target in SPARSITY_TARGETS.items() if "sparsity" in results else ():
        speed = results["sparsity"]["speed_by_format_zeros_storage_rows"][weights]["0.5"]["bitmask"]["1"]
        label = "half of the weights zero, against dense"
        yield ["a linear", weights, label, f"≥ {target}", f"{speed:.2f}", met(speed >= target)]
    if "quality" in results:
        divergence = results["quality"]["int8"]["mean_kl"]
        cells = ["mean KL to float32, wikitext-2", f"≤ {KL_TARGET}", f"{divergence:.4f}"]
        yield [MODELS["smollm2-135m"], "int8", *cells, met(divergence <= KL_TARGET)]
    for what, estimates in results.get("busy_neighbour", {}).items():
        excess = estimates["excess"]
        label = f"{what}, beyond the CPU that it takes"
        cells = [
            f"≤ {EXCESS_TARGET:.0%}",
            f"{excess['median']:+.1%} [{excess['low']:+.1%}, {excess['high']:+.1%}]",
        ]
        model = MODELS["minilm" if what.startswith("sentences") else "smollm2-135m"]
        yield [model, "int8", label, *cells, met(excess["median"] <= EXCESS_TARGET)]


def mean_share(kernels: Sequence[Document], weights: str, num_rows: int, share: str) -> float:
    """Over shapes, weighted by the time that each takes."""
    linears = [k for k in kernels if k["op"] == "linear" and (k["weights"], k["rows"]) == (weights, num_rows)]
    return sum(k[share] * k["seconds"] for k in linears) / sum(k["seconds"] for k in linears)


def best_peer(results: Document, measure: str) -> str | None:
    """The peer with the highest median."""
    medians = {
        name: statistics.median(speed["runs"][measure])
        for name, speed in results["peers"].items()
        if measure in speed["runs"]
    }
    return max(medians, key=medians.__getitem__, default=None)


def title(name: str) -> list[str]:
    model, _, weights = name.rpartition("-")
    return [MODELS[model], weights]


def interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def number(value: float) -> str:
    """Three figures, or all before the point.

    >>> number(1234.56), number(12.345), number(0.4567)
    ('1,235', '12.3', '0.457')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def met(is_met: bool) -> str:
    return "yes" if is_met else "**no**"


def to_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
