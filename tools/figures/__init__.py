"""The slides' figures, and the measured tables in the decks: `make figures`.

No result is typed in here or in the modules of the days: numbers come from the committed outputs of
the notebooks, from course_lib, and from data/. The files are the same, byte for byte, whenever they
are drawn from the same outputs with the same matplotlib.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt

from course_lib import experiments
from tools.figures.drawing import ROOT, Notebook, Row, read_notebook

SLIDES = ROOT / "slides"
FIGURES = SLIDES / "figures"
STYLE = {"svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 16}


def days() -> list[ModuleType]:
    """The modules of the days, in order."""
    names = sorted(
        module.name
        for module in pkgutil.iter_modules(__path__)
        if re.fullmatch(r"day\d", module.name)
    )
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def draw() -> Iterator[Path]:
    """Draw every figure, and bring the tables of every deck up to date. Yields what was drawn."""
    for day in days():
        notebook = read_notebook(day.NAME)
        yield from draw_all(day, notebook, FIGURES)
        deck = SLIDES / f"{day.NAME}.md"
        deck.write_text(
            with_tables(deck.read_text(encoding="utf-8"), day.tables(notebook)), encoding="utf-8"
        )


def draw_all(day: ModuleType, notebook: Notebook, folder: Path) -> list[Path]:
    """Write every figure of a day to `folder`, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = day.NAME.partition("_")[0]
    paths = []
    with plt.rc_context(STYLE | {"svg.hashsalt": prefix}):
        for name, draw in day.figures(notebook).items():
            drawn = draw()
            kind = {bytes: "png", str: "html"}.get(type(drawn), "svg")
            paths.append(folder / f"{prefix}_{name}.{kind}")
            if kind == "png":
                paths[-1].write_bytes(drawn)
            elif kind == "html":
                paths[-1].write_text(drawn, encoding="utf-8")
            else:
                drawn.figure.savefig(
                    paths[-1], metadata={"Date": None, "Creator": None}, transparent=True
                )
                plt.close(drawn.figure)
    return paths


def with_tables(deck: str, tables: Sequence[Sequence[Row]]) -> str:
    """The deck with its measured tables brought up to date.

    A table is found by the name of its first column.
    """
    for rows in tables:
        head = f"| {next(iter(rows[0]))} |"
        fresh = experiments.markdown(rows) + "\n"
        deck, count = re.subn(
            rf"^{re.escape(head)}.*\n(?:\|.*\n)+", lambda _, fresh=fresh: fresh, deck, flags=re.M
        )
        if count != 1:
            raise ValueError(
                f"found {count} tables that begin with {head!r} in the deck, expected one"
            )
    return deck
