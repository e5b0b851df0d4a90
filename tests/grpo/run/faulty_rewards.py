"""The program with a reward function that fails: `main([FAULT, RANK, …])`."""

import os
import resource

import train
from tests.grpo.rewards import named


def main(arguments: list[str]) -> int:
    fault, rank, *arguments = arguments
    os.environ |= {"FAULT": fault, "FAULTY_RANK": rank}
    if fault.isdigit() and int(rank) in (-1, int(os.environ["RANK"])):  # no file may grow beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault), int(fault)))
    weight = ["--reward_weights", "1e6"] if fault == "huge" else []
    return train.main([*arguments, *named("faulty_reward"), *weight])
