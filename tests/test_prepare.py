"""What data/prepare.py promises: nothing lost, nothing leaked, nothing half-written, memory that does not
grow.
"""

import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import regex
from conftest import ROOT

from data import prepare as stage
from tokenizer import GPT4_PATTERN, Tokenizer


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder of its own."""
    monkeypatch.setattr(stage, "DATA", tmp_path / "data")
    return tmp_path / "data"


def read_back(folder):
    """All text of a prepared folder: {"train": [documents], "val": [documents]}."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    texts = {}
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"]).tolist()
        texts[split] = tokenizer.decode(ids).split("<|endoftext|>")
        assert texts[split].pop() == ""  # the stream ends with the end of a document
    return texts


def write_documents(folder, n, words=60):
    folder.mkdir()
    documents = [f"document {i}: " + f"{i * i} words and lines\n" * words for i in range(n)]
    for i, text in enumerate(documents):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return documents


def test_whole_documents_are_held_out_and_nothing_is_lost(tmp_path, data):
    documents = write_documents(tmp_path / "many", 100)
    texts = read_back(stage.prepare([str(tmp_path / "many")]))
    assert sorted(texts["train"] + texts["val"]) == sorted(documents)
    share = sum(map(len, texts["val"])) / sum(map(len, documents))
    assert 0.05 <= share < 0.07  # until 5 % are reached, by documents of 1 %


def test_what_is_held_out_depends_on_content_alone(tmp_path, data):
    documents = write_documents(tmp_path / "many", 100)
    first = read_back(stage.prepare([str(tmp_path / "many")]))["val"]
    (tmp_path / "other").mkdir()
    for i, text in enumerate(reversed(documents)):
        (tmp_path / "other" / f"{i:03}.md").write_text(text, encoding="utf-8")
    assert set(read_back(stage.prepare([str(tmp_path / "other")]))["val"]) == set(first)


def test_a_huge_document_is_not_held_out(tmp_path, data):
    documents = write_documents(tmp_path / "many", 25, words=2)
    (tmp_path / "many" / "huge.txt").write_text("a long story\n" * 20000, encoding="utf-8")
    texts = read_back(stage.prepare([str(tmp_path / "many")]))
    assert "a long story\n" * 20000 in texts["train"]
    assert 0 < sum(map(len, texts["val"])) <= sum(map(len, documents))


def test_of_few_documents_the_last_tenth_of_each_is_held_out(tmp_path, data):
    documents = write_documents(tmp_path / "few", 3)
    texts = read_back(stage.prepare([str(tmp_path / "few")]))
    for document, train, val in zip(documents, texts["train"], texts["val"]):
        assert train + val == document
        assert len(train) == int(0.9 * len(document))


def test_the_vocabulary_is_learned_from_training_text_only(tmp_path, data):
    (tmp_path / "text.txt").write_text("ab " * 900 + "xyzzy " * 50, encoding="utf-8")
    folder = stage.prepare([str(tmp_path / "text.txt")])
    assert not any(b"xy" in token for token in Tokenizer.load(folder / "tokenizer.json").tokens.values())


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path, data):
    (tmp_path / "text.txt").write_text("some text " * 100, encoding="utf-8")
    special_tokens = [*(f"<{i}>" for i in range(70000)), "<|endoftext|>"]
    big = Tokenizer.train(["text"], 71000, special_tokens=special_tokens)
    folder = stage.prepare([str(tmp_path / "text.txt")], tokenizer=big)
    assert json.loads((folder / "meta.json").read_text())["dtype"] == "<u4"
    assert "".join(sum(read_back(folder).values(), [])) == "some text " * 100


def test_meta_counts_what_was_written(tmp_path, data):
    documents = write_documents(tmp_path / "many", 40)
    folder = stage.prepare([str(tmp_path / "many")], vocab_size=320)
    meta = json.loads((folder / "meta.json").read_text())
    assert sum(meta["documents"].values()) == 40
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) for text in documents)
    assert meta["tokens"]["train"] * 2 == (folder / "train.bin").stat().st_size
    assert meta["tokenizer"] == Tokenizer.load(folder / "tokenizer.json").fingerprint


def test_jsonl_documents_and_a_literal_end_of_text_stay_text(tmp_path, data):
    lines = [json.dumps({"body": f"line {i} <|endoftext|> \ud83d\ude00 end"}) for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    folder = stage.prepare([str(tmp_path / "d.jsonl")], field="body")
    meta = json.loads((folder / "meta.json").read_text())
    assert sum(meta["documents"].values()) == 30


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_file_read_in_parts_is_the_same_file_cut_between_chunks(tmp_path, size):
    text = "def f(x):\n    return x\n\n\nwörter und 日本語\n" * 5
    (tmp_path / "text").write_text(text, encoding="utf-8")
    parts = list(stage.file_parts(tmp_path / "text", {}, size))
    assert "".join(parts) == text
    assert len(parts) > 1
    if size == 64:  # smaller parts hold no border of lines
        chunks = [chunk for part in parts for chunk in regex.findall(GPT4_PATTERN, part)]
        assert chunks == regex.findall(GPT4_PATTERN, text)


def test_stories_are_separated_and_split_as_published(tmp_path, data, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    (site / "t.txt").write_text("Once.\n<|endoftext|>\nTwice.\n<|endoftext|>\n", encoding="utf-8")
    (site / "v.txt").write_text("Thrice.", encoding="utf-8")
    with serve(site) as url:
        monkeypatch.setitem(stage.DOWNLOADS, "tinystories", [(f"{url}/t.txt", None), (f"{url}/v.txt", None)])
        assert read_back(stage.prepare(["tinystories"])) == {"train": ["Once.", "Twice."], "val": ["Thrice."]}


class serve:
    """A web server for the files of a folder, on this machine."""

    def __init__(self, folder):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=folder)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_):
        self.server.shutdown()


