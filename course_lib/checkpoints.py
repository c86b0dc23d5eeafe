"""Checkpoints of a training run: whole or absent, without pickles, and only of this very run.

    checkpoint-STEP/weights.safetensors      the weights that train, by their names in the model
                    optimizer.safetensors    what the optimizer keeps of each: 0.exp_avg, ...
                    random.safetensors       of every process, Python's and torch's random states
                    after_step.safetensors   the state of the run's `after_step`, if it has one
                    progress.json            what `finetune` counts: losses, the scale of fp16
                    SEAL.json                checksums, and the settings of the run

Frozen weights are not kept, since the base has them; the seal knows what all weights were at the
start, so that no run goes on from another base. A folder is written, sealed and renamed by the
main process alone; one that is not whole, or of another run, is never loaded. Files of tensors and
JSON cannot run code when they are read.
"""

import contextlib
import hashlib
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from course_lib import sealing
from course_lib.batching import Example
from course_lib.runtime import CourseError, first_line
from course_lib.surgery import uncompiled

if TYPE_CHECKING:
    from course_lib.models import Loaded

KEPT = 2
WEIGHTS, OPTIMIZER, RANDOM = "weights.safetensors", "optimizer.safetensors", "random.safetensors"
AFTER_STEP, PROGRESS = "after_step.safetensors", "progress.json"
FILES = {WEIGHTS, OPTIMIZER, RANDOM, AFTER_STEP, PROGRESS, sealing.SEAL}
START = "weights at the start"
Say = Callable[[str], None]
# model -> folder of a run -> what its weights were at the start, and where the run left them
_left: WeakKeyDictionary[nn.Module, dict[Path, tuple[str, str]]] = WeakKeyDictionary()


class CheckpointError(CourseError):
    """A folder or a checkpoint in it cannot be used; the message says why. It is as it was."""


