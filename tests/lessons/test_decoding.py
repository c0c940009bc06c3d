"""Decoding: from scores to text."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from transformers import RepetitionPenaltyLogitsProcessor

from model import Transformer
from sample import (
    Sampling,
    draw,
    generate,
    keep_top_k,
    keep_top_p,
    make_cache,
    probabilities_of,
)

from .book import SPEECH, drawn_model, largest, table, to_ids, to_text


def accept(p, q, proposed, generator):
    """Which of the proposed ids stand, and the one that follows them, as a list.

    proposed[i] was drawn from q[i] (V,), where the large model would have drawn from p[i]; p (n + 1, V).
    """
    for i, new in enumerate(proposed):
        if torch.rand((), generator=generator) * q[i][new] >= p[i][new]:
            rest = (p[i] - q[i]).clamp(min=0)
            return [*proposed[:i], *draw(rest[None], generator).tolist()]
    return [*proposed, *draw(p[-1:], generator).tolist()]


@torch.inference_mode()
def speculate(model, draft, ids, n_new, n_draft, sampling, generator):
    """Continue a list of ids by n_new -> (all ids, how often the large model ran)."""
    end, n_runs = len(ids) + n_new, 0
    caches = {reader: make_cache(reader, 1, end + n_draft) for reader in (model, draft)}

    def read(reader, ids, n):
        """Read the ids that the reader's cache lacks -> the distributions (n, V) behind the last n ids."""
        x = reader.hidden(torch.tensor([ids[caches[reader].span :]]), caches[reader])
        return probabilities_of(reader.head(x[0, -n:]), sampling)

    while len(ids) < end:
        proposed, q = [], []
        for _ in range(n_draft):
            q.append(read(draft, ids + proposed, 1)[0])
            proposed += draw(q[-1][None], generator).tolist()
        p = read(model, ids + proposed, n_draft + 1)  # all guesses in one run
        n_runs += 1
        ids = ids + accept(p, q, proposed, generator)
        for cache in caches.values():  # forget the rejected guesses
            cache.truncate([min(cache.span, len(ids) - 1)])
    return ids[:end], n_runs


def test_greedy_is_the_limit_of_temperature_and_of_top_k():
    """How are greedy decoding, temperature and top-k related?

    p is proportional to exp(z / temperature), with the scores z. A temperature near 0 and k = 1 both give the
    likeliest token, 1 the model's own distribution, a high one an even one. The entropy grows with it; the
    order of the tokens stays.

    Code: sample.py probabilities_of
    Source: Holtzman et al. (2020, arXiv 1904.09751), sec. 3
    """
    scores, rows = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), []
    for temperature in (1e-30, 0.05, 0.5, 1.0, 2.0, 1e4):
        p = probabilities_of(scores, Sampling(temperature=temperature, top_p=1.0))[0]
        rows.append((temperature, p, -torch.special.xlogy(p, p).sum()))
    table("temperature | probabilities | entropy", *rows)
    entropies = [row[2].item() for row in rows]
    assert entropies == sorted(entropies) and entropies[0] == 0
    assert abs(entropies[-1] - math.log(4)) < 1e-4
    assert torch.allclose(rows[1][1], rows[0][1], atol=1e-6)
    assert torch.equal(keep_top_k(scores, 1).softmax(-1)[0], rows[0][1])
    assert all((p.diff() <= 0).all() for _, p, _ in rows)


def test_top_k_keeps_a_fixed_number_and_top_p_adapts():
    """Top-k or top-p?

    Top-k keeps k tokens, whatever the distribution. Top-p keeps the smallest set that together reaches p: one
    token where the model is sure, many where it is not; the one that crosses p is in, so that one always is.

    Code: sample.py keep_top_p
    Source: Fan et al. (2018, arXiv 1805.04833) on top-k; Holtzman et al. (2020) on top-p
    """
    sure, unsure = torch.arange(50.0) * -3, torch.arange(50.0) * -0.01
    rows = []
    for name, scores in (("sure", sure[None]), ("unsure", unsure[None])):
        n_kept = [int(kept.isfinite().sum()) for kept in (keep_top_k(scores, 10), keep_top_p(scores, 0.9))]
        rows.append((name, *n_kept))
    table("the model is | tokens kept by top-k 10 | by top-p 0.9", *rows)
    assert [row[1:] for row in rows] == [(10, 1), (10, 44)]
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = [int(keep_top_p(scores, p).isfinite().sum()) for p in (0.1, 0.45, 0.6, 0.81, 1.0)]
    assert kept == [1, 1, 2, 3, 3]


