"""Tests of the exercises of Day 3: right functions pass in whatever style they are written, and
wrong ones as a learner writes them get the sentence that helps.

That each listed mistake has its own sentence is in tests/test_checks.py.
"""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from course_lib import adalora
from course_lib.checks import diagnosis, find


def svd_by_library(x, P, singular, Q, scale):
    layer = adalora.SVDLinear(nn.Linear(Q.shape[1], len(P)), rank=1, alpha=1)
    layer.rank, layer.alpha = 1, scale
    del layer.P, layer.singular, layer.Q
    layer.P, layer.singular, layer.Q = P, singular, Q
    return layer(x) - layer.base(x), 2 * adalora.orthogonality_penalty([layer])


def svd_of_the_whole_matrix(x, P, singular, Q, scale):
    delta = scale * P @ torch.diag(singular) @ Q
    penalty = 0
    for gram in (P.T.matmul(P), Q.matmul(Q.T)):
        penalty = penalty + (torch.eye(len(singular)) - gram).pow(2).sum().sqrt()
    return [torch.einsum("ni,oi->no", x, delta), penalty]


def importance_by_library(sensitivity, uncertainty, weight, gradient):
    new = sensitivity.clone(), uncertainty.clone()
    adalora.update_importance(*new, weight, gradient)
    return new


def importance_by_hand(sensitivity, uncertainty, weight, gradient):
    now = weight.abs() * gradient.abs()
    sensitivity = sensitivity + 0.15 * (now - sensitivity)
    return sensitivity, uncertainty * 0.85 + (sensitivity - now).abs() * (1 - 0.85)


def budget_by_library(step, start, target, steps, initial, final):
    return adalora.Schedule(start, target, steps, initial, final, every=1).budget(step)


def budget_from_behind(step, start, target, steps, initial, final):
    left = (steps - final - step) / (steps - final - initial)
    return math.floor(target + (start - target) * min(1, max(0, left)) ** 3)


def budget_in_three_branches(step, start, target, steps, initial, final):
    if step <= initial:
        return start
    if step > steps - final:
        return target
    return int(target + (start - target) * (1 - (step - initial) / (steps - initial - final)) ** 3)


def mask_by_threshold(scores, budget):
    return scores >= scores.flatten().sort(descending=True)[0][budget - 1]


def mask_in_a_loop(scores, budget):
    kept = torch.full(scores.shape, False)
    places = [(layer, i) for layer in range(len(scores)) for i in range(scores.shape[1])]
    for layer, i in sorted(places, key=lambda place: -scores[place].item())[:budget]:
        kept[layer, i] = True
    return kept


def mask_by_ranks(scores, budget):
    return (scores.flatten().argsort(descending=True).argsort() < budget).reshape(scores.shape)


def best_rank_by_zeros(B, A, rank):
    U, singular, V = torch.linalg.svd(B @ A, full_matrices=False)
    singular[rank:] = 0
    return U @ torch.diag(singular) @ V


def best_rank_by_projection(B, A, rank):
    """Onto the directions of most energy, from the eigenvectors of M M^T."""
    M = (B @ A).double()
    vectors = torch.linalg.eigh(M @ M.T)[1][:, -rank:]
    return (vectors @ vectors.T @ M).float()


def best_rank_by_old_svd(B, A, rank):
    U, S, V = torch.svd(B @ A)
    return sum(
        (S[i] * torch.outer(U[:, i], V[:, i]) for i in range(min(rank, len(S)))), torch.zeros(1)
    )


def weights_in_a_loop(shapes, rank):
    total = 0
    for out, columns in shapes:
        total += out * rank + rank + rank * columns
    return total


def weights_of_modules(shapes, rank):
    layers = [
        [torch.empty(out, rank), torch.empty(rank), torch.empty(rank, columns)]
        for out, columns in shapes
    ]
    return sum(part.numel() for layer in layers for part in layer)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("E3.1", svd_by_library),
        ("E3.1", svd_of_the_whole_matrix),
        ("E3.2", importance_by_library),
        ("E3.2", importance_by_hand),
        ("E3.3", budget_by_library),
        ("E3.3", budget_from_behind),
        ("E3.3", budget_in_three_branches),
        ("E3.4", adalora.keep_top),
        ("E3.4", mask_by_threshold),
        ("E3.4", mask_in_a_loop),
        ("E3.4", mask_by_ranks),
        ("E3.5", best_rank_by_zeros),
        ("E3.5", best_rank_by_projection),
        ("E3.5", best_rank_by_old_svd),
        ("E3.6", weights_in_a_loop),
        ("E3.6", weights_of_modules),
    ],
)
def test_a_right_function_passes_in_every_style(name, function):
    assert diagnosis(name, function) is None


def transposed(x, P, singular, Q, scale):
    return scale * ((P * singular) @ Q @ x.T), (P.T @ P - torch.eye(len(singular))).norm()


