"""What sample.py promises: tokens drawn from the filtered distribution, rows that do not disturb each other,
whole characters, stop strings that are never shown, chats that read only what is new, no answer lost.
"""

import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from functools import partial

import numpy as np
import pytest
import torch
import torch._inductor.config
import transformers
from conftest import ROOT, run_main, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from model import Config, KVCache, Transformer, fast_dtype
from sample import Chat, Sampling, TextStream, generate, stream_text
from tokenizer import Tokenizer, render

GREEDY = ("--temperature", 0, "--max-new-tokens", 8)
ENDLESS = ("--temperature", 0)  # the likeliest token never ends the text of the model that the tests share


def run(*argv, input=""):
    """What sample.py prints to stdout and to stderr; input: what comes to its stdin."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(errors):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8"))
        return run_main(sample.main, "sample.py", *argv), errors.getvalue()


def start(*argv, **variables):
    """A process that runs sample.py, with these environment variables."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    argv = [sys.executable, ROOT / "sample.py", *map(str, argv)]
    return subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For a model this small, threads only wait for each other; on a busy machine, very long."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    model.save(tmp_path / "model", tokenizer)
    return tmp_path / "model"


def continuation(model, prompt, **settings):
    return [new for (new,) in generate(model, [prompt], **settings)]


def count_reads(model):
    """A list to which the number of tokens is added that model.hidden is given, row by row."""
    reads, hidden = [], model.hidden
    model.hidden = lambda ids, cache=None: reads.append(ids.numel()) or hidden(ids, cache)
    return reads


# --- from scores to a token ---


LOGITS = st.lists(st.integers(-50, 50), min_size=2, max_size=20, unique=True)


def top_k_by_definition(logits, k):
    return set(np.argsort(-logits)[:k].tolist())


def top_p_by_definition(logits, top_p):
    probabilities = np.exp(logits) / np.exp(logits).sum()
    kept, total = set(), 0.0
    for i in np.argsort(-probabilities, kind="stable"):
        if total >= top_p:
            break
        kept.add(int(i))
        total += probabilities[i]
    return kept


@pytest.mark.parametrize(
    ("filtered", "definition", "theirs"),
    [
        (sample.keep_top_k, top_k_by_definition, transformers.TopKLogitsWarper),
        (sample.keep_top_p, top_p_by_definition, transformers.TopPLogitsWarper),
        (partial(sample.keep_top_p, k=2), top_p_by_definition, transformers.TopPLogitsWarper),
    ],
    ids=["top-k", "top-p", "top-p, at first of two"],
)
@settings(max_examples=100, deadline=None)
@given(values=LOGITS, share=st.floats(0.05, 0.95))
def test_a_filter_keeps_what_its_definition_and_transformers_keep(
    filtered, definition, theirs, values, share
):
    amount = share if definition is not top_k_by_definition else 1 + int(share * len(values))
    logits = torch.tensor(values, dtype=torch.float64)[None] / 10
    kept = filtered(logits, amount)[0]
    assert set(kept.isfinite().nonzero()[:, 0].tolist()) == definition(logits[0].numpy(), amount)
    assert torch.equal(kept[kept.isfinite()], logits[0, kept.isfinite()])
    assert torch.equal(kept, theirs(amount)(None, logits.clone())[0])


def test_top_p_is_the_same_where_the_likeliest_thousand_do_not_suffice():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1], [9]]
    )
    for top_p in (0.3, 0.9, 0.999):
        assert torch.equal(sample.keep_top_p(logits, top_p), sample.keep_top_p(logits, top_p, k=5000))


def chi_square(counts, probabilities):
    """Sum of (observed - expected)^2 / expected, over cells that expect at least 5, and their number."""
    expected = probabilities * counts.sum()
    cells = expected >= 5
    return float((((counts - expected) ** 2) / expected)[cells].sum()), int(cells.sum())


