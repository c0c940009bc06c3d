"""What train.py promises: honest numbers, the same digits from the same seed, also after a kill."""

import argparse
import csv
import io
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, WORDS, make_settings, read_log, run_main, run_script

import train as stage
from data import prepare
from data.loader import Blocks, load_data
from model import PRESETS, Transformer
from tokenizer import Tokenizer
from train import (
    Muon,
    NextTokenLoss,
    Pace,
    bits_per_byte,
    block_length,
    fit_micro_batch,
    fraction_done,
    learning_rate,
    make_optimizers,
    open_run,
    orthogonalize,
    step_seed,
    training_step,
)

# --- one step ---


def gradients_after(model, ids, targets, micro_batch):
    """The loss and norm that a training step returns, and the gradients that its optimizers see."""
    seen = {}

    class Spy(torch.optim.SGD):
        def step(self):
            seen.update((name, p.grad.clone()) for name, p in model.named_parameters())

    spy = Spy([{"params": model.parameters(), "initial_lr": 0.0}], lr=0.0)
    n = int((targets != -100).sum())
    settings = make_settings(micro_batch=micro_batch)
    rows, norm = training_step(NextTokenLoss(model), [spy], (ids, targets), n, 1.0, settings)
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


class LimitedMemory(NextTokenLoss):
    """A loss that runs out of memory above some number of rows."""

    def __init__(self, model, most, error):
        super().__init__(model)
        self.most, self.error, self.tried = most, error, []

    def forward(self, ids, targets):
        self.tried.append(len(ids))
        if len(ids) > self.most:
            raise self.error
        return super().forward(ids, targets)


FULL = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
)


@pytest.mark.parametrize("error", FULL)
def test_a_micro_batch_that_does_not_fit_is_halved_aloud(model, error, capsys):
    ids = torch.randint(320, (12, 32))
    objective, settings = LimitedMemory(model, 3, error), make_settings(batch_size=12, micro_batch=12)
    fit_micro_batch(objective, (ids, ids), settings)
    assert settings.micro_batch == 3 and objective.tried == [12, 6, 3]
    assert capsys.readouterr().out.count("out of memory: trying") == 2
    assert all(p.grad is None for p in model.parameters())


def test_memory_for_less_than_a_row_names_what_to_change(model):
    ids = torch.randint(320, (2, 32))
    with pytest.raises(ValueError, match="one row at a time: take shorter rows or a smaller model"):
        fit_micro_batch(LimitedMemory(model, 0, FULL[0]), (ids, ids), make_settings(micro_batch=2))


def test_another_error_in_the_first_batch_is_not_taken_for_full_memory(model):
    ids = torch.randint(320, (2, 32))
    with pytest.raises(RuntimeError, match="something else"):
        fit_micro_batch(LimitedMemory(model, 0, RuntimeError("something else")), (ids, ids), make_settings())


def test_where_compiling_fails_the_run_goes_on_without_and_says_so(model, capsys):
    ids = torch.randint(320, (4, 32))
    objective, settings = NextTokenLoss(model), make_settings(compile=True)

    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    objective.compile(backend=backend)
    try:
        fit_micro_batch(objective, (ids, ids), settings)
        assert "torch.compile fails here" in capsys.readouterr().out and not settings.compile
        assert objective(ids, ids)[0].item() == pytest.approx(model.summed_loss(ids, ids)[0].item())
    finally:
        torch.compiler.set_stance("default")


# --- the optimizers ---


def test_every_parameter_has_one_optimizer_and_muon_takes_the_matrices_of_the_blocks(model):
    muon, adamw = make_optimizers(model, 0.01, 0.1, torch.float32)
    names = {p: name for name, p in model.named_parameters()}
    of_muon, of_adamw = (
        {names[p] for group in o.param_groups for p in group["params"]} for o in (muon, adamw)
    )
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert all("_proj" in name for name in of_muon)
    assert "model.embed_tokens.weight" in of_adamw


def test_muon_computes_what_pytorch_s_muon_computes():
    """To the bit, though it takes matrices of one shape together."""
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (24, 8), (8, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        Muon([{"params": ours[:3]}, {"params": ours[3:], "lr": 0.1}], lr=0.02, weight_decay=0.1),
        torch.optim.Muon(
            [{"params": theirs[:3]}, {"params": theirs[3:], "lr": 0.1}],
            lr=0.02,
            weight_decay=0.1,
            momentum=0.9,
        ),
    ]
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


def test_muon_leaves_a_weight_without_gradient_alone():
    frozen, p = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.eye(4)
    Muon([frozen, p], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(frozen, torch.ones(4, 4)) and not torch.equal(p, frozen)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape, dtype):
    torch.manual_seed(0)
    X = torch.randn(shape)
    result = orthogonalize(X, dtype).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3  # the smallest of 16 x 16 start near zero
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (U @ V).flatten(), dim=0) > 0.95


# --- the schedule ---


def test_the_rate_warms_up_stays_and_falls_to_zero():
    settings = make_settings(steps=100, fall=40)
    rates = [learning_rate(step, fraction_done(step, 0, settings), settings) for step in range(100)]
    assert rates[0] == 0.05 and rates[19] == 1 and rates[39] == 1
    assert rates[70] == pytest.approx(0.5) and 0 < rates[99] < 0.02
    settings = make_settings(steps=1, fall=0.4)
    assert learning_rate(0, 0, settings) == 1


