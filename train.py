"""Stage 3: pretraining. Show the model text, measure how surprised it is, and change it to be less so.

    loss = -mean log p(next token | tokens before)        weights <- weights - rate * f(gradient of the loss)

The loop is `train`; what it learns is measured in bits per byte of text that it never trained on.

    python train.py                             prepare the default data if missing, train 3 minutes, sample
    python train.py --data NAME --preset small --minutes 30
    python train.py --steps 2000 --seed 1       a fixed number of steps: the same digits every time
    python train.py --resume                    go on exactly where the newest run stopped
    torchrun --nproc-per-node 8 train.py ...    the same on many GPUs
"""

import argparse
import math
import os
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import checkpoint
import machine
from data.loader import IGNORED, Blocks, find_data, load_data, validation_batches
from machine import over_processes, processes
from model import PRESETS, Config, Transformer
from optimizer import learning_rate, make_optimizers
from sample import OUT

N_EVALS = 10  # in a run
EVAL_TOKENS = 2**14  # in each but the last, which takes all that is held out
SAVE_SECONDS = 600  # between checkpoints at most


# --- learning ---


@dataclass
class Run:
    """All that decides the numbers of a run, besides data, hardware and versions. Kept in its checkpoints."""

    preset: str
    seed: int
    steps: int
    block_size: int
    batch_size: int  # blocks per step, of all processes together
    lr: float  # of Muon; AdamW takes a tenth
    dropout: float
    dtype: str
    eval_every: int  # in steps, as save_every and log_every
    save_every: int
    device: str
    processes: int
    threads: int
    compile: bool
    deterministic: bool
    micro_batch: int = 1  # blocks that one process computes at a time
    log_every: int = 1
    warmup: int = 1
    weight_decay: float = 0.1


def training_step(model, optimizers, ids, targets, share, run):
    """One update with `share` of the learning rates, from this process's part of a batch, ids (n, T).

    The loss is the mean over the tokens of all micro-batches of all processes. Returns this process's part of
    it, times their number, and the norm of the gradient; both on the device, which works on meanwhile.
    """
    device, world, loss_sum = model.model.norm.weight.device, processes()[1], 0.0
    n_tokens = over_processes(int((targets != IGNORED).sum()))
    weight = world / max(1, n_tokens)  # of one token; FSDP takes the mean over processes
    pieces = list(zip(ids.split(run.micro_batch), targets.split(run.micro_batch)))
    for i, (x, y) in enumerate(pieces, 1):
        if world > 1:
            model.set_requires_gradient_sync(i == len(pieces))
        with machine.precision(device.type, run.dtype):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = model.loss(x, y, reduction="sum") * weight
        loss.backward()
        loss_sum += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
        optimizer.step()
        optimizer.zero_grad()
    return loss_sum, norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def bits_per_byte(model, tokens, bytes_per_token, n_blocks=None):
    """Nats of predicted tokens / ln 2 / their bytes, over n_blocks evenly spaced blocks (None: all)."""
    device, (rank, world) = model.model.norm.weight.device, processes()
    nats, n_bytes, was_training = 0.0, 0, model.training
    model.eval()
    for ids, targets in validation_batches(tokens, model.config.block_size, n_blocks, rank=rank, world=world):
        nats += model.loss(ids.to(device), targets.to(device), reduction="sum").item()
        n_bytes += int(bytes_per_token[targets[targets != IGNORED].numpy()].sum())
    model.train(was_training)
    return over_processes(nats) / math.log(2) / over_processes(n_bytes)


# --- the run ---


def shape_of(run, vocab_size):
    """The Config of the model that a run trains."""
    return Config(vocab_size, run.block_size, **PRESETS[run.preset])


