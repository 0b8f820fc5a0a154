"""Hostile configurations."""

from pathlib import Path

import pytest

from simclr_pl.cli import main


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system ['touch executed']", "python/name:os.system"]
)
def test_object_tags_in_a_config_run_nothing(tmp_path: Path, tag: str) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(f"name: !!{tag}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config)])
    assert stopped.value.code == 2
    assert not (tmp_path / "executed").exists()
