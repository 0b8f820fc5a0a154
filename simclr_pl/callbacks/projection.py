"""From features to the plane.

Symbols: n points, E feature width.
"""

import warnings

import numpy as np

_UMAP_NEIGHBOURS = 15  # the package's default


def project_pca(x: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """The first two principal components.

    Args:
        x: (n, E) float32, n >= 3.

    Returns:
        (n, 2) float32, zeros where the points do not differ, and what the two axes are. In each
        component the feature with the largest weight has a positive one.
    """
    from sklearn.decomposition import PCA

    xy = np.zeros((len(x), 2), np.float32)
    share = np.zeros(2)
    x = x.astype(np.float64)
    if x.var(0).sum() > 1e-12:  # less is rounding: a constant encoder
        # For two components 2 to 40 times as quick as the covariance's eigenvectors, and exact.
        solver = "arpack" if min(x.shape) > 2 else "full"
        pca = PCA(min(2, x.shape[1]), svd_solver=solver, random_state=0)
        found = pca.fit_transform(x)
        xy[:, : found.shape[1]] = found
        share[: found.shape[1]] = pca.explained_variance_ratio_
    first, second = (f"{100 * part:.0f} % of the variance" for part in share)
    return xy, (f"first principal component, {first}", f"second principal component, {second}")


def project_umap(x: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """UMAP by cosine distance; only who is near whom has a meaning.

    Args:
        x: (n, E) float32, n >= 3.

    Returns:
        (n, 2) float32 and what the two axes are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to its programmers
        from umap import UMAP

        neighbours = min(_UMAP_NEIGHBOURS, len(x) - 1)
        # few points: its spectral start needs more of them
        start = "spectral" if len(x) > 50 else "random"
        umap = UMAP(neighbours, metric="cosine", init=start, random_state=0, n_jobs=1)
        xy = umap.fit_transform(x).astype(np.float32)
    return xy, ("UMAP 1", "UMAP 2")


def mirrored_as(
    xy: np.ndarray, index: np.ndarray, before: np.ndarray, index_before: np.ndarray
) -> np.ndarray:
    """Mirrors the axes along which the points lie opposite to where they were on another map.

    Args:
        xy: (n, 2) float32.
        index: (n,) int64, distinct names of the points.
        before: (m, 2) float32, the other map.
        index_before: (m,) int64.

    Returns:
        (n, 2) float32; ``xy`` or its mirror image.
    """
    _, ours, theirs = np.intersect1d(index, index_before, True, return_indices=True)
    now, then = xy[ours], before[theirs]
    agreement = ((now - now.mean(0)) * (then - then.mean(0))).sum(0)  # (2,)
    mirrored: np.ndarray = xy * np.where(agreement < 0, -1, 1).astype(xy.dtype)
    return mirrored
