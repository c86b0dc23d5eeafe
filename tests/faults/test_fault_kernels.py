"""A kernel that dies, as it does when the memory is used up: the run ends with a failure that names the notebook, and soon."""

import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from course_lib import notebooks

ROOT = Path(__file__).parents[2]
CELL_TIMEOUT = 3  # seconds, in place of the Makefile's
KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def dying_notebook(tmp_path):
    """A notebook whose second cell kills its kernel."""
    cells = [new_code_cell(source, execution_count=number) for number, source in enumerate(("x = 1", KILL, "print(x)"), start=1)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "day1_trial.ipynb")
    return tmp_path / "day1_trial.ipynb"


@pytest.mark.fault("F35", "a cell kills its kernel: make run")
def test_a_kernel_that_dies_ends_its_notebook_within_seconds(dying_notebook, survived):
    before = dying_notebook.read_bytes()
    start = perf_counter()
    execution = notebooks.execute(dying_notebook)
    assert perf_counter() - start < 30
    assert execution.failure.startswith("cell 2/3: ")
    assert "died" in execution.failure
    survived(said=str(execution).partition(", ")[0], lost=[] if dying_notebook.read_bytes() == before else [dying_notebook])


@pytest.mark.fault("F35", "a cell kills its kernel: make test, with a cell timeout of 3 s")
def test_nbval_ends_with_a_failure_soon_after_the_cell_timeout(dying_notebook, survived):
    before = dying_notebook.read_bytes()
    options = ["-p", "no:cacheprovider", "--nbval", f"--nbval-cell-timeout={CELL_TIMEOUT}", "-v"]
    start = perf_counter()
    result = subprocess.run([sys.executable, "-m", "pytest", *options, dying_notebook], cwd=ROOT, capture_output=True, text=True)
    assert perf_counter() - start < CELL_TIMEOUT + 40, "the time-out once, and what pytest and a kernel take to start and end"
    assert result.returncode == 1
    (failed,) = re.findall(r"^FAILED .*(day1_trial\.ipynb::Cell \d)", result.stdout, re.MULTILINE)
    (reason,) = set(re.findall(r"Timeout of .*", result.stdout))  # where CI is set, the summary repeats it
    assert failed.endswith("Cell 1"), "counted from 0"
    survived(said=f"{failed}: {reason}", lost=[] if dying_notebook.read_bytes() == before else [dying_notebook])


def test_make_test_waits_for_a_dead_kernel_no_longer_than_five_minutes():
    (seconds,) = re.findall(r"--nbval-cell-timeout[ =](\d+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert int(seconds) <= 300
