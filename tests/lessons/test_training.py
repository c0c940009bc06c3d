"""Training: loss and other measures, optimizers, schedule, batch, precision, scaling."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from data.loader import IGNORED, Blocks, validation_batches
from finetune import exact_match
from model import Block, LossInPieces, Transformer, rope
from sample import generate
from train import (
    ADAMW_SHARE,
    CONSTANT_SHARE,
    WARMUP,
    Muon,
    NextTokenLoss,
    Settings,
    autocast,
    bits_per_byte,
    learning_rate,
    make_optimizers,
    training_step,
)

from .book import CHARACTERS, SPEECH, drawn_model, largest, lines, table, tiny_config, to_ids, train


def settings(steps=100, lr=0.02, micro_batch=1000, dtype="float32"):
    """The Settings of a run of train.py on one CPU."""
    return Settings(
        seed=0,
        block_size=32,
        batch_size=micro_batch,
        micro_batch=micro_batch,
        lr=lr,
        dtype=dtype,
        device="cpu",
        processes=1,
        deterministic=False,
        minutes=None,
        steps=steps,
        fall=CONSTANT_SHARE * steps,
        n_evals=1,
        save_every=None,
    )


def take_step(model, optimizers, ids, targets, lr_scale=1.0, run=None):
    """One training_step of train.py -> the mean loss before it, and the gradient's norm before clipping."""
    objective, batch = NextTokenLoss(model), (ids.contiguous(), targets.contiguous())
    n_targets = int((targets != IGNORED).sum())
    losses, norm = training_step(objective, optimizers, batch, n_targets, lr_scale, run or settings())
    return losses.sum().item() / n_targets, norm.item()


def pretrain(model, batch, run, schedule=learning_rate, optimizers=None):
    """The loop of train.py without clock and log -> the losses of all steps. batch(step) -> ids, targets."""
    optimizers = optimizers or make_optimizers(model, run.lr, run.weight_decay, torch.float32)
    losses = []
    for step in range(run.steps):
        loss, _ = take_step(model, optimizers, *batch(step), schedule(step, step / run.steps, run), run)
        losses.append(loss)
    return losses


def no_warmup(step, done, run):
    """learning_rate without its first part."""
    return min(1, (run.steps - step) / (run.steps - run.fall))


def no_fall(step, done, run):
    """learning_rate without its last part."""
    return min(1, (step + 1) / min(WARMUP, run.fall / 2))


def sgd(model, lr):
    """Plain SGD, as training_step takes it."""
    return torch.optim.SGD([{"params": model.parameters(), "initial_lr": lr}], lr=lr)


def move_by_step(model, ids, targets, micro_batch=1000):
    """A step of train.py with SGD at a rate of 1 -> by what it lowered the weights, and the norm it saw."""
    before = parameters_to_vector(model.parameters()).detach()
    _, norm = take_step(model, [sgd(model, lr=1.0)], ids, targets, run=settings(micro_batch=micro_batch))
    return before - parameters_to_vector(model.parameters()).detach(), norm


def gradient_of(model, ids, targets):
    """The gradient of model.loss, all of it in one vector."""
    model.zero_grad()
    model.loss(ids, targets).backward()
    gradient = parameters_to_vector([p.grad for p in model.parameters()])
    model.zero_grad()
    return gradient


def markov_text(V, rows, T):
    """A text whose next token depends on the last one alone -> ids (rows, T), and log p of all but the first.

    Low ids are frequent, high ones rare, as words are. No model can predict it better than these log p.
    """
    log_p = (1.5 * torch.randn(V, V) - torch.arange(1, V + 1).log()).log_softmax(-1)
    columns = [torch.randint(V, (rows,))]
    for _ in range(T - 1):
        columns.append(torch.multinomial(log_p[columns[-1]].exp(), 1).squeeze(1))
    ids = torch.stack(columns, dim=1)
    return ids, log_p[ids[:, :-1], ids[:, 1:]]


# --- the loss, and what else is measured ---


def test_cross_entropy_is_minus_log_probability_and_starts_at_ln_v():
    """What is the loss, and what should its first value be?

    For one token it is -ln softmax(z)_y = logsumexp(z) - z_y, of which training takes the mean; its gradient
    in the scores z is softmax(z) - onehot(y). Fresh weights should guess evenly, which gives ln V whatever
    the targets are: a first loss of ln V does not show that they are right. A higher one comes from scores
    that are uneven before anything was learned. A lower one means that the model knows its targets: here
    they were not shifted, and with a tied head each token votes for itself.

    Code: model.py Transformer.loss
    Break: model.py Transformer.init_weights: `nn.init.normal_(p, std=1 / C)` becomes `nn.init.normal_(p)`
    Source: Goodfellow et al. (2016), "Deep Learning", sec. 6.2.2; Karpathy (2019), "A Recipe for Training
    Neural Networks"
    问: 语言模型的损失函数是什么？训练开始时损失应该是多少？
    答: 损失是正确词元的负对数概率（交叉熵），对所有词元取平均，对分数的梯度是 softmax(z) − onehot(y)。刚初始
    化的模型应接近均匀猜测，初始损失约为 ln V：偏高说明初始化有问题，偏低说明目标泄漏（例如忘了错位）；目标若
    是错的，在这一步还看不出来。
    """
    scores, y = torch.randn(5, 10, requires_grad=True), torch.randint(10, (5,))
    total, losses = LossInPieces.apply(scores, torch.eye(10), y, True)
    total.backward()
    assert torch.allclose(losses, scores.logsumexp(-1) - scores[range(5), y], atol=1e-5)
    assert torch.allclose(scores.grad, scores.softmax(-1) - F.one_hot(y, 10), atol=1e-5)

    V = 512
    text = torch.randint(V, (8, 65))
    ids, next_ids, shuffled = text[:, :-1], text[:, 1:], torch.randint(V, (8, 64))
    fresh, random = Transformer(tiny_config(vocab_size=V)), drawn_model(vocab_size=V)
    right = fresh.loss(ids, next_ids).item()
    wrong = fresh.loss(ids, shuffled).item()
    unshifted = fresh.loss(ids, ids).item()
    uneven = random.loss(ids, next_ids).item()
    table(
        "weights | targets | first loss | ln 512",
        ("as training begins", "the next tokens", right, math.log(V)),
        ("as training begins", "others, at random", wrong, math.log(V)),
        ("as training begins", "not shifted", unshifted, math.log(V)),
        ("every matrix random", "the next tokens", uneven, math.log(V)),
    )
    assert abs(right - math.log(V)) < 0.05
    assert abs(wrong - math.log(V)) < 0.05
    assert unshifted < math.log(V) - 0.5
    assert uneven > math.log(V) + 0.2


