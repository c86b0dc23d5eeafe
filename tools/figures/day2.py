"""The figures of Day 2, and the tables of its deck that are measured."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.axes import Axes

from course_lib import experiments, plots
from course_lib.experiments import Outcome, Sweep
from course_lib.plots import ACCENT, GOOD, INK, MASKED, MUTED, PALE, box, canvas, centred
from tools.figures.drawing import (
    Notebook,
    Row,
    Statements,
    found,
    headline,
    printed,
    read_notebook,
    table_rows,
    week_rows,
    widened,
)

NAME = "day2_lora"
WEEK = ("untouched", "full fine-tuning", "last blocks", "LoRA")  # the methods of Days 1 and 2
ROWS, COLUMNS, RANK = 500, 200, 3  # the example of section 2.2
PLAIN = ("retention", "gained")  # rates of the plain questions
KEPT = (0, 1, 2, 4, 8, 128)  # directions of the table


def figures(notebook: Notebook) -> dict[str, Callable[[], Axes]]:
    """What draws each figure of the day."""
    return {
        "energy": draw_energy,
        "shapes": draw_shapes,
        "start": lambda: draw_start(notebook),
        "rates": draw_rates,
        "scales": draw_scales,
        "where": draw_where,
        "forgetting": draw_forgetting,
        "new_words": draw_new_words,
        "blend": lambda: draw_blend(notebook),
    }


def tables(notebook: Notebook) -> list[list[Row]]:
    """The tables of the deck that are measured."""
    return [
        switch_rows(notebook),
        cut_rows(),
        result_rows(notebook),
        week_rows(experiments.read("week").where(*WEEK)),
        rank_rows(),
        merge_rows(notebook),
        checkpoint_rows(notebook),
    ]


# --- what was measured


def values(sweep: Sweep, measure: str = "exact match") -> list[float]:
    """Of every outcome, in the measure's unit."""
    return of(measure, sweep.outcomes)


def of(measure: str, runs: Sequence[Outcome]) -> list[float]:
    return [run.scores[measure] for run in runs]


def directions(model: str, others: str = "others trained") -> dict[int, dict[str, float]]:
    """Mean scores of "tiny" or "smollm2" with k directions of their updates, by k; others: the
    norms and embeddings.
    """
    sweep = experiments.read(f"lora_update_{model}").where(norms_and_embeddings=others)
    kept = sorted({outcome.settings["directions"] for outcome in sweep.outcomes})
    return {
        k: {name: sweep.where(directions=k).mean(name) for name in sweep.measures} for k in kept
    }


def random_energy(rows: int, columns: int) -> list[float]:
    """Percent of the energy in the first k directions of a random matrix, for k = 1, 2, ..."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    squares = torch.linalg.svdvals(matrix) ** 2
    return [round(share, 1) for share in (100 * squares.cumsum(0) / squares.sum()).tolist()]


def best_rates() -> dict[int, Sweep]:
    """Of each rank on `tiny` the runs at the learning rate with the lowest mean response loss."""
    sweep = experiments.at_best_rates(experiments.read("lora_rank_and_rate"), "response loss")
    ranks = dict.fromkeys(outcome.settings["rank"] for outcome in sweep.outcomes)
    return {rank: sweep.where(rank=rank) for rank in ranks}


def scales(rate: float | None = None) -> dict[float, Sweep]:
    """Runs of rank 64 on `tiny` by their scale: at this rate, or each at its own."""
    sweeps = {
        0.125: experiments.read("lora_scaling").where(scale=0.125),
        2: experiments.read("lora_rank_and_rate").where(rank=64),
        8: experiments.read("lora_scaling").where(scale=8),
    }
    if rate is not None:
        return {scale: sweeps[scale].where(learning_rate=rate) for scale in (2, 8)}
    return {
        scale: experiments.at_best_rates(sweep, "response loss") for scale, sweep in sweeps.items()
    }


# --- tables


def switch_rows(notebook: Notebook) -> list[Row]:
    """The notebook's opening: three questions, and the replies with the adapter on and off."""
    columns = ("question", "on", "off", "on again")
    rows = table_rows(notebook, '"on again": "default"')
    return [{column: row[column].partition("\n")[0].strip() for column in columns} for row in rows]


