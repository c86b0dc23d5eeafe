"""Batch fusion: several LoRA jobs on one base, trained in one batch.

Source: mLoRA, Ye et al. 2023, arXiv 2312.02515. The rows of all jobs go through the frozen base
together, in one product a layer; A and B of each job see its own rows only. A job gets the losses
and gradients that it would get alone, because a fused batch holds whole batches of it, at most one.
What is saved is reading the base's weights once a job, so it pays most where batches are small.

A job is an adapter of the model and a list of batches, one an optimizer step.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from course_lib.batching import IGNORED, Example, check_ids, collate
from course_lib.lora import fused_rows, lora_layers
from course_lib.objective import supervised_logits
from course_lib.runtime import CourseError
from course_lib.training import TrainingError, check_weights

Batch = Sequence[Example]


def padded_tokens(batches: Mapping[str, Batch]) -> int:
    """Tokens of a fused batch with its padding: what it costs in memory and time.

    >>> short, long = Example([1, 2], [1, 2]), Example([1, 2, 3], [1, 2, 3])
    >>> padded_tokens({"a": [short], "b": [long, short]})
    9
    """
    examples = [example for batch in batches.values() for example in batch]
    return len(examples) * max(map(len, examples), default=0)


def schedule(jobs: Mapping[str, Sequence[Batch]], budget: int) -> list[dict[str, Batch]]:
    """The fused batches that train all jobs to their end, each of at most `budget` padded tokens.

    Into each goes the next batch of every job that still fits, longest waiting first: of n jobs
    none waits for more than n - 1 fused batches. Raises CourseError for a batch that does not fit
    alone, or is none.

    >>> one, two = [Example([1], [1])], [Example([1, 2], [1, 2])]
    >>> [list(step) for step in schedule({"a": [one, one], "b": [two], "c": [one]}, budget=4)]
    [['a', 'b'], ['c', 'a']]
    """
    if not isinstance(budget, int) or budget < 1:
        raise CourseError(f"budget={budget!r} must be a whole number of tokens, at least 1")
    for job, batches in jobs.items():
        for number, batch in enumerate(batches, start=1):
            if not isinstance(batch, Sequence) or not all(
                isinstance(example, Example) for example in batch
            ):
                raise CourseError(
                    f"batch {number} of job {job!r} is no list of examples: give each job a list "
                    "of such lists"
                )
            if not batch or padded_tokens({job: batch}) > budget:
                found = f"{padded_tokens({job: batch})} tokens with padding"
                raise CourseError(
                    f"batch {number} of job {job!r} has {found}, expected 1 to {budget}: raise "
                    "budget, or split it"
                )
    steps: list[dict[str, Batch]] = []
    done = dict.fromkeys(jobs, 0)
    waiting = [job for job in jobs if jobs[job]]  # the longest waiting first
    while waiting:
        step: dict[str, Batch] = {}
        for job in waiting:
            fuller = step | {job: jobs[job][done[job]]}
            if padded_tokens(fuller) <= budget:
                step = fuller
        for job in step:
            done[job] += 1
        passed_over = [job for job in waiting if job not in step]
        waiting = [job for job in (*passed_over, *step) if done[job] < len(jobs[job])]
        steps.append(step)
    return steps


def fused_losses(model: nn.Module, batches: Mapping[str, Batch], pad_id: int) -> dict[str, Tensor]:
    """The loss of each job, the mean over its own supervised positions, from one forward over the
    rows of all.

    batches: name of an adapter -> its examples

    Raises CourseError for a name that no adapter has and for a token that the model does not know,
    and TrainingError for a job without a supervised position.
    """
    examples = [example for batch in batches.values() for example in batch]
    if not examples:
        raise TrainingError("there are no examples to train on")
    device = next(model.parameters()).device
    rows = {name: tensor.to(device) for name, tensor in collate(examples, pad_id).items()}
    of_row = (
        (rows["labels"][:, 1:] != IGNORED).sum(1).split([len(batch) for batch in batches.values()])
    )
    supervised = {job: int(counts.sum()) for job, counts in zip(batches, of_row, strict=True)}
    if empty := [job for job in supervised if not supervised[job]]:
        raise TrainingError(
            f"job {empty[0]!r} has no supervised token in its batch, so its loss is undefined: "
            "every label is -100"
        )
    check_ids((rows["input_ids"].min().item(), rows["input_ids"].max().item()), model)
    with fused_rows(model, {job: len(batch) for job, batch in batches.items()}):
        logits, tokens = supervised_logits(model, rows)  # (K, V) and (K,), row after row
    parts = zip(
        supervised,
        logits.split([*supervised.values()]),
        tokens.split([*supervised.values()]),
        strict=True,
    )
    return {job: cross_entropy(own_logits, own_tokens) for job, own_logits, own_tokens in parts}


def train_fused(
    model: nn.Module, steps: Sequence[Mapping[str, Batch]], learning_rate: float, pad_id: int
) -> dict[str, list[float]]:
    """Train the adapters named in `steps` (made by `schedule`) with AdamW; returns the losses of
    each job, one a step of its own.

    One optimizer serves all: the sum of the losses gives each adapter the gradient of its own, and
    AdamW passes over an adapter without a gradient. Raises TrainingError for steps or weights that
    cannot be trained, and at a loss that is not finite, before it reaches the weights.
    """
    if not isinstance(steps, Sequence) or not any(steps):
        raise TrainingError(
            f"found {steps!r:.50}, expected a list of steps, at least one: schedule(jobs, budget) "
            "makes it"
        )
    if not isinstance(learning_rate, int | float) or not 0 < learning_rate < math.inf:
        raise TrainingError(
            f"learning_rate={learning_rate!r} must be a number above 0, for example 1e-3"
        )
    losses: dict[str, list[float]] = {job: [] for step in steps for job in step}
    weights = [
        weight
        for job in losses
        for layer in lora_layers(model, job).values()
        for weight in layer.adapters[job].parameters()
    ]
    check_weights(weights)
    trained_before = {weight: weight.requires_grad for weight in weights}
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    model.zero_grad()  # of what went before
    model.train()
    try:
        for step in steps:
            fused = fused_losses(model, step, pad_id)
            for job, loss in fused.items():
                losses[job].append(loss.item())
                if not math.isfinite(losses[job][-1]):
                    raise TrainingError(
                        f"the loss of job {job!r} is {loss.item()}: stopped before the weights "
                        "changed; lower learning_rate"
                    )
            sum(fused.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        model.eval()
        model.zero_grad()
        for weight, trains in trained_before.items():
            weight.requires_grad_(trains)
    return losses
