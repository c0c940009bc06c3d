"""Stage 1: the tokenizer. Text in, token ids out, and back.

A model reads a fixed list of tokens. Byte-level byte-pair encoding (Sennrich et al., 2016; Radford et al.,
2019) learns that list from text: start from the 256 bytes, then repeatedly make the most frequent pair of
neighbouring tokens a new token.

    "the then" -> t h e _ t h e n -> t (he) _ t (he) n -> (the) _ (the) n

Learning is written out in `learn_merges`; encoding with a learned vocabulary is left to tiktoken. The file is
a Hugging Face `tokenizer.json`, so the whole ecosystem opens ours, and this opens those of GPT-2, Llama 3,
Qwen and SmolLM. On a first reading, skip the sections "split patterns" and "tokenizer.json".

    python tokenizer.py train FILE... --vocab-size 8192 --out tokenizer.json
    python tokenizer.py show tokenizer.json "text"
"""

import argparse
import gc
import hashlib
import json
import os
import re
import signal
import sys
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property, partial
from heapq import heapify, heappop, heappush
from pathlib import Path

import numpy as np
import regex
import tiktoken

BYTES = [bytes([byte]) for byte in range(256)]  # the first 256 tokens
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Text is first cut into chunks, and no merge crosses the border of a chunk: so "dog", "dog." and "dog!" share
# a token. A chunk is, in this order: an English contraction; a word with the space or mark before it; up to
# three digits; punctuation with the line ends after it; whitespace up to a line end; other whitespace.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# A word is a chunk of its own, without the space before it: a name has the same tokens everywhere.
WORDS_PATTERN = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# --- learning merges ---


def learn_merges(chunks, n_merges):
    """Learn up to n_merges merges from {chunk: count}; return them in order, as pairs of bytes.

    The most frequent pair wins; a tie goes to the smallest (left id, right id). Each chunk is kept as a str
    *whose code points are token ids*. A pair is then a str of two characters, a merge is `str.split` and
    `str.join`, and comparing strings breaks ties. Only the pairs that a merge touches are counted again.
    """
    words = [chunk.encode().decode("latin-1") for chunk in chunks]  # one character per byte
    count_of = list(chunks.values()).__getitem__  # count_of(i): how often words[i] occurs in the text
    where = defaultdict(list)  # pair -> i for each occurrence in words[i]; may hold outdated entries
    for i, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            where[left + right].append(i)
    pair_counts = {pair: sum(map(count_of, found)) for pair, found in where.items()}
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)
    merges, tokens = [], list(BYTES)
    while heap and len(merges) < n_merges:
        negative, pair = heappop(heap)
        if pair_counts[pair] != -negative:  # outdated: the count has fallen since, so push it back
            if pair_counts[pair] > 0:
                heappush(heap, (-pair_counts[pair], pair))
            continue
        left, right = pair
        new = chr(len(tokens))
        merges.append((tokens[ord(left)], tokens[ord(right)]))
        tokens.append(b"".join(merges[-1]))
        before, after = defaultdict(list), defaultdict(list)  # neighbour of the pair -> i
        doubled = []  # i where the pair follows itself, as in "abab"
        for i in dict.fromkeys(where.pop(pair)):  # each word once, in order
            pieces = words[i].split(pair)
            if len(pieces) == 1:  # an earlier merge consumed it
                continue
            words[i] = new.join(pieces)
            for head, tail in zip(pieces, pieces[1:]):  # around each occurrence
                if head:
                    before[head[-1]].append(i)
                if tail:
                    after[tail[0]].append(i)
            if len(pieces) > 2:
                doubled += [i] * pieces[1:-1].count("")
        # x l r y -> x new y: "xl" becomes "x new", "ry" becomes "new y"; in l r l r, "rl" becomes "new new"
        changes = [(symbol + left, symbol + new, found) for symbol, found in before.items()]
        changes += [(right + symbol, new + symbol, found) for symbol, found in after.items()]
        changes += [(right + left, new + new, doubled)] if doubled else []
        for gone, made, found in changes:
            count = sum(map(count_of, found))
            pair_counts[gone] -= count
            pair_counts[made] = count
            where[made] = found
            heappush(heap, (-count, made))
        del pair_counts[pair]
    return merges


