"""A run that may be stopped, killed and gone on with. train.py and finetune.py keep their runs with it.

    out/NAME/                            the newest model, log.csv and samples.txt
    out/NAME/checkpoints/step_000200/    the same at a step, and train_state.pt: what the run needs to go on
    out/NAME/checkpoints/best/           the model with the best validation

A checkpoint is written under another name, flushed to the disk and renamed: what bears its name is whole, and
a crash while saving loses nothing. What is opened cannot run code (`weights_only=True`).
"""

import csv
import os
import pickle
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.distributed.checkpoint import state_dict as distributed

import machine
from decoding import generate
from machine import processes
from sample import OUT, write

STATE, RECORDS = "train_state.pt", ("log.csv", "samples.txt")
WHOLE = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered from all processes
GIVEN = distributed.StateDictOptions(full_state_dict=True, strict=False)  # frozen weights are not kept


# --- writing ---


def save(out, stage, state):
    """Write the checkpoint of state["step"], then put its model into `out`. All processes must call it.

    state: whatever else the run wants to find again; "step" and "best_step" are needed.
    """
    weights = distributed.get_model_state_dict(stage.model, options=WHOLE)
    moments = {}  # before the first step there are none
    if state["step"]:
        moments = distributed.get_optimizer_state_dict(stage.model, stage.optimizers, options=WHOLE)
    folder = out / "checkpoints" / f"step_{state['step']:06}"
    if processes()[0] or folder.exists():
        return
    unfinished = out / "checkpoints" / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        stage.write(unfinished, weights)
        try:
            torch.save(state | {"optimizers": moments}, unfinished / STATE)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise OSError(f"{unfinished / STATE} cannot be written: {error!s:.80}") from None
        for name in RECORDS:
            shutil.copy(out / name, unfinished)
        for path in (*unfinished.rglob("*"), unfinished):
            flush(path)
        unfinished.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    settle(out, state)


def flush(path):
    """Wait until a file or folder is on the disk. Windows offers that for open files only."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def settle(out, state):
    """Let out/ and best/ follow the newest checkpoint and remove old ones. Done twice, it changes nothing."""
    newest = all_checkpoints(out)[-1]
    targets = [out, out / "checkpoints" / "best"] if state["best_step"] == state["step"] else [out]
    for target in targets:
        target.mkdir(exist_ok=True)
        for path in (path for path in newest.rglob("*") if path.is_file()):
            if path.name not in (STATE, *RECORDS):
                place = target / path.relative_to(newest)
                place.parent.mkdir(exist_ok=True)
                shutil.copy(path, place.with_name(f".{path.name}"))
                os.replace(place.with_name(f".{path.name}"), place)
    for old in all_checkpoints(out)[:-2]:
        shutil.rmtree(old)


# --- going on ---


def all_checkpoints(out):
    """The folders of a run's checkpoints, oldest first."""
    return sorted(out.glob("checkpoints/step_*"), key=lambda folder: int(folder.name[5:]))


