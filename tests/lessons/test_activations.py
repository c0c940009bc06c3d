"""Activations: the feed-forward block and its gates."""

import math
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, PRESETS, Block, Config, rope

from .book import LLAMA_2_7B, LLAMA_3_8B, drawn_model, largest, lines, moved_by, places, table, tiny_config


def with_activation(function):
    """While this context lasts, model.py's MLP has another function in the place of SiLU."""
    return mock.patch.object(F, "silu", function)


def activation_of_the_mlp(x):
    """What model.py's MLP makes of x, if the gate of its only unit reads x, and up and down are 1."""
    mlp = MLP(Config(vocab_size=1, n_embd=2, n_head=1, n_kv_head=1, n_hidden=1)).to(x.dtype)
    with torch.no_grad():
        mlp.gate_proj.weight[:] = torch.tensor([[1.0, 0.0]])
        mlp.up_proj.weight[:] = torch.tensor([[0.0, 1.0]])
        mlp.down_proj.weight[:] = torch.tensor([[1.0], [0.0]])
    return mlp(torch.stack((x, torch.ones_like(x)), -1))[..., 0]


def test_the_mlp_is_position_wise_and_holds_most_of_a_block():
    """What does the feed-forward block (MLP) do that attention does not?

    It holds most of the weights, and applies them to each position by itself: only attention carries anything
    from one position to another. The MLP has 8 C^2 weights, in two matrices of 4 C^2 or in SwiGLU's three of
    8/3 C^2; attention with as many heads of keys as of queries has 4 C^2. That makes two thirds of a block.
    With fewer heads of keys and a wider MLP it is more, 81 % in Llama 3 8B.

    Often told: "position-wise" means that it works on the encoding of the position. It means: the same
    function at every position, of that position's vector alone.
    Code: model.py MLP.forward
    Break: model.py MLP.forward: `self.gate_proj(x)` becomes `self.gate_proj(x.cumsum(1))`
    Source: Vaswani et al. (2017), sec. 3.3
    问: 前馈网络（FFN / MLP）在 Transformer 中起什么作用？
    答: 它对每个位置单独施加同一个非线性变换，位置之间的信息只靠注意力传递；它的参数最多，在标准多头注意力下占
    一层的三分之二，在 Llama 3 8B 中占 81%。
    """
    config = Config(vocab_size=1, **PRESETS["nano"])
    block, x = Block(config), torch.randn(1, 6, config.n_embd)
    cos, sin = rope(torch.arange(6), config, x.dtype)

    def attend(x):
        return block.self_attn(x, cos, sin)

    rows = []
    for name, part in (("attention", attend), ("norm", block.input_layernorm), ("MLP", block.mlp)):
        rows.append((name, places(moved_by(part, x, 3) > 0)))
    table("part | a change of position 3 moves positions", *rows)
    print()
    sizes = []
    for name, shape in (("nano", config), ("Llama 3 8B", Config(**LLAMA_3_8B))):
        with torch.device("meta"):  # shapes without memory
            block = Block(shape)
        mlp, attention = (sum(p.numel() for p in part.parameters()) for part in (block.mlp, block.self_attn))
        sizes.append((name, mlp, attention, mlp / (mlp + attention)))
    table("model | weights of an MLP | of an attention | share of the MLP", *sizes)
    assert [moved for _, moved in rows] == [[3, 4, 5], [3], [3]]
    assert abs(sizes[0][3] - 2 / 3) < 1e-6
    assert abs(sizes[1][3] - 0.81) < 0.005


