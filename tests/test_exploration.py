"""The running inverse against a direct one, and the bonus against its formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignbench.errors import ConfigError, DataError
from alignbench.exploration import Precision


@st.composite
def designs(draw):
    """(differences, features, ridge): any size, also more differences than dimensions and none at all."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    dimension, count = draw(st.integers(1, 12)), draw(st.integers(0, 40))
    scale = draw(st.sampled_from([1e-3, 1.0, 2.0]))
    ridge = draw(st.sampled_from([1e-3, 0.1, 1.0, 10.0]))
    differences = scale * rng.normal(size=(count, dimension))
    if draw(st.booleans()) and count:
        differences[:, 0] = 0.0  # a direction that nothing was learnt about
    return differences, rng.normal(size=(5, dimension)), ridge


def direct(differences, ridge):
    return np.linalg.inv(ridge * np.eye(differences.shape[1]) + differences.T @ differences)


def built(differences, ridge):
    precision = Precision(differences.shape[1], ridge)
    precision.add_all(differences)
    return precision


@given(designs())
def test_inverse_is_the_direct_one(design):
    differences, features, ridge = design
    precision, expected = built(differences, ridge), direct(differences, ridge)
    np.testing.assert_allclose(precision.inverse, expected, rtol=1e-7, atol=1e-9 / ridge)
    np.testing.assert_array_equal(precision.inverse, precision.inverse.T)
    norms = np.sqrt(np.diag(features @ expected @ features.T))
    np.testing.assert_allclose(precision.norm(features), norms, rtol=1e-6)
    assert precision.count == len(differences)
    assert precision.norm(features).dtype == np.float64


@given(designs())
def test_every_difference_shrinks_the_bonus_and_the_ridge_bounds_it(design):
    differences, features, ridge = design
    precision = Precision(differences.shape[1], ridge)
    before = precision.norm(features)
    np.testing.assert_allclose(before, np.linalg.norm(features, axis=1) / np.sqrt(ridge))
    for difference in differences:
        precision.add(difference)
        now = precision.norm(features)
        assert (now <= before * (1 + 1e-9)).all()
        before = now


@given(designs())
def test_order_and_sign_do_not_matter(design):
    differences, features, ridge = design
    signs = np.where(np.arange(len(differences)) % 2, 1.0, -1.0)[:, None]
    other = built((signs * differences)[::-1], ridge)
    np.testing.assert_allclose(other.norm(features), built(differences, ridge).norm(features), rtol=1e-6)


@given(designs())
def test_a_rotation_of_the_features_changes_no_bonus(design):
    differences, features, ridge = design
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(features.shape[1],) * 2))
    turned = built(differences @ rotation, ridge).norm(features @ rotation)
    np.testing.assert_allclose(turned, built(differences, ridge).norm(features), rtol=1e-6)


def test_worked_numbers():
    precision = Precision(2, 2.0)
    precision.add(np.array([1.0, 0.0]))
    precision.add(np.array([-1.0, 0.0]))
    # Sigma = diag(4, 2)
    np.testing.assert_allclose(precision.inverse, np.diag([0.25, 0.5]))
    np.testing.assert_allclose(precision.norm(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])), [0.5, 0.5**0.5, 3**0.5])


def test_thousands_of_updates_do_not_drift():
    differences = np.random.default_rng(0).normal(size=(5000, 32)) / 6
    inverse, expected = built(differences, 1e-2).inverse, direct(differences, 1e-2)
    assert np.abs(inverse - expected).max() < 1e-10 * np.abs(expected).max()


def test_the_inverse_handed_out_is_a_copy():
    precision = Precision(2, 1.0)
    precision.inverse[:] = 7.0
    np.testing.assert_array_equal(precision.inverse, np.eye(2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_nothing_is_added(value):
    precision = Precision(2, 1.0)
    rows = np.array([[1.0, 0.0], [0.0, value]])
    for call in (precision.add_all, precision.norm, lambda rows: precision.add(rows[1])):
        with pytest.raises(DataError, match=r"1 feature value.* not finite"):
            call(rows)
    assert precision.count == 0
    np.testing.assert_array_equal(precision.inverse, np.eye(2))


def test_other_shapes_and_settings_are_refused():
    precision = Precision(2, 1.0)
    for call in (precision.add, precision.add_all, precision.norm):
        with pytest.raises(ConfigError, match="pass the shape"):
            call(np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="pass the shape"):
        precision.add_all(np.zeros(2))
    for dimension, ridge in ((0, 1.0), (2, 0.0), (2, -1.0), (2, np.nan), (2, np.inf)):
        with pytest.raises(ConfigError):
            Precision(dimension, ridge)
