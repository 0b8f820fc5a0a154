"""LARS, the parameter groups and the schedule against transcriptions of the authors' code."""

import io
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from simclr_pl.errors import InputError
from simclr_pl.optim import LARS, lr_factor, parameter_groups, warmup_cosine

LEARNING_RATES = [0.0, 0.4, 0.8, 0.6, 0.2]  # of five steps: a warm-up from 0, then less


def authors_update(
    w: np.ndarray, g: np.ndarray, v: np.ndarray, lr: float, group: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """`LARSOptimizer.apply_gradients` with classic momentum, for one variable; returns w and v."""
    g = g + group["weight_decay"] * w
    trust_ratio = 1.0
    if group.get("adapt", True):
        w_norm, g_norm = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
        if w_norm > 0 and g_norm > 0:
            trust_ratio = group["trust_coefficient"] * w_norm / g_norm
    scaled_lr = lr * trust_ratio
    next_v = group["momentum"] * v + scaled_lr * g
    update = group["momentum"] * next_v + scaled_lr * g if group["nesterov"] else next_v
    return w - update, next_v


def make_parameters() -> list[nn.Parameter]:
    """Of several shapes; the second is all zero, so its norm is."""
    shapes = [(3, 4), (2, 5), (7,), (2, 1, 3, 3), ()]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    values[1].zero_()
    return [nn.Parameter(value) for value in values]


def gradients(n_steps: int = 5) -> list[list[Tensor]]:
    """For `make_parameters`; the third parameter's is zero at first, the first's at the end."""
    steps = [[torch.randn_like(p) for p in make_parameters()] for _ in range(n_steps)]
    steps[0][2].zero_()
    steps[-1][0].zero_()
    return steps


def run(optimizer: LARS, parameters: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
    for lr, step in zip(LEARNING_RATES[-len(steps) :], steps, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 0.01), (0.9, 0.0), (0.0, 0.01)])
def test_lars_matches_the_authors_update_float64(
    foreach: bool, nesterov: bool, momentum: float, weight_decay: float
) -> None:
    options = {
        "momentum": momentum,
        "weight_decay": weight_decay,
        "trust_coefficient": 0.02,
        "nesterov": nesterov,
    }
    parameters, steps = make_parameters(), gradients()
    exempt = {"adapt": False, "weight_decay": 0.0}
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], **exempt}]
    of_group = [options] * 3 + [options | exempt] * 2
    expected = [p.detach().numpy().copy() for p in parameters]
    velocity = [np.zeros_like(w) for w in expected]
    optimizer = LARS(groups, lr=9.0, foreach=foreach, **options)
    for t, step in enumerate(steps):
        for i, g in enumerate(step):
            expected[i], velocity[i] = authors_update(
                expected[i], g.numpy(), velocity[i], LEARNING_RATES[t], of_group[i]
            )
    run(optimizer, parameters, steps)
    for p, w, v in zip(parameters, expected, velocity, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            optimizer.state[p]["momentum_buffer"].numpy(), v, rtol=1e-12, atol=1e-14
        )


def test_lars_defaults_are_the_papers() -> None:
    defaults = LARS([nn.Parameter(torch.ones(1))]).defaults
    papers = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-6, "trust_coefficient": 0.001}
    assert papers.items() <= defaults.items()
    assert not defaults["nesterov"]


@pytest.mark.parametrize("foreach", [True, False])
def test_lars_leaves_parameters_without_gradient_alone(foreach: bool) -> None:
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = LARS(parameters, lr=1.0, weight_decay=0.1, foreach=foreach)
    optimizer.step()  # no gradient anywhere
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert not torch.equal(parameters[0], before[0])
    for p, old in zip(parameters[1:], before[1:], strict=True):
        assert torch.equal(p, old)
        assert not optimizer.state[p]


@pytest.mark.parametrize("foreach", [True, False])
def test_lars_keeps_the_gradients_it_is_given(foreach: bool) -> None:
    parameters, steps = make_parameters(), gradients(1)
    run(LARS(parameters, weight_decay=0.1, foreach=foreach), parameters, steps)
    for p, g in zip(parameters, steps[0], strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)


def test_lars_returns_the_loss_of_a_closure_that_may_use_autograd() -> None:
    w = nn.Parameter(torch.tensor([2.0]))
    optimizer = LARS([{"params": [w], "adapt": False}], lr=0.1, momentum=0.0, weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(w.detach(), torch.tensor([1.6]))  # 2 - 0.1 * 4


@pytest.mark.parametrize("foreach", [True, False])
def test_lars_continues_identically_from_its_state(foreach: bool) -> None:
    parameters, steps = make_parameters(), gradients()
    options = {"weight_decay": 0.01, "momentum": 0.7, "nesterov": True, "foreach": foreach}
    exempt = {"adapt": False, "weight_decay": 0.0}
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], **exempt}]
    optimizer = LARS(groups, **options)
    run(optimizer, parameters, steps[:3])
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = LARS([{"params": copies[:3]}, {"params": copies[3:]}], lr=7.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, parameters, steps[3:])
    run(resumed, copies, steps[3:])
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_lars_refuses_a_negative(name: str) -> None:
    with pytest.raises(InputError, match=rf"LARS's `{name}` must be >= 0; got -0.1"):
        LARS([nn.Parameter(torch.ones(1))], **{name: -0.1})


