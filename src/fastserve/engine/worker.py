"""The one thread that owns an engine. Others give it commands and get events, a list of them for each
step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Thread

from fastserve.engine.adapter import ServedAdapter
from fastserve.engine.completion import Chunk
from fastserve.engine.engine import Engine
from fastserve.engine.guide import Guide
from fastserve.engine.snapshot import EngineSnapshot
from fastserve.engine.status import EngineStatus
from fastserve.errors import FastServeError, StepError
from fastserve.types import SamplingParams

_IDLE_SECONDS = 0.02  # between looks for commands while all requests are held

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """A new request. `ticket` is the caller's name for it."""

    ticket: int
    prompt_ids: Seq[int]
    params: SamplingParams
    priority: int
    tenant: str
    endpoint: str
    priority_class: str | None
    timeout_ms: float | None
    session: str
    arrival_seconds: float
    guide: Guide | None = None  # of the parameters' constraint
    adapter: ServedAdapter | None = None
    name: str = ""  # of the request, in snapshots


@dataclass(frozen=True, slots=True)
class Abort:
    ticket: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Give a request no turns, or turns again."""

    ticket: int
    is_held: bool


@dataclass(frozen=True, slots=True)
class SetPolicy:
    ticket: int
    spec: str


@dataclass(frozen=True, slots=True)
class SetTenantWeights:
    ticket: int
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AskStatus:
    ticket: int


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    ticket: int


Command = Add | Abort | Hold | SetPolicy | SetTenantWeights | AskStatus | AskSnapshot


@dataclass(frozen=True, slots=True)
class Answer:
    """Of an Add that was accepted, a SetPolicy, a SetTenantWeights, or of an AskStatus or AskSnapshot: those
    have values; an error, if it was refused."""

    ticket: int
    error: FastServeError | None = None
    status: EngineStatus | None = None
    snapshot: EngineSnapshot | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A chunk of a request's completions."""

    ticket: int
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Aborted:
    """Of an Abort: the last event of its ticket."""

    ticket: int
    service_seconds: float  # that no chunk has told


@dataclass(frozen=True, slots=True)
class Died:
    """The thread has ended by a defect: nothing more will come."""

    reason: str


EngineEvent = Answer | Progress | Aborted | Died


class EngineWorker:
    """Runs an engine's steps in a thread of its own, as long as there is work.

    Args:
        engine: the thread's own from here on.
        deliver: called in that thread, at most once a step, with all that has happened in it.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[EngineEvent]], None]) -> None:
        self._engine = engine
        self._deliver = deliver
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._tickets: dict[int, int] = {}  # by request_id
        self._request_ids: dict[int, int] = {}  # by ticket
        self._events: list[EngineEvent] = []
        self._is_stopping = Event()
        self.failure: str | None = None  # why the thread has ended, if it should not have
        self.last_step_seconds = time.monotonic()  # when the last step ended, or work came
        self._is_idle = False  # there is nothing to do
        self._thread = Thread(target=self._run, name="fastserve-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def seconds_without_step(self) -> float:
        """How long ago a step has ended, or work came; 0 where there is nothing to do."""
        return 0.0 if self._is_idle else time.monotonic() - self.last_step_seconds

    def send(self, command: Command) -> None:
        """Give a command; never waits. Callers may be many threads."""
        self._commands.put(command)

    def stop(self) -> None:
        """End after the step that runs, and wait for that. Unfinished requests get no more events."""
        self._is_stopping.set()
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_stopping.is_set():
                self._obey()
                if self._engine.has_work:
                    self._forward(self._engine.step())
                self.last_step_seconds = time.monotonic()
                if self._events:
                    events, self._events = self._events, []
                    self._deliver(events)
        except Exception as error:
            logger.exception("the engine's thread has ended")
            self.failure = f"its engine has ended: {type(error).__name__}: {error}"
            self._deliver([Died(self.failure)])
        finally:
            self._engine.close()
            # Whoever keeps this worker for a while more keeps no memory; and who is told has it: a cycle.
            del self._engine
            self._deliver = _to_nobody

    def _obey(self) -> None:
        """All commands that have come. Without work, or while nobody may run, it waits for the next one."""
        command: Command | None
        try:
            if self._events:
                command = self._commands.get_nowait()
            elif not self._engine.has_work:
                self._is_idle = True
                command = self._commands.get()
                self.last_step_seconds = time.monotonic()
                self._is_idle = False
            elif self._engine.is_waiting and not self._engine.is_moving:  # the step has waited for the move
                command = self._commands.get(timeout=_IDLE_SECONDS)
            else:
                command = self._commands.get_nowait()
            while command is not None:
                self._do(command)
                command = self._commands.get_nowait()
        except Empty:
            return

    def _do(self, command: Command) -> None:
        match command:
            case Add():
                self._add(command)
            case Abort(ticket):
                request_id = self._request_ids.pop(ticket, None)
                seconds = 0.0
                if request_id is not None:
                    del self._tickets[request_id]
                    seconds = self._engine.abort(request_id)
                self._events.append(Aborted(ticket, seconds))
            case Hold(ticket, is_held):
                if ticket in self._request_ids:
                    self._engine.hold(self._request_ids[ticket], is_held=is_held)
            case SetPolicy(ticket, spec):
                self._events.append(Answer(ticket, error=_refusal(lambda: self._engine.set_policy(spec))))
            case SetTenantWeights(ticket, weights):
                refusal = _refusal(lambda: self._engine.set_tenant_weights(weights))
                self._events.append(Answer(ticket, error=refusal))
            case AskStatus() | AskSnapshot():
                self._tell(command)

    def _tell(self, command: AskStatus | AskSnapshot) -> None:
        """Of the engine. A defect in that is the asker's alone."""
        answers: list[Answer] = []

        def tell() -> None:
            if isinstance(command, AskStatus):
                answers.append(Answer(command.ticket, status=self._engine.status()))
            else:
                answers.append(Answer(command.ticket, snapshot=self._engine.snapshot()))

        refusal = _refusal(tell)
        self._events.append(answers[0] if refusal is None else Answer(command.ticket, error=refusal))

    def _add(self, command: Add) -> None:
        def add() -> None:
            request_id = self._engine.add(
                command.prompt_ids,
                command.params,
                priority=command.priority,
                tenant=command.tenant,
                endpoint=command.endpoint,
                priority_class=command.priority_class,
                timeout_ms=command.timeout_ms,
                session=command.session,
                arrival_seconds=command.arrival_seconds,
                guide=command.guide,
                adapter=command.adapter,
                name=command.name,
            )
            self._tickets[request_id] = command.ticket
            self._request_ids[command.ticket] = request_id

        self._events.append(Answer(command.ticket, error=_refusal(add)))

    def _forward(self, chunks: Seq[Chunk]) -> None:
        """The chunks of a step, to those who asked."""
        wanted = [chunk for chunk in chunks if chunk.request_id in self._tickets]
        self._events += (Progress(self._tickets[chunk.request_id], chunk) for chunk in wanted)
        for request_id in {chunk.request_id for chunk in wanted if chunk.completion is not None}:
            if not self._engine.is_running(request_id):
                del self._request_ids[self._tickets.pop(request_id)]


def _to_nobody(events: list[EngineEvent]) -> None:
    """Of a thread that has ended."""


def _refusal(act: Callable[[], None]) -> FastServeError | None:
    """The error of what a caller asked for in vain; a defect of ours is the caller's alone too."""
    try:
        act()
    except FastServeError as error:
        return error
    except Exception as error:
        logger.exception("a request could not be taken")
        return StepError(f"the request could not be taken: {type(error).__name__}: {error}")
    return None