def mend_surrogates(text):
    """Replace half a surrogate pair, which UTF-8 cannot encode, by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def count_chunks(texts, pattern):
    """How often each chunk occurs in a list of texts, as a Counter."""
    split = compile_splitter(pattern)
    counts = Counter()
    for text in texts:
        counts.update(split(mend_surrogates(text)))
    return counts


def map_batches(pool, function, items, size, ahead, length=len):
    """Yield function(batch) in order, for lists of items of about `size` in all, `ahead` of them early."""
    waiting = deque()
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += length(item)
        if total >= size:
            waiting.append(pool.submit(function, batch))
            batch, total = [], 0
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    waiting.append(pool.submit(function, batch))
    for future in waiting:
        yield future.result()


# --- split patterns ---


def covering(pattern):
    """A pattern that matches what the given one does and, in one piece, the text up to its next match."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def unicode_ranges(name):
    r"""The characters of a class such as \p{L} below U+10000, written as the inside of a [...] for `re`."""
    plane = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    return "".join(f"\\u{ord(run[0]):04x}-\\u{ord(run[-1]):04x}" for run in regex.findall(name + "+", plane))


def write_out_classes(match):
    r"""A part of a pattern for `re`: \p{L} -> [ranges], [^\p{L}] -> [^ranges], \S -> [^ranges]."""
    written = match.group().replace(r"\S", r"[^\s]")
    written = re.sub(r"\\p\{\w+\}|\\s", lambda part: unicode_ranges(part.group()), written)
    return written if "[" in written else f"[{written}]"


@cache
def compile_splitter(pattern, keep_rest=True):
    r"""Return a function that cuts a text into chunks, a list of str. ValueError: the pattern is unusable.

    keep_rest: whether text between two matches is a chunk, too. The library `re` is about twice as fast as
    `regex` but does not know \p{L}. For the three patterns above, such classes are written out as ranges
    below U+10000; a text with characters beyond is left to `regex`.
    """
    try:
        exact = regex.compile(covering(pattern) if keep_rest else pattern)
    except regex.error as error:
        raise ValueError(f"the split pattern {pattern} is not a regular expression: {error}") from None
    bare = re.sub(r"\\.|\[(\\.|[^\]\\])*\]|\(\?i:", "", pattern)  # without escapes, sets and (?i:...)
    # regex, re, tiktoken and the library tokenizers differ on these
    odd = re.search(r"\^|(?<!\+\+)\$|\(\?\w+[):]", bare) or re.search(r"&&|\[\[:|\\[hK]", pattern)
    if exact.groups or odd or "" in exact.findall("".join(map(chr, range(0x3100)))):
        raise ValueError(f"the split pattern {pattern} has a group, an anchor, a flag or an empty match")
    fast = exact
    known = keep_rest and pattern in (GPT2_PATTERN, GPT4_PATTERN, WORDS_PATTERN)
    if known and sys.version_info >= (3, 11):  # has "++"
        fast = re.compile(covering(re.sub(r"\[[^\]]*\]|\\p\{\w+\}|\\[sS]", write_out_classes, pattern)))
    beyond = re.compile("[\U00010000-\U0010ffff]").search

    def split(text):
        if text.isascii() or not beyond(text):
            return fast.findall(text)
        return exact.findall(text)

    return split


# --- tokenizer.json ---


def byte_symbols():
    """GPT-2's printable character for each byte, in which tokenizer.json spells its tokens, as a list."""
    others = iter(range(256, 512))
    return [chr(byte if chr(byte).isprintable() and byte != 32 else next(others)) for byte in range(256)]