def test_tokens_are_drawn_with_their_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01, 0])
    drawn = sample.draw(p.expand(20_000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[5] == 0
    assert chi_square(counts, p)[0] < 18.5  # exceeded in 0.1 % of all seeds, with 4 degrees of freedom


def test_filters_apply_to_the_scores_after_the_temperature_in_the_order_of_transformers():
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=0.7, top_k=30, top_p=0.8)
    warpers = [transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(30)]
    warpers.append(transformers.TopPLogitsWarper(0.8))
    theirs = transformers.LogitsProcessorList(warpers)(None, logits.clone()).softmax(-1)
    assert torch.allclose(sample.probabilities_of(logits, sampling), theirs, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": 1e-46}, {"top_p": 0}, {"top_p": 1.1}]
    + [{"top_p": 1e-300}, {"top_k": -1}],
)
def test_values_without_a_meaning_are_refused_by_name(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        next(generate(model, [[1]], **wrong))


# --- generate ---


def test_greedy_ids_equal_those_of_transformers(tmp_path, model):
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = [5, 17, 200]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=28, do_sample=False)
    ids = continuation(model, prompt, max_new_tokens=28, temperature=0)
    assert ids == expected[0, 3:].tolist()


def test_rows_of_a_ragged_batch_equal_each_alone(model):
    settings = dict(max_new_tokens=20, temperature=0)
    prompts = [[1], [5, 6, 7, 8, 9], [10, 11, 12]]
    together = list(zip(*generate(model, prompts, **settings)))
    for prompt, row in zip(prompts, together):
        assert continuation(model, prompt, **settings) == list(row)


def test_equal_seeds_draw_equal_texts_and_others_do_not(model):
    draw = [
        continuation(model, [3], max_new_tokens=20, temperature=1.0, top_p=1.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert draw[0] == draw[1] != draw[2]


def test_equal_prompts_get_samples_of_their_own_and_a_step_reads_a_token_a_row(model):
    reads = count_reads(model)
    steps = generate(model, [[3, 4, 5]] * 4 + [[6]] * 4, max_new_tokens=15, temperature=1.0, top_p=1.0)
    assert len(set(zip(*steps))) == 8
    assert reads == [8 * 3] + [8] * 14


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
    ids = continuation(model, [1], max_new_tokens=30, unused_ids=range(300, 320), top_p=1.0)
    assert len(ids) == 30 and max(ids) < 300


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_scores_that_are_not_numbers_end_the_text_with_an_error(model, temperature):
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="damaged weights, or too large for torch.float32"):
        continuation(model, [1], temperature=temperature)


def test_an_id_without_a_row_is_refused(model):
    with pytest.raises(ValueError, match="id 320 has no row in a model of 320"):
        continuation(model, [1, 320])


def test_a_tokenizer_that_is_larger_than_its_model_is_named(folder, tokenizer, capsys):
    document = json.loads(json.dumps(tokenizer.document))
    document["added_tokens"].append(
        dict(document["added_tokens"][0], id=400, content="<|more|>", special=True)
    )
    (folder / "tokenizer.json").write_text(json.dumps(document))
    model, larger = sample.load(folder)
    assert "401 tokens, its model 320: the last ones cannot be read" in capsys.readouterr().err
    assert sample.find_unused_ids(model, larger) == sample.find_unused_ids(model, tokenizer)


def test_ids_between_others_that_stand_for_no_token_are_never_drawn(folder, model, tokenizer):
    """Such as between the ordinary tokens and special ones with ids of their own."""
    document = json.loads(json.dumps(tokenizer.document))
    for token in document["added_tokens"]:
        document["model"]["vocab"][token["content"]] = token["id"] = token["id"] + 10
    (folder / "tokenizer.json").write_text(json.dumps(document))
    gap = set(range(320)) - Tokenizer.load(folder / "tokenizer.json").tokens.keys()
    assert min(gap) < 303 and len(gap) > 10
    with torch.no_grad():
        model.model.embed_tokens.weight[sorted(gap)] *= 3  # scores far from 0
    model.save(folder)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    out, _ = run("--model", folder, "-n", 8, "--temperature", 2, "--top-p", 1, "--max-new-tokens", 40)
    assert out.count("---") == 7


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e30])
def test_no_temperature_breaks_the_arithmetic(model, temperature):
    greedy = continuation(model, [1], temperature=0, max_new_tokens=5)
    drawn = continuation(model, [1], temperature=temperature, max_new_tokens=5)
    assert len(drawn) == 5
    assert (drawn == greedy) == (temperature < 1)


