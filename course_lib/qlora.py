"""QLoRA: the frozen weights of a model in four bits, two to a byte, and LoRA trained on top.

Paper: QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3

    h = dequantize(W) x + (alpha / r) B A x

The weights of a block are divided by the largest of their absolute values, its absmax; then each
becomes the code of the nearest of 16 levels, and a code needs four bits. NF4's levels are quantiles
of a normal distribution. The absmax of all blocks are quantised again (double quantisation): their
mean is subtracted, and the rest becomes 8 bits, in blocks of 256.

The second term is LoRA's own: `quantize_layers`, then `lora.add_lora`. Where the paper and what
bitsandbytes does differ, this is bitsandbytes: the levels come from its quantiles and not from the
paper's equation (4), the 8 bits are its dynamic type and not FP8. Bytes and numbers equal its own;
only of the absmax that were quantised again a few of a thousand lie a step beside, since its kernel
for CPUs looks codes up in a coarse table.
"""

import copy
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from course_lib import surgery
from course_lib.runtime import CourseError
from course_lib.surgery import ALL_LINEAR, LinearWrapper, Targets, weight_matrix

BLOCK = 64  # weights that share an absmax
CONSTANTS_BLOCK = 256  # absmax that share a scale in double quantisation
# The probability below the largest level of NF4: the mean of what 15 and what 16 levels at the
# middles of equal parts would have. Seven digits of it stand in bitsandbytes.
OUTERMOST = round(1 - (1 / 30 + 1 / 32) / 2, 7)
ROUNDS = 200  # of the search for levels
SMALLEST = 1e-38  # what the absmax of a block of zeros is taken for


