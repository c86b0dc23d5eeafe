"""Measure what Day 4 says about QLoRA, three seeds each: about half an hour on two CPU cores.

    python data/recipes/measure_qlora.py            # all
    python data/recipes/measure_qlora.py formats    # one

Writes data/measured/qlora_NAME.json.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from recording import record
from torch import Tensor, nn

from course_lib import evaluation, models
from course_lib.experiments import (
    Experiment,
    Measure,
    Method,
    Sweep,
    adapted,
    compare,
    week_experiment,
    world_experiment,
)
from course_lib.lora import add_lora, lora_layers, merged_copy
from course_lib.models import Loaded
from course_lib.qlora import (
    dequantized_copy,
    even_levels,
    fp4_levels,
    nf4_levels,
    quantize_layers,
)
from course_lib.runtime import Machine
from course_lib.surgery import ALL_LINEAR

RANK, RATE = 8, 5e-3  # LoRA's on tiny, where one rate is enough
WEEK_RATE = 2e-3  # by `week_rates`
EVEN_16 = torch.arange(-8, 8) / 8
FORMATS: dict[str, Callable[[], Tensor] | None] = {
    "float32": None,
    "NF4": nf4_levels,
    "FP4": fp4_levels,
    "INT4": even_levels,
    "INT3": lambda: even_levels(3),
    "INT2": lambda: even_levels(2),
}


def on(levels: Callable[[], Tensor] | None) -> Callable[[Loaded], None]:
    """LoRA on a base that was quantised with these levels, if any."""

    def prepare(base: Loaded) -> None:
        if levels is not None:
            quantize_layers(base.model, levels=levels())
        adapted(RANK)(base)

    return prepare


def formats(machine: Machine) -> Sweep:
    """LoRA of rank 8 on tiny in each format, in blocks of 64, trained at three rates."""
    methods = [
        Method("LoRA", rate, {"rank": RANK, "base": f"base in {name}"}, on(levels))
        for name, levels in FORMATS.items()
        for rate in (2e-3, RATE, 1e-2)
    ]
    return compare(methods, world_experiment(), machine)


def rounded(machine: Machine) -> Sweep:
    """LoRA of rank 8 trained on tiny in float32, merged; and then the whole rounded to each format,
    in blocks of 64.
    """
    task, settings = world_experiment(), {name: {"format": name} for name in FORMATS}

    def variants(base: Loaded) -> dict[str, nn.Module]:
        found = {}
        for name, levels in FORMATS.items():
            found[name] = merged_copy(base.model)
            if levels is not None:
                quantize_layers(found[name], levels=levels())
        return found

    method = Method("LoRA, merged, rounded", RATE, {}, adapted(RANK))
    return scored_variants(method, task, machine, variants, settings)


def moved(machine: Machine) -> Sweep:
    """LoRA of rank 8 trained on tiny in float32, and then put on the base rounded to each format,
    in blocks of 64, without a merge.
    """
    task, settings = world_experiment(), {name: {"format": name} for name in FORMATS}

    def variants(base: Loaded) -> dict[str, nn.Module]:
        found = {}
        for name, levels in FORMATS.items():
            model = models.load("tiny", machine).model
            if levels is not None:
                quantize_layers(model, levels=levels())
            found[name] = with_adapter_of(base.model, model)
        return found

    method = Method("LoRA, moved to the rounded", RATE, {}, adapted(RANK))
    return scored_variants(method, task, machine, variants, settings)


def with_adapter_of(trained: nn.Module, model: nn.Module) -> nn.Module:
    """`model` with the adapter that another one has."""
    add_lora(model, RANK, 2 * RANK, ALL_LINEAR)
    layers = lora_layers(trained)
    for path, layer in lora_layers(model).items():
        layer.adapters.load_state_dict(layers[path].adapters.state_dict())
    return model


def untouched(machine: Machine) -> Sweep:
    """The untouched SmolLM2 in each format, in blocks of 64 and with one scale for a matrix: how
    many plain questions it still answers of those that it answered in float32, and of the others.
    """
    plain = {"retention": evaluation.read_retention(), "gained": evaluation.read_unknown()}
    measures = {name: Measure("percent", len(questions)) for name, questions in plain.items()}

    def score(base: Loaded) -> dict[str, float]:
        return {
            name: 100 * evaluation.evaluate_retention(base, questions).rate
            for name, questions in plain.items()
        }

    def rounded_base(levels: Callable[[], Tensor], block_size: int) -> Callable[[Loaded], None]:
        def prepare(base: Loaded) -> None:
            quantize_layers(base.model, ALL_LINEAR, levels(), block_size, double=False)

        return prepare

    methods = [
        Method(
            "untouched",
            None,
            {"base": f"base in {name}", "block": what},
            rounded_base(FORMATS[name], size),
        )
        for what, size in (("of 64", 64), ("of a matrix", 10**9))
        for name in ("NF4", "FP4", "INT4")
    ]
    sixteen = {"base": "base in INT4 with 16 levels", "block": "of 64"}  # one more below zero
    methods.append(Method("untouched", None, sixteen, rounded_base(lambda: EVEN_16, 64)))
    task = replace(week_experiment(), score=score, measures=measures)
    return compare(methods, task, machine)


def merges(machine: Machine) -> Sweep:
    """QLoRA on tiny as it was trained, and after each of four merges."""
    return merged_four_ways("tiny", world_experiment(), RATE, machine)


def week_merges(machine: Machine) -> Sweep:
    """QLoRA on the task of the week as it was trained, and after each of four merges."""
    test = evaluation.read_task("test")
    rates = ("valid JSON", "right topic", "right answer")
    measures = {"response loss": Measure("nats")} | dict.fromkeys(
        rates, Measure("percent", len(test))
    )

    def score(base: Loaded) -> dict[str, float]:
        answers = evaluation.evaluate(base, test)
        scores = {name: 100 * answers.rate(name.lower().replace(" ", "_")) for name in rates}
        return {"response loss": evaluation.score_answers(base, test).loss} | scores

    task = replace(week_experiment(), score=score, measures=measures)
    return merged_four_ways("smollm2-135m", task, WEEK_RATE, machine)


def merged_four_ways(name: str, task: Experiment, rate: float, machine: Machine) -> Sweep:
    ways = (
        *("not merged", "into the dequantised weights", "into the original weights"),
        *("dequantised, quantised again", "original, quantised once"),
    )

    def variants(base: Loaded) -> dict[str, nn.Module]:
        dequantized = merged_copy(dequantized_copy(base.model))
        original = with_adapter_of(base.model, models.load(name, machine).model)
        again = [merged_copy(dequantized_copy(base.model)), merged_copy(original)]
        for model in again:
            quantize_layers(model)
        models_of = (base.model, dequantized, merged_copy(original), *again)
        return dict(zip(ways, models_of, strict=True))

    method = Method("QLoRA", rate, {"rank": RANK}, on(nf4_levels))
    settings = {way: {"rank": RANK, "merged": way} for way in ways}
    return scored_variants(method, task, machine, variants, settings)


def scored_variants(
    method: Method,
    task: Experiment,
    machine: Machine,
    variants: Callable[[Loaded], dict[str, nn.Module]],
    settings: dict[str, dict],
) -> Sweep:
    """One training a seed, and an outcome for each variant of what was trained."""

    def score(base: Loaded) -> dict[str, float]:
        return {
            f"{name}: {measure}": value
            for name, model in variants(base).items()
            for measure, value in task.score(replace(base, model=model)).items()
        }

    sweep = compare([method], replace(task, score=score, measures={}), machine)
    outcomes = [
        replace(
            run,
            settings=chosen | {"learning rate": method.learning_rate},
            scores={measure: run.scores[f"{name}: {measure}"] for measure in task.measures},
        )
        for name, chosen in settings.items()
        for run in sweep.outcomes
    ]
    return Sweep(outcomes, task.measures)


def week_method(rate: float) -> Method:
    settings = {"rank": RANK, "base": "base in nf4"}
    return Method("QLoRA", rate, settings, adapted(RANK), quantize="nf4")


def week_rates(machine: Machine) -> Sweep:
    """The loss on the validation questions of the task of the week, one seed: QLoRA of rank 8 at
    several learning rates.
    """
    validation = evaluation.read_task("validation")

    def score(base: Loaded) -> dict[str, float]:
        return {"validation loss": evaluation.score_answers(base, validation).loss}

    task = week_experiment()
    task = replace(task, score=score, measures={"validation loss": Measure("nats")})
    return compare([week_method(rate) for rate in (1e-3, 2e-3, 5e-3)], task, machine, seeds=(0,))


def week(machine: Machine) -> Sweep:
    """QLoRA of rank 8 on the task of the week, through bitsandbytes; and the untouched model in
    four bits. LoRA on the float32 base stands in week.json.
    """
    untouched = Method("untouched", None, {"base": "base in nf4"}, quantize="nf4")
    return compare([untouched, week_method(WEEK_RATE)], week_experiment(), machine)


RECIPES = (formats, rounded, moved, untouched, merges, week_rates, week, week_merges)

if __name__ == "__main__":
    record(RECIPES, "qlora_")
