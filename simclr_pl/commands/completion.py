"""`simclr completion`: a script by which a shell completes the words of a command."""

import argparse
from collections.abc import Callable
from typing import Literal

import shtab
from jsonargparse import ArgumentParser, capture_parser

from simclr_pl.cli import _VERBS, command_of
from simclr_pl.parsers import parser_of
from simclr_pl.presets import preset_files
from simclr_pl.training_cli import SimCLRCLI

# What a config may be: a preset's name, or a file.
_CONFIGS = {"bash": "_simclr_configs", "zsh": "_simclr_configs"}
_PREAMBLE = {
    "bash": '_simclr_configs() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_simclr_configs() {{ compadd {names}; _files }}",
}


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script that lets a shell complete commands, options and their choices.

    Write it anew after an update. For this shell alone, and for every new one:

        eval "$(simclr completion bash)"
        simclr completion bash > ~/.local/share/bash-completion/completions/simclr

    Args:
        shell: Which one.
    """
    top = argparse.ArgumentParser("simclr")
    verbs = top.add_subparsers()
    runs = capture_parser(lambda: SimCLRCLI(["fit"]))._subcommands_action
    assert runs is not None
    for verb, about in _VERBS.items():
        page = verbs.add_parser(verb, help=about.text, add_help=False)
        if about.place is None or about.raw:  # what is raw takes the options of `simclr fit`, too
            name = verb if about.place is None else "fit"
            _copy(runs._name_parser_map[name], page)
            continue
        command = command_of(verb)
        if not isinstance(command, dict):
            _copy_function(command, page)
            continue
        words = page.add_subparsers()
        for word, function in command.items():
            _copy_function(function, words.add_parser(word, help=word, add_help=False))
    preamble = _PREAMBLE[shell].format(names=" ".join(preset_files()))
    print(shtab.complete(top, shell, preamble=preamble))


def _copy_function(function: Callable, page: argparse.ArgumentParser) -> None:
    _copy(parser_of(function, page.prog), page)


def _copy(source: ArgumentParser, page: argparse.ArgumentParser) -> None:
    """Copies words and choices. jsonargparse's own script, with all modules there are, takes minutes."""
    for action in source._actions:
        names = action.option_strings or [action.dest]
        text = (action.help or "").split(". ")[0].replace("%", "%%")
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            page.add_argument(*names, action="store_true", help=text)
            continue
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        choices = metavar[1:-1].split(",") if metavar.startswith("{") else None
        copied = page.add_argument(*names, choices=choices, help=text)
        if choices is None:
            is_config = action.dest in ("config", "name")
            copied.complete = _CONFIGS if is_config else shtab.FILE  # type: ignore[attr-defined]
