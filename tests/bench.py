"""The measurements behind the numbers in the README. Nothing here passes or fails.

python tests/bench.py lzma --data pystdlib      what a general compressor makes of the same validation text
python tests/bench.py prepare                   peak memory of data/prepare.py on 50 MB and on 500 MB
python tests/bench.py tokenizer                 learning and applying a vocabulary, against other libraries
python tests/bench.py model                     time and memory of the loss, of recomputing, of opening a file
python tests/bench.py train --peer DIR          a training step against transformers; a run against nanoGPT
python tests/bench.py sample --peer BINARY      decoding against transformers and llama2.c
python tests/bench.py resume                    20 runs, each killed at a random moment: do they end alike?
python tests/bench.py ladder                    from a GPT-2 to train.py, idea by idea, in equal time
python tests/bench.py gpu                       all that needs a GPU, in one call
"""

import argparse
import importlib.util
import io
import json
import lzma
import os
import pickle
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import regex
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import loop  # noqa: E402
import machine  # noqa: E402
import train  # noqa: E402
from data.loader import Blocks, load_data  # noqa: E402
from data.prepare import DATA, prepare  # noqa: E402
from decoding import generate, pack  # noqa: E402
from model import PRESETS, Config, Transformer  # noqa: E402
from optimizer import make_optimizers  # noqa: E402
from tokenizer import GPT4_PATTERN, SPECIAL_TOKENS, Tokenizer  # noqa: E402


def bench_lzma(args):
    """Bits per byte that LZMA needs for the validation text after it has seen the training text: a yardstick
    for val_bpb.
    """
    folder = DATA / args.data
    dtype = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["dtype"]
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    texts = []
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"{split}*.bin"))
        ids = np.concatenate([np.fromfile(path, dtype=dtype) for path in paths])
        texts.append(tokenizer.decode_bytes(ids.tolist()).replace(SPECIAL_TOKENS[0].encode(), b""))
    train, val = texts
    window = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": len(train + val)}]
    alone, both, single = (len(lzma.compress(text, filters=window)) for text in (train, train + val, val))
    print(f"{args.data}: {len(val):,} bytes of validation text, {len(train):,} bytes of training text")
    print(f"LZMA, given the training text: {8 * (both - alone) / len(val):.3f} bits per byte")
    print(f"LZMA, without it:              {8 * single / len(val):.3f} bits per byte")


def write_distinct_text(folder, megabytes):
    """Files of 1 MB with random sentences, no two alike."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20000)]
    folder.mkdir()
    for i in range(megabytes):
        text = " ".join(draw.choices(words, k=155000))
        (folder / f"{i:04}.txt").write_text(text.replace(" a", ".\nA")[: 2**20], encoding="utf-8")


# runs its arguments and prints the most memory that they held at once
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def bench_prepare(args):
    """Peak memory and speed of preparing a small and a large corpus with a given vocabulary."""
    peaks = []
    with tempfile.TemporaryDirectory() as work:
        for megabytes in args.megabytes:
            text, vocabulary = Path(work) / f"bench-{megabytes}", Path(work) / "tokenizer.json"
            write_distinct_text(text, megabytes)
            if not peaks:
                Tokenizer.train([(text / "0000.txt").read_text()], 4096).save(vocabulary)
            program = [sys.executable, ROOT / "data/prepare.py", text, "--tokenizer", vocabulary]
            start = time.time()
            result = subprocess.run([sys.executable, "-c", PEAK, *program], check=True, capture_output=True)
            speed = megabytes / (time.time() - start)
            shutil.rmtree(DATA / text.name)
            peaks.append(int(result.stdout) * (1 if sys.platform == "darwin" else 1024) / 1e6)
            print(f"{megabytes:5} MB of text: peak memory {peaks[-1]:.0f} MB, {speed:.1f} MB/s", flush=True)
    print(f"peak memory, large to small: {peaks[-1] / peaks[0]:.3f}")


# --- the tokenizer, and those of other libraries ---


def corpus(name, megabytes=200):
    """The documents of a corpus that is on this machine, read as they are needed."""
    if name == "shakespeare":
        if "TINY_SHAKESPEARE" not in os.environ:
            sys.exit("error: put the path of Tiny Shakespeare into the variable TINY_SHAKESPEARE")
        paths = [Path(os.environ["TINY_SHAKESPEARE"])]
    else:
        folder = Path(sysconfig.get_path("stdlib" if name == "stdlib" else "purelib"))
        suffixes = {".py"} if name == "stdlib" else {".py", ".pyi", ".md", ".rst", ".txt", ".h"}
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix in suffixes and path.is_file()]
        if name == "stdlib":
            paths = [path for path in paths if "site-packages" not in path.parts]
        sizes = np.cumsum([path.stat().st_size for path in paths])
        paths = paths[: int(np.searchsorted(sizes, megabytes * 1e6))]
    return (path.read_bytes().decode("utf-8", "replace") for path in paths)


def learn_ours(documents, vocab_size, processes=1):
    """Returns the seconds of its two phases."""
    times = [time.perf_counter()]

    def log(line):
        if line.endswith("different"):
            times.append(time.perf_counter())

    Tokenizer.train(documents, vocab_size, special_tokens=SPECIAL_TOKENS[:1], processes=processes, log=log)
    return {"split": times[1] - times[0], "merge": time.perf_counter() - times[1]}


def learn_ours_on_2_processes(documents, vocab_size):
    return learn_ours(documents, vocab_size, processes=2)


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


def learn_sentencepiece(documents, vocab_size):
    """Its BPE is over characters, not bytes, and of lines cut into words: near, not the same."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents for line in text.splitlines() if line.strip()),
        model_writer=open(os.devnull, "wb"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )


