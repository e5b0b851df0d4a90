"""The program with a reward function that fails: `python -m tests.grpo.run.faulty_rewards FAULT RANK …`."""

import os
import resource
import signal
import sys
import time
from contextlib import suppress

import train


class Fault(BaseException):
    """No InputError: a bug, as far as the program knows."""


def fails(fault: str, rank: int):
    """Make a reward function that fails at step 2 on one rank (-1: on all)."""

    def faulty_reward(completions, sample_id, step, **columns):
        if step == 2 and rank in (-1, int(os.environ["RANK"])):
            if fault == "raises":
                raise Fault("a bug on one rank")
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "complains":
                raise ValueError("\x1b[31mno\rgood\u202e\nreward")
        if fault == "hangs" and "s1" in sample_id:
            with suppress(BaseException):  # it does not let go at once
                time.sleep(600)
            time.sleep(600)
        if fault == "infinite" and step in (2, 3) and rank in (-1, int(os.environ["RANK"])):
            return [float("inf")] + [0.0] * (len(completions) - 1)
        return [float(len(completion[0]["content"])) for completion in completions]

    return faulty_reward


def main(arguments: list[str]) -> int:
    fault, rank, *arguments = arguments
    train.REWARD_FUNCTIONS = [fails(fault, int(rank))]
    if fault.isdigit() and int(rank) in (-1, int(os.environ["RANK"])):  # no file may grow beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault), int(fault)))
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(train.record(main)(sys.argv[1:]))
