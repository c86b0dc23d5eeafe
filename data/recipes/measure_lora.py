"""Measure what Day 2 says about LoRA, three seeds each: about 85 minutes on two CPU cores.

    python data/recipes/measure_lora.py              # all
    python data/recipes/measure_lora.py scaling      # one

Writes data/measured/lora_NAME.json.
"""

import torch
from recording import record

from course_lib import evaluation, experiments, models, surgery, training, world
from course_lib.batching import encode_records
from course_lib.experiments import (
    Experiment,
    Measure,
    Method,
    Outcome,
    Prepare,
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
    """Full fine-tuning of tiny, then only the first k directions of each linear layer's update."""
    return first_directions(world_experiment(), 5e-4, world.read_world("test"), machine)


def update_smollm2(machine: Machine) -> Sweep:
    """Full fine-tuning of SmolLM2 on the task of the week, then only the first k directions of each
    linear layer's update.
    """
    return first_directions(week_experiment(), 1e-4, evaluation.read_task("test"), machine)


def first_directions(task: Experiment, rate: float, test: list, machine: Machine) -> Sweep:
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
        progress=False,
    )
    weights = {
        f"{path}.weight": layer.weight
        for path, layer in surgery.find_layers(base.model, "all-linear").items()
    }
    parts = {
        path: torch.linalg.svd(weight.detach() - before[path], full_matrices=False)
        for path, weight in weights.items()
    }
    outcomes = []
    for k in DIRECTIONS:
        with torch.no_grad():
            for path, (u, s, v) in parts.items():
                weights[path].copy_(before[path] + (u[:, :k] * s[:k]) @ v[:k])
        shares = [((s[:k] ** 2).sum() / (s**2).sum()).item() for _, s, _ in parts.values()]
        answers = evaluation.score_answers(base, test)
        scores = {
            "energy": 100 * sum(shares) / len(shares),
            "response loss": answers.loss,
            "exact match": 100 * answers.exact_rate,
        }
        outcomes.append(Outcome("first directions of the update", {"directions": k}, 0, 0, scores))
    measures = {
        "energy": Measure("percent"),
        "response loss": Measure("nats"),
        "exact match": Measure("percent", len(test)),
    }
    return Sweep(outcomes, measures)


def rank_and_rate(machine: Machine) -> Sweep:
    """LoRA on tiny, ranks at several learning rates."""
    rates = {1: (2e-3, 5e-3, 1e-2), 4: (5e-3,), 16: (2e-3, 5e-3), 64: (2e-3, 5e-3)}
    methods = [
        Method("LoRA", rate, {"rank": rank, "layers": ALL}, adapted(rank))
        for rank in rates
        for rate in rates[rank]
    ]
    return compare(methods, world_experiment(), machine)


def scaling(machine: Machine) -> Sweep:
    """The scale alpha / r against alpha / sqrt(r), alpha 8, at one learning rate."""
    methods = [
        Method(
            "LoRA",
            5e-3,
            {"rank": rank, "layers": ALL, "scale": f"8 / {divisor}"},
            adapted(rank, 8, rank_stabilized=divisor == "sqrt(r)"),
        )
        for divisor in ("r", "sqrt(r)")
        for rank in (4, 64)
    ]
    return compare(methods, world_experiment(), machine)


def where(machine: Machine) -> Sweep:
    """As many trained weights in different layers of tiny, or in whole blocks."""
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
        methods.append(
            Method("LoRA", 5e-3, {"rank": rank, "layers": name}, adapted(rank, targets=targets))
        )
    methods += [
        Method("last blocks", 1e-3, {"blocks": count}, last_blocks(count)) for count in (1, 2)
    ]
    return compare(methods, world_experiment(), machine)


def vocabulary(machine: Machine) -> Sweep:
    """The 120 new words again: rank 128, LoRA with the embeddings, all but the embeddings."""
    records = world.read_kemic()

    def frozen_embeddings(base: Loaded) -> None:
        base.model.get_input_embeddings().requires_grad_(False)

    def with_embeddings(rank: int) -> Prepare:
        def prepare(base: Loaded) -> None:
            adapted(rank)(base)
            base.model.get_input_embeddings().requires_grad_(True)

        return prepare

    methods = [
        Method("full fine-tuning", 1e-3, {"embeddings": "frozen embeddings"}, frozen_embeddings),
        Method("LoRA", 2e-3, {"rank": 128, "layers": ALL}, adapted(128, 128)),
        Method(
            "LoRA", 5e-3, {"rank": 16, "layers": f"{ALL} and the embeddings"}, with_embeddings(16)
        ),
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
    scaling,
    where,
    vocabulary,
    rank_of_the_week,
    forgetting,
)

if __name__ == "__main__":
    record(RECIPES, "lora_")