def learn_by_recounting(documents, vocab_size):
    """minbpe's algorithm: for every merge count the pairs of all chunks, and replace in all chunks."""
    chunks = [list(chunk.encode()) for text in documents for chunk in regex.findall(GPT4_PATTERN, text)]
    for new in range(256, vocab_size - 1):
        counts = Counter(pair for chunk in chunks for pair in zip(chunk, chunk[1:]))
        best = max(counts, key=counts.get)
        for k, chunk in enumerate(chunks):
            merged, i = [], 0
            while i < len(chunk):
                match = tuple(chunk[i : i + 2]) == best
                merged.append(new if match else chunk[i])
                i += 2 if match else 1
            chunks[k] = merged


LEARNERS = {
    "ours": learn_ours,
    "ours, 2 processes": learn_ours_on_2_processes,
    "tokenizers": learn_tokenizers,
    "rustbpe": learn_rustbpe,
    "sentencepiece": learn_sentencepiece,
    "recounting": learn_by_recounting,
}


def bench_learn(args):
    """One run of one learner, in a process of its own: prints its seconds, and the peak memory of its largest
    process, as JSON.
    """
    documents = corpus(args.corpus)
    if args.characters:
        documents = [next(documents)[: args.characters]]
    start = time.perf_counter()
    phases = LEARNERS[args.learner](documents, args.vocab_size)
    seconds = time.perf_counter() - start
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "MB": peak * (1 if sys.platform == "darwin" else 1024) / 1e6,
                **(phases or {}),
            }
        )
    )


def compare_learners(name, vocab_size, learners, runs, characters=0):
    """Run the learners in turn, each in one thread but for the second; print medians."""
    learners = [
        learner
        for learner in learners
        if learner not in ("rustbpe", "sentencepiece") or importlib.util.find_spec(learner)
    ]
    results = {learner: [] for learner in learners}
    program = [sys.executable, __file__, "learn", name, str(vocab_size), "--characters", str(characters)]
    for _ in range(runs):
        for learner in learners:
            output = subprocess.run(
                [*program, learner],
                check=True,
                capture_output=True,
                env={**os.environ, "RAYON_NUM_THREADS": "1"},
            ).stdout
            results[learner].append(json.loads(output.splitlines()[-1]))
    print(f"\n{name}, {vocab_size:,} tokens, median of {runs}")
    reference = "tokenizers" if "tokenizers" in results else learners[-1]
    print(f"{'':20}{'seconds':>9}{'split':>8}{'merge':>8}{'peak MB':>9}  time, {reference} = 1")
    for learner, runs_of_it in results.items():
        row = {key: statistics.median(run[key] for run in runs_of_it) for key in runs_of_it[0]}
        ratio = statistics.median(
            run["seconds"] / other["seconds"] for run, other in zip(runs_of_it, results[reference])
        )
        phases = "".join(f"{row[key]:8.2f}" if key in row else f"{'':8}" for key in ("split", "merge"))
        print(f"{learner:20}{row['seconds']:9.2f}{phases}{row['MB']:9.0f}  {ratio:.2f}", flush=True)


def compare_encoders(name, vocab_size):
    """Megabytes a second of one thread."""
    import tokenizers

    texts = list(corpus(name))
    ours = Tokenizer.train(texts, vocab_size)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.document))
    ranks = {token: i for i, token in ours.tokens.items() if i not in ours.special_tokens.values()}
    plain = tiktoken.Encoding("", pat_str=GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"\nencoding {name}, {vocab_size:,} tokens, one thread")
    for label, encode in {
        "ours": ours.encode,
        "tiktoken": plain.encode_ordinary,
        "tokenizers": theirs.encode,
    }.items():
        speeds = []
        for _ in range(3):
            start = time.perf_counter()
            for text in texts:
                encode(text)
            speeds.append(n_bytes / 1e6 / (time.perf_counter() - start))
        print(f"{label:20}{statistics.median(speeds):9.1f} MB/s", flush=True)


