"""Two augmented views of an image: images per second of one core, against the peers.

    python benchmarks/views.py --imagenet FOLDER --cifar10 FOLDER
    python benchmarks/views.py --imagenet FOLDER --loader      a whole loader with one worker
    python benchmarks/views.py --imagenet FOLDER --memory      memory over three epochs
    python benchmarks/views.py --device cuda                   the device stage, with CUDA events

The full augmentation of SimCLR (crop, flip, jitter, grey, blur; for CIFAR-10 no blur). All take turns on
the same few images within one process; what is printed is the median CPU time of an image in one
thread, and how many times as many images simclr_pl makes in that time. "uint8" ends with the crops that
leave a loader's worker, the rest of the work being the device's; "float" ends with normalised views.
FOLDER is any folder of images. Needs the extra `bench`.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from simclr_pl.augment import Augment, simclr_cifar, simclr_imagenet
from simclr_pl.cpu import recycled
from simclr_pl.crop_kernels import crop_rows
from simclr_pl.data import ContrastiveDataModule, ImageFolder
from simclr_pl.data.batches import Views, to_tensors, with_floats
from simclr_pl.data.image_batches import ImageBatches
from simclr_pl.data.sampler import Draw
from simclr_pl.data.sources import EncodedReader, ResidentImages, StoredSamples
from simclr_pl.image_operations import crop_resize

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Work = Callable[[], Any]  # makes the two views of every image of the block


# The peers: each maps one PIL image, or a block, to two views.


def torchvision_v2(size: int, strength: float, blur: float) -> Callable[[Image.Image], Any]:
    """On uint8 tensors, the quickest of torchvision's ways."""
    from torchvision.transforms import v2

    s, window = strength, max(3, size // 10 // 2 * 2 + 1)
    one = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(window, (0.1, 2.0))], blur),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda image: (one(image), one(image))


def lightly(size: int, strength: float, blur: float) -> Callable[[Image.Image], Any]:
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(input_size=size, cj_strength=strength, gaussian_blur=blur)


def albumentations(size: int, strength: float, blur: float) -> Callable[[Image.Image], Any]:
    import albumentations as A
    from albumentations.pytorch import ToTensorV2

    s, window = strength, max(3, size // 10 // 2 * 2 + 1)
    one = A.Compose(
        [
            A.RandomResizedCrop((size, size)),
            A.HorizontalFlip(),
            A.ColorJitter(
                (1 - 0.8 * s, 1 + 0.8 * s),
                (1 - 0.8 * s, 1 + 0.8 * s),
                (1 - 0.8 * s, 1 + 0.8 * s),
                (-0.2 * s, 0.2 * s),
                p=0.8,
            ),
            A.ToGray(p=0.2),
            A.GaussianBlur((window, window), (0.1, 2.0), p=blur),
            A.Normalize(MEAN, STD),
            ToTensorV2(),
        ]
    )

    def views(image: Image.Image) -> Any:
        array = np.asarray(image)
        return one(image=array)["image"], one(image=array)["image"]

    return views


def kornia(size: int, strength: float, blur: float) -> nn.Module:
    """On a batch; images of unequal size are cropped by torchvision before."""
    import kornia.augmentation as K

    s, window = strength, max(3, size // 10 // 2 * 2 + 1)
    return nn.Sequential(
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((window, window), (0.1, 2.0), p=blur),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


# What is timed: a block of images, from files or from memory.


def from_files(peer: Callable[[Image.Image], Any], files: list[bytes]) -> Work:
    def work() -> None:
        for data in files:
            peer(Image.open(io.BytesIO(data)).convert("RGB"))

    return work


def kornia_from_files(files: list[bytes], size: int) -> Work:
    from torchvision.transforms import v2

    crop = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True)])
    rest = kornia(size, 1.0, 0.5)

    def work() -> None:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        rest(torch.stack([crop(i) for i in images for _ in range(2)]).float().div_(255))

    return work


def kornia_from_memory(pixels: Tensor) -> Work:
    import kornia.augmentation as K

    crop = K.RandomResizedCrop((pixels.shape[2], pixels.shape[3]), scale=(0.08, 1.0))
    rest = kornia(pixels.shape[2], 0.5, 0.0)
    return lambda: rest(crop(pixels.repeat(2, 1, 1, 1).float().div_(255)))


