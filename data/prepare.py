"""Stage 0: from documents to token ids on disk.

    python data/prepare.py                        the Python standard library of this interpreter, into data/pystdlib/
    python data/prepare.py shakespeare            a public corpus, downloaded; the other one is tinystories
    python data/prepare.py PATH... --name NAME    your own files or folders: .txt .md .py .rst .jsonl

Writes to data/NAME/: train.bin and val.bin (token ids, little-endian, documents separated by <|endoftext|>), tokenizer.json and
meta.json. The text streams: documents are read three times (to split them, to learn the vocabulary, to encode them) and never
held, so memory does not grow with the corpus.
"""

import argparse
import codecs
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizer import GPT4_PATTERN, SPECIAL_TOKENS, Tokenizer, map_ahead, read_parts  # noqa: E402

VERSION = 1  # of the files written here
DATA = ROOT / "data"
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl")
VAL_SHARE = 0.05
FEW_DOCUMENTS = 20
SHARD_TOKENS = 2**29  # a longer stream of tokens is cut into files of this many
END_OF_TEXT = SPECIAL_TOKENS[0]

# name -> [(URL, SHA-256 or None)]
DOWNLOADS = {
    "shakespeare": [
        (
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        )
    ],
    "tinystories": [
        ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", None),
        ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt", None),
    ],
}
SOURCES = ("pystdlib", *DOWNLOADS)


class Progress:
    """A line that says how far a phase has come: over itself on a terminal, elsewhere every ten seconds."""

    def __init__(self, label, total_bytes):
        self.label, self.total_bytes = label, max(1, total_bytes)
        self.start = self.shown = time.time()

    def show(self, share):
        """share: the part of the whole that is done, 0 to 1."""
        terminal = sys.stderr.isatty()
        now = time.time()
        if now - self.shown < (0.2 if terminal else 10):
            return
        self.shown = now
        rate = share * self.total_bytes / (now - self.start)
        left = (now - self.start) * (1 - share) / max(share, 1e-9)
        line = f"{self.label} {share:4.0%}  {rate / 1e6:.1f} MB/s  {left:.0f} s left"
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def done(self, line):
        """Replace the live line by a lasting one."""
        print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr, flush=True)
        print(f"{self.label} {line}, {time.time() - self.start:.1f} s", flush=True)


# --- documents: each is (name, split, parts): where it comes from, "train" or "val" if its publisher says so, and its text ---


def file_parts(path, damaged):
    """Yield the text of a file piece by piece. Bytes that are no UTF-8 become U+FFFD, and the path is put into `damaged`."""
    for i, raw in enumerate(read_parts(path)):
        if i == 0:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError:
            damaged.add(path)
            yield raw.decode("utf-8", errors="replace")


def jsonl_documents(path, field):
    """A document per line of a .jsonl file: the string under `field`."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object with a text under {field!r} ({error})") from None
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number}: {field!r} is no text but {text!r:.40}")
            # JSON can spell half a surrogate pair, which is no character
            yield f"{path}:{number}", None, [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")]


def story_documents(path, split, damaged):
    """The stories of a TinyStories file, which a literal <|endoftext|> separates."""
    rest = ""
    for part in file_parts(path, damaged):
        *stories, rest = (rest + part).split(END_OF_TEXT)
        yield from ((str(path), split, [story.strip()]) for story in stories)
    yield str(path), split, [rest.strip()]


def stdlib_files():
    """The .py files of this interpreter's standard library, without tests, tables of numbers and what was generated."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
    left_out |= {"encodings", "pydoc_data"}
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        tables = inside.name.startswith("_sysconfigdata") or inside.as_posix() in ("stringprep.py", "html/entities.py")
        if not tables and not left_out & set(inside.parts) and not inside.parts[0].startswith("config-"):
            yield path


def text_files(paths):
    """The files with text under the given paths, in a fixed order, and how many others were passed over."""
    files, others = [], 0
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"no file, folder or corpus named {path}; the known corpora are {', '.join(SOURCES)}")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        chosen = [p for p in inside if p.suffix in TEXT_SUFFIXES]
        files += chosen
        others += len(inside) - len(chosen)
    return files, others


def download(url, sha256=None):
    """Fetch a file into data/downloads/ unless it is there; it gets its name only when complete and verified."""
    path = DATA / "downloads" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(unfinished, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            progress = Progress(f"downloading {path.name}", total)
            done = 0
            while block := response.read(2**20):
                digest.update(block)
                file.write(block)
                done += len(block)
                progress.show(done / max(total, done))
        if done < total:
            raise ValueError(f"the download of {url} broke off after {done} of {total} bytes: try again")
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"{url} is not the file that was published (SHA-256 {digest.hexdigest()}, expected {sha256})")
        unfinished.rename(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"can't download {url} ({reason}): get the file some other way and run `python data/prepare.py FILE --name NAME`"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)
    progress.done(f"{done / 1e6:.1f} MB")
    return path


