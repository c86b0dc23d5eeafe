"""The exercises of Day 5, in the order of the notebook: the core, which puts vectors before a text,
lets attention see a prefix, passes a bottleneck and scales a layer; then the nearest words of
vectors, and a count of weights.

The letters: N rows, T tokens of text, P virtual ones, C width, H heads of width d. Most cases have
no two sizes equal, so that a transposed result is seen by its shape.
"""

from functools import partial
from math import sqrt

import torch
from torch import Generator
from torch.nn.functional import gelu, pad, relu

from course_lib.checks import Exercise, known

EXERCISES = {}
DRAW = Generator().manual_seed(5)
NEVER = -1e9  # what a mask adds where a token must not be seen


def drawn(*shape):
    return torch.randn(*shape, generator=DRAW)


# --- E5.1 Vectors before the text


def before(tensor, vectors):
    """Vectors (P, C), or numbers (P,), before each row of a tensor (N, T, ...)."""
    return torch.cat([vectors.expand(len(tensor), *vectors.shape), tensor], 1)


def soft_prompt(
    vectors,
    embedded,
    mask,
    labels,
    embed=lambda embedded, vectors: before(embedded, vectors),
    seen=lambda mask, count: pad(mask, (count, 0), value=1),
    label=lambda labels, count: pad(labels, (count, 0), value=-100),
):
    """embed, seen, label: what is made of the embeddings, the mask and the labels."""
    count = len(vectors)
    return embed(embedded, vectors), seen(mask, count), label(labels, count)


def first_row_only(embedded, vectors):
    rows = vectors.expand(len(embedded), *vectors.shape).clone()
    rows[1:] = 0
    return torch.cat([rows, embedded], 1)


def in_place_of_text(embedded, vectors):
    count = len(vectors)
    return torch.cat([before(embedded, vectors)[:, :count], embedded[:, count:]], 1)


def added_to_text(embedded, vectors):
    longer = pad(vectors, (0, 0, 0, max(0, embedded.shape[1] - len(vectors))))
    return embedded + longer[: embedded.shape[1]]


def prompt_case(rows, tokens, virtual, width, masked, padding):
    """Of each row the first `masked` labels are of a prompt, and the last `padding` tokens pad."""
    mask, labels = (
        torch.ones(rows, tokens, dtype=torch.long),
        torch.arange(rows * tokens).view(rows, tokens) % 17,
    )
    labels[:, :masked] = -100
    if padding:
        mask[-1, -padding:], labels[-1, -padding:] = 0, -100
    return drawn(virtual, width), drawn(rows, tokens, width), mask, labels


