"""Fine-tuning: the loop of Day 1, with what a long run needs around it.

    batch -> forward -> loss -> backward -> clip -> step -> and again

What `finetune` adds to the loop of a textbook: micro-batches, fewer examples at a time where memory
does not suffice, fp16 with a loss scale, processes, checkpoints, and a stop before a loss that is
not finite spoils the weights. Two seams change what is trained: `loss` and `after_step`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from course_lib import checkpoints
from course_lib.adalora import check_seam
from course_lib.batching import IGNORED, Example, check_examples, collate, training_order
from course_lib.objective import Batch, checked_sum, summed_loss
from course_lib.runtime import Machine, TrainingError, first_line, measure, seed_everything

if TYPE_CHECKING:
    from course_lib.models import Loaded

MAX_NORM = 1.0  # a longer gradient is shortened to it
HALVINGS = 4  # of the micro-batch, when memory does not suffice
SKIPS_IN_A_ROW = 3  # steps with fp16 gradients that overflow
Loss = Callable[[nn.Module, Batch], Tensor]
AfterStep = Callable[[nn.Module, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What a run did. losses: one a step, from step 1; tokens: this session's, without padding."""

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
            f"{len(self.losses) - self.resumed_at} steps{resumed}, {self.seconds:.0f} s, "
            f"{self.tokens:,} tokens ({self.supervised_tokens:,} supervised), "
            f"{self.tokens_per_second:.0f} tokens/s, peak {self.peak_bytes / 1e9:.1f} GB"
        )


@dataclass(frozen=True)
class Settings:
    """The numbers of a run. Raises TrainingError for those that cannot work."""

    steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup_steps: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            _check_count(name, getattr(self, name))
        rate, warmup = self.learning_rate, self.warmup_steps
        if not isinstance(rate, float | int) or not 0 < rate < math.inf:
            raise TrainingError(f"learning_rate={rate!r} must be a number above 0, such as 1e-4")
        if not isinstance(warmup, int) or not 0 <= warmup < self.steps:
            where = f"0..{self.steps - 1}, below steps={self.steps}"
            raise TrainingError(f"warmup_steps={warmup!r} must lie in {where}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise TrainingError(f"seed={self.seed!r} must be a whole number from 0 to {2**32 - 1}")

    def rate_of(self, step: int) -> float:
        """The learning rate of a step, counted from 1: in a line up from 0, then in a line to 0.

        >>> [Settings(4, 1, 1, 0.8, 2, 0).rate_of(step) for step in (1, 2, 3, 4)]
        [0.0, 0.4, 0.8, 0.4]
        """
        done = step - 1
        if done < self.warmup_steps:
            return self.learning_rate * (done / self.warmup_steps)
        return self.learning_rate * ((self.steps - done) / (self.steps - self.warmup_steps))


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
    loss: Loss = summed_loss,
    after_step: AfterStep | None = None,
    progress: bool = True,
    say: Say = print,
) -> Run:
    """Train the weights of `base.model` that require a gradient, in place: AdamW, linear decay.

    steps: optimizer steps, each on batch_size * accumulate examples (of each process)
    folder, save_every: keep checkpoints in `folder`; a run that finds one there goes on from it
    loss: (model, batch) -> sum over the supervised tokens of the batch, before it is divided by the
        number of those of the whole step
    after_step: (model, step), called after the optimizer's step, with the gradients still there,
        but not after a skipped one; with state_dict and load_state_dict, checkpoints keep its state
    progress: show a bar with the loss
    say: gets a line about a resumed run, a damaged checkpoint, less memory, skipped steps

    Raises TrainingError or CheckpointError before the first step for what cannot work,
    TrainingError in mid-run for a loss or gradient that is not finite, or too little memory.
    """
    settings = Settings(steps, batch_size, accumulate, learning_rate, warmup_steps, seed)
    if (folder is None) != (save_every is None):
        advice = "give both to keep checkpoints, or neither"
        raise TrainingError(f"folder and save_every belong together: {advice}")
    check_weights([weight for weight in base.model.parameters() if weight.requires_grad])
    check_examples(examples, base.model, base.tokenizer)
    check_seam(base.model, after_step, steps)
    processes = PartialState(cpu=machine.device == "cpu")
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        if processes.is_main_process:
            say(line)

    seed_everything(seed)
    per_step = batch_size * accumulate * processes.num_processes
    order = training_order([*map(len, examples)], steps, per_step, group_by_length, seed)
    drawn = [examples[index] for index in order]
    keeper = None
    if folder is not None:
        _check_count("save_every", save_every)
        identity = checkpoints.identity(base, drawn, loss, after_step) | asdict(settings)
        keeper = checkpoints.Keeper(Path(folder).expanduser(), save_every, identity, note)
    losses, out_of_memory = [], ""
    try:
        with measure(machine.device) as cost:
            show = progress and processes.is_main_process
            parts = base, drawn, machine, settings, loss, after_step, keeper
            resumed_at = _train(*parts, losses, show, note)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        out_of_memory = first_line(error)
    finally:
        base.model.eval()
        base.model.zero_grad()  # a step that was broken off leaves gradients
        if keeper:
            keeper.leave(base.model)
    if out_of_memory:  # raised here, apart from the error, which holds the activations
        advice = "lower batch_size, shorten the examples (max_tokens) or choose a smaller base"
        raise TrainingError(f"step {len(losses) + 1} ran out of memory ({out_of_memory}): {advice}")
    seen = drawn[resumed_at * per_step :]
    tokens, supervised = sum(map(len, seen)), sum(len(one.supervised_ids) for one in seen)
    return Run(losses, cost.seconds, tokens, supervised, cost.peak_bytes, resumed_at, notes)


