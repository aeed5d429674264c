"""What is refused between the rows of a file and the rows that are trained on, and how that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rwft.data.characters import character_tokenizer
from rwft.data.prepare import Prepared, prepare
from rwft.errors import DataError
from rwft.settings import DataConfig


def saved(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def prepared(folder: Path, *rows: dict[str, Any], reads: tuple[str, ...] = (), **settings: Any) -> Prepared:
    given = {"path": str(saved(folder, *rows)), "eval_fraction": 0.0, **settings}
    return prepare(DataConfig(**given), character_tokenizer(), frozenset(reads), folder / "cache")


@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_rows_that_are_all_too_long(fraction: float, tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 20, "completion": f"{i}", "reward": 1.0} for i in range(7)]
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, *rows, max_length=16, eval_fraction=fraction)
    assert str(caught.value) == (
        "data: all 7 rows are longer than data.max_length (16), expected some that fit; raise data.max_length, or set "
        "data.overlong: truncate_prompt, which keeps the answers"
    )
    assert len(prepared(tmp_path, *rows, max_length=16, overlong="truncate_prompt").train) == 7


def test_rows_that_are_left_out_for_several_reasons_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 20, "completion": "a", "reward": 1.0}, {"prompt": "p", "completion": "", "reward": 1.0}]
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, *rows, max_length=16, eos="never")
    assert str(caught.value).startswith("data: no rows are left to train on: scored: ")
    assert "; dropped 1: longer than data.max_length; dropped 1: nothing to train on" in str(caught.value)


def test_rewards_that_are_null_in_some_rows(tmp_path: Path) -> None:
    def chat(**more: Any) -> dict[str, Any]:
        talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        return {"instruction": talk[0]["content"], "output": talk[1]["content"], **more}

    def talk(folder: Path, *rows: dict[str, Any], **settings: Any) -> Prepared:
        given = DataConfig(path=str(saved(folder, *rows)), eval_fraction=0.0, **settings)
        tokenizer = character_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}"
        )
        return prepare(given, tokenizer, frozenset({"reward"}), folder / "cache")

    rows = [chat(reward=1.0), *[chat(reward=None)] * 2, chat(reward=0.0), chat(reward=None)]
    with pytest.raises(DataError) as caught:
        talk(tmp_path, *rows)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: reward: found null, as in 3 of 5 rows ")
    with pytest.raises(DataError, match=r"rows.jsonl:1: no reward, but the objective reads reward; give a reward col"):
        talk(tmp_path, chat(), chat())


def test_what_is_empty_and_what_is_held_out_but_trained_is_counted(tmp_path: Path) -> None:
    rows = [("a", "x"), ("", "x"), ("", "y"), ("b", ""), ("c", "z")]
    trained = [{"prompt": prompt, "completion": completion, "reward": 1.0} for prompt, completion in rows]
    folder = tmp_path / "held_out"
    folder.mkdir()
    others = [{"prompt": prompt, "completion": "w", "reward": 0.0} for prompt in ("c", "a", "d", "c")]
    report = prepared(tmp_path, *trained, eval_path=str(saved(folder, *others))).report
    assert report.notes["empty prompt"] == 2
    assert report.notes["empty completion"] == 1
    assert report.notes["row of data.eval_path with a prompt that is also trained on"] == 3
    assert "2 x empty prompt" in report.lines()
    assert not prepared(tmp_path, *trained[:1], eval_path=str(saved(folder, others[2]))).report.notes
