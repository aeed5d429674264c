"""Data larger than memory: python benchmarks/scale.py [--rows 100000 1000000] [--fitted 1000000 10000000].

Rows of a generated file (four completions a prompt, scored) are read, tokenised a character at a time, given credit
and taken in batches, in a process of its own for each size and format: CPU seconds of the first start, which
tokenises, of the second, which finds everything in the cache, and of credit and the order of rows; and the memory
that each start holds above its imports. "own" is memory that the system cannot take back; pages of the files
in the cache, which it can, are not in it. Credit is then fitted to rewards in groups of eight, held in arrays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GROUP, BATCHES = 4, 200
FORMATS = ("jsonl", "parquet")
BASELINES = ("mean", "group_mean", "leave_one_out", "length_weighted")


def write_data(path: Path, rows: int) -> None:
    """Scored completions of 12 to 40 letters, four behind each prompt, in blocks of 10,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("prompt", pa.string()), ("completion", pa.string()), ("reward", pa.float64())])
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, schema) as writer:
            for block in blocks(rows):
                writer.write_batch(pa.RecordBatch.from_pylist(block, schema=schema))
        return
    with path.open("w", encoding="utf-8") as handle:
        for block in blocks(rows):
            handle.writelines(json.dumps(row) + "\n" for row in block)


def blocks(rows: int) -> Iterator[list[dict[str, Any]]]:
    draw = random.Random(0)
    letters = "".join(draw.choices("abcdefgh ", k=100_000))
    for start in range(0, rows, 10_000):
        yield [row(draw, letters, index) for index in range(start, min(start + 10_000, rows))]


def row(draw: random.Random, letters: str, index: int) -> dict[str, Any]:
    at, size = draw.randrange(99_000), draw.randint(12, 40)
    return {
        "prompt": f"question {index // GROUP}",
        "completion": letters[at : at + size],
        "reward": round(draw.random(), 6),
    }


class Watch:
    """Peak of the process's own memory (anonymous pages), seen every few milliseconds, and what it was at the start."""

    def __init__(self) -> None:
        self.before = self.peak = own_mib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, own_mib())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def grown(self) -> float:
        """MiB above the start, at the peak."""
        return self.peak - self.before


def own_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s*(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def child(path: Path) -> None:
    """One start over the data at `path`, its cache beside it; figures as JSON on the last line."""
    import torch

    from rwft.config import resolve
    from rwft.data.batching import Collate, Plan
    from rwft.data.characters import character_tokenizer
    from rwft.data.prepare import prepare

    torch.set_num_threads(1)
    credit = {"baseline": "leave_one_out", "scale": "group_std"}
    data = {"path": str(path), "adapter": "scored", "credit": credit, "eval_fraction": 0.05}
    model = {"config": {"model_type": "llama"}, "tokenizer": "characters"}
    content = {"model": model, "objective": "awr", "data": data}
    config, tokenizer = resolve({**content, "output": str(path.parent / "run")}).data, character_tokenizer()
    tokenizer(["a", "b"])
    figures: dict[str, float] = {}
    with Watch() as watch:
        started = time.process_time()
        prepared = prepare(config, tokenizer, frozenset({"advantage", "reward"}), path.parent / "cache")
        figures["prepare"] = time.process_time() - started
        known = prepared.known(prepared.train)
        rows = prepared.train
        alive = rows.reward > 0
        plan = Plan(
            rows.length,
            batch_size=8,
            accumulate=1,
            world=1,
            seed=0,
            prompt=rows.group,
            alive=alive,
            folder=rows.folder,
        )
        collate = Collate(rows, frozenset({"advantage"}), dtype=torch.float32, known=known)
        collate(plan.micro_batches(0, 0)[0])
        figures["first batch"] = time.process_time() - started
        started = time.process_time()
        for step in range(BATCHES):
            collate(plan.micro_batches(step, 0)[0])
        figures["batch"] = (time.process_time() - started) / BATCHES
    held = own_mib() - watch.before
    print(json.dumps({**figures, "peak": watch.grown, "held": held, "rows": len(rows)}))


def start(path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def data_table(sizes: list[int]) -> Iterator[str]:
    if not sizes:
        return
    yield "\n| rows | format | first start, CPU s | own memory, peak | second start | own memory, peak | held | batch |"
    yield "|---|---|---|---|---|---|---|---|"
    for rows in sizes:
        for name in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"rows.{name}"
                write_data(path, rows)
                one, two = start(path), start(path)
            cells = [f"{rows:,}", name, f"{one['first batch']:.1f}", f"{one['peak']:.0f} MiB"]
            cells += [f"{two['first batch']:.2f}", f"{two['peak']:.0f} MiB", f"{two['held']:.0f} MiB"]
            yield f"| {' | '.join(cells)} | {two['batch'] * 1000:.2f} ms |"


def credit_table(sizes: list[int]) -> Iterator[str]:
    from rwft.config import CreditConfig
    from rwft.data.credit import fit

    if not sizes:
        return
    yield "\n| rows | " + " | ".join(f"{name}, CPU s" for name in BASELINES) + " | every signal, CPU s | peak |"
    yield "|---" * (len(BASELINES) + 3) + "|"
    for rows in sizes:
        draw = np.random.default_rng(0)
        groups = draw.integers(0, 1 << 62, rows // 8 + 1)[draw.integers(0, rows // 8 + 1, rows)]
        reward, lengths = draw.normal(size=rows), draw.integers(1, 512, rows)
        cells = [f"{rows:,}"]
        with Watch() as watch, tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for baseline in BASELINES:
                started = time.process_time()
                credit = fit(CreditConfig(baseline=baseline, scale="group_std"), reward, groups, lengths, folder=folder)
                credit.advantage(reward, groups, lengths, folder=folder)
                cells.append(f"{time.process_time() - started:.2f}")
            credit, started = fit(CreditConfig(), reward, groups, lengths, folder=folder), time.process_time()
            credit.signals(reward, groups, lengths, folder=folder)
            cells.append(f"{time.process_time() - started:.2f}")
        yield f"| {' | '.join(cells)} | {watch.grown:.0f} MiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--fitted", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    for line in itertools.chain(data_table(given.rows), credit_table(given.fitted)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
