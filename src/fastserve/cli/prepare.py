"""`fastserve prepare`: from files as they come to a set that a model learns from."""

from __future__ import annotations

import json as json_library
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastserve.cli.option import json_option, offline_option, parse_pairs
from fastserve.cli.progress_bar import row_progress
from fastserve.cli.report import print_json
from fastserve.config import parse_bytes
from fastserve.data.augment import AugmentOptions, read_synonyms
from fastserve.data.clean import NORMAL_FORMS, CleanOptions
from fastserve.data.order import ORDERS
from fastserve.data.pack import PACKINGS
from fastserve.data.privacy import PII_KINDS
from fastserve.data.problem import ACTIONS, PROBLEM_KINDS
from fastserve.data.reader.option import FORMATS, UNITS, ReadOptions
from fastserve.data.row import TASKS
from fastserve.data.segment import MODEL_TOKENIZER, SEGMENTERS
from fastserve.data.tag_scheme import SCHEMES
from fastserve.data.tokenizer_training import TOKENIZER_KINDS
from fastserve.errors import DataError, OptionError

if TYPE_CHECKING:
    from fastserve.data.preparation import Source
    from fastserve.data.split import SplitOptions

_STRATIFIED = ("text-classification", "pair-classification", "relation-extraction")
_DEFAULT_RATIO = 0.1

_PROBLEMS = "\n".join(
    f"  {kind}: {about.meaning}; {about.actions[0]} by default"
    + (f", or {', '.join(about.actions[1:])}" if about.actions[1:] else "")
    for kind, about in PROBLEM_KINDS.items()
)
_EPILOG = f"""\b
What can be wrong (--on-problem KIND={"|".join(ACTIONS)}):
{_PROBLEMS}
"""


