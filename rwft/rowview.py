"""One row of the data as a run would train on it, token by token: `rwft data CONFIG --row N`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from rwft.config import Config, load_config
from rwft.data.adapters import Dropped, read_examples
from rwft.data.batching import Batch, Collate
from rwft.data.chat import end_tokens
from rwft.data.example import Example, Source
from rwft.data.prepare import Prepared, prepare
from rwft.data.rows import Rows
from rwft.data.sources import read_rows
from rwft.data.tasks import task_files
from rwft.data.tokenize import Dropped as LeftOut
from rwft.data.tokenize import Tokenize
from rwft.errors import ConfigError, DataError
from rwft.progress import Display
from rwft.temperature import fit_temperatures, fitted_sentences
from rwft.weighting import Objective, build_objective

BEFORE = 3  # tokens of the prompt that the table begins with
OF_TOKENS = ("token_weight", "advantage", "behavior_logp")


@dataclass(frozen=True)
class Wanted:
    """A row by its number, as sources name it (`rows.jsonl:6`), in any file or in one."""

    number: int
    file: str | None = None

    def __contains__(self, source: Source) -> bool:
        return source.row == self.number and (self.file is None or source.file.endswith(self.file))

    def __str__(self) -> str:
        return f"row {self.number}" if self.file is None else f"{self.file}:{self.number}"


def wanted_row(text: str) -> Wanted:
    """`6` or `rows.jsonl:6`. Raises ConfigError for anything else."""
    file, _, number = text.rpartition(":")
    if not number.isdecimal():
        raise ConfigError(f"--row: found '{text}', expected the number of a row, such as 6 or rows.jsonl:6")
    return Wanted(int(number), file or None)


def row_command(source: str, overrides: Sequence[str], row: str) -> None:
    """`rwft data CONFIG --row N`. Raises DataError, with the reason, if the row would be dropped."""
    if Path(source).suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"--row: '{source}' is no config; tokens need a model's tokenizer: rwft data CONFIG --row {row}"
        )
    with Display(Console(), main=True) as display:
        show_row(load_config(source, overrides), wanted_row(row), display)


def show_row(config: Config, wanted: Wanted, display: Display) -> None:
    """Every example of the row, then DataError if one of them is left out, or if there is no such row."""
    from rwft.policy import load_tokenizer

    objective, tokenizer = build_objective(config.objective), load_tokenizer(config.model)
    tick, cache = display.ticker("reading and tokenising rows"), Path(config.cache).expanduser()
    data = prepare(config.data, tokenizer, objective.reads, cache, tick)
    fitted = fit_temperatures(objective, data)
    display.say(*fitted_sentences(objective, fitted))
    splits = [(data.train, "trained on")] + ([(data.held_out, "held out")] if data.held_out is not None else [])
    for rows, use in splits:
        for index in find(rows, wanted):
            show_example(data, rows, index, use, fitted, tokenizer, display)
    refuse_left_out(config, tokenizer, objective.reads, wanted)


def find(rows: Rows, wanted: Wanted) -> list[int]:
    """Which examples of a split come from the row."""
    same = np.flatnonzero(np.asarray(rows.column("row"))[rows.where] == wanted.number)
    return [int(index) for index in same if rows.source(int(index)) in wanted]


def refuse_left_out(config: Config, tokenizer: Any, reads: frozenset[str], wanted: Wanted) -> None:
    """Raise DataError if there is no such row, or with the reason of the first of its examples that is left out."""
    tokenize = Tokenize(tokenizer, config.data, needs_behavior="behavior_logp" in reads)
    items = list(_items(config, wanted))
    if not items:
        raise DataError(f"--row: found no {wanted} in {_paths(config)[0]}, expected one that a row of the data has")
    fates = [(source, tokenize(item) if isinstance(item, Example) else item) for source, item in items]
    left_out = [(source, fate.reason) for source, fate in fates if isinstance(fate, (Dropped, LeftOut))]
    if left_out:
        source, reason = left_out[0]
        share = "" if len(items) == 1 else f" ({len(left_out)} of its {len(items)} examples)"
        raise DataError(f"{source}: dropped{share}: {reason}")


def _items(config: Config, wanted: Wanted) -> Iterator[tuple[Source, Example | Dropped]]:
    """What the adapter makes of the row: examples, and those that it leaves out."""
    for path in _paths(config):
        entry, settings = (
            (found := read_examples(path, config.data.adapter, limit=config.data.limit)).entry,
            found.settings,
        )
        for row, source in read_rows(path, limit=config.data.limit):
            if source in wanted:
                inputs = {"row": row, "source": source}
                for item in entry.function(*[inputs[name] for name in entry.reads], **settings):
                    if isinstance(item, (Example, Dropped)):
                        yield source, item


def _paths(config: Config) -> list[Any]:
    if config.data.task is not None:
        return list(task_files(config.data.task, Path(config.cache).expanduser() / "tasks"))
    return [path for path in (config.data.path, config.data.eval_path) if path is not None]


def show_example(
    data: Prepared, rows: Rows, index: int, use: str, objective: Objective, tokenizer: Any, display: Display
) -> None:
    """Where it comes from, its reward, its text in colour, and a table of its tokens."""
    columns = {name: values[0] for name, values in rows.take([index]).items()}
    batch = signals(data, rows, index, objective)
    ends = frozenset(end_tokens(tokenizer).values())
    display.say(f"{rows.source(index)}, {use}", *facts(columns, batch, rows, index, ends))
    display.console.print(coloured(columns, batch, tokenizer), soft_wrap=True)
    names = [name for name in OF_TOKENS if name in batch.signals]
    weights = token_weights(objective, batch)
    names += [] if weights is None else [f"weight of {objective}"]
    display.table(
        "tokens", ["target", "id", "token", "mask", *names, ""], token_rows(columns, batch, weights, tokenizer)
    )


def signals(data: Prepared, rows: Rows, index: int, objective: Objective) -> Batch:
    """The row as a batch of one, with what the data and its credit say of it."""
    known = data.known(rows)
    reads = {"token_weight", *(objective.reads & known.keys())} | ({"advantage"} & known.keys())
    reads |= {"behavior_logp"} if rows.has("behavior_logp") else set()
    collate = Collate(rows, frozenset(reads), dtype=torch.float64, credit=data.credit, known=known)
    return collate(np.array([index]))


def token_weights(objective: Objective, batch: Batch) -> list[float] | None:
    """`(t)`: the weights that the objective gives, or None if they depend on more than this row's data."""
    if not objective.reads <= batch.signals.keys():
        return None
    return objective(batch.signals).expand(batch.mask.shape)[0].tolist()


