"""Positions: how a model that sees a set of tokens is told their order."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2Model

from model import Attention, Config, Transformer, apply_rope, rope

from .book import drawn_model, forward, largest, lines, table, tiny_config, train, weights_of

HEAD = Config(vocab_size=1, n_head=1, n_kv_head=1, n_embd=64)  # a head of 64 channels


def no_positions(T):
    """Every token at position 0, where RoPE turns nothing."""
    return torch.zeros(T)


def sinusoids(T, C):
    """The table (T, C) that the first Transformer adds to its embeddings: the sines and cosines of RoPE."""
    cos, sin = rope(torch.arange(T), replace(HEAD, head_dim=C), torch.float32)
    return torch.cat((sin, cos), -1)


def alibi(T, slope):
    """What ALiBi adds to the scores (T, T) of a head: -slope * distance; -inf hides the future."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return (-slope * distance).masked_fill(distance < 0, -math.inf)


def test_attention_without_positions_does_not_know_their_order():
    """What is a positional encoding for?

    It tells the order of the tokens. Without mask and positions, attention is equivariant, f(P x) = P f(x)
    for every change of order P: if tokens change places, their outputs change places and nothing else. "Dog
    bites man" and "man bites dog" give each word the same vector.

    Often told: any order gives the same output. The vectors are the same; their order follows the input's.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `apply_rope(q, cos, sin), apply_rope(k, cos, sin)` becomes `q, k`
    Source: Vaswani et al. (2017), sec. 3.5
    问: 为什么 Transformer 需要位置编码？
    答: 没有掩码和位置信息时，注意力是置换等变的：f(Px) = P f(x)，打乱输入只会让输出跟着换位，“狗咬人”和“人咬
    狗”中每个词得到的向量完全相同。
    """
    model, everything = drawn_model(), torch.ones(3, 3, dtype=torch.bool)
    dog_bites_man = torch.tensor([[5, 6, 7]])
    rows = []
    for name, positions in (("none", no_positions(3)), ("RoPE", torch.arange(3))):
        logits = forward(model, dog_bites_man, everything, positions)
        reversed_logits = forward(model, dog_bites_man.flip(1), everything, positions)
        difference = (reversed_logits.flip(1) - logits)[0].abs().amax(-1)
        rows.append((name, *difference))
    table("positions | in the other sentence, 'dog' differs by | 'bites' | 'man'", *rows)
    none, with_rope = (row[1:] for row in rows)
    assert max(none) < 1e-4
    assert min(with_rope) > 1e-2


def test_a_causal_mask_alone_tells_the_order_from_the_second_layer_on():
    """Does a decoder need positional encodings to know the order at all?

    No. With the causal mask, token t averages over t + 1 tokens: if its scores are equal, the first token has
    weight 1/(t+1), which tells the position. One layer is not enough, as the last token still sees a set; in
    a second layer, the keys themselves know what came before them. Language models without any encoding come
    close to those with one (Haviv et al.).

    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True` becomes `is_causal=False`
    Source: Haviv et al. (2022, arXiv 2203.16634); Kazemnejad et al. (2023, arXiv 2305.19466)
    问: 不加位置编码，decoder-only 模型还能知道词序吗？
    答: 能：因果掩码使第 t 个词元只能看到 t + 1 个词元，打破了置换对称性；单层时末尾词元看到的仍是一个集合，从
    第二层起顺序就能区分。实验中，不加位置编码（NoPE）的语言模型与加了的相差不大。
    """
    T = 6
    ids = torch.randint(64, (1, T))
    other_order = ids[:, [4, 2, 0, 1, 3, 5]]  # the last token stays
    everything = torch.ones(T, T, dtype=torch.bool)
    rows = []
    for name, mask, n_layer in (("none", everything, 2), ("causal", None, 1), ("causal", None, 2)):
        model = drawn_model(n_layer=n_layer)
        before = forward(model, ids, mask, no_positions(T))[0, -1]
        after = forward(model, other_order, mask, no_positions(T))[0, -1]
        rows.append((name, n_layer, largest(after - before)))
    table("mask | layers | another order of the tokens before moves the last one's scores by", *rows)
    print()
    attention = Attention(tiny_config())
    nn.init.zeros_(attention.q_proj.weight)  # all scores are 0
    of_first = weights_of(attention, torch.randn(T, 64), no_positions(T))[0, :, 0]
    table("the first token's weight, if all scores are equal, for the queries 0 to 5", (of_first,))
    assert rows[0][2] < 1e-4 and rows[1][2] < 1e-4
    assert rows[2][2] > 1e-2
    assert torch.allclose(1 / of_first, torch.arange(1.0, T + 1))


