"""The exercises of Day 3, in the order of the notebook: the core, which is AdaLoRA's layer with its
penalty, the importance of a weight, the schedule of the budget and the choice of what stays; then
the best matrix of a low rank, and a count.

The letters are those of the paper (Zhang et al. 2023, arXiv 2303.10512, sections 3.1 to 3.3): `P`
is (out, r), `singular` (r,), `Q` (r, in); the update of a weight (out, in) is scale * P
diag(singular) Q. Most entries are multiples of 1/4: the order of the products makes no difference.
"""

import math
import operator
from functools import partial

import torch
from torch import Generator, Tensor

from course_lib.checks import Exercise, known
from course_lib.checks.day2 import SHAPES_AND_RANK, each, lora_count

EXERCISES = {}
DRAW = Generator().manual_seed(3)


def drawn(*shape, most=6):
    """Multiples of 1/4, none of them zero."""
    sizes = torch.randint(1, most + 1, shape, generator=DRAW) / 4
    return sizes * (2 * torch.randint(0, 2, shape, generator=DRAW) - 1)


def whole(*shape):
    """Whole numbers from -3 to 3: what a first case prints is short."""
    return 4 * drawn(*shape, most=3)


# --- E3.1 The layer and its penalty


def svd_parts(function, x, P, singular, Q, scale):
    """What your function makes of x (N, in), P (out, r), singular (r,), Q (r, in) and a scale."""
    with torch.enable_grad():
        for factor in (P, singular, Q):
            factor.requires_grad_()
        found = function(x, P, singular, Q, scale)
    if not isinstance(found, tuple | list) or len(found) != 2:
        return {"you return": type(found).__name__}
    added, penalty = found
    return {
        "what is added": added,
        "penalty": penalty,
        "gradients of what is added": reached(added, {"P": P, "singular": singular, "Q": Q}),
        "gradients of the penalty": reached(penalty, {"P": P, "Q": Q}),
    }


def reached(result, factors):
    """The names of those factors that get a gradient from `result`."""
    if not isinstance(result, Tensor) or not result.requires_grad:
        return "none"
    gradients = torch.autograd.grad(
        result.sum(), [*factors.values()], retain_graph=True, allow_unused=True
    )
    names = [name for name, one in zip(factors, gradients, strict=True) if one is not None]
    return " and ".join(names) or "none"


def svd(x, P, singular, Q, scale):
    return added(x, P, singular, Q, scale), penalty(P, Q)


def added(x, P, singular, Q, scale):
    return scale * (x @ Q.T * singular) @ P.T


def inner(P, Q):
    """The Gram matrices, both (r, r)."""
    return P.T @ P, Q @ Q.T


def off(gram):
    return gram - torch.eye(len(gram)).to(gram)


def penalty(P, Q, grams=inner, off=off, norm=torch.linalg.matrix_norm):
    """grams: of which matrices; off: what is wrong with each; norm: how large that is."""
    return sum(norm(off(gram)) for gram in grams(P, Q))


def with_added(wrong):
    """A layer with the right penalty that adds `wrong(x, P, singular, Q, scale)`."""
    return lambda x, P, singular, Q, scale: (wrong(x, P, singular, Q, scale), penalty(P, Q))


def with_penalty(**wrong):
    """A layer with a penalty that differs from the right one in these parts."""
    return lambda x, P, singular, Q, scale: (
        added(x, P, singular, Q, scale),
        penalty(P, Q, **wrong),
    )


def layer(n, out, columns, rank, scale):
    return drawn(n, columns), drawn(out, rank), drawn(rank), drawn(rank, columns), scale


