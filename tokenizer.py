"""Stage 1: the tokenizer. Text in, token ids out, and back.

A model reads a fixed list of tokens. Byte-level byte-pair encoding (Sennrich et al., 2016; Radford et al.,
2019) learns that list from text: start from the 256 bytes, and again and again make the most frequent pair of
neighbours one new token.

    "the then" -> t h e _ t h e n -> t (he) _ t (he) n -> (the) _ (the) n

Learning is written out below; applying what was learned is left to tiktoken. The file is a Hugging Face
`tokenizer.json`: the whole ecosystem opens ours, and this opens those of GPT-2, Llama 3, Qwen or SmolLM.

    python tokenizer.py train PATH... --vocab-size 8192 --out tokenizer.json
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
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from heapq import heapify, heappop, heappush
from pathlib import Path

import numpy as np
import regex
import tiktoken

# No merge crosses the border of a chunk, so that "dog", "dog." and "dog!" share their token. A chunk is, in
# this order: an English contraction; a word with the space or punctuation mark before it; up to three digits;
# punctuation with the line ends after it; whitespace up to a line's end; other whitespace.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# Words apart from the blank or mark before them: a name has the same pieces wherever it stands in a program.
WORDS_PATTERN = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = [bytes([byte]) for byte in range(256)]  # the first tokens
covering = r"{0}|(?:(?!{0})[\s\S])+".format  # a pattern or, where it doesn't match, all up to its next match
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# How a conversation becomes text (ChatML), in the language that transformers and vLLM read.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learn_merges(chunks, n_merges, log):
    """Learn up to n_merges merges from {chunk: count}; return them in order as pairs of bytes.

    The most frequent pair wins, ties go to the smallest (left id, right id). A chunk is kept as a str *whose
    code points are token ids*: a pair is then a str of two characters, a merge is `str.split` and `str.join`,
    and the order of strings is the rule for ties. Only what a merge changes is counted again.
    """
    words = [chunk.encode().decode("latin-1") for chunk in chunks]  # chunks as ids: one character a byte
    count_of = list(chunks.values()).__getitem__  # count_of(i): how often words[i] occurs in the text
    where = defaultdict(list)  # pair -> i for each occurrence in words[i]; some may be out of date
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
        before, after = defaultdict(list), defaultdict(list)  # a neighbour of the pair -> i
        doubled = []  # i where the pair's neighbour is the pair itself, as in "abab"
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
            if len(pieces) > 2:
                doubled += [i] * pieces[1:-1].count("")
        changes = [(symbol + left, symbol + new, found) for symbol, found in before.items()]
        changes += [(right + symbol, new + symbol, found) for symbol, found in after.items()]
        changes += [(right + left, new + new, doubled)] if doubled else []
        for gone, made, found in changes:  # x l r y -> x new y: "xl" gives way to "x new", "ry" to "new y"
            count = sum(map(count_of, found))
            pair_counts[gone] -= count
            pair_counts[made] = count
            where[made] = found
            heappush(heap, (-count, made))
        del pair_counts[pair]
        if len(merges) % 8192 == 0:
            log(f"{len(merges):,} of {n_merges:,} merges")
    return merges


def unicode_ranges(name):
    """The characters of a class such as \\p{L} below U+10000, as the inside of a [...] for `re`."""
    plane = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    return "".join(f"\\u{ord(run[0]):04x}-\\u{ord(run[-1]):04x}" for run in regex.findall(name + "+", plane))


@cache
def compile_splitter(pattern):
    """Return a function that cuts a text into chunks, a list of str. Raises ValueError for a bad pattern.

    The library `re` is about twice as fast as `regex`, but knows no \\p{L}. For the patterns above, such
    classes are written out as ranges below U+10000; texts with characters beyond are left to `regex`.
    """
    try:
        exact = regex.compile(covering(pattern))
    except regex.error as error:
        raise ValueError(f"the split pattern {pattern} is no regular expression: {error}") from None
    bare = re.sub(r"\\.|\[(\\.|[^\]\\])*\]|\(\?i:", "", pattern)  # without escapes, sets and (?i:...)
    anchors = re.search(r"\^|(?<!\+\+)\$|\(\?\w+[):]", bare)  # each library has its own idea of them
    if exact.groups or anchors or "" in exact.findall("".join(map(chr, range(0x3100)))):
        raise ValueError(f"a group, an anchor, a flag or a match of nothing in the split pattern {pattern}")

    def write_out(match):  # \p{L} -> [ranges], [^\p{L}] -> [^ranges], \S -> [^ranges]
        written = match.group().replace(r"\S", r"[^\s]")
        written = re.sub(r"\\p\{\w+\}|\\s", lambda part: unicode_ranges(part.group()), written)
        return written if "[" in written else f"[{written}]"

    fast = exact
    if pattern in (GPT2_PATTERN, GPT4_PATTERN, WORDS_PATTERN) and sys.version_info >= (
        3,
        11,
    ):  # `re` knows `++` since then
        fast = re.compile(covering(re.sub(r"\[[^\]]*\]|\\p\{\w+\}|\\[sS]", write_out, pattern)))
    beyond = re.compile("[\U00010000-\U0010ffff]").search
    return lambda text: (fast if text.isascii() or not beyond(text) else exact).findall(text)


def mend_surrogates(text):
    """Half of a surrogate pair, which UTF-8 can't write, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def count_chunks(texts, pattern):
    """How often each chunk occurs in a list of texts, as a Counter."""
    split, counts = compile_splitter(pattern), Counter()
    for text in texts:
        counts.update(split(mend_surrogates(text)))
    return counts


