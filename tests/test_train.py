"""What train.py promises: every block once per epoch, honest numbers, the same digits from the same seed."""

import csv
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS

import train as stage
from data import prepare
from model import Config, Transformer
from tokenizer import Tokenizer


@pytest.fixture
def tokens(tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    return stage.Tokens(tmp_path, "train", "<u2")


def test_shards_are_read_as_one_file(tmp_path):
    ids = np.arange(1000, dtype="<u2")
    for i, part in enumerate(np.split(ids, [300, 301, 700])):
        part.tofile(tmp_path / f"train_{i:03}.bin")
    tokens = stage.Tokens(tmp_path, "train", "<u2")
    assert len(tokens) == 1000
    for start, count in ((0, 1000), (299, 3), (300, 1), (650, 100), (990, 50)):
        assert tokens.read(start, count).tolist() == ids[start : start + count].tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 1000, 4097])
def test_permute_is_a_permutation_that_changes_with_its_key(n):
    first, second = ([stage.permute(i, n, key) for i in range(n)] for key in (1, 2))
    assert sorted(first) == sorted(second) == list(range(n))
    if n > 10:
        assert first != second
        assert abs(np.corrcoef(first, range(n))[0, 1]) < 0.5


def test_every_block_comes_once_per_epoch_and_in_a_new_order(tokens):
    blocks = stage.Blocks(tokens, block_size=16, seed=0)
    epochs = []
    for epoch in range(3):
        ids, targets = blocks.batch(epoch * blocks.per_epoch, blocks.per_epoch)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        starts = sorted(ids[:, 0].tolist())
        assert [b - a for a, b in zip(starts, starts[1:])] == [16] * (blocks.per_epoch - 1)
        epochs.append(ids[:, 0].tolist())
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({epoch[0] % 16 for epoch in epochs}) > 1  # cut at another phase


def test_the_order_does_not_depend_on_how_it_is_read(tokens):
    blocks = stage.Blocks(tokens, block_size=16, seed=3)
    whole, _ = blocks.batch(0, 100)
    pieces = torch.cat([blocks.batch(i, 10)[0] for i in range(0, 100, 10)])
    assert torch.equal(whole, pieces)


def test_bits_per_byte_is_nats_over_ln_2_over_bytes(tmp_path, model, tokenizer):
    end = tokenizer.special_tokens["<|endoftext|>"]
    text = WORDS * 4
    ids = [*tokenizer.encode(text), end, *tokenizer.encode(text), end]
    np.array(ids, dtype="<u2").tofile(tmp_path / "val.bin")
    tokens = stage.Tokens(tmp_path, "val", "<u2")
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        block = torch.tensor([ids[start : start + 33]])
        log_p = model(block[:, :-1]).log_softmax(-1)
        nats -= log_p.gather(-1, block[:, 1:, None]).sum().item()
    n_bytes = 2 * len(text.encode()) - len(
        tokenizer.decode_bytes(ids[:1])
    )  # nothing predicts the first token
    assert stage.bits_per_byte(model, tokens, tokenizer.bytes_per_token) == pytest.approx(
        nats / math.log(2) / n_bytes, rel=1e-5
    )


