"""The tables of benchmarks. A file `bench_*.py` in this folder is a section: its docstring is the heading and the text below it,
and each test reports rows:

    def test_packing_is_faster(row):
        rounds = interleaved({"padded": padded, "packed": packed})
        row("packed / padded", rounds.times_faster("packed", than="padded"), "times", at_least=1.3)

`make bench` prints the tables and writes them to docs/benchmarks.md, and fails if a promise is missed.
"""

import ast
import datetime
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.benchmarks.measuring import ROUNDS, Row, describe_machine, measured, table

LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets")
MACHINE = pytest.StashKey[str]()
PREFACE = f"""Made by `make bench`, which fails when a promise is missed. A comparison runs its arms alternately in one process, on
all cores: a warm-up each, then {ROUNDS} rounds, every other one in reverse order. Arms that did not do the same work are refused.
A value is the median over the rounds, a ratio the median of the ratios within rounds. No network is used. Nothing here holds
for GPUs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmarks-table", metavar="FILE", type=Path, help="write the tables of benchmarks to FILE")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("benchmarks_table", None):
        session.config.stash[MACHINE] = describe_machine()


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Report a row of this file's table, with the arguments of `measured`. A missed promise fails the test at its end."""
    missed = []

    def add(*arguments: object, **promise: float) -> None:
        line = measured(*arguments, **promise)
        request.node.user_properties.append(("row", line))
        if line.missed:
            missed.append(f"{line.what}: {line.value} {line.unit}, promised {line.promise}")

    yield add
    if missed:
        pytest.fail("; ".join(missed), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [report for kind in ("passed", "failed", "error", "skipped") for report in terminalreporter.stats.get(kind, [])]
    if not any(name == "row" for report in reports for name, _ in report.user_properties):
        return
    lines = []
    for file in sorted({report.nodeid.partition("::")[0] for report in reports}):
        lines += section(config.rootpath / file, [report for report in reports if report.nodeid.startswith(f"{file}::")])
    terminalreporter.write_line("\n".join(lines))
    target = config.getoption("benchmarks_table", None)
    if target:
        versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)])
        head = ["# Benchmarks", "", PREFACE, "", f"{datetime.date.today()}. {config.stash[MACHINE]}. {versions}.", ""]
        target.write_text("\n".join([*head, *lines]), encoding="utf-8")


def section(file: Path, reports: list[pytest.TestReport]) -> list[str]:
    """Heading, text and table of one file, and what could not be measured."""
    title, _, text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).partition("\n")
    calls = [report for report in reports if report.when == "call"]
    rows: list[Row] = [value for report in calls for name, value in report.user_properties if name == "row"]
    notes = [f"Not measured: {report.longrepr[2].removeprefix('Skipped: ')}." for report in reports if report.skipped]
    broken = [report for report in reports if report.failed and report.when != "teardown"]
    notes += [f"**Did not finish**: `{report.nodeid.partition('::')[2]}`." for report in broken]
    parts = [[f"## {title.rstrip('.')}"], text.strip().splitlines(), table(rows), *([note] for note in notes)]
    return [line for part in parts if part for line in (*part, "")]
