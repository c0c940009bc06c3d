"""Norms: what is divided by what, and where in a block."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Block, rope

from .book import largest, moved_by, table, tiny_config


def layer_norm(x):
    """LayerNorm without gains."""
    return F.layer_norm(x, x.shape[-1:])


def rms(x):
    return x.pow(2).mean().sqrt().item()


def test_layernorm_divides_by_the_biased_deviation_of_one_token():
    """What is LayerNorm?

    y = g (x - mean) / sqrt(var + eps) + b, with mean and variance over the channels of one token. The
    variance divides by n, not n - 1, eps stands inside the root, and mean 0 and variance 1 hold before g and
    b only.

    Code: model.py Block
    Source: Ba et al. (2016, arXiv 1607.06450), eq. 3 and 4
    """
    x, norm = 3 * torch.randn(4, 8) + 2, nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    mean, rows = x.mean(-1, keepdim=True), []
    for name, unbiased in (("n", False), ("n - 1", True)):
        variance = x.var(-1, unbiased=unbiased, keepdim=True)
        y = norm.weight * (x - mean) / torch.sqrt(variance + norm.eps) + norm.bias
        rows.append((name, largest(y - norm(x))))
    table("variance divides by | difference from nn.LayerNorm", *rows)
    assert rows[0][1] < 1e-5 and rows[1][1] > 0.05


def test_rmsnorm_drops_the_mean_and_the_bias():
    """What is RMSNorm, and how does it differ from LayerNorm?

    y = g x / sqrt(mean(x^2) + eps). No mean is subtracted and no bias added: one sum over the channels
    instead of two, and half the parameters. On inputs of mean zero both are the same.

    Often told: RMSNorm is for RNNs and LayerNorm for CNNs; it normalises the whole input at once.
    Code: model.py Block
    Source: Zhang & Sennrich (2019, arXiv 1910.07467), eq. 4
    """
    norm, x = Block(tiny_config()).input_layernorm, torch.randn(4, 64)
    by_hand = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    assert torch.allclose(norm(x), by_hand, atol=1e-6)
    centred = x - x.mean(-1, keepdim=True)
    rows = [(name, largest(norm(z) - layer_norm(z))) for name, z in (("0", centred), ("about 1", x + 1))]
    table("mean of the input | difference of the two norms", *rows)
    parameters = [sum(p.numel() for p in n.parameters()) for n in (norm, nn.LayerNorm(64))]
    print(f"    parameters: {parameters[0]} and {parameters[1]}")
    assert rows[0][1] < 1e-4 < 0.5 < rows[1][1]
    assert parameters[1] == 2 * parameters[0]


def test_norms_of_a_token_are_local_and_batchnorm_leaks_the_future():
    """Why not BatchNorm?

    Because its mean and variance are taken over batch and time: what it makes of a token depends on later
    tokens, which no causal model may see, on the rest of the batch, and on the mode. LayerNorm and RMSNorm
    look at one token.

    Often told: LayerNorm normalises over the sequence; BatchNorm suffers from small batches only.
    Code: model.py Block
    Source: Ba et al. (2016, arXiv 1607.06450); Shen et al. (2020, arXiv 2003.07845)
    """
    x, batch_norm = torch.randn(2, 6, 16), nn.BatchNorm1d(16)
    norms = {
        "RMSNorm": nn.RMSNorm(16),
        "LayerNorm": nn.LayerNorm(16),
        "BatchNorm": lambda x: batch_norm(x.flatten(0, 1)).view_as(x),
    }
    rows = [(name, moved_by(norm, x, 5)[0].item()) for name, norm in norms.items()]
    table("norm | token 0 moves when token 5 changes, by", *rows)
    assert rows[0][1] == rows[1][1] == 0 < 0.02 < rows[2][1]
    in_training = norms["BatchNorm"](x)
    batch_norm.eval()
    assert largest(norms["BatchNorm"](x) - in_training) > 0.05


def test_a_pre_norm_block_is_the_identity_while_its_sublayers_give_zero():
    """Where exactly does a norm stand in pre-norm and post-norm?

    Pre-norm is x + F(norm(x)), post-norm is norm(x + F(x)). With F = 0 the first is the identity, a clean
    path for the gradient, and the second still normalises. Blocks here start that way.

    Often told: pre-norm is x + norm(F(x)). That norm undoes any scale of F: a thousandfold F adds the same
    (which OLMo 2 does on purpose).
    Code: model.py Block.forward
    Source: Xiong et al. (2020, arXiv 2002.04745), fig. 1
    """
    x, W = 2 * torch.randn(5, 64), torch.randn(64, 64)
    kinds = {
        "pre-norm, x + F(norm(x))": lambda scale: x + layer_norm(x) @ (scale * W),
        "post-norm, norm(x + F(x))": lambda scale: layer_norm(x + x @ (scale * W)),
        "told as pre-norm, x + norm(F(x))": lambda scale: x + layer_norm(x @ (scale * W)),
    }
    rows = []
    for name, block in kinds.items():
        rows.append((name, largest(block(0) - x), largest(block(1000) - block(1))))
    table("block | moves x with F = 0 by | a thousandfold F changes it by", *rows)
    pre, post, told = (row[1:] for row in rows)
    assert pre[0] == 0 and post[0] > 0.5
    assert pre[1] > 100 and told[1] < 1e-2
    new = Block(tiny_config())
    for linear in (new.self_attn.o_proj, new.mlp.down_proj):  # as Transformer.init_weights leaves them
        nn.init.zeros_(linear.weight)
    assert torch.equal(new(x[None], *rope(torch.arange(5), tiny_config(), x.dtype))[0], x)


def test_the_gradient_of_the_last_layer_ignores_depth_in_post_norm_and_not_in_pre_norm():
    """Why does post-norm need a warm-up, and pre-norm much less?

    At the start, the last layer of a post-norm stack has a gradient of the same size at any depth L; with
    pre-norm it falls like 1/sqrt(L). For SGD the full rate is then too much for a deep post-norm stack. Adam
    divides by the gradient's size; there the cause is disputed, and Liu et al. find that post-norm magnifies
    every change of the weights.

    Often told: it holds for all layers. The theorem is about the last one.
    Code: train.py learning_rate
    Source: Xiong et al. (2020), theorem 1; Liu et al. (2020, arXiv 2004.08249)
    """
    d = 64
    inputs, wanted = torch.randn(2, 256, d)

    def last_gradient(kind, depth):
        x = inputs
        for _ in range(depth):
            up = torch.randn(d, d) * (2 / d) ** 0.5
            down = (torch.randn(d, d) / d**0.5).requires_grad_()
            if kind == "pre-norm":
                x = x + F.relu(layer_norm(x) @ up) @ down
            else:
                x = layer_norm(x + F.relu(x @ up) @ down)
        y = layer_norm(x) if kind == "pre-norm" else x
        (y * wanted).mean().backward()
        return down.grad.norm().item()

    rows = [
        (kind, *(last_gradient(kind, depth) for depth in (6, 24, 96))) for kind in ("post-norm", "pre-norm")
    ]
    table("kind | gradient of the last of 6 layers | of 24 | of 96", *rows)
    post, pre = (row[3] / row[1] for row in rows)
    assert 0.75 < post < 1.33
    assert abs(pre - (6 / 96) ** 0.5) < 0.08


def test_a_sandwich_norm_bounds_what_a_layer_can_add():
    """What is Sandwich-LN?

    x + norm(F(norm(x))): the second norm fixes the size of what a branch adds (up to a learned gain), so that
    a layer whose weights blow up cannot flood the stream.

    Code: model.py Block.forward
    Source: Ding et al. (2021, arXiv 2105.13290)
    """
    x, W = torch.randn(64, 32), torch.randn(32, 32) / 32**0.5
    rows = []
    for scale in (1, 100):
        branch = layer_norm(x) @ (scale * W)
        rows.append((scale, rms(branch), rms(layer_norm(branch))))
    table("scale of the weights | pre-norm adds (RMS) | sandwich adds", *rows)
    assert rows[1][1] > 50 and abs(rows[1][2] - 1) < 1e-3


def test_deepnorm_makes_the_first_update_independent_of_depth():
    """What is DeepNorm?

    x <- LN(a x + F(x)), with gain b on the initial weights of values, outputs and MLP; for a decoder of L
    layers a = (2L)^(1/4) and b = (8L)^(-1/4). The norms are those of post-norm; what changes is that the
    first update moves the output as far at any depth.

    Often told: it adds norms, or keeps running means.
    Code: train.py make_optimizers
    Source: Wang et al. (2022, arXiv 2203.00555), fig. 2
    """
    C = 64
    inputs, wanted = torch.randn(2, 64, C)

    def output(ups, downs, a):
        x = inputs
        for up, down in zip(ups, downs):
            x = layer_norm(a * x + F.relu(x @ up) @ down)
        return x

    def first_update(kind, depth, lr=1e-3):
        """By which share of its size one step of SGD moves the output."""
        a, b = ((2 * depth) ** 0.25, (8 * depth) ** -0.25) if kind == "DeepNorm" else (1, 1)
        ups = (b * math.sqrt(2 / C) * torch.randn(2 * depth, C, C)).requires_grad_()
        downs = (b * math.sqrt(1 / C) * torch.randn(2 * depth, C, C)).requires_grad_()
        before = output(ups, downs, a)
        ((before - wanted) ** 2).sum(-1).mean().backward()
        after = output(ups - lr * ups.grad, downs - lr * downs.grad, a)
        return ((after - before).norm() / before.norm()).item()

    rows = [
        (kind, *(first_update(kind, depth) for depth in (2, 8, 32))) for kind in ("post-norm", "DeepNorm")
    ]
    table("one step of SGD moves the output by | 2 layers | 8 | 32", *rows)
    post, deep = (row[1:] for row in rows)
    assert post[2] / post[0] > 5
    assert max(deep) / min(deep) < 1.4
