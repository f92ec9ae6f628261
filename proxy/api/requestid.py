"""The id that a request has in its answer's `x-request-id` and in the log."""

from __future__ import annotations

import re
import uuid
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

KEY = "kvmesh.request_id"
"""Where it stands in the ASGI scope."""
HEADER = "x-request-id"
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""A client's own id is repeated in headers and logs, so it may hold nothing that means something there."""


def begin(scope: Scope) -> None:
    """The client's own id if its header has a harmless one, else a new one."""
    given = Headers(scope=scope).get(HEADER)
    scope[KEY] = given if given is not None and SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def adopt(scope: Scope, given: Any) -> None:
    """The `request_id` of a body, where no header has one."""
    if isinstance(given, str) and SANE_ID.fullmatch(given) and HEADER not in Headers(scope=scope):
        scope[KEY] = given