@dataclass(frozen=True)
class State:
    """What changes in a run. after_step: of the run; part of its state if it has `state_dict` and
    `load_state_dict`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    after_step: object


@dataclass(frozen=True)
class Keeper:
    """Keeps the checkpoints of one run in `folder` and resumes it from the newest.

    All processes call it, the main one writes.

    every: steps from one checkpoint to the next
    identity: JSON values; a checkpoint with others is of another run
    say: gets a line about a resumed run, and about a checkpoint that is damaged or was not written
    """

    folder: Path
    every: int
    identity: dict[str, Any]
    say: Say

    def resume(self, state: State) -> list[float]:
        """Load the newest whole checkpoint, if there is one; the losses of the steps that it has
        behind it.

        Raises CheckpointError, before anything is loaded, for a folder that cannot be written or
        that another run is using, for checkpoints of another run or program, and for one that
        somebody changed and sealed again.
        """
        _make_writable(self.folder)
        _check_state(state.after_step)
        if PartialState().is_main_process:
            self._reserve()
        self.identity[START] = self._start(state.model)
        if PartialState().is_main_process:
            # by a process that was killed
            for left in self.folder.glob(f"{sealing.PARTIAL}checkpoint-*"):
                shutil.rmtree(left, ignore_errors=True)
        PartialState().wait_for_everyone()
        self._spare_others()
        checkpoint = newest(self.folder, self.identity, self.say)
        if checkpoint is None:
            if self.identity[START] != fingerprint_of(state.model):
                found = f"this model was trained in {self.folder} already, and no checkpoint is"
                raise CheckpointError(f"{found} there to go on from: load the base again")
            return []
        losses = _load(checkpoint, state)
        self.say(f"going on from {checkpoint.name}")
        return losses

    def _start(self, model: nn.Module) -> str:
        """The weights that the run started from: those of `model`, unless this run left it so."""
        now = fingerprint_of(model)
        start, left = _left.get(model, {}).get(self.folder, (now, now))
        return start if left == now else now

    def _spare_others(self) -> None:
        """Raise CheckpointError where a save would replace a folder of another program."""
        for path in found_in(self.folder):
            step, others = (
                int(path.name.rpartition("-")[2]),
                {f.name for f in path.iterdir()} - FILES,
            )
            last = self.identity["steps"]
            written = step == last or (step < last and step % self.every == 0)
            if written and others and not (path / sealing.SEAL).is_file():
                found = f"{path} is of another program (it holds {min(others)})"
                raise CheckpointError(f"{found}: choose another folder")

    @cached_property
    def _lock(self) -> FileLock:
        name = fingerprint(str(self.folder.resolve()))
        return FileLock(Path(tempfile.gettempdir()) / f"course-run-{name}.lock")

    def _reserve(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            found = f"another run is using {self.folder}"
            raise CheckpointError(f"{found}: wait for its end, or choose another folder") from None
        except (OSError, NotImplementedError):  # some network drives know no locks
            return

    def leave(self, model: nn.Module) -> None:
        """Note the weights of a run that ends or breaks off: called again on this model in this
        folder, it goes on, as it does on a new one.
        """
        if START in self.identity:
            left = (self.identity[START], fingerprint_of(model))
            _left.setdefault(model, {})[self.folder] = left
        self._lock.release()

    def save(self, state: State, losses: list[float]) -> None:
        """Write checkpoint-STEP, and of older ones keep the newest.

        A failure costs this checkpoint and not the run.

        losses: of all steps so far
        """
        random_states = gather_object([_random_state()])  # one a process
        if PartialState().is_main_process:
            tensors = {
                WEIGHTS: trained_weights(state.model),
                OPTIMIZER: _flat(state.optimizer.state_dict()["state"]),
                RANDOM: _flat(dict(enumerate(random_states))),
            }
            if hasattr(state.after_step, "state_dict"):
                tensors[AFTER_STEP] = state.after_step.state_dict()
            self._write(
                len(losses), tensors, {"losses": losses, "scaler": state.scaler.state_dict()}
            )
        PartialState().wait_for_everyone()

    def _write(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], progress: dict[str, Any]
    ) -> None:
        final = self.folder / f"checkpoint-{step}"
        partial = self.folder / f"{sealing.PARTIAL}{final.name}"
        try:
            sealing.partial_folder(final)
            for name, content in tensors.items():
                # copies, since safetensors refuses tensors that share memory
                copies = {key: value.detach().clone() for key, value in content.items()}
                save_file({key: copies[key].contiguous() for key in copies}, partial / name)
            (partial / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            sealing.publish(partial, final, dict(self.identity))
            # not of other programs
            ours = [path for path in found_in(self.folder) if (path / sealing.SEAL).is_file()]
            for old in ours[: ours.index(final) + 1][:-KEPT]:
                # renamed first: killed on the way, it leaves no half of a checkpoint
                with contextlib.suppress(OSError):
                    shutil.rmtree(old.rename(old.with_name(f"{sealing.PARTIAL}{old.name}")))
        except (OSError, SafetensorError) as error:
            size = sum(value.nbytes for content in tensors.values() for value in content.values())
            free = shutil.disk_usage(self.folder).free
            self.say(
                f"{final.name} was not written ({first_line(error)}): it takes about "
                f"{size / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free; training goes on, older checkpoints are whole"
            )
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _load(checkpoint: Path, state: State) -> list[float]:
    stateful = hasattr(state.after_step, "load_state_dict")
    names = [WEIGHTS, OPTIMIZER, RANDOM, *([AFTER_STEP] if stateful else [])]
    weights = trained_weights(state.model)
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        losses, scaler = list(progress["losses"]), dict(progress["scaler"])
        tensors = {name: load_file(checkpoint / name) for name in names}
        if tensors[WEIGHTS].keys() != weights.keys():
            raise ValueError("it has other weights")
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        found = f"{checkpoint} is not what it was sealed as ({first_line(error)})"
        raise CheckpointError(f"{found}: delete it, and the one before it is used") from None
    with torch.no_grad():
        for name, value in tensors[WEIGHTS].items():
            weights[name].copy_(value)
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": _nested(tensors[OPTIMIZER]), "param_groups": groups})
    _set_random_state(_nested(tensors[RANDOM])[PartialState().process_index])
    # a run that began with fp16 may go on without it, and the reverse
    if state.scaler.is_enabled() and scaler:
        state.scaler.load_state_dict(scaler)
    if stateful:
        state.after_step.load_state_dict(tensors[AFTER_STEP])
    return losses


def newest(folder: Path, identity: Mapping[str, Any], say: Say) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; damaged ones are named and passed over.

    Raises CheckpointError if it is of another run.
    """
    for checkpoint in reversed(found_in(folder)):
        try:
            saved = sealing.check(checkpoint)
        except sealing.DamagedError as error:
            say(f"{error}: passed over")
            continue
        differences = [
            f"{key} {saved.get(key)} there, {value} now"
            for key, value in identity.items()
            if saved.get(key) != value
        ]
        if differences:
            found = f"{checkpoint} is of another run ({'; '.join(differences)})"
            start = "load the base again" if differences[0].startswith(START) else ""
            if START not in saved:
                start = "delete it, since it is of an older version,"
            advice = start or "use these settings again"
            raise CheckpointError(f"{found}: {advice} or another folder")
        return checkpoint
    return None


