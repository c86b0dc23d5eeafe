"""Batches: grouping by length and packing against random padding.

Real tokens a second (padding does not count) of whole training steps: collating, forward, backward,
clipping, AdamW. Both arms of a comparison train on the same examples. Random padding takes them in
batches of 8, packing in rows of at most 512 tokens, two rows a step, which is again about eight
examples. The ceiling is 1 / (the share of real tokens in random padding): what a way would gain
that does without filler and costs nothing. Packing is timed on the batch of a shuffled epoch whose
share of real tokens is nearest to that of the whole epoch; packed it takes two steps, so AdamW runs
twice. Grouping needs more batches to show: it is timed with `tiny`, on eight batches drawn from a
grouped epoch. Records of more than 512 tokens are left out.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from course_lib import alpaca, batching, models, objective, runtime
from tests.benchmarks.measuring import interleaved

BATCH = 8
ROW_TOKENS = 512
ROWS_A_STEP = 2
GROUPED_BATCHES = 8
SEED = 0
SEED_TASKS = Path(__file__).parents[3] / "shared" / "data" / "seed_tasks.jsonl"
DATA = ("instructions.json", "seed_tasks.jsonl")


def read(name: str) -> list[alpaca.Record]:
    if name == "instructions.json":
        return alpaca.read_records(runtime.data_folder() / name, extra=("kind", "language")).records
    if not SEED_TASKS.is_file():
        pytest.skip(
            "seed_tasks.jsonl, Self-Instruct's 175 tasks, is not in ../shared/data beside the "
            "checkout"
        )
    return alpaca.read_seed_tasks(SEED_TASKS).records


def load(
    model: str, data: str, machine: runtime.Machine
) -> tuple[models.Loaded, list[batching.Example]]:
    base = models.load(model, machine)
    assert base.name == model, base.origin
    return base, batching.encode_records(read(data), base.tokenizer, ROW_TOKENS).examples


def slices(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def steps_over(
    base: models.Loaded,
    optimizer: torch.optim.Optimizer,
    collate: Callable,
    batches: list[Sequence],
) -> Callable[[], tuple[float, tuple[int, int, int]]]:
    """An arm: a training step on each of the batches.

    Its work: examples, real tokens, supervised tokens.
    """
    examples = [example for batch in batches for example in flat(batch)]

    def arm() -> tuple[float, tuple[int, int, int]]:
        supervised = 0
        with runtime.measure() as cost:
            for rows in batches:
                batch = collate(rows, base.tokenizer.pad_token_id)
                objective.supervised_loss(base.model, batch).backward()
                torch.nn.utils.clip_grad_norm_(base.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                supervised += int((batch["labels"] != batching.IGNORED).sum())
        return cost.seconds, (len(examples), sum(map(len, examples)), supervised)

    base.model.train()
    return arm


def flat(examples: Sequence) -> list[batching.Example]:
    """The examples of a padded batch or of packed rows."""
    return [
        example
        for item in examples
        for example in ([item] if isinstance(item, batching.Example) else item)
    ]


def losses(base: models.Loaded, collate: Callable, batches: list[Sequence]) -> dict[int, float]:
    """The mean loss of each example, by its identity."""
    base.model.eval()
    found = {}
    for examples in batches:
        with torch.inference_mode():
            logits, right = objective.supervised_logits(
                base.model, collate(examples, base.tokenizer.pad_token_id)
            )
            token_losses = torch.nn.functional.cross_entropy(logits, right, reduction="none")
        counts = [len(example.supervised_ids) for example in flat(examples)]
        for example, part in zip(flat(examples), token_losses.split(counts), strict=True):
            found[id(example)] = part.mean().item()
    return found


@pytest.mark.parametrize("data", DATA)
def test_packing_leaves_almost_no_padding(data, machine, row):
    _, examples = load("smollm2-135m", data, machine)
    lengths = [len(example) for example in examples]
    shuffled = random.Random(SEED).sample(lengths, len(lengths))
    grouped = [lengths[index] for index in batching.length_grouped_order(lengths, BATCH, SEED)]
    packed = [sum(map(len, examples)) for examples in batching.pack(examples, ROW_TOKENS)]
    row(
        f"{data}, whole: real tokens, random order",
        100 * batching.real_token_share(shuffled, BATCH),
        "%",
    )
    row(
        f"{data}, whole: real tokens, grouped", 100 * batching.real_token_share(grouped, BATCH), "%"
    )
    row(
        f"{data}, whole: real tokens, packed",
        100 * batching.real_token_share(packed, ROWS_A_STEP),
        "%",
        at_least=98,
    )


def padded_share(examples: Sequence[batching.Example]) -> float:
    """The share of real tokens in batches of these examples, in this order."""
    return batching.real_token_share([len(example) for example in examples], BATCH)


def typical(examples: list[batching.Example]) -> Sequence[batching.Example]:
    """The batch of a shuffled epoch with the most usual share of real tokens."""
    shuffled = random.Random(SEED).sample(examples, len(examples))
    batches = [batch for batch in slices(shuffled, BATCH) if len(batch) == BATCH]
    return min(batches, key=lambda batch: abs(padded_share(batch) - padded_share(shuffled)))


@pytest.mark.parametrize("data", DATA)
def test_packing_reaches_most_of_the_ceiling(data, machine, row):
    base, examples = load("smollm2-135m", data, machine)
    examples = typical(examples)
    tokens, real = sum(map(len, examples)), padded_share(examples)
    padded = slices(examples, BATCH)
    packed = slices(batching.pack(examples, ROW_TOKENS), ROWS_A_STEP)
    apart, together = (
        losses(base, batching.collate, padded),
        losses(base, batching.collate_packed, packed),
    )
    differences = [abs(apart[example] - together[example]) for example in apart]
    assert apart.keys() == together.keys()
    assert len(apart) == len(examples)

    optimizer = torch.optim.AdamW(base.model.parameters(), lr=1e-6, fused=True)
    rounds = interleaved(
        {
            "padded": steps_over(base, optimizer, batching.collate, padded),
            "packed": steps_over(base, optimizer, batching.collate_packed, packed),
        }
    )
    gain = rounds.times_faster("packed", than="padded")
    name = f"smollm2-135m, {data}"
    row(f"{name}: random padding", rounds.rates("padded", tokens), "real tokens/s")
    row(f"{name}: packed", rounds.rates("packed", tokens), "real tokens/s")
    row(f"{name}: packed / random; ceiling {1 / real:.2f}", gain, "times")
    row(f"{name}: share of the ceiling", [times * real for times in gain], "", at_least=0.85)
    row(f"{name}: largest difference in an example's loss", max(differences), "nats", at_most=1e-4)


@pytest.mark.parametrize("data", DATA)
def test_grouping_by_length_is_faster_than_random_padding(data, machine, row):
    base, examples = load("tiny", data, machine)
    order = batching.length_grouped_order([len(example) for example in examples], BATCH, SEED)
    whole = [batch for batch in slices(order, BATCH) if len(batch) == BATCH]
    groups = random.Random(SEED).sample(whole, GROUPED_BATCHES)
    grouped = [[examples[index] for index in group] for group in groups]
    drawn = [example for group in grouped for example in group]
    shuffled = random.Random(SEED).sample(drawn, len(drawn))
    padded = slices(shuffled, BATCH)
    optimizer = torch.optim.AdamW(base.model.parameters(), lr=1e-6, fused=True)
    rounds = interleaved(
        {
            "padded": steps_over(base, optimizer, batching.collate, padded),
            "grouped": steps_over(base, optimizer, batching.collate, grouped),
        }
    )
    gain = rounds.times_faster("grouped", than="padded")
    row(f"tiny, {data}: grouped / random; ceiling {1 / padded_share(shuffled):.2f}", gain, "times")