def bench_tokenizer(args):
    """Learning a vocabulary and encoding with it."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    rivals = ["ours", "ours, 2 processes", "tokenizers", "rustbpe"]
    if "TINY_SHAKESPEARE" in os.environ:
        compare_learners("shakespeare", 512, ["ours", "recounting"], args.runs, characters=100_000)
        compare_learners("shakespeare", 4096, [*rivals, "sentencepiece"], args.runs)
    compare_learners("stdlib", 32768, rivals, args.runs)
    if args.large:
        compare_learners("packages", 32768, rivals, args.runs)
    compare_encoders("stdlib", 32768)


def loss_of(kind):
    """A function that computes and differentiates the loss of 4,096 tokens over a vocabulary of 50,000."""
    model = Transformer(Config(50000, 1024, n_layer=1, n_head=12, n_kv_head=12, n_embd=768, n_hidden=64))
    ids, targets = torch.randint(50000, (2, 4, 1024))
    weight = model.model.embed_tokens.weight
    compute = {
        "ours": lambda: model.loss(ids, targets),
        "plain": lambda: F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()),
        "linear_cross_entropy": lambda: F.linear_cross_entropy(
            model.hidden(ids).flatten(0, 1), weight, targets.flatten()
        ),
    }[kind]
    return lambda: compute().backward()


def step_of(recompute):
    """A function that runs micro forward and backward over 8 blocks of 512 tokens."""
    model = Transformer(Config(4096, 512, recompute=recompute, **PRESETS["micro"]))
    ids, targets = torch.randint(4096, (2, 8, 512))
    return lambda: model.loss(ids, targets).backward()


def opening(dtype):
    """A function that opens 1 GB of bfloat16 weights and reads them all; the folder is made on first use."""
    folder = Path(tempfile.gettempdir()) / "bench-model-of-1-GB"
    if not folder.exists():
        shape = dict(n_layer=30, n_head=16, n_kv_head=8, n_embd=1024, n_hidden=4096)
        Transformer(Config(32768, 1024, **shape)).to(torch.bfloat16).save(folder)

    def run():
        for p in Transformer.load(folder, dtype=dtype).parameters():
            p.sum()

    return run


MODEL_JOBS = {
    "loss, plain": lambda: loss_of("plain"),
    "loss, linear_cross_entropy": lambda: loss_of("linear_cross_entropy"),
    "loss, ours": lambda: loss_of("ours"),
    "micro": lambda: step_of(False),
    "micro, recompute": lambda: step_of(True),
    "open 1 GB": lambda: opening(None),
    "open 1 GB as float32": lambda: opening(torch.float32),
}


def bench_model(args):
    """Seconds, and megabytes above those of the model itself, of each job in a process of its own."""
    if args.job:
        run = MODEL_JOBS[args.job]()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the model (Linux)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(1 if args.job.startswith("open") else 3):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
        print(json.dumps({"seconds": statistics.median(seconds), "MB": peak}))
        return
    opening(None)
    print(f"{'':28}{'seconds':>9}{'peak MB':>9}  median of {args.runs}")
    for job in MODEL_JOBS:
        if "linear_cross_entropy" in job and not hasattr(F, "linear_cross_entropy"):
            continue
        program = [sys.executable, __file__, "model", "--job", job]
        outputs = [subprocess.run(program, check=True, capture_output=True).stdout for _ in range(args.runs)]
        rows = [json.loads(output.splitlines()[-1]) for output in outputs]
        seconds, peak = (statistics.median(row[key] for row in rows) for key in ("seconds", "MB"))
        print(f"{job:28}{seconds:9.2f}{peak:9.0f}", flush=True)


# --- training ---


def in_turn(jobs, rounds=15, warm_up=3):
    """{name: median milliseconds} of functions that are called one after the other, round after round."""
    times = {name: [] for name in jobs}
    for i in range(rounds + warm_up):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if i >= warm_up:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def bench_step(dtype, vocab_size=4096, rows=16):
    """Forward and backward of the nano shape against transformers, and the optimizers, in turn."""
    import transformers

    config = Config(vocab_size, 128, **PRESETS["nano"])
    ours = Transformer(config)
    shape = dict(vocab_size=vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden)
    shape |= dict(num_hidden_layers=config.n_layer, num_attention_heads=config.n_head)
    shape |= dict(num_key_value_heads=config.n_kv_head, head_dim=config.head_dim, tie_word_embeddings=True)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, use_cache=False))
    ids = torch.randint(vocab_size, (rows, 129))
    ours_muon, adamw = make_optimizers(ours, 0.001, 0.1)
    matrices = [p for group in ours_muon.param_groups for p in group["params"]]
    pytorch_muon = torch.optim.Muon(matrices, lr=0.001)

    def forward_backward(model, loss):
        model.zero_grad()
        with machine.precision("cpu", dtype):
            value = loss()
        value.backward()

    compiled = torch.compile(ours.loss, dynamic=False)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    times = in_turn(
        {
            "transformers": lambda: forward_backward(theirs, lambda: theirs(input_ids=x, labels=x).loss),
            "ours": lambda: forward_backward(ours, lambda: ours.loss(x, y)),
            "ours, compiled": lambda: forward_backward(ours, lambda: compiled(x, y)),
            "Muon": ours_muon.step,
            "torch.optim.Muon": pytorch_muon.step,
            "AdamW": adamw.step,
        }
    )
    flops = 3 * x.numel() * config.flops_per_token(128)
    gemm, gemm32 = machine.gemm_rate("cpu", dtype), machine.gemm_rate("cpu", "float32")
    print(
        f"\nnano, {rows} x 128 tokens, vocabulary {vocab_size:,}, {dtype}: milliseconds, median of 15 in turn"
    )
    for name, value in times.items():
        is_model = name in ("transformers", "ours", "ours, compiled")
        rate = flops / value * 1000
        share = f"{rate / gemm:.0%} of a large product's rate, {rate / gemm32:.0%} of that in float32"
        print(f"{name:20}{value:8.1f}  {share if is_model else ''}")
    optimizers = times["Muon"] + times["AdamW"]
    print(f"ours / transformers {times['ours'] / times['transformers']:.2f}", end=", ")
    print(f"optimizers {optimizers / (times['ours'] + optimizers):.1%} of a step")


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
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(program, cwd=peer, stdout=subprocess.PIPE, text=True, env=environment)
    times = [time.perf_counter() for line in process.stdout if line.startswith(("step 0:", "step 2000:"))]
    final = subprocess.run(
        [*program, "--init_from=resume", "--eval_only=True", "--eval_iters=500"],
        cwd=peer, check=True, capture_output=True, text=True, env=environment,
    ).stdout  # fmt: skip
    loss = float(final.split("val loss ")[1].split()[0])
    return times[-1] - times[0], loss / np.log(2)


def run_ours(name, minutes, threads):
    """(seconds, bits per byte) of train.py."""
    with tempfile.TemporaryDirectory() as out:
        program = [sys.executable, ROOT / "train.py", "--data", name, "--minutes", str(minutes), "--out", out]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL, env=environment)
        last = (Path(out) / "log.csv").read_text().splitlines()[-1].split(",")
    return float(last[2]), float(last[4])


def bench_train(args):
    """Parts of a step; then nanoGPT and train.py on the same text, in turn."""
    for dtype in ("float32", "bfloat16"):
        bench_step(dtype)
    if not args.peer:
        return
    if "TINY_SHAKESPEARE" not in os.environ:
        sys.exit("error: put the path of Tiny Shakespeare into the variable TINY_SHAKESPEARE")
    source = Path(os.environ["TINY_SHAKESPEARE"])
    prepare([str(source)], name="bench-shakespeare")
    try:
        for run in range(args.runs):
            seconds, bpb = run_nanogpt(args.peer, source.read_text(), args.threads)
            print(
                f"\nrun {run + 1}, {args.threads} threads\nnanoGPT  {seconds:6.1f} s  {bpb:.3f} bpb",
                flush=True,
            )
            for part in (6, 10):
                used, ours = run_ours("bench-shakespeare", seconds / part / 60, args.threads)
                print(f"1/{part:<6} {used:6.1f} s  {ours:.3f} bpb", flush=True)
    finally:
        shutil.rmtree(DATA / "bench-shakespeare")


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

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


def older_model(config, ideas):
    """The Transformer without those of "rope", "rmsnorm" and "swiglu" that are not among `ideas`."""
    model = (Transformer if "rope" in ideas else LearnedPositions)(config)
    if "swiglu" not in ideas:
        for block in model.model.layers:
            block.mlp = GeluMLP(config.n_embd)
            for p, std in (
                (block.mlp.up_proj.weight, 0.5 / config.n_embd**0.5),
                (block.mlp.down_proj.weight, 0),
            ):
                nn.init.normal_(p, std=std)
    if "rmsnorm" not in ideas:
        for block in model.model.layers:
            block.input_layernorm = nn.LayerNorm(config.n_embd, bias=False)
            block.post_attention_layernorm = nn.LayerNorm(config.n_embd, bias=False)
        model.model.norm = nn.LayerNorm(config.n_embd, bias=False)
    return model


def plain_adamw(model):
    """nanoGPT's optimizer for small models on a CPU."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    return [optimizer]


