"""Checkpoints that are whole or not there, verified before they are used, and hold no code.

checkpoints/
  step_00000120/          appears by one rename, when all that it holds is on the disk
    model.safetensors     one file per group of tensors
    optimizer.safetensors
    state.json            everything else
    manifest.json         step, fingerprints, size and sha256 of each file; a digest of itself
  latest.json             a hint: tells that a newest checkpoint has been lost
  .tmp-* .trash-*         of a save or a deletion under way, or of a run that died
  .bad-*                  damaged checkpoints, out of the way of new ones; never deleted here
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from rwft.durable import (
    TMP,
    TRASH,
    RunLock,
    describe,
    disk_report,
    is_plain_file,
    make_folder,
    remove,
    sha256,
    sync,
    write_atomic,
    write_new,
)
from rwft.errors import CheckpointError, RwftError, SaveError
from rwft.optimizer_state import join_optimizer, split_optimizer

__all__ = ["Checkpoint", "CheckpointStore", "RunLock", "join_optimizer", "split_optimizer", "write_atomic"]

FORMAT = 1
MARGIN = 1.2  # free space that a save asks for, in sizes of the checkpoint
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest.json"
STEP_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
GROUP_NAME = re.compile(r"[A-Za-z0-9_]+")
FILE_NAME = re.compile(rf"{GROUP_NAME.pattern}\.safetensors|state\.json")
log = logging.getLogger("rwft")


class DamagedError(CheckpointError):
    """One checkpoint is not what was written; an older one may be."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk: optimiser steps done, its folder, and its manifest."""

    step: int
    folder: Path
    manifest: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run. One process writes (it holds the run's lock); any may load.

    `keep` is how many are left after a save, at least 2, so that one survives a damaged newest.
    `warnings` holds a sentence for each thing that was wrong and could be lived with.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep: found {keep}, expected a whole number >= 2")
        self.folder, self.keep = Path(folder), keep
        self.warnings: list[str] = []
        self._rejected: set[int] = set()

    def steps(self) -> list[int]:
        """Steps that a checkpoint is there for, oldest first; whether it is valid, only `load` can tell."""
        return sorted(int(match[1]) for name in _entries(self.folder) if (match := STEP_NAME.fullmatch(name)))

    def sweep(self) -> list[str]:
        """Delete what a run that died left half written or half deleted; gives back the names. For the writer only."""
        stale = [name for name in _entries(self.folder) if name.startswith((TMP, TRASH))]
        for name in stale:
            try:
                remove(self.folder / name)
            except OSError as error:
                raise SaveError(f"{self.folder / name}: this leftover cannot be deleted: {error}; delete it") from error
        return stale

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        fingerprints: Mapping[str, str],
    ) -> Checkpoint:
        """Write the checkpoint of `step`; once this returns, it survives a crash and a loss of power.

        `tensors` are groups by the name of their file, each tensor by a name of its own; `state`
        is plain JSON. Raises SaveError, with the path, the bytes needed and the bytes free;
        everything saved before is then intact.
        """
        final = self.folder / _name(step)
        spare = self.folder / f"{TMP}{final.name}"
        groups = {name: _storable(final, name, group) for name, group in tensors.items()}
        text = _plain_json(final / STATE, state)
        needed = len(text) + sum(t.nbytes for group in groups.values() for t in group.values())
        try:
            make_folder(self.folder)
            self._make_way(step)
            _require_space(final, needed)
            manifest = _write(spare, step, groups, text, fingerprints)
            os.rename(spare, final)
            sync(self.folder)
        except BaseException as error:  # safetensors has errors of its own, not all of them an Exception
            shutil.rmtree(spare, ignore_errors=True)  # what cannot be deleted now, the next sweep deletes
            if isinstance(error, (SaveError, KeyboardInterrupt, SystemExit)):
                raise
            raise SaveError(f"{final}: not saved: {disk_report(error, self.folder, needed)}") from error
        self._settle(step)
        return Checkpoint(step, final, manifest)

    def _make_way(self, step: int) -> None:
        """Set damaged checkpoints aside, so that they neither block `step` nor count among those that are kept."""
        for old in self.steps():
            if old < step and old not in self._rejected:
                continue
            folder = self.folder / _name(old)
            try:
                verify(folder, old)
            except DamagedError as error:
                aside = self.folder / f".bad-{folder.name}-{time.time_ns()}"
                os.rename(folder, aside)
                self._rejected.discard(old)
                self._warn(f"checkpoint of step {old} is damaged, and now in {aside}: {error}")
                continue
            if old >= step:
                raise SaveError(
                    f"{folder}: is valid, and never overwritten; found step {step}, expected more than {old}"
                )

    def _settle(self, step: int) -> None:
        """What follows a save that has succeeded; if this fails, the checkpoint is there all the same."""
        try:
            write_atomic(self.folder / LATEST, json.dumps({"step": step, "folder": _name(step)}) + "\n")
            self._prune()
        except (OSError, RwftError) as error:
            self._warn(f"checkpoint of step {step} is saved, but {LATEST} or older checkpoints are as before: {error}")

    def _prune(self) -> None:
        surplus = self.steps()[: -self.keep]
        for step in surplus:
            os.rename(self.folder / _name(step), self.folder / f"{TRASH}{_name(step)}")
        if surplus:
            sync(self.folder)  # or a loss of power could leave the old name on a folder half deleted
        for name in _entries(self.folder):
            if name.startswith(TRASH):
                remove(self.folder / name)

    def load(
        self, verify_fingerprints: Mapping[str, str] | None = None
    ) -> tuple[Checkpoint, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The newest valid checkpoint, its tensors (on the CPU) and its state; None if nothing was ever saved.

        A damaged one is passed over with a warning. Raises CheckpointError when checkpoints were
        saved and none is valid, and when a fingerprint of the one found is not as in
        `verify_fingerprints`: nothing starts over silently.
        """
        steps, reasons = self.steps(), self._lost()
        for step in reversed(steps):
            folder = self.folder / _name(step)
            try:
                manifest = verify(folder, step)
                _require_same(folder, manifest["fingerprints"], verify_fingerprints or {})
                return Checkpoint(step, folder, manifest), *_read(folder, manifest)
            except DamagedError as error:
                self._rejected.add(step)
                reasons.append(f"checkpoint of step {step} is damaged and passed over: {error}")
                self._warn(reasons[-1])
        if reasons:
            raise CheckpointError(
                f"{self.folder}: no valid checkpoint is left: {'; '.join(reasons)}; "
                "put a good copy back, or start over in another output"
            )
        return None

    def _lost(self) -> list[str]:
        """A sentence if the newest checkpoint that was ever acknowledged is gone."""
        file, newest = self.folder / LATEST, max(self.steps(), default=-1)
        if not os.path.lexists(file):
            return []
        try:
            named = json.loads(file.read_bytes())["step"]
            lost = f"{file} names step {named}, which is gone" if named > newest else ""
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            lost = f"{file} cannot be read: {error}"
        if lost:
            self._warn(lost)
        return [lost] if lost else []

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        log.warning(text)


def verify(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`, once every file has been found to be as it was written.

    Raises DamagedError with the file and what is wrong with it.
    """
    try:
        if folder.is_symlink() or not folder.is_dir():
            raise DamagedError(f"{folder}: found a link or a file, expected a folder")
        manifest = _manifest(folder / MANIFEST)
        if manifest["step"] != step:
            raise DamagedError(f"{folder / MANIFEST}: is of step {manifest['step']}, expected {step}")
        _require_names(folder, manifest["files"])
        for name, entry in manifest["files"].items():
            _require_content(folder / name, entry)
    except OSError as error:
        raise DamagedError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / MANIFEST}: is no manifest: {error!r}") from error
    return manifest


