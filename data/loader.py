"""From token ids on disk to batches for train.py.

The order in which training reads the blocks of a text follows from the seed: each epoch takes all of them
once, shuffled anew. So the place of a run in its data is one number, the step.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.prepare import DATA, SOURCES, prepare
from tokenizer import Tokenizer

IGNORED = -100  # as a target: not to be predicted


# --- prepared data ---


@dataclass
class Data:
    """A folder of prepared data, opened."""

    name: str
    tokenizer: Tokenizer
    train: np.ndarray  # of ids; only what is used is read from the disk
    val: np.ndarray
    fingerprint: str  # a hash of all ids


def find_data(name):
    """The folder of prepared data; a known corpus is prepared now if it is missing. ValueError: not found."""
    folder = DATA / name
    if Path(name).name == name and (folder / "meta.json").exists():
        return folder
    if name not in SOURCES:
        ready = ", ".join(sorted(path.parent.name for path in DATA.glob("*/tokenizer.json"))) or "none"
        known = f"prepared are {ready}, known are {', '.join(SOURCES)}"
        raise ValueError(f"no data named {name!r}: {known}; your own: `python data/prepare.py PATH`")
    return prepare([name])


def load_data(folder):
    """Open a folder of prepared data as Data. ValueError: it is damaged or of an older version."""
    again = f"prepare it again: `python data/prepare.py ... --name {folder.name}`"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype, n_tokens, made_by = np.dtype(meta["dtype"]), meta["tokens"], meta["tokenizer"]
        fingerprint = meta["fingerprint"]["train"] + meta["fingerprint"]["val"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{folder}/meta.json is damaged or of an older version: {again}") from None
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != made_by:
        raise ValueError(f"{folder}/tokenizer.json is not the tokenizer that made the data: {again}")
    splits = {}
    for split in ("train", "val"):
        path, expected = folder / f"{split}.bin", n_tokens[split] * dtype.itemsize
        n_bytes = path.stat().st_size if path.exists() else 0
        if n_bytes != expected:
            raise ValueError(f"{path} has {n_bytes:,} bytes, not {expected:,}: {again}")
        splits[split] = np.memmap(path, dtype, mode="r")
    return Data(folder.name, tokenizer, splits["train"], splits["val"], fingerprint)


# --- batches for training ---


class Blocks:
    """The batches of training: blocks of T + 1 tokens, in each epoch cut elsewhere and shuffled."""

    def __init__(self, tokens, block_size, seed):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.per_epoch = len(tokens) // block_size - 1  # one less, as room for cutting elsewhere
        if self.per_epoch < 1:
            few = f"{len(tokens):,} tokens for training are too few for blocks of {block_size}"
            raise ValueError(f"{few}: take more text or a smaller --block-size")

    @lru_cache(maxsize=2)  # noqa: B019  a process has one of these objects
    def epoch(self, number):
        """Where the first block of an epoch starts, and the order of its blocks."""
        rng = np.random.default_rng([self.seed, number])
        return rng.integers(self.block_size), rng.permutation(self.per_epoch)

    def batch(self, step, batch_size, rank=0, world=1):
        """ids and targets (n, T) of a step: process `rank` of `world` gets n = batch_size / world blocks."""
        T = self.block_size
        blocks = []
        for position in range(step * batch_size + rank, (step + 1) * batch_size, world):
            number, i = divmod(position, self.per_epoch)
            first, order = self.epoch(number)
            start = first + T * order[i]
            blocks.append(self.tokens[start : start + T + 1])
        both = torch.from_numpy(np.stack(blocks).astype(np.int64))  # (n, T + 1)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


# --- batches for validation ---


def validation_batches(tokens, block_size, n_blocks=None, batch_size=32, rank=0, world=1):
    """Yield ids and targets (n, T) of n_blocks evenly spaced blocks (None: all), n = batch_size or fewer.

    Process `rank` of `world` gets its share. After the end of the text, targets are IGNORED.
    """
    T = block_size
    total = (len(tokens) - 2) // T + 1
    chosen = np.unique(np.linspace(0, total - 1, min(n_blocks or total, total)).astype(int))
    mine = chosen[rank::world]
    for first in range(0, len(mine), batch_size):
        blocks = mine[first : first + batch_size]
        rows = np.full((len(blocks), T + 1), IGNORED)
        for row, block in zip(rows, blocks):
            ids = tokens[block * T : block * T + T + 1]
            row[: len(ids)] = ids
        yield torch.from_numpy(rows[:, :-1].clip(0)), torch.from_numpy(rows[:, 1:])
