"""Tests of tools.patience: a kernel that computes is never given up, one that hangs is.

Real ones are in tests/faults.
"""

import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic

import pytest

from tools import patience
from tools.patience import LEAST_CPU_SECONDS, SILENCE_SECONDS, Watch

ROOT = Path(__file__).parents[1]


def looks(used_at, every=1.0):
    """What a watch says of a process that has used `used_at(second)` CPU seconds, a look a second,
    up to the first word.
    """
    now = 0.0
    watch = Watch(0, measure=lambda pid: used_at(now), clock=lambda: now)
    while now < 10 * SILENCE_SECONDS:
        if reason := watch.look():
            return now, reason
        now += every
    return now, ""


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_a_kernel_that_computes_is_never_given_up_however_slowly(share):
    assert looks(lambda second: share * second) == (10 * SILENCE_SECONDS, "")


def test_one_that_computes_now_and_then_is_not_given_up():
    burst = SILENCE_SECONDS * 0.9
    assert looks(lambda second: LEAST_CPU_SECONDS * (second // burst))[1] == ""


def test_one_that_hangs_is_given_up_after_the_silence_and_no_sooner():
    second, reason = looks(lambda second: min(second, 300.0))
    assert second == pytest.approx(300 + SILENCE_SECONDS, abs=2)
    assert reason == "the kernel used 0.0 CPU-seconds in 120 s: it hangs, and was ended"


def test_seldom_looks_do_not_make_the_silence_longer():
    assert looks(lambda second: 0.0, every=SILENCE_SECONDS * 0.7)[0] == pytest.approx(
        SILENCE_SECONDS * 1.4
    )


def test_a_dead_one_is_given_up_at_once():
    assert looks(lambda second: None if second > 5 else second) == (
        6.0,
        "the kernel died: was its memory used up?",
    )


def test_the_cpu_time_of_a_process_counts_what_it_started():
    started = "subprocess.run([sys.executable, '-c', 'sum(range(10**7))'])"
    code = f"import subprocess, sys; {started}; print('done', flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        parent.stdout.readline()
        alone = patience.cpu_seconds(parent.pid)
        parent.communicate("\n")
    start = patience.cpu_seconds(subprocess.Popen([sys.executable, "-c", "pass"]).pid)
    assert alone > 0.05 > start


def test_a_dead_process_has_no_cpu_time_and_can_be_killed_again():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = threading.Event()
    end = monotonic() + 60
    while patience.cpu_seconds(process.pid) is not None and monotonic() < end:
        deadline.wait(0.01)
    assert patience.cpu_seconds(process.pid) is None, "a zombie counts as dead"
    process.wait()
    assert patience.cpu_seconds(process.pid) is None
    patience.kill(process.pid)


def test_no_other_limit_ends_a_cell():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--nbval-cell-timeout 3600" in makefile
    assert "-p tools.patience" in makefile
    assert "timeout=None" in (ROOT / "tools" / "notebooks.py").read_text(encoding="utf-8")
