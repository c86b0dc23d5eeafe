"""Notebooks.

Each is executed once, as `make run` does it: seconds, peak memory of its kernel, and the cell that
took longest, with the heading above it.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools import notebooks

ROOT = Path(__file__).parents[2]
NOTEBOOKS = notebooks.find_notebooks(ROOT / "notebooks")
# A process of its own: a kernel's memory is sampled from its fork on, and a fork begins with the
# memory of what forked it.
EXECUTE = """
import sys
from pathlib import Path
from tools import notebooks
execution = notebooks.execute(Path(sys.argv[1]))
print(execution.failure or f"done {execution.seconds} {execution.peak_bytes}")
"""
CELL = re.compile(r"cell (\d+)/\d+: (\d+) s$", re.MULTILINE)  # what `execute` prints of a slow cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_takes_three_minutes_and_four_gigabytes_at_most(path, row):
    command = [sys.executable, "-c", EXECUTE, str(path)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    done, *numbers = printed.splitlines()[-1].split()
    assert done == "done", printed
    seconds, peak_bytes = map(float, numbers)
    row(path.stem, seconds, "s", at_most=180)
    row(f"{path.stem}: peak memory", peak_bytes / 1e9, "GB", at_most=4)
    slow = [(int(taken), int(number)) for number, taken in CELL.findall(printed)]
    if slow:
        taken, number = max(slow)
        row(f"{path.stem}: code cell {number}, “{heading_above(path, number)}”", taken, "s")


def heading_above(path: Path, number: int) -> str:
    """The last heading before the code cell with this number, counted from 1."""
    heading = ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            number -= 1
        if number == 0:
            break
        headings = (
            re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)
            if cell.cell_type == "markdown"
            else []
        )
        heading = headings[-1] if headings else heading
    return heading
