"""Signatures as contracts: what a registry refuses, with which sentence, and what objectives and weights must be."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from torch import Tensor

import rwft
from rwft.bounds import AtLeastOne, Bound, Count, Fraction, NonNegative, NotBelow, Positive, PositiveFraction
from rwft.errors import ConfigError, ObjectiveError, UserError, did_you_mean
from rwft.estimator import Counts, count, surrogate_loss, weight_denominator, weight_statistics
from rwft.registry import Registry, parse
from rwft.signals import SIGNALS, seq_mean, seq_sum
from rwft.weighting import Objective, build_objective, check_weights, objective, spelled_out


@pytest.fixture
def registry() -> Registry:
    return Registry("objective", SIGNALS, builtin="rwft.objectives", group="rwft.no_such_group")


def sentence(call: Callable[[], Any], kind: type[Exception] = ObjectiveError) -> str:
    """The message of the error that `call` must raise: one line."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- signatures


def test_a_signature_says_all() -> None:
    def tempered(
        logp: Tensor, reward: Tensor, *, alpha: Positive, scale: float = 2.0, kind: Literal["a", "b"] = "a"
    ) -> Tensor:
        """Doc."""
        return logp * reward * alpha * scale * len(kind)

    entry = parse(tempered, "objective", SIGNALS)
    assert entry.name == "tempered"
    assert entry.reads == ("logp", "reward")
    assert list(entry.settings) == ["alpha", "scale", "kind"]
    assert entry.settings["alpha"].required
    assert entry.settings["alpha"].describe() == "a number > 0"
    assert entry.settings["kind"].describe() == "one of a, b"


def test_the_decorator_gives_the_function_back(registry: Registry) -> None:
    def mine(logp: Tensor) -> Tensor:
        """Mine."""
        return logp

    assert registry(mine) is mine
    assert registry["mine"] is mine
    assert "mine" in registry
    assert list(registry) == ["mine"]
    assert len(registry) == 1


def unknown_signal(logprob: Tensor) -> Tensor:
    return logprob


def positional_default(logp: Tensor, alpha: float = 1.0) -> Tensor:
    return logp * alpha


def untyped_setting(logp: Tensor, *, alpha=1.0):  # type: ignore[no-untyped-def]
    return logp * alpha


def strange_type(logp: Tensor, *, alphas: list[float]) -> Tensor:
    return logp * alphas[0]


def bad_default(logp: Tensor, *, alpha: Positive = 0.0) -> Tensor:
    return logp * alpha


def swallows(logp: Tensor, **rest: float) -> Tensor:
    return logp * len(rest)


def gathers(*signals: Tensor) -> Tensor:
    return signals[0]


REFUSED = [
    (
        unknown_signal,
        r"it reads 'logprob', which nothing provides; did you mean 'logp'\? \(a hyperparameter goes after",
    ),
    (positional_default, r"'alpha' has a default, so it is a setting: put '\*,' before it"),
    (untyped_setting, r"setting 'alpha' has no type; write 'alpha: float = ...'"),
    (strange_type, r"setting 'alphas' has type list\[float\]; expected float, int, bool, str, Literal or a bound"),
    (bad_default, r"default: alpha: found 0.0, expected a number > 0"),
    (swallows, r"'\*rest' says nothing about what it reads; name each parameter"),
    (gathers, r"'\*signals' says nothing about what it reads"),
]


