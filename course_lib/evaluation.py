"""How a model is judged: on the task of the week, and on what it knew before.

The task of the week asks for a JSON object {"answer": ..., "topic": ...}. Three rates over held-out
questions: the whole reply is such an object (valid JSON); it is, and its topic is right; it is, and
its answer is right after case and spaces are normalised. Response loss, the mean of -log p(answer
token) with the right answer given, is the measure of training itself; the same forward pass says
which answers a greedy reply would repeat exactly.

Retention asks plain questions in the chat template, which the untouched model answered: is the
answer still in the reply? Replies that come wrapped in JSON are counted apart, since a right answer
in the wrong clothes is neither kept nor lost.

Two measures of the field for text without one right answer: perplexity, how surprised a model is by
a text, and the overlap of a reply with a reference, ROUGE-L (Lin 2004, ACL W04-1013) and BLEU
(Papineni et al. 2002, ACL P02-1040), both from their libraries.
"""

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from course_lib import plots
from course_lib.alpaca import Record, read_records, rouge_scorer
from course_lib.batching import (
    Example,
    beginning,
    check_ids,
    collate,
    encode_prompt,
    encode_text,
    most_positions,
    with_answer,
)
from course_lib.jsonfile import DataError
from course_lib.objective import supervised_logits
from course_lib.runtime import CourseError, data_folder, measure
from course_lib.text import contains, normalise

if TYPE_CHECKING:
    from course_lib.models import Loaded

TASK_FILE = "structured_answers.json"
TASK_FIELDS = ("split", "topic", "entity", "phrasing")
RETENTION_FILE, CANDIDATES_FILE = "retention.json", "recipes/retention_candidates.json"
ANSWER_TOKENS = 20  # the longest right answer of the task takes 17 tokens of SmolLM2, EOS included
REPLY_TOKENS = 20  # a plain question is answered in the first sentence or not at all


