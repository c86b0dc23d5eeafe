"""The notebooks as a product: execute them with progress, keep tidy outputs, write the course page, stamp the address.

A code cell tagged `headline` prints the day's result; its text becomes the headline on the course page.
"""

import re
import shutil
import threading
import tomllib
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import jinja2
import nbformat
import psutil
from jupyter_client.kernelspec import NoSuchKernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from course_lib.runtime import GIB, SAMPLING_SECONDS, CourseError, first_line
from tools import patience

SLOW_SECONDS = 5  # a cell that took longer is named
LONG_SECONDS = 60  # and one that still runs says so
WEEK = {
    1: ("alpaca", "Alpaca data: from next-word prediction to following instructions"),
    2: ("lora", "LoRA: the update has low rank"),
    3: ("adalora", "AdaLoRA: where should the rank go?"),
    4: ("qlora", "QLoRA and NF4: fine-tuning on a 4-bit base"),
    5: ("prefix", "Prefix tuning and its relatives"),
    6: ("quantization", "Quantization: PTQ against QAT"),
    7: ("decoding", "Decoding: what the knobs do"),
}


@dataclass(frozen=True)
class Execution:
    """One executed notebook. failure: "" or a line naming the cell and its error; peak_bytes: of the kernel's process."""

    path: Path
    notebook: NotebookNode
    seconds: float
    peak_bytes: int
    failure: str

    @property
    def headline(self) -> str:
        for cell in self.notebook.cells:
            if "headline" in cell.metadata.get("tags", []):
                return "".join(output.get("text", "") for output in cell.get("outputs", [])).strip()
        return ""

    def __str__(self) -> str:
        return f"{self.path.stem}: {self.failure or 'done'}, {self.seconds:.0f} s, peak {self.peak_bytes / GIB:.2f} GiB"


def find_notebooks(folder: Path, day: int | None = None) -> list[Path]:
    """The course's notebooks in order, or that of one day. Raises CourseError if there is none."""
    found = sorted(folder.glob(f"day{day or '[1-7]'}_*.ipynb"))
    if not found:
        raise CourseError(f"no notebook of day {day} in {folder}/" if day else f"no notebooks in {folder}/: run this in a checkout")
    return found


def execute(path: Path) -> Execution:
    """Run all cells on a fresh kernel, showing progress. A failing cell ends this notebook and is reported, not raised.

    No cell has a time limit; a kernel that hangs is given up by `patience.Watch`.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        return Execution(path, nbformat.v4.new_notebook(), 0.0, 0, f"not a notebook ({first_line(error)}): restore it")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TimeElapsedColumn()
    with Progress(*columns) as progress:
        run = _Run(path, notebook, progress)
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=40"],  # errors only: the kernel's advice on encryption is not for learners
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
    """A notebook while it runs: where it is, what it takes, and whether its kernel still computes."""

    def __init__(self, path: Path, notebook: NotebookNode, progress: Progress):
        self.name, self.progress = path.stem, progress
        self.cells = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
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
                self.progress.console.print(f"  {self.name} {self.place}: still computing, {self.seconds:.0f} s, {used}")


def tidy(notebook: NotebookNode) -> None:
    """Remove what differs between two runs and tells nothing: timestamps, widget ids, passing states of progress bars."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and "\r" in output.text:
                output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))


def write_page(executions: list[Execution], target: Path, slides: Path) -> Path:
    """Write index.html and a page for each executed notebook to `target`; decks in `slides` are copied with figures, and linked.

    Returns the path of index.html.
    """
    target.mkdir(parents=True, exist_ok=True)
    # without addresses of scripts the page asks nothing from the network
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="", theme="light")
    if (slides / "figures").is_dir():
        shutil.copytree(slides / "figures", target / "figures", dirs_exist_ok=True)
    rows = []
    by_day = {int(execution.path.stem[3]): execution for execution in executions}
    for day, (subject, title) in WEEK.items():
        decks = [file for file in sorted(slides.glob(f"day{day}_*")) if file.suffix in {".html", ".pdf"}]
        for deck in decks:
            shutil.copy(deck, target / deck.name)
        execution = by_day.get(day)
        if execution:
            html, _ = exporter.from_notebook_node(execution.notebook, {"metadata": {"name": title}})
            html = re.sub(r'<img alt="([^"]*)" src="https?:[^"]*"/?>', r"\1", html)  # badges, which come from the network
            (target / f"{execution.path.stem}.html").write_text(html, encoding="utf-8")
        rows.append(
            {"day": day, "subject": subject, "title": title, "execution": execution, "decks": [deck.name for deck in decks]}
        )
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    index = target / "index.html"
    index.write_text(template.render(rows=rows, gib=GIB), encoding="utf-8")
    return index


def stamp(root: Path) -> list[Path]:
    """Write the repository's address from pyproject.toml into badges and Colab cells. Returns the files that changed."""
    try:
        address = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise CourseError(
            f"no address under [project.urls] in pyproject.toml ({first_line(error)}): run this in a checkout"
        ) from None
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", str(address))
    if match is None:
        raise CourseError(f"the address {address!r} in pyproject.toml is not https://github.com/owner/name: correct it")
    repository = match.group(1)
    changed = []
    for path in [root / "README.md", *sorted(root.glob("notebooks/*.ipynb"))]:
        text = path.read_text(encoding="utf-8")
        stamped = re.sub(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob)", rf"\g<1>{repository}\g<2>", text)
        stamped = re.sub(r'(REPO, REF = \\")[\w.-]+/[\w.-]+(\\")', rf"\g<1>{repository}\g<2>", stamped)
        if stamped != text:
            path.write_text(stamped, encoding="utf-8")
            changed.append(path)
    return changed


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Seven Days of LLM Fine-Tuning</title>
<style>
  body { font: 17px/1.5 system-ui, sans-serif; color: #1b263b; max-width: 64rem; margin: 3rem auto; padding: 0 1.5rem; }
  h1 { margin-bottom: 0.2rem; }
  table { border-collapse: collapse; width: 100%; margin-top: 2rem; }
  th, td { text-align: left; vertical-align: top; padding: 0.7rem 0.8rem; border-bottom: 1px solid #cfd8dc; }
  td.number { text-align: right; white-space: nowrap; }
  tr.planned td { color: #8d99a6; }
  .failure { color: #b00020; }
  .headline { color: #415a77; white-space: pre-line; }
  a { color: #1d6f68; }
</style>
<h1>Seven Days of LLM Fine-Tuning</h1>
<p>The notebooks as they ran on this machine.</p>
<table>
<tr><th>Day</th><th>Subject and result</th><th>Seconds</th><th>Peak memory</th><th>Read</th></tr>
{% for row in rows %}
{% if row.execution %}
<tr>
  <td>{{ row.day }}</td>
  <td><strong>{{ row.title }}</strong>
    {% if row.execution.failure %}<div class="failure">{{ row.execution.failure }}</div>{% endif %}
    <div class="headline">{{ row.execution.headline }}</div></td>
  <td class="number">{{ "%.0f" | format(row.execution.seconds) }}</td>
  <td class="number">{{ "%.2f" | format(row.execution.peak_bytes / gib) }} GiB</td>
  <td><a href="{{ row.execution.path.stem }}.html">notebook</a>
    {% for deck in row.decks %}<br><a href="{{ deck }}">slides ({{ deck.rpartition(".")[2] }})</a>{% endfor %}</td>
</tr>
{% else %}
<tr class="planned"><td>{{ row.day }}</td><td>{{ row.title }}</td><td></td><td></td><td>not run</td></tr>
{% endif %}
{% endfor %}
</table>
</html>
"""
