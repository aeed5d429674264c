"""`rwft train --plan`: what it says is what a real model, a real forward pass and a real run turn out to be."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rwft.config import Config, ModelConfig, resolve, to_yaml
from rwft.data.batching import Plan
from rwft.errors import ConfigError, PolicyError
from rwft.footprint import Footprint, Outline, activations
from rwft.head import Draws, weighted_loss
from rwft.loop import train
from rwft.plan import Passes, amount, choose, describe, gathered, live, memory, operations, plan_command
from rwft.policy import load_policy
from rwft.progress import Display
from rwft.settings import LoraConfig
from rwft.setup import refuse_engine
from tests.tiny import MODEL, tiny

LORA = LoraConfig(rank=2)
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
GEMMA = {**MODEL, "model_type": "gemma2", "head_dim": 8, "num_hidden_layers": 2, "sliding_window": 8}
MODELS = {
    "llama": ModelConfig(config=MODEL, tokenizer="characters"),
    "tied": ModelConfig(config={**MODEL, "tie_word_embeddings": True}, tokenizer="characters"),
    "three layers": ModelConfig(config={**MODEL, "num_hidden_layers": 3}, tokenizer="characters"),
    "gpt2": ModelConfig(config=GPT2, tokenizer="characters"),
    "gemma2": ModelConfig(config=GEMMA, tokenizer="characters"),
    "bfloat16": ModelConfig(config=MODEL, tokenizer="characters", dtype="bfloat16"),
    "float64": ModelConfig(config=MODEL, tokenizer="characters", dtype="float64"),
    "lora": ModelConfig(config=MODEL, tokenizer="characters", lora=LORA),
    "lora bfloat16": ModelConfig(config=MODEL, tokenizer="characters", lora=LORA, dtype="bfloat16"),
}
SIZE = Footprint(
    parameters=1000,
    trained=1000,
    weights=4000,
    gradients=4000,
    root=1000,
    block=500,
    blocks=6,
    products=700,
    layers=6,
    attention=8,
    vocabulary=(50, 4),
    head_trained=True,
)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


def test_parameters_are_those_of_the_loaded_model(model: ModelConfig) -> None:
    size, policy = Outline(model).footprint(), load_policy(model, 0)
    everything, trained = list(policy.parameters()), [p for p in policy.parameters() if p.requires_grad]
    assert size.parameters == sum(p.numel() for p in everything)
    assert size.trained == sum(p.numel() for p in trained)
    assert size.weights == sum(p.numel() * p.element_size() for p in everything)
    assert size.gradients == sum(p.numel() * p.element_size() for p in trained)


def test_a_count_worked_by_hand() -> None:
    """Embedding and head 100 x 16 each, four 16 x 16, three 16 x 32, three norms of 16; four bytes each."""
    size = Outline(MODELS["llama"]).footprint()
    assert size.parameters == size.trained == 2 * 1600 + 4 * 256 + 3 * 512 + 3 * 16
    assert size.products == 4 * 256 + 3 * 512
    assert size.root == 4 * (2 * 1600 + 16)
    assert size.block == 4 * (4 * 256 + 3 * 512 + 2 * 16)
    assert (size.blocks, size.layers, size.attention, size.vocabulary) == (1, 1, 16, (100, 16))
    assert size.head_trained
    assert not Outline(MODELS["lora"]).footprint().head_trained


def really_kept(model: ModelConfig, rows: int, positions: int) -> int:
    """Bytes that autograd keeps of a real forward pass of real tensors, parameters left out."""
    policy = load_policy(model, 0).train()
    own = {p.data_ptr() for p in policy.parameters()}
    found: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), cast:
        states = policy.causal.base_model(input_ids=torch.ones(rows, positions, dtype=torch.long), use_cache=False)
    assert states.last_hidden_state.shape[:2] == (rows, positions)
    return sum(storage.nbytes() for storage in found.values())


def test_activations_are_those_of_a_real_forward_pass(model: ModelConfig) -> None:
    assert Outline(model).kept(3, 20) == really_kept(model, 3, 20)


def test_checkpointing_keeps_one_block_and_the_inputs_of_all() -> None:
    model = MODELS["three layers"]
    plain, spare = activations(model, 4, 32)
    assert plain == really_kept(model, 4, 32)
    inputs = 3 * 4 * 32 * 16 * 4  # of three blocks: rows x positions x width, float32
    assert plain // 3 + inputs <= spare < plain // 3 + 2 * inputs
    assert spare < plain


def test_nothing_random_is_drawn() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    Outline(MODELS["lora"])
    assert torch.equal(torch.rand(1), expected)


def test_a_folder_without_weights_is_enough_and_one_with_code_is_refused(tmp_path: Path) -> None:
    policy = load_policy(MODELS["tied"], 0)
    folder = tmp_path / "model"
    policy.causal.config.save_pretrained(folder)
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    outline = Outline(ModelConfig(path=str(folder)))
    assert outline.footprint().parameters == sum(p.numel() for p in policy.parameters())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(PolicyError, match="auto_map"):
        Outline(ModelConfig(path=str(folder)))
    with pytest.raises(PolicyError, match="no such folder"):
        Outline(ModelConfig(path=str(tmp_path / "nowhere")))


def config_of(folder: Path, *overrides: str) -> Config:
    return tiny(folder, "model.dtype=float32", *overrides)


def really_held(model: ModelConfig, trained: int, sampled: bool) -> int:
    """The most bytes that the head holds at once, with the hidden states that it is given."""
    policy = load_policy(model, 0)
    vocabulary, draws = policy.vocabulary(), Draws(torch.Generator().manual_seed(0)) if sampled else None
    dtype = torch.bfloat16 if policy.autocast else torch.float32
    x = torch.randn(trained, vocabulary.weight.shape[1]).to(dtype).requires_grad_()
    y = torch.randint(0, vocabulary.size, (trained,))
    cast = torch.autocast("cpu", torch.bfloat16, enabled=policy.autocast)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with cast:
            result = weighted_loss(x, vocabulary, y, lambda s, _: s["logp"].exp(), sampled=draws)
        result.loss.backward()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    changes: list[Any] = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    return x.nbytes + max(held)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("trained", [100, 1500], ids=["logits as small as the gradient", "larger"])
def test_the_head_takes_what_a_real_one_does(dtype: str, sampled: bool, trained: int) -> None:
    model = replace(MODELS["llama"], config={**MODEL, "vocab_size": 32000, "hidden_size": 256}, dtype=dtype)
    held = really_held(model, trained, sampled)
    assert Outline(model).head(trained, sampled) == pytest.approx(held, rel=0.1)


def test_memory_by_engine(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    outline = Outline(config.model)
    passes = Passes(rows=4, positions=10, trained=20, steps=1, several=False)
    weights = 4 * 5808  # bytes of the model of `tiny`
    kept = (60_000, 5_000)
    one = memory(config, outline, passes, kept, 1, "one")
    head = 20 * 100 * 4 + 100 * 16 * 4 + 2 * 20 * 16 * 4  # logits, gradient of the projection, hidden states twice
    assert one == {
        "weights": weights,
        "gradients": weights,
        "optimizer moments": 2 * weights,
        "loss head": head,
        "activations": 60_000,
        "peak": 3 * weights + 60_000 + head,
    }
    ddp = memory(config, outline, passes, kept, 2, "ddp")
    assert ddp["buckets of the reduction"] == weights
    assert ddp["peak"] == one["peak"] + weights
    fsdp = memory(config, outline, passes, kept, 4, "fsdp2")
    assert [fsdp[n] for n in ("weights", "gradients", "optimizer moments")] == [
        weights // 4,
        weights // 4,
        weights // 2,
    ]
    block = 4 * (4 * 256 + 3 * 512 + 2 * 16)
    assert fsdp["gathered weights and gradients"] == (weights - block) + 2 * block + weights
    assert fsdp["whole weights, while loading"] == weights
    assert fsdp["peak"] == weights // 4 + weights // 2 + 2 * weights + block + 60_000 + head
    small = memory(config, outline, Passes(1, 1, 1, 1, False), (0, 0), 10**6, "fsdp2")
    assert small["peak"] >= small["whole weights, while loading"]


def test_memory_of_zero(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    outline, passes, weights = Outline(config.model), Passes(4, 10, 20, 1, False), 4 * 5808
    two, three = (memory(config, outline, passes, (60_000, 0), 4, f"deepspeed_zero{stage}") for stage in (2, 3))
    for parts, whole in ((two, weights), (three, weights // 4)):
        assert parts["weights"] == whole
        assert parts["gradients"] == parts["weights that are updated, a copy"] == weights // 4
        assert parts["optimizer moments"] == weights // 2
        assert parts["buckets of the reduction"] == 2_000_000_000
    assert two["peak"] == weights + weights // 4 + weights // 2 + 2 * 10**9 + 60_000 + two["loss head"]
    block = 4 * (4 * 256 + 3 * 512 + 2 * 16)
    assert three["gathered weights and gradients"] == weights + max(block, weights - block)
    assert "whole weights, while loading" in three
    assert "whole weights, while loading" not in two
    bare = memory(config, outline, Passes(1, 1, 1, 1, False), (0, 0), 4, "deepspeed_zero2")  # the step is the peak
    assert bare["peak"] == weights + weights // 4 + weights // 2 + 2 * 10**9 + 2 * (weights // 4)


def test_what_zero_3_keeps_whole() -> None:
    """Up to 1e9 weights and what comes next; with them the gradients of the larger of block and rest."""
    large = replace(SIZE, parameters=8 * 10**9, weights=32 * 10**9, root=2 * 10**9, block=10**9)
    assert live(replace(large, gradients=32 * 10**9)) == 4 * 10**9 + 2 * 10**9 + 2 * 10**9
    assert live(replace(large, gradients=0)) == 6 * 10**9


def test_the_peak_holds_gradients_only_when_they_wait_or_outgrow_activations(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    outline, weights = Outline(config.model), 4 * 5808

    def peak(several: bool, kept: int) -> int:
        passes = Passes(rows=4, positions=10, trained=20, steps=1, several=several)
        return memory(config, outline, passes, (kept, 0), 1, "one")["peak"]

    assert peak(True, 60_000) == peak(False, 60_000) + weights
    assert peak(False, 0) == 4 * weights


def test_a_live_reference_stays_whole(tmp_path: Path) -> None:
    config = config_of(tmp_path, "regularize=[{name: forward_kl, coef: 0.1}]")
    parts = memory(config, Outline(config.model), Passes(4, 10, 20, 1, False), (0, 0), 4, "fsdp2")
    assert parts["reference model"] == 4 * 5808


def test_what_fsdp_gathers() -> None:
    assert gathered(SIZE) == 1000 + 2 * 500 + 1500


def test_operations_worked_by_hand() -> None:
    """Lengths 3 and 4: 7 positions, 25 pairs; 5 trained positions; three passes' worth, four with checkpointing."""
    length, trained = np.array([3, 4]), np.array([2, 3])
    body, attention, head = 2 * 700 * 7, 2 * 6 * 8 * 25, 2 * 50 * 4 * 5
    assert operations(SIZE, length, trained, False) == 3 * (body + attention + head)
    assert operations(SIZE, length, trained, True) == 4 * (body + attention) + 3 * head
    sampled = 2 * 4 * 5 * (50 + 2 * 257)  # all 50 tokens forwards, the target and 256 draws twice backwards
    assert operations(SIZE, length, trained, False, True) == 3 * (body + attention) + sampled


