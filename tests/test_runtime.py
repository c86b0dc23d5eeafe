"""Tests of course_lib.runtime."""

import os
import random
import subprocess
import sys
from time import perf_counter

import pytest
import torch

from course_lib import runtime
from course_lib.runtime import GB, CourseError, Gpu, decide


def machine_with(capability=None, override=None):
    gpu = Gpu("Fake", capability, 15 * GB) if capability else None
    return decide(gpu, override, cores=2, memory_bytes=8 * GB)


@pytest.mark.parametrize(
    ("capability", "device", "dtype"),
    [
        (None, "cpu", "float32"),
        ((6, 0), "cuda", "float16"),
        ((7, 0), "cuda", "float16"),
        ((7, 5), "cuda", "float16"),
        ((8, 0), "cuda", "bfloat16"),
        ((8, 9), "cuda", "bfloat16"),
        ((9, 0), "cuda", "bfloat16"),
        ((12, 0), "cuda", "bfloat16"),
    ],
)
def test_dtype_follows_from_capability(capability, device, dtype):
    machine = machine_with(capability)
    assert (machine.device, machine.dtype) == (device, dtype)
    assert machine.torch_dtype == getattr(torch, dtype)


def test_detect_does_not_believe_a_t4_that_claims_bf16(monkeypatch):
    properties = type(
        "Properties", (), {"name": "Tesla T4", "major": 7, "minor": 5, "total_memory": 15 * GB}
    )
    monkeypatch.delenv("COURSE_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert runtime.detect().dtype == "float16"


def test_override_wins_and_says_so():
    assert machine_with((7, 5), "cpu").device == "cpu"
    assert "COURSE_DEVICE=cpu" in machine_with((7, 5), "cpu").reason


def test_asking_for_an_absent_gpu_falls_back_in_one_line():
    machine = machine_with(None, "cuda")
    assert machine.device == "cpu"
    assert "COURSE_DEVICE=cuda" in str(machine)
    assert "\n" not in str(machine)


def test_an_unknown_override_is_refused_with_the_choices():
    with pytest.raises(CourseError, match="COURSE_DEVICE='gpu' is not known, expected cpu or cuda"):
        machine_with(None, "gpu")


def test_choose_picks_by_device():
    assert machine_with().choose(cpu=1, gpu=2) == 1
    assert machine_with((7, 5)).choose(cpu=1, gpu=2) == 2


def test_seeding_repeats_python_and_torch():
    draws = []
    for _ in range(2):
        runtime.seed_everything(3)
        draws.append((random.random(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_measure_sees_a_block_of_memory_while_it_lives():
    """In a process of its own: one that has freed much memory may keep it, and then a new block
    needs none from the system.
    """
    code = """
import time
from course_lib import runtime
with runtime.measure() as before:
    pass
with runtime.measure() as cost:
    block = b"x" * (200 * 2**20)
    time.sleep(5 * runtime.SAMPLING_SECONDS)
    del block
print((cost.peak_bytes - before.peak_bytes) // 2**20, cost.seconds > 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    mebibytes, took_time = result.stdout.split()
    assert 150 < int(mebibytes) < 300, result.stderr
    assert took_time == "True"


def test_measure_reports_a_block_that_failed():
    with pytest.raises(KeyError), runtime.measure() as cost:
        raise KeyError
    assert cost.seconds > 0


def test_a_course_error_in_a_notebook_is_one_line():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("from course_lib.runtime import CourseError")
    error = shell.run_cell("raise CourseError('found 3, expected 4: add one')").error_in_exec
    assert error._render_traceback_() == ["CourseError: found 3, expected 4: add one"]


def test_importing_the_package_imports_nothing_heavy():
    code = "import course_lib, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_importing_the_package_takes_less_than_three_tenths_of_a_second():
    def seconds(code):
        """The least of five, in fresh interpreters: what else the machine does only adds to it."""
        times = []
        for _ in range(5):
            start = perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(perf_counter() - start)
        return min(times)

    assert seconds("import course_lib") - seconds("pass") < 0.3


def test_the_data_folder_is_found():
    assert (runtime.data_folder() / "structured_answers.json").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_spin_briefly_unless_told_otherwise(environment, spins):
    """What torch's OpenMP has read from the environment when it was loaded."""
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    result = subprocess.run(
        [sys.executable, "-c", "import course_lib, torch"],
        env=inherited | environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in result.stderr


def test_quiet_transformers_leaves_bars_as_they_were():
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    try:
        for switch, after in (
            (logging.disable_progress_bar, False),
            (logging.enable_progress_bar, True),
        ):
            switch()
            with runtime.quiet_transformers():
                assert not logging.is_progress_bar_enabled()
            assert logging.is_progress_bar_enabled() == after
    finally:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