EXERCISES["E5.1"] = Exercise(
    lambda vectors, embedded, mask, labels: soft_prompt(vectors, embedded, mask, labels),
    [
        (
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            torch.tensor([[[5.0, 6.0], [7.0, 8.0], [9.0, 0.0]]]),
            torch.tensor([[1, 1, 1]]),
            torch.tensor([[-100, 7, 2]]),
        ),
        prompt_case(2, 5, 3, 4, 2, 1),
        prompt_case(3, 4, 6, 2, 1, 2),  # more virtual tokens than text
        prompt_case(4, 7, 1, 3, 3, 0),
    ],
    known(
        "the vectors stand behind the text: a model that reads from left to right never uses them",
        partial(
            soft_prompt,
            embed=lambda embedded, vectors: torch.cat(
                [embedded, before(embedded, vectors)[:, : len(vectors)]], 1
            ),
        ),
        "the mask hides your vectors: 1 means that a position is seen",
        partial(soft_prompt, seen=lambda mask, count: pad(mask, (count, 0), value=0)),
        "your virtual positions have the label 0, which is a token: -100 means that there is none",
        partial(soft_prompt, label=lambda labels, count: pad(labels, (count, 0), value=0)),
        "your virtual positions have the label -1: the loss leaves out -100, and nothing else",
        partial(soft_prompt, label=lambda labels, count: pad(labels, (count, 0), value=-1)),
        "your virtual positions have the label 1: that is a mask, and no label",
        partial(soft_prompt, label=lambda labels, count: pad(labels, (count, 0), value=1)),
        "all labels are -100, so nothing is trained: the labels of the text stay as they are",
        partial(
            soft_prompt,
            label=lambda labels, count: torch.full_like(pad(labels, (count, 0)), -100),
        ),
        "the mask of the text is lost: padding stays 0",
        partial(soft_prompt, seen=lambda mask, count: torch.ones_like(pad(mask, (count, 0)))),
        "the mask has the old length: each virtual token needs a 1 in it",
        partial(soft_prompt, seen=lambda mask, count: mask),
        "the labels have the old length: each virtual token needs a -100 in them",
        partial(soft_prompt, label=lambda labels, count: labels),
        "the new mask stands behind the text: the virtual tokens stand before it",
        partial(soft_prompt, seen=lambda mask, count: pad(mask, (0, count), value=1)),
        "the new labels stand behind the text: the virtual tokens stand before it",
        partial(soft_prompt, label=lambda labels, count: pad(labels, (0, count), value=-100)),
        "only the first row gets the vectors: each row of the batch gets the same ones",
        partial(soft_prompt, embed=first_row_only),
        "your vectors take the place of the first tokens: they stand before them",
        partial(soft_prompt, embed=in_place_of_text),
        "your vectors are added to the first tokens: they are positions of their own",
        partial(soft_prompt, embed=added_to_text),
        "your vectors come in reverse order",
        partial(soft_prompt, embed=lambda embedded, vectors: before(embedded, vectors.flip(0))),
        "all virtual tokens have the first vector: each has its own",
        partial(
            soft_prompt,
            embed=lambda embedded, vectors: before(embedded, vectors[:1].expand_as(vectors)),
        ),
        "all virtual tokens have the mean of the vectors: each has its own",
        partial(
            soft_prompt,
            embed=lambda embedded, vectors: before(
                embedded, vectors.mean(0, keepdim=True).expand_as(vectors)
            ),
        ),
        "your results come in the wrong order: embeddings, mask, labels",
        lambda *arguments: [soft_prompt(*arguments)[place] for place in (0, 2, 1)],
        "you return the embeddings alone: the mask and the labels become longer, too",
        lambda *arguments: soft_prompt(*arguments)[0],
    ),
    otherwise="expected the vectors before the embeddings of each row, a mask with P ones more in "
    "front, and labels with P times -100 more in front",
    trains=True,
)


# --- E5.2 Attention that sees a prefix


def prefix_attention(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    mask,
    divide=sqrt,
    seen=lambda mask, count: pad(mask, (count, 0)),
    weigh=lambda scores, count: scores.softmax(-1),
    order=lambda prefix, text: (prefix, text),
):
    """divide: of the width of a head; seen: the mask over prefix and text; weigh: the scores;
    order: which of the two stands first.
    """
    rows, count = len(q), prefix_k.shape[1]
    keys, values = (
        torch.cat(order(prefix.expand(rows, *prefix.shape), text), 2)
        for prefix, text in ((prefix_k, k), (prefix_v, v))
    )
    scores = q @ keys.transpose(-1, -2) / divide(q.shape[-1]) + seen(mask, count)
    return weigh(scores, count) @ values


def apart(scores, count):
    return torch.cat([scores[..., :count].softmax(-1), scores[..., count:].softmax(-1)], -1)


def hidden_prefix(mask, count):
    return pad(mask, (count, 0), value=NEVER)


def in_order(mask, count):
    """A prefix under a triangle, as if its tokens came later."""
    rows = torch.arange(mask.shape[-2])[:, None]
    late = torch.arange(count)[None] > rows
    first = torch.zeros(late.shape).masked_fill(late, NEVER).expand(*mask.shape[:-1], count)
    return torch.cat([first, mask], -1)


def attention_case(rows, heads, tokens, virtual, width, cached=0, padding=0):
    """A causal mask, over `cached` earlier tokens, too; padding on the left of the first row."""
    total = cached + tokens
    mask = torch.full((tokens, total), NEVER).triu(1 + cached).expand(rows, 1, -1, -1).clone()
    if padding:
        mask[0, :, :, :padding] = NEVER
    texts = [drawn(rows, heads, count, width) for count in (tokens, total, total)]
    return (*texts, drawn(heads, virtual, width), drawn(heads, virtual, width), mask)


