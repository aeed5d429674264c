"""Any objective in a `transformers.Trainer`, or in a trainer built on it such as TRL's `SFTTrainer`.

The trainer keeps its loop, data loading, optimiser, logging and checkpoints. What is replaced is
the loss: columns of the dataset that the objective reads travel with their rows, the normaliser
counts the whole optimiser step over all ranks, and the head makes no logits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, Trainer, default_data_collator

from rwft.data.batching import Batch
from rwft.errors import ConfigError, DataError, ObjectiveError, PolicyError, did_you_mean
from rwft.estimator import NORMALIZERS, Counts, count, weight_statistics
from rwft.head import HeadResult, distribution_signals, weighted_loss
from rwft.metrics import Meter
from rwft.policy import Policy, check_head
from rwft.signals import SIGNALS
from rwft.step import Weigher
from rwft.weighting import Objective, build_objective

UNTRAINED = -100  # the label of a token that is not trained, by the convention of transformers
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
LOOP_SCALARS = ("log_vocab", "progress")  # signals () that a Trainer's state tells
NOT_HERE = {
    "group": "compares completions of one prompt, which a Trainer's batches do not keep together",
    "old_logp": "needs snapshots of the policy, which a Trainer does not take",
    "kl_running": "needs a running mean over steps, which a Trainer does not keep",
    "reward_max": "is one number for the dataset, which columns do not give",
    "ref_nll_median": "is one number for the dataset, which columns do not give",
}
TrainerType = TypeVar("TrainerType", bound=Trainer)
Row = Mapping[str, Any]
Collator = Callable[[list[Row]], dict[str, Tensor]]


def weighted(trainer: type[TrainerType], objective: Any, *, normalize: str = "token") -> type[TrainerType]:
    """A subclass of `trainer` that trains `objective` (a name, a mapping, a list, or an Objective).

    `normalize` is `token`, `sequence` or `sequence_sum`, exact over accumulation and ranks. Raises
    ObjectiveError for an objective that reads what a Trainer cannot provide, ConfigError for another
    normaliser; the subclass, when built, ConfigError or PolicyError for what it cannot train correctly.
    """
    built = build_objective(objective)
    for name in sorted(built.reads & NOT_HERE.keys()):
        raise ObjectiveError(f"objective '{built}' reads '{name}': it {NOT_HERE[name]}; train it with `rwft train`")
    if normalize == "weight":
        raise ConfigError(
            "normalize: 'weight' divides by a sum known only after the last micro-batch, and a Trainer clips before "
            "anyone can divide; use token, sequence or sequence_sum, or `rwft train`"
        )
    if normalize not in NORMALIZERS:
        raise ConfigError(f"normalize: found {normalize!r}; {did_you_mean(str(normalize), NORMALIZERS)}")
    body = {"objective": built, "normalize": normalize, "__doc__": f"{trainer.__name__} that trains {built}."}
    return cast("type[TrainerType]", type(f"Weighted{trainer.__name__}", (WeightedLoss, trainer), body))


def columns_read(objective: Objective) -> frozenset[str]:
    """The signals that columns of the training set must give, under the signals' own names."""
    outside = ("data", "credit", "frozen model")
    return frozenset(n for n in objective.reads if SIGNALS[n].source in outside and n != "mask")


def pad_rows(rows: list[Row]) -> dict[str, Tensor]:
    """Rows with `input_ids` and `labels` of one length -> `(b t+1)` each, and `attention_mask`; padded on the right.

    Raises DataError for a row without them, or with unequal lengths.
    """
    longest = max(len(_tokens(row)) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)  # any id serves behind the end: causal masks hide it
    labels, attention = torch.full_like(ids, UNTRAINED), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        end = len(row["input_ids"])
        ids[index, :end], labels[index, :end] = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
        attention[index, :end] = 1
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def _tokens(row: Row) -> Sequence[int]:
    if "input_ids" not in row or "labels" not in row:
        raise DataError(f"a row has {sorted(row)}; expected 'input_ids', and 'labels' with {UNTRAINED} where untrained")
    if len(row["input_ids"]) != len(row["labels"]):
        found = f"{len(row['input_ids'])} input_ids and {len(row['labels'])} labels"
        raise DataError(f"a row has {found}; expected as many, label j being token j or {UNTRAINED}")
    return row["input_ids"]