def test_a_model_that_ignores_its_context_stops_at_the_entropy_of_single_tokens(reader_of_the_speech):
    """Is my loss of 2.1 good?

    Three landmarks are computed in a second: ln V, the loss of knowing nothing; the entropy of single tokens
    (unigram), that of knowing how frequent each one is; the entropy of a token given the one before (bigram).
    In this text, 2.1 is what a table of pairs reaches. A model whose inputs are all made the same stops at
    the second landmark: a loss that stays there uses nothing of its input. A loss below the third uses more
    than one token. All of these hold for the text that was read; on a new one, what was counted in a short
    text predicts less well.

    Code: model.py Transformer.hidden
    Break: model.py Transformer.hidden: `self.model.embed_tokens(ids)` becomes `self.model.embed_tokens(0 *
    ids)`
    Source: Shannon (1951), "Prediction and Entropy of Printed English"
    问: 训练损失 2.1 算好吗？有什么参照？
    答: 用三个很快就能算出的值作参照：ln V（什么都不知道）、一元熵（只知道词频）、二元条件熵（只用到前一个词
    元）。若损失停在一元熵附近，说明模型没有用上上下文，应先检查输入；低于二元条件熵，才说明用到了更长的上下
    文。
    """
    ids = to_ids(SPEECH)
    N = len(ids)
    counts = Counter(ids.tolist())
    pairs = Counter(zip(ids[:-1].tolist(), ids[1:].tolist()))
    firsts = Counter(ids[:-1].tolist())
    unigram = -sum(n / N * math.log(n / N) for n in counts.values())
    bigram = -sum(n / (N - 1) * math.log(n / firsts[a]) for (a, b), n in pairs.items())

    def blind_batch(step):
        starts = torch.randint(N - 32, (8,))
        targets = torch.stack([ids[start + 1 : start + 33] for start in starts])
        return torch.zeros_like(targets), targets

    blind = Transformer(tiny_config(vocab_size=len(CHARACTERS), n_layer=1, n_embd=16))
    train(blind, blind_batch, 80, 2e-2)
    rows = ids[: N // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss_of_blind = blind.loss(torch.zeros_like(rows[:, 1:]), rows[:, 1:]).item()
        loss_of_reader = reader_of_the_speech.loss(rows[:, :-1], rows[:, 1:]).item()
    table(
        "what is known | nats per token",
        ("nothing: ln V", math.log(len(CHARACTERS))),
        ("frequencies: unigram entropy", unigram),
        ("a model that sees the same input everywhere", loss_of_blind),
        ("the token before: bigram entropy", bigram),
        ("a model after 120 steps", loss_of_reader),
    )
    assert math.log(len(CHARACTERS)) > unigram + 0.5 > bigram + 1
    assert abs(loss_of_blind - unigram) < 0.1
    assert loss_of_reader < bigram - 0.1


def test_exact_match_is_near_zero_while_the_loss_already_falls():
    """How is a language model evaluated?

    Mostly by its loss on text that was held out, the mean of -ln p(next token), or by exp(loss), the
    perplexity. Both count per token, so they compare models with the same tokenizer only; bits per byte
    divide the same sum by the bytes of the text and compare any two. None of them says whether an answer is
    right: here three of eight tokens are random questions, and a model that answers them all still has a
    perplexity well above 1. Exact match counts right answers, for any system. But it counts only those that
    are right in all k tokens, about p^k of them if each token is right with probability p, independently; so
    a steady improvement looks like a jump.

    Code: train.py bits_per_byte
    Break: train.py bits_per_byte: `(sizes[targets.clamp(min=0)] * (targets != IGNORED)).sum()` becomes
    `(targets != IGNORED).sum()`
    Source: Gao et al. (2020, arXiv 2101.00027) for bits per byte; Schaeffer et al. (2023, arXiv 2304.15004)
    for exact match
    问: 语言模型怎么评测？困惑度、bits per byte 和精确匹配有什么区别？
    答: 困惑度就是 exp(每个词元的损失)，只能比较分词器相同的模型；bits per byte 按文本字节数归一化，不同分词器
    之间也能比较；精确匹配直接看答案对不对，但 k 个词元全对才得分（若各词元独立，约为 p 的 k 次方），前期几乎
    为 0，后期看起来像突然“涌现”。
    """
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", ":", "."]
    sizes = np.array([len(word) + 1 for word in words])  # in bytes, with a space
    questions = torch.cartesian_prod(*[torch.arange(8)] * 3)[torch.randperm(512)]
    colon, stop = torch.full((512, 1), 8), torch.full((512, 1), 9)
    rows = torch.cat([questions, colon, questions, stop], dim=1)  # the answer repeats the question
    learned, held_out = rows[:400], rows[400:]
    text = held_out.flatten().numpy()
    n_bytes = len("".join(words[i] + " " for i in text[1:]))

    def batch(step):
        pairs = learned[torch.randint(400, (32, 2))].flatten(1)  # (32, 16), two questions in a row
        return pairs[:, :8], pairs[:, 1:9]

    def measure(model):
        ids, targets = next(validation_batches(text, 8, batch_size=112))
        with torch.no_grad():
            loss = model.loss(ids, targets).item()
        written = list(zip(*generate(model, held_out[:, :4].tolist(), 3, temperature=0)))
        answers = [" ".join(words[i] for i in row) for row in written]
        right = [" ".join(words[i] for i in row) for row in held_out[:, 4:7]]
        examples = [SimpleNamespace(channel="copy", answer=answer) for answer in right]
        tokens_right = (torch.tensor(written) == held_out[:, 4:7]).float().mean().item()
        exact = exact_match(examples, answers)["copy"]
        return loss, math.exp(loss), bits_per_byte(model, text, sizes), tokens_right, exact

    found = []
    for steps in (1, 20, 80):
        model = Transformer(tiny_config(vocab_size=10, block_size=8, n_embd=32, n_hidden=64))
        pretrain(model, batch, settings(steps))
        found.append((steps, *measure(model)))
    table("steps | loss per token | perplexity | bits per byte | tokens right | exact match", *found)
    for _, loss, _, bpb, _, _ in found:
        assert abs(bpb - loss * (len(text) - 1) / n_bytes / math.log(2)) < 1e-4
    first, middle, last = found
    assert first[1] - middle[1] > 0.15 and middle[4] > 0.2
    assert middle[5] < min(0.15, 0.5 * middle[4])
    assert last[5] > 0.8 and last[2] > 1.5


def test_a_model_must_be_able_to_memorise_one_batch():
    """What is the first check of a new training loop?

    Train on a single batch, always the same: the loss must come close to 0. If it does not, something is
    wrong on the way from the loss to the weights, or the targets do not belong to the inputs. The reverse
    does not hold. Targets that were not shifted are memorised even faster (a first loss below ln V tells
    them), and a model that sees the future passes, too.

    Code: train.py training_step
    Break: model.py LossInPieces.forward: `target[:, None].clamp(min=0), -counted` becomes `target[:,
    None].clamp(min=0), -0.5 * counted`
    Source: Karpathy (2019), "A Recipe for Training Neural Networks"
    问: 写好训练代码后，第一步怎么检查它是否正确？
    答: 反复训练同一个批次，损失应降到接近 0；降不下去，说明梯度、优化器或目标的对应关系有错。但反过来不成立：
    目标没有错位或因果掩码泄漏时，损失同样会降到 0。
    """
    text = torch.randint(32, (4, 17))
    ids, next_ids = text[:, :-1], text[:, 1:]

    def right(step):
        return ids, next_ids

    def not_shifted(step):
        return ids, ids

    def in_another_order_each_time(step):
        return ids, next_ids[:, torch.randperm(16)]

    found = []
    for batch in (right, not_shifted, in_another_order_each_time):
        model = Transformer(tiny_config(vocab_size=32, n_layer=1, n_embd=32, n_hidden=96))
        losses = pretrain(model, batch, settings(60, lr=0.05))
        found.append((batch.__name__.replace("_", " "), losses[0], losses[15], losses[-1]))
    table("targets | loss at first | after 15 steps | after 60", *found)
    first, second, third = found
    assert first[3] < 0.2
    assert second[3] < 0.2 and second[2] < first[2] and second[1] < math.log(32) - 0.4
    assert third[3] > 2


# --- the learning rate ---


def test_the_first_steps_of_adam_ignore_the_size_of_the_gradient():
    """Why a warm-up?

    Adam's first update is lr times the sign of the gradient, be it 1e-6 or 1000: its second moment, the
    running mean of the squared gradient, rests on one sample. So every weight moves by a full step in a
    direction that one batch chose. At a rate of 0.2, a tiny model ends worse if it starts like that. At 0.01,
    near the rate of train.py, warm-up makes hardly any difference: it is the higher rates that need it.

    Often told: it avoids over-fitting to the first batches, or lets the model see each sample a few times.
    It shortens steps whose length says nothing about the gradient.
    Code: train.py learning_rate
    Break: train.py learning_rate: `min(1, warm, ` becomes `min(1, `
    Source: Kingma & Ba (2015, arXiv 1412.6980), algorithm 1; Liu et al. (2020, arXiv 1908.03265)
    问: 训练 Transformer 为什么需要学习率预热 (warm-up)？
    答: Adam 的二阶矩在开头只有一个样本，第一步的大小总是约等于学习率，与梯度大小无关，方向却只由一个批次决
    定。学习率较高时，没有预热的训练最终损失更高；学习率本来就低时，有没有预热差别不大。
    """
    model, lr = Transformer(tiny_config()), 0.01
    _, adamw = make_optimizers(model, lr / ADAMW_SHARE, 0.0, torch.float32)
    weight, gradients = model.model.embed_tokens.weight, torch.tensor([1e-6, -1e-2, 1.0, 1e3])
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, :4] = gradients
    adamw.step()
    updates = (weight - before)[0, :4].detach()
    table("gradient | first update at a rate of 0.01", *zip(gradients, updates))
    assert torch.allclose(updates, -lr * gradients.sign(), rtol=0.02)

    ids = to_ids(SPEECH)

    def batch(step):
        starts = torch.randint(len(ids) - 32, (8,))
        blocks = torch.stack([ids[start : start + 33] for start in starts])
        return blocks[:, :-1], blocks[:, 1:]

    def end_of_run(rate, schedule):
        torch.manual_seed(0)
        model = drawn_model(vocab_size=len(CHARACTERS), n_layer=1, n_embd=32, n_hidden=96)
        groups = [{"params": list(model.parameters()), "initial_lr": rate}]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)
        losses = pretrain(model, batch, settings(60), schedule, [adamw])
        return sum(losses[-10:]) / 10

    found = [(rate, end_of_run(rate, no_warmup), end_of_run(rate, learning_rate)) for rate in (0.01, 0.2)]
    table("rate of Adam | loss at the end without warm-up | with that of train.py", *found)
    low, high = found
    assert abs(low[1] - low[2]) < 0.15
    assert high[2] < high[1] - 0.1


