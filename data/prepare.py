"""Stage 0: from documents to token ids on disk.

    python data/prepare.py                        the standard library of this Python, into data/pystdlib/
    python data/prepare.py shakespeare            a public corpus, downloaded; the other one is tinystories
    python data/prepare.py PATH... --name NAME    your own files or folders: .txt .md .py .rst .jsonl

Writes to data/NAME/: train.bin and val.bin (token ids, little-endian, <|endoftext|> after every document),
tokenizer.json and meta.json. Documents are read three times (to split them, to learn the vocabulary, to
encode them) and never held, so memory does not grow with the corpus. On a first reading, read `prepare` and
`write_tokens`.
"""

import argparse
import codecs
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizer import (  # noqa: E402
    GPT4_PATTERN,
    SPECIAL_TOKENS,
    WORDS_PATTERN,
    Tokenizer,
    map_batches,
    mend_surrogates,
    print_any_character,
)

DATA = ROOT / "data"
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl")
VAL_SHARE = 0.05
FEW_DOCUMENTS = 20
END_OF_TEXT = SPECIAL_TOKENS[0]

TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
DOWNLOADS = {  # name -> [(URL, SHA-256 or None)]
    "shakespeare": [(TINY_SHAKESPEARE, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")],
    "tinystories": [(TINY_STORIES + "train.txt", None), (TINY_STORIES + "valid.txt", None)],
}
SOURCES = ("pystdlib", *DOWNLOADS)


# --- downloads and progress ---


class Progress:
    """Says every five seconds how far a phase has come, and at its end what came of it."""

    def __init__(self, label, total_bytes):
        self.label, self.total_bytes = label, total_bytes
        self.start = self.shown = time.time()

    def show(self, share):
        """This share of the whole, 0 to 1, is done."""
        now = time.time()
        if now - self.shown >= 5 and share > 0:
            self.shown, seconds = now, now - self.start
            rate = share * self.total_bytes / seconds / 1e6
            left = seconds / share - seconds
            print(f"{self.label} {share:4.0%}, {rate:.1f} MB/s, {left:.0f} s left", file=sys.stderr)

    def done(self, result):
        """The phase is over, or has come to a point that can be told."""
        print(f"{self.label}: {result}, {time.time() - self.start:.1f} s", flush=True)


def download(url, folder, sha256=None):
    """Fetch a file into a folder unless it is there; only a complete, verified file gets its name."""
    path = folder / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    unfinished = path.with_name(path.name + ".unfinished")
    digest, done = hashlib.sha256(), 0
    try:
        response = urllib.request.urlopen(url, timeout=30)
        path.parent.mkdir(parents=True, exist_ok=True)
        with response, open(unfinished, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            progress = Progress(f"downloading {path.name}", total)
            while block := response.read(2**20):
                digest.update(block)
                file.write(block)
                done += len(block)
                progress.show(done / max(total, done))
        if done < total:
            raise ValueError(f"the download of {url} stopped after {done} of {total} bytes: try again")
        if sha256 not in (None, digest.hexdigest()):
            raise ValueError(f"{url} is not the file that was published: its SHA-256 is {digest.hexdigest()}")
        unfinished.rename(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        mend = "get the file some other way and run `python data/prepare.py FILE --name NAME`"
        raise ValueError(f"can't download {url} ({reason}): {mend}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    progress.done(f"{done / 1e6:.1f} MB")
    return path


# --- documents: (parts of its text, "train" or "val" where its publisher has decided that, else None) ---


def decode(raw, path, damaged):
    """UTF-8 bytes as text. Stray bytes become U+FFFD and are counted in damaged, {path: number}."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        damaged[path] += text.count("\ufffd")
        return text


def file_parts(path, damaged, size=2**18):
    """Yield the text of a file in parts of about `size` bytes, cut before a line that starts with an ASCII
    character that is no blank: there the GPT-4 pattern cuts too. Without such a line: before any character.
    """
    with open(path, "rb") as file:
        rest = b""
        while block := file.read(size):
            rest += block
            border = re.match(rb"(?s).*\n(?=[^\s\x80-\xff])", rest)
            if not border and len(rest) >= 4 * size:
                border = re.match(rb"(?s).*(?=[\x00-\x7f\xc0-\xff])", rest)
            if border and border.end():
                yield decode(rest[: border.end()], path, damaged)
                rest = rest[border.end() :]
        if rest:
            yield decode(rest, path, damaged)


def jsonl_documents(path, field, damaged):
    """A document per line of a .jsonl file: the string under `field`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield [mend_surrogates(json.loads(decode(line, path, damaged))[field])], None
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
                expected = f"no JSON object with a text under {field!r}"
                raise ValueError(f"{path}, line {number}: {expected} ({error!r})") from None


def story_documents(path, split, damaged):
    """The stories of a TinyStories file, which a literal <|endoftext|> separates."""
    rest = ""
    for part in file_parts(path, damaged):
        *stories, rest = (rest + part).split(END_OF_TEXT)
        yield from (([story.strip()], split) for story in stories)
    yield [rest.strip()], split


def stdlib_files():
    """The .py files of this Python's standard library, without tests, tables and generated text."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
    left_out |= {"encodings", "pydoc_data", "stringprep.py", "entities.py"}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if left_out.isdisjoint(parts) and not parts[0].startswith(("_sysconfigdata", "config-")):
            yield path


def text_files(paths):
    """The files with text under the given paths, in a fixed order. Files of other kinds are reported."""
    files, n_others = [], 0
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"no file, folder or corpus named {path}; the corpora are {', '.join(SOURCES)}")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        chosen = [p for p in inside if p.suffix.lower() in TEXT_SUFFIXES]
        files += chosen
        n_others += len(inside) - len(chosen)
    if n_others:
        print(f"passed over {n_others} files that are not {' '.join(TEXT_SUFFIXES)}")
    return files


def find_documents(sources, field, damaged):
    """Return a function that starts a fresh pass over the documents of a named corpus or of paths.

    field: see jsonl_documents. A pass counts the stray bytes of files that are not UTF-8 in `damaged`.
    """
    if sources == ["pystdlib"]:
        files = list(stdlib_files())
    elif len(sources) == 1 and sources[0] in DOWNLOADS:
        files = [download(url, DATA / "downloads", sha256) for url, sha256 in DOWNLOADS[sources[0]]]
    else:
        files = text_files(sources)

    def documents():
        for i, path in enumerate(files):
            if sources == ["tinystories"]:
                yield from story_documents(path, ("train", "val")[i], damaged)
            elif path.suffix.lower() == ".jsonl":
                yield from jsonl_documents(path, field, damaged)
            else:
                yield file_parts(path, damaged), None

    return documents


# --- which text is held out for validation ---


def scan(parts):
    """Return (bucket, characters, bytes) of a document; its bucket, 0 to 65535, follows from its content."""
    digest = hashlib.blake2b(digest_size=2, key=b"validation")
    characters = size = 0
    for part in parts:
        raw = part.encode()
        digest.update(raw)
        characters += len(part)
        size += len(raw)
    return int.from_bytes(digest.digest(), "big"), characters, size


class Split:
    """Which text is for training and which is held out for validation.

    Whole documents are held out, the lowest buckets first, until 5 % of the bytes are reached; a document
    that would make it more than 10 % is skipped. Of fewer than 20 documents, the last tenth of each is held
    out. A split by the publisher is kept. This takes two bytes of memory per document.
    """

    def __init__(self, documents):
        self.buckets = array("H")
        self.lengths = {}  # index -> characters of the first documents with text
        self.bytes = 0
        bytes_in_bucket = np.zeros(2**16, dtype=np.int64)
        for index, (parts, _) in enumerate(documents):
            bucket, characters, size = scan(parts)
            self.buckets.append(bucket)
            bytes_in_bucket[bucket] += size
            self.bytes += size
            if characters and len(self.lengths) < FEW_DOCUMENTS:
                self.lengths[index] = characters
        self.few = len(self.lengths) < FEW_DOCUMENTS
        self.held_out, total = set(), 0
        wanted = VAL_SHARE * self.bytes
        for bucket in np.flatnonzero(bytes_in_bucket).tolist():
            if total < wanted and total + bytes_in_bucket[bucket] <= 2 * wanted:
                self.held_out.add(bucket)
                total += bytes_in_bucket[bucket]

    def pieces(self, documents):
        """Yield ("train" or "val", text); where a document's share of a split ends, the text is None."""
        for index, (parts, published) in enumerate(documents):
            if self.few and not published:
                n_train = int(0.9 * self.lengths.get(index, 0))
            else:
                split = published or ("val" if self.buckets[index] in self.held_out else "train")
                n_train = sys.maxsize if split == "train" else 0
            used = set()
            for part in parts:
                for split, text in (("train", part[:n_train]), ("val", part[n_train:])):
                    if text:
                        yield split, text
                        used.add(split)
                n_train = max(0, n_train - len(part))
            yield from ((split, None) for split in sorted(used))


# --- token ids on disk ---


def learn_vocabulary(pieces, split, vocab_size, pattern):
    """Train a Tokenizer on the training text among pieces.

    Without vocab_size: the power of two below the square root of the corpus's bytes, from 512 to 65,536.
    More tokens shorten the text, but each is seen more rarely. 1 MB: 1,024, 10 MB: 2,048, 2 GB: 32,768.
    """
    if vocab_size is None:
        vocab_size = int(2 ** np.clip(int(np.log2(split.bytes) / 2), 9, 16))
        print(f"vocabulary: {vocab_size:,} tokens, the power of two below sqrt({split.bytes:,} bytes)")
    progress = Progress("learning it", split.bytes)
    texts = (text for part, text in pieces if text and part == "train")
    tokenizer = Tokenizer.train(texts, vocab_size, pattern, processes=os.cpu_count(), log=progress.done)
    progress.done(f"{tokenizer.vocab_size:,} tokens")
    return tokenizer


def encode_pieces(pieces, tokenizer):
    """A list of what Split.pieces yields -> {"train": ids, "val": ids}, <|endoftext|> after each document."""
    end = np.uint32([tokenizer.special_tokens[END_OF_TEXT]])
    ids = {"train": [], "val": []}
    for split, text in pieces:
        ids[split].append(end if text is None else tokenizer.encode_to_array(text))
    return {split: np.concatenate(arrays) for split, arrays in ids.items() if arrays}


def write_tokens(pieces, tokenizer, folder, n_bytes):
    """Encode pieces on all cores into the folder's .bin files. Returns what meta.json says of them."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    files = {split: open(folder / f"{split}.bin", "wb") for split in ("train", "val")}
    digests = {split: hashlib.blake2b(digest_size=16) for split in files}
    counts = {name: {"train": 0, "val": 0} for name in ("documents", "bytes", "tokens")}
    end, sizes = tokenizer.special_tokens[END_OF_TEXT], tokenizer.bytes_per_token
    progress = Progress("encoding", n_bytes)
    encode = partial(encode_pieces, tokenizer=tokenizer)
    with ThreadPoolExecutor() as pool:
        batches = map_batches(pool, encode, pieces, 2**16, os.cpu_count(), lambda piece: len(piece[1] or ""))
        for encoded in batches:
            for split, ids in encoded.items():
                raw = ids.astype(dtype).tobytes()
                files[split].write(raw)
                digests[split].update(raw)
                counts["documents"][split] += int((ids == end).sum())
                counts["bytes"][split] += int(sizes[ids].sum())
                counts["tokens"][split] += len(ids)
            progress.show(sum(counts["bytes"].values()) / n_bytes)
    for file in files.values():
        file.close()
    n_tokens = counts["tokens"]
    if min(n_tokens.values()) < 3:
        raise ValueError(f"the text ({n_bytes:,} bytes) can't be split into a training and a validation part")
    progress.done(f"{n_bytes / 1e6:.1f} MB -> {sum(n_tokens.values()) / 1e6:.2f} M tokens")
    fingerprint = {split: digest.hexdigest() for split, digest in digests.items()}
    return {**counts, "dtype": dtype.str, "fingerprint": fingerprint}


def prepare(sources, name=None, vocab_size=None, tokenizer=None, field="text"):
    """Make data/NAME out of a named corpus or of paths and return it. Raises ValueError for unusable input.

    tokenizer: a Tokenizer to use instead of learning one. Everything is written under another name first, so
    data/NAME is always complete.
    """
    name = name or Path(sources[0]).resolve().stem
    folder = DATA / name
    if Path(name).name != name or name.startswith(".") or name == "downloads" or not name.isprintable():
        raise ValueError(f"{name!r} can't name a folder under data/")
    if folder.exists() and not (folder / "meta.json").exists():
        raise ValueError(f"{folder} exists and holds no prepared data: choose another --name")
    if name in SOURCES and sources != [name]:
        raise ValueError(f"{name} is the name of a known corpus: choose another --name")
    if tokenizer and END_OF_TEXT not in tokenizer.special_tokens:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}, which separates the documents")
    damaged = Counter()
    documents = find_documents(sources, field, damaged)
    split = Split(documents())
    for path, count in sorted(damaged.items()):
        print(f"{path} is not UTF-8: stray bytes in {count} places are read as U+FFFD")
    if not split.bytes:
        raise ValueError(f"there is no text in {', '.join(sources)}")
    if tokenizer is None:
        pattern = WORDS_PATTERN if sources == ["pystdlib"] else GPT4_PATTERN  # programs are full of names
        tokenizer = learn_vocabulary(split.pieces(documents()), split, vocab_size, pattern)
    DATA.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=DATA))
    unfinished.chmod(0o755)
    try:
        meta = {"source": sources, "python": platform.python_version()}
        meta |= write_tokens(split.pieces(documents()), tokenizer, unfinished, split.bytes)
        meta["tokenizer"] = tokenizer.fingerprint
        tokenizer.save(unfinished / "tokenizer.json")
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if folder.exists():
            print(f"{os.path.relpath(folder)} is replaced")
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for part in ("train", "val"):
        documents, tokens, n_bytes = (meta[name][part] for name in ("documents", "tokens", "bytes"))
        ratio = f"{n_bytes / tokens:.2f} bytes per token"
        print(f"{os.path.relpath(folder)}/{part}.bin: {tokens:,} tokens, {ratio}, {documents:,} documents")
    return folder


def main():
    parser = argparse.ArgumentParser(description="Turn text into token ids that train.py reads.")
    known, suffixes = ", ".join(SOURCES), " ".join(TEXT_SUFFIXES)
    add = parser.add_argument
    kinds = f"{known}, or files and folders with {suffixes} (pystdlib)"
    add("sources", nargs="*", metavar="SOURCE", help=kinds)
    add("--name", help="name of the folder under data/ (that of the first source)")
    add("--vocab-size", type=int, help="tokens in the vocabulary (chosen by the size of the corpus)")
    add("--tokenizer", metavar="FILE", help="use this tokenizer.json instead of learning a vocabulary")
    add("--field", default="text", help="where the text is in the objects of a .jsonl file (text)")
    args = parser.parse_args()
    print_any_character()
    if args.tokenizer and args.vocab_size:
        raise ValueError("--tokenizer brings its own vocabulary: leave out --vocab-size")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    folder = prepare(args.sources or ["pystdlib"], args.name, args.vocab_size, tokenizer, args.field)
    print(f"next: python train.py --data {shlex.quote(folder.name)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
