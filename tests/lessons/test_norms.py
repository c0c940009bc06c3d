"""Norms and residual connections: what is divided by what, and what a block adds to the stream."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, OpenAIGPTConfig, OpenAIGPTModel

from model import Block, Transformer, rope

from .book import drawn_model, largest, lines, moved_by, table, tiny_config


def rms(x):
    return x.detach().pow(2).mean().sqrt().item()


def angles(x):
    """What a block needs besides x (B, T, C): cos and sin of its positions."""
    return rope(torch.arange(x.size(1)), tiny_config(), x.dtype)


def post_norm(block, x, cos, sin, mask=None, append=None, a=1):
    """Block.forward as the first Transformer has it, norm(x + F(x)); DeepNorm's is norm(a x + F(x))."""
    x = block.input_layernorm(a * x + block.self_attn(x, cos, sin, mask, append))
    return block.post_attention_layernorm(a * x + block.mlp(x))


def norm_after(block, x, cos, sin, mask=None, append=None):
    """Block.forward with the norms behind the sublayers, x + norm(F(x))."""
    x = x + block.input_layernorm(block.self_attn(x, cos, sin, mask, append))
    return x + block.post_attention_layernorm(block.mlp(x))


def without_residual(block, x, cos, sin, mask=None, append=None):
    """Block.forward without its `x +`."""
    x = block.self_attn(block.input_layernorm(x), cos, sin, mask, append)
    return block.mlp(block.post_attention_layernorm(x))


def deep_model(n_layer, forward=None, **settings):
    """A drawn model whose stream begins with an RMS of 1; forward: one of the above instead of Block's."""
    model = drawn_model(n_layer=n_layer, n_hidden=64)
    nn.init.normal_(model.model.embed_tokens.weight)
    for block in model.model.layers:
        if forward is not None:
            block.forward = partial(forward, block, **settings)
    return model


def streams(model, ids):
    """The stream (B, T, C) before the first block and after each."""
    xs = [model.model.embed_tokens(ids)]
    cos, sin = angles(xs[0])
    for block in model.model.layers:
        xs.append(block(xs[-1], cos, sin))
    return xs


def random_batch():
    """ids and targets (B, T)."""
    return torch.randint(64, (2, 8, 16))


def test_layernorm_divides_by_the_biased_deviation_of_one_token():
    """What is LayerNorm?

    y = g (x - mean) / sqrt(var + eps) + b, with mean and variance over the channels of one token. The
    variance divides by n, not n - 1, and eps stands inside the root. Mean 0 and variance 1 hold, but for eps,
    before g and b only.

    Compare: model.py Block: RMSNorm, without mean and bias
    Source: Ba et al. (2016, arXiv 1607.06450), eq. 3 and 4
    问: LayerNorm 的公式是什么？方差除以 n 还是 n - 1？
    答: y = g·(x - 均值) / √(方差 + ε) + b，均值和方差在单个词元的各通道上计算；方差除以 n（有偏估计），ε 在根
    号内，均值 0、方差 1 只在乘 g 加 b 之前成立。
    """
    x = 0.003 * torch.randn(4, 8) + 0.002  # so small that the place of eps, 1e-5, is felt
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    centred, eps = x - x.mean(-1, keepdim=True), norm.eps
    biased, unbiased = (x.var(-1, unbiased=unbiased, keepdim=True) for unbiased in (False, True))
    ways = {
        "n, sqrt(var + eps)": centred / torch.sqrt(biased + eps),
        "n - 1, sqrt(var + eps)": centred / torch.sqrt(unbiased + eps),
        "n, sqrt(var) + eps": centred / (biased.sqrt() + eps),
    }
    rows = [(name, largest(norm.weight * z + norm.bias - norm(x))) for name, z in ways.items()]
    table("variance divides by, and root | difference from nn.LayerNorm", *rows)
    assert rows[0][1] < 1e-5
    assert rows[1][1] > 0.01 and rows[2][1] > 0.1
    large = 1000 * x
    before, after = F.layer_norm(large, (8,)), norm(large)
    assert largest(before.mean(-1)) < 1e-5 and largest(before.var(-1, unbiased=False) - 1) < 1e-4
    assert largest(after.mean(-1)) > 0.01 and largest(after.var(-1, unbiased=False) - 1) > 0.01


