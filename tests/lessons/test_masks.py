"""Masks: which token sees which, and where padding goes."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from model import Attention, KVCache, Transformer
from sample import one_token, prefill

from .book import (
    causal,
    drawn_model,
    forward,
    largest,
    moved_by,
    places,
    squares,
    table,
    tiny_config,
    train,
    weights_of,
)


def of_documents(lengths):
    """The causal mask for documents of these lengths in one row: a token sees its own document only."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (T,)
    return causal(len(document)) & (document[:, None] == document)


def test_no_score_depends_on_a_later_token():
    """What is the causal mask for?

    Position t may use the tokens 0 to t only, since the token after it is what it has to predict. To test any
    model for it: change a token, and look at the scores before it.

    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True` becomes `is_causal=False`
    Source: Vaswani et al. (2017), sec. 3.2.3
    问: 因果掩码有什么作用？
    答: 它保证位置 t 只能看到第 0 到 t 个词元，看不到要预测的下一个词元；检验方法是改动一个词元，它之前各位置
    的 logits 都不应变化。
    """
    moved = places(moved_by(drawn_model(), torch.randint(64, (1, 12)), 8) > 0)
    table("changed token | positions whose scores move", (8, moved))
    assert moved == [8, 9, 10, 11]


def test_one_pass_over_a_text_predicts_the_same_as_a_pass_for_each_of_its_beginnings():
    """Is a decoder parallel?

    In training yes: the true text is the input (teacher forcing), and no position sees what comes after it.
    So the T predictions of one pass equal those of T passes, each over a longer beginning of the text. In
    generation no: a token must have been drawn before it can be read. A cache saves work, but not the wait.

    Often told: a decoder works token by token, like an RNN. It does only when it generates.
    Code: model.py Transformer.forward
    Break: model.py Attention.forward: `is_causal=True` becomes `is_causal=False`
    Source: Vaswani et al. (2017), sec. 3.2.3
    问: Transformer 的解码器能并行计算吗？
    答: 训练时能：输入是真实文本（teacher forcing），又有因果掩码，一次前向就得到全部 T 个位置的预测，
    与逐个前缀计算的结果相同；生成时不能，必须先得到第 t 个词元才能算下一个，KV 缓存只省计算，不改变串行。
    """
    T, model = 10, drawn_model()
    ids = torch.randint(64, (1, T))
    at_once = model(ids)[0]  # (T, V)
    beginnings = [ids[:, : t + 1] for t in range(T)]
    one_by_one = torch.stack([model(beginning)[0, -1] for beginning in beginnings])
    n_positions = sum(beginning.size(1) for beginning in beginnings)
    cache = KVCache(model.config, batch_size=1, max_len=T)
    cached = torch.cat([one_token(model, cache, ids[:, t]) for t in range(T)])
    rows = [
        ("the text", 1, T, 0),
        ("each beginning", T, n_positions, largest(one_by_one - at_once)),
        ("each token, with a cache", T, T, largest(cached - at_once)),
    ]
    table("what is read | passes, one after the other | positions computed | difference", *rows)
    assert rows[1][2] == T * (T + 1) // 2
    assert rows[1][3] < 1e-5 and rows[2][3] < 1e-5


def test_masking_is_minus_infinity_before_the_softmax():
    """Why minus infinity, and not zero?

    Because exp(0) = 1: a score of zero has weight, exp(-inf) = 0 has none. Zeroing weights after the softmax
    is no better: the rest no longer sums to one, and hidden keys keep their part in the denominator.

    Often told: set what is hidden to 0. A mask of True and False says it well, but the same mask as numbers
    is added to the scores.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `attn_mask=mask` becomes `attn_mask=mask.float()`
    Source: Vaswani et al. (2017), sec. 3.2.3; the documentation of scaled_dot_product_attention
    问: 注意力掩码为什么用负无穷而不是 0？
    答: 因为 exp(0) = 1，置 0 的分数仍有权重，而 exp(-∞) = 0；在 softmax 之后再置 0 也不对，剩余权重之和不再
    为 1，被遮住的键仍留在分母里。
    """
    T, D = 4, 16
    attention, x = Attention(tiny_config(n_embd=D, n_head=1, n_kv_head=1)), 2 * torch.randn(T, D)
    seen = torch.tensor([True, True, True, False])
    scores = (attention.q_proj(x) @ attention.k_proj(x).T / math.sqrt(D))[0]  # of the first token
    at_zero = torch.zeros(T)
    ways = {
        "model.py": weights_of(attention, x, at_zero, seen.expand(T, T))[0, 0],
        "-inf before the softmax": scores.masked_fill(~seen, -math.inf).softmax(0),
        "0 before": (scores * seen).softmax(0),
        "0 after": scores.softmax(0) * seen,
    }
    table("the last key is hidden by | weights | sum", *((way, p, p.sum()) for way, p in ways.items()))
    of_model, right, before, after = ways.values()
    assert right[3] == 0 and abs(right.sum() - 1) < 1e-6
    assert largest(of_model - right) < 1e-6
    assert before[3] > 1e-3 and after.sum() < 0.99


