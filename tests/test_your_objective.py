"""The page on writing an objective: its files, snippets and commands, run in the order of the page."""

from __future__ import annotations

import doctest
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rwft.cli import app
from rwft.plan import ENGINES
from rwft.skeleton import PYPROJECT

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "your_objective.md").read_text()
GPUS = (ROOT / "docs" / "many_gpus.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    for block in blocks(text, "bash"):
        yield from (shlex.split(line) for line in block.splitlines())


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page shows."""
    (source,) = [block for block in blocks(PAGE, "python") if ">>>" not in block]
    (config,) = blocks(PAGE, "yaml")
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / "gentle.py").write_text(source)
    (folder / "config.yaml").write_text(config + f"cache: {tmp_path / 'cache'}\n")
    monkeypatch.chdir(folder)
    return folder


def test_snippets_print_what_the_page_says(desk: Path) -> None:
    result = doctest.testfile(str(ROOT / "docs" / "your_objective.md"), module_relative=False)
    assert result.attempted == 11
    assert result.failed == 0


@pytest.mark.slow
def test_commands_run_in_the_order_of_the_page(desk: Path) -> None:
    run = CliRunner()
    done = list(commands(PAGE))
    assert [words[1] for words in done] == ["check", "objectives", "data", "check", "train", "train", "compare", "new"]
    for words in done:
        assert words[0] == "rwft"
        result = run.invoke(app, words[1:])
        assert result.exit_code == 0, f"{words}: {result.output[-500:]} {result.exception}"
        if "--plan" in words:
            assert not (desk / "runs").exists()
    assert (desk / "gentle.png").stat().st_size > 1000
    assert (desk / "runs" / "gentle" / "model" / "model.safetensors").is_file()
    manifest = json.loads((desk / "runs" / "gentle" / "manifest.json").read_text())
    assert re.search(r"gentle\.py sha256:[0-9a-f]{64}", json.dumps(manifest))
    assert (desk / "runs" / "which").is_dir()
    assert (desk / "gentle_weight" / "src" / "gentle_weight" / "__init__.py").is_file()


def test_the_entry_point_is_that_of_the_skeleton() -> None:
    (shown,) = blocks(PAGE, "toml")
    assert shown.strip() in PYPROJECT.replace("$name", "gentle_weight")


def test_commands_of_the_page_on_gpus_name_what_exists() -> None:
    from typer.main import get_command

    options = {name for option in get_command(app).commands["train"].params for name in option.opts}  # type: ignore[attr-defined]
    seen = list(commands(GPUS))
    assert len(seen) == 9
    for words in seen:
        for word in words:
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), word
        if words[0] == "rwft":
            assert {word for word in words if word.startswith("--")} <= options
            assert "--engine" not in words or words[words.index("--engine") + 1] in ENGINES
