"""ZeRO-2 and ZeRO-3 on two CPU ranks: gradients, steps, checkpoints and exports are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rwft import zero
from rwft.config import Config, to_yaml
from rwft.errors import ConfigError, UserError
from rwft.loop import train
from tests.tiny import tiny

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

RANKS = """
import os, sys
import accelerate, deepspeed, torch
import rwft.loop as loop
from accelerate.utils import DeepSpeedPlugin, DistributedType
from rwft.config import load_config
from rwft.errors import NonFiniteError

stage, folder, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled here; gloo does the same
start, step = loop.start_accelerator, loop.optimiser_step


def under_deepspeed(config):
    # Accelerate turns DeepSpeed on for accelerators only; the engine itself runs on CPU ranks too
    accelerate.state.AcceleratorState._reset_state(True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which Accelerate sets, when it has met a plugin
    accelerator = start(config)
    assert accelerator.num_processes == 2
    plugin = DeepSpeedPlugin(zero_stage=stage)
    # weights as small as these would otherwise stay whole on every rank
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    accelerator.state.distributed_type = accelerate.PartialState().distributed_type = DistributedType.DEEPSPEED
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)
    accelerator.state.deepspeed_plugins, accelerator.deepspeed_engine_wrapped = plugin, None
    return accelerator


class Stop(Exception):
    pass


def stop_at_2(training, index, meter):
    spread = [p for p in training.policy.parameters() if p.numel() == 0]
    assert bool(spread) == (stage == 3), "weights lie whole on a rank between steps"
    if index == 2:
        raise Stop
    step(training, index, meter)


def fail_on_rank_1(training, index, meter):
    # at step 1 a gradient that is not finite on one rank, for one parameter
    if index == 1 and training.accelerator.process_index == 1:
        clip = training.optimizer.clip
        def poisoned(*arguments):
            del training.optimizer.clip
            training.optimizer.pieces()[0].view(-1)[0] = float("inf")
            return clip(*arguments)
        training.optimizer.clip = poisoned
    step(training, index, meter)


loop.start_accelerator = under_deepspeed
for name in names:
    config = load_config(f"{folder}/{name}.yaml")
    if "resumed" in name:
        loop.optimiser_step = stop_at_2
        try:
            loop.train(config)
        except Stop:
            pass
    loop.optimiser_step = fail_on_rank_1 if "skipped" in name else step
    loop.train(config)
"""

SETTINGS = ("model.dtype=float32", "train.lr=1e-3", "train.clip=0.5", "train.steps=3")
TIED = "model.config.tie_word_embeddings=true"
CASES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "plain": ("iw_sft", "train.accumulate=1", ()),
    "accumulated": ("rwr", "train.accumulate=2", ("train.normalize=sequence",)),
    "weight": ("iw_sft", "train.accumulate=2", ("train.normalize=weight",)),
    "tied": ("dft", "train.accumulate=2", (TIED,)),
    "checkpointing": ("sft", "train.accumulate=1", ("model.gradient_checkpointing=true",)),
    "lora": ("sft", "train.accumulate=2", ("model.lora.rank=2",)),
    "snapshots": ("psft", "train.accumulate=1", ("train.snapshot_every=2",)),
    "resumed": ("iw_sft", "train.accumulate=2", ("train.steps=4", "train.save_every=2")),
}


def torchrun(stage: int, folder: Path, names: list[str], root: Path) -> None:
    """`names` of configs in `folder`, one after the other, on two ranks under DeepSpeed."""
    file = folder / "ranks.py"
    file.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(file), str(stage), str(folder), *names]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "rank0" in line)[-4000:]


def norms(folder: Path) -> list[float]:
    """Norms of the gradients of a run, step by step: updates of Adam say little of a gradient's size."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


def gap(one: Path, other: Path) -> float:
    """The largest difference between two exports."""
    a, b = (load_file(next((folder / "model").glob("*.safetensors"))) for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@needs_deepspeed
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_the_same_parameters(stage: int, tmp_path: Path, root: Path) -> None:
    for name, (objective, accumulate, more) in CASES.items():
        rows = 8 // int(accumulate[-1])
        train(tiny(tmp_path, *SETTINGS, "train.batch_size=16", *more, objective=objective, name=f"one/{name}"))
        layout = (f"train.batch_size={rows}", accumulate)
        config = tiny(tmp_path, *SETTINGS, *layout, *more, objective=objective, name=f"two/{name}")
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    torchrun(stage, tmp_path, list(CASES), root)
    for name in CASES:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert norms(two) == pytest.approx(norms(one), rel=1e-5), name
        assert gap(one, two) < 1e-6, name
