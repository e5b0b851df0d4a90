"""predictions.jsonl, which an evaluation continues, and settings.json beside it, which says what its answers are of."""

import json
import os
from pathlib import Path

import torch.distributed as dist

from data.sample import InputError, first_line, writing
from grpo.evaluate.answer import Prediction
from grpo.run.lock import lock_folder


def open_predictions(output_dir: str, settings: dict) -> dict[str, Prediction]:
    """Lock the folder of an evaluation, and return the answers that are there, by id; none but on rank 0.

    What an interruption has left of a last line is removed. Raises InputError if the answers are of other settings.
    """
    if dist.get_rank() != 0:
        return {}
    path, settings_path = Path(output_dir, "predictions.jsonl"), Path(output_dir, "settings.json")
    where, done = f"--output_dir {output_dir!r}", {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_folder(output_dir)
        if not path.exists():
            with writing("output_dir", output_dir):
                settings_path.write_text(json.dumps(settings, indent=2))
            return {}
        where = f"{str(path)!r} is there, but {settings_path.name} beside it"
        old = json.loads(settings_path.read_text())
        if changed := [name for name in settings | old if settings.get(name) != old.get(name)]:
            changes = ", ".join(f"{name} {settings.get(name)!r} was {old.get(name)!r}" for name in changed)
            raise InputError(f"{str(path)!r} is of other settings ({changes}): name a new --output_dir")
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            where = f"{str(path)!r}, line {number} (remove it to go on without it)"
            prediction = Prediction(**json.loads(line))
            done[prediction.id] = prediction
        os.truncate(path, len(whole))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where} cannot be read ({first_line(error)}): name a new --output_dir") from error
    return done


def append_predictions(output_dir: str, predictions: list[Prediction]) -> None:
    """On rank 0, add answers to predictions.jsonl; raise InputError if the disk is full."""
    if dist.get_rank() != 0:
        return
    path = Path(output_dir, "predictions.jsonl")
    with writing("output_dir", output_dir), open(path, "a") as file:
        file.writelines(json.dumps(vars(prediction)) + "\n" for prediction in predictions)