def untracked(x, P, singular, Q, scale):
    with torch.no_grad():
        return find("E3.1").reference(x, P, singular, Q, scale)


def penalty_untracked(x, P, singular, Q, scale):
    found, penalty = find("E3.1").reference(x, P, singular, Q, scale)
    return found, penalty.detach()


def penalty_with_default_norm_of_linalg(x, P, singular, Q, scale):
    found, eye = find("E3.1").reference(x, P, singular, Q, scale)[0], torch.eye(len(singular))
    norm = torch.linalg.norm
    return found, norm(P.T @ P - eye, 2) + norm(Q @ Q.T - eye, 2)


def wrong_side(x, P, singular, Q, scale):
    found = find("E3.1").reference(x, P, singular, Q, scale)[0]
    return found, torch.dist(P @ P.T, torch.eye(len(P))) + torch.dist(
        Q.T @ Q, torch.eye(Q.shape[1])
    )


def old_sensitivity(sensitivity, uncertainty, weight, gradient):
    now = (weight * gradient).abs()
    return (
        torch.lerp(sensitivity, now, 0.15),
        torch.lerp(uncertainty, (now - sensitivity).abs(), 0.15),
    )


def in_place(sensitivity, uncertainty, weight, gradient):
    adalora.update_importance(sensitivity, uncertainty, weight, gradient)
    return sensitivity, uncertainty


def as_printed(step, start, target, steps, initial, final):
    """Equation (14) of the paper."""
    if step < initial:
        return start
    if step >= steps - final:
        return target
    done = (step - initial - final) / (steps - initial - final)
    return int(target + (start - target) * (1 - done) ** 3)


def without_branches(step, start, target, steps, initial, final):
    done = (step - initial) / (steps - initial - final)
    return int(target + (start - target) * (1 - done) ** 3)


def of_type(kind):
    return lambda *arguments: kind(find("E3.3").reference(*arguments))


def per_layer(scores, budget):
    kept = torch.zeros_like(scores).bool()
    for row, values in zip(kept, scores, strict=True):
        row[values.topk(budget // len(scores)).indices] = True
    return kept


def v_with_svd_of_linalg(B, A, rank):
    U, S, V = torch.linalg.svd(B @ A)
    return U[:, :rank] @ torch.diag(S[:rank]) @ V[:, :rank].T


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("E3.1", transposed, "expected two results"),
        ("E3.1", untracked, "neither of your results has a gradient"),
        ("E3.1", penalty_untracked, "your penalty has no gradient"),
        ("E3.1", penalty_with_default_norm_of_linalg, "your norm is the largest singular value"),
        ("E3.1", wrong_side, "multiply the other way round"),
        ("E3.1", lambda x, P, singular, Q, scale: None, "expected two results"),
        ("E3.2", old_sensitivity, "your uncertainty uses the old sensitivity"),
        ("E3.2", in_place, "your function changes its argument `sensitivity`"),
        ("E3.3", as_printed, "the misprint of the paper's equation (14)"),
        ("E3.3", without_branches, "it stays at 864 until step 100"),
        ("E3.3", of_type(float), "as a float"),
        ("E3.3", of_type(str), "expected 661"),
        ("E3.3", of_type(lambda number: None), "after step 300 of 1000 expected 661"),
        ("E3.4", per_layer, "every layer keeps the same number"),
        (
            "E3.4",
            lambda scores, budget: find("E3.4").reference(scores, budget).int(),
            "your mask holds whole numbers",
        ),
        ("E3.4", lambda scores, budget: None, "expected a tensor of True and False"),
        ("E3.5", v_with_svd_of_linalg, "you take columns of the third factor"),
    ],
)
def test_what_a_learner_writes_is_named(name, function, said):
    assert said in diagnosis(name, function).splitlines()[0]


def test_no_budget_of_the_cases_lies_where_rounding_errors_decide():
    """A right formula in another order of its terms cuts off the same."""
    for step, start, target, steps, initial, final in find("E3.3").cases:
        done = Fraction(step - initial, steps - initial - final)
        exact = target + (start - target) * (1 - min(max(done, Fraction(0)), Fraction(1))) ** 3
        assert done <= 0 or done >= 1 or start == target or 1e-3 < exact % 1 < 1 - 1e-3


def test_no_two_scores_of_the_cases_are_equal():
    for scores, budget in find("E3.4").cases:
        assert len(scores.unique()) == scores.numel() >= budget


def test_the_best_matrix_is_unique_in_all_cases():
    for B, A, rank in find("E3.5").cases:
        values = torch.linalg.svdvals(B.double() @ A.double())
        assert rank >= len(values) or values[rank - 1] > 1.1 * values[rank]


def test_the_case_of_the_paper_begins_above_its_start_where_it_is_misprinted():
    assert as_printed(100, 864, 576, 1000, 100, 300) == 1548
