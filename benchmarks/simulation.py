"""How fast recordings are simulated.

Claim: at least 50 sessions a second on one core (7 receivers, 1 s, 12.5 kHz), with and without the effects of the field; the truth alone, without
samples, at least 2,000 a second.

    python benchmarks/simulation.py [SCENE …] --sessions 300 --repeats 3 --out FILE.json

One process; nothing in it uses threads. The persistent maps are drawn before the clock starts; the time to draw them is reported apart. Times are CPU seconds
of this process, the fastest of the repeats and their spread; the sessions are those of the training part, seed 0.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from processor import processor

from heimdall_train.recordings import simulate_sessions
from heimdall_train.scene import load_scene, scene_world
from heimdall_train.simulation import session_truth

SCENES = ('demo-v1', 'piedmont-sync-v1', 'piedmont-field-v1', 'piedmont-wide-v1')


def main() -> None:
    """Measure each scene, print a line for each, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('scenes', nargs='*', default=SCENES, metavar='SCENE', help=', '.join(SCENES))
    parser.add_argument('--sessions', type=int, default=300)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out', type=Path)
    options = parser.parse_args()
    results = {name: measure(name, options.sessions, options.repeats) for name in options.scenes}
    claim = 'at least 50 sessions/s and 2,000 truths/s on one core'
    summary = {'claim': claim, 'sessions': options.sessions, 'repeats': options.repeats, **environment(), 'scenes': results}
    print(json.dumps(summary, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(summary, indent=1) + '\n')


def measure(name: str, sessions: int, repeats: int) -> dict[str, float]:
    """Rates of one scene."""
    scene = load_scene(name)
    world = seconds(lambda: scene_world(scene))
    iq = [sessions / seconds(lambda: sum(1 for _ in simulate_sessions(scene, 'train', 0, range(sessions)))) for _ in range(repeats)]
    count = min(4000, scene.sources['train'])
    truth = [count / seconds(lambda: session_truth(scene, 'train', 0, range(count))) for _ in range(repeats)]
    return {
        'world_s': round(world, 2),
        'sessions_per_s': round(max(iq), 1),
        'sessions_per_s_slowest': round(min(iq), 1),
        'truths_per_s': round(max(truth)),
        'truths_per_s_slowest': round(min(truth)),
    }


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def environment() -> dict[str, object]:
    """Machine, versions and date."""
    versions = {package: version(package) for package in ('heimdall-train', 'numpy', 'scipy')}
    return {'processor': processor(), 'python': platform.python_version(), 'versions': versions, 'date': datetime.now(UTC).date().isoformat()}


if __name__ == '__main__':
    main()
