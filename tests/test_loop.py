"""The loop: layout, resume, errors. What is proven here holds for every objective, because there is one loop."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rwft.config import TrainConfig
from rwft.data.characters import character_tokenizer
from rwft.errors import ConfigError, DataError, NonFiniteError, ObjectiveError, PolicyError, SaveError, UserError
from rwft.loop import train
from rwft.step import learning_rate
from tests.tiny import MODEL, tiny

LAYOUTS = [(16, 1), (1, 16), (4, 4)]
CORE = ["sft", "dft", "rwr", "iw_sft", "iw_sft_token", "filtered_bc", "awr", "reinforce", "prob_power", "tis"]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


@pytest.mark.parametrize("normalize", ["token", "sequence", "sequence_sum", "weight"])
@pytest.mark.parametrize("objective", CORE)
def test_parameters_do_not_depend_on_the_layout(objective: str, normalize: str, tmp_path: Path) -> None:
    finals = []
    for size, accumulate in LAYOUTS:
        name = f"{size}x{accumulate}"
        config = tiny(
            tmp_path,
            f"train.batch_size={size}",
            f"train.accumulate={accumulate}",
            f"train.normalize={normalize}",
            "train.steps=3",
            objective=objective,
            name=name,
        )
        train(config)
        finals.append(parameters(tmp_path / name))
    assert distance(finals[0], finals[1]) < 1e-9
    assert distance(finals[0], finals[2]) < 1e-9


def test_training_moves_the_parameters_and_lowers_the_nll(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, "train.steps=60"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    nll = [line["nll/mean"] for line in lines if "nll/mean" in line]
    assert nll[0] == pytest.approx(math.log(100), rel=0.02)  # random weights: uniform over 100 characters
    assert nll[-1] < nll[0] - 1.0
    assert result.steps == 60
    assert result.held_out["nll/mean"] < nll[0]


class Killed(Exception):
    pass


@pytest.mark.parametrize("objective", ["sft", "iw_sft"])
@pytest.mark.parametrize("dead_at", [1, 3, 4])
def test_a_killed_run_goes_on_bit_by_bit(
    objective: str, dead_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwft import loop

    more = ("train.steps=6", "train.save_every=2", "model.dtype=float32", "train.clip=0.5")
    train(tiny(tmp_path, *more, objective=objective, name="whole"))
    config = tiny(tmp_path, *more, objective=objective, name="killed")
    step = loop.optimiser_step

    def dies(training, index, meter):  # type: ignore[no-untyped-def]
        if index == dead_at:
            raise Killed
        step(training, index, meter)

    monkeypatch.setattr(loop, "optimiser_step", dies)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.setattr(loop, "optimiser_step", step)
    train(config)
    assert distance(parameters(tmp_path / "whole"), parameters(tmp_path / "killed")) == 0.0
    whole, killed = ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "killed"))
    losses = [[json.loads(line).get("loss/mean") for line in lines] for lines in (whole, killed)]
    assert losses[0] == losses[1]


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft import loop

    config = tiny(tmp_path)
    first = train(config)
    monkeypatch.setattr(loop, "optimiser_step", lambda *_: pytest.fail("it trained again"))
    assert train(config) == first


def test_another_config_in_the_same_output_is_refused_unless_fresh(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.01, this config says 0\.02.*--fresh"):
        train(tiny(tmp_path, "train.lr=0.02"))
    train(tiny(tmp_path, "train.lr=0.02"), fresh=True)
    assert (tmp_path / "run.previous-1" / "model").is_dir()
    assert "lr: 0.02" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("objective", "overrides", "error", "sentence"),
    [
        ("dff", (), ObjectiveError, "did you mean 'dft'"),
        ("tis", ("data.path={folder}/bare.jsonl",), DataError, "log-probabilities of the behaviour policy"),
        ("sft", ("model.config.max_position_embeddings=9",), DataError, "tokens, but the model has 9 positions"),
        ("rwr", ("data.path={folder}/missing.jsonl",), DataError, "missing.jsonl"),
        ("sft", ("model.path=/nowhere/at/all", "model.config=null"), ValueError, "no such folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    objective: str, overrides: tuple[str, ...], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a", "completion": "b", "reward": 1.0}\n' * 20)
    with pytest.raises(error, match=sentence) as caught:
        train(tiny(tmp_path, *(o.format(folder=tmp_path) for o in overrides), objective=objective))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["output", "cache"])
@pytest.mark.parametrize(("place", "reason"), [("file/x", "Not a directory"), ("/proc/x", "No such file")])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(
    key: str, place: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc lets nobody make a folder, root neither."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("rwft.loop.prepare_training", lambda *_: pytest.fail("it went to work"))
    path = tmp_path / place  # an absolute one stands for itself
    with pytest.raises(UserError, match=rf"^{key}: {path} cannot be written: .*{reason}") as caught:
        train(tiny(tmp_path, f"{key}={path}"))
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_a_verifier_that_cannot_be_loaded_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing but an evaluation, later, would call it."""
    file = tmp_path / "letters.py"
    file.write_text("def share(completion: str) -> float:\n    return 1.0\n")
    monkeypatch.setattr("rwft.loop.prepare_training", lambda *_: pytest.fail("it went to work"))
    with pytest.raises(ObjectiveError, match=r"has no function 'shar'; did you mean 'share'\?"):
        train(tiny(tmp_path, f"evaluate.verifier={file}:shar"))
    assert not (tmp_path / "run").exists()


