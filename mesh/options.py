"""Command lines from settings classes, and back: each field of a frozen dataclass is one flag.

A value comes from the command line, else from the environment variable `KVMESH_<FIELD>`, else from the field's
default. Every field is `int`, `float`, `str`, `bool` or `tuple[str, ...]` (a repeatable flag; in the
environment separated by commas; one empty value means none at all). Positional fields have no variable.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, TypeVar, get_type_hints

from mesh.errors import EXIT_USAGE, StartupError

S = TypeVar("S")
ENVIRONMENT_PREFIX = "KVMESH_"
TRUTHS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}
HELP_WIDTH = 110


class UsageError(StartupError):
    """A command line or environment variable that means nothing; one line, exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_USAGE)


@dataclass(frozen=True, slots=True)
class Group:
    """A settings class as part of a command line."""

    settings: type
    title: str = "flags"
    hidden: Collection[str] = ()
    """Fields that are no flags, because the command decides them itself."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """In place of the class's own."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One field as the command line sees it."""

    field: str
    kind: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def positional(self) -> bool:
        return bool(self.metadata.get("positional"))

    @property
    def many(self) -> bool:
        return self.kind not in SCALARS

    @property
    def name(self) -> str:
        """As the user knows it."""
        return self.field.upper() if self.positional else "--" + self.field.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.field.upper()


class _Parser(argparse.ArgumentParser):
    """argparse whose every complaint is one `UsageError`."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the flags")


def parser(settings: type, prog: str, description: str) -> argparse.ArgumentParser:
    """The argument parser of one settings class, for its help."""
    return _command([_flags(Group(settings))], ["flags"], prog, description)


def parse(
    settings: type[S],
    argv: Sequence[str],
    *,
    prog: str = "kvmesh",
    description: str = "",
    environ: Mapping[str, str] | None = None,
    **defaults: Any,
) -> S:
    """The settings that `argv` and the environment describe; `defaults` replace the class's own.

    Raises `UsageError`. `--help` prints and leaves by `SystemExit(0)`.
    """
    group = Group(settings, defaults=defaults)
    (values,) = parse_groups((group,), argv, prog=prog, description=description, environ=environ)
    return settings(**values)


def parse_groups(
    groups: Sequence[Group],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    environ: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One command line for several classes: per group, the values of its fields that are not hidden.

    A name that several groups have is one flag, and each of them gets its value.
    """
    variables = os.environ if environ is None else environ
    flags = [_flags(group) for group in groups]
    command = _command(flags, [group.title for group in groups], prog, description)
    found, unknown = command.parse_known_args(_joined(argv))
    if unknown:
        names = [flag.name for group in flags for flag in group if not flag.positional]
        raise UsageError(_unknown(unknown[0], names, prog))
    return [{flag.field: _value(flag, vars(found), variables) for flag in group} for group in flags]


def to_argv(settings: Any, always: Collection[str] = ()) -> list[str]:
    """The command line that `parse` turns back into `settings` when no environment variable interferes.

    Values equal to the class's defaults are left out, except the fields named in `always`.
    """
    positional: list[str] = []
    words: list[str] = []
    for flag in _flags(Group(type(settings))):
        value = getattr(settings, flag.field)
        if value == flag.default and flag.field not in always:
            continue
        if flag.positional:
            positional += list(value) if flag.many else [value]
        else:
            words += _words(flag.name, value)
    return [*words, "--", *positional] if positional else words


def environment_without_flags(environ: Mapping[str, str], settings: Iterable[type]) -> dict[str, str]:
    """`environ` for a child that is given its settings by `to_argv`."""
    taken = {flag.variable for cls in settings for flag in _flags(Group(cls))}
    return {name: value for name, value in environ.items() if name not in taken}


def _truth(text: str | bool) -> bool:
    return text if isinstance(text, bool) else TRUTHS[text.lower()]


SCALARS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    str: (str, "text"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (_truth, "yes or no"),
}
"""Every kind of field but the repeatable one: its conversion and its name in a message."""
METAVARS: dict[Any, str] = {int: "N", float: "X"}


