"""The exercises of Day 4, in the order of the notebook: the core, which quantises blocks, finds the
levels of NF4, packs two codes to a byte and computes with what was packed, under LoRA; then a look
at weights that were quantised before, a count of bits, and the knob that makes a training fit.

The letters: `codes` (n,) are places in `levels` (16,), which ascend from -1 to 1; `absmax`
(blocks,) is the largest absolute value of each block. No weight of a case lies at the middle
between two levels.
"""

from dataclasses import replace
from functools import partial
from statistics import NormalDist

import torch
from torch import Generator, Tensor

from course_lib import planner
from course_lib.checks import Exercise, known
from course_lib.checks.day3 import reached

EXERCISES = {}
DRAW = Generator().manual_seed(4)
QUANTILE = NormalDist().inv_cdf
FEW = torch.tensor([-1.0, -0.25, 0.0, 0.5, 1.0])  # levels of the first cases, not symmetric
NF4 = torch.tensor(
    [
        *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
        *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0),
    ]
)


def drawn(*shape):
    """Multiples of 1/8 from -3 to 3."""
    return torch.randint(-24, 25, shape, generator=DRAW) / 8


# --- E4.1 Quantise a block


def quantize(
    weights,
    levels,
    block_size,
    largest=lambda blocks: blocks.abs().amax(1),
    scaled=lambda blocks, absmax: blocks / absmax.clamp(min=1e-38)[:, None],
    nearest=lambda distance: distance.abs().argmin(-1),
):
    """largest: of each block; scaled: the blocks in the unit of the levels; nearest: the code, from
    the distances to all levels.
    """
    blocks = weights.view(-1, block_size)
    absmax = largest(blocks)
    values = scaled(blocks, absmax)
    return nearest(values.flatten()[:, None] - levels), absmax


def of_all(blocks):
    """One absmax for the whole tensor."""
    return blocks.abs().max().expand(len(blocks))


def level_below(distance):
    """The last level that is not above the value."""
    return (distance >= 0).sum(-1) - 1