@dataclass(frozen=True)
class SignalCollator:
    """Another collator, and the columns that an objective reads, as `(b 1)` or `(b t)` beside what it makes.

    A signal of tokens has one number for each trained token of its row, in order. A column that no
    row has is left out: held-out rows need none. Raises DataError for a value that is no finite number,
    a count that does not fit, or a collator that packs rows.
    """

    inner: Collator
    names: frozenset[str]
    dtype: torch.dtype

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = self.inner([{k: v for k, v in row.items() if k not in self.names} for row in rows])
        trained = batch["labels"][:, 1:] != UNTRAINED
        if len(trained) != len(rows):
            found = f"{len(rows)} rows became {len(trained)}"
            raise DataError(
                f"data_collator: {found}; expected one each, since weights belong to rows: turn packing off"
            )
        for name in sorted(self.names):
            if any(name in row for row in rows):
                batch[name] = self.column(name, [_plain(row.get(name)) for row in rows], trained)
        return batch

    def column(self, name: str, values: list[Any], trained: Tensor) -> Tensor:
        """Values of one column and `(b t)` -> `(b 1)` or `(b t)`."""
        axes = SIGNALS[name].axes
        listed = axes == "b t" or ("b t" in axes and isinstance(values[0], list))
        wrong = [value for value in values if not (_are_numbers(value) if listed else _is_number(value))]
        if wrong:
            wanted = "list with one finite number for each trained token" if listed else "finite number"
            raise DataError(f"column '{name}': found {repr(wrong[0])[:80]}; expected a {wanted} in each row")
        return self.per_token(name, values, trained) if listed else torch.tensor(values, dtype=self.dtype)[:, None]

    def per_token(self, name: str, values: list[Any], trained: Tensor) -> Tensor:
        """One number for each trained token -> `(b t)`, 0 elsewhere."""
        out = torch.zeros(trained.shape, dtype=self.dtype)
        for row, (value, where) in enumerate(zip(values, trained, strict=True)):
            given = torch.as_tensor(value, dtype=self.dtype)
            if len(given) != int(where.sum()):
                found = f"a row has {len(given)} numbers for {int(where.sum())} trained tokens"
                raise DataError(f"column '{name}': {found}; expected one for each label that is not {UNTRAINED}")
            out[row, where] = given
        return out


def _plain(value: Any) -> Any:
    """Tensors and arrays, which a dataset may give by its format, as numbers and lists."""
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


