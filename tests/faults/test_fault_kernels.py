"""A kernel that dies, as it does when the memory is used up, or hangs: the run ends with a failure
that names it, and soon.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tools import notebooks, patience

ROOT = Path(__file__).parents[2]
SILENCE = 6  # seconds, in place of two minutes
FAULTS = {
    "kills its kernel": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "the kernel died: was its memory used up?",
    ),
    "waits for ever": (
        "import threading\nthreading.Event().wait()",
        f"the kernel used 0.0 CPU-seconds in {SILENCE} s: it hangs, and was ended",
    ),
}


@pytest.fixture
def notebook(request, tmp_path):
    """A notebook whose second cell does it, and what is to be said."""
    source, said = FAULTS[request.param]
    cells = [
        new_code_cell(source, execution_count=number)
        for number, source in enumerate(("x = 1", source, "print(x)"), start=1)
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "day1_trial.ipynb")
    return tmp_path / "day1_trial.ipynb", said


def rows(command):
    kills, waits = FAULTS
    died = pytest.mark.fault("F35", f"a cell {kills}: {command}")
    hung = pytest.mark.fault("F35", f"a cell {waits}: {command}, with a silence of {SILENCE} s")
    rows = [pytest.param(kills, marks=died), pytest.param(waits, marks=[hung, pytest.mark.slow])]
    return pytest.mark.parametrize("notebook", rows, indirect=True)


@rows("make run")
def test_a_kernel_that_dies_or_hangs_ends_its_notebook_soon(notebook, monkeypatch, survived):
    path, said = notebook
    monkeypatch.setattr(patience, "SILENCE_SECONDS", SILENCE)
    before = path.read_bytes()
    start = perf_counter()
    execution = notebooks.execute(path)
    assert perf_counter() - start < 60
    assert execution.failure == f"cell 2/3: {said}"
    survived(
        said=f"{execution.path.stem}: {execution.failure}",
        lost=[] if path.read_bytes() == before else [path],
    )


@pytest.mark.slow
@rows("make test")
def test_nbval_ends_with_a_failure_that_says_why(notebook, tmp_path, survived):
    path, said = notebook
    before = path.read_bytes()
    (tmp_path / "impatient.py").write_text(
        f"from tools import patience\npatience.SILENCE_SECONDS = {SILENCE}\n"
    )
    plugins = ["-p", "no:cacheprovider", "-p", "tools.patience", "-p", "impatient"]
    options = ["--nbval", "--nbval-cell-timeout=3600", "-v"]
    command = [sys.executable, "-m", "pytest", *plugins, *options, str(path)]
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    start = perf_counter()
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert perf_counter() - start < 90
    assert result.returncode == 1
    (failed,) = re.findall(r"^FAILED .*(day1_trial\.ipynb::Cell \d)", result.stdout, re.MULTILINE)
    assert failed.endswith("Cell 1"), "counted from 0"
    assert said in result.stdout
    survived(said=f"{failed}: {said}", lost=[] if path.read_bytes() == before else [path])
