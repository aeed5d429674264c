"""Secrets are written nowhere: a canary in environment, settings and addresses, over every way a run can end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rwft.config import ConfigError, load_config, resolve, to_yaml
from rwft.loop import train
from rwft.redaction import redact, secret_in
from tests.test_preemption import command, start, steps_logged, wait_for
from tests.tiny import tiny

CANARY = "canaryX7qT9vLm2"
ENVIRONMENT = {"HF_TOKEN": f"hf_{CANARY}AAAAAA", "WANDB_API_KEY": f"{CANARY}0123456789", "MY_SECRET": f"my{CANARY}"}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.path", f"https://user:{CANARY}@host/rows.jsonl"),
        ("data.path", f"https://{CANARY}@host/rows.jsonl"),
        ("data.eval_path", f"s3://key:{CANARY}@bucket/x"),
        ("model.path", f"hf_{CANARY}AAAAAA"),
        ("output", f"runs/{ENVIRONMENT['MY_SECRET']}"),
        ("objective.temperature", f"x{ENVIRONMENT['WANDB_API_KEY']}"),
        ("data.adapter.name", ENVIRONMENT["HF_TOKEN"]),
    ],
)
@pytest.mark.usefixtures("secrets")
def test_a_secret_in_a_setting_is_refused_and_not_repeated(key: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}: found .*, expected no secret") as caught:
        tiny(tmp_path, f"{key}={value}", objective={"name": "rwr"})
    assert CANARY not in str(caught.value)


@pytest.mark.usefixtures("secrets")
def test_errors_about_settings_do_not_repeat_a_secret(tmp_path: Path) -> None:
    for override in (f"hub_token={ENVIRONMENT['MY_SECRET']}", ENVIRONMENT["MY_SECRET"], f"train.lr=${{{CANARY}"):
        with pytest.raises(ConfigError) as caught:
            tiny(tmp_path, override)
        assert ENVIRONMENT["MY_SECRET"] not in str(caught.value)
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"model: [\ntoken: {ENVIRONMENT['HF_TOKEN']}\n  : : x")
    with pytest.raises(ConfigError) as caught:
        load_config(broken)
    assert CANARY not in str(caught.value)


@pytest.mark.usefixtures("secrets")
def test_what_is_recognised_and_what_is_left_alone() -> None:
    for text in (f"see https://a:b@host/x and {ENVIRONMENT['HF_TOKEN']}", f"--key={ENVIRONMENT['WANDB_API_KEY']}"):
        assert secret_in(text) is not None
        assert CANARY not in redact(text)
    assert redact("https://a:b@host/x") == "https://***@host/x"
    for text in ("https://host/a@b", "runs/awr", "Qwen/Qwen2.5-0.5B", "me@host", "a" * 40, "mask-hf_model", "sk-learn"):
        assert secret_in(text) is None, text
        assert redact(text) == text


def test_a_short_value_of_the_environment_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "model")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "characters")
    assert secret_in("model characters") is None


def test_plain_settings_go_through(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    import yaml

    assert resolve(yaml.safe_load(to_yaml(config))) == config


def hits(folder: Path) -> list[str]:
    """Files below a folder that hold the canary, in content or in name."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [str(file) for file in files if CANARY.encode() in file.read_bytes() or CANARY in str(file)]


def test_the_search_finds_a_canary(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x00" + CANARY.encode())
    assert len(hits(tmp_path)) == 1


@pytest.mark.usefixtures("secrets")
def test_the_error_in_the_status_of_a_failed_run_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of somebody's library, on several lines, that repeats everything it was given."""
    said = f"no access\nto https://me:{CANARY}@host/x with {' and '.join(ENVIRONMENT.values())}"

    def fails(*_: Any) -> None:
        raise PermissionError(said)

    monkeypatch.setattr("rwft.loop.optimiser_step", fails)
    with pytest.raises(PermissionError):
        train(tiny(tmp_path))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["error"] == "PermissionError: no access to https://***@host/x with *** and *** and ***"
    assert status["state"] == "failed"
    assert hits(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("end", ["success", "crash", "SIGTERM", "bad override"])
@pytest.mark.usefixtures("secrets")
def test_no_secret_is_written_however_a_run_ends(end: str, tmp_path: Path, root: Path) -> None:
    run, words = tmp_path / "run", command(tmp_path, "run", 0.1, 200 if end == "SIGTERM" else 3)
    if end == "crash":
        (tmp_path / "slow.py").write_text(
            "import os\ndef slow(logp):\n    raise RuntimeError('no access with ' + os.environ['MY_SECRET'])\n"
        )
    if end == "bad override":
        words.append(f"data.path=https://user:{CANARY}@host/x.jsonl")
    process = start(words, root)
    if end == "SIGTERM":
        wait_for(lambda: steps_logged(run) >= 2, process)
        os.kill(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == {"success": 0, "crash": 1, "SIGTERM": 143, "bad override": 2}[end], error[-2000:]
    assert CANARY not in out + error
    assert run.exists() == (end != "bad override")
    assert hits(tmp_path) == []