def test_rmsnorm_drops_the_mean_and_the_bias():
    """What is RMSNorm, and how does it differ from LayerNorm?

    y = g x / sqrt(mean(x^2) + eps). No mean is subtracted and no bias added: one sum over the channels
    instead of two, and half the parameters. On inputs of mean zero both are the same if b = 0.

    Often told: RMSNorm is for RNNs and LayerNorm for CNNs; it normalises the whole input at once.
    Code: model.py Block
    Break: model.py Block: `self.input_layernorm = nn.RMSNorm(` becomes `self.input_layernorm = nn.LayerNorm(`
    Source: Zhang & Sennrich (2019, arXiv 1910.07467), eq. 4
    问: RMSNorm 与 LayerNorm 有什么区别？
    答: RMSNorm 是 y = g·x / √(mean(x²) + ε)，不减均值、不加偏置，少算一次求和，参数减半；输入均值为 0（且 b =
    0）时两者结果相同。
    """
    norm, x = Block(tiny_config()).input_layernorm, torch.randn(4, 64)
    nn.init.normal_(norm.weight)
    centred = x - x.mean(-1, keepdim=True)
    rows = []
    for name, z in (("0", centred), ("about 1", x + 1)):
        by_hand = norm.weight * z / torch.sqrt(z.pow(2).mean(-1, keepdim=True) + norm.eps)
        layer_norm = norm.weight * F.layer_norm(z, (64,))
        rows.append((name, largest(norm(z) - by_hand), largest(norm(z) - layer_norm)))
    table("mean of the input | model.py's norm differs from the formula by | from LayerNorm by", *rows)
    n, n_of_layer_norm = (sum(p.numel() for p in m.parameters()) for m in (norm, nn.LayerNorm(64)))
    print(f"    parameters: {n} and {n_of_layer_norm}")
    assert max(rows[0][1], rows[1][1]) < 1e-5
    assert rows[0][2] < 1e-4 and rows[1][2] > 0.5
    assert n_of_layer_norm == 2 * n


def test_rmsnorm_ignores_the_scale_of_its_input_but_not_a_shift():
    """Why does it not hurt that RMSNorm drops the mean?

    LayerNorm gives the same for x, 7 x and x + 3, RMSNorm only for x and 7 x (as long as x is large against
    the root of eps). Its authors argue that LayerNorm steadies training because it ignores the scale, not
    because it ignores a shift; in their experiments RMSNorm does about as well.

    Code: model.py Block
    Break: model.py Block: `self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)`
    becomes `self.post_attention_layernorm = nn.Identity()`
    Source: Zhang & Sennrich (2019, arXiv 1910.07467), sec. 4
    问: RMSNorm 去掉减均值为什么不影响效果？
    答: LayerNorm 对输入的缩放和平移都不变，RMSNorm 只保留缩放不变性；作者认为稳定训练靠的是缩放不变性，实验中
    两者效果相当。
    """
    block, x = drawn_model().model.layers[0], torch.randn(4, 64)
    norms = {"RMSNorm, of model.py": block.post_attention_layernorm, "LayerNorm": nn.LayerNorm(64)}
    rows = []
    for name, norm in norms.items():
        before = block.mlp(norm(x))  # what the MLP makes of what it reads
        scaled, shifted = block.mlp(norm(7 * x)), block.mlp(norm(x + 3))
        rows.append((name, largest(scaled - before), largest(shifted - before)))
    table("norm | the MLP's output changes with 7 x by | with x + 3 by", *rows)
    assert rows[0][1] < 1e-3 and rows[0][2] > 0.5
    assert rows[1][1] < 1e-3 and rows[1][2] < 1e-3


