"""Architectures: encoders, decoders and recurrent networks, BERT, mixtures of experts, other checkpoints."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from data.examples import Example
from data.loader import IGNORED, Blocks
from finetune import exact_match
from model import MLP, Attention, KVCache, Transformer, config_from_json, config_to_json, rope

from .book import (
    CHARACTERS,
    SPEECH,
    causal,
    drawn_model,
    forward,
    largest,
    lines,
    moved_by,
    places,
    table,
    tiny_config,
    to_ids,
    to_text,
    train,
    weights_of,
)


def two_way(T):
    """Which keys a query of an encoder sees: all of them."""
    return torch.ones(T, T, dtype=torch.bool)


def cross_attention(attention, x, memory):
    """An Attention of model.py with keys and values of another sequence, without a mask and without RoPE.

    x (T, C), memory (S, C) -> (T, C)
    """
    q = attention.q_proj(x).view(len(x), -1, attention.head_dim).transpose(0, 1)  # (H, T, D)
    k = attention.k_proj(memory).view(len(memory), -1, attention.head_dim).transpose(0, 1)  # (K, S, D)
    v = attention.v_proj(memory).view(len(memory), -1, attention.head_dim).transpose(0, 1)  # (K, S, D)
    y = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)[0]  # (H, T, D)
    return attention.o_proj(y.transpose(0, 1).reshape(len(x), -1))


def hide_as_bert(ids, mask_id, masked=0.8, swapped=0.1):
    """ids (B, T) -> what the model is shown, and its targets: 15 % of the tokens.

    Of the targets a share `masked` shows [MASK], a share `swapped` a random token, the rest what is there.
    """
    is_target = torch.rand(ids.shape) < 0.15
    u = torch.rand(ids.shape)
    shown = ids.masked_fill(is_target & (u < masked), mask_id)
    is_swapped = is_target & (u >= masked) & (u < masked + swapped)
    shown = torch.where(is_swapped, torch.randint_like(ids, mask_id), shown)
    return shown, ids.where(is_target, IGNORED)


def mixture(x, router, experts, k):
    """Send each token to its best k experts: x (N, C) -> y (N, C), probabilities (N, E), chosen (N, k)."""
    p = router(x).softmax(-1)
    weights, chosen = p.topk(k, -1)
    if k > 1:  # a single one keeps its probability, through which the router learns
        weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, place = (chosen == e).nonzero(as_tuple=True)
        y[token] += weights[token, place, None] * expert(x[token])
    return y, p, chosen


def share_of_each(chosen, E):
    """Which share of the tokens goes to each of E experts, (E,)."""
    return chosen.flatten().bincount(minlength=E) / chosen.numel()


def balancing_loss(p, chosen):
    """E times the sum over experts of (share of the tokens) * (mean probability)."""
    E = p.size(-1)
    return E * (share_of_each(chosen, E) * p.mean(0)).sum()


def config_of(kind, **fields):
    """The config of a small model of transformers: one layer, 64 tokens."""
    special = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return AutoConfig.for_model(kind, vocab_size=64, num_hidden_layers=1, **special, **fields)


def draw_weights(model):
    """Make the matrices and biases of a model of transformers random, as book.drawn_model does with ours."""
    for name, p in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(p, std=p.size(-1) ** -0.5)


def test_encoder_and_decoder_differ_by_the_mask():
    """What is the difference between an encoder and a decoder?

    The mask. In an encoder all tokens see each other; in a decoder a token sees itself and what is before it,
    so that every output can predict the next token. The same weights can run as either. An encoder-decoder
    has a stack of each kind, and the decoder's blocks read the encoder's output, too.

    Often told: a decoder-only model does not process its input. It reads the prompt with the same blocks that
    write the answer.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True` becomes `is_causal=False`
    Source: Vaswani et al. (2017), sec. 3.1; Raffel et al. (2020, arXiv 1910.10683), sec. 3.2
    问: 编码器（Encoder）和解码器（Decoder）的本质区别是什么？
    答: 区别在掩码：编码器里所有词元互相可见，解码器用因果掩码，每个词元只能看到自己和前面的内容；同一套权重换
    一个掩码就能当另一种用。编码器-解码器模型两者都有，解码器还要读取编码器的输出。
    """
    model, ids, rows = drawn_model(), torch.randint(64, (1, 8)), []
    for name, function in (("encoder", partial(forward, model, mask=two_way(8))), ("decoder", model)):
        moved = [places(moved_by(function, ids, position) > 1e-5) for position in (0, 7)]
        rows.append((name, *moved))
    table("the same weights as | outputs that move with the first token | with the last token", *rows)
    everywhere = list(range(8))
    assert rows[0][1:] == (everywhere, everywhere)
    assert rows[1][1:] == (everywhere, [7])


def test_cross_attention_reads_the_encoder_with_queries_from_the_decoder():
    """How does a decoder read what the encoder has made of the input?

    By cross-attention, a second attention in each of its blocks. Queries come from the T tokens of the
    decoder, keys and values from the S outputs of the encoder: T x S scores. There is no causal mask, since
    the whole input is known: every token of the decoder sees all of it. The order of the encoder's outputs
    does not count; positions must be in the vectors. In self-attention queries, keys and values come from one
    sequence.

    Often told: encoder and decoder share their attention. Each attention has weights of its own.
    Compare: model.py Attention.forward: queries, keys and values all come from one x
    Source: Vaswani et al. (2017), sec. 3.2.3; Bahdanau et al. (2015, arXiv 1409.0473)
    问: 编码器和解码器之间如何交互？交叉注意力与自注意力有什么区别？
    答: 通过交叉注意力：Q 来自解码器，K、V 来自编码器的输出，没有因果掩码，解码器的每个位置都能看到整个输入，
    顺序信息须已在这些输出里；自注意力的 Q、K、V 则来自同一个序列。
    """
    attention = Attention(tiny_config())
    x, memory = torch.randn(4, 64), torch.randn(9, 64)
    y = cross_attention(attention, x, memory)
    other_x, other_memory = x.clone(), memory.clone()
    other_x[3], other_memory[8] = torch.randn(64), torch.randn(64)
    changes = {
        "the last vector of the encoder": cross_attention(attention, x, other_memory),
        "the order of the encoder's vectors": cross_attention(attention, x, memory.flip(0)),
        "the last vector of the decoder": cross_attention(attention, other_x, memory),
    }
    moved = [places((other - y).abs().amax(-1) > 1e-5) for other in changes.values()]
    rows = [(name, outputs or "none") for name, outputs in zip(changes, moved)]
    table("what changes | outputs of 4 tokens that move", *rows)
    assert moved == [[0, 1, 2, 3], [], [3]]
    # with one sequence on both sides it is the project's own self-attention, two-way and not rotated
    itself = attention(x[None], torch.ones(4, 8), torch.zeros(4, 8), two_way(4)[None, None])[0]
    assert largest(cross_attention(attention, x, x) - itself) < 1e-5


def test_a_summary_of_fixed_size_loses_what_a_kv_cache_keeps():
    """What did attention change in sequence-to-sequence models?

    The first neural translators read the input into one vector, and wrote from that. Such a vector is a
    bottleneck: d weighted sums of n > d independent numbers, all of the same variance, lose 1 - d/n of it.
    Attention keeps a key and a value of every token, and reads what it needs; in return, its memory grows
    with the text.

    Code: model.py KVCache.append
    Break: model.py KVCache.append: `self.v[layer][rows, heads, positions] = v` becomes
    `self.v[layer][rows, heads, 0 * positions] = v`
    Source: Cho et al. (2014, arXiv 1409.1259); Bahdanau et al. (2015, arXiv 1409.0473), sec. 1
    问: 与传统 seq2seq 相比，注意力机制解决了什么问题？
    答: 传统 seq2seq 把整个输入压成一个定长向量，n 个独立同方差的数只剩 d 个加权和时会丢掉 1 - d/n 的方差；
    注意力为每个词元保留 K 和 V，按需读取，代价是存储随长度增长。
    """
    D, rows = 32, []
    config = tiny_config(n_layer=1, n_embd=3 * D, n_head=1, n_kv_head=1, head_dim=D)
    attention, eye = Attention(config), torch.eye(3 * D)
    with torch.no_grad():  # a vector is [the name asked for | a name | a value], each of D numbers
        attention.q_proj.weight[:] = 60 * D**0.5 * eye[:D]
        attention.k_proj.weight[:] = eye[D : 2 * D]
        attention.v_proj.weight[:] = eye[2 * D :]
        attention.o_proj.weight[:] = eye[:, 2 * D :]
    for n in (16, 32, 64, 128):
        numbers = torch.randn(2000, n)
        sums = numbers @ torch.randn(n, D)
        restored = sums @ torch.linalg.lstsq(sums, numbers).solution
        names, values, nothing = F.normalize(torch.randn(n, D), dim=-1), torch.randn(n, D), torch.zeros(n, D)
        cache = KVCache(config, batch_size=1, max_len=2 * n)
        for x in (torch.cat((nothing, names, values), -1), torch.cat((names, nothing, nothing), -1)):
            positions, mask = cache.begin(n)
            append = partial(cache.append, 0, positions, mask)
            y = attention(x[None], torch.ones(n, D // 2), torch.zeros(n, D // 2), mask, append)
        errors = (restored - numbers).pow(2).mean(), (y[0, :, 2 * D :] - values).pow(2).mean()
        rows.append((n, errors[0], max(0, 1 - D / n), errors[1]))
    table("n | share of the variance lost by 32 sums | 1 - 32/n | by keys and values of n tokens", *rows)
    for _, lost, theory, lost_by_cache in rows:
        assert abs(lost - theory) < 0.03
        assert lost_by_cache < 0.01


def test_gradients_fade_with_distance_in_an_rnn_but_not_in_a_transformer():
    """Why do Transformers handle long texts better than recurrent networks?

    In a recurrent network the signal of a distant token passes one matrix and one nonlinearity per step, so
    its gradient shrinks (or explodes) exponentially with the distance. The gates of a GRU or LSTM can learn
    to slow that; fresh ones fade, too. In attention any two positions are one step apart, whatever their
    distance. The price is a score for each pair of tokens.

    Often told: a recurrent network can't see distant tokens. It can; what is hard is to learn it.
    Code: model.py Block.forward
    Break: model.py Block.forward: `x = x + self.dropout(self.self_attn` becomes `x = x + 0 *
    self.dropout(self.self_attn`
    Source: Vaswani et al. (2017), sec. 4 and table 1; Pascanu et al. (2013, arXiv 1211.5063)
    问: 与 RNN 相比，Transformer 为什么更擅长处理长距离依赖？
    答: RNN 中远处词元的信号每走一步都要乘一个雅可比矩阵，梯度随距离指数衰减或爆炸；
    注意力中任意两个位置只隔一步，代价是每对词元都要算一个分数。
    """
    model, x, rows = drawn_model(), torch.randn(1, 64, 64), []
    networks = {"Transformer": model, "RNN": nn.RNN(64, 64), "GRU": nn.GRU(64, 64)}
    for name, network in networks.items():
        inputs = x.clone().requires_grad_()
        if network is model:
            last = forward(model, inputs)[0, -1]
        else:
            last = network(inputs[0])[0][-1]  # (T, C) -> (T, C)
        last.sum().backward()
        by_distance = inputs.grad[0].norm(dim=-1).flip(0)
        rows.append((name, *(by_distance[distance] / by_distance[1] for distance in (1, 16, 63))))
    table("network, untrained | gradient of the last output at distance 1 | 16 | 63", *rows)
    transformer, *recurrent = rows
    assert 0.1 < transformer[2] < 10 and 0.1 < transformer[3] < 10
    for row in recurrent:
        assert row[2] < 0.02 and row[3] < 1e-6


def test_causal_training_has_a_target_at_every_position():
    """Why are most large language models decoders only?

    No proof says that they must be. What can be counted: in one pass over T tokens a causal model has T
    targets, a prefix model those behind the prefix, BERT 15 %. In a large comparison the causal decoder was
    best straight after pretraining, without any examples (zero-shot); after fine-tuning on many tasks, models
    that read their input both ways were better (Wang et al.).

    Often told: a model that reads both ways can't generate. T5 reads its input both ways, and generates.
    Code: model.py Transformer.loss
    Break: model.py Transformer.loss: `(targets != -100).sum().clamp(min=1)` becomes `targets.numel()`
    Source: Clark et al. (2020, arXiv 2003.10555), sec. 1; Wang et al. (2022, arXiv 2204.05832)
    问: 为什么现在的大模型大多采用 decoder-only 架构？
    答: 并没有定论；可以数清的一点是训练信号更密：同样跑一遍 T 个词元，因果模型每个位置都有目标，
    前缀模型只有前缀之后的，BERT 只有 15%；实验上，因果解码器预训练后的零样本效果最好，
    但多任务微调之后双向读入的模型更好。
    """
    T, model, rows = 128, drawn_model(), []
    ids, targets = Blocks(torch.randint(64, (1000,)).numpy(), T, seed=0).batch(0, batch_size=1)
    has_target = {
        "causal": torch.ones(T, dtype=torch.bool),
        "prefix of half": torch.arange(T) >= T // 2,
        "BERT": torch.randperm(T) < int(0.15 * T),  # of any order; what BERT shows is a lesson of its own
    }
    for name, kept in has_target.items():
        of_these = targets.where(kept, IGNORED)
        with torch.no_grad():
            n = model.summed_loss(ids, of_these)[0] / model.loss(ids, of_these)
        rows.append((name, round(n.item())))
    table("model | targets in 128 tokens", *rows)
    assert (targets != IGNORED).all()
    assert [n for _, n in rows] == [128, 64, 19]


def test_causal_attention_has_full_rank_and_two_way_attention_need_not():
    """What is the "low-rank problem" of two-way attention?

    The scores Q K^T of a head of width D have rank D at most. The log of the weights is the scores less one
    number per row, so here, with D = 4, it has rank 5. The softmax itself may raise the rank, but nothing
    says that it must. The weights of causal attention are a triangular matrix, whose determinant is the
    product of its diagonal. A softmax gives nothing but positive numbers there, so the rank is always full.

    Often told: two-way attention is of low rank, therefore decoders are better. The first half can be
    measured; the second is a conjecture.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True` becomes `is_causal=False`
    Source: Bhojanapalli et al. (2020, arXiv 2002.07028) for the scores; the rest is linear algebra
    问: 双向注意力的“低秩问题”是什么？它能解释 decoder-only 更好吗？
    答: QKᵀ 的秩不超过头的宽度，softmax 之后也不保证满秩；因果注意力矩阵是下三角且对角线全为正，
    行列式等于对角线之积，因此必然满秩。但由此推出解码器更好只是猜想。
    """
    T, D = 32, 4
    attention = Attention(tiny_config(n_embd=T, n_head=1, n_kv_head=1))
    with torch.no_grad():
        attention.q_proj.weight[D:] = 0  # a head of width 4
    x, still = torch.randn(T, T), torch.zeros(T)  # all at position 0, so that RoPE rotates nothing
    both_ways = weights_of(attention, x, still, two_way(T)).double()[0]
    one_way = weights_of(attention, x, still).double()[0]

    def rank(matrix):  # numerical: what is smaller drowns in rounding
        s = torch.linalg.svdvals(matrix)
        return int((s > 1e-3 * s[0]).sum())

    rows = [
        ("log of the two-way weights", rank(both_ways.log()), torch.linalg.slogdet(both_ways.log())[1]),
        ("two-way weights", rank(both_ways), torch.linalg.slogdet(both_ways)[1]),
        ("causal weights", rank(one_way), torch.linalg.slogdet(one_way)[1]),
    ]
    table(
        "matrix of 32 x 32 | singular values over 0.1 % of the largest | ln of the determinant's size", *rows
    )
    assert rows[0][1] == D + 1  # the scores, and what the softmax subtracts from each row
    assert rows[1][1] < T and rows[2][1] == T
    assert abs(rows[2][2] - one_way.diagonal().log().sum()) < 1e-6


def test_trained_only_at_masks_a_model_neglects_ordinary_tokens():
    """What are BERT's 15 %, and its 80, 10 and 10 %?

    15 % of the positions are targets. Of these 80 % show [MASK], 10 % a random token and 10 % what stood
    there. Text in use has no [MASK], so the model must make useful vectors of ordinary tokens, too. If all
    targets show [MASK], nothing trains the outputs at other tokens. In BERT's own ablation that hurt where
    its vectors were used as they are, and hardly where it was fine-tuned. For a model of the size of BERT
    large, 40 % turned out better than 15 % (Wettig et al.).

    Often told: if a token were always masked, fine-tuning would meet unseen words. The words are known; it is
    [MASK] that never comes again.
    Compare: model.py Transformer.loss: a target at every position, the token after it
    Source: Devlin et al. (2019), sec. 3.1 and app. C.2; Wettig et al. (2023, arXiv 2202.08005)
    问: BERT 的 15% 和 80/10/10 是什么意思？为什么不全部换成 [MASK]？
    答: 随机选 15% 的位置作为目标，其中 80% 换成 [MASK]、10% 换成随机词、10% 保持不变；下游任务里没有 [MASK]，
    如果只在 [MASK] 处训练，模型在普通词元处的输出就得不到训练。15% 并非最优：对 BERT large 规模的模型，40% 效
    果更好。
    """
    V, T = 20, 16  # the id of [MASK] is V

    def texts(n):
        return (torch.randint(V, (n, 1)) + torch.arange(T)) % V  # they count, from anywhere

    def trained(masked, swapped):
        torch.manual_seed(0)
        model = Transformer(tiny_config(vocab_size=V + 1, n_layer=1))

        def batch(step):
            return hide_as_bert(texts(16), V, masked, swapped)

        def loss(shown, targets):
            return F.cross_entropy(forward(model, shown, two_way(T)).flatten(0, 1), targets.flatten())

        train(model, batch, 100, 1e-2, loss)
        return model

    rows = []
    for name, masked, swapped in (("100, 0, 0 %", 1, 0), ("80, 10, 10 %", 0.8, 0.1)):
        model, ids = trained(masked, swapped), texts(200)
        shown, targets = hide_as_bert(ids, V, masked=1, swapped=0)
        right = forward(model, shown, two_way(T)).argmax(-1) == ids
        at_masks, at_others = right[targets != IGNORED], right[targets == IGNORED]
        rows.append((name, at_masks.float().mean(), at_others.float().mean()))
    table("targets show [MASK], another token, the token | right at [MASK] | right at the others", *rows)
    assert rows[0][1] > 0.85 and rows[1][1] > 0.85
    assert rows[0][2] < 0.6 and rows[1][2] > 0.8
    shown, targets = hide_as_bert(torch.randint(V, (1000, 200)), V)
    is_target = targets != IGNORED
    kept = (is_target & (shown == targets)).float().mean()  # a random token may be the right one, too
    shares = is_target.float().mean(), (shown == V).float().mean(), kept
    for share, wanted in zip(shares, (0.15, 0.8 * 0.15, (0.1 + 0.1 / V) * 0.15)):
        assert abs(share - wanted) < 0.003


def test_a_classification_head_works_only_where_it_can_see_the_text():
    """Why has BERT a [CLS] token, and what takes its place in a decoder?

    [CLS] is a token of no meaning of its own, at the beginning. In a two-way model it can gather the whole
    text, and does so because a loss stands above it. Under a causal mask the first position sees only
    itself: there the last token is the one that has seen everything, and the head belongs on it.

    Often told: [CLS] is a good vector of the sentence by construction. Without training for that, it is worse
    than averaged GloVe vectors (Reimers and Gurevych).
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True` becomes `is_causal=False`
    Source: Devlin et al. (2019), sec. 3; Reimers & Gurevych (2019, arXiv 1908.10084), table 1
    问: BERT 的 [CLS] 有什么作用？用 decoder-only 模型做分类时应该取哪个位置？
    答: [CLS] 在双向模型里能汇聚全文，并且因为有损失加在它上面才学会汇聚；因果掩码下第一个位置只能看到自己，
    分类头应该接在最后一个词元上。
    """
    T, rows = 8, []

    def batch(step, n=32):
        """Does token 1 stand somewhere in the text? The first and the last token are always 0."""
        ids, labels = torch.randint(2, 16, (n, T)), torch.randint(2, (n,))
        place, has_it = torch.randint(1, T - 1, (n,)), labels == 1
        ids[has_it, place[has_it]] = 1
        ids[:, 0] = ids[:, -1] = 0
        return ids, labels

    def trained(mask, position):
        model = Transformer(tiny_config(vocab_size=16, n_layer=1, tie_embeddings=False))
        model.lm_head = nn.Linear(64, 2)  # two classes instead of the vocabulary

        def classify(ids):
            return forward(model, ids, mask)[:, position]

        def loss(ids, labels):
            return F.cross_entropy(classify(ids), labels)

        train(model, batch, 60, 1e-2, loss)
        return classify

    for name, mask, position in (("two-way", two_way(T), 0), ("causal", None, 0), ("causal", None, -1)):
        ids, labels = batch(0, n=1000)
        right = trained(mask, position)(ids).argmax(-1) == labels
        rows.append((name, "first" if position == 0 else "last", right.float().mean()))
    table("mask | token under the head | right after 60 steps", *rows)
    assert rows[0][2] > 0.95 and rows[2][2] > 0.95
    assert abs(rows[1][2] - 0.5) < 0.07


def test_a_mixture_of_experts_computes_few_of_many():
    """What is a mixture of experts?

    Instead of one MLP there are E of them, and a router that takes the best k for each token and mixes them
    with weights that sum to 1. Parameters grow with E, FLOPs with k. If all experts are equal, it is the
    plain MLP.

    Often told: each input takes some of the weights. The choice is made for each token, in each layer. And
    all experts must be in memory, whichever are used.
    Compare: model.py MLP: one for all tokens
    Source: Shazeer et al. (2017, arXiv 1701.06538), sec. 2; Jiang et al. (2024, arXiv 2401.04088), sec. 2.1
    问: 什么是混合专家模型（MoE）？
    答: 用 E 个前馈网络代替一个，由路由器为每个词元选出最好的 k 个并加权求和；参数量随 E 增长，
    计算量只随 k 增长，但所有专家都要放进显存。
    """
    E, k, config, x = 8, 2, tiny_config(n_embd=32, n_hidden=96), torch.randn(100, 32)
    experts, router = nn.ModuleList(MLP(config) for _ in range(E)), nn.Linear(32, E, bias=False)

    def flops(function, *args):
        with FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    def n_params(module):
        return sum(p.numel() for p in module.parameters())

    rows = [
        ("one MLP", n_params(experts[0]), flops(experts[0], x), 1),
        ("8 experts, the best 2", n_params(experts), flops(mixture, x, router, experts, k), k),
        ("the router in it", n_params(router), flops(router, x), 1),
    ]
    table("layer | parameters | FLOPs for 100 tokens | calls for a token", *rows)
    _, _, chosen = mixture(x, router, experts, k)
    print("    tokens of 100 that chose each expert:", *chosen.flatten().bincount(minlength=E).tolist())
    assert rows[1][1] == E * rows[0][1]
    assert rows[1][2] == k * rows[0][2] + rows[2][2]
    for expert in experts:
        expert.load_state_dict(experts[0].state_dict())
    assert largest(mixture(x, router, experts, k)[0] - experts[0](x)) < 1e-5


def test_a_router_without_a_balancing_loss_collapses_to_few_experts():
    """Why does a mixture of experts need a balancing loss?

    An expert that is chosen more often learns faster, and is then chosen even more: in the end few experts
    do all the work. Added to the loss, E * sum(f_i * P_i) works against that; f_i is the share of the tokens
    that expert i gets, P_i its mean probability. It is 1 if both are even, and E if one expert gets
    everything with certainty. Only P_i passes a gradient on, since f_i is counted.

    Compare: model.py MLP: has no router, so that nothing can collapse
    Source: Fedus et al. (2021, arXiv 2101.03961), sec. 2.2; Shazeer et al. (2017, arXiv 1701.06538), sec. 4
    问: MoE 为什么需要负载均衡损失？
    答: 被选得多的专家学得快，于是更容易被选中，最后路由坍缩到少数专家；E·Σfᵢ·Pᵢ 在完全均匀时为 1，
    在全部给一个专家时为 E，梯度只经过平均概率 Pᵢ。
    """
    E, C = 4, 16
    config = tiny_config(n_embd=C, n_hidden=16)
    # four kinds of tokens, each with a linear task of its own; their common mean makes a fresh router uneven
    kinds, tasks = 1 + 0.3 * torch.randn(E, C), torch.randn(E, C, C) / C**0.5

    def batch(step, n=128):
        kind = torch.randint(E, (n,))
        x = kinds[kind] + 0.3 * torch.randn(n, C)
        return x, torch.einsum("nij,nj->ni", tasks[kind], x)

    def trained(weight):
        torch.manual_seed(0)
        experts, router = nn.ModuleList(MLP(config) for _ in range(E)), nn.Linear(C, E, bias=False)

        def loss(x, wanted):
            y, p, chosen = mixture(x, router, experts, k=1)
            return (y - wanted).pow(2).mean() + weight * balancing_loss(p, chosen)

        train(nn.ModuleList((experts, router)), batch, 200, 1e-2, loss)
        _, p, chosen = mixture(batch(0, n=2000)[0], router, experts, k=1)
        return share_of_each(chosen, E), balancing_loss(p, chosen)

    rows = [(weight, *trained(weight)) for weight in (0, 0.2)]
    table("weight of the balancing loss | share of each expert | E * sum(f_i * P_i)", *rows)
    assert rows[0][1].max() > 0.7 and rows[0][1].min() < 0.02
    assert rows[1][1].max() < 0.45 and rows[1][1].min() > 0.1
    assert rows[0][2] > 2 > 1.4 > rows[1][2]
    to_one, p = torch.zeros(8, 1, dtype=torch.long), torch.full((8, E), 1 / E, requires_grad=True)
    assert balancing_loss(F.one_hot(to_one[:, 0], E).float(), to_one) == E
    assert balancing_loss(p, torch.arange(8)[:, None] % E) == 1
    balancing_loss(p, to_one).backward()
    assert (p.grad[:, 0] > 0).all() and (p.grad[:, 1:] == 0).all()  # it lowers P_i where f_i is large


def test_a_smooth_skill_can_look_sudden_under_exact_match():
    """Where do emergent abilities come from?

    Some come from the measure. If each of n tokens is right with probability p, independently, all n are
    right with p^n: that stays near 0 while p climbs, and then shoots up. Here a model learns a text by
    heart. More and more characters are right from the first steps on; whole answers of 20 are still missing
    when most characters are right, and then come quickly. That does not prove that there are no real jumps.

    Often told: abilities appear suddenly once a model is large enough. Many of the published curves are
    smooth under a measure that gives part of the credit.
    Code: finetune.py is_right
    Break: finetune.py is_right: `text.strip() == example.answer.strip()` becomes `text.strip()[:1] ==
    example.answer.strip()[:1]`
    Source: Schaeffer et al. (2023, arXiv 2304.15004), sec. 2; Wei et al. (2022, arXiv 2206.07682)
    问: 大模型的“涌现能力”从何而来？
    答: 一种解释是度量造成的：单个词元的正确率 p 平滑上升时，n 个词元全对的概率约为 pⁿ，
    会长期接近 0 然后突然升高；这说明部分涌现来自精确匹配这类指标，但不能证明真正的突变不存在。
    """
    T, n, rows = 32, 20, []
    ids = to_ids(SPEECH[:240])
    model = Transformer(tiny_config(vocab_size=len(CHARACTERS), n_layer=1))
    texts, examples = [], []
    for text in ids.unfold(0, T + 1, 3):  # the last 20 characters are the answer
        answer = to_text(text[-n:])
        if answer == answer.strip():  # spaces at the ends do not count in exact_match
            texts.append(text)
            examples.append(Example([[{"role": "assistant", "content": answer}]], "speech"))
    texts = torch.stack(texts)

    def measure(step):
        # if each character is the likeliest one after the right ones, greedy decoding writes all of them
        with torch.no_grad():
            written = model(texts[:, :-1]).argmax(-1)[:, -n:]
        per_token = (written == texts[:, -n:]).float().mean().item()
        exact = exact_match(examples, [to_text(answer) for answer in written])["speech"]
        rows.append((step, per_token, exact, per_token**n))

    def batch(step):
        if step % 5 == 0:
            measure(step)
        blocks = torch.stack([ids[start : start + T + 1] for start in torch.randint(len(ids) - T, (16,))])
        return blocks[:, :-1], blocks[:, 1:]

    train(model, batch, 90, 1e-2)
    measure(90)
    table("step | share of right characters, p | of right answers of 20 | p^20", *rows[::2])
    steps, per_token, exact, power = (torch.tensor(column) for column in zip(*rows))
    curves = {"characters": (steps, per_token), "answers of 20 characters": (steps, exact)}
    lines("One training, two measures", "step", "share that is right", curves)
    most = (per_token > 0.5) & (per_token < 0.7)
    assert most.any() and exact[per_token < 0.7].max() < 0.1 and exact[-1] > 0.75
    assert per_token.diff().max() < 0.4 and exact.diff().argmax() > per_token.diff().argmax()
    assert largest(exact - power) < 0.3


# name: (its model_type in transformers, its heads where the defaults there are not its own, its tokenizer)
PUBLISHED = {
    "GPT-2 small": ("gpt2", {}, "byte-level BPE"),
    "OPT 125M": ("opt", {}, "byte-level BPE"),
    "BLOOM 176B": ("bloom", {"num_attention_heads": 112}, "byte-level BPE"),
    "Falcon 7B": ("falcon", {}, "byte-level BPE"),
    "BERT base": ("bert", {}, "WordPiece"),
    "T5 small, encoder": ("t5", {}, "unigram"),
    "Gemma 2 2B": ("gemma2", {}, "BPE, byte fallback"),
    "Llama 2 7B": ("llama", {}, "BPE, byte fallback"),
    "Mistral 7B": ("mistral", {}, "BPE, byte fallback"),
    "Phi-3 mini": ("phi3", {}, "BPE, byte fallback"),
    "Llama 3 8B": ("llama", {"num_key_value_heads": 8}, "byte-level BPE"),
    "Qwen2 7B": ("qwen2", {"num_attention_heads": 28, "num_key_value_heads": 4}, "byte-level BPE"),
    "Qwen3 8B": ("qwen3", {"num_key_value_heads": 8}, "byte-level BPE"),
}
# part of a module's name or class -> what it is
POSITIONS = {"rotary": "RoPE", "relative_attention_bias": "relative bias", "wpe": "learned"}
POSITIONS |= {"position_embeddings": "learned", "embed_positions": "learned"}
ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU"}
GATED = {"SiLU": "SwiGLU", "GELU": "GEGLU"}


def first_found(kinds, texts):
    """The kind whose key is a part of one of the texts, or None."""
    for part, kind in kinds.items():
        if any(part in text for text in texts):
            return kind
    return None


def call_order(model, ids):
    """The smallest modules of the first block, without dropouts, as a forward pass calls them."""
    called, hooks = [], []

    def note(module, args, output):
        called.append(module)

    for name, module in model.named_modules():
        if ".0." in name and not list(module.children()) and not isinstance(module, nn.Dropout):
            hooks.append(module.register_forward_hook(note))
    model(ids)
    for hook in hooks:
        hook.remove()
    return called


def describe(config):
    """Norm, positions, activation, heads and mask of a model of transformers, read off its modules."""
    model = AutoModel.from_config(config).eval()
    if config.is_encoder_decoder:
        model = model.get_encoder()
    ids = torch.ones(1, 4, dtype=torch.long)

    called = call_order(model, ids)
    is_norm = ["Norm" in type(module).__name__ for module in called]
    y = called[is_norm.index(True)](1 + torch.randn(5, config.hidden_size))
    norm = "LayerNorm" if y.mean(-1).abs().max() < 1e-4 else "RMSNorm"  # RMSNorm leaves the mean
    places_of_norm = {(True, False): "before", (False, True): "after", (True, True): "before, after"}
    norm += f" {places_of_norm[is_norm[0], is_norm[-1]]}"

    names = [name for name, _ in model.named_modules()]
    positions = "ALiBi" if hasattr(model, "build_alibi_tensor") else first_found(POSITIONS, names)
    classes = [type(module).__name__.lower() for module in model.modules()]
    activation = first_found(ACTIVATIONS, classes)
    if any("gate" in name for name in names):
        activation = GATED[activation]

    H = config.num_attention_heads
    K = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", H)
    first_moves = moved_by(lambda ids: model(ids)[0], ids, 3)[0] > 1e-6
    return norm, positions, activation, f"{H}, {K}", "two-way" if first_moves else "causal"


@torch.no_grad()
def test_many_published_models_share_rmsnorm_and_rope_and_swiglu():
    """Which published model uses which norm, positions, activation, attention and tokenizer?

    See the table. Llama, Mistral, Qwen, Phi-3 and this project have RMSNorm before each sublayer, RoPE and
    SwiGLU. In this table they differ only in heads and tokenizers; outside of it, Qwen2 has biases and Qwen3
    norms on q and k. Gemma 2 has a norm after each sublayer, too. Of these models only BERT and the encoder
    of T5 read both ways.

    Code: model.py Block.forward
    Break: model.py Block.forward: `self.mlp(self.post_attention_layernorm(x))` becomes
    `self.post_attention_layernorm(self.mlp(x))`
    Source: the modeling files of transformers, which the lesson runs; heads: the defaults there, but for
    BLOOM (arXiv 2211.05100), Llama 3 (2407.21783), Qwen2 (2407.10671) and Qwen3 (2505.09388) their reports;
    tokenizers: the reports, and tokenization_t5.py, _llama.py and _gemma.py in transformers
    问: 主流模型分别用什么归一化、位置编码、激活函数、注意力和分词器？
    答: GPT-2、OPT 用前置 LayerNorm、可学习位置和 GELU/ReLU，BERT 用后置 LayerNorm，BLOOM 用
    ALiBi；Llama、Mistral、Qwen、Phi-3 都是前置 RMSNorm + RoPE + SwiGLU，在本表中只有头数和分词器不同（表
    外：Qwen2 的 q、k、v 有偏置，Qwen3 对 q、k 做归一化）。
    """
    rows, tokenizers = {}, {}
    for name, (kind, heads, tokenizer) in PUBLISHED.items():
        H = AutoConfig.for_model(kind, **heads).num_attention_heads
        rows[name], tokenizers[name] = describe(config_of(kind, **heads, hidden_size=4 * H)), tokenizer
    model, ids = drawn_model(), torch.randint(64, (1, 9))
    config = AutoConfig.for_model(**config_to_json(model.config, torch.float32))
    peer = AutoModel.from_config(config).eval()
    peer.load_state_dict(model.model.state_dict())
    assert largest(peer(ids)[0] - model.hidden(ids)) < 1e-4  # this project is what its config says
    rows["this project"], tokenizers["this project"] = describe(config), "byte-level BPE"
    heads = "model | norm | positions | activation | heads of q, of k and v | mask | tokenizer"
    table(heads, *((name, *row, tokenizers[name]) for name, row in rows.items()))

    alike = [name for name, row in rows.items() if row[:3] == ("RMSNorm before", "RoPE", "SwiGLU")]
    llamas = ["Llama 2 7B", "Mistral 7B", "Phi-3 mini", "Llama 3 8B", "Qwen2 7B", "Qwen3 8B"]
    assert alike == [*llamas, "this project"]
    assert [name for name, row in rows.items() if row[4] == "two-way"] == ["BERT base", "T5 small, encoder"]
    assert rows["GPT-2 small"][:3] == ("LayerNorm before", "learned", "GELU")
    assert rows["OPT 125M"][:3] == ("LayerNorm before", "learned", "ReLU")
    assert rows["BLOOM 176B"][:3] == ("LayerNorm before", "ALiBi", "GELU")
    assert rows["Falcon 7B"][:4] == ("LayerNorm before", "RoPE", "GELU", "71, 1")
    assert rows["BERT base"][:3] == ("LayerNorm after", "learned", "GELU")
    assert rows["T5 small, encoder"][:3] == ("RMSNorm before", "relative bias", "ReLU")
    assert rows["Gemma 2 2B"][:3] == ("RMSNorm before, after", "RoPE", "GEGLU")


def test_two_layouts_of_rope_differ_by_an_order_of_rows():
    """How are checkpoints with the other layout of RoPE converted?

    Meta's Llama rotates the pairs (0, 1), (2, 3) and so on; Hugging Face's, as here, (i, i + D/2). Within
    each head, the rows of q_proj and k_proj are put in another order: first the even ones, then the odd ones.
    Nothing else changes. If that is forgotten, the model runs, but writes nonsense.

    Code: model.py apply_rope
    Break: model.py apply_rope: `x1, x2 = x.chunk(2, dim=-1)` becomes `x1, x2 = x[..., ::2], x[..., 1::2]`
    Source: `permute` in transformers' convert_llama_weights_to_hf.py; Su et al. (2021), sec. 3.2.2
    问: Meta 原版与 Hugging Face 版 Llama 的 RoPE 布局不同，权重如何转换？
    答: 前者旋转相邻的 (0, 1)、(2, 3)……，后者旋转 (i, i + D/2)；
    只需在每个头内把 q_proj、k_proj 的行重排为先偶数行、后奇数行，否则模型能运行但输出是乱的。
    """
    T, C, attention = 10, 64, drawn_model().model.layers[0].self_attn
    D, x = attention.head_dim, torch.randn(T, C)
    cos, sin = rope(torch.arange(T), tiny_config(), x.dtype)

    def rotate_neighbours(x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    def reorder(w):
        return w.view(-1, D // 2, 2, C).transpose(1, 2).reshape(w.shape)

    q = attention.q_proj(x).view(T, -1, D).transpose(0, 1)  # (H, T, D)
    k = attention.k_proj(x).view(T, -1, D).transpose(0, 1).repeat_interleave(2, dim=0)
    scores = rotate_neighbours(q) @ rotate_neighbours(k).mT / D**0.5
    wanted = scores.masked_fill(~causal(T), -torch.inf).softmax(-1)  # as Meta's code has it
    as_they_are = weights_of(attention, x)
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight[:] = reorder(linear.weight)
    reordered = weights_of(attention, x)
    rows = [
        ("first even, then odd", largest(reordered - wanted)),
        ("as they are", largest(as_they_are - wanted)),
    ]
    table("rows of Meta's q_proj and k_proj | largest error of the attention weights", *rows)
    assert rows[0][1] < 1e-4 < 0.1 < rows[1][1]


def cut_at_once(w):
    """Rows of a fused matrix (128, ...): all of q (4 heads of 16), all of k (2 heads), all of v."""
    return w.split((64, 32, 32))


def cut_by_group(w):
    """Rows of a fused matrix (128, ...): for each of 2 groups two heads of q, then one of k, one of v."""
    groups = w.unflatten(0, (2, 64)).split((32, 16, 16), dim=1)
    return [part.flatten(0, 1) for part in groups]


@torch.no_grad()
def test_fused_matrices_must_be_cut_in_their_own_order_of_rows():
    """How is a checkpoint with a fused qkv matrix brought into the layout of Llama?

    By cutting its rows: one product with stacked rows is what separate products give. But the order differs.
    Phi-3 has all of q, then all of k, then all of v, and gate above up in the MLP. Falcon 40B goes group by
    group, [q q .. k v | q q .. k v]. Every wrong cut has the right shape, so compare scores with the
    original.

    Code: model.py MLP.forward
    Break: model.py MLP.forward: `F.silu(self.gate_proj(x)) * self.up_proj(x)` becomes `self.gate_proj(x) *
    F.silu(self.up_proj(x))`
    Source: modeling_phi3.py and modeling_falcon.py (FalconAttention._split_heads) in transformers
    问: 融合的 qkv 权重如何拆成 Llama 格式？
    答: 按行切开即可，但行的顺序因模型而异：Phi-3 依次是全部 q、全部 k、全部 v，Falcon 40B 按组交错存放；
    切错了形状也对，所以必须和原模型比对 logits。
    """
    shape = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
    phi = AutoModelForCausalLM.from_config(config_of("phi3", **shape)).eval()
    draw_weights(phi)
    ids = torch.randint(1, 64, (1, 9))

    def error(cut, halves=("gate_proj", "up_proj")):
        weights = phi.state_dict()
        layer = "model.layers.0."
        fused = weights.pop(f"{layer}self_attn.qkv_proj.weight")
        for name, part in zip(("q_proj", "k_proj", "v_proj"), cut(fused)):
            weights[f"{layer}self_attn.{name}.weight"] = part
        fused = weights.pop(f"{layer}mlp.gate_up_proj.weight")
        for name, part in zip(halves, fused.chunk(2)):
            weights[f"{layer}mlp.{name}.weight"] = part
        model = Transformer(tiny_config(n_layer=1, tie_embeddings=False))
        model.load_state_dict(weights)
        return largest(model(ids) - phi(ids).logits)

    rows = [
        ("q | k | v, gate | up", error(cut_at_once)),
        ("q q k v | q q k v, gate | up", error(cut_by_group)),
        ("q | k | v, up | gate", error(cut_at_once, ("up_proj", "gate_proj"))),
    ]
    table("rows of Phi-3 taken as | error of the logits", *rows)
    assert rows[0][1] < 1e-4 < 0.05 < min(rows[1][1], rows[2][1])
    shape = dict(hidden_size=64, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True)
    attention = AutoModel.from_config(config_of("falcon", **shape)).h[0].self_attention
    fused = attention.query_key_value(torch.randn(1, 5, 64))  # (1, 5, 128)
    theirs = attention._split_heads(fused)[0].flatten(-2)[0].T  # q, as Falcon cuts it
    assert torch.equal(theirs, cut_by_group(fused[0].T)[0])


def test_a_normalised_head_is_stored_normalised():
    """How is Baichuan 2's NormHead brought into the layout of Llama?

    Baichuan 2 divides each row of its head by its length whenever it uses the head, so that only directions
    count. After training the rows no longer change: store them normalised, and a plain head gives the same
    scores.

    Often told: Baichuan 2 normalises the hidden state before the head. That is another model.
    Code: model.py Transformer.head
    Break: model.py Transformer.head: `self.lm_head(x) if` becomes `self.lm_head(F.normalize(x, dim=-1)) if`
    Source: Baichuan 2's report (2023, arXiv 2309.10305), sec. 2, NormHead
    问: Baichuan 2 的 NormHead 如何转换成 Llama 格式？
    答: NormHead 归一化的是输出矩阵的每一行而不是隐藏状态；训练后这些行不再变化，
    把归一化之后的矩阵存进 lm_head，就能用普通的头得到同样的 logits。
    """
    model, ids = drawn_model(tie_embeddings=False), torch.randint(64, (1, 9))
    x, head = model.hidden(ids), torch.randn(64, 64)
    wanted = x @ (head / head.norm(dim=1, keepdim=True)).T  # what Baichuan 2 computes
    rows = []
    for name, stored in (("normalised", F.normalize(head)), ("as they are", head)):
        model.lm_head.weight.data = stored
        rows.append((name, largest(model(ids) - wanted)))
    rows.append(("as they are, and x normalised", largest(model.head(F.normalize(x, dim=-1)) - wanted)))
    table("rows of the head stored | error of the logits", *rows)
    assert rows[0][1] < 1e-4 < 0.1 < min(rows[1][1], rows[2][1])


@torch.no_grad()
def test_qwen2_has_biases_that_no_field_of_its_config_names():
    """Why is it not enough to read the sizes in config.json?

    Part of the arithmetic stands in the name of the architecture alone. Qwen2 is Llama with biases on q, k
    and v, and its config.json has no field that says so: only model_type does. A loader that takes it for a
    Llama and skips the weights that it does not know runs, with wrong scores.

    Code: model.py config_from_json
    Break: model.py config_from_json: `qkv_bias=kind == "qwen2"` becomes `qkv_bias=False`
    Source: modeling_qwen2.py (Qwen2Attention) and configuration_qwen2.py in transformers
    问: 为什么只看 config.json 里的尺寸还不够？
    答: 有些计算只由架构名决定，例如 Qwen2 的 q、k、v 带偏置，但 config.json 里没有任何字段说明；
    当成 Llama 并忽略多余权重来加载，能运行但 logits 是错的。
    """
    shape = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
    config = config_of("qwen2", **shape)
    qwen = AutoModelForCausalLM.from_config(config).eval()
    draw_weights(qwen)
    ids, settings = torch.randint(1, 64, (1, 9)), config.to_dict()
    rows = []
    for kind in ("qwen2", "llama"):
        model = Transformer(config_from_json(settings | {"model_type": kind}))
        unknown = model.load_state_dict(qwen.state_dict(), strict=False).unexpected_keys
        rows.append((kind, len(unknown), largest(model(ids) - qwen(ids).logits)))
    table("opened as | weights left over | error of the logits", *rows)
    assert not [name for name in settings if "bias" in name]
    assert rows[0][1] == 0 and rows[0][2] < 1e-4
    assert rows[1][1] == 3 and rows[1][2] > 0.05