def _names(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """A list parted by commas."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


_Path = click.Path(path_type=Path)


@click.command(epilog=_EPILOG)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=_Path, help="Files to read.")
@click.option("--output", required=True, type=_Path, metavar="DIR", help="Folder to write, as a whole.")
@click.option("--task", type=click.Choice(TASKS), required=True, help="What the rows are for.")
@click.option("--dev", type=_Path, multiple=True, metavar="FILE", help="Rows of dev; may be repeated.")
@click.option("--test", type=_Path, multiple=True, metavar="FILE", help="Rows of test; may be repeated.")
@click.option("--format", type=click.Choice(FORMATS), help="Format of the files; by default told by names.")
@click.option("--encoding", help="Encoding of the files, such as latin-1; by default it is detected.")
@click.option(
    "--columns",
    callback=_names,
    metavar="NAME,...",
    help="Columns of files without a header, in order; - leaves one out, a repeated name makes a list.",
)
@click.option(
    "--field",
    "fields_",
    multiple=True,
    metavar="FIELD=NAME",
    callback=parse_pairs("FIELD=NAME"),
    help="What a field is called in the files, such as label=category; may be repeated.",
)
@click.option(
    "--role",
    "roles",
    multiple=True,
    metavar="SPEAKER=ROLE",
    callback=parse_pairs("SPEAKER=ROLE"),
    help="Role of a speaker, such as sys=assistant; may be repeated.",
)
@click.option("--key-field", help="Field that takes the key under which rows stand in a JSON object.")
@click.option("--unit", type=click.Choice(UNITS), default="line", help="What a row of plain text is.")
@click.option("--label-separator", default=",", help="What parts several labels in one cell.")
@click.option(
    "--file-labels", callback=_names, metavar="LABEL,...", help="A label for all rows of each FILE, in order."
)
@click.option(
    "--labels", metavar="LABEL,...|FILE", help="All labels that there may be, or a file: JSON, or one a line."
)
@click.option("--normalize", type=click.Choice(NORMAL_FORMS), default="nfc", help="Unicode normal form.")
@click.option("--strip-html", is_flag=True, help="Take tags of HTML out, read its character references.")
@click.option(
    "--mask-pii",
    callback=_names,
    metavar="KIND,...",
    help=f"Put [EMAIL] and the like in the place of personal data: all, or {', '.join(PII_KINDS)}.",
)
@click.option("--collapse-space", is_flag=True, help="One space in the place of several.")
@click.option("--min-length", type=int, default=1, help="Fewest characters of a row.")
@click.option("--max-length", type=int, help="Most characters of a row; by default any number.")
@click.option("--max-ratio", type=float, help="Most that source and target may differ in length, as a ratio.")
@click.option(
    "--near-duplicates",
    type=float,
    metavar="SIMILARITY",
    help="Leave out rows that are as similar to an earlier one, such as 0.8, by MinHash.",
)
@click.option("--tags-in", type=click.Choice(SCHEMES), help="Scheme of the tags; by default told by them.")
@click.option("--tag-scheme", type=click.Choice(SCHEMES), default="iob2", help="Scheme that tags get.")
@click.option("--dev-ratio", type=float, help="Share of dev; by default 0.1, or 0 with --dev.")
@click.option("--test-ratio", type=float, help="Share of test; by default 0.1, or 0 with --test.")
@click.option(
    "--stratify/--no-stratify",
    default=None,
    help="Give each label its share of every split; by default where rows have one label.",
)
@click.option("--group", metavar="FIELD", help="Rows with this field equal stay in one split.")
@click.option("--time", metavar="FIELD", help="The earliest rows by this field are train, the latest test.")
@click.option("--seed", type=int, default=0, help="Seed of everything that is drawn.")
@click.option(
    "--segment",
    type=click.Choice((*SEGMENTERS, MODEL_TOKENIZER)),
    help="Cut texts into words; entities in texts become tags of tokens.",
)
@click.option("--tokenizer", metavar="NAME_OR_DIR", help="Model whose tokenizer segments and packs.")
@click.option("--augment", type=int, metavar="COPIES", help="Variants to add of each row of train.")
@click.option("--synonyms", type=_Path, metavar="FILE", help="Synonyms: JSON, or words a line, tabs between.")
@click.option("--synonym-ratio", type=float, default=0.2, help="Share of words that become a synonym.")
@click.option("--noise-ratio", type=float, default=0.0, help="Share of words that get a typing error.")
@click.option("--swap-ratio", type=float, default=0.0, help="Share of words that change places.")
@click.option("--order", type=click.Choice(ORDERS), default="input", help="Order of the rows written.")
@click.option("--vocab-size", type=int, help="Write a vocabulary of so many words, or train a tokenizer so.")
@click.option("--train-tokenizer", type=click.Choice(TOKENIZER_KINDS), help="Train a tokenizer on train.")
@click.option("--pack", type=int, metavar="TOKENS", help="Pack train into rows of so many tokens as well.")
@click.option("--packing", type=click.Choice(PACKINGS), default="best-fit", help="How.")
@click.option("--memory", default="256MiB", help="Memory that sorting and looking for duplicates may take.")
@click.option(
    "--on-problem",
    multiple=True,
    metavar="KIND=ACTION",
    callback=parse_pairs("KIND=ACTION"),
    help="What to do about a kind of problem, see below; may be repeated.",
)
@json_option
@offline_option
def prepare(
    files: Sequence[Path],
    output: Path,
    task: str,
    dev: Sequence[Path],
    test: Sequence[Path],
    json: bool,
    offline: bool,
    **values: Any,
) -> None:
    """Read labelled data or text, check and clean it, and split it into train, dev and test.

    Everything that is wrong is reported with file and line: it is fatal, repaired or left out, as
    --on-problem says. DIR gets train.jsonl, dev.jsonl, test.jsonl, a data card (card.txt, card.html,
    data.json) and all problems (problems.jsonl).
    """
    from fastserve.data.preparation import PrepareOptions
    from fastserve.data.preparation import prepare as prepare_data

    options = PrepareOptions(
        task=task,
        read=ReadOptions(**_picked(ReadOptions, values), fields=values["fields_"]),
        clean=CleanOptions(**_picked(CleanOptions, values), mask_pii=_pii_kinds(values["mask_pii"])),
        split=_split_options(task, values, has_dev=bool(dev), has_test=bool(test)),
        labels=None if values["labels"] is None else read_labels(values["labels"]),
        augment=_augment_options(values),
        tokenizer=_find_tokenizer(values["tokenizer"], offline=offline),
        memory_bytes=parse_bytes("memory", values["memory"]),
        **{
            name: values[name]
            for name in (
                *("tags_in", "tag_scheme", "near_duplicates", "segment", "order", "vocab_size"),
                *("train_tokenizer", "pack", "packing", "on_problem"),
            )
        },
    )
    is_parallel = values["format"] == "parallel"
    labels = values["file_labels"] or (None,) * len(files)
    with row_progress(shown=not json) as progress:
        card = prepare_data(
            _sources("FILE", files, labels, is_parallel=is_parallel),
            output,
            options,
            dev=_sources("dev", dev, (None,) * len(dev), is_parallel=is_parallel),
            test=_sources("test", test, (None,) * len(test), is_parallel=is_parallel),
            progress=progress,
        )
    if json:
        print_json({"output": str(output), **card.to_document()})
        return
    rows = ", ".join(f"{name} {split['rows']}" for name, split in card.splits.items())
    print(f"wrote {output}: {rows} rows")
    for kind, actions in card.problems.items():
        done = ", ".join(f"{action} {number}" for action, number in actions.items())
        print(f"  {kind}: {done}")
    for note in card.notes:
        print(f"  {note}")
    print(f"see {output / 'card.txt'}, card.html and problems.jsonl there")


def read_labels(text: str) -> tuple[str, ...]:
    """Labels parted by commas, or those of a file: a JSON list, or one a line.

    Raises:
        DataError: the file has no labels.
    """
    path = Path(text)
    if not path.is_file():
        return tuple(label.strip() for label in text.split(",") if label.strip())
    content = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".json":
        return tuple(line.strip() for line in content.splitlines() if line.strip())
    try:
        labels = json_library.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: no JSON: {error}", hint="give a list of labels") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{path} is no list of labels", hint='such as ["yes", "no"]')
    return tuple(labels)


def _picked(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the command's options, those that are fields of the class."""
    apart = ("fields", "mask_pii", "label")
    return {field.name: values[field.name] for field in fields(kind) if field.name not in apart}


def _pii_kinds(names: tuple[str, ...] | None) -> tuple[str, ...]:
    return PII_KINDS if names == ("all",) else names or ()


def _split_options(task: str, values: Mapping[str, Any], *, has_dev: bool, has_test: bool) -> SplitOptions:
    from fastserve.data.split import SplitOptions

    ratios = {}
    for name, is_given in (("dev", has_dev), ("test", has_test)):
        ratio = values[f"{name}_ratio"]
        if is_given and ratio:
            raise OptionError(
                f"--{name} and --{name}-ratio={ratio} both say what {name} is",
                hint="choose one",
                option=f"{name}_ratio",
            )
        ratios[f"{name}_ratio"] = (0.0 if is_given else _DEFAULT_RATIO) if ratio is None else ratio
    stratify = values["stratify"]
    if stratify is None:
        stratify = task in _STRATIFIED and values["group"] is None and values["time"] is None
    return SplitOptions(
        **ratios, stratify=stratify, group=values["group"], time=values["time"], seed=values["seed"]
    )


def _augment_options(values: Mapping[str, Any]) -> AugmentOptions | None:
    if values["augment"] is None:
        if values["synonyms"] is not None or values["noise_ratio"] or values["swap_ratio"]:
            raise OptionError(
                "there is nothing that --synonyms, --noise-ratio and --swap-ratio would vary",
                hint="say how many variants to add: --augment 1",
                option="augment",
            )
        return None
    return AugmentOptions(
        copies=values["augment"],
        synonyms={} if values["synonyms"] is None else read_synonyms(values["synonyms"]),
        synonym_ratio=values["synonym_ratio"],
        noise_ratio=values["noise_ratio"],
        swap_ratio=values["swap_ratio"],
        seed=values["seed"],
    )


def _find_tokenizer(name: str | None, *, offline: bool) -> Path | None:
    if name is None:
        return None
    if (Path(name) / "tokenizer.json").is_file():
        return Path(name)
    from fastserve.cli.progress_bar import download_progress
    from fastserve.hub.resolve import resolve

    with download_progress() as progress:
        return resolve(name, offline=offline, progress=progress)


def _sources(
    option: str, files: Sequence[Path], labels: Sequence[str | None], *, is_parallel: bool
) -> list[Source]:
    from fastserve.data.preparation import Source

    if is_parallel:
        if len(files) % 2:
            raise OptionError(
                f"{option}: {len(files)} files of parallel text are no pairs",
                hint="give sources and targets in turn: a.en a.de b.en b.de",
                option=option,
            )
        return [Source((one, other)) for one, other in zip(files[::2], files[1::2], strict=True)]
    if len(labels) != len(files):
        raise OptionError(
            f"file_labels names {len(labels)} labels for {len(files)} files",
            hint="name one for each FILE",
            option="file_labels",
        )
    return [Source(path, label) for path, label in zip(files, labels, strict=True)]
