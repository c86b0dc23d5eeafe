"""Tests of the exercises of Day 5: right functions pass in whatever style they are written, and
wrong ones as a learner writes them get the sentence that helps.

That each listed mistake has its own sentence is in tests/test_checks.py.
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from course_lib import adapters, prefix
from course_lib.checks import diagnosis, find


def soft_prompt_by_stacking(vectors, embedded, mask, labels):
    rows = [torch.vstack([vectors, text]) for text in embedded]
    ones, ignored = torch.ones(len(mask), len(vectors)), torch.full((len(mask), len(vectors)), -100)
    return [torch.stack(rows), torch.hstack([ones.long(), mask]), torch.hstack([ignored, labels])]


def soft_prompt_by_padding(vectors, embedded, mask, labels):
    longer = pad(embedded, (0, 0, len(vectors), 0))
    longer[:, : len(vectors)] = vectors
    count = (len(vectors), 0)
    return longer, pad(mask, count, value=1), pad(labels, count, value=-100)


def attention_by_torch(q, k, v, prefix_k, prefix_v, mask):
    keys, values = (
        torch.cat([states[None].repeat(len(q), 1, 1, 1), text], 2)
        for states, text in ((prefix_k, k), (prefix_v, v))
    )
    return scaled_dot_product_attention(q, keys, values, pad(mask, (prefix_k.shape[1], 0)))


def attention_with_the_prefix_behind(q, k, v, prefix_k, prefix_v, mask):
    rows, count = len(q), prefix_k.shape[1]
    keys = torch.cat([k, prefix_k.expand(rows, -1, -1, -1)], 2)
    values = torch.cat([v, prefix_v.expand(rows, -1, -1, -1)], 2)
    shares = (q @ keys.mT / q.shape[-1] ** 0.5 + pad(mask, (0, count))).softmax(-1)
    return shares @ values


def attention_by_two_sums(q, k, v, prefix_k, prefix_v, mask):
    root = q.shape[-1] ** 0.5
    seen, text = (q @ prefix_k.mT / root).exp(), (q @ k.mT / root + mask).exp()
    total = seen.sum(-1, keepdim=True) + text.sum(-1, keepdim=True)
    return (seen @ prefix_v + text @ v) / total


def bottleneck_by_library(h, down, down_bias, up, up_bias):
    layer = adapters.Bottleneck(h.shape[-1], len(down))
    weights = {"down.weight": down, "down.bias": down_bias, "up.weight": up, "up.bias": up_bias}
    return h + torch.func.functional_call(layer, weights, (h,))


def bottleneck_by_linear(h, down, down_bias, up, up_bias):
    linear = nn.functional.linear
    return linear(linear(h, down, down_bias).clamp(min=0), up, up_bias) + h


def scaled_by_diagonal(weight, scale, on_input):
    return weight @ torch.diag(scale) if on_input else torch.diag(scale) @ weight


def scaled_by_einsum(weight, scale, on_input):
    return torch.einsum("oi,i->oi" if on_input else "oi,o->oi", weight, scale)


def nearest_by_library(vectors, embeddings):
    likeness = nn.functional.cosine_similarity(vectors[:, None], embeddings[None], dim=-1)
    return likeness.max(dim=1).indices.tolist()


def weights_by_modules(layers, kv, tokens, hidden):
    network = nn.Sequential(
        nn.Linear(kv, hidden, device="meta"), nn.Linear(hidden, 2 * layers * kv, device="meta")
    )
    made = sum(weight.numel() for weight in network.parameters())
    return made + tokens * kv, 2 * tokens * layers * kv


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("E5.1", soft_prompt_by_stacking),
        ("E5.1", soft_prompt_by_padding),
        ("E5.2", attention_by_torch),
        ("E5.2", attention_with_the_prefix_behind),
        ("E5.2", attention_by_two_sums),
        ("E5.3", bottleneck_by_library),
        ("E5.3", bottleneck_by_linear),
        ("E5.4", scaled_by_diagonal),
        ("E5.4", scaled_by_einsum),
        ("E5.5", nearest_by_library),
        ("E5.6", weights_by_modules),
    ],
)
def test_a_right_function_passes_in_every_style(name, function):
    assert diagnosis(name, function) is None


def test_the_scales_of_the_exercise_are_those_of_the_package():
    for weight, scale, on_input in find("E5.4").cases:
        base = nn.Linear(*weight.T.shape, bias=False)
        layer = adapters.IA3Linear(base, on_input)
        with torch.no_grad():
            base.weight.copy_(weight)
            layer.scale.copy_(scale)
        merged = find("E5.4").reference(weight, scale, on_input)
        assert torch.allclose(base.weight + layer.delta(), merged, atol=1e-6)


def test_no_nearest_word_is_a_near_tie():
    for vectors, embeddings in find("E5.5").cases:
        likeness = nn.functional.cosine_similarity(vectors[:, None], embeddings[None], dim=-1)
        first, second = likeness.topk(2, dim=1).values.T
        assert (first - second > 1e-3).all()


def prompt_without_labels(vectors, embedded, mask, labels):
    count = len(vectors)
    embedded = torch.cat([vectors.expand(len(embedded), -1, -1), embedded], 1)
    return embedded, pad(mask, (count, 0), value=1), pad(labels, (count, 0))


def attention_with_a_mask_in_front(q, k, v, prefix_k, prefix_v, mask):
    rows, count = len(q), prefix_k.shape[1]
    keys = torch.cat([k, prefix_k.expand(rows, -1, -1, -1)], 2)
    values = torch.cat([v, prefix_v.expand(rows, -1, -1, -1)], 2)
    shares = (q @ keys.mT / q.shape[-1] ** 0.5 + pad(mask, (count, 0))).softmax(-1)
    return shares @ values


def attention_that_is_not_scaled(q, k, v, prefix_k, prefix_v, mask):
    rows = len(q)
    keys = torch.cat([prefix_k.expand(rows, -1, -1, -1), k], 2)
    values = torch.cat([prefix_v.expand(rows, -1, -1, -1), v], 2)
    scores = q @ keys.mT + pad(mask, (prefix_k.shape[1], 0))
    return scores.softmax(-1) @ values


def only_what_is_added(h, down, down_bias, up, up_bias):
    return (h @ down.T + down_bias).relu() @ up.T + up_bias


def rows_for_columns(weight, scale, on_input):
    return weight * scale[:, None] if on_input else weight * scale


def by_product(vectors, embeddings):
    return (vectors @ embeddings.T).argmax(1)


def without_biases(layers, kv, tokens, hidden):
    wide = 2 * layers * kv
    return tokens * kv + kv * hidden + hidden * wide, tokens * wide


@pytest.mark.parametrize(
    ("name", "function", "sentence"),
    [
        ("E5.1", prompt_without_labels, "your virtual positions have the label 0"),
        ("E5.2", attention_with_a_mask_in_front, "the prefix stands behind the text"),
        ("E5.2", attention_that_is_not_scaled, "your scores are not divided by the root of d"),
        ("E5.3", only_what_is_added, "h does not pass by"),
        ("E5.4", rows_for_columns, "your function raises RuntimeError"),
        ("E5.5", by_product, "long embeddings win"),
        ("E5.6", without_biases, "the biases of the MLP are left out"),
    ],
)
def test_a_mistake_as_a_learner_writes_it_is_named(name, function, sentence):
    assert sentence in diagnosis(name, function)


def test_the_exercise_counts_what_the_package_builds(tiny):
    layers, heads, width = prefix.size_of(tiny.model)
    prefix.add_prefix(tiny.model, 3, hidden=5)
    tokens = prefix.virtual_tokens(tiny.model)
    trained = sum(weight.numel() for weight in tokens.parameters())
    prefix.fold(tiny.model)
    counted = find("E5.6").reference(layers, heads * width, 3, 5)
    assert counted == (trained, tokens.table.numel())


def in_float(vectors, embedded, mask, labels):
    embedded, mask, labels = find("E5.1").reference(vectors, embedded, mask, labels)
    return embedded, mask, labels.float()


def without_gradient(vectors, embedded, mask, labels):
    return find("E5.1").reference(vectors.detach(), embedded, mask, labels)


@pytest.mark.parametrize(
    ("name", "function", "says"),
    [
        ("E5.1", in_float, "returns torch.float32, expected a tensor of torch.int64"),
        ("E5.1", without_gradient, "no gradient comes back to `vectors`"),
        (
            "E5.4",
            lambda *arguments: nn.Parameter(find("E5.4").reference(*arguments)),
            "no gradient comes back to `weight`",
        ),
    ],
)
def test_right_numbers_that_cannot_be_trained_through_are_refused(name, function, says):
    assert says in diagnosis(name, function)


def test_a_scale_is_not_placed_by_its_length():
    def by_length(weight, scale, on_input):
        return weight * (scale if len(scale) == weight.shape[1] else scale[:, None])

    assert "rows and columns" in diagnosis("E5.4", by_length)
