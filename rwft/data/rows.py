"""Tokenised rows on disk: an Arrow file, memory-mapped, named by the fingerprint of what made it.

Token lists stay in the file; what is one number per row (reward, group, length) is a column of
its own, so that credit assignment and batching never touch the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rwft.data.columns import empty, spans, stack
from rwft.data.example import Example, Source
from rwft.data.tokenize import Tokens
from rwft.durable import writing
from rwft.errors import PolicyError

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
        ("number", pa.int64()),  # of the group
        ("length", pa.int64()),
        ("trained", pa.int64()),
    ]
)
COLUMNS = ("reward", "value", "number", "length", "trained")
BLOCK = 1024  # rows written at once, or fewer
TOKENS = 1 << 18  # if they have as many tokens


@dataclass(frozen=True)
class Rows:
    """All rows of one split. `n` rows; lengths count target positions, `trained` those under the mask."""

    reader: pa.ipc.RecordBatchFileReader  # of the whole file, of which nothing is held
    folder: Path  # where the file is, and room for columns
    fingerprint: str
    where: NDArray[np.int64]  # (n), which rows of the table these are
    reward: NDArray[np.float64]  # (n), NaN where the data give none
    value: NDArray[np.float64]  # (n), NaN where the data give none
    group: NDArray[np.int64]  # (n)
    length: NDArray[np.int64]  # (n)
    trained: NDArray[np.int64]  # (n)

    def __len__(self) -> int:
        return len(self.where)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The row of the file at which each block starts, and behind the last, where it ends."""
        return np.cumsum([0, *map(len, _blocks(self.reader))])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, list[Any]]:
        """The named rows as Python lists, by column. Costs the same however many rows there are."""
        wanted = self.where[np.asarray(indices, dtype=np.int64)]
        block = np.searchsorted(self._starts, wanted, side="right") - 1
        read = {int(b): self.reader.get_batch(int(b)) for b in block}
        rows = [read[int(b)].slice(int(row - self._starts[b]), 1) for b, row in zip(block, wanted, strict=True)]
        return pa.Table.from_batches(rows, schema=self.reader.schema).to_pydict()

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the whole file, in whose rows `where` counts."""
        return pa.chunked_array([block[name] for block in _blocks(self.reader)], self.reader.schema.field(name).type)

    def source(self, index: int) -> Source:
        """Where a row came from."""
        row = int(self.where[index])
        block = int(np.searchsorted(self._starts, row, side="right")) - 1
        read, place = self.reader.get_batch(block), row - int(self._starts[block])
        return Source(read["file"][place].as_py(), read["row"][place].as_py())

    def refuse_unknown(self, size: int, whose: str) -> None:
        """Raises PolicyError, naming the row, for a token beyond the first `size`: those are what `whose` knows."""
        for start, block in zip(self._starts, _blocks(self.reader), strict=False):
            ids = block["ids"].flatten().to_numpy()
            beyond = np.flatnonzero(ids >= size)
            ends = np.cumsum(block["ids"].value_lengths().to_numpy()) if len(beyond) else beyond
            rows = int(start) + np.searchsorted(ends, beyond, side="right")
            here = np.flatnonzero(np.isin(rows, self.where))  # others are of the other split
            if len(here):
                (index, *_), token = np.flatnonzero(self.where == rows[here[0]]), ids[beyond[here[0]]]
                raise PolicyError(
                    f"{self.source(int(index))}: token {token}, but {whose} knows {size} (0 to {size - 1}); expected "
                    "the tokenizer that it was made with: set model.tokenizer to that, or choose its model"
                )

    def missing(self, column: str) -> NDArray[np.bool_]:
        """`(n)`: which rows do not give this column."""
        null = np.concatenate([np.asarray(block[column].is_null(), dtype=bool) for block in _blocks(self.reader)])
        return null[self.where]

    def has(self, column: str) -> bool:
        """Whether every row gives this column."""
        return len(self) > 0 and not self.missing(column).any()

    def subset(self, keep: NDArray[np.bool_], name: str) -> Rows:
        """The rows where `keep` holds, with a fingerprint of their own."""
        whole = (self.where, self.reward, self.value, self.group, self.length, self.trained)
        columns = stack(([c[part][keep[part]] for c in whole] for part in spans(len(self))), self.folder)
        digest = hashlib.sha256(f"{self.fingerprint}:{name}".encode()).hexdigest()
        return Rows(self.reader, self.folder, digest, *columns)


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
                for first, block in _gathered(records):
                    writer.write_batch(_batch(block, first))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _gathered(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    """Blocks of rows with the number of the first, so many that neither rows nor tokens weigh; one at least."""
    first, tokens, block = 0, 0, []
    for item in records:
        block.append(item)
        tokens += len(item["ids"])
        if len(block) == BLOCK or tokens >= TOKENS:
            yield first, block
            first, tokens, block = first + len(block), 0, []
    yield first, block


def _batch(block: list[Mapping[str, Any]], first: int) -> pa.RecordBatch:
    columns = {name: [item.get(name) for item in block] for name in SCHEMA.names}
    columns["number"] = [group_number(item, first + index) for index, item in enumerate(block)]
    columns["length"] = [len(item["mask"]) for item in block]
    columns["trained"] = [sum(item["mask"]) for item in block]
    return pa.RecordBatch.from_arrays([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def open_rows(path: Path, fingerprint: str) -> Rows:
    """Memory-map an Arrow file that `write_rows` wrote."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    numbers = ([block[name].to_numpy(zero_copy_only=False) for name in COLUMNS] for block in _blocks(reader))
    columns = stack(numbers, path.parent)  # with NaN for what is missing
    where = empty(len(columns[0]), np.int64, path.parent)
    for part in spans(len(where)):
        where[part] = np.arange(part.start, part.stop)
    return Rows(reader, path.parent, fingerprint, where, *columns)


def _blocks(reader: pa.ipc.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    return map(reader.get_batch, range(reader.num_record_batches))


def group_number(item: Mapping[str, Any], row: int) -> int:
    """A number for a group's name, the same in every split; a row without a group is alone in its own."""
    name = f"row {item['file']}:{item['row']}:{row}" if item["group"] is None else item["group"]
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
