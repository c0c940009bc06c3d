"""Attention: what softmax(Q K^T / sqrt(D)) V does, and what heads are for."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import Attention, KVCache, rope

from .book import largest, moved_by, table, tiny_config


def test_scaling_by_sqrt_d_keeps_the_variance_of_scores_at_one():
    """Why are the dot products divided by the square root of the head's width?

    If the entries of q and k are independent, with mean 0 and variance 1, q . k has variance d: a typical
    score grows like sqrt(d). Divided by sqrt(d) the scores have variance 1, whatever the width; the softmax
    comes after it.

    Often told: it prevents exploding gradients. That is a part of it, as the next lesson shows.
    Code: model.py Attention.forward
    Source: Vaswani et al. (2017), sec. 3.2.1
    """
    rows = []
    for d in (16, 64, 256, 1024):
        q, k = torch.randn(2, 4000, d)
        scores = (q * k).sum(-1)
        rows.append((d, scores.var(), (scores / math.sqrt(d)).var()))
    table("d | variance of q.k | of q.k / sqrt(d)", *rows)
    for d, raw, scaled in rows:
        assert abs(raw / d - 1) < 0.15
        assert abs(scaled - 1) < 0.15
    # the model leaves the division to PyTorch, whose attention does it by itself
    q, k, v = torch.randn(3, 1, 1, 8, 64)
    weights = (q @ k.mT / math.sqrt(64)).softmax(-1)
    assert torch.allclose(F.scaled_dot_product_attention(q, k, v), weights @ v, atol=1e-5)


def test_an_unscaled_softmax_saturates_and_most_queries_get_no_gradient():
    """What goes wrong without the scaling?

    Scores with a standard deviation of sqrt(d) make the softmax nearly one-hot: one weight near 1, the rest
    near 0. Most queries then get hardly any gradient, and the few whose two best keys score nearly the same
    get a huge one.

    Often told: the gradients vanish, or: they explode. Most do the first, a few the second.
    Code: model.py Attention.forward
    Source: Vaswani et al. (2017), sec. 3.2.1
    """
    rows = []
    for d in (16, 64, 256, 1024):
        q, k = torch.randn(500, 1, d), torch.randn(500, 32, d)  # 500 queries, 32 keys for each
        wanted = torch.randn(500, 32)  # the gradient that comes back to the weights
        row = [d]
        for divisor in (1, math.sqrt(d)):
            p = ((q * k).sum(-1) / divisor).softmax(-1)
            of_scores = p * (wanted - (p * wanted).sum(-1, keepdim=True))  # back through the softmax
            of_q = (of_scores[..., None] * k).sum(1).norm(dim=-1) / divisor
            row += [p.amax(-1).mean(), of_q.median(), of_q.mean()]
        rows.append(row)
    heads = (
        "d | largest weight | size of q's gradient: median | mean | scaled: largest weight | median | mean"
    )
    table(heads, *rows)
    _, peak, median, mean, scaled_peak, scaled_median, scaled_mean = rows[-1]
    assert peak > 0.9 and median < 0.02 and mean > 0.5
    assert scaled_peak < 0.25 and 0.15 < scaled_median < scaled_mean < 0.35


def test_dividing_after_the_softmax_does_not_undo_saturation():
    """Is softmax(Q K^T) / sqrt(d) the same thing?

    No. Dividing afterwards shrinks the output by sqrt(d) and changes nothing else: the rows sum to 1 /
    sqrt(d), and the largest weight keeps its share.

    Often told: notes give the formula softmax(Q K^T) / sqrt(d) K. Neither the place of the root nor K is
    right.
    Code: model.py Attention.forward
    Source: Vaswani et al. (2017), eq. 1
    """
    d = 256
    scores = (torch.randn(200, 1, d) * torch.randn(200, 32, d)).sum(-1)
    before, after = (scores / math.sqrt(d)).softmax(-1), scores.softmax(-1) / math.sqrt(d)

    def share_of_largest(weights):
        return (weights.amax(-1) / weights.sum(-1)).mean()

    rows = [
        (name, w.sum(-1).mean(), share_of_largest(w)) for name, w in (("before", before), ("after", after))
    ]
    table("divided | sum of a row | share of the largest weight", *rows)
    assert abs(after.sum(-1).mean() - 1 / 16) < 1e-4
    assert share_of_largest(after) > 0.85 and share_of_largest(before) < 0.3


def test_a_matrix_shared_by_queries_and_keys_makes_each_token_look_at_itself():
    """May queries and keys share one matrix?

    They may, at a price. If W_q = W_k, the scores are symmetric ("i looks at j" forces "j looks at i") and
    those on the diagonal are |W x|^2 / sqrt(d), about sqrt(d): at first each token looks at itself. Reformer
    shares them without loss, but forbids a token to look at itself.

    Often told: in the Transformer Q, K and V are equal. It has a matrix of its own for each of them.
    Code: model.py Attention
    Source: Vaswani et al. (2017), sec. 3.2.2; Kitaev et al. (2020, arXiv 2001.04451) for Reformer
    """
    T, d = 16, 64
    x = torch.randn(T, d)
    w_q, w_k = torch.randn(2, d, d) / math.sqrt(d)
    shared = (x @ w_q) @ (x @ w_q).T / math.sqrt(d)
    apart = (x @ w_q) @ (x @ w_k).T / math.sqrt(d)
    rows = []
    for name, scores in (("shared", shared), ("apart", apart)):
        rows.append((name, largest(scores - scores.T), scores.softmax(-1).diagonal().mean(), 1 / T))
    table("matrices | largest asymmetry | mean weight on itself | if all were equal", *rows)
    assert torch.allclose(shared, shared.T, atol=1e-5) and not torch.allclose(apart, apart.T, atol=0.5)
    assert rows[0][2] > 0.8 and rows[1][2] < 0.2


def test_heads_are_slices_of_one_projection():
    """Has each head a linear layer of its own?

    In effect yes: the rows of one large matrix are cut into heads, which equals a layer for each head. Every
    head reads all channels of its token; only what comes out is narrow.

    Often told: each head gets its slice of the embedding. The slice is taken after the projection; cut
    before, as in listings with Linear(head_dim, head_dim), a head is blind to all other channels.
    Code: model.py Attention.forward
    Source: Vaswani et al. (2017), sec. 3.2.2
    """
    config = tiny_config()
    C, H, D = config.n_embd, config.n_head, config.head_dim
    q_proj = Attention(config).q_proj
    small = torch.randn(D, D)

    def head_0(x):
        return q_proj(x).view(-1, H, D)[:, 0]

    def head_0_of_a_slice(x):
        return (x.view(-1, H, D) @ small)[:, 0]

    def channels_read(head):
        x = torch.randn(5, C, requires_grad=True)
        head(x)[0].sum().backward()
        return int((x.grad[0] != 0).sum())

    x = torch.randn(5, C)
    for h in range(H):
        own = q_proj.weight[h * D : (h + 1) * D]
        assert torch.allclose(q_proj(x).view(-1, H, D)[:, h], x @ own.T, atol=1e-5)
    seen, seen_by_slice = channels_read(head_0), channels_read(head_0_of_a_slice)
    heads = "head | channels that it reads | parameters of all heads"
    table(
        heads, ("a slice of the projection", seen, C * C), ("a projection of a slice", seen_by_slice, D * D)
    )
    assert (seen, seen_by_slice) == (C, D)


def test_without_the_transpose_heads_attend_to_heads():
    """Why is there a transpose after the view into heads?

    A matrix product q @ k.mT works on the last two axes. Without the transpose these are heads and channels:
    the heads of one token attend to each other, tokens never meet, and every shape is still right.

    Often seen: listings of multi-head attention without it, which print a correct shape.
    Code: model.py Attention.forward
    Source: the broadcasting rules of torch.matmul
    """

    def attend(x, transposed):
        B, T, C = x.shape
        q = x.view(B, T, 4, C // 4)  # (B, T, H, D)
        q = q.transpose(1, 2) if transposed else q
        y = (q @ q.mT / math.sqrt(C // 4)).softmax(-1) @ q
        return (y.transpose(1, 2) if transposed else y).reshape(B, T, C)

    x, rows = torch.randn(1, 6, 32), []
    for transposed in (False, True):
        moved = moved_by(partial(attend, transposed=transposed), x, 5)
        rows.append((transposed, str(tuple(attend(x, transposed).shape)), moved[0]))
    table("transposed | shape | token 0 moves when token 5 changes, by", *rows)
    assert rows[0][1] == rows[1][1]
    assert rows[0][2] == 0 and rows[1][2] > 1e-4


def test_splitting_into_heads_adds_no_flops():
    """Why is each head narrower than the model?

    So that H heads of width C/H cost what one of width C costs: scores of T^2 C and projections of T C^2
    products. H heads of the full width would cost H times as much.

    Often told: attention costs O(d^2), and heads reduce that. It costs O(T^2 d + T d^2), however many heads.
    Code: model.py Config.flops_per_token
    Source: Vaswani et al. (2017), sec. 3.2.2
    """

    def flops(H, D, C=64, T=32):
        x, qkv, out = torch.randn(T, C), torch.randn(3, C, H * D), torch.randn(H * D, C)
        with FlopCounterMode(display=False) as counter:
            q, k, v = ((x @ w).view(T, H, D).transpose(0, 1) for w in qkv)
            y = (q @ k.mT).softmax(-1) @ v  # (H, T, D)
            y.transpose(0, 1).reshape(T, -1) @ out
        return counter.get_total_flops()

    rows = [(H, D, flops(H, D)) for H, D in ((1, 64), (8, 8), (8, 64))]
    table("heads | width of a head | FLOPs", *rows)
    one, split, full = (row[2] for row in rows)
    assert one == split and full == 8 * one


def test_one_head_averages_what_two_heads_keep_apart():
    """Why several heads?

    A head returns one weighted average. If two places matter, a single head that looks at both alike returns
    the same whichever is which; two heads return both.

    Often told: one head would attend too much to itself.
    Code: model.py Attention.forward
    Source: Vaswani et al. (2017), sec. 3.2.2
    """
    a, b = torch.randn(2, 8)
    both, first, second = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])  # weights on two places

    def one_head(values):
        return both @ values

    def two_heads(values):
        return torch.cat((first @ values, second @ values))

    rows = []
    for name, read in (("one", one_head), ("two", two_heads)):
        rows.append((name, largest(read(torch.stack((a, b))) - read(torch.stack((b, a))))))
    table("heads | how far apart 'a, then b' and 'b, then a' are", *rows)
    assert rows[0][1] == 0 and rows[1][1] > 0.1


def test_grouped_query_attention_is_multi_head_attention_with_shared_keys_and_values():
    """What are multi-query and grouped-query attention, and what do they save?

    H query heads share K heads of keys and values: K = H is multi-head, K = 1 multi-query, all between is
    grouped-query attention. It equals multi-head attention with copied key and value heads; k_proj, v_proj
    and the KV cache shrink by H/K, the FLOPs of the scores do not.

    Often told: grouping reduces the complexity of attention. It reduces what is stored and read.
    Code: model.py KVCache
    Source: Shazeer (2019, arXiv 1911.02150); Ainslie et al. (2023), sec. 2.2
    """
    x, rows = torch.randn(1, 10, 64), []
    for K in (8, 2, 1):
        config = tiny_config(n_head=8, n_kv_head=K)
        grouped, full = Attention(config), Attention(tiny_config(n_head=8, n_kv_head=8))
        weights = grouped.state_dict()
        for name in ("k_proj.weight", "v_proj.weight"):
            weights[name] = weights[name].view(K, 8, 64).repeat_interleave(8 // K, 0).reshape(64, 64)
        full.load_state_dict(weights)
        cos, sin = rope(torch.arange(10), config, x.dtype)
        cached = 2 * KVCache(config, batch_size=1, max_len=1).k.numel()
        error = largest(grouped(x, cos, sin) - full(x, cos, sin))
        rows.append((K, grouped.k_proj.weight.numel(), cached, error))
        assert error < 1e-5
    table("K | weights of k_proj | cached numbers per token | difference from multi-head", *rows)
    assert [row[2] for row in rows] == [256, 64, 32]


def test_flashattention_is_exact_and_saves_memory_but_no_arithmetic():
    """What does FlashAttention do?

    It computes exact attention tile by tile, with a running maximum, sum and output for each query, so that
    the T x T scores never stand in memory: O(T) instead of O(T^2). It is faster because it reads and writes
    far less of the GPU's slow memory, not because it computes less: going backward it even computes the
    scores again.

    Often told: it approximates; it is a way to multiply matrices; it computes less.
    Code: model.py Attention.forward
    Source: Dao et al. (2022, arXiv 2205.14135), algorithm 1; Milakov & Gimelshein (2018, arXiv 1805.02867)
    """
    T, D, size = 128, 16, 32
    q, k, v = torch.randn(3, T, D)
    maximum, total, output = torch.full((T, 1), -math.inf), torch.zeros(T, 1), torch.zeros(T, D)
    held = 0
    with FlopCounterMode(display=False) as of_tiles:
        for key in range(0, T, size):
            for query in range(0, T, size):
                rows, columns = slice(query, query + size), slice(key, key + size)
                scores = q[rows] @ k[columns].T / math.sqrt(D)  # (size, size)
                new = torch.maximum(maximum[rows], scores.amax(-1, keepdim=True))
                p, rescale = (scores - new).exp(), (maximum[rows] - new).exp()
                total[rows] = total[rows] * rescale + p.sum(-1, keepdim=True)
                output[rows] = output[rows] * rescale + p @ v[columns]
                maximum[rows] = new
                held = max(held, scores.numel())
    with FlopCounterMode(display=False) as of_plain:
        plain = (q @ k.T / math.sqrt(D)).softmax(-1) @ v
    flops = of_tiles.get_total_flops(), of_plain.get_total_flops()
    table(
        "way | FLOPs of products | scores held at once", ("tiles", flops[0], held), ("plain", flops[1], T * T)
    )
    print(f"    largest difference: {largest(output / total - plain):.0e}")
    assert torch.allclose(output / total, plain, atol=1e-5)
    assert flops[0] == flops[1] and held * 16 == T * T
    fused = F.scaled_dot_product_attention(q[None], k[None], v[None])
    assert torch.allclose(fused[0], plain, atol=1e-5)