def test_a_comparison_s_folder_is_no_output_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "compare.yaml").write_text("")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match=r"run holds a comparison, not one run; name another folder$"):
            train(tiny(tmp_path), fresh=fresh)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["compare.yaml"]


def test_a_full_disk_is_no_mistake_of_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(SaveError, match=r"No space left") as caught:
        train(tiny(tmp_path))
    assert caught.value.exit_status == 4


def test_a_weight_that_is_not_finite_stops_before_the_parameters_move(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "import torch\n"
        "def explode(logp, progress):\n"
        "    return torch.full_like(logp, float('nan')) if progress > 0.4 else torch.ones_like(logp)\n"
    )
    config = tiny(tmp_path, "train.save_every=1", objective=f"{tmp_path}/bad.py:explode")
    with pytest.raises(
        NonFiniteError, match=r"step 2: objective 'explode' gave a weight that is not finite for row .*rollouts.jsonl"
    ):
        train(config)
    saved = tmp_path / "run" / "checkpoints" / "step_00000002" / "model.safetensors"
    assert all(bool(v.isfinite().all()) for v in load_file(saved).values())


def test_an_objective_of_five_lines_trains(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rwft import objective\n\n\n"
        "@objective\ndef half_dft(logp, *, alpha: float = 0.5):\n    return (alpha * logp).exp()\n"
    )
    train(tiny(tmp_path, objective={"name": f"{tmp_path}/mine.py:half_dft", "alpha": 0.5}, name="mine"))
    train(tiny(tmp_path, objective={"name": "prob_power", "alpha": 0.5}, name="built_in"))
    assert distance(parameters(tmp_path / "mine"), parameters(tmp_path / "built_in")) == 0.0