def cut_rows() -> list[Row]:
    rows = []
    for k in KEPT:
        row: Row = {"directions kept": k}
        for model, label in (("tiny", "tiny"), ("smollm2", "SmolLM2")):
            for others, note in (("others trained", ""), ("others put back", ", rest put back")):
                row[f"{label}{note}"] = f"{directions(model, others)[k]['exact match']:.0f} %"
        rows.append(row)
    return rows


def result_rows(notebook: Notebook) -> list[Row]:
    """The untouched model, Day 1's, as Day 1 found them on its hundred questions, and today's."""
    yesterday, today = headline(read_notebook("day1_alpaca")), headline(notebook)
    rows = []
    for measure in ("valid JSON", "right topic", "right answer", *PLAIN):
        free = " (free form)" if measure == "right answer" else ""
        asked = f" (today of {today[measure]['questions']})" if measure in PLAIN else ""
        before, after = (f"{yesterday[measure][when]:.0f} %" for when in ("before", "after"))
        rows.append([measure + asked, before + free, after, f"{today[measure]['after']:.0f} %"])
    (full,) = {
        outcome.trained for outcome in experiments.read("week").where("full fine-tuning").outcomes
    }
    rows.append(["weights trained", "0", f"{full:,}", f"{today['weights trained']['after']:,}"])
    head = ("of 100 questions", "untouched", "Day 1: all weights", "today: LoRA")
    return [dict(zip(head, row, strict=True)) for row in rows]


def rank_rows() -> list[Row]:
    week = experiments.read("lora_rank_of_the_week") + experiments.read("week").where(
        "LoRA", layers="all linear layers"
    )
    tiny, rows = best_rates(), []
    for rank in sorted(tiny | dict.fromkeys([8])):
        found, row = tiny.get(rank), {"rank": rank, "tiny: exact match": ""}
        if found:
            rate = found.outcomes[0].settings["learning rate"]
            row["tiny: exact match"] = f"{experiments.spread(values(found), 1)} at {rate:g}"
        for measure in ("right topic", "right answer", "retention"):
            of_rank = values(week.where(rank=rank), measure)
            name = f"SmolLM2: {measure}" if measure == "right topic" else measure
            row[name] = experiments.spread(of_rank, 1) if of_rank else ""
        rows.append(row)
    return rows


def merge_rows(notebook: Notebook) -> list[Row]:
    found = re.findall(
        r"'(base|with adapter|merged)': '(\d+ ms)'",
        printed(notebook, 'for name in ("base", "with adapter", "merged")'),
    )
    return [{"one forward pass": name, "median of 5": time} for name, time in found]


def checkpoint_rows(notebook: Notebook) -> list[Row]:
    return table_rows(notebook, "memory.checkpoint_blocks(base.model, count)")


# --- drawings


def draw_energy() -> Axes:
    lines = {
        label: {k: scores["energy"] for k, scores in directions(model).items() if k > 0}
        for model, label in (("tiny", "update of tiny"), ("smollm2", "Day 1's update of SmolLM2"))
    }
    for rows, columns in ((128, 128), (384, 128), (576, 576)):
        shares = random_energy(rows, columns)
        lines[f"random, {rows} x {columns}"] = {k: shares[k - 1] for k in lines["update of tiny"]}
    axes = widened(
        plots.plot_lines(lines, "", "directions kept (k)", "% of the energy", log_x=True)
    )
    axes.set(ylim=(0, 104))
    axes.grid(axis="y", color=PALE)
    return axes


def draw_shapes() -> Axes:
    return plots.plot_lora(ROWS, COLUMNS, RANK)


