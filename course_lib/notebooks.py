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
from typing import TYPE_CHECKING

from course_lib.runtime import GIB, SAMPLING_SECONDS, CourseError, first_line

if TYPE_CHECKING:
    from nbformat import NotebookNode

CELL_SECONDS = 600
SLOW_SECONDS = 5
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
    notebook: "NotebookNode"
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
    """Run all cells on a fresh kernel, showing progress. A failing cell ends this notebook and is reported, not raised."""
    import nbformat
    import psutil
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        return Execution(path, nbformat.v4.new_notebook(), 0.0, 0, f"not a notebook ({first_line(error)}): restore it")
    cells = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    started: dict[int, float] = {}
    peak_bytes, done, failure = 0, threading.Event(), ""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task(path.stem, total=len(cells))

        def begin(cell: "NotebookNode", cell_index: int) -> None:
            started[cell_index] = perf_counter()

        def end(cell: "NotebookNode", cell_index: int, execute_reply: dict) -> None:
            progress.advance(task)
            seconds = perf_counter() - started[cell_index]
            if seconds > SLOW_SECONDS:
                progress.console.print(f"  {path.stem} cell {cells.index(cell_index) + 1}/{len(cells)}: {seconds:.0f} s")

        def place() -> str:
            return f"cell {cells.index(max(started)) + 1 if started else 0}/{len(cells)}"

        def sample() -> None:
            nonlocal peak_bytes
            while not done.wait(SAMPLING_SECONDS):
                try:
                    peak_bytes = max(peak_bytes, psutil.Process(client.km.provisioner.pid).memory_info().rss)
                except (AttributeError, TypeError, psutil.Error):
                    continue  # the kernel is not there yet, or no longer

        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=40"],  # errors only: the kernel's advice on encryption is not for learners
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_start=begin,
            on_cell_executed=end,
        )
        start = perf_counter()
        threading.Thread(target=sample, daemon=True).start()
        try:
            client.execute()
        except CellExecutionError as error:
            failure = f"{place()}: {error.ename}: {error.evalue.partition(chr(10))[0]}"
        except (CellTimeoutError, DeadKernelError) as error:
            failure = f"{place()}: {first_line(error)}"
        except (OSError, RuntimeError, NoSuchKernel) as error:
            failure = f"the kernel did not start: {first_line(error)}"
        finally:
            done.set()
    tidy(notebook)
    return Execution(path, notebook, perf_counter() - start, peak_bytes, failure)


def tidy(notebook: "NotebookNode") -> None:
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
    import jinja2
    from nbconvert import HTMLExporter

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
