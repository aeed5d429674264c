"""What frozen models say about the rows: computed once before training, each rank its share, kept by content."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rwft.config import Config
from rwft.data.batching import Collate, Stored
from rwft.data.logprobs import (
    StoredLogp,
    cache_path,
    length_batches,
    part_path,
    parts,
    read_cached,
    read_values,
    row_logp,
    starts,
    write_cached,
)
from rwft.data.packing import tried_packing
from rwft.data.rows import Rows
from rwft.data.shared import sharing
from rwft.errors import ConfigError
from rwft.policy import Policy, fingerprint, load_frozen
from rwft.progress import Display


@dataclass(frozen=True)
class FrozenModels:
    """The reference (by default the policy as it starts) and the auxiliary model."""

    config: Config
    policy: Policy  # as it starts
    accelerator: Any
    display: Display

    def signals(self, reads: frozenset[str], rows: Rows) -> tuple[dict[str, Stored], dict[str, NDArray[Any]]]:
        """The signals among `reads` that frozen models give: by row and position, and by row or for all rows."""
        stored: dict[str, Stored] = {}
        known: dict[str, NDArray[Any]] = {}
        if reads & {"ref_logp", "ref_nll_median", "ref_nll_z"}:
            reference = self.logp(
                "reference", self.policy if self.config.reference.path is None else self.load("reference"), rows
            )
            stored["ref_logp"] = reference
            known |= nll_statistics(reference, rows)
        if "aux_logp" in reads:
            stored["aux_logp"] = self.logp("auxiliary", self.load("auxiliary"), rows)
        return stored, known

    def live_reference(self) -> Policy:
        """The reference as a model of its own, for regularisers that read its whole distribution."""
        if self.config.reference.path is not None:
            return self.load("reference")
        frozen = copy.deepcopy(self.policy).eval()
        return frozen.requires_grad_(False)

    def load(self, section: str) -> Policy:
        """The model of the config's section `reference` or `auxiliary`."""
        model = getattr(self.config, section)
        if model.path is None:
            raise ConfigError(
                f"{section}.path: the objective reads {section[:3]}_logp; name a model folder or Hub model"
            )
        return load_frozen(model, self.config.model.dtype, self.config.model.attention, self.accelerator.device)

    def logp(self, what: str, model: Policy, rows: Rows) -> StoredLogp:
        """Log-probabilities of every trained token of every row, from the cache if this model met these rows before."""
        path = cache_path(Path(self.config.cache).expanduser(), fingerprint(model), rows, self.config.model.dtype)
        found = read_cached(path, rows)
        if self.everywhere(found) and found is not None:
            self.display.say(f"{what} log-probabilities of {len(rows)} rows: from the cache")
            return found
        rows.refuse_unknown(model.tokens, "the model" if model is self.policy else f"the model of {what}.path")
        tick = self.display.ticker(f"{what} log-probabilities", len(rows) // self.accelerator.num_processes)
        pieces = [
            self._part(model, rows, indices, part_path(path, number), tick)
            for number, indices in enumerate(parts(rows))
        ]
        if self.accelerator.is_main_process:
            write_cached(path, np.concatenate(pieces))
            for number in range(len(pieces)):
                part_path(path, number).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return read_cached(path, rows) or StoredLogp(np.concatenate(pieces), starts(rows))

    def everywhere(self, found: object | None) -> bool:
        """Whether every rank found it: they may see different disks, and compute together or not at all."""
        here = torch.tensor(float(found is not None), device=self.accelerator.device)
        return int(self.accelerator.reduce(here, "sum")) == self.accelerator.num_processes

    def _part(
        self, model: Policy, rows: Rows, indices: NDArray[np.int64], file: Path, tick: Callable[[int], None]
    ) -> NDArray[Any]:
        """The values of one part's rows: from an interrupted run, or from all ranks, each its share."""
        from accelerate.utils import gather_object

        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        found = read_values(file, int(rows.trained[indices].sum()))
        if self.everywhere(found) and found is not None:
            tick(len(indices) // world)
            return found
        share = sharing(self.config.data.share_prompts, [model.causal])
        pack = tried_packing(self.config.data.pack, [model])
        plain = Collate(rows, frozenset(), dtype=model.float_dtype, share=share, pack=pack)
        group, packed, device = None if share is None else rows.group, plain.packed, self.accelerator.device
        batches = length_batches(rows.length, indices, group, packed=packed)[rank::world]
        mine = np.concatenate([*batches, np.empty(0, dtype=np.int64)])
        here = row_logp(model, plain, rows.length, mine, device=device, tick=tick, group=group, packed=packed)
        merged = {index: values for part in gather_object([here]) for index, values in part.items()}
        flat = np.concatenate([merged[int(index)] for index in indices])
        if self.accelerator.is_main_process:
            write_cached(file, flat)
        return flat


def nll_statistics(logp: StoredLogp, rows: Rows) -> Mapping[str, NDArray[Any]]:
    """Over the data set, of each sequence's mean NLL: its median `()` and each row's z-score `(n)`."""
    nll = -np.add.reduceat(logp.values.astype(np.float64), logp.starts[:-1]) / rows.trained
    spread = nll.std()
    return {
        "ref_nll_median": np.asarray(np.median(nll)),
        "ref_nll_z": (nll - nll.mean()) / (spread if spread > 0 else 1.0),
    }