def map_batches(pool, function, items, size, ahead, length=len):
    """Yield function(batch) in order for lists of items of about `size` in all, `ahead` of them early."""
    waiting, batch, total = deque(), [], 0
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


def byte_symbols():
    """GPT-2's printable stand-in for each byte, in which tokenizer.json spells its tokens, as a list."""
    others = iter(range(256, 512))
    return [chr(byte if chr(byte).isprintable() and byte != 32 else next(others)) for byte in range(256)]


def tokenizer_json(ids, merges, pattern, special_tokens, ignore_merges=False):
    """A tokenizer.json as a dict. ids {bytes: id}, merges [(bytes, bytes)], special_tokens {text: id}."""
    symbols = byte_symbols()
    names = {token: "".join(symbols[byte] for byte in token) for token in ids}
    vocab = {names[token]: i for token, i in ids.items()}
    if clash := [text for text in special_tokens if text in vocab or text.encode() in ids]:
        raise ValueError(f"the special token {clash[0]!r} is an ordinary token of this vocabulary too")
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
            "vocab": vocab | special_tokens,
            "merges": [[names[left], names[right]] for left, right in merges],
        },
    }


def read_patterns(pre_tokenizer):
    """The patterns by which a tokenizer.json cuts text, to be applied one after the other."""
    *steps, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = []
    for step in [*steps, last]:
        match step:
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": alone}:
                patterns.append(r"\p{N}" if alone else r"\p{N}+")
            case {"type": "ByteLevel", "add_prefix_space": False} if step is last:
                return patterns + ([GPT2_PATTERN] if step.get("use_regex", True) else []) or [r"[\s\S]+"]
            case _:
                break
    raise ValueError(f"pre_tokenizer: {json.dumps(step)} is not supported here")


