"""Stage 1: the tokenizer. Text in, token ids out, and back.

A model reads a fixed list of tokens. Byte-level byte-pair encoding (Sennrich et al., 2016; Radford et al.,
2019) learns that list from text: start from the 256 bytes, and again and again make the most frequent pair of
neighbours one new token.

    "the then" -> t h e _ t h e n -> (th) e _ (th) e n -> (the) _ (the) n

Learning is written out below; applying what was learned is left to tiktoken. The file is a Hugging Face
`tokenizer.json`: the whole ecosystem opens ours, and this opens those of GPT-2, Llama 3, Qwen or SmolLM.

    python tokenizer.py train PATH... --vocab-size 8192 --out tokenizer.json
    python tokenizer.py show tokenizer.json "text"
"""

import argparse
import codecs
import gc
import hashlib
import json
import os
import re
import signal
import sys
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache, partial
from heapq import heapify, heappop, heappush
from multiprocessing import Pool
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
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = [bytes([byte]) for byte in range(256)]
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# How a conversation becomes text (ChatML), in the language that transformers and vLLM read.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def batches_of(items, size, length=len):
    """Group items into lists whose lengths add up to about `size`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += length(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    yield batch


def covering(pattern):
    """The pattern or, where it doesn't match, all up to its next match: no character is lost."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def unicode_ranges(character_class):
    """The characters of a class such as \\p{L} below U+10000, as the inside of a [...] for `re`."""
    plane = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    runs = regex.findall(character_class + "+", plane)
    return "".join(f"\\u{ord(run[0]):04x}-\\u{ord(run[-1]):04x}" for run in runs)


@cache
def compile_splitter(pattern):
    """Return a function that cuts a text into chunks, a list of str. Raises ValueError for a bad pattern.

    The library `re` is about twice as fast as `regex`, but knows no \\p{L}: such classes are written out for
    it as ranges below U+10000. Texts with characters beyond, and what `re` can't say, are left to `regex`.
    """
    try:
        exact = regex.compile(covering(pattern))
    except regex.error as error:
        raise ValueError(f"the split pattern {pattern} is no regular expression: {error}") from None
    if exact.groups or exact.match(""):
        raise ValueError(f"the split pattern has a capturing group or matches the empty text: {pattern}")

    def write_out(match):  # \p{L} -> [ranges], [^\p{L}] -> [^ranges], \S -> [^ranges]
        written = match.group().replace(r"\S", r"[^\s]")
        written = re.sub(r"\\p\{\w+\}|\\s", lambda part: unicode_ranges(part.group()), written)
        return written if "[" in written else f"[{written}]"

    fast = exact
    if not re.search(r"\\[^pnrtsS]|\[\^?[\[\]]|\[[^\]]*\\S", pattern):  # \w, \d ... differ in `re`
        with suppress(re.error):  # `++` needs Python 3.11
            fast = re.compile(covering(re.sub(r"\[[^\]]*\]|\\p\{\w+\}|\\[sS]", write_out, pattern)))

    def split(text):
        if text.isascii():
            return fast.findall(text)
        units = text.encode("utf-16-le", "surrogatepass")
        text = units.decode("utf-16-le", "replace")  # half of a surrogate pair is no character: U+FFFD
        return (exact if len(units) > 2 * len(text) else fast).findall(text)

    return split


def count_chunks(texts, pattern):
    """How often each chunk occurs in a list of texts, as a Counter."""
    split, counts = compile_splitter(pattern), Counter()
    for text in texts:
        counts.update(split(text))
    return counts


