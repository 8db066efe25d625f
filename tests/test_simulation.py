"""Scenes stay what they are: golden values, and the same sessions whoever makes them."""
import hashlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from heimdall_train.recordings import signal_and_rest, simulate_sessions
from heimdall_train.scene import Scene, load_scene, scene_world
from heimdall_train.simulation import PARTS, session_truth, simulate_levels
from heimdall_train.store import Session

WITH_RADIO = ('demo-v1', 'piedmont-sync-v1', 'piedmont-field-v1', 'piedmont-drive-v1', 'piedmont-free-v1', 'piedmont-wide-v1')


def digest(values: np.ndarray, unit: float = 1e-3) -> str:
    "First half of the sha256 of values in whole units, of maps at every tenth point, so that another processor's rounding does not matter."
    values = values[:, ::10, ::10] if values.ndim == 3 else values
    return hashlib.sha256(np.rint(np.asarray(values, np.float64) / unit).astype('<i8').tobytes()).hexdigest()[:32]


def coarse(scene: Scene) -> Scene:
    "The same physics on maps of 500 m, which are quick to draw."
    return replace(scene, map_pitch_m=500.0)


def same_sessions(one: Session, other: Session) -> bool:
    "Whether two sessions agree to the last bit, samples included."
    return one == other and all(a.iq.tobytes() == b.iq.tobytes() for a, b in zip(one.recordings, other.recordings))


GOLDEN_MAPS = {
    'shadowing': '56a8898b7651ec8acbd7627f0918b51d',
    'excess': 'aa4918bf54f7f29396121267dc95d96e',
    'gains': 'bf88a2a7e74fba28303008f7ec1cf594',
}
GOLDEN_TRUTH = {
    'places': 'ebbced7728e311657a073b7211b93d9f',
    'snr_db': 'e9df091c35a0bcd3c384d15a937cd14d',
    'range_m': '5f823b8549a06da01bd50734e1d4d3b1',
    'excess_m': 'afcb47cac95e70b32b7ae210446fad50',
    'clock_error_s': 'a0cfdb88c921bae4830cecde85a520f1',
}


@pytest.mark.parametrize('name', GOLDEN_MAPS)
def test_the_maps_of_demo_are_golden(name: str):
    assert digest(getattr(scene_world(load_scene('demo-v1')), name)) == GOLDEN_MAPS[name]


@pytest.mark.parametrize('name', GOLDEN_TRUTH)
def test_the_test_sessions_of_demo_are_golden(name: str):
    unit = 1e-12 if name.endswith('_s') else 1e-3
    assert digest(getattr(session_truth(load_scene('demo-v1'), 'test'), name), unit) == GOLDEN_TRUTH[name]


def test_field_effects_on_coarse_maps_are_golden():
    scene = coarse(load_scene('piedmont-drive-v1'))
    world, truth = scene_world(scene), session_truth(scene, 'train', 0, range(700, 900))
    figures = {'fading': digest(world.fading), 'road': digest(world.road), 'repeaters': digest(world.repeaters), 'snr': digest(truth.snr_db)}
    assert figures == {
        'fading': '63479d9c9c042344ae36d337f1b8f8a9',
        'road': '2b97b8209394770fafe5f3c49145da2e',
        'repeaters': '6e6d5ef5b9d0d3f539dcb6440a55fcd5',
        'snr': '4b6e25ab0b319188f10d451034a3b5a5',
    }


@pytest.mark.parametrize('name', WITH_RADIO)
def test_maps_have_the_size_that_the_scene_asks_for(name: str):
    scene = coarse(load_scene(name))
    side = scene_world(scene).shadowing.shape[1] * scene.map_pitch_m
    assert side >= 2 * max(scene.zone.width_m, scene.zone.height_m) + 40_000


def test_scenes_that_differ_in_one_effect_share_everything_else():
    clean, field, free = (coarse(load_scene(f'piedmont-{name}-v1')) for name in ('sync', 'field', 'free'))
    for other in (field, free):
        assert np.array_equal(scene_world(clean).shadowing, scene_world(other).shadowing)
        assert np.array_equal(scene_world(clean).excess, scene_world(other).excess)
    without = replace(field, fading=None, interference=None, clock_faults=None, name=clean.name)
    assert without == clean
    one, other = session_truth(clean, 'test', numbers=range(50)), session_truth(free, 'test', numbers=range(50))
    assert np.array_equal(one.snr_db, other.snr_db) and other.clock_error_s.std() > 1000 * one.clock_error_s.std()


def test_a_sibling_scene_is_another_world_with_the_same_physics():
    scene, sibling = coarse(load_scene('demo-v1')), coarse(load_scene('demo-v1', scene_seed=7))
    assert not np.allclose(scene_world(scene).gains, scene_world(sibling).gains)
    assert abs(scene_world(sibling).shadowing.std() - 6.9) < 0.5
    other_tests = replace(scene, test_seed=2)
    assert scene_world(other_tests) is scene_world(scene)
    assert not np.allclose(session_truth(scene, 'test').places, session_truth(other_tests, 'test').places)
    assert np.array_equal(session_truth(scene, 'train').places, session_truth(other_tests, 'train').places)


FIELD = coarse(load_scene('piedmont-field-v1'))
SESSIONS = 24


