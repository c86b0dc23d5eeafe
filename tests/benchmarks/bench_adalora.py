"""AdaLoRA: the course's own against peft's, and against LoRA of the rank that it starts with.

SmolLM2-135M in float32 on the task of the week. A step is collating, forward, backward, clipping,
AdamW and, for AdaLoRA, the penalty in the loss and after the optimizer a new importance and a
pruning: every step prunes, which costs the most (Delta T = 1). A run is 4 steps on batches of 4
random records; tokens are real ones, without padding. The start is rank 8 and alpha 16, the target
rank 4. peft's layers have the same P, singular values and Q. Only the supervised positions go
through the output head in every arm, which peft's penalty does without: it comes with the model's
own loss, which is asked for these positions alone.
"""

import random
from collections.abc import Callable

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from course_lib import adalora, batching, evaluation, lora, models, runtime
from course_lib.objective import Batch, supervised_loss
from tests.benchmarks.bench_batching import slices
from tests.benchmarks.bench_lora import (
    ALPHA,
    BATCH,
    LEARNING_RATE,
    RANK,
    SEED,
    STEPS,
    TARGETS,
    largest_difference,
    sharing,
)
from tests.benchmarks.bench_training import encoded
from tests.benchmarks.measuring import Arm, interleaved

TARGET = 4
LONG = 10_000  # steps of the schedule: more than are taken, so that all of them prune


@pytest.fixture(scope="module")
def base(machine: runtime.Machine) -> models.Loaded:
    return models.load("smollm2-135m", machine)


@pytest.fixture(scope="module")
def batches(base: models.Loaded) -> list[Batch]:
    records = random.Random(SEED).sample(evaluation.read_task("train"), STEPS * BATCH)
    pad_id = base.tokenizer.pad_token_id
    return [batching.collate(rows, pad_id) for rows in slices(encoded(base, records), BATCH)]


def penalized_mean(model: nn.Module, batch: Batch) -> Tensor:
    return adalora.penalized_loss(model, batch) / supervised(batch)


def pefts_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss at the supervised positions, to which peft adds its penalty."""
    labels = batch["labels"][:, 1:]
    chosen = labels != batching.IGNORED

    def keep_supervised(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, :-1][chosen].unsqueeze(0),)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_supervised)
    try:
        return model(**batch, shift_labels=labels[chosen].unsqueeze(0), use_cache=False).loss
    finally:
        hook.remove()


def supervised(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != batching.IGNORED).sum())


def steps(
    model: nn.Module,
    batches: list[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    after_step: Callable[[nn.Module, int], object],
    found: list[float],
) -> Arm:
    """An arm: a training step on each of the batches. found: gets their losses."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    taken = 0
    model.train()

    def arm() -> tuple[float, int]:
        nonlocal taken
        with runtime.measure() as cost:
            for batch in batches:
                taken += 1
                value = loss(model, batch)
                value.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                after_step(model, taken)
                optimizer.zero_grad()
                found.append(value.item())
        return cost.seconds, sum(map(supervised, batches))

    return arm


@pytest.mark.parametrize("targets", TARGETS)
def test_a_step_is_as_fast_as_pefts_and_almost_as_loras(targets, base, batches, row):
    ours, theirs, plain = (sharing(base).model for _ in range(3))
    adalora.add_adalora(ours, RANK, ALPHA, TARGETS[targets])
    lora.add_lora(plain, RANK, ALPHA, TARGETS[targets])
    layers = adalora.adalora_layers(ours)
    numbers = {"init_r": RANK, "target_r": TARGET, "lora_alpha": ALPHA, "total_step": LONG}
    theirs = get_peft_model(
        theirs, AdaLoraConfig(task_type="CAUSAL_LM", target_modules=list(layers), **numbers)
    )
    for path, layer in layers.items():
        peft = theirs.base_model.model.get_submodule(path)
        peft.lora_A["default"].data = layer.Q.detach().clone()
        peft.lora_B["default"].data = layer.P.detach().clone()
    budget = adalora.Budget(ours, TARGET, steps=LONG, initial_steps=0, final_steps=0)
    found: dict[str, list[float]] = {"ours": [], "peft": [], "LoRA": []}
    allocate = lambda model, step: model.base_model.update_and_allocate(step)  # noqa: E731
    rounds = interleaved(
        {
            "ours": steps(ours, batches, penalized_mean, budget, found["ours"]),
            "peft": steps(theirs, batches, pefts_loss, allocate, found["peft"]),
            "LoRA": steps(plain, batches, supervised_loss, lambda model, step: None, found["LoRA"]),
        }
    )
    assert sum(found["ours"][-STEPS:]) < sum(found["ours"][:STEPS])
    ratio = rounds.times_faster
    row(f"{targets}: a step of ours", [each / STEPS for each in rounds.seconds["ours"]], "s")
    row(f"{targets}: seconds, ours / peft", ratio("peft", than="ours"), "times", at_most=1.0)
    row(f"{targets}: seconds, ours / LoRA", ratio("LoRA", than="ours"), "times", at_most=1.15)
    row(f"{targets}: seconds, peft / LoRA", ratio("LoRA", than="peft"), "times")
    row(
        f"{targets}: largest difference in the loss of a step, ours and peft",
        largest_difference(found["ours"], found["peft"]),
        "nats",
        at_most=1e-3,
    )
