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
from transformers import AutoModelForCausalLM

from rwft import zero
from rwft.config import Config, to_yaml
from rwft.errors import ConfigError, UserError
from rwft.loop import train
from rwft.setup import refuse_engine
from tests.tiny import tiny

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

RANKS = """
import math, os, signal, sys
import accelerate, deepspeed, torch
import rwft.data.logprobs as logprobs
import rwft.loop as loop
from accelerate.utils import DeepSpeedPlugin, DistributedType
from rwft.config import load_config
from rwft.errors import Interrupted
from rwft.sharding import whole

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


def stop_at_2(training, index, meter):
    spread = [p for p in training.policy.parameters() if p.numel() == 0]
    assert bool(spread) == (stage == 3), "weights lie whole on a rank between steps"
    if index == 1 and training.accelerator.process_index == 1:
        signal.raise_signal(signal.SIGTERM)
    step(training, index, meter)


def fail(training, index, meter):
    # at step 1 one number of the gradient is not finite, on one rank; at step 2 the gradient is fine, but not the rest
    def poisoned(*arguments):
        here = training.accelerator.process_index == 1
        if here and index == 1:
            training.optimizer.pieces()[0].view(-1)[0] = float("inf")
        norm = clip(*arguments)
        assert index != 1 or not math.isfinite(norm)
        return float("nan") if here and index == 2 else norm

    clip = training.optimizer.clip
    if index in (1, 2):
        training.optimizer.clip = poisoned
    before = [whole(p).clone() for p in training.policy.parameters()]
    step(training, index, meter)
    training.optimizer.clip = clip
    moved = any(not torch.equal(old, whole(p)) for old, p in zip(before, training.policy.parameters(), strict=True))
    assert moved == (index not in (1, 2))


loop.start_accelerator = under_deepspeed
logprobs.TOKENS_AT_ONCE["cpu"] = 12  # so that ranks need unequal numbers of passes for their snapshots
for name in names:
    config = load_config(f"{folder}/{name}.yaml")
    loop.optimiser_step = {"resumed": stop_at_2, "skipped": fail}.get(name, step)
    if name == "resumed":
        try:
            loop.train(config)
        except Interrupted:
            loop.optimiser_step = step
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
    "resumed": ("iw_sft", "train.accumulate=2", ("train.steps=4",)),
    "skipped": ("sft", "train.accumulate=2", ("train.steps=5", "train.on_nonfinite=skip")),
}

NAN_AT_1_AND_2 = """
import torch
def bad(logp, progress):
    return torch.full_like(logp, float("nan") if round(float(progress) * 5) in (1, 2) else 1.0)
"""


def torchrun(stage: int, folder: Path, names: list[str], root: Path) -> None:
    """`names` of configs in `folder`, one after the other, on two ranks under DeepSpeed."""
    file = folder / "ranks.py"
    file.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(file), str(stage), str(folder), *names]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
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
    bad = tmp_path / "bad.py"
    bad.write_text(NAN_AT_1_AND_2)
    for name, (objective, accumulate, more) in CASES.items():
        rows = 8 // int(accumulate[-1])
        alone = f"{bad}:bad" if name == "skipped" else objective
        train(tiny(tmp_path, *SETTINGS, "train.batch_size=16", *more, objective=alone, name=f"one/{name}"))
        layout = (f"train.batch_size={rows}", accumulate)
        config = tiny(tmp_path, *SETTINGS, *layout, *more, objective=objective, name=f"two/{name}")
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    torchrun(stage, tmp_path, list(CASES), root)
    for name in CASES:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert norms(two) == pytest.approx(norms(one), rel=1e-5), name
        assert gap(one, two) < 1e-6, name
    for name in ("plain", "tied"):
        folder = tmp_path / "two" / name / "model"
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info


def asking(config: Config, **settings: Any) -> None:
    """`refuse` for a launcher with these settings of DeepSpeed, on two ranks."""
    given = {"zero_optimization": {"stage": 3}, "fp16": {"enabled": False}, "gradient_clipping": "auto", **settings}
    plugin = SimpleNamespace(deepspeed_config=given)
    zero.refuse(config, SimpleNamespace(deepspeed_plugin=plugin, num_processes=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, "found ZeRO stage 1, expected 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer to 'cpu'"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to 'nvme'"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights was not"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: found 1.0, but the run's own settings say 0.0"),
        ({"gradient_accumulation_steps": 4}, "found 4, but the run's own settings say 1"),
        ({"train_micro_batch_size_per_gpu": 3}, "found 3, but the run's own settings say 16"),
        ({"train_batch_size": 16}, "found 16, but the run's own settings say 32"),
        ({"bf16": {"enabled": True}}, "'bf16' is set; leave it out, the run has model.dtype"),
        ({"optimizer": {"type": "AdamW"}}, "'optimizer' is set"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is set"),
    ],
)
def test_settings_of_deepspeed_that_do_not_fit(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"DeepSpeed: .*{said}"):
        asking(tiny(tmp_path, "model.dtype=float32"), **settings)


def test_settings_of_deepspeed_that_fit(tmp_path: Path) -> None:
    none = {"device": "none", "nvme_path": None}
    stage = {"stage": 2, "offload_optimizer": none, "offload_param": none, "reduce_bucket_size": 1000}
    asking(tiny(tmp_path, "model.dtype=float32"), zero_optimization=stage, train_batch_size="auto", bf16={})


def test_float64_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype: float64 would be cast to float32"):
        asking(tiny(tmp_path, "model.dtype=float64"))


def test_adapters_are_merged_in_stage_2_only(tmp_path: Path) -> None:
    config = tiny(tmp_path, "model.dtype=float32", "model.lora.rank=2", "model.lora.merge=true")
    for stage in (2, 3):
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
        kind = SimpleNamespace(value="DEEPSPEED")
        accelerator = SimpleNamespace(distributed_type=kind, deepspeed_plugin=plugin, num_processes=2, is_fsdp2=False)
        if stage == 2:
            refuse_engine(config, accelerator)
        else:
            with pytest.raises(ConfigError, match=r"model\.lora\.merge: weights that are spread"):
                refuse_engine(config, accelerator)


@pytest.mark.parametrize(("installed", "said"), [(False, "not installed; pip install"), (True, "none was found")])
def test_deepspeed_where_there_is_none(
    installed: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        train(tiny(tmp_path, "model.dtype=float32"))


def test_nothing_of_deepspeed_is_imported_unasked(root: Path) -> None:
    code = "import sys, rwft.loop, rwft.zero, rwft.cli; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, check=True, timeout=120)
