"""Train the adapters of the week, with which later days open: about three minutes on two CPU cores.

    python data/recipes/train_adapters.py

data/adapters/week        LoRA, rank 8 on q and v, of SmolLM2-135M-Instruct: the task of the week,
                          as in the table of the week
data/adapters/world       LoRA, rank 8 on all linear layers, of `tiny`: the tasks of its world

The matrices are written in fp16, half the bytes. Both are printed with their scores on the held-out
questions, as they are read from the file again.
"""

import shutil
from dataclasses import dataclass

import torch

from course_lib import evaluation, models, runtime, world
from course_lib.adapter_files import load_adapter, save_adapter
from course_lib.batching import encode_records
from course_lib.experiments import adapted
from course_lib.surgery import ALL_LINEAR, Targets
from course_lib.training import finetune

FOLDER = runtime.data_folder() / "adapters"
RANK = 8


@dataclass(frozen=True)
class Recipe:
    base: str
    targets: Targets
    learning_rate: float
    steps: int
    batch_size: int
    warmup_steps: int


RECIPES = {
    "week": Recipe("smollm2-135m", ["q_proj", "v_proj"], 5e-3, 32, 4, 3),
    "world": Recipe("tiny", ALL_LINEAR, 5e-3, 150, 16, 0),
}


def main() -> None:
    machine = runtime.detect()
    for name, recipe in RECIPES.items():
        read = evaluation.read_task if name == "week" else world.read_world
        base = models.load(recipe.base, machine)
        if base.name != recipe.base:
            raise SystemExit(f"this adapter needs {recipe.base}, found {base.origin}")
        runtime.seed_everything(0)
        adapted(RANK, targets=recipe.targets)(base)
        examples = encode_records(read("train"), base.tokenizer, max_tokens=512).examples
        run = finetune(
            base,
            examples,
            machine,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            warmup_steps=recipe.warmup_steps,
            learning_rate=recipe.learning_rate,
        )
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        save_adapter(base.model, FOLDER / name, dtype=torch.float16)
        base = models.load(recipe.base, machine)
        load_adapter(base.model, FOLDER / name)
        score = evaluation.score_answers(base, read("test"))
        size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
        print(run)
        print(f"{name}: {size / 1e6:.2f} MB, loss {score.loss:.3f}, exact {score.exact_rate:.1%}")


if __name__ == "__main__":
    main()