EXERCISES["E5.2"] = Exercise(
    lambda q, k, v, prefix_k, prefix_v, mask: prefix_attention(q, k, v, prefix_k, prefix_v, mask),
    [
        (
            torch.tensor([[[[1.0, 0.0]]]]),
            torch.tensor([[[[2.0, 0.0]]]]),
            torch.tensor([[[[1.0, 5.0]]]]),
            torch.tensor([[[2.0, 1.0]]]),
            torch.tensor([[[3.0, 1.0]]]),
            torch.tensor([[[[0.0]]]]),
        ),
        attention_case(2, 3, 4, 2, 5),
        attention_case(1, 2, 3, 5, 4),  # more virtual tokens than text
        attention_case(2, 1, 1, 4, 6, cached=5),  # one new token, the others in the cache
        attention_case(2, 3, 4, 1, 2, padding=2),
    ],
    known(
        "your scores are not divided by the root of d",
        partial(prefix_attention, divide=lambda width: 1.0),
        "your scores are divided by d: divide by its root",
        partial(prefix_attention, divide=lambda width: width),
        "nobody sees the prefix: its columns of the mask must add 0",
        partial(prefix_attention, seen=hidden_prefix),
        "the new columns of the mask stand behind the text, and the prefix before it",
        partial(prefix_attention, seen=lambda mask, count: pad(mask, (0, count))),
        "the prefix stands behind the text, and its columns of the mask before it",
        partial(prefix_attention, order=lambda prefix, text: (text, prefix)),
        "the mask of the text is left out: a token sees those that come later",
        partial(prefix_attention, seen=lambda mask, count: torch.zeros(1)),
        "a token sees only a part of the prefix: all of it was there before the text",
        partial(prefix_attention, seen=in_order),
        "one softmax for the prefix and one for the text: all keys share one softmax",
        partial(prefix_attention, weigh=apart),
        "your softmax goes over the queries: it goes over the keys, the last dimension",
        partial(prefix_attention, weigh=lambda scores, count: scores.softmax(-2)),
        "there is no softmax: scores become shares that sum to 1",
        partial(prefix_attention, weigh=lambda scores, count: scores),
        "the values of the prefix are left out: what is seen of it must be added, too",
        lambda q, k, v, prefix_k, prefix_v, mask: prefix_attention(
            q, k, v, prefix_k, torch.zeros_like(prefix_v), mask
        ),
        "the keys of the prefix are left out: each virtual token has a key",
        lambda q, k, v, prefix_k, prefix_v, mask: prefix_attention(
            q, k, v, torch.zeros_like(prefix_k), prefix_v, mask
        ),
        "keys and values of the prefix have changed places",
        lambda q, k, v, prefix_k, prefix_v, mask: prefix_attention(
            q, k, v, prefix_v, prefix_k, mask
        ),
        "the keys of the prefix are its values, too",
        lambda q, k, v, prefix_k, prefix_v, mask: prefix_attention(
            q, k, v, prefix_k, prefix_k, mask
        ),
        "keys and values of the text have changed places",
        lambda q, k, v, prefix_k, prefix_v, mask: prefix_attention(
            q, v, k, prefix_k, prefix_v, mask
        ),
        "the text does not see itself: the keys are those of the prefix and those of the text",
        lambda q, k, v, prefix_k, prefix_v, mask: prefix_attention(
            q, k[:, :, :0], v[:, :, :0], prefix_k, prefix_v, mask[..., :0]
        ),
        "the prefix is not seen at all: put its keys and values before those of the text",
        lambda q, k, v, prefix_k, prefix_v, mask: prefix_attention(
            q, k, v, prefix_k[:, :0], prefix_v[:, :0], mask
        ),
        "the prefix is added to what attention gives: it takes part in the softmax",
        lambda q, k, v, prefix_k, prefix_v, mask: (
            prefix_attention(q, k, v, prefix_k[:, :0], prefix_v[:, :0], mask)
            + prefix_v.mean(1)[:, None]
        ),
    ),
    otherwise="expected softmax(q [prefix_k; k]^T / sqrt(d) + mask) [prefix_v; v], "
    "and a mask that adds 0 for the prefix",
    trains=True,
)


