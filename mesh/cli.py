"""The command `kvmesh`. Each subcommand's module is imported only when it is the one asked for."""

from __future__ import annotations

import difflib
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mesh import __version__, startup
from mesh.errors import EXIT_USAGE, StartupError


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: `main` is `module:function`, called with the arguments that follow."""

    main: str
    help: str


COMMANDS = {
    "up": Command("mesh.launcher:main", "serve a model on this host: proxy, prefill and decode workers"),
    "serve": Command("mesh.serve:main", "run one process of a mesh: proxy, prefill, decode or both"),
    "chat": Command("mesh.terminal:chat", "talk to a running mesh"),
    "complete": Command("mesh.terminal:complete", "continue a text"),
    "keys": Command("mesh.keys:main", "make the keys of a fleet that spans several hosts"),
    "doctor": Command("kvtransfer.doctor:main", "look at this host, measure its links, say which of them workers use"),
    "version": Command("mesh.cli:version", "print the version"),
}

HELP = f"""usage: kvmesh COMMAND [FLAGS]

Serve large language models with separate prefill and decode workers.

{"".join(f"  {name:<10}{command.help}{chr(10)}" for name, command in COMMANDS.items())}
`kvmesh COMMAND --help` lists a command's flags. Start with `kvmesh up`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return startup.run("kvmesh", lambda: dispatch(arguments))


def dispatch(argv: Sequence[str]) -> int:
    """Raises `StartupError`."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else EXIT_USAGE
    name = {"--version": "version", "-V": "version"}.get(argv[0], argv[0])
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        kind = "flag" if name.startswith("-") else "command"
        raise StartupError(f"unknown {kind} {name}; {hint}`kvmesh --help` lists the commands", EXIT_USAGE)
    code: int = pkgutil.resolve_name(COMMANDS[name].main)(argv[1:])
    return code


def version(argv: Sequence[str]) -> int:
    """Prints the version."""
    if argv:
        raise StartupError("`kvmesh version` takes no arguments", EXIT_USAGE)
    print(f"kvmesh {__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
