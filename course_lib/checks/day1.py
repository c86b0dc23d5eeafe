"""The exercises of Day 1, in the order of the notebook: the core, which is labels, batch, loss and
step; then counts, data, packing, perplexity and memory.
"""

import math
from collections import Counter
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from course_lib import memory
from course_lib.batching import IGNORED, Example, collate
from course_lib.checks import Exercise, known

EXERCISES = {}


# --- E1.1 Labels of an example


def labels(prompt, answer, eos, masked=IGNORED, token=lambda token: token, last=None):
    """masked: the label of the prompt; token: of an answer token; last: of EOS, itself if None."""
    ids = [*prompt, *answer, eos]
    return ids, [masked] * len(prompt) + [*map(token, answer), eos if last is None else last]


def listed(function, prompt_ids, answer_ids, eos_id):
    """The ids and the labels, which must be lists, since a batch pads them with lists."""
    found = function(prompt_ids, answer_ids, eos_id)
    if not isinstance(found, tuple | list):
        return found
    return [part if isinstance(part, list | int) else f"a {type(part).__name__}" for part in found]


EXERCISES["E1.1"] = Exercise(
    lambda prompt_ids, answer_ids, eos_id: labels(prompt_ids, answer_ids, eos_id),
    [
        ([11, 12, 13, 14], [21, 22], 0),
        ([5, 6, 7], [6, 5], 1),  # the answer repeats words of the prompt
        ([5, 1, 7], [8, 1, 9], 1),  # the EOS id occurs in the middle
        ([5, 6], [], 1),
        ([], [5, 6], 1),
    ],
    known(
        "your labels keep the prompt: the first {masked} are -100",
        lambda *a: [labels(*a)[0]] * 2,
        "your ids end with the answer: append eos_id, or the model never learns to stop",
        lambda *a: [part[:-1] for part in labels(*a)],
        "the last label is -100, expected eos_id, {eos_id}",
        partial(labels, last=IGNORED),
        "your labels are shifted by one: each stands at the place of its own token",
        lambda *a: (labels(*a)[0], [*labels(*a)[1][1:], IGNORED]),
        "your labels are those of the answer alone: they are as long as the ids",
        lambda prompt, *a: (labels(prompt, *a)[0], labels([], *a)[1]),
        "your prompt's labels are 0: cross_entropy ignores only -100",
        partial(labels, masked=0),
        "answer tokens are masked: mask the first {masked} by position, not by token id",
        lambda p, *a: labels(p, *a, token=lambda token: IGNORED if token in p else token),
        "the prompt is not masked as a whole: the first {masked} labels are -100",
        lambda p, a, eos: labels(p[:-1], [*p[-1:], *a], eos),
        "expected two lists, ids and labels: you return the ids alone",
        lambda *a: labels(*a)[0],
        "you return tensors, expected lists: the batch pads them before it makes tensors",
        lambda *a: [torch.tensor(part) for part in labels(*a)],
    ),
    lambda prompt_ids, *rest: {"masked": len(prompt_ids)},
    "the first {masked} labels are -100, the others are the ids at their places",
    ask=listed,
)


# --- E1.2 A batch


def padded(rows, pad_id):
    """(ids, labels) of each row -> ids, mask, labels, each (N, T)."""
    batch = collate([Example(*row) for row in rows], pad_id)
    return batch["input_ids"], batch["attention_mask"], batch["labels"]


def filled(
    rows,
    pad_id,
    longest=max,
    right=True,
    mask=lambda ids, length: [1] * len(ids),
    label=IGNORED,
    labels=lambda ids, labels: labels,
):
    """longest: of the lengths; right: pad there; label: of the padding; labels: of a row."""
    length = longest([len(ids) for ids, _ in rows])

    def fill(values, filler):
        gap = [filler] * (length - len(values))
        return ([*values, *gap] if right else [*gap, *values])[:length]

    return (
        [fill(ids, pad_id) for ids, _ in rows],
        [fill(mask(ids, length), 0) for ids, _ in rows],
        [fill(labels(*row), label) for row in rows],
    )


