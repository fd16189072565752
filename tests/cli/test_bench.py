from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.cli.main import main
from fastserve.evaluate.random_model import make_byte_tokenizer

pytest.importorskip("fastserve._native")
pytestmark = pytest.mark.usefixtures("empty_store")


def test_limits_are_a_document_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "limits", "--threads", "1", "--seconds", "0.001", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for key in ("read_bytes_per_second", "int8_operations_per_second", "f32_operations_per_second"):
        assert document[key] > 0
    assert document["threads"] == 1
    assert 1 <= document["cores"]["physical_cores"] <= document["cores"]["cpus"]
    assert document["working_set_bytes"] in {read["working_set_bytes"] for read in document["reads"]}


def test_a_model_is_made_in_the_folder_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "minilm"
    assert main(["bench", "make-model", "--like", "minilm", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"path": str(folder), "like": "minilm", "sparsity": 0.0, "parameters": 22565376}
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_an_unknown_shape_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "make-model", "--like", "nope", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err.startswith("error: like='nope' is unknown; choose one of llama-3.2-1b")


def test_an_unknown_measurement_suggests_the_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "limit"]) == 2
    assert "did you mean limits?" in capsys.readouterr().err


def test_a_model_is_measured_from_start_to_memory(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_data / "model_stories260K"
    command = [
        "bench",
        "model",
        str(folder),
        "--weights",
        "int8",
        "--threads",
        "1",
        "--pairs",
        "5",
    ]  # one decode is too short to time
    assert main([*command, "--only", "prefill_128,decode_1", "--profile", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for key in (
        "prefill_128_tokens_per_second",
        "decode_1_tokens_per_second",
        "decode_1_share_of_bandwidth",
        "start_to_first_token_seconds",
        "peak_memory_bytes",
    ):
        assert document[key] > 0, key
    assert document["limits"]["threads"] == 1
    assert {"linear", "attention", "sample"} <= {profile["op"] for profile in document["profile"]}


def test_an_unknown_peer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "make-model", "--like", "minilm", str(tmp_path / "m")]) == 0
    assert main(["bench", "model", str(tmp_path / "m"), "--compare", "tgi"]) == 2
    assert "no peer is named 'tgi'; choose among llama.cpp, openvino" in capsys.readouterr().err


def test_kernels_are_a_document_for_machines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.evaluate import kernel_speed

    monkeypatch.setattr(
        kernel_speed, "check_share", lambda what, share: share
    )  # other tests load the machine
    command = ["bench", "kernels", "--like", "minilm", "--weights", "int8", "--rows", "1", "--threads", "1"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["limits"]["read_bytes_per_second"] > 0
    linear = document["kernels"][0]
    assert (linear["op"], linear["weights"], linear["rows"]) == ("linear", "int8", 1)
    assert linear["share_of_read"] > 0
    assert {(s["weights"], s["storage"]) for s in document["sparse"]} == {
        ("int8", "bitmask"),
        ("int8", "csr"),
    }
    assert all(s["times_dense"] > 0 for s in document["sparse"])


def test_a_run_is_profiled_with_one_flag(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(shared_data / "model_stories260K")
    assert main(["generate", folder, "Once", "--max-tokens", "3", "--threads", "1", "--profile"]) == 0
    shown = capsys.readouterr()
    header, *lines = (line.split("\t") for line in shown.err.splitlines())
    assert header[:3] == ["op", "shape", "runs"]
    assert {"linear", "attention"} <= {line[0] for line in lines}
    assert "GB/s" not in shown.out


def test_the_profile_of_an_encoder_decoder_has_its_encoder_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from encoder_decoder_configs import T5
    from tiny_models import random_encoder_decoder

    random_encoder_decoder({**T5, "vocab_size": 300}).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(make_byte_tokenizer(300)))
    command = ["generate", str(tmp_path), "Once", "--max-tokens", "3", "--context-length", "64", "--profile"]
    assert main(command) == 0
    lines = [line.split("\t") for line in capsys.readouterr().err.splitlines() if line.count("\t") > 2][1:]
    runs = {line[0]: int(line[2]) for line in lines}
    assert runs["store_source"] == T5["num_decoder_layers"]  # the encoder has run once
    assert runs["cross_attention"] > 0


def test_the_torch_backend_has_no_profile(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    folder = str(shared_data / "model_stories260K")
    command = ["generate", folder, "Once", "--max-tokens", "1", "--backend", "torch", "--profile"]
    assert main(command) == 2
    assert "needs backend='native'" in capsys.readouterr().err
