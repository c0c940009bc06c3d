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
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import machine
from data.loader import Blocks, find_data, load_data
from loop import Run, Stage, bits_per_byte, fresh_state, measure_step, train
from machine import over_processes, processes
from model import PRESETS, Config, Transformer, load_safetensors
from optimizer import make_optimizers
from sample import OUT

N_EVALS = 10  # in a run
EVAL_TOKENS = 2**14  # in each but the last, which takes all that is held out


def shape_of(run, vocab_size):
    """The Config of the model that a run trains."""
    return Config(vocab_size, run.block_size, **PRESETS[run.preset])


def build(run, vocab_size, device):
    """A fresh model and its optimizers, the same for the same run."""
    torch.manual_seed(run.seed)
    model = Transformer(replace(shape_of(run, vocab_size), dropout=run.dropout)).to(device)
    return machine.distribute(model, run, device), make_optimizers(model, run.lr, run.weight_decay)


def begin(run, data, device):
    """Pretraining from its first step, as a Stage."""
    tokenizer, blocks = data.tokenizer, Blocks(data.train, run.block_size, run.seed)
    model, optimizers = build(run, tokenizer.vocab_size, device)

    def evaluate(step):
        """Bits per byte of some validation text, after the last step of all of it."""
        measure = partial(bits_per_byte, model, data.val, tokenizer.bytes_per_token, sources=data.sources)
        with machine.precision(device, run.dtype):
            score, losses = measure(max(1, EVAL_TOKENS // run.block_size))
            bpb, losses = (score, losses) if step < run.steps else measure()
        return score, {"val_bpb": bpb} | losses

    return Stage(
        model=model,
        optimizers=optimizers,
        tokenizer=tokenizer,
        read_batch=lambda step: blocks.batch(step * run.batch_size, run.batch_size, *processes()),
        evaluate=evaluate,
        write=lambda folder, weights: model.save(folder, tokenizer, weights),
        read=lambda folder: load_safetensors(folder / "model.safetensors"),
        prompt=data.val.read(0, min(8, len(data.val))).tolist(),
        channels=data.sources,
        columns=[f"val_loss {name}" for name in data.sources],
    )


def identity(run, data):
    """What a run must find unchanged when it goes on."""
    shape = asdict(shape_of(run, data.tokenizer.vocab_size))
    return {"text": data.fingerprint, "tokenizer": data.tokenizer.fingerprint, "shape": shape}


def say(name, text):
    """A line of what is known before the first step."""
    print(f"{name:10}{text}", flush=True)


def in_common(args, device):
    """The fields of a Run that pretraining and fine-tuning take alike from their arguments."""
    names = ("steps", "eval_every", "save_every", "deterministic")
    fields = {name: getattr(args, name) for name in names} | dict(seed=args.seed or 0, device=device)
    return fields | dict(processes=processes()[1], threads=torch.get_num_threads())


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
        **in_common(args, device),
        preset=args.preset or ("nano" if on_cpu else "small"),
        block_size=args.block_size or T,
        batch_size=args.batch_size or rows,
        lr=args.lr or 0.03,  # of Muon; AdamW takes a tenth
        weight_decay=0.1,
        dropout=args.dropout or 0.0,
        dtype=dtype[0],
        compile=compiling[0],
    )
    if run.batch_size % run.processes:
        raise ValueError(
            f"--batch-size {run.batch_size} cannot be shared evenly by {run.processes} processes"
        )
    return run, {"dtype": dtype[1], "compile": compiling[1]}


def plan(args, data, device):
    """Derive what the arguments leave open, and print it with the reasons. Returns the Run."""
    run, reasons = settings(args, device)
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
        step_seconds = per_step * measure_step(partial(begin, run, data, device), run, device, 0.03 * seconds)
    mfu = flops / step_seconds / run.processes / gemm
    say("a step", f"{1000 * step_seconds:,.0f} ms, {flops / 1e9:,.0f} GFLOPs: {mfu:.0%} of that rate (MFU)")
    if run.deterministic and device == "cuda":
        torch.use_deterministic_algorithms(False)
        free = per_step * measure_step(partial(begin, run, data, device), run, device)
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
    check_arguments(args, parser, positive, {"seed": 2**32, "dropout": 1}, {"out", "data", "device"})
    if args.minutes and args.steps:
        raise ValueError("--minutes and --steps exclude each other")
    return args


def check_arguments(args, parser, positive, limits, kept):
    """ValueError for numbers that are not above 0 (positive), for others that are not below their limit (and
    at least 0), and for what does not go with --resume, which is all but what is `kept`.
    """
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in positive and value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option} {value} must be above 0")
        if name in limits and not 0 <= (value or 0) < limits[name]:
            raise ValueError(f"{option} {value} must be at least 0 and below {limits[name]}")
        if args.resume and name not in {"resume", *kept} and value != parser.get_default(name):
            raise ValueError(f"{option}: a resumed run keeps its settings, leave it out")
    if args.device not in (None, "cpu", "cuda", "mps"):
        raise ValueError(f"--device {args.device} must be cpu, cuda or mps")


def main():
    args = parse_arguments()
    sys.stdout.reconfigure(errors="replace")  # no sample should end a run on a terminal of few characters
    out = Path(args.out).resolve() if args.out else None
    state = None
    if args.resume:
        out, state = checkpoint.find_run(out, "pretraining")
        args.deterministic, began_on = state["run"]["deterministic"], state["run"]["device"]
        args.device = args.device or began_on
    device = machine.start(args.device, args.deterministic)
    rank, world = processes()
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
            state = fresh_state(run, "pretraining", data=name) | identity(run, data)
        shape = shape_of(run, data.tokenizer.vocab_size)
        with machine.explain_memory(shape, run), checkpoint.catch_signals() as stop_asked:
            stage = begin(run, data, device)
            step, values = train(run, stage, out, device, state, stop_asked)
    if world > 1:
        dist.destroy_process_group()
    place = os.path.relpath(out)
    if values is None:
        print(f"\nstopped after step {step:,}; to go on: python train.py --resume --out {place}")
        sys.exit(130)
    bpb = f"{values['val_bpb']:.4f} bits per byte of held-out text"
    print(f"\n{bpb} after {step:,} steps; the model is in {place}/")
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
        machine.explain_lost_processes(error)
