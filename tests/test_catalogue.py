"""What is said of the objectives: on the command line, on the generated page, and in its figures."""

# ruff: noqa: RUF001 - Greek letters are meant

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import rwft
from rwft.catalogue import describe, draw, families, headline, overview, parts
from rwft.catalogue_page import opening, page
from rwft.curves import beside, curves
from rwft.errors import ObjectiveError
from rwft.formulas import for_terminal
from rwft.testing import check_objective

DOCS = Path(__file__).resolve().parents[1] / "docs"
NAMES = list(rwft.objective)
PENALTIES = list(rwft.regularizer)


def test_the_page_is_what_the_docstrings_say() -> None:
    """On drift: python -m rwft.catalogue_page docs."""
    assert (DOCS / "objectives.md").read_text(encoding="utf-8") == page()


def test_the_page_does_not_depend_on_where_it_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = page()
    monkeypatch.chdir(tmp_path)
    assert page() == here


def test_every_family_has_its_figure() -> None:
    linked = set(re.findall(r"\(figures/(\w+\.png)\)", page()))
    assert all((DOCS / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in linked)
    assert len(linked) == len([family for family, _ in families() if family])


def test_links_of_the_page_lead_somewhere() -> None:
    headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", page(), re.M)}
    for target in set(re.findall(r"\]\(([^)]+)\)", page())):
        assert target[1:] in headings if target.startswith("#") else (DOCS / target).exists(), target


def test_math_of_the_page_is_closed_and_in_its_lines() -> None:
    for line in page().splitlines():
        assert line.count("$`") == line.count("`$"), line
        assert "$" not in line.replace("$`", "").replace("`$", ""), line


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_is_told_in_full(name: str) -> None:
    entry = rwft.objective.entry(name)
    text = describe(name)
    assert text.startswith(f"{name}\n")
    for signal in entry.reads:
        assert f"Reads {signal} (" in text
    for setting in entry.settings.values():
        assert f"Setting {setting.name}: {setting.describe()}; default " in text
    for part in ("Why", "Limits", "Negative rewards", "Reference"):
        assert f"\n{part}: " in text
    assert headline(entry)[1].count("$") % 2 == 0
    assert f"### `{name}`\n" in page()


def test_no_sentence_of_a_docstring_is_lost() -> None:
    """The named parts, put together again, hold every word below the first line."""
    for name in NAMES:
        entry = rwft.objective.entry(name)
        body = " ".join((rwft.objective[name].__doc__ or "").partition("\n")[2].split())
        assert body == " ".join(f"{part}: {text}" for part, text in parts(entry).items()), name


def test_describe_dft() -> None:
    text = describe("dft")
    assert "Dynamic fine-tuning: w_t = p_t\n" in text
    assert "Reads logp (b t), from the head: log-probability of the target token" in text
    assert "\nNo settings.\n" in text
    assert "A weight depends on its own position alone.\n" in text
    assert "imitation.py:" in text


def test_describe_says_what_a_weight_depends_on() -> None:
    assert "whole of its own sequence" in describe("iw_sft")
    assert "all rows of its group" in describe("dpo")
    assert "Setting dual: a number >= 1 or null; default null." in describe("ppo_clip")
    assert "default even" in describe("nft")


@pytest.mark.parametrize("name", PENALTIES)
def test_every_regularizer_is_told_in_full(name: str) -> None:
    entry = rwft.regularizer.entry(name)
    text = describe(name)
    assert text.startswith(f"{name}\n")
    for given in entry.reads:
        assert f"Reads {given} (n" in text
    for setting in entry.settings.values():
        assert f"Setting {setting.name}: {setting.describe()}; default " in text
    for part in ("Why", "Limits", "Reference"):
        assert f"\n{part}: " in text
    assert "A regularizer, with a `coef`, beside any objective." in text
    section = page().split(f"### `{name}`\n")[1].split("\n### ")[0]
    assert headline(entry)[1].strip("$") in section
    assert "`coef` (a number; must be given)" in section
    first, _, rest = (rwft.regularizer[name].__doc__ or "").partition("\n")
    assert re.match(r"[^`]+, `\(n v\)(, \(n( v)?\))? -> \(n\)`: \$", first) is not None, first
    assert " ".join(rest.split()) == " ".join(f"{part}: {said}" for part, said in parts(entry).items())


def test_every_recipe_is_listed_by_its_own_words(tmp_path: Path) -> None:
    section = page().split("\n## Recipes\n")[1]
    listed = dict(re.findall(r"^\| \[(\w+)\]\(\.\./configs/\w+\.yaml\) \| (.*) \|$", section, re.MULTILINE))
    files = {file.stem for file in (DOCS.parent / "configs").glob("*.yaml")}
    assert set(listed) == files - {"demo"}
    assert listed["sft"] == "Supervised fine-tuning: every token of every completion, weight 1."
    two = tmp_path / "two.yaml"
    two.write_text("# A weight | of two\n# lines.\n# When: never.\nmodel: {}\n")
    assert opening(two) == r"A weight \| of two lines."


def test_the_mixture_of_the_page_is_an_objective_that_ends_at_its_halves(tmp_path: Path) -> None:
    """mu = 1: p (1 - p) on demonstrations, nothing on rollouts; mu = 0: PPO on rollouts, nothing on the rest."""
    (source,) = re.findall(r"^```python\n(.*?)^```", page(), re.MULTILINE | re.DOTALL)
    file = tmp_path / "mixture.py"
    file.write_text(source)
    mixture = rwft.build_objective(f"{file}:chord")
    check_objective(mixture)
    logp = torch.tensor([[0.5, 0.25], [0.5, 0.25]], dtype=torch.float64).log()
    given = {
        "logp": logp,
        "behavior_logp": torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64).log(),
        "advantage": torch.tensor([[3.0], [-2.0]], dtype=torch.float64),
        "token_weight": torch.tensor([[2.0, 2.0], [1.0, 1.0]], dtype=torch.float64),
    }
    at = lambda progress: mixture({**given, "progress": torch.tensor(progress, dtype=torch.float64)}).tolist()
    assert at(0.0) == [pytest.approx([0.25, 0.1875]), [0.0, 0.0]]
    assert at(1.0) == [[0.0, 0.0], pytest.approx([-2.0, 0.0])]  # rho = 1, and 1/2, which is clipped
    assert at(0.25) == [pytest.approx([0.1875, 0.140625]), pytest.approx([-0.5, 0.0])]


