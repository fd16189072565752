"""`fastserve serve`: models behind an OpenAI-compatible API."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from fastserve.cli.engine_option import engine_options, pack_options
from fastserve.cli.option import json_option, offline_option
from fastserve.cli.progress_bar import download_progress
from fastserve.cli.report import format_bytes, print_json
from fastserve.config import EngineOptions
from fastserve.errors import OptionError
from fastserve.serve.options import ServeOptions

if TYPE_CHECKING:
    from fastserve.serve.api_keys import ApiKeys
    from fastserve.serve.model_entry import ModelEntry

_MAX_WAITING = 1024

_SERVE_HELP: Mapping[str, str] = {
    "host": "Address to listen at; 0.0.0.0 lets other machines in, and needs API keys.",
    "port": "Port to listen at; 0 takes a free one.",
    "api_keys": "File of the keys that are let in, with their tenants and limits, as `fastserve keys` writes "
    "it; by default the key of FASTSERVE_API_KEY, or none on this machine alone.",
    "tenants": "The same file by another name. It is read again when it has changed.",
    "admin_key_file": "File of the admin key, as `fastserve keys FILE --admin` writes it; without one there "
    "is nothing at /admin.",
    "model_memory": "Memory of all loaded models together, such as 4GiB: they are loaded when they are asked "
    "for, and the least recently used go; by default all are loaded at the start and stay.",
    "pinned": "Model that is loaded at the start and stays; with --model-memory. May be given several times.",
    "model_turn_seconds": "How long a model that is in use lets further requests in while another is waited "
    "for that has no room beside it.",
    "model_drain_seconds": "How long requests of a model that is given up may go on.",
    "model_wait_seconds": "How long a request may wait for its model to be loaded.",
    "allowed_hosts": "Name by which requests may call this machine, besides localhost. May be given several "
    "times.",
    "cors_origins": "Web site whose pages may send requests, such as https://example.com. May be given "
    "several times.",
    "tls_cert": "Certificate and its chain, a PEM file; with --tls-key, it is HTTPS.",
    "tls_key": "Private key of the certificate, a PEM file.",
    "max_body": "Largest body of a request.",
    "max_prompt_tokens": "Longest prompt; by default what the context holds.",
    "max_prompts": "Most prompts or texts of a request.",
    "max_n": "Most completions of a prompt.",
    "max_stops": "Most stop strings of a request, and most of its own stop tokens.",
    "max_logit_biases": "Most tokens with a logit bias.",
    "max_responses": "How many of /v1/responses are kept, in memory.",
    "response_memory": "Most bytes of those together; the oldest go first, of the key that has most.",
    "body_seconds": "How long the head of a request may take to come, and its body.",
    "keep_alive_seconds": "A stream that is silent for so long gets a comment.",
    "write_seconds": "A client that takes nothing for so long is cut off.",
    "drain_seconds": "How long requests may go on after SIGTERM.",
    "ready_seconds": "An engine whose step takes longer is reported as not ready.",
    "log_prompts": "Write prompts and completions to the log, which has neither otherwise.",
    "otel": "Make a span of each request, by OpenTelemetry; its variables, such as "
    "OTEL_EXPORTER_OTLP_ENDPOINT, say where they go. Needs the extra [otel].",
}


@click.command()
@click.argument(
    "models", metavar="NAME_OR_DIR...", nargs=-1, required=True, help="Models, as for `generate`."
)
@pack_options("serve_options", ServeOptions(), _SERVE_HELP)
@engine_options(
    "policy",
    "weights",
    "kv_dtype",
    "threads",
    "context_length",
    "kv_memory",
    "kv_spill",
    "spill_dir",
    "max_sequences",
    "max_batch_tokens",
    "prefill_chunk_tokens",
    "target_gap_seconds",
    "most_slack_seconds",
    "pause_budget_seconds",
    "peak_quantile",
    "first_token_seconds",
    "prefix_cache",
    "share_prefixes",
    "fair_share",
    "tenant_weights",
    "unknown_tenants",
    "priority_classes",
    "default_class",
    "max_waiting",
    "queue_timeout_ms",
    "session_idle_seconds",
    "speculation",
    "max_draft_tokens",
    "prompt_lookup_min",
    "prompt_lookup_max",
    "draft_model",
    "draft_weights",
    "draft_layers",
    "draft_kv_memory",
    "adapters",
    "max_adapters",
    "max_adapter_rank",
    "backend",
    "device",
    defaults=EngineOptions(max_waiting=_MAX_WAITING),
)
@json_option
@offline_option
def serve(
    models: Sequence[str], serve_options: ServeOptions, options: EngineOptions, json: bool, offline: bool
) -> None:
    """Serve models over HTTP, by the API of OpenAI.

    A name that has versions stands for all of them, and answers by the one that is promoted.

    A line on standard output says where, once requests are taken; what happens is logged on standard error, a
    line of JSON each. Ends by Ctrl-C or SIGTERM, after the requests that run.
    """
    from fastserve.engine.heap import share_heap
    from fastserve.engine.policy import parse_policy
    from fastserve.serve.api_keys import ApiKeys
    from fastserve.serve.app import create_app
    from fastserve.serve.log import log_to
    from fastserve.serve.model_loading import find_models
    from fastserve.serve.run import bind, make_tls
    from fastserve.serve.run import serve as run
    from fastserve.serve.security import check_exposure
    from fastserve.serve.tracing import Tracing

    if serve_options.model_memory is not None:
        share_heap()
    keys = ApiKeys.load(serve_options)
    check_exposure(serve_options, keys)  # all that can be wrong, before anything is loaded or fetched
    _check_weights(keys, options)
    parse_policy(options.policy)
    tracing = Tracing.from_environment() if serve_options.otel else None
    tls, listener = make_tls(serve_options), bind(serve_options)
    with download_progress(shown=not json) as progress:
        table = find_models(models, serve_options, options, offline=offline, progress=progress)
    table.set_up()
    app = create_app(table, serve_options, keys=keys, tracing=tracing)
    log_to(sys.stderr)

    def announce(url: str) -> None:
        if json:
            print_json({"url": url, "models": table.names()})
        else:
            access = f"{len(keys)} API keys" if keys else "this machine alone, no API key"
            print(f"serving {', '.join(map(_describe, table.entries))} at {url}/v1 ({access})")
        sys.stdout.flush()

    run(app, serve_options, listener=listener, tls=tls, announce=announce)


def _check_weights(keys: ApiKeys, options: EngineOptions) -> None:
    weighed = next((name for name, terms in keys.table.terms.items() if terms.weight is not None), None)
    if weighed is not None and options.fair_share == "off":
        raise OptionError(
            f"the weight of tenant {weighed!r} has no use with fair_share='off'",
            hint="leave one of the two out",
            option="fair_share",
        )


def _describe(entry: ModelEntry) -> str:
    if entry.model is not None:
        return f"{entry.name} ({entry.model.model.weights}, context {entry.model.model.context_length})"
    return f"{entry.name} (on demand, {format_bytes(entry.num_bytes)})"
