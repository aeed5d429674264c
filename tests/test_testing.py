"""The conformance suite: every objective passes it, and every planted mistake fails it by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rwft
from rwft.bounds import Positive
from rwft.errors import ObjectiveError
from rwft.signals import SIGNALS, seq_mean
from rwft.testing import LAWS, check_command, check_objective, examine, trial


@pytest.mark.parametrize("name", list(rwft.objective))
def test_every_objective_obeys_every_law(name: str) -> None:
    report = check_objective(name)
    assert report.ok
    assert report.passed == tuple(LAWS)


def test_products_and_settings_are_checked_too() -> None:
    assert check_objective({"name": "rwr", "temperature": 0.3}).objective == "rwr(temperature=0.3)"
    assert check_objective(rwft.build_objective(["dft", "tis", "reinforce"])).ok


# --- planted mistakes: (objective, law that it breaks)


def row_coupled(reward: Tensor) -> Tensor:
    """Softmax over the micro-batch."""
    return reward.softmax(dim=0)


def batch_baseline(reward: Tensor) -> Tensor:
    """Less the mean over the micro-batch."""
    return reward - reward.mean()


def batch_scalar(reward: Tensor) -> Tensor:
    """One number for the whole micro-batch."""
    return reward.exp().mean()


def other_groups(reward: Tensor, group: Tensor) -> Tensor:
    """Reads group, yet looks across all of them."""
    return reward - reward.mean() + 0 * group[:, None]


def neighbours(reward: Tensor, group: Tensor) -> Tensor:
    """Takes rows of a group for neighbours."""
    return reward - reward.reshape(-1, 2).mean(dim=1).repeat_interleave(2)[:, None] if len(reward) % 2 == 0 else reward


def flat_rows(reward: Tensor) -> Tensor:
    """Lost its axis."""
    return reward[:, 0]


def transposed(logp: Tensor) -> Tensor:
    """Axes exchanged."""
    return logp.T.exp()


def boolean(reward: Tensor) -> Tensor:
    """A comparison."""
    return reward > 0


def in_place(logp: Tensor) -> Tensor:
    """Writes where the loss still reads."""
    return logp.exp_()


def random_weights(logp: Tensor) -> Tensor:
    """Draws."""
    return torch.rand_like(logp)


def live(logp: Tensor) -> Tensor:
    """Carries a gradient."""
    with torch.enable_grad():
        return logp.requires_grad_() * 2.0


def padded_mean(logp: Tensor, mask: Tensor) -> Tensor:
    """Mean over padding too."""
    return logp.mean(dim=1, keepdim=True).exp() + 0 * mask


def masked_by_product(logp: Tensor, mask: Tensor) -> Tensor:
    """NaN times 0 is NaN."""
    return ((logp * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)).exp()


def divides_by_width(logp: Tensor, mask: Tensor) -> Tensor:
    """Knows how wide the padding is."""
    return seq_mean(logp, mask).exp() / mask.shape[1]


def unbounded(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Overflows."""
    return (logp - ref_logp).exp()


def cliff(logp: Tensor) -> Tensor:
    """Infinite a little below the values that are tried one at a time."""
    return torch.where(logp < -1e4 - 1, torch.inf, 1.0)


def clamped_too_late(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """0 times infinity."""
    ratio = (logp - ref_logp).exp()
    return ratio * (ratio <= 2.0)


def secretly_sequential(logp: Tensor) -> Tensor:
    """Looks along time without reading mask."""
    return logp.cumsum(dim=1).exp()


def smoothed_advantage(advantage: Tensor) -> Tensor:
    """Looks along time if the advantage has that axis."""
    return advantage.cumsum(dim=1)


def pads_advantage(advantage: Tensor, mask: Tensor) -> Tensor:
    """Averages an advantage of tokens over padding."""
    return advantage.mean(dim=1, keepdim=True) + 0 * mask[:, :1]


def assumes_one_advantage(advantage: Tensor) -> Tensor:
    """An advantage is `(b 1)` or `(b t)`."""
    return advantage.reshape(len(advantage), 1)


def empty_sequence(logp: Tensor, mask: Tensor) -> Tensor:
    """0 / 0 without trained tokens."""
    return logp.where(mask > 0, 0.0).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)


def undocumented(logp: Tensor) -> Tensor:
    return logp.exp()


