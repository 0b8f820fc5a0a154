"""`simclr doctor`."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from simclr_pl.data.resident import free_memory
from simclr_pl.data.workers import cores
from simclr_pl.doctor import machine, plan, sample, step
from simclr_pl.doctor.children import in_children
from simclr_pl.doctor.configured import Configured, Kind, UnknownOptionError, build, kinds_of
from simclr_pl.doctor.lines import Level, Line, duration
from simclr_pl.doctor.ranks import check_ranks
from simclr_pl.environment import environment
from simclr_pl.errors import InputError

_HELP = """Check this machine, and what a configuration needs of it, before hours are spent.

With --config, and --KEY VALUE as for `simclr fit`: do the ranks reach each other, is the data readable,
does one batch fit into memory, can the disk hold the checkpoints, which learning rate results, how long
will it take. Steps are measured in a process of its own, on made-up views. Nothing is downloaded and
nothing is left behind."""

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
_IN_FLIGHT = 5  # batches of each worker in shared memory
_MORE = (
    "With --config FILE_OR_NAME also: ranks, data, memory of a batch, learning rate, time, disk."
)
_IMPORTING = 30.0  # seconds that a child may take until it starts
_DATA_REMEDY = "Check --data.source and its folder; `simclr data check` reads a whole set."


def doctor(args: list[str]) -> int:
    """Prints a line for each check.

    Args:
        args: of the command line, after the verb.

    Returns:
        1 where a line is an error, else 0.

    Raises:
        InputError: an option does not exist.
    """
    own = _parser()
    options, others = own.parse_known_args(args)
    if options.seconds <= 0 or options.images < 1:
        raise InputError(
            f"`seconds` must be > 0 and `images` >= 1; got {options.seconds:g} and {options.images}. "
            "Set --seconds or --images."
        )
    return _Doctor(others, options.seconds, options.images).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simclr doctor",
        usage="simclr doctor [--seconds S] [--images N] [--config FILE_OR_NAME ...] [--KEY VALUE ...]",
        description=_HELP,
        epilog="example: simclr doctor --config quickstart --trainer.devices 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        metavar="S",
        help="most time for all measurements together, about (default: 60)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=256,
        metavar="N",
        help="images, or other samples, that are read (default: 256)",
    )
    return parser


class _Doctor:
    """Goes through the checks, printing as it goes.

    Args:
        args: as those of `simclr fit`; none to check the machine only.
        seconds: for all measurements.
        images: of the sample.
    """

    def __init__(self, args: list[str], seconds: float, images: int) -> None:
        self.args, self.seconds, self.images = args, seconds, images
        self.console = Console(highlight=False, markup=False, emoji=False)
        self.levels: list[str] = []

    def run(self) -> int:
        """Returns the exit code."""
        began = time.monotonic()
        cli, refused = self._build() if self.args else (None, None)
        self._machine(cli)
        if refused is not None:
            self._say(refused)
        if cli is not None:
            self._run_of(cli)
        errors, warnings = (self.levels.count(level) for level in ("error", "warning"))
        took = duration(time.monotonic() - began)
        self.console.print(f"{errors} error(s), {warnings} warning(s); {took}")
        if not self.args:
            self.console.print(_MORE, soft_wrap=True)
        return 1 if errors else 0

    def _say(self, *lines: Line) -> None:
        for line in lines:
            self.levels.append(line.level)
            text = Text(f"{line.level:9}", _STYLES[line.level])
            self.console.print(
                text.append(f"{line.name:15}", "bold").append(line.text), soft_wrap=True
            )
            if line.remedy:
                self.console.print(f"{'':24}{line.remedy}", soft_wrap=True)

    def _measuring(self, text: str) -> Any:
        return self.console.status(f"{text} ...")  # nothing where the output is no terminal

    def _build(self) -> tuple[Configured | None, Line | None]:
        try:
            return build(self.args), None
        except UnknownOptionError:
            raise
        except InputError as error:
            return None, Line("error", "config", str(error), "Nothing more is checked without it.")

    def _machine(self, cli: Configured | None) -> None:
        with self._measuring("Looking at the machine"):
            found = environment()
            kinds = [device["kind"] for device in found["devices"]]
            device = torch.device("cuda" if "cuda" in kinds else "cpu")
            if cli is not None:
                device = cli.trainer.strategy.root_device
            speeds = machine.precisions(device)
        asked = None if cli is None else str(cli.trainer.precision)
        self._say(machine.versions(found), machine.devices(found))
        self._say(machine.precision(speeds, asked), *machine.memory())

    def _run_of(self, cli: Configured) -> None:
        trainer, data = cli.trainer, cli.datamodule
        root = Path(trainer.default_root_dir)
        self._say(plan.write_line(root))
        ranks = trainer.world_size
        if data.global_batch_size % ranks:
            fits = -(-data.global_batch_size // ranks) * ranks
            text = f"a global batch of {data.global_batch_size} does not divide by {ranks} ranks"
            self._say(Line("error", "batch", text, f"Set --data.global_batch_size {fits}."))
            return
        device = trainer.strategy.root_device
        with self._measuring("Asking the ranks"):
            limit = max(10.0, self.seconds / 3)
            self._say(check_ranks(trainer.num_devices, trainer.num_nodes, device.type, limit))
        found = self._data(data)
        kinds = kinds_of(cli, found.get("channels", data.source.channels)) or found.get("kinds")
        about, forecast = self._step(cli, kinds) if kinds else ({}, None)
        if about and "images" in found:
            self._forecast(cli, found, about, forecast)

    def _data(self, data: Any) -> dict[str, Any]:
        share = self.seconds / 8
        with self._measuring("Reading a sample of the data"):
            given = (self.args, self.images, share)
            (outcome,) = in_children(1, sample.look, *given, seconds=4 * share + _IMPORTING)
        found = {key: value for part in outcome.messages for key, value in part.items()}
        if "source" in found:
            self._say(*sample.lines_of(found, data.max_bad_fraction, data.global_batch_size))
        if outcome.ending:
            fetches = not found and getattr(data.source, "download", False)
            level: Level = "warning" if fetches else "error"
            remedy = "`simclr fit` downloads it, then ask again." if fetches else _DATA_REMEDY
            self._say(Line(level, "data", outcome.ending, remedy))
        return found

    def _step(
        self, cli: Configured, kinds: list[Kind]
    ) -> tuple[dict[str, Any], step.Forecast | None]:
        """What is known of the model, and the forecast of a step."""
        trainer, data = cli.trainer, cli.datamodule
        device = trainer.strategy.root_device
        samples = data.global_batch_size // trainer.world_size
        memory = free_memory() // trainer.num_devices
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores() // trainer.num_devices)))
        limit = self.seconds / 2
        given = (self.args, kinds, samples, memory, limit, threads)
        with self._measuring("Measuring steps at growing batches"):
            (outcome,) = in_children(1, step.measure, *given, seconds=2 * limit + _IMPORTING)
        about, *tried = outcome.messages or [{}]
        line, forecast = step.fit_line(
            [step.Measured(*part) for part in tried if isinstance(part, tuple)],
            outcome.ending or next((part for part in tried if isinstance(part, str)), ""),
            step.Asked(samples, kinds, cli.model.encode_chunk, memory, data.source.unit),
        )
        self._say(line)
        return about, forecast

    def _forecast(
        self,
        cli: Configured,
        found: dict[str, Any],
        about: dict[str, Any],
        forecast: step.Forecast | None,
    ) -> None:
        trainer, data, model = cli.trainer, cli.datamodule, cli.model
        length = plan.length_of(trainer, model, found["images"]["train"], data.global_batch_size)
        update = data.global_batch_size * trainer.accumulate_grad_batches
        self._say(plan.rate_line(length, model, update, about))
        self._say(
            plan.steps_line(length, data.global_batch_size, trainer.world_size, data.source.unit)
        )
        if forecast is not None and "loading" in found:
            self._speed(cli, found, forecast, length)
        root = Path(trainer.default_root_dir)
        self._say(plan.disk_line(root, trainer, length, about["checkpoint"]))

    def _speed(
        self, cli: Configured, found: dict[str, Any], forecast: step.Forecast, length: plan.Length
    ) -> None:
        """Loader, shared memory and time."""
        trainer, data = cli.trainer, cli.datamodule
        on_cpu = trainer.strategy.root_device.type == "cpu"
        batch = data.global_batch_size // trainer.world_size
        workers = data.num_workers
        if workers is None:
            workers = 0 if found["kept"] and on_cpu else max(1, cores() // trainer.num_devices)
        staging = batch * found["staging"] if on_cpu else 0.0
        speed = plan.Speed(forecast.seconds, batch * found["loading"], staging, workers, on_cpu)
        self._say(plan.loader_line(speed, batch, data.source.unit))
        if workers:
            kinds = kinds_of(
                cli, found["channels"]
            )  # of images a byte, of others what was measured
            views = sum(kind.bytes // 4 for kind in kinds) or found["table"]
            one = kinds[0].bytes / 4 / kinds[0].number if kinds else views / data.n_views
            clean = 2 * data.eval_batch_size * one
            each = _IN_FLIGHT * workers * trainer.num_devices
            self._say(machine.shared_memory(each * int(batch * views + clean), workers))
        evaluated = found["bank"] + found["images"]["query"]
        count = plan.evaluations(trainer, data, length, evaluated)
        view = (speed.total / batch) / data.n_views  # forward and backward: three times a forward
        if length.steps is not None:
            each_time = evaluated / trainer.world_size * view / 3
            steps = length.steps * trainer.accumulate_grad_batches
            self._say(plan.time_line(speed.total, steps, count, each_time))