@pytest.fixture(scope='module')
def sessions() -> list[Session]:
    return list(simulate_sessions(FIELD, 'train', 3, range(SESSIONS)))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, SESSIONS - 1), max_size=6))
def test_a_subset_of_sessions_is_what_it_is_among_all(sessions: list[Session], numbers: list[int]):
    made = list(simulate_sessions(FIELD, 'train', 3, numbers))
    assert len(made) == len(numbers) and all(same_sessions(one, sessions[number]) for one, number in zip(made, numbers))


def make(numbers: list[int]) -> list[Session]:
    "What one worker does."
    return list(simulate_sessions(FIELD, 'train', 3, numbers))


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(sessions: list[Session]):
    with ProcessPoolExecutor(2, mp_context=get_context('spawn')) as pool:
        halves = list(pool.map(make, [list(range(0, SESSIONS, 2)), list(range(1, SESSIONS, 2))]))
    for number, session in enumerate(sessions):
        assert same_sessions(halves[number % 2][number // 2], session)


def test_recordings_agree_with_the_truth(sessions: list[Session]):
    truth, names = session_truth(FIELD, 'train', 3, range(SESSIONS)), scene_world(FIELD).network.names
    for row, session in enumerate(sessions):
        assert [recording.receiver for recording in session.recordings] == [names[index] for index in np.flatnonzero(truth.heard[row])]
        assert [recording.snr_db for recording in session.recordings] == list(truth.snr_db[row, truth.heard[row]])
        assert session.id == f'train-{row:05d}' and session.source is not None
        assert (session.source.latitude, session.source.longitude, session.source.height) == (truth.latitude[row], truth.longitude[row], 300.0)
        for recording in session.recordings:
            assert recording.level_db is None and recording.iq.dtype == np.complex64 and recording.iq.shape == (12_500,) and np.isfinite(recording.iq).all()


def test_interference_has_the_stated_power_over_the_noise():
    noisy = replace(FIELD, interference=replace(FIELD.interference, share=1.0))
    truth = session_truth(noisy, 'train', numbers=range(40))
    excess = []
    for row in range(40):
        _, rest = signal_and_rest(noisy, truth, row, np.random.default_rng(row))
        _, alone = signal_and_rest(noisy, replace(truth, interference_share=0 * truth.interference_share), row, np.random.default_rng(row))
        heard = truth.heard[row]
        added = np.mean(np.abs(rest - alone) ** 2, axis=1) / 10 ** (noisy.radio.noise_floor_db / 10)
        excess += list(10 * np.log10(added / truth.interference_share[row, heard]) - truth.interference_db[row, heard])
    assert abs(np.mean(excess)) < 0.15 and np.std(excess) < 1.0  # impulses are few: their power scatters


def test_noise_is_white_circular_and_independent():
    scene = coarse(load_scene('demo-v1'))
    truth = session_truth(scene, 'train', numbers=[0])
    _, rest = signal_and_rest(scene, truth, 0, np.random.default_rng(0))
    unit = rest / 10 ** (scene.radio.noise_floor_db / 20) * np.sqrt(2)
    assert kstest(unit.real.ravel(), 'norm').pvalue > 0.01 and kstest(unit.imag.ravel(), 'norm').pvalue > 0.01
    covariance = unit @ unit.conj().T / unit.shape[1] / 2
    assert np.abs(covariance - np.eye(len(unit))).max() < 0.05
    assert np.abs((unit**2).mean(axis=1)).max() < 0.06  # circular
    assert np.abs((unit[:, 1:] * unit[:, :-1].conj()).mean(axis=1)).max() < 0.06  # white


@pytest.mark.parametrize('part', PARTS)
def test_levels_of_a_scene_with_a_radio_are_those_of_its_recordings(part: str):
    scene = replace(coarse(load_scene('piedmont-sync-v1')), sources=dict.fromkeys(PARTS, 12))
    for levels, recorded in zip(simulate_levels(scene, part), simulate_sessions(scene, part), strict=True):
        assert (levels.id, levels.source, levels.started_at) == (recorded.id, recorded.source, recorded.started_at)
        for stated, recording in zip(levels.recordings, recorded.recordings, strict=True):
            assert abs(10 * np.log10(np.mean(np.abs(recording.iq) ** 2)) - stated.level_db) < 0.3


def test_distances_come_from_geodesy_and_the_earth_is_round():
    scene = coarse(load_scene('piedmont-wide-v1'))
    truth, network = session_truth(scene, 'test', numbers=range(200)), scene_world(scene).network
    pyproj = pytest.importorskip('pyproj')
    to_ecef = pyproj.Transformer.from_crs('EPSG:4979', 'EPSG:4978')
    sources = np.stack(to_ecef.transform(truth.latitude, truth.longitude, np.full(200, 300.0)), axis=1)
    receivers = np.stack(to_ecef.transform(*zip(*[(one.latitude, one.longitude, one.altitude) for one in network.receivers])), axis=1)
    np.testing.assert_allclose(truth.range_m, np.linalg.norm(sources[:, None] - receivers, axis=2), atol=1e-5)
    half = np.array([75_000, 63_000])
    assert (np.abs(truth.places) <= half).all() and (np.abs(truth.places).max(axis=0) > 0.95 * half).all()
