"""F34: old packages, a kernel older than its packages, and what else a preflight can see before the
first cell is run.
"""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from course_lib import preflight
from tests.fixtures.packages import disk_with, doctor, lines, write_package
from tools import notebooks

REQUIRE = "from course_lib import preflight; preflight.require()"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder in which the user works, with a file of theirs; calling it gives what is gone."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "answers.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return lambda: [] if (folder / "answers.txt").read_text() == "mine" else ["answers.txt"]


def the_problem(said):
    """The one line of the doctor that is a problem."""
    (line,) = [line for line in said if line.startswith("problem")]
    return line


@pytest.mark.fault("F34", "transformers {version} is installed")
@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_another_transformers_is_named_before_it_is_imported(
    version, site, course_requires, work, survived
):
    course_requires("transformers>=5.15,<6")
    write_package(site, "transformers", version, "raise SystemError('imported')")
    code, said, errors = doctor()
    assert (code, errors) == (1, "")
    assert 'pip install "transformers>=5.15,<6", then restart the runtime' in the_problem(said)
    survived(said=the_problem(said), lost=work())


@pytest.mark.fault("F34", "pip replaces a package while the kernel runs")
def test_a_kernel_older_than_its_packages_is_told_to_restart(site, course_requires, work, survived):
    course_requires("replaced>=1")
    write_package(site, "replaced", "1.0", "__version__ = '1.0'")
    pip = f"""
import sys
from importlib import metadata
from pathlib import Path
old = Path({str(site)!r}) / "replaced-1.0.dist-info"
new = old.rename(old.with_name("replaced-2.0.dist-info"))
old = (new / "METADATA").read_text()
(new / "METADATA").write_text(old.replace("Version: 1.0", "Version: 2.0"))
"""
    cells = [new_code_cell(source) for source in ("kept = 1; import replaced", pip, REQUIRE)]
    nbformat.write(new_notebook(cells=cells), "day1_trial.ipynb")
    execution = notebooks.execute(site.parent / "work" / "day1_trial.ipynb")
    expected = (
        "cell 3/3: CourseError: replaced 2.0 is installed, but this kernel still runs 1.0: restart "
        "the runtime"
    )
    assert execution.failure == expected
    survived(said=execution.failure, lost=work())


@pytest.mark.fault("F34", "numpy does not fit the compiled modules")
def test_a_broken_numpy_is_named_without_a_traceback(site, course_requires, work, survived):
    course_requires()
    cause = (
        "numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header, "
        "got 88 from PyObject"
    )
    (site / "numpy.py").write_text(f"raise ValueError({cause!r})")
    code, said, errors = doctor()
    assert (code, errors) == (1, "")
    assert the_problem(said).startswith(
        f"problem  numpy cannot be imported ({cause}): restart the runtime; if it stays so, pip"
    )
    survived(said=the_problem(said), lost=work())


@pytest.mark.fault("F34", "{package} is not installed")
@pytest.mark.parametrize("package", ["typer", "packaging"])
def test_a_missing_package_of_the_command_line_itself_is_one_line(package, site, work, survived):
    (site / f"{package}.py").write_text(
        f"raise ModuleNotFoundError('No module named {package}', name={package!r})"
    )
    code, said, errors = doctor()
    assert (code, said) == (1, [])
    assert errors.startswith(f"CourseError: {package} is missing: run `make setup`")
    survived(said=errors.strip(), lost=work())


@pytest.fixture
def imported(course_requires, monkeypatch):
    """Packages are as they should be, and need not be imported again."""
    course_requires()
    monkeypatch.setattr(preflight, "IMPORTED", ())


@pytest.mark.fault("F34", "the base model's wheel was never fetched")
def test_a_missing_wheel_is_said_with_what_takes_its_place(imported, empty_cache, work, survived):
    found = list(preflight.findings(ask_hub=False))
    assert lines(found, "problem") == []
    (line,) = [line for line in lines(found, "note") if line.startswith("base model")]
    assert line.startswith(f"base model: not in {empty_cache / 'smollm2-135m'} yet")
    assert line.endswith("from the wheel (pip, 93 MB), else from the Hub, else tiny is used")
    assert not empty_cache.exists(), "looking leaves nothing behind"
    survived(said=line, lost=work())


@pytest.mark.fault("F34", "the disk is full before the base model is there")
def test_a_full_disk_is_a_problem_with_the_bytes_needed(
    imported, empty_cache, work, monkeypatch, survived
):
    monkeypatch.setattr(preflight.shutil, "disk_usage", disk_with(1_000_000))
    (line,) = lines(preflight.findings(ask_hub=False), "problem")
    advice = "free some, or set COURSE_CACHE to another folder"
    assert line == f"disk: 0.00 GB free in {empty_cache}, the base model takes 0.64 GB: {advice}"
    preflight.require()  # no reason to stop a notebook, which goes on with `tiny`
    survived(said=line, lost=work())
