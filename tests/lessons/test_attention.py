"""Attention: what softmax(Q K^T / sqrt(D)) V does, and what heads are for."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import Attention, KVCache, Transformer, rope

from .book import causal, largest, lines, moved_by, table, tiny_config, train, weights_of


def unturned(T, config):
    """cos and sin for T tokens that all stand at position 0: RoPE turns nothing."""
    return rope(torch.zeros(T), config, torch.float32)


class Given(nn.Module):
    """In place of a linear layer: the same tensor, whatever comes in."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def attend(q, k, v, n_head=1):
    """What model.py's Attention makes of these q (B, T, H * D), k and v (B, T, K * D), without positions.

    -> (B, T, H * D), the results of the heads side by side, as o_proj would get them.
    """
    B, T, width = q.shape
    D = width // n_head
    config = tiny_config(n_embd=2, n_head=n_head, n_kv_head=k.size(-1) // D, head_dim=D)
    attention = Attention(config)
    attention.q_proj, attention.k_proj, attention.v_proj = Given(q), Given(k), Given(v)
    attention.o_proj = nn.Identity()
    return attention(torch.zeros(B, T, 2), *unturned(T, config))


def weights_for(q, k):
    """The weights (B, T, T) of one head of model.py's Attention for these q and k (B, T, D); T <= D."""
    B, T, D = q.shape
    return attend(q, k, torch.eye(T, D).expand(B, T, D))[..., :T]


def count_flops(config, T):
    """FLOPs of the products in model.py's Attention: of q_proj, k_proj ..., and of "scores", the rest."""
    attention, x = Attention(config), torch.randn(1, T, config.n_embd)
    # the counter does not see into the fused kernel; MATH is the same in single products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention(x, *unturned(T, config))
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    projections = {name: flops[f"Attention.{name}"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    return {**projections, "scores": flops["Attention"] - sum(projections.values())}


def repeated(step):
    """Six random tokens again and again: only attention can know what comes after the first six."""
    ids = torch.randint(16, (16, 6)).repeat(1, 3)
    targets = ids[:, 1:].clone()
    targets[:, :5] = -100
    return ids[:, :-1], targets


def largest_saved(function):
    """How many numbers the largest tensor has that the function saves for the backward pass."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return max(sizes)


def test_attention_averages_with_weights_that_come_from_the_input():
    """What separates attention from a fully connected layer over positions?

    Both mix the vectors of all positions. The layer has learned one weight for each pair of positions, so it
    is linear and made for one T. Attention computes its weights from the tokens, with matrices that know no
    T; they are positive and sum to 1, so each head returns an average of values. They follow the content:
    without positions and mask, shuffled tokens give the same outputs, shuffled.

    Often told: a fully connected layer has values only, attention adds queries and keys to look things up.
    That is an image; what can be tested is that the weights depend on the input.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `(q, k, v, attn_mask=mask)` becomes `(0 * q, k, v, attn_mask=mask)`
    Source: Vaswani et al. (2017), sec. 3.2
    问: 注意力和在位置维度上做的全连接层有什么区别？
    答: 两者都在混合各个位置的向量，但全连接层的混合权重是学好的常数，只适用于固定长度；注意力的权重由输入经
    softmax(QK^T) 算出，非负且和为 1，随内容而变，适用于任意长度。
    """
    T, C = 8, 64
    attention, layer = Attention(tiny_config()), nn.Linear(T, T, bias=False)

    def attend_to_all(x):
        n = x.size(1)
        return attention(x, *unturned(n, tiny_config()), torch.ones(1, 1, n, n).bool())

    def mix(x):
        return layer(x.mT).mT

    x, other, order = torch.randn(1, T, C), torch.randn(1, T, C), torch.arange(T).roll(3)
    rows = []
    for name, f in (("attention", attend_to_all), ("layer over positions", mix)):
        from_linear = largest(f(x + other) - f(x) - f(other))
        rows.append((name, from_linear, largest(f(x[:, order]) - f(x)[:, order])))
    table("f | f(x + y) - f(x) - f(y) | f(shuffled x) - shuffled f(x)", *rows)
    assert rows[0][1] > 0.01 and rows[0][2] < 1e-5
    assert rows[1][1] < 1e-5 and rows[1][2] > 0.1
    weights = weights_of(attention, x[0], torch.zeros(T), torch.ones(T, T).bool())
    assert (weights > 0).all() and torch.allclose(weights.sum(-1), torch.ones(4, T))
    assert attend_to_all(torch.randn(1, 50, C)).shape == (1, 50, C)
    with pytest.raises(RuntimeError):
        mix(torch.randn(1, 50, C))


def test_additive_attention_holds_d_times_as_many_numbers_as_dot_products():
    """Why dot products rather than additive attention?

    Additive attention scores a pair by w . tanh(q + k): for all pairs a tensor of T x T x D, with a tanh for
    each of its numbers. Dot products are one matrix product with a result of T x T. Both take about T^2 D
    multiplications, but a matrix product is what hardware does best.

    Often told: additive attention is better for wide heads. It was, against dot products that are not scaled;
    the division by sqrt(D) is there to close that gap.
    Compare: model.py Attention.forward: scaled dot products
    Source: Bahdanau et al. (2015, arXiv 1409.0473); Vaswani et al. (2017), sec. 3.2.1
    问: 为什么用点积注意力而不用加性注意力？
    答: 两者的理论计算量同阶，但加性注意力要保存 T×T×D 的中间张量并逐元素算 tanh，点积只是一次结果为 T×T 的矩
    阵乘法，更快也更省显存；不缩放时，D 越大点积效果越差，除以 √D 正是为了弥补这一点。
    """
    T, D = 64, 32
    q, k = torch.randn(2, T, D, requires_grad=True)
    w = torch.randn(D, 1)

    def additive():
        return (torch.tanh(q[:, None] + k) @ w)[..., 0].softmax(-1)

    def dot_products():
        return (q @ k.T / math.sqrt(D)).softmax(-1)

    rows = []
    for name, weights in (("w . tanh(q + k)", additive), ("q . k / sqrt(D)", dot_products)):
        with FlopCounterMode(display=False) as counter:
            assert weights().shape == (T, T)
        rows.append((name, counter.get_total_flops(), largest_saved(weights)))
    table("score | FLOPs of products | largest tensor saved", *rows)
    assert rows[0][1] == rows[1][1] == 2 * T * T * D
    assert rows[0][2] == T * T * D and rows[1][2] == T * T


def test_scaling_by_sqrt_d_keeps_the_variance_of_scores_at_one():
    """Why are the dot products divided by the square root of the head's width?

    If the entries of q and k are independent, with mean 0 and variance 1, q . k has variance D: a typical
    score grows like sqrt(D). Divided by sqrt(D) the scores have variance 1, whatever the width; the softmax
    comes after it.

    Often told: it prevents exploding gradients. That is a part of it, as the next lesson shows.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True, enable_gqa=True` becomes `is_causal=True,
    enable_gqa=True, scale=1.0`
    Source: Vaswani et al. (2017), sec. 3.2.1
    问: 注意力中的点积为什么要除以 √d？
    答: 若 q、k 的各分量相互独立、均值为 0、方差为 1，点积的方差就是 d；除以 √d 后，无论注意力头有多宽，
    分数的方差都保持为 1。
    """
    rows = []
    for D in (16, 64, 256):
        q, k = torch.randn(2, 2000, 2, D)  # of 2000 texts, two tokens each
        scores = (q * k).sum(-1)
        weights = weights_for(q, k)[:, 1]  # of the second token, which sees both
        # the logarithm of their ratio is the difference of two scores, with twice the variance of one
        differences = (weights[:, 0] / weights[:, 1]).log()
        rows.append((D, scores.var(), (scores / math.sqrt(D)).var(), differences.var() / 2))
    table("D | variance of q.k | of q.k / sqrt(D) | of a score in model.py", *rows)
    for D, raw, scaled, of_model in rows:
        assert abs(raw / D - 1) < 0.15
        assert abs(scaled - 1) < 0.15
        assert abs(of_model - 1) < 0.15


def test_an_unscaled_softmax_saturates_and_most_queries_get_no_gradient():
    """What goes wrong without the scaling?

    Scores with a standard deviation of sqrt(D) make the softmax nearly one-hot: one weight near 1, the rest
    near 0. Most queries then get hardly any gradient, and the few whose two best keys score nearly the same
    get a huge one. With the scaling, neither weights nor gradients depend on D.

    Often told: the gradients vanish, or: they explode. Most do the first, a few the second.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True, enable_gqa=True` becomes `is_causal=True,
    enable_gqa=True, scale=1.0`
    Source: Vaswani et al. (2017), sec. 3.2.1
    问: 注意力分数不做缩放会出什么问题？
    答: 分数的标准差达到 √d，softmax 接近 one-hot：多数 query 几乎得不到梯度，只有最高的两个分数十分接近的少数
    query 得到很大的梯度。缩放后，权重和梯度的大小都与 d 无关。
    """
    B, T, widths = 200, 16, (16, 64, 256, 1024)
    rows, peaks = [], {"scaled": [], "not scaled": []}
    for D in widths:
        q, k = torch.randn(2, B, T, D)
        wanted = torch.randn(B, T)  # the gradient that comes back to the weights
        row = [D]
        for name, factor in (("not scaled", math.sqrt(D)), ("scaled", 1)):
            q = q.detach().requires_grad_()
            weights = weights_for(factor * q, k)[:, -1]  # of the last token, which sees all T
            (weights * wanted).sum().backward()
            gradients = q.grad[:, -1].norm(dim=-1)
            peaks[name].append(weights.amax(-1).mean().item())
            row += [peaks[name][-1], gradients.median(), gradients.mean()]
        rows.append(row)
    heads = "D | not scaled: largest weight | size of q's gradient: median | mean"
    table(f"{heads} | scaled: largest weight | median | mean", *rows)
    curves = {name: (widths, values) for name, values in peaks.items()}
    title, ylabel = "Scores with and without 1/sqrt(D)", "largest of 16 weights, mean"
    lines(title, "width of a head, D", ylabel, curves, log="x")
    _, peak, median, mean, scaled_peak, scaled_median, scaled_mean = rows[-1]
    assert peak > 0.9 and median < 0.02 and mean > 0.5
    assert scaled_peak < 0.35 and 0.15 < scaled_median < scaled_mean < 0.5
    assert abs(scaled_peak - rows[0][4]) < 0.05


def test_dividing_after_the_softmax_does_not_undo_saturation():
    """Is softmax(Q K^T) / sqrt(D) the same thing?

    No. Dividing afterwards shrinks the output of an unscaled softmax by sqrt(D) and changes nothing else: the
    rows sum to 1 / sqrt(D), and the largest weight keeps its share.

    Often told: notes give the formula softmax(Q K^T) / sqrt(D) K. The root belongs inside the softmax, and
    the last K should be V.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `y = F.scaled_dot_product_attention(q, k, v.to(q.dtype),
    is_causal=True, enable_gqa=True)` becomes `y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
    enable_gqa=True, scale=1.0) / math.sqrt(self.head_dim)`
    Source: Vaswani et al. (2017), eq. 1
    问: 先做 softmax 再除以 √d，和先除以 √d 再做 softmax 一样吗？
    答: 不一样：之后再除只是把输出缩小 √d 倍，每行之和变成 1/√d，最大权重所占的份额不变，softmax 照样饱和。
    """
    T, D = 32, 256
    q, k = torch.randn(2, 200, T, D)
    before = weights_for(q, k)[:, -1]  # of the last token, which sees all T
    after = weights_for(math.sqrt(D) * q, k)[:, -1] / math.sqrt(D)  # the factor undoes model.py's division
    rows = []
    for name, weights in (("before, as in model.py", before), ("after", after)):
        share = weights.amax(-1) / weights.sum(-1)
        rows.append((name, weights.sum(-1).mean(), share.mean()))
    table("divided | sum of a row | share of the largest weight", *rows)
    assert abs(rows[0][1] - 1) < 1e-4 and rows[0][2] < 0.3
    assert abs(rows[1][1] - 1 / math.sqrt(D)) < 1e-4 and rows[1][2] > 0.85


def test_scaling_by_more_than_sqrt_d_flattens_attention():
    """What if the scores are divided by the square root of the model's width C, or by both roots?

    Scores that would have a standard deviation of 1 get sqrt(D / C) = 1/sqrt(H), or with both divisions
    1/sqrt(C). Then all keys have nearly the same weight: the entropy of a row comes close to ln T, that of
    equal weights. The program still runs, and only training can make W_q and W_k larger again.

    Often told: divide by sqrt(embed_size), as a much copied listing of multi-head attention does. The width
    of a head is meant; the two are equal only for a single head.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True, enable_gqa=True` becomes `is_causal=True,
    enable_gqa=True, scale=1 / self.head_dim`
    Source: Vaswani et al. (2017), eq. 1
    问: 多头注意力的分数应除以 √d_head 还是 √d_model？除多了会怎样？
    答: 应除以 √d_head；除以 √d_model 会使初始分数的标准差从 1 降到 1/√H，两个都除则降到 1/√d_model，
    注意力几乎均匀，熵接近 ln T，而程序不会报错。
    """
    T, C, H = 32, 512, 8
    D = C // H
    q, k = torch.randn(2, 200, T, D)
    too_much = {"sqrt(D)": 1, "sqrt(C)": math.sqrt(C / D), "sqrt(D) and sqrt(C)": math.sqrt(C)}
    rows = []
    for name, further in too_much.items():
        weights = weights_for(q / further, k)[:, -1]  # of the last token, which sees all T
        entropy = -(weights * weights.log()).sum(-1).mean()
        rows.append((name, 1 / further, entropy, math.log(T)))
    table("divided by | standard deviation of scores | entropy of the weights | ln T", *rows)
    right, by_width, by_both = (math.log(T) - row[2] for row in rows)
    assert right > 0.3 and by_width < 0.1 and by_both < 0.002


def test_folding_the_scale_into_the_init_changes_the_steps_of_adam_and_not_of_adafactor():
    """T5 has no 1/sqrt(D). How can that work?

    It draws W_q with a standard deviation sqrt(D) times smaller, which gives the same scores at the start.
    The gradient of W_q is then sqrt(D) times as large. A step of Adam, whose size does not depend on the
    gradient's, moves the scores sqrt(D) times as far. Adafactor, with which T5 was trained, makes steps
    relative to the size of a matrix: to it both are the same.

    Compare: model.py Attention.forward: divides the scores, and W_q is drawn like W_k
    Source: Raffel et al. (2020, arXiv 1910.10683); transformers, modeling_t5.py, _init_weights; Shazeer &
    Stern (2018, arXiv 1804.04235)
    问: T5 的注意力没有除以 √d，为什么也能训练？
    答: T5 把 1/√d 并入 W_q 的初始化，初始分数不变；此时 W_q 的梯度是原来的 √d 倍，用 Adam 时同样的学习率会使
    分数多变 √d 倍，而 T5 所用的 Adafactor 步长与参数大小成比例，所以两者等价。
    """
    T, D = 16, 64
    x, k, v = torch.randn(3, 1, T, D)
    drawn, wanted = torch.randn(D, D) / math.sqrt(D), torch.randn(1, T, D)

    def one_step(folded, Optimizer):
        """-> what attention returns at the start, by how much a step moves it, and the gradient of W_q."""
        W_q = nn.Parameter(drawn / math.sqrt(D) if folded else drawn.clone())
        factor = math.sqrt(D) if folded else 1  # undoes model.py's division
        y = attend(factor * (x @ W_q.T), k, v)
        (y * wanted).sum().backward()
        Optimizer([W_q], lr=1e-4).step()
        return y, (attend(factor * (x @ W_q.T), k, v) - y).norm(), W_q.grad.norm()

    rows = []
    for Optimizer in (torch.optim.Adam, torch.optim.Adafactor):
        y, moved, gradient = one_step(False, Optimizer)
        folded_y, folded_moved, folded_gradient = one_step(True, Optimizer)
        difference = largest(folded_y - y)
        rows.append((Optimizer.__name__, difference, folded_gradient / gradient, folded_moved / moved))
    table("optimizer | difference at the start | gradient, times | a step moves the output, times", *rows)
    for _, difference, gradient, _ in rows:
        assert difference < 1e-5 and abs(gradient - math.sqrt(D)) < 0.01
    assert abs(rows[0][3] - math.sqrt(D)) < 0.5 and abs(rows[1][3] - 1) < 0.05


def test_a_matrix_shared_by_queries_and_keys_makes_each_token_look_at_itself():
    """May queries and keys share one matrix?

    They may, at a price. If W_q = W_k, the scores are symmetric ("i looks at j" forces "j looks at i"), and
    those on the diagonal are |W x|^2 / sqrt(D), about sqrt(D) if the entries of W x have variance 1: each
    token looks at itself. Reformer shares the matrix and works as well, but scales its keys to length 1 and
    lets a token see itself only if there is nothing else to see.

    Often told: in the Transformer Q, K and V are equal. It has a matrix of its own for each of them.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `self.k_norm(self.k_proj(x)` becomes `self.k_norm(self.q_proj(x)`
    Source: Vaswani et al. (2017), sec. 3.2.2; Kitaev et al. (2020, arXiv 2001.04451) for Reformer
    问: Q 和 K 能共用一个投影矩阵吗？
    答: 可以，但分数矩阵会变成对称的，而且对角线为 |Wx|²/√d，Wx 各分量的方差为 1 时约为 √d，每个词元主要只看自
    己；Reformer 共用 Q、K，为此把 K 归一化为单位长度，并禁止词元关注自己（除非没有别的可看）。
    """
    T, D = 16, 64
    x, rows = torch.randn(T, D), []
    for shared in (True, False):
        attention = Attention(tiny_config(n_embd=D, n_head=1, n_kv_head=1))
        for linear in (attention.q_proj, attention.k_proj):
            nn.init.normal_(linear.weight, std=D**-0.5)  # entries of q and k with variance 1
        if shared:
            attention.k_proj = attention.q_proj
        scores = attention.q_proj(x) @ attention.k_proj(x).T / math.sqrt(D)
        weights = weights_of(attention, x, mask=torch.ones(T, T).bool())[0]
        asymmetry, diagonal = largest(scores - scores.T), scores.diagonal().mean()
        rows.append((shared, asymmetry, diagonal, weights.diagonal().mean(), 1 / T))
    heads = "shared | largest asymmetry | mean score of itself | mean weight of itself | if all were equal"
    table(heads, *rows)
    shared, apart = rows
    assert shared[1] < 1e-4 and apart[1] > 0.5
    assert abs(shared[2] / math.sqrt(D) - 1) < 0.3 and abs(apart[2]) < 1
    assert shared[3] > 0.8 and apart[3] < 0.2


def test_if_keys_are_values_then_without_rope_a_head_returns_more_of_what_it_asks_for():
    """May keys and values share one matrix?

    They may: before the Transformer, attention used the same vectors as both. It saves a projection, and half
    of the cache if keys are stored before RoPE turns them. But, without RoPE, the weight of a value v then
    grows with q . v, so what a head returns, y, has q . y >= q . (mean of the values): never less of what it
    asks for than a plain mean. With a matrix of their own the values may say anything; in a new model half of
    all answers go the other way.

    Often told: keys and values must differ, since a key is the label and a value the content. One vector can
    be both, the label in some of its channels and the content in others. Sharing costs these channels.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `v = self.v_proj(x)` becomes `v = self.k_proj(x)`
    Source: Luong et al. (2015, arXiv 1508.04025), sec. 3, for keys that are values; the inequality is
    Chebyshev's for sums
    问: K 和 V 能共用一个投影矩阵吗？
    答: 可以，能省一个投影，缓存也可减半（须存旋转前的 K）；代价是（不计 RoPE 时）权重随 q·v 增大，q 与输出的
    点积恒不小于 q 与 v 均值的点积，即与直接取均值相比，注意力头只会更偏向它所查询的东西，用来匹配的和要传递的
    信息只能挤在同一个向量里。
    """
    config = tiny_config(n_kv_head=4)
    B, T, H, D = 200, 10, config.n_head, config.head_dim
    x, rows = torch.randn(B, T, config.n_embd), []
    for shared in (True, False):
        attention = Attention(config)
        attention.o_proj = nn.Identity()
        if shared:
            attention.k_proj = attention.v_proj
        indifferent = copy.deepcopy(attention)  # q = 0: all weights are equal, and it returns the mean
        nn.init.zeros_(indifferent.q_proj.weight)
        y, mean = (a(x, *unturned(T, config))[:, -1].view(B, H, D) for a in (attention, indifferent))
        q = attention.q_proj(x)[:, -1].view(B, H, D)
        more = (q * (y - mean)).sum(-1)
        n_weights = sum(p.numel() for p in attention.parameters())
        rows.append((shared, n_weights, more.mean(), (more < -1e-5).float().mean()))
    table("shared | weights of q, k, v | mean of q.y - q.mean | share of heads where it is negative", *rows)
    assert rows[0][1] * 3 == rows[1][1] * 2
    assert rows[0][2] > 0.01 and rows[0][3] == 0
    assert 0.35 < rows[1][3] < 0.65
    # label and content in one vector: the last token asks for the third label, and gets its content, too
    labels, contents = torch.eye(8), torch.randn(8, 8)
    both = torch.cat((labels, contents), dim=-1)[None]
    asked = torch.cat((1000 * labels[2], torch.zeros(8))).expand(1, 8, 16)
    assert torch.allclose(attend(asked, both, both)[0, -1, 8:], contents[2], atol=1e-5)


def test_heads_are_slices_of_one_projection():
    """Does each head have a linear layer of its own?

    In effect yes: the rows of one large matrix are cut into heads, which equals a layer for each head. Every
    head reads all channels of its token; only what comes out is narrow.

    Often told: each head gets its slice of the embedding. The slice is taken after the projection; cut
    before, as in listings with Linear(head_dim, head_dim), a head is blind to all other channels.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1,
    2)` becomes `self.q_norm(self.q_proj(x).view(B, -1, T, self.head_dim))`
    Source: Vaswani et al. (2017), sec. 3.2.2
    问: 多头注意力中，每个头有自己的线性层吗？
    答: 等效于有：一个大矩阵的各行切成 H 份，每份就是一个头的投影；每个头都读取词元的全部通道，切分发生在投影
    之后，而不是把 embedding 切开。
    """
    config = tiny_config(n_kv_head=4)
    C, H, D = config.n_embd, config.n_head, config.head_dim
    attention, x = Attention(config), torch.randn(10, C)
    one_head = Attention(tiny_config(n_head=1, n_kv_head=1, head_dim=D))
    for h in range(H):
        for name in ("q_proj.weight", "k_proj.weight"):
            own = attention.state_dict()[name][h * D : (h + 1) * D]
            one_head.state_dict()[name].copy_(own)
        assert torch.allclose(weights_of(attention, x)[h], weights_of(one_head, x)[0], atol=1e-5)

    def channels_read(attention):
        """How many channels of the last token move what head 0 returns there."""
        attention.o_proj = nn.Identity()
        vectors = x[None].clone().requires_grad_()
        attention(vectors, *unturned(10, config))[0, -1, :D].sum().backward()
        return int((vectors.grad[0, -1] != 0).sum())

    sliced = copy.deepcopy(attention)
    slices = torch.block_diag(*torch.ones(H, D, D))  # head h reads the channels of slice h only
    for linear in (sliced.q_proj, sliced.k_proj, sliced.v_proj):
        linear.weight.data *= slices
    rows = []
    for name, a in (("slices of a projection", attention), ("projections of slices", sliced)):
        rows.append((name, channels_read(a), int((a.q_proj.weight != 0).sum())))
    table("heads | channels that a head reads | weights in W_q", *rows)
    assert [row[1] for row in rows] == [C, D]
    assert [row[2] for row in rows] == [C * C, H * D * D]


def test_without_the_transpose_heads_attend_to_heads():
    """Why is there a transpose after the view into heads?

    A matrix product q @ k.mT works on the last two axes. Without the transpose these are heads and channels:
    the heads of one token attend to each other, tokens never meet, and every shape is still right.

    Often told: a right shape shows that the code is right. There are listings of multi-head attention that
    lack the transpose and print the expected shape.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True,
    enable_gqa=True)` becomes `F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k,
    v))).transpose(1, 2)`
    Source: the broadcasting rules of torch.matmul
    问: 多头注意力里 view 成多个头之后为什么要 transpose(1, 2)？
    答: 矩阵乘法只作用于最后两维；不转置时最后两维是头和通道，结果是同一词元的各个头之间互相关注，词元之间没有
    任何交流，而形状仍然正确。
    """
    config = tiny_config(n_kv_head=4)
    T, H, D = 6, config.n_head, config.head_dim
    attention, x = Attention(config), torch.randn(1, T, config.n_embd)

    def as_in_model(x):
        return attention(x, *unturned(T, config))

    def without_transpose(x):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (linear(x).view(1, T, H, D) for linear in projections)
        return attention.o_proj(F.scaled_dot_product_attention(q, k, v).reshape(1, T, -1))

    rows = []
    for name, f in (("model.py", as_in_model), ("no transpose", without_transpose)):
        rows.append((name, str(tuple(f(x).shape)), moved_by(f, x, 0)[-1]))
    table("attention | shape | the last token moves when the first changes, by", *rows)
    assert rows[0][1] == rows[1][1]
    assert rows[0][2] > 1e-4 and rows[1][2] == 0


def test_splitting_into_heads_adds_no_flops():
    """Why is each head narrower than the model?

    So that H heads of width C/H cost what one of width C costs: T^2 C multiplications for the scores, as many
    for the averages, and 4 T C^2 for the projections. H heads of the full width would cost H times as much.

    Often told: attention costs O(d^2), and heads reduce that. It costs O(T^2 d + T d^2), however many heads.
    Code: model.py Config.flops_per_token
    Break: model.py Config.flops_per_token: `4 * self.n_layer * self.n_head * self.head_dim * length` becomes
    `4 * self.n_layer * self.n_head * self.n_embd * length`
    Source: Vaswani et al. (2017), sec. 3.2.2
    问: 多头注意力为什么要让每个头变窄？会增加计算量吗？
    答: 变窄正是为了不增加计算量：H 个宽为 d/H 的头与一个宽为 d 的头计算量相同，都是 O(T²d + Td²)；如果每个头
    都保持宽度 d，计算量就是 H 倍。
    """
    C, T, rows = 64, 32, []
    for H, D in ((1, 64), (8, 8), (8, 64)):
        config = tiny_config(n_layer=1, n_embd=C, n_head=H, n_kv_head=H, head_dim=D)
        flops = count_flops(config, T)
        scores = flops.pop("scores")
        planned = T * (config.flops_per_token(T) - config.flops_per_token(0))
        rows.append((H, D, sum(flops.values()), scores, planned))
    heads = "heads | width of a head | FLOPs of projections | of scores and averages"
    table(f"{heads} | the latter by flops_per_token", *rows)
    one, split, full = (row[2:] for row in rows)
    assert one == split == (8 * T * C * C, 4 * T * T * C, 4 * T * T * C)
    assert full == tuple(8 * n for n in one)


def test_one_head_averages_what_two_heads_keep_apart():
    """Why several heads?

    A head returns one weighted average. If two places matter, a single head that looks at both alike returns
    the same whichever is which; two heads return both, side by side.

    Often told: with one head, a token would attend too much to itself. One head can look anywhere, too.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `y.transpose(1, 2).reshape(B, T, -1)` becomes `y.mean(1,
    keepdim=True).expand_as(y).transpose(1, 2).reshape(B, T, -1)`
    Source: Vaswani et al. (2017), sec. 3.2.2
    问: 为什么要用多个注意力头？
    答: 一个头只返回一个加权平均：若两个位置都重要而权重相同，就分不清谁是谁；两个头各看一处，结果拼接起来，
    两边的信息都保留。
    """
    D = 8
    a, b = torch.randn(2, D)
    keys = torch.eye(2, D)  # by which a query tells the first place from the second
    queries = {"one, looks at both": torch.zeros(D), "two, one for each place": 100 * keys.flatten()}

    def read(q, values):
        """What the heads of the second token return; all of them share keys and values."""
        return attend(q.expand(1, 2, -1), keys[None], values[None], n_head=len(q) // D)[0, -1]

    rows = []
    for name, q in queries.items():
        a_then_b, b_then_a = read(q, torch.stack((a, b))), read(q, torch.stack((b, a)))
        rows.append((name, largest(a_then_b - b_then_a)))
    table("heads | how far apart 'a, then b' and 'b, then a' are", *rows)
    assert rows[0][1] < 1e-6 and rows[1][1] > 0.1


def test_grouped_query_attention_is_multi_head_attention_with_shared_keys_and_values():
    """What are multi-query and grouped-query attention, and what do they save?

    H query heads share K heads of keys and values: K = H is multi-head, K = 1 multi-query, anything between
    is grouped-query attention. It equals multi-head attention in which each key and value head is copied H/K
    times, next to each other. The weights and FLOPs of k_proj and v_proj and the KV cache shrink by the
    factor H/K; the FLOPs of the scores and averages do not.

    Often told: grouping makes the T^2 part of attention cheaper to compute. There are as many scores as
    before; a generated token only has fewer keys and values to read.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `(q, k, v.to(q.dtype), is_causal=True, enable_gqa=True)` becomes
    `(q, *(kv.repeat(1, q.size(1) // k.size(1), 1, 1) for kv in (k, v)), is_causal=True)`
    Source: Shazeer (2019, arXiv 1911.02150); Ainslie et al. (2023, arXiv 2305.13245), sec. 2.2
    问: MQA、GQA 和 MHA 有什么区别？省下了什么？
    答: H 个 query 头共用 K 个 key/value 头：K = H 是 MHA，K = 1 是 MQA，介于其间的是 GQA；k_proj、v_proj 的参
    数和计算量以及 KV 缓存都缩小为原来的 K/H，而计算注意力分数的 FLOPs 不变。
    """
    H, D, T = 8, 8, 10
    x, rows = torch.randn(1, T, H * D), []
    full = Attention(tiny_config(n_head=H, n_kv_head=H))
    for K in (8, 2, 1):
        config = tiny_config(n_layer=1, n_head=H, n_kv_head=K)
        grouped = Attention(config)
        weights = grouped.state_dict()
        for name in ("k_proj.weight", "v_proj.weight"):
            heads = weights[name].view(K, D, H * D)
            weights[name] = heads.repeat_interleave(H // K, dim=0).flatten(0, 1)
        full.load_state_dict(weights)
        cos, sin = rope(torch.arange(T), config, x.dtype)
        error = largest(grouped(x, cos, sin) - full(x, cos, sin))
        n_weights = grouped.k_proj.weight.numel() + grouped.v_proj.weight.numel()
        flops, cache = count_flops(config, T), KVCache(config, batch_size=1, max_len=1)
        n_cached = cache.k.numel() + cache.v.numel()
        rows.append((K, error, n_weights, flops["k_proj"] + flops["v_proj"], n_cached, flops["scores"]))
    heads = "K | difference from multi-head | weights of k_proj and v_proj | their FLOPs | cached for a token"
    table(f"{heads} | FLOPs of scores and averages", *rows)
    for K, error, *shrinking, of_scores in rows:
        assert error < 1e-5 and of_scores == rows[0][-1]
        assert [n * H // K for n in shrinking] == list(rows[0][2:5])


def test_key_and_value_heads_made_of_trained_ones_recover_in_a_few_steps():
    """How is a multi-head model turned into one with grouped queries?

    The key and value heads of each group are averaged into one, then training goes on for a while, in the
    paper for 5% of the steps of pre-training ("uptraining"). The mean is the closest single head: for
    independent heads of variance s^2 in groups of n its squared error is (1 - 1/n) s^2, half that of keeping
    the first. The loss jumps, and falls fast; heads drawn anew have to learn from scratch. In a model as
    small as this one, luck decides whether the mean or the first head does better.

    Often told: several multi-query models are merged. It is the heads of one multi-head model.
    Compare: model.py Config: n_kv_head is chosen before training, and nothing changes it later
    Source: Ainslie et al. (2023, arXiv 2305.13245), sec. 2.1; in its fig. 4 the mean does better than the
    first head, and both better than heads drawn anew
    问: 怎样把训练好的 MHA 模型转换成 GQA？
    答: 把每组的 key 头和 value 头各自取平均，合成一个头，再用原预训练约 5% 的步数继续训练（uptraining）；
    均值是最小二乘意义下的最佳替代，损失会先跳升再很快恢复，随机重新初始化的头则要从头学起。
    """
    K, D, C = 2, 8, 32
    shape = dict(vocab_size=16, n_layer=1, n_head=4, n_embd=C, n_hidden=64)
    model, test = Transformer(tiny_config(**shape, n_kv_head=4)), repeated(0)
    train(model, repeated, 100, 1e-2)
    rows = [("all four, 100 steps", 0, model.loss(*test), "")]
    for name in ("means of two", "the first of two", "drawn anew"):
        weights, errors = model.state_dict(), []
        for key in weights:
            if "k_proj" in key or "v_proj" in key:
                heads = weights[key].view(K, 2, D, C)  # groups of two
                ways = {
                    "means of two": heads.mean(1),
                    "the first of two": heads[:, 0],
                    "drawn anew": heads.std() * torch.randn(K, D, C),
                }
                errors.append((heads - ways[name][:, None]).square().mean() / heads.square().mean())
                weights[key] = ways[name].flatten(0, 1)
        grouped = Transformer(tiny_config(**shape, n_kv_head=K))
        grouped.load_state_dict(weights)
        before = grouped.loss(*test)
        train(grouped, repeated, 25, 1e-2)
        rows.append((name, sum(errors) / 2, before, grouped.loss(*test)))
    table("key and value heads | squared error | loss at once | after 25 steps", *rows)
    trained, mean, first, anew = rows
    assert abs(mean[1] - 1 / 2) < 0.15 and 1.7 < first[1] / mean[1] < 2.3
    assert mean[2] > trained[2] + 0.1
    assert mean[3] < 0.5 and anew[3] > 1


def test_flashattention_is_exact_and_saves_memory_but_no_arithmetic():
    """What does FlashAttention do?

    It computes exact attention tile by tile, with a running maximum, sum and output for each query, so that
    the T x T scores never stand in memory: O(T) instead of O(T^2). It is faster because it reads and writes
    far less of the GPU's slow memory, not because it computes less: going backward it even computes the
    scores again. PyTorch's attention, which is called here, works that way on a CPU, too.

    Often told: it approximates; it is a way to multiply matrices; it computes less. A kernel may skip tiles
    that the mask hides, but that saving is due to the mask.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True,
    enable_gqa=True)` becomes `(q @ k.mT / math.sqrt(self.head_dim)).masked_fill(torch.ones(T,
    T).triu(1).bool(), -math.inf).softmax(-1) @ v`
    Source: Dao et al. (2022, arXiv 2205.14135), algorithm 1; Milakov & Gimelshein (2018, arXiv 1805.02867)
    问: FlashAttention 做了什么？为什么快？
    答: 它分块计算精确的注意力，用在线 softmax 维护每个 query 的最大值、和与输出，不在显存中存放 T×T 的分数；
    快在大幅减少显存读写，而不是减少计算量，反向传播时还要重算分数。
    """
    T, D, size = 128, 16, 32
    q, k, v = torch.randn(3, T, D, requires_grad=True)

    def plain():
        return (q @ k.T / math.sqrt(D)).masked_fill(~causal(T), -math.inf).softmax(-1) @ v

    def fused():
        return attend(q[None], k[None], v[None])[0]

    def tiles():
        maximum, total, output = torch.full((T, 1), -math.inf), torch.zeros(T, 1), torch.zeros(T, D)
        for keys in torch.arange(T).split(size):
            for queries in torch.arange(T).split(size):
                scores = q[queries] @ k[keys].T / math.sqrt(D)  # (size, size)
                scores = scores.masked_fill(keys > queries[:, None], -math.inf)
                new = torch.maximum(maximum[queries], scores.amax(-1, keepdim=True))
                p, rescale = (scores - new).exp(), (maximum[queries] - new).exp()
                total[queries] = total[queries] * rescale + p.sum(-1, keepdim=True)
                output[queries] = output[queries] * rescale + p @ v[keys]
                maximum[queries] = new
        return output / total, max(scores.numel(), output.numel())

    with FlopCounterMode(display=False) as of_plain:
        exact = plain()
    with torch.no_grad(), FlopCounterMode(display=False) as of_tiles:
        by_tiles, held_by_tiles = tiles()
    rows = [
        ("plain", 0, largest_saved(plain), of_plain.get_total_flops()),
        ("tiles, by hand", largest(by_tiles - exact), held_by_tiles, of_tiles.get_total_flops()),
        ("model.py", largest(fused() - exact), largest_saved(fused), "not counted"),
    ]
    table("way | difference | largest tensor | FLOPs of products", *rows)
    assert rows[1][1] < 1e-5 and rows[2][1] < 1e-5
    assert rows[0][2] == T * T and rows[1][2] == rows[2][2] == T * D
    assert rows[0][3] == rows[1][3]
