"""Trackers receive every figure and the run's settings, and nothing that tells where files lie."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rwft.loop import train
from rwft.run import trackable
from tests.tiny import tiny

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7  # of W&B's log, which is LevelDB's
Kept = tuple[dict[str, list[float]], dict[str, Any], list[bytes]]


def needs(name: str) -> None:
    """Skip where the tracker is not installed, with the reason."""
    pytest.importorskip(name, reason=f"{name} is not installed")


def start(tracker: str, folder: Path) -> list[dict[str, Any]]:
    """A run with an objective of one's own; gives back what metrics.jsonl says."""
    (folder / "mine.py").write_text("def own(logp, reward):\n    return reward + 0 * logp\n")
    objective = f"{folder}/mine.py:own"
    train(tiny(folder, f"trackers=[{tracker}]", "train.eval_every=2", "train.watch=[entropy]", objective=objective))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def of_tensorboard(folder: Path) -> Kept:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [file for file in (folder / "run" / "rwft").rglob("*") if file.is_file()]
    events = next(file.parent for file in files if file.parent.name == "rwft")
    logged = EventAccumulator(str(events)).Reload()
    scalars = {tag: [event.value for event in logged.Scalars(tag)] for tag in logged.Tags()["scalars"]}
    (settings,) = (file for file in files if file.name == "hparams.yml")
    return scalars, yaml.safe_load(settings.read_text()), [file.read_bytes() for file in files]


def of_trackio(folder: Path) -> Kept:
    (file,) = (folder / "trackio").glob("rwft.db")
    with sqlite3.connect(file) as base:
        rows = [json.loads(row) for (row,) in base.execute("select metrics from metrics order by id")]
        (settings,) = (json.loads(row) for (row,) in base.execute("select config from configs"))
        assert base.execute("select distinct run_name from metrics").fetchall() == [("run",)]
    scalars: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            scalars.setdefault(name, []).append(value)
    return scalars, settings, [path.read_bytes() for path in (folder / "trackio").rglob("*") if path.is_file()]


def records(content: bytes) -> Iterator[bytes]:
    """What W&B wrote, one record after another; a record may span blocks."""
    place, record = FILE_HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + HEADER])
        record += content[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def of_wandb(folder: Path) -> Kept:
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    (file,) = (folder / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    scalars: dict[str, list[float]] = {}
    settings: dict[str, Any] = {}
    for content in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
        for item in record.history.item:
            scalars.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    sent = [path.read_bytes() for path in (file.parent / "files").rglob("*") if path.is_file()]
    return scalars, settings, [file.read_bytes(), *sent]


READ = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio}


@pytest.mark.parametrize("tracker", READ)
def test_a_tracker_gets_figures_and_settings_and_no_paths(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [m for name, m in sys.modules.items() if name.startswith("trackio") and hasattr(m, "TRACKIO_DIR")]:
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")  # it was imported by an earlier test
    monkeypatch.chdir(tmp_path)
    lines = start(tracker, tmp_path)
    scalars, settings, files = READ[tracker](tmp_path)
    names = {name for line in lines for name in line} - {"step"}
    assert {"loss/mean", "weight/ess", "entropy/mean", "eval/nll_good/mean"} <= names
    for name in names:
        wanted = [line[name] for line in lines if name in line]
        assert scalars[name] == pytest.approx(wanted, rel=1e-6), name
    assert (settings["train.lr"], settings["train.steps"], settings["data.max_length"]) == (0.01, 4, 48)
    assert settings["objective"] == "mine.py:own"
    assert not {"output", "cache", "data.path"} & settings.keys()
    for content in files:
        assert str(tmp_path).encode() not in content
        assert os.path.expanduser("~").encode() not in content


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/somebody/models/qwen", "qwen"),
        ("~/models/qwen", "qwen"),
        ("../somebody/mine.py:own", "mine.py:own"),
        ("/mnt/My Models/qwen", "qwen"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("https://host/models/qwen", "https://host/models/qwen"),
    ],
)
def test_of_a_path_only_its_end_is_shown(given: str, shown: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, f"reference.path={given}", f"model.tokenizer={given}", f"data.adapter={given}")
    found = trackable(config)
    assert (found["reference.path"], found["model.tokenizer"], found["data.adapter"]) == (shown, shown, shown)
    assert not {"output", "cache", "data.path", "data.eval_path"} & found.keys()


def test_paths_in_lists_are_shortened_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def own(logp, *, cap: float = 1.0):\n    return logp.exp() * cap\n")
    objective = [{"name": f"{tmp_path}/mine.py:own", "cap": 2.0}, "dft"]
    found = trackable(tiny(tmp_path, objective=objective))
    assert found["objective"] == "[{'name': 'mine.py:own', 'cap': 2.0}, 'dft']"


def test_secrets_of_the_environment_are_struck_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, "reference.path=hunter2-hunter2/model")
    monkeypatch.setenv("SOME_TOKEN", "hunter2-hunter2")
    assert trackable(config)["reference.path"] == "***/model"
