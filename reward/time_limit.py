"""End what takes too long, such as a reward function of the user's that waits for a server."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(BaseException):
    """The time is over. Not an Exception, which a function of the user's might catch."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTime in code that runs too long, and again each second if it catches that; main thread only.

    None is no limit.
    """
    if seconds is None:
        yield
        return

    def interrupt(number, frame):
        raise OutOfTime(f"it took longer than --reward_timeout {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
