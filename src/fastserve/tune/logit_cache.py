"""A teacher's logits of all training examples, in a file: computed part by part, so that what was computed
before a run was interrupted is not computed again, and several processes can share the parts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastserve.errors import OptionError
from fastserve.evaluate.task.collate import example_length
from fastserve.evaluate.task.task import Features
from fastserve.evaluate.torch_model import run_examples
from fastserve.types import Float32Array

_MOST_CACHED_BYTES = 4 * 2**30  # of outputs on disk; more (vocabularies of long texts) are computed each time
_EXAMPLES_OF_A_PART = 256
_BATCH_SIZE = 32
_SECONDS_TO_LOOK_AGAIN = 0.1


class LogitCache:
    """A teacher's logits of all training examples, in a file."""

    def __init__(self, values: Float32Array, shapes: Seq[Seq[int]], *, is_per_token: bool) -> None:
        self._values, self._shapes, self._is_per_token = values, shapes, is_per_token
        self._starts = np.concatenate([[0], np.cumsum([int(np.prod(shape)) for shape in shapes])])

    def batch(self, examples: Seq[int], *, num_tokens: int) -> Float32Array:
        """Of some examples, those of tokens padded with zeros to `num_tokens`."""
        found = [self._of(int(index)) for index in examples]
        if not self._is_per_token:
            return np.stack(found)
        padded = np.zeros((len(found), num_tokens, found[0].shape[-1]), np.float32)
        for row, values in enumerate(found):
            padded[row, : len(values)] = values
        return padded

    def _of(self, index: int) -> Float32Array:
        start, shape = self._starts[index], self._shapes[index]
        return self._values[start : start + int(np.prod(shape))].reshape(shape)


@dataclass(frozen=True, slots=True)
class Parts:
    """Files that are put together to a cache: part `number` is of examples `number` x 256 and the following,
    whoever computes it, so that what is in it does not depend on that."""

    folder: Path
    num_examples: int

    def __len__(self) -> int:
        return -(-self.num_examples // _EXAMPLES_OF_A_PART)

    def examples(self, number: int) -> slice:
        start = number * _EXAMPLES_OF_A_PART
        return slice(start, min(start + _EXAMPLES_OF_A_PART, self.num_examples))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06}.npz"

    def missing(self) -> list[int]:
        return [number for number in range(len(self)) if not self.path(number).is_file()]


Compute = Callable[[Parts, Seq[int]], None]
"""Has the parts of these numbers written."""


def keep_logits(
    model: Any,
    features: Seq[Features],
    folder: Path,
    *,
    pad_token_id: int,
    compute: Compute | None = None,
    is_first: bool = True,
) -> LogitCache | None:
    """The logits of a model on examples, from a file in `folder`, of which what is not there yet is computed.
    None where it would be too large for a disk.

    Args:
        compute: the missing parts; None: in this process.
        is_first: of the processes that train. The others wait for it.

    Raises:
        OptionError: `compute` is given, and the file would be too large.
    """
    is_per_token, num_bytes = _form(model, features, pad_token_id)
    if num_bytes > _MOST_CACHED_BYTES:
        if compute is None:
            return None
        raise OptionError(
            f"teacher_processes: outputs of {num_bytes / 2**30:.1f} GiB are not kept on the disk, where"
            f" {_MOST_CACHED_BYTES / 2**30:.0f} GiB may be",
            hint="leave it out: the teacher is asked batch by batch then",
            option="teacher_processes",
        )
    about = folder / f"{_digest(model, features)}.json"
    while not (about.is_file() or is_first):
        time.sleep(_SECONDS_TO_LOOK_AGAIN)  # if the first process fails, the launcher ends this one
    if not about.is_file():
        parts = Parts(about.with_suffix(".parts"), len(features))
        parts.folder.mkdir(parents=True, exist_ok=True)
        if missing := parts.missing():
            if compute is None:
                for number in missing:
                    write_part(model, features[parts.examples(number)], parts.path(number), pad_token_id)
            else:
                compute(parts, missing)
        _join(parts, about)
    told = json.loads(about.read_text(encoding="utf-8"))
    values = np.memmap(about.with_suffix(".f32"), np.float32, "r")
    return LogitCache(values, told["shapes"], is_per_token=is_per_token)


def write_part(model: Any, features: Seq[Features], path: Path, pad_token_id: int) -> None:
    """Compute the logits of some examples, and write them to a file, which appears whole."""
    logits, _ = run_examples(
        model, without_labels(features), pad_token_id=pad_token_id, batch_size=_BATCH_SIZE
    )
    written = path.with_name(f"{path.name}.part{os.getpid()}")
    with written.open("wb") as file:
        values = np.concatenate([each.ravel() for each in logits])
        np.savez(file, values=values, shapes=np.asarray([each.shape for each in logits], np.int64))
    os.replace(written, path)


def without_labels(features: Seq[Features]) -> list[Features]:
    """What a model reads of examples."""
    return [{name: value for name, value in one.items() if name != "labels"} for one in features]


def _form(model: Any, features: Seq[Features], pad_token_id: int) -> tuple[bool, float]:
    """Whether logits are of tokens, and about how many bytes those of all examples take."""
    (sample,), _ = run_examples(model, without_labels(features[:1]), pad_token_id=pad_token_id, batch_size=1)
    lengths = [example_length(example) for example in features]
    has_lists = isinstance(features[0]["input_ids"][0], list)  # pairs, choices
    is_per_token = sample.ndim == 2 and len(sample) == lengths[0] and not has_lists
    num_rows = sum(lengths) / lengths[0] if is_per_token else len(features)
    return is_per_token, sample.nbytes * num_rows


def _join(parts: Parts, about: Path) -> None:
    """Put parts together in their order, and remove them."""
    shapes: list[list[int]] = []
    written = about.with_suffix(".f32.part")
    with written.open("wb") as file:
        for number in range(len(parts)):
            with np.load(parts.path(number), allow_pickle=False) as part:
                shapes += part["shapes"].tolist()
                file.write(part["values"].tobytes())
    os.replace(written, about.with_suffix(".f32"))
    written = about.with_suffix(".json.part")
    written.write_text(json.dumps({"shapes": shapes}), encoding="utf-8")
    os.replace(written, about)
    shutil.rmtree(parts.folder)


def _digest(model: Any, features: Seq[Features]) -> str:
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().data)
    for example in features:
        digest.update(repr(sorted(example.items())).encode())
    return digest.hexdigest()[:24]
