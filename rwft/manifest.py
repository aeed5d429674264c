"""What a run was, in one file: settings, data, model, machine, versions, code, and its losses bit by bit.

`rwft train --replay RUN` reruns it from there and says whether the same came out (see `rwft.replay`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rwft import __version__
from rwft.config import as_dict
from rwft.data.adapters import adapter
from rwft.data.prepare import content_digests
from rwft.durable import sha256
from rwft.errors import RwftError
from rwft.redaction import redact
from rwft.run import RunFolder
from rwft.training import Training
from rwft.weighting import split_spec

FORMAT = 1
MANIFEST = "manifest.json"
EVERY = 100  # steps between losses that are kept
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "peft",
    "datasets",
    "numpy",
    "pyarrow",
    "einops",
    "omegaconf",
)


@dataclass
class Manifest:
    """`manifest.json` of a run under way; every change is written at once."""

    folder: RunFolder
    content: dict[str, Any]

    def loss(self, step: int, value: float) -> None:
        """Keep the loss of a step, exactly."""
        self.content["losses"][str(step)] = value.hex()
        self.folder.write(MANIFEST, self.content)

    def finish(self, step: int) -> None:
        """Keep the digests of what the run ended with."""
        if self.folder.main:
            saved = json.loads((self.folder.checkpoint(step) / "manifest.json").read_bytes())["files"]
            digests = {name: saved[f"{name}.safetensors"]["sha256"] for name in ("model", "optimizer")}
            self.content["final"] = {"step": step, **digests}
            self.folder.write(MANIFEST, self.content)


def open_manifest(training: Training, start: int) -> Manifest:
    """The manifest of a run that starts at step `start`; what an earlier start recorded up to there is kept."""
    folder = training.folder
    if not folder.main:
        return Manifest(folder, {"losses": {}})
    earlier = read_manifest(folder.path) if start and (folder.path / MANIFEST).exists() else {}
    losses = {step: value for step, value in earlier.get("losses", {}).items() if int(step) <= start}
    starts = [*earlier.get("starts", []), describe_start(start)]
    manifest = Manifest(folder, {"format": FORMAT, **describe(training), "starts": starts, "losses": losses})
    folder.write(MANIFEST, manifest.content)
    return manifest


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest in a run's folder. Raises RwftError if there is none that can be read."""
    file = run / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or not isinstance(content["losses"], dict):
            raise ValueError(f"found format {content['format']!r}, expected {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RwftError(f"{file}: cannot be read: {error!r}; expected the manifest of a run") from error
    return content


def describe(training: Training) -> dict[str, Any]:
    """What the result of a run depends on, but for versions and the machine."""
    config, data = training.config, training.data
    return {
        "config": as_dict(config),
        "config_sha256": training.fingerprints["config"],
        "objective": str(training.objective),
        "data": {
            "fingerprint": training.fingerprints["data"],
            "rows": len(data.train),
            "held_out": 0 if data.held_out is None else len(data.held_out),
            "sha256": None if config.data.path is None else content_digests(config.data.path),
        },
        "model": {
            "weights": training.fingerprints["model"],
            "tokenizer": hashlib.sha256(training.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "attention": training.policy.causal.config._attn_implementation,
        },
        "seed": config.train.seed,
        "ranks": training.accelerator.num_processes,
        "code": describe_code(training),
    }


def describe_code(training: Training) -> dict[str, Any]:
    """Which functions of whose files took part; a user's file with its sha256."""
    parts = [*training.objective.factors, *(penalty.factor for penalty in training.penalties)]
    used = {part.entry.name: part.entry.origin for part in parts}
    name, _ = split_spec("adapter", training.config.data.adapter)
    if name != "auto":
        used[name] = adapter.entry(name).origin
    return {"rwft": source_digest(), "commit": commit(), "functions": used}


def describe_start(step: int) -> dict[str, Any]:
    """Where and by which command the run was started (or started again)."""
    return {
        "step": step,
        "argv": [redact(word) for word in sys.argv],
        "versions": {"rwft": __version__, "python": platform.python_version()} | installed(),
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
        },
    }


def installed() -> dict[str, str]:
    """Versions of the distributions that numbers depend on."""
    present = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name: present[name] for name in PACKAGES if name in present}


def source_digest() -> str:
    """Hex digest of this package's own source."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def commit(root: Path = Path(__file__).parents[1]) -> str | None:
    """The git commit of the checkout that this package runs from, read from files: no program is started."""
    git = root / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8")
    except OSError:  # no checkout
        return None
    found = re.search(rf"^([0-9a-f]{{40,64}}) {re.escape(name)}$", packed, re.MULTILINE)
    return found[1] if found else None