@pytest.mark.parametrize(("function", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_signature_that_is_no_contract_is_refused_where_it_stands(function: Any, message: str) -> None:
    said = sentence(lambda: parse(function, "objective", SIGNALS))
    assert said.startswith(f"objective '{function.__name__}' (")
    assert "test_registry.py:" in said
    import re

    assert re.search(message, said), said


def test_something_that_is_no_function_is_refused() -> None:
    assert "a plain function is expected, found builtin_function_or_method" in sentence(
        lambda: parse(torch.exp, "objective", SIGNALS)
    )


def test_two_functions_of_one_name_are_refused(registry: Registry) -> None:
    def twice(logp: Tensor) -> Tensor:
        return logp

    first = registry(twice)

    def twice(logp: Tensor) -> Tensor:  # type: ignore[no-redef]
        return 2 * logp

    said = sentence(lambda: registry(twice))
    assert "objective 'twice' (" in said
    assert "is already defined at" in said
    assert said.endswith("choose another name")
    assert registry(first) is first  # the same function again is no conflict


# --- settings


SETTINGS = [
    ({"name": "rwr", "temperature": 0}, "objective 'rwr': temperature: found 0.0, expected a number > 0"),
    ({"name": "rwr", "temperature": "hot"}, "objective 'rwr': temperature: found 'hot', expected a number > 0"),
    ({"name": "rwr", "temperature": math.nan}, "objective 'rwr': temperature: found nan, expected a number > 0"),
    ({"name": "rwr", "temperature": True}, "objective 'rwr': temperature: found True, expected a number > 0"),
    ({"name": "rwr", "temperature": None}, "objective 'rwr': temperature: found None, expected a number > 0"),
    (
        {"name": "rwr", "temperatur": 1},
        "objective 'rwr': 'temperatur' is no setting of it; did you mean 'temperature'?",
    ),
    ({"name": "sft", "lr": 1}, "objective 'sft': 'lr' is no setting of it; there are none"),
    ({"name": "gold_s", "horizon": 2.5}, "objective 'gold_s': horizon: found 2.5, expected a whole number >= 1"),
    ({"name": "nft", "prompts": "odd"}, "objective 'nft': prompts: found 'odd', expected one of even, linear, sqrt"),
    ({"name": "prob_power", "low": 1.5}, "objective 'prob_power': low: found 1.5, expected a number in [0, 1]"),
    ({"name": "ppo_clip", "dual": 0.5}, "objective 'ppo_clip': dual: found 0.5, expected a number >= 1 or null"),
]


@pytest.mark.parametrize(("spec", "message"), SETTINGS)
def test_a_wrong_setting_names_itself_and_what_was_expected(spec: Any, message: str) -> None:
    assert sentence(lambda: build_objective(spec)) == message


def test_whole_numbers_become_floats_and_null_stays() -> None:
    objective = build_objective([{"name": "rwr", "temperature": 2}, {"name": "ppo_clip", "dual": None}])
    assert objective.spec[0] == {"name": "rwr", "temperature": 2.0, "clip": 20.0}
    assert isinstance(objective.spec[0]["temperature"], float)
    assert objective.spec[1]["dual"] is None


def test_a_required_setting_must_be_given(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import Tensor\nfrom rwft.bounds import Positive\n"
        "def scaled(reward: Tensor, *, by: Positive) -> Tensor:\n    return reward * by\n"
    )
    said = sentence(lambda: build_objective(f"{file}:scaled"))
    assert said == "objective 'scaled': 'by' must be given: a number > 0"
    weights = build_objective({"name": f"{file}:scaled", "by": 3})({"reward": torch.ones(1, 1)})
    assert weights.item() == 3


@pytest.mark.parametrize(
    ("kind", "inside", "outside", "words"),
    [
        (Positive, [1e-9, math.inf], [0, -1, math.nan], "> 0"),
        (NonNegative, [0, 5], [-1e-9, math.nan], ">= 0"),
        (AtLeastOne, [1], [0.999], ">= 1"),
        (Fraction, [0, 1], [-0.1, 1.1], "in [0, 1]"),
        (PositiveFraction, [1e-9, 1], [0, 1.1], "in (0, 1]"),
        (Count, [1, 7], [0], ">= 1"),
    ],
)
def test_bounds(kind: Any, inside: list[float], outside: list[float], words: str) -> None:
    (bound,) = kind.__metadata__
    assert all(value in bound for value in inside)
    assert not any(value in bound for value in outside)
    assert str(bound) == words


def test_open_upper_bounds_say_so() -> None:
    assert str(Bound(high=2, open_high=True)) == "< 2"
    assert str(Bound(0, 1, open_high=True)) == "in [0, 1)"
    assert 1 not in Bound(0, 1, open_high=True)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "prob_power", "low": 0.5, "high": 0.2}, "high: found 0.2, expected at least low, which is 0.5"),
        ({"name": "iw_sft_token", "high": 0.1}, "high: found 0.1, expected at least low, which is 0.2"),
        ({"name": "iw_sft_token", "low": 3}, "high: found 1.8, expected at least low, which is 3.0"),
        ({"name": "idft", "low": 2.5}, "high: found 2.0, expected at least low, which is 2.5"),
        ({"name": "pear", "low": 11.0}, "high: found 10.0, expected at least low, which is 11.0"),
        ({"name": "pear", "delta_low": 0.5}, "delta_high: found 0.3, expected at least delta_low, which is 0.5"),
    ],
)
def test_bounds_that_cross(spec: dict[str, Any], says: str) -> None:
    assert sentence(lambda: build_objective(spec)) == f"objective '{spec['name']}': {says}"


