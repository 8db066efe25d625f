"""The baselines on made-up levels, and on the measured test bed with the errors that they should have."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from heimdall_train.baselines import BASELINES, LevelsKriged, LogDistance, UnsupportedBaseline, fit_path_loss, run_baselines
from heimdall_train.geodesy import Frame
from heimdall_train.metrics import evaluate_positions
from heimdall_train.network import HeimdallError


def made_up(count: int, seed: int, receivers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Levels of a path-loss law with 3 dB of noise, weak ones unheard; positions over 1 km."
    generator = np.random.default_rng(seed)
    positions = generator.uniform(-500, 500, (count, 2))
    distance = np.hypot(*(positions[:, None] - receivers).transpose(2, 0, 1))
    levels = np.linspace(-4, 4, len(receivers)) - 26 * np.log10(np.maximum(distance, 10)) + generator.normal(0, 3, distance.shape)
    return np.where(levels < -74, np.nan, levels), positions


@pytest.fixture
def bed():
    receivers = np.random.default_rng(7).uniform(-500, 500, (8, 2))
    return made_up(120, 0, receivers), made_up(40, 1, receivers), made_up(60, 2, receivers), receivers


def test_all_baselines_answer_and_repeat_bit_for_bit(bed):
    train, validation, test, receivers = bed
    first, second = (run_baselines(train, validation, test[0], receivers, seed=3) for _ in range(2))
    assert list(first) == list(BASELINES)
    for name, result in first.items():
        assert result.positions.shape == (60, 2) and np.isfinite(result.positions).all(), name
        np.testing.assert_array_equal(result.positions, second[name].positions)
        scores = evaluate_positions(test[1], result.positions, result.covariance)  # refuses covariances that are not positive definite
        assert scores['mean_m'] < 480, name
        if result.covariance is not None:
            assert scores['coverage']['90'] > 0.7, name


def test_without_receiver_positions_the_geometric_ones_are_absent(bed):
    train, validation, test, receivers = bed
    unknown = np.full_like(receivers, np.nan)
    assert set(run_baselines(train, validation, test[0], unknown)) == set(BASELINES) - {'centroid', 'logdistance'}
    with pytest.raises(UnsupportedBaseline, match='logdistance needs three receivers of known position'):
        LogDistance().fit(*train, unknown, *validation)


@pytest.mark.parametrize('name', BASELINES)
def test_a_receiver_never_heard_is_ignored_and_silence_answered(bed, name: str):
    train, validation, test, receivers = bed
    for levels, _ in (train, validation):
        levels[:, 2] = np.nan
    loud, silent = test[0].copy(), test[0].copy()
    loud[:, 2], silent[:, 2] = -20.0, np.nan
    fitted = BASELINES[name]().fit(*train, receivers, *validation)
    np.testing.assert_array_equal(fitted.predict(loud)[0], fitted.predict(silent)[0])
    positions, covariance = fitted.predict(np.full((2, 8), np.nan))
    assert np.isfinite(positions).all()
    assert covariance is None or np.all(np.linalg.eigvalsh(covariance) > 0)


def test_an_unknown_transmitter_power_costs_little(bed):
    train, validation, test, receivers = bed
    generator = np.random.default_rng(4)
    for levels, _ in (train, validation, test):
        levels += generator.uniform(-15, 15, (len(levels), 1))
    fitted = LogDistance().fit(*train, receivers, *validation)
    assert fitted.settings['power_deviation_db'] > 0
    fixed = evaluate_positions(test[1], fitted._locate(fitted._learnt, test[0], fitted.settings | {'power_deviation_db': 0.0})[0])
    assert evaluate_positions(test[1], fitted.predict(test[0])[0])['mean_m'] < 0.8 * fixed['mean_m']


def test_tables_that_do_not_fit_are_refused(bed):
    train, validation, _, receivers = bed
    with pytest.raises(HeimdallError, match='training: levels'):
        LevelsKriged().fit(train[0], train[1][:5], receivers, *validation)
    with pytest.raises(HeimdallError, match='validation: no sessions'):
        LevelsKriged().fit(*train, receivers, validation[0][:0], validation[1][:0])
    broken = train[1].copy()
    broken[3] = np.nan
    with pytest.raises(HeimdallError, match='training: 1 positions are not finite'):
        LevelsKriged().fit(train[0], broken, receivers, *validation)


@pytest.mark.slow
def test_measured_levels(powder: Path):
    table, places = pd.read_csv(powder / 'levels.csv'), pd.read_csv(powder / 'receivers.csv')
    held_out = set((powder / 'splits' / 'grid_test.txt').read_text().split())
    frame = Frame(table.lat.mean(), table.lon.mean())
    positions, receivers = frame.to_enu(table.lat, table.lon)[:, :2], frame.to_enu(places.lat, places.lon)[:, :2]
    levels, test = table[list(places['name'])].to_numpy(), table.session_id.isin(held_out).to_numpy()
    blocks = np.unique(positions // 200, axis=0, return_inverse=True)[1].ravel()
    order = np.random.default_rng(0).permutation(blocks.max() + 1)
    enough = np.searchsorted(np.bincount(blocks[~test], minlength=len(order))[order].cumsum(), 0.15 * (~test).sum()) + 1
    validation = ~test & np.isin(blocks, order[:enough])
    train = ~test & ~validation
    assert test.sum() == 666 and 500 < validation.sum() < 700

    law = fit_path_loss(levels[train], positions[train], receivers)
    assert 2.3 < law.exponent < 2.9 and 6 < law.deviation < 8  # 2.6 and 6.9 dB are fitted to all rows

    results = run_baselines((levels[train], positions[train]), (levels[validation], positions[validation]), levels[test], receivers)
    means = {name: evaluate_positions(positions[test], result.positions, result.covariance)['mean_m'] for name, result in results.items()}
    assert means['mean'] == pytest.approx(539, abs=3)
    assert means['levels_kriged'] < 155 and means['knn'] < 172 and means['extra_trees'] < 172
    assert means['levels_kriged'] < min(means['knn'], means['extra_trees']) < means['logdistance'] < means['centroid'] < means['mean']
