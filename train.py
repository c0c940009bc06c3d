"""Stage 3: pretraining. Show the model text, measure how surprised it is, and change it to be less so.

    loss = -mean log p(next token | tokens before)        weights <- weights - rate * f(gradient of the loss)

The loop is in `train`. What the model learns is measured in bits per byte of text that it never trains on.
On a first reading, read "one step", "the optimizers", `learning_rate`, `bits_per_byte` and `train`.

    python train.py                             prepare the default data if missing, train 3 minutes, sample
    python train.py --data NAME --preset small --minutes 30
    python train.py --steps 2000 --seed 1       a fixed number of steps: the same digits every time
    python train.py --resume                    continue the newest run exactly where it stopped
    torchrun --nproc-per-node 8 train.py ...    the same on many GPUs
"""

import argparse
import csv
import ctypes
import gc
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data.loader import IGNORED, Blocks, find_data, load_data, validation_batches
from model import PRESETS, Config, Transformer, choose_device, fast_dtype, is_out_of_memory, matmul_rate
from sample import OUT, find_unused_ids, generate, positive_float, positive_int, seed_number
from tokenizer import print_any_character

DEFAULT_MINUTES = 3
SHORT_BLOCK = 64  # tokens; a run begins with blocks as short as that
SHORT_SHARE = 0.3  # of a run, after which it reads whole blocks
CONSTANT_SHARE = 0.4  # of a run, after which the learning rate falls
MAX_EPOCHS = 8  # under --minutes: a text that is read more often is memorized
EVAL_TOKENS = 2**14  # of held-out text in each evaluation but the last
LAST_EVAL_TOKENS = 2**20
SAVE_SECONDS = 600  # the longest time between two saves
WARMUP = 50  # steps
ADAMW_SHARE = 0.3  # AdamW's learning rate, as a share of Muon's
STATE = "train_state.pt"  # what a run needs to be resumed


@dataclass
class Settings:
    """Everything that decides the numbers of a run, besides data, hardware and versions. Saved with it."""

    seed: int
    block_size: int  # tokens of a block; see block_length
    batch_size: int  # blocks (examples in finetune.py) per step, over all processes
    micro_batch: int  # blocks in one forward pass of one process
    lr: float
    dtype: str  # in which matrices are multiplied: "bfloat16" or "float32"
    device: str
    processes: int
    deterministic: bool
    minutes: float | None  # the budget; None: --steps gives the number of steps
    steps: int | None  # None: not decided yet, see decide_steps
    fall: float | None  # the step at which the learning rate begins to fall
    n_evals: int  # evaluations in the run, each with a save
    save_every: int | None  # steps between further saves
    max_steps: int | None = None  # the end even if minutes are left, from a number of epochs
    preset: str = ""
    weight_decay: float = 0.0
    dropout: float = 0.0
    compile: bool = False


# --- one step ---


class NextTokenLoss(nn.Module):
    """The loss as a module, since DistributedDataParallel acts on the forward pass of a module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, targets):
        """ids, targets (B, T) -> the loss, summed over all targets, and the sum of each row (B,)."""
        return self.model.summed_loss(ids, targets)


def autocast(settings):
    """The context in which matrices are multiplied in the run's dtype; weights and sums stay in float32."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bfloat16")


def training_step(objective, optimizers, batch, n_targets, lr_scale, settings):
    """One update from this process's part of a batch, with lr_scale times the full learning rates.

    objective: a module such as NextTokenLoss. The loss is summed over all micro-batches of all processes and
    divided by n_targets, so it is the mean over the targets of the whole batch. Returns what objective
    measured in each row, and the gradient's norm; both stay on the device, so that nothing waits for a GPU.
    """
    _, world = rank_and_world()
    device = next(objective.parameters()).device
    pieces = list(zip(*(tensor.split(settings.micro_batch) for tensor in batch)))
    measured = []
    for i, piece in enumerate(pieces, 1):
        if device.type == "cuda":
            piece = [tensor.pin_memory() for tensor in piece]  # so that copying does not wait for the GPU
        piece = [tensor.to(device, non_blocking=True) for tensor in piece]
        skip_sync = world > 1 and i < len(pieces)  # processes exchange gradients once, at the last piece
        with objective.no_sync() if skip_sync else nullcontext():
            with autocast(settings):
                loss, rows = objective(*piece)
            (loss * (world / n_targets)).backward()  # times world: DDP averages over the processes
        measured.append(rows)
    norm = nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_scale * group["initial_lr"]
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(measured), norm


# --- memory ---


def try_micro_batch(objective, batch, settings):
    """Forward and backward of one micro-batch, beside room for two moments of each parameter, as in AdamW."""
    device = next(objective.parameters()).device
    moments = [torch.empty(2, *p.shape, device=device) for p in objective.parameters() if p.requires_grad]
    with autocast(settings):
        loss, _ = objective(*(tensor[: settings.micro_batch].to(device) for tensor in batch))
    loss.backward()
    del moments


def fit_micro_batch(objective, batch, settings):
    """Halve the micro-batch until the memory suffices for it, in all processes.

    batch: the longest of the run; it changes nothing. The first try also compiles; where that fails, the run
    is not compiled. ValueError: not even one row fits.
    """
    began = time.perf_counter()
    while True:
        try:
            try_micro_batch(objective, batch, settings)
            fits = True
        except Exception as error:
            fits = False
            if not is_out_of_memory(error):
                if not settings.compile:
                    raise
                print(f"torch.compile fails here, so nothing is compiled: {one_line(error):.90}")
                settings.compile = False
                torch.compiler.set_stance("force_eager")
                continue
        objective.zero_grad()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        if sum_over_processes(int(fits)) == settings.processes:
            if settings.compile:
                show("compiled", f"in {time.perf_counter() - began:.0f} s")
            return
        if settings.micro_batch == 1:
            raise ValueError("out of memory with one row at a time: take shorter rows or a smaller model")
        settings.micro_batch //= 2
        print(f"out of memory: trying {settings.micro_batch} rows at a time")


