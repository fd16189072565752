from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve.cli.main import main
from fastserve.engine.engine import Engine

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture
def chat_model(shared_data: Path, tmp_path: Path) -> str:
    """The little story writer with a chat template: it answers with stories."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(shared_data / "model_stories260K" / name)
    config = json.loads((shared_data / "model_stories260K" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return str(folder)


@pytest.fixture
def talk(
    chat_model: str, pipe_in: Callable[[str | bytes], None], capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Pipe lines into the chat; its standard output and error."""

    def talk(
        *lines: str | bytes,
        options: tuple[str, ...] = ("--temperature", "0", "--max-tokens", "9"),
        exit_code: int = 0,
    ) -> Any:
        encoded = (line.encode() if isinstance(line, str) else line for line in lines)
        pipe_in(b"".join(line + b"\n" for line in encoded))
        assert main(["chat", chat_model, *options]) == exit_code
        return capsys.readouterr()

    return talk


def document_of(shown) -> dict:
    return json.loads(shown.out)


JSON = ("--temperature", "0", "--max-tokens", "9", "--json")


def test_answers_go_to_standard_output_and_their_speed_to_standard_error(talk) -> None:
    shown = talk("Hi", "And then?")
    documents = document_of(talk("Hi", "And then?", options=JSON))
    answers = [message["content"] for message in documents["messages"] if message["role"] == "assistant"]
    assert shown.out == "".join(f"{answer}\n" for answer in answers)
    assert shown.err.count("[9 tokens, ") == shown.err.count(" tokens/s, cut at max_tokens: ") == 2


def test_every_answer_is_given_with_the_whole_conversation_before_it(talk) -> None:
    documents = document_of(talk("Hi", "And then?", options=JSON))
    roles = [message["role"] for message in documents["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    first, second = (completion["prompt_tokens"] for completion in documents["completions"])
    assert second > first + 9


def test_reset_forgets_the_conversation_but_not_the_system_message(talk) -> None:
    documents = document_of(talk("/system Be kind.", "Hi", "/reset", "Hi", options=JSON))
    assert [message["role"] for message in documents["messages"]] == ["system", "user", "assistant"]
    assert documents["messages"][0]["content"] == "Be kind."
    first, second = documents["completions"]
    assert first["token_ids"] == second["token_ids"]


def test_settings_hold_from_the_next_answer_on(talk) -> None:
    documents = document_of(talk("Hi", "/set max_tokens 4", "Hi", options=JSON))
    assert [completion["completion_tokens"] for completion in documents["completions"]] == [9, 4]
    assert "temperature is 0.2\n" in talk("/set temperature 0.2").err
    assert "max_tokens is None, seed is 7" in talk("/set max_tokens none", "/set seed 7", "/set").err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "no command is named '/rest'; choose one of /reset, "),
        ("/set heat 3", "no setting is named 'heat'; choose one of temperature, "),
        ("/set temperature warm", "temperature='warm' is not a number"),
        ("/set temperature -1", "temperature=-1.0 is out of range"),
        ("/set temperature none", "temperature='none' is not a number"),
    ],
)
def test_a_wrong_command_is_told_and_the_chat_goes_on(talk, line: str, message: str) -> None:
    shown = talk(line, "Hi", exit_code=2)
    assert f"error: {message}" in shown.err
    assert shown.out != ""


def test_a_line_that_is_no_text_is_told_with_its_place_and_the_chat_goes_on(talk) -> None:
    shown = talk("Hi", b"\xff\xfe hello", "And then?", options=JSON, exit_code=2)
    assert "error: line 2 of standard input is not valid UTF-8: byte 0xff at position 0; " in shown.err
    asked = [message["content"] for message in document_of(shown)["messages"] if message["role"] == "user"]
    assert asked == ["Hi", "And then?"]


def test_a_question_that_fails_is_not_part_of_the_conversation(talk) -> None:
    shown = talk("Hi " * 1000, "Hi", options=JSON, exit_code=2)
    assert "the context is 512 tokens" in shown.err
    assert document_of(shown)["messages"][0]["content"] == "Hi"


@pytest.mark.parametrize(
    ("name", "message"),
    [("all-minilm-l6-v2", "the model 'all-minilm-l6-v2' is an encoder"), (None, "has no chat template")],
)
def test_a_model_that_cannot_chat_is_refused_before_anything_is_asked(
    model_dir: Callable[[str], Path],
    shared_data: Path,
    pipe_in: Callable[[str | bytes], None],
    capsys: pytest.CaptureFixture[str],
    name: str | None,
    message: str,
) -> None:
    if name is not None:
        model_dir(name)
    pipe_in("")
    assert main(["chat", name or str(shared_data / "model_stories260K")]) == 2
    assert message in capsys.readouterr().err


def test_quit_leaves_and_what_follows_is_not_read(talk) -> None:
    assert talk("/quit", "Hi").out == ""


def test_help_names_every_command(talk) -> None:
    assert all(name in talk("/help").err for name in ("/reset", "/system", "/set", "/quit", "Ctrl-C"))


def test_a_full_context_is_told_with_what_to_do(talk) -> None:
    options = ("--temperature", "0", "--context-length", "32")
    shown = talk("Hi", "Hi", "/reset", "Hi", options=options, exit_code=2)
    assert "the context of 32 tokens is full: /reset begins anew]" in shown.err
    assert "the context is 32 tokens and must hold at least one more; /reset begins anew" in shown.err
    first, again = shown.out.splitlines()[0], shown.out.splitlines()[-1]
    assert first == again


def test_ctrl_c_stops_the_answer_keeps_what_was_said_and_frees_its_memory(
    talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, num_steps, engines = Engine.step, 0, set()

    def interrupted_step(engine: Engine):
        nonlocal num_steps
        num_steps += 1
        engines.add(engine)
        if num_steps == 5:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted_step)
    shown = talk("Hi", "Hi", options=JSON)
    documents = document_of(shown)
    assert "[stopped]" in shown.err
    assert [message["role"] for message in documents["messages"]] == ["user", "assistant"] * 2
    (whole,) = documents["completions"]
    assert whole["completion_tokens"] == 9
    (engine,) = engines
    assert engine.pool.num_free == engine.pool.num_blocks
