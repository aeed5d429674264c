"""Rows from files: bad ones are named by file, line and field; odd but legitimate ones are read exactly."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rwft.data.adapters import read_examples
from rwft.data.example import Source
from rwft.data.ledger import BadRows
from rwft.data.sources import origins, read_rows
from rwft.errors import ConfigError, DataError, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "malformed"
EXPECTED: dict[str, list[dict[str, Any]]] = tomllib.loads((FOLDER / "expected.toml").read_text(encoding="utf-8"))
ROW = {"prompt": "1+1?", "completion": "2", "reward": 1.0}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, *rows: Any) -> Path:
    path.write_text(lines(*rows), encoding="utf-8")
    return path


def rows_of(path: Any, **more: Any) -> list[dict[str, Any]]:
    return [row for row, _ in read_rows(path, **more)]


def test_the_corpus_is_whole() -> None:
    named = {case["file"] for case in EXPECTED["bad"] + EXPECTED["good"]}
    assert named == {file.name for file in FOLDER.iterdir()} - {"expected.toml"}
    assert len(EXPECTED["bad"]) >= 60
    assert len(EXPECTED["good"]) >= 15


@pytest.mark.parametrize("case", EXPECTED["bad"], ids=lambda case: case["file"])
def test_malformed_is_refused(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    with pytest.raises(DataError) as caught:
        list(read_examples(case["file"], yaml.safe_load(case["adapter"])))
    assert caught.value.exit_status == 2
    place = re.escape(case["file"])
    if "line" in case:
        line = r"\d+" if case["line"] == -1 else str(case["line"])
        place += rf":{line}" + (rf":{case['column']}" if "column" in case else r"(:\d+)?")
    field = f"{case['field']}: " if "field" in case else ""
    first = str(caught.value).splitlines()[0]
    assert re.match(f"{place}: {field}(?=.*({case['match']}))", first), first
    if isinstance(caught.value, BadRows):
        assert caught.value.count == len(caught.value.problems) == case["count"]
    else:
        assert case["count"] == 1


@pytest.mark.parametrize("case", EXPECTED["good"], ids=lambda case: case["file"])
def test_odd_but_legitimate_is_read_exactly(case: dict[str, Any]) -> None:
    examples = read_examples(FOLDER / case["file"], case["adapter"])
    got = list(examples)
    assert len(got) == len(case["rows"])
    for example, expected in zip(got, case["rows"], strict=True):
        values = {"prompt": example.prompt, "completion": example.completion, "reward": example.reward}
        values["prompt_length"] = len(example.prompt)
        assert {key: values[key] for key in expected} == expected
        assert isinstance(example.reward, float)
        assert math.copysign(1, example.reward) == math.copysign(1, expected["reward"])
    assert dict(examples.ledger.notes) == case.get("notes", {})


def test_all_problems_are_counted_and_the_first_five_shown(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *[7] * 9, ROW)
    with pytest.raises(BadRows) as caught:
        rows_of(file)
    shown = str(caught.value).splitlines()
    assert shown[0].startswith(f"{file}:1: found a number at the top level")
    assert shown[0].endswith("(one of 9 problems)")
    assert [line.split(":")[1] for line in shown[1:5]] == ["2", "3", "4", "5"]
    assert shown[5] == "  and 4 more"
    assert len(shown) == 6
    assert caught.value.count == 9


def test_the_report_holds_every_problem(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *[7] * 9)
    report = tmp_path / "report.txt"
    with pytest.raises(BadRows, match=re.escape(f"and 4 more, see {report}")) as caught:
        rows_of(file, report=report)
    assert report.read_text(encoding="utf-8").splitlines() == caught.value.problems
    assert len(caught.value.problems) == 9


def until_refused(items: Iterable[Any]) -> tuple[list[Any], BadRows]:
    """What comes before the error, and the error."""
    got = []
    try:
        for item in items:
            got.append(item)
    except BadRows as error:
        return got, error
    raise AssertionError(f"nothing was refused, got {got}")


def test_no_row_comes_after_the_first_problem(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"n": 1}, 7, {"n": 2}, 8)
    got, error = until_refused(read_rows(file))
    assert got == [({"n": 1}, Source(str(file), 1))]
    assert error.count == 2


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_around_all_rows_is_named(indent: int | None, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"data": [ROW] * 3, "version": 1}, indent=indent))
    with pytest.raises(BadRows) as caught:
        rows_of(file)
    assert str(caught.value) == (
        f"{file}:1: found one object with 3 rows in `data`, expected an array of objects, or one object per line; "
        "write the rows alone, e.g. jq -c '.data[]'"
    )
    file.write_text(lines({"data": "text"}, {"data": "more"}) + lines({"data": [ROW]}))
    assert [row["data"] for row in rows_of(file)] == ["text", "more", [ROW]]
    file.write_text(lines({"messages": [{"role": "user"}]}))
    assert rows_of(file) == [{"messages": [{"role": "user"}]}]


def test_sources_are_lines_of_text_from_1_and_rows_of_tables_from_0(tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text("\n" + lines(ROW) + "\n" + lines(ROW), encoding="utf-8")
    pq.write_table(pa.table({"n": [5, 6]}), tmp_path / "b.parquet")
    array = tmp_path / "c.json"
    array.write_text('[{"n": 1}, {"n": 2},\n  {"n": 3}]', encoding="utf-8")
    assert [source for _, source in read_rows(text)] == [Source(str(text), 2), Source(str(text), 4)]
    table = str(tmp_path / "b.parquet")
    assert list(read_rows(table)) == [({"n": 5}, Source(table, 0)), ({"n": 6}, Source(table, 1))]
    places = [(source.row, source.column) for _, source in read_rows(array)]
    assert places == [(1, 2), (1, 12), (2, 3)]
    assert str(Source("c.json", 2, 3)) == "c.json:2:3"


def test_table_rows_are_numbered_through_batches(tmp_path: Path) -> None:
    file = tmp_path / "long.parquet"
    pq.write_table(pa.table({"n": list(range(2500))}), file, row_group_size=700)
    assert [(row["n"], source.row) for row, source in read_rows(file)] == [(i, i) for i in range(2500)]


def test_table_values_keep_their_types(tmp_path: Path) -> None:
    table = {
        "whole": pa.array([3], pa.int32()),
        "half": pa.array([0.5], pa.float32()),
        "yes": [True],
        "nothing": pa.array([None], pa.string()),
        "lists": [[[-0.5, -1.0], []]],
        "chat": [[{"role": "user", "content": "hi"}]],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    [row] = rows_of(tmp_path / "t.parquet")
    assert row == {
        "whole": 3,
        "half": 0.5,
        "yes": True,
        "nothing": None,
        "lists": [[-0.5, -1.0], []],
        "chat": [{"role": "user", "content": "hi"}],
    }
    assert [type(row[key]) for key in ("whole", "half", "yes", "lists")] == [int, float, bool, list]


def test_decimals_of_databases_are_numbers(tmp_path: Path) -> None:
    """NUMERIC(4, 2) is a float, NUMERIC(10, 0) a whole number, wherever it stands."""
    file = tmp_path / "rows.parquet"
    money, whole = pa.decimal128(4, 2), pa.decimal128(10, 0)
    table = pa.table(
        {
            "prompt": ["p", "q"],
            "completion": ["a", "b"],
            "reward": pa.array([Decimal("0.50"), Decimal("-12.00")], money),
            "group": pa.array([Decimal(7), Decimal(1200)], whole),
            "all": pa.array([[Decimal("1.10")], None], pa.list_(money)),
            "meta": pa.array([{"score": Decimal("2.25")}, None], pa.struct([("score", money)])),
        }
    )
    pq.write_table(table, file)
    first, second = rows_of(file)
    assert (first["reward"], first["group"], first["all"], first["meta"]) == (0.5, 7, [1.1], {"score": 2.25})
    assert (second["reward"], second["group"], second["all"], second["meta"]) == (-12.0, 1200, None, None)
    assert [type(first[name]) for name in ("reward", "group")] == [float, int]
    pq.write_table(table.select(["prompt", "completion", "reward"]), file)
    assert [example.reward for example in read_examples(file)] == [0.5, -12.0]


def test_an_arrow_folder_and_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_dict({"n": [1, 2], "x": [[0.5], []]})
    one.save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one") == [{"n": 1, "x": [0.5]}, {"n": 2, "x": []}]
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert rows_of({"path": str(tmp_path / "two"), "split": "test"}) == [{"n": 2, "x": []}]
    with pytest.raises(
        DataError, match=r"found the splits train, test, expected one; write `path: \{path: .*split: train"
    ):
        rows_of(tmp_path / "two")
    with pytest.raises(DataError, match=r"found no split 'tets'; did you mean 'test'\?"):
        rows_of({"path": str(tmp_path / "two"), "split": "tets"})
    assert [str(source) for _, source in read_rows({"path": str(tmp_path / "two"), "split": "test"})] == [
        f"{tmp_path / 'two'}[test]:0"
    ]


def test_a_selected_arrow_dataset_is_read_through_its_indices(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    chosen = datasets.Dataset.from_dict({"n": list(range(10))}).select([7, 3])
    chosen.save_to_disk(tmp_path / "chosen")
    assert rows_of(tmp_path / "chosen") == [{"n": 7}, {"n": 3}]


def test_a_folder_is_its_data_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backwards = lambda folder: sorted((folder / name for name in os.listdir(folder)), reverse=True)
    monkeypatch.setattr(Path, "iterdir", backwards)  # whatever order the file system gives
    write(tmp_path / "b.jsonl", {"n": 2})
    write(tmp_path / "a.jsonl", {"n": 1})
    write(tmp_path / ".hidden.jsonl", {"n": 9})
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines({"n": 3}).encode()))
    assert rows_of(tmp_path) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert rows_of(str(tmp_path / "*.jsonl")) == [{"n": 1}, {"n": 2}]


def test_splits_in_a_folder_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "train-00.jsonl", {"n": 1})
    write(tmp_path / "train-01.jsonl", {"n": 2})
    write(tmp_path / "test.jsonl", {"n": 3})
    with pytest.raises(
        DataError, match=r"found files of the splits test, train, expected one; write `path: \{path: .*train"
    ):
        rows_of(tmp_path)
    assert rows_of({"path": str(tmp_path), "split": "train"}) == [{"n": 1}, {"n": 2}]
    with pytest.raises(DataError, match=r"found no file of the split 'trian'; did you mean 'train'\?"):
        rows_of({"path": str(tmp_path), "split": "trian"})


def test_limits_count_per_entry(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", *({"n": i} for i in range(5)))
    b = write(tmp_path / "b.jsonl", *({"n": 10 + i} for i in range(5)))
    assert rows_of([a, {"path": str(b), "limit": 1}], limit=2) == [{"n": 0}, {"n": 1}, {"n": 10}]
    assert rows_of(a, limit=9) == [{"n": i} for i in range(5)]
    assert rows_of(str(tmp_path / "*.jsonl"), limit=6) == [*({"n": i} for i in range(5)), {"n": 10}]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "found an empty list"),
        (None, "data.path: found None, expected a file, folder, glob, Hub name"),
        ("", "data.path: found ''"),
        ({"file": "a"}, "'file' is no setting"),
        ({"path": "a", "splt": "b"}, r"'splt' is no setting; did you mean 'split'\?"),
        ({"split": "train"}, "expected `path` in it"),
        ({"path": "a", "limit": 0}, "limit: found 0, expected a whole number >= 1"),
        ({"path": "a", "limit": True}, "limit: found True, expected a whole number >= 1"),
        ({"path": ["a"]}, r"path: found \['a'\], expected text"),
    ],
)
def test_path_settings_are_checked(path: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        origins(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; expected a file, folder or glob that exists"):
        rows_of(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        rows_of(str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match="found no data file in it"):
        rows_of(tmp_path)
    with pytest.raises(DataError, match="no such file or folder; expected"):
        rows_of("s3://bucket/rows")


def test_a_hub_name_is_tried_last_and_both_failures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def unreachable(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise ConnectionError("could not reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = (
        r"some-org/data: no such file or folder, and as a Hub dataset it cannot be loaded \(both were tried\): "
        "ConnectionError: could not reach the Hub"
    )
    with pytest.raises(DataError, match=message):
        rows_of({"path": "some-org/data", "name": "main", "revision": "abc"})
    assert calls == [(("some-org/data", "main"), {"revision": "abc"})]  # above all, no trust in remote code


def test_a_hub_dataset_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"n": [1]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: loaded)
    assert list(read_rows("some-org/data")) == [({"n": 1}, Source("some-org/data[train]", 0))]


def test_reading_takes_bounded_memory(tmp_path: Path) -> None:
    """20 MB of rows are read with less than 4 MB at any time."""
    import tracemalloc

    file = write(tmp_path / "rows.jsonl", *[ROW | {"completion": "x" * 10_000}] * 2_000)
    tracemalloc.start()
    count = sum(1 for _ in read_rows(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2_000
    assert peak < 4e6


VALID = [
    (lines(ROW, ROW | {"completion": "3", "reward": 0}, ROW | {"reward": -0.5}), "scored"),
    (
        lines({"prompt": "a", "completions": ["b", "c"], "rewards": [1.0, 0.25], "logprobs": [[-0.5, -1e-3], [-2.0]]}),
        "rollouts",
    ),
    (
        lines({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}),
        "messages",
    ),
    (lines({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.5, "score_rejected": 0}), "preference"),
    (lines({"prompt": "p", "completions": ["s", "t"], "labels": [True, False]}), "steps"),
    (lines({"instruction": "i", "generations": ["a", "b"], "ratings": ["4", 2]}), "ratings"),
]
PIECES = [
    b"NaN",
    b"1e999",
    b"null",
    b"true",
    b'"4"',
    b"[]",
    b"{}",
    b"-",
    b"\\ud800",
    b"\xff",
    b"\x00",
    b"\n",
    b",",
    b'"',
    b"}",
    b"\xef\xbb\xbf",
]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, str]:
    """A valid file with a few bytes replaced, removed, repeated or put in."""
    text, name = draw(st.sampled_from(VALID))
    data = text.encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 4)))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3), st.just(data[start:end] * 2)))
        data = data[:start] + piece + data[end:]
    return data, name


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, dict):
        yield from numbers_in(list(value.values()))
    elif isinstance(value, (int, float)):
        yield value


def read_mutant(path: Path, data: bytes, adapter: str) -> bool:
    """Whether the file was accepted; anything but a user error or finite rows fails."""
    path.write_bytes(data)
    try:
        examples = list(read_examples(path, adapter))
    except UserError as error:
        message = str(error)
        examples = None
    if examples is None:
        assert message.startswith((str(path), "adapter"))
        return False
    for example in examples:
        fields = [example.prompt, example.completion, example.reward, example.behavior_logp]
        fields += [[span.reward, span.start, span.end] for span in example.spans]
        assert all(math.isfinite(number) for number in numbers_in(fields))
        json.dumps([example.prompt, example.completion], ensure_ascii=False).encode("utf-8")
    return True


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_mutants_are_refused_or_finite(tmp_path_factory: pytest.TempPathFactory, case: tuple[bytes, str]) -> None:
    read_mutant(tmp_path_factory.getbasetemp() / "mutant.jsonl", *case)


@pytest.mark.slow
def test_ten_thousand_mutants_are_refused_or_finite(tmp_path: Path) -> None:
    generator = random.Random(0)
    accepted = 0
    for _ in range(10_000):
        text, name = generator.choice(VALID)
        data = bytearray(text.encode())
        for _ in range(generator.randint(1, 2)):
            at = generator.randrange(len(data))
            piece = generator.choice([generator.choice(PIECES), bytes([generator.randrange(32, 127)])])
            data[at : at + generator.randint(0, 2)] = piece
        accepted += read_mutant(tmp_path / "mutant.jsonl", bytes(data), name)
    assert 200 < accepted < 9_800  # the mutations do hit, and do miss
