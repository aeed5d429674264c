"""Ranks: the gradient, the parameters and the resumed run are those of one process. Spawned with torchrun, on CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rwft.config import to_yaml
from rwft.loop import train
from tests.tiny import tiny

pytestmark = pytest.mark.distributed
SCRIPT = """
import json, sys
from accelerate import PartialState
from rwft.config import load_config
from rwft.loop import train

world, folder, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
assert PartialState(cpu=True).num_processes == world
for name in names:
    train(load_config(f"{folder}/{name}.yaml"))
"""


STOP_AT_2 = SCRIPT.replace(
    "for name in names:",
    """import rwft.loop as loop

step = loop.optimiser_step


def stop(training, index, meter):
    if index == 2:
        assert training.accelerator.is_fsdp2
        training.accelerator.wait_for_everyone()
        training.accelerator.end_training()
        sys.exit(0)
    step(training, index, meter)


loop.optimiser_step = stop
for name in names:""",
)
END = """
if PartialState().num_processes > 1:
    PartialState().destroy_process_group()  # torch may abort a rank that exits without
"""

SHARDED = """
import accelerate, rwft.setup
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

start = rwft.setup.start_accelerator


def sharded(config):
    # Accelerate turns FSDP on for accelerators only; the engine itself runs on CPU ranks too
    accelerator = start(config)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    accelerate.PartialState().distributed_type = DistributedType.FSDP
    return accelerator


import rwft.loop
rwft.loop.start_accelerator = sharded
"""


def torchrun(world: int, folder: Path, names: list[str], root: Path, script: str = SCRIPT) -> None:
    file = folder / "ranks.py"
    file.write_text(script + END)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(file), str(world), str(folder), *names]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


CASES = [
    (objective, normalize)
    for objective in (
        "sft",
        "dft",
        "rwr",
        "iw_sft",
        "iw_sft_token",
        "filtered_bc",
        "awr",
        "reinforce",
        "prob_power",
        "tis",
    )
    for normalize in ("token", "sequence", "sequence_sum", "weight")
    if not (objective == "reinforce" and normalize == "weight")
]


def test_two_ranks_train_the_same_parameters(tmp_path: Path, root: Path) -> None:
    """Every core objective and normaliser; 28 or so rows in steps of 16 leave an uneven tail."""
    names = []
    for objective, normalize in CASES:
        name = f"{objective}-{normalize}"
        more = (f"train.normalize={normalize}", "train.steps=3")
        config = tiny(
            tmp_path, "train.batch_size=4", "train.accumulate=2", *more, objective=objective, name=f"two/{name}"
        )
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
        train(tiny(tmp_path, "train.batch_size=16", *more, objective=objective, name=f"one/{name}"))
        names.append(name)
    torchrun(2, tmp_path, names, root)
    gaps = {name: largest_difference(tmp_path / "one" / name, tmp_path / "two" / name) for name in names}
    assert max(gaps.values()) < 1e-9, gaps


def test_four_ranks_and_whole_groups(tmp_path: Path, root: Path) -> None:
    (tmp_path / "coupled.py").write_text(
        "import torch\n"
        "def coupled(logp, mask, reward, group):\n"
        "    same = (group[:, None] == group[None, :]).to(logp.dtype)\n"
        "    return reward - same @ reward / same.sum(dim=1, keepdim=True) + 0.1\n"
    )
    objective = f"{tmp_path}/coupled.py:coupled"
    train(tiny(tmp_path, "train.batch_size=16", "train.steps=3", objective=objective, name="one"))
    config = tiny(tmp_path, "train.batch_size=4", "train.steps=3", objective=objective, name="four")
    (tmp_path / "four.yaml").write_text(to_yaml(config))
    torchrun(4, tmp_path, ["four"], root)
    assert largest_difference(tmp_path / "one", tmp_path / "four") < 1e-9


def test_metrics_are_those_of_one_process(tmp_path: Path, root: Path) -> None:
    train(tiny(tmp_path, "train.batch_size=16", objective="iw_sft", name="one"))
    config = tiny(tmp_path, "train.batch_size=8", objective="iw_sft", name="two")
    (tmp_path / "two.yaml").write_text(to_yaml(config))
    torchrun(2, tmp_path, ["two"], root)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"tokens_per_second"}:
            assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12), key


def test_fully_sharded_ranks_train_resume_and_export(tmp_path: Path, root: Path) -> None:
    """FSDP2 on two ranks: the parameters of one process, through a checkpoint in the middle, into a plain folder."""
    more = ("train.batch_size=8", "train.save_every=2", "model.dtype=float32", "train.clip=0.5")
    train(tiny(tmp_path, *more, "train.batch_size=16", "train.steps=4", objective="iw_sft", name="one"))
    config = tiny(tmp_path, *more, "train.steps=4", objective="iw_sft", name="sharded")
    (tmp_path / "sharded.yaml").write_text(to_yaml(config))
    torchrun(2, tmp_path, ["sharded"], root, script=SHARDED + STOP_AT_2)
    assert (tmp_path / "sharded" / "checkpoints" / "step_00000002").is_dir()
    assert not (tmp_path / "sharded" / "model").exists()
    torchrun(2, tmp_path, ["sharded"], root, script=SHARDED + SCRIPT)
    assert largest_difference(tmp_path / "one", tmp_path / "sharded") < 1e-6


def test_adapters_and_summed_weights_on_two_ranks(tmp_path: Path, root: Path) -> None:
    """LoRA under DDP and FSDP2, and a gradient divided by the summed weights under FSDP2: the files of one process."""
    more = ("train.batch_size=8", "model.dtype=float32", "train.clip=0.5", "train.steps=3")
    lora, summed = (*more, "model.lora.rank=2"), (*more, "train.normalize=weight")
    cases = {
        "lora-ddp": (lora, SCRIPT),
        "lora-fsdp": (lora, SHARDED + SCRIPT),
        "weight-fsdp": (summed, SHARDED + SCRIPT),
    }
    for name, (settings, script) in cases.items():
        train(tiny(tmp_path, *settings, "train.batch_size=16", objective="iw_sft", name=f"one/{name}"))
        config = tiny(tmp_path, *settings, objective="iw_sft", name=f"two/{name}")
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
        torchrun(2, tmp_path, [name], root, script=script)
        one, two = (
            load_file(next((tmp_path / ranks / name / "model").glob("*.safetensors"))) for ranks in ("one", "two")
        )
        assert one.keys() == two.keys()
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6, name


def test_sampled_gradients_are_the_same_sharded(tmp_path: Path, root: Path) -> None:
    """A step's draws are of a rank and a micro-batch, whichever engine spreads the weights.

    One step, since AdamW makes of a gradient's rounding what it makes of a gradient, and a draw may fall beside it.
    """
    more = ("train.head=sampled", "model.config.vocab_size=2000", "train.steps=1", "train.batch_size=8")
    more += ("model.dtype=float32", "data.share_prompts=never")  # the same micro-batches under both engines
    for name, script in (("ddp", SCRIPT), ("fsdp", SHARDED + SCRIPT)):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(tiny(tmp_path, *more, name=name)))
        torchrun(2, tmp_path, [name], root, script=script)
    train(tiny(tmp_path, *more, "train.head=auto", "train.batch_size=16", name="exact"))
    assert largest_difference(tmp_path / "ddp", tmp_path / "fsdp") < 1e-6
    assert largest_difference(tmp_path / "ddp", tmp_path / "exact") > 1e-3  # there was something to draw
