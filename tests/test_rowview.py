"""`rwft data CONFIG --row N`: the tokens, masks and weights of a row by hand, and why a row is left out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rwft.config import Config, as_dict
from rwft.data.example import Source
from rwft.errors import ConfigError, DataError
from rwft.progress import Display
from rwft.rowview import pieces, row_command, show_row, wanted_row
from tests.tiny import tiny
from tests.tokenizers_for_tests import byte_bpe, llama_like, prefix_space


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    content: list[dict[str, Any]] = [
        {"prompt": "ab>", "completion": "cd", "reward": 1.0},
        {"prompt": "ab>", "completion": "ef", "reward": 0.0},
        {"prompt": "x>", "completion": "y" * 60, "reward": 1.0},
        {"prompt": "z>", "completion": "", "reward": 2.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def config(folder: Path, *overrides: str, objective: Any = "awr") -> Config:
    given = (f"data.path={rows(folder)}", "data.eval_fraction=0.0", "data.credit.baseline=group_mean", *overrides)
    return tiny(folder, *given, objective=objective)


def shown(settings: Config, row: str, *, colour: bool = False) -> str:
    file = Path(settings.output).with_suffix(".txt").open("w")
    console = Console(width=200, record=True, file=file, force_terminal=colour or None, color_system="standard")
    with console.file, Display(console, main=True) as display:
        show_row(settings, wanted_row(row), display)
        return console.export_text(styles=colour)


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("│ ")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_a_row_token_by_token(tmp_path: Path) -> None:
    text = shown(config(tmp_path), "1")
    assert "rows.jsonl:1, trained on" in text
    assert "reward 1; group of 2 rows here" in text
    assert "7 tokens, 3 of them trained; the end token is trained" in text  # <s> a b > c d </s>
    assert "<s>ab>│cd</s>" in text
    weight = f"{math.exp(0.5):.4g}"  # advantage 1 - 1/2
    table = cells(text)
    assert [line[0] for line in table] == ["0", "1", "2", "3", "4", "5"]
    assert [line[2:4] for line in table] == [
        ["'a'", "0"], ["'b'", "0"], ["'>'", "0"], ["'c'", "1"], ["'d'", "1"], ["'</s>'", "1"]
    ]  # fmt: skip
    assert [line[4:] for line in table] == [
        *[["", "", "", ""]] * 3,
        ["1", "0.5", weight, "begins"],
        ["1", "0.5", weight, ""],
        ["1", "0.5", weight, "end"],
    ]


def test_colours_say_what_is_trained(tmp_path: Path) -> None:
    good, bad = shown(config(tmp_path), "1", colour=True), shown(config(tmp_path), "2", colour=True)
    assert "\x1b[32mc\x1b[0m" in good  # green
    assert "\x1b[31me\x1b[0m" in bad  # red: its advantage is -0.5
    assert "\x1b[2mb\x1b[0m" in good  # dim: of the prompt


def test_the_spaces_of_sentencepiece_are_shown() -> None:
    tokenizer = llama_like()
    names = ["<s>", "▁hi", "▁7", "hi", "▁", "▁hi", "<0xC3>", "<0xA9>", "a", "▁7", "</s>"]
    ids: list[Any] = [tokenizer.convert_tokens_to_ids(name) for name in names]
    assert pieces(tokenizer, ids) == ["<s>", " hi", " 7", "hi", " ", " hi", "", "é", "a", " 7", "</s>"]
    assert pieces(tokenizer, ids[1:3]) == ["hi", " 7"]  # the space that begins a text is the tokenizer's
    assert pieces(tokenizer, ids[6:7]) == ["\ufffd"]
    for other, text, expected in (
        (byte_bpe(), "7 hié!", ["7", " hi", "", "é", "!"]),
        (prefix_space(), "Q 7 hi", ["Q", " 7", " hi"]),
    ):
        encoded: Any = other(text).input_ids
        assert pieces(other, encoded) == expected


def test_weights_that_need_the_policy_are_not_shown(tmp_path: Path) -> None:
    assert "weight of" in shown(config(tmp_path), "1")
    assert "weight of" not in shown(config(tmp_path, objective="dft"), "1")


def test_no_end_token_is_said(tmp_path: Path) -> None:
    text = shown(config(tmp_path, "data.eos=never"), "1")
    assert "6 tokens, 2 of them trained; no end token is trained: it learns to go on" in text


def test_a_fitted_temperature_is_used(tmp_path: Path) -> None:
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p>", "completion": "ab", "reward": r}) + "\n" for r in [0.0, 1.0]))
    settings = tiny(tmp_path, f"data.path={path}", "data.eval_fraction=0.0",
                    objective={"name": "rwr_max", "temperature": {"ess": 0.6}})  # fmt: skip
    x = (2 + math.sqrt(4 - 0.16)) / 0.4  # of the closed form in test_temperature
    text = shown(settings, "1")
    assert f"rwr_max: temperature {1 / math.log(x):.6g} keeps 0.6" in text
    assert cells(text)[-1][6] == f"{1 / x:.4g}"


def test_every_example_of_a_row_and_its_log_probabilities(tmp_path: Path) -> None:
    path = tmp_path / "grouped.jsonl"
    row = {"prompt": "p>", "completions": ["a", "b"], "rewards": [1.0, 0.0], "logprobs": [[-1.5, -0.25], [-2.5, -0.5]]}
    path.write_text(json.dumps(row) + "\n")
    text = shown(tiny(tmp_path, f"data.path={path}", "data.eval_fraction=0.0", objective="tis"), "1")
    assert text.count("grouped.jsonl:1, trained on") == 2
    assert [line[6] for line in cells(text) if line[6]] == ["-1.5", "-0.25", "-2.5", "-0.5"]


@pytest.mark.parametrize(("row", "why"), [("3", "longer than data.max_length"), ("rows.jsonl:3", "longer than")])
def test_a_dropped_row_is_refused_with_its_reason(tmp_path: Path, row: str, why: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: dropped: {why}"):
        shown(config(tmp_path), row)


def test_part_of_a_row_may_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "grouped.jsonl"
    path.write_text(json.dumps({"prompt": "p>", "completions": ["a", "b" * 60], "rewards": [1.0, 0.0]}) + "\n")
    with pytest.raises(DataError, match=r"grouped.jsonl:1: dropped \(1 of its 2 examples\): longer than"):
        shown(tiny(tmp_path, f"data.path={path}", "data.eval_fraction=0.0"), "1")


def test_a_row_that_the_adapter_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rwft import Example\nfrom rwft.data.adapters import Dropped\n\n"
        "def rows(row, source):\n"
        "    if row['reward'] == 0:\n        yield Dropped('worth nothing')\n    else:\n"
        "        yield Example(row['prompt'], row['completion'], source, reward=row['reward'])\n"
    )
    settings = config(tmp_path, f"data.adapter={tmp_path}/mine.py:rows")
    assert "trained on" in shown(settings, "1")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: dropped: worth nothing"):
        shown(settings, "2")


def test_a_row_that_is_not_there(tmp_path: Path) -> None:
    for row in ("9", "other.jsonl:1"):
        with pytest.raises(DataError, match=rf"--row: found no (row )?{row} in .*rows.jsonl"):
            shown(config(tmp_path), row)


@pytest.mark.parametrize("text", ["", "x", "rows.jsonl", "-1", "rows.jsonl:x"])
def test_a_row_is_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--row: found .* expected the number of a row, such as 6"):
        wanted_row(text)


def test_which_sources_a_row_names() -> None:
    assert Source("data/a.jsonl", 6) in wanted_row("6")
    assert Source("data/a.jsonl", 6) in wanted_row("a.jsonl:6")
    assert Source("data/a.jsonl", 7) not in wanted_row("6")
    assert Source("data/b.jsonl", 6) not in wanted_row("a.jsonl:6")


def test_a_bare_file_has_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no config; tokens need a model's tokenizer"):
        row_command(str(rows(tmp_path)), [], "1")


def test_the_command_ends_with_its_status(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(as_dict(config(tmp_path))))
    code = "from rwft.cli import main; main()"
    said = [
        subprocess.run(
            [sys.executable, "-c", code, "data", str(file), "--row", row],
            capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "150"},
        )
        for row in ("1", "3")
    ]  # fmt: skip
    assert [done.returncode for done in said] == [0, 2]
    assert "<s>ab>│cd</s>" in said[0].stdout
    assert said[1].stderr.startswith("rwft: ")
    assert "rows.jsonl:3: dropped: longer than data.max_length" in said[1].stderr