def test_two_linear_layers_without_an_activation_are_one_matrix():
    """Where is a Transformer not linear?

    In the MLP's activation and gate, in attention (a softmax of one projection times another, times a third),
    and in the norms. Without an activation between them, two linear layers are one matrix. A gate without an
    activation is not linear either: it is quadratic, so that 2x gives 4 times as much.

    Often told: the activation is all that is not linear.
    Code: model.py MLP.forward
    Break: model.py MLP.forward: `F.silu(self.gate_proj(x)) * self.up_proj(x)` becomes `self.gate_proj(x) +
    self.up_proj(x)`
    Source: Shazeer (2020, arXiv 2002.05202), sec. 2, for the gate without an activation ("bilinear")
    问: Transformer 的非线性来自哪里？去掉激活函数会怎样？
    答: 来自 MLP 的激活函数和门控、注意力（softmax 以及 q、k、v 的相乘）和归一化；两个线性层之间若没有激活函
    数，就等价于一个矩阵，加深没有意义。不带激活函数的门控也不是线性的，而是二次的。
    """
    model = drawn_model()
    block, (x, y) = model.model.layers[0], torch.randn(2, 1, 5, 64)
    mlp, (cos, sin) = block.mlp, rope(torch.arange(5), model.config, x.dtype)

    def two_layers(x):
        return mlp.down_proj(mlp.up_proj(x))

    def gate_without_activation(x):
        with with_activation(nn.Identity()):
            return mlp(x)

    def attend(x):
        return block.self_attn(x, cos, sin)

    parts = {
        "two linear layers": two_layers,
        "MLP, no activation": gate_without_activation,
        "MLP": mlp,
        "attention": attend,
        "norm": block.input_layernorm,
    }
    rows = []
    for name, f in parts.items():
        whole = f(x + y)
        rows.append((name, (whole - f(x) - f(y)).norm() / whole.norm(), f(2 * x).norm() / f(x).norm()))
    table("part f | f(x + y) - f(x) - f(y), relative to f(x + y) | f(2x) relative to f(x)", *rows)
    one_matrix = mlp.down_proj.weight @ mlp.up_proj.weight
    assert torch.allclose(two_layers(x), x @ one_matrix.T, atol=1e-4)
    assert rows[0][1] < 1e-4
    assert all(row[1] > 0.1 for row in rows[1:])
    assert abs(rows[1][2] - 4) < 1e-3


def test_a_relu_unit_can_die_where_gelu_and_silu_keep_a_gradient():
    """ReLU, GELU or SiLU: what is the difference for negative inputs?

    ReLU's slope is exactly 0 below zero. A unit whose input is negative for all data puts out 0 and gets no
    gradient: it is dead. GELU and SiLU are smooth, slightly negative below zero, and have a slope there,
    which fades far below zero.

    Often told: ReLU solves the vanishing gradient. It solves one half: its slope is 1 above zero, where a
    sigmoid's is at most 1/4, so that 20 sigmoids in a row scale a gradient by 1e-12 or less. Below zero no
    gradient is left.
    Code: model.py MLP.forward
    Break: model.py MLP.forward: `F.silu(` becomes `F.relu(`
    Source: Glorot et al. (2011) for ReLU; Hendrycks & Gimpel (2016, arXiv 1606.08415) for GELU
    问: ReLU 与 GELU、SiLU 有什么区别？什么是“神经元死亡”？
    答: ReLU 在负区间的导数恰好为 0，若一个神经元对所有数据的输入都为负，它就得不到梯度、不再更新；GELU 和
    SiLU 是光滑的，在负区间取略小于 0 的值，导数一般不为零，离 0 越远越小。
    """
    x = torch.linspace(-4, 4, 49, requires_grad=True)
    mlp, data = MLP(tiny_config()), torch.rand(50, 64)  # positive data
    with torch.no_grad():
        mlp.gate_proj.weight[0] = -0.05  # unit 0 is negative for all of it
    rows, curves = [], {}
    for name, function in (("ReLU", F.relu), ("GELU", F.gelu), ("SiLU", F.silu)):
        with with_activation(function):
            y = activation_of_the_mlp(x)
            loss = mlp(data).square().sum()
        (slope,) = torch.autograd.grad(y.sum(), x)
        (gradient,) = torch.autograd.grad(loss, mlp.gate_proj.weight)
        rows.append((name, y.min(), slope[12], gradient[0].norm()))  # x[12] is -2
        curves[name] = (x.detach(), y.detach())
    table("function | least value | slope at -2 | gradient of a unit whose input is always negative", *rows)
    lines("Three activation functions", "x", "f(x)", curves)
    assert [slope == 0 for _, _, slope, _ in rows] == [True, False, False]
    assert [gradient > 1e-4 for _, _, _, gradient in rows] == [False, True, True]

    start = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y = start
    for _ in range(20):
        y = y.sigmoid()
    (slope,) = torch.autograd.grad(y, start)
    print(f"    slope of 20 sigmoids in a row: {slope:.0e}")
    assert 0 < slope < 0.25**20 < 1e-12


