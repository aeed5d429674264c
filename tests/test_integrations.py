"""Objectives in a `transformers.Trainer`: the steps of our own loop, and of full logits written out in float64."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from rwft.config import resolve
from rwft.data.prepare import prepare
from rwft.errors import ConfigError, DataError, ObjectiveError, PolicyError
from rwft.integrations.hf import SignalCollator, pad_rows, weighted
from rwft.loop import train
from rwft.policy import load_policy, load_tokenizer
from rwft.setup import make_plan
from rwft.weighting import build_objective
from tests.tiny import MODEL

REWARD, IW = {"name": "rwr", "temperature": 0.5}, {"name": "iw_sft", "temperature": 1.0}
PRODUCT = ["dft", REWARD]


def tiny_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = {key: value for key, value in MODEL.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float64)


def tiny_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 4 to 12 tokens, whose last 1 to 3 are trained; each with a reward and reference log-probabilities."""
    draw = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    rows = []
    for _ in range(count):
        ids = torch.randint(3, 100, (whole(4, 13),), generator=draw).tolist()
        trained = whole(1, 4)
        ref = (-3 * torch.rand(trained, generator=draw, dtype=torch.float64) - 3).tolist()
        labels = [-100] * (len(ids) - trained) + ids[-trained:]
        rows.append({"input_ids": ids, "labels": labels, "reward": whole(0, 3) / 2, "ref_logp": ref})
    return rows


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
    }
    return TrainingArguments(**{**settings, **changes})


def descend(
    folder: Path, model: Any, rows: list[dict[str, Any]], objective: Any, normalize: str, **changes: Any
) -> Any:
    """Trains with plain SGD at rate 1, so that the parameters move by minus the gradient."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "num_train_epochs": 1, **changes}
    kind = weighted(Trainer, objective, normalize=normalize)
    trainer = kind(model=model, args=arguments(folder, **settings), train_dataset=Dataset.from_list(rows))
    trainer.train()
    return trainer


def full_logp(model: Any, row: dict[str, Any]) -> Tensor:
    """`(n)`: log-probabilities of the trained tokens of one row, by full logits."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
    trained = labels[1:] != -100
    return logp[trained].gather(1, ids[1:][trained, None])[:, 0]


WEIGHTS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "sft": lambda logp, row: torch.ones_like(logp),
    "dft": lambda logp, row: logp.exp(),
    "rwr": lambda logp, row: torch.full_like(logp, 2.0 * row["reward"]).exp(),
    "product": lambda logp, row: logp.exp() * torch.full_like(logp, 2.0 * row["reward"]).exp(),
    "iw_sft": lambda logp, row: (
        (logp - torch.tensor(row["ref_logp"], dtype=torch.float64)).mean().exp().expand_as(logp)
    ),
}
SPECS: dict[str, Any] = {"sft": "sft", "dft": "dft", "rwr": REWARD, "product": PRODUCT, "iw_sft": IW}


def full_loss(model: Any, rows: list[dict[str, Any]], name: str, normalize: str) -> Tensor:
    """The equation, row by row."""
    parts, tokens = [], 0
    for row in rows:
        logp = full_logp(model, row)
        part = (WEIGHTS[name](logp.detach(), row) * logp).sum()
        parts.append(part / len(logp) if normalize == "sequence" else part)
        tokens += len(logp)
    return -sum(parts, torch.zeros((), dtype=torch.float64)) / (tokens if normalize == "token" else len(rows))


def step(model: Any, rows: list[dict[str, Any]], name: str, normalize: str) -> float:
    """Moves the trained parameters by minus the gradient; gives back the loss before."""
    model.zero_grad()
    loss = full_loss(model, rows, name, normalize)
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    return float(loss.detach())


def mean_nll(model: Any, rows: list[dict[str, Any]]) -> float:
    with torch.no_grad():
        return -float(torch.cat([full_logp(model, row) for row in rows]).mean())