def test_bounds_may_meet() -> None:
    build_objective({"name": "iw_sft_token", "low": 1.0, "high": 1.0})
    entry = parse(_between, "objective", {"logp": ""})
    assert entry.settings["high"].describe() == "a number > 0, not below low"


def _between(logp: Tensor, *, low: float = 0.0, high: Annotated[Positive, NotBelow("low")] = 1.0) -> Tensor:
    return logp.clamp(low, high)


def test_a_bound_by_a_setting_that_is_none() -> None:
    def lost(logp: Tensor, *, high: Annotated[float, NotBelow("lwo")] = 1.0) -> Tensor:
        return logp.clamp(max=high)

    said = sentence(lambda: parse(lost, "objective", {"logp": ""}))
    assert said.endswith("'high' is not below 'lwo', which is no setting")


# --- where objectives are found


def test_a_misspelt_name() -> None:
    said = sentence(lambda: build_objective("iwsft"))
    assert said.startswith("objective 'iwsft' is unknown; did you mean 'iw_sft'? (one of your own is named")


def test_a_name_far_from_all_lists_them_all() -> None:
    said = sentence(lambda: build_objective("zzzzzzzz"))
    assert "known: a_lol, " in said
    assert "dft" in said


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    said = sentence(lambda: build_objective("nowhere.py:f"))
    assert said.startswith("objective file 'nowhere.py' does not exist")
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    assert f"{broken}:1: " in sentence(lambda: build_objective(f"{broken}:f"))
    failing = tmp_path / "failing.py"
    failing.write_text("1 / 0\n")
    assert "importing it failed: ZeroDivisionError: division by zero" in sentence(
        lambda: build_objective(f"{failing}:f")
    )
    other = tmp_path / "other.py"
    other.write_text("def weigh(logp):\n    return logp\n")
    assert sentence(lambda: build_objective(f"{other}:weight")).endswith(
        "has no function 'weight'; did you mean 'weigh'?"
    )


def test_a_file_is_found_again_after_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for factor in (2, 3):
        file.write_text(
            f"from torch import Tensor\ndef mine(reward: Tensor) -> Tensor:\n    return {factor} * reward\n"
        )
        objective = build_objective(f"{file}:mine")
        assert objective({"reward": torch.ones(1, 1)}).item() == factor
        assert "sha256:" in objective.factors[0].entry.origin


def test_a_decorated_function_of_a_file_is_found_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rwft.objective, "_entries", {name: rwft.objective.entry(name) for name in rwft.objective})
    file = tmp_path / "decorated.py"
    file.write_text(
        "from torch import Tensor\nimport rwft\n"
        "@rwft.objective\ndef decorated_once(reward: Tensor) -> Tensor:\n    return reward\n"
    )
    origin = build_objective(f"{file}:decorated_once").factors[0].entry.origin
    assert "sha256:" in origin
    assert build_objective("decorated_once").factors[0].entry.origin == origin


