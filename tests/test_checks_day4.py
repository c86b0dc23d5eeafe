"""Tests of the exercises of Day 4: right functions pass in whatever style they are written, and
wrong ones as a learner writes them get the sentence that helps.

That each listed mistake has its own sentence is in tests/test_checks.py.
"""

from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from torch import nn

from course_lib import planner, qlora
from course_lib.checks import diagnosis, find


def quantize_by_library(weights, levels, block_size):
    return qlora.quantize_blockwise(weights, levels, block_size)


def quantize_in_a_loop(weights, levels, block_size):
    codes, absmax = [], []
    for start in range(0, len(weights), block_size):
        block = weights[start : start + block_size].tolist()
        largest = max(map(abs, block))
        absmax.append(largest)
        for weight in block:
            scaled = weight / largest if largest else 0.0
            distances = [abs(scaled - level) for level in levels.tolist()]
            codes.append(distances.index(min(distances)))
    return codes, absmax


def levels_by_library(above, below, outermost):
    def side(count):
        chances = torch.linspace(0.5, outermost, count + 1, dtype=torch.float64)[1:]
        return torch.special.ndtri(chances)

    levels = torch.cat([-side(below).flip(0), torch.zeros(1, dtype=torch.float64), side(above)])
    return levels / levels.max()


def levels_sorted_at_the_end(above, below, outermost):
    found = [0.0]
    for sign, count in ((1, above), (-1, below)):
        step = (outermost - 0.5) / count
        found += [sign * NormalDist().inv_cdf(0.5 + step * k) for k in range(1, count + 1)]
    return tuple(level / max(found) for level in sorted(found))


def pack_by_library(codes):
    return qlora.pack(codes)


def pack_by_sums(codes):
    pairs = codes.view(-1, 2).int()
    return (pairs * torch.tensor([16, 1])).sum(1).to(torch.uint8)


def pack_in_a_loop(codes):
    some = codes.tolist()
    found = [16 * some[i] + some[i + 1] for i in range(0, len(some), 2)]
    return torch.tensor(found, dtype=torch.uint8)


def forward_by_library(x, packed, absmax, levels, A, B, scale):
    codes = qlora.unpack(packed, 2 * len(packed))
    weight = qlora.dequantize_blockwise(codes, absmax, levels, len(codes) // len(absmax))
    return nn.functional.linear(x, weight.view(len(B), -1) + scale * B @ A)


def forward_row_by_row(x, packed, absmax, levels, A, B, scale):
    values = []
    for byte in packed.tolist():
        values += [levels[byte // 16], levels[byte % 16]]
    size = len(values) // len(absmax)
    weight = torch.stack([value * absmax[i // size] for i, value in enumerate(values)])
    base = torch.einsum("ni,oi->no", x, weight.reshape(B.shape[0], A.shape[1]))
    return base + scale * torch.einsum("ni,ri,or->no", x, A, B)


def was_quantized_by_sets(weights, block_size, most):
    blocks = [weights[i : i + block_size] for i in range(0, len(weights), block_size)]
    return max(len(set(block.tolist())) for block in blocks) <= most


def bits_of_a_large_block(block_size, second_block):
    weights = block_size * second_block
    return (4 * weights + 8 * second_block + 32) / weights


def knob_in_a_loop(recipe, knobs, room):
    if planner.bill(recipe).total <= room:
        return "none"
    for name in knobs:
        if max(one.total for one in planner.bills(replace(recipe, **knobs[name]))) <= room:
            return name
    return None


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("E4.1", quantize_by_library),
        ("E4.1", quantize_in_a_loop),
        ("E4.2", levels_by_library),
        ("E4.2", levels_sorted_at_the_end),
        ("E4.3", pack_by_library),
        ("E4.3", pack_by_sums),
        ("E4.3", pack_in_a_loop),
        ("E4.4", forward_by_library),
        ("E4.4", forward_row_by_row),
        ("E4.5", was_quantized_by_sets),
        ("E4.6", bits_of_a_large_block),
        ("E4.7", knob_in_a_loop),
    ],
)
def test_a_right_function_passes_in_every_style(name, function):
    assert diagnosis(name, function) is None


def test_no_weight_lies_at_the_middle_between_two_levels():
    for weights, levels, block_size in find("E4.1").cases:
        absmax = weights.view(-1, block_size).abs().amax(1).clamp(min=1e-38)
        scaled = weights / absmax.repeat_interleave(block_size)
        nearest = (scaled[:, None] - levels).abs().sort(dim=1).values
        assert (nearest[:, 1] - nearest[:, 0] > 1e-4).all()


def absmax_with_sign(weights, levels, block_size):
    blocks = weights.view(-1, block_size)
    absmax = blocks.max(dim=1).values
    return (blocks / absmax[:, None]).flatten()[:, None].sub(levels).abs().argmin(1), absmax


def divided_by_zero(weights, levels, block_size):
    blocks = weights.view(-1, block_size)
    absmax = blocks.abs().max(dim=1).values
    return ((blocks / absmax[:, None]).flatten()[:, None] - levels).abs().argmin(1), absmax


def linspace_of_both_ends(above, below, outermost):
    quantile = NormalDist().inv_cdf
    up = [quantile(p) for p in torch.linspace(0.5, outermost, above, dtype=torch.float64).tolist()]
    down = [
        -quantile(p) for p in torch.linspace(0.5, outermost, below, dtype=torch.float64).tolist()
    ]
    levels = [*reversed(down), 0.0, *up]
    return [level / max(levels) for level in levels]


def low_bits_first(codes):
    return codes[1::2] << 4 | codes[::2]


def high_before_low(x, packed, absmax, levels, A, B, scale):
    codes = torch.cat([packed >> 4, packed & 15])
    weight = (levels[codes.int()].view(len(absmax), -1) * absmax[:, None]).view(len(B), -1)
    return x @ weight.T + scale * x @ A.T @ B.T


def scaled_altogether(x, packed, absmax, levels, A, B, scale):
    plain = find("E4.4").reference(x, packed, absmax, levels, A, B, 1)
    return plain * scale


@pytest.mark.parametrize(
    ("name", "function", "sentence"),
    [
        ("E4.1", absmax_with_sign, "your scale is the largest value"),
        ("E4.1", divided_by_zero, "a block of zeros gives codes that are not those of zero"),
        ("E4.2", linspace_of_both_ends, "your probabilities begin at one half"),
        ("E4.3", low_bits_first, "the second code of each pair stands in the high four bits"),
        ("E4.4", high_before_low, "all high codes come before all low ones"),
        ("E4.4", scaled_altogether, "the base is scaled, too"),
    ],
)
def test_a_mistake_as_a_learner_writes_it_is_named(name, function, sentence):
    assert sentence in diagnosis(name, function)