def test_the_plan_is_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of weight zero, an epoch and a half, warm-up: steps and tokens as the run has them, and no run folder."""
    more = ("train.steps=null", "train.epochs=1.5", "train.batch_size=4", "train.accumulate=2", "train.warmup=0.25")
    config = tiny(tmp_path, *more, objective={"name": "filtered_bc", "threshold": 0.5})
    with Display(Console(width=200), main=True) as display:
        describe(config, 1, "one", display)
    said = capsys.readouterr().out
    assert not Path(config.output).exists()
    result = train(config)
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    warm = rates.index(max(rates)) + 1
    assert f"{result.steps} optimiser steps, {warm} of them warm-up" in said
    steps = result.steps / 1.5
    assert f"{steps:.0f} to an epoch" in said
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert f"{sum(len(row['completions']) for row in rows)} examples" in said
    forwarded = sum(line["forwarded_tokens/sum"] for line in lines[: round(steps)] if "forwarded_tokens/sum" in line)
    assert f", {forwarded / steps:.0f} of them trained" in said


def test_the_order_of_ranks_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft import plan as module

    seen: list[Plan] = []
    keep = module.planned
    monkeypatch.setattr(module, "planned", lambda *given: seen.append(keep(*given)) or seen[-1])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config_of(tmp_path, "train.batch_size=4")))
    plan_command(str(file), [], 2, "ddp")
    assert (seen[0].world, seen[0].window_size) == (2, 8)


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ((None, None), {}, (1, "one")),
        ((8, None), {}, (8, "ddp")),
        ((8, "fsdp2"), {}, (8, "fsdp2")),
        ((None, None), {"WORLD_SIZE": "4"}, (4, "ddp")),
        ((None, None), {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}, (4, "fsdp2")),
        ((8, "deepspeed_zero3"), {}, (8, "deepspeed_zero3")),
        ((None, None), {"WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true"}, (4, "deepspeed_zero2")),
        (
            (None, None),
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            (2, "deepspeed_zero3"),
        ),
    ],
)
def test_processes_and_engine(
    given: tuple[int | None, str | None],
    environment: dict[str, str],
    expected: tuple[int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose(*given) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((2, "fsdp"), "did you mean 'fsdp2'"),
        ((1, "ddp"), "expected one on 1"),
        ((2, "one"), "expected one on 1"),
        ((0, None), ">= 1"),
    ],
)
def test_engines_that_do_not_fit(given: tuple[int | None, str | None], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(*given)


@pytest.mark.parametrize(("kind", "second"), [("MEGATRON_LM", False), ("FSDP", False)])
def test_engines_that_were_not_proven_are_refused_by_name(kind: str, second: bool, tmp_path: Path) -> None:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=second)
    with pytest.raises(ConfigError, match=f"the launcher asks for {kind}; use DDP, FSDP2 or ZeRO"):
        refuse_engine(config_of(tmp_path), accelerator)


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU", "FSDP"])
def test_engines_that_were_proven_pass(kind: str, tmp_path: Path) -> None:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=True)
    refuse_engine(config_of(tmp_path), accelerator)


def test_amounts() -> None:
    assert amount(5 * 2**29) == "2.50 GiB"
    assert amount(2**19) == "0.50 MiB"


def test_blocks_are_those_that_accelerate_wraps() -> None:
    outline = Outline(MODELS["three layers"])
    wrapped = [m for m in outline.policy.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    assert outline.footprint().blocks == len(wrapped) == 3
    assert all(isinstance(m, nn.Module) for m in wrapped)


RUN = """
import json, re, sys
from pathlib import Path
from rwft.config import resolve
from rwft.loop import train
train(resolve(json.loads(sys.argv[1])))
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM, which a child does not inherit, is of Linux alone")
def test_memory_is_what_a_run_takes(tmp_path: Path, root: Path) -> None:
    """Peak resident memory of a run minus that of a negligible model, against the plan, within 15 %."""

    def config(width: int, layers: int, vocabulary: int) -> Config:
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        model = {**MODEL, **sizes, "vocab_size": vocabulary}
        more = ("model.dtype=float32", "train.steps=2", "train.batch_size=32")
        plain = tiny(tmp_path, *more, objective="rwr", name=f"run{width}")
        from rwft.config import as_dict

        content = as_dict(plain)
        content["model"]["config"] = model
        return resolve(content)

    def peak(config: Config) -> int:
        from rwft.config import as_dict

        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed blocks go back to the system: what is live is measured
        command = [sys.executable, "-c", RUN, json.dumps(as_dict(config))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
        return int(done.stdout.split("peak")[1])

    large, small = config(512, 5, 12_000), config(16, 1, 100)
    taken = peak(large) - peak(small)
    outline = Outline(large.model)
    kept = activations(large.model, 32, 17)
    planned = memory(large, outline, Passes(32, 17, 32 * 9, 1, False), kept, 1, "one")["peak"]
    assert planned == pytest.approx(taken, rel=0.15)
