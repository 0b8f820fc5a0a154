"""The loss against float64 oracles, alone and on several ranks."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from loss_oracles import (
    DENOMINATORS,
    OperationCounter,
    all_pairs,
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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_pl import loss_tiles
from simclr_pl.errors import InputError
from simclr_pl.loss_anchors import Denominator
from simclr_pl.losses import NTXentLoss, Statistics, nt_xent

# Exactness in float64.


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("n_views", [2, 3])
def test_dense_oracle_equals_brute_force(n_views: int, denominator: Denominator) -> None:
    z, random = float64(n_views, 7, 4), random_ids(n_views, 7)
    for ids in (None, random):
        names = torch.arange(7).repeat(n_views, 1) if ids is None else ids
        actual = value_and_gradients(dense(z, ids, 0.3, denominator), z)
        expected = value_and_gradients(brute_force(z, names, 0.3, denominator), z)
        assert_equal_to(actual, expected, 1e-13)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(
    ("n_views", "n_images", "width"), [(2, 1, 3), (2, 2, 1), (2, 7, 5), (3, 5, 8)]
)
def test_loss_and_gradient_match_brute_force(
    n_views: int, n_images: int, width: int, temperature: float
) -> None:
    z = float64(n_views, n_images, width)
    ids = torch.arange(n_images).repeat(n_views, 1)
    actual = value_and_gradients(nt_xent(z, temperature=temperature), z)
    assert_equal_to(actual, value_and_gradients(brute_force(z, ids, temperature), z), 1e-12)


@pytest.mark.parametrize("n_views", [2, 3])
def test_ids_choose_the_positives_and_rows_without_any_leave_the_mean(n_views: int) -> None:
    z = float64(n_views, 6, 4)
    ids = torch.tensor([[0, 0, 1, 2, 3, 4], [0, 5, 1, 2, 2, 6], [7, 0, 1, 8, 9, 4]])[:n_views]
    actual = value_and_gradients(nt_xent(z, ids, 0.3), z)
    assert_equal_to(actual, value_and_gradients(brute_force(z, ids, 0.3), z), 1e-12)


@pytest.mark.parametrize("width", [1, 7, 128])
@pytest.mark.parametrize(
    ("n_views", "n_images"),
    [(2, 1), (2, 2), (2, 3), (2, 127), (2, 129), (2, 1000), (3, 1), (3, 2), (3, 3), (3, 129)],
)
@pytest.mark.parametrize("variant", ["views", "random ids", "labels", "decoupled", "decoupled ids"])
def test_every_size_and_variant_matches_dense_with_any_cache(
    variant: str, n_views: int, n_images: int, width: int
) -> None:
    denominator: Denominator = "negatives" if variant.startswith("decoupled") else "all"
    n_images = n_images if denominator == "all" else max(n_images, 2)
    ids = None
    if variant == "labels":
        ids = label_ids(n_views, n_images)
    elif variant.endswith("ids"):
        ids = random_ids(n_views, n_images)
        ids[0, :2] = torch.arange(2)[:n_images]  # several ids, also among the fewest rows
        ids[1, 0] = 0
    z = float64(n_views, n_images, width)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    expected = value_and_gradients(dense(z, ids, temperature, denominator), z, temperature)
    first = None
    for cache_mb in (64, 0.5, 0.01, 0) if n_images < 1000 else (4.5, 0):
        loss = nt_xent(z, ids, temperature, denominator=denominator, cache_mb=cache_mb)
        actual = value_and_gradients(loss, z, temperature)
        assert_equal_to(actual, expected, 1e-10)
        first = first or actual
        assert_equal_to(actual, first, 1e-12)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_one_large_group_of_positives_matches_dense(denominator: Denominator) -> None:
    z = float64(2, 300, 16)
    ids = torch.zeros(2, 300, dtype=torch.int64)
    ids[:, 290:] = 1
    actual = value_and_gradients(nt_xent(z, ids, 0.1, denominator=denominator), z)
    assert_equal_to(actual, value_and_gradients(dense(z, ids, 0.1, denominator), z), 1e-11)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_loss_without_any_positive_is_zero(denominator: Denominator) -> None:
    z = float64(2, 200, 4)
    ids = torch.arange(400).view(2, 200)
    value, gradient = value_and_gradients(nt_xent(z, ids, 0.1, denominator=denominator), z)
    assert value == 0
    assert not gradient.any()


def test_rows_of_zeros_give_a_finite_loss_and_gradient() -> None:
    z = torch.randn(2, 5, 3)
    z[:, 1] = 0
    assert all(
        part.isfinite().all() for part in value_and_gradients(nt_xent(z.requires_grad_()), z)
    )


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("n_views", [2, 3])
def test_gradcheck_of_rows_and_temperature(
    n_views: int, with_ids: bool, denominator: Denominator
) -> None:
    ids = torch.tensor([[0, 1, 2, 3], [0, 0, 2, 4], [5, 1, 2, 6]])[:n_views] if with_ids else None

    def loss(z: Tensor, temperature: Tensor) -> Tensor:
        return nt_xent(z, ids, temperature, denominator=denominator)

    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (float64(n_views, 4, 3), temperature))


def test_upstream_gradient_scales_the_gradient() -> None:
    z, temperature = float64(2, 4, 3), torch.tensor(0.3, requires_grad=True)
    _, *once = value_and_gradients(nt_xent(z, temperature=temperature), z, temperature)
    _, *thrice = value_and_gradients(3 * nt_xent(z, temperature=temperature), z, temperature)
    torch.testing.assert_close(thrice, [3 * part for part in once])


def test_second_derivative_is_refused() -> None:
    z = float64(2, 4, 3)
    (gradient,) = torch.autograd.grad(nt_xent(z).square(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# float32 and below.


def converged(n_images: int) -> Tensor:
    first = torch.randn(n_images, 128)
    return torch.stack([first, first + 0.05 * torch.randn(n_images, 128)])


def assert_float32_is_accurate(z: Tensor, temperature: float, limit: float) -> None:
    actual = value_and_gradients(nt_xent(z.requires_grad_(), temperature=temperature), z)
    wide = z.detach().double().requires_grad_()
    expected = value_and_gradients(nt_xent(wide, temperature=temperature), wide)
    assert all(part.dtype == torch.float32 for part in actual)
    assert relative_error(actual[0], expected[0]) <= limit
    assert relative_error(actual[1], expected[1]) <= limit


@pytest.mark.parametrize("n_images", [512, 2048])
def test_float32_gradient_is_accurate_to_5e_7(n_images: int) -> None:
    assert_float32_is_accurate(torch.randn(2, n_images, 128), 0.2, 5e-7)


def test_float32_gradient_at_a_low_temperature_is_accurate_to_3e_6() -> None:
    assert_float32_is_accurate(torch.randn(2, 512, 128), 0.05, 3e-6)
    assert_float32_is_accurate(converged(512), 0.05, 3e-6)


def test_float32_by_ids_with_one_positive_is_as_accurate_as_by_views() -> None:
    z, ids = converged(256).requires_grad_(), torch.arange(256).repeat(2, 1)
    wide = z.detach().double().requires_grad_()
    expected = value_and_gradients(nt_xent(wide, temperature=0.05), wide)
    actual = value_and_gradients(nt_xent(z, ids, 0.05), z)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) <= 3e-6


def test_bf16_autocast_leaves_the_accuracy_of_float32_rows() -> None:
    z = converged(512).requires_grad_()
    without = value_and_gradients(nt_xent(z, temperature=0.05), z)
    with torch.autocast("cpu", torch.bfloat16):
        assert_float32_is_accurate(torch.randn(2, 512, 128), 0.2, 1e-6)
        within = value_and_gradients(nt_xent(z, temperature=0.05), z)
    assert all(map(torch.equal, within, without))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_give_a_float32_loss(dtype: torch.dtype) -> None:
    z = torch.randn(2, 16, 8).to(dtype).requires_grad_()
    value, gradient = value_and_gradients(nt_xent(z, temperature=0.1), z)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    wide = z.detach().double().requires_grad_()
    expected, expected_gradient = value_and_gradients(dense(wide, None, 0.1), wide)
    assert relative_error(value, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("make", [lambda n: torch.randn(2, n, 128), converged])
def test_temperature_too_low_for_float32_is_served_in_float64(make) -> None:  # type: ignore[no-untyped-def]
    z = make(64).requires_grad_()
    actual = value_and_gradients(nt_xent(z, temperature=0.01), z)
    wide = z.detach().double().requires_grad_()
    expected = value_and_gradients(dense(wide, None, 0.01), wide)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-12)


def test_lowest_temperatures_of_each_dtype_neither_overflow_nor_vanish() -> None:
    same = torch.ones(2, 500, 2, dtype=torch.float64)  # the largest sums: every cosine is 1
    apart = same * torch.tensor([1.0, -1.0])[None, torch.arange(500) % 2, None]
    for dtype, temperature in ((torch.float32, 0.0132), (torch.float64, 0.0015)):
        for rows in (same, apart):
            z = rows.to(dtype).requires_grad_()
            value, gradient = value_and_gradients(nt_xent(z, temperature=temperature), z)
            torch.testing.assert_close(value.double(), dense(rows, None, temperature).detach())
            assert gradient.isfinite().all()


# Statistics.

STATISTICS_CASES = {
    "views": (2, 20, False),
    "three views": (3, 20, False),
    "ids": (2, 20, True),
    "tiles": (2, 300, False),
    "tiles of three views": (3, 200, False),
    "tiles by ids": (2, 300, True),
}


def statistics_case(name: str) -> tuple[Tensor, Tensor | None]:
    n_views, n_images, with_ids = STATISTICS_CASES[name]
    first = torch.randn(n_images, 8, dtype=torch.float64)
    z = first + torch.randn(n_views, n_images, 8, dtype=torch.float64)
    ids = random_ids(n_views, n_images) if with_ids else None
    if ids is not None:
        assert not all_pairs(z, ids, 1)[1].any(1).all()  # some row has no positive
    return z.requires_grad_(), ids


@pytest.mark.parametrize("cache_mb", [64, 0])
@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_statistics_match_dense(case: str, cache_mb: float) -> None:
    z, ids = statistics_case(case)
    seen: list[Statistics] = []
    nt_xent(z, ids, 0.2, cache_mb=cache_mb, statistics=seen)
    (actual,) = seen
    expected = dense_statistics(z.detach(), ids, 0.2)
    assert 0 < expected.top1 < 1
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_statistics_leave_loss_and_gradient_bit_identical(case: str) -> None:
    z, ids = statistics_case(case)
    without = value_and_gradients(nt_xent(z, ids, 0.2), z)
    with_them = value_and_gradients(nt_xent(z, ids, 0.2, statistics=[]), z)
    assert all(map(torch.equal, without, with_them))


# Memory and time.

EXTRA_MEMORY = """
import sys, torch
from simclr_pl import nt_xent

