"""JSON rows, strictly: every problem is named by file, line and column, and nothing is guessed.

A `.jsonl` (or `.ndjson`) file holds one object per line; a `.json` file that, or one array of objects.
Either may be gzipped. Text is UTF-8.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, cast

from rwft.data.example import Source
from rwft.data.ledger import Ledger

Row = dict[str, Any]
MAX_LINE = 16 * 2**20
BOM = b"\xef\xbb\xbf"
TOO_DEEP = "found nesting that is too deep, expected an object of a few levels"
WRAPPER = re.compile(rb'\s*\{\s*"(data|rows|examples|records|items|instances|train)"\s*:')
BLANK = b" \t\r\n"
NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


class Fault(Exception):
    """One problem inside a text: what it is, and the column (from 1) if it is known."""

    def __init__(self, what: str, column: int | None = None) -> None:
        super().__init__(what)
        self.column = column


def read_json(path: Path, name: str, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    """The rows of one file; problems go to the ledger, and their rows are not given."""
    before = ledger.count
    with open_plain(path) as handle:
        lines = numbered_lines(handle, name, ledger)
        first = next((item for item in lines if not _blank(item[1], ledger)), None)
        if first is None:
            if ledger.count == before:
                ledger.problem(name, "found no rows, expected at least one JSON object")
            return
        number, line = first
        if ".json" in path.suffixes and line.lstrip(BLANK).startswith(b"["):
            yield from _array(number, line, handle, name, ledger)
            return
        if ".json" in path.suffixes and (wrapped := _wrapped(line, handle)):
            ledger.problem(f"{name}:{number}", wrapped)
            return
        yield from _row(number, line, name, ledger)
        for number, line in lines:
            if not _blank(line, ledger):
                yield from _row(number, line, name, ledger)


def _wrapped(line: bytes, handle: BinaryIO) -> str | None:
    """What to do about a file that is one object around its rows; None if it is none, and nothing of it is read."""
    start = handle.tell()
    key = WRAPPER.match(line if len(line.strip(BLANK)) > 1 else line + handle.readline(MAX_LINE))
    handle.seek(start)
    name = key.group(1).decode() if key else ""
    rows = _whole(line, handle).get(name) if key else None
    handle.seek(start)
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    return (
        f"found one object with {len(rows)} rows in `{name}`, expected an array of objects, or one object per line; "
        f"write the rows alone, e.g. jq -c '.{name}[]'"
    )


def _whole(line: bytes, handle: BinaryIO) -> dict[str, Any]:
    """The one object of a file that begins with this line; an empty one if there are several, or it is broken."""
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        first = None
    try:
        return json.loads(line + handle.read()) if first is None or not handle.read(1) else {}
    except (ValueError, RecursionError):
        return {}


def open_plain(path: Path) -> BinaryIO:
    """The bytes of a file, unzipped if it is gzipped."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if zipped else path.open("rb")


def _blank(line: bytes, ledger: Ledger) -> bool:
    blank = not line.strip(BLANK)
    if blank:
        ledger.notes["blank line skipped"] += 1
    return blank


def numbered_lines(handle: BinaryIO, name: str, ledger: Ledger) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of at most MAX_LINE bytes; a longer one is a problem and is never held in memory."""
    number = 0
    try:
        while line := handle.readline(MAX_LINE + 1):
            number += 1
            if number == 1 and line.startswith(BOM):
                ledger.notes["byte-order mark skipped"] += 1
                line = line[len(BOM) :]
            if len(line) > MAX_LINE:
                ledger.problem(f"{name}:{number}", f"found a line of more than {MAX_LINE} bytes, expected at most that")
                _skip_line(handle, line)
            else:
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        ledger.problem(f"{name}:{number + 1}", f"cannot be read further: {error}; expected an intact file")


def _skip_line(handle: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = handle.readline(MAX_LINE)


def _row(number: int, line: bytes, name: str, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    try:
        row = parse_line(line)
    except Fault as fault:
        ledger.problem(f"{name}:{number}" + (f":{fault.column}" if fault.column else ""), fault)
    else:
        yield row, Source(name, number)


def parse_line(line: bytes) -> Row:
    """One line as one object; raises Fault."""
    text = decoded(line)
    try:
        return check(DECODER.decode(text), text)
    except json.JSONDecodeError as error:
        raise _syntax(error, error.pos + 1) from None
    except RecursionError:
        raise Fault(TOO_DEEP) from None
    except ValueError as error:  # a number of thousands of digits
        raise Fault(f"found a number that cannot be read ({error}), expected a finite one") from None


def decoded(data: bytes) -> str:
    """Bytes as UTF-8; raises Fault with the column of what is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        found = f"found byte 0x{data[error.start]:02x}{guess}, expected UTF-8"
        raise Fault(found, len(data[: error.start].decode("utf-8", "replace")) + 1) from None


