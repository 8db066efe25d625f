"""Files of receivers that differ in format, rate and start end on one time axis; files that somebody damaged end in one line."""
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from heimdall_train.catalog import Catalog
from heimdall_train.formats import GPS_AHEAD, GPS_EPOCH, WEEK, Capture, on_axis, read_sigmf, read_wav
from heimdall_train.ingest import parse_level_table
from heimdall_train.ingest_recordings import ingest_recordings, read_iq, read_recordings
from heimdall_train.network import HeimdallError, Network, Receiver
from heimdall_train.object_store import open_store
from heimdall_train.store import as_complex, encode_iq

START = datetime(2025, 10, 22, 16, 30, tzinfo=UTC)
DELAYS = {'roof': 0.0, 'mast': 31.4159e-6, 'hill': 123.456e-6, 'tower': 77.7e-6, 'attic': 5e-6}  # seconds
NETWORK = Network('valley', tuple(Receiver(name, 45.0 + number / 10, 7.5) for number, name in enumerate(DELAYS)))


def voice(time: np.ndarray) -> np.ndarray:
    "What the transmitter sends, at seconds after START: frequency-modulated tones."
    return 0.5 * np.exp(1j * (2 * np.pi * 300 * time + 0.6 * np.sin(2 * np.pi * 700 * time) + 0.4 * np.sin(2 * np.pi * 1100 * time + 1)))


def write_wav(path: Path, rate: float, begin: float, count: int, delay: float, kiwi: bool = True, nominal: int = 12_000, age: int = 1) -> None:
    "16-bit I/Q from begin seconds after START; with a KiwiSDR's stamps where asked for, age seconds after its last GNSS solution."
    body = b'WAVE' + struct.pack('<4sIHHIIHH', b'fmt ', 16, 1, 2, nominal, 4 * nominal, 4, 16)
    week = (START - GPS_EPOCH).total_seconds() + GPS_AHEAD
    for first in range(0, count, 512 if kiwi else count):
        index = np.arange(first, min(first + 512, count) if kiwi else count)
        if kiwi:
            at = begin + first / rate  # after START, whose GPS second is whole
            body += struct.pack('<4sIBBII', b'kiwi', 10, age, 0, int((week + np.floor(at)) % WEEK), round(at % 1 * 1e9) % 10**9)
        samples = (voice(begin + index / rate - delay) * 32_767).astype(np.complex64).view(np.float32).round().astype('<i2').tobytes()
        body += struct.pack('<4sI', b'data', len(samples)) + samples
    path.write_bytes(struct.pack('<4sI', b'RIFF', len(body)) + body)


def write_sigmf(path: Path, rate: float, begin: float, count: int, delay: float, **other: object) -> None:
    "cf32_le from begin seconds after START."
    voice(begin + np.arange(count) / rate - delay).astype(np.complex64).tofile(path.with_suffix('.sigmf-data'))
    second = START + timedelta(seconds=int(np.floor(begin)))
    stamp = f'{second:%Y-%m-%dT%H:%M:%S}.{round(begin % 1 * 1e9):09d}Z'
    meta = {'global': {'core:datatype': 'cf32_le', 'core:sample_rate': rate, 'core:version': '1.2.0', **other},
            'captures': [{'core:sample_start': 0, 'core:datetime': stamp}], 'annotations': []}
    path.write_text(json.dumps(meta))


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    "One transmission in five files: .npy, two SigMF of other rates, a KiwiSDR with a fast clock, a WAV without stamps."
    folder = tmp_path / 'evening'
    folder.mkdir()
    (folder / 'roof.npy').write_bytes(encode_iq(voice(0.25 + np.arange(12_000) / 12_000).astype(np.complex64)))
    write_sigmf(folder / 'mast.sigmf-meta', 25_000.0, 0.1 + 123e-9, 40_000, DELAYS['mast'])
    write_sigmf(folder / 'hill.sigmf-meta', 20_833.25, -0.5, 60_000, DELAYS['hill'])
    write_wav(folder / 'tower.wav', 12_000 * (1 + 90e-6), -1.2345678, 40_000, DELAYS['tower'])
    write_wav(folder / 'attic.wav', 48_000.0, 0.25, 60_000, DELAYS['attic'], kiwi=False, nominal=48_000)
    rows = ['session_id,receiver,started_at,frequency_hz,sample_rate,start_offset,clock_error_s,lat,lon,source,error_m,file,duration_s']
    for name, file, clock in [('roof', 'roof.npy', '0'), ('mast', 'mast.sigmf-meta', '2e-8'), ('hill', 'hill.sigmf-meta', '0'),
                              ('tower', 'tower.wav', ''), ('attic', 'attic.wav', '')]:
        rows.append(f'voice,{name},{START.isoformat()},145.5e6,12000,0.25,{clock},45.04,7.66,car,5,{file},1.0')
    (folder / 'recordings.csv').write_text('\n'.join(rows) + '\n')
    return folder