def test_a_cosine_must_know_the_last_step_from_the_first():
    """What does a learning-rate schedule look like?

    All of them first rise linearly. Then a cosine falls at once, as floor + (1 - floor) (1 + cos (pi t / N))
    / 2 at step t of N after the warm-up, so N must be known beforehand. train.py keeps its rate constant and
    lets it fall to zero, linearly, in the last 60 % (warm-up, stable, decay). Nothing depends on N until the
    fall begins; so under --minutes the number of steps is set only when 40 % of the time has passed. The
    Transformer of 2017 fell with one over the square root of the step, which needs no end and never reaches
    zero.

    Code: train.py learning_rate
    Break: train.py learning_rate: `(settings.steps - step) / (settings.steps - settings.fall)` becomes
    `(settings.steps - step) / settings.steps`
    Source: Loshchilov & Hutter (2017, arXiv 1608.03983), eq. 5; Vaswani et al. (2017), eq. 3; Hu et al.
    (2024, arXiv 2404.06395) for warm-up, stable, decay
    问: 常见的学习率调度有哪些？余弦退火和 WSD（预热、恒定、衰减）有什么区别？
    答: 都先线性预热。余弦随即开始下降，必须事先知道总步数；WSD 先保持恒定、最后才下降，在开始衰减之前都不必确
    定总步数；2017 年原版按步数的平方根反比下降，既不需要终点，也不会降到 0。
    """

    def cosine(step, N, floor=0.1):
        if step < WARMUP:
            return (step + 1) / WARMUP
        progress = (step - WARMUP) / (N - WARMUP)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    def of_2017(step):
        return min((step + 1) / WARMUP, math.sqrt(WARMUP / (step + 1)))

    def ours(step, N):
        return learning_rate(step, step / N, settings(N))

    rows = []
    for step in (0, 49, 200, 399, 700, 999):
        rows.append(
            (step, ours(step, 1000), ours(step, 2000), cosine(step, 1000), cosine(step, 2000), of_2017(step))
        )
    table("step | train.py, N = 1,000 | N = 2,000 | cosine, N = 1,000 | N = 2,000 | 2017", *rows)
    steps = [*range(0, 60, 10), *range(60, 1001, 20)]
    curves = {
        "train.py": (steps, [ours(step, 1000) for step in steps]),
        "cosine": (steps, [cosine(step, 1000) for step in steps]),
        "Transformer of 2017": (steps, [of_2017(step) for step in steps]),
    }
    lines("Three schedules of 1,000 steps", "step", "share of the largest rate", curves)

    assert all(ours(step, 1000) == ours(step, 2000) for step in range(400))
    assert all(ours(step, 1000) == 1 for step in range(WARMUP, 400))
    assert abs(cosine(200, 1000) - cosine(200, 2000)) > 0.02
    assert ours(0, 1000) == cosine(0, 1000) == of_2017(0) == 1 / WARMUP
    assert abs(ours(700, 1000) - 0.5) < 1e-6 and ours(1000, 1000) == 0
    assert abs(cosine(1000, 1000) - 0.1) < 1e-6
    assert abs(of_2017(4 * WARMUP - 1) - 0.5) < 1e-6


