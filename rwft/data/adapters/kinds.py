"""What columns hold, in the words that the column types of `contract` use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rwft.data.adapters.contract import Row

Kinds = frozenset[str]
UNKNOWN: Kinds = frozenset()
MARKER = "ки"
CONTAINERS = {
    "text": "texts",
    "boolean": "booleans",
    "number": "numbers",
    "whole number": "whole numbers",
    "mapping": "mappings",
    "messages": "conversations",
    "numbers": "lists of numbers",
    "whole numbers": "lists of whole numbers",
}


def kinds(value: Any) -> Kinds:
    """All that a value is; nothing is known of null and of what is empty."""
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, (int, float)):
        return frozenset({"number", "whole number"} if isinstance(value, int) else {"number"})
    if isinstance(value, str):
        return frozenset({"text", "marked text"} if MARKER in value else {"text"})
    if isinstance(value, Mapping):
        return frozenset({"mapping"})
    return _list(value) if isinstance(value, list) else UNKNOWN


def _list(values: list[Any]) -> Kinds:
    inside = shared(kinds(value) for value in values)
    out = {CONTAINERS[kind] for kind in inside if kind in CONTAINERS}
    if "mapping" in inside:
        known = [value for value in values if value is not None]
        out |= {"messages"} if all("role" in value for value in known) else set()
        out |= {"turns"} if all("from" in value and "value" in value for value in known) else set()
    if any(isinstance(value, list) for value in values):
        out.add("lists")
    if values and all(kinds(value) <= {"text", "number", "whole number"} for value in values):
        out.add("numbers or texts")
    return frozenset(out)


def shared(all_kinds: Iterable[Kinds]) -> Kinds:
    """What everything is of which something is known."""
    known = [k for k in set(all_kinds) if k]
    return frozenset.intersection(*known) if known else UNKNOWN


def column_kinds(rows: Iterable[Row]) -> dict[str, Kinds | None]:
    """Column -> what it holds in all rows; None for a column that is always null or empty."""
    seen: dict[str, set[Kinds]] = {}
    for row in rows:
        for name, value in row.items():
            seen.setdefault(name, set()).add(kinds(value))
    return {name: shared(found) if any(found) else None for name, found in seen.items()}