EXERCISES["E3.1"] = Exercise(
    svd,
    [
        (whole(2, 3), whole(3, 2), torch.tensor([2.0, -3.0]), whole(2, 3), 3),  # out is in
        layer(1, 2, 4, 1, 0.5),
        layer(3, 6, 5, 4, 2),
        layer(4, 3, 2, 4, 4),  # a rank above the sides
        (*layer(2, 5, 4, 3, 2)[:2], torch.zeros(3), drawn(3, 4), 2),  # a fresh layer adds nothing
        # orthogonal already: no penalty
        (drawn(2, 5), torch.eye(4)[:, :3], drawn(3), torch.eye(5)[2:], 0.5),
    ],
    known(
        "what your layer adds is not scaled",
        with_added(lambda *factors: added(*factors[:4], 1)),
        "what your layer adds is scaled twice",
        with_added(lambda *factors: added(*factors[:4], factors[4] ** 2)),
        "what your layer adds is divided by the scale: multiply",
        with_added(lambda *factors: added(*factors[:4], 1 / factors[4])),
        "what your layer adds is divided by r: the scale that you are given is alpha / r already",
        with_added(lambda x, P, singular, *rest: added(x, P, singular, *rest) / len(singular)),
        "what your layer adds has the wrong sign",
        with_added(lambda *factors: -added(*factors)),
        "the singular values are left out: each direction is multiplied by its own",
        with_added(lambda x, P, singular, Q, scale: scale * x @ Q.T @ P.T),
        "the singular values are squared: do you multiply both P and Q by them? once is enough",
        with_added(lambda x, P, singular, Q, scale: added(x, P, singular**2, Q, scale)),
        "your singular values lose their sign: they are learned, and may be negative",
        with_added(lambda x, P, singular, Q, scale: added(x, P, singular.abs(), Q, scale)),
        "every direction is multiplied by the sum of all singular values: each has its own",
        with_added(lambda x, P, singular, Q, scale: singular.sum() * scale * x @ Q.T @ P.T),
        "every direction is multiplied by the first singular value: each has its own",
        with_added(lambda x, P, singular, Q, scale: singular[0] * scale * x @ Q.T @ P.T),
        "P and Q have changed places: Q takes x down to r numbers, P brings them up again",
        with_added(lambda x, P, singular, Q, scale: scale * (x @ P * singular) @ Q),
        "what your layer adds is transposed: expected (N, out), a row for each row of x",
        with_added(lambda *factors: added(*factors).T),
        "your first result is the update of the weight, (out, in): x is missing",
        with_added(lambda x, P, singular, Q, scale: scale * (P * singular) @ Q),
        "your first result contains x itself: return only what is added",
        with_added(lambda x, *rest: added(x, *rest) + x),
        "what your layer adds is cut off from its gradient: no detach, no .data, no torch.no_grad",
        with_added(lambda *factors: added(*factors).detach()),
        "your penalty is of P P^T and Q^T Q: multiply the other way round, so that both are r x r",
        with_penalty(grams=lambda P, Q: (P @ P.T, Q.T @ Q)),
        "your penalty is of P P^T: the columns of P are the directions, so take the r x r product",
        with_penalty(grams=lambda P, Q: (P @ P.T, Q @ Q.T)),
        "your penalty is of Q^T Q: the rows of Q are the directions, so take the r x r product",
        with_penalty(grams=lambda P, Q: (P.T @ P, Q.T @ Q)),
        "the identity is not subtracted: matrices that are orthogonal must have no penalty",
        with_penalty(off=lambda gram: gram),
        "you subtract 1 everywhere: the identity has ones on its diagonal, and zeros elsewhere",
        with_penalty(off=lambda gram: gram - 1),
        "you subtract the whole diagonal: a column of P or a row of Q also has to have length 1",
        with_penalty(off=lambda gram: gram - torch.diag(gram.diag())),
        "your penalty adds squared norms: take the root of each sum of squares",
        with_penalty(norm=lambda matrix: (matrix**2).sum()),
        "your norm is the largest singular value: the Frobenius norm is asked for",
        with_penalty(norm=lambda matrix: torch.linalg.matrix_norm(matrix, 2)),
        "your norm is the sum of all absolute values: the Frobenius norm squares them, adds, and "
        "takes the root",
        with_penalty(norm=lambda matrix: matrix.abs().sum()),
        "your norm is the root of a mean of squares: the Frobenius norm adds the squares",
        with_penalty(norm=lambda matrix: (matrix**2).mean().sqrt()),
        "your penalty is of P alone: Q is to be orthogonal, too",
        with_penalty(grams=lambda P, Q: [P.T @ P]),
        "your penalty is of Q alone: P is to be orthogonal, too",
        with_penalty(grams=lambda P, Q: [Q @ Q.T]),
        "your penalty is the mean of two norms, or half their sum: here it is their sum",
        with_penalty(norm=lambda matrix: torch.linalg.matrix_norm(matrix) / 2),
        "you add the two matrices before you take the norm: errors of P and Q can then cancel; add "
        "the norms",
        lambda x, P, singular, Q, scale: (
            added(x, P, singular, Q, scale),
            torch.linalg.matrix_norm(off(P.T @ P) + off(Q @ Q.T)),
        ),
        "your penalty takes one root of all squares: a root for P, a root for Q, then their sum",
        lambda x, P, singular, Q, scale: (
            added(x, P, singular, Q, scale),
            penalty(P, Q, norm=lambda matrix: (matrix**2).sum()).sqrt(),
        ),
        "the singular values stand in your penalty: it concerns only P and Q",
        lambda x, P, singular, Q, scale: (
            added(x, P, singular, Q, scale),
            penalty(P * singular, Q),
        ),
        "your penalty is scaled: the scale belongs only to what is added",
        lambda x, P, singular, Q, scale: (
            added(x, P, singular, Q, scale),
            scale * penalty(P, Q),
        ),
        "your penalty has no gradient, so that nothing becomes orthogonal: keep it a tensor, no "
        "item, float or detach",
        lambda *factors: (svd(*factors)[0], svd(*factors)[1].item()),
        "neither of your results has a gradient, so that nothing is learned: no detach, no .data, "
        "no torch.no_grad",
        lambda *factors: [part.detach() for part in svd(*factors)],
        "your results come in the wrong order: what is added, then the penalty",
        lambda *factors: svd(*factors)[::-1],
        "you return one tensor: expected two results, what is added and the penalty",
        lambda *factors: svd(*factors)[0],
    ),
    otherwise="expected two results: what the three factors make of each row of x, with the scale, "
    "and one number, how far P and Q are from orthogonal",
    ask=svd_parts,
)


