"""Tensors that are spread over ranks: whole for a checkpoint or an export, and back into their pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, detached, on the CPU if it was spread. All ranks must ask for it together."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def spread(full: Tensor, like: Tensor) -> Tensor:
    """`full` laid out over ranks as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def whole_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict with every tensor whole."""
    per_parameter = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": per_parameter}


def spread_optimizer(state: Mapping[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The reverse of `whole_optimizer`: what has its parameter's shape is laid out as its parameter is."""
    per_parameter = {
        index: {
            name: spread(value, parameters[index])
            if torch.is_tensor(value) and value.shape == parameters[index].shape
            else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": per_parameter}