class WeightedLoss(Trainer):
    """What `weighted` puts before a trainer: the columns, the counts, the loss, held-out NLL, and what it logs."""

    objective: Objective
    normalize: str
    loss_is_scaled_for_ga = True  # transformers >= 5.19: the loss is divided for the whole step already

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # the trainer's own arguments, whatever trainer this stands before
        self.model_accepts_loss_kwargs = True  # transformers < 5.19: the same
        refuse_trainer(self)
        policy = self._policy(self.model)
        refuse_model(policy)
        self._require_columns()
        inner = self.data_collator
        if inner is default_data_collator or isinstance(inner, DataCollatorWithPadding):  # neither can pad labels
            inner = pad_rows
        names = columns_read(self.objective)
        self.data_collator = cast("Any", SignalCollator(cast("Collator", inner), names, policy.float_dtype))
        self._meter = Meter(self.args.device)

    def _policy(self, model: Any) -> Policy:
        return Policy(self.accelerator.unwrap_model(model), "float32")

    def _require_columns(self) -> None:
        known = getattr(self.train_dataset, "column_names", None)
        if not isinstance(known, list):  # an iterable dataset or one of the user's own: its batches will tell
            return
        for name in sorted(columns_read(self.objective) - set(known)):
            raise DataError(
                f"objective '{self.objective}' reads '{name}', but the training set has no such column; "
                f"{did_you_mean(name, known)}"
            )

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that are kept: the trainer's, and those that the objective reads."""
        super()._set_signature_columns_if_needed()
        kept = cast("list[str]", self._signature_columns)
        self._signature_columns = [*kept, *sorted(columns_read(self.objective).difference(kept))]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and `(2)`: its trained tokens and sequences, over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        here = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            here += count((batch["labels"][:, 1:] != UNTRAINED).float()).cpu()
        return batches, cast("Tensor", self.accelerator.reduce(here.to(device), "sum")).cpu()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`()`: this micro-batch's part of the step's loss, times the number of ranks, whose mean DDP takes.

        `num_items_in_batch` is what `get_batch_samples` counted. No outputs are made to return.
        """
        if return_outputs or num_items_in_batch is None:
            raise ConfigError("compute_loss: found a call outside a training step; use evaluate() for held-out NLL")
        policy = self._policy(model)
        batch = self._batch(inputs, policy)
        counts = Counts(*map(float, num_items_in_batch))
        weigh = Weigher(self.objective, batch, counts.denominator(self.normalize, batch.mask), self._scalars(policy))
        results: list[HeadResult] = []

        def finish(hidden: Tensor, targets: Tensor) -> Tensor:
            vocabulary, names = policy.vocabulary(), head_signals(self.objective)
            segments = weigh.segments
            results.append(weighted_loss(hidden, vocabulary, targets, weigh, segments=segments, signals=names))
            return results[0].loss

        loss = through(model, policy, inputs, batch, finish)
        self._record(batch, results[0], results[0].coefficients * weigh.flat_denominator)
        return loss * self.accelerator.num_processes

    def _batch(self, inputs: Mapping[str, Tensor], policy: Policy) -> Batch:
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = (labels[:, 1:] != UNTRAINED).to(policy.float_dtype)
        signals = {name: inputs[name] for name in columns_read(self.objective) if name in inputs}
        return Batch(ids, mask, torch.arange(len(ids)), {"mask": mask, **signals})

    def _scalars(self, policy: Policy) -> dict[str, float]:
        return {
            "progress": self.state.global_step / self.state.max_steps,
            "log_vocab": math.log(policy.vocabulary().size),
        }

    def _record(self, batch: Batch, result: HeadResult, weights: Tensor) -> None:
        logp, ones = result.logp, torch.ones_like(result.logp)
        sums = dict(weight_statistics(weights[None], ones[None], logp[None]))
        tokens, sequences = count(batch.mask)
        sums |= {"nll": -logp.double().sum(), "tokens": tokens, "forwarded": tokens, "sequences": sequences}
        self._meter.add(sums, weights)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The plain NLL and the weights' statistics beside each training loss; every rank calls this."""
        if "loss" in logs:
            read = self._meter.read(self.accelerator.gather)
            logs |= {name: value for name, value in read.items() if name.startswith(("nll", "weight"))}
        if "loss" in logs or "train_loss" in logs:
            self._meter.reset()
        super().log(logs, start_time)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The batch's NLL per token `()`; of each row its NLL `(b)` and its trained tokens `(b)`."""
        inputs = self._prepare_inputs(inputs)
        policy = self._policy(model)
        batch = self._batch(inputs, policy)

        def finish(hidden: Tensor, targets: Tensor) -> Tensor:
            return distribution_signals(hidden, policy.vocabulary(), targets, ("logp",))["logp"]

        with torch.no_grad(), self.compute_loss_context_manager():
            logp = through(model, policy, inputs, batch, finish)
        mask = batch.mask > 0
        nll = -torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_scatter(mask, logp.double())
        rows, tokens = nll.sum(dim=1), mask.sum(dim=1)
        return rows.sum() / tokens.sum().clamp(min=1), rows, tokens

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The trainer's loop; its `_loss` is the NLL per trained token of the whole set, whatever the objective."""
        out = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, tokens = (float(np.sum(np.hstack(cast("Any", part)))) for part in (out.predictions, out.label_ids))
        cast("dict[str, float]", out.metrics)[f"{metric_key_prefix}_loss"] = total / max(tokens, 1.0)
        return out