class FakeClock:
    """Instead of time.perf_counter: a time that a test sets."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(stage.time, "perf_counter", lambda: self.now)


def run_by_the_clock(monkeypatch, seconds_of_step, minutes=1.0, eval_seconds=0.5, **changes):
    """A run in pretended time -> (settings, seconds at the end, [(step, rate, seconds of evaluations)])."""
    clock = FakeClock(monkeypatch)
    settings = make_settings(minutes=minutes, steps=None, fall=None, **changes)
    pace, step, rates, evaluated = Pace(settings, 0, 0.0, 4), 0, [], []
    while step != settings.steps:
        rates.append(learning_rate(step, pace.done, settings))
        clock.now += seconds_of_step(clock.now)
        step += 1
        evaluating, logging = pace.advance(step)
        if logging:
            pace.end_lap(step)
            pace.decide_steps(step)
        if evaluating:
            evaluated.append(clock.now)
            clock.now += eval_seconds * (4 if step == settings.steps else 1)
        if logging:
            pace.begin_lap(step, evaluating)
    return settings, clock.now, rates, evaluated


@pytest.mark.parametrize("step_seconds", [0.01, 0.1, 0.7])
def test_a_budget_is_used_up_and_the_rate_falls_over_what_is_left(monkeypatch, step_seconds):
    settings, seconds, rates, evaluated = run_by_the_clock(monkeypatch, lambda now: step_seconds)
    assert seconds == pytest.approx(60, rel=0.03)
    assert rates.index(1) <= max(50, 0.06 * 60 / step_seconds)  # warm after 50 steps or 5 % of the budget
    assert settings.fall * step_seconds == pytest.approx(0.4 * 60, rel=0.15)
    assert rates[settings.fall - 1] == 1 > rates[settings.fall + 1] and rates[-1] < 0.1
    assert 6 <= len(evaluated) <= 10


def test_a_disturbance_at_the_start_does_not_change_what_fits(monkeypatch):
    """Ten times as slow for the first 10 seconds: the steps that are left are counted at the later speed."""
    calm, _, _, _ = run_by_the_clock(monkeypatch, lambda now: 0.1)
    disturbed, seconds, _, _ = run_by_the_clock(monkeypatch, lambda now: 1.0 if now < 10 else 0.1)
    assert seconds == pytest.approx(60, rel=0.03)
    assert disturbed.steps > 0.8 * calm.steps


def test_the_steps_that_are_left_are_counted_at_the_speed_of_whole_blocks(monkeypatch):
    settings, seconds, _, _ = run_by_the_clock(monkeypatch, lambda now: 0.05 if now < 0.3 * 60 else 0.1)
    assert seconds == pytest.approx(60, rel=0.03)
    assert settings.fall == pytest.approx(18 / 0.05 + 6 / 0.1, rel=0.1)


def test_a_run_begins_with_short_blocks():
    settings = make_settings(block_size=256)
    assert [block_length(done, settings) for done in (0.0, 0.29, 0.3, 0.9)] == [64, 64, 256, 256]
    assert block_length(0.0, replace(settings, compile=True)) == 256  # it would be compiled twice
    for block_size in (32, 64, 100):
        assert block_length(0.0, replace(settings, block_size=block_size)) == block_size


def test_slow_evaluations_become_fewer(monkeypatch):
    settings, seconds, _, evaluated = run_by_the_clock(monkeypatch, lambda now: 0.1, eval_seconds=3)
    assert settings.n_evals == 2 and len(evaluated) <= 4
    assert seconds == pytest.approx(60, rel=0.1)


def test_of_two_limits_the_first_one_ends_the_run(monkeypatch):
    settings, seconds, _, _ = run_by_the_clock(monkeypatch, lambda now: 0.1, max_steps=100)
    assert settings.steps == 100 and settings.fall == 40 and seconds < 20
    settings, seconds, _, _ = run_by_the_clock(monkeypatch, lambda now: 0.1, max_steps=100000)
    assert seconds == pytest.approx(60, rel=0.03)


PLENTY = 10**12  # tokens of text


def test_the_preset_follows_from_the_budget_and_the_kind_of_machine():
    def preset(minutes, *machine, n_tokens=PLENTY):
        return stage.choose_preset(minutes, *machine, n_tokens, 4096)[0]

    for machine in (
        ("cpu", "float32", 2),
        ("cpu", "bfloat16", 2),
        ("mps", "float32", 1),
        ("cuda", "bfloat16", 1),
    ):
        chosen = [preset(minutes, *machine) for minutes in (0.01, 0.5, 3, 30, 300, 3000)]
        sizes = [list(PRESETS).index(name) for name in chosen]
        assert sizes == sorted(sizes) and len(set(chosen)) > 1
    assert preset(3, "cpu", "float32", 2) == "pico" and preset(30, "cpu", "float32", 2) == "nano"
    assert preset(3, "cpu", "float32", 2) == preset(1.5, "cpu", "float32", 4)
    assert preset(3, "cuda", "bfloat16", 1) == "small"
    assert "2 CPU threads with float32" in stage.choose_preset(3, "cpu", "float32", 2, PLENTY, 4096)[1]


def test_a_small_text_gets_a_small_model():
    for n_tokens, expected in ((1000, "pico"), (1_000_000, "nano"), (3_000_000, "micro"), (PLENTY, "small")):
        preset, reason = stage.choose_preset(3, "cuda", "bfloat16", 1, n_tokens, 4096)
        assert preset == expected and (f"{n_tokens:,} tokens" in reason) == (n_tokens < PLENTY)


def choose_with_reason(n_tokens, device, **options):
    """What choose_settings gives for a text of n_tokens."""
    known = dict(dtype="float32", minutes=None, steps=None, evals=10, save_every=None, seed=None, preset=None)
    known |= dict(batch_size=None, block_size=None, lr=None, dropout=0.0, compile=None, deterministic=False)
    data = SimpleNamespace(train=range(n_tokens), tokenizer=SimpleNamespace(vocab_size=2048))
    return stage.choose_settings(SimpleNamespace(**known | options), device, data)


def choose(n_tokens, device="cpu", **options):
    settings, _ = choose_with_reason(n_tokens, device, **options)
    return settings


def test_a_small_text_is_read_in_hundreds_of_steps_but_eight_times_at_most():
    for n_tokens in (10**4, 10**5, 10**6, 10**9):
        for block_size in (None, 16, 512):
            settings = choose(n_tokens, block_size=block_size)
            read = settings.max_steps * settings.batch_size * settings.block_size
            tokens_per_step = settings.batch_size * settings.block_size
            assert read < 8 * n_tokens + tokens_per_step and tokens_per_step <= 2048
            assert settings.batch_size == 1 or tokens_per_step == 2048 or 400 <= settings.max_steps < 800
    assert choose(10**4, batch_size=12).batch_size == 12
    assert choose(10**4, steps=100).batch_size == 8 and choose(10**4, steps=100).max_steps is None


def test_the_plan_says_why_this_preset(tokenizer, capsys):
    data = SimpleNamespace(train=range(10**4), tokenizer=tokenizer)
    for options, reason in (({"preset": "nano", "steps": 5}, "as you asked"), ({"steps": 5}, "are assumed)")):
        stage.show_plan(*choose_with_reason(10**4, "cpu", **options), data)
        assert capsys.readouterr().out.splitlines()[1].endswith(reason)


def test_the_batch_suits_the_model_and_the_device():
    small = dict(preset="small", dtype="bfloat16")
    sizes = [(s.batch_size, s.block_size) for s in (choose(10**9, **small), choose(10**9, "cuda", **small))]
    assert sizes == [(8, 256), (128, 1024)]
    assert choose(10**9, minutes=0.5).block_size < choose(10**9, minutes=3).block_size


def test_evaluations_of_a_fixed_number_of_steps_follow_from_the_step():
    due = []
    for _ in range(2):
        pace, found = Pace(make_settings(steps=300, fall=120), 0, 0.0, 1), []
        for step in range(1, 301):
            evaluating, _ = pace.advance(step)
            if evaluating:
                found.append(step)
        due.append(found)
    assert due[0] == due[1] == list(range(30, 301, 30))


def test_every_step_draws_other_masks_for_dropout():
    seeds = {step_seed(make_settings(seed=seed), step) for seed in range(3) for step in range(100)}
    assert len(seeds) == 300


def test_a_measurement_is_compared_with_what_is_usual(monkeypatch):
    data = SimpleNamespace(name="pystdlib", tokenizer=SimpleNamespace(vocab_size=2048))
    curves = {"constant": {0.2: 2.0, 0.8: 1.8}, "end": {0.8: 1.6, 3.2: 1.3}}
    monkeypatch.setattr(stage, "USUAL", {"nano": curves})
    settings = make_settings(block_size=256, batch_size=8, lr=0.02, steps=1000, fall=400)
    per_step = 8 * 256 / 1e6
    for millions, expected in ((0.201, 2.0), (0.4, 1.9), (0.799, 1.8)):
        found = stage.usual_bpb(millions / per_step, settings, data)
        assert found == pytest.approx(expected, abs=2e-3)
    found = stage.usual_bpb(1000, settings, data)
    assert found == pytest.approx(1.6 - 0.3 * math.log(1000 * per_step / 0.8) / math.log(4), abs=1e-3)
    assert stage.usual_bpb(500, settings, data) is None  # the rate falls
    assert stage.usual_bpb(10, settings, data) is None  # too early
    for changes in ({"lr": 0.01}, {"preset": "small"}, {"batch_size": 16}, {"dropout": 0.1}):
        assert stage.usual_bpb(300, replace(settings, **changes), data) is None
    for changes in ({"name": "mine"}, {"tokenizer": SimpleNamespace(vocab_size=4096)}):
        assert stage.usual_bpb(300, settings, SimpleNamespace(**vars(data) | changes)) is None
    assert stage.compare_with_usual(1.35, 1.3) == "about 1.30 is usual here"
    assert "--device cpu" in stage.compare_with_usual(1.44, 1.3)


def test_what_is_usual_falls_with_the_tokens():
    for curves in stage.USUAL.values():
        for curve in curves.values():
            assert list(curve) == sorted(curve)
            assert list(curve.values()) == sorted(curve.values(), reverse=True)


def test_a_device_that_computes_something_else_is_found(tiny_config, monkeypatch, capsys):
    before = torch.random.get_rng_state()
    stage.compare_with_cpu(replace(tiny_config, dropout=0.5), "cpu")
    assert "check     cpu and CPU agree in float32: loss " in capsys.readouterr().out
    assert torch.equal(torch.random.get_rng_state(), before)

    class Wrong(Transformer):
        def to(self, device):  # forgets the weight of one norm on its way
            torch.nn.init.zeros_(self.model.layers[1].input_layernorm.weight)
            return super().to(device)

    monkeypatch.setattr(stage, "Transformer", Wrong)
    stage.compare_with_cpu(tiny_config, "cpu")
    assert "check     WRONG in 1 of 1 processes: loss " in capsys.readouterr().out


@pytest.mark.parametrize(("n_slow", "busy"), [(0, False), (10, False), (50, True)])
def test_a_run_on_a_busy_machine_says_so(n_slow, busy, tmp_path, capsys):
    """100 laps of a second or, when other programs run, of 3."""
    rows, seconds = ["seconds,tokens_per_second", "1,10"], 1
    for lap in range(100):
        slow = lap % 100 < n_slow
        seconds += 3 if slow else 1
        rows.append(f"{seconds},{100 / (3 if slow else 1)}")
    (tmp_path / "log.csv").write_text("\n".join(rows), encoding="utf-8")
    expected = 3 * n_slow / (101 + 2 * n_slow)
    assert stage.slow_share(tmp_path) == pytest.approx(expected)
    stage.say_if_busy(tmp_path)
    assert ("the machine was busy" in capsys.readouterr().out) == busy
    (tmp_path / "log.csv").write_text("\n".join(rows[:10]), encoding="utf-8")
    assert stage.slow_share(tmp_path) == 0


# --- bits per byte ---


def test_bits_per_byte_is_nats_over_ln_2_over_bytes(model, tokenizer):
    end = tokenizer.special_tokens["<|endoftext|>"]
    text = WORDS * 4
    ids = [*tokenizer.encode(text), end, *tokenizer.encode(text), end]
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        block = torch.tensor([ids[start : start + 33]])
        log_p = model(block[:, :-1]).log_softmax(-1)
        nats -= log_p.gather(-1, block[:, 1:, None]).sum().item()
    n_bytes = 2 * len(text.encode()) - len(tokenizer.decode_bytes(ids[:1]))  # nothing predicts the first
    measured = bits_per_byte(model, torch.tensor(ids).numpy(), tokenizer.bytes_per_token)
    assert measured == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_evaluating_changes_nothing(model, tokenizer):
    tokens = torch.arange(1000).numpy() % 320
    model.train()
    state = torch.get_rng_state()
    first, second = (bits_per_byte(model, tokens, tokenizer.bytes_per_token, 5 * 32) for _ in range(2))
    assert first == second
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


# --- the script ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder under data/ for the scripts to find; it is removed afterwards."""
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("".join(f"{WORDS}line {i} of the text\n" for i in range(200)), encoding="utf-8")
    prepare.prepare([str(text)], name="test-train", vocab_size=320)
    yield "test-train"
    shutil.rmtree(prepare.DATA / "test-train")


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
    for name in ("model.safetensors", "config.json", "samples.txt", "best/model.safetensors"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert read_log(out) == read_log(other)
    states = [torch.load(folder / "train_state.pt", weights_only=True) for folder in (out, other)]
    assert states[0].keys() == states[1].keys()
    for name in states[0].keys() - {"seconds", "lengths", "optimizers", "weights", "settings"}:
        assert states[0][name] == states[1][name], name
    for name, p in states[0]["weights"].items():
        assert torch.equal(p, states[1]["weights"][name])
    for ours, theirs in zip(*(state["optimizers"] for state in states)):
        assert ours["param_groups"] == theirs["param_groups"]
        for number, moments in ours["state"].items():
            assert all(torch.equal(value, theirs["state"][number][key]) for key, value in moments.items())


SHORT = ("--steps", 24, "--evals", 3, "--save-every", 3, "--batch-size", 2, "--dropout", 0.1)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def reference(prepared, tmp_path_factory):
    """A short run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    result = run_script("train.py", "--data", prepared, *SHORT, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_a_run_learns_logs_and_leaves_a_model_that_opens(prepared, tmp_path):
    out = tmp_path / "out"
    result = run_script("train.py", "--data", prepared, "--steps", 60, "--batch-size", 8, "--out", out)
    assert result.returncode == 0, result.stderr
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == "60" and rows[-1]["tokens"] == str(60 * 8 * 256)
    assert float(rows[0]["train_loss"]) == pytest.approx(math.log(320), rel=0.1)
    assert float(rows[-1]["train_loss"]) < 2
    assert 0 < float(rows[-1]["mfu"]) < 1
    assert [name for name in rows[0] if "bpb" in name] == ["val_bpb"]
    assert f"{float(rows[-1]['val_bpb']):.4f} bits per byte of held-out text after 60 steps" in result.stdout
    assert "python sample.py" in result.stdout
    model, data = Transformer.load(out), load_data(prepare.DATA / prepared)
    bpb = bits_per_byte(model, data.val, Tokenizer.load(out / "tokenizer.json").bytes_per_token)
    assert bpb == pytest.approx(float(rows[-1]["val_bpb"]), abs=0.01)


def test_all_steps_have_as_many_tokens_and_a_model_knows_the_longest_block_that_it_has_seen(
    prepared, tmp_path, monkeypatch
):
    read, saved = [], []

    def step(objective, optimizers, batch, n_targets, lr_scale, settings):
        read.append((*batch[0].shape, settings.micro_batch))
        assert {block.dropout.p for block in objective.model.model.layers} == {0.1}
        return training_step(objective, optimizers, batch, n_targets, lr_scale, settings)

    def save(out, state, model, optimizers):
        saved.append(model.config.block_size)

    monkeypatch.setattr(stage, "training_step", step)
    monkeypatch.setattr(stage, "save_state", save)
    data = load_data(prepare.DATA / prepared)
    settings = make_settings(preset="pico", block_size=128, batch_size=4, micro_batch=2, dropout=0.1)
    tmp_path.joinpath("samples.txt").touch()
    stage.train(settings, data, Blocks(data.train, 128, 0), tmp_path)
    assert read == 3 * [(8, 64, 4)] + 7 * [(4, 128, 2)]
    assert saved == 3 * [64] + 7 * [128]
    with open(tmp_path / "log.csv", newline="") as file:
        flops = [float(row["mfu"]) / float(row["tokens_per_second"]) for row in csv.DictReader(file)]
    config = Transformer.load(tmp_path).config
    expected = config.flops_per_token(64) / config.flops_per_token(128)
    assert flops[0] / flops[-1] == pytest.approx(expected, rel=0.01)
    assert Transformer.load(tmp_path).config.block_size == 128


def test_samples_show_one_prompt_at_every_evaluation(reference):
    out, printed = reference
    lines = (out / "samples.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines] == ["0", "8", "16", "24"]
    prompts, texts = {line[10:18] for line in lines}, {line[10:] for line in lines}
    assert len(prompts) == 1 and len(texts) > 1  # while the rate falls, two may be equal
    assert all(line in printed for line in lines)


def test_what_was_chosen_is_printed_before_the_first_step(reference):
    before = reference[1].split("val bpb")[0]
    for name in ("data", "model", "device", "batch", "steps", "text", "rates"):
        assert f"\n{name:10}" in f"\n{before}"
    first = reference[1].split("val bpb")[1].splitlines()[1]
    assert first.split()[0] == "1" and first.endswith("an even guess: ln 320 = 5.7683")
    assert float(first.split()[1]) == pytest.approx(math.log(320), abs=0.02)


def test_a_run_leaves_one_file_to_resume_from_and_the_best_model(reference):
    names = {path.name for path in reference[0].iterdir()} - {".lock"}
    assert names == {
        "best", "config.json", "generation_config.json", "log.csv", "model.safetensors", "samples.txt",
        "tokenizer.json", "tokenizer_config.json", "train_state.pt",
    }  # fmt: skip
    Transformer.load(reference[0] / "best")


def test_the_same_seed_gives_the_same_digits_and_no_run_is_overwritten(prepared, reference, tmp_path):
    out = tmp_path / "out"
    run_here("--data", prepared, *SHORT, "--seed", 1, "--out", out)
    assert "out existed and is now" in run_here("--data", prepared, *SHORT, "--out", out)
    assert_same_run(out, reference[0])
    assert read_log(out) != read_log(tmp_path / "out.1")


def test_evaluating_and_saving_more_often_changes_no_weight(prepared, reference, tmp_path):
    often = [*SHORT[:2], "--evals", 8, *SHORT[6:]]
    run_here("--data", prepared, *often, "--out", tmp_path / "out")
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    assert weights == (reference[0] / "model.safetensors").read_bytes()


def test_a_compiled_run_learns_the_same_and_saves_the_plain_names(prepared, tmp_path, monkeypatch):
    shape = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_hidden=64)  # compiles faster
    monkeypatch.setitem(PRESETS, "nano", shape)
    losses = {}
    for option in ("--compile", "--no-compile"):
        out = tmp_path / option[2:]
        options = ("--steps", 4, "--batch-size", 2, "--block-size", 32, "--dtype", "float32", option)
        run_here("--data", prepared, *options, "--out", out)
        losses[option] = [float(row["train_loss"]) for row in read_log(out)]
    assert losses["--compile"] == pytest.approx(losses["--no-compile"], abs=0.01)
    assert Transformer.load(tmp_path / "compile")


# --- save and resume ---


def kill_after(process, out, n_saves):
    """Kill a run as soon as it has saved n_saves times, or is in the middle of the next save."""
    seen = set()
    deadline = time.monotonic() + 90
    while len(seen) < n_saves:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        if (out / "train_state.pt").exists():
            seen.add((out / "train_state.pt").stat().st_mtime_ns)
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("n_saves", [1, 3, 6])
def test_a_killed_run_continues_to_the_same_bits(prepared, reference, tmp_path, n_saves):
    out = tmp_path / "out"
    kill_after(start("--data", prepared, *SHORT, "--out", out), out, n_saves)
    assert "resumed" in run_here("--resume", "--out", out)
    assert_same_run(out, reference[0])
    assert not list(out.rglob("*unfinished*"))


@pytest.mark.parametrize("moment", ["state", "rename", "model"])
def test_a_run_killed_while_saving_continues_alike(prepared, reference, tmp_path, monkeypatch, moment):
    """Before the new file has its name, just after, and while the model's own files are moved."""
    out, calls = tmp_path / "out", []

    class Killed(BaseException):
        pass

    def die_at(function, condition, name):
        def replacement(*args, **keywords):
            if condition(*args):
                calls.append(name)
                if len(calls) == 3:
                    raise Killed
            return function(*args, **keywords)

        return replacement

    with monkeypatch.context() as patch:
        if moment == "state":
            patch.setattr(stage.torch, "save", die_at(torch.save, lambda state, file: True, moment))
        else:
            wanted = {"rename": "train_state.pt", "model": "model.safetensors"}[moment]
            patch.setattr(os, "replace", die_at(os.replace, lambda a, b: Path(b) == out / wanted, moment))
        with pytest.raises(Killed):
            run_here("--data", prepared, *SHORT, "--out", out)
    assert len(calls) == 3
    assert "resumed" in run_here("--resume", "--out", out)
    assert_same_run(out, reference[0])


@needs_cuda
@pytest.mark.parametrize("compiling", ["--compile", "--no-compile"])
def test_a_killed_deterministic_run_on_a_gpu_continues_to_the_same_bits(prepared, tmp_path, compiling):
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
    out = tmp_path / "out"
    kill_after(start("--data", prepared, *options, "--out", out), out, 3)
    result = run_process("--resume", "--out", out, "--device", "cuda")
    assert result.returncode == 0, result.stderr
    assert_same_run(out, tmp_path / "reference")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_go_on_and_leaves_no_trace(prepared, reference, tmp_path, stop):
    out = tmp_path / "out"
    process = start("--data", prepared, *SHORT, "--out", out)
    wait_for(out / "train_state.pt", process)
    os.killpg(process.pid, stop)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == ""
    assert "to go on: python train.py --resume --out" in printed
    assert "is now" in run_here("--data", prepared, "--steps", 1, "--out", out)  # makes room
    moved = tmp_path / "out.1"
    run_here("--resume", "--out", moved)
    assert_same_run(moved, reference[0])
    assert "is finished: 24 steps" in run_here("--resume", "--out", moved)


def test_without_a_name_the_newest_run_of_the_script_is_found(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "OUT", tmp_path)
    for i, name in enumerate(("old", "new")):
        shutil.copytree(reference[0], tmp_path / name)
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "newest-but-empty").mkdir()
    arguments = argparse.Namespace(resume=True, out=None, device=None)
    out, state = open_run(arguments, "train.py")
    assert out == tmp_path / "new" and state["step"] == 24 and arguments.device == "cpu"
    with pytest.raises(ValueError, match="no saved run of finetune.py"):
        open_run(arguments, "finetune.py")


