"""Columns: one number for each row, in a memory that does not grow with the rows.

A long column lies in a file without a name, mapped into memory: the system takes its pages back when it needs them, and
the file is gone with the last array over it. What is computed from columns is computed part by part.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rwft.durable import writing

PART = 1 << 18  # rows that are worked on at once, and of a column that is held in memory (2 MiB)
SAMPLE = 1 << 16  # values by which the rows are cut into ranges

Column = NDArray[Any]


def spans(rows: int) -> Iterator[slice]:
    """Consecutive parts of so many rows; of none, one that is empty."""
    return (slice(start, min(start + PART, rows)) for start in range(0, max(rows, 1), PART))


def empty(rows: int, dtype: DTypeLike, folder: Path | None) -> Column:
    """`(n)`: a column to be filled, in memory if it is short or `folder` is None. Raises SaveError on a full disk."""
    if folder is None or rows <= PART:
        return np.empty(rows, dtype)
    with writing(folder), _nameless(folder) as handle:
        if hasattr(os, "posix_fallocate"):  # a full disk is found here, and not by a signal when a page is written
            os.posix_fallocate(handle.fileno(), 0, rows * np.dtype(dtype).itemsize)
        return _mapped(handle, rows, np.dtype(dtype))


def stack(parts: Iterable[Sequence[Column]], folder: Path | None) -> list[Column]:
    """Parts, each of the same few columns, one after another as whole columns."""
    columns: list[_Growing] = []
    for part in parts:
        columns = columns or [_Growing(folder) for _ in part]
        for column, values in zip(columns, part, strict=True):
            column.append(np.asarray(values))
    return [column.whole() for column in columns]


def ranges(values: Column, folder: Path | None) -> Iterator[NDArray[np.int64]]:
    """`(n)` -> the rows of ever greater ranges of values, about a part's worth each, in the order of rows.

    Equal values are in one range, however many they are; every row is in one.
    """
    rows = len(values)
    if rows <= PART:
        yield np.arange(rows)
        return
    sample, pieces = np.sort(values[:: max(rows // SAMPLE, 1)]), math.ceil(rows / PART)
    bounds = np.unique(sample[len(sample) * np.arange(1, pieces) // pieces])
    number = empty(rows, np.min_scalar_type(pieces), folder)
    for part in spans(rows):
        number[part] = np.searchsorted(bounds, values[part], side="right")
    for k in range(len(bounds) + 1):
        yield np.concatenate([np.flatnonzero(number[part] == k) + part.start for part in spans(rows)])


class _Growing:
    """A column of unknown length: in memory while it is short, then in a file."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.length, self.handle = folder, 0, None
        self.parts: list[Column] = []

    def append(self, values: Column) -> None:
        self.length += len(values)
        self.parts.append(values.copy())  # a view would keep what it looks at
        if self.folder is not None and self.length > PART:
            with writing(self.folder):
                self.handle = self.handle or _nameless(self.folder)
                self.handle.writelines(part.data for part in self.parts)
            self.dtype, self.parts = values.dtype, []

    def whole(self) -> Column:
        if self.folder is None or self.handle is None:
            return np.concatenate(self.parts)
        with writing(self.folder), self.handle as handle:
            handle.flush()
            return _mapped(handle, self.length, self.dtype)


def _nameless(folder: Path) -> BinaryIO:
    return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))


def _mapped(handle: BinaryIO, rows: int, dtype: np.dtype[Any]) -> Column:
    """The file as a plain array; its pages are the system's."""
    return np.asarray(np.memmap(cast(Any, handle), dtype, "r+", shape=(rows,)))