def test_a_module_is_named_by_its_package() -> None:
    assert build_objective("rwft.objectives.imitation:dft").reads == {"logp"}
    assert "module 'no.such.module' cannot be imported" in sentence(lambda: build_objective("no.such.module:f"))


def test_a_plugin_is_found_through_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("theirs", "rwft.objectives.imitation:dft", "rwft.objectives")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    assert rwft.objective.plugins() == ["theirs"]
    assert rwft.objective.entry("theirs").reads == ("logp",)
    source = Path(rwft.__file__).with_name("objectives") / "imitation.py"
    assert rwft.objective.entry("theirs").origin.endswith(hashlib.sha256(source.read_bytes()).hexdigest())
    assert "did you mean 'theirs'" in sentence(lambda: build_objective("their"))


# --- objectives and their products


EACH_ONCE = "expected settings by name, each once, such as rwr(temperature=0.5)"
AS_PRINTED: list[tuple[Any, Any]] = [
    ("dft * rwr(temperature=0.5)", ["dft", {"name": "rwr", "temperature": 0.5}]),
    ("rwr(temperature=0.5, clip=3)", {"name": "rwr", "temperature": 0.5, "clip": 3}),
    (" dft*filtered_bc ", ["dft", "filtered_bc"]),
    (["dft * sft", "rwr(temperature=2)"], ["dft", "sft", {"name": "rwr", "temperature": 2}]),
    ("ppo_clip(dual=null)", {"name": "ppo_clip", "dual": None}),
    (
        "ppo_clip(dual=None) * rwr(clip=inf)",
        [{"name": "ppo_clip", "dual": None}, {"name": "rwr", "clip": float("inf")}],
    ),
    ("rwr()", "rwr"),
    ("my (own)/file.py:f", "my (own)/file.py:f"),
    ({"name": "rwr", "clip": 3}, {"name": "rwr", "clip": 3}),
]


@pytest.mark.parametrize(("text", "meant"), AS_PRINTED, ids=[str(text) for text, _ in AS_PRINTED])
def test_an_objective_may_be_written_as_it_is_printed(text: Any, meant: Any) -> None:
    assert spelled_out(text) == meant


@pytest.mark.parametrize("name", list(objective))
def test_every_setting_is_read_as_it_is_printed(name: str) -> None:
    settings = objective.entry(name).settings.values()
    given = {s.name: 1.0 if s.required else s.default for s in settings}
    text = f"dft * {name}({', '.join(f'{key}={value}' for key, value in given.items())})"
    assert build_objective(text).spec == [{"name": "dft"}, {"name": name, **given}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dft * rwr(0.5)", "objective 'rwr(0.5)': found '0.5', " + EACH_ONCE),
        ("rwr(clip=)", "objective 'rwr(clip=)': found 'clip=', " + EACH_ONCE),
        ("dft * rwr(temprature=1)", "objective 'rwr': 'temprature' is no setting of it; did you mean 'temperature'?"),
        ("rwr(clip=1, clip=2)", "objective 'rwr(clip=1, clip=2)': found 'clip=2', " + EACH_ONCE),
        ("rwr(name=dft)", "objective 'rwr(name=dft)': found 'name=dft', " + EACH_ONCE),
        ("rwr(temperature=hot)", "objective 'rwr': temperature: found 'hot', expected a number > 0"),
    ],
)
def test_a_mistake_in_an_objective_as_it_is_printed(text: str, message: str) -> None:
    assert sentence(lambda: build_objective(text)) == message


def test_specs_that_are_none() -> None:
    assert "an empty list; name at least one" in sentence(lambda: build_objective([]), ConfigError)
    bad: list[Any] = [3, None, [3], {"temperature": 1}, [["dft"]]]
    for spec in bad:
        said = sentence(lambda spec=spec: build_objective(spec), ConfigError)
        assert "; expected a name or a mapping such as {name: rwr, temperature: 0.5}" in said


