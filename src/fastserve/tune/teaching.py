"""What makes a trainer that learns from the teacher that the options name."""

from __future__ import annotations

from functools import partial

from fastserve.errors import UnsupportedError
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.generation import Generation
from fastserve.evaluate.task.multiple_choice import MultipleChoice
from fastserve.evaluate.task.task import Examples, Task
from fastserve.tune.distillation import DistillingTrainer
from fastserve.tune.logit_cache import keep_logits
from fastserve.tune.options import TuneOptions
from fastserve.tune.run_folder import RunFolder
from fastserve.tune.source_model import SourceModel
from fastserve.tune.teacher import Teacher, open_teacher
from fastserve.tune.teacher_processes import TeacherProcesses


def taught_trainer(
    options: TuneOptions,
    task: Task,
    source: SourceModel,
    examples: Examples,
    folder: RunFolder,
    *,
    is_first: bool,
) -> partial[DistillingTrainer]:
    """A trainer but for the arguments of `TaskTrainer`; what its teacher says of the examples is on the disk
    then, where it is of a size and a kind that are kept.

    Args:
        is_first: of the processes that train.

    Raises:
        UnsupportedError: the teacher cannot be asked so for this task.
        As `open_teacher`, `keep_logits`.
    """
    assert options.teacher is not None
    teaches_layers = bool(options.hidden_weight or options.attention_weight)
    has_targets = isinstance(task, Generation) and task.is_encoder_decoder
    if teaches_layers and (has_targets or isinstance(task, Embedding | MultipleChoice)):
        kind = "encoder-decoders" if has_targets else task.name
        raise UnsupportedError(
            f"hidden_weight and attention_weight are not for {kind}: a row is several texts to the model",
            hint="leave them out: soft_weight compares what comes of all",
        )
    if has_targets and options.teacher_processes > 1:
        raise UnsupportedError(
            "teacher_processes is not for encoder-decoders, whose teacher is asked batch by batch",
            hint="leave it out",
        )
    teacher = open_teacher(options.teacher, task, source)
    # The cache tells an example's logits from padding by its source; a target has a length of its own.
    if not (teaches_layers or has_targets):
        pad = source.tokenizer.pad_token_id
        several = TeacherProcesses(options.teacher_processes, options.teacher, task, examples.features, pad)
        cache = keep_logits(
            teacher.model,
            examples.features,
            folder.path / "teacher",
            pad_token_id=pad,
            compute=several if options.teacher_processes > 1 else None,
            is_first=is_first,
        )
        teacher = Teacher(teacher.model, teacher.columns, cache)
    return partial(DistillingTrainer, teacher=teacher, options=options)
