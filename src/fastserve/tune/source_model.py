"""The pretrained model that a run starts from: a Hugging Face folder, or a GGUF file, whose weights are
dequantized to float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.gguf_tokenizer import build_from_gguf
from fastserve.checkpoint.packed_weights import QUANT_METHOD
from fastserve.errors import UnsupportedError
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.relation_extraction import RelationExtraction
from fastserve.evaluate.task.task import Task
from fastserve.models.config import EncoderConfig
from fastserve.models.family import read_config
from fastserve.models.pooling import Pooling
from fastserve.models.prefix import read_prefix
from fastserve.tune.digest import digest_files
from fastserve.types import JsonObject

_MOST_TOKENS = 512  # of an example by default: longer ones are rare, and attention over them dear


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A pretrained model on disk and its tokenizer.

    Attributes:
        spec: as the user named it.
        path: the folder or .gguf file.
        checkpoint: that, opened.
        tokenizer: a fast tokenizer of `transformers`.
    """

    spec: str
    path: Path
    checkpoint: Checkpoint
    tokenizer: Any

    @property
    def config(self) -> JsonObject:
        return self.checkpoint.config

    @property
    def limit(self) -> int | None:
        """Tokens that the model takes, by its positions and, of sentence-transformers, by its settings."""
        sentence = self.checkpoint.sentence
        found = [self._positions, None if sentence is None else sentence.max_tokens]
        return min((length for length in found if length), default=None)

    @property
    def max_tokens(self) -> int:
        """The longest example by default: what the model takes, up to 512."""
        return self.max_tokens_after(0)

    def max_tokens_after(self, num_prefix_tokens: int) -> int:
        """The same behind a prefix, which takes positions."""
        positions = (self._positions or _MOST_TOKENS + num_prefix_tokens) - num_prefix_tokens
        return max(min(positions, _MOST_TOKENS), 1)

    @property
    def _positions(self) -> int | None:
        """Of the table; None where there is none."""
        limit = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        if limit and self.config.get("model_type") in ("roberta", "xlm-roberta", "mpnet"):
            limit -= 2  # the first two positions are of padding
        return None if not limit else int(limit)

    @property
    def pooling(self) -> Pooling:
        """How its token vectors become one: as its own files say, or a mean."""
        sentence = self.checkpoint.sentence
        if sentence is None:
            return Pooling()
        return Pooling.from_sentence_transformers(sentence.modules, sentence.pooling)

    def lineage(self) -> JsonObject:
        """What the artifact says of where it came from: name, digest of the weights, and how they were
        read."""
        formats = sorted({tensor.format.name.lower() for tensor in self.checkpoint.tensors.values()})
        return {
            "model": self.spec,
            "weights_sha256": digest_files(self.checkpoint.files),
            "format": self.checkpoint.format,
            "stored_as": formats,
            "dequantized_to": "f32" if set(formats) - {"f32", "f16", "bf16"} else None,
        }


def open_source_model(spec: str, path: Path) -> SourceModel:
    """Open the model that `spec` was resolved to.

    Raises:
        CheckpointError, UnsupportedError: as `open_checkpoint`; or it has no tokenizer that is fast, or a
            prefix.
    """
    checkpoint = open_checkpoint(path)
    if read_prefix(checkpoint.config) is not None:
        raise UnsupportedError(
            f"{spec} has a tuned prefix, which is not tuned on",
            hint="tune the model that the prefix was tuned on, which README.md names",
        )
    return SourceModel(spec, path, checkpoint, _open_tokenizer(checkpoint))


def load_model(source: SourceModel, task: Task, *, dropout: float | None) -> Any:
    """The `transformers` model of a task with the source's weights; a head that it lacks is drawn at random,
    by torch's generator, which the caller seeds.

    Raises:
        UnsupportedError: `transformers` has no such head for the model's family.
    """
    from fastserve.evaluate.embedding_model import EmbeddingModel

    config = _make_config(source, {**task.config(), **_dropout_of(source.config, dropout)})
    load = _from_folder if source.checkpoint.format == "safetensors" else _from_dequantized
    with _named_if_headless(source, task):
        model = load(source, f"AutoModel{task.model_class}", config)
    if isinstance(task, RelationExtraction):
        source.tokenizer.add_tokens(list(task.markers), special_tokens=True)
        model.resize_token_embeddings(
            max(len(source.tokenizer), model.config.vocab_size), mean_resizing=False
        )
    return EmbeddingModel(model, source.pooling) if isinstance(task, Embedding) else model


