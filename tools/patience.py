"""When a kernel is given up: when it is dead, or when its processes together compute next to
nothing for two minutes.

No limit of time is right for a cell. On a slow machine, or beside another program, it takes as long
as it takes; what tells a cell that hangs from one that computes is the CPU time of its kernel.
`make run` asks `Watch` while a cell runs; for nbval this module is a plugin (`pytest -p
tools.patience`), since nbval alone notices a dead kernel only when its own limit is over.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import Empty
from typing import Any

import psutil
import pytest

SILENCE_SECONDS = 120.0
LEAST_CPU_SECONDS = 1.0  # in so many seconds; a kernel that waits for a cell uses less
LOOK_SECONDS = 1.0


class KernelGivenUpError(RuntimeError):
    """The kernel will not finish its cell; the message says why."""


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and of all that it started, the ended ones included; None if it is
    dead.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    total = 0.0
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            used = member.cpu_times()
            total += (
                used.user
                + used.system
                + getattr(used, "children_user", 0.0)
                + getattr(used, "children_system", 0.0)
            )
    return total


def kill(pid: int) -> None:
    """End a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                member.kill()


class Watch:
    """Looks at the process `pid` now and then, from its first call on.

    measure, clock: how its CPU seconds are read, and the time
    used: CPU seconds since the first look
    """

    def __init__(
        self,
        pid: int,
        measure: Callable[[int], float | None] = cpu_seconds,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.pid, self.measure, self.clock = pid, measure, clock
        self.looks: deque[tuple[float, float]] = deque()
        self.first: float | None = None
        self.used = 0.0

    def look(self) -> str:
        """Why the kernel is to be given up now, or ""."""
        now, used = self.clock(), self.measure(self.pid)
        if used is None:
            return "the kernel died: was its memory used up?"
        self.first = used if self.first is None else self.first
        self.used = used - self.first
        self.looks.append((now, used))
        while len(self.looks) > 1 and self.looks[1][0] <= now - SILENCE_SECONDS:
            self.looks.popleft()
        since, before = self.looks[0]
        if now - since >= SILENCE_SECONDS and used - before < LEAST_CPU_SECONDS:
            return (
                f"the kernel used {used - before:.1f} CPU-seconds in {now - since:.0f} s: it "
                "hangs, and was ended"
            )
        return ""


def await_reply(kernel: Any, msg_id: str, timeout: float) -> None:
    """nbval's wait for the reply of a kernel, which raises KernelGivenUpError as soon as `Watch`
    gives it up.
    """
    watch, end = Watch(kernel.km.provisioner.pid), time.monotonic() + timeout
    while True:
        try:
            return type(kernel).await_reply(kernel, msg_id, timeout=LOOK_SECONDS)
        except Empty:
            if reason := watch.look():
                kill(watch.pid)
                raise KernelGivenUpError(reason) from None
            if time.monotonic() > end:
                raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Watch the kernel of an nbval cell; the cells after one that was given up are expected to
    fail.
    """
    kernel = getattr(item.parent, "kernel", None)
    if kernel is None:
        return (yield)
    kernel.await_reply = partial(await_reply, kernel)
    try:
        return (yield)
    except KernelGivenUpError:
        item.parent.timed_out = True  # nbval's own word for it
        raise
