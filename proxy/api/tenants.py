"""Tenants: whose key it is, which models they may ask for and how much they may use, as the operator's file says.

    [search]                        # a tenant's name; any number of them
    keys = ["sk-..."]
    models = ["demo"]               # by default all
    requests_per_minute = 600       # by default there are no limits
    tokens_per_minute = 200_000     # of prompts and answers together
    concurrent_requests = 32

What belongs to one tenant no other one sees: stored responses, and which prompts' blocks are cached.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from mesh.errors import EXIT_USAGE, RequestError, StartupError
from proxy.api.errors import validation_error
from proxy.api.quota import Limits, Quota

MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    name: str = ""
    keys: tuple[str, ...] = ()
    models: frozenset[str] | None = None
    """None: all."""
    quota: Quota = field(default_factory=lambda: Quota(Limits(), 0.0))

    def check_model(self, name: str) -> None:
        """Raises `RequestError` 403."""
        if not self.may_use(name):
            message = f"This key may not use the model {name[:100]!r}."
            raise RequestError(403, message, type="permission_error", code="model_not_allowed", param="model")

    def may_use(self, name: str) -> bool:
        return self.models is None or name in self.models

    def salt(self, given: str) -> str:
        """Of the names of cached blocks. A client's own salt has no slash, so it is never another tenant's."""
        return f"{self.name}/{given}" if self.name else given


ANYONE = Tenant()
"""Who uses a proxy that knows no tenants."""
current: ContextVar[Tenant] = ContextVar("tenant", default=ANYONE)
"""Whose request the running task serves."""


class Entry(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    keys: list[Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]] = Field(min_length=1)
    models: list[str] | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    concurrent_requests: int | None = Field(None, ge=1)


FILE = TypeAdapter(dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}\z")], Entry])


def read_tenants(path: str, served: Collection[str]) -> tuple[Tenant, ...]:
    """Those of a file, for a proxy that serves models of these names. Raises `StartupError`, without a key in it."""
    try:
        return _tenants(FILE.validate_python(_tables(path)), served)
    except ValidationError as error:
        raise _wrong(path, validation_error(error).message) from None
    except ValueError as error:
        raise _wrong(path, str(error)) from None


def _tables(path: str) -> Mapping[str, object]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.loads(file.read(MAX_FILE_BYTES).decode())
    except OSError as error:
        raise ValueError(error.strerror) from None
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None


def _tenants(entries: Mapping[str, Entry], served: Collection[str]) -> tuple[Tenant, ...]:
    if not entries:
        raise ValueError("there is no tenant in it")
    owner: dict[str, str] = {}
    for name, entry in entries.items():
        for model in entry.models or ():
            if model not in served:
                raise ValueError(f"{name}: the model {model!r} is not served")
        for key in entry.keys:
            if owner.setdefault(key, name) != name:
                raise ValueError(f"{name} and {owner[key]} have the same key")
    return tuple(_tenant(name, entry) for name, entry in entries.items())


def _tenant(name: str, entry: Entry) -> Tenant:
    limits = Limits(entry.requests_per_minute, entry.tokens_per_minute, entry.concurrent_requests)
    models = None if entry.models is None else frozenset(entry.models)
    return Tenant(name, tuple(entry.keys), models, Quota(limits, monotonic()))


def _wrong(path: str, what: str) -> StartupError:
    return StartupError(f"--tenants {path}: {what}", EXIT_USAGE)
