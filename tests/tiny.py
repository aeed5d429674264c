"""A small run to test on: grouped rollouts of random text, and a tiny policy with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rwft.config import Config, resolve

MODEL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def write_rollouts(path: Path, prompts: int = 12, seed: int = 0) -> Path:
    """One line a prompt: two to four completions of 1 to 9 letters, 0/1 rewards, log-probabilities with the EOS's."""
    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh"))
    with path.open("w", encoding="utf-8") as handle:
        for number in range(prompts):
            size = int(draw.integers(2, 5))
            completions = ["".join(draw.choice(letters, int(draw.integers(1, 10)))) for _ in range(size)]
            row = {
                "prompt": f"{number}:" + "".join(draw.choice(letters, int(draw.integers(1, 6)))) + ">",
                "completions": completions,
                "rewards": [float(r) for r in draw.integers(0, 2, size)],
                "logprobs": [[-float(x) for x in draw.uniform(0.1, 3, len(text) + 1)] for text in completions],
            }
            handle.write(json.dumps(row) + "\n")
    return path


def tiny(folder: Path, *overrides: str, objective: Any = "sft", name: str = "run") -> Config:
    """A config that trains for a few steps in a second."""
    data = folder / "rollouts.jsonl"
    if not data.exists():
        write_rollouts(data)
    content = {
        "model": {"config": MODEL, "tokenizer": "characters", "dtype": "float64"},
        "objective": objective,
        "data": {"path": str(data), "max_length": 48, "eval_fraction": 0.2},
        "train": {"steps": 4, "batch_size": 16, "lr": 1e-2, "log_every": 1, "warmup": 0.0},
        "cache": str(folder / "cache"),
        "output": str(folder / name),
    }
    return resolve(content, overrides)
