"""Figures: arrays in, matplotlib Axes out; and tables for notebooks.

Notebooks and slides draw with the same functions.

The title of a figure is its finding, so the caller gives it; axes carry their units.
"""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.text import Annotation

INK, ACCENT, GOOD, PALE = "#1b263b", "#d1495b", "#2a9d8f", "#cfd8dc"
MUTED = "#5c656d"
TRAINED, MASKED = "#b7e4c7", "#eeeeee"  # the colours of batching.show_mask
COLORS = (ACCENT, GOOD, INK, "#c58b1b", "#7a5195", "#8d99ae")  # of lines and groups


def plot_loss(losses: Sequence[float], title: str, smooth: int = 5) -> "Axes":
    """Loss of every step, and its mean over the last `smooth` steps."""
    axes = _axes(title)
    steps = range(1, len(losses) + 1)
    means = [sum(losses[max(0, end - smooth) : end]) / min(end, smooth) for end in steps]
    axes.plot(steps, losses, color=PALE, marker="o", markersize=4, label="each step")
    axes.plot(steps, means, color=ACCENT, linewidth=2.5, label=f"mean of {smooth} steps")
    axes.set(xlabel="optimizer step", ylabel="loss on answer tokens (nats)", ylim=(0, None))
    axes.legend(frameon=False)
    return axes


