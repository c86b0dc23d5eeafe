"""A plan, after import, for models whose config the course knows

Each round plans anew: what a former dry run has found is forgotten. A report plans the training and
six changes of it, looks for the largest batch and length, and plans all 48 trainings whose peak was
measured.
"""

from collections.abc import Callable

import pytest

from course_lib import dryrun, planner, runtime
from tests.benchmarks.measuring import ROUNDS


@pytest.mark.parametrize("model", ["yi-1.5-6b", "llama-2-70b"])
def test_a_report_takes_less_than_two_seconds(model, row: Callable[..., None]):
    seconds = []
    for _ in range(ROUNDS + 1):
        dryrun.shape_of.cache_clear()
        with runtime.measure() as cost:
            planner.report(planner.Recipe(model), "t4")
        seconds.append(cost.seconds)
    row(f"a report for {model}, QLoRA on a T4", seconds[1:], "s", at_most=2.0)
