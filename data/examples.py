"""From conversations in a .jsonl file to batches for finetune.py: what loader.py is for plain text.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "...", "channel": "its source, if losses are to be told apart"}
    {"prompt": "...", "chosen": "...", "rejected": "..."}       a preference, for --method dpo

Only what the assistant says is learned; a conversation of many turns teaches all of its answers in one pass,
except those with "weight": 0. Files in the layouts of ShareGPT, Alpaca and TRL are read as they are.
"""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from data.loader import IGNORED
from tokenizer import check_messages, render

POOL = 50  # batches' worth of shuffled examples are sorted by length together
DEV_SHARE, MOST_DEV = 20, 200  # every 20th example of a channel is held out, 200 at most


@dataclass
class Example:
    """A question with one answer or, for preferences, with a chosen and a rejected one."""

    conversations: list  # one or two lists of messages, each up to an answer
    channel: str

    @property
    def question(self):
        """All messages but the last answer."""
        return self.conversations[0][:-1]

    @property
    def answer(self):
        """The last thing that the assistant says."""
        return self.conversations[0][-1]["content"]


# --- reading ---

ANSWERS = ("completion", "chosen", "rejected")
LINE_FIELDS = {"messages", "prompt", "input", "system", "channel", *ANSWERS}
MESSAGE_FIELDS = {"role", "content", "weight"}
EMPTY = ("", [], {})  # as in columns that most lines do not use
OUR_NAMES = {  # what ShareGPT and Alpaca call it -> what it is called here
    "conversations": "messages", "from": "role", "value": "content", "human": "user", "gpt": "assistant",
    "instruction": "prompt", "output": "completion",
}  # fmt: skip