def test_gelu_is_x_times_phi_and_tanh_is_an_approximation():
    """What is GELU?

    x Phi(x) = x/2 (1 + erf(x / sqrt(2))), with Phi the distribution function of the standard normal
    distribution. The form with tanh approximates it within 0.0005, x sigmoid(1.702 x) within 0.021. GPT-2 has
    the form with tanh, Hugging Face's BERT the one with erf. SiLU is x sigmoid(x), a function of its own.

    Often told: 0.5 x (1 + tanh(...)) is its definition.
    Compare: model.py MLP.forward: SiLU, x sigmoid(x), where GELU has x Phi(x)
    Source: Hendrycks & Gimpel (2016, arXiv 1606.08415), sec. 2
    问: GELU 的定义是什么？tanh 形式是它的定义吗？
    答: GELU(x) = xΦ(x)，Φ 是标准正态分布的分布函数；tanh 形式只是近似，误差不超过 0.0005，GPT-2 用的是这个近
    似。
    """
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    exact = x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    forms = {
        "x/2 (1 + tanh(...))": x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "x sigmoid(1.702 x)": x * torch.sigmoid(1.702 * x),
        "SiLU in model.py": activation_of_the_mlp(x).detach(),
    }
    rows = []
    for name, y in forms.items():
        error = (y - exact).abs()
        rows.append((name, error.max(), x[error.argmax()].abs()))
    table("form | largest difference from x Phi(x) | at x = +-", *rows)
    assert torch.allclose(exact, F.gelu(x))
    assert torch.allclose(forms["x/2 (1 + tanh(...))"], F.gelu(x, approximate="tanh"))
    assert 4e-4 < rows[0][1] < 5e-4
    assert 0.02 < rows[1][1] < 0.021
    assert rows[2][1] > 0.1


def test_gelu_is_the_mean_of_a_random_gate_that_opens_with_probability_phi():
    """How is GELU related to dropout?

    Keep x with probability Phi(x), the probability that a standard normal number is below x, and put 0 in its
    place otherwise: the mean of that is x Phi(x), which is GELU. Dropout is a random gate of 0 or 1, too, but
    opens with one probability for all x. GELU draws nothing: it is the mean itself.

    Compare: model.py Block: dropout, whose probability does not depend on what it drops
    Source: Hendrycks & Gimpel (2016, arXiv 1606.08415), sec. 2
    问: GELU 与 dropout 有什么联系？
    答: 以概率 Φ(x) 保留 x、否则置 0，其期望就是 xΦ(x)，即 GELU；dropout 也是 0/1 随机门，但保留的概率与 x 无
    关，而 GELU 直接取期望，不需要随机采样。
    """
    rows = []
    for x in (-1.5, -0.5, 0.5, 1.5):
        opens = torch.randn(200_000) < x  # with probability Phi(x)
        rows.append((x, opens.float().mean(), (x * opens).mean(), F.gelu(torch.tensor(x))))
    table("x | the gate opens | mean of x times the gate | GELU(x)", *rows)
    for _, _, mean, gelu in rows:
        assert abs(mean - gelu) < 0.01