# --- E5.3 A bottleneck


def bottleneck(
    h,
    down,
    down_bias,
    up,
    up_bias,
    inner=relu,
    outer=lambda added: added,
    keep=lambda h: h,
):
    """inner: the bend between the matrices; outer: one after them; keep: what passes by."""
    return keep(h) + outer(inner(h @ down.T + down_bias) @ up.T + up_bias)


def bottleneck_case(shape, width):
    *_, wide = shape
    return drawn(*shape), drawn(width, wide), drawn(width), drawn(wide, width), drawn(wide)


EXERCISES["E5.3"] = Exercise(
    lambda h, down, down_bias, up, up_bias: bottleneck(h, down, down_bias, up, up_bias),
    [
        (
            torch.tensor([[1.0, 2.0]]),
            torch.tensor([[1.0, 1.0]]),
            torch.tensor([-1.0]),
            torch.tensor([[2.0], [-1.0]]),
            torch.tensor([0.5, 0.0]),
        ),
        bottleneck_case((2, 5, 4), 3),
        bottleneck_case((7, 6), 2),
        bottleneck_case((3, 2, 2), 5),  # wider inside than outside
    ],
    known(
        "h does not pass by: an adapter adds to what comes in",
        partial(bottleneck, keep=lambda h: 0 * h),
        "h passes by twice",
        partial(bottleneck, keep=lambda h: 2 * h),
        "there is no bend between the matrices, so they are one matrix of low rank, as LoRA's",
        partial(bottleneck, inner=lambda x: x),
        "the bend stands behind both matrices: it belongs between them",
        partial(bottleneck, inner=lambda x: x, outer=relu),
        "there are two bends, so that nothing negative is added: one in the middle is enough",
        partial(bottleneck, outer=relu),
        "the sum is bent: only the inside is, so that h passes unchanged",
        lambda *arguments: relu(bottleneck(*arguments)),
        "h is bent before it passes by",
        partial(bottleneck, keep=relu),
        "h is bent before it goes down: the bend stands between the matrices",
        lambda h, down, down_bias, up, up_bias: (
            h + bottleneck(relu(h), down, down_bias, up, up_bias, inner=lambda x: x) - relu(h)
        ),
        "your bend is GELU: take ReLU, as the cells below do",
        partial(bottleneck, inner=gelu),
        "your bend is a sigmoid, which is one half at zero: take ReLU",
        partial(bottleneck, inner=torch.sigmoid),
        "your bend is tanh: take ReLU",
        partial(bottleneck, inner=torch.tanh),
        "the first bias is left out",
        lambda h, down, down_bias, up, up_bias: bottleneck(h, down, 0, up, up_bias),
        "the first bias is added behind the bend: add it before",
        lambda h, down, down_bias, up, up_bias: bottleneck(
            h, down, 0, up, up_bias, inner=lambda x: relu(x) + down_bias
        ),
        "the second bias is left out",
        lambda h, down, down_bias, up, up_bias: bottleneck(h, down, down_bias, up, 0),
        "you return what stands inside the bottleneck: it goes up again, and h is added",
        lambda h, down, down_bias, up, up_bias: relu(h @ down.T + down_bias),
        "h is subtracted: it is added",
        partial(bottleneck, keep=lambda h: -h),
        "what was added is subtracted from h",
        partial(bottleneck, outer=lambda added: -added),
    ),
    otherwise="expected h + W_up relu(W_down h + b_down) + b_up, for each token",
    trains=True,
)


# --- E5.4 Scales that vanish in the weight


def scaled(weight, scale, on_input, by=lambda scale: scale):
    """by: what a scale becomes."""
    return weight * (by(scale) if on_input else by(scale)[:, None])


def scale_case(d_out, d_in, on_input):
    return drawn(d_out, d_in), drawn(d_in if on_input else d_out), on_input


