"""Properties that the metrics keep whatever the numbers are: turning the map, moving it, changing its unit."""
import numpy as np
import scoringrules
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2

from heimdall_train.metrics import (
    COVERAGE_LEVELS,
    clopper_pearson,
    coverage_counts,
    energy_score,
    evaluate_positions,
    gaussian_nll,
    mahalanobis_squared,
    variance_scale,
)

seeds = st.integers(0, 2**32 - 1)


def sessions(seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Truth, estimate and covariance with ellipses from round to thin, errors from nothing to many deviations."
    generator = np.random.default_rng(seed)
    angle, deviation = generator.uniform(0, np.pi, count), 10 ** generator.uniform(0, 3, (count, 2))
    axes = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], -2)
    covariance = np.einsum('nij,nj,nkj->nik', axes, deviation**2, axes)
    truth = generator.uniform(-5000, 5000, (count, 2))
    error = np.einsum('nij,nj->ni', axes, deviation * generator.standard_normal((count, 2))) * 10 ** generator.uniform(-2, 1, (count, 1))
    return truth, truth + error, covariance


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0, 6.3), st.floats(-1e5, 1e5))
def test_turning_and_moving_the_map_changes_nothing(seed: int, angle: float, shift: float):
    truth, estimate, covariance = sessions(seed)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    before = evaluate_positions(truth, estimate, covariance)
    after = evaluate_positions(truth @ turn.T + shift, estimate @ turn.T + shift, turn @ covariance @ turn.T)
    assert after['coverage'] == before['coverage']
    for key in set(before) - {'coverage'}:
        np.testing.assert_allclose(after[key], before[key], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(1e-3, 1e3))
def test_a_change_of_unit_scales_metres_and_leaves_pure_numbers(seed: int, factor: float):
    truth, estimate, covariance = sessions(seed)
    before = evaluate_positions(truth, estimate, covariance)
    after = evaluate_positions(factor * truth, factor * estimate, factor**2 * covariance)
    for key in before:
        if key.endswith('_m'):
            np.testing.assert_allclose(after[key], factor * before[key], rtol=1e-6)
    np.testing.assert_allclose(after['nees'], before['nees'], rtol=1e-6)
    np.testing.assert_allclose(after['nll'], before['nll'] + 2 * np.log(factor), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(after['ellipse90_km2'], factor**2 * before['ellipse90_km2'], rtol=1e-6)
    assert after['coverage'] == before['coverage']


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_larger_ellipses_hold_more(seed: int):
    truth, estimate, covariance = sessions(seed)
    counts = list(coverage_counts(truth, estimate, covariance).values())
    wider = list(coverage_counts(truth, estimate, 2 * covariance).values())
    assert counts == sorted(counts) and all(second >= first for first, second in zip(counts, wider, strict=True))


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_the_energy_score_lies_between_zero_and_the_distance_plus_spread(seed: int):
    truth, estimate, covariance = sessions(seed)
    distance = np.hypot(*(truth - estimate).T)
    score = energy_score(truth, estimate, covariance)
    assert np.all(score > 0) and np.all(score <= distance + np.sqrt(np.trace(covariance, axis1=1, axis2=2)))
    sharp = energy_score(truth, estimate, 1e-12 * covariance)
    np.testing.assert_allclose(sharp, distance, rtol=1e-3, atol=2e-3)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_the_variance_scale_is_the_most_likely_one(seed: int):
    truth, estimate, covariance = sessions(seed)
    scale = variance_scale(truth, estimate, covariance)
    best = gaussian_nll(truth, estimate, scale * covariance).mean()
    for factor in (0.8, 1.25):
        assert gaussian_nll(truth, estimate, factor * scale * covariance).mean() > best
    np.testing.assert_allclose(mahalanobis_squared(truth, estimate, scale * covariance).mean(), 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_clopper_pearson_agrees_with_scipy(total: int, share: float, confidence: float):
    count = round(share * total)
    oracle = binomtest(count, total).proportion_ci(confidence, 'exact')
    np.testing.assert_allclose(clopper_pearson(count, total, confidence), (oracle.low, oracle.high), atol=1e-7)


def test_calibrated_errors_are_found_calibrated():
    generator = np.random.default_rng(5)
    factor = generator.normal(0, 60, (5000, 2, 2))
    covariance = factor @ factor.transpose(0, 2, 1) + 100 * np.eye(2)
    truth = generator.uniform(-1000, 1000, (5000, 2))
    estimate = truth + np.einsum('nij,nj->ni', np.linalg.cholesky(covariance), generator.standard_normal((5000, 2)))
    squared = mahalanobis_squared(truth, estimate, covariance)
    assert abs(squared.mean() - 2) < 4 * 2 / np.sqrt(5000)
    for key, count in coverage_counts(truth, estimate, covariance).items():
        low, high = clopper_pearson(count, 5000, 0.999)
        assert low <= COVERAGE_LEVELS[key] <= high
        assert count == np.sum(squared <= chi2.ppf(COVERAGE_LEVELS[key], 2))


def test_the_energy_score_agrees_with_draws():
    truth, estimate, covariance = sessions(11, 200)
    generator = np.random.default_rng(12)
    draws = np.stack([generator.multivariate_normal(*claim, 400) for claim in zip(estimate, covariance, strict=True)])
    oracle = scoringrules.es_ensemble(truth, draws, estimator='fair')
    np.testing.assert_allclose(energy_score(truth, estimate, covariance).mean(), oracle.mean(), rtol=0.03)
