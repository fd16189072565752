"""The server of serve_abuse.py, as `fastserve serve` makes it.

Each line on its standard input has it tell what it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

from fastserve.config import EngineOptions
from fastserve.engine.async_llm import AsyncLLM
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.model_entry import ModelEntry
from fastserve.serve.model_loading import find_models
from fastserve.serve.options import ServeOptions
from fastserve.serve.run import bind, serve
from fastserve.serve.service import Service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tenants", required=True)
    parser.add_argument("--admin-key-file", required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    # Small, so that requests wait, are preempted, moved and refused.
    engine = EngineOptions(
        threads=arguments.threads,
        kv_memory="1MiB",
        kv_spill="2MiB",
        max_sequences=16,
        max_waiting=24,
    )
    options = ServeOptions(
        port=0,
        tenants=arguments.tenants,
        admin_key_file=arguments.admin_key_file,
        max_body="64KiB",
        body_seconds=1.0,
        write_seconds=2.0,
        keep_alive_seconds=0.5,
    )
    table = find_models([str(arguments.model)], options, engine, offline=True)
    table.set_up()
    app = create_app(table, options, keys=ApiKeys.load(options))
    (entry,) = table.entries

    def announce(url: str) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=obey, args=(entry, app.state.service, loop), daemon=True).start()
        print(json.dumps({"url": url, "model": entry.name}), flush=True)

    serve(app, options, listener=bind(options), tls=None, announce=announce)


def obey(entry: ModelEntry, service: Service, loop: asyncio.AbstractEventLoop) -> None:
    for _ in sys.stdin:
        state = asyncio.run_coroutine_threadsafe(tell_state(entry, service), loop).result()
        print(json.dumps(state), flush=True)


async def tell_state(entry: ModelEntry, service: Service) -> dict[str, Any]:
    """What it holds: of a model that is unloaded, nothing."""
    gc.collect()
    state: dict[str, Any] = {"sequences": 0, "blocks_owned": 0, "slow_blocks_used": 0}
    if isinstance(entry.model, AsyncLLM):
        status = await entry.model.status()
        state = {
            "policy": status.policy,
            "sequences": status.num_waiting + status.num_resident + status.num_slow,
            "blocks_owned": status.num_blocks - status.num_free_blocks,
            "slow_blocks_used": status.num_slow_blocks_used,
            "preemptions": status.num_preemptions,
            "refused": status.num_refused,
            "expired": status.num_expired,
        }
    return {
        **state,
        "tasks": len(asyncio.all_tasks()),
        "loads": entry.num_loads,
        "waiting": len(entry.waiting),
        "requests_under_way": service.num_under_way,
    }


if __name__ == "__main__":
    main()
