"""Early warnings: every kind is planted, near misses and healthy runs raise none, a resume repeats none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwft.alarms import RULES, AlarmLog, Alarms
from rwft.config import Config, resolve
from rwft.loop import train
from tests.test_resume import cut
from tests.tiny import MODEL, tiny

HEALTHY: dict[str, float] = {
    "loss/mean": 1.0,
    "nll/mean": 1.0,
    "nll_good/mean": 0.8,
    "nll_bad/mean": 1.2,
    "nll_negative/mean": 1.2,
    "entropy/mean": 0.9,
    "weight/ess": 0.8,
    "weight/zero_share": 0.1,
    "weight/negative_share": 0.3,
    "weight/negative_improbable_share": 0.1,
    "ratio_to_behavior/mean": 1.0,
    "grad_norm": 2.0,
    "grad_clipped/mean": 0.5,
    "tokens/sum": 100.0,
    "forwarded_tokens/sum": 100.0,
}


def kinds(*lines: dict[str, float], every: int = 10) -> dict[str, int]:
    """Kind -> step of the warnings that these changes to healthy lines give rise to, one line each."""
    alarms = Alarms()
    heard = [w for i, line in enumerate(lines) for w in alarms.hear({**HEALTHY, **line, "step": (i + 1) * every})]
    assert len({w["kind"] for w in heard}) == len(heard)
    return {w["kind"]: w["step"] for w in heard}


def then(lines: int, **figures: float) -> list[dict[str, float]]:
    return [{name.replace("__", "/"): value for name, value in figures.items()}] * lines


def test_healthy_lines_raise_none() -> None:
    assert kinds(*then(200)) == {}


IMPROBABLE = "weight/negative_improbable_share"
Lines = list[dict[str, float]]
PLANTED: dict[str, tuple[Lines, int, list[Lines]]] = {
    # lines that go wrong, the step at which that is said, and lines that just do not
    "ess_collapse": (then(3, weight__ess=0.09), 70, [then(50, weight__ess=0.11)]),
    "weights_vanish": (then(3, weight__zero_share=0.91), 70, [then(50, weight__zero_share=0.89)]),
    "likelihood_displacement": (
        then(3, nll_good__mean=0.95, loss__mean=0.9),
        70,
        [then(9, nll_good__mean=0.89, loss__mean=0.9), then(9, nll_good__mean=0.95, loss__mean=1.1)],
    ),
    "negatives_run_away": (
        then(3, nll_negative__mean=3.3, **{IMPROBABLE: 0.6}),
        70,
        [
            then(9, nll_negative__mean=3.1, **{IMPROBABLE: 0.6}),
            then(9, nll_negative__mean=3.3, **{IMPROBABLE: 0.4}),
        ],
    ),
    "entropy_collapse": (
        then(3, entropy__mean=0.15),
        70,
        [then(9, entropy__mean=0.2), then(9, nll_good__mean=0.2) + then(9, nll_good__mean=0.2, entropy__mean=0.15)],
    ),
    "gradient_clipped": (then(6, grad_clipped__mean=1.0), 100, [then(5, grad_clipped__mean=1.0)]),
    "ratios_off": (then(3, **{"ratio_to_behavior/mean": 0.45}), 70, [then(9, **{"ratio_to_behavior/mean": 0.55})]),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_fault_is_said_once_and_a_near_miss_is_not(kind: str) -> None:
    wrong, step, nearly = PLANTED[kind]
    found = kinds(*then(4), *wrong, *then(5), *wrong)
    assert found.keys() == {kind}
    assert found[kind] <= step
    assert kinds(*then(4), *wrong[:2]) == {}, "two lines are no proof"
    for lines in nearly:
        assert kinds(*then(4), *lines) == {}


def test_every_rule_is_planted_here() -> None:
    assert {rule.__name__ for rule in RULES} == {*PLANTED, "memorising"}


def test_rows_of_weight_zero_by_data_alone_are_no_collapse() -> None:
    """A filter that keeps a twentieth of the rows, all with the same weight."""
    kept = {"forwarded_tokens/sum": 5.0, "weight/ess": 0.05, "weight/zero_share": 0.95}
    assert kinds(*[kept] * 20) == {}
    assert kinds(*[{**kept, "weight/ess": 0.004}] * 20).keys() == {"ess_collapse"}
    assert kinds(*[{**kept, "weight/zero_share": 0.996}] * 20).keys() == {"weights_vanish"}


def test_displacement_is_also_bad_rows_that_fall_faster() -> None:
    rising = {"nll_good/mean": 0.95, "loss/mean": 1.5}
    assert kinds(*then(4), *[rising] * 9) == {}
    assert kinds(*then(4), *[{**rising, "nll_bad/mean": 1.5}] * 9).keys() == {"likelihood_displacement"}


def test_the_noise_of_small_batches_is_no_displacement() -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        noisy = [{"nll_good/mean": 0.8 + 0.1 * x, "loss/mean": -i} for i, x in enumerate(draw.standard_normal(500))]
        assert kinds(*noisy, every=1) == {}, seed
        risen = [{**line, "nll_good/mean": line["nll_good/mean"] + 0.8} for line in noisy[100:120]]
        assert kinds(*noisy[:100], *risen, every=1).keys() == {"likelihood_displacement"}, seed


def test_without_rewards_entropy_is_held_against_the_whole_nll() -> None:
    alarms = Alarms()
    bare = {name: value for name, value in HEALTHY.items() if name not in ("nll_good/mean", "nll_bad/mean")}
    lines = [bare] * 4 + [{**bare, "entropy/mean": 0.15}] * 3
    heard = [w["kind"] for i, line in enumerate(lines) for w in alarms.hear({**line, "step": i + 1})]
    assert heard == ["entropy_collapse"]


def evaluated(*pairs: tuple[float, float], name: str = "nll") -> list[str]:
    """Kinds for (training, held-out) NLL in turn."""
    alarms, heard = Alarms(), []
    for step, (training, held_out) in enumerate(pairs, start=1):
        heard += alarms.hear({**HEALTHY, f"{name}/mean": training, "step": step})
        heard += alarms.hear({f"eval/{name}/mean": held_out, "step": step})
    return [w["kind"] for w in heard]


@pytest.mark.parametrize("name", ["nll", "nll_good"])
def test_memorising(name: str) -> None:
    best = [(0.9, 1.0), (0.8, 0.9)]
    assert evaluated(*best, (0.7, 0.96), (0.6, 0.97), name=name) == ["memorising"]
    assert evaluated(*best, (0.7, 0.96), (0.6, 0.94), name=name) == []
    assert evaluated(*best, (0.7, 0.94), (0.6, 0.97), name=name) == []
    assert evaluated(*best, (0.85, 0.96), (0.81, 0.97), name=name) == [], "both rise: sharpening, not memorising"


# --- in real runs


def said(run: Path) -> list[dict[str, Any]]:
    file = run / "warnings.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def scored(folder: Path, name: str, rewards: list[float]) -> str:
    draw, file = np.random.default_rng(1), folder / f"{name}.jsonl"
    letters = np.array(list("abcdefgh"))
    rows = [{"prompt": "q", "completion": "".join(draw.choice(letters, 4)), "reward": r} for r in rewards]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def faulty(folder: Path, kind: str) -> Config:
    """A run that has the fault."""
    (folder / "rest.py").write_text(
        "import torch\n\n\ndef rest(logp, progress):\n    return torch.full_like(logp, float(progress < 0.3))\n"
    )
    rare, half = scored(folder, "rare", [1.0] + [0.0] * 29), scored(folder, "half", [1.0, 0.0] * 15)
    cases: dict[str, tuple[Any, tuple[str, ...]]] = {
        "ess_collapse": (
            {"name": "rwr", "temperature": 0.1, "clip": 1e6},
            (f"data.path={rare}", "train.batch_size=64"),
        ),
        "weights_vanish": (f"{folder}/rest.py:rest", ()),
        "likelihood_displacement": (
            "reinforce",
            (f"data.path={half}", "data.credit.baseline=0.95", "train.lr=0.05"),
        ),
        "negatives_run_away": ("reinforce", ("data.credit.baseline=1.0", "train.lr=0.05")),
        "entropy_collapse": ("dft", ("train.lr=0.1", "train.watch=[entropy]")),
        "gradient_clipped": ("sft", ("train.clip=1.0e-3", "train.steps=60")),
        "ratios_off": (["tis", "reinforce"], ()),
        "memorising": ("sft", ("train.steps=120", "train.eval_every=10", "train.schedule=constant")),
    }
    objective, more = cases[kind]
    return tiny(folder, "train.steps=40", *more, objective=objective)


@pytest.mark.parametrize("kind", [rule.__name__ for rule in RULES])
def test_a_run_with_the_fault_says_so(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(faulty(tmp_path, kind))
    found = said(tmp_path / "run")
    assert kind in {warning["kind"] for warning in found}
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: step ")]
    assert printed == [f"warning: step {w['step']}: {w['kind'].replace('_', ' ')}: {w['message']}" for w in found]


def embedded(folder: Path, objective: str, steps: int, *overrides: str, model: Any = None) -> Config:
    """The task that needs no download, with weak but real logs."""
    content = {
        "model": model or {"config": {**MODEL, "hidden_size": 48, "intermediate_size": 96}, "tokenizer": "characters"},
        "objective": objective,
        "data": {"task": {"name": "caesar", "rows": 500, "heldout": 64, "skill": 0.9}, "max_length": 32},
        "train": {"steps": steps, "batch_size": 64, "lr": 1e-3, "log_every": 1, "eval_every": 20, "watch": ["entropy"]},
        "cache": str(folder / "cache"),
        "output": str(folder / objective),
    }
    return resolve(content, overrides)


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has learnt to imitate the logs."""
    folder = tmp_path_factory.mktemp("prior")
    train(embedded(folder, "sft", 250, "train.lr=5.0e-3"))
    return folder


