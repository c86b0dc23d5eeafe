"""Measure what Day 3 says about AdaLoRA, three seeds each: about an hour on two CPU cores for tiny,
two hours more for SmolLM2 (the recipes whose names begin with week).

    python data/recipes/measure_adalora.py              # all
    python data/recipes/measure_adalora.py criteria     # one

Writes data/measured/adalora_NAME.json.
"""

from dataclasses import replace

import torch
from recording import record
from torch import Generator, Tensor

from course_lib import evaluation, world
from course_lib.adalora import (
    Budget,
    Schedule,
    adalora_layers,
    add_adalora,
    keep_top,
    penalized_loss,
)
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
from course_lib.lora import lora_layers
from course_lib.models import Loaded
from course_lib.objective import summed_loss
from course_lib.runtime import Machine
from course_lib.surgery import ALL_LINEAR

START, TARGET = 8, 4  # ranks on tiny
TARGETS = (TARGET, 1, 0.25)  # the last is 7 triplets for 28 layers
WEEK_START, WEEK_TARGET = 12, 8  # the paper's 1.5 times
BEST = 2e-2  # AdaLoRA's rate on tiny, where one is enough
SCALES = (0.125, 2.0)  # alpha / r of AdaLoRA and of LoRA in the table of the audit
WEEK_BEST = {  # by `week_rates`
    ("LoRA", 2.0): 2e-3,
    ("AdaLoRA", 2.0): 2e-2,
    ("LoRA", 0.125): 2e-2,
    ("AdaLoRA", 0.125): 5e-2,
}


def lora(rate: float, rank: int, scale: float = 2.0) -> Method:
    return Method("LoRA", rate, {"rank": rank, "scale": scale}, adapted(rank, scale * rank))


def adalora(
    rate: float,
    ranks: tuple[int, float],
    task: Experiment,
    scale: float = 2.0,
    budget: type[Budget] = Budget,
    **settings: str,
) -> Method:
    start, target = ranks
    return Method(
        "AdaLoRA",
        rate,
        {"rank at the start": start, "rank": target, "scale": scale, **settings},
        budgeted(start, target, task.steps, scale * start, budget),
    )


def budgets(machine: Machine) -> Sweep:
    """AdaLoRA on tiny from rank 8 to 4 on average, against LoRA of the same final budget (rank 4)
    and of the same start (rank 8), each at several learning rates.
    """
    task = world_experiment()
    methods = [lora(rate, rank) for rank in (TARGET, START) for rate in (2e-3, 5e-3, 1e-2)]
    methods += [adalora(rate, (START, TARGET), task) for rate in (5e-3, 1e-2, 2e-2, 5e-2)]
    return compare(methods, task, machine)


def ranks(machine: Machine) -> Sweep:
    """The rank that AdaLoRA leaves each linear layer of tiny, from 8 to 4 on average."""
    task = world_experiment()
    return ranks_of(adalora(BEST, (START, TARGET), task), task, machine)


def week_ranks(machine: Machine) -> Sweep:
    """The rank that AdaLoRA leaves each linear layer of SmolLM2 on the task of the week, from 12 to
    8 on average.
    """
    task = week_experiment()
    rate = WEEK_BEST["AdaLoRA", 2.0]
    return ranks_of(adalora(rate, (WEEK_START, WEEK_TARGET), task), task, machine)


def ranks_of(method: Method, task: Experiment, machine: Machine) -> Sweep:
    sweep = compare([method], replace(task, score=layer_ranks, measures={}), machine)
    return replace(sweep, measures={name: Measure("rank") for name in sweep.outcomes[0].scores})


def layer_ranks(base: Loaded) -> dict[str, float]:
    return {path: float(layer.live.sum()) for path, layer in adalora_layers(base.model).items()}


class SameEverywhere(Budget):
    """Leaves every layer the same rank: what a choice inside each layer would do."""

    def scores(self) -> Tensor:
        places = super().scores().argsort(descending=True).argsort()  # (layers, rank), 0 the best
        layers = torch.arange(len(places), device=places.device)[:, None]
        return -(places + layers / len(places))


class ByChance(Budget):
    """A score that is drawn once for each triplet."""

    def scores(self) -> Tensor:
        scores = super().scores()
        draw = Generator().manual_seed(torch.initial_seed())
        return torch.rand(scores.shape, generator=draw).to(scores)


class ByMagnitude(Budget):
    """Prunes the triplets with the smallest singular values."""

    def scores(self) -> Tensor:
        return torch.stack([layer.singular.detach().abs() for layer in self.layers.values()])


