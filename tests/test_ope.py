"""Off-policy estimates against enumerated values, naive sums, and the closed forms of the embedded task."""

from __future__ import annotations

import io
import itertools
import json
import math
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from rwft.config import Config, resolve
from rwft.data.rows import Rows, open_rows, write_rows
from rwft.data.tasks import Behavior, caesar, write_task
from rwft.errors import DataError
from rwft.evaluate import evaluate, evaluate_command
from rwft.ope import Logged, estimate, logged_under, others_mean, student_quantile
from tests.tiny import tiny, write_rollouts

Floats = NDArray[np.float64]
X, A = 5, 3  # prompts and letters of the tabular problem: completions are two letters long


def softmax(scores: Floats) -> Floats:
    e = np.exp(scores)
    return e / e.sum(axis=-1, keepdims=True)


class Tabular:
    """Two-letter completions of five prompts under two policies, with a reward for each letter."""

    def __init__(self, apart: float) -> None:
        draw = np.random.default_rng(3)
        first, second = draw.normal(size=(X, A)), draw.normal(size=(X, A, A))
        self.mu = softmax(first), softmax(second)
        self.pi = (
            softmax(first + apart * draw.normal(size=(X, A))),
            softmax(second + apart * draw.normal(size=(X, A, A))),
        )
        self.reward = draw.uniform(size=(X, A)), draw.uniform(size=(X, A, A))

    def value(self) -> float:
        """Expected sum of rewards of pi over equally likely prompts, by enumeration."""
        total = 0.0
        for x, a, b in itertools.product(range(X), range(A), range(A)):
            total += self.pi[0][x, a] * self.pi[1][x, a, b] * (self.reward[0][x, a] + self.reward[1][x, a, b]) / X
        return total

    def log(self, prompts: int, each: int, draw: np.random.Generator) -> Logged:
        x = np.repeat(draw.integers(X, size=prompts), each)
        a = (draw.random((len(x), 1)) > self.mu[0][x].cumsum(axis=1)[:, :-1]).sum(axis=1)
        b = (draw.random((len(x), 1)) > self.mu[1][x, a].cumsum(axis=1)[:, :-1]).sum(axis=1)
        one = np.log(self.pi[0][x, a] / self.mu[0][x, a])
        two = one + np.log(self.pi[1][x, a, b] / self.mu[1][x, a, b])
        steps = np.stack([self.reward[0][x, a], self.reward[1][x, a, b]], axis=1)
        steps += draw.normal(size=steps.shape) * 0.3
        prompt = np.repeat(np.arange(prompts), each)
        return Logged(steps.sum(axis=1), prompt, two, steps, np.stack([one, two], axis=1))


@pytest.mark.parametrize(("apart", "prompts", "each"), [(0.5, 60, 3), (1.0, 160, 1), (1.0, 50, 4)])
def test_estimates_are_right_on_average_and_intervals_cover(apart: float, prompts: int, each: int) -> None:
    problem, draw, times = Tabular(apart), np.random.default_rng(prompts), 400
    truth = problem.value()
    found = [estimate(problem.log(prompts, each, draw)) for _ in range(times)]
    used = [f for f in found if f.refused is None]
    assert len(used) > 0.9 * times
    for name in ("self_normalized", "doubly_robust", "per_decision"):
        values = np.array([f.estimates[name].value for f in used])
        covered = np.mean([f.estimates[name].low <= truth <= f.estimates[name].high for f in used])
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values)), name
        assert 0.91 <= covered <= 0.985, (name, covered)  # 0.95, with a standard error of 0.011
    behavior = np.mean([f.behavior.value for f in found])
    assert abs(behavior - truth) > 0.02  # the logs' own reward is another number


def test_more_logs_come_nearer() -> None:
    problem = Tabular(1.0)
    found = estimate(problem.log(40_000, 2, np.random.default_rng(0)))
    for name, one in found.estimates.items():
        assert one.value == pytest.approx(problem.value(), abs=0.01), name
        assert one.high - one.low < 0.03
    assert found.mean_ratio == pytest.approx(1.0, abs=0.02)


def test_doubly_robust_correction_is_unbiased_by_enumeration() -> None:
    mu, pi, reward = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7]), np.array([1.0, -2.0, 5.0])
    total = 0.0
    for pair in itertools.product(range(3), repeat=2):  # both completions that were logged for one prompt
        drawn = list(pair)
        rewards = np.array([*reward[drawn], 9.0])  # a second prompt, with one completion
        baseline = others_mean(rewards, np.array([0, 0, 1]))[:2]
        w = pi[drawn] / mu[drawn]
        total += float(mu[drawn].prod() * (baseline + w * (rewards[:2] - baseline)).mean())
    assert total == pytest.approx(float(pi @ reward), abs=1e-12)