RUNGS = {  # name -> what it adds
    "GPT-2's block, AdamW, bytes, 12 x 64": set(),
    "+ RoPE": {"rope"},
    "+ RMSNorm": {"rmsnorm"},
    "+ SwiGLU": {"swiglu"},
    "+ Muon": {"muon"},
    "+ BPE, 1,024 tokens": {"bpe"},
    "+ products in bfloat16": {"bfloat16"},
    "+ the batch of train.py": {"batch"},
    "+ constant rate, then linear to zero": {"schedule"},
}


def climb(ideas, data, seconds, seed):
    """Train with these ideas for that time. Returns (steps, tokens, bits per byte)."""
    rows, T = (12, 64) if "batch" not in ideas else (32, 32) if seconds < 60 else (16, 128)
    torch.manual_seed(seed)
    dtype = "bfloat16" if "bfloat16" in ideas else "float32"
    run = argparse.Namespace(micro_batch=rows, dtype=dtype)
    model = older_model(Config(data.tokenizer.vocab_size, T, **PRESETS["nano"]), ideas)
    optimizers = make_optimizers(model, 0.03, 0.1) if "muon" in ideas else plain_adamw(model)
    stage = SimpleNamespace(model=model, optimizers=optimizers, loss_of=part_losses(model))
    blocks = Blocks(data.train, T, seed)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / seconds) < 1:  # the schedules go by time
        cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2
        share = min(1, done / 0.05, (1 - done) / 0.6 if "schedule" in ideas else cosine)
        ids, targets, _, _ = blocks.batch(step * rows, rows)
        step += 1
        loop.training_step(stage, (ids, targets), rows * T, share, run)
    bpb, _ = loop.bits_per_byte(model, data.val, data.tokenizer.bytes_per_token)
    return step, step * rows * T, bpb


