"""Entry point: the table of verbs, and how every ending becomes an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import click

from moekit import __version__
from moekit.config.errors import MoekitError, nearest

# verb: (section, sentence). The sentences stand here so that --help imports no verb; a test compares them.
VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("Start", "Train a dense, a recurrent and a sparse model on real text and compare them."),
    "doctor": ("Start", "Look at this machine: what moekit will use, what is missing and how to get it."),
    "plan": ("Train", "Parameters, memory, FLOPs and time of a run, before anything runs."),
    "train": ("Train", "Train a model from a YAML configuration."),
    "validate": (
        "Train",
        "Read and encode all examples of a task; what is wrong in a file is said with line and column.",
    ),
    "resume": ("Train", "Go on with a run from its last checkpoint."),
    "evaluate": (
        "Measure",
        "Measure a run: bits per byte per domain, speed, memory and balance; a task's metrics and experts.",
    ),
    "explain": (
        "Measure",
        "Show what the experts of a run do: loads, specialisation, routes and texts on one page.",
    ),
    "dashboard": (
        "Measure",
        "Watch runs while they train and compare them, on a live page of this machine alone.",
    ),
    "generate": ("Measure", "Continue a prompt with a trained model."),
    "fit": (
        "Measure",
        "What of a model fits a memory: precision, experts that stay, experts on disk.",
    ),
    "predict": (
        "Measure",
        "What a trained task says of an input, how sure it is, and which experts decided.",
    ),
    "design": (
        "Train",
        "Search for the experts, routers and sizes that serve a task best within a budget.",
    ),
    "tune": (
        "Train",
        "Search for the learning rate, batch size, dropout and other settings that serve a task best.",
    ),
    "recipes": ("Measure", "Tasks on real data, each by one command, against honest baselines."),
    "league": ("Measure", "Train every causal router for the same steps and rank them in one table."),
    "bench": (
        "Measure",
        "Time moekit against other libraries on this machine, in one run, with every answer checked.",
    ),
    "import": (
        "Convert",
        "Read a Hugging Face model or a GGUF file into a folder of moekit, with a certificate.",
    ),
    "export": (
        "Convert",
        "Write a model as a native Hugging Face folder or a GGUF file, with a certificate.",
    ),
    "verify": ("Convert", "Compare two models: the logits on the same token ids."),
    "convert": ("Convert", "Dense models into experts, experts into dense models, several models into one."),
    "compress": (
        "Convert",
        "Make a sparse model smaller: prune, merge or quantise its experts, with a report of what it costs.",
    ),
    "config": ("Look up", "Explain a configuration key, or show a whole configuration."),
    "data": ("Look up", "List the named corpora, or describe one."),
}

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPT, EXIT_BROKEN_PIPE = 0, 1, 2, 130, 141


class VerbGroup(click.Group):
    """A group that knows its verbs by name and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        verb: click.Command = importlib.import_module(f"moekit.cli.{cmd_name}").command
        return verb

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb {args[0]!r}: {nearest(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))
        for section in dict.fromkeys(section for section, _ in VERBS.values()):
            rows = [(f"{name:<{width}}", words) for name, (part, words) in VERBS.items() if part == section]
            with formatter.section(section):
                formatter.write_dl(rows)


@click.group(
    cls=VerbGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: moekit quickstart. Help on a verb: moekit VERB --help.",
)
@click.version_option(__version__, prog_name="moekit", message="%(prog)s %(version)s")
def cli() -> None:
    """The Mixture-of-Experts toolkit for PyTorch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; nothing that a user can cause ends in a traceback.

    MOEKIT_DEBUG=1 shows the traceback of an error that is reported in one paragraph otherwise.
    """
    warnings.formatwarning = _plain_warning
    # read when torch loads OpenMP. Threads that spin while they wait make a step ten times as slow as soon as
    # another process wants a core: 13 s against 0.9 s, seen with two threads on two busy cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "_MOEKIT_COMPLETE" in os.environ:  # a shell asks for completions
        cli.main(prog_name="moekit")
    try:
        # not cli.main(): it ends the process by itself in ways that differ between versions of click
        with cli.make_context("moekit", list(sys.argv[1:] if arguments is None else arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return EXIT_OK
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except MoekitError as error:
        return _report(error, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        hint = f". Help: {where.command_path} --help" if where is not None else ""
        return _report(f"{error.format_message().rstrip('.?')}{hint}", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPT
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich turns one into an exit of its own
            return EXIT_BROKEN_PIPE
        raise
    except OSError as error:
        return _report(error, EXIT_FAILURE)


def _report(error: Exception | str, code: int) -> int:
    if isinstance(error, Exception) and os.environ.get("MOEKIT_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
    return code


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What a user reads of a warning: its text, without the line of code that gave it."""
    return f"warning: {message}\n"


def _silence_stdout() -> None:
    """Let the interpreter's last flush go nowhere; the reader of the pipe has left."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
