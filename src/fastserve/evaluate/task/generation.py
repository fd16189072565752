"""Texts that a model writes: language modelling, dialogue, translation, summarization."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

from fastserve.checkpoint.chat_template import render_chat
from fastserve.errors import DataError, OptionError, TemplateError
from fastserve.evaluate.task.task import IGNORED, Examples, Features, Prediction, Row, Scores, place_of
from fastserve.evaluate.text_overlap import overlap_metrics
from fastserve.types import Float32Array, JsonObject

GenerationName = Literal["causal-lm", "dialogue", "translation", "summarization"]

INSTRUCTIONS = {
    "translation": "Translate the text into the other language.",
    "summarization": "Summarize the text in one sentence.",
}
_WITH_SOURCE = ("translation", "summarization")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """`{"text"}`, `{"messages": [{"role", "content"}]}` or `{"source", "target"}`.

    Of a plain text all tokens are learned; it is cut into pieces of `max_length`. Of messages only what the
    assistant says, as the model's chat template writes it. A source becomes a user's message, with
    `instruction` before it, and its target the answer; where a model has no template, they are lines. An
    encoder-decoder reads the source, after `instruction` where one is set, and writes the target, beginning
    from `decoder_start`, which is the pad token where a model names none (T5, arXiv 1910.10683, section 2.1).

    While a model learns it is scored by the loss of a token and `perplexity`, its exponential; texts that it
    wrote (`prediction["text"]`) are scored against the targets.
    """

    name: GenerationName
    max_length: int
    instruction: str | None = None
    is_encoder_decoder: bool = False
    decoder_start: int | None = None

    labels = ()

    @property
    def model_class(self) -> str:
        return "ForSeq2SeqLM" if self.is_encoder_decoder else "ForCausalLM"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("perplexity", "loss")

    def encode(self, rows: Seq[Row], tokenizer: Any, *, with_labels: bool) -> Examples:
        if self.is_encoder_decoder and self.name not in _WITH_SOURCE:
            raise OptionError(f"{self.name} takes a decoder", hint="choose translation or summarization")
        examples = Examples()
        for index, row in enumerate(rows):
            if self.is_encoder_decoder:
                self._add_pair(index, row, tokenizer, examples)
            elif self.name == "causal-lm" and "text" in row:
                self._add_text(index, row, tokenizer, examples)
            else:
                self._add_messages(index, row, tokenizer, examples)
        return examples

    def decode(self, rows: Seq[Row], examples: Examples, logits: Seq[Float32Array]) -> list[Prediction]:
        """Of each row the sum of its tokens' losses, and their number; `logits` are these of each example."""
        predictions: list[Prediction] = [{"loss_sum": 0.0, "num_tokens": 0} for _ in rows]
        for index, (loss_sum, num_tokens) in zip(examples.row_index, logits, strict=True):
            predictions[index]["loss_sum"] += float(loss_sum)
            predictions[index]["num_tokens"] += int(num_tokens)
        return predictions

    def score(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        metrics = {}
        if predictions and "loss_sum" in predictions[0]:
            num_tokens = sum(prediction["num_tokens"] for prediction in predictions)
            loss = sum(prediction["loss_sum"] for prediction in predictions) / max(num_tokens, 1)
            metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if predictions and "text" in predictions[0]:
            targets = [self.target_of(row) for row in rows]
            metrics |= overlap_metrics([prediction["text"] for prediction in predictions], targets)
        return Scores(metrics)

    def config(self) -> JsonObject:
        return {}

    def settings(self) -> JsonObject:
        told = {} if self.told is None else {"instruction": self.told}
        # Not `max_length`: a text that is generated may be longer than what was learned from.
        return {"example_length": self.max_length, **told}

    @property
    def told(self) -> str | None:
        """The instruction before a source: the one that is set, or, for a decoder, the task's own."""
        if self.instruction is not None or self.is_encoder_decoder:
            return self.instruction
        return INSTRUCTIONS.get(self.name)

    def messages_of(self, row: Row) -> list[dict[str, str]]:
        """What is said in a row, answers included."""
        if "messages" in row:
            return list(row["messages"])
        source = {"role": "user", "content": f"{self.told}\n\n{row['source']}".strip()}
        return [source, {"role": "assistant", "content": row["target"]}]

    def source_of(self, row: Row) -> str:
        """What an encoder-decoder reads of a row."""
        return f"{self.told or ''} {row['source']}".strip()

    def target_of(self, row: Row) -> str:
        """What is to be written for a row: its target, or the last that the assistant says."""
        if "target" in row:
            return str(row["target"])
        if "messages" in row:
            return str(row["messages"][-1]["content"])
        return str(row["text"])

    def _add_text(self, index: int, row: Row, tokenizer: Any, examples: Examples) -> None:
        ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        for start in range(0, len(ids), self.max_length):
            piece = ids[start : start + self.max_length]
            if len(piece) > 1:  # of one token nothing is predicted
                examples.add(index, _features(piece, list(piece)))

    def _add_messages(self, index: int, row: Row, tokenizer: Any, examples: Examples) -> None:
        text, answers = render(self.messages_of(row), tokenizer, place_of(row))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        labels = [
            token if any(start < e and end > s for s, e in answers) and end > start else IGNORED
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        if len(labels) > self.max_length:
            examples.num_cut += 1
            labels = labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{place_of(row)}: no answer is within the first {self.max_length} tokens",
                hint="raise --max-length, or leave the row out",
            )
        examples.add(index, _features(encoded["input_ids"][: self.max_length], labels))

    def _add_pair(self, index: int, row: Row, tokenizer: Any, examples: Examples) -> None:
        source, target = (
            tokenizer(text, verbose=False)["input_ids"] for text in (self.source_of(row), row["target"])
        )
        if not target or target[-1] != tokenizer.eos_token_id:
            target = [*target, tokenizer.eos_token_id]
        examples.num_cut += max(len(source), len(target)) > self.max_length
        target = target[: self.max_length]
        features = _features(source[: self.max_length], target)
        start = tokenizer.pad_token_id if self.decoder_start is None else self.decoder_start
        features["decoder_input_ids"] = [start, *target[:-1]]
        examples.add(index, features)


def render(messages: Seq[dict[str, str]], tokenizer: Any, place: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the chat template writes it, and where in it the assistant's answers are, with what
    ends them; without a template a line each.

    Raises:
        DataError: nothing is said by the assistant, or the template refuses the messages.
    """
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{place}: no message is the assistant's", hint="give an answer to learn")
    if tokenizer.chat_template is None:
        return _lines(messages, tokenizer.eos_token)
    answers = []
    whole = ""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _template(messages[:number], tokenizer, place, opens=True)
            whole = _template(messages[: number + 1], tokenizer, place, opens=False)
            if not whole.startswith(before):
                raise DataError(
                    f"{place}: the chat template writes an answer otherwise than it is asked for",
                    hint="tune with another template, or give the text itself to causal-lm",
                )
            answers.append((len(before), len(whole)))
    return whole, answers


def _template(messages: Seq[dict[str, str]], tokenizer: Any, place: str, *, opens: bool) -> str:
    try:
        return render_chat(
            tokenizer.chat_template,
            list(messages),
            special_tokens=tokenizer.special_tokens_map,
            add_generation_prompt=opens,
        )
    except TemplateError as error:
        raise DataError(f"{place}: {error.message}", hint=error.hint) from error


def _lines(messages: Seq[dict[str, str]], end: str) -> tuple[str, list[tuple[int, int]]]:
    text, answers = "", []
    for message in messages:
        start = len(text)
        if message["role"] == "assistant":
            text += f"{message['content']}{end}"
            answers.append((start, len(text)))
        else:
            text += f"{message['content']}\n"
    return text, answers


def _features(input_ids: list[int], labels: list[int]) -> Features:
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}
