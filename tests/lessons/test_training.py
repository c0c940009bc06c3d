"""Training: loss, optimizer, schedule, batch, precision."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Transformer
from train import orthogonalize

from .book import drawn_model, largest, table, tiny_config, train


def test_cross_entropy_is_minus_log_probability_and_starts_at_ln_v():
    """What is the loss, and what should its first value be?

    -log softmax(z)_y = logsumexp(z) - z_y, the mean over tokens; its gradient is softmax(z) - onehot(y).
    Fresh weights should guess evenly, which gives ln V; a higher first value means a bad start or wrong
    targets.

    Code: model.py Transformer.loss
    Source: Goodfellow et al. (2016), "Deep Learning", sec. 6.2.2
    """
    scores, targets = torch.randn(5, 10, requires_grad=True), torch.randint(10, (5,))
    loss = F.cross_entropy(scores, targets)
    loss.backward()
    assert torch.allclose(loss, (scores.logsumexp(-1) - scores[range(5), targets]).mean())
    slope = (scores.softmax(-1) - F.one_hot(targets, 10)) / 5
    assert torch.allclose(scores.grad, slope, atol=1e-6)
    ids, rows = torch.randint(512, (8, 65)), []
    for name, model in (("as training begins", Transformer(tiny_config(vocab_size=512))),
                        ("every matrix random", drawn_model(vocab_size=512))):  # fmt: skip
        rows.append((name, model.loss(ids[:, :-1], ids[:, 1:]).item(), math.log(512)))
    table("weights | first loss | ln 512", *rows)
    assert abs(rows[0][1] - rows[0][2]) < 0.05 and rows[1][1] > rows[1][2] + 0.2


def test_the_first_steps_of_adam_ignore_the_size_of_the_gradient():
    """Why a warm-up?

    Adam's first update is lr times the sign of the gradient, be it 1e-6 or 1000: its second moment, the
    running mean of the squared gradient, rests on one sample. A small rate bounds the damage until the
    estimate is good.

    Often told: it avoids over-fitting to the first batches, or lets the model see each sample a few times.
    Code: train.py learning_rate
    Source: Kingma & Ba (2015, arXiv 1412.6980), algorithm 1; Liu et al. (2020, arXiv 1908.03265)
    """
    gradients = torch.tensor([1e-6, -1e-2, 1.0, 1e3])
    weights = torch.zeros(4, requires_grad=True)
    weights.grad = gradients.clone()
    torch.optim.Adam([weights], lr=0.01, eps=1e-12).step()
    table("gradient | first update with a rate of 0.01", *zip(gradients, weights.detach()))
    assert torch.allclose(weights.detach(), -0.01 * gradients.sign(), atol=1e-6)
    spreads = []
    for steps in (1, 100):
        estimates = (
            torch.randn(1000, steps).pow(2).mean(1)
        )  # the second moments of 1,000 weights, all truly 1
        spreads.append((steps, (estimates.max() / estimates.min()).item()))
    table("gradients seen | largest / smallest estimate of a second moment", *spreads)
    assert spreads[0][1] > 1e4 and spreads[1][1] < 5


def test_gradient_noise_falls_with_one_over_the_batch():
    """What does a larger batch buy?

    The gradient's variance falls as 1/B. Below the critical batch, about the variance of one sample's
    gradient divided by the squared length of the mean gradient, twice the batch needs half the steps; above
    it, samples are wasted. It depends on the task and grows in training: large language models use 10^5 to
    10^7 tokens a step.

    Often told: 16 to 128, as larger ones converge badly.
    Code: train.py choose_settings
    Source: McCandlish et al. (2018, arXiv 1812.06162), sec. 2.2
    """
    x = torch.randn(20_000, 8)
    y = x.sum(1) + torch.randn(20_000)
    samples = -x * y[:, None]  # each sample's gradient of (x w - y)^2 / 2 at w = 0
    mean, rows = samples.mean(0), []
    for B in (1, 4, 16, 64):
        batches = samples[torch.randint(20_000, (1500, B))].mean(1)
        variance = (batches - mean).pow(2).sum(1).mean().item()
        rows.append((B, variance, variance * B))
    table("batch | variance of the gradient | times B", *rows)
    critical = (samples - mean).pow(2).sum(1).mean() / mean.pow(2).sum()
    print(f"    critical batch: {critical:.1f}")
    assert all(abs(row[2] / rows[0][1] - 1) < 0.12 for row in rows)
    assert 5 < critical < 20


def test_n_small_steps_of_sgd_are_one_large_step_of_n_times_the_rate():
    """How do batch size and learning rate go together?

    For SGD, n steps of rate lr on batches of B are to first order one step of rate n lr on a batch of n B:
    linear scaling. Adam normalises the gradient, and the usual rule for it is the square root. Both fail
    above the critical batch. (train.py keeps to one rate, for Muon.)

    Code: train.py choose_settings
    Source: Goyal et al. (2017, arXiv 1706.02677), sec. 2.1; Malladi et al. (2022, arXiv 2205.10287) for Adam
    """
    x = torch.randn(64, 8)
    y = x.sum(1) + 0.5 * torch.randn(64)

    def gradient(w, rows):
        return x[rows].T @ (x[rows] @ w - y[rows]) / len(x[rows])

    def difference(lr, n=4, B=16):
        w = torch.zeros(8)
        for i in range(n):
            w = w - lr * gradient(w, slice(i * B, (i + 1) * B))
        large = -n * lr * gradient(torch.zeros(8), slice(0, n * B))
        return ((w - large).norm() / large.norm()).item()

    rows = [(lr, difference(lr)) for lr in (0.2, 0.02, 0.002)]
    table("rate | 4 steps differ from one large step by", *rows)
    assert rows[2][1] < 0.01 and 7 < rows[1][1] / rows[2][1] < 13


def test_micro_batches_must_be_weighted_by_their_tokens():
    """Is accumulating gradients the same as a large batch?

    Yes, if losses are summed over tokens and divided by the number of all tokens. The mean of the
    micro-batches' means gives too much weight to those with few targets: long prompts, padding.

    Often told: loss / accumulation_steps. Large libraries had it wrong until 2024.
    Code: train.py training_step
    Source: Hugging Face (2024), "Fixing gradient accumulation"
    """
    model, ids = drawn_model(), torch.randint(64, (4, 13))
    ids, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :11], targets[1, :6] = -100, -100  # two of the rows have long prompts
    n = (targets != -100).sum()

    def gradient(losses):
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return model.model.embed_tokens.weight.grad.clone()

    one_by_one = [(ids[i : i + 1], targets[i : i + 1]) for i in range(4)]
    whole = gradient([model.loss(ids, targets)])
    ways = {
        "the mean of the means": gradient(model.loss(x, y) / 4 for x, y in one_by_one),
        "sums, over all tokens": gradient(model.summed_loss(x, y)[0] / n for x, y in one_by_one),
    }
    found = [(way, ((g - whole).norm() / whole.norm()).item()) for way, g in ways.items()]
    table("4 micro-batches of 1, 6, 12 and 12 targets, by | error of the gradient", *found)
    assert found[0][1] > 0.1 and found[1][1] < 1e-5


def test_dropout_scales_in_training_and_does_nothing_afterwards():
    """What becomes of dropout when a model is used?

    Nothing but model.eval(). In training, what is kept is divided by 1 - p, so that the mean stays; the paper
    multiplied by the share kept when testing instead.

    Often told: when testing, multiply by the dropout rate.
    Code: model.py Block.forward
    Source: Srivastava et al. (2014); the documentation of torch.nn.Dropout
    """
    dropout, x = nn.Dropout(0.25), torch.ones(100_000)
    y = dropout(x)
    dropout.eval()
    rows = [("training", y.mean(), y.unique()), ("use", dropout(x).mean(), dropout(x).unique())]
    table("mode | mean of ones | values", *rows)
    assert abs(y.mean() - 1) < 0.01 and abs(y.max() - 4 / 3) < 1e-5
    assert torch.equal(dropout(x), x)


def test_the_embedding_may_share_its_matrix_with_the_head_and_layers_share_nothing():
    """Where does a Transformer share weights?

    The embedding and the head may be one matrix, whose gradient is the sum of both uses. Layers share nothing
    (ALBERT's do, and the Universal Transformer's); within a layer all positions have the same weights.

    Often told: all layers of the encoder share their weights.
    Code: model.py Transformer.head
    Source: Press & Wolf (2017, arXiv 1608.05859); Lan et al. (2020, arXiv 1909.11942) for ALBERT
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
    sizes = (model.config.num_params() for model in (tied, apart))
    table("parameters | if not tied | tied gradient differs from the sum of both by", (*sizes, error))
    assert apart.config.num_params() - tied.config.num_params() == 500 * 64
    assert error < 1e-6
    parameters = [p for layer in tied.model.layers for p in layer.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


def test_a_sequence_seen_often_is_memorised():
    """Does repeated data matter?

    A sequence that is shown far more often than the rest is learned by heart: remove duplicates. To repeat
    the whole corpus a few times is much milder; up to 4 epochs are nearly as good as new text.

    Code: data/loader.py Blocks.batch
    Source: Lee et al. (2022, arXiv 2107.06499); Muennighoff et al. (2023, arXiv 2305.16264)
    """
    sequences, seen = torch.randint(16, (2000, 17)), set()

    def batch(step):
        chosen = torch.randint(1, 2000, (12,))
        seen.update(chosen.tolist())
        chosen[0] = 0  # sequence 0 is in every batch
        return sequences[chosen, :-1], sequences[chosen, 1:]

    model = Transformer(tiny_config(vocab_size=16, n_layer=1, n_embd=48, n_head=2))
    train(model, batch, 150, 1e-2)

    @torch.no_grad()
    def loss(rows):
        return model.loss(rows[:, :-1], rows[:, 1:]).item()

    often, once = loss(sequences[:1]), loss(sequences[list(seen)[:300]])
    table("sequences of random tokens | loss", ("seen 150 times", often), ("seen once or a few times", once))
    print(f"    an even guess: ln 16 = {math.log(16):.3f}")
    assert often < 0.3 and once > 2.6


def test_products_may_have_sixteen_bits_and_weights_need_thirty_two():
    """What is mixed-precision training?

    Matrix products in 16 bits; weights and the optimizer in float32. float16 ends at 65504 and loses small
    gradients, hence loss scaling. bfloat16 has the range of float32 and 8 significant bits: 1 + 0.001 is 1,
    so that weights kept in it miss small updates.

    Often told: it uses float16 and int8.
    Code: train.py autocast
    Source: Micikevicius et al. (2018, arXiv 1710.03740); Kalamkar et al. (2019, arXiv 1905.12322)
    """
    rows = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = torch.ones((), dtype=dtype)
        for _ in range(1000):
            weight -= 0.001
        large, small = (torch.tensor(value).to(dtype).item() for value in (70_000.0, 1e-8))
        rows.append(
            (str(dtype)[6:], large, small, (torch.ones((), dtype=dtype) + 0.001).item(), weight.item())
        )
    table("dtype | 70,000 is | 1e-8 is | 1 + 0.001 is | 1, less a thousand times 0.001", *rows)
    half, brain, single = rows
    assert half[1] == math.inf and half[2] == 0
    assert brain[2] > 0 and brain[3] == brain[4] == 1
    assert abs(single[4]) < 1e-3


def test_muon_gives_every_direction_of_a_gradient_the_same_size():
    """What does Muon do that Adam does not?

    It takes the gradient of a matrix as a whole (its running mean), written U S V^T, and updates by about U
    V^T: all directions get nearly the same size, small ones too. Its author suspects that this helps rare
    directions to be learned. Adam looks at each weight by itself.

    Code: train.py orthogonalize
    Source: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks"
    """
    left, right = torch.linalg.qr(torch.randn(2, 64, 64)).Q
    gradient = left * torch.logspace(0, -2, 64) @ right  # singular values from 1 down to 0.01
    updates = {
        "the gradient": gradient,
        "Adam's first update": gradient.sign(),
        "Muon's": orthogonalize(gradient[None], torch.float32)[0],
    }
    rows = []
    for name, update in updates.items():
        values = torch.linalg.svdvals(update)
        rows.append((name, values[0] / values.median(), values.median() / values[-1]))
    table("update | largest singular value / median | median / smallest", *rows)
    assert min(rows[0][1:]) > 8 and max(rows[2][1:]) < 2
