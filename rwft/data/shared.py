"""One copy of a prompt for all its completions in a micro-batch: rows become trees of tokens.

The trunk of a tree is the prompt up to the token that predicts the first trained target; each
row is a branch. A position sees its own tree's trunk and its own branch, and counts its place
from the start of the prompt, so hidden states and gradients are those of separate rows. Trees
are packed into sequences as long as the largest of them, under one attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from rwft.errors import PolicyError

SAFETY = 1.15  # how much cheaper trees must be, by count, before they are used: a count is no clock
PAIR_COST = 4.0  # a product in attention with a mask takes as long as so many in a linear layer
FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gpt2", "phi", "phi3", "gemma", "olmo2", "granite", "smollm3"}
)
"""Model types whose layers see other positions through attention alone, and places through `position_ids` alone."""


@dataclass(frozen=True)
class Shared:
    """`s` sequences of `t` inputs that hold trees; what is `(s t)` is int64, and 0 or -1 where nothing is.

    `trained (n)`: where, in the flat `(s t)`, the hidden states of the trained targets are, in the order of rows.
    """

    ids: Tensor  # (s t)
    positions: Tensor  # (s t), from the start of the prompt
    tree: Tensor  # (s t), which tree of the sequence
    branch: Tensor  # (s t), 0 for the trunk
    trained: Tensor  # (n)

    def to(self, device: torch.device) -> Shared:
        """The same on another device."""
        return Shared(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def sees(self) -> Tensor:
        """`(s t), (s t) -> (s 1 t t)`: whether a query (third axis) sees a key (fourth): its past in trunk and branch."""
        tree, branch = self.tree, self.branch
        same_tree = rearrange(tree, "s q -> s 1 q 1") == rearrange(tree, "s k -> s 1 1 k")
        own = rearrange(branch, "s q -> s 1 q 1") == rearrange(branch, "s k -> s 1 1 k")
        trunk = rearrange(branch == 0, "s k -> s 1 1 k")
        return (same_tree & (own | trunk)).tril_()


class Branch(NamedTuple):
    """One row: its inputs behind the prompt, and which targets from the first trained one on are trained."""

    row: int
    ids: Sequence[int]
    mask: NDArray[np.bool_]


class Tree(NamedTuple):
    """Rows that continue the same prompt."""

    prompt: tuple[int, ...]
    branches: list[Branch]

    @property
    def size(self) -> int:
        """Inputs that it takes."""
        return len(self.prompt) + sum(len(branch.ids) for branch in self.branches)


def grow(ids: Sequence[Sequence[int]], mask: Sequence[Sequence[float]]) -> list[Tree]:
    """Rows of `t+1` ids and `t` mask values as trees, one for each prompt; untrained rows and ends are left out."""
    trees: dict[tuple[int, ...], Tree] = {}
    for row, (tokens, wanted) in enumerate(zip(ids, mask, strict=True)):
        trained = np.asarray(wanted) > 0
        places = np.flatnonzero(trained)
        if len(places):
            first, last = int(places[0]), int(places[-1])
            prompt = tuple(tokens[: first + 1])
            branch = Branch(row, tokens[first + 1 : last + 1], trained[first : last + 1])
            trees.setdefault(prompt, Tree(prompt, [])).branches.append(branch)
    return list(trees.values())


def pack(trees: Sequence[Tree]) -> list[list[Tree]]:
    """First fit, largest first: trees to sequences as long as the largest tree."""
    most = max(tree.size for tree in trees)
    packed: list[list[Tree]] = []
    for tree in sorted(trees, key=lambda tree: -tree.size):
        place = next((trees for trees in packed if sum(t.size for t in trees) + tree.size <= most), None)
        if place is None:
            packed.append([tree])
        else:
            place.append(tree)
    return packed


def lay_out(packed: Sequence[Sequence[Tree]]) -> Shared:
    """Packed trees as tensors."""
    width = max(sum(tree.size for tree in trees) for trees in packed)
    ids, positions, branch = (np.zeros((len(packed), width), dtype=np.int64) for _ in range(3))
    which = np.full((len(packed), width), -1, dtype=np.int64)
    trained: dict[int, NDArray[np.int64]] = {}
    for s, trees in enumerate(packed):
        start = 0
        for number, tree in enumerate(trees):
            trunk = len(tree.prompt)
            which[s, start : start + tree.size] = number
            ids[s, start : start + trunk] = tree.prompt
            positions[s, start : start + trunk] = np.arange(trunk)
            root, start = s * width + start + trunk - 1, start + trunk
            for k, (row, tokens, mask) in enumerate(tree.branches):
                here = slice(start, start + len(tokens))
                ids[s, here], branch[s, here] = tokens, k + 1
                positions[s, here] = trunk + np.arange(len(tokens))
                trained[row] = np.append(root, s * width + np.arange(here.start, here.stop))[mask]
                start = here.stop
    order = np.concatenate([trained[row] for row in sorted(trained)])
    return Shared(*map(torch.from_numpy, (ids, positions, which, branch, order)))


@dataclass(frozen=True)
class Sharing:
    """Rows of a micro-batch -> trees where they cost less, by operations counted for this model; else None.

    `position` counts the multiplications of the trunk of the model for one input, `pair` those of
    attention for one query and key. With `always`, trees are made wherever two rows share a prompt.
    """

    position: float
    pair: float
    always: bool = False

    def __call__(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[float]]) -> Shared | None:
        trees = grow(ids, mask)
        if len(trees) == sum(len(tree.branches) for tree in trees):
            return None
        packed = pack(trees)
        if not self.always and self.cost_of_trees(packed) * SAFETY > self.cost_of_rows(list(map(len, mask))):
            return None
        return lay_out(packed)

    def cost_of_rows(self, lengths: Sequence[int]) -> float:
        """Padded rows under a causal mask, of which kernels skip the upper half."""
        inputs, width = len(lengths) * max(lengths), max(lengths)
        return inputs * (self.position + 0.5 * width * self.pair)

    def cost_of_trees(self, packed: Sequence[Sequence[Tree]]) -> float:
        """Sequences under a mask that kernels read whole."""
        width = max(sum(tree.size for tree in trees) for trees in packed)
        return len(packed) * width * (self.position + width * self.pair * PAIR_COST)


def sharing(mode: str, models: Sequence[Any]) -> Sharing | None:
    """What `data.share_prompts: auto | on | off` means for Hugging Face causal LMs that see the same batches.

    None where prompts are not shared. The first model decides what is cheaper. Raises PolicyError
    under `on` for a model whose hidden states would not be those of separate rows.
    """
    reason = next(filter(None, (refusal(model.config) for model in models)), None)
    if mode == "on" and reason is not None:
        raise PolicyError(f"data.share_prompts: on, but {reason}; use auto or off")
    if mode == "off" or reason is not None:
        return None
    return cost_model(models[0], always=mode == "on")


def cost_model(model: Any, *, always: bool = False) -> Sharing:
    """Multiplications in a model's trunk, by its parameters and attention heads."""
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tables = {id(m.weight) for m in model.base_model.modules() if isinstance(m, torch.nn.Embedding)}
    weights = sum(p.numel() for p in model.base_model.parameters() if p.ndim == 2 and id(p) not in tables)
    return Sharing(position=weights, pair=2 * config.num_hidden_layers * width, always=always)


def refusal(config: Any) -> str | None:
    """Why rows of this model cannot share a prompt, or None."""
    if config.model_type not in FAMILIES:
        return f"model type '{config.model_type}' is not known to see other positions through plain attention alone"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    ):
        return "its attention slides over a window, which counts places in the sequence"
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return f"its positions are scaled by the length of the batch ({rope['rope_type']})"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention '{config._attn_implementation}' takes no mask of pairs; expected sdpa or eager"
    return None