def _train(
    base: "Loaded",
    drawn: Sequence[Example],
    machine: Machine,
    settings: Settings,
    loss: Loss,
    after_step: AfterStep | None,
    keeper: checkpoints.Keeper | None,
    losses: list[float],
    show: bool,
    note: Say,
) -> int:
    """The loop: appends the loss of each step to `losses`, returns how many a checkpoint had.

    drawn: the examples of all steps and processes, one step after the other
    """
    process, processes = PartialState().process_index, PartialState().num_processes
    model, weights = _placed(base.model, machine)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(machine.device, enabled=machine.dtype == "float16")
    state = checkpoints.State(base.model, optimizer, scaler, after_step)
    if keeper:
        losses += keeper.resume(state)
    resumed_at, last, size = len(losses), settings.steps, settings.batch_size
    at_once, per_step = size, len(drawn) // last
    pad_id, skipped = base.tokenizer.pad_token_id, []
    base.model.train()
    steps = range(resumed_at + 1, last + 1)
    bar = tqdm(
        steps, "training", last, initial=resumed_at, unit="step", file=sys.stdout, disable=not show
    )
    for step in bar:
        # The batch: the examples of this step, and of them the micro-batches of this process.
        examples = drawn[(step - 1) * per_step : step * per_step]
        supervised = sum(label != IGNORED for example in examples for label in example.labels[1:])
        starts = range(process * size, per_step, processes * size)
        batches = [examples[start : start + size] for start in starts]

        # Forward, loss and backward (below); fewer examples at a time if memory does not suffice.
        passes = partial(
            _forward_backward, model, batches, supervised, loss, scaler, machine, pad_id
        )
        step_loss, fewer = _in_memory(passes, at_once, size)
        if fewer < at_once:
            note(f"step {step} ran out of memory: it is taken with {fewer} examples at a time")
            at_once = fewer
        if not math.isfinite(step_loss):
            raise TrainingError(_advice(f"the loss is {step_loss}", step, settings))

        # Clip, and take the step at its own rate. With fp16 it is skipped if a gradient overflowed.
        optimizer.param_groups[0]["lr"] = settings.rate_of(step)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(weights, MAX_NORM)
        if not (scaler.is_enabled() or norm.isfinite()):
            raise TrainingError(_advice(f"the gradient norm is {norm.item()}", step, settings))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:  # the sign of a skipped step
            skipped.append(step)
            _check_skips(skipped, resumed_at, scaler.get_scale(), settings)
        elif after_step is not None:
            after_step(base.model, step)
        optimizer.zero_grad()

        losses.append(step_loss)
        bar.set_postfix_str(f"loss {step_loss:.3f}", refresh=False)
        if keeper and (step % keeper.every == 0 or step == last):
            keeper.save(state, losses)
    if skipped:
        found = f"{len(skipped)} of {last} steps were skipped because fp16 gradients overflowed"
        note(f"{found}: the first was step {skipped[0]}, the last step {skipped[-1]}")
    return resumed_at


