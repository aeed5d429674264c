"""What is public, what an import costs, what the wheel holds, and the size of things."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rwft
from rwft.cli import main

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "rwft").rglob("*.py"))
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "matplotlib", "pandas", "pyarrow", "omegaconf")

PUBLIC = {
    "Batch",
    "Config",
    "Example",
    "Objective",
    "adapter",
    "build_objective",
    "load_config",
    "objective",
    "regularizer",
    "seq_mean",
    "seq_sum",
    "surrogate_loss",
    "token_logprobs",
    "train",
    "verifier",
}


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after `statement`."""
    program = f"import sys\n{statement}\nsys.stdout.write('\\nMODULES ' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return {name.partition(".")[0] for name in done.stdout.rpartition("MODULES ")[2].split()}


def test_the_public_names_are_these() -> None:
    assert set(rwft.__all__) == PUBLIC == set(dir(rwft))
    assert rwft.__all__ == sorted(rwft.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_leads_somewhere_and_is_documented(name: str) -> None:
    value = getattr(rwft, name)
    assert value is getattr(rwft, name)
    documented = value.__doc__ or type(value).__doc__
    assert documented
    assert documented.strip()


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'rwft' has no attribute 'trainer'"):
        _ = rwft.trainer


def test_importing_rwft_imports_nothing_heavy() -> None:
    assert loaded_by("import rwft").isdisjoint(HEAVY)


def test_the_check_of_what_is_imported_can_fail() -> None:
    assert "torch" in loaded_by("import rwft; rwft.objective")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    statement = (
        f"sys.argv = ['rwft', *{arguments!r}]\n"
        "from rwft.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    assert loaded_by(statement).isdisjoint(HEAVY)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the wheel that the build backend makes of this checkout."""
    from hatchling.builders.wheel import WheelBuilder

    target = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(target), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_puts_one_name_at_the_top_level(wheel: list[str]) -> None:
    assert {name.partition("/")[0] for name in wheel} == {"rwft", f"rwft-{rwft.__version__}.dist-info"}


def test_the_wheel_holds_the_whole_package(wheel: list[str]) -> None:
    expected = {file.relative_to(ROOT).as_posix() for file in SOURCES} | {"rwft/py.typed"}
    assert expected <= set(wheel)
    assert not [name for name in wheel if "__pycache__" in name or name.startswith("tests/")]


def test_the_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", rwft.__version__)
    assert f"\n## {rwft.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert rwft.__version__ not in (ROOT / "pyproject.toml").read_text()


def test_the_package_is_the_command_too() -> None:
    ran = subprocess.run([sys.executable, "-m", "rwft", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["rwft", rwft.__version__]
    lost = subprocess.run(
        [sys.executable, "-m", "rwft", "data", "no.jsonl"], check=False, capture_output=True, text=True
    )
    assert (lost.returncode, lost.stderr.count("\n")) == (2, 1)


def test_ctrl_c_outside_of_training_steps_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(_: str) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("rwft.skeleton.new_command", pressed)
    monkeypatch.setattr("sys.argv", ["rwft", "new", "mine"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 130
    assert said.startswith("rwft: interrupted; ")
    assert said.count("\n") == 1


def test_every_dependency_is_pinned() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"\ndependencies = \[(.*?)\n\]", text, re.DOTALL)
    developer = re.search(r"\ndev = \[(.*?)\n\]", text, re.DOTALL)
    assert listed
    assert developer
    wanted = re.findall(r'"([A-Za-z0-9_-]+)', listed[1] + developer[1])
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {plain(name) for name in wanted} <= {plain(name) for name in pins}
    assert len({plain(name) for name in pins}) == len(pins)


def plain(name: str) -> str:
    """A distribution's name as package indices compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_is_small_documented_and_silent(file: Path) -> None:
    text = file.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    if tree.body:
        assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.partition(".")[0] for name in names} & {"pickle", "dill", "shelve"}


def test_everything_in_the_package_is_reached_from_no_other_root() -> None:
    """`rwft` imports itself by its own name only, never `tests`, `cli` or a path."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}: relative import"
                assert (node.module or "").partition(".")[0] not in {"tests", "cli", "benchmarks", "examples"}