def by_place(weight, scale, on_input):
    """The scale goes along the other dimension, as far as it fits."""
    d_out, d_in = weight.shape
    count = d_out if on_input else d_in
    longer = torch.cat([scale, torch.ones(count)])[:count]
    return scaled(weight, longer, not on_input)


EXERCISES["E5.4"] = Exercise(
    lambda weight, scale, on_input: scaled(weight, scale, on_input),
    [
        (torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([2.0, 0.5]), False),
        (torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([2.0, 0.0, -1.0]), True),
        scale_case(4, 3, False),
        scale_case(4, 3, True),
        scale_case(2, 6, False),
        scale_case(2, 6, True),
        scale_case(3, 3, False),  # the shapes do not say which is meant
        scale_case(3, 3, True),
    ],
    known(
        "rows and columns have changed places: row i of the weight makes output i, "
        "column j takes input j",
        by_place,
        "the scale is added: every output, or input, is multiplied with its number",
        lambda weight, scale, on_input: weight + (scale if on_input else scale[:, None]),
        "you divide by the scale: multiply",
        partial(scaled, by=lambda scale: 1 / scale),
        "the scale is squared: multiply once",
        partial(scaled, by=lambda scale: scale**2),
        "the sign of the scale is lost",
        partial(scaled, by=abs),
        "you multiply with 1 + scale: at the start the scale is one, and the layer is unchanged",
        partial(scaled, by=lambda scale: 1 + scale),
        "you multiply with scale - 1: that is what a merge adds, and the weight itself is missing",
        partial(scaled, by=lambda scale: scale - 1),
        "the scale is not used",
        lambda weight, scale, on_input: weight * 1.0,
        "one number for the whole weight, the mean of the scale: each output has its own",
        partial(scaled, by=lambda scale: scale.mean().expand_as(scale)),
        "the result is transposed: expected (d_out, d_in)",
        lambda *arguments: scaled(*arguments).T,
        "you return the product with the scale: expected a matrix as large as the weight",
        lambda weight, scale, on_input: weight @ scale if on_input else scale @ weight,
        "the scale is brought to the sum 1: take it as it is",
        partial(scaled, by=lambda scale: scale / scale.sum()),
        "the scale stands in reverse order",
        partial(scaled, by=lambda scale: scale.flip(0)),
    ),
    otherwise="expected the weight with row i multiplied by scale[i], "
    "or column j by scale[j] where the input is scaled",
    trains=True,
)


# --- E5.5 The nearest words


def nearest(
    vectors,
    embeddings,
    unit=lambda rows: rows / rows.norm(dim=1, keepdim=True),
    best=lambda likeness: likeness.argmax(1),
):
    """unit: what is done to rows before their products; best: of the likeness (P, V)."""
    return best(unit(vectors) @ unit(embeddings).T)


def likeness_of(vectors, embeddings):
    return nearest(vectors, embeddings, best=lambda likeness: likeness)


EXERCISES["E5.5"] = Exercise(
    lambda vectors, embeddings: nearest(vectors, embeddings),
    [
        (
            torch.tensor([[1.0, 0.5], [-3.0, 1.0]]),
            torch.tensor([[9.0, 9.0], [2.0, 1.0], [-0.5, 0.2]]),
        ),
        (drawn(4, 3), drawn(9, 3) * torch.arange(1, 10)[:, None]),
        (drawn(3, 5) * 8, drawn(7, 5) * torch.tensor([9, 1, 1, 5, 1, 1, 30])[:, None]),
        (drawn(5, 4), drawn(6, 4)),
    ],
    known(
        "long embeddings win, since your likeness is the product: bring the embeddings to length 1",
        partial(nearest, unit=lambda rows: rows),
        "your likeness is the distance: a vector that is longer than every word is near to none; "
        "compare directions",
        lambda vectors, embeddings: torch.cdist(vectors, embeddings).argmin(1),
        "you take the least like: take the highest cosine",
        partial(nearest, best=lambda likeness: likeness.argmin(1)),
        "you take the largest absolute cosine: a vector that points the other way is not near",
        partial(nearest, best=lambda likeness: likeness.abs().argmax(1)),
        "for each word its nearest vector: asked is for each vector its nearest word",
        partial(nearest, best=lambda likeness: likeness.argmax(0)),
        "you return the cosines: return the ids of the words",
        partial(nearest, best=lambda likeness: likeness.amax(1)),
        "you return all cosines: return the id of the highest one for each vector",
        likeness_of,
        "your lengths are those of the columns: a word is a row",
        partial(nearest, unit=lambda rows: rows / rows.norm(dim=0, keepdim=True)),
        "your ids count from 1: the first word has the id 0",
        partial(nearest, best=lambda likeness: likeness.argmax(1) + 1),
        "rows are divided by their sum: divide by their length",
        partial(nearest, unit=lambda rows: rows / rows.sum(1, keepdim=True)),
    ),
    otherwise="expected for each vector the id of the embedding with the highest cosine",
)


