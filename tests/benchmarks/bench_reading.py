"""Reading instruction records.

`alpaca.read_records` on JSON files of random records with answers of about 50 words; 52,000 is the
size of the Alpaca data. The
slope is that of log seconds over log records, for each round: 1 is linear. Memory is what reading
    adds in a fresh process.
"""

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

from course_lib import alpaca, runtime
from tests.benchmarks.measuring import interleaved

SIZES = (1_000, 4_000, 13_000, 26_000, 52_000)
WORDS = (
    "river stone lamp seven green quiet carry under letter bread morning salt engine paper north "
    "early"
).split()
READ_IN_A_FRESH_PROCESS = """
import sys, psutil
from course_lib import alpaca, runtime
before = psutil.Process().memory_info().rss
with runtime.measure() as cost:
    reading = alpaca.read_records(sys.argv[1])
print(len(reading.records), cost.peak_bytes - before)
"""


def write_records(path: Path, count: int) -> Path:
    generator = random.Random(0)

    def text(words: int) -> str:
        return " ".join(generator.choices(WORDS, k=words))

    rows = [
        {"instruction": f"{text(9)} {number}", "input": text(number % 2 * 6), "output": text(50)}
        for number in range(count)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_reading_takes_time_in_proportion_to_the_records(tmp_path, row):
    seconds = {}
    for size in SIZES:
        path = write_records(tmp_path / f"{size}.json", size)

        def read(path=path, size=size) -> tuple[float, int]:
            with runtime.measure() as cost:
                reading = alpaca.read_records(path)
            assert not reading.refused
            return cost.seconds, len(reading.records)

        rounds = interleaved({"read": read})
        assert rounds.work == size
        seconds[size] = rounds.seconds["read"]
        row(f"{size:,} records, {path.stat().st_size / 1e6:.1f} MB", seconds[size], "s")
    sizes = [math.log(size) for size in SIZES]
    slopes = [
        statistics.linear_regression(sizes, [math.log(taken) for taken in one_round]).slope
        for one_round in zip(*seconds.values(), strict=True)
    ]
    row("slope of log seconds over log records", slopes, "", at_most=1.1)


def test_reading_takes_little_memory(tmp_path, row):
    path = write_records(tmp_path / "records.json", SIZES[-1])
    command = [sys.executable, "-c", READ_IN_A_FRESH_PROCESS, str(path)]
    count, peak_bytes = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(count) == SIZES[-1]
    row(f"memory for {SIZES[-1]:,} records", int(peak_bytes) / 1e6, "MB")
