"""Log-probabilities of whole data sets: of a frozen model (cached by content), or of the policy at a snapshot."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwft.data.rows import Rows
from rwft.durable import writing

TOKENS_AT_ONCE = {"cpu": 4096}  # padded tokens of a batch: on a CPU no more than caches like,
ACCELERATOR_TOKENS_AT_ONCE = 16_384  # and enough to fill an accelerator elsewhere
PART = 1 << 18  # targets of the rows whose log-probabilities are kept together while they are computed


@dataclass(frozen=True)
class StoredLogp:
    """One value per trained token, flat, in row order; `starts (n+1)` says where each row begins."""

    values: NDArray[Any]
    starts: NDArray[np.int64]

    def __call__(self, indices: NDArray[np.int64], mask: Tensor) -> Tensor:
        """`(b), (b t) -> (b t)`: the stored values of these rows at their trained positions, 0 elsewhere."""
        flat = [self.values[self.starts[i] : self.starts[i + 1]] for i in indices]
        out = torch.zeros_like(mask)
        if float(mask.sum()) > 0:
            out[mask > 0] = torch.as_tensor(np.concatenate(flat), dtype=mask.dtype)
        return out


def starts(rows: Rows) -> NDArray[np.int64]:
    """`(n+1)`: where each row's trained tokens begin in a flat array."""
    return np.concatenate([[0], np.cumsum(rows.trained)])


def length_batches(
    length: NDArray[np.int64],
    indices: NDArray[np.int64],
    group: NDArray[np.int64] | None = None,
    most: int = TOKENS_AT_ONCE["cpu"],
    *,
    packed: bool = False,
) -> list[NDArray[np.int64]]:
    """Rows of similar length together, at most `most` padded tokens a batch; with `group`, rows of one together.

    Rows that are `packed` count without padding.
    """
    batches: list[NDArray[np.int64]] = []
    current: list[int] = []
    width = tokens = 0
    for index in by_length(length, indices, group):
        here = int(length[index])
        width, tokens = max(width, here), tokens + here
        if current and (tokens if packed else (len(current) + 1) * width) > most:
            batches.append(np.asarray(current))
            current, width, tokens = [], here, here
        current.append(int(index))
    return [*batches, np.asarray(current)] if current else batches


def by_length(
    length: NDArray[np.int64], indices: NDArray[np.int64], group: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Indices, shortest row first; with `group`, groups as blocks by their longest row."""
    if group is None:
        return indices[np.argsort(length[indices], kind="stable")]
    names, block = np.unique(group[indices], return_inverse=True)
    longest = np.zeros(len(names), dtype=np.int64)
    np.maximum.at(longest, block, length[indices])
    return indices[np.lexsort((length[indices], block, longest[block]))]


def row_logp(
    policy: Any,
    collate: Callable[[NDArray[np.int64]], Any],
    length: NDArray[np.int64],
    indices: NDArray[np.int64],
    *,
    device: torch.device,
    tick: Callable[[int], None],
    group: NDArray[np.int64] | None = None,
    packed: bool = False,
    passes: Callable[[int], int] = int,
) -> dict[int, NDArray[Any]]:
    """Log-probabilities of the trained tokens of each row under `policy`, dropout off. `tick(k)` after every k rows.

    With `group`, rows of one are batched together, where `collate` may share their prompt; `packed`
    tells that it packs them. `passes` says how many forward passes to make, given how many are
    needed; the others hold no row.
    """
    was_training = policy.training
    policy.eval()
    out: dict[int, NDArray[Any]] = {}
    most = TOKENS_AT_ONCE.get(device.type, ACCELERATOR_TOKENS_AT_ONCE)
    batches = length_batches(length, indices, group, most, packed=packed)
    for _ in range(passes(len(batches)) - len(batches)):
        batch = collate(indices[:0]).to(device)
        policy(batch.ids, batch.mask)
    for part in batches:
        batch = collate(part).to(device)
        logp = policy(batch.ids, batch.mask, layout=batch.layout)["logp"].cpu().numpy()
        ends = np.cumsum(batch.sequence_lengths)
        for index, piece in zip(part, np.split(logp, ends[:-1]), strict=True):
            out[int(index)] = piece
        tick(len(part))
    policy.train(was_training)
    return out


def pack_rows(values: Mapping[int, NDArray[Any]]) -> dict[str, Tensor]:
    """Values of unequal length by row index, as three flat tensors for a checkpoint."""
    rows = sorted(values)
    flat = np.concatenate([values[row] for row in rows]) if rows else np.zeros(0)
    sizes = np.array([len(values[row]) for row in rows], dtype=np.int64)
    return {
        "rows": torch.tensor(rows, dtype=torch.int64),
        "sizes": torch.from_numpy(sizes),
        "values": torch.from_numpy(flat),
    }


def unpack_rows(tensors: Mapping[str, Tensor]) -> dict[int, NDArray[Any]]:
    """The reverse of `pack_rows`."""
    pieces = tensors["values"].split(tensors["sizes"].tolist())
    return {int(row): piece.numpy() for row, piece in zip(tensors["rows"], pieces, strict=True)}


def cache_path(cache: Path, model: str, rows: Rows, dtype: str) -> Path:
    """Where the log-probabilities of these rows under this model are kept: named by content alone."""
    key = hashlib.sha256(f"logp-1:{model}:{rows.fingerprint}:{dtype}".encode()).hexdigest()
    return cache / "logprobs" / f"{key[:40]}.npy"


def parts(rows: Rows) -> list[NDArray[np.int64]]:
    """Consecutive rows of about `PART` targets each: what an interrupted computation does not lose."""
    number = (np.cumsum(rows.length) - rows.length) // PART
    return np.split(np.arange(len(rows)), np.flatnonzero(np.diff(number)) + 1)


def part_path(path: Path, number: int) -> Path:
    """Where a part is kept until the whole is."""
    return path.with_name(f"{path.stem}.part{number}.npy")


def write_cached(path: Path, values: NDArray[Any]) -> None:
    """Write a flat array whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as handle:
                np.save(handle, values, allow_pickle=False)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_cached(path: Path, rows: Rows) -> StoredLogp | None:
    """The cached values, memory-mapped, or None where there are none of the right length."""
    values = read_values(path, int(rows.trained.sum()))
    return None if values is None else StoredLogp(values, starts(rows))


def read_values(path: Path, number: int) -> NDArray[Any] | None:
    """A flat array of this many values, memory-mapped, or None where there is none."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:  # never there, or taken away just now by another run that has the whole
        return None
    return values if len(values) == number else None
