"""The measurements behind the numbers in the README. Nothing here passes or fails.

python tests/bench.py lzma                      what a general compressor makes of the validation text
python tests/bench.py prepare                   peak memory of data/prepare.py on 50 MB and on 500 MB
python tests/bench.py tokenizer                 learning and applying a vocabulary, against other libraries
python tests/bench.py model                     time and memory of the loss and of opening a folder
python tests/bench.py train --peer DIR          a training step against transformers; a run against nanoGPT
python tests/bench.py curve                     what bits per byte are usual after so many tokens
python tests/bench.py budget                    are --minutes kept while other programs run, and at what cost?
python tests/bench.py sample --peer BINARY      decoding against transformers and llama2.c
python tests/bench.py resume                    20 runs, killed at random moments: do they end alike?
python tests/bench.py exit                      two processes, 20 times: do they end cleanly?
python tests/bench.py ladder                    from a GPT-2 to train.py, idea by idea, in equal time
python tests/bench.py speedrun --base DIR       does this folder learn more than another version of it?
python tests/bench.py peft --model DIR          ways of fine-tuning: what they learn and forget
python tests/bench.py xray                      the forward pass in a page of tests/lessons/xray.py, with node
python tests/bench.py gpu                       what needs a GPU
"""

import argparse
import csv
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lessons import xray  # noqa: E402

import finetune  # noqa: E402
import train  # noqa: E402
from data.loader import IGNORED, Blocks, find_data, load_data  # noqa: E402
from data.prepare import DATA, prepare  # noqa: E402
from model import PRESETS, Config, Transformer, config_from_json, fast_dtype, matmul_rate  # noqa: E402
from sample import generate, pack  # noqa: E402
from tokenizer import GPT4_PATTERN, SPECIAL_TOKENS, Tokenizer  # noqa: E402

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, in which ru_maxrss counts


# --- programs of ours, each in a process of its own ---


def script(name, *options):
    """The command line of a script of ours."""
    return [sys.executable, str(ROOT / name), *map(str, options)]


def run_job(*arguments):
    """Run this file with these arguments; what it prints last, as JSON."""
    program = script("tests/bench.py", *arguments)
    one_thread = os.environ | {"RAYON_NUM_THREADS": "1"}  # of the libraries written in Rust
    result = subprocess.run(program, check=True, capture_output=True, text=True, env=one_thread)
    return json.loads(result.stdout.splitlines()[-1])


def prepare_quietly(*arguments, **settings):
    """data.prepare.prepare, without what it prints."""
    with redirect_stdout(io.StringIO()):
        return prepare(*arguments, **settings)


@contextmanager
def tiny_data():
    """Yields the name of a tiny text that is prepared under data/ and removed afterwards."""
    name = f"bench-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        text = "".join(f"the cat sat on mat {i} and the dog\n" for i in range(1000))
        path.write_text(text, encoding="utf-8")
        prepare_quietly([str(path)], name, tokenizer=Tokenizer.train([text], 320))
    try:
        yield name
    finally:
        shutil.rmtree(DATA / name)


def read_log(out):
    """The rows of a run's log.csv, as dicts."""
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tiny_shakespeare():
    """The path of Tiny Shakespeare."""
    if "TINY_SHAKESPEARE" not in os.environ:
        sys.exit("error: put the path of Tiny Shakespeare into the variable TINY_SHAKESPEARE")
    return os.environ["TINY_SHAKESPEARE"]


# --- data ---


def bench_lzma(args):
    """Bits per byte that LZMA needs for the validation text, as a yardstick for those of a model."""
    data = load_data(find_data(args.data))
    texts = []
    for tokens in (data.train, data.val):
        text = data.tokenizer.decode_bytes(tokens.tolist())
        texts.append(text.replace(SPECIAL_TOKENS[0].encode(), b""))
    train_text, val_text = texts
    both = train_text + val_text
    window = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": len(both)}]

    def compressed(text):
        return len(lzma.compress(text, filters=window))

    n = len(val_text)
    print(f"{args.data}: {n:,} bytes of validation text, {len(train_text):,} bytes of training text")
    given_train = compressed(both) - compressed(train_text)
    print(f"LZMA, given the training text: {8 * given_train / n:.3f} bits per byte")
    print(f"LZMA, without it:              {8 * compressed(val_text) / n:.3f} bits per byte")


def write_distinct_text(folder, megabytes):
    """Files of 1 MB with random sentences, no two alike."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20000)]
    folder.mkdir()
    for i in range(megabytes):
        text = " ".join(rng.choices(words, k=155000))
        (folder / f"{i:04}.txt").write_text(text.replace(" a", ".\nA")[: 2**20], encoding="utf-8")


# A program that runs its arguments and prints the most memory that they held at once.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def bench_prepare(args):
    """Peak memory and speed of preparing a small and a large corpus with a given vocabulary."""
    peaks = []
    with tempfile.TemporaryDirectory() as work:
        vocabulary = Path(work) / "tokenizer.json"
        for megabytes in args.megabytes:
            text = Path(work) / f"bench-{megabytes}"
            write_distinct_text(text, megabytes)
            if not vocabulary.exists():
                Tokenizer.train([(text / "0000.txt").read_text(encoding="utf-8")], 4096).save(vocabulary)
            program = script("data/prepare.py", text, "--tokenizer", vocabulary)
            start = time.perf_counter()
            result = subprocess.run([sys.executable, "-c", PEAK, *program], check=True, capture_output=True)
            speed = megabytes / (time.perf_counter() - start)
            shutil.rmtree(DATA / text.name)
            peaks.append(int(result.stdout) * RSS_UNIT / 1e6)
            print(f"{megabytes:5} MB of text: peak memory {peaks[-1]:.0f} MB, {speed:.1f} MB/s", flush=True)
    print(f"peak memory, large to small: {peaks[-1] / peaks[0]:.3f}")


# --- the tokenizer, and those of other libraries ---


def corpus(name, megabytes=200):
    """The documents of a corpus that is on this machine, read as they are needed."""
    if name == "shakespeare":
        paths = [Path(tiny_shakespeare())]
    elif name == "stdlib":
        paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        paths = [path for path in paths if "site-packages" not in path.parts and path.is_file()]
    else:
        suffixes = {".py", ".pyi", ".md", ".rst", ".txt", ".h"}
        paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*"))
        paths = [path for path in paths if path.suffix in suffixes and path.is_file()]
    for path in paths:
        if megabytes <= 0:
            return
        text = path.read_bytes().decode("utf-8", "replace")
        megabytes -= len(text) / 1e6
        yield text


def learn_ours(documents, vocab_size, processes=1):
    """Returns the seconds of its two phases."""
    times = [time.perf_counter()]

    def log(line):
        if line.endswith("different"):  # the last line before the first merge
            times.append(time.perf_counter())

    Tokenizer.train(documents, vocab_size, special_tokens=SPECIAL_TOKENS[:1], processes=processes, log=log)
    return {"split": times[1] - times[0], "merge": time.perf_counter() - times[1]}


def learn_tokenizers(documents, vocab_size):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    split = pre_tokenizers.Split(Regex(GPT4_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)


def learn_rustbpe(documents, vocab_size):
    import rustbpe

    rustbpe.Tokenizer().train_from_iterator(documents, vocab_size - 1, pattern=GPT4_PATTERN)


LEARNERS = {
    "ours": learn_ours,
    "ours, 2 processes": partial(learn_ours, processes=2),
    "tokenizers": learn_tokenizers,
    "rustbpe": learn_rustbpe,
}


def largest_process():
    """The most bytes in use so far, of this process or of its largest child."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return RSS_UNIT * max(resource.getrusage(who).ru_maxrss for who in both)


def learn_once(args):
    """Print the seconds of one learner, and the megabytes above those of the imports here, as JSON."""
    before, start = largest_process(), time.perf_counter()
    phases = LEARNERS[args.job](corpus(args.corpus), args.vocab_size)
    row = {"seconds": time.perf_counter() - start, "MB": (largest_process() - before) / 1e6}
    print(json.dumps(row | (phases or {})))