def whole(function, rows, pad_id):
    """What a batch holds, which must be whole numbers: the model uses them as indices."""
    found = function(rows, pad_id)
    if not isinstance(found, tuple | list):
        return found
    kinds = [getattr(part, "dtype", torch.int64) for part in found]
    return [
        part if kind in (torch.int64, torch.bool) else f"a tensor of {kind}"
        for part, kind in zip(found, kinds, strict=True)
    ]


EXERCISES["E1.2"] = Exercise(
    lambda rows, pad_id: padded(rows, pad_id),
    [
        ([([11, 12, 13, 9], [-100, -100, 13, 9]), ([21, 9], [-100, 9])], 0),
        # a tokenizer without a padding token pads with EOS
        ([([5, 6, 2], [-100, 6, 2]), ([7, 2], [-100, 2])], 2),
        ([([4], [4]), ([4, 5, 6, 7, 2], [-100, -100, 6, 7, 2]), ([5, 2], [-100, 2])], 2),
        ([([5, 6], [-100, 6]), ([7], [7])], 9),
        ([([3, 4, 8], [-100, 4, 8])], 8),
    ],
    known(
        "your mask is made by token id, which hides a real EOS: mask by position",
        partial(filled, mask=lambda ids, length: [int(token != ids[-1]) for token in ids]),
        "your labels are masked by token id, so that no EOS is trained: mask by position",
        lambda rows, pad_id: filled(
            rows,
            pad_id,
            labels=lambda ids, labels: [IGNORED if label == pad_id else label for label in labels],
        ),
        "your labels are padded with pad_id: pad them with -100, or padding is trained",
        lambda rows, pad_id: filled(rows, pad_id, label=pad_id),
        "your labels are padded with 0: pad them with -100, which the loss ignores",
        partial(filled, label=0),
        "your labels are the ids: use the labels that each row brings",
        partial(filled, labels=lambda ids, labels: ids),
        "you pad on the left, expected on the right",
        partial(filled, right=False),
        "your rows are cut to the shortest: no token may be lost",
        partial(filled, longest=min),
        "your rows are as long as the last one, expected {longest}",
        partial(filled, longest=lambda lengths: lengths[-1]),
        "your rows are as long as the first one, expected {longest}",
        partial(filled, longest=lambda lengths: lengths[0]),
        "your mask is inverted: 1 for a real token",
        lambda *a: [filled(*a)[0], [[1 - b for b in row] for row in filled(*a)[1]], filled(*a)[2]],
        "your mask reads the padding: it has {real} ones, the first len(ids) of each row",
        partial(filled, mask=lambda ids, length: [1] * length),
        "your ids are padded with -100: the model needs a token, pad_id, {pad_id}",
        lambda rows, pad_id: filled(rows, IGNORED),
        "your ids are padded with 0, expected pad_id, {pad_id}",
        lambda rows, pad_id: filled(rows, 0),
        "expected ids, mask and labels: you return two of the three",
        lambda *a: filled(*a)[:2],
        "your tensors are floats, expected whole numbers, int64: the model uses them as indices",
        lambda *a: [part.float() for part in padded(*a)],
    ),
    lambda rows, pad_id: {
        "longest": max(len(ids) for ids, _ in rows),
        "real": sum(len(ids) for ids, _ in rows),
    },
    "ids are padded with pad_id up to {longest}, labels with -100, all of them int64; the mask has "
    "{real} ones",
    whole,
)


# --- E1.3 Loss of the answer


def loss(logits, labels, reduction="mean"):
    flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(*flat, ignore_index=IGNORED, reduction=reduction)


def score(logits, labels, of=lambda logits: logits.log_softmax(-1), mask=None):
    """-1 times what `of` gives the right next tokens. mask: which count, (N, T - 1); the supervised
    ones if None.
    """
    targets = labels[:, 1:]
    right = of(logits)[:, :-1].gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return -right[targets != IGNORED if mask is None else mask]


def row_means(logits, labels):
    each = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (each.sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)).mean()


