"""One copy of a prompt for all its completions in a micro-batch.

The trunk holds each distinct prompt once, up to the input that predicts the first trained
target; the branches hold what follows in each row. Branches continue the keys and values of
their trunk, which is what generation does, with gradients: hidden states and gradients are
those of separate rows. For a group of G completions of length C behind a prompt of length P
that is P + GC inputs instead of G (P + C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor

from rwft.errors import PolicyError

SAFETY = 1.15  # how much cheaper sharing must be, by count, before it is used: a count is no clock
PAIR_COST = 1.5  # a multiplication in attention takes as long as so many in a linear layer
FAMILIES = frozenset(
    {"cohere", "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3"}
    | {"smollm3", "stablelm", "starcoder2"}
)
"""Model types for which sharing was proven; what they keep of a prompt is keys and values alone."""


@dataclass(frozen=True)
class Shared:
    """`d` prompts, padded on the right to `p`, and `b` rows behind them, padded on the right to `c`; int64.

    `trained (n)`: where the hidden states of the trained targets are, in the order of rows, in the
    trunk's `(d p)` followed by the branches' `(b c)`, both flat.
    """

    trunk: Tensor  # (d p), ids
    length: Tensor  # (d), of each prompt
    branches: Tensor  # (b c), ids
    prompt: Tensor  # (b), which prompt
    trained: Tensor  # (n)
    padded: bool  # whether any prompt has padding behind it
    each: int = 0  # how many rows each prompt has, if all have as many and rows come in the order of prompts

    def to(self, device: torch.device) -> Shared:
        """The same on another device."""
        tensors = (self.trunk, self.length, self.branches, self.prompt, self.trained)
        return Shared(*(tensor.to(device, non_blocking=True) for tensor in tensors), padded=self.padded, each=self.each)

    def hidden(self, base_model: Any) -> Tensor:
        """`(n h)`: last hidden states of a Hugging Face base model at the trained targets."""
        p, c = self.trunk.shape[1], self.branches.shape[1]
        out = base_model(input_ids=self.trunk, use_cache=c > 0)
        states = [rearrange(out.last_hidden_state, "d p h -> (d p) h")]
        if c > 0:
            places = torch.arange(p + c, device=self.trunk.device)
            length = self.length[self.prompt, None]  # (b 1)
            out = base_model(
                input_ids=self.branches,
                position_ids=length + places[:c],
                attention_mask=((places < length) | (places >= p)).long() if self.padded else None,  # (b p+c)
                past_key_values=self._continued(out.past_key_values),
                use_cache=True,
            )
            states.append(rearrange(out.last_hidden_state, "b c h -> (b c) h"))
        return torch.cat(states)[self.trained]

    def _continued(self, cache: Any) -> Any:
        """Keys and values of each row's prompt; gradients of rows add up in their prompt's."""
        for layer in cache.layers:
            layer.keys, layer.values = map(self._of_rows, (layer.keys, layer.values))
        return cache

    def _of_rows(self, x: Tensor) -> Tensor:
        """`(d ...) -> (b ...)`; the gradient of the regular case is a sum, that of the other a slower scatter."""
        if self.each:
            return repeat(x, "d ... -> (d each) ...", each=self.each)
        return x.index_select(0, self.prompt)


class Branch(NamedTuple):
    """One row: which prompt, its inputs behind it, and which targets from the first trained one on are trained."""

    prompt: int
    ids: Sequence[int]
    mask: NDArray[np.bool_]


def divide(ids: Sequence[Sequence[int]], mask: Sequence[Sequence[float]]) -> tuple[list[tuple[int, ...]], list[Branch]]:
    """Rows of `t+1` ids and `t` mask values -> distinct prompts and branches; untrained rows and ends are left out."""
    prompts: dict[tuple[int, ...], int] = {}
    branches: list[Branch] = []
    for tokens, wanted in zip(ids, mask, strict=True):
        trained = np.asarray(wanted) > 0
        places = np.flatnonzero(trained)
        if len(places):
            first, last = int(places[0]), int(places[-1])
            prompt = prompts.setdefault(tuple(tokens[: first + 1]), len(prompts))
            branches.append(Branch(prompt, tokens[first + 1 : last + 1], trained[first : last + 1]))
    return list(prompts), branches


def lay_out(prompts: Sequence[tuple[int, ...]], branches: Sequence[Branch]) -> Shared:
    """Prompts and branches as tensors."""
    p, c = max(map(len, prompts)), max(len(branch.ids) for branch in branches)
    trunk, rest = np.zeros((len(prompts), p), dtype=np.int64), np.zeros((len(branches), c), dtype=np.int64)
    length = np.array(list(map(len, prompts)), dtype=np.int64)
    for index, prompt in enumerate(prompts):
        trunk[index, : len(prompt)] = prompt
    trained: list[NDArray[np.int64]] = []
    for index, branch in enumerate(branches):
        rest[index, : len(branch.ids)] = branch.ids
        root, behind = branch.prompt * p + length[branch.prompt] - 1, trunk.size + index * c
        trained.append(np.append(root, behind + np.arange(len(branch.ids)))[branch.mask])
    prompt, each = np.array([branch.prompt for branch in branches]), len(branches) // len(prompts)
    regular = np.array_equal(prompt, np.arange(len(prompts)).repeat(each))
    arrays = (trunk, length, rest, prompt, np.concatenate(trained))
    tensors = map(torch.from_numpy, arrays)
    return Shared(*tensors, padded=bool((length < p).any()), each=each if regular else 0)


@dataclass(frozen=True)
class Sharing:
    """Rows of a micro-batch -> `Shared` where that costs less, by multiplications counted for this model; else None.

    `position` counts those of the trunk of the model for one input, `pair` those of attention for
    one query and key. With `always`, prompts are shared wherever two rows have the same one.
    """

    position: float
    pair: float
    always: bool = False

    def __call__(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[float]]) -> Shared | None:
        prompts, branches = divide(ids, mask)
        if len(prompts) == len(branches):
            return None
        if not self.always:
            p, c = max(map(len, prompts)), max(len(branch.ids) for branch in branches)
            if self.shared(len(prompts), p, len(branches), c) * SAFETY > self.separate(len(mask), max(map(len, mask))):
                return None
        return lay_out(prompts, branches)

    def separate(self, b: int, t: int) -> float:
        """`b` rows padded to `t`, under a causal mask, of which kernels skip the upper half."""
        return b * t * (self.position + 0.5 * t * self.pair * PAIR_COST)

    def shared(self, d: int, p: int, b: int, c: int) -> float:
        """`d` prompts padded to `p`, then `b` branches padded to `c` that see prompt and branch."""
        return self.separate(d, p) + b * c * (self.position + (p + c) * self.pair * PAIR_COST)


def sharing(mode: str, models: Sequence[Any], *, spread: bool = False) -> Sharing | None:
    """What `data.share_prompts: auto | always | never` means for Hugging Face causal LMs that see the same batches.

    None where prompts are not shared. The first model decides what is cheaper. `spread` tells that
    weights are spread over ranks. Under `auto` float64 models, which are for checking, keep rows
    apart: norms round to float32 inside, so the order of sums would show. Raises PolicyError
    under `always` for a model for which sharing was not proven.
    """
    reason = next(filter(None, map(refusal, models)), None)
    if spread:  # gathering weights is a collective of each pass through the layers
        reason = "weights are spread over ranks, which must all pass through the layers equally often"
    if mode == "always" and reason is not None:
        raise PolicyError(f"data.share_prompts: always, but {reason}; use auto or never")
    if mode == "never" or reason is not None or (mode == "auto" and models[0].dtype == torch.float64):
        return None
    return cost_model(models[0], always=mode == "always")


def cost_model(model: Any, *, always: bool = False) -> Sharing:
    """Multiplications in a model's trunk, by its parameters and attention heads."""
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tables = {id(m.weight) for m in model.base_model.modules() if isinstance(m, torch.nn.Embedding)}
    weights = sum(p.numel() for p in model.base_model.parameters() if p.ndim == 2 and id(p) not in tables)
    return Sharing(position=weights, pair=2 * config.num_hidden_layers * width, always=always)


def refusal(model: Any) -> str | None:
    """Why rows of this model cannot share a prompt, or None."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"it was not proven for model type '{config.model_type}'"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"it was not proven for attention '{config._attn_implementation}', but for sdpa and eager"
    if (scaled := scaled_places(config)) is not None:
        return scaled
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return "the model's attention slides over a window, which counts padding"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "model.gradient_checkpointing keeps no keys and values"
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return "it was not proven for model.compile"
    return None


def scaled_places(config: Any) -> str | None:
    """That a row's positions depend on the other rows of its batch, or None."""
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for settings in (rope, *(of_kind for of_kind in rope.values() if isinstance(of_kind, dict))):  # one a kind of layer
        if settings.get("rope_type") in ("dynamic", "longrope"):
            return f"the model's positions are scaled by the length of the batch ({settings['rope_type']})"
    return None
