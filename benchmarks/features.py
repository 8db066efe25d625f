"""Features from IQ: sessions a second and core, beside the same features made with librosa, scipy.signal and torchaudio.

Claim: at 7 receivers, 1 s at 12.5 kHz, `FeatureExtractor` does at least 100 sessions a second on one core, and more than any of the three, with
the same log-mel levels (within 0.05 dB) and delays (within 0.2 µs in the median).

    python benchmarks/features.py [--sessions 32] [--repeats 7] [--batch 2] [--out FILE]

Every candidate computes level, log-mel on both sides of the carrier, coherence, delay and frequency offset; ours adds the SNR and weights the
correlation by it, the others do not. The three share the algorithm and differ in the library that does most of the work:

- librosa: `librosa.stft`, `librosa.filters.mel`; the search by numpy, as a user would write it, the fraction by `scipy.signal.czt`;
- scipy: `scipy.signal.stft`, the rest the same;
- torchaudio: `torchaudio.functional.spectrogram` and `melscale_fbanks`, all receivers of a session at once, the rest in torch.

One thread. Time is the process's CPU time; candidates take turns within each repeat, and the median and the range over the repeats are given.
librosa is left out where it is not installed.
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.signal
import torch
import torchaudio
from processor import processor
from threadpoolctl import threadpool_limits

from heimdall_train.iq_features import MAX_DELAY, FeatureExtractor, frame_layout

RATE, SAMPLES, RECEIVERS = 12_500.0, 12_500, 7
FFT, HOP, FIRST = frame_layout(RATE, SAMPLES)
LARGEST = int(np.ceil(MAX_DELAY * RATE))
BANK = torchaudio.functional.melscale_fbanks(FFT // 2 + 1, 0.0, RATE / 2, 64, int(RATE)).numpy()
LONG = scipy.fft.next_fast_len(SAMPLES + 64)
SUB_SAMPLE = np.arange(-80, 81) / 64


def main() -> None:
    """Time all candidates on the same sessions and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sessions', type=int, default=32)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--out', type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    iq, truth = sessions(options.sessions)
    candidates = {'heimdall_train': ours(options.batch), 'scipy': with_scipy, 'torchaudio': with_torchaudio}
    try:
        version('librosa')
        candidates['librosa'] = with_librosa()
    except (PackageNotFoundError, ImportError):
        print('librosa is not installed: left out')
    results = {name: candidate(iq) for name, candidate in candidates.items()}  # also warms up
    seconds = {name: [] for name in candidates}
    for _ in range(options.repeats):
        for name, candidate in candidates.items():
            begin = time.process_time()
            candidate(iq)
            seconds[name].append(time.process_time() - begin)
    rates = {name: sorted(options.sessions / value for value in values) for name, values in seconds.items()}
    own = statistics.median(rates['heimdall_train'])
    summary = {
        'claim': 'at least 100 sessions/s a core, faster than the others',
        'date': time.strftime('%Y-%m-%d'),
        'hardware': {'cpu': processor(), 'cores': os.cpu_count(), 'load': os.getloadavg()[0], 'threads': 1},
        'versions': {'python': platform.python_version(), **{name: version(name) for name in ('numpy', 'scipy', 'torch', 'torchaudio')}},
        'setup': {'receivers': RECEIVERS, 'samples': SAMPLES, 'rate': RATE, 'sessions': options.sessions, 'repeats': options.repeats, 'batch': options.batch},
        'candidates': {
            name: {
                'sessions_per_second': round(statistics.median(values), 1),
                'range': [round(values[0], 1), round(values[-1], 1)],
                'speedup_of_ours': round(own / statistics.median(values), 2),
                'delay_rms_ns': round(1e9 * float(np.sqrt(np.mean((results[name][1] - truth) ** 2)))),
                'mel_difference_db': round(float(np.abs(results[name][0] - results['heimdall_train'][0]).max()), 4),
                'delay_difference_ns': round(1e9 * float(np.median(np.abs(results[name][1] - results['heimdall_train'][1])))),
            }
            for name, values in rates.items()
        },
    }
    if 'librosa' in candidates:
        summary['versions']['librosa'] = version('librosa')
    others = [entry for name, entry in summary['candidates'].items() if name != 'heimdall_train']
    summary['met'] = own >= 100 and all(entry['speedup_of_ours'] > 1 for entry in others)
    print(markdown(summary))
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + '\n')
    assert all(entry['mel_difference_db'] < 0.05 and entry['delay_difference_ns'] < 200 for entry in others), 'the candidates disagree'