def batch(seed, rows, tokens, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, tokens, 5 + seed, generator=generator)
    labels = torch.randint(5 + seed, (rows, tokens), generator=generator)
    for row in range(rows):
        labels[row, : (seed + row) % (tokens - 1)] = IGNORED  # the prompt; at least two stay
    return logits, labels


def padded_batch():
    logits, labels = batch(5, 3, 6)
    labels[0, 3:] = labels[1, :] = IGNORED  # padding, and a row without supervised token
    return logits, labels


def supervised_loss(logits, labels):
    """The positions that count are selected first, which saves the softmax of the others."""
    targets = labels[:, 1:]
    counts = targets != IGNORED
    return cross_entropy(logits[:, :-1][counts], targets[counts])


def asked_for_loss(function, logits, labels):
    """The loss of logits (N, T, V) and labels (N, T), and whether training can go back through it.

    -100 marks what does not count.
    """
    found = function(logits.requires_grad_(), labels)
    return [found, getattr(found, "requires_grad", False)]


EXERCISES["E1.3"] = Exercise(
    supervised_loss,
    [
        batch(2, 1, 5, 1.0),
        *(batch(seed, seed, seed + 4) for seed in (2, 3, 4)),
        padded_batch(),
        batch(1, 2, 5, 500.0),  # e^500 overflows in float32
    ],
    known(
        "your loss is cut off from its gradient: return the tensor, not .item() or float()",
        lambda x, y: loss(x, y).item(),
        "your loss has the wrong sign: it is the mean of -log p",
        lambda x, y: -loss(x, y),
        "position t predicts token t + 1: you compare it with token t",
        lambda x, y: cross_entropy(x.flatten(0, 1), y.flatten()),
        "your shift goes the wrong way: logits without the last position, labels without the first",
        lambda x, y: cross_entropy(x[:, 1:].flatten(0, 1), y[:, :-1].flatten()),
        "you shift twice: position t predicts token t + 1",
        lambda x, y: loss(x[:, :-1], y[:, 1:]),
        "your loss is a sum: divide by the {trained} supervised positions",
        partial(loss, reduction="sum"),
        "you divide by all positions: divide by the {trained} supervised ones",
        lambda x, y: loss(x, y, "none").mean(),
        "you divide by all labels: divide by the {trained} supervised ones",
        lambda x, y: loss(x, y, "sum") / y.numel(),
        "your loss is a mean of row means: every supervised token counts alike",
        row_means,
        "your loss is in bits: use the natural logarithm",
        lambda x, y: loss(x, y) / math.log(2),
        "your loss is a mean of probabilities: take -log of each first",
        lambda x, y: score(x, y, lambda x: x.softmax(-1)).mean(),
        "your loss is a mean of logits: log_softmax comes first",
        lambda x, y: score(x, y, lambda x: x).mean(),
        "labels of -100 are counted as token 0: leave them out",
        lambda x, y: loss(x, y.clamp(min=0)),
        "your mask comes from the labels before the shift",
        lambda x, y: score(x, y, mask=y[:, :-1] != IGNORED).mean(),
        "your softmax runs over the positions: over the vocabulary, the last dimension",
        lambda x, y: score(x, y, lambda x: x.log_softmax(1)).mean(),
        "your softmax runs over the rows: over the vocabulary, the last dimension",
        lambda x, y: score(x, y, lambda x: x.log_softmax(0)).mean(),
        "a softmax that becomes 0 has the logarithm minus infinity: use log_softmax",
        lambda x, y: score(x, y, lambda x: x.softmax(-1).log()).mean(),
        "e^x overflows for large logits, and log 0 is infinite: use log_softmax",
        lambda x, y: score(x, y, lambda x: (x.exp() / x.exp().sum(-1, True)).log()).mean(),
    ),
    lambda logits, labels: {"trained": (labels[:, 1:] != IGNORED).sum().item()},
    "your loss is {found[0]:.4f}, expected {expected[0]:.4f}: do exactly the labels count that are "
    "not -100?",
    asked_for_loss,
)


# --- E1.4 One step


