"""Which processor a benchmark ran on."""
import platform
from pathlib import Path


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