def test_sinusoids_are_absolute_and_offsets_can_be_read_from_them():
    """Are the sinusoids of the first Transformer absolute or relative positions?

    Absolute: each position has its own vector, which is added to the embedding. But as sines and cosines
    rotate, one matrix M_k takes PE(p) to PE(p + k) for every p, and PE(p) . PE(p + k) depends on k alone.
    RoPE takes the same sines and cosines, and turns queries and keys by them instead of adding them.

    Often told: they tell relative, but no absolute positions.
    Code: model.py rope
    Break: model.py rope: `positions[..., None] * frequencies` becomes `positions[..., None].sqrt() *
    frequencies`
    Source: Vaswani et al. (2017), sec. 3.5
    问: 原始 Transformer 的正弦位置编码是绝对位置还是相对位置？
    答: 是绝对位置编码，每个位置有自己的向量并加到词嵌入上；但 PE(p + k) 是 PE(p) 的线性变换，且内积
    PE(p)·PE(p + k) 只与 k 有关，所以相对位移可以从中读出。
    """
    encoding = sinusoids(512, 64)
    cos, sin = rope(torch.tensor(7), HEAD, torch.float32)
    cos, sin = torch.diag(cos), torch.diag(sin)
    advance_by_7 = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))  # M_7, (64, 64)
    error = largest(encoding[:-7] @ advance_by_7 - encoding[7:])
    products = (encoding[:-7] * encoding[7:]).sum(-1)
    closest = torch.pdist(encoding).min()
    heads = "PE(p) . PE(p+7), least | most | error of one matrix for all p | the closest two are apart by"
    table(heads, (products.min(), products.max(), error, closest))
    assert products.max() - products.min() < 1e-3
    assert error < 1e-3
    assert closest > 0.5


def test_sinusoids_and_rope_share_their_frequencies_and_neither_repeats():
    """Do sinusoids repeat, and does RoPE mend that?

    Both turn pair i by theta^(-2i/d) per position, with theta = 10,000. A single pair has a period, of 6.3 up
    to 47,000 positions for 64 channels. The whole vector never comes back: the first pair turns by 1 radian
    per position, and no whole number of radians but 0 is a multiple of 2 pi.

    Often told: sinusoids repeat after a fixed period, which RoPE solves.
    Code: model.py rope
    Break: model.py rope: `1 / config.rope_theta` becomes `2 * math.pi / config.rope_theta`
    Source: Vaswani et al. (2017), sec. 3.5; Su et al. (2021), sec. 3.2.2
    问: 正弦位置编码会周期性重复吗？RoPE 解决了这个问题吗？
    答: 两者用的是同一组频率 θ^(-2i/d)：单个分量对有周期（d = 64 时约 6.3 到 47000 个位置），但整个向量永不重
    复，因为第一对每步转 1 弧度，而非零整数弧度不可能是 2π 的整数倍。
    """
    positions = torch.arange(40_000)
    frequencies = 1e4 ** (-torch.arange(0, 64, 2) / 64)  # of the first Transformer's formula
    periods = 2 * math.pi / frequencies
    cos, sin = rope(positions, HEAD, torch.float32)
    distance = torch.cat((sin - sin[0], cos - cos[0]), -1).norm(dim=-1)[1:]  # from position 0
    nearest = distance.argmin().item() + 1
    heads = "shortest period | longest | nearest to position 0 | at a distance of | median distance"
    table(heads, (periods[0], periods[-1], nearest, distance.min(), distance.median()))
    thirds = torch.arange(60) / 3  # RoPE takes positions between two tokens, too
    cos_of_thirds, _ = rope(thirds, HEAD, torch.float32)
    curves = {f"pair {i}": (thirds, cos_of_thirds[:, i]) for i in (0, 4, 12)}
    lines("Three of the 32 pairs of a head, from fast to slow", "position", "cosine of the angle", curves)
    assert torch.allclose(cos[:512], (positions[:512, None] * frequencies).cos(), atol=1e-4)
    assert abs(periods[-1] - 47_117) < 10
    assert nearest == 1 and distance.min() > 0.9


