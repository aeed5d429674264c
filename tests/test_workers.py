"""Tokenising in processes of their own: the same bytes, the first bad row, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests as made

from rwft.config import DataConfig
from rwft.data import prepare as prepare_module
from rwft.data import workers as workers_module
from rwft.data.example import Example, Source
from rwft.data.prepare import prepare
from rwft.data.workers import tokens_of, worker_count
from rwft.errors import ConfigError, DataError, RwftError
from rwft.loop import train
from tests.tiny import tiny


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """All processes that were started."""
    workers: list[subprocess.Popen[bytes]] = []
    right = workers_module._start

    def start() -> Any:
        worker = right()
        workers.append(worker.process)
        return worker

    monkeypatch.setattr(workers_module, "_start", start)
    return workers


def chat_rows(path: Path, number: int) -> Path:
    """Conversations of different lengths; each eleventh is too long, each fifth has no reward of its own group."""
    lines = []
    for i in range(number):
        prompt = [{"role": "user", "content": f"hi 7 {'ab' * (i % 9)}"}]
        completion = [{"role": "assistant", "content": "so " * (80 if i % 11 == 10 else i % 7) + "hi"}]
        lines.append(json.dumps({"prompt": prompt, "completion": completion, "reward": i % 3}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def bytes_made(data: Path, cache: Path, workers: int) -> dict[str, bytes]:
    """Every file of the cache of tokenised rows, by name."""
    config = DataConfig(path=str(data), max_length=90, workers=workers)
    ticks: list[int] = []
    prepare(config, made.byte_bpe(template=made.CHATML), frozenset({"reward"}), cache, ticks.append)
    assert sum(ticks) == 60
    return {file.name: file.read_bytes() for file in sorted((cache / "rows").iterdir()) if file.is_file()}


def test_the_files_are_the_same_to_the_byte_whatever_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    monkeypatch.setattr(prepare_module, "BLOCK", 8)
    data = chat_rows(tmp_path / "rows.jsonl", 60)
    alone = bytes_made(data, tmp_path / "alone", 0)
    assert not started
    assert len(alone) == 2
    report = json.loads(next(content for name, content in alone.items() if name.endswith(".json")))
    assert (report["read"], report["kept"]) == (60, 55)
    assert bytes_made(data, tmp_path / "one", 1) == alone
    assert bytes_made(data, tmp_path / "three", 3) == alone
    assert len(started) == 4
    assert all(worker.returncode is not None for worker in started)


def test_another_number_of_workers_finds_the_rows_in_the_cache(tmp_path: Path, started: list[Any]) -> None:
    data = chat_rows(tmp_path / "rows.jsonl", 20)
    tokenizer = made.byte_bpe(template=made.CHATML)
    first, second = (
        prepare(DataConfig(path=str(data), workers=workers), tokenizer, frozenset(), tmp_path / "cache").train
        for workers in (1, 2)
    )
    assert first.fingerprint == second.fingerprint
    assert len(started) == 1


def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    done = train(tiny(tmp_path, "data.workers=0"))
    assert train(tiny(tmp_path, "data.workers=2")) == done


# -- what goes wrong

ADAPTER = """
from rwft import Example
from rwft.errors import DataError


def rows(row, source):
    if row["kind"] == "unreadable":
        raise DataError("prompt: found 7")
    if row["kind"] == "messages":
        yield Example([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}], source)
    else:
        yield Example("p", "c" * (70 if row["kind"] == "long" else 2), source)
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({9: "long", 30: "long"}, r"rows.jsonl:10: found 72 tokens"),  # in other blocks
        ({17: "long", 18: "messages"}, r"rows.jsonl:18: found 72 tokens"),  # in one, where the second is found earlier
        ({17: "messages", 18: "long"}, r"rows.jsonl:18: found messages, but the tokenizer has no chat template"),
        ({3: "long", 40: "unreadable"}, r"rows.jsonl:4: found 72 tokens"),
        ({3: "long", 12: "unreadable"}, r"rows.jsonl:4: found 72 tokens"),  # while the second was read already
        ({40: "unreadable"}, r"rows.jsonl:41: prompt: found 7"),
    ],
)
def test_the_first_bad_row_of_the_file_is_named(
    bad: dict[int, str], found: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    monkeypatch.setattr(prepare_module, "BLOCK", 8)
    (tmp_path / "mine.py").write_text(ADAPTER)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"kind": bad.get(i, "good")}) + "\n" for i in range(48)), encoding="utf-8")
    settings: dict[str, Any] = {"max_length": 20, "overlong": "raise", "workers": workers}
    config = DataConfig(path=str(data), adapter=f"{tmp_path / 'mine.py'}:rows", **settings)
    with pytest.raises(DataError, match=found):
        prepare(config, made.byte_bpe(), frozenset(), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "rows").iterdir())
    assert len(started) == workers
    assert all(worker.returncode is not None for worker in started)


