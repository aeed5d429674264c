"""The `rwft` command: train, compare, evaluate, objectives, data, check, new. No logic lives here."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

from rwft.errors import ConfigError, RwftError
from rwft.redaction import redact

app = typer.Typer(
    name="rwft",
    help="Reward-weighted fine-tuning: offline reinforcement learning for language models, one weight at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: rwft objectives, then rwft data FILE, then rwft train CONFIG.",
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file; see the folder configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file, e.g. train.lr=1e-5."),
]
Replay = Annotated[
    bool,
    typer.Option("--replay", help="CONFIG is a finished run's folder: run it again from its manifest and compare."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an earlier run in the same output aside and start over.")]
Plan = Annotated[
    bool, typer.Option("--plan", help="Train nothing: print parameters, memory per device, rows, steps and tokens.")
]
Processes = Annotated[
    int | None, typer.Option("--processes", metavar="N", help="With --plan: for N processes, not the launcher's.")
]
Engine = Annotated[
    str | None, typer.Option("--engine", help="With --plan: one, ddp, fsdp2 or deepspeed_zero2 or _zero3.")
]


def show_version(asked: bool) -> None:
    """Print the version and end, if it was asked for."""
    if asked:
        from rwft import __version__

        typer.echo(f"rwft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Reward-weighted fine-tuning: offline reinforcement learning for language models, one weight at a time."""


@app.command(epilog="Example: rwft train configs/awr.yaml objective=dft train.steps=200 output=runs/dft")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Fresh = False,
    replay: Replay = False,
    plan: Plan = False,
    processes: Processes = None,
    engine: Engine = None,
) -> None:
    """Train a policy. The same command in the same output goes on where it stopped."""
    if plan:
        from rwft.plan import plan_command

        return plan_command(config, overrides or [], processes, engine)
    if processes is not None or engine is not None:
        raise ConfigError("--processes and --engine: say what to plan for; give them with --plan")
    if replay:
        from rwft.replay import replay_command

        return replay_command(config, overrides or [])
    from rwft.config import load_config
    from rwft.loop import train as run

    run(load_config(config, overrides or []), fresh=fresh)


@app.command(epilog="Example: rwft compare configs/demo.yaml objective=sft,dft,rwr,iw_sft,[dft,filtered_bc] seeds=3")
def compare(config: ConfigFile, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train several objectives and seeds on the same data order; a table, a report (HTML) and which to choose."""
    from rwft.compare import compare_command

    compare_command(config, overrides or [], fresh=fresh)


@app.command(epilog="Example: rwft evaluate runs/awr evaluate.verifier=numeric evaluate.off_policy=true")
def evaluate(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The output folder of a run, or a config whose model is evaluated.")
    ],
    overrides: Overrides = None,
) -> None:
    """Measure a policy on held-out rows: likelihood, off-policy value, and with a verifier its samples' reward."""
    from rwft.evaluate import evaluate_command

    evaluate_command(run, overrides or [])


@app.command(epilog="Example: rwft objectives dft")
def objectives(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One objective, by name or path/to/file.py:function.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw its weight curve into this PNG.")] = None,
) -> None:
    """List the objectives by family with what each reads, or explain one."""
    from rwft.catalogue import describe, draw, overview

    if plot is not None and name is None:
        raise ConfigError(f"--plot {plot}: one objective is drawn at a time; name it, e.g. rwft objectives dft --plot")
    typer.echo(overview() if name is None else describe(name))
    if plot is not None and name is not None:
        draw(name, plot)


@app.command(epilog="Example: rwft data rollouts.jsonl    or: rwft data configs/rwr.yaml objective.temperature=0.5")
def data(
    source: Annotated[str, typer.Argument(metavar="CONFIG|FILE", help="A config, or a data file or folder by itself.")],
    overrides: Overrides = None,
    row: Annotated[
        str | None, typer.Option("--row", metavar="N|FILE:N", help="Show one row of CONFIG's data token by token.")
    ] = None,
) -> None:
    """Show what is in the data: format, rewards, lengths, groups, what is dropped and why, and the weights."""
    if row is not None:
        from rwft.rowview import row_command

        return row_command(source, overrides or [], row)
    from rwft.inspection import inspect_command

    inspect_command(source, overrides or [])


@app.command(epilog="Examples: rwft check my_objective.py:sqrt_dft    rwft check configs/awr.yaml model.dtype=float64")
def check(
    target: Annotated[
        str, typer.Argument(metavar="OBJECTIVE|CONFIG", help="A name, path/to/file.py:function, or a YAML file.")
    ],
    overrides: Overrides = None,
) -> None:
    """Put an objective through the conformance suite; with a config, its data and model too."""
    from rwft.invariance import check_config_command
    from rwft.testing import check_command

    if target.endswith((".yaml", ".yml")):
        check_config_command(target, overrides or [])
    elif overrides:
        raise ConfigError(
            f"'{overrides[0]}': settings go with a config; an objective alone is checked as it is defined"
        )
    else:
        check_command(target)


def print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of a bug, here or in a function of the user's, on standard error."""
    typer.echo(redact("".join(traceback.format_exception(kind, error, trace))), err=True)


@app.command(epilog="Example: rwft new sqrt_dft, then cd sqrt_dft && pip install -e '.[test]' && pytest")
def new(name: Annotated[str, typer.Argument(metavar="NAME", help="A Python name for the objective.")]) -> None:
    """Write a plugin package with an objective of your own, its conformance test, a config and a README."""
    from rwft.skeleton import new_command

    typer.echo("\n".join(new_command(name)))


def main() -> None:
    """Run the command line; mistakes end in one line on standard error and their exit status."""
    try:
        app(standalone_mode=True)
    except SystemExit as done:
        if done.code == 128 + signal.SIGINT:  # Typer's, for Ctrl-C outside of training steps
            typer.echo("rwft: interrupted; nothing is half-written, the same command starts again", err=True)
        if done.code:
            raise
    except RwftError as error:
        typer.echo(f"rwft: {redact(str(error))}", err=True)
        sys.exit(error.exit_status)
    except Exception:
        sys.excepthook = print_redacted  # Typer has set its own
        raise
    if "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
