"""Measure what Day 3 says about AdaLoRA, three seeds each: about 50 minutes on two CPU cores for
tiny, two hours more for SmolLM2 (the recipes whose names begin with week).

    python data/recipes/measure_adalora.py              # all
    python data/recipes/measure_adalora.py criteria     # one

Writes data/measured/adalora_NAME.json.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from recording import record
from torch import Tensor

from course_lib.adalora import Budget, adalora_layers
from course_lib.experiments import (
    Experiment,
    Measure,
    Method,
    Sweep,
    adapted,
    budgeted,
    compare,
    week_experiment,
    world_experiment,
)
from course_lib.models import Loaded
from course_lib.runtime import Machine

START, TARGET = 8, 4  # ranks on tiny
WEEK_START, WEEK_TARGET = 12, 8  # the paper's 1.5 times
RATES = {"LoRA": (2e-3, 5e-3, 1e-2), "AdaLoRA": (5e-3, 1e-2, 2e-2)}
WEEK_RATES = {"LoRA": (1e-3, 2e-3, 5e-3), "AdaLoRA": (2e-3, 5e-3, 1e-2)}
BEST, WEEK_BEST = 1e-2, 5e-3  # AdaLoRA's, where one rate is enough
SCALES = (0.125, 2.0)  # alpha / r of AdaLoRA and of LoRA in the table of the audit
# one of them for both scales, and higher ones for a scale that is 16 times smaller
SCALE_RATES = {0.125: (5e-3, 2e-2, 5e-2), 2.0: (2e-3, 5e-3, 1e-2)}
WEEK_SCALE_RATES = {0.125: (2e-3, 1e-2, 3e-2), 2.0: (1e-3, 2e-3, 5e-3)}


def budgets(machine: Machine) -> Sweep:
    """AdaLoRA on tiny from rank 8 to 4 on average, against LoRA of the same final budget (rank 4)
    and of the same start (rank 8), each at several learning rates.
    """
    return final_and_start(world_experiment(), START, TARGET, RATES, machine)


def week_budgets(machine: Machine) -> Sweep:
    """AdaLoRA on the task of the week from rank 12 to 8 on average, against LoRA of the same final
    budget (rank 8) and of the same start (rank 12), each at several learning rates.
    """
    return final_and_start(week_experiment(), WEEK_START, WEEK_TARGET, WEEK_RATES, machine)


def final_and_start(
    task: Experiment,
    start: int,
    target: int,
    rates: Mapping[str, tuple[float, ...]],
    machine: Machine,
) -> Sweep:
    methods = [
        Method("LoRA", rate, {"rank": rank}, adapted(rank))
        for rank in (target, start)
        for rate in rates["LoRA"]
    ]
    methods += [
        Method("AdaLoRA", rate, settings(start, target), budgeted(start, target, task.steps))
        for rate in rates["AdaLoRA"]
    ]
    return compare(methods, task, machine)


def settings(start: int, target: int) -> dict[str, int]:
    return {"rank at the start": start, "rank": target}


def ranks(machine: Machine) -> Sweep:
    """The rank that AdaLoRA leaves each linear layer of tiny, from 8 to 4 on average."""
    return ranks_of(world_experiment(), START, TARGET, BEST, machine)


def week_ranks(machine: Machine) -> Sweep:
    """The rank that AdaLoRA leaves each linear layer of SmolLM2 on the task of the week, from 12 to
    8 on average.
    """
    return ranks_of(week_experiment(), WEEK_START, WEEK_TARGET, WEEK_BEST, machine)


def ranks_of(task: Experiment, start: int, target: int, rate: float, machine: Machine) -> Sweep:
    method = Method("AdaLoRA", rate, settings(start, target), budgeted(start, target, task.steps))
    sweep = compare([method], replace(task, score=layer_ranks, measures={}), machine)
    return replace(sweep, measures={name: Measure("rank") for name in sweep.outcomes[0].scores})


def layer_ranks(base: Loaded) -> dict[str, float]:
    return {path: float(layer.live.sum()) for path, layer in adalora_layers(base.model).items()}


class ByMagnitude(Budget):
    """Prunes the triplets with the smallest singular values."""

    def scores(self) -> Tensor:
        return torch.stack([layer.singular.detach().abs() for layer in self.layers.values()])


class BySensitivity(Budget):
    """Prunes by the smoothed sensitivity alone, without the uncertainty."""

    def scores(self) -> Tensor:
        return self.triplets(self.sensitivity)


CRITERIA = {
    "|λ|": ByMagnitude,
    "sensitivity": BySensitivity,
    "sensitivity × uncertainty": Budget,
}


def criteria(machine: Machine) -> Sweep:
    """What to prune by on tiny: the singular value, the sensitivity, or sensitivity times
    uncertainty; from rank 8 to 4 and, harder, to 1 on average.
    """
    task = world_experiment()
    methods = [
        Method(
            "AdaLoRA",
            BEST,
            settings(START, target) | {"pruned by": name},
            budgeted(START, target, task.steps, budget=budget),
        )
        for target in (TARGET, 1)
        for name, budget in CRITERIA.items()
    ]
    return compare(methods, task, machine)


def scales(machine: Machine) -> Sweep:
    """The audit on tiny: LoRA of rank 4 and AdaLoRA from 8 to 4, both at scales 0.125 and 2, each
    at several learning rates.
    """
    return both_scales(world_experiment(), START, TARGET, SCALE_RATES, machine)


def week_scales(machine: Machine) -> Sweep:
    """The audit on the task of the week: LoRA of rank 8 and AdaLoRA from 12 to 8, both at scales
    0.125 and 2, each at several learning rates: learned and kept.
    """
    return both_scales(week_experiment(), WEEK_START, WEEK_TARGET, WEEK_SCALE_RATES, machine)


def both_scales(
    task: Experiment,
    start: int,
    target: int,
    rates: Mapping[float, tuple[float, ...]],
    machine: Machine,
) -> Sweep:
    methods = []
    for scale in SCALES:
        for rate in rates[scale]:
            own = {"scale": scale}
            methods += [
                Method("LoRA", rate, {"rank": target} | own, adapted(target, scale * target)),
                Method(
                    "AdaLoRA",
                    rate,
                    settings(start, target) | own,
                    budgeted(start, target, task.steps, scale * start),
                ),
            ]
    return compare(methods, task, machine)


RECIPES = (budgets, ranks, criteria, scales, week_budgets, week_ranks, week_scales)

if __name__ == "__main__":
    record(RECIPES, "adalora_")
