"""`fastserve serve` in a process of its own: real sockets, the official client, signals."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path

import httpx
import openai
import pytest

from fastserve.serve.key_file import add_admin_key, add_key
from serve.process import ServerProcess, serving

pytest.importorskip("fastserve._native")

MODEL = "smollm2-135m-instruct"
MESSAGES = [{"role": "user", "content": "Name three fruits."}]
OPTIONS = ("--threads", "1", "--context-length", "1024", "--kv-memory", "64MiB")


@pytest.fixture(scope="module")
def model(model_dir) -> Path:
    return model_dir(MODEL)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[ServerProcess]:
    with serving(model, tmp_path_factory.mktemp("serve") / "log", *OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def name(server) -> str:
    return httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_lists_models(client, name) -> None:
    assert [model.id for model in client.models.list()] == [name]
    assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'"):
        client.models.retrieve("gpt-5")


def test_the_official_client_chats_whole_and_streamed_alike(client, name) -> None:
    asked = {"model": name, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_official_client_reads_logprobs(client, name) -> None:
    answer = client.chat.completions.create(
        model=name, messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 6
    assert b"".join(bytes(token.bytes) for token in content).decode() == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)  # greedy


def test_the_official_client_completes_several_prompts(client, name) -> None:
    asked = {"model": name, "prompt": ["Gravity is", "The sea is"], "max_tokens": 8, "seed": 3, "n": 2}
    whole = client.completions.create(**asked)
    texts = [""] * 4
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_the_official_client_gets_our_refusals(client, name) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=name, messages=MESSAGES, reasoning_effort="high")
    assert caught.value.param == "reasoning_effort"
    assert caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="the context is 1024"):
        client.completions.create(model=name, prompt=[5] * 1000, max_tokens=100)


def test_other_fields_of_ours_go_through_extra_body(client, name) -> None:
    more = {
        "top_k": 1,
        "ignore_eos": True,
        "priority_class": "interactive",
        "session": "s",
        "timeout_ms": 60_000,
    }
    answer = client.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=5, user="bob", extra_body=more
    )
    assert answer.usage.completion_tokens == 5


def test_the_official_client_gets_calls_and_structures(client, name) -> None:
    schema = {"type": "object", "properties": {"fruit": {"enum": ["apple", "pear"]}}, "required": ["fruit"]}
    function = {"name": "pick", "description": "Picks a fruit.", "parameters": schema}
    asked = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": 60}
    tools = [{"type": "function", "function": function}]
    whole = client.chat.completions.create(
        **asked, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "pick"
    assert json.loads(call.function.arguments)["fruit"] in ("apple", "pear")
    assert whole.choices[0].finish_reason == "tool_calls"
    format_ = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**asked, response_format=format_)
    assert json.loads(answer.choices[0].message.content)["fruit"] in ("apple", "pear")


def test_a_client_that_hangs_up_frees_its_place(server, name) -> None:
    body = {"model": name, "prompt": "Once", "max_tokens": 900, "ignore_eos": True}
    for stream in (True, False):
        content = json.dumps({**body, "stream": stream}).encode()
        with socket.create_connection(server.url.removeprefix("http://").split(":"), 30) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
            )
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            else:
                wait_for(server, "fastserve_sequences", "fast", 1)
        wait_for(server, "fastserve_sequences", "fast", 0)
        wait_for(server, "fastserve_kv_blocks_used", "fast", 0)


def wait_for(server: ServerProcess, metric: str, label: str, value: float) -> None:
    for _ in range(200):
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"{metric}{{") and f'"{label}"' in line]
        if [float(line.rpartition(" ")[2]) for line in found] == [value]:
            return
        time.sleep(0.05)
    raise AssertionError(f"{metric} {label} is not {value}: {found}")


def test_each_request_has_a_line_without_its_text(server, name) -> None:
    secret = "the password is swordfish"
    headers = {"x-request-id": "mine-1"}
    body = {"model": name, "prompt": secret, "max_tokens": 4}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
    assert response.headers["x-request-id"] == "mine-1"
    line = server.line_of("mine-1")
    assert (line["status"], line["path"], line["completion_tokens"]) == (200, "/v1/completions", 4)
    assert line["prompt_tokens"] > 2
    assert "swordfish" not in json.dumps(server.log)


def test_sigterm_lets_requests_end_and_takes_no_more(model, tmp_path) -> None:
    with serving(model, tmp_path / "log", *OPTIONS) as server:
        name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        body = {"model": name, "prompt": "Once", "max_tokens": 120, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert server.process.wait(30) == 0
        assert server.log[-1]["status"] == 200, "there are lines of JSON to the end"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health/live")


def test_requests_that_take_too_long_to_drain_end_with_an_error_event(model, tmp_path) -> None:
    with serving(model, tmp_path / "log", *OPTIONS, "--drain-seconds", "0.2") as server:
        name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        body = {"model": name, "prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            *_, last, _ = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.process.wait(30) == 0


def test_a_server_that_was_killed_starts_clean(model, tmp_path) -> None:
    for _ in range(2):
        with serving(model, tmp_path / "log", *OPTIONS, "--kv-spill", "8MiB") as server:
            name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
            body = {"model": name, "prompt": "Once", "max_tokens": 4}
            thread = threading.Thread(target=lambda b=body, u=server.url: _post_quietly(u, b))
            thread.start()
            server.process.kill()
            thread.join()
    assert not list(tmp_path.glob("*.tmp"))


def _post_quietly(url: str, body: object) -> None:
    with suppress(httpx.HTTPError):
        httpx.post(f"{url}/v1/completions", json=body)


def test_tls_files_make_it_https(model, tmp_path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-keyout",
                key,
                "-out",
                cert,
                *subject,
            ],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("openssl is not here to make a certificate")
    with serving(model, tmp_path / "log", *OPTIONS, "--tls-cert", str(cert), "--tls-key", str(key)) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=cert)
        assert httpx.get(f"{server.url}/health/live", verify=context).status_code == 200


def test_a_port_that_is_taken_is_one_line(model, server, tmp_path) -> None:
    port = server.url.rpartition(":")[2]
    command = ["serve", str(model), "--port", port, *OPTIONS]
    result = _run_fastserve(command)
    assert result.returncode == 2
    assert f"port={port}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_server_for_others_without_a_key_is_refused_before_anything_is_loaded(tmp_path) -> None:
    result = _run_fastserve(["serve", str(tmp_path), "--host", "0.0.0.0"])
    assert result.returncode == 2
    assert "fastserve keys" in result.stderr


def _run_fastserve(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastserve.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_keys_that_are_added_while_it_runs_are_let_in_and_a_mistake_changes_nothing(
    shared_data, tmp_path
) -> None:
    path, admin_path = tmp_path / "keys", tmp_path / "admin"
    alice, admin = add_key(path, "alice"), add_admin_key(admin_path)
    options = ("--tenants", str(path), "--admin-key-file", str(admin_path), "--threads", "1")
    folder = shared_data / "model_stories260K"
    with serving(folder, tmp_path / "log", *options, "--kv-memory", "1MiB") as server:

        def status(key: str, path: str = "/v1/models") -> int:
            return httpx.get(f"{server.url}{path}", headers={"x-api-key": key}).status_code

        def wait_for(event: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 20
            while not event():
                assert time.monotonic() < deadline
                time.sleep(0.05)

        assert status(alice) == 200
        bob = add_key(path, "bob", expires=date(2999, 1, 1))
        wait_for(lambda: status(bob) == 200)
        path.write_text(f"{path.read_text()}carol\n")
        wait_for(lambda: any("line 3" in line["event"] for line in server.log))
        assert [status(key) for key in (alice, bob)] == [200, 200]
        assert status(admin, "/admin/usage.csv") == 200
        assert status(alice, "/admin/usage.csv") == 404
        assert server.terminate() == 0
        assert not [key for key in (alice, bob, admin) if key in (tmp_path / "log").read_text()]