# --- E3.2 Importance

OLD, NEW = 0.85, 0.15  # the shares of what was and what comes; the paper's beta and 1 - beta


def importance(
    sensitivity,
    uncertainty,
    weight,
    gradient,
    now=lambda weight, gradient: (weight * gradient).abs(),
    shares=((OLD, NEW), (OLD, NEW)),
    spread=lambda now, new, before, uncertainty: (now - new).abs(),
):
    """now: the importance at this step; shares: of old and new, in both averages; spread: what the
    uncertainty averages, from the importance, the new and the old sensitivity, and itself.
    """
    current = now(weight, gradient)
    (kept, taken), (kept_too, taken_too) = shares
    new = kept * sensitivity + taken * current
    return new, kept_too * uncertainty + taken_too * spread(current, new, sensitivity, uncertainty)


def averages(*shape):
    """A sensitivity and an uncertainty, which are never negative."""
    return drawn(*shape).abs(), drawn(*shape).abs()


EXERCISES["E3.2"] = Exercise(
    lambda sensitivity, uncertainty, weight, gradient: importance(
        sensitivity, uncertainty, weight, gradient
    ),
    [
        (
            *(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 3.0])),
            *(torch.tensor([2.0, -3.0, -1.0]), torch.tensor([5.0, 3.0, -2.0])),
        ),
        *((*averages(*shape), drawn(*shape), drawn(*shape)) for shape in ((4, 2), (2, 5), (1,))),
        (*(torch.zeros(3, 2) for _ in range(2)), drawn(3, 2), drawn(3, 2)),  # the first step
        (*averages(4), torch.zeros(4), drawn(4)),  # singular values at the start
    ],
    known(
        "your importance can be negative: its absolute value is missing",
        partial(importance, now=lambda weight, gradient: weight * gradient),
        "your uncertainty can be negative: the absolute value of the difference is missing",
        partial(importance, spread=lambda now, new, before, uncertainty: now - new),
        "neither importance nor difference has its absolute value: both say how large, not which "
        "way",
        partial(
            importance,
            now=lambda weight, gradient: weight * gradient,
            spread=lambda now, new, before, uncertainty: now - new,
        ),
        "your importance is the gradient alone: the weight is missing",
        partial(importance, now=lambda weight, gradient: gradient.abs()),
        "your importance is the squared gradient, as in Adam: the weight is missing",
        partial(importance, now=lambda weight, gradient: gradient**2),
        "your importance is the weight alone: the gradient is missing",
        partial(importance, now=lambda weight, gradient: weight.abs()),
        "your importance is squared: take the absolute value",
        partial(importance, now=lambda weight, gradient: (weight * gradient) ** 2),
        "you add weight and gradient: multiply them",
        partial(importance, now=lambda weight, gradient: (weight + gradient).abs()),
        "0.15 and 0.85 have changed places: the larger share is that of the old average",
        partial(importance, shares=((NEW, OLD), (NEW, OLD))),
        "0.15 and 0.85 have changed places in the sensitivity",
        partial(importance, shares=((NEW, OLD), (OLD, NEW))),
        "0.15 and 0.85 have changed places in the uncertainty",
        partial(importance, shares=((OLD, NEW), (NEW, OLD))),
        "your averages forget what was before: the old one has a share of 0.85",
        partial(importance, shares=((0, 1), (0, 1))),
        "the new value counts in full: in an average the shares add up to 1",
        partial(importance, shares=((OLD, 1), (OLD, 1))),
        "your uncertainty uses the old sensitivity: renew the sensitivity first, then compare with "
        "the new one",
        partial(importance, spread=lambda now, new, before, uncertainty: (now - before).abs()),
        "your uncertainty averages the importance itself: average how far it is from the "
        "sensitivity",
        partial(importance, spread=lambda now, new, before, uncertainty: now),
        "your uncertainty averages squares, as a variance does: take the absolute difference",
        partial(importance, spread=lambda now, new, before, uncertainty: (now - new) ** 2),
        "your uncertainty compares the importance with the old uncertainty: compare it with the "
        "sensitivity",
        partial(importance, spread=lambda now, new, before, uncertainty: (now - uncertainty).abs()),
        "your uncertainty compares the new sensitivity with the old: compare the importance with "
        "the new sensitivity",
        partial(importance, spread=lambda now, new, before, uncertainty: (new - before).abs()),
        "your uncertainty is the old one: it is to be renewed, too",
        partial(importance, spread=lambda now, new, before, uncertainty: uncertainty),
        "your results come in the wrong order: sensitivity, then uncertainty",
        lambda *arguments: importance(*arguments)[::-1],
        "you return the score, sensitivity times uncertainty: return the two averages",
        lambda *arguments: math.prod(importance(*arguments)),
        "you return one average: return two, sensitivity and uncertainty",
        lambda *arguments: importance(*arguments)[0],
    ),
    otherwise="expected two averages, each 0.85 old and 0.15 new: of the importance at this step, "
    "and of how far it is from the new sensitivity",
)