def test_every_format_ends_on_one_time_axis(campaign: Path, tmp_path: Path):
    catalog, store = Catalog(tmp_path / 'catalog.db'), open_store(tmp_path / 'store')
    report = ingest_recordings(campaign, catalog, store, NETWORK)
    assert (report.sessions, report.recordings, report.rejects) == (1, 5, ())
    session, = catalog.sessions()
    wanted = 0.25 + np.arange(12_000) / 12_000
    for recording in session.recordings:
        assert recording.iq_uri is not None and (recording.sample_rate, recording.start_offset) == (12_000.0, 0.25)
        iq, exact = store.read_recording(recording.iq_uri)[64:], voice(wanted - DELAYS[recording.receiver])[64:]  # attic.wav has nothing before
        assert np.abs(iq - exact).max() < 2e-4, recording.receiver
        # a delay turns the phase by its product with the momentary frequency: what is left of it, in seconds
        phase, frequency = np.angle(iq * exact.conj()), np.gradient(np.unwrap(np.angle(exact)), wanted[64:])
        left = -(phase * frequency).sum() / (frequency**2).sum()
        assert abs(left) < 2e-9, (recording.receiver, left)
    assert [recording.clock_error_s for recording in session.recordings] == [0.0, 2e-8, 0.0, 0.0, None]
    again = ingest_recordings(campaign, catalog, store, NETWORK)
    assert (again.sessions, again.unchanged) == (0, 1)
    _, (looked,), _ = read_recordings(campaign, NETWORK)
    assert [recording.iq is None for recording in looked.recordings] == [True, False, False, False, False]


def test_what_stamps_say_of_the_clock_outweighs_the_manifest(campaign: Path):
    "A delay of the cable in clock_error_s does not make a KiwiSDR without GNSS fixes a clock; a file that says nothing has the manifest's."
    lines = (campaign / 'recordings.csv').read_text().replace('0.25,,', '0.25,5e-8,')
    (campaign / 'recordings.csv').write_text(lines)
    for age, believed in [(1, 5e-8), (255, None)]:
        write_wav(campaign / 'tower.wav', 12_000 * (1 + 90e-6), -1.2345678, 40_000, DELAYS['tower'], age=age)
        _, (session,), rejects = read_recordings(campaign, NETWORK)
        assert not rejects
        assert [recording.clock_error_s for recording in session.recordings] == [0.0, 2e-8, 0.0, believed, 5e-8]


@pytest.mark.parametrize('rate', [12_001.0, 20_833.25, 48_000.0, 250_000.0])
def test_noise_keeps_its_density_and_no_silence_is_added(rate: float):
    "An SNR is held against the noise in the band: what is interpolated must have as much of it in each part as what was recorded."
    noise = np.random.default_rng(0).normal(0, 1, (int(4.1 * rate), 2)) @ [1, 1j] * np.sqrt(rate / 12_000 / 2)  # a power of 1 in 12 kHz
    iq = on_axis(Capture(noise.astype(np.complex64), rate), 0.01, 12_000.0, 48_000, 'x')
    density = (np.abs(np.fft.fftshift(np.fft.fft(iq.reshape(-1, 480), axis=1), axes=1))**2 / 480).mean(axis=0).reshape(24, 20).mean(axis=1)
    assert np.abs(10 * np.log10(density)).max() < 0.5
    with pytest.raises(HeimdallError, match='would pass for silence'):
        on_axis(Capture(noise.astype(np.complex64), 11_900.0), 0.0, 12_000.0, 1000, 'x')


def test_what_does_not_fit_is_set_aside(campaign: Path, tmp_path: Path):
    write_sigmf(campaign / 'hill.sigmf-meta', 20_833.25, 0.5, 60_000, DELAYS['hill'])  # begins too late
    write_wav(campaign / 'tower.wav', 12_000.0, -1.0, 20_000, DELAYS['tower'])  # ends too early
    write_sigmf(campaign / 'mast.sigmf-meta', 25_000.0, 0.1, 40_000, DELAYS['mast'], **{'core:dataset': '../../secret'})
    (campaign / 'recordings.csv').write_text((campaign / 'recordings.csv').read_text().replace('attic.wav,1.0', 'attic.wav,'))
    _, sessions, rejects = read_recordings(campaign, NETWORK)
    assert [recording.receiver for recording in sessions[0].recordings] == ['roof']
    words = {'mast': 'in another folder', 'hill': 'are wanted of it', 'tower': 'are wanted of it', 'attic': 'duration_s is missing'}
    assert {reject.file.partition('.')[0] for reject in rejects} == set(words)
    for reject in rejects:
        assert words[reject.file.partition('.')[0]] in str(reject) and '\n' not in str(reject)


