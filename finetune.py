r"""Stage 5: fine-tuning. A base model learns to answer: from examples, from preferences, from rewards.

    <|im_start|>user\nList the arguments of: def f(a, b):<|im_end|>\n<|im_start|>assistant\na, b<|im_end|>
                                                                                            ^^^^^^^^^^^^^^
The loss is that of pretraining, but only over what the assistant says (marked). The loop is in `tune`.
On a first reading, skip "LoRA", which trains other weights, and "preferences" and "rewards", which have other
losses.

    python finetune.py                          teach the newest base model small tasks, and measure it
    python finetune.py --method rl              let the newest chat model try, and learn from what was right
    python finetune.py --model DIR --examples chat.jsonl --lora-rank 8
    python finetune.py --model DIR --examples pairs.jsonl --method dpo
    python finetune.py --resume                 continue the newest run exactly where it stopped
"""

import argparse
import copy
import hashlib
import json
import math
import os
import warnings
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import tasks
from data.examples import Examples, hold_out, read_examples
from data.loader import IGNORED, Blocks, Data
from data.prepare import DATA
from model import Transformer, is_fast, replace_files, save_safetensors
from sample import (
    OUT,
    end_ids,
    find_unused_ids,
    generate,
    make_cache,
    positive_float,
    positive_int,
    prefill,
)
from tokenizer import Tokenizer, render, with_chat_tokens
from train import (
    CONSTANT_SHARE,
    EVAL_TOKENS,
    LAST_EVAL_TOKENS,
    SAVE_SECONDS,
    STATE,
    Log,
    NextTokenLoss,
    Pace,
    Settings,
    add_common_arguments,
    add_sample,
    autocast,
    below_one,
    bits_per_byte,
    catch_signals,
    check_finite,
    choose_dtype,
    claim,
    compare_with_cpu,
    fit_micro_batch,
    from_first_process,
    learning_rate,
    move_settings,
    open_data,
    open_run,
    parallel,
    peak_rate,
    rank_and_world,
    read_state,
    refuse_changes,
    refuse_with_resume,
    restore,
    run,
    save_state,
    say_if_busy,
    schedule_settings,
    show,
    show_steps,
    start,
    step_seed,
    sum_over_processes,
    training_step,
)

EPOCHS = 3  # or 3 minutes, whichever ends first, unless one of them is asked for
N_SHOWN = 5  # answers of each channel in the report
REPLAY = 0.3  # with 0.1, the model forgot more than twice as much
REPLAYED = "(replay)"  # the channel of replayed text
DEV_BATCHES = 4  # of questions, at most, with which --method rl is evaluated


@dataclass
class TuneSettings(Settings):
    """Everything that decides the numbers of a run, besides the content of what it reads and the hardware."""

    base: str = ""  # the folder of the model that it starts from
    data: str | None = None  # the name of what the base model was trained on
    examples: str | None = None  # files; None: the small tasks
    test: str | None = None
    method: str = "sft"
    lora_rank: int = 0  # 0: all weights learn
    lora_alpha: float = 0.0
    beta: float = 0.1
    n_answers: int = 1  # drawn to each question by the method rl
    n_replay: int = 0  # rows of a batch, over all processes, that are the base model's own text


@dataclass
class Material:
    """What a run reads."""

    tokenizer: Tokenizer
    train: Examples
    dev: Examples | None
    test: list  # of Example
    data: Data | None  # what the base model was trained on


# --- LoRA: learn a thin update of each matrix instead of the matrix (Hu et al., 2021) ---
#
#     W x  ->  W x + (alpha / r) B (A x)        W (out, in) is frozen; A (r, in) and B (out, r) learn
#
# B starts at zero, so the first step is the base model's. In the end W + (alpha / r) B A is a matrix like any
# other: the merged model is as fast and as plain as its base.

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A linear layer whose weight is frozen, plus its update of rank r."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        bound = 1 / math.sqrt(linear.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, A), B)


def add_lora(model, rank, alpha):
    """Freeze a model and give every matrix of its blocks an update. ValueError: the rank does not suit it."""
    if not 1 <= rank <= model.config.n_embd:
        raise ValueError(f"--lora-rank {rank} must be from 1 to the model's width, {model.config.n_embd}")
    model.requires_grad_(False)
    for name, child in list(model.named_modules()):
        if name.endswith(MATRICES):
            model.set_submodule(name, LoRALinear(child, rank, alpha))
    return model


def merge(weights, scale):
    """The weights of a model with LoRA (a state_dict) -> those of a plain model. scale: alpha / r."""
    merged = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name in weights:
        if name.endswith(".lora_A"):
            A, B = weights[name].float(), weights[name.replace("lora_A", "lora_B")].float()
            place = name.replace("lora_A", "weight")
            merged[place] = (merged[place].float() + scale * B @ A).to(merged[place].dtype)
    return merged


def save_adapter(folder, weights, rank, alpha, base):
    """Write the adapter alone, in PEFT's format. base: the folder of the model that it belongs to."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(MATRICES),
    }
    adapter = {f"base_model.model.{name}.weight": p for name, p in weights.items() if ".lora_" in name}
    with replace_files(folder) as unfinished:
        (unfinished / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        save_safetensors(unfinished / "adapter_model.safetensors", adapter)


# --- preferences: direct preference optimisation (Rafailov et al., 2023) ---
#
#     loss = -log sigmoid(beta (log p(chosen) / p0(chosen) - log p(rejected) / p0(rejected)))
#
# p is the model that learns, p0 the one that it started as. No reward is modelled and nothing is sampled: the
# odds of the chosen answer against the rejected one are raised, and beta is the price of leaving p0.

PAIR_MEASURES = ("loss", "margin", "accuracy", "log_p_chosen", "log_p_rejected")


def log_probs(model, ids, targets):
    """ids, targets (B, T) -> the sum of log p over each row's targets, (B,)."""
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    logits = model.head(model.hidden(ids)[rows, columns]).float()  # only where there is a target
    log_p = logits.log_softmax(-1).gather(1, targets[rows, columns, None])[:, 0]
    return log_p.new_zeros(len(ids)).index_add(0, rows, log_p)


