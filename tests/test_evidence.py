"""The evidence in its smallest form: closed forms worked by hand, every part run once, page and stored results."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.evidence import bandit, logs, page, statistics, story, task
from rwft.data.characters import character_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "evidence" / "results"


# --- bandits

TILTED = 0.71124  # 0.25 e^2 / (0.25 e^2 + 0.75)


def two_arms(share: float) -> bandit.Bandit:
    return bandit.Bandit(np.array([[share, 1 - share]]), np.array([[1.0, 0.0]]))


def case(name: str, problem: bandit.Bandit) -> bandit.Case:
    (found,) = [c for c in bandit.cases(problem) if c.name == name]
    return found


@pytest.mark.parametrize(
    ("name", "good"),
    [("sft", 0.25), ("rwr", TILTED), ("awr", TILTED),
     ("dft", 0.0), ("filtered_bc", 1.0), ("topr (rewards 1, -1)", 1.0), ("dro, data by another policy", TILTED)],
)  # fmt: skip
def test_limits_of_two_arms_are_those_worked_by_hand(name: str, good: float) -> None:
    """mu = (0.25, 0.75), r = (1, 0): the tilt by e^{1 / 0.5} gives 0.25 e^2 / (0.25 e^2 + 0.75) = 0.71124."""
    problem = two_arms(0.25)
    limit = case(name, problem).limit
    assert limit is not None
    np.testing.assert_allclose(limit, [[good, 1 - good]], atol=1e-4)


@pytest.mark.parametrize("name", ["sft", "rwr", "awr", "dro, data by another policy"])
def test_training_ends_at_the_limit(name: str) -> None:
    problem = two_arms(0.25)
    found = bandit.follow(problem, case(name, problem), 300)
    expected = 0.25 if name == "sft" else TILTED
    assert found["reward"] == pytest.approx(expected, abs=1e-4)
    assert found["gap"] < 1e-6


def test_water_filling_by_hand() -> None:
    """c = (0.5, 0.2, -0.1), sum 0.6: (0.5 - tau) + (0.2 - tau) = 0.6 at tau = 0.05, so 0.75 and 0.25."""
    np.testing.assert_allclose(bandit.water_filling(np.array([[0.5, 0.2, -0.1]])), [[0.75, 0.25, 0.0]], atol=1e-12)


@pytest.mark.parametrize("start", [0.5, 0.1])
def test_the_time_of_filtered_cloning_has_a_closed_form(start: float) -> None:
    """gap' = 2 m / (1 + e^gap), so gap + e^gap grows by 2 m t."""
    first, last = math.log(start / (1 - start)), math.log(0.99 / 0.01)
    expected = (last + math.exp(last) - first - math.exp(first)) / (2 * 0.3)
    assert bandit.predicted_time("filtered_bc", 0.3, start) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", bandit.RATES)
def test_the_time_to_success_is_the_predicted_one(name: str) -> None:
    """To 90% from 40%, in steps of 0.25."""
    expected = bandit.predicted_time(name, 0.5, 0.4, 0.9)
    assert expected > 4
    assert bandit.measured_time(name, 0.5, 0.4, 0.9) == pytest.approx(expected, abs=0.5)


def test_weighted_imitation_of_the_good_is_the_policy_gradient() -> None:
    assert bandit.iw_is_the_policy_gradient(bandit.problem()) < 1e-14


def test_a_preference_with_noise_ends_at_the_tilted_data() -> None:
    assert bandit.preference(bandit.problem(), 600, True)["gap"] < 1e-4


# --- the embedded task


def test_a_systematic_mistake_is_the_likelier_answer(tmp_path: Path) -> None:
    """'hal>' should be 'ibm'; the mistake is 'jcn'. Log-probabilities are those of the first letter's choice."""
    row = {"prompt": "hale>", "completions": ["a", "b"], "rewards": [0, 0], "answer": "ibmf"}
    good = logs.mistaken(row, 1.0, np.random.default_rng(0))
    bad = logs.mistaken(row, 0.0001, np.random.default_rng(0))
    assert (good["completions"], good["rewards"]) == (["ibmf", "ibmf"], [1.0, 1.0])
    assert (bad["completions"], bad["rewards"]) == (["jcng", "jcng"], [-1.0, -1.0])
    assert bad["logprobs"][0] == [pytest.approx(math.log(0.9999)), 0.0, 0.0, 0.0, 0.0]
    files = logs.write_mistaken(tmp_path, right=0.35, rows=200, heldout=5, completions=4, seed=0)
    rewards = [reward for row in logs.read(files.train) for reward in row["rewards"]]
    assert np.mean(np.array(rewards) > 0) == pytest.approx(0.35, abs=0.05)
    assert set(rewards) == {1.0, -1.0}


def test_the_weak_start_knows_a_little_of_the_task() -> None:
    """As it was chosen: 3 to 10% with every seed, and fewer steps than the strong one."""
    runs = json.loads((RESULTS / "task.json").read_text(encoding="utf-8"))["runs"]
    weak = [run["success"]["start"] for run in runs if run["scenario"] == "20% right, weak start"]
    assert len(weak) == 3
    assert all(0.03 <= success <= 0.10 for success in weak)
    assert task.WEAK < task.STRONG