@dataclass(frozen=True)
class Question:
    """A plain question that the untouched model answers. answers: normalised texts, one of which
    the reply must contain.
    """

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One reply to a question of the task, and what is right about it."""

    record: Record
    reply: str
    valid_json: bool
    right_topic: bool
    right_answer: bool


@dataclass(frozen=True)
class TaskScore:
    """The task of the week over `len(answers)` questions."""

    answers: list[Answer]
    seconds: float

    def rate(self, measure: str) -> float:
        """Share of the answers for which "valid_json", "right_topic" or "right_answer" holds."""
        return sum(getattr(answer, measure) for answer in self.answers) / len(self.answers)

    def __str__(self) -> str:
        n = len(self.answers)
        rates = [
            f"{name.replace('_', ' ')} {percent(self.rate(name), n)}"
            for name in ("valid_json", "right_topic", "right_answer")
        ]
        return f"{', '.join(rates)} ({n} questions, {self.seconds:.0f} s)"


@dataclass(frozen=True)
class RetentionScore:
    """What is left of the model's plain knowledge: replies that contain the answer, in plain words
    or wrapped in JSON.
    """

    questions: Sequence[Question]
    replies: list[str]
    kept: list[bool]
    wrapped: list[bool]
    seconds: float

    @property
    def rate(self) -> float:
        """Share answered right in plain words."""
        return sum(self.kept) / len(self.kept)

    @property
    def wrapped_rate(self) -> float:
        """Share answered right, but inside JSON."""
        return sum(self.wrapped) / len(self.wrapped)

    def __str__(self) -> str:
        n = len(self.kept)
        return (
            f"retention {percent(self.rate, n)}, right but wrapped in JSON "
            f"{percent(self.wrapped_rate, n)} "
            f"({n} questions, {self.seconds:.0f} s)"
        )


@dataclass(frozen=True)
class AnswerScore:
    """How records are answered. loss: response loss, the mean of -log p over all answer tokens, in
    nats; exact: one a record.
    """

    loss: float
    exact: list[bool]

    @property
    def exact_rate(self) -> float:
        """Exact match: the share of records whose greedy reply is the answer, token for token."""
        return sum(self.exact) / len(self.exact)


def read_task(split: str) -> list[Record]:
    """The task of the week: the records of "train", "validation" or "test"; entities and phrasings
    of one are in no other.
    """
    records = read_records(data_folder() / TASK_FILE, extra=TASK_FIELDS).records
    chosen = [record for record in records if record.extra["split"] == split]
    if not chosen:
        raise CourseError(f"split {split!r} is not known, expected train, validation or test")
    return chosen


def draw_questions(count: int) -> list[Record]:
    """`count` test questions of the task of the week, as evenly over its ten topics as can be; the
    same ones at every call. Raises CourseError if there are not so many.
    """
    by_topic: dict[str, list[Record]] = {}
    for record in read_task("test"):
        by_topic.setdefault(record.extra["topic"], []).append(record)
    most = sum(map(len, by_topic.values()))
    if type(count) is not int or not 1 <= count <= most:
        raise CourseError(f"count={count!r} must be a whole number in 1..{most}: choose one")
    draw = random.Random(0)
    each, more = divmod(count, len(by_topic))
    numbers = [each + (place < more) for place in range(len(by_topic))]
    return [
        record
        for topic, number in zip(sorted(by_topic), numbers, strict=True)
        for record in draw.sample(by_topic[topic], number)
    ]


def draw_examples(seed: int) -> list[Record]:
    """One training record of each topic of the task of the week, in random order: what a prompt
    shows before a question. Another seed is another draw.
    """
    by_topic: dict[str, list[Record]] = {}
    for record in read_task("train"):
        by_topic.setdefault(record.extra["topic"], []).append(record)
    draw = random.Random(seed)
    examples = [draw.choice(records) for records in by_topic.values()]
    draw.shuffle(examples)
    return examples


def read_retention(path: Path | None = None) -> list[Question]:
    """The retention questions, by default those of the course."""
    path = path or data_folder() / RETENTION_FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        questions = [
            Question(row["question"], tuple(row["answers"]))
            for row in rows
            if isinstance(row["answers"], list)
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        rows, questions = [], []
    if (
        not questions
        or len(questions) < len(rows)
        or not all(question.answers for question in questions)
    ):
        raise DataError(
            f'{path} is not a list of {{"question": text, "answers": [text]}}: restore it'
        )
    return questions


def read_unknown() -> list[Question]:
    """The questions that were tried for `read_retention` and that the untouched model did not
    answer: here answers can be gained, and there lost.
    """
    known = {question.question for question in read_retention()}
    tried = read_retention(data_folder() / CANDIDATES_FILE)
    return [question for question in tried if question.question not in known]


def evaluate(
    base: "Loaded", records: Sequence[Record], batch_size: int = 64, shots: Sequence[Record] = ()
) -> TaskScore:
    """Answer every question of the task greedily in the Alpaca template and compare with its
    record. Batched; changes nothing.

    shots: records that stand answered before each question (few-shot prompting), all as turns of a
        chat in the model's own template
    """
    if not records:
        raise CourseError("there are no questions to evaluate on")
    for record in records:
        if _answer_object(record.output) is None:
            raise CourseError(
                f"{record.output[:60]!r} is no answer of the task: expected records of "
                "read_task(...)"
            )
    with measure(base.model.device.type) as cost:
        prompts = [_prompt(base, record, shots) for record in records]
        replies = generate(base, prompts, ANSWER_TOKENS, batch_size)
    return TaskScore(
        [judge(record, reply) for record, reply in zip(records, replies, strict=True)], cost.seconds
    )


def evaluate_retention(
    base: "Loaded", questions: Sequence[Question], batch_size: int = 64
) -> RetentionScore:
    """Ask every plain question as `chat_prompt` puts it, greedily. Batched; changes nothing."""
    if not questions:
        raise CourseError("there are no questions to evaluate on")
    with measure(base.model.device.type) as cost:
        prompts = [chat_prompt(base, question.question) for question in questions]
        replies = generate(base, prompts, REPLY_TOKENS, batch_size)
    kept, wrapped = [], []
    for question, reply in zip(questions, replies, strict=True):
        right = any(contains(reply, answer) for answer in question.answers)
        in_json = reply.lstrip().startswith("{")
        kept.append(right and not in_json)
        wrapped.append(right and in_json)
    return RetentionScore(questions, replies, kept, wrapped, cost.seconds)


def judge(record: Record, reply: str) -> Answer:
    """Compare a reply with the record's answer.

    >>> record = Record("Capital of France?", '{"answer": "Paris", "topic": "capital"}')
    >>> answer = judge(record, '{"answer": " paris", "topic": "plural"}')
    >>> answer.valid_json, answer.right_topic, answer.right_answer
    (True, False, True)
    """
    right, found = _answer_object(record.output), _answer_object(reply)
    if found is None:
        return Answer(record, reply, valid_json=False, right_topic=False, right_answer=False)
    return Answer(
        record,
        reply,
        valid_json=True,
        right_topic=normalise(found["topic"]) == normalise(right["topic"]),
        right_answer=normalise(found["answer"]) == normalise(right["answer"]),
    )


def interval(percentage: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a rate over n questions, in percent (Wilson 1927, doi
    10.1080/01621459.1927.10502953).

    >>> [round(end) for end in interval(93, 100)], [round(end) for end in interval(0, 100)]
    ([86, 97], [0, 4])
    """
    p, z = percentage / 100, 1.959964  # of the normal distribution
    centre, width = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 100 * max(0.0, (centre - width) / (1 + z**2 / n)), 100 * min(
        1.0, (centre + width) / (1 + z**2 / n)
    )


