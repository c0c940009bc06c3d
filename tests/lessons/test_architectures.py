"""Architectures: encoders and decoders, BERT, mixtures of experts, other people's checkpoints."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, Transformer, apply_rope, config_from_json, rope

from .book import causal, drawn_model, forward, largest, moved_by, places, table, tiny_config


def test_encoder_and_decoder_differ_by_the_mask():
    """What is the difference between an encoder and a decoder?

    The mask. The same block is an encoder if all pairs see each other, and a decoder if causal. An
    encoder-decoder is one of each, with attention from the second to the first.

    Often told: a decoder-only model need not process its input, so that it is cheaper; it is trained by
    masking words.
    Code: model.py Attention.forward
    Source: Vaswani et al. (2017), sec. 3.1; Raffel et al. (2020, arXiv 1910.10683), sec. 3.2
    """
    model, ids, rows = drawn_model(), torch.randint(64, (1, 8)), []
    for name, mask in (("encoder", torch.ones(8, 8, dtype=torch.bool)), ("decoder", causal(8))):
        moved = places(moved_by(partial(forward, model, mask=mask), ids, 7) > 0)
        rows.append((name, mask.sum(), moved))
    table("as | pairs that see each other | outputs that the last token moves", *rows)
    assert [row[2] for row in rows] == [list(range(8)), [7]]


def test_one_reason_is_that_causal_training_has_more_targets_in_a_sequence():
    """Why are most large language models decoders only?

    One reason can be counted: a causal model has a target at every position, BERT at 15 %, a prefix model
    behind the prefix. Others are one stack to scale and to cache, and one form for training and use. Straight
    after pretraining, causal decoders were also best without examples; after fine-tuning on many tasks,
    models that read the prompt both ways were better (Wang et al.).

    Code: model.py Transformer.loss
    Source: Clark et al. (2020, arXiv 2003.10555), sec. 1; Wang et al. (2022, arXiv 2204.05832)
    """
    T, model = 128, drawn_model()
    ids = torch.randint(64, (1, T + 1))
    has_target = {
        "causal": torch.arange(T) >= 0,
        "prefix of half": torch.arange(T) >= T // 2,
        "BERT": torch.randperm(T) < 0.15 * T,  # of any order; what BERT shows is the next lesson
    }
    rows = []
    for name, kept in has_target.items():
        targets = ids[:, 1:].where(kept, -100)
        with torch.no_grad():
            n = model.summed_loss(ids[:, :-1], targets)[0] / model.loss(ids[:, :-1], targets)
        rows.append((name, round(n.item())))
    table("model | targets in 128 tokens", *rows)
    assert [n for _, n in rows] == [128, 64, 20]


def test_bert_hides_fifteen_percent_of_the_tokens_in_three_ways():
    """What are BERT's 15 %, and its 80, 10 and 10 %?

    15 % of positions are targets; of those 80 % show [MASK], 10 % a random token, 10 % what was there. [MASK]
    does not occur later, so that the model must make a useful vector of ordinary tokens, too. The 15 % were
    found by trial; up to 40 % can be better.

    Often told: if a token were always masked, fine-tuning would meet unseen words. The words are known; it is
    [MASK] that never comes again.
    Code: model.py Transformer.loss
    Source: Devlin et al. (2019), sec. 3.1 and app. C.2; Wettig et al. (2023, arXiv 2202.08005)
    """
    n, mask = 200_000, 1000  # [MASK] is the id behind 1,000 others
    ids, u = torch.randint(1000, (n,)), torch.rand(n)
    is_target = torch.rand(n) < 0.15
    shown = ids.masked_fill(is_target & (u < 0.8), mask)
    other = is_target & (u >= 0.8) & (u < 0.9)
    shown[other] = torch.randint(1000, (int(other.sum()),))
    targets = ids.where(is_target, torch.tensor(-100))
    shares = {
        "targets": targets != -100,
        "shown as [MASK]": shown == mask,
        "as another token": (shown != ids) & (shown != mask),
        "as they are, but targets": is_target & (shown == ids),
    }
    table("tokens | share", *((name, which.float().mean()) for name, which in shares.items()))
    for which, share in zip(shares.values(), (0.15, 0.12, 0.015, 0.015)):
        assert abs(which.float().mean() - share) < 0.003


def test_a_mixture_of_experts_computes_few_of_many():
    """What is a mixture of experts?

    Instead of one MLP, E of them, and a router that takes the best k for each token and mixes them with
    weights that sum to one: parameters grow with E, FLOPs with k. If all experts are equal, it is the plain
    MLP.

    Often told: each input takes some of the weights. The choice is made for each token, in each layer.
    Code: model.py MLP
    Source: Shazeer et al. (2017, arXiv 1701.06538), sec. 2; Jiang et al. (2024, arXiv 2401.04088), sec. 2.1
    """
    E, k, config = 8, 2, tiny_config(n_embd=32, n_hidden=96)
    experts, router = nn.ModuleList(MLP(config) for _ in range(E)), nn.Linear(32, E, bias=False)

    def mixture(x):
        weights, chosen = router(x).topk(k, -1)  # (tokens, k)
        weights, y = weights.softmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            y[token] += weights[token, place, None] * expert(x[token])
        return y, chosen

    x = torch.randn(100, 32)
    _, chosen = mixture(x)
    n = sum(p.numel() for p in experts.parameters())
    calls = chosen.flatten().bincount(minlength=E)
    table("parameters | used for a token | calls of each expert for 100 tokens", (n, n * k // E, calls))
    assert calls.sum() == 100 * k
    for expert in experts:
        expert.load_state_dict(experts[0].state_dict())
    assert torch.allclose(mixture(x)[0], experts[0](x), atol=1e-5)


def test_two_layouts_of_rope_differ_by_an_order_of_rows():
    """How are checkpoints with the other layout of RoPE converted?

    Meta's Llama rotates the pairs (0, 1), (2, 3) ...; Hugging Face's, as here, (i, i + D/2). Within each
    head, the rows of q_proj and k_proj go from even, odd, even ... to first all even, then all odd ones.
    Forgotten, the model runs, and babbles.

    Code: model.py apply_rope
    Source: `permute` in transformers' convert_llama_weights_to_hf.py
    """
    C, D, T = 64, 16, 10
    w_q, w_k, x = torch.randn(C, C) / 8, torch.randn(C, C) / 8, torch.randn(T, C)
    cos, sin = rope(torch.arange(T), tiny_config(), x.dtype)

    def rotate_neighbours(x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    def rotate_halves(x):
        return apply_rope(x, cos, sin)

    def scores(w_q, w_k, rotate):
        q, k = ((x @ w.T).view(T, -1, D).transpose(0, 1) for w in (w_q, w_k))  # (H, T, D)
        return rotate(q) @ rotate(k).mT

    def reorder(w):
        return w.view(C // D, D // 2, 2, C).transpose(1, 2).reshape(C, C)

    wanted = scores(w_q, w_k, rotate_neighbours)
    rows = [
        ("reordered", largest(scores(reorder(w_q), reorder(w_k), rotate_halves) - wanted)),
        ("as they are", largest(scores(w_q, w_k, rotate_halves) - wanted)),
    ]
    table("rows of Meta's q_proj and k_proj | error of the scores", *rows)
    assert rows[0][1] < 1e-4 < 0.5 < rows[1][1]


def test_other_checkpoints_fold_into_the_layout_of_llama():
    """How are fused or unusual checkpoints brought into the layout of Llama?

    Fused query_key_value is cut by rows; with grouped queries it may be stored group by group [q q k v | q q
    k v]. Qwen2 has biases on q, k and v. Baichuan 2 normalises the rows of its head: store them normalised.
    Then compare scores.

    Often told: Baichuan normalises the hidden state before the head.
    Code: model.py config_from_json
    Source: modeling_qwen2.py in transformers; Baichuan 2's report (2023, arXiv 2309.10305), sec. 2, NormHead
    """
    w_q, w_k, w_v = torch.randn(64, 64), torch.randn(32, 64), torch.randn(32, 64)  # 4 heads, 2 of k and v
    groups = zip(w_q.split(32), w_k.split(16), w_v.split(16))
    fused = torch.cat([torch.cat(group) for group in groups])  # (128, 64)
    by_group = [part.flatten(0, 1) for part in fused.view(2, 64, 64).split((32, 16, 16), dim=1)]
    rows = []
    for name, parts in (("group by group", by_group), ("at once", fused.split((64, 32, 32)))):
        errors = [largest(part - w) for part, w in zip(parts, (w_q, w_k, w_v))]
        rows.append((name, *errors))
    table("fused matrix cut | error of q | of k | of v", *rows)
    assert max(rows[0][1:]) == 0 < rows[1][1]
    model, ids = drawn_model(tie_embeddings=False), torch.randint(64, (1, 9))
    x, head = model.hidden(ids), torch.randn(64, 64)  # of Baichuan 2, which normalises it at every use
    model.lm_head.weight.data = F.normalize(head)
    error, as_told = (
        largest(model(ids) - x @ F.normalize(head).T),
        largest(model(ids) - F.normalize(x, dim=-1) @ head.T),
    )
    table("error of a normalised head | of a normalised hidden state", (error, as_told))
    assert error < 1e-4 < 0.1 < as_told
    fields = dict(
        model_type="qwen2", vocab_size=64, max_position_embeddings=64, hidden_size=32, rms_norm_eps=1e-6
    )
    fields |= dict(intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    assert Transformer(config_from_json(fields)).model.layers[0].self_attn.q_proj.bias is not None