def bench_ladder(args):
    """The table of the README: equal time and seeds, one idea more on every rung."""
    if "TINY_SHAKESPEARE" not in os.environ:
        sys.exit("error: put the path of Tiny Shakespeare into the variable TINY_SHAKESPEARE")
    text = os.environ["TINY_SHAKESPEARE"]
    vocabularies = {"bytes": 256 + len(SPECIAL_TOKENS), "bpe": None}
    with redirect_stdout(io.StringIO()):
        folders = {name: prepare([text], f"bench-{name}", size) for name, size in vocabularies.items()}
    data = {name: load_data(folder) for name, folder in folders.items()}
    results = {name: [] for name in RUNGS}
    for seed in range(args.runs):  # in turn, so that a slow hour of the machine meets all
        ideas = set()
        for name, added in RUNGS.items():
            ideas |= added
            results[name].append(climb(ideas, data["bpe" if "bpe" in ideas else "bytes"], args.seconds, seed))
    print(f"| {args.seconds:g} s each, median of {args.runs} | steps | tokens | bits per byte |")
    print("|---|---|---|---|")
    for name, runs in results.items():
        steps, tokens, bpb = (statistics.median(values) for values in zip(*runs))
        print(f"| {name} | {steps:,.0f} | {tokens / 1e6:.2f} M | {bpb:.3f} |", flush=True)
    for folder in folders.values():
        shutil.rmtree(folder)


# --- decoding ---

SHAPES = {  # two of llama2.c's, and one for GPUs
    "15 M": dict(n_layer=6, n_head=6, n_kv_head=6, n_embd=288, n_hidden=768),
    "110 M": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_hidden=2048),
    "1 B": dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192),
}


def random_folder(folder, shape, dtype=torch.float32):
    """A folder with a model of that shape, a vocabulary of 32,000 and random weights."""
    model = Transformer(Config(32000, 1024, **SHAPES[shape]))
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    model.to(dtype).save(Path(folder))


def decoder(folder, kind, device, dtype):
    """A function (prompts, n) that makes n greedy tokens for each, with transformers or in a mode of ours."""
    if kind != "transformers":
        model = Transformer.load(folder, device, dtype)
        model = pack(model) if kind == "eager" else model

        def run(prompts, n):
            for _ in generate(model, prompts, max_new_tokens=n, temperature=0, mode=kind):
                pass

        return run
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)

    def run_transformers(prompts, n):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        settings = dict(min_new_tokens=n, max_new_tokens=n, do_sample=False, pad_token_id=0)
        model.generate(ids, attention_mask=mask, **settings)

    return run_transformers