def test_text_longer_than_the_context_goes_on_from_its_last_half_in_the_same_cache(model, monkeypatch):
    settings = dict(max_new_tokens=70, temperature=0)
    expected = [[1, 2, 3] + list(range(60)), [4]]  # longer than the context, and shorter
    rows = [row[-32:] for row in expected]
    # the slow twin: read all of each row for every token
    for _ in range(70):
        for i, row in enumerate(rows):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
            expected[i].append(row[-1])
        if max(map(len, rows)) > 32:
            rows = [row[-16:] for row in rows]
    made, make_cache = [], sample.make_cache
    monkeypatch.setattr(sample, "make_cache", lambda *args: made.append(args[1:]) or make_cache(*args))
    drawn = zip(*generate(model, [[1, 2, 3] + list(range(60)), [4]], **settings))
    assert list(map(list, drawn)) == [expected[0][63:], expected[1][1:]]
    assert made == [(2, 32)]


def test_a_given_cache_is_continued_until_it_is_full(model):
    whole = continuation(model, [1, 2, 3, 4], max_new_tokens=20, temperature=0)
    cache = KVCache(model.config, 1, 24)
    model(torch.tensor([[1, 2]]), cache)
    assert continuation(model, [3, 4], max_new_tokens=20, temperature=0, cache=cache) == whole
    ragged = KVCache(model.config, 2, 24)
    model(torch.tensor([[1, 2, 3], [9, 0, 0]]), ragged)
    ragged.truncate([3, 1])
    rows = zip(*generate(model, [[4], [8, 7]], max_new_tokens=9, temperature=0, cache=ragged))
    alone = [continuation(model, p, max_new_tokens=9, temperature=0) for p in ([1, 2, 3, 4], [9, 8, 7])]
    assert list(map(list, rows)) == alone
    with pytest.raises(ValueError, match="2 rows does not go with 1 prompts"):
        next(generate(model, [[1]], cache=ragged))
    small = KVCache(model.config, 1, 10)
    assert continuation(model, [1, 2, 3, 4], max_new_tokens=20, temperature=0, cache=small) == whole[:7]