def test_a_file_that_says_it_is_another_receiver_s_or_of_another_frequency(campaign: Path):
    "What SigMF says of place and frequency is held against network and manifest."
    here = next(receiver for receiver in NETWORK.receivers if receiver.name == 'mast')
    for latitude, frequency, words in [(here.latitude + 0.001, 145.501e6, ''), (here.latitude + 0.1, 145.5e6, '11.1 km from mast, it says'),
                                       (here.latitude, 145.6e6, 'of 145.600000 MHz, it says, and frequency_hz of 145.500000 MHz')]:
        point = {'type': 'Point', 'coordinates': [here.longitude, latitude, here.altitude]}
        path = campaign / 'mast.sigmf-meta'
        write_sigmf(path, 25_000.0, 0.1 + 123e-9, 40_000, DELAYS['mast'])
        meta = json.loads(path.read_text())
        meta['captures'][0] |= {'core:geolocation': point, 'core:frequency': frequency}
        path.write_text(json.dumps(meta))
        _, sessions, rejects = read_recordings(campaign, NETWORK)
        assert ('mast' in [recording.receiver for recording in sessions[0].recordings]) == (not words)
        assert all(words in str(reject) for reject in rejects) and len(rejects) == bool(words)


# --- damaged files ---


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    "The same file after an accident: bytes changed, cut out, doubled, or numbers made large."
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(len(damaged)))
        kind = rng.integers(5)
        if kind == 0:
            damaged[place] = int(rng.integers(256))
        elif kind == 1:
            del damaged[place:place + int(rng.integers(1, 40))]
        elif kind == 2:
            damaged[place:place] = damaged[max(0, place - 30):place]
        elif kind == 3:
            damaged[place:place + 4] = rng.choice([b'\xff\xff\xff\xff', b'\0\0\0\0', b'\xff\xff\xff\x7f', b'9999'])
        else:
            del damaged[place:]
        if not damaged:
            return b''
    return bytes(damaged)


def survive(read: Callable[[Path], Capture], path: Path, content: bytes, count: int) -> int:
    "How many of the damaged files could still be read; every other one must end in one line, and none takes memory."
    rng, usable = np.random.default_rng(20251022), 0
    for number in range(count):
        if number == count - 500:  # slow, so for some of them
            tracemalloc.start()
        path.write_bytes(mutated(content, rng))
        try:
            capture = read(path)
            assert capture.iq.dtype == np.complex64 and capture.sample_rate > 0
            usable += 1
        except HeimdallError as error:
            assert '\n' not in str(error) and len(str(error)) < 500
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    return usable


@pytest.mark.fault
def test_damaged_wav_files(tmp_path: Path):
    write_wav(tmp_path / 'x.wav', 12_000.0, 0.0, 1500, 0.0)
    assert survive(lambda path: read_wav(path, START), tmp_path / 'y.wav', (tmp_path / 'x.wav').read_bytes(), 10_000) > 1000


@pytest.mark.fault
def test_damaged_sigmf_files(tmp_path: Path):
    write_sigmf(tmp_path / 'x.sigmf-meta', 12_500.0, 0.0, 1500, 0.0)
    assert survive(read_sigmf, tmp_path / 'x.sigmf-meta', (tmp_path / 'x.sigmf-meta').read_bytes(), 10_000) > 100


MANY = 10_000 if os.environ.get('HEIMDALL_SLOW') == '1' else 1_000


@pytest.mark.fault
def test_damaged_npy_files(tmp_path: Path):
    def read(path: Path) -> Capture:
        return Capture(as_complex(read_iq(path)).astype(np.complex64), 12_500.0)

    assert survive(read, tmp_path / 'x.npy', encode_iq(voice(np.arange(300) / 12_500).astype(np.complex64)), MANY) > MANY // 20


@pytest.mark.fault
def test_damaged_level_tables(tmp_path: Path):
    "Thousands of CSV files: each row a session or a reject with its reason, or one line for the whole table."
    header = ','.join(['session_id', 'started_at', 'lat', 'lon', *NETWORK.names])
    rows = [f's{number},{START.isoformat()},45.{number},7.5,-60.5,-71.25,,-80,-55.125' for number in range(8)]

    def read(path: Path) -> Capture:
        sessions, rejects = parse_level_table(path.read_bytes(), NETWORK, 'table')
        assert sessions or rejects
        assert all(str(reject).isprintable() for reject in rejects)
        return Capture(np.zeros(1, np.complex64), 1.0)

    assert survive(read, tmp_path / 'levels.csv', '\n'.join([header, *rows]).encode(), MANY) > MANY // 10


@pytest.mark.fault
@pytest.mark.parametrize('text', ['[' * 100_000, '{"global": ' * 5000, 'null', '3', '[]', '{}', '{"global": {}}', '{"global": null, "captures": 5}'])
def test_metadata_that_is_none(tmp_path: Path, text: str):
    (tmp_path / 'x.sigmf-meta').write_text(text)
    with pytest.raises(HeimdallError, match='is not SigMF metadata'):
        read_sigmf(tmp_path / 'x.sigmf-meta', 'x.sigmf-meta')


@pytest.mark.fault
def test_files_that_are_too_large(tmp_path: Path):
    for name, read in (('x.wav', read_wav), ('x.sigmf-meta', read_sigmf)):
        with open(tmp_path / name, 'wb') as file:
            file.truncate(2**30 + 1)  # no bytes on the disk
        with pytest.raises(HeimdallError, match='are the most: cut it into transmissions'):
            read(tmp_path / name)