def measure_preference(log_p, references, beta):
    """log p of chosen and rejected answers under p and under p0, (n, 2) each -> PAIR_MEASURES (n, 5)."""
    chosen, rejected = (log_p - references).unbind(1)
    margin = beta * (chosen - rejected)
    measures = (-F.logsigmoid(margin), margin, (margin > 0).float(), log_p[:, 0], log_p[:, 1])
    return torch.stack(measures, 1)


class PreferenceLoss(nn.Module):
    """DPO's loss (eq. 7) as a module, see NextTokenLoss. p0 is a frozen copy of the model as it is now."""

    def __init__(self, model, beta):
        super().__init__()
        self.model, self.beta = model, beta
        self.reference = copy.deepcopy(model).requires_grad_(False)

    def forward(self, ids, targets):
        """ids, targets (n, 2, T): chosen, rejected -> the summed loss and, detached, PAIR_MEASURES (n, 5)."""
        both = ids.flatten(0, 1), targets.flatten(0, 1)  # (2n, T)
        log_p = log_probs(self.model, *both).view(-1, 2)
        with torch.no_grad():
            references = log_probs(self.reference, *both).view(-1, 2)
        # A row without targets, with which a process fills up its share, counts for nothing.
        rows = measure_preference(log_p, references, self.beta) * count_targets(targets)[:, None]
        return rows[:, 0].sum(), rows.detach()


# --- exact match: answer freely, and compare by the character ---
#
# The loss uses teacher forcing, so it flatters: each token is predicted after the right ones. Here the model
# reads its own answer, takes the likeliest token each time, and one wrong character makes an answer wrong.


def question_ids(tokenizer, example):
    """The ids of an example's question, up to where its answer begins."""
    return render(tokenizer, example.question, add_generation_prompt=True)[0]


def complete(model, tokenizer, prompts, max_new_tokens, **sampling):
    """What generate writes after each prompt, as a list of ids, without the one that ended it."""
    unused = find_unused_ids(model, tokenizer)
    steps = list(generate(model, prompts, max_new_tokens, unused_ids=unused, **sampling))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


def answer(model, tokenizer, examples, batch_size=64):
    """The likeliest answers to the questions of examples, as a list of str."""
    prompts = [question_ids(tokenizer, example) for example in examples]
    longest = max((len(tokenizer.encode(example.answer)) for example in examples), default=0) + 8
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    stop_ids, answers = set(tokenizer.special_tokens.values()), [""] * len(prompts)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        asked = [prompts[i] for i in batch]
        found = complete(model, tokenizer, asked, longest, stop_ids=stop_ids, temperature=0)
        for i, ids in zip(batch, found):
            answers[i] = tokenizer.decode(ids)
    return answers


def is_right(example, text):
    """Whether a text is the example's answer, but for the space around it."""
    return text.strip() == example.answer.strip()


def exact_match(examples, answers):
    """{channel: share of the answers that are right}."""
    right = defaultdict(list)
    for example, text in zip(examples, answers):
        right[example.channel].append(is_right(example, text))
    return {channel: sum(found) / len(found) for channel, found in sorted(right.items())}


def macro(shares):
    """The mean of exact_match over channels, without those of long questions ("args, many"), or None."""
    counted = [share for channel, share in shares.items() if not channel.endswith(tasks.MANY)]
    return sum(counted) / len(counted) if counted else None


def yardsticks(examples, test):
    """What needs no model, {name: exact_match}: the most frequent answer of a channel; a simple rule."""
    seen = defaultdict(Counter)
    for example in examples:
        seen[example.channel][example.answer] += 1
    frequent = [max(seen[e.channel] or [""], key=seen[e.channel].get) for e in test]
    ruled, answers = [], []
    for example in test:
        if text := tasks.answer_by_rule(example.question[-1]["content"]):
            ruled.append(example)
            answers.append(text)
    return {"most_frequent": exact_match(test, frequent), "rule": exact_match(ruled, answers)}


