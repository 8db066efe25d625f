"""What a fix by time differences keeps whatever the sessions are, and who its excess-path maps may learn from."""
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from scipy.special import expit

from heimdall_train.geodesy import SPEED_OF_LIGHT, ranges
from heimdall_train.network import PIEDMONT, HeimdallError
from heimdall_train.tdoa import (
    EARTH_RADIUS,
    EXCLUDED_COST,
    FREEDOM,
    DelayNoise,
    ExcessKriging,
    ExcessMaps,
    ExcessSurvey,
    TdoaAnchor,
    TdoaFix,
    constant_maps,
    cross_fit_tdoa,
    delay_variance,
    fit_excess_maps,
    fit_tdoa_anchor,
)

RECEIVERS = PIEDMONT.positions_enu(PIEDMONT.frame())
ZONE = 15_000.0  # metres from the centre to the sides
seeds = st.integers(0, 2**32 - 1)
KRIGING = ExcessKriging(length=3000.0, deviation=150.0, nugget=1.0)


def detours(places: np.ndarray) -> np.ndarray:
    "A smooth excess path of some 150 m for each receiver, shape (N, R)."
    phases = np.arange(len(RECEIVERS))
    return 150 * (np.sin(places[:, :1] / 2500 + 2 * phases) + np.cos(places[:, 1:] / 2500 + 3 * phases))


def up(places: np.ndarray, height: float = 300.0) -> np.ndarray:
    return np.column_stack([places, height - (places**2).sum(axis=1) / (2 * EARTH_RADIUS)])


def draw(seed: int, count: int = 40, excess: bool = False, quiet: bool = False, half: float = ZONE):
    "Places, delays against the strongest receiver, SNR and what is timed; with `quiet` without noise."
    generator = np.random.default_rng(seed)
    places = generator.uniform(-half, half, (count, 2))
    way = ranges(up(places), RECEIVERS)
    snr = generator.uniform(5, 45, way.shape)
    timed = generator.uniform(size=way.shape) < 0.95
    variance = delay_variance(*tensors(snr, timed.astype(float)), torch.tensor(DelayNoise().thermal), torch.tensor(DelayNoise().clock)).numpy()
    arrival = (way + excess * detours(places)) / SPEED_OF_LIGHT + (not quiet) * generator.standard_normal(way.shape) * np.sqrt(variance)
    reference = np.where(timed, snr, -np.inf).argmax(axis=1)
    delay = np.where(timed, arrival - arrival[np.arange(count), reference][:, None], 0.0)
    return places, delay, snr, timed.astype(np.float32)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def run(anchor: TdoaAnchor, *sessions: np.ndarray) -> TdoaFix:
    with torch.inference_mode():
        return anchor(*tensors(*sessions))


def true_maps() -> ExcessMaps:
    axis = np.arange(-18_000.0, 18_001.0, 250.0)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    mean = detours(grid.reshape(-1, 2)).T.reshape(len(RECEIVERS), len(axis), len(axis))
    return ExcessMaps(np.array([axis[0], axis[0]]), 250.0, mean, np.full_like(mean, 5.0), np.ones(len(RECEIVERS), dtype=bool), KRIGING)


FLAT = TdoaAnchor(RECEIVERS, constant_maps([-ZONE, -ZONE], [ZONE, ZONE], len(RECEIVERS)))
MAPPED = TdoaAnchor(RECEIVERS, true_maps())


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(0, 6), st.sampled_from([FLAT, MAPPED]))
def test_every_reference_gives_the_same_fix(seed: int, reference: int, anchor: TdoaAnchor):
    _, delay, snr, timed = draw(seed, excess=anchor is MAPPED)
    rows = timed[:, reference] > 0
    one = run(anchor, delay[rows], snr[rows], timed[rows])
    other = run(anchor, delay[rows] - delay[rows, reference : reference + 1], snr[rows], timed[rows])
    few = timed[rows].sum(axis=1) < 4  # with three, rounding may decide between two equally good solutions
    np.testing.assert_allclose(other.position[~few], one.position[~few], atol=0.02)
    np.testing.assert_allclose(other.residual[~few], one.residual[~few], atol=0.02)
    np.testing.assert_allclose(other.covariance[~few], one.covariance[~few], rtol=1e-3, atol=1e-2)