@pytest.mark.parametrize("reader", ["dft", {"name": "kto", "beta": 1.0, "threshold": -1.0}])
def test_rows_of_weight_zero_change_nothing_but_time(
    reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under kto too, whose weights read the running mean of the log ratios of all rows."""
    from rwft import setup

    train(tiny(tmp_path, objective=[reader, "filtered_bc"], name="skipped"))
    monkeypatch.setattr(
        setup, "refuse_all_zero", lambda objective, data: torch.zeros(len(data.train), dtype=torch.bool).numpy()
    )
    train(tiny(tmp_path, objective=[reader, "filtered_bc"], name="forwarded"))
    assert distance(parameters(tmp_path / "skipped"), parameters(tmp_path / "forwarded")) < 1e-12


def test_pairs_of_which_there_are_none_teach_nothing(tmp_path: Path) -> None:
    """Lone rows and ties weigh zero under every preference, and the run is refused before it starts."""
    rows = [{"prompt": f"{n}>", "completion": "ab", "reward": float(n)} for n in range(20)]
    rows += [{"prompt": "t>", "completion": text, "reward": 1.0} for text in ("c", "d")]
    (tmp_path / "lone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lone = (f"data.path={tmp_path}/lone.jsonl", "data.eval_fraction=0")
    with pytest.raises(
        ConfigError, match=r"'dpo': every one of the 22 rows has weight zero \(no two rows of a group dif"
    ):
        train(tiny(tmp_path, *lone, objective="dpo"))
    assert not (tmp_path / "run").exists()


def test_old_logp_is_the_policy_at_the_last_snapshot(tmp_path: Path) -> None:
    (tmp_path / "ratio.py").write_text(
        "def ratio(logp, old_logp, progress):\n"
        "    r = (logp - old_logp).exp()\n"
        "    assert (float((r - 1).abs().max()) < 1e-12) == (float(progress) in (0.0, 0.5)), (r, progress)\n"
        "    return r\n"
    )
    train(tiny(tmp_path, "train.snapshot_every=2", objective=f"{tmp_path}/ratio.py:ratio"))


def test_reference_logp_is_computed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft import frozen

    train(tiny(tmp_path, objective="iw_sft", name="first"))
    monkeypatch.setattr(frozen, "row_logp", lambda *a, **k: pytest.fail("computed again"))
    train(tiny(tmp_path, objective="iw_sft", name="second"))
    assert distance(parameters(tmp_path / "first"), parameters(tmp_path / "second")) == 0.0


def test_the_schedule() -> None:
    config = TrainConfig(lr=1.0, warmup=0.2, schedule="cosine")
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2] == 1.0
    assert rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate(6, 10, TrainConfig(lr=1.0, warmup=0.2, schedule="linear")) == pytest.approx(0.5)
    assert learning_rate(9, 10, TrainConfig(lr=1.0, warmup=0.0, schedule="constant")) == 1.0


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(tmp_path, "trackers=[tensorboard]", objective="rwr"))
    events = next(path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*"))
    logged = EventAccumulator(str(events)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss/mean", "nll/mean", "weight/ess"):
        scalars = [event.value for event in logged.Scalars(name)]
        assert scalars == pytest.approx([line[name] for line in lines if name in line], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "sentence"), [("[tensorbord]", "did you mean 'tensorboard'"), ("tensorboard", "expected a list")]
)
def test_a_tracker_that_is_not_there_is_refused(given: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        train(tiny(tmp_path, f"trackers={given}"))


def test_tokens_that_the_model_does_not_know_are_refused_by_row(tmp_path: Path) -> None:
    known = character_tokenizer()("h")["input_ids"][-1] + 1  # the last letter of these rows
    assert train(tiny(tmp_path, f"model.config.vocab_size={known}", "train.steps=1", name="enough")).steps == 1
    row = next(n for n, line in enumerate((tmp_path / "rollouts.jsonl").read_text().splitlines(), 1) if "h" in line)
    with pytest.raises(
        PolicyError, match=rf"rollouts\.jsonl:{row}: token {known - 1}, but the model knows {known - 1} "
    ):
        train(tiny(tmp_path, f"model.config.vocab_size={known - 1}"))
    assert not (tmp_path / "run").exists()


def test_tokens_that_the_reference_does_not_know_are_refused(tmp_path: Path) -> None:
    settings = {key: value for key, value in MODEL.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**{**settings, "vocab_size": 60})).save_pretrained(tmp_path / "other")
    with pytest.raises(PolicyError, match=r"rollouts\.jsonl:\d+: token \d+, but the model of reference.path knows 60 "):
        train(tiny(tmp_path, f"reference.path={tmp_path}/other", objective="iw_sft"))


def test_a_pad_token_that_the_model_does_not_know_is_not_needed(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<late>"})
    tokenizer.save_pretrained(tmp_path / "late")
    changes = (f"model.config.vocab_size={size}", f"model.tokenizer={tmp_path}/late", "train.batch_size=4")
    assert train(tiny(tmp_path, *changes)).steps == 4
