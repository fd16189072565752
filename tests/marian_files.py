"""Files of Marian's tokenizers, trained on a page of two languages."""

from __future__ import annotations

import json
from pathlib import Path

from sentence_pieces import train_pieces


def write_two_vocabularies(folder: Path, shared_data: Path) -> tuple[int, int]:
    """English to French, with a vocabulary each; how many tokens they have. </s> is 0 in both, as in Marian's
    own files."""
    sizes = []
    for language, pieces_name, vocabulary_name, size in (
        ("eng", "source.spm", "vocab.json", 300),
        ("fra", "target.spm", "target_vocab.json", 400),
    ):
        text = (shared_data / "lm_udhr_multilingual" / f"{language}.txt").read_text(encoding="utf-8")
        path = folder / pieces_name
        processor = train_pieces(text.splitlines(), path, vocab_size=size, hard_vocab_limit=False)
        found = [processor.id_to_piece(id_) for id_ in range(3, len(processor))]
        vocabulary = {piece: id_ for id_, piece in enumerate(["</s>", "<unk>", *found, "<pad>"])}
        (folder / vocabulary_name).write_text(json.dumps(vocabulary), encoding="utf-8")
        sizes.append(len(vocabulary))
    config = {
        "tokenizer_class": "MarianTokenizer",
        "separate_vocabs": True,
        "source_lang": "eng",
        "target_lang": "fra",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sizes[0], sizes[1]
