"""What the documents say is so: commands exist, links lead somewhere, examples run, tables agree with the code."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from rwft.config import resolve
from rwft.weighting import build_objective, objective

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> list[list[str]]:
    """Words of each command line of `program` in the bash blocks of a page."""
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words and words[0] == program]


def table(text: str, title: str) -> list[list[str]]:
    """Cells of the body of the first table under a heading."""
    section = text.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def slug(heading: str) -> str:
    """The anchor that a Markdown viewer gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {target} has no such heading"


def test_the_check_of_links_sees_links() -> None:
    assert len(re.findall(r"\]\(([^)\s]+)\)", README)) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"`make ([a-z ]+)`", page.read_text()) + [
        " ".join(w) for w in commands(page.read_text(), "make")
    ]
    assert {word for names in named for word in names.split()} <= targets


@pytest.mark.parametrize("words", commands(README, "rwft"), ids=" ".join)
def test_a_command_of_the_readme_exists_and_its_overrides_are_settings(words: list[str]) -> None:
    from typer.main import get_command

    from rwft.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in known
    for word in words[1:]:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()
    if words[0] == "train":
        overrides = [word.replace("my.py:", str(ROOT / "nowhere" / "my.py:")) for word in words[2:]]
        resolve(example(), [word for word in overrides if "my.py" not in word])


def example() -> dict[str, object]:
    """The config that the README shows."""
    return yaml.safe_load(blocks(README, "yaml")[0])


def test_the_config_of_the_readme_is_valid() -> None:
    config = resolve(example())
    assert build_objective(config.objective).reads == {"logp", "reward"}


def test_the_objective_of_the_readme_works(tmp_path: Path) -> None:
    (source,) = [block for block in blocks(README, "python") if "my.py" in block]
    file = tmp_path / "my.py"
    file.write_text(source)
    own = build_objective({"name": f"{file}:tempered", "temperature": 2.0})
    assert own.reads == {"logp", "reward"}
    # p = 1/4 and 1/9, reward 0 and 2: sqrt(p) * e^(r / 2) is 1/2 and e/3
    weights = own({"logp": torch.tensor([[0.25], [1 / 9]]).log(), "reward": torch.tensor([[0.0], [2.0]])})
    assert weights.flatten().tolist() == pytest.approx([0.5, 0.906093942819682], rel=1e-6)


@pytest.mark.parametrize("row", table(README, "Objectives"), ids=lambda row: row[0].strip("`"))
def test_the_table_of_objectives_agrees_with_the_registry(row: list[str]) -> None:
    name, _, *reads = row
    assert name.strip("`") in objective
    listed = re.findall(r"`(\w+)`", reads[0]) if reads else []
    assert set(listed) == set(objective.entry(name.strip("`")).reads)


def test_the_table_of_adapters_agrees_with_the_registry() -> None:
    from rwft.data.adapters import adapter

    listed = [name for row in table(README, "Data") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(listed) == sorted(adapter)


def test_the_page_on_the_idea_computes_what_it_says() -> None:
    result = doctest.testfile(str(ROOT / "docs" / "idea.md"), module_relative=False)
    assert result.attempted >= 15
    assert result.failed == 0


def test_pages_speak_of_the_project_alone() -> None:
    for page in PAGES:
        assert not re.search(r"/(work|tmp|root|home)/", page.read_text()), page.name