def flat(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def close(one: Any, other: Any, tolerance: float = 1e-10) -> bool:
    return float((flat(one) - flat(other)).abs().max()) < tolerance


@pytest.mark.parametrize("normalize", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("size", "accumulate"), [(10, 1), (3, 2)])
def test_steps_descend_the_equation(tmp_path: Path, name: str, normalize: str, size: int, accumulate: int) -> None:
    """10 rows, in one step or in steps of 3 + 3 and of 3 + 1: the last micro-batch and the last step are short."""
    model, rows = tiny_model(), tiny_rows(10)
    expected = copy.deepcopy(model)
    for start in range(0, len(rows), size * accumulate):
        step(expected, rows[start : start + size * accumulate], name, normalize)
    changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
    descend(tmp_path, model, rows, SPECS[name], normalize, **changes)
    assert not close(model, tiny_model(), 1e-4)
    assert close(model, expected)


def run_config(folder: Path, objective: Any, normalize: str) -> Any:
    """24 scored rows in steps of 8, ten steps of Adam with clipping, in float64."""
    data = folder / "rows.jsonl"
    lines = [
        {"prompt": f"{n}:{'abc' * (n % 3)}", "completion": "fedcba"[: 1 + n % 5], "reward": n % 4 / 2}
        for n in range(24)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "model": {"config": MODEL, "tokenizer": "characters", "dtype": "float64"},
        "objective": objective,
        "data": {"path": str(data), "max_length": 48, "eval_fraction": 0.0},
        "train": {
            "steps": 10,
            "batch_size": 8,
            "lr": 1e-2,
            "warmup": 0.0,
            "schedule": "constant",
            "weight_decay": 0.0,
            "normalize": normalize,
        },
        "cache": str(folder / "cache"),
        "output": str(folder / "run"),
    }
    return resolve(content, [])


def rows_of_steps(config: Any, model: Any) -> list[dict[str, Any]]:
    """The rows that the config's steps train on, in order; the model as it starts is the reference."""
    objective = build_objective(config.objective)
    data = prepare(config.data, load_tokenizer(config.model), objective.reads, Path(config.cache), lambda _: None)
    plan = make_plan(config, objective, (), data, 1, beside=False)
    rows = []
    for step in range(config.train.steps):
        taken = data.train.take(plan.window(step))
        for ids, mask, reward in zip(taken["ids"], taken["mask"], taken["reward"], strict=True):
            labels = [-100, *(token if on else -100 for token, on in zip(ids[1:], mask, strict=True))]
            row = {"input_ids": ids, "labels": labels, "reward": reward}
            with torch.no_grad():
                rows.append({**row, "ref_logp": full_logp(model, row).tolist()})
    return rows


@pytest.mark.parametrize(
    ("objective", "normalize"),
    [("sft", "token"), ("dft", "sequence"), (REWARD, "sequence_sum"), (IW, "token"), (PRODUCT, "token")],
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_ten_steps_are_those_of_our_own_loop(tmp_path: Path, objective: Any, normalize: str, accumulate: int) -> None:
    config = run_config(tmp_path, objective, normalize)
    train(config)
    ours = load_file(tmp_path / "run" / "model" / "model.safetensors")
    model = load_policy(config.model, config.train.seed).model
    rows = rows_of_steps(config, model)
    args = arguments(
        tmp_path / "hf",
        max_steps=10,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        adam_beta1=config.train.betas[0],
        adam_beta2=config.train.betas[1],
        max_grad_norm=config.train.clip,
    )
    weighted(Trainer, objective, normalize=normalize)(
        model=model, args=args, train_dataset=Dataset.from_list(rows)
    ).train()
    theirs = model.state_dict()
    moved = load_policy(config.model, config.train.seed).model.state_dict()
    assert max(float((ours[k] - moved[k]).abs().max()) for k in theirs) > 1e-2
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in theirs) < 1e-9


def test_rows_padded_on_the_left_are_the_same_rows(tmp_path: Path) -> None:
    def pad_left(rows: list[Any]) -> dict[str, Tensor]:
        batch = pad_rows(rows)
        shifts = [batch["input_ids"].shape[1] - len(row["input_ids"]) for row in rows]
        return {k: torch.stack([r.roll(s) for r, s in zip(v, shifts, strict=True)]) for k, v in batch.items()}

    model, rows = tiny_model(), tiny_rows(6)
    expected = copy.deepcopy(model)
    args = arguments(tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1)
    kind = weighted(Trainer, IW)
    kind(model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=pad_left).train()
    step(expected, rows, "iw_sft", "token")
    assert close(model, expected, 1e-6)  # positions of the rows are shifted: rotations are float32
    assert not close(model, tiny_model(), 1e-3)


def test_lora_moves_the_adapter_alone_by_its_gradient(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        model = get_peft_model(
            tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        return model.double()

    torch.manual_seed(0)
    model = adapted()
    expected, rows = copy.deepcopy(model), tiny_rows(6)
    descend(tmp_path, model, rows, PRODUCT, "sequence", per_device_train_batch_size=6)
    step(expected, rows, "product", "sequence")
    assert sum(p.requires_grad for p in expected.parameters()) == 4
    assert close(model, expected)


def test_no_logits_are_made_and_prompts_do_not_reach_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft.integrations import hf

    model, rows, seen, reached = tiny_model(), tiny_rows(6), [], []
    kind = weighted(Trainer, "dft")
    trainer = kind(
        model=model,
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=6),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
    )
    head, measure = hf.weighted_loss, hf.distribution_signals
    monkeypatch.setattr(hf, "weighted_loss", lambda h, *a, **k: (reached.append(len(h)), head(h, *a, **k))[1])
    monkeypatch.setattr(hf, "distribution_signals", lambda h, *a, **k: (reached.append(len(h)), measure(h, *a, **k))[1])
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    trainer.train()
    trainer.evaluate()
    trained = sum(label != -100 for row in rows for label in row["labels"])
    assert seen == [0, 0]
    assert reached == [trained, trained]
    assert not model._forward_hooks
    assert not model.model._forward_hooks


@pytest.mark.parametrize("objective", ["sft", PRODUCT])
def test_held_out_loss_is_the_plain_nll_of_all_tokens(tmp_path: Path, objective: Any) -> None:
    """In batches of 4, 4 and 1, of rows that have no reward."""
    model, rows = tiny_model(), tiny_rows(9, seed=1)
    held_out = [{k: row[k] for k in ("input_ids", "labels")} for row in rows]
    trainer = weighted(Trainer, objective, normalize="sequence")(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out),
    )
    expected = mean_nll(model, rows)
    with torch.no_grad():
        each = [full_logp(model, row) for row in rows]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-12)
    found = trainer.predict(Dataset.from_list(held_out))
    assert found.predictions == pytest.approx([-float(logp.sum()) for logp in each], abs=1e-12)
    assert found.metrics["test_loss"] == pytest.approx(expected, abs=1e-12)


