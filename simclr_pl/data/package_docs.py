"""A corpus that needs no download: the docstrings of the packages that this one depends on.

Symbols: M documents in a set.
"""

import ast
import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simclr_pl.data.sources import SPLIT_SEED
from simclr_pl.data.sweep import Bar
from simclr_pl.data.text import TextFile
from simclr_pl.data.tokens import write_whole
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream, keys, permutation, uniforms

_log = logging.getLogger(__name__)

_RECIPE = 1  # of the corpus; another number makes it anew
_LEAST_WORDS = 25  # of a document
_PART_WORDS = 12  # of a sentence of a pair, at least
_MOST_WORDS = 60  # of one, at most
_PAIRED = 400  # documents at most that pairs are made for, up to four of each
_SKIPPED = ("tests", "testing", "test", "conftest.py", "_vendor", "externals")

# Of packages that the installation brings along; left out are those whose files are near-copies of one
# another, such as numpy.polynomial and torchmetrics, for then the held-out files would be known.
SUB_PACKAGES = (
    "networkx.algorithms",
    "networkx.generators",
    "numpy.lib",
    "scipy.interpolate",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.signal",
    "scipy.sparse",
    "scipy.spatial",
    "scipy.stats",
    "sklearn.cluster",
    "sklearn.datasets",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "sklearn.metrics",
    "sympy.combinatorics",
    "sympy.geometry",
    "sympy.physics",
    "sympy.polys",
    "torch.distributions",
    "torch.fx",
    "torch.nn",
    "torchvision.transforms",
)


class Document(NamedTuple):
    """A cleaned docstring.

    Attributes:
        text: its words.
        label: the sub-package, the class.
        module: the file, e.g. "scipy/stats/_morestats.py".
        name: of what it documents, in the file.
    """

    text: str
    label: str
    module: str
    name: str


class PackageDocs(TextFile):
    """Docstrings of functions and classes of installed packages; the class is the sub-package.

    `prepare` reads the packages' source files, without importing them, and writes to
    ``root/package-docs/``: ``train.parquet`` and ``test.parquet`` with the columns text, label, module
    and name; ``pairs.csv`` for `simclr similarity`; and ``tokenizer.json``. It does so anew where the
    versions of the packages, or ``packages``, are others than before. Whole files are held out, about a
    fifth of each class, so that what a file says again and again is on one side.

    Texts are cleaned of what gives the class away: examples in code, import lines, all of a dotted name
    but its last part, and the names of the packages. Lines of markup go, too, and what has fewer than
    25 words then.

    The pairs are of held-out files. A sentence is one half of a document, 60 words of it at most.
    Scores are by where the halves come from: 3 the same document, 2 another one of the same file,
    1 another file of the same sub-package, 0 another sub-package.

    Args:
        root: the folder of data sets.
        packages: names of the sub-packages, the classes; by default 23 of the packages that this one
            depends on.
        vocab_size: tokens of the tokenizer at most.

    Raises:
        InputError: a sub-package is not installed or has no two files with documents; see `TextFile`.
    """

    def __init__(
        self,
        root: str = "data",
        packages: tuple[str, ...] = SUB_PACKAGES,
        vocab_size: int = 8192,
    ) -> None:
        folder = Path(root, "package-docs")
        super().__init__(str(folder), "text", "label", vocab_size=vocab_size)
        self.packages = tuple(packages)

    def prepare(self) -> None:
        """Writes the corpus where it is missing or of other versions, and trains its tokenizer."""
        recipe = _recipe_of(self.packages)
        file = self.path / "recipe.json"
        if not file.is_file() or file.read_text() != recipe:
            self._write(recipe)
        super().prepare()

    def _write(self, recipe: str) -> None:
        _log.info("Collecting docstrings of installed packages into %s", self.path)
        documents = collect(self.packages)
        held = _held_out(documents)
        train = [document for document, out in zip(documents, held, strict=True) if not out]
        query = [document for document, out in zip(documents, held, strict=True) if out]
        self.tokenizer_path.unlink(missing_ok=True)  # that of another corpus
        contents = {
            "train.parquet": _parquet(train),
            "test.parquet": _parquet(query),
            "pairs.csv": _csv(pairs_of(query)),
            "recipe.json": recipe.encode(),  # last: what is there before it is whole
        }
        for name, content in contents.items():
            write_whole(self.path / name, content, "data.source.root")


def _recipe_of(packages: Sequence[str]) -> str:
    """What the corpus depends on, as JSON.

    Raises:
        InputError: a package is not installed.
    """
    distributions = packages_distributions()
    versions = {}
    for top in sorted({name.partition(".")[0] for name in packages}):
        if top not in distributions:
            raise InputError(
                f"`packages` must be sub-packages of installed packages; got {top!r}, which is not "
                "installed. Set `data.source.packages`."
            )
        versions[top] = version(distributions[top][0])
    return json.dumps({"recipe": _RECIPE, "packages": list(packages), "versions": versions})


