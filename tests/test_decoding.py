"""What decoding.py promises: filters as defined, the model's own distribution, rows that don't disturb each
other, fast paths that compute what the plain ones do.
"""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import decoding
from decoding import Sampling, generate, speculate
from model import Config, KVCache, Transformer

LOGITS = st.lists(st.integers(-50, 50), min_size=2, max_size=20, unique=True)


def continuation(model, prompt, generate=generate, **settings):
    return [new for (new,) in generate(model, [prompt], **settings)]


def count_reads(model):
    """A list to which the number of tokens is added that model.hidden is given, row by row."""
    reads, hidden = [], model.hidden
    model.hidden = lambda ids, cache=None: reads.append(ids.numel()) or hidden(ids, cache)
    return reads


# --- filters ---


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


def min_p_by_definition(logits, min_p):
    probabilities = np.exp(logits) / np.exp(logits).sum()
    return {i for i, p in enumerate(probabilities) if p >= min_p * probabilities.max()}


@pytest.mark.parametrize(
    ("filtered", "definition", "theirs"),
    [
        (decoding.keep_top_k, top_k_by_definition, transformers.TopKLogitsWarper),
        (decoding.keep_top_p, top_p_by_definition, transformers.TopPLogitsWarper),
        (partial(decoding.keep_top_p, k=2), top_p_by_definition, transformers.TopPLogitsWarper),
        (decoding.keep_min_p, min_p_by_definition, transformers.MinPLogitsWarper),
    ],
    ids=["top-k", "top-p", "top-p, at first of two", "min-p"],
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


@settings(max_examples=50, deadline=None)
@given(values=LOGITS, penalty=st.floats(0.5, 2))
def test_the_repetition_penalty_is_that_of_transformers(values, penalty):
    logits = torch.tensor(values, dtype=torch.float32)[None] / 10
    ids = torch.tensor([[0, 1, 0]])
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.allclose(decoding.penalize(logits, seen, penalty), theirs)


def test_top_k_keeps_k_of_equally_likely_tokens():
    assert decoding.keep_top_k(torch.zeros(2, 10), 3).isfinite().sum(-1).tolist() == [3, 3]


def test_top_p_is_the_same_where_the_likeliest_thousand_do_not_suffice():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1], [9]]
    )
    for top_p in (0.3, 0.9, 0.999):
        assert torch.equal(decoding.keep_top_p(logits, top_p), decoding.keep_top_p(logits, top_p, k=5000))


def chi_square(counts, probabilities):
    """Sum of (observed - expected)^2 / expected, over cells that expect at least 5, and their number."""
    expected = probabilities * counts.sum()
    cells = expected >= 5
    return float((((counts - expected) ** 2) / expected)[cells].sum()), int(cells.sum())


def test_tokens_are_drawn_with_their_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01, 0])
    drawn = decoding.draw(p.expand(20_000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[5] == 0
    assert chi_square(counts, p)[0] < 18.5  # exceeded in 0.1 % of all seeds, with 4 degrees of freedom


def test_filters_apply_to_the_scores_after_the_temperature_in_the_order_of_transformers():
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=0.7, top_k=30, top_p=0.8, min_p=0.1)
    warpers = [transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(30)]
    warpers += [transformers.TopPLogitsWarper(0.8), transformers.MinPLogitsWarper(0.1)]
    theirs = transformers.LogitsProcessorList(warpers)(None, logits.clone()).softmax(-1)
    assert torch.allclose(decoding.probabilities_of(logits, sampling), theirs, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": 1e-46}, {"top_p": 0}, {"top_p": 1.1}]
    + [{"top_p": 1e-300}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0}],
)
def test_values_without_a_meaning_are_refused_by_name(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        next(generate(model, [[1]], **wrong))


# --- the loop ---


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_ids_equal_those_of_transformers(tmp_path, model, penalty):
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = [5, 17, 200]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=28, do_sample=False, repetition_penalty=penalty
    )
    ids = continuation(model, prompt, max_new_tokens=28, temperature=0, repetition_penalty=penalty)
    assert ids == expected[0, 3:].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_rows_of_a_ragged_batch_equal_each_alone(model, penalty):
    settings = dict(max_new_tokens=20, temperature=0, repetition_penalty=penalty)
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