def test_what_is_logged(tmp_path: Path) -> None:
    model, rows = tiny_model(), tiny_rows(8)
    trainer = descend(tmp_path, model, rows, REWARD, "token", learning_rate=0.0, logging_steps=1)
    start = tiny_model()
    with torch.no_grad():
        each = [full_logp(start, row) for row in rows]
        w = torch.cat([WEIGHTS["rwr"](logp, row) for logp, row in zip(each, rows, strict=True)])
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(float(full_loss(start, rows, "rwr", "token").detach()), abs=1e-5)
    assert first["nll/mean"] == pytest.approx(-float(torch.cat(each).mean()), abs=1e-12)
    assert first["weight/mean"] == pytest.approx(float(w.mean()), abs=1e-12)
    assert first["weight/ess"] == pytest.approx(float(w.sum() ** 2 / w.square().sum() / len(w)), abs=1e-12)


def test_signals_of_head_and_loop(tmp_path: Path) -> None:
    """Entropy, the size of the vocabulary, and how far the run is."""
    from rwft import objective

    @objective
    def spy(entropy: Tensor, log_vocab: Tensor, progress: Tensor) -> Tensor:
        """Entropy over its maximum, later more."""
        seen.append(float(progress))
        return (1 + progress) * entropy / log_vocab

    seen: list[float] = []
    model, rows = tiny_model(), tiny_rows(8)
    trainer = descend(
        tmp_path, model, rows, "spy", "token", per_device_train_batch_size=4, learning_rate=0.0, logging_steps=1
    )
    assert seen == [0.0, 0.5]
    with torch.no_grad():
        logits = [tiny_model()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1] for row in rows[4:]]
    trained = [torch.tensor(row["labels"])[1:] != -100 for row in rows[4:]]
    p = torch.cat([z[m] for z, m in zip(logits, trained, strict=True)]).softmax(dim=-1)
    expected = 1.5 * -(p * p.log()).sum(dim=-1) / torch.tensor(100.0, dtype=torch.float64).log()
    assert trainer.state.log_history[1]["weight/mean"] == pytest.approx(float(expected.mean()), abs=1e-7)


