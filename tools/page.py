"""The course as a page: the executed notebooks, their headlines, and the decks, with one index."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import jinja2
from nbconvert import HTMLExporter

from course_lib.evaluation import Headline
from tools.notebooks import Execution


def write_page(executions: Sequence[Execution], target: Path, slides: Path) -> Path:
    """Write index.html and a page a notebook to `target`, and copy the decks in `slides` there.

    Returns the path of index.html. Nothing on the pages asks the network.
    """
    target.mkdir(parents=True, exist_ok=True)
    exporter = HTMLExporter(
        mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="", theme="light"
    )
    if (slides / "figures").is_dir():
        shutil.copytree(slides / "figures", target / "figures", dirs_exist_ok=True)
    rows = []
    for execution in executions:
        day, title = execution.path.stem.partition("_")[0], title_of(execution)
        decks = [file for file in slides.glob(f"{day}_*") if file.suffix in {".html", ".pdf"}]
        for deck in decks:
            shutil.copy(deck, target / deck.name)
        html, _ = exporter.from_notebook_node(execution.notebook, {"metadata": {"name": title}})
        html = re.sub(r'<img alt="([^"]*)" src="https?:[^"]*"/?>', r"\1", html)  # badges
        (target / f"{execution.path.stem}.html").write_text(html, encoding="utf-8")
        rows.append(
            {
                "day": day.removeprefix("day"),
                "title": title,
                "execution": execution,
                "headline": repr(Headline(execution.headline)).splitlines(),
                "decks": sorted(deck.name for deck in decks),
            }
        )
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    index = target / "index.html"
    page = jinja2.Environment(autoescape=True).from_string(template).render(rows=rows)
    index.write_text(page, encoding="utf-8")
    return index


def title_of(execution: Execution) -> str:
    """The notebook's first heading, without its number; its file's name if it has none."""
    text = execution.notebook.cells[0].source if execution.notebook.cells else ""
    match = re.match(r"# (?:Day \d+\W+)?(.+)", text)
    return match[1] if match else execution.path.stem
