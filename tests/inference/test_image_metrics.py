"""Image metrics against closed forms, slow oracles and sets whose figures are known."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import KNeighborsClassifier

from omniform.data.handwritten_digits import SPLIT_ROWS, load_digit_images, warped
from omniform.errors import OmniformError
from omniform.inference.image_metrics import (
    FeatureSpace,
    Manifold,
    diversity,
    frechet_distance,
    gradient_histograms,
    jackknife_interval,
    pairwise_distances,
)

Images = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def drawings() -> Images:
    """All real digits in [-1, 1]."""
    return load_digit_images()[0] / np.float32(127.5) - 1


@pytest.fixture(scope="module")
def space(drawings: Images) -> FeatureSpace:
    return FeatureSpace.fit(drawings[SPLIT_ROWS["train"]])


# Features


def test_held_out_digits_lie_among_train_digits_of_their_class(drawings: Images, space: FeatureSpace) -> None:
    train, validation = SPLIT_ROWS["train"], SPLIT_ROWS["validation"]
    labels = load_digit_images()[1]
    nearest = KNeighborsClassifier(5).fit(space.features(drawings[train]), labels[train])
    assert nearest.score(space.features(drawings[validation]), labels[validation]) > 0.97


def test_the_distance_grows_with_every_kind_of_damage(drawings: Images, space: FeatureSpace) -> None:
    reference, pictures = space.features(drawings[:1414:2]), drawings[1:1415:2]  # of the same writers
    noise = np.random.default_rng(0).normal(size=pictures.shape)
    levels = ((pictures + 1) * 127.5).round().astype(np.uint8)
    damaged = {
        "blurred": [gaussian_filter(pictures, (0, s, s)) for s in (0.5, 1.0, 1.5)],
        "noisy": [(pictures + s * noise).clip(-1, 1) for s in (0.2, 0.4, 0.8)],
        "pale": [(pictures + 1) * s - 1 for s in (0.8, 0.6, 0.4)],
        "turned": [np.stack([warped(x, s, 1, (0, 0)) for x in levels]) / 127.5 - 1 for s in (15, 30, 45)],
        "erased": [np.where(np.arange(16) < s, -1, pictures) for s in (5, 7, 9)],
    }
    floor = frechet_distance(space.features(pictures), reference)
    for kind, versions in damaged.items():
        distances = [floor, *(frechet_distance(space.features(x), reference) for x in versions)]
        assert distances == sorted(distances), kind
        assert distances[-1] > 10 * floor, kind


def test_a_ramp_is_all_in_one_direction() -> None:
    ramp = np.broadcast_to(np.linspace(-1, 1, 16), (1, 16, 16))
    for turns, direction in enumerate((0, 6, 4, 2)):  # rot90 turns counterclockwise, angles run clockwise as seen
        cells = gradient_histograms(np.rot90(ramp, turns, axes=(1, 2))).reshape(4, 4, 9)
        inner = cells[1:3, 1:3]
        assert np.allclose(inner[..., direction], 1 / 15)
        assert np.allclose(np.delete(inner[..., :8], direction, axis=-1), 0)
    assert np.allclose(cells[..., 8].mean(), 0.5)


def test_features_see_an_enlarged_picture_as_the_original(drawings: Images, space: FeatureSpace) -> None:
    enlarged = drawings[:5].repeat(2, axis=1).repeat(2, axis=2)
    assert np.allclose(space.features(enlarged), space.features(drawings[:5]), atol=1e-6)


def test_too_few_train_pictures_are_refused(drawings: Images) -> None:
    with pytest.raises(OmniformError, match="32 train pictures for 32 components"):
        FeatureSpace.fit(drawings[:32])


# Frechet distance


@given(seed=st.integers(0, 2**16), d=st.integers(2, 6), n=st.integers(8, 30))
def test_the_distance_is_that_of_scipys_matrix_root(seed: int, d: int, n: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(n, d)) @ random.normal(size=(d, d)), random.normal(size=(n + 3, d)) + 1
    c, e = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + e - 2 * np.real(sqrtm(c @ e)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_distance_of_known_moments() -> None:
    """Diagonal covariances: |m - m'|^2 plus the squared differences of the deviations."""
    signs = np.array([(a, b) for a in (-1, 1) for b in (-1, 1)], dtype=float)
    deviation = math.sqrt(4 / 3)  # of each column of signs, with n - 1 in the denominator
    moved = signs * (2, 5) + (3, 4)
    assert frechet_distance(signs, moved) == pytest.approx(25 + (1 * deviation) ** 2 + (4 * deviation) ** 2)


