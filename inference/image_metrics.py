"""How generated pictures lie among real ones, in a fixed feature space: distance, fidelity, coverage, diversity.

The features are computed, not learnt by gradient descent, so that anyone gets the same figures to rounding: histograms
of oriented gradients and brightness, on the principal components of real train pictures. Scores of sets in another
space, such as Inception's, cannot be compared with these.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from omniform.errors import OmniformError
from omniform.inference.judges import JUDGED_SIZE, at_judged_size

N_ORIENTATIONS, CELL = 8, 4  # directions of a gradient, and pixels per side of the cell of one histogram
N_COMPONENTS = 32
N_NEIGHBOURS = 5
_CHUNK = 64  # rows whose differences to all others are held at once, which bounds memory


@dataclass(frozen=True)
class FeatureSpace:
    """Pictures as points: their gradient histograms, centred, and projected on the principal components of train rows.

    The two kinds of numbers, gradients and brightness, are scaled to equal total variance over the train rows. The
    components are not whitened: a direction counts as much as real pictures vary in it.

    Attributes:
        mean: of the histograms of the train rows.
        axes: principal components as columns, times the scale of each number.
    """

    mean: Float[np.ndarray, "F"]
    axes: Float[np.ndarray, "F D"]

    @classmethod
    def fit(cls, images: Float[np.ndarray, "N H W"], n_components: int = N_COMPONENTS) -> Self:
        """Find the components of real train pictures in [-1, 1].

        Raises:
            OmniformError: not more pictures than components, or a size that `at_judged_size` refuses.
        """
        if len(images) <= n_components:
            raise OmniformError(
                f"{len(images)} train pictures for {n_components} components: expected more pictures than components"
            )
        found = gradient_histograms(images)
        mean = found.mean(0)
        of_brightness = np.arange(len(mean)) % (N_ORIENTATIONS + 1) == N_ORIENTATIONS
        scale = np.empty_like(mean)
        for kind in (of_brightness, ~of_brightness):
            scale[kind] = 1 / np.sqrt(found[:, kind].var(0).sum())
        _, _, components = np.linalg.svd((found - mean) * scale, full_matrices=False)
        return cls(mean, scale[:, None] * components[:n_components].T)

    def features(self, images: Float[np.ndarray, "N H W"]) -> Float[np.ndarray, "N D"]:
        """Return the point of each picture in [-1, 1], of any size that can be judged."""
        return (gradient_histograms(images) - self.mean) @ self.axes


def gradient_histograms(images: Float[np.ndarray, "N H W"]) -> Float[np.ndarray, "N 144"]:
    """Return, for 4 x 4 cells, how much gradient there is in each of 8 directions, and the mean brightness.

    After histograms of oriented gradients (Dalal and Triggs, CVPR 2005, doi:10.1109/CVPR.2005.177), votes shared
    linearly between neighbouring directions and cells. Two deviations: directions run over the full circle, because
    ink is always brighter than paper here; and contrast is not normalised, because real pictures share one range of
    brightness and a pale or blurred drawing shall count as different.
    """
    ink = (at_judged_size(np.asarray(images, dtype=np.float64)) + 1) / 2
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)), mode="edge")
    right = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    strength = np.hypot(right, down)
    direction = np.arctan2(down, right) % (2 * np.pi) * (N_ORIENTATIONS / (2 * np.pi))  # [0, 8]
    # Each direction takes the part of a vote by which the gradient is nearer to it than one direction's width.
    apart = np.abs(direction[..., None] - np.arange(N_ORIENTATIONS))
    share = np.clip(1 - np.minimum(apart, N_ORIENTATIONS - apart), 0, None)
    votes = np.concatenate([share * strength[..., None], ink[..., None]], axis=-1)
    centres = np.arange(CELL / 2 - 0.5, JUDGED_SIZE, CELL)
    window = np.clip(1 - np.abs(np.arange(JUDGED_SIZE) - centres[:, None]) / CELL, 0, None)
    window /= window.sum(1, keepdims=True)
    return np.einsum("ai,nijk,bj->nabk", window, votes, window, optimize=True).reshape(len(ink), -1)


def frechet_distance(points: Float[np.ndarray, "N D"], others: Float[np.ndarray, "M D"]) -> float:
    """Return the squared Frechet distance between normal distributions fitted to two sets of points.

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), as in the Frechet Inception distance (arXiv:1706.08500, equation 6). Of
    finite sets it is too large by an amount in inverse proportion to their sizes (arXiv:1911.07023): compare sets of
    one size, and print what real pictures of that size reach.

    Raises:
        OmniformError: fewer than two points in a set.
    """
    if min(len(points), len(others)) < 2:
        raise OmniformError(f"a distance between {len(points)} and {len(others)} points: expected at least 2 each")
    (mean, covariance), (other_mean, other_covariance) = _moments(points), _moments(others)
    # The product is similar to a symmetric matrix, whose roots are real: no complex rounding to throw away.
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


@dataclass(frozen=True)
class Manifold:
    """Real points, each with a ball that reaches to its k-th nearest other real point.

    Source: density and coverage (arXiv:2002.09797), equations 3 and 4.

    Raises:
        OmniformError: not more points than neighbours.
    """

    points: Float[np.ndarray, "N D"]
    k: int = N_NEIGHBOURS

    def __post_init__(self) -> None:
        if not 1 <= self.k < len(self.points):
            raise OmniformError(f"the {self.k}-th neighbour among {len(self.points)} real points: expected more points")

    @functools.cached_property
    def radii(self) -> Float[np.ndarray, "N"]:
        """Distance of each real point to its k-th nearest other one."""
        return np.sort(pairwise_distances(self.points, self.points), axis=1)[:, self.k]  # the 0-th is itself

    def inside(self, generated: Float[np.ndarray, "M D"]) -> npt.NDArray[np.bool_]:
        """Return (M, N): whether each generated point lies in the ball of each real one."""
        return pairwise_distances(generated, self.points) <= self.radii

    def density(self, generated: Float[np.ndarray, "M D"]) -> float:
        """Return the mean number of balls around a generated point, over k: about 1 for more real points, above 1
        where generated points keep to where real ones are dense."""
        return float(self.inside(generated).sum(1).mean() / self.k)

    def covered(self, generated: Float[np.ndarray, "M D"]) -> npt.NDArray[np.bool_]:
        """Return (N): whether each real point's ball holds a generated point. Their mean is the coverage."""
        return np.asarray(self.inside(generated).any(0))

    def expected_coverage(self, n_generated: int) -> float:
        """Return the mean coverage by generated points of the very distribution of the real ones (appendix of
        the source): 1 - the probability that the k nearest of all other points are all real."""
        n_others = len(self.points) - 1
        ranks = np.arange(self.k)
        return float(1 - np.prod((n_others - ranks) / (n_others + n_generated - ranks)))


