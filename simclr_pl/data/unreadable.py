"""Reports of samples that cannot be read, or only after a conversion."""

import logging
from collections.abc import Iterable

from simclr_pl.errors import InputError

_log = logging.getLogger(__name__)


def note(
    known: dict[str, str],
    found: Iterable[tuple[str, str]],
    total: int,
    limit: float,
    quiet: bool = False,
) -> None:
    """Reports unreadable samples, each once, and stops the run where there are too many.

    Args:
        known: name and reason of those reported so far; what is new is added.
        found: names and reasons from a batch.
        total: samples that there are.
        limit: share of them that may be unreadable.
        quiet: count only, where another rank reports the same.

    Raises:
        InputError: more than ``limit`` of the samples cannot be read.
    """
    for name, reason in found:
        if name not in known:
            known[name] = reason
            if quiet:
                continue
            _log.warning("cannot read %r: %s; the run goes on without it", name, reason)
    if len(known) > limit * total:
        name, reason = next(reversed(known.items()))
        raise InputError(
            f"at most `max_bad_fraction` {limit} of the samples may be unreadable; got {len(known)} "
            f"of {total:,}, last {name!r}: {reason}. `simclr data check` lists them; repair or "
            "remove them, or set `data.max_bad_fraction`."
        )


def say_converted(remarks: Iterable[str]) -> None:
    """Says what was converted to be usable.

    Args:
        remarks: one line for each kind of conversion.
    """
    for remark in remarks:
        _log.warning("%s", remark)
