"""What the tests share: tiny real components, and the benchmark text where its path is known."""

import csv
import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from model import Config, Transformer
from tokenizer import Tokenizer
from train import Settings

ROOT = Path(__file__).resolve().parent.parent
# a shell's background job ignores Ctrl-C, and so would the programs that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
WORDS = "the cat sat on the mat and the dog sat on the cat; naïve café 12345 — 日本語\n"


@pytest.fixture(scope="session")
def shakespeare():
    """Path of Tiny Shakespeare, which the variable TINY_SHAKESPEARE names."""
    path = os.environ.get("TINY_SHAKESPEARE")
    if not path:
        pytest.skip("TINY_SHAKESPEARE does not name the text")
    return Path(path)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([WORDS * 3], vocab_size=320)


@pytest.fixture
def tiny_config():
    return Config(vocab_size=320, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64)


@pytest.fixture
def model(tiny_config):
    """A tiny model whose every weight is drawn, so that no test passes because an output projection is
    zero.
    """
    torch.manual_seed(0)
    model = Transformer(tiny_config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    return model.eval()


def run_main(main, *argv):
    """A script's main() in this process, which is faster than a new one -> what it prints.

    Whatever main raises for a user's mistake comes through: ValueError, OSError or argparse.ArgumentError.
    """
    output, before = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), sys.argv
    sys.argv = [str(part) for part in argv]
    try:
        with redirect_stdout(output):
            main()
    finally:
        sys.argv = before
    output.flush()
    return output.buffer.getvalue().decode()


FORKS = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
FORKS.set_forkserver_preload(["torch", "torch._inductor.config"])  # a second each time


def run_script(script, *argv, input=""):
    """subprocess.run of a script of ours, in a process forked from one that has imported torch already.

    input: what comes through a pipe; None: nothing, and it stays open.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = FORKS.Process(target=in_fork, args=(script, list(map(str, argv)), input, folder))
        process.start()
        process.join(120)
        ended = process.exitcode is not None
        process.kill()  # nothing, if it has ended
        printed = [Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    assert ended, f"{script} {argv} does not end: {printed}"
    return CompletedProcess(argv, process.exitcode, *printed)


def in_fork(script, argv, input, folder):
    """What run_script runs there: the script, with standard streams like those of any other process."""
    reading, writing = os.pipe()
    os.dup2(reading, 0)
    if input is not None:
        os.write(writing, input.encode())
        os.close(writing)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, "rw"[number > 0], encoding="utf-8", closefd=False) for number in range(3)
    )
    sys.argv = [script, *argv]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def read_log(out):
    """The rows of log.csv, without the columns that measure time, speed and memory."""
    measured = ("seconds", "tokens_per_second", "mfu")
    with open(out / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def make_settings(**changes):
    """The Settings of a tiny run on the CPU in float32."""
    settings = dict(
        preset="nano",
        seed=0,
        block_size=32,
        batch_size=4,
        micro_batch=4,
        lr=0.03,
        dtype="float32",
        device="cpu",
        processes=1,
        deterministic=False,
        minutes=None,
        steps=10,
        fall=4,
        n_evals=10,
        save_every=None,
    )
    settings.update(changes)
    return Settings(**settings)
