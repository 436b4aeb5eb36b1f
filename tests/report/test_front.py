"""Fronts and hypervolumes: worked numbers, inclusion and exclusion, an independent library."""

from itertools import combinations

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignbench.errors import DataError
from alignbench.report.front import hypervolume, on_front


def by_inclusion_and_exclusion(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume of a union of boxes from the volumes of all intersections."""
    lengths = np.maximum(points - reference, 0.0)
    return sum(
        (-1) ** (size + 1) * float(np.prod(np.min(some, axis=0)))
        for size in range(1, len(points) + 1)
        for some in combinations(lengths, size)
    )


def test_worked_numbers() -> None:
    assert hypervolume([[1, 2], [2, 1], [0.5, 0.5]], [0, 0]) == 3.0
    assert hypervolume([[1, 2], [1, 2]], [0, 0]) == 2.0
    assert hypervolume([[3.0], [5.0]], [1.0]) == 4.0
    assert hypervolume([[2, 2, 2], [1, 1, 3]], [0, 0, 0]) == 9.0
    assert hypervolume([[-1, 5], [0, 5]], [0, 0]) == 0.0, "a point on the border adds nothing"
    assert hypervolume(np.empty((0, 2)), [0, 0]) == 0.0


def test_front_keeps_equal_points_and_drops_dominated_ones() -> None:
    points = [[1, 2], [2, 1], [1, 2], [0.5, 2], [1, 1], [2, 0.5]]
    assert on_front(points).tolist() == [True, True, True, False, False, False]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(2, 5))
def test_against_inclusion_and_exclusion(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    points, reference = np.round(rng.normal(size=(n, m)), 1), np.round(rng.normal(size=m) - 0.7, 1)  # with ties
    expected = by_inclusion_and_exclusion(points, reference)
    assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 2), (25, 3), (15, 4), (12, 5)])
def test_against_an_independent_library(n: int, m: int) -> None:
    for seed in range(5):
        points = np.random.default_rng([n, m, seed]).uniform(size=(n, m))
        theirs = moocore.hypervolume(points, ref=np.zeros(m), maximise=True)
        assert hypervolume(points, np.zeros(m)) == pytest.approx(theirs, abs=1e-6)
        front = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
        assert on_front(points).tolist() == front.tolist()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_only_the_front_counts_and_shifts_do_not(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    points, reference = rng.normal(size=(8, m)), np.full(m, -1.0)
    total = hypervolume(points, reference)
    assert hypervolume(points[on_front(points)], reference) == pytest.approx(total)
    assert hypervolume(points + 5.0, reference + 5.0) == pytest.approx(total)
    assert hypervolume(points[rng.permutation(8)], reference) == pytest.approx(total)


@pytest.mark.parametrize(
    ("points", "reference", "says"),
    [
        ([[1.0, np.nan]], [0, 0], "1 value"),
        ([1.0, 2.0], [0, 0], "shape"),
        ([[1.0, 2.0]], [0, 0, 0], "2 objectives, a reference of 3"),
        ([[1.0, 2.0]], [0, np.inf], "reference point"),
    ],
)
def test_bad_points_are_refused(points: list, reference: list, says: str) -> None:
    with pytest.raises(DataError, match=says):
        hypervolume(points, reference)
