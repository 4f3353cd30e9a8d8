"""The signals by which a run is asked to end, and processes of its own that they are not for."""

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
    signal.SIGHUP,  # the terminal is closed
    signal.SIGXCPU,  # the limit of the processor's time is reached
)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Processes that are started meanwhile do not get SIGNALS unless they unblock them; this one gets them later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
