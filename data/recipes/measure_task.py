"""Measure full fine-tuning and LoRA on the task of the week, three seeds each, for the table in data/README.md.

    python data/recipes/measure_task.py        # about 15 minutes on two CPU cores

Writes data/task_baselines.json: one row a run, with the recipe of Day 1 (32 steps of 4 questions of the train split), scored on the
whole test split and on all retention questions. LoRA is peft's, rank 8 on all linear layers.
"""

import json
from pathlib import Path

from course_lib import batching, evaluation, models, runtime, training

TARGET = Path(__file__).parent.parent / "task_baselines.json"
SEEDS = (0, 1, 2)
RECIPE = {"steps": 32, "batch_size": 4, "warmup_steps": 3}
LEARNING_RATE = {"full": 1e-4, "lora": 1e-3}


def add_adapter(base: models.Loaded) -> None:
    from peft import LoraConfig, get_peft_model

    base.model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))


def score(base: models.Loaded) -> dict[str, float]:
    task = evaluation.evaluate(base, evaluation.read_task("test"))
    retention = evaluation.evaluate_retention(base, evaluation.read_retention())
    rates = {name: round(task.rate(name), 4) for name in ("valid_json", "right_topic", "right_answer")}
    return {**rates, "retention": round(retention.rate, 4), "retention_wrapped": round(retention.wrapped_rate, 4)}


def main() -> None:
    machine = runtime.detect()
    base = models.load("smollm2-135m", machine)
    if base.name != "smollm2-135m":
        raise SystemExit(f"the table needs smollm2-135m, found {base.origin}")
    rows = [{"method": "untouched", **score(base)}]
    for method, learning_rate in LEARNING_RATE.items():
        for seed in SEEDS:
            runtime.seed_everything(seed)
            base = models.load("smollm2-135m", machine)
            if method == "lora":
                add_adapter(base)
            examples = batching.encode_records(evaluation.read_task("train"), base.tokenizer, max_tokens=256).examples
            run = training.finetune(base, examples, machine, learning_rate=learning_rate, seed=seed, **RECIPE)
            trained = sum(weight.numel() for weight in base.model.parameters() if weight.requires_grad)
            last_loss = round(sum(run.losses[-5:]) / 5, 4)
            rows.append({"method": method, "seed": seed, "trained": trained, "last_loss": last_loss, **score(base)})
            print(rows[-1], f"{run.seconds:.0f} s")
    TARGET.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