def tokenizer_json(ids, merges, pattern, special_tokens):
    """A tokenizer.json as a dict. ids {bytes: id}, merges [(bytes, bytes)], special_tokens {text: id}."""
    symbols = byte_symbols()
    names = {token: "".join(symbols[byte] for byte in token) for token in ids}
    vocab = {names[token]: i for token, i in ids.items()}
    for text in special_tokens:
        if text in vocab or text.encode() in ids:
            raise ValueError(f"the special token {text!r} is also an ordinary token of this vocabulary")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return {
        "version": "1.0",
        "added_tokens": [dict(id=i, content=text, **flags) for text, i in special_tokens.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": False,
            "vocab": vocab | special_tokens,
            "merges": [[names[left], names[right]] for left, right in merges],
        },
    }


def steps_of(part, name):
    """The steps of a normalizer, pre_tokenizer or post_processor: it is a Sequence, one step or null."""
    return part.get(name, [part]) if part else []


def refuse_unsupported(document):
    """ValueError: the tokenizer.json has a setting that changes ids and that is not implemented here."""
    model = document["model"]
    options = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    odd = {field: model[field] for field in options if model.get(field)}
    if odd or model.get("type", "BPE") != "BPE":
        raise ValueError(f"model: {model.get('type')} {odd or ''} is not supported")
    for step in steps_of(document.get("normalizer"), "normalizers"):
        if step != {"type": "NFC"}:
            raise ValueError(f"normalizer: {json.dumps(step)} is not supported")
    for token in document["added_tokens"]:
        odd = not token["special"] and (token["single_word"] or token["lstrip"] or token["rstrip"])
        twice = model["vocab"].get(token["content"], token["id"]) != token["id"]
        if odd or twice or token["content"] in byte_symbols():  # the name of a byte in the vocabulary
            raise ValueError(f"added_tokens: {token} is not supported")


def read_patterns(pre_tokenizer):
    """How a tokenizer.json splits text, step by step: [(pattern, whether text between matches is kept)]."""
    steps = steps_of(pre_tokenizer, "pretokenizers")
    patterns = []
    for step in steps:
        match step:
            case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}}:
                patterns.append((pattern, True))
            case {"type": "Split", "behavior": "Removed", "invert": True, "pattern": {"Regex": pattern}}:
                patterns.append((pattern, False))
            case {"type": "Digits", "individual_digits": True}:
                patterns.append((r"\p{N}", True))
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                if step.get("use_regex", True):
                    patterns.append((GPT2_PATTERN, True))
                return patterns or [(r"[\s\S]+", True)]
            case _:
                raise ValueError(f"pre_tokenizer: {json.dumps(step)} is not supported")
    raise ValueError("pre_tokenizer: it does not end with ByteLevel")


def read_ranks(model, ids, spell):
    """Read the merges -> (halves {token: its two parts}, ranks {token: order in which tiktoken joins it}).

    ids {token: id}; spell(name in the file) -> token. tiktoken needs no merges: it joins any two neighbours
    that spell a token, the one of lowest rank first. That equals the merges of a list that was learned, in
    which each token is made of tokens made before it (checked) and comes out of its own text (not checked).
    A token without a merge (only with ignore_merges) must not be spelled by two others.
    """
    halves = {}
    for merge in model["merges"]:
        names = merge.split(" ") if isinstance(merge, str) else merge
        left, right = map(spell, names)
        known = all(len(half) == 1 or half in halves for half in (left, right))
        if not known and not model.get("ignore_merges"):
            raise ValueError(f"model.merges: {left + right!r} is made before its halves")
        halves.setdefault(left + right, (left, right))
    whole = set()
    if model.get("ignore_merges"):
        whole = ids.keys() - halves.keys() - set(BYTES)
    for token in whole:
        if any(token[:i] in ids and token[i:] in ids for i in range(1, len(token))):
            raise ValueError(f"model.merges: {token!r} has none, though two other tokens spell it")
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys([*BYTES, *halves, *whole]))}
    return halves, ranks


CONFIG_FIELDS = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")