# --- E3.3 The budget


def allowed(function, step, start, target, steps, initial, final):
    """How many triplets the model may have after a step."""
    found = function(step, start, target, steps, initial, final)
    try:
        operator.index(found)
    except Exception:
        return {"budget": found, "it is": f"of type {type(found).__name__}"}
    return {"budget": found, "it is": "a whole number"}


def budget(
    step,
    start,
    target,
    steps,
    initial,
    final,
    left=lambda done: (1 - done) ** 3,
    since=lambda step, initial, final: step - initial,
    span=lambda steps, initial, final: steps - initial - final,
    ends=(True, True),
    whole=int,
):
    """left: of the way down, from the part of the time that is over; since: the steps of that;
    span: all steps of it; ends: does the budget stay at start and at target; whole: how a number
    becomes whole.
    """
    if ends[0] and step < initial:
        return whole(start)
    if ends[1] and step >= steps - final:
        return whole(target)
    done = since(step, initial, final) / span(steps, initial, final)
    return whole(target + (start - target) * left(done))


EXERCISES["E3.3"] = Exercise(
    lambda step, start, target, steps, initial, final: budget(
        step, start, target, steps, initial, final
    ),
    [
        (300, 864, 576, 1000, 100, 300),  # the paper's DeBERTa; 661.33
        (100, 864, 576, 1000, 100, 300),
        (250, 864, 576, 1000, 100, 300),  # 697.5
        (1, 864, 576, 1000, 100, 300),
        (700, 864, 576, 1000, 100, 300),
        (850, 864, 576, 1000, 100, 300),  # 571.5 if the end were forgotten
        (1000, 864, 576, 1000, 100, 300),
        (60, 80, 2, 60, 4, 40),  # negative then
        (9, 56, 28, 150, 15, 50),
        (44, 57, 29, 150, 15, 50),
        (80, 56, 28, 150, 15, 50),
        (7, 30, 10, 20, 0, 0),
        (20, 30, 10, 20, 0, 0),
        (5, 12, 12, 20, 2, 3),
    ],
    known(
        "your budget has the misprint of the paper's equation (14): after step {initial}, where "
        "the fall begins, exactly nothing of its time is over",
        partial(budget, since=lambda step, initial, final: step - initial - final),
        "your budget falls in a straight line: it falls with the third power, fast at first",
        partial(budget, left=lambda done: 1 - done),
        "your budget falls with the second power: it falls with the third",
        partial(budget, left=lambda done: (1 - done) ** 2),
        "your budget falls slowly at first: the third power is of what is left, not of what is "
        "done",
        partial(budget, left=lambda done: 1 - done**3),
        "your budget rises in the time in which it should fall: the third power is of what is left",
        partial(budget, left=lambda done: done**3),
        "the final steps are forgotten: the target is reached {final} steps before the end",
        partial(budget, span=lambda steps, initial, final: steps - initial),
        "the initial steps are forgotten in the length of the fall: it lasts {span} steps",
        partial(budget, span=lambda steps, initial, final: steps - final),
        "the initial steps are counted as part of the fall: it begins after step {initial}",
        partial(budget, since=lambda step, initial, final: step),
        "initial and final steps are forgotten: between them the fall lasts {span} steps",
        partial(
            budget,
            since=lambda step, initial, final: step,
            span=lambda steps, initial, final: steps,
        ),
        "initial and final steps have changed places",
        lambda step, start, target, steps, initial, final: budget(
            step, start, target, steps, final, initial
        ),
        "start and target have changed places: the budget falls from {start} to {target}",
        lambda step, start, target, *rest: budget(step, target, start, *rest),
        "your budget falls from start plus target: only the difference between them goes away",
        lambda step, start, target, *rest: budget(step, start + target, target, *rest),
        "your budget falls to zero: at the end the target, {target}, is left",
        lambda step, start, target, *rest: budget(step, start, 0, *rest),
        "your budget is only what is above the target: add the target, {target}",
        lambda step, start, target, *rest: budget(step, start, target, *rest) - target,
        "your budget does not stay at the target, {target}: after step {step} it is "
        "{found[budget]}",
        partial(budget, ends=(True, False)),
        "your budget is {found[budget]} after step {step}: it stays at {start} until step "
        "{initial}",
        partial(budget, ends=(False, True)),
        "your budget is not whole: {found[budget]:g} triplets cannot be kept, cut off what stands "
        "after the point",
        partial(budget, whole=float),
        "your budget is a whole number as a float: make it an int",
        partial(budget, whole=lambda number: float(int(number))),
        "your budget is rounded to the nearest whole number: cut off what stands after the point",
        partial(budget, whole=lambda number: math.floor(number + 0.5)),
        "your budget is rounded up: cut off what stands after the point",
        partial(budget, whole=math.ceil),
    ),
    lambda step, start, target, steps, initial, final: {
        "span": steps - initial - final,
        "last": steps - final,
    },
    "after step {step} of {steps} expected {expected[budget]}: {start} until step {initial}, "
    "{target} from step {last} on, and between them a fall with the third power",
    ask=allowed,
)


