"""The exercises of Day 2, in the order of the notebook: the core, which is LoRA's forward pass, its
start, its injection and its merge; then ranks, counts, gradients, budgets, blends, fused batches.

The letters are those of the paper (Hu et al. 2021, arXiv 2106.09685, section 4.1): `a` is (r, in),
`b` is (out, r), the update of a weight (out, in) is (alpha / r) B A. All entries are multiples of
1/4: the order of the products makes no difference.
"""

import math
import random
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from course_lib.checks import Exercise, known

EXERCISES = {}
DRAW = random.Random(0)
SIZES = ((1, 2, 4, 1), (3, 6, 5, 4), (4, 3, 2, 3), (2, 5, 6, 1), (5, 4, 4, 2))  # N, out, in, r
SCALES = (0.5, 2, 3, 4)  # alpha / r of the cases; 1 would hide a forgotten scale
WRONG_SCALES = {  # what to say of {what} -> the scale, from alpha, r and the shapes
    "{what} is not scaled": lambda alpha, r: 1,
    "{what} is multiplied by alpha, but not divided by r": lambda alpha, r: alpha,
    "{what} is divided by r, but not multiplied by alpha": lambda alpha, r: 1 / r,
    "{what} is multiplied by r, expected divided by r": lambda alpha, r: alpha * r,
    "the scale of {what} is upside down": lambda alpha, r: r / alpha,
    "{what} is scaled twice": lambda alpha, r: (alpha / r) ** 2,
    "{what} is divided by the square root of r, as in rsLoRA": lambda alpha, r: (
        alpha / math.sqrt(r)
    ),
    "{what} has the wrong sign": lambda alpha, r: -alpha / r,
}


def right_scale(alpha, r):
    return alpha / r


def wrongly_scaled(function, what="your update"):
    """For `known`: what `function`, which takes a scale, gives with each wrong one."""
    for sentence, scale in WRONG_SCALES.items():
        yield f"{sentence.format(what=what)}: the scale is alpha / r"
        yield partial(function, scale=scale)


def matrix(rows, columns):
    draw = lambda: DRAW.randint(1, 6) * DRAW.choice((-1, 1)) / 4  # noqa: E731
    return torch.tensor([[draw() for _ in range(columns)] for _ in range(rows)])


def whole(rows, columns):
    """Whole numbers from -3 to 3: what a first case prints is short."""
    return 4 * matrix(rows, columns).clamp(-0.75, 0.75)


def adapter(rows, columns, rank):
    """a (r, in), b (out, r), alpha; for a weight (rows, columns)."""
    return matrix(rank, columns), matrix(rows, rank), rank * DRAW.choice(SCALES)


# --- E2.1 The forward pass


class LargeMatrices(TorchFunctionMode):
    """Notes in `found` whether a new matrix of the shape of `weight`, or its transpose, is made."""

    def __init__(self, weight):
        super().__init__()
        self.own, self.found = weight.untyped_storage().data_ptr(), False
        self.shapes = (tuple(weight.shape), tuple(weight.T.shape))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) in self.shapes:
            self.found |= result.untyped_storage().data_ptr() != self.own
        return result


def layer_output(function, x, weight, bias, a, b, alpha):
    """What a frozen linear layer with this weight (out, in) and bias gives for x (N, T, in) with an
    adapter; whether a and b get gradients; whether a large matrix is made on the way.
    """
    out, columns = weight.shape
    base = nn.Linear(columns, out, device="meta").requires_grad_(False)
    base.weight, base.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    with torch.enable_grad(), LargeMatrices(base.weight) as large:
        found = function(x, base, a.requires_grad_(), b.requires_grad_(), alpha)
    gradients = "no gradient for a and b"
    if isinstance(found, torch.Tensor) and found.requires_grad:
        both = torch.autograd.grad(found.sum(), (a, b), retain_graph=True, allow_unused=True)
        missing = [name for name, one in zip("ab", both, strict=True) if one is None]
        gradients = f"no gradient for {' and '.join(missing)}" if missing else "gradients"
    return [found, gradients, "a large matrix" if large.found else "small ones"]


def lora(x, base, a, b, alpha, scale=right_scale):
    return base(x) + scale(alpha, len(a)) * (x @ a.T @ b.T)


def tall(x, base, a, b, alpha, by):
    """Divided by `by` in place of r."""
    return lora(x, base, a, b, alpha * len(a) / by)


def case(n, t, out, columns, rank, draw=matrix):
    x = torch.stack([draw(t, columns) for _ in range(n)])
    a, b, alpha = adapter(out, columns, rank)
    return x, draw(out, columns), draw(1, out)[0], a, b, alpha


