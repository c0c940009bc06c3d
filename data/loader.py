"""From token ids on disk to batches for train.py.

The order in which training reads the blocks of a text is computed, not stored: each epoch takes all of them
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


# --- prepared data ---


def open_tokens(folder, split, dtype):
    """The token ids of a split ("train" or "val") as an array that is read from the disk where it is used."""
    path = folder / f"{split}.bin"
    n_bytes = path.stat().st_size if path.exists() else 0
    if n_bytes == 0 or n_bytes % np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is missing or cut off: prepare the data again")
    return np.memmap(path, dtype=dtype, mode="r")


@dataclass
class Data:
    """A folder of prepared data, opened."""

    name: str
    tokenizer: Tokenizer
    train: np.ndarray  # of ids
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
        dtype, n_tokens, expected = meta["dtype"], meta["tokens"], meta["tokenizer"]
        fingerprint = meta["fingerprint"]["train"] + meta["fingerprint"]["val"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{folder}/meta.json is damaged or of an older version: {again}") from None
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != expected:
        raise ValueError(f"{folder}/tokenizer.json is not the tokenizer that made the data: {again}")
    splits = {split: open_tokens(folder, split, dtype) for split in ("train", "val")}
    for split, tokens in splits.items():
        if len(tokens) != n_tokens[split]:
            wrong = f"{len(tokens):,} tokens, not {n_tokens[split]:,}"
            raise ValueError(f"{folder}/{split}.bin has {wrong}: {again}")
    return Data(folder.name, tokenizer, splits["train"], splits["val"], fingerprint)


# --- batches for training ---


def permute(i, n, key):
    """The i-th element of a pseudo-random permutation of range(n), computed, not stored.

    A Feistel network (Luby and Rackoff, 1988) maps numbers of 2b bits one to one, whatever function mixes the
    halves; a result that is not below n is mapped again.
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
    """The batches of training: each epoch takes all blocks of T + 1 tokens, shuffled and cut anew."""

    def __init__(self, tokens, block_size, seed):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.per_epoch = len(tokens) // block_size - 1
        if self.per_epoch < 1:
            few = f"{len(tokens):,} tokens for training are too few for blocks of {block_size}"
            raise ValueError(f"{few}: take more text or a smaller --block-size")

    def batch(self, step, batch_size, rank=0, world=1):
        """ids and targets (n, T) of a step: process `rank` of `world` gets n = batch_size / world blocks."""
        T = self.block_size
        blocks = []
        for position in range(step * batch_size + rank, (step + 1) * batch_size, world):
            epoch, i = divmod(position, self.per_epoch)
            phase = permute(epoch % T, T, self.seed)
            start = phase + T * permute(i, self.per_epoch, self.seed + 1000003 * epoch)
            blocks.append(self.tokens[start : start + T + 1])
        both = torch.from_numpy(np.stack(blocks).astype(np.int64))  # (n, T + 1)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def read_ahead(read_batch, step, pin_memory=False):
    """Yield read_batch(step), read_batch(step + 1) ... forever, each read while the one before is in use.

    read_batch returns a tuple of tensors. pin_memory: a GPU then copies them while it computes.
    """

    def read(step):
        tensors = read_batch(step)
        return tuple(tensor.pin_memory() for tensor in tensors) if pin_memory else tensors

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, step)
        while True:
            step += 1
            batch, following = following, pool.submit(read, step)
            yield batch.result()


# --- batches for validation ---


def validation_batches(tokens, block_size, n_blocks=None, batch_size=32, rank=0, world=1):
    """Yield ids and targets (n, T) of n_blocks evenly spaced blocks (None: all), n = batch_size or fewer.

    Process `rank` of `world` gets its share. Behind the end of the text, targets are IGNORED.
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
