"""Measure what Day 5 says about virtual tokens and adapters, three seeds each: about two hours on
two CPU cores for tiny, and three for SmolLM2 (week_rates, week, examples_rates, examples, costs).

    python data/recipes/measure_prefix.py           # all
    python data/recipes/measure_prefix.py starts    # one

Writes data/measured/prefix_NAME.json.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from recording import record
from torch import nn

from course_lib import evaluation, models, surgery, world
from course_lib.adapters import (
    add_bottlenecks,
    add_ia3,
    add_mam,
    add_parallel,
    add_unipelt,
    train_biases,
    train_norms,
)
from course_lib.alpaca import Record
from course_lib.batching import encode_records, with_answer
from course_lib.experiments import (
    SEEDS,
    Measure,
    Method,
    Outcome,
    Prepare,
    Sweep,
    added,
    compare,
    week_experiment,
    world_experiment,
)
from course_lib.lora import add_lora
from course_lib.models import Loaded
from course_lib.prefix import add_prefix, add_soft_prompt, shared_start, states_of
from course_lib.runtime import Machine
from course_lib.surgery import ALL_LINEAR
from course_lib.training import Run, finetune

TOKENS, HIDDEN, WIDTH, RANK = 20, 128, 16, 8
STARTS = {  # method, how it starts: rates on tiny
    ("prompt tuning", "random"): (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0),
    ("prompt tuning", "vocabulary"): (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0),
    ("prompt tuning", "text"): (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0),
    ("P-tuning, MLP", "random"): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ("P-tuning, LSTM", "random"): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ("prefix tuning", "random"): (3e-2, 1e-1, 3e-1, 1.0, 3.0),
    ("prefix tuning", "zero"): (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
    ("prefix tuning", "text"): (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    ("prefix tuning, MLP", "random"): (3e-3, 1e-2, 3e-2),
}


def example_of(records: Sequence[Record], base: Loaded) -> list[int]:
    """The last TOKENS tokens of the first example, with its answer."""
    return encode_records(records[:1], base.tokenizer, 256).examples[0].input_ids[-TOKENS:]


def virtual(method: str, start: str, records: Sequence[Record], tokens: int = TOKENS) -> Prepare:
    """Virtual tokens by their name in STARTS."""

    def from_text(base: Loaded) -> None:
        ids = example_of(records, base)
        if method.startswith("prompt"):
            add_soft_prompt(base.model, tokens, start=ids)
        else:
            add_prefix(base.model, tokens, start=states_of(base.model, ids))

    if start == "text":
        return from_text
    name, _, network = method.partition(", ")
    hidden = HIDDEN if network else None
    if name == "prefix tuning":
        return added(add_prefix, tokens, hidden=hidden, start=start)
    encoder = network.lower() or None
    return added(add_soft_prompt, tokens, encoder=encoder, hidden=hidden, start=start)


def starts(machine: Machine) -> Sweep:
    """Virtual tokens on tiny, 20 of them: four kinds and their starts, each at several learning
    rates.
    """
    task = world_experiment()
    methods = [
        Method(name, rate, {"start": start, "tokens": TOKENS}, virtual(name, start, task.train))
        for (name, start), rates in STARTS.items()
        for rate in rates
    ]
    return compare(methods, task, machine)


ADAPTERS = {
    "bottleneck adapters": added(add_bottlenecks, WIDTH),
    "parallel adapters": added(add_parallel, WIDTH),
    "MAM": added(add_mam, TOKENS, WIDTH, hidden=HIDDEN),
    "UniPELT": added(add_unipelt, TOKENS, RANK, WIDTH),
    "IA3": added(add_ia3),
    "BitFit": added(train_biases),
    "norm tuning": added(train_norms),
}
RATES = {  # of these on tiny
    "bottleneck adapters": (1e-3, 3e-3, 1e-2, 3e-2),
    "parallel adapters": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "MAM": (3e-3, 1e-2, 3e-2),
    "UniPELT": (1e-3, 3e-3, 1e-2, 3e-2),
    "IA3": (1e-2, 3e-2, 1e-1, 3e-1),
    "BitFit": (1e-2, 3e-2, 1e-1, 3e-1),
    "norm tuning": (1e-2, 3e-2, 1e-1, 3e-1),
}


def adapters(machine: Machine) -> Sweep:
    """Adapters and small parts of the model on tiny, each at several learning rates."""
    methods = [
        Method(name, rate, {}, ADAPTERS[name]) for name, rates in RATES.items() for rate in rates
    ]
    return compare(methods, world_experiment(), machine)


WEEK = {  # method and its settings: rates that were tried on the validation questions
    ("prompt tuning", "vocabulary"): (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
    ("P-tuning, MLP", "random"): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ("prefix tuning, MLP", "random"): (1e-3, 3e-3, 1e-2),
    ("prefix tuning", "zero"): (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    ("prefix tuning", "text"): (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ("bottleneck adapters", ""): (1e-3, 3e-3, 1e-2),
    ("MAM", ""): (1e-3, 3e-3, 1e-2),
    ("UniPELT", ""): (1e-3, 3e-3, 1e-2),
    ("IA3", ""): (1e-2, 3e-2, 1e-1),
    ("BitFit", ""): (3e-3, 1e-2, 3e-2),
    ("norm tuning", ""): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}


def week_method(name: str, start: str, rate: float, records: Sequence[Record]) -> Method:
    if not start:
        return Method(name, rate, {}, ADAPTERS[name])
    settings = {"start": start, "tokens": TOKENS}
    return Method(name, rate, settings, virtual(name, start, records))


def week_rates(machine: Machine) -> Sweep:
    """The loss on the validation questions of the task of the week, one seed: every method of the
    day at several learning rates.
    """
    validation, task = evaluation.read_task("validation"), week_experiment()

    def score(base: Loaded) -> dict[str, float]:
        return {"validation loss": evaluation.score_answers(base, validation).loss}

    methods = [
        week_method(name, start, rate, task.train)
        for (name, start), rates in WEEK.items()
        for rate in rates
    ]
    task = replace(task, score=score, measures={"validation loss": Measure("nats")})
    return compare(methods, task, machine, seeds=(0,))


WEEK_BEST = {  # by `week_rates`
    ("prompt tuning", "vocabulary"): 1e-1,
    ("P-tuning, MLP", "random"): 1e-1,
    ("prefix tuning, MLP", "random"): 3e-3,
    ("prefix tuning", "zero"): 3e-1,
    ("prefix tuning", "text"): 1e-1,
    ("bottleneck adapters", ""): 3e-3,
    ("MAM", ""): 3e-3,
    ("UniPELT", ""): 3e-3,
    ("IA3", ""): 3e-2,
    ("BitFit", ""): 1e-2,
    ("norm tuning", ""): 3e-3,
}


def week(machine: Machine) -> Sweep:
    """Every method of Day 5 on the task of the week, each at its own learning rate."""
    task = week_experiment()
    methods = [
        week_method(name, start, rate, task.train) for (name, start), rate in WEEK_BEST.items()
    ]
    return compare(methods, task, machine)


def lengths(machine: Machine) -> Sweep:
    """Prefixes of tiny from a random start, of several lengths, each at two learning rates."""
    task = world_experiment()
    methods = [
        Method("prefix tuning", rate, {"start": "random", "tokens": tokens}, prepare)
        for tokens in (1, 5, 20, 80)
        for prepare in [virtual("prefix tuning", "random", task.train, tokens)]
        for rate in (3e-1, 1.0)
    ]
    return compare(methods, task, machine)


FAR = {  # method and start: rates
    ("prompt tuning", "vocabulary"): (3e-2, 1e-1, 3e-1, 1.0, 10.0, 30.0, 100.0),
    ("prefix tuning", "text"): (3e-1, 1.0, 3.0, 10.0),
    ("IA3", ""): (3e-2, 1e-1, 3e-1, 1.0),
    ("norm tuning", ""): (3e-2, 1e-1, 3e-1, 1.0),
    ("bottleneck adapters", ""): (3e-3, 1e-2, 3e-2, 1e-1),
}


def far(machine: Machine) -> Sweep:
    """120 words of a language that tiny has never read, trained and tested on the same records, 300
    steps: what must be learned is not in the model. LoRA and full fine-tuning stand in
    tiny_new_vocabulary.
    """
    records = world.read_kemic()
    methods = [
        week_method(name, start, rate, records)
        for (name, start), rates in FAR.items()
        for rate in rates
    ]
    return compare(methods, world_experiment(records, records, steps=300), machine)


RATES_OF_ANSWERS = ("valid JSON", "right topic", "right answer")
TRAINED = "ten examples, a trained prefix"
EXAMPLES_STEPS, EXAMPLES_RATE = 30, 3e-2  # the rate by `examples_rates`


def with_examples(machine: Machine) -> tuple[Loaded, list[int]]:
    """SmolLM2 with Day 1's ten examples as a prefix, and the ids that it is made of."""
    base = models.load("smollm2-135m", machine, say=lambda line: None)
    shots, asked = evaluation.draw_examples(0), evaluation.read_task("test")[:2]
    prompts = [evaluation.chat_prompt(base, evaluation.asked(one), shots) for one in asked]
    prompt = shared_start(prompts)
    add_prefix(base.model, len(prompt), start=states_of(base.model, prompt))
    return base, prompt