def base_shares(folder, questions, counts):
    """{channel: exact_match} of the model before a chat model's training; {}: unknown, or of another test."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        found = json.loads((Path(folder) / "results.json").read_bytes())
        figures = found["exact_match"]
        if found["questions"] == questions and {name: row["n"] for name, row in figures.items()} == counts:
            return {name: row["base"] for name, row in figures.items()}
    return {}


def report(material, before, after, settings, out):
    """Print the share of right answers by channel, and examples; write the figures to results.json.

    before, after: what `measure` gives.
    """
    test, counts = material.test, Counter(example.channel for example in material.test)
    questions = {example.channel: example.question[-1]["content"] for example in reversed(test)}
    earlier, later, shares = "base", "tuned", {}
    if settings.method == "rl":
        earlier, later = "tuned", "rewarded"
        if found := base_shares(settings.base, questions, counts):
            shares["base"] = found
    answers = {earlier: before["answers"], later: after["answers"]}
    shares.update({name: exact_match(test, texts) for name, texts in answers.items()})
    macros = {name: macro(found) for name, found in shares.items()}
    shares.update(yardsticks(material.train.examples, test))
    figures = {}
    for channel in sorted(counts):
        figures[channel] = {name: shares[name][channel] for name in shares if channel in shares[name]}
        figures[channel]["n"] = counts[channel]
    if test:
        heads = "".join(f"{name.replace('_', ' '):>15}" for name in shares)
        print(f"\n{'exact match':16}{'questions':>10}{heads}")
    for channel, row in figures.items():
        cells = [f"{row[name]:15.3f}" if name in row else " " * 15 for name in shares]
        print(f"{channel:16}{row['n']:10,}" + "".join(cells))
    if len(figures) > 1 and None not in macros.values():
        print(f"{'macro':26}" + "".join(f"{value:15.3f}" for value in macros.values()))
    for channel in figures:
        for i in [i for i, example in enumerate(test) if example.channel == channel][:N_SHOWN]:
            print(f"\n  {test[i].question[-1]['content']}")
            for name, texts in answers.items():
                verdict = "right" if is_right(test[i], texts[i]) else "wrong"
                print(f"    {name:8} {verdict}  {texts[i][:90]!r}")
    bpb = {"before": before["bpb"], "after": after["bpb"]}
    results = {"exact_match": figures, "macro": macros[later], "bpb": bpb, "questions": questions}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


# --- rewards: learn from answers of one's own (REINFORCE: Williams, 1992) ---
#
#     loss = -mean of (reward - baseline) log p(answer), over all answers
#
# The model draws G answers to each question. The baseline of an answer is the mean reward of the other G - 1
# (Kool et al., 2019; Ahmadian et al., 2024): what is better than those becomes likelier, what is worse less
# likely, and where all are equal nothing is learned. Descending this loss raises the mean reward itself.
#
# PPO makes many updates with the same answers: it needs the ratio of p to what p was, clipped, and it learns
# its baseline with a second network. GRPO has the same ratio, takes the mean of the whole group, divides by
# its deviation, and adds a penalty for leaving the first model. Here each answer is used once, so the ratio
# is 1, and replayed text stands in for the penalty.


def reward(example, text):
    """How good a text is as the answer to an example's question: 1 if it is the example's own answer, else 0.

    Edit this to teach something else. An answer that is cut off earns 0, so keep rewards at 0 or above: with
    negative ones the model would learn not to end.
    """
    return float(is_right(example, text))


def advantages(rewards):
    """rewards (P, G) -> each one minus the mean of the other G - 1 of its row."""
    others = rewards.sum(1, keepdim=True) - rewards
    return rewards - others / (rewards.size(1) - 1)


def draw(model, tokenizer, prompts, G, max_new_tokens, seed):
    """Draw G answers to each of P prompts, at temperature 1 -> P G lists of ids, without their <|im_end|>."""
    longest = max(map(len, prompts))
    cache = make_cache(model, len(prompts), longest + max_new_tokens)
    prefill(model, cache, [prompt[:-1] for prompt in prompts])  # each prompt is read once
    rows = torch.arange(len(prompts)).repeat_interleave(G)
    cache.k, cache.v, cache.lengths = cache.k[:, rows], cache.v[:, rows], cache.lengths[rows]
    last = [prompts[i][-1:] for i in rows]
    sampling = dict(seed=seed, temperature=1.0, top_p=1.0, cache=cache)
    stop_ids = {tokenizer.special_tokens["<|im_end|>"]}
    return complete(model, tokenizer, last, max_new_tokens, stop_ids=stop_ids, **sampling)


@torch.no_grad()
def draw_answers(model, tokenizer, examples, indices, G, seed):
    """Draw G answers to each question of Examples at P indices, and reward them.

    Returns ids and targets (P G, T), channels (P G,) and rewards (P, G). An answer ends with <|im_end|>; it
    may have as many tokens as what is learned of the longest of these examples. If it is cut off, it earns 0.
    """
    chosen = [examples.examples[i] for i in indices]
    prompts = [question_ids(tokenizer, example) for example in chosen]
    longest_answer = max(int(mask.sum()) for i in indices for _, mask in examples.rows[i])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some rows leave the context; there they are cut off
        answers = draw(model, tokenizer, prompts, G, longest_answer, seed)
    longest = max(map(len, prompts)) + longest_answer
    T = min(-(-longest // 8) * 8, examples.block_size)  # see Examples.lengths
    ids = torch.zeros(len(answers), T, dtype=torch.long)
    targets, rewards = torch.full_like(ids, IGNORED), torch.zeros(len(answers))
    channels = torch.zeros_like(ids[:, 0])
    for row, answer_ids in enumerate(answers):
        example, prompt = chosen[row // G], prompts[row // G]
        channels[row] = examples.channels.index(example.channel)
        room = min(longest_answer, examples.block_size + 1 - len(prompt))
        if len(answer_ids) < room:  # it has ended
            rewards[row] = reward(example, tokenizer.decode(answer_ids))
            answer_ids.append(tokenizer.special_tokens["<|im_end|>"])
        whole = torch.tensor(prompt + answer_ids[:room])
        n = len(whole) - 1
        ids[row, :n] = whole[:-1]
        targets[row, len(prompt) - 1 : n] = whole[len(prompt) :]
    return ids, targets, channels, rewards.view(-1, G)


def merge_equal(ids, targets, weights):
    """Merge equal rows and add up their weights (n,); the loss stays the same.

    Rows of weight 0 are dropped, but for those that fill up a multiple of 8, see Examples.lengths.
    """
    different, row_of = torch.cat((ids, targets), 1).unique(dim=0, return_inverse=True)
    weights = weights.new_zeros(len(different)).index_add(0, row_of, weights)
    n = int((weights.abs() > 1e-6).sum())
    heaviest = weights.abs().argsort(descending=True)[: 8 * max(1, -(-n // 8))]
    ids, targets = different[heaviest].chunk(2, dim=1)
    return ids, targets, weights[heaviest]


# "loss" is 1 - reward, since REINFORCE's own loss says nothing about progress; "best" is the highest reward
# of a group. Where rewards are 0 or 1, the mean of "reward" is pass@1 and the mean of "best" is pass@G.
REWARD_MEASURES = ("loss", "reward", "best", "signal", "length")


def measure_rewards(rewards, targets):
    """Rewards (P, G) and targets (P G, T) -> REWARD_MEASURES (P G, 5). signal: rewards of a group differ."""
    best = rewards.amax(1, keepdim=True).expand_as(rewards)
    signal = (rewards.amin(1, keepdim=True) < best).float()
    lengths = count_targets(targets).view_as(rewards)
    return torch.stack((1 - rewards, rewards, best, signal, lengths), -1).flatten(0, 1)


class RewardLoss(nn.Module):
    """REINFORCE's loss as a module, see NextTokenLoss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, targets, weights):
        """ids, targets (n, T), weights (n,) -> minus the weighted sum of log p and, detached, -log p (n,)."""
        nats = -log_probs(self.model, ids, targets)
        return (weights * nats).sum(), nats.detach()