def read_config(folder):
    """The CONFIG_FIELDS of the files beside a tokenizer.json. ValueError: they are damaged."""
    path, template = Path(folder, "tokenizer_config.json"), Path(folder, "chat_template.jinja")
    config = {}
    try:
        if path.exists():  # a token is a text or {"content": text, ...}
            config = json.loads(path.read_bytes(), object_hook=lambda part: part.get("content", part))
        if isinstance(config.get("chat_template"), list):
            templates = {named["name"]: named["template"] for named in config["chat_template"]}
            config["chat_template"] = templates["default"]
        if template.exists():
            config["chat_template"] = template.read_text(encoding="utf-8")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.150}") from None
    return {name: config[name] for name in CONFIG_FIELDS if config.get(name)}


# --- the tokenizer ---


class Tokenizer:
    """A vocabulary at work, made from the content of a tokenizer.json. ValueError: it is not supported.

    tokens {id: bytes}; special_tokens {text: id}; vocab_size; bytes_per_token[id] (special tokens: 0).
    missing_bytes: bytes that have no token; `encode` leaves them out. config: see read_config.
    Text never becomes a special token; other added tokens are found in it. A post_processor is ignored here.
    """

    def __init__(self, document, config=None):
        refuse_unsupported(document)
        model, added = document["model"], document["added_tokens"]
        self.document, self.config = document, config or {}
        self.special_tokens, literals = {}, {}
        for token in added:
            if token["special"] or token["content"] in CHAT_TOKENS:
                self.special_tokens[token["content"]] = token["id"]
            else:
                literals[token["content"]] = token["id"]

        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}

        def spell(name):
            return bytes([byte_of[symbol] for symbol in name])

        names = [name for name in model["vocab"] if name not in literals and name not in self.special_tokens]
        ids = {spell(name): model["vocab"][name] for name in names}
        self.halves, ranks = read_ranks(model, ids, spell)
        self.ranks = ranks
        # A merge may make an added token; but where its text stands, the added token is found first.
        if unknown := self.halves.keys() - ids.keys() - {text.encode() for text in literals}:
            raise ValueError(f"model.vocab: it lacks {min(unknown)!r}, the result of a merge")
        self.missing_bytes = b"".join(byte for byte in BYTES if byte not in ids)
        if self.missing_bytes and model.get("unk_token"):
            raise ValueError(f"model: unk_token {model['unk_token']} for missing bytes is not supported")

        self._id_of_rank = np.array([ids.get(token, -1) for token in ranks])
        self._literals = literals
        texts = [*ids.items(), *((text.encode(), i) for text, i in literals.items())]
        self.tokens = {i: token for token, i in texts}
        self.tokens.update((i, text.encode()) for text, i in self.special_tokens.items())
        if len(self.tokens) < len(ids) + len(added) or not 0 <= min(self.tokens) <= max(self.tokens) < 2**24:
            raise ValueError("ids must be whole numbers below 2^24, each used once")
        self.vocab_size = max(self.tokens) + 1
        self.bytes_per_token = np.zeros(self.vocab_size, dtype=np.int64)
        self.bytes_per_token[[i for _, i in texts]] = [len(token) for token, _ in texts]

        patterns = read_patterns(document["pre_tokenizer"])
        *self._steps, self._split = [compile_splitter(*pattern) for pattern in patterns]
        if steps_of(document.get("normalizer"), "normalizers"):
            self._steps.insert(0, lambda text: [unicodedata.normalize("NFC", text)])
        if literals:
            longest_first = sorted(literals, key=len, reverse=True)
            self._steps.insert(0, compile_splitter("|".join(map(regex.escape, longest_first))))
        pattern, keep_rest = patterns[-1]  # tiktoken applies the last one
        pattern = covering(pattern) if keep_rest else pattern
        unused = {"<": len(ranks)}  # never found in text, but tiktoken is slower without any
        self._encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=unused)

    def __reduce__(self):  # for other processes, to which the functions in _steps cannot be sent
        return Tokenizer, (self.document, self.config)

    @cached_property
    def chat_layout(self):
        """See read_chat_layout."""
        return read_chat_layout(self)

    @property
    def fingerprint(self):
        """A hash of the whole document: tokenizers with equal fingerprints encode alike."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def train(
        cls, documents, vocab_size, pattern=GPT4_PATTERN, special_tokens=SPECIAL_TOKENS, processes=1, log=None
    ):
        """Learn a vocabulary from an iterable of str, which is read once and never held in memory.

        log is called with lines of progress. A text that runs out of pairs gives a smaller vocabulary.
        ValueError: no text, or unusable settings.
        """
        log = log or (lambda line: None)
        least = len(BYTES) + len(special_tokens)
        if not least <= vocab_size <= 2**20:
            raise ValueError(f"vocabulary size {vocab_size} is outside {least} (bytes, specials) to 2^20")
        if len(set(special_tokens) - {""}) < len(special_tokens):
            raise ValueError(f"a special token is empty or given twice: {', '.join(special_tokens)}")
        if processes > 1:  # Ctrl-C is for the parent alone
            pool = ProcessPoolExecutor(processes, None, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        else:
            pool = ThreadPoolExecutor(1)
        chunks, count = Counter(), partial(count_chunks, pattern=pattern)
        with pool:
            for n, counts in enumerate(map_batches(pool, count, documents, 2**22, 2 * processes - 2), 1):
                chunks.update(counts)
                if n % 16 == 0:
                    log(f"{n} batches of text, {len(chunks):,} different chunks")
        if not chunks:
            raise ValueError("there is no training text to learn a vocabulary from")
        log(f"{chunks.total():,} chunks, {len(chunks):,} different")
        gc.disable()  # there are millions of small objects, none of them in cycles
        try:
            merges = learn_merges(chunks, vocab_size - least)
        finally:
            gc.enable()
        tokens = [*BYTES, *(left + right for left, right in merges)]
        specials = {text: len(tokens) + i for i, text in enumerate(special_tokens)}
        if len(tokens) + len(specials) < vocab_size:
            log(f"the text has no more pairs: {len(tokens) + len(specials)} tokens, not {vocab_size}")
        return cls(tokenizer_json({token: i for i, token in enumerate(tokens)}, merges, pattern, specials))

    def encode(self, text):
        """Text -> list of ids. It is always ordinary text: the id of a special token never comes out."""
        return self.encode_to_array(text).tolist()

    def encode_to_array(self, text):
        """Text -> ids as an int64 array."""
        parts, literals = [mend_surrogates(text)], self._literals
        for step in self._steps:
            parts = [piece for part in parts for piece in ([part] if part in literals else step(part))]
        ids = [np.int64([])]
        for part in parts:
            if part in literals:
                ids.append([literals[part]])
            else:
                ids.append(self._encode_part(part))
        return np.concatenate(ids)

    def _encode_part(self, part):
        """A text without added tokens -> ids as an array."""
        with suppress(ValueError):  # tiktoken's regex engine gives up, as on a million blanks in a row
            ids = self._id_of_rank[self._encoding.encode_to_numpy(part, disallowed_special=())]
            if -1 not in ids:
                return ids
        # Chunk by chunk; the neighbours of a byte that has no token may merge, as in the library tokenizers.
        chunks = [chunk.encode().translate(None, self.missing_bytes) for chunk in self._split(part)]
        ranks = [rank for chunk in chunks if chunk for rank in self._encoding._encode_single_piece(chunk)]
        return self._id_of_rank[ranks]

    def decode_bytes(self, ids):
        """Ids -> the bytes that they stand for; special tokens as their names. ValueError: an unknown id."""
        try:
            return b"".join([self.tokens[i] for i in ids])
        except KeyError as unknown:
            raise ValueError(f"id {unknown} is not in the vocabulary of {self.vocab_size} tokens") from None

    def decode(self, ids):
        """Ids -> text; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write the tokenizer.json."""
        Path(path).write_text(json.dumps(self.document, ensure_ascii=False, indent=1), encoding="utf-8")

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        self.save(Path(folder) / "tokenizer.json")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config.update(self.config)
        if "<|endoftext|>" in self.special_tokens:
            config.setdefault("eos_token", "<|endoftext|>")
        if "eos_token" in config:  # transformers makes no batch of texts without a token to pad them
            config.setdefault("pad_token", config["eos_token"])
        if self.special_tokens.keys() >= set(CHAT_TOKENS):
            config["chat_template"] = self.chat_layout[0]
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read a byte-level BPE tokenizer.json. ValueError: the file is damaged or of another kind."""
        config = read_config(Path(path).parent)
        try:
            return cls(json.loads(Path(path).read_bytes()), config)
        except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
            kind = "a byte-level BPE tokenizer.json, such as that of GPT-2, Llama 3, Qwen or SmolLM"
            raise ValueError(f"{path} is not {kind}: {error!r:.300}") from None


