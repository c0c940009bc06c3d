"""Stage 5: fine-tuning. A base model goes on with a text; here it learns to answer, then to prefer.

    <|im_start|>user\\nList the arguments of: def f(a, b):<|im_end|>\\n<|im_start|>assistant\\na, b<|im_end|>
                                                                                        ^^^^^^^^^^^^^^
The loss is that of pretraining, but only of what the assistant says. To prefer one answer to another is the
part of preference.py, a thin update instead of all weights that of lora.py, and scoring.py counts what was
learned.

    python finetune.py                          teach the newest base model small tasks, and measure it
    python finetune.py --model DIR --examples chat.jsonl --lora-rank 8
    python finetune.py --model DIR --examples pairs.jsonl --method dpo
    python finetune.py --resume                 go on exactly where the newest run stopped
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import machine
from data import tasks
from data.examples import identity, n_replayed, read_material
from data.loader import Blocks
from data.prepare import DATA
from loop import (
    REPLAYED,
    Run,
    Stage,
    bits_per_byte,
    fresh_state,
    means,
    measure_step,
    next_token_loss,
    sum_losses,
    train,
)
from lora import add_lora, base_of, load_adapter, merge, num_lora_params, put_adapter, save_adapter
from machine import over_processes, processes
from model import Transformer, config_from_json, load_safetensors
from preference import MEASURES, cache_references, dpo_loss
from sample import OUT, end_ids, render
from scoring import answer, report, yardsticks
from tokenizer import Tokenizer
from train import EVAL_TOKENS, check_arguments, in_common, say

MINUTES, EPOCHS = 3, 3  # whichever ends first, unless one is asked for
N_EVALS = 6  # in a run
REPLAY = 0.3  # a tenth left more than twice as much forgotten
LORA_LR, DPO_LR = 3, 0.1  # times the rate of full, supervised fine-tuning


@dataclass
class Tuning(Run):
    """What decides a run, besides the model and the examples."""

    method: str = "sft"
    lora_rank: int = 0  # 0: all weights learn
    lora_alpha: float = 0.0
    beta: float = 0.0
    likelihood: float = 0.0
    replay: float = 0.0


# --- the model ---


def add_rows(model, n_known, n):
    """Make room for n tokens in a model that knows n_known: the new ones start at the mean of the others."""
    size, dice = max(model.config.vocab_size, -(-n // 64) * 64), torch.Generator().manual_seed(0)
    for part in filter(None, (model.model.embed_tokens, model.lm_head)):
        known = part.weight.detach()[:n_known].float().cpu()
        noise = torch.randn(size - n_known, known.size(1), generator=dice)  # or no two could be told apart
        rows = torch.cat((known, known.mean(0) + 0.01 * known.std(0) * noise))
        part.weight = torch.nn.Parameter(rows.to(part.weight))
    model.config = replace(model.config, vocab_size=size)


def open_base(run, material, device):
    """The model that a run starts from, as the run wants it."""
    dtype = None if run.lora_rank else torch.float32  # what is frozen may stay as small as it is
    model = Transformer.load(material.base, device, dtype)
    n_known = Tokenizer.load(material.base / "tokenizer.json").vocab_size
    if material.tokenizer.vocab_size > n_known:
        add_rows(model, n_known, material.tokenizer.vocab_size)
    if run.lora_rank:
        add_lora(model, run.lora_rank, run.lora_alpha)
    if material.adapter:
        put_adapter(model, material.adapter)
    return model.train()


# --- the stage ---


def base_bpb(model, data, n_tokens=None):
    """Bits per byte of what the base model was trained on: what it rises by was forgotten."""
    n_blocks = n_tokens and max(1, n_tokens // model.config.block_size)
    return bits_per_byte(model, data.val, data.tokenizer.bytes_per_token, n_blocks)[0]


def write_model(folder, weights, model, run, material):
    """Write the files of a model: with LoRA the merged one, and the update in a folder of its own."""
    if run.lora_rank:
        base = os.path.relpath(material.base)
        save_adapter(folder / "adapter", weights, run.lora_rank, run.lora_alpha, base)
        weights = merge(weights, run.lora_alpha / run.lora_rank)
    tokenizer = material.tokenizer
    im_end = tokenizer.special_tokens["<|im_end|>"]
    ends = [*sorted(end_ids(material.base, tokenizer) - {im_end}), im_end]
    model.save(folder, tokenizer, weights, ends)


def read_weights(folder, run):
    """What write_model wrote and a run goes on with."""
    if run.lora_rank:
        return load_adapter(folder / "adapter")[0]
    return load_safetensors(folder / "model.safetensors")


def begin(run, material, device):
    """Fine-tuning from its first step, as a Stage."""
    torch.manual_seed(run.seed)
    examples, dev, data, tokenizer = material.train, material.dev, material.data, material.tokenizer
    model = machine.distribute(open_base(run, material, device), run, device)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=run.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer.param_groups[0]["initial_lr"] = run.lr
    measures, loss_of, channels = ("loss",), next_token_loss, examples.channels
    if run.method == "dpo":
        measures, loss_of = MEASURES, partial(dpo_loss, beta=run.beta, likelihood=run.likelihood)
    n_replay = n_replayed(run)
    if n_replay:
        blocks, channels = Blocks(data.train, run.block_size, run.seed), [*channels, REPLAYED]

    def read_batch(step):
        batch = examples.batch(step, *processes())
        if not n_replay:
            return batch
        T = batch[0].size(1)  # of the blocks, as much as the examples are long
        ids, targets, _, _ = blocks.batch(step * n_replay, n_replay, *processes())
        counts, channel = torch.full([len(ids)], T), torch.full([len(ids)], len(channels) - 1)
        return tuple(map(torch.cat, zip(batch, (ids[:, :T], targets[:, :T], counts, channel))))

    def evaluate(step):
        score, values = -step, {"val_bpb": None}  # without examples to judge by, the newest model is the best
        with machine.precision(device, run.dtype):
            if data:
                values["val_bpb"] = base_bpb(model, data, EVAL_TOKENS if step < run.steps else None)
            if dev:
                batches = (dev.tensors(indices, *processes()) for indices in dev.by_length())
                sums = sum_losses(model, loss_of, batches, len(dev.channels))
                values |= means(measures, dev.channels, sums, "val")
                score = values["val_loss"]
        return score, values

    columns = [f"val_{name}" for name in measures] if dev else []
    columns += [f"val_loss {name}" for name in dev.channels] if dev else []
    return Stage(
        model=model,
        optimizers=[optimizer],
        tokenizer=tokenizer,
        read_batch=read_batch,
        evaluate=evaluate,
        write=partial(write_model, model=model, run=run, material=material),
        read=partial(read_weights, run=run),
        prompt=render(tokenizer, (material.test or examples.examples)[0].question, answer=True)[0],
        loss_of=loss_of,
        measures=measures,
        channels=channels,
        columns=columns,
    )


def judge(stage, material):
    """What is compared before and after: answers to the test, bits per byte of the base model's own text."""
    tokenizer, test = stage.tokenizer, material.test
    longest = max((len(tokenizer.encode(example.answer)) for example in test), default=0) + 8
    said = answer(stage.model, tokenizer, [example.question for example in test], longest)
    return {"answers": said, "bpb": base_bpb(stage.model, material.data) if material.data else None}