def test_rope_scores_depend_only_on_the_offset():
    """What is the idea of RoPE?

    Rotate each pair of channels of q and k by an angle, position times frequency, before the dot product. Two
    rotations leave their difference, R_m^T R_n = R_(n-m): absolute rotations give relative scores.

    Often told: it models the rotation of words in a sentence; it is a kind of data augmentation.
    Code: model.py apply_rope
    Break: model.py apply_rope: `x2 * cos + x1 * sin` becomes `x2 * cos - x1 * sin`
    Source: Su et al. (2021, arXiv 2104.09864), eq. 16
    问: RoPE（旋转位置编码）的核心思想是什么？
    答: 在点积之前，把 q、k 的每对分量旋转“位置 × 频率”的角度；两个旋转相乘只留下差值 R_m^T R_n = R_(n-m)，于
    是绝对位置的旋转得到只依赖相对位置的分数。
    """
    cos, sin = rope(torch.arange(2000), HEAD, torch.float32)
    q, k = torch.randn(2, 64)

    def score(m, n):
        return (apply_rope(q, cos[m], sin[m]) @ apply_rope(k, cos[n], sin[n])).item()

    rows = [(m, score(m, m - 5), score(m, m - 6)) for m in (6, 100, 1000, 1999)]
    table("position of q | score with k 5 before it | 6 before it", *rows)
    assert max(row[1] for row in rows) - min(row[1] for row in rows) < 1e-2
    assert abs(rows[0][1] - rows[0][2]) > 0.1


def test_rope_is_a_multiplication_of_complex_numbers():
    """How is RoPE derived?

    Read a pair of channels as the complex number z = x1 + i x2; RoPE is z e^(i p w) at position p, for a pair
    of frequency w. The score of q at m and k at n is the sum over pairs of the real part of q e^(imw) conj(k
    e^(inw)) = q conj(k) e^(i(m-n)w). It keeps norms, does nothing at position 0, and has no parameters.

    Code: model.py apply_rope
    Break: model.py apply_rope: `x1 * cos - x2 * sin` becomes `x1 * cos + x2 * sin`
    Source: Su et al. (2021), sec. 3.2
    问: 如何用复数推导 RoPE？
    答: 把一对分量看作复数 z = x1 + i·x2，位置 p 处乘以 e^(ipw)；q 与 k 的分数就是 q·conj(k)·e^(i(m-n)w) 的实
    部之和，只依赖 m - n，并且不改变模长、没有参数。
    """
    T, m, n = 10, 9, 4
    q, k = torch.randn(2, T, 64)
    cos, sin = rope(torch.arange(T), HEAD, q.dtype)
    turned_q, turned_k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    turn = torch.complex(cos, sin)  # e^(i p w), (T, 32)
    complex_q, complex_k = torch.complex(*q.chunk(2, -1)), torch.complex(*k.chunk(2, -1))
    product = complex_q * turn
    score = (complex_q[m] * complex_k[n].conj() * turn[m - n]).real.sum()
    differences = {
        "of turned q from the complex product": turned_q - torch.cat((product.real, product.imag), -1),
        "of the score of 9 and 4 from the formula": turned_q[m] @ turned_k[n] - score,
        "of the length of q, before and after": turned_q.norm(dim=-1) - q.norm(dim=-1),
        "of q at position 0, before and after": turned_q[0] - q[0],
    }
    table("difference | at most", *((name, largest(difference)) for name, difference in differences.items()))
    assert max(map(largest, differences.values())) < 1e-4
    assert torch.equal(turned_q[0], q[0])


