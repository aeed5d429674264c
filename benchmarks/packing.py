"""Rows end to end in one sequence, against padded rows: python benchmarks/packing.py.

Forward and backward of 32 rows of 32 to 512 tokens, each half prompt, through a llama of 4 layers and hidden size 256
with 32,000 tokens, under the DFT loss, in turns in one process; medians of CPU seconds. A CPU has no attention kernel
for rows of variable length, so packed rows are masked from each other (SDPA), which `data.pack: always` asks for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rwft.config import ModelConfig
from rwft.data.batching import Plan, pass_tokens
from rwft.data.packing import end_to_end
from rwft.policy import Policy, load_policy

ROWS, SIZE, VOCABULARY = 32, 8, 32_000
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


def forward_backward(policy: Policy, length: Sequence[int], packed: bool) -> None:
    """One pass of rows of these lengths."""
    ids = torch.randint(VOCABULARY, (len(length), max(length) + 1))
    places, ends = torch.arange(max(length)), torch.tensor(length)[:, None]
    mask = ((places >= ends // 2) & (places < ends)).float()
    layout = end_to_end(ids.tolist(), mask.tolist()) if packed else None
    trained = ROWS * 136
    policy(ids, mask, lambda signals, _: signals["logp"].exp() / trained, layout=layout).loss.backward()


def step(policy: Policy, length: np.ndarray, passes: Sequence[np.ndarray], packed: bool) -> float:
    """CPU seconds of all passes."""
    policy.zero_grad(set_to_none=True)
    start = time.process_time()
    for rows in passes:
        forward_backward(policy, length[rows].tolist(), packed)
    return time.process_time() - start


def cuts(length: np.ndarray) -> dict[str, tuple[list[np.ndarray], bool]]:
    """Name -> passes, and whether they are packed."""
    aware, by_length = (
        Plan(length, batch_size=SIZE, accumulate=ROWS // SIZE, world=1, seed=0, pass_tokens=cost).micro_batches(0, 0)
        for cost in (pass_tokens(), pass_tokens(packed=True))
    )
    as_they_come = np.split(np.arange(ROWS), ROWS // SIZE)
    return {
        "padded, 8 rows as they come": (as_they_come, False),
        "padded, 8 rows by length": (by_length, False),
        "padded, by length, cut into passes (`never`)": (aware, False),
        "packed, 8 rows as they come": (as_they_come, True),
        "packed, 8 rows by length (`always`)": (by_length, True),
        "packed, 2 rows by length": (np.split(np.argsort(length), ROWS // 2), True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy = load_policy(ModelConfig(config=MODEL, tokenizer="characters"), seed=0)
    length = np.random.default_rng(0).integers(32, 513, ROWS)
    kinds, times = cuts(length), {}
    for turn in range(given.repeats + 1):
        for name, (passes, packed) in kinds.items():
            seconds = step(policy, length, passes, packed)
            if turn:  # the first turn touches memory for the first time
                times.setdefault(name, []).append(seconds)
    print("\n| rows | passes | padding | CPU s |")
    print("|---|---|---|---|")
    for name, (passes, packed) in kinds.items():
        inputs = sum(length[rows].sum() if packed else len(rows) * length[rows].max() for rows in passes)
        cells = [name, len(passes), f"{1 - length.sum() / inputs:.0%}", f"{statistics.median(times[name]):.2f}"]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