def plot_next_tokens(probabilities: Mapping[str, Mapping[str, float]], title: str) -> "Axes":
    """One panel a model: its likeliest next tokens. probabilities: model -> token -> share."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1,
        len(probabilities),
        figsize=(4.5 * len(probabilities), 3.2),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(title, color=INK)
    for axes, (model, tokens) in zip(panels[0], probabilities.items(), strict=True):
        bars = axes.barh(list(tokens), list(tokens.values()), color=GOOD)
        axes.bar_label(bars, fmt="{:.2f}", padding=3)
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=5)
        axes.set(
            title=model,
            xlabel="probability of the next token",
            xlim=(0, 1.15 * max(tokens.values())),
        )
        axes.spines[["top", "right"]].set_visible(False)
    return panels[0][0]


def plot_shares(shares: Mapping[str, Mapping[str, float]], title: str) -> "Axes":
    """Grouped bars of percentages. shares: measure -> {"before": share, "after": share}, shares in
    0..1.
    """
    axes = _axes(title)
    colors = (PALE, ACCENT, GOOD)
    names = list(next(iter(shares.values())))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        left = [index + (place - (len(names) - 1) / 2) * width for index in range(len(shares))]
        bars = axes.bar(
            left,
            [100 * row[name] for row in shares.values()],
            width,
            label=name,
            color=colors[place],
        )
        axes.bar_label(bars, fmt="{:.0f}", padding=2)
    axes.set(
        xticks=range(len(shares)),
        xticklabels=list(shares),
        ylabel="% of the questions",
        ylim=(0, 112),
    )
    # below labels of two lines
    axes.legend(frameon=False, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return axes


def plot_bills(
    bills: Mapping[str, Mapping[str, float]],
    title: str,
    room: float | None = None,
    most: float | None = None,
) -> "Axes":
    """Stacked bars of memory. bills: recipe -> part -> gigabytes (10^9 bytes).

    room: what there is, as a line; most: where bars that are longer are cut
    """
    axes = _axes(title)
    parts = list(next(iter(bills.values())))
    left = [0.0] * len(bills)
    for part, color in zip(parts, (INK, GOOD, ACCENT, PALE), strict=False):
        widths = [row[part] for row in bills.values()]
        axes.barh(list(bills), widths, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    end = most or max(left)
    for row, total in enumerate(left):
        axes.text(min(total, end), row, f" {total:.1f}", va="center", color=INK)
    if room is not None:
        axes.axvline(room, color=MUTED, linestyle="--")
        for label in axes.texts:  # the line does not cross out a number
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.invert_yaxis()
    axes.set(xlabel="GB" if room is None else "GB (dashed: the card)", xlim=(0, 1.12 * end))
    if most is not None:
        axes.axvspan(end, 1.12 * end, color="white", zorder=1.5)
    axes.legend(frameon=False, ncols=len(parts), loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return axes


def plot_lines(
    lines: Mapping[str, Mapping[float, float]],
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
) -> "Axes":
    """A line a name. lines: name -> x -> y. log_x: powers of two on the x axis, each with its
    number.
    """
    axes = _axes(title)
    for (name, points), color in zip(lines.items(), COLORS[: len(lines)], strict=True):
        axes.plot(
            list(points),
            list(points.values()),
            color=color,
            marker="o",
            markersize=5,
            linewidth=2,
            label=name,
        )
    if log_x:
        ticks = sorted({x for points in lines.values() for x in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.legend(frameon=False)
    return axes


def plot_points(
    points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
) -> "Axes":
    """A dot a run, a color and a marker a group; thin lines lead from the runs of one label to
    their mean, where the label stands. points: group -> label -> (x, y) pairs.
    """
    axes, names = _axes(title), []
    axes.set_xscale("log" if log_x else "linear")
    for (group, labels), color, marker in zip(points.items(), COLORS, "os^Dv", strict=False):
        pairs = [pair for runs in labels.values() for pair in runs]
        axes.scatter(*zip(*pairs, strict=True), color=color, marker=marker, s=45, label=group)
        for label, runs in labels.items():
            x, y = (sum(values) / len(runs) for values in zip(*runs, strict=True))
            for run in runs:
                axes.plot([x, run[0]], [y, run[1]], color=color, linewidth=0.6)
            names.append(
                axes.annotate(label, (x, y), (3, 3), textcoords="offset points", color=color)
            )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    _move_apart(names, axes)
    return axes


def _move_apart(names: Sequence["Annotation"], axes: "Axes") -> None:
    """Move a name up, the lowest first, until it covers no other."""
    axes.get_ylim()  # settles where the points are
    placed = []
    for name in sorted(names, key=lambda name: name.xy[1]):
        across, up = name.get_position()
        while name.get_window_extent().count_overlaps(placed):
            up += 1
            name.set_position((across, up))
        placed.append(name.get_window_extent())


def plot_seeds(
    lines: Mapping[str, Mapping[float, Sequence[float]]], title: str, xlabel: str, ylabel: str
) -> "Axes":
    """A dot a run, and a line through the means over seeds; x on a logarithmic scale.

    lines: name -> x -> the values of all seeds
    """
    axes = _axes(title)
    for (name, points), color, marker in zip(lines.items(), COLORS, "os^DvP", strict=False):
        means = [sum(seeds) / len(seeds) for seeds in points.values()]
        axes.plot(list(points), means, color=color, linewidth=2, label=name, marker=marker)
        for x, seeds in points.items():
            axes.scatter([x] * len(seeds), seeds, color=color, s=14, alpha=0.5)
    ticks = sorted({x for points in lines.values() for x in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=30)
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    return axes


def plot_bars(
    bars: Mapping[str, Sequence[float]], title: str, xlabel: str, marked: Sequence[str] = ()
) -> "Axes":
    """A bar a row: the mean over seeds, with its number to the right, and a dot a seed.

    bars: label -> the values of all seeds; marked: labels of the bars in green
    """
    axes = _axes(title)
    means = [sum(seeds) / len(seeds) for seeds in bars.values()]
    widest = max(map(max, bars.values()))
    colors = [GOOD if label in marked else PALE for label in bars]
    axes.barh(list(bars), means, color=colors, height=0.66)
    for row, (mean, seeds) in enumerate(zip(means, bars.values(), strict=True)):
        axes.scatter(seeds, [row] * len(seeds), color="white", edgecolor=INK, s=30, zorder=3)
        axes.text(1.05 * widest, row, f"{mean:.0f}", va="center", color=INK, weight="bold")
    axes.invert_yaxis()
    axes.text(1.05 * widest, -0.75, "mean", va="center", color=INK)
    axes.set_title(title, color=INK, pad=16)
    axes.set(xlabel=xlabel, xlim=(0, 1.16 * widest))
    return axes


def plot_lora(rows: int, columns: int, rank: int) -> "Axes":
    """A frozen matrix (rows, columns) beside LoRA's two; the thin sides are drawn wider than true,
    or they would not be seen.
    """
    axes = canvas(11, 5)
    height, width, thin = 3.6, 3.6 * columns / rows, 0.26
    for x, text in ((0.75, "h  ="), (4.0, "x  +"), (5.75, "(alpha / r)"), (10.3, "x")):
        centred(axes, x, 2.4, text, size=26)
    box(axes, 2.4, 2.4, width, height, "W0\nfrozen", MASKED, size=22)
    box(axes, 7.3, 2.4, thin, height, "", ACCENT)
    box(axes, 9.0, 2.4, width, thin, "", GOOD)
    for x, y, text, color, weight in (
        (2.4, 4.55, f"{rows} x {columns} = {rows * columns:,}", MUTED, "normal"),
        (7.3, 4.55, f"B: {rows} x {rank} = {rows * rank:,}", ACCENT, "bold"),
        (9.0, 2.75, f"A: {rank} x {columns} = {rank * columns}", GOOD, "bold"),
        (7.3, 0.12, "starts at zero", ACCENT, "normal"),
        (9.0, 1.85, "starts random", GOOD, "normal"),
    ):
        axes.text(x, y, text, ha="center", color=color, weight=weight)
    trained = rank * (rows + columns)
    axes.text(9.35, 0.75, f"trained: {trained:,}", ha="center", color=INK, size=20, weight="bold")
    return axes


def plot_triplets(rows: int, columns: int, rank: int) -> "Axes":
    """AdaLoRA's three factors beside a frozen matrix (rows, columns), drawn wider than true; one
    triplet is marked.
    """
    axes = canvas(12, 4.6)
    height, width, thick = 3.0, 3.0 * columns / rows, 0.3
    for x, text in ((0.7, "h  ="), (3.6, "x  +"), (5.2, "(alpha / r)"), (11.6, "x")):
        centred(axes, x, 2.3, text, size=24)
    box(axes, 2.2, 2.3, width, height, "W0\nfrozen", MASKED, size=20)
    for i in range(rank):
        color, at = (ACCENT if i == 1 else PALE), (i - (rank - 1) / 2) * (thick + 0.06)
        box(axes, 6.9 + at, 2.3, thick, height, "", color)  # a column of P
        box(axes, 8.4 + at, 2.3 - at, thick, thick, "", color)  # a singular value
        box(axes, 10.3, 2.3 - at, 1.7, thick, "", color)  # a row of Q
    for x, text in (
        (6.9, f"P: {rows} x {rank}"),
        (8.4, f"Λ: {rank} numbers"),
        (10.3, f"Q: {rank} x {columns}"),
    ):
        centred(axes, x, 4.2, text, size=14)
    centred(
        axes,
        8.6,
        0.35,
        "a triplet: its λ becomes zero, and one rank is gone",
        color=ACCENT,
        size=14,
    )
    return axes


def plot_block(added: Mapping[str, str]) -> "Axes":
    """A block of a Llama, from left to right: what is frozen in grey, and in green the places where
    methods put something in.

    added: "soft prompt", "prefix", "LoRA", "IA3", "bottleneck", "parallel", "norms", "biases" -> a
        text for each, such as how many weights
    """
    axes = canvas(13.6, 6.7)
    stream, up, aside = 1.6, 4.2, 2.85
    line = {"color": "#666666", "lw": 1.2, "zorder": 0}
    axes.annotate("", (13.5, stream), (3.05, stream), arrowprops={"arrowstyle": "->", "lw": 2.5})
    for x in (3.3, 8.5):  # up from the stream, into attention and into the feed-forward layers
        axes.plot([x, x], [stream, up], **line)
    for x in (8.05, 13.0):  # and down again
        axes.plot([x, x], [stream + 0.2, up], **line)
        centred(axes, x, stream, "+", size=20, weight="bold", backgroundcolor="white")
    for left, right in ((3.3, 8.05), (8.5, 13.0)):
        axes.plot([left, right], [up, up], **line)
    axes.plot([8.5, 13.0], [aside, aside], **line)
    frozen = {
        "embeddings": (2.35, stream, 1.3, 0.6),
        "norm": (3.95, up, 0.8, 0.5),
        "q": (5.0, up + 1.0, 0.6, 0.5),
        "k": (5.0, up, 0.6, 0.5),
        "v": (5.0, up - 1.0, 0.6, 0.5),
        "attention": (6.3, up, 1.05, 2.5),
        "o": (7.4, up, 0.6, 0.5),
        "norm ": (9.15, up, 0.8, 0.5),
        "gate, up": (10.4, up, 1.1, 0.5),
        "down": (12.2, up, 0.75, 0.5),
    }
    for text, (x, y, width, height) in frozen.items():
        tuned = text.strip() == "norm" and "norms" in added
        color = TRAINED if tuned else MASKED
        box(axes, x, y, width, height, text.strip(), color, size=12)
        if text in ("q", "k", "v", "o", "gate, up", "down"):
            for name, tag, place in (("LoRA", "B A", 0.37), ("biases", "+ b", -0.37)):
                if name in added:
                    box(axes, x, y + place, 0.42, 0.2, tag, TRAINED, size=8)
    if "IA3" in added:
        for x, y in ((5.52, up), (5.52, up - 1.0), (11.4, up)):
            box(axes, x, y, 0.3, 0.3, "×", TRAINED, size=13)
    inside = {
        "soft prompt": "vectors",
        "prefix": "keys, values",
        "bottleneck": "down, up",
        "parallel": "down, up",
    }
    for name, (x, y, width, height) in {
        "soft prompt": (0.95, stream, 1.3, 0.6),
        "prefix": (6.3, up + 1.5, 1.05, 0.4),
        "bottleneck": (8.05, aside - 0.3, 0.8, 0.4),
        "bottleneck ": (13.0, aside - 0.3, 0.8, 0.4),
        "parallel": (10.4, aside, 1.0, 0.4),
    }.items():
        if name.strip() in added:
            box(axes, x, y, width, height, inside[name.strip()], TRAINED, size=9)
    labels = {
        "soft prompt": (0.95, 0.95),
        "biases": (5.0, 2.3),
        "bottleneck": (7.0, 2.6),
        "parallel": (10.4, 2.35),
        "norms": (3.7, 5.3),
        "LoRA": (5.0, 6.35),
        "prefix": (6.6, 6.45),
        "IA3": (11.4, 5.2),
    }
    for name, text in added.items():
        x, y = labels[name]
        centred(axes, x, y, name, size=13, color=GOOD, weight="bold")
        centred(axes, x, y - 0.3, text, size=10.5)
    return axes


def canvas(width: float, height: float) -> "Axes":
    """An empty drawing whose unit is an inch."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def box(
    axes: "Axes",
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    face: str,
    **style: Any,
) -> None:
    """A rounded box around its centre (x, y)."""
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, width, height, shape, facecolor=face, edgecolor="none"))
    centred(axes, x, y, text, **style)


