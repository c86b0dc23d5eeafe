"""QLoRA: the course's own against bitsandbytes, kernel by kernel and in a training step.

A weight is one of SmolLM2's feed-forward layers, 1,536 x 576 normal numbers, in NF4 and blocks of
64. Ours is torch alone: quantising counts the middles between levels that lie below a weight,
dequantising looks up both levels of a byte at once. bitsandbytes dequantises with a compiled
kernel, and on CPUs quantises in torch as well. A product with one row of x, as in generating token
by token, dequantises the weight in both. Tried for it and not faster: a table of the 256 sums of
each pair of inputs, whose look-up costs as much as dequantising; a product that is scaled by absmax
at its end saves a tenth. Nothing here is compiled for the course.

A step is forward, backward, clipping and AdamW of LoRA (rank 8, all linear layers) on SmolLM2, on
4 batches of 4 random records of the task of the week.
"""

import random
from collections.abc import Callable

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from course_lib import batching, evaluation, lora, models, qlora, runtime
from course_lib.objective import Batch, supervised_loss
from tests.benchmarks.bench_adalora import steps
from tests.benchmarks.bench_batching import slices
from tests.benchmarks.bench_lora import ALPHA, BATCH, RANK, SEED, STEPS, TARGETS
from tests.benchmarks.bench_training import encoded
from tests.benchmarks.measuring import Arm, interleaved

ROWS, COLUMNS = 1536, 576
CALLS = 50  # of a kernel in a round


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return 0.05 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(SEED))


def repeated(call: Callable[[], object]) -> Arm:
    def arm() -> tuple[float, int]:
        with runtime.measure() as cost:
            for _ in range(CALLS):
                call()
        return cost.seconds, CALLS

    return arm


def test_quantising_is_faster_than_the_librarys(weight, row):
    levels = qlora.nf4_levels()

    def ours() -> Tensor:
        return qlora.pack(qlora.quantize_blockwise(weight, levels)[0])

    rounds = interleaved(
        {
            "ours": repeated(ours),
            "bitsandbytes": repeated(lambda: bnb.quantize_4bit(weight, quant_type="nf4")),
        }
    )
    assert torch.equal(ours(), bnb.quantize_4bit(weight, quant_type="nf4")[0].flatten())
    each = [1000 * seconds / CALLS for seconds in rounds.seconds["ours"]]
    row("quantise 0.88M weights, ours", each, "ms")
    faster = rounds.times_faster("ours", than="bitsandbytes")
    row("quantise, speed of ours / bitsandbytes", faster, "times", at_least=2.0)


def test_dequantising_and_a_product_with_one_row(weight, row):
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    layer = qlora.PackedLinear(weight, double=False)
    assert torch.equal(layer.dequantized(), bnb.dequantize_4bit(packed, state))
    rounds = interleaved(
        {
            "ours": repeated(layer.dequantized),
            "bitsandbytes": repeated(lambda: bnb.dequantize_4bit(packed, state)),
        }
    )
    each = [1000 * seconds / CALLS for seconds in rounds.seconds["ours"]]
    row("dequantise 0.88M weights, ours", each, "ms")
    faster = rounds.times_faster("ours", than="bitsandbytes")
    row("dequantise, speed of ours / bitsandbytes", faster, "times", at_least=0.8)
    x = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        rounds = interleaved(
            {
                "ours": repeated(lambda: layer(x)),
                "bitsandbytes": repeated(lambda: linear(x, bnb.dequantize_4bit(packed, state))),
                "float32": repeated(lambda: linear(x, weight)),
            }
        )
    faster = rounds.times_faster("ours", than="bitsandbytes")
    row("one row times a 4-bit weight, speed of ours / bitsandbytes", faster, "times", at_least=1.5)
    slower = rounds.times_faster("float32", than="bitsandbytes")
    row("one row: speed of float32 / bitsandbytes", slower, "times")


@pytest.fixture(scope="module")
def batches(machine: runtime.Machine) -> list[Batch]:
    base = models.load("smollm2-135m", machine)
    records = random.Random(SEED).sample(evaluation.read_task("train"), STEPS * BATCH)
    pad_id = base.tokenizer.pad_token_id
    return [batching.collate(rows, pad_id) for rows in slices(encoded(base, records), BATCH)]


def test_a_training_step(machine, batches, row):
    bases = {
        "ours": models.load("smollm2-135m", machine).model,
        "bitsandbytes": models.load("smollm2-135m", machine, quantize="nf4").model,
        "float32": models.load("smollm2-135m", machine).model,
    }
    qlora.quantize_layers(bases["ours"])
    found: dict[str, list[float]] = {name: [] for name in bases}
    for model in bases.values():
        lora.add_lora(model, RANK, ALPHA, TARGETS["all-linear"])
    nothing = lambda model, step: None  # noqa: E731
    rounds = interleaved(
        {
            name: steps(model, batches, supervised_loss, nothing, found[name])
            for name, model in bases.items()
        }
    )
    for name, losses in found.items():
        assert sum(losses[-STEPS:]) < sum(losses[:STEPS]), name
    each = [seconds / STEPS for seconds in rounds.seconds["ours"]]
    row("a step of QLoRA, ours", each, "s")
    row(
        "a step: seconds, ours / bitsandbytes",
        rounds.times_faster("bitsandbytes", than="ours"),
        "times",
    )
    row(
        "a step: seconds, ours / LoRA on float32",
        rounds.times_faster("float32", than="ours"),
        "times",
    )
