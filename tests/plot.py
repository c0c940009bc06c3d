"""A picture of how runs went, from their log.csv: python tests/plot.py LOG... --out curve.svg"""

import argparse
import csv
from pathlib import Path

import matplotlib
from matplotlib import pyplot


def read(path, column):
    """(seconds, values) of a column of a log.csv, where it has any."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[column]]
    return [float(row["seconds"]) for row in rows], [float(row[column]) for row in rows]


def main():
    parser = argparse.ArgumentParser(description="Draw loss and bits per byte of runs over their time.")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.csv of a run, or several")
    parser.add_argument("--out", required=True, help="the picture: .svg, .png or .pdf")
    parser.add_argument("--yardstick", nargs=2, metavar=("NAME", "BPB"), help="a line for comparison")
    args = parser.parse_args()
    matplotlib.rcParams |= {
        "svg.hashsalt": "",
        "svg.fonttype": "none",
        "font.size": 9,
    }  # equal runs, equal files
    figure, (loss, bpb) = pyplot.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for log in args.logs:
        loss.plot(*read(log, "train_loss"), linewidth=1, label=log.parent.name)
        bpb.plot(*read(log, "val_bpb"), marker="o", markersize=3, label=log.parent.name)
    loss.set_title("training: nats per token")
    bpb.set_title("held-out text: bits per byte")
    if args.yardstick:
        name, value = args.yardstick
        bpb.axhline(float(value), color="grey", linestyle="dashed", linewidth=1, label=f"{name}, {value}")
    for axes in (loss, bpb):
        axes.set_xlabel("seconds")
        axes.spines[["top", "right"]].set_visible(False)
    bpb.legend(frameon=False)
    figure.savefig(args.out, metadata={"Date": None} if args.out.endswith(".svg") else None)


if __name__ == "__main__":
    main()
