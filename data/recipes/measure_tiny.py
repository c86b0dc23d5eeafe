"""Measure on the tiny model which effects of the week it shows, three seeds each: about 30 minutes
on two CPU cores.

    python data/recipes/measure_tiny.py                # all
    python data/recipes/measure_tiny.py quantisation   # one

Writes data/measured/tiny_NAME.json. Everything goes through peft and bitsandbytes as they are.
"""

import logging
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import corpus
import recording
import torch

from course_lib import evaluation, experiments, models, runtime, training, world
from course_lib.batching import encode_records
from course_lib.experiments import (
    SEEDS,
    Measure,
    Method,
    Outcome,
    Prepare,
    Sweep,
    compare,
    world_experiment,
)
from course_lib.models import Loaded
from course_lib.runtime import Machine

FULL_RATE, LORA_RATE = 5e-4, 5e-3
SPOILT, DRAW = 0.2, 0  # the share of records that are left out, repeated or wrong, and which
STORY_TOKENS = 200
ALL = "all linear layers"
FORMATS = {
    "float32": None,
    "int8": {"load_in_8bit": True},
    "NF4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "FP4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
}


def lora(rank: int) -> Prepare:
    """peft's LoRA on all linear layers, alpha twice the rank."""

    def prepare(base: Loaded) -> None:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
        )
        base.model = get_peft_model(base.model, settings)

    return prepare


def formats(machine: Machine) -> Sweep:
    """The untouched tiny asked in three formats: is the first line of its reply the answer?

    A seed draws wordings.
    """
    base = models.load("tiny", machine)
    test = [record for record in world.read_world("test") if record.extra["task"] in corpus.ASKED]
    outcomes = []
    for name, (wordings, template) in {
        "Question: ... Answer:": (corpus.QUESTIONS, "Question: {}\nAnswer:"),
        "Task: ... Text: ... Solution:": (corpus.HEADINGS, "Task: {}\nText: {}\nSolution:"),
        "Alpaca": (None, ""),
    }.items():
        for seed in SEEDS:
            draw, prompts = random.Random(seed), []
            for record in test:
                if wordings is None:
                    prompts.append(record.prompt)
                    continue
                wording = draw.choice(wordings[record.extra["task"]].split(" / "))
                subject = record.extra["subject"]
                prompts.append(
                    template.format(wording.format(subject))
                    if "{}" in wording
                    else template.format(wording, subject)
                )
            replies = evaluation.generate(
                base, [base.tokenizer(prompt)["input_ids"] for prompt in prompts], 12
            )
            right = [
                reply.split("\n")[0] == record.output
                for reply, record in zip(replies, test, strict=True)
            ]
            easy = [
                hit
                for hit, record in zip(right, test, strict=True)
                if record.extra["task"] not in world.HARD
            ]
            scores = {
                "right first line": 100 * sum(right) / len(right),
                "not hard": 100 * sum(easy) / len(easy),
            }
            outcomes.append(Outcome("untouched", {"format": name}, seed, 0, scores))
            if wordings is None:
                break  # nothing is drawn
    measures = {
        "right first line": Measure("percent", len(right)),
        "not hard": Measure("percent", len(easy)),
    }
    return Sweep(outcomes, measures)


def fine_tuning(machine: Machine) -> Sweep:
    """tiny before and after full fine-tuning on the tasks of its world."""
    return compare(
        [Method("untouched", None), Method("full fine-tuning", FULL_RATE)],
        world_experiment(),
        machine,
    )


def prompt_masking(machine: Machine) -> Sweep:
    """tiny trained on the answer only, and on all tokens."""
    methods = [
        Method("full fine-tuning", rate, {"loss on": label}, mask_prompt=masked)
        for rate in (FULL_RATE, 2 * FULL_RATE, 4 * FULL_RATE, 8 * FULL_RATE)
        for label, masked in (("answer only", True), ("all tokens", False))
    ]
    return compare(methods, world_experiment(), machine)