def one_line(error):
    """The message of an exception without line breaks."""
    return " ".join(str(error).split())


# --- the optimizers: Muon for the matrices inside the blocks, AdamW for the rest ---


def orthogonalize(X, dtype):
    """The orthogonal matrices nearest to X (n, rows, columns), roughly: singular values from 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration, X <- a X + (b A + c A A) X with A = X X^T, which lifts small
    singular values fast (Jordan et al., 2024, "Muon"). It needs only matrix products, and bfloat16 suffices
    where that is fast.
    """
    tall = X.size(-2) > X.size(-1)
    X = (X.mT if tall else X).to(dtype)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=3.4445)  # a X + B X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the momentum: every singular direction moves equally far.

    The same numbers as torch.optim.Muon, which takes one matrix at a time; here matrices of one shape are
    orthogonalized together.
    """

    def __init__(self, params, lr, weight_decay, dtype=torch.bfloat16, momentum=0.9):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype  # of the products in orthogonalize

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            of_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    of_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in of_shape.items():
                directions = torch.stack([self.look_ahead(p, group["momentum"]) for p in params])
                directions = orthogonalize(directions, self.dtype)
                lr = group["lr"] * math.sqrt(max(1, rows / columns))  # so that outputs change equally
                for p, direction in zip(params, directions):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction, alpha=-lr)

    def look_ahead(self, p, beta):
        """Nesterov's momentum: the running mean of the gradients, looking one step ahead."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(mean, beta)