def outline_model(source: SourceModel, task: Task) -> Any:
    """The `transformers` model of a task without weights: what layers there are, and how wide. Of embeddings
    the encoder alone.

    Raises:
        UnsupportedError: as `load_model`.
    """
    import torch
    import transformers

    config = _make_config(source, task.config())
    with _named_if_headless(source, task), torch.device("meta"):
        return getattr(transformers, f"AutoModel{task.model_class}").from_config(config)


@contextmanager
def _named_if_headless(source: SourceModel, task: Task) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedError(
            f"{source.spec}: architecture {source.config.get('model_type')!r} has no head for {task.name}"
        ) from error


def _make_config(source: SourceModel, changes: JsonObject) -> Any:
    import transformers

    if source.checkpoint.format == "safetensors":
        config = transformers.AutoConfig.from_pretrained(source.checkpoint.path, **changes)
        if config.pad_token_id is None:
            config.pad_token_id = source.tokenizer.pad_token_id
        return config
    known = {
        key: value for key, value in source.config.items() if key not in ("architectures", "torch_dtype")
    }
    kind = transformers.CONFIG_MAPPING[source.config["model_type"]]
    return kind(**{**known, **changes, "pad_token_id": source.tokenizer.pad_token_id})


def _from_folder(source: SourceModel, name: str, config: Any) -> Any:
    import torch
    import transformers

    _refuse_own_heads(source)
    _refuse_packed(source)
    kind = getattr(transformers, name)
    return kind.from_pretrained(source.checkpoint.path, config=config, dtype=torch.float32)


def _refuse_own_heads(source: SourceModel) -> None:
    """
    Raises:
        UnsupportedError: heads were pruned from an encoder, whose config `transformers` has no key for.
    """
    config = read_config(source.config) if source.config.get("head_dim") else None
    if isinstance(config, EncoderConfig) and config.num_heads * config.head_dim != config.hidden_size:
        raise UnsupportedError(
            f"{source.spec}: transformers has no {source.config['model_type']!r} of {config.num_heads} heads"
            f" of {config.head_dim}, {config.hidden_size} wide",
            hint="tune it within a recipe (the step recover), or what fastserve convert makes of it",
        )


def _refuse_packed(source: SourceModel) -> None:
    """
    Raises:
        UnsupportedError: the weights are in our sidecar, which `transformers` does not read.
    """
    quantization = source.config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        raise UnsupportedError(
            f"{source.spec} is packed in a form that transformers does not read",
            hint="tune what it was compressed from, or what `fastserve convert --to safetensors` makes of it",
        )


def _from_dequantized(source: SourceModel, name: str, config: Any) -> Any:
    import torch
    import transformers

    model = getattr(transformers, name).from_config(config)
    weights = {key: torch.from_numpy(to_f32(tensor)) for key, tensor in source.checkpoint.tensors.items()}
    if name != "AutoModelForCausalLM":
        weights.pop("lm_head.weight", None)
    result = model.load_state_dict(weights, strict=False)
    missing = [key for key in result.missing_keys if "lm_head" not in key and "score" not in key]
    if missing or result.unexpected_keys:
        odd = (missing or result.unexpected_keys)[0]
        raise UnsupportedError(f"{source.path}: tensor {odd} does not fit {type(model).__name__}")
    model.tie_weights()
    return model


def _open_tokenizer(checkpoint: Checkpoint) -> Any:
    import transformers

    if checkpoint.format == "safetensors":
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
        if not tokenizer.is_fast:
            raise UnsupportedError(
                f"{checkpoint.path} has a tokenizer without offsets", hint="give it a tokenizer.json"
            )
    else:
        assert checkpoint.metadata is not None
        backend, special_tokens = build_from_gguf(checkpoint.metadata)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
        tokenizer.chat_template = checkpoint.chat_template
    # Stored settings of the script that trained it (MiniLM's cuts at 128 and pads).
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = 10**9  # lengths are our own to check
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _dropout_of(config: JsonObject, dropout: float | None) -> JsonObject:
    """The config's keys that are a rate of dropout, set to `dropout`."""
    if dropout is None:
        return {}
    names = [name for name in config if name.endswith(("dropout", "dropout_prob", "pdrop"))]
    return dict.fromkeys([*names, *(("classifier_dropout",) if names else ())], dropout)