def test_rope_touches_queries_and_keys_but_not_values():
    """Where does RoPE act, and where do added positions?

    RoPE turns q and k in every layer, right before the scores; v is not turned. A token that sees only itself
    gives itself weight 1, and its output is the same at any position. Added vectors enter once, with the
    embedding, and reach q, k and v.

    Code: model.py Attention.forward
    Break: model.py Attention.forward: `y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal`
    becomes `y = F.scaled_dot_product_attention(q, k, apply_rope(v, cos, sin), is_causal`
    Source: Su et al. (2021), eq. 16; apply_rotary_pos_emb in transformers' modeling_llama.py
    问: RoPE 作用在哪里？为什么不旋转 V？
    答: RoPE 在每一层计算分数之前只旋转 q 和 k，位置只影响注意力权重；v 是被加权平均的内容，不旋转。加性位置编
    码则在输入端加一次，会同时进入 q、k、v。
    """
    attention, config = Attention(tiny_config()), tiny_config()
    token, added = torch.randn(1, 1, 64), sinusoids(100, 64)

    def output(x, position):
        return attention(x, *rope(torch.tensor([position]), config, x.dtype))

    two = torch.randn(2, 64)
    near, far = (weights_of(attention, two, torch.tensor([0, distance])) for distance in (1, 99))
    with_0, with_99 = (output(token + added[position], 0) for position in (0, 99))
    differences = {
        "RoPE: output of a single token, at 0 and at 99": output(token, 99) - output(token, 0),
        "RoPE: weights of two tokens, 1 and 99 apart": far - near,
        "added: output of a single token, 0 and 99": with_99 - with_0,
    }
    rows = [(name, largest(difference)) for name, difference in differences.items()]
    table("what | differs by", *rows)
    assert rows[0][1] < 1e-5
    assert rows[1][1] > 1e-3 and rows[2][1] > 0.1


def test_rope_decays_on_average_but_can_attend_anywhere():
    """Does RoPE force attention to decay with distance?

    On average it does, if all channels of q and k are alike: at a distance the D/2 pairs are out of step, and
    the sum of their cosines is small. The decay of the paper is an upper bound of this kind. But if k is q
    turned by 100 positions, the head looks 100 back more than anywhere else.

    Code: model.py rope
    Break: model.py rope: `config.rope_theta ** (pairs / config.head_dim)` becomes `config.rope_theta **
    (0 * pairs)`
    Source: Su et al. (2021), sec. 3.3 and 3.4.3; Barbero et al. (2024, arXiv 2410.06205)
    问: RoPE 一定会让注意力随距离衰减吗？
    答: 不一定：论文中的远程衰减是上界或平均意义上的（例如 q = k = 1 时各频率的余弦逐渐错相）；只要让 k 等于 q
    旋转 100 个位置，该注意力头的最大权重就正好落在 100 个词元之前。
    """
    T = D = 128
    config = tiny_config(n_embd=D, n_head=1, n_kv_head=1, qkv_bias=True)
    cos, sin = rope(torch.tensor(100), config, torch.float32)
    ones, drawn = torch.ones(D), torch.randn(D)
    pairs = {"k = q = 1": (ones, ones), "k = q turned by 100": (drawn, apply_rope(drawn, cos, sin))}
    rows = []
    for name, (q, k) in pairs.items():
        attention = Attention(config)  # all its queries are q and all its keys k, whatever the token
        for linear, bias in ((attention.q_proj, q), (attention.k_proj, k)):
            nn.init.zeros_(linear.weight)
            linear.bias.data = bias
        back = weights_of(attention, torch.zeros(T, D))[0, -1].flip(0)  # of the last query; back[n]: n before
        rows.append((name, back[:10].mean(), back[10:50].mean(), back[50:].mean(), back.argmax()))
    table("q and k | mean weight 0 to 9 back | 10 to 49 | 50 to 127 | largest weight, how far back", *rows)
    alike, aimed = (row[1:] for row in rows)
    assert alike[0] > 2 * alike[1] > 4 * alike[2] and alike[3] == 0
    assert aimed[3] == 100