def test_a_second_process_on_the_same_folder_is_refused_and_moves_nothing(prepared, tmp_path):
    out = tmp_path / "out"
    process = start("--data", prepared, "--steps", 10000, "--save-every", 1, "--out", out)
    wait_for(out / "train_state.pt", process)
    for arguments in (("--data", prepared, "--steps", 1), ("--resume",)):
        result = run_script("train.py", *arguments, "--device", "cpu", "--out", out)
        assert result.returncode == 2
        assert "another process is training in" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out.1").exists()
    os.killpg(process.pid, signal.SIGKILL)  # a killed process leaves no lock behind
    process.communicate()
    assert "is now" in run_here("--data", prepared, "--steps", 1, "--out", out)


def test_a_run_is_resumed_with_what_it_began_with_or_not_at_all(prepared, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    with pytest.raises(ValueError, match="--lr: a resumed run keeps its settings"):
        run_here("--resume", "--out", out, "--lr", 1)
    with pytest.raises(ValueError, match="nothing to resume in .*nowhere"):
        run_here("--resume", "--out", tmp_path / "nowhere")
    other = tmp_path / "b.txt"
    other.write_text("".join(f"{WORDS}line {i} of the text\n" for i in range(201)), encoding="utf-8")
    tokenizer = Tokenizer.load(prepare.DATA / prepared / "tokenizer.json")
    try:
        state = torch.load(out / "train_state.pt", weights_only=True)
        torch.save(state | {"data": "test-other"}, out / "train_state.pt")
        prepare.prepare([str(other)], name="test-other", tokenizer=tokenizer)
        with pytest.raises(ValueError, match="the text has changed since the run began"):
            run_here("--resume", "--out", out)
        prepare.prepare([str(other)], name="test-other", vocab_size=330)
        with pytest.raises(ValueError, match="the t.* has changed since the run began"):
            run_here("--resume", "--out", out)
    finally:
        shutil.rmtree(prepare.DATA / "test-other")
    state = out / "train_state.pt"
    raw = state.read_bytes()
    middle = len(raw) // 2
    flipped = raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]
    for wrong in (raw[:-1000], flipped, b"", b"x" * 1000):
        state.write_bytes(wrong)
        with pytest.raises(ValueError, match="train_state.pt is damaged"):
            run_here("--resume", "--out", out)