def ours(images: Any, augment: Augment, ends: str, on_device: bool = False) -> Work:
    """``ends``: "uint8", "float" (compiled), or "torch" (float, by torch alone)."""
    dataset = ImageBatches(images, [Views(augment, 2)], 0, 3, crop_on_device=on_device)
    block = np.arange(len(images))
    epochs = iter(range(10**9))

    def work() -> None:
        batch = dataset[Draw(next(epochs), block)]
        assert "unreadable" not in batch, batch["unreadable"]
        (group,) = batch["groups"]
        if on_device and ends != "torch":
            out = recycled((len(block), 2, augment.size, augment.size, 3), np.uint8)
            which = batch["index"].numpy(), group["crops"].numpy()
            crop_rows(images.flat.numpy(), images.start, images.sides, *which, out)
            group["images"] = torch.from_numpy(out).permute(0, 1, 4, 2, 3)
        if ends == "uint8":
            return
        table = with_floats(group["table"])
        crops = group.get("images")
        if crops is None:
            crops = crop_resize(images.pixels, group["crops"], augment.size)
        (augment.apply if ends == "float" else augment.apply_batched)(crops, table)

    return work


def decode_only(files: list[bytes]) -> Work:
    room = np.empty(2**25, np.uint8)
    return lambda: [simplejpeg.decode_jpeg(data, "RGB", buffer=room) for data in files]


def compare(title: str, works: dict[str, Work], count: int, budget: float) -> dict[str, float]:
    """Median CPU microseconds of an image for each; prints them as ratios to lightly."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # compiles, loads, fills caches
    deadline = time.monotonic() + budget
    while time.monotonic() < deadline or len(taken["lightly"]) < 3:
        for name, work in works.items():
            begin = time.process_time()
            work()
            taken[name].append((time.process_time() - begin) / count * 1e6)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    print(f"\n{title}\n| | CPU microseconds an image | times lightly |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:,.1f} | {medians['lightly'] / value:.2f} |", flush=True)
    return medians


def photographs(folder: Path, limit: int, budget: float) -> None:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:limit]
    files = [p.read_bytes() for p in paths]
    augment = simclr_imagenet()
    with tempfile.TemporaryDirectory() as packed_folder:
        packed = packed_images(paths, Path(packed_folder))
        original = StoredSamples(Bytes(files), np.zeros(len(files), np.int64))
        compare(
            f"{len(files)} JPEGs of {folder.name}, 224 pixels, two views",
            {
                "decoding alone": decode_only(files),
                "simclr_pl, uint8": ours(original, augment, "uint8"),
                "simclr_pl, float": ours(original, augment, "float"),
                "simclr_pl, float, torch alone": ours(original, augment, "torch"),
                "simclr_pl, packed at 256, uint8": ours(packed, augment, "uint8"),
                "simclr_pl, packed at 256, float": ours(packed, augment, "float"),
                "albumentations": from_files(albumentations(224, 1.0, 0.5), files),
                "kornia": kornia_from_files(files, 224),
                "torchvision v2": from_files(torchvision_v2(224, 1.0, 0.5), files),
                "lightly": from_files(lightly(224, 1.0, 0.5), files),
            },
            len(files),
            budget,
        )


class Bytes(EncodedReader):
    """Files in memory, as the peers get them, too."""

    def __init__(self, files: list[bytes]) -> None:
        super().__init__(3)
        self.files = files

    def name(self, i: int) -> str:
        return str(i)

    def encoded(self, i: int) -> bytes:
        return self.files[i]


def packed_images(paths: list[Path], folder: Path) -> Any:
    """The same images in shards of short side 256."""
    from simclr_pl.data import Shards
    from simclr_pl.data.pack import pack_source

    flat = folder / "flat"
    flat.mkdir()
    for i, path in enumerate(paths):
        (flat / f"{i:05}{path.suffix}").symlink_to(path.resolve())
    pack_source(ImageFolder(str(flat)), folder / "packed", workers=0)
    source = Shards(str(folder / "packed"))
    source.open()
    return source.train


def small_images(folder: Path, count: int, budget: float) -> None:
    paths = sorted(folder.rglob("*.jpg"))[:: max(1, 50_000 // count)][:count]
    pixels = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(p).convert("RGB"))).permute(2, 0, 1) for p in paths]
    )
    held = ResidentImages(pixels, np.zeros(len(pixels), np.int64))
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    augment = simclr_cifar()

    def from_memory(peer: Callable[[Image.Image], Any]) -> Work:
        return lambda: [peer(image) for image in images]

    compare(
        f"{len(images)} images of {folder.name} from memory, {pixels.shape[2]} pixels, two views",
        {
            "simclr_pl, uint8": ours(held, augment, "uint8", True),
            "simclr_pl, float": ours(held, augment, "float", True),
            "simclr_pl, float, torch alone": ours(held, augment, "torch", True),
            "albumentations": from_memory(albumentations(32, 0.5, 0.0)),
            "kornia": kornia_from_memory(pixels),
            "torchvision v2": from_memory(torchvision_v2(32, 0.5, 0.0)),
            "lightly": from_memory(lightly(32, 0.5, 0.0)),
        },
        len(images),
        budget,
    )


# A whole loader with one worker: batches that arrive in the main process.


class PeerSet(Dataset):
    """Lightly's way: one item after the other, opened by Pillow."""

    def __init__(self, paths: list[Path], peer: Callable[[Image.Image], Any]) -> None:
        self.paths, self.peer = paths, peer

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        with Image.open(self.paths[i]) as image:
            return self.peer(image.convert("RGB"))