def test_a_product_reads_what_its_factors_read() -> None:
    objective = build_objective(["dft", {"name": "rwr", "temperature": 0.5}])
    assert objective.reads == {"logp", "reward"}
    assert objective.token_local
    assert str(objective) == "dft * rwr(temperature=0.5)"
    assert build_objective(objective.spec).spec == objective.spec
    assert build_objective(objective) is objective
    assert (build_objective("dft") * build_objective("sft")).reads == {"logp"}


@pytest.mark.parametrize(
    ("spec", "local"), [("dft", True), ("iw_sft", False), ("rwr_group", False), ("awr", True), ("sft", True)]
)
def test_locality_follows_from_the_signature(spec: str, local: bool) -> None:
    assert build_objective(spec).token_local == local


def test_a_missing_signal_is_named() -> None:
    said = sentence(lambda: build_objective("iw_sft")({"logp": torch.zeros(1, 2), "mask": torch.ones(1, 2)}))
    assert said == "objective 'iw_sft' reads 'ref_logp', which was not given"


def test_signals_arrive_detached_and_weights_leave_without_a_gradient() -> None:
    seen: list[bool] = []

    def watches(logp: Tensor) -> Tensor:
        seen.append(logp.requires_grad)
        return logp.exp()

    entry = parse(watches, "objective", SIGNALS)
    from rwft.weighting import Factor

    weights = Objective((Factor(entry, {}),))({"logp": torch.zeros(1, 2, requires_grad=True)})
    assert seen == [False]
    assert not weights.requires_grad


@pytest.mark.parametrize("shape", [(), (3, 1), (3, 5)])
def test_weights_of_a_right_shape(shape: tuple[int, ...]) -> None:
    check_weights(torch.ones(shape), 3, 5, "mine")


@pytest.mark.parametrize("shape", [(3,), (5,), (1,), (5, 3), (1, 5), (3, 4), (3, 3), (3, 5, 1), (2, 1)])
def test_weights_of_a_wrong_shape_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    said = sentence(lambda: check_weights(torch.ones(shape), 3, 5, "mine"))
    assert said.startswith(f"objective 'mine' returned weights of shape {shape}; expected (), (3, 1) or (3, 5)")
    assert ("keepdim=True" in said) == (len(shape) == 1)


def test_a_row_vector_as_long_as_the_batch_is_refused_even_when_it_would_broadcast() -> None:
    """b = t: `(b,)` would give token t the weight of sequence t."""
    said = sentence(lambda: check_weights(torch.ones(4), 4, 4, "mine"))
    assert "returned weights of shape (4,)" in said


def test_weights_that_are_no_tensor() -> None:
    assert "returned float; a tensor of weights is expected" in sentence(lambda: check_weights(1.0, 2, 2, "mine"))


# --- the estimator


LOGP = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], dtype=torch.float64)
MASK = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)


def test_the_surrogate_loss_by_hand() -> None:
    """-(1/2) (2 * -1 + 3 * -2 + 4 * -5) = 14."""
    weights = torch.tensor([[2.0, 3.0, 99.0], [99.0, 4.0, 99.0]], dtype=torch.float64)
    assert surrogate_loss(LOGP, weights, MASK, 2.0).item() == 14
    assert surrogate_loss(LOGP, torch.tensor(1.0), MASK, 4.0).item() == 2  # (1 + 2 + 5) / 4
    assert surrogate_loss(LOGP, torch.tensor([[1.0], [2.0]]), MASK, 1.0).item() == 13  # 1 + 2 + 2 * 5


