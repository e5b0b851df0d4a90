"""Decide where a run starts (`--resume_from_checkpoint`), and whether a checkpoint belongs to the same run."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from data.epochs import Epochs
from data.sample import InputError, first_line
from grpo.config import Config
from grpo.run.batches import count_steps
from grpo.run.checkpoint import INDEX, PROGRESS, checkpoints
from grpo.run.scoring import Scorer
from grpo.run.survey import Survey


@dataclass
class ResumeState:
    """Where a run starts."""

    metadata: dict  # of the run, stored in its checkpoints
    step: int = 0  # steps that are done
    counts: dict[str, int] = field(default_factory=dict)  # of `Tracker`
    evaluations: list[dict] = field(default_factory=list)  # the figures of those so far, each with its step
    best_step: int | None = None  # of the model in best/
    folder: Path | None = None  # the checkpoint to resume from
    is_complete: bool = False
    messages: list[str] = field(default_factory=list)  # lines for the user


def find_resume_state(
    config: Config, epochs: Epochs, data: Survey, heldout: Survey | None, scorer: Scorer
) -> ResumeState:
    """Find where the run starts; raise InputError if the flags or samples are not those of the checkpoint."""
    output, wanted = Path(config.output_dir), config.resume_from_checkpoint
    total_steps, where = count_steps(config, len(epochs)), f"--output_dir {str(output)!r}"
    metadata = {"flags": dataclasses.asdict(config), "total_steps": total_steps, "ranks": dist.get_world_size()}
    metadata |= {"num_samples": len(data.samples), "data": data.fingerprint}
    metadata["eval_data"] = heldout.fingerprint if heldout else None
    metadata["rewards"] = {function.name: function.digest for function in scorer.functions}
    there, final, origin = checkpoints(output), output / "final", origin_of(output)
    newest = there[max(there)] if there else None
    if wanted == "auto":
        if final.exists() and (done := read_progress(final, metadata)["step"]) >= total_steps:
            message = f"{output} is complete: {done} steps; the trained model is in {final}"
            return ResumeState(metadata, done, is_complete=True, messages=[message])
        if not newest and (final.exists() or origin):  # such a run must not start from nothing
            mend = "name a new folder" if final.exists() else f"give --resume_from_checkpoint {origin}"
            raise InputError(f"{where}: its run has no checkpoint to go on from: {mend}")
        return resume_at(newest, metadata) if newest else ResumeState(metadata)
    is_own = newest is not None and newest.resolve() == Path(wanted).resolve()
    is_origin = not newest and not final.exists() and wanted == origin  # killed before its first checkpoint
    if not is_own and not is_origin and (newest or final.exists() or (output / "config.json").exists()):
        further = f" ({newest.name} is the newest: move away what is newer than {wanted!r})" if newest else ""
        raise InputError(
            f"{where} holds another run, or one that went further{further}: name a new folder, or continue it with "
            "--resume_from_checkpoint auto"
        )
    return ResumeState(metadata) if wanted == "none" else resume_at(Path(wanted), metadata)


def origin_of(output: Path) -> str | None:
    """Return the checkpoint in another folder that the run in `output` was resumed from, if any."""
    origin = read_json(output / "config.json").get("resume_from_checkpoint", "none")
    return None if origin in ("none", "auto") or Path(origin).resolve().parent == output.resolve() else origin


def read_json(path: Path) -> dict:
    """Read an object; empty where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def resume_at(folder: Path, metadata: dict) -> ResumeState:
    """Start where the checkpoint in `folder` ends."""
    old = read_progress(folder, metadata)
    if not (folder / INDEX).exists():
        raise InputError(f"--resume_from_checkpoint {str(folder)!r} is no folder checkpoint-N: name one, or auto")
    step, total_steps, ranks = old["step"], metadata["total_steps"], metadata["ranks"]
    if step > total_steps:
        raise InputError(f"{str(folder)!r} is of step {step}, and the run has {total_steps}: raise --max_steps")
    messages = [f"resumed from {folder}: {step} of {total_steps} steps are done"]
    if old["total_steps"] != total_steps:
        messages.append(f"of {old['total_steps']} steps so far: the learning rate goes on as in a run of {total_steps}")
    if old["ranks"] != ranks:
        messages.append(f"saved by {old['ranks']} ranks, now {ranks}: the same run, except for rounding and dropout")
    # In a branch there is no best/ yet, and after a kill it may be of a later step: the next one is kept anyway.
    there = read_json(Path(metadata["flags"]["output_dir"], "best", PROGRESS)).get("step")
    best_step = old["best_step"] if there == old["best_step"] else None
    return ResumeState(metadata, step, old["counts"], old["evaluations"], best_step, folder, messages=messages)


def read_progress(folder: Path, metadata: dict) -> dict:
    """Read the progress file of a saved folder; raise InputError if its run had other flags, samples or rewards."""
    try:
        old = json.loads((folder / PROGRESS).read_text())
        differences = differences_of(old, metadata)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(folder)!r} is not a complete checkpoint ({first_line(error)}): move it away if it is damaged, and "
            "give --resume_from_checkpoint auto, or a folder checkpoint-N"
        ) from error
    if differences:
        raise InputError(
            f"{', '.join(differences)} in {str(folder)!r}: give what it was trained with, or start again in a new "
            "--output_dir"
        )
    return old


def differences_of(old: dict, new: dict) -> list[str]:
    """Describe what must not change in a run and has; old, new: metadata of runs (`ResumeState`)."""
    found, was, now = [], old["flags"], new["flags"]
    for name in (flag.name for flag in dataclasses.fields(Config) if not flag.metadata["may_change"]):
        same_model = name == "model_id" and os.path.realpath(now[name]) == os.path.realpath(was[name])
        if now[name] != was[name] and not same_model:
            found.append(f"--{name} {now[name]!r} was {was[name]!r}")
    if new["data"] != old["data"]:
        counts = f"{old['num_samples']}, now {new['num_samples']}"
        found.append(f"--data_path {' '.join(now['data_path'])!r} had other samples ({counts})")
    edited = [name for name, digest in new["rewards"].items() if old["rewards"].get(name, digest) != digest]
    found += [f"--reward_funcs: the file of {name} was another one" for name in edited]
    if None not in (old["eval_data"], new["eval_data"]) and old["eval_data"] != new["eval_data"]:
        found.append(f"--eval_data_path {' '.join(now['eval_data_path'])!r} had other samples (none is fine, too)")
    return found
