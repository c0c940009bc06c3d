"""Stage 3: pretraining. Show the model text, measure how surprised it is, and change it to be less so.

    loss = -mean log p(next token | tokens before)        weights <- weights - rate * f(gradient of the loss)

The loop is `train`; what it learns is measured in bits per byte of text that it never trained on.

    python train.py                             prepare the default data if missing, train 3 minutes, sample
    python train.py --data NAME --preset small --minutes 30
    python train.py --steps 2000 --seed 1       a fixed number of steps: the same digits every time
"""

import argparse
import csv
import json
import math
import os
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.prepare import DATA, SOURCES, prepare
from model import PRESETS, Config, Transformer
from sample import OUT, choose_device, stream
from tokenizer import Tokenizer

N_EVALS = 10  # in a run
EVAL_TOKENS = 2**14  # in each but the last, which takes all that is held out


# --- data ---


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


def permute(i, n, key):
    """The i-th element of a pseudo-random permutation of range(n), computed, not stored.

    A Feistel network maps numbers of 2b bits one to one, however it mixes; a result beyond n is mapped again.
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

    def batch(self, position, count):
        """`count` blocks after the first `position` ones of the run: ids and targets, each (count, T)."""
        T, rows = self.block_size, []
        for p in range(position, position + count):
            epoch, i = divmod(p, self.per_epoch)
            phase = permute(epoch % T, T, self.seed)
            start = phase + T * permute(i, self.per_epoch, self.seed + 1000003 * epoch)
            rows.append(self.tokens.read(start, T + 1))
        both = torch.from_numpy(np.stack(rows))
        return both[:, :-1], both[:, 1:]


# --- learning ---


def learning_rate(step, run):
    """The share of the full rate at a step: linear warm-up, constant, the last 60 % linearly to zero."""
    return min(1, (step + 1) / run.warmup, (run.steps - step) / (0.6 * run.steps))


def make_optimizers(model, lr, weight_decay):
    """Muon for the matrices inside the blocks (Jordan et al., 2024), AdamW for the rest.

    Muon takes a step along the orthogonal matrix that is nearest to the momentum: all directions of a matrix
    learn at one pace. Its authors leave embedding and head to AdamW, and so do we. What the blocks write into
    the stream adds up over the depth, so those matrices go slower in a deeper model than nano.
    """
    readers, writers, tables, vectors = [], [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif ".layers." not in name:
            tables.append(p)
        elif "o_proj" in name or "down_proj" in name:
            writers.append(p)
        else:
            readers.append(p)
    slower = lr * PRESETS["nano"]["n_layer"] / model.config.n_layer
    matrices = [{"params": readers}, {"params": writers, "lr": slower}]
    others = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=lr / 10, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]  # which the schedule multiplies
    return optimizers


def training_memory(shape, run):
    """{what: bytes} that training takes, estimated: weights, gradients, optimizers' moments, activations.

    Activations are what the backward pass of a block wants to see again: in float32 the stream before and
    behind each norm, q, k, v and the result of attention; then the inputs of all matrices.
    """
    C, Q, KV = shape.n_embd, shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    size = 2 if run.dtype == "bfloat16" else 4
    block = 16 * C + 8 * (Q + KV) + size * (2 * C + Q + 4 * shape.n_hidden)
    n, matrices = shape.num_params(), shape.n_layer * (2 * C * (Q + KV) + 3 * C * shape.n_hidden)
    tokens = run.batch_size * run.block_size
    moments = 8 * n - 4 * matrices  # Muon keeps one, AdamW two
    return dict(weights=4 * n, gradients=4 * n, moments=moments, activations=shape.n_layer * tokens * block)


@torch.no_grad()
def bits_per_byte(model, tokens, bytes_per_token, n_blocks=None, batch_size=32):
    """Nats of predicted tokens / ln 2 / their bytes, over n_blocks evenly spaced blocks (None: all)."""
    T, device = model.config.block_size, model.model.norm.weight.device
    total = (len(tokens) - 2) // T + 1  # the last one may be short
    chosen = np.unique(np.linspace(0, total - 1, min(n_blocks or total, total)).astype(int))
    nats = n_bytes = 0
    was_training = model.training
    model.eval()
    for i in range(0, len(chosen), batch_size):
        ids = np.full((len(chosen[i : i + batch_size]), T + 1), -100)
        for row, block in zip(ids, chosen[i : i + batch_size]):
            block = tokens.read(block * T, T + 1)
            row[: len(block)] = block
        targets = ids[:, 1:]
        n_bytes += bytes_per_token[targets[targets >= 0]].sum()
        x, y = torch.from_numpy(ids[:, :-1].clip(0)).to(device), torch.from_numpy(targets).to(device)
        nats += model.loss(x, y, reduction="sum").item()
    model.train(was_training)
    return nats / math.log(2) / n_bytes


# --- what is not given is derived, and printed with its reason ---


@dataclass
class Run:
    """All that decides the numbers of a run, besides data, hardware and versions."""

    preset: str
    seed: int
    steps: int
    block_size: int
    batch_size: int  # blocks per step
    lr: float  # of Muon; AdamW takes a tenth
    weight_decay: float
    warmup: int
    dropout: float
    dtype: str
    eval_every: int  # in steps
    log_every: int


def default_dtype(device):
    """In which dtype matrices are multiplied fastest, and the reason. Weights and sums stay in float32."""
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        native = any(unit in info.read_text() for unit in ("avx512_bf16", "amx_bf16"))
    return ("bfloat16", "it has units for that") if native else ("float32", "it has no units for less")


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
    """Open prepared data: (tokenizer, training tokens, validation tokens). Damaged data: ValueError."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        fingerprint, dtype, n_tokens = meta["tokenizer"], meta["dtype"], meta["tokens"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{folder}/meta.json is damaged: prepare the data again") from None
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"{folder}/tokenizer.json is not the tokenizer that made the data: prepare it again")
    splits = [Tokens(folder, split, dtype) for split in ("train", "val")]
    for (split, n), tokens in zip(n_tokens.items(), splits):
        if len(tokens) != n:
            raise ValueError(f"{folder}/{split}.bin has {len(tokens):,} tokens, not {n:,}: prepare it again")
    return tokenizer, *splits