def learn_merges(chunks, n_merges, log):
    """Learn up to n_merges merges from {chunk: count}; return them in order as pairs of bytes.

    The most frequent pair wins, ties go to the smallest (left id, right id). A chunk is kept as a str *whose
    code points are token ids*: a pair is then a str of two characters, a merge is `str.split` and `str.join`,
    and the order of strings is the rule for ties. Only what a merge changes is counted again.
    """
    words = [chunk.encode().decode("latin-1") for chunk in chunks]  # one character a byte
    count_of = list(chunks.values()).__getitem__  # of a word's number
    where = defaultdict(list)  # pair -> numbers of the words that hold it, or once did, for each occurrence
    for i, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            where[left + right].append(i)
    pair_counts = {pair: sum(map(count_of, found)) for pair, found in where.items()}
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)
    merges, tokens = [], list(BYTES)
    while heap and len(merges) < n_merges:
        count, pair = heappop(heap)
        if pair_counts[pair] != -count:  # counts of old pairs only fall: put it back where it belongs now
            if pair_counts[pair] > 0:
                heappush(heap, (-pair_counts[pair], pair))
            continue
        left, right = pair
        new = chr(len(tokens))
        merges.append((tokens[ord(left)], tokens[ord(right)]))
        tokens.append(b"".join(merges[-1]))
        before, after = defaultdict(list), defaultdict(list)  # neighbour of the pair -> numbers of the words
        doubled = []  # words in which the pair's neighbour is the pair, as in "abab"
        for i in dict.fromkeys(where.pop(pair)):  # each word once, in order
            pieces = words[i].split(pair)
            if len(pieces) == 1:  # an earlier merge took this one
                continue
            words[i] = new.join(pieces)
            for head, tail in zip(pieces, pieces[1:]):  # around each occurrence
                if head:
                    before[head[-1]].append(i)
                if tail:
                    after[tail[0]].append(i)
            doubled += [i] * pieces[1:-1].count("")
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
        if len(merges) % 8192 == 0:
            log(f"{len(merges):,} of {n_merges:,} merges")
    return merges


def byte_symbols():
    """GPT-2's printable stand-in for each byte, in which tokenizer.json spells its tokens, as a list."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_json(ids, merges, pattern, special_tokens, ignore_merges=False):
    """A tokenizer.json as a dict. ids {bytes: id}, merges [(bytes, bytes)], special_tokens {text: id}."""
    symbols = byte_symbols()
    names = {token: "".join(symbols[byte] for byte in token) for token in ids}
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
            "ignore_merges": ignore_merges,  # True: a chunk that is a token needs no merges
            "vocab": {names[token]: i for token, i in ids.items()} | special_tokens,
            "merges": [[names[left], names[right]] for left, right in merges],
        },
    }


def read_patterns(pre_tokenizer):
    """The patterns by which a tokenizer.json cuts text, to be applied one after the other."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = []
    for step in steps:
        match step:
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": alone}:
                patterns.append(r"\p{N}" if alone else r"\p{N}+")
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
            case _:
                raise ValueError(f"pre_tokenizer: {json.dumps(step)} is not supported")
    return patterns or [r"[\s\S]+"]