# --- the run ---


def newest_base():
    """The folder under out/ whose model was saved last, of those that do not chat."""
    for path in sorted(OUT.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True):
        tokenizer = Tokenizer.load(path.parent / "tokenizer.json")
        if tokenizer.special_tokens.get("<|im_end|>") not in end_ids(path.parent, tokenizer):
            return path.parent
    raise ValueError("there is no base model under out/ yet: run `python train.py`, or name one with --model")


def config_of(base):
    """The Config of a model folder."""
    if not (base / "config.json").exists():
        raise ValueError(f"{base} is no model folder: it has no config.json")
    return config_from_json(json.loads((base / "config.json").read_bytes()))


def data_of(base):
    """The name of the data that a model was trained on; None: it does not say, or that is not there."""
    for folder in checkpoint.all_checkpoints(base)[-1:]:
        name = checkpoint.read_state(folder).get("data")
        return name if name and (DATA / name / "meta.json").exists() else None


def settings(args, config, device):
    """(Tuning, reason of the dtype): what follows from the arguments, the model and the device alone."""
    rank, alpha = args.lora_rank or 0, args.lora_alpha
    if (args.block_size or 1) > config.block_size:
        raise ValueError(f"--block-size {args.block_size} is above the model's, {config.block_size}")
    if (args.batch_size or 32) < processes()[1]:
        raise ValueError(f"--batch-size {args.batch_size} is less than an example for each process")
    if args.adapter:
        _, rank, alpha = load_adapter(args.adapter)
    dtype, reason = (args.dtype, "as asked") if args.dtype else machine.default_dtype(device)
    # 2e-3 suits 192 channels, 2e-5, as is usual, 4,096: between them a straight line in logarithms
    lr = 2e-3 * (192 / config.n_embd) ** 1.5 * (LORA_LR if rank else 1)
    lr *= DPO_LR if args.method == "dpo" else 1
    run = Tuning(
        **in_common(args, device),
        block_size=min(args.block_size or 1024, config.block_size),
        batch_size=args.batch_size or 32,
        lr=args.lr or float(f"{lr:.1e}"),
        dtype=dtype,
        method=args.method,
        lora_rank=rank,
        lora_alpha=alpha or 2.0 * rank,
        beta=args.beta,
        likelihood=args.likelihood,
        replay=args.replay if args.method == "sft" else 0.0,
    )
    return run, reason


