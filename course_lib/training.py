"""Fine-tuning over transformers' Trainer.

What is added to the Trainer: the loss below, a loss curve returned as data, measured seconds, tokens and bytes, checkpoints that
are whole or absent, smaller micro-batches where memory does not suffice, and a stop with advice before a loss that is not finite
can spoil the weights.

The loss is the library's, the mean of -log p(answer token) over the supervised positions, but only these positions go through the
output head. For SmolLM2 the head is 28.3M of 134.5M parameters and the prompt is three quarters of a row: docs/decisions.md has
the gain.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from course_lib import sealing
from course_lib.batching import IGNORED, Example, check_ids, collate, length_grouped_order
from course_lib.lora import lora_layers
from course_lib.runtime import CourseError, Machine, first_line, measure, quiet_transformers, seed_everything

if TYPE_CHECKING:
    from course_lib.models import Loaded

CHECKPOINTS_KEPT = 2
HALVINGS = 4  # of the micro-batch, when memory does not suffice
SKIPS_IN_A_ROW = 3  # steps with fp16 gradients that overflow
Say = Callable[[str], None]


class TrainingError(CourseError):
    """Training cannot start or go on; the message says what to change. The last checkpoint is untouched."""


@dataclass(frozen=True)
class Run:
    """What a fine-tuning run did. losses: one a step, from step 1 on; tokens: real ones of this session, without padding."""

    losses: list[float]
    seconds: float
    tokens: int
    supervised_tokens: int
    peak_bytes: int
    resumed_at: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def __str__(self) -> str:
        resumed = f" after {self.resumed_at} from a checkpoint" if self.resumed_at else ""
        return (
            f"{len(self.losses) - self.resumed_at} steps{resumed}, {self.seconds:.0f} s, {self.tokens:,} tokens "
            f"({self.supervised_tokens:,} supervised), {self.tokens_per_second:.0f} tokens/s, "
            f"peak {self.peak_bytes / 2**30:.1f} GiB"
        )


def supervised_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (K, V) at the K positions whose next token is supervised, and these tokens (K,). No other row goes through the head.

    batch: input_ids, attention_mask, labels, each (N, T); or what `collate_packed` makes
    """
    labels = batch["labels"][:, 1:]  # position t predicts token t + 1
    supervised = labels != IGNORED  # (N, T - 1)
    if not supervised.any():
        raise TrainingError("a batch has no supervised token, so its loss is undefined: every label is -100")

    def keep_supervised(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden = inputs[0][:, -batch["labels"].shape[1] :]  # (N, T, C): virtual tokens of soft prompts come before
        return (hidden[:, :-1][supervised].unsqueeze(0),)  # (1, K, C)

    hook = unwrapped(model).get_output_embeddings().register_forward_pre_hook(keep_supervised)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return logits[0].float(), labels[supervised]


def supervised_loss(model: nn.Module, batch: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the next token where labels are not -100; equal to the library's loss, with fewer rows in the head.

    batch: input_ids, attention_mask, labels, each (N, T); or what `collate_packed` makes
    reduction: "mean" or "sum" over supervised positions
    """
    return nn.functional.cross_entropy(*supervised_logits(model, batch), reduction=reduction)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return getattr(model, "module", model)


def finetune(
    base: "Loaded",
    examples: Sequence[Example],
    machine: Machine,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    accumulate: int = 1,
    warmup_steps: int = 0,
    group_by_length: bool = False,
    seed: int = 0,
    folder: Path | str | None = None,
    save_every: int | None = None,
    progress: bool = True,
    say: Say = print,
) -> Run:
    """Train the weights of `base.model` that require a gradient, in place, with AdamW and a linear decay to zero.

    steps: optimizer steps, each on batch_size * accumulate examples
    folder, save_every: keep a checkpoint every `save_every` steps in `folder`; a run that finds one there goes on from it
    progress: show a bar with the loss
    say: gets a line about a resumed run, a damaged checkpoint or one that was not written, a smaller micro-batch, skipped steps
    Raises TrainingError before the first step for settings, weights, a folder or a checkpoint that cannot work, and in mid-run for
    a loss or gradient that is not finite, or when memory does not suffice even with smaller micro-batches.
    """
    counts = {"steps": steps, "batch_size": batch_size, "accumulate": accumulate}
    _check_settings(counts | ({"save_every": save_every} if save_every is not None else {}), learning_rate, warmup_steps, seed)
    check_weights(base.model)
    _check_examples(base.model, examples)
    if (folder is None) != (save_every is None):
        raise TrainingError("folder and save_every belong together: give both to keep checkpoints, or neither")
    if folder is not None:
        folder = Path(folder).expanduser()
        _check_writable(folder)
        for left in folder.glob(f"{sealing.PARTIAL}checkpoint-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    seed_everything(seed)
    examples_per_step = batch_size * accumulate * int(os.environ.get("WORLD_SIZE", "1"))  # processes under torchrun
    order = training_order([len(example) for example in examples], steps, examples_per_step, group_by_length, seed)
    settings = {
        "base": base.name,
        "trained weights": _trained_weights(base.model),
        "examples": _fingerprint([(examples[index].input_ids, examples[index].labels) for index in order]),
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(folder or scratch),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=warmup_steps,
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=machine.dtype == "bfloat16",
            fp16=machine.dtype == "float16",
            use_cpu=machine.device == "cpu",
            dataloader_pin_memory=machine.device != "cpu",
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or steps,
            logging_steps=1,
            logging_nan_inf_filter=False,  # the default hides what must stop the run
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            seed=seed,
        )
        arguments._n_gpu = min(
            arguments.n_gpu, 1
        )  # several GPUs want one process each; the Trainer would wrap them in DataParallel
        guard = _GradientGuard()
        trainer = _Trainer(
            model=base.model,
            args=arguments,
            train_dataset=[examples[index] for index in order],
            data_collator=lambda batch: collate(batch, base.tokenizer.pad_token_id),
            callbacks=[guard, *([_Progress()] if progress else [])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.settings, trainer.say = settings, say
        checkpoint = newest_checkpoint(folder, settings, trainer.note) if folder is not None else None
        if checkpoint is not None:
            trainer.note(f"going on from {checkpoint.name}")
        failure = ""
        try:
            with measure(machine.device) as cost, quiet_transformers():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (pickle.UnpicklingError, SafetensorError):  # the seal is whole: sealed again by somebody
            failure = f"{checkpoint} holds more than tensors and was not loaded: delete it, and the one before it is used"
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            failure = (
                f"step {trainer.state.global_step + 1} ran out of memory with {trainer.rows} of {batch_size} examples at a time "
                f"({first_line(error)}): lower batch_size, shorten the examples (max_tokens) or choose a smaller base"
            )
        finally:  # accelerate wraps forward in autocast and leaves it there; the model shall compute as before
            vars(base.model).pop("forward", None)
            base.model.eval()
            base.model.zero_grad()  # a step that was broken off leaves gradients
        if failure:
            raise TrainingError(failure)
        if guard.skipped:
            which = f"the first was step {guard.skipped[0]}, the last step {guard.skipped[-1]}"
            trainer.note(f"{len(guard.skipped)} of {steps} steps were skipped because fp16 gradients overflowed: {which}")
    resumed_at = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    seen = [examples[index] for index in order[resumed_at * examples_per_step :]]
    return Run(
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        seconds=cost.seconds,
        tokens=sum(map(len, seen)),
        supervised_tokens=sum(len(example.supervised_ids) for example in seen),
        peak_bytes=cost.peak_bytes,
        resumed_at=resumed_at,
        notes=trainer.notes,
    )


def training_order(lengths: Sequence[int], steps: int, examples_per_step: int, group_by_length: bool, seed: int) -> list[int]:
    """The index of every example that a run sees, in order: shuffled epochs, one after the other, cut off after the last step.

    Fixed before the run starts, so that a resumed run goes on with the examples that the broken one had not seen.

    >>> training_order([5, 5, 5], steps=2, examples_per_step=2, group_by_length=False, seed=0)
    [1, 2, 0, 0]
    """
    order: list[int] = []
    while len(order) < steps * examples_per_step:
        epoch_seed = seed * 10_007 + len(order)
        if group_by_length:
            order += length_grouped_order(lengths, examples_per_step, epoch_seed)
        else:
            order += random.Random(epoch_seed).sample(range(len(lengths)), len(lengths))
    return order[: steps * examples_per_step]


def newest_checkpoint(folder: Path, settings: dict[str, Any], say: Say) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; damaged ones are named and passed over.

    Raises TrainingError if it belongs to a run with other settings.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        try:
            saved = sealing.check(checkpoint)
        except sealing.DamagedError as error:
            say(f"{error}: passed over")
            continue
        differences = [f"{key} {saved.get(key)} there, {value} now" for key, value in settings.items() if saved.get(key) != value]
        if differences:
            raise TrainingError(
                f"{checkpoint} is of another run ({'; '.join(differences)}): use these settings again or another folder"
            )
        return checkpoint
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The folders called checkpoint-STEP, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class _Trainer(Trainer):
    """The Trainer with our loss, our order of examples and sealed checkpoints."""

    settings: dict[str, Any]
    say: Say

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the supervised tokens of a whole step for us
        self.notes: list[str] = []
        self.rows = self.args.per_device_train_batch_size  # examples that go through the model together

    def note(self, line: str) -> None:
        self.notes.append(line)
        self.say(line)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        if num_items_in_batch is None:
            raise TrainingError("the Trainer did not count the supervised tokens: this version of transformers is not supported")
        loss = supervised_loss(model, inputs, reduction="sum") / num_items_in_batch * self.accelerator.num_processes
        if not loss.requires_grad:
            raise TrainingError("the loss depends on no weight that trains: choose an adapter with use_adapters")
        if not torch.isfinite(loss):
            raise TrainingError(_advice(f"the loss is {loss.item()}", self.state.global_step + 1, self.args.learning_rate))
        return loss

    def get_batch_samples(self, *arguments: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
        self.batches_of_step, tokens = super().get_batch_samples(*arguments)
        return self.batches_of_step, tokens

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None) -> Tensor:
        """Forward and backward of a micro-batch. Out of memory, the step begins anew with half as many examples at a time.

        That changes nothing but the time and the rounding: weights and optimizer change only at the end of a step, and the loss is
        a sum over tokens, so the gradients of the halves add up to those of the whole. (Dropout, if any, is drawn again.)
        One of several processes does not try it, since the others would wait.
        """
        undone: list[dict[str, Tensor]] = []
        while True:
            try:
                for batch in undone:
                    self._in_parts(model, batch, num_items_in_batch)
                return self._in_parts(model, inputs, num_items_in_batch)
            except RuntimeError as error:
                fewest = math.ceil(self.args.per_device_train_batch_size / 2**HALVINGS)
                if not should_reduce_batch_size(error) or self.rows == fewest or self.args.world_size > 1:
                    raise
            self.rows = math.ceil(self.rows / 2)
            self.note(f"step {self.state.global_step + 1} ran out of memory: it is taken with {self.rows} examples at a time")
            model.zero_grad()
            clear_device_cache(garbage_collection=True)  # only now: the error's traceback held the activations
            undone = list(itertools.takewhile(lambda batch: batch is not inputs, self.batches_of_step))

    def _in_parts(self, model: nn.Module, batch: dict[str, Tensor], tokens: Tensor | None) -> Tensor:
        """Forward and backward of at most `rows` examples at a time; the sum of their losses."""
        parts = zip(*(tensor.split(self.rows) for tensor in batch.values()), strict=True)
        return sum(super(_Trainer, self).training_step(model, dict(zip(batch, part, strict=True)), tokens) for part in parts)

    def _get_train_sampler(self, *dataset: Any) -> Sampler:
        return SequentialSampler(self.train_dataset)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """A run that began with fp16 may go on without a GradScaler, on another GPU or after its advice to use float32."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        """Let the Trainer write into a partial folder, then seal and rename it. A failure costs this checkpoint, not the run."""
        folder = self.args.output_dir
        final = Path(folder) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                sealing.partial_folder(final)
            self.accelerator.wait_for_everyone()
            partial = Path(folder) / f"{sealing.PARTIAL}{final.name}"
            self.args.output_dir = str(partial)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                sealing.publish(partial / final.name, final, self.settings)
                ours = [path for path in _checkpoints(final.parent) if (path / sealing.SEAL).is_file()]
                for old in ours[: ours.index(final) + 1][:-CHECKPOINTS_KEPT]:  # folders of other programs are left alone
                    with contextlib.suppress(OSError):
                        old.rename(partial / old.name)  # deleted below; killed on the way, it leaves no half of a checkpoint
        except (OSError, RuntimeError, SafetensorError) as error:
            trained = sum(weight.nbytes for weight in self.model.parameters() if weight.requires_grad)
            saved = trained if hasattr(self.model, "peft_config") else sum(weight.nbytes for weight in self.model.parameters())
            self.note(  # AdamW keeps two numbers a trained weight
                f"{final.name} was not written ({first_line(error)}): it takes about {(saved + 2 * trained) / 1e6:.0f} MB, "
                f"{shutil.disk_usage(final.parent).free / 1e6:.0f} MB are free; training goes on, older checkpoints are whole"
            )
        finally:
            self.args.output_dir = folder
            shutil.rmtree(final.parent / f"{sealing.PARTIAL}{final.name}", ignore_errors=True)


class _Progress(TrainerCallback):
    """One line: steps, time, the last loss."""

    def on_train_begin(self, arguments: TrainingArguments, state: Any, control: Any, **unused: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", file=sys.stdout)

    def on_log(self, arguments: TrainingArguments, state: Any, control: Any, logs: dict[str, Any], **unused: Any) -> None:
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, arguments: TrainingArguments, state: Any, control: Any, **unused: Any) -> None:
        self.bar.close()


class _GradientGuard(TrainerCallback):
    """Stop before a gradient that is not finite reaches the weights.

    With fp16 the GradScaler skips such a step and halves its scale. That the scale fell is the only sign of it: the fused AdamW
    skips by itself, which accelerate does not notice. The scale begins at 65536 and takes some steps to fit the model (3 for
    SmolLM2); from then on it is doubled every 2000 steps, so a single skip is normal and several in a row are not. Hence the rule:
    after the first step that was taken, stop at 3 skips in a row; before it, when the scale falls below 1, where gradients overflow
    unscaled, or when the run ends.
    """

    def __init__(self) -> None:
        self.skipped: list[int] = []
        self.in_a_row = 0
        self.scale_fits = False

    def on_pre_optimizer_step(
        self, arguments: TrainingArguments, state: Any, control: Any, model: nn.Module, optimizer: Any, **unused: Any
    ) -> None:
        if optimizer.scaler is not None:
            self.scale = optimizer.scaler.get_scale()
            return
        norm = nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
        if not torch.isfinite(norm):
            raise TrainingError(_advice(f"the gradient norm is {norm.item()}", state.global_step + 1, arguments.learning_rate))

    def on_step_end(self, arguments: TrainingArguments, state: Any, control: Any, optimizer: Any, **unused: Any) -> None:
        if optimizer.scaler is None:
            return
        scale = optimizer.scaler.get_scale()
        if scale >= self.scale:
            self.in_a_row, self.scale_fits = 0, True
            return
        self.skipped.append(state.global_step)
        self.in_a_row += 1
        no_scale_fits = not self.scale_fits and (scale < 1 or state.global_step == state.max_steps)
        if no_scale_fits or (self.scale_fits and self.in_a_row == SKIPS_IN_A_ROW):
            found = f"fp16 gradients overflowed in {self.in_a_row} steps in a row, the last"
            raise TrainingError(_advice(found, state.global_step, arguments.learning_rate))


def _advice(found: str, step: int, learning_rate: float) -> str:
    return f"{found} at step {step}: stopped before the weights changed; lower learning_rate (now {learning_rate:g}) or use float32"


def _check_settings(counts: dict[str, int], learning_rate: float, warmup_steps: int, seed: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise TrainingError(f"{name}={value!r} must be a whole number, at least 1")
    if not isinstance(learning_rate, float | int) or not 0 < learning_rate < math.inf:
        raise TrainingError(f"learning_rate={learning_rate!r} must be a number above 0, for example 1e-4")
    if not isinstance(warmup_steps, int) or not 0 <= warmup_steps < counts["steps"]:
        raise TrainingError(f"warmup_steps={warmup_steps!r} must lie in 0..{counts['steps'] - 1}, below steps={counts['steps']}")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise TrainingError(f"seed={seed!r} must be a whole number from 0 to {2**32 - 1}")


def check_weights(model: nn.Module) -> None:
    """Raise TrainingError if no weight requires a gradient, or one of them that does is not float32."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        raise TrainingError("no weight of the model requires a gradient: nothing would be trained")
    dtypes = {weight.dtype for weight in trained} - {torch.float32}
    if dtypes:
        raise TrainingError(f"trained weights are {dtypes.pop()}, expected float32: load the model with dtype=torch.float32")


def _check_examples(model: nn.Module, examples: Sequence[Example]) -> None:
    if not isinstance(examples, Sequence):
        raise TrainingError(f"examples is a {type(examples).__name__}, expected a list: encode_records(...).examples")
    if not examples:
        raise TrainingError("there are no examples to train on")
    longest = getattr(model.config, "max_position_embeddings", math.inf)
    for number, example in enumerate(examples, start=1):
        if len(example.input_ids) != len(example.labels):
            raise TrainingError(f"example {number} has {len(example.input_ids)} ids and {len(example.labels)} labels")
        if not example.supervised_ids:
            raise TrainingError(f"example {number} has no supervised token: every label is {IGNORED}")
        if len(example) > longest:
            raise TrainingError(f"example {number} has {len(example)} tokens, the model takes {longest}: encode with max_tokens")
        check_ids((*example.input_ids, *example.supervised_ids), model)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written ({error.strerror}): choose another folder for the checkpoints") from None


def _trained_weights(model: nn.Module) -> str:
    """How many weights are trained, and a short name for which, with the adapters in use and their scales."""
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters() if weight.requires_grad}
    used = {
        path: {name: weight * layer.adapters[name].scale for name, weight in layer.in_use.items()}
        for path, layer in lora_layers(model).items()
    }
    return f"{sum(map(math.prod, shapes.values()))} ({_fingerprint([shapes, used] if used else shapes)})"


def _fingerprint(content: Any) -> str:
    """A short name for JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