@settings(max_examples=10, deadline=None)
@given(seeds, st.permutations(range(7)))
def test_the_order_of_receivers_does_not_matter(seed: int, order: list[int]):
    _, delay, snr, timed = draw(seed, excess=True)
    maps = true_maps()
    turned = TdoaAnchor(RECEIVERS[order], ExcessMaps(maps.origin, maps.pitch, maps.mean[order], maps.deviation[order], maps.known[order], KRIGING))
    enough = timed.sum(axis=1) > 3
    one, other = run(MAPPED, delay, snr, timed), run(turned, delay[:, order], snr[:, order], timed[:, order])
    np.testing.assert_allclose(other.position[enough], one.position[enough], atol=0.02)
    np.testing.assert_allclose(other.weight[enough], one.weight[enough][:, order], rtol=1e-3, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(1, 7))
def test_what_is_not_timed_has_no_influence_and_batches_none_either(seed: int, batch: int):
    _, delay, snr, timed = draw(seed)
    junk = np.random.default_rng(seed).choice([np.nan, np.inf, -1e9, 3.0], delay.shape)
    usual = run(FLAT, delay, snr, timed)
    with_junk = run(FLAT, np.where(timed > 0, delay, junk), np.where(timed > 0, snr, junk), timed)
    for one, other in zip(usual, with_junk, strict=True):
        assert torch.equal(one, other)
    assert (usual.weight[timed == 0] == 0).all() and (usual.residual[timed == 0] == 0).all()
    small = run(FLAT, delay[:batch], snr[:batch], timed[:batch])
    np.testing.assert_allclose(small.position, usual.position[:batch], atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(1e-9, 1.0), st.floats(0, 1))
@example(204, 0.125, 0.5)  # two receivers, all of the posterior in a corner
def test_any_delays_and_any_mask_give_a_finite_fix(seed: int, scale: float, share: float):
    generator = np.random.default_rng(seed)
    delay, snr = generator.normal(0, scale, (20, 7)), generator.uniform(-20, 80, (20, 7))
    timed = (generator.uniform(size=(20, 7)) < share).astype(np.float32)
    fix = run(MAPPED, delay, snr, timed)
    assert all(torch.isfinite(values).all() for values in fix)
    assert (torch.linalg.eigvalsh(fix.covariance) > 0).all()
    assert (fix.position >= MAPPED.grid[0] - 1e-6).all() and (fix.position <= MAPPED.grid[-1] + 1e-6).all()  # metres: rounding
    few = torch.from_numpy(timed.sum(axis=1) < 2)
    assert (fix.covariance[few][:, [0, 1], [0, 1]] > 1e8).all() and (fix.position[few].abs() < 500).all()


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_without_noise_the_fix_is_the_source(seed: int):
    for anchor in (FLAT, MAPPED):
        places, delay, snr, timed = draw(seed, excess=anchor is MAPPED, quiet=True)
        fix, enough = run(anchor, delay, snr, timed), timed.sum(axis=1) >= 5
        error = np.linalg.norm(fix.position.numpy() - places, axis=1)[enough]
        sigma = torch.sqrt(fix.covariance[:, 0, 0] + fix.covariance[:, 1, 1]).numpy()[enough]
        assert (error < (0.05 if anchor is FLAT else 0.2 * sigma + 5)).mean() > 0.95  # maps are bilinear


def mixture(square: np.ndarray) -> np.ndarray:
    "Cost of squared residuals in the likelihood of the fix, its first and its second derivative, as scipy takes a loss."
    cost, slope = (FREEDOM + 1) * np.log1p(square / FREEDOM), (FREEDOM + 1) / (FREEDOM + square)
    sound = expit((EXCLUDED_COST - cost) / 2)
    second = -sound * (1 - sound) / 2 * slope**2 - sound * slope / (FREEDOM + square)
    return np.stack([-2 * np.logaddexp(-cost / 2, -EXCLUDED_COST / 2), sound * slope, second])


