"""Draw what a lesson gave to `lines`, `bars` or `squares` of book.py, as a small SVG."""

import io
import re

import matplotlib
from matplotlib import pyplot

GREY = "#bbbbbb"


def draw(picture, path):
    """picture: an entry of book.pictures."""
    matplotlib.rcParams["font.size"] = 9
    matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = ""  # equal numbers give equal files
    matplotlib.rcParams["path.simplify_threshold"] = 0.2
    if picture["kind"] == "lines":
        figure = draw_lines(picture)
    elif picture["kind"] == "bars":
        figure = draw_bars(picture)
    else:
        figure = draw_squares(picture)
    figure.suptitle(picture["title"], fontsize=10)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    pyplot.close(figure)
    shorter = re.sub(r"(\d\.\d)\d+", r"\1", svg.getvalue())  # a tenth of a point is enough
    path.write_text(re.sub(r"<metadata>.*?</metadata>\s*", "", shorter, flags=re.DOTALL), encoding="utf-8")


def draw_lines(picture):
    figure, axes = pyplot.subplots(figsize=(6, 2.8), layout="constrained")
    for name, (xs, ys) in picture["curves"].items():
        axes.plot(xs, ys, linewidth=1.2, marker="o" if len(xs) < 10 else None, markersize=3, label=name)
    if "x" in picture["log"]:
        axes.set_xscale("log")
    if "y" in picture["log"]:
        axes.set_yscale("log")
    axes.tick_params(which="minor", labelleft=False, labelbottom=False)  # they would overlap
    axes.set_xlabel(picture["xlabel"])
    axes.set_ylabel(picture["ylabel"])
    return finish(figure, axes, len(picture["curves"]) > 1)


def draw_bars(picture):
    groups = picture["groups"]
    names = list(next(iter(groups.values())))
    figure, axes = pyplot.subplots(figsize=(6, 2.8), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(places, [group[name] for group in groups.values()], width, label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(picture["ylabel"])
    return finish(figure, axes, len(names) > 1)


def draw_squares(picture):
    matrices = picture["matrices"]
    figure, panels = pyplot.subplots(1, len(matrices), figsize=(6, 2.4), layout="constrained", squeeze=False)
    for axes, (name, matrix) in zip(panels[0], matrices.items()):
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, interpolation="none")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(name, fontsize=9)
    return figure


def finish(figure, axes, with_legend):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, linewidth=0.3)
    axes.set_axisbelow(True)
    if with_legend:
        axes.legend(frameon=False, fontsize=8)
    return figure
