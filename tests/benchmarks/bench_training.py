"""Fine-tuning: `finetune` against trl's SFTTrainer.

SmolLM2-135M on the task of the week, 16 records in 4 steps, supervised tokens a second. Counted are trl's `train()` and the whole
of `finetune`; tokenizing and the construction of trl's trainer are not. Both see the same batches in the same order, with AdamW,
linear decay, no warm-up, no weight decay, gradients clipped to norm 1, float32, and one seed. LoRA has rank 8 on q and v:
`finetune` trains the course's own, trl peft's. trl gets the columns `prompt` and `completion`, so its loss is on the completion
alone. Settings of `SFTConfig` that differ from its defaults: `bf16=False`, `use_cpu=True` and `gradient_checkpointing=False`, for
float32 on a CPU with memory to spare (checkpointing would cost it time), and `train_sampling_strategy="sequential"` on records in
our order.

`finetune` puts only the supervised positions through the output head. trl 1.16 does so where it has Triton, on GPUs; on a CPU it
puts all positions through the head, and builds the logits a second time in the backward pass, to save memory. Grouping by length is
off in both arms, as in Day 1; trl can group, too. What head and grouping give to `finetune` stands apart.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor, nn

from course_lib import batching, evaluation, experiments, models, runtime, training
from tests.benchmarks.measuring import interleaved

MODEL = "smollm2-135m"
STEPS, BATCH = 4, 4  # Day 1's batch; some seconds a run on two cores
MAX_TOKENS = 256
HELD_OUT = 32
SEED = 0
RANK, TARGETS = 8, ["q_proj", "v_proj"]
LEARNING_RATES = {"full": 1e-4, "LoRA": 1e-3}
Run = Callable[[], tuple[float, tuple[int, int]]]


@pytest.fixture(scope="module")
def batches(machine: runtime.Machine) -> list[list[int]]:
    """Indices of training records: whole batches of an epoch grouped by length, drawn at random."""
    examples = encoded(models.load(MODEL, machine), evaluation.read_task("train"))
    order = batching.length_grouped_order([len(example) for example in examples], BATCH, SEED)
    groups = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return random.Random(SEED).sample([group for group in groups if len(group) == BATCH], STEPS)


def encoded(base: models.Loaded, records: list) -> list[batching.Example]:
    encoding = batching.encode_records(records, base.tokenizer, MAX_TOKENS)
    assert not encoding.refused
    return encoding.examples


def fresh(machine: runtime.Machine) -> models.Loaded:
    base = models.load(MODEL, machine)
    assert base.name == MODEL, base.origin
    runtime.seed_everything(SEED)  # LoRA's first weights
    return base


def library_loss(model: nn.Module, batch: dict[str, Tensor], reduction: str) -> Tensor:
    """What the Trainer computes without us: all positions go through the head."""
    assert reduction == "sum"
    return model(**batch, use_cache=False, num_items_in_batch=1).loss


@contextmanager
def in_groups() -> Iterator[None]:
    """The records in the order in which they were drawn, one group a batch."""
    with mock.patch.object(training, "training_order", return_value=list(range(STEPS * BATCH))):
        yield


class Arms:
    """The runs of one method on the same records; each leaves its response loss on held-out records behind, once."""

    def __init__(self, method: str, records: list, machine: runtime.Machine, folder: Path):
        self.method, self.records, self.machine, self.folder = method, records, machine, folder
        self.held_out: dict[str, float] = {}

    def score(self, arm: str, base: models.Loaded) -> None:
        if arm not in self.held_out:
            self.held_out[arm] = evaluation.score_answers(base, evaluation.read_task("validation")[:HELD_OUT]).loss

    def ours(self, arm: str = "ours") -> tuple[float, tuple[int, int]]:
        base = fresh(self.machine)
        examples = encoded(base, self.records)
        if self.method == "LoRA":
            experiments.adapted(RANK, targets=TARGETS)(base)
        with runtime.measure() as cost:
            run = training.finetune(
                base,
                examples,
                self.machine,
                steps=STEPS,
                batch_size=BATCH,
                learning_rate=LEARNING_RATES[self.method],
                seed=SEED,
                progress=False,
            )
        assert len(run.losses) == STEPS
        self.score(arm, base)
        return cost.seconds, (len(self.records), run.supervised_tokens)

    def ours_with_library_loss(self) -> tuple[float, tuple[int, int]]:
        with mock.patch.object(training, "supervised_loss", library_loss):
            return self.ours("library's loss")

    def ours_grouped(self) -> tuple[float, tuple[int, int]]:
        with in_groups():
            return self.ours("grouped")

    def trl(self) -> tuple[float, tuple[int, int]]:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        base = fresh(self.machine)
        examples = encoded(base, self.records)
        order = training.training_order([len(example) for example in examples], STEPS, BATCH, False, SEED)
        rows = [{"prompt": self.records[index].prompt, "completion": self.records[index].output} for index in order]
        adapter = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
        trainer = SFTTrainer(
            model=base.model,
            args=SFTConfig(
                output_dir=str(self.folder),
                num_train_epochs=1,
                per_device_train_batch_size=BATCH,
                learning_rate=LEARNING_RATES[self.method],
                seed=SEED,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                train_sampling_strategy="sequential",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            peft_config=adapter if self.method == "LoRA" else None,
        )
        found = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
        assert found == [(examples[index].input_ids, examples[index].labels) for index in order], "trl tokenized otherwise"
        assert not trainer.args.activation_checkpointing
        with runtime.measure() as cost:
            trainer.train()
        assert trainer.state.global_step == STEPS
        base.model = trainer.model
        self.score("trl", base)
        return cost.seconds, (len(found), sum(label != batching.IGNORED for _, labels in found for label in labels))


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_finetune_is_faster_than_trl(method, batches, machine, tmp_path, row):
    train = evaluation.read_task("train")
    arms = Arms(method, [train[index] for group in batches for index in group], machine, tmp_path)
    runs: dict[str, Run] = {"ours": arms.ours, "trl": arms.trl}
    if method == "full":
        runs |= {"library's loss": arms.ours_with_library_loss, "grouped": arms.ours_grouped}
    rounds = interleaved(runs)
    _, supervised = rounds.work
    row(f"{method}: trl", rounds.rates("trl", supervised), "supervised tokens/s")
    row(f"{method}: ours", rounds.rates("ours", supervised), "supervised tokens/s")
    row(f"{method}: ours / trl", rounds.times_faster("ours", than="trl"), "times", at_least=1.3)
    difference = abs(arms.held_out["ours"] - arms.held_out["trl"])
    row(f"{method}: response loss on {HELD_OUT} held-out records, ours", arms.held_out["ours"], "nats")
    row(f"{method}: its difference to trl's", difference, "nats", at_most=0.02)
    if method == "full":
        row("full, of it: only supervised positions in the head", rounds.times_faster("ours", than="library's loss"), "times")
        row("full, on top: grouping by length", rounds.times_faster("grouped", than="ours"), "times")
        row("full: ours, grouped / trl", rounds.times_faster("grouped", than="trl"), "times")