def diversity(points: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"]) -> float:
    """Return the mean distance between two different points of one class, averaged over the classes.

    Raises:
        OmniformError: a class with a single point.
    """
    means = []
    for label in np.unique(labels):
        of_class = points[labels == label]
        if len(of_class) < 2:
            raise OmniformError(f"class {label} has one point: the distance within a class takes at least 2")
        means.append(pairwise_distances(of_class, of_class).sum() / (len(of_class) * (len(of_class) - 1)))
    return float(np.mean(means))


def jackknife_interval(
    statistic: Callable[[npt.NDArray[np.int64]], float], n: int, n_groups: int = 20, z: float = 1.959964
) -> tuple[float, float]:
    """Return a 95 % interval of a statistic of n independent items, by the delete-a-group jackknife.

    The spread of the statistic without each of the groups in turn; unlike the bootstrap it repeats no item, which
    would lower distances between items and raise those between distributions. Source: Shao and Tu, The Jackknife and
    Bootstrap (1995), section 2.3.

    Args:
        statistic: its value for the items at the given places.
        n_groups: of neighbouring items, which should hold every kind of item alike.

    Raises:
        OmniformError: fewer items than groups.
    """
    if n < n_groups:
        raise OmniformError(f"{n} items in {n_groups} groups: expected at least one item per group")
    places = np.arange(n)
    groups = places * n_groups // n
    without = np.array([statistic(places[groups != group]) for group in range(n_groups)])
    error = np.sqrt((n_groups - 1) * without.var())
    whole = statistic(places)
    return float(whole - z * error), float(whole + z * error)


def pairwise_distances(rows: Float[np.ndarray, "N D"], columns: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "N M"]:
    """Return the Euclidean distance of every row to every column; of equal points exactly 0."""
    found = np.empty((len(rows), len(columns)))
    for first in range(0, len(rows), _CHUNK):
        chunk = rows[first : first + _CHUNK]
        found[first : first + _CHUNK] = np.sqrt(((chunk[:, None] - columns) ** 2).sum(2))
    return found


def _moments(points: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D D"]]:
    return points.mean(0), np.cov(points, rowvar=False)