def test_a_row_that_sees_nothing_is_nan_with_infinity_and_uniform_with_a_huge_number():
    """Why do many programs add a huge negative number instead of minus infinity?

    Because a query that sees no key gives 0/0 with -inf, and equal weights with a finite number beside which
    the scores vanish: harmless, if nobody reads that row. It must fit the dtype: -1e9 is -inf in float16,
    whose largest number is 65504. PyTorch's attention, which is called here, gives zeros for such a row of a
    boolean mask.

    Often told: -1000 is enough. In a row without any key it is added to all scores, and changes nothing.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `attn_mask=mask` becomes `attn_mask=torch.where(mask, 0.0, -1e9)`
    Source: torch.finfo; the documentation of scaled_dot_product_attention
    问: 为什么很多代码用一个很大的负数而不是 -inf 做掩码？
    答: 若某个 query 一个键都看不到，全为 -inf 时 softmax 得 0/0 即 NaN，大到淹没所有分数的有限数则得到均匀权
    重；该数须在数据类型范围内，float16 中 -1e9 就是 -inf。
    """
    T = 3
    scores, rows = torch.tensor([0.3, -0.2, 1.0]), []
    hiding = {"-inf": -math.inf, "finfo.min": torch.finfo(torch.float32).min, "-1000": -1000.0}
    for name, value in hiding.items():
        rows.append((f"{name} added to all scores", (scores + value).softmax(0)))
    nothing = torch.zeros(T, T).bool()
    of_model = weights_of(Attention(tiny_config()), torch.randn(T, 64), mask=nothing)[0, 0]
    rows.append(("model.py, nothing seen", of_model))
    table("all keys are hidden by | weights", *rows)
    print(f"    -1e9 in float16 is {torch.tensor(-1e9).half().item()}")
    assert rows[0][1].isnan().all()
    assert torch.allclose(rows[1][1], torch.full((T,), 1 / T))
    assert torch.allclose(rows[2][1], scores.softmax(0), atol=1e-4)
    assert (of_model == 0).all()
    assert torch.tensor(-1e9).half() == -math.inf and torch.finfo(torch.float16).max == 65504


def test_with_the_diagonal_masked_the_first_token_sees_nothing():
    """Does the causal mask hide the diagonal, too?

    No. Position t may see its own token, for its target is token t + 1. With the diagonal hidden the first
    token would have no key at all, which is 0/0 (PyTorch's attention makes it 0). The others would not go
    blind to themselves: the stream carries each token past attention. But no head could weigh a token against
    those before it.

    Often told: the upper triangle is hidden, with or without the diagonal, as you like.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True, enable_gqa=True` becomes `enable_gqa=True,
    attn_mask=torch.ones(T, T).tril(-1).bool()`
    Source: Vaswani et al. (2017), sec. 3.2.3; the documentation of torch.tril
    问: 因果掩码要不要把对角线也遮住？
    答: 不要：位置 t 的预测目标是第 t+1 个词元，看到自己并不泄露答案；若遮住对角线，第一个词元就没有任何可看的
    键，softmax 变成 0/0（PyTorch 的注意力此时返回 0）。
    """
    T, model = 4, drawn_model()
    attention, x = model.model.layers[0].self_attn, torch.randn(T, 64)
    hidden = causal(T) & ~torch.eye(T).bool()
    open_weights = weights_of(attention, x)[0]
    hidden_weights = weights_of(attention, x, mask=hidden)[0]
    rows = [("seen", *open_weights[[0, -1]]), ("hidden", *hidden_weights[[0, -1]])]
    table("diagonal | weights of the first token | of the last", *rows)
    assert torch.allclose(open_weights[0], torch.eye(T)[0]) and (open_weights.diagonal() > 0).all()
    assert (hidden_weights[0] == 0).all()  # PyTorch's answer to 0/0 in a row of a boolean mask
    assert torch.zeros(T).masked_fill(~hidden[0], -math.inf).softmax(0).isnan().all()
    ids = torch.randint(64, (1, T))
    assert places(moved_by(model, ids, 2) > 0) == [2, 3]  # nothing leaks to the position that predicts it
    assert places(moved_by(partial(forward, model, mask=hidden), ids, 2) > 0) == [2, 3]