def test_learning_from_nothing_is_healthy(prior: Path) -> None:
    lines = [json.loads(line) for line in (prior / "sft" / "metrics.jsonl").read_text().splitlines()]
    nll = [line["nll_good/mean"] for line in lines if "nll_good/mean" in line]
    assert nll[-1] < 0.3 * nll[0], "it learnt"
    assert said(prior / "sft") == []


@pytest.mark.parametrize("objective", ["sft", "dft", "awr"])
def test_healthy_runs_say_nothing(objective: str, prior: Path, tmp_path: Path) -> None:
    more = ("data.credit.baseline=mean",) if objective == "awr" else ()
    train(embedded(tmp_path, objective, 60, *more, model={"path": str(prior / "sft" / "model")}))
    assert said(tmp_path / objective) == []


# --- files


def test_a_resumed_run_repeats_no_warning(tmp_path: Path) -> None:
    config = faulty(tmp_path, "weights_vanish")
    more = ("train.save_every=5", "train.keep=20", "train.steps=20")
    whole = tiny(tmp_path, *more, objective=config.objective, name="whole")
    train(whole)
    found = said(tmp_path / "whole")
    assert [w["kind"] for w in found] == ["weights_vanish"]
    assert 5 < found[0]["step"] < 15
    for step in (5, 10, 15):
        copy = cut(tmp_path / "whole", step, "resumed")
        train(tiny(tmp_path, *more, objective=config.objective, name="resumed"))
        assert (copy / "warnings.jsonl").read_bytes() == (tmp_path / "whole" / "warnings.jsonl").read_bytes(), step


