"""From features to the plane: against the singular value decomposition in float64."""

import numpy as np
import pytest

from simclr_pl.callbacks.projection import mirrored_as, project_pca, project_umap


def cloud(n: int, width: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(n, width)) * np.linspace(3, 1, width) + 5
    return points.astype(np.float32)


def components(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: coordinates (n, 2) up to sign, and the shares of the variance."""
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return (u * s)[:, :2], (s**2 / (s**2).sum())[:2]


@pytest.mark.parametrize(("n", "width"), [(37, 11), (11, 37), (7, 2), (3, 5)])
def test_pca_equals_the_float64_decomposition_up_to_sign(n: int, width: int) -> None:
    x = cloud(n, width)
    xy, axes = project_pca(x)
    expected, share = components(x)
    signs = np.sign((xy * expected).sum(0))
    np.testing.assert_allclose(xy, expected * signs, rtol=0, atol=1e-5)
    assert xy.dtype == np.float32
    assert axes[0] == f"first principal component, {100 * share[0]:.0f} % of the variance"
    assert axes[1] == f"second principal component, {100 * share[1]:.0f} % of the variance"


def test_pca_signs_do_not_depend_on_the_order_of_the_points() -> None:
    x = cloud(50, 8)
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_allclose(project_pca(x)[0][order], project_pca(x[order])[0], atol=1e-5)


def test_pca_signs_make_the_largest_weight_positive() -> None:
    x = np.zeros((4, 3), np.float32)
    x[:, 1] = [-2, -1, 0, 3]
    x[:, 2] = [0.5, -0.5, 0.5, -0.5]
    for flipped in (x, -x):
        xy = project_pca(flipped)[0]
        assert (xy * (flipped - flipped.mean(0))[:, 1:]).sum() > 10  # along the axes, not against


def test_pca_of_a_constant_encoder_is_one_place() -> None:
    xy, axes = project_pca(np.full((9, 4), 0.5, np.float32))
    assert not xy.any()
    assert axes[0].endswith(", 0 % of the variance")


def test_pca_of_a_single_feature_is_a_line() -> None:
    xy, _ = project_pca(np.array([[1.0], [2.0], [6.0]], np.float32))
    np.testing.assert_allclose(xy, [[-2, 0], [-1, 0], [3, 0]], atol=1e-6)


def test_a_map_is_mirrored_where_it_disagrees_with_the_map_before() -> None:
    before = cloud(40, 2)
    index_before = np.random.default_rng(2).permutation(100)[:40]
    keep = np.arange(35)[::-1]  # fewer points, in another order, and one that is new
    noise = np.random.default_rng(3).normal(0, 0.1, (36, 2)).astype(np.float32)
    now = np.vstack([before[keep], [[900.0, 900.0]]]).astype(np.float32) + noise
    index = np.append(index_before[keep], 1000)
    for signs in ([1, 1], [-1, 1], [1, -1], [-1, -1]):
        turned = now * np.array(signs, np.float32)
        assert np.array_equal(mirrored_as(turned, index, before, index_before), now)


def test_umap_keeps_clusters_apart_and_draws_no_global_random_number() -> None:
    pytest.importorskip("umap")  # an extra, whose import alone takes ten seconds
    member = np.arange(80) % 2
    noise = np.random.default_rng(0).normal(0, 0.01, (80, 6))
    x = (np.eye(2, 6)[member] + noise).astype(np.float32)
    state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    xy, axes = project_umap(x)
    assert np.array_equal(state, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    assert np.array_equal(xy, project_umap(x)[0])
    assert (xy.shape, xy.dtype, axes) == ((80, 2), np.float32, ("UMAP 1", "UMAP 2"))
    centres = np.array([xy[member == k].mean(0) for k in (0, 1)])
    distance = np.linalg.norm(xy[:, None] - centres, axis=2)  # (80, 2)
    assert np.array_equal(distance.argmin(1), member)
    assert project_umap(x[:4])[0].shape == (4, 2)