def found_in(folder: Path) -> list[Path]:
    """The folders called checkpoint-STEP, oldest first."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def identity(
    base: "Loaded", drawn: Sequence[Example], loss: object, after_step: object
) -> dict[str, Any]:
    """What makes a run the one it is, beside its numbers. drawn: its examples in their order."""
    shapes = {name: list(weight.shape) for name, weight in trained_weights(base.model).items()}
    adapters = {  # what their layers compute with beside weights
        path: module.identity()
        for path, module in uncompiled(base.model).named_modules()
        if hasattr(module, "identity")
    }
    return {
        "base": base.name,
        "processes": PartialState().num_processes,
        "trained weights": f"{sum(map(math.prod, shapes.values()))} "
        f"({fingerprint([shapes, adapters])})",
        "examples": fingerprint([(example.input_ids, example.labels) for example in drawn]),
        "settings of the base": fingerprint(_settings_of(base.model)),
        "loss": _named(loss),
        "after_step": _named(after_step),
    }


def _settings_of(model: nn.Module) -> dict[str, Any]:
    """What the config says beside names of files and versions: dropout, norms, positions."""
    content = json.loads(model.config.to_json_string(use_diff=False))
    return {
        key: value
        for key, value in content.items()
        if not key.startswith("_") and key not in ("transformers_version", "dtype")
    }


def _named(function: object) -> str:
    """A function by its name and what it does: its code, and the plain values it was made with; an
    object that says itself what it was made with, as `adalora.Budget` does, by that.
    """
    if isinstance(function, partial):
        values = fingerprint([repr(function.args), repr(sorted(function.keywords.items()))])
        return f"{_named(function.func)} with {values}"
    own = getattr(function, "__code__", None)
    called = own or getattr(vars(type(function)).get("__call__"), "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    if called is None:
        return name
    plain = (int, float, str, bool, type(None))
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    made_with = [repr(value) for value in cells if isinstance(value, plain)]
    if own is None and "__repr__" in vars(type(function)):
        made_with.append(repr(function))
    return f"{name} ({fingerprint([_code(called), made_with])})"


def _code(code: CodeType) -> list[Any]:
    constants = [
        _code(one)
        if isinstance(one, CodeType)
        else sorted(map(repr, one))
        if isinstance(one, frozenset)
        else repr(one)
        for one in code.co_consts
    ]
    return [code.co_code.hex(), code.co_names, constants]


def _check_state(after_step: object) -> None:
    """Raise CheckpointError, before the first step, for a state that no file of tensors takes."""
    if not hasattr(after_step, "state_dict"):
        return
    for key, value in after_step.state_dict().items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = f"after_step.state_dict() holds {key!r}, a {type(value).__name__}"
            raise CheckpointError(f"{found}, expected tensors: keep it as torch.tensor(...)")


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that require a gradient, by name; one that is used in two places (tied
    embeddings) once.
    """
    return {
        name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad
    }


def fingerprint(content: Any) -> str:
    """A short name for JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def fingerprint_of(model: nn.Module) -> str:
    """A short name for all weights of a model, frozen ones included."""
    digest = hashlib.sha256()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _make_writable(folder: Path) -> None:
    if folder == Path():
        raise CheckpointError("the working folder cannot keep checkpoints: give one of their own")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}): choose another folder for the "
            "checkpoints"
        ) from None


def _flat(states: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{0: {"exp_avg": tensor}} -> {"0.exp_avg": tensor}: a file of tensors knows no levels."""
    return {
        f"{number}.{name}": value
        for number, state in states.items()
        for name, value in state.items()
    }


def _nested(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """What `_flat` was made from."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        states.setdefault(int(number), {})[name] = value
    return states


def _random_state() -> dict[str, Tensor]:
    """The states of Python's generator and of torch's: of the CPU, and of each GPU."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": torch.tensor(random.getstate()[1]),
        "cpu": torch.get_rng_state(),
        **{f"cuda:{number}": state for number, state in enumerate(gpus)},
    }


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "python" in states:  # older checkpoints do without
        version, _, gauss = random.getstate()
        random.setstate((version, tuple(states["python"].tolist()), gauss))
    for device in states.keys() - {"cpu", "python"}:
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(states[device], device)
