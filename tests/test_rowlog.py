"""What each row had in a step: against gradients by the logits, and the same bytes after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from rwft.config import Config
from rwft.data.prepare import prepare
from rwft.errors import ConfigError
from rwft.loop import train
from rwft.policy import load_policy, load_tokenizer
from rwft.rowlog import SCHEMA, read_rows
from tests.test_resume import cut
from tests.tiny import tiny

OBJECTIVE = ["tis", "reinforce"]
WHOLE = ("train.steps=1", "train.batch_size=100", "train.rows_every=1", "data.credit.baseline=group_mean")
EVERY_SECOND = ("train.batch_size=8", "train.steps=6", "train.save_every=1", "train.keep=20", "train.rows_every=2")


def gradient_sizes(config: Config) -> list[dict[str, float]]:
    """Of every training row: what its loss does to the logits, by autograd over the model's own."""
    rows = prepare(config.data, load_tokenizer(config.model), frozenset({"behavior_logp"}), Path(config.cache)).train
    model = load_policy(config.model, config.train.seed).causal.eval()
    columns, total = rows.take(np.arange(len(rows))), float(rows.trained.sum())
    out: list[dict[str, float]] = []
    for index in range(len(rows)):
        ids, mask = torch.tensor(columns["ids"][index]), torch.tensor(columns["mask"][index])
        group = rows.reward[rows.group == rows.group[index]]
        advantage = float(rows.reward[index] - group.mean()) if len(group) > 1 else 0.0
        logits = model(ids[None, :-1]).logits[0].double().detach().requires_grad_()
        logp = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][mask]
        mu = torch.tensor(columns["behavior_logp"][index])[mask]
        w = advantage * (logp - mu).exp().clamp(max=2.0).detach()
        (-(w * logp).sum() / total).backward()
        assert logits.grad is not None
        out.append(
            {
                "size": float(logits.grad.abs().sum()),
                "weight": float(w.mean()),
                "nll": float(-logp.detach().mean()),
                "advantage": advantage,
                "reward": float(rows.reward[index]),
                "tokens": int(mask.sum()),
                "group": int(rows.group[index]),
            }
        )
    return out


def test_shares_are_those_of_the_gradient_by_the_logits(tmp_path: Path) -> None:
    config = tiny(tmp_path, *WHOLE, "train.normalize=token", objective=OBJECTIVE)
    train(config)
    wanted, found = gradient_sizes(config), read_rows(tmp_path / "run").to_pylist()
    whole = sum(row["size"] for row in wanted)
    assert [line["row"] for line in found] == list(range(len(wanted)))
    for line, row in zip(found, wanted, strict=True):
        assert line["share"] == pytest.approx(row["size"] / whole, rel=1e-6, abs=1e-12)
        assert line["weight"] == pytest.approx(row["weight"], rel=1e-6, abs=1e-12)
        for name in ("advantage", "reward", "tokens", "group"):
            assert line[name] == row[name], name
        if row["advantage"] == 0:  # weighs nothing, whatever the policy: it was not forwarded
            assert (line["nll"], line["weight"], line["share"]) == (None, 0.0, 0.0)
        else:
            assert line["nll"] == pytest.approx(row["nll"], rel=1e-6)
    assert sum(line["share"] for line in found) == pytest.approx(1.0)
    assert {line["step"] for line in found} == {1}
    assert len({line["nll"] is None for line in found}) == 2


@pytest.mark.parametrize("normalize", ["sequence", "weight"])
def test_shares_know_the_normaliser(normalize: str, tmp_path: Path) -> None:
    """For SFT at the start every token has nearly the gradient of any other, over the row's length under `sequence`."""
    train(tiny(tmp_path, *WHOLE, f"train.normalize={normalize}", objective="sft"))
    found = read_rows(tmp_path / "run").to_pylist()
    parts = np.array([line["tokens"] if normalize == "weight" else 1.0 for line in found])
    assert [line["share"] for line in found] == pytest.approx(list(parts / parts.sum()), rel=0.02)
    assert {line["weight"] for line in found} == {1.0}


