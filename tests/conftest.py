"""What the tests share: tiny real components, and the benchmark text where its path is known."""

import csv
import io
import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from model import Config, Transformer
from tokenizer import Tokenizer
from train import Run

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
    """A script's main() within this process, which is quicker than another one. Returns what it prints."""
    output, before = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), sys.argv
    sys.argv = [str(part) for part in argv]
    try:
        with redirect_stdout(output):
            main()
    finally:
        sys.argv = before
    output.flush()
    return output.buffer.getvalue().decode()


def read_log(out):
    """The rows of log.csv, without the columns that measure time, speed and memory."""
    measured = ("seconds", "tokens_per_second", "mfu", "memory_mb")
    with open(out / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def make_run(**changes):
    """A Run for tests."""
    run = dict(
        preset="nano", seed=0, steps=10, block_size=32, batch_size=4, micro_batch=4, lr=0.03, dropout=0.0
    )
    run |= dict(dtype="float32", eval_every=5, save_every=5, processes=1, threads=torch.get_num_threads())
    return Run(**run | dict(device="cpu", compile=False, deterministic=False) | changes)
