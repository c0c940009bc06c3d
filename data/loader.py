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
    """The token ids of one split on disk, one file or several, read as one array.

    sizes: how many tokens of it each source has, one after the other.
    """

    def __init__(self, folder, split, dtype, sizes=()):
        single = Path(folder) / f"{split}.bin"
        paths = [single] if single.exists() else sorted(Path(folder).glob(f"{split}_*.bin"))
        n_bytes = [path.stat().st_size for path in paths]
        if not paths or 0 in n_bytes or any(n % np.dtype(dtype).itemsize for n in n_bytes):
            raise ValueError(f"{single} is missing or cut off: prepare the data again")
        self.parts = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        self.borders = np.cumsum(sizes[:-1])  # between sources

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

    def source_of(self, positions):
        """The number of the source in which each of these tokens stands, as a tensor."""
        return torch.from_numpy(np.searchsorted(self.borders, positions, side="right"))


@dataclass
class Data:
    """Prepared data, opened."""

    name: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    fingerprint: str  # of all ids
    sources: list  # the names of what the text came from, if it was several


def find_data(name):
    """The folder of prepared data; a known corpus is prepared now if it is missing."""
    folder = DATA / name
    if Path(name).name != name or not (folder / "meta.json").exists():
        if name not in SOURCES:
            ready = ", ".join(sorted(path.parent.name for path in DATA.glob("*/tokenizer.json"))) or "none"
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
        sources = meta.get("tokens_of_source", {})
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{folder}/meta.json is damaged or of an older version: {again}") from None
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != expected:
        raise ValueError(f"{folder}/tokenizer.json is not the tokenizer that made the data: {again}")
    sizes = {split: [sizes[split] for sizes in sources.values()] for split in n_tokens}
    train, val = (Tokens(folder, split, dtype, sizes[split]) for split in ("train", "val"))
    for split, tokens in (("train", train), ("val", val)):
        if len(tokens) != n_tokens[split]:
            wrong = f"{len(tokens):,} tokens, not {n_tokens[split]:,}"
            raise ValueError(f"{folder}/{split}.bin has {wrong}: {again}")
    return Data(folder.name, tokenizer, train, val, fingerprint, list(sources))


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
        """ids, targets (n, T), the number of targets (n,) and the source (n,) of n = count / world blocks: of
        `count` after the run's first `position` ones, those that process `rank` of `world` takes.
        """
        T, starts = self.block_size, []
        for p in range(position + rank, position + count, world):
            epoch, i = divmod(p, self.per_epoch)
            phase = permute(epoch % T, T, self.seed)
            starts.append(phase + T * permute(i, self.per_epoch, self.seed + 1000003 * epoch))
        both = torch.from_numpy(np.stack([self.tokens.read(start, T + 1) for start in starts]))
        counts, sources = torch.full([len(starts)], T), self.tokens.source_of(starts)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous(), counts, sources


def read_ahead(read, position, pin=False):
    """Yield read(position), read(position + 1) ... without end, each made while the one before is worked on.

    read returns tensors; pin: into memory that a GPU can fetch by itself.
    """

    def get(position):
        tensors = read(position)
        return tuple(tensor.pin_memory() for tensor in tensors) if pin else tensors

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(get, position)
        while True:
            position += 1
            ready, ahead = ahead, pool.submit(get, position)
            yield ready.result()


def validation_batches(tokens, block_size, n_blocks=None, batch_size=32, rank=0, world=1):
    """Yield n_blocks evenly spaced blocks (None: all), as Blocks.batch returns them, batch_size at a time.

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
        sources = tokens.source_of(np.resize(mine * T, len(rows)))  # of filled-up rows, any
        targets = torch.from_numpy(rows[:, 1:])
        yield torch.from_numpy(rows[:, :-1].clip(0)), targets, (targets != IGNORED).sum(1), sources
