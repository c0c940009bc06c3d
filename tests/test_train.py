"""What train.py promises: honest numbers, the same digits from the same seed, also after a kill."""

import csv
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, make_run, read_log, run_main, run_script

import checkpoint
import loop
import machine
import train as stage
from data import loader, prepare
from model import Config, Transformer
from optimizer import make_optimizers
from tokenizer import Tokenizer


def test_bits_per_byte_is_nats_over_ln_2_over_bytes(tmp_path, model, tokenizer):
    end = tokenizer.special_tokens["<|endoftext|>"]
    text = WORDS * 4
    ids = [*tokenizer.encode(text), end, *tokenizer.encode(text), end]
    np.array(ids, dtype="<u2").tofile(tmp_path / "val.bin")
    tokens = loader.Tokens(tmp_path, "val", "<u2")
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        block = torch.tensor([ids[start : start + 33]])
        log_p = model(block[:, :-1]).log_softmax(-1)
        nats -= log_p.gather(-1, block[:, 1:, None]).sum().item()
    n_bytes = 2 * len(text.encode()) - len(tokenizer.decode_bytes(ids[:1]))  # nothing predicts the first
    measured, _ = loop.bits_per_byte(model, tokens, tokenizer.bytes_per_token)
    assert measured == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_evaluating_changes_nothing(tmp_path, model, tokenizer):
    (np.arange(1000, dtype="<u2") % 320).tofile(tmp_path / "val.bin")
    tokens = loader.Tokens(tmp_path, "val", "<u2")
    model.train()
    state = torch.get_rng_state()
    first, second = (loop.bits_per_byte(model, tokens, tokenizer.bytes_per_token, 5) for _ in range(2))
    assert first == second
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def gradients_after(model, ids, targets, micro_batch):
    """The loss of a training step and the gradients that its optimizers would see, unclipped in direction."""
    seen = {}

    class Spy(torch.optim.SGD):
        def step(self):
            seen.update((name, p.grad.clone()) for name, p in model.named_parameters())

    spy = Spy([{"params": model.parameters(), "initial_lr": 0.0}], lr=0.0)
    given = SimpleNamespace(model=model, optimizers=[spy], loss_of=loop.next_token_loss)
    n = int((targets != -100).sum())
    rows, norm = loop.training_step(given, (ids, targets), n, 1.0, make_run(micro_batch=micro_batch))
    return rows.sum() / n, norm, seen


def test_micro_batches_are_one_big_batch_averaged_per_token(model):
    """Also where they have unlike numbers of targets: a mean of means would be wrong."""
    ids, targets = torch.randint(320, (2, 6, 32))
    targets[0], targets[1, :20] = -100, -100
    loss, norm, whole = gradients_after(model, ids, targets, 6)
    assert loss.item() == pytest.approx(model.loss(ids, targets).item(), abs=1e-6)
    for micro_batch in (1, 2, 4):
        parts = gradients_after(model, ids, targets, micro_batch)
        assert parts[0].item() == pytest.approx(loss.item(), abs=1e-6)
        assert parts[1].item() == pytest.approx(norm.item(), rel=1e-5)
        for name in whole:
            torch.testing.assert_close(parts[2][name], whole[name], atol=1e-6, rtol=1e-5)


def test_a_compiled_run_learns_the_same_and_saves_the_plain_names(prepared, tmp_path):
    losses = {}
    for option in ("--compile", "--no-compile"):
        out = tmp_path / option[2:]
        options = ("--steps", 4, "--batch-size", 2, "--block-size", 32, "--dtype", "float32", option)
        run_here("--data", prepared, *options, "--out", out)
        losses[option] = [float(row["train_loss"]) for row in read_log(out)]
    assert losses["--compile"] == pytest.approx(losses["--no-compile"], abs=0.01)
    assert Transformer.load(tmp_path / "compile")


def test_running_out_of_memory_says_what_to_change(tiny_config):
    run = make_run(batch_size=8, micro_batch=8)
    tuning = machine.replace(run, preset="")
    with pytest.raises(ValueError, match="--lora-rank 8 less"), machine.explain_memory(tiny_config, tuning):
        torch.empty(2**60)
    with (
        pytest.raises(ValueError, match="--batch-size 4 needs about .* GB, --block-size 16 needs about"),
        machine.explain_memory(tiny_config, run),
    ):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="anything else"), machine.explain_memory(tiny_config, run):
        raise RuntimeError("anything else")


