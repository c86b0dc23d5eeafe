"""Measure what Day 2 says about LoRA, three seeds each: about three hours on two CPU cores.

    python data/recipes/measure_lora.py              # all
    python data/recipes/measure_lora.py scaling      # one

Writes data/measured/lora_NAME.json.
"""

from collections.abc import Sequence

import torch
from recording import record

from course_lib import evaluation, experiments, models, surgery, training, world
from course_lib.batching import encode_records
from course_lib.experiments import (
    SEEDS,
    Experiment,
    Measure,
    Method,
    Outcome,
    Sweep,
    adapted,
    compare,
    last_blocks,
    week_experiment,
    world_experiment,
)
from course_lib.models import Loaded
from course_lib.runtime import Machine

DIRECTIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
ALL = "all linear layers"


def update_tiny(machine: Machine) -> Sweep:
    """Full fine-tuning of tiny, then only the first k directions of each linear layer's update; all
    else as fine-tuning made it, or the norms and embeddings put back as well.
    """
    return first_directions(world_experiment(), 5e-4, world.read_world("test"), machine, SEEDS)


def update_smollm2(machine: Machine) -> Sweep:
    """Full fine-tuning of SmolLM2 on the task of the week, then only the first k directions of each
    linear layer's update; all else as fine-tuning made it, or the norms and embeddings put back as
    well.
    """
    return first_directions(week_experiment(), 1e-4, evaluation.read_task("test"), machine, (0,))


def first_directions(
    task: Experiment, rate: float, test: list, machine: Machine, seeds: Sequence[int]
) -> Sweep:
    """The weights of the linear layers with k directions of their updates, and the others trained
    or put back.
    """
    outcomes = []
    for seed in seeds:
        base = models.load(task.base, machine)
        before = {path: weight.detach().clone() for path, weight in base.model.named_parameters()}
        examples = encode_records(task.train, base.tokenizer, experiments.MAX_TOKENS).examples
        training.finetune(
            base,
            examples,
            machine,
            steps=task.steps,
            batch_size=task.batch_size,
            warmup_steps=task.warmup_steps,
            learning_rate=rate,
            seed=seed,
            progress=False,
        )
        linear = [f"{path}.weight" for path in surgery.find_layers(base.model, "all-linear")]
        weights = dict(base.model.named_parameters())
        others = {path: weights[path].detach().clone() for path in weights.keys() - {*linear}}
        parts = {
            path: torch.linalg.svd(weights[path].detach() - before[path], full_matrices=False)
            for path in linear
        }
        shares = [(s**2).cumsum(0) / (s**2).sum() for _, s, _ in parts.values()]
        for k in DIRECTIONS:
            with torch.no_grad():
                for path, (u, s, v) in parts.items():
                    weights[path].copy_(before[path] + (u[:, :k] * s[:k]) @ v[:k])
            energy = sum(share[k - 1].item() for share in shares) / len(shares) if k else 0.0
            for name, kept in (("others trained", others), ("others put back", before)):
                with torch.no_grad():
                    for path in others:
                        weights[path].copy_(kept[path])
                answers = evaluation.score_answers(base, test)
                scores = {
                    "energy": 100 * energy,
                    "response loss": answers.loss,
                    "exact match": 100 * answers.exact_rate,
                }
                settings = {"directions": k, "norms and embeddings": name}
                outcomes.append(Outcome("first directions", settings, seed, 0, scores))
    measures = {
        "energy": Measure("percent"),
        "response loss": Measure("nats"),
        "exact match": Measure("percent", len(test)),
    }
    return Sweep(outcomes, measures)


def rank_and_rate(machine: Machine) -> Sweep:
    """LoRA on tiny, four ranks at five or six learning rates each, alpha twice the rank."""
    rates = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
    chosen = {1: rates[1:], 4: rates[1:-1], 16: rates[:-2], 64: rates[:-2]}  # around the best
    methods = [
        Method("LoRA", rate, {"rank": rank, "layers": ALL}, adapted(rank))
        for rank in chosen
        for rate in chosen[rank]
    ]
    return compare(methods, world_experiment(), machine)


def fixed_alpha(machine: Machine) -> Sweep:
    """LoRA on tiny with alpha 8 at every rank, so that the scale is 8 / rank: three ranks at four
    learning rates each. Rank 4, with its scale of 2, is in rank_and_rate.
    """
    methods = [
        Method(
            "LoRA", rate, {"rank": rank, "layers": ALL, "scale": 8 / rank}, adapted(rank, alpha=8)
        )
        for rank in (1, 16, 64)
        for rate in (2e-3, 5e-3, 1e-2, 2e-2)
    ]
    return compare(methods, world_experiment(), machine)