def _manifest(file: Path) -> dict[str, Any]:
    if not is_plain_file(file):
        raise DamagedError(f"{file}: found a link or a folder, expected a file")
    raw = file.read_bytes()
    try:
        manifest = json.loads(raw)
        written = _signed({key: value for key, value in manifest.items() if key != "digest"})
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{file}: is no manifest: {error}") from error
    if raw != written:
        raise DamagedError(f"{file}: is not as it was written")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{file}: found format {manifest['format']}, expected {FORMAT}; load it with what wrote it"
        )
    return manifest


def _signed(manifest: dict[str, Any]) -> bytes:
    """The manifest as it stands in its file, with a digest of itself: one content, one spelling."""
    plain = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False)
    manifest = {**manifest, "digest": hashlib.sha256(plain.encode()).hexdigest()}
    return json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False).encode()


def _require_names(folder: Path, files: Mapping[str, Any]) -> None:
    present = set(os.listdir(folder)) - {MANIFEST}
    for name in files:
        if not FILE_NAME.fullmatch(name):
            raise DamagedError(f"{folder / MANIFEST}: lists {name!r}, expected names such as model.safetensors")
    for name in sorted(files.keys() | {STATE}):
        if name not in present or name not in files:
            raise DamagedError(f"{folder / name}: is missing")
    for name in sorted(present - files.keys()):
        raise DamagedError(f"{folder / name}: is not in {MANIFEST}")


