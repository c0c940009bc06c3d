"""What tokenizer.py promises: exact merges, lossless text, and a file that the ecosystem reads."""

import random
import time
from collections import Counter

import pytest
import regex
import rustbpe
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as stage
from tokenizer import GPT4_PATTERN, SPECIAL_TOKENS, Tokenizer


def textbook_merges(texts, n_merges):
    """The slow twin: after every merge, count all pairs of all chunks again."""
    chunks = Counter(chunk for text in texts for chunk in regex.findall(GPT4_PATTERN, text))
    words = {tuple(chunk.encode()): count for chunk, count in chunks.items()}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                match = word[i : i + 2] == best
                new.append(255 + len(merges) if match else word[i])
                i += 2 if match else 1
            merged[tuple(new)] += count
        words = merged
    return merges


texts = st.lists(
    st.one_of(st.text("ab", max_size=30), st.text("abc \n'1", max_size=40), st.text(max_size=20)), max_size=6
)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_merges_equal_those_of_the_textbook_algorithm(texts):
    if not any(texts):
        with pytest.raises(ValueError, match="no training text"):
            Tokenizer.train(texts, 300)
        return
    assert Tokenizer.train(texts, 256 + 3 + 40).merges == textbook_merges(texts, 40)


@pytest.mark.parametrize("text", ["aaaa", "aaaaa", "abab", "abababa", "aabaabaa", "a", "", "\n\n\n"])
def test_overlapping_pairs_are_counted_as_they_merge(text):
    assert Tokenizer.train([text, "xyz"], 256 + 3 + 20).merges == textbook_merges([text, "xyz"], 20)


def test_one_very_long_word_takes_no_quadratic_time():
    start = time.perf_counter()
    Tokenizer.train(["".join(random.Random(0).choices("ACGT", k=300_000))], 400)
    assert (
        time.perf_counter() - start < 30
    )  # it takes half a second; hours if every occurrence splits the word


def test_merges_equal_those_of_rustbpe(shakespeare):
    text = shakespeare.read_text(encoding="utf-8")
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator([text], 1024, pattern=GPT4_PATTERN)
    ours = Tokenizer.train([text], 1024 + len(SPECIAL_TOKENS))
    assert ours.tokens == [bytes(token) for token, _ in theirs.get_mergeable_ranks()]


def test_the_number_of_processes_changes_nothing():
    documents = [f"document {i} " * 50 for i in range(40)]
    assert Tokenizer.train(documents, 400, processes=2).merges == Tokenizer.train(documents, 400).merges


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_the_fast_splitter_cuts_like_the_regex_module(text):
    text = text.encode("utf-8", "replace").decode()
    assert stage.compile_splitter(GPT4_PATTERN)(text) == regex.findall(GPT4_PATTERN, text)


def test_a_vocabulary_that_runs_out_of_pairs_is_smaller_and_says_so():
    lines = []
    tokenizer = Tokenizer.train(["abcabc"], 1000, log=lines.append)
    assert tokenizer.vocab_size < 300
    assert "no more pairs" in lines[-1]


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode("utf-8", "replace").decode()


@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from(SPECIAL_TOKENS), st.text())
def test_text_never_becomes_a_special_token(tokenizer, before, special, after):
    specials = set(tokenizer.special_tokens.values())
    text = before + special + after
    assert not specials & set(tokenizer.encode(text))
    assert not specials & set(tokenizer.encode_to_array(text).tolist())


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_the_saved_file_gives_the_same_ids_in_the_tokenizers_library(tmp_path_factory, tokenizer, text):
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    if not path.exists():
        tokenizer.save(path)
    assert tokenizers.Tokenizer.from_file(str(path)).encode(text).ids == tokenizer.encode(text)


def test_loading_restores_everything_that_decides_the_ids(tmp_path):
    tokenizer = Tokenizer.train(
        ["hello world 123"], 280, pattern=r"\p{L}+|\P{L}", special_tokens=("<|endoftext|>", "<x>")
    )
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.pattern == tokenizer.pattern
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.merges == tokenizer.merges
    assert loaded.fingerprint == tokenizer.fingerprint
    other = Tokenizer(tokenizer.merges, GPT4_PATTERN, tokenizer.special_tokens)
    assert other.fingerprint != tokenizer.fingerprint


def test_the_saved_folder_opens_in_transformers(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat sat — 日本語 12345"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.special_tokens["<|endoftext|>"]
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_bytes_per_token_adds_up_to_the_text(tokenizer):
    text = "the cat — 日本語"
    assert tokenizer.bytes_per_token[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.bytes_per_token[tokenizer.special_tokens["<|endoftext|>"]] == 0
    assert len(tokenizer.bytes_per_token) == tokenizer.vocab_size


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_file_read_in_parts_is_the_same_file_cut_between_chunks(tmp_path, size):
    text = "def f(x):\n    return x\n\n\nwörter und 日本語\n" * 5
    (tmp_path / "text").write_text(text, encoding="utf-8")
    parts = [part.decode() for part in stage.read_parts(tmp_path / "text", size)]
    assert "".join(parts) == text
    assert len(parts) > 1 or size == 64
    chunks = [
        chunk
        for part in stage.read_parts(tmp_path / "text", 64)
        for chunk in regex.findall(GPT4_PATTERN, part.decode())
    ]
    assert chunks == regex.findall(GPT4_PATTERN, text)


def test_mistakes_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="258 can't hold the bytes"):
        Tokenizer.train(["text"], 258)
    with pytest.raises(ValueError, match="given twice"):
        Tokenizer([], special_tokens=("<a>", "<a>"))
    with pytest.raises(ValueError, match="id 320 is outside"):
        tokenizer.decode([0, 320])
    with pytest.raises(ValueError, match="capturing group"):
        Tokenizer.train(["text"], 300, pattern="(a)|.")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json is not a byte-level BPE"):
        Tokenizer.load(tmp_path / "broken.json")