def find_documents(sources, field="text"):
    """Return a function that starts a fresh pass over the documents, and the set of damaged files that passes fill.

    sources: one name out of SOURCES, or paths of files and folders.
    """
    damaged = set()
    if sources == ["tinystories"]:
        files = [download(*source) for source in DOWNLOADS["tinystories"]]

        def documents():
            for path, split in zip(files, ("train", "val")):
                yield from story_documents(path, split, damaged)

        return documents, damaged
    if sources == ["pystdlib"]:
        files = list(stdlib_files())
    elif sources == ["shakespeare"]:
        files = [download(*source) for source in DOWNLOADS["shakespeare"]]
    else:
        files, others = text_files(sources)
        if others:
            print(f"passed over {others} files that are not {' '.join(TEXT_SUFFIXES)}")

    def documents():
        for path in files:
            if path.suffix == ".jsonl":
                yield from jsonl_documents(path, field)
            else:
                yield str(path), None, file_parts(path, damaged)

    return documents, damaged


# --- which text is held out for validation ---


def bucket(parts):
    """Return (bucket, characters, bytes) of a document. The bucket, 0 to 65535, depends on the content alone."""
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

    Whole documents are held out, those in the lowest buckets, until 5 % of the bytes are reached; of fewer than 20 documents, the
    last tenth of each. What the publisher has split stays split so. Two bytes are kept per document.
    """

    def __init__(self, documents):
        self.buckets = array("H")
        self.lengths = []  # of the first documents, in characters
        self.bytes = self.characters = 0
        bytes_in_bucket = np.zeros(2**16, dtype=np.int64)
        for _, published, parts in documents:
            number, characters, size = bucket(parts)
            bytes_in_bucket[number] += size
            self.buckets.append(number)
            self.bytes += size
            self.characters += characters
            if len(self.lengths) < FEW_DOCUMENTS:
                self.lengths.append(characters)
        self.few = sum(length > 0 for length in self.lengths) < FEW_DOCUMENTS
        self.cutoff = int(np.searchsorted(bytes_in_bucket.cumsum(), VAL_SHARE * self.bytes))  # the last bucket held out

    def pieces(self, documents):
        """Yield ("train" or "val", text) and, where a document's share of it ends, ("train" or "val", None)."""
        for index, (_, published, parts) in enumerate(documents):
            if published:
                n_train = sys.maxsize if published == "train" else 0
            elif self.few:
                n_train = int(0.9 * self.lengths[index])
            else:
                n_train = sys.maxsize if self.buckets[index] > self.cutoff else 0
            used = set()
            for part in parts:
                for split, text in (("train", part[:n_train]), ("val", part[n_train:])):
                    if text:
                        yield split, text
                        used.add(split)
                n_train = max(0, n_train - len(part))
            yield from ((split, None) for split in sorted(used))


# --- token ids on disk ---


