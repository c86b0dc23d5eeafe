"""Fine-tuning: `finetune` against trl's SFTTrainer.

SmolLM2-135M, supervised tokens a second. Counted are trl's `train()` and the whole of `finetune`;
tokenizing and the construction of trl's trainer are not. Both train with AdamW, linear decay, no
warm-up, no weight decay, gradients clipped to norm 1, float32, and one seed; LoRA is peft's, rank 8
on q and v. trl gets the columns `prompt` and `completion`, so its loss is on the completion alone.
Settings of `SFTConfig` that differ from its defaults: `bf16=False`, `use_cpu=True` and
`gradient_checkpointing=False`, for float32 on a CPU with memory to spare (checkpointing would cost
it time).

*Equal batches*: 16 records of the task of the week, which are nearly of one length, in 4 steps, the
same batches in the same order (trl with `train_sampling_strategy="sequential"`). What is left is
the code. `finetune` puts only the supervised positions through the output head; trl 1.16 does so
where it has Triton, on GPUs. On a CPU it puts all positions through the head, and builds the logits
a second time in the backward pass, to save memory.

*Mixed lengths*: 16 records of instructions.json of at most 256 tokens in 2 steps of 8: whole
batches of the grouped epoch of the data, drawn at random, since 16 records alone group badly.
`finetune` takes these groups, as with `group_by_length=True` on the whole file; trl keeps its
default, a random order. trl can group, too: "equal batches" says what would then remain.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from course_lib import alpaca, batching, evaluation, models, objective, runtime, training
from course_lib.alpaca import Record
from tests.benchmarks.measuring import Rounds, interleaved

MODEL = "smollm2-135m"
MAX_TOKENS = 256
SEED = 0
ADAPTER = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
LEARNING_RATES = {"full": 1e-4, "LoRA": 1e-3}
Work = tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """records: one epoch of batches; held_out: for the response loss. same_batches: both draw them
    at random in the same way, or `finetune` takes them as they come, in groups of similar length,
    and trl draws them at random.
    """

    records: list[Record]
    held_out: list[Record]
    batch: int
    same_batches: bool

    @property
    def steps(self) -> int:
        return len(self.records) // self.batch


def grouped_batches(
    records: list[Record], machine: runtime.Machine, batch: int, count: int
) -> list[Record]:
    """The records of `count` whole batches of a grouped epoch, drawn at random: a handful of
    records groups badly.
    """
    lengths = [len(example) for example in encoded(models.load(MODEL, machine), records)]
    order = batching.length_grouped_order(lengths, batch, SEED)
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    drawn = random.Random(SEED).sample([group for group in groups if len(group) == batch], count)
    return [records[index] for group in drawn for index in group]


def encoded(base: models.Loaded, records: list[Record]) -> list[batching.Example]:
    encoding = batching.encode_records(records, base.tokenizer, MAX_TOKENS)
    assert not encoding.refused
    return encoding.examples


def tokenized_alike(record: Record, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Is the record short enough, and do prompt and answer give the same tokens in one text, as trl
    takes them, as apart?
    """
    example = batching.encode(record, tokenizer)
    return (
        len(example) <= MAX_TOKENS
        and tokenizer(record.prompt + record.output)["input_ids"] == example.input_ids[:-1]
    )


