"""Read, check, clean, split, encode and pack labelled data and text.

The simple functions are here, imported on first use; `fastserve prepare` is all of it as one command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.data.augment import AugmentOptions, augment_data, read_synonyms
    from fastserve.data.clean import Cleaner, CleanOptions
    from fastserve.data.disk_rows import DiskRows
    from fastserve.data.encode import encode_data, label_names, open_tokenizer
    from fastserve.data.leak import Leak, check_splits, find_leaks
    from fastserve.data.load import load_data
    from fastserve.data.pack import pack_sequences
    from fastserve.data.preparation import PrepareOptions, Source, prepare
    from fastserve.data.problem import PROBLEM_KINDS, Problem, ProblemLog
    from fastserve.data.read import read_rows
    from fastserve.data.reader.option import ReadOptions
    from fastserve.data.row import TASKS, Row
    from fastserve.data.split import SplitOptions, split_data
    from fastserve.data.tag_scheme import convert_tags, detect_scheme
    from fastserve.data.tokenizer_training import save_tokenizer, train_tokenizer
    from fastserve.data.vocabulary import Vocabulary, create_vocab

__all__ = [
    "PROBLEM_KINDS",
    "TASKS",
    "AugmentOptions",
    "CleanOptions",
    "Cleaner",
    "DiskRows",
    "Leak",
    "PrepareOptions",
    "Problem",
    "ProblemLog",
    "ReadOptions",
    "Row",
    "Source",
    "SplitOptions",
    "Vocabulary",
    "augment_data",
    "check_splits",
    "convert_tags",
    "create_vocab",
    "detect_scheme",
    "encode_data",
    "find_leaks",
    "label_names",
    "load_data",
    "open_tokenizer",
    "pack_sequences",
    "prepare",
    "read_rows",
    "read_synonyms",
    "save_tokenizer",
    "split_data",
    "train_tokenizer",
]

_EXPORTS = {
    **dict.fromkeys(("AugmentOptions", "augment_data", "read_synonyms"), "fastserve.data.augment"),
    **dict.fromkeys(("CleanOptions", "Cleaner"), "fastserve.data.clean"),
    "DiskRows": "fastserve.data.disk_rows",
    **dict.fromkeys(("encode_data", "label_names", "open_tokenizer"), "fastserve.data.encode"),
    **dict.fromkeys(("Leak", "check_splits", "find_leaks"), "fastserve.data.leak"),
    "load_data": "fastserve.data.load",
    "pack_sequences": "fastserve.data.pack",
    **dict.fromkeys(("PROBLEM_KINDS", "Problem", "ProblemLog"), "fastserve.data.problem"),
    **dict.fromkeys(("PrepareOptions", "Source", "prepare"), "fastserve.data.preparation"),
    "ReadOptions": "fastserve.data.reader.option",
    "read_rows": "fastserve.data.read",
    **dict.fromkeys(("TASKS", "Row"), "fastserve.data.row"),
    **dict.fromkeys(("SplitOptions", "split_data"), "fastserve.data.split"),
    **dict.fromkeys(("convert_tags", "detect_scheme"), "fastserve.data.tag_scheme"),
    **dict.fromkeys(("save_tokenizer", "train_tokenizer"), "fastserve.data.tokenizer_training"),
    **dict.fromkeys(("Vocabulary", "create_vocab"), "fastserve.data.vocabulary"),
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastserve.data' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
