"""Loading models and the package.

A model is loaded as the notebooks do it, checksums included. Cold: the kernel was asked to drop the
model's files from its page cache, and the bytes read from storage say that it did. The seconds of
`import course_lib` are those of a new interpreter, less those of one that imports nothing.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import psutil
import pytest

from course_lib import models, runtime
from tests.benchmarks.measuring import interleaved

FOLDERS = {"tiny": models.tiny_folder, "smollm2-135m": models.unpacked_smollm2}


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not yet written stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_is_loaded(name, machine, row):
    folder = FOLDERS[name]()
    folder_bytes = sum(path.stat().st_size for path in folder.iterdir())
    read_from_storage = []

    def load() -> tuple[float, str]:
        gc.collect()  # a model that is still mapped keeps its pages
        with runtime.measure() as cost:
            base = models.load(name, machine)
        return cost.seconds, base.name

    def load_cold() -> tuple[float, str]:
        gc.collect()
        drop_from_page_cache(folder)
        before = psutil.Process().io_counters().read_bytes
        loaded = load()
        read_from_storage.append(psutil.Process().io_counters().read_bytes - before)
        return loaded

    can_drop = hasattr(os, "posix_fadvise") and hasattr(psutil.Process, "io_counters")
    rounds = interleaved({"warm": load, "cold": load_cold} if can_drop else {"warm": load})
    assert rounds.work == name
    row(f"{name}, {folder_bytes / 1e6:.0f} MB, warm", rounds.seconds["warm"], "s")
    if can_drop and min(read_from_storage) > 0.9 * folder_bytes:
        row(f"{name}, {folder_bytes / 1e6:.0f} MB, cold", rounds.seconds["cold"], "s")
    else:
        pytest.skip(f"{name} cold, since the page cache was not dropped")


def test_the_package_is_imported(row):
    def python(code: str) -> tuple[float, str]:
        start = perf_counter()
        printed = subprocess.run(
            [sys.executable, "-c", f"{code}; print('done')"],
            check=True,
            capture_output=True,
            text=True,
        )
        return perf_counter() - start, printed.stdout

    rounds = interleaved(
        {"nothing": lambda: python("pass"), "package": lambda: python("import course_lib")}
    )
    both = zip(rounds.seconds["package"], rounds.seconds["nothing"], strict=True)
    row("`import course_lib`", [package - nothing for package, nothing in both], "s")