EXERCISES["E2.1"] = Exercise(
    lora,
    [
        (
            *(torch.stack([whole(2, 3)]), whole(4, 3), whole(1, 4)[0]),
            *(whole(2, 3), whole(4, 2), 6),
        ),
        case(1, 1, 2, 4, 1),
        case(3, 2, 6, 5, 4),
        case(2, 4, 3, 7, 3),
        case(4, 3, 5, 6, 1),
        (*case(2, 3, 5, 4, 3)[:4], torch.zeros(5, 3), 6),  # B starts at zero
    ],
    known(
        *wrongly_scaled(lora),
        "you divide by out: r is the number of rows of a",
        lambda x, base, a, b, alpha: tall(x, base, a, b, alpha, len(b)),
        "you divide by in: r is the number of rows of a",
        lambda x, base, a, b, alpha: tall(x, base, a, b, alpha, a.shape[1]),
        "you divide by N: r is the number of rows of a",
        lambda x, base, a, b, alpha: tall(x, base, a, b, alpha, len(x)),
        "you divide by the number of entries of a: r is the number of its rows",
        lambda x, base, a, b, alpha: tall(x, base, a, b, alpha, a.numel()),
        "your result is the frozen layer alone: the update is missing",
        lambda x, base, a, b, alpha: base(x),
        "your result is the update alone: the frozen layer, base(x), is missing",
        lambda x, base, a, b, alpha: alpha / len(a) * (x @ a.T @ b.T),
        "you scale the frozen layer, too: only the update is multiplied by alpha / r",
        lambda x, base, a, b, alpha: alpha / len(a) * (base(x) + x @ a.T @ b.T),
        "you multiply frozen layer and update: add them",
        lambda x, base, a, b, alpha: base(x) * (alpha / len(a) * (x @ a.T @ b.T)),
        "the bias of the frozen layer is missing: call base(x), which adds it",
        lambda x, base, a, b, alpha: lora(x, base, a, b, alpha) - base.bias,
        "the frozen layer stands in your sum twice",
        lambda x, base, a, b, alpha: lora(x, base, a, b, alpha) + base(x),
        "the update goes through the frozen layer: both take the same x, and their results add up",
        lambda x, base, a, b, alpha: base(x) + alpha / len(a) * (base(x) * 0 + x.sum()),
        "the result is right, but you form all of B A, as large as the frozen weight: take x down "
        "to r numbers first, then up",
        lambda x, base, a, b, alpha: base(x) + alpha / len(a) * (x @ (b @ a).T),
        "your update is cut off from its gradient: no detach, no .data, no torch.no_grad",
        lambda x, base, a, b, alpha: lora(x, base, a.detach(), b.detach(), alpha),
        "you return the merged weight: return the output for x",
        lambda x, base, a, b, alpha: base.weight + alpha / len(a) * b @ a,
    ),
    otherwise="expected what the frozen layer gives plus alpha / r times what A and B make of the "
    "same x",
    ask=layer_output,
)


# --- E2.2 The start


def started(function, d_in, d_out, rank, seed):
    """What A and B are like that your function makes for a layer with d_in inputs and d_out
    outputs.
    """

    def drawn(seed):
        found = function(d_in, d_out, rank, torch.Generator().manual_seed(seed))
        pair = found if isinstance(found, tuple | list) else [found]
        return [part.detach() if isinstance(part, torch.Tensor) else part for part in pair]

    with torch.random.fork_rng(devices=[]):
        pair, again, other = drawn(seed), drawn(seed), drawn(seed + 1)
    if len(pair) != 2 or not all(isinstance(part, torch.Tensor) for part in pair):
        return {"you return": " and ".join(type(part).__name__ for part in pair)}
    a, b = pair
    shapes = {"shape of A": list(a.shape), "shape of B": list(b.shape)}
    if [*shapes.values()] != [[rank, d_in], [d_out, rank]]:
        return {"you return": "Tensor and Tensor"} | shapes
    largest = a.abs().max().item()
    ends = {"1 / sqrt(d_in)": 1 / math.sqrt(d_in), "1": 1.0}
    up_to = [name for name, end in ends.items() if 0.9 * end < largest <= 1.0001 * end]
    even = abs(a.std().item() * math.sqrt(3) / max(largest, 1e-9) - 1) < 0.15
    source = ("the generator", "the same numbers for all") if torch.equal(a, again[0]) else ("",)
    return {
        "you return": "Tensor and Tensor",
        **shapes,
        "numbers": f"{a.dtype} and {b.dtype}",
        "B A": "not zero" if (b @ a).any() else "zero",
        "A": "random" if a.any() else "zero",
        "B": "random" if b.any() else "zero",
        "largest of A": up_to[0] if up_to else "another",
        "A has negative numbers": bool((a < 0).any()),
        "A is spread": "evenly" if even else "unevenly",
        "A comes from": source[torch.equal(a, other[0])] if source[0] else "elsewhere",
    }


def start(d_in, d_out, rank, generator, bound=None, a_zero=False, b_zero=True):
    bound = 1 / math.sqrt(d_in) if bound is None else bound
    a = (2 * torch.rand(rank, d_in, generator=generator) - 1) * bound
    b = torch.zeros(d_out, rank) if b_zero else torch.rand(d_out, rank, generator=generator)
    return a * (not a_zero), b


def kaiming_start(d_in, d_out, rank, generator):
    """With the numbers of `lora.LowRank`, so that the reference trains as the library does."""
    a = torch.empty(rank, d_in)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, torch.zeros(d_out, rank)


