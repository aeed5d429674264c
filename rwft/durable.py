"""Files that survive a crash: written whole, flushed to the disk, put in place by one rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from rwft.errors import SaveError, UserError

TMP, TRASH = ".tmp-", ".trash-"
"""How names begin that mean nothing after a crash."""

_serial = itertools.count()


def sync(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create `path` and its missing parents, each entry flushed to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def refuse_unwritable(key: str, path: Path) -> None:
    """Before any work: raises UserError where no folder `path` could be made and written, SaveError on a full disk."""
    place = path.absolute()
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryDirectory(prefix=TMP, dir=place):
            pass  # the only test that also holds for root, and for file systems of the system's own
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SaveError(f"{key}: {path} cannot be written: {disk_report(error, place)}") from error
        raise UserError(
            f"{key}: {path} cannot be written: {place}: {error.strerror}; name a folder that can be made and written"
        ) from error


def write_new(path: Path, data: bytes) -> None:
    """Create `path`, which must not exist, and flush its data (not its name) to the disk."""
    _create(path, (data,))


def _create(path: Path, parts: Iterable[bytes]) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Put `data` (text as UTF-8) at `path`: after a crash at any moment it holds the old content or the new, whole.

    Raises SaveError with the path and the reason; the old content is then intact.
    """
    content = data.encode() if isinstance(data, str) else data
    _replace(path, (content,), len(content))


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """As `write_atomic`, for a text that comes in parts and is never whole in memory."""
    _replace(path, (part.encode() for part in parts), None)


def _replace(path: Path, parts: Iterable[bytes], needed: int | None) -> None:
    spare = path.with_name(f"{TMP}{path.name}-{os.getpid()}-{next(_serial)}")
    try:
        _create(spare, parts)
        os.replace(spare, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            spare.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise SaveError(f"{path}: not written: {disk_report(error, path.parent, needed)}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails while something is written at `path` becomes a SaveError with the path and the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path}: not written: {disk_report(error, path.parent)}") from error


def disk_report(error: BaseException, folder: Path, needed: int | None = None) -> str:
    """Why a write failed, in one line: the reason, bytes needed if that is known, bytes free."""
    reason = " ".join(str(error).split())
    reason = reason if isinstance(error, OSError) else f"{type(error).__name__}: {reason}"
    try:
        free = f"{shutil.disk_usage(folder).free} bytes are free"
    except OSError:
        free = "the free space cannot be read"
    wanted = "" if needed is None else f"{needed} bytes are needed, "
    return f"{reason}; {wanted}{free}; if the disk is full, make room or name another output"


def describe(path: Path) -> dict[str, int | str]:
    """Size in bytes and sha256 of a file, as it is read back."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_plain_file(path: Path) -> bool:
    """Whether `path` is a regular file; a symbolic link to one is not."""
    return stat.S_ISREG(path.lstat().st_mode)


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points at) or a folder with all it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RunLock:
    """Keeps a second run out of `folder`, which is made if missing; a dead holder's lock is free at once.

    Raises UserError with the pid and host of the holder. `run.lock` says who that is; the lock
    itself is the system's, on `.lock`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")

    def __enter__(self) -> RunLock:
        try:
            make_folder(self.folder)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"output: {self.folder} is in use by {self._holder()}; wait until that run ends, or name another output"
            ) from None
        except OSError as error:
            raise UserError(f"output: {self.folder}: {error}; name a folder that can be made and written") from error
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            write_atomic(self.folder / "run.lock", json.dumps(holder) + "\n")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # First the name, then the lock: in the other order it could be the next holder's name that goes.
        try:
            (self.folder / "run.lock").unlink(missing_ok=True)
        finally:
            self._lock.release()

    def _holder(self) -> str:
        try:
            holder = json.loads((self.folder / "run.lock").read_text(encoding="utf-8"))
            return f"pid {holder['pid']} on host {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and has not written its name yet
            return "another run (its run.lock cannot be read)"
