"""The exercises of Day 2: rank, counts, LoRA's forward and backward pass, merging, blending, batch fusion.

Each has its cases, its reference and the symptoms of known mistakes, in the order of the notebook. The letters are those of the
paper (Hu et al. 2021, arXiv 2106.09685, section 4.1): `a` is (r, in), `b` is (out, r), the update of a `weight` (out, in) is
(alpha / r) B A. The entries of all matrices are multiples of 1/4: the order in which a learner multiplies makes no difference.
"""

import math
import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from course_lib.checks import Exercise, close

Adapter = tuple[Tensor, Tensor, float]  # a (r, in), b (out, r), alpha
Shape = tuple[int, int]  # (out, in)
SCALES = (0.5, 2, 3, 4)  # alpha / r; 1 would hide a forgotten scale


def _matrix(rng: random.Random, rows: int, columns: int) -> Tensor:
    return torch.tensor([[(rng.randint(1, 6) * rng.choice((-1, 1))) / 4 for _ in range(columns)] for _ in range(rows)])


def _adapter(rng: random.Random, rows: int, columns: int, rank: int) -> Adapter:
    """For a weight (rows, columns)."""
    return _matrix(rng, rank, columns), _matrix(rng, rows, rank), rank * rng.choice(SCALES)


def _named(found: list | float, mistakes: Iterable[tuple]) -> str | None:
    """The sentence of the first mistake (its result, its sentence) that gives what was found."""
    return next((sentence for wrong, sentence in mistakes if close(found, wrong)), None)


def _wrong_shape(found: list, expected: list, letters: str, what: str = "result") -> str | None:
    shapes = [" x ".join(map(str, torch.tensor(value).shape)) for value in (found, expected)]
    return f"your {what} is {shapes[0]}, expected {shapes[1]}, {letters}" if shapes[0] != shapes[1] else None


def _wrong_scale(update: Tensor, product: Tensor, alpha: float, rank: int, what: str = "update") -> str | None:
    """What is wrong with the scale of an update that should be (alpha / rank) times the product of x, A and B."""
    right = f": the scale is alpha / r, here {alpha:g} / {rank}"
    sentence = _named(
        update,
        (
            (product, f"your {what} is not scaled{right}"),
            (alpha * product, f"your {what} is multiplied by alpha, but not divided by r{right}"),
            (product / rank, f"your {what} is divided by r, but not multiplied by alpha{right}"),
            (alpha * rank * product, f"your {what} is multiplied by r, expected divided by r{right}"),
            (rank / alpha * product, f"the scale of your {what} is upside down{right}"),
            ((alpha / rank) ** 2 * product, f"your {what} is scaled twice{right}"),
            (alpha / math.sqrt(rank) * product, f"your {what} is divided by the square root of r, as in rsLoRA{right}"),
            (-alpha / rank * product, f"your {what} has the wrong sign"),
        ),
    )
    factor = (update * product).sum() / product.square().sum()
    if sentence is None and close(update, factor * product):
        return f"your {what} is {factor.item() * rank / alpha:.3g} times what it should be{right}"
    return sentence


# E2.1 How low is the rank?


def rank_for(singular_values: list[float], share: float) -> int:
    return _smallest_k([value**2 for value in singular_values], share)


def _smallest_k(parts: list[float], share: float) -> int:
    return next(k for k in range(len(parts) + 1) if sum(parts[:k]) >= share * sum(parts))


def rank_for_cases(rng: random.Random) -> Iterator[tuple]:
    yield [7.0, 6.0, 6.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0, 2.0], 0.75  # every known mistake gives another k
    yield [5.0, 4.0, 3.0, 0.5], 0.5  # 25 of 50.25 are not quite one half
    for _ in range(12):
        values = sorted((rng.randint(1, 40) / 4 for _ in range(rng.randint(2, 9))), reverse=True)
        share = rng.choice((0.31, 0.5, 0.617, 0.75, 0.9, 0.983))
        held = [sum(value**2 for value in values[:k]) / sum(value**2 for value in values) for k in range(len(values))]
        if all(abs(part - share) > 1e-4 for part in held):  # rounding must not decide
            yield values, share
    yield [2.0, 2.0, 2.0, 2.0], 0.75  # exactly the share is enough
    yield [1.0, 1.0], 0.5
    yield [3.0, 2.0, 1.0], 1.0
    yield [3.0, 2.0, 0.0, 0.0], 1.0  # an update of rank 2
    yield [7.0], 0.9
    yield [0.0, 0.0, 0.0], 0.9  # a fresh adapter: no update at all