def nf4_levels() -> Tensor:
    """(16,) NormalFloat: zero, and quantiles of the normal distribution, 8 above zero and 7 below,
    at equally spaced probabilities from one half to OUTERMOST; divided by the largest.

    >>> [round(level, 4) for level in nf4_levels().tolist()[6:10]]
    [-0.0911, 0.0, 0.0796, 0.1609]
    """
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in torch.linspace(OUTERMOST, 0.5, 9)[:-1].tolist()]
    below = [-quantile(p) for p in torch.linspace(OUTERMOST, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor([*below, 0.0, *reversed(above)])
    return levels / levels.max()


def fp4_levels() -> Tensor:
    """(16,) a sign, two bits of an exponent and one of a mantissa, as bitsandbytes orders them: not
    ascending, and zero stands twice.

    >>> [round(level, 4) for level in fp4_levels().tolist()[:8]]
    [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
    """
    positive = torch.tensor([0.0, 1 / 16, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0])
    return torch.cat([positive, -positive]) / 12


def even_levels(bits: int = 4) -> Tensor:
    """(2 ** bits - 1,) evenly spaced, as many above zero as below: symmetric integers.

    >>> even_levels(2).tolist()
    [-1.0, 0.0, 1.0]
    """
    if type(bits) is not int or not 2 <= bits <= 8:
        raise CourseError(f"bits={bits!r} must be a whole number in 2..8: a code is a byte at most")
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest, largest + 1) / largest


def lloyd_max_levels(values: Tensor, count: int = 16, with_zero: bool = False) -> Tensor:
    """(count,) levels with the least mean square error for `values`, which lie in -1..1: each level
    becomes the mean of the values that are nearest to it, again and again (Lloyd 1982).

    values: any shape; of more than 10 million every so-many-th is taken
    with_zero: the level that is nearest to zero becomes zero, in each round
    """
    values = values.flatten().float()
    values = values[:: len(values) // 10_000_000 + 1]
    if not len(values):
        raise CourseError("found no values, expected some to fit levels to")
    levels = values.quantile((torch.arange(count, device=values.device) + 0.5) / count)
    for _ in range(ROUNDS):
        nearest = nearest_codes(values, levels).int()
        sums = torch.zeros_like(levels).index_add_(0, nearest, values)
        found = nearest.bincount(minlength=count)
        levels = torch.where(found > 0, sums / found, levels)
        if with_zero:
            levels[levels.abs().argmin()] = 0.0
    return levels


def dynamic_levels() -> Tensor:
    """(256,) bitsandbytes' signed 8-bit type: seven powers of ten, the more levels the higher.

    Paper: 8-bit approximations, Dettmers 2015, arXiv 1511.04561
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted([*positive, *(-level for level in positive), 0.0, 1.0]))


def nearest_codes(values: Tensor, levels: Tensor) -> Tensor:
    """The code of the level that is nearest to each value, uint8: its place in `levels`, of which
    there are at most 256.

    >>> nearest_codes(torch.tensor([0.1, -2.0, 0.6]), torch.tensor([-1.0, 0.0, 1.0])).tolist()
    [1, 0, 2]
    """
    if len(levels) > 256:
        raise CourseError(f"found {len(levels)} levels, at most 256 have a code of one byte")
    ascending, order = levels.sort()
    middles = (ascending[:-1] + ascending[1:]) / 2
    if len(levels) > 16:
        codes = torch.bucketize(values, middles, out_int32=True)
    else:  # counting the middles below a value beats a search for it
        codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
        for middle in middles.tolist():
            codes += values > middle
    if not torch.equal(ascending, levels):
        codes = order.to(torch.uint8)[codes.int()]
    return codes.to(torch.uint8)


def quantize_blockwise(
    values: Tensor, levels: Tensor, block_size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Replace each value by the code of its nearest level, with one scale for a block.

    values: any shape and length, n in all; the last block may be shorter
    levels: (k,) within -1..1, in the order of their codes
    Returns codes (n,) uint8 and absmax (blocks,) float32 in the unit of `values`. A NaN or an
    infinity spoils its block, and no other.

    >>> codes, absmax = quantize_blockwise(torch.tensor([0.0, 2.0, -2.0, 1.0]), nf4_levels(), 4)
    >>> codes.tolist(), absmax.tolist()
    ([7, 15, 0, 12], [2.0])
    """
    _check(values, block_size)
    flat = values.reshape(-1).float()
    block_size = _at_most(block_size, flat)
    blocks = pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1) if len(flat) else flat.new_empty(0)
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]
    return nearest_codes(scaled.view(-1)[: len(flat)], levels), absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, levels: Tensor, block_size: int = BLOCK
) -> Tensor:
    """(n,) codes -> (n,) values, float32. Raises CourseError where absmax is not of these blocks.

    >>> dequantize_blockwise(torch.tensor([0, 2, 1]), torch.tensor([4.0]), even_levels(2)).tolist()
    [-4.0, 4.0, 0.0]
    """
    blocks = -(-len(codes) // block_size)
    if len(absmax) != blocks:
        found = f"{len(codes)} codes in blocks of {block_size} have {blocks} absmax"
        raise CourseError(f"{found}, found {len(absmax)}: give the block size they were made with")
    return _scale(levels[codes.int()], absmax, block_size)


def round_to_range(values: Tensor, bits: int = 4, block_size: int = BLOCK) -> Tensor:
    """`values`, rounded to evenly spaced numbers from the least of their block to its largest, both
    included: asymmetric integers, which keep two constants a block.

    >>> round_to_range(torch.tensor([0.0, 1.5, 4.0, 6.0]), bits=2, block_size=4).tolist()
    [0.0, 2.0, 4.0, 6.0]
    """
    _check(values, block_size)
    flat = values.reshape(-1).float()
    block_size = _at_most(block_size, flat)
    last = flat[-1:].expand(-len(flat) % block_size)
    blocks = torch.cat([flat, last]).view(-1, block_size)
    least, largest = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((largest - least) / (2**bits - 1)).clamp(min=SMALLEST)
    rounded = least + step * ((blocks - least) / step).round()
    return rounded.view(-1)[: len(flat)].view(values.shape)


def pack(codes: Tensor, fill: int = 0) -> Tensor:
    """Two codes below 16 to a byte, the first in the high four bits. (n,) -> ((n + 1) // 2,) uint8;
    fill: beside an odd last one

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
    [18, 240]
    """
    pairs = pad(codes, (0, len(codes) % 2), value=fill).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes: (count,) uint8.

    >>> unpack(torch.tensor([18, 240], dtype=torch.uint8), 3).tolist()
    [1, 2, 15]
    """
    return torch.stack([packed >> 4, packed & 15], 1).view(-1)[:count]


def quantize_constants(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: (blocks,) absmax -> codes (blocks,) of `dynamic_levels`, their scales
    (ceil(blocks / 256),), and the mean that was subtracted.
    """
    mean = absmax.mean() if len(absmax) else absmax.sum()
    return *quantize_blockwise(absmax - mean, dynamic_levels(), CONSTANTS_BLOCK), mean


def dequantize_constants(codes: Tensor, scales: Tensor, mean: Tensor, levels: Tensor) -> Tensor:
    """(blocks,) absmax again; levels: `dynamic_levels`"""
    return dequantize_blockwise(codes, scales, levels, CONSTANTS_BLOCK) + mean


def bits_per_weight(block_size: int = BLOCK, double: bool = True) -> float:
    """Four bits and the share of a weight in the constants, which are float32 or, with `double`,
    quantised again; what a whole matrix needs once is left out.

    >>> bits_per_weight(64, double=False), round(bits_per_weight(64), 3)
    (4.5, 4.127)
    """
    constant = 8 + 32 / CONSTANTS_BLOCK if double else 32
    return 4 + constant / block_size


class PackedLinear(nn.Linear):
    """A linear layer whose frozen weight is kept in codes, two to a byte.

    weight: ((d_out d_in + 1) // 2,) bytes, kept as int8: T5 casts the input of a layer to the type
        of its weight, unless that is int8
    absmax: (blocks,) float32; or, with `double`, codes, beside `scales` and `mean`
    levels, and all constants in float32: kept as their bits, int32, which no cast of a model to
        another type touches

    >>> layer = nn.Linear(64, 2)
    >>> packed = PackedLinear(layer.weight, layer.bias)
    >>> packed.weight.shape, (packed.dequantized() - layer.weight).abs().max().item() < 0.02
    (torch.Size([64]), True)
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        levels: Tensor | None = None,
        block_size: int = BLOCK,
        double: bool = True,
    ):
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        levels = _check_levels(nf4_levels() if levels is None else levels).to(weight.device)
        codes, absmax = quantize_blockwise(weight.detach(), levels, block_size)
        zero = nearest_codes(torch.zeros(1, device=weight.device), levels).item()
        self.weight = nn.Parameter(pack(codes, zero).view(torch.int8), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.block_size, self.double = block_size, double
        constants = {"levels": levels.clone(), "absmax": absmax}
        if double:
            absmax_codes, constants["scales"], constants["mean"] = quantize_constants(absmax)
            # the same for all layers, so no file needs it
            dynamic = dynamic_levels().to(weight.device).view(torch.int32)
            self.register_buffer("dynamic", dynamic, persistent=False)
        for name, numbers in constants.items():
            self.register_buffer(name, numbers.view(torch.int32))
        if double:
            self.absmax = absmax_codes

    def constants(self) -> Tensor:
        """(blocks,) absmax, float32"""
        if not self.double:
            return self.absmax.view(torch.float32)
        kept = (self.scales, self.mean, self.dynamic)
        return dequantize_constants(self.absmax, *(bits.view(torch.float32) for bits in kept))

    def dequantized(self) -> Tensor:
        """(d_out, d_in) float32"""
        count = self.out_features * self.in_features
        # both levels of a byte are looked up at once, as one number of eight bytes
        codes = torch.arange(256, device=self.levels.device)
        places = torch.stack([codes >> 4, codes & 15], 1) % len(self.levels)
        pairs = self.levels[places].view(torch.int64).view(-1)
        values = pairs.index_select(0, self.weight.view(torch.uint8).int()).view(torch.float32)
        values = _scale(values[:count], self.constants(), self.block_size)
        return values.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _PackedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _PackedProduct(torch.autograd.Function):
    """x W^T, whose backward dequantises W again: autograd would keep all of it until then, four
    bytes a weight.
    """

    @staticmethod
    def forward(context, x: Tensor, layer: PackedLinear) -> Tensor:
        context.layer = layer
        return linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer.dequantized().to(gradient.dtype), None


def quantize_layers(
    model: nn.Module,
    targets: Targets = ALL_LINEAR,
    levels: Tensor | None = None,
    block_size: int = BLOCK,
    double: bool = True,
) -> None:
    """Replace the linear layers that `targets` means, all but the output head if not given, by
    packed ones, and freeze the whole model: an adapter trains.

    levels: at most 16; NF4's if None
    Raises CourseError before anything is changed: for a model with virtual tokens or adapters, for
    a layer that is quantised or wrapped already or stands in two places, and where a weight is not
    finite.
    """
    surgery.check_model(model)
    surgery.check_no_additions(model)
    levels = _check_levels(nf4_levels() if levels is None else levels)
    layers, shared = surgery.find_layers(model, targets), surgery.shared_weights(model)
    for path, layer in layers.items():
        if surgery.is_quantized(layer):
            raise CourseError(f"{path} is quantised already: leave it out of targets")
        if id(layer.weight) in shared:
            advice = "which would stay as it is: take it out of targets"
            raise CourseError(f"{path} shares its weight with another layer, {advice}")
        if isinstance(layer, LinearWrapper):
            advice = "quantise first, then add the adapter"
            raise CourseError(f"{path} is a {type(layer).__name__} already: {advice}")
        if not weight_matrix(layer).isfinite().all():
            advice = "load the base again, in float32"
            raise CourseError(f"{path} has a weight that is not finite: {advice}")
    for path, layer in layers.items():
        packed = PackedLinear(weight_matrix(layer), layer.bias, levels, block_size, double)
        surgery.replace_layer(model, path, packed)
    model.requires_grad_(False)


def dequantized_weight(layer: nn.Module) -> Tensor:
    """(d_out, d_in) float32 of a linear layer in 4 bits, ours or bitsandbytes'."""
    if isinstance(layer, PackedLinear):
        return layer.dequantized()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def dequantized_copy(model: nn.Module) -> nn.Module:
    """A copy whose quantised layers, ours and bitsandbytes', are float32 layers that compute the
    same, under the same adapters: what `lora.merged_copy` can merge into without changing an
    answer.

    Raises CourseError for a model without quantised layers.
    """
    surgery.check_model(model)
    if not any(map(surgery.is_quantized, model.modules())):
        raise CourseError("the model has no quantised layer: it can be merged as it is")
    plain = copy.deepcopy(surgery.uncompiled(model))
    if getattr(plain, "is_quantized", False):  # by transformers, through bitsandbytes
        plain.dequantize(dtype=torch.float32)
    for path, layer in [*plain.named_modules()]:
        if isinstance(layer, PackedLinear):
            surgery.replace_layer(plain, path, _unpacked(layer))
    if not surgery.wrapped_layers(plain):
        surgery.restore(plain)
    return plain.float()


def _unpacked(layer: PackedLinear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
    plain.bias = layer.bias
    return plain


def _check_levels(levels: Tensor) -> Tensor:
    """Levels as float32. Raises CourseError for what are none for codes of four bits."""
    expected = "expected a tensor of 1 to 16 finite numbers: nf4_levels() makes one"
    if not isinstance(levels, Tensor) or levels.dim() != 1:
        raise CourseError(f"levels are a {type(levels).__name__}, {expected}")
    if not 1 <= len(levels) <= 16 or not levels.isfinite().all():
        raise CourseError(f"found {len(levels)} levels, {expected}")
    return levels.float()


def _check(values: Tensor, block_size: int) -> None:
    if type(block_size) is not int or block_size < 1:
        raise CourseError(f"block_size={block_size!r} must be a whole number above 0, such as 64")
    if not values.is_floating_point():
        raise CourseError(f"found {values.dtype} values, expected floating-point ones to quantise")


def _at_most(block_size: int, values: Tensor) -> int:
    """A block of all values, where there are fewer than a block."""
    return min(block_size, max(1, len(values)))


def _scale(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """(n,) values, multiplied in place by the absmax of their blocks; the last one may be shorter.

    In place, since a second array of this size costs more time than the product.
    """
    block_size = _at_most(block_size, values)
    if len(values) % block_size:
        return values.mul_(absmax.repeat_interleave(block_size)[: len(values)])
    values.view(-1, block_size).mul_(absmax[:, None])
    return values
