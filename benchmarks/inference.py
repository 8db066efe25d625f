"""Inference: how long a fix takes from samples, and from maps, beside the ResNet-18 alone; what int8 gains; loading and memory.

Claim, with 7 receivers, 1 s at 12.5 kHz, on one core: samples to fix (delay search, anchor, network, calibration) takes at most 2.5 times the
exported ResNet-18 alone with the same stem and channels; the 99th percentile stays below 100 ms; maps to fix is at least 1.8 times as fast with int8.

    python benchmarks/inference.py RUN [--repeats 200] [--sessions 32] [--out FILE]

RUN is the run folder of a model of recordings after `export` (`make demo` leaves one in runs/demo). Its test sessions are what is located.

Candidates: PyTorch eager, ONNX Runtime with the bundle's graph (weights stored as fp16, computed in fp32), ONNX Runtime with the same graph and int8 in
the convolutions; each from samples (`iq`) and from measured maps (`maps`), and the ResNet-18 alone (`resnet`), exported in the same way. All are timed in
one process for each number of threads, taking turns within each repeat, so that a slow minute hits all alike. Wall time a call. The latency at a batch of
one is given as median and 99th percentile over all repeats, the throughput at the batch of --sessions as median and range of a tenth of the repeats. Load
time and peak memory are those of a fresh process that loads the graph and locates one session, without torch.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from processor import processor

NAMES = {'resnet': 'ResNet-18 alone', 'maps': 'maps → fix', 'iq': 'IQ → fix'}


def main() -> None:
    """Time all candidates on the sessions of a run and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path)
    parser.add_argument('--repeats', type=int, default=200)
    parser.add_argument('--sessions', type=int, default=32)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--part', nargs=2, help=argparse.SUPPRESS)  # what a child process does: its task and folder
    options = parser.parse_args()
    if options.part:
        task, folder = options.part
        print(json.dumps(loaded(Path(folder), task) if task not in ('1', '2') else timed(Path(folder), options, int(task))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        described = prepare(options.run, folder, options.sessions)
        results = {threads: child(options, str(threads), folder) for threads in (1, 2)}
        loads = {graph: child(options, graph, folder) for graph in ('resnet', 'resnet-int8', 'maps', 'maps-int8', 'iq', 'iq-int8')}
    one = results[1]
    ratio = one['iq']['onnx']['p50_ms'] / one['resnet']['onnx']['p50_ms']
    gain = one['maps']['onnx']['p50_ms'] / one['maps']['int8']['p50_ms']
    summary = {
        'claim': 'IQ → fix p50 at most 2.5 x ResNet-18 alone; p99 < 100 ms; int8 at least 1.8 x faster for maps → fix; one core',
        'date': time.strftime('%Y-%m-%d'),
        'hardware': {'cpu': processor(), 'flags': flags(), 'cores': os.cpu_count(), 'load': os.getloadavg()[0]},
        'versions': {'python': platform.python_version(), **{name: version(name) for name in ('torch', 'onnx', 'onnxruntime', 'numpy')}},
        'setup': {**described, 'repeats': options.repeats, 'batch': options.sessions, 'seeds': [0]},
        'threads': results,
        'loading': loads,
        'iq_of_resnet': round(ratio, 2),
        'int8_gain': round(gain, 2),
        'met': {'iq_of_resnet': ratio <= 2.5, 'p99': one['iq']['onnx']['p99_ms'] < 100, 'int8': gain >= 1.8},
    }
    print(markdown(summary))
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + '\n')


def child(options: argparse.Namespace, task: str, folder: Path) -> dict:
    """What a fresh process finds."""
    command = [sys.executable, __file__, str(options.run), '--repeats', str(options.repeats), '--sessions', str(options.sessions), '--part', task, str(folder)]
    threads = task if task in ('1', '2') else '1'
    environment = {**os.environ, 'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def modules(run: Path) -> dict:
    """The three modules that are timed, in evaluation mode, with the names of their inputs and outputs."""
    import torch
    from torch import nn

    from heimdall_train.export import OUTPUTS, hand_over
    from heimdall_train.model_files import load_model

    model = load_model(run / 'model.safetensors')

    class FromMaps(nn.Module):
        """Measured maps and scalars to a fix."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, maps, scalars, timed):
            return self.model(maps, scalars, timed)

    class Alone(nn.Module):
        """The backbone, with nothing before and after it."""

        def __init__(self):
            super().__init__()
            self.backbone = model.backbone

        def forward(self, maps):
            return self.backbone(maps)

    torch.set_grad_enabled(False)
    return {
        'iq': (hand_over(model), ('iq', 'heard', 'start_offset', 'clock_error'), (*OUTPUTS, 'late', 'late_sigma')),
        'maps': (FromMaps().eval(), ('maps', 'scalars', 'timed'), ('position_enu', 'covariance')),
        'resnet': (Alone().eval(), ('maps',), ('features',)),
    }


def prepare(run: Path, folder: Path, count: int) -> dict:
    """Write the graphs, their int8 versions and the inputs into a folder; what there is to say of them."""
    import torch

    from heimdall_train.config import make_config
    from heimdall_train.data import graph_inputs, read_data
    from heimdall_train.dataset import Split
    from heimdall_train.export import to_onnx
    from heimdall_train.pipeline import _of_run
    from heimdall_train.quantisation import quantise

    config, split = _of_run(make_config(model=run)), Split.load(run / 'split.json')
    data, parts = read_data(config, lambda line: None), modules(run)
    model = parts['iq'][0].model
    for part, ids in (('calibration', split.validation[:16]), ('inputs', split.test[:count])):
        inputs = graph_inputs(config, data, ids)
        measured = model.measure(*(torch.from_numpy(values) for values in inputs.values()))
        maps = dict(zip(('maps', 'scalars', 'timed'), (values.numpy() for values in measured), strict=True))
        np.savez(folder / f'{part}.npz', **inputs, **{name: values if name == 'scalars' else values.astype(np.float32) for name, values in maps.items()})
    values, calibration = np.load(folder / 'inputs.npz'), np.load(folder / 'calibration.npz')
    for name, (module, inputs, outputs) in parts.items():
        exported, small = (run / 'bundle' / each for each in ('model.onnx', 'model.int8.onnx'))
        if name == 'iq':
            graph = exported.read_bytes()
        else:
            graph = to_onnx(module, tuple(torch.from_numpy(values[each][:2]) for each in inputs), inputs, outputs).SerializeToString()
        int8 = small.read_bytes() if name == 'iq' and small.exists() else quantise(graph, {each: calibration[each] for each in inputs})
        (folder / f'{name}.onnx').write_bytes(graph)
        (folder / f'{name}-int8.onnx').write_bytes(int8)
    return {'receivers': len(model.network), 'samples': model.samples, 'rate': model.sample_rate, 'sessions': len(values['heard'])}


def session(path: Path, threads: int):
    """A graph in ONNX Runtime with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def timed(folder: Path, options: argparse.Namespace, threads: int) -> dict:
    """Latency and throughput of all candidates with so many threads."""
    import torch

    torch.set_num_threads(threads)
    values, calls = dict(np.load(folder / 'inputs.npz')), {}
    for name, (module, inputs, _) in modules(options.run).items():
        graphs = {'onnx': session(folder / f'{name}.onnx', threads), 'int8': session(folder / f'{name}-int8.onnx', threads)}
        for rows in (1, options.sessions):
            given = {each: np.resize(values[each], (rows, *values[each].shape[1:])) for each in inputs}
            tensors = tuple(torch.from_numpy(each) for each in given.values())
            calls[name, 'torch', rows] = lambda module=module, tensors=tensors: module(*tensors)
            for runtime, graph in graphs.items():
                calls[name, runtime, rows] = lambda graph=graph, given=given: graph.run(None, given)
    seconds: dict = {key: [] for key in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()  # warms up
        for repeat in range(options.repeats):
            for key, call in calls.items():
                if key[2] == 1 or repeat % 10 == 0:
                    begin = time.perf_counter()
                    call()
                    seconds[key].append(time.perf_counter() - begin)
    found: dict = {}
    for name, runtime, _ in calls:
        single, many = (np.array(seconds[name, runtime, rows]) for rows in (1, options.sessions))
        found.setdefault(name, {})[runtime] = {
            'p50_ms': round(1e3 * float(np.median(single)), 2),
            'p99_ms': round(1e3 * float(np.quantile(single, 0.99)), 2),
            'sessions_per_second': round(options.sessions / statistics.median(many), 1),
            'range': [round(options.sessions / float(edge), 1) for edge in (many.max(), many.min())],
        }
    return found


def loaded(folder: Path, graph: str) -> dict:
    """Seconds to load a graph, and the peak memory of a process that locates one session with it."""
    values, before = np.load(folder / 'inputs.npz'), peak_memory()
    import onnxruntime  # noqa: F401  (not part of what loading a graph takes)

    begin = time.perf_counter()
    runtime = session(folder / f'{graph}.onnx', 1)
    seconds = time.perf_counter() - begin
    runtime.run(None, {each.name: values[each.name][:1] for each in runtime.get_inputs()})
    peak = peak_memory()
    size = (folder / f'{graph}.onnx').stat().st_size
    return {'load_s': round(seconds, 2), 'peak_mb': peak, 'before_mb': before, 'size_mb': round(size / 1e6, 1)}


def peak_memory() -> int:
    """MB that this process has held at most; what the system's getrusage says counts the parent's as well where a process was forked."""
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith('VmHWM')).split()[1]) / 1024)
    except (OSError, StopIteration):
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def flags() -> list[str]:
    """What the processor has for 8-bit arithmetic, on which the gain of int8 depends."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        known = next(line for line in lines if line.startswith(('flags', 'Features'))).split()
    except (OSError, StopIteration):
        return []
    return [flag for flag in ('avx2', 'avx512f', 'avx_vnni', 'avx512_vnni', 'amx_int8', 'asimddp', 'i8mm') if flag in known]


def markdown(summary: dict) -> str:
    """The summary as tables."""
    lines = [f'{summary[part]}' for part in ('hardware', 'versions', 'setup')]
    lines += ['', '| | threads | runtime | p50 ms | p99 ms | sessions/s | range |', '|---|---|---|---:|---:|---:|---|']
    for threads, found in summary['threads'].items():
        for name, runtimes in found.items():
            for runtime, each in runtimes.items():
                low, high = each['range']
                lines.append(f'| {NAMES[name]} | {threads} | {runtime} | {each["p50_ms"]} | {each["p99_ms"]} | {each["sessions_per_second"]} | {low}–{high} |')
    lines += ['', '| graph | load s | peak memory MB | size MB |', '|---|---:|---:|---:|']
    lines += [f'| {name} | {each["load_s"]} | {each["peak_mb"]} | {each["size_mb"]} |' for name, each in summary['loading'].items()]
    ratio, gain = summary['iq_of_resnet'], summary['int8_gain']
    lines += ['', f'IQ → fix takes {ratio} x the ResNet alone; int8 is {gain} x as fast for maps → fix. Met: {summary["met"]}']
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