def next_turns(base: Loaded, prompt: list[int], records: Sequence[Record]) -> list[list[int]]:
    """The questions as the next turn of that chat."""
    shots = evaluation.draw_examples(0)
    asked = [evaluation.chat_prompt(base, evaluation.asked(one), shots) for one in records]
    return [ids[len(prompt) :] for ids in asked]


def trained_examples(machine: Machine, rate: float, seed: int) -> tuple[Loaded, list[int], Run]:
    base, prompt = with_examples(machine)
    train = evaluation.read_task("train")
    examples = [
        with_answer(ids, one.output, base.tokenizer)
        for ids, one in zip(next_turns(base, prompt, train), train, strict=True)
    ]
    settings = {"steps": EXAMPLES_STEPS, "batch_size": 4, "warmup_steps": 3, "seed": seed}
    run = finetune(base, examples, machine, **settings, learning_rate=rate, progress=False)
    return base, prompt, run


def examples_rates(machine: Machine) -> Sweep:
    """Validation questions of the task of the week that Day 1's ten examples, as a trained prefix,
    answer right, one seed: 30 steps at several learning rates.
    """
    validation, outcomes = evaluation.read_task("validation"), []
    for rate in (1e-2, 3e-2, 1e-1):
        base, prompt, run = trained_examples(machine, rate, 0)
        scores, _ = scores_of(base, next_turns(base, prompt, validation), validation)
        settings = {"steps": EXAMPLES_STEPS, "learning rate": rate}
        outcomes.append(outcome_of(TRAINED, settings, 0, base, scores, run))
    measures = dict.fromkeys(RATES_OF_ANSWERS, Measure("percent", len(validation)))
    return Sweep(outcomes, measures)


