"""Tests of course_lib.memory: the bills that papers and notes print."""

import pytest
import torch
from torch import nn

from course_lib.memory import BILLS, activation_bytes, checkpoint_blocks, training_bytes
from course_lib.runtime import CourseError


@pytest.mark.parametrize(
    ("bill", "expected"),
    [("bf16", 12), ("fp32", 16), ("mixed, ZeRO", 16), ("mixed, HF", 18), ("fp32 + 8", 24)],
)
def test_bytes_for_each_parameter(bill, expected):
    assert BILLS[bill].bytes_per_parameter == expected


def test_llama_65b_takes_more_than_780_gb():
    assert round(training_bytes(65_285_660_672, "bf16") / 1e9) == 783


def test_a_billion_parameters_take_24_gb_and_not_80():
    assert training_bytes(10**9, "fp32 + 8") == 24 * 10**9


def test_an_unknown_bill_lists_the_known_ones():
    with pytest.raises(CourseError, match="'fp8' is not known, expected one of all bf16, bf16"):
        training_bytes(1, "fp8")


def test_activations_are_what_the_backward_pass_needs():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.ones(3, 4)
    result, size = activation_bytes(model, lambda: model(x))
    assert torch.equal(result, model(x))
    assert size == 4 * (3 * 4 + 3 * 8), (
        "the inputs of both layers in float32; Tanh keeps its result, which is one of them"
    )
    with torch.no_grad():
        assert activation_bytes(model, lambda: model(x))[1] == 0


def test_a_checkpointed_block_keeps_its_inputs_only(tiny):
    model, ids = tiny.model.train(), torch.arange(3, 19)[None]
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    _, whole = activation_bytes(model, lambda: model(ids).logits)
    checkpoint_blocks(model, blocks)
    loss, size = activation_bytes(model, lambda: model(ids).logits)
    inputs = 4 * 16 * width * blocks
    assert inputs <= size < whole / 2
    loss.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    sizes = []
    for count in range(blocks + 1):
        checkpoint_blocks(model, count)
        sizes.append(activation_bytes(model, lambda: model(ids).logits)[1])
    assert sizes[0] == whole
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes), "each block counts"


@pytest.mark.parametrize("count", [-1, 5, 1.0, True, None])
def test_only_blocks_that_exist_can_be_checkpointed(count, tiny):
    with pytest.raises(CourseError, match="expected a whole number in 0..4, the model's blocks"):
        checkpoint_blocks(tiny.model, count)