def blocks(number: int) -> list[list[Example]]:
    return [[Example("p", "c", Source("rows.jsonl", 2 * i + j)) for j in (1, 2)] for i in range(number)]


class Late:
    """Makes of a block the numbers of its rows; the first takes longest, and some block may end its process."""

    def __init__(self, deadly: int | None = None, broken: int | None = None, pause: float = 0.0) -> None:
        self.deadly, self.broken, self.pause = deadly, broken, pause

    def batch(self, block: list[Example]) -> list[Any]:
        first = block[0].source.row
        time.sleep(0.5 if first == 1 else self.pause)
        if first == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        print("a library's own words")  # noqa: T201 - must not get between the answers
        return [1 // (example.source.row != self.broken) * example.source.row for example in block]


def numbers(late: Any, given: Any, workers: int) -> list[list[Any]]:
    return [tokens for _, tokens in tokens_of(given, late, workers)]


def test_blocks_come_in_order_though_the_first_is_done_last() -> None:
    assert numbers(Late(), blocks(9), 3) == [[2 * i + 1, 2 * i + 2] for i in range(9)]


def test_a_worker_that_dies_is_named_in_one_line_behind_the_blocks_before_it(started: list[Any]) -> None:
    seen = []
    with pytest.raises(RwftError, match=r"^rows.jsonl:7: .* ended by signal 9, .*data.workers=0$") as caught:
        seen.extend(tokens for _, tokens in tokens_of(blocks(9), Late(deadly=7), 2))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert seen == [[1, 2], [3, 4], [5, 6]]
    assert [worker.returncode for worker in started] == [-9, -9]


def test_a_fault_of_the_code_itself_comes_with_its_place() -> None:
    with pytest.raises(RuntimeError, match=r"rows.jsonl:3: (?s:.*)in batch(?s:.*)ZeroDivisionError"):
        numbers(Late(broken=4), blocks(5), 2)


def test_no_more_is_read_than_the_workers_have_in_hand() -> None:
    read = []

    def given() -> Iterator[list[Example]]:
        for block in blocks(40):
            read.append(block)
            yield block

    ahead = [len(read) - taken for taken, _ in enumerate(tokens_of(given(), Late(), 2), 1)]  # type: ignore[arg-type]
    assert len(ahead) == 40
    assert max(ahead) == 4


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_an_interruption_leaves_nobody_behind(where: str, started: list[Any]) -> None:
    def given() -> Iterator[list[Example]]:
        yield from blocks(3)
        if where == "reading":
            raise KeyboardInterrupt
        yield from blocks(20)

    def go() -> None:
        for number, _ in enumerate(tokens_of(given(), Late(pause=30.0), 2)):  # type: ignore[arg-type]
            if number == 0:
                raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        go()
    assert time.monotonic() - began < 25  # it did not wait for what they were doing
    assert all(worker.returncode == -9 for worker in started)
    assert len(started) == 2


ORPHANS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from rwft.data import workers
from tests.test_workers import Late, blocks
right = workers._start
def start():
    worker = right()
    print(worker.process.pid, flush=True)
    return worker
workers._start = start
for made in workers.tokens_of(blocks(1000), Late(pause=0.05), 2):
    print("made", flush=True)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up where Linux lists them")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_however_it_ends(how: signal.Signals) -> None:
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings,
        start_new_session=True,
    )
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    assert parent.stdout.readline() == "made\n"
    assert not any(gone(pid) for pid in pids)
    assert parent.pid not in map(os.getpgid, pids)  # a terminal's interrupt does not reach them
    os.killpg(parent.pid, how)  # as a terminal does
    _, said = parent.communicate(timeout=60)
    assert parent.returncode in (-how, 1)
    assert "in serve" not in said
    deadline = time.monotonic() + 30
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids)


# -- how many


@pytest.mark.parametrize(
    ("size", "cores", "settings", "expected"),
    [
        (32 << 20, 4, {}, 4),
        (32 << 20, 64, {}, 8),
        (32 << 20, 1, {}, 0),
        ((32 << 20) - 1, 4, {}, 0),
        (32 << 20, 4, {"limit": 19_999}, 0),
        (32 << 20, 4, {"limit": 20_000}, 4),
        (1, 4, {"workers": 3}, 3),
        (32 << 20, 4, {"workers": 0}, 0),
    ],
)
def test_how_many_workers(
    size: int, cores: int, settings: dict[str, Any], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name, part in (("a.jsonl", size // 2), ("b.jsonl", size - size // 2)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(part)
    assert worker_count(DataConfig(path=str(tmp_path), **settings), str(tmp_path)) == expected


@pytest.mark.parametrize("workers", ["many", -1, True, 1.5, None])
def test_another_number_is_refused(workers: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.workers: found .*, expected auto or a whole number >= 0"):
        DataConfig(path="rows.jsonl", workers=workers)
