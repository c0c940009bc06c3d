"""What sample.py promises: the model's own distribution, rows that don't disturb each other, whole
characters.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import sample as stage
from model import Transformer
from sample import generate


def continuation(model, prompt, **settings):
    return [new for (new,) in generate(model, [prompt], **settings)]


def top_p_by_definition(probabilities, top_p):
    """The slow twin: the likeliest tokens, one after the other, until they reach top_p."""
    kept, total = set(), 0.0
    for i in np.argsort(-probabilities, kind="stable"):
        if total >= top_p:
            break
        kept.add(int(i))
        total += probabilities[i]
    return kept


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=20, unique=True), st.floats(0.05, 0.95))
def test_top_p_keeps_the_likeliest_tokens_that_reach_it(logits, top_p):
    logits = torch.tensor(logits, dtype=torch.float64) / 10
    kept = set(stage.filter_top_p(logits[None], top_p)[0].isfinite().nonzero()[:, 0].tolist())
    assert kept == top_p_by_definition(logits.softmax(-1).numpy(), top_p)


def test_greedy_ids_equal_those_of_transformers(tmp_path, model):
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = [5, 17, 200]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=28, do_sample=False, use_cache=True)
    assert continuation(model, prompt, max_new_tokens=28, temperature=0) == expected[0, 3:].tolist()


def test_rows_of_a_ragged_batch_equal_each_alone(model):
    prompts = [[1], [5, 6, 7, 8, 9], [10, 11, 12]]
    together = list(zip(*generate(model, prompts, max_new_tokens=20, temperature=0)))
    for prompt, row in zip(prompts, together):
        assert continuation(model, prompt, max_new_tokens=20, temperature=0) == list(row)


def test_equal_seeds_draw_equal_texts_and_others_do_not(model):
    draw = [
        continuation(model, [3], max_new_tokens=20, temperature=1.0, top_p=1.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert draw[0] == draw[1] != draw[2]


def test_a_row_that_has_ended_yields_none_while_others_go_on(model):
    free = list(zip(*generate(model, [[1], [2]], max_new_tokens=12, temperature=0)))
    stop = next(new for new in free[0] if new != free[0][0] and new not in free[1])
    rows = list(zip(*generate(model, [[1], [2]], max_new_tokens=12, temperature=0, stop_ids=[stop])))
    first = free[0].index(stop)
    assert rows[0][:first] == free[0][:first]
    assert set(rows[0][first:]) == {None}
    assert stop not in rows[1]


def test_ids_beyond_the_vocabulary_are_never_drawn(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[300:] *= 1000
    ids = continuation(model, [1], max_new_tokens=30, temperature=1.0, top_p=1.0, vocab_size=300)
    assert max(ids) < 300


def test_text_longer_than_the_context_goes_on(model):
    assert model.config.block_size == 32
    assert len(continuation(model, [1] * 50, max_new_tokens=100)) == 100
    assert len(continuation(model, [1, 2], max_new_tokens=100)) == 100


def test_a_stream_never_shows_half_a_character(model, tokenizer, monkeypatch):
    ids = tokenizer.encode("日本語 😀é")
    monkeypatch.setattr(stage, "generate", lambda *_, **__: ([i] for i in ids))
    pieces = list(stage.stream(model, tokenizer, "x"))
    assert "".join(pieces) == "日本語 😀é"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    model.save(tmp_path / "model", tokenizer)
    return tmp_path / "model"


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "sample.py", *arguments], capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("prompt", ["", "the cat", "你好"])
def test_only_the_text_goes_to_stdout(folder, prompt):
    result = run("--model", folder, "--prompt", prompt, "--max-new-tokens", "5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(prompt)
    assert "tokens/s" in result.stderr and "tokens/s" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "there is no folder no/such/folder"),
        (["--model", str(ROOT / "tests")], "config.json"),
        (["--temperature", "-1"], "temperature -1.0 must be 0"),
        (["--top-p", "0"], "top-p 0.0 is outside (0, 1]"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(folder, arguments, message):
    if "--model" not in arguments:
        arguments = ["--model", folder, *arguments]
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_without_a_model_the_command_that_makes_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "OUT", tmp_path)
    with pytest.raises(ValueError, match="run `python train.py`"):
        stage.newest_model()


def test_the_newest_model_is_the_one_saved_last(tmp_path, monkeypatch, model):
    monkeypatch.setattr(stage, "OUT", tmp_path)
    for name in ("b", "a"):
        model.save(tmp_path / name)
    assert stage.newest_model() == tmp_path / "a"
    assert isinstance(stage.Transformer.load(stage.newest_model()), Transformer)
