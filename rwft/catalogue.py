"""What `rwft objectives` prints, from the registries and the docstrings alone."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from rwft.errors import ConfigError
from rwft.formulas import for_terminal
from rwft.registry import Entry, Setting, place
from rwft.signals import SIGNALS
from rwft.weighting import objective

PARTS = ("Why", "Limits", "Negative rewards", "Reference", "Warning", "Failures", "Results")
"""What a docstring may say after its first line, in the order of the documentation."""

WIDTH = 100


def families() -> Iterator[tuple[ModuleType | None, list[Entry]]]:
    """Each page of built-in objectives with its entries; last, under None, what was registered elsewhere."""
    from rwft.objectives import FAMILIES

    entries = [objective.entry(name) for name in objective]
    for family in FAMILIES:
        yield family, [entry for entry in entries if entry.function.__module__ == family.__name__]
    known = {family.__name__ for family in FAMILIES}
    if own := [entry for entry in entries if entry.function.__module__ not in known]:
        yield None, own


def regularizers() -> list[Entry]:
    """Every penalty that is registered: what is added to an objective, and is no weight."""
    from rwft.regularizers import regularizer

    return [regularizer.entry(name) for name in regularizer]


def title(family: ModuleType | None) -> str:
    """The first line of a page's docstring."""
    return (inspect.getdoc(family) or "").partition("\n")[0] if family else "Your own."


def headline(entry: Entry) -> tuple[str, str]:
    """What an objective or regularizer is called in words, and its formula (both without their punctuation)."""
    first = (inspect.getdoc(entry.function) or entry.name).partition("\n")[0]
    words, _, formula = first.partition(": $")
    return words.rstrip("."), f"${formula.rstrip('.')}" if formula else ""


def parts(entry: Entry) -> dict[str, str]:
    """The named parts of an objective's docstring, each as one line."""
    body = (inspect.getdoc(entry.function) or "").partition("\n")[2]
    pieces = re.split(rf"^({'|'.join(PARTS)}): ", body, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def overview() -> str:
    """Every objective by family, then the regularizers: name, what it is, and what it reads."""
    lines: list[str] = []
    for family, entries in families():
        lines += [title(family)]
        lines += [_row(entry) for entry in entries] + [""]
    lines += ["Penalties over the vocabulary, beside any objective: regularize: [{name: forward_kl, coef: 0.05}]."]
    lines += [_row(entry) for entry in regularizers()] + [""]
    lines += ["A product: dft * rwr(temperature=0.5), or [dft, {name: rwr, temperature: 0.5}]."]
    lines += ["One in full: rwft objectives NAME."]
    return "\n".join(lines)


def _row(entry: Entry) -> str:
    reads = ", ".join(entry.reads) or "nothing"
    return f"  {entry.name:<16} {headline(entry)[0].partition(', `')[0]:<58} {reads}"


def describe(name: str) -> str:
    """One objective or regularizer: its docstring, what it reads and from where, its settings, how it is trained.

    Raises ObjectiveError, with the nearest valid name, if there is none.
    """
    penalty = next((entry for entry in regularizers() if entry.name == name), None)
    entry = penalty or objective.entry(name)
    words, formula = headline(entry)
    lines = [entry.name, "", *_wrap(for_terminal(f"{words}: {formula}" if formula else words)), ""]
    for part, text in parts(entry).items():
        lines += _wrap(for_terminal(f"{part}: {text}"), hang=2)
    reads = penalty_lines(penalty) if penalty else reads_lines(entry) or ["Reads nothing."]
    trained = "A regularizer, with a `coef`, beside any objective." if penalty else locality(entry)
    lines += ["", *reads, "", *(settings_lines(entry) or ["No settings."])]
    return "\n".join([*lines, "", trained, f"Defined in {place(entry.function)} ({entry.origin})."])


def _wrap(text: str, hang: int = 0) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)


def reads_lines(entry: Entry) -> list[str]:
    """One line for each signal: axes, who provides it, what it is."""
    return [
        f"Reads {name} ({SIGNALS[name].axes}), from the {SIGNALS[name].source}: {SIGNALS[name].doc}."
        for name in entry.reads
    ]


def penalty_lines(entry: Entry) -> list[str]:
    """What a regularizer reads, one line each."""
    from rwft.regularizers import INPUTS

    return [f"Reads {name} {INPUTS[name]}." for name in entry.reads]


def settings_lines(entry: Entry) -> list[str]:
    """One line for each setting: default and bounds."""
    return [f"Setting {s.name}: {s.describe()}; {default(s)}." for s in entry.settings.values()]


def default(setting: Setting) -> str:
    """`default 0.1`, or that it must be given."""
    if setting.required:
        return "must be given"
    return f"default {'null' if setting.default is None else setting.default}"


def locality(entry: Entry) -> str:
    """What the weight of a token may depend on."""
    if "group" in entry.reads:
        return "A weight depends on all rows of its group; groups are kept whole in a micro-batch."
    if "mask" in entry.reads:
        return "A weight depends on the whole of its own sequence."
    return "A weight depends on its own position alone."


def draw(name: str, path: Path) -> None:
    """Draw the weight curve of one objective into a PNG, beside SFT's and DFT's where it moves with the probability.

    Raises ObjectiveError if the name is unknown.
    """
    from rwft.curves import beside, draw_curves
    from rwft.weighting import build_objective

    try:
        draw_curves(beside(build_objective(name)), path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror or error}") from None
