"""From conversations in a .jsonl to batches for finetune.py: what loader.py is for plain text.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "...", "channel": "its source, if losses are to be told apart"}
    {"prompt": "...", "chosen": "...", "rejected": "..."}       to prefer, for --method dpo

Only what the assistant says is to be learned; a conversation of many turns teaches all of them in one pass.
"""

import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data import tasks
from data.loader import IGNORED, Data, find_data, load_data
from sample import render
from tokenizer import Tokenizer

POOL = 50  # batches' worth of shuffled examples at a time are sorted by length
ROLES = ("system", "user", "assistant")
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
DEV_SHARE, MOST_DEV = 20, 200  # every 20th example of a channel is held out, 200 at most


@dataclass
class Example:
    """A question with one answer or, to prefer the first to the second, with two."""

    conversations: list  # lists of messages, each up to an answer
    channel: str

    @property
    def question(self):
        """All messages but the answer."""
        return self.conversations[0][:-1]

    @property
    def answer(self):
        """The last thing that the assistant says."""
        return self.conversations[0][-1]["content"]


# --- reading ---


def conversations_of(record):
    """The conversations of a record, each a list of messages. ValueError: what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"it is no JSON object: {record!r:.40}")
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    answers = [record[name] for name in ("completion", "chosen", "rejected") if name in record]
    found = [messages + [{"role": "assistant", "content": answer}] for answer in answers] or [messages]
    for messages in found:
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role not in ROLES[i > 0 :]:
                raise ValueError(f"message {i + 1} has the role {role!r}, not {' or '.join(ROLES[i > 0 :])}")
            if not isinstance(content, str):
                raise ValueError(f"the content of message {i + 1} is no text: {content!r:.40}")
            if role == "assistant" and not content.strip():
                raise ValueError(f"the answer in message {i + 1} is empty")
            content.encode()  # half a surrogate pair is no character
        said = [message["role"] for message in messages if message["role"] != "system"]
        if said[:1] != ["user"]:
            raise ValueError("the first turn must be the user's")
        if "assistant" not in said:
            raise ValueError("there is no turn of the assistant to learn")
        while messages[-1]["role"] != "assistant":  # what nobody answers teaches nothing
            messages.pop()
    if len(found) == 2 and found[0][-1]["content"].strip() == found[1][-1]["content"].strip():
        raise ValueError("chosen and rejected are the same")
    return found


def read_examples(path, pairs=False):
    """The Examples of a .jsonl, with two answers if pairs. Unusable lines are passed over, counted aloud.

    ValueError: not one line is usable.
    """
    examples, faults = [], []
    wanted = '"prompt", "chosen" and "rejected"' if pairs else '"messages", or "prompt" and "completion"'
    lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found = conversations_of(record)
            if len(found) != 1 + pairs:
                raise ValueError(f"it needs {wanted}")
            examples.append(Example(found, str(record.get("channel", "all"))))
        except json.JSONDecodeError as error:
            faults.append(f"{path}, line {number}: no JSON, {error}")
        except (AttributeError, KeyError, TypeError, RecursionError, ValueError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            faults.append(f"{path}, line {number}: {why!s:.150}")
    if faults:
        print("\n".join(faults[:10]))
        print(f"{len(faults):,} lines of {path} cannot be used, of {len(faults) + len(examples):,}")
    if not examples:
        raise ValueError(f"there is no example in {path}: a line needs {wanted}")
    return examples


def hold_out(examples):
    """(for training, for validation): of each channel a twentieth, chosen by content, is held out."""
    digests, of_channel = [], defaultdict(set)
    for example in examples:
        content = json.dumps(example.conversations).encode()
        digests.append(hashlib.blake2b(content, digest_size=8).digest())
        of_channel[example.channel].add(digests[-1])  # equal ones stay together
    held_out = set()
    for found in of_channel.values():
        held_out |= set(sorted(found)[: min(MOST_DEV, len(found) // DEV_SHARE)])
    both = list(zip(examples, digests))
    return [e for e, d in both if d not in held_out], [e for e, d in both if d in held_out]


# --- ids and targets ---


def with_chat_tokens(tokenizer):
    """The tokenizer or, if it lacks ChatML's tokens, one that has them behind its own."""
    missing = [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=tokenizer.vocab_size + i, content=name, **flags) for i, name in enumerate(missing)]
    if not added:
        return tokenizer
    return Tokenizer(tokenizer.document | {"added_tokens": tokenizer.document["added_tokens"] + added})


