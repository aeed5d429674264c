"""Rows from files, strictly: JSONL, JSON arrays, CSV, TSV, Parquet, Arrow folders, datasets of the Hub.

Where a row came from travels with it. Numbers that are not finite are refused wherever they
stand. No code is ever run from data.
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from rwft.data.example import Source
from rwft.data.ledger import Ledger
from rwft.data.strict_csv import read_csv
from rwft.data.strict_json import Row, finite, first_leaf, read_json
from rwft.errors import ConfigError, DataError, did_you_mean

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, ".parquet")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SPLIT = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?:ing)?(?=[-_.]|$)")
BATCH = 1000


@dataclass(frozen=True)
class Origin:
    """One entry of `data.path`: where to look, and how much of it is wanted."""

    path: str
    split: str | None = None  # of a Hub dataset, an Arrow folder or a folder of files
    name: str | None = None  # of a Hub dataset's configuration
    revision: str | None = None  # of a Hub dataset: a commit
    limit: int | None = None  # rows


def read_rows(path: Any, *, limit: int | None = None, report: str | Path | None = None) -> Iterator[tuple[Row, Source]]:
    """Rows with their sources, from a file, folder, glob, Hub name, a mapping `{path, split, limit, ...}` or a list.

    `limit` is per entry of the list. At the first problem rows stop coming; the rest is only checked. Then
    BadRows is raised, which names `file:line[:col]: field: found, expected` of the first few problems and holds
    them all; `report` is a file to write them to.
    """
    ledger = Ledger()
    for row, source in scan(path, ledger, limit):
        if not ledger.count:
            yield row, source
    ledger.settle(report)


def scan(path: Any, ledger: Ledger, limit: int | None = None) -> Iterator[tuple[Row, Source]]:
    """All rows that can be read; what cannot is noted in the ledger."""
    for origin in origins(path):
        rows = itertools.chain.from_iterable(_tables(origin, ledger))
        for row, source in itertools.islice(rows, origin.limit if origin.limit is not None else limit):
            ledger.rows += 1
            yield row, source


def origins(path: Any) -> list[Origin]:
    """The entries of a `data.path` setting, checked; raises ConfigError."""
    if isinstance(path, (list, tuple)):
        if not path:
            raise ConfigError("data.path: found an empty list, expected at least one file, folder, glob or Hub name")
        return [origin for item in path for origin in origins(item)]
    if isinstance(path, (str, Path)) and str(path):
        return [Origin(str(path))]
    if not isinstance(path, Mapping):
        raise ConfigError(f"data.path: found {path!r}, expected a file, folder, glob, Hub name, or a list of them")
    return [_mapped(path)]


def local_files(path: Any) -> list[Path] | None:
    """Every file that `path` names, in the order of reading; None if some of it is not local."""
    out: list[Path] = []
    for origin in origins(path):
        place = Path(origin.path).expanduser()
        if place.is_file():
            out.append(place)
        elif place.is_dir():
            out += (
                sorted(file for file in place.rglob("*") if file.is_file())
                if _is_arrow(place)
                else _folder(place, origin.split)
            )
        elif glob.has_magic(origin.path):
            out += _matches(str(place))
        else:
            return None
    return out


def _mapped(given: Mapping[Any, Any]) -> Origin:
    known = Origin.__dataclass_fields__
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"data.path: '{key}' is no setting; {did_you_mean(str(key), known)}")
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not (whole if key == "limit" else isinstance(value, str)):
            expected = "a whole number >= 1" if key == "limit" else "text"
            raise ConfigError(f"data.path: {key}: found {value!r}, expected {expected}")
    if not given.get("path"):
        raise ConfigError(f"data.path: found {dict(given)!r}, expected `path` in it, such as {{path: rows.jsonl}}")
    return Origin(**given)


def _tables(origin: Origin, ledger: Ledger) -> Iterator[Iterator[tuple[Row, Source]]]:
    """The tables of one origin, in order, each read when its turn comes."""
    path = Path(origin.path).expanduser()
    if path.is_file():
        yield _file(path, ledger)
    elif path.is_dir() and _is_arrow(path):
        yield _arrow_folder(path, origin, ledger)
    elif path.is_dir():
        yield from (_file(file, ledger) for file in _folder(path, origin.split))
    elif glob.has_magic(origin.path):
        yield from (_file(file, ledger) for file in _matches(str(path)))
    else:
        yield _hub(origin, ledger)


def _matches(pattern: str) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not files:
        raise DataError(f"{pattern}: no file matches, expected at least one ({', '.join(SUFFIXES)})")
    return files


def _folder(folder: Path, split: str | None) -> list[Path]:
    """The data files directly in a folder; those of one split if they are named by split."""
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and not file.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: found no data file in it, expected {', '.join(SUFFIXES)} or a saved Arrow dataset")
    splits = {file: _split_of(file) for file in files}
    named = sorted({name for name in splits.values() if name})
    if split is None and len(named) > 1:
        raise DataError(
            f"{folder}: found files of the splits {', '.join(named)}, expected one; "
            f"write `path: {{path: {folder}, split: {named[-1]}}}`, or name the files"
        )
    chosen = files if split is None else [file for file in files if splits[file] == split]
    if not chosen:
        raise DataError(f"{folder}: found no file of the split '{split}'; {did_you_mean(split or '', named)}")
    return chosen


def _split_of(file: Path) -> str | None:
    found = SPLIT.search(file.name)
    return found.group(1) if found else None


def _file(path: Path, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: found a file of unknown format, expected a name ending in {', '.join(SUFFIXES)}")
    read = _parquet if path.name.endswith(".parquet") else read_csv if path.name.endswith(CSV_SUFFIXES) else read_json
    try:
        yield from read(path, str(path), ledger)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _parquet(path: Path, name: str, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise DataError(f"{name}: {twice[0]}: found the column twice, expected it once")
            yield from _records(file.iter_batches(batch_size=BATCH), name, ledger)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _records(batches: Iterable[Any], name: str, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    """Rows of Arrow batches as plain values, numbered from 0."""
    row = 0
    for batch in batches:
        for record in _plain(batch, name, row):
            if finite(record):
                yield record, Source(name, row)
            else:
                path, value = first_leaf(record, lambda leaf: not finite(leaf))
                ledger.problem(f"{name}:{row}", f"{path}: found {value}, expected a finite number")
            row += 1
    if not row:
        ledger.problem(name, "found no rows, expected at least one")


def _plain(batch: Any, name: str, row: int) -> list[Row]:
    try:
        rows = batch.to_pylist()
        return [_without_decimals(row) for row in rows] if "decimal" in str(batch.schema) else rows
    except (ValueError, OverflowError) as error:  # invalid UTF-8, dates that Python cannot hold
        raise DataError(f"{name}:{row}: found a value that cannot be read from this row on: {error}") from error


def _without_decimals(value: Any) -> Any:
    """Decimals, as databases write numbers, as whole numbers if they have no places, else as the nearest float."""
    if isinstance(value, Decimal):
        return float(value) if cast(int, value.as_tuple().exponent) < 0 else int(value)
    if isinstance(value, list):
        return [_without_decimals(item) for item in value]
    return {key: _without_decimals(item) for key, item in value.items()} if isinstance(value, dict) else value


def _is_arrow(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _arrow_folder(folder: Path, origin: Origin, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    import datasets

    context = f"{folder}: cannot be read as a saved Arrow dataset"
    loaded = _attempt(lambda: datasets.load_from_disk(str(folder)), context)
    yield from _dataset(loaded, str(folder), origin, ledger)


def _hub(origin: Origin, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    """A dataset of the Hub, its files read as data only. Raises DataError if it cannot be had."""
    missing = f"{origin.path}: no such file or folder"
    if origin.path.endswith(SUFFIXES) or not HUB_NAME.fullmatch(origin.path):
        raise DataError(f"{missing}; expected a file, folder or glob that exists, or a Hub name such as org/dataset")
    import datasets

    loaded = _attempt(
        lambda: datasets.load_dataset(origin.path, origin.name, revision=origin.revision),
        f"{missing}, and as a Hub dataset it cannot be loaded (both were tried)",
    )
    yield from _dataset(loaded, origin.path, origin, ledger)


def _attempt(load: Callable[[], Any], context: str) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises whatever its storage or network layer does
        reason = " ".join(str(error).split())
        raise DataError(f"{context}: {type(error).__name__}: {reason}") from error


def _dataset(loaded: Any, name: str, origin: Origin, ledger: Ledger) -> Iterator[tuple[Row, Source]]:
    """Rows of one split of a Hugging Face dataset, without any decoding of its own."""
    if isinstance(loaded, Mapping):
        split = origin.split or (next(iter(loaded)) if len(loaded) == 1 else None)
        if split is None:
            line = f"path: {{path: {name}, split: {next(iter(loaded))}}}"
            raise DataError(f"{name}: found the splits {', '.join(loaded)}, expected one; write `{line}`")
        if split not in loaded:
            raise DataError(f"{name}: found no split '{split}'; {did_you_mean(split, loaded)}")
        loaded, name = loaded[split], f"{name}[{split}]"
    yield from _records(loaded.with_format("arrow").iter(batch_size=BATCH), name, ledger)
