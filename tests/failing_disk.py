"""Disks that fail: at the n-th call, and by a loss of power that forgets what was not flushed."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import rwft.checkpoint
import rwft.durable

SYSTEM_CALLS = ("open", "write", "fsync", "close", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod", "listdir")
LIBRARY_CALLS = ((rwft.checkpoint, "save_file"), (rwft.durable, "sha256"), (shutil, "disk_usage"))


class FailingDisk:
    """Does `fail()` in place of call number `nth` (from 1) that touches the file system; `calls` names them all.

    What is written by the call that fails is left half written. With `from_then_on` every later call fails too.
    """

    def __init__(self, nth: int, fail: Callable[[], None], from_then_on: bool = False) -> None:
        self.nth, self.fail, self.from_then_on = nth, fail, from_then_on
        self.calls: list[str] = []

    @contextmanager
    def __call__(self) -> Iterator[FailingDisk]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (*((os, name) for name in SYSTEM_CALLS), *LIBRARY_CALLS):
                patch.setattr(owner, name, self._wrap(name, getattr(owner, name)))
            yield self

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            count = len(self.calls)
            if count == self.nth or (self.from_then_on and count > self.nth > 0):
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                if name == "save_file":
                    Path(args[1]).write_bytes(b"half of a file")
                if name == "close":
                    call(*args)
                self.fail()
            return call(*args, **kwargs)

        return wrapped


class PowerLoss:
    """Records what is written and what is flushed, and builds every disk that a loss of power could leave.

    The model: a file holds what it held at its last fsync (nothing, before the first); an entry
    of a folder (created, renamed, deleted) is sure once that folder has been fsynced, and until
    then it may or may not have reached the disk, each entry by itself. `drop` is the number of
    an fsync (from 0) that is left out: a planted fault.
    """

    def __init__(self, root: Path, drop: int | None = None) -> None:
        self.root, self.drop = root, drop
        self.flushes: list[str] = []
        self.events: list[tuple[str, Any]] = []
        self._ids = itertools.count(1)
        self._live: dict[int, dict[str, int]] = {0: {}}  # folder -> name -> file or folder

    def acknowledge(self, what: Any) -> None:
        """The code under test says that `what` is safe."""
        self.events.append(("ack", what))

    # -- recording

    @contextmanager
    def __call__(self) -> Iterator[PowerLoss]:
        with pytest.MonkeyPatch.context() as patch:
            real = {
                name: getattr(os, name) for name in ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
            }
            save_file = rwft.checkpoint.save_file

            def path_of(path: Any, dir_fd: int | None) -> Path:
                return Path(path) if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path

            def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
                handle = real["open"](path, flags, mode, dir_fd=dir_fd)
                if flags & os.O_CREAT:
                    self._create(path_of(path, dir_fd))
                return handle

            def moved(call: str) -> Callable[[Any, Any], None]:
                def move(source: Any, target: Any) -> None:
                    real[call](source, target)
                    self._move(Path(source), Path(target))

                return move

            def mkdir(path: Any, mode: int = 0o777) -> None:
                real["mkdir"](path, mode)
                self._live[self._create(Path(path))] = {}

            def removed(call: str) -> Callable[..., None]:
                def remove(path: Any, *, dir_fd: int | None = None) -> None:
                    where = path_of(path, dir_fd)
                    real[call](path, dir_fd=dir_fd)
                    self._edit((self._find(where.parent), where.name, None))

                return remove

            def saved(tensors: Any, path: Any) -> None:
                save_file(tensors, path)
                self._create(Path(path))

            def fsync(handle: int) -> None:
                real["fsync"](handle)
                self._flush(handle, Path(os.readlink(f"/proc/self/fd/{handle}")))

            fakes = {"open": opened, "fsync": fsync, "mkdir": mkdir}
            fakes |= {name: moved(name) for name in ("rename", "replace")}
            fakes |= {name: removed(name) for name in ("unlink", "rmdir")}
            for name, fake in fakes.items():
                patch.setattr(os, name, fake)
            patch.setattr(rwft.checkpoint, "save_file", saved)
            yield self

    def _find(self, path: Path) -> int:
        node = 0
        for part in path.relative_to(self.root).parts:
            node = self._live[node][part]
        return node

    def _edit(self, *edits: tuple[int, str, int | None]) -> None:
        _apply(self._live, edits)
        self.events.append(("edit", edits))

    def _create(self, path: Path) -> int:
        new = next(self._ids)
        self._edit((self._find(path.parent), path.name, new))
        return new

    def _move(self, source: Path, target: Path) -> None:
        node = self._find(source)
        self._edit((self._find(source.parent), source.name, None), (self._find(target.parent), target.name, node))

    def _flush(self, handle: int, path: Path) -> None:
        self.flushes.append(str(path.relative_to(self.root)))
        if len(self.flushes) - 1 == self.drop:
            return
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self.events.append(("flush", self._find(path)))
        else:
            self.events.append(("data", (self._find(path), path.read_bytes())))

    # -- loss of power

    def disks(self, folder: Path) -> Iterator[tuple[Any, Path]]:
        """Each disk that a loss of power could leave, built in `folder`, after what was acknowledged by then."""
        seen: set[str] = set()
        for moment in range(len(self.events) + 1):
            acknowledged = [what for kind, what in self.events[:moment] if kind == "ack"][-1:]
            data = dict(what for kind, what in self.events[:moment] if kind == "data")
            for kept in self._survivors(moment):
                tree = self._tree(kept, data)
                key = repr((acknowledged, sorted((path, hash(text)) for path, text in tree.items())))
                if key not in seen:
                    seen.add(key)
                    yield (acknowledged[0] if acknowledged else None), _build(tree, folder / str(len(seen)))

    def _survivors(self, moment: int) -> Iterator[list[Any]]:
        """Choices of edits that reached the disk: all, each prefix of the unsure ones, all but one of them."""
        past = self.events[:moment]
        edits = [(at, what) for at, (kind, what) in enumerate(past) if kind == "edit"]
        sure = {
            at
            for at, what in edits
            if any(kind == "flush" and folder in {edit[0] for edit in what} for kind, folder in past[at:])
        }
        unsure = [at for at, _ in edits if at not in sure]
        lost = [set(unsure[cut:]) for cut in range(len(unsure) + 1)] + [{at} for at in unsure]
        for gone in lost:
            yield [what for at, what in edits if at not in gone]

    def _tree(self, edits: list[Any], data: dict[int, bytes]) -> dict[str, bytes | None]:
        nodes: dict[int, dict[str, int]] = {node: {} for node in self._live}
        for edit in edits:
            _apply(nodes, edit)
        return dict(_walk(0, "", nodes, data))


def _apply(nodes: dict[int, dict[str, int]], edits: Any) -> None:
    for folder, name, node in edits:
        if node is None:
            nodes[folder].pop(name, None)
        else:
            nodes[folder][name] = node


def _walk(
    node: int, path: str, nodes: dict[int, dict[str, int]], data: dict[int, bytes]
) -> Iterator[tuple[str, bytes | None]]:
    """Paths with their content (None for a folder); what no checkpoint is named after is left out, nobody reads it."""
    for name, child in nodes[node].items():
        if name.startswith((".tmp-", ".trash-")):
            continue
        if child in nodes:
            yield f"{path}{name}", None
            yield from _walk(child, f"{path}{name}/", nodes, data)
        else:
            yield f"{path}{name}", data.get(child, b"")


def _build(tree: dict[str, bytes | None], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    return folder