def test_norms_of_a_token_are_local_and_batchnorm_leaks_the_future():
    """Why not BatchNorm?

    Because its mean and variance are taken over batch and time: what it makes of a token depends on later
    tokens, which no causal model may see, on the rest of the batch, and on the mode, training or not.
    LayerNorm and RMSNorm look at one token.

    Often told: LayerNorm normalises over the sequence; BatchNorm suffers from small batches only.
    Code: model.py Block.forward
    Break: model.py Block.forward: `self.input_layernorm(x)` becomes `F.instance_norm(x.mT).mT`
    Source: Ba et al. (2016, arXiv 1607.06450); Shen et al. (2020, arXiv 2003.07845)
    问: Transformer 为什么用 LayerNorm 而不用 BatchNorm？
    答: BatchNorm 的均值和方差跨批次和时间统计，一个词元的结果会依赖后面的词元（泄漏未来）、同批的其他样本以及
    训练/推理模式；LayerNorm 和 RMSNorm 只看单个词元。
    """

    class BatchNorm(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).view_as(x)

    x = torch.randn(2, 6, 64)
    other_text = torch.cat((x[:1], torch.randn(1, 6, 64)))
    rows = []
    for norm in (nn.RMSNorm(64, 1e-5), nn.LayerNorm(64), BatchNorm(64)):
        block = drawn_model().model.layers[0]
        if not isinstance(norm, nn.RMSNorm):
            block.input_layernorm = norm

        def read(x, block=block):
            return block(x, *angles(x))

        by_the_future = moved_by(read, x[:1], 5)[0]
        by_the_batch = largest((read(other_text) - read(x))[0])
        in_training = read(x)
        block.eval()
        rows.append((type(norm).__name__, by_the_future, by_the_batch, largest(read(x) - in_training)))
    table("norm | another token 5 moves the output of token 0 by | another text by | the mode by", *rows)
    for row in rows[:2]:
        assert max(row[1:]) < 1e-5
    assert min(rows[2][1:]) > 0.05


def test_a_pre_norm_block_is_the_identity_while_its_sublayers_give_zero():
    """Where exactly does a norm stand in pre-norm and post-norm?

    Pre-norm is x + F(norm(x)), post-norm is norm(x + F(x)). With F = 0 the first is the identity, a clean
    path for the gradient, and the second still normalises. Blocks here start with F = 0.

    Often told: pre-norm is x + norm(F(x)). That norm undoes any scale of F: a thousandfold F adds the same
    (which OLMo 2 does on purpose).
    Code: model.py Block.forward
    Break: model.py Block.forward: `x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin,
    mask, append))` becomes `x = self.input_layernorm(x + self.dropout(self.self_attn(x, cos, sin, mask,
    append)))`
    Source: Xiong et al. (2020, arXiv 2002.04745), fig. 1
    问: Pre-norm 和 Post-norm 的区别是什么？
    答: Pre-norm 是 x + F(norm(x))，Post-norm 是 norm(x + F(x))；当 F = 0 时前者是恒等映射，梯度有一条畅通的残
    差通路，后者仍会做归一化。
    """
    x = 2 * torch.randn(1, 5, 64)
    drawn = drawn_model().model.layers[0]
    kinds = {
        "model.py's, x + F(norm(x))": Block.forward,
        "post-norm, norm(x + F(x))": post_norm,
        "told as pre-norm, x + norm(F(x))": norm_after,
    }
    rows = []
    for name, forward in kinds.items():
        outputs = []
        for scale in (0, 1, 1000):
            block = copy.deepcopy(drawn)
            block.self_attn.o_proj.weight.data *= scale
            block.mlp.down_proj.weight.data *= scale
            outputs.append(forward(block, x, *angles(x)))
        zero, once, thousandfold = outputs
        rows.append((name, largest(zero - x), largest(thousandfold - once)))
    table("block | moves x with F = 0 by | a thousandfold F changes it by", *rows)
    pre, post, told = (row[1:] for row in rows)
    assert pre[0] == 0 and post[0] > 0.5
    assert pre[1] > 100 and told[1] < 1e-2
    new = Transformer(tiny_config()).model.layers[0]
    assert torch.equal(new(x, *angles(x)), x)