def test_baselines_by_hand() -> None:
    rewards, prompt = np.array([1.0, 2.0, 6.0, 10.0, 4.0, 8.0]), np.array([5, 5, 5, 2, 9, 9])
    # means of the prompts: 3, 10, 6; prompt 2 has one row, so it gets (3 + 6) / 2
    assert others_mean(rewards, prompt).tolist() == [4.0, 3.5, 1.5, 4.5, 8.0, 4.0]


def naive(logged: Logged) -> dict[str, float]:
    """The three estimators as double sums over prompts and their rows."""
    assert logged.step_reward is not None
    assert logged.step_log_ratio is not None
    groups = [np.flatnonzero(logged.prompt == g) for g in sorted(set(logged.prompt.tolist()))]
    w = [math.exp(x) for x in logged.log_ratio]
    top = bottom = base = corrected = 0.0
    for rows in groups:
        for i in rows:
            others = [logged.reward[j] for j in rows if j != i]
            b = sum(others) / len(others)
            share = 1 / len(rows) / len(groups)
            top, bottom = top + share * w[i] * logged.reward[i], bottom + share * w[i]
            base, corrected = base + share * b, corrected + share * w[i] * (logged.reward[i] - b)
    steps = 0.0
    for k in range(logged.step_reward.shape[1]):
        ratio = [math.exp(x) for x in logged.step_log_ratio[:, k]]
        up = sum(ratio[i] * logged.step_reward[i, k] / len(rows) for rows in groups for i in rows)
        steps += up / sum(ratio[i] / len(rows) for rows in groups for i in rows)
    return {"self_normalized": top / bottom, "doubly_robust": base + corrected / bottom, "per_decision": steps}


def uneven(prompts: int) -> Logged:
    """Prompts with two to four rows each."""
    draw = np.random.default_rng(8)
    prompt = np.repeat(np.arange(prompts) * 7, draw.integers(2, 5, size=prompts))
    n = len(prompt)
    steps, gaps = draw.normal(size=(n, 3)), draw.normal(size=(n, 3)) * 0.4
    return Logged(draw.normal(size=n), prompt, gaps[:, 2] + draw.normal(size=n) * 0.1, steps, gaps)


def without(logged: Logged, g: int) -> Logged:
    keep = logged.prompt != g
    assert logged.step_reward is not None
    assert logged.step_log_ratio is not None
    rest = logged.step_reward[keep], logged.step_log_ratio[keep]
    return Logged(logged.reward[keep], logged.prompt[keep], logged.log_ratio[keep], *rest)


def test_values_and_intervals_against_naive_sums() -> None:
    logged = uneven(30)
    found, expected = estimate(logged), naive(logged)
    prompts = sorted(set(logged.prompt.tolist()))
    left = [naive(without(logged, g)) for g in prompts]
    sums = [np.array([np.exp(x[logged.prompt == g]).mean() for g in prompts]) for x in
            (logged.log_ratio, *np.asarray(logged.step_log_ratio).T)]  # fmt: skip
    effective = min(s.sum() ** 2 / (s**2).sum() for s in sums)
    for name, value in expected.items():
        one = found.estimates[name]
        assert one.value == pytest.approx(value, rel=1e-12), name
        spread = np.array([item[name] for item in left])
        error = math.sqrt((len(prompts) - 1) * spread.var())
        assert one.high - one.value == pytest.approx(student_quantile(effective - 1) * error, rel=1e-9), name
        assert one.value - one.low == pytest.approx(one.high - one.value, rel=1e-9)
    assert found.ess_prompts == pytest.approx(effective)
    size = {g: (logged.prompt == g).sum() for g in prompts}
    share = [math.exp(x) / size[g] for x, g in zip(logged.log_ratio, logged.prompt.tolist(), strict=True)]
    assert found.mean_ratio == pytest.approx(sum(share) / len(prompts))
    assert found.largest == pytest.approx(max(share) / sum(share))


def test_effective_rows_by_hand() -> None:
    ratios = np.array([3.0, 1.0] * 40)  # (160)^2 / 400 = 64 of 80
    found = estimate(Logged(np.ones(80), np.repeat(np.arange(40), 2), np.log(ratios / 2)))
    assert found.ess == pytest.approx(64.0)
    assert found.ess_prompts == pytest.approx(40.0)
    assert found.mean_ratio == pytest.approx(1.0)


@pytest.mark.parametrize(("freedom", "quantile"), [(9, 2.262157), (14, 2.144787), (29, 2.045230), (99, 1.984217)])
def test_student_quantile_is_the_table(freedom: float, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=3e-4)


def test_too_little_overlap_is_refused_with_its_size() -> None:
    draw = np.random.default_rng(0)
    found = estimate(Logged(draw.random(400), np.repeat(np.arange(100), 4), draw.normal(size=400) * 4))
    assert found.estimates == {}
    assert found.ess < 30
    assert found.refused is not None
    assert f"effective sample size {found.ess:.1f} of 400 rows" in found.refused


