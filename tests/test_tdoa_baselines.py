"""The opponents where time is available: their errors on a fixed data set do not change, whatever happens to the rest of the project."""
import ast
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

import heimdall_train.tdoa_baselines as module
from heimdall_train.geodesy import SPEED_OF_LIGHT, ranges
from heimdall_train.metrics import evaluate_positions
from heimdall_train.network import PIEDMONT, HeimdallError
from heimdall_train.tdoa_baselines import TDOA_BASELINES, expected_path, run_tdoa_baselines, search_area, tdoa_fix

FRAME = PIEDMONT.frame()
RECEIVERS = PIEDMONT.positions_enu(FRAME)
GOLDEN = {  # RMSE and median in metres, settings
    'tdoa': (442.865, 135.237, {'excess_deviation_m': 100.0}),
    'tdoa_kriged': (78.479, 33.628, {'length_m': 2000.0, 'excess_deviation_m': 50.0}),
}


def made_up(count: int, seed: int, faults: float = 0.0, excess_m: float = 200.0, sigma_m: float = 30.0, width: float = 10e3) -> tuple:
    "Delays, SNR, timed and positions; excess paths are fields of exponential marginal that depend on nothing but this function."
    world, generator = np.random.default_rng(7), np.random.default_rng(seed)
    vectors = world.standard_normal((7, 2, 200)) / 2000 / np.sqrt(world.chisquare(3, (7, 1, 200)) / 3)
    phases = world.uniform(0, 2 * np.pi, (7, 200))
    positions = generator.uniform(-width / 2, width / 2, (count, 2))
    field = np.sqrt(2 / 200) * np.cos(np.einsum('ni,riw->nrw', positions, vectors) + phases).sum(axis=2)
    latitude, longitude = FRAME.horizontal_to_geodetic(*positions.T, 300.0)
    path = ranges(FRAME.to_enu(latitude, longitude, 300.0), RECEIVERS) - excess_m * np.log(norm.sf(field))
    snr = generator.uniform(15, 40, path.shape)
    arrival = path + sigma_m * generator.standard_normal(path.shape)
    slipped = generator.choice([-1, 1], count) * np.exp(generator.uniform(np.log(300), np.log(30_000), count))
    arrival[np.arange(count), generator.integers(0, 7, count)] += slipped * (generator.random(count) < faults)
    timed = generator.random(path.shape) < 0.9
    reference = np.where(timed, snr, -np.inf).argmax(axis=1)
    return np.where(timed, arrival - arrival[np.arange(count), reference][:, None], 0) / SPEED_OF_LIGHT, snr, timed, positions


@pytest.fixture(scope='module')
def campaign() -> tuple:
    return made_up(400, 1, 0.03), made_up(100, 2, 0.03), made_up(300, 3)


@pytest.fixture(scope='module')
def results(campaign: tuple) -> dict:
    return run_tdoa_baselines(*campaign, RECEIVERS)


def test_the_opponents_have_not_changed(campaign: tuple, results: dict):
    "Golden figures: a change of the method, for better or worse, is a new baseline with a new name."
    assert list(results) == list(TDOA_BASELINES) == ['tdoa', 'tdoa_kriged']
    scores = {name: evaluate_positions(campaign[2][3], result.positions, result.covariance) for name, result in results.items()}
    assert results['tdoa'].settings == GOLDEN['tdoa'][2] and results['tdoa_kriged'].settings == GOLDEN['tdoa_kriged'][2]
    for name, (rmse, median, _) in GOLDEN.items():
        assert scores[name]['rmse_m'] == pytest.approx(rmse, rel=1e-3)
        assert scores[name]['median_m'] == pytest.approx(median, rel=1e-3)


