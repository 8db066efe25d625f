"""How long the service takes to answer, and to end a training that is cancelled.

Claim: with 1,000 jobs stored, at 100 GET requests a second (open loop: each is sent at its time, whether or not the one before was answered),
99 % are answered within 100 ms; a running training that is cancelled has ended within 5 seconds.

    python benchmarks/service.py [--seconds 60] [--rate 100] [--jobs 1000] [--cancellations 5] [--out FILE]

One machine: the service as `heimdall-train serve` starts it, jobs in SQLite, who asks in a process of its own on the same machine.
Cancelled trainings are of the scene testbed-v1, at random times in their first 20 seconds. About four minutes on two idle cores. With --out the file
holds what is finished, the answers first and then one cancellation after the other: stopped, the same command does what is missing.
"""
import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np

from heimdall_train.jobs import SqliteJobs, claimed, ended, new_job

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))
from servers import free_ports  # noqa: E402


def store_jobs(place: Path, count: int) -> list[str]:
    """Finished jobs, as a service of some age has them."""
    store = SqliteJobs(place / 'runs' / 'service' / 'jobs.db')
    jobs = [new_job({'scene': 'testbed-v1', 'seed': number}) for number in range(count)]
    for job in jobs:
        store.add(job)
        store.change(job.id, lambda each: claimed(each, 'benchmark', store.now()))
        store.change(job.id, lambda each: ended(each, 'benchmark', 'succeeded', {'validation': {'model': {'mean_m': 100.0}}}))
    return [job.id for job in jobs]


async def ask(base: str, ids: list[str], rate: float, seconds: float, generator: np.random.Generator) -> list[float]:
    """Milliseconds that each answer took from the time at which its request was due."""
    took: list[float] = []

    async def one(client: httpx.AsyncClient, due: float, id: str) -> None:
        answer = await client.get(f'/v1/training/jobs/{id}')
        assert answer.status_code == 200, answer.text
        took.append(1e3 * (time.perf_counter() - due))

    async with httpx.AsyncClient(base_url=base, timeout=30, limits=httpx.Limits(max_connections=50)) as client:
        begun, tasks = time.perf_counter() + 0.1, []
        for number in range(int(rate * seconds)):
            due = begun + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(client, due, str(generator.choice(ids)))))
        await asyncio.gather(*tasks)
    return took


def cancel(client: httpx.Client, after: float) -> float:
    """Seconds from the request to cancel until the job is cancelled and its process gone."""
    where = client.post('/v1/training/jobs', json={'scene': 'testbed-v1', 'epochs': 100}).headers['location']
    while client.get(where).json()['status'] == 'queued':
        time.sleep(0.05)
    time.sleep(after)
    begun = time.perf_counter()
    client.delete(where)
    while client.get(where).json()['status'] == 'running':
        time.sleep(0.02)
    return time.perf_counter() - begun


def write(out: Path | None, summary: dict) -> None:
    """Write what is finished, if it is to be kept."""
    summary |= {'date': datetime.now(UTC).date().isoformat(), 'versions': {name: version(name) for name in ('heimdall-train', 'fastapi', 'uvicorn', 'httpx')}}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(summary, indent=1) + '\n')


def main() -> None:
    """Serve, ask, cancel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--rate', type=float, default=100)
    parser.add_argument('--jobs', type=int, default=1000)
    parser.add_argument('--cancellations', type=int, default=5)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path)
    options = parser.parse_args()
    same = {'benchmark': 'service', 'jobs_stored': options.jobs, 'requests_per_second': options.rate,
            'hardware': f'{platform.machine()}, {os.cpu_count()} cores'}
    summary: dict = json.loads(options.out.read_text()) if options.out and options.out.exists() else {**same, 'seconds_to_cancel': []}
    if different := [name for name in same if summary.get(name) != same[name]]:
        sys.exit(f'{options.out} was measured with another {", ".join(different)}: give another --out')
    ends, port = summary['seconds_to_cancel'], free_ports(1)[0]
    with tempfile.TemporaryDirectory() as folder:
        ids = store_jobs(Path(folder), options.jobs)
        environment = {**os.environ, 'HEIMDALL_SERVICE_REQUESTS_PER_SECOND': '10000', 'HEIMDALL_SERVICE_JOBS_PER_MINUTE': '1000'}
        command = [sys.executable, '-c', 'from heimdall_train.cli import main; main()', 'serve', '--port', str(port)]
        service = subprocess.Popen(command, cwd=folder, env=environment)
        try:
            with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=30) as client:
                while True:
                    try:
                        client.get('/ready').raise_for_status()
                        break
                    except httpx.HTTPError:
                        time.sleep(0.2)
                if 'milliseconds' not in summary:
                    took = asyncio.run(ask(str(client.base_url), ids, options.rate, options.seconds, np.random.default_rng(options.seed)))
                    summary |= {'requests': len(took), 'milliseconds': {
                        name: round(float(np.percentile(took, level)), 2) for name, level in (('p50', 50), ('p90', 90), ('p99', 99), ('max', 100))}}
                    write(options.out, summary)
                for after in np.random.default_rng(options.seed).uniform(0, 20, options.cancellations)[len(ends):]:
                    ends.append(round(cancel(client, after), 2))
                    write(options.out, summary)
        finally:
            service.terminate()
            service.wait()
    print(json.dumps(summary, indent=1))
    sys.exit(0 if summary['milliseconds']['p99'] < 100 and max(ends, default=0) < 5 else 1)


if __name__ == '__main__':
    main()
