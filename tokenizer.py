"""Stage 1: the tokenizer. Text in, token ids out, and back.

A model reads a fixed list of tokens. Byte-level byte-pair encoding (Sennrich et al., 2016; Radford et al.,
2019) learns that list from text: start from the 256 bytes, and again and again make the most frequent pair of
neighbours one new token.

    "the then" -> t h e _ t h e n -> (th) e _ (th) e n -> (the) _ (the) n

Learning is written out below. Applying what was learned is left to tiktoken, a fast library, and the file is
a Hugging Face `tokenizer.json`, which the whole ecosystem opens.

    python tokenizer.py train PATH... --vocab-size 8192 --out tokenizer.json
    python tokenizer.py show tokenizer.json "text"
"""

import argparse
import gc
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from heapq import heapify, heappop, heappush
from operator import add
from pathlib import Path

import numpy as np
import regex
import tiktoken

# No merge crosses the border of a chunk, so that "dog", "dog." and "dog!" share their token. A chunk is, in
# this order: an English contraction, a word with the one blank or sign before it, up to three digits, signs,
# blanks up to a line's end, other blanks.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# How a conversation becomes text (ChatML), in the language that transformers and vLLM read.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_parts(path, size=2**18):
    """Yield a file's bytes in parts of about `size`, cut before a line that starts with an ASCII character
    that is no blank: there the GPT-4 pattern cuts too. Where no such line comes, cut before any character.
    """
    with open(path, "rb") as file:
        rest = b""
        while block := file.read(size):
            rest += block
            border = re.match(rb"(?s).*\n(?=[^\s\x80-\xff])", rest)
            if not border and len(rest) >= 4 * size:
                border = re.match(rb"(?s).*(?=[\x00-\x7f\xc0-\xff])", rest)
            if border and border.end():
                yield rest[: border.end()]
                rest = rest[border.end() :]
        if rest:
            yield rest


def map_ahead(executor, function, items, ahead):
    """Yield function(item) in order, computed up to `ahead` items before they are asked for: memory stays
    bounded.
    """
    waiting = deque()
    for item in items:
        waiting.append(executor.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def unicode_ranges(character_class):
    """The characters of a class such as \\p{L} below U+10000, as the inside of a [...] for `re`."""
    plane = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    runs = [match.group() for match in regex.finditer(character_class + "+", plane)]
    return "".join(f"\\u{ord(run[0]):04x}-\\u{ord(run[-1]):04x}" for run in runs)


def compile_splitter(pattern):
    """Return a function that cuts a text into chunks, a list of str.

    The standard library's `re` is about twice as fast as `regex`, but knows no \\p{L}: such classes are
    written out for it as ranges of characters below U+10000. A text with characters beyond, or a pattern that
    `re` can't say, is left to `regex`.
    """
    try:
        exact = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"the split pattern {pattern} is no regular expression: {error}") from None
    if exact.groups:
        raise ValueError(
            f"the split pattern has a capturing group: write (?:...) instead of (...): {pattern}"
        )
    pieces, inside = [], False  # inside a [...]
    for piece in re.findall(r"\\[pP]\{\w+\}|\\.|[\[\]]|[^\\\[\]]+", pattern):
        if piece in ("[", "]"):
            inside = piece == "["
        elif piece.startswith("\\p") or piece == "\\s":
            piece = unicode_ranges(piece) if inside else f"[{unicode_ranges(piece)}]"
        elif piece == "\\S" and not inside:
            piece = f"[^{unicode_ranges(chr(92) + 's')}]"
        elif piece[0] == "\\" and piece[1].isalpha() and piece[1] not in "rnt":
            return exact.findall
        pieces.append(piece)
    try:
        fast = re.compile("".join(pieces)).findall
    except re.error:  # `++` needs Python 3.11
        return exact.findall
    beyond = re.compile("[\U00010000-\U0010ffff]").search
    return lambda text: fast(text) if text.isascii() or not beyond(text) else exact.findall(text)