class TokenWriter:
    """Writes the token ids of one split to train.bin or, beyond SHARD_TOKENS of them, to train_000.bin, train_001.bin ..."""

    def __init__(self, folder, split, dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.tokens = 0
        self.files = []

    def write(self, ids):
        """Append an array of ids."""
        while len(ids):
            used = self.tokens % SHARD_TOKENS
            if used == 0:
                self.close()
                self.files.append(open(self.folder / f"{self.split}_{len(self.files):03d}.bin", "wb"))
            now, ids = ids[: SHARD_TOKENS - used], ids[SHARD_TOKENS - used :]
            self.files[-1].write(now.astype(self.dtype).tobytes())
            self.tokens += len(now)

    def close(self):
        """Close the file that is being written."""
        if self.files:
            self.files[-1].close()

    def finish(self):
        """Close; a single file loses its number."""
        self.close()
        if len(self.files) == 1:
            os.replace(self.files[0].name, self.folder / f"{self.split}.bin")


def encode_pieces(pieces, tokenizer):
    """A list of what Split.pieces yields -> {"train": ids, "val": ids}, <|endoftext|> after each document."""
    end = np.array([tokenizer.special_tokens[END_OF_TEXT]], dtype=np.uint32)
    ids = {"train": [], "val": []}
    for split, text in pieces:
        ids[split].append(end if text is None else tokenizer.encode_to_array(text))
    return {split: np.concatenate(arrays) for split, arrays in ids.items() if arrays}


def batches_of(pieces, size=2**20):
    """Group pieces into lists of about `size` characters."""
    batch, length = [], 0
    for split, text in pieces:
        batch.append((split, text))
        length += len(text or "")
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def default_vocab_size(n_bytes):
    """The power of two next to the square root of the corpus's size in bytes, from 512 to 65,536.

    More tokens shorten the text but are each seen more rarely; 1 MB: 1,024, 10 MB: 4,096, 2 GB: 32,768.
    """
    return int(2 ** np.clip(round(np.log2(n_bytes) / 2), 9, 16))


def prepare(sources, name=None, vocab_size=None, tokenizer=None, field="text"):
    """Make data/NAME out of one named corpus or of paths. Returns the folder. Raises ValueError for unusable input.

    tokenizer: a Tokenizer to use instead of learning one. All is written under another name first: what stands in data/NAME is
    complete.
    """
    name = name or Path(sources[0]).resolve().stem
    folder, unfinished = DATA / name, DATA / f".{name}.unfinished"
    if Path(name).name != name or name.startswith(".") or name == "downloads":
        raise ValueError(f"{name!r} can't name a folder under data/")
    if folder.exists() and not (folder / "meta.json").exists():
        raise ValueError(f"{folder} exists and holds no prepared data: choose another --name")
    start = time.time()
    documents, damaged = find_documents(sources, field)
    split = Split(documents())
    if damaged:
        print(f"{len(damaged)} files are not UTF-8, their other bytes are read as U+FFFD: {', '.join(map(str, sorted(damaged)[:5]))}")
    if not split.characters:
        raise ValueError(f"there is no text in {', '.join(sources)}")
    cores = os.cpu_count() or 1
    if tokenizer is None:
        if vocab_size is None:
            vocab_size = default_vocab_size(split.bytes)
            print(f"vocabulary: {vocab_size:,} tokens, the power of two next to sqrt({split.bytes:,} bytes)")
        progress = Progress("learning the vocabulary", split.bytes)
        tokenizer = Tokenizer.train(
            training_text(split.pieces(documents()), progress, split.characters), vocab_size, processes=cores
        )
        progress.done(f"{tokenizer.vocab_size:,} tokens")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        writers = {part: TokenWriter(unfinished, part, dtype) for part in ("train", "val")}
        n_bytes = {"train": 0, "val": 0}
        n_documents = {"train": 0, "val": 0}
        progress = Progress("encoding", split.bytes)
        with ThreadPoolExecutor(cores) as pool:
            batches = batches_of(split.pieces(documents()))
            for encoded in map_ahead(pool, partial(encode_pieces, tokenizer=tokenizer), batches, 2 * cores):
                for part, ids in encoded.items():
                    writers[part].write(ids)
                    n_bytes[part] += int(tokenizer.bytes_per_token[ids].sum())
                    n_documents[part] += int((ids == tokenizer.special_tokens[END_OF_TEXT]).sum())
                progress.show(sum(n_bytes.values()) / split.bytes)
        for writer in writers.values():
            writer.finish()
        for part in ("train", "val"):
            if not writers[part].tokens:
                raise ValueError(f"there is too little text in {', '.join(sources)}: nothing is left for {part}.bin")
        tokenizer.save(unfinished / "tokenizer.json")
        meta = dict(
            version=VERSION,
            source=[str(source) for source in sources],
            documents=n_documents,
            bytes=n_bytes,
            tokens={part: writer.tokens for part, writer in writers.items()},
            dtype=dtype.str,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
        )
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    tokens = sum(meta["tokens"].values())
    progress.done(f"{split.bytes / 1e6:.1f} MB in {sum(n_documents.values()):,} documents -> {tokens / 1e6:.2f} M tokens")
    print(
        f"{folder.relative_to(ROOT)}/: train {meta['tokens']['train']:,} tokens, val {meta['tokens']['val']:,} tokens, "
        f"{split.bytes / tokens:.2f} bytes per token, {time.time() - start:.1f} s in all"
    )
    return folder


def training_text(pieces, progress, n_characters):
    """The text for training among pieces, with progress shown as it is read."""
    done = 0
    for split, text in pieces:
        if text is not None:
            done += len(text)
            progress.show(done / n_characters)
            if split == "train":
                yield text


def main():
    parser = argparse.ArgumentParser(description="Turn text into token ids that train.py reads.")
    parser.add_argument(
        "sources", nargs="*", default=["pystdlib"], metavar="SOURCE",
        help=f"a corpus ({', '.join(SOURCES)}) or your own files and folders ({' '.join(TEXT_SUFFIXES)}) (pystdlib)",
    )  # fmt: skip
    parser.add_argument("--name", help="name of the folder under data/ (the first source's name)")
    parser.add_argument("--vocab-size", type=int, help="tokens in the vocabulary (chosen by the size of the corpus)")
    parser.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.json instead of learning a vocabulary")
    parser.add_argument("--field", default="text", help="where the text is in an object of a .jsonl file (text)")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    folder = prepare(args.sources, args.name, args.vocab_size, tokenizer, args.field)
    print(f"next: python train.py --data {folder.name}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
