"""The gradient of every objective under every normaliser, however its step is cut, padded or spread over ranks.

All objectives that couple no rows are prepared at once, as one product that reads all signals, and
then asked one by one; so are those that need whole groups. The policy is neither its reference nor
its last snapshot, so no ratio is 1 by accident.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwft.config import Config, ModelConfig
from rwft.errors import ObjectiveError
from rwft.estimator import NORMALIZERS
from rwft.invariance import TOLERANCE, distance, layout_gaps, recut, rehearsal, step_gradient
from rwft.policy import load_policy
from rwft.progress import Display
from rwft.setup import make_plan
from rwft.training import Training
from rwft.weighting import build_objective, objective
from tests.test_distributed import torchrun
from tests.tiny import MODEL, tiny

STEP = 1  # the second and last step of an epoch: 26 rows in steps of 16 leave ten
COUPLED = sorted(name for name in objective if "group" in objective.entry(name).reads)
SINGLE = sorted(name for name in objective if name not in COUPLED)
NEGATIVE = {"unlikelihood", "reinforce", "asymre"}  # among those whose weights may be negative: refused under `weight`


def frozen_model(folder: Path, seed: int) -> Path:
    """A model folder with random weights of its own."""
    if not folder.exists():
        policy = load_policy(ModelConfig(config=MODEL, tokenizer="characters", dtype="float64"), seed)
        policy.causal.save_pretrained(folder)
    return folder


def of_all(folder: Path, names: list[str], dtype: str = "float64", batch_size: int = 16, accumulate: int = 1) -> Config:
    overrides = [f"model.dtype={dtype}", f"train.batch_size={batch_size}", f"train.accumulate={accumulate}"]
    overrides += [f"reference.path={frozen_model(folder / 'reference', 7)}", "train.snapshot_every=2"]
    overrides += [f"auxiliary.path={frozen_model(folder / 'auxiliary', 8)}", "data.credit.baseline=mean"]
    return tiny(folder, *overrides, objective=names)


@contextmanager
def prepared(config: Config) -> Iterator[Training]:
    """A run of all the config's objectives at once, snapshot taken, the policy then moved away from it."""
    with rehearsal(config, Display(Console(quiet=True), main=True)) as training:
        training.model.eval()
        plan = only(training, "dpo" if "group" in training.objective.reads else "sft").plan  # no row left out
        replace(training, plan=plan).snapshot(0)
        for part in gather_object([dict(training.old_logp)]):  # others leave out rows, and deal otherwise
            training.old_logp.update(part)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in training.policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64).to(parameter.dtype))
        training.kl_running = 0.03
        yield training


def only(training: Training, name: str, normalize: str = "token") -> Training:
    """The same run with one objective and a normaliser; rows and signals are there already."""
    config = replace(training.config, train=replace(training.config.train, normalize=normalize))
    chosen, ranks = build_objective(name), training.accelerator.num_processes
    plan = make_plan(config, chosen, (), training.data, ranks, beside=training.collate.share is not None)
    return replace(training, config=config, objective=chosen, plan=plan)


def gaps(training: Training) -> dict[str, float]:
    """Layout -> gap of the gradient."""
    out = {gap.layout: gap.gap for gap in layout_gaps(training, STEP)}
    if training.plan.units is not None:
        training.model.eval()
        whole = step_gradient(recut(training, len(training.plan.window(STEP))), STEP)
        out["groups apart"] = distance(step_gradient(recut(training, 1), STEP), whole)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("names", [SINGLE, COUPLED], ids=["single", "coupled"])
def test_the_gradient_does_not_depend_on_the_layout(names: list[str], dtype: str, tmp_path: Path) -> None:
    wrong, refused, still = {}, set(), set()
    with prepared(of_all(tmp_path, names, dtype)) as training:
        for name in names:
            for normalize in NORMALIZERS:
                try:
                    chosen = only(training, name, normalize)
                    found = gaps(chosen)
                except ObjectiveError as error:
                    refused.add((name, normalize, str(error).partition(",")[0]))
                    continue
                if max(found.values()) > TOLERANCE[dtype]:
                    wrong[name, normalize] = max(found.items(), key=lambda item: item[1])
                if not any(bool(g.any()) for g in step_gradient(chosen, STEP).values()):
                    still.add(name)
    assert wrong == {}
    assert {tuple(reason) for _, *reason in refused} <= {("weight", "train.normalize: weight needs weights >= 0")}
    assert {name for name, *_ in refused} >= NEGATIVE & set(names)
    assert still == set(), "a gradient of zero proves nothing"


def test_the_check_sees_a_normaliser_of_the_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that the estimator exists to avoid: dividing by the tokens of the micro-batch."""
    from rwft import step
    from rwft.estimator import Counts

    right = step.micro_batch

    def mean(training: Any, batch: Any, counts: Counts, *rest: Any) -> Any:
        return right(training, batch, Counts(float(batch.mask.sum()), len(batch.rows)), *rest)

    monkeypatch.setattr(step, "micro_batch", mean)
    with prepared(of_all(tmp_path, ["sft", "dft"])) as training:
        for name in ("sft", "dft"):
            assert max(gaps(only(training, name)).values()) > 0.1


RANKS = """
import sys
from pathlib import Path
from accelerate import PartialState
from tests.test_layout_of_objectives import gradients

world, folder = int(sys.argv[1]), Path(sys.argv[2])
assert PartialState(cpu=True).num_processes == world
gradients(folder, world)
"""


def gradients(folder: Path, world: int) -> None:
    """The finished gradient of every objective and normaliser on this many ranks, into files; ten rows on four ranks
    leave an empty micro-batch."""
    for kind, names in (("single", SINGLE), ("coupled", COUPLED)):
        size, accumulate = (16 // world, 1) if kind == "single" else (4, 4 // world)
        out: dict[str, Tensor] = {}
        with prepared(of_all(folder, names, batch_size=size, accumulate=accumulate)) as training:
            for name in names:
                for normalize in NORMALIZERS:
                    try:
                        found = step_gradient(only(training, name, normalize), STEP)
                    except ObjectiveError:
                        continue
                    out |= {f"{name} {normalize} {key}": value for key, value in found.items()}
            if training.accelerator.is_main_process:
                save_file(out, folder / f"{kind}-{world}.safetensors")
            training.accelerator.wait_for_everyone()


@pytest.mark.distributed
def test_the_gradient_does_not_depend_on_the_ranks(tmp_path: Path, root: Path) -> None:
    gradients(tmp_path, 1)
    for world in (2, 4):
        torchrun(world, tmp_path, [], root, script=RANKS)
        for kind, names in (("single", SINGLE), ("coupled", COUPLED)):
            one, many = (load_file(tmp_path / f"{kind}-{n}.safetensors") for n in (1, world))
            assert {key.split()[0] for key in one} == set(names)
            assert one.keys() == many.keys()
            worst = {}
            for start in sorted({" ".join(key.split()[:2]) for key in one}):
                a, b = ({k: v for k, v in found.items() if k.startswith(f"{start} ")} for found in (one, many))
                worst[start] = distance(b, a)
            assert {start: gap for start, gap in worst.items() if not gap <= TOLERANCE["float64"]} == {}
