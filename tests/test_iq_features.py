"""Features from IQ: the delay estimator against its bound with many trials, properties over drawn sessions, and other libraries' answers."""

import numpy as np
import pytest
import scipy.signal
import torch
import torchaudio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heimdall_train.iq_features import FeatureExtractor, Features, frame_layout
from heimdall_train.network import HeimdallError

RATE, SAMPLES = 12_500.0, 12_500
NAN = float('nan')
EXAMPLES = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope='module')
def extractor() -> FeatureExtractor:
    return FeatureExtractor(RATE, SAMPLES)


def speech_nfm(generator: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Complex envelope of unit power and its instantaneous frequency in Hz."""
    frequency = np.fft.rfftfreq(samples, 1 / RATE)
    band = (frequency >= 300) & (frequency <= 3000)
    audio = np.fft.irfft(np.fft.rfft(generator.standard_normal(samples)) * band * np.sqrt(500 / np.maximum(frequency, 300)), samples)
    envelope = np.fft.irfft(np.fft.rfft(generator.standard_normal(samples)) * (frequency < 4), samples)
    audio = np.fft.irfft(np.fft.rfft(np.tanh(audio * envelope / (audio.std() * envelope.std()))) * band, samples)
    audio *= 2500 / np.abs(audio).max()
    return np.exp(2j * np.pi * np.cumsum(audio) / RATE), audio


def received(generator, snr, delay, offset=0.0, start=0.0, gain=1e-2, source=None) -> tuple[np.ndarray, float]:
    """IQ of R receivers, float32 of shape (R, 2, T), and β in Hz."""
    snr, delay, offset, start = (np.broadcast_to(np.asarray(value, dtype=float), np.shape(snr)) for value in (snr, delay, offset, start))
    margin = SAMPLES // 2
    signal, audio = source or speech_nfm(generator, 2 * SAMPLES)
    spectrum, frequency = np.fft.fft(signal), np.fft.fftfreq(len(signal), 1 / RATE)
    recordings = []
    for late, turn, begin, decibels in zip(delay, offset, start, snr, strict=True):
        shifted = np.fft.ifft(spectrum * np.exp(-2j * np.pi * frequency * (late - begin)))[margin : margin + SAMPLES]
        noise = generator.standard_normal((2, SAMPLES)) * np.sqrt(0.5) * 10 ** (-decibels / 20)
        seconds = begin + np.arange(SAMPLES) / RATE
        recordings.append(shifted * np.exp(2j * np.pi * (turn * seconds + generator.uniform())) + noise[0] + 1j * noise[1])
    values = gain * np.array(recordings)
    return np.stack([values.real, values.imag], axis=1).astype(np.float32), float(audio[margin : margin + SAMPLES].std())


def extract(extractor, iq, heard=None, start=None, clock=None) -> Features:
    """Features of numpy arrays."""
    heard, start, clock = (np.full(iq.shape[:2], value) if array is None else array for array, value in ((heard, 1), (start, 0), (clock, 0)))
    with torch.inference_mode():
        return extractor(torch.from_numpy(iq), torch.tensor(heard).float(), torch.tensor(start).double(), torch.tensor(clock).double())


def bound(first: float, second: float, beta: float) -> float:
    """Standard deviation of the delay in seconds: 1 / (2πβ·sqrt(2BTγ)), γ = s₁s₂ / (1 + s₁ + s₂)."""
    first, second = 10 ** (first / 10), 10 ** (second / 10)
    return 1 / (2 * np.pi * beta * np.sqrt(2 * SAMPLES * first * second / (1 + first + second)))


@pytest.mark.parametrize(('first', 'second'), [(0, 0), (10, 10), (20, 20), (30, 30), (40, 40), (0, 40), (35, 12)])
def test_delay_is_unbiased_and_within_a_fifth_of_its_bound(extractor, first, second):
    generator, errors, ratios = np.random.default_rng(2), [], []
    for _ in range(30):
        source = speech_nfm(generator, 2 * SAMPLES)
        delay, offset = generator.uniform(-3e-4, 3e-4, (10, 2)), generator.uniform(-1.5, 1.5, (10, 2))
        drawn = [received(generator, [first, second], delay[n], offset[n], source=source) for n in range(10)]
        features = extract(extractor, np.stack([iq for iq, _ in drawn]))
        rows, other = np.arange(10), 1 - features.reference.numpy()
        error = features.scalars[rows, other, 2].numpy() - (delay[rows, other] - delay[rows, 1 - other])
        errors.extend(error)
        ratios.extend(error / bound(first, second, drawn[0][1]))
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(len(errors))
    assert np.sqrt(np.mean(np.square(ratios))) < 1.2


def test_without_noise_less_than_two_nanoseconds_remain(extractor):
    generator = np.random.default_rng(4)
    for start in (0.0, generator.uniform(-0.1, 0.1, 6)):
        delay = generator.uniform(-6e-4, 6e-4, 6)
        iq, _ = received(generator, np.full(6, 140.0), delay, generator.uniform(-1.5, 1.5, 6), start)
        features = extract(extractor, iq[None], start=np.broadcast_to(start, 6)[None] + 5.0)
        reference = int(features.reference)
        assert np.abs(features.scalars[0, :, 2].numpy() - (delay - delay[reference])).max() < 2e-9


@EXAMPLES
@given(seed=st.integers(0, 2**32 - 1), common=st.floats(-30, 30), spread=st.floats(0, 0.12), clock=st.floats(0, 0.02))
def test_known_starts_and_clocks_leave_the_delay(extractor, seed, common, spread, clock):
    generator = np.random.default_rng(seed)
    delay, true_start = generator.uniform(-3e-4, 3e-4, 4), generator.uniform(-spread, spread, 4)
    error = generator.uniform(-clock, clock, 4)
    iq, beta = received(generator, np.full(4, 30.0), delay, generator.uniform(-1.5, 1.5, 4), true_start)
    features = extract(extractor, iq[None], start=(common + true_start + error)[None], clock=error[None])
    reference = int(features.reference)
    assert features.timed.all()
    assert np.abs(features.scalars[0, :, 2].numpy() - (delay - delay[reference])).max() < 6 * bound(30, 30, beta)


@EXAMPLES
@given(seed=st.integers(0, 2**32 - 1), mask=st.lists(st.booleans(), min_size=5, max_size=5), junk=st.sampled_from([0.0, NAN, np.inf, -1e30]))
def test_what_was_not_heard_has_no_influence(extractor, seed, mask, junk):
    generator = np.random.default_rng(seed)
    iq, _ = received(generator, generator.uniform(-5, 40, 5), generator.uniform(-3e-4, 3e-4, 5))
    heard = np.array([mask], dtype=float)
    clean, spoilt, times = extract(extractor, iq[None], heard), iq.copy(), np.zeros((1, 5))
    spoilt[~np.array(mask)], times[heard == 0] = junk, junk
    again = extract(extractor, spoilt[None], heard, times, times)
    assert all(torch.equal(one, other) for one, other in zip(clean, again, strict=True))
    assert all(torch.isfinite(value).all() for value in clean)
    silent = heard[0] == 0
    assert not clean.scalars[0, silent].any() and not clean.timed[0, silent].any() and not clean.maps[0, np.tile(silent, 3)].any()


@EXAMPLES
@given(seed=st.integers(0, 2**32 - 1))
def test_receivers_may_come_in_any_order(extractor, seed):
    generator = np.random.default_rng(seed)
    iq, _ = received(generator, np.array([31.0, 20.0, 8.0, 14.0]), generator.uniform(-3e-4, 3e-4, 4), generator.uniform(-1.5, 1.5, 4))
    order = generator.permutation(4)
    straight, permuted = extract(extractor, iq[None]), extract(extractor, iq[order][None])
    assert torch.allclose(straight.scalars[:, order], permuted.scalars, atol=1e-5)
    assert torch.allclose(straight.maps[:, np.concatenate([order, 4 + order, 8 + order])], permuted.maps, atol=2e-3)


@EXAMPLES
@given(seed=st.integers(0, 2**32 - 1), snr=st.floats(5, 30))
def test_swapping_the_reference_negates_the_delay(extractor, seed, snr):
    generator = np.random.default_rng(seed)
    iq, beta = received(generator, [snr, snr], generator.uniform(-3e-4, 3e-4, 2), generator.uniform(-1.5, 1.5, 2))
    delays = []
    for quieter in (0, 1):
        weaker = iq.copy()
        weaker[quieter] += (1e-2 * 10 ** (-snr / 20) * 0.7 * generator.standard_normal(weaker[quieter].shape)).astype(np.float32)
        features = extract(extractor, weaker[None])
        assert int(features.reference) == 1 - quieter
        delays.append(float(features.scalars[0, quieter, 2]))
    assert abs(sum(delays)) < 6 * bound(snr, snr - 3, beta)


def test_gain_moves_levels_and_nothing_else(extractor):
    generator = np.random.default_rng(6)
    iq, _ = received(generator, np.array([20.0, 12.0, 5.0]), [0.0, 1e-4, 2e-4])
    plain, louder = extract(extractor, iq[None]), extract(extractor, 10 * iq[None])
    assert torch.allclose(louder.scalars - plain.scalars, torch.tensor([20.0, 0, 0, 0], dtype=torch.float64), atol=2e-4)
    assert torch.allclose(louder.maps[:, :3] - plain.maps[:, :3], torch.tensor(20.0), atol=1e-3)
    assert torch.allclose(louder.maps[:, 3:], plain.maps[:, 3:], atol=1e-3)


def test_an_undisciplined_or_distant_recording_is_heard_and_not_timed(extractor):
    generator = np.random.default_rng(7)
    iq, _ = received(generator, [20.0, 40.0, 15.0, 15.0], [0.0, 1e-4, 2e-4, 3e-4])
    features = extract(extractor, iq[None], start=[[0.0, 0.0, 0.0, 0.4]], clock=[[0.0, NAN, 0.0, 0.0]])
    assert features.timed.tolist() == [[1, 0, 1, 0]] and features.scalars[0, :, 3].tolist() == [1, 1, 1, 1]
    assert int(features.reference) == 0 and features.scalars[0, [1, 3], 2].tolist() == [0, 0]
    assert abs(float(features.scalars[0, 1, 1]) - 40) < 5 and not features.maps[0, [5, 7, 9, 11]].any()
    alone = extract(extractor, iq[None], clock=np.full((1, 4), NAN))
    assert int(alone.reference) == 1 and not alone.timed.any() and not alone.maps[:, 4:].any()


def test_other_rates_and_lengths():
    for rate, samples in ((12_500.0, 6_250), (12_000.0, 24_000), (48_000.0, 48_000)):
        other = FeatureExtractor(rate, samples)
        noise = torch.randn(1, 3, 2, samples, generator=torch.Generator().manual_seed(0))
        features = other(noise, torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))
        assert features.maps.shape == (1, 9, 128, 32) and torch.isfinite(features.maps).all()
        assert features.scalars[0, :, 1].max() < -8  # nothing but noise
    with pytest.raises(HeimdallError, match='too short'):
        FeatureExtractor(RATE, 900)


def test_log_mel_is_torchaudio_s(extractor):
    fft, hop, first = frame_layout(RATE, SAMPLES)
    iq, _ = received(np.random.default_rng(8), [20.0, 10.0], [0.0, 0.0])
    maps = extract(extractor, iq[None]).maps[0]
    bank = torchaudio.functional.melscale_fbanks(fft // 2 + 1, 0.0, RATE / 2, 64, int(RATE)).double()
    values = torch.complex(*torch.from_numpy(iq[0]).double())[first:]
    window = torch.hann_window(fft).double()
    spectra = torch.stft(values, fft, hop, window=window, center=False, onesided=False, return_complex=True)[:, :32]
    power = spectra.abs().square() / (fft * window.square().sum())
    above = 10 * torch.log10(bank.T @ power[: fft // 2 + 1])
    below = 10 * torch.log10(bank.T @ torch.cat([power[:1], power[fft // 2 :].flip(0)]))  # from the carrier outwards
    assert torch.allclose(maps[0, 64:].double(), above, atol=2e-2)
    assert torch.allclose(maps[0, :64].double().flip(0), below, atol=2e-2)


def test_log_mel_is_librosa_s(extractor):
    librosa = pytest.importorskip('librosa')
    fft, hop, first = frame_layout(RATE, SAMPLES)
    iq, _ = received(np.random.default_rng(9), [25.0, 10.0], [0.0, 0.0])
    maps = extract(extractor, iq[None]).maps[0, 0].numpy()
    in_phase, quadrature = (librosa.stft(part[first:], n_fft=fft, hop_length=hop, window='hann', center=False)[:, :32] for part in iq[0])
    scale = fft * (scipy.signal.get_window('hann', fft) ** 2).sum()
    for half, found in ((in_phase + 1j * quadrature, maps[64:]), (in_phase.conj() + 1j * quadrature.conj(), maps[63::-1])):
        mel = librosa.feature.melspectrogram(S=np.abs(half) ** 2 / scale, sr=RATE, n_mels=64, htk=True, norm=None)
        assert np.abs(found - 10 * np.log10(mel)).max() < 0.02


def test_delay_and_coherence_are_scipy_s(extractor):
    generator = np.random.default_rng(10)
    delay = np.array([0.0, 2.4e-4])
    iq, _ = received(generator, [33.0, 30.0], delay)
    features = extract(extractor, iq[None])
    one, other = (iq[row, 0] + 1j * iq[row, 1] for row in (1, 0))
    correlation = np.abs(scipy.signal.correlate(one, other, method='fft'))
    lag = scipy.signal.correlation_lags(SAMPLES, SAMPLES)[correlation.argmax()]
    assert abs(float(features.scalars[0, 1, 2]) * RATE - lag) < 0.6
    frequency, cross = scipy.signal.csd(other, one, RATE, nperseg=512, return_onesided=False)
    _, squared = scipy.signal.coherence(other, one, RATE, nperseg=512)
    strong = squared > 0.95
    slope = np.angle(cross[strong] * np.exp(2j * np.pi * frequency[strong] * float(features.scalars[0, 1, 2])))
    assert np.abs(np.angle(np.exp(1j * (slope - slope[0])))).max() < 0.3  # flat once the delay is taken out
    steered = torch.complex(features.maps[0, 3], features.maps[0, 5])
    assert steered[40:90].mean().real > 0.9 and abs(steered[40:90].mean().imag) < 0.05


def test_one_path_more_than_the_search_covers_gives_no_crash(extractor):
    iq, _ = received(np.random.default_rng(11), [30.0, 30.0], [0.0, 5e-3], [0.0, 30.0])
    features = extract(extractor, iq[None])
    assert abs(float(features.scalars[0, :, 2].abs().max())) < 1.5e-3 and torch.isfinite(features.maps).all()