def plan(args, run, reason, material, device):
    """Derive what the arguments leave open, and print it with the reasons."""
    config, examples, data = config_of(material.base), material.train, material.data
    n, rank = config.num_params(), run.lora_rank or 8
    n_lora = num_lora_params(config, rank)
    how = f"{n_lora:,} parameters beside its {n:,}" if run.lora_rank else f"all {n:,} parameters"
    say("model", f"{os.path.relpath(material.base)}: {how} learn")
    say("device", f"{device} with {run.threads} threads, {run.dtype} for matrix products: {reason}")
    longest = replace(run, block_size=max(examples.lengths) * len(examples.rows[0]))  # a pair has two rows
    learning = n_lora if run.lora_rank else n
    run.micro_batch = longest.micro_batch = machine.fit_micro_batch(config, longest, device, learning)
    full, thin = (sum(machine.training_memory(config, longest, k).values()) / 1e6 for k in (n, n_lora))
    say("memory", f"about {full:,.0f} MB if all weights learn, {thin:,.0f} MB with LoRA of rank {rank}")
    if run.method == "sft":
        share, known = (
            n_replayed(run) / run.batch_size,
            data.name if data else "nothing: its text is unknown (--data)",
        )
        say("replay", f"{share:.0%} of the rows of a batch are from {known}, against forgetting")
    by_time = not (args.steps or args.epochs)
    seconds = 60 * (args.minutes or MINUTES) if by_time else 0
    in_epochs = round((args.epochs or EPOCHS) * examples.per_epoch)
    per_token = measure_step(partial(begin, run, material, device), run, device, 0.03 * seconds, in_epochs)
    per_step = per_token * examples.mean_tokens() * run.batch_size / examples.batch_size
    evaluated = N_EVALS * (EVAL_TOKENS if data else 0) + (len(data.val) if data else 0)
    evaluated += N_EVALS * material.dev.mean_tokens() * material.dev.per_epoch if material.dev else 0
    in_time = int((seconds - min(seconds / 2, evaluated * per_token / 3)) / per_step)
    if run.steps is None:
        run.steps = max(1, in_time if args.minutes else min(in_time, in_epochs) if by_time else in_epochs)
    epochs, length = run.steps / examples.per_epoch, f"{run.steps * per_step:,.0f} s"
    say("steps", f"{run.steps:,} of {1000 * per_step:,.0f} ms, {length}: each example {epochs:.2g} times")
    if run.steps < 50 and not args.steps:
        say("", f"these are few and teach little: --epochs {math.ceil(100 / examples.per_epoch)} makes 100")
    run.warmup = max(1, min(50, run.steps // 10))
    run.eval_every = run.eval_every or math.ceil(run.steps / N_EVALS)
    run.save_every = run.save_every or run.eval_every
    run.log_every = max(1, run.eval_every // 10)
    say("rate", f"AdamW {run.lr:g}: {run.warmup} steps up, the last 60 % down to zero")


def parse_arguments():
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Teach a model to answer, or to prefer.")
    add = parser.add_argument_group("what to learn").add_argument
    add("--model", metavar="DIR", help="the model to start from (the newest base model under out/)")
    add("--examples", metavar="FILE", help=".jsonl of messages, or of prompt and completion (small tasks)")
    add("--test", metavar="FILE", help=".jsonl of questions with one right answer, to be counted at the end")
    add("--method", choices=("sft", "dpo"), default="sft", help="dpo: prefer `chosen` to `rejected` (sft)")
    add("--out", metavar="DIR", help="where the result goes (out/NAME-chat or out/NAME-dpo)")
    add("--data", metavar="NAME", help="folder under data/ that the model was trained on (as it says itself)")
    add("--seed", type=int, help="equal seeds draw equal orders (0)")
    add("--resume", action="store_true", help="go on with the newest run, or with the one in --out")
    add("--dry-run", action="store_true", help="show an example, and what of it is learned, and stop")
    add = parser.add_argument_group("how long").add_argument
    add("--minutes", type=float, help=f"what steps and evaluations may take ({MINUTES}, or {EPOCHS} epochs)")
    add("--epochs", type=float, help="how often each example is seen, instead")
    add("--steps", type=int, help="a fixed number of steps, instead")
    add("--eval-every", type=int, metavar="STEPS", help="steps between evaluations (a sixth of all)")
    add("--save-every", type=int, metavar="STEPS", help="steps between checkpoints (as evaluations)")
    add = parser.add_argument_group("how").add_argument
    add("--lora-rank", type=int, metavar="R", help="train an update of rank R instead of all weights")
    add("--lora-alpha", type=float, help="the update is multiplied by alpha / R (2 R)")
    add("--adapter", metavar="DIR", help="such an update of --model, to go on with")
    add(
        "--replay",
        type=float,
        default=REPLAY,
        help=f"share of a batch's rows that are the model's own text ({REPLAY})",
    )
    add("--beta", type=float, default=0.1, help="dpo: what it costs to leave the model at the start (0.1)")
    add("--likelihood", type=float, default=0.0, help="dpo: weight of the chosen answer's own loss (0)")
    add("--batch-size", type=int, metavar="EXAMPLES", help="examples per step, over all processes (32)")
    add("--block-size", type=int, metavar="TOKENS", help="what is longer is cut (the model's, 1024 at most)")
    add("--lr", type=float, help="learning rate of AdamW (by the model's width)")
    add("--dtype", choices=("float32", "bfloat16"), help="in which matrices are multiplied")
    add("--deterministic", action="store_true", help="exact on a GPU too")
    add("--device", help="cpu, cuda or mps (the fastest that there is)")
    args = parser.parse_args()
    positive = ("minutes", "epochs", "steps", "eval_every", "save_every", "lora_rank", "lora_alpha", "beta")
    positive += ("batch_size", "block_size", "lr")
    limits = {"seed": 2**32, "replay": 1, "likelihood": math.inf}
    check_arguments(args, parser, positive, limits, {"out", "device"})
    if sum(value is not None for value in (args.minutes, args.epochs, args.steps)) > 1:
        raise ValueError("--minutes, --epochs and --steps exclude each other")
    if args.method == "dpo" and not args.examples:
        raise ValueError("--method dpo needs --examples with `prompt`, `chosen` and `rejected`")
    if args.test and not args.examples:
        raise ValueError("--test goes with --examples: the small tasks have a test of their own")
    if args.adapter and args.lora_rank:
        raise ValueError("--adapter brings its own rank: leave --lora-rank out")
    if args.lora_alpha and not args.lora_rank:
        raise ValueError("--lora-alpha goes with --lora-rank")
    for name in ("replay",) if args.method == "dpo" else ("beta", "likelihood"):
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name} is of no use with --method {args.method}")
    return args


def new_state(args, run, reason, material, sources, device, out):
    """Plan a run and make room for it. Returns its state before the first step, and what is measured then."""
    for name in ("base", "adapter", "examples", "test"):
        if sources[name] and out in (Path(sources[name]), *Path(sources[name]).parents):
            raise ValueError(f"{out} holds what is read, {sources[name]}: choose another --out")
    plan(args, run, reason, material, device)
    if processes()[0] == 0:
        checkpoint.make_room(out)
    stage = begin(run, material, device)
    if run.method == "dpo":
        for part in filter(None, (material.train, material.dev)):
            cache_references(stage.model, part, run)
    references = [part.references for part in (material.train, material.dev) if part]
    state = fresh_state(run, "fine-tuning", sources=sources, data=sources["data"], references=references)
    return state | identity(material, sources) | {"before": judge(stage, material)}


def main():
    args = parse_arguments()
    sys.stdout.reconfigure(errors="replace")  # no answer should end a run on a terminal of few characters
    out, state = Path(args.out).resolve() if args.out else None, None
    if args.resume:
        out, state = checkpoint.find_run(out, "fine-tuning")
        args.deterministic, args.device = state["run"]["deterministic"], args.device or state["run"]["device"]
    device = machine.start(args.device, args.deterministic)
    rank, world = processes()
    if state:
        run, sources = Tuning(**state["run"]), state["sources"]
    else:
        base = args.model or (base_of(args.adapter) if args.adapter else newest_base())
        base = Path(base)
        run, reason = settings(args, config_of(base), device)
        sources = dict(base=base, adapter=args.adapter, examples=args.examples, test=args.test)
        sources = {name: path and os.path.abspath(path) for name, path in sources.items()}
        sources["data"] = args.data or data_of(base)
        out = out or OUT / f"{base.resolve().name}-{'chat' if run.method == 'sft' else run.method}"
    if rank == 0 and not sources["examples"]:
        tasks.find_tasks()
    over_processes(0)  # the others wait for that
    material = read_material(run, **sources)
    if args.dry_run:
        return material.train.show(material.tokenizer)
    same_machine = state and (run.device, run.processes) == (device, world)
    threads, place = run.threads if same_machine else machine.default_threads(), os.path.relpath(out)
    with machine.set_up(device, threads, run.deterministic):
        if state:
            checkpoint.refuse_changes(state, identity(material, sources))
            if state["step"] == run.steps and (out / "results.json").exists():
                print(f"{place} is finished: {run.steps:,} steps, nothing is left to do")
                return
            say("resumed", f"{place} after step {state['step']:,} of {run.steps:,}")
            for part, references in zip((material.train, material.dev), state["references"]):
                part.references = references
        else:
            with machine.explain_memory(config_of(material.base), run):
                state = new_state(args, run, reason, material, sources, device, out)
        stage = begin(run, material, device)
        with machine.explain_memory(stage.model.config, run), checkpoint.catch_signals() as stop_asked:
            step, values = train(run, stage, out, device, state, stop_asked)
        if values is None:
            print(f"\nstopped after step {step:,}; to go on: python finetune.py --resume --out {place}")
            sys.exit(130)
        before, after = state["before"], judge(stage, material)
    if rank == 0:
        answers = {"base": before["answers"], "tuned": after["answers"]}
        bpb = {"before": before["bpb"], "after": after["bpb"]}
        report(material.test, answers, yardsticks(material.train.examples, material.test), bpb, out)
    if world > 1:
        over_processes(0)  # the first one has written its report
        dist.destroy_process_group()
        if rank:
            os._exit(0)  # now and then a thread of PyTorch's would abort the usual way out
    if material.data:
        change = f"{before['bpb']:.4f} bits per byte before, {after['bpb']:.4f} now"
        print(f"\nthe base model's own text, {material.data.name}: {change}")
    print(f"the model is in {place}/\nnext: python sample.py --chat --model {place}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        machine.explain_lost_processes(error)
