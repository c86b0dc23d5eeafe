"""The table of faults.

Each test in this folder makes one happen and reports what was said and what was lost:

    @pytest.mark.fault("F3", "the Hub answers {status}")    # {...}: parameters of the test
    @pytest.mark.parametrize("status", [401, 403])
    def test_a_gated_model_is_named(status, survived): ...
        survived(said=line, lost=files_that_changed)

`make faults` prints the rows and writes them to docs/faults.md. A fault that loses something, or is
said in several lines, fails.
"""

import datetime
import re
import tempfile
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path

import pytest

HEADER = ("fault", "what was done", "what was said", "lost")
ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers", "datasets", "safetensors")
Survived = Callable[[str | Exception, Collection[object]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults-table",
        metavar="FILE",
        type=Path,
        help="print the table of faults and write it to FILE",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(number, done): a row of the table of faults; see tests/faults/conftest.py"
    )


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Survived:
    """Report a row: `said` is a line or the error that says it, `lost` what is gone: nothing."""
    number, done = request.node.get_closest_marker("fault").args
    if hasattr(request.node, "callspec"):
        done = done.format(**request.node.callspec.params)

    def report(said: str | Exception, lost: Collection[object]) -> None:
        line = said if isinstance(said, str) else f"{type(said).__name__}: {said}"
        assert line.strip(), f"{done}: nothing was said"
        assert "\n" not in line.strip(), f"{done}: said in several lines: {line}"
        assert not lost, f"{done}: lost {lost}"
        request.node.user_properties.append(
            ("fault", (number, done, _without_this_machine(line), "nothing"))
        )

    return report


def _without_this_machine(line: str) -> str:
    """The line without temporary folders, the checkout's place, ports and the bars that would end a
    table's cell.
    """
    line = line.replace(f"{ROOT}/", "")
    line = re.sub(
        re.escape(tempfile.gettempdir())
        + r"(/pytest-of-[^/\s]+/pytest-\d+(/popen-gw\d+)?/[^/\s:;,)]+)?",
        "…",
        line,
    )
    return re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", line).replace("|", "\\|").strip()


def _place(number: str) -> tuple[bool, list[int]]:
    """Where a number stands: "F9", "F10", ..., then those of the days, "D2.9", "D2.10"."""
    return number.startswith("D"), [int(part) for part in re.findall(r"\d+", number)]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    target = config.getoption("faults_table", None)
    if target is None:
        return
    reports = terminalreporter.stats.get("passed", [])
    rows = {
        tuple(value)
        for report in reports
        for name, value in report.user_properties
        if name == "fault"
    }
    rows = sorted(rows, key=lambda row: (_place(row[0]), row))
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *rows)]
    failed = len(terminalreporter.stats.get("failed", [])) + len(
        terminalreporter.stats.get("error", [])
    )
    terminalreporter.write_line(
        "\n".join(["", *lines, "", f"{len(rows)} faults survived, {failed} tests failed"])
    )
    if failed:
        terminalreporter.write_line(f"{target} was not changed")
        return
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    preface = (
        "Made by `make faults`, which fails when one of these loses something. Each row is a test "
        "in `tests/faults`; paths and\n"
        f"ports are shortened. {datetime.date.today()}, {versions}."
    )
    target.write_text(
        "\n".join(["# Faults survived", "", preface, "", *lines, ""]), encoding="utf-8"
    )