def percent(rate: float, n: int) -> str:
    """A rate from 0 to 1 in percent, with its 95 % interval over n questions.

    >>> percent(0.93, 100)
    '93 % (86 to 97)'
    """
    low, high = interval(100 * rate, n)
    return f"{100 * rate:.0f} % ({low:.0f} to {high:.0f})"


class Headline:
    """The result of a day: a table for readers, and one JSON object that the course page, the
    slides and the tests read.

    results: measure -> {"before": number, "after": number, "unit": "percent" or another,
        "questions": how many a percentage is of, "guess": what the reader expected,
        "by_selection": true if "before" was chosen by selecting the questions, not measured}

    >>> topic = {"before": 0.0, "after": 93.0, "unit": "percent", "questions": 100}
    >>> Headline({"right topic": topic})
    right topic: 0 % (0 to 4) → 93 % (86 to 97)
    """

    def __init__(self, results: Mapping[str, Mapping[str, Any]]):
        self.results = {
            measure: {key: value for key, value in result.items() if value is not None}
            for measure, result in results.items()
        }

    def __repr__(self) -> str:
        return "\n".join(
            f"{name}: {' → '.join(filter(None, cells))}"
            for name, *cells in map(dict.values, self._rows())
        )

    def _rows(self) -> list[dict[str, str]]:
        def shown(result: dict[str, Any], when: str) -> str:
            value = result.get(when)
            if value is None:
                return ""
            if result["unit"] == "percent":
                chosen = when == "before" and result.get("by_selection")
                return f"{value:.0f} %" if chosen else percent(value / 100, result["questions"])
            return (
                f"{value:,.3g} {result['unit']}"
                if isinstance(value, float)
                else f"{value:,} {result['unit']}"
            )

        guessed = any(result.get("guess") is not None for result in self.results.values())
        had_before = any(result.get("before") is not None for result in self.results.values())
        return [
            {"": name}
            | ({"before": shown(result, "before")} if had_before else {})
            | ({"your guess": str(result.get("guess", ""))} if guessed else {})
            | {"after": shown(result, "after")}
            for name, result in self.results.items()
        ]

    def _repr_mimebundle_(self, **unused: Any) -> dict[str, Any]:
        table = plots.table(self._rows()).data
        return {"text/plain": repr(self), "text/html": table, "application/json": self.results}


