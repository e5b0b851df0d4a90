"""Kill a short run at random moments, saves included, and resume it each time; it must end as one that was left alone.

    python tests/kill_and_resume.py --ranks 2 --kills 20 [--signal TERM] [--supervised]

A SIGKILL loses the steps since the last checkpoint, which are done again; a SIGTERM loses none. Weights are compared
bit for bit, curves point for point, completions byte for byte. Exit code 1 if anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch.multiprocessing as mp  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from grpo.run import rollout_log  # noqa: E402
from grpo.run.checkpoint import PROGRESS, checkpoints  # noqa: E402
from tests.conftest import FLAGS, as_rank, make_mixed, new_store  # noqa: E402

REWARDS = Path(__file__).parent / "grpo" / "rewards.py"


def run_flags(folder: Path, output: Path, *more) -> list[str]:
    """A run of the tiny model in `folder`, quick but with all that makes resuming hard."""
    where = ["--model_id", folder / "model", "--data_path", folder / "data.json", "--image_folder", folder / "videos"]
    what = "--learning_rate 1e-3 --global_batch_size 2".split()
    what += [] if "--supervised" in more else "--num_generations 4 --num_iterations 2".split()
    what += ["--max_completion_length", "16"]  # so that some contain a number, from which to learn
    what += ["--log_completions", "0"]  # pictures take longer than a step
    return [str(flag) for flag in [*where, *FLAGS, *what, "--output_dir", output, *more]]


def evaluating(folder: Path) -> list[str]:
    """Flags that evaluate a run on its own samples, also before the first step."""
    return ["--eval_data_path", str(folder / "data.json"), "--eval_steps", "2", "--eval_on_start"]


def in_two_files(folder: Path) -> list[str]:
    """Flags for the samples of data.json in two files, of which an epoch sees the second one and a half times."""
    samples, paths = json.loads((folder / "data.json").read_text()), [folder / "a.json", folder / "b.jsonl"]
    paths[0].write_text(json.dumps(samples[:3]))
    paths[1].write_text("\n".join(map(json.dumps, samples[3:])))
    return ["--data_path", *map(str, paths), "--data_weights", "1", "1.5"]


def read_evaluations(folder: Path) -> list[dict]:
    """Return the figures of all evaluations up to a saved model, each with its step."""
    return json.loads((folder / PROGRESS).read_text())["evaluations"]


def rewarded() -> list[str]:
    """Flags for weighted rewards, one of them of the whole step."""
    functions = ["numerical_video_reward", "concordance_reward", f"{REWARDS}:by_length"]
    return ["--reward_funcs", *functions, "--reward_weights", "1", "0.5", "0.1"]


def run_to_the_end(arguments: list[str], log: str) -> None:
    import train

    os.environ |= {"DEBUG_MODE": "true", "LOG_PATH": f"{log}.rewards"}
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(train.main(arguments))


def start(world_size: int, arguments: list[str], log: Path) -> list:
    """Start the ranks of a run; what they print goes to `log`, what the reward function sees to `log`.rewards."""
    port, context = new_store(), mp.get_context("forkserver")
    ranks = [
        context.Process(
            target=as_rank, args=(rank, run_to_the_end, world_size, world_size, port, (arguments, str(log)))
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def wait(ranks: list, seconds: float = 180) -> list[int]:
    """Return the exit codes; a rank that has not ended in time is an error."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()))
    late = [rank for rank in ranks if rank.is_alive()]
    for rank in late:
        rank.kill()
    assert not late, f"{len(late)} ranks had not ended after {seconds} seconds"
    return [rank.exitcode for rank in ranks]


@dataclass
class Result:
    """What a run has left, to compare it to the bit."""

    weights: bytes
    best: bytes | None  # weights of the best model, if there were evaluations
    curves: dict[str, list[tuple[int, float]]]  # but those of the clock and the machine
    rollouts: bytes


def result(output: Path) -> Result:
    """Read what a run has left."""
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    of_the_machine = ("run/tokens_per_second", "run/peak_memory_gb")
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/") and tag not in of_the_machine]
    curves = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
    weights, best = (list((output / name).glob("*model.safetensors")) for name in ("final", "best"))
    rollouts = b"".join(path.read_bytes() for path in rollout_log.files(output))
    return Result(weights[0].read_bytes(), best[0].read_bytes() if best else None, curves, rollouts)


def kill_and_resume(folder: Path, world_size: int, kills: int, number: int, seed: int, more: list[str]) -> bool:
    """Kill a run `kills` times by signal `number`; return True if it ended each time as it should."""
    dice, whole = random.Random(seed), folder / "uninterrupted"
    assert wait(start(world_size, ["--help"], folder / "log")) == [0] * world_size  # everything is imported from now on
    began = time.monotonic()
    assert wait(start(world_size, run_flags(folder, whole, *more), folder / "log"), 240) == [0] * world_size
    seconds = time.monotonic() - began
    expected, is_right, done, runs = result(whole), True, 0, 0
    assert max(value for _, value in expected.curves["grad_norm"]) > 0, "nothing is learned, so that all runs are equal"
    while done < kills or (folder / "killed").exists():
        output = folder / "killed"
        more_flags = ["--save_steps", "1", "--save_total_limit", "2", "--resume_from_checkpoint", "auto", *more]
        ranks = start(world_size, run_flags(folder, output, *more_flags), folder / "log")
        moment = dice.uniform(0.2, 1) * seconds
        victims = dice.choice([ranks, [dice.choice(ranks)]])
        if done < kills:
            time.sleep(moment)
            for rank in victims:
                if rank.is_alive():
                    os.kill(rank.pid, number)
        codes = wait(ranks, 240 if done >= kills else 60)
        if codes == [0] * world_size and (output / "final").exists():
            same = result(output) == expected
            print(f"run {runs + 1} ended: {'equal to' if same else 'DIFFERENT from'} the uninterrupted one", flush=True)
            is_right, runs = is_right and same, runs + 1
            shutil.rmtree(output)
            continue
        done += 1
        steps_done = max(checkpoints(output), default=0)
        left = sorted(path.name for path in output.glob("*.*") if path.suffix in (".unfinished", ".removed"))
        print(
            f"kill {done:2}: after {moment:4.1f} s, exit codes {codes}, step {steps_done} is saved {left or ''}",
            flush=True,
        )
        expects_zero = number != signal.SIGKILL and steps_done > 0
        is_right = is_right and (codes == [0] * world_size or not expects_zero)
    return is_right and runs > 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    arguments, more = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make_mixed(Path(folder) / "tiny")
        more += [] if "--supervised" in more else rewarded()
        more += [*evaluating(Path(folder) / "tiny"), *in_two_files(Path(folder) / "tiny")]
        more += "--max_videos 1 --video_cap random --frame_jitter --num_train_epochs 2".split()
        number = getattr(signal, f"SIG{arguments.signal}")
        is_right = kill_and_resume(
            Path(folder) / "tiny", arguments.ranks, arguments.kills, number, arguments.seed, more
        )
    print("all equal" if is_right else "NOT EQUAL")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