def check_conversation(messages):
    """ValueError: what is wrong with a conversation from which to learn."""
    check_messages(messages)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"the answer in message {i + 1} is empty")
        if message.get("weight", 1) not in (0, 1):
            raise ValueError(f"the weight of message {i + 1} is not 0 or 1: {message['weight']!r:.40}")
        message["content"].encode()  # half a surrogate pair is not a character
    turns = [message for message in messages if message["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        raise ValueError('there is no turn of the user at the beginning (of "messages" or "prompt")')
    if not any(turn["role"] == "assistant" and turn.get("weight", 1) for turn in turns):
        raise ValueError("there is no turn of the assistant to learn")


def rename(fields):
    """A line or a message with the names used here. ValueError: two of its fields mean the same."""
    if not isinstance(fields, dict):
        raise ValueError(f"it is not a JSON object: {fields!r:.40}")
    filled = {name: value for name, value in fields.items() if value is not None}
    renamed = {OUR_NAMES.get(name, name): value for name, value in filled.items()}
    if len(renamed) < len(filled):
        raise ValueError(f"two of these mean the same: {', '.join(filled)}")
    return renamed


def as_messages(value, role):
    """A text that this role says, or a list of messages -> a list of messages with the names used here."""
    if not isinstance(value, list):
        return [{"role": role, "content": value}]
    messages = [rename(message) for message in value]
    for message in messages:
        message["role"] = OUR_NAMES.get(message.get("role"), message.get("role"))
    return messages


def conversations_of(record):
    """The conversations of a line, each a list of messages that ends with an answer. ValueError: a fault."""
    system = as_messages(record["system"], "system") if record.get("system") else []
    question = record.get("messages") or record.get("prompt") or []
    if isinstance(question, str) and record.get("input"):  # Alpaca
        question += "\n\n" + record["input"]
    question = as_messages(question, "user")
    answers = [as_messages(record[name], "assistant") for name in ANSWERS if name in record]
    conversations = []
    for answer in answers or [[]]:
        conversation = system + question + answer
        if answer and answer[0]["role"] != "assistant":  # it begins with the question
            conversation = system + answer
        elif answer and question and question[-1]["role"] == "assistant":
            raise ValueError("the question ends with an answer already")
        check_conversation(conversation)
        while conversation[-1]["role"] != "assistant":  # nothing is learned from an unanswered turn
            conversation.pop()
        conversations.append(conversation)
    last = [conversation[-1]["content"].strip() for conversation in conversations]
    if len(last) == 2 and last[0] == last[1]:
        raise ValueError("chosen and rejected are the same")
    return conversations


def unread_fields(record, conversations):
    """The names of those fields of a line and of its messages that are not read here."""
    names = {name for name, value in record.items() if value not in EMPTY} - LINE_FIELDS
    if record.get("messages"):
        names |= record.keys() & {"prompt", "input"}
    for message in sum(conversations, []):
        names |= {name for name, value in message.items() if value not in EMPTY} - MESSAGE_FIELDS
    return names


def read_examples(path, pairs=False):
    """The Examples of a .jsonl file, with two answers if pairs. Unusable lines are skipped and reported.

    ValueError: not one line is usable.
    """
    examples, faults, unread = [], [], Counter()
    wanted = '"messages", or "prompt" and "completion" (--method dpo reads "chosen" and "rejected")'
    if pairs:
        wanted = '"prompt", "chosen" and "rejected"'
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    lines = text.split("\n")
    if text.lstrip().startswith("["):  # one JSON array instead of lines
        try:
            lines = [json.dumps(record) for record in json.loads(text)]
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path} begins as a JSON array and is none: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = rename(json.loads(line))
            conversations = conversations_of(record)
            if len(conversations) != (2 if pairs else 1):
                raise ValueError(f"it needs {wanted}")
            unread.update(unread_fields(record, conversations))
            examples.append(Example(conversations, str(record.get("channel", "all"))))
        except json.JSONDecodeError as error:
            faults.append(f"{path}, line {number}: not JSON, {error}")
        except KeyError as error:
            faults.append(f"{path}, line {number}: no {error}")
        except (AttributeError, TypeError, RecursionError, ValueError) as error:
            faults.append(f"{path}, line {number}: {error!s:.150}")
    if faults:
        print("\n".join(faults[:10]))
        print(f"{len(faults):,} lines of {path} cannot be used, of {len(faults) + len(examples):,}")
    if unread:
        names = ", ".join(f"{name} ({n:,} lines)" for name, n in sorted(unread.items()))
        print(f"passed over in {path}: {names}")
    if not examples:
        raise ValueError(f"there is no example in {path}: a line needs {wanted}")
    return examples


def hold_out(examples):
    """(for training, for validation): of each channel a twentieth is held out, chosen by content."""
    digests, of_channel = [], defaultdict(set)
    for example in examples:
        content = json.dumps(example.conversations).encode()
        digests.append(hashlib.blake2b(content, digest_size=8).digest())
        of_channel[example.channel].add(digests[-1])  # equal examples stay together
    held_out = set()
    for found in of_channel.values():
        held_out.update(sorted(found)[: min(MOST_DEV, len(found) // DEV_SHARE)])
    train, dev = [], []
    for example, digest in zip(examples, digests):
        if digest in held_out:
            dev.append(example)
        else:
            train.append(example)
    return train, dev


# --- ids and targets ---


def encode_conversation(tokenizer, messages, max_len, last_only=False):
    """A conversation -> (ids, mask, is_cut): tensors, cut off where longer than max_len tokens.

    last_only: earlier answers are not learned.
    """
    ids, mask = render(tokenizer, messages)
    if last_only:
        before, _ = render(tokenizer, messages[:-1])
        mask[: len(before)] = [False] * len(before)
    return torch.tensor(ids[:max_len], dtype=torch.int32), torch.tensor(mask[:max_len]), len(ids) > max_len


class Examples:
    """Encoded examples, and the order in which batches take them, which is computed from the seed.

    Each epoch takes all of them once. The examples of a batch have similar lengths, to need little padding.
    whole: leave out what is longer than block_size instead of cutting it.
    """

    def __init__(self, examples, tokenizer, block_size, batch_size, seed=0, whole=False):
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.examples = []
        self.rows = []  # for each example, (ids, mask) of its one or two conversations
        self.n_cut = 0
        for example in examples:
            several = len(example.conversations) > 1
            row, cut = [], False
            for messages in example.conversations:
                ids, mask, is_cut = encode_conversation(tokenizer, messages, block_size + 1, several)
                row.append((ids, mask))
                cut = cut or is_cut
            distinct = len({tuple(ids.tolist()) for ids, _ in row}) == len(row)
            if distinct and all(mask.any() for _, mask in row) and not (cut and whole):
                self.examples.append(example)
                self.rows.append(row)
                self.n_cut += cut
        self.n_dropped = len(examples) - len(self.rows)
        if not self.rows:
            raise ValueError(f"no example has an answer within the first {block_size} tokens")
        self.channels = sorted({example.channel for example in self.examples})
        self.lengths = []  # multiples of 8, since oneDNN keeps a plan in memory for each shape it meets
        for row in self.rows:
            longest = max(len(ids) for ids, _ in row) - 1
            self.lengths.append(min(-(-longest // 8) * 8, block_size))
        self.per_epoch = -(-len(self.rows) // batch_size)  # batches

    def __str__(self):
        counts = Counter(example.channel for example in self.examples)
        lines = [f"{len(self.rows):,}: " + "; ".join(f"{name} {counts[name]:,}" for name in self.channels)]
        length = f"the {self.block_size} tokens that the model reads"
        if self.n_cut:
            lines.append(f"{self.n_cut:,} are cut to {length}")
        if self.n_dropped:
            lines.append(f"{self.n_dropped:,} are left out: not answered within {length}")
        return "; ".join(lines)

    @lru_cache(maxsize=2)  # noqa: B019  a process has one or two of these objects
    def epoch(self, number):
        """The batches of an epoch, each a list of indices."""
        rng, n = np.random.default_rng([self.seed, number]), self.batch_size
        order, batches = rng.permutation(len(self.rows)), []
        for pool in np.split(order, range(POOL * n, len(order), POOL * n)):
            by_length = sorted(pool.tolist(), key=self.lengths.__getitem__)
            batches += [by_length[i : i + n] for i in range(0, len(by_length), n)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def by_length(self, size):
        """All indices once, the shortest examples first, in lists of that size."""
        order = sorted(range(len(self.rows)), key=self.lengths.__getitem__)
        return [order[i : i + size] for i in range(0, len(order), size)]

    def batch(self, step, rank=0, world=1):
        """What process `rank` of `world` takes of the step's batch, see tensors."""
        number, i = divmod(step, self.per_epoch)
        return self.tensors(self.epoch(number)[i], rank, world)

    def tensors(self, indices, rank=0, world=1):
        """ids and targets (n, T), or of pairs (n, 2, T), and channels (n,) of some examples.

        Rows are padded on the right, which needs no attention mask: attention looks only back, and targets
        there are IGNORED. A process that would have an example less gets a row without targets.
        """
        mine = indices[rank::world]
        n, A, T = -(-len(indices) // world), len(self.rows[0]), max(self.lengths[i] for i in indices)
        ids = torch.zeros(n, A, T, dtype=torch.long)
        targets = torch.full_like(ids, IGNORED)
        channels = torch.zeros(n, dtype=torch.long)
        for row, i in enumerate(mine):
            channels[row] = self.channels.index(self.examples[i].channel)
            for k, (text, mask) in enumerate(self.rows[i]):
                ids[row, k, : len(text) - 1] = text[:-1]
                targets[row, k, : len(text) - 1] = text[1:].masked_fill(~mask[1:], IGNORED)
        return ids.squeeze(1), targets.squeeze(1), channels

    def show(self, tokenizer, i=0):
        """Print an example as the model reads it; what is learned is between ⟦ and ⟧."""
        for ids, mask in self.rows[i]:
            text = ""
            for learned, part in groupby(zip(ids.tolist(), mask.tolist()), key=lambda pair: pair[1]):
                piece = tokenizer.decode([new for new, _ in part])
                text += f"⟦{piece}⟧" if learned else piece
            print(f"{text}{len(ids)} tokens, {int(mask.sum())} to be learned: ⟦these⟧")