@pytest.mark.parametrize("scenario", task.SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_stored_results_are_those_of_the_scenario(scenario: task.Scenario) -> None:
    """Three seeds of every objective that the scenario names, and no other."""
    runs = json.loads((RESULTS / "task.json").read_text(encoding="utf-8"))["runs"]
    found = {run["seed"]: set(run["success"]) for run in runs if run["scenario"] == scenario.name}
    named = {"start", "start, greedy", *scenario.objectives}
    named |= set(task.GUESSED) if scenario.guess else set()
    named |= {f"{name}, lr / 3" for name in task.GENTLE} if scenario.gentle else set()
    assert found == dict.fromkeys(range(3), named)


SMALL = task.Size(rows=24, heldout=4, steps=2, batch=8, samples=1)


@pytest.mark.slow
def test_every_part_of_the_task_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "GENTLE", ("topr",))
    scenario = replace(task.SCENARIOS[0], prior_steps=2, objectives=("sft", "topr"), guess=True)
    found = task.measure(scenario, 1, tmp_path, SMALL)
    assert list(found["success"]) == ["start", "sft", "topr", "start, greedy", "topr (start for mu)", "topr, lr / 3"]
    assert all(0 <= value <= 1 for value in found["success"].values())
    logged, relogged = (next(logs.read(tmp_path / file)) for file in ("logs/train.jsonl", "relogged.jsonl"))
    assert {k: v for k, v in logged.items() if k != "logprobs"} == {
        k: v for k, v in relogged.items() if k != "logprobs"
    }
    assert np.shape(logged["logprobs"]) == np.shape(relogged["logprobs"]) == (4, logs.LENGTH + 1)
    assert np.mean(relogged["logprobs"]) < np.mean(logged["logprobs"])  # a start after two steps knows little


# --- a language model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights over characters: what it writes is noise, which is enough to run every line."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=96, **settings)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def test_sampled_tokens_have_the_log_probabilities_of_the_model(tiny_model: Path) -> None:
    model = story.Model(tiny_model)
    drawn = model.sample(story.PROMPTS[:2], 2, 6, 1.0, 0)
    for prompt, ids, found in zip(drawn.prompts, drawn.completions, model.logp(drawn), strict=True):
        with torch.no_grad():
            logits = model.policy.causal(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        expected = [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(ids)]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_every_part_of_the_model_runs(tiny_model: Path, tmp_path: Path) -> None:
    size = story.Size(heldout=76, completions=2, tokens=6, steps=1, batch=4, samples=1)
    found = story.measure(tiny_model, "park", 0, tmp_path, size, ["sft", "topr"])
    assert found["rows"] > 0
    for reward, labels in (("word", ["start", "sft", "topr"]), ("spelling", ["start", "sft"])):
        runs = found["rewards"][reward]["runs"]
        assert list(runs) == labels
        assert runs["start"]["kl"] == 0
        assert runs["sft"]["kl"] != 0


def test_rewards_of_text() -> None:
    park, spelt = story.mentions("park"), story.spelt(["a cat sat.", "a cat sat.", "a dgo sat."], 2)
    assert park("They went to the Park.")
    assert not park("They parked.")
    assert not park("They went to the park")  # the limit may have cut 'parking'
    assert spelt("A cat sat.")
    assert not spelt("A dgo sat.")


# --- statistics and page


def test_intervals_over_seeds_by_hand() -> None:
    """Mean 0.2, deviation 0.1, t = 4.303: half of the interval is 4.303 * 0.1 / sqrt 3 = 0.248."""
    assert statistics.over_seeds([0.1, 0.2, 0.3]) == pytest.approx((0.2, 0.2 - 0.24843, 0.2 + 0.24843), abs=1e-4)
    assert statistics.share([0.1, 0.2, 0.3])[1] == 0
    assert statistics.difference({0: 0.5, 1: 0.6, 2: 0.7}, {2: 0.6, 1: 0.5, 0: 0.4}) == pytest.approx((0.1,) * 3)
    assert statistics.points((0.1, 0.05, 0.15)) == "**+10.0 (+5.0 to +15.0)**"
    assert statistics.points((0.1, -0.05, 0.25)) == "+10.0 (-5.0 to +25.0)"
    with pytest.raises(ValueError, match="found 1 seeds"):
        statistics.over_seeds([0.1])


def test_the_page_shows_the_stored_results() -> None:
    """Every table between its markers is the one that the results give."""
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    results = page.load(RESULTS)
    assert set(results) == {"bandit", "task", "model"}
    for name, content in page.sections(results).items():
        if name != "cost":  # names the machine
            assert page.put(text, name, content) == text, name


def test_all_closed_forms_of_the_page_held() -> None:
    found = json.loads((RESULTS / "bandit.json").read_text(encoding="utf-8"))
    assert {c["name"] for c in found["cases"]} == set(page.LIMITS)
    assert max(c["gap"] for c in found["cases"]) < 0.02
    assert all(r["measured"] == pytest.approx(r["predicted"], abs=1) for r in found["rates"])


def test_figures_are_drawn_and_a_table_follows_its_results(tmp_path: Path) -> None:
    results: Any = page.load(RESULTS)
    (tmp_path / "figures").mkdir()
    names = page.sections(results)
    (tmp_path / "evidence.md").write_text("".join(f"<!-- {n} -->\n<!-- end of {n} -->\n" for n in names))
    page.write(RESULTS, tmp_path)
    written = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert all(content in written for content in names.values())
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {f"evidence_{n}.png" for n in page.load(RESULTS)}
    results["bandit"]["cases"][0]["reward"] += 0.1
    assert page.sections(results)["bandit"] != names["bandit"]


def test_every_figure_in_the_page_exists() -> None:
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\((figures/[a-z_.]+)\)", text)
    assert named
    assert all((ROOT / "docs" / name).is_file() for name in named)
