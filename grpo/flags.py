"""Flags as a dataclass: described by `flag`, read from the command line by `parse_flags`."""

import argparse
import copy
import dataclasses
import difflib

from transformers import HfArgumentParser

from data.sample import InputError


def flag(default, help: str, heading: str | None = None, demo=None, alias: str | None = None):
    """Describe a flag; a heading starts a section of --help, demo is the default with --demo, alias a second name."""
    metadata = {"help": help, "heading": heading, "demo": demo, "aliases": [alias] if alias else []}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field):
    """Return a flag's default; a list is a new one each time."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class _HelpFormatter(argparse.HelpFormatter):
    """Show each flag in one spelling: HfArgumentParser also takes hyphens in place of underscores."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        return action.option_strings[-1 if "-h" in action.option_strings else 0] + values


def as_typed(value):
    """Return a value as it is typed on the command line, where a list has no brackets."""
    if not isinstance(value, list):
        return value
    return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)


def parse_flags(cls: type, argv: list[str], prog: str, defaults: dict | None = None):
    """Read a dataclass of `flag`s from the command line; raise InputError for what it does not understand."""
    sections = {}
    for field in dataclasses.fields(cls):
        heading = field.metadata["heading"] or list(sections)[-1]
        default = default_of(field)
        shown, demo = as_typed(default), field.metadata["demo"]
        known = [f"default: {shown}"] if shown not in (None, "") and shown is not False else []
        known += [f"with --demo: {as_typed(demo)}"] if demo is not None else []
        text = field.metadata["help"] + (f" ({'; '.join(known)})" if known else "")
        described = copy.copy(field)
        described.metadata = {"help": text.replace("%", "%%"), "aliases": field.metadata["aliases"]}
        sections.setdefault(heading, []).append((field.name, field.type, described))
    groups = [
        dataclasses.make_dataclass("Section", fields, namespace={"_argument_group_name": heading})
        for heading, fields in sections.items()
    ]

    def fail(message: str):
        raise InputError(f"{message}: {prog} --help explains the flags")

    parser = HfArgumentParser(
        groups, prog=prog, usage=f"{prog} [flags]", formatter_class=_HelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    parser.set_defaults(**(defaults or {}))
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        names = [f"--{field.name}" for field in dataclasses.fields(cls)]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        fail(f"unknown flag {unknown[0]!r}" + (f" (did you mean {nearest[0]}?)" if nearest else ""))
    return cls(**{name: value for section in parsed for name, value in vars(section).items()})