# --- conversations, in the ChatML layout ---

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# The same layout in the language that transformers and vLLM read.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("system", "user", "assistant")


def check_messages(messages):
    """ValueError: messages without a role or a content that can be rendered."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"messages are not a list of objects: {messages!r:.40}")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        allowed = ROLES if i == 0 else ROLES[1:]
        if role not in allowed:
            raise ValueError(f"message {i + 1} has the role {role!r}, not {' or '.join(allowed)}")
        if not isinstance(content, str):
            raise ValueError(f"the content of message {i + 1} is not a text: {content!r:.40}")


def render(tokenizer, messages, add_generation_prompt=False, opening=True):
    """A conversation -> (ids, mask); the mask is True for what the assistant says, its end included.

    messages: [{"role": ..., "content": ...}, ...]; space around a content is dropped, and an answer with
    "weight": 0 is not marked. With add_generation_prompt the ids end where the assistant's turn begins;
    without opening they begin with the first message, whatever the model's chats begin with.
    ValueError: no ChatML tokens.
    """
    for name in CHAT_TOKENS:
        if name not in tokenizer.special_tokens:
            raise ValueError(f"the tokenizer has no {name}: chat needs a model with the ChatML layout")
    start, end = (tokenizer.special_tokens[name] for name in CHAT_TOKENS)
    ids = []
    if opening:
        _, before_turns, before_system = tokenizer.chat_layout
        if messages and messages[0]["role"] == "system":
            ids += before_system
        else:
            ids += before_turns
    mask = [False] * len(ids)
    for message in messages:
        header = [start, *tokenizer.encode(message["role"] + "\n")]
        content = [*tokenizer.encode(message["content"].strip()), end]
        gap = tokenizer.encode("\n")
        ids += header + content + gap
        mask += [False] * len(header)
        mask += [message["role"] == "assistant" and message.get("weight", 1) != 0] * len(content)
        mask += [False] * len(gap)
    if add_generation_prompt:
        prompt = [start, *tokenizer.encode("assistant\n")]
        ids += prompt
        mask += [False] * len(prompt)
    return ids, mask


def fill_template(template, values):
    """What a chat template writes, which is a program in the language Jinja."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch brings it

    program = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # a mark that only training reads
    extensions = ["jinja2.ext.loopcontrols"]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    return jinja.from_string(program).render(values)


