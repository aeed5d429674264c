"""The state of an optimiser as tensors and plain JSON, and back, without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rwft.errors import CheckpointError, SaveError


def split_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any torch optimiser as tensors and plain JSON; `join_optimizer` brings back every bit and type.

    Tensors keep their place as their name (`state.0.exp_avg`) and are not copied; one that is
    met twice is stored once. Raises SaveError, with the place, for anything else that JSON has no word for.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def encode(node: Any, place: str) -> Any:
        if isinstance(node, Tensor):
            return {"tensor": names.get(id(node)) or keep(node, place)}
        if isinstance(node, Mapping):
            return {"dict": [[key, encode(value, f"{place}.{key}".lstrip("."))] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            items = [encode(value, f"{place}.{index}") for index, value in enumerate(node)]
            return items if isinstance(node, list) else {"tuple": items}
        if isinstance(node, float) and not math.isfinite(node):
            return {"float": repr(node)}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise SaveError(f"optimizer: {place}: found a {type(node).__name__}, expected a tensor or plain JSON")

    def keep(tensor: Tensor, place: str) -> str:
        while place in tensors:  # {"a.b": x, "a": {"b": y}}
            place += "'"
        tensors[place] = tensor.detach()
        names[id(tensor)] = place
        return place

    return tensors, encode(state_dict, "")


def join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `split_optimizer` took apart. Raises CheckpointError if the parts do not fit."""
    used: set[str] = set()

    def decode(node: Any) -> Any:
        if isinstance(node, list):
            return [decode(item) for item in node]
        if not isinstance(node, Mapping):
            return node
        ((kind, value),) = node.items()
        if kind == "tensor":
            used.add(value)
            return tensors[value]
        return {"dict": decode_dict, "tuple": decode_tuple, "float": float}[kind](value)

    def decode_dict(items: Any) -> dict[Any, Any]:
        return {key: decode(value) for key, value in items}

    def decode_tuple(items: Any) -> tuple[Any, ...]:
        return tuple(decode(item) for item in items)

    try:
        joined = decode(rest)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"optimizer: its tensors and its other state do not fit: {error!r}") from error
    if used != tensors.keys():
        raise CheckpointError(f"optimizer: nothing refers to the tensor '{min(tensors.keys() - used)}'")
    return joined