def test_a_relative_encoding_knows_the_offset_of_two_tokens_and_not_where_they_stand():
    """What is a relative position encoding?

    One through which the score of query i and key j depends on i - j, but not on i or j themselves. If all
    tokens are equal, the scores are constant along diagonals (a Toeplitz matrix); a text that is shifted as a
    whole keeps its scores. It may be a learned number for each offset (T5, which shares them among far ones),
    a learned vector added to the key (Shaw et al.), a straight line (ALiBi) or a rotation (RoPE).

    Often told: each relative position gets a vector. Most kinds have no vectors.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `apply_rope(k, cos, sin)` becomes `apply_rope(k, cos, -sin)`
    Source: Shaw et al. (2018, arXiv 1803.02155); Raffel et al. (2020, arXiv 1910.10683), sec. 2.1
    问: 什么是相对位置编码？和绝对位置编码有什么区别？
    答: 采用相对位置编码时，位置只通过 i - j 影响分数：若各词元相同，分数就构成沿对角线为常数的 Toeplitz 矩
    阵；整段文本平移后分数不变；T5 的可学习偏置、ALiBi 和 RoPE 都是如此，而加到词嵌入上的可学习绝对位置不是。
    """
    T = 16
    attention = drawn_model().model.layers[0].self_attn
    text = torch.randn(1, 64).expand(T, 64)  # one token over and over: only positions differ
    offsets = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    per_offset = torch.randn(T)[offsets] + alibi(T, slope=0.0)
    still = no_positions(T)
    kinds = {
        "RoPE": weights_of(attention, text),
        "ALiBi": weights_of(attention, text, still, alibi(T, slope=0.25)),
        "a number per offset, as T5": weights_of(attention, text, still, per_offset),
        "a vector per position, as GPT-2": weights_of(attention, text + torch.randn(T, 64), still),
    }
    rows, changes = [], []
    for name, weights in kinds.items():
        own = weights.diagonal(dim1=1, dim2=2)[..., None]
        scores = (weights / own).log().tril()[0]  # of head 0, less the score of a query and its own key
        rows.append((name, scores[4, 1], scores[8, 5], scores[15, 12]))
        changes.append(largest(scores[1:, 1:] - scores[:-1, :-1]))
    table("positions by | score with the key 3 before it of query 4 | of query 8 | of query 15", *rows)
    assert max(changes[:3]) < 1e-3
    assert changes[3] > 0.1


def test_raising_the_rope_base_slows_the_slow_pairs():
    """What does rope_theta do, and why is it raised for long texts?

    Pair i comes round once in 2 pi theta^(2i/D) positions. Slow pairs never complete a turn in training, and
    a longer text shows them angles that they never met. A larger theta slows all pairs but the first, the
    slow ones most: with 500,000, as in Llama 3, the slowest of 64 turns less in 8,192 positions than with
    10,000 in 1,024.

    Code: model.py rope
    Break: model.py rope: `1 / config.rope_theta` becomes `1 / 10000.0`
    Source: Su et al. (2021), sec. 3.2.2; Xiong et al. (2023, arXiv 2309.16039)
    问: RoPE 的 base（rope_theta）起什么作用？长上下文模型为什么要调大它？
    答: 第 i 对分量每 2π·θ^(2i/D) 个位置转一圈；慢的分量对在训练长度内转不满一圈，文本变长就会遇到没见过的角
    度。增大 θ（如 Llama 3 的 500000）主要让慢的分量对转得更慢，从而减少新角度。
    """
    rows = []
    for theta in (1e4, 5e5):
        config = tiny_config(n_embd=128, n_head=1, n_kv_head=1, rope_theta=theta)
        cos, sin = rope(torch.tensor(1), config, torch.float32)
        turns = torch.atan2(sin, cos) / (2 * math.pi)  # of each pair, per position
        complete = int((1024 * turns >= 1).sum())
        rows.append((theta, complete, turns[0], 1024 * turns[-1], 8192 * turns[-1]))
    heads = "theta | pairs that come round in 1,024 | turns: the first in 1 | the last in 1,024 | in 8,192"
    table(heads, *rows)
    small, large = rows
    assert (small[1], large[1]) == (36, 25)
    assert small[2] == large[2]
    assert large[4] < small[3] / 5


