"""What the hardware offers: its fastest arithmetic, its speed and memory, and other processes.

All choices follow from the machine and from what was asked for, never from a measured time: equal runs make
equal ones. `gemm_rate` measures, but only to say how much of the machine a run uses.
"""

import gc
import os
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.attention import SDPBackend, sdpa_kernel


def choose_device(name=None):
    """The device of that name or, without one, the fastest of this machine. ValueError: it is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from None
    return name


def default_dtype(device):
    """In which dtype matrices are multiplied fastest, and the reason. Weights and sums stay in float32."""
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        native = any(unit in info.read_text() for unit in ("avx512_bf16", "amx_bf16"))
    return ("bfloat16", "it has units for that") if native else ("float32", "it has no units for less")


def precision(device, dtype):
    """The context in which matrix products are computed in that dtype."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


def default_threads():
    """Threads for this process: PyTorch's own choice or, of several processes on a machine, its share."""
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.get_num_threads() if n_local == 1 else max(1, (os.cpu_count() or 1) // n_local)


def default_compile(device, long):
    """Whether torch.compile pays, and the reason. long: the run takes a quarter of an hour or more."""
    if device == "mps":
        return False, "not tried on this kind of device"
    if device == "cpu" and not long:
        return False, "it takes half a minute, which pays in runs of 15 minutes and more"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of any kind: a compiler is missing, or too old, or cannot write
        return False, f"it fails here ({' '.join(str(error).split()):.90})"
    return True, "it fuses what lies between the matrix products"


def set_up(device, threads, deterministic):
    """Threads, TF32, determinism. Returns the context that chooses the kernels of attention."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # on GPUs TF32 for what is float32
    torch.use_deterministic_algorithms(deterministic)
    if device != "cuda":
        return nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if torch.cuda.get_device_capability() >= (9, 0) and not deterministic:  # Hopper and later
        kernels.insert(0, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(kernels, set_priority=True)


@cache  # so that all shares are of one number
def gemm_rate(device, dtype):
    """FLOPs a second of a large matrix product: the most that this device gives, which MFU is a share of."""
    n, rates = {"cuda": 8192, "mps": 2048}.get(device, 1024), []
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(4):
            b = a @ a
        b[0, 0].item()  # waits for the device
        rates.append(4 * 2 * n**3 / (time.perf_counter() - start))
    return max(rates)


def memory_of(device):
    """Bytes of the GPU; elsewhere 8 GB, which a computer has."""
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 2**33


def peak_memory(device):
    """Bytes that were in use at most so far: of the GPU, else of the process; 0 where nobody tells."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training_memory(shape, run, learning=None):
    """{what: bytes} that a process takes, estimated: weights, gradients, optimizers' moments, activations.

    learning: how many parameters AdamW trains, all or those of a LoRA update; None: all, most with Muon.
    Activations are what the backward pass of a block wants to see again: in float32 the stream before and
    behind each norm, q, k, v and the result of attention; then the inputs of all matrices.
    """
    C, Q, KV = shape.n_embd, shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    width = 2 if run.dtype == "bfloat16" else 4  # bytes of a number that goes into a matrix product
    block = 16 * C + 8 * (Q + KV) + width * (2 * C + Q + 4 * shape.n_hidden)
    n, matrices = shape.num_params(), shape.n_layer * (2 * C * (Q + KV) + 3 * C * shape.n_hidden)
    activations = shape.n_layer * run.micro_batch * run.block_size * block
    sizes = dict(weights=4 * n, gradients=4 * n, moments=8 * n - 4 * matrices)  # Muon keeps one, AdamW two
    if learning:
        beside = 4 * learning if learning < n else 0  # an update is no part of the n
        sizes = dict(weights=4 * n + beside, gradients=4 * learning, moments=8 * learning)
    sharded = {name: size // processes()[1] for name, size in sizes.items()}
    return sharded | dict(activations=activations)


def fit_micro_batch(shape, run, device, learning=None):
    """The most blocks at a time that fit into 80 % of the memory and share out evenly, 1 at least."""
    n = run.batch_size // processes()[1]
    for k in (k for k in range(n, 0, -1) if n % k == 0):
        needed = sum(training_memory(shape, replace(run, micro_batch=k), learning).values())
        if needed < 0.8 * memory_of(device):
            break
    return int(over_processes(k, dist.ReduceOp.MIN))  # all processes must take turns alike


@contextmanager
def explain_memory(shape, run):
    """When memory runs out inside, a ValueError says which settings to change and what they would need."""

    def needs(run):
        return f"about {sum(training_memory(shape, run).values()) / 1e9:.1f} GB"

    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        fewer, shorter = (
            replace(run, micro_batch=run.micro_batch // 2),
            replace(run, block_size=run.block_size // 2),
        )
        options = [f"--block-size {shorter.block_size} needs {needs(shorter)}"]
        options.append("a smaller --preset less" if run.preset else "--lora-rank 8 less")
        if fewer.micro_batch:
            options.insert(0, f"--batch-size {fewer.micro_batch * processes()[1]} needs {needs(fewer)}")
        why = f"out of memory: this run was thought to need {needs(run)}"
        raise ValueError(f"{why}; {', '.join(options)}") from None


def forget(device):
    """Free what is no longer used, so that the peak of memory is that of what comes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- several processes, which torchrun starts ---


def join_processes(device):
    """Under torchrun, join the other processes, each on a GPU of its own. Only the first one speaks."""
    if "RANK" in os.environ:
        if device == "cuda":
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


def start(device=None, deterministic=False):
    """Join the other processes, if there are any. Returns the device of this one."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    join_processes(device or choose_device())
    return choose_device(device)


def explain_lost_processes(error):
    """End with one line if a RuntimeError means that another process has gone; else raise it."""
    if not isinstance(error, dist.DistError) and not re.search("onnection|imed out", str(error)):
        raise error
    reason = f"{str(error).splitlines()[0]:.100}"
    print(f"error: the processes lost each other, so this one ends, too: {reason}", file=sys.stderr)
    sys.exit(2)


def processes():
    """(rank, number) of this process among those that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_processes(value, operation=dist.ReduceOp.SUM):
    """The sum (or so) of a number or tensor over all processes, on the host: nothing waits for the device."""
    if processes()[1] == 1:
        return value
    result = torch.as_tensor(value, dtype=torch.float64).clone()
    dist.all_reduce(result, operation)
    return result if isinstance(value, torch.Tensor) else result.item()


def distribute(model, run, device):
    """Compile a model and share it out between the processes, as the run wants it."""
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
    return model