def fit(tokenizer, messages, room, last_only=False):
    """ids and loss mask of a conversation, whose end is cut off where it is longer than `room` tokens.

    Before a message, if that leaves an answer. last_only: earlier answers are not learned. Returns both and
    whether something was cut off.
    """
    parts = [render(tokenizer, [message]) for message in messages]
    if last_only:
        parts = [(ids, [False] * len(ids)) for ids, _ in parts[:-1]] + parts[-1:]
    ids, mask = [], []
    for new_ids, new_mask in parts:
        if any(mask) and len(ids) + len(new_ids) > room:
            break
        ids, mask = ids + new_ids, mask + new_mask
    ids, mask = ids[:room], mask[:room]
    is_cut = len(ids) < sum(len(new_ids) for new_ids, _ in parts)
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(mask), is_cut


class Examples:
    """Examples as ids, and the order in which batches take them, which is computed from the seed.

    Each epoch takes all of them once. A batch has examples of about one length: little of it is padding.
    """

    def __init__(self, examples, tokenizer, block_size, batch_size, seed=0):
        self.examples, self.rows, self.n_cut = [], [], 0
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        for example in examples:
            several = example.conversations
            row = [fit(tokenizer, messages, block_size + 1, len(several) > 1) for messages in several]
            distinct = len({tuple(ids.tolist()) for ids, _, _ in row}) == len(row)
            if distinct and all(mask.any() for _, mask, _ in row):
                self.examples.append(example)
                self.rows.append([(ids, mask) for ids, mask, _ in row])
                self.n_cut += any(is_cut for _, _, is_cut in row)
        self.n_dropped = len(examples) - len(self.rows)
        if not self.rows:
            raise ValueError(f"no example has an answer within the first {block_size} tokens")
        self.channels = sorted({example.channel for example in self.examples})
        # in steps of eight: for each shape that it meets, a CPU's library of kernels keeps plans in memory
        lengths = (-(-(max(len(ids) for ids, _ in row) - 1) // 8) * 8 for row in self.rows)
        self.lengths = [min(length, block_size) for length in lengths]
        self.references = torch.zeros(len(self.rows), len(self.rows[0]))  # log p, see preference.py
        self.per_epoch = -(-len(self.rows) // batch_size)  # batches

    def __str__(self):
        counts = Counter(example.channel for example in self.examples)
        lines = [f"{len(self.rows):,}: " + "; ".join(f"{name} {counts[name]:,}" for name in self.channels)]
        length = f"the {self.block_size} tokens that the model reads"
        lines += [f"{self.n_cut:,} are cut to {length}"] * (self.n_cut > 0)
        lines += [f"{self.n_dropped:,} are left out: no answer is within {length}"] * (self.n_dropped > 0)
        return "; ".join(lines)

    @lru_cache(maxsize=2)  # noqa: B019  there are one or two of these objects in a process
    def epoch(self, number):
        """The batches of an epoch, each a list of indices."""
        dice, n = np.random.default_rng([self.seed, number]), self.batch_size
        order, batches = dice.permutation(len(self.rows)), []
        for pool in np.split(order, range(POOL * n, len(order), POOL * n)):
            by_length = sorted(pool.tolist(), key=self.lengths.__getitem__)
            batches += [by_length[i : i + n] for i in range(0, len(by_length), n)]
        return [batches[i] for i in dice.permutation(len(batches))]

    def by_length(self, size=None):
        """All indices once, in batches of that size (batch_size)."""
        order, size = sorted(range(len(self.rows)), key=self.lengths.__getitem__), size or self.batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]

    def mean_tokens(self):
        """Tokens of a batch with its padding, on average."""
        batches, n_answers = self.epoch(0), len(self.rows[0])
        tokens = sum(len(batch) * max(self.lengths[i] for i in batch) for batch in batches)
        return n_answers * tokens / len(batches)

    def batch(self, step, rank=0, world=1):
        """What process `rank` of `world` takes of the step's batch, see tensors."""
        number, i = divmod(step, self.per_epoch)
        return self.tensors(self.epoch(number)[i], rank, world)

    def tensors(self, indices, rank=0, world=1):
        """ids and targets (n, T), counts and channels (n,) of some examples, filled up on the right.

        Of pairs ids, targets (n, 2, T), references (n, 2), counts (1 for a pair) and channels.
        """
        # Padding needs no attention mask: it stands behind the text, attention looks only back, and as a
        # target it is ignored. So nothing that counts depends on it.
        mine = indices[rank::world]
        T, pairs = max(self.lengths[i] for i in indices), len(self.rows[0]) == 2
        n = -(-len(indices) // world)  # one process may have an example less: it gets a row without targets
        ids, references = torch.zeros(n, 1 + pairs, T, dtype=torch.long), torch.zeros(n, 2)
        targets, channels = torch.full_like(ids, IGNORED), torch.zeros(n, dtype=torch.long)
        for row, i in enumerate(mine):
            channels[row] = self.channels.index(self.examples[i].channel)
            for k, (text, mask) in enumerate(self.rows[i]):
                ids[row, k, : len(text) - 1] = text[:-1]
                targets[row, k, : len(text) - 1] = text[1:].masked_fill(~mask[1:], IGNORED)
        if pairs:
            references[: len(mine)] = self.references[mine]
            return ids, targets, references, (targets[:, 0] != IGNORED).any(1).long(), channels
        return ids[:, 0], targets[:, 0], (targets[:, 0] != IGNORED).sum(1), channels

    def show(self, tokenizer, i=0):
        """Print an example as the model reads it: what it learns in colour or, in a file, between marks."""
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        begin, end = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
        for ids, mask in self.rows[i]:
            text = b""
            for new, learned, before in zip(ids.tolist(), mask.tolist(), [False, *mask.tolist()]):
                text += ((begin if learned else end) if learned != before else "").encode()
                text += tokenizer.decode_bytes([new])
            print(text.decode(errors="replace"), end=end if mask[-1] else "")
            print(f"{len(ids)} tokens, {int(mask.sum())} to be learned: {begin}these{end}")


# --- what a run reads ---


@dataclass
class Material:
    """What a run reads."""

    base: Path  # the folder of the model that it starts from
    adapter: Path | None  # an update of it, to go on with
    tokenizer: Tokenizer
    train: Examples
    dev: Examples | None
    test: list  # of Example
    data: Data | None  # what the base model was trained on


def n_replayed(run):
    """Rows of a batch that come from the base model's own text; each process has as many. ValueError: all."""
    n = round(run.batch_size * run.replay / run.processes) * run.processes
    if n >= run.batch_size:
        raise ValueError(
            f"--replay {run.replay} of --batch-size {run.batch_size} leaves no room for examples"
        )
    return n


def read_material(run, base, adapter, examples, test, data):
    """Open all that a run reads, and say what is there. The arguments are names and paths, or None."""
    base, adapter = Path(base), adapter and Path(adapter)
    known = Tokenizer.load(base / "tokenizer.json")
    tokenizer = with_chat_tokens(known)
    if tokenizer is not known:
        print(f"{base} has no tokens for the layout of a chat: they are added, at the mean of the others")
        if run.lora_rank:
            print("so the adapter will fit the result, not that folder as it is")
    data = load_data(find_data(data)) if data else None
    if data and data.tokenizer.fingerprint != known.fingerprint:
        print(f"{data.name} was prepared with another tokenizer: it is of no use to {base}")
        data = None
    run.replay = run.replay if data else 0.0
    if examples is None:
        learned, dev, test = (read_examples(tasks.FOLDER / f"{split}.jsonl") for split in tasks.SIZES)
    else:
        learned, dev = hold_out(read_examples(examples, run.method == "dpo"))
        test = read_examples(test) if test else []
    shape = dict(block_size=run.block_size, batch_size=run.batch_size - n_replayed(run), seed=run.seed)
    learned = Examples(learned, tokenizer, **shape)
    try:
        dev = Examples(dev, tokenizer, **shape) if dev else None
    except ValueError:
        dev = None
    print(f"{'examples':10}{learned}\n{'held out':10}{dev or 'none: too few of each channel, or too long'}")
    return Material(base, adapter, tokenizer, learned, dev, test, data)


def identity(material, sources):
    """What a run must find unchanged when it goes on."""
    files = [Path(sources[name]) for name in ("examples", "test") if sources[name]]
    files = files or sorted(tasks.FOLDER.glob("*.jsonl"))
    for folder in filter(None, (material.base, material.adapter)):
        files += sorted(folder.glob("*.safetensors"))
    found = {"tokenizer": material.tokenizer.fingerprint}
    found["text of the base model"] = material.data.fingerprint if material.data else None
    return found | {str(path): hashlib.blake2b(np.memmap(path), digest_size=16).hexdigest() for path in files}