def test_a_resumed_run_tries_its_memory_before_the_optimizers_fill_it(reference, tmp_path, monkeypatch):
    out, order = tmp_path / "out", []
    shutil.copytree(reference[0], out)
    state = stage.read_state(out)
    settings = stage.Settings(**state["settings"])
    data = load_data(prepare.DATA / state["data"])
    monkeypatch.setattr(stage, "fit_micro_batch", lambda *_: order.append("fit"))
    monkeypatch.setattr(stage, "restore", lambda *_: order.append("restore"))
    stage.train(settings, data, Blocks(data.train, settings.block_size, 0), out, state)  # nothing is left
    assert order == ["fit", "restore"]


def test_the_last_evaluation_takes_more_text_than_the_others_but_not_any_amount(
    prepared, tmp_path, monkeypatch
):
    asked = []

    def measure(model, tokens, bytes_per_token, n_tokens):
        asked.append(n_tokens)
        return 1.0

    monkeypatch.setattr(stage, "bits_per_byte", measure)
    run_here("--data", prepared, *SHORT, "--out", tmp_path / "out")
    assert asked == [stage.EVAL_TOKENS] * 3 + [stage.LAST_EVAL_TOKENS]


def test_a_run_that_cannot_begin_moves_nothing(prepared, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    with pytest.raises(ValueError, match="too few for blocks of 100000"):
        run_here("--data", prepared, "--steps", 1, "--block-size", 100000, "--out", out)
    assert (out / "model.safetensors").exists() and not (tmp_path / "out.1").exists()


def test_a_resumed_run_keeps_its_dtype_and_says_where_another_is_faster(monkeypatch, capsys):
    monkeypatch.setattr(stage, "fast_dtype", lambda device: torch.float32)
    for dtype, said in (("bfloat16", True), ("float32", False)):
        settings = make_settings(dtype=dtype)
        stage.move_settings(settings, "cpu", 5)
        assert settings.dtype == dtype
        assert ("began with bfloat16 products and keeps them" in capsys.readouterr().out) == said


def test_a_resumed_run_is_shared_by_other_processes_if_each_gets_a_row(monkeypatch, capsys):
    settings = make_settings(batch_size=5, micro_batch=5)
    monkeypatch.setattr(stage, "choose_dtype", lambda device: settings.dtype)
    for world, micro_batch in ((1, 5), (2, 3), (5, 1)):
        monkeypatch.setattr(stage, "rank_and_world", lambda world=world: (0, world))
        stage.move_settings(settings, "cpu", 5)
        assert (settings.processes, settings.micro_batch) == (world, micro_batch)
    assert "it began on 1 x cpu, now 2 x cpu" in capsys.readouterr().out
    monkeypatch.setattr(stage, "rank_and_world", lambda: (0, 6))
    with pytest.raises(ValueError, match="6 processes are too many for this run: a batch has 5 rows"):
        stage.move_settings(settings, "cpu", 5)


def test_a_state_that_was_saved_again_before_the_lock_is_not_resumed(reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    with pytest.raises(ValueError, match="has just gone on: resume it again"):
        stage.claim(out, {"step": 21})
    with stage.claim(out, {"step": 24}), pytest.raises(ValueError, match="another process is training"):
        stage.lock(out)


def test_a_budget_in_minutes_is_kept(prepared, tmp_path):
    small = ("--batch-size", 2, "--block-size", 8)  # many steps before the text was read 8 times
    printed = run_here("--data", prepared, "--minutes", 0.1, *small, "--out", tmp_path / "out")
    with open(tmp_path / "out/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert 1 < float(rows[-1]["seconds"]) < 30  # 6 are asked for; a busy machine may take longer
    assert f"\nsteps     {int(rows[-1]['step']):,} in all" in printed
    assert float(rows[-1]["lr"]) < 0.2 * max(float(row["lr"]) for row in rows)


def test_on_a_terminal_each_line_that_stays_has_a_line_of_its_own(prepared, tmp_path, monkeypatch):
    class LogOnTerminal(stage.Log):
        def __init__(self, *args):
            super().__init__(*args)
            self.on_terminal = True

    monkeypatch.setattr(stage, "Log", LogOnTerminal)
    small = ("--batch-size", 2, "--block-size", 8)
    printed = run_here("--data", prepared, "--minutes", 0.05, *small, "--out", tmp_path / "out")
    assert printed.count("\r") > 2  # lines in the place of others; a busy machine makes few steps
    for begin in ("steps  ", "text  ", "\r\033[K       1 "):
        assert f"\n{begin}" in printed


def test_under_minutes_a_text_is_read_eight_times_at_most(prepared, tmp_path):
    printed = run_here("--data", prepared, "--minutes", 30, "--block-size", 256, "--out", tmp_path / "out")
    steps = 8 * (5381 // 256 - 1)
    assert f"or 8 epochs ({steps} steps) if that is less" in printed
    assert f"bits per byte of held-out text after {steps} steps" in printed
    assert "the text was read 8 times, so the run ended" in printed
    assert "pico: " in printed and "1 blocks of 256 tokens" in printed


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_save_good(prepared, tmp_path):
    out = tmp_path / "out"

    def limit():  # on the size of a file: what a full disk looks like from inside
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    arguments = ["--data", prepared, "--steps", 4, "--save-every", 2, "--out", out]
    result = run_process(*arguments, limit=limit)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(out.glob("*unfinished*")) and not list(out.glob(".unfinished*"))
    process = start(*arguments[:3], 10000, *arguments[4:])
    wait_for(out / "train_state.pt", process)
    size = (out / "train_state.pt").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size - 1, size - 1))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "train_state.pt cannot be written" in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert Transformer.load(out)
    assert "optimizers" in torch.load(out / "train_state.pt", weights_only=True)


def test_a_diverged_run_keeps_the_last_good_model(prepared, tmp_path):
    arguments = ["--data", prepared, "--steps", 9, "--evals", 9, "--lr", 1e30, "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="the loss diverged: try a lower --lr; "):
        run_here(*arguments)
    for path in (tmp_path / "out").glob("model.safetensors"):
        assert all(p.isfinite().all() for p in Transformer.load(path.parent).parameters())


def test_a_folder_that_holds_no_run_is_never_moved(prepared, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="exists and holds no run: choose another --out"):
        run_here("--data", prepared, "--steps", 1, "--out", tmp_path)
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", str(prepare.DATA)], "no data named "),
        (["--seed", "-1"], "-1 must be at least 0"),
        (["--data", "nowhere"], "no data named 'nowhere': prepared are "),
        (["--minutes", "0"], "argument --minutes: 0 must be positive"),
        (["--steps", "-1"], "argument --steps: -1 must be positive"),
        (["--steps", "5", "--minutes", "5"], "argument --minutes: not allowed with argument --steps"),
        (["--device", "tpu9"], "argument --device: invalid choice: 'tpu9'"),
        (["--device", "mps"], "there is no device 'mps' here"),
        (["--dropout", "1"], "argument --dropout: 1 must be at least 0 and below 1"),
        (["--data", "test-train", "--steps", "1", "--block-size", "100000"], "too few for blocks of 100000"),
    ],
)
def test_a_mistake_is_named(prepared, arguments, message):
    with pytest.raises((ValueError, argparse.ArgumentError)) as error:
        run_here(*arguments)
    assert message in str(error.value)


def test_a_name_that_the_terminal_cannot_show_stops_no_run(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as end:
        stage.run(lambda: print("out/语料"))
    output.flush()
    assert not end.value.code and output.buffer.getvalue() == b"out/\\u8bed\\u6599\n"


def test_a_mistake_ends_in_one_line_and_status_2(prepared):
    result = run_script("train.py", "--data", "test-train", "--steps", "1", "--out", "/proc/nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "/proc/nowhere" in result.stderr


@pytest.mark.parametrize("arguments", [["--out", "/proc/nowhere"], ["--lr", "-1"], ["--lr", "x"]])
def test_a_mistake_is_one_line_on_stderr(prepared, arguments):
    result = run_script("train.py", "--data", "test-train", "--steps", "1", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# --- several processes ---

SHARED = ("--steps", 20, "--evals", 5, "--batch-size", 4, "--dtype", "float32", "--lr", 0.005)


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    run_here("--data", prepared, *SHARED, "--out", out)
    return out


def assert_close_logs(out, other):
    """But for rounding: sums are taken in another order."""
    for row, expected in zip(read_log(out), read_log(other), strict=True):
        for name in ("step", "tokens", "lr"):
            assert row[name] == expected[name]
        assert float(row["train_loss"]) == pytest.approx(float(expected["train_loss"]), abs=0.005)
        assert float(row["val_bpb"] or 0) == pytest.approx(float(expected["val_bpb"] or 0), abs=0.005)
        assert float(row["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=0.1)


def test_two_processes_learn_what_one_learns_and_one_can_go_on(prepared, alone, tmp_path):
    process = start("--data", prepared, *SHARED, "--out", tmp_path / "out", processes=2)
    wait_for(tmp_path / "out/train_state.pt", process)
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    assert "to go on: python train.py --resume" in process.communicate(timeout=60)[0]
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    assert "it began on 2 x cpu, now 1 x cpu" in run_here("--resume", "--out", tmp_path / "out")
    assert_close_logs(tmp_path / "out", alone)
    result = run_process("--resume", "--out", tmp_path / "again", processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("bits per byte of held-out text") == 1
    assert_close_logs(tmp_path / "again", alone)
    assert len(list((tmp_path / "again/samples.txt").open())) == 6


def test_two_processes_can_go_on_with_the_run_of_one(prepared, alone, tmp_path):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        saved = []

        def stop_after_the_second_save(*args):
            stage_save(*args)
            saved.append(args)
            if len(saved) == 2:
                raise KeyboardInterrupt

        stage_save = stage.save_state
        patch.setattr(stage, "save_state", stop_after_the_second_save)
        with pytest.raises(KeyboardInterrupt):
            run_here("--data", prepared, *SHARED, "--out", out)
    result = run_process("--resume", "--out", out, processes=2)
    assert result.returncode == 0, result.stderr
    assert_close_logs(out, alone)


def test_a_killed_process_ends_the_others_with_a_message(prepared, tmp_path):
    out = tmp_path / "out"
    arguments = ("--data", prepared, "--steps", 10000, "--batch-size", 4, "--save-every", 1, "--out", out)
    process = start(*arguments, processes=2)
    wait_for(out / "train_state.pt", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error: the processes lost each other" in errors
