"""Positions: how a model that sees a set of tokens is told their order."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import Attention, Config, Transformer, apply_rope, rope

from .book import causal, largest, table, tiny_config, train

HEAD = Config(vocab_size=1, n_head=1, n_kv_head=1, n_embd=64)  # a head of 64 channels


def test_attention_without_positions_does_not_know_their_order():
    """What is a positional encoding for?

    Without mask and positions, attention only follows a change of order P: f(P x) = P f(x), it is
    equivariant. If tokens change places, their outputs change places and nothing else. "Dog bites man" and
    "man bites dog" give each word the same vector.

    Often told: any order gives the same output. The vectors are the same; their order follows the input's.
    Code: model.py rope
    Source: Vaswani et al. (2017), sec. 3.5
    """
    attention, x = Attention(tiny_config()), torch.randn(1, 7, 64)
    order = torch.randperm(7)
    everything = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    angles = {
        "none": (torch.ones(7, 8), torch.zeros(7, 8)),  # cos and sin of no rotation
        "RoPE": rope(torch.arange(7), tiny_config(), x.dtype),
    }
    rows = []
    for name, (cos, sin) in angles.items():
        y = attention(x, cos, sin, everything)
        shuffled = attention(x[:, order], cos, sin, everything)
        rows.append((name, largest(shuffled - y[:, order])))
    table("positions | largest difference between f(P x) and P f(x)", *rows)
    assert rows[0][1] < 1e-6 and rows[1][1] > 1e-2


def test_sinusoids_are_absolute_and_offsets_can_be_read_from_them():
    """Are the sinusoids of the first Transformer absolute or relative positions?

    Absolute: each position has its own vector, which is added to the embedding. But as sines and cosines
    rotate, one matrix M_k takes PE(p) to PE(p + k) for every p, and PE(p) . PE(p + k) depends on k alone.

    Often told: they tell relative, but no absolute positions.
    Code: model.py rope
    Source: Vaswani et al. (2017), sec. 3.5
    """
    frequencies = 1e4 ** (-torch.arange(0, 64, 2).double() / 64)
    angles = torch.arange(512)[:, None] * frequencies
    encoding = torch.cat((angles.sin(), angles.cos()), -1)  # (512, 64)
    cos, sin = torch.diag((7 * frequencies).cos()), torch.diag((7 * frequencies).sin())
    advance_by_7 = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
    products = (encoding[:-7] * encoding[7:]).sum(-1)
    error = largest(encoding[:-7] @ advance_by_7 - encoding[7:])
    closest = torch.pdist(encoding).min()
    heads = "PE(p) . PE(p+7), least | most | error of one matrix for all p | two positions are apart by"
    table(heads, (products.min(), products.max(), error, closest))
    assert products.max() - products.min() < 1e-9 and error < 1e-9 and closest > 0.5


def test_sinusoids_and_rope_share_their_frequencies_and_neither_repeats():
    """Do sinusoids repeat, and does RoPE mend that?

    Both turn pair i by theta^(-2i/d) per position. A single pair has a period, of 6.3 up to 47,000 positions
    for 64 channels. The whole vector never comes back: the first pair turns by 1 radian per position, and no
    whole number of radians is a multiple of 2 pi.

    Often told: sinusoids repeat after a fixed period, which RoPE solves.
    Code: model.py rope
    Source: Vaswani et al. (2017), sec. 3.5; Su et al. (2021), sec. 3.2.2
    """
    frequencies = 1e4 ** (-torch.arange(0, 64, 2).double() / 64)
    cos, _ = rope(torch.arange(512), HEAD, torch.float32)
    assert torch.allclose(cos, (torch.arange(512)[:, None] * frequencies).cos().float(), atol=1e-4)
    angles = torch.arange(40_000)[:, None] * frequencies
    encoding = torch.cat((angles.sin(), angles.cos()), -1)
    distance = (encoding[1:] - encoding[0]).norm(dim=-1)
    periods = 2 * math.pi / frequencies
    heads = "shortest period | longest | nearest to position 0 | at a distance of | median distance"
    nearest = distance.argmin().item() + 1
    table(heads, (periods[0], periods[-1], nearest, distance.min(), distance.median()))
    assert abs(periods[-1] - 47_117) < 10 and nearest == 1 and distance.min() > 0.9


def test_rope_scores_depend_only_on_the_offset():
    """What is the idea of RoPE?

    Rotate each pair of channels of q and k by position times frequency before the dot product. Two rotations
    leave their difference, R_m^T R_n = R_(n-m): absolute rotations give relative scores.

    Often told: it models the rotation of words in a sentence; it is a kind of data augmentation.
    Code: model.py apply_rope
    Source: Su et al. (2021), eq. 16
    """
    cos, sin = rope(torch.arange(2000), HEAD, torch.float32)
    q, k = torch.randn(2, 64)

    def score(m, n):
        return (apply_rope(q, cos[m], sin[m]) @ apply_rope(k, cos[n], sin[n])).item()

    rows = [(m, score(m, m - 5), score(m, m - 6)) for m in (6, 100, 1000, 1999)]
    table("position of q | score with k 5 before it | 6 before it", *rows)
    assert max(row[1] for row in rows) - min(row[1] for row in rows) < 1e-3
    assert abs(rows[0][1] - rows[0][2]) > 0.1


def test_rope_is_a_multiplication_of_complex_numbers():
    """How is RoPE derived?

    Read a pair of channels as the complex number z = x1 + i x2; RoPE is z e^(i p w) at position p, for a pair
    of frequency w. The score of q at m and k at n is the real part of q e^(imw) conj(k e^(inw)) = q conj(k)
    e^(i(m-n)w). It keeps norms, does nothing at position 0, and has no parameters.

    Code: model.py apply_rope
    Source: Su et al. (2021), sec. 3.2
    """
    x = torch.randn(10, 64)
    cos, sin = rope(torch.arange(10), HEAD, x.dtype)
    rotated = apply_rope(x, cos, sin)
    z = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    differences = {
        "from complex numbers": rotated - torch.cat((z.real, z.imag), -1),
        "of norms, before and after": rotated.norm(dim=-1) - x.norm(dim=-1),
        "at position 0": rotated[0] - x[0],
    }
    table("difference | at most", *((name, largest(difference)) for name, difference in differences.items()))
    assert max(map(largest, differences.values())) < 1e-5
    assert torch.equal(rotated[0], x[0])


def test_interpolated_positions_keep_to_angles_seen_in_training():
    """How is a model with RoPE stretched to four times its length?

    A pair that turned round many times in training has seen every angle; slow pairs, which never came round,
    meet new ones. Position interpolation divides positions by 4, so that no angle is new; neighbours come 4
    times closer. NTK-aware scaling multiplies theta by 4^(D/(D-2)) instead: the slowest pair slows down by 4,
    the fastest turns as before. The first wants a short fine-tuning, the second gains from one.

    Often told: Transformers handle other lengths by nature; a larger model helps.
    Code: model.py rope
    Source: Chen et al. (2023, arXiv 2306.15595); Peng et al. (2023, arXiv 2309.00071) on NTK-aware scaling
    """
    D, theta = HEAD.head_dim, HEAD.rope_theta
    stretched = replace(HEAD, rope_theta=theta * 4 ** (D / (D - 2)))

    def turns(positions, config):
        """How often the fastest and the slowest pair have turned round at the last of the positions."""
        cos, sin = rope(positions[-1:] - positions[-2:-1], config, torch.float64)  # by one step
        per_position = torch.atan2(sin, cos)[0] / (positions[-1] - positions[-2])
        return (positions[-1] * per_position[[0, -1]] / (2 * math.pi)).tolist()

    ways = {
        "trained, 128": turns(torch.arange(129), HEAD),
        "as it is, 512": turns(torch.arange(513), HEAD),
        "interpolated, 512": turns(torch.arange(513) / 4, HEAD),
        "NTK-aware, 512": turns(torch.arange(513), stretched),
    }
    table("up to position | turns of the fastest pair | of the slowest", *((k, *v) for k, v in ways.items()))
    trained, raw, interpolated, ntk = ways.values()
    assert trained[0] > 20 and raw[1] > 3.9 * trained[1], "only the slow pairs meet new angles"
    assert interpolated == pytest.approx(trained, rel=1e-3)
    assert ntk == pytest.approx([raw[0], trained[1]], rel=1e-3)


def test_alibi_adds_a_fixed_linear_penalty_to_the_scores():
    """What is ALiBi?

    Scores become q . k / sqrt(d) - m_h (i - j): a fixed matrix is added before the softmax, with a slope for
    each head, m_h = 2^(-8h/n) for n = 8, 16 ... heads, here 1/2, 1/4 ... 1/256. There is no other position
    and nothing is learned. Weights are thereby multiplied by e^(-m dist) and normalised again.

    Often told: the bias is multiplied; it is tuned; the input is projected to low-dimensional features.
    Code: model.py Attention.forward
    Source: Press et al. (2022, arXiv 2108.12409), sec. 3
    """
    n_head, T = 8, 6
    slopes = 2.0 ** (-8 * torch.arange(1, n_head + 1) / n_head)
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    bias = -slopes[:, None, None] * distance  # (n_head, T, T)
    scores = torch.randn(n_head, T, T).masked_fill(~causal(T), -math.inf)
    multiplied = scores.softmax(-1) * bias.exp()
    table("head | slope | what is added to the last query's scores",
          *((h + 1, slopes[h], bias[h, -1]) for h in (0, 1, 7)))  # fmt: skip
    assert slopes.tolist() == [2.0**-h for h in range(1, 9)]
    again = multiplied / multiplied.sum(-1, keepdim=True)
    assert torch.allclose((scores + bias).softmax(-1), again, atol=1e-6)


def test_running_beyond_the_trained_length_hurts():
    """Can a model with RoPE read a text of any length?

    It runs at any length, but beyond that of training it meets angles and sums that it never saw, and its
    loss rises. Here each next token is the one four places back, so that no place is harder than another: all
    that is lost is lost by the length.

    Often told: RoPE generalises to unseen lengths. Here it ends worse than guessing.
    Code: model.py Transformer.hidden
    Source: Press et al. (2022), sec. 2.2; Chen et al. (2023)
    """

    def batch(step, T=16, B=16):
        x = torch.randint(8, (B, 4)).repeat(1, T // 4 + 1)
        return x[:, :T], x[:, 1 : T + 1]

    model = Transformer(tiny_config(vocab_size=8, block_size=16, n_layer=1, n_embd=32, n_head=2))
    train(model, batch, 400, 1e-2)
    ids, targets = batch(0, 256, 32)
    with torch.no_grad(), pytest.warns(UserWarning, match="not seen more than 16 tokens"):
        losses = F.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none").mean(0)
    spans = ((4, 16), (16, 32), (32, 64), (128, 256))
    table("positions | loss", *((f"{a} to {b}", losses[a:b].mean()) for a, b in spans))
    print(f"    an even guess among 8 tokens: ln 8 = {math.log(8):.3f}")
    assert losses[4:16].mean() < 0.6
    assert losses[128:].mean() > losses[4:16].mean() + 0.8