def test_describe_of_a_misspelt_name() -> None:
    with pytest.raises(ObjectiveError, match="objective 'dff' is unknown; did you mean 'dft'"):
        describe("dff")


def test_the_overview_lists_every_objective_once() -> None:
    listed = [line.split()[0] for line in overview().splitlines() if line.startswith("  ")]
    assert listed[: len(NAMES)] != sorted(NAMES)  # by family
    assert sorted(listed) == sorted([*NAMES, *PENALTIES])
    lines = overview().splitlines()
    assert any(
        line.startswith("  dft  ") and line.endswith("Dynamic fine-tuning".ljust(58) + " logp") for line in lines
    )
    assert any(line.startswith("  sft  ") and line.endswith(" nothing") for line in lines)
    assert any(line.startswith("  awr  ") and line.endswith(" advantage") for line in lines)
    assert any(line.startswith("  iw_sft  ") and line.endswith(" logp, ref_logp, mask") for line in lines)


def test_every_objective_belongs_to_one_family() -> None:
    assert sorted(e.name for family, entries in families() if family for e in entries) == sorted(NAMES)


# --- curves


@pytest.mark.parametrize("name", NAMES)
def test_curves_are_finite_and_named(name: str) -> None:
    found = curves(rwft.build_objective(name))
    assert len(found) in {1, 2}
    for curve in found:
        assert curve.name == name
        assert curve.x.shape == curve.w.shape
        assert curve.w.isfinite().all()


def at(name: str, x: float, side: str = "") -> float:
    """The weight that the curve shows nearest to `x`."""
    (curve,) = [curve for curve in curves(rwft.build_objective(name)) if curve.side == side]
    return float(curve.w[(curve.x - x).abs().argmin()])


def test_curves_show_the_formula() -> None:
    assert at("dft", 0.5) == pytest.approx(0.5, abs=3e-3)
    assert at("chord_phi", 0.5) == pytest.approx(0.25, abs=1e-4)
    assert at("rwr", 1.0) == pytest.approx(math.e, rel=1e-5)
    assert at("tis", 2.5) == pytest.approx(2.0)
    assert at("ppo_clip", 1.5, "r = 1") == 0
    assert at("ppo_clip", 1.5, "r = -1") == pytest.approx(-1.5, abs=0.01)
    assert at("dpo", 0.0, "chosen") == pytest.approx(0.05)
    assert at("dpo", 0.0, "rejected") == pytest.approx(-0.05)
    assert at("implicit_reward", math.e) == pytest.approx(0.05, rel=3e-3)
    assert at("off_policy_mask", 0.5, "r = -1") == 0
    assert at("off_policy_mask", 0.5, "r = 1") == 1
    assert at("filtered_bc", 0.4) == 0
    assert at("filtered_bc", 0.6) == 1


