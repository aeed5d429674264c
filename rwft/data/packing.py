"""Rows of a micro-batch end to end in one sequence, so that nothing is padded.

Places start again at 0 with each row; that is what keeps rows apart. Kernels of variable length
attend within each row, at the cost of separate rows without their padding. Under the others
transformers masks the rows from each other, if there is neither a cache nor an attention mask:
that mask is dense, so attention grows with the square of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwft.data.shared import FAMILIES, Shared, scaled_places
from rwft.errors import PolicyError

VARIABLE = ("flash_attention_2", "flash_attention_3")  # kernels that are told where each row starts
MASKED = ("sdpa", "eager")
MODELS = FAMILIES | {"cohere2", "exaone4", "gemma3_text", "glm", "glm4", "olmo", "olmo3"}
"""Model types for which packing was proven: rows meet in attention alone, and it looks at the places."""
LEAK = {True: 2e-2, False: 1e-5}  # nats that a log-probability may move in bfloat16 or not; a leak moves it by far more


@dataclass(frozen=True)
class Packed:
    """`r` rows end to end, each up to its last trained target; rows that train nothing are left out."""

    ids: Tensor  # (1 s), int64
    places: Tensor  # (1 s), int64, from 0 in each row
    starts: Tensor  # (r+1), int32, where rows start, and the end
    trained: Tensor  # (n), int64, where the hidden states of the trained targets are, in the order of rows
    longest: int  # inputs of any row

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        tensors = (self.ids, self.places, self.starts, self.trained)
        return Packed(*(tensor.to(device, non_blocking=True) for tensor in tensors), longest=self.longest)

    def hidden(self, base_model: Any) -> Tensor:
        """`(n h)`: last hidden states of a Hugging Face base model at the trained targets."""
        states = base_model(
            input_ids=self.ids,
            position_ids=self.places,
            use_cache=False,  # with a cache, rows would see each other: transformers would not look at the places
            cu_seq_lens_q=self.starts,
            cu_seq_lens_k=self.starts,
            max_length_q=self.longest,
            max_length_k=self.longest,
        ).last_hidden_state
        return states[0, self.trained]


Layout = Shared | Packed
"""How the rows of a micro-batch go through the layers, if not side by side."""


def end_to_end(ids: Sequence[Sequence[int]], mask: Sequence[Sequence[float]]) -> Packed | None:
    """Rows of `t+1` ids and `t` mask values as one sequence; None where they train nothing."""
    rows: list[NDArray[np.int64]] = []
    trained: list[NDArray[np.int64]] = []
    starts = [0]
    for tokens, wanted in zip(ids, mask, strict=True):
        targets = np.flatnonzero(np.asarray(wanted) > 0)  # target k is predicted from input k
        if len(targets):
            rows.append(np.asarray(tokens[: targets[-1] + 1], dtype=np.int64))
            trained.append(starts[-1] + targets)
            starts.append(starts[-1] + len(rows[-1]))
    if not rows:
        return None
    places = np.concatenate([np.arange(len(row)) for row in rows])
    return Packed(
        ids=torch.from_numpy(np.concatenate(rows))[None],
        places=torch.from_numpy(places)[None],
        starts=torch.tensor(starts, dtype=torch.int32),
        trained=torch.from_numpy(np.concatenate(trained)),
        longest=max(map(len, rows)),
    )


def packing(mode: str, models: Sequence[Any], kernel: str | None = None) -> bool:
    """Whether `data.pack: auto | always | never` packs the rows of Hugging Face causal LMs that see the same batches.

    `auto` packs where the attention kernel takes rows of variable length. `kernel` stands for that
    of the models, where they are outlines that have another. Raises PolicyError under `always` for
    a model for which packing was not proven.
    """
    kernels = [kernel or model.config._attn_implementation for model in models]
    reason = next(filter(None, (refusal(m.config, k) for m, k in zip(models, kernels, strict=True))), None)
    if mode == "always" and reason is not None:
        raise PolicyError(f"data.pack: always, but {reason}; use auto or never")
    return reason is None and (mode == "always" or (mode == "auto" and all(k in VARIABLE for k in kernels)))


def refusal(config: Any, kernel: str) -> str | None:
    """Why rows of a model with this config cannot be packed, or None."""
    if config.model_type not in MODELS:
        return f"it was not proven for model type '{config.model_type}'"
    if kernel not in (*VARIABLE, *MASKED):
        return f"it was not proven for attention '{kernel}', but for {', '.join((*MASKED, *VARIABLE))}"
    return scaled_places(config)


def tried_packing(mode: str, policies: Sequence[Any]) -> bool:
    """As `packing`, for policies whose weights are there: where rows are packed, each is tried first.

    Raises PolicyError if the log-probabilities of a row change with the row before it, on this
    device and with this kernel.
    """
    packed = packing(mode, [policy.causal for policy in policies])
    for policy in policies if packed else ():
        _refuse_leak(policy)
    return packed


def _refuse_leak(policy: Any) -> None:
    one, other = (_behind(policy, first) for first in ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]))
    gap = float((one - other).abs().max())
    if not gap <= LEAK[policy.autocast]:
        kernel = policy.causal.config._attn_implementation
        raise PolicyError(
            f"data.pack: under attention '{kernel}' packed rows see each other here: one moved the log-probabilities "
            f"of the next by {gap:.2g} nats; set data.pack: never"
        )


def _behind(policy: Any, first: list[int]) -> Tensor:
    """`(3)`: log-probabilities of a row that is packed behind `first`, dropout off."""
    size = policy.vocabulary().weight.shape[0]
    rows = [[token % size for token in row] for row in (first, [6, 7, 8, 9])]
    mask = torch.tensor([[1] * 4, [1] * 3 + [0]], device=policy.device)
    ids = torch.tensor([rows[0], [*rows[1], 0]], device=policy.device)
    packed = end_to_end(rows, [[1] * 4, [1] * 3])
    assert packed is not None
    was_training = policy.training
    policy.eval()
    logp = policy(ids, mask, layout=packed.to(policy.device))["logp"]
    policy.train(was_training)
    return logp[4:]