PLANTED = [
    (row_coupled, "rows do not see each other"),
    (batch_baseline, "rows do not see each other"),
    (batch_scalar, "rows do not see each other"),
    (other_groups, "rows do not see each other"),
    (neighbours, "rows do not see each other"),
    (flat_rows, "shapes (), (b 1) or (b t)"),
    (transposed, "shapes (), (b 1) or (b t)"),
    (boolean, "shapes (), (b 1) or (b t)"),
    (in_place, "signals unchanged"),
    (random_weights, "deterministic"),
    (live, "weights are constants"),
    (padded_mean, "padding is invisible"),
    (masked_by_product, "padding is invisible"),
    (divides_by_width, "padding is invisible"),
    (unbounded, "finite"),
    (cliff, "finite gradient"),
    (clamped_too_late, "finite"),
    (empty_sequence, "finite"),
    (secretly_sequential, "token-local unless it reads mask"),
    (smoothed_advantage, "token-local unless it reads mask"),
    (pads_advantage, "padding is invisible"),
    (assumes_one_advantage, "shapes (), (b 1) or (b t)"),
    (undocumented, "documented"),
]


@pytest.mark.parametrize(("planted", "law"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_mistake_is_found_by_its_law(planted: object, law: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        check_objective(planted)  # type: ignore[arg-type]
    lines = str(caught.value).splitlines()
    name = planted.__name__  # type: ignore[attr-defined]
    assert any(line.startswith(f"objective '{name}': {law}: ") for line in lines), lines
    assert all(line.startswith(f"objective '{name}': ") for line in lines)


def test_a_wrong_shape_is_said_once() -> None:
    assert [finding.partition(":")[0] for finding in examine(flat_rows).failed] == ["shapes (), (b 1) or (b t)"]


def test_the_gradient_law_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """No objective can break it while the estimator is right, so the estimator is broken here."""
    import rwft.testing

    def forgets_to_detach(logp: Tensor, weights: Tensor, mask: Tensor, denominator: float) -> Tensor:
        return -(logp.exp() * logp * mask / denominator).sum()

    monkeypatch.setattr(rwft.testing, "surrogate_loss", forgets_to_detach)
    assert [finding.partition(":")[0] for finding in examine("dft").failed] == ["gradient -w m (onehot - pi) / Z"]


def test_the_silence_law_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    import rwft.testing

    def masks_the_product_only(logp: Tensor, weights: Tensor, mask: Tensor, denominator: float) -> Tensor:
        return -((weights * logp).where(mask > 0, 0.0) / denominator).sum()

    monkeypatch.setattr(rwft.testing, "surrogate_loss", masks_the_product_only)
    assert [finding.partition(":")[0] for finding in examine("tis").failed] == ["no gradient where mask is 0"]


def test_a_setting_without_default_needs_a_value() -> None:
    def needs(reward: Tensor, *, temperature: Positive) -> Tensor:
        """Scaled."""
        return reward / temperature

    with pytest.raises(ObjectiveError, match="'temperature' must be given: a number > 0"):
        check_objective(needs)


def test_check_command_shows_the_report_and_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    check_command("dft")
    assert capsys.readouterr().out.splitlines() == ["objective 'dft'", *[f"ok    {law}" for law in LAWS]]
    with pytest.raises(ObjectiveError, match=r"objective 'row_coupled' breaks: rows do not see each other$"):
        check_command(f"{__file__}:row_coupled")
    assert "FAIL  rows do not see each other: " in capsys.readouterr().out


def test_examine_reports_without_raising() -> None:
    report = examine(undocumented)
    assert not report.ok
    assert len(report.passed) == len(LAWS) - 1
    assert "FAIL  documented: 'undocumented' has no docstring" in str(report)
    assert str(report).startswith("objective 'undocumented'\n")


def test_a_trial_holds_every_signal_in_its_shape() -> None:
    sizes = {"b": 3, "t": 5, "1": 1}
    for case, which in ((trial(b=3, t=5), 0), (trial(b=3, t=5, per_token=True), -1)):
        assert set(case.signals) == set(SIGNALS)
        for name, value in case.signals.items():
            shapes = [tuple(sizes[a] for a in axes.split()) for axes in SIGNALS[name].axes.split("|")]
            assert tuple(value.shape) == shapes[which], name
    assert case.mask.sum(dim=1).min() >= 1
    assert (case.mask == 0).any()
