"""predictions.jsonl, which an evaluation continues, and settings.json beside it, which says what its answers are of."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from data.sample import InputError, Sample, first_line
from grpo.evaluate.answer import Prediction
from grpo.run.lock import lock_folder


class Predictions:
    """The answers so far; rank 0 keeps them on disk."""

    def __init__(self, output_dir: str, settings: dict, samples: Sequence[Sample]):
        """Read what is there. Raises InputError if it is of another model, other samples or other flags."""
        self.path, self.done = Path(output_dir, "predictions.jsonl"), {}
        if dist.get_rank() != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock_folder(output_dir)
            settings_path = self.path.with_name("settings.json")
            if self.path.exists():
                self.check(settings_path, settings)
                self.read({sample.id for sample in samples})
            else:
                write_whole(settings_path, json.dumps(settings, indent=2).encode())
        except OSError as error:
            raise InputError(
                f"--output_dir {output_dir!r} cannot be written ({error.strerror}): name another folder"
            ) from error

    def check(self, path: Path, settings: dict) -> None:
        """Compare the settings with those of the predictions that are there."""
        try:
            old = json.loads(path.read_text())
            changed = [
                f"{name} {settings.get(name)!r} was {old.get(name)!r}"
                for name in settings | old
                if settings.get(name) != old.get(name)
            ]
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"{str(self.path)!r} is there, but {path.name} beside it cannot be read ({first_line(error)}): name a "
                "new --output_dir"
            ) from error
        if changed:
            raise InputError(f"{str(self.path)!r} is of other settings ({', '.join(changed)}): name a new --output_dir")

    def read(self, ids: set[str]) -> None:
        """Read the lines; what an interruption has left of a last line is removed."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                prediction = Prediction(**json.loads(line))
                if prediction.id not in ids or prediction.id in self.done:
                    raise ValueError(f"unexpected id {prediction.id!r}")
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{str(self.path)!r}, line {number} is damaged ({first_line(error)}): remove the line, or name a "
                    "new --output_dir"
                ) from error
            self.done[prediction.id] = prediction
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    def append(self, predictions: list[Prediction]) -> None:
        """Add predictions; raise InputError if the disk is full."""
        self.done |= {prediction.id: prediction for prediction in predictions}
        if dist.get_rank() != 0:
            return
        lines = "".join(json.dumps(dataclasses.asdict(prediction)) + "\n" for prediction in predictions)
        try:
            with open(self.path, "a") as file:
                file.write(lines)
        except OSError as error:
            raise InputError(
                f"{str(self.path)!r} cannot be written ({error.strerror}): make room; the same command continues"
            ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, which gets its name once it is complete."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)
