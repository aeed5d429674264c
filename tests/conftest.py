"""What every test may rely on: one thread, a fixed seed, no network, a cache of its own."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)

import numpy
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, once
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches out fails; processes on this machine may still talk to each other."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost", socket.gethostname()):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


REGISTRIES = {
    "rwft.weighting": "objective",
    "rwft.data.adapters": "adapter",
    "rwft.regularizers": "regularizer",
    "rwft.verifiers": "verifier",
}


@pytest.fixture(autouse=True)
def own_registries() -> Iterator[None]:
    """What a test registers is forgotten after it, so that no test sees another's functions."""
    loaded = [getattr(sys.modules[module], name) for module, name in REGISTRIES.items() if module in sys.modules]
    for registry in loaded:
        len(registry)  # loads what is built in, so that it is part of what is kept
    kept = [dict(registry._entries) for registry in loaded]
    yield
    for registry, entries in zip(loaded, kept, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~/.cache` of the test: nothing is read from, or left in, the user's own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """What Accelerate keeps for the whole process (devices, precision) is forgotten after each test."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
