"""Merge an adapter into its base model: an ordinary Hugging Face folder, in the precision of the base.

python -m grpo.export --adapter output/run/final --output output/merged
"""

import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import file_exists, try_to_load_from_cache
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from data.flags import parse_flags
from data.prompt import load_tokenizer
from data.sample import InputError, first_line
from grpo.model.card import model_card
from grpo.model.load import ModelFiles, load_model, processor_files
from grpo.ranks import exit_code
from reward.flags import NAMED, flag

CONFIG = "config.json"  # which every model has


@dataclass
class ExportConfig:
    """The flags."""

    heading = "what"
    adapter: str = flag("", "folder that training with --lora_enable has written", NAMED)
    output: str = flag("", "new folder for the merged model", NAMED)
    model_id: str = flag("", "the base model, if it is no longer where the adapter says")


def base_of(adapter: str, model_id: str = "") -> str:
    """Return the base model of an adapter folder: `model_id`, or without one that which the folder names.

    Raises InputError if it is not an adapter folder, or if what it names is not to be found.
    """
    try:
        described = json.loads(Path(adapter, "adapter_config.json").read_text())
        if described.get("peft_type") != "LORA":
            raise ValueError("it is no LoRA adapter")
    except (OSError, ValueError) as error:
        why = f"adapter_config.json: {first_line(error)}"
        raise InputError(f"--adapter {adapter!r} is no adapter folder of --lora_enable ({why})") from error
    base = model_id or described.get("base_model_name_or_path") or ""
    try:  # asked once: to load it would ask the hub again and again
        if not (model_id or os.path.isdir(base) or try_to_load_from_cache(base, CONFIG) or file_exists(base, CONFIG)):
            raise ValueError("no such model")
    except Exception as error:  # of any type, where there is no network
        why = f"is not found, neither here nor on the hub ({first_line(error)}): name it with --model_id"
        raise InputError(f"--adapter {adapter!r}: its base model {base!r} {why}") from error
    return base


def load_merged(adapter: str, model_id: str, dtype="auto"):
    """Load the base model, by default in its own precision, and merge the adapter into it: added in float32.

    Raise InputError if it is no adapter, or does not fit the base.
    """
    base_of(adapter, model_id)  # raises
    model = load_model(model_id, dtype)
    try:
        with safe_open(Path(adapter, "adapter_model.safetensors"), "pt") as file:
            stored = set(file.keys())
        with warnings.catch_warnings(action="ignore"):  # about keys that do not fit, which are an error here
            peft_model = PeftModel.from_pretrained(model, adapter)
        if odd := sorted(stored ^ set(get_peft_model_state_dict(peft_model))):
            raise ValueError(f"{len(odd)} weights have no counterpart, such as {odd[0]}")
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--adapter {adapter!r} cannot be read, or does not fit the model {model_id!r} ({first_line(error)}): name "
            "its base with --model_id"
        ) from error
    return peft_model.merge_and_unload()


def export(adapter: str, output: str, model_id: str = "") -> None:
    """Write the merged model, with tokenizer and processor files; raise InputError for what the user can fix.

    model_id: the base, where it is not to be found under the name that the adapter gives.
    """
    if Path(output).exists():
        raise InputError(f"--output {output!r} exists: name a new folder")
    model_id = base_of(adapter, model_id)
    tokenizer, model = load_tokenizer(model_id), load_merged(adapter, model_id)
    unfinished, progress = Path(f"{output}.unfinished"), Path(adapter, "progress.json")  # of the run that saved it
    try:
        if unfinished.exists():  # left by an export that was killed
            shutil.rmtree(unfinished)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        ModelFiles(model, tokenizer, processor_files(model_id)).write(unfinished)
        if progress.exists():
            (unfinished / "README.md").write_text(model_card(json.loads(progress.read_text()), is_adapter=False))
        os.rename(unfinished, output)  # the folder gets its name once it is complete
    except OSError as error:
        raise InputError(f"--output {output!r} cannot be written ({first_line(error)}): name another place") from error


def main(argv: list[str]) -> int:
    """Export; return 2, with one line, for what the user can fix."""

    def run() -> None:
        config = parse_flags(ExportConfig, argv, "python -m grpo.export", description=__doc__)
        export(**vars(config))
        print(f"the merged model is in {config.output}")

    return exit_code(run, "grpo.export")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