def scores_of(
    base: Loaded, prompts: list[list[int]], records: Sequence[Record], batch_size: int = 64
) -> tuple[dict[str, float], list[str]]:
    """In percent, and the replies."""
    replies = evaluation.generate(base, prompts, evaluation.ANSWER_TOKENS, batch_size)
    judged = [evaluation.judge(one, reply) for one, reply in zip(records, replies, strict=True)]
    scores = {
        name: 100
        * sum(getattr(one, name.lower().replace(" ", "_")) for one in judged)
        / len(judged)
        for name in RATES_OF_ANSWERS
    }
    return scores, replies


def outcome_of(
    name: str, settings: dict, seed: int, base: Loaded, scores: dict[str, float], run: Run
) -> Outcome:
    trained = surgery.count_parameters(base.model).trained
    return Outcome(name, settings, seed, trained, scores, run.seconds, run.peak_bytes)


def examples(machine: Machine) -> Sweep:
    """Day 1's ten examples on a hundred test questions, as words of a chat, as the keys and values
    that these leave, and as a prefix that was trained for 30 steps on the task of the week.
    """
    asked, shots = evaluation.draw_questions(100), evaluation.draw_examples(0)
    base = models.load("smollm2-135m", machine)
    prompts = [evaluation.chat_prompt(base, evaluation.asked(one), shots) for one in asked]
    scores, words = scores_of(base, prompts, asked, batch_size=8)
    outcomes = [Outcome("ten examples, words", {}, 0, 0, scores | {"same reply": 100.0})]
    base, prompt = with_examples(machine)
    scores, replies = scores_of(base, next_turns(base, prompt, asked), asked)
    scores["same reply"] = 100 * sum(map(str.__eq__, words, replies)) / len(words)
    outcomes.append(Outcome("ten examples, keys and values", {}, 0, 0, scores))
    for seed in SEEDS:
        base, prompt, run = trained_examples(machine, EXAMPLES_RATE, seed)
        scores, replies = scores_of(base, next_turns(base, prompt, asked), asked)
        scores["same reply"] = 100 * sum(map(str.__eq__, words, replies)) / len(words)
        settings = {"steps": EXAMPLES_STEPS, "learning rate": EXAMPLES_RATE}
        outcomes.append(outcome_of(TRAINED, settings, seed, base, scores, run))
    names = (*RATES_OF_ANSWERS, "same reply")
    return Sweep(outcomes, dict.fromkeys(names, Measure("percent", len(asked))))