def collect(packages: Sequence[str]) -> list[Document]:
    """The documents of sub-packages, in the order of names, files and lines; of equal texts the first.

    Raises:
        InputError: a sub-package does not exist, or has no two files with documents.
    """
    files = {name: _files_of(name) for name in packages}
    found: dict[str, Document] = {}
    with Bar("Reading docstrings", sum(map(len, files.values())), "files") as bar:
        for label, paths in files.items():
            for module, path in bar.over(paths.items()):
                for name, text in _docstrings(path):
                    if len(text.split()) >= _LEAST_WORDS:
                        found.setdefault(text, Document(text, label, module, name))
    documents = list(found.values())
    for label in packages:
        count = len({d.module for d in documents if d.label == label})
        if count < 2:
            raise InputError(
                "each of `packages` must have documents in two files or more; got "
                f"{count} for {label!r}. Leave it out of `data.source.packages`."
            )
    return documents


def _files_of(name: str) -> dict[str, Path]:
    """The source files of a sub-package, or of a module, by their path below the installation."""
    top, *inner = name.split(".")
    spec = find_spec(top)  # of a top-level package: it imports nothing
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in map(Path, places):
        path = place.joinpath(*inner)
        files = [path.with_suffix(".py")] if not path.is_dir() else sorted(path.rglob("*.py"))
        parts = {file.relative_to(place.parent).as_posix(): file for file in files}
        kept = {p: f for p, f in parts.items() if f.is_file() and not set(f.parts) & set(_SKIPPED)}
        if kept:
            return kept
    raise InputError(
        f"`packages` must be sub-packages with source files; got {name!r}, which has none here. "
        "Set `data.source.packages`."
    )


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Names of functions and classes of a file, and their cleaned docstrings, in order."""
    tree = ast.parse(path.read_bytes())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        if text := ast.get_docstring(node):
            yield node.name, cleaned(text)


_EXAMPLE = re.compile(r"^\s*>>>.*\n(?:.*\S.*(?:\n|$))*", re.MULTILINE)  # with its output
_MARKUP = re.compile(r"^\s*(?:(?:from \S+ )?import .*|\.\. .*|[-=~^*]{3,}\s*)$", re.MULTILINE)
_ROLE = re.compile(r":[\w:]+:`~?([^`]*)`")
_TOPS = re.compile(rf"\b(?:{'|'.join({name.partition('.')[0] for name in SUB_PACKAGES})})\b")
_DOTTED = re.compile(r"\b(?:[A-Za-z_]\w+\.)+(?=[A-Za-z_])")


def cleaned(docstring: str) -> str:
    """The words of a docstring, without code and without what names the package; on one line."""
    text = _EXAMPLE.sub("\n", docstring + "\n")
    text = _MARKUP.sub("\n", text)
    text = _ROLE.sub(r"\1", text)
    text = _TOPS.sub("", _DOTTED.sub("", text))
    return " ".join(text.replace("`", " ").split())


def _held_out(documents: Sequence[Document], fraction: float = 0.2) -> list[bool]:
    """Whether each document is kept for evaluation: whole files, a share of each class's documents."""
    sizes: dict[str, dict[str, int]] = {}
    for document in documents:
        modules = sizes.setdefault(document.label, {})
        modules[document.module] = modules.get(document.module, 0) + 1
    held: set[str] = set()
    for modules in sizes.values():
        room = fraction * sum(modules.values())
        # By the hash of their names: another version moves few files to the other side
        order = sorted(modules, key=lambda module: hashlib.sha256(module.encode()).digest())
        chosen = []
        for module in order:
            if modules[module] <= room:
                chosen.append(module)
                room -= modules[module]
        held.update(chosen or [min(order, key=lambda module: modules[module])])
    return [document.module in held for document in documents]


class Pair(NamedTuple):
    """Two sentences and how alike they are, from 0 to 3."""

    sentence1: str
    sentence2: str
    score: int


def pairs_of(documents: Sequence[Document]) -> list[Pair]:
    """Graded pairs of sentences: for some documents one of each grade, where there is a partner."""
    split = [d for d in documents if len(d.text.split()) >= 2 * _PART_WORDS]
    halves = [_halves(d.text) for d in split]
    labels, modules = (np.array([getattr(d, n) for d in split]) for n in ("label", "module"))
    draws = uniforms(keys(SPLIT_SEED, Stream.TEXT_PAIRS, np.arange(len(split))), 3)  # (M, 3)
    pairs = []
    for i in permutation(len(split), SPLIT_SEED, Stream.TEXT_PAIRS)[:_PAIRED].tolist():
        first, second = halves[i]
        pairs.append(Pair(first, second, 3))
        same_file, same_class = modules == modules[i], labels == labels[i]
        others = (same_file & (np.arange(len(split)) != i), same_class & ~same_file, ~same_class)
        for score, partners, draw in zip((2, 1, 0), others, draws[i], strict=True):
            places = np.flatnonzero(partners)
            if len(places):
                pairs.append(Pair(first, halves[places[int(draw * len(places))]][1], score))
    order = permutation(len(pairs), SPLIT_SEED, Stream.TEXT_PAIRS)
    return [pairs[i] for i in order]


def _halves(text: str) -> tuple[str, str]:
    words = text.split()
    middle = len(words) // 2
    return " ".join(words[:middle][:_MOST_WORDS]), " ".join(words[middle:][:_MOST_WORDS])


def _parquet(documents: Sequence[Document]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        name: pa.array([getattr(d, name) for d in documents], pa.string())
        for name in Document._fields
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _csv(pairs: Sequence[Pair]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Pair._fields)
    writer.writerows(pairs)
    return text.getvalue().encode()
