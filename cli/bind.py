"""From a verb's options dataclass to a command: signature, help, flags. Verbs themselves know nothing of Typer."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from importlib import import_module
from typing import Any

import typer

from radlads.cli.render import forget_output, print_result, write_text
from radlads.cli.verbs import Verb
from radlads.errors import fail

ALSO = "_flag"  # ending of the parameter that carries the hidden spelling of an argument


def bind(verb: Verb) -> Callable[..., int]:
    """The function Typer calls for `verb`; it returns the exit status."""
    module = import_module(verb.module)
    options_class, function = getattr(module, verb.options), getattr(module, verb.function)

    def command(**values: Any) -> int:
        options = options_class(**_merged(verb, options_class, values))
        try:
            return _perform(function, options, verb.streams)
        except BrokenPipeError:
            return forget_output()

    parameters = _parameters(options_class)
    command.__name__ = verb.function
    command.__doc__ = verb.summary
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _perform(function: Callable[..., Any], options: Any, streams: bool) -> int:
    """Call the verb, print its result unless it was streamed, and return the exit status."""
    as_json = getattr(options, "json", False)
    if streams and not as_json:
        result = function(options, write=write_text)
    else:
        result = function(options)
        print_result(result, as_json=as_json)
    return getattr(result, "exit_status", 0)


def epilog(examples: Sequence[str]) -> str:
    """The end of a help page: commands that work as they stand."""
    # In Rich's markup a bracket opens a tag.
    return "\n".join(["[bold]Examples[/bold]", *(f"  $ {line}".replace("[", r"\[") for line in examples)])


def _parameters(options_class: type) -> list[inspect.Parameter]:
    # Arguments first, then the verb's own flags, then the shared groups, each in the order of the dataclass.
    ordered = sorted(fields(options_class), key=lambda f: (not f.metadata["argument"], bool(f.metadata.get("panel"))))
    parameters = []
    for item in ordered:
        if item.metadata["argument"]:
            parameters += _argument(item)
        else:
            parameters.append(_parameter(item.name, item.type, _option(item)))
    return parameters


def _argument(item: Field[Any]) -> list[inspect.Parameter]:
    meta = item.metadata
    required = item.default is MISSING and item.default_factory is MISSING
    if not meta["flags"]:
        default = ... if required else _default(item)
        info = typer.Argument(default, help=meta["help"], metavar=meta["metavar"], show_default=False)
        return [_parameter(item.name, item.type, info)]
    # Two spellings: neither is required by itself, `_merged` asks for one of them.
    shown = typer.Argument(None, help=meta["help"], metavar=meta["metavar"], show_default=False)
    hidden = typer.Option(None, *meta["flags"], hidden=True)
    kind = item.type | None  # type: ignore[operator]
    return [_parameter(item.name, kind, shown), _parameter(item.name + ALSO, kind, hidden)]


def _option(item: Field[Any]) -> Any:
    meta = item.metadata
    flags = meta["flags"] or ("--" + item.name.replace("_", "-"),)
    required = item.default is MISSING and item.default_factory is MISSING
    default = None if required else _default(item)
    return typer.Option(
        ... if required else default,
        *flags,
        help=meta["help"],
        metavar=meta["metavar"] or ("" if item.type is bool else None),  # a switch takes no value
        rich_help_panel=meta["panel"],
        show_default=default is not None and default is not False and default != [],
    )


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _merged(verb: Verb, options_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values with both spellings of an argument made one; R101 when both or neither are given."""
    for item in fields(options_class):
        if item.name + ALSO not in values:
            continue
        positional, flagged = values[item.name], values.pop(item.name + ALSO)
        if positional is not None and flagged is not None:
            why = f"{item.metadata['metavar']} is given twice, {positional} and {flagged}"
            raise fail("R101", where=f"radlads {verb.name}", why=why, fix="Give it once")
        value = flagged if positional is None else positional
        if value is None and item.default is MISSING:
            why = f"{item.metadata['metavar']} is missing"
            raise fail("R101", where=f"radlads {verb.name}", why=why, fix=f"For example: `{verb.examples[0]}`")
        values[item.name] = item.default if value is None else value
    return values