def batches_of(items, size, length=len):
    """Group items into lists whose lengths add up to about `size`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += length(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def count_chunks(texts, pattern):
    """How often each chunk occurs in a list of texts, as a Counter."""
    split = compile_splitter(pattern)
    counts = Counter()
    for text in texts:
        if not text.isascii():  # lone surrogates, which UTF-8 can't write, become U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        counts.update(split(text))
    return counts


def count_all_chunks(documents, pattern, processes):
    """How often each chunk occurs in an iterable of str, which is read once."""
    count = partial(count_chunks, pattern=pattern)
    batches = batches_of(documents, 2**22)
    chunks = Counter()
    if processes == 1:
        for counts in map(count, batches):
            chunks.update(counts)
    else:
        with ProcessPoolExecutor(processes) as pool:
            for counts in map_ahead(pool, count, batches, ahead=2 * processes):
                chunks.update(counts)
    return chunks


def learn_merges(chunks, n_merges):
    """Learn up to n_merges merges from {chunk: count}; return them in order as pairs of ids.

    The most frequent pair wins, ties go to the smallest (left id, right id). A chunk is kept as a str *whose
    code points are token ids*: a pair is then a str of two characters, a merge is `str.split` and `str.join`,
    and the order of strings is the rule for ties. Only what a merge changes is counted again.
    """
    words = [chunk.encode().decode("latin-1") for chunk in chunks]  # one character a byte
    counts = list(chunks.values())
    pair_counts = defaultdict(int)
    where = defaultdict(list)  # pair -> the words that hold it, or once did
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pair_counts[pair] += counts[i]
            where[pair].append(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        count, pair = heappop(heap)
        if pair_counts[pair] != -count:  # counts of old pairs only fall: put it back where it belongs now
            if pair_counts[pair] > 0:
                heappush(heap, (-pair_counts[pair], pair))
            continue
        left, right = pair
        new = chr(256 + len(merges))
        merges.append((ord(left), ord(right)))
        created = set()
        for i in dict.fromkeys(where.pop(pair)):  # each word once, in order
            pieces = words[i].split(pair)
            if len(pieces) == 1:  # an earlier merge took this one
                continue
            words[i] = new.join(pieces)
            count = counts[i]
            for k in range(1, len(pieces)):  # each occurrence, between pieces k-1 and k
                before, after = pieces[k - 1], pieces[k]
                changes = []
                if before:
                    changes.append((before[-1] + left, before[-1] + new))
                elif k > 1:  # as in "abab": the neighbour was an occurrence too
                    changes.append((right + left, new + new))
                if after:
                    changes.append((right + after[0], new + after[0]))
                for gone, made in changes:
                    pair_counts[gone] -= count
                    pair_counts[made] += count
                    where[made].append(i)
                    created.add(made)
        del pair_counts[pair]
        for pair in created:
            heappush(heap, (-pair_counts[pair], pair))
    return merges


def byte_symbols():
    """GPT-2's printable stand-in for each byte, in which tokenizer.json spells its tokens: a list of 256
    characters.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