def test_the_samples_of_a_prompt_are_independent_and_read_it_once(model):
    reads = count_reads(model)
    steps = generate(model, [[3, 4, 5], [6]], max_new_tokens=15, temperature=1.0, top_p=1.0, n_samples=4)
    rows = list(zip(*steps))
    assert len(set(rows)) == 8
    assert reads == [2 * 3] + [8] * 14  # two prompts, padded to three tokens, once; then a token a row
    greedy = list(zip(*generate(model, [[3, 4, 5], [6]], max_new_tokens=15, temperature=0, n_samples=2)))
    alone = [tuple(continuation(model, p, max_new_tokens=15, temperature=0)) for p in ([3, 4, 5], [6])]
    assert greedy == [alone[0], alone[0], alone[1], alone[1]]


def test_a_row_that_has_ended_yields_none_while_others_go_on(model):
    free = list(zip(*generate(model, [[1], [2]], max_new_tokens=12, temperature=0)))
    stop = next(new for new in free[0] if new != free[0][0] and new not in free[1])
    rows = list(zip(*generate(model, [[1], [2]], max_new_tokens=12, temperature=0, stop_ids=[stop])))
    first = free[0].index(stop)
    assert rows[0][:first] == free[0][:first]
    assert set(rows[0][first:]) == {None}
    assert stop not in rows[1]


@pytest.mark.parametrize("loop", ["generate", "speculate"])
def test_ids_beyond_the_vocabulary_are_never_drawn(model, loop):
    with torch.no_grad():
        model.model.embed_tokens.weight[300:] *= 1000
    run = generate if loop == "generate" else partial(speculate, draft=model)
    ids = [new for (new,) in run(model, prompts=[[1]], max_new_tokens=30, vocab_size=300, top_p=1.0)]
    assert len(ids) == 30 and max(ids) < 300


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e30])
def test_no_temperature_breaks_the_arithmetic(model, temperature):
    greedy = continuation(model, [1], temperature=0, max_new_tokens=5)
    drawn = continuation(model, [1], temperature=temperature, max_new_tokens=5)
    assert len(drawn) == 5
    assert (drawn == greedy) == (temperature < 1)


def test_text_longer_than_the_context_goes_on(model):
    assert model.config.block_size == 32
    assert len(continuation(model, [1] * 50, max_new_tokens=100)) == 100
    assert len(continuation(model, [1, 2], max_new_tokens=100)) == 100
    assert len(list(generate(model, [[1], [1] * 40], max_new_tokens=70, n_samples=2))) == 70


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


# --- fast paths ---


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"qkv_bias": True}, {"qk_norm": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [0, 2**18])
def test_packed_weights_compute_the_same(tiny_config, changes, dtype, small, monkeypatch):
    monkeypatch.setattr(decoding, "SMALL", small)
    torch.manual_seed(0)
    config = Config(**vars(tiny_config) | changes)
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    model = model.to(dtype).eval().requires_grad_(False)
    ids = torch.randint(320, (3, 9))
    expected = model(ids)
    packed = decoding.pack(model)
    by_columns = packed.model.layers[0].mlp.up_proj.columns is not None
    assert by_columns == (small > 0 and dtype == torch.float32)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # bfloat16 has three digits
    assert torch.allclose(packed(ids), expected, atol=tolerance)
    assert torch.allclose(packed(ids[:1, :1]), expected[:1, :1], atol=tolerance)
    assert len(continuation(packed, [1, 2], max_new_tokens=40)) == 40


def test_a_dtype_that_cannot_be_packed_stays_as_it_is(model):
    assert decoding.pack(model.double()).lm_head is None


def test_a_compiled_step_draws_the_same(model):
    plain = list(generate(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0))
    assert list(generate(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0, mode="compile")) == plain


