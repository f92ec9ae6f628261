"""A worker behind relays.

Production's worker but for two things: the address under which others are told to fetch from it is the relay's, and
what nobody has come for is held for 5 s and not for 30, because a run waits until nothing is held.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any
from unittest import mock

from decode.role import DecodeRole
from kvtransfer import holding_state
from kvtransfer.endpoint import KvEndpoint
from prefill.role import PrefillRole
from worker import main

UNCLAIMED_S = 5.0


def relayed(address: str, **parts: Any) -> KvEndpoint:
    endpoint = KvEndpoint(**parts)
    endpoint.address = address
    return endpoint


def run(role: str, arguments: list[str], kv_address: str) -> None:
    """Ends the process."""
    sys.argv[1:] = arguments
    with (
        mock.patch.object(main, "KvEndpoint", partial(relayed, kv_address)),
        mock.patch.object(holding_state, "UNCLAIMED_S", UNCLAIMED_S),
    ):
        main.run(role, PrefillRole if role == "prefill" else DecodeRole)