def test_bfloat16_autocast_is_near_the_same_gradient(tmp_path: Path) -> None:
    rows, models = tiny_rows(6), [tiny_model().float(), tiny_model().float()]
    for model, half in zip(models, (False, True), strict=True):
        descend(tmp_path, model, rows, PRODUCT, "token", per_device_train_batch_size=6, bf16=half)
    start = tiny_model().float()
    moved = [flat(model) - flat(start) for model in models]
    assert 0 < float((moved[0] - moved[1]).norm()) < 0.03 * float(moved[0].norm())


def test_the_collator_by_hand() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "reward": True, "behavior_logp": [-1.0, -2.0]},
        {"input_ids": [9, 4], "labels": [-100, 4], "reward": 0.5, "behavior_logp": [-3.0]},
    ]
    batch = SignalCollator(pad_rows, frozenset({"reward", "behavior_logp"}), torch.float64)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 4, -100, -100]]
    assert batch["reward"].tolist() == [[1.0], [0.5]]
    assert batch["behavior_logp"].tolist() == [[0.0, -1.0, -2.0], [-3.0, 0.0, 0.0]]
    per_row = SignalCollator(pad_rows, frozenset({"advantage"}), torch.float32)
    given = [{**row, "advantage": a} for row, a in zip(rows, (2, -1), strict=True)]
    assert per_row(given)["advantage"].tolist() == [[2.0], [-1.0]]
    given = [{**row, "advantage": a} for row, a in zip(rows, ([1, 2], [3]), strict=True)]
    assert per_row(given)["advantage"].tolist() == [[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]
    given = [{**row, "advantage": torch.tensor(a)} for row, a in zip(rows, (2, -1), strict=True)]
    assert per_row(given)["advantage"].tolist() == [[2.0], [-1.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "column 'reward': found None; expected a finite number in each row"),
        ({"reward": "good"}, "column 'reward': found 'good'"),
        ({"reward": float("nan")}, "column 'reward': found nan"),
        ({"ref_logp": [-1.0] * 9}, "column 'ref_logp': a row has 9 numbers for"),
        ({"ref_logp": [-1.0, None]}, r"column 'ref_logp': found \[-1.0, None\]"),
        ({"ref_logp": -1.0}, "column 'ref_logp': found -1.0; expected a list"),
        ({"labels": [1]}, "a row has .* and 1 labels"),
    ],
)
def test_rows_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    rows = tiny_rows(3)
    rows[1] = {**rows[1], **change}
    with pytest.raises(DataError, match=message):
        SignalCollator(pad_rows, frozenset({"reward", "ref_logp"}), torch.float64)(rows)


def test_a_collator_that_packs_is_refused() -> None:
    def pack(rows: list[Any]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([[label for row in rows for label in row["labels"]]])}

    with pytest.raises(DataError, match=r"3 rows became 1.*turn packing off"):
        SignalCollator(pack, frozenset({"reward"}), torch.float64)(tiny_rows(3))


