"""Tests of the repository's command line: one line for a mistake, never a traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tools import __main__

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tools(monkeypatch, capsys):
    """The command line in this process: (exit code, lines on stdout, the message it exits with)."""

    def call(*arguments, folder):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["tools", *arguments])
        with pytest.raises(SystemExit) as stop:
            __main__.main()
        message = stop.value.code if isinstance(stop.value.code, str) else ""
        return (
            (1 if message else stop.value.code or 0),
            capsys.readouterr().out.splitlines(),
            message,
        )

    return call


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name, source in {
        "day1_good": "print('done')",
        "day2_bad": "1 / 0",
        "day3_good": "print('done too')",
    }.items():
        cell = new_code_cell(source)
        nbformat.write(new_notebook(cells=[cell]), tmp_path / "notebooks" / f"{name}.ipynb")
    return tmp_path


def test_a_failing_day_is_named_the_rest_runs_and_the_exit_code_says_so(checkout):
    command = [sys.executable, "-m", "tools", "run"]
    result = subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert (
        "1 of 3 notebooks failed: day2_bad: cell 1/1: ZeroDivisionError: division by zero"
        in result.stderr
    )
    assert "Traceback" not in result.stdout + result.stderr
    page = (checkout / "build" / "course" / "index.html").read_text(encoding="utf-8")
    assert "ZeroDivisionError" in page
    assert "done too" in (checkout / "build" / "course" / "day3_good.html").read_text(
        encoding="utf-8"
    )


def test_one_day_can_be_run_and_kept(checkout, tools):
    code, lines, _ = tools("run", "--day", "1", "--keep", folder=checkout)
    assert code == 0
    assert lines[-1].startswith("the course as a page: ")
    assert "done\\n" in (checkout / "notebooks" / "day1_good.ipynb").read_text(encoding="utf-8")


def test_a_failed_day_is_not_kept(checkout, tools):
    before = (checkout / "notebooks" / "day2_bad.ipynb").read_text(encoding="utf-8")
    assert tools("run", "--day", "2", "--keep", folder=checkout)[0] == 1
    assert (checkout / "notebooks" / "day2_bad.ipynb").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "device", "message"),
    [
        (["run", "--day", "6"], "cpu", "CourseError: no notebook of day 6 in notebooks/"),
        (["run"], "tpu", "CourseError: COURSE_DEVICE='tpu' is not known, expected cpu or cuda"),
    ],
)
def test_a_mistake_is_one_line(checkout, tools, monkeypatch, arguments, device, message):
    monkeypatch.setenv("COURSE_DEVICE", device)
    code, _, said = tools(*arguments, folder=checkout)
    assert code == 1
    assert said.startswith(message)
    assert "\n" not in said


def test_an_output_folder_that_cannot_be_made_is_said_before_anything_runs(checkout, tools):
    (checkout / "build").write_text("in the way")
    code, lines, said = tools("run", "--day", "1", folder=checkout)
    assert code == 1
    assert said.startswith("CourseError: build/course cannot be written")
    assert not any("day1" in line for line in lines)


@pytest.mark.parametrize(
    ("project", "message"),
    [
        ("[project]", "CourseError: no address under"),
        ("[project", "CourseError: no address under"),
        (
            '[project.urls]\nRepository = "git@github.com:a/b.git"',
            "CourseError: the address 'git@github.com:a/b.git' in pyproject.toml is not",
        ),
    ],
)
def test_an_address_that_cannot_be_stamped_is_one_line(tmp_path, tools, project, message):
    (tmp_path / "pyproject.toml").write_text(project)
    code, _, said = tools("stamp", folder=tmp_path)
    assert code == 1
    assert said.startswith(message)
    assert "\n" not in said


def test_stamping_a_stamped_checkout_changes_nothing(tmp_path, tools):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    assert tools("stamp", folder=tmp_path)[1] == [
        "every badge and Colab cell already has the address"
    ]