def test_gpt_1_and_bert_are_post_norm_and_gpt_2_and_llama_are_pre_norm():
    """Which norm do GPT, BERT and Llama use, and where?

    GPT-1 and BERT: LayerNorm, post-norm. GPT-2: LayerNorm, pre-norm, and one more behind the last block;
    GPT-3 the same. Llama, Mistral and Qwen, and the blocks here: RMSNorm, pre-norm, and one more at the end.
    A test tells: with zeros for all matrices and biases, a pre-norm block returns its input.

    Often told: GPT-3 is post-norm; the GPTs use a GPT-Norm, which does not exist.
    Code: model.py Block.forward
    Break: model.py Block.forward: `return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))`
    becomes `return self.post_attention_layernorm(x + self.dropout(self.mlp(x)))`
    Source: Radford et al. (2019), sec. 2.3; Brown et al. (2020, arXiv 2005.14165), sec. 2.1; Touvron et al.
    (2023, arXiv 2302.13971), sec. 2.2
    问: GPT、BERT、Llama 分别用什么归一化，放在哪里？
    答: GPT-1 和 BERT 是 Post-LayerNorm；GPT-2、GPT-3 是 Pre-LayerNorm，并在最后一层之后再加一
    个；Llama、Mistral、Qwen 用 Pre-RMSNorm，末尾同样再加一个。
    """
    gpt = dict(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)
    bert = dict(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    gpt1, gpt2 = OpenAIGPTModel(OpenAIGPTConfig(**gpt)), GPT2Model(GPT2Config(**gpt))
    blocks = {
        "GPT-1": gpt1.h[0],
        "BERT": BertModel(BertConfig(intermediate_size=128, **bert)).encoder.layer[0],
        "GPT-2": gpt2.h[0],
        "model.py, as Llama": drawn_model().model.layers[0],
    }
    x, rows = 3 * torch.randn(1, 5, 64), []
    for name, block in blocks.items():
        kinds = {type(m).__name__ for m in block.modules() if type(m).__name__.endswith("Norm")}
        for m in block.modules():
            if not type(m).__name__.endswith("Norm"):
                for p in m.parameters(recurse=False):
                    nn.init.zeros_(p)
        arguments = angles(x) if isinstance(block, Block) else ()
        with torch.no_grad():
            y = block.eval()(x, *arguments)
        y = y[0] if isinstance(y, list | tuple) else y
        rows.append((name, *kinds, largest(y - x)))
    table("block of | norm | moves x, with zeros for matrices and biases, by", *rows)
    assert [row[1] for row in rows] == ["LayerNorm", "LayerNorm", "LayerNorm", "RMSNorm"]
    assert rows[0][2] > 1 and rows[1][2] > 1
    assert rows[2][2] == rows[3][2] == 0
    assert hasattr(gpt2, "ln_f") and not hasattr(gpt1, "ln_f")


def test_residual_connections_keep_the_gradient_and_the_tokens_apart_at_any_depth():
    """What are residual connections for?

    The derivative of x + F(x) is 1 + F'(x): through the 1 the gradient has a straight way to the first layer.
    Without `x +` it is a product of the F' of all layers, which grows or shrinks exponentially with the
    depth; here it grows. Attention also averages tokens: if nothing is kept of what each of them was, all end
    in the same direction.

    Often told: they keep the input from being lost. That is half of it; the other half is the gradient.
    Code: model.py Block.forward
    Break: model.py Block.forward: `return x + self.dropout(self.mlp(` becomes `return self.dropout(self.mlp(`
    Source: He et al. (2016, arXiv 1603.05027), eq. 5; Dong et al. (2021, arXiv 2103.03404) on the tokens
    问: 残差连接有什么作用？
    答: x + F(x) 的导数是 1 + F'(x)，梯度可以沿恒等通路直达第一层；没有它，梯度是各层导数的连乘，随深度指数级
    爆炸或消失，而且注意力反复平均会让所有词元的向量趋于同一个方向。
    """
    ids, targets = random_batch()
    rows = []
    for name, forward in (("with x +, model.py", None), ("without", without_residual)):
        gradients = []
        for n_layer in (2, 8, 32):
            model = deep_model(n_layer, forward)
            model.loss(ids, targets).backward()
            gradients.append(model.model.embed_tokens.weight.grad.norm())
        x = streams(model, torch.arange(16)[None])[-1][0]  # 16 different tokens behind 32 blocks
        x = F.normalize(x, dim=-1)
        cosines = (x @ x.T)[~torch.eye(16, dtype=torch.bool)]
        rows.append((name, *gradients, cosines.mean()))
    table("block | gradient at the embedding, 2 blocks | 8 | 32 | cosine of two tokens behind 32", *rows)
    kept, lost = (row[1:] for row in rows)
    assert 1 / 3 < kept[2] / kept[0] < 3
    assert lost[2] / lost[0] > 100
    assert kept[3] < 0.95 and lost[3] > 0.999


def test_the_stream_of_a_pre_norm_model_grows_so_that_late_layers_change_it_less():
    """Why does a pre-norm model need a norm at the end?

    Each sublayer adds a vector of about the same size to the stream. At the start these are nearly
    independent, so the RMS grows like the square root of the depth, and the share that a layer adds shrinks.
    The last norm brings the size back before the head. In post-norm each norm does that at once.

    Code: model.py Block.forward
    Break: model.py Block.forward: `self.mlp(self.post_attention_layernorm(x))` becomes `self.mlp(x)`
    Source: Xiong et al. (2020, arXiv 2002.04745), lemma 2; Liu et al. (2020, arXiv 2004.08249)
    问: 为什么 Pre-norm 模型最后还要加一个归一化？为什么说越深的层作用越小？
    答: 每个子层都往残差流里加一个大小相近的向量，残差流的 RMS 大约按层数的平方根增长，越往后每层的相对贡献越
    小；最后的归一化在输出矩阵之前把尺度拉回来。
    """
    ids, _ = random_batch()
    model = deep_model(32)
    xs = streams(model, ids)
    sizes = [rms(x) for x in xs]
    of_post_norm = [rms(x) for x in streams(deep_model(32, post_norm), ids)]
    rows = []
    for i in (1, 8, 32):
        rows.append((i, sizes[i], rms(xs[i] - xs[i - 1]) / sizes[i - 1], of_post_norm[i]))
    table("block | RMS of the stream | what it adds, as a share | RMS in post-norm", *rows)
    after_the_norm = rms(model.hidden(ids))
    print(f"    RMS after the norm at the end: {after_the_norm:.3f}")
    curves = {"pre-norm": (range(33), sizes), "post-norm": (range(33), of_post_norm)}
    lines("The size of the stream in 32 random blocks", "block", "RMS of the stream", curves)
    assert 1.5 < sizes[32] / sizes[8] < 2.7  # 2 for a square root
    assert rows[0][2] > 0.5 and rows[2][2] < 0.3
    assert abs(after_the_norm - 1) < 1e-2
    assert max(of_post_norm[1:]) < 1.01


def test_scaling_or_zeroing_what_writes_to_the_stream_keeps_its_size_at_any_depth():
    """Why do the matrices that write to the stream start smaller than the others?

    2L sublayers add to it. If o_proj and down_proj are drawn like the others, the RMS grows like sqrt(L).
    GPT-2 scales them by 1/sqrt(2L), so that all layers together add about as much at any depth. This project
    starts them at zero, and the stream is at first the embedding itself.

    Code: model.py Transformer.init_weights
    Break: model.py Transformer.init_weights: `name.endswith("bias") or "o_proj" in name or "down_proj" in
    name` becomes `name.endswith("bias")`
    Source: Radford et al. (2019), sec. 2.3
    问: 为什么写入残差流的矩阵（o_proj、down_proj）初始化要乘 1/√(2L)？
    答: 共有 2L 个子层往残差流里累加，不缩放时 RMS 随 √L 增长；乘以 1/√(2L) 后总增量与深度无关（GPT-2 的做
    法），本项目则直接初始化为零，开始时残差流就是词嵌入本身。
    """
    ids, _ = random_batch()
    rows = []
    for n_layer in (2, 8, 32):
        drawn = deep_model(n_layer)
        scaled = copy.deepcopy(drawn)
        for block in scaled.model.layers:
            block.self_attn.o_proj.weight.data *= (2 * n_layer) ** -0.5
            block.mlp.down_proj.weight.data *= (2 * n_layer) ** -0.5
        growth = []
        for model in (drawn, scaled, Transformer(tiny_config(n_layer=n_layer))):
            first, *_, last = streams(model, ids)
            growth.append(rms(last) / rms(first))
        rows.append((n_layer, *growth))
    table("layers | the RMS grows, times: all drawn alike | with 1/sqrt(2L) | from zero, as here", *rows)
    assert 2.5 < rows[2][1] / rows[0][1] < 4.5  # 4 for a square root, less since it begins with 1
    assert max(row[2] for row in rows) / min(row[2] for row in rows) < 1.2
    assert all(row[3] == 1 for row in rows)


def test_the_gradient_of_the_last_layer_ignores_depth_in_post_norm_and_not_in_pre_norm():
    """Why does post-norm need a warm-up, and pre-norm much less?

    At the start, the last layer of a post-norm stack has a gradient of the same size at any depth L; with
    pre-norm it falls like 1/sqrt(L), as the last norm divides by a stream that has grown. So, Xiong et al.
    argue, the full rate is too much for a deep post-norm stack at first. That fits SGD, but Adam divides by
    the gradient's size. There the cause is disputed: Liu et al. find that post-norm magnifies every change of
    the weights.

    Often told: this holds for all layers. The theorem is about the last one.
    Code: model.py Transformer.hidden
    Break: model.py Transformer.hidden: `return self.model.norm(x)` becomes `return x`
    Source: Xiong et al. (2020, arXiv 2002.04745), theorem 1; Liu et al. (2020, arXiv 2004.08249)
    问: 为什么 Post-norm 训练需要学习率预热，而 Pre-norm 不太需要？
    答: 初始化时，Post-norm 最后一层的梯度大小与深度无关，而 Pre-norm 的按 1/√L 下降（末尾的归一化除以了变大的
    残差流），所以深层 Post-norm 一开始就用满学习率步子过大。这适用于 SGD；Adam 会除以梯度的大小，其中的原因仍
    有争议。
    """
    ids, targets = random_batch()
    rows = []
    for name, forward in (("post-norm", post_norm), ("pre-norm, of model.py", None)):
        gradients = []
        for n_layer in (2, 8, 32):
            model = deep_model(n_layer, forward)
            nn.init.normal_(model.model.embed_tokens.weight, std=1 / 8)  # moderate logits, as it is the head
            model.loss(ids, targets).backward()
            gradients.append(model.model.layers[-1].mlp.down_proj.weight.grad.norm())
        rows.append((name, *gradients))
    table("kind | gradient of the last of 2 layers | of 8 | of 32", *rows)
    post, pre = (row[3] / row[1] for row in rows)
    assert 0.6 < post < 1.6
    assert 0.15 < pre < 0.4  # 1/4 for 1/sqrt(L)


def test_a_sandwich_norm_bounds_what_a_layer_can_add():
    """What is Sandwich-LN?

    x + norm(F(norm(x))): the second norm fixes the size of what a sublayer adds (up to a learned gain), so
    that a layer whose weights blow up cannot flood the stream.

    Compare: model.py Block.forward: one norm before each sublayer, and none behind it
    Source: Ding et al. (2021, arXiv 2105.13290)
    问: 什么是 Sandwich-LN？
    答: 形式是 x + norm(F(norm(x)))：在子层之后再加一个归一化，把写入残差流的向量大小固定住，即使某层权重变得
    很大也不会冲垮残差流。
    """
    x, rows = torch.randn(1, 64, 64), []
    drawn = drawn_model().model.layers[0]

    def norm_output(module, args, output):
        return F.rms_norm(output, (64,))

    for scale in (1, 100):
        pre_norm = copy.deepcopy(drawn)
        pre_norm.self_attn.o_proj.weight.data *= scale
        pre_norm.mlp.down_proj.weight.data *= scale
        sandwich = copy.deepcopy(pre_norm)
        sandwich.self_attn.register_forward_hook(norm_output)
        sandwich.mlp.register_forward_hook(norm_output)
        rows.append((scale, *(rms(block(x, *angles(x)) - x) for block in (pre_norm, sandwich))))
    table("scale of o_proj and down_proj | a pre-norm block adds (RMS) | a sandwich adds", *rows)
    assert rows[1][1] > 30
    assert max(row[2] for row in rows) < 2.01  # two sublayers, each of RMS 1


def test_deepnorm_makes_the_first_update_independent_of_depth():
    """What is DeepNorm?

    x <- norm(a x + F(x)), and the initial weights of values, outputs and MLP are multiplied by b; for a
    decoder of L layers a = (2L)^(1/4) and b = (8L)^(-1/4). The norms are those of post-norm; what changes is
    that the first update of the matrices moves the output about as far at any depth. GLM-130B was trained
    with it, but with a = (2L)^(1/2).

    Often told: it adds norms, or keeps running means.
    Compare: model.py Block.forward: pre-norm, so neither factor is needed
    Source: Wang et al. (2022, arXiv 2203.00555), fig. 2; Zeng et al. (2022, arXiv 2210.02414)
    问: DeepNorm 是怎么做的？解决什么问题？
    答: x ← norm(a·x + F(x))，并把 V、输出和 MLP 的初始权重乘以 b，解码器取 a = (2L)^(1/4)、b = (8L)^(-1/4)；
    它仍是 Post-norm，但第一次更新对输出的改变不再随深度增大，因此能训练很深的网络。
    """
    ids, _ = random_batch()
    wanted = torch.randn(8, 16, 64)

    def first_update(a, b, n_layer, lr=1e-3):
        """By which share of its size one step of SGD on all matrices moves the output of the last block."""
        model = deep_model(n_layer, post_norm, a=a)
        for name, p in model.model.layers.named_parameters():
            if any(part in name for part in ("v_proj", "o_proj", "mlp")):
                p.data *= b
        before = streams(model, ids)[-1]
        ((before - wanted) ** 2).sum(-1).mean().backward()
        torch.optim.SGD([p for p in model.model.layers.parameters() if p.ndim == 2], lr).step()
        return rms(streams(model, ids)[-1] - before) / rms(before)

    depths = (2, 8, 32)
    post = [first_update(1, 1, L) for L in depths]
    deep = [first_update((2 * L) ** 0.25, (8 * L) ** -0.25, L) for L in depths]
    heads = "one step of SGD moves the output by | 2 layers | 8 | 32"
    table(heads, ("post-norm", *post), ("DeepNorm", *deep))
    assert post[2] > 5 * post[0]
    assert max(deep) / min(deep) < 2
