"""Panels on an event loop, as a kernel has one, without a browser."""

from __future__ import annotations

import asyncio
import time


async def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in time")


async def idle(panel):
    await until(lambda: panel.controller.status == "idle" and panel.session._history)
    await asyncio.sleep(0.05)


def knob(panel, name):
    return next(knob for knob in panel.knobs if name in knob.names)


def with_panel(job, scenario):
    """Run the async test ``scenario(panel)`` on a loop with the session's panel, whose start is there."""

    async def whole():
        panel = job.panel()
        await idle(panel)
        await scenario(panel)
        panel.close()

    asyncio.run(whole())
