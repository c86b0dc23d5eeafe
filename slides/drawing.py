"""What the figures of all days share: reading a notebook's outputs, the table of the week, boxes and arrows."""

import base64
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from course_lib import experiments
from course_lib.plots import INK

ROOT = Path(__file__).resolve().parents[1]
WIDE = (11, 4.6)  # inches; at 1140 pixels a letter of 16 points is 23 pixels high
TRAINED, MASKED = "#b7e4c7", "#eeeeee"  # the colours of batching.show_mask
MUTED = "#5c656d"
Notebook = dict[str, Any]
Row = dict[str, Any]  # of a table: column -> cell


def read_notebook(name: str) -> Notebook:
    """The notebook `name`, such as "day1_alpaca", with its committed outputs."""
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def outputs_of(notebook: Notebook, fragment: str) -> list[dict[str, Any]]:
    """The outputs of the one code cell whose source contains `fragment`."""
    found = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and fragment in "".join(cell["source"])]
    if len(found) != 1:
        raise ValueError(f"{len(found)} cells of the notebook contain {fragment!r}, expected one: adapt the drawings in slides/")
    return found[0]["outputs"]


def printed(notebook: Notebook, fragment: str) -> str:
    """What that cell printed."""
    return "".join("".join(output["text"]) for output in outputs_of(notebook, fragment) if output["output_type"] == "stream")


def shown(notebook: Notebook, fragment: str, kind: str) -> str:
    """What that cell showed as `kind`, such as text/html."""
    (data,) = (output["data"][kind] for output in outputs_of(notebook, fragment) if kind in output.get("data", {}))
    return "".join(data)


def picture(notebook: Notebook, fragment: str) -> bytes:
    return base64.b64decode(shown(notebook, fragment, "image/png"))


def table_rows(notebook: Notebook, fragment: str) -> list[dict[str, str]]:
    """The rows of a table that that cell showed."""
    table = ElementTree.fromstring(shown(notebook, fragment, "text/html"))
    head, *rows = ([cell.text or "" for cell in row] for row in table.iter("tr"))
    return [dict(zip(head, row, strict=True)) for row in rows]


def week_rows(methods: str) -> list[Row]:
    """The rows of the table of the week whose methods match `methods`, a regular expression: weights trained, and every score."""
    outcomes = [outcome for outcome in experiments.read_outcomes() if re.fullmatch(methods, outcome.method)]
    left_out = {"seconds", "peak GB", "seeds"}
    units = {"response loss": "response loss (nats)"}
    return [
        {units.get(name, name): cell for name, cell in row.items() if name not in left_out} for row in experiments.summary(outcomes)
    ]


def widened(axes: Axes) -> Axes:
    axes.figure.set_size_inches(*WIDE)
    return axes


def canvas(width: float, height: float) -> Axes:
    """An empty drawing whose unit is an inch."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, face: str, **style: Any) -> None:
    """A rounded box around its centre (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.08", facecolor=face, edgecolor="none"))
    axes.text(x, y, text, ha="center", va="center", **({"color": INK} | style))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 2, "shrinkA": 0, "shrinkB": 2, "mutation_scale": 16}
    axes.annotate("", end, start, arrowprops=style | {"connectionstyle": f"arc3,rad={bend}"})