def test_a_falling_rate_lowers_the_noise_floor():
    """Why does the learning rate fall in the end?

    At a constant rate, noisy gradients keep the weights at a distance from the minimum: for the loss w^2 / 2
    and noise of variance s^2, SGD hovers at lr s^2 / (2 (2 - lr)), about in proportion to the rate. A low
    rate from the beginning has a lower floor but takes too long to get there. So a run goes fast first and
    lowers the floor afterwards. The tiny model here learns a text of known entropy; what counts is how far it
    stays above that.

    Often told: late in training the model has little left to learn. What is left lies below the noise.
    Code: train.py learning_rate
    Break: train.py learning_rate: `min(1, warm, (settings.steps - step) / (settings.steps - settings.fall))`
    becomes `min(1, warm)`
    Source: Bottou, Curtis & Nocedal (2018, arXiv 1606.04838), theorem 4.6
    问: 训练后期为什么要降低学习率？
    答: 梯度带噪声，学习率恒定时权重只能在最小值附近抖动，稳态损失大致与学习率成正比；从头就用小学习率又走得太
    慢。所以先用大学习率快速接近，再降低学习率压低噪声下限。
    """

    def hovers_at(rate):
        w = torch.zeros(10_000)
        for _ in range(60):
            w = w - rate * (w + torch.randn(10_000))
        return w.pow(2).mean().item() / 2

    for rate in (0.4, 0.2, 0.1):
        assert abs(hovers_at(rate) / (rate / (2 * (2 - rate))) - 1) < 0.1

    text, log_p = markov_text(16, rows=1600, T=33)
    learned, held_out, entropy = text[:1280], text[1280:], -log_p[1280:].mean().item()

    def batch(step):
        rows = learned[16 * step : 16 * step + 16]
        return rows[:, :-1], rows[:, 1:]

    found = []
    for name, rate, schedule in (
        ("0.002, constant", 0.002, no_fall),
        ("0.06, constant", 0.06, no_fall),
        ("0.06, falling to 0 as in train.py", 0.06, learning_rate),
    ):
        torch.manual_seed(0)  # all runs start alike
        model = Transformer(tiny_config(vocab_size=16, n_layer=1, n_embd=32, n_hidden=96))
        pretrain(model, batch, settings(80, rate), schedule)
        with torch.no_grad():
            loss = model.loss(held_out[:, :-1], held_out[:, 1:]).item()
        found.append((name, loss, loss - entropy))
    table("rate | loss after 80 steps | above the entropy", *found)
    low, constant, falling = (above for _, _, above in found)
    assert 0 < falling < 0.9 * constant
    assert falling < 0.5 * low


# --- the optimizers ---


def test_adamw_decays_all_weights_alike_and_l2_does_not():
    """Is AdamW's weight decay the same as L2 regularisation?

    For plain SGD the two are the same, for Adam they are not. AdamW multiplies every weight by 1 - lr *
    decay in each step. L2 adds decay * w to the gradient, which Adam then divides by the root of the
    gradient's own mean square: a weight with large gradients is hardly decayed, one with small gradients
    far too much. Muon's weights are decayed as AdamW's are, and those of the norms not at all.

    Code: train.py make_optimizers
    Break: train.py make_optimizers: `torch.optim.AdamW(others` becomes `torch.optim.Adam(others`
    Source: Loshchilov & Hutter (2019, arXiv 1711.05101), sec. 2 and algorithm 2
    问: AdamW 的权重衰减和 L2 正则有什么区别？
    答: 对 SGD 两者等价，对 Adam 不等价：AdamW 每步把所有权重乘以 1 − lr·λ；L2 把 λw 加进梯度，再被 Adam 除以
    梯度的均方根，于是梯度大的权重几乎不衰减，梯度小的衰减过度。
    """
    lr, decay, n = 1e-3, 0.1, 1000
    signs = torch.randn(n, 2, 64).sign()
    gradients = signs * torch.tensor([[10.0], [0.01]])  # of the two rows of an embedding

    def ours(model, decay):
        return make_optimizers(model, lr / ADAMW_SHARE, decay, torch.float32)[1]

    def adam_with_l2(model, decay):
        return torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=decay)

    def sgd_with_l2(model, decay):
        return torch.optim.SGD(model.parameters(), lr, weight_decay=decay)

    def after_training(make, decay):
        model = Transformer(tiny_config(vocab_size=2, n_layer=1))
        weight = model.model.embed_tokens.weight
        nn.init.ones_(weight)
        optimizer = make(model, decay)
        for gradient in gradients:
            weight.grad = gradient
            optimizer.step()
        return weight.detach().mean(1)

    found, expected = [], 1 - (1 - lr * decay) ** n
    makers = {"AdamW of train.py": ours, "Adam with L2": adam_with_l2, "SGD with L2": sgd_with_l2}
    for name, make in makers.items():
        lost = after_training(make, 0.0) - after_training(make, decay)
        found.append((name, lost[0].item(), lost[1].item(), expected))
    table("lost to decay | gradient of 10 | gradient of 0.01 | 1 - (1 - lr decay)^1000", *found)
    for _, large, small, _ in (found[0], found[2]):
        assert abs(large - expected) < 0.02 and abs(small - expected) < 0.02
    assert found[1][1] < expected / 3 and found[1][2] > 3 * expected
    model = Transformer(tiny_config())
    muon, adamw = make_optimizers(model, lr, decay, torch.float32)
    assert [group["weight_decay"] for group in muon.param_groups] == [decay, decay]
    assert [group["weight_decay"] for group in adamw.param_groups] == [decay, 0]


