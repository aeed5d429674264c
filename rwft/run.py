"""A run's folder: what it holds, who may write to it, whether the same command goes on with it.

config.yaml        every setting, defaults written out
credit.json        the fitted credit statistics
metrics.jsonl      one object a logged step
checkpoints/       step_XXXXXXXX, newest last
model/             the exported policy (adapter or merged model), written once at the end
status.json        state, step, newest checkpoint
result.json        the final figures
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rwft.checkpoint import RunLock, write_atomic
from rwft.config import Config, as_dict, read_yaml, resolve, to_yaml
from rwft.errors import ConfigError, RwftError, UserError

CONFIG, LOCK = "config.yaml", ".lock"


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves: where, how far, and its figures on held-out rows."""

    output: str
    objective: str
    seed: int
    steps: int
    state: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def model(self) -> Path:
        """The exported folder."""
        return Path(self.output) / "model"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and the small files in it; only the main process writes."""

    path: Path
    main: bool

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a small JSON file atomically."""
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write a small file atomically."""
        if self.main:
            write_atomic(self.path / name, content)

    def status(self, state: str, step: int) -> None:
        """Say how far the run is, for whoever watches or resumes it."""
        self.write("status.json", {"state": state, "step": step})

    def finished(self) -> RunResult | None:
        """The result, if this run has come to its end."""
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
            if status["state"] != "done":
                return None
            return RunResult(**json.loads((self.path / "result.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise RwftError(
                f"{self.path}: status.json or result.json is damaged ({error}); start over with --fresh"
            ) from None

    def finish(self, result: RunResult) -> None:
        """Record the result, then that the run is done."""
        self.write("result.json", asdict(result))
        self.status("done", result.steps)


def open_run(config: Config, main: bool, fresh: bool) -> RunFolder:
    """The folder of this run: new, or an earlier start of the same config. Nothing is written yet.

    Raises ConfigError when another config, or something that is no run, lives there; with
    `fresh` another config is fine, since that run will be set aside.
    """
    folder = RunFolder(Path(config.output).expanduser(), main)
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"output: {folder.path} is a file; expected a folder")
    if (folder.path / CONFIG).exists():
        if not fresh:
            _same_config(config, folder.path / CONFIG)
    elif folder.path.exists() and any(p.name != LOCK for p in folder.path.iterdir()):
        raise ConfigError(f"output: {folder.path} holds files that are no run of rwft; name another folder")
    return folder


@contextmanager
def start_run(config: Config, folder: RunFolder, fresh: bool) -> Iterator[None]:
    """Hold the folder of a run that has passed every check; an earlier run is set aside if `fresh`."""
    if not folder.main:
        yield
        return
    if fresh and (folder.path / CONFIG).exists():
        with RunLock(folder.path):
            pass  # nobody is at work in what is moved
        folder.path.rename(_free_name(folder.path))
    folder.path.mkdir(parents=True, exist_ok=True)
    with RunLock(folder.path):
        if not (folder.path / CONFIG).exists():
            write_atomic(folder.path / CONFIG, to_yaml(config))
        yield


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.previous-{number}")).exists():
        number += 1
    return candidate


def _same_config(config: Config, file: Path) -> None:
    old, new = flatten(as_dict(resolve(read_yaml(file), where=str(file)))), flatten(as_dict(config))
    different = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key != "output"]
    if different:
        key = different[0]
        more = f" (and {len(different) - 1} more: {', '.join(different[1:4])})" if len(different) > 1 else ""
        raise ConfigError(
            f"output: {file.parent} holds a run with {key}: {old.get(key)!r}, this config says {new.get(key)!r}{more}; "
            "name another output, or give --fresh to set that run aside and start over"
        )


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def trackable(config: Config) -> dict[str, Any]:
    """The settings that trackers may show: flat, numbers and text only, no paths."""
    hidden = ("output", "cache", "data.path", "data.eval_path")
    flat = flatten(as_dict(config))
    return {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in flat.items() if k not in hidden}


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in its place; a folder of that name from an earlier try goes."""
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)


def refuse_environment() -> None:
    """Accumulation is a setting here; a second, hidden one would multiply with it."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if os.environ.get(name, "1") not in ("", "1"):
        raise UserError(f"{name}={os.environ[name]} is set; unset it and use train.accumulate")