def test_it_shares_no_code_with_the_model():
    allowed = {'baselines', 'geodesy', 'metrics', 'network'}
    tree = ast.parse(Path(module.__file__).read_text())
    names = {node.module or '' for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert names <= allowed
    others = {node.module.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level and node.module}
    others |= {alias.name.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert others <= {'numpy', 'scipy', 'sklearn', 'threadpoolctl', 'time', 'collections', 'typing'}


def test_known_sources_take_most_of_the_error_away(campaign: tuple, results: dict):
    means = {name: evaluate_positions(campaign[2][3], result.positions)['mean_m'] for name, result in results.items()}
    assert means['tdoa_kriged'] < 0.5 * means['tdoa']


def test_the_same_again_bit_for_bit_without_the_test_positions(campaign: tuple, results: dict):
    training, validation, test = campaign
    for name, result in run_tdoa_baselines(training, validation, (*test[:3], None), RECEIVERS).items():
        np.testing.assert_array_equal(result.positions, results[name].positions)
        np.testing.assert_array_equal(result.covariance, results[name].covariance)


def test_without_excess_paths_the_covariance_is_the_error():
    sessions = made_up(600, 5, excess_m=0.0, sigma_m=0.0)
    noise = np.random.default_rng(6).standard_normal(sessions[0].shape) * np.sqrt(module.range_variance(sessions[1])) / SPEED_OF_LIGHT
    estimate, covariance = tdoa_fix(sessions[0] + noise, *sessions[1:3], RECEIVERS, search_area(sessions[3]), excess_deviation=0.1)
    enough = sessions[2].sum(axis=1) >= 5  # four may agree in a second place
    scores = evaluate_positions(sessions[3][enough], estimate[enough], covariance[enough])
    assert 1.8 < scores['nees'] < 2.3 and 0.87 < scores['coverage']['90'] < 0.93


def test_a_clock_that_slipped_hardly_pulls():
    "Six good receivers and one that is off by 10 km find the source as if the seventh were absent."
    delay, snr, timed, positions = made_up(200, 8, excess_m=0.0, sigma_m=15.0)
    timed, area = np.ones_like(timed), search_area(positions)
    straight = expected_path(positions, RECEIVERS, 300.0)[0] + 15 * np.random.default_rng(9).standard_normal(timed.shape)
    good = (straight - straight[:, :1]) / SPEED_OF_LIGHT
    bad = good + np.where(np.arange(7) == 5, 10e3, 0) / SPEED_OF_LIGHT
    six = tdoa_fix(good, snr, timed & (np.arange(7) != 5), RECEIVERS, area, excess_deviation=20.0)[0]
    seven = tdoa_fix(bad, snr, timed, RECEIVERS, area, excess_deviation=20.0)[0]
    apart = np.hypot(*(six - seven).T)
    assert np.median(apart) < 1 and np.mean(apart < 50) > 0.95


def test_data_that_do_not_fit_are_refused(campaign: tuple):
    training, validation, test = campaign
    with pytest.raises(HeimdallError, match=r'validation: delay \(100, 7\), snr \(100, 6\)'):
        run_tdoa_baselines(training, (validation[0], validation[1][:, :6], *validation[2:]), test, RECEIVERS)
    broken = training[0].copy()
    broken[3, training[2][3].argmax()] = np.nan
    with pytest.raises(HeimdallError, match='training: a position, or a delay that is marked as timed, is not finite'):
        run_tdoa_baselines((broken, *training[1:]), validation, test, RECEIVERS)
    with pytest.raises(HeimdallError, match='receivers'):
        run_tdoa_baselines(training, validation, test, RECEIVERS[:, :2])
    free = np.zeros_like(validation[2])
    assert run_tdoa_baselines(training, (validation[0], validation[1], free, validation[3]), test, RECEIVERS) == {}


def test_few_sources_and_silent_receivers_still_answer(campaign: tuple):
    training, validation, test = campaign
    silent = np.arange(7) != 6
    few = tuple(values[:5] for values in training)
    few = (few[0], few[1], few[2] & silent, few[3])
    for result in run_tdoa_baselines(few, validation, test, RECEIVERS).values():
        assert np.isfinite(result.positions).all() and (np.linalg.eigvalsh(result.covariance) > 0).all()
    nothing = np.zeros_like(test[2])
    for result in run_tdoa_baselines(training, validation, (test[0], test[1], nothing, None), RECEIVERS).values():
        assert np.isfinite(result.positions).all() and (np.sqrt(np.linalg.eigvalsh(result.covariance)) > 1000).all()