EXERCISES["E4.1"] = Exercise(
    lambda weights, levels, block_size: quantize(weights, levels, block_size),
    [
        (torch.tensor([0.6, -2.0, 1.1, 0.1, 3.0, -0.6, -3.0, 1.4]), FEW, 4),
        (torch.tensor([-4.0, 1.2, 0.3, 2.5]), FEW, 2),
        *((torch.randn(count, generator=DRAW), NF4, size) for count, size in ((32, 8), (12, 12))),
        (torch.tensor([0.0, 0.0, 0.0, 0.02, -0.01, 0.004]), FEW, 3),  # a block of zeros
        (torch.randn(10, generator=DRAW), NF4, 1),
        (torch.randn(24, generator=DRAW) / 4096, NF4, 8),  # small weights
    ],
    known(
        "a block of zeros gives codes that are not those of zero: 0 divided by 0 is not a number; "
        "divide by something tiny instead",
        partial(quantize, scaled=lambda blocks, absmax: blocks / absmax[:, None]),
        "your scale is the largest value: a block's largest absolute value can be a negative one's",
        partial(quantize, largest=lambda blocks: blocks.amax(1)),
        "one absmax for all weights: each block has its own",
        partial(quantize, largest=of_all),
        "your blocks run across: a block is {block_size} weights that follow one another",
        lambda weights, levels, block_size: quantize(
            weights.view(block_size, -1).T.flatten(), levels, block_size
        ),
        "your codes are of weights that were not divided by the absmax of their block",
        partial(quantize, scaled=lambda blocks, absmax: blocks),
        "you multiply by the absmax: divide, so that every block lies between -1 and 1",
        partial(quantize, scaled=lambda blocks, absmax: blocks * absmax[:, None]),
        "you divide by the root of the mean square: divide by the absmax",
        partial(
            quantize,
            scaled=lambda blocks, absmax: blocks / blocks.pow(2).mean(1, keepdim=True).sqrt(),
        ),
        "your codes are of absolute values: the sign is lost",
        partial(
            quantize,
            scaled=lambda blocks, absmax: blocks.abs() / absmax.clamp(min=1e-38)[:, None],
        ),
        "you take the level below: take the nearest, which can be the one above",
        partial(quantize, nearest=level_below),
        "you take the level above: take the nearest, which can be the one below",
        partial(quantize, nearest=lambda distance: (distance > 0).sum(-1)),
        "you take the smallest difference with its sign: take the smallest distance",
        partial(quantize, nearest=lambda distance: distance.argmin(-1)),
        "you take the farthest level",
        partial(quantize, nearest=lambda distance: distance.abs().argmax(-1)),
        "your codes count from 1: the first level has code 0",
        partial(quantize, nearest=lambda distance: distance.abs().argmin(-1) + 1),
        "your codes are rounded multiples of a step: the levels are not evenly spaced, look for "
        "the nearest",
        lambda weights, levels, block_size: (
            (
                (weights.view(-1, block_size) / quantize(weights, levels, block_size)[1][:, None])
                .flatten()
                .add(1)
                .mul((len(levels) - 1) / 2)
                .round()
            ),
            quantize(weights, levels, block_size)[1],
        ),
        "you return levels: return their codes, the places in `levels`",
        lambda weights, levels, block_size: (
            levels[quantize(weights, levels, block_size)[0]],
            quantize(weights, levels, block_size)[1],
        ),
        "your absmax is that of the scaled blocks: return the one you divided by",
        lambda weights, levels, block_size: (
            quantize(weights, levels, block_size)[0],
            torch.ones(len(weights) // block_size),
        ),
        "your absmax is repeated for each weight: one number a block",
        lambda weights, levels, block_size: (
            quantize(weights, levels, block_size)[0],
            quantize(weights, levels, block_size)[1].repeat_interleave(block_size),
        ),
        "your codes have the shape of the blocks: make them flat, one for each weight",
        lambda weights, levels, block_size: (
            quantize(weights, levels, block_size)[0].view(-1, block_size),
            quantize(weights, levels, block_size)[1],
        ),
        "your absmax has a second dimension: expected one number a block",
        lambda weights, levels, block_size: (
            quantize(weights, levels, block_size)[0],
            quantize(weights, levels, block_size)[1][:, None],
        ),
        "your results come in the wrong order: codes, then absmax",
        lambda *arguments: quantize(*arguments)[::-1],
        "you return the codes alone: without absmax nobody can go back",
        lambda *arguments: quantize(*arguments)[0],
    ),
    otherwise="expected the code of the nearest level for each weight, after its block was divided "
    "by its absmax; and the absmax of each block",
)


# --- E4.2 The levels of NF4


def normal_levels(
    above,
    below,
    outermost,
    chances=lambda count, outermost: [
        0.5 + (outermost - 0.5) * i / count for i in range(1, count + 1)
    ],
    quantile=QUANTILE,
    finish=lambda levels: [level / levels[-1] for level in levels],
):
    """chances: the probabilities for the levels of one side, ascending; finish: of all levels."""
    positive = [quantile(chance) for chance in chances(above, outermost)]
    negative = [-quantile(chance) for chance in chances(below, outermost)]
    return finish([*reversed(negative), 0.0, *positive])


def with_middles(count, outermost):
    return [0.5 + (outermost - 0.5) * (i + 0.5) / count for i in range(count)]


def both_ends(count, outermost):
    """As torch.linspace(0.5, outermost, count)."""
    return [0.5 + (outermost - 0.5) * i / max(1, count - 1) for i in range(count)]


def one_side(above, below, outermost):
    """Quantiles from 1 - outermost to outermost, in one piece."""
    count = above + below + 1
    edge = 1 - outermost
    chances = [edge + (outermost - edge) * i / (count - 1) for i in range(count)]
    levels = [QUANTILE(chance) for chance in chances]
    return [level / levels[-1] for level in levels]


EXERCISES["E4.2"] = Exercise(
    lambda above, below, outermost: normal_levels(above, below, outermost),
    [
        (2, 1, 0.9),
        (3, 4, 0.95),
        (8, 7, 0.9677083),
        (1, 1, 0.8),
        (5, 2, 0.99),
    ],
    known(
        "your levels are evenly spaced: equally spaced are the probabilities, and each level is "
        "the quantile of one",
        partial(normal_levels, quantile=lambda chance: chance - 0.5),
        "your levels are probabilities: a level is the quantile, inv_cdf, of its probability",
        partial(normal_levels, quantile=lambda chance: chance),
        "your levels are values of cdf: inv_cdf goes from a probability to a quantile",
        partial(normal_levels, quantile=NormalDist().cdf),
        "your levels are not divided by the largest: they must end at 1",
        partial(normal_levels, finish=lambda levels: levels),
        "you divide by the largest probability: divide by the largest level",
        lambda above, below, outermost: [
            level / outermost
            for level in normal_levels(above, below, outermost, finish=lambda levels: levels)
        ],
        "zero is missing: it is a level of its own, so that zeros stay zeros",
        partial(
            normal_levels,
            finish=lambda levels: [level / levels[-1] for level in levels if level],
        ),
        "your probabilities begin at one half, whose quantile is the zero that is there already: "
        "begin one step above",
        partial(normal_levels, chances=both_ends),
        "your probabilities stand in the middles of their parts: the largest is `outermost` itself",
        partial(normal_levels, chances=with_middles),
        "`outermost` is left out: the largest probability on each side is `outermost` itself",
        partial(
            normal_levels,
            chances=lambda count, outermost: [
                0.5 + (outermost - 0.5) * i / (count + 1) for i in range(1, count + 1)
            ],
        ),
        "your probabilities start at zero: on each side they lie between one half and `outermost`",
        partial(
            normal_levels,
            chances=lambda count, outermost: [outermost * i / count for i in range(1, count + 1)],
        ),
        "`above` and `below` have changed places",
        lambda above, below, outermost: normal_levels(below, above, outermost),
        "both sides have `above` levels: below zero there are `below`",
        lambda above, below, outermost: normal_levels(above, above, outermost),
        "both sides have `below` levels: above zero there are `above`",
        lambda above, below, outermost: normal_levels(below, below, outermost),
        "your levels go from 1 - outermost to outermost in one piece, so that zero is none of them",
        one_side,
        "your levels descend: expected them ascending, from below zero to 1",
        partial(normal_levels, finish=lambda levels: [x / levels[-1] for x in levels[::-1]]),
        "the levels below zero come in the wrong order: the lowest first",
        lambda above, below, outermost: (
            normal_levels(above, below, outermost)[:below][::-1]
            + normal_levels(above, below, outermost)[below:]
        ),
        "the levels below zero are positive: they lack their sign",
        partial(normal_levels, finish=lambda levels: [abs(x) / levels[-1] for x in levels]),
        "the levels below zero are missing",
        lambda above, below, outermost: normal_levels(above, below, outermost)[below:],
    ),
    otherwise="expected {below} quantiles below zero, zero, and {above} above, at equally spaced "
    "probabilities up to {outermost:g} on each side; all divided by the largest",
)


# --- E4.3 Two codes to a byte


def bytes_of(function, codes):
    """The bytes that your function makes of these codes, and their type."""
    found = function(codes)
    if not isinstance(found, Tensor):
        return {"bytes": found, "they are": f"of type {type(found).__name__}"}
    return {"bytes": found, "they are": f"of {found.dtype}"}


def pack(codes, high=16, low=1, first=slice(0, None, 2), second=slice(1, None, 2)):
    """high, low: what the first and the second of each pair are multiplied by."""
    return (high * codes[first].int() + low * codes[second].int()).to(torch.uint8)


def halves(codes):
    half = len(codes) // 2
    return pack(codes, first=slice(half), second=slice(half, None))


EXERCISES["E4.3"] = Exercise(
    lambda codes: pack(codes),
    [
        (torch.tensor([1, 2, 15, 0, 7, 8], dtype=torch.uint8),),
        (torch.tensor([3, 12], dtype=torch.uint8),),
        *(
            (torch.randint(0, 16, (count,), generator=DRAW).to(torch.uint8),)
            for count in (8, 64, 4)
        ),
        (torch.zeros(2, dtype=torch.uint8),),
    ],
    known(
        "the second code of each pair stands in the high four bits: the first belongs there",
        lambda codes: pack(codes, high=1, low=16),
        "you pack the first half of the codes with the second half: a byte holds two neighbours",
        halves,
        "your high code is moved by 3 bits: four bits hold a code",
        lambda codes: pack(codes, high=8),
        "your high code is moved by 5 bits: four bits hold a code",
        lambda codes: pack(codes, high=32),
        "your high code is multiplied by 15: a step of the high four bits is 16",
        lambda codes: pack(codes, high=15),
        "your high code is multiplied by 10: a step of the high four bits is 16",
        lambda codes: pack(codes, high=10),
        "you add the two codes: nobody could take the sum apart; the first belongs four bits "
        "higher",
        lambda codes: pack(codes, high=1),
        "both codes of a pair are multiplied by 16: the second stays in the low four bits",
        lambda codes: pack(codes, low=16),
        "you keep only the high code",
        lambda codes: pack(codes, low=0),
        "you keep only the low code",
        lambda codes: pack(codes, high=0),
        "you combine with `&`, which keeps only common bits: combine with `|`, or add",
        lambda codes: codes[::2] << 4 & codes[1::2],
        "each code overlaps with the next: a pair is used once, so take every second",
        lambda codes: codes[:-1] << 4 | codes[1:],
        "every code has a byte of its own: two go into one",
        lambda codes: codes << 4,
        "your bytes are in a wider type: torch.uint8 is the one of one byte",
        lambda codes: pack(codes).int(),
        "your bytes are in a type of eight bytes each: torch.uint8 is the one of one byte",
        lambda codes: pack(codes).long(),
        "your bytes are floats: torch.uint8 is the type of a byte",
        lambda codes: pack(codes).float(),
        "your bytes are signed: torch.uint8 goes from 0 to 255",
        lambda codes: pack(codes).view(torch.int8),
        "your bytes are a list: return a tensor of torch.uint8",
        lambda codes: pack(codes).tolist(),
        "your bytes stand in pairs or in a column: return them flat",
        lambda codes: pack(codes)[:, None],
        "you return the pairs: combine the two codes of each",
        lambda codes: codes.view(-1, 2),
    ),
    otherwise="expected a byte of torch.uint8 for each two neighbours, the first of them in the "
    "high four bits",
    ask=bytes_of,
)


# --- E4.4 The forward pass of QLoRA


def passes(function, x, packed, absmax, levels, A, B, scale):
    """What your function makes of x (N, in), a packed weight, A (r, in), B (out, r) and a scale."""
    with torch.enable_grad():
        for factor in (x, A, B):
            factor.requires_grad_()
        found = function(x, packed, absmax, levels, A, B, scale)
    names = reached(found, {"x": x, "A": A, "B": B})
    back = torch.autograd.grad(found.sum(), x, retain_graph=True) if "x" in names else [None]
    return {"result": found, "gradients of the result": names, "gradient of x": back[0]}


def codes_of(packed):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()


def weight_of(packed, absmax, levels, codes=codes_of):
    """(n,) in the order of the codes."""
    values = levels[codes(packed).long()]
    return (values.view(len(absmax), -1) * absmax[:, None]).flatten()


def forward(
    x,
    packed,
    absmax,
    levels,
    A,
    B,
    scale,
    weight=weight_of,
    shape=lambda flat, out, columns: flat.view(out, columns),
    update=lambda x, A, B, scale: scale * (x @ A.T) @ B.T,
):
    """weight: the flat one, dequantised; shape: makes it (out, in); update: what LoRA adds."""
    W = shape(weight(packed, absmax, levels), len(B), A.shape[1])
    return x @ W.T + update(x, A, B, scale)


def swapped(packed):
    return torch.stack([packed & 15, packed >> 4], 1).flatten()


def one_after_the_other(packed):
    return torch.cat([packed >> 4, packed & 15])


def across(packed, absmax, levels):
    """Each absmax for every so-many-th weight."""
    values = levels[codes_of(packed).long()]
    return values * absmax.repeat(len(values) // len(absmax))


def packed_layer(n, out, columns, blocks, rank, scale):
    codes = torch.randint(0, 256, (out * columns // 2,), generator=DRAW).to(torch.uint8)
    absmax = drawn(blocks).abs() + 0.5
    levels = NF4 if out > 2 else torch.arange(-8, 8) / 8
    return drawn(n, columns), codes, absmax, levels, drawn(rank, columns), drawn(out, rank), scale


EXERCISES["E4.4"] = Exercise(
    lambda x, packed, absmax, levels, A, B, scale: forward(x, packed, absmax, levels, A, B, scale),
    [
        packed_layer(1, 2, 4, 2, 1, 2),
        packed_layer(3, 6, 4, 3, 2, 0.25),
        packed_layer(2, 4, 4, 4, 3, 2),  # square
        packed_layer(4, 3, 8, 1, 2, 1.5),  # one block
        packed_layer(2, 8, 2, 16, 1, 3),  # a block for each pair
        (*packed_layer(2, 4, 6, 3, 2, 2)[:5], torch.zeros(4, 2), 2),  # a fresh adapter
    ],
    known(
        "the codes of each byte have changed places: the high four bits hold the first",
        partial(forward, weight=partial(weight_of, codes=swapped)),
        "all high codes come before all low ones: a byte holds two neighbours",
        partial(forward, weight=partial(weight_of, codes=one_after_the_other)),
        "your weight is not multiplied by the absmax of its block",
        partial(forward, weight=lambda packed, absmax, levels: levels[codes_of(packed).long()]),
        "your weight is divided by the absmax: multiply, to go back",
        partial(
            forward, weight=lambda packed, absmax, levels: weight_of(packed, 1 / absmax, levels)
        ),
        "your blocks run across: a block is the weights that follow one another, and each has its "
        "own absmax",
        partial(forward, weight=across),
        "all blocks have the first absmax: each has its own",
        partial(
            forward,
            weight=lambda packed, absmax, levels: weight_of(
                packed, absmax[:1].expand(len(absmax)), levels
            ),
        ),
        "your weight holds the codes themselves: a code is a place in `levels`",
        partial(
            forward,
            weight=lambda packed, absmax, levels: weight_of(packed, absmax, torch.arange(16.0)),
        ),
        "your weight is read as (in, out): the packed one is (out, in), row by row",
        partial(forward, shape=lambda flat, out, columns: flat.view(columns, out).T),
        "LoRA is missing: add scale * B A x",
        partial(forward, update=lambda x, A, B, scale: 0),
        "what LoRA adds is not scaled",
        partial(forward, update=lambda x, A, B, scale: (x @ A.T) @ B.T),
        "what LoRA adds is scaled twice",
        partial(forward, update=lambda x, A, B, scale: scale**2 * (x @ A.T) @ B.T),
        "what LoRA adds is divided by r: the scale that you are given is alpha / r already",
        partial(forward, update=lambda x, A, B, scale: scale / len(A) * (x @ A.T) @ B.T),
        "x gets no gradient through A and B: what comes before this layer learns from them, too",
        partial(forward, update=lambda x, A, B, scale: scale * (x.detach() @ A.T) @ B.T),
        "what LoRA adds is divided by the scale",
        partial(forward, update=lambda x, A, B, scale: (x @ A.T) @ B.T / scale),
        "the base is scaled, too: only what LoRA adds is",
        lambda x, packed, absmax, levels, A, B, scale: (
            scale * forward(x, packed, absmax, levels, A, B, 1)
        ),
        "your result is LoRA's alone: add what the packed weight makes of x",
        lambda x, packed, absmax, levels, A, B, scale: scale * (x @ A.T) @ B.T,
        "x itself is in your result",
        lambda x, *rest: forward(x, *rest) + x.sum(1, keepdim=True),
        "your result is transposed: expected (N, out), a row for each row of x",
        lambda *arguments: forward(*arguments).T,
        "what LoRA adds is cut off from its gradient: no detach, no torch.no_grad around it",
        partial(forward, update=lambda x, A, B, scale: (scale * (x @ A.T) @ B.T).detach()),
        "your result has no gradient, so that nothing is learned: only the packed weight is frozen",
        lambda *arguments: forward(*arguments).detach(),
        "x gets no gradient through the packed weight: frozen is the weight; what comes before "
        "this layer still learns",
        lambda x, packed, absmax, levels, A, B, scale: (
            x.detach() @ weight_of(packed, absmax, levels).view(len(B), -1).T
            + scale * (x.detach() @ A.T) @ B.T
        ),
        "you return the weight: multiply x by it",
        lambda x, packed, absmax, levels, A, B, scale: (
            weight_of(packed, absmax, levels).view(len(B), -1) + scale * B @ A
        ),
    ),
    otherwise="expected x times the dequantised weight (out, in), plus scale times what B A makes "
    "of x; gradients reach x, A and B",
    ask=passes,
)


# --- E4.5 Was it quantised before?


def distinct(block):
    return len(block.unique())


def was_quantized(weights, block_size, most, count=distinct, decide=max):
    """count: what is counted in a block; decide: which of the counts is compared with `most`."""
    return decide(map(count, weights.view(-1, block_size))) <= most


def on_grid(blocks, size, levels, seed):
    """Weights of which each block has its own `levels` values."""
    draw = Generator().manual_seed(seed)
    values = torch.randn(blocks, levels, generator=draw)
    return values.gather(1, torch.randint(0, levels, (blocks, size), generator=draw)).flatten()


EXERCISES["E4.5"] = Exercise(
    lambda weights, block_size, most: was_quantized(weights, block_size, most),
    [
        (torch.tensor([0.5, 0.5, -1.0, 0.5, 2.0, 3.0, 3.0, 2.0]), 4, 2),
        (torch.tensor([0.5, 0.5, -1.0, 0.5, 2.0, 3.0, 1.0, 2.0]), 4, 2),  # the second block
        (on_grid(4, 32, 16, 1), 32, 16),
        (torch.randn(96, generator=DRAW), 32, 16),
        (torch.cat([on_grid(3, 32, 8, 2), torch.randn(32, generator=DRAW)]), 32, 16),
        (torch.cat([torch.randn(32, generator=DRAW), on_grid(3, 32, 8, 3)]), 32, 16),
        (on_grid(1, 8, 4, 5), 8, 4),
        (torch.tensor([1.0, -1.0, 2.0, -2.0]), 4, 2),  # four values, two sizes
        (torch.tensor([0.5, 0.501, 0.502, 0.503]), 4, 2),  # near to each other
        (torch.zeros(8), 4, 1),
    ],
    known(
        "you count the values of all blocks together: each block has its own scale, so count in "
        "each",
        lambda weights, block_size, most: len(weights.unique()) <= most,
        "one block on a grid is enough for you: all must be",
        partial(was_quantized, decide=min),
        "you look at the first block alone",
        lambda weights, block_size, most: was_quantized(weights[:block_size], block_size, most),
        "you look at the last block alone",
        lambda weights, block_size, most: was_quantized(weights[-block_size:], block_size, most),
        "your answer is upside down: few values mean that it was quantised",
        lambda *arguments: not was_quantized(*arguments),
        "you count absolute values: a value and its negative are two",
        partial(was_quantized, count=lambda block: distinct(block.abs())),
        "exactly {most} distinct values are allowed: `most` is the largest number, not one too "
        "many",
        lambda weights, block_size, most: was_quantized(weights, block_size, most - 1),
        "you want exactly {most} values in a block: fewer are a grid, too",
        lambda weights, block_size, most: all(
            distinct(block) == most for block in weights.view(-1, block_size)
        ),
        "you count weights, not values: `unique` leaves each value once",
        partial(was_quantized, count=len),
        "you take the mean over the blocks: a single block with more values is no grid",
        lambda weights, block_size, most: (
            sum(map(distinct, weights.view(-1, block_size))) / (len(weights) / block_size) <= most
        ),
        "you round the values before you count them, so that near ones become one",
        partial(was_quantized, count=lambda block: distinct(block.round())),
    ),
    otherwise="expected {expected}: True if no block of {block_size} weights has more than {most} "
    "distinct values",
)


# --- E4.6 Bits


def bits(block_size, second_block, code=4, constant=8, scale=32):
    """code, constant, scale: bits of a weight, of an absmax, of what a block of absmax shares."""
    return code + constant / block_size + scale / (block_size * second_block)


EXERCISES["E4.6"] = Exercise(
    lambda block_size, second_block: bits(block_size, second_block),
    [(64, 256), (32, 128), (128, 256), (16, 1), (256, 64)],
    known(
        "this is without double quantisation: an absmax has 8 bits now",
        partial(bits, constant=32, scale=0),
        "the absmax keep their 32 bits in your count: 8 bits replace them",
        partial(bits, constant=32),
        "the scales of the absmax are missing: 32 bits for each {second_block} absmax",
        partial(bits, scale=0),
        "32 bits for each {second_block} weights: it is for each {second_block} absmax, each of "
        "which is for {block_size} weights",
        lambda block_size, second_block: 4 + 8 / block_size + 32 / second_block,
        "the scales of the absmax have 32 bits, not 8",
        partial(bits, scale=8),
        "the scales of the absmax have 32 bits, not 16",
        partial(bits, scale=16),
        "the four bits of the code are missing",
        partial(bits, code=0),
        "a code has 4 bits here, not 8",
        partial(bits, code=8),
        "the block sizes have changed places",
        lambda block_size, second_block: bits(second_block, block_size),
        "these are bytes: a byte has 8 bits",
        lambda *arguments: bits(*arguments) / 8,
        "this is what double quantisation saves: return all the bits of a weight",
        lambda block_size, second_block: 4 + 32 / block_size - bits(block_size, second_block),
        "these are the bits of a block: divide by its weights",
        lambda block_size, second_block: bits(block_size, second_block) * block_size,
    ),
    otherwise="found {found:g} bits, expected {expected:g}: 4 for the code, and a weight's share "
    "of 8 for each absmax and of 32 for each block of absmax",
)


# --- E4.7 The one knob


def bytes_of(recipe, changes=None):
    return planner.bill(replace(recipe, **(changes or {}))).total


def knob(recipe, knobs, room, fits=lambda total, room: total <= room, as_it_is="none"):
    """fits: the comparison; as_it_is: what is returned if nothing needs to be turned."""
    if as_it_is and fits(bytes_of(recipe), room):
        return as_it_is
    found = (name for name in knobs if fits(bytes_of(recipe, knobs[name]), room))
    return next(found, None)


def knob_of_the_largest_saving(recipe, knobs, room):
    if bytes_of(recipe) <= room:
        return "none"
    best = min(knobs, key=lambda name: bytes_of(recipe, knobs[name]))
    return best if bytes_of(recipe, knobs[best]) <= room else None


def knobs_one_after_the_other(recipe, knobs, room):
    if bytes_of(recipe) <= room:
        return "none"
    for name, changes in knobs.items():
        recipe = replace(recipe, **changes)
        if bytes_of(recipe) <= room:
            return name
    return None


def first_knob_that_saves(recipe, knobs, room):
    if bytes_of(recipe) <= room:
        return "none"
    return next((name for name in knobs if bytes_of(recipe, knobs[name]) < bytes_of(recipe)), None)


def knob_by_activations(recipe, knobs, room):
    changes = {"none": {}} | knobs
    bills = {name: planner.bill(replace(recipe, **some)) for name, some in changes.items()}
    return next((name for name, bill in bills.items() if bill.activations <= room), None)


TRAINING = planner.Recipe("tiny", "lora", batch=8, length=512, dtype="float32")
MILD = {"half the length": {"length": 256}, "batch 1": {"batch": 1}}
KNOBS = {"checkpointing": {"checkpointing": True}} | MILD
BETWEEN = (bytes_of(TRAINING, KNOBS["checkpointing"]) + bytes_of(TRAINING, KNOBS["batch 1"])) // 2
EXERCISES["E4.7"] = Exercise(
    lambda recipe, knobs, room: knob(recipe, knobs, room),
    [
        (TRAINING, KNOBS, bytes_of(TRAINING)),
        (TRAINING, KNOBS, bytes_of(TRAINING) - 1),
        (TRAINING, MILD, bytes_of(TRAINING, MILD["half the length"])),
        (TRAINING, MILD | KNOBS, bytes_of(TRAINING, KNOBS["checkpointing"])),
        (TRAINING, KNOBS, BETWEEN),
        (TRAINING, dict([*KNOBS.items()][:2]), BETWEEN),
        (TRAINING, KNOBS, 10**6),
    ],
    known(
        "{room} bytes are enough for {room} bytes: compare with <=",
        partial(knob, fits=lambda total, room: total < room),
        "the recipe may fit as it is: then nothing needs to be turned, return 'none'",
        partial(knob, as_it_is=None),
        "you return the knob that saves most: the first one that is enough does less harm",
        knob_of_the_largest_saving,
        "you turn one knob after the other and keep them turned: begin with `recipe` for each",
        knobs_one_after_the_other,
        "you return the first knob that saves something: it must be enough, too",
        first_knob_that_saves,
        "you compare one part of the bill: all of it must fit, its `total`",
        knob_by_activations,
        "you return the last knob that is enough: the order says what does less harm",
        lambda recipe, knobs, room: knob(recipe, dict(reversed(knobs.items())), room),
        "you compare the wrong way round: what fits has at most {room} bytes",
        partial(knob, fits=lambda total, room: total >= room),
    ),
    otherwise="found {found!r}, expected {expected!r}: the first of {knobs} with which the bill is "
    "at most {room}",
)