def draw_start(notebook: Notebook) -> Axes:
    """Three ways to start, and what the notebook finds: is the model unchanged, which matrix has a
    gradient.
    """
    verdicts = {
        "A random, B zero": "trains, and starts\nas the base",
        "both random": "trains, but starts\nas another model",
        "both zero": "never trains",
    }
    axes = canvas(11, 4.4)
    columns = {"output unchanged": 4.35, "A has a gradient": 5.95, "B has a gradient": 7.45}
    for column, x in columns.items():
        centred(axes, x, 3.95, textwrap.fill(column, 9))
    rows = [row for row in table_rows(notebook, '"output unchanged"') if row["start"] in verdicts]
    for row, y in zip(rows, (2.95, 1.75, 0.55), strict=True):
        zero = {"A": row["start"] == "both zero", "B": row["start"] != "both random"}
        for name, x, width, height in (("B", 0.45, 0.36, 0.95), ("A", 1.4, 1.1, 0.36)):
            text, face, color = ("0", MASKED, MUTED) if zero[name] else (name, GOOD, "white")
            box(axes, x, y, width, height, text, face, color=color, weight="bold")
        axes.text(2.2, y, row["start"].replace(", ", ",\n"), va="center", color=INK)
        for column, x in columns.items():
            text, color = ("yes", GOOD) if row[column] == "True" else ("no", ACCENT)
            centred(axes, x, y, text, color=color, weight="bold", size=19)
        axes.text(8.5, y, verdicts[row["start"]], va="center", color=INK)
    return axes


def draw_rates() -> Axes:
    """Exact match on `tiny` by learning rate, every run: two ranks, two rules for alpha."""
    grown, fixed = experiments.read("lora_rank_and_rate"), experiments.read("lora_fixed_alpha")
    sweeps = {f"r = {rank}, alpha = {2 * rank}": grown.where(rank=rank) for rank in (1, 64)}
    sweeps |= {f"r = {rank}, alpha = 8": fixed.where(rank=rank) for rank in (1, 64)}
    axes = seeds_by_rate(sweeps, "exact match", "% exact match")
    axes.set(ylim=(60, 92), xlim=(4e-4, 3e-2))  # what lies lower, or at 0.05, is cut off
    return axes


def draw_scales() -> Axes:
    """Response loss of rank 64 on `tiny`, by scale and learning rate."""
    scaling, ranks = experiments.read("lora_scaling"), experiments.read("lora_rank_and_rate")
    sweeps = {"scale 0.125": scaling.where(scale=0.125), "scale 2": ranks.where(rank=64)}
    sweeps["scale 8"] = scaling.where(scale=8)
    axes = seeds_by_rate(sweeps, "response loss", "response loss (nats)")
    axes.set_ylim(0, 1)
    return axes


def seeds_by_rate(sweeps: Mapping[str, Sweep], measure: str, ylabel: str) -> Axes:
    lines: dict[str, dict[float, list[float]]] = {}
    for name, sweep in sweeps.items():
        for run in sweep.outcomes:
            rates = lines.setdefault(name, {})
            rates.setdefault(run.settings["learning rate"], []).append(run.scores[measure])
    axes = widened(plots.plot_seeds(lines, "", "learning rate", ylabel))
    axes.grid(axis="y", color=PALE)
    return axes


def draw_where() -> Axes:
    best = experiments.at_best_rates(experiments.read("lora_where"), "exact match")
    bars = {
        f"{label.replace(' learning rate', ' rate')}: {runs[0].trained:,}": runs
        for label, runs in best.by_label().items()
    }
    return seed_bars(bars, [label for label in bars if label.startswith("LoRA")], "% exact match")


def draw_new_words() -> Axes:
    older = experiments.read("tiny_new_vocabulary")
    words = experiments.read("lora_vocabulary") + older.where("full fine-tuning")
    best = experiments.at_best_rates(words + older.where("LoRA", rank=16), "exact match")
    bars = {
        label.replace(", all linear layers", "").replace(" learning rate", " rate"): runs
        for label, runs in sorted(
            best.by_label().items(),
            key=lambda bar: sum(run.scores["exact match"] for run in bar[1]),
        )
    }
    embedded = [
        label
        for label in bars
        if label.startswith(("full", "embeddings")) or "and the emb" in label
    ]
    axes = seed_bars(bars, embedded, "% of 120 words known")
    for color, label in ((GOOD, "embeddings train"), (PALE, "embeddings frozen")):
        axes.barh([0], [0], color=color, label=label)
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.3, -0.16))
    return axes