def stepped(function, rates, curvature):
    """One step at each rate, from the weights 1, -2, 3, with AdamW on a loss of this curvature.

    Returns the weights after each step and the losses that were returned. A gradient may be left
    after the last step: whether it is zeroed first or last makes no difference to the weights.
    """
    weights = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = torch.optim.AdamW([weights], lr=0.7, weight_decay=0.0)
    results = []
    for number, rate in enumerate(rates, start=1):
        # another curvature each step, so that a gradient that was kept shows
        loss = curvature / 2 * number * (weights**2 * torch.tensor([1.0, 2.0, 3.0])).sum()
        returned = function(loss, optimizer, rate)
        returned = "a tensor" if isinstance(returned, torch.Tensor) else returned
        results.append([*weights.detach().tolist(), returned])
    return results


def step(loss, optimizer, rate, zero=True, clip=clip_grad_norm_):
    (group,) = optimizer.param_groups
    group["lr"] = group["lr"] if rate is None else rate
    loss.backward()
    clip(group["params"], 1.0)
    optimizer.step()
    if zero:
        optimizer.zero_grad()
    return loss.item()


def late_rate(loss, optimizer, rate):
    found = step(loss, optimizer, None)
    optimizer.param_groups[0]["lr"] = rate
    return found


def early_zero(loss, optimizer, rate):
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


EXERCISES["E1.4"] = Exercise(
    lambda loss, optimizer, rate: step(loss, optimizer, rate),
    [
        ([0.1, 0.1, 0.1], 4.0),  # the gradient is longer than 1: it is clipped
        ([0.0, 0.05, 0.1, 0.05], 0.01),  # it is not; the rate changes
        ([0.2, 0.1, 0.0], 50.0),
        ([0.1, 0.1, 0.1, 0.1], 0.05),
    ],
    known(
        "your gradients add up from step to step: set them to zero with optimizer.zero_grad()",
        partial(step, zero=False),
        "your weights do not move: when the step is taken there is no gradient, not yet or no more",
        early_zero,
        "the step is taken with a gradient that is not clipped: after backward, before the step, "
        "one longer than 1 is shortened to 1",
        partial(step, clip=lambda *a: None),
        "you clip each number: clip the length of the gradient, with clip_grad_norm_",
        partial(step, clip=torch.nn.utils.clip_grad_value_),
        "your rate is never used: set it in optimizer.param_groups before the step",
        lambda loss, optimizer, rate: step(loss, optimizer, None),
        "your rate is set after the step: it is that of this step",
        late_rate,
        "you return the loss tensor, and its graph with it: return loss.item(), a number",
        lambda *a: torch.tensor(step(*a), requires_grad=True),
    ),
    otherwise="each step: backward, clip to length 1, set the rate, step, zero the gradients; "
    "return the loss",
    ask=stepped,
)


# --- E1.5 Next word from counts


def followers(words, history):
    n = len(history)
    return Counter(words[i + n] for i in range(len(words) - n) if words[i : i + n] == history)


def apart(words, history):
    i, n, counts = 0, len(history), Counter()
    while i < len(words) - n:
        hit = words[i : i + n] == history
        counts.update(words[i + n : i + n + 1] * hit)
        i += n + 1 if hit else 1
    return counts


def next_word(words, history, count=followers, total=None):
    counts = count(words, history)
    return {word: number / (total or counts.total()) for word, number in counts.items()}


