"""Signals: the first one lets the step end and be saved, the second ends the program at once."""

import os
import signal

from grpo.ranks import any_rank


class StopRequest:
    """Remembers a signal until the step is done.

    A rank that waits for a dead one still ends: its collective fails, or torchrun kills it 30 seconds after SIGTERM.
    """

    def __init__(self):
        self.is_requested, self.handlers = False, {}

    def listen(self) -> None:
        """Let signals wait for the end of the step; before the first call they end the program as usual."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.handlers.setdefault(number, signal.signal(number, self.request))

    def request(self, number: int, frame) -> None:
        """Remember the first signal; at the second, end the process with the exit code that shells use for it."""
        if self.is_requested:
            os._exit(128 + number)
        self.is_requested = True

    def requested(self) -> bool:
        """Return True on all ranks if a signal has reached any of them; collective."""
        return any_rank(self.is_requested)

    def restore(self) -> None:
        """Give the signals their former handlers back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