class Tokenizer:
    """A vocabulary at work, made from the content of a tokenizer.json; ValueError for what is not supported.

    tokens {id: bytes}, special_tokens {text: id}, bytes_per_token[id] (special tokens: 0). Text never becomes
    a special token; other added tokens are found in it. A post_processor is left to the caller.
    """

    def __init__(self, document):
        self.document = document
        model, added, normalizer = document["model"], document["added_tokens"], document.get("normalizer")
        options = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
        odd = {field: model[field] for field in options if model.get(field)}
        if odd or model.get("type", "BPE") != "BPE":
            raise ValueError(f"model: {model.get('type')} {odd or ''} is not supported")
        if normalizer not in (None, {"type": "NFC"}):
            raise ValueError(f"normalizer: {json.dumps(normalizer)} is not supported")
        for token in added:
            odd = not token["special"] and (token["single_word"] or token["lstrip"] or token["rstrip"])
            if odd or model["vocab"].get(token["content"], token["id"]) != token["id"]:
                raise ValueError(f"added_tokens: {token} is not supported")
        self.special_tokens = {token["content"]: token["id"] for token in added if token["special"]}
        literals = {token["content"]: token["id"] for token in added if not token["special"]}
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        others = literals | self.special_tokens
        spelled = {name: bytes([byte_of[c] for c in name]) for name in model["vocab"] if name not in others}
        ids = {token: model["vocab"][name] for name, token in spelled.items()}
        self.halves = {}  # token -> the two that its first merge joins
        for merge in model["merges"]:
            left, right = (spelled[name] for name in (merge.split(" ") if isinstance(merge, str) else merge))
            made = all(len(half) == 1 or half in self.halves for half in (left, right))
            if not made and not model.get("ignore_merges"):
                raise ValueError(f"model.merges: {left + right!r} is made before its halves")
            self.halves.setdefault(left + right, (left, right))
        # tiktoken needs no merges: it joins any neighbours that spell a token, the lowest rank first. That is
        # the same for merges that were learned; a token without one must not be spelled by two others.
        whole = ids.keys() - self.halves.keys() - set(BYTES) if model.get("ignore_merges") else set()
        for token in whole:
            if any(token[:i] in ids and token[i:] in ids for i in range(1, len(token))):
                raise ValueError(f"model.merges: {token!r} has none, though two other tokens spell it")
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys([*BYTES, *self.halves, *whole]))}
        if missing := ranks.keys() - ids.keys():
            raise ValueError(f"model.vocab: it lacks {min(missing)!r}, a byte or what a merge makes")
        self._id_of_rank = np.array([*(ids[token] for token in ranks), *literals.values()])
        self._rank_of_literal = {text: len(ranks) + k for k, text in enumerate(literals)}
        texts = [*ids.items(), *((text.encode(), i) for text, i in literals.items())]
        self.tokens = {i: t for t, i in texts} | {i: t.encode() for t, i in self.special_tokens.items()}
        if len(self.tokens) < len(ids) + len(added) or not 0 <= min(self.tokens) <= max(self.tokens) < 2**24:
            raise ValueError("ids must be whole numbers below 2^24, each given once")
        self.vocab_size = max(self.tokens) + 1
        self.bytes_per_token = np.zeros(self.vocab_size, dtype=np.int64)
        self.bytes_per_token[[i for _, i in texts]] = [len(token) for token, _ in texts]
        patterns = read_patterns(document["pre_tokenizer"])
        *self._steps, self._split = map(compile_splitter, patterns)  # tiktoken does the last one
        if normalizer:
            self._steps.insert(0, lambda text: [unicodedata.normalize("NFC", text)])
        if literals:
            longest_first = sorted(literals, key=len, reverse=True)
            self._steps.insert(0, compile_splitter("|".join(map(regex.escape, longest_first))))
        pattern = covering(patterns[-1])
        unused = {"<": len(ranks)}  # without any special token, tiktoken is slower
        self._encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=unused)

    @property
    def fingerprint(self):
        """A hash of the whole document: two tokenizers with the same one encode alike."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def train(
        cls, documents, vocab_size, pattern=GPT4_PATTERN, special_tokens=SPECIAL_TOKENS, processes=1, log=None
    ):
        """Learn a vocabulary from an iterable of str, read once, as needed. `log` is given lines of progress.
        Text that runs out of pairs gives a smaller vocabulary; no text or unusable settings raise ValueError.
        """
        log = log or (lambda line: None)
        least = 256 + len(special_tokens)
        if not least <= vocab_size <= 2**20:
            raise ValueError(f"vocabulary size {vocab_size} is outside {least} (bytes, specials) to 2^20")
        if len(set(special_tokens) - {""}) < len(special_tokens):
            raise ValueError(f"a special token is empty or given twice: {', '.join(special_tokens)}")
        chunks, count = Counter(), partial(count_chunks, pattern=pattern)
        ignore = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is for the parent alone
        pool = ProcessPoolExecutor(processes, None, *ignore) if processes > 1 else ThreadPoolExecutor(1)
        with pool:
            for n, counts in enumerate(map_batches(pool, count, documents, 2**22, 2 * processes - 2), 1):
                chunks.update(counts)
                if n % 16 == 0:
                    log(f"{n} batches of text, {len(chunks):,} different chunks")
        if not chunks:
            raise ValueError("there is no training text to learn a vocabulary from")
        log(f"{chunks.total():,} chunks, {len(chunks):,} different")
        gc.disable()  # millions of small objects, none of them in cycles
        try:
            merges = learn_merges(chunks, vocab_size - least, log)
        finally:
            gc.enable()
        tokens = [*BYTES, *(left + right for left, right in merges)]
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
        pattern = re.sub(r"(\d\})\+(?=\||$)", r"\1", encoding._pat_str)  # other engines repeat the {1,3}
        return cls(tokenizer_json(ranks, merges, pattern, encoding._special_tokens, ignore_merges=True))

    def encode(self, text):
        """Text -> list of ids. Always as ordinary text: no id of a special token ever comes out."""
        return self.encode_to_array(text).tolist()

    def encode_to_array(self, text):
        """Text -> ids as an array, without a Python object per token."""
        parts, literals = [mend_surrogates(text)], self._rank_of_literal
        for step in self._steps:
            parts = [piece for part in parts for piece in ([part] if part in literals else step(part))]
        ranks = [np.uint32([])]
        for part in parts:
            literal = [literals[part]] if part in literals else None
            try:
                ranks.append(literal or self._encoding.encode_to_numpy(part, disallowed_special=()))
            except ValueError:  # its regex engine gives up, as on a million blanks in a row
                ranks += [self._encoding._encode_single_piece(chunk) for chunk in self._split(part)]
        return self._id_of_rank[np.concatenate(ranks).astype(np.int64)]

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

    def save(self, path):
        """Write the tokenizer.json."""
        Path(path).write_text(json.dumps(self.document, ensure_ascii=False, indent=1), encoding="utf-8")

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        self.save(Path(folder) / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if SPECIAL_TOKENS[0] in self.special_tokens:
            settings["eos_token"] = SPECIAL_TOKENS[0]
        if self.special_tokens.keys() >= set(SPECIAL_TOKENS[1:]):
            settings["chat_template"] = CHAT_TEMPLATE
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read a byte-level BPE tokenizer.json. Raises ValueError for a damaged file or another kind."""
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as problem:
            kinds = "a tokenizer.json of byte-level BPE, such as that of GPT-2, Llama 3, Qwen or SmolLM"
            raise ValueError(f"{path} is not {kinds}: {problem!r:.300}") from None


