"""`KVMESH_TEST_KV_ADDRESS=… python -m tests.faults.worker MODEL_DIR --role …`: a worker behind a relay.

Production's worker but for one thing: the address under which others are told to fetch from it is the relay's.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any
from unittest import mock

from decode.role import DecodeRole
from kvtransfer.endpoint import KvEndpoint
from prefill.role import PrefillRole
from worker import main

KV_ADDRESS = "KVMESH_TEST_KV_ADDRESS"


def relayed(address: str, **parts: Any) -> KvEndpoint:
    endpoint = KvEndpoint(**parts)
    endpoint.address = address
    return endpoint


if __name__ == "__main__":
    role = sys.argv[sys.argv.index("--role") + 1]
    with mock.patch.object(main, "KvEndpoint", partial(relayed, os.environ[KV_ADDRESS])):
        main.run(role, PrefillRole if role == "prefill" else DecodeRole)