def test_clipping_shortens_the_whole_gradient_and_keeps_its_direction():
    """What does gradient clipping do, and does this project clip?

    If the norm of the gradient over all parameters together is above a limit c, every gradient is multiplied
    by c / norm: the direction stays, the length is c at most. train.py clips at 1 and logs the norm from
    before. Clipping each value instead changes the direction. Adam and Muon ignore a constant factor of all
    gradients, but they average over steps: clipping keeps one odd batch from dominating these averages.

    Often told: clipping cures vanishing gradients, too. It never makes one longer.
    Code: train.py training_step
    Break: train.py training_step: `clip_grad_norm_(objective.parameters(), 1.0)` becomes
    `clip_grad_norm_(objective.parameters(), 1e9)`
    Source: Pascanu et al. (2013, arXiv 1211.5063), algorithm 1
    问: 梯度裁剪怎么做？按范数裁剪和按值裁剪有什么区别？
    答: 把所有参数的梯度看成一个向量，若范数超过阈值 c，就整体乘以 c/范数：方向不变，长度不超过 c；按值裁剪会
    改变方向。本项目按范数裁剪，阈值为 1。
    """
    text = torch.randint(64, (4, 17))
    ids, targets = text[:, :-1], text[:, 1:]
    model = drawn_model()
    gradient = gradient_of(model, ids, targets)
    step, norm = move_by_step(model, ids, targets)
    vectors = {
        "the gradient": gradient,
        "clipped by train.py": step,
        "each value clipped at 0.01": gradient.clamp(-0.01, 0.01),
    }
    found = []
    for name, vector in vectors.items():
        found.append((name, vector.norm().item(), F.cosine_similarity(vector, gradient, dim=0).item()))
    table("what | length | cosine with the gradient", *found)
    assert found[0][1] > 2 and abs(norm - found[0][1]) < 1e-3
    assert abs(found[1][1] - 1) < 1e-3 and found[1][2] > 0.999
    assert found[2][2] < 0.9

    large_batch = torch.randint(64, (64, 65))
    step, norm = move_by_step(Transformer(tiny_config()), large_batch[:, :-1], large_batch[:, 1:])
    assert norm < 1 and abs(step.norm().item() - norm) < 1e-3  # a short one is left alone


def test_muon_gives_every_direction_of_a_gradient_nearly_the_same_size():
    """What does Muon do that Adam does not?

    It takes the gradient of a matrix as a whole (its running mean), written U S V^T, and updates by about U
    V^T: all directions get nearly the same size, also those a hundred times smaller. Its authors suspect that
    this helps to learn rare directions. Adam looks at each weight by itself: its first update has the same
    size in every weight, and very different ones along different directions.

    Code: train.py Muon.step
    Break: train.py Muon.step: `orthogonalize(directions, self.dtype)` becomes `directions.sign()`
    Source: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks"
    问: Muon 优化器和 Adam 有什么不同？
    答: Muon 把整个矩阵的动量 USVᵀ 近似正交化为 UVᵀ，使所有奇异方向的更新幅度几乎相同，梯度微弱的方向也不例
    外；Adam 则逐个权重地缩放，不考虑矩阵结构。
    """
    left, right = torch.linalg.qr(torch.randn(2, 64, 64)).Q
    gradient = left * torch.logspace(0, -2, 64) @ right  # singular values from 1 down to 0.01

    def first_update(make, **options):
        weight = nn.Parameter(torch.zeros(64, 64))
        weight.grad = gradient.clone()
        make([weight], lr=1.0, weight_decay=0.0, **options).step()
        return -weight.detach()

    updates = {
        "the gradient": gradient,
        "Adam's first update": first_update(torch.optim.AdamW),
        "Muon's": first_update(Muon, dtype=torch.float32),
    }
    rows = []
    for name, update in updates.items():
        values = torch.linalg.svdvals(update)
        rows.append((name, values[0] / values.median(), values.median() / values[-1]))
    table("update | largest singular value / median | median / smallest", *rows)
    sizes = updates["Adam's first update"].abs()
    assert (sizes - 1).abs().mean() < 0.01
    assert min(rows[0][1:]) > 8
    assert max(rows[1][1:]) > 3
    assert max(rows[2][1:]) < 2


# --- the batch ---


def test_gradient_noise_falls_with_one_over_the_batch():
    """What does a larger batch buy?

    The gradient of a batch is the true one, that of the whole text, plus noise, whose variance falls as 1/B.
    The critical batch is the variance for B = 1 divided by the squared length of the true gradient: there,
    noise and gradient are equally large. The cosine between the two gradients is about 1 / sqrt(1 + critical
    / B). So a batch far below the critical one may double and save half of the steps; far above, more
    samples save none. It depends on the task and grows as the loss falls: large language models take
    millions of tokens a step, train.py, on a CPU, 2,048.

    Often told: 16 to 128 samples, since larger batches converge badly. There is no such number for all tasks.
    Code: model.py Transformer.loss
    Break: model.py Transformer.loss: `return total / (targets != -100).sum().clamp(min=1)` becomes `return
    total`
    Source: McCandlish et al. (2018, arXiv 1812.06162), sec. 2.2
    问: 批大小怎么选？增大批大小有什么好处，到什么程度就没用了？
    答: 批次梯度的噪声方差按 1/B 下降。临界批大小等于单样本梯度方差除以真实梯度的平方范数：远小于它时批大小翻
    倍相当于少走一半步数，远大于它时再加样本几乎没有收益；它因任务而异，并随损失下降而增大。
    """
    text = torch.randint(32, (256, 17))
    ids, targets = text[:, :-1], text[:, 1:]
    model = drawn_model(vocab_size=32, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_hidden=32)
    true = gradient_of(model, ids, targets)
    found = []
    for B in (1, 4, 16, 64):
        chosen = [torch.randint(256, (B,)) for _ in range(80)]
        batches = torch.stack([gradient_of(model, ids[rows], targets[rows]) for rows in chosen])
        variance = (batches - true).pow(2).sum(1).mean().item()
        cosine = F.cosine_similarity(batches, true[None], dim=1).mean().item()
        if B == 1:
            critical = variance / true.pow(2).sum().item()
        found.append((B, variance, variance * B, cosine, 1 / math.sqrt(1 + critical / B)))
    heads = "batch | variance | times B | cosine with the true gradient | 1 / sqrt(1 + critical / B)"
    table(heads, *found)
    print(f"    critical batch: {critical:.1f}")
    for _, _, scaled, cosine, expected in found:
        assert abs(scaled / found[0][2] - 1) < 0.2
        assert abs(cosine - expected) < 0.05
    assert 4 < critical < 64


