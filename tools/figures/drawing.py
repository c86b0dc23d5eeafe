"""What the figures of all days share: a notebook's outputs, the table of the week, arrows."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib

matplotlib.use("agg")
from matplotlib.axes import Axes

from course_lib import evaluation
from course_lib.experiments import Sweep
from course_lib.plots import INK

ROOT = Path(__file__).resolve().parents[2]
WIDE = (11, 4.6)  # inches; at 1140 pixels a letter of 16 points is 23 pixels high
Notebook = dict[str, Any]
Row = dict[str, Any]  # of a table: column -> cell
Statements = dict[str, list[str]]  # the begin of a slide's title -> what must stand there


def read_notebook(name: str) -> Notebook:
    """The notebook `name`, such as "day1_alpaca", with its committed outputs."""
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def outputs_of(notebook: Notebook, fragment: str) -> list[dict[str, Any]]:
    """The outputs of the one code cell whose source contains `fragment`."""
    found = [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and fragment in "".join(cell["source"])
    ]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} cells of the notebook contain {fragment!r}, expected one: adapt the "
            "drawings in slides/"
        )
    return found[0]["outputs"]


def printed(notebook: Notebook, fragment: str) -> str:
    """What that cell printed."""
    return "".join(
        "".join(output["text"])
        for output in outputs_of(notebook, fragment)
        if output["output_type"] == "stream"
    )


def shown(notebook: Notebook, fragment: str, kind: str) -> str:
    """What that cell showed as `kind`, such as text/html."""
    (data,) = (
        output["data"][kind]
        for output in outputs_of(notebook, fragment)
        if kind in output.get("data", {})
    )
    return "".join(data)


def picture(notebook: Notebook, fragment: str) -> bytes:
    return base64.b64decode(shown(notebook, fragment, "image/png"))


def found(notebook: Notebook, fragment: str, pattern: str) -> tuple[str, ...]:
    """The groups of `pattern` in what the cell with `fragment` printed."""
    text = printed(notebook, fragment)
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern!r} is not in the output {text!r} of the cell with {fragment!r}")
    return match.groups()


def table_rows(notebook: Notebook, fragment: str) -> list[dict[str, str]]:
    """The rows of a table that that cell showed."""
    table = ElementTree.fromstring(shown(notebook, fragment, "text/html"))
    head, *rows = ([cell.text or "" for cell in row] for row in table.iter("tr"))
    return [dict(zip(head, row, strict=True)) for row in rows]


def week_rows(sweep: Sweep) -> list[Row]:
    """The rows of a sweep on the task of the week: means over seeds, of rates with their 95 %
    interval.
    """
    rows = []
    for label, runs in sweep.by_label().items():
        row: Row = {
            "method": label.partition(", learning rate")[0],
            "trained": f"{runs[0].trained / 1e6:.1f}M" if runs[0].trained else "0",
        }
        for name, measure in sweep.measures.items():
            if name not in runs[0].scores:
                row[f"{name}, %"] = "—"
                continue
            mean = replace(sweep, outcomes=runs).mean(name)
            if measure.questions:
                low, high = evaluation.interval(mean, measure.questions)
                row[f"{name}, %"] = f"{mean:.0f} ({low:.0f}–{high:.0f})"
            else:
                row[f"{name}, {measure.unit}"] = f"{mean:.3f}"
        rows.append(row)
    return rows


def headline(notebook: Notebook) -> dict[str, dict[str, Any]]:
    """The result of the day, as the cell tagged `headline` gives it: `evaluation.Headline`."""
    (cell,) = (cell for cell in notebook["cells"] if "headline" in cell["metadata"].get("tags", []))
    (result,) = (
        output["data"]["application/json"]
        for output in cell["outputs"]
        if "application/json" in output.get("data", {})
    )
    return result


def widened(axes: Axes) -> Axes:
    axes.figure.set_size_inches(*WIDE)
    return axes


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = INK,
    bend: float = 0.0,
) -> None:
    style = dict(arrowstyle="-|>", color=color, linewidth=2, shrinkA=0, shrinkB=2)  # noqa: C408
    style |= {"mutation_scale": 16, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)
