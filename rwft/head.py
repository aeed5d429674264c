"""The loss head: from hidden states to a weighted loss and its gradients, without full logits.

Coefficients are detached, so the gradients of the hidden states and of the projection are made
while a chunk of logits is at hand; autograd only multiplies them by the upstream scalar. The head
knows nothing of objectives: `weigh` turns measured signals into coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwft.errors import ObjectiveError, PolicyError
from rwft.head_gradients import Dense, GivenGradients, Gradients
from rwft.head_kernel import SoftmaxRows, softmax_kernel
from rwft.head_sampled import Draws, Sampled
from rwft.head_tiled import token_logprobs
from rwft.regularizers import Penalty, differentiate
from rwft.softmax import (
    ALIGNED,
    Projection,
    Vocabulary,
    check_shapes,
    check_signals,
    equal_slices,
    exact_blocks,
    finish_,
    measure_,
    merge,
    precision,
    store_,
    subtract_target_,
    within,
)

__all__ = ["Draws", "HeadResult", "Vocabulary", "distribution_signals", "token_logprobs", "weighted_loss"]

MIN_BUDGET, MAX_BUDGET = 80 << 20, 256 << 20  # bytes of a chunk of logits; in between, a quarter of the gradients
GPU_ROOM = 1 << 30  # bytes beside the gradients on a GPU, which only large chunks keep busy
LOGP = frozenset({"logp"})  # signals that a kernel measures
Weigh = Callable[[dict[str, Tensor], slice], Tensor]
Reference = tuple[Tensor, Vocabulary]


class HeadResult(NamedTuple):
    """Of `n` positions. `loss` is differentiable in hidden states, weight and bias; all else is detached.

    A tuple, because engines that spread weights look for the tensors in what a module returns.
    """

    loss: Tensor  # ()
    logp: Tensor  # (n)
    signals: dict[str, Tensor]  # {name: (n)}: logp and what was asked for
    coefficients: Tensor  # (n), what `weigh` returned
    penalties: dict[str, Tensor]  # {regularizer: ()}: mean over positions, without coefficient or scale


def weighted_loss(
    hidden: Tensor,
    vocabulary: Vocabulary,
    targets: Tensor,
    weigh: Weigh,
    *,
    segments: Sequence[int] | Tensor | None = None,
    signals: Sequence[str] = (),
    penalties: Sequence[Penalty] = (),
    penalty_scale: Tensor | None = None,
    reference: Reference | None = None,
    sampled: Draws | None = None,
    budget: int | None = None,
) -> HeadResult:
    """`(n h), (v h), (n) -> ()`: `-(c * logp).sum() + sum_k coef_k * (penalty_scale * penalty_k).sum()`.

    `hidden` holds trained positions only. `weigh(signals, positions)` is called without gradient, in
    order, once per group of whole `segments` (lengths that sum to n; None: every position stands
    alone), with `{"logp": (k), ...}` of those positions in float32 or better; it returns `c`, `(k)`.
    `signals` asks for more than `logp` (see `rwft.softmax.SIGNALS`). `penalty_scale` is `(n)`;
    `reference` is the reference policy's hidden states `(n h')` and projection, for penalties that
    read it. `sampled` estimates the gradients from draws of the vocabulary (see `rwft.head_sampled`);
    penalties need them exact. `budget` is the workspace in bytes. Where gradients are disabled, none are made.

    A group that fits the workspace, or any group if the projection is frozen or the gradients are
    sampled, takes one pass; else, and with penalties, log-probabilities come first and gradients
    second. Raises PolicyError for shapes or targets that do not fit, ObjectiveError for unknown
    signals or wrong coefficients.
    """
    check_shapes(hidden, vocabulary, targets)
    check_signals(signals)
    if sampled is not None and penalties:
        raise ObjectiveError(f"head: sampled gradients know no penalties, but '{penalties[0].name}' is given; drop one")
    most = chunk_rows(hidden, vocabulary, reference, budget, sampled is not None)
    groups = cut(segments, hidden.shape[0], most)
    once = len(groups) <= 1 and hidden.shape[0] <= most
    summed = vocabulary.weight.dtype if once else precision_of_sums(hidden, vocabulary, sampled is not None)
    gradients = Gradients.like(hidden, vocabulary, precision(hidden, vocabulary.weight).exact, summed)
    policy = Projection.of(hidden, vocabulary, most, gradients.idle if sampled is not None else None)
    regularised = _Regularised.begin(penalties, penalty_scale, reference, policy, most) if penalties else None
    kernel = softmax_kernel(hidden.device, policy.exact)
    drawn = None if sampled is None else Sampled.room(sampled, targets, policy.exact)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(policy, targets, signals, most, gradients, kernel, regularised, drawn)
        measured = merge([head.descend(rows, weigh) for rows in groups] or [head.nothing("coefficients")])
        coefficients = measured.pop("coefficients")
        if drawn is not None:
            head.finish(coefficients, drawn)
        value = -(coefficients * measured["logp"]).sum()
        if regularised is not None:
            value += regularised.loss()
    loss = GivenGradients.apply(value, gradients, hidden, vocabulary.weight, vocabulary.bias)
    means = {} if regularised is None else regularised.means()
    return HeadResult(loss, measured["logp"], measured, coefficients, means)


def distribution_signals(
    hidden: Tensor, vocabulary: Vocabulary, targets: Tensor, names: Sequence[str], *, budget: int | None = None
) -> dict[str, Tensor]:
    """`(n h), (v h), (n) -> {name: (n)}`: signals by name (`rwft.softmax.SIGNALS`), without gradient, chunk by chunk.

    Float32, or float64 if an input is. Raises PolicyError for shapes or targets that do not fit,
    ObjectiveError for unknown names.
    """
    check_shapes(hidden, vocabulary, targets)
    check_signals(names)
    most = chunk_rows(hidden, vocabulary, None, budget)
    policy = Projection.of(hidden, vocabulary, most)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(policy, targets, names, most, Gradients(), softmax_kernel(hidden.device, policy.exact))
        measured = merge([head.measure(rows) for rows in equal_slices(0, hidden.shape[0], most)] or [head.nothing()])
    return {name: measured[name] for name in names}


def gpu_room(device: torch.device) -> int | None:
    """Bytes that a head may take beside the gradients on a GPU, at most a 32nd of its memory; None on a CPU."""
    return min(GPU_ROOM, torch.cuda.get_device_properties(device).total_memory // 32) if device.type == "cuda" else None


def precision_of_sums(hidden: Tensor, vocabulary: Vocabulary, sampled: bool = False) -> torch.dtype:
    """Of the weight's gradient over chunks: exact, but the weight's own on a GPU that has no room for exact sums.

    Its chunks are few there, and each rounds the sum once. That of `sampled` gradients is written once for all chunks.
    """
    weight, exact = vocabulary.weight, precision(hidden, vocabulary.weight).exact
    room = gpu_room(hidden.device)
    crowded = room is not None and weight.dtype != exact and weight.numel() * exact.itemsize > room
    return weight.dtype if crowded or sampled else exact


def chunk_rows(
    hidden: Tensor, vocabulary: Vocabulary, reference: Reference | None, budget: int | None, sampled: bool = False
) -> int:
    """Rows of logits that fit `budget` bytes.

    By default a quarter of what the gradients take, within 80 to 256 MiB; on a GPU `gpu_room` less what sums take.
    """
    sums = precision_of_sums(hidden, vocabulary, sampled).itemsize  # low precision is summed in float32
    outputs = (hidden.numel() + vocabulary.weight.numel()) * sums
    projections = [(hidden, vocabulary)] if reference is None else [(hidden, vocabulary), reference]
    row = sum(v.size * precision(x, v.weight).product.itemsize for x, v in projections)
    if budget is None:
        spared = vocabulary.weight.numel() * (sums - vocabulary.weight.itemsize)  # one chunk needs no such sum
        whole = row * hidden.shape[0] if vocabulary.weight.requires_grad else 0
        room = gpu_room(hidden.device)
        usual = min(max(outputs // 4, MIN_BUDGET), MAX_BUDGET) if room is None else room - spared
        budget = whole if 0 < whole <= spared else usual
    rows = max(1, budget // row)
    return rows - rows % ALIGNED if ALIGNED < rows < hidden.shape[0] else rows


def cut(segments: Sequence[int] | Tensor | None, n: int, most: int) -> list[slice]:
    """Positions `0:n` as groups of whole segments that fit `most` positions; a longer segment is a group of its own."""
    if segments is None:
        return list(equal_slices(0, n, most))
    lengths = [int(length) for length in segments]
    if min(lengths, default=0) < 0 or sum(lengths) != n:
        raise PolicyError(f"head: segments sum to {sum(lengths)}; expected lengths >= 0 that sum to {n} positions")
    return list(_pack(lengths, most))


def _pack(lengths: Sequence[int], most: int) -> Iterator[slice]:
    total = sum(lengths)
    share = -(-total // max(1, -(-total // most)))  # so that the last group is not a small remainder
    start = stop = 0
    for length in lengths:
        if stop > start and (stop - start >= share or stop - start + length > most):
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)


@dataclass(frozen=True)
class _Head:
    """One policy's hidden states on their way to measured signals, coefficients and gradients."""

    policy: Projection
    targets: Tensor
    names: Sequence[str]
    most: int
    gradients: Gradients
    kernel: SoftmaxRows | None
    regularised: _Regularised | None = None
    sampled: Sampled | None = None

    def descend(self, rows: slice, weigh: Weigh) -> dict[str, Tensor]:
        """Signals and coefficients, `(k)` each, of one group; its gradients go where they gather."""
        parts = list(equal_slices(rows.start, rows.stop, self.most))
        if self.regularised is None and (len(parts) == 1 or self.gradients.frozen or self.sampled is not None):
            found = [self.unit(part, self.names) for part in parts]
            measured = merge([signals for signals, _ in found])
            c = self.coefficients(weigh, measured, rows)
            self.scale(rows, c, found[-1][1])
            return measured | {"coefficients": c}
        measured = merge([self.measure(part) for part in parts])
        c = self.coefficients(weigh, measured, rows)
        for part in parts:
            here = c[part.start - rows.start : part.stop - rows.start]
            if self.regularised is not None:
                self.learn(part, here, self.regularised, at_hand=len(parts) == 1)
            else:
                self.scale(part, here, self.unit(part, ())[1])
        return measured | {"coefficients": c}

    def coefficients(self, weigh: Weigh, measured: dict[str, Tensor], rows: slice) -> Tensor:
        c = weigh(dict(measured), rows)
        if c.shape != measured["logp"].shape:
            raise ObjectiveError(f"head: found coefficients {tuple(c.shape)}, expected {tuple(measured['logp'].shape)}")
        return c.detach().to(self.policy.exact)

    def nothing(self, *names: str) -> dict[str, Tensor]:
        """Signals of no position."""
        return {name: self.policy.x.new_zeros(0, dtype=self.policy.exact) for name in ("logp", *self.names, *names)}

    def measure(self, part: slice) -> dict[str, Tensor]:
        """Signals `(k)` of one chunk, which stays in the buffer as products."""
        products = self.policy.products(part)
        if self.kernel is not None and LOGP.issuperset(self.names):
            return {"logp": self.kernel(products, self.targets[part], self.policy.vocabulary, gradient=False)}
        found = []
        for block, z in exact_blocks(products, self.policy.exact, keep=True):
            finish_(z, self.policy.vocabulary)
            found.append(measure_(z, self.targets[within(part, block)], self.names))
        return merge(found)

    def unit(self, part: slice, names: Sequence[str]) -> tuple[dict[str, Tensor], Dense | Sampled]:
        """Signals `(k)` of one chunk; gradients by products and hidden states, left for coefficients of one."""
        products = self.policy.products(part)
        by_products, found = Dense(products) if self.sampled is None else self.sampled.part(part), []
        if self.kernel is not None and self.sampled is None and LOGP.issuperset(names):
            targets, vocabulary = self.targets[part], self.policy.vocabulary
            found = [{"logp": self.kernel(products, targets, vocabulary, gradient=True)}]
        else:
            for block, z in exact_blocks(products, self.policy.exact):
                slope = finish_(z, self.policy.vocabulary)
                targets = self.targets[within(part, block)]
                found.append(measure_(z, targets, names))
                by_products.take(block, z, targets, slope)
        if self.gradients.hidden is not None:
            self.gradients.hidden[part] = by_products.by_hidden(self.policy.vocabulary.weight)
        return merge(found), by_products

    def scale(self, rows: slice, c: Tensor, by_products: Dense | Sampled) -> None:
        """Coefficients for what `unit` left: the gradient is linear in them.

        `by_products` is unused if frozen; what was sampled waits for all coefficients.
        """
        factor = c * self.policy.vocabulary.scale
        if self.gradients.hidden is not None:
            self.gradients.hidden[rows] *= factor[:, None]
        if isinstance(by_products, Dense):
            self.project(rows, factor, by_products)

    def project(self, rows: slice, factor: Tensor, by_products: Dense) -> None:
        """`(k)`: adds the gradients of weight and bias, given those by products."""
        if self.gradients.weight is not None:
            by_products.add_by_weight(self.gradients.weight, self.weighted(rows, factor), first=rows.start == 0)
        if self.gradients.bias is not None:
            by_products.add_by_bias(self.gradients.bias, factor)

    def finish(self, c: Tensor, sampled: Sampled) -> None:
        """`(n)`: the gradients of weight and bias from what was sampled at all positions."""
        factor = c * self.policy.vocabulary.scale
        if self.gradients.weight is not None:
            sampled.write_by_weight(self.gradients.weight, self.weighted(slice(None), factor))
        if self.gradients.bias is not None:
            sampled.add_by_bias(self.gradients.bias, factor)

    def weighted(self, rows: slice, factor: Tensor) -> Tensor:
        """`(k) -> (k h)`: hidden states times their factors."""
        x = self.policy.x[rows]
        return (x * factor[:, None]).to(x.dtype)

    def learn(self, part: slice, c: Tensor, regularised: _Regularised, at_hand: bool) -> None:
        """All gradients of one chunk with penalties; `at_hand`: its products are in the buffer."""
        products = self.policy.buffer[: part.stop - part.start] if at_hand else self.policy.products(part)
        regularised.load(part)
        for block, z in exact_blocks(products, self.policy.exact):
            rows = within(part, block)
            slope = finish_(z, self.policy.vocabulary)
            extra = regularised.gradient(z, self.targets[rows], rows, block)
            torch.softmax(z, dim=-1, out=z)
            subtract_target_(z, self.targets[rows]).mul_(c[block, None]).add_(extra)
            store_(products, block, z, slope)
        scale = self.policy.vocabulary.scale
        if self.gradients.hidden is not None:
            self.gradients.hidden[part] = (products @ self.policy.vocabulary.weight) * scale
        self.project(part, torch.full_like(c, scale), Dense(products))


@dataclass(frozen=True)
class _Regularised:
    """Penalties, their scale per position, the reference they may read, and what they came to."""

    penalties: Sequence[Penalty]
    scale: Tensor  # (n)
    reference: Projection | None
    values: dict[str, Tensor]  # {name: (n)}

    @classmethod
    def begin(
        cls,
        penalties: Sequence[Penalty],
        scale: Tensor | None,
        reference: Reference | None,
        policy: Projection,
        most: int,
    ) -> _Regularised:
        n = policy.x.shape[0]
        if scale is None or scale.shape != (n,):
            found = None if scale is None else tuple(scale.shape)
            raise ObjectiveError(f"head: penalty_scale: found {found}, expected ({n},), one for each position")
        reader = next((penalty.name for penalty in penalties if "ref_logp_all" in penalty.reads), None)
        if reader is not None and reference is None:
            raise ObjectiveError(f"regularizer '{reader}' reads ref_logp_all, but no reference policy was given")
        if reader is None or reference is None:
            reference = None
        elif reference[1].size != policy.vocabulary.size or reference[0].shape[0] != n:
            found = f"{reference[0].shape[0]} positions and {reference[1].size} tokens"
            expected = f"{n} and {policy.vocabulary.size}, as the policy has"
            raise PolicyError(f"head: the reference policy gives {found}; expected {expected}")
        values = {penalty.name: policy.x.new_zeros(n, dtype=policy.exact) for penalty in penalties}
        projection = None if reference is None else Projection.of(*reference, most)
        return cls(penalties, scale.detach().to(policy.exact), projection, values)

    def load(self, part: slice) -> None:
        """Makes the reference's products of one chunk."""
        if self.reference is not None:
            self.reference.products(part)

    def gradient(self, logits: Tensor, targets: Tensor, rows: slice, block: slice) -> Tensor:
        """`(k v), (k) -> (k v)`: gradient of the penalties' part of the loss by logits; keeps the penalties."""
        ref_logp_all = None
        if self.reference is not None:
            ref_logits = self.reference.buffer[block].to(self.reference.exact)
            finish_(ref_logits, self.reference.vocabulary)
            ref_logp_all = ref_logits.log_softmax(dim=-1).to(logits.dtype)
        gradient, values = differentiate(self.penalties, logits, targets, ref_logp_all, self.scale[rows])
        for name, value in values.items():
            self.values[name][rows] = value
        return gradient

    def loss(self) -> Tensor:
        """`()`: the penalties' part of the loss."""
        terms = [penalty.coef * (self.scale * self.values[penalty.name]).sum() for penalty in self.penalties]
        return torch.stack(terms).sum()

    def means(self) -> dict[str, Tensor]:
        return {name: value.sum() / max(1, value.shape[0]) for name, value in self.values.items()}