def scipy_fix(delay, snr, timed, start) -> np.ndarray:
    used = timed > 0
    noise = torch.tensor(DelayNoise().thermal), torch.tensor(DelayNoise().clock)
    deviation = np.sqrt(delay_variance(*tensors(snr[None, used], timed[None, used]), *noise)[0].numpy() * SPEED_OF_LIGHT**2 + 1.0)

    def residuals(unknown: np.ndarray) -> np.ndarray:
        way = ranges(up(unknown[None, :2])[0], RECEIVERS[used])
        return (SPEED_OF_LIGHT * delay[used] - way - unknown[2]) / deviation

    emission = np.median(residuals(np.array([*start, 0.0])) * deviation)
    return least_squares(residuals, np.array([*start, emission]), loss=mixture, x_scale=[100.0] * 3,
                         xtol=1e-12, ftol=1e-14, gtol=1e-12, max_nfev=2000).x[:2]  # fmt: skip


@settings(max_examples=5, deadline=None)
@given(seeds)
def test_scipy_finds_the_same_fix(seed: int):
    places, delay, snr, timed = draw(seed, 20)
    rows = np.flatnonzero(timed.sum(axis=1) >= 5)
    ours = run(FLAT, delay, snr, timed).position.numpy()
    theirs = np.stack([scipy_fix(delay[row], snr[row], timed[row], ours[row]) for row in rows])
    difference = np.linalg.norm(ours[rows] - theirs, axis=1)
    assert np.median(difference) < 0.001 and (difference < 0.05).mean() >= 0.9  # iterations are fixed: a few need more of them


def test_the_error_is_near_the_bound_and_the_covariance_states_it():
    places, delay, snr, timed = draw(1, 2000)
    fix = run(FLAT, delay, snr, timed)
    with torch.inference_mode():
        bound = FLAT.bound(*tensors(places, snr, timed)).numpy()
    trace, enough = np.trace(bound, axis1=1, axis2=2), timed.sum(axis=1) >= 6
    kept = enough & (trace < np.quantile(trace[enough], 0.99))
    error = fix.position.numpy() - places
    assert 0.9 < np.sqrt((error[kept] ** 2).sum(axis=1).mean() / trace[kept].mean()) < 1.1
    nees = np.einsum('ni,nij,nj->n', error, np.linalg.inv(fix.covariance.numpy()), error)[kept].mean()
    assert 1.8 < nees < 2.2


def test_a_clock_that_has_slipped_hardly_moves_the_fix():
    places, delay, snr, timed = draw(2, 300)
    timed[:] = 1
    arrival = ranges(up(places), RECEIVERS) / SPEED_OF_LIGHT
    delay = arrival - arrival[:, :1]
    slipped = delay.copy()
    slipped[np.arange(300), np.arange(300) % 7] += 30e-6
    moved = torch.linalg.vector_norm(run(FLAT, slipped, snr, timed).position - run(FLAT, delay, snr, timed).position, dim=1)
    assert moved.median() < 5 and (moved > 500).double().mean() < 0.03


def test_the_right_valley_is_found_from_either_start():
    "Over the whole network two valleys explain a session; with the slipped receiver left out from the right one nothing is likelier than the fix."
    half, rows = 5 * ZONE, torch.arange(600)
    generator, (places, delay, snr, timed) = np.random.default_rng(3), draw(3, len(rows), half=half)
    wrong = torch.from_numpy(generator.integers(0, 7, len(rows)))
    delay[rows, wrong] += timed[rows, wrong] * 10 ** generator.uniform(-6, -4, len(rows)) * generator.choice([-1, 1], len(rows))
    anchor = TdoaAnchor(RECEIVERS, constant_maps([-half] * 2, [half] * 2, 7))
    fix, (arrival, strength, clocks, truth) = run(anchor, delay, snr, timed), tensors(delay * SPEED_OF_LIGHT, snr, timed.astype(np.float64), places)
    variance = delay_variance(strength, clocks, *anchor.constants[1:3]) * SPEED_OF_LIGHT**2 + anchor.constants[3] ** 2
    kept = torch.ones_like(clocks)
    kept[rows, wrong] = 0.0

    def best_time(place: torch.Tensor) -> torch.Tensor:
        direct = (arrival - anchor.geometry(place)[0]) * clocks * kept
        return direct.sum(dim=1) / (clocks * kept).sum(dim=1)

    with torch.inference_mode():
        solution = anchor.iterate(arrival, variance, clocks, truth[None], best_time(truth)[None], anchor.leaving_out, kept)
        first = clocks.argmax(dim=1, keepdim=True)
        time = (arrival - anchor.geometry(fix.position)[0] - fix.residual).gather(1, first)[:, 0]
        solutions = (fix.position, time), (solution[0][0], solution[1][0])
        found, there = (anchor.linearise(arrival, variance, clocks, *each).unlikeliness for each in solutions)
    assert (found <= there + 1e-3).all()


