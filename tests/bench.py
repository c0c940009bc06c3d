"""The measurements behind the numbers in the README. Nothing here passes or fails.

python tests/bench.py lzma --data pystdlib      what a general compressor makes of the same validation text
python tests/bench.py prepare                   peak memory of data/prepare.py on 50 MB and on 500 MB
"""

import argparse
import json
import lzma
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.prepare import DATA  # noqa: E402
from tokenizer import SPECIAL_TOKENS, Tokenizer  # noqa: E402


def bench_lzma(args):
    """Bits per byte that LZMA needs for the validation text after it has seen the training text: a yardstick
    for val_bpb.
    """
    folder = DATA / args.data
    dtype = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["dtype"]
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    texts = []
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"{split}*.bin"))
        ids = np.concatenate([np.fromfile(path, dtype=dtype) for path in paths])
        texts.append(tokenizer.decode_bytes(ids.tolist()).replace(SPECIAL_TOKENS[0].encode(), b""))
    train, val = texts
    window = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": len(train + val)}]
    alone, both, single = (len(lzma.compress(text, filters=window)) for text in (train, train + val, val))
    print(f"{args.data}: {len(val):,} bytes of validation text, {len(train):,} bytes of training text")
    print(f"LZMA, given the training text: {8 * (both - alone) / len(val):.3f} bits per byte")
    print(f"LZMA, without it:              {8 * single / len(val):.3f} bits per byte")


def write_distinct_text(folder, megabytes):
    """Files of 1 MB with random sentences, no two alike."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20000)]
    folder.mkdir()
    for i in range(megabytes):
        text = " ".join(draw.choices(words, k=155000))
        (folder / f"{i:04}.txt").write_text(text.replace(" a", ".\nA")[: 2**20], encoding="utf-8")


# runs its arguments and prints the most memory that they held at once
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def bench_prepare(args):
    """Peak memory and speed of preparing a small and a large corpus with a given vocabulary."""
    peaks = []
    with tempfile.TemporaryDirectory() as work:
        for megabytes in args.megabytes:
            text, vocabulary = Path(work) / f"bench-{megabytes}", Path(work) / "tokenizer.json"
            write_distinct_text(text, megabytes)
            if not peaks:
                Tokenizer.train([(text / "0000.txt").read_text()], 4096).save(vocabulary)
            program = [sys.executable, ROOT / "data/prepare.py", text, "--tokenizer", vocabulary]
            start = time.time()
            result = subprocess.run([sys.executable, "-c", PEAK, *program], check=True, capture_output=True)
            speed = megabytes / (time.time() - start)
            shutil.rmtree(DATA / text.name)
            peaks.append(int(result.stdout) * (1 if sys.platform == "darwin" else 1024) / 1e6)
            print(f"{megabytes:5} MB of text: peak memory {peaks[-1]:.0f} MB, {speed:.1f} MB/s", flush=True)
    print(f"peak memory, large to small: {peaks[-1] / peaks[0]:.3f}")


def main():
    parser = argparse.ArgumentParser(description="Measure.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("lzma", help="bits per byte by a general compressor")
    command.add_argument("--data", default="pystdlib", help="prepared data (pystdlib)")
    command.set_defaults(bench=bench_lzma)
    command = commands.add_parser("prepare", help="memory of data/prepare.py")
    command.add_argument(
        "--megabytes", type=int, nargs=2, default=(50, 500), help="sizes of the two corpora (50 500)"
    )
    command.set_defaults(bench=bench_prepare)
    args = parser.parse_args()
    args.bench(args)


if __name__ == "__main__":
    main()