def test_without_a_gpu_a_graph_is_the_plain_step(model):
    plain = list(generate(model, [[1, 2, 3]], max_new_tokens=50, seed=1, mode="eager"))
    if not torch.cuda.is_available():
        assert list(generate(model, [[1, 2, 3]], max_new_tokens=50, seed=1, mode="graph")) == plain
    with pytest.raises(ValueError, match="none of eager, graph and compile"):
        next(generate(model, [[1]], mode="fast"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recorded_step_draws_the_same(model):
    model = model.cuda()
    settings = dict(max_new_tokens=50, seed=1)
    plain = list(generate(model, [[1, 2, 3], [4]], mode="eager", **settings))
    assert list(generate(model, [[1, 2, 3], [4]], mode="graph", **settings)) == plain


# --- speculation ---


@pytest.fixture
def draft(tiny_config):
    torch.manual_seed(1)
    draft = Transformer(Config(**vars(tiny_config) | dict(n_layer=1)))
    for p in draft.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    return draft.eval()


@pytest.mark.parametrize("n_draft", [1, 4])
def test_greedy_speculation_writes_what_the_model_alone_writes(model, draft, n_draft):
    settings = dict(max_new_tokens=25, temperature=0)
    alone = continuation(model, [5, 6, 7], **settings)
    reads = count_reads(model)
    for guesser, accepted in ((draft, False), (model, True)):
        del reads[:]
        guesses = partial(speculate, draft=guesser, n_draft=n_draft)
        assert continuation(model, [5, 6, 7], guesses, **settings) == alone
        if accepted:  # the model as its own draft: every guess stands (and is read by both)
            steps = -(-25 // (n_draft + 1))
            assert len(reads) == steps * (n_draft + 1)


def test_speculation_ends_at_stop_ids_and_outlives_the_context(model, draft):
    run = partial(speculate, draft=draft)
    free = continuation(model, [5, 6, 7], run, max_new_tokens=100, temperature=0)
    assert len(free) == 100
    stop = free[9]
    assert continuation(model, [5, 6, 7], run, temperature=0, stop_ids=[stop]) == free[: free.index(stop)]


def test_greedy_speculation_slides_past_the_context_as_plain_decoding_does(model, draft):
    settings = dict(max_new_tokens=90, temperature=0)
    assert continuation(model, [5, 6, 7], partial(speculate, draft=draft), **settings) == continuation(
        model, [5, 6, 7], **settings
    )


def test_accepted_and_corrected_guesses_follow_the_models_distribution():
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])
    q = torch.tensor([[0.1, 0.3, 0.4, 0.2]])
    counts = torch.zeros(4, 4)
    first = torch.zeros(4)
    for _ in range(6000):
        new = decoding.accept(p, q, decoding.draw(q, generator).tolist(), generator)
        first[new[0]] += 1
        if len(new) == 2:
            counts[new[0], new[1]] += 1
    assert first[3] == 0
    assert chi_square(first, p[0])[0] < 13.8  # 0.1 % of all seeds, with 2 degrees of freedom
    assert chi_square(counts.sum(0), p[1])[0] < 16.3  # the bonus token; 3 degrees of freedom


def test_speculative_sampling_has_the_distribution_of_plain_sampling():
    torch.manual_seed(0)
    shape = dict(vocab_size=5, block_size=16, n_layer=1, n_head=1, n_kv_head=1, n_embd=8, n_hidden=8)
    model, draft = (Transformer(Config(**shape)).eval().requires_grad_(False) for _ in range(2))
    for p in (*model.parameters(), *draft.parameters()):
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    settings = dict(max_new_tokens=3, temperature=1.0, top_p=1.0)
    counts, probabilities = torch.zeros(5, 5, 5), torch.ones(5, 5, 5)
    for seed in range(1500):
        a, b, c = continuation(
            model, [2, 1], partial(speculate, draft=draft, n_draft=2), seed=seed, **settings
        )
        counts[a, b, c] += 1
    for a in range(5):
        for b in range(5):
            p = model(torch.tensor([[2, 1, a, b]]))[0, 1:].softmax(-1)
            probabilities[a, b] = p[0, a] * p[1, b] * p[2]
    value, cells = chi_square(counts.flatten(), probabilities.flatten())
    assert cells > 20
    assert value < cells + 3.5 * (2 * cells) ** 0.5  # mean and standard deviation of chi-square


def test_a_draft_does_not_go_with_a_repetition_penalty(model, draft):
    with pytest.raises(ValueError, match="draft"):
        next(speculate(model, [[1]], draft, repetition_penalty=1.2))
