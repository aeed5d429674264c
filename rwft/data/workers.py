"""Tokenising in processes of their own: the same rows in the same order as without them, on more cores.

Reading stays in the process that asked, which hands out blocks of examples and takes back their tokens in the order of
the file. A worker is a new interpreter at the end of a pipe: no process with threads and devices is copied, the
user's script is not run again, and a worker whose parent is gone, however it went, finds its pipe closed and ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from rwft.config import DataConfig
from rwft.data.example import Example
from rwft.data.sources import local_files
from rwft.data.tokenize import Dropped, Tokenize, Tokens
from rwft.errors import RwftError

MANY = 32 << 20  # bytes of data from which workers are worth their start (2 CPU seconds and 250 MiB each)
FEWER = 20_000  # rows, where data.limit says how many
STDERR = 2
MOST = 8  # one process reads for all of them

Block = list[Example]
Made = tuple[Block, list[Tokens | Dropped]]


def worker_count(config: DataConfig, path: Any) -> int:
    """How many workers tokenise `path`: as many as were asked for; under `auto` none for small data."""
    if config.workers != "auto":
        return int(config.workers)
    files = local_files(path)
    few = config.limit is not None and config.limit < FEWER
    if os.name != "posix" or few or files is None or sum(file.stat().st_size for file in files) < MANY:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST) if cores > 1 else 0


def tokens_of(blocks: Iterable[Block], tokenize: Tokenize, workers: int) -> Iterator[Made]:
    """Each block with its tokens, in order; the first block that is wrong raises, behind all that precede it."""
    if not workers:
        yield from ((block, tokenize.batch(block)) for block in blocks)
        return
    crew = _Crew(tokenize, workers)
    with ThreadPoolExecutor(workers) as threads:
        try:
            yield from _in_order(blocks, crew, threads, 2 * workers)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            crew.dismiss()  # a thread that waits for its worker's answer is free then


def _in_order(blocks: Iterable[Block], crew: _Crew, threads: ThreadPoolExecutor, ahead: int) -> Iterator[Made]:
    waiting: deque[tuple[Block, Future[list[Tokens | Dropped]]]] = deque()
    problem: Exception | None = None
    stream = iter(blocks)
    while problem is None:
        try:
            block = next(stream, None)
        except Exception as error:  # noqa: BLE001 - raised below, behind what was read before it
            problem = error
            break
        if block is None:
            break
        waiting.append((block, threads.submit(crew.tokens, block)))
        if len(waiting) > ahead:
            first, made = waiting.popleft()
            yield first, made.result()
    yield from ((block, made.result()) for block, made in waiting)
    if problem is not None:
        raise problem


@dataclass
class _Worker:
    """A process, and this end of the connection to it."""

    process: subprocess.Popen[bytes]
    line: Connection
    instructed: bool = False  # has its Tokenize


class _Crew:
    """Workers, each with one block at a time."""

    def __init__(self, tokenize: Tokenize, workers: int) -> None:
        self.tokenize, self.workers = tokenize, [_start() for _ in range(workers)]
        self.free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.free.put(worker)

    def tokens(self, block: Block) -> list[Tokens | Dropped]:
        """What a free worker makes of the block. Raises what it raised; RwftError if it died."""
        worker = self.free.get()
        try:
            if not worker.instructed:
                worker.line.send(self.tokenize)
                worker.instructed = True
            worker.line.send(block)
            made = worker.line.recv()
        except (OSError, EOFError):
            raise RwftError(_death(worker.process, block[0])) from None
        finally:
            self.free.put(worker)
        if isinstance(made, Exception):
            raise made
        return made

    def dismiss(self) -> None:
        """End all workers at once, whatever they do."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait()


def _death(process: subprocess.Popen[bytes], example: Example) -> str:
    code = process.wait()
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    return (
        f"{example.source}: a process that tokenised the rows from here on ended {how}, perhaps for want of memory; "
        "use fewer of them, e.g. data.workers=0"
    )


def _start() -> _Worker:
    """A new interpreter with this one's search path; the keyboard's interrupt is its parent's business."""
    ours, theirs = Pipe()
    command = f"import sys; sys.path[:] = {sys.path!r}; from rwft.data.workers import serve; serve({theirs.fileno()})"
    surroundings = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=STDERR,  # what a library prints is not this command's output
        env=surroundings,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    return _Worker(process, ours)


def serve(line: int) -> None:
    """A worker's whole life: a Tokenize, then blocks, from the connection of this number, until that is closed."""
    parent = Connection(line)
    with contextlib.suppress(EOFError, OSError):
        tokenize = parent.recv()
        while True:
            parent.send(_made(tokenize, parent.recv()))


def _made(tokenize: Tokenize, block: Block) -> list[Tokens | Dropped] | Exception:
    try:
        return tokenize.batch(block)
    except RwftError as error:
        return error
    except Exception:  # noqa: BLE001 - raised again where it can be seen, with what a traceback there could not show
        return RuntimeError(f"{block[0].source}: while tokenising from here on:\n{traceback.format_exc()}")
