"""Tests of how the benchmarks measure and report; the benchmarks themselves are run by `make
bench`.
"""

import re

import pytest

from tests.benchmarks import conftest
from tests.benchmarks.measuring import interleaved, measured, table

pytest_plugins = ["pytester"]


def scripted(seconds, log, name, work="ten records"):
    """An arm that takes these seconds, the first of them to warm up."""
    remaining = iter(seconds)

    def arm():
        log.append(name)
        return next(remaining), work

    return arm


def test_arms_run_alternately_and_the_warm_up_does_not_count():
    log = []
    rounds = interleaved(
        {"a": scripted([99, 1, 2, 4], log, "a"), "b": scripted([99, 3, 3, 3], log, "b")}, rounds=3
    )
    assert "".join(log) == "ab" + "ab" + "ba" + "ab"
    assert rounds.seconds == {"a": [1, 2, 4], "b": [3, 3, 3]}
    assert rounds.work == "ten records"


def test_ratios_are_taken_within_a_round():
    rounds = interleaved(
        {"ours": scripted([0, 1, 10], [], "ours"), "theirs": scripted([0, 2, 30], [], "theirs")},
        rounds=2,
    )
    assert rounds.times_faster("ours", than="theirs") == [2, 3]
    assert rounds.rates("ours", 20) == [20, 2]


def test_arms_that_do_different_work_are_refused():
    arms = {"a": scripted([1, 1], [], "a"), "b": scripted([1, 1], [], "b", work="nine records")}
    with pytest.raises(AssertionError, match="different work: ten records expected.*nine records"):
        interleaved(arms, rounds=1)


@pytest.mark.parametrize(
    ("at_least", "at_most", "missed"),
    [(2, None, False), (2.1, None, True), (None, 2, False), (None, 1.9, True)],
)
def test_a_promise_is_about_the_median(at_least, at_most, missed):
    row = measured("speed", [1, 2, 9], "times", at_least=at_least, at_most=at_most)
    assert (row.value, row.spread, row.missed) == ("2", "1 to 9", missed)


def test_a_row_without_a_promise_cannot_miss_it():
    assert not measured("speed", 3.0, "s").missed
    assert table([measured("speed", 3.0, "s")])[-1] == "| speed | 3 | s |  |  |"


BENCH = '''"""Sums.

How they were taken.
"""

import pytest


def test_a_kept_promise(row):
    row("kept", [1.0, 2.0, 3.0], "s", at_most=2)


def test_a_missed_promise(row):
    row("missed", 5.0, "s", at_most=2)
    row("after the miss", 1.0, "s")


def test_what_is_not_here():
    pytest.skip("there is no data")


def test_a_crash():
    raise RuntimeError
'''


def test_the_document_shows_misses_absences_and_crashes_and_the_run_fails(pytester, monkeypatch):
    monkeypatch.setattr(conftest, "describe_machine", lambda: "A machine with 2 cores")
    monkeypatch.setattr(conftest, "LIBRARIES", ("torch",))
    pytester.makepyfile(bench_sums=BENCH)
    result = pytester.runpytest_inprocess(
        "--benchmarks-table", "table.md", "bench_sums.py", plugins=[conftest]
    )
    result.assert_outcomes(passed=2, failed=1, errors=1, skipped=1)
    result.stdout.fnmatch_lines(["*missed: 5 s, promised ≤ 2: [*][*]missed[*][*]"])
    text = (pytester.path / "table.md").read_text(encoding="utf-8")
    stamp, *lines = text.partition("## Sums\n")[2].strip().splitlines()
    assert re.fullmatch(
        r"\*Measured \d{4}-\d\d-\d\d: A machine with 2 cores\. Python 3.*\.\*", stamp
    )
    assert lines == [
        "",
        "How they were taken.",
        "",
        "| what | median | unit | lowest to highest | promise |",
        "| --- | ---: | --- | --- | --- |",
        "| kept | 2 | s | 1 to 3 | ≤ 2: kept |",
        "| missed | 5 | s |  | ≤ 2: **missed** |",
        "| after the miss | 1 | s |  |  |",
        "",
        "Not measured: there is no data.",
        "",
        "**Did not finish**: `test_a_crash`.",
    ]


def test_the_tables_are_not_written_unless_asked_for(pytester):
    pytester.makepyfile(bench_sums=BENCH)
    result = pytester.runpytest_inprocess("bench_sums.py", "-k", "kept", plugins=[conftest])
    result.stdout.fnmatch_lines(["| kept | 2 | s | 1 to 3 | ≤ 2: kept |"])
    assert not list(pytester.path.glob("*.md"))


def test_a_run_of_one_file_keeps_the_other_sections(pytester, monkeypatch):
    monkeypatch.setattr(conftest, "describe_machine", lambda: "A machine")
    monkeypatch.setattr(conftest, "LIBRARIES", ("torch",))
    pytester.makepyfile(bench_sums=BENCH, bench_products=BENCH.replace("Sums", "Products"))
    for file in ("bench_sums.py", "bench_products.py", "bench_sums.py"):
        pytester.runpytest_inprocess(
            "--benchmarks-table", "table.md", "-k", "kept", file, plugins=[conftest]
        )
    lines = (pytester.path / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## Products", "## Sums"]
    assert lines.count("| kept | 2 | s | 1 to 3 | ≤ 2: kept |") == 2
