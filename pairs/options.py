"""Dataclasses of settings as options of a command: one option a field, its help text in the field's metadata."""

import argparse
from collections.abc import Collection
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Settings = TypeVar("Settings")


def add_options(
    parser: argparse.ArgumentParser, settings: type, title: str | None = None, leave_out: Collection[str] = ()
) -> None:
    """Adds an option for every field of the dataclass `settings`, in a group of their own if there is a `title`.

    `int | None` is an option that may be left out, a tuple of literals one that takes several words, a bool a flag.
    Fields to `leave_out` have no option and stay at their default.
    """
    group = parser if title is None else parser.add_argument_group(title)
    kinds = get_type_hints(settings)
    for field in fields(settings):
        if field.name in leave_out:
            continue
        option, kind = "--" + field.name.replace("_", "-"), kinds[field.name]
        kwargs: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
        if isinstance(kind, UnionType):  # `… | None`
            kind = next(one for one in get_args(kind) if one is not type(None))
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is tuple:
            kwargs |= {"nargs": "+", "choices": get_args(get_args(kind)[0]), "metavar": "RULE"}
        elif get_origin(kind) is Literal:
            kwargs["choices"] = get_args(kind)
        else:
            kwargs["type"] = kind
        group.add_argument(option, **kwargs)


def parsed_options(args: argparse.Namespace, settings: type[Settings]) -> Settings:
    """The dataclass that the options of `add_options` say."""
    given = [field.name for field in fields(settings) if hasattr(args, field.name)]  # type: ignore[arg-type]
    values = {name: getattr(args, name) for name in given}
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
