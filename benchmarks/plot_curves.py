"""How do our learning curves compare with published ones: a picture, and a table in Markdown.

    python benchmarks/plot_curves.py
    python benchmarks/plot_curves.py --reference scores.csv --first-reference scores_tdmpc1.csv --runs runs

There is one panel per task, and another where it is learned from pixels. A curve is a run's eval.csv
(step,reward,success,seed; several seeds one below the other), named TASK.csv or TASK__LABEL.csv; a LABEL that starts
with pixels means tdmpc2_jax_rgb.py, one that starts with TD-MPC tdmpc_jax.py. The references are tables
method,task,metric,step,mean,min,max,seeds. Of several seeds the thick line is the mean, the band goes from the lowest
to the highest, up to the step that all of them reached; thin lines are the seeds. A seed that was evaluated less often
than another is on the straight line between its evaluations.
"""

import csv
import dataclasses
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ("#1f6fb2", "#c8502d", "#3b8f4f", "#7b4fa3", "#b0892c", "#2f9c9c", "#d4669f", "#3f3f3f", "#8fbf3f")
COLOURS += ("#7f3f2f", "#58c1e8", "#b9b9d9")
GREY = "#6b6b6b"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True)
class Args:
    curves: str = "benchmarks/results/curves"
    """folder of the curves"""
    output: str = "benchmarks/results/curves.png"
    """picture to write"""
    reference: str | None = None
    """table of published curves"""
    method: str = "tdmpc2"
    """method of that table to draw; in panels of pixels METHOD-pixels"""
    method_name: str = "TD-MPC2 as published"
    """its name in the legend"""
    first_reference: str | None = None
    """table of published curves of TD-MPC, the first version (method tdmpc), drawn beside ours of it"""
    runs: str | None = None
    """folder of runs whose training episodes are drawn as dots (needs tensorboard); of pixels: names with rgb"""
    columns: int = 3
    """most panels in a row"""