def test_the_distance_to_oneself_is_nothing_even_in_fewer_dimensions() -> None:
    random = np.random.default_rng(0)
    flat = random.normal(size=(40, 3)) @ random.normal(size=(3, 8))
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(flat, random.permutation(flat)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(OmniformError, match="at least 2 each"):
        frechet_distance(flat[:1], flat)


def test_small_sets_of_one_distribution_are_apart_by_an_amount_that_falls_with_their_size() -> None:
    random = np.random.default_rng(0)
    large = random.normal(size=(20_000, 8))
    apart = [np.mean([frechet_distance(random.normal(size=(n, 8)), large) for _ in range(20)]) for n in (50, 100, 200)]
    assert apart[0] / apart[1] == pytest.approx(2, rel=0.25)
    assert apart[1] / apart[2] == pytest.approx(2, rel=0.25)


# Density and coverage


@given(seed=st.integers(0, 2**16), n=st.integers(4, 12), m=st.integers(1, 12), k=st.integers(1, 3))
def test_density_and_coverage_are_those_of_a_slow_oracle(seed: int, n: int, m: int, k: int) -> None:
    random = np.random.default_rng(seed)
    real, generated = random.normal(size=(n, 3)), random.normal(size=(m, 3))
    reach = [sorted(math.dist(a, b) for j, b in enumerate(real) if j != i)[k - 1] for i, a in enumerate(real)]
    around = [[math.dist(y, x) <= r for x, r in zip(real, reach, strict=True)] for y in generated]
    manifold = Manifold(real, k)
    assert manifold.density(generated) == pytest.approx(np.sum(around) / (k * m))
    assert manifold.covered(generated).tolist() == [any(column) for column in zip(*around, strict=True)]


def test_more_of_the_same_distribution_has_density_1_and_the_expected_coverage() -> None:
    random = np.random.default_rng(0)
    densities, coverages, expected = [], [], 0.0
    for _ in range(10):
        manifold, more = Manifold(random.normal(size=(200, 4))), random.normal(size=(300, 4))
        densities.append(manifold.density(more))
        coverages.append(manifold.covered(more).mean())
        expected = manifold.expected_coverage(300)
    assert np.mean(densities) == pytest.approx(1, abs=0.05)
    assert np.mean(coverages) == pytest.approx(expected, abs=0.02)


def test_a_generator_of_few_pictures_covers_little_and_one_of_noise_nothing(
    drawings: Images, space: FeatureSpace
) -> None:
    real = space.features(drawings[SPLIT_ROWS["train"]])
    manifold = Manifold(real)
    assert manifold.covered(real).all()
    collapsed = real[:10].repeat(10, axis=0)
    assert manifold.covered(collapsed).mean() < 0.1
    assert manifold.density(collapsed) > 0.8
    noise = space.features(np.random.default_rng(0).uniform(-1, 1, (100, 16, 16)))
    assert manifold.density(noise) == 0
    assert not manifold.covered(noise).any()
    with pytest.raises(OmniformError, match="the 5-th neighbour among 5 real points"):
        Manifold(real[:5])


# Diversity, intervals, distances


@given(seed=st.integers(0, 2**16))
def test_diversity_is_that_of_a_slow_oracle_and_scales_with_the_points(seed: int) -> None:
    random = np.random.default_rng(seed)
    points, labels = random.normal(size=(13, 3)), np.array([0] * 3 + [1] * 4 + [2] * 6)
    means = []
    for label in range(3):
        own = points[labels == label]
        means.append(np.mean([math.dist(a, b) for i, a in enumerate(own) for j, b in enumerate(own) if i != j]))
    assert diversity(points, labels) == pytest.approx(np.mean(means))
    assert diversity(7 - 3 * points, labels) == pytest.approx(3 * np.mean(means))


def test_a_collapsed_class_has_no_diversity() -> None:
    assert diversity(np.array([[1.0, 2.0]] * 4), np.array([0, 0, 1, 1])) == 0
    with pytest.raises(OmniformError, match="class 1 has one point"):
        diversity(np.zeros((3, 2)), np.array([0, 0, 1]))


def test_the_jackknife_of_a_mean_is_the_textbook_interval() -> None:
    values = np.random.default_rng(0).normal(size=60)
    low, high = jackknife_interval(lambda places: float(values[places].mean()), 60, n_groups=60)
    reach = 1.959964 * values.std(ddof=1) / math.sqrt(60)
    assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach))
    with pytest.raises(OmniformError, match="5 items in 20 groups"):
        jackknife_interval(lambda places: 0.0, 5)


def test_the_jackknife_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        points = random.normal(size=(100, 2))
        low, high = jackknife_interval(lambda places, p=points: float(p[places].var()), 100)  # type: ignore[misc]
        hits += low <= 1 <= high
    assert 0.88 <= hits / 200 <= 0.99


@given(n=st.integers(1, 150), m=st.integers(1, 5))
def test_distances_are_exact_for_any_number_of_rows(n: int, m: int) -> None:
    random = np.random.default_rng(n)
    rows, columns = random.normal(size=(n, 3)), random.normal(size=(m, 3))
    rows[0] = columns[-1]
    found = pairwise_distances(rows, columns)
    assert found[0, -1] == 0
    assert np.allclose(found, [[math.dist(a, b) for b in columns] for a in rows])
