"""From token ids on disk to batches: stage 0's other end, which train.py reads.

Training goes through the blocks of the text in an order that is computed, not stored: each epoch all of them,
once, shuffled anew. So the place of a run in its data is one number, and memory does not grow with the text.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.prepare import DATA, SOURCES, prepare
from tokenizer import Tokenizer

IGNORED = -100  # as a target: not to be predicted


class Tokens:
    """The token ids of one split on disk, one file or several, read as one array."""

    def __init__(self, folder, split, dtype):
        single = Path(folder) / f"{split}.bin"
        paths = [single] if single.exists() else sorted(Path(folder).glob(f"{split}_*.bin"))
        sizes = [path.stat().st_size for path in paths]
        if not paths or 0 in sizes or any(size % np.dtype(dtype).itemsize for size in sizes):
            raise ValueError(f"{single} is missing or cut off: prepare the data again")
        self.parts = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, count):
        """Ids start ... start + count, as an int64 array."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces = []
        for part, offset in zip(self.parts[first:], self.starts[first:]):
            pieces.append(part[max(0, start - offset) : start + count - offset])
            if start + count <= offset + len(part):
                break
        return np.concatenate(pieces).astype(np.int64)


@dataclass
class Data:
    """Prepared data, opened."""

    name: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    fingerprint: str  # of all ids


def find_data(name):
    """The folder of prepared data; a known corpus is prepared now if it is missing."""
    folder = DATA / name
    if Path(name).name != name or not (folder / "meta.json").exists():
        if name not in SOURCES:
            ready = ", ".join(sorted(path.parent.name for path in DATA.glob("*/meta.json"))) or "none"
            known = f"prepared are {ready}, known are {', '.join(SOURCES)}"
            raise ValueError(f"no data named {name!r}: {known}; your own: `python data/prepare.py PATH`")
        prepare([name])
    return folder


def load_data(folder):
    """Open a folder of prepared data. ValueError: it is damaged or of an older version."""
    again = f"prepare it again: `python data/prepare.py ... --name {folder.name}`"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype, n_tokens, prints = meta["dtype"], meta["tokens"], meta["fingerprint"]
        expected, fingerprint = meta["tokenizer"], prints["train"] + prints["val"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{folder}/meta.json is damaged or of an older version: {again}") from None
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != expected:
        raise ValueError(f"{folder}/tokenizer.json is not the tokenizer that made the data: {again}")
    train, val = (Tokens(folder, split, dtype) for split in ("train", "val"))
    for split, tokens in (("train", train), ("val", val)):
        if len(tokens) != n_tokens[split]:
            wrong = f"{len(tokens):,} tokens, not {n_tokens[split]:,}"
            raise ValueError(f"{folder}/{split}.bin has {wrong}: {again}")
    return Data(folder.name, tokenizer, train, val, fingerprint)


def permute(i, n, key):
    """The i-th element of a pseudo-random permutation of range(n), computed, not stored.

    A Feistel network (Luby and Rackoff, 1988) maps numbers of 2b bits one to one, however it mixes; a result
    beyond n is mapped again.
    """
    b = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << b) - 1
    while True:
        left, right = i >> b, i & low
        for k in range(4):
            mixed = (right + key + k) * 0x9E3779B97F4A7C15
            mixed = ((mixed >> 29) ^ mixed) * 0xBF58476D1CE4E5B9
            left, right = right, left ^ (mixed >> 32) & low
        i = left << b | right
        if i < n:
            return i


class Blocks:
    """The order of training: each epoch all blocks of T + 1 tokens, shuffled anew, cut at another phase."""

    def __init__(self, tokens, block_size, seed):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.per_epoch = len(tokens) // block_size - 1
        if self.per_epoch < 1:
            few = f"{len(tokens):,} tokens for training are too few for blocks of {block_size}"
            raise ValueError(f"{few}: take more text or a smaller --block-size")

    def batch(self, position, count, rank=0, world=1):
        """ids and targets, each (count / world, T): of the `count` blocks after the run's first `position`
        ones, those that process `rank` of `world` takes.
        """
        T, rows = self.block_size, []
        for p in range(position + rank, position + count, world):
            epoch, i = divmod(p, self.per_epoch)
            phase = permute(epoch % T, T, self.seed)
            start = phase + T * permute(i, self.per_epoch, self.seed + 1000003 * epoch)
            rows.append(self.tokens.read(start, T + 1))
        both = torch.from_numpy(np.stack(rows))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def batches(self, position, count, rank=0, world=1, pin=False):
        """Yield batch after batch without end, each read while the one before is worked on.

        pin: in memory that a GPU can fetch by itself.
        """

        def read(position):
            pair = self.batch(position, count, rank, world)
            return tuple(ids.pin_memory() for ids in pair) if pin else pair

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(read, position)
            while True:
                position += count
                ready, ahead = ahead, pool.submit(read, position)
                yield ready.result()


def validation_batches(tokens, block_size, n_blocks=None, batch_size=32, rank=0, world=1):
    """Yield ids and targets (batch_size, T) of n_blocks evenly spaced blocks (None: all, the last one short).

    Every process of `world` gets as many batches; what has to be filled up is IGNORED as a target.
    """
    T = block_size
    total = (len(tokens) - 2) // T + 1
    chosen = np.unique(np.linspace(0, total - 1, min(n_blocks or total, total)).astype(int))
    for first in range(0, len(chosen), batch_size * world):
        mine = chosen[first + rank * batch_size :][:batch_size]
        rows = np.full((min(batch_size, len(chosen)), T + 1), IGNORED)
        for row, block in zip(rows, mine):
            ids = tokens.read(block * T, T + 1)
            row[: len(ids)] = ids
        yield torch.from_numpy(rows[:, :-1].clip(0)), torch.from_numpy(rows[:, 1:])
