"""rwft: reward-weighted fine-tuning. Offline reinforcement learning for language models, one weight at a time.

    grad = E_{(x,y) in data} [ sum_t  stopgrad(w_t) * grad log pi(y_t | x, y_<t) ]

An objective is its weight `w`. Names are imported when they are first used, so that
`import rwft` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwft.config import Config, load_config
    from rwft.data.adapters import adapter
    from rwft.data.batching import Batch
    from rwft.data.example import Example
    from rwft.estimator import surrogate_loss
    from rwft.head import token_logprobs
    from rwft.loop import train
    from rwft.regularizers import regularizer
    from rwft.signals import seq_mean, seq_sum
    from rwft.verifiers import verifier
    from rwft.weighting import Objective, build_objective, objective

__version__ = "0.1.0"

_HOME = {
    "Batch": "rwft.data.batching",
    "Config": "rwft.config",
    "Example": "rwft.data.example",
    "Objective": "rwft.weighting",
    "adapter": "rwft.data.adapters",
    "build_objective": "rwft.weighting",
    "load_config": "rwft.config",
    "objective": "rwft.weighting",
    "regularizer": "rwft.regularizers",
    "seq_mean": "rwft.signals",
    "seq_sum": "rwft.signals",
    "surrogate_loss": "rwft.estimator",
    "token_logprobs": "rwft.head",
    "train": "rwft.loop",
    "verifier": "rwft.verifiers",
}

__all__ = [
    "Batch",
    "Config",
    "Example",
    "Objective",
    "adapter",
    "build_objective",
    "load_config",
    "objective",
    "regularizer",
    "seq_mean",
    "seq_sum",
    "surrogate_loss",
    "token_logprobs",
    "train",
    "verifier",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rwft' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