class BySensitivity(Budget):
    """Prunes by the smoothed sensitivity alone, without the uncertainty."""

    def scores(self) -> Tensor:
        return self.triplets(self.sensitivity)


CRITERIA = {
    "chance": ByChance,
    "the same rank everywhere": SameEverywhere,
    "|λ|": ByMagnitude,
    "sensitivity": BySensitivity,
    "sensitivity × uncertainty": Budget,
}


def criteria(machine: Machine) -> Sweep:
    """What to prune by on tiny: the singular value, the sensitivity, or sensitivity times
    uncertainty; and two controls, chance and the same rank for every layer. From rank 8 to 4, to 1
    and, where not every layer can have one, to 0.25 on average.
    """
    task = world_experiment()
    methods = [
        adalora(BEST, (START, target), task, budget=budget, **{"pruned by": name})
        for target in TARGETS
        for name, budget in CRITERIA.items()
        if target >= 1 or budget is not SameEverywhere
    ]
    return compare(methods, task, machine)


def cut(machine: Machine) -> Sweep:
    """LoRA of rank 8 on tiny, cut after training to fewer directions on average: singular
    directions, or pairs of a column of B and a row of A; as many in each layer, or the largest of
    all.
    """
    test, settings = world.read_world("test"), {}

    def score(base: Loaded) -> dict[str, float]:
        adapters = [layer.adapters["default"] for layer in lora_layers(base.model).values()]
        trained = [(one.B.detach().clone(), one.A.detach().clone()) for one in adapters]
        parts = [torch.linalg.svd(B @ A, full_matrices=False) for B, A in trained]
        directions = [(u[:, :START] * s[:START], v[:START]) for u, s, v in parts]
        scores = {}
        for what, factors in (("directions", directions), ("pairs", trained)):
            sizes = torch.stack([B.norm(dim=0) * A.norm(dim=1) for B, A in factors])
            places = sizes.argsort(dim=1, descending=True).argsort(dim=1)
            for k in range(1, START + 1):
                choices = {"in each": places < k, "of all": keep_top(sizes, k * len(sizes))}
                for which, kept in choices.items():
                    with torch.no_grad():
                        for adapter, (B, A), row in zip(adapters, factors, kept, strict=True):
                            adapter.B.copy_(B * row)
                            adapter.A.copy_(A)
                    name = f"{k} {what} {which}"
                    settings[name] = {"rank": START, "cut to": k, "kept": what, "largest": which}
                    scores[name] = 100 * evaluation.score_answers(base, test).exact_rate
        return scores

    task = world_experiment()
    sweep = compare([lora(5e-3, START)], replace(task, score=score, measures={}), machine)
    outcomes = [
        replace(run, settings=settings[name], scores={"exact match": value})
        for name in settings
        for run in sweep.outcomes
        for value in [run.scores[name]]
    ]
    return Sweep(outcomes, {"exact match": task.measures["exact match"]})


