"""What a step's results become: tokens of the completions that are not finished, chunks of their texts, and,
where one has ended, the whole of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import accumulate, chain

from fastserve.engine.admission import Admission
from fastserve.engine.beam_search import BeamSearch, Hypothesis
from fastserve.engine.beams import Beams
from fastserve.engine.completion import NO_ALLOWED_TOKEN, NO_BEAM, NO_TOKEN, Chunk, TokenLogprobs
from fastserve.engine.schedule import Scheduler
from fastserve.engine.sequence import Sequence
from fastserve.engine.text import MakeDecoder
from fastserve.engine.transcript import Transcript
from fastserve.engine.turn import Turn
from fastserve.types import SamplingParams, StepResult


class Emitter:
    """Keeps the transcripts of the requests that run; who has ended, scheduler and admission forget.

    Args:
        eos_token_ids: tokens that end a completion, unless its parameters ignore them.
        make_decoder: a fresh decoder for each sequence's text.
        next_id: of a sequence, for beams that branch.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        admission: Admission,
        *,
        eos_token_ids: Collection[int],
        make_decoder: MakeDecoder,
        next_id: Iterator[int],
    ) -> None:
        self._scheduler = scheduler
        self._admission = admission
        self._eos_token_ids = frozenset(eos_token_ids)
        self._make_decoder = make_decoder
        self._next_id = next_id
        self._transcripts: dict[int, Transcript] = {}  # by sequence_id
        self._requests: dict[int, list[Transcript]] = {}  # by request_id: of its unfinished completions
        self._beams: dict[int, Beams] = {}  # by request_id

    @property
    def request_names(self) -> Mapping[int, str]:
        """What a snapshot calls the request of a sequence, by sequence_id."""
        return {id_: t.request_name or str(t.request_id) for id_, t in self._transcripts.items()}

    def take_in(
        self, request_id: int, sequences: Seq[Sequence], *, name: str, search: BeamSearch | None
    ) -> None:
        """Begin the completions of a request, one a sequence; with a `search`, its first beam."""
        for index, sequence in enumerate(sequences):
            self._add(Transcript.begin(sequence, request_id, index, name, self._make_decoder))
        if search is not None:
            self._beams[request_id] = Beams(search, list(sequences))

    def is_running(self, request_id: int) -> bool:
        """Whether it has completions that are not finished."""
        return request_id in self._requests

    def drop(self, request_id: int) -> float:
        """End a request without a word. Returns seconds of service that it has had and no chunk has told."""
        beams = self._beams.pop(request_id, None)
        seconds = 0.0 if beams is None else beams.service_seconds
        for transcript in list(self._requests.get(request_id, ())):
            seconds += transcript.untold_service_seconds()
            self._finish(transcript)
        return seconds

    def hold(self, request_id: int, now: float, *, is_held: bool) -> None:
        """Give a request no turns until it is let go again."""
        if request_id in self._beams:
            self._beams[request_id].hold(now, is_held=is_held)
            return
        for transcript in self._requests.get(request_id, ()):
            transcript.sequence.hold(now, is_held=is_held)

    def emit(self, turns: Seq[Turn], result: StepResult, now: float) -> list[Chunk]:
        """The chunks of all tokens that these turns have chosen."""
        starts = accumulate((turn.num_outputs for turn in turns), initial=0)
        emitted = (self._emit_turn(t, result, row, now) for t, row in zip(turns, starts, strict=False))
        return list(chain.from_iterable(emitted))

    def fail(self, request_id: int, error: str, now: float, *, has_expired: bool = False) -> list[Chunk]:
        """The last chunks of a request that cannot go on."""
        return list(self._fail_all(self._requests[request_id], error, now, has_expired=has_expired))

    def fail_sequences(self, sequences: Iterable[Sequence], error: str, now: float) -> list[Chunk]:
        """The last chunks of completions that cannot go on; with one beam its search ends."""
        return list(self._fail_all([self._transcripts[s.sequence_id] for s in sequences], error, now))

    def request_of(self, sequence: Sequence) -> int:
        return self._transcripts[sequence.sequence_id].request_id

    def check_invariants(self, sequence_ids: Collection[int]) -> None:
        """Assert that there is a transcript of each of these sequences, and no other."""
        assert set(sequence_ids) == self._transcripts.keys()
        assert sum(map(len, self._requests.values())) == len(sequence_ids)
        assert self._beams.keys() <= self._requests.keys()

    def _add(self, transcript: Transcript) -> None:
        self._transcripts[transcript.sequence.sequence_id] = transcript
        self._requests.setdefault(transcript.request_id, []).append(transcript)

    def _emit_turn(self, turn: Turn, result: StepResult, first_row: int, now: float) -> Iterator[Chunk]:
        """The chunks of a turn's new tokens: one for each output, and one more for each draft that is right.

        A draft's row says what follows it, which holds as long as it is itself the token that its sequence
        has got; what wrong ones have left in the blocks is overwritten.
        """
        if turn.num_scored and not self._keep_scores(turn, result, first_row):
            request_id = self.request_of(turn.sequence)
            yield from self._fail_all(self._requests[request_id], NO_TOKEN, now)
            return
        if turn.outputs and turn.sequence.num_candidates:
            yield from self._advance_beams(turn.sequence, result, first_row, now)
            return
        if turn.sequence.is_read_only:
            if not turn.sequence.num_uncomputed_tokens:
                yield from self._end_read_only(turn.sequence, now)
            return
        first_row += turn.num_scored
        for row, sequence in enumerate(turn.outputs, first_row):
            chunk = self._emit(sequence, result, row, now)
            yield chunk
        for row, draft in enumerate(turn.drafts, first_row + len(turn.outputs)):
            if chunk.completion is not None or chunk.token_id != draft:
                return
            self._scheduler.accept(turn.sequence)
            chunk = self._emit(turn.sequence, result, row, now)
            yield chunk

    def _advance_beams(self, sequence: Sequence, result: StepResult, row: int, now: float) -> Iterator[Chunk]:
        """A beam has come to its next token. Where all have, they go on, or the search is over: then come the
        chunks of all its completions."""
        transcript = self._transcripts.get(sequence.sequence_id)
        if transcript is None:  # its request has failed by another beam
            return
        assert result.is_valid is not None
        if not result.is_valid[row]:
            yield from self._fail_all([transcript], NO_TOKEN, now)
            return
        beams = self._beams[transcript.request_id]
        logprobs = read_logprobs(result, row, num_top=sequence.num_candidates)
        change = beams.take(sequence, logprobs, self._next_id.__next__, now)
        if change is None:
            return
        if change.is_over:
            yield from self._end_beams(transcript.request_id, now)
            return
        for parent, child in change.new:
            self._scheduler.branch(parent, child, now)
            self._add(
                Transcript.begin(
                    child,
                    transcript.request_id,
                    transcript.index,
                    transcript.request_name,
                    self._make_decoder,
                )
            )
        for beam in change.lost:
            self._finish(self._transcripts[beam.sequence_id])

    def _end_beams(
        self, request_id: int, now: float, *, error: str | None = None, has_expired: bool = False
    ) -> Iterator[Chunk]:
        """The chunks of what a search has found; with an `error`, of as many completions that have none."""
        beams, transcripts = self._beams.pop(request_id), list(self._requests[request_id])
        name, params = transcripts[0].request_name, transcripts[0].sequence.params
        found = beams.search.best(params.n) if error is None else []
        if not found:
            found, error = [Hypothesis(0.0, ())], error or NO_BEAM
        found += found[-1:] * (params.n - len(found))  # where a model's rules leave nothing else
        for index, hypothesis in enumerate(found):
            sequence = beams.completed(hypothesis, seed=(beams.sequences[0].seed + index) % 2**64)
            told = Transcript.begin(sequence, request_id, index, name, self._make_decoder)
            if error is None:
                yield from told.tell(now, self._is_stop_token)
            else:
                failure = told.complete("", "error", now, error=error, has_expired=has_expired)
                yield told.chunk("", token_id=None, completion=failure)
        for transcript in transcripts:
            self._finish(transcript)

    def _keep_scores(self, turn: Turn, result: StepResult, first_row: int) -> bool:
        """Take down the logprobs of a turn's tokens of the prompt; whether they are numbers."""
        assert result.is_valid is not None
        sequence = turn.sequence
        num_top = sequence.params.prompt_logprobs or 0
        rows = range(first_row, first_row + turn.num_scored)
        transcript = self._transcripts[sequence.sequence_id]
        transcript.prompt_logprobs += (read_logprobs(result, row, num_top=num_top) for row in rows)
        sequence.num_scored_tokens += turn.num_scored
        return bool(result.is_valid[rows.start : rows.stop].all())

    def _emit(self, sequence: Sequence, result: StepResult, row: int, now: float) -> Chunk:
        """The chunk of a sequence's new token, which is the result's row; finishes the sequence with its
        last."""
        transcript = self._transcripts[sequence.sequence_id]
        assert result.token_ids is not None
        assert result.is_valid is not None
        guide = sequence.guide
        if guide is not None and guide.error is not None:
            return self._fail(transcript, f"its constraint cannot be followed further: {guide.error}", now)
        if not result.is_valid[row]:
            return self._fail(transcript, NO_TOKEN if guide is None else NO_ALLOWED_TOKEN, now)
        token_id = int(result.token_ids[row])
        sequence.token_ids.append(token_id)
        is_first = transcript.first_token_seconds is None
        if is_first:
            transcript.first_token_seconds = now
        if sequence.params.logprobs is not None:
            transcript.logprobs.append(read_logprobs(result, row, num_top=sequence.params.logprobs))
        is_stop_token = self._is_stop_token(token_id, sequence.params)
        text = "" if is_stop_token else transcript.text.push(token_id)
        is_stop = is_stop_token or transcript.text.has_stopped
        if guide is not None and not is_stop:
            guide.advance(token_id)
            is_stop = guide.is_over
        is_full = sequence.num_completion_tokens == sequence.max_tokens
        completion = None
        if is_stop or is_full:
            text += transcript.text.finish()
            completion = transcript.complete(text, "stop" if is_stop else "length", now)
            sequence.is_complete = True
            self._finish(transcript)
        return transcript.chunk(text, token_id=token_id, completion=completion, is_first=is_first)

    def _end_read_only(self, sequence: Sequence, now: float) -> Iterator[Chunk]:
        """The prompt of a request without completion tokens is read: all its completions end, empty. They
        teach nothing of lengths, so their sequences do not count as complete."""
        for transcript in list(self._requests[self.request_of(sequence)]):
            completion = transcript.complete("", "length", now)
            self._finish(transcript)
            yield transcript.chunk("", token_id=None, completion=completion, is_first=True)

    def _fail_all(
        self, transcripts: Iterable[Transcript], error: str, now: float, *, has_expired: bool = False
    ) -> Iterator[Chunk]:
        """The last chunks of completions that cannot go on; with one beam the search ends."""
        for transcript in list(transcripts):
            if transcript.request_id in self._beams:
                yield from self._end_beams(transcript.request_id, now, error=error, has_expired=has_expired)
            elif transcript.sequence.sequence_id in self._transcripts:
                yield self._fail(transcript, error, now, has_expired=has_expired)

    def _fail(self, transcript: Transcript, error: str, now: float, *, has_expired: bool = False) -> Chunk:
        """The last chunk of a completion that cannot go on."""
        text = transcript.text.finish()
        completion = transcript.complete(text, "error", now, error=error, has_expired=has_expired)
        self._finish(transcript)
        return transcript.chunk(text, token_id=None, completion=completion)

    def _finish(self, transcript: Transcript) -> None:
        sequence = transcript.sequence
        self._scheduler.finish(sequence)
        del self._transcripts[sequence.sequence_id]
        unfinished = self._requests[transcript.request_id]
        unfinished.remove(transcript)
        if not unfinished:
            del self._requests[transcript.request_id]
            self._admission.forget(transcript.request_id)

    def _is_stop_token(self, token_id: int, params: SamplingParams) -> bool:
        is_eos = token_id in self._eos_token_ids and not params.ignore_eos
        return is_eos or token_id in params.stop_token_ids


def read_logprobs(result: StepResult, row: int, *, num_top: int) -> TokenLogprobs:
    """The log-probabilities of one output row."""
    assert result.token_ids is not None
    assert result.logprobs is not None
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        assert result.top_token_ids is not None
        assert result.top_logprobs is not None
        ids, logprobs = result.top_token_ids[row, :num_top], result.top_logprobs[row, :num_top]
        top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
    return TokenLogprobs(int(result.token_ids[row]), float(result.logprobs[row]), top)
