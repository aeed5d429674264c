"""What the documents say is so: commands exist, links lead somewhere, examples run, tables agree with the code."""

from __future__ import annotations

import doctest
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rwft.config import resolve
from rwft.data.adapters import read_examples
from rwft.loop import train
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
        " ".join(itertools.takewhile(lambda word: "=" not in word, words))  # a variable is no target
        for words in commands(page.read_text(), "make")
    ]
    assert {word for names in named for word in names.split()} <= targets


@pytest.mark.parametrize("words", commands(README, "rwft"), ids=" ".join)
def test_a_command_of_the_readme_exists_and_its_overrides_are_settings(words: list[str]) -> None:
    from typer.main import get_command

    from rwft.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in known
    options = {name for parameter in known[words[0]].params for name in parameter.opts}
    for word in words[1:]:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()
        assert not word.startswith("--") or word in options
    if words[0] == "train":
        overrides = [word.replace("my.py:", str(ROOT / "nowhere" / "my.py:")) for word in words[2:]]
        resolve(example(), [word for word in overrides if "my.py" not in word and not word.startswith("--")])


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


def page(name: str) -> str:
    """Text of a page of the documentation."""
    return (ROOT / "docs" / f"{name}.md").read_text()


def files(text: str) -> dict[str, str]:
    """Blocks whose first line is a file's name in a comment: what a page has its reader save."""
    fenced = re.findall(r"^```(?:python|yaml)\n(# (\S+\.(?:py|yaml))\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {name: body for body, name in fenced}


def cases(text: str) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Heading -> (rows, fragment of a config), for each section that begins with both."""
    found: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
    for section in text.split("\n## ")[1:]:
        rows, fragments = blocks(section, "json"), blocks(section, "yaml")
        if rows and fragments:
            parsed = [json.loads(line) for line in rows[0].splitlines()]
            found[section.splitlines()[0]] = (parsed, yaml.safe_load(fragments[0]))
    return found


def write_rows(file: Path, rows: Iterable[object]) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


CASES = cases(page("choosing"))
PEERS = blocks(page("coming_from"), "yaml")
OF_COLUMN = {"label": True, "reward": 1.0}
RUNS = [(name, words) for name in ("tour", "choosing") for words in commands(page(name), "rwft")]


def test_the_index_has_a_line_for_each_page() -> None:
    listed = re.findall(r"^\d+\. \[(\S+)\]\((\S+)\): .+\.$", page("README"), re.MULTILINE)
    assert all(text == target for text, target in listed)
    assert sorted(target for _, target in listed) == sorted(
        file.name for file in (ROOT / "docs").glob("*.md") if file.name != "README.md"
    )


@pytest.mark.parametrize(("name", "words"), RUNS, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_command_of_a_page_exists_and_its_overrides_are_settings(name: str, words: list[str]) -> None:
    from typer.main import get_command

    from rwft.cli import app

    assert words[0] in get_command(app).commands  # type: ignore[attr-defined]
    overrides = [word for word in words[1:] if "=" in word]
    config: dict[str, Any] = {"model": {"path": "unused"}, "data": {"path": "rows.jsonl"}}
    saved = files(page(name))
    for word in words[1:]:
        config = yaml.safe_load(saved[word]) if word in saved else config
    resolve(config, overrides)


def test_the_configs_of_the_tour_are_whole() -> None:
    saved = files(page("tour"))
    assert sorted(saved) == ["letters.py", "make_logs.py", "run.yaml", "start.yaml", "use.py", "use_lora.py"]
    assert resolve(yaml.safe_load(saved["start.yaml"])).output + "/model" == "runs/start/model"
    assert resolve(yaml.safe_load(saved["run.yaml"])).model.path == "runs/start/model"


def test_choosing_has_all_its_cases() -> None:
    assert len(CASES) == 9


@pytest.mark.parametrize("title", CASES)
def test_a_case_of_choosing_reads_its_rows(title: str, tmp_path: Path) -> None:
    rows, fragment = CASES[title]
    data = fragment["data"] | {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    config = resolve({"model": {"path": "unused"}} | fragment | {"data": data})
    examples = list(read_examples(config.data.path, config.data.adapter))
    assert len(examples) >= len(rows)
    reads = build_objective(config.objective).reads
    scored = all(example.reward is not None or example.spans for example in examples)
    assert scored or reads.isdisjoint({"reward", "advantage"})


def test_what_choosing_starts_with_is_an_objective() -> None:
    (starts,) = re.findall(r"^\| Your rows have.*?\n\n", page("choosing"), re.MULTILINE | re.DOTALL)
    cells = [row.split(" | ")[1] for row in starts.splitlines()[2:] if row]
    assert len(cells) == 10
    for cell in cells:
        build_objective(yaml.safe_load(re.findall(r"`([^`]+)`", cell)[0]))


def test_the_comparison_of_choosing_is_valid() -> None:
    fragment = yaml.safe_load(blocks(page("choosing"), "yaml")[-1])
    config = resolve({"model": {"path": "unused"}, "data": {"path": "rows.jsonl"}} | fragment)
    assert [build_objective(given).reads for given in config.compare.objectives] == [
        set(), {"reward"}, {"logp", "reward"}, {"advantage"},
    ]  # fmt: skip


def test_percentages_that_choosing_takes_from_the_evidence_are_there() -> None:
    quoted = [
        number
        for part in re.split(r"\n\n|\n- |\n\|", page("choosing"))
        if "*evidence*" in part or "evidence.md#2" in part
        for number in re.findall(r"(\d+\.\d)(?:%| points)", part.split("alone had")[-1])
    ]
    table = re.findall(r"(?<=[|+ ])\d+\.\d(?= \()", page("evidence")) + re.findall(r"\+(\d+\.\d) \(", page("evidence"))
    assert len(quoted) >= 15
    assert sorted(set(quoted) - set(table)) == []


@pytest.mark.slow
@pytest.mark.parametrize("title", CASES)
def test_a_case_of_choosing_trains(title: str, tmp_path: Path) -> None:
    """Two steps on the rows of the page, with ten prompts in place of one and a tiny policy."""
    rows, fragment = CASES[title]
    many = [json.loads(json.dumps(row).replace("1+1?", f"{number}+1?")) for number in range(10) for row in rows]
    data = fragment["data"] | {"path": str(write_rows(tmp_path / "rows.jsonl", many)), "max_length": 48}
    steps = fragment.get("train", {}) | {"steps": 2, "batch_size": 4}
    model = yaml.safe_load(files(page("tour"))["start.yaml"])["model"]
    places = {"output": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    train(resolve(fragment | places | {"model": model, "data": data, "train": steps}))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("block", PEERS, ids=lambda block: block.splitlines()[0])
def test_a_config_beside_a_peers_is_valid_and_reads_such_rows(block: str, tmp_path: Path) -> None:
    given = yaml.safe_load(block)
    columns = re.findall(r"\w+", block.splitlines()[0].removeprefix("# rows: ").split(".")[0])
    row: dict[str, Any] = {column: OF_COLUMN.get(column, "1+1?") for column in columns}
    if columns[0] == "extra_info":
        row = {"extra_info": {column: row[column] for column in columns[1:]}}
    if columns == ["binary_feedback"]:
        row = next(json.loads(b) for b in blocks(page("data"), "json") if '"binary_feedback"' in b)
    given["data"]["path"] = str(write_rows(tmp_path / "rows.jsonl", [row]))
    config = resolve(given)
    build_objective(config.objective)
    assert len(list(read_examples(config.data.path, config.data.adapter))) == 1


def test_every_peer_has_a_config_beside_its_own() -> None:
    titles = re.findall(r"^## From (\w[\w-]*)", page("coming_from"), re.MULTILINE)
    assert set(titles) == {"TRL", "LLaMA-Factory", "verl", "OpenRLHF", "HALOs"}
    assert len(PEERS) == len(titles) + 1  # OpenRLHF has two


def outline(text: str) -> list[str]:
    """Lines without numbers, rules, bars and widths: what must be the same on every machine."""
    bare = re.sub(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", "N", re.sub(r"[━─┃│┏┡┓┩┳╇└┴┘█▉▊▋▌▍▎▏]+", " ", text))
    return [" ".join(line.split()) for line in bare.splitlines() if line.strip()]


def test_an_outline_keeps_words_and_drops_numbers() -> None:
    assert outline("│ nll/mean │ 0.55 │\n━━━\n  0.17  ▏ 6  of -1.5e-3") == ["nll/mean N", "N N of N"]


@pytest.mark.slow
def test_the_tour_goes_as_it_says(tmp_path: Path) -> None:
    """Every command in its order; each line that is shown is among those that the commands before it printed."""
    (tmp_path / "bin").mkdir()
    for name, call in (("python", ""), ("rwft", ' -c "from rwft.cli import main; main()"')):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable}{call} "$@"\n')
        script.chmod(0o755)
    place = tmp_path / "tour"
    place.mkdir()
    for name, body in files(page("tour")).items():
        (place / name).write_text(body)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "110"}
    printed: list[str] = []
    for language, body in re.findall(r"^```(bash|text)\n(.*?)^```", page("tour"), re.MULTILINE | re.DOTALL):
        if language == "bash":
            printed = [line for command in body.splitlines() for line in outline(play(command, place, environment))]
        else:
            shown = [line for line in outline(body) if line != "..."]
            assert [line for line in shown if line not in printed] == [], body


def play(command: str, place: Path, environment: dict[str, str]) -> str:
    """What a line of the tour prints; one that is to be stopped is stopped at its first checkpoint."""
    process = subprocess.Popen(
        shlex.split(command, comments=True), cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    expected = 2 if "status 2" in command else 0
    if "Ctrl-C" in command:
        expected = 130
        while process.poll() is None and not (place / "runs/first/checkpoints/step_00000020").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=1200)
    assert process.returncode == expected, f"{command}\n{printed}"
    return printed


@pytest.mark.parametrize("before", ["sft", {"name": "filtered_bc", "threshold": 1.0}, ["dft", "rwr"]])
@pytest.mark.parametrize("after", ["sft", ["dft", "reinforce"], {"name": "awr", "clip": 5.0}])
def test_an_objective_of_the_command_line_replaces_that_of_the_config(before: object, after: object) -> None:
    """What the pages tell readers to try: any form over any other, nothing left of the one before."""
    content = {"model": {"path": "unused"}, "data": {"path": "rows.jsonl"}, "objective": before}
    given = json.dumps(after).replace('"', "")
    assert resolve(content, [f"objective={given}"]).objective == after
