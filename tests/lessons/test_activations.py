"""Activations: the feed-forward block and its gates."""

import math

import torch
import torch.nn.functional as F

from model import MLP, PRESETS, Block, Config

from .book import largest, moved_by, places, table, tiny_config


def test_the_mlp_is_position_wise_and_holds_two_thirds_of_a_block():
    """What does the feed-forward block (MLP) do that attention does not?

    It applies the same weights to each position by itself; only attention carries anything from one position
    to another. In two matrices of 4 C^2 (or SwiGLU's three of 8/3 C^2) it holds 8 C^2 weights, beside 4 C^2
    of attention: two thirds of a block (with as many heads of keys as of queries; in Llama 3 8B it is 81 %).

    Often told: it transforms the vector that encodes the position. It sees one token's vector, all in all.
    Code: model.py MLP.forward
    Source: Vaswani et al. (2017), sec. 3.3, eq. 2
    """
    block, x = Block(Config(vocab_size=1, **PRESETS["nano"])), torch.randn(1, 6, 192)
    moved = places(moved_by(block.mlp, x, 3) > 0)
    mlp, attention = (sum(p.numel() for p in part.parameters()) for part in (block.mlp, block.self_attn))
    heads = "a change of position 3 moves | weights of the MLP | of attention | share of the MLP"
    table(heads, (moved, mlp, attention, mlp / (mlp + attention)))
    assert moved == [3]
    assert mlp == 2 * attention


def test_two_linear_layers_without_an_activation_are_one_matrix():
    """Where is a Transformer not linear?

    In the MLP's activation or gate, in the softmax (of a product of two projections, times a third), and in
    the norms. Two linear layers without an activation are one matrix; a gate without one is still quadratic.

    Often told: the activation is all that is not linear.
    Code: model.py MLP.forward
    Source: Shazeer (2020, arXiv 2002.05202), for the gate without activation
    """
    W, V, out = torch.randn(16, 64), torch.randn(16, 64), torch.randn(64, 16)
    parts = {
        "two linear layers": lambda x: x @ W @ out,
        "ReLU": lambda x: F.relu(x @ W) @ out,
        "gate without activation": lambda x: ((x @ W) * (x @ V)) @ out,
        "SwiGLU": lambda x: (F.silu(x @ W) * (x @ V)) @ out,
        "attention": lambda x: (x @ x.T / 4).softmax(-1) @ x,
        "RMSNorm": lambda x: F.rms_norm(x, (16,)),
    }
    x, y = torch.randn(2, 5, 16)
    rows = []
    for name, f in parts.items():
        rows.append((name, ((f(x + y) - f(x) - f(y)).norm() / f(x + y).norm()).item()))
    table("part | how far f(x + y) is from f(x) + f(y)", *rows)
    assert rows[0][1] < 1e-5 and all(row[1] > 0.01 for row in rows[1:])
    gate = parts["gate without activation"]
    assert torch.allclose(gate(2 * x), 4 * gate(x), rtol=1e-3)


def test_gelu_is_x_times_phi_and_tanh_is_an_approximation():
    """What is GELU?

    x Phi(x) = x/2 (1 + erf(x / sqrt(2))), with Phi the distribution function of the normal distribution. The
    form with tanh is an approximation, within 0.0005; GPT-2 has that, Hugging Face's BERT has erf.

    Often told: 0.5 x (1 + tanh(...)) is its definition.
    Code: model.py MLP.forward
    Source: Hendrycks & Gimpel (2016, arXiv 1606.08415), sec. 2
    """
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    exact = x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    forms = {
        "x/2 (1 + tanh(...))": x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "x sigmoid(1.702 x)": x * torch.sigmoid(1.702 * x),
    }
    rows = []
    for name, y in forms.items():
        error = (y - exact).abs()
        rows.append((name, error.max().item(), x[error.argmax()].abs()))
    table("form | largest error | at x =", *rows)
    assert torch.allclose(exact, F.gelu(x))
    assert torch.allclose(forms["x/2 (1 + tanh(...))"], F.gelu(x, approximate="tanh"))
    assert 4e-4 < rows[0][1] < 5e-4 and rows[1][1] > 0.01


def test_swish_runs_from_half_the_identity_to_relu():
    """What is Swish, and what is SiLU?

    Swish_b(x) = x sigmoid(b x), and SiLU, which Llama has in its gate, is b = 1. With b = 0 it is x/2, with
    large b it becomes ReLU; it is not monotonic, with a minimum of -0.278 at -1.278.

    Often told: b = 0 gives the identity.
    Code: model.py MLP.forward
    Source: Ramachandran et al. (2017, arXiv 1710.05941)
    """
    x = torch.linspace(-8, 8, 160_001)
    rows = []
    for b in (0.0, 1.0, 10.0, 1000.0):
        y = x * torch.sigmoid(b * x)
        rows.append((b, largest(y - x / 2), largest(y - x.relu())))
    table("b | largest difference from x/2 | from ReLU", *rows)
    lowest = F.silu(x).argmin()
    print(f"    SiLU is lowest at x = {x[lowest]:.3f}, with {F.silu(x)[lowest]:.4f}")
    assert rows[0][1] == 0 and rows[-1][2] < 1e-3
    assert abs(F.silu(x)[lowest] + 0.27846) < 1e-4 and abs(x[lowest] + 1.27846) < 2e-3


def test_a_gated_linear_unit_needs_two_projections():
    """What is a gated linear unit (GLU)?

    sigmoid(x W) * (x V): one projection is the gate, another the content. The gate multiplies a projection of
    x, not x itself.

    Often told: x sigmoid(W x). That keeps the width, flips no sign and enlarges no channel: a soft mask on x.
    Code: model.py MLP
    Source: Dauphin et al. (2017, arXiv 1612.08083), eq. 1; Shazeer (2020)
    """
    x, W, V = torch.randn(1000, 16), torch.randn(16, 40), torch.randn(16, 40)
    glu = torch.sigmoid(x @ W) * (x @ V)
    assert torch.allclose(glu, F.glu(torch.cat((x @ V, x @ W), -1)), atol=1e-6)
    told = x * torch.sigmoid(x @ torch.randn(16, 16))
    rows = [
        ("GLU", glu.size(1), largest(glu) / largest(x)),
        ("x sigmoid(W x)", 16, largest(told) / largest(x)),
    ]
    table("form | channels, of 16 | largest value beside that of x", *rows)
    assert (told * x >= 0).all() and (told.abs() <= x.abs()).all()
    assert rows[0][2] > 3


def test_swiglu_and_geglu_change_the_function_of_the_gate():
    """What are SwiGLU and GEGLU?

    down(f(gate(x)) * up(x)) with f = Swish or GELU in the place of GLU's sigmoid. The gate is then no longer
    within (0, 1): it has no upper bound, and is slightly negative below zero.

    Often told: x GELU(W x) is GEGLU.
    Code: model.py MLP.forward
    Source: Shazeer (2020, arXiv 2002.05202), eq. 5 and 6
    """
    mlp, x = MLP(tiny_config()), 3 * torch.randn(50, 64)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    by_hand = (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T
    assert torch.allclose(mlp(x), by_hand, atol=1e-5)
    t = torch.linspace(-6, 6, 1001)
    functions = {"GLU: sigmoid": torch.sigmoid, "GEGLU: GELU": F.gelu, "SwiGLU: SiLU": F.silu}
    rows = [(name, f(t).min().item(), f(t).max().item()) for name, f in functions.items()]
    table("gate | least on [-6, 6] | most", *rows)
    assert rows[0][2] < 1 and rows[2][2] > 5 and rows[2][1] < -0.27