def make_optimizers(model, lr, weight_decay, dtype):
    """Muon and AdamW for a model; AdamW at ADAMW_SHARE of its rate, norms without weight decay."""
    # Matrices that read the stream, matrices that add to it, embedding and head, the weights of the norms.
    readers, writers, tables, vectors = [], [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif ".layers." not in name:
            tables.append(p)  # embedding and head, which Muon's authors leave to AdamW, too
        elif "o_proj" in name or "down_proj" in name:
            writers.append(p)
        else:
            readers.append(p)
    # What the blocks write into the stream adds up over the depth: slower in models deeper than nano.
    slower = lr * PRESETS["nano"]["n_layer"] / model.config.n_layer
    matrices = [{"params": readers}, {"params": writers, "lr": slower}]
    others = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
    for_adamw = dict(lr=ADAMW_SHARE * lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    optimizers = [
        Muon(matrices, lr=lr, weight_decay=weight_decay, dtype=dtype),
        torch.optim.AdamW(others, **for_adamw),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # which training_step multiplies
    return optimizers


# --- the schedule: warm up, constant, the last 60 % down to zero ---
#
# Under --minutes, the constant part lasts 40 % of the minutes; the fall then has a fixed number of steps.


def learning_rate(step, done, settings):
    """The fraction of the full learning rate at a step, when a fraction `done` of the run is done."""
    if settings.steps is None:
        return min(1, max((step + 1) / WARMUP, done / 0.05))  # on a slow machine, 5 % of the budget
    warm = (step + 1) / min(WARMUP, max(1, settings.fall / 2))
    return min(1, warm, (settings.steps - step) / (settings.steps - settings.fall))


def fraction_done(step, seconds, settings):
    """How much of a run is done, 0 to 1: by the clock until its number of steps is decided."""
    if settings.steps is None:
        by_steps = step / settings.max_steps if settings.max_steps else 0
        return max(by_steps, seconds / (60 * settings.minutes))
    falling = (step - settings.fall) / (settings.steps - settings.fall)
    return CONSTANT_SHARE + (1 - CONSTANT_SHARE) * falling


def block_length(done, settings):
    """Tokens that the model sees at once when a fraction `done` of the run is done.

    Short blocks come first: they take less time, and what stands near is learned first. A compiled model has
    whole blocks throughout, since it is compiled for one length.
    """
    if done >= SHORT_SHARE or settings.compile or settings.block_size % SHORT_BLOCK:
        return settings.block_size
    return SHORT_BLOCK


def crosses(n, before, now):
    """Whether a run, cut into n equal parts, comes to the end of one between two fractions done."""
    return math.floor(n * before + 1e-9) < math.floor(n * now + 1e-9)


class Pace:
    """The clock of a run, its speed, and what is due. The first process's clock counts for all of them.

    Speed is measured in laps, from one line of the log to the next: at both ends the device was waited for.
    """

    def __init__(self, settings, step, seconds, last_eval):
        """seconds: before the run was resumed. last_eval: how many times longer the last evaluation takes."""
        self.settings, self.last_eval = settings, last_eval
        self.began = time.perf_counter() - seconds
        self.seconds = seconds  # when the clock was last read
        self.done = fraction_done(step, seconds, settings)
        self.lap_start, self.lap_step, self.lap_end = seconds, step, seconds
        self.step_seconds = []  # seconds per step, lap by lap
        self.eval_seconds = 0.0

    def read_clock(self):
        """Seconds since the run began."""
        self.seconds = from_first_process(time.perf_counter() - self.began)
        return self.seconds

    def advance(self, step):
        """Count a step -> (evaluate now?, log now?). Where a step is evaluated, it is logged, too."""
        before = self.done
        self.done = fraction_done(step, self.read_clock(), self.settings)
        evaluate = crosses(self.settings.n_evals, before, self.done)
        return evaluate, evaluate or step == 1 or crosses(100, before, self.done)

    def end_lap(self, step):
        """Seconds per step since the lap began. Call it after waiting for the device."""
        self.lap_end = self.read_clock()
        self.step_seconds.append((self.lap_end - self.lap_start) / (step - self.lap_step))
        return self.step_seconds[-1]

    def begin_lap(self, step, evaluated):
        """Start to measure again, after logging, evaluating and saving."""
        self.lap_start, self.lap_step = self.read_clock(), step
        if evaluated:
            self.eval_seconds = self.lap_start - self.lap_end
        if evaluated and self.settings.steps is None:  # evaluations may take a tenth of the budget
            affordable = int(0.1 * 60 * self.settings.minutes / self.eval_seconds)
            self.settings.n_evals = max(1, min(self.settings.n_evals, affordable))

    def decide_steps(self, step):
        """Once 40 % of a budget have passed, set the number of steps: those that fit into the rest of it.

        The learning rate was constant, so the number was not needed before. Returns whether it was set now.
        """
        settings = self.settings
        if settings.steps is not None or self.done < CONSTANT_SHARE:
            return False
        left = 60 * settings.minutes - self.seconds
        n_evals = (1 - CONSTANT_SHARE) * settings.n_evals - 1 + self.last_eval
        evaluations = min(n_evals * self.eval_seconds, left / 2)
        n = max(1, int((left - evaluations) / self.recent()))
        if settings.max_steps:
            n = max(1, min(n, settings.max_steps - step))
        settings.steps, settings.fall = step + n, step
        self.done = fraction_done(step, self.seconds, settings)
        return True

    def recent(self):
        """Median seconds per step of the last laps; a short disturbance does not change it.

        When the number of steps is decided, these are steps with whole blocks.
        """
        return statistics.median(self.step_seconds[-8:])

    def left(self, step):
        """Seconds that the run will still take, without evaluations once the steps are decided."""
        if self.settings.steps is None:
            return max(0, 60 * self.settings.minutes - self.seconds)
        return (self.settings.steps - step) * self.recent()


def step_seed(settings, step):
    """A seed for what is random in a step of this process, so that no generator state has to be saved."""
    rank, _ = rank_and_world()
    return ((settings.seed * 1_000_003 + step + 1) * 8191 + rank) % 2**32  # a CPU uses 32 bits


# --- bits per byte ---


@torch.no_grad()
def bits_per_byte(model, tokens, bytes_per_token, n_tokens=None):
    """Nats of all predicted tokens / ln 2 / their bytes, over about n_tokens of the text (None: all)."""
    T, n_blocks = model.config.block_size, None
    if n_tokens:
        n_blocks = max(1, n_tokens // T)
    device, was_training = model.model.norm.weight.device, model.training
    sizes = torch.from_numpy(bytes_per_token).to(device)
    sums = torch.zeros(2, dtype=torch.float64)
    rank, world = rank_and_world()
    model.eval()
    for ids, targets in validation_batches(tokens, T, n_blocks, rank=rank, world=world):
        ids, targets = ids.to(device), targets.to(device)
        nats, _ = model.summed_loss(ids, targets)
        n_bytes = (sizes[targets.clamp(min=0)] * (targets != IGNORED)).sum()
        sums += torch.tensor([nats.item(), n_bytes.item()], dtype=torch.float64)
    model.train(was_training)
    nats, n_bytes = sum_over_processes(sums).tolist()
    return nats / math.log(2) / n_bytes


# --- is that normal? ---

# {million tokens: bits per byte} of the default data, in batches of 8 x 256: at a constant rate, and
# at the end of a run of so many in all. From runs of `python tests/bench.py curve --steps 300 1000` and, of
# pico, of three minutes; Python 3.11. Short blocks are counted as they are, so "constant" is a rough figure.
USUAL = {
    "pico": {
        "constant": {0.12: 2.22, 0.2: 2.02, 0.41: 1.81, 0.61: 1.74, 0.82: 1.71, 1.02: 1.66, 1.26: 1.59},
        "end": {0.61: 1.71, 2.05: 1.3, 2.63: 1.27, 3.31: 1.24},
    },
    "nano": {
        "constant": {0.12: 2.18, 0.2: 1.97, 0.41: 1.78, 0.61: 1.72, 0.82: 1.69},
        "end": {0.61: 1.66, 2.05: 1.26},
    },
}


def usual_bpb(step, settings, data):
    """About what the default run has after a step; None: another run, or while the rate falls."""
    curves = USUAL.get(settings.preset)
    default_data = data.name == "pystdlib" and data.tokenizer.vocab_size == 2048
    chosen = settings.block_size, settings.batch_size, settings.lr, settings.dropout
    if curves is None or not default_data or chosen != (256, 8, 0.02, 0.0):
        return None
    if settings.steps is None or step <= settings.fall:
        curve = curves["constant"]
    elif step == settings.steps:
        curve = curves["end"]
    else:
        return None
    millions = step * settings.batch_size * settings.block_size / 1e6
    if not min(curve) <= millions <= max(curve):
        return None
    return np.interp(math.log(millions), np.log(list(curve)), list(curve.values())).item()


def compare_with_usual(bpb, usual):
    """A remark on a measurement, beside what is usual."""
    if bpb < 1.1 * usual:
        return f"about {usual:.2f} is usual here"
    return f"about {usual:.2f} is usual here: do --dtype float32 or --device cpu change it?"


def loss_and_norm(model, ids):
    """The loss of ids (1, T + 1) and the norm of its gradient."""
    model.zero_grad()
    loss = model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    return torch.stack((loss.detach(), nn.utils.get_total_norm(p.grad for p in model.parameters())))


def compare_with_cpu(config, device):
    """Compute a loss and its gradient on a device and on the CPU, and print whether they agree.

    One row of 64 tokens through two layers of the model's width, in float32 without TF32, takes a second. On
    new devices PyTorch itself has been wrong more than once.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(replace(config, n_layer=min(2, config.n_layer), dropout=0.0))
        for p in model.parameters():
            nn.init.normal_(p, mean=float(p.ndim == 1), std=0.02)
        ids = torch.randint(config.vocab_size, (1, min(64, config.block_size) + 1))
    expected = loss_and_norm(model, ids)
    found = loss_and_norm(model.to(device), ids.to(device)).cpu()
    torch.set_float32_matmul_precision(precision)
    n_wrong = sum_over_processes(int(not torch.allclose(found, expected, rtol=2e-3)))
    numbers = "loss {:.4f}, gradient norm {:.4f}"
    on_device, on_cpu = numbers.format(*found.tolist()), numbers.format(*expected.tolist())
    if n_wrong:
        wrong = f"WRONG in {n_wrong:g} of {rank_and_world()[1]} processes: {on_device}, on the CPU {on_cpu}"
        show("check", f"{wrong}; try --device cpu or another version of PyTorch")
    else:
        show("check", f"{device} and CPU agree in float32: {on_device}")


# --- processes, which torchrun starts ---


def start(device, deterministic):
    """Choose the device and, under torchrun, join the other processes, each on its own GPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    device = choose_device(device)
    if "RANK" in os.environ:
        local_rank = int(os.environ["LOCAL_RANK"])
        if device == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # only the first process prints
    torch.set_num_threads(torch.get_num_threads())  # also for MKL, which else takes fewer in small products
    if sys.platform == "linux":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs for what is left in float32
    torch.use_deterministic_algorithms(deterministic)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character of a sample
    return device


def keep_freed_memory():
    """Ask the C library to keep freed memory for the next step: pieces up to 32 MB, 1 GB in all.

    glibc gives it back to the system, which then clears it page by page in every step: a tenth of the time.
    """
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # other C libraries have no mallopt
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions take
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def leave_processes():
    """Leave the other processes, at the end of a script."""
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel, if collected after its group is gone, may abort the process
        dist.destroy_process_group()


def rank_and_world():
    """The number of this process and how many there are; (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_processes(value):
    """The sum of a number, or of a tensor on the CPU, over all processes."""
    if not dist.is_initialized():
        return value
    total = torch.as_tensor(value, dtype=torch.float64).clone()
    dist.all_reduce(total)
    return total if isinstance(value, torch.Tensor) else total.item()


def from_first_process(value):
    """The first process's number, in all of them. Also a point at which all wait for the first one."""
    if not dist.is_initialized():
        return value
    number = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(number, 0)
    return number.item()


def parallel(objective):
    """The objective, such that processes average their gradients."""
    if not dist.is_initialized():
        return objective
    return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)


# --- save and resume: a run may be killed at any instant ---
#
#     out/NAME/                   the newest model, log.csv and samples.txt
#     out/NAME/best/              the model with the best validation
#     out/NAME/train_state.pt     what resuming needs: one file, written elsewhere, flushed and renamed


def lock(folder):
    """Claim a folder for this process. ValueError: another one has it. The file returned holds the lock."""
    file = open(folder / ".lock", "a")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process ends
    except OSError:
        raise ValueError(f"another process is training in {folder}: choose another --out") from None
    return file


def make_folder(out):
    """Make an empty folder for a new run and lock it; a run that is there is moved to NAME.1, NAME.2 ..."""
    started = {".lock", ".unfinished", "samples.txt"}  # of a run that ended before its first line of the log
    if out.exists() and {path.name for path in out.iterdir()} - started:
        if not (out / "log.csv").exists():
            raise ValueError(f"{out} exists and holds no run: choose another --out")
        held = lock(out)
        k = 1
        while (aside := out.with_name(f"{out.name}.{k}")).exists():
            k += 1
        if os.name == "nt":
            held.close()  # Windows renames no folder in which a file is open, whoever opened it
        out.rename(aside)
        held.close()
        print(f"{os.path.relpath(out)} existed and is now {os.path.relpath(aside)}")
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out)
    (out / "samples.txt").unlink(missing_ok=True)
    return held


def claim(out, state):
    """Lock a run's folder, as long as the context lasts; without a state to resume, make it an empty one.

    One process does it. ValueError: another process has the folder, or had it since the state was read.
    """
    rank, _ = rank_and_world()
    held = nullcontext()
    if rank == 0 and state is None:
        held = make_folder(out)
    elif rank == 0:
        held = lock(out)
        if read_state(out, mmap=True)["step"] != state["step"]:
            raise ValueError(f"the run in {out} has just gone on: resume it again")
    from_first_process(0)  # the others wait
    return held


def save_state(out, state, model, optimizers):
    """Write the file from which `restore` continues. state: whatever else the run wants to find again.

    OSError: it cannot be written, as on a full disk; the file of the last save is untouched.
    """
    state = dict(state)
    state["weights"] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    state["lengths"] = {name: (out / name).stat().st_size for name in ("log.csv", "samples.txt")}
    unfinished = out / f"{STATE}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, out / STATE)
    except (OSError, RuntimeError) as error:  # PyTorch raises a RuntimeError for a full disk
        raise OSError(f"{out / STATE} cannot be written: {error!s:.80}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def read_state(out, mmap=False):
    """What save_state wrote. mmap: without reading the tensors. ValueError: the file is damaged."""
    damaged = f"{out / STATE} is damaged, so the run cannot be resumed; the models in {out} may be good"
    try:
        if not mmap and zipfile.ZipFile(out / STATE).testzip():  # compares checksums, which PyTorch does not
            raise ValueError(damaged)
        return torch.load(out / STATE, map_location="cpu", weights_only=True, mmap=mmap)
    except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise ValueError(damaged) from None


def open_run(args, script):
    """The folder of --out, or None, and the saved state of the run to resume, or None.

    Without --out, --resume takes the newest run of that script under out/. ValueError: there is none.
    """
    out = Path(args.out).resolve() if args.out else None
    if not args.resume:
        return out, None
    folders = [out] if out else sorted(OUT.glob("*"), key=lambda run: run.stat().st_mtime, reverse=True)
    for folder in folders:
        if (folder / STATE).exists():
            state = read_state(folder)
            if state["script"] == script:
                args.deterministic = state["settings"]["deterministic"]
                args.device = args.device or state["settings"]["device"]
                return folder, state
    where = os.path.relpath(out) if out else "out"
    raise ValueError(f"there is nothing to resume in {where}/: no saved run of {script}")


def restore(out, state, model, optimizers):
    """Bring model, optimizers, log and samples back to where a state was saved."""
    unexpected = model.load_state_dict(state.pop("weights"), strict=False).unexpected_keys
    assert not unexpected, unexpected
    for optimizer, saved in zip(optimizers, state.pop("optimizers")):
        optimizer.load_state_dict(saved)
    rank, _ = rank_and_world()
    if rank == 0:
        for name, length in state["lengths"].items():
            os.truncate(out / name, length)


def refuse_changes(state, identity):
    """ValueError: something that the run depends on is not what it began with."""
    for what, value in identity.items():
        if state["identity"].get(what) != value:
            raise ValueError(f"the {what} has changed since the run began, so it cannot be resumed: {value}")


@contextmanager
def catch_signals():
    """Inside, SIGINT and SIGTERM ask for a stop; a second one stops at once. Yields a function: asked?"""
    asked = []

    def handle(number, frame):
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > 1:  # torchrun and the terminal may both send the first one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- log.csv, samples.txt, the live line ---


def show(name, text):
    """Print a line of two columns."""
    print(f"{name:10}{text}", flush=True)


def check_finite(value, out):
    """ValueError: the training has diverged, since a loss or a norm is not a finite number."""
    if not math.isfinite(value):
        best = out / "best"
        found = f"the best model so far is in {best}" if best.exists() else "nothing was learned yet"
        raise ValueError(f"the loss diverged: try a lower --lr; {found}")


class Log:
    """The lines of a run: all in log.csv; on the screen those with an evaluation and, live, the newest."""

    COLUMNS = ("step", "tokens", "seconds", "train_loss", "val_bpb", "lr", "grad_norm")
    COLUMNS += ("tokens_per_second", "mfu")

    def __init__(self, out, more_columns=()):
        self.on_terminal = sys.stdout.isatty()
        rank, _ = rank_and_world()
        self.file = open(out / "log.csv" if rank == 0 else os.devnull, "a", newline="", encoding="utf-8")
        self.rows = csv.DictWriter(self.file, [*self.COLUMNS, *more_columns])
        if self.file.tell() == 0:
            self.rows.writeheader()
            self.file.flush()
        heads = f"{'step':>8} {'loss':>8} {'val bpb':>8} {'lr':>8} {'tokens/s':>9} {'MFU':>5} {'left':>8}"
        print(f"\n{heads}", flush=True)

    def write(self, values, left, stays, remark="", details=""):
        """Add a line of {column: value}; left: seconds; stays: on the screen; details: below the line."""
        known = {name: round(value, 6) for name, value in values.items() if value is not None}
        self.rows.writerow(known)
        self.file.flush()
        bpb = f"{known['val_bpb']:.4f}" if "val_bpb" in known else ""
        speed, mfu, left = values["tokens_per_second"], values["mfu"], timedelta(seconds=round(left))
        line = f"{values['step']:8,} {values['train_loss']:8.4f} {bpb:>8} {values['lr']:8.5f} "
        line += f"{speed:9,.0f} {mfu:5.0%} {left!s:>8}  {remark}".rstrip()
        if stays:
            if self.on_terminal:
                print("\r\033[K", end="")  # in place of the last line that did not stay
            print(line, flush=True)
            if details:
                print(f"{'':9}{details}", flush=True)
        elif self.on_terminal:  # the next line overwrites this one
            columns = shutil.get_terminal_size().columns
            print(f"\r{line}  {details}"[:columns] + "\033[K", end="", flush=True)


def slow_share(out):
    """The share of a run's time in which it had less than half of its best tokens/s; 0 if it was short."""
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if len(rows) < 20:
        return 0.0
    speeds = [float(row["tokens_per_second"]) for row in rows[1:]]  # without the first step
    ends = [float(row["seconds"]) for row in rows]
    best = np.quantile(speeds, 0.9)  # a single lap may seem fast by chance
    slow = [b - a for a, b, speed in zip(ends, ends[1:], speeds) if speed < 0.5 * best]
    return sum(slow) / ends[-1]


def say_if_busy(out):
    """Print a line if other programs seem to have taken much of the machine."""
    share = slow_share(out)
    if share > 1 / 3:
        slow = f"{share:.0%} of the time it had less than half of its best speed"
        print(f"\nthe machine was busy: {slow}; an idle one does more in the same time")


def peak_rate(settings):
    """FLOPs per second of large matrix products, on the devices of all processes together."""
    return settings.processes * matmul_rate(settings.device, getattr(torch, settings.dtype))


def add_sample(out, model, tokenizer, prompt, step):
    """Add a line to samples.txt: the same prompt (ids) and the same random numbers, another model."""
    rank, _ = rank_and_world()
    if rank > 0:
        return
    specials = tokenizer.special_tokens.values()
    model.eval()
    unused = find_unused_ids(model, tokenizer)
    steps = generate(model, [prompt], 30, stop_ids=specials, top_p=1, unused_ids=unused)
    text = tokenizer.decode(prompt + [new for (new,) in steps])
    model.train()
    with open(out / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"{step:8,}  {repr(text)[1:-1]}\n")


# --- command line ---


def parse_arguments():
    """What was typed. ValueError: options that do not go together."""
    parser = argparse.ArgumentParser(description="Train a model on prepared data.", exit_on_error=False)
    what = parser.add_argument_group("what to train")
    what.add_argument("--data", metavar="NAME", default="pystdlib", help="folder under data/ (pystdlib)")
    what.add_argument("--preset", choices=PRESETS, help="size of the model (by minutes, machine and text)")
    what.add_argument("--block-size", type=positive_int, metavar="TOKENS", help="tokens that it sees at once")
    what.add_argument("--dropout", type=below_one, default=0.0, help="share of each branch left out (0)")
    add_common_arguments(parser)
    how = parser.add_argument_group("how fast")
    how.add_argument("--lr", type=positive_float, help="learning rate of Muon; AdamW takes 0.3 of it (0.02)")
    how.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on a GPU)")
    args = parser.parse_args()
    refuse_with_resume(args, parser)
    return args


def add_common_arguments(parser):
    """The options that train.py and finetune.py share."""
    run = parser.add_argument_group("the run")
    run.add_argument("--out", metavar="DIR", help="where the model goes (under out/)")
    run.add_argument("--resume", action="store_true", help="continue the newest run, or the one in --out")
    run.add_argument("--seed", type=seed_number, help="equal seeds draw equal numbers (0)")
    limit = run.add_mutually_exclusive_group()
    minutes_help = f"time for steps and evaluations ({DEFAULT_MINUTES})"
    limit.add_argument("--minutes", type=positive_float, help=minutes_help)
    limit.add_argument("--steps", type=positive_int, help="their number instead: the same digits every time")
    run.add_argument("--batch-size", type=positive_int, metavar="ROWS", help="per step, over all processes")
    evals_help = "how often the model is evaluated and saved (10; in a tenth of the minutes at most)"
    run.add_argument("--evals", type=positive_int, default=10, metavar="N", help=evals_help)
    run.add_argument("--save-every", type=positive_int, metavar="STEPS", help="save more often")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products (the fastest)")
    run.add_argument("--deterministic", action="store_true", help="exact on a GPU too, but slower")
    run.add_argument("--device", choices=("cpu", "cuda", "mps"), help="(the fastest of this machine)")
    return limit


def below_one(text):
    """A number from 0 to 1, not 1 itself, for argparse."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return float(text)


def refuse_with_resume(args, parser):
    """ValueError: --resume was given with an option that the run has decided."""
    for name, value in vars(args).items():
        if args.resume and name not in ("resume", "out", "device") and value != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: a resumed run keeps its settings, leave it out")


# --- settings: what the arguments leave open follows from machine, time and text ---


def choose_dtype(device):
    """The name of the dtype in which the first process's device multiplies fastest, for all processes."""
    return "bfloat16" if from_first_process(fast_dtype(device) == torch.bfloat16) else "float32"


# The budget, in minutes of one CPU thread without bfloat16 units, from which on a preset learns more than the
# one before it. Measured up to 90 (tests/README.md); beyond it extrapolated, and the speeds of GPUs guessed.
BUDGETS = {"pico": 0, "nano": 30, "micro": 100, "mini": 400, "small": 1600}


def choose_preset(minutes, device, dtype, n_devices, n_tokens, vocab_size):
    """The preset for a budget, and why, in words. n_devices: CPU threads or GPUs, of all processes.

    By the kind of device, not by its speed at the moment, so a busy machine trains the same model. One with
    more than four parameters for each of the n_tokens of the text would memorize it.
    """
    if device == "cuda":
        speed = 2000 if dtype == "bfloat16" else 100
    elif device == "mps":
        speed = 30
    else:
        speed = 3 if dtype == "bfloat16" else 1
    budget = minutes * n_devices * speed
    affordable = [name for name, least in BUDGETS.items() if least <= budget]
    sizes = {name: Config(vocab_size, **PRESETS[name]).num_params() for name in affordable}
    fitting = [name for name in affordable if sizes[name] <= 4 * n_tokens]
    if not fitting:
        return "pico", f"the smallest, though large for a text of {n_tokens:,} tokens"
    if fitting != affordable:
        return fitting[-1], f"the largest with at most four parameters for each of {n_tokens:,} tokens"
    where = f"{n_devices} CPU threads" if device == "cpu" else f"{n_devices} x {device}"
    return affordable[-1], f"for {minutes:g} minutes of {where} with {dtype} products"


def schedule_settings(args):
    """The fields of Settings that say how long a run is; under --minutes, decide_steps sets two of them."""
    minutes, fall = args.minutes or DEFAULT_MINUTES, None
    if args.steps:
        minutes, fall = None, CONSTANT_SHARE * args.steps
    return dict(minutes=minutes, steps=args.steps, fall=fall, n_evals=args.evals, save_every=args.save_every)


def choose_batch(preset, device, minutes):
    """(tokens of a block, tokens of a step) for a preset, a kind of device and a budget."""
    if device == "cuda" and preset in ("small", "medium", "large"):
        return 1024, 128 * 1024
    if minutes < 1:
        return 64, 1024  # more and smaller steps
    return 256, 2048


def choose_settings(args, device, data):
    """(Settings, why this preset), from the arguments and, where they are silent, from machine and text."""
    _, world = rank_and_world()
    dtype = args.dtype or choose_dtype(device)
    minutes = args.minutes or DEFAULT_MINUTES
    n_tokens = len(data.train)
    preset, reason = args.preset, "as you asked"
    if preset is None:
        n_devices = int(sum_over_processes(torch.get_num_threads() if device == "cpu" else 1))
        vocab_size = data.tokenizer.vocab_size
        preset, reason = choose_preset(minutes, device, dtype, n_devices, n_tokens, vocab_size)
        if args.steps:
            reason += f" (--steps names no time, so {DEFAULT_MINUTES} minutes are assumed)"
    block_size, tokens_per_step = choose_batch(preset, device, minutes)
    block_size = args.block_size or block_size
    batch_size = max(1, tokens_per_step // block_size)
    n_blocks = MAX_EPOCHS * max(1, n_tokens // block_size - 1)  # the most that a budget reads
    while not args.steps and batch_size > 1 and n_blocks < 400 * batch_size:
        batch_size //= 2  # or a small text would be read in a few steps
    batch_size = args.batch_size or math.ceil(batch_size / world) * world
    if batch_size % world:
        raise ValueError(f"--batch-size {batch_size} cannot be shared evenly by {world} processes")
    max_steps = None if args.steps else math.ceil(n_blocks / batch_size)
    n_steps = args.steps or min(1600 * minutes, max_steps)  # a rough guess, which matters for few steps
    larger = min(2, math.sqrt(max(1, 400 / n_steps)))  # fewer than 400 steps have to be larger ones
    settings = Settings(
        seed=args.seed or 0,
        preset=preset,
        block_size=block_size,
        batch_size=batch_size,
        micro_batch=batch_size // world,
        lr=args.lr or round(0.02 * larger, 4),
        weight_decay=0.2,
        dropout=args.dropout,
        dtype=dtype,
        device=device,
        processes=world,
        compile=device == "cuda" if args.compile is None else args.compile,
        deterministic=args.deterministic,
        max_steps=max_steps,
        **schedule_settings(args),
    )
    return settings, reason


def show_plan(settings, reason, data):
    """Print what was chosen, before the first step."""
    config = model_config(settings, data)
    n = config.num_params()
    show("model", f"{settings.preset}: {n:,} parameters, {config.n_layer} layers of {config.n_embd} channels")
    show("", reason)
    where = f"{torch.get_num_threads()} threads of a CPU" if settings.device == "cpu" else settings.device
    if settings.processes > 1:
        where = f"{settings.processes} processes, each on {where}"
    if settings.device == "cpu":
        where += " with" if fast_dtype("cpu") == torch.bfloat16 else " without"
        where += " bfloat16 units"
    show("device", f"{where}; {settings.dtype} products, at most {peak_rate(settings) / 1e9:,.0f} GFLOP/s")
    batch, first = f"{settings.batch_size} blocks of {settings.block_size} tokens", block_length(0, settings)
    if first < settings.block_size:
        n_rows = settings.batch_size * settings.block_size // first
        batch = f"{n_rows} blocks of {first} tokens in the first {SHORT_SHARE:.0%} of the run, then {batch}"
    show("batch", batch)
    if settings.steps:
        show("steps", f"{settings.steps:,}")
        show_text(settings, data)
    else:
        epochs = f"or {MAX_EPOCHS} epochs ({settings.max_steps:,} steps) if that is less"
        show("time", f"{settings.minutes:g} minutes, {epochs}; the number of steps is set after 40 % of it")
    rates = f"Muon {settings.lr:g}, AdamW {ADAMW_SHARE * settings.lr:g}"
    show("rates", f"{rates}: up in {WARMUP} steps or fewer, constant, the last 60 % down to zero")


def show_steps(settings, pace):
    """Print the number of steps that was decided."""
    each = 1000 * pace.recent()
    show("steps", f"{settings.steps:,} in all, of {each:,.0f} ms; from here on the rate falls")


def show_text(settings, data):
    """Print how much text a run reads."""
    tokens, n = settings.steps * settings.batch_size * settings.block_size, len(data.train)
    n_params = model_config(settings, data).num_params()
    show("text", f"{tokens:,} tokens, {tokens / n_params:.1f} for each parameter, {tokens / n:.1f} epochs")
    if tokens > 4 * n and n < n_params:
        show("", "fewer tokens than parameters, seen many times: take more text or a smaller --preset")


def open_data(name):
    """Prepared data by name; the first process prepares a known corpus while the others wait."""
    rank, _ = rank_and_world()
    if rank == 0:
        find_data(name)
    from_first_process(0)
    return load_data(find_data(name))


def model_config(settings, data):
    """The shape of the model that a run trains."""
    shape = dict(PRESETS[settings.preset], dropout=settings.dropout)
    return Config(data.tokenizer.vocab_size, settings.block_size, **shape)


def identity_of(data):
    """What must be unchanged when a run is resumed."""
    return {"text": data.fingerprint, "tokenizer": data.tokenizer.fingerprint}


def move_settings(settings, device, n_rows):
    """Bring a saved run's Settings to this device and number of processes.

    ValueError: a batch has only n_rows rows, and each process needs one.
    """
    _, world = rank_and_world()
    if world > n_rows:
        raise ValueError(f"{world} processes are too many for this run: a batch has {n_rows} rows to share")
    if settings.dtype != choose_dtype(device):
        show("", f"it began with {settings.dtype} products and keeps them; others are faster here")
    if (settings.device, settings.processes) != (device, world):
        began = f"{settings.processes} x {settings.device}, now {world} x {device}"
        show("", f"it began on {began}: the same but for rounding and dropout")
        settings.device, settings.processes = device, world
        settings.micro_batch = math.ceil(settings.batch_size / world)


# --- the run ---


def train(settings, data, blocks, out, state=None):
    """Train a model from its first step or, given the saved state of a run, from there on.

    blocks: of data.train. Leaves in `out` what the section "save and resume" lists. Returns the number of
    steps taken, and the bits per byte that were measured last: if the run is finished, with more text.
    """
    rank, world = rank_and_world()
    device, tokenizer = settings.device, data.tokenizer
    config = model_config(settings, data)
    torch.manual_seed(settings.seed)
    model = Transformer(config).to(device).train()
    optimizers = make_optimizers(model, settings.lr, settings.weight_decay, getattr(torch, settings.dtype))
    objective = NextTokenLoss(model)
    if settings.compile:
        objective.compile(dynamic=False)
    fit_micro_batch(objective, blocks.batch(0, settings.batch_size, rank, world), settings)
    short_blocks = Blocks(data.train, block_length(0, settings), settings.seed)

    prompt = data.val[:8].tolist()
    step, seconds, best, bpb = 0, 0.0, math.inf, None
    loss_sum, n_summed = torch.zeros((), device=device), 0  # over the steps since the last line of the log
    if state:
        restore(out, state, model, optimizers)
        step, seconds, best, n_summed = (state[name] for name in ("step", "seconds", "best", "n_summed"))
        if rank == 0:
            loss_sum += state["loss_sum"]
    else:
        add_sample(out, model, tokenizer, prompt, step)
    objective = parallel(objective)
    n_targets = settings.batch_size * settings.block_size  # in a step
    log, peak = Log(out), peak_rate(settings)
    pace = Pace(settings, step, seconds, 1 + min(len(data.val), LAST_EVAL_TOKENS) / EVAL_TOKENS)
    saved, stop = seconds, False
    with catch_signals() as stop_asked:
        while step != settings.steps and not stop:
            lr_scale = learning_rate(step, pace.done, settings)
            torch.manual_seed(step_seed(settings, step))  # for dropout
            length = config.block_size = block_length(pace.done, settings)  # the longest seen so far
            text = short_blocks if length < settings.block_size else blocks
            batch = text.batch(step, n_targets // length, rank, world)
            same_tokens = replace(settings, micro_batch=settings.micro_batch * settings.block_size // length)
            losses, norm = training_step(objective, optimizers, batch, n_targets, lr_scale, same_tokens)
            loss_sum += losses.sum()
            n_summed += 1
            step += 1
            stop = from_first_process(stop_asked())
            evaluating, logging = pace.advance(step)

            if logging:
                loss = sum_over_processes(loss_sum.item()) / (n_summed * n_targets)  # waits for the device
                check_finite(loss + norm.item(), out)
                loss_sum.zero_()
                n_summed = 0
                speed = n_targets / pace.end_lap(step)
                values = {
                    "step": step,
                    "tokens": step * n_targets,
                    "train_loss": loss,
                    "lr": lr_scale * settings.lr,
                    "grad_norm": norm.item(),
                    "tokens_per_second": speed,
                    "mfu": speed * 3 * config.flops_per_token(config.block_size) / peak,
                }
                decided = pace.decide_steps(step)
                remark = ""
                if step == 1:
                    remark = f"an even guess: ln {config.vocab_size} = {math.log(config.vocab_size):.4f}"

            if evaluating:
                with autocast(settings):
                    bpb = bits_per_byte(model, data.val, tokenizer.bytes_per_token, EVAL_TOKENS)
                check_finite(bpb, out)
                if bpb < best and rank == 0:
                    model.save(out / "best", tokenizer)
                best = min(best, bpb)
                if step == settings.steps:
                    with autocast(settings):
                        bpb = bits_per_byte(model, data.val, tokenizer.bytes_per_token, LAST_EVAL_TOKENS)
                values["val_bpb"] = bpb
                if usual := usual_bpb(step, settings, data):
                    remark = compare_with_usual(bpb, usual)
                add_sample(out, model, tokenizer, prompt, step)

            if logging:
                values["seconds"] = pace.read_clock()
                log.write(values, pace.left(step), evaluating or decided or step == 1, remark)
                if decided:
                    show_steps(settings, pace)
                    show_text(settings, data)

            save_asked = settings.save_every and step % settings.save_every == 0
            if evaluating or stop or save_asked or pace.seconds - saved > SAVE_SECONDS:
                total = sum_over_processes(loss_sum.item())
                check_finite(total + norm.item(), out)  # or the weights are useless
                if rank == 0:
                    state = {
                        "script": "train.py",
                        "data": data.name,
                        "identity": identity_of(data),
                        "settings": asdict(settings),
                        "step": step,
                        "seconds": pace.seconds,
                        "best": best,
                        "loss_sum": total,
                        "n_summed": n_summed,
                    }
                    model.save(out, tokenizer)
                    save_state(out, state, model, optimizers)
                saved = pace.seconds
            if logging:
                pace.begin_lap(step, evaluating)
    return step, bpb


def main():
    """Start or resume a run -> the exit status: 0, or 130 if it was stopped."""
    args = parse_arguments()
    out, state = open_run(args, "train.py")
    device = start(args.device, args.deterministic)
    data = open_data(state["data"] if state else args.data)
    show("data", f"{data.name}: {len(data.train):,} tokens for training, {len(data.val):,} held out")
    out = out or OUT / data.name
    place = os.path.relpath(out)
    if state:
        refuse_changes(state, identity_of(data))
        settings = Settings(**state["settings"])
        if state["step"] == settings.steps:
            print(f"{place} is finished: {settings.steps:,} steps, nothing is left to do")
            return 0
        show("resumed", f"{place} after step {state['step']:,}")
        move_settings(settings, device, settings.batch_size)
    else:
        settings, reason = choose_settings(args, device, data)
        show_plan(settings, reason, data)
    if device != "cpu":
        compare_with_cpu(model_config(settings, data), device)
    blocks = Blocks(data.train, settings.block_size, settings.seed)
    with claim(out, state):
        step, bpb = train(settings, data, blocks, out, state)
    if step != settings.steps:
        print(f"\nstopped after step {step:,}; to go on: python train.py --resume --out {place}")
        return 130
    say_if_busy(out)
    print(f"\n{bpb:.4f} bits per byte of held-out text after {step:,} steps; the model is in {place}/")
    if step == settings.max_steps:
        early = "so the run ended: more epochs (--steps) mostly memorize, more text teaches more"
        print(f"the text was read {MAX_EPOCHS} times, {early}")
    print("\nThe same prompt, step by step:\n")
    print((out / "samples.txt").read_text(encoding="utf-8"))
    print(f"next: python sample.py --model {place}")
    return 0


def run(main):
    """Run a script's main(): a user's mistake ends in one line on stderr and exit status 2, Ctrl-C in 130."""
    print_any_character()
    try:
        status = main()
        leave_processes()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        message = str(error)
    except RuntimeError as error:
        message = f"{one_line(error):.150}"
        if is_out_of_memory(error):
            message = f"out of memory: {message}; take a smaller --batch-size or --block-size"
        elif isinstance(error, dist.DistError) or re.search("(?i)connection|timed out", str(error)):
            message = f"the processes lost each other, so this one ends, too: {message}"
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run(main)