def test_a_triangle_aligned_at_the_top_left_hides_most_of_a_cache():
    """Which mask does a step of generation with a cache need?

    One new token is the newest and sees all S keys: none is needed, unless rows have different lengths, as
    here. T new tokens need a triangle aligned at the bottom right, torch.ones(T, S).tril(S - T). PyTorch's
    is_causal=True is aligned at the top left: its first query sees the first key only, so with one new token
    attention returns v[0].

    Often told: in a decoder, always pass is_causal=True.
    Code: model.py KVCache.begin
    Break: model.py Attention.forward: `attn_mask=mask` becomes `is_causal=True`
    Source: the documentation of scaled_dot_product_attention
    问: 带 KV 缓存解码时该用什么掩码？
    答: 每步只有一个新词元、且各行长度相同时不需要掩码，它能看到全部 S 个键；一次读入 T 个新词元时要用右下对齐
    的 tril(S−T)，而 PyTorch 的 is_causal=True 是左上对齐，会让新词元只看到最前面的键。
    """
    model, S = drawn_model(), 8
    ids = torch.randint(64, (1, S))
    whole, rows = model(ids), []
    for T in (3, 1):
        cache = KVCache(model.config, batch_size=1, max_len=S)
        model(ids[:, :-T], cache)
        rows.append((T, largest(model(ids[:, -T:], cache) - whole[:, -T:])))
        empty = KVCache(model.config, batch_size=1, max_len=S)
        empty.begin(S - T)
        positions, mask = empty.begin(T)
        assert torch.equal(mask[0, 0], torch.ones(T, S).tril(S - T).bool())
    table("new tokens after a cache | difference from a pass over the whole text", *rows)
    q, k, v = torch.randn(1, 1, 1, 16), torch.randn(1, 1, S, 16), torch.randn(1, 1, S, 16)
    top_left = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    right = F.scaled_dot_product_attention(q, k, v)
    print(f"    is_causal=True with one query: {largest(top_left - v[:, :, :1]):.0e} from v[0],", end=" ")
    print(f"{largest(top_left - right):.2f} from the right answer")
    assert all(difference < 1e-5 for _, difference in rows)
    assert torch.allclose(top_left, v[:, :, :1]) and largest(top_left - right) > 0.1


def test_masked_padding_on_the_left_or_right_is_the_same_to_rope():
    """Right padding for training, left padding for generation: does it matter?

    Not with a mask: hidden padding adds nothing, and RoPE knows offsets only, so that positions shifted by
    the padding change nothing. Without a mask, padding on the right is harmless to a causal model, on the
    left not. (Added positions, such as GPT-2's, must be counted from the first real token.)

    Often told: models must be trained with the padding on one side.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `apply_rope(q, cos, sin), apply_rope(k, cos, sin)` becomes
    `apply_rope(q, cos, sin), k`
    Source: Su et al. (2021), eq. 16, for the offsets
    问: 训练时右填充、生成时左填充，有影响吗？
    答: 只要有掩码就没有影响：被遮住的填充不起作用，RoPE 只依赖相对位置，整体平移不改变结果（GPT-2 那样的绝对
    位置则须从第一个真实词元数起）；没有掩码时，右填充对因果模型无害，左填充有害。
    """
    T, P = 9, 5
    model, ids = drawn_model(), torch.randint(1, 64, (1, T))
    alone = model(ids)
    place = torch.arange(P + T)
    padded = {
        "left": (F.pad(ids, (P, 0)), place >= P, slice(P, None)),
        "right": (F.pad(ids, (0, P)), place < T, slice(0, T)),
    }
    rows = []
    for side, (row, is_real, real) in padded.items():
        mask = causal(P + T) & is_real  # (P + T, P + T)
        masked, not_masked = forward(model, row, mask)[:, real], model(row)[:, real]
        rows.append((side, largest(masked - alone), largest(not_masked - alone)))
    table("padding | difference from no padding, masked | not masked", *rows)
    left, right = rows
    assert left[1] < 1e-5 and right[1] < 1e-5
    assert left[2] > 1e-2 and right[2] < 1e-5


