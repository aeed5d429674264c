"""Settings found in a run's folder may be anybody's: they load no code that the command line does not name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rwft.config import Config, overridden, resolve
from rwft.errors import ConfigError

NAMES = ("objective", "regularize", "data.adapter", "evaluate.verifier", "compare.objectives")
"""Settings that name functions. `path/to/file.py:function` and `package.module:function` load code."""


def stored_config(settings: Mapping[str, Any], overrides: Sequence[str], where: str) -> Config:
    """Settings found in a run's folder, and overrides, as a config.

    Raises ConfigError for a name that loads code, unless an override gives that very name.
    """
    from omegaconf import OmegaConf

    merged = OmegaConf.to_container(overridden(settings, overrides))
    asked = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    for key in NAMES:
        trusted = set(_code_names(_at(asked, key)))
        for name in _code_names(_at(merged, key)):
            if name not in trusted:
                raise ConfigError(
                    f"{where}: {key}: '{name}' loads code that only this file names; read that code, "
                    f"and if you trust it, name it yourself: {key}={name}"
                )
    return resolve(settings, overrides, where)


def _at(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _code_names(spec: Any) -> Iterator[str]:
    """The names in a setting that load code: of the one function, or of each in a list."""
    if isinstance(spec, str) and ":" in spec:
        yield spec
    elif isinstance(spec, Mapping):
        yield from _code_names(spec.get("name"))
    elif isinstance(spec, Sequence) and not isinstance(spec, str):
        for item in spec:
            yield from _code_names(item)
