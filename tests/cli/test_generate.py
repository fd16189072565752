from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastserve.cli.main import main

PROMPT = "Once upon a time"
TEXT = ", there was a little girl named Lily. She lo"  # 13 tokens


@pytest.fixture
def stories(shared_data: Path) -> str:
    return str(shared_data / "model_stories260K")


def read(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)


def test_the_text_alone_goes_to_standard_output(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", stories, PROMPT, "--max-tokens", "13", "--weights", "f32"]) == 0
    assert capsys.readouterr() == (f"{TEXT}\n", "")


def test_the_document_of_one_prompt_has_what_scripts_rely_on(
    stories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--max-tokens", "13", "--temperature", "0", "--weights", "f32", "--threads", "1", "--json"]
    assert main(["generate", stories, PROMPT, *arguments]) == 0
    document = read(capsys)
    assert document.pop("decode_tokens_per_second") > 0
    assert document.pop("time_to_first_token_seconds") > 0
    assert document.pop("seed") >= 0
    token_ids = document.pop("token_ids")
    assert [type(token_id) for token_id in token_ids] == [int] * 13
    assert document == {
        "text": TEXT,
        "finish_reason": "length",
        "prompt_tokens": 5,
        "completion_tokens": 13,
    }


def test_several_prompts_are_completed_in_their_order(
    stories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-tokens", "13", "--weights", "f32"]
    assert main(["generate", stories, PROMPT, "The dog", *options, "--json"]) == 0
    completions = read(capsys)["completions"]
    assert completions[0]["text"] == TEXT
    assert main(["generate", stories, PROMPT, "The dog", *options]) == 0
    shown = capsys.readouterr().out
    assert shown == "".join(
        f"==> {prompt} <==\n{completion['text']}\n\n"
        for prompt, completion in zip([PROMPT, "The dog"], completions, strict=True)
    )


def test_a_hyphen_reads_the_prompt_from_standard_input(
    stories: str, capsys: pytest.CaptureFixture[str], pipe_in: Callable[[str | bytes], None]
) -> None:
    pipe_in(f"{PROMPT}\r\n")
    assert main(["generate", stories, "-", "--max-tokens", "13", "--weights", "f32"]) == 0
    assert capsys.readouterr().out == f"{TEXT}\n"


def test_standard_input_that_is_no_text_is_refused_with_the_place(
    stories: str, capsys: pytest.CaptureFixture[str], pipe_in: Callable[[str | bytes], None]
) -> None:
    pipe_in(b"hello \xff\xfe\n")
    assert main(["generate", stories, "-"]) == 2
    assert "standard input is not valid UTF-8: byte 0xff at position 6; convert it" in capsys.readouterr().err


def test_an_encoder_is_refused_by_the_name_that_was_typed(
    model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir("all-minilm-l6-v2")
    assert main(["generate", "All-MiniLM-L6-v2", PROMPT]) == 2
    assert "the model 'All-MiniLM-L6-v2' is an encoder; it does not generate" in capsys.readouterr().err


def test_every_sampling_option_reaches_the_model(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*options: str) -> list[int]:
        assert main(["generate", stories, PROMPT, "--max-tokens", "20", *options, "--json"]) == 0
        return read(capsys)["token_ids"]

    greedy = tokens()
    drawn = tokens("--temperature", "1.5", "--seed", "3")
    assert tokens("--temperature", "1.5", "--seed", "3") == drawn != greedy
    for option in (["--top-k", "1"], ["--top-p", "0.0001"], ["--min-p", "1"]):
        assert tokens("--temperature", "1.5", "--seed", "3", *option) == greedy


def test_a_stop_text_ends_the_completion(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", "40", "--weights", "f32", "--stop", " little", "--stop", "zzz"]
    assert main(["generate", stories, PROMPT, *options, "--json"]) == 0
    document = read(capsys)
    assert (document["text"], document["finish_reason"]) == (", there was a", "stop")


def test_chat_without_a_template_is_one_line_and_exit_code_2(
    stories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", stories, PROMPT, "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "508"], "together 513; the context is 512"),
        (["--max-tokens", "0"], "max_tokens=0 is out of range"),
        (["--temperature", "-1"], "temperature=-1.0 is out of range"),
        (["--weights", "int3"], "'int3' is not one of 'auto', 'f32', 'f16', 'bf16', 'int8'"),
        (["--context-length", "1024"], "context_length is 1024; the model was made for 512"),
        (["--kv-memory", "many"], "kv_memory='many' is not a size"),
        (["--threads", "0"], "threads=0 is out of range"),
        (["--tempratur", "1"], "no option is named --tempratur"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(
    stories: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", stories, PROMPT, *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_a_model_that_computes_no_numbers_is_an_error(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shared_data / "model_stories260K", broken)
    weights = broken / "model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-4096:] = np.full(1024, np.nan, np.float32).tobytes()
    weights.write_bytes(data)
    for weight_format in ("f32", "int8"):
        assert main(["generate", str(broken), "Once", "--weights", weight_format, "--max-tokens", "3"]) == 2
        assert "the model computed logits that are not numbers; take the model" in capsys.readouterr().err


def test_a_completion_that_takes_longer_than_it_may_is_an_error(stories, capsys) -> None:
    assert main(["generate", stories, PROMPT, "--timeout-ms", "100000", "--max-tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["generate", stories, PROMPT, "--timeout-ms", "1", "--max-tokens", "200"]) == 2
    assert "timeout_ms" in capsys.readouterr().err
    assert main(["generate", stories, PROMPT, "--timeout-ms", "0"]) == 2
    assert "timeout_ms=0.0 is out of range" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--choice", "up", "--choice", "down"], ["--regex", "up|down"]])
def test_the_text_is_held_to_what_an_option_says(
    stories: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", stories, PROMPT, *options, "--temperature", "1", "--seed", "3"]) == 0
    assert capsys.readouterr().out in ("up\n", "down\n")


@pytest.mark.parametrize(
    ("option", "content", "texts"),
    [
        ("--json-schema", '{"enum": ["a", 7]}', ('"a"', "7")),
        ("--grammar", 'start: "x" | "y"', ("x", "y")),
    ],
)
def test_schemas_and_grammars_are_read_from_files(
    stories: str,
    tmp_path: Path,
    option: str,
    content: str,
    texts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "constraint"
    file.write_text(content, encoding="utf-8")
    assert main(["generate", stories, PROMPT, option, str(file), "--json"]) == 0
    document = read(capsys)
    assert document["text"] in texts
    assert document["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "a", "--choice", "b"], "--regex and --choice cannot be followed together"),
        (["--regex", "(?=a)"], "the pattern cannot be compiled"),
        (["--json-schema", "missing.json"], "missing.json cannot be read"),
    ],
)
def test_a_constraint_that_cannot_be_followed_is_an_error(
    stories: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", stories, PROMPT, *options]) != 0
    assert message in capsys.readouterr().err
