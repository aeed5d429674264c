"""The likelihood of held-out rows: the one number that compares runs whatever their objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rwft.data.batching import Collate
from rwft.data.credit import Credit
from rwft.data.logprobs import length_batches
from rwft.data.rows import Rows
from rwft.observe import standing


def held_out_likelihood(
    model: Any, collate: Collate, rows: Rows, accelerator: Any, credit: Credit | None
) -> dict[str, float]:
    """NLL per trained token, in nats, of held-out rows under the policy, dropout off.

    `nll/mean` over all tokens. With rewards: `nll_good/mean` and `nll_bad/mean` over rows whose
    reward lies above and below the mean of the training rows, which `credit` knows (rows at it are
    neither), and, if no reward is negative, `nll_reward_weighted/mean` = sum r NLL / sum r tokens.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(rows), dtype=torch.float64, device=accelerator.device)
    batches = length_batches(rows.length, np.arange(len(rows)))
    batches += [np.empty(0, dtype=np.int64)] * (-len(batches) % accelerator.num_processes)
    for part in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = collate(part).to(accelerator.device)
        logp = model(batch.ids, batch.mask)["logp"].double()
        for index, piece in zip(part, logp.split(batch.sequence_lengths), strict=False):
            sums[int(index)] = -piece.sum()
    model.train(was_training)
    nll = accelerator.reduce(sums, "sum").cpu().numpy()
    tokens = rows.trained.astype(np.float64)
    out = {"nll/mean": float(nll.sum() / tokens.sum())}
    if np.isnan(rows.reward).any():
        return out
    sign = np.zeros(len(rows)) if credit is None else standing(credit, rows.reward)
    for name, which in (("nll_good/mean", sign > 0), ("nll_bad/mean", sign < 0)):
        if which.any():
            out[name] = float(nll[which].sum() / tokens[which].sum())
    if rows.reward.min() >= 0 and rows.reward.max() > 0:
        out["nll_reward_weighted/mean"] = float((rows.reward * nll).sum() / (rows.reward * tokens).sum())
    return out
