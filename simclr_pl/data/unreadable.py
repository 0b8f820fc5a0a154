"""Reports of images that cannot be read."""

import logging
from collections.abc import Iterable

from simclr_pl.errors import InputError

_log = logging.getLogger(__name__)


def note(known: dict[str, str], found: Iterable[tuple[str, str]], total: int, limit: float) -> None:
    """Reports unreadable images, each once, and stops the run where there are too many.

    Args:
        known: name and reason of those reported so far; what is new is added.
        found: names and reasons from a batch.
        total: images that there are.
        limit: share of them that may be unreadable.

    Raises:
        InputError: more than ``limit`` of the images cannot be read.
    """
    for name, reason in found:
        if name not in known:
            known[name] = reason
            _log.warning("cannot read %r: %s; the run goes on without it", name, reason)
    if len(known) > limit * total:
        name, reason = next(reversed(known.items()))
        raise InputError(
            f"at most `max_bad_fraction` {limit} of the images may be unreadable; got {len(known)} "
            f"of {total:,}, last {name!r}: {reason}. `simclr data check` lists them; repair or "
            "remove them, or set `data.max_bad_fraction`."
        )
