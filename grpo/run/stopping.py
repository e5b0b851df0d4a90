"""Signals: the first one lets the step end and be saved, the second ends the program at once."""

import os
import signal

from grpo.ranks import any_rank


class StopRequest:
    """Remembers a signal until the step is done.

    It keeps no rank alive that waits for one that died: there the communication fails, or torchrun, half a minute after
    its SIGTERM, ends it by force.
    """

    def __init__(self):
        self.is_noted, self.former = False, {}

    def listen(self) -> None:
        """Let signals wait for the end of the step; before, they end the program as usual."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.former[number] = signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        """Keep the first signal; end the process at the second, with the code that shells give such an end."""
        if self.is_noted:
            os._exit(128 + number)
        self.is_noted = True

    def is_made(self) -> bool:
        """Return True on all ranks if a signal has reached any of them; collective."""
        return any_rank(self.is_noted)

    def release(self) -> None:
        """Let signals do again what they did before `listen`."""
        for number, handler in self.former.items():
            signal.signal(number, handler)