def test_beam_search_finds_what_greedy_decoding_misses():
    """What does beam search do?

    It keeps the b texts of highest probability so far. Greedy decoding, which is b = 1, can take a good token
    that leads nowhere good; with V tokens and texts of T, b = V^(T-1) keeps every beginning, and so tries
    everything.

    Often told: it picks several candidates per step. What it looks for is the text of highest probability.
    Code: sample.py next_tokens
    Source: Graves (2012, arXiv 1211.3711); Sutskever et al. (2014, arXiv 1409.3215), sec. 3.2
    """
    first = torch.tensor([0.5, 0.4, 0.1])
    second = torch.tensor([[0.4, 0.35, 0.25], [0.9, 0.05, 0.05], [0.34, 0.33, 0.33]])  # by the first token

    def search(b):
        beams = [((), 0.0)]  # tokens, log p
        for _ in range(2):
            longer = []
            for tokens, log_p in beams:
                step = second[tokens[-1]] if tokens else first
                longer += [((*tokens, new), log_p + math.log(step[new])) for new in range(3)]
            beams = sorted(longer, key=lambda beam: -beam[1])[:b]
        return beams[0]

    rows = [(b, search(b)[0], math.exp(search(b)[1])) for b in (1, 2, 3)]
    table("beams | text | probability", *rows)
    assert rows[0][1] == (0, 0) and rows[1][1] == rows[2][1] == (1, 0)
    assert abs(rows[2][2] - (first[:, None] * second).max().item()) < 1e-6


def test_contrastive_search_avoids_tokens_too_similar_to_the_context():
    """What is contrastive search?

    Of the k likeliest tokens it takes the one of largest (1 - a) p(v) - a max_j cos(h_v, h_j): what the model
    is sure of, less its similarity to the hidden states of the context. Nothing is drawn, and loops become
    rarer.

    Often told: it penalises tokens that are similar to earlier ones. The similarity is of hidden states, and
    the model's own opinion counts, too.
    Code: model.py Transformer.hidden
    Source: Su et al. (2022, arXiv 2202.06417)
    """
    V = 6
    hidden = F.normalize(torch.eye(V) + 0.1, dim=-1)
    p = torch.full((V, V), 0.025)  # of the next token, given the last
    for token in range(V):
        partner = token + 1 if token % 2 == 0 else token - 1  # of 0 and 1, 2 and 3, 4 and 5
        p[token, partner], p[token, (token + 2) % V] = 0.6, 0.3  # back and forth in a pair, or on

    def write(a, k=3):
        tokens = [0]
        for _ in range(8):
            likely, candidates = p[tokens[-1]].topk(k)
            similarity = (hidden[candidates] @ hidden[tokens].T).amax(-1)
            tokens.append(candidates[((1 - a) * likely - a * similarity).argmax()].item())
        return tokens

    rows = [(a, write(a), len(set(write(a)[:6]))) for a in (0.0, 0.6)]
    table("a | tokens | different ones among the first 6", *rows)
    assert rows[0][1] == [0, 1, 0, 1, 0, 1, 0, 1, 0] and rows[1][2] == 6


def test_greedy_decoding_ends_in_a_loop(reader_of_the_speech):
    """Why do language models repeat themselves?

    Greedy decoding is a function from context to token. With a context of at most T tokens it has a finite
    number of states and must come back to one of them; in practice it soon does. The same weights stop
    looping when tokens are drawn.

    Often told: only duplicates in the data cause it. They add to it, but a model without them loops, too.
    Code: sample.py generate
    Source: Holtzman et al. (2020), fig. 4; Xu et al. (2022, arXiv 2206.02369)
    """
    prompt, rows = to_ids("Four score").tolist(), []
    for temperature in (0.0, 1.0):
        settings = dict(max_new_tokens=2000, temperature=temperature, top_p=1.0)
        text = to_text([ids[0] for ids in generate(reader_of_the_speech, [prompt], **settings)])
        pieces = [text[i : i + 8] for i in range(len(text) - 7)]
        # after how many characters the second half of the text comes again
        period = next((n for n in range(1, 1000) if text[1000:] == text[1000 - n : -n]), "never")
        rows.append((temperature, repr(text[-40:]), len(set(pieces)) / len(pieces), period))
    table("temperature | the end of 2,000 characters | share of new pieces of 8 | repeats after", *rows)
    assert rows[0][2] < 0.6 and rows[1][2] > 0.9 and rows[1][3] == "never"


def test_a_repetition_penalty_must_treat_negative_scores_differently():
    """How does the repetition penalty work?

    Scores of tokens that were there are divided by it if positive, multiplied if negative: to divide a
    negative score is a reward. As scores have no natural zero, its effect depends on where zero happens to
    be; to subtract a constant would not have this flaw.

    Often told: scores are divided. So says the paper; the rule for negative ones came with the libraries.
    Code: sample.py probabilities_of
    Source: Keskar et al. (2019, arXiv 1909.05858), sec. 4.1; RepetitionPenaltyLogitsProcessor in transformers
    """

    def penalize(scores, seen, penalty):
        return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)

    scores, seen = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[False, True, False]])
    theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[1]]), scores.clone())
    assert torch.equal(penalize(scores, seen, 1.5), theirs)
    divided = torch.where(seen, scores / 1.5, scores)
    ways = {"before": scores, "divided by 1.5": divided, "penalised": penalize(scores, seen, 1.5)}
    rows = [(way, z[0], z.softmax(-1)[0, 1].item()) for way, z in ways.items()]
    table("token 1 was there | scores | its probability", *rows)
    assert rows[1][2] > rows[0][2] > rows[2][2]
    first = torch.tensor([[True, False, False]])
    shifted = [penalize(z, first, 1.5).softmax(-1)[0, 0].item() for z in (scores, scores + 10)]
    print(f"    token 0 penalised: {shifted[0]:.3f}; the same with 10 added to all scores: {shifted[1]:.3f}")
    assert shifted[0] - shifted[1] > 0.1


