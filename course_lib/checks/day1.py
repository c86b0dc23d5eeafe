"""The exercises of Day 1: counts, data, labels, batches, loss, memory.

Each has its cases, its reference and the symptoms of known mistakes, in the order of the notebook.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from course_lib import memory
from course_lib.batching import IGNORED, Example, collate
from course_lib.checks import Exercise, close

FILTER = 0.7  # Self-Instruct keeps an instruction whose ROUGE-L with every other is below this (arXiv 2212.10560, section 2.2)


# E1.1 Next word from counts


def next_word(words: list[str], history: list[str]) -> dict[str, float]:
    n = len(history)
    counts = Counter(words[i + n] for i in range(len(words) - n) if words[i : i + n] == history)
    return {word: count / counts.total() for word, count in counts.items()}


def next_word_cases(rng: random.Random) -> Iterator[tuple]:
    yield "a b a c a b d a".split(), ["a"]
    yield list("aaaaabaa"), ["a", "a"]  # histories overlap
    for _ in range(10):
        words = rng.choices("abcd", k=rng.randint(8, 40))
        n = rng.randint(1, 3)
        start = rng.randrange(len(words) - n)
        yield words, words[start : start + n]
    yield list("abcab"), ["c", "a", "b"]  # the history ends the text and is followed by nothing
    yield list("abcab"), ["z"]
    yield list("ab"), ["a", "b", "a"]
    yield list("abacab"), []  # no history: how often each word occurs


def next_word_symptom(found: dict, expected: dict, words: list[str], history: list[str]) -> str | None:
    total = sum(found.values())
    if not expected:
        return "a history that is never followed by a word must give {}"
    if not found:
        return "your dict is empty, but the history is followed by a word: where does your loop start and end?"
    n = len(history)
    counts = Counter(words[i + n] for i in range(len(words) - n) if words[i : i + n] == history)
    if close(found, counts):
        return f"your values are counts: divide them by their sum, {sum(counts.values())}"
    if n and (close(found, next_word(words, [])) or close(found, Counter(words))):
        return "you count all words, whatever stands before them: count those that follow the history"
    if n > 1 and close(found, next_word(words, history[-1:])):
        return f"you look only at the last word of the history; all {n} words must match"
    if n > 1 and close(found, next_word(words, history[:1])):
        return f"you look only at the first word of the history; all {n} words must match"
    if close(found, next_word(words[::-1], history[::-1])):
        return "you count the words before the history, expected the words after it"
    if set(found) == set(expected) and any(p == round(p, 2) for p in found.values()) and _near(found, expected, 0.006):
        return "your probabilities are rounded: return them as they are"
    if not math.isclose(total, 1, rel_tol=1e-6):
        return f"your probabilities sum to {total:.3g}, expected 1: divide by how often the history is followed by a word"
    return "your counts are not right: look at every place of the text; histories may overlap, as in a a a"


def _near(found: dict, expected: dict, tolerance: float) -> bool:
    return all(abs(found[key] - expected[key]) < tolerance for key in expected)


# E1.2 ROUGE-L


def rouge_l(first: list[str], second: list[str]) -> float:
    return 2 * common_subsequence(first, second) / max(1, len(first) + len(second))


def common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest list of words that stands in both, in this order, gaps allowed."""
    row = [0] * (len(second) + 1)
    for word in first:
        above, row = row, [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
    return row[-1]


def greedy_matches(first: list[str], second: list[str]) -> int:
    """Words of `first` found in `second` from left to right, each at the first place that is left."""
    place = count = 0
    for word in first:
        if word in second[place:]:
            place = second.index(word, place) + 1
            count += 1
    return count


def common_substring(first: list[str], second: list[str]) -> int:
    """Length of the longest run of words without gaps that stands in both."""
    runs = (len(first[i:j]) for i in range(len(first)) for j in range(i + 1, len(first) + 1) if _contains(second, first[i:j]))
    return max(runs, default=0)


def _contains(words: list[str], run: list[str]) -> bool:
    return any(words[i : i + len(run)] == run for i in range(len(words)))


def rouge_l_cases(rng: random.Random) -> Iterator[tuple]:
    yield "list the three largest rivers of the country".split(), "list rivers of the country and the three lakes of it".split()
    yield "a b c d".split(), "d c b a".split()
    for _ in range(20):
        vocabulary = "abcdefgh"[: rng.randint(2, 8)]
        yield rng.choices(vocabulary, k=rng.randint(1, 12)), rng.choices(vocabulary, k=rng.randint(1, 12))
    yield ["a"], ["b"]
    yield ["a"], []
    yield [], ["a"]
    yield [], []


def rouge_l_symptom(found: float, expected: float, first: list[str], second: list[str]) -> str | None:
    total = max(1, len(first) + len(second))
    length = common_subsequence(first, second)
    if not first or not second:
        return f"an empty list must give 0, found {found:.4g}"
    if close(found, length):
        return "you return the length of the subsequence: divide twice the length by the number of words in both lists"
    if close(found, length / total):
        return "your score is half of what it should be: F1 is 2 * LCS / (words in both lists)"
    if close(found, length / len(first)):
        return "you divide by the words of the first list only: this is a precision, expected F1 of both"
    if close(found, length / len(second)):
        return "you divide by the words of the second list only: this is a recall, expected F1 of both"
    run, greedy = common_substring(first, second), greedy_matches(first, second)
    if run == greedy < length and close(found, 2 * run / total):
        return f"you allow no gaps, or you take the first match each time: {run} words, the longest subsequence has {length}"
    if close(found, 2 * run / total):
        return f"you allow no gaps: the longest run has {run} words, the longest subsequence {length}"
    if close(found, 2 * greedy / total):
        return f"you take the first match each time, {greedy} words; a later one can leave room for more, {length}: fill a table"
    bag = sum((Counter(first) & Counter(second)).values())
    if close(found, 2 * bag / total):
        return f"you ignore the order of the words: {bag} are common, but only {length} in the same order"
    union, common = set(first) | set(second), set(first) & set(second)
    if close(found, len(common) / len(union)) or close(found, 2 * len(common) / (len(set(first)) + len(set(second)))):
        return "you compare sets: order and repeated words must count"
    places = sum(a == b for a, b in zip(first, second, strict=False))
    if close(found, 2 * places / total):
        return "you compare word by word at the same place: a word may stand at different places in the two lists"
    if length == 0 and found > 0:
        return f"no word is common, so the score is 0, found {found:.4g}"
    return f"the longest common subsequence has {length} words, so F1 is {expected:.4g}, found {found:.4g}"


# E1.3 Self-Instruct's filter


def keep(scores: list[float]) -> bool:
    return all(score < FILTER for score in scores)


def keep_cases(rng: random.Random) -> Iterator[tuple]:
    yield ([0.2, 0.5],)
    yield ([0.2, 0.9],)
    for _ in range(20):
        yield ([rng.choice((0.1, 0.3, 0.6, 0.65, 0.69, 0.71, 0.9))],)
        yield ([rng.uniform(0, 0.8) for _ in range(rng.randint(2, 5))],)
    yield ([0.65, 0.66, 0.67],)
    yield ([0.7],)
    yield ([0.1, 1.0, 0.1],)
    yield ([],)


def keep_symptom(found: bool, expected: bool, scores: list[float]) -> str | None:
    if not scores:
        return "with nothing to compare with, the candidate is kept: expected True"
    if max(scores) == FILTER:
        return "a score of exactly 0.7 is refused: the filter keeps what is below 0.7"
    if found and min(scores) < FILTER <= max(scores):
        return (
            f"one score, {max(scores):.2f}, is not below 0.7, so the candidate is refused: the largest score counts, not the mean"
        )
    if found:
        return "the scores are not below 0.7, so the candidate is refused"
    return f"all scores are below 0.7, the largest is {max(scores):.2f}: the candidate is kept"


# E1.4 Labels of an example


def labels(prompt_ids: list[int], answer_ids: list[int], eos_id: int) -> tuple[list[int], list[int]]:
    answer = [*answer_ids, eos_id]
    return prompt_ids + answer, [IGNORED] * len(prompt_ids) + answer


def labels_cases(rng: random.Random) -> Iterator[tuple]:
    yield [11, 12, 13, 14], [21, 22], 0
    for _ in range(10):
        prompt = [rng.randrange(50) for _ in range(rng.randint(1, 9))]
        answer = [rng.randrange(50) for _ in range(rng.randint(1, 6))]
        yield prompt, answer, rng.randrange(50)
    yield [5, 6, 7], [6, 5], 1  # the answer repeats words of the prompt
    yield [5, 1, 7], [8, 1, 9], 1  # the EOS id occurs in the middle
    yield [5, 6], [], 1
    yield [], [5, 6], 1


def labels_symptom(found: list, expected: list, prompt_ids: list[int], answer_ids: list[int], eos_id: int) -> str | None:
    if len(found) != 2:
        return f"expected two lists, ids and labels, found {len(found)} values"
    ids, targets = found
    whole, right = expected
    if ids == whole[:-1]:
        return "your ids end with the answer: append eos_id, or the model never learns to stop"
    if ids != whole:
        return f"your ids are not prompt, answer, EOS: found {len(ids)} ids, expected {len(whole)}"
    if targets in (right[1:], [*right[1:], IGNORED], [*right[1:], eos_id]):
        return "your labels are shifted by one: a label stands at the place of its own token, the shift happens in the loss"
    if len(targets) != len(ids):
        return f"ids and labels must have the same length, found {len(ids)} and {len(targets)}"
    trained = sum(label != IGNORED for label in targets)
    counts = f"{trained} of {len(ids)} positions are trained, expected {len(answer_ids) + 1}"
    if targets[-1] != eos_id:
        return f"the last label is {targets[-1]}, expected eos_id, {eos_id}: EOS is trained"
    masked = targets[: len(prompt_ids)]
    if masked == prompt_ids and prompt_ids:
        return f"your labels keep the prompt: {counts}: set the prompt's labels to {IGNORED}"
    if masked and len(set(masked)) == 1 and masked[0] != IGNORED:
        return f"your prompt's labels are {masked[0]}, expected {IGNORED}: cross_entropy ignores only that number"
    if IGNORED in targets[len(prompt_ids) :]:
        return f"answer tokens are masked: {counts}; mask by position, the first {len(prompt_ids)}, not by token id"
    return f"the prompt is not masked as a whole: {counts}; its {len(prompt_ids)} labels are all {IGNORED}"


# E1.5 Padding


def pad(rows: list[list[int]], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    batch = collate([Example(row, row) for row in rows], pad_id)
    return batch["input_ids"].tolist(), batch["attention_mask"].tolist()


def pad_cases(rng: random.Random) -> Iterator[tuple]:
    yield [[11, 12, 13, 9], [21, 22, 9]], 0
    for _ in range(10):
        eos = rng.randrange(10)
        rows = [[*rng.choices(range(10, 50), k=rng.randint(1, 7)), eos] for _ in range(rng.randint(1, 4))]
        yield rows, rng.choice((eos, 0))  # a tokenizer without a padding token of its own pads with EOS
    yield [[5, 6, 2], [7, 2]], 2
    yield [[5, 6], [7]], 9
    yield [[4], [4, 5, 6, 7, 2]], 2


def pad_symptom(found: list, expected: list, rows: list[list[int]], pad_id: int) -> str | None:
    if len(found) != 2:
        return f"expected two lists, ids and mask, found {len(found)} values"
    ids, mask = found
    longest = max(map(len, rows))
    lengths = sorted({len(row) for row in ids})
    if lengths == [min(map(len, rows))] and longest not in lengths:
        return f"your rows are cut to the shortest: no token may be lost, expected {longest} in each row"
    if lengths != [longest]:
        return f"your rows have lengths {lengths}, expected all to be {longest}, as long as the longest row"
    if ids != expected[0]:
        if ids == [[pad_id] * (longest - len(row)) + row for row in rows]:
            return "you pad on the left, expected on the right"
        if any(row[: len(own)] != own for row, own in zip(ids, rows, strict=True)):
            return "your rows do not begin with their own tokens"
        return f"your padding is not pad_id, {pad_id}"
    kept, real = sum(map(sum, mask)), sum(map(len, rows))
    if mask == [[int(token != pad_id) for token in row] for row in ids]:
        return (
            f"your mask is made by token id: {kept} positions are read, expected {real}; where pad_id is also EOS this hides the "
            "real EOS: mask by position"
        )
    if mask == [[1 - bit for bit in row] for row in expected[1]]:
        return "your mask is inverted: 1 for a real token, 0 for padding"
    if kept == len(rows) * longest:
        return f"your mask reads the padding: {kept} positions are 1, expected {real}"
    return f"your mask has {kept} ones, expected {real}: the first len(row) of each row are 1, the rest 0"


# E1.6 Packing


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    return _first_fit(sorted(lengths, reverse=True), capacity)


def _first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for length in lengths:
        row = next((row for row in rows if sum(row) + length <= capacity), None)
        if row is None:
            rows.append([length])
        else:
            row.append(length)
    return rows


def _last_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for length in lengths:
        if rows and sum(rows[-1]) + length <= capacity:
            rows[-1].append(length)
        else:
            rows.append([length])
    return rows


def pack_cases(rng: random.Random) -> Iterator[tuple]:
    yield [1, 3, 8, 6, 1, 5], 10
    for _ in range(15):
        capacity = rng.randint(8, 20)
        yield [rng.randint(1, capacity) for _ in range(rng.randint(2, 14))], capacity
    yield [7, 6, 4, 3], 10  # 4 and 3 fit exactly; the emptiest row is not the first
    yield [5, 5, 5], 5
    yield [], 10


def pack_symptom(found: list, expected: list, lengths: list[int], capacity: int) -> str | None:
    tokens = sum(map(sum, found))
    if tokens != sum(lengths) or sorted(length for row in found for length in row) != sorted(lengths):
        return f"your rows hold {tokens} tokens, expected {sum(lengths)}: each length stands in exactly one row"
    fullest = max(map(sum, found), default=0)
    if fullest > capacity:
        return f"a row holds {fullest} tokens, more than the capacity of {capacity}"
    if [] in found:
        return "you return an empty row"
    if len(found) == len(lengths) > len(expected):
        return "you open a row for every length: look for room in the open rows first"
    if found == _first_fit(lengths, capacity):
        return "you take the lengths as they come: sort them, longest first" + _fill(found, expected, capacity)
    if found == _first_fit(sorted(lengths), capacity):
        return "you begin with the shortest: sort them, longest first" + _fill(found, expected, capacity)
    if found == _first_fit(sorted(lengths, reverse=True), capacity - 1):
        return f"you leave a row that would be exactly full: {capacity} of {capacity} tokens are allowed"
    if sorted(map(sorted, found)) == sorted(map(sorted, expected)):
        return "the rows are right, their order is not: rows in the order in which they were opened, longest length first"
    if found == _last_fit(sorted(lengths, reverse=True), capacity):
        return "you look for room only in the last row: look in all rows, from the first on" + _fill(found, expected, capacity)
    return "a length goes into the first row that has room: look at the rows in the order in which they were opened"


def _fill(found: list, expected: list, capacity: int) -> str:
    """How full the rows are, where it makes a difference."""
    if len(found) == len(expected):
        return ""
    shares = [sum(map(sum, rows)) / (capacity * len(rows)) for rows in (found, expected)]
    return f"; found {len(found)} rows, {shares[0]:.0%} full, expected {len(expected)}, {shares[1]:.0%} full"


# E1.7 Loss of the answer


def response_loss(logits: Tensor, labels: Tensor) -> float:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()


def response_loss_cases(rng: random.Random) -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(rng.randrange(2**32))

    def batch(rows: int, tokens: int, scale: float) -> tuple[Tensor, Tensor]:
        vocabulary = rng.randint(5, 11)
        logits = scale * torch.randn(rows, tokens, vocabulary, generator=generator)
        labels = torch.randint(vocabulary, (rows, tokens), generator=generator)
        for row in labels:
            row[: rng.randrange(tokens - 1)] = IGNORED  # the prompt; at least the last two stay
        return logits, labels

    yield batch(1, 5, 1.0)
    for _ in range(8):
        yield batch(rng.randint(2, 4), rng.randint(4, 9), 2.0)
    logits, labels = batch(3, 6, 2.0)
    labels[0, 3:] = IGNORED  # padding on the right
    labels[1, :] = IGNORED  # a row without supervised token
    yield logits, labels
    yield batch(2, 5, 500.0)  # e^500 overflows in float32


def _cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).item()


def response_loss_symptom(found: float, expected: float, logits: Tensor, labels: Tensor) -> str | None:
    if not math.isfinite(found):
        return f"your loss is {found}: e^x overflows for large logits, and log 0 is infinite: use log_softmax"
    log_p = logits.log_softmax(-1)
    targets, before = labels[:, 1:], log_p[:, :-1]
    trained = targets != IGNORED
    each = -before.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2) * trained  # (N, T - 1)
    if close(found, -expected):
        return "your loss has the wrong sign: it is the mean of -log p"
    if close(found, functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()):
        return "your loss compares position t with token t: position t predicts token t + 1"
    if close(found, functional.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten()).item()):
        return "your shift goes the wrong way: logits without the last position, labels without the first"
    if close(found, each.sum().item()):
        return f"your loss is a sum: divide by the {trained.sum().item()} supervised positions"
    if close(found, each.mean().item()) or close(found, (each.sum() / labels.numel()).item()):
        return f"you divide by all positions, masked ones too: divide by the {trained.sum().item()} supervised ones"
    counts = trained.sum(1)
    if close(found, (each.sum(1) / counts.clamp(min=1)).mean().item()):
        return "your loss is a mean of row means: every supervised token counts alike, whatever its row"
    if close(found, expected / math.log(2)):
        return "your loss is in bits: use the natural logarithm"
    p = -logits.softmax(-1)[:, :-1].gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[trained].mean().item()
    if close(found, p) or close(found, -p):
        return "your loss is a mean of probabilities: take -log of each first"
    if close(found, (-logits[:, :-1].gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[trained]).mean().item()):
        return "your loss is a mean of logits: turn them into log-probabilities with log_softmax first"
    if labels.shape[1] > 2 and close(found, _cross_entropy(logits[:, :-2], labels[:, 2:])):
        return "you shift twice: position t predicts token t + 1, not t + 2"
    if close(found, _cross_entropy(logits[:, :-1], targets.clamp(min=0))):
        return f"the labels that are {IGNORED} are counted as token 0: leave them out of the mean"
    late = labels[:, :-1] != IGNORED
    if close(found, -before.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[late].mean().item()):
        return "your mask comes from the labels before the shift: take it from labels[:, 1:]"
    sliced = -logits[:, :-1].log_softmax(1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[trained].mean().item()
    across = -logits.log_softmax(1)[:, :-1].gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[trained].mean().item()
    flat = -logits.log_softmax(0)[:, :-1].gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[trained].mean().item()
    if close(found, across) or close(found, sliced) or close(found, flat):
        return "your softmax runs over the wrong dimension: over the vocabulary, the last one"
    return f"your loss is {found:.4f}, expected {expected:.4f}: are exactly the labels that are not {IGNORED} counted?"


# E1.8 Perplexity


def perplexity(losses: list[list[float]]) -> float:
    tokens = [loss for answer in losses for loss in answer]
    return math.exp(sum(tokens) / len(tokens))


def perplexity_cases(rng: random.Random) -> Iterator[tuple]:
    yield ([[1.0, 2.0], [3.0]],)
    for _ in range(10):
        yield ([[rng.uniform(0, 4) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(2, 4))],)
    yield ([[0.5], [], [1.5, 4.0]],)  # an answer without tokens
    yield ([[400.0, 2.0, 3.0]],)  # e^400 fits into a float, e^800 does not
    yield ([[800.0, 1.0, 1.0]],)


def perplexity_symptom(found: float, expected: float, losses: list[list[float]]) -> str | None:
    tokens = [loss for answer in losses for loss in answer]
    answers = [answer for answer in losses if answer]
    mean, means = sum(tokens) / len(tokens), [sum(answer) / len(answer) for answer in answers]
    if close(found, mean):
        return "you return the mean loss: perplexity is its exponential"
    if close(found, math.exp(-mean)):
        return "your perplexity is below 1: the sign of the exponent is wrong, a loss is already -log p"
    if close(found, 2**mean):
        return "you take a power of 2: the losses are in nats, so the base is e"
    if close(found, math.exp(min(sum(tokens), 700))):
        return f"you take the exponential of the sum: divide by the {len(tokens)} tokens first"
    if close(found, math.exp(sum(means) / len(means))):
        return "you average the answers' mean losses: every token counts alike, so take the mean over all tokens"
    if close(found, sum(math.exp(min(loss, 700)) for loss in tokens) / len(tokens)):
        return "you average the exponentials: first the mean of the losses, then the exponential"
    if close(found, sum(map(math.exp, means)) / len(means)):
        return "you average the perplexities of the answers: first the mean over all tokens, then the exponential"
    return f"the mean loss of {len(tokens)} tokens is {mean:.4g}, so the perplexity is {expected:.4g}, found {found:.4g}"


# E1.9 Bytes of full fine-tuning

BILLS = {(2, False): "bf16", (4, False): "fp32", (2, True): "mixed, ZeRO"}  # (bytes a number, master copy) -> a bill of `memory`


def training_bytes(parameters: int, bytes_per_number: int, master_copy: bool) -> int:
    return memory.training_bytes(parameters, BILLS[bytes_per_number, master_copy])


def training_bytes_cases(rng: random.Random) -> Iterator[tuple]:
    yield 1000, 4, False
    yield 1000, 2, False
    yield 1000, 2, True
    for _ in range(10):
        yield rng.randint(1, 10**10), *rng.choice(list(BILLS))
    yield 65_285_660_672, 2, False
    yield 0, 4, False


def training_bytes_symptom(found: float, expected: int, parameters: int, bytes_per_number: int, master_copy: bool) -> str | None:
    if parameters == 0:
        return f"no weights take no bytes, found {found}"
    each, right = found / parameters, expected // parameters
    start = f"found {each:.4g} bytes a weight, expected {right}: "
    master = 4 if master_copy else 0
    if close(each, right / 8) or close(each, 8.0 * right):
        return start + "one byte is eight bits; the answer is in bytes"
    if any(close(found * unit, float(expected)) for unit in (1e3, 1e6, 1e9, 2**10, 2**20, 2**30)):
        return start + "return bytes, not a larger unit"
    if master_copy and close(each, right - 4.0):
        return start + "the float32 master copy of 4 bytes is missing"
    if bytes_per_number == 4 and close(each, 12.0):
        return start + "of weights, gradients, moment 1 and moment 2 one is missing"
    if close(each, 4.0 * bytes_per_number + master):
        return start + "Adam's two moments are float32, whatever the format of the weights"
    if close(each, 2.0 * bytes_per_number + master):
        return start + "Adam's two moments are missing"
    if close(each, float(bytes_per_number)):
        return start + "these are the weights alone: gradients and two moments come on top"
    if bytes_per_number == 2 and close(each, 16.0 + master):
        return start + "gradients and weights take bytes_per_number each, not always 4"
    if not master_copy and close(each, right + 4.0):
        return start + "there are 4 bytes too many: is a master copy counted that was not asked for, or a third moment?"
    return start + "weights and gradients in bytes_per_number, two float32 moments, 4 more for a master copy"


EXERCISES = {
    "E1.1": Exercise(next_word, next_word_cases, next_word_symptom),
    "E1.2": Exercise(rouge_l, rouge_l_cases, rouge_l_symptom),
    "E1.3": Exercise(keep, keep_cases, keep_symptom),
    "E1.4": Exercise(labels, labels_cases, labels_symptom),
    "E1.5": Exercise(pad, pad_cases, pad_symptom),
    "E1.6": Exercise(pack, pack_cases, pack_symptom),
    "E1.7": Exercise(response_loss, response_loss_cases, response_loss_symptom),
    "E1.8": Exercise(perplexity, perplexity_cases, perplexity_symptom),
    "E1.9": Exercise(training_bytes, training_bytes_cases, training_bytes_symptom),
}