def test_n_small_steps_of_sgd_are_nearly_one_step_of_n_times_the_rate():
    """How do batch size and learning rate go together?

    For SGD, n steps of rate lr on batches of B are to first order one step of rate n lr on a batch of n B:
    linear scaling. The difference falls in proportion to the rate. Adam normalises the gradient, and the
    usual rule for it is the square root. Both fail above the critical batch. train.py does not scale its
    rate with the batch.

    Code: train.py training_step
    Break: train.py training_step: `group["lr"] = lr_scale * group["initial_lr"]` becomes `group["lr"] =
    group["initial_lr"]`
    Source: Goyal et al. (2017, arXiv 1706.02677), sec. 2.1; Malladi et al. (2022, arXiv 2205.10287) for Adam
    问: 批大小变大时，学习率应该怎么调整？
    答: 对 SGD 用线性缩放：n 个小步在一阶近似下等于在 n 倍的批次上走一步 n 倍学习率，学习率越小越准；对 Adam
    常用平方根缩放。超过临界批大小后，两条规则都不再成立。
    """
    n, B = 4, 64
    text = torch.randint(16, (n * B, 33))
    ids, targets = text[:, :-1], text[:, 1:]
    start = Transformer(tiny_config(vocab_size=16, n_layer=1, n_embd=16, n_hidden=32))

    def weights_after(lr, lr_scale, parts):
        model = copy.deepcopy(start)
        for part, part_targets in zip(ids.chunk(parts), targets.chunk(parts)):
            _, norm = take_step(model, [sgd(model, lr)], part, part_targets, lr_scale)
            assert norm < 1  # so that nothing was clipped
        return parameters_to_vector(model.parameters()).detach()

    weights = parameters_to_vector(start.parameters()).detach()
    found = []
    for lr in (0.2, 0.02, 0.002):
        small_steps = weights_after(lr, 1, parts=n) - weights
        large_step = weights_after(lr, n, parts=1) - weights
        found.append((lr, ((small_steps - large_step).norm() / large_step.norm()).item()))
    table("rate | 4 steps differ from one large step by", *found)
    assert found[2][1] < 0.01
    assert 6 < found[1][1] / found[2][1] < 14


def test_micro_batches_must_be_weighted_by_their_tokens():
    """Is accumulating gradients the same as a large batch?

    Yes, if losses are summed over targets and divided by the number of targets in the whole batch. The mean
    of the micro-batches' means gives too much weight to those with few targets: long prompts, padding.

    Often told: loss / accumulation_steps. Large libraries had it wrong until 2024.
    Code: train.py training_step
    Break: train.py training_step: `(loss * (world / n_targets)).backward()` becomes `(loss / (piece[1] !=
    IGNORED).sum() / len(pieces)).backward()`
    Source: Hugging Face (2024), "Fixing Gradient Accumulation"
    问: 梯度累积和直接用大批次等价吗？
    答: 只有把各微批次的损失按词元求和、再除以整个批次的有效词元总数时才等价；若先在每个微批次内求平均再取平
    均，有效词元少的微批次（长提示、填充多）权重就偏大。
    """
    text = torch.randint(64, (4, 13))
    ids, targets = text[:, :-1], text[:, 1:].clone()
    targets[0, :11], targets[1, :6] = IGNORED, IGNORED  # two of the rows have long prompts
    start = drawn_model()
    whole = gradient_of(start, ids, targets)

    def gradient_of_step(micro_batch):
        step, norm = move_by_step(copy.deepcopy(start), ids, targets, micro_batch)
        return step * max(1, norm)  # the gradient was clipped at 1

    means = [gradient_of(start, ids[i : i + 1], targets[i : i + 1]) for i in range(4)]
    ways = {
        "the mean of the means": torch.stack(means).mean(0),
        "train.py, one row at a time": gradient_of_step(1),
        "train.py, two rows at a time": gradient_of_step(2),
    }
    found = [(way, ((g - whole).norm() / whole.norm()).item()) for way, g in ways.items()]
    table("4 rows of 1, 6, 12 and 12 targets | error of the gradient", *found)
    assert found[0][1] > 0.1
    assert found[1][1] < 1e-3 and found[2][1] < 1e-3


# --- regularisation, sharing, repetition ---


def test_dropout_scales_in_training_and_does_nothing_afterwards():
    """What becomes of dropout when a model is used?

    model.eval() switches it off, and that is all. In training, what is kept is divided by 1 - p, so that the
    mean stays; the paper instead multiplied by 1 - p when testing. Here it acts on what a block adds to the
    stream, and is 0 by default: a large text is read once or a few times, and there is little to over-fit.

    Often told: when testing, multiply by the dropout rate.
    Code: model.py Block.forward
    Break: model.py Block.forward: `self.dropout(self.mlp(self.post_attention_layernorm(x)))` becomes
    `self.mlp(self.post_attention_layernorm(x))`
    Source: Srivastava et al. (2014); the documentation of torch.nn.Dropout
    问: dropout 在训练和推理时有什么不同？
    答: 训练时以概率 p 置零，并把保留的值除以 1 − p，使期望不变，推理时 (model.eval()) 什么也不做；原论文则是
    训练时不缩放、测试时乘以保留率 1 − p。
    """
    config = tiny_config(dropout=0.25)
    block, x = Block(config), torch.zeros(64, 16, 64)

    def give_ones(module, args, output):
        return torch.ones_like(output)

    block.mlp.register_forward_hook(give_ones)  # for a stream of zeros, the attention adds zeros
    cos, sin = rope(torch.arange(16), config, x.dtype)
    trained, used = block.train()(x, cos, sin), block.eval()(x, cos, sin)
    rows = [("training", trained.mean(), trained.unique()), ("use", used.mean(), used.unique())]
    table("mode | mean of what a block adds, if it is all ones | values", *rows)
    assert abs(trained.mean() - 1) < 0.02
    assert torch.allclose(trained.unique(), torch.tensor([0, 1 / 0.75]))
    assert torch.equal(used, torch.ones_like(x))
    assert tiny_config().dropout == 0


