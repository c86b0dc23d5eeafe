"""Execute notebooks, with progress, and keep their outputs tidy.

The code cell tagged `headline` gives the day's result as one JSON object, `evaluation.Headline`.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import nbformat
import psutil
from jupyter_client.kernelspec import NoSuchKernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from course_lib.runtime import GB, SAMPLING_SECONDS, CourseError, first_line
from tools import patience

SLOW_SECONDS = 5  # a cell that took longer is named
LONG_SECONDS = 60  # and one that still runs says so


@dataclass(frozen=True)
class Execution:
    """One executed notebook. failure: "" or a line naming the cell and its error; peak_bytes: of
    the kernel's process.
    """

    path: Path
    notebook: NotebookNode
    seconds: float
    peak_bytes: int
    failure: str

    @property
    def headline(self) -> dict[str, Any]:
        """What the cell tagged `headline` gave, {} if it gave nothing."""
        return headline_of(self.notebook)

    def __str__(self) -> str:
        return (
            f"{self.path.stem}: {self.failure or 'done'}, {self.seconds:.0f} s, peak "
            f"{self.peak_bytes / GB:.2f} GB"
        )


def headline_of(notebook: NotebookNode) -> dict[str, Any]:
    """The result of the day, from the outputs of the cell tagged `headline`; {} if it has none."""
    for cell in notebook.cells:
        if "headline" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if "application/json" in output.get("data", {}):
                    return output.data["application/json"]
    return {}


def find_notebooks(folder: Path, day: int | None = None) -> list[Path]:
    """The course's notebooks in order, or that of one day. Raises CourseError if there is none."""
    found = sorted(folder.glob(f"day{day or '*'}_*.ipynb"))
    if not found:
        raise CourseError(
            f"no notebook of day {day} in {folder}/"
            if day
            else f"no notebooks in {folder}/: run this in a checkout"
        )
    return found


def execute(path: Path) -> Execution:
    """Run all cells on a fresh kernel, showing progress.

    A failing cell ends this notebook and is reported, not raised.

    No cell has a time limit; a kernel that hangs is given up by `patience.Watch`.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        return Execution(
            path,
            nbformat.v4.new_notebook(),
            0.0,
            0,
            f"not a notebook ({first_line(error)}): restore it",
        )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cells"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        run = _Run(path, notebook, progress)
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            # errors only: the kernel's advice on encryption is not for learners
            extra_arguments=["--log-level=40"],
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_execute=run.cell_starts,
            on_cell_executed=run.cell_ends,
        )
        start = perf_counter()
        threading.Thread(target=run.look_after, args=(client,), daemon=True).start()
        try:
            client.execute()
        except CellExecutionError as error:
            failure = f"{run.place}: {error.ename}: {error.evalue.partition(chr(10))[0]}"
        except DeadKernelError as error:
            failure = f"{run.place}: {run.given_up or first_line(error)}"
        except (OSError, RuntimeError, NoSuchKernel) as error:
            failure = f"the kernel did not start: {first_line(error)}"
        else:
            failure = ""
        finally:
            run.over.set()
    tidy(notebook)
    return Execution(path, notebook, perf_counter() - start, run.peak_bytes, failure)


class _Run:
    """A notebook while it runs: where it is, what it takes, whether its kernel still computes."""

    def __init__(self, path: Path, notebook: NotebookNode, progress: Progress):
        self.name, self.progress = path.stem, progress
        self.cells = [
            index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"
        ]
        self.task = progress.add_task(self.name, total=len(self.cells))
        self.number, self.started, self.said = 0, perf_counter(), 0.0
        self.peak_bytes, self.given_up, self.over = 0, "", threading.Event()

    @property
    def place(self) -> str:
        return f"cell {self.number}/{len(self.cells)}"

    @property
    def seconds(self) -> float:
        """Of the cell that runs."""
        return perf_counter() - self.started

    def cell_starts(self, cell: NotebookNode, cell_index: int) -> None:
        self.number, self.started, self.said = self.cells.index(cell_index) + 1, perf_counter(), 0.0

    def cell_ends(self, cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        self.progress.advance(self.task)
        if self.seconds > SLOW_SECONDS:
            self.progress.console.print(f"  {self.name} {self.place}: {self.seconds:.0f} s")

    def look_after(self, client: NotebookClient) -> None:
        """Measure the kernel's memory, say that a long cell lives, and end a kernel that hangs."""
        watch, number, looked = None, 0, 0.0
        while not self.over.wait(SAMPLING_SECONDS):
            try:
                pid = client.km.provisioner.pid
                self.peak_bytes = max(self.peak_bytes, psutil.Process(pid).memory_info().rss)
            except (AttributeError, TypeError, psutil.Error):
                continue  # the kernel is not there yet, or no longer
            if perf_counter() - looked < patience.LOOK_SECONDS:
                continue
            looked = perf_counter()
            if watch is None or number != self.number:
                watch, number = patience.Watch(pid), self.number
            self.given_up = watch.look()
            if self.given_up:
                patience.kill(pid)
                return
            if self.seconds - self.said >= LONG_SECONDS:
                self.said = self.seconds
                used = f"{watch.used:.0f} CPU-seconds"
                self.progress.console.print(
                    f"  {self.name} {self.place}: still computing, {self.seconds:.0f} s, {used}"
                )


def tidy(notebook: NotebookNode) -> None:
    """Remove what differs between two runs and tells nothing: timestamps, widget ids, passing
    states of progress bars.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and "\r" in output.text:
                output.text = "\n".join(
                    line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")
                )
