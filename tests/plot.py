"""Draw how runs went, from their log.csv: python tests/plot.py LOG... --out curve.svg"""

import argparse
import csv
from pathlib import Path

import matplotlib
from matplotlib import pyplot


def read(path, column):
    """(seconds, values) of a column of a log.csv, from the lines that have a value there."""
    seconds, values = [], []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row[column]:
                seconds.append(float(row["seconds"]))
                values.append(float(row[column]))
    return seconds, values


def main():
    parser = argparse.ArgumentParser(description="Draw loss and bits per byte of runs over their time.")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.csv of one run or of several")
    parser.add_argument("--out", required=True, help="the picture: .svg, .png or .pdf")
    parser.add_argument("--yardstick", nargs=2, metavar=("NAME", "BPB"), help="a line for comparison")
    args = parser.parse_args()
    matplotlib.rcParams["font.size"] = 9
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = ""  # equal logs give equal files
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
    metadata = None
    if args.out.endswith(".svg"):
        metadata = {"Date": None}
    figure.savefig(args.out, metadata=metadata)


if __name__ == "__main__":
    main()