def test_evaluating_changes_nothing(model, tokens, tokenizer):
    model.train()
    state = torch.get_rng_state()
    limited = stage.Tokens.__new__(stage.Tokens)
    limited.parts, limited.starts = [tokens.parts[0] % 320], tokens.starts
    first, second = (stage.bits_per_byte(model, limited, tokenizer.bytes_per_token, 5) for _ in range(2))
    assert first == second
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_every_parameter_has_one_optimizer_and_muon_takes_the_matrices_of_the_blocks(model):
    muon, adamw = stage.make_optimizers(model, 0.01, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    of_muon, of_adamw = (
        {names[p] for group in o.param_groups for p in group["params"]} for o in (muon, adamw)
    )
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert all("_proj" in name for name in of_muon)
    assert "model.embed_tokens.weight" in of_adamw


def test_the_rate_warms_up_stays_and_falls_to_zero():
    run = stage.Run("nano", 0, 100, 8, 2, 0.03, 0.1, 10, 0.0, "float32", 10, 1)
    shares = [stage.learning_rate(step, run) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1 and shares[39] == 1
    assert shares[70] == pytest.approx(0.5) and 0 < shares[99] < 0.02


# --- the script ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder under data/ for the scripts to find; it is removed afterwards."""
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("".join(f"{WORDS}line {i} of the text\n" for i in range(200)), encoding="utf-8")
    prepare.prepare([str(text)], name="test-train", vocab_size=320)
    yield "test-train"
    prepare.shutil.rmtree(prepare.DATA / "test-train")


def run_script(*arguments, **variables):
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", env={**os.environ, **variables},
    )  # fmt: skip


def test_a_run_learns_logs_and_leaves_a_model_that_opens(prepared, tmp_path):
    result = run_script("--data", prepared, "--steps", 60, "--batch-size", 8, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == "60" and rows[-1]["tokens"] == str(60 * 8 * 128)
    assert float(rows[0]["train_loss"]) == pytest.approx(math.log(320), rel=0.1)
    assert float(rows[-1]["train_loss"]) < 2
    assert [name for name in rows[0] if "bpb" in name] == ["val_bpb"]
    assert f"{float(rows[-1]['val_bpb']):.4f} bits per byte of held-out text after 60 steps" in result.stdout
    assert "A sample:" in result.stdout and "python sample.py" in result.stdout
    model = Transformer.load(tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out/tokenizer.json")
    val = stage.Tokens(prepare.DATA / prepared, "val", "<u2")
    assert stage.bits_per_byte(model, val, tokenizer.bytes_per_token) == pytest.approx(
        float(rows[-1]["val_bpb"]), abs=0.01
    )


def test_the_same_seed_gives_the_same_digits_and_no_run_is_overwritten(prepared, tmp_path):
    for _ in range(2):
        result = run_script(
            "--data", prepared, "--steps", 12, "--batch-size", 4, "--seed", 1, "--out", tmp_path / "out"
        )
        assert result.returncode == 0, result.stderr
    assert "out existed and is now" in result.stdout
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out.1" / name).read_bytes()


def test_a_budget_in_minutes_is_kept(prepared, tmp_path):
    result = run_script("--data", prepared, "--minutes", 0.1, "--batch-size", 8, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out/log.csv", newline="") as file:
        seconds = float(list(csv.DictReader(file))[-1]["seconds"])
    assert 1 < seconds < 30  # 6 are asked for; a busy machine may take longer


def test_ctrl_c_finishes_the_step_and_saves(prepared, tmp_path):
    command = [
        sys.executable,
        ROOT / "train.py",
        "--data",
        prepared,
        "--steps",
        "100000",
        "--eval-every",
        "100",
    ]
    process = subprocess.Popen(
        [*command, "--out", tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    log = tmp_path / "out/log.csv"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""
    assert list(csv.DictReader(log.open()))[-1]["val_bpb"]
    Transformer.load(tmp_path / "out")


def test_a_full_disk_ends_in_one_line(prepared, tmp_path):
    def limit():  # on the size of a file: what a full disk looks like from inside
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    result = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", prepared, "--steps", "5", "--out", tmp_path / "out"],
        capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_diverged_run_keeps_the_last_good_model(prepared, tmp_path):
    arguments = ["--data", prepared, "--steps", 3, "--eval-every", 1, "--lr", 1e30, "--out", tmp_path / "out"]
    result = run_script(*arguments)
    assert result.returncode == 2
    assert "the loss diverged before step" in result.stderr and "Traceback" not in result.stderr
    assert all(p.isfinite().all() for p in Transformer.load(tmp_path / "out").parameters())


def test_a_folder_that_holds_no_model_is_never_moved(prepared, tmp_path):
    (tmp_path / "precious").touch()
    result = run_script("--data", prepared, "--steps", 1, "--out", tmp_path)
    assert result.returncode == 2
    assert "exists and holds no model: choose another --out" in result.stderr
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", str(prepare.DATA)], "no data named "),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--data", "nowhere"], "no data named 'nowhere': prepared are "),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--steps", "-1"], "--steps -1 must be above 0"),
        (["--device", "tpu9"], "there is no device 'tpu9' here"),
        (["--dropout", "1"], "--dropout 1.0 must be at least 0 and below 1"),
        (["--data", "test-train", "--steps", "1", "--block-size", "100000"], "too few for blocks of 100000"),
        (["--data", "test-train", "--steps", "1", "--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(prepared, arguments, message):
    result = run_script(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_damaged_data_is_named(prepared, tmp_path):
    folder = tmp_path / "data"
    prepare.shutil.copytree(prepare.DATA / prepared, folder)
    raw = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="train.bin is missing or cut off"):
        stage.load_data(folder)
    (folder / "train.bin").write_bytes(raw[:-2])
    with pytest.raises(ValueError, match="train.bin has .* prepare it again"):
        stage.load_data(folder)
    (folder / "train.bin").write_bytes(raw)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": "another"}))
    with pytest.raises(ValueError, match="is not the tokenizer that made the data"):
        stage.load_data(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_of_memory_is_near_what_the_backward_pass_keeps(dtype):
    config = Config(1024, 128, n_layer=4, n_head=4, n_kv_head=2, n_embd=256, n_hidden=704)
    model, run = Transformer(config), stage.Run("", 0, 1, 128, 8, 0.03, 0.1, 1, 0.0, dtype, 1, 1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(1024, (8, 128))
    with stage.precision(run, "cpu"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(ids, ids)
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    estimate = stage.training_memory(config, run)
    assert estimate["activations"] == pytest.approx(measured, rel=0.25)
    assert estimate["weights"] == estimate["gradients"] == sum(p.nbytes for p in model.parameters())
    optimizers = stage.make_optimizers(model, 0.01, 0.1)
    model.loss(ids, ids).backward()
    for optimizer in optimizers:
        optimizer.step()
    moments = [t for o in optimizers for state in o.state.values() for t in state.values() if t.ndim]
    assert estimate["moments"] == sum(t.nbytes for t in moments)
