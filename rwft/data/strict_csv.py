"""CSV and TSV rows, strictly: a header, as many fields in every row, and one type for every column.

A cell is text, so what a column holds is read off the whole of it: numbers, if every cell is one, or true and false.
Columns that go by the name of a text, such as `prompt`, stay text. An empty cell is null.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from rwft.data.example import Source
from rwft.data.ledger import Ledger
from rwft.data.strict_json import MAX_LINE, Fault, Row, decoded, numbered_lines, open_plain

TEXTS = re.compile(
    r"prompt|question|instruction|quer(y|ies)|problem|input|context|completion|response|answer|output|solution|"
    r"generation|chosen|rejected|preferred|system|text|content|message",
    re.IGNORECASE,
)
NUMBERS = re.compile(
    r"reward|score|rating|label|rank|weight|length|tokens|count|correct|success|passed|accepted|(^|_)id$", re.IGNORECASE
)
WHOLE = re.compile(r"[-+]?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
TRUTH = re.compile(r"true|false", re.IGNORECASE)
PATTERNS = {"whole": WHOLE, "number": NUMBER, "truth": TRUTH}


def read_csv(path: Path, name: str, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    """The rows of one file by the names of its header; problems go to the ledger, and their rows are not given."""
    before = ledger.count
    columns, types = _types(path, name)
    rows = 0
    for line, cells in _records(path, name, ledger):
        if not rows:
            _check_header(cells, name, line, ledger)
            if ledger.count > before:
                return
        elif len(cells) != len(columns):
            found = f"found {len(cells)} fields, expected {len(columns)}, as many as the header has"
            ledger.problem(f"{name}:{line}", found)
        else:
            row = {c: READ[t](cell) if cell else None for c, t, cell in zip(columns, types, cells, strict=True)}
            bad = next((c for c, value in row.items() if isinstance(value, float) and not isfinite(value)), None)
            if bad is None:
                yield row, Source(name, line)
            else:
                ledger.problem(f"{name}:{line}", f"{bad}: found {row[bad]}, expected a finite number")
        rows += 1
    if rows < 2 and ledger.count == before:
        ledger.problem(name, "found no rows, expected a header and at least one row")


def _types(path: Path, name: str) -> tuple[list[str], list[str]]:
    """The columns, and of each the narrowest type that all its cells have, as a first reading of the file shows."""
    columns: list[str] = []
    left: list[dict[str, re.Pattern[str]]] = []
    for _, cells in _records(path, name, Ledger()):
        if not columns:
            columns = cells
            left = [{} if _is_text(column) else dict(PATTERNS) for column in cells]
        elif len(cells) == len(columns):
            for i, cell in enumerate(cells):
                if cell and left[i]:
                    left[i] = {kind: pattern for kind, pattern in left[i].items() if pattern.fullmatch(cell)}
    rest = ["mixed" if NUMBERS.search(column) else "text" for column in columns]
    return columns, [next(iter(kinds), other) for kinds, other in zip(left, rest, strict=True)]


def _mixed(cell: str) -> Any:
    """A cell by itself, of a column that its name says is of numbers but not all cells are: those are found later."""
    return READ[next((kind for kind, pattern in PATTERNS.items() if pattern.fullmatch(cell)), "text")](cell)


def _is_text(column: str) -> bool:
    return TEXTS.search(column) is not None and NUMBERS.search(column) is None


READ: dict[str, Callable[[str], Any]] = {
    "whole": int,
    "number": float,
    "truth": lambda cell: cell.lower() == "true",
    "mixed": _mixed,
    "text": str,
}


def _check_header(cells: list[str], name: str, line: int, ledger: Ledger) -> None:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if "" in cells:
        ledger.problem(f"{name}:{line}", f"found no name for column {cells.index('') + 1} of the header, expected one")
    elif twice:
        ledger.problem(f"{name}:{line}", f"{twice[0]}: found the column twice, expected it once")
    elif len(cells) == 1 and any(mark in cells[0] for mark in ";\t|"):
        expected = "tabs between them" if _delimiter(name) == "\t" else "commas between them (a .tsv file has tabs)"
        ledger.problem(
            f"{name}:{line}", f"found the header {cells[0]!r}, expected the names of columns with {expected}"
        )


def _delimiter(name: str) -> str:
    return "\t" if name.removesuffix(".gz").endswith(".tsv") else ","


def _records(path: Path, name: str, ledger: Ledger) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record and the line that it begins in; the first record is the header."""
    csv.field_size_limit(MAX_LINE)
    with open_plain(path) as handle:
        lines = _Lines(numbered_lines(handle, name, ledger))
        reader = csv.reader(lines, delimiter=_delimiter(name), strict=True)
        while True:
            start = lines.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                ledger.problem(f"{name}:{start}", f"not CSV: {error}; expected quotes in pairs, doubled within a field")
                return
            except Fault as fault:
                ledger.problem(f"{name}:{lines.number}" + (f":{fault.column}" if fault.column else ""), fault)
                return
            if cells is None:
                return
            if cells:
                yield start, cells
            else:
                ledger.notes["blank line skipped"] += 1


class _Lines:
    """Lines as text, and the number of the last one."""

    def __init__(self, lines: Iterable[tuple[int, bytes]]) -> None:
        self.lines, self.number = lines, 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self.lines:
            self.number = number
            yield decoded(line)