EXERCISES["E1.5"] = Exercise(
    next_word,
    [
        (list("abacabda"), ["a"]),
        (list("aaaaabaa"), ["a", "a"]),  # histories overlap
        (list("abcabdabcab"), ["a", "b"]),
        (list("dcabbdcabacdcabb"), ["c", "a", "b"]),
        (list("bcabcb"), ["c", "b"]),  # the history ends the text
        (list("abcab"), ["z"]),
        (list("ab"), ["a", "b", "a"]),
        (list("abacab"), []),  # no history: how often each word occurs
    ],
    known(
        "your values are counts: divide them by their sum, {total}",
        followers,
        "you count all words: count those that follow the history",
        lambda w, h: next_word(w, []),
        "your probabilities do not sum to 1: divide by the number of followers, {total}",
        lambda w, h: next_word(w, h, total=len(w)),
        "you look only at the last word of the history",
        lambda w, h: next_word(w, h[-1:]),
        "you look only at the first word of the history",
        lambda w, h: next_word(w, h[:1]),
        "you count the words before the history",
        lambda w, h: next_word(w[::-1], h[::-1]),
        "your probabilities are rounded: return them as they are",
        lambda w, h: {word: round(p, 2) for word, p in next_word(w, h).items()},
        "histories may overlap, as in a a a: look at every place",
        partial(next_word, count=apart),
        "a history that is never followed by a word must give {{}}",
        lambda w, h: next_word(w, h) or dict.fromkeys(w, 1 / len(w)),
    ),
    lambda words, history: {"total": followers(words, history).total()},
)


# --- E1.6 ROUGE-L