@pytest.mark.parametrize(
    ("objective", "normalize", "error", "message"),
    [
        ("dpo", "token", ObjectiveError, "reads 'group': it compares completions of one prompt"),
        ("psft", "token", ObjectiveError, "reads 'old_logp': it needs snapshots"),
        ("sft", "weight", ConfigError, "normalize: 'weight' divides by a sum known only after"),
        ("sft", "tokens", ConfigError, "normalize: found 'tokens'; did you mean 'token'"),
        ("sftt", "token", ObjectiveError, "did you mean 'sft'"),
    ],
)
def test_objectives_that_a_trainer_cannot_provide_for(
    objective: str, normalize: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        weighted(Trainer, objective, normalize=normalize)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "args.label_smoothing_factor: cannot be used"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False: cannot be used"),
        ({"torch_compile": True}, "args.torch_compile: cannot be used"),
    ],
)
def test_settings_that_would_change_the_loss_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weighted(Trainer, "sft")(model=tiny_model(), args=arguments(tmp_path, **changes))


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_of_logits_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: cannot be used"):
        weighted(Trainer, "sft")(model=tiny_model(), args=arguments(tmp_path), **{name: lambda *_: None})


def test_an_adapted_head_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(PolicyError, match="leave it out of the adapter"):
        weighted(Trainer, "sft")(model=model, args=arguments(tmp_path))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    rows = [{"rewards" if k == "reward" else k: v for k, v in row.items()} for row in tiny_rows(2)]
    kind = weighted(Trainer, "rwr")
    with pytest.raises(DataError, match="'rwr' reads 'reward', but the training set has no such column; did you mean"):
        kind(model=tiny_model(), args=arguments(tmp_path), train_dataset=Dataset.from_list(rows))
    trainer = kind(model=tiny_model(), args=arguments(tmp_path, max_steps=1), train_dataset=rows)
    with pytest.raises(ObjectiveError, match="reads 'reward', which was not given"):
        trainer.train()


RANKS = """
import sys, torch
from datasets import Dataset
from transformers import Trainer
from rwft.integrations.hf import weighted
from tests.test_integrations import PRODUCT, arguments, tiny_model, tiny_rows

world, folder = int(sys.argv[1]), sys.argv[2]
for normalize in ("token", "sequence", "sequence_sum"):
    model, rows = tiny_model(), tiny_rows(12)
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    args = arguments(folder, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, logging_steps=1, **settings)
    data = Dataset.from_list(rows)
    kind = weighted(Trainer, PRODUCT, normalize=normalize)
    trainer = kind(model=model, args=args, train_dataset=data, eval_dataset=data)
    assert trainer.accelerator.num_processes == world
    trainer.train()
    log = trainer.state.log_history[0]
    figures = [log["loss"], log["nll/mean"], trainer.evaluate()["eval_loss"]]
    if trainer.is_world_process_zero():
        state = {name: p.detach() for name, p in model.named_parameters()}
        torch.save((state, figures), f"{folder}/{normalize}.pt")
"""


@pytest.mark.distributed
def test_two_ranks_take_the_step_of_one_process(tmp_path: Path, root: Path) -> None:
    """12 rows: 2 ranks, each 2 micro-batches of 3, in one step."""
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(tmp_path / "ranks.py"), "2", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for normalize in ("token", "sequence", "sequence_sum"):
        expected, rows = tiny_model(), tiny_rows(12)
        nll, loss, after = (
            mean_nll(expected, rows),
            step(expected, rows, "product", normalize),
            mean_nll(expected, rows),
        )
        state, figures = torch.load(tmp_path / f"{normalize}.pt")
        assert max(float((state[k] - p).abs().max()) for k, p in expected.state_dict().items() if k in state) < 1e-10
        assert figures == pytest.approx([loss, nll, after], abs=2e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_sft_trainer_of_trl_trains_the_same_equation(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, rows = tiny_model(), tiny_rows(6)
    expected = copy.deepcopy(model)
    from rwft.data.characters import character_tokenizer

    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    data = Dataset.from_list(rows)
    kind = weighted(trl.SFTTrainer, IW, normalize="sequence")
    trainer = kind(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=character_tokenizer()
    )
    trainer.train()
    step(expected, rows, "iw_sft", "sequence")
    assert close(model, expected)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_nll(expected, rows), abs=1e-9)
