"""`rwft data` tells the truth about rows, rewards and weights."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from rwft.config import Config, resolve
from rwft.inspection import effective_sample_size, inspect_config, inspect_file
from rwft.progress import Display
from tests.tiny import MODEL

REWARDS = [0.0, 0.0, 0.0, 1.0, 1.0, 3.0]


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"p{i % 3}>", "completion": "ab", "reward": r}) + "\n" for i, r in enumerate(REWARDS)
        )
    )
    return path


def config(folder: Path, *overrides: str, objective: str = "rwr") -> Config:
    content = {
        "model": {"config": MODEL, "tokenizer": "characters"},
        "objective": objective,
        "data": {"path": str(rows(folder)), "eval_fraction": 0.0, "max_length": 32},
        "cache": str(folder / "cache"),
    }
    return resolve(content, overrides)


def said(settings: Config, *, tokens: bool) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    with Display(console, main=True) as display:
        (inspect_config if tokens else inspect_file)(settings, display)
        return console.export_text()


def test_a_file_by_itself(tmp_path: Path) -> None:
    text = said(config(tmp_path), tokens=False)
    assert "scored: prompt -> prompt, completion -> completion, reward -> reward" in text
    assert "6 rows, 6 examples" in text
    assert "reward: mean 0.8333, std 1.067, min 0, 5% 0, median 0.5, 95% 2.5, max 3" in text
    assert "groups: 3, of 2 to 2 rows (median 2); 0 of a single row" in text
    counts = [line.split()[-1] for line in text.splitlines() if line.strip()[:1] in "013" and "█" in line]
    assert counts[:3] == ["3", "2", "1"]


def test_weights_and_who_carries_them(tmp_path: Path) -> None:
    text = said(config(tmp_path, "objective={name: rwr, temperature: 1.0}"), tokens=True)
    weights = [min(math.exp(r), 20.0) for r in REWARDS]
    ess = sum(weights) ** 2 / sum(w * w for w in weights)
    assert f"effective sample size: {ess:.1f} of 6 rows ({ess / 6:.1%}); weight zero: 0" in text
    first = next(line for line in text.splitlines() if "rows.jsonl:6" in line)
    assert "20" in first  # exp(3) = 20.09, clipped at 20


def test_weights_of_zero_are_counted(tmp_path: Path) -> None:
    text = said(config(tmp_path, objective="filtered_bc"), tokens=True)
    assert "effective sample size: 3.0 of 6 rows (50.0%); weight zero: 3" in text


def test_weights_that_need_the_policy_are_not_guessed(tmp_path: Path) -> None:
    text = said(config(tmp_path, objective="dft"), tokens=True)
    assert "weights of 'dft' depend on more than the rows' rewards" in text
    assert "effective sample size" not in text


def test_dropped_rows_are_counted_with_their_reason(tmp_path: Path) -> None:
    text = said(config(tmp_path, "data.max_length=7"), tokens=True)
    assert "6 rows to train on" in text
    with pytest.raises(ValueError, match=r"all 6 rows are longer than data\.max_length \(6\)"):
        said(config(tmp_path, "data.max_length=6"), tokens=True)


def test_effective_sample_size() -> None:
    import numpy as np

    assert effective_sample_size(np.array([2.0, 2.0, 2.0])) == pytest.approx(3.0)
    assert effective_sample_size(np.array([1.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_sample_size(np.zeros(3)) == 0.0