def test_maps_learn_the_detours_and_a_gift_of_a_common_offset_changes_nothing():
    places, delay, snr, timed = draw(3, 900, excess=True)
    new, new_delay, new_snr, new_timed = draw(4, 300, excess=True)
    shift = np.random.default_rng(0).normal(0, 1e-4, (900, 1))  # another time of emission, session by session
    errors = []
    for delays in (delay, delay + shift):
        anchor = fit_tdoa_anchor(places, delays, snr, timed, RECEIVERS, kriging=KRIGING)
        errors.append(np.linalg.norm(run(anchor, new_delay, new_snr, new_timed).position.numpy() - new, axis=1))
    unmapped = TdoaAnchor(RECEIVERS, constant_maps([-ZONE, -ZONE], [ZONE, ZONE], 7, deviation=150.0))
    plain = np.linalg.norm(run(unmapped, new_delay, new_snr, new_timed).position.numpy() - new, axis=1)
    assert np.median(errors[0]) < 0.5 * np.median(plain)
    np.testing.assert_allclose(np.median(errors[1]), np.median(errors[0]), rtol=1e-3)


def test_hyper_parameters_follow_the_size_of_the_world():
    places, delay, snr, timed = draw(5, 500, excess=True)
    chosen = fit_excess_maps(ExcessSurvey(places, delay, snr, timed, RECEIVERS)).kriging
    assert 1000 < chosen.length < 15_000 and 80 < chosen.deviation < 300
    nothing = fit_excess_maps(ExcessSurvey(*draw(6, 500), RECEIVERS))
    assert nothing.kriging.deviation < 50 and np.abs(nothing.mean).max() < 60


def test_a_training_source_never_corrects_itself():
    places, delay, snr, timed = draw(7, 60, excess=True)
    folds = np.random.default_rng(0).permutation(np.arange(60) % 2)
    usual = cross_fit_tdoa(places, delay, snr, timed, RECEIVERS, folds, kriging=KRIGING)
    absurd = delay.copy()
    absurd[0, np.flatnonzero(timed[0])[0]] += 3e-7
    for kriging in (KRIGING, None):
        before = usual if kriging else cross_fit_tdoa(places, delay, snr, timed, RECEIVERS, folds)
        after = cross_fit_tdoa(places, absurd, snr, timed, RECEIVERS, folds, kriging=kriging)
        same = [one.maps.shape == other.maps.shape and torch.equal(one.maps, other.maps) for one, other in zip(before, after, strict=True)]
        assert same == [fold == folds[0] for fold in range(2)]


def test_the_same_sessions_give_the_same_maps():
    sessions = draw(8, 60, excess=True)
    one, other = (fit_excess_maps(ExcessSurvey(*sessions, RECEIVERS)) for _ in range(2))
    assert one.kriging == other.kriging and np.array_equal(one.mean, other.mean) and np.array_equal(one.deviation, other.deviation)


def test_receivers_without_position_or_without_sessions_take_no_part():
    places, delay, snr, timed = draw(9, 200, excess=True)
    receivers, rarely = RECEIVERS.copy(), timed.copy()
    receivers[3], rarely[5:, 4] = np.nan, 0
    anchor = fit_tdoa_anchor(places, delay, snr, rarely, receivers, kriging=KRIGING)
    assert anchor.known.tolist() == [1, 1, 1, 0, 0, 1, 1]
    assert all(torch.isfinite(values).all() for values in run(anchor, delay, snr, timed))
    with pytest.raises(HeimdallError, match='three are needed'):
        fit_tdoa_anchor(places[:5], delay[:5], snr[:5], timed[:5], RECEIVERS)


def test_repeated_sessions_of_one_source_are_one_place():
    places, delay, snr, timed = draw(10, 60, excess=True)
    many = [np.repeat(values, 5, axis=0) for values in (places, delay, snr, timed)]
    survey = ExcessSurvey(*many, RECEIVERS)
    assert len(survey.places) == 60
    fit_excess_maps(survey, KRIGING)
