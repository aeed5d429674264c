"""CSV and TSV: what is read as what, and where what is wrong stands."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from rwft.data.adapters import read_examples
from rwft.data.ledger import BadRows
from rwft.data.sources import read_rows


def saved(folder: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def read(file: Path) -> list[tuple[dict[str, Any], int]]:
    return [(row, source.row) for row, source in read_rows(file)]


def test_cells_by_the_type_of_their_column_and_the_line_that_they_begin_in(tmp_path: Path) -> None:
    text = (
        "prompt,completion,reward,n,ok,group,note\r\n"
        '"1,\n""2""",2,0.5,3,True,007,5\r\n'
        "1+1?,2,-1,-4,FALSE,12,five\r\n"
        "q,é,1e-3,,,3,\r\n"
    )
    file = saved(tmp_path, text)
    assert read(file) == [
        ({"prompt": '1,\n"2"', "completion": "2", "reward": 0.5, "n": 3, "ok": True, "group": "007", "note": "5"}, 2),
        ({"prompt": "1+1?", "completion": "2", "reward": -1.0, "n": -4, "ok": False, "group": "12", "note": "five"}, 4),
        ({"prompt": "q", "completion": "é", "reward": 0.001, "n": None, "ok": None, "group": "3", "note": None}, 5),
    ]
    first = read(file)[0][0]
    assert [type(first[name]) for name in ("reward", "n", "ok")] == [float, int, bool]


def test_an_export_is_trained_on(tmp_path: Path) -> None:
    text = "prompt\tcompletion\tlabel\n1+1?\t2\tThumbs up\n1+1?\t3\tthumbs_down\n"
    zipped = saved(tmp_path, gzip.compress(b"\xef\xbb\xbf" + text.encode()), "rows.tsv.gz")
    found = read_examples(zipped)
    assert [(e.prompt, e.completion, e.reward) for e in found] == [("1+1?", "2", 1.0), ("1+1?", "3", 0.0)]
    assert found.ledger.notes["byte-order mark skipped"] == 1
    assert found.choice.name == "binary"
    plain = saved(tmp_path, "prompt,completion,reward\n1+1?,2,1\n\n1+1?,3,0\n")
    assert [(e.completion, e.reward) for e in read_examples(plain)] == [("2", 1.0), ("3", 0.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1\n1,2,3\n", "{file}:3: found 1 fields, expected 2, as many as the header has (one of 2 problems)"),
        ('a,b\n"x\ny",2\n1,2,3\n', "{file}:4: found 3 fields, expected 2, as many as the header has"),
        ("a,a\n1,2\n", "{file}:1: a: found the column twice, expected it once"),
        ("a,\n1,2\n", "{file}:1: found no name for column 2 of the header, expected one"),
        ("a,b\n", "{file}: found no rows, expected a header and at least one row"),
        ("", "{file}: found no rows, expected a header and at least one row"),
        ("a;b\n1;2\n", "{file}:1: found the header 'a;b', expected the names of columns with commas between them"),
        ("a,reward\n1,0.5\n1,nan\n", "{file}:3: reward: found nan, expected a finite number"),
        ("a,reward\n1,0.5\n1,1e999\n", "{file}:3: reward: found inf, expected a finite number"),
        ('a,b\n1,2\n"x"y,2\n', "{file}:3: not CSV: ',' expected after '\"'; expected quotes in pairs"),
        ('a,b\n1,2\n"x,2\n', "{file}:3: not CSV: unexpected end of data; expected quotes in pairs"),
        (b"a,b\n1,2\n1,\xff\n", "{file}:3:3: found byte 0xff, expected UTF-8"),
    ],
)
def test_what_is_wrong_is_placed(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = saved(tmp_path, text)
    with pytest.raises(BadRows) as caught:
        read(file)
    assert str(caught.value).startswith(message.format(file=file))


def test_text_among_numbers_is_refused_where_a_number_is_needed(tmp_path: Path) -> None:
    file = saved(tmp_path, "prompt,completion,reward\np,a,0.5\np,b,high\n")
    with pytest.raises(ValueError, match=r"rows.csv:3: reward: found text 'high', expected number or boolean"):
        read_examples(file)
    empty = saved(tmp_path, "prompt,completion,reward\np,a,0.5\np,b,\n")
    with pytest.raises(BadRows, match=r"rows.csv:3: reward: found null, expected a finite number"):
        list(read_examples(empty))
