"""From a model's config to its graph: the table of architectures that we have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.checkpoint.tensor import StoredTensor
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Value
from fastserve.models.albert import albert_heads, encode_albert, read_albert
from fastserve.models.bert import bert_heads, encode_bert, read_bert
from fastserve.models.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from fastserve.models.distilbert import distilbert_heads, encode_distilbert, read_distilbert
from fastserve.models.gemma import read_gemma, read_gemma2, read_gemma3
from fastserve.models.gpt2 import arrange_gpt2, build_gpt2, read_gpt2
from fastserve.models.gpt_neox import arrange_gpt_neox, build_gpt_neox, read_gpt_neox
from fastserve.models.head import (
    Ending,
    Head,
    HeadLayouts,
    finish_with_embedding,
    finish_with_head,
    replace_language_head,
)
from fastserve.models.llama import build_llama, read_llama
from fastserve.models.marian import (
    arrange_marian,
    build_marian_decoder,
    build_marian_encoder,
    read_marian,
)
from fastserve.models.mistral import read_mistral
from fastserve.models.mixture import read_mixtral, read_qwen2_moe, read_qwen3_moe
from fastserve.models.modernbert import encode_modernbert, modernbert_heads, read_modernbert
from fastserve.models.mpnet import encode_mpnet, mpnet_heads, read_mpnet
from fastserve.models.opt import build_opt, read_opt
from fastserve.models.phi3 import read_phi3
from fastserve.models.pooling import Pooling
from fastserve.models.prefix import PREFIX_KEY
from fastserve.models.qwen import read_qwen2, read_qwen3
from fastserve.models.roberta import encode_roberta, read_roberta, roberta_heads
from fastserve.models.smollm3 import read_smollm3
from fastserve.models.t5 import build_t5_decoder, build_t5_encoder, read_t5
from fastserve.types import JsonObject

ModelConfig = DecoderConfig | EncoderConfig | EncoderDecoderConfig


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """A page of `models`.

    Attributes:
        title: what people call it.
        read_config: reads a config.json.
        encode: adds the encoder to a graph, by the names of a checkpoint's tensors; gives token vectors
            [tokens, hidden_size].
        heads: what may follow it.
    """

    title: str
    read_config: Callable[[JsonObject], EncoderConfig]
    encode: Callable[[GraphBuilder, EncoderConfig, Collection[str]], Value]
    heads: Callable[[EncoderConfig], HeadLayouts]


@dataclass(frozen=True, slots=True)
class DecoderFamily:
    """A page of `models`.

    Attributes:
        title: what people call it.
        architectures: its classes of `transformers` that we compute.
        read_config: reads a config.json.
        build: from that, and the names of a checkpoint's tensors, to the graph; its output is `logits`.
        arrange: from a checkpoint's tensors to those of the graph, where they are arranged otherwise.
    """

    title: str
    architectures: tuple[str, ...]
    read_config: Callable[[JsonObject], DecoderConfig]
    build: Callable[[Any, Collection[str]], Graph] = build_llama
    arrange: Callable[[Any, Mapping[str, StoredTensor]], Mapping[str, StoredTensor]] | None = None


@dataclass(frozen=True, slots=True)
class EncoderDecoderFamily:
    """A page of `models`.

    Attributes:
        title: what people call it.
        architectures: its classes of `transformers` that we compute.
        read_config: reads a config.json.
        build_encoder: from that, and the names of a checkpoint's tensors, to the graph that stores a source.
        build_decoder: to the graph of its target; its output is `logits`.
        arrange: from a checkpoint's tensors to those of the graphs, where they are arranged otherwise.
    """

    title: str
    architectures: tuple[str, ...]
    read_config: Callable[[JsonObject], EncoderDecoderConfig]
    build_encoder: Callable[[Any, Collection[str]], Graph]
    build_decoder: Callable[[Any, Collection[str]], Graph]
    arrange: Callable[[Any, Mapping[str, StoredTensor]], Mapping[str, StoredTensor]] | None = None


# By model_type.
DECODER_FAMILIES: Mapping[str, DecoderFamily] = {
    "llama": DecoderFamily("Llama 1, 2, 3, SmolLM2, TinyLlama", ("LlamaForCausalLM",), read_llama),
    "mistral": DecoderFamily("Mistral", ("MistralForCausalLM",), read_mistral),
    "qwen2": DecoderFamily("Qwen2, Qwen2.5", ("Qwen2ForCausalLM",), read_qwen2),
    "qwen3": DecoderFamily("Qwen3", ("Qwen3ForCausalLM",), read_qwen3),
    "gemma": DecoderFamily("Gemma", ("GemmaForCausalLM",), read_gemma),
    "gemma2": DecoderFamily("Gemma 2", ("Gemma2ForCausalLM",), read_gemma2),
    "gemma3_text": DecoderFamily("Gemma 3 (text)", ("Gemma3ForCausalLM",), read_gemma3),
    "gemma3": DecoderFamily(
        "Gemma 3 (the text part of models for images)", ("Gemma3ForConditionalGeneration",), read_gemma3
    ),
    "phi3": DecoderFamily("Phi-3, Phi-3.5, Phi-4-mini", ("Phi3ForCausalLM",), read_phi3),
    "smollm3": DecoderFamily("SmolLM3", ("SmolLM3ForCausalLM",), read_smollm3),
    "mixtral": DecoderFamily("Mixtral", ("MixtralForCausalLM",), read_mixtral),
    "qwen2_moe": DecoderFamily("Qwen1.5-MoE, Qwen2-MoE", ("Qwen2MoeForCausalLM",), read_qwen2_moe),
    "qwen3_moe": DecoderFamily("Qwen3-MoE", ("Qwen3MoeForCausalLM",), read_qwen3_moe),
    "gpt2": DecoderFamily("GPT-2", ("GPT2LMHeadModel",), read_gpt2, build_gpt2, arrange_gpt2),
    "gpt_neox": DecoderFamily(
        "GPT-NeoX, Pythia", ("GPTNeoXForCausalLM",), read_gpt_neox, build_gpt_neox, arrange_gpt_neox
    ),
    "opt": DecoderFamily("OPT", ("OPTForCausalLM",), read_opt, build_opt),
}
ENCODER_FAMILIES: Mapping[str, EncoderFamily] = {
    "bert": EncoderFamily("BERT, MiniLM, BGE, E5", read_bert, encode_bert, bert_heads),
    "roberta": EncoderFamily("RoBERTa", read_roberta, encode_roberta, roberta_heads),
    "xlm-roberta": EncoderFamily(
        "XLM-R, multilingual E5, BGE-M3", read_roberta, encode_roberta, roberta_heads
    ),
    "mpnet": EncoderFamily("MPNet", read_mpnet, encode_mpnet, mpnet_heads),
    "distilbert": EncoderFamily("DistilBERT", read_distilbert, encode_distilbert, distilbert_heads),
    "albert": EncoderFamily("ALBERT", read_albert, encode_albert, albert_heads),
    "modernbert": EncoderFamily("ModernBERT", read_modernbert, encode_modernbert, modernbert_heads),
}
ENCODER_DECODER_FAMILIES: Mapping[str, EncoderDecoderFamily] = {
    "t5": EncoderDecoderFamily(
        "T5, T5 v1.1, Flan-T5", ("T5ForConditionalGeneration",), read_t5, build_t5_encoder, build_t5_decoder
    ),
    "marian": EncoderDecoderFamily(
        "Marian, OPUS-MT",
        ("MarianMTModel",),
        read_marian,
        build_marian_encoder,
        build_marian_decoder,
        arrange_marian,
    ),
}


def read_config(config: JsonObject) -> ModelConfig:
    """Read a Hugging Face `config.json`, by its `model_type`.

    Raises:
        CheckpointError: the config lacks keys (all are named) or is inconsistent.
        UnsupportedError: an architecture, or a feature of one, that we do not have; or a model's own code; or
            a prefix, which is beside the model: who has a use for it reads it first (`read_prefix`), and this
            of the config `without_prefix`.
    """
    if config.get(PREFIX_KEY) is not None:
        raise UnsupportedError(
            "the model has a tuned prefix: it can be generated with, served and evaluated, and nothing else",
            hint="do it to the model that the prefix was tuned on, which README.md names, and tune that",
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        problem = "lacks model_type" if model_type is None else "has a model_type that is no text"
        raise CheckpointError(f"the model's config {problem}")
    if model_type in DECODER_FAMILIES:
        family = DECODER_FAMILIES[model_type]
        classifiers = tuple(map(_classifier_of, family.architectures))
        _check_architectures(config, family.architectures + classifiers)
        return family.read_config(config)
    if model_type in ENCODER_DECODER_FAMILIES:
        _check_architectures(config, ENCODER_DECODER_FAMILIES[model_type].architectures)
        return ENCODER_DECODER_FAMILIES[model_type].read_config(config)
    if model_type in ENCODER_FAMILIES:
        _check_own_code(config)
        return ENCODER_FAMILIES[model_type].read_config(config)
    own_code = "; it needs its own code (auto_map), which is never run" if config.get("auto_map") else ""
    raise UnsupportedError(
        f"architecture {model_type!r} is not supported{own_code}",
        hint="supported are "
        f"{', '.join((*DECODER_FAMILIES, *ENCODER_FAMILIES, *ENCODER_DECODER_FAMILIES))};"
        " docs/guides/add-a-model.md says how to add one",
    )


def build_graph(
    config: ModelConfig, tensor_names: Collection[str] = (), *, ending: Ending | None = None
) -> Graph:
    """The graph of a model, before any pass; of an encoder-decoder that of its decoder, to which
    `build_source_encoder` gives the other.

    A decoder's output is `logits` [output rows, vocab_size], or, by a `Head` for classes of texts,
    [sequences, num_labels]. An encoder's is what its `ending` says: by a `Pooling` (by default a mean, not
    normalized) `embedding` [sequences, hidden_size], by a `Head` `logits`, [sequences, num_labels] or
    [tokens, num_labels]. `tensor_names` are those of the checkpoint, where a family has several names for its
    parameters.

    Raises:
        UnsupportedError: the family has no such head.
    """
    if isinstance(config, EncoderDecoderConfig):
        return ENCODER_DECODER_FAMILIES[config.model_type].build_decoder(config, tensor_names)
    if isinstance(config, DecoderConfig):
        graph = DECODER_FAMILIES[config.model_type].build(config, tensor_names)
        return replace_language_head(graph, ending) if isinstance(ending, Head) else graph
    family = ENCODER_FAMILIES[config.model_type]
    b = GraphBuilder()
    x = family.encode(b, config, tensor_names)
    if not isinstance(ending, Head):
        return finish_with_embedding(b, x, ending or Pooling())
    layouts = family.heads(config)
    if ending.kind not in layouts:
        raise UnsupportedError(
            f"a {config.model_type} model for {ending.kind} is not supported",
            hint=f"supported are {', '.join(layouts)}",
        )
    return finish_with_head(b, x, ending, layouts[ending.kind])


def build_source_encoder(config: ModelConfig, tensor_names: Collection[str] = ()) -> Graph | None:
    """The graph of an encoder-decoder's encoder, before any pass: it has no output, but stores what the graph
    of `build_graph` reads. None of other models."""
    if not isinstance(config, EncoderDecoderConfig):
        return None
    return ENCODER_DECODER_FAMILIES[config.model_type].build_encoder(config, tensor_names)


def arrange_tensors(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """A checkpoint's tensors as the model's graph takes them, under the same names: transposed or reordered
    where a family stores them otherwise. Views: nothing is read yet.

    Raises:
        CheckpointError: a tensor that is to be arranged has a shape that does not fit.
        UnsupportedError: it is stored in a format that cannot be arranged.
    """
    if isinstance(config, EncoderConfig):
        return tensors
    families = DECODER_FAMILIES if isinstance(config, DecoderConfig) else ENCODER_DECODER_FAMILIES
    arrange = families[config.model_type].arrange
    return tensors if arrange is None else arrange(config, tensors)


def _check_architectures(config: JsonObject, known: Collection[str]) -> None:
    """
    Raises:
        UnsupportedError: the config names a class that is not the family's language model or its classifier
            of texts, such as one of the checkpoint's own.
    """
    for name in _architectures(config):
        if name not in known:
            own_code = ", its own code (auto_map), which is never run" if config.get("auto_map") else ""
            raise UnsupportedError(
                f"the model's config has architectures={name!r}{own_code}, which is not supported",
                hint=f"supported for model_type={config['model_type']!r} is {', '.join(known)}",
            )


def _check_own_code(config: JsonObject) -> None:
    """
    Raises:
        UnsupportedError: the config brings classes that are not those of `transformers` for its model_type,
            whose names begin with it.
    """
    family = str(config["model_type"]).replace("_", "").replace("-", "")
    for name in _architectures(config):
        if config.get("auto_map") and not name.lower().startswith(family):
            raise UnsupportedError(
                f"the model's config has architectures={name!r}, its own code (auto_map), which is never run",
                hint=f"choose a model whose class is one of transformers for {config['model_type']!r}",
            )


def _architectures(config: JsonObject) -> list[str]:
    named = config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def _classifier_of(architecture: str) -> str:
    """Of a language model's class, that which classifies texts.

    >>> _classifier_of("LlamaForCausalLM"), _classifier_of("GPT2LMHeadModel")
    ('LlamaForSequenceClassification', 'GPT2ForSequenceClassification')
    """
    return f"{architecture.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}ForSequenceClassification"