def whole_loader(folder: Path, batch: int, count: int, rounds: int, root: Path) -> None:
    """Each round an epoch of each, without its first batch, which starts the worker."""
    link_images(folder, root, count)
    paths = sorted(root.iterdir())
    data = ContrastiveDataModule(
        ImageFolder(str(root)), batch, num_workers=1, resident="none", augment=simclr_imagenet()
    )
    data.setup()
    loaders = {
        "simclr_pl": data.train_dataloader(),
        "lightly": DataLoader(
            PeerSet(paths, lightly(224, 1.0, 0.5)),
            batch,
            num_workers=1,
            drop_last=True,
            shuffle=True,
            persistent_workers=True,
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            batches = iter(loader)
            next(batches)
            begin = time.perf_counter()
            images = batch * sum(1 for _ in batches)
            rates[name].append(images / (time.perf_counter() - begin))
    ours_, theirs = (statistics.median(rates[name]) for name in ("simclr_pl", "lightly"))
    print(f"\nwhole loader, one worker, batches of {batch}: images per second in the main process")
    print(
        f"simclr_pl {ours_:,.0f} (uint8 views), lightly {theirs:,.0f}: {ours_ / theirs:.1f} times"
    )


def link_images(folder: Path, root: Path, count: int) -> None:
    """Fills ``root`` with ``count`` links to the photographs below ``folder``, in turn."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    for i in range(count):
        (root / f"{i:06}.jpg").symlink_to(paths[i % len(paths)].resolve())


def memory_over_epochs(folder: Path, batch: int, count: int, epochs: int, root: Path) -> None:
    """Memory of the main process, and pages that the workers do not share with it."""
    link_images(folder, root, count)
    data = ContrastiveDataModule(
        ImageFolder(str(root)), batch, num_workers=2, resident="none", augment=simclr_imagenet(32)
    )
    data.setup()
    loader = data.train_dataloader()
    print(f"\n{count:,} files, MiB after each epoch\n| epoch | main | of each worker alone |")
    print("|---|---|---|")
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for _ in loader:
            pass
        workers = [w.pid for w in loader._iterator._workers]
        main, *others = mib(os.getpid(), "Anonymous:"), *(mib(w, "Private_") for w in workers)
        print(f"| {epoch} | {main:.1f} | {' / '.join(f'{m:.1f}' for m in others)} |", flush=True)


def mib(pid: int, kind: str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


# On a GPU: the device stage alone.


def on_device(device: str, budget: float) -> None:
    for size, augment in ((224, simclr_imagenet()), (32, simclr_cifar())):
        images = torch.randint(0, 256, (512, 2, size, size, 3), dtype=torch.uint8, device=device)
        images = images.permute(0, 1, 4, 2, 3)
        table = augment.draw(0, 0, np.arange(512), 2)
        table = {
            n: v.to(device) if isinstance(v, Tensor) else v for n, v in to_tensors(table).items()
        }
        work = partial(augment.apply_batched, images, table)
        work()
        taken = []
        deadline = time.monotonic() + budget
        while time.monotonic() < deadline or len(taken) < 5:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            taken.append(start.elapsed_time(stop))
        print(f"colour stage, 512 images, two views of {size}: {statistics.median(taken):.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imagenet", type=Path, help="folder of photographs")
    parser.add_argument("--cifar10", type=Path, help="folder of small images of one size")
    parser.add_argument("--loader", action="store_true", help="only the whole loader")
    parser.add_argument("--memory", action="store_true", help="only the memory over three epochs")
    parser.add_argument("--images", type=int, default=48, help="photographs of a block")
    parser.add_argument("--batch", type=int, default=64, help="of the whole loader")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    for folder in (given.imagenet, given.cifar10):
        if folder and not next(folder.rglob("*.[jJ][pP]*[gG]"), None):
            parser.error(f"a folder must hold JPEGs; got {str(folder)!r}. Give one of your own.")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    warnings.simplefilter("ignore")
    if given.device == "cuda":
        on_device("cuda", given.seconds)
    with tempfile.TemporaryDirectory() as room:
        if given.imagenet and given.loader:
            whole_loader(given.imagenet, given.batch, 16 * given.batch, 5, Path(room))
        elif given.imagenet and given.memory:
            memory_over_epochs(given.imagenet, 64, 20_000, 3, Path(room))
    if given.imagenet and not (given.loader or given.memory):
        photographs(given.imagenet, given.images, given.seconds)
    if given.cifar10:
        small_images(given.cifar10, 512, given.seconds)
