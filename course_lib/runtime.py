"""The machine: which device and dtype, how much memory, and why; seeds; what a block of code costs.

The decision is a pure function, `decide`, of what was found; `detect` does the finding. A Tesla T4
(capability 7.5) answers yes when torch asks it for bf16 and then emulates it slowly, so the dtype
follows from the capability, never from that answer.
"""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

GB = 10**9
BF16_CAPABILITY = (8, 0)  # Ampere, the first generation with bf16 units
SAMPLING_SECONDS = 0.01

Choice = TypeVar("Choice")


class CourseError(ValueError):
    """A mistake that the user can mend.

    Its message is one line: what was found, what was expected, what to do next.
    """

    def _render_traceback_(self) -> list[str]:
        """IPython prints these lines in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class TrainingError(CourseError):
    """Training cannot start or go on; the message says what to change. Checkpoints stay."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@dataclass(frozen=True)
class Gpu:
    """What torch says about the first CUDA device.

    capability: (major, minor), for example (7, 5) for a T4
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """Where the course computes. dtype: the compute dtype ("float32", "float16" or "bfloat16");
    weights that train stay float32.
    """

    device: str
    dtype: str
    memory_bytes: int
    cores: int
    reason: str

    def choose(self, *, cpu: Choice, gpu: Choice) -> Choice:
        """The one switch of the notebooks.

        >>> laptop = decide(gpu=None, override=None, cores=2, memory_bytes=8 * GB)
        >>> laptop.choose(cpu="smollm2-135m", gpu="smollm2-360m")
        'smollm2-135m'
        """
        return cpu if self.device == "cpu" else gpu

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.dtype}, {self.memory_bytes / GB:.1f} GB, {self.cores} cores: "
            f"{self.reason}"
        )


def decide(gpu: Gpu | None, override: str | None, cores: int, memory_bytes: int) -> Machine:
    """Choose device and dtype from what was found. override: the value of COURSE_DEVICE, "cpu",
    "cuda" or None.

    >>> t4 = Gpu("Tesla T4", (7, 5), 15 * GB)
    >>> print(decide(t4, None, cores=2, memory_bytes=12 * GB))
    cuda, float16, 15.0 GB, 2 cores: Tesla T4 has capability 7.5, below 8.0, so fp16 and never bf16
    """
    override = (override or "").strip().lower()
    if override not in ("", "cpu", "cuda"):
        raise CourseError(
            f"COURSE_DEVICE={override!r} is not known, expected cpu or cuda: correct it or unset it"
        )
    if gpu is not None and override != "cpu":
        major, minor = gpu.capability
        found = f"{gpu.name} has capability {major}.{minor}"
        if gpu.capability >= BF16_CAPABILITY:
            dtype, reason = "bfloat16", f"{found}, 8.0 or above, so bf16"
        else:
            dtype, reason = "float16", f"{found}, below 8.0, so fp16 and never bf16"
        return Machine("cuda", dtype, gpu.memory_bytes, cores, reason)
    if gpu is not None:
        reason = f"COURSE_DEVICE=cpu, although {gpu.name} is here"
    elif override == "cuda":
        reason = "COURSE_DEVICE=cuda was asked for, but torch finds no CUDA device, so the CPU"
    else:
        reason = "torch finds no CUDA device, and fp32 is the fast dtype of CPUs"
    return Machine("cpu", "float32", memory_bytes, cores, reason)


def detect() -> Machine:
    """Look at this machine once. The environment variable COURSE_DEVICE (cpu or cuda) overrides."""
    import psutil
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = Gpu(properties.name, (properties.major, properties.minor), properties.total_memory)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    return decide(gpu, os.environ.get("COURSE_DEVICE"), cores, psutil.virtual_memory().total)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, for library code that takes no
    generator.
    """
    from accelerate.utils import set_seed

    set_seed(seed)


@dataclass
class Cost:
    """What a block cost; filled in when the block ends.

    Bytes are resident memory on a CPU, allocated memory on a GPU.
    """

    seconds: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, peak {self.peak_bytes / GB:.2f} GB"


@contextmanager
def measure(device: str = "cpu") -> Iterator[Cost]:
    """Time a block and sample its peak memory a hundred times a second.

    >>> with measure() as cost:
    ...     block = bytearray(1000)
    >>> cost.seconds > 0 and cost.peak_bytes > 0
    True
    """
    import psutil

    cost = Cost()
    done = threading.Event()
    process = psutil.Process()

    def sample() -> None:
        cost.peak_bytes = max(cost.peak_bytes, process.memory_info().rss)

    def keep_sampling() -> None:
        while not done.wait(SAMPLING_SECONDS):
            sample()

    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        sample()
        threading.Thread(target=keep_sampling, daemon=True).start()
    start = perf_counter()
    try:
        yield cost
    finally:
        if device == "cuda":
            torch.cuda.synchronize()
            cost.peak_bytes = torch.cuda.max_memory_allocated()
        else:
            sample()
        cost.seconds = perf_counter() - start
        done.set()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' progress bars, advice and deprecations off in the block, where they do not
    concern the user; errors stay on.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def data_folder() -> Path:
    """The course's `data/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    for folder in (package.parent / "data", package / "data"):
        if (folder / "structured_answers.json").is_file():
            return folder
    raise CourseError(
        f"no data/structured_answers.json beside or inside {package}: install the course again"
    )