def test_stretched_rope_keeps_slow_pairs_to_angles_seen_in_training():
    """How is a model with RoPE stretched to four times its length?

    The slow pairs, which never came round in training, must meet no new angles. Position interpolation
    divides positions by 4, which slows all pairs, so neighbours come 4 times closer. NTK-aware scaling
    multiplies theta by 4^(D/(D-2)): the slowest pair slows down by 4, the fastest turns as before, and some
    pairs between them still meet new angles. Llama 3.1 goes by parts: fast pairs stay, slow ones are slowed
    by a factor, and between them is a ramp.

    Often told: Transformers handle other lengths by nature; a larger model helps.
    Code: model.py rope
    Break: model.py rope: `frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])` becomes
    `frequencies = frequencies / scaling["factor"]`
    Source: Chen et al. (2023, arXiv 2306.15595); Peng et al. (2023, arXiv 2309.00071) on NTK-aware scaling
    问: 如何把 RoPE 模型的上下文扩展到 4 倍？
    答: 关键是让慢的分量对不超出训练中见过的角度：位置插值把所有位置除以 4，但相邻位置也被挤近；NTK-aware 改为
    放大 θ，主要让慢的分量对变慢，但介于快慢之间的一些分量对仍会遇到新角度；Llama 3.1 则按频率分段缩放，快的分
    量对保持不变。
    """
    D, theta, n = HEAD.head_dim, HEAD.rope_theta, 128  # trained on n tokens
    ntk = replace(HEAD, rope_theta=theta * 4 ** (D / (D - 2)))
    ranges = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=n)
    llama = replace(HEAD, rope_scaling=dict(rope_type="llama3", factor=4.0, **ranges))
    ways = {
        "trained, 128": (torch.arange(n + 1), HEAD),
        "as it is, 512": (torch.arange(4 * n + 1), HEAD),
        "interpolated, 512": (torch.arange(4 * n + 1) / 4, HEAD),
        "NTK-aware, 512": (torch.arange(4 * n + 1), ntk),
        "Llama 3.1, 512": (torch.arange(4 * n + 1), llama),
    }
    rows = []
    for name, (positions, config) in ways.items():
        cos, sin = rope(positions[1], config, torch.float32)  # the angle of one step
        step = torch.atan2(sin, cos) / (2 * math.pi)
        rows.append((name, positions[-1] / positions[1] * step[0], positions[-1] / positions[1] * step[-1]))
    table("up to position | turns of the fastest pair | of the slowest", *rows)
    trained, raw, interpolated, *stretched = ([float(turns) for turns in row[1:]] for row in rows)
    assert trained[0] > 20 > 1 > trained[1]
    assert raw == pytest.approx([4 * trained[0], 4 * trained[1]], rel=1e-3)
    assert interpolated == pytest.approx(trained, rel=1e-3)
    for way in stretched:
        assert way == pytest.approx([raw[0], trained[1]], rel=1e-3)


def test_alibi_adds_a_fixed_linear_penalty_to_the_scores():
    """What is ALiBi?

    Scores become q . k / sqrt(d) - m_h (i - j): a fixed matrix is added before the softmax, with a slope for
    each head, m_h = 2^(-8h/n) for head h of n; for n = 8, as here, 1/2, 1/4 ... 1/256. There is no other
    encoding of positions, and nothing of it is learned. The weights are thereby multiplied by e^(-m_h (i -
    j)) and normalised again.

    Often told: the bias is multiplied; it is tuned; the input is projected to low-dimensional features.
    Compare: model.py Attention.forward: its mask says True or False; numbers are added
    to the scores
    Source: Press et al. (2022, arXiv 2108.12409), sec. 3
    问: ALiBi 是怎么做的？
    答: 在 softmax 之前给分数加上固定的线性惩罚 -m_h·(i - j)，每个头的斜率 m_h = 2^(-8h/n) 是固定的几何数列，
    不学习也没有别的位置编码；等价于把注意力权重乘以 e^(-m·距离) 再归一化。
    """
    H, D, T = 8, 16, 6
    attention, x = Attention(tiny_config(n_embd=H * D, n_head=H, n_kv_head=H)), torch.randn(T, H * D)
    still, hidden = no_positions(T), alibi(T, slope=0.0)  # 0 where a key is seen, -inf where not
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    q, k = (linear(x).view(T, H, D).transpose(0, 1) for linear in (attention.q_proj, attention.k_proj))
    scores = q @ k.mT / math.sqrt(D)  # (H, T, T)
    unbiased = weights_of(attention, x, still)
    rows, differences = [], []
    for h in range(H):
        slope = 2.0 ** -(h + 1)
        weights = weights_of(attention, x, still, alibi(T, slope))[h]
        rows.append((h + 1, slope, alibi(T, slope)[-1], weights[-1]))
        multiplied = unbiased[h] * (-slope * distance).exp()
        differences.append(weights - (scores[h] - slope * distance + hidden).softmax(-1))
        differences.append(weights - multiplied / multiplied.sum(-1, keepdim=True))
    table("head | slope | added to the last query's scores | its weights", rows[0], rows[1], rows[7])
    assert max(map(largest, differences)) < 1e-5
    assert [row[1] for row in rows] == [2 ** (-8 * h / H) for h in range(1, H + 1)]