def scaling(machine: Machine) -> Sweep:
    """LoRA of rank 64 on tiny with the scales 0.125 (alpha 8) and 8 (alpha 512, or alpha 64
    rank-stabilised); scale 2 is in rank_and_rate.
    """
    rates = {0.125: (5e-3, 1e-2, 2e-2, 4e-2), 8: (2.5e-4, 5e-4, 1e-3, 2e-3)}
    methods = [
        Method("LoRA", rate, {"rank": 64, "layers": ALL, "scale": scale}, adapted(64, 64 * scale))
        for scale in rates
        for rate in rates[scale]
    ]
    return compare(methods, world_experiment(), machine)


def scaling_of_the_week(machine: Machine) -> Sweep:
    """The task of the week at rank 64 with scale 8: alpha 512, or alpha 64 rank-stabilised; its
    runs with scale 2 are in rank_of_the_week.
    """
    methods = [
        Method("LoRA", rate, {"rank": 64, "layers": ALL, "scale": 8}, adapted(64, 512))
        for rate in (1e-3, 2.5e-4, 5e-4)
    ]
    return compare(methods, week_experiment(), machine)


def where(machine: Machine) -> Sweep:
    """As many trained weights in different layers of tiny, or in whole blocks, at four rates."""
    model = surgery.empty_model("tiny")
    attention, feed_forward = (
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        ["gate_proj", "up_proj", "down_proj"],
    )
    choices = {
        "q": ["q_proj"],
        "q, v": ["q_proj", "v_proj"],
        "q, k, v, o": attention,
        "feed-forward": feed_forward,
        "all linear": [*attention, *feed_forward],
    }
    rank_one = {
        name: surgery.lora_parameters(
            map(surgery.layer_shape, surgery.find_layers(model, targets).values()), 1
        )
        for name, targets in choices.items()
    }
    methods = []
    for name, targets in choices.items():
        rank = 2 * rank_one["all linear"] // rank_one[name]
        methods += [
            Method("LoRA", rate, {"rank": rank, "layers": name}, adapted(rank, targets=targets))
            for rate in (2e-3, 5e-3, 1e-2, 2e-2)
        ]
    methods += [
        Method("last blocks", rate, {"blocks": count}, last_blocks(count))
        for count in (1, 2)
        for rate in (5e-4, 1e-3, 2e-3, 4e-3)
    ]
    return compare(methods, world_experiment(), machine)


def vocabulary(machine: Machine) -> Sweep:
    """The 120 new words again: the embeddings alone, all but the embeddings, LoRA of rank 128, LoRA
    with the embeddings, each at three or four rates; and the rates of full fine-tuning and of LoRA
    of rank 16 that tiny_new_vocabulary lacks.
    """
    records = world.read_kemic()

    def embeddings_alone(base: Loaded) -> None:
        base.model.requires_grad_(False)
        base.model.get_input_embeddings().requires_grad_(True)

    def frozen_embeddings(base: Loaded) -> None:
        base.model.get_input_embeddings().requires_grad_(False)

    def with_embeddings(base: Loaded) -> None:
        adapted(16)(base)
        base.model.get_input_embeddings().requires_grad_(True)

    ways = (
        ("embeddings alone", {}, embeddings_alone, (2e-3, 5e-3, 1e-2, 2e-2)),
        ("all but the embeddings", {}, frozen_embeddings, (1e-3, 2e-3, 4e-3, 8e-3)),
        (
            "LoRA",
            {"rank": 16, "layers": f"{ALL} and the embeddings"},
            with_embeddings,
            (1e-3, 2e-3, 5e-3),
        ),
        ("LoRA", {"rank": 128, "layers": ALL}, adapted(128, 128), (1e-3, 2e-3, 5e-3)),
        ("LoRA", {"rank": 16, "layers": ALL}, adapted(16), (1e-2,)),
        ("full fine-tuning", {}, None, (2e-3, 4e-3)),
    )
    methods = [
        Method(name, rate, settings, prepare)
        for name, settings, prepare, rates in ways
        for rate in rates
    ]
    return compare(methods, world_experiment(records, records, steps=300), machine)


def rank_of_the_week(machine: Machine) -> Sweep:
    """The task of the week at ranks 1 and 64, each at its own learning rate."""
    rates = {1: 1e-2, 64: 1e-3}
    methods = [
        Method("LoRA", rate, {"rank": rank, "layers": ALL}, adapted(rank))
        for rank, rate in rates.items()
    ]
    return compare(methods, week_experiment(), machine)


def forgetting(machine: Machine) -> Sweep:
    """The task of the week at lower and higher learning rates: learned and kept."""
    methods = [Method("full fine-tuning", rate) for rate in (5e-5, 2e-4)]
    methods += [
        Method("LoRA", rate, {"rank": 8, "layers": ALL}, adapted(8)) for rate in (1e-3, 5e-3)
    ]
    return compare(methods, week_experiment(), machine)


RECIPES = (
    update_tiny,
    update_smollm2,
    rank_and_rate,
    fixed_alpha,
    scaling,
    scaling_of_the_week,
    where,
    vocabulary,
    rank_of_the_week,
    forgetting,
)

if __name__ == "__main__":
    record(RECIPES, "lora_")
