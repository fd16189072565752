"""Structured pruning: feed-forward neurons, attention heads and layers go whole, and what is left is an
ordinary smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.prune.cut import Indices, top_units, without_layers, without_units
from fastserve.compress.prune.influence import layer_influence
from fastserve.compress.prune.refit import refit
from fastserve.compress.prune.structure import Part, Structure, find_structure
from fastserve.compress.prune.taylor import score_by_taylor
from fastserve.compress.prune.training import check_tuning, read_tuning
from fastserve.compress.prune.unit_score import Scores, score_by_activation
from fastserve.compress.step import Context, Need, WorkingModel
from fastserve.errors import OptionError, UnsupportedError
from fastserve.option import check_choice, check_integer, check_number


@dataclass(frozen=True, kw_only=True)
class Structured:
    """The step `structured`. Every layer loses as many heads and neurons, since configs have one number for
    all; which ones is each layer's own.

    Attributes:
        neurons: share of feed-forward neurons that go, at least.
        heads: share of attention heads that go, at least; those that share keys go together. Of a Llama,
            Gemma 2 or 3 so many that those left divide its width, since transformers refuses others.
        layers: how many layers go: those that change what flows through them least.
        score: of heads and neurons: `activation`, the norm of what they add to their layer's output on
            calibration text; or `taylor`, how much the loss on the training rows changes without them, to
            first order (Michel et al., arXiv 1905.10650).
        multiple: neurons that stay are a multiple of it, which kernels like; fewer than that stay as they
            are.
        refit: fit what is left of the matrices that read heads and neurons anew, on calibration text.

    Raises:
        OptionError: a number out of range, or nothing that goes.
    """

    neurons: float = 0.0
    heads: float = 0.0
    layers: int = 0
    score: Literal["activation", "taylor"] = "activation"
    multiple: int = 32
    refit: bool = True

    def __post_init__(self) -> None:
        check_number("neurons", self.neurons, 0.0, 0.99)
        check_number("heads", self.heads, 0.0, 0.99)
        check_integer("layers", self.layers, low=0)
        check_choice("score", self.score, ("activation", "taylor"))
        check_integer("multiple", self.multiple, low=1)
        if not (self.neurons or self.heads or self.layers):
            raise OptionError(
                "structured takes nothing out", hint="give neurons, heads or layers", option="neurons"
            )

    @property
    def needs(self) -> frozenset[Need]:
        scores = bool(self.neurons or self.heads)
        needed: set[Need] = set()
        if scores and self.score == "taylor":
            needed.add("train")
        if self.layers or (scores and (self.refit or self.score == "activation")):
            needed.add("calibration")
        return frozenset(needed)

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        structure = find_structure(model)
        self._check_layers(structure)
        if self.heads:
            self._num_heads(structure, structure.attentions[0])
        if "train" in self.needs:
            check_tuning(model, context, read_tuning({}), step="structured")

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`; UnsupportedError: a family whose parts cannot be taken out."""
        _refuse_quantized(model)
        structure = find_structure(model)
        if self.layers:
            model = self._without_layers(model, context, structure)
            structure = find_structure(model)
        heads = structure.attentions if self.heads else ()
        neurons = structure.feed_forwards if self.neurons else ()
        if self.neurons and len(neurons) != structure.num_layers:
            raise UnsupportedError(f"neurons of {model.checkpoint.path} are not in one matrix a layer")
        parts = (*heads, *neurons)
        if not parts:
            return model
        rate = score_by_activation if self.score == "activation" else score_by_taylor
        scores = rate(model, context, parts)
        kept = self._choose(structure, heads, neurons, scores)
        if self.refit:
            model = refit(model, context, parts, kept)
        if heads:
            model = without_units(model, structure, kept, are_heads=True)
            self._note_heads(model, structure, context)
        return without_units(model, structure, kept, are_heads=False) if neurons else model

    def _without_layers(self, model: WorkingModel, context: Context, structure: Structure) -> WorkingModel:
        self._check_layers(structure)
        influence = layer_influence(model, context, structure)
        gone = sorted(range(len(influence)), key=lambda index: influence[index])[: self.layers]
        context.notes.append(
            f"structured: layers {', '.join(map(str, sorted(gone)))} went; the influence of all was"
            f" {', '.join(f'{value:.3f}' for value in influence)}"
        )
        return without_layers(model, structure, gone)

    def _check_layers(self, structure: Structure) -> None:
        if self.layers >= structure.num_layers:
            raise OptionError(
                f"layers={self.layers} is all that the model has",
                hint=f"choose at most {structure.num_layers - 1}",
                option="layers",
            )

    def _choose(
        self,
        structure: Structure,
        heads: Seq[Part],
        neurons: Seq[Part],
        scores: Mapping[str, Scores],
    ) -> dict[str, Indices]:
        kept: dict[str, Indices] = {}
        if heads:
            count = self._num_heads(structure, heads[0])
            kept |= {part.name: top_units(scores[part.name], count) for part in heads}
        if heads and structure.bias is not None:  # whose columns all layers share
            together = np.sum([scores[part.name] / scores[part.name].sum() for part in heads], axis=0)
            kept |= {part.name: top_units(together, count) for part in heads}
        for part in neurons:
            count = max(1, int((1 - self.neurons) * part.num_units + 1e-9))
            if count > self.multiple:
                count -= count % self.multiple
            kept[part.name] = top_units(scores[part.name], count)
        return kept

    def _num_heads(self, structure: Structure, part: Part) -> int:
        """How many heads of keys stay: the share that does, or the next number that `transformers` takes.

        Raises:
            OptionError: it takes none.
        """
        wanted = max(1, int((1 - self.heads) * part.num_units + 1e-9))
        if not structure.keys.heads_divide_width:
            return wanted
        width, shared = structure.streams[0].width, part.makers[0][1] // part.makers[1][1]
        for count in range(wanted, 0, -1):
            if width % (count * shared) == 0:
                return count
        raise OptionError(
            f"heads={self.heads}: transformers wants heads that divide the width of {width}, and no number up"
            f" to {wanted * shared}, of {shared} that share keys, does",
            hint="leave heads out, and take out neurons or layers",
            option="heads",
        )

    def _note_heads(self, model: WorkingModel, structure: Structure, context: Context) -> None:
        part, left = structure.attentions[0], find_structure(model).attentions[0]
        context.notes.append(
            f"structured: {part.num_units - left.num_units} of {part.num_units} heads of keys went from each"
            " layer"
        )
        if not structure.keys.is_decoder:
            context.notes.append(
                f"structured: a config of transformers has no head_dim for {model.config['model_type']!r}:"
                " it refuses the model, which FastServe opens by that key"
            )


def _refuse_quantized(model: WorkingModel) -> None:
    for tensor in model.tensors.values():
        if isinstance(tensor, GroupedTensor):
            raise OptionError(
                f"structured comes before quantization: {tensor.name} is int{tensor.bits}",
                hint="put it before the steps that quantize, or take the model unquantized",
            )
