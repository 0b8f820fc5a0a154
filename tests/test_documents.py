"""Every command and every block of Python in the documents runs, or says here why it does not."""

import ast
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from simclr_pl.cli import _VERBS, command_of, main
from simclr_pl.parsers import parser_of
from tests.trained import digits_folder, digits_run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs").glob("speedrun/*.yaml")])
SHELL = ("", "bash", "sh", "shell", "console")
# What a command is shortened by; the tests of the command run it as it is.
SHORT = {
    "fit": ["--trainer.fast_dev_run", "true"],
    "finetune": ["--epochs", "1", "--batch_size", "32"],
    "distill": ["--epochs", "1"],
    "linear --augment": ["--epochs", "1"],
    "doctor --config": ["--seconds", "5", "--images", "8"],
}
# Commands with these words are parsed, with all their options, and not run.
PARSED = {
    "s3://": "needs an object store",
    "wandb": "writes to a tracker: tests/test_trackers.py",
    "--pretrained": "fetches weights",
    "resnet18 --dataset": "a full-size network: tests/test_commands_encoders.py",
    "litdata": "tests/test_data_streaming.py",
    "import ": "needs a file of another program: tests/test_commands_import_weights.py",
    "encoder.safetensors": "the file that `simclr import` would write",
    "onnx": "tests/test_commands_export.py",
    "--resume": "tests/test_resume.py",
    "similarity ": "needs a run of texts: tests/test_commands_similarity.py",
    "--trainer.devices": "several processes: tests/test_two_hosts.py and others",
    "--trainer.num_nodes": "several machines",
}


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(text: str) -> Iterator[Block]:
    """Fenced blocks, in order."""
    for indent, head, body in re.findall(r"(?ms)^( *)```([^\n`]*)\n(.*?)^\1```", text):
        title = re.search(r'title="([^"]+)"', head)
        language = (head.split() or [""])[0]
        yield Block(language, title[1] if title else "", textwrap.dedent(indent + body))


def commands(text: str) -> list[str]:
    """Lines that call `simclr` or `make`, joined where they go on, without comments and pipes."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
        if re.match(r"(simclr|make)( |$)", line):
            found.append(shlex.join(_words(line)))
    return found


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list(lexer)
    ends = (i for i, word in enumerate(words) if set(word) <= set("|&;<>"))
    return words[: next(ends, None)]


def header(config: Path) -> str:
    """The commands that open a config, up to its first empty line, as a shell would read them."""
    first = re.split(r"(?m)^#?$", config.read_text())[0]
    lines = [line.lstrip("#").strip().rstrip("\\") for line in first.splitlines()]
    joined = "\n".join(lines).replace("\n--", " --")
    return re.sub(r" {4,}\(.*", "", joined)


def first_uses() -> dict[Path, list[str]]:
    """Each command once, with the first document that has it."""
    seen: set[str] = set()
    found: dict[Path, list[str]] = {}
    for file in [*DOCUMENTS, *CONFIGS]:
        text = file.read_text()
        shell = "\n".join(b.text for b in blocks(text) if b.language in SHELL)
        every = commands(header(file) if file in CONFIGS else shell)
        # `distill` takes what `finetune` leaves, whichever document is first
        found[file] = [c for c in dict.fromkeys(every) if c not in seen or "finetune RUN" in c]
        seen.update(every)
    return found


COMMANDS = first_uses()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the documents' placeholders; "." is where the commands run."""
    work = tmp_path_factory.mktemp("documents")
    digits_folder(work / "photos")
    run = digits_run(work / "runs")
    main(["data", "pack", str(work / "photos"), str(work / "packed")])
    values = {"RUN": run, "FOLDER": work / "photos", "PACKED": work / "packed", ".": work}
    values["CHECKPOINT"] = run / "checkpoints" / "last.ckpt"
    return {name: str(value) for name, value in values.items()} | {"FILE": "file"}


def filled(command: str, stand_ins: dict[str, str]) -> list[str]:
    """The words of a command, with what stands for the placeholders."""
    words = []
    for word in shlex.split(command)[1:]:
        word = re.sub(r"\$\w+|\$\{\w+\}", "1", word)  # of a loop in the shell
        word = re.sub(r"^(runs/\w+/version_\d)(?=/|$)", "RUN", word)
        word = re.sub(r"\b[A-Z]+\b", lambda m: stand_ins.get(m[0], m[0]), word)
        words.append(re.sub(r"^configs/", f"{ROOT}/configs/", word))
    return words


def is_run(command: str) -> bool:
    own = not command.startswith("simclr fit") or re.search(
        "--config \\S*quickstart|--help", command
    )
    return bool(own) and not any(word in command for word in PARSED)


def parse(words: list[str]) -> None:
    """Reads the options of a command, as the command would, and does nothing."""
    verb, *others = words
    if verb == "doctor":
        verb = "fit"  # takes the same, and two of its own
    if _VERBS[verb].place is None:
        with pytest.raises(SystemExit) as leaving:
            main([verb, *others, "--print_config"])
        assert not leaving.value.code
        return
    command: Any = command_of(verb)
    if isinstance(command, dict):
        command, others = command[others[0]], others[1:]
    parser_of(command, f"simclr {verb}").parse_args(others)


def exit_code(words: list[str]) -> int | str | None:
    """Runs a command, shortened."""
    line = " ".join(words)
    short = next((more for start, more in SHORT.items() if _is_of(line, start)), [])
    if "--help" in words:
        short = []
    elif "--epochs" in words:
        short = short[2:]
    try:
        main([*words, *short])
    except SystemExit as leaving:
        return leaving.code
    return None


def _is_of(line: str, start: str) -> bool:
    verb, *options = start.split()
    return line.split()[0] == verb and all(option in line.split() for option in options)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the commands share one place
@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.name)
def test_commands_are_right(
    file: Path, stand_ins: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stand_ins["."])
    monkeypatch.syspath_prepend(stand_ins["."])
    for block in blocks(file.read_text()) if file in DOCUMENTS else ():
        if block.title:
            Path(block.title).write_text(block.text)
    options: set[frozenset[str]] = set()
    for command in COMMANDS[file]:
        words = filled(command, stand_ins)
        if command.startswith("make"):
            subprocess.run(["make", "-n", "-C", str(ROOT), *words], check=True, capture_output=True)
            continue
        kind = frozenset(word for word in command.split() if not word[:1].isdigit())
        if is_run(command) and kind not in options:
            assert not exit_code(words), command
        elif words:
            parse(words)
        options.add(kind)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_python_runs(
    file: Path, stand_ins: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stand_ins["."])
    monkeypatch.setattr(sys, "path", [stand_ins["."], *sys.path])
    names: dict[str, Any] = {"__name__": file.stem}
    for block in blocks(file.read_text()):
        if block.language == "yaml":
            assert list(yaml.safe_load_all(block.text))
        if block.language not in ("python", "py"):
            continue
        text = re.sub('"(RUN|FOLDER|PACKED)"', lambda m: repr(stand_ins[m[1]]), block.text)
        tree = ast.parse(text)
        if "my_dataset" in text:  # stands for the reader's own: what it imports is there
            tree.body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        exec(compile(tree, str(file), "exec"), names)


def test_no_placeholder_is_unknown() -> None:
    known = {"RUN", "FOLDER", "PACKED", "CHECKPOINT", "FILE", "CIFAR", "PHOTOGRAPHS", "SMALL"}
    known |= {"SPEEDRUN", "SEEDS"}  # of make
    found = {w for all_ in COMMANDS.values() for c in all_ for w in re.findall(r"\b[A-Z]{3,}\b", c)}
    assert found <= known, "give it a stand-in, in `stand_ins`"


def test_every_reason_not_to_run_is_used() -> None:
    every = [c for all_ in COMMANDS.values() for c in all_]
    assert not [word for word in PARSED if not any(word in command for command in every)]