class Tokenizer:
    """A vocabulary at work, from the content of a tokenizer.json; ValueError for what is not supported. Those
    learned here number the 256 bytes, the merges as learned, then the special tokens. Text never becomes a
    special token; added tokens that aren't special are found in it.
    """

    def __init__(self, document):
        self.document = document
        model, added, normalizer = document["model"], document["added_tokens"], document.get("normalizer")
        known = dict(type="BPE", byte_fallback=False, continuing_subword_prefix="", end_of_word_suffix="")
        for field, value in known.items():
            if (model.get(field) or value) != value:
                raise ValueError(f"model.{field}: {model[field]} is not supported")
        if normalizer not in (None, {"type": "NFC"}):
            raise ValueError(f"normalizer: {json.dumps(normalizer)} is not supported")
        for token in added:
            if not token["special"] and (token["single_word"] or token["lstrip"] or token["rstrip"]):
                raise ValueError(f"added_tokens: {token} is not supported")
        self._patterns = read_patterns(document["pre_tokenizer"])
        self.special_tokens = {token["content"]: token["id"] for token in added if token["special"]}
        self._literals = {token["content"]: token["id"] for token in added if not token["special"]}
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        others = self.special_tokens | self._literals
        spelled = {name: bytes([byte_of[c] for c in name]) for name in model["vocab"] if name not in others}
        ids = {token: model["vocab"][name] for name, token in spelled.items()}
        self.halves = {}  # token -> the two that its first merge joins
        for merge in model["merges"]:
            left, right = (spelled[name] for name in (merge.split(" ") if isinstance(merge, str) else merge))
            self.halves.setdefault(left + right, (left, right))
        # tiktoken merges any two neighbours that spell a token, the lowest rank first. That is the same where
        # merges were learned, which make a token of the same two always, or where the file lists all pairs.
        order = [*BYTES, *self.halves, *(ids if model.get("ignore_merges") else ())]
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(order))}
        if missing := ranks.keys() - ids.keys():
            raise ValueError(f"model.vocab: it lacks {min(missing)!r}, a byte or what a merge makes")
        self._ids = [ids[token] for token in ranks]  # by rank
        tokens = [*ids.items(), *((text.encode(), i) for text, i in others.items())]
        self.tokens = {i: token for token, i in tokens}  # id -> bytes
        if len(self.tokens) < len(tokens):
            raise ValueError("two tokens have the same id")
        self.vocab_size = max(self.tokens) + 1
        self.bytes_per_token = np.zeros(self.vocab_size, dtype=np.int64)  # of text: none in special tokens
        self.bytes_per_token[list(self.tokens)] = list(map(len, self.tokens.values()))
        self.bytes_per_token[list(self.special_tokens.values())] = 0
        pattern = covering(self._patterns[-1])
        self._encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @property
    def fingerprint(self):
        """A hash of all that decides the ids: two tokenizers with the same one encode alike."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def train(
        cls, documents, vocab_size, pattern=GPT4_PATTERN, special_tokens=SPECIAL_TOKENS, processes=1, log=None
    ):
        """Learn a vocabulary from an iterable of str, read once, as needed. `log` is given a line at times.

        Text that runs out of pairs gives a smaller vocabulary. Raises ValueError for documents without text,
        a vocab_size that can't hold the bytes and the special tokens, and special tokens that clash.
        """
        log = log or (lambda line: None)
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise ValueError(f"a vocabulary of {vocab_size} can't hold the {least} bytes and special tokens")
        if len(set(special_tokens) - {""}) < len(special_tokens):
            raise ValueError(f"a special token is empty or given twice: {', '.join(special_tokens)}")
        chunks, batches = Counter(), batches_of(documents, 2**22)
        count = partial(count_chunks, pattern=pattern)
        quiet = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is for the parent
        with Pool(processes, *quiet) if processes > 1 else nullcontext() as pool:
            for n, counts in enumerate(pool.imap(count, batches) if pool else map(count, batches), 1):
                chunks.update(counts)
                if n % 16 == 0:
                    log(f"{n * 2**22:,} characters, {len(chunks):,} different chunks")
        if not chunks:
            raise ValueError("there is no training text to learn a vocabulary from")
        log(f"{chunks.total():,} chunks, {len(chunks):,} different")
        gc.disable()  # millions of small objects, none of them in cycles
        try:
            merges = learn_merges(chunks, vocab_size - least, log)
        finally:
            gc.enable()
        tokens = [*BYTES, *(left + right for left, right in merges)]
        if clash := {text.encode() for text in special_tokens}.intersection(tokens):
            raise ValueError(f"the special token {min(clash)!r} was learned as an ordinary one too")
        specials = {text: len(tokens) + i for i, text in enumerate(special_tokens)}
        if len(tokens) + len(specials) < vocab_size:
            log(f"the text has no more pairs: {len(tokens) + len(specials)} tokens, not {vocab_size}")
        return cls(tokenizer_json({token: i for i, token in enumerate(tokens)}, merges, pattern, specials))

    @classmethod
    def from_tiktoken(cls, encoding):
        """Take over a tiktoken.Encoding, such as tiktoken.get_encoding("gpt2")."""
        ranks = encoding._mergeable_ranks
        pairs = ((token[:i], token[i:]) for token in sorted(ranks, key=ranks.get) for i in range(len(token)))
        merges = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        # {1,3}+ is possessive for tiktoken, but a repeated repeat for the other engines
        pattern = re.sub(r"(\d\})\+(?=\||$)", r"\1", encoding._pat_str)
        return cls(tokenizer_json(ranks, merges, pattern, encoding._special_tokens, ignore_merges=True))

    def encode(self, text):
        """Text -> list of ids. Always as ordinary text: no id of a special token ever comes out."""
        parts, ids = [text], []
        if self._literals:
            longest_first = sorted(self._literals, key=len, reverse=True)
            parts = compile_splitter("|".join(map(regex.escape, longest_first)))(text)
        for part in parts:
            ids += [self._literals[part]] if part in self._literals else self._encode_stretch(part)
        return ids

    def _encode_stretch(self, text):
        """Encode the text between added tokens."""
        parts = [unicodedata.normalize("NFC", text) if self.document.get("normalizer") else text]
        for pattern in self._patterns[:-1]:
            parts = [piece for part in parts for piece in compile_splitter(pattern)(part)]
        ranks = []
        for part in parts:
            samples = part[::100_000]  # two in a row blank: there may be too many blanks for tiktoken
            if any(one.isspace() and two.isspace() for one, two in zip(samples, samples[1:])):
                for chunk in compile_splitter(self._patterns[-1])(part):
                    ranks += self._encoding._encode_single_piece(chunk)
            else:
                ranks += self._encoding.encode_ordinary(part)
        return list(map(self._ids.__getitem__, ranks))

    def encode_batch(self, texts):
        """Texts -> their lists of ids, on all cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids):
        """Ids -> the bytes that they stand for; special tokens as their names. An unknown id: ValueError."""
        try:
            return b"".join([self.tokens[i] for i in ids])
        except KeyError as unknown:
            raise ValueError(f"id {unknown} is not in the vocabulary of {self.vocab_size} tokens") from None

    def decode(self, ids):
        """Ids -> text; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids):
        """Yield the text of ids as they come, a piece for each and a last one, never half a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.decode_bytes([i]))
        yield decoder.decode(b"", final=True)

    def save(self, path):
        """Write the tokenizer.json."""
        Path(path).write_text(json.dumps(self.document, ensure_ascii=False, indent=1), encoding="utf-8")

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        self.save(Path(folder) / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if SPECIAL_TOKENS[0] in self.special_tokens:
            settings["eos_token"] = SPECIAL_TOKENS[0]
        if self.special_tokens.keys() >= set(SPECIAL_TOKENS):
            settings["chat_template"] = CHAT_TEMPLATE
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read a byte-level BPE tokenizer.json. Raises ValueError for a damaged file or another kind."""
        kinds = "a tokenizer.json of byte-level BPE, such as that of GPT-2, Llama 3, Qwen or SmolLM"
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise ValueError(f"{path} is not {kinds}: {problem!r}") from None


def visible(token):
    """Bytes as text in which blanks, line ends and parts of characters can be seen."""
    text = token.decode("utf-8", "backslashreplace").replace(" ", "␣")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def merge_tree(token, halves):
    """How a token is merged, as in ((t h) e)."""
    parts = [merge_tree(half, halves) for half in halves.get(token, ())]
    return f"({' '.join(parts)})" if parts else visible(token)


def show(tokenizer, text):
    """Print the pieces of a text, in colour on a terminal, then their ids and how each is merged."""
    ids = tokenizer.encode(text)
    pieces = [visible(tokenizer.tokens[i]) for i in ids]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        backgrounds = (157, 222, 153, 217)
        pieces = [f"\033[30;48;5;{backgrounds[k % 4]}m{piece}\033[0m" for k, piece in enumerate(pieces)]
    print("|".join(pieces))
    for i in dict.fromkeys(ids):
        print(f"{i:8}  {merge_tree(tokenizer.tokens[i], tokenizer.halves)}")
    n_bytes = len(text.encode("utf-8", "replace"))
    print(f"{n_bytes} bytes, {len(ids)} tokens: {n_bytes / max(1, len(ids)):.2f} bytes per token")


def main():
    parser = argparse.ArgumentParser(description="Learn a vocabulary, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("train", help="learn a vocabulary from text files").add_argument
    add("paths", nargs="+", metavar="PATH", help="text files, UTF-8")
    add("--vocab-size", type=int, default=8192, help="bytes, merges and special tokens in all (8192)")
    add("--pattern", default=GPT4_PATTERN, help="regular expression that cuts text into chunks (GPT-4's)")
    add("--out", default="tokenizer.json", help="the file to write (tokenizer.json)")
    add = commands.add_parser("show", help="see the pieces of a text").add_argument
    add("file", help="a tokenizer.json")
    add("text")
    args = parser.parse_args()
    if args.command == "show":
        return show(Tokenizer.load(args.file), args.text)
    files = (open(path, encoding="utf-8", errors="replace", newline="") for path in args.paths)
    texts = ("".join(lines) for file in files for lines in iter(partial(file.readlines, 2**18), []))
    tokenizer = Tokenizer.train(texts, args.vocab_size, args.pattern, processes=os.cpu_count(), log=print)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