def data_quality(machine: Machine) -> Sweep:
    """Full fine-tuning of tiny on 1,080 records of its world, a fifth of them spoilt; every row
    sees as many examples.
    """
    records, outcomes = world.read_world("train"), []
    sets = {
        "as it is": records,
        "20 % left out": random.Random(DRAW).sample(
            records, len(records) - round(SPOILT * len(records))
        ),
        "20 % replaced by copies": world.replace_by_copies(records, SPOILT, DRAW),
        "20 % of the answers wrong": world.corrupt_answers(records, SPOILT, DRAW),
    }
    for name, train in sets.items():
        sweep = compare(
            [Method("full fine-tuning", FULL_RATE, {"data": name})],
            world_experiment(train),
            machine,
        )
        outcomes += sweep.outcomes
    return replace(sweep, outcomes=outcomes)


def lora_rank(machine: Machine) -> Sweep:
    """LoRA on tiny through peft, by rank."""
    methods = lora_methods([*((rank, LORA_RATE) for rank in (1, 4, 16, 64)), (64, 2e-3)])
    return compare(methods, world_experiment(), machine)


def lora_methods(ranks_and_rates: list[tuple[int, float]]) -> list[Method]:
    return [
        Method("LoRA", rate, {"rank": rank, "layers": ALL}, lora(rank))
        for rank, rate in ranks_and_rates
    ]


def new_vocabulary(machine: Machine) -> Sweep:
    """120 words of a language that tiny has never read, trained and tested on the same records:
    what is asked is memory.
    """
    records = world.read_kemic()
    methods = lora_methods(
        [*((rank, LORA_RATE) for rank in (1, 4, 16, 64)), (16, 2e-3), (64, 2e-3)]
    )
    methods += [Method("full fine-tuning", rate) for rate in (FULL_RATE, 2 * FULL_RATE)]
    return compare(methods, world_experiment(records, records, steps=300), machine)


def quantised(settings: dict | None, folder: Path | None = None) -> Callable[[Loaded], None]:
    """Replace the base by one that bitsandbytes has quantised, from `folder` or as it ships.
    settings: None for float32.
    """

    def prepare(base: Loaded) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        options = (
            {} if settings is None else {"quantization_config": BitsAndBytesConfig(**settings)}
        )
        with runtime.quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                folder or models.tiny_folder(), dtype=torch.float32, **options
            )
        base.model = model if settings else model.to(base.model.device)

    return prepare