def subsequence(first, second):
    """Length of the longest list of words that stands in both, in this order, gaps allowed."""
    row = [0] * (len(second) + 1)
    for word in first:
        above, row = row, [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
    return row[-1]


def first_matches(first, second):
    place = count = 0
    for word in first:
        if word in second[place:]:
            place, count = second.index(word, place) + 1, count + 1
    return count


def run(first, second):
    """Length of the longest run of words without gaps that stands in both."""
    runs = {tuple(first[i:j]) for i in range(len(first)) for j in range(i + 1, len(first) + 1)}
    own = {tuple(second[i:j]) for i in range(len(second)) for j in range(i + 1, len(second) + 1)}
    return max(map(len, runs & own), default=0)


def bag(first, second):
    return (Counter(first) & Counter(second)).total()


def same_place(first, second):
    return sum(a == b for a, b in zip(first, second, strict=False))


def rouge_l(first, second, common=subsequence, words=lambda first, second: first + second):
    return 2 * common(first, second) / max(1, len(words(first, second)))


def jaccard(first, second):
    return len({*first} & {*second}) / max(1, len({*first} | {*second}))


ROUGE_PAIRS = (
    *(
        ("abcd", "dcba"),
        ("aabab", "bba"),
        ("fabcade", "badecfa"),
        ("abcbdab", "bdcaba"),
        ("aab", "abaab"),
    ),
    *(("gacbdef", "abcdefga"), ("ab", "ccabab"), ("a", "b"), ("a", ""), ("", "a"), ("", "")),
)
EXERCISES["E1.6"] = Exercise(
    rouge_l,
    [
        (
            "list the three rivers of the country".split(),
            "list rivers of the three countries".split(),
        ),
        *((list(first), list(second)) for first, second in ROUGE_PAIRS),
    ],
    known(
        "you return the length of the subsequence: F1 is 2 * LCS / (words in both lists)",
        lambda first, second: float(subsequence(first, second)),
        "your score is half of F1, 2 * LCS / (words in both)",
        lambda *a: rouge_l(*a) / 2,
        "you divide by the words of the first list only: a precision, expected F1 of both",
        lambda *a: rouge_l(*a, words=lambda first, second: first) / 2,
        "you divide by the words of the second list only: a recall, expected F1 of both",
        lambda *a: rouge_l(*a, words=lambda first, second: second) / 2,
        "you allow no gaps: a run of {run} words, a subsequence of {length}",
        partial(rouge_l, common=run),
        "you take the first match each time, {greedy} words, and {length} are possible: fill a "
        "table",
        partial(rouge_l, common=first_matches),
        "you ignore the order: {bag} are common, {length} in the same order",
        partial(rouge_l, common=bag),
        "you compare sets: order and repeated words must count",
        jaccard,
        "you compare sets: all words must count, and their order",
        lambda *a: 2 * jaccard(*a) / (1 + jaccard(*a)),
        "you compare word by word at the same place",
        partial(rouge_l, common=same_place),
        "an empty list must give 0, found {found}",
        lambda a, b: rouge_l(a, b) if a or b else 1.0,
    ),
    lambda *a: {
        "length": subsequence(*a),
        "run": run(*a),
        "greedy": first_matches(*a),
        "bag": bag(*a),
    },
    "the longest common subsequence has {length} words, so F1 is {expected:.4g}, found {found:.4g}",
)


# --- E1.7 Self-Instruct's filter: ROUGE-L with each of the others below 0.7 (arXiv 2212.10560,
# section 2.2)


EXERCISES["E1.7"] = Exercise(
    lambda scores: all(score < 0.7 for score in scores),
    [
        ([0.2, 0.5],),
        ([0.2, 0.9],),
        *([[score]] for score in (0.1, 0.3, 0.6, 0.69, 0.71, 0.9, 0.7)),
        ([0.6, 0.95],),
        ([0.65, 0.66, 0.67],),
        ([0.1, 1.0, 0.1],),
        ([],),
    ],
    known(
        "one score, {worst:.2f}, is not below 0.7: the largest score counts, not the smallest",
        lambda scores: not scores or min(scores) < 0.7,
        "one score, {worst:.2f}, is not below 0.7: the largest score counts, not the mean",
        lambda scores: not scores or sum(scores) / len(scores) < 0.7,
        "one score, {worst:.2f}, is not below 0.7: you refuse nothing",
        lambda scores: True,
        "a score of exactly 0.7 is refused",
        lambda scores: max(scores, default=0) <= 0.7,
        "with nothing to compare with, the candidate is kept",
        lambda scores: bool(scores) and max(scores) < 0.7,
        "all are below 0.7: the candidate is kept; is your comparison the wrong way round?",
        lambda scores: all(score > 0.7 for score in scores),
        "all are below 0.7: is your limit lower?",
        lambda scores: max(scores, default=0) < 0.5,
    ),
    lambda scores: {"worst": max(scores, default=0.0)},
    "the largest score is {worst:.2f}: the candidate is kept where it is below 0.7",
)


# --- E1.8 Packing


def longest_first(lengths):
    return sorted(lengths, reverse=True)


def pack(lengths, capacity, order=longest_first, choose=next, fits=lambda row, new: row + new):
    """choose: of the open rows with room, in their order, the one to take, or None; fits: what may
    not exceed capacity.
    """
    rows = []
    for length in order(lengths):
        row = choose((row for row in rows if fits(sum(row), length) <= capacity), None)
        rows.append([length]) if row is None else row.append(length)
    return rows


def last_only(lengths, capacity):
    rows = []
    for length in longest_first(lengths):
        full = not rows or sum(rows[-1]) + length > capacity
        rows.append([length]) if full else rows[-1].append(length)
    return rows


EXERCISES["E1.8"] = Exercise(
    lambda lengths, capacity: pack(lengths, capacity),
    [
        ([1, 3, 8, 6, 1, 5], 10),
        ([7, 6, 4, 3], 10),  # 4 and 3 fit exactly; the emptiest row is not the first
        ([4, 8, 1, 4, 2, 1, 3], 10),
        ([9, 2, 7, 3, 5, 5, 1, 8, 4], 12),
        ([6, 5, 2, 2, 2], 8),
        ([5, 5, 5], 5),
        ([], 10),
    ],
    known(
        "you open a row for every length: look for room in the open rows first",
        partial(pack, choose=lambda rows, default: default),
        "you take the lengths as they come: sort them, longest first",
        partial(pack, order=list),
        "you begin with the shortest: sort them, longest first",
        partial(pack, order=sorted),
        "you leave a row that would be exactly full, {capacity}",
        lambda n, size: pack(n, size - 1),
        "you look for room only in the last row: look in all, from the first on",
        last_only,
        "you take the emptiest row with room: take the first one",
        partial(pack, choose=lambda rows, default: min(rows, key=sum, default=default)),
        "you take the fullest row with room: take the first one",
        partial(pack, choose=lambda rows, default: max(rows, key=sum, default=default)),
        "a row holds more than the capacity, {capacity}: count the new length, too",
        partial(pack, fits=lambda row, new: row + 1),
        "you return an empty row",
        lambda lengths, capacity: pack(lengths, capacity) or [[]],
    ),
    otherwise="each length stands in one row, the first that has room, in the order in which rows "
    "were opened",
)


# --- E1.9 Perplexity


def mean(values):
    return sum(values := list(values)) / len(values)


def flat(losses):
    return [loss for answer in losses for loss in answer]


EXERCISES["E1.9"] = Exercise(
    lambda losses: math.exp(mean(flat(losses))),
    [
        ([[1.0, 2.0], [3.0]],),
        ([[0.5, 0.1, 3.0], [2.5], [0.0, 1.5]],),
        ([[0.5], [], [1.5, 4.0]],),  # an answer without tokens
        ([[400.0, 2.0, 3.0]],),  # e^400 fits into a float, e^800 does not
        ([[800.0, 1.0, 1.0]],),
    ],
    known(
        "you return the mean loss: perplexity is its exponential",
        lambda losses: mean(flat(losses)),
        "below 1: a loss is -log p already, so no sign",
        lambda losses: math.exp(-mean(flat(losses))),
        "you take a power of 2: losses in nats have base e",
        lambda losses: 2 ** mean(flat(losses)),
        "you take exp of the sum: divide by {tokens} first",
        lambda losses: math.exp(sum(flat(losses))),
        "you average the answers' mean losses: take the mean over all tokens",
        lambda losses: math.exp(mean(mean(answer) for answer in losses if answer)),
        "you average the exponentials: first the mean, then the exponential",
        lambda losses: mean(map(math.exp, flat(losses))),
        "you average the perplexities of the answers: first the mean over all tokens",
        lambda losses: mean(math.exp(mean(answer)) for answer in losses if answer),
        "you divide by the number of answers: divide by the {tokens} tokens",
        lambda losses: math.exp(sum(flat(losses)) / len(losses)),
    ),
    lambda losses: {"tokens": len(flat(losses)), "mean": mean(flat(losses))},
    "the mean of {tokens} losses is {mean:.4g}, so the perplexity is {expected:.4g}, found "
    "{found:.4g}",
)


# --- E1.10 Bytes of full fine-tuning

BILLS = {(2, False): "bf16", (4, False): "fp32", (2, True): "mixed, ZeRO"}  # -> a bill of `memory`


def total_bytes(parameters, bytes_per_number, master_copy):
    return memory.training_bytes(parameters, BILLS[bytes_per_number, master_copy])


def bill(each, master=4):
    """A bill of each(bytes_per_number) bytes a weight, and the master copy."""
    return lambda parameters, size, copied: parameters * (each(size) + master * copied)


EXERCISES["E1.10"] = Exercise(
    total_bytes,
    [
        *((1000, 4, False), (1000, 2, False), (1000, 2, True)),
        *((65_285_660_672, 2, False), (123_456_789, 2, True), (0, 4, False)),
    ],
    known(
        "of {right} bytes a weight one of Adam's moments is missing",
        bill(lambda size: 2 * size + 4),
        "of {right} bytes a weight Adam's two moments are missing",
        bill(lambda size: 2 * size),
        "Adam's two moments are float32, whatever the weights are",
        bill(lambda size: 4 * size),
        "of {right} bytes a weight weights or gradients are missing",
        bill(lambda size: size + 8),
        "these are the weights alone, expected {right} bytes for each",
        bill(lambda size: size, 0),
        "the float32 master copy of 4 bytes is missing",
        bill(lambda size: 2 * size + 8, 0),
        "4 bytes too many: a master copy, or a third moment?",
        bill(lambda size: 2 * size + 12, 0),
        "weights and gradients take bytes_per_number, not always 4",
        bill(lambda size: 16),
        "return bytes, not GB",
        lambda *a: total_bytes(*a) / 1e9,
        "one byte is eight bits; return bytes",
        lambda *a: 8 * total_bytes(*a),
    ),
    lambda parameters, size, copied: {"right": total_bytes(1, size, copied)},
    "expected {right} bytes a weight: weights, gradients, two float32 moments, a master copy if "
    "asked for",
)