def seed_bars(bars: Mapping[str, list[Outcome]], marked: Sequence[str], xlabel: str) -> Axes:
    """A bar a row: the mean exact match, with its number, and a dot a seed."""
    scores = {label: of("exact match", runs) for label, runs in bars.items()}
    return widened(plots.plot_bars(scores, "", xlabel, marked))


def task_runs(method: str, rate: float | None = None) -> Sweep:
    """Runs of the task of the week, those of the table and those at other rates: full fine-tuning,
    or LoRA on all linear layers.
    """
    both = experiments.read("week") + experiments.read("lora_forgetting")
    settings = {} if rate is None else {"learning_rate": rate}
    if method == "LoRA":
        settings["layers"] = "all linear layers"
    return both.where(method, **settings)


def draw_forgetting() -> Axes:
    """Every run of the task of the week: what it learned, what it kept, and its learning rate."""
    lora = task_runs("LoRA") + experiments.read("lora_rank_of_the_week")
    groups = {"full fine-tuning": task_runs("full fine-tuning")}
    groups |= {f"LoRA, r = {rank}": lora.where(rank=rank) for rank in (1, 8, 64)}
    points = {}
    for name, group in groups.items():
        rates = sorted({run.settings["learning rate"] for run in group.outcomes})
        each = {f"{rate:g}": group.where(learning_rate=rate) for rate in rates}
        points[name] = {
            rate: list(zip(values(runs, "response loss"), values(runs, "retention"), strict=True))
            for rate, runs in each.items()
        }
    xlabel = "response loss on the task (nats): left is better"
    axes = widened(plots.plot_points(points, "", xlabel, "% retained"))
    axes.grid(color=PALE)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def draw_blend(notebook: Notebook) -> Axes:
    shares = {}
    for row in table_rows(notebook, "for opening, close in ("):
        opening, close = row["weights"].split(" / ")
        counts = {"opens": row["opens"], "closes": row["closes"], "both": row["both"]}
        shares[f"opening {opening}\nclose {close}"] = {
            name: int(count) / int(row["of"]) for name, count in counts.items()
        }
    axes = widened(plots.plot_shares(shares, ""))
    axes.set(ylabel="% of replies")
    axes.tick_params(axis="x", labelsize=14.5)
    return axes


# --- what the deck says beside its figures and tables


def stated(notebook: Notebook) -> Statements:
    trained, w0 = found(
        notebook, "matrix_rank(B @ A)", r"numbers trained: ([\d,]+) instead of ([\d,]+)"
    )
    before, on, total = opening(notebook)
    core, peft = found(
        notebook,
        'paths = {"course_lib"',
        r"yours and course_lib's: .* gradients by at most (\S+)\n"
        r"yours and peft's: .* gradients by at most (\S+)",
    )
    assert max(float(core), float(peft)) < 1e-5
    count = 'for name, model, targets, rank in (("LLaMA-7B"'
    counted = {
        name: found(notebook, count, rf"{name}, .*: ([\d,]+) \+ ([\d,]+) =")
        for name in ("LLaMA-7B", "Falcon-7B")
    }
    fewer, smaller = found(
        notebook, "GPT3_LAYERS, GPT3_WIDTH", r"weights: ([\d,]+) times.*MiB = ([\d,]+)"
    )
    gpt3 = next(row for row in table_rows(notebook, "GPT3_LAYERS, GPT3_WIDTH") if row["r"] == "4")
    throughput, less = found(notebook, "43.1 / 32.5", r"throughput \+([\d.]+)%, time -([\d.]+)%")
    adapter, model = found(
        notebook, '"adapter on disk:', r"adapter on disk: ([\d.]+ MB); the model: (\d+ MB)"
    )
    *_, weights = result_rows(notebook)
    full, lora = (
        int(weights[column].replace(",", "")) for column in ("Day 1: all weights", "today: LoRA")
    )
    energy, chance = round(directions("tiny")[8]["energy"]), random_energy(128, 128)[7]
    right, committed = found(
        notebook,
        "axes = plots.plot_loss(losses, f",
        r"exact match on 540 questions: ([\d.]+) %; .*: ([\d.]+) %",
    )
    return {
        "Off, on, off": [f"{on} of {total} replies exactly right; off: {before}"],
        "A few directions": [
            f"Eight directions: {energy} % for tiny, {chance:.0f} % of a random matrix of its size"
        ],
        "Freeze the matrix": [f"{trained} numbers instead of {w0}"],
        "The method in code": [
            f"Trained on tiny: {right} % exact match, the library {committed} %"
        ],
        "Count before": [
            "| LLaMA-7B | q, v | 8 | {1} | {0} | 8 MiB |".format(*counted["LLaMA-7B"]),
            "| Falcon-7B | query_key_value | 32 | {1} | {0} | 18 MiB |".format(
                *counted["Falcon-7B"]
            ),
            "| GPT-3 | {GPT-3 175B} | 4 | 175 billion | {trained} | {file in fp16} |".format(
                **gpt3
            ),
            f"{fewer} times fewer trained weights, a file {smaller} times smaller",
        ],
        "1.8 %": [f"{100 * lora / full:.1f} % of the weights learn the form"],
        "Merged": [f"On disk: {adapter} for the adapter, {model} for the model"],
        "Four sentences": [f"{throughput} % more throughput, {less} % less time"],
    }


