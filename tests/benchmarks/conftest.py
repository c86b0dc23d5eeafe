"""The tables of benchmarks.

A file `bench_*.py` in this folder is a section: its docstring is the heading and the text below it,
and each test reports rows:

    def test_packing_is_faster(row):
        rounds = interleaved({"padded": padded, "packed": packed})
        row("packed / padded", rounds.times_faster("packed", than="padded"), "times", at_least=1.3)

`make bench` prints the tables and writes them to docs/benchmarks.md, and fails if a promise is
missed. With FILES=tests/benchmarks/bench_reading.py it measures one section again and keeps the
others.
"""

import ast
import datetime
import platform
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.benchmarks.measuring import ROUNDS, Row, describe_machine, measured, table

LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets")
MACHINE = pytest.StashKey[str]()
PREFACE = f"""Made by `make bench`, which fails when a promise is missed. A comparison runs its arms
alternately in one process, on all cores: a warm-up each, then {ROUNDS} rounds, every other one in
reverse order. Arms that did not do the same work are refused. A value is the median over the
rounds, a ratio the median of the ratios within rounds. No network is used. Nothing here holds for
GPUs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmarks-table",
        metavar="FILE",
        type=Path,
        help="write the tables of benchmarks to FILE",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("benchmarks_table", None):
        session.config.stash[MACHINE] = describe_machine()


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Report a row of this file's table, with the arguments of `measured`.

    A missed promise fails the test at its end.
    """
    missed = []

    def add(*arguments: object, **promise: float) -> None:
        line = measured(*arguments, **promise)
        request.node.user_properties.append(("row", line))
        if line.missed:
            missed.append(f"{line.what}: {line.value} {line.unit}, promised {line.promise}")

    yield add
    if missed:
        pytest.fail("; ".join(missed), pytrace=False)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    kinds = ("passed", "failed", "error", "skipped")
    reports = [
        report
        for kind in kinds
        for report in terminalreporter.stats.get(kind, [])
        if isinstance(report, pytest.TestReport)
    ]
    if not any(name == "row" for report in reports for name, _ in report.user_properties):
        return
    sections = {}
    for file in sorted({report.nodeid.partition("::")[0] for report in reports}):
        ours = [report for report in reports if report.nodeid.startswith(f"{file}::")]
        sections[title_and_text(config.rootpath / file)[0]] = section(config.rootpath / file, ours)
    terminalreporter.write_line("\n".join(line for lines in sections.values() for line in lines))
    target = config.getoption("benchmarks_table", None)
    if target:
        versions = ", ".join(
            [
                f"Python {platform.python_version()}",
                *(f"{name} {version(name)}" for name in LIBRARIES),
            ]
        )
        stamp = f"*Measured {datetime.date.today()}: {config.stash[MACHINE]}. {versions}.*"
        measured_now = {
            title: "\n".join([lines[0], "", stamp, *lines[1:]]).rstrip() + "\n"
            for title, lines in sections.items()
        }
        parts = kept_sections(target) | measured_now
        target.write_text(
            "\n".join(
                ["# Benchmarks", "", PREFACE, "", *(parts[title] for title in sorted(parts))]
            ),
            encoding="utf-8",
        )


def kept_sections(target: Path) -> dict[str, str]:
    """The sections of an earlier run by title; a run of single files replaces only theirs."""
    text = target.read_text(encoding="utf-8") if target.exists() else ""
    return {
        part.partition("\n")[0]: f"## {part.rstrip()}\n"
        for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    }


def title_and_text(file: Path) -> tuple[str, str]:
    title, _, text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).partition("\n")
    return title.rstrip("."), text.strip()


def section(file: Path, reports: list[pytest.TestReport]) -> list[str]:
    """Heading, text and table of one file, and what could not be measured."""
    title, text = title_and_text(file)
    calls = [report for report in reports if report.when == "call"]
    rows: list[Row] = [
        value for report in calls for name, value in report.user_properties if name == "row"
    ]
    notes = [
        f"Not measured: {report.longrepr[2].removeprefix('Skipped: ')}."
        for report in reports
        if report.skipped
    ]
    broken = [report for report in reports if report.failed and report.when != "teardown"]
    notes += [f"**Did not finish**: `{report.nodeid.partition('::')[2]}`." for report in broken]
    parts = [[f"## {title}"], text.splitlines(), table(rows), *([note] for note in notes)]
    return [line for part in parts if part for line in (*part, "")]
