"""How the benchmarks measure: arms run alternately in one process, and the limits of the machine
they ran on.
"""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from course_lib import runtime

Arm = Callable[[], tuple[float, object]]
ROUNDS = 5
GEMM_SIZES = (512, 1024, 2048)
COPIED_BYTES = 2**29  # far above any cache
REPEATS = 5


@dataclass(frozen=True)
class Rounds:
    """seconds: of each arm, one a round; work: what every arm did in every round."""

    seconds: dict[str, list[float]]
    work: object

    def rates(self, arm: str, amount: float) -> list[float]:
        """`amount` a second, one a round."""
        return [amount / seconds for seconds in self.seconds[arm]]

    def times_faster(self, arm: str, than: str) -> list[float]:
        """How many times faster `arm` was than another, one a round."""
        return [
            slow / fast for fast, slow in zip(self.seconds[arm], self.seconds[than], strict=True)
        ]


def interleaved(arms: Mapping[str, Arm], rounds: int = ROUNDS) -> Rounds:
    """Run every arm once to warm up, then all of them in every round, every other round in reverse
    order.

    An arm prepares untimed and returns (seconds, work); all must have done the same work, or the
    comparison is refused.
    """
    works = {name: arm()[1] for name, arm in arms.items()}
    expected = next(iter(works.values()))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[:: 1 if number % 2 == 0 else -1]:
            taken, works[name] = arms[name]()
            seconds[name].append(taken)
        assert all(work == expected for work in works.values()), (
            f"the arms did different work: {expected} expected, {works}"
        )
    return Rounds(seconds, expected)


@dataclass(frozen=True)
class Row:
    """One line of a table. promise: "" or what was promised and whether it was kept."""

    what: str
    value: str
    unit: str
    spread: str
    promise: str

    @property
    def missed(self) -> bool:
        return "missed" in self.promise


def measured(
    what: str,
    values: float | Sequence[float],
    unit: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A row: the median of `values` with their lowest and highest, and a promise about the median.

    >>> measured("ours", [1.2, 1.4, 1.3], "times", at_least=1.35)
    Row(what='ours', value='1.3', unit='times', spread='1.2 to 1.4', promise='≥ 1.35: **missed**')
    """
    values = list(values) if isinstance(values, Sequence) else [values]
    median = statistics.median(values)
    spread = f"{shown(min(values))} to {shown(max(values))}" if len(values) > 1 else ""
    promises = [(f"≥ {at_least:g}", median >= at_least)] if at_least is not None else []
    promises += [(f"≤ {at_most:g}", median <= at_most)] if at_most is not None else []
    promise = ", ".join(f"{text}: {'kept' if kept else '**missed**'}" for text, kept in promises)
    return Row(what, shown(median), unit, spread, promise)


def shown(value: float) -> str:
    """Three digits, or all before the point.

    >>> shown(0.98765), shown(1234.5), shown(0.0)
    ('0.988', '1,234', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as lines of a Markdown table."""
    cells = [
        ("what", "median", "unit", "lowest to highest", "promise"),
        ("---", "---:", "---", "---", "---"),
    ]
    cells += [(row.what, row.value, row.unit, row.spread, row.promise) for row in rows]
    return ["| " + " | ".join(line) + " |" for line in cells]


def describe_machine() -> str:
    """The machine in one line, with what it reached just now: float32 GEMM, and copying memory
    (bytes read plus written).
    """
    found = runtime.detect()
    load = f", load {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
    memory = f"{found.memory_bytes / runtime.GB:.0f} GB"
    return (
        f"{_cpu_model()}, {found.cores} cores, {torch.get_num_threads()} threads of torch, "
        f"{memory}{load}. "
        f"Its limits, best of {REPEATS}: float32 GEMM {_best_gemm():.0f} GFLOP/s, copy "
        f"{_best_copy():.0f} GB/s"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _best_gemm() -> float:
    """GFLOP/s of the best square product."""
    best = 0.0
    for size in GEMM_SIZES:
        left, right = torch.rand(size, size), torch.rand(size, size)
        best = max(
            best, 2 * size**3 / _fewest_seconds(lambda left=left, right=right: left @ right) / 1e9
        )
    return best


def _best_copy() -> float:
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _fewest_seconds(lambda: target.copy_(source)) / 1e9


def _fewest_seconds(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return min(seconds)
