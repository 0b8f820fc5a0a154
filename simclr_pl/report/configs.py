"""Configurations as flat tables, and what differs between several."""

from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "\N{EN DASH}"  # a key that a configuration does not have


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys; lists of plain values stay one value, as YAML would show it."""
    if isinstance(value, Mapping) and value:
        parts = ((f"{prefix}.{key}" if prefix else str(key), v) for key, v in value.items())
        return {k: v for name, inner in parts for k, v in flattened(inner, name).items()}
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        items = ((f"{prefix}[{i}]", item) for i, item in enumerate(value))
        return {k: v for name, item in items for k, v in flattened(item, name).items()}
    return {prefix: _shown(value)}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The keys whose values are not the same in all, with the value in each.

    Args:
        configs: nested, of several runs.
    """
    flat = [flattened(config) for config in configs]
    keys = dict.fromkeys(key for each in flat for key in each)  # in their order
    rows = [(key, [each.get(key, ABSENT) for each in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
