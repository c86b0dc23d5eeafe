"""LoRA: the course's own against peft's and against full fine-tuning; checkpointed activations,
fused jobs, merged weights.

SmolLM2-135M in float32 on the task of the week. A step is collating, forward, backward, clipping
and AdamW, with the course's loss in every arm. A run is 4 steps on batches of 4 random records;
tokens are real ones, without padding. LoRA has rank 8 and alpha 16, and B is filled with random
numbers, so that an adapter does something. peft's layers have the same A and B, from a file that
the course wrote.

Activations are what autograd holds when the forward pass ends (`memory.activation_bytes`); in the
backward pass of a checkpointed model the activations of one block come on top.

Fused are four jobs on q and v, a topic of the task and a rank each (4, 8, 8 and 16), in batches of
one record. Apart, each job is trained to its end before the next begins. A fused batch pads all
records to its longest one.
"""

import copy
import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from course_lib import (
    adapter_files,
    batching,
    evaluation,
    fusion,
    lora,
    memory,
    models,
    objective,
    runtime,
)
from tests.benchmarks.bench_batching import slices, steps_over
from tests.benchmarks.bench_training import encoded
from tests.benchmarks.measuring import Arm, interleaved
from tests.test_lora import fill

BATCH = 4  # Day 1's
STEPS = 4  # some seconds a run on two cores
RANK, ALPHA = 8, 16
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
LEARNING_RATE = 1e-4
JOBS = {"capital": 4, "sum": 8, "animal": 8, "calendar": 16}  # topic -> rank
JOB_STEPS = 3
PROMPT_TOKENS = 60
PASSES = 8
SEED = 0


@pytest.fixture(scope="module")
def base(machine: runtime.Machine) -> models.Loaded:
    return models.load("smollm2-135m", machine)


@pytest.fixture(scope="module")
def batches(base: models.Loaded) -> list[list[batching.Example]]:
    records = random.Random(SEED).sample(evaluation.read_task("train"), STEPS * BATCH)
    return slices(encoded(base, records), BATCH)


def sharing(base: models.Loaded) -> models.Loaded:
    """The base with modules of its own over the same weights in memory."""
    weights = {id(weight): nn.Parameter(weight.detach()) for weight in base.model.parameters()}
    return dataclasses.replace(base, model=copy.deepcopy(base.model, weights))


def with_lora(base: models.Loaded, targets: str) -> models.Loaded:
    adapted = sharing(base)
    lora.add_lora(adapted.model, RANK, ALPHA, TARGETS[targets])
    fill(adapted.model)
    return adapted


def steps(base: models.Loaded, batches: list[list[batching.Example]]) -> Arm:
    """An arm that trains the weights that require a gradient: a step on each of the batches."""
    weights = [weight for weight in base.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    return steps_over(base, optimizer, batching.collate, batches)


def losses(base: models.Loaded, batches: list[list[batching.Example]]) -> list[float]:
    with torch.inference_mode():
        return [
            objective.supervised_loss(
                base.model, batching.collate(batch, base.tokenizer.pad_token_id)
            ).item()
            for batch in batches
        ]


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("targets", TARGETS)
def test_a_step_is_as_fast_as_pefts(targets, base, batches, tmp_path, row):
    ours, theirs = with_lora(base, targets), sharing(base)
    adapter_files.save_adapter(ours.model, tmp_path / "start")
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path / "start", is_trainable=True)
    before = losses(ours, batches)
    at_the_start = largest_difference(before, losses(theirs, batches))
    rounds = interleaved({"ours": steps(ours, batches), "peft": steps(theirs, batches)})
    after = losses(ours, batches)
    assert sum(after) < sum(before)
    _, tokens, _ = rounds.work
    row(f"{targets}: peft", rounds.rates("peft", tokens), "tokens/s")
    row(f"{targets}: ours", rounds.rates("ours", tokens), "tokens/s")
    row(f"{targets}: ours / peft", rounds.times_faster("ours", than="peft"), "times", at_least=0.98)
    row(
        f"{targets}: largest difference in a batch's loss, at the start",
        at_the_start,
        "nats",
        at_most=1e-5,
    )
    row(
        f"{targets}: and after all steps",
        largest_difference(after, losses(theirs, batches)),
        "nats",
        at_most=1e-5,
    )


def test_lora_is_faster_than_full_fine_tuning(base, batches, row):
    full = dataclasses.replace(base, model=copy.deepcopy(base.model))
    arms = {
        "full": full,
        "q,v": with_lora(base, "q,v"),
        "all-linear": with_lora(base, "all-linear"),
    }
    rounds = interleaved({name: steps(arm, batches) for name, arm in arms.items()})
    _, tokens, _ = rounds.work
    row("full fine-tuning", rounds.rates("full", tokens), "tokens/s")
    row("q,v / full", rounds.times_faster("q,v", than="full"), "times", at_least=1.4)
    row("all-linear / full", rounds.times_faster("all-linear", than="full"), "times")


def activations_and_gradients(
    base: models.Loaded, batch: list[batching.Example]
) -> tuple[int, list[Tensor]]:
    base.model.train()  # transformers checkpoints only while it trains
    rows = batching.collate(batch, base.tokenizer.pad_token_id)
    loss, size = memory.activation_bytes(
        base.model, lambda: objective.supervised_loss(base.model, rows)
    )
    trained = [weight for weight in base.model.parameters() if weight.requires_grad]
    return size, list(torch.autograd.grad(loss, trained))