def read_chat_layout(tokenizer):
    """(template, ids before the first turn, ids before a system message) of a model's chats.

    A model's own template may begin a chat with a special token or a system message. It is kept if the rest
    is ChatML; if not, a warning says so and CHAT_TEMPLATE replaces it. What a template changes within the
    contents (Qwen3 drops the thoughts from earlier answers) is not followed.
    """
    template = tokenizer.config.get("chat_template", CHAT_TEMPLATE)
    if template == CHAT_TEMPLATE:
        return template, [], []
    special = "|".join(map(re.escape, tokenizer.special_tokens))
    system, *turns = [dict(role=role, content="a text") for role in (*ROLES, "user")]
    openings = []
    for messages in (turns, [system, *turns]):
        ids, _ = render(tokenizer, messages, add_generation_prompt=True, opening=False)
        ours = tokenizer.decode(ids)
        values = dict(tokenizer.config, messages=messages, add_generation_prompt=True)
        try:
            theirs = fill_template(template, values)
        except Exception as error:  # a program of others may fail in any way, also for want of Jinja
            theirs = f"an error: {error}"
        if not theirs.endswith(ours):
            text = "the model's own chat template is not ChatML: ChatML is used, and it may answer badly"
            warnings.warn(f"{text}; the template writes {theirs!r:.150}", stacklevel=4)
            return CHAT_TEMPLATE, [], []
        opening = []
        for piece in re.split(f"({special})", theirs.removesuffix(ours)):
            if piece in tokenizer.special_tokens:
                opening.append(tokenizer.special_tokens[piece])
            else:
                opening += tokenizer.encode(piece)
        openings.append(opening)
    return template, *openings


