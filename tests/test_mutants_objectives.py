"""The hand-worked table is strong enough: every small change to an objective's formula breaks some row of it."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_objectives import TABLE, name_of

import rwft.objectives as families
from rwft.objectives import logspace

OPERATORS: dict[type, list[type]] = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
}
# Changes that nobody could see: (function, what stands there, what is put).
CERTAIN = [  # a probability is at most 1
    ("prob_power", "1", "2"),
    ("prob_power", "1.0", "2.0"),
    ("gold_s", "1", "2"),
    ("gold_p", "1", "2"),
]
NOTHING = [  # 0 times either branch
    ("unclipped", "advantage > 0", "advantage >= 0"),
    ("unclipped", "advantage < 0", "advantage <= 0"),
    ("ppo_clip", "advantage > 0", "advantage >= 0"),
    ("gmpo", "advantage > 0", "advantage >= 0"),
    ("sapo", "advantage > 0", "advantage >= 0"),
    ("vespo", "advantage >= 0", "advantage > 0"),
    ("topr", "reward > 0", "reward >= 0"),
    ("topr_geometric", "advantage > 0", "advantage >= 0"),
]
SYMMETRIC = [("gold_p", "max(-baseline, low)", "max(low, -baseline)")]
EQUIVALENT = {*CERTAIN, *NOTHING, *SYMMETRIC}


def mutants(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Change one node at a time in place: (function, before, after) while `tree` holds the mutant."""
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        bodies = [*function.body, *filter(None, function.args.kw_defaults)]
        for node in [node for body in bodies for node in ast.walk(body)]:
            for change, undo in changes(node):
                before = ast.unparse(node)
                change()
                yield function.name, before, ast.unparse(node)
                undo()


def changes(node: ast.AST) -> Iterator[tuple[Any, Any]]:
    """Pairs of functions: do and undo."""
    if isinstance(node, (ast.BinOp, ast.Compare)):
        old = node.op if isinstance(node, ast.BinOp) else node.ops[0]
        for new in OPERATORS.get(type(old), []):
            if isinstance(node, ast.BinOp):
                yield setter(node, "op", new()), setter(node, "op", old)
            else:
                yield setter(node, "ops", [new()]), setter(node, "ops", [old])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield setter(node, "op", ast.UAdd()), setter(node, "op", node.op)
    elif isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        other = "max" if node.arg == "min" else "min"
        yield setter(node, "arg", other), setter(node, "arg", node.arg)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        yield setter(node, "value", node.value + 1), setter(node, "value", node.value)
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and "transpose" not in ast.unparse(node.func):
        swapped = [node.args[1], node.args[0], *node.args[2:]]
        yield setter(node, "args", swapped), setter(node, "args", node.args)


def setter(node: ast.AST, field: str, value: Any) -> Any:
    return lambda: setattr(node, field, value)


def run(tree: ast.Module, name: str) -> dict[str, Any]:
    """The module's names, as if it were imported; nothing is registered."""
    namespace: dict[str, Any] = {"__name__": name}
    try:
        exec(compile(ast.fix_missing_locations(tree), name, "exec"), namespace)
    except (SyntaxError, ImportError):  # no program (min and max exchanged where both stand): nothing survives
        return {}
    return namespace


def parse(module: types.ModuleType) -> ast.Module:
    tree = ast.parse(inspect.getsource(module))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return tree


def survives(namespace: dict[str, Any], rows: list[Any]) -> bool:
    """Whether every row still gives what was worked out by hand."""
    for spec, given, expected in rows:
        settings = {k: v for k, v in spec.items() if k != "name"} if isinstance(spec, dict) else {}
        wanted = torch.tensor(expected, dtype=torch.float64)
        try:
            function = namespace[name_of(spec)]
            parameters = inspect.signature(function).parameters.values()
            reads = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            weights = function(*[given[name] for name in reads], **settings).double()
            if "mask" in reads and weights.shape == given["mask"].shape:
                weights = weights.where(given["mask"] > 0, wanted)
            if weights.shape != wanted.shape or not torch.allclose(weights, wanted, rtol=1e-9, atol=1e-9):
                return False
        except Exception:  # noqa: BLE001 - a mutant that cannot run is dead
            return False
    return True


@pytest.mark.parametrize("module", families.FAMILIES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_mutant_of_a_family_survives(module: types.ModuleType) -> None:
    tree = parse(module)
    rows = [row for row in TABLE if hasattr(module, name_of(row[0])) and isinstance(row[0], (str, dict))]
    assert survives(run(tree, module.__name__), rows)
    found = [m for m in mutants(tree) if survives(run(tree, module.__name__), rows)]
    assert [mutant for mutant in found if mutant not in EQUIVALENT] == []


def test_no_mutant_of_the_bounds_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, sources = parse(logspace), [parse(module) for module in families.FAMILIES]
    survivors = []
    for mutant in mutants(tree):
        fake = types.ModuleType(logspace.__name__)
        vars(fake).update(run(tree, logspace.__name__))
        monkeypatch.setitem(sys.modules, logspace.__name__, fake)
        names: dict[str, Any] = {}
        for source in sources:
            names |= run(source, "family")
        if survives(names, TABLE):
            survivors.append(mutant)
    assert survivors == []
