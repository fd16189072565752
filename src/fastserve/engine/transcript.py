"""What one completion has come to: its text as its tokens arrive, their log-probabilities, its times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self

from fastserve.engine.completion import Chunk, Completion, FinishReason, TokenLogprobs
from fastserve.engine.sequence import Sequence
from fastserve.engine.text import CompletionText, MakeDecoder
from fastserve.types import SamplingParams


@dataclass(slots=True, eq=False, kw_only=True)
class Transcript:
    """Of one sequence. Its chunks' texts joined are the completion's text."""

    request_id: int
    request_name: str  # what its caller calls the request
    index: int  # among the completions of its request
    sequence: Sequence
    text: CompletionText
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on
    first_token_seconds: float | None = None
    told_service_seconds: float = 0.0  # by the chunks so far

    @classmethod
    def begin(
        cls, sequence: Sequence, request_id: int, index: int, request_name: str, make_decoder: MakeDecoder
    ) -> Self:
        """Of a sequence that has no token yet."""
        params = sequence.params
        prompt_ids = () if sequence.source else sequence.token_ids[: sequence.num_prompt_tokens]
        return cls(
            request_id=request_id,
            request_name=request_name,
            index=index,
            sequence=sequence,
            text=CompletionText(
                make_decoder(skip_special_tokens=params.skip_special_tokens),
                params.stop,
                prompt_ids=prompt_ids,
            ),
        )

    def untold_service_seconds(self) -> float:
        """What its sequence has been served and no chunk has told. It counts as told from here on."""
        told, self.told_service_seconds = self.told_service_seconds, self.sequence.service_seconds
        return self.sequence.service_seconds - told

    def chunk(
        self, text: str, *, token_id: int | None, completion: Completion | None, is_first: bool = False
    ) -> Chunk:
        """The chunk of the newest token, or, without a token, the last one."""
        self.texts.append(text)
        has_logprobs = token_id is not None and self.logprobs
        return Chunk(
            request_id=self.request_id,
            token_id=token_id,
            text=text,
            logprobs=self.logprobs[-1] if has_logprobs else None,
            completion=completion,
            index=self.index,
            prompt_logprobs=tuple(self.prompt_logprobs) if is_first and self.prompt_logprobs else None,
            service_seconds=self.untold_service_seconds(),
        )

    def tell(self, now: float, is_stop_token: Callable[[int, SamplingParams], bool]) -> Iterator[Chunk]:
        """The chunks of a completion all of whose tokens are known."""
        sequence, self.first_token_seconds = self.sequence, now
        tokens = sequence.token_ids[sequence.num_prompt_tokens :]
        for number, token_id in enumerate(tokens, 1):
            is_stop = is_stop_token(token_id, sequence.params)
            text = "" if is_stop else self.text.push(token_id)
            completion = None
            if number == len(tokens):
                text += self.text.finish()
                completion = self.complete(text, "stop" if is_stop else "length", now)
            yield self.chunk(text, token_id=token_id, completion=completion, is_first=number == 1)

    def complete(
        self,
        last_text: str,
        finish_reason: FinishReason,
        now: float,
        *,
        error: str | None = None,
        has_expired: bool = False,
    ) -> Completion:
        """The whole of it, once its last token and text are known."""
        sequence = self.sequence
        first_token_seconds = now if self.first_token_seconds is None else self.first_token_seconds
        decode_seconds = now - first_token_seconds
        return Completion(
            text="".join((*self.texts, last_text)),
            token_ids=tuple(sequence.token_ids[sequence.num_prompt_tokens :]),
            finish_reason=finish_reason,
            prompt_tokens=sequence.num_given_tokens,
            cached_tokens=sequence.num_reused_tokens,
            seed=sequence.seed,
            logprobs=None if sequence.params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if sequence.params.prompt_logprobs is None else tuple(self.prompt_logprobs),
            queue_seconds=(now if sequence.start_seconds is None else sequence.start_seconds)
            - sequence.arrival_seconds,
            total_seconds=now - sequence.arrival_seconds,
            time_to_first_token_seconds=first_token_seconds - sequence.arrival_seconds,
            decode_tokens_per_second=(
                (sequence.num_completion_tokens - 1) / decode_seconds if decode_seconds > 0 else None
            ),
            service_seconds=sequence.service_seconds,
            index=self.index,
            stop_string=self.text.stop_string,
            error=error,
            has_expired=has_expired,
        )
