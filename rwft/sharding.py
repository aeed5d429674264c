"""Tensors that are spread over ranks: whole for a checkpoint or an export, and back into their pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwft.zero import place_parameter, whole_parameter


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, detached, on the CPU if it was spread. All ranks must ask for it together."""
    from torch.distributed.tensor import DTensor

    if hasattr(tensor, "ds_id"):  # DeepSpeed's mark on a parameter that it has spread
        return whole_parameter(tensor)
    tensor = tensor.detach()
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with every tensor whole; tied ones stay one tensor."""
    state = module.state_dict(keep_vars=True)
    found = {id(value): whole(value) for value in {id(value): value for value in state.values()}.values()}
    return {name: found[id(value)] for name, value in state.items()}


def spread(full: Tensor, like: Tensor) -> Tensor:
    """`full` laid out over ranks as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def place(full: Tensor, parameter: nn.Parameter) -> None:
    """Give a parameter its values, however it lies over ranks. All ranks must do it together."""
    if hasattr(parameter, "ds_id"):
        place_parameter(full, parameter)
    else:
        with torch.no_grad():
            parameter.copy_(spread(full, parameter))


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