def test_the_embedding_may_share_its_matrix_with_the_head_and_layers_share_nothing():
    """Where does a Transformer share weights?

    The embedding and the head may be one matrix, whose gradient is the sum of both uses. Layers share nothing
    (ALBERT's do, and the Universal Transformer's); within a layer all positions have the same weights.

    Often told: all layers of the encoder share their weights. Each has its own.
    Code: model.py Transformer.head
    Break: model.py Transformer: `nn.ModuleList(Block(config) for _ in range(config.n_layer))` becomes
    `nn.ModuleList([Block(config)] * config.n_layer)`
    Source: Press & Wolf (2017, arXiv 1608.05859); Lan et al. (2020, arXiv 1909.11942) for ALBERT; Dehghani et
    al. (2019, arXiv 1807.03819) for the Universal Transformer
    问: Transformer 里哪些权重是共享的？
    答: 词嵌入矩阵和输出层可以共用一个矩阵，其梯度是两处用途的梯度之和；各层之间不共享（ALBERT 和 Universal
    Transformer 例外），同一层内所有位置用同一组权重。
    """
    tied = drawn_model(vocab_size=500)
    apart = drawn_model(vocab_size=500, tie_embeddings=False)
    weights = tied.state_dict()
    apart.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    ids = torch.randint(500, (2, 9))
    for model in (tied, apart):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
    summed = apart.model.embed_tokens.weight.grad + apart.lm_head.weight.grad
    error = largest(tied.model.embed_tokens.weight.grad - summed)
    n_tied, n_apart = (sum(p.numel() for p in model.parameters()) for model in (tied, apart))
    n_block = sum(p.numel() for p in tied.model.layers[0].parameters())
    table(
        "what | number",
        ("parameters of a block", n_block),
        ("of two blocks, embedding, head", n_apart),
        ("... if the last two are tied", n_tied),
        ("the tied gradient differs from the sum of both by", error),
    )
    assert n_apart - n_tied == 500 * 64
    assert n_tied == 2 * n_block + 500 * 64 + 64  # 64 of the last norm
    assert error < 1e-5


