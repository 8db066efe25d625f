"""Sessions for tests of the catalog."""
from datetime import UTC, datetime, timedelta

import numpy as np

from heimdall_train.network import Network, Receiver, Zone
from heimdall_train.store import Recording, Session, Source

START = datetime(2025, 10, 22, 16, 30, tzinfo=UTC)
ROOF, VAN, HILL = Receiver('roof', 45.05, 7.65, 270.0), Receiver('van'), Receiver('hill', 45.02, 7.29, 600.0, country='Italy')
NETWORK = Network('valley', (ROOF, VAN, HILL), zone=Zone(45.05, 7.5, 30e3, 30e3))


def sessions(count: int, prefix: str = 's') -> list[Session]:
    "Sessions of a few sources; every other two begin together."
    rng = np.random.default_rng(count)
    return [
        Session(f'{prefix}{number}', START + timedelta(seconds=number // 2), Source(f'source {number % 7}', 45.0 + number % 7 * 0.01, 7.6, error_m=5.0),
                tuple(Recording(name, float(level), float(level) + 90.0, start_offset=float(rng.normal(0, 1e-3)), clock_error_s=3e-8, sample_rate=12_500.0)
                      for name, level in zip(NETWORK.names, rng.normal(-70, 8, 3), strict=True)), 145.5e6)
        for number in range(count)]
