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

from course_lib import plots
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


def state(value: float, inputs: Mapping[str, bool | int]) -> dict[str, Any]:
    """The number that a figure must show when its inputs, by their labels, are set so."""
    return {"inputs": dict(inputs), "value": value}


def loss_of_an_example(
    tokens: Sequence[str], surprise: Sequence[float], labels: Sequence[int]
) -> Explorable:
    """A bar for each token of a text, as high as the model is surprised by it; which count?

    tokens: (T,) as text; surprise: (T - 1,) -log p of tokens 1, 2, ..., in nats; labels: (T,), -100
        where a token does not count, the last one of EOS

    >>> figure = loss_of_an_example(list("ab!$"), [3.0, 2.0, 1.0], [-100, -100, 5, 2])
    >>> [state["value"] for state in figure.data["python"]]  # answer and EOS, answer, all
    [1.5, 2.0, 2.0]
    """
    from matplotlib.figure import Figure

    counts = [label != IGNORED for label in labels[1:]]
    answer = [nats for nats, counted in zip(surprise, counts, strict=True) if counted]
    prompt, eos = "count the prompt", "count EOS"
    data = {
        "tokens": list(tokens),
        "surprise": [*surprise],
        "counts": counts,
        "python": [  # what the browser must compute, too
            state(math.fsum(answer) / len(answer), {prompt: False, eos: True}),
            state(math.fsum(answer[:-1]) / max(1, len(answer) - 1), {prompt: False, eos: False}),
            state(math.fsum(surprise) / len(surprise), {prompt: True, eos: True}),
        ],
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


def race_of_ranks(layers: Sequence[str], history: Sequence[Sequence[int]]) -> Explorable:
    """A slider over the steps of a run: the rank of every layer beside the budget of all.

    layers: (L,) names; history: (steps + 1, L) ranks, before the first step and after each

    >>> names = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
    >>> figure = race_of_ranks(names, [[2, 2, 2, 2], [2, 2, 1, 1], [0, 2, 1, 1]])
    >>> figure.data["matrices"], figure.data["history"][-1], figure.data["python"][-1]
    (['q', 'v'], [[0, 1], [2, 1]], {'inputs': {'step': 2}, 'value': 4})
    """
    from matplotlib.figure import Figure

    grids = [plots.by_matrix(dict(zip(layers, ranks, strict=True))) for ranks in history]
    totals = [sum(ranks) for ranks in history]
    last = len(history) - 1
    data = {
        "matrices": list(grids[0]),
        "history": [[*grid.values()] for grid in grids],
        "python": [state(totals[step], {"step": step}) for step in (0, last // 2, last)],
    }
    picture = Figure(figsize=(9, 3.4), layout="constrained")
    heat, curve = picture.subplots(1, 2)
    plots.draw_heat(heat, grids[-1], max(history[0]))
    heat.set_title(f"rank of each matrix after step {last}")
    curve.step(range(last + 1), totals, where="post", color=plots.GOOD, linewidth=2.5)
    curve.set(title="the budget: ranks in all matrices", xlabel="step", ylim=(0, None))
    curve.spines[["top", "right"]].set_visible(False)
    return Explorable(
        "race_of_ranks",
        data,
        picture,
        f"The rank of each of {len(layers)} matrices, and the sum of all, over {last} steps",
    )


def block_of_weights(
    weights: Sequence[float], outlier: int, formats: Mapping[str, Sequence[float]]
) -> Explorable:
    """Sliders for one outlier among the weights of a block, for the format and for the size of the
    blocks: which levels are left to the others, and how wrong these become.

    weights: 64, with standard deviation 1; outlier: the place of the one that is set; formats:
        name -> levels within -1..1

    >>> figure = block_of_weights([1.0, -1.0] * 32, 3, {"INT2": [-1.0, 0.0, 1.0]})
    >>> [round(state["value"], 3) for state in figure.data["python"]]  # 2, 20, and small blocks
    [1.0, 1.0, 0.333]
    """
    from matplotlib.figure import Figure

    weights = [*map(float, weights)]
    levels = {name: [*map(float, values)] for name, values in formats.items()}
    first, last = levels[next(iter(levels))], levels[[*levels][-1]]

    def error(size: int, levels: Sequence[float], block: int) -> float:
        values = [float(size) if i == outlier else w for i, w in enumerate(weights)]
        pairs = [pair for i, pair in enumerate(rounded(values, levels, block)) if i != outlier]
        wrong = math.fsum((a - b) ** 2 for a, b in pairs)
        return math.sqrt(wrong / math.fsum(a * a for a, _ in pairs))

    data = {
        "weights": weights,
        "outlier": outlier,
        "formats": levels,
        "python": [
            state(error(size, values, 2**power), inputs)
            for size, number, values, power in (
                (2, 0, first, 6),
                (20, 0, first, 6),
                (20, len(levels) - 1, last, 3),
            )
            for inputs in [{"outlier": size, "format": number, "block size": power}]
        ],
    }
    picture = Figure(figsize=(9, 3.2), layout="constrained")
    panels = picture.subplots(1, 2, sharey=True)
    for axes, size in zip(panels, (2, 20), strict=True):
        values = [float(size) if i == outlier else w for i, w in enumerate(weights)]
        axes.bar(range(len(values)), values, color=plots.PALE)
        became = [new for _, new in rounded(values, first, len(values))]
        axes.scatter(range(len(values)), became, color=plots.GOOD, s=9)
        share = f"{100 * error(size, first, len(values)):.0f} %"
        axes.set_title(f"outlier of {size}: the others are wrong by {share}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="weight", xlabel="place in the block")
    return Explorable(
        "block_of_weights",
        data,
        picture,
        f"{len(weights)} weights in {next(iter(levels))}, with an outlier of 2 and of 20",
    )


def rounded(
    values: Sequence[float], levels: Sequence[float], block: int
) -> list[tuple[float, float]]:
    """Each value beside its block's absmax times the level that is nearest to it."""
    pairs = []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        absmax = max(map(abs, part))
        for value in part:
            scaled = value / absmax if absmax else 0.0
            pairs.append((value, absmax * min(levels, key=lambda level: abs(scaled - level))))
    return pairs
