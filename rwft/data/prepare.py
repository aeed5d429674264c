"""From the data section of a config to tokenised rows, held-out rows, fitted credit, and a report of all of it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwft.config import CreditConfig, DataConfig, plain
from rwft.data.adapters import Examples, read_examples
from rwft.data.columns import spans
from rwft.data.credit import VALUE, Credit, fit
from rwft.data.example import Example
from rwft.data.ledger import dropped_lines
from rwft.data.rows import Rows, open_rows, record, write_rows
from rwft.data.sources import local_files
from rwft.data.tasks import task_files
from rwft.data.tokenize import ANSWER_TOO_LONG, TOO_LONG, Dropped, Tokenize
from rwft.data.workers import tokens_of, worker_count
from rwft.durable import sha256, write_atomic
from rwft.errors import DataError
from rwft.signals import SIGNALS

VERSION = "rows-4"
SEEN = "row of data.eval_path with a prompt that is also trained on"
BLOCK = 256  # examples tokenised at once


@dataclass
class Report:
    """What happened to the rows on their way: printed at the start of a run and by `rwft data`."""

    description: str = ""
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason -> which was dropped first for it, if that is told

    def lines(self) -> list[str]:
        """One sentence a fact."""
        out = [self.description] if self.description else []
        out.append(f"{self.kept} examples to train and evaluate on, from {self.read} rows")
        out += dropped_lines(self.dropped, self.first)
        out += [f"{number} x {note}" for note, number in sorted(self.notes.items())]
        return out


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, rows held out (perhaps none), and the credit fitted on the former (None without rewards)."""

    train: Rows
    held_out: Rows | None
    credit: Credit | None
    report: Report
    _known: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict, repr=False)  # by split

    def known(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """Signals with one value a row `(n)`, or one for all `()`, of a whole split; none where rewards are missing.

        No advantage either where the baseline is the rows' value and one lacks it.
        """
        if rows.fingerprint not in self._known:
            self._known[rows.fingerprint] = self._signals(rows)
        return dict(self._known[rows.fingerprint])

    def _signals(self, rows: Rows) -> dict[str, NDArray[Any]]:
        if self.credit is None or np.isnan(rows.reward).any():
            return {}
        given, folder = (rows.reward, rows.group, rows.trained), rows.folder
        known = {name: np.asarray(value) for name, value in self.credit.signals(*given, folder=folder).items()}
        known["reward"] = rows.reward
        if lacks_value(rows, self.credit.config):
            return known
        terms = self.credit.terms(*given, rows.value, folder=folder)
        advantage = self.credit.of_terms(rows.reward, terms, folder=folder)
        return known | {"advantage": advantage, **terms._asdict()}


def prepare(
    config: DataConfig, tokenizer: Any, reads: frozenset[str], cache: Path, tick: Callable[[int], None] = lambda _: None
) -> Prepared:
    """Read, adapt, tokenise and split; fit credit on the training rows.

    Raises DataError for rows that cannot be read and for signals that the objective reads and the data lack.
    """
    tokenize = Tokenize(tokenizer, config, needs_behavior="behavior_logp" in reads)
    path, eval_path = config.path, config.eval_path
    if config.task is not None:
        path, eval_path = task_files(config.task, cache / "tasks")
    report = Report()
    rows = tokenised(path, config, tokenize, cache, report, tick)
    _check_some(rows, report, config.max_length)
    if eval_path is not None:
        held_out = tokenised(eval_path, config, tokenize, cache, Report(), tick)
        if seen := _also_trained(held_out, rows):
            report.notes[SEEN] += seen
    else:
        rows, held_out = split(rows, config.eval_fraction)
    require(rows, reads, config.credit)
    given, credit = (rows.reward, rows.group, rows.trained), None
    if not np.isnan(rows.reward).any():
        credit = fit(config.credit, *given, folder=rows.folder)
    return Prepared(rows, held_out if held_out is not None and len(held_out) else None, credit, report)


def _also_trained(held_out: Rows, rows: Rows) -> int:
    """How many of the held-out rows are of a group, which is a prompt unless the data say otherwise, of the others."""
    groups, rest = np.unique(held_out.group), held_out.group
    if not len(groups):
        return 0
    both = np.zeros(len(groups), dtype=bool)
    for part in spans(len(rows)):
        place = np.minimum(np.searchsorted(groups, rows.group[part]), len(groups) - 1)
        both[place[groups[place] == rows.group[part]]] = True
    return int(both[np.searchsorted(groups, rest)].sum())


def _check_some(rows: Rows, report: Report, limit: int) -> None:
    """Refuse data of which nothing is left, and say why."""
    if len(rows):
        return
    if set(report.dropped) <= {TOO_LONG, ANSWER_TOO_LONG}:
        raise DataError(
            f"data: all {sum(report.dropped.values())} rows are longer than data.max_length ({limit}), expected some "
            "that fit; raise data.max_length, or set data.overlong: truncate_prompt, which keeps the answers"
        )
    raise DataError("data: no rows are left to train on: " + "; ".join(report.lines()))


def tokenised(
    path: Any, config: DataConfig, tokenize: Tokenize, cache: Path, report: Report, tick: Callable[[int], None]
) -> Rows:
    """Tokenised rows of some files, from the cache if these very files were tokenised this way before."""
    content = content_digests(path)
    settings = [plain(config.adapter), config.limit, str(path)]
    key = json.dumps([VERSION, content, tokenize.fingerprint(), settings], sort_keys=True, default=str)
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    file = cache / "rows" / f"{fingerprint[:40]}.arrow"
    summary = file.with_suffix(".json")
    if content is None or not file.is_file() or not _load_report(report, summary):
        examples = read_examples(path, config.adapter, limit=config.limit)
        workers = worker_count(config, path)
        with closing(_records(examples, tokenize, report, tick, workers)) as records:
            write_rows(records, file)
        report.description, report.read = examples.description, examples.ledger.rows
        report.dropped.update(examples.ledger.dropped)
        report.first.update(examples.ledger.first)
        report.notes.update(examples.ledger.notes)
        _save_report(report, summary)
    if content is None:  # nothing local to recognise the rows by, so they are known by what was made of them
        fingerprint = sha256(file)
    return open_rows(file, fingerprint)


def content_digests(path: Any) -> list[str] | None:
    """sha256 of every local file that `path` names, in order; None if something is not local."""
    files = local_files(path)
    return None if files is None else [sha256(file) for file in files]


def _records(
    examples: Examples, tokenize: Tokenize, report: Report, tick: Callable[[int], None], workers: int
) -> Generator[Mapping[str, Any], None, None]:
    for block, made in tokens_of(_blocks(examples), tokenize, workers):
        for example, tokens in zip(block, made, strict=True):
            if isinstance(tokens, Dropped):
                report.dropped[tokens.reason] += 1
                continue
            report.notes.update(tokens.notes)
            report.kept += 1
            yield record(example, tokens)
        tick(len(block))


def _blocks(examples: Examples) -> Iterator[list[Example]]:
    stream = iter(examples)
    while block := list(itertools.islice(stream, BLOCK)):
        yield block


def _save_report(report: Report, path: Path) -> None:
    content = {"description": report.description, "read": report.read, "kept": report.kept}
    content |= {"dropped": dict(report.dropped), "notes": dict(report.notes), "first": report.first}
    write_atomic(path, json.dumps(content))


def _load_report(report: Report, path: Path) -> bool:
    """Fill the report from the cache; False if it holds none that can be read, so that the rows are made anew."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        dropped, notes, first = Counter(content["dropped"]), Counter(content["notes"]), content.get("first", {})
        report.description, report.read, report.kept = content["description"], content["read"], content["kept"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    report.dropped.update(dropped)
    report.notes.update(notes)
    report.first.update(first)
    return True


def split(rows: Rows, fraction: float) -> tuple[Rows, Rows]:
    """Hold out a fraction of the *prompts*: all rows of a group go to one side, whatever the order or the seed."""
    if fraction == 0:
        return rows, rows.subset(np.zeros(len(rows), dtype=bool), "none")
    held = rows.group < fraction * 2.0**63  # a group's number is a hash of its name
    if not held.any():  # a fraction above zero holds out one prompt at the least,
        held = rows.group == rows.group.min()
    if held.all():  # but never the only one
        held = np.zeros(len(rows), dtype=bool)
    return rows.subset(~held, f"train {fraction}"), rows.subset(held, f"held out {fraction}")


def lacks_value(rows: Rows, credit: CreditConfig) -> bool:
    """Whether the baseline is to be each row's value and some row has none."""
    return credit.baseline == VALUE and bool(np.isnan(rows.value).any())


def require(rows: Rows, reads: frozenset[str], credit: CreditConfig) -> None:
    """Refuse data that lack what the objective reads, naming a row that lacks it."""
    needs = sorted(name for name in reads if name == "reward" or SIGNALS[name].source == "credit")
    if needs and np.isnan(rows.reward).any():
        null = np.flatnonzero(np.isnan(rows.reward))
        if len(null) < len(rows):
            raise DataError(
                f"{rows.source(int(null[0]))}: reward: found null, as in {len(null)} of {len(rows)} rows to train on, "
                f"expected a number in each, since the objective reads {', '.join(needs)}; leave these rows out of the "
                "data, or choose an objective without rewards, such as sft"
            )
        index = int(null[0])
        raise DataError(
            f"{rows.source(index)}: no reward, but the objective reads {', '.join(needs)}; give a reward column, "
            "e.g. adapter: {name: scored, reward: <column>}, or choose an objective without rewards, such as sft"
        )
    if "advantage" in reads and lacks_value(rows, credit):
        index = int(np.flatnonzero(np.isnan(rows.value))[0])
        raise DataError(
            f"{rows.source(index)}: no value, but data.credit.baseline: value takes it from the reward; give a column "
            "of values, e.g. adapter: {name: scored, value: <column>}, or choose another baseline, such as group_mean"
        )
    if "behavior_logp" in reads and not rows.has("behavior_logp"):
        index = int(np.flatnonzero(rows.missing("behavior_logp"))[0])
        raise DataError(
            f"{rows.source(index)}: no log-probabilities of the behaviour policy (behavior_logp), which the objective, "
            "train.watch or evaluate.off_policy reads; give one per completion token, or choose an objective that "
            "does without (rwft objectives lists what each reads)"
        )