def test_alibi_extrapolates_by_being_short_sighted():
    """What does ALiBi buy, and what does it cost?

    A key at distance d gets the factor e^(-m d): a steep head sees a handful of tokens, however long the
    text, so a longer input is nothing new to it. In the paper the perplexity stays flat beyond the trained
    length. The price is a preference for what is near: only the flattest heads reach far.

    Often told: ALiBi strengthens long-distance dependencies. It favours what is near.
    Compare: model.py apply_rope: RoPE turns q and k and adds no penalty for distance
    Source: Press et al. (2022, arXiv 2108.12409), sec. 3 and app. B
    问: ALiBi 为什么能外推？代价是什么？
    答: 距离 d 处的键要乘以 e^(-m·d)，斜率大的头无论文本多长都只看最近的十来个词元，所以输入变长影响很小；代价
    是偏向近处，远距离依赖被削弱而不是加强。
    """
    attention = Attention(tiny_config(n_embd=512, n_head=1, n_kv_head=1))
    nn.init.zeros_(attention.q_proj.weight)  # all scores are 0
    rows = []
    for slope in (1 / 2, 1 / 8, 1 / 32, 1 / 256):
        reach = []
        for T in (64, 512):
            weights = weights_of(attention, torch.zeros(T, 512), no_positions(T), alibi(T, slope))[0, -1]
            reach.append(1 + int((weights.flip(0).cumsum(0) < 0.99).sum()))
        rows.append((slope, *reach, math.exp(-slope * 100)))
    table("slope | tokens that hold 99 % of the weight, of 64 | of 512 | factor at distance 100", *rows)
    assert rows[0][1] == rows[0][2] == 10
    assert abs(rows[1][2] - rows[1][1]) <= 1
    assert rows[3][1] > 60 and rows[3][2] > 400