# --- E5.6 What is trained, and what is kept


def weights_of(layers, kv, tokens, hidden, network=None, kept=None):
    """network, kept: numbers of weights of the MLP with its table, and of what is kept."""
    wide = 2 * layers * kv
    trained = tokens * kv + (kv + 1) * hidden + (hidden + 1) * wide
    return trained if network is None else network, tokens * wide if kept is None else kept


EXERCISES["E5.6"] = Exercise(
    lambda layers, kv, tokens, hidden: weights_of(layers, kv, tokens, hidden),
    [
        (2, 3, 5, 4),
        (12, 768, 20, 768),
        (30, 192, 20, 128),
        (24, 1024, 10, 512),
        (1, 7, 1, 2),
    ],
    known(
        "the biases of the MLP are left out",
        lambda layers, kv, tokens, hidden: (
            tokens * kv + kv * hidden + hidden * 2 * layers * kv,
            tokens * 2 * layers * kv,
        ),
        "keys alone are kept: a virtual token has a key and a value in each layer",
        lambda layers, kv, tokens, hidden: (
            weights_of(layers, kv, tokens, hidden)[0],
            tokens * layers * kv,
        ),
        "the MLP makes keys alone: it makes a key and a value for each layer",
        lambda layers, kv, tokens, hidden: (
            tokens * kv + (kv + 1) * hidden + (hidden + 1) * layers * kv,
            tokens * 2 * layers * kv,
        ),
        "one layer is kept: there is a prefix in every layer",
        lambda layers, kv, tokens, hidden: (
            weights_of(layers, kv, tokens, hidden)[0],
            tokens * 2 * kv,
        ),
        "the table is left out: the MLP needs something to read, one row for each virtual token",
        lambda layers, kv, tokens, hidden: (
            (kv + 1) * hidden + (hidden + 1) * 2 * layers * kv,
            tokens * 2 * layers * kv,
        ),
        "what is kept is all that was trained: the MLP is thrown away afterwards",
        lambda layers, kv, tokens, hidden: (weights_of(layers, kv, tokens, hidden)[0],) * 2,
        "what is trained is only what is kept: the MLP trains, too",
        lambda layers, kv, tokens, hidden: (tokens * 2 * layers * kv,) * 2,
        "an MLP for each virtual token: all share one",
        lambda layers, kv, tokens, hidden: (
            tokens * kv + tokens * ((kv + 1) * hidden + (hidden + 1) * 2 * layers * kv),
            tokens * 2 * layers * kv,
        ),
        "both are trained, and counted as trained: the prefix is made, and no weight of its own",
        lambda layers, kv, tokens, hidden: (
            weights_of(layers, kv, tokens, hidden)[0] + tokens * 2 * layers * kv,
            tokens * 2 * layers * kv,
        ),
        "your results come in the wrong order: trained, then kept",
        lambda *arguments: weights_of(*arguments)[::-1],
        "the hidden layer is as wide as the model: it has `hidden` units",
        lambda layers, kv, tokens, hidden: weights_of(layers, kv, tokens, kv),
    ),
    otherwise="expected the weights of the table and of the two linear layers, "
    "and those of the keys and values that are kept",
)