def read_state(folder):
    """What save was given as `state`, and "optimizers". ValueError: the file is damaged."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder / STATE} is damaged: {' '.join(str(error).split()):.200}") from None


def find_run(out, stage):
    """(folder, state) of the run in `out`, or of the newest (unfinished, if any is) of that stage in out/."""
    found = [out] if out else sorted(OUT.glob("*"), key=lambda run: run.stat().st_mtime, reverse=True)
    finished = None
    for run in found:
        for newest in all_checkpoints(run)[-1:]:
            state = read_state(newest)
            if state.get("stage") == stage:
                if state["step"] < state["run"]["steps"]:
                    return run, state
                finished = finished or (run, state)
    if finished:
        return finished
    where = os.path.relpath(out) if out else "out"
    raise ValueError(f"there is nothing to resume in {where}/: no checkpoints of {stage}")


def refuse_changes(state, found):
    """ValueError: something of what was found is not what the run began with."""
    for what, value in found.items():
        if state.get(what) != value:
            raise ValueError(f"the {what} has changed since the run began, so it cannot be resumed: {value}")


def restore(out, stage, state):
    """Bring model, optimizers, log and samples back to the newest checkpoint, whose state was read.

    Takes "optimizers" out of state, so that the memory is free again.
    """
    folder, moments = all_checkpoints(out)[-1], state.pop("optimizers")
    distributed.set_model_state_dict(stage.model, stage.read(folder), options=GIVEN)
    if moments:
        distributed.set_optimizer_state_dict(stage.model, stage.optimizers, moments, options=WHOLE)
    if processes()[0] == 0:
        for name in RECORDS:
            shutil.copy(folder / name, out)
        settle(out, state)


def make_room(out):
    """Make an empty folder; a run that is there is renamed to the first free NAME.1, NAME.2 ..., aloud."""
    if out.exists() and any(out.iterdir()):
        if not any((out / name).exists() for name in ("config.json", "log.csv")):
            raise ValueError(f"{out} exists and holds no model: choose another --out")
        states = [read_state(folder) for folder in all_checkpoints(out)[-1:]]
        k = 1
        while (aside := out.with_name(f"{out.name}.{k}")).exists():
            k += 1
        out.rename(aside)
        here, there = os.path.relpath(out), os.path.relpath(aside)
        print(f"{here} existed and is now {there}")
        for state in states:
            if state["step"] < state["run"]["steps"]:
                script = "train.py" if state["stage"] == "pretraining" else "finetune.py"
                how = f"python {script} --resume --out {there}"
                print(f"it stopped after step {state['step']:,}; to go on with it: {how}")
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def catch_signals():
    """Inside, SIGINT and SIGTERM ask for a stop, a second one stops at once. Yields a function: asked?"""
    asked = []

    def note(number, frame):
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > 1:  # torchrun and the terminal may send the same one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- records ---


def add_frame(out, stage, step):
    """Add a line to samples.txt: the same prompt and the same dice each time, another model."""
    tokenizer, settings = stage.tokenizer, dict(top_p=1, mode="eager", vocab_size=stage.tokenizer.vocab_size)
    with torch.compiler.set_stance("force_eager"):  # the cache's shapes change with every token
        specials = tokenizer.special_tokens.values()
        steps = generate(stage.model.eval(), [stage.prompt], 30, specials, **settings)
        text = tokenizer.decode(stage.prompt) + "".join(piece for (piece,) in write(tokenizer, steps))
    stage.model.train()
    if processes()[0] == 0:
        with open(out / "samples.txt", "a", encoding="utf-8") as file:
            line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
            file.write(f"{step:8,}  {line}\n")


class Log:
    """The lines of a run: all of them in log.csv, those with an evaluation on the screen too."""

    COLUMNS = {"step": "", "tokens": "", "seconds": ".2f", "train_loss": ".4f", "val_bpb": ".4f", "lr": ".6f"}
    COLUMNS |= {"grad_norm": ".4f", "tokens_per_second": ".0f", "mfu": ".3f", "memory_mb": ".0f"}

    def __init__(self, out, steps, peak, device, more=()):
        """peak: the tokens a second at which the device would do nothing but matrix products.

        more: the names of further columns.
        """
        self.steps, self.peak, self.device, self.more = steps, peak, device, more
        self.terminal = sys.stdout.isatty()
        path = os.devnull if processes()[0] else out / "log.csv"
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.rows = csv.writer(self.file)
        if self.file.tell() == 0:
            self.rows.writerow([*self.COLUMNS, *more])
            self.file.flush()
        heads = f"{'step':>8} {'loss':>8} {'val bpb':>8} {'lr':>8} {'tokens/s':>9} {'MFU':>5} {'left':>8}"
        print(f"\n{heads}", flush=True)

    def start_lap(self, tokens):
        """From here on, speed is measured."""
        self.lap = tokens, time.perf_counter()

    def lap_speed(self, tokens):
        """Tokens a second since start_lap."""
        return (tokens - self.lap[0]) / (time.perf_counter() - self.lap[1])

    def write(self, values):
        """Add a line of {column: value}; what is missing or None stays empty."""
        values["mfu"] = values["tokens_per_second"] / self.peak
        values["memory_mb"] = machine.peak_memory(self.device) / 1e6
        formats = self.COLUMNS | dict.fromkeys(self.more, ".4f")
        found = ((name, values.get(name)) for name in formats)
        row = {name: "" if value is None else format(value, formats[name]) for name, value in found}
        self.rows.writerow(row.values())
        self.file.flush()
        left = timedelta(seconds=round(values["seconds"] / values["step"] * (self.steps - values["step"])))
        step, speed, bpb = values["step"], values["tokens_per_second"], row["val_bpb"]
        line = f"{step:8,} {values['train_loss']:8.4f} {bpb:>8} {values['lr']:8.5f} {speed:9,.0f}"
        line += f" {values['mfu']:5.0%} {left!s:>8}"
        evaluated = "val_bpb" in values
        split = "val_" if evaluated else "train_"
        shown = [name for name in self.more if row[name] and name.startswith(split)]
        others = "; ".join(f"{name.split('_loss ')[-1]} {values[name]:.3f}" for name in shown)
        if evaluated:
            print("\r\033[K" * self.terminal + line + f"\n{'':9}{others}" * bool(others), flush=True)
        elif self.terminal:  # a line that the next one overwrites
            columns = shutil.get_terminal_size().columns
            print(f"\r{line}  {others}"[:columns] + "\033[K", end="", flush=True)
