"""What model.py promises: the arithmetic of Llama, an exact cache, files that the ecosystem opens."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from model import PRESETS, Config, KVCache, Transformer


def ids_of(model, *shape, seed=0):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", ["nano", "micro"])
def test_first_loss_is_an_even_guess(preset, tied):
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=2048, tie_embeddings=tied, **PRESETS[preset]))
    ids = ids_of(model, 4, 65)
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(2048), rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_number_of_parameters_is_the_closed_form(preset):
    with torch.device("meta"):
        for variant in ({}, {"tie_embeddings": False, "qkv_bias": True, "qk_norm": True}):
            model = Transformer(Config(vocab_size=4096, **PRESETS[preset], **variant))
            assert model.config.num_params() == sum(p.numel() for p in model.parameters())


def test_changing_a_token_changes_no_logit_before_it(model):
    ids = ids_of(model, 1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % model.config.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_loss_and_gradients_equal_plain_cross_entropy(model):
    ids, targets = ids_of(model, 3, 20), ids_of(model, 3, 20, seed=1)
    targets[0, :7] = -100
    ours = model.loss(ids, targets)
    ours.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
    plain.backward()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for gradient, p in zip(gradients, model.parameters()):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
    total = model.loss(ids, targets, reduction="sum")
    assert total.item() == pytest.approx(plain.item() * (targets != -100).sum().item(), rel=1e-6)


def test_loss_is_the_same_in_pieces_of_a_few_rows(model, monkeypatch):
    ids, targets = ids_of(model, 4, 30), ids_of(model, 4, 30, seed=1)
    whole = model.loss(ids, targets).item()
    monkeypatch.setattr("model.LOGITS_AT_A_TIME", {"cpu": 7 * model.config.vocab_size})
    assert model.loss(ids, targets).item() == pytest.approx(whole, rel=1e-6)


def test_cached_decoding_equals_the_uncached_forward_pass(model):
    ids = ids_of(model, 2, 24)
    expected = model(ids)
    cache = KVCache(model.config, 2, 24)
    pieces = [model(ids[:, i:j], cache=cache) for i, j in ((0, 7), (7, 8), (8, 9), (9, 15), (15, 24))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)


def test_rows_of_different_lengths_decode_like_each_alone(model):
    ids = ids_of(model, 3, 20)
    lengths = [4, 11, 7]
    cache = KVCache(model.config, 3, 20)
    model(ids[:, :11], cache=cache)
    cache.truncate(lengths)
    new = torch.stack([row[n : n + 5] for row, n in zip(ids, lengths)])
    logits = model(new, cache=cache)
    for row, n, ours in zip(ids, lengths, logits):
        torch.testing.assert_close(ours, model(row[None, : n + 5])[0, n:], rtol=0, atol=1e-5)


def test_a_prompt_is_read_once_for_many_continuations(model):
    ids = ids_of(model, 1, 10)
    cache = KVCache(model.config, 1, 16)
    model(ids, cache=cache)
    fanned = cache.repeat(3)
    logits = model(torch.tensor([[1], [2], [3]]), cache=fanned)
    for i in range(3):
        alone = model(torch.cat([ids, torch.tensor([[i + 1]])], dim=1))[0, -1]
        torch.testing.assert_close(logits[i, 0], alone, rtol=0, atol=1e-5)


def test_a_full_cache_says_so_and_its_size_is_the_formula(model):
    c = model.config
    cache = KVCache(c, 2, 8)
    assert cache.nbytes == 2 * c.n_layer * c.n_kv_head * c.head_dim * 8 * 2 * 4
    model(ids_of(model, 2, 8), cache=cache)
    with pytest.raises(ValueError, match="room for 8 tokens, not for 8 \\+ 1"):
        model(ids_of(model, 2, 1), cache=cache)


@pytest.mark.parametrize(
    "variant", [{}, {"tie_embeddings": False}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 16}]
)
def test_a_saved_folder_opens_in_transformers_with_equal_logits(tmp_path, tiny_config, variant):
    torch.manual_seed(0)
    model = Transformer(Config(**{**vars(tiny_config), "head_dim": 0, **variant})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = ids_of(model, 2, 20)
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    again = Transformer.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))


def test_equal_weights_are_equal_files(tmp_path, model):
    model.save(tmp_path / "a")
    Transformer.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_mistakes_are_named(tmp_path, model):
    with pytest.raises(ValueError, match="has no config.json"):
        Transformer.load(tmp_path)
    with pytest.raises(ValueError, match="n_head 4 is not divisible by n_kv_head 3"):
        Config(vocab_size=10, n_head=4, n_kv_head=3)
    model.save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    with pytest.raises(ValueError, match="hidden_act 'gelu' in config.json is not supported"):
        Transformer.load(tmp_path)
    (tmp_path / "config.json").write_text(
        config.replace('"intermediate_size": 64', '"intermediate_size": 96')
    )
    with pytest.raises(ValueError, match=r"size mismatch for model.layers.0.mlp.gate_proj.weight"):
        Transformer.load(tmp_path)