ROUNDS, COST_TOKENS = 5, 16


def costs(machine: Machine) -> Sweep:
    """The time of eight answers of 16 tokens with each method in SmolLM2, in percent of the
    untouched model's; a seed is a round, in which all take turns.
    """
    base = models.load("smollm2-135m", machine)
    asked, shots = evaluation.read_task("test")[:8], evaluation.draw_examples(0)
    plain = [evaluation.chat_prompt(base, evaluation.asked(one)) for one in asked]
    long = [evaluation.chat_prompt(base, evaluation.asked(one), shots) for one in asked]

    def fresh(add: Callable[[nn.Module], None]) -> nn.Module:
        model = models.load("smollm2-135m", machine, say=lambda line: None).model
        add(model)
        return model

    ways = {
        "untouched": (base.model, plain),
        "ten examples in the prompt": (base.model, long),
        "ten examples, keys and values": (with_examples(machine)[0].model, plain),
        "prompt tuning": (fresh(lambda model: add_soft_prompt(model, TOKENS)), plain),
        "prefix tuning": (fresh(lambda model: add_prefix(model, TOKENS)), plain),
        "LoRA": (fresh(lambda model: add_lora(model, RANK, 2 * RANK, ALL_LINEAR)), plain),
        "IA3": (fresh(add_ia3), plain),
        "bottleneck adapters": (fresh(lambda model: add_bottlenecks(model, WIDTH)), plain),
        "parallel adapters": (fresh(lambda model: add_parallel(model, WIDTH)), plain),
        "UniPELT": (fresh(lambda model: add_unipelt(model, TOKENS, RANK, WIDTH)), plain),
    }
    outcomes = []
    for turn in range(-1, ROUNDS):  # the first one warms up
        seconds = {name: answer_seconds(base, *way) for name, way in ways.items()}
        if turn >= 0:
            outcomes += [
                Outcome(name, {}, turn, 0, {"time of an answer": 100 * time / seconds["untouched"]})
                for name, time in seconds.items()
            ]
    return Sweep(outcomes, {"time of an answer": Measure("percent")})


def answer_seconds(base: Loaded, model: nn.Module, prompts: list[list[int]]) -> float:
    """Padded on the left, as one batch; no reply ends early."""
    longest, pad_id = max(map(len, prompts)), base.tokenizer.pad_token_id
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    start = perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=COST_TOKENS,
            max_new_tokens=COST_TOKENS,
            pad_token_id=pad_id,
        )
    return perf_counter() - start


RECIPES = (
    *(starts, adapters, lengths, far),
    *(week_rates, week, examples_rates, examples, costs),
)

if __name__ == "__main__":
    record(RECIPES, "prefix_")