def head_signals(objective: Objective) -> tuple[str, ...]:
    """Signals `(b t)` that only the head can measure, besides logp."""
    measured = (n for n in sorted(objective.reads) if SIGNALS[n].source == "head")
    return tuple(n for n in measured if n != "logp" and n not in LOOP_SCALARS)


def through(
    model: Any, policy: Policy, inputs: Mapping[str, Tensor], batch: Batch, finish: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`finish(hidden (n h), targets (n))` of the trained positions, inside the model's own forward pass.

    Inside, so that DDP prepares and finds what the loss depends on. The model is asked for the
    logits of no position; what its trunk gives is kept by a forward hook, for this pass only.
    """
    states: list[Tensor] = []
    trained = batch.mask > 0

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = states.pop()
        if hidden.shape[1] != batch.ids.shape[1]:
            found = f"{hidden.shape[1]} positions for {batch.ids.shape[1]} tokens"
            raise PolicyError(f"model: gives {found}; expected as many (no prompt tuning): use LoRA")
        output["loss"] = finish(hidden[:, :-1][trained], batch.ids[:, 1:][trained])
        return output

    hooks = [
        policy.causal.base_model.register_forward_hook(keep),
        policy.causal.register_forward_hook(replace, prepend=True),
    ]
    nowhere = torch.zeros(0, dtype=torch.int64, device=batch.ids.device)
    given = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
    try:
        return model(**given, use_cache=False, logits_to_keep=nowhere)["loss"]
    finally:
        for hook in hooks:
            hook.remove()


def refuse_trainer(trainer: Trainer) -> None:
    """Raise ConfigError for a setting under which the loss would be wrong, or another one than was asked for."""
    args, engine = trainer.args, str(trainer.accelerator.distributed_type.value)
    unwanted = {
        "compute_loss_func": trainer.compute_loss_func is not None and "the objective is the loss",
        "compute_metrics": trainer.compute_metrics is not None and "it reads logits, which are not made",
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics is not None
        and "it reads logits, which are not made",
        "args.label_smoothing_factor": args.label_smoothing_factor != 0 and "the objective is the loss",
        "args.average_tokens_across_devices=False": not args.average_tokens_across_devices
        and "counts are always of all ranks",
        "args.use_liger_kernel": args.use_liger_kernel and "it replaces the forward pass that the loss is computed in",
        "args.torch_compile": args.torch_compile and "it was not proven with this loss",
        "args.fp16": args.fp16 and "it cannot hold the gradient of a log-probability; use bf16",
        "args.packing": getattr(args, "packing", False) and "weights belong to rows",
        "args.padding_free": getattr(args, "padding_free", False) and "weights belong to rows",
        "args.loss_type": getattr(args, "loss_type", "nll") not in ("nll", None) and "the objective is the loss",
    }
    for name, reason in unwanted.items():
        if reason:
            raise ConfigError(f"{name}: cannot be used with an objective of rwft: {reason}; leave it out")
    if args.n_gpu > 1:
        raise ConfigError(f"one process sees {args.n_gpu} GPUs (DataParallel); start one for each with torchrun")
    if not (engine == "NO" or engine.startswith("MULTI_")) or args.parallelism_config is not None:
        raise ConfigError(f"engine {engine}: was not proven with this loss; use one process, DDP, or `rwft train`")


def refuse_model(policy: Policy) -> None:
    """Raise PolicyError for a model whose log-probabilities, or whose loss, this would get wrong."""
    causal, name = policy.causal, type(policy.causal).__name__
    if "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        raise PolicyError(f"model {name}: its forward takes no logits_to_keep, so all logits would be made")
    if not isinstance(causal.get_output_embeddings(), torch.nn.Linear):  # an adapter stands in its place
        found = type(causal.get_output_embeddings()).__name__
        raise PolicyError(f"model {name}: its output head is a {found}; expected a Linear: leave it out of the adapter")
    if getattr(causal.config, "output_router_logits", False):
        raise PolicyError(f"model {name}: adds a loss of its router; set config.output_router_logits=False")
    check_head(causal)