def centred(axes: "Axes", x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, **({"ha": "center", "va": "center", "color": INK} | style))


def by_matrix(values: Mapping[str, float]) -> dict[str, list[float]]:
    """What layers have, as a row a matrix and a column a block; a dot in a layer's name stands
    before the number of its block.

    >>> by_matrix({"layers.0.q_proj": 4, "layers.0.down_proj": 7, "layers.1.q_proj": 3})
    {'q': [4, 3], 'down': [7]}
    """
    rows: dict[str, list[float]] = {}
    for path, value in values.items():
        rows.setdefault(path.rpartition(".")[2].removesuffix("_proj"), []).append(value)
    return rows


def draw_heat(
    axes: "Axes", grid: Mapping[str, Sequence[float]], highest: float, numbers: bool = True
) -> "AxesImage":
    """What `by_matrix` gives as a heat map, from 0 to `highest`; numbers: in each field, too."""
    image = axes.imshow([*grid.values()], cmap="YlGnBu", vmin=0, vmax=highest, aspect="auto")
    blocks = max(map(len, grid.values()))
    axes.set_yticks(range(len(grid)), list(grid))
    axes.set_xticks(range(0, blocks, 1 if numbers else 5))
    axes.set_xlabel("block")
    for y, row in enumerate(grid.values() if numbers else ()):
        for x, value in enumerate(row):
            color = "white" if value > 0.6 * highest else INK
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", color=color)
    return image


