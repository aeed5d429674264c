r"""Formulas for a terminal: `$w = e^{r/\tau}$` as w = e^(r/τ), by replacing words; what is unknown stays as it is."""

# ruff: noqa: RUF001 - Greek letters are meant

from __future__ import annotations

import re

FORMULA = re.compile(r"\$([^$]+)\$")
SYMBOLS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "kappa": "κ", "lambda": "λ", "mu": "μ",
    "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "sum": "∑", "prod": "∏", "infty": "∞", "pm": "±",
    "to": "→", "leftrightarrow": "↔", "sim": "~", "in": "∈", "le": "≤", "ge": "≥", "ne": "≠",
    "log": "log", "ln": "ln", "exp": "exp", "max": "max", "min": "min",
}  # fmt: skip
ACCENTS = {"bar": "\u0304", "hat": "\u0302", "tilde": "\u0303"}
INNERMOST = (  # pairs of braces that hold no others, by what stands before them
    (re.compile(r"\\(?:mathrm|text)\{([^{}]*)\}"), lambda found: found[1]),
    (re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}"), lambda found: f"{_one(found[1])}/{_one(found[2])}"),
    (re.compile(r"\\sqrt\{([^{}]*)\}"), lambda found: f"√{_one(found[1])}"),
    (re.compile(r"([_^])\{([^{}]*)\}"), lambda found: f"{found[1]}{_one(found[2])}"),
)


def for_terminal(text: str) -> str:
    """`text` with its formulas, each between two `$`, as a line can show them."""
    return FORMULA.sub(lambda found: _plain(found[1]), text)


def _plain(formula: str) -> str:
    before = None
    while formula != before:
        before = formula
        for pattern, replacement in INNERMOST:
            formula = pattern.sub(replacement, formula)
    formula = re.sub(r"\\([A-Za-z]+)", lambda found: SYMBOLS.get(found[1], found[0]), formula)
    accents = "|".join(ACCENTS)
    formula = re.sub(rf"\\({accents})\s*(\w)", lambda found: found[2] + ACCENTS[found[1]], formula)
    return " ".join(formula.replace(r"\,", " ").replace(r"\|", "||").split())


def _one(text: str) -> str:
    """What stands as one thing, in parentheses if it is several."""
    return text if re.fullmatch(r"\w+|\\[A-Za-z]+|\\[A-Za-z]+\w", text) else f"({text})"