@pytest.mark.parametrize("name", ["dft", "ppo_clip", "dpo", "token_cleaning"])
def test_draw_writes_a_png(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    draw(name, folder / "weights.png")
    assert [file.name for file in folder.iterdir()] == ["weights.png"]
    assert (folder / "weights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "together"),
    [
        ("prob_power", ["prob_power", "sft", "dft"]),
        ("dft", ["dft", "sft"]),
        ("ppo_clip", ["ppo_clip"]),
        ("dpo", ["dpo"]),
        ("rwr", ["rwr"]),
    ],
)
def test_a_weight_that_moves_with_the_probability_is_drawn_beside_sft_and_dft(name: str, together: list[str]) -> None:
    assert [str(objective) for objective in beside(rwft.build_objective(name))] == together


def test_both_signs_of_a_reward_are_drawn_to_one_scale(tmp_path: Path) -> None:
    """w = e^(2 r): 7.389 and 0.135, whose quotient must be on the paper, whatever number both are divided by."""
    from matplotlib.axes import Axes

    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import Tensor\n\n\ndef steep(logp: Tensor, reward: Tensor) -> Tensor:\n"
        "    return (2 * reward).exp() + 0 * logp\n"
    )
    drawn: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        plot = Axes.plot
        patch.setattr(Axes, "plot", lambda self, x, y, **k: (drawn.append(float(y[-1])), plot(self, x, y, **k))[1])
        draw(f"{file}:steep", tmp_path / "steep.png")
    assert len(drawn) == 4  # two signs, and SFT and DFT
    assert drawn[0] / drawn[1] == pytest.approx(54.598150033144236, rel=1e-5)


def test_an_own_objective_is_described_and_drawn(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        '''"""Mine."""
from torch import Tensor


def cubed(logp: Tensor) -> Tensor:
    """Cube of the probability: $w = p^3$."""
    return (3 * logp).exp()
'''
    )
    text = describe(f"{file}:cubed")
    assert "Cube of the probability: w = p^3" in text
    assert "sha256:" in text
    draw(f"{file}:cubed", tmp_path / "cubed.png")
    (curve,) = curves(rwft.build_objective(f"{file}:cubed"))
    torch.testing.assert_close(curve.w, curve.x**3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("formula", "line"),
    [
        (r"$w = \min(e^{r/\tau}, c)$", "w = min(e^(r/τ), c)"),
        (r"$r \min(\prod_t \rho_t, 1)$", "r min(∏_t ρ_t, 1)"),
        (r"$e^{\kappa \, \mathrm{mean}_t(\log \pi - \log \pi_{ref})}$", "e^(κ mean_t(log π - log π_ref))"),
        (r"$\frac{1}{V} \sum_v \frac{\beta}{2 + x}$", "1/V ∑_v β/(2 + x)"),
        (r"$\sqrt{(1 - r_q) / r_q}$", "√((1 - r_q) / r_q)"),
        (r"$1[\rho_t \text{ is not clipped}]$", "1[ρ_t is not clipped]"),
        (r"$\bar H + \tilde\rho_j + \hat r_t$", "H\u0304 + ρ\u0303_j + r\u0302_t"),
        (r"$\mathrm{KL}(\pi \| \pi_{ref}) \to \infty$", "KL(π || π_ref) → ∞"),
        (r"at $\alpha$ as at $\unheard$, not $5 or `{a: 1}`", r"at α as at \unheard, not $5 or `{a: 1}`"),
    ],
)
def test_formulas_for_a_terminal(formula: str, line: str) -> None:
    assert for_terminal(formula) == line


def test_nothing_is_left_of_latex_in_what_is_printed() -> None:
    for name in [*NAMES, *PENALTIES]:
        text = re.sub(r"`[^`]*`", "", describe(name))
        assert not re.search(r"[\\${}]", text), (name, text)
    assert "w = r if r > 0, else r min(∏_t ρ_t, 1)" in describe("topr")