def rank_for_symptom(found: float, expected: int, singular_values: list[float], share: float) -> str | None:
    squares = [value**2 for value in singular_values]
    total = sum(squares)
    if total == 0:
        return f"an update of zeros holds everything with no direction at all: expected 0, found {found:g}"
    if found == expected + 1 and close(sum(squares[:expected]), share * total):
        return f"the first {expected} hold exactly the share, and that is enough: at least, not more than"
    named = _named(
        found,
        (
            (_smallest_k(singular_values, share), "you add the singular values themselves: add their squares"),
            (_smallest_k(squares, share**2), "you compare lengths: compare the sums of squares, without the root"),
            (_smallest_k(squares[::-1], share), "you begin with the smallest values: begin with the largest, they come first"),
            (_smallest_k(squares, 1 - share), "you stop where the rest holds the share: the first k must hold it"),
            (
                sum(part >= share * squares[0] for part in squares),
                "you compare each value with the largest: compare the sum of the first k",
            ),
            (
                math.ceil(share * len(squares)),
                "you take a share of the number of values: take the share of the sum of their squares",
            ),
            (expected - 1, "your k is one too small: return how many values you need, not the place of the last one"),
            (expected + 1, "your k is one too large: return the smallest k that holds the share"),
            (len(squares), "you return the number of all values: stop at the first k that holds the share"),
        ),
    )
    if named or not 0 <= found <= len(squares):
        return named
    held = [f"{sum(squares[:k]) / total:.1%}" for k in (int(found), expected)]
    return f"the first {found} hold {held[0]} of the sum of squares, the first {expected} {held[1]}; {share:.1%} are asked for"


# E2.2 Trained weights


def lora_count(shapes: list[Shape], rank: int) -> int:
    return sum(torch.empty(rank, columns).numel() + torch.empty(rows, rank).numel() for rows, columns in shapes)


def lora_count_cases(rng: random.Random) -> Iterator[tuple]:
    yield [(500, 200)], 3
    yield [(6, 4), (6, 4), (4, 10)], 2  # many layers of a model have the same shape
    for _ in range(10):
        shapes = [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(rng.randint(1, 5))]
        yield shapes * rng.randint(1, 3), rng.randint(1, 9)
    yield [(4, 4)], 8  # a rank above the sides is wasteful, and still trained
    yield [], 4


def lora_count_symptom(found: float, expected: int, shapes: list[Shape], rank: int) -> str | None:
    start = f"found {found:,.12g} weights, expected {expected:,}: "
    rows, columns = (sum(shape[side] for shape in shapes) for side in (0, 1))
    full = sum(out * into for out, into in shapes)
    if not shapes:
        return start + "where nothing is adapted, nothing is trained"
    named = _named(
        found,
        (
            (rank * columns, "these are the A's alone: B (out, r) is trained, too"),
            (rank * rows, "these are the B's alone: A (r, in) is trained, too"),
            (full, "these are the weights of the matrices, which are frozen: count A and B"),
            (full + expected, "the matrices themselves are frozen: count only A and B"),
            (rank * full, "rank times the whole matrix: A has r rows of length `in`, B has `out` rows of length r"),
            (rank**2 * full, "the entries of A times those of B: both are stored, so add them"),
            (rows + columns, "this is the count for rank 1: multiply by the rank"),
            (rank * expected, "the rank is counted twice: it is one side of A and one side of B"),
            (2 * rank * rows, "both A and B are counted as long as `out`: A is as long as `in`"),
            (2 * rank * columns, "both A and B are counted as long as `in`: B is as long as `out`"),
            (expected + rows, "LoRA adds no bias: count A and B only"),
            (expected + rank**2 * len(shapes), "there is nothing of size r x r between A and B"),
            (
                lora_count(list(dict.fromkeys(shapes)), rank),
                "a shape that occurs several times counts several times: each matrix has its own A and B",
            ),
            (lora_count(shapes[:1], rank), "only the first matrix is counted: add them all; does your loop return too early?"),
            (lora_count(shapes[-1:], rank), "only the last matrix is counted: add them all"),
        ),
    )
    return start + (named or "for each (out, in) A has r x in weights and B has out x r")


# E2.3 The forward pass


def lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    scale = alpha / a.shape[0]
    return torch.einsum("ni,oi->no", x, weight) + scale * torch.einsum("ni,ri,or->no", x, a, b)


def lora_cases(rng: random.Random) -> Iterator[tuple]:
    yield _whole(rng, 3, 4), _whole(rng, 5, 4), _whole(rng, 2, 4), _whole(rng, 5, 2), 6
    for _ in range(10):
        rows, columns = rng.randint(2, 6), rng.randint(2, 6)
        yield (
            _matrix(rng, rng.randint(1, 4), columns),
            _matrix(rng, rows, columns),
            *_adapter(rng, rows, columns, rng.randint(1, 4)),
        )
    yield _matrix(rng, 2, 4), _matrix(rng, 5, 4), _matrix(rng, 3, 4), torch.zeros(5, 3), 6  # B starts at zero
    yield _matrix(rng, 1, 4), _matrix(rng, 2, 4), *_adapter(rng, 2, 4, 1)


def _whole(rng: random.Random, rows: int, columns: int) -> Tensor:
    """Whole numbers from -3 to 3: what a first case prints is short."""
    return 4 * _matrix(rng, rows, columns).clamp(-0.75, 0.75)


def lora_symptom(found: list, expected: list, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> str | None:
    base, product, rank = x @ weight.T, x @ a.T @ b.T, len(a)
    update = alpha / rank * product
    if close(found, weight + alpha / rank * b @ a):
        return "you return the merged weight: multiply x with it"
    named = _wrong_shape(found, expected, "(N, out)") or _named(
        found,
        (
            (base, "your result is x W^T alone: the update is missing"),
            (update, "your result is the update alone: the frozen layer, x W^T, is missing"),
            (alpha / rank * (base + product), "you scale the frozen layer, too: only the update is multiplied by alpha / r"),
            (base * update, "you multiply base and update: add them"),
        ),
    )
    if named:
        return named
    for size, words in ((weight.shape[0], "out"), (weight.shape[1], "in"), (len(x), "N")):
        if size != rank and close(found, base + alpha / size * product):
            return f"you divide by {words}, {size}: r is the number of rows of a, {rank}"
    return _wrong_scale(torch.tensor(found) - base, product, alpha, rank)


# E2.4 The gradients


def gradients(x: Tensor, upstream: Tensor, a: Tensor, b: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """By autograd, which the learner does without."""
    with torch.enable_grad():
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        return torch.autograd.grad(alpha / a.shape[0] * (x @ a.T @ b.T), (a, b), upstream)


def gradients_cases(rng: random.Random) -> Iterator[tuple]:
    yield _whole(rng, 4, 3), _whole(rng, 4, 5), _whole(rng, 2, 3), _whole(rng, 5, 2), 6
    yield _matrix(rng, 3, 4), _matrix(rng, 3, 5), _matrix(rng, 2, 4), torch.zeros(5, 2), 8  # the first step: B is zero
    for _ in range(10):
        count, rows, columns = (rng.randint(1, 5) for _ in range(3))
        yield _matrix(rng, count, columns), _matrix(rng, count, rows), *_adapter(rng, rows, columns, rng.randint(1, 4))
    yield _matrix(rng, 3, 4), _matrix(rng, 3, 5), torch.zeros(2, 4), _matrix(rng, 5, 2), 6  # A is zero


def gradients_symptom(found: list, expected: list, x: Tensor, upstream: Tensor, a: Tensor, b: Tensor, alpha: float) -> str | None:
    if len(found) != 2:
        return f"expected two gradients, that of a and that of b, found {len(found)} values"
    if close(found, expected[::-1]):
        return "your gradients come in the wrong order: that of a first, then that of b"
    rank, count = len(a), len(x)
    products = (upstream @ b).T @ x, upstream.T @ (x @ a.T)
    summed = torch.outer((upstream @ b).sum(0), x.sum(0)), torch.outer(upstream.sum(0), (x @ a.T).sum(0))
    for name, own, right, product, outer in zip("ab", found, expected, products, summed, strict=True):
        if close(own, right):
            continue
        if close(own, torch.tensor(right).T):
            return f"your gradient of {name} is transposed: a gradient has the shape of its matrix"
        wrong = _wrong_shape(own, right, "the shape of its matrix", f"gradient of {name}")
        if wrong:
            return wrong
        if close(own, alpha / rank * product / count):
            return (
                f"your gradient of {name} is a mean over the {count} rows: upstream says already how much each row counts, so add"
            )
        if close(own, alpha / rank * outer):
            return f"for {name} you add up the rows before you multiply: each row of upstream belongs to its own row of x"
        if close(own, 0 * product):
            return f"your gradient of {name} is zero: that is so only where {'b' if name == 'a' else 'a'} is zero"
        return _wrong_scale(torch.tensor(own), product, alpha, rank, f"gradient of {name}")
    return None


# E2.5 Equal budgets


def largest_rank(shapes: list[Shape], budget: int) -> int:
    fitting = (rank for rank in range(1, min(map(min, shapes)) + 1) if lora_count(shapes, rank) <= budget)
    return max(fitting, default=0)


def largest_rank_cases(rng: random.Random) -> Iterator[tuple]:
    yield [(60, 20), (30, 40)], 1000
    yield [(60, 20), (30, 40)], 1050  # exactly rank 7
    yield [(30, 4), (30, 30)], 5000  # a side of 4 ends it
    yield [(30, 30), (4, 30)], 5000
    for _ in range(15):
        shapes = [(rng.randint(3, 40), rng.randint(3, 40)) for _ in range(rng.randint(1, 4))]
        yield shapes, rng.randint(1, 12) * lora_count(shapes, 1) + rng.choice((-1, 0, 1, 5))
    yield [(8, 8), (8, 8)], 31  # rank 1 takes 32
    yield [(100, 100)], 0


def largest_rank_symptom(found: float, expected: int, shapes: list[Shape], budget: int) -> str | None:
    rows, columns = (sum(shape[side] for shape in shapes) for side in (0, 1))
    limit = min(map(min, shapes))
    if found < 0:
        return f"a rank is never below 0, found {found:g}"
    if found != int(found):
        return f"a rank is a whole number, found {found:.4g}: round down"
    costs = [rank * (rows + columns) for rank in (int(found), expected, int(found) + 1)]
    if expected == 0:
        return f"not even rank 1 fits, it trains {rows + columns:,} weights and {budget:,} are allowed: expected 0, found {found:g}"
    if expected == limit and found > limit and costs[0] <= budget:
        return f"rank {found:g} is above the smallest side of all matrices, {limit}: B A has no higher rank than that"
    named = _named(
        found,
        (
            (budget // columns, "you count the A's alone: B is trained, too"),
            (budget // rows, "you count the B's alone: A is trained, too"),
            (budget // sum(out * into for out, into in shapes), "you divide by the frozen weights: divide by what rank 1 trains"),
            (budget // sum(shapes[0]), "you count the first matrix alone: the budget is for all of them"),
            (budget // sum(shapes[-1]), "you count the last matrix alone: the budget is for all of them"),
        ),
    )
    spent = f"rank {found:g} trains {costs[0]:,} weights of {budget:,}"
    if named and costs[0] > budget:
        return f"{spent}: {named}"
    if costs[0] > budget:
        return f"{spent}, more than the budget: round down"
    if costs[2] == budget:
        return f"{spent}, rank {found + 1:g} trains exactly {costs[2]:,}, and that is allowed"
    if found == 2 ** (expected.bit_length() - 1):
        return f"{spent}: a rank need not be a power of two, rank {expected} fits, too"
    return f"{spent}, rank {expected} trains {costs[1]:,}: {named or 'take the largest rank that fits'}"


# E2.6 Merging


def merge(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return torch.add(weight, b.mm(a), alpha=alpha / a.shape[0])


def merge_cases(rng: random.Random) -> Iterator[tuple]:
    yield _whole(rng, 3, 4), _whole(rng, 2, 4), _whole(rng, 3, 2), 6
    for _ in range(10):
        rows, columns = rng.randint(2, 6), rng.randint(2, 6)
        yield _matrix(rng, rows, columns), *_adapter(rng, rows, columns, rng.randint(1, 4))
    yield _matrix(rng, 4, 3), _matrix(rng, 2, 3), torch.zeros(4, 2), 6  # B starts at zero


def merge_symptom(found: list, expected: list, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> str | None:
    product, rank = b @ a, len(a)
    named = _wrong_shape(found, expected, "the shape of `weight`") or _named(
        found,
        (
            (weight, "your result is the old weight: the update is missing"),
            (alpha / rank * product, "your result is the update alone: add it to `weight`"),
            (alpha / rank * (weight + product), "you scale the frozen weight, too: only the update is multiplied by alpha / r"),
            (
                weight * (1 - alpha / rank) + alpha / rank * product,
                "you mix weight and update: the weight stays whole, the update comes on top",
            ),
        ),
    )
    if named:
        return named
    for size, words in ((len(weight), "out"), (weight.shape[1], "in")):
        if size != rank and close(found, weight + alpha / size * product):
            return f"you divide by {words}, {size}: r is the number of rows of a, {rank}"
    return _wrong_scale(torch.tensor(found) - weight, product, alpha, rank)


# E2.7 Blending


def blend(weight: Tensor, adapters: list[Adapter], shares: list[float]) -> Tensor:
    return weight + sum(share * (alpha / a.shape[0]) * b.mm(a) for (a, b, alpha), share in zip(adapters, shares, strict=True))


def blend_cases(rng: random.Random) -> Iterator[tuple]:
    same = [(_whole(rng, 2, 4), _whole(rng, 3, 2), 6) for _ in range(2)]
    yield _whole(rng, 3, 4), same, [0.5, 0.25]
    yield _matrix(rng, 3, 4), [_adapter(rng, 3, 4, 1), _adapter(rng, 3, 4, 3)], [0.5, 0.5]
    for _ in range(10):
        rows, columns, count = rng.randint(2, 5), rng.randint(2, 5), rng.randint(1, 4)
        adapters = [_adapter(rng, rows, columns, rng.randint(1, 4)) for _ in range(count)]
        yield _matrix(rng, rows, columns), adapters, [rng.choice((-1, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5)) for _ in range(count)]
    yield _matrix(rng, 3, 3), [_adapter(rng, 3, 3, 3), _adapter(rng, 3, 3, 3)], [1.0, -1.0]  # shares that add up to zero
    yield _matrix(rng, 2, 3), [], []


def blend_symptom(found: list, expected: list, weight: Tensor, adapters: list[Adapter], shares: list[float]) -> str | None:
    if not adapters:
        return "without adapters the result is the weight"
    wrong = _wrong_shape(found, expected, "the shape of `weight`")
    if wrong:
        return wrong
    products = torch.stack([b @ a for a, b, _ in adapters])  # (K, out, in)
    weights = torch.tensor(shares)
    alphas, ranks = torch.tensor([[float(alpha), len(a)] for a, _, alpha in adapters]).T
    scales = alphas / ranks
    right, count, total = weights * scales, len(adapters), sum(shares)
    if len(set(ranks.tolist())) == 1 and count > 1:
        for factors in (shares, [1 / count] * count, [1.0] * count):
            mean_a = sum(factor * a for factor, (a, _, _) in zip(factors, adapters, strict=True))
            mean_b = sum(factor * b for factor, (_, b, _) in zip(factors, adapters, strict=True))
            if any(close(found, weight + scale * mean_b @ mean_a) for scale in (*scales, 1.0)):
                return (
                    "you blend the A's and the B's apart and multiply the two blends: the product then has cross terms, "
                    "the B of one adapter times the A of another; blend the products B A"
                )
    blended = torch.tensor(expected)
    wrong = _named(
        found,
        (
            (weight, "your result is the old weight: the updates are missing"),
            (blended - weight, "your result is the updates alone: add them to `weight`"),
            (
                blended + (total - 1) * weight,
                f"you blend merged weights: `weight` is counted {total:g} times, the sum of the shares",
            ),
            (blended + (count - 1) * weight, f"`weight` is added {count} times, once for each adapter: add it once"),
        ),
    )
    mistakes = (
        (weights * right, "your shares are squared: does a share multiply A and B both? once is enough"),
        (scales, "your shares are missing: each update is multiplied by its own"),
        (weights, "your updates are not scaled: each has its own alpha / r"),
        (torch.ones(count), "shares and scales are missing: A's and B's laid side by side give the plain sum of all B A"),
        (weights * alphas, "alpha is not divided by r: each adapter has its own r, the number of rows of its a"),
        (weights * scales[0], "all updates have the scale of the first adapter: each has its own alpha / r"),
        (weights * scales[-1], "all updates have the scale of the last adapter: each has its own alpha / r"),
        (right / (total or 1), f"you divide by the sum of the shares, {total:g}: take the shares as they are"),
        (
            right / count,
            "you divide by the number of adapters, or by the sum of all ranks: the shares as they are, alpha by its own r",
        ),
        (right * (torch.arange(count) == 0), "only the first adapter is used"),
        (right * (torch.arange(count) == count - 1), "only the last adapter is used"),
    )
    return wrong or _named(found, ((weight + torch.tensordot(factors, products, 1), sentence) for factors, sentence in mistakes))


# E2.8 Batch fusion


def fused(x: Tensor, job: list[int], weight: Tensor, adapters: list[Adapter]) -> Tensor:
    return torch.stack([merge(weight, *adapters[own]) @ row for row, own in zip(x, job, strict=True)])


def fused_cases(rng: random.Random) -> Iterator[tuple]:
    yield (
        _whole(rng, 4, 3),
        [0, 1, 1, 0],
        _whole(rng, 2, 3),
        [(_whole(rng, 2, 3), _whole(rng, 2, 2), 6), (_whole(rng, 1, 3), _whole(rng, 2, 1), 2)],
    )
    yield _matrix(rng, 4, 3), [2, 0, 2, 0], _matrix(rng, 5, 3), [_adapter(rng, 5, 3, rank) for rank in (2, 1, 3)]  # no row of job 1
    for _ in range(10):
        count, rows, columns, jobs = rng.randint(1, 6), rng.randint(2, 5), rng.randint(2, 5), rng.randint(1, 4)
        adapters = [_adapter(rng, rows, columns, rng.randint(1, 4)) for _ in range(jobs)]
        yield _matrix(rng, count, columns), [rng.randrange(jobs) for _ in range(count)], _matrix(rng, rows, columns), adapters
    yield _matrix(rng, 3, 3), [1, 1, 1], _matrix(rng, 3, 3), [_adapter(rng, 3, 3, 3), _adapter(rng, 3, 3, 3)]
    yield _matrix(rng, 3, 2), [0, 1, 0], _matrix(rng, 2, 2), [_adapter(rng, 2, 2, 1), (_matrix(rng, 1, 2), torch.zeros(2, 1), 2)]


def fused_symptom(found: list, expected: list, x: Tensor, job: list[int], weight: Tensor, adapters: list[Adapter]) -> str | None:
    wrong = _wrong_shape(found, expected, "(N, out)")
    if wrong:
        return wrong
    base, right, count = x @ weight.T, torch.tensor(expected), len(adapters)
    products = [x @ a.T @ b.T for a, b, _ in adapters]
    updates = [alpha / len(a) * product for (a, _, alpha), product in zip(adapters, products, strict=True)]
    order = sorted(range(len(job)), key=lambda row: job[row])
    named = _named(
        found,
        (
            (base, "your rows are x W^T alone: the updates are missing (`job` is a list, so `job == i` is no mask)"),
            (right - base, "your rows are the updates alone: the frozen layer, x W^T, is missing"),
            (right[order], "your rows come back sorted by job: put each back into its own place"),
            (base + sum(updates), "every row gets the updates of all jobs: each row gets that of its own job alone"),
            (
                right + (count - 1) * base,
                f"x W^T is added {count} times, once for each job: the frozen layer is computed once, for all rows",
            ),
        ),
    )
    if named:
        return named
    result = torch.tensor(found)
    for i, own in enumerate(job):
        if close(result[i], right[i]):
            continue
        if close(result[i], base[i]):
            return f"row {i} gets no update: it belongs to job {own}"
        for other in range(count):
            if close(result[i], base[i] + updates[other][i]):
                return f"row {i} belongs to job {own} and gets the update of job {other}: `job` says which row belongs to which job"
        a, _, alpha = adapters[own]
        wrong = _wrong_scale(result[i] - base[i], products[own][i], alpha, len(a), f"update of row {i}, job {own},")
        return wrong or f"row {i} is not x W^T plus the update of its job, {own}"
    return None


EXERCISES = {
    "E2.1": Exercise(rank_for, rank_for_cases, rank_for_symptom),
    "E2.2": Exercise(lora_count, lora_count_cases, lora_count_symptom),
    "E2.3": Exercise(lora, lora_cases, lora_symptom),
    "E2.4": Exercise(gradients, gradients_cases, gradients_symptom),
    "E2.5": Exercise(largest_rank, largest_rank_cases, largest_rank_symptom),
    "E2.6": Exercise(merge, merge_cases, merge_symptom),
    "E2.7": Exercise(blend, blend_cases, blend_symptom),
    "E2.8": Exercise(fused, fused_cases, fused_symptom),
}