# Inductor's cache does not know for which vector units a kernel was compiled: with those of another
# processor (or of ATEN_CPU_CAPABILITY) the kernels would write beyond their memory.
@torch._inductor.config.patch(fx_graph_cache=False)
def test_a_compiled_step_draws_the_same():
    torch.manual_seed(0)
    model = Transformer(Config(64, block_size=16, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_hidden=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    settings = dict(max_new_tokens=30, temperature=1.0, top_p=1.0)  # it also slides past the context
    plain = list(generate(model, [[1, 2, 3], [4]], **settings))
    assert list(generate(model, [[1, 2, 3], [4]], compiled=True, **settings)) == plain


# --- packed weights ---


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"qkv_bias": True}, {"qk_norm": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [0, 2**18])
def test_packed_weights_compute_the_same(tiny_config, changes, dtype, small, monkeypatch):
    if dtype == torch.bfloat16 and fast_dtype("cpu") != torch.bfloat16:
        pytest.skip("this processor has no bfloat16 units")
    monkeypatch.setattr(sample, "packed_is_faster", lambda dtype: True)  # on any processor
    monkeypatch.setattr(sample, "SMALL", small)
    torch.manual_seed(0)
    config = Config(**vars(tiny_config) | changes)
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    model = model.to(dtype).eval().requires_grad_(False)
    ids = torch.randint(320, (3, 9))
    expected = model(ids)
    packed = sample.pack(model)
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    by_columns = packed.model.layers[0].mlp.up_proj.small is not None
    assert by_columns == (small > 0 and dtype == torch.float32)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # bfloat16 has three digits
    assert torch.allclose(packed(ids), expected, atol=tolerance)
    assert torch.allclose(packed(ids[:1, :1]), expected[:1, :1], atol=tolerance)
    assert len(continuation(packed, [1, 2], max_new_tokens=40)) == 40


def test_a_packed_model_is_not_saved(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "packed_is_faster", lambda dtype: True)  # on any processor
    packed = sample.pack(Transformer(tiny_config))
    with pytest.raises(ValueError, match="packed weights cannot be saved"):
        packed.save(tmp_path / "out")


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"qkv_bias": True}])
def test_weights_by_columns_compute_the_same(tiny_config, changes, monkeypatch):
    monkeypatch.setattr(sample, "packed_is_faster", lambda dtype: False)
    torch.manual_seed(0)
    model = Transformer(Config(**vars(tiny_config) | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    model.requires_grad_(False)
    ids = torch.randint(320, (3, 9))
    expected = model(ids)
    laid_out = sample.pack(model)
    matrices = [module for module in laid_out.modules() if isinstance(module, torch.nn.Linear)]
    assert len(matrices) == 2 * 7 + 1 and all(matrix.weight.T.is_contiguous() for matrix in matrices)
    assert torch.allclose(laid_out(ids), expected, atol=1e-5)
    assert torch.allclose(laid_out(ids[:1, :1]), expected[:1, :1], atol=1e-5)


def test_weights_are_packed_by_the_kind_of_processor(monkeypatch):
    float32, bfloat16 = torch.float32, torch.bfloat16
    for fast, has_amx, packed in (
        (float32, False, []),
        (bfloat16, False, [float32, bfloat16]),
        (bfloat16, True, [bfloat16]),
    ):
        monkeypatch.setattr(sample, "fast_dtype", lambda device, fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_amx=has_amx: {"amx_tile": has_amx})
        assert [dtype for dtype in (float32, bfloat16) if sample.packed_is_faster(dtype)] == packed


def test_weights_of_another_dtype_stay_as_they_are(model):
    modules = list(model.modules())
    assert list(sample.pack(model.double()).modules()) == modules


@pytest.mark.parametrize("asked", [None, torch.bfloat16])
def test_a_model_in_a_dtype_without_units_is_opened_in_float32(
    model, tokenizer, asked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("model.fast_dtype", lambda device: torch.float32)
    model.to(torch.bfloat16).save(tmp_path, tokenizer)
    opened, _ = sample.load(tmp_path, dtype=asked)
    assert opened.model.norm.weight.dtype == (asked or torch.float32)
    assert ("converted to float32" in capsys.readouterr().err) == (asked is None)


# --- bytes to text ---


def text_of(ids, tokenizer, stops=()):
    return [piece for (piece,) in stream_text(tokenizer, ([i] for i in ids), stops)]


def test_a_stream_never_shows_half_a_character(tokenizer):
    text = "日本語 😀 e\u0301 👩‍👩‍👧 ❤️"
    ids = tokenizer.encode(text)
    pieces = text_of(ids, tokenizer)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(ids) + 1
    assert sum(map(bool, pieces)) > 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=30))
def test_all_pieces_together_are_the_decoded_text(tokenizer, ids):
    ids = [i % tokenizer.vocab_size for i in ids]
    assert "".join(text_of(ids, tokenizer)) == tokenizer.decode(ids)


LETTERS = st.text("ab日", max_size=20)


@settings(max_examples=500, deadline=None)
@given(LETTERS, st.lists(st.text("ab日", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_never_shows_its_beginning(tokenizer, text, stops):
    stream, shown = TextStream(tokenizer, stops), ""
    for i in tokenizer.encode(text):  # bytes and pairs of them: every stop string crosses tokens
        shown += stream.add(i)
        assert not stream.held or any(stop.startswith(stream.held) for stop in stops)  # nothing else waits
    shown += stream.add(None)
    assert stream.ended
    # the slow twin: one character after the other, until a stop string stands at the end
    expected = ""
    for character in text:
        expected += character
        ended = [stop for stop in stops if expected.endswith(stop)]
        if ended:
            expected = expected[: -max(map(len, ended))]
            break
    assert shown == expected


def test_a_stop_string_ends_one_row_and_the_last_one_ends_the_loop(tokenizer):
    asked = []

    def steps():
        for i in tokenizer.encode("the cat sat"):
            asked.append(i)
            yield [i, tokenizer.encode("x")[0]]

    pieces = list(stream_text(tokenizer, steps(), ["at", "xx"]))
    assert ["".join(row) for row in zip(*pieces)] == ["the c", ""]
    assert len(asked) < len(tokenizer.encode("the cat sat"))


def test_a_text_begins_with_what_its_tokenizer_wants_there(tokenizer):
    assert sample.to_prompt(tokenizer, "") == [tokenizer.special_tokens["<|endoftext|>"]]
    assert sample.to_prompt(tokenizer, "the cat") == tokenizer.encode("the cat")
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}]}
    template["special_tokens"] = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [299], "tokens": ["..."]}}
    processor = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}  # as in Llama 3
    llama = Tokenizer(tokenizer.document | {"post_processor": processor})
    expected = [299, *tokenizer.encode("the cat")]
    assert sample.to_prompt(llama, "the cat") == expected