def test_a_row_is_named_by_its_file_and_line(tmp_path: Path) -> None:
    train(tiny(tmp_path, *EVERY_SECOND))
    assert sorted(p.name for p in (tmp_path / "run" / "rows").iterdir()) == [
        "step_00000002.parquet",
        "step_00000004.parquet",
        "step_00000006.parquet",
    ]
    table = read_rows(tmp_path / "run")
    assert table.schema == SCHEMA
    assert table["step"].to_pylist() == sorted(table["step"].to_pylist())
    written = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    for line in table.to_pylist():
        file, _, number = line["place"].rpartition(":")
        assert file == str(tmp_path / "rollouts.jsonl")
        row = written[int(number) - 1]
        texts = [c for c, r in zip(row["completions"], row["rewards"], strict=True) if r == line["reward"]]
        assert line["tokens"] in {len(text) + 1 for text in texts}  # with the end token


def test_rows_without_rewards_have_none(tmp_path: Path) -> None:
    data = tmp_path / "plain.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a", "completion": c}) + "\n" for c in "bcdefghijk"))
    train(tiny(tmp_path, *EVERY_SECOND, f"data.path={data}"))
    table = read_rows(tmp_path / "run")
    assert table.num_rows > 3
    assert table["reward"].null_count == table["advantage"].null_count == table.num_rows


def test_a_run_that_keeps_no_rows_reads_as_an_empty_table(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    assert not (tmp_path / "run" / "rows").exists()
    assert read_rows(tmp_path / "run") == SCHEMA.empty_table()
    assert isinstance(read_rows(tmp_path / "nowhere"), pa.Table)


def files(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "rows").iterdir())}


def test_a_resumed_run_writes_the_same_bytes(tmp_path: Path) -> None:
    more = (*EVERY_SECOND, "model.dtype=float32", "model.config.attention_dropout=0.2")
    train(tiny(tmp_path, *more, objective="iw_sft", name="whole"))
    whole = files(tmp_path / "whole")
    assert len(set(whole.values())) == 3
    for step in (1, 3, 4):
        copy = cut(tmp_path / "whole", step, "resumed")
        (copy / "rows" / "step_00000006.parquet").write_bytes(b"from a future that never was")
        (copy / "rows" / ".tmp-step_00000004.parquet-1-1").write_bytes(b"half")
        train(tiny(tmp_path, *more, objective="iw_sft", name="resumed"))
        assert files(copy) == whole, step


def test_files_past_the_step_that_a_run_resumes_at_are_forgotten(tmp_path: Path) -> None:
    from rwft.rowlog import forget_rows

    (tmp_path / "rows").mkdir()
    for step in (2, 4, 6):
        (tmp_path / "rows" / f"step_{step:08d}.parquet").write_bytes(b"")
    forget_rows(tmp_path, 4)
    assert sorted(files(tmp_path)) == ["step_00000002.parquet", "step_00000004.parquet"]
    forget_rows(tmp_path / "nowhere", 4)


def test_a_step_that_is_left_out_writes_no_file(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "import torch\n"
        "def sometimes(logp, progress):\n"
        "    return torch.full_like(logp, float('nan') if 0.2 < progress < 0.4 else 1.0)\n"
    )
    more = ("train.rows_every=1", "train.on_nonfinite=skip", "train.steps=4")
    train(tiny(tmp_path, *more, objective=f"{tmp_path}/bad.py:sometimes"))
    assert sorted(files(tmp_path / "run")) == [f"step_0000000{n}.parquet" for n in (1, 3, 4)]


def test_a_run_may_go_on_with_another_interval(tmp_path: Path) -> None:
    train(tiny(tmp_path, *EVERY_SECOND, name="whole"))
    copy = cut(tmp_path / "whole", 3, "resumed")
    train(tiny(tmp_path, *EVERY_SECOND, "train.rows_every=5", name="resumed"))
    assert sorted(files(copy)) == ["step_00000002.parquet", "step_00000005.parquet"]


def test_a_negative_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.rows_every: found -1, expected a whole number >= 0"):
        tiny(tmp_path, "train.rows_every=-1")