def compare_learners(name, vocab_size, runs):
    """Run the learners in turn; print medians, and their time against that of `tokenizers`."""
    results = {learner: [] for learner in LEARNERS}
    for _ in range(runs):
        for learner in LEARNERS:
            options = ["--job", learner, "--corpus", name, "--vocab-size", vocab_size]
            results[learner].append(run_job("tokenizer", *options))
    print(f"\n{name}, {vocab_size:,} tokens, median of {runs}")
    print(f"{'':20}{'seconds':>9}{'split':>8}{'merge':>8}{'peak MB':>9}  time, tokenizers = 1")
    for learner, rows in results.items():
        median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        pairs = zip(rows, results["tokenizers"])
        ratio = statistics.median(row["seconds"] / other["seconds"] for row, other in pairs)
        phases = "".join(f"{median[key]:8.2f}" if key in median else f"{'':8}" for key in ("split", "merge"))
        print(f"{learner:20}{median['seconds']:9.2f}{phases}{median['MB']:9.0f}  {ratio:.2f}", flush=True)


def compare_encoders(name, vocab_size):
    """Megabytes per second of one thread."""
    import tokenizers

    texts = list(corpus(name))
    ours = Tokenizer.train(texts, vocab_size)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.document))
    ranks = {token: i for i, token in ours.tokens.items() if i not in ours.special_tokens.values()}
    plain = tiktoken.Encoding("", pat_str=GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    encoders = {"ours": ours.encode, "tiktoken": plain.encode_ordinary, "tokenizers": theirs.encode}
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"\nencoding {name}, {vocab_size:,} tokens, one thread")
    for label, encode in encoders.items():
        speeds = []
        for _ in range(3):
            start = time.perf_counter()
            for text in texts:
                encode(text)
            speeds.append(n_bytes / 1e6 / (time.perf_counter() - start))
        print(f"{label:20}{statistics.median(speeds):9.1f} MB/s", flush=True)


def bench_tokenizer(args):
    """Learning a vocabulary and encoding with it."""
    if args.job:
        learn_once(args)
        return
    os.environ["RAYON_NUM_THREADS"] = "1"
    if "TINY_SHAKESPEARE" in os.environ:
        compare_learners("shakespeare", 4096, args.runs)
    compare_learners("stdlib", 32768, args.runs)
    if args.large:
        compare_learners("packages", 32768, args.runs)
    compare_encoders("stdlib", 32768)


# --- the model ---