def _flags(group: Group) -> list[Flag]:
    kinds = get_type_hints(group.settings)
    return [
        Flag(f.name, kinds[f.name], group.defaults.get(f.name, f.default), f.metadata)
        for f in fields(group.settings)
        if f.name not in group.hidden
    ]


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else name.replace("--", "--no-", 1)]
    if isinstance(value, tuple):
        return [f"{name}={item}" for item in value or ("",)]
    return [f"{name}={value}"]


def _command(
    flags: Sequence[Sequence[Flag]], titles: Sequence[str], prog: str, description: str
) -> argparse.ArgumentParser:
    command = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_help_format,
        epilog="Each flag can be set by the environment variable KVMESH_<FLAG>; the command line wins.",
    )
    added: set[str] = set()
    for group, title in zip(flags, titles, strict=True):
        section = command.add_argument_group(title)
        for flag in group:
            if flag.field not in added:
                added.add(flag.field)
                _add(section, flag)
    return command


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=32, width=HELP_WIDTH)


def _add(section: Any, flag: Flag) -> None:
    """Values stay text here: conversion and checks are the same for the environment."""
    text = flag.metadata["help"].replace("%", "%%")
    if flag.default not in ("", ()) and "default" not in text:
        text += f" (default: {_shown(flag.default)})"
    if flag.positional:
        section.add_argument(flag.field, nargs="*" if flag.many else "?", metavar=flag.name, help=text)
    elif flag.kind is bool:
        section.add_argument(flag.name, dest=flag.field, action=argparse.BooleanOptionalAction, help=text)
    else:
        choices = flag.metadata.get("choices")
        section.add_argument(
            flag.name,
            dest=flag.field,
            action="append" if flag.many else "store",
            metavar="|".join(choices) if choices else METAVARS.get(flag.kind, "TEXT"),
            help=text,
        )


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return ", ".join(default) if isinstance(default, tuple) else str(default)


def _value(flag: Flag, given: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    """The flag's value, converted and checked; an error names where it came from."""
    raw = given.get(flag.field)
    if raw is not None and raw != []:
        return _checked(flag, raw, flag.name)
    if flag.variable in environ and not flag.positional:
        text = environ[flag.variable]
        return _checked(flag, text.split(",") if flag.many else text, flag.variable)
    return flag.default


def _checked(flag: Flag, raw: Any, origin: str) -> Any:
    if flag.many:
        return tuple(item for item in raw if item)
    convert, noun = SCALARS[flag.kind]
    try:
        value = convert(raw)
    except (ValueError, KeyError):
        raise UsageError(f"{origin} must be {noun}, not {raw!r}") from None
    choices = flag.metadata.get("choices")
    if choices and value not in choices:
        raise UsageError(f"{origin} must be one of {', '.join(choices)}, not {raw!r}")
    _check_range(value, flag.metadata, origin)
    return value


def _check_range(value: Any, limits: Mapping[str, Any], origin: str) -> None:
    """Written so that a NaN is outside every range."""
    if "minimum" in limits and not value >= limits["minimum"]:
        raise UsageError(f"{origin} must be at least {limits['minimum']}, not {value}")
    if "above" in limits and not value > limits["above"]:
        raise UsageError(f"{origin} must be above {limits['above']}, not {value}")
    if "maximum" in limits and not value <= limits["maximum"]:
        raise UsageError(f"{origin} must be at most {limits['maximum']}, not {value}")


def _joined(argv: Sequence[str]) -> list[str]:
    """`--flag -1` as `--flag=-1`: argparse would take a negative number for a flag of its own."""
    joined: list[str] = []
    items = iter(argv)
    for item in items:
        if item == "--":
            return [*joined, item, *items]
        negative = item[:1] == "-" and item[1:2].isdigit()
        if negative and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={item}"
        else:
            joined.append(item)
    return joined


def _unknown(word: str, names: Sequence[str], prog: str) -> str:
    if not word.startswith("-"):
        return f"{word!r} is one argument too many; `{prog} --help` shows the usage"
    flag = word.split("=")[0]
    near = difflib.get_close_matches(flag, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown flag {flag}; {hint}`{prog} --help` lists the flags"
