"""The loss against a float64 brute force, alone and on two ranks."""

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_pl.errors import InputError
from simclr_pl.losses import NTXentLoss, nt_xent


def brute_force(z: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Row by row and term by term, by autograd: z (V, B, D), ids (V, B)."""
    rows = [row / row.norm() for row in z.flatten(0, 1)]
    names = ids.flatten().tolist()
    losses = []
    for i, anchor in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        positives = [j for j in others if names[j] == names[i]]
        if not positives:
            continue
        s = {j: anchor @ rows[j] / temperature for j in others}
        lse = torch.stack([s[j] for j in others]).exp().sum().log()
        losses.append(torch.stack([lse - s[j] for j in positives]).mean())
    return torch.stack(losses).mean()


def value_and_gradient(loss: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(
    ("n_views", "n_images", "width"), [(2, 1, 3), (2, 2, 1), (2, 7, 5), (3, 5, 8)]
)
def test_loss_and_gradient_match_brute_force_float64(
    n_views: int, n_images: int, width: int, temperature: float
) -> None:
    z = torch.randn(n_views, n_images, width, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(n_images).repeat(n_views, 1)
    value, gradient = value_and_gradient(nt_xent(z, temperature=temperature), z)
    expected, expected_gradient = value_and_gradient(brute_force(z, ids, temperature), z)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n_views", [2, 3])
def test_ids_choose_the_positives_and_rows_without_any_leave_the_mean(n_views: int) -> None:
    z = torch.randn(n_views, 6, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 0, 1, 2, 3, 4], [0, 5, 1, 2, 2, 6], [7, 0, 1, 8, 9, 4]])[:n_views]
    value, gradient = value_and_gradient(nt_xent(z, ids, 0.3), z)
    expected, expected_gradient = value_and_gradient(brute_force(z, ids, 0.3), z)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_gradcheck_in_float64() -> None:
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, temperature=0.4), (z,))


def test_upstream_gradient_scales_the_gradient() -> None:
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    _, once = value_and_gradient(nt_xent(z), z)
    _, thrice = value_and_gradient(3 * nt_xent(z), z)
    torch.testing.assert_close(thrice, 3 * once)


def test_loss_is_computed_in_float32_under_bf16_autocast() -> None:
    z = torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        value = nt_xent(z, temperature=0.1)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, nt_xent(z.double(), temperature=0.1).float())


def test_module_equals_function_and_shows_its_temperature() -> None:
    z = torch.randn(2, 4, 3)
    assert NTXentLoss(0.2)(z) == nt_xent(z, temperature=0.2)
    assert repr(NTXentLoss(0.2)) == "NTXentLoss(temperature=0.2)"


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(InputError, match=r"`temperature` must be > 0; got .*Set `model"):
        NTXentLoss(temperature)
    with pytest.raises(InputError, match="`temperature` must be > 0"):
        nt_xent(torch.randn(2, 2, 2), temperature=temperature)


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match=r"must be \(V, B, D\).*got \(4, 3\)"):
        nt_xent(torch.randn(4, 3))
    with pytest.raises(InputError, match="at least 2 rows"):
        nt_xent(torch.randn(1, 1, 3))
    with pytest.raises(InputError, match=r"must be \(V, B\) = \(2, 3\); got \(3, 2\)"):
        nt_xent(torch.randn(2, 3, 4), torch.zeros(3, 2, dtype=torch.int64))


# Two real ranks.


def encoder_of(width: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, width)).double()


def images_and_ids(n_images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, n_images, 6, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, n_images - 2, (2, n_images), generator=generator)
    return x, ids


def train_step_on_a_rank(with_ids: bool) -> tuple[Tensor, list[Tensor], int]:
    x, ids = images_and_ids(8)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    model = DistributedDataParallel(encoder_of(5))
    z = model(x[:, share].flatten(0, 1)).view(2, 8 // world_size, 5)
    loss = nt_xent(z, ids[:, share] if with_ids else None, 0.2)
    counter = CollectiveCounter()
    with counter:
        torch.autograd.grad(loss, z, retain_graph=True)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], counter.calls


class CollectiveCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the c10d operations that are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("with_ids", [False, True])
def test_ddp_parameter_gradient_equals_single_process(world_size: int, with_ids: bool) -> None:
    x, ids = images_and_ids(8)
    model = encoder_of(5)
    loss = nt_xent(model(x.flatten(0, 1)).view(2, 8, 5), ids if with_ids else None, 0.2)
    loss.backward()
    for value, gradients, collectives in on_ranks(world_size, train_step_on_a_rank, with_ids):
        torch.testing.assert_close(value, loss.detach(), rtol=0, atol=1e-12)
        for gradient, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=0, atol=1e-12)
        assert collectives == 0


def count_one_collective() -> int:
    with CollectiveCounter() as counter:
        torch.distributed.all_reduce(torch.zeros(1))
    return counter.calls


def test_collective_counter_sees_collectives() -> None:
    assert on_ranks(2, count_one_collective) == [1, 1]
