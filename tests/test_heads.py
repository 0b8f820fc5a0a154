"""Heads trained at once: each is what torch's SGD makes of it, on one rank and on two."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn

from simclr_pl.heads import LinearHeads

E, K = 5, 3
LR, DECAY = [0.05, 0.3, 0.3], [0.0, 0.02, 0.0]


def batches(count: int = 6, offset: float = 0.5) -> list[tuple[Tensor, Tensor]]:
    """Steps of 37 rows, a fifth of them without a label."""
    rng = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(count):
        label = torch.randint(0, K, (37,), generator=rng)
        x = torch.randn(37, E, generator=rng) * torch.tensor([1.0, 2, 0.5, 1, 3]) + offset
        x[:, 0] += label
        steps.append((x, label.where(torch.rand(37, generator=rng) > 0.2, -1)))
    return steps


def torch_run(
    module: nn.Module, steps: list[tuple[Tensor, Tensor]], lr: float, decay: float
) -> None:
    solver = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.8, weight_decay=decay)
    for x, label in steps:
        solver.zero_grad()
        F.cross_entropy(module(x.double()), label, ignore_index=-1).backward()
        solver.step()


def torch_start(hidden: int | None) -> nn.Module:
    torch.manual_seed(0)
    if hidden is None:
        return nn.Linear(E, K).double()
    return nn.Sequential(nn.Linear(E, hidden), nn.ReLU(), nn.Linear(hidden, K)).double()


@pytest.mark.parametrize("hidden", [None, 7])
def test_heads_equal_separate_runs_of_torch_sgd(hidden: int | None) -> None:
    heads = LinearHeads(E, K, LR, DECAY, 0.8, hidden)
    steps = batches()
    for x, label in steps:
        heads.update(x, label)
    query = torch.randn(11, E)
    for i, (lr, decay) in enumerate(zip(LR, DECAY, strict=True)):
        module = torch_start(hidden)
        torch_run(module, steps, lr, decay)
        for ours, theirs in zip(heads.parts(i), module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach().float(), rtol=1e-5, atol=1e-6)
        logits = module(query.double()).detach().float()
        torch.testing.assert_close(heads.logits(query)[i], logits, rtol=1e-5, atol=1e-5)


def test_the_factor_multiplies_the_learning_rates() -> None:
    halved, given = LinearHeads(E, K, [0.4], [0.01]), LinearHeads(E, K, [0.2], [0.01])
    for x, label in batches():
        halved.update(x, label, 0.5)
        given.update(x, label)
    torch.testing.assert_close(halved.weights, given.weights, rtol=1e-6, atol=1e-7)


def test_update_returns_loss_hits_and_labelled_rows() -> None:
    heads = LinearHeads(E, K, LR, DECAY)
    (x, label), labelled = batches(1)[0], batches(1)[0][1] >= 0
    logits = heads.logits(x)
    stats = heads.update(x, label)
    for i in range(3):
        loss = F.cross_entropy(logits[i], label, ignore_index=-1, reduction="sum")
        hits = (logits[i].argmax(1) == label)[labelled].sum()
        expected = torch.tensor([loss, hits, labelled.sum()])
        torch.testing.assert_close(stats[i], expected, rtol=1e-5, atol=1e-5)


def shares(x: Tensor) -> Tensor:
    """A third of the rows on rank 0; all of them in a single process."""
    if not dist.is_initialized():
        return x
    return x[: len(x) // 3] if dist.get_rank() == 0 else x[len(x) // 3 :]


def trained_on_shares(online: bool, empty_on_rank_1: bool = False) -> tuple[Tensor, Tensor]:
    heads = LinearHeads(E, K, LR, DECAY, hidden_features=4, online=online)
    for step, (x, label) in enumerate(batches()):
        if empty_on_rank_1 and step == 3:
            x, label = x[:12], label[:12]
            mine = slice(0 if dist.is_initialized() and dist.get_rank() else 12)
            stats = heads.update(x[mine], label[mine])
        else:
            stats = heads.update(shares(x), shares(label))
    return heads.logits(torch.ones(1, E)), stats


@pytest.mark.parametrize("online", [False, True])
def test_two_ranks_with_uneven_rows_equal_one_process(online: bool) -> None:
    logits, stats = trained_on_shares(online, True)
    ranks = on_ranks(2, trained_on_shares, online, True)
    assert torch.equal(ranks[0][0], ranks[1][0])
    torch.testing.assert_close(ranks[0][0], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranks[1][1], stats, rtol=1e-5, atol=1e-5)


def state_of(heads: LinearHeads) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in heads.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def update_with_nan_on_rank_1() -> tuple[bool, bool]:
    heads = LinearHeads(E, K, LR, DECAY, online=True)
    (x, label), (bad, _) = batches(2)
    heads.update(x, label)
    heads.update(x, label)
    before = state_of(heads)
    bad[0, 0] = torch.nan if dist.get_rank() == 1 else bad[0, 0]
    heads.update(bad, label)
    skipped = same(before, state_of(heads))
    heads.update(x, label)
    return skipped, not torch.equal(before["weights"], heads.weights)


def test_a_nan_on_one_rank_skips_the_update_on_all() -> None:
    assert on_ranks(2, update_with_nan_on_rank_1) == [(True, True), (True, True)]


def test_a_head_that_diverges_does_not_disturb_the_others() -> None:
    both, alone = LinearHeads(E, K, [0.1, torch.inf], [0.0, 0.0]), LinearHeads(E, K, [0.1], [0.0])
    for x, label in batches():
        both.update(x, label)
        alone.update(x, label)
    assert not both.logits(torch.ones(1, E))[1].isfinite().all()
    torch.testing.assert_close(both.weights[0], alone.weights[0])


def test_a_batch_without_labels_leaves_the_heads() -> None:
    heads = LinearHeads(E, K, LR, DECAY, online=True)
    for x, label in batches():
        heads.update(x, label)
    before = state_of(heads)
    stats = heads.update(x, torch.full_like(label, -1))
    assert torch.equal(stats, torch.zeros(3, 3))
    assert all(torch.equal(before[n], heads.state_dict()[n]) for n in ("weights", "average"))
    assert torch.equal(before["velocity"], heads.state_dict()["velocity"])


def test_a_batch_without_rows_changes_nothing() -> None:
    heads = LinearHeads(E, K, LR, DECAY, online=True)
    for x, label in batches():
        heads.update(x, label)
    before = state_of(heads)
    heads.update(x[:0], label[:0])
    assert same(before, state_of(heads))


def test_a_feature_whose_square_overflows_leaves_the_statistics() -> None:
    heads = LinearHeads(E, K, LR, DECAY, online=True)
    (x, label), (large, _) = batches(2)
    heads.update(x, label)
    before = state_of(heads)
    large[0, 0] = 1e25
    heads.update(large, label)
    assert all(torch.equal(before[n], heads.state_dict()[n]) for n in ("mean", "variance", "steps"))


def test_online_heads_equal_their_definition_in_float64() -> None:
    steps = batches(30, offset=4.0)
    heads = LinearHeads(E, K, [0.1], [0.01], 0.8, online=True)
    module = torch_start(None)
    solver = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    mean, variance = torch.zeros(E).double(), torch.ones(E).double()
    average = [p.detach().clone() for p in module.parameters()]
    for t, (x, label) in enumerate(steps):
        heads.update(x, label)
        x = x.double()
        if t > 0:
            scaled = (x - mean) / (variance + 1e-3 * variance.mean() + 1e-12).sqrt()
            solver.zero_grad()
            F.cross_entropy(module(scaled), label, ignore_index=-1).backward()
            solver.step()
            decay = min(0.98, t / (t + 9))
            for a, p in zip(average, module.parameters(), strict=True):
                a.mul_(decay).add_((1 - decay) * p.detach())
        rate = max(0.1, 1 / (t + 1))
        mean = (1 - rate) * mean + rate * x.mean(0)
        variance = (1 - rate) * variance + rate * x.var(0, correction=0)
    query = torch.randn(9, E) + 4
    scaled = (query - mean) / (variance + 1e-3 * variance.mean()).sqrt()
    expected = F.linear(scaled, *average).float()
    torch.testing.assert_close(heads.logits(query)[0], expected, rtol=1e-4, atol=1e-4)


def test_online_heads_do_not_depend_on_the_scale_of_the_features() -> None:
    answers = []
    for scale, offset in ((1.0, 0.0), (1e-3, 0.0), (1e3, 2e4)):
        heads = LinearHeads(E, K, [0.3], [0.0], online=True)
        for x, label in batches(20):
            heads.update(x * scale + offset, label)
        answers.append(heads.logits(torch.ones(4, E) * scale + offset).softmax(-1))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(answers[2], answers[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("online", [False, True])
def test_heads_go_on_from_their_state_to_the_same_bits(online: bool) -> None:
    whole = LinearHeads(E, K, LR, DECAY, online=online)
    steps = batches()
    for x, label in steps[:3]:
        whole.update(x, label)
    resumed = LinearHeads(E, K, LR, DECAY, online=online)
    resumed.load_state_dict(state_of(whole))
    for x, label in steps[3:]:
        whole.update(x, label)
        resumed.update(x, label)
    assert same(whole.state_dict(), resumed.state_dict())
    assert torch.equal(whole.logits(x), resumed.logits(x))


def test_heads_of_another_shape_are_refused() -> None:
    heads = LinearHeads(E, K, LR, DECAY)
    for other in (LinearHeads(E + 1, K, LR, DECAY), LinearHeads(E, K, LR, DECAY, online=True)):
        with pytest.raises(ValueError, match="got heads of"):
            heads.load_state_dict(other.state_dict())


def test_reset_goes_back_to_the_start() -> None:
    heads, fresh = (LinearHeads(E, K, LR, DECAY, online=True) for _ in range(2))
    for x, label in batches():
        heads.update(x, label)
    assert not same(heads.state_dict(), fresh.state_dict())
    heads.reset()
    assert same(heads.state_dict(), fresh.state_dict())


def test_heads_leave_torchs_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    heads = LinearHeads(E, K, LR, DECAY, hidden_features=4, online=True)
    assert torch.equal(heads.weights[0], heads.weights[2])  # the same start
    heads.update(*batches(1)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_are_computed_in_float32_under_bf16_autocast_and_in_inference_mode() -> None:
    plain, other = (LinearHeads(E, K, LR, DECAY, 0.9, 4, online=True) for _ in range(2))
    for x, label in batches():
        x = x.bfloat16()
        plain.update(x.float(), label)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            other.update(x, label)
            answers = other.logits(x)
    assert answers.dtype == torch.float32
    assert torch.equal(answers, plain.logits(x.float()))
    plain.update(x, label)  # what inference mode made can be trained on outside
    other.update(x, label)
    assert same(plain.state_dict(), other.state_dict())
