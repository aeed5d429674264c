r"""Penalties over the whole distribution: what is not a scalar times :math:`\nabla \log \pi(y)`.

A regularizer is a pure function from a chunk of distributions to one penalty per position. Its
positional parameters name what it reads, its keyword-only parameters are settings. In a config,
`coef` stands beside the name: `regularize: [{name: forward_kl, coef: 0.05}]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwft.bounds import Positive
from rwft.errors import ConfigError, ObjectiveError
from rwft.registry import Registry
from rwft.weighting import Factor, bind_factor, split_spec

INPUTS: dict[str, str] = {
    "logits": "(n v): the policy's logits, differentiable",
    "logp_all": "(n v): their log-softmax, differentiable",
    "ref_logp_all": "(n v): log-probabilities of the reference policy",
    "targets": "(n): the tokens that the data hold",
}
"""What a regularizer may read, in float32 or better."""

regularizer = Registry("regularizer", INPUTS, builtin="rwft.regularizers", group="rwft.regularizers")
"""Decorator and registry: `@regularizer` on a function, `regularizer["forward_kl"]`, iteration, `in`."""


@regularizer
def forward_kl(logp_all: Tensor, ref_logp_all: Tensor) -> Tensor:
    r"""`(n v), (n v) -> (n)`: $\mathrm{KL}(\pi_{ref} \| \pi) = \sum_v \pi_{ref}(v) \log \frac{\pi_{ref}(v)}{\pi(v)}$.

    In nats. Mode-covering: the policy must keep mass wherever the reference has some. Its gradient by the
    logits is $\pi - \pi_{ref}$. With the objective `dft` and `coef: 0.05` this is ASFT.
    Reference: ASFT, arXiv 2509.23753.
    """
    return (ref_logp_all.exp() * (ref_logp_all - logp_all)).sum(dim=-1)


@regularizer
def reverse_kl(logp_all: Tensor, ref_logp_all: Tensor) -> Tensor:
    r"""`(n v), (n v) -> (n)`: $\mathrm{KL}(\pi \| \pi_{ref}) = \sum_v \pi(v) \log \frac{\pi(v)}{\pi_{ref}(v)}$.

    In nats. Mode-seeking, and the KL of reinforcement learning: the policy must not put mass where the
    reference has none. Exact at every position, where samples would only estimate it.
    """
    return (logp_all.exp() * (logp_all - ref_logp_all)).sum(dim=-1)


@regularizer
def entropy(logp_all: Tensor) -> Tensor:
    r"""`(n v) -> (n)`: $-H(\pi) = \sum_v \pi(v) \log \pi(v)$, in nats: a positive `coef` raises the entropy."""
    return (logp_all.exp() * logp_all).sum(dim=-1)


@regularizer
def gem(logits: Tensor, logp_all: Tensor, *, beta: Positive = 0.7) -> Tensor:
    r"""`(n v), (n v) -> (n)`: $\sum_v \mathrm{sg}[q(v)] \log \pi(v)$ with $q = \mathrm{softmax}(z / \beta)$.

    The correction that turns SFT into GEM: with the objective `sft` and `coef: 1` the gradient by the
    logits is $q - e_y$, so that learning of a token stops when $q$, not $\pi$, has reached it, and with
    `beta` < 1 mass is left on other tokens. `beta: 1` leaves SFT's gradient as it is.
    Reference: GEM, arXiv 2408.16673, the linear form; the official code's default, `logsigmoid`,
    multiplies each term by a sigmoid and is about half of SFT even at `beta: 1`.
    """
    q = (logits.detach() / beta).softmax(dim=-1)
    return (q * logp_all).sum(dim=-1)


@regularizer
def label_smoothing(logp_all: Tensor, targets: Tensor) -> Tensor:
    r"""`(n v), (n) -> (n)`: $-\frac{1}{V} \sum_v \log \pi(v) + \log \pi(y)$: uniform cross-entropy minus the NLL.

    With the objective `sft` and `coef: eps` the loss is that of label smoothing,
    $(1 - \epsilon)(-\log \pi(y)) + \epsilon (-\frac{1}{V} \sum_v \log \pi(v))$.
    """
    return logp_all.gather(-1, targets[:, None])[:, 0] - logp_all.mean(dim=-1)


@dataclass(frozen=True)
class Penalty:
    """A regularizer with its settings and its coefficient bound."""

    factor: Factor
    coef: float

    @property
    def name(self) -> str:
        return self.factor.entry.name

    @property
    def reads(self) -> tuple[str, ...]:
        """What it reads, in the order of its parameters."""
        return self.factor.entry.reads

    def function(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`{name: (n v) | (n)} -> (n)`. Raises ObjectiveError if the function returns another shape."""
        penalty = self.factor.entry.function(*(inputs[name] for name in self.reads), **self.factor.settings)
        rows = next(iter(inputs.values())).shape[:1]
        if not isinstance(penalty, Tensor) or penalty.shape != rows:
            found = f"shape {tuple(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
            raise ObjectiveError(f"regularizer '{self.name}': found {found}, expected {tuple(rows)}, one per position")
        return penalty

    @property
    def spec(self) -> dict[str, Any]:
        """What `build_regularizers` would rebuild this from, every setting written out."""
        return {**self.factor.spec, "coef": self.coef}


def build_regularizers(specs: Sequence[Mapping[str, Any]]) -> list[Penalty]:
    """`[{name: ..., coef: ..., **settings}]` as penalties.

    Raises ConfigError for another form, a missing coefficient or a name given twice, ObjectiveError
    for an unknown name or setting.
    """
    if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence):
        raise ConfigError(f"regularize: found {specs!r}; expected a list such as [{{name: forward_kl, coef: 0.05}}]")
    penalties = [_penalty(spec) for spec in specs]
    names = [penalty.name for penalty in penalties]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"regularize: '{name}' is given twice; its metric would be ambiguous; give it once")
    return penalties


def _penalty(spec: Mapping[str, Any]) -> Penalty:
    name, settings = split_spec(regularizer.kind, spec)
    coef = settings.pop("coef", None)
    if isinstance(coef, bool) or not isinstance(coef, (int, float)) or not math.isfinite(coef):
        raise ConfigError(f"regularize: {name}: coef: found {coef!r}, expected a finite number, such as coef: 0.05")
    return Penalty(bind_factor(regularizer, {"name": name, **settings}), float(coef))


def differentiate(
    penalties: Sequence[Penalty], logits: Tensor, targets: Tensor, ref_logp_all: Tensor | None, scale: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """`(k v), (k), (k v), (k) -> (k v), {name: (k)}`: gradient by logits of `sum coef * scale * penalty`; penalties.

    Raises ObjectiveError if a penalty does not depend on the policy.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        inputs = {"logits": leaf, "targets": targets}
        if any("logp_all" in penalty.reads for penalty in penalties):
            inputs["logp_all"] = leaf.log_softmax(dim=-1)
        if ref_logp_all is not None:
            inputs["ref_logp_all"] = ref_logp_all
        values = {penalty.name: penalty.function(inputs) for penalty in penalties}
        for name, value in values.items():
            if not value.requires_grad:
                raise ObjectiveError(f"regularizer '{name}': its penalty does not depend on logits or logp_all")
        total = torch.stack([penalty.coef * (scale * values[penalty.name]).sum() for penalty in penalties]).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient, {name: value.detach() for name, value in values.items()}