def facts(columns: dict[str, Any], batch: Batch, rows: Rows, index: int, ends: frozenset[int]) -> list[str]:
    """Reward and group, tokens and the end, in words."""
    ids, mask = columns["ids"], columns["mask"]
    reward = "none" if columns["reward"] is None else f"{columns['reward']:g}"
    alike = int((rows.group == rows.group[index]).sum())
    last = max(place for place, trained in enumerate(mask) if trained)
    end = "the end token is trained" if ids[last + 1] in ends else "no end token is trained: it learns to go on"
    return [
        f"reward {reward}; group of {alike} rows here ({columns['group'] or 'its own'})",
        f"{len(ids)} tokens, {sum(mask)} of them trained; {end}",
    ]


def coloured(columns: dict[str, Any], batch: Batch, tokenizer: Any) -> Text:
    """The text: dim where it is not trained, a bar where that begins, green, or red where the advantage is below 0."""
    out, before = Text(), False
    advantage = batch.signals.get("advantage", torch.zeros(1, 1)).expand(batch.mask.shape)[0]
    for place, text in enumerate(pieces(tokenizer, columns["ids"])):
        trained = place > 0 and columns["mask"][place - 1]
        out.append("│" if trained and not before else "", style="bold")
        colour = "red" if trained and advantage[place - 1] < 0 else "green"
        out.append(text, style=colour if trained else "dim")
        before = trained
    return out


def token_rows(
    columns: dict[str, Any], batch: Batch, weights: list[float] | None, tokenizer: Any
) -> Iterator[tuple[Any, ...]]:
    """A line for each target from shortly before the first trained one: what it is and what it counts for."""
    ids, mask = columns["ids"], columns["mask"]
    steps = dict(zip(columns["step_position"] or (), columns["step_reward"] or (), strict=True))
    given = [batch.signals[name].expand(batch.mask.shape)[0].tolist() for name in OF_TOKENS if name in batch.signals]
    given += [] if weights is None else [weights]
    ends, texts = end_tokens(tokenizer).values(), pieces(tokenizer, ids)
    for place in range(max(mask.index(True) - BEFORE, 0), len(mask)):
        trained, token = mask[place], ids[place + 1]
        numbers = [values[place] if trained else "" for values in given]
        notes = ["begins"] if trained and (place == 0 or not mask[place - 1]) else []
        notes += ["end"] if token in ends else []
        notes += [f"step reward {steps[place]:g}"] if place in steps else []
        text = repr(texts[place + 1]) if texts[place + 1] else tokenizer.convert_ids_to_tokens(token)
        yield place, token, text, int(trained), *numbers, ", ".join(notes)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, special ones too; a character in several tokens comes with the last of them.

    A token alone would lose the space before it, which SentencePiece writes only behind another one.
    """
    out: list[str] = []
    context, start = 0, 0  # where the piece before begins, and where this one does
    for end in range(1, len(ids) + 1):
        whole, before = _decode(tokenizer, ids[context:end]), _decode(tokenizer, ids[context:start])
        if whole.endswith("\ufffd") and end < len(ids):
            out.append("")
        else:
            out.append(whole[len(before) :])
            context, start = start, end
    return out


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
