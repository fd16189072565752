"""From files as they come to a set that a model learns from: read, check, clean, leave out, split, write.

Rows lie on disk between the steps, so that memory does not grow with them but for some 20 bytes a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastserve._version import __version__
from fastserve.data.augment import AUGMENTED_TASKS, Augmenter, AugmentOptions
from fastserve.data.card import DataCard, ProblemExamples, SplitStatistics
from fastserve.data.card_page import card_page
from fastserve.data.check import RowChecker
from fastserve.data.clean import Cleaner, CleanOptions
from fastserve.data.digest import id_key
from fastserve.data.disk_rows import DiskRows, to_json_line
from fastserve.data.duplicate import DuplicateSearch
from fastserve.data.encode import find_eos_id, open_tokenizer
from fastserve.data.external_sort import sort_lines
from fastserve.data.leak import knows_labels
from fastserve.data.order import ORDERS, order_key
from fastserve.data.output_folder import replacing_folder
from fastserve.data.pack import PACKINGS, pack_sequences
from fastserve.data.problem import KEEP, PROBLEM_KINDS, Problem, ProblemLog
from fastserve.data.read import PathOrPair, read_rows
from fastserve.data.reader.option import ReadOptions
from fastserve.data.row import Row, check_task, labels_of, texts_of
from fastserve.data.segment import (
    MODEL_TOKENIZER,
    SEGMENTERS,
    Segmenter,
    open_segmenter,
    segment_row,
    tokenizer_segmenter,
)
from fastserve.data.split import SPLITS, SplitOptions, assign_splits
from fastserve.data.spool import Spool
from fastserve.data.tag_repair import TagReader
from fastserve.data.tag_scheme import SCHEMES
from fastserve.data.tokenizer_training import (
    DEFAULT_VOCAB_SIZE,
    TOKENIZER_KINDS,
    save_tokenizer,
    train_tokenizer,
)
from fastserve.data.vocabulary import WordCounter, choose_words, words_of_rows
from fastserve.errors import DataError, OptionError
from fastserve.option import INT64_MAX, check_choice, check_integer, check_number

Progress = Callable[[str, int], None]
"""Told a step and how many rows it has done."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file, or a pair of parallel text; `label` is that of all its rows, where it has one class."""

    path: PathOrPair
    label: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(map(Path, self.path if isinstance(self.path, tuple) else (self.path,)))

    @property
    def name(self) -> str:
        return " + ".join(map(str, self.files))


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What `prepare` does.

    Attributes:
        task: one of `fastserve.data.TASKS`.
        read, clean, split: how files are read, rows cleaned, splits made.
        labels: all labels that there may be; None takes those that come.
        tags_in, tag_scheme: the scheme that tags are in (None: told by them), and the one they get.
        near_duplicates: from which similarity on rows are almost equal, 0 to 1; None does not look.
        segment: how texts are cut into words: `words`, `characters`, `jieba`, `tokenizer`; None leaves them.
        augment: how training rows are varied; None does not.
        order: of the rows written: as they came, at random, by length.
        vocab_size: of the vocabulary, or of the tokenizer that is trained; None makes no vocabulary.
        train_tokenizer: its kind; None trains none.
        tokenizer: a model directory, for `segment` and `pack`.
        pack: the length of packs of tokens; None packs none.
        packing: how.
        on_problem: what to do about problems, by kind.
        memory_bytes: what sorting and grouping may take.

    Raises:
        OptionError: options are out of range or do not go together.
    """

    task: str
    read: ReadOptions = field(default_factory=ReadOptions)
    clean: CleanOptions = field(default_factory=CleanOptions)
    split: SplitOptions = field(default_factory=SplitOptions)
    labels: tuple[str, ...] | None = None
    tags_in: str | None = None
    tag_scheme: str = "iob2"
    near_duplicates: float | None = None
    segment: str | None = None
    augment: AugmentOptions | None = None
    order: str = "input"
    vocab_size: int | None = None
    train_tokenizer: str | None = None
    tokenizer: Path | None = None
    pack: int | None = None
    packing: str = "best-fit"
    on_problem: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int = 2**28

    def __post_init__(self) -> None:
        check_task(self.task)
        check_choice("tag_scheme", self.tag_scheme, SCHEMES)
        if self.tags_in is not None:
            check_choice("tags_in", self.tags_in, SCHEMES)
        if self.near_duplicates is not None:
            check_number("near_duplicates", self.near_duplicates, 0, 1, is_low_open=True)
        if self.segment is not None:
            check_choice("segment", self.segment, (*SEGMENTERS, MODEL_TOKENIZER))
        check_choice("order", self.order, ORDERS)
        check_choice("packing", self.packing, PACKINGS)
        check_integer("memory_bytes", self.memory_bytes, low=2**20, high=INT64_MAX)
        if self.train_tokenizer is not None:
            check_choice("train_tokenizer", self.train_tokenizer, TOKENIZER_KINDS)
        if self.pack is not None:
            check_integer("pack", self.pack, low=2)
        self._check_together()

    def _check_together(self) -> None:
        if self.augment is not None and self.task not in AUGMENTED_TASKS:
            raise OptionError(
                f"{self.task} cannot be augmented",
                hint=f"only {', '.join(AUGMENTED_TASKS)}",
                option="augment",
            )
        needs_tokenizer = self.segment == MODEL_TOKENIZER or (self.pack is not None)
        if needs_tokenizer and self.tokenizer is None and self.train_tokenizer is None:
            raise OptionError(
                "packing and segmenting by a tokenizer need one",
                hint="name a model with --tokenizer, or train one with --train-tokenizer",
                option="tokenizer",
            )
        if self.segment == MODEL_TOKENIZER and self.tokenizer is None:
            raise OptionError(
                "texts are segmented before a tokenizer is trained on them",
                hint="name a model with --tokenizer",
                option="segment",
            )
        if self.pack is not None and self.task != "causal-lm":
            raise OptionError(
                f"{self.task} is not packed: its rows are examples of their own",
                hint="leave --pack out",
                option="pack",
            )
        if self.segment is not None and self.task == "question-answering":
            raise OptionError(
                "answers are told by characters of their context, which segmenting would move",
                hint="leave --segment out",
                option="segment",
            )


def prepare(
    train: Sequence[Source],
    output: Path,
    options: PrepareOptions,
    *,
    dev: Sequence[Source] = (),
    test: Sequence[Source] = (),
    progress: Progress | None = None,
) -> DataCard:
    """Prepare files into a folder: train.jsonl, dev.jsonl, test.jsonl, what else was asked for, and a card.

    Rows of `train` are split by `options.split`; those of `dev` and `test` keep their place. The folder
    appears whole or not at all; one that an earlier `prepare` has written is replaced.

    >>> options = PrepareOptions("text-classification")
    >>> card = prepare([Source("reviews.csv")], Path("data"), options)  # doctest: +SKIP
    >>> card.splits["train"]["rows"]  # doctest: +SKIP
    8000

    Raises:
        DataError: a file is missing or broken; problems are fatal, of which up to 20 are told with file and
            line; nothing is left for training; the folder is there and is not of an earlier `prepare`.
        OptionError: options do not go together.
        UnsupportedError: a library that is needed is not installed.
    """
    with (
        replacing_folder(output, marker="data.json") as written,
        tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".prepare-") as scratch,
    ):
        return _Preparation(options, Path(scratch), written, progress or _ignore).run([train, dev, test])


def _ignore(step: str, num_rows: int) -> None:
    """Progress that nobody asked for."""


class _Preparation:
    def __init__(self, options: PrepareOptions, scratch: Path, output: Path, progress: Progress) -> None:
        self._options = options
        self._scratch = scratch
        self._output = output
        self._progress = progress
        self._examples = ProblemExamples()
        self._log = ProblemLog(options.on_problem, sink=self._note_problem, raises_at_once=False)
        self._checker = RowChecker(options.task, self._log, options.labels)
        self._cleaner = Cleaner(options.clean, self._log)
        self._tag_readers: dict[int, TagReader] = {}
        self._outputs: dict[str, str] = {}
        self._sources: list[dict[str, Any]] = []
        self._new_ids: dict[int, str] = {}
        self._labels: set[str] = set()

    def run(self, sources: Sequence[Sequence[Source]]) -> DataCard:
        with (self._output / "problems.jsonl").open("w", encoding="utf-8") as self._problems:
            spool = self._read(sources)
            with spool.rows(memory_bytes=0) as rows:
                splits, is_kept = self._choose(spool, rows)
                self._log.raise_fatal()
                statistics = self._write_splits(spool, rows, splits, is_kept)
            self._log.raise_fatal()
            if not statistics["train"].num_rows:
                raise DataError("no row is left for training", hint="see what was dropped, and why")
            self._write_extras()
            return self._finish(statistics)

    # Reading

    def _read(self, sources: Sequence[Sequence[Source]]) -> Spool:
        options = self._options
        spool = Spool(self._scratch, options.task, options.split, near_threshold=options.near_duplicates)
        try:
            for split, given in enumerate(sources):
                for source in given:
                    self._read_source(source, split, spool)
        finally:
            spool.close()
        return spool

    def _read_source(self, source: Source, split: int, spool: Spool) -> None:
        options = self._options
        read = dataclasses.replace(options.read, label=source.label)
        file = len(self._sources)
        tags = TagReader(self._log, target=options.tag_scheme, source=options.tags_in)
        self._tag_readers[file] = tags
        num_rows = 0
        rows = read_rows(source.path, options.task, options=read, log=self._log, checker=self._checker)
        for row in rows:
            num_rows += 1
            cleaned = self._cleaner.clean(row)
            if cleaned is not None:
                if "tags" in cleaned:
                    tags.see(cleaned)
                spool.append(cleaned, split=split, file=file)
            if num_rows % 1000 == 0:
                self._progress(f"read {source.name}", num_rows)
        self._sources.append(
            {
                "file": source.name,
                "split": SPLITS[split],
                "rows": num_rows,
                "bytes": sum(path.stat().st_size for path in source.files),
                "sha256": _sha256(source.files),
            }
        )

    # Leaving out, and splitting

    def _choose(self, spool: Spool, rows: DiskRows) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The split of each row, and whether it is kept."""
        options = self._options
        given = spool.column("split")
        search = DuplicateSearch(
            rows, given, self._log, memory_bytes=options.memory_bytes, folder=self._scratch
        )
        ids = spool.column("id")
        if ids.any():
            search.find_equal_ids(ids, self._number_id(rows, ids))
        self._progress("find duplicates", len(rows))
        search.find_equal(spool.column("text"), spool.column("label"))
        if options.near_duplicates is not None:
            search.find_alike(spool.column("bands"), options.near_duplicates)
        # Rows that say the same stay together, and so does all that is grouped with them: in train.
        stays = search.is_shared & search.is_kept
        if spool.has("group"):
            groups = spool.column("group")
            stays |= np.isin(groups, groups[stays])
        splits = np.array(given)
        pool = np.flatnonzero((given == 0) & search.is_kept & ~stays)
        columns = {
            name: np.asarray(spool.column(column))[pool]
            for name, column in (("strata", "stratum"), ("groups", "group"), ("times", "time"))
            if spool.has(column)
        }
        splits[pool] = assign_splits(len(pool), options.split, **columns)
        return splits, search.is_kept

    def _number_id(self, rows: DiskRows, ids: np.ndarray[Any, Any]) -> Callable[[int, int], None]:
        """What gives a row that repeats an id a new one, which no row has."""
        taken: set[str] = set()
        known: np.ndarray[Any, Any] | None = None

        def number(index: int, count: int) -> None:
            nonlocal known
            if known is None:
                known = np.sort(ids)
            key = rows[index]["id"]
            while (new := f"{key}-{count}") in taken or _is_in(known, id_key(new)):
                count += 1
            self._new_ids[index] = new
            taken.add(new)

        return number

    # Writing

    def _write_splits(
        self,
        spool: Spool,
        rows: DiskRows,
        splits: np.ndarray[Any, Any],
        is_kept: np.ndarray[Any, Any],
    ) -> dict[str, SplitStatistics]:
        files = spool.column("file")
        statistics = {}
        for index, name in enumerate(SPLITS):
            chosen = np.flatnonzero((splits == index) & is_kept)
            statistics[name] = SplitStatistics(self._scratch, name)
            if index == 0 or len(chosen):
                written = self._finished(rows, chosen, files, is_train=index == 0)
                self._write_rows(name, written, statistics[name])
        return statistics

    def _finished(
        self, rows: DiskRows, chosen: np.ndarray[Any, Any], files: np.ndarray[Any, Any], *, is_train: bool
    ) -> Iterator[Row]:
        """The rows as they are written: tags converted, labels known to training, varied, cut into words."""
        options = self._options
        augmenter = Augmenter(options.augment) if is_train and options.augment is not None else None
        segment = self._segmenter()
        for index in map(int, chosen):
            row: Row | None = rows[index]
            assert row is not None
            if index in self._new_ids:
                row["id"] = self._new_ids[index]
            if "tags" in row:
                row = self._tag_readers[int(files[index])].convert(row)
            if row is None or not self._knows_labels(row, is_train=is_train):
                continue
            for variant in [row, *(augmenter.variants(row) if augmenter is not None else ())]:
                yield (
                    variant
                    if segment is None
                    else segment_row(variant, segment, self._log, tag_scheme=options.tag_scheme)
                )

    def _knows_labels(self, row: Row, *, is_train: bool) -> bool:
        if is_train:
            self._labels.update(str(label) for label in labels_of(row) if not isinstance(label, float))
            return True
        return knows_labels(row, self._labels, self._log)

    def _write_rows(self, name: str, rows: Iterable[Row], statistics: SplitStatistics) -> None:
        lines = self._lines(name, rows, statistics)
        options = self._options
        if options.order != "input":
            key = order_key(options.order, options.split.seed)
            lines = sort_lines(lines, key, memory_bytes=options.memory_bytes, folder=self._scratch)
        with (self._output / f"{name}.jsonl").open("wb") as file:
            for line in lines:
                file.write(line)
        self._outputs[f"{name}.jsonl"] = "rows"

    def _lines(self, name: str, rows: Iterable[Row], statistics: SplitStatistics) -> Iterator[bytes]:
        for row in rows:
            statistics.add(row)
            if statistics.num_rows % 1000 == 0:
                self._progress(f"write {name}", statistics.num_rows)
            yield to_json_line(row)

    def _segmenter(self) -> Segmenter | None:
        options = self._options
        if options.segment is None:
            return None
        if options.segment == MODEL_TOKENIZER:
            assert options.tokenizer is not None
            return tokenizer_segmenter(open_tokenizer(options.tokenizer))
        return open_segmenter(options.segment)

    # Vocabulary, tokenizer, packs

    def _write_extras(self) -> None:
        options = self._options
        tokenizer = options.tokenizer
        if options.train_tokenizer is not None:
            self._progress("train the tokenizer", 0)
            size = options.vocab_size or DEFAULT_VOCAB_SIZE
            trained = train_tokenizer(self._train_texts(), options.train_tokenizer, vocab_size=size)
            tokenizer = self._output / "tokenizer"
            if options.train_tokenizer == "unigram":
                self._log.note(
                    "training unigram again gives the same but for pieces whose likelihoods are equal to "
                    "some ten digits: its trainer adds up in an order of its own"
                )
            save_tokenizer(trained, options.train_tokenizer, tokenizer)
            self._outputs["tokenizer/"] = f"{options.train_tokenizer} of {trained.get_vocab_size()} tokens"
        elif options.vocab_size is not None:
            self._write_vocabulary(options.vocab_size)
        if options.pack is not None:
            assert tokenizer is not None
            self._write_packs(tokenizer, options.pack)

    def _write_vocabulary(self, size: int) -> None:
        segmenter = self._options.segment
        name = segmenter if segmenter in SEGMENTERS else "words"
        is_cut = segmenter is not None  # words have a space between them already
        counter = WordCounter()
        for words in (
            (
                row["tokens"] if "tokens" in row else " ".join(texts_of(row)).split()
                for row in self._train_rows()
            )
            if is_cut
            else words_of_rows(self._train_rows(), open_segmenter(name))
        ):
            counter.update(words)
        vocabulary = choose_words(counter, size=size, segmenter=name)
        vocabulary.save(self._output / "vocabulary.json")
        self._outputs["vocabulary.json"] = f"{len(vocabulary)} words"
        if counter.num_forgotten:
            self._log.note(f"{counter.num_forgotten} rare words were forgotten while counting")

    def _write_packs(self, tokenizer: Path, length: int) -> None:
        backend, eos_id = open_tokenizer(tokenizer), find_eos_id(tokenizer)
        sequences = (backend.encode(text, add_special_tokens=False).ids for text in self._train_texts())
        num_packs = num_tokens = 0
        with (self._output / "train.packed.jsonl").open("wb") as file:
            for pack in pack_sequences(sequences, length, how=self._options.packing, eos_id=eos_id):
                file.write(to_json_line(dataclasses.asdict(pack)))
                num_packs += 1
                num_tokens += len(pack.input_ids)
        filled = num_tokens / (num_packs * length) if num_packs else 0
        self._outputs["train.packed.jsonl"] = f"{num_packs} packs of {length} tokens, {filled:.1%} filled"

    def _train_rows(self) -> Iterator[dict[str, Any]]:
        with (self._output / "train.jsonl").open("rb") as file:
            for line in file:
                yield json.loads(line)

    def _train_texts(self) -> Iterator[str]:
        return (text for row in self._train_rows() for text in texts_of(row))

    # The card

    def _finish(self, statistics: Mapping[str, SplitStatistics]) -> DataCard:
        options = self._options
        if self._labels:
            names = sorted(self._labels, key=lambda label: (isinstance(label, str), label))
            path = self._output / "labels.json"
            path.write_text(json.dumps(names, ensure_ascii=False, indent=2), encoding="utf-8")
            self._outputs["labels.json"] = f"{len(names)} labels"
        num_splits = sum(split.num_rows > 0 for split in statistics.values())
        if num_splits > 1 and options.near_duplicates is None and not self._log.count("split-overlap", KEEP):
            self._log.note("splits share no text; --near-duplicates finds what is almost the same as well")
        self._outputs["problems.jsonl"] = f"{self._log.counts.total()} problems"
        self._outputs["card.txt"] = self._outputs["card.html"] = "this card"
        for reader, source in zip(self._tag_readers.values(), self._sources, strict=True):
            if options.task == "token-classification" and options.tags_in is None and reader.has_seen:
                self._log.note(f"{source['file']}: tags are read as {reader.source}")
        card = DataCard(
            task=options.task,
            sources=self._sources,
            splits={name: split.summary() for name, split in statistics.items() if split.num_rows},
            problems=_by_kind(self._log.counts),
            examples=self._examples.examples,
            cleaned=self._cleaner.counts,
            notes=self._log.notes,
            options=_flat(dataclasses.asdict(options)),
            outputs=self._outputs,
        )
        (self._output / "card.txt").write_text(card.to_text(), encoding="utf-8")
        (self._output / "card.html").write_text(card_page(card), encoding="utf-8")
        document = {"schema": 1, "version": __version__, "digest": self._digest(), **card.to_document()}
        text = json.dumps(document, ensure_ascii=False, indent=2)
        (self._output / "data.json").write_text(text, encoding="utf-8")
        return card

    def _digest(self) -> str:
        """SHA-256 of the splits: what a model's lineage names."""
        return _sha256([self._output / f"{name}.jsonl" for name in SPLITS])

    def _note_problem(self, problem: Problem) -> None:
        self._examples.add(problem)
        self._problems.write(json.dumps(problem.to_dict(), ensure_ascii=False) + "\n")


def _is_in(sorted_keys: np.ndarray[Any, Any], key: int) -> bool:
    at = int(np.searchsorted(sorted_keys, np.uint64(key)))
    return at < len(sorted_keys) and int(sorted_keys[at]) == key


def _by_kind(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """{kind: {action: number}}, in the order in which kinds are met."""
    return {
        kind: found
        for kind in PROBLEM_KINDS
        if (found := {action: number for (other, action), number in counts.items() if other == kind})
    }


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their own names, those of parts too; those that are not set are left out."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name == "synonyms":
            flat[name] = f"{len(value)} words"
        elif name in ("read", "clean", "split", "augment") and isinstance(value, Mapping):
            flat |= {key: inner for key, inner in _flat(value).items() if key not in flat}
        elif value is not None and value != {} and value != ():
            flat[name] = str(value) if isinstance(value, Path) else value
    return flat


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                _feed(digest, file)
    return digest.hexdigest()


def _feed(digest: Any, file: BinaryIO) -> None:
    while piece := file.read(2**20):
        digest.update(piece)
