"""Inspection: looking inside a model with a few lines of hooks."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from data.loader import IGNORED
from finetune import averages, count_targets

from .book import CHARACTERS, SPEECH, causal, drawn_model, largest, table, to_ids
from .xray import attention_weights, cosine_distances, logit_lens, record, streams


class Double(nn.Module):
    """In place of a block: the stream, twice as long."""

    def forward(self, x, *args):
        return 2 * x


def weights_and_values(model, ids, layer):
    """The weights (H, T, T) of a layer and its values in the stream, W_o v (H, T, C).

    Their products, summed over heads and columns, are what the layer returns.
    """
    attention, config = model.model.layers[layer].self_attn, model.config
    H, K, D, T = config.n_head, config.n_kv_head, config.head_dim, ids.size(1)
    (v,) = record(model, ids, [attention.v_proj])
    v = v.view(T, K, D).repeat_interleave(H // K, 1)  # (T, H, D)
    w_o = attention.o_proj.weight.view(-1, H, D)  # (C, H, D)
    weights = attention_weights(model, ids)[0][layer]  # (H, T, T)
    return weights, torch.einsum("chd,thd->htc", w_o, v).detach()


def contributions(weights, values):
    """How much the token of a column adds to the output at that of a row, as a length (H, T, T)."""
    return weights * values.norm(dim=-1)[:, None]


def test_the_cosine_distance_of_a_block_that_does_nothing_is_zero(reader_of_the_speech):
    """Which blocks matter?

    1 - cos(in, out), averaged over tokens, says how far a block turns the stream: 0 not at all, 1 by a right
    angle, 2 right round. In deep trained models most blocks turn it little (Men et al.); of the two here the
    first turns it by about a right angle, the second by less than half as much. A block that returns its
    input can be removed, and nothing changes. A change of length is not seen.

    Code: model.py Block.forward
    Break: model.py Block.forward: `return x + self.dropout(` becomes `return self.dropout(`
    Source: Men et al. (2024, arXiv 2403.03853), "block influence"
    问: 如何判断模型的哪些层重要？
    答: 可以看块的输入与输出的余弦距离 1 − cos，对所有词元取平均：0 表示方向不变，1 表示转了 90 度，2 表示反
    向。什么都不做的块距离为 0，删掉后结果不变；只改变长度的块距离也是 0，所以这只是一个参考指标。
    """
    model, ids = reader_of_the_speech, to_ids(SPEECH[:32])[None]
    idle, twice, without = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    for linear in (idle.model.layers[1].self_attn.o_proj, idle.model.layers[1].mlp.down_proj):
        nn.init.zeros_(linear.weight)
    twice.model.layers[1] = Double()
    del without.model.layers[1]
    rows = []
    for name, other in (("trained", model), ("block 1 zeroed", idle), ("block 1 doubles", twice)):
        distances = cosine_distances(other, ids).mean(-1)
        degrees = [math.degrees(math.acos(1 - d)) for d in distances.clamp(0, 2).tolist()]
        rows.append((name, *(round(d, 4) for d in distances.tolist()), *(round(d) for d in degrees)))
    table("model | block 0 | block 1 | degrees: block 0 | block 1", *rows)
    assert 0.8 < rows[0][1] < 1.3 and rows[0][2] > 0.005 and rows[0][4] < rows[0][3] / 2
    assert rows[1][2] == 0 and torch.allclose(idle(ids), without(ids), atol=1e-5)
    assert rows[2][2] == 0


def test_the_logit_lens_needs_the_final_norm(reader_of_the_speech):
    """What would the model say if it ended here?

    head(norm(x)) reads the stream after any block as if it were the last ("logit lens"); after the last it is
    the model itself. Without the norm the gains are missing and the scale is wrong, and so is the loss.

    Often told: multiply the stream by the head. The head has only ever read what the final norm returns.
    Code: tests/lessons/xray.py logit_lens
    Break: tests/lessons/xray.py logit_lens: `model.head(model.model.norm(x))` becomes `model.head(x)`
    Source: nostalgebraist (2020), "interpreting GPT: the logit lens"; Belrose et al. (2023, arXiv 2303.08112)
    问: 什么是 logit lens？为什么要先过最后的归一化？
    答: 把任意一层之后的残差流当作最后一层的输出，先过最后的归一化再乘输出矩阵，就能看到模型此时会预测什么。输
    出头只见过归一化之后的向量，跳过归一化则增益缺失、尺度不对，损失也就不对。
    """
    model, ids = reader_of_the_speech, to_ids("Four score and seven years")[None]
    rows = []
    for i, logits in enumerate(logit_lens(model, ids[:, :-1])):
        likely = " ".join(repr(CHARACTERS[token]) for token in logits[-1].topk(3).indices)
        rows.append((i, likely, F.cross_entropy(logits, ids[0, 1:]).item()))
    last = streams(model, ids[:, :-1])[-1]
    without = F.cross_entropy(model.head(last), ids[0, 1:]).item()
    heads = "blocks | likeliest after 'Four score and seven year' | loss"
    table(heads, *rows, ("2, without the norm", "", without))
    assert abs(rows[-1][2] - model.loss(ids[:, :-1], ids[:, 1:]).item()) < 1e-5
    assert rows[0][2] > rows[-1][2] and abs(without - rows[-1][2]) > 0.05


def test_attention_weights_must_reproduce_the_output_of_their_layer(reader_of_the_speech):
    """How are the weights of attention seen, if the kernel never returns them?

    They are computed again, softmax(Q K^T / sqrt(D)) of the same rotated q and k. To be sure that they are
    the right ones, multiply by V: with the output projection that must be the layer's output.

    Often told: just read them. Fused kernels never have them all.
    Code: tests/lessons/xray.py attention_weights
    Break: tests/lessons/xray.py attention_weights: `k = k.repeat_interleave(group, dim=0)` becomes `k =
    k.repeat(group, 1, 1)`
    Source: Dao et al. (2022, arXiv 2205.14135)
    问: 融合注意力算子不返回注意力权重，怎样查看？如何确认没算错？
    答: 用同样经过旋转的 q、k 重新计算 softmax(QKᵀ/√d)，再乘以 V 并经过输出投影，结果必须与该层的实际输出一
    致，否则就是算错了，例如 GQA 中键值头的对应关系弄错。
    """
    model, text = reader_of_the_speech, "that nation might"
    ids = to_ids(text)[None]
    outputs = torch.stack(record(model, ids, [block.self_attn for block in model.model.layers]))
    weights, by_hand = attention_weights(model, ids)
    rows = []
    for head, of_head in enumerate(weights[1]):
        looks = of_head[-1].topk(2).indices.tolist()
        rows.append((head, *(f"{text[i]!r} at {i}, {of_head[-1, i]:.2f}" for i in looks)))
    table("head of block 1 | the last letter looks most at | and at", *rows)
    error = largest(by_hand - outputs)
    print(f"    the outputs differ by {error:.4f}")
    assert error < 1e-4
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, len(text)), atol=1e-5)
    assert (weights * ~causal(len(text))).abs().max() == 0


def test_a_large_attention_weight_may_carry_nothing(reader_of_the_speech):
    """Does the weight of attention say how much a token contributes?

    Not by itself. What a token adds to the output is weight * W_o v, and a large weight on a small value adds
    little. Here the letter with the largest weight is given a value of 0: all weights of the layer stay, and
    the letter adds nothing. In the trained model as it is, the largest weight and the largest contribution
    belong to different letters in about one case of ten.

    Often told: weights of attention are the importance of words.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `y.transpose(1, 2).reshape(B, T, -1)` becomes `y.reshape(B, T, -1)`
    Source: Kobayashi et al. (2020, arXiv 2004.10102), sec. 3; Jain & Wallace (2019, arXiv 1902.10186)
    问: 注意力权重大，就说明这个词元重要吗？
    答: 不一定。一个词元对输出的贡献是权重乘以 W_o v，权重再大，值向量很小，贡献也很小；应当比较加权并变换后的
    向量的范数，而不是只看权重。
    """
    model, text = copy.deepcopy(reader_of_the_speech), SPEECH[320:352]
    ids = to_ids(text)[None]
    attention = model.model.layers[1].self_attn
    x, output = record(model, ids, [model.model.layers[1].input_layernorm, attention])
    weights, values = weights_and_values(model, ids, 1)
    assert torch.allclose((weights @ values).sum(0), output, atol=1e-4)
    at_the_end = weights[:, -1, :-1]  # (H, T - 1), without the last letter itself
    head, letter = divmod(at_the_end.argmax().item(), len(text) - 1)

    unit = x[letter] / x[letter].norm()
    with torch.no_grad():
        attention.v_proj.weight -= (attention.v_proj.weight @ unit)[:, None] * unit  # its value becomes 0
    after, rows = weights_and_values(model, ids, 1), []
    for name, found in (("trained", (weights, values)), ("with a value of 0", after)):
        sizes = contributions(*found)[head, -1]  # (T,)
        rows.append((name, found[0][head, -1, letter], round(sizes[letter].item(), 4), sizes.max()))
    name = f"{text[letter]!r} at {letter} of 31, head {head} of block 1"
    table(f"{name} | its weight | its contribution | the largest contribution", *rows)

    differ = total = 0
    for begin in range(0, len(SPEECH) - 32, 32):
        ids = to_ids(SPEECH[begin : begin + 32])[None]
        for layer in (0, 1):
            weights, values = weights_and_values(reader_of_the_speech, ids, layer)
            differ += (weights.argmax(-1) != contributions(weights, values).argmax(-1)).sum().item()
            total += weights[..., 0].numel()
    print(f"    in the whole speech, another letter contributes most: {differ / total:.0%} of the time")
    assert rows[0][1] == rows[1][1] > 0.2
    assert rows[0][2] > 0.1 and rows[1][2] == 0
    assert 0.05 < differ / total < 0.2


def test_losses_of_channels_are_summed_before_they_are_divided():
    """What are channel losses, and how are they computed?

    A channel is a source of data, and each row says from which it comes. Losses and tokens are summed for
    each channel, over all processes, and divided at the end.

    Often told: average the means of the workers. That is wrong if their tokens differ in number.
    Code: finetune.py averages
    Break: finetune.py averages: `(row[1] / row[0]).item()` becomes `(row[1] / total[0]).item()`
    Source: it is the definition of a mean
    问: 什么是分通道损失（channel loss）？多卡时怎么算？
    答: 按数据来源分别统计损失：各进程先按来源累加损失之和与词元数，全部汇总后再相除。若先在各进程求平均再平
    均，词元数不同时结果就是错的。
    """
    model, ids = drawn_model(), torch.randint(64, (4, 9))
    targets, channels = ids[:, 1:].clone(), torch.tensor([0, 0, 1, 1])
    targets[0, 2:] = IGNORED  # row 0 has two targets, the others eight
    counts = count_targets(targets)
    _, nats = model.summed_loss(ids[:, :-1], targets)
    sums = torch.zeros(2, 2)
    for rows in ([0, 2], [1, 3]):  # of two workers
        found = torch.stack((counts[rows], nats[rows]), 1)
        sums.index_add_(0, channels[rows], found)
    losses = averages("val", ("loss",), ("short", "long"), sums)
    rows = [(name, int(n), losses[f"val_loss {name}"]) for name, (n, _) in zip(("short", "long"), sums)]
    mean_of_means = (nats / counts)[:2].mean().item()
    wrong = ("short, as the mean of two workers' means", int(counts[:2].sum()), mean_of_means)
    table("channel | targets | loss", *rows, ("all", int(counts.sum()), losses["val_loss"]), wrong)
    of_channel = model.loss(ids[:2, :-1], targets[:2]).item()
    of_all = model.loss(ids[:, :-1], targets).item()
    assert abs(losses["val_loss short"] - of_channel) < 1e-4
    assert abs(losses["val_loss"] - of_all) < 1e-4
    assert abs(mean_of_means - of_channel) > 1e-3
