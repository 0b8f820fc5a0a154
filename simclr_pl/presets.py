"""The configurations that come with the package, by name."""

from difflib import get_close_matches
from pathlib import Path

from simclr_pl.errors import InputError


def preset_files() -> dict[str, Path]:
    """The file of each configuration by its name, sorted."""
    package = Path(__file__).parent
    inside = package / "configs"  # in a wheel; in a checkout they lie beside the package
    folder = inside if inside.is_dir() else package.parent / "configs"
    files = [*folder.glob("*.yaml"), *folder.glob("speedrun/*.yaml")]
    named = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return dict(sorted(named.items()))


def config_file(name: str) -> Path:
    """The file that a user means: a path that exists, else a configuration of the package.

    Args:
        name: e.g. "my.yaml", "cifar10", "cifar10.yaml" or "speedrun/cifar10".

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
