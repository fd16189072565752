"""Learning from a teacher: its probabilities, softened by a temperature (Hinton et al. 2015, arXiv
1503.02531), its hidden states and its attention maps (Jiao et al. 2020, arXiv 1909.10351, equations 7, 8).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.errors import OptionError, UnsupportedError
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.generation import Generation
from fastserve.evaluate.task.question_answering import QuestionAnswering
from fastserve.evaluate.task.task import IGNORED, Task
from fastserve.evaluate.task.text_classification import TextClassification
from fastserve.evaluate.torch_model import logits_of
from fastserve.tune.options import TuneOptions
from fastserve.tune.teacher import Teacher, TeacherOutputs, flags_of
from fastserve.tune.trainer import TaskTrainer, without_blank

_EXAMPLE = "fastserve_example"  # the number of an example, among its inputs until the batch is computed
_FAR_BELOW = -1e9  # of logits that no probability is to be left for


class DistillingTrainer(TaskTrainer):
    """A trainer whose loss is (1 - soft_weight) times that of the labels, soft_weight times that of the
    teacher's outputs, and what hidden states and attention maps add.

    Args:
        teacher: whose numbers of examples are those of `examples`.
        options: of the run.
        attributes: of `TaskTrainer`.
    """

    def __init__(self, *, teacher: Teacher, options: TuneOptions, **attributes: Any) -> None:
        self._teacher = teacher
        self._options = options
        self._flags = {"layers": options.hidden_weight > 0, "maps": options.attention_weight > 0}
        for index, features in enumerate(attributes["examples"].features):
            features[_EXAMPLE] = index
        super().__init__(**attributes)
        if self._flags["maps"]:  # other implementations never have the whole map
            for model in (attributes["model"], teacher.model):
                model.set_attn_implementation("eager")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As `transformers.Trainer` calls it: the loss of a part of a batch, which add up to the whole's."""
        examples, labels = inputs.pop(_EXAMPLE).tolist(), inputs.pop("labels")
        outputs = model(**inputs, **flags_of(**self._flags))
        taught = self._teacher.outputs(inputs, examples, **self._flags)
        options = self._options
        loss = (1 - options.soft_weight) * self._loss(outputs, labels, num_items_in_batch)
        if options.soft_weight:
            soft = soft_loss(self._task, outputs, taught.logits, labels, inputs, options.soft_temperature)
            count = (
                (labels != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            )
            loss = loss + options.soft_weight * soft / count
        if any(self._flags.values()):
            loss = loss + layer_loss(outputs, taught, inputs["attention_mask"], options) / options.batch_size
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over them
        loss = without_blank(loss, labels)
        return (loss, outputs) if return_outputs else loss

    def _collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        plain = [{name: value for name, value in one.items() if name != _EXAMPLE} for one in features]
        return {**super()._collate(plain), _EXAMPLE: torch.tensor([one[_EXAMPLE] for one in features])}


def soft_loss(
    task: Task,
    outputs: Any,
    taught: Tensor,
    labels: Tensor,
    inputs: Mapping[str, Tensor],
    temperature: float,
) -> Tensor:
    """A sum over all that is learned: T² KL(teacher || student) of probabilities at temperature T, which
    keeps gradients as large as those of labels; of numbers, and of embeddings of length 1, squared errors.

    Args:
        outputs: of the student.
        taught: the teacher's logits, in the shape of the student's.
        labels: of the batch; what they ignore is not learned from the teacher either.
        inputs: the batch, of which the mask is looked at.
    """
    logits = logits_of(outputs).float()
    if isinstance(task, Embedding):
        difference = functional.normalize(logits, dim=-1) - functional.normalize(taught, dim=-1)
        return (difference**2).sum()
    problem = task.problem if isinstance(task, TextClassification) else None
    if problem == "regression":
        return ((logits - taught) ** 2).sum()
    if problem == "multi-label":
        target = torch.sigmoid(taught / temperature)
        total = functional.binary_cross_entropy_with_logits(logits / temperature, target, reduction="sum")
        return temperature**2 * total
    if isinstance(task, QuestionAnswering):  # where an answer starts and ends, among the tokens of a row
        is_padding = inputs["attention_mask"] == 0
        student, teacher = (each.masked_fill(is_padding[..., None], _FAR_BELOW) for each in (logits, taught))
        return _divergence(student.transpose(1, 2), teacher.transpose(1, 2), temperature).sum()
    if isinstance(task, Generation) and not task.is_encoder_decoder:
        logits, taught, labels = logits[:, :-1], taught[:, :-1], labels[:, 1:]
    divergences = _divergence(logits, taught, temperature)
    return divergences[labels != IGNORED].sum() if labels.shape == divergences.shape else divergences.sum()


def _divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(taught / T) || softmax(logits / T)) over the last dimension."""
    terms = functional.kl_div(
        (logits / temperature).log_softmax(dim=-1),
        (taught / temperature).log_softmax(dim=-1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * terms.sum(dim=-1)


def layer_loss(outputs: Any, taught: TeacherOutputs, mask: Tensor, options: TuneOptions) -> Tensor:
    """A sum over rows: of each, the mean squared error of hidden states, and of attention maps, of its
    tokens. A layer of the student is held to the one of the teacher that `layer_map` says, or to the last of
    as many as there are for each.

    Raises:
        OptionError: a map of another length, or beyond the teacher's layers.
        UnsupportedError: layers of another width, or with other heads.
    """
    total = torch.zeros((), device=mask.device)
    weights = mask.float()
    if options.hidden_weight:
        pairs = _pairs(outputs["hidden_states"][1:], taught.hidden_states[1:], options.layer_map)
        _check_shapes(pairs, "hidden_weight", "as wide as the student's")
        errors = [((student - teacher) ** 2).mean(dim=-1) for student, teacher in pairs]  # [rows, tokens]
        by_row = [(each * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1) for each in errors]
        total = total + options.hidden_weight * torch.stack(by_row).mean(dim=0).sum()
    if options.attention_weight:
        pairs = _pairs(outputs["attentions"], taught.attentions, options.layer_map)
        _check_shapes(pairs, "attention_weight", "with as many heads as the student's")
        both = weights[:, :, None] * weights[:, None, :]  # [rows, tokens, tokens]
        by_row = [
            (((student - teacher) ** 2).mean(dim=1) * both).sum(dim=(1, 2))
            / both.sum(dim=(1, 2)).clamp(min=1)
            for student, teacher in pairs
        ]
        total = total + options.attention_weight * torch.stack(by_row).mean(dim=0).sum()
    return total


def _pairs(
    student: Seq[Tensor], teacher: Seq[Tensor], layer_map: Seq[int] | None
) -> list[tuple[Tensor, Tensor]]:
    chosen = layer_map or [
        -(-(index + 1) * len(teacher) // len(student)) - 1 for index in range(len(student))
    ]
    if len(chosen) != len(student) or not all(0 <= index < len(teacher) for index in chosen):
        raise OptionError(
            f"layer_map={list(chosen)} does not fit {len(student)} layers that learn from {len(teacher)}",
            hint=f"name a layer of the teacher, 0 to {len(teacher) - 1}, for each of the student's",
            option="layer_map",
        )
    return [(own, teacher[index]) for own, index in zip(student, chosen, strict=True)]


def _check_shapes(pairs: Seq[tuple[Tensor, Tensor]], option: str, needed: str) -> None:
    student, teacher = pairs[0]
    if student.shape != teacher.shape:
        raise UnsupportedError(
            f"{option} needs layers of the teacher that are {needed}: {tuple(student.shape)} beside"
            f" {tuple(teacher.shape)}",
            hint=f"leave {option} out",
        )
