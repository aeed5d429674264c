"""Which rows make which optimiser step, and how rows become tensors.

The order is a pure function of (seed, epoch): nothing about it is stored, and a run resumes
at any step. A step's rows are the same however they are cut into micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from rwft.data.columns import empty, ranges, spans, stack
from rwft.data.credit import Credit
from rwft.data.packing import Layout, end_to_end
from rwft.data.rows import Rows
from rwft.data.shared import Sharing
from rwft.errors import ConfigError, DataError

Stored = Callable[[NDArray[np.int64], Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, padded on the right.

    `ids (b t+1)` int64, `mask (b t)` 1 where the target is trained, `rows (b)` indices into the
    data set, `signals` what the data and its credit provide, by name (see `rwft.signals`).
    `layout` holds the same rows as they go through the layers: behind one copy of each prompt
    where that costs less, or packed; None: as in `ids`.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    signals: Mapping[str, Tensor]
    layout: Layout | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.signals.items()}
        layout = None if self.layout is None else self.layout.to(device)
        return Batch(self.ids.to(device), self.mask.to(device), self.rows, moved, layout)

    @cached_property
    def sequence_lengths(self) -> list[int]:
        """Trained positions of each row, `(b)`."""
        return self.mask.sum(dim=1).long().tolist()


def permutation(items: int, seed: int, epoch: int, folder: Path | None = None) -> NDArray[np.int64]:
    """The order of one epoch: a pure function of (seed, epoch)."""
    order = empty(items, np.int64, folder)
    for part in spans(items):
        order[part] = np.arange(part.start, part.stop)
    np.random.Generator(np.random.Philox(key=[seed, epoch])).shuffle(order)
    return order


def pass_tokens(*, packed: bool = False) -> float:
    """What a pass costs beyond its own tokens, in tokens: kernel launches on an accelerator, sums on a CPU.

    Packed rows have no padding that a further pass could save, whatever it costs.
    """
    if packed:
        return math.inf
    return 4096 if torch.cuda.is_available() or torch.backends.mps.is_available() else 128


class Plan:
    """Optimiser steps as lists of micro-batches of row indices.

    A step takes the next batch_size x accumulate x world rows of the epoch's order, the last
    one of an epoch what is left, so each row comes exactly once per epoch. Within a step rows
    are sorted by length, then cut: similar lengths pad little, and the gradient of the step
    does not depend on the cut. A micro-batch is forwarded in several passes where that saves
    more padding than `pass_tokens`, which is what a pass costs beyond its rows.

    With `group`, whole groups stay in one micro-batch. With `prompt`, rows of a step that have
    the same number there stand beside each other before the cut. Rows not `alive` (weight zero
    by data alone) keep their place in the order but are not forwarded. A long order is a file in `folder`.
    """

    def __init__(
        self,
        length: NDArray[np.int64],
        *,
        batch_size: int,
        accumulate: int,
        world: int,
        seed: int,
        group: NDArray[np.int64] | None = None,
        prompt: NDArray[np.int64] | None = None,
        alive: NDArray[np.bool_] | None = None,
        pass_tokens: float = math.inf,
        folder: Path | None = None,
    ) -> None:
        if len(length) == 0:
            raise DataError("no rows are left to train on")
        self.length, self.batch_size, self.world, self.seed = length, batch_size, world, seed
        self.window_size = batch_size * accumulate * world
        self.alive = np.ones(len(length), dtype=bool) if alive is None else alive
        self.prompt, self.pass_tokens, self.folder = prompt, pass_tokens, folder
        self.units = None if group is None else Units(group, batch_size, folder)
        windows = math.ceil(len(length) / self.window_size)
        self.steps_per_epoch = windows if self.units is None else min(windows, len(self.units))
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, window) of a global optimiser step."""
        return divmod(step, self.steps_per_epoch)

    def window(self, step: int) -> NDArray[np.int64]:
        """Row indices of an optimiser step, in the epoch's order, over all ranks."""
        if self.units is not None:
            return np.concatenate(self._window_units(step))
        epoch, index = self.position(step)
        return self._epoch_order(epoch)[index * self.window_size : (index + 1) * self.window_size]

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            items = len(self.length) if self.units is None else len(self.units)
            self._order = (epoch, permutation(items, self.seed, epoch, self.folder))
        return self._order[1]

    def _window_units(self, step: int) -> list[NDArray[np.int64]]:
        """Whole groups, dealt to a fixed number of windows so that every epoch has as many steps."""
        assert self.units is not None
        epoch, index = self.position(step)
        return [self.units[unit] for unit in np.array_split(self._epoch_order(epoch), self.steps_per_epoch)[index]]

    def micro_batches(self, step: int, rank: int) -> list[NDArray[np.int64]]:
        """This rank's micro-batches of a step; all ranks get equally many, empty ones where rows ran out."""
        parts = self._cut_rows(step) if self.units is None else self._cut_groups(step)
        short = -len(parts) % self.world if parts else self.world
        parts += [np.empty(0, dtype=np.int64)] * short
        return parts[rank :: self.world]

    def _cut_rows(self, step: int) -> list[NDArray[np.int64]]:
        window = self.window(step)
        window = window[self.alive[window]]
        ordered = self._beside(window)
        return [
            p for i in range(0, len(window), self.batch_size) for p in self._passes(ordered[i : i + self.batch_size])
        ]

    def _passes(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The cut of one micro-batch that costs least, by dynamic programming; rows of one prompt stay together."""
        length = self.length[rows].tolist()
        joined = [False] * len(rows) if self.prompt is None else [False, *(np.diff(self.prompt[rows]) == 0).tolist()]
        best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first k rows, and where their last pass starts
        for stop in range(1, len(rows) + 1):
            width, found = 0, (math.inf, 0)
            for start in range(stop - 1, -1, -1):
                width = max(width, length[start])
                if not joined[start] or start == 0:
                    found = min(found, (best[start][0] + (stop - start) * width + self.pass_tokens, start))
            best.append(found)
        cuts, stop = [], len(rows)
        while stop > 0:
            cuts.append(rows[best[stop][1] : stop])
            stop = best[stop][1]
        return cuts[::-1]

    def _beside(self, window: NDArray[np.int64]) -> NDArray[np.int64]:
        """Longest first; with `prompt`, rows of one prompt as a block, most rows first, so that the cut splits few."""
        length = self.length[window]
        if self.prompt is None:
            return window[np.argsort(-length, kind="stable")]
        _, block, size = np.unique(self.prompt[window], return_inverse=True, return_counts=True)
        longest = np.zeros(len(size), dtype=np.int64)
        np.maximum.at(longest, block, length)
        return window[np.lexsort((-length, block, -longest[block], -size[block]))]

    def _cut_groups(self, step: int) -> list[NDArray[np.int64]]:
        """First fit, longest groups first: whole groups into micro-batches of at most batch_size rows."""
        parts: list[list[NDArray[np.int64]]] = []
        units = [unit[self.alive[unit]] for unit in self._window_units(step)]
        for unit in sorted(filter(len, units), key=lambda unit: -int(self.length[unit].max())):
            part = next((p for p in parts if sum(map(len, p)) + len(unit) <= self.batch_size), None)
            if part is None:
                parts.append([unit])
            else:
                part.append(unit)
        return [np.concatenate(part) for part in parts]


class Units:
    """Groups as row indices, by ascending number of the group; raises ConfigError for one of over `most` rows."""

    def __init__(self, group: NDArray[np.int64], most: int, folder: Path | None) -> None:
        self._order, self._stop, size = stack(_by_group(group, folder), folder)
        self.largest = int(size.max())  # rows
        if self.largest > most:
            raise ConfigError(
                f"train.batch_size: {most} is smaller than the largest group ({self.largest} rows), but whole groups "
                "are to be in one micro-batch (the objective reads group, or data.order: groups); "
                f"set train.batch_size={self.largest} or more"
            )

    def __len__(self) -> int:
        return len(self._stop)

    def __getitem__(self, unit: int) -> NDArray[np.int64]:
        start = 0 if unit == 0 else self._stop[unit - 1]
        return self._order[start : self._stop[unit]]


def _by_group(group: NDArray[np.int64], folder: Path | None) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Rows by group, where each group stops among them, and the groups' sizes, in parts."""
    seen = 0
    for rows in ranges(group, folder):
        size = np.unique(group[rows], return_counts=True)[1]
        yield rows[np.argsort(group[rows], kind="stable")], seen + size.cumsum(), size
        seen += len(rows)


class Collate:
    """Row indices -> `Batch`, with the signals that are read and no others.

    `known` holds signals with one value a row `(n)`, or one for all `()`; `stored` functions that
    give `(b t)` for rows and their mask. With `pack`, rows that do not `share` prompts are packed.
    """

    def __init__(
        self,
        rows: Rows,
        reads: frozenset[str],
        *,
        dtype: torch.dtype,
        credit: Credit | None = None,
        known: Mapping[str, NDArray[Any]] | None = None,
        stored: Mapping[str, Stored] | None = None,
        share: Sharing | None = None,
        pack: bool = False,
    ) -> None:
        self.rows, self.reads, self.dtype = rows, reads, dtype
        self.share, self.pack = share, pack
        self.credit, self.known, self.stored = credit, known or {}, {} if stored is None else stored

    @property
    def packed(self) -> bool:
        """Whether rows are packed in every batch."""
        return self.pack and self.share is None

    def plain(self) -> Collate:
        """Ids and mask only, of the same rows."""
        return Collate(self.rows, frozenset(), dtype=self.dtype, share=self.share, pack=self.pack)

    def __call__(self, indices: NDArray[np.int64]) -> Batch:
        if len(indices) == 0:  # a rank without rows still takes part in the collectives: nothing of this row is trained
            empty = self.plain()(np.zeros(1, dtype=np.int64))
            return replace(empty, mask=torch.zeros_like(empty.mask), signals={}, layout=None)
        columns = self.rows.take(indices)
        ids = _pad(columns["ids"], 0, torch.int64)  # any id serves behind the end: causal masks hide it
        mask = _pad(columns["mask"], 0, self.dtype)
        signals = {"mask": mask}
        for name in sorted(self.reads):
            value = self._signal(name, indices, columns, mask)
            if value is not None:
                signals[name] = value
        layout = self._layout(columns["ids"], columns["mask"])
        return Batch(ids, mask, torch.as_tensor(indices), signals, layout)

    def _layout(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[float]]) -> Layout | None:
        shared = None if self.share is None else self.share(ids, mask)
        return end_to_end(ids, mask) if shared is None and self.pack else shared

    def _signal(self, name: str, indices: NDArray[np.int64], columns: Mapping[str, Any], mask: Tensor) -> Tensor | None:
        if name == "group":
            return torch.as_tensor(self.rows.group[indices])
        if name == "token_weight":
            given = [
                w if w is not None else [1.0] * len(m) for w, m in zip(columns["weight"], columns["mask"], strict=True)
            ]
            return _pad(given, 1.0, self.dtype)
        if name == "behavior_logp":
            return _pad(columns["behavior_logp"], 0.0, self.dtype)
        if name == "advantage" and self.credit is not None and self.credit.config.steps != "none":
            return self._token_advantage(indices, columns)
        if name in self.stored:
            return self.stored[name](indices, mask)
        value = self.known.get(name)
        if value is None:
            return None
        if value.ndim == 0:
            return torch.as_tensor(value).to(self.dtype)
        return rearrange(torch.as_tensor(value[indices]), "b -> b 1").to(self.dtype)

    def _token_advantage(self, indices: NDArray[np.int64], columns: Mapping[str, Any]) -> Tensor:
        """`(b t)`: per-step advantages; a row without steps has its one advantage everywhere."""
        assert self.credit is not None
        terms = [self.known[name][indices] for name in ("advantage", "baseline", "gain")]
        rows = zip(columns["step_position"], columns["step_reward"], columns["mask"], *terms, strict=True)
        per_token = [
            self.credit.token_advantage(
                list(zip(positions, rewards, strict=True)), len(m), float(baseline), float(gain)
            )
            if positions
            else [float(advantage)] * len(m)
            for positions, rewards, m, advantage, baseline, gain in rows
        ]
        return _pad(per_token, 0.0, self.dtype)


def _pad(rows: Sequence[Sequence[float] | NDArray[Any]], value: float, dtype: torch.dtype) -> Tensor:
    """Lists of unequal length -> `(b t)`, padded on the right."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out