def _forward_backward(
    model: nn.Module,
    batches: Sequence[Sequence[Example]],
    supervised: int,
    loss: Loss,
    scaler: torch.amp.GradScaler,
    machine: Machine,
    pad_id: int,
    at_once: int,
) -> float:
    """Forward and backward, at most `at_once` examples at a time; the loss of the step.

    The loss is a sum over tokens, so the gradients of parts add up to those of the whole.
    supervised: tokens of the step that count, in all processes
    """
    model.zero_grad()  # of an attempt that ran out of memory
    processes, device = PartialState().num_processes, next(model.parameters()).device
    dtype = machine.torch_dtype
    autocast = torch.autocast(machine.device, dtype, enabled=dtype != torch.float32)
    parts = [batch[i : i + at_once] for batch in batches for i in range(0, len(batch), at_once)]
    total = torch.zeros((), device=device)
    for part in parts:
        inputs = {name: tensor.to(device) for name, tensor in collate(part, pad_id).items()}
        with autocast:
            part_loss = checked_sum(loss(model, inputs)) / supervised
        meet = processes == 1 or part is parts[-1]  # gradients of processes meet once a step,
        with nullcontext() if meet else model.no_sync():  # as their mean, and shall be a sum
            scaler.scale(part_loss * processes).backward()
        total += part_loss.detach()
    return reduce(total, "sum").item()


def _in_memory(passes: Callable[[int], float], at_once: int, size: int) -> tuple[float, int]:
    """`passes(at_once)`, and the number that fits: half as many while memory does not suffice.

    One of several processes does not try it, since the others would wait.
    """
    smallest = size if PartialState().num_processes > 1 else math.ceil(size / 2**HALVINGS)
    while True:
        try:
            return passes(at_once), at_once
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or at_once == smallest:
                raise
        at_once = math.ceil(at_once / 2)  # outside of the block, whose error holds the activations
        clear_device_cache(garbage_collection=True)


def _check_skips(skipped: list[int], resumed_at: int, scale: float, settings: Settings) -> None:
    """Raise TrainingError if fp16 skips steps for good.

    The scale begins at 65536 and takes some steps to fit the model (3 for SmolLM2); then it is
    doubled every 2000 steps, so a single skip is normal. As long as no step was taken, the limit is
    a scale below 1, where gradients overflow unscaled, or the end of the run.
    """
    step = skipped[-1]
    in_a_row = sum(number == step - back for back, number in enumerate(reversed(skipped)))
    none_taken = in_a_row == step - resumed_at
    if (scale < 1 or step == settings.steps) if none_taken else in_a_row == SKIPS_IN_A_ROW:
        found = f"fp16 gradients overflowed in {in_a_row} steps in a row, the last"
        raise TrainingError(_advice(found, step, settings))


def _advice(found: str, step: int, settings: Settings) -> str:
    lower = f"lower learning_rate (now {settings.learning_rate:g})"
    return f"{found} at step {step}: stopped before the weights changed; {lower} or use float32"


def _placed(model: nn.Module, machine: Machine) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model where it trains, wrapped if several processes do; and its weights that train."""
    several = PartialState().num_processes > 1
    model.to(PartialState().device if several else machine.device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return DistributedDataParallel(model) if several else model, weights


def check_weights(trained: Sequence[Tensor]) -> None:
    """Raise TrainingError if there are no weights to train, or one of them is not float32."""
    if not trained:
        found = "no weight requires a gradient, so nothing would be trained"
        raise TrainingError(f"{found}: add an adapter, or choose one with use_adapters")
    if dtypes := {weight.dtype for weight in trained} - {torch.float32}:
        found = f"trained weights are {dtypes.pop()}, expected float32"
        raise TrainingError(f"{found}: load the model with dtype=torch.float32")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise TrainingError(f"{name}={value!r} must be a whole number, at least 1")
