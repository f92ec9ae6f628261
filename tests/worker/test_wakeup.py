"""The wake-up of the I/O loop."""

from __future__ import annotations

import select

from worker.wakeup import Wakeup


def readable(wakeup: Wakeup) -> bool:
    return bool(select.select([wakeup.fd], [], [], 0)[0])


def test_setting_makes_it_readable_until_cleared() -> None:
    wakeup = Wakeup()
    assert not readable(wakeup)
    wakeup.set()
    wakeup.set()
    assert readable(wakeup)
    wakeup.clear()
    assert not readable(wakeup)
    wakeup.close()


def test_setting_after_the_end_does_nothing() -> None:
    wakeup = Wakeup()
    wakeup.close()
    wakeup.close()
    wakeup.set()