EXERCISES["E2.2"] = Exercise(
    lambda d_in, d_out, rank, generator: kaiming_start(d_in, d_out, rank, generator),
    [(40, 20, 4, 0), (200, 48, 8, 1), (64, 96, 8, 2), (256, 32, 3, 3)],
    known(
        "both are zero: then neither gets a gradient, and nothing will ever be learned",
        partial(start, a_zero=True),
        "both are random: then B A is not zero, and a new adapter changes the model",
        partial(start, b_zero=False),
        "A is zero and B random: that would work, too, but LoRA does it the other way round",
        partial(start, a_zero=True, b_zero=False),
        "A is normally distributed: every value between the two bounds is to be as likely",
        lambda d_in, d_out, rank, generator: (
            torch.randn(rank, d_in, generator=generator) / math.sqrt(d_in),
            torch.zeros(d_out, rank),
        ),
        "A lies between 0 and 1: expected between minus and plus 1 / sqrt(d_in)",
        lambda d_in, d_out, rank, generator: (
            torch.rand(rank, d_in, generator=generator),
            torch.zeros(d_out, rank),
        ),
        "A is never negative: expected between minus and plus 1 / sqrt(d_in)",
        lambda d_in, d_out, rank, generator: (
            torch.rand(rank, d_in, generator=generator) / math.sqrt(d_in),
            torch.zeros(d_out, rank),
        ),
        "A lies between -1 and 1: divide by the square root of d_in",
        partial(start, bound=1.0),
        "A is drawn from torch's global generator: use the one that you are given",
        lambda d_in, d_out, rank, generator: start(d_in, d_out, rank, None),
        "your generator is made anew, so that every layer gets the same numbers: use the given one",
        lambda d_in, d_out, rank, generator: start(
            d_in, d_out, rank, torch.Generator().manual_seed(0)
        ),
        "A and B have each other's shape: A is (rank, d_in), B is (d_out, rank)",
        lambda *arguments: kaiming_start(*arguments)[::-1],
        "A and B are transposed: A is (rank, d_in), B is (d_out, rank)",
        lambda *arguments: [part.T for part in kaiming_start(*arguments)],
        "expected A and B: you return one of the two",
        lambda *arguments: kaiming_start(*arguments)[0],
        "A and B are float64: the model computes with float32",
        lambda *arguments: [part.double() for part in kaiming_start(*arguments)],
    ),
    otherwise="expected A (rank, d_in), drawn evenly between minus and plus 1 / sqrt(d_in) from "
    "the generator, and B (d_out, rank), so that B A is zero and one of the two is not",
    ask=started,
)


# --- E2.3 The injection


class Wrapped(nn.Module):
    """Stands for the learner's LoRA layer: a frozen layer inside, a weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.own = base, nn.Parameter(torch.zeros(1))


class Leaf(nn.Module):
    """A module with a weight that is no linear layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def built(layers):
    """A model with a linear layer at each of these paths; those that end in ! hold another
    module.
    """
    model = nn.Module()
    for path in layers:
        *blocks, name = path.rstrip("!").split(".")
        parent = model
        for block in blocks:
            if not hasattr(parent, block):
                parent.add_module(block, nn.Module())
            parent = getattr(parent, block)
        parent.add_module(name, Leaf() if path.endswith("!") else nn.Linear(2, 2, device="meta"))
    return model


def injected(function, layers, targets):
    """What a model with these layers, of which those with a ! are not linear, looks like after your
    function has wrapped the targets.
    """
    model, wrapped = built(layers), []

    def wrap(layer):
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"wrap(layer) takes a linear layer, found a {type(layer).__name__}")
        wrapped.append(layer)
        return Wrapped(layer)

    paths = {id(module): path for path, module in model.named_modules()}
    function(model, targets, wrap)
    inside = [path for path, module in model.named_modules() if isinstance(module, Wrapped)]
    return {
        "wrapped, in order": [paths[id(layer)] for layer in wrapped],
        "in their places": sorted(inside),
        "train": sorted(name for name, w in model.named_parameters() if w.requires_grad),
    }