def test_a_learned_table_of_positions_ends_and_rope_does_not():
    """Why are BERT and GPT-2 limited to 512 and 1024 tokens, and is a Llama model limited in the same way?

    A learned table has a row for each position and none beyond, so there is nothing to add. RoPE is a formula
    with an angle for every position: a Llama model runs at any length, and its scores stay the same if all
    positions are shifted. Whether it still predicts well is another matter, see the next lesson.

    Code: model.py Transformer.hidden
    Break: model.py Transformer.hidden: `torch.arange(T, device=ids.device), None` becomes `torch.arange(T,
    device=ids.device).clamp(max=longest - 1), None`
    Source: Devlin et al. (2019), app. A.2; Radford et al. (2019), sec. 2.3; Su et al. (2021)
    问: 为什么 BERT 和 GPT-2 最长只能输入 512 和 1024 个词元？Llama 也有同样的限制吗？
    答: 可学习的位置表只有 512（或 1024）行，再往后就没有向量可加；RoPE 是公式，任何位置都有角度，所以 Llama
    在任意长度上都能运行，所有位置整体平移时分数也不变，但超出训练长度后效果是否还好是另一回事。
    """
    T, longest = 48, 16
    ids = torch.randint(64, (1, T))
    shape = dict(vocab_size=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    gpt2 = GPT2Model(GPT2Config(n_positions=longest, **shape)).eval()
    model = drawn_model(block_size=longest)
    with pytest.warns(UserWarning, match="not seen more than 16 tokens"):
        logits = model(ids)
    shifted = forward(model, ids, positions=torch.arange(T) + 1000)
    rows = [
        ("GPT-2, with a table of 16", gpt2(ids[:, :16]).last_hidden_state.size(1), "IndexError"),
        ("model.py, with block_size 16", model(ids[:, :16]).size(1), logits.size(1)),
    ]
    table("model | outputs for 16 tokens | for 48", *rows)
    print(f"    shifted by 1000 positions, scores differ by {largest(shifted - logits):.0e}")
    with pytest.raises(IndexError):
        gpt2(ids[:, :17])
    assert logits.shape == (1, T, 64)
    assert largest(shifted - logits) < 1e-2


def test_running_beyond_the_trained_length_hurts():
    """Can a model with RoPE read a text of any length?

    It runs at any length, but beyond that of training it meets angles that it never saw and averages over
    more keys than ever, and its loss rises. Here each token is the same as the one four places before it, so
    that no place is harder than another: all that is lost is lost by the length. Trained on 16 tokens, the
    model is about as bad as an even guess, or worse, beyond the 64th.

    Often told: RoPE generalises to unseen lengths.
    Code: model.py rope
    Break: model.py rope: `positions[..., None] * frequencies` becomes `positions[..., None] % 4 *
    frequencies`
    Source: Press et al. (2022, arXiv 2108.12409), sec. 2.2; Chen et al. (2023, arXiv 2306.15595)
    问: RoPE 模型可以直接处理任意长度的文本吗？
    答: 能运行，但超出训练长度后会遇到没见过的旋转角度和更多的键，损失会升高；在这个只需复制 4 个位置之前词元
    的任务上，用 16 个词元训练的模型读到 64 个词元以后就与瞎猜差不多，甚至更差。
    """

    def batch(step, T=16, B=16):
        x = torch.randint(8, (B, 4)).repeat(1, T // 4 + 1)
        return x[:, :T], x[:, 1 : T + 1]

    shape = dict(vocab_size=8, n_layer=1, n_embd=32, n_head=2, n_kv_head=1, n_hidden=64)
    model = Transformer(tiny_config(block_size=16, **shape))
    train(model, batch, 200, 2e-2)
    ids, targets = batch(0, 256, 32)
    with torch.no_grad(), pytest.warns(UserWarning, match="not seen more than 16 tokens"):
        losses = F.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none").mean(0)
    guess = math.log(8)
    spans = ((4, 16), (16, 32), (32, 64), (64, 256))
    table("positions | loss", *((f"{a} to {b - 1}", losses[a:b].mean()) for a, b in spans))
    print(f"    an even guess among 8 tokens: ln 8 = {guess:.3f}")
    middles = range(6, 256, 5)
    curves = {
        "model trained on 16 tokens": (middles, [losses[i - 2 : i + 3].mean() for i in middles]),
        "even guess": (middles, [guess] * len(middles)),
    }
    lines("Beyond the trained length the loss rises", "position", "loss (mean of 5 positions)", curves)
    assert losses[4:16].mean() < 0.4
    assert losses[64:].mean() > 0.8 * guess


def test_times_sqrt_d_an_embedding_is_as_long_as_its_sinusoids():
    """Why does the first Transformer multiply embeddings by the square root of d?

    The paper gives no reason, but lengths suggest one. The vector of sines and cosines has length sqrt(d/2).
    An embedding drawn with variance 1/d has length about 1, and would drown in it; times sqrt(d) its length
    is about sqrt(d), of the same order. With RoPE nothing is added to the embedding, and Llama does not
    multiply (Gemma does).

    Often told: so that the variance of the matrix converges better. It is a matter of size against what is
    added.
    Compare: model.py Transformer.hidden: takes the embedding as it is, since RoPE adds nothing to it
    Source: Vaswani et al. (2017), sec. 3.4 and 3.5; for Gemma, transformers' modeling_gemma.py
    问: 原始 Transformer 为什么要把词嵌入乘以 √d？
    答: 正弦位置向量的长度是 √(d/2)，而方差为 1/d 的词嵌入长度约为 1，直接相加会被位置淹没；乘以 √d 后长度为
    √d，两者大小相当。Llama 用 RoPE，不往嵌入上加东西，也就不缩放（同样用 RoPE 的 Gemma 仍然缩放）。
    """
    d = 512
    embedding = torch.randn(1000, d) / math.sqrt(d)
    vectors = {
        "embedding, variance 1/d": embedding,
        "sinusoids": sinusoids(1000, d),
        "embedding times sqrt(d)": math.sqrt(d) * embedding,
    }
    rows = [(name, vector.norm(dim=-1).mean()) for name, vector in vectors.items()]
    table("vector of 512 channels | length", *rows)
    drawn, added, multiplied = (row[1] for row in rows)
    assert abs(drawn - 1) < 0.02
    assert abs(added - math.sqrt(d / 2)) < 0.01
    assert abs(multiplied - math.sqrt(d)) < 0.5
