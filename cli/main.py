"""The `radlads` command: the tree of verbs, and one line and one exit status for everything that goes wrong."""

import errno
import os
import re
import sys
import traceback
from typing import Any

import typer

from radlads import __version__
from radlads.cli.bind import bind, epilog
from radlads.cli.render import forget_output
from radlads.cli.verbs import GROUPS, VERBS, Verb
from radlads.errors import RadladsError, fail, nearest, printable

# Spellings of other tools; `--top_p` is taken for `--top-p` as well.
SYNONYMS = {"temperature": "temp", "max-new-tokens": "max-tokens"}

# How PyTorch and MLX say it, in errors of no type of their own.
NO_MEMORY = re.compile(r"out of memory|unable to allocate|can't allocate memory", re.IGNORECASE)
INTERRUPTED = 130
STARTS = ("radlads train", "radlads chat runs/tiny-rwkv7/model", "radlads generate --help")
ABOUT = "Turn a softmax-attention transformer into a linear-attention RWKV model, and use it."


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit status."""
    try:
        status = build_app()(args=argv, prog_name="radlads", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return forget_output()
    except Exception as error:
        if os.environ.get("RADLADS_DEBUG"):
            traceback.print_exc()
        known = as_known(error)
        if known is None:
            hint = "" if os.environ.get("RADLADS_DEBUG") else ". Set RADLADS_DEBUG=1 to see where it comes from"
            print(f"error: unexpected {type(error).__name__}: {printable(str(error))}{hint}", file=sys.stderr)
            return 1
        print(f"error: {known}", file=sys.stderr)
        return known.exit_status


def build_app() -> typer.Typer:
    """The Typer application of the table of verbs."""
    settings = {"help_option_names": ["-h", "--help"], "token_normalize_func": spelling}
    app = typer.Typer(
        help=ABOUT, context_settings=settings, rich_markup_mode="rich", pretty_exceptions_enable=False, epilog=epilog(STARTS)
    )
    app.callback(invoke_without_command=True)(_root)
    groups: dict[str, typer.Typer] = {}
    for verb in VERBS:
        group, _, name = verb.name.rpartition(" ")
        if group and group not in groups:
            panel, summary = GROUPS[group]
            groups[group] = typer.Typer(help=summary, rich_markup_mode="rich")
            groups[group].callback(invoke_without_command=True)(_help_when_alone)
            app.add_typer(groups[group], name=group, rich_help_panel=panel)
        _add(groups[group] if group else app, name, verb, None if group else verb.panel)
    return app


def spelling(word: str) -> str:
    """The spelling of a flag or verb that the tree knows: dashes, and our word for another tool's."""
    dashed = word.replace("_", "-")
    return SYNONYMS.get(dashed, dashed)


def as_known(error: Exception) -> RadladsError | None:
    """The error with a code that `error` amounts to: bad usage, no memory, no access; None when it is a surprise."""
    if isinstance(error, RadladsError):
        return error
    if hasattr(error, "format_message"):  # every usage error of Typer, whichever Click it carries
        return _usage(error)
    text = str(error)
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        why = text.split("\n")[0] or "the machine has no memory left"
        return fail("R403", where="memory", why=why, fix="Use a smaller model, batch or --dtype")
    if isinstance(error, OSError) and error.filename is not None:
        code = "R402" if error.errno == errno.ENOSPC else "R201"
        return fail(code, where=error.filename, why=error.strerror or text, fix="Check the path and its permissions")
    return None


def _usage(error: Any) -> RadladsError:
    """One line for what Typer says about a flag, a verb or a value, with the nearest right one."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "radlads"
    why, _, guess = " ".join(error.format_message().split()).partition(" Did you mean ")
    why = why.replace("Value error, ", "").replace("Input should be", "it must be")
    near = nearest(getattr(error, "option_name", ""), getattr(error, "possibilities", None) or ())
    if near:
        why, guess = f"no such option {error.option_name}", f"{near}?"
    fix = f"Did you mean {guess}" if guess else f"See `{where} --help`."
    return RadladsError("R101", where, printable(why.rstrip(".")), fix)


def _add(app: typer.Typer, name: str, verb: Verb, panel: str | None) -> None:
    command = bind(verb)
    app.command(name, help=verb.summary, epilog=epilog(verb.examples), rich_help_panel=panel)(command)
    for alias in verb.aliases:
        app.command(alias, hidden=True, help=verb.summary, epilog=epilog(verb.examples))(command)


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        print(f"radlads {__version__}")
        raise typer.Exit
    _help_when_alone(context)


def _help_when_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit
