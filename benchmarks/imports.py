"""Time until something happens: importing the package, and the command line's help, beyond a bare interpreter.

Claim: `import heimdall_train` takes less than 0.3 s and `heimdall-train --help` less than 0.7 s longer than a bare interpreter takes to start and end.

    python benchmarks/imports.py [--repeats 15] [--out FILE]

Wall-clock seconds of whole processes, which take turns, files in the system's cache; expected: 0.00 s and about 0.3 s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from processor import processor

LIMITS = {'import heimdall_train': 0.3, 'heimdall-train --help': 0.7}
PROGRAMS = {
    'bare': [sys.executable, '-c', 'pass'],
    'import heimdall_train': [sys.executable, '-c', 'import heimdall_train'],
    'heimdall-train --help': [str(Path(sys.executable).parent / 'heimdall-train'), '--help'],
}


def seconds(program: list[str]) -> float:
    """Of one process, from start to end."""
    began = time.perf_counter()
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--out', type=Path)
    options = parser.parse_args()
    for program in PROGRAMS.values():
        seconds(program)  # bytecode and files are cached from here on
    taken = {name: [] for name in PROGRAMS}
    for _ in range(options.repeats):
        for name, program in PROGRAMS.items():
            taken[name].append(seconds(program))
    figures = {name: {'median_s': round(statistics.median(values), 4), 'least_s': round(min(values), 4), 'most_s': round(max(values), 4)}
               for name, values in taken.items()}
    beyond = {name: round(figures[name]['median_s'] - figures['bare']['median_s'], 4) for name in LIMITS}
    summary = {
        'benchmark': 'imports', 'repeats': options.repeats, 'seconds': figures, 'beyond_bare_s': beyond, 'limit_s': LIMITS,
        'date': time.strftime('%Y-%m-%d'), 'hardware': f'{processor()}, {os.cpu_count()} cores',
        'versions': {'python': sys.version.split()[0], 'heimdall-train': version('heimdall-train')},
    }
    text = json.dumps(summary, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + '\n')
    if missed := [name for name, limit in LIMITS.items() if beyond[name] >= limit]:
        sys.exit(f'the claim does not hold: {", ".join(missed)}')


if __name__ == '__main__':
    main()
