"""Values that must not reach a file or a tracker: tokens, passwords, keys."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MASK = "***"

# Whole words of a key, where _, -, . and a capital letter part words: `tokenizer` and `key_dim` are none.
_SECRET = re.compile(
    r"(^|_)(token|passwords?|passwd|passphrase|secrets?|credentials?|authorization|"
    r"(api|access|private|secret|auth|encryption|signing|account|storage)_?keys?)$"
    r"|(^|_)(password|passwd|secret|credentials?|(api|access|private|auth)_?key)(_|$)"
    r"|(^|_)(api|access|auth|bearer|refresh|session|hf|wandb)_?tokens?(_|$)"
)


def is_secret(key: str) -> bool:
    """Whether a key names something that should stay unseen, e.g. ``api_key`` or ``hf_token``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return _SECRET.search(re.sub(r"[-. ]", "_", words).lower()) is not None


def masked(value: Any) -> Any:
    """A copy of nested mappings and lists with the values of secret keys replaced by ``***``.

    None stays: there is nothing to hide. In addresses, ``user:password@`` loses its password.
    """
    if isinstance(value, Mapping):
        return {
            k: MASK if is_secret(str(k)) and v not in (None, "") else masked(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\w://[^/\s:@]*):[^/\s@]+@", rf"\1:{MASK}@", value)
    return value


def masked_arguments(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, with the values of secret keys replaced by ``***``."""
    shown, hide = [], False
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        secret = key.startswith("--") and is_secret(key.rpartition(".")[2].lstrip("-"))
        if hide:
            argument = MASK
        elif secret and equals:
            argument = f"{key}={MASK}"
        hide = secret and not equals
        shown.append(str(masked(argument)))
    return shown


def plain(value: Any) -> Any:
    """A value as str, int, float, bool, list, dict and None; other objects as their description.

    Subclasses (an enum of strings, numpy's floats) become the type itself, which is what a checkpoint
    may hold.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, str):
        return str.__str__(value)  # an enum's own would give its name
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    return str(value)
