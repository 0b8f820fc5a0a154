"""Imports point down, as in section 2 of the design; importing the package alone costs nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import simclr_pl

L0 = {
    "batch_norm",
    "distributed",
    "keyed_random",
    "chunks",
    "log_mel",
    "losses",
    "loss_anchors",
    "loss_distances",
    "loss_tiles",
    "loss_triton",
    "audio_augment",
    "audio_kernels",
    "augment",
    "augmentation",
    "crop_kernels",
    "cpu",
    "durable",
    "gpu",
    "image_kernels",
    "image_operations",
    "models",
    "optim",
    "text_augment",
    "text_encoder",
    "published_resnets",
    "view_kernels",
}
L0 |= {"environment", "errors", "heads", "linear", "metrics", "neighbour_kernels", "neighbours"}
L0 |= {"presets", "secrets"}
L1, L2 = {"data"}, {"simclr", "callbacks", "checkpoint_io", "evaluation", "report", "strategies"}
L3 = {"cli", "commands", "export", "doctor", "run_folder", "saved_config"}
L3 |= {"__main__", "parsers", "training_help", "trackers", "training_cli"}
MAY_IMPORT = ((L0, L0), (L1, L0 | L1), (L2, L0 | L2), (L3, L0 | L1 | L2 | L3))


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_down() -> None:
    root = Path(simclr_pl.__file__).parent
    for file in set(root.rglob("*.py")) - {root / "__init__.py"}:
        part = file.relative_to(root).parts[0].removesuffix(".py")
        allowed = next((below for layer, below in MAY_IMPORT if part in layer), None)
        assert allowed, f"{file} is in no layer: place {part!r} in tests/test_layers.py"
        for name in imports(file):
            top, *inner = name.split(".")[:2]
            assert top, f"{file}: make the import of {name} absolute"
            assert part not in L0 or "lightning" not in top, f"{file} must not import {name}"
            if top == "simclr_pl" and inner:
                module = simclr_pl._MODULE_OF.get(inner[0], inner[0])
                assert module in allowed, f"{file} must not import {name}"


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, simclr_pl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_heavy_libraries_wait_until_they_are_needed() -> None:
    code = """
import sys, time
def loaded(*names): return [name for name in names if name in sys.modules]
import simclr_pl.data.commands
print(loaded("lightning", "torchmetrics", "sklearn", "litdata"))
began = time.process_time()
import lightning.pytorch.cli
middle = time.process_time()
import simclr_pl.training_cli, simclr_pl.commands.linear, simclr_pl.commands.finetune
print(loaded("timm", "wandb", "sklearn", "tensorboard", "litdata", "pandas", "onnx"))
print(time.process_time() - middle < middle - began)  # our own part, against Lightning's
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n") == ["[]", "[]", "True", ""], done.stdout + done.stderr