def test_the_ends_of_a_text_are_those_of_the_folder(folder, tokenizer, model):
    ends = [tokenizer.special_tokens[name] for name in ("<|endoftext|>", "<|im_end|>")]
    assert sample.end_ids(folder, tokenizer) == {ends[0]}
    model.save(folder, tokenizer, end_ids=ends)
    assert sample.end_ids(folder, tokenizer) == set(ends)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert sample.end_ids(folder, tokenizer) == {7}
    for wrong in (999, "2", [0, None], [[0]], {}):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match="generation_config.json is damaged"):
            sample.end_ids(folder, tokenizer)
    (folder / "generation_config.json").unlink()
    assert sample.end_ids(folder, tokenizer) == set(ends)
    (folder / "config.json").write_text("{}")
    assert sample.end_ids(folder, tokenizer) == set(tokenizer.special_tokens.values())


# --- chat ---


def test_a_model_that_was_taught_tasks_says_which(folder, model, tokenizer, monkeypatch, capsys):
    for results in ({}, {"questions": {}}, {"questions": {"args": "List the arguments of: def f(a):"}}):
        (folder / "results.json").write_text(json.dumps(results))
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        sample.converse(model, tokenizer, folder, [], set(), 0)
        greeting = capsys.readouterr().err
        assert ("questions like these" in greeting) == bool(results.get("questions"))
    assert "\n  List the arguments of: def f(a):\n" in greeting


MESSAGES = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "the dog"},
]


@pytest.fixture
def long_model(model):
    """The tiny model, with a context in which a conversation has room."""
    model.config.block_size = 200
    return model


def test_a_conversation_reads_only_what_is_new(long_model, tokenizer):
    reads, hidden = [], long_model.hidden
    long_model.hidden = lambda ids, cache=None: reads.append(ids.numel()) or hidden(ids, cache)
    chat, settings = Chat(long_model, tokenizer), dict(max_new_tokens=10)
    settings["unused_ids"] = sample.find_unused_ids(long_model, tokenizer)
    for text in ("the cat sat", "on the mat", "and"):
        question = len(render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)[0])
        before = len(chat.read)
        del reads[:]
        answer = "".join(chat.answer(text, **settings))
        assert answer
        unread = 0 if not before else len(chat.turns[-3]) - 9  # the answer's last token, its end, a line end
        assert reads == [unread + question] + [1] * 9
    # the slow twin: all turns at once
    ids = sum(chat.turns[:-1], [])
    whole = "".join(text_of((i for (i,) in generate(long_model, [ids], **settings)), tokenizer))
    assert answer == whole


def test_the_oldest_turns_are_forgotten_aloud(long_model, tokenizer, capsys):
    chat = Chat(long_model, tokenizer)
    for _ in range(6):
        assert (
            len(list(chat.answer("the cat sat on the mat", max_new_tokens=30, unused_ids=range(256, 320))))
            > 5
        )
    assert "forgotten" in capsys.readouterr().err
    assert len(chat.turns) % 2 == 0 and 2 <= len(chat.turns) < 12
    assert list(chat.answer("日本語" * 200, max_new_tokens=30, unused_ids=range(256, 320)))
    messages = capsys.readouterr().err
    assert "only its last 150 tokens" in messages and "is full" not in messages
    assert len(list(chat.answer("日本語" * 200, max_new_tokens=100, unused_ids=range(256, 320)))) == 51 + 1
    assert "the context is full" in capsys.readouterr().err


