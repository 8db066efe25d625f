"""Ellipses and hyperbolae anywhere on earth, and the files that hold them, by other libraries' readers and coordinates."""
import csv
import io
import json
from datetime import UTC, datetime
from xml.etree import ElementTree

import numpy as np
import pyproj
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from heimdall_train.geodesy import Frame
from heimdall_train.locations import Location, ModelIdentity, RangeDifference, write_locations
from heimdall_train.network import Receiver

TO_ECEF = pyproj.Transformer.from_crs('EPSG:4979', 'EPSG:4978', always_xy=True)
GEOD = pyproj.Geod(ellps='WGS84')
places = st.tuples(st.floats(-70, 70), st.floats(-170, 170))
offsets = st.tuples(st.floats(-60_000, 60_000), st.floats(-60_000, 60_000))  # metres
names = st.text(st.characters(blacklist_categories=('C', 'Z')), min_size=1, max_size=8)


def distance(line: np.ndarray, height: float, receiver: Receiver) -> np.ndarray:
    "Metres in a straight line from points given by longitude and latitude, shape (N, 2)."
    there = np.stack(TO_ECEF.transform(line[:, 0], line[:, 1], np.full(len(line), height)), axis=1)
    return np.linalg.norm(there - np.array(TO_ECEF.transform(receiver.longitude, receiver.latitude, receiver.altitude)), axis=1)


def location(frame: Frame, offset: tuple[float, float], **other) -> Location:
    "An answer somewhere in a frame."
    latitude, longitude = frame.horizontal_to_geodetic(np.array([offset[0]]), np.array([offset[1]]), 300.0)
    values = {'session_id': 's1', 'started_at': datetime(2026, 5, 1, tzinfo=UTC), 'latitude': float(latitude[0]), 'longitude': float(longitude[0]),
              'covariance': np.diag([900.0, 400.0]), 'frame': frame, 'height': 300.0, 'receivers': ('a', 'b', 'c'), 'note': '', 'inputs_sha256': 'ab',
              'model': ModelIdentity('m', None, 'cd')}
    return Location(**{**values, **other})


@settings(max_examples=60, deadline=None)
@given(places, offsets, offsets, offsets, st.floats(0, 3000), st.floats(0, 3000))
def test_a_hyperbola_has_its_difference_and_passes_the_transmitter(origin, first, second, truth, low, high):
    frame = Frame(*origin)
    receivers = []
    for name, offset, altitude in (('first', first, low), ('second', second, high)):
        latitude, longitude = frame.horizontal_to_geodetic(np.array([offset[0]]), np.array([offset[1]]), altitude)
        receivers.append(Receiver(name, float(latitude[0]), float(longitude[0]), altitude))
    here = location(frame, truth)
    place = np.array([[here.longitude, here.latitude]])
    metres = float(distance(place, 300.0, receivers[0])[0] - distance(place, 300.0, receivers[1])[0])
    apart = np.hypot(*np.subtract(first, second))
    assume(apart > max(1000, 3 * abs(low - high)) and abs(metres) < 0.95 * apart)  # the search begins at the hyperbola of receivers on one level
    assume(min(np.hypot(*np.subtract(truth, each)) for each in (first, second)) > 1000)
    (difference, line), = location(frame, truth, differences=(RangeDifference(*receivers, metres),)).hyperbolae()
    assert len(line) > 80 and np.abs(distance(line, 300.0, receivers[0]) - distance(line, 300.0, receivers[1]) - metres).max() < 1
    _, _, away = GEOD.inv(*np.broadcast_arrays(here.longitude, here.latitude, *line.T))
    steps = GEOD.inv(*line[:-1].T, *line[1:].T)[2]
    assert away.min() < 0.6 * steps.max()  # between two points of the line


@settings(max_examples=40, deadline=None)
@given(places, offsets, st.floats(10, 3000), st.floats(0.05, 1), st.floats(0, np.pi), st.sampled_from([0.39, 0.5, 0.9, 0.95]))
def test_an_ellipse_holds_what_it_says(origin, offset, longer, ratio, angle, share):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    covariance = turn @ np.diag([longer**2, (ratio * longer) ** 2]) @ turn.T
    answer = location(frame := Frame(*origin), offset, covariance=covariance)
    outline = answer.ellipse(share, 360)
    generator = np.random.default_rng(0)
    draws = answer.position + generator.multivariate_normal([0, 0], covariance, 4000)
    points = np.stack(frame.horizontal_to_geodetic(draws[:, 0], draws[:, 1], 300.0)[::-1], axis=1)
    assert abs(inside(points, outline).mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000) + 1e-3
    fine = answer.ellipse(share, 2880)  # an eighth of a degree: the ends of the axes are among the corners, to 1e-3 of the shorter one
    azimuths, _, away = GEOD.inv(*np.broadcast_arrays(answer.longitude, answer.latitude, *fine.T))
    axes = answer.axes(share)
    assert abs(away.max() / axes[0] - 1) < 0.01 and abs(away.min() / axes[1] - 1) < 0.01
    if ratio < 0.8:
        assert abs((azimuths[away.argmax()] - axes[2] + 90) % 180 - 90) < 2


def inside(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    "Whether points lie left of each edge of a convex outline that runs counter-clockwise."
    edges = np.diff(outline, axis=0)
    offset = points[:, None] - outline[None, :-1]
    return (edges[:, 0] * offset[..., 1] - edges[:, 1] * offset[..., 0] > 0).all(axis=1)


@settings(max_examples=40, deadline=None)
@given(places, offsets, names, names, names)
def test_files_are_read_by_others(origin, offset, identifier, note, receiver):
    "Whatever the names: quotes, brackets, ampersands, semicolons."
    answers = [location(Frame(*origin), offset, session_id=identifier, note=note, receivers=(receiver,)), location(Frame(*origin), (0.0, 0.0))]
    row = next(csv.DictReader(io.StringIO(write_locations(answers, 'csv').decode(), newline='')))
    assert (row['session_id'], row['note'], row['receivers'], row['model_version']) == (identifier, note, receiver, '')
    assert (float(row['latitude']), float(row['longitude'])) == (answers[0].latitude, answers[0].longitude)
    collection = json.loads(write_locations(answers, 'geojson'))
    assert collection['type'] == 'FeatureCollection' and len(collection['features']) == 6
    assert collection['features'][0]['properties']['note'] == note
    for feature in collection['features']:
        if feature['geometry']['type'] == 'Polygon':
            ring, = feature['geometry']['coordinates']
            assert ring[0] == ring[-1] and all(abs(longitude) <= 180 and abs(latitude) <= 90 for longitude, latitude in ring)
            assert GEOD.polygon_area_perimeter(*np.array(ring).T)[0] > 0  # counter-clockwise
    document = ElementTree.fromstring(write_locations(answers, 'kml'))
    assert document.tag == '{http://www.opengis.net/kml/2.2}kml'
    folder = document.find('.//{*}Folder')
    assert folder is not None and folder.findtext('{*}name') == identifier
    data = {each.get('name'): each.findtext('{*}value') or '' for each in folder.iterfind('.//{*}Data')}
    assert (data['note'], data['receivers']) == (note, receiver)
    longitude, latitude = (float(value) for value in (folder.findtext('.//{*}Point/{*}coordinates') or '').split(','))
    assert abs(longitude - answers[0].longitude) < 1e-7 and abs(latitude - answers[0].latitude) < 1e-7
