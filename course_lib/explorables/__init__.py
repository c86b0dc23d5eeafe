"""Small interactive figures that need no kernel and no network: SVG and JavaScript by hand.

An output holds all that it needs: a picture, which stays where scripts do not run; and a script,
which puts the figure in its place. `explorable.js` is shared; each figure adds a file of its name.
It works in JupyterLab, in Colab, on the course's page and, as a file in an iframe, in a deck.
"""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.batching import IGNORED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent


class Explorable:
    """An interactive figure. name: of its script; data: what that reads; picture, description: what
    is shown where no script runs.
    """

    def __init__(self, name: str, data: Mapping[str, Any], picture: "Figure", description: str):
        file = io.BytesIO()
        picture.savefig(file, format="png", dpi=80)
        self.png = base64.b64encode(file.getvalue()).decode()
        self.name, self.data, self.description = name, data, description

    def __repr__(self) -> str:
        return f"{self.description} (interactive in a browser)"

    def _repr_html_(self) -> str:
        scripts = [
            (FOLDER / f"{script}.js").read_text(encoding="utf-8")
            for script in ("explorable", self.name)
        ]
        data = json.dumps(self.data, ensure_ascii=False).replace("</", "<\\/")
        alt = html.escape(self.description)
        return (
            f'<div><img alt="{alt}" src="data:image/png;base64,{self.png}"></div>\n'
            "<script>(() => {\nconst host = document.currentScript.previousElementSibling;\n"
            f"const data = {data};\n{''.join(scripts)}}})();</script>"
        )


def page(output: str) -> str:
    """The HTML of an output as a page of its own, for a deck's iframe; large enough for a class."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Explorable</title>\n'
        f'<body style="margin:0;zoom:1.3">\n{output}\n</body></html>\n'
    )


def loss_of_an_example(
    tokens: Sequence[str], surprise: Sequence[float], labels: Sequence[int]
) -> Explorable:
    """A bar for each token of a text, as high as the model is surprised by it; which count?

    tokens: (T,) as text; surprise: (T - 1,) -log p of tokens 1, 2, ..., in nats; labels: (T,), -100
        where a token does not count, the last one of EOS

    >>> figure = loss_of_an_example(list("ab!$"), [3.0, 2.0, 1.0], [-100, -100, 5, 2])
    >>> figure.data["python"]
    {'answer and EOS': 1.5, 'answer': 2.0, 'all': 2.0}
    """
    from matplotlib.figure import Figure

    counts = [label != IGNORED for label in labels[1:]]
    answer = [nats for nats, counted in zip(surprise, counts, strict=True) if counted]
    data = {
        "tokens": list(tokens),
        "surprise": [*surprise],
        "counts": counts,
        "python": {  # what the browser must compute, too
            "answer and EOS": math.fsum(answer) / len(answer),
            "answer": math.fsum(answer[:-1]) / max(1, len(answer) - 1),
            "all": math.fsum(surprise) / len(surprise),
        },
    }
    picture = Figure(figsize=(8, 3.2), layout="constrained")
    axes, shown = picture.subplots(), min(20, len(surprise))
    colors = ["#2d6a4f" if counted else "#adb5bd" for counted in counts[-shown:]]
    axes.bar(range(shown), surprise[-shown:], color=colors)
    names = [repr(token)[1:-1] for token in tokens[-shown:]]
    axes.set_xticks(range(shown), names, rotation=60, ha="right", parse_math=False)
    axes.set(ylabel="-log p, nats", title="Green counts: the answer and EOS")
    axes.spines[["top", "right"]].set_visible(False)
    return Explorable(
        "loss_of_an_example",
        data,
        picture,
        f"How surprised the model is by each of the last {shown} tokens of an example",
    )