def score_answers(
    base: "Loaded", records: Sequence[Record], batch_size: int = 64, shots: Sequence[Record] = ()
) -> AnswerScore:
    """Compare the model's next token with the right one at every position of every answer, EOS
    included, given the tokens before.

    One forward pass, and no text is generated: a greedy reply equals the answer if every one of its
    tokens is the likeliest. shots: as for `evaluate`.
    """
    _check_batch_size(batch_size)
    if not records:
        raise CourseError("there are no records to score")
    prompts = [_prompt(base, record, shots) for record in records]
    examples = [
        with_answer(prompt, record.output, base.tokenizer)
        for prompt, record in zip(prompts, records, strict=True)
    ]
    _check_lengths(base, max(map(len, examples)))
    tokens = (token for example in examples for token in example.input_ids)
    check_ids(tokens, base.model, base.tokenizer)
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index]))
    losses, exact = [0.0] * len(examples), [False] * len(examples)
    base.model.eval()
    for start in range(0, len(examples), batch_size):
        indices = by_length[start : start + batch_size]
        batch = collate([examples[index] for index in indices], base.tokenizer.pad_token_id)
        batch = {name: tensor.to(base.model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            logits, right = supervised_logits(base.model, batch)  # (K, V), (K,)
            token_losses = torch.nn.functional.cross_entropy(logits, right, reduction="none")
            likeliest = logits.argmax(-1) == right
        counts = [len(examples[index].supervised_ids) for index in indices]
        for index, loss, hits in zip(
            indices, token_losses.split(counts), likeliest.split(counts), strict=True
        ):
            losses[index], exact[index] = loss.sum().item(), bool(hits.all())
    return AnswerScore(
        sum(losses) / sum(len(example.supervised_ids) for example in examples), exact
    )


def perplexity(base: "Loaded", texts: Sequence[str], batch_size: int = 8) -> float:
    """exp of the mean of -log p(token | the tokens of its text before it), over all tokens of all
    texts but each text's first one.

    The model is as surprised as by a fair draw among that many tokens, on average. It is counted a
    token, so two models compare only if they share a tokenizer. Before a text stands what the
    tokenizer puts there by default, such as BOS. Raises CourseError if a text has fewer than two
    tokens, or more than the model has positions.
    """
    _check_batch_size(batch_size)
    longest, start = most_positions(base.model), beginning(base.tokenizer)
    examples = []
    for number, text in enumerate(texts, start=1):
        ids = start + encode_text(text, base.tokenizer)
        if not 2 <= len(ids) <= longest:
            raise CourseError(
                f"text {number} has {len(ids)} tokens, perplexity needs 2 to {longest}"
            )
        examples.append(Example(ids, ids))
    if not examples:
        raise CourseError("there are no texts to score")
    tokens = (token for example in examples for token in example.input_ids)
    check_ids(tokens, base.model, base.tokenizer)
    base.model.eval()
    losses = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], base.tokenizer.pad_token_id)
        batch = {name: tensor.to(base.model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            logits, right = supervised_logits(base.model, batch)  # (K, V), (K,)
            losses.append(torch.nn.functional.cross_entropy(logits, right, reduction="none"))
    return torch.cat(losses).double().mean().exp().item()


def text_scores(
    replies: Sequence[str], references: Sequence[str], tokenize: str = "13a"
) -> dict[str, float]:
    """ROUGE-L, the mean F1 over replies, and BLEU of the replies as one corpus; both from 0 to 100,
    through their libraries.

    tokenize: sacrebleu's tokenizer; "zh" for Chinese Needs the packages rouge-score and sacrebleu.
    BLEU counts up to four words in a row, so for a single short reply it is mostly smoothing, and 0
    for a reply of fewer than four words.

    >>> text_scores(["the cat sat on the mat"], ["the cat sat on the mat"])
    {'ROUGE-L': 100.0, 'BLEU': 100.0}
    """
    if not replies or len(replies) != len(references):
        raise CourseError(
            f"found {len(replies)} replies and {len(references)} references, expected one for one, "
            "and at least one"
        )
    try:
        import sacrebleu
    except ImportError:
        raise CourseError("the package sacrebleu is missing: pip install sacrebleu") from None
    scorer = rouge_scorer()
    f1 = [
        scorer.score(right, reply)["rougeL"].fmeasure
        for reply, right in zip(replies, references, strict=True)
    ]
    bleu = sacrebleu.corpus_bleu(list(replies), [list(references)], tokenize=tokenize).score
    # sacrebleu gives 100.00000000000004
    return {"ROUGE-L": 100 * sum(f1) / len(f1), "BLEU": min(bleu, 100.0)}


def _prompt(base: "Loaded", record: Record, shots: Sequence[Record]) -> list[int]:
    """The Alpaca template, or a chat if examples stand before the question."""
    if shots:
        return chat_prompt(base, asked(record), shots)
    return encode_prompt(record, base.tokenizer)


def asked(record: Record) -> str:
    """Instruction and input as one line, for a chat."""
    return f"{record.instruction} {record.input}".strip()


def chat_prompt(base: "Loaded", question: str, shots: Sequence[Record] = ()) -> list[int]:
    """A plain question as the model's own chat template puts it; a plain base, which has none, gets
    a question-and-answer page. shots: answered before it, as turns of the same chat.
    """
    if base.tokenizer.chat_template is None:
        pages = [f"Question: {asked(shot)}\nAnswer: {shot.output}\n\n" for shot in shots]
        page = f"{''.join(pages)}Question: {question}\nAnswer:"
        return beginning(base.tokenizer) + encode_text(page, base.tokenizer)
    turns = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in (("user", asked(shot)), ("assistant", shot.output))
    ]
    text = base.tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return base.tokenizer(text, add_special_tokens=False)["input_ids"]


def generate(
    base: "Loaded", prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int = 64
) -> list[str]:
    """Greedy continuations of token ids, without special tokens, in the order of `prompts`.

    Prompts of similar length share a batch, padded on the left, so that every reply starts at the
    same position.
    """
    _check_batch_size(batch_size)
    if not all(prompts):
        raise CourseError("a prompt has no tokens, so nothing can go on from it: give it a text")
    _check_lengths(base, max(map(len, prompts), default=0) + max_new_tokens)
    pad_id = base.tokenizer.pad_token_id
    check_ids((token for prompt in prompts for token in prompt), base.model, base.tokenizer)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies = [""] * len(prompts)
    stops = ends_of(base)
    base.model.eval()
    with tqdm(total=len(prompts), desc="answering", unit="question", file=sys.stdout) as bar:
        for start in range(0, len(prompts), batch_size):
            indices = by_length[start : start + batch_size]
            longest = len(prompts[indices[-1]])
            padding = [longest - len(prompts[index]) for index in indices]
            ids = torch.tensor(
                [
                    [pad_id] * pads + prompts[index]
                    for pads, index in zip(padding, indices, strict=True)
                ]
            )
            mask = torch.tensor([[0] * pads + [1] * (longest - pads) for pads in padding])
            with torch.inference_mode():
                generated = base.model.generate(
                    input_ids=ids.to(base.model.device),
                    attention_mask=mask.to(base.model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad_id,
                    eos_token_id=stops or None,
                )
            for index, row in zip(indices, generated[:, longest:].tolist(), strict=True):
                replies[index] = base.tokenizer.decode(row, skip_special_tokens=True).strip()
            bar.update(len(indices))
    return replies


def ends_of(base: "Loaded") -> list[int]:
    """The tokens that end a reply: the tokenizer's EOS, which training teaches, and the model's."""
    of_model = base.model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    ends = dict.fromkeys([base.tokenizer.eos_token_id, *of_model])
    return [token for token in ends if token is not None]


def _check_lengths(base: "Loaded", longest: int) -> None:
    if longest > (most := most_positions(base.model)):
        found = f"a text of {longest} tokens, with what is to be written"
        raise CourseError(f"found {found}, expected at most {most}: shorten it")


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise CourseError(f"batch_size={batch_size} must be at least 1")


def _answer_object(reply: str) -> dict[str, str] | None:
    """The reply as {"answer": text, "topic": text}, or None."""
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    if (
        isinstance(found, dict)
        and found.keys() == {"answer", "topic"}
        and all(isinstance(text, str) for text in found.values())
    ):
        return found
    return None