def peak():  # of this program alone; ru_maxrss starts at that of the parent process
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

torch.set_num_threads(1)
nt_xent(torch.randn(2, 8, 128, requires_grad=True)).backward()
z = torch.randn(2, 4096, 128, requires_grad=True)
z.grad = torch.zeros_like(z)
before = peak()
nt_xent(z, cache_mb=float(sys.argv[1])).backward()
print(peak() - before)
"""


@pytest.mark.parametrize(("cache_mb", "least", "most"), [(64, 64, 110), (0, 4, 40)])
def test_extra_memory_is_the_cache_and_little_more(cache_mb: int, least: int, most: int) -> None:
    """The textbook form needs over 1 GiB here; one (N, N) matrix has 256 MiB."""
    command = [sys.executable, "-c", EXTRA_MEMORY, str(cache_mb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert least < float(done.stdout) < most


@pytest.mark.parametrize("n_images", [8, 300])
def test_loss_without_gradient_is_the_same_and_skips_the_second_pass(n_images: int) -> None:
    z, temperature = float64(2, n_images, 4), torch.tensor(0.3).double().requires_grad_()
    with OperationCounter("mm") as both_passes:
        expected = nt_xent(z, temperature=temperature).detach()
    with torch.no_grad(), OperationCounter("mm") as first_pass:
        assert torch.equal(nt_xent(z, temperature=temperature), expected)
    with OperationCounter("mm") as detached:
        assert torch.equal(nt_xent(z.detach(), temperature=temperature.detach()), expected)
    assert 0 < first_pass.calls == detached.calls <= both_passes.calls / 2


def held_buffers() -> dict[object, tuple[int, int]]:
    held = loss_tiles._memory.__dict__["held"]
    return {key: (buffer.data_ptr(), buffer.numel()) for key, buffer in held.items()}


@pytest.mark.parametrize("cache_mb", [64, 0])
def test_workspace_is_reused_and_results_are_no_views_of_it(cache_mb: float) -> None:
    a, b = float64(2, 400, 16), float64(2, 400, 16)
    first = value_and_gradients(nt_xent(a, cache_mb=cache_mb), a)
    buffers, copies = held_buffers(), [part.clone() for part in first]
    loss_of_a = nt_xent(a, cache_mb=cache_mb)
    value_and_gradients(nt_xent(b, cache_mb=cache_mb), b)
    assert held_buffers() == buffers
    assert all(map(torch.equal, first, copies))
    assert all(map(torch.equal, value_and_gradients(loss_of_a, a), copies))


def test_cache_holds_no_more_than_its_budget() -> None:
    loss_tiles._memory.__dict__.clear()
    z = float64(2, 1000, 4)
    nt_xent(z, cache_mb=4.5).backward()
    ((_, size),) = (held for key, held in held_buffers().items() if "cache" in key)
    assert 3 * 2**20 < 8 * size <= 4.5 * 2**20


def test_training_follows_a_validation_in_inference_mode() -> None:
    loss_tiles._memory.__dict__.clear()
    z = float64(2, 200, 4)
    with torch.inference_mode():
        inferred = nt_xent(z)
    value, gradient = value_and_gradients(nt_xent(z), z)
    assert value == inferred
    assert_equal_to((gradient,), value_and_gradients(dense(z), z)[1:], 1e-12)


def test_two_threads_at_once_get_their_own_results() -> None:
    rows = [float64(2, 300, 16) for _ in range(2)]
    expected = [value_and_gradients(nt_xent(z, temperature=0.1), z) for z in rows]
    together = Barrier(2)

    def repeat(z: Tensor) -> list[tuple[Tensor, ...]]:
        together.wait(30)
        return [value_and_gradients(nt_xent(z, temperature=0.1), z) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for results, right in zip(pool.map(repeat, rows), expected, strict=True):
            assert all(all(map(torch.equal, result, right)) for result in results)


# The module and its checks.


def test_module_equals_function_and_shows_its_temperature() -> None:
    z, ids = torch.randn(2, 4, 3), random_ids(2, 4)
    assert NTXentLoss(0.2)(z) == nt_xent(z, temperature=0.2)
    decoupled = NTXentLoss(0.2, denominator="negatives", cache_mb=0)
    assert decoupled(z, ids) == nt_xent(z, ids, 0.2, denominator="negatives")
    assert repr(NTXentLoss(0.2)) == "NTXentLoss(temperature=0.2)"
    assert repr(decoupled) == "NTXentLoss(temperature=0.2, denominator=negatives)"
    assert "learnable within (0.1, 1.0)" in repr(NTXentLoss(0.2, True, (0.1, 1.0)))
    assert not list(NTXentLoss(0.2).parameters())


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("n_images", [5, 200])
def test_gradient_of_learnable_log_temperature_matches_dense(
    n_images: int, denominator: Denominator
) -> None:
    z = float64(2, n_images, 6)
    module = NTXentLoss(0.2, learnable=True, denominator=denominator).double()
    actual = value_and_gradients(module(z), z, module.log_temperature)
    log_temperature = torch.tensor(0.2).log().double().requires_grad_()
    loss = dense(z, None, log_temperature.exp(), denominator)
    assert_equal_to(actual, value_and_gradients(loss, z, log_temperature), 1e-6)
    log_temperature.data.copy_(module.log_temperature.data)
    loss = dense(z, None, log_temperature.exp(), denominator)
    assert_equal_to(actual, value_and_gradients(loss, z, log_temperature), 1e-11)


@pytest.mark.parametrize(("step", "bound"), [(-10.0, 0.1), (10.0, 0.5)])
def test_learnable_temperature_stays_within_its_bounds(step: float, bound: float) -> None:
    z, module = torch.randn(2, 4, 3), NTXentLoss(0.2, learnable=True, bounds=(0.1, 0.5))
    with torch.no_grad():
        module.log_temperature += step
    torch.testing.assert_close(module(z), nt_xent(z, temperature=bound))
    torch.testing.assert_close(module.log_temperature.exp().item(), bound)


def test_learnable_temperature_chooses_the_dtype_by_its_lower_bound() -> None:
    module = NTXentLoss(0.02, learnable=True, bounds=(0.005, 1.0))
    with torch.no_grad():
        module.log_temperature -= 10
    z = torch.randn(2, 40, 16, requires_grad=True)
    value, gradient = value_and_gradients(module(z), z)
    torch.testing.assert_close(value.double(), dense(z.detach(), None, 0.005))
    assert gradient.isfinite().all()


def test_learnable_temperature_is_a_float32_parameter_in_bf16_autocast() -> None:
    module = NTXentLoss(0.2, learnable=True)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, 4, 3)).backward()
    assert module.log_temperature.grad.dtype == torch.float32
    assert module.log_temperature.grad != 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(InputError, match=r"`temperature` must be > 0; got .*Set `model"):
        NTXentLoss(temperature)
    with pytest.raises(InputError, match="`temperature` must be > 0"):
        nt_xent(torch.randn(2, 2, 2), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperature_too_low_for_float64_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"`temperature` must be at least 0.0015; got 0.001"):
        nt_xent(torch.randn(2, 4, 2, dtype=dtype), temperature=0.001)


@pytest.mark.parametrize(
    ("temperature", "bounds"),
    [
        (0.5, (0.0, 1.0)),
        (0.5, (-0.1, 1.0)),
        (0.01, (0.02, 2.0)),
        (3.0, (0.02, 2.0)),
        (0.5, (2.0, 0.1)),
    ],
)
def test_bounds_of_a_learnable_temperature_must_hold_it(
    temperature: float, bounds: tuple[float, float]
) -> None:
    with pytest.raises(InputError, match=r"must lie within its bounds.*Set `model.loss.bounds`"):
        NTXentLoss(temperature, learnable=True, bounds=bounds)
    assert NTXentLoss(temperature, bounds=bounds).log_temperature is None


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match=r"must be \(V, B, D\).*got \(4, 3\)"):
        nt_xent(torch.randn(4, 3))
    with pytest.raises(InputError, match="at least 2 rows"):
        nt_xent(torch.randn(1, 1, 3))
    with pytest.raises(InputError, match=r"other views; got \(1, 4, 3\)"):
        nt_xent(torch.randn(1, 4, 3))
    for denominator in DENOMINATORS[1:]:
        with pytest.raises(InputError, match=rf"{denominator} needs a negative; got \(2, 1, 3\)"):
            nt_xent(torch.randn(2, 1, 3), denominator=denominator)
    with pytest.raises(InputError, match=r"must be \(V, B\) = \(2, 3\); got \(3, 2\)"):
        nt_xent(torch.randn(2, 3, 4), torch.zeros(3, 2, dtype=torch.int64))


def test_one_view_with_ids_is_enough() -> None:
    z, ids = float64(1, 6, 3), torch.tensor([[0, 1, 0, 2, 1, 1]])
    actual = value_and_gradients(nt_xent(z, ids, 0.3), z)
    assert_equal_to(actual, value_and_gradients(brute_force(z, ids, 0.3), z), 1e-12)


# Several real ranks.

WIDTH = 5
VARIANTS = (
    "views",
    "ids",
    "decoupled",
    "decoupled ids",
    "three views",
    "three views ids",
    "learnable",
)


class Trainee(nn.Module):
    """An encoder in float64 and its loss."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        denominator: Denominator = "negatives" if "decoupled" in variant else "all"
        self.loss = NTXentLoss(0.2, variant == "learnable", denominator=denominator)
        self.double()

    def forward(self, x: Tensor, ids: Tensor | None, seen: list[Statistics]) -> Tensor:
        self.z = self.encoder(x.flatten(0, 1)).view(*x.shape[:2], WIDTH)
        return self.loss(self.z, ids, seen)


