"""The chat playground, on a real server with real models."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from serve.browser.conftest import Visit
from serve.process import ServerProcess, serving

pytest.importorskip("fastserve._native")

PROMPT = "Write a long story about a lighthouse."


@pytest.fixture(scope="module")
def chatty(model_dir: Callable[[str], Path], tmp_path_factory) -> Iterator[ServerProcess]:
    """A model that writes for seconds, so that it can be stopped."""
    log = tmp_path_factory.mktemp("browser") / "log"
    options = ("--threads", "1", "--context-length", "1024", "--kv-memory", "64MiB")
    with serving(model_dir("smollm2-135m-instruct"), log, *options) as server:
        yield server


@pytest.fixture
def started(visit: Callable[..., Visit], chatty: ServerProcess) -> Visit:
    return visit(chatty.url)


def send(page: Page, text: str, *, most_tokens: int = 24, **numbers: float) -> None:
    page.get_by_role("spinbutton", name="Most tokens").fill(str(most_tokens))
    for label, value in numbers.items():
        page.get_by_role("spinbutton", name=label).fill(str(value))
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def wait_for_end(page: Page) -> None:
    expect(page.locator("#conversation")).to_have_attribute("aria-busy", "false", timeout=60_000)


def test_a_chat_streams_and_says_how_fast(started: Visit, chatty: ServerProcess) -> None:
    page = started.open()
    page.set_viewport_size({"width": 1600, "height": 900})
    # Every state of the answer that is drawn is kept: a stream has many, and each continues the one before.
    page.evaluate(
        """() => {
            window.drawn = [];
            const note = () => window.drawn.push(document.querySelector(".answer")?.textContent ?? "");
            const conversation = document.querySelector("#conversation");
            new MutationObserver(note).observe(conversation, { childList: true, subtree: true });
        }"""
    )
    send(page, PROMPT, most_tokens=40, Temperature=0)
    wait_for_end(page)
    answer = "".join(page.locator(".token:not(.end)").all_text_contents())
    drawn = [text for text in dict.fromkeys(page.evaluate("window.drawn")) if text]
    assert len(drawn) >= 10
    assert all(later.startswith(earlier) for earlier, later in pairwise(drawn))
    body = {
        "model": page.locator("#model").input_value(),
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_completion_tokens": 40,
    }
    whole = httpx.post(f"{chatty.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer.strip() == whole["choices"][0]["message"]["content"].strip()
    facts = page.locator(".turn-facts").inner_text()
    assert re.search(
        r"40 tokens · first after [\d.]+ m?s · [\d.,]+ tokens/s · reached the most tokens", facts
    )
    started.check()


def test_a_conversation_goes_on_with_its_system_prompt(started: Visit) -> None:
    page = started.open()
    page.set_viewport_size({"width": 1600, "height": 900})
    bodies: list[dict] = []
    page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if r.method == "POST" else None)
    page.get_by_label("System prompt").fill("Be short.")
    send(page, "One")
    wait_for_end(page)
    page.get_by_label("Stop strings").fill("END\nSTOP")
    send(page, "Two", Seed=7)
    wait_for_end(page)
    first, second = bodies
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    tokens = page.locator(".answer").first.locator(".token:not(.end)").all_text_contents()
    assert second["messages"][2]["content"] == "".join(tokens)
    assert (second["seed"], second["stop"], second["temperature"]) == (7, ["END", "STOP"], 0.7)
    assert "top_p" not in second  # what is off is not sent
    page.get_by_role("button", name="Answer again").click()
    wait_for_end(page)
    assert bodies[2] == second
    assert page.locator(".turn").count() == 4
    page.get_by_role("button", name="New").click()
    assert page.locator(".turn").count() == 0


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_on_the_server_too(started: Visit, chatty: ServerProcess, how: str) -> None:
    page = started.open()
    page.set_viewport_size({"width": 1600, "height": 900})
    send(page, PROMPT, most_tokens=900)
    expect(page.locator(".token").nth(5)).to_be_visible()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".turn-facts")).to_contain_text("stopped")
    num_tokens = page.locator(".token").count()
    assert num_tokens < 900
    deadline = time.monotonic() + 20
    while not re.search(r'fastserve_sequences\{model="[^"]+",residence="fast"\} 0\.0', metrics(chatty)):
        assert time.monotonic() < deadline, "the server goes on without its client"
        time.sleep(0.1)
    assert page.locator(".token").count() == num_tokens
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    send(page, "And now?", most_tokens=4)
    wait_for_end(page)
    expect(page.locator(".turn-facts").last).to_contain_text("4 tokens")


def metrics(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/metrics").text


def test_a_token_shows_its_probability_and_what_else_there_was(started: Visit) -> None:
    page = started.open()
    page.set_viewport_size({"width": 1600, "height": 900})
    send(page, "The capital of France is", most_tokens=8, Temperature=0)
    wait_for_end(page)
    card = page.locator("#probability-card")
    expect(card).to_be_hidden()
    page.locator(".token").nth(2).hover()
    expect(card).to_be_visible()
    shares = [float(text) for text in re.findall(r"([\d.]+)%", card.locator("ul").inner_text())]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 101  # rounded
    assert page.locator(".chosen").count() == 1  # greedy: the first one
    assert card.locator("li").first.get_attribute("class") == "chosen"
    page.locator("h1:visible").hover()
    expect(card).to_be_hidden()
    # The same by the keyboard, and aloud.
    page.locator(".answer").focus()
    page.keyboard.press("ArrowRight")
    expect(card).to_be_visible()
    page.keyboard.press("End")
    expect(page.locator(".token").last).to_have_class("token pointed")
    assert re.search(r"\d%\. Instead: ", page.locator("#announcement").inner_text())
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    # And the text as it is meant.
    page.get_by_role("button", name="Token probabilities").click()
    assert page.locator(".token").count() == 0
    assert page.locator(".answer").inner_text().strip()


def test_tokens_that_share_a_character_are_shown_as_one(started: Visit) -> None:
    page = started.open()
    joined = page.evaluate(
        """async () => {
            const { Completion } = await import("/dashboard/script/completion.js");
            const completion = new Completion();
            const bytes = new TextEncoder().encode("é🙂!");
            for (const byte of bytes) {
                const entry = { token: "\\ufffd", bytes: [byte], logprob: Math.log(0.5), top_logprobs: [] };
                completion.feed({ choices: [{ delta: { content: "" }, logprobs: { content: [entry] } }] });
            }
            return completion.tokens.map(({ text, probability }) => [text, probability]);
        }"""
    )
    assert [text for text, _ in joined] == ["é", "🙂", "!"]
    assert [probability for _, probability in joined] == pytest.approx([0.25, 0.0625, 0.5])


def test_what_the_server_refuses_is_said(started: Visit) -> None:
    page = started.open()
    page.set_viewport_size({"width": 1600, "height": 900})
    started.expected.add("400 (Bad Request)")
    send(page, "word " * 2000)
    expect(page.locator(".turn-footer .trouble")).to_contain_text("context")
    page.get_by_role("button", name="New").click()
    send(page, "Hello", most_tokens=4)
    wait_for_end(page)
    assert page.locator(".trouble:visible").count() == 0


def test_an_answer_may_take_the_rest_of_the_context(started: Visit) -> None:
    page = started.open()
    page.set_viewport_size({"width": 1600, "height": 900})
    bodies: list[dict] = []
    page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if r.method == "POST" else None)
    limit = page.get_by_role("spinbutton", name="Most tokens")
    limit.fill("5000")  # more than the context is no number of tokens
    limit.blur()
    expect(limit).to_have_value("512")
    limit.fill("")
    page.get_by_label("Stop strings").fill("e")
    page.get_by_label("Message").fill("Hello")
    page.get_by_label("Message").press("Enter")
    wait_for_end(page)
    assert "max_completion_tokens" not in bodies[0]


def test_without_an_admin_key_there_is_the_playground_alone(started: Visit) -> None:
    page = started.open()
    assert page.locator("nav a:visible").all_inner_texts() == ["Playground"]
    page.goto(f"{started.url}/#scheduler")
    expect(page.locator("#playground")).to_be_visible()
    assert page.locator(".view:visible").count() == 1


def test_a_server_with_keys_is_asked_with_the_visitors(
    visit: Callable[..., Visit], stories_for_chat: Path, tmp_path: Path
) -> None:
    options = ("--threads", "1", "--context-length", "128", "--kv-memory", "1MiB")
    environment = {"FASTSERVE_API_KEY": "fs-secret"}
    with serving(stories_for_chat, tmp_path / "log", *options, environment=environment) as server:
        started = visit(server.url)
        started.expected.add("401 (Unauthorized)")
        page = started.open()
        expect(page.locator(".empty .trouble")).to_contain_text("the request has no API key")
        page.get_by_role("button", name="Enter a key").click()
        page.get_by_label("API key").fill("fs-secret")
        page.get_by_role("button", name="Use these keys").click()
        expect(page.get_by_text("What shall it write?")).to_be_visible()
        page.get_by_label("Message").fill("Once")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".turn-facts")).to_contain_text("tokens/s")
        kept = page.evaluate(
            "[Object.entries(sessionStorage), Object.entries(localStorage), document.cookie]"
        )
        assert kept == [[["fastserve.api-key", "fs-secret"]], [], ""]
        page.get_by_role("button", name="Keys").click()
        page.get_by_role("button", name="Forget keys").click()
        expect(page.locator(".empty .trouble")).to_have_count(0)  # the conversation stays
        assert page.evaluate("sessionStorage.length") == 0


def test_a_server_that_dies_within_an_answer_is_missed(
    visit: Callable[..., Visit], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--threads", "1", "--context-length", "1024", "--kv-memory", "64MiB")
    with serving(model_dir("smollm2-135m-instruct"), tmp_path / "log", *options) as server:
        started = visit(server.url)
        started.expected.add("ERR_")
        page = started.open()
        page.get_by_label("Message").fill(PROMPT)
        page.get_by_label("Message").press("Enter")
        expect(page.locator(".token").nth(5)).to_be_visible()
        server.process.kill()
        expect(page.locator(".turn-footer .trouble")).to_have_text("The server cannot be reached.")
        assert page.locator(".token").count() > 5  # what has come stays
