"""Masks: which token sees which, and where padding goes."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from model import KVCache, Transformer

from .book import causal, drawn_model, forward, largest, moved_by, places, table, tiny_config, train


def test_no_score_depends_on_a_later_token():
    """What is the causal mask for?

    Position t may use the tokens 0 to t only. So one pass gives T valid predictions at once, and training is
    parallel over positions. To test any model for it: change a token, and look at the scores before it.

    Code: model.py Attention.forward
    Source: Vaswani et al. (2017), sec. 3.2.3
    """
    moved = places(moved_by(drawn_model(), torch.randint(64, (1, 12)), 8) > 0)
    table("changed token | positions whose scores move", (8, moved))
    assert moved == [8, 9, 10, 11]


def test_masking_is_minus_infinity_before_the_softmax():
    """Why minus infinity, and not zero?

    Because exp(0) = 1: a score of zero has weight, exp(-inf) = 0 has none. Zeroing weights after the softmax
    is no better: the rest no longer sums to one, and hidden keys keep their part in the denominator.

    Often told: set what is hidden to 0.
    Code: model.py Attention.forward
    Source: Vaswani et al. (2017), sec. 3.2.3
    """
    scores, seen = torch.tensor([2.0, 1.0, -1.0, 3.0]), torch.tensor([True, True, True, False])
    ways = {
        "-inf before the softmax": scores.masked_fill(~seen, -math.inf).softmax(0),
        "0 before": (scores * seen).softmax(0),
        "0 after": scores.softmax(0) * seen,
    }
    table("the last key is hidden by | weights | sum", *((way, p, p.sum()) for way, p in ways.items()))
    right, before, after = ways.values()
    assert right[3] == 0 and abs(right.sum() - 1) < 1e-6
    assert before[3] > 0.08 and after.sum() < 0.35


def test_a_row_that_sees_nothing_is_nan_with_infinity_and_uniform_with_a_huge_number():
    """Why do many codes add a huge negative number instead of minus infinity?

    Because a query that sees no key gives 0/0 with -inf, and harmless equal weights with a finite number. It
    must fit the dtype: -1e9 is -inf in float16, whose largest number is 65504. PyTorch's attention with a
    boolean mask gives zeros for such a row.

    Often told: -1000 is enough. Added to all scores, it changes nothing.
    Code: model.py KVCache.begin
    Source: torch.finfo; the documentation of scaled_dot_product_attention
    """
    scores, rows = torch.tensor([0.3, -0.2, 1.0]), []
    for name, value in (
        ("-inf", -math.inf),
        ("finfo.min", torch.finfo(torch.float32).min),
        ("-1000", -1000.0),
    ):
        rows.append((name, (scores + value).softmax(0)))
    table("added to all scores | weights", *rows)
    print(f"    -1e9 in float16 is {torch.tensor(-1e9).half().item()}")
    assert rows[0][1].isnan().all()
    assert torch.allclose(rows[1][1], torch.full((3,), 1 / 3))
    assert torch.allclose(rows[2][1], scores.softmax(0), atol=1e-4)
    assert torch.tensor(-1e9).half() == -math.inf
    q, k, v = torch.randn(3, 1, 1, 3, 8)
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    assert (F.scaled_dot_product_attention(q, k, v, attn_mask=nothing) == 0).all()


def test_padding_on_the_left_or_right_is_the_same_to_rope():
    """Right padding for training, left padding for generation: does it matter?

    Not with a mask: hidden padding adds nothing, and RoPE knows offsets only, so that positions shifted by
    the padding change nothing. Without a mask, padding on the right is harmless to a causal model, on the
    left not.

    Often told: models must be trained with the padding on one side.
    Code: model.py KVCache.begin
    Source: Su et al. (2021), eq. 16, for the offsets
    """
    model, ids, P = drawn_model(), torch.randint(1, 64, (1, 9)), 5
    alone = model(ids)
    left, right = F.pad(ids, (P, 0)), F.pad(ids, (0, P))
    mask = causal(P + 9) & (torch.arange(P + 9) >= P)
    mask[:P, 0] = True  # the padding must see something, or it becomes nan
    rows = [
        ("left, masked", largest(forward(model, left, mask)[:, P:] - alone)),
        ("left, not masked", largest(model(left)[:, P:] - alone)),
        ("right, not masked", largest(model(right)[:, :9] - alone)),
    ]
    table("padding | difference from no padding", *rows)
    assert rows[0][1] < 1e-5 and rows[1][1] > 1e-2 and rows[2][1] < 1e-5


def test_generation_in_batches_must_read_the_last_real_token():
    """Why do libraries pad on the left to generate?

    Because scores[:, -1] is what follows the last column. With padding on the right that is padding in
    shorter rows; scores[i, length_i - 1] is as right as padding on the left. A cache with a length for each
    row, as here, lets the new tokens overwrite the padding.

    Often told: there is no mask when generating, so that the output is undefined.
    Code: sample.py prefill
    Source: none; it is measured here
    """
    model, short, long = drawn_model(), torch.randint(1, 64, (1, 4)), torch.randint(1, 64, (1, 7))
    alone = model(short)[0, -1]
    right = model(torch.cat((F.pad(short, (0, 3)), long)))
    seen = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]).bool()
    mask = causal(7) & seen[:, None] | torch.eye(7, dtype=torch.bool)
    left = forward(model, torch.cat((F.pad(short, (3, 0)), long)), mask[:, None])
    cache = KVCache(model.config, batch_size=2, max_len=8)
    model(torch.cat((F.pad(short[:, :3], (0, 3)), long[:, :6])), cache)  # all but the last token of each
    cache.truncate([3, 6])
    cached = model(torch.stack((short[:, -1], long[:, -1])), cache)[0, -1]
    rows = [
        ("right, the last column", largest(right[0, -1] - alone)),
        ("right, the last token", largest(right[0, 3] - alone)),
        ("left, the last column", largest(left[0, -1] - alone)),
        ("right, then cut from the cache", largest(cached - alone)),
    ]
    table("padding, and what is read | difference from the prompt alone", *rows)
    assert rows[0][1] > 0.05 and max(row[1] for row in rows[1:]) < 1e-5


def test_a_prefix_model_looks_both_ways_inside_the_prompt():
    """What is a prefix language model?

    One whose P prompt tokens see each other both ways, the rest only what is before it: P(P-1)/2 more pairs
    than the T(T+1)/2 of a causal one. A causal model is trained on all its tokens, a prefix model on what
    follows the prefix.

    Code: model.py Attention.forward
    Source: Raffel et al. (2020, arXiv 1910.10683), sec. 3.2; Wang et al. (2022, arXiv 2204.05832)
    """
    T, P = 8, 3
    prefix = causal(T)
    prefix[:P, :P] = True
    print("\n".join("    " + " ".join("x" if seen else "." for seen in row) for row in prefix))
    model, ids, rows = drawn_model(), torch.randint(64, (1, T)), []
    for position in (2, 6):
        rows.append((position, places(moved_by(partial(forward, model, mask=prefix), ids, position) > 0)))
    table("changed token | positions whose scores move", *rows)
    assert causal(T).sum() == T * (T + 1) // 2
    assert (prefix & ~causal(T)).sum() == P * (P - 1) // 2
    assert rows[0][1] == list(range(8)) and rows[1][1] == [6, 7]


def test_without_the_mask_predicting_the_next_token_is_cheating():
    """Why does BERT hide tokens in its input, instead of in the attention?

    A model that looks both ways sees the token that it should predict, and copies it: on pure noise its loss
    goes to zero, and it has learned nothing. Hiding the token in the input, as BERT does, leaves both sides
    readable; the causal mask hides it in the attention.

    Code: model.py Attention.forward
    Source: Devlin et al. (2019), sec. 3.1
    """

    def noise(step):
        x = torch.randint(8, (16, 17))
        return x[:, :-1], x[:, 1:]

    def last_loss(mask):
        torch.manual_seed(0)
        model = Transformer(tiny_config(vocab_size=8, n_layer=1, n_embd=32, n_head=2))

        def loss(ids, targets):
            return F.cross_entropy(forward(model, ids, mask).flatten(0, 1), targets.flatten())

        return train(model, noise, 150, 1e-2, loss)

    rows = [("both ways", last_loss(torch.ones(16, 16).bool())), ("causal", last_loss(causal(16)))]
    table("mask | loss on random tokens", *rows)
    print(f"    the best that is possible: ln 8 = {math.log(8):.3f}")
    assert rows[0][1] < 0.5 and rows[1][1] > 2