def test_a_download_is_verified_before_it_gets_its_name(tmp_path, data):
    (tmp_path / "text.txt").write_bytes(b"published")
    with serve(tmp_path) as url:
        with pytest.raises(ValueError, match="is not the file that was published"):
            stage.download(f"{url}/text.txt", data / "downloads", "0" * 64)
        assert not list((data / "downloads").iterdir())
        path = stage.download(f"{url}/text.txt", data / "downloads", hashlib.sha256(b"published").hexdigest())
    assert path.read_bytes() == b"published"
    assert (
        stage.download(f"{url}/text.txt", data / "downloads") == path
    )  # the server is gone: it is not asked again


def test_offline_says_what_to_do_instead(data, monkeypatch):
    monkeypatch.setitem(stage.DOWNLOADS, "shakespeare", [("http://127.0.0.1:9/input.txt", None)])
    with pytest.raises(
        ValueError, match=r"can't download http://127.0.0.1:9/input.txt .*prepare.py FILE --name NAME"
    ):
        stage.prepare(["shakespeare"])


def test_the_standard_library_comes_without_tests_and_tables():
    names = [path.as_posix() for path in stage.stdlib_files()]
    assert any(name.endswith("/argparse.py") for name in names)
    for part in ("/test/", "/site-packages/", "/encodings/", "_sysconfigdata", "/pydoc_data/"):
        assert not any(part in name for name in names)


def test_a_file_that_is_not_utf8_is_named_and_still_read(tmp_path, data, capsys):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    folder = stage.prepare([str(tmp_path / "latin.txt")])
    assert "latin.txt is not UTF-8: stray bytes in 100 places" in capsys.readouterr().out
    assert "caf\ufffd caf\ufffd" in read_back(folder)["train"][0]


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, data, monkeypatch):
    write_documents(tmp_path / "many", 40)

    def interrupt(self, share):  # while the ids are written
        assert any(data.glob(".many.*/train.bin"))
        raise KeyboardInterrupt

    monkeypatch.setattr(stage.Progress, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stage.prepare([str(tmp_path / "many")])
    assert not list(data.iterdir())


def test_other_files_are_passed_over_aloud(tmp_path, data, capsys):
    write_documents(tmp_path / "many", 25)
    (tmp_path / "many" / "image.png").write_bytes(b"\x89PNG")
    stage.prepare([str(tmp_path / "many")])
    assert "passed over 1 files" in capsys.readouterr().out


def test_a_name_that_the_terminal_cannot_show_stops_nothing(tmp_path, data, monkeypatch):
    (tmp_path / "语料.txt").write_text("text " * 300, encoding="utf-8")
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "语料.txt"), "--vocab-size", "270"])
    monkeypatch.setattr(sys, "stdout", output)
    stage.main()
    output.flush()
    assert b"next: python train.py --data '\\u8bed\\u6599'" in output.buffer.getvalue()
    assert (data / "语料/meta.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["no/such/file.txt"],
            "no file, folder or corpus named no/such/file.txt; the corpora are pystdlib",
        ),
        (["{tmp}/empty.txt"], "there is no text in"),
        (["{tmp}/folder"], "there is no text in"),
        (
            ["{tmp}/a.txt", "--vocab-size", "258"],
            "258 is outside 259",
        ),
        (["{tmp}/a.txt", "--name", "../x"], "'../x' can't name a folder"),
        (["{tmp}/a.txt", "--name", "pystdlib"], "pystdlib is the name of a known corpus"),
        (["{tmp}/one.txt"], "there is no training text"),
        (["{tmp}/tiny.txt"], "can't be split into a training and a validation part"),
        (["{tmp}/bad.jsonl"], "bad.jsonl, line 2: no JSON object with a text under 'text'"),
        (
            ["{tmp}/a.txt", "--tokenizer", "{tmp}/bad.jsonl"],
            "bad.jsonl is not a byte-level BPE tokenizer.json",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(tmp_path, arguments, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "tiny.txt").write_text("tiny")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"other": 1}\n')
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--name" not in arguments:
        arguments += ["--name", "unfinished-test"]
    result = subprocess.run(
        [sys.executable, ROOT / "data/prepare.py", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (ROOT / "data/unfinished-test").exists()
