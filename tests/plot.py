"""Draw how runs went, from their log.csv: python tests/plot.py LOG... --out curve.svg"""

import argparse
import csv
from pathlib import Path

import matplotlib
from matplotlib import pyplot

# (title, columns) of each picture; dots: of held-out text or questions
LOSSES = [
    ("training: nats per token", ["train_loss"]),
    ("held-out text: bits per byte", ["val_bpb"]),
]
REWARDS = [
    ("mean reward", ["train_reward", "val_reward (pass@1)", "val_best (pass@G)"]),
    ("groups with a signal", ["train_signal", "val_signal"]),
    ("tokens of an answer", ["train_length", "val_length"]),
    ("entropy: nats per token", ["val_entropy"]),
    LOSSES[1],
]


def read(path):
    """The rows of a log.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def points(rows, column):
    """(seconds, values) of a column, from the lines that have a value there."""
    found = [(float(row["seconds"]), float(row[column])) for row in rows if row.get(column)]
    return [x for x, _ in found], [y for _, y in found]


def main():
    parser = argparse.ArgumentParser(description="Draw what runs measured over their time.")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.csv of one run or of several")
    parser.add_argument("--out", required=True, help="the picture: .svg, .png or .pdf")
    parser.add_argument("--yardstick", nargs=2, metavar=("NAME", "BPB"), help="a line for comparison")
    args = parser.parse_args()
    matplotlib.rcParams["font.size"] = 9
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = ""  # equal logs give equal files
    logs = [(log.parent.name, read(log)) for log in args.logs]
    pictures = LOSSES
    if all(rows and "train_reward" in rows[0] for _, rows in logs):  # of finetune.py --method rl
        pictures = REWARDS
    n = len(pictures)
    figure, panels = pyplot.subplots(1, n, figsize=(max(8, 3 * n), 2.8), layout="constrained")
    for axes, (title, columns) in zip(panels, pictures):
        for name, rows in logs:
            for column in columns:
                column, _, meaning = column.partition(" ")
                marker = "o" if column.startswith("val_") else None
                label = name if len(columns) == 1 else f"{name}: {column} {meaning}".rstrip()
                axes.plot(*points(rows, column), linewidth=1, marker=marker, markersize=3, label=label)
        if args.yardstick and columns == ["val_bpb"]:
            name, value = args.yardstick
            label = f"{name}, {value}"
            axes.axhline(float(value), color="grey", linestyle="dashed", linewidth=1, label=label)
        axes.set_title(title)
        axes.set_xlabel("seconds")
        axes.spines[["top", "right"]].set_visible(False)
        if len(columns) > 1 or axes is panels[-1]:
            axes.legend(frameon=False)
    metadata = None
    if args.out.endswith(".svg"):
        metadata = {"Date": None}
    figure.savefig(args.out, metadata=metadata)


if __name__ == "__main__":
    main()
