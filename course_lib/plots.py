"""Figures: arrays in, matplotlib Axes out; and tables for notebooks.

Notebooks and slides draw with the same functions.

The title of a figure is its finding, so the caller gives it; axes carry their units.
"""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes

INK, ACCENT, GOOD, PALE = "#1b263b", "#d1495b", "#2a9d8f", "#cfd8dc"
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


def plot_bills(bills: Mapping[str, Mapping[str, float]], title: str) -> "Axes":
    """Stacked bars of memory. bills: recipe -> part -> gigabytes (10^9 bytes)."""
    axes = _axes(title)
    parts = list(next(iter(bills.values())))
    left = [0.0] * len(bills)
    for part, color in zip(parts, (INK, GOOD, ACCENT, PALE), strict=False):
        widths = [row[part] for row in bills.values()]
        axes.barh(list(bills), widths, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.1f}", va="center", color=INK)
    axes.invert_yaxis()
    axes.set(xlabel="GB", xlim=(0, 1.12 * max(left)))
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
    for (name, points), color in zip(lines.items(), COLORS, strict=False):
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
) -> "Axes":
    """A dot a run, a color and a marker a group; thin lines lead from the runs of one label to
    their mean, where the label stands. points: group -> label -> (x, y) pairs.
    """
    axes = _axes(title)
    for (group, labels), color, marker in zip(points.items(), COLORS, "os^Dv", strict=False):
        pairs = [pair for runs in labels.values() for pair in runs]
        axes.scatter(*zip(*pairs, strict=True), color=color, marker=marker, s=45, label=group)
        for label, runs in labels.items():
            x, y = (sum(values) / len(runs) for values in zip(*runs, strict=True))
            for run in runs:
                axes.plot([x, run[0]], [y, run[1]], color=color, linewidth=0.6)
            axes.annotate(label, (x, y), (3, 3), textcoords="offset points", color=color)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    return axes


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
    """A bar a row: the mean over seeds, with its number, and a dot a seed.

    bars: label -> the values of all seeds; marked: labels of the bars in green
    """
    axes = _axes(title)
    means = [sum(seeds) / len(seeds) for seeds in bars.values()]
    colors = [GOOD if label in marked else PALE for label in bars]
    axes.barh(list(bars), means, color=colors, height=0.66)
    for row, (mean, seeds) in enumerate(zip(means, bars.values(), strict=True)):
        axes.scatter(seeds, [row] * len(seeds), color="white", edgecolor=INK, s=30, zorder=3)
        axes.text(1.02 * max(seeds), row, f"  {mean:.0f}", va="center", color=INK, weight="bold")
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=(0, 1.12 * max(map(max, bars.values()))))
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
