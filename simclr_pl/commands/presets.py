"""`simclr presets`: the configurations that come with the package."""

import re
import shutil
from pathlib import Path

from simclr_pl.errors import InputError
from simclr_pl.presets import config_file, preset_files

_FACTS = ("Hardware", "Data", "Expected")


def presets(name: str | None = None, /, out: str | None = None) -> None:
    """List the configurations that come with the package; show one, or copy it to change it.

    For example:

        simclr presets
        simclr presets cifar10 --out my.yaml
        simclr fit --config my.yaml

    Args:
        name: Of the configuration to show; by default all are listed.
        out: A new file that gets the configuration.
    """
    if name is None:
        if out is not None:
            raise InputError(f"`--out` needs the name of a preset; got {out!r} alone. Give a name.")
        _print_list()
        return
    file = config_file(name)
    if out is None:
        print(file.read_text(), end="")
        return
    target = Path(out)
    if target.exists() or not target.absolute().parent.is_dir():
        raise InputError(
            f"`out` must be a new file in a folder that exists; got {out!r}. Give another."
        )
    shutil.copyfile(file, target)
    print(f"Copied to {target}; train with: simclr fit --config {target}")


def facts_of(text: str) -> dict[str, str]:
    """What the head of a configuration says, by its first word: Hardware, Data, Expected, Source."""
    facts: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        found = re.match(r"# ([A-Z]\w+)\s{2,}(.*)", line)
        if found:
            key, words = found[1], found[2]
        else:
            words = line[1:].strip()
        if key:
            facts[key] = f"{facts.get(key, '')} {words}".strip()
    return facts


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="simclr fit --config NAME", title_justify="left", show_lines=True)
    table.add_column("name", no_wrap=True)
    for heading in _FACTS:
        table.add_column(heading.lower(), ratio=1)
    for name, file in preset_files().items():
        facts = facts_of(file.read_text())
        table.add_row(name, *(_first_words(facts.get(heading, "-")) for heading in _FACTS))
    Console(highlight=False, markup=False, emoji=False).print(table)


def _first_words(text: str) -> str:
    """A fact up to its first semicolon or full stop."""
    return re.split(r"; |\. |\.$", text)[0]