def test_swish_runs_from_half_the_identity_to_relu():
    """What is Swish, and what is SiLU?

    Swish_b(x) = x sigmoid(b x); SiLU is Swish with b = 1, and stands in the gate of Llama's MLP. With b = 0,
    Swish is x/2; the larger b, the nearer it comes to ReLU. SiLU is not monotonic: it falls to -0.278 at x =
    -1.278 and rises from there to both sides.

    Often told: b = 0 gives the identity.
    Code: model.py MLP.forward
    Break: model.py MLP.forward: `F.silu(` becomes `F.gelu(`
    Source: Ramachandran et al. (2017, arXiv 1710.05941); Elfwing et al. (2017, arXiv 1702.03118) for SiLU
    问: Swish 和 SiLU 是什么关系？参数 β 起什么作用？
    答: Swish_β(x) = x·sigmoid(βx)，SiLU 就是 β = 1 的 Swish；β = 0 时它是 x/2（不是恒等函数），β 趋于无穷时趋
    于 ReLU。
    """
    x = torch.linspace(-8, 8, 16_001)
    silu = activation_of_the_mlp(x).detach()
    rows = []
    for b in (0.001, 1.0, 10.0, 1000.0):
        swish = activation_of_the_mlp(b * x).detach() / b  # b x sigmoid(b x) / b
        rows.append((b, largest(swish - x / 2), largest(swish - x.relu())))
    table("b | largest difference from x/2 | from ReLU", *rows)
    lowest = silu.argmin()
    print(f"    SiLU is lowest at x = {x[lowest]:.3f}, with {silu[lowest]:.3f}")
    assert torch.allclose(silu, x * torch.sigmoid(x), atol=1e-5)
    assert rows[0][1] < 0.02 and rows[-1][2] < 1e-3
    assert abs(silu[lowest] + 0.2785) < 1e-3 and abs(x[lowest] + 1.278) < 0.02
    fall, rise = silu[: lowest - 20].diff(), silu[lowest + 20 :].diff()
    assert (fall <= 0).all() and (rise >= 0).all()


def test_a_gated_linear_unit_needs_two_projections():
    """What is a gated linear unit (GLU)?

    sigmoid(x W) * (x V), channel by channel: one projection is the gate, between 0 and 1, another is the
    content. The gate multiplies a projection of x and not x itself. model.py's MLP is this unit with SiLU in
    the place of the sigmoid, followed by a third matrix.

    Often told: x * sigmoid(x W). That flips no sign and enlarges no channel: it is a soft mask on x.
    Code: model.py MLP.forward
    Break: model.py MLP.forward: `* self.up_proj(x)` becomes `* x`
    Source: Dauphin et al. (2017, arXiv 1612.08083), eq. 1; Shazeer (2020, arXiv 2002.05202)
    问: 什么是门控线性单元 (GLU)？
    答: GLU(x) = sigmoid(xW) ⊙ (xV)，需要两个投影，一个作门，一个作内容；写成 x·sigmoid(xW) 是错的，那只是对 x
    的软掩码，既不能改变符号，也不能放大。
    """
    mlp, x = MLP(tiny_config(n_hidden=64)), torch.randn(1000, 64)
    mlp.down_proj = nn.Identity()  # to read what comes before it
    with with_activation(torch.sigmoid):
        of_the_model = mlp(x)
    gate, content = mlp.gate_proj(x), mlp.up_proj(x)
    rows = []
    for name, y in (("GLU, model.py", of_the_model), ("x * sigmoid(x W)", x * torch.sigmoid(gate))):
        rows.append((name, (x * y < 0).float().mean(), (y.abs() > x.abs()).float().mean()))
    table("form | share of channels whose sign changes | that grow", *rows)
    assert torch.allclose(of_the_model, F.glu(torch.cat((content, gate), -1)), atol=1e-6)
    assert 0.4 < rows[0][1] < 0.6 and rows[0][2] > 0.05
    assert rows[1][1] == 0 and rows[1][2] == 0