def library_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the Trainer computes without us: all positions go through the head."""
    return model(**batch, use_cache=False, num_items_in_batch=1).loss


class Arms:
    """The runs of one method on one workload; each leaves its response loss on held-out records
    behind, once.
    """

    def __init__(self, method: str, load: Workload, machine: runtime.Machine, folder: Path):
        self.method, self.load, self.machine, self.folder = method, load, machine, folder
        self.held_out: dict[str, float] = {}

    def fresh(self) -> models.Loaded:
        base = models.load(MODEL, self.machine)
        assert base.name == MODEL, base.origin
        runtime.seed_everything(SEED)  # LoRA's first weights
        return base

    def score(self, arm: str, base: models.Loaded) -> None:
        if arm not in self.held_out:
            self.held_out[arm] = evaluation.score_answers(
                base, self.load.held_out, batch_size=4
            ).loss

    def ours(
        self, arm: str = "ours", loss: training.Loss = objective.summed_loss
    ) -> tuple[float, Work]:
        base = self.fresh()
        examples = encoded(base, self.load.records)
        if self.method == "LoRA":
            base.model = get_peft_model(base.model, ADAPTER)
        grouped = mock.patch.object(
            training, "training_order", return_value=list(range(len(examples)))
        )
        with nullcontext() if self.load.same_batches else grouped, runtime.measure() as cost:
            run = training.finetune(
                base,
                examples,
                self.machine,
                steps=self.load.steps,
                batch_size=self.load.batch,
                learning_rate=LEARNING_RATES[self.method],
                seed=SEED,
                loss=loss,
                progress=False,
            )
        assert len(run.losses) == self.load.steps
        self.score(arm, base)
        return cost.seconds, (len(examples), run.supervised_tokens)

    def ours_with_library_loss(self) -> tuple[float, Work]:
        return self.ours("library's loss", library_loss)

    def trl(self) -> tuple[float, Work]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        base = self.fresh()
        examples = encoded(base, self.load.records)
        lengths, order = [len(example) for example in examples], list(range(len(examples)))
        if self.load.same_batches:
            order = batching.training_order(lengths, self.load.steps, self.load.batch, False, SEED)
        records = [self.load.records[index] for index in order]
        trainer = SFTTrainer(
            model=base.model,
            args=SFTConfig(
                output_dir=str(self.folder),
                num_train_epochs=1,
                per_device_train_batch_size=self.load.batch,
                learning_rate=LEARNING_RATES[self.method],
                seed=SEED,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **({"train_sampling_strategy": "sequential"} if self.load.same_batches else {}),
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": record.prompt, "completion": record.output} for record in records]
            ),
            processing_class=base.tokenizer,
            peft_config=ADAPTER if self.method == "LoRA" else None,
        )
        assert not trainer.args.activation_checkpointing
        labels = [row["labels"] for row in trainer.train_dataset]
        assert [row["input_ids"] for row in trainer.train_dataset] == [
            examples[index].input_ids for index in order
        ]
        assert labels == [examples[index].labels for index in order], "trl tokenized otherwise"
        with runtime.measure() as cost:
            trainer.train()
        assert trainer.state.global_step == self.load.steps
        base.model = trainer.model
        self.score("trl", base)
        return cost.seconds, (
            len(examples),
            sum(label != batching.IGNORED for row in labels for label in row),
        )


def report(
    name: str, arms: Arms, rounds: Rounds, row: Callable[..., None], **promise: float
) -> None:
    _, supervised = rounds.work
    row(f"{name}: trl", rounds.rates("trl", supervised), "supervised tokens/s")
    row(f"{name}: ours", rounds.rates("ours", supervised), "supervised tokens/s")
    row(f"{name}: ours / trl", rounds.times_faster("ours", than="trl"), "times", **promise)
    row(
        f"{name}: response loss on {len(arms.load.held_out)} held-out records, ours",
        arms.held_out["ours"],
        "nats",
    )
    row(
        f"{name}: its difference to trl's",
        abs(arms.held_out["ours"] - arms.held_out["trl"]),
        "nats",
        at_most=0.02,
    )


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_with_equal_batches(method, machine, tmp_path, row):
    train, held_out = evaluation.read_task("train"), evaluation.read_task("validation")[:48]
    load = Workload(
        grouped_batches(train, machine, batch=4, count=4), held_out, batch=4, same_batches=True
    )
    arms = Arms(method, load, machine, tmp_path)
    runs = {"ours": arms.ours, "trl": arms.trl, "library's loss": arms.ours_with_library_loss}
    rounds = interleaved(runs)
    report(f"{method}, equal batches", arms, rounds, row)
    gain = rounds.times_faster("ours", than="library's loss")
    row(f"{method}, equal batches: of it, only supervised positions in the head", gain, "times")


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_on_mixed_lengths_as_delivered(method, machine, tmp_path, row):
    everything = alpaca.read_records(
        runtime.data_folder() / "instructions.json", extra=("kind", "language")
    ).records
    tokenizer = models.load(MODEL, machine).tokenizer
    alike = [record for record in everything if tokenized_alike(record, tokenizer)]
    records = random.Random(SEED).sample(alike, len(alike))
    drawn = grouped_batches(records[48:], machine, batch=8, count=2)
    arms = Arms(
        method, Workload(drawn, records[:48], batch=8, same_batches=False), machine, tmp_path
    )
    rounds = interleaved({"ours": arms.ours, "trl": arms.trl})
    report(f"{method}, mixed lengths", arms, rounds, row, at_least=1.3)