def test_a_sequence_seen_often_is_memorised():
    """Does repeated data matter?

    A sequence that is shown far more often than the rest is learned by heart: remove duplicates. Here, one
    that is seen four times is hardly better known than one seen once. To repeat a whole corpus a few times is
    mild, too: up to 4 epochs are nearly as good as new text. Under --minutes, train.py stops after 8.

    Code: data/loader.py Blocks.batch
    Break: data/loader.py Blocks.batch: `start = first + T * order[i]` becomes `start = first`
    Source: Lee et al. (2022, arXiv 2107.06499); Muennighoff et al. (2023, arXiv 2305.16264)
    问: 训练数据重复会有什么影响？可以训练多个 epoch 吗？
    答: 远比其他文本重复得多的片段会被逐字背下，所以要去重；整个语料重复几遍影响不大，约 4 个 epoch 以内几乎和
    新数据一样好。
    """
    V, B, T, n_slots, length = 16, 16, 32, 1536, 16
    text = torch.randint(V, (n_slots, 40))  # a passage stands at the beginning of each slot
    slots = torch.randperm(n_slots)
    passages, first = {}, 0
    for copies, n in ((512, 1), (32, 4), (4, 32), (1, 200)):
        passages[copies] = torch.randint(V, (n, length))
        used = slots[first : first + copies * n]
        text[used, :length] = passages[copies].repeat(copies, 1)
        first += len(used)
    blocks = Blocks(text.flatten().numpy(), T, seed=0)

    def batch(step):
        return blocks.batch(step, B)

    model = Transformer(tiny_config(vocab_size=V, n_layer=1, n_embd=48, n_hidden=144))
    pretrain(model, batch, settings(blocks.per_epoch // B))
    found = []
    for copies, rows in passages.items():
        targets = rows[:, 1:].clone()
        targets[:, :4] = IGNORED  # by which the passage is recognised
        with torch.no_grad():
            found.append((copies, len(rows), model.loss(rows[:, :-1], targets).item()))
    table("times in the text | passages of 16 random tokens | loss of the last 11 tokens", *found)
    print(f"    an even guess: ln 16 = {math.log(16):.3f}")
    losses = {copies: loss for copies, _, loss in found}
    assert losses[512] < 0.7
    assert losses[1] > 2.65 and abs(losses[4] - losses[1]) < 0.1


# --- precision ---


def test_products_may_have_sixteen_bits_but_such_weights_miss_small_updates():
    """What is mixed-precision training?

    Matrix products, which are most of the work, take 16-bit numbers; weights, gradients, sums and the
    optimizer stay in float32. The loss hardly changes. Weights that are themselves kept in bfloat16 have 8
    significant bits: an update of less than half the distance to the next number is rounded away, at a rate
    of 0.0001 most of them. So the weights are kept in float32 (or rounded up or down at random). train.py
    works like this where the device multiplies bfloat16 faster.

    Often told: it uses float16 and int8.
    Code: train.py autocast
    Break: train.py autocast: `enabled=settings.dtype == "bfloat16"` becomes `enabled=False`
    Source: Micikevicius et al. (2018, arXiv 1710.03740), sec. 3.1; Kalamkar et al. (2019, arXiv 1905.12322)
    问: 什么是混合精度训练？为什么权重还要保留 float32？
    答: 矩阵乘法用 16 位（本项目用 bfloat16），权重、梯度、求和与优化器状态保持 float32。bfloat16 只有 8 位有
    效位，小于半个间隔的更新会被舍入掉，权重就不动了，所以要保留 float32 主权重。
    """
    model, run = drawn_model(), settings(dtype="bfloat16")
    text = torch.randint(64, (4, 33))
    ids, targets = text[:, :-1], text[:, 1:].contiguous()
    in_float32 = model.loss(ids, targets).item()
    seen = {}

    def note(name):
        def hook(module, args, output):
            seen[name] = str(output.dtype).removeprefix("torch.")

        return hook

    block = model.model.layers[0]
    block.mlp.up_proj.register_forward_hook(note("a matrix product"))
    block.register_forward_hook(note("the stream after a block"))
    with autocast(run):
        loss = model.loss(ids, targets)
    loss.backward()
    seen["a gradient"] = str(block.mlp.up_proj.weight.grad.dtype).removeprefix("torch.")
    seen["a weight"] = str(block.mlp.up_proj.weight.dtype).removeprefix("torch.")
    table("in train.py, with autocast | dtype", *seen.items())

    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = nn.Parameter(block.mlp.up_proj.weight.detach().to(dtype))
        before = weights.detach().clone()
        weights.grad = torch.randn_like(weights)
        torch.optim.AdamW([weights], lr=1e-4, weight_decay=0).step()
        moved.append((str(dtype).removeprefix("torch."), (weights != before).float().mean().item()))
    table("weights in | share that an update of 0.0001 moves", *moved)
    assert list(seen.values()) == ["bfloat16", "float32", "float32", "float32"]
    assert abs(loss.item() / in_float32 - 1) < 0.01
    assert moved[0][1] > 0.95 and moved[1][1] < 0.5


def test_bfloat16_has_the_range_of_float32_and_float16_finer_steps():
    """bfloat16 or float16?

    Both have 16 bits. float16 spends 5 on the exponent: its numbers end at 65,504, and the smallest above 0
    is 6e-8, so small gradients vanish unless the loss is scaled up (and the gradient down afterwards).
    bfloat16 has 8 such bits, as float32 has, and with them its range; it needs no scaling. In return its
    numbers are eight times as far apart (above 6e-5): after 1 comes 1 + 1/128, in float16 1 + 1/1024.
    train.py takes bfloat16.

    Code: train.py autocast
    Break: train.py autocast: `torch.bfloat16, enabled` becomes `torch.float16, enabled`
    Source: Micikevicius et al. (2018, arXiv 1710.03740), sec. 3.2; Kalamkar et al. (2019, arXiv 1905.12322)
    问: bfloat16 和 float16 有什么区别？为什么训练大模型多用 bfloat16？
    答: float16 有 5 位指数，最大 65504，太小的梯度会下溢为 0，需要损失缩放；bfloat16 有 8 位指数，范围与
    float32 相同，不需要损失缩放，代价是尾数少 3 位，相邻两数的间隔是 float16 的 8 倍。
    """
    with autocast(settings(dtype="bfloat16")):
        product = F.linear(torch.full((1, 1), 300.0), torch.full((1, 1), 300.0))

    def spacing(x, dtype):
        """From x to the next number of the dtype."""
        x, infinity = torch.tensor([x], dtype=dtype), torch.tensor([math.inf], dtype=dtype)
        return (torch.nextafter(x, infinity).double() - x.double()).item()

    rows, curves = [], {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        small, large = (torch.tensor(value).to(dtype).item() for value in (1e-8, 90_000.0))
        rows.append((name, f"{torch.finfo(dtype).max:.5g}", small, large, spacing(1.0, dtype)))
        xs = [2.0**i for i in range(-30, 30)]
        xs = [x for x in xs if torch.finfo(dtype).max >= x == torch.tensor(x).to(dtype).item()]
        curves[name] = (xs, [spacing(x, dtype) for x in xs])
    table("dtype | largest | 1e-8 is | 300 * 300 is | from 1 to the next number", *rows)
    print(f"    300 * 300 with train.py's autocast: {product.item():,.0f}")
    lines("Distance to the next number", "number", "distance", curves, log="xy")

    _, half, brain = rows
    assert torch.finfo(torch.float16).max == 65504
    assert torch.finfo(torch.bfloat16).max > 0.99 * torch.finfo(torch.float32).max
    assert half[2] == 0 and half[3] == math.inf
    assert torch.tensor(1e-8 * 1024).half() != 0
    assert brain[2] > 0 and abs(product.item() / 90_000 - 1) < 0.01
    assert (half[4], brain[4]) == (1 / 1024, 1 / 128)
    for x in (2.0**-14, 0.5, 1024.0, 32768.0):
        assert spacing(x, torch.bfloat16) == 8 * spacing(x, torch.float16)


# --- scaling ---


def test_what_is_left_above_the_entropy_falls_as_a_power_of_compute():
    """What is a scaling law?

    A formula that is fitted to small runs and predicts larger ones, often L = E + a C^-b with the compute C.
    No model gets below the entropy E of the text; what is left falls by the same factor each time the compute
    doubles, a straight line if both axes are logarithmic. Here four tiny runs predict a fifth, twice as long.
    But a power law is an observation and holds where it was measured (and here only the runs grow; in
    practice the model does, too). For language, E is not known, and five points do not tell it: with E = 0 a
    line fits them as well, and far away it predicts a loss that no model can have.

    Often told: the loss is a power of compute. The straight line has to bend towards E.
    Code: model.py Config.flops_per_token
    Break: model.py Attention.forward: `is_causal=True, enable_gqa=True` becomes `is_causal=False,
    enable_gqa=True`
    Source: Kaplan et al. (2020, arXiv 2001.08361); Hoffmann et al. (2022, arXiv 2203.15556), eq. 2
    问: 什么是缩放定律 (scaling law)？怎么用小实验预测大模型的损失？
    答: 常用形式是 L = E + a·C^(−b)：E 是文本的熵，任何模型都降不到它以下；减去 E 之后，损失与算力在双对数坐标
    上近似一条直线，可用几次小训练拟合后外推。但它只是经验规律，E 一般未知，若忽略 E，外推到大算力时会得出低于
    熵的不可能结果。
    """
    V, B, T = 64, 8, 33
    text, log_p = markov_text(V, rows=2900, T=T)
    learned, held_out, entropy = text[:2560], text[2560:], -log_p[2560:].mean().item()

    def batch(step):
        rows = learned[B * step : B * step + B]
        return rows[:, :-1], rows[:, 1:]

    flops, losses, all_steps = [], [], (20, 40, 80, 160, 320)
    for steps in all_steps:
        torch.manual_seed(0)
        model = Transformer(tiny_config(vocab_size=V, n_layer=1, n_embd=24, n_head=2, n_hidden=72))
        pretrain(model, batch, settings(steps, lr=0.03))
        with torch.no_grad():
            losses.append(model.loss(held_out[:, :-1], held_out[:, 1:]).item())
        flops.append(3 * model.config.flops_per_token(T - 1) * steps * B * (T - 1))
    assert min(losses) > entropy, "a loss below the entropy means that the model sees its targets"

    def fit(E, n):
        """The line ln(L - E) = ln a - b ln C through the first n runs -> b, and L - E that it has at C."""
        slope, height = np.polyfit(np.log(flops[:n]), np.log(np.array(losses[:n]) - E), 1)
        return -slope, np.exp(height + slope * np.log([*flops, 1000 * flops[-1]]))

    above = np.array(losses) - entropy
    _, predicted = fit(entropy, 4)
    table(
        "steps | FLOPs | loss | above the entropy | predicted by the first four",
        *zip(all_steps, flops, losses, above.tolist(), predicted.tolist()),
    )
    fits = []
    for E in (entropy, 0.0):
        b, line = fit(E, 5)
        error = np.abs(line[:5] / (np.array(losses) - E) - 1).max()
        fits.append((E, b.item(), error.item(), E + line[5].item()))
    table("E | b | largest error | loss predicted for 1,000 times the compute", *fits)
    curves = {"five runs": (flops, above), "line through the first four": (flops, predicted[:5])}
    lines("Loss above the entropy", "training compute, FLOPs", "nats per token", curves, log="xy")

    assert (above[1:] < 0.8 * above[:-1]).all()
    assert abs(predicted[4] / above[4] - 1) < 0.3
    assert fits[0][2] < 0.2 and fits[1][2] < 0.05  # both lines fit
    assert fits[1][3] < entropy < fits[0][3]  # but one of them promises too much