def test_an_answer_cut_short_in_the_middle_of_a_step_leaves_no_trace_in_the_cache(long_model, tokenizer):
    def interrupt(*_):
        raise KeyboardInterrupt

    chat, settings = (
        Chat(long_model, tokenizer),
        dict(max_new_tokens=20, temperature=0, unused_ids=range(256, 320)),
    )
    pieces = chat.answer("the cat", **settings)
    for _ in range(4):
        next(pieces)
    hook = long_model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    hook.remove()
    answer = "".join(chat.answer("sat", **settings))
    ids = sum(chat.turns[:-1], [])
    assert answer == "".join(text_of((i for (i,) in generate(long_model, [ids], **settings)), tokenizer))


def test_an_answer_that_is_cut_short_stays_in_the_conversation(long_model, tokenizer):
    chat = Chat(long_model, tokenizer)
    pieces = chat.answer("the cat", max_new_tokens=30, unused_ids=range(256, 320))
    for _ in range(4):
        next(pieces)
    pieces.close()  # as Ctrl-C does
    end = [tokenizer.special_tokens["<|im_end|>"], *tokenizer.encode("\n")]
    assert len(chat.turns) == 2 and chat.turns[-1][-2:] == end
    assert list(chat.answer("sat", max_new_tokens=5, unused_ids=range(256, 320)))


def test_chat_answers_line_by_line_and_a_base_model_says_what_it_is(folder, tokenizer, model):
    lines = "hello\n\n/reset\n你好\n/quit\nno\n"
    shown, messages = run("--model", folder, "--chat", "--max-new-tokens", 4, input=lines)
    assert "not taught to chat" in messages
    assert shown.count("\n") >= 2
    model.save(folder, tokenizer, end_ids=[tokenizer.special_tokens["<|im_end|>"]])
    assert "not taught" not in run("--model", folder, "--chat")[1]


def test_chat_ends_an_answer_where_the_turn_ends_also_if_the_folder_does_not_name_that_end(
    tiny_config, tokenizer, monkeypatch, capsys, tmp_path
):
    model = Transformer(Config(**vars(tiny_config) | dict(tie_embeddings=False, block_size=200)))
    end = tokenizer.special_tokens["<|im_end|>"]
    ids, _ = render(tokenizer, [{"role": "user", "content": "hello"}], add_generation_prompt=True)
    with torch.no_grad():
        model.lm_head.weight[end] = 100 * model.hidden(torch.tensor([ids]))[0, -1]
    assert continuation(model, ids, max_new_tokens=1, temperature=0) == [end]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    sample.converse(model, tokenizer, tmp_path, [], set(), 0, temperature=0)
    assert capsys.readouterr().out == "\n"


# --- a file of prompts ---


