"""Every similarity with every denominator against float64 oracles, alone and on two ranks."""

import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from loss_oracles import (
    DENOMINATORS,
    OperationCounter,
    assert_equal_to,
    brute_force,
    dense,
    dense_statistics,
    float64,
    label_ids,
    random_ids,
    relative_error,
    value_and_gradients,
)
from ranks import on_ranks
from torch import Tensor

from simclr_pl.errors import InputError
from simclr_pl.losses import NTXentLoss, Statistics, nt_xent

SIMILARITIES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "euclidean": {"similarity": "euclidean"},
    "raw": {"similarity": "euclidean", "normalise": False},
}
RAW = SIMILARITIES["raw"]


def parameter(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# Exactness in float64.


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_dense_oracle_equals_brute_force(similarity: str, denominator: Any) -> None:
    variant = SIMILARITIES[similarity]
    z, random = float64(3, 5, 4), random_ids(3, 5)
    for ids in (None, random):
        names = torch.arange(5).repeat(3, 1) if ids is None else ids
        actual = value_and_gradients(dense(z, ids, 0.7, denominator, **variant), z)
        expected = value_and_gradients(brute_force(z, names, 0.7, denominator, **variant), z)
        assert_equal_to(actual, expected, 1e-12)


@pytest.mark.parametrize(("n_views", "n_images"), [(2, 2), (2, 7), (2, 301), (3, 3), (3, 201)])
@pytest.mark.parametrize("kind", ["views", "ids", "labels"])
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_loss_and_gradients_match_dense_with_any_cache(
    similarity: str, denominator: Any, kind: str, n_views: int, n_images: int
) -> None:
    variant = SIMILARITIES[similarity] | {"denominator": denominator}
    z, sigma = float64(n_views, n_images, 5), parameter(0.7)
    ids = None
    if kind != "views":
        ids = (random_ids if kind == "ids" else label_ids)(n_views, n_images)
        ids[:, 0], ids[0, 1] = 0, 1  # some positive and some negative, also among the fewest rows
    expected = value_and_gradients(dense(z, ids, sigma, **variant), z, sigma)
    for cache_mb in (64, 1, 0):
        loss = nt_xent(z, ids, sigma, cache_mb=cache_mb, **variant)
        assert_equal_to(value_and_gradients(loss, z, sigma), expected, 1e-10)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("with_ids", [False, True])
def test_exponentials_that_all_vanish_in_float64_leave_the_loss_exact(
    denominator: Any, with_ids: bool
) -> None:
    z, sigma = float64(2, 200, 16), parameter(2e-3)
    ids = random_ids(2, 200) if with_ids else None
    assert (-torch.pdist(z.detach().flatten(0, 1)).square().min() / 2e-3).exp() == 0
    actual = value_and_gradients(nt_xent(z, ids, sigma, denominator=denominator, **RAW), z, sigma)
    expected = value_and_gradients(dense(z, ids, sigma, denominator, **RAW), z, sigma)
    assert expected[1].any()
    assert_equal_to(actual, expected, 1e-10)


def test_a_far_origin_changes_nothing() -> None:
    z = (torch.randn(2, 50, 4).double() + 1e6).requires_grad_()
    actual = value_and_gradients(nt_xent(z, **RAW), z)
    assert_equal_to(actual, value_and_gradients(dense(z, **RAW), z), 1e-10)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_module_trains_sigma(denominator: Any) -> None:
    z = float64(2, 9, 6)
    module = NTXentLoss(3.0, True, (0.5, 50.0), denominator=denominator, **RAW).double()
    actual = value_and_gradients(module(z), z, module.log_temperature)
    log_sigma = module.log_temperature.detach().clone().requires_grad_()
    expected = dense(z, None, log_sigma.exp(), denominator, **RAW)
    assert_equal_to(actual, value_and_gradients(expected, z, log_sigma), 1e-11)


def test_distances_of_normalised_rows_are_cosines_at_half_the_temperature() -> None:
    z = torch.randn(2, 50, 8, requires_grad=True)
    actual = value_and_gradients(nt_xent(z, temperature=0.4, similarity="euclidean"), z)
    expected = value_and_gradients(nt_xent(z, temperature=0.2), z)
    assert all(map(torch.equal, actual, expected))


# Where there is little to compare.


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_rows_that_coincide_give_a_finite_loss_and_no_gradient(
    similarity: str, denominator: Any
) -> None:
    variant = SIMILARITIES[similarity] | {"denominator": denominator}
    z = torch.full((2, 5, 3), 0.3, dtype=torch.float64, requires_grad=True)
    for ids in (None, torch.tensor([[0, 0, 1, 2, 3], [0, 1, 1, 4, 3]])):
        value, gradient = value_and_gradients(nt_xent(z, ids, **variant), z)
        torch.testing.assert_close(value, dense(z, ids, **variant).detach())
        assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_without_positives_or_without_negatives_the_loss_is_zero(denominator: Any) -> None:
    z = float64(2, 5, 3)
    cases = [torch.arange(10).view(2, 5)]
    if denominator != "all":
        cases.append(torch.zeros(2, 5, dtype=torch.int64))
    for ids, variant in product(cases, SIMILARITIES.values()):
        value, gradient = value_and_gradients(
            nt_xent(z, ids, denominator=denominator, **variant), z
        )
        assert value == 0
        assert not gradient.any()


def test_one_image_alone_has_no_loss_by_distance() -> None:
    z = float64(2, 1, 3)
    value, gradient = value_and_gradients(nt_xent(z, **RAW), z)
    assert value == 0
    assert not gradient.any()


# float32 and below.


def rows_of(kind: str) -> Tensor:
    first = torch.randn(300, 128)
    return {
        "random": torch.randn(2, 300, 128),
        "trained": torch.stack([first, first + 0.05 * torch.randn(300, 128)]),
        "off-centre": 30 + torch.stack([first, first + 0.5 * torch.randn(300, 128)]),
    }[kind]


@pytest.mark.parametrize("sigma", [256.0, 16.0, 5.0])
@pytest.mark.parametrize("kind", ["random", "trained", "off-centre"])
def test_float32_by_distance_is_accurate(kind: str, sigma: float) -> None:
    z, same_ids = rows_of(kind).requires_grad_(), torch.arange(300).repeat(2, 1)
    wide = z.detach().double().requires_grad_()
    for denominator, ids in product(DENOMINATORS, (None, same_ids)):
        variant = {"temperature": sigma, "denominator": denominator, **RAW}
        value, gradient = value_and_gradients(nt_xent(z, ids, **variant), z)
        expected = value_and_gradients(nt_xent(wide, ids, **variant), wide)
        assert value.dtype == gradient.dtype == torch.float32
        assert relative_error(value, expected[0]) <= 5e-6  # some of these losses are 1e-15
        assert relative_error(gradient, expected[1]) <= 1e-5


def test_large_distances_in_float32_are_served_in_float64() -> None:
    z = rows_of("random").requires_grad_()
    wide = z.detach().double().requires_grad_()
    sigma = torch.tensor(0.1, requires_grad=True)
    actual = value_and_gradients(nt_xent(z, temperature=sigma, **RAW), z, sigma)
    wide_sigma = sigma.detach().double().requires_grad_()
    expected = value_and_gradients(nt_xent(wide, temperature=wide_sigma, **RAW), wide, wide_sigma)
    assert [part.dtype for part in actual] == [torch.float32] * 3
    assert all(relative_error(*pair) < 2e-7 for pair in zip(actual, expected, strict=True))


def test_bf16_autocast_leaves_float32_distances() -> None:
    z = rows_of("trained").requires_grad_()
    without = value_and_gradients(nt_xent(z, temperature=16, **RAW), z)
    with torch.autocast("cpu", torch.bfloat16):
        within = value_and_gradients(nt_xent(z, temperature=16, **RAW), z)
    assert all(map(torch.equal, within, without))


# Statistics.


@pytest.mark.parametrize("cache_mb", [64, 0])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("n_views", [2, 3])
def test_statistics_of_distances_match_dense(n_views: int, with_ids: bool, cache_mb: float) -> None:
    z = torch.randn(200, 8).double() + torch.randn(n_views, 200, 8).double()
    ids = None
    if with_ids:
        ids = torch.randint(0, 20, z.shape[:2])
        ids[0, 0] = 20  # without a positive
    z.requires_grad_()
    for denominator in DENOMINATORS:
        seen: list[Statistics] = []
        variant = {"denominator": denominator, "cache_mb": cache_mb, **RAW}
        with_them = value_and_gradients(nt_xent(z, ids, 2.0, statistics=seen, **variant), z)
        expected = dense_statistics(z.detach(), ids, 2.0, **RAW)
        assert 0 < expected.top1 < 1
        torch.testing.assert_close(tuple(seen[0]), tuple(expected), rtol=1e-11, atol=1e-13)
        without = value_and_gradients(nt_xent(z, ids, 2.0, **variant), z)
        assert all(map(torch.equal, without, with_them))


# Memory.

EXTRA_MEMORY = """
import sys, torch
from simclr_pl import nt_xent

def peak():  # of this program alone; ru_maxrss starts at that of the parent process
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

variant = dict(similarity="euclidean", normalise=False, denominator="both_negatives", temperature=16)
torch.set_num_threads(1)
nt_xent(torch.randn(2, 8, 128, requires_grad=True), **variant).backward()
z = torch.randn(2, 4096, 128, requires_grad=True)
z.grad = torch.zeros_like(z)
before = peak()
nt_xent(z, cache_mb=16, **variant).backward()
print(peak() - before)
"""


def test_extra_memory_of_distances_is_the_cache_and_little_more() -> None:
    """One (N, N) matrix has 256 MiB here."""
    command = [sys.executable, "-c", EXTRA_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 16 < float(done.stdout) < 70


# The checks.


def test_variants_are_checked() -> None:
    z = torch.randn(2, 4, 3)
    with pytest.raises(InputError, match=r"always normalises; got `normalise` false. Set `model"):
        nt_xent(z, normalise=False)
    with pytest.raises(InputError, match="always normalises"):
        NTXentLoss(normalise=False)
    with pytest.raises(
        InputError, match=r"`similarity` must be one of cosine, euclidean; got 'l1'"
    ):
        NTXentLoss(similarity="l1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`denominator` must be one of all, .*; got 'both'"):
        nt_xent(z, denominator="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`temperature` must be at least 0.003; got 0.002"):
        nt_xent(z, temperature=0.002, similarity="euclidean")
    assert "similarity=euclidean, normalise=False" in repr(NTXentLoss(**RAW))


# Two real ranks.


def every_variant() -> list[tuple[dict[str, Any], int, bool, int]]:
    shapes = ((2, False, 7), (3, True, 5), (2, True, 200))
    return [
        ({"denominator": denominator, **variant}, *shape)
        for variant, denominator, shape in product(SIMILARITIES.values(), DENOMINATORS, shapes)
    ]


def rows_and_ids(n_views: int, with_ids: bool, n_images: int) -> tuple[Tensor, Tensor | None]:
    """Of both ranks, (2, V, B, D) and (2, V, B)."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, n_views, n_images, 6, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, n_images, z.shape[:3], generator=generator)
    return z, ids if with_ids else None


def steps_of_every_variant() -> tuple[list[tuple[Any, ...]], int, Tensor]:
    """Results by variant, collectives of all backwards, and a loss where only rank 1 has far rows."""
    rank, steps, collectives = torch.distributed.get_rank(), [], 0
    for variant, *shape in every_variant():
        z, ids = rows_and_ids(*shape)
        own, sigma, seen = z[rank].clone().requires_grad_(), parameter(0.7), []
        own_ids = None if ids is None else ids[rank]
        loss = nt_xent(own, own_ids, sigma, cache_mb=0.1, statistics=seen, **variant)
        with OperationCounter("c10d") as counter:
            steps.append((value_and_gradients(loss, own, sigma), tuple(seen[0])))
        collectives += counter.calls
    far = rows_and_ids(2, False, 7)[0][rank].float() * 100**rank
    return steps, collectives, nt_xent(far, **RAW)


def test_two_ranks_give_the_loss_and_the_gradients_of_one_process() -> None:
    (steps, *counts), (other_steps, *other_counts) = on_ranks(2, steps_of_every_variant)
    assert counts == other_counts
    assert counts[0] == 0
    for (variant, *shape), first, second in zip(every_variant(), steps, other_steps, strict=True):
        z, ids = rows_and_ids(*shape)
        whole = z.transpose(0, 1).flatten(1, 2).clone().requires_grad_()  # (V, 2 B, D)
        all_ids = None if ids is None else ids.transpose(0, 1).flatten(1)
        sigma = parameter(0.7)
        loss = dense(whole, all_ids, sigma, **variant)
        expected, of_z, of_sigma = value_and_gradients(loss, whole, sigma)
        (a, of_first, sigma_first), (b, of_second, sigma_second) = first[0], second[0]
        assert torch.equal(a, b)
        of_rows = torch.cat([of_first, of_second], 1)
        # The mean over ranks is the global gradient.
        actual = (a, of_rows / 2, (sigma_first + sigma_second) / 2)
        assert_equal_to(actual, (expected, of_z, of_sigma), 1e-10)
        seen: list[Statistics] = []
        nt_xent(whole, all_ids, 0.7, statistics=seen, **variant)
        for part in (first[1], second[1]):
            torch.testing.assert_close(part, tuple(seen[0]), rtol=1e-11, atol=1e-12)