# --- E3.4 The choice


def chosen(function, scores, budget):
    """What your function makes of scores (layers, rank) and a budget."""
    found = function(scores, budget)
    if not isinstance(found, Tensor):
        return {"mask": found, "it is": f"of type {type(found).__name__}"}
    numbers = "of floats" if found.is_floating_point() else "of whole numbers"
    return {
        "mask": found,
        "it is": "of True and False" if found.dtype == torch.bool else numbers,
    }


def mask(scores, budget):
    return best(scores.flatten(), budget).view_as(scores)


def best(scores, budget):
    """True for the highest scores in each row (of the last dimension)."""
    places = scores.topk(min(budget, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, places, True)


def distinct(layers, rank):
    """Scores of which no two are equal, in any order."""
    places = torch.randperm(layers * rank, generator=DRAW)
    return ((places + 1) / 8).view(layers, rank)


def cut_off(scores, budget):
    """The lowest score that stays."""
    return scores.flatten().sort(descending=True).values[budget - 1]


EXERCISES["E3.4"] = Exercise(
    mask,
    [
        (torch.tensor([[0.9, 0.2, 0.8], [0.1, 0.7, 0.3]]), 4),
        (torch.tensor([[0.9, 0.7, 0.8], [0.1, 0.3, 0.2]]), 2),  # nothing of the second layer
        *((distinct(4, 3), 5), (distinct(3, 4), 9), (distinct(5, 2), 3)),
        (distinct(3, 2), 6),  # all
        (distinct(2, 4), 1),
        (distinct(1, 5), 2),
    ],
    known(
        "every layer keeps the same number of triplets: choose among the scores of all layers",
        lambda scores, budget: best(scores, budget // len(scores)),
        "you keep up to {budget} triplets in every layer: the budget is for all layers together",
        best,
        "you choose among the layers at each place: choose among all scores",
        lambda scores, budget: best(scores.T, budget // scores.shape[1]).T,
        "you keep the {budget} lowest scores: keep the highest",
        lambda scores, budget: mask(-scores, budget),
        "your mask is upside down: it is True where a triplet is kept",
        lambda scores, budget: ~mask(scores, budget),
        "you keep {one_less}, one too few: is the score at the threshold lost?",
        lambda scores, budget: scores > cut_off(scores, budget),
        "you keep {one_more}, one too many: a place in a list counts from 0",
        lambda scores, budget: mask(scores, budget + 1),
        "you keep those scores that are above the mean: the budget says how many stay",
        lambda scores, budget: scores > scores.mean(),
        "you keep all: only {budget} may stay",
        lambda scores, budget: torch.ones_like(scores, dtype=torch.bool),
        "you take the places in the sorted order for ranks: argsort says which score comes first, "
        "not which rank the first score has",
        lambda scores, budget: scores.flatten().argsort(descending=True).view_as(scores) < budget,
        "you keep the first {budget} places, whatever their scores",
        lambda scores, budget: (torch.arange(scores.numel()) < budget).view_as(scores),
        "your mask is flat: give it the shape of the scores, {shape}",
        lambda scores, budget: mask(scores, budget).flatten(),
        "your mask is transposed: give it the shape of the scores, {shape}",
        lambda scores, budget: mask(scores, budget).T,
        "your mask holds whole numbers: it is to hold True and False, so that it can select",
        lambda scores, budget: mask(scores, budget).long(),
        "your mask holds floats: it is to hold True and False, so that it can select",
        lambda scores, budget: mask(scores, budget).float(),
        "your mask is a list: return a tensor of True and False",
        lambda scores, budget: mask(scores, budget).tolist(),
        "you return the scores that stay, and zeros: return a mask of True and False",
        lambda scores, budget: scores * mask(scores, budget),
        "you return places: return a mask in the shape of the scores, {shape}",
        lambda scores, budget: scores.flatten().topk(budget).indices,
        "you return the highest scores themselves: return a mask in the shape of the scores, "
        "{shape}",
        lambda scores, budget: scores.flatten().topk(budget).values,
        "you return the threshold: return a mask in the shape of the scores, {shape}",
        cut_off,
    ),
    lambda scores, budget: {
        "shape": tuple(scores.shape),
        "one_less": budget - 1,
        "one_more": budget + 1,
    },
    "expected a tensor of True and False in the shape of the scores, {shape}: True for the "
    "{budget} highest of all",
    ask=chosen,
)


# --- E3.5 The best matrix of a rank


def directions(matrix, keep, values=lambda singular: singular):
    """The sum of the singular directions that the slice `keep` takes; values: what each is
    multiplied by.
    """
    U, singular, V = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, keep] * values(singular[keep]) @ V[keep]


def best_rank(B, A, rank):
    return directions(B @ A, slice(rank))


def columns_kept(B, A, places):
    return B[:, places] @ A[places]


def not_transposed(B, A, rank):
    U, singular, V = torch.linalg.svd(B @ A)
    return U[:, :rank] * singular[:rank] @ V[:, :rank].T


def norms(matrix, dim):
    return torch.linalg.vector_norm(matrix, dim=dim)


def small(out, columns, r, rank):
    """Small entries: the rounding errors of a decomposition stay below what is compared."""
    return drawn(out, r) / 4, drawn(r, columns) / 4, rank


EXERCISES["E3.5"] = Exercise(
    best_rank,
    [
        small(4, 3, 3, 1),
        small(3, 5, 3, 2),
        small(6, 4, 4, 2),
        small(5, 6, 2, 1),
        small(4, 5, 3, 3),  # nothing to lose
        small(2, 3, 4, 1),  # a rank above the sides
        small(3, 3, 1, 1),
    ],
    known(
        "you keep the first columns of B and the first rows of A: place says nothing, and the best "
        "directions lie across them",
        lambda B, A, rank: columns_kept(B, A, slice(rank)),
        "you keep the last columns of B and the last rows of A: place says nothing, and the best "
        "directions lie across them",
        lambda B, A, rank: columns_kept(B, A, slice(-rank, None)),
        "you keep the longest columns of B with their rows of A: they are not orthogonal, and the "
        "best directions lie across them",
        lambda B, A, rank: columns_kept(B, A, norms(B, 0).topk(rank).indices),
        "you keep the longest rows of A with their columns of B: they are not orthogonal, and the "
        "best directions lie across them",
        lambda B, A, rank: columns_kept(B, A, norms(A, 1).topk(rank).indices),
        "you keep the longest pairs of a column of B and a row of A: they are not orthogonal, and "
        "the best directions lie across them",
        lambda B, A, rank: columns_kept(B, A, (norms(B, 0) * norms(A, 1)).topk(rank).indices),
        "you cut B and A each on its own: decompose their product",
        lambda B, A, rank: directions(B, slice(rank)) @ directions(A, slice(rank)),
        "your result is all of B A: only rank {rank} is allowed",
        lambda B, A, rank: B @ A,
        "your result has rank {one_more}, one too many: the slice [:{rank}] takes {rank}",
        lambda B, A, rank: directions(B @ A, slice(rank + 1)),
        "your result leaves out the largest direction: count from 0",
        lambda B, A, rank: directions(B @ A, slice(1, rank + 1)),
        "your result keeps the smallest directions: the largest come first",
        lambda B, A, rank: directions(B @ A, slice(-rank, None)),
        "your result is what is lost, the directions that do not stay: return the others",
        lambda B, A, rank: B @ A - best_rank(B, A, rank),
        "the singular values are lost: each direction is multiplied by its own",
        lambda B, A, rank: directions(B @ A, slice(rank), torch.ones_like),
        "the singular values are squared: once is enough",
        lambda B, A, rank: directions(B @ A, slice(rank), torch.square),
        "you multiply by the roots of the singular values only once: both sides need one, or one "
        "side the whole value",
        lambda B, A, rank: directions(B @ A, slice(rank), torch.sqrt),
        "you take columns of the third factor: torch.linalg.svd gives V transposed, whose rows are "
        "the directions",
        not_transposed,
        "your result is transposed: expected (out, in)",
        lambda *arguments: best_rank(*arguments).T,
        "you return factors: expected their product, one matrix (out, in)",
        lambda B, A, rank: torch.linalg.svd(B @ A, full_matrices=False)[:],
    ),
    lambda B, A, rank: {"one_more": rank + 1},
    "expected the matrix of rank {rank} that is closest to B A: its {rank} largest singular "
    "directions",
)


# --- E3.6 Trained weights


def adalora_count(shapes, rank):
    return sum(rank * (rows + columns + 1) for rows, columns in shapes)


EXERCISES["E3.6"] = Exercise(
    adalora_count,
    SHAPES_AND_RANK,
    known(
        "this is the count of LoRA: the singular values are trained, too",
        lora_count,
        "one singular value for each matrix: each triplet has its own",
        each(lambda rows, columns, rank: rank * (rows + columns) + 1),
        "the singular values are counted for one matrix: each matrix has its own",
        lambda shapes, rank: lora_count(shapes, rank) + rank,
        "the singular values are counted as an r x r matrix: only its diagonal is stored",
        each(lambda rows, columns, rank: rank * (rows + rank + columns)),
        "the singular values are counted twice",
        each(lambda rows, columns, rank: rank * (rows + columns + 2)),
        "these are the singular values alone: P and Q are trained, too",
        each(lambda rows, columns, rank: rank),
        "P is missing: count P (out, r), the singular values and Q (r, in)",
        each(lambda rows, columns, rank: rank * (columns + 1)),
        "Q is missing: count P (out, r), the singular values and Q (r, in)",
        each(lambda rows, columns, rank: rank * (rows + 1)),
        "P is counted as if it were square: it has `out` rows, and r columns",
        each(lambda rows, columns, rank: rows * rows + rank * (columns + 1)),
        "these are the weights of the matrices, which are frozen: count their triplets",
        each(lambda rows, columns, rank: rows * columns),
        "the matrices themselves are frozen: count only their triplets",
        each(lambda rows, columns, rank: rows * columns + rank * (rows + columns + 1)),
        "rank times the whole matrix: a triplet has a column of length `out`, a row of length "
        "`in`, and one number",
        each(lambda rows, columns, rank: rank * rows * columns),
        "this is the count of one triplet: multiply by the rank",
        each(lambda rows, columns, rank: rows + columns + 1),
        "the rank is counted twice: each of the r triplets is counted once",
        each(lambda rows, columns, rank: rank**2 * (rows + columns + 1)),
        "no rank is cut to the sides of a matrix: P has out x r weights and Q has r x in",
        each(lambda rows, columns, rank: min(rank, rows, columns) * (rows + columns + 1)),
        "a shape that occurs several times counts several times: each matrix has its own triplets",
        lambda shapes, rank: adalora_count({*shapes}, rank),
        "only the first matrix is counted: add them all; does your loop return too early?",
        lambda shapes, rank: adalora_count(shapes[:1], rank),
        "only the last matrix is counted: add them all",
        lambda shapes, rank: adalora_count(shapes[-1:], rank),
        "where nothing is adapted, nothing is trained",
        lambda shapes, rank: adalora_count(shapes, rank) or 1,
    ),
    otherwise="found {found:,} weights, expected {expected:,}: each (out, in) has `rank` triplets, "
    "a column of P, a row of Q and a singular value",
)