def with_chat_tokens(tokenizer):
    """The tokenizer itself or, if it lacks ChatML's tokens, one with these added after its own."""
    missing = [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]
    if not missing:
        return tokenizer
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=tokenizer.vocab_size + i, content=name, **flags) for i, name in enumerate(missing)]
    document = dict(tokenizer.document)
    document["added_tokens"] = tokenizer.document["added_tokens"] + added
    return Tokenizer(document, tokenizer.config | {"chat_template": CHAT_TEMPLATE})


# --- command line ---


def print_any_character():
    r"""Print characters that the terminal does not have as \u..., instead of failing."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not, and needs none
        sys.stdout.reconfigure(errors="backslashreplace")


def visible(token):
    """Bytes as text in which blanks, line ends and parts of characters can be seen."""
    text = token.decode("utf-8", "backslashreplace").replace(" ", "␣")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def merge_tree(token, halves):
    """How a token is merged, as in ⟨t ⟨h e⟩⟩."""
    if token not in halves:
        return visible(token)
    left, right = halves[token]
    return f"⟨{merge_tree(left, halves)} {merge_tree(right, halves)}⟩"


def show(tokenizer, text):
    """Print the tokens of a text, then their ids and how each is merged."""
    ids = tokenizer.encode(text)
    print("|".join(visible(tokenizer.tokens[i]) for i in ids))
    for i in dict.fromkeys(ids):
        print(f"{i:8}  {merge_tree(tokenizer.tokens[i], tokenizer.halves)}")
    n_bytes = sum(len(tokenizer.tokens[i]) for i in ids)
    print(f"{n_bytes} bytes, {len(ids)} tokens: {n_bytes / max(1, len(ids)):.2f} bytes per token")
    if lost := [byte for byte in mend_surrogates(text).encode() if byte in tokenizer.missing_bytes]:
        print(f"left out, since this vocabulary has no token for them: {bytes(lost)}")


def read_texts(paths, size=2**18):
    """Yield the text of files in parts of about `size` characters, cut at line ends."""
    for path in paths:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            while lines := file.readlines(size):
                yield "".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Learn a vocabulary, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a vocabulary from text files")
    train.add_argument("paths", nargs="+", metavar="FILE", help="UTF-8 text; stray bytes are read as U+FFFD")
    train.add_argument("--vocab-size", type=int, default=8192, help="bytes, merges and special tokens (8192)")
    train.add_argument("--pattern", default=GPT4_PATTERN, help="regular expression of a chunk (GPT-4's)")
    train.add_argument("--out", default="tokenizer.json", help="the file to write (tokenizer.json)")
    look = commands.add_parser("show", help="see the tokens of a text")
    look.add_argument("file", help="a tokenizer.json")
    look.add_argument("text", help="the text to cut into tokens")
    args = parser.parse_args()
    print_any_character()
    if args.command == "show":
        show(Tokenizer.load(args.file), args.text)
        return
    texts = read_texts(args.paths)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # an error now, and not after the learning
    tokenizer = Tokenizer.train(texts, args.vocab_size, args.pattern, processes=os.cpu_count(), log=print)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