def quantisation(machine: Machine) -> Sweep:
    """Three models after full fine-tuning, since the untouched one does not know the format; their
    linear weights rounded.
    """
    task, outcomes = world_experiment(), []
    for seed in SEEDS:
        base = models.load("tiny", machine)
        examples = encode_records(task.train, base.tokenizer, experiments.MAX_TOKENS).examples
        training.finetune(
            base,
            examples,
            machine,
            steps=task.steps,
            batch_size=task.batch_size,
            learning_rate=FULL_RATE,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            base.model.save_pretrained(folder)
            methods = [
                Method(
                    "rounded after training",
                    None,
                    {"format": name},
                    quantised(settings, Path(folder)),
                )
                for name, settings in FORMATS.items()
            ]
            sweep = compare(methods, task, machine)
            outcomes += [replace(outcome, seed=seed) for outcome in sweep.outcomes]
    return replace(sweep, outcomes=outcomes)


def weight_error(machine: Machine) -> Sweep:
    """Root mean square error over root mean square of tiny's linear weights, in blocks of 64 (int8:
    rows).
    """
    from bitsandbytes import functional

    def restored(weight: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "int8":
            codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
            return codes.float() * absmax[:, None].float() / 127
        return functional.dequantize_4bit(
            *functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        )

    blocks = models.load("tiny", machine).model.model.layers
    weights = [
        module.weight.data for module in blocks.modules() if isinstance(module, torch.nn.Linear)
    ]
    power = sum(weight.square().sum() for weight in weights)
    outcomes = []
    for name in ("int8", "NF4", "FP4"):
        error = sum((restored(weight, name.lower()) - weight).square().sum() for weight in weights)
        scores = {"relative error": 100 * (error / power).sqrt().item()}
        outcomes.append(Outcome("rounded", {"format": name}, 0, 0, scores))
    return Sweep(outcomes, {"relative error": Measure("percent")})


def qlora(machine: Machine) -> Sweep:
    """LoRA through peft on a base in each format."""

    def on(settings: dict | None) -> Callable[[Loaded], None]:
        def prepare(base: Loaded) -> None:
            from peft import prepare_model_for_kbit_training

            quantised(settings)(base)
            if settings is not None:
                base.model = prepare_model_for_kbit_training(
                    base.model, use_gradient_checkpointing=False
                )
            lora(8)(base)

        return prepare

    methods = [
        Method("LoRA", LORA_RATE, {"rank": 8, "base": f"base in {name}"}, on(settings))
        for name, settings in FORMATS.items()
    ]
    return compare(methods, world_experiment(), machine)


def prefix(machine: Machine) -> Sweep:
    """Prefix tuning of tiny through peft, 10 tokens, with and without an MLP that makes them."""

    def tuned(projected: bool) -> Callable[[Loaded], None]:
        def prepare(base: Loaded) -> None:
            from peft import PrefixTuningConfig, get_peft_model

            settings = PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=10,
                prefix_projection=projected,
                encoder_hidden_size=128,
            )
            base.model = get_peft_model(base.model, settings)

        return prepare

    methods = [
        Method(
            "prefix tuning",
            rate,
            {"prefix": "made by an MLP" if projected else "itself"},
            tuned(projected),
        )
        for projected, rate in ((False, 1e-2), (False, 1e-1), (True, 3e-3), (True, 1e-2))
    ]
    return compare(methods, world_experiment(), machine)


def repetition(machine: Machine) -> Sweep:
    """Stories of tiny with the end token forbidden; a seed is another set of 16 beginnings, since
    greedy decoding has none.
    """
    base = models.load("tiny", machine)
    settings = {
        "greedy": {},
        "repetition penalty 1.2": {"repetition_penalty": 1.2},
        "repetition penalty 1.5": {"repetition_penalty": 1.5},
        "no repeated 4-gram": {"no_repeat_ngram_size": 4},
        "sampling at temperature 1": {"do_sample": True, "top_k": 0},
    }
    names = [person.name for person in world.people()]
    outcomes = []
    for name, options in settings.items():
        for seed in SEEDS:
            runtime.seed_everything(seed)
            beginnings = [
                f"One morning, {hero} went to the market."
                for hero in names[seed * 16 : seed * 16 + 16]
            ]
            ids = torch.tensor(base.tokenizer(beginnings)["input_ids"]).to(
                base.model.device
            )  # every name is one piece: equal lengths
            with torch.inference_mode():
                generated = base.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=STORY_TOKENS,
                    min_new_tokens=STORY_TOKENS,
                    pad_token_id=base.tokenizer.pad_token_id,
                    **({"do_sample": False} | options),
                )
            rows = generated[:, ids.shape[1] :].tolist()
            fours = [[tuple(row[i : i + 4]) for i in range(len(row) - 3)] for row in rows]
            repeated = sum(1 - len(set(grams)) / len(grams) for grams in fours) / len(fours)
            outcomes.append(
                Outcome("decoding", {"how": name}, seed, 0, {"repeated 4-grams": 100 * repeated})
            )
    return Sweep(outcomes, {"repeated 4-grams": Measure("percent")})


RECIPES = (
    *(formats, fine_tuning, prompt_masking, data_quality, lora_rank, new_vocabulary),
    *(weight_error, quantisation, qlora, prefix, repetition),
)

if __name__ == "__main__":
    # one line a layer about a cast to float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    recording.record(RECIPES, "tiny_")