def peak_memory(device):
    """The most bytes in use so far, of the GPU or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loss_job(kind):
    """A function that computes the loss of 4,096 tokens over a vocabulary of 50,000, and its gradient."""
    model = Transformer(Config(50000, 1024, n_layer=1, n_head=12, n_kv_head=12, n_embd=768, n_hidden=64))
    ids, targets = torch.randint(50000, (2, 4, 1024))
    weight = model.model.embed_tokens.weight

    def run():
        if kind == "ours":
            loss = model.loss(ids, targets)
        elif kind == "plain":
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        else:
            loss = F.linear_cross_entropy(model.hidden(ids).flatten(0, 1), weight, targets.flatten())
        loss.backward()

    return run


def open_job(folder, dtype):
    """A function that opens a model folder and reads all weights."""

    def run():
        for p in Transformer.load(folder, dtype=dtype).parameters():
            p.sum()

    return run


MODEL_JOBS = {
    "loss, plain": lambda folder: loss_job("plain"),
    "loss, linear_cross_entropy": lambda folder: loss_job("linear_cross_entropy"),
    "loss, ours": lambda folder: loss_job("ours"),
    "open 1 GB": lambda folder: open_job(folder, None),
    "open 1 GB as float32": lambda folder: open_job(folder, torch.float32),
}


def model_once(args):
    """Print the seconds of one job, and the megabytes that it takes above the model's own, as JSON."""
    run = MODEL_JOBS[args.job](args.folder)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the model (Linux)
    before = peak_memory("cpu")
    seconds = []
    for _ in range(1 if args.job.startswith("open") else 3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    megabytes = (peak_memory("cpu") - before) / 1e6
    print(json.dumps({"seconds": statistics.median(seconds), "MB": megabytes}))


def bench_model(args):
    """Time and memory of the loss in three ways, and of opening 1 GB of bfloat16 weights."""
    if args.job:
        model_once(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = dict(n_layer=30, n_head=16, n_kv_head=8, n_embd=1024, n_hidden=4096)
        Transformer(Config(32768, 1024, **shape)).to(torch.bfloat16).save(folder)
        print(f"{'':28}{'seconds':>9}{'peak MB':>9}  median of {args.runs}")
        for job in MODEL_JOBS:
            if "linear_cross_entropy" in job and not hasattr(F, "linear_cross_entropy"):
                continue
            rows = [run_job("model", "--job", job, "--folder", folder) for _ in range(args.runs)]
            seconds = statistics.median(row["seconds"] for row in rows)
            megabytes = statistics.median(row["MB"] for row in rows)
            print(f"{job:28}{seconds:9.2f}{megabytes:9.0f}", flush=True)


# --- training ---


def make_settings(rows, T, dtype, device="cpu", micro_batch=None):
    """train.Settings of single steps: rows blocks of T tokens."""
    return train.Settings(
        seed=0,
        block_size=T,
        batch_size=rows,
        micro_batch=micro_batch or rows,
        lr=0.03,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        processes=1,
        deterministic=False,
        minutes=None,
        steps=1000,
        fall=400,
        n_evals=10,
        save_every=None,
    )


def in_turn(jobs, rounds=15, warm_up=3):
    """{name: median seconds} of functions that are called one after the other, round after round."""
    times = {name: [] for name in jobs}
    for i in range(rounds + warm_up):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def llama_of_transformers(config):
    """The peer of a Transformer: transformers' Llama of the same shape."""
    import transformers

    shape = dict(vocab_size=config.vocab_size, tie_word_embeddings=True, use_cache=False)
    shape.update(hidden_size=config.n_embd, intermediate_size=config.n_hidden, head_dim=config.head_dim)
    shape.update(num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head)
    shape.update(num_hidden_layers=config.n_layer)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def compare_steps(dtype, rounds, vocab_size=4096, rows=16, T=128):
    """Forward and backward of the nano shape against transformers, and the optimizers, in turn."""
    config, settings = Config(vocab_size, T, **PRESETS["nano"]), make_settings(rows, T, dtype)
    ours, theirs = Transformer(config), llama_of_transformers(config)
    compiled = torch.compile(ours.loss, dynamic=False)
    muon, adamw = train.make_optimizers(ours, 0.001, 0.1, dtype)
    matrices = [p for group in muon.param_groups for p in group["params"]]
    pytorch_muon = torch.optim.Muon(matrices, lr=0.001)
    ids = torch.randint(vocab_size, (rows, T + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def forward_backward(model, loss):
        model.zero_grad()
        with train.autocast(settings):
            value = loss()
        value.backward()

    models = {
        "transformers": lambda: forward_backward(theirs, lambda: theirs(input_ids=x, labels=x).loss),
        "ours": lambda: forward_backward(ours, lambda: ours.loss(x, y)),
        "ours, compiled": lambda: forward_backward(ours, lambda: compiled(x, y)),
    }
    steps = {"Muon": muon.step, "torch.optim.Muon": pytorch_muon.step, "AdamW": adamw.step}
    times = in_turn(models | steps, rounds)
    flops = 3 * x.numel() * config.flops_per_token(T)
    peak, peak32 = matmul_rate("cpu", dtype), matmul_rate("cpu", torch.float32)
    print(f"\nnano, {rows} x {T} tokens, {settings.dtype}: milliseconds, median of {rounds} in turn")
    for name, seconds in times.items():
        share = ""
        if name in models:
            rate = flops / seconds
            share = f"{rate / peak:.0%} of a large product's rate, {rate / peak32:.0%} of that in float32"
        print(f"{name:20}{1000 * seconds:8.1f}  {share}")
    optimizers = times["Muon"] + times["AdamW"]
    print(f"ours / transformers {times['ours'] / times['transformers']:.2f}", end=", ")
    print(f"optimizers {optimizers / (times['ours'] + optimizers):.1%} of a step", flush=True)


def run_nanogpt(peer, text, threads):
    """(seconds, bits per byte) of nanoGPT's own recipe for Tiny Shakespeare on a CPU."""
    data = Path(peer) / "data/shakespeare_char"
    vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([vocabulary[character] for character in text], dtype=np.uint16)
    n = int(0.9 * len(ids))
    ids[:n].tofile(data / "train.bin")
    ids[n:].tofile(data / "val.bin")
    meta = {"vocab_size": len(vocabulary), "stoi": vocabulary, "itos": {i: c for c, i in vocabulary.items()}}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    recipe = "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12"
    recipe += " --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    program = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *recipe.split()]
    place = dict(cwd=peer, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, text=True)
    process = subprocess.Popen(program, stdout=subprocess.PIPE, **place)
    times = [time.perf_counter() for line in process.stdout if line.startswith(("step 0:", "step 2000:"))]
    evaluation = [*program, "--init_from=resume", "--eval_only=True", "--eval_iters=500"]
    printed = subprocess.run(evaluation, check=True, capture_output=True, **place).stdout
    loss = float(printed.split("val loss ")[1].split()[0])
    return times[-1] - times[0], loss / np.log(2)


def run_ours(name, minutes, threads):
    """(seconds, bits per byte) of train.py."""
    with tempfile.TemporaryDirectory() as out:
        program = script("train.py", "--data", name, "--minutes", minutes, "--out", out, "--device", "cpu")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL, env=environment)
        last = read_log(Path(out))[-1]
    return float(last["seconds"]), float(last["val_bpb"])


def bench_train(args):
    """The parts of a step; with a peer, nanoGPT and train.py on the same text, in turn."""
    torch.set_num_threads(args.threads)
    for dtype in dict.fromkeys((torch.float32, fast_dtype("cpu"))):
        compare_steps(dtype, args.rounds)
    if not args.peer:
        return
    source = Path(tiny_shakespeare())
    prepare_quietly([str(source)], name="bench-shakespeare")
    try:
        for run in range(args.runs):
            seconds, bpb = run_nanogpt(args.peer, source.read_text(encoding="utf-8"), args.threads)
            print(f"\nrun {run + 1}, {args.threads} threads")
            print(f"nanoGPT  {seconds:6.1f} s  {bpb:.3f} bpb", flush=True)
            for part in (6, 10):
                used, bpb = run_ours("bench-shakespeare", seconds / part / 60, args.threads)
                print(f"1/{part:<6} {used:6.1f} s  {bpb:.3f} bpb", flush=True)
    finally:
        shutil.rmtree(DATA / "bench-shakespeare")


# --- what is usual ---


def bench_curve(args):
    """What train.py compares a run with (USUAL): runs of the default data, of different lengths."""
    for preset in args.presets:
        shape = ["--preset", preset, "--block-size", 256, "--batch-size", 8, "--lr", 0.02]
        curves = {"constant": {}, "end": {}}
        for steps in args.steps:
            with tempfile.TemporaryDirectory() as out:
                program = script("train.py", *shape, "--steps", steps, "--out", out)
                subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
                rows = [row for row in read_log(Path(out)) if row["val_bpb"]]
            for row in rows:
                millions, bpb = round(int(row["tokens"]) / 1e6, 2), round(float(row["val_bpb"]), 2)
                if train.WARMUP < int(row["step"]) <= 0.4 * steps:
                    curves["constant"][millions] = bpb
                elif int(row["step"]) == steps:
                    curves["end"][millions] = bpb
        curves = {kind: dict(sorted(curve.items())) for kind, curve in curves.items()}
        print(f'    "{preset}": {curves},', flush=True)


# --- the budget of --minutes, beside other programs ---

WAYS = ("alone", "beside others for 10 s", "beside others throughout")


# A program that keeps a core busy as long as its parent lives.
SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6):
        pass
"""


def start_spinners(n=2):
    """Processes that keep a core busy each."""
    return [subprocess.Popen([sys.executable, "-c", SPIN, str(os.getpid())]) for _ in range(n)]


def stop(processes):
    """Kill processes and wait for their end."""
    for process in processes:
        process.kill()
        process.wait()


def run_beside(way, args, out):
    """One run of train.py in one of WAYS, measured, as a dict."""
    spinners = [] if way == "alone" else start_spinners()
    program = script("train.py", "--data", args.data, "--minutes", args.minutes, "--out", out)
    began = time.perf_counter()
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    try:
        while not (out / "log.csv").exists() and process.poll() is None:  # the budget begins after that
            time.sleep(0.01)
        first_step = time.perf_counter()
        if way == "beside others for 10 s":
            while time.perf_counter() < first_step + 10 and process.poll() is None:
                time.sleep(0.01)
            stop(spinners)
        process.wait()
        end = time.perf_counter()
    finally:
        stop([process, *spinners])
    if process.returncode:
        sys.exit(f"error: train.py ended with {process.returncode}")
    last = read_log(out)[-1]
    return {
        "preset": torch.load(out / train.STATE, weights_only=True, mmap=True)["settings"]["preset"],
        "steps": int(last["step"]),
        "bpb": float(last["val_bpb"]),
        "log.csv": float(last["seconds"]) / 60,
        "used": (end - first_step) / 60,
        "process": (end - began) / 60,
    }


def bench_budget(args):
    """Runs of train.py alone, beside two busy processes at its beginning, and beside them throughout."""
    results = {way: [] for way in WAYS}
    heads = f"{'log.csv':>9}{'used':>9}{'process':>9}{'steps':>8}{'bpb':>8}"
    print(f"train.py --data {args.data} --minutes {args.minutes:g}: minutes that log.csv says (without the")
    print("last evaluation), that were used from the first step on, and those of the whole process\n")
    print(f"{'':34}{heads}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for run in range(args.runs):
            for k, way in enumerate(WAYS):
                row = run_beside(way, args, Path(work) / f"{run}-{k}")
                minutes = f"{row['log.csv']:9.2f}{row['used']:9.2f}{row['process']:9.2f}"
                result = f"{minutes}{row['steps']:8,}{row['bpb']:8.4f}"
                print(f"{run + 1:3} {way:25}{row['preset']:5}{result}", flush=True)
                results[way].append(row)
    print(f"\n{f'median of {args.runs}; minutes / budget':34}{heads}  bpb - that of {WAYS[0]}")
    undisturbed = statistics.median(row["bpb"] for row in results[WAYS[0]])
    for way, rows in results.items():
        median = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "preset"}
        ratios = "".join(f"{median[name] / args.minutes:9.2f}" for name in ("log.csv", "used", "process"))
        result = f"{ratios}{median['steps']:8,.0f}{median['bpb']:8.4f}"
        print(f"{way:34}{result}  {median['bpb'] - undisturbed:+.4f}")


# --- kills ---

MEASURED = ("seconds", "tokens_per_second", "mfu")  # columns of log.csv


def ending(out):
    """{file: content} of what a run leaves behind, without what measures time, speed and memory."""
    found = {}
    for name in ("model.safetensors", "best/model.safetensors", "samples.txt"):
        found[name] = (out / name).read_bytes()
    found["log.csv"] = [{k: v for k, v in row.items() if k not in MEASURED} for row in read_log(out)]
    state = train.read_state(out)
    found[train.STATE] = {k: v for k, v in state.items() if k not in ("seconds", "lengths")}
    return found


def equal(one, other):
    """Whether two nested values are equal, their tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def start_run(program):
    """Start train.py and wait until it has read the data: what it does next is to make or lock its folder."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    process = subprocess.Popen(program, **pipes)
    for line in process.stdout:
        if line.startswith("data "):
            break
    return process


def is_saving(out):
    """Whether a run is, or was when it was killed, in the middle of a save."""
    places = (f"{train.STATE}.unfinished", ".unfinished", "best/.unfinished")
    return any((out / place).exists() for place in places)


def kill_and_resume(options, out, kills):
    """Train in `out`, killed and resumed again and again, then let it come to its end.

    kills: a list of (seconds, whether to wait from then on for a save, seconds after its beginning).
    Returns what happened, and whether the run came to its end.
    """
    begin, resume = script("train.py", *options, "--out", out), script("train.py", "--resume", "--out", out)
    program, kills, story = begin, list(kills), []
    while True:
        process = start_run(program)
        moment, in_save, later = kills.pop(0) if kills else (None, False, 0)
        start = time.perf_counter()
        try:
            _, errors = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            if in_save:
                while not is_saving(out) and process.poll() is None:
                    time.sleep(0.0005)
                time.sleep(later)
            process.kill()
            _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            saving = " while saving" if is_saving(out) else ""
            story.append(f"killed after {time.perf_counter() - start:.2f} s{saving}")
            program = resume
        elif process.returncode == 0:
            return "; ".join(story), True
        elif "nothing to resume" in errors and program == resume:
            story.append("nothing was saved, so it began anew")
            program = begin
        else:
            story.append(f"FAILED: {errors.strip()}")
            return "; ".join(story), False


def compare_killed_runs(options, runs, kills, seed):
    """Runs that are killed at random moments against one that is not; prints how many end alike."""
    rng, same = random.Random(seed), 0
    with tiny_data() as data, tempfile.TemporaryDirectory() as work:
        options = ["--data", data, *options]
        reference = Path(work) / "reference"
        process = start_run(script("train.py", *options, "--out", reference))
        start = time.perf_counter()
        _, errors = process.communicate()
        span = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"error: train.py ended with {process.returncode}: {errors}")
        print(f"undisturbed, the run takes {span:.1f} s", flush=True)
        expected = ending(reference)
        for run in range(1, runs + 1):
            out, story = Path(work) / str(run), ""
            while not story:  # one that came to its end before it was killed does not count
                shutil.rmtree(out, ignore_errors=True)
                moments = []
                for _ in range(kills):
                    moments.append((rng.uniform(0, span), rng.random() < 0.5, rng.uniform(0, 0.05)))
                story, ended = kill_and_resume(options, out, moments)
            result = ""
            if ended:
                found = ending(out)
                different = [name for name in expected if not equal(found[name], expected[name])]
                result = f"DIFFERENT: {', '.join(different)}" if different else "equal"
                same += not different
            print(f"{run:3}: {story}; {result}", flush=True)
            for folder in Path(work).glob(f"{run}*"):
                shutil.rmtree(folder)
    print(f"{same} of {runs} killed runs ended with equal weights, optimizers, samples and log", flush=True)


def bench_resume(args):
    """Kill runs of train.py at random moments, resume them, compare their ends with an undisturbed run's."""
    options = ["--device", "cpu", "--steps", args.steps, "--block-size", 64, "--batch-size", 4]
    options += ["--dropout", 0.1, "--evals", 5, "--save-every", 2]
    compare_killed_runs(options, args.runs, args.kills, args.seed)


# --- the end of several processes ---


def ends_cleanly(program, limit=180):
    """Whether a program ends by itself, with status 0, and writes nothing to stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # else torchrun says on stderr that it sets this
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    process = subprocess.Popen(program, **pipes)
    hangs = False
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        hangs = True
        process.terminate()  # torchrun then ends its processes
        _, errors = process.communicate()
    if process.returncode == 0 and not errors.strip() and not hangs:
        return True
    ended = f"did not end within {limit} s" if hangs else f"ended with {process.returncode}"
    print(f"{Path(program[-1]).name} {ended}, and on stderr stands: {errors[-2000:]}", flush=True)
    return False


def make_exit_options(data, work):
    """Options for a few steps of train.py and of finetune.py, for which a base model is trained."""
    common = ["--device", "cpu", "--batch-size", 4, "--steps", 6, "--evals", 2]
    pretrain = [*common, "--data", data, "--block-size", 64]
    base, examples = work / "base", work / "chat.jsonl"
    subprocess.run(script("train.py", *pretrain, "--out", base), check=True, stdout=subprocess.DEVNULL)
    with open(examples, "w", encoding="utf-8") as file:
        for i in range(48):
            file.write(json.dumps({"prompt": f"say cat {i}", "completion": "cat"}) + "\n")
    finetune = [*common, "--model", base, "--examples", examples]
    return {"train.py": pretrain, "finetune.py": finetune}


def bench_exit(args):
    """Two gloo processes run each script to its end, again and again; counts the clean ends."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tiny_data() as data, tempfile.TemporaryDirectory() as work:
        for name, options in make_exit_options(data, Path(work)).items():
            clean, start = 0, time.perf_counter()
            for run in range(args.runs):
                out = Path(work) / f"{name}-{run}"
                clean += ends_cleanly([*torchrun, *script(name, *options, "--out", out)[1:]])
                shutil.rmtree(out, ignore_errors=True)
            seconds = (time.perf_counter() - start) / args.runs
            print(f"{name}: {clean} of {args.runs} ended cleanly, {seconds:.1f} s each", flush=True)


# --- what each idea buys ---


class LearnedPositions(Transformer):
    """A vector for each position, added to the embedding, instead of a rotation of q and k."""

    def __init__(self, config):
        super().__init__(config)
        self.positions = nn.Parameter(0.02 * torch.randn(config.block_size, config.n_embd))

    def hidden(self, ids, cache=None):
        x = self.model.embed_tokens(ids) + self.positions[: ids.size(1)]
        cos = torch.ones(ids.size(1), self.config.head_dim // 2, device=x.device)
        for block in self.model.layers:
            x = block(x, cos, torch.zeros_like(cos))  # a rotation by nothing
        return self.model.norm(x)


class GeluMLP(nn.Module):
    """GPT-2's: down(gelu(up(x))), four times as wide inside."""

    def __init__(self, width):
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)
        nn.init.normal_(self.up_proj.weight, std=0.5 / width**0.5)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


def older_model(config, ideas):
    """The Transformer without those of "rope", "rmsnorm" and "swiglu" that are not among `ideas`."""
    model = Transformer(config) if "rope" in ideas else LearnedPositions(config)
    width = config.n_embd
    if "swiglu" not in ideas:
        for block in model.model.layers:
            block.mlp = GeluMLP(width)
    if "rmsnorm" not in ideas:
        for block in model.model.layers:
            block.input_layernorm = nn.LayerNorm(width, bias=False)
            block.post_attention_layernorm = nn.LayerNorm(width, bias=False)
        model.model.norm = nn.LayerNorm(width, bias=False)
    return model


def plain_adamw(model):
    """nanoGPT's optimizer for small models on a CPU."""
    settings = dict(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    optimizer.param_groups[0]["initial_lr"] = 1e-3  # which training_step multiplies
    return [optimizer]


def as_usual(muon, adamw):
    """Muon with a larger rate and momentum and less weight decay, AdamW at a tenth of that rate."""
    for group in muon.param_groups:
        group.update(initial_lr=1.5 * group["initial_lr"], momentum=0.95, weight_decay=0.1)
    for group in adamw.param_groups:
        group["initial_lr"] *= 0.5


RUNGS = {  # name -> the idea that it adds
    "GPT-2's block, AdamW, bytes, 12 x 64": None,
    "+ RoPE": "rope",
    "+ RMSNorm": "rmsnorm",
    "+ SwiGLU": "swiglu",
    "+ Muon": "muon",
    "+ BPE, 1,024 tokens": "bpe",
    "+ products in the fastest dtype": "dtype",
    "+ 16 x 128 tokens": "batch",
    "+ constant rate, then linear to zero": "schedule",
    "+ other rates, momentum and weight decay": "rates",
    "+ blocks of 64, then of 256": "lengths",
}


def climb(ideas, data, seconds, seed):
    """Train with these ideas for that time. Returns steps, tokens and bits per byte."""
    rows, T = 12, 64
    if "batch" in ideas:
        rows, T = (16, 64) if seconds < 60 else (16, 128)
    if "lengths" in ideas and seconds >= 60:
        rows, T = 8, 256
    dtype = fast_dtype("cpu") if "dtype" in ideas else torch.float32
    settings = make_settings(rows, T, dtype, micro_batch=1024)
    torch.manual_seed(seed)
    model = older_model(Config(data.tokenizer.vocab_size, T, **PRESETS["nano"]), ideas)
    if "muon" in ideas:
        optimizers = train.make_optimizers(model, 0.02, 0.2, dtype)
        if "rates" not in ideas:
            as_usual(*optimizers)
    else:
        optimizers = plain_adamw(model)
    objective, blocks = train.NextTokenLoss(model), Blocks(data.train, T, seed)
    short_blocks = Blocks(data.train, min(T, train.SHORT_BLOCK), seed)
    start, step, done = time.perf_counter(), 0, 0.0
    while done < 1:  # the schedules go by time
        if "schedule" in ideas:
            fall = (1 - done) / 0.6
        else:
            fall = 0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2
        rate = min(1, max(done, 0.001) / 0.05, fall)
        batch = blocks.batch(step, rows)
        if "lengths" in ideas and done < train.SHORT_SHARE:
            batch = short_blocks.batch(step, rows * T // short_blocks.block_size)
        train.training_step(objective, optimizers, batch, rows * T, rate, settings)
        step += 1
        done = (time.perf_counter() - start) / seconds
    bpb = train.bits_per_byte(model, data.val, data.tokenizer.bytes_per_token)
    return step, step * rows * T, bpb


def bench_ladder(args):
    """The table of the README: equal time and seeds, one idea more on every rung."""
    text = tiny_shakespeare()
    results = {name: [] for name in RUNGS}
    try:
        as_bytes = load_data(prepare_quietly([text], "bench-bytes", 256 + len(SPECIAL_TOKENS)))
        as_bpe = load_data(prepare_quietly([text], "bench-bpe"))
        for seed in range(args.runs):  # in turn, so that a slow hour of the machine meets all
            ideas = set()
            for name, added in RUNGS.items():
                ideas.add(added)
                data = as_bpe if "bpe" in ideas else as_bytes
                results[name].append(climb(ideas, data, args.seconds, seed))
    finally:
        for name in ("bench-bytes", "bench-bpe"):
            shutil.rmtree(DATA / name, ignore_errors=True)
    print(f"| {args.seconds:g} s each, median of {args.runs} | steps | tokens | bits per byte |")
    print("|---|---|---|---|")
    for name, runs in results.items():
        steps, tokens, bpb = (statistics.median(values) for values in zip(*runs))
        print(f"| {name} | {steps:,.0f} | {tokens / 1e6:.2f} M | {bpb:.3f} |")


# --- does a change learn more? ---


def copy_data(name, hold_out, folder):
    """Copy prepared data into a folder; without hold_out, it becomes the last tenth of the training text."""
    if name == "shakespeare" and "TINY_SHAKESPEARE" in os.environ:
        shutil.move(prepare_quietly([tiny_shakespeare()], name=f"speedrun-text-{os.getpid()}"), folder)
    else:
        shutil.copytree(find_data(name), folder)
    if hold_out:
        return
    ids = np.array(load_data(folder).train)
    n = int(0.9 * len(ids))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for split, part in (("train", ids[:n]), ("val", ids[n:])):
        part.tofile(folder / f"{split}.bin")
        meta["tokens"][split] = len(part)
        meta["fingerprint"][split] = hashlib.blake2b(part.tobytes(), digest_size=16).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def run_version(version, data, budget, seed, options):
    """(steps, bits per byte) of one run of train.py in a folder with some version of it."""
    with tempfile.TemporaryDirectory() as out:
        program = [sys.executable, "train.py", "--data", data.name, "--seed", seed, "--out", out]
        program = map(str, [*program, *budget, *options])
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL, cwd=version)
        model = Transformer.load(out)
        steps = int(read_log(Path(out))[-1]["step"])
    return steps, train.bits_per_byte(model, data.val, data.tokenizer.bytes_per_token)


def bench_speedrun(args):
    """Runs of two versions of train.py in turn: means, spreads and the paired t-value of the difference."""
    options = {"base": [], "change": shlex.split(args.options)}
    versions = {"base": Path(args.base).resolve(), "change": ROOT}
    budget = ["--steps", args.steps] if args.steps else ["--minutes", args.minutes]
    for name in args.data:
        copies = [version / "data" / f"speedrun-{os.getpid()}" for version in set(versions.values())]
        try:
            for copy in copies:
                copy_data(name, args.hold_out, copy)
            data = load_data(copies[0])
            compare_versions(name, data, versions, budget, options, args.seeds)
        finally:
            for copy in copies:
                shutil.rmtree(copy, ignore_errors=True)


def compare_versions(name, data, versions, budget, options, seeds):
    """Print the runs with each seed as they end, and then what they say together."""
    print(f"\n{name}, {' '.join(map(str, budget))}: bits per byte (steps)")
    print(f"{'seed':8}" + "".join(f"{version:>18}" for version in versions) + "   change - base", flush=True)
    found = {version: [] for version in versions}
    for seed in range(seeds):
        line = f"{seed:<8}"
        for version, folder in versions.items():
            steps, bpb = run_version(folder, data, budget, seed, options[version])
            found[version].append(bpb)
            line += f"{bpb:10.4f} ({steps:,})".rjust(18)
        print(f"{line}{found['change'][-1] - found['base'][-1]:16.4f}", flush=True)
    differences = [change - base for base, change in zip(found["base"], found["change"])]
    columns = [*found.values(), differences]
    print("mean    " + "".join(f"{statistics.mean(column):18.4f}" for column in columns))
    if seeds > 1:
        print("spread  " + "".join(f"{statistics.stdev(column):18.4f}" for column in columns))
        t = statistics.mean(differences) / (statistics.stdev(differences) / seeds**0.5)
        print(f"paired t-value of the difference: {t:.1f}", flush=True)


# --- decoding ---

SHAPES = {  # two of llama2.c's, and one for GPUs
    "15 M": dict(n_layer=6, n_head=6, n_kv_head=6, n_embd=288, n_hidden=768),
    "110 M": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_hidden=2048),
    "1 B": dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192),
}


def random_model(shape):
    """A model with a vocabulary of 32,000 and random weights."""
    model = Transformer(Config(32000, 1024, **SHAPES[shape]))
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model.eval()


def our_decoder(folder, dtype):
    """A function (prompts, n) that makes n greedy tokens for each prompt."""
    model = pack(Transformer.load(folder, dtype=dtype))

    def run(prompts, n):
        for _ in generate(model, prompts, max_new_tokens=n, temperature=0):
            pass

    return run


def their_decoder(folder, dtype):
    """The same with transformers."""
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def run(prompts, n):
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = dict(min_new_tokens=n, max_new_tokens=n, do_sample=False, pad_token_id=0)
        model.generate(ids, attention_mask=mask, **settings)

    return run


def read_bandwidth(device):
    """Bytes per second that come from memory: in a sum on a CPU, in a copy (read and written) on a GPU."""
    x, seconds = torch.ones(2**27, device=device), []
    y, n_bytes = torch.empty_like(x), x.nbytes if device == "cpu" else 2 * x.nbytes
    for _ in range(5):
        start = time.perf_counter()
        if device == "cpu":
            x.sum().item()
        else:
            y.copy_(x)[0].item()
        seconds.append(time.perf_counter() - start)
    return n_bytes / statistics.median(seconds)


def write_llama2c(folder, path):
    """A model as llama2.c's run.c reads it (but for the order of the channels of q and k)."""
    model = Transformer.load(folder)
    c, layers = model.config, model.model.layers
    head = [c.n_embd, c.n_hidden, c.n_layer, c.n_head, c.n_kv_head, c.vocab_size, c.block_size]
    modules = [model.model.embed_tokens, *(block.input_layernorm for block in layers)]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        modules += [getattr(block.self_attn, name) for block in layers]
    modules += [block.post_attention_layernorm for block in layers]
    for name in ("gate_proj", "down_proj", "up_proj"):
        modules += [getattr(block.mlp, name) for block in layers]
    modules.append(model.model.norm)
    with open(path, "wb") as file:
        file.write(np.array(head, dtype=np.int32).tobytes())
        for module in modules:
            file.write(module.weight.detach().numpy().tobytes())
        file.write(np.zeros(c.block_size * c.head_dim, dtype=np.float32).tobytes())  # not used any more


def llama2c_speed(binary, path, n):
    """Tokens per second of run.c, as it reports them."""
    program = [binary, path, "-z", Path(binary).parent / "tokenizer.bin", "-t", "0", "-n", str(n)]
    output = subprocess.run(program, check=True, capture_output=True).stderr.decode("utf-8", "replace")
    return float(output.split("achieved tok/s:")[1].split()[0])


def compare_streams(shape, folder, jobs, bandwidth, args):
    """Tokens per second of each contestant that continues one token."""
    speeds, path = {label: [] for label in jobs}, Path(folder) / "llama2c.bin"
    if args.peer:
        write_llama2c(folder, path)
        speeds["llama2.c"] = []
    n_params = config_from_json(json.loads(Path(folder, "config.json").read_bytes())).num_params()
    for _ in range(args.runs):
        for label, run in jobs.items():
            start = time.perf_counter()
            run([[1]], args.tokens)
            speeds[label].append(args.tokens / (time.perf_counter() - start))
        if args.peer:
            speeds["llama2.c"].append(llama2c_speed(args.peer, path, args.tokens))
    print(f"\n{shape}, one stream, {args.tokens} tokens: tokens/s")
    for label, values in speeds.items():
        speed = statistics.median(values)
        ratio = speed / statistics.median(speeds["transformers"])
        share = speed * n_params * (2 if "bfloat16" in label else 4) / bandwidth
        print(f"{label:24}{speed:8.1f} {ratio:6.2f} x transformers {share:5.0%} of the bandwidth", flush=True)


def compare_batches(shape, jobs, args):
    """Tokens per second of all rows together, of prompts of equal and of different lengths."""
    n = 32
    print(f"\n{shape}, batches, float32: tokens/s of all rows", flush=True)
    for rows in args.batches:
        kinds = {"of 32 tokens": [32] * rows, "of 1 to 63": [1 + i * 63 // rows for i in range(rows)]}
        for name, lengths in kinds.items():
            prompts = [[1] * length for length in lengths]
            pair = {label: partial(jobs[label], prompts, n) for label in ("transformers", "ours")}
            times = in_turn(pair, args.runs, warm_up=1)
            theirs, ours = n * rows / times["transformers"], n * rows / times["ours"]
            line = f"{rows:4} {name:14} transformers {theirs:6.0f}, ours {ours:6.0f}"
            print(f"{line}: {ours / theirs:.2f}", flush=True)


def bench_sample(args):
    """One stream and batches against transformers and llama2.c, in turn, on so many threads."""
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth("cpu")
    print(f"{args.threads} thread(s), which read {bandwidth / 1e9:.1f} GB/s; median of {args.runs} in turn")
    for shape in [Path(args.model).name] if args.model else args.shapes:
        with tempfile.TemporaryDirectory() as made:
            folder, jobs = args.model or made, {}
            if not args.model:
                random_model(shape).save(folder)
            for dtype, label in ((torch.float32, ""), (torch.bfloat16, ", bfloat16")):
                if dtype in (torch.float32, fast_dtype("cpu")):
                    jobs["transformers" + label] = their_decoder(folder, dtype)
                    jobs["ours" + label] = our_decoder(folder, dtype)
            compare_streams(shape, folder, jobs, bandwidth, args)
            compare_batches(shape, jobs, args)


# --- on a GPU ---


class GPT2Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), with q, k and v by one matrix."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        parts = self.qkv(self.norm_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in parts)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT2(nn.Module):
    """nanoGPT's model: GPT-2's blocks, without biases."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(GPT2Block(n_embd, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V), with the embedding as head."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.wte.weight)


class PlainLoss(nn.Module):
    """The loss as it is usually computed: all logits at once, then the cross-entropy."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, targets):
        """Like train.NextTokenLoss, but with the sum of all rows instead of each."""
        loss = F.cross_entropy(self.model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
        return loss, loss.detach()[None]


def training_speed(kind, args):
    """(tokens per second, bytes at most) of training steps of one kind."""
    shape, T, V, device = PRESETS[args.preset], args.block_size, 50304, args.device
    settings = make_settings(args.batch_size, T, torch.bfloat16, device, args.micro_batch)
    if kind.startswith("ours"):
        model = Transformer(Config(V, T, **shape)).to(device)
        optimizers = train.make_optimizers(model, 0.01, 0.1, torch.bfloat16)
        objective = train.NextTokenLoss(model)
    else:
        model = GPT2(V, T, shape["n_layer"], shape["n_head"], shape["n_embd"]).to(device)
        optimizers = plain_adamw(model)
        objective = PlainLoss(model)
    if kind.endswith("compiled"):
        objective.compile(dynamic=False)
    ids = torch.randint(V, (args.batch_size, T + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    seconds, warm_up = [], 4
    for _ in range(warm_up + args.steps):
        start = time.perf_counter()
        losses, _ = train.training_step(objective, optimizers, batch, batch[0].numel(), 1.0, settings)
        losses.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return batch[0].numel() / statistics.median(seconds[warm_up:]), peak_memory(device)


def gpu_train(args):
    """Tokens per second, MFU and peak memory of ours and of nanoGPT's model and optimizer."""
    T = args.block_size
    settings = make_settings(args.batch_size, T, torch.bfloat16, args.device)
    peak = train.peak_rate(settings)
    flops = 3 * Config(50304, T, **PRESETS[args.preset]).flops_per_token(T)
    print(f"a large product in bfloat16: {peak / 1e12:.1f} TFLOP/s", flush=True)
    batch = f"{args.batch_size} x {T} tokens, {args.micro_batch} rows at a time"
    print(f"{args.preset}, {batch}: tokens/s, share of that rate, GB at most", flush=True)
    for kind in ("nanoGPT-like, compiled", "ours, compiled", "ours, eager"):
        torch._dynamo.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        speed, memory = training_speed(kind, args)
        print(f"{kind:24}{speed:12,.0f} {speed * flops / peak:6.1%} {memory / 1e9:6.1f}", flush=True)


def gpu_fallback(args):
    """Does train.py go on in eager mode where torch.compile fails, here for want of a C compiler?"""
    with tiny_data() as data, tempfile.TemporaryDirectory() as work:
        options = ["--data", data, "--device", args.device, "--compile", "--steps", 4, "--preset", "nano"]
        options += ["--block-size", 64, "--batch-size", 4, "--out", Path(work) / "out"]
        compilers = dict.fromkeys(("CC", "CXX"), "/bin/false")
        caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), work)
        environment, program = os.environ | compilers | caches, script("train.py", *options)
        result = subprocess.run(program, capture_output=True, text=True, env=environment)
    said = [line for line in result.stdout.splitlines() if "torch.compile" in line] or ["no word of it"]
    print(f"without a C compiler: status {result.returncode}; {said[0]}")
    print(result.stderr[-2000:], end="", flush=True)


def gpu_decode(args):
    """Tokens per second of one greedy stream in bfloat16, against the bandwidth of the memory."""
    bandwidth, warm_up = read_bandwidth(args.device), 20
    print(f"decoding one stream in bfloat16, {bandwidth / 1e9:,.0f} GB/s", flush=True)
    torch._inductor.config.triton.cudagraph_or_error = args.device == "cuda"  # no quiet detour
    for shape in args.shapes:
        model = random_model(shape).to(args.device, torch.bfloat16)
        n_bytes = 2 * model.config.num_params()
        made = {}
        for kind in ("eager", "compiled"):
            ids, begin = [], time.perf_counter()
            for (new,) in generate(model, [[1] * 8], args.tokens, temperature=0, compiled=kind == "compiled"):
                ids.append(new)
                if len(ids) == warm_up:
                    start = time.perf_counter()
            speed = (len(ids) - warm_up) / (time.perf_counter() - start)
            made[kind] = ids
            share = f"{speed * n_bytes / bandwidth:6.1%} of the bandwidth"
            late = f"{start - begin:.1f} s until token {warm_up}"
            print(f"{shape:6} {kind:10}{speed:8,.0f} tokens/s {share}, {late}", flush=True)
        same = sum(a == b for a, b in zip(made["eager"], made["compiled"]))
        print(f"{shape:6} {same} of {args.tokens} tokens are the same (rounding differs)", flush=True)


def gpu_resume(args):
    """Is a killed run exact on this device, with --deterministic?"""
    options = ["--device", args.device, "--deterministic", "--steps", 40, "--preset", "nano"]
    options += ["--block-size", 64, "--batch-size", 8, "--dropout", 0.1, "--evals", 4]
    compare_killed_runs([*options, "--save-every", 2], args.runs, kills=1, seed=0)


GPU_PARTS = {"train": gpu_train, "decode": gpu_decode, "fallback": gpu_fallback, "resume": gpu_resume}


def bench_gpu(args):
    """Training and decoding speed, compiled or not, and exact resuming: part by part."""
    train.start(args.device, deterministic=False)
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"{name}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    for part in args.parts:
        print(f"\n{part}", flush=True)
        try:
            GPU_PARTS[part](args)
        except Exception as error:  # one that fails should not hide the others
            print(f"{type(error).__name__}: {str(error)[:500]}", flush=True)


# --- the x-ray page ---

IN_NODE = """
const page = require("fs").readFileSync(process.argv[1], "utf8");
const part = id => page.match(new RegExp(`<script[^>]*id="${id}"[^>]*>([^]*?)</script>`))[1];
const data = JSON.parse(part("data")), ids = Array.from({length: data.max_len}, (_, i) => i);
eval(part("engine").replace('"use strict";', "") + `
  const time = job => {
    const start = performance.now();
    job();
    return performance.now() - start;
  };
  const model = new Model(data.config, data.angles, data.max_len, data.weights, part("weights"));
  const reading = new Reading(model), runs = [];
  for (let run = 0; run < 9; run++) {
    reading.truncate(0);
    const all = time(() => { while (reading.ids.length < 120) reading.read(ids.slice(0, 8)); });
    runs.push([all, time(() => reading.read([1])), time(() => reading.readLens(121))]);
  }
  console.log(JSON.stringify(runs));
`);
"""


# --- ways of fine-tuning ---

N_VIRTUAL = 16  # tokens that stand before every text in prompt and prefix tuning
RANK = 8  # of LoRA
BOTTLENECK = 16  # channels in an adapter
# 16 levels at quantiles of the normal distribution (Dettmers et al., 2023, appendix E)
NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]


def quantize_to_nf4(weight, size=64):
    """A matrix with each weight at the nearest of 16 levels, and one scale for each `size` of them."""
    groups = weight.view(-1, size)
    scale = groups.abs().amax(1, keepdim=True)
    nearest = ((groups / scale)[..., None] - torch.tensor(NF4)).abs().argmin(-1)
    return (torch.tensor(NF4)[nearest] * scale).view_as(weight)


class VirtualTokens(nn.Module):
    """A frozen embedding; where texts begin with N_VIRTUAL times `marker`, vectors that learn take the place
    of these tokens (Lester et al., 2021).
    """

    def __init__(self, embedding, marker):
        super().__init__()
        self.weight, self.marker = embedding.weight, marker  # the weight is the head's, too
        self.virtual = nn.Parameter(self.weight[torch.randperm(1000)[:N_VIRTUAL]].clone())
        self.present = False  # whether the texts that were read last begin so

    def forward(self, ids):
        x = F.embedding(ids, self.weight)
        self.present = ids[0, :N_VIRTUAL].tolist() == N_VIRTUAL * [self.marker]
        if not self.present:
            return x
        return torch.cat((self.virtual.expand(len(x), -1, -1), x[:, N_VIRTUAL:]), 1)


class WithPrefix(nn.Module):
    """A frozen k_proj or v_proj; for the virtual tokens it gives what is learned (Li & Liang, 2021)."""

    def __init__(self, linear, tokens, start):
        super().__init__()
        self.weight, self.tokens = linear.weight, [tokens]  # in a list, so as not to be a submodule
        self.prefix = nn.Parameter(linear(start).detach())  # (n, K * D)

    def forward(self, x):
        y = F.linear(x, self.weight)
        if not self.tokens[0].present:
            return y
        prefix = self.prefix.to(y.dtype).expand(len(y), -1, -1)
        return torch.cat((prefix, y[:, N_VIRTUAL:]), 1)


class WithAdapter(nn.Module):
    """A sublayer, frozen, and behind it y + up(gelu(down(y))) (Houlsby et al., 2019)."""

    def __init__(self, sublayer, C):
        super().__init__()
        self.sublayer = sublayer
        self.down, self.up = nn.Linear(C, BOTTLENECK), nn.Linear(BOTTLENECK, C)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *inputs):
        y = self.sublayer(*inputs)
        return y + self.up(F.gelu(self.down(y)))


def with_lora(model, _):
    finetune.add_lora(model, RANK, 2.0 * RANK)


def with_lora_on_4_bits(model, _):
    for name, p in model.named_parameters():
        if "proj" in name:
            p.data = quantize_to_nf4(p.data)
    finetune.add_lora(model, RANK, 2.0 * RANK)


def with_prompt(model, marker):
    model.requires_grad_(False)
    model.model.embed_tokens = VirtualTokens(model.model.embed_tokens, marker)


def with_prefix(model, marker):
    with_prompt(model, marker)
    tokens = model.model.embed_tokens
    tokens.virtual.requires_grad_(False)
    x = tokens.virtual.detach()
    for block in model.model.layers:  # it starts as what the block makes of the embeddings of real tokens
        for name in ("k_proj", "v_proj"):
            linear = getattr(block.self_attn, name)
            setattr(block.self_attn, name, WithPrefix(linear, tokens, block.input_layernorm(x)))


def with_adapters(model, _):
    model.requires_grad_(False)
    for block in model.model.layers:
        block.self_attn = WithAdapter(block.self_attn, model.config.n_embd)
        block.mlp = WithAdapter(block.mlp, model.config.n_embd)


def with_all_weights(model, _):
    pass


WAYS = {  # (what makes a model ready for it, its learning rate / that of all weights)
    "all weights": (with_all_weights, 1),
    "LoRA": (with_lora, 3),
    "LoRA on 4 bits": (with_lora_on_4_bits, 3),
    "adapters": (with_adapters, 3),
    "prefix": (with_prefix, 30),
    "prompt": (with_prompt, 100),
}


def tune_by(way, base, steps):
    """Teach a base model the small tasks in one way, without replay, and print what became of it."""
    change, factor = WAYS[way]
    with redirect_stdout(io.StringIO()):
        settings, material = open_tasks(base, steps)
        model = finetune.open_base(base, "cpu", 0, "sft")
    before = finetune.base_bpb(model, material, settings)
    torch.manual_seed(0)
    marker = material.tokenizer.special_tokens["<|endoftext|>"]
    change(model, marker)
    learning = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in learning)
    lr = factor * settings.lr
    optimizer = torch.optim.AdamW(learning, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer.param_groups[0]["initial_lr"] = lr
    objective = train.NextTokenLoss(model)
    virtual = []
    if isinstance(model.model.embed_tokens, VirtualTokens):
        virtual = N_VIRTUAL * [marker]
    started = time.perf_counter()
    for step in range(steps):
        ids, targets, _ = finetune.read_batch(step, material.train, None, settings)
        if virtual:
            ids = torch.cat((torch.tensor(virtual).expand(len(ids), -1), ids), 1)
            targets = torch.cat((torch.full((len(ids), N_VIRTUAL), IGNORED), targets), 1)
        lr_scale = train.learning_rate(step, 0, settings)
        n_targets = (targets != IGNORED).sum().item()
        train.training_step(objective, [optimizer], (ids, targets), n_targets, lr_scale, settings)
    seconds = time.perf_counter() - started
    plain = finetune.question_ids
    try:
        finetune.question_ids = lambda tokenizer, example: virtual + plain(tokenizer, example)
        answers = finetune.answer(model, material.tokenizer, material.test)
    finally:
        finetune.question_ids = plain
    right = finetune.macro(finetune.exact_match(material.test, answers))
    rise = finetune.base_bpb(model, material, settings) - before
    memory = f"{training_bytes(model, way) / 1e6:5.1f} MB"
    print(f"{way:14}  {n:>9,}  {memory}  {right:.3f}  {rise:+.3f}  {seconds:4.0f} s", flush=True)


def training_bytes(model, way):
    """Of weights, gradients and moments, in float32; a weight in 4 bits has a 64th of a 32-bit scale, too."""
    total = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            total += 16 * p.numel()
        elif way == "LoRA on 4 bits" and "proj" in name:
            total += 4.5 / 8 * p.numel()
        else:
            total += 4 * p.numel()
    return total


def open_tasks(base, steps):
    """The settings of finetune.py for the small tasks without replay, and what it reads."""
    typed, sys.argv = sys.argv, ["finetune.py", "--model", str(base), "--steps", str(steps), "--replay", "0"]
    try:
        args = finetune.parse_arguments()
    finally:
        sys.argv = typed
    finetune.tasks.find_tasks()
    settings = finetune.choose_settings(args, base, Transformer.load(base).config, "cpu")
    return settings, finetune.read_material(settings)


def bench_peft(args):
    print("way                learns    memory  macro  forgets   time")
    for way in args.ways:
        tune_by(way, args.model, args.steps)


def bench_xray(args):
    """A page's size and, in node, milliseconds of its forward pass, beside PyTorch with one thread."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(find_data("pystdlib") / "tokenizer.json")
    print("| model | page | 120 tokens | PyTorch | one more | lens of 121 |")
    print("|---|---|---|---|---|---|")
    for preset in args.presets:
        model = Transformer(Config(tokenizer.vocab_size, block_size=128, **PRESETS[preset])).eval()
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            model.save(folder, tokenizer=tokenizer)
            page = Path(folder, "xray.html")
            page.write_text(xray.make_page(folder, "def"), encoding="utf-8")
            runs = json.loads(subprocess.check_output(["node", "-e", IN_NODE, page]))
            everything, one, lens = (statistics.median(column) for column in zip(*runs))
            ids = torch.randint(tokenizer.vocab_size, (1, 120))
            theirs = 1000 * in_turn({"PyTorch": partial(model, ids)})["PyTorch"]
            size = page.stat().st_size / 2**20
        print(f"| {preset} | {size:.1f} MB | {everything:.0f} | {theirs:.1f} | {one:.1f} | {lens:.0f} |")


# --- command line ---


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure.")
    commands = parser.add_subparsers(dest="command", required=True)

    def offer(name, bench, help):
        command = commands.add_parser(name, help=help)
        command.set_defaults(bench=bench)
        return command.add_argument

    add = offer("lzma", bench_lzma, "bits per byte by a general compressor")
    add("--data", default="pystdlib", help="prepared data (pystdlib)")

    add = offer("prepare", bench_prepare, "memory of data/prepare.py")
    add("--megabytes", type=int, nargs=2, default=(50, 500), help="sizes of the two corpora (50 500)")

    add = offer("tokenizer", bench_tokenizer, "learning and applying a vocabulary")
    add("--runs", type=int, default=3, help="runs of each (3)")
    add("--large", action="store_true", help="also 200 MB of text from installed packages")
    add("--job", choices=LEARNERS, help="one run of this one only, as JSON")
    add("--corpus", choices=["shakespeare", "stdlib", "packages"], help="with --job")
    add("--vocab-size", type=int, help="with --job")

    add = offer("model", bench_model, "time and memory of the loss and of opening a folder")
    add("--runs", type=int, default=3, help="runs of each (3)")
    add("--job", choices=MODEL_JOBS, help="one run of this one only, as JSON")
    add("--folder", help="with --job: the model to open")

    add = offer("train", bench_train, "a training step, and runs against nanoGPT")
    add("--peer", metavar="DIR", help="a checkout of nanoGPT, whose data folder is written to")
    add("--runs", type=int, default=3, help="runs of each (3)")
    add("--rounds", type=int, default=15, help="steps of each (15)")
    add("--threads", type=int, default=torch.get_num_threads(), help="for each (all)")

    add = offer("curve", bench_curve, "bits per byte that are usual after so many tokens")
    add("--presets", nargs="+", default=list(train.USUAL), choices=PRESETS, help="models (those of USUAL)")
    add("--steps", type=int, nargs="+", default=[300, 1000, 3200], help="of the runs (300 1000 3200)")

    add = offer("budget", bench_budget, "whether --minutes are kept beside other programs")
    add("--data", default="pystdlib", help="prepared data (pystdlib)")
    add("--minutes", type=float, default=1.5, help="of a run (1.5)")
    add("--runs", type=int, default=3, help="rounds of the three ways (3)")

    add = offer("sample", bench_sample, "decoding, one stream and batches")
    add("--peer", metavar="BINARY", help="llama2.c's `run`, with tokenizer.bin beside it")
    add("--runs", type=int, default=5, help="runs of each (5)")
    add("--tokens", type=int, default=200, help="of one stream (200)")
    add("--threads", type=int, default=1, help="for each (1)")
    add("--batches", type=int, nargs="+", default=[1, 8, 64], help="rows (1 8 64)")
    add("--shapes", nargs="+", default=["15 M", "110 M"], choices=SHAPES, help="models (15 M, 110 M)")
    add("--model", metavar="DIR", help="a folder instead, such as that of tests/smollm2.py")

    add = offer("resume", bench_resume, "runs that are killed and resumed")
    add("--runs", type=int, default=20, help="how many (20)")
    add("--kills", type=int, default=1, help="of each run (1)")
    add("--steps", type=int, default=60, help="of each run (60)")
    add("--seed", type=int, default=0, help="of the moments (0)")

    add = offer("exit", bench_exit, "whether two processes end cleanly")
    add("--runs", type=int, default=20, help="of each script (20)")

    add = offer("ladder", bench_ladder, "what each idea buys, in equal time")
    add("--seconds", type=float, default=60, help="for each rung (60)")
    add("--runs", type=int, default=3, help="of the whole ladder (3)")

    add = offer("speedrun", bench_speedrun, "whether this folder learns more than another version")
    add("--base", metavar="DIR", default=ROOT, help="another version of this folder (this one)")
    add("--options", default="", help="of train.py, for this folder's runs only, such as '--lr 0.02'")
    add("--data", nargs="+", default=["pystdlib", "shakespeare"], help="corpora (pystdlib shakespeare)")
    add("--minutes", type=float, default=train.DEFAULT_MINUTES, help="of each run (3)")
    add("--steps", type=int, help="instead of minutes")
    add("--seeds", type=int, default=3, help="runs of each (3)")
    add("--hold-out", action="store_true", help="measure on it, not on the last tenth of the training text")

    add = offer("peft", bench_peft, "ways of fine-tuning")
    add("--model", metavar="DIR", default=ROOT / "out/pystdlib", help="the base model (out/pystdlib)")
    add("--steps", type=int, default=600, help="of each (600)")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="(all)")

    add = offer("xray", bench_xray, "the forward pass in an x-ray page")
    add("--presets", nargs="+", default=["pico", "nano", "micro"], choices=PRESETS, help="(pico nano micro)")

    add = offer("gpu", bench_gpu, "what needs a GPU")
    add("--parts", nargs="+", default=list(GPU_PARTS), choices=GPU_PARTS, help="(all)")
    add("--device", default="cuda", help="another one, to try the benchmark (cuda)")
    add("--preset", default="small", choices=PRESETS, help="train: the model (small)")
    add("--block-size", type=int, default=1024, help="train: tokens of a block (1024)")
    add("--batch-size", type=int, default=128, help="train: blocks of a step (128)")
    add("--micro-batch", type=int, default=32, help="train: blocks at a time (32)")
    add("--steps", type=int, default=12, help="train: of each kind (12)")
    add("--shapes", nargs="+", default=["110 M", "1 B"], choices=SHAPES, help="decode: models (110 M, 1 B)")
    add("--tokens", type=int, default=500, help="decode: of each stream (500)")
    add("--runs", type=int, default=3, help="resume: runs that are killed (3)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    args.bench(args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is temporary is removed then, too
    main()