@pytest.mark.parametrize(("ratio", "refused"), [(0.45, True), (0.55, False), (1.9, False), (2.1, True)])
def test_a_policy_that_writes_elsewhere_is_refused_though_its_ratios_are_even(ratio: float, refused: bool) -> None:
    found = estimate(Logged(np.ones(80), np.arange(80) // 2, np.full(80, math.log(ratio))))
    assert found.ess == pytest.approx(80.0)
    assert found.mean_ratio == pytest.approx(ratio)
    assert (found.refused is not None) == refused
    assert not refused or "the policy writes what the logs do not hold" in str(found.refused)


def test_ratios_beyond_floating_point_are_refused_not_nan() -> None:
    found = estimate(Logged(np.ones(80), np.arange(80) // 2, np.full(80, 2000.0)))
    assert found.refused is not None
    assert math.isfinite(found.mean_ratio)
    assert estimate(Logged(np.ones(80), np.arange(80) // 2, np.full(80, -2000.0))).mean_ratio == 0.0


def test_too_few_prompts() -> None:
    with pytest.raises(DataError, match="found 9 held-out prompts, expected at least 10"):
        estimate(Logged(np.ones(90), np.arange(90) % 9, np.zeros(90)))


def test_the_embedded_task_has_a_closed_form(tmp_path: Path) -> None:
    """Logs of a policy with skill 0.9 tell how often one with skill 0.8 succeeds; and one with 0.97."""
    for skill in (0.8, 0.97):
        other = Behavior(skill)
        truth = float(np.mean([other.right(letter) for letter in string.ascii_lowercase])) ** 4
        covered = 0
        for seed in range(30):
            files = write_task("caesar", tmp_path / f"{seed}", rows=1, heldout=150, length=4, skill=0.9, seed=seed)
            reward: list[float] = []
            ratio: list[float] = []
            for row in map(json.loads, files.heldout.read_text().splitlines()):
                right = caesar(row["prompt"][:-1])
                for written, score, logp in zip(row["completions"], row["rewards"], row["logprobs"], strict=True):
                    reward.append(score)
                    ratio.append(sum(other.logp(written, right)) - sum(logp))
            found = estimate(Logged(np.array(reward), np.arange(600) // 4, np.array(ratio)))
            one = found.estimates["self_normalized"]
            covered += one.low <= truth <= one.high
        assert covered >= 26, skill  # 28.5 of 30 on average


# -- rows of data and a model ------------------------------------------------------------------------------------------


def stored(folder: Path, *rows: dict[str, Any]) -> Rows:
    blank = {"weight": None, "step_position": None, "step_reward": None, "reward": 1.0, "value": None, "group": "g"}
    blank |= {"file": "f", "row": 1, "prompt": "p", "answer": None}
    write_rows([blank | row for row in rows], folder / "rows.arrow")
    return open_rows(folder / "rows.arrow", "x")


def test_ratios_of_rows_by_hand(tmp_path: Path) -> None:
    rows = stored(
        tmp_path,
        {
            "ids": [1, 2, 3, 4, 5, 6],
            "mask": [False, True, True, False, True],
            "behavior_logp": [0.0, -1.0, -2.0, 0.0, -4.0],
            "step_position": [1, 4],
            "step_reward": [0.5, 2.0],
        },
        {
            "ids": [1, 2, 3],
            "mask": [True, True],
            "behavior_logp": [-1.0, -1.0],
            "step_position": [0],
            "step_reward": [3.0],
        },
    )
    found = logged_under(rows, [np.array([-0.5, -1.0, -3.0]), np.array([-2.0, -5.0])])
    assert found.log_ratio.tolist() == [0.5 + 1.0 + 1.0, -1.0 - 4.0]
    assert found.step_reward is not None
    assert found.step_log_ratio is not None
    assert found.step_reward.tolist() == [[0.5, 2.0], [3.0, 0.0]]
    assert found.step_log_ratio.tolist() == [[0.5, 2.5], [-1.0, -1.0]]


def test_rows_without_steps_have_no_per_decision_estimate(tmp_path: Path) -> None:
    row = {"ids": [1, 2], "mask": [True], "behavior_logp": [-1.0]}
    steps = {"step_position": [0], "step_reward": [1.0]}
    assert logged_under(stored(tmp_path, row, row | steps), [np.zeros(1), np.zeros(1)]).step_reward is None


def own_logs(folder: Path, shift: float = 0.0) -> Config:
    """A config whose rows were logged with the policy's own log-probabilities, `shift` added to each row's first."""
    from rwft.data.batching import Collate
    from rwft.data.logprobs import row_logp
    from rwft.data.prepare import prepare
    from rwft.policy import load_policy, load_tokenizer

    path = write_rollouts(folder / "rollouts.jsonl", prompts=40)
    config = tiny(folder, "data.eval_fraction=0.5")
    policy = load_policy(config.model, config.train.seed, torch.device("cpu"))
    data = prepare(config.data, load_tokenizer(config.model), frozenset(), folder / "first")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert data.held_out is not None
    for rows in (data.train, data.held_out):
        collate = Collate(rows, frozenset(), pad=0, dtype=torch.float64)
        logp = row_logp(
            policy, collate, rows.length, np.arange(len(rows)), device=torch.device("cpu"), tick=lambda _: None
        )
        seen: dict[int, int] = {}
        for i in range(len(rows)):
            number = rows.source(i).row
            place = seen[number] = seen.get(number, -1) + 1
            values = [float(v) for v in logp[i]]
            lines[number - 1]["logprobs"][place] = [values[0] + shift, *values[1:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def test_a_policy_on_its_own_logs(tmp_path: Path) -> None:
    config = own_logs(tmp_path)
    assert evaluate(config).off_policy is None
    result = evaluate(resolve(_plain(config), ["evaluate.off_policy=true"]))
    found = result.off_policy
    assert found is not None
    assert found.refused is None
    assert found.mean_ratio == pytest.approx(1.0, abs=1e-9)
    assert found.prompts >= 10
    assert found.estimates["self_normalized"].value == pytest.approx(found.behavior.value, abs=1e-9)
    assert found.estimates.keys() == {"self_normalized", "doubly_robust"}
    assert result.to_json()["off_policy"]["estimates"]["self_normalized"]["value"] == pytest.approx(
        found.behavior.value, abs=1e-9
    )
    assert result.held_out == evaluate(config).held_out


def _plain(config: Config) -> dict[str, Any]:
    from rwft.config import as_dict

    return as_dict(config)


def test_log_probabilities_of_something_else(tmp_path: Path) -> None:
    config = own_logs(tmp_path, shift=-1.0)
    found = evaluate(resolve(_plain(config), ["evaluate.off_policy=true"])).off_policy
    assert found is not None
    assert found.mean_ratio == pytest.approx(math.e, rel=1e-9)
    assert found.refused is not None
    assert "mean ratio 2.72" in found.refused


def test_the_table_says_it(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_plain(own_logs(tmp_path))))
    console = Console(file=io.StringIO(), record=True, width=200)
    evaluate_command(str(tmp_path / "config.yaml"), ["evaluate.off_policy=true"], console)
    text = console.export_text()
    assert "off-policy: self_normalized" in text
    assert "off-policy: doubly_robust" in text
    assert "off-policy: mean ratio (1 if covered)" in text


def test_rows_without_log_probabilities(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path / "rollouts.jsonl", prompts=40)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in x.items() if k != "logprobs"}) + "\n" for x in lines))
    says = "jsonl:1: no log-probabilities of the behaviour policy, which the objective or evaluate.off_policy reads"
    with pytest.raises(DataError, match=says):
        evaluate(tiny(tmp_path, "evaluate.off_policy=true", "data.eval_fraction=0.5"))


def test_rows_without_rewards(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts.jsonl", prompts=40)
    (tmp_path / "mine.py").write_text(
        "from rwft import Example\n\n"
        "def rows(row, source):\n"
        "    yield Example(row['prompt'], row['completions'][0], source, behavior_logp=row['logprobs'][0])\n"
    )
    with pytest.raises(DataError, match=r"jsonl:\d+: no reward, which evaluate.off_policy needs of every held-out row"):
        evaluate(
            tiny(
                tmp_path, "evaluate.off_policy=true", "data.eval_fraction=0.5", f"data.adapter={tmp_path}/mine.py:rows"
            )
        )


def test_training_rows_in_a_file_of_their_own_need_no_log_probabilities(tmp_path: Path) -> None:
    own_logs(tmp_path)
    rows = [{"prompt": "a>", "completion": "b"}]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = str(tmp_path / "rollouts.jsonl")
    adapted = ("data.eval_fraction=0.0", f"data.eval_path={held}", f"data.path={tmp_path / 'bare.jsonl'}")
    found = evaluate(tiny(tmp_path, "evaluate.off_policy=true", *adapted)).off_policy
    assert found is not None
    assert found.prompts == 40


def test_the_page_on_metrics_names_every_figure() -> None:
    from rwft.metrics import Meter

    page = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
    meter = Meter(torch.device("cpu"))
    meter.steps = 1
    meter.add({name: torch.ones(()) for name in meter.sums}, torch.ones(1))
    figures = meter.read(lambda tensor, how: tensor, lambda tensor: tensor)
    assert len(figures) >= 13
    for name in [*figures, *estimate(uneven(30)).estimates]:
        assert f"`{name}`" in page, name