def opening(notebook: Notebook) -> tuple[str, ...]:
    """Of the replies in the opening: exactly right before, with the adapter on, and how many."""
    text = printed(notebook, '"on again": "default"')
    exact = dict(re.findall(r"^(\w[\w ]*?) *: of .* answer, (\d+) also end there", text, re.M))
    (total,) = set(re.findall(r": of (\d+) replies", text))
    assert exact["before"] == exact["off"]
    assert exact["on"] == exact["on again"]
    return exact["before"], exact["on"], total


def said(notebook: Notebook) -> Statements:
    best = {rank: round(runs.mean("exact match")) for rank, runs in best_rates().items()}
    ranks = experiments.read("lora_rank_and_rate")
    shared = {
        rank: round(ranks.where(rank=rank, learning_rate=5e-3).mean("exact match"))
        for rank in (1, 4, 16, 64)
    }
    fixed = experiments.read("lora_fixed_alpha")
    kept = {
        rank: round(fixed.where(rank=rank, learning_rate=5e-3).mean("exact match"))
        for rank in (1, 16, 64)
    }
    full, lora = found(
        notebook, "before activations", r"'full fine-tuning': '([\d.]+) GB', 'LoRA': '([\d.]+) GB'"
    )
    blends = {row["weights"]: row for row in table_rows(notebook, "for opening, close in (")}
    half, both = blends["0.5 / 0.5"], blends["1 / 1"]
    full_kept = [
        round(task_runs("full fine-tuning", rate).mean("retention")) for rate in (5e-5, 1e-4, 2e-4)
    ]
    lora_kept = [round(task_runs("LoRA", rate).mean("retention")) for rate in (1e-3, 2e-3, 5e-3)]
    assert full_kept[0] == full_kept[1]
    by_scale = {
        rate: {scale: round(sweep.mean("exact match")) for scale, sweep in scales(rate).items()}
        for rate in (5e-4, 2e-3, None)
    }
    return {
        "What alpha / r": [
            f"{shared[1]}, {shared[4]}, {shared[16]} and {shared[64]} percent",
            f"get {kept[1]}, {shared[4]}, {kept[16]} and {kept[64]}",
        ],
        "Audit": [
            f"at 0.0005 scale eight wins, {by_scale[5e-4][8]} against {by_scale[5e-4][2]}",
            f"at 0.002 it loses, {by_scale[2e-3][8]} against {by_scale[2e-3][2]}",
        ],
        "1.8 %": [
            f"take {lora} gigabytes instead of {full}",
        ],
        "The table of the week": [f"keeps less, {lora_kept[1]} percent against {full_kept[1]}"],
        "Does LoRA forget less?": [
            "keeps {1} percent at the two lower rates, and {2} at the highest".format(*full_kept),
            "LoRA of rank eight: {}, {}, {}".format(*lora_kept),
        ],
        "How large": [f"rank one reaches {best[1]} percent and rank sixteen {best[16]}"],
        "Adapters mix": [
            "the close survives in {closes} of {of} replies, the opening in {opens}".format(**half),
            "both ornaments in {both} of {of}".format(**both),
        ],
    }
