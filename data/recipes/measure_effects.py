"""Measure on the tiny model which effects of the week it shows, three seeds each, for the tables in data/tiny_llama/README.md.

    python data/recipes/measure_effects.py                # all, about 25 minutes on two CPU cores
    python data/recipes/measure_effects.py quantisation   # one, the others are kept

Writes data/tiny_llama/effects.json: the outcomes by effect. Everything goes through peft and bitsandbytes as they are.
"""

import json
import logging
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from course_lib import corpus, evaluation, experiments, models, runtime, training, world
from course_lib.batching import encode_records
from course_lib.experiments import SEEDS, Method, Outcome, Prepare, compare, world_experiment
from course_lib.models import Loaded
from course_lib.runtime import Machine

TARGET = Path(__file__).resolve().parents[1] / "tiny_llama" / "effects.json"
FULL_RATE, LORA_RATE = 5e-4, 5e-3
STORY_TOKENS = 200
FORMATS = {
    "float32": None,
    "int8": {"load_in_8bit": True},
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "FP4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
}


def lora(rank: int) -> Prepare:
    """peft's LoRA on all linear layers, alpha twice the rank."""

    def prepare(base: Loaded) -> None:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        base.model = get_peft_model(base.model, settings)

    return prepare


def formats(machine: Machine) -> list[Outcome]:
    """The untouched base in three formats; right is a reply whose first line is the answer. A seed draws wordings."""
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
                prompts.append(template.format(wording.format(subject)) if "{}" in wording else template.format(wording, subject))
            replies = evaluation.generate(base, [base.tokenizer(prompt)["input_ids"] for prompt in prompts], 12)
            right = [reply.split("\n")[0] == record.output for reply, record in zip(replies, test, strict=True)]
            easy = [hit for hit, record in zip(right, test, strict=True) if record.extra["task"] not in world.HARD]
            scores = {"right first line": sum(right) / len(right), "not hard": sum(easy) / len(easy)}
            outcomes.append(Outcome(name, seed, 0, scores, 0.0, 0))
            if wordings is None:
                break  # nothing is drawn
    return outcomes


def fine_tuning(machine: Machine) -> list[Outcome]:
    return compare([Method("untouched", None), Method("full fine-tuning", FULL_RATE)], world_experiment(), machine)


def prompt_masking(machine: Machine) -> list[Outcome]:
    rates = (FULL_RATE, 2 * FULL_RATE)
    return compare(
        [
            Method(f"{label}, {rate:g}", rate, mask_prompt=masked)
            for rate in rates
            for label, masked in (("answer only", True), ("all tokens", False))
        ],
        world_experiment(),
        machine,
    )


def lora_rank(machine: Machine) -> list[Outcome]:
    methods = [Method(f"r={rank}, {LORA_RATE:g}", LORA_RATE, lora(rank)) for rank in (1, 4, 16, 64)]
    return compare([*methods, Method("r=64, 0.002", 2e-3, lora(64))], world_experiment(), machine)


def new_vocabulary(machine: Machine) -> list[Outcome]:
    """A hundred and twenty words that nothing prepares for, trained and tested on the same records: what is asked is memory."""
    records = world.read_kemic()
    experiment = world_experiment(records, records, steps=300)
    methods = [Method(f"r={rank}, {LORA_RATE:g}", LORA_RATE, lora(rank)) for rank in (1, 4, 16, 64)]
    methods += [Method(f"r={rank}, 0.002", 2e-3, lora(rank)) for rank in (16, 64)]
    methods += [Method(f"full fine-tuning, {rate:g}", rate) for rate in (FULL_RATE, 2 * FULL_RATE)]
    return compare(methods, experiment, machine)


def quantised(settings: dict | None, folder: Path | None = None) -> Callable[[Loaded], None]:
    """Replace the base by one that bitsandbytes has quantised, from `folder` or as it ships. settings: None for float32."""

    def prepare(base: Loaded) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        options = {} if settings is None else {"quantization_config": BitsAndBytesConfig(**settings)}
        with runtime.quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder or models.tiny_folder(), dtype=torch.float32, **options)
        base.model = model if settings else model.to(base.model.device)

    return prepare


