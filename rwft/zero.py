"""DeepSpeed's ZeRO as the loop uses an engine: gradients over ranks, a step that may be refused, whole states.

DeepSpeed divides, reduces and updates. The loop decides what is summed, by what a gradient is divided,
where it is clipped, and whether a step is taken at all: so the engine is driven by hand, without its own
accumulation, clipping and loss scale. Nothing of DeepSpeed is imported unless the launcher asked for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rwft.config import Config
from rwft.errors import ConfigError, UserError

STAGES = (2, 3)
MOMENTS = ("exp_avg", "exp_avg_sq")
ELSEWHERE = {
    "optimizer": "train.lr and its neighbours",
    "scheduler": "train.schedule",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "torch_autocast": "model.dtype",
}
"""Parts of a DeepSpeed file that the run has settings of its own for."""


def check_asked() -> None:
    """Raises UserError if the launcher asks for DeepSpeed where there is none."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    if find_spec("deepspeed") is None:
        raise UserError("the launcher asks for DeepSpeed, which is not installed; pip install 'rwft[deepspeed]'")
    if not torch.cuda.is_available():
        raise UserError("the launcher asks for DeepSpeed, which Accelerate runs on GPUs, and none was found; use DDP")


def drives(accelerator: Any) -> bool:
    """Whether DeepSpeed is the engine."""
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def stage(accelerator: Any) -> int:
    """What is divided over ranks: 2 gradients and moments, 3 weights too."""
    return int(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


def refuse(config: Config, accelerator: Any) -> None:
    """Raises ConfigError for what was not proven, and for settings of DeepSpeed's that the run has itself.

    Called before a model is loaded, and lets transformers load it whole.
    """
    settings = accelerator.deepspeed_plugin.deepspeed_config
    zero = settings.get("zero_optimization") or {}
    if zero.get("stage") not in STAGES:
        raise ConfigError(f"DeepSpeed: found ZeRO stage {zero.get('stage')}, expected 2 or 3 (or DDP instead of 0)")
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device") or "none"
        if str(device) != "none":
            raise ConfigError(f"DeepSpeed: {part} to '{device}' was not proven; leave it out")
    for key in (key for key, value in zero.items() if "quantized" in key and value):
        raise ConfigError(f"DeepSpeed: {key} was not proven; leave it out")
    for key, value in batches(config, accelerator.num_processes).items():
        if settings.get(key, "auto") not in ("auto", value):
            raise ConfigError(f"DeepSpeed: {key}: found {settings[key]}, but the run's own settings say {value}")
    for key, ours in ELSEWHERE.items():
        part = settings.get(key) or {}
        if part.get("enabled", "type" in part):
            raise ConfigError(f"DeepSpeed: '{key}' is set; leave it out, the run has {ours}")
    if config.model.dtype == "float64":
        raise ConfigError("model.dtype: float64 would be cast to float32 by DeepSpeed; use DDP")
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else stage 3 would spread the model as it is loaded, and frozen ones too


def batches(config: Config, ranks: int) -> dict[str, float]:
    """What DeepSpeed wants to know of batches. The loop accumulates and clips, so that DeepSpeed does not."""
    size = config.train.batch_size
    return {
        "train_micro_batch_size_per_gpu": size,
        "train_batch_size": size * ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }


def partitioning() -> Any:
    """DeepSpeed's functions for parameters that are spread over ranks."""
    return import_module("deepspeed.runtime.zero")


def states() -> Any:
    """DeepSpeed's functions for the optimiser's state of a parameter."""
    return import_module("deepspeed.utils")


def prepare(config: Config, accelerator: Any, policy: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Zero]:
    """`policy` under DeepSpeed, its weights spread over ranks in stage 3, and its optimiser."""
    accelerator.deepspeed_plugin.deepspeed_config.update(batches(config, accelerator.num_processes))
    parameters = list(policy.trained_parameters().values())
    engine, _ = accelerator.prepare(policy, optimizer)
    return engine, Zero(engine, parameters)


class Zero:
    """The optimiser of a ZeRO engine in the place of torch's. Of a gradient, each rank holds its pieces."""

    def __init__(self, engine: Any, parameters: list[nn.Parameter]) -> None:
        self.engine, self.inner, self.parameters = engine, engine.optimizer, parameters

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def accumulate(self, last: bool) -> None:
        """Before a micro-batch: whether the step's gradient is complete after it."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch, its mean over ranks."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def pieces(self) -> list[Tensor]:
        """This rank's pieces of the finished gradient, in place; none between steps."""
        groups = self.inner.averaged_gradients.values()
        return [piece for group in groups if group is not None for piece in group]

    def clip(self, denominator: float, limit: float, accelerator: Any) -> float:
        """Divide the finished gradient, clip it, and give back its norm before clipping."""
        pieces = self.pieces()
        mine = torch.nn.utils.get_total_norm(pieces).to(accelerator.device, torch.float64)
        norm = float(accelerator.reduce(mine.square(), "sum").sqrt()) / denominator
        factor = min(1.0, limit / (norm + 1e-6)) / denominator
        if factor != 1.0:
            for piece in pieces:
                piece.mul_(factor)
        return norm

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop a gradient that no step has used: ZeRO leaves out a step whose gradient is not finite, and clears up."""
        pieces = self.pieces()
        for piece in pieces:
            piece.fill_(float("nan"))
        if pieces:
            self.engine.step()

    def state_dict(self) -> dict[str, Any]:
        """The state that torch's optimiser would have on one process. All ranks must ask for it together."""
        whole = states().safe_get_full_optimizer_state
        (group,) = self.param_groups
        settings = {key: value for key, value in group.items() if key != "params"}
        steps = [entry["step"] for entry in self.inner.state.values() if "step" in entry]
        state = {
            index: {"step": steps[0].to("cpu", copy=True), **{name: whole(p, name).cpu() for name in MOMENTS}}
            for index, p in enumerate(self.parameters if steps else [])
        }
        return {"state": state, "param_groups": [{**settings, "params": list(range(len(self.parameters)))}]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse, once the parameters are those of the checkpoint."""
        self.inner.refresh_fp32_params()
        (saved,), (group,) = state["param_groups"], self.param_groups
        group.update({key: value for key, value in saved.items() if key != "params"})
        if not state["state"]:
            return
        self._make_moments(state["state"][0]["step"])
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                self._set_moment(state["state"][index][name], parameter, name)

    def _make_moments(self, step: Tensor) -> None:
        """Moments of zero for what torch's optimiser moves in the place of parameters: flat pieces of them."""
        spread = self.engine.zero_optimization_stage() == 3
        flats = self.inner.fp32_partitioned_groups_flat if spread else self.inner.single_partition_of_fp32_groups
        for flat in flats:
            zeros = {name: torch.zeros_like(flat) for name in MOMENTS}
            self.inner.state[flat] = {"step": step.to(flat.device, copy=True), **zeros}
        if not spread:
            for group, flat in zip(self.inner.bit16_groups, flats, strict=True):
                states().lazy_init_hp_params_optimizer_state(group, flat, self.inner.state)

    def _set_moment(self, full: Tensor, parameter: nn.Parameter, name: str) -> None:
        if hasattr(parameter, "ds_tensor"):  # whose last piece is padded, of which the other function knows nothing
            states().safe_set_local_optimizer_state(parameter, own_piece(full, parameter), name)
        else:
            states().safe_set_full_optimizer_state(parameter, full, name)


def own_piece(full: Tensor, parameter: Any) -> Tensor:
    """`(...) -> (n)`: this rank's share of a parameter's tensor in stage 3, padded with zeros to the size of all."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    piece = full.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))


def whole_parameter(parameter: Any) -> Tensor:
    """A parameter of stage 3, whole, on the CPU. All ranks must ask for it together."""
    with partitioning().GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True)


def place_parameter(full: Tensor, parameter: Any) -> None:
    """Give a parameter of stage 3 the values that the first rank has. All ranks must do it together."""
    with torch.no_grad(), partitioning().GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(full)