def test_a_fractional_mask_scales_and_a_denominator_per_row_divides() -> None:
    assert surrogate_loss(LOGP, torch.tensor(1.0), 0.5 * MASK, 1.0).item() == 4
    per_row = torch.tensor([[2.0], [5.0]], dtype=torch.float64)
    assert surrogate_loss(LOGP, torch.tensor(1.0), MASK, per_row).item() == 2.5  # 3/2 + 5/5


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logp", "weights", "both"])
def test_garbage_under_mask_zero_reaches_neither_loss_nor_gradient(garbage: float, where: str) -> None:
    logp = LOGP.clone()
    weights = torch.ones(2, 3, dtype=torch.float64)
    if where != "weights":
        logp[MASK == 0] = garbage
    if where != "logp":
        weights[MASK == 0] = garbage
    logp.requires_grad_()
    loss = surrogate_loss(logp, weights, MASK, 1.0)
    loss.backward()
    assert loss.item() == 8
    assert logp.grad is not None
    assert torch.equal(logp.grad, -MASK)


def test_the_surrogate_loss_is_differentiable_in_logp_only() -> None:
    logp, weights = LOGP.clone().requires_grad_(), torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    surrogate_loss(logp, weights, MASK, 1.0).backward()
    assert weights.grad is None


def test_the_surrogate_loss_refuses_a_wrong_shape() -> None:
    said = sentence(lambda: surrogate_loss(LOGP, torch.ones(2), MASK, 1.0))
    assert "returned weights of shape (2,); expected (), (2, 1) or (2, 3)" in said


def test_counts_and_denominators_by_hand() -> None:
    empty = torch.cat([MASK, torch.zeros(1, 3, dtype=torch.float64)])
    assert count(empty).tolist() == [3, 2]  # a row without trained tokens is no sequence
    counts = Counts(tokens=10, sequences=4)
    assert counts.denominator("token", MASK).item() == 10
    assert counts.denominator("sequence", empty).flatten().tolist() == [8, 4, 4]  # 2 * 4, 1 * 4, and no 0
    assert counts.denominator("sequence_sum", MASK).item() == 4
    assert counts.denominator("weight", MASK).item() == 1
    said = sentence(lambda: counts.denominator("tokens", MASK), ConfigError)
    assert said == "train.normalize: 'tokens' is unknown; known: token, sequence, sequence_sum, weight"


def test_the_weight_normaliser_refuses_negative_weights() -> None:
    assert weight_denominator(5.0, 0.0) == 5
    assert weight_denominator(0.0, 0.0) == 1
    said = sentence(lambda: weight_denominator(5.0, -0.25))
    assert said.startswith("train.normalize: weight needs weights >= 0, but one is -0.25")


def test_weight_statistics_by_hand() -> None:
    """Trained weights 2, -3 and -1; the second is at p = e^-2, the third at e^-5 < 0.01."""
    weights = torch.tensor([[2.0, -3.0, 99.0], [99.0, -1.0, 99.0]], dtype=torch.float64)
    found = {name: value.item() for name, value in weight_statistics(weights, MASK, LOGP).items()}
    assert found == {"w_sum": -2, "w_abs": 6, "w_square": 14, "w_negative": 4, "w_negative_improbable": 1}


# --- the small things


def test_reductions_over_time_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, math.nan], [math.inf, 5.0, 7.0], [4.0, 0.0, 9.0], [math.nan, math.nan, math.nan]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert seq_sum(x, mask).tolist() == [[4.0], [12.0], [4.0], [0.0]]
    assert seq_mean(x, mask).tolist() == [[2.0], [6.0], [4.0], [0.0]]


def test_did_you_mean() -> None:
    assert did_you_mean("tempature", ["temperature", "clip"]) == "did you mean 'temperature'?"
    assert did_you_mean("xyz", ["temperature", "clip"]) == "known: clip, temperature"
    assert did_you_mean("xyz", []) == "there are none"


def test_mistakes_of_users_end_in_status_two() -> None:
    assert issubclass(ObjectiveError, UserError)
    assert ObjectiveError.exit_status == 2