def images_and_ids(variant: str, n_images: int) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    n_views = 3 if "three" in variant else 2
    x = torch.randn(n_views, n_images, 6, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, n_images - 2, (n_views, n_images), generator=generator)
    return x, ids if "ids" in variant else None


def train_step(variant: str, n_images: int, on_rank: bool) -> dict[str, object]:
    """One step on this rank's share of the images."""
    x, ids = images_and_ids(variant, n_images)
    module = Trainee(variant)
    model: nn.Module = module
    if on_rank:
        size = n_images // torch.distributed.get_world_size()
        share = slice(
            size * torch.distributed.get_rank(), size * torch.distributed.get_rank() + size
        )
        x, ids = x[:, share], None if ids is None else ids[:, share]
        model = DistributedDataParallel(module)
    seen: list[Statistics] = []
    loss = model(x, ids, seen)
    inputs = [module.z, *module.loss.parameters()]
    with OperationCounter("c10d") as counter:
        torch.autograd.grad(loss, inputs, retain_graph=True)
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "statistics": tuple(seen[0]),
        "collectives": counter.calls,
    }


@pytest.mark.parametrize(("world_size", "n_images"), [(2, 8), (4, 8), (2, 300)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_on_ranks_equals_single_process(variant: str, world_size: int, n_images: int) -> None:
    expected = train_step(variant, n_images, False)
    steps = on_ranks(world_size, train_step, variant, n_images, True)
    assert ("loss.log_temperature" in expected["gradients"]) == (variant == "learnable")
    for step in steps:
        assert torch.equal(step["loss"], steps[0]["loss"])
        for part in ("loss", "gradients", "statistics"):
            torch.testing.assert_close(step[part], expected[part], rtol=1e-12, atol=1e-12)
        assert step["collectives"] == 0


def error_of_unequal_batches(n_images: list[int], with_ids: bool) -> str:
    z = torch.randn(2, n_images[torch.distributed.get_rank()], 3)
    ids = torch.zeros(z.shape[:2], dtype=torch.int64) if with_ids else None
    nt_xent(torch.randn(2, 4, 3))  # a shape agreed on before
    with pytest.raises(InputError) as caught:
        nt_xent(z, ids)
    return str(caught.value)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("n_images", [[4, 3], [3, 4]])
def test_unequal_batches_raise_on_every_rank(n_images: list[int], with_ids: bool) -> None:
    message = f"one shape on all ranks; got [[2, {n_images[0]}, 3], [2, {n_images[1]}, 3]]"
    for error in on_ranks(2, error_of_unequal_batches, n_images, with_ids, timeout=30):
        assert message in error


def count_one_collective() -> int:
    with OperationCounter("c10d") as counter:
        torch.distributed.all_reduce(torch.zeros(1))
    return counter.calls


def test_collective_counter_sees_collectives() -> None:
    assert on_ranks(2, count_one_collective) == [1, 1]