# --- the base model and the material ---


def newest_start(chats):
    """The folder under out/ whose model was saved last: of base models or, but for those of rl, of chats."""
    for path in sorted(OUT.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(ValueError, OSError):  # a folder of another program that cannot be opened
            tokenizer = Tokenizer.load(path.parent / "tokenizer.json")
            im_end = tokenizer.special_tokens.get("<|im_end|>")
            rewarded = chats and saved_run(path.parent).get("settings", {}).get("method") == "rl"
            if (im_end in end_ids(path.parent, tokenizer)) == chats and not rewarded:
                return path.parent
    kind, script = ("chat", "finetune.py") if chats else ("base", "train.py")
    raise ValueError(
        f"there is no {kind} model under out/ yet: run `python {script}`, or name one with --model"
    )


def saved_run(folder):
    """The saved state of the run that trained a model; {}: there is none."""
    if not Path(folder, STATE).exists():
        return {}
    return read_state(Path(folder), mmap=True)


def data_of(base):
    """The name of the data that a model was trained on; None: it does not say, or the data is not there."""
    name = saved_run(base).get("data")
    return name if name and (DATA / name / "meta.json").exists() else None


def add_rows(model, n_known, n):
    """Make room for n tokens in a model that knows n_known: new ones start at the mean of the others."""
    size, rng = max(model.config.vocab_size, -(-n // 64) * 64), torch.Generator().manual_seed(0)
    for part in filter(None, (model.model.embed_tokens, model.lm_head)):
        known = part.weight.detach()[:n_known].float().cpu()
        noise = torch.randn(size - n_known, known.size(1), generator=rng)  # or all would stay the same
        rows = torch.cat((known, known.mean(0) + 0.01 * known.std(0) * noise))
        part.weight = nn.Parameter(rows.to(part.weight))
    model.config = replace(model.config, vocab_size=size)


def open_base(base, device, lora_rank, method):
    """The model in a folder, with rows for the tokens of a chat. lora_rank: 0 if all weights learn.

    ValueError: it is none, or not one for LoRA or for this method.
    """
    if not Path(base, "config.json").exists():
        raise ValueError(f"{base} is not a model folder: it has no config.json")
    model = Transformer.load(base, device)
    dtype = model.model.norm.weight.dtype
    if not lora_rank:
        model.float()
    elif not is_fast(dtype, device):  # in a fast dtype, the weights that LoRA freezes stay
        print(f"{dtype} is slow on this device: the frozen weights are converted to float32")
        model.float()
    known = Tokenizer.load(Path(base, "tokenizer.json"))
    n_known = min(known.vocab_size, model.config.vocab_size)
    n = with_chat_tokens(known).vocab_size
    if n > n_known:
        if lora_rank:
            lacks = f"{base} lacks embeddings for the tokens of a chat, and LoRA cannot learn them"
            raise ValueError(f"{lacks}: leave out --lora-rank")
        add_rows(model, n_known, n)
    ends = end_ids(base, known)  # refuses a damaged file now and not after the training
    if method == "rl" and known.special_tokens.get("<|im_end|>") not in ends:
        raise ValueError(f"{base} was not taught to chat: first run `python finetune.py --model {base}`")
    return model.train()


def read_material(settings):
    """Open all that a run reads besides the model, and print what is there."""
    known = Tokenizer.load(Path(settings.base, "tokenizer.json"))
    tokenizer = with_chat_tokens(known)
    if tokenizer is not known:
        where = os.path.relpath(settings.base)
        print(f"{where} has no tokens for the layout of a chat: they are added, at the mean of the others")
    data = open_data(settings.data) if settings.data else None
    if data and data.tokenizer.fingerprint != known.fingerprint:
        print(f"{data.name} was prepared with another tokenizer: it is of no use to this model")
        data = None
    if data is None:
        settings.n_replay = 0
    if settings.examples:
        train, dev = hold_out(read_examples(settings.examples, pairs=settings.method == "dpo"))
        test = read_examples(settings.test) if settings.test else []
    else:
        train, dev, test = (read_examples(tasks.FOLDER / f"{split}.jsonl") for split in tasks.SIZES)
    shape = (settings.block_size, settings.batch_size - settings.n_replay, settings.seed)
    whole = settings.method == "rl"  # what does not fit cannot be answered
    train = Examples(train, tokenizer, *shape, whole)
    try:
        dev = Examples(dev, tokenizer, *shape, whole) if dev else None
    except ValueError:  # all of them are too long
        dev = None
    show("examples", train)
    show("held out", dev or "none: too few of each channel, or too long")
    return Material(tokenizer, train, dev, test, data)


def identity_of(settings, material):
    """What must be unchanged when a run is resumed: the text, the tokenizer and every file that it reads."""
    files = sorted(Path(settings.base).glob("*.safetensors"))
    if settings.examples:
        files += [Path(name) for name in (settings.examples, settings.test) if name]
    else:
        files += sorted(tasks.FOLDER.glob("*.jsonl"))
    identity = {"tokenizer": material.tokenizer.fingerprint, "text of the base model": None}
    if material.data:
        identity["text of the base model"] = material.data.fingerprint
    for path in files:
        digest = hashlib.blake2b(digest_size=16)
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        identity[str(path)] = digest.hexdigest()
    return identity


# --- settings and command line ---


def parse_arguments():
    """What was typed. ValueError: options that do not go together."""
    parser = argparse.ArgumentParser(description="Teach a model to answer.", exit_on_error=False)
    what = parser.add_argument_group("what to learn")
    what.add_argument("--model", metavar="DIR", help="where to start (the newest base model under out/)")
    what.add_argument("--examples", metavar="FILE", help=".jsonl of conversations (small tasks)")
    what.add_argument("--test", metavar="FILE", help=".jsonl of questions with one right answer, to count")
    method_help = "dpo: learn from preferences; rl: from rewards for answers of its own (sft: from examples)"
    what.add_argument("--method", choices=("sft", "dpo", "rl"), default="sft", help=method_help)
    what.add_argument("--data", metavar="NAME", help="what the model was trained on (as it says itself)")
    what.add_argument("--dry-run", action="store_true", help="show an example as it is learned, and stop")
    limit = add_common_arguments(parser)
    limit.add_argument("--epochs", type=positive_float, help=f"how often each example is seen ({EPOCHS})")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--block-size", type=positive_int, metavar="TOKENS", help="longer examples are cut (rl: left out)"
    )
    how.add_argument("--replay", type=below_one, help=f"share of a batch that is the model's text ({REPLAY})")
    how.add_argument("--lora-rank", type=positive_int, metavar="R", help="learn an update of rank R only")
    how.add_argument("--lora-alpha", type=positive_float, help="the update is scaled by alpha / R (2 R)")
    how.add_argument("--beta", type=positive_float, help="dpo: the price of leaving the base model (0.1)")
    how.add_argument("--answers", type=positive_int, metavar="G", help="rl: drawn to each question (8)")
    how.add_argument("--lr", type=positive_float, help="learning rate of AdamW (by the model's width)")
    args = parser.parse_args()
    refuse_with_resume(args, parser)
    if args.method == "dpo" and not (args.examples or args.resume):
        raise ValueError("--method dpo needs --examples with `prompt`, `chosen` and `rejected`")
    if args.test and not args.examples:
        raise ValueError("--test goes with --examples: the small tasks have a test of their own")
    if args.lora_alpha and not args.lora_rank:
        raise ValueError("--lora-alpha goes with --lora-rank")
    for option, methods in {"replay": ("sft", "rl"), "beta": ("dpo",), "answers": ("rl",)}.items():
        if getattr(args, option) is not None and args.method not in methods:
            raise ValueError(f"--{option} is of no use with --method {args.method}")
    if args.answers == 1:
        raise ValueError("--answers 1 leaves nothing to compare an answer with: 2 or more")
    return args


def choose_settings(args, base, config, device):
    """TuneSettings from the arguments and, where they are silent, from the base model and the device."""
    _, world = rank_and_world()
    batch_size, rank = args.batch_size or 32, args.lora_rank or 0
    if (args.block_size or 1) > config.block_size:
        raise ValueError(f"--block-size {args.block_size} is above the model's, {config.block_size}")
    # 2e-3 suits 192 channels and 2e-5, the usual rate, 4,096: between them, a straight line in logarithms.
    lr = 2e-3 * (192 / config.n_embd) ** 1.5
    if rank:
        lr *= 3
    if args.method != "sft":
        lr *= 0.1
    n_replay = 0
    if args.method != "dpo":
        replay = REPLAY if args.replay is None else args.replay
        n_replay = round(batch_size * replay / world) * world
    if batch_size - n_replay < world:
        raise ValueError(f"--batch-size {batch_size} leaves no room for examples beside {n_replay} of replay")
    n_answers = 1
    if args.method == "rl":
        n_answers = args.answers or 8
    return TuneSettings(
        seed=args.seed or 0,
        block_size=min(args.block_size or 1024, config.block_size),
        batch_size=batch_size,
        micro_batch=math.ceil(batch_size / world),
        lr=args.lr or float(f"{lr:.1e}"),
        dtype=args.dtype or choose_dtype(device),
        device=device,
        processes=world,
        deterministic=args.deterministic,
        base=os.path.abspath(base),
        data=args.data or data_of(base),
        examples=args.examples and os.path.abspath(args.examples),
        test=args.test and os.path.abspath(args.test),
        method=args.method,
        lora_rank=rank,
        lora_alpha=args.lora_alpha or 2.0 * rank,
        beta=args.beta or 0.1,
        n_answers=n_answers,
        n_replay=n_replay,
        **schedule_settings(args),
    )


def limit_epochs(args, settings, examples):
    """Set how long a run is: --steps, --minutes or --epochs; without any, 3 minutes or 3 epochs."""
    most = max(1, round((args.epochs or EPOCHS) * examples.per_epoch))
    if args.epochs:
        settings.minutes, settings.steps, settings.fall = None, most, CONSTANT_SHARE * most
    elif not args.steps and not args.minutes:
        settings.max_steps = most
    if settings.steps:
        show("steps", f"{settings.steps:,}: each example {settings.steps / examples.per_epoch:.2g} times")
    elif settings.max_steps:
        steps = f"{most:,} steps if that is less: each example {EPOCHS} times"
        show("time", f"{settings.minutes:g} minutes, or {steps}")
    else:
        show("time", f"{settings.minutes:g} minutes")
    if not args.steps and most < 50 and not args.minutes:
        enough = math.ceil(100 / examples.per_epoch)
        show("", f"these are few and teach little: --epochs {enough} makes 100 steps")


def show_plan(settings, material, model):
    """Print what was chosen, before the first step."""
    n = sum(p.numel() for p in model.parameters())
    n_learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    show("model", f"{os.path.relpath(settings.base)}: {n_learning:,} of {n:,} parameters learn")
    show("device", f"{settings.device} with {torch.get_num_threads()} threads; {settings.dtype} products")
    if settings.method == "rl":
        n_questions = settings.batch_size - settings.n_replay
        show("answers", f"{n_questions} questions a step, {settings.n_answers} answers drawn to each")
    if settings.method != "dpo":
        replay = "none: the text of the base model is not known (--data), so it may forget"
        if material.data:
            share = settings.n_replay / settings.batch_size
            replay = f"{share:.0%} of each batch from {material.data.name}, against forgetting"
        show("replay", replay)
    show("rate", f"AdamW {settings.lr:g}: up, constant, the last 60 % down to zero")


# --- the run ---


def write_model(folder, model, settings, material):
    """Write a model folder; with LoRA the merged model, and the adapter in a folder of its own."""
    weights = model.state_dict()
    if settings.lora_rank:
        base = os.path.relpath(settings.base)
        save_adapter(folder / "adapter", weights, settings.lora_rank, settings.lora_alpha, base)
        weights = merge(weights, settings.lora_alpha / settings.lora_rank)
    im_end = material.tokenizer.special_tokens["<|im_end|>"]
    ends = sorted(end_ids(settings.base, material.tokenizer) - {im_end})
    model.save(folder, material.tokenizer, weights, [*ends, im_end])


def base_bpb(model, material, settings, n_tokens=LAST_EVAL_TOKENS):
    """Bits per byte of the base model's own text, of n_tokens that are held out; None: unknown text.

    A rise is forgetting.
    """
    if material.data is None:
        return None
    with autocast(settings):
        return bits_per_byte(model, material.data.val, material.tokenizer.bytes_per_token, n_tokens)


def measure(model, material, settings):
    """What a run shall change: the answers to the test, in the first process alone, and bits per byte."""
    rank, _ = rank_and_world()
    answers = answer(model, material.tokenizer, material.test) if rank == 0 else []
    return {"answers": answers, "bpb": base_bpb(model, material, settings)}


def count_targets(targets):
    """targets (n, T) -> how many there are in each row; of pairs (n, 2, T), 1 for a row that holds a pair."""
    if targets.ndim == 3:
        return (targets[:, 0] != IGNORED).any(1).long()
    return (targets != IGNORED).sum(1)


def averages(split, measures, channels, sums):
    """{column of the log: value} of sums (channels, 1 + measures), whose first column counts targets.

    Replayed text has a column of its own but no part in the mean. A channel without targets has None.
    """
    total = sum(row for name, row in zip(channels, sums) if name != REPLAYED)
    values = {}
    for name, value in zip(measures, total[1:]):
        values[f"{split}_{name}"] = (value / total[0].clamp(min=1)).item()
    for name, row in zip(channels, sums):
        values[f"{split}_loss {name}"] = (row[1] / row[0]).item() if row[0] else None
    return values


def shown(values, split, measures, channels):
    """The measures of a method as a line for the screen; where only the loss is measured, by channels."""
    parts = [(name, values[f"{split}_{name}"]) for name in measures[1:]]
    if not parts:
        parts = [(name, values[f"{split}_loss {name}"]) for name in channels]
    return "; ".join(f"{name} {value:.3f}" for name, value in parts if value is not None)


@torch.no_grad()
def evaluate(objective, measures, material, settings):
    """{column of the log: value} of the examples that are held out."""
    rank, world = rank_and_world()
    dev, model = material.dev, objective.model
    sums = torch.zeros(len(dev.channels), 1 + len(measures), dtype=torch.float64)
    model.eval()
    for indices in dev.by_length(settings.micro_batch * world):
        ids, targets, channels = dev.tensors(indices, rank, world)
        with autocast(settings):
            _, rows = objective(ids.to(settings.device), targets.to(settings.device))
        found = torch.cat((count_targets(targets)[:, None], rows.view(len(rows), -1).cpu()), 1)
        sums.index_add_(0, channels, found.double())
    model.train()
    return averages("val", measures, dev.channels, sum_over_processes(sums))


@torch.no_grad()
def evaluate_rewards(objective, measures, material, settings):
    """{column of the log: value} of answers to the same held-out questions each time.

    val_entropy, in nats for each token, is estimated by -log p of the tokens that were drawn.
    """
    rank, world = rank_and_world()
    dev, model, G = material.dev, objective.model, settings.n_answers
    sums, nats = torch.zeros(len(dev.channels), 1 + len(measures), dtype=torch.float64), 0.0
    batches = dev.by_length(dev.batch_size)
    distance = -(-len(batches) // DEV_BATCHES)
    for k in range(distance // 2, len(batches), distance)[rank::world]:
        ids, targets, channels, rewards = draw_answers(model, material.tokenizer, dev, batches[k], G, seed=k)
        for piece in zip(ids.split(settings.micro_batch), targets.split(settings.micro_batch)):
            with autocast(settings):
                nats -= log_probs(model, *(tensor.to(settings.device) for tensor in piece)).sum().item()
        found = torch.cat((torch.ones(len(ids), 1), measure_rewards(rewards, targets)), 1)
        sums.index_add_(0, channels, found.double())
    sums = sum_over_processes(sums)
    values = averages("val", measures, dev.channels, sums)
    values["val_entropy"] = sum_over_processes(nats) / sums[:, -1].sum().item()  # the last are lengths
    return values


def read_batch(step, examples, blocks, settings):
    """This process's ids, targets and channels of a step; with blocks, the last channel is replayed text."""
    rank, world = rank_and_world()
    ids, targets, channels = examples.batch(step, rank, world)
    if blocks is None:
        return ids, targets, channels
    ids, targets, n = add_replay(step, ids, targets, blocks, settings)
    replayed = torch.full([n], len(examples.channels))
    return ids, targets, torch.cat((channels, replayed))


def add_replay(step, ids, targets, blocks, settings):
    """Append this process's replayed rows -> ids, targets (n, T), and how many rows these are."""
    rank, world = rank_and_world()
    more_ids, more_targets = blocks.batch(step, settings.n_replay, rank, world)
    T = ids.size(1)  # of the blocks, as much as the examples are long
    ids, targets = torch.cat((ids, more_ids[:, :T])), torch.cat((targets, more_targets[:, :T]))
    return ids, targets, len(more_ids)


def draw_batch(step, examples, blocks, model, tokenizer, settings):
    """Draw this process's answers of a step.

    Returns (ids, targets, weights) to learn from; of each answer, REWARD_MEASURES (n, 5) and channel (n,).
    """
    rank, world = rank_and_world()
    number, i = divmod(step, examples.per_epoch)
    indices, seed = examples.epoch(number)[i], step_seed(settings, step)
    indices = indices[rank::world] or indices[:1]  # with fewer questions than processes, some ask the first
    ids, targets, channels, rewards = draw_answers(
        model, tokenizer, examples, indices, settings.n_answers, seed
    )
    measured = measure_rewards(rewards, targets)
    ids, targets, weights = merge_equal(ids, targets, advantages(rewards).flatten())
    if blocks is not None:  # the mean loss of replayed text, times its share of the batch
        ids, targets, n = add_replay(step, ids, targets, blocks, settings)
        weight = settings.n_replay / settings.batch_size * rewards.numel() / (n * ids.size(1))
        weights = torch.cat((weights, torch.full([n], weight)))
    return (ids, targets, weights), measured, channels


def tune(settings, material, model, out, fixed, state=None):
    """Fine-tune a model from its first step or, given the saved state of a run, from there on.

    fixed: what every save of the run holds. Leaves in `out` what train.py lists under "save and resume", but
    best/ only if examples are held out. Returns the number of steps taken.
    """
    rank, _ = rank_and_world()
    device, tokenizer, examples, dev = settings.device, material.tokenizer, material.train, material.dev
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer.param_groups[0]["initial_lr"] = settings.lr
    measures, evaluation = ("loss",), evaluate
    if settings.method == "dpo":  # also of a resumed run, the model is still the base model here
        measures, objective = PAIR_MEASURES, PreferenceLoss(model, settings.beta)
    elif settings.method == "rl":
        measures, objective, evaluation = REWARD_MEASURES, RewardLoss(model), evaluate_rewards
    else:
        objective = NextTokenLoss(model)
    blocks, channels = None, examples.channels
    if settings.n_replay:
        blocks = Blocks(material.data.train, settings.block_size, settings.seed)
        if settings.method == "sft":
            channels = [*channels, REPLAYED]
    prompt = question_ids(tokenizer, (material.test or examples.examples)[0])
    *longest, _ = examples.tensors(examples.by_length(1)[-1] * settings.micro_batch)
    if settings.method == "rl":
        longest.append(torch.zeros(settings.micro_batch))
    fit_micro_batch(objective, longest, settings)

    step, tokens, seconds, best = 0, 0, 0.0, math.inf
    sums = torch.zeros(len(channels), 1 + len(measures), device=device)  # since the last line of the log
    if state:
        restore(out, state, model, [optimizer])
        step, tokens, seconds, best = (state[name] for name in ("step", "tokens", "seconds", "best"))
        if rank == 0:
            sums += torch.tensor(state["sums"], device=device)
    else:
        add_sample(out, model, tokenizer, prompt, step)
    wrapped = parallel(objective)
    columns = [f"train_{name}" for name in measures[1:]] + [f"train_loss {name}" for name in channels]
    if dev:
        columns += [f"val_{name}" for name in measures] + [f"val_loss {name}" for name in dev.channels]
        if settings.method == "rl":
            columns.append("val_entropy")
    # The passes are forward, backward to the inputs and, if all weights learn, backward to the weights.
    n_passes = 2 if settings.lora_rank else 3
    log, peak = Log(out, columns), peak_rate(settings)
    pace = Pace(settings, step, seconds, last_eval=1)
    saved, lap_tokens, stop = seconds, tokens, False
    with catch_signals() as stop_asked:
        while step != settings.steps and not stop:
            lr_scale = learning_rate(step, pace.done, settings)
            if settings.method == "rl":
                batch, measured, channel = draw_batch(step, examples, blocks, model, tokenizer, settings)
                counts = torch.ones_like(channel)
            else:
                *batch, channel = read_batch(step, examples, blocks, settings)
                counts = count_targets(batch[1])
            n_targets, n_tokens = sum_over_processes(torch.tensor([counts.sum(), batch[0].numel()])).tolist()
            rows, norm = training_step(wrapped, [optimizer], batch, n_targets, lr_scale, settings)
            if settings.method == "rl":
                rows = measured.to(device)
            found = torch.cat((counts[:, None].to(rows), rows.view(len(rows), -1)), 1)
            sums.index_add_(0, channel.to(device), found)
            step, tokens = step + 1, tokens + int(n_tokens)
            stop = from_first_process(stop_asked())
            evaluating, logging = pace.advance(step)

            if logging:
                values = averages("train", measures, channels, sum_over_processes(sums.cpu()))
                check_finite(values["train_loss"] + norm.item(), out)
                sums.zero_()
                tokens_per_step = (tokens - lap_tokens) / (step - pace.lap_step)
                values.update(step=step, tokens=tokens, lr=lr_scale * settings.lr, grad_norm=norm.item())
                values["tokens_per_second"] = tokens_per_step / pace.end_lap(step)
                flops_per_token = n_passes * model.config.flops_per_token(batch[0].size(-1))
                values["mfu"] = values["tokens_per_second"] * flops_per_token / peak
                details = shown(values, "train", measures, channels)
                decided = pace.decide_steps(step)

            if evaluating:
                values["val_bpb"] = base_bpb(model, material, settings, EVAL_TOKENS)
                if dev:
                    values.update(evaluation(objective, measures, material, settings))
                    check_finite(values["val_loss"], out)
                    details = shown(values, "val", measures, dev.channels)
                    if values["val_loss"] < best and rank == 0:
                        write_model(out / "best", model, settings, material)
                    best = min(best, values["val_loss"])
                add_sample(out, model, tokenizer, prompt, step)

            if logging:
                values["seconds"] = pace.read_clock()
                log.write(values, pace.left(step), evaluating or decided or step == 1, details=details)
                if decided:
                    show_steps(settings, pace)

            save_asked = settings.save_every and step % settings.save_every == 0
            if evaluating or stop or save_asked or pace.seconds - saved > SAVE_SECONDS:
                total = sum_over_processes(sums.cpu())
                check_finite(total.sum().item() + norm.item(), out)  # or the weights are useless
                if rank == 0:
                    state = dict(fixed, settings=asdict(settings), step=step, tokens=tokens, best=best)
                    state.update(seconds=pace.seconds, sums=total.tolist())
                    write_model(out, model, settings, material)
                    save_state(out, state, model, [optimizer])
                saved = pace.seconds
            if logging:
                pace.begin_lap(step, evaluating)
                lap_tokens = tokens
    return step


def main():
    """Start or resume a run -> the exit status: 0, or 130 if it was stopped."""
    args = parse_arguments()
    out, state = open_run(args, "finetune.py")
    device = start(args.device, args.deterministic)
    rank, _ = rank_and_world()
    if state:
        settings = TuneSettings(**state["settings"])
        move_settings(settings, device, settings.n_replay or settings.batch_size)
        model = open_base(settings.base, device, settings.lora_rank, settings.method)
    else:
        base = args.model or newest_start(chats=args.method == "rl")
        model = open_base(base, device, args.lora_rank, args.method)
        settings = choose_settings(args, base, model.config, device)
        name = Path(base).resolve().name
        if settings.method == "rl":
            name = name.removesuffix("-chat")
        suffix = "chat" if settings.method == "sft" else settings.method
        out = out or OUT / f"{name}-{suffix}"
    if rank == 0 and not settings.examples:
        tasks.find_tasks()
    from_first_process(0)  # the others wait
    material = read_material(settings)
    if args.dry_run:
        material.train.show(material.tokenizer)
        return 0
    if settings.lora_rank:
        torch.manual_seed(settings.seed)
        add_lora(model, settings.lora_rank, settings.lora_alpha)
    place, identity = os.path.relpath(out), identity_of(settings, material)
    if state:
        refuse_changes(state, identity)
        if state["step"] == settings.steps and (out / "results.json").exists():
            print(f"{place} is finished: {settings.steps:,} steps, nothing is left to do")
            return 0
        show("resumed", f"{place} after step {state['step']:,}")
    else:
        limit_epochs(args, settings, material.train)
        show_plan(settings, material, model)
        for path in filter(None, (settings.base, settings.examples, settings.test)):
            if out in (Path(path), *Path(path).parents):
                raise ValueError(f"{out} holds what is read, {path}: choose another --out")

    if device != "cpu":
        compare_with_cpu(model.config, device)
    with claim(out, state):
        if state:
            fixed = {name: state[name] for name in ("script", "data", "identity", "before")}
        else:
            before = measure(model, material, settings)
            fixed = dict(script="finetune.py", data=settings.data, identity=identity, before=before)
        step = tune(settings, material, model, out, fixed, state)
        if step != settings.steps:
            print(f"\nstopped after step {step:,}; to go on: python finetune.py --resume --out {place}")
            return 130
        after = measure(model, material, settings)
        if rank == 0:
            report(material, fixed["before"], after, settings, out)
            say_if_busy(out)
    if material.data:
        change = f"{fixed['before']['bpb']:.4f} bits per byte before, {after['bpb']:.4f} now"
        print(f"\nthe base model's own text, {material.data.name}: {change}")
    print(f"the model is in {place}/\nnext: python sample.py --chat --model {place}")
    from_first_process(0)  # the others wait for its report
    return 0


if __name__ == "__main__":
    run(main)
