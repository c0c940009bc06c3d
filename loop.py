"""The training loop, which pretraining (train.py) and fine-tuning (finetune.py) share.

    forward: how surprised is the model by a batch?   backward: in which direction is it less so?
    step: all weights go there a little               now and then: evaluate, log, save

What differs between them is a `Stage`, what decides the numbers is a `Run`.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.distributed.tensor import DTensor

import checkpoint
import machine
from data.loader import IGNORED, read_ahead, validation_batches
from machine import over_processes, processes
from model import Transformer
from optimizer import learning_rate
from tokenizer import Tokenizer

SAVE_SECONDS = 600  # between checkpoints at most
REPLAYED = "(replay)"  # the channel of text that is only read again, lest it be forgotten


@dataclass
class Run:
    """All that decides the numbers of a run, besides data, hardware and versions. Kept in its checkpoints."""

    seed: int
    steps: int
    block_size: int
    batch_size: int  # examples (in pretraining, blocks) per step, of all processes together
    lr: float
    dtype: str
    eval_every: int  # in steps, as save_every and log_every
    save_every: int
    device: str
    processes: int
    threads: int
    deterministic: bool
    preset: str = ""
    dropout: float = 0.0
    compile: bool = False
    micro_batch: int = 1  # examples that one process computes at a time
    log_every: int = 1
    warmup: int = 1
    weight_decay: float = 0.0


def next_token_loss(model, ids, targets):
    """The loss of a batch in sum, and that of each row."""
    return model.loss(ids, targets, reduction="rows")


@dataclass
class Stage:
    """What the training loop is given besides a Run: pretraining and fine-tuning differ in this alone."""

    model: Transformer
    optimizers: list
    tokenizer: Tokenizer
    read_batch: Callable  # (step) -> tensors, a row per example: those for loss_of, counts, channels
    evaluate: Callable  # (step) -> (a score of which less is better, {column of the log: value})
    write: Callable  # (folder, weights): the files of the model
    read: Callable  # (folder) -> the weights
    prompt: list  # ids; what the model makes of them is kept in samples.txt
    loss_of: Callable = next_token_loss
    measures: tuple = ("loss",)
    channels: tuple = ()  # where the examples come from, when their losses are to be told apart
    columns: tuple = ()  # of the log, besides val_bpb, that evaluate fills


def training_step(stage, batch, n, share, run):
    """One update with `share` of the learning rates, from this process's part of a batch.

    The loss is the sum over all micro-batches of all processes, divided by n: the mean over the tokens of the
    batch, if n is their number. Returns loss_of's rows, (examples, measures), and the norm of the gradient;
    both on the device, which works on meanwhile.
    """
    model, world, rows = stage.model, processes()[1], []
    device = model.model.norm.weight.device
    pieces = list(zip(*(tensor.split(run.micro_batch) for tensor in batch)))
    for i, piece in enumerate(pieces, 1):
        if world > 1:
            model.set_requires_gradient_sync(i == len(pieces))
        with machine.precision(device.type, run.dtype):
            loss, measured = stage.loss_of(model, *(x.to(device, non_blocking=True) for x in piece))
            loss = loss * (world / max(1, n))  # FSDP takes the mean over processes
        loss.backward()
        rows.append(measured.view(len(measured), -1))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in stage.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(rows), norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def sum_losses(model, loss_of, batches, n_channels):
    """Counts and losses, (channels, 1 + measures), of batches: tensors for loss_of, counts, channels."""
    device, was_training, sums = model.model.norm.weight.device, model.training, 0
    model.eval()
    for *batch, counts, channels in batches:
        rows = loss_of(model, *(x.to(device) for x in batch))[1].view(len(counts), -1)
        found = torch.cat((counts[:, None], rows.cpu()), 1).double()
        sums += found.new_zeros(n_channels, found.size(1)).index_add_(0, channels, found)
    model.train(was_training)
    return over_processes(sums)


def bits_per_byte(model, tokens, bytes_per_token, n_blocks=None, sources=()):
    """Nats of predicted tokens / ln 2 / their bytes, over n_blocks evenly spaced blocks (None: all).

    Returns it and {"val_loss NAME": nats per token} of these sources of the text.
    """
    sizes = torch.from_numpy(bytes_per_token).to(model.model.norm.weight.device)

    def nats_and_bytes(model, ids, targets):
        total, nats = next_token_loss(model, ids, targets)
        n_bytes = (sizes[targets.clamp(min=0)] * (targets != IGNORED)).sum(1)
        return total, torch.stack((nats, n_bytes), 1)

    rank, world = processes()
    batches = validation_batches(tokens, model.config.block_size, n_blocks, rank=rank, world=world)
    sums = sum_losses(model, nats_and_bytes, batches, len(tokens.borders) + 1)
    losses = {
        f"val_loss {name}": nats / n if n else None for name, (n, nats, _) in zip(sources, sums.tolist())
    }
    _, nats, n_bytes = sums.sum(0).tolist()
    return nats / math.log(2) / n_bytes, losses


# --- the loop ---


def finite(value, out):
    """The value; ValueError: it is not finite."""
    if not math.isfinite(value):
        best = out / "checkpoints" / "best"
        found = f"the best model so far is in {best}" if best.exists() else "nothing was learned yet"
        raise ValueError(f"the loss diverged: try a lower --lr; {found}")
    return value


def fresh_state(run, stage, **others):
    """The state of a run before its first step; others: what identifies it."""
    state = dict(run=asdict(run), step=0, tokens=0, seconds=0.0, tally=None, best=math.inf, best_step=0)
    return state | dict(stage=stage) | others


def means(measures, channels, sums, split):
    """{column: value} of sums (channels, 1 + measures), the first one of which is a count.

    Means are formed last: those of steps or processes of different sizes can't be averaged. What is replayed
    has a column of its own, but no part in the whole.
    """
    by_channel = dict(zip(channels or [None], sums.tolist()))
    n, *totals = (sum(row) for row in zip(*(row for name, row in by_channel.items() if name != REPLAYED)))
    values = {f"{split}_{name}": total / max(1, n) for name, total in zip(measures, totals)}
    for name, (n, loss, *_) in by_channel.items():
        values[f"{split}_loss {name}"] = loss / n if n else None
    return values


def open_log(run, stage, out, device):
    """The log of a run, with a column for all that the stage measures."""
    model = stage.model
    passes = 3 if model.model.norm.weight.requires_grad else 2  # forward, to the inputs, to the weights
    flops = passes * model.config.flops_per_token(run.block_size)
    more = [f"train_{name}" for name in stage.measures[1:]]
    more += [*(f"train_loss {name}" for name in stage.channels), *stage.columns]
    return checkpoint.Log(
        out, run.steps, machine.gemm_rate(device, run.dtype) * processes()[1] / flops, device, more
    )


def train(run, stage, out, device, state, stop_asked=lambda: False):
    """The training loop. state: fresh_state's or, read from a checkpoint, of the place to go on from.

    Leaves in `out` what checkpoint.py says. Returns the last step and its line of the log, None after a stop.
    """
    (rank, world), resumed = processes(), "optimizers" in state
    if resumed:
        checkpoint.restore(out, stage, state)
    log = open_log(run, stage, out, device)
    zeros = torch.zeros(max(1, len(stage.channels)), 1 + len(stage.measures))
    tally = (zeros if state["tally"] is None else torch.tensor(state["tally"])).to(device)
    start, norm = time.perf_counter() - state["seconds"], 0.0

    def save():
        state["seconds"], sums = time.perf_counter() - start, over_processes(tally.cpu())
        finite(float(norm), out)  # or the weights are of no use
        finite(float(sums.sum()), out)
        state["tally"] = (sums / world).tolist()
        checkpoint.save(out, stage, state)

    if not resumed:
        checkpoint.add_frame(out, stage, 0)
        save()
    values = {}  # of a run that was killed after its last step
    batches, saved = read_ahead(stage.read_batch, state["step"], device == "cuda"), time.perf_counter()
    log.start_lap(state["tokens"])
    for step in range(state["step"] + 1, run.steps + 1):
        if run.dropout:  # its dice follow from the step, so that there is no generator to keep
            # (a CPU's generator would ignore all but 32 bits)
            torch.manual_seed(((run.seed * 1_000_003 + step) * 8191 + rank) % 2**32)
        share = learning_rate(step - 1, run)
        *batch, counts, channels = next(batches)
        n, n_tokens = over_processes(torch.tensor([counts.sum(), batch[0].numel()])).tolist()
        rows, norm = training_step(stage, batch, n, share, run)
        counted = torch.cat((counts.to(device, rows.dtype)[:, None], rows), 1)
        tally.index_add_(0, channels.to(device), counted)  # on the device: the host does not wait for it
        state["step"], state["tokens"] = step, state["tokens"] + int(n_tokens)
        evaluating = step == run.steps or step % run.eval_every == 0
        if evaluating or step % run.log_every == 0:
            values = means(stage.measures, stage.channels, over_processes(tally.cpu()), "train")
            values |= dict(step=step, tokens=state["tokens"], lr=share * run.lr)
            finite(values["train_loss"], out)
            values["grad_norm"] = finite(float(norm), out)
            values["tokens_per_second"] = log.lap_speed(state["tokens"])
            if evaluating:
                score, found = stage.evaluate(step)
                if finite(score, out) < state["best"]:
                    state["best"], state["best_step"] = score, step
                values |= found
                checkpoint.add_frame(out, stage, step)
            log.write(values | dict(seconds=time.perf_counter() - start))
            tally.zero_()
            log.start_lap(state["tokens"])
        stop = over_processes(stop_asked())
        overdue = over_processes(time.perf_counter() - saved > SAVE_SECONDS)
        if evaluating or stop or overdue or step % run.save_every == 0:
            save()
            saved = time.perf_counter()
        if stop and step < run.steps:
            return step, None
    return run.steps, values


def measure_step(begin, run, device, limit=0, most=math.inf):
    """Seconds per token of a training step: the median of throwaway steps, for `limit` seconds or `most` of
    them, on a throwaway Stage.
    """
    stage, seconds, rates, world = begin(), [], [], processes()[1]
    while len(seconds) < 4 or (sum(seconds[3:]) < limit and len(seconds) < most):
        start = time.perf_counter()
        *batch, counts, _ = stage.read_batch(len(seconds))
        rows, _ = training_step(stage, batch, int(counts.sum()) * world, 0.1, run)
        rows.sum().item()  # waits for the device
        seconds.append(over_processes(time.perf_counter() - start) / world)
        rates.append(seconds[-1] / batch[0].numel() / world)
    del stage
    machine.forget(device)
    return statistics.median(rates[3:])