def test_speculative_decoding_keeps_the_distribution_of_the_large_model():
    """What is speculative (assisted) decoding?

    A small model, whose probabilities are q, proposes a token x. The large one, whose are p, accepts it with
    probability min(1, p(x)/q(x)), and otherwise draws from max(0, p - q), scaled to sum to one. What comes
    out has exactly the distribution p; the share accepted is sum min(p, q).

    Often told: the small model writes, so that quality suffers.
    Code: sample.py probabilities_of
    Source: Leviathan et al. (2023, arXiv 2211.17192), algorithm 1 and appendix A.1
    """
    p, q = torch.randn(2, 8).softmax(-1)
    accepted = torch.minimum(p, q)  # q min(1, p/q)
    rest = (p - q).clamp(min=0)
    exact = accepted + (1 - accepted.sum()) * rest / rest.sum()
    generator, n = torch.Generator().manual_seed(0), 4000
    proposals = draw(q.expand(n, -1), generator).tolist()
    tokens = [accept(p.expand(2, -1), q[None], [x], generator) for x in proposals]
    drawn = torch.bincount(torch.tensor([new[0] for new in tokens]), minlength=8) / n
    share = sum(len(new) == 2 for new in tokens) / n  # an accepted token is followed by another
    heads = "error of the formula | of 4,000 draws | share accepted | sum min(p, q)"
    table(heads, (largest(exact - p), largest(drawn - p), share, accepted.sum()))
    assert torch.allclose(exact, p, atol=1e-6)
    assert largest(drawn - p) < 0.03 and abs(share - accepted.sum()) < 0.03

    # the same for texts of two tokens that a whole loop writes
    shape = dict(vocab_size=3, n_layer=1, n_embd=8, n_head=1, n_kv_head=1, n_hidden=8)
    model, draft, n = drawn_model(**shape), drawn_model(**shape), 500
    counts = torch.zeros(3, 3)
    for _ in range(n):
        (*_, a, b), _ = speculate(model, draft, [0, 1], 2, 2, Sampling(1.0, top_p=1.0), generator)
        counts[a, b] += 1 / n

    def of_texts(reader):
        """p(a) p(b | a) of all texts, (3, 3)."""
        texts = torch.tensor([[0, 1, a] for a in range(3)])
        p = reader(texts).softmax(-1)
        return p[0, 1, :, None] * p[:, 2]

    errors = [largest(counts - of_texts(reader)) for reader in (model, draft)]
    table("500 texts of two tokens differ from the large model's distribution by | from the draft's", errors)
    assert errors[0] < 0.06 and errors[1] > 0.2


def test_greedy_speculation_writes_the_same_text_in_fewer_runs(reader_of_the_speech):
    """What does speculation save?

    Runs of the large model, each of which reads all its weights: it checks n guesses at once, which takes
    hardly longer than one token where decoding waits for memory, and gains 1 to n + 1 tokens. The work grows:
    rejected guesses are computed for nothing, and the draft runs n times. So it pays with a draft that is
    much cheaper and often right. Here the draft is the model's own first block.

    Often told: a draft makes decoding faster. A bad one makes it slower.
    Code: model.py KVCache.truncate
    Source: Leviathan et al. (2023, arXiv 2211.17192), sec. 3; Elhoushi et al. (2024, arXiv 2404.16710) on the
    first layers as the draft
    """
    model, greedy, rows = reader_of_the_speech, Sampling(temperature=1e-30), []
    first_block = Transformer(replace(model.config, n_layer=1)).eval()
    first_block.load_state_dict(model.state_dict(), strict=False)
    by_chance = drawn_model(vocab_size=model.config.vocab_size, n_layer=1)
    beginnings = [to_ids(SPEECH[i : i + 8]).tolist() for i in range(0, 1200, 120)]
    alone = [[new for (new,) in generate(model, [ids], 20, temperature=0)] for ids in beginnings]
    for name, draft in (("random weights", by_chance), ("the first block", first_block)):
        for n_draft in (1, 4):
            found = [speculate(model, draft, ids, 20, n_draft, greedy, None) for ids in beginnings]
            n_runs = sum(n for _, n in found)
            rows.append((name, n_draft, [ids[8:] for ids, _ in found] == alone, n_runs, 200 / n_runs))
    table("draft | guesses at a time | the same text | runs for 200 tokens | tokens per run", *rows)
    print(f"    one of the texts: {to_text(beginnings[0])!r} + {to_text(alone[0])!r}")
    assert all(row[2] for row in rows)
    assert rows[1][3] > 150 and rows[3][3] < 80