def inject(model, targets, wrap, chosen=lambda path, name, targets: name in targets, linear=True):
    """chosen: is a module wrapped; linear: only a linear layer."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if path and chosen(path, name, targets) and (isinstance(module, nn.Linear) or not linear):
            setattr(model.get_submodule(parent), name, wrap(module))


def injected_and(change):
    """A right injection, then `change(model)`."""

    def function(model, targets, wrap):
        inject(model, targets, wrap)
        change(model)

    return function


def nothing_frozen(model, targets, wrap):
    inject(model, targets, wrap)
    model.requires_grad_(True)


def base_frozen(model, targets, wrap):
    nothing_frozen(model, targets, wrap)
    for module in model.modules():
        if isinstance(module, Wrapped):
            module.base.requires_grad_(False)


def not_put(model, targets, wrap):
    inject(model, targets, lambda layer: (wrap(layer), layer)[1])


def at_the_top(model, targets, wrap):
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name in targets and isinstance(module, nn.Linear):
            setattr(model, name, wrap(module))


def first_only(model, targets, wrap):
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in targets and isinstance(module, nn.Linear):
            return setattr(model.get_submodule(parent), name, wrap(module))
    return None


def children_only(model, targets, wrap):
    model.requires_grad_(False)
    for name, module in list(model.named_children()):
        if name in targets and isinstance(module, nn.Linear):
            setattr(model, name, wrap(module))


def first_target(model, targets, wrap):
    inject(model, targets[:1], wrap)


def in_a_copy(model, targets, wrap):
    return Wrapped(model)


EXERCISES["E2.3"] = Exercise(
    inject,
    [
        (["block.q_proj", "block.v_proj", "block.norm!", "head"], ["v_proj"]),
        (
            ["embed!", "0.attn.q_proj", "0.attn.k_proj", "0.mlp.up", "1.attn.q_proj", "1.norm!"],
            ["q_proj", "up"],
        ),
        # names that begin, end or lie like a target
        (["q_proj", "b.mq_proj", "b.q_proj.inner", "b.q_proj_norm!", "c.q_proj"], ["q_proj"]),
        (["0.q_proj!", "0.v_proj", "1.q_proj", "norm!"], ["v_proj", "q_proj"]),
        (["0.q_proj", "norm!"], ["k_proj"]),
    ],
    known(
        "nothing trains: you freeze the new layers, too; freeze the model before you wrap",
        injected_and(lambda model: model.requires_grad_(False)),
        "the whole model still trains: freeze it before you wrap",
        nothing_frozen,
        "only the wrapped layers are frozen: all that the model had is to be frozen, norms and "
        "embeddings, too",
        base_frozen,
        "you wrap layers but do not put them into the model: setattr(parent, name, new)",
        not_put,
        "your layers stand at the top of the model: put each into its own parent, "
        "model.get_submodule(parent)",
        at_the_top,
        "you stop after the first layer: does your loop return too early?",
        first_only,
        "you look only at the children of the model: model.named_modules() goes all the way down",
        children_only,
        "only the first target is used: {targets} are wanted",
        first_target,
        "you wrap layers whose name only ends in a target: the last part of the path is to be one",
        partial(
            inject,
            chosen=lambda path, name, targets: any(path.endswith(target) for target in targets),
        ),
        "you wrap layers whose path only contains a target: the last part is to be one",
        partial(
            inject, chosen=lambda path, name, targets: any(target in path for target in targets)
        ),
        "you wrap all linear layers: only those whose last name is in {targets}",
        partial(inject, chosen=lambda path, name, targets: True),
        "you wrap all but the targets: those whose last name is in {targets} are wanted",
        partial(inject, chosen=lambda path, name, targets: name not in targets),
        "nothing is wrapped: compare the last part of each path with the targets",
        lambda model, targets, wrap: model.requires_grad_(False),
        "the model itself is to be changed: whoever calls you keeps using it",
        in_a_copy,
    ),
    otherwise="expected every linear layer whose last name is in {targets} wrapped, in the order "
    "of the model, and nothing trained but what is new",
    ask=injected,
)


# --- E2.4 Merging


def merge(weight, a, b, alpha, scale=right_scale):
    return weight + scale(alpha, len(a)) * b @ a


EXERCISES["E2.4"] = Exercise(
    merge,
    [
        (whole(3, 4), whole(2, 4), whole(3, 2), 6),
        *((matrix(o, i), *adapter(o, i, r)) for _, o, i, r in SIZES),
        (matrix(4, 3), matrix(2, 3), torch.zeros(4, 2), 6),  # B starts at zero
    ],
    known(
        *wrongly_scaled(merge),
        "you divide by out: r is the number of rows of a",
        lambda weight, a, b, alpha: merge(weight, a, b, alpha / len(b) * len(a)),
        "you divide by in: r is the number of rows of a",
        lambda weight, a, b, alpha: merge(weight, a, b, alpha / a.shape[1] * len(a)),
        "your result is the old weight: the update is missing",
        lambda weight, a, b, alpha: weight,
        "your result is the update alone: add it to `weight`",
        lambda weight, a, b, alpha: merge(0 * weight, a, b, alpha),
        "you scale the frozen weight, too: only the update is multiplied by alpha / r",
        lambda weight, a, b, alpha: alpha / len(a) * (weight + b @ a),
        "you mix weight and update: the weight stays whole, the update comes on top",
        lambda weight, a, b, alpha: torch.lerp(weight, b @ a, alpha / len(a)),
        "your result is transposed: expected the shape of `weight`",
        lambda *arguments: merge(*arguments).T,
    ),
)


# --- E2.5 How low is the rank?


def smallest_k(parts, share):
    return next(k for k in range(len(parts) + 1) if sum(parts[:k]) >= share * sum(parts))


def squares(values):
    return [value**2 for value in values]


EXERCISES["E2.5"] = Exercise(
    lambda values, share: smallest_k(squares(values), share),
    [
        ([7.0, 6.0, 6.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0, 2.0], 0.75),
        ([5.0, 4.0, 3.0, 0.5], 0.5),  # 25 of 50.25 are not quite one half
        ([9.5, 3.25, 3.0, 1.5, 0.25], 0.983),
        ([6.0, 5.5, 1.0, 1.0, 0.5, 0.5], 0.617),
        ([2.0, 2.0, 2.0, 2.0], 0.75),  # exactly the share is enough
        *(([1.0, 1.0], 0.5), ([3.0, 2.0, 1.0], 1.0), ([7.0], 0.9)),
        ([3.0, 2.0, 0.0, 0.0], 1.0),  # an update of rank 2
        ([0.0, 0.0, 0.0], 0.9),  # a fresh adapter: no update at all
    ],
    known(
        "you add the singular values themselves: add their squares",
        smallest_k,
        "you compare lengths: compare the sums of squares, without the root",
        lambda values, share: smallest_k(squares(values), share**2),
        "you begin with the smallest values: begin with the largest, they come first",
        lambda values, share: smallest_k(squares(values)[::-1], share),
        "you stop where the rest holds the share: the first k must hold it",
        lambda values, share: smallest_k(squares(values), 1 - share),
        "you compare each value with the largest: compare the sum of the first k",
        lambda values, share: sum(v**2 >= share * values[0] ** 2 for v in values),
        "you take a share of the number of values: take the share of the sum of their squares",
        lambda values, share: math.ceil(share * len(values)),
        "your k is one too small: return how many values you need, not the place of the last one",
        lambda values, share: max(0, smallest_k(squares(values), share) - 1),
        "your k is one too large: return the smallest k that holds the share",
        lambda values, share: smallest_k(squares(values), share) + 1,
        "you return the number of all values: stop at the first k that holds the share",
        lambda values, share: len(values),
        "the first {expected} hold exactly the share, and that is enough: at least, not more than",
        lambda values, share: (
            smallest_k(squares(values), share + 1e-9) if share < 1 else len(values)
        ),
        "an update of zeros holds everything with no direction at all: expected 0, found {found}",
        lambda values, share: max(1, smallest_k(squares(values), share)),
    ),
    lambda values, share: {
        "held": sum(squares(values[: smallest_k(squares(values), share)]))
        / (sum(squares(values)) or 1)
    },
    "the first {expected} hold {held:.1%} of the sum of squares, {share:.1%} are asked for; found "
    "{found}",
)


# --- E2.6 Trained weights


def lora_count(shapes, rank):
    return sum(rank * (rows + columns) for rows, columns in shapes)


def each(weights):
    """The sum of `weights(rows, columns, rank)` over all shapes."""
    return lambda shapes, rank: sum(weights(rows, columns, rank) for rows, columns in shapes)


SHAPES_AND_RANK = [
    ([(500, 200)], 3),
    ([(6, 4), (6, 4), (4, 10)], 2),  # many layers of a model have the same shape
    ([(17, 40), (3, 29), (17, 40), (51, 8)], 5),
    ([(4, 4)], 8),  # a rank above the sides is wasteful, and still trained
    ([], 4),
]
EXERCISES["E2.6"] = Exercise(
    lora_count,
    SHAPES_AND_RANK,
    known(
        "these are the A's alone: B (out, r) is trained, too",
        each(lambda rows, columns, rank: rank * columns),
        "these are the B's alone: A (r, in) is trained, too",
        each(lambda rows, columns, rank: rank * rows),
        "these are the weights of the matrices, which are frozen: count A and B",
        each(lambda rows, columns, rank: rows * columns),
        "the matrices themselves are frozen: count only A and B",
        each(lambda rows, columns, rank: rows * columns + rank * (rows + columns)),
        "rank times the whole matrix: A has r rows of length `in`, B has `out` rows of length r",
        each(lambda rows, columns, rank: rank * rows * columns),
        "the entries of A times those of B: both are stored, so add them",
        each(lambda rows, columns, rank: rank**2 * rows * columns),
        "this is the count for rank 1: multiply by the rank",
        each(lambda rows, columns, rank: rows + columns),
        "the rank is counted twice: it is one side of A and one side of B",
        each(lambda rows, columns, rank: rank**2 * (rows + columns)),
        "both A and B are counted as long as `out`: A is as long as `in`",
        each(lambda rows, columns, rank: 2 * rank * rows),
        "both A and B are counted as long as `in`: B is as long as `out`",
        each(lambda rows, columns, rank: 2 * rank * columns),
        "LoRA adds no bias: count A and B only",
        each(lambda rows, columns, rank: rank * (rows + columns) + rows),
        "there is nothing of size r x r between A and B",
        each(lambda rows, columns, rank: rank * (rows + rank + columns)),
        "no rank is cut to the sides of a matrix: A has r x in weights and B has out x r",
        each(lambda rows, columns, rank: min(rank, rows, columns) * (rows + columns)),
        "a shape that occurs several times counts several times: each matrix has its own A and B",
        lambda shapes, rank: lora_count({*shapes}, rank),
        "only the first matrix is counted: add them all; does your loop return too early?",
        lambda shapes, rank: lora_count(shapes[:1], rank),
        "only the last matrix is counted: add them all",
        lambda shapes, rank: lora_count(shapes[-1:], rank),
        "where nothing is adapted, nothing is trained",
        lambda shapes, rank: lora_count(shapes, rank) or 1,
    ),
    otherwise="found {found:,} weights, expected {expected:,}: for each (out, in) A has r x in "
    "weights and B has out x r",
)


# --- E2.7 The gradients


def gradient_of_a(x, upstream, a, b, alpha, scale=right_scale):
    return scale(alpha, len(a)) * (upstream @ b).T @ x


def gradient_of_b(x, upstream, a, b, alpha, scale=right_scale):
    return scale(alpha, len(a)) * upstream.T @ (x @ a.T)


def gradients(x, upstream, a, b, alpha):
    """By autograd, which the learner does without."""
    with torch.enable_grad():
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        return torch.autograd.grad(alpha / len(a) * (x @ a.T @ b.T), (a, b), upstream)


def summed_first(x, upstream, a, b, alpha):
    up, into = upstream.sum(0), x.sum(0)
    scale = alpha / len(a)
    return scale * torch.outer(up @ b, into), scale * torch.outer(up, a @ into)


def only(place, wrong):
    """The gradients, of which the one at `place` is changed by `wrong`."""

    def function(*arguments):
        found = list(gradients(*arguments))
        found[place] = wrong(found[place])
        return found

    return function


def wrong_gradients():
    for place, name in enumerate("ab"):
        yield f"your gradient of {name} is transposed: a gradient has the shape of its matrix"
        yield only(place, lambda gradient: gradient.T)
        yield f"your gradient of {name} is zero: that is so only where {'ba'[place]} is zero"
        yield only(place, torch.zeros_like)
        own = (gradient_of_a, gradient_of_b)[place]
        for sentence, scale in WRONG_SCALES.items():
            yield f"{sentence.format(what=f'your gradient of {name}')}: the scale is alpha / r"
            yield lambda *arguments, place=place, own=own, scale=scale: only(
                place, lambda gradient: own(*arguments, scale=scale)
            )(*arguments)
    both = lambda *arguments, scale: (  # noqa: E731
        gradient_of_a(*arguments, scale=scale),
        gradient_of_b(*arguments, scale=scale),
    )
    yield from wrongly_scaled(both, "each of your gradients")


EXERCISES["E2.7"] = Exercise(
    gradients,
    [
        (whole(4, 3), whole(4, 5), whole(2, 3), whole(5, 2), 6),
        (matrix(3, 4), matrix(3, 5), matrix(2, 4), torch.zeros(5, 2), 8),  # B is zero
        *((matrix(n, i), matrix(n, o), *adapter(o, i, r)) for n, o, i, r in SIZES),
        (matrix(3, 4), matrix(3, 5), torch.zeros(2, 4), matrix(5, 2), 6),  # A is zero
    ],
    known(
        *wrong_gradients(),
        "your gradients come in the wrong order: that of a first, then that of b",
        lambda *arguments: gradients(*arguments)[::-1],
        "your gradients are means over the rows: upstream says already how much each row counts, "
        "so add",
        lambda x, *rest: [gradient / len(x) for gradient in gradients(x, *rest)],
        "you add up the rows before you multiply: each row of upstream belongs to its own row of x",
        summed_first,
        "your gradient of a is that of the whole weight, upstream^T x: B is missing",
        lambda x, upstream, a, b, alpha: (
            alpha / len(a) * upstream.T @ x,
            gradient_of_b(x, upstream, a, b, alpha),
        ),
        "expected two gradients, that of a and that of b: you return that of the whole weight",
        lambda x, upstream, a, b, alpha: alpha / len(a) * upstream.T @ x,
        "your gradients are not added up over the rows of x: each has the shape of its matrix",
        lambda x, upstream, a, b, alpha: (
            alpha / len(a) * (upstream @ b)[:, :, None] * x[:, None],
            alpha / len(a) * upstream[:, :, None] * (x @ a.T)[:, None],
        ),
    ),
)


# --- E2.8 Equal budgets


def largest_rank(shapes, budget, cost=None, limit=None):
    """cost: of rank 1; limit: of the rank; both right if None."""
    cost = lora_count(shapes, 1) if cost is None else cost
    return min(budget // cost, min(map(min, shapes)) if limit is None else limit)


EXERCISES["E2.8"] = Exercise(
    largest_rank,
    [
        ([(60, 20), (30, 40)], 1000),
        ([(60, 20), (30, 40)], 1050),  # exactly rank 7
        ([(30, 4), (30, 30)], 5000),  # a side of 4 ends it
        ([(30, 30), (4, 30)], 5000),
        ([(25, 38), (19, 7), (33, 33)], 786),
        ([(12, 40)], 105),
        ([(8, 8), (8, 8)], 31),  # rank 1 takes 32
        ([(100, 100)], 0),
    ],
    known(
        "rank {found} is more than the budget: round down",
        lambda shapes, budget: math.ceil(budget / lora_count(shapes, 1)),
        "you count the A's alone: B is trained, too",
        lambda shapes, budget: largest_rank(shapes, budget, sum(columns for _, columns in shapes)),
        "you count the B's alone: A is trained, too",
        lambda shapes, budget: largest_rank(shapes, budget, sum(rows for rows, _ in shapes)),
        "you divide by the frozen weights: divide by what rank 1 trains",
        lambda shapes, budget: budget // sum(rows * columns for rows, columns in shapes),
        "you count the first matrix alone: the budget is for all of them",
        lambda shapes, budget: largest_rank(shapes, budget, sum(shapes[0])),
        "you count the last matrix alone: the budget is for all of them",
        lambda shapes, budget: largest_rank(shapes, budget, sum(shapes[-1])),
        "rank {found} is above the smallest side of all matrices, {limit}: B A has no higher rank "
        "than that",
        lambda shapes, budget: largest_rank(shapes, budget, limit=budget),
        "rank {found} is above the smallest side of all matrices, {limit}: not only the first one "
        "counts",
        lambda shapes, budget: largest_rank(shapes, budget, limit=min(shapes[0])),
        "rank {found} is above the smallest side of all matrices, {limit}: of each matrix the "
        "smaller side counts",
        lambda shapes, budget: largest_rank(shapes, budget, limit=min(map(max, shapes))),
        "rank {expected} trains exactly the budget, {budget:,}, and that is allowed",
        lambda shapes, budget: max(0, largest_rank(shapes, budget - 1)),
        "a rank need not be a power of two: rank {expected} fits, too",
        lambda shapes, budget: (
            1 << rank.bit_length() - 1 if (rank := largest_rank(shapes, budget)) else 0
        ),
        "a rank is a whole number: round down",
        lambda shapes, budget: min(budget / lora_count(shapes, 1), min(map(min, shapes))),
        "not even rank 1 fits: expected 0, found {found}",
        lambda shapes, budget: max(1, largest_rank(shapes, budget)),
        "a rank is never below 0, found {found}",
        lambda shapes, budget: largest_rank(shapes, budget) or -1,
        "the smallest side of all matrices, {limit}, is allowed as a rank",
        lambda shapes, budget: largest_rank(shapes, budget, limit=min(map(min, shapes)) - 1),
    ),
    lambda shapes, budget: {"limit": min(map(min, shapes)), "one": lora_count(shapes, 1)},
    "rank 1 trains {one:,} weights and {budget:,} are allowed: take the largest rank that fits, "
    "{expected}, found {found}",
)


# --- E2.9 Blending


def blend(weight, adapters, shares, factor=lambda k, share, scale, alpha: share * scale):
    """factor: of the product B A of adapter k."""
    parts = enumerate(zip(adapters, shares, strict=True))
    return weight + sum(
        factor(k, share, alpha / len(a), alpha) * b @ a for k, ((a, b, alpha), share) in parts
    )


def crossed(weight, adapters, shares):
    a = sum(share * a for (a, _, _), share in zip(adapters, shares, strict=True))
    b = sum(share * b for (_, b, _), share in zip(adapters, shares, strict=True))
    return weight + adapters[0][2] / len(a) * b @ a


CROSSED = (
    "you blend the A's and the B's apart and multiply the two blends: the product then has cross "
    "terms, "
    "the B of one adapter times the A of another; blend the products B A"
)
EXERCISES["E2.9"] = Exercise(
    blend,
    [
        (whole(3, 4), [(whole(2, 4), whole(3, 2), 6) for _ in range(2)], [0.5, 0.25]),
        (matrix(3, 4), [adapter(3, 4, 1), adapter(3, 4, 3)], [0.5, 0.5]),
        (matrix(2, 5), [adapter(2, 5, r) for r in (4, 2, 1, 2)], [1.5, -1, 0.25, 0.0]),
        (matrix(4, 2), [adapter(4, 2, 2)], [-0.5]),
        (matrix(3, 3), [adapter(3, 3, 3), adapter(3, 3, 3)], [1.0, -1.0]),
        (matrix(2, 3), [], []),
    ],
    known(
        CROSSED,
        crossed,
        f"{CROSSED} with their shares",
        lambda weight, adapters, shares: crossed(
            weight, adapters, [1 / len(adapters)] * len(adapters)
        ),
        "your result is the old weight: the updates are missing",
        lambda weight, adapters, shares: weight,
        "your result is the updates alone: add them to `weight`",
        lambda weight, adapters, shares: blend(0 * weight, adapters, shares),
        "you blend merged weights: `weight` is counted {total:g} times, the sum of the shares",
        lambda weight, adapters, shares: blend(sum(shares) * weight, adapters, shares),
        "`weight` is added {count} times, once for each adapter: add it once",
        lambda weight, adapters, shares: blend(len(shares) * weight, adapters, shares),
        "your shares are squared: does a share multiply A and B both? once is enough",
        partial(blend, factor=lambda k, share, scale, alpha: share**2 * scale),
        "your shares are missing: each update is multiplied by its own",
        partial(blend, factor=lambda k, share, scale, alpha: scale),
        "your updates are not scaled: each has its own alpha / r",
        partial(blend, factor=lambda k, share, scale, alpha: share),
        "shares and scales are missing: A's and B's laid side by side give the plain sum of all B "
        "A",
        partial(blend, factor=lambda k, share, scale, alpha: 1),
        "alpha is not divided by r: each adapter has its own r, the number of rows of its a",
        partial(blend, factor=lambda k, share, scale, alpha: share * alpha),
        "only the first adapter is used",
        partial(blend, factor=lambda k, share, scale, alpha: share * scale * (k == 0)),
        "only the last adapter is used",
        lambda weight, adapters, shares: blend(weight, adapters[-1:], shares[-1:]),
        "all updates have the scale of the first adapter: each has its own alpha / r",
        lambda weight, adapters, shares: blend(
            weight,
            adapters,
            shares,
            lambda k, share, *rest: share * adapters[0][2] / len(adapters[0][0]),
        ),
        "all updates have the scale of the last adapter: each has its own alpha / r",
        lambda weight, adapters, shares: blend(
            weight,
            adapters,
            shares,
            lambda k, share, *rest: share * adapters[-1][2] / len(adapters[-1][0]),
        ),
        "you divide by the sum of the shares, {total:g}: take the shares as they are",
        lambda weight, adapters, shares: blend(
            weight, adapters, [share / sum(shares) for share in shares]
        ),
        "you divide by the number of adapters: take the shares as they are",
        lambda weight, adapters, shares: blend(
            weight, adapters, [share / len(shares) for share in shares]
        ),
        "you divide alpha by the sum of all ranks: each adapter has its own r",
        lambda weight, adapters, shares: blend(
            weight,
            adapters,
            shares,
            lambda k, share, scale, alpha: (
                share * adapters[0][2] / sum(len(a) for a, _, _ in adapters)
            ),
        ),
        "without adapters the result is the weight",
        lambda weight, adapters, shares: (
            blend(weight, adapters, shares) if adapters else 0 * weight
        ),
    ),
    lambda weight, adapters, shares: {"total": sum(shares), "count": len(adapters)},
)


# --- E2.10 Batch fusion


def fused(x, job, weight, adapters, scale=right_scale, own=lambda i, job: job[i]):
    """own: the adapter of row i, or None."""
    y = x @ weight.T
    for i, row in enumerate(x):
        if own(i, job) is not None:
            a, b, alpha = adapters[own(i, job)]
            y[i] += scale(alpha, len(a)) * (b @ (a @ row))
    return y


EXERCISES["E2.10"] = Exercise(
    fused,
    [
        (
            *(whole(4, 3), [0, 1, 1, 0], whole(2, 3)),
            [(whole(2, 3), whole(2, 2), 6), (whole(1, 3), whole(2, 1), 2)],
        ),
        (matrix(4, 3), [2, 0, 2, 0], matrix(5, 3), [adapter(5, 3, r) for r in (2, 1, 3)]),
        (matrix(6, 2), [1, 3, 3, 0, 1, 2], matrix(4, 2), [adapter(4, 2, r) for r in (1, 4, 2, 3)]),
        (matrix(1, 5), [1], matrix(2, 5), [adapter(2, 5, 2), adapter(2, 5, 1)]),
        (matrix(3, 3), [1, 1, 1], matrix(3, 3), [adapter(3, 3, 3) for _ in range(2)]),
    ],
    known(
        *wrongly_scaled(fused),
        "every row gets the updates of all jobs: each row gets that of its own job alone",
        lambda x, job, weight, adapters: (
            fused(x, job, weight, [])
            if not adapters
            else sum(
                fused(x, job, weight, adapters, own=lambda *_, k=k: k) for k in range(len(adapters))
            )
            - (len(adapters) - 1) * x @ weight.T
        ),
        "every row gets the update of the first job: `job` says which row belongs to which job",
        partial(fused, own=lambda i, job: 0),
        "your rows get the updates as if they came sorted by job: `job` says which row belongs to "
        "which job",
        partial(fused, own=lambda i, job: sorted(job)[i]),
        "your adapters are counted over the jobs that have rows: `job[i]` is the place in "
        "`adapters`",
        partial(fused, own=lambda i, job: sorted({*job}).index(job[i])),
        "only the rows of the first job get an update",
        partial(fused, own=lambda i, job: None if job[i] else 0),
        "only the first row of each job gets its update: a job may have several rows",
        partial(fused, own=lambda i, job: job[i] if job.index(job[i]) == i else None),
        "your rows are x W^T alone: the updates are missing (`job` is a list, so `job == i` is no "
        "mask)",
        partial(fused, own=lambda i, job: None),
        "your rows are the updates alone: the frozen layer, x W^T, is missing",
        lambda x, job, weight, adapters: fused(x, job, 0 * weight, adapters),
        "your rows come back sorted by job: put each back into its own place",
        lambda x, job, weight, adapters: fused(x, job, weight, adapters)[
            sorted(range(len(job)), key=lambda row: job[row])
        ],
        "x W^T is added {count} times, once for each job: the frozen layer is computed once, for "
        "all rows",
        lambda x, job, weight, adapters: (
            fused(x, job, weight, adapters) + (len(adapters) - 1) * x @ weight.T
        ),
        "all updates have the scale of the first adapter: each job has its own alpha / r",
        lambda x, job, weight, adapters: fused(
            x, job, weight, adapters, scale=lambda *_: adapters[0][2] / len(adapters[0][0])
        ),
        "your result is transposed: expected (N, out)",
        lambda *arguments: fused(*arguments).T,
    ),
    lambda x, job, weight, adapters: {"count": len(adapters)},
    "each row is x W^T plus the update of its own job, and of no other",
)