def test_warnings_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    def lines(number: int) -> str:
        rows = [{"step": i + 1, **HEALTHY, "weight/ess": 0.05 if i >= 5 else 0.8} for i in range(number)]
        return "".join(json.dumps(row) + "\n" for row in rows)

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(lines(10))
    AlarmLog(tmp_path, metrics, main=True)
    assert [w["step"] for w in said(tmp_path)] == [8]
    metrics.write_text(lines(7))
    log = AlarmLog(tmp_path, metrics, main=True)
    assert said(tmp_path) == []
    (sentence,) = log.hear({"step": 8, **HEALTHY, "weight/ess": 0.05})
    assert sentence.startswith("warning: step 8: ess collapse: 5.0% of the tokens make the update")
    assert log.hear({"step": 9, **HEALTHY, "weight/ess": 0.05}) == []
    assert [w["step"] for w in said(tmp_path)] == [8]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    shutil.copy(tmp_path / "metrics.jsonl", tmp_path / "copy")
    AlarmLog(tmp_path, tmp_path / "metrics.jsonl", main=False)
    assert not (tmp_path / "warnings.jsonl").exists()


def test_the_page_explains_every_kind(root: Path) -> None:
    page = (root / "docs" / "metrics.md").read_text()
    for rule in RULES:
        assert f"`{rule.__name__}`" in page, rule.__name__