def make_room(folder):
    """Make an empty folder; a model that is there is renamed to the first free NAME.1, NAME.2 ..., aloud."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} exists and holds no model: choose another --out")
        k = 1
        while (aside := folder.with_name(f"{folder.name}.{k}")).exists():
            k += 1
        folder.rename(aside)
        print(f"{os.path.relpath(folder)} existed and is now {os.path.relpath(aside)}")
    folder.mkdir(parents=True, exist_ok=True)


# --- the run ---


def precision(run, device):
    """The context in which the model computes: matrix products in run.dtype."""
    return torch.autocast(device, torch.bfloat16, enabled=run.dtype == "bfloat16")


def build(run, vocab_size, device):
    """A fresh model and its optimizers, the same for the same run."""
    torch.manual_seed(run.seed)
    config = Config(vocab_size, run.block_size, dropout=run.dropout, **PRESETS[run.preset])
    model = Transformer(config).to(device)
    return model, make_optimizers(model, run.lr, run.weight_decay)


def training_step(model, optimizers, ids, targets, share, run):
    """One update with `share` of the learning rates. Returns loss and gradient norm, on the device."""
    device = model.model.norm.weight.device
    with precision(run, device.type):
        loss = model.loss(ids.to(device), targets.to(device))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach(), norm


def measure_speed(run, vocab_size, blocks, device, limit):
    """Seconds that a step takes: the median of throwaway steps, for `limit` seconds, on a throwaway model."""
    model, optimizers = build(run, vocab_size, device)
    seconds = []
    while len(seconds) < 8 or sum(seconds) < limit:
        start = time.perf_counter()
        batch = blocks.batch(len(seconds) * run.batch_size, run.batch_size)
        loss, _ = training_step(model, optimizers, *batch, 0.1, run)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


@contextmanager
def catch_signals():
    """Inside, SIGINT and SIGTERM ask for a stop, a second one stops at once. Yields a function: asked?"""
    asked = []

    def note(number, frame):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """The lines of a run: all of them in log.csv, those with an evaluation on the screen too."""

    COLUMNS = ("step", "tokens", "seconds", "train_loss", "val_bpb", "lr", "grad_norm", "tokens_per_second")

    def __init__(self, path, steps):
        self.steps = steps
        self.file = open(path, "w", newline="", encoding="utf-8")
        self.rows = csv.writer(self.file)
        self.rows.writerow(self.COLUMNS)
        print(f"\n{'step':>8} {'loss':>8} {'val bpb':>8} {'lr':>8} {'tokens/s':>9} {'left':>6}", flush=True)

    def write(self, step, tokens, seconds, loss, bpb, lr, norm):
        """Add a line; bpb may be None. seconds: since the start."""
        speed, left = tokens / seconds, round(seconds / step * (self.steps - step))
        bpb = "" if bpb is None else f"{bpb:.4f}"
        row = [f"{seconds:.2f}", f"{loss:.4f}", bpb, f"{lr:.6f}", f"{norm:.4f}", f"{speed:.0f}"]
        self.rows.writerow([step, tokens, *row])
        self.file.flush()
        line = f"{step:8,} {loss:8.4f} {bpb:>8} {lr:8.5f} {speed:9,.0f} {left // 60:3}:{left % 60:02}"
        terminal = sys.stdout.isatty()
        if bpb or terminal:  # on a terminal, a line without bpb is overwritten by the next
            print("\r" * terminal + line, end="\n" if bpb else "", flush=True)


def train(run, tokenizer, train_tokens, val_tokens, out, device, stop_asked=lambda: False):
    """The training loop. Leaves the model and log.csv in `out`; returns (model, bits per byte, last step)."""
    model, optimizers = build(run, tokenizer.vocab_size, device)
    blocks = Blocks(train_tokens, run.block_size, run.seed)
    bytes_per_token = tokenizer.bytes_per_token
    model.save(out, tokenizer)
    log = Log(out / "log.csv", run.steps)
    loss_sum, logged, start = 0.0, 0, time.perf_counter()
    for step in range(1, run.steps + 1):
        ids, targets = blocks.batch((step - 1) * run.batch_size, run.batch_size)
        share = learning_rate(step - 1, run)
        loss, norm = training_step(model, optimizers, ids, targets, share, run)
        loss_sum += loss  # on the device: the host does not wait for every step
        last = step == run.steps or stop_asked()
        evaluate = last or step % run.eval_every == 0
        if not evaluate and step % run.log_every:
            continue
        mean_loss = float(loss_sum) / (step - logged)  # over all steps since the last line
        bpb = None
        if evaluate:
            n_blocks = None if last else max(1, EVAL_TOKENS // run.block_size)
            with precision(run, device):
                bpb = bits_per_byte(model, val_tokens, bytes_per_token, n_blocks)
        if not math.isfinite(mean_loss + norm.item() + (bpb or 0)):
            raise ValueError(
                f"the loss diverged before step {step}: try a lower --lr; {out} is older and good"
            )
        if evaluate:
            model.save(out, tokenizer)
        seconds, tokens = time.perf_counter() - start, step * ids.numel()
        log.write(step, tokens, seconds, mean_loss, bpb, share * run.lr, norm.item())
        loss_sum, logged = 0.0, step
        if last:
            return model, bpb, step


def plan(args, tokenizer, train_tokens, n_val, device):
    """Derive what the arguments leave open, and print it with the reasons. Returns the Run."""

    def say(name, text):
        print(f"{name:10}{text}", flush=True)

    on_cpu = device == "cpu"
    dtype, why = (args.dtype, "as asked") if args.dtype else default_dtype(device)
    run = Run(
        preset=args.preset or ("nano" if on_cpu else "small"),
        seed=args.seed,
        steps=args.steps,
        block_size=args.block_size or (128 if on_cpu else 1024),
        batch_size=args.batch_size or (16 if on_cpu else 128),
        lr=args.lr or 0.03,
        weight_decay=0.1,
        warmup=1,
        dropout=args.dropout or 0.0,
        dtype=dtype,
        eval_every=args.eval_every,
        log_every=1,
    )
    blocks = Blocks(train_tokens, run.block_size, run.seed)
    shape = Config(tokenizer.vocab_size, run.block_size, **PRESETS[run.preset])
    say("model", f"{run.preset}: {shape.num_params():,} parameters, {shape.n_layer} layers of {shape.n_embd}")
    say("device", f"{device}, {torch.get_num_threads()} threads; matrix products in {dtype}: {why}")
    parts = training_memory(shape, run)
    listed = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
    say("memory", f"about {sum(parts.values()) / 1e6:.0f} MB: {listed}")
    per_step = run.batch_size * run.block_size
    flops = 3 * per_step * shape.flops_per_token(run.block_size)
    say("compute", f"{flops / 1e9:.1f} GFLOPs a step, forward and backward")
    if run.steps is None:
        seconds = 60 * args.minutes
        step = measure_speed(run, tokenizer.vocab_size, blocks, device, limit=0.03 * seconds)
        forward = step / 3 / per_step  # of one token; evaluations go forward only
        n_evals = N_EVALS if run.eval_every is None else seconds / step / run.eval_every
        evaluations = forward * (n_evals * EVAL_TOKENS + n_val)
        run.steps = max(1, int((seconds - min(evaluations, seconds / 2)) / step))
        speed = f"one takes {1000 * step:.0f} ms ({flops / step / 1e9:.0f} GFLOP/s)"
        say("steps", f"{run.steps:,}: {speed}, there are {args.minutes:g} minutes")
    epochs = run.steps * per_step / len(train_tokens)
    say("batch", f"{run.batch_size} blocks of {run.block_size} tokens, {epochs:.1f} epochs over the text")
    if args.dropout is None and epochs > 10:
        run.dropout = 0.1
        say("dropout", "0.1, since text that is seen more often than ten times is learned by heart")
    run.warmup = max(1, min(50, run.steps // 5))
    run.eval_every = run.eval_every or math.ceil(run.steps / N_EVALS)
    run.log_every = max(1, run.eval_every // 10)
    say("rates", f"Muon {run.lr:g}, AdamW {run.lr / 10:g}: {run.warmup} steps up, the last 60 % down to zero")
    say("start", f"a loss of {math.log(tokenizer.vocab_size):.2f} = ln {tokenizer.vocab_size}: an even guess")
    return run


def parse_arguments():
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Train a model on prepared data.")
    add = parser.add_argument_group("what to train").add_argument
    add("--data", default="pystdlib", metavar="NAME", help="folder under data/ (pystdlib)")
    add("--out", metavar="DIR", help="where the model goes (out/NAME)")
    add("--preset", choices=PRESETS, help="size of the model (nano on a CPU, small on a GPU)")
    add("--seed", type=int, default=0, help="equal seeds draw equal weights and data order (0)")
    add = parser.add_argument_group("how long").add_argument
    add("--minutes", type=float, default=3, help="what steps and evaluations may take (3)")
    add("--steps", type=int, help="a fixed number of steps instead: the same digits every time")
    add("--eval-every", type=int, metavar="STEPS", help="steps between evaluations (a tenth of all)")
    add = parser.add_argument_group("details that are chosen for you").add_argument
    add("--block-size", type=int, metavar="TOKENS", help="tokens that the model sees at once")
    add("--batch-size", type=int, metavar="BLOCKS", help="blocks per step")
    add("--lr", type=float, help="learning rate of Muon; AdamW takes a tenth of it")
    add("--dropout", type=float, help="share of every branch's output that training leaves out")
    add("--dtype", choices=("float32", "bfloat16"), help="in which matrices are multiplied")
    add("--device", help="cpu, cuda or mps (the fastest that there is)")
    args = parser.parse_args()
    for name in ("minutes", "steps", "eval_every", "block_size", "batch_size", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")
    for name, limit in (("seed", 2**32), ("dropout", 1)):
        if not 0 <= (getattr(args, name) or 0) < limit:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 0 and below {limit}")
    return args


def main():
    args = parse_arguments()
    device = choose_device(args.device)
    tokenizer, train_tokens, val_tokens = load_data(find_data(args.data))
    out = Path(args.out).resolve() if args.out else OUT / args.data
    print(f"{'data':10}{args.data}: {len(train_tokens):,} tokens for training, {len(val_tokens):,} held out")
    run = plan(args, tokenizer, train_tokens, len(val_tokens), device)
    make_room(out)
    with catch_signals() as stop_asked:
        model, bpb, step = train(run, tokenizer, train_tokens, val_tokens, out, device, stop_asked)
    place = os.path.relpath(out)
    print(f"\n{bpb:.4f} bits per byte of held-out text after {step:,} steps; the model is in {place}/")
    if step < run.steps:
        sys.exit(130)
    print("\nA sample:\n")
    for piece in stream(model.eval(), tokenizer, "", max_new_tokens=150):
        print(piece, end="", flush=True)
    print(f"\n\nnext: python sample.py --model {place}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
