"""Tokenising in processes of their own: the same rows in the same order as without them, on more cores.

Reading stays in the process that asked, which hands out blocks of examples and takes back their tokens in the order of
the file. A worker is a new interpreter at the end of two pipes: no process with threads and devices is copied, the
user's script is not run again, and a worker whose parent is gone, however it went, finds its pipe closed and ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rwft.config import DataConfig
from rwft.data.example import Example
from rwft.data.sources import local_files
from rwft.data.tokenize import Dropped, Tokenize, Tokens
from rwft.errors import RwftError

MANY = 32 << 20  # bytes of data from which workers are worth their start (2 CPU seconds and 250 MiB each)
FEWER = 20_000  # rows, where data.limit says how many
MOST = 8  # one process reads for all of them

Block = list[Example]
Made = tuple[Block, list[Tokens | Dropped]]


def worker_count(config: DataConfig, path: Any) -> int:
    """How many workers tokenise `path`: as many as were asked for; under `auto` none for small data."""
    if config.workers != "auto":
        return int(config.workers)
    files = local_files(path)
    few = config.limit is not None and config.limit < FEWER
    if few or files is None or sum(file.stat().st_size for file in files) < MANY:
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


class _Crew:
    """Workers, each with one block at a time."""

    def __init__(self, tokenize: Tokenize, workers: int) -> None:
        self.workers = [_start() for _ in range(workers)]
        self.setup, self.ready = pickle.dumps(tokenize), set[int]()
        self.free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for worker in self.workers:
            self.free.put(worker)

    def tokens(self, block: Block) -> list[Tokens | Dropped]:
        """What a free worker makes of the block. Raises what it raised; RwftError if it died."""
        worker = self.free.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            if worker.pid not in self.ready:
                worker.stdin.write(self.setup)
                self.ready.add(worker.pid)
            pickle.dump(block, worker.stdin, pickle.HIGHEST_PROTOCOL)
            worker.stdin.flush()
            made = pickle.load(worker.stdout)  # noqa: S301 - this program's own words
        except (OSError, EOFError, pickle.UnpicklingError):
            raise RwftError(_death(worker, block[0])) from None
        finally:
            self.free.put(worker)
        if isinstance(made, Exception):
            raise made
        return made

    def dismiss(self) -> None:
        """End all workers at once, whatever they do."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()
            with contextlib.suppress(OSError), worker:  # closes its pipes; what was not yet sent has no reader left
                pass


def _death(worker: subprocess.Popen[bytes], example: Example) -> str:
    code = worker.wait()
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    return (
        f"{example.source}: a process that tokenised the rows from here on ended {how}, perhaps for want of memory; "
        "use fewer of them, e.g. data.workers=0"
    )


def _start() -> subprocess.Popen[bytes]:
    """A new interpreter with this one's search path; the keyboard's interrupt is its parent's business."""
    command = f"import sys; sys.path[:] = {sys.path!r}; from rwft.data.workers import serve; serve()"
    surroundings = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=surroundings,
        start_new_session=True,
    )


def serve() -> None:
    """A worker's whole life: a Tokenize, then blocks, from its standard input, until that is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        tokenize = _next()
        while True:
            pickle.dump(_made(tokenize, _next()), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _next() -> Any:
    return pickle.load(sys.stdin.buffer)  # noqa: S301 - its parent's words


def _made(tokenize: Tokenize, block: Block) -> list[Tokens | Dropped] | Exception:
    try:
        return tokenize.batch(block)
    except RwftError as error:
        return error
    except Exception:  # noqa: BLE001 - raised again where it can be seen, with what a traceback there could not show
        return RuntimeError(f"{block[0].source}: while tokenising from here on:\n{traceback.format_exc()}")