def test_right_padding_needs_no_mask_in_training_but_targets_that_do_not_count():
    """How do texts of different lengths get into one batch for training?

    With padding on the right no real token sees it, since all of it comes later. It is enough that its
    targets do not count: they are -100, which the loss leaves out of its sum and of the number by which it
    divides. What padding makes of padding does not matter.

    Often told: without a mask for padding, the model learns from it. A causal model padded on the right does
    not; one that looks both ways does.
    Code: model.py Transformer.loss
    Break: model.py Transformer.loss: `(targets != -100).sum().clamp(min=1)` becomes `targets.numel()`
    Source: the documentation of torch.nn.functional.cross_entropy, ignore_index
    问: 训练时长度不同的序列怎样组成一个 batch？
    答: 在右侧填充，并把填充位置的目标设为 -100 使其不计入损失；因果模型中真实词元看不到后面的填充，
    因此不需要额外的填充掩码。
    """
    model, text = drawn_model(), torch.randint(1, 64, (1, 10))
    ids, targets = text[:, :-1], text[:, 1:]

    def loss_and_gradient(ids, targets):
        model.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        return loss.item(), model.model.layers[0].self_attn.q_proj.weight.grad

    alone, gradient = loss_and_gradient(ids, targets)
    rows = [("no padding", alone, 0)]
    for name, value in (("padding, targets -100", -100), ("padding that counts", 0)):
        padded = F.pad(ids, (0, 6)), F.pad(targets, (0, 6), value=value)
        loss, of_padded = loss_and_gradient(*padded)
        rows.append((name, loss, largest(of_padded - gradient)))
    table("batch | loss | difference of the gradient of W_q", *rows)
    assert abs(rows[1][1] - alone) < 1e-5 and rows[1][2] < 1e-5
    assert abs(rows[2][1] - alone) > 1e-2 and rows[2][2] > 1e-3


def test_generation_in_batches_must_read_the_last_real_token():
    """Why do libraries pad on the left to generate?

    Because then logits[:, -1] is what follows the last token of each row. With padding on the right, shorter
    rows end with padding there; logits[i, length_i - 1] is as right as padding on the left. A cache with a
    length for each row, as here, lets the new tokens overwrite the padding.

    Often told: there is no mask when generating, so that the output is undefined.
    Code: sample.py prefill
    Break: sample.py prefill: `[n - 1 for n in lengths]` becomes `[-1 for n in lengths]`
    Source: none; it is measured here
    问: 批量生成时为什么常用左填充？
    答: 左填充使每行的最后一列都是真实词元，直接取 logits[:, -1] 即可；右填充时应取 logits[i, length_i − 1]，
    并让新词元在缓存中覆盖填充，结果同样正确。
    """
    model = drawn_model()
    short, long, new = torch.randint(1, 64, (4,)), torch.randint(1, 64, (7,)), torch.randint(64, (2,))
    alone = model(short[None])[0, -1]
    right = model(torch.stack((F.pad(short, (0, 3)), long)))
    is_real = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]).bool()
    mask = causal(7) & is_real[:, None]  # (2, 7, 7)
    left = forward(model, torch.stack((F.pad(short, (3, 0)), long)), mask[:, None])
    cache = KVCache(model.config, batch_size=2, max_len=8)
    prefilled = prefill(model, cache, [short.tolist(), long.tolist()])
    rows = [
        ("right, the last column", largest(right[0, -1] - alone)),
        ("right, the last token", largest(right[0, 3] - alone)),
        ("left, the last column", largest(left[0, -1] - alone)),
        ("prefill of sample.py", largest(prefilled[0] - alone)),
    ]
    longer = model(torch.cat((short, new[:1]))[None])[0, -1]
    rows.append(("prefill, then a new token", largest(one_token(model, cache, new)[0] - longer)))
    table("padding, and what is read | difference from the prompt alone", *rows)
    assert rows[0][1] > 0.05 and max(row[1] for row in rows[1:]) < 1e-5