def pairs(machine: Machine) -> Sweep:
    """LoRA on tiny from rank 8 to 4, 1 and 0.25 on average: on the schedule of AdaLoRA, the
    smallest pairs of a column of B and a row of A are set to zero during the training.
    """
    task = world_experiment()

    def method(target: float) -> Method:
        def prepare(base: Loaded) -> dict[str, object]:
            adapted(START)(base)
            adapters = [layer.adapters["default"] for layer in lora_layers(base.model).values()]
            count = len(adapters)
            phases = {"initial_steps": task.steps // 10, "final_steps": task.steps // 3, "every": 1}
            schedule = Schedule(START * count, int(target * count), steps=task.steps, **phases)

            kept = torch.ones(count, START, dtype=torch.bool)

            @torch.no_grad()
            def prune(model: object, step: int) -> None:
                nonlocal kept
                if step <= schedule.last_pruning:
                    sizes = [one.B.norm(dim=0) * one.A.norm(dim=1) for one in adapters]
                    kept = keep_top(torch.stack(sizes), schedule.budget(step))
                for adapter, row in zip(adapters, kept, strict=True):
                    adapter.B.mul_(row)
                    adapter.A.mul_(row[:, None])

            return {"after_step": prune}

        return Method("LoRA", 5e-3, {"rank at the start": START, "rank": target}, prepare)

    return compare([method(target) for target in TARGETS], task, machine)


def no_penalty(machine: Machine) -> Sweep:
    """AdaLoRA on tiny without the orthogonality penalty, from rank 8 to 4, 1 and 0.25 on
    average."""
    task = world_experiment()

    def method(target: float) -> Method:
        def prepare(base: Loaded) -> dict[str, object]:
            return {**budgeted(START, target, task.steps)(base), "loss": summed_loss}

        settings = {"rank at the start": START, "rank": target, "penalty": 0}
        return Method("AdaLoRA", BEST, settings, prepare)

    return compare([method(target) for target in TARGETS], task, machine)


def phases(machine: Machine) -> Sweep:
    """The schedule of AdaLoRA on tiny, from rank 8 to 4 on average in 150 steps: the steps before
    the first pruning, the steps after the last, and the steps from one pruning to the next.
    """
    task = world_experiment()

    def method(initial: int, final: int, every: int) -> Method:
        def prepare(base: Loaded) -> dict[str, object]:
            add_adalora(base.model, START, 2 * START, ALL_LINEAR, seed=torch.initial_seed())
            chosen = {"initial_steps": initial, "final_steps": final, "every": every}
            budget = Budget(base.model, TARGET, steps=task.steps, **chosen)
            return {"loss": penalized_loss, "after_step": budget}

        return Method(
            "AdaLoRA", BEST, {"initial": initial, "final": final, "every": every}, prepare
        )

    schedules = [(15, 50, 1), (0, 50, 1), (60, 50, 1), (15, 0, 1), (15, 110, 1), (15, 50, 10)]
    return compare([method(*schedule) for schedule in schedules], task, machine)


def scales(machine: Machine) -> Sweep:
    """The audit on tiny: LoRA of rank 4 and AdaLoRA from 8 to 4, both at scales 0.125 and 2, each
    at six learning rates.
    """
    task = world_experiment()
    methods = []
    for scale in SCALES:
        for rate in (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1):
            methods += [
                lora(rate, TARGET, scale),
                adalora(rate, (START, TARGET), task, scale),
            ]
    return compare(methods, task, machine)


def week_rates(machine: Machine) -> Sweep:
    """The loss on the validation questions of the task of the week, one seed: LoRA of rank 8 and
    12 and AdaLoRA from 12 to 8, at two scales, each at several learning rates.
    """
    validation = evaluation.read_task("validation")

    def score(base: Loaded) -> dict[str, float]:
        return {"validation loss": evaluation.score_answers(base, validation).loss}

    task = week_experiment()
    task = replace(task, score=score, measures={"validation loss": Measure("nats")})
    methods: list[Method] = [lora(rate, WEEK_START) for rate in (1e-3, 2e-3, 5e-3)]
    methods += [lora(rate, WEEK_TARGET) for rate in (1e-3, 2e-3, 5e-3)]
    methods += [lora(rate, WEEK_TARGET, 0.125) for rate in (2e-3, 1e-2, 2e-2, 5e-2)]
    both = (WEEK_START, WEEK_TARGET)
    methods += [adalora(rate, both, task) for rate in (2e-3, 5e-3, 1e-2, 2e-2, 5e-2)]
    methods += [adalora(rate, both, task, 0.125) for rate in (2e-3, 2e-2, 5e-2, 1e-1, 2e-1)]
    return compare(methods, task, machine, seeds=(0,))


def week(machine: Machine) -> Sweep:
    """AdaLoRA on the task of the week from rank 12 to 8 on average, beside LoRA of the same start
    (rank 12); and for the audit AdaLoRA and LoRA at LoRA's rate and at a sixteenth of the scale.
    LoRA of the same final budget stands in week.json.
    """
    task, both = week_experiment(), (WEEK_START, WEEK_TARGET)
    shared = WEEK_BEST["LoRA", 2.0]
    methods = [
        adalora(WEEK_BEST["AdaLoRA", 2.0], both, task),
        lora(shared, WEEK_START),
        adalora(shared, both, task),
        adalora(shared, both, task, 0.125),
        lora(shared, WEEK_TARGET, 0.125),
        lora(WEEK_BEST["LoRA", 0.125], WEEK_TARGET, 0.125),
        adalora(WEEK_BEST["AdaLoRA", 0.125], both, task, 0.125),
    ]
    return compare(methods, task, machine)


RECIPES = (
    cut,
    pairs,
    no_penalty,
    budgets,
    ranks,
    criteria,
    phases,
    scales,
    week_rates,
    week,
    week_ranks,
)

if __name__ == "__main__":
    record(RECIPES, "adalora_")
