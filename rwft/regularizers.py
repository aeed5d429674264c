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
    r"""Forward KL to the reference, `(n v), (n v) -> (n)`: $\sum_v \pi_{ref}(v) \log (\pi_{ref}(v) / \pi(v))$.

    Why: $\mathrm{KL}(\pi_{ref} \| \pi)$ in nats, mode-covering: the policy must keep mass wherever the reference has
    some. Its gradient by the logits is $\pi - \pi_{ref}$.
    Limits: zero, with its gradient, at the reference; without an objective it is distillation from the reference.
    Reference: ASFT, arXiv 2509.23753: objective dft with coef 0.05.
    Warning: 0.05 is the paper's coefficient, 0.1 that of its code and of LLaMA-Factory. Both divide by the tokens of a
    micro-batch; here the penalty has the normaliser of the loss.
    """
    return (ref_logp_all.exp() * (ref_logp_all - logp_all)).sum(dim=-1)


@regularizer
def reverse_kl(logp_all: Tensor, ref_logp_all: Tensor) -> Tensor:
    r"""Reverse KL to the reference, `(n v), (n v) -> (n)`: $\sum_v \pi(v) \log (\pi(v) / \pi_{ref}(v))$.

    Why: $\mathrm{KL}(\pi \| \pi_{ref})$ in nats, mode-seeking, the KL of reinforcement learning: the policy must put no
    mass where the reference has none. Exact at every position, where samples would only estimate it.
    Limits: zero, with its gradient, at the reference.
    Reference: Quark, arXiv 2205.13636: objective sft on data with a reward token, coef 0.05, with entropy at 0.06.
    Warning: PPO and GRPO penalise the KL at their own samples; this one is taken at the data's prefixes.
    """
    return (logp_all.exp() * (logp_all - ref_logp_all)).sum(dim=-1)


@regularizer
def entropy(logp_all: Tensor) -> Tensor:
    r"""Negative entropy, `(n v) -> (n)`: $-H(\pi) = \sum_v \pi(v) \log \pi(v)$.

    Why: in nats; a positive `coef` raises the entropy, against the collapse that positive-only weights end in.
    Limits: smallest, $-\ln V$, for a uniform policy; 0 for a certain one.
    Reference: the entropy bonus of policy gradients; Quark, arXiv 2205.13636, has it at 0.06.
    """
    return (logp_all.exp() * logp_all).sum(dim=-1)


@regularizer
def gem(logits: Tensor, logp_all: Tensor, *, beta: Positive = 0.7) -> Tensor:
    r"""GEM's correction of SFT, `(n v), (n v) -> (n)`: $\sum_v \mathrm{sg}[q(v)] \log \pi(v)$.

    Why: q is $\mathrm{softmax}(z / \beta)$, the policy sharpened. It turns sft into GEM: with `coef: 1` the gradient by
    the logits is $q - e_y$, so that learning of a token stops when q, not $\pi$, has reached it, and with beta < 1
    mass is left on other tokens.
    Limits: beta = 1 leaves the gradient of sft as it is.
    Reference: GEM, arXiv 2408.16673, the linear form: objective sft with coef 1 and beta 0.7.
    Warning: the official code's default, `logsigmoid`, multiplies each term by a sigmoid and is about half of sft even
    at beta 1; it is not here. With another coefficient than 1, or another objective than sft, it is not GEM.
    """
    q = (logits.detach() / beta).softmax(dim=-1)
    return (q * logp_all).sum(dim=-1)


@regularizer
def label_smoothing(logp_all: Tensor, targets: Tensor) -> Tensor:
    r"""Label smoothing of SFT, `(n v), (n) -> (n)`: $\log \pi(y) - \frac{1}{V} \sum_v \log \pi(v)$.

    Why: the cross-entropy of the uniform distribution less the NLL; with the objective sft and `coef: eps` the loss is
    that of label smoothing, $-(1 - \epsilon) \log \pi(y) - \frac{\epsilon}{V} \sum_v \log \pi(v)$.
    Limits: coef 0 is sft alone, coef 1 fits the uniform distribution.
    Reference: the usual definition, as in torch's cross_entropy.
    Warning: with another objective than sft the NLL that it takes away is not weighted as the objective's is.
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
