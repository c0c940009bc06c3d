"""Inspection: looking inside a model with a few lines of hooks."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from data.loader import IGNORED
from finetune import averages

from .book import CHARACTERS, SPEECH, causal, drawn_model, largest, table, to_ids
from .xray import attention_weights, cosine_distances, logit_lens, record, streams


def test_the_cosine_distance_of_a_block_that_does_nothing_is_zero(reader_of_the_speech):
    """Which blocks matter?

    1 - cos(in, out), averaged over tokens, says how far a block turns the stream. In deep trained models most
    blocks turn it little (Men et al.); of the two here the first turns it right round, the second hardly. One
    that returns its input can be removed. A change of length is not seen.

    Code: model.py Block.forward
    Source: Men et al. (2024, arXiv 2403.03853), "block influence"
    """
    ids = to_ids(SPEECH[:32])[None]
    idle = copy.deepcopy(reader_of_the_speech)
    for linear in (idle.model.layers[1].self_attn.o_proj, idle.model.layers[1].mlp.down_proj):
        nn.init.zeros_(linear.weight)
    rows = [
        ("trained", *cosine_distances(reader_of_the_speech, ids).mean(-1).tolist()),
        ("block 1 zeroed", *cosine_distances(idle, ids).mean(-1).tolist()),
    ]
    table("model | block 0 turns the stream by | block 1", *rows)
    assert abs(rows[1][2]) < 1e-5 < 0.01 < min(rows[0][1:])
    assert abs(rows[0][1] - rows[1][1]) < 1e-6


def test_the_logit_lens_needs_the_final_norm(reader_of_the_speech):
    """What would the model say if it ended here?

    head(norm(x)) reads the stream after any block as if it were the last ("logit lens"); after the last it is
    the model itself. Without the norm the gains are missing and the scale is wrong, and so is the loss.

    Code: model.py Transformer.head
    Source: nostalgebraist (2020), "interpreting GPT: the logit lens"; Belrose et al. (2023, arXiv 2303.08112)
    """
    model, ids = reader_of_the_speech, to_ids("Four score and seven years")[None]
    rows = []
    for i, logits in enumerate(logit_lens(model, ids[:, :-1])):
        likely = " ".join(repr(CHARACTERS[token]) for token in logits[-1].topk(3).indices)
        rows.append((f"{i} blocks", likely, F.cross_entropy(logits, ids[0, 1:]).item()))
    last = streams(model, ids[:, :-1])[-1]
    without = F.cross_entropy(model.head(last), ids[0, 1:]).item()
    table(
        "after | likeliest after 'Four score and seven year' | loss",
        *rows,
        ("2 blocks, no norm", "", without),
    )
    assert abs(rows[-1][2] - model.loss(ids[:, :-1], ids[:, 1:]).item()) < 1e-5
    assert rows[0][2] > rows[-1][2] and abs(without - rows[-1][2]) > 0.05


def test_attention_weights_must_reproduce_the_output_of_their_layer(reader_of_the_speech):
    """How are the weights of attention seen, if the kernel never returns them?

    They are computed again, softmax(Q K^T / sqrt(D)) of the same rotated q and k. To be sure that they are
    the right ones, multiply by V: that must be the layer's output.

    Often told: just read them. Fused kernels never have them all.
    Code: model.py Attention.forward
    Source: Dao et al. (2022, arXiv 2205.14135)
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
    print(f"    error of the output: {error:.0e}")
    assert error < 1e-5
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, len(text)), atol=1e-5)
    assert (weights * ~causal(len(text))).abs().max() == 0


def test_losses_of_channels_are_summed_before_they_are_divided():
    """What are channel losses, and how are they computed?

    Each row says where it comes from; losses and tokens are summed for each source, over all processes, and
    divided at the end.

    Often told: average the means of the workers. That is wrong if their tokens differ in number.
    Code: finetune.py averages
    Source: it is the definition of a mean
    """
    model, ids = drawn_model(), torch.randint(64, (4, 9))
    targets, channels = ids[:, 1:].clone(), torch.tensor([0, 0, 1, 1])
    targets[0, 2:] = IGNORED  # row 0 has two targets, the others eight
    _, nats = model.summed_loss(ids[:, :-1], targets)
    counts = (targets != IGNORED).sum(1)
    sums = torch.zeros(2, 2).index_add(0, channels, torch.stack((counts, nats), 1))
    losses = averages("val", ("loss",), ("short", "long"), sums)
    rows = [(name, int(n), losses[f"val_loss {name}"]) for name, (n, _) in zip(("short", "long"), sums)]
    table("channel | targets | loss", *rows, ("all", int(counts.sum()), losses["val_loss"]))
    of_channel = model.loss(ids[:2, :-1], targets[:2]).item()
    of_all = model.loss(ids[:, :-1], targets).item()
    mean_of_means = (nats / counts)[:2].mean().item()
    print(f"    the first channel, had its rows been on two workers: mean of means {mean_of_means:.4f}")
    assert abs(losses["val_loss short"] - of_channel) < 1e-4
    assert abs(losses["val_loss"] - of_all) < 1e-4
    assert abs(mean_of_means - of_channel) > 1e-3
