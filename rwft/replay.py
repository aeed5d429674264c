"""A run again, from its manifest alone: the same bits, or the name of what differs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwft.errors import ConfigError, RwftError
from rwft.manifest import read_manifest
from rwft.run import flatten
from rwft.trust import stored_config

ELSEWHERE = ("config.output", "config.cache")  # where things lie changes no number
LISTED = 8  # differences that a message names


class ReplayError(RwftError):
    """A replay came out otherwise; the message says where first and what is not as it was."""


def replay_command(run: str, overrides: Sequence[str], console: Any = None) -> None:
    """`rwft train --replay RUN output=...`. Raises ReplayError if the losses or the final parameters are other ones."""
    from rwft.loop import train
    from rwft.progress import Display

    old = read_manifest(Path(run).expanduser())
    if "final" not in old:
        raise ConfigError(f"--replay: {run} is not finished; there is no result to compare with")
    config = stored_config(old["config"], overrides, f"{run}: manifest.json")
    if Path(config.output).expanduser().resolve() == Path(old["config"]["output"]).expanduser().resolve():
        raise ConfigError("--replay: name another output for the rerun, such as output=runs/again")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != old["ranks"]:
        raise ConfigError(f"--replay: {run} ran on {old['ranks']} ranks, this is {ranks}; start as many with torchrun")
    train(config, console=console)
    new = read_manifest(Path(config.output).expanduser())
    verdict = compare(old, new)
    if verdict is not None:
        raise ReplayError(f"{run}: {verdict}")
    found = f"{len(new['losses'])} losses, the parameters and the optimiser after step {new['final']['step']}"
    Display(console, main=os.environ.get("RANK", "0") == "0").say(f"{run}: bitwise equal: {found}")


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Where the results of two manifests differ first, and what else does; None if the results are equal."""
    first = next((step for step in old["losses"] if old["losses"][step] != new["losses"].get(step)), None)
    if first is not None:
        now = new["losses"].get(first)
        sentence = f"the loss of step {first} differs: found {now}, expected {old['losses'][first]}"
    elif old["final"] != new["final"]:
        sentence = "the losses that were kept are equal, but not the final parameters or the optimiser"
    else:
        return None
    causes = differences(old, new)
    return f"{sentence}; " + ("; ".join(causes) if causes else "nothing that is recorded explains it")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What the two runs differ in by their manifests, apart from what came out."""
    a, b = flatten(_causes(old)), flatten(_causes(new))
    keys = [key for key in sorted(a | b) if a.get(key) != b.get(key) and key not in ELSEWHERE]
    out = [f"{key} was {a.get(key)!r}, is {b.get(key)!r}" for key in keys[:LISTED]]
    if len(old["starts"]) > 1:
        steps = [start["step"] for start in old["starts"]]
        out.append(f"it was started more than once (at steps {steps})")
    return out + ([f"and {len(keys) - LISTED} more"] if len(keys) > LISTED else [])


def _causes(manifest: Mapping[str, Any]) -> dict[str, Any]:
    results = ("losses", "final", "starts", "format", "config_sha256")
    start = manifest["starts"][0]
    return {key: value for key, value in manifest.items() if key not in results} | {
        "versions": start["versions"],
        "machine": start["machine"],
    }
