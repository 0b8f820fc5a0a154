"""`simclr presets`, and configurations by name."""

from pathlib import Path
from typing import Any

import pytest

from simclr_pl.cli import main
from simclr_pl.commands.presets import facts_of
from simclr_pl.errors import InputError
from simclr_pl.presets import config_file, preset_files

CONFIGS = Path(__file__).parents[1] / "configs"


def test_all_configs_are_presets_by_name() -> None:
    own = [file.stem for file in CONFIGS.glob("*.yaml")]
    quick = [f"speedrun/{file.stem}" for file in CONFIGS.glob("speedrun/*.yaml")]
    assert list(preset_files()) == sorted(own + quick)
    assert len(quick) == 3


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file("cifar10") == config_file("cifar10.yaml") == CONFIGS / "cifar10.yaml"
    Path("cifar10.yaml").write_text("")
    assert config_file("speedrun/cifar10.yaml") == CONFIGS / "speedrun" / "cifar10.yaml"
    assert config_file("cifar10.yaml") == Path("cifar10.yaml")
    assert config_file("cifar10") == CONFIGS / "cifar10.yaml"


@pytest.mark.parametrize("name", ["cifar1O", "sub/cifar10.yaml", ""])
def test_an_unknown_name_is_one_line_with_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match=f"got '{name}'. Near it: .*cifar10"):
        config_file(name)


def test_the_list_has_each_name_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["presets"])
    text = capsys.readouterr().out
    for name in preset_files():
        assert f"│ {name} " in text
    assert "2 CPU cores" in text
    assert "half a minute" not in text  # the first fact only


def test_every_preset_says_hardware_data_expectation_and_source() -> None:
    for name, file in preset_files().items():
        facts = facts_of(file.read_text())
        assert {"Hardware", "Data", "Expected", "Source"} <= facts.keys(), name


def test_facts_go_on_over_lines_and_end_with_the_header() -> None:
    text = "#\n# Hardware   one GPU;\n#            hours\n# Data       D\nname: x\n# Source  no"
    assert facts_of(text) == {"Hardware": "one GPU; hours", "Data": "D"}


def test_a_preset_is_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["presets", "quickstart"])
    text = (CONFIGS / "quickstart.yaml").read_text()
    assert capsys.readouterr().out == text
    main(["presets", "quickstart", "--out", str(tmp_path / "my.yaml")])
    assert (tmp_path / "my.yaml").read_text() == text
    assert f"simclr fit --config {tmp_path / 'my.yaml'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstrat"], "Near it: quickstart"),
        (["quickstart", "--out", "there.yaml"], "must be a new file"),
        (["quickstart", "--out", "no/such.yaml"], "a folder that exists"),
        (["--out", "new.yaml"], "needs the name of a preset"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(["presets", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert Path("there.yaml").read_text() == "mine"
