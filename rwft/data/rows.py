"""Tokenised rows on disk: an Arrow file, memory-mapped, named by the fingerprint of what made it.

Token lists stay in the file; what is one number per row (reward, group, length) is held as
an array, so that credit assignment and batching never touch the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rwft.data.example import Example, Source
from rwft.data.tokenize import Tokens

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.bool_())),
        ("weight", pa.list_(pa.float32())),
        ("behavior_logp", pa.list_(pa.float64())),
        ("step_position", pa.list_(pa.int32())),
        ("step_reward", pa.list_(pa.float64())),
        ("reward", pa.float64()),
        ("value", pa.float64()),
        ("group", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
    ]
)
BLOCK = 1024


@dataclass(frozen=True)
class Rows:
    """All rows of one split. `n` rows; lengths count target positions, `trained` those under the mask."""

    table: pa.Table  # of the whole file; nothing of it is copied
    where: NDArray[np.int64]  # (n), which rows of the table these are
    fingerprint: str
    reward: NDArray[np.float64]  # (n), NaN where the data give none
    value: NDArray[np.float64]  # (n), NaN where the data give none
    group: NDArray[np.int64]  # (n)
    length: NDArray[np.int64]  # (n)
    trained: NDArray[np.int64]  # (n)

    def __len__(self) -> int:
        return len(self.where)

    @cached_property
    def _blocks(self) -> tuple[list[pa.RecordBatch], NDArray[np.int64]]:
        """The blocks of the file, and the row of the table at which each starts."""
        blocks = self.table.to_batches()
        return blocks, np.cumsum([0, *map(len, blocks)])[:-1]

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, list[Any]]:
        """The named rows as Python lists, by column. Costs the same however many rows there are."""
        blocks, start = self._blocks
        wanted = self.where[np.asarray(indices, dtype=np.int64)]
        block = np.searchsorted(start, wanted, side="right") - 1
        rows = [blocks[b].slice(int(row - start[b]), 1) for b, row in zip(block, wanted, strict=True)]
        return pa.Table.from_batches(rows, schema=self.table.schema).to_pydict()

    def source(self, index: int) -> Source:
        """Where a row came from."""
        row = int(self.where[index])
        return Source(self.table["file"][row].as_py(), self.table["row"][row].as_py())

    def missing(self, column: str) -> NDArray[np.bool_]:
        """`(n)`: which rows do not give this column."""
        return np.asarray(self.table[column].is_null(), dtype=bool)[self.where]

    def has(self, column: str) -> bool:
        """Whether every row gives this column."""
        return len(self) > 0 and not self.missing(column).any()

    def subset(self, keep: NDArray[np.bool_], name: str) -> Rows:
        """The rows where `keep` holds, with a fingerprint of their own."""
        arrays = {f.name: getattr(self, f.name)[keep] for f in fields(self) if f.name not in ("table", "fingerprint")}
        digest = hashlib.sha256(f"{self.fingerprint}:{name}".encode()).hexdigest()
        return Rows(table=self.table, fingerprint=digest, **arrays)


def record(example: Example, tokens: Tokens) -> dict[str, Any]:
    """One row of the Arrow file."""
    steps = tokens.step_reward
    prompt = example.prompt if isinstance(example.prompt, str) else json.dumps(example.prompt, ensure_ascii=False)
    return {
        "ids": tokens.ids,
        "mask": [bool(m) for m in tokens.mask],
        "weight": tokens.weight,
        "behavior_logp": tokens.behavior_logp,
        "step_position": None if steps is None else [position for position, _ in steps],
        "step_reward": None if steps is None else [reward for _, reward in steps],
        "reward": example.reward,
        "value": example.value,
        "group": example.group,
        "file": example.source.file,
        "row": example.source.row,
        "prompt": prompt,
        "answer": example.answer,
    }


def write_rows(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write an Arrow file in blocks, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            block: list[Mapping[str, Any]] = []
            for item in records:
                block.append(item)
                if len(block) == BLOCK:
                    writer.write_batch(pa.RecordBatch.from_pylist(block, schema=SCHEMA))
                    block = []
            writer.write_batch(pa.RecordBatch.from_pylist(block, schema=SCHEMA))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_rows(path: Path, fingerprint: str) -> Rows:
    """Memory-map an Arrow file that `write_rows` wrote."""
    return _index(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), fingerprint)


def _index(table: pa.Table, fingerprint: str) -> Rows:
    reward, value = (np.array(table[name].to_numpy(), dtype=np.float64) for name in ("reward", "value"))
    length = np.zeros(table.num_rows, dtype=np.int64)
    trained = np.zeros(table.num_rows, dtype=np.int64)
    start = 0
    for chunk in table["mask"].chunks:
        here = slice(start, start + len(chunk))
        length[here] = np.asarray(chunk.value_lengths())
        ends = np.cumsum(length[here])
        flat = np.concatenate([[0], np.cumsum(np.asarray(chunk.flatten().cast(pa.int8()), dtype=np.int64))])
        trained[here] = flat[ends] - flat[ends - length[here]]
        start += len(chunk)
    where = np.arange(table.num_rows, dtype=np.int64)
    return Rows(table, where, fingerprint, reward, value, _group_ids(table), length, trained)


def _group_ids(table: pa.Table) -> NDArray[np.int64]:
    """`(n)`: a number for each group's name, the same in every split; a row without a group is alone in its own."""
    ids = np.empty(table.num_rows, dtype=np.int64)
    start = 0
    for chunk in table["group"].chunks:
        encoded = chunk.dictionary_encode()
        names = np.array([_number(name) for name in encoded.dictionary.to_pylist()] or [0], dtype=np.int64)
        codes = np.asarray(encoded.indices.fill_null(-1)).astype(np.int64)
        ids[start : start + len(chunk)] = names[codes]
        for row in np.flatnonzero(codes < 0) + start:
            ids[row] = _number(f"row {table['file'][int(row)].as_py()}:{table['row'][int(row)].as_py()}:{row}")
        start += len(chunk)
    return ids


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