def visible(token):
    """Bytes as text in which blanks, line ends and parts of characters can be seen."""
    text = token.decode("utf-8", "backslashreplace").replace(" ", "␣")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def merge_tree(token, halves):
    """How a token is merged, as in ⟨t ⟨h e⟩⟩."""
    parts = [merge_tree(half, halves) for half in halves.get(token, ())]
    return f"⟨{' '.join(parts)}⟩" if parts else visible(token)


def show(tokenizer, text):
    """Print the pieces of a text, in colour on a terminal, then their ids and how each is merged."""
    ids = tokenizer.encode(text)
    pieces = [visible(tokenizer.tokens[i]) for i in ids]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        pieces = [f"\033[30;48;5;{(157, 222, 153, 217)[k % 4]}m{p}\033[0m" for k, p in enumerate(pieces)]
    print("|".join(pieces))
    for i in dict.fromkeys(ids):
        print(f"{i:8}  {merge_tree(tokenizer.tokens[i], tokenizer.halves)}")
    n_bytes = sum(len(tokenizer.tokens[i]) for i in ids)
    print(f"{n_bytes} bytes, {len(ids)} tokens: {n_bytes / max(1, len(ids)):.2f} bytes per token")


def main():
    parser = argparse.ArgumentParser(description="Learn a vocabulary, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("train", help="learn a vocabulary from text files").add_argument
    add("paths", nargs="+", metavar="PATH", help="text files, UTF-8; stray bytes are read as U+FFFD")
    add("--vocab-size", type=int, default=8192, help="bytes, merges and special tokens in all (8192)")
    add("--pattern", default=GPT4_PATTERN, help="regular expression that cuts text into chunks (GPT-4's)")
    add("--out", default="tokenizer.json", help="the file to write (tokenizer.json)")
    add = commands.add_parser("show", help="see the pieces of a text").add_argument
    add("file", help="a tokenizer.json")
    add("text", help="the text to cut into tokens")
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
    except BrokenPipeError:  # of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
