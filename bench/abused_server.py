"""The server of serve_abuse.py: as `fastserve serve` makes it, and it takes commands on standard input.

A line each: `policy NAME` changes the policy, `state` has it tell what it holds. A line answers each.
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
from fastserve.serve.options import ServeOptions
from fastserve.serve.run import bind, serve


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
    llm = AsyncLLM(arguments.model, engine, name="abused")
    app = create_app([llm], options, keys=ApiKeys.load(options))

    def announce(url: str) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=obey, args=(llm, loop), daemon=True).start()
        print(json.dumps({"url": url, "model": llm.name}), flush=True)

    serve(app, options, listener=bind(options), tls=None, announce=announce)


def obey(llm: AsyncLLM, loop: asyncio.AbstractEventLoop) -> None:
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        work = llm.set_policy(argument) if command == "policy" else tell_state(llm)
        answer = asyncio.run_coroutine_threadsafe(work, loop).result()
        print(json.dumps(answer), flush=True)


async def tell_state(llm: AsyncLLM) -> dict[str, Any]:
    gc.collect()
    status = await llm.status()
    return {
        "policy": status.policy,
        "sequences": status.num_waiting + status.num_resident + status.num_slow,
        "blocks_owned": status.num_blocks - status.num_free_blocks,
        "slow_blocks_used": status.num_slow_blocks_used,
        "tasks": len(asyncio.all_tasks()),
        "preemptions": status.num_preemptions,
        "refused": status.num_refused,
        "expired": status.num_expired,
    }


if __name__ == "__main__":
    main()
