"""Measure what Day 2 says about LoRA, three seeds each; the notebook reads it and trains two of these runs again.

    python data/recipes/measure_lora.py              # all, about 85 minutes on two CPU cores
    python data/recipes/measure_lora.py scaling      # one effect, the others are kept

Writes data/lora_effects.json: the outcomes by effect. Learning rates stand in the names where they differ.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from course_lib import evaluation, experiments, models, runtime, surgery, training, world
from course_lib.batching import encode_records
from course_lib.experiments import Method, Outcome, Prepare, adapted, compare, last_blocks, week_experiment, world_experiment
from course_lib.models import Loaded
from course_lib.runtime import Machine

TARGET = Path(__file__).resolve().parents[1] / experiments.LORA_FILE
DIRECTIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


def update(machine: Machine) -> list[Outcome]:
    """Full fine-tuning with one seed, then only the first k directions of each linear layer's update."""
    tasks = {
        "tiny": (world_experiment(), 5e-4, world.read_world("test")),
        "small": (week_experiment(), 1e-4, evaluation.read_task("test")),
    }
    outcomes = []
    for name, (task, rate, test) in tasks.items():
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
        weights = {f"{path}.weight": layer.weight for path, layer in surgery.find_layers(base.model, "all-linear").items()}
        parts = {path: torch.linalg.svd(weight.detach() - before[path], full_matrices=False) for path, weight in weights.items()}
        for k in DIRECTIONS:
            with torch.no_grad():
                for path, (u, s, v) in parts.items():
                    weights[path].copy_(before[path] + (u[:, :k] * s[:k]) @ v[:k])
            shares = [((s[:k] ** 2).sum() / (s**2).sum()).item() for _, s, _ in parts.values()]
            answers = evaluation.score_answers(base, test)
            scores = {"energy": sum(shares) / len(shares), "response loss": answers.loss, "exact match": answers.exact_rate}
            outcomes.append(Outcome(f"{name}, k={k}", 0, 0, scores, 0.0, 0))
    return outcomes


def rank_and_rate(machine: Machine) -> list[Outcome]:
    rates = {1: (2e-3, 5e-3, 1e-2), 4: (5e-3,), 16: (2e-3, 5e-3), 64: (2e-3, 5e-3)}
    methods = [Method(f"r={rank}, {rate:g}", rate, adapted(rank)) for rank in rates for rate in rates[rank]]
    return compare(methods, world_experiment(), machine)


def scaling(machine: Machine) -> list[Outcome]:
    """alpha fixed: the factor is 8 / r, or 8 / sqrt(r)."""
    methods = [
        Method(f"r={rank}, alpha 8 / {divisor}", 5e-3, adapted(rank, 8, rank_stabilized=divisor == "sqrt(r)"))
        for divisor in ("r", "sqrt(r)")
        for rank in (4, 64)
    ]
    return compare(methods, world_experiment(), machine)


def where(machine: Machine) -> list[Outcome]:
    """LoRA with about as many weights in different layers, and whole blocks without LoRA."""
    model = surgery.empty_model("tiny")
    attention, feed_forward = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    choices = {
        "q": ["q_proj"],
        "q, v": ["q_proj", "v_proj"],
        "q, k, v, o": attention,
        "feed-forward": feed_forward,
        "all linear": [*attention, *feed_forward],
    }
    rank_one = {
        name: surgery.lora_parameters(map(surgery.layer_shape, surgery.find_layers(model, targets).values()), 1)
        for name, targets in choices.items()
    }
    methods = []
    for name, targets in choices.items():
        rank = 2 * rank_one["all linear"] // rank_one[name]
        methods.append(Method(f"LoRA on {name}, r={rank}", 5e-3, adapted(rank, targets=targets)))
    for count in (1, 2):
        methods.append(Method(f"last {count} of 4 blocks in full", 1e-3, last_blocks(count)))
    return compare(methods, world_experiment(), machine)


def vocabulary(machine: Machine) -> list[Outcome]:
    """New words: what measure_effects.py leaves open is told apart here, rank and whether the embeddings train."""
    records = world.read_kemic()

    def frozen_embeddings(base: Loaded) -> None:
        base.model.get_input_embeddings().requires_grad_(False)

    def with_embeddings(rank: int) -> Prepare:
        def prepare(base: Loaded) -> None:
            adapted(rank)(base)
            base.model.get_input_embeddings().requires_grad_(True)

        return prepare

    methods = [
        Method("full, embeddings frozen, 0.001", 1e-3, frozen_embeddings),
        Method("LoRA r=128, 0.002", 2e-3, adapted(128, 128)),
        Method("LoRA r=16 and embeddings, 0.005", 5e-3, with_embeddings(16)),
    ]
    return compare(methods, world_experiment(records, records, steps=300), machine)


def rank_of_the_week(machine: Machine) -> list[Outcome]:
    rates = {1: 1e-2, 64: 1e-3}
    methods = [Method(f"LoRA r={rank}, {rate:g}", rate, adapted(rank)) for rank, rate in rates.items()]
    return compare(methods, week_experiment(), machine)


def forgetting(machine: Machine) -> list[Outcome]:
    """Learning rates around those of the table of the week: what is lost, at which loss?"""
    methods = [Method(f"full fine-tuning, {rate:g}", rate) for rate in (5e-5, 2e-4)]
    methods += [Method(f"LoRA r=8, all linear layers, {rate:g}", rate, adapted(8)) for rate in (1e-3, 5e-3)]
    return compare(methods, week_experiment(), machine)


EFFECTS: dict[str, Callable[[Machine], list[Outcome]]] = {
    "update": update,
    "rank and rate": rank_and_rate,
    "scaling": scaling,
    "where": where,
    "vocabulary": vocabulary,
    "rank of the week": rank_of_the_week,
    "forgetting": forgetting,
}


def main() -> None:
    chosen = sys.argv[1:] or list(EFFECTS)
    unknown = [name for name in chosen if name not in EFFECTS]
    if unknown:
        sys.exit(f"effect {unknown[0]!r} is not known, expected some of: {', '.join(EFFECTS)}")
    machine = runtime.detect()
    for name in chosen:
        outcomes = EFFECTS[name](machine)
        measured = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
        measured[name] = experiments.as_json(outcomes)
        TARGET.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        for row in experiments.summary(outcomes):
            print(row, flush=True)


if __name__ == "__main__":
    main()
