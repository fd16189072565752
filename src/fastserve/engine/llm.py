"""`LLM`: a model in this process, from Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

from fastserve.config import (
    MOST_GAP_SECONDS,
    PRIORITY_CLASSES,
    Backend,
    EngineOptions,
    FairShare,
    KvDtype,
    PrefixCache,
    PrefixScope,
    Speculation,
    UnknownTenants,
    WeightsChoice,
)
from fastserve.engine.adapter_table import AdapterTable
from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.encoder import Encoder
from fastserve.engine.engine import Engine
from fastserve.engine.engine_of_model import make_constraint_compiler, make_engine, resolve_draft
from fastserve.engine.guide import ConstraintCompiler
from fastserve.engine.load import load_model
from fastserve.engine.loaded_model import LoadedModel, check_task
from fastserve.engine.policy import parse_policy
from fastserve.engine.policy.work import LengthPredictor
from fastserve.engine.prompt import Message, Prompt, encode_chat, encode_prompt, encode_text
from fastserve.errors import OptionError
from fastserve.hub.resolve import resolve
from fastserve.models.task import Task
from fastserve.types import Float32Array, JsonObject, SamplingParams

_T = TypeVar("_T")


class LLM:
    """A model loaded into this process. Use it from one thread at a time.

    Prompts of one call, and of streams that are open at the same time, are batched continuously. A request's
    completion does not depend on what it was batched with.

    >>> from fastserve import LLM, SamplingParams
    >>> with LLM("smollm2-135m-instruct") as llm:  # doctest: +SKIP
    ...     llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].text

    Args:
        model: a short name, a source, a folder or a .gguf file; see `fastserve models list`.
        offline: open no network connection.
        name: what messages call the model; by default what `model` says.
        task: refuse a model that is not made for it before its weights are read.
        length_predictor: tells requests of one tenant and endpoint apart whose completions differ in length,
            for policies that reckon with it.

    The other arguments are those of `fastserve.config.EngineOptions`; without `target_gap_seconds` steps take
    as many tokens of prompts as there is room for.

    Raises:
        ModelNotFoundError, DownloadError, OfflineError: there is no such model, or it could not be fetched.
        CheckpointError, UnsupportedError: it cannot be read, has something that we do not compute, or is not
            made for `task`.
        OptionError, ContextLengthError: an option is out of range.
        MemoryLimitError: it needs more memory than there is.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        weights: WeightsChoice = "auto",
        kv_dtype: KvDtype = "f16",
        threads: int | None = None,
        context_length: int | None = None,
        backend: Backend = "native",
        device: str | None = None,
        max_batch_tokens: int | None = None,
        max_sequences: int = 64,
        kv_memory: int | str | None = None,
        kv_spill: int | str | None = None,
        spill_dir: str | Path | None = None,
        policy: str = "boost",
        prefill_chunk_tokens: int | None = None,
        target_gap_seconds: float | None = None,
        most_slack_seconds: float = 0.1,
        peak_quantile: float = 0.6,
        pause_budget_seconds: float | None = 1.8,
        first_token_seconds: float | None = None,
        prefix_cache: PrefixCache = "lru",
        share_prefixes: PrefixScope = "tenant",
        fair_share: FairShare = "tenant",
        tenant_weights: Mapping[str, float] | None = None,
        unknown_tenants: UnknownTenants = "admit",
        priority_classes: Seq[str] = PRIORITY_CLASSES,
        default_class: str = "standard",
        max_waiting: int | None = None,
        queue_timeout_ms: float | None = None,
        session_idle_seconds: float = 600.0,
        speculation: Speculation = "off",
        max_draft_tokens: int = 8,
        prompt_lookup_min: int = 2,
        prompt_lookup_max: int = 4,
        draft_model: str | Path | None = None,
        draft_weights: WeightsChoice = "auto",
        draft_layers: int | None = None,
        draft_kv_memory: int | str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        max_adapters: int | None = None,
        max_adapter_rank: int = 64,
        offline: bool = False,
        name: str | None = None,
        task: Task | None = None,
        length_predictor: LengthPredictor | None = None,
    ) -> None:
        options = EngineOptions(
            weights=weights,
            kv_dtype=kv_dtype,
            threads=threads,
            context_length=context_length,
            backend=backend,
            device=device,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            kv_memory=kv_memory,
            kv_spill=kv_spill,
            spill_dir=spill_dir,
            policy=policy,
            prefill_chunk_tokens=prefill_chunk_tokens,
            target_gap_seconds=target_gap_seconds,
            most_slack_seconds=most_slack_seconds,
            peak_quantile=peak_quantile,
            pause_budget_seconds=pause_budget_seconds,
            first_token_seconds=first_token_seconds,
            prefix_cache=prefix_cache,
            share_prefixes=share_prefixes,
            fair_share=fair_share,
            tenant_weights=tenant_weights,
            unknown_tenants=unknown_tenants,
            priority_classes=priority_classes,
            default_class=default_class,
            max_waiting=max_waiting,
            queue_timeout_ms=queue_timeout_ms,
            session_idle_seconds=session_idle_seconds,
            speculation=speculation,
            max_draft_tokens=max_draft_tokens,
            prompt_lookup_min=prompt_lookup_min,
            prompt_lookup_max=prompt_lookup_max,
            draft_model=draft_model,
            draft_weights=draft_weights,
            draft_layers=draft_layers,
            draft_kv_memory=draft_kv_memory,
            adapters=adapters,
            max_adapters=max_adapters,
            max_adapter_rank=max_adapter_rank,
        )
        parse_policy(policy)  # before anything is loaded
        self.name = name or str(model)
        path = resolve(model, offline=offline)
        options = resolve_draft(options, offline=offline)
        self._model: LoadedModel | None = load_model(path, options, name=self.name, task=task)
        self._adapter_table: AdapterTable | None = AdapterTable.of(self._model, options, model_name=self.name)
        if target_gap_seconds is None:  # nobody waits between two tokens: steps are as full as they can be
            options = replace(options, target_gap_seconds=MOST_GAP_SECONDS)
        self._engine: Engine | None = None
        self._constraints: ConstraintCompiler | None = None
        self._encoder: Encoder | None = None
        if self._model.task == "generate":
            self._engine = make_engine(self._model, options, length_predictor=length_predictor)
            self._constraints = make_constraint_compiler(self._model)
        elif self._model.task == "embed":
            self._encoder = Encoder(self._model.executable)
        self._inboxes: dict[int, deque[Chunk]] = {}  # by request_id: of those that somebody is reading

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model. Whatever is still streaming ends with an error; closing again does nothing."""
        self._inboxes.clear()
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._encoder = None
        self._adapter_table = None
        self._model = None

    @property
    def model(self) -> LoadedModel:
        """The loaded model, with what the options came to.

        Raises:
            OptionError: this LLM is closed.
        """
        if self._model is None:
            raise self._closed_error()
        return self._model

    def _closed_error(self) -> OptionError:
        return OptionError(f"the model {self.name!r} is closed", hint="make a new LLM")

    @property
    def _adapters(self) -> AdapterTable:
        """Raises OptionError where this LLM is closed."""
        if self._adapter_table is None:
            raise self._closed_error()
        return self._adapter_table

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return self._adapters.names

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter beside the model, in place of one that had its name: what runs goes on as it began.

        >>> llm.load_adapter("legal", "my-adapter")  # doctest: +SKIP
        >>> llm.generate("The party of the first part", adapter="legal")  # doctest: +SKIP

        Raises:
            OptionError, ModelNotFoundError, CheckpointError, UnsupportedError: see `AdapterTable.load`.
        """
        self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises ModelNotFoundError where there is none of that name."""
        self._adapters.unload(name)

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        adapter: str | Seq[str | None] | None = None,
        priority: int | Seq[int] = 0,
        tenant: str | Seq[str] = "",
        endpoint: str = "",
        priority_class: str | None = None,
        timeout_ms: float | None = None,
        session: str = "",
    ) -> list[Completion]:
        """Complete prompts, all in one continuous batch. A single prompt gives a list of one, or of the `n`
        that its parameters ask for; several prompts give theirs one after the other.

        Args:
            params: for all prompts, or one for each; None is greedy until the model stops or the context is
                full.
            adapter: by name, one of those that are loaded, of all prompts, or one for each; None is the model
                itself.
            priority: of all prompts, or one for each: the lower goes first, where the policy looks at it.
            tenant: whose prompts they are, of all, or one for each: tenants share the model fairly, by their
                weights, and prefixes with nobody else, unless the options say otherwise.
            endpoint: what they come by, such as an API or a feature of a program: how long completions become
                is learned apart by tenant and endpoint.
            priority_class: of all prompts: one of the options' classes; None is their default.
            timeout_ms: each is to be complete so long after it is queued; its completion ends with an error
                if not.
            session: of the tenant's program that they belong to, whose requests are charged together: each
                begins with the service that those before it have had. "" is none.

        Raises:
            OptionError: no prompts, an empty one, or not as many `params` as prompts; an argument is out of
                range.
            ConstraintError: a constraint cannot be compiled. Nothing is run then.
            ContextLengthError: a prompt with its `max_tokens` does not fit the context. Nothing is run then.
            QueueFullError, DeadlineError: a prompt is one too many, or cannot be completed in time. Nothing
                is run then.
            UnsupportedError: the model is an encoder.
            ModelNotFoundError: there is no such adapter.
        """
        prompt_list = _to_prompts(prompts)
        params_list = _to_params(params, len(prompt_list))
        priorities = _for_each(priority, int, "priorities", len(prompt_list))
        tenants = _for_each(tenant, str, "tenants", len(prompt_list))
        adapters: list[str | None] = [None] * len(prompt_list)
        if adapter is not None:
            adapters = _for_each(adapter, str, "adapters", len(prompt_list))
        add = partial(
            self._add,
            endpoint=endpoint,
            priority_class=priority_class,
            timeout_ms=timeout_ms,
            session=session,
        )
        request_ids: list[int] = []
        try:
            for prompt, own_params, own_priority, own_tenant, own_adapter in zip(
                prompt_list, params_list, priorities, tenants, adapters, strict=True
            ):
                request_ids.append(
                    add(prompt, own_params, priority=own_priority, tenant=own_tenant, adapter=own_adapter)
                )
            completions = []
            for request_id, prompt_params in zip(request_ids, params_list, strict=True):
                completions += self._read_completions(request_id, prompt_params.n)
            return completions
        finally:
            for request_id in request_ids:
                self._drop(request_id)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str = "",
        endpoint: str = "",
        priority_class: str | None = None,
        timeout_ms: float | None = None,
        session: str = "",
    ) -> Generator[Chunk, None, None]:
        """Complete a prompt token by token; the last chunk carries the whole completion. With `n`
        completions, the chunks of all come mixed, each with its `index`.

        The request begins with the first `next()`. Closing the iterator, or dropping it, aborts the request
        and frees its memory. Takes and raises what `generate` does.
        """
        params = params or SamplingParams()
        request_id = self._add(
            prompt,
            params,
            adapter=adapter,
            priority=priority,
            tenant=tenant,
            endpoint=endpoint,
            priority_class=priority_class,
            timeout_ms=timeout_ms,
            session=session,
        )
        try:
            yield from self._read(request_id, params.n)
        finally:
            self._drop(request_id)

    def chat(
        self,
        messages: Seq[Message],
        params: SamplingParams | None = None,
        *,
        tools: Seq[JsonObject] | None = None,
        variables: JsonObject | None = None,
        adapter: str | None = None,
    ) -> Completion:
        """Answer a conversation, by the model's chat template.

        >>> llm.chat([{"role": "user", "content": "Hello!"}]).text  # doctest: +SKIP

        Args:
            tools: JSON schemas of functions that the model may call, for templates that know of tools.
            variables: what else the template reads, by name, such as `{"enable_thinking": False}`.
            adapter: as of `generate`.

        Raises:
            TemplateError: the model has no chat template, or it failed on these messages.
            ContextLengthError, UnsupportedError: as in `generate`.
        """
        prompt = self.chat_prompt(messages, tools=tools, variables=variables)
        return self.generate([prompt], params, adapter=adapter)[0]

    def stream_chat(
        self,
        messages: Seq[Message],
        params: SamplingParams | None = None,
        *,
        tools: Seq[JsonObject] | None = None,
        variables: JsonObject | None = None,
        adapter: str | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer a conversation token by token. See `chat` and `stream`."""
        prompt = self.chat_prompt(messages, tools=tools, variables=variables)
        yield from self.stream(prompt, params, adapter=adapter)

    def chat_prompt(
        self,
        messages: Seq[Message],
        *,
        tools: Seq[JsonObject] | None = None,
        variables: JsonObject | None = None,
    ) -> list[int]:
        """The token ids of a conversation that is to be answered. Takes and raises what `chat` does."""
        return list(encode_chat(self.model, messages, tools=tools, variables=variables))

    def embed(
        self, texts: str | Seq[str], *, truncate: bool = False, adapter: str | None = None
    ) -> Float32Array:
        """Embed texts with an encoder.

        Returns float32 [texts, width], pooled and normalized as the model says.

        Args:
            truncate: cut texts that are longer than the model's limit, instead of refusing them.
            adapter: as of `generate`.

        Raises:
            ContextLengthError: a text is longer than the model's limit; nothing is run then.
            OptionError: no texts.
            ModelNotFoundError: there is no such adapter.
            UnsupportedError: the model generates text.
        """
        model = self.model
        check_task("embed", model.settings, self.name)
        text_list = [texts] if isinstance(texts, str) else texts
        if not text_list:
            raise OptionError("there are no texts to embed", hint="give at least one")
        assert self._encoder is not None
        served = None if adapter is None else self._adapters.find(adapter)
        return self._encoder.embed(
            [encode_text(model, text, truncate=truncate) for text in text_list], adapter=served
        )

    def _add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        adapter: str | None,
        priority: int,
        tenant: str,
        endpoint: str,
        priority_class: str | None,
        timeout_ms: float | None,
        session: str,
    ) -> int:
        check_task("generate", self.model.settings, self.name)
        assert self._engine is not None
        assert self._constraints is not None
        request_id = self._engine.add(
            encode_prompt(self.model, prompt),
            params,
            priority=priority,
            tenant=tenant,
            endpoint=endpoint,
            priority_class=priority_class,
            timeout_ms=timeout_ms,
            session=session,
            adapter=None if adapter is None else self._adapters.find(adapter),
            guide=None if params.constraint is None else self._constraints.compile(params.constraint),
        )
        self._inboxes[request_id] = deque()
        return request_id

    def _read(self, request_id: int, num_completions: int) -> Iterator[Chunk]:
        """The chunks of one request, running steps for all of them as they are needed."""
        while num_completions:
            while not self._inbox(request_id):
                self._step()
            chunk = self._inbox(request_id).popleft()
            yield chunk
            num_completions -= chunk.completion is not None

    def _read_completions(self, request_id: int, num_completions: int) -> list[Completion]:
        chunks = self._read(request_id, num_completions)
        completions = [chunk.completion for chunk in chunks if chunk.completion is not None]
        return sorted(completions, key=lambda completion: completion.index)

    def _inbox(self, request_id: int) -> deque[Chunk]:
        if request_id not in self._inboxes:
            raise OptionError(
                f"the model {self.name!r} was closed", hint="read a stream before closing its LLM"
            )
        return self._inboxes[request_id]

    def _step(self) -> None:
        assert self._engine is not None
        for chunk in self._engine.step():
            self._inboxes[chunk.request_id].append(chunk)

    def _drop(self, request_id: int) -> None:
        if self._engine is not None:
            self._engine.abort(request_id)
        self._inboxes.pop(request_id, None)


def _to_prompts(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not prompts:
        raise OptionError("there are no prompts", hint="give at least one")
    if isinstance(prompts[0], int):
        return [cast(Seq[int], prompts)]
    return list(cast(Seq[Prompt], prompts))


def _to_params(params: SamplingParams | Seq[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise OptionError(
            f"there are {len(params)} params for {num_prompts} prompts",
            hint="give one, or one for each prompt",
        )
    return list(params)


def _for_each(value: _T | Seq[_T], kind: type[_T], name: str, num_prompts: int) -> list[_T]:
    """A value for every prompt: the same one, or those given."""
    if isinstance(value, kind):
        return [value] * num_prompts
    values = list(cast(Seq[_T], value))
    if len(values) != num_prompts:
        raise OptionError(
            f"there are {len(values)} {name} for {num_prompts} prompts",
            hint="give one, or one for each prompt",
        )
    return values