def _require_content(file: Path, entry: Mapping[str, Any]) -> None:
    if not is_plain_file(file):
        raise DamagedError(f"{file}: found a link or a folder, expected a file")
    size = file.stat().st_size
    if size != entry["size"]:
        raise DamagedError(f"{file}: found {size} bytes, expected {entry['size']}")
    if sha256(file) != entry["sha256"]:
        raise DamagedError(f"{file}: its content is not what was written (sha256 differs)")


def _require_same(folder: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{folder}: '{name}' has changed since it was saved: found {value!r}, expected {saved.get(name)!r}; "
                "go on with what it was trained with, or start over in another output"
            )


def _read(folder: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    try:
        state = json.loads((folder / STATE).read_bytes())
        files = {name.removesuffix(".safetensors"): folder / name for name in manifest["files"] if name != STATE}
        # load_file maps the file into memory; a clone stays as it was verified, whatever becomes of the file
        tensors = {name: {key: t.clone() for key, t in load_file(file).items()} for name, file in files.items()}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise DamagedError(f"{folder}: cannot be read: {error}") from error
    return tensors, state


def _write(
    spare: Path, step: int, groups: Mapping[str, dict[str, Tensor]], text: bytes, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """A whole checkpoint under a name that means nothing yet, all of it flushed to the disk."""
    if os.path.lexists(spare):  # of a save that failed and could not clean up
        remove(spare)
    spare.mkdir()
    write_new(spare / STATE, text)
    files = {STATE: describe(spare / STATE)}
    for name, group in groups.items():
        file = spare / f"{name}.safetensors"
        save_file(group, file)
        shutil.copymode(spare / STATE, file)  # safetensors writes 0600; the other has what the umask gives
        sync(file)
        files[file.name] = describe(file)
    written = _signed({"format": FORMAT, "step": step, "fingerprints": dict(fingerprints), "files": files})
    write_new(spare / MANIFEST, written)
    sync(spare)
    return json.loads(written)


def _require_space(final: Path, needed: int) -> None:
    free, wanted = shutil.disk_usage(final.parent).free, int(MARGIN * needed)
    if free < wanted:
        raise SaveError(
            f"{final}: not saved: {wanted} bytes are needed ({MARGIN} x its size), {free} bytes are free; "
            "make room, or name another output"
        )


def _storable(final: Path, name: str, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one file as they can be written: dense, plain, and no two of them in the same memory."""
    if not GROUP_NAME.fullmatch(name):
        raise SaveError(f"{final}: cannot have a file '{name}.safetensors'; expected letters, digits and _")
    for key, tensor in group.items():
        if key == "__metadata__":
            raise SaveError(f"{final / name}: no tensor can be called '{key}' in a safetensors file; rename it")
        if type(tensor) not in (Tensor, Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
            found = f"{type(tensor).__name__} ({tensor.layout} on {tensor.device})"
            raise SaveError(f"{final / name}: '{key}': found a {found}, expected a plain dense tensor; gather it first")
    _require_apart(final / name, group)
    return {key: t.detach().resolve_conj().resolve_neg().contiguous() for key, t in group.items()}


def _require_apart(where: Path, group: Mapping[str, Tensor]) -> None:
    spans = sorted((str(t.device), t.data_ptr(), _extent(t), key) for key, t in group.items() if t.numel())
    for (device, start, extent, key), (next_device, next_start, _, next_key) in itertools.pairwise(spans):
        if device == next_device and next_start < start + extent:
            raise SaveError(f"{where}: '{key}' and '{next_key}' share memory; give one of them, or a clone")


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last, by the strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _plain_json(file: Path, state: Mapping[str, Any]) -> bytes:
    """`state` as JSON that reads back equal; tuples, keys that are no text and NaN do not."""
    for key, value in state.items():
        try:
            same = json.loads(json.dumps({key: value}, allow_nan=False)) == {key: value}
        except (TypeError, ValueError, RecursionError) as error:
            raise SaveError(f"{file}: '{key}': {error}; expected plain JSON") from error
        if not same:
            raise SaveError(f"{file}: '{key}' would not read back equal; expected plain JSON (lists, and text as keys)")
    return json.dumps(dict(state), allow_nan=False).encode()


def _name(step: int) -> str:
    if step < 0:
        raise ValueError(f"step: found {step}, expected a whole number >= 0")
    return f"step_{step:08d}"


def _entries(folder: Path) -> list[str]:
    """Names in a folder, sorted; none if it is not there."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {error.strerror}; expected a folder of checkpoints that can be read"
        ) from error