def build(run, vocab_size, device):
    """A fresh model and its optimizers, the same for the same run."""
    torch.manual_seed(run.seed)
    model = Transformer(replace(shape_of(run, vocab_size), dropout=run.dropout)).to(device)
    if processes()[1] > 1:  # each process keeps a share of every weight and sees whole ones a block at a time
        mesh = init_device_mesh(device, (processes()[1],))
        for part in (*model.model.layers, model):
            if run.compile and part is not model:
                part.compile()
            fully_shard(part, mesh=mesh)
            part.unshard()  # Makes the buffers for whole weights. Were sampling, in inference_mode, the first
            part.reshard()  # to make them, the backward pass could not use them.
        for name in ("loss", "hidden", "head"):
            register_fsdp_forward_method(model, name)
    elif run.compile:
        model.loss = torch.compile(model.loss, dynamic=False)
    return model, make_optimizers(model, run.lr, run.weight_decay)


def measure_step(run, vocab_size, blocks, device, limit=0):
    """Seconds that a step takes: the median of throwaway steps, for `limit` seconds, on a throwaway model."""
    model, optimizers = build(run, vocab_size, device)
    seconds, (rank, world) = [], processes()
    while len(seconds) < 4 or sum(seconds[3:]) < limit:
        start = time.perf_counter()
        batch = blocks.batch(len(seconds) * run.batch_size, run.batch_size, rank, world)
        loss, _ = training_step(model, optimizers, *batch, 0.1, run)
        loss.item()  # waits for the device
        seconds.append(over_processes(time.perf_counter() - start) / world)
    del model, optimizers, loss
    machine.forget(device)
    return statistics.median(seconds[3:])