def answers_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path):
    records = [{"prompt": "the cat " * n, "id": n} for n in range(5)]
    records += [{"messages": MESSAGES, "source": "x"}, {"prompt": "日本語"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_file_of_prompts_is_answered_in_its_order(folder, prompts, tmp_path, model, tokenizer):
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p *= 3  # large weights let even the greedy text of an untrained model depend on its prompt
    model.save(folder, tokenizer)
    output = tmp_path / "answers.jsonl"
    files = ("--model", folder, "--prompts", prompts, "--output", output)
    shown, messages = run(*files, "--batch-size", 3, *GREEDY)
    assert shown == "" and "0:00:00 left" in messages
    assert "1 prompts are cut to their last 32 tokens" in messages
    answers = answers_in(output)
    assert len({answer["completion"] for answer in answers}) == 7
    for i, (record, answer) in enumerate(zip(answers_in(prompts), answers, strict=True)):
        assert answer == record | {"line": i + 1, "completion": answer["completion"]}
        if "prompt" in record:
            ids = sample.to_prompt(tokenizer, record["prompt"])
        else:
            ids = render(tokenizer, record["messages"], add_generation_prompt=True)[0]
        ends = sample.end_ids(folder, tokenizer)
        settings = dict(max_new_tokens=8, temperature=0)
        settings.update(stop_ids=ends, unused_ids=sample.find_unused_ids(model, tokenizer))
        alone = continuation(model, ids, **settings)
        assert answer["completion"] == "".join(text_of(alone, tokenizer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "model", "prompts.jsonl"]
    assert "0 prompts to answer, 7 were answered before" in run(*files, *GREEDY)[1]
    assert answers_in(output) == answers


def test_what_was_answered_before_a_kill_is_kept(folder, prompts, tmp_path):
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part0"
    records = answers_in(prompts)
    kept = records[1] | {"line": 2, "completion": "kept"}
    part.write_text(json.dumps(kept) + '\n{"line": 3, "prompt": "日', encoding="utf-8")
    part.write_bytes(part.read_bytes()[:-1])  # a kill in the middle of a character
    _, messages = run("--model", folder, "--prompts", prompts, "--output", output, *GREEDY)
    assert "6 prompts to answer, 1 were answered before" in messages
    assert [answer["line"] for answer in answers_in(output)] == list(range(1, 8))
    assert answers_in(output)[1] == kept
    assert not part.exists()


def test_two_processes_share_the_prompts(folder, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    arguments = ["--model", folder, "--prompts", prompts, "--output", output, "--batch-size", 2, *GREEDY]
    processes = [start(*arguments, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process, share in zip(processes, (4, 3)):
        assert f"{share} prompts to answer" in process.communicate()[1]
        assert process.returncode == 0
    assert [answer["line"] for answer in answers_in(output)] == list(range(1, 8))
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob("*.unfinished*"))


def test_equal_prompts_in_different_batches_get_answers_of_their_own(folder, tmp_path):
    (tmp_path / "p.txt").write_text("the\n" * 6)
    output = tmp_path / "a.jsonl"
    files = ("--model", folder, "--prompts", tmp_path / "p.txt", "--output", output)
    run(*files, "--batch-size", 2, "--max-new-tokens", 8)
    assert len({answer["completion"] for answer in answers_in(output)}) == 6


def test_prompts_that_end_at_once_are_answered_too(folder, prompts, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(302))}))
    output = tmp_path / "a.jsonl"
    run("--model", folder, "--prompts", prompts, "--output", output)
    assert [answer["completion"] for answer in answers_in(output)] == [""] * 7


def test_only_parts_of_the_same_output_are_read_and_removed(folder, prompts, tmp_path):
    for name in ("a[4].jsonl", "a*.jsonl"):
        notes = tmp_path / f"{name}.part_of_my_notes"
        notes.write_text("mine")
        run("--model", folder, "--prompts", prompts, "--output", tmp_path / name, *GREEDY)
        assert len(answers_in(tmp_path / name)) == 7
        assert notes.read_text() == "mine" and not (tmp_path / f"{name}.part0").exists()


def test_a_file_that_holds_something_else_is_not_overwritten(folder, prompts):
    before = prompts.read_text()
    with pytest.raises(ValueError, match="does not hold answers"):
        run("--model", folder, "--prompts", prompts, "--output", prompts)
    assert prompts.read_text() == before


def test_lines_of_a_text_file_are_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\nthree\u2028\n".encode())
    expected = {1: {"prompt": "one"}, 2: {"prompt": ""}, 3: {"prompt": "three\u2028"}}
    assert sample.read_prompts(tmp_path / "a.txt") == expected
    (tmp_path / "a.jsonl").write_text('\ufeff{"prompt": "one"}\n\n{"prompt": "three"}', encoding="utf-8")
    assert sample.read_prompts(tmp_path / "a.jsonl") == {1: {"prompt": "one"}, 3: {"prompt": "three"}}


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", "{}", '{"prompt": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}']
    + [
        '{"prompt": "x", "system": "y"}',
        '{"messages": ["x"]}',
        '{"messages": [{"role": "tool", "content": ""}]}',
    ]
    + [
        '{"prompt": "x", "score": NaN}',
        '{"prompt": "half a pair \\ud83d"}',
        '{"prompt": "x", "completion": "mine"}',
    ],
)
def test_a_bad_line_is_named_before_anything_is_answered(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 2: "):
        sample.read_prompts(tmp_path / "bad.jsonl")


def test_answers_to_other_prompts_are_not_mixed_in(folder, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text('{"line": 1, "prompt": "another", "completion": "x"}\n')
    with pytest.raises(ValueError, match="answers other prompts"):
        run("--model", folder, "--prompts", prompts, "--output", output)
    assert "another" in output.read_text()


# --- command line ---


@pytest.mark.parametrize("prompt", ["", "the cat", "你好"])
def test_only_the_text_goes_to_stdout(folder, prompt):
    shown, messages = run("--model", folder, "--prompt", prompt, "--max-new-tokens", 5)
    assert shown.startswith(prompt)
    assert "a second" in messages and "a second" not in shown


def test_a_prompt_may_come_through_a_pipe(folder):
    shown, _ = run("--model", folder, "--prompt", "the dog", *GREEDY)
    assert run("--model", folder, "--prompt", "-", *GREEDY, input="the dog\n")[0] == shown


def test_without_a_prompt_an_empty_line_is_continued(folder):
    shown, _ = run("--model", folder, *GREEDY)
    assert shown == run("--model", folder, *GREEDY, "--prompt", "\n")[0]


def test_a_pipe_into_which_nothing_comes_is_not_waited_for(folder):
    result = run_script("sample.py", "--model", folder, *GREEDY, input=None)
    assert result.returncode == 0 and result.stdout, result.stderr


def test_several_samples_are_set_apart_and_stop_strings_not_shown(folder):
    shown, _ = run("--model", folder, "--prompt", "the", "-n", 3, "--max-new-tokens", 5, "--stop", "\n---\n")
    assert shown.count("\n---\n") == 2
    assert len({text.strip() for text in shown.split("\n---\n")}) == 3


def test_a_prompt_longer_than_the_context_says_so(folder):
    _, messages = run("--model", folder, "--prompt", "x" * 100, "--max-new-tokens", 3)
    assert "cut to its last 32" in messages


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    process = start("--model", folder, "--prompt", "x", "--max-new-tokens", 1_000_000, *ENDLESS)
    process.stdout.read(1)
    process.stdout.close()
    assert "rror" not in process.stderr.read()
    assert process.wait() == 0


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_the_text_without_a_traceback(folder):
    process = start("--model", folder, "--prompt", "x", "--max-new-tokens", 1_000_000, *ENDLESS)
    process.stdout.read(20)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "a second" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "there is no folder no/such/folder"),
        (["--model", ROOT / "tests"], "config.json"),
        (["--temperature", "-1"], "temperature -1.0 must be positive"),
        (["--top-p", "0"], "top-p 0.0 is outside (0, 1]"),
        (["--seed", "-1"], "--seed: -1 must be at least 0"),
        (["--stop", ""], "an empty --stop"),
        (["--prompts", "x.txt"], "go together"),
        (["--prompts", "no.jsonl", "--output", "x"], "no.jsonl"),
        (["--prompts", "no.jsonl", "--output", ROOT / "tests"], "tests is not a file"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--compile", "--device", "cpu"], "--compile makes decoding faster on CUDA only"),
        (["-n", "0"], "-n: 0 must be positive"),
        (["--batch-size", "x"], "--batch-size"),
        (["-n", "2", "--chat"], "-n is for one prompt"),
        (["--prompt", "x", "--chat"], "not allowed with argument"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(folder, arguments, message, monkeypatch, capsys):
    if "--model" not in arguments:
        arguments = ["--model", folder, *arguments]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as end:  # as a script, but without importing torch again
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_full_memory_ends_in_one_line_and_status_2(folder, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("model.KVCache.__init__", fail)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(folder)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: DefaultCPUAllocator: can't allocate")


def test_a_chat_does_not_allocate_all_of_a_long_context(long_model, tokenizer):
    long_model.config.block_size = 10**9
    assert Chat(long_model, tokenizer).cache.max_len == 8192


def test_without_a_model_the_command_that_makes_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "OUT", tmp_path)
    with pytest.raises(ValueError, match="run `python train.py`"):
        sample.newest_model()


def test_the_newest_model_is_the_one_saved_last(tmp_path, monkeypatch, model):
    monkeypatch.setattr(sample, "OUT", tmp_path)
    for name in ("b", "a"):
        model.save(tmp_path / name)
    assert sample.newest_model() == tmp_path / "a"


def test_a_model_is_loaded_in_the_dtype_of_its_file_or_in_that_asked_for(folder):
    assert sample.load(folder)[0].model.norm.weight.dtype == torch.float32
    assert sample.load(folder, dtype=torch.bfloat16)[0].model.norm.weight.dtype == torch.bfloat16