def _syntax(error: json.JSONDecodeError, column: int) -> Fault:
    if error.msg == "Extra data":
        return Fault("found trailing data after the object, expected one JSON object per line", column)
    if error.pos >= len(error.doc.rstrip()):
        return Fault("found the end in the middle of a value, expected one complete JSON object per line", column)
    return Fault(f"not JSON: {error.msg}; expected one JSON object per line", column)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise Fault(f"{_key('', twice)}: found the key twice, expected it once")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def check(row: Any, text: str) -> Row:
    """`row` if it is an object of finite numbers and valid text; raises Fault with the path to the culprit."""
    if not isinstance(row, dict):
        found = "null" if row is None else NAMES[type(row)]
        hint = " (an array of rows belongs in a .json file)" if isinstance(row, list) else ""
        raise Fault(f"found {found} at the top level, expected an object{hint}")
    if not finite(row):
        path, value = first_leaf(row, lambda leaf: not finite(leaf))
        raise Fault(f"{path}: found {value}, expected a finite number")
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(row)
    return row


def _check_surrogates(row: Row) -> None:
    if not _encodable(json.dumps(row, ensure_ascii=False)):
        path, _ = first_leaf(row, lambda leaf: isinstance(leaf, str) and not _encodable(leaf))
        raise Fault(f"{path}: found half of a surrogate pair, expected valid Unicode text")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def finite(value: object) -> bool:
    """Whether no float anywhere in `value` is NaN or infinite."""
    if isinstance(value, float):
        return isfinite(value)
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if not isinstance(value, list) or not value:
        return True
    if type(value[0]) is float and set(map(type, value)) == {float}:  # long lists of log-probabilities
        return all(map(isfinite, value))
    return all(map(finite, value))


def first_leaf(value: object, bad: Callable[[object], bool], path: str = "") -> tuple[str, object]:
    """Path and value of the first leaf (or key) that is `bad`: `messages[1].content`; `("", None)` if none is."""
    if isinstance(value, dict):
        for key, item in value.items():
            if bad(key):
                return _key(path, key), key
            if (found := first_leaf(item, bad, _key(path, key)))[0]:
                return found
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if (found := first_leaf(item, bad, f"{path}[{index}]"))[0]:
                return found
    elif bad(value):
        return path, value
    return "", None


def _key(path: str, key: str) -> str:
    shown = key if key.isprintable() and _encodable(key) and key else repr(key)
    return f"{path}.{shown}" if path else shown


def _array(number: int, line: bytes, handle: BinaryIO, name: str, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    """The objects of one JSON array that starts in line `number`; each is placed by line and column."""
    try:
        text = decoded(line + handle.read())
    except Fault as fault:
        ledger.problem(f"{name}:{number}", fault)
        return
    except (OSError, EOFError, zlib.error) as error:
        ledger.problem(f"{name}:{number}", f"cannot be read further: {error}; expected an intact file")
        return
    place = _Place(text, number)
    try:
        for position, row in _items(text):
            line_number, column = place.of(position)
            if isinstance(row, Fault):
                ledger.problem(f"{name}:{line_number}:{column}", row)
            else:
                yield row, Source(name, line_number, column)
    except _Broken as broken:
        line_number, column = place.of(broken.position)
        ledger.problem(f"{name}:{line_number}:{column}", broken)


class _Place:
    """Line and column (from 1) of ever later positions in a text whose first line has number `first`."""

    def __init__(self, text: str, first: int) -> None:
        self.text, self.line, self.seen = text, first, 0

    def of(self, position: int) -> tuple[int, int]:
        self.line += self.text.count("\n", self.seen, position)
        self.seen = position
        return self.line, position - self.text.rfind("\n", 0, position)


class _Broken(Exception):
    """The array itself is broken at `position`; nothing after it can be read."""

    def __init__(self, what: str, position: int) -> None:
        super().__init__(what)
        self.position = position


def _items(text: str) -> Iterator[tuple[int, Row | Fault]]:
    """Position and object of each item of a JSON array, or what is wrong with it."""
    position = _skip(text, text.index("[") + 1)
    if text[position : position + 1] == "]":
        raise _Broken("found no rows, expected at least one JSON object", position)
    while True:
        start, (item, position) = position, _item(text, position)
        yield start, item
        position = _skip(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            found = repr(mark) if mark else "the end of the file"
            raise _Broken(f"not JSON: found {found}, expected ',' or ']' after an item of the array", position)
        position = _skip(text, position + 1)
    if text[position + 1 :].strip(" \t\r\n"):
        raise _Broken("found trailing data, expected nothing after the array", _skip(text, position + 1))


def _item(text: str, start: int) -> tuple[Row | Fault, int]:
    try:
        value, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _Broken(f"not JSON: {error.msg}; expected an object in the array", error.pos) from None
    except Fault as fault:  # a key twice: the item can still be skipped
        return fault, json.JSONDecoder().raw_decode(text, start)[1]
    except RecursionError:
        raise _Broken(TOO_DEEP, start) from None
    except ValueError as error:
        raise _Broken(f"found a number that cannot be read ({error}), expected a finite one", start) from None
    try:
        return check(value, text[start:end]), end
    except Fault as fault:
        return fault, end
    except RecursionError:
        return Fault(TOO_DEEP), end


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
