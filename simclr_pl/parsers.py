"""How the commands' options are parsed, and how their help reads.

A function's signature and docstring are its options and their help, by jsonargparse.
"""

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from textwrap import fill
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
)

_SECTIONS = {
    "Images": ("dataset", "split", "size", "bank_size"),
    "Result": ("out", "track", "report"),
    "Machine": ("devices", "accelerator", "precision", "num_workers", "workers"),
}
_METAVARS = {"int": "INT", "float": "NUMBER", "str": "TEXT"}


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, shorter: types stand in for values, and what may be null has no default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action: argparse.Action) -> str:
        if isinstance(action, (ActionConfigFile, argparse._HelpAction)):
            return super()._get_help_string(action)
        if action.dest == "print_config":
            return "Print all options, with those that are given, as YAML and exit."
        text, default = action.help or "", _shown(action.default)
        text = text[:1].upper() + text[1:]
        return f"{text} (default: {default})" if default and action.option_strings else text

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action, ActionConfigFile):
            return "FILE"
        names = (self._get_type_str(action) or "").split(" | ")
        found = [_METAVARS[name] for name in names if name in _METAVARS]
        return found[0] if found else "VALUE"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")  # indented paragraphs are commands: left as they are
        return "\n\n".join(
            p if p[:1].isspace() else fill(" ".join(p.split()), width) for p in parts
        )


def _shown(default: Any) -> str:
    """A default as a user would give it; empty where help says it, or there is none."""
    if default in (None, argparse.SUPPRESS, [], ()):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, tuple)):
        values = (f"{v:g}" if isinstance(v, float) else str(v) for v in default)
        return f"[{', '.join(values)}]"
    class_path = getattr(default, "get", lambda _: None)("class_path")
    return str(class_path or default).rpartition(".")[2] if class_path else str(default)


class HelpPage:
    """A parser's help page: a short usage, and sections in place of the parser's groups.

    Mixed into a parser. `sections` yields the titles and options of the page.
    """

    def sections(self: Any) -> Iterator[tuple[str, list[argparse.Action]]]:
        """Arguments, options by what they concern, and help itself."""
        actions = [a for a in self._actions if a.help != argparse.SUPPRESS]
        yield "Arguments", [a for a in actions if not a.option_strings]
        named = {name for names in _SECTIONS.values() for name in names}
        last = {"help", "config", "print_config"}
        options = [a for a in actions if a.option_strings and _key(a) not in named | last]
        yield "Options", options
        for title, names in _SECTIONS.items():
            yield title, [a for a in actions if _key(a) in names]
        yield "Help, and options from a file", [a for a in actions if _key(a) in last]

    def format_help(self: Any, *args: Any) -> str:
        """The page."""
        groups = self._action_groups
        found = (
            SimpleNamespace(title=t, description=None, _group_actions=a) for t, a in self.sections()
        )
        self._action_groups = [group for group in found if group._group_actions]
        try:
            return super().format_help(*args)  # type: ignore[misc,no-any-return]
        finally:
            self._action_groups = groups


def _key(action: argparse.Action) -> str:
    return action.option_strings[-1].lstrip("-").rstrip("+") if action.option_strings else ""


class Parser(HelpPage, ArgumentParser):  # type: ignore[misc]
    """Of one function."""


def parser_of(function: Callable, prog: str) -> Parser:
    """A parser whose options are a function's parameters.

    Positional are parameters without a default, of a list one or more words, and those before a "/",
    which may be left out.

    Args:
        function: with a docstring in Google's style; what comes before its `Args:` opens the help.
        prog: e.g. "simclr linear".
    """
    parser = Parser(prog=prog, formatter_class=HelpFormatter)
    parser.description = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file of these options.")
    plain = ArgumentParser()
    plain.add_function_arguments(function, as_group=False)
    texts = {action.dest: action.help for action in plain._actions}
    words = [prog]
    for name, parameter in inspect.signature(function).parameters.items():
        word, kind = name.upper(), parameter.annotation
        optional = parameter.kind is parameter.POSITIONAL_ONLY
        if not optional and parameter.default is not parameter.empty:
            continue
        options: dict[str, Any] = {"nargs": "?", "default": parameter.default} if optional else {}
        if get_origin(kind) is list:
            options, kind = {"nargs": "+"}, get_args(kind)[0]
        if get_origin(kind) is not Literal:  # whose choices stand for it
            options["metavar"] = word
        parser.add_argument(name, type=kind, help=texts[name], **options)
        words.append({"?": f"[{word}]", "+": f"{word} ..."}.get(options.get("nargs", ""), word))
    added: set[str | int] = {action.dest for action in parser._actions}
    parser.add_function_arguments(function, as_group=False, skip=added)
    parser.usage = " ".join([*words, "[OPTIONS]"])
    return parser


def call(function: Callable, prog: str, args: Sequence[str]) -> int | None:
    """Calls a function with options from the command line; what it returns is the exit code."""
    parser = parser_of(function, prog)
    values = parser.instantiate(parser.parse_args(list(args)))
    parameters = inspect.signature(function).parameters.values()
    first = [values.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    values.pop("config", None)
    return function(*first, **values)  # type: ignore[no-any-return]