def test_dropout_draws_other_masks_at_every_step_and_in_every_process(prepared, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        torch, "manual_seed", lambda seed, draw=torch.manual_seed: (seeds.append(seed), draw(seed))
    )
    run_here("--data", prepared, "--steps", 4, "--batch-size", 2, "--dropout", 0.5, "--out", tmp_path / "out")
    masks = []
    for seed in seeds[-4:]:
        torch.manual_seed(seed)
        masks.append(torch.rand(8).tolist())
    assert len({tuple(mask) for mask in masks}) == 4


def test_micro_batches_are_chosen_to_fit():
    shape, run = Config(50304, 1024, **stage.PRESETS["small"]), make_run(batch_size=96, block_size=1024)
    run.micro_batch = machine.fit_micro_batch(shape, run, "cpu")
    assert 96 % run.micro_batch == 0
    assert 0.2 * machine.memory_of("cpu") < sum(machine.training_memory(shape, run).values())
    assert sum(machine.training_memory(shape, run).values()) < 0.8 * machine.memory_of("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_of_memory_is_near_what_the_backward_pass_keeps(dtype):
    config = Config(1024, 128, n_layer=4, n_head=4, n_kv_head=2, n_embd=256, n_hidden=704)
    model, run = Transformer(config), make_run(block_size=128, micro_batch=8, dtype=dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(1024, (8, 128))
    with (
        machine.precision("cpu", dtype),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.loss(ids, ids)
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    estimate = machine.training_memory(config, run)
    assert estimate["activations"] == pytest.approx(measured, rel=0.25)
    assert estimate["weights"] == estimate["gradients"] == sum(p.nbytes for p in model.parameters())
    optimizers = make_optimizers(model, 0.01, 0.1)
    model.loss(ids, ids).backward()
    for optimizer in optimizers:
        optimizer.step()
    moments = [t for o in optimizers for state in o.state.values() for t in state.values() if t.ndim]
    assert estimate["moments"] == sum(t.nbytes for t in moments)


# --- the script ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder under data/ for the scripts to find; it is removed afterwards."""
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("".join(f"{WORDS}line {i} of the text\n" for i in range(200)), encoding="utf-8")
    prepare.prepare([str(text)], name="test-train", vocab_size=320)
    yield "test-train"
    prepare.shutil.rmtree(prepare.DATA / "test-train")


def command(*arguments, processes=1):
    """train.py as a user calls it, on the CPU also where there is a GPU, unless arguments name a device."""
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    device = () if "--device" in arguments else ("--device", "cpu")
    return [*program, ROOT / "train.py", *map(str, (*arguments, *device))]


def run_process(*arguments, limit=None, processes=1):
    return subprocess.run(
        command(*arguments, processes=processes),
        capture_output=True, text=True, encoding="utf-8", preexec_fn=limit,
    )  # fmt: skip


def start(*arguments, processes=1):
    return subprocess.Popen(
        command(*arguments, processes=processes),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def run_here(*arguments):
    return run_main(stage.main, *command(*arguments)[1:])


def assert_same_run(out, other):
    """Weights, optimizers, samples and log are equal to the bit."""
    for name in ("model.safetensors", "config.json", "samples.txt", "checkpoints/best/model.safetensors"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert read_log(out) == read_log(other)
    step = max(path.name for path in out.glob("checkpoints/step_*"))
    states = []
    for folder in (out, other):
        state = torch.load(folder / "checkpoints" / step / "train_state.pt", weights_only=True)
        states.append({k: v for k, v in state.items() if k != "seconds"})
    optimizers, others = (state.pop("optimizers")["state"] for state in states)
    assert states[0] == states[1]
    assert optimizers.keys() == others.keys()
    for name, moments in optimizers.items():
        assert all(torch.equal(value, others[name][key]) for key, value in moments.items())


SHORT = ("--steps", 24, "--eval-every", 8, "--save-every", 3, "--batch-size", 2, "--dropout", 0.1)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def reference(prepared, tmp_path_factory):
    """A short run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    result = run_script("train.py", "--data", prepared, *SHORT, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_a_run_learns_logs_and_leaves_a_model_that_opens(prepared, tmp_path):
    result = run_script(
        "train.py", "--data", prepared, "--steps", 60, "--batch-size", 8, "--out", tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == "60" and rows[-1]["tokens"] == str(60 * 8 * 128)
    assert float(rows[0]["train_loss"]) == pytest.approx(math.log(320), rel=0.1)
    assert float(rows[-1]["train_loss"]) < 2
    assert 0 < float(rows[-1]["mfu"]) < 1 and float(rows[-1]["memory_mb"]) > 50
    assert [name for name in rows[0] if "bpb" in name] == ["val_bpb"]
    assert f"{float(rows[-1]['val_bpb']):.4f} bits per byte of held-out text after 60 steps" in result.stdout
    assert "python sample.py" in result.stdout
    model = Transformer.load(tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out/tokenizer.json")
    val = loader.Tokens(prepare.DATA / prepared, "val", "<u2")
    bpb, _ = loop.bits_per_byte(model, val, tokenizer.bytes_per_token)
    assert bpb == pytest.approx(float(rows[-1]["val_bpb"]), abs=0.01)


def test_samples_show_one_prompt_at_every_evaluation(reference):
    out, printed = reference
    lines = (out / "samples.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines] == ["0", "8", "16", "24"]
    assert len({line[10:18] for line in lines}) == 1 and len({line[10:] for line in lines}) == 4
    assert all(line in printed for line in lines)


def test_what_is_derived_is_printed_before_the_first_step(reference):
    before = reference[1].split("val bpb")[0]
    for name in ("data", "model", "device", "dtype", "compile", "memory", "a step", "steps", "text", "rates"):
        assert f"\n{name:10}" in f"\n{before}"
    assert "a loss of 5.77 = ln 320" in before


def test_the_last_two_checkpoints_and_the_best_are_kept(reference):
    names = sorted(path.name for path in (reference[0] / "checkpoints").iterdir())
    assert names == ["best", "step_000021", "step_000024"]
    Transformer.load(reference[0] / "checkpoints/best")


def test_the_same_seed_gives_the_same_digits_and_no_run_is_overwritten(prepared, reference, tmp_path):
    out = tmp_path / "out"
    run_here("--data", prepared, *SHORT, "--seed", 1, "--out", out)
    assert "out existed and is now" in run_here("--data", prepared, *SHORT, "--out", out)
    assert_same_run(out, reference[0])
    assert read_log(out) != read_log(tmp_path / "out.1")


def test_evaluating_and_saving_more_often_changes_no_weight(prepared, reference, tmp_path):
    often = [*SHORT[:2], "--eval-every", 3, *SHORT[6:]]
    run_here("--data", prepared, *often, "--out", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        reference[0] / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("places", [["step_000000"], ["step_000009"], ["step_000006", "unfinished"]])
def test_a_killed_run_goes_on_to_the_same_bits(prepared, reference, tmp_path, places):
    out = tmp_path / "out"
    process = start("--data", prepared, *SHORT, "--out", out)
    for place in places:
        wait_for(out / "checkpoints" / place, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    printed = run_here("--resume", "--out", out)
    assert "resumed" in printed
    assert_same_run(out, reference[0])
    assert not list(out.rglob("*unfinished*")) and not list(out.glob(".*"))


@needs_cuda
@pytest.mark.parametrize("compiling", ["--compile", "--no-compile"])
def test_a_killed_deterministic_run_on_a_gpu_goes_on_to_the_same_bits(prepared, tmp_path, compiling):
    options = (
        *SHORT,
        "--preset",
        "nano",
        "--block-size",
        64,
        "--deterministic",
        compiling,
        "--device",
        "cuda",
    )
    assert run_process("--data", prepared, *options, "--out", tmp_path / "reference").returncode == 0
    process = start("--data", prepared, *options, "--out", tmp_path / "out")
    wait_for(tmp_path / "out/checkpoints/step_000009", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    result = run_process("--resume", "--out", tmp_path / "out", "--device", "cuda")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "out", tmp_path / "reference")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_go_on_and_leaves_no_trace(prepared, reference, tmp_path, stop):
    out = tmp_path / "out"
    process = start("--data", prepared, *SHORT, "--out", out)
    wait_for(out / "checkpoints/step_000003", process)
    os.killpg(process.pid, stop)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == ""
    assert "to go on: python train.py --resume --out" in printed
    assert "is now" in run_here("--data", prepared, "--steps", 1, "--out", out)  # makes room
    moved = tmp_path / "out.1"
    run_here("--resume", "--out", moved)
    assert_same_run(moved, reference[0])
    assert "is finished: 24 steps" in run_here("--resume", "--out", moved)


def test_a_run_killed_after_its_last_checkpoint_puts_that_into_place(reference, tmp_path):
    out = tmp_path / "out"
    prepare.shutil.copytree(reference[0], out)
    good = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes((out / "checkpoints/step_000021/model.safetensors").read_bytes())
    assert "is finished" in run_here("--resume", "--out", out)
    assert (out / "model.safetensors").read_bytes() == good


def test_without_a_name_the_newest_unfinished_run_is_found(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "OUT", tmp_path)
    for i, name in enumerate(("old", "new")):
        prepare.shutil.copytree(reference[0], tmp_path / name)
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "newest-but-empty").mkdir()
    assert checkpoint.find_run(None, "pretraining")[0] == tmp_path / "new", "all are finished"
    prepare.shutil.rmtree(checkpoint.all_checkpoints(tmp_path / "old")[-1])
    os.utime(tmp_path / "old", (0, 0))
    assert checkpoint.find_run(None, "pretraining")[0] == tmp_path / "old"
    with pytest.raises(ValueError, match="no checkpoints of finetuning"):
        checkpoint.find_run(None, "finetuning")


def test_a_new_run_says_how_to_go_on_with_an_unfinished_one(prepared, tmp_path):
    out = tmp_path / "out"
    process = start("--data", prepared, "--steps", 10000, "--out", out)
    wait_for(out / "checkpoints/step_000000", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    printed = run_here("--data", prepared, "--steps", 1, "--out", out)
    assert "to go on with it: python train.py --resume --out" in printed and "out.1" in printed


def test_a_run_is_resumed_with_what_it_began_with_or_not_at_all(prepared, reference, tmp_path):
    out = tmp_path / "out"
    prepare.shutil.copytree(reference[0], out)
    with pytest.raises(ValueError, match="--lr: a resumed run keeps its settings"):
        run_here("--resume", "--out", out, "--lr", 1)
    with pytest.raises(ValueError, match="nothing to resume in .*nowhere"):
        run_here("--resume", "--out", tmp_path / "nowhere")
    other = tmp_path / "b.txt"
    other.write_text("".join(f"{WORDS}line {i} of the text\n" for i in range(201)), encoding="utf-8")
    tokenizer = Tokenizer.load(prepare.DATA / prepared / "tokenizer.json")
    try:
        prepare.prepare([str(other)], name="test-other", tokenizer=tokenizer)
        with pytest.raises(ValueError, match="the text has changed since the run began"):
            run_here("--resume", "--out", out, "--data", "test-other")
        prepare.prepare([str(other)], name="test-other", vocab_size=330)
        with pytest.raises(ValueError, match="the t.* has changed since the run began"):
            run_here("--resume", "--out", out, "--data", "test-other")
    finally:
        prepare.shutil.rmtree(prepare.DATA / "test-other")
    state = out / "checkpoints/step_000024/train_state.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="train_state.pt is damaged"):
        run_here("--resume", "--out", out)


def test_a_budget_in_minutes_is_kept(prepared, tmp_path):
    run_here("--data", prepared, "--minutes", 0.1, "--batch-size", 8, "--out", tmp_path / "out")
    with open(tmp_path / "out/log.csv", newline="") as file:
        seconds = float(list(csv.DictReader(file))[-1]["seconds"])
    assert 1 < seconds < 30  # 6 are asked for; a busy machine may take longer


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_good(prepared, tmp_path):
    def limit():  # on the size of a file: what a full disk looks like from inside
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    arguments = ["--data", prepared, "--steps", 4, "--save-every", 2, "--out", tmp_path / "out"]
    result = run_process(*arguments, limit=limit)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list((tmp_path / "out/checkpoints").iterdir())
    process = start(*arguments[:3], 10000, *arguments[4:])
    wait_for(tmp_path / "out/checkpoints/step_000002", process)
    sizes = [path.stat().st_size for path in (tmp_path / "out/checkpoints/step_000002").iterdir()]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (max(sizes) - 1, max(sizes) - 1))  # train_state.pt
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "train_state.pt cannot be written" in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1
    good = sorted((tmp_path / "out/checkpoints").glob("step_*"))[-1]
    assert Transformer.load(good) and Transformer.load(tmp_path / "out")
    assert "optimizers" in torch.load(good / "train_state.pt", weights_only=True)


def test_a_diverged_run_keeps_the_last_good_model(prepared, tmp_path):
    arguments = ["--data", prepared, "--steps", 9, "--eval-every", 1, "--lr", 1e30, "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="the loss diverged: try a lower --lr; "):
        run_here(*arguments)
    assert all(p.isfinite().all() for p in Transformer.load(tmp_path / "out").parameters())


def test_a_folder_that_holds_no_model_is_never_moved(prepared, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="exists and holds no model: choose another --out"):
        run_here("--data", prepared, "--steps", 1, "--out", tmp_path)
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", str(prepare.DATA)], "no data named "),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--data", "nowhere"], "no data named 'nowhere': prepared are "),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--steps", "-1"], "--steps -1 must be above 0"),
        (["--steps", "5", "--minutes", "5"], "--minutes and --steps exclude each other"),
        (["--device", "tpu9"], "--device tpu9 must be cpu, cuda or mps"),
        (["--device", "mps"], "there is no device 'mps' here"),
        (["--dropout", "1"], "--dropout 1.0 must be at least 0 and below 1"),
        (["--data", "test-train", "--steps", "1", "--block-size", "100000"], "too few for blocks of 100000"),
    ],
)
def test_a_mistake_is_named(prepared, arguments, message):
    with pytest.raises(ValueError) as error:
        run_here(*arguments)
    assert message in str(error.value)


def test_a_mistake_ends_in_one_line_and_status_2(prepared):
    result = run_script("train.py", "--data", "test-train", "--steps", "1", "--out", "/proc/nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "/proc/nowhere" in result.stderr


# --- several processes ---


SHARED = ("--steps", 20, "--eval-every", 4, "--batch-size", 4, "--dtype", "float32", "--lr", 0.005)


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    run_here("--data", prepared, *SHARED, "--out", out)
    return out


def assert_close_logs(out, other):
    """Sums are taken in another order, and Muon works in bfloat16, where that may turn a bit of 2 ** -8."""
    for row, expected in zip(read_log(out), read_log(other), strict=True):
        assert (row["step"], row["tokens"], row["lr"]) == (
            expected["step"],
            expected["tokens"],
            expected["lr"],
        )
        assert float(row["train_loss"]) == pytest.approx(float(expected["train_loss"]), abs=0.02)
        assert float(row["val_bpb"] or 0) == pytest.approx(float(expected["val_bpb"] or 0), abs=0.02)
        assert float(row["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=0.3)  # not twice


def test_two_processes_learn_what_one_learns_and_one_can_go_on(prepared, alone, tmp_path):
    process = start("--data", prepared, *SHARED, "--out", tmp_path / "out", processes=2)
    wait_for(tmp_path / "out/checkpoints/step_000004", process)
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    assert "to go on: python train.py --resume" in process.communicate(timeout=60)[0]
    prepare.shutil.copytree(tmp_path / "out", tmp_path / "again")
    assert "it began on 2 x cpu, now 1 x cpu" in run_here("--resume", "--out", tmp_path / "out")
    assert_close_logs(tmp_path / "out", alone)
    result = run_process("--resume", "--out", tmp_path / "again", processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("bits per byte of held-out text") == 1
    assert_close_logs(tmp_path / "again", alone)
    assert len(list((tmp_path / "again/samples.txt").open())) == 6


def test_two_processes_can_go_on_with_the_run_of_one(prepared, alone, tmp_path):
    out = tmp_path / "out"
    prepare.shutil.copytree(alone, out)
    for path in (out / "checkpoints").glob("step_000020"):
        prepare.shutil.rmtree(path)
    result = run_process("--resume", "--out", out, processes=2)
    assert result.returncode == 0, result.stderr
    assert_close_logs(out, alone)


def test_a_killed_process_ends_the_others_with_a_message(prepared, tmp_path):
    out = tmp_path / "out"
    process = start("--data", prepared, "--steps", 10000, "--batch-size", 4, "--out", out, processes=2)
    wait_for(out / "checkpoints/step_000000", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error: the processes lost each other" in errors
