"""Every config parses and builds; its header tells a user what to expect."""

from pathlib import Path

import pytest

from simclr_pl.cli import SimCLRCLI

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))


class Built(SimCLRCLI):
    """Parses and instantiates, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def test_configs_are_found() -> None:
    assert {"quickstart", "cifar10", "cifar10-cpu", "imagenet"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_builds(path: Path, tmp_path: Path) -> None:
    cli = Built(["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path)])
    assert cli.model.num_features > 0
    assert cli.datamodule.global_batch_size > 0
    assert cli.trainer.log_dir == str(tmp_path / path.stem / "version_0")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_command_hardware_result_and_source(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header[0].startswith(f"# simclr fit --config configs/{path.name}")
    for heading in ("# Hardware", "# Data", "# Expected", "# Source"):
        assert any(line.startswith(heading) for line in header), f"{path}: no {heading!r}"