def quantisation(machine: Machine) -> list[Outcome]:
    """Of three models after full fine-tuning, since the untouched one does not know the format."""
    task, outcomes = world_experiment(), []
    for seed in SEEDS:
        base = models.load("tiny", machine)
        examples = encode_records(task.train, base.tokenizer, experiments.MAX_TOKENS).examples
        training.finetune(base, examples, machine, steps=task.steps, batch_size=task.batch_size, learning_rate=FULL_RATE, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            base.model.save_pretrained(folder)
            methods = [Method(name, None, quantised(settings, Path(folder))) for name, settings in FORMATS.items()]
            outcomes += [replace(outcome, seed=seed) for outcome in compare(methods, task, machine)]
    return outcomes


def weight_error(machine: Machine) -> list[Outcome]:
    """Root mean square error over root mean square of all linear weights of the blocks, in blocks of 64 (int8: rows)."""
    from bitsandbytes import functional

    def restored(weight: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "int8":
            codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
            return codes.float() * absmax[:, None].float() / 127
        return functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type=kind))

    blocks = models.load("tiny", machine).model.model.layers
    weights = [module.weight.data for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
    power = sum(weight.square().sum() for weight in weights)
    outcomes = []
    for kind in ("int8", "nf4", "fp4"):
        error = sum((restored(weight, kind) - weight).square().sum() for weight in weights)
        outcomes.append(Outcome(kind, 0, 0, {"relative error": (error / power).sqrt().item()}, 0.0, 0))
    return outcomes


def qlora(machine: Machine) -> list[Outcome]:
    """LoRA r=8 on a base in each format."""

    def on(settings: dict | None) -> Callable[[Loaded], None]:
        def prepare(base: Loaded) -> None:
            from peft import prepare_model_for_kbit_training

            quantised(settings)(base)
            if settings is not None:
                base.model = prepare_model_for_kbit_training(base.model, use_gradient_checkpointing=False)
            lora(8)(base)

        return prepare

    return compare(
        [Method(f"LoRA on {name}", LORA_RATE, on(settings)) for name, settings in FORMATS.items()], world_experiment(), machine
    )


def prefix(machine: Machine) -> list[Outcome]:
    def tuned(projected: bool) -> Callable[[Loaded], None]:
        def prepare(base: Loaded) -> None:
            from peft import PrefixTuningConfig, get_peft_model

            settings = PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=10, prefix_projection=projected, encoder_hidden_size=128
            )
            base.model = get_peft_model(base.model, settings)

        return prepare

    methods = [Method(f"prefix, {rate:g}", rate, tuned(False)) for rate in (1e-2, 1e-1)]
    methods += [Method(f"prefix with MLP, {rate:g}", rate, tuned(True)) for rate in (3e-3, 1e-2)]
    return compare(methods, world_experiment(), machine)


def repetition(machine: Machine) -> list[Outcome]:
    """Greedy stories with the end token forbidden; a "seed" is another set of 16 beginnings, since greedy decoding has none."""
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
            beginnings = [f"One morning, {hero} went to the market." for hero in names[seed * 16 : seed * 16 + 16]]
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
            outcomes.append(Outcome(name, seed, 0, {"repeated 4-grams": repeated}, 0.0, 0))
    return outcomes


EFFECTS = {
    effect.__name__: effect
    for effect in (
        formats,
        fine_tuning,
        prompt_masking,
        lora_rank,
        new_vocabulary,
        weight_error,
        quantisation,
        qlora,
        prefix,
        repetition,
    )
}


def main() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line a layer about a cast to float16
    wanted = sys.argv[1:] or list(EFFECTS)
    if unknown := [name for name in wanted if name not in EFFECTS]:
        raise SystemExit(f"effect {unknown[0]!r} is not known, expected some of {', '.join(EFFECTS)}")
    machine = runtime.detect()
    kept = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    for name in wanted:
        outcomes = EFFECTS[name](machine)
        kept[name] = experiments.as_json(outcomes)
        TARGET.write_text(
            json.dumps({effect: kept[effect] for effect in EFFECTS if effect in kept}, indent=1) + "\n", encoding="utf-8"
        )
        print(f"\n{name}")
        print(experiments.markdown(experiments.summary(outcomes)))


if __name__ == "__main__":
    main()