def test_swiglu_and_geglu_change_the_function_of_the_gate():
    """What are SwiGLU and GEGLU?

    down(f(gate(x)) * up(x)), with f = Swish or GELU in the place of GLU's sigmoid. The gate is then no longer
    between 0 and 1: it has no upper bound, and is slightly negative for inputs below zero. model.py has
    SwiGLU.

    Often told: x GELU(x W) is GEGLU. The gate multiplies a second projection of x.
    Code: model.py MLP.forward
    Break: model.py MLP.forward: `F.silu(self.gate_proj(x))` becomes `torch.sigmoid(self.gate_proj(x))`
    Source: Shazeer (2020, arXiv 2002.05202), eq. 5 and 6
    问: SwiGLU、GEGLU 与 GLU 有什么区别？
    答: 结构相同，都是 down(f(gate(x)) ⊙ up(x))，只是把门的 sigmoid 换成 Swish（SwiGLU）或 GELU（GEGLU）；门的
    取值因此不再限于 0 到 1，上不封顶，也可以略小于 0。
    """
    mlp, x, t = MLP(tiny_config()), 3 * torch.randn(50, 64), torch.linspace(-6, 6, 1001)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    forms = {  # name: the function, and its formula
        "GLU: sigmoid": (torch.sigmoid, 1 / (1 + torch.exp(-gate))),
        "GEGLU: GELU": (F.gelu, gate / 2 * (1 + torch.erf(gate / math.sqrt(2)))),
        "SwiGLU: SiLU": (F.silu, gate / (1 + torch.exp(-gate))),
    }
    rows = []
    for name, (function, of_gate) in forms.items():
        with with_activation(function):
            difference = largest(mlp(x) - (of_gate * up) @ mlp.down_proj.weight.T)
            values = activation_of_the_mlp(t)
        rows.append((name, values.min(), values.max(), difference))
    table("gate | least on [-6, 6] | most | model.py's MLP with it differs from the formula by", *rows)
    difference = largest(mlp(x) - (forms["SwiGLU: SiLU"][1] * up) @ mlp.down_proj.weight.T)
    assert difference < 1e-4, "without a change, model.py's MLP is SwiGLU"
    assert all(row[3] < 1e-4 for row in rows)
    assert rows[0][1] > 0 and rows[0][2] < 1
    for _, least, most, _ in rows[1:]:
        assert -0.3 < least < -0.1 and most > 5


def test_swiglu_at_eight_thirds_of_the_width_has_the_weights_of_a_plain_mlp_at_four_times():
    """Why is Llama's MLP 11008 wide, and not 4 times 4096?

    SwiGLU has three matrices where a plain MLP has two. 3 C h = 2 C (4 C) gives h = 8/3 C for the same number
    of weights. Llama rounds it up to a multiple of 256: 8/3 of 4096 is 10922.7, which becomes 11008. Models
    that save weights on heads of keys and values may spend them here: Llama 3 8B has h = 3.5 C.

    Often told: the MLP is 4 times as wide as the stream. That holds for two matrices, as in GPT-2.
    Code: model.py MLP
    Break: model.py MLP.__init__: `self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)`
    becomes `self.up_proj = self.gate_proj`
    Source: Shazeer (2020, arXiv 2002.05202), sec. 2; Touvron et al. (2023, arXiv 2302.13971), sec. 2.2;
    Llama's code, multiple_of, for the 256
    问: Llama 的 FFN 中间维度为什么是 11008，而不是 4 × 4096？
    答: SwiGLU 有三个矩阵而不是两个，要与 4d 宽的普通 FFN 参数量相同，中间维度应为 8d/3；4096 × 8/3 ≈
    10922.7，向上取到 256 的倍数就是 11008。
    """
    shapes = {
        "nano": dict(vocab_size=1, **PRESETS["nano"]),
        "small": dict(vocab_size=1, **PRESETS["small"]),
        "Llama 7B": LLAMA_2_7B,
        "Llama 13B": dict(vocab_size=1, n_embd=5120, n_head=40, n_kv_head=40, n_hidden=13_824),
        "Llama 3 8B": LLAMA_3_8B,
    }
    rows = []
    for name, shape in shapes.items():
        config = Config(**shape)
        C = config.n_embd
        with torch.device("meta"):  # shapes without memory
            n_weights = sum(p.numel() for p in MLP(config).parameters())
        rows.append((name, C, round(8 * C / 3, 1), config.n_hidden, n_weights / (8 * C**2)))
    table("model | width C | 8/3 C | width of the MLP | its weights relative to 8 C^2", *rows)
    assert [row[4] for row in rows[:2]] == [1, 1]
    for _, _, wanted, n_hidden, share in rows[2:4]:
        assert n_hidden == 256 * math.ceil(wanted / 256)
        assert 1 < share < 1.02
    assert rows[4][3] == 3.5 * rows[4][1]
