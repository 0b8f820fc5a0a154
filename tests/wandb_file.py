"""Reads the file of a wandb run: records of protocol buffers in LevelDB's log format."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7  # bytes, both of the file and of each piece of a record


def records(file: Path) -> Iterator[Any]:
    content = file.read_bytes()
    place, whole = _HEADER, b""
    while place + _HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER:  # no room for a piece: padding
            place += _BLOCK - place % _BLOCK
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]  # 1 whole, 2 first, 3 middle, 4 last
        place += _HEADER
        if place + length > len(content):  # it is being written
            return
        whole += content[place : place + length]
        place += length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


class WandbRun:
    """What is in it.

    Attributes:
        id: of the run.
        project: its name.
        rows: of the history, in order.
        config: nested.
        summary: latest values by key.
        metrics: (step metric, summary's kinds) by key or pattern.
        artifacts: (name, aliases, metadata).
    """

    def __init__(self, file: Path) -> None:
        self.id = self.project = ""
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, tuple[str, set[str]]] = {}
        self.artifacts: list[tuple[str, set[str], dict[str, Any]]] = []
        for record in records(file):
            getattr(self, f"_{record.WhichOneof('record_type')}", lambda _: None)(record)

    def _run(self, record: Any) -> None:
        self.id, self.project = record.run.run_id, record.run.project

    def _history(self, record: Any) -> None:
        items = record.history.item
        self.rows.append({_key(item): json.loads(item.value_json) for item in items})

    def _config(self, record: Any) -> None:
        self.config |= {_key(item): json.loads(item.value_json) for item in record.config.update}

    def _summary(self, record: Any) -> None:
        self.summary |= {_key(i): json.loads(i.value_json) for i in record.summary.update}

    def _metric(self, record: Any) -> None:
        metric = record.metric
        kinds = {kind for kind in ("min", "max", "last") if getattr(metric.summary, kind)}
        self.metrics[metric.name or metric.glob_name] = (metric.step_metric, kinds)

    def _artifact(self, record: Any) -> None:
        artifact = record.artifact
        facts = json.loads(artifact.metadata or "{}")
        self.artifacts.append((artifact.name, set(artifact.aliases), facts))


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def wandb_runs(folder: Path) -> list[WandbRun]:
    """Those of a run's folder, the oldest first, once wandb has written their ends."""
    files = sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda f: f.parent.name)
    deadline = time.monotonic() + 30  # wandb's own process writes, when the machine lets it
    while not all(map(_is_whole, files)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [WandbRun(file) for file in files]


def _is_whole(file: Path) -> bool:
    return any(record.WhichOneof("record_type") == "exit" for record in records(file))