def evaluate(model, data, run, state):
    """Bits per byte of some validation text, after the last step of all of it. Notes the best in state."""
    step, device = state["step"], model.model.norm.weight.device.type
    with machine.precision(device, run.dtype):
        some = max(1, EVAL_TOKENS // run.block_size)
        bpb = bits_per_byte(model, data.val, data.tokenizer.bytes_per_token, some)
        if bpb < state["best"]:
            state["best"], state["best_step"] = bpb, step
        return bpb if step < run.steps else bits_per_byte(model, data.val, data.tokenizer.bytes_per_token)


def finite(value, out):
    """The value; ValueError: it is not finite."""
    if not math.isfinite(value):
        best = out / "checkpoints" / "best"
        found = f"the best model so far is in {best}" if best.exists() else "nothing was learned yet"
        raise ValueError(f"the loss diverged: try a lower --lr; {found}")
    return value


def identity(run, data):
    """What a run must find unchanged when it goes on."""
    shape = asdict(shape_of(run, data.tokenizer.vocab_size))
    return {"text": data.fingerprint, "tokenizer": data.tokenizer.fingerprint, "shape": shape}


def train(run, data, out, device, state, stop_asked=lambda: False):
    """The training loop. state: of a run's begin or, read from a checkpoint, of the place to go on from.

    Leaves in `out` what checkpoint.py says. Returns (last step, bits per byte), (step, None) after a stop.
    """
    tokenizer, (rank, world) = data.tokenizer, processes()
    model, optimizers = build(run, tokenizer.vocab_size, device)
    resumed = "optimizers" in state
    if resumed:
        checkpoint.restore(out, model, optimizers, state)
    per_step, flops = run.batch_size * run.block_size, 3 * model.config.flops_per_token(run.block_size)
    log = checkpoint.Log(
        out, run.steps, per_step, machine.gemm_rate(device, run.dtype) * world / flops, device
    )
    start, loss_sum, norm = time.perf_counter() - state["seconds"], state["loss_sum"], 0.0

    def save():
        state["seconds"] = time.perf_counter() - start
        finite(float(norm), out)  # or the weights are of no use
        state["loss_sum"] = finite(over_processes(float(loss_sum)) / world, out)
        checkpoint.save(out, model, optimizers, tokenizer, state)

    if not resumed:
        checkpoint.add_frame(out, model, data, state["step"])
        save()
    blocks, saved = Blocks(data.train, run.block_size, run.seed), time.perf_counter()
    batches = blocks.batches(state["step"] * run.batch_size, run.batch_size, rank, world, device == "cuda")
    log.start_lap(state["step"])
    for step in range(state["step"] + 1, run.steps + 1):
        if run.dropout:  # its dice follow from the step, so that there is no generator to keep
            # (a CPU's generator would ignore all but 32 bits)
            torch.manual_seed(((run.seed * 1_000_003 + step) * 8191 + rank) % 2**32)
        share = learning_rate(step - 1, run)
        loss, norm = training_step(model, optimizers, *next(batches), share, run)
        state["step"], loss_sum = step, loss_sum + loss  # on the device: the host does not wait for it
        evaluating = step == run.steps or step % run.eval_every == 0
        if evaluating or step % run.log_every == 0:
            mean_loss = finite(over_processes(float(loss_sum)) / world / (step - state["logged"]), out)
            norm, speed, bpb = finite(float(norm), out), log.lap_speed(step), None
            if evaluating:
                bpb = finite(evaluate(model, data, run, state), out)
                checkpoint.add_frame(out, model, data, step)
            log.write(step, time.perf_counter() - start, mean_loss, bpb, share * run.lr, norm, speed)
            loss_sum, state["logged"] = 0.0, step
            log.start_lap(step)
        stop = over_processes(stop_asked())
        overdue = over_processes(time.perf_counter() - saved > SAVE_SECONDS)
        if evaluating or stop or overdue or step % run.save_every == 0:
            save()
            saved = time.perf_counter()
        if stop and step < run.steps:
            return step, None
    return run.steps, bpb


def say(name, text):
    """A line of what is known before the first step."""
    print(f"{name:10}{text}", flush=True)


def settings(args, device):
    """(Run, reasons): what follows from the arguments and the device alone. steps may still be None."""
    on_cpu, minutes = device == "cpu", math.inf if args.steps else args.minutes or 3
    T, rows = (1024, 128) if not on_cpu else (128, 16) if minutes >= 1 else (32, 32)
    dtype, compiling = (args.dtype, "as asked"), (args.compile, "as asked")
    if args.dtype is None:
        dtype = machine.default_dtype(device)
    if args.compile is None:
        compiling = machine.default_compile(device, long=15 <= minutes < math.inf)
    run = Run(
        preset=args.preset or ("nano" if on_cpu else "small"),
        seed=args.seed or 0,
        steps=args.steps,
        block_size=args.block_size or T,
        batch_size=args.batch_size or rows,
        lr=args.lr or 0.03,
        dropout=args.dropout or 0.0,
        dtype=dtype[0],
        eval_every=args.eval_every,
        save_every=args.save_every,
        device=device,
        processes=processes()[1],
        threads=torch.get_num_threads(),
        compile=compiling[0],
        deterministic=args.deterministic,
    )
    if run.batch_size % run.processes:
        raise ValueError(
            f"--batch-size {run.batch_size} cannot be shared evenly by {run.processes} processes"
        )
    return run, {"dtype": dtype[1], "compile": compiling[1]}


def plan(args, data, device):
    """Derive what the arguments leave open, and print it with the reasons. Returns the Run."""
    run, reasons = settings(args, device)
    blocks = Blocks(data.train, run.block_size, run.seed)
    shape = shape_of(run, data.tokenizer.vocab_size)
    n, per_step = shape.num_params(), run.batch_size * run.block_size
    gemm = machine.gemm_rate(device, run.dtype)
    say("model", f"{run.preset}: {n:,} parameters, {shape.n_layer} layers of {shape.n_embd}")
    times = f"{run.processes} processes, each on " if run.processes > 1 else ""
    say("device", f"{times}{device} with {run.threads} threads")
    say("dtype", f"{run.dtype} for matrix products, {reasons['dtype']}: at most {gemm / 1e9:,.0f} GFLOP/s")
    say("compile", f"{'yes' if run.compile else 'no'}: {reasons['compile']}")
    run.micro_batch = machine.fit_micro_batch(shape, run, device)
    parts = machine.training_memory(shape, run)
    listed = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
    say("memory", f"about {sum(parts.values()) / 1e6:,.0f} MB: {listed}")
    flops = 3 * per_step * shape.flops_per_token(run.block_size)
    seconds = 0 if args.steps else 60 * (args.minutes or 3)
    with machine.explain_memory(shape, run):
        step_seconds = measure_step(run, shape.vocab_size, blocks, device, 0.03 * seconds)
    mfu = flops / step_seconds / run.processes / gemm
    say("a step", f"{1000 * step_seconds:,.0f} ms, {flops / 1e9:,.0f} GFLOPs: {mfu:.0%} of that rate (MFU)")
    if run.deterministic and device == "cuda":
        torch.use_deterministic_algorithms(False)
        free = measure_step(run, shape.vocab_size, blocks, device)
        torch.use_deterministic_algorithms(True)
        say("", f"without --deterministic {1000 * free:,.0f} ms")
    n_evals = N_EVALS
    if run.steps is None:
        forward = step_seconds / 3 / per_step  # seconds for one token; evaluations go forward only
        n_evals = max(1, min(N_EVALS, seconds // 10))
        if run.eval_every:
            n_evals = seconds / step_seconds / run.eval_every
        evaluations = forward * ((n_evals + 1) * EVAL_TOKENS + len(data.val))
        run.steps = max(1, int((seconds - min(evaluations, seconds / 2)) / step_seconds))
    tokens, limit = run.steps * per_step, f" in {args.minutes or 3:g} minutes" if seconds else ""
    epochs = tokens / len(data.train)
    needed = f"{step_seconds * run.steps:,.0f} s and {flops * run.steps / 1e15:.3g} PFLOPs"
    say("steps", f"{run.steps:,}{limit}, {needed}")
    at_once = "" if run.micro_batch * run.processes == run.batch_size else f", {run.micro_batch} at a time"
    say("batch", f"{run.batch_size} blocks of {run.block_size} tokens{at_once}")
    say("text", f"{tokens:,} tokens, {tokens / n:.1f} for each parameter, {epochs:.1f} epochs")
    if epochs > 4 and len(data.train) < n:
        say("", "fewer tokens than parameters, seen again and again: take more text or a smaller --preset")
    if args.dropout is None and epochs > 10:
        run.dropout = 0.1
        say("dropout", "0.1, since text that is seen more often than ten times is learned by heart")
    if args.lr is None:  # fewer than 400 steps have to be larger ones
        run.lr = round(0.03 * min(2, math.sqrt(max(1, 400 / run.steps))), 4)
    run.warmup = max(1, min(50, run.steps // 5))
    run.eval_every = run.eval_every or math.ceil(run.steps / n_evals)
    run.save_every = run.save_every or run.eval_every
    run.log_every = max(1, run.eval_every // 10)
    say("rates", f"Muon {run.lr:g}, AdamW {run.lr / 10:g}: {run.warmup} steps up, the last 60 % down to zero")
    say("start", f"a loss of {math.log(shape.vocab_size):.2f} = ln {shape.vocab_size}: an even guess")
    return run


def parse_arguments():
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Train a model on prepared data.")
    add = parser.add_argument_group("what to train").add_argument
    add("--data", metavar="NAME", help="folder under data/ (pystdlib)")
    add("--out", metavar="DIR", help="where the model goes (out/NAME)")
    add("--preset", choices=PRESETS, help="size of the model (nano on a CPU, small on a GPU)")
    add("--seed", type=int, help="equal seeds draw equal weights and data order (0)")
    add("--resume", action="store_true", help="go on with the newest run, or with the one in --out")
    add = parser.add_argument_group("how long").add_argument
    add("--minutes", type=float, help="what steps and evaluations may take (3)")
    add("--steps", type=int, help="a fixed number of steps instead: the same digits every time")
    add("--eval-every", type=int, metavar="STEPS", help="steps between evaluations (a tenth of all)")
    add("--save-every", type=int, metavar="STEPS", help="steps between checkpoints (as evaluations)")
    add = parser.add_argument_group("details that are chosen for you").add_argument
    add("--block-size", type=int, metavar="TOKENS", help="tokens that the model sees at once")
    add("--batch-size", type=int, metavar="BLOCKS", help="blocks per step, over all processes")
    add("--lr", type=float, help="learning rate of Muon; AdamW takes a tenth of it")
    add("--dropout", type=float, help="share of every branch's output that training leaves out")
    add("--dtype", choices=("float32", "bfloat16"), help="in which matrices are multiplied")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the model (where it pays)")
    add("--deterministic", action="store_true", help="exact on a GPU too, at a cost that is printed")
    add("--device", help="cpu, cuda or mps (the fastest that there is)")
    args = parser.parse_args()
    positive = ("minutes", "steps", "eval_every", "save_every", "block_size", "batch_size", "lr")
    for name in positive:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")
    for name, limit in (("seed", 2**32), ("dropout", 1)):
        if not 0 <= (getattr(args, name) or 0) < limit:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 0 and below {limit}")
    if args.device not in (None, "cpu", "cuda", "mps"):
        raise ValueError(f"--device {args.device} must be cpu, cuda or mps")
    if args.minutes and args.steps:
        raise ValueError("--minutes and --steps exclude each other")
    kept = {"resume", "out", "data", "device"}
    for name, value in vars(args).items():
        if args.resume and name not in kept and value != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: a resumed run keeps its settings, leave it out")
    return args


def main():
    args = parse_arguments()
    sys.stdout.reconfigure(errors="replace")  # no sample should end a run on a terminal of few characters
    out = Path(args.out).resolve() if args.out else None
    state = None
    if args.resume:
        out, state = checkpoint.find_run(out, "pretraining")
        args.deterministic, began_on = state["run"]["deterministic"], state["run"]["device"]
        args.device = args.device or began_on
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    machine.join_processes(args.device or machine.choose_device())
    device, (rank, world) = machine.choose_device(args.device), processes()
    name = args.data or (state["data"] if state else "pystdlib")
    if rank == 0:
        find_data(name)  # which may prepare it
    over_processes(0)  # the others wait for that
    data = load_data(find_data(name))
    say("data", f"{name}: {len(data.train):,} tokens for training, {len(data.val):,} held out")
    same_machine = state and (began_on, state["run"]["processes"]) == (device, world)
    threads = state["run"]["threads"] if same_machine else machine.default_threads()
    with machine.set_up(device, threads, args.deterministic):
        if state:
            run = Run(**state["run"])
            checkpoint.refuse_changes(state, identity(run, data))
            if state["step"] == run.steps:
                if rank == 0:
                    checkpoint.settle(out, state)  # should it have been killed just before that
                print(f"{os.path.relpath(out)} is finished: {run.steps:,} steps, nothing is left to do")
                return
            say("resumed", f"{os.path.relpath(out)} after step {state['step']:,} of {run.steps:,}")
            if (run.device, run.processes) != (device, world):
                began = f"{run.processes} x {run.device}, now {world} x {device}"
                say("", f"it began on {began}: the same but for rounding and the dice of dropout")
        else:
            run = plan(args, data, device)
            out = out or OUT / name
            if rank == 0:
                checkpoint.make_room(out)
            state = identity(run, data) | dict(stage="pretraining", run=asdict(run), data=name)
            state |= dict(step=0, seconds=0.0, loss_sum=0.0, logged=0, best=math.inf, best_step=0)
        shape = shape_of(run, data.tokenizer.vocab_size)
        with machine.explain_memory(shape, run), checkpoint.catch_signals() as stop_asked:
            step, bpb = train(run, data, out, device, state, stop_asked)
    if world > 1:
        dist.destroy_process_group()
    place = os.path.relpath(out)
    if bpb is None:
        print(f"\nstopped after step {step:,}; to go on: python train.py --resume --out {place}")
        sys.exit(130)
    print(f"\n{bpb:.4f} bits per byte of held-out text after {step:,} steps; the model is in {place}/")
    print("\nThe same prompt, step by step:\n")
    print((out / "samples.txt").read_text(encoding="utf-8"))
    print(f"next: python sample.py --model {place}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("onnection|imed out", str(error)):
            raise
        reason = f"{str(error).splitlines()[0]:.100}"
        print(f"error: the processes lost each other, so this one ends, too: {reason}", file=sys.stderr)
        sys.exit(2)