def test_a_prefix_model_looks_both_ways_inside_the_prompt():
    """What is a prefix language model?

    One whose P prompt tokens see each other both ways, the rest only themselves and what is before: P(P-1)/2
    more pairs than the T(T+1)/2 of a causal one. Only the mask differs; the layers are the same. A causal
    model is trained on all its tokens, a prefix model on what follows the prefix.

    Code: model.py Attention.forward
    Break: model.py Attention.forward: `mask = mask.repeat(` becomes `mask = mask.tril().repeat(`
    Source: Raffel et al. (2020, arXiv 1910.10683), sec. 3.2; Wang et al. (2022, arXiv 2204.05832)
    问: 什么是 Prefix LM？它和因果语言模型有什么区别？
    答: 前 P 个提示词元之间双向可见，其余词元只看自己和前面，比因果掩码多 P(P−1)/2 对；模型结构不变，只是掩码
    不同，损失只计前缀之后的词元。
    """
    T, P = 8, 3
    prefix = causal(T)
    prefix[:P, :P] = True
    masks = {"causal": causal(T), f"prefix of {P}": prefix, "documents of 3 and 5": of_documents([3, 5])}
    model, ids, rows = drawn_model(), torch.randint(64, (1, T)), []
    for name, mask in masks.items():
        moved = moved_by(partial(forward, model, mask=mask), ids, 1)
        rows.append((name, mask.sum(), places(moved > 0)))
    table("mask | pairs seen | positions whose scores move with token 1", *rows)
    squares("Which keys (columns) a query (row) sees", masks)
    assert rows[0][1] == T * (T + 1) // 2 and rows[0][2] == list(range(1, T))
    assert rows[1][1] - rows[0][1] == P * (P - 1) // 2 and rows[1][2] == list(range(T))
    assert rows[2][2] == [1, 2]


def test_with_a_mask_of_blocks_packed_documents_are_read_as_if_alone():
    """Several short documents in one row: what can go wrong?

    Under a plain causal mask the second document sees the first. With a mask that is also closed between
    documents, a row gives what each of them gives alone; with RoPE the positions need not even start again.
    Llama 3 was trained with such a mask. Many models, GPT-3 and this one among them, do without: a token such
    as <|endoftext|> between the documents tells the model that what follows is about something else.

    Compare: data/loader.py Blocks: cut from one long stream of documents, with a plain causal mask
    Source: Krell et al. (2021, arXiv 2107.02027); Brown et al. (2020, arXiv 2005.14165), app. B; Grattafiori
    et al. (2024, arXiv 2407.21783), sec. 3.2
    问: 把多个短文档拼接（packing）到同一序列会有什么问题？
    答: 只用因果掩码时后面的文档会看到前面的文档；改用按文档分块的因果掩码，结果与单独计算完全一致，且用 RoPE
    时位置不必重新从 0 开始。Llama 3 用了这种掩码，GPT-3 等不少模型则只靠 <|endoftext|> 分隔。
    """
    model = drawn_model()
    first, second = torch.randint(64, (1, 5)), torch.randint(64, (1, 6))
    packed, alone, rows = torch.cat((first, second), dim=1), model(second), []
    for name, mask in (("causal", causal(11)), ("causal, in blocks", of_documents([5, 6]))):
        difference = forward(model, packed, mask)[:, 5:] - alone
        rows.append((name, mask.sum(), largest(difference)))
    table("mask | pairs seen | the second document differs from itself alone by", *rows)
    assert rows[0][1] - rows[1][1] == 5 * 6
    assert rows[0][2] > 1e-2 and rows[1][2] < 1e-5


def test_without_the_mask_predicting_the_next_token_is_cheating():
    """Why does BERT hide tokens in its input, instead of in the attention?

    A model that looks both ways sees the token that it should predict, and copies it: on pure noise its loss
    goes to zero, and it has learned nothing. Hiding the token in the input, as BERT does, leaves both sides
    readable; the causal mask hides it in the attention.

    Code: model.py Attention.forward
    Break: model.py Attention.forward: `is_causal=True` becomes `is_causal=False`
    Source: Devlin et al. (2019), sec. 3.1
    问: BERT 为什么在输入里遮住词元，而不是在注意力里加掩码？
    答: 双向注意力能直接看到要预测的词元，照抄即可，连纯随机序列的损失都会降到接近 0；BERT 在输入中把它换成
    [MASK]，左右两侧仍然可见，而因果掩码则在注意力里遮住它和右侧。
    """
    T = 8

    def noise(step):
        ids = torch.randint(8, (32, T))
        return ids, F.pad(ids[:, 1:], (0, 1), value=-100)  # what follows the last token is in no input

    def last_loss(mask):
        model = Transformer(tiny_config(vocab_size=8, n_layer=1, n_embd=32, n_hidden=64))

        def loss(ids, targets):
            return F.cross_entropy(forward(model, ids, mask).flatten(0, 1), targets.flatten())

        return train(model, noise, 60, 2e-2, loss)

    rows = [("both ways", last_loss(torch.ones(T, T).bool())), ("causal, as in model.py", last_loss(None))]
    table("mask | loss on random tokens", *rows)
    print(f"    the best that is possible: ln 8 = {math.log(8):.3f}")
    assert rows[0][1] < 0.2 and rows[1][1] > 2