def read_bandwidth(device):
    """Bytes a second that are read from memory: of a sum on a CPU, of a copy (and written) on a GPU."""
    x, rates = torch.ones(2**27, device=device), []
    y = torch.empty_like(x)
    for _ in range(5):
        start = time.perf_counter()
        (x.sum() if device == "cpu" else y.copy_(x)[0]).item()
        rates.append((1 if device == "cpu" else 2) * x.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def write_llama2c(folder, path):
    """A model as llama2.c's run.c reads it (but for the order of the channels of q and k)."""
    model = Transformer.load(folder)
    c, layers = model.config, model.model.layers
    head = [c.n_embd, c.n_hidden, c.n_layer, c.n_head, c.n_kv_head, c.vocab_size, c.block_size]
    with open(path, "wb") as file:
        file.write(np.array(head, dtype=np.int32).tobytes())
        parts = [[model.model.embed_tokens], [x.input_layernorm for x in layers]]
        parts += [[getattr(x.self_attn, f"{name}_proj") for x in layers] for name in "qkvo"]
        parts += [[x.post_attention_layernorm for x in layers]]
        parts += [[getattr(x.mlp, f"{name}_proj") for x in layers] for name in ("gate", "down", "up")]
        for module in sum(parts + [[model.model.norm]], []):
            file.write(module.weight.detach().numpy().tobytes())
        file.write(np.zeros(c.block_size * c.head_dim, dtype=np.float32).tobytes())  # not used any more


def llama2c_speed(binary, path, n):
    """Tokens a second of run.c, as it reports them."""
    program = [binary, path, "-z", Path(binary).parent / "tokenizer.bin", "-t", "0", "-n", str(n)]
    output = subprocess.run(program, check=True, capture_output=True).stderr.decode("utf-8", "replace")
    return float(output.split("achieved tok/s:")[1].split()[0])


def bench_sample(args):
    """One stream and batches against transformers and llama2.c, in turn, on so many threads."""
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth("cpu")
    print(f"{args.threads} thread(s), which read {bandwidth / 1e9:.1f} GB/s; median of {args.runs} in turn")
    for shape in ("15 M", "110 M"):
        with tempfile.TemporaryDirectory() as folder:
            random_folder(folder, shape)
            jobs = {}
            for dtype, label in ((torch.float32, ""), (torch.bfloat16, ", bfloat16")):
                jobs["transformers" + label] = decoder(folder, "transformers", "cpu", dtype)
                jobs["ours" + label] = decoder(folder, "eager", "cpu", dtype)
            one_stream(args, shape, folder, jobs, bandwidth)
            print(f"\n{shape}, batches, float32: tokens/s of all rows", flush=True)
            for rows in args.batches:
                ragged = [1 + i * 63 // rows for i in range(rows)]
                for name, lengths in (("of 32 tokens", [32] * rows), ("of 1 to 63", ragged)):
                    prompts = [[1] * length for length in lengths]
                    pair = {kind: partial(jobs[kind], prompts, 32) for kind in ("transformers", "ours")}
                    theirs, ours = (32000 * rows / t for t in in_turn(pair, args.runs, 1).values())
                    line = f"{rows:4} {name:14} transformers {theirs:6.0f}, ours {ours:6.0f}"
                    print(f"{line}: {ours / theirs:.2f}", flush=True)


def one_stream(args, shape, folder, jobs, bandwidth):
    """Tokens a second of each contestant that continues one token."""
    speeds, path = {label: [] for label in jobs}, Path(folder) / "llama2c.bin"
    if args.peer:
        write_llama2c(folder, path)
        speeds["llama2.c"] = []
    for _ in range(args.runs):
        for label, run in jobs.items():
            start = time.perf_counter()
            run([[1]], args.tokens)
            speeds[label].append(args.tokens / (time.perf_counter() - start))
        if args.peer:
            speeds["llama2.c"].append(llama2c_speed(args.peer, path, args.tokens))
    n_params = Config(32000, 1024, **SHAPES[shape]).num_params()
    print(f"\n{shape}, one stream, {args.tokens} tokens: tokens/s")
    for label, values in speeds.items():
        speed = statistics.median(values)
        ratio = speed / statistics.median(speeds["transformers"])
        share = speed * n_params * (2 if "bfloat16" in label else 4) / bandwidth
        print(f"{label:24}{speed:8.1f} {ratio:6.2f} x transformers {share:5.0%} of the bandwidth")


# --- on a GPU ---


def training_speed(kind, preset, rows, T, vocab_size, device):
    """(tokens a second, bytes at most) of training steps of one kind, each rows x T tokens."""
    settings = dict(
        preset=preset, seed=0, steps=1000, block_size=T, batch_size=rows, micro_batch=rows, lr=0.01
    )
    settings |= dict(
        weight_decay=0.1, dtype="bfloat16", eval_every=100, save_every=100, processes=1, threads=1
    )
    settings |= dict(device=device)
    run = loop.Run(**settings, compile=kind == "ours", deterministic=False)
    config = Config(vocab_size, T, **PRESETS[preset])
    if kind.startswith("ours"):
        model, optimizers = train.build(run, vocab_size, device)
    elif kind == "nanoGPT-like":  # GPT-2's block, all logits at once, compiled, fused AdamW
        model = older_model(config, set()).to(device)
        model.loss = torch.compile(whole_loss(model))
        optimizers = plain_adamw(model)
    else:
        import transformers

        shape = dict(vocab_size=vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden)
        shape |= dict(num_hidden_layers=config.n_layer, num_attention_heads=config.n_head)
        shape |= dict(num_key_value_heads=config.n_kv_head, tie_word_embeddings=True, use_cache=False)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(device)
        plain = torch.compile(model) if kind.endswith("compiled") else model
        model.loss = whole_loss(lambda ids: plain(input_ids=ids).logits)
        optimizers = plain_adamw(model)
    ids = torch.randint(vocab_size, (rows, T + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, stage = [], SimpleNamespace(model=model, optimizers=optimizers, loss_of=part_losses(model))
    for _ in range(12):
        start = time.perf_counter()
        losses, _ = loop.training_step(stage, (x, y), rows * T, 1.0, run)
        losses.sum().item()
        seconds.append(time.perf_counter() - start)
    return rows * T / statistics.median(seconds[4:]), machine.peak_memory(device)


def part_losses(model):
    """loop.next_token_loss or, for a peer, the same without the parts of each row."""
    if isinstance(model, Transformer) and "loss" not in vars(model):
        return loop.next_token_loss

    def peer_loss(model, ids, targets):
        loss = model.loss(ids, targets, reduction="sum")
        return loss, loss.detach()[None]

    return peer_loss


def whole_loss(logits_of):
    """The loss as it is usually computed: all logits, then the cross-entropy."""

    def loss(ids, targets, reduction="sum"):
        return F.cross_entropy(logits_of(ids).flatten(0, 1).float(), targets.flatten(), reduction=reduction)

    return loss


def bench_gpu(args):
    """The tests on the GPU, training and decoding against peers, one table."""
    device = args.device
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{name}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    if not args.no_tests:
        files = [f"tests/test_{stage}.py" for stage in ("model", "optimizer", "train", "decoding", "sample")]
        program = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *files]
        try:
            result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=200)
            print(result.stdout[-2000:], flush=True)
        except subprocess.TimeoutExpired:
            print("the tests took more than 200 s", flush=True)
    gemm = machine.gemm_rate(device, "bfloat16")
    print(f"a large product in bfloat16: {gemm / 1e12:.1f} TFLOP/s\n", flush=True)
    T, V = args.block_size, 50304
    config = Config(V, T, **PRESETS[args.preset])
    print(f"{args.preset}, {args.rows} x {T} tokens: tokens/s, share of that rate, GB at most", flush=True)
    with machine.set_up(device, torch.get_num_threads(), False):
        for kind in ("nanoGPT-like", "transformers", "transformers, compiled", "ours, not compiled", "ours"):
            try:
                speed, memory = training_speed(kind, args.preset, args.rows, T, V, device)
            except Exception as error:  # one that fails should not hide the others
                print(f"{kind:24}{type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            mfu = speed * 3 * config.flops_per_token(T) / gemm
            print(f"{kind:24}{speed:12,.0f} {mfu:6.1%} {memory / 1e9:6.1f}", flush=True)
            machine.forget(device)
    bandwidth = read_bandwidth(device)
    print(f"\ndecoding one stream in bfloat16, {bandwidth / 1e9:,.0f} GB/s: tokens/s", flush=True)
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            random_folder(folder, shape, torch.bfloat16)
            n_bytes = 2 * Config(32000, 1024, **SHAPES[shape]).num_params()
            for kind in ("transformers", "eager", "graph", "compile"):
                n = 1000 if kind in ("graph", "compile") else 200
                try:
                    run = decoder(folder, kind, device, torch.bfloat16)
                    run([[1] * 8], n)
                    start = time.perf_counter()
                    run([[1] * 8], n)
                    speed = n / (time.perf_counter() - start)
                except Exception as error:  # one that fails should not hide the others
                    print(f"{shape:6} {kind:24}{type(error).__name__}: {str(error)[:200]}", flush=True)
                    continue
                share = speed * n_bytes / bandwidth
                print(f"{shape:6} {kind:24}{speed:10,.0f} {share:6.1%} of the bandwidth", flush=True)


# --- kills ---


def bench_resume(args):
    """Kill a run at a random moment, let it go on, compare its end with that of a run which nobody killed."""
    draw, same = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as work:
        settings = ["--steps=60", "--batch-size=4", "--eval-every=12", "--save-every=2", "--dropout=0.1"]
        program = [sys.executable, ROOT / "train.py", *settings, "--device=cpu", "--data", args.data, "--out"]

        def ending(out):
            log = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
            state = torch.load(out / "checkpoints/step_000060/train_state.pt", weights_only=True)[
                "optimizers"
            ]
            moments = {f"{name}.{k}": v for name, values in state["state"].items() for k, v in values.items()}
            files = [(out / name).read_bytes() for name in ("model.safetensors", "samples.txt")]
            return files, [row[:2] + row[3:7] for row in log], moments

        def equal(one, other):
            alike = one[2].keys() == other[2].keys()
            return one[:2] == other[:2] and alike and all(torch.equal(one[2][k], other[2][k]) for k in one[2])

        def begin(out):
            """Start a run, wait for its first checkpoint."""
            process = subprocess.Popen([*program, out], stdout=subprocess.DEVNULL)
            while not (out / "checkpoints/step_000000").exists():
                time.sleep(0.005)
            return process, time.time()

        process, start = begin(Path(work) / "reference")
        process.wait()
        whole, reference = time.time() - start, ending(Path(work) / "reference")
        for i in range(args.kills):
            out, wait = Path(work) / str(i), draw.uniform(0, 0.8 * whole)  # the end is that of the process
            process, _ = begin(out)
            time.sleep(wait)
            process.kill()
            process.wait()
            found = sorted(path.name for path in out.glob("checkpoints/*"))
            again = [sys.executable, ROOT / "train.py", "--resume", "--out", out]
            resumed = subprocess.run(again, check=True, capture_output=True, text=True).stdout
            alike = equal(ending(out), reference)
            same += alike
            print(f"{i + 1:3}: killed {wait:4.1f} s after the first checkpoint,", end=" ")
            end = "" if "resumed" in resumed else ", it was at its end"
            print(f"found {', '.join(found)}{end}: {'equal' if alike else 'DIFFERENT'}", flush=True)
            shutil.rmtree(out)
    print(f"{same} of {args.kills} killed runs ended with equal weights, optimizers, samples and log")


def main():
    parser = argparse.ArgumentParser(description="Measure.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("lzma", help="bits per byte by a general compressor")
    command.add_argument("--data", default="pystdlib", help="prepared data (pystdlib)")
    command.set_defaults(bench=bench_lzma)
    command = commands.add_parser("prepare", help="memory of data/prepare.py")
    command.add_argument(
        "--megabytes", type=int, nargs=2, default=(50, 500), help="sizes of the two corpora (50 500)"
    )
    command.set_defaults(bench=bench_prepare)
    command = commands.add_parser("tokenizer", help="learning and applying a vocabulary")
    command.add_argument("--runs", type=int, default=3, help="runs of each (3)")
    command.add_argument("--large", action="store_true", help="also 200 MB of text from installed packages")
    command.set_defaults(bench=bench_tokenizer)
    command = commands.add_parser("learn", help="one run of one learner, for `tokenizer`")
    command.add_argument("corpus", choices=["shakespeare", "stdlib", "packages"])
    command.add_argument("vocab_size", type=int)
    command.add_argument("learner", choices=LEARNERS)
    command.add_argument("--characters", type=int, default=0, help="only so many of the first document")
    command.set_defaults(bench=bench_learn)
    command = commands.add_parser("model", help="time and memory of the loss, of recomputing, of opening")
    command.add_argument("--runs", type=int, default=3, help="runs of each (3)")
    command.add_argument("--job", choices=MODEL_JOBS, help="one run of this one only, as JSON")
    command.set_defaults(bench=bench_model)
    command = commands.add_parser("train", help="a training step, and runs against nanoGPT")
    command.add_argument(
        "--peer", metavar="DIR", help="a checkout of nanoGPT, whose data folder is written to"
    )
    command.add_argument("--runs", type=int, default=3, help="runs of each (3)")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for each (all)")
    command.set_defaults(bench=bench_train)
    command = commands.add_parser("sample", help="decoding, one stream and batches")
    command.add_argument("--peer", metavar="BINARY", help="llama2.c's `run`, with tokenizer.bin beside it")
    command.add_argument("--runs", type=int, default=5, help="runs of each (5)")
    command.add_argument("--tokens", type=int, default=200, help="of one stream (200)")
    command.add_argument("--threads", type=int, default=1, help="for each (1)")
    command.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="rows (1 8 64)")
    command.set_defaults(bench=bench_sample)
    command = commands.add_parser("ladder", help="what each idea buys, in equal time")
    command.add_argument("--seconds", type=float, default=60, help="for each rung (60)")
    command.add_argument("--runs", type=int, default=3, help="of the whole ladder (3)")
    command.set_defaults(bench=bench_ladder)
    command = commands.add_parser("gpu", help="all that needs a GPU")
    command.add_argument("--device", default="cuda", help="another one, to try the benchmark (cuda)")
    command.add_argument("--preset", default="small", choices=PRESETS, help="of the model (small)")
    command.add_argument("--rows", type=int, default=32, help="blocks at a time (32)")
    command.add_argument("--block-size", type=int, default=1024, help="tokens of a block (1024)")
    command.add_argument("--no-tests", action="store_true", help="leave out the tests")
    command.add_argument("--shapes", nargs="+", default=["110 M", "1 B"], choices=SHAPES, help="to decode")
    command.set_defaults(bench=bench_gpu)
    command = commands.add_parser("resume", help="runs that are killed and go on")
    command.add_argument("--kills", type=int, default=20, help="how many (20)")
    command.add_argument("--data", default="pystdlib", help="prepared data (pystdlib)")
    command.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    command.set_defaults(bench=bench_resume)
    args = parser.parse_args()
    args.bench(args)


if __name__ == "__main__":
    main()