def test_checkpointed_activations_save_memory_for_a_little_time(base, batches, row):
    arms = {"kept": 0, "18 of 30": 18, "all": 30}  # blocks
    adapted = {name: with_lora(base, "all-linear") for name in arms}
    for name, count in arms.items():
        memory.checkpoint_blocks(adapted[name].model, count)
    found = {name: activations_and_gradients(arm, batches[0]) for name, arm in adapted.items()}
    held, expected = found["kept"]
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    rounds = interleaved({name: steps(arm, batches) for name, arm in adapted.items()})
    row("all-linear: activations of a batch", held / 1e6, "MB")
    for name, at_most in (("18 of 30", (0.5, 1.35)), ("all", (None, None))):
        size, gradients = found[name]
        difference = max(
            (one - other).abs().max().item() for one, other in zip(gradients, expected, strict=True)
        )
        row(
            f"{name} blocks checkpointed: activations, share of all",
            size / held,
            "",
            at_most=at_most[0],
        )
        row(
            f"{name} blocks checkpointed: seconds of a step",
            rounds.times_faster("kept", than=name),
            "times",
            at_most=at_most[1],
        )
        row(
            f"{name} blocks checkpointed: largest difference of a gradient",
            difference,
            "",
            at_most=1e-5,
        )


def test_four_fused_jobs_are_faster_than_one_after_the_other(base, row):
    records = {
        topic: [
            record for record in evaluation.read_task("train") if record.extra["topic"] == topic
        ]
        for topic in JOBS
    }
    jobs = {
        topic: slices(encoded(base, random.Random(SEED).sample(records[topic], JOB_STEPS)), 1)
        for topic in JOBS
    }
    examples = [example for batches in jobs.values() for (example,) in batches]
    together = fusion.schedule(jobs, budget=len(jobs) * max(map(len, examples)))
    assert [list(step) for step in together] == [list(jobs)] * JOB_STEPS
    found: dict[str, dict[str, list[float]]] = {}

    def train(arm: str, plans: list[list[dict[str, fusion.Batch]]]) -> Arm:
        def run() -> tuple[float, int]:
            model = sharing(base).model
            for topic, rank in JOBS.items():
                lora.add_lora(model, rank, 2 * rank, TARGETS["q,v"], name=topic)
                fill(model, name=topic)
            found[arm] = {}
            with runtime.measure() as cost:
                for plan in plans:
                    found[arm] |= fusion.train_fused(
                        model, plan, LEARNING_RATE, base.tokenizer.pad_token_id
                    )
            return cost.seconds, sum(map(len, found[arm].values()))

        return run

    apart = [[{topic: batch} for batch in batches] for topic, batches in jobs.items()]
    rounds = interleaved({"fused": train("fused", [together]), "apart": train("apart", apart)})
    assert rounds.work == len(JOBS) * JOB_STEPS
    tokens = sum(map(len, examples))
    padded = sum(fusion.padded_tokens(step) for step in together)
    row("four jobs, one after the other", rounds.rates("apart", tokens), "tokens/s")
    row(
        f"four jobs, fused; {100 * tokens / padded:.0f} % are real tokens",
        rounds.rates("fused", tokens),
        "tokens/s",
    )
    row(
        "fused / one after the other",
        rounds.times_faster("fused", than="apart"),
        "times",
        at_least=1.1,
    )
    for number in range(JOB_STEPS):
        fused, alone = ([found[arm][topic][number] for topic in JOBS] for arm in ("fused", "apart"))
        row(
            f"largest difference in a job's loss, step {number + 1}",
            largest_difference(fused, alone),
            "nats",
            at_most=1e-5,
        )


def test_a_merged_model_is_as_fast_as_the_base(base, row):
    examples = encoded(base, evaluation.read_task("train"))
    ids = torch.tensor(
        [min(examples, key=lambda example: abs(len(example) - PROMPT_TOKENS)).input_ids]
    )
    adapted = with_lora(base, "all-linear").model
    arms = {"base": sharing(base).model, "adapter": adapted, "merged": lora.merged_copy(adapted)}

    def passes(model: nn.Module) -> Callable[[], tuple[float, int]]:
        def run() -> tuple[float, int]:
            with torch.inference_mode(), runtime.measure() as cost:
                for _ in range(PASSES):
                    model(ids, use_cache=False)
            return cost.seconds, PASSES

        return run

    rounds = interleaved({name: passes(model.eval()) for name, model in arms.items()})
    with torch.inference_mode():
        difference = (arms["merged"](ids).logits - arms["adapter"](ids).logits).abs().max().item()
    milliseconds = [1000 * seconds / PASSES for seconds in rounds.seconds["base"]]
    row(f"forward pass of the base, {ids.shape[1]} tokens", milliseconds, "ms")
    row("all-linear adapter / base", rounds.times_faster("base", than="adapter"), "times")
    row("merged / base", rounds.times_faster("base", than="merged"), "times", at_most=1.03)
    row("merged and adapter: largest difference of a logit", difference, "", at_most=1e-3)