class Published(NamedTuple):
    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def read_curves(folder: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Rows of every curve: task -> label -> rows."""
    curves = defaultdict(dict)
    for path in sorted(folder.glob("*.csv")):
        task, _, label = path.stem.partition("__")
        with path.open(newline="") as file:
            curves[task][label.replace("_", " ")] = list(csv.DictReader(file))
    return dict(sorted(curves.items()))


def by_panel(curves: dict[str, dict[str, list]]) -> dict[tuple[str, bool], dict[str, list]]:
    """(task, whether from pixels) -> label -> rows."""
    panels = defaultdict(dict)
    for task, labels in curves.items():
        for label, rows in labels.items():
            panels[task, label.startswith("pixels")][label] = rows
    return dict(sorted(panels.items()))


def by_seed(rows: list[dict[str, str]], column: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every seed."""
    seeds = defaultdict(dict)
    for row in rows:
        seeds[row["seed"]][float(row["step"])] = float(row[column])
    return {s: (np.array(sorted(c)), np.array([c[step] for step in sorted(c)])) for s, c in seeds.items()}


def shared_steps(seeds: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The steps [n] of evaluations up to the last one that all seeds reached, and their values there [seeds, n], on the
    straight line between two evaluations where a seed has none. Of several seeds, steps are rounded (to 1,000 of
    100,000): where episodes end at any step, one seed is evaluated a few steps later than another."""
    if len(seeds) == 1:
        [(step, value)] = seeds.values()
        return step, value[None]
    last = max(step[-1] for step, _ in seeds.values())
    unit = 10.0 ** max(0.0, np.floor(np.log10(last + 1)) - 2)
    rounded = [(step / unit).round() * unit for step, _ in seeds.values()]
    steps = np.unique(np.concatenate(rounded))
    steps = steps[(steps >= max(step[0] for step in rounded)) & (steps <= min(step[-1] for step in rounded))]
    values = [value for _, value in seeds.values()]
    return steps, np.array([np.interp(steps, step, value) for step, value in zip(rounded, values, strict=True)])


def read_published(path: str, method: str) -> dict[str, tuple[str, Published]]:
    """Task -> metric ("reward" or "success") and curve of one method of a reference table."""
    rows = defaultdict(list)
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] == method:
                rows[row["task"], row["metric"]].append(
                    [float(row[k]) for k in ("step", "mean", "min", "max", "seeds")]
                )
    published = {}
    for (task, metric), points in rows.items():
        step, mean, low, high, seeds = np.array(sorted(points)).T
        published[task] = metric, Published(step, mean, low, high, int(seeds.max()))
    return published


def read_episodes(runs: Path, task: str, pixels: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps and returns of the training episodes of a task's runs, from pixels or from states, out of their TensorBoard
    files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tag, points = "charts/episodic_return", []
    folders = {path.parent for path in (runs / task).rglob("events.out.tfevents.*")}
    for folder in sorted(path for path in folders if ("rgb" in str(path.relative_to(runs / task))) == pixels):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        if tag in events.Tags()["scalars"]:
            points += [(event.step, event.value) for event in events.Scalars(tag)]
    return np.array(points).reshape(-1, 2).T


def draw_published(axes, reference: Published, shown: np.ndarray, name: str, colour: str = GREY) -> None:
    """Mean with a band from the lowest to the highest seed; bars where the points are too few to suggest a line."""
    step, mean, low, high = (
        reference.step[shown] / 1e3,
        reference.mean[shown],
        reference.low[shown],
        reference.high[shown],
    )
    label = f"{name} (mean, min to max of {reference.seeds} seeds)"
    line = {"color": colour, "markersize": 5, "clip_on": False, "label": label}
    if len(step) < 4:
        axes.errorbar(step, mean, [mean - low, high - mean], fmt="o", capsize=3, elinewidth=1.4, zorder=5, **line)
    else:
        axes.fill_between(step, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(step, mean, "o--", linewidth=1.4, **line)


def draw_panel(axes, title: str, curves, colours, published, first, episodes, published_name: str) -> None:
    """One task: training episodes, the published curves (`first` is that of the first version), and ours on top."""
    succeeds = any(float(row["success"]) for rows in curves.values() for row in rows)
    metric, reference = published or ("success" if succeeds else "reward", None)
    end = max(float(row["step"]) for rows in curves.values() for row in rows)
    if reference is not None:  # up to the first published point behind our last, so that one stands beside it
        behind = reference.step[reference.step >= end]
        end = max(end, behind[0]) if len(behind) else end
        draw_published(axes, reference, reference.step <= end, published_name)
    if episodes is not None and metric == "reward":
        axes.plot(
            episodes[0] / 1e3, episodes[1], ".", color=COLOURS[0], alpha=0.25, markersize=3, label="training episodes"
        )
    for label, rows in curves.items():
        seeds = by_seed(rows, metric)
        step, values = shared_steps(seeds)
        if len(seeds) > 1:
            axes.fill_between(step / 1e3, values.min(0), values.max(0), color=colours[label], alpha=0.18, linewidth=0)
            for seed_step, value in seeds.values():
                axes.plot(seed_step / 1e3, value, color=colours[label], linewidth=0.8, alpha=0.45)
        if label.startswith("TD-MPC") and first and first[0] == metric:
            draw_published(axes, first[1], first[1].step <= end, "TD-MPC as published", colours[label])
        script = "tdmpc2_jax_rgb.py" if label.startswith("pixels") else "tdmpc2_jax.py"
        script = "tdmpc_jax.py" if label.startswith("TD-MPC") else script
        name = ", ".join(filter(None, [script, label.removeprefix("pixels ").removeprefix("TD-MPC")]))
        axes.plot(step / 1e3, values.mean(0), color=colours[label], linewidth=2.4, label=name, solid_capstyle="round")
    axes.set_title(title, loc="left")
    axes.set_xlim(0, end / 1e3)
    axes.locator_params(axis="x", nbins=6)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    # The range of published tasks, unless next to nothing is learned within the picture
    top = 1.0 if metric == "success" else 1000.0 if published and high > 100 else high
    axes.set_ylim(min(0.0, 1.05 * low), 1.02 * max(top, high))
    axes.set_xlabel("thousand simulator steps")
    axes.set_ylabel("success rate" if metric == "success" else "return")


def row_of_table(task: str, label: str, rows: list[dict[str, str]], published) -> str:
    """A curve in one line: the last evaluation that all seeds reached, the mean of the last three, what is published
    at the first step from there on."""
    metric, reference = published or ("success" if any(float(row["success"]) for row in rows) else "reward", None)
    seeds = by_seed(rows, metric)
    step, values = shared_steps(seeds)

    def spread(mean: float, low: float, high: float, count: int) -> str:
        digits = 2 if metric == "success" else 1 if abs(mean) < 10 else 0
        return f"{mean:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if count > 1 else "")

    last, lately = values[:, -1], values[:, -3:].mean(1)
    cells = [task, label, str(len(seeds)), f"{step[-1]:,.0f}"]
    cells += [spread(found.mean(), found.min(), found.max(), len(seeds)) for found in (last, lately)]
    beside = ""
    if reference is not None and (behind := np.flatnonzero(reference.step >= step[-1])).size:
        i = behind[0]
        beside = spread(reference.mean[i], reference.low[i], reference.high[i], reference.seeds)
        beside += f" at {reference.step[i]:,.0f}"
    metric = "success" if metric == "success" else "return"
    return "| " + " | ".join([*cells[:4], f"{metric} {cells[4]}", cells[5], beside]) + " |"


def main(args: Args) -> None:
    curves = by_panel(read_curves(Path(args.curves)))
    if not curves:
        sys.exit(f"error: {args.curves} holds no .csv file")
    methods = {False: args.method, True: f"{args.method}-pixels"}
    published = {k: read_published(args.reference, method) if args.reference else {} for k, method in methods.items()}
    first = read_published(args.first_reference, "tdmpc") if args.first_reference else {}
    labels = sorted({label for panel in curves.values() for label in panel})
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    columns = min(args.columns, len(curves))
    rows = math.ceil(len(curves) / columns)
    lines = ["| task | settings | seeds | steps | ours | mean of the last three | published |", "|---" * 7 + "|"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            rows, columns, figsize=(max(4.2 * columns, 6), 3.1 * rows + 0.5), squeeze=False, layout="constrained"
        )
        for axes, ((task, pixels), curve) in zip(panels.flat, curves.items(), strict=False):
            episodes = read_episodes(Path(args.runs), task, pixels) if args.runs else None
            title = f"{task} from pixels" if pixels else task
            beside = published[pixels].get(task)
            if not beside and task in published[False]:  # never published from pixels
                beside = published[False][task][0], None
            draw_panel(axes, title, curve, colours, beside, first.get(task), episodes, args.method_name)
            for label, curve_rows in curve.items():
                other = first.get(task) if label.startswith("TD-MPC") else beside
                lines.append(row_of_table(task, label, curve_rows, other))
        for axes in panels.flat[len(curves) :]:
            axes.remove()
        legend = {}
        for axes in figure.axes:
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(name, handle)
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), columns))
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=150)
        plt.close(figure)
    print(f"{args.output}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