class Tokenizer:
    """A vocabulary at work. Ids: the 256 bytes in byte order, the merges in the order learned, then the
    special tokens.
    """

    def __init__(self, merges, pattern=GPT4_PATTERN, special_tokens=SPECIAL_TOKENS):
        self.merges = [tuple(pair) for pair in merges]
        self.pattern = pattern
        self.tokens = [bytes([byte]) for byte in range(256)]  # id -> its bytes, without the special tokens
        for left, right in self.merges:
            self.tokens.append(self.tokens[left] + self.tokens[right])
        first = len(self.tokens)
        self.special_tokens = {text: first + i for i, text in enumerate(special_tokens)}
        if len(self.special_tokens) != len(special_tokens):
            raise ValueError(f"a special token is given twice: {', '.join(special_tokens)}")
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        if len(ranks) != first:
            raise ValueError("two merges make the same token")
        if clash := [text for text in special_tokens if text.encode() in ranks]:
            raise ValueError(f"the special token {clash[0]!r} is an ordinary token of this vocabulary too")
        self._encoding = tiktoken.Encoding(
            "ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    @property
    def vocab_size(self):
        return len(self.tokens) + len(self.special_tokens)

    @property
    def bytes_per_token(self):
        """How many bytes of text each id stands for, (vocab_size,) int64; none for special tokens."""
        return np.array([len(token) for token in self.tokens] + [0] * len(self.special_tokens))

    @property
    def fingerprint(self):
        """A hash of all that decides the ids: two tokenizers with the same one encode alike."""
        facts = json.dumps([self.merges, self.pattern, self.special_tokens])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @classmethod
    def train(
        cls,
        documents,
        vocab_size,
        pattern=GPT4_PATTERN,
        special_tokens=SPECIAL_TOKENS,
        processes=1,
        log=lambda line: None,
    ):
        """Learn a vocabulary from an iterable of str, read once. `log` is given a line now and then.

        When the text runs out of pairs, the vocabulary comes out smaller than asked for. Raises ValueError
        for a vocab_size that can't hold the bytes and the special tokens, and for documents without text.
        """
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise ValueError(
                f"a vocabulary of {vocab_size} can't hold the bytes and the special tokens: take {least}"
            )
        collecting = gc.isenabled()
        gc.disable()  # millions of small objects, none of them in cycles
        try:
            chunks = count_all_chunks(documents, pattern, processes)
            if not chunks:
                raise ValueError("there is no training text to learn a vocabulary from")
            log(f"{sum(chunks.values()):,} chunks, {len(chunks):,} different")
            merges = learn_merges(chunks, vocab_size - least)
        finally:
            if collecting:
                gc.enable()
        tokenizer = cls(merges, pattern, special_tokens)
        if tokenizer.vocab_size < vocab_size:
            log(f"the text has no more pairs: {tokenizer.vocab_size} tokens, not {vocab_size}")
        return tokenizer

    def encode(self, text):
        """Text -> list of ids. Always as ordinary text: no id of a special token ever comes out."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        """Texts -> their lists of ids, on all cores."""
        return self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def encode_to_array(self, text):
        """Text -> ids as a uint32 array, without a Python object per token."""
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids):
        """Ids -> the bytes that they stand for; special tokens as their names. An unknown id: ValueError."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size} tokens")
        return self._encoding.decode_bytes(ids)

    def decode(self, ids):
        """Ids -> text; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write a Hugging Face tokenizer.json."""
        symbols = byte_symbols()
        names = ["".join(symbols[byte] for byte in token) for token in self.tokens]
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        split = dict(type="Split", pattern={"Regex": self.pattern}, behavior="Isolated", invert=False)
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        document = {
            "version": "1.0",
            "added_tokens": [dict(id=i, content=text, **flags) for text, i in self.special_tokens.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "ignore_merges": False,
                "vocab": {name: i for i, name in enumerate(names)},
                "merges": [[names[left], names[right]] for left, right in self.merges],
            },
        }
        Path(path).write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        self.save(Path(folder) / "tokenizer.json")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        if self.special_tokens:
            settings["eos_token"] = next(iter(self.special_tokens))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json. Raises ValueError, naming the field, for a kind that this class doesn't
        represent.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            model, added = document["model"], document["added_tokens"]
            kind, vocab, merges = model["type"], model["vocab"], model["merges"]
            pattern = document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, IndexError) as damage:
            raise ValueError(f"{path} is not a byte-level BPE tokenizer.json: {damage!r}") from None
        if kind != "BPE":
            raise ValueError(f"{path} holds a {kind} model: only byte-level BPE can be read")
        pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in merges)
        tokenizer = cls(
            [(vocab[a], vocab[b]) for a, b in pairs], pattern, [token["content"] for token in added]
        )
        symbols = byte_symbols()
        names = {"".join(symbols[byte] for byte in token): i for i, token in enumerate(tokenizer.tokens)}
        if vocab != names or any(
            tokenizer.special_tokens[token["content"]] != token["id"] for token in added
        ):
            raise ValueError(f"{path} numbers its tokens in another order than bytes, merges, special tokens")
        return tokenizer


def main():
    parser = argparse.ArgumentParser(description="Learn a vocabulary, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a vocabulary from text files")
    train.add_argument("paths", nargs="+", metavar="PATH", help="text files, UTF-8")
    train.add_argument(
        "--vocab-size", type=int, default=8192, help="tokens in all: bytes, merges, special tokens (8192)"
    )
    train.add_argument(
        "--pattern", default=GPT4_PATTERN, help="regular expression that cuts text into chunks (GPT-4's)"
    )
    train.add_argument("--out", default="tokenizer.json", help="the file to write (tokenizer.json)")
    show = commands.add_parser("show", help="see the pieces of a text")
    show.add_argument("file", help="a tokenizer.json")
    show.add_argument("text")
    args = parser.parse_args()
    if args.command == "show":
        tokenizer = Tokenizer.load(args.file)
        ids = tokenizer.encode(args.text)
        for i in ids:
            print(f"{i:7d}  {tokenizer.decode([i])!r}")
        print(f"{len(args.text.encode()) / max(1, len(ids)):.2f} bytes per token")
        return
    start = time.time()
    texts = (part.decode("utf-8", "replace") for path in args.paths for part in read_parts(path))
    tokenizer = Tokenizer.train(texts, args.vocab_size, args.pattern, processes=os.cpu_count(), log=print)
    tokenizer.save(args.out)
    print(f"{tokenizer.vocab_size:,} tokens in {time.time() - start:.1f} s -> {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