def plot_layers(panels: Mapping[str, Mapping[str, float]], title: str, unit: str) -> "Axes":
    """A heat map a panel, a row a matrix, a column a block, all in one scale of colours.

    panels: heading -> name of a layer -> value; unit: of the values
    """
    import matplotlib.pyplot as plt

    grids = {heading: by_matrix(values) for heading, values in panels.items()}
    highest = max(max(values.values()) for values in panels.values())
    blocks = max(len(row) for grid in grids.values() for row in grid.values())
    wide = blocks > 12
    rows, columns = (len(grids), 1) if wide else (1, len(grids))
    size = (9, 0.4 + 2.4 * rows) if wide else (max(4.2, 3.1 * columns), 3.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title, color=INK)
    for panel, (heading, grid) in zip(axes.flat, grids.items(), strict=True):
        image = draw_heat(panel, grid, highest, numbers=not wide)
        panel.set_title(heading)
    figure.colorbar(image, ax=axes, label=unit)
    return axes.flat[0]


def plot_dots(
    rows: Mapping[str, Sequence[float]], title: str, xlabel: str, marked: Sequence[str] = ()
) -> "Axes":
    """A dot a seed and a line at the mean, with its number to the right: for values so near to each
    other that bars from zero would hide what differs.

    rows: label -> the values of all seeds; marked: labels of the rows in green
    """
    axes = _axes(title)
    axes.figure.set_size_inches(7, 0.9 + 0.27 * len(rows))
    for place, (label, seeds) in enumerate(rows.items()):
        color, mean = GOOD if label in marked else INK, sum(seeds) / len(seeds)
        axes.scatter(seeds, [place] * len(seeds), color=color, s=26, alpha=0.6)
        axes.plot([mean, mean], [place - 0.35, place + 0.35], color=color, linewidth=2.5)
        beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{mean:.1f}", (1, place), xycoords=("axes fraction", "data"), **beside)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(axis="x", color=PALE)
    axes.set(xlabel=xlabel)
    return axes


def table(rows: Sequence[Mapping[str, object]]) -> "HTML":
    """Rows with the same keys as a table for reading: text to the left, numbers to the right."""
    from IPython.display import HTML

    def cell(value: object) -> str:
        side = "right" if isinstance(value, int | float) else "left"
        return f'<td style="text-align:{side};vertical-align:top">{html.escape(str(value))}</td>'

    head = (
        "".join(f'<th style="text-align:left">{html.escape(name)}</th>' for name in rows[0])
        if rows
        else ""
    )
    body = "".join(f"<tr>{''.join(map(cell, row.values()))}</tr>" for row in rows)
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _axes(title: str) -> "Axes":
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.set_title(title, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
