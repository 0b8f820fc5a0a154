"""What came of a run, in numbers and in a sentence."""

from typing import Any, NamedTuple

from simclr_pl.report.reading import Run

MEASURES = {"knn": "kNN", "linear": "linear"}
_WHO = {"": "trained", "_init": "at initialisation", "_raw": "no encoder"}


class Measure(NamedTuple):
    """One way to score features.

    Attributes:
        name: "kNN" or "linear".
        scores: in percent, by "trained", "at initialisation" and e.g. "raw pixels", those that there are.
    """

    name: str
    scores: dict[str, float]

    @property
    def gain(self) -> float | None:
        """Points of the trained encoder over the better of the two others."""
        others = [score for who, score in self.scores.items() if who != "trained"]
        trained = self.scores.get("trained")
        return trained - max(others) if others and trained is not None else None


class Outcome(NamedTuple):
    """What the top of the page says of a run.

    Attributes:
        state: "finished", "stopped" or "unfinished".
        status: the same as a sentence.
        measures: kNN and linear, those that there are.
        meaning: what the scores say, or why there are none.
        facts: names and values.
    """

    state: str
    status: str
    measures: list[Measure]
    meaning: str
    facts: list[tuple[str, str]]


def outcome_of(run: Run) -> Outcome:
    """The outcome of a run, as far as its files tell."""
    summary = run.summary or {}
    named = {**_WHO, "_raw": str(summary.get("raw_name") or _WHO["_raw"])}
    measures = []
    for key, name in MEASURES.items():
        scores = {
            who: _percent(summary.get(f"{key}_top1{suffix}")) for suffix, who in named.items()
        }
        if known := {who: score for who, score in scores.items() if score is not None}:
            measures.append(Measure(name, known))
    state, status = _state(run)
    return Outcome(state, status, measures, _meaning(run, measures, named["_raw"]), _facts(run))


def _percent(share: Any) -> float | None:
    return 100 * share if isinstance(share, int | float) and 0 <= share <= 1 else None


def _state(run: Run) -> tuple[str, str]:
    last = run.last_step
    reached = "no step is logged" if last is None else f"the last logged step is {last:,}"
    stopped = (run.environment or {}).get("stopped")
    if isinstance(stopped, dict):
        return (
            "stopped",
            f"Stopped at step {stopped.get('step', '?')}: {stopped.get('reason', '?')}",
        )
    if run.summary is None:
        return (
            "unfinished",
            f"Still running, killed, or without a summary (summary.json): {reached}",
        )
    steps = run.summary.get("steps")
    # Evaluation after the last step is logged under the number of steps, training under one less.
    if isinstance(steps, int) and last is not None and last > steps:
        return "unfinished", f"Went on after its summary of step {steps:,}: {reached}"
    return "finished", "Finished" + (f" after {steps:,} steps" if isinstance(steps, int) else "")


def _meaning(run: Run, measures: list[Measure], raw_name: str) -> str:
    gains = {measure.name: measure.gain for measure in measures if measure.gain is not None}
    if not gains:
        latest = [
            f"{name} {100 * run.curves[key].values[-1]:.1f} % at step {run.curves[key].steps[-1]:,}"
            for key, name in (("knn/top1", "kNN"), ("probe/top1", "linear probe"))
            if key in run.curves
        ]
        if measures:
            return "There are no baselines to compare the scores with."
        none = "There are no scores of the trained encoder"
        return f"{none}; latest of the monitors: {', '.join(latest)}." if latest else f"{none}."
    said = " and ".join(f"{abs(gain):.1f} points of {name}" for name, gain in gains.items())
    better = f"the better of the encoder at initialisation and {raw_name}"
    if all(gain > 0 for gain in gains.values()):
        return f"Training gained {said} accuracy over {better}."
    if all(gain <= 0 for gain in gains.values()):
        return f"Training gained nothing: {said} accuracy below {better}."
    said = " and ".join(f"{gain:+.1f} points of {name}" for name, gain in gains.items())
    return f"Training changed {said} accuracy against {better}."


def _facts(run: Run) -> list[tuple[str, str]]:
    summary = run.summary or {}
    kinds = {
        "steps": ("steps", "{:,.0f}"),
        "global_batch_size": ("global batch", "{:,.0f}"),
        "world_size": ("ranks", "{:,.0f}"),
        "samples_per_second": (f"{summary.get('unit', 'samples')} per second", "{:,.0f}"),
        "peak_memory_mib": ("peak memory, MiB", "{:,.0f}"),
    }
    facts = []
    for key, (name, form) in kinds.items():
        value = summary.get(key)
        if isinstance(value, int | float):
            facts.append((name, form.format(value)))
    seconds = summary.get("seconds")
    if isinstance(seconds, int | float):
        facts.insert(1, ("training time", _duration(seconds)))
    loss = run.curves.get("train/loss")
    if loss is not None:
        facts.append(("last loss", f"{loss.values[-1]:.4g}"))
    return facts


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"))
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 min"