def sessions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """IQ of sessions, float32 of shape (N, R, 2, T), the first receiver the strongest, and true delays in seconds."""
    generator = np.random.default_rng(0)
    frequency, both = np.fft.rfftfreq(2 * SAMPLES, 1 / RATE), np.fft.fftfreq(2 * SAMPLES, 1 / RATE)
    band = (frequency >= 300) & (frequency <= 3000)
    iq = np.empty((count, RECEIVERS, 2, SAMPLES), dtype=np.float32)
    delays = np.concatenate([np.zeros((count, 1)), generator.uniform(-3e-4, 3e-4, (count, RECEIVERS - 1))], axis=1)
    for n in range(count):
        audio = np.fft.irfft(np.fft.rfft(generator.standard_normal(2 * SAMPLES)) * band, 2 * SAMPLES)
        spectrum = np.fft.fft(np.exp(2j * np.pi * np.cumsum(audio / audio.std() * 700) / RATE))
        for receiver in range(RECEIVERS):
            shifted = np.fft.ifft(spectrum * np.exp(-2j * np.pi * both * delays[n, receiver]))[SAMPLES // 2 : SAMPLES // 2 + SAMPLES]
            turned = shifted * np.exp(2j * np.pi * generator.normal(0, 0.1) * np.arange(SAMPLES) / RATE)
            noise = 10 ** (-(30 if receiver == 0 else 20) / 20) * np.sqrt(0.5)
            iq[n, receiver] = 1e-2 * (np.stack([turned.real, turned.imag]) + noise * generator.standard_normal((2, SAMPLES)))
    return iq, delays


def ours(batch: int):
    """The package's module on small batches."""
    extractor = FeatureExtractor(RATE, SAMPLES)

    def run(iq):
        mel, delay = [], []
        with torch.inference_mode():
            for part in torch.from_numpy(iq).split(batch):
                zeros = torch.zeros(len(part), RECEIVERS, dtype=torch.float64)
                features = extractor(part, torch.ones(len(part), RECEIVERS), zeros, zeros)
                mel.append(features.maps[:, :RECEIVERS])
                delay.append(features.scalars[:, :, 2] - features.scalars[:, :1, 2])
        return torch.cat(mel).numpy(), torch.cat(delay).numpy()

    return run


def two_sided_mel(lines: np.ndarray) -> np.ndarray:
    """Sums of lines (…, 512, 32) in 128 bands."""
    half = FFT // 2
    below = np.concatenate([lines[..., :1, :], lines[..., : half - 1 : -1, :]], axis=-2)
    return np.concatenate([(BANK.T @ below)[..., ::-1, :], BANK.T @ lines[..., : half + 1, :]], axis=-2)


def by_numpy(values: np.ndarray, spectra: np.ndarray, mel) -> tuple[np.ndarray, np.ndarray]:
    """Features of one session from its spectra (R, 512, 32): log-mel levels and delays; level and coherence are computed as well."""
    np.log10(np.mean(np.abs(values) ** 2, axis=1))
    power = mel(np.abs(spectra) ** 2)
    cross = spectra[1:] * spectra[:1].conj()
    correlations = np.fft.ifft(cross, axis=1)[:, np.r_[0 : LARGEST + 1, -LARGEST:0]]
    surface = np.abs(np.fft.fft(correlations, 128, axis=2))[:, :, np.r_[0:32, -32:0]]
    delays = np.zeros(RECEIVERS)
    for receiver in range(1, RECEIVERS):
        lag, turn = np.unravel_index(surface[receiver - 1].argmax(), surface.shape[1:])
        lag = lag if lag <= LARGEST else lag - 2 * LARGEST - 1
        left, middle, right = surface[receiver - 1][lag, [turn - 1, turn, (turn + 1) % 64]]
        turn = (turn if turn < 32 else turn - 64) + (left - right) / (2 * (left - 2 * middle + right))
        offset = turn * RATE / HOP / 128
        overlap = slice(max(0, -lag), SAMPLES - max(0, lag))
        moved = values[receiver, overlap.start + lag : overlap.stop + lag] * np.exp(-2j * np.pi * offset * np.arange(overlap.start, overlap.stop) / RATE)
        delays[receiver] = (lag + fraction(moved, values[0, overlap])) / RATE
    steer = np.exp(2j * np.pi * np.fft.fftfreq(FFT)[None, :, None] * RATE * delays[1:, None, None])
    steered = mel((cross * steer).real) + 1j * mel((cross * steer).imag)
    coherence = steered / np.sqrt(power[1:] * power[:1])
    coherence *= np.exp(-1j * np.angle(steered.sum((1, 2))))[:, None, None]
    return 10 * np.log10(power), delays


def peak(values: np.ndarray) -> float:
    """Place of the maximum on `SUB_SAMPLE`, by a parabola."""
    at = int(np.clip(values.argmax(), 1, len(values) - 2))
    left, middle, right = values[at - 1 : at + 2]
    return SUB_SAMPLE[at] + (SUB_SAMPLE[1] - SUB_SAMPLE[0]) * (left - right) / (2 * (left - 2 * middle + right))


def fraction(moved: np.ndarray, other: np.ndarray) -> float:
    """Samples by which one recording comes later than the other: the long cross-spectrum, and a chirp-z transform around zero lag."""
    cross = scipy.fft.fftshift(scipy.fft.fft(moved, LONG) * scipy.fft.fft(other, LONG).conj())
    step = np.exp(-2j * np.pi * (SUB_SAMPLE[1] - SUB_SAMPLE[0]) / LONG)
    return peak(np.abs(scipy.signal.czt(cross.conj(), len(SUB_SAMPLE), step, np.exp(2j * np.pi * SUB_SAMPLE[0] / LONG))))


def with_scipy(iq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames by scipy.signal.stft, one session at a time."""
    window = scipy.signal.get_window('hann', FFT)
    scale = np.float32(window.sum() / np.sqrt(FFT * (window**2).sum()))
    results = []
    for session in iq:
        values = session[:, 0] + 1j * session[:, 1]
        spectra = scipy.signal.stft(values[:, FIRST:], RATE, window, FFT, FFT - HOP, return_onesided=False, boundary=None, padded=False)[2]
        results.append(by_numpy(values, spectra[:, :, :32] * scale, two_sided_mel))
    return tuple(np.array(part) for part in zip(*results, strict=True))


def with_librosa():
    """Frames of either component by librosa.stft, put together to a two-sided spectrum."""
    import librosa

    window = scipy.signal.get_window('hann', FFT)
    scale = np.float32(1 / np.sqrt(FFT * (window**2).sum()))
    bank = librosa.filters.mel(sr=RATE, n_fft=FFT, n_mels=64, htk=True, norm=None)
    assert np.allclose(bank, BANK.T, atol=1e-4)

    def run(iq):
        results = []
        for session in iq:
            halves = librosa.stft(session[..., FIRST:], n_fft=FFT, hop_length=HOP, window=window, center=False)[..., :32] * scale
            above, below = halves[:, 0] + 1j * halves[:, 1], (halves[:, 0] - 1j * halves[:, 1]).conj()
            spectra = np.concatenate([above[:, : FFT // 2], below[:, FFT // 2 : 0 : -1]], axis=1)
            results.append(by_numpy(session[:, 0] + 1j * session[:, 1], spectra, two_sided_mel))
        return tuple(np.array(part) for part in zip(*results, strict=True))

    return run


def with_torchaudio(iq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames by torchaudio, all receivers at once; search, fraction and maps in torch with complex numbers."""
    window, bank = torch.hann_window(FFT), torch.from_numpy(BANK).T
    scale = 1 / (FFT * window.square().sum()).sqrt()
    half, lines = FFT // 2, torch.fft.fftfreq(FFT)
    power_of_two = 2 ** int(np.ceil(np.log2(SAMPLES + 64)))
    grid = torch.from_numpy(SUB_SAMPLE).float()
    turns = torch.exp(2j * torch.pi * torch.fft.fftfreq(power_of_two)[:, None] * grid)
    inside = torch.fft.fftfreq(power_of_two).abs() < 0.35  # the signal's band
    turns = turns[inside]

    def mel(values):
        kind = bank.to(values.dtype)
        return torch.cat([(kind @ torch.cat([values[:, :1], values[:, half:].flip(1)], 1)).flip(1), kind @ values[:, : half + 1]], 1)

    results = []
    for session in torch.from_numpy(iq):
        values = torch.complex(session[:, 0], session[:, 1])
        values.abs().square().mean(1).log10()
        spectra = torchaudio.functional.spectrogram(values[:, FIRST:], 0, window, FFT, HOP, FFT, None, False, center=False, onesided=False)
        spectra = spectra[..., :32] * scale
        power = mel(spectra.abs().square())
        cross = spectra[1:] * spectra[:1].conj()
        correlations = torch.fft.ifft(cross, dim=1)
        correlations = torch.cat([correlations[:, : LARGEST + 1], correlations[:, -LARGEST:]], 1)
        surface = torch.fft.fft(correlations, 128, dim=2).abs()
        surface = torch.cat([surface[:, :, :32], surface[:, :, -32:]], 2)
        best = surface.flatten(1).argmax(1)
        lag, turn = best // 64, best % 64
        rows = torch.arange(RECEIVERS - 1)
        left, middle, right = (surface[rows, lag, (turn + step) % 64] for step in (-1, 0, 1))
        offset = (torch.where(turn < 32, turn, turn - 64) + (left - right) / (2 * (left - 2 * middle + right))) * RATE / HOP / 128
        lag = torch.where(lag <= LARGEST, lag, lag - 2 * LARGEST - 1)
        place = torch.arange(SAMPLES) + lag[:, None]
        moved = values[1:].gather(1, place.clamp(0, SAMPLES - 1)) * ((place >= 0) & (place < SAMPLES))
        moved = moved * torch.polar(torch.ones(1), -2 * torch.pi * offset[:, None] * torch.arange(SAMPLES) / RATE)
        long = torch.fft.fft(moved, power_of_two) * torch.fft.fft(values[:1], power_of_two).conj()
        found = (long[:, inside] @ turns).abs().numpy()
        delays = np.concatenate([[0.0], (lag.numpy() + np.array([peak(row) for row in found])) / RATE])
        steer = torch.exp(2j * torch.pi * lines[None, :, None] * torch.from_numpy(RATE * delays[1:]).float()[:, None, None])
        steered = mel(cross * steer)
        coherence = steered / (power[1:] * power[:1]).sqrt()
        coherence *= torch.exp(-1j * steered.sum((1, 2)).angle())[:, None, None]
        results.append((10 * power.log10().numpy(), delays))
    return tuple(np.array(part) for part in zip(*results, strict=True))


def markdown(summary: dict) -> str:
    """The summary as a table."""
    lines = [
        f'{summary["hardware"]}',
        f'{summary["versions"]}',
        f'{summary["setup"]}',
        '',
        '| | sessions/s a core | range | ours is faster by | rms delay error | log-mel, largest difference |',
        '|---|---|---|---|---|---|',
    ]
    for name, entry in summary['candidates'].items():
        lines.append(
            f'| {name} | {entry["sessions_per_second"]} | {entry["range"][0]}–{entry["range"][1]} | {entry["speedup_of_ours"]} | '
            f'{entry["delay_rms_ns"]} ns | {entry["mel_difference_db"]} dB |'
        )
    return '\n'.join([*lines, '', f'claim met: {summary["met"]}'])


if __name__ == '__main__':
    main()