class Mixed(nn.Module):
    """Every kind of parameter that the groups must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.batch_norm = nn.BatchNorm2d(4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.plane_norm = nn.LayerNorm((4, 5))  # its parameters are matrices
        self.head = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4))
        self.gate = nn.Parameter(torch.ones(()))
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head[0].weight  # type: ignore[union-attr]
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_parameter_groups_exempt_norms_by_type_and_vectors() -> None:
    model = Mixed()
    groups, names = parameter_groups(model)
    name_of = {id(p): name for name, p in model.named_parameters()}
    adapted, exempt = ([name_of[id(p)] for p in group["params"]] for group in groups)
    assert sorted(adapted) == ["conv.weight", "head.0.weight", "token"]
    assert exempt == names
    assert set(names) == {
        "conv.bias",
        "head.0.bias",
        "tied.bias",
        "gate",
        *(
            f"{norm}.{kind}"
            for norm in ("batch_norm", "group_norm", "plane_norm", "head.1")
            for kind in ("weight", "bias")
        ),
    }
    assert len(exempt) == len(set(exempt))
    assert {k: v for k, v in groups[0].items() if k != "params"} == {}
    assert {k: v for k, v in groups[1].items() if k != "params"} == {
        "weight_decay": 0.0,
        "adapt": False,
    }


def test_parameter_groups_are_accepted_by_lars_and_steer_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups, _ = parameter_groups(model)
    LARS(groups, lr=1.0, weight_decay=0.1).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.weight"}  # nothing but decay moves anything, and only the adapted


def test_parameter_groups_without_exempt_parameters_are_one_group() -> None:
    groups, names = parameter_groups(nn.Linear(3, 2, bias=False))
    assert len(groups) == 1
    assert names == []


@pytest.mark.parametrize(
    ("scaling", "batch", "factor"),
    [
        ("linear", 256, 1.0),
        ("linear", 4096, 16.0),
        ("linear", 64, 0.25),
        ("sqrt", 4096, 64.0),
        ("sqrt", 2, math.sqrt(2)),
        ("none", 4096, 1.0),
    ],
)
def test_lr_factor_is_the_papers(scaling: Any, batch: int, factor: float) -> None:
    assert lr_factor(scaling, batch) == factor


def authors_schedule(step: int, warmup_steps: int, total_steps: int) -> float:
    """`WarmUpAndCosineDecay` with a scaled learning rate of 1 and keras's `CosineDecay`."""
    learning_rate = step / float(warmup_steps) if warmup_steps else 1.0
    decay_steps = total_steps - warmup_steps
    decay_step = min(step - warmup_steps, decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * decay_step / decay_steps))
    return learning_rate if step < warmup_steps else cosine


@pytest.mark.parametrize(("warmup", "total"), [(0, 50), (1, 50), (10, 100), (99, 100)])
def test_warmup_cosine_matches_the_authors_at_every_step(warmup: int, total: int) -> None:
    for step in range(total + 5):
        ours = warmup_cosine(step, warmup, total)
        assert ours == pytest.approx(authors_schedule(step, warmup, total), rel=1e-12, abs=1e-15)


def test_warmup_cosine_ends_are_zero_peak_zero() -> None:
    assert warmup_cosine(0, 10, 100) == 0.0
    assert warmup_cosine(10, 10, 100) == 1.0
    assert warmup_cosine(100, 10, 100) == 0.0


@pytest.mark.parametrize(
    ("warmup", "total", "cycles"), [(0, 12, 3), (7, 100, 2), (3, 100, 7), (0, 5, 5), (1, 4, 9)]
)
def test_cycles_are_cosines_from_the_peak_of_equal_length(
    warmup: int, total: int, cycles: int
) -> None:
    length = Fraction(total - warmup, cycles)
    for step in range(warmup, total):
        place = Fraction(step - warmup)
        while place >= length:
            place -= length
        expected = (1 + math.cos(math.pi * place / length)) / 2
        assert warmup_cosine(step, warmup, total, cycles) == pytest.approx(expected, abs=1e-12)
    assert warmup_cosine(total, warmup, total, cycles) == 0.0
    before = [warmup_cosine(step, warmup, total, cycles) for step in range(warmup)]
    assert before == [step / warmup for step in range(warmup)]


def test_cycles_are_torch_s_warm_restarts() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = CosineAnnealingWarmRestarts(optimizer, T_0=9)
    for step in range(36):
        assert warmup_cosine(step + 4, 4, 40, 4) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_warmup_as_long_as_the_run_never_decays() -> None:
    assert [warmup_cosine(step, 4, 4) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
