"""The configurations that come with the package, by name."""

from difflib import get_close_matches
from pathlib import Path

from simclr_pl.errors import InputError


def preset_files() -> dict[str, Path]:
    """The file of each configuration by its name, sorted."""
    package = Path(__file__).parent
    inside = package / "configs"  # in a wheel; in a checkout they lie beside the package
    folder = inside if inside.is_dir() else package.parent / "configs"
    files = sorted(folder.glob("*.yaml"), key=lambda file: file.stem)
    return {file.stem: file for file in files}


def config_file(name: str) -> Path:
    """The file that a user means: a path that exists, else a configuration of the package.

    Args:
        name: e.g. "my.yaml", "cifar10" or "cifar10.yaml".

    Raises:
        InputError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = preset_files()
    stem = name.removesuffix(".yaml").removesuffix(".yml")
    if stem in known:
        return known[stem]
    near = ", ".join(get_close_matches(stem, known)) or ", ".join(known)
    raise InputError(
        f"a config must be a file that exists or the name of a preset; got {name!r}. Near it: {near}."
    )
