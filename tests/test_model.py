"""What model.py promises: the arithmetic of Llama, an exact cache, files that the ecosystem opens."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, make_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model as stage
from model import PRESETS, Config, KVCache, Transformer, load_safetensors, rope, save_safetensors
from sample import generate, make_cache
from tokenizer import Tokenizer
from train import NextTokenLoss, bits_per_byte, make_optimizers, training_step

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=no_gpu)]


def ids_of(model, *shape, seed=0):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def deep(n_layer, **settings):
    """A fresh model, as training begins with it."""
    torch.manual_seed(0)
    return Transformer(Config(512, 64, n_layer, n_head=2, n_kv_head=1, n_embd=64, n_hidden=192, **settings))


def read_weights(folder):
    """The weights of a folder, in memory: what load_safetensors returns is read from the file when needed."""
    weights = load_safetensors(folder / "model.safetensors")
    return {name: tensor.clone() for name, tensor in weights.items()}


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --- the device ---


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert stage.choose_device() == expected
    assert stage.choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="there is no device 'abacus' here"):
        stage.choose_device("abacus")


def test_the_rate_of_products_is_their_flops_divided_by_the_time(monkeypatch):
    monkeypatch.setattr(stage, "time_product", lambda a: len(a) / 512)
    assert stage.matmul_rate.__wrapped__("cpu", torch.float32) == 2 * 1024**3 / 2


def test_the_time_of_a_product_is_that_between_two_looks_at_the_clock(monkeypatch):
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(stage.time, "perf_counter", lambda: next(clock))
    assert stage.time_product(torch.ones(3, 3)) == 0.5


@pytest.fixture
def unmeasured():
    """Before and after, fast_dtype remembers nothing."""
    stage.fast_dtype.cache_clear()
    yield
    stage.fast_dtype.cache_clear()


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_fast_dtype_of_a_cpu_is_the_one_with_the_faster_product(monkeypatch, unmeasured, fast):
    monkeypatch.setattr(stage, "time_product", lambda a: 1.0 if a.dtype == fast else 2.0)
    assert stage.fast_dtype("cpu") == fast


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_fast_dtype_is_found_beside_another_program(monkeypatch, unmeasured, fast):
    """Which takes the processor in 18 of 20 products of the dtype that is fast, and in 2 of the other."""
    n_timed = {torch.float32: 0, torch.bfloat16: 0}

    def time_product(a):
        n_timed[a.dtype] += 1
        disturbed = (n_timed[a.dtype] % 10 != 0) == (a.dtype == fast)
        return (1.0 if a.dtype == fast else 2.0) + 10 * disturbed

    monkeypatch.setattr(stage, "time_product", time_product)
    assert stage.fast_dtype("cpu") == fast


@pytest.mark.parametrize("has_units", [True, False])
def test_the_fast_dtype_of_a_gpu_is_bfloat16_if_it_has_units_for_it(monkeypatch, unmeasured, has_units):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units)
    assert stage.fast_dtype("cuda") == (torch.bfloat16 if has_units else torch.float32)
    assert stage.fast_dtype("mps") == torch.float32


# --- arithmetic: transformers computes the same ---

SHAPE = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32, rope_theta=500000.0,
)  # fmt: skip
PEERS = {
    "Llama": ("Llama", dict(num_key_value_heads=4)),
    "Llama, grouped queries": ("Llama", dict()),
    "Llama, tied": ("Llama", dict(tie_word_embeddings=True)),
    "Llama 3.1": ("Llama", dict(rope_parameters=LLAMA3)),
    "Mistral": ("Mistral", dict(sliding_window=None)),
    "SmolLM2": ("Llama", dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3,
                              tie_word_embeddings=True, rope_theta=100000.0, rms_norm_eps=1e-5)),
    "Qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "Qwen3": ("Qwen3", dict(head_dim=32)),
}  # fmt: skip


def peer(name):
    """A tiny model of transformers, all of whose parameters are drawn."""
    kind, changes = PEERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.15)
    return model.eval()


@pytest.mark.parametrize("name", PEERS)
def test_a_folder_of_transformers_gives_equal_logits_and_tokens(tmp_path, name):
    theirs = peer(name)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.load(tmp_path)
    ids = ids_of(ours, 2, 60)
    same(ours(ids), theirs(ids).logits, 1e-4)
    written = theirs.generate(ids[:1], do_sample=False, max_new_tokens=64, eos_token_id=None)
    continued = [new for (new,) in generate(ours, [ids[0].tolist()], max_new_tokens=64, temperature=0)]
    assert continued == written[0, 60:].tolist()


@pytest.mark.parametrize("name", PEERS)
def test_a_folder_of_ours_gives_equal_logits_in_transformers(tmp_path, name):
    peer(name).save_pretrained(tmp_path / "theirs")
    ours = Transformer.load(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    ids = ids_of(ours, 2, 60)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    same(ours(ids), again(ids).logits, 1e-4)
    assert Transformer.load(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("name", ["Llama", "Llama 3.1"])
def test_both_spellings_of_the_rope_settings_are_one_config(tmp_path, name):
    peer(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    config = Transformer.load(tmp_path).config
    old = new | {"rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": None}
    if config.rope_scaling:
        old["rope_scaling"] = {"type": "llama3"} | config.rope_scaling
        del old["rope_scaling"]["rope_type"]
    del old["rope_parameters"]
    path.write_text(json.dumps(old))
    assert Transformer.load(tmp_path).config == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_files_of_half_precision_are_opened(tmp_path, dtype):
    theirs = peer("Qwen3").to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert {p.dtype for p in Transformer.load(tmp_path).parameters()} == {dtype}
    ours = Transformer.load(tmp_path, dtype=torch.float32)
    ids = ids_of(ours, 1, 20)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    same(ours(ids), again(ids).logits, 1e-4)


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "mixtral"), ("model_type", None),
        ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True),
        ("is_causal", False), ("layer_types", ["sliding_attention"]),
        ("per_layer_config", {"1": {"head_dim": 8}}), ("rope_interleaved", True),
        ("quantization_config", {"bits": 4}), ("rope_type", "yarn"), ("partial_rotary_factor", 0.5),
        ("rms_norm_eps", "1e-5"), ("hidden_size", None), ("num_hidden_layers", "two"),
        ("num_key_value_heads", 3), ("factor", None),
    ],
)  # fmt: skip
def test_a_config_of_another_arithmetic_is_refused_by_the_name_of_the_field(tmp_path, field, value):
    peer("Llama 3.1").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    inside = settings["rope_parameters"] if field in settings["rope_parameters"] else settings
    inside[field] = value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ours = {"rms_norm_eps": "norm_eps", "num_hidden_layers": "n_layer", "num_key_value_heads": "n_kv_head"}
    with pytest.raises(ValueError, match=ours.get(field, field)):
        Transformer.load(tmp_path)


def test_a_sliding_window_is_refused_only_where_it_is_active(tmp_path):
    for name, said, active in (
        ("Mistral", {"sliding_window": 16}, True),
        ("Mistral", {"sliding_window": "absent"}, True),
        ("Mistral", {"sliding_window": None}, False),
        ("Mistral", {"sliding_window": 16, "use_sliding_window": False}, True),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": True}, True),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 2}, False),
    ):
        peer(name).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text()) | said
        if config["sliding_window"] == "absent":
            del config["sliding_window"]  # which stands for 4096
        path.write_text(json.dumps(config))
        if active:
            with pytest.raises(ValueError, match="sliding_window (16|4096) is not supported"):
                Transformer.load(tmp_path)
        else:
            Transformer.load(tmp_path)


HONOURED = {*stage.JSON_NAMES.values(), *stage.SUPPORTED, "rope_parameters", "use_sliding_window", "dtype"}
CONFIGS = [
    transformers.LlamaConfig,
    transformers.MistralConfig,
    transformers.Qwen2Config,
    transformers.Qwen3Config,
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_the_config_classes_is_known(kind, recwarn):
    """Honoured or refused (JSON_NAMES, SUPPORTED) or without an effect on logits (HARMLESS)."""
    fields = kind(**SHAPE | {"sliding_window": None}).to_dict()
    assert stage.config_from_json(json.loads(json.dumps(fields))).n_layer == 2
    assert not recwarn.list
    assert fields.keys() <= HONOURED | set(stage.HARMLESS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_field_without_a_value_has_the_default_of_transformers(kind):
    settings = kind(
        **SHAPE | {"sliding_window": None, "max_position_embeddings": 99, "rms_norm_eps": 1e-5}
    ).to_dict()
    for name in ("head_dim", "tie_word_embeddings", "rope_parameters", "layer_types", "use_sliding_window"):
        settings.pop(name, None)
    theirs, ours = kind.from_dict(settings), stage.config_from_json(settings)
    assert ours.head_dim == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_field_that_is_not_known_is_named_in_a_warning(tmp_path):
    peer("Llama").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {
        "num_local_experts": 8,
        "attention_multiplier": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="not known here: attention_multiplier, num_local_experts"):
        Transformer.load(tmp_path)


@pytest.mark.parametrize("kept", [("model.embed_tokens.weight", "lm_head.weight"), ("lm_head.weight",)])
def test_a_head_beside_a_tied_embedding_counts_as_in_transformers(tmp_path, kept):
    peer("Llama, tied").save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    weights["lm_head.weight"] = torch.randn(320, 64) * 0.15
    for name in {"model.embed_tokens.weight", "lm_head.weight"} - set(kept):
        del weights[name]
    save_safetensors(tmp_path / "model.safetensors", weights)
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), Transformer.load(tmp_path)
    ids = ids_of(ours, 1, 30)
    same(ours(ids), theirs(ids).logits, 1e-4)
    assert ours.config.tie_embeddings == (len(kept) == 1)
    ours.save(tmp_path / "again")
    assert torch.equal(Transformer.load(tmp_path / "again")(ids), ours(ids))


def test_a_file_of_several_dtypes_is_opened_in_the_widest(tmp_path):
    peer("Llama").to(torch.bfloat16).save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_safetensors(tmp_path / "model.safetensors", weights)
    ours = Transformer.load(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = ids_of(ours, 1, 30)
    same(ours(ids), theirs(ids).logits, 1e-4)


def test_a_folder_that_could_not_be_opened_is_not_written(tmp_path, model, tokenizer):
    weights = dict(model.state_dict())
    weights["model.embed_tokens.weight"] = torch.zeros(319, 32)
    with pytest.raises(RuntimeError, match="embed_tokens.weight"):
        model.save(tmp_path / "a", weights=weights)
    more = Tokenizer.train(["the cat"], vocab_size=321, special_tokens=[f"<{i}>" for i in range(65)])
    with pytest.raises(ValueError, match="320 rows are too few for 321 tokens"):
        model.save(tmp_path / "a", more)
    assert not (tmp_path / "a").exists()


def test_what_some_files_carry_along_is_passed_over(tmp_path):
    peer("Llama, tied").save_pretrained(tmp_path)
    ours, weights = Transformer.load(tmp_path), read_weights(tmp_path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    ids = ids_of(ours, 1, 9)
    expected = ours(ids)
    save_safetensors(tmp_path / "model.safetensors", weights)
    assert torch.equal(Transformer.load(tmp_path)(ids), expected)


def test_with_a_key_per_query_head_it_is_plain_multi_head_attention():
    config = Config(vocab_size=10, n_layer=1, n_head=3, n_kv_head=3, n_embd=24, n_hidden=32)
    attention = Transformer(config).model.layers[0].self_attn
    torch.nn.init.normal_(attention.o_proj.weight, std=0.2)
    x = torch.randn(2, 7, 24)
    cos, sin = rope(torch.arange(7), config, x.dtype)
    heads = []
    for h in range(3):
        rows = slice(8 * h, 8 * h + 8)
        q, k, v = (x @ w.weight[rows].T for w in (attention.q_proj, attention.k_proj, attention.v_proj))
        turned = []
        for y in (q, k):
            first, second = y[..., :4], y[..., 4:]
            turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
        scores = turned[0] @ turned[1].transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(7, 7).triu(1) == 1, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    same(attention(x, cos, sin), torch.cat(heads, dim=-1) @ attention.o_proj.weight.T)


def test_changing_a_token_changes_no_logit_before_it(model):
    ids = ids_of(model, 1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % model.config.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_attention_depends_on_relative_positions_alone(model):
    ids = ids_of(model, 1, 20)
    results = []
    for shift in (0, 7, 1000):
        x = model.model.embed_tokens(ids)
        for block in model.model.layers:
            x = block(x, *rope(torch.arange(20) + shift, model.config, x.dtype))
        results.append(model.head(model.model.norm(x)))
    same(results[0], model(ids))
    same(results[1], results[0])
    same(results[2], results[0], 1e-4)  # an angle near 1,000 has only four decimals in float32


# --- the loss ---


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy(model, tied):
    if not tied:
        model.lm_head = torch.nn.Linear(32, 320, bias=False)
    ids, targets = ids_of(model, 40, 20), ids_of(model, 40, 20, seed=1)  # more than 512 rows: two pieces
    targets[0, :7] = -100
    ours = model.loss(ids, targets)
    ours.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    plain.backward()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for gradient, p in zip(gradients, model.parameters()):
        same(gradient, p.grad, 1e-6)
    with torch.no_grad():
        total, _ = model.summed_loss(ids, targets)
    assert total.item() == pytest.approx(plain.item() * (targets != -100).sum().item(), rel=1e-6)


@pytest.mark.parametrize("learns", ["lm_head", "layers"])
def test_a_part_of_the_model_can_learn_alone(model, learns):
    model.lm_head = torch.nn.Linear(32, 320, bias=False)
    ids, targets = ids_of(model, 2, 9), ids_of(model, 2, 9, seed=1)
    for name, p in model.named_parameters():
        p.requires_grad_(learns in name)
    model.loss(ids, targets).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    for name, gradient in found.items():
        same(gradient, model.get_parameter(name).grad, 1e-6)


@torch.no_grad()
def test_the_loss_of_a_model_in_bfloat16_is_summed_in_float32(model):
    ids, targets = ids_of(model, 40, 20), ids_of(model, 40, 20, seed=1)
    model.to(torch.bfloat16)
    logits = model(ids).flatten(0, 1).float()
    expected = F.cross_entropy(logits, targets.flatten()).item()
    assert model.loss(ids, targets).item() == pytest.approx(expected, rel=1e-5)


def test_a_frozen_head_costs_no_gradient_of_it(model):
    model.lm_head = torch.nn.Linear(32, 320, bias=False)
    ids, flops = ids_of(model, 2, 9), {}
    for learns in (True, False):
        model.lm_head.requires_grad_(learns)
        with FlopCounterMode(display=False) as counter:
            model.loss(ids, ids).backward()
        flops[learns] = counter.get_total_flops()
    assert flops[True] - flops[False] == 2 * 18 * 320 * 32  # a product of (320, 18) and (18, 32)


def relative_error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("learns", ["", "lm_head", "layers"])
def test_bfloat16_weights_learn_under_autocast_and_frozen_ones_get_no_gradient(model, learns, compiled):
    model.lm_head = torch.nn.Linear(32, 320, bias=False)
    model.to(torch.bfloat16)
    for name, p in model.named_parameters():
        p.requires_grad_(learns in name)
    ids, targets = ids_of(model, 40, 20), ids_of(model, 40, 20, seed=1)  # two pieces
    targets[0, :7] = -100
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(model.loss, fullgraph=True, backend=counter) if compiled else model.loss
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss(ids, targets)
        plain = F.cross_entropy(model(ids).float().flatten(0, 1), targets.flatten())
    assert counter.frame_count == compiled
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(plain.item(), rel=1e-3)
    ours.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, p in model.named_parameters() if learns in name}
    model.zero_grad()
    plain.backward()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, model.get_parameter(name).grad) < 0.02  # bfloat16 has 8 bits


def test_the_losses_of_rows_add_up_to_the_sum_and_carry_no_gradient(model):
    ids, targets = ids_of(model, 5, 9), ids_of(model, 5, 9, seed=1)
    targets[3, 4:] = -100
    total, rows = model.summed_loss(ids, targets)
    assert total.requires_grad and not rows.requires_grad
    same(total, rows.sum(), 1e-3)
    for row, i, t in zip(rows, ids, targets):
        same(row, F.cross_entropy(model(i[None])[0], t, reduction="sum"), 1e-4)


def test_targets_of_another_length_are_refused(model):
    ids = ids_of(model, 8, 9)
    for n in (9, 90):  # as many pieces as ids have, and more
        with pytest.raises((ValueError, RuntimeError)):
            model.loss(ids, ids_of(model, n, 9))


def test_targets_that_are_all_left_out_cost_nothing(model):
    model.loss(ids_of(model, 2, 9), torch.full((2, 9), -100)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made inside."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_the_loss_never_holds_all_logits():
    model = Transformer(Config(vocab_size=5000, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, n_hidden=32))
    ids = ids_of(model, 16, 129)
    with LargestTensor() as largest:
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert largest.numel == 512 * 5000  # of 2,048 x 5,000


# --- fresh weights ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", ["nano", "micro"])
def test_first_loss_is_an_even_guess(preset, tied):
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=2048, tie_embeddings=tied, **PRESETS[preset]))
    ids = ids_of(model, 4, 65)
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(2048), rel=0.02)


def test_the_stream_is_as_large_in_a_deep_model_as_in_a_shallow_one():
    def spread(model, ids):
        x, sizes = model.model.embed_tokens(ids), []
        for block in model.model.layers:
            x = block(x, *rope(torch.arange(ids.size(1)), model.config, x.dtype))
            sizes.append(x.std().item())
        return sizes[-1]

    before, after = {}, {}
    for n_layer in (2, 24):
        model = deep(n_layer)
        optimizers = make_optimizers(model, lr=0.03, weight_decay=0.1, dtype=torch.float32)
        order = torch.randperm(512)
        with torch.no_grad():
            before[n_layer] = spread(model, ids_of(model, 4, 64))
        for step in range(10):
            ids = ids_of(model, 4, 65, seed=step)
            ids[:, 1::2] = order[ids[:, :-1:2]]  # half of the tokens can be learned
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            after[n_layer] = spread(model, ids)
    assert before[2] == pytest.approx(before[24], rel=0.05)
    assert 0.5 < after[24] / after[2] < 2 and after[2] > 10 * before[2]


def test_the_layers_output_projections_learn_first_and_equally_fast():
    model = deep(24)
    ids = ids_of(model, 4, 65)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for part in ("o_proj", "down_proj"):
        norms = [p.grad.norm().item() for name, p in model.named_parameters() if part in name]
        assert len(norms) == 24 and max(norms) < 3 * min(norms)
    moved = {name for name, p in model.named_parameters() if ".layers." in name and p.grad.any()}
    assert moved == {name for name, _ in model.named_parameters() if "o_proj" in name or "down_proj" in name}


def test_after_one_step_every_parameter_gets_a_gradient():
    model = deep(2, qk_norm=True, tie_embeddings=False)
    ids = ids_of(model, 4, 65)
    for _ in range(2):
        model.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert all(p.grad.any() for p in model.parameters())


# --- counting ---


@pytest.mark.parametrize("preset", PRESETS)
def test_the_number_of_parameters_is_the_closed_form(preset):
    with torch.device("meta"):
        for variant in ({}, {"tie_embeddings": False, "qkv_bias": True}, {"qk_norm": True, "head_dim": 96}):
            model = Transformer(Config(vocab_size=4096, **PRESETS[preset], **variant))
            assert model.config.num_params() == sum(p.numel() for p in model.parameters())


def test_published_shapes_have_their_published_numbers_of_parameters():
    llama3 = Config(128256, 8192, 32, 32, 8, 4096, 14336, tie_embeddings=False)
    qwen3 = Config(151936, 40960, 28, 16, 8, 1024, 3072, head_dim=128, qk_norm=True)
    smollm2 = Config(49152, 8192, 30, 9, 3, 576, 1536)
    assert [c.num_params() for c in (llama3, qwen3, smollm2)] == [8030261248, 596049920, 134515008]
    vocab_sizes = {"pico": 2048, "nano": 2048, "micro": 2048, "mini": 2048}
    vocab_sizes |= {"small": 50304, "medium": 50304, "large": 50304}
    sizes = [Config(V, **PRESETS[name]).num_params() for name, V in vocab_sizes.items()]
    assert [round(size / 1e6) for size in sizes] == [1, 2, 5, 14, 124, 354, 808]  # millions


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_what_the_counter_counts(tied):
    shape = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=128, n_hidden=256)
    model = Transformer(Config(640, tie_embeddings=tied, **shape))
    ids = ids_of(model, 2, 65)
    expected = 2 * 64 * model.config.flops_per_token(64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids[:, :-1])
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert counter.get_total_flops() == pytest.approx(3 * expected, rel=0.01)


# --- the cache ---


def test_cached_decoding_equals_the_uncached_forward_pass(model):
    ids = ids_of(model, 2, 24)
    expected = model(ids)
    cache = KVCache(model.config, 2, 24)
    pieces = [model(ids[:, i:j], cache=cache) for i, j in ((0, 7), (7, 8), (8, 9), (9, 15), (15, 24))]
    same(torch.cat(pieces, dim=1), expected)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_of_any_lengths_are_read_like_each_alone(data):
    torch.manual_seed(0)
    model = Transformer(Config(320, 64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    n, some = data.draw(st.integers(1, 4)), st.integers(1, 6)
    rows, cache = [[] for _ in range(n)], KVCache(model.config, n, 64)
    for call in range(data.draw(st.integers(1, 6))):
        T = data.draw(some)
        new = ids_of(model, n, T, seed=call)
        logits = model(new, cache=cache)
        rows = [row + ids.tolist() for row, ids in zip(rows, new)]
        for row, ours in zip(rows, logits):
            same(ours, model(torch.tensor([row]))[0, -T:])
        if data.draw(st.booleans()):
            keep = [data.draw(st.integers(0, len(row))) for row in rows]
            cache.truncate(keep)
            rows = [row[:length] for row, length in zip(rows, keep)]
    assert cache.lengths.tolist() == [len(row) for row in rows]


def test_opening_a_model_imports_no_compiler(model, tmp_path):
    """torch._dynamo takes a second, and random numbers on the device meta would import it."""
    model.save(tmp_path)
    code = "import sys, model; model.Transformer.load(sys.argv[1]); sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True)


def test_a_full_cache_says_so_and_its_size_is_the_formula(model):
    c = model.config
    cache = KVCache(c, 2, 8)
    assert cache.k.nbytes == cache.v.nbytes == c.n_layer * c.n_kv_head * c.head_dim * 8 * 2 * 4
    model(ids_of(model, 2, 8), cache=cache)
    kept = cache.k.clone()
    with pytest.raises(ValueError, match="room for 8 tokens, not for 8 \\+ 1"):
        model(ids_of(model, 2, 1), cache=cache)
    with pytest.raises(ValueError, match="room for 8"):
        cache.reserve(1)
    assert torch.equal(cache.k, kept)
    cache.truncate([3, 5])
    model(ids_of(model, 2, 3), cache=cache)  # room again
    for lengths in ([7, 8], [-1, 3], [3], [1, 2, 3]):
        with pytest.raises(ValueError, match="cannot be truncated"):
            cache.truncate(lengths)


# --- kernels and compilation ---


@pytest.mark.parametrize("device", DEVICES)
def test_flash_attention_is_the_kernel_that_runs(model, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, ids = model.to(device, dtype), ids_of(model, 2, 16).to(device)
    backends = [SDPBackend.FLASH_ATTENTION] if device == "cpu" else [SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # or an error: there is no kernel
        model.loss(ids, ids).backward()
        cache = KVCache(model.config, 2, 20, device, dtype)
        model(ids, cache=cache)
    with sdpa_kernel(backends):  # on CUDA flash attention takes no mask
        model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_compiles_to_one_graph(model, autocast):
    ids = ids_of(model, 40, 21)  # more than 512 rows: two pieces
    counter = CompileCounterWithBackend("aot_eager")
    options = dict(fullgraph=True, dynamic=False, backend=counter)
    compiled, results = torch.compile(model.summed_loss, **options), []
    for summed_loss in (compiled, model.summed_loss):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total, _ = summed_loss(ids[:, :-1], ids[:, 1:])
        (total / 800).backward()
        results.append((total, [p.grad for p in model.parameters()]))
    assert counter.frame_count == 1
    (ours, gradients), (eager, expected) = results
    assert ours.item() == pytest.approx(eager.item(), rel=1e-6)
    for gradient, p in zip(gradients, expected):
        assert relative_error(gradient, p) < (1e-2 if autocast else 1e-5)


@torch.no_grad()
def test_one_compiled_graph_serves_every_position(model):
    ids = ids_of(model, 3, 30)
    expected = model(ids)
    counter = CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    cache = KVCache(model.config, 3, 30)
    model(ids[:, :5], cache=cache)
    for t in range(5, 30):
        cache.reserve(1)
        same(step(ids[:, t : t + 1], cache=cache)[:, 0], expected[:, t])
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="room for 30"):
        cache.reserve(1)


# --- files ---


def test_equal_weights_are_equal_files(tmp_path, model):
    model.save(tmp_path / "a")
    Transformer.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_model_can_be_saved_over_the_file_that_it_reads(tmp_path, model):
    model.save(tmp_path)
    opened, ids = Transformer.load(tmp_path), ids_of(model, 1, 9)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        opened.model.norm.weight *= 2
    assert (tmp_path / "model.safetensors").read_bytes() == before  # it is read, never written to
    opened.save(tmp_path)
    assert torch.equal(opened(ids), Transformer.load(tmp_path)(ids))
    assert not torch.equal(opened(ids), model(ids))


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, model, tokenizer, monkeypatch):
    model.save(tmp_path, tokenizer)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.model.norm.weight *= 2

    def fail(folder):  # as on a full disk, after the weights
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(tokenizer, "save_pretrained", fail)
        model.save(tmp_path, tokenizer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "half.safetensors").write_bytes(b"left by a killed process")
    model.save(tmp_path, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
    assert (tmp_path / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_saved_folder_names_the_ids_that_end_a_text(tmp_path, model, tokenizer):
    end, chat_end = (tokenizer.special_tokens[name] for name in ("<|endoftext|>", "<|im_end|>"))
    for end_ids, expected in ((None, [end]), ([chat_end, end], [chat_end, end])):
        model.save(tmp_path, tokenizer, end_ids=end_ids)
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.eos_token_id == config.eos_token_id == expected
        assert theirs.pad_token_id == config.bos_token_id == expected[0]


def test_other_weights_than_the_models_own_can_be_saved(tmp_path, model):
    weights = {name: p.detach().to(torch.bfloat16) for name, p in model.state_dict().items()}
    model.save(tmp_path, weights=weights)
    opened = Transformer.load(tmp_path)
    assert all(torch.equal(p, weights[name]) for name, p in opened.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_compiled_model_is_saved_under_the_plain_names(tmp_path, model):
    torch.compile(model, backend="eager").save(tmp_path)
    assert Transformer.load(tmp_path).config == model.config


ANY = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        st.lists(st.integers(1, 4), max_size=3),
    ),
    min_size=1,
)


@given(ANY)
@settings(max_examples=50, deadline=None)
def test_the_official_library_reads_what_we_write_and_the_reverse(tmp_path_factory, shapes):
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    for write, read in (
        (save_safetensors, load_safetensors),
        (save_safetensors, lambda path: safetensors.torch.load_file(path)),
        (lambda path, tensors: safetensors.torch.save_file(tensors, path), load_safetensors),
    ):
        write(path, tensors)
        found = read(path)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_files_end_in_a_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    save_safetensors(path, {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16)})
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    junk = st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    )
    match data.draw(st.sampled_from(["bytes", "cut", "field", "entry", "header", "offsets"])):
        case "bytes":
            for _ in range(data.draw(st.integers(1, 8))):
                content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        case "field":
            header["a"][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(junk)
        case "entry":
            header["b"] = data.draw(junk)
        case "header":
            header = data.draw(junk)
        case "offsets":
            header["a"]["data_offsets"] = [data.draw(st.integers(-100, 100)) for _ in range(2)]
    if bytes(content) == path.read_bytes():
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    path.write_bytes(content)
    try:
        for tensor in load_safetensors(path).values():
            tensor.float().sum()  # whatever was accepted lies inside of the file
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "change",
    [{"shape": [-1]}, {"shape": [2**50, [None]]}, {"dtype": "I64"}, {"data_offsets": [0, 1000]}],
)
def test_an_entry_that_does_not_fit_is_shown(tmp_path, change):
    path = tmp_path / "a.safetensors"
    text = json.dumps({"odd": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]} | change}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    with pytest.raises(ValueError, match="odd: {.*does not fit the file"):
        load_safetensors(path)


def test_opening_takes_little_more_memory_than_the_model(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(50_000_000), "b": torch.ones(10_000_000)})
    program = f"""
import resource, model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(tensor.sum() for tensor in model.load_safetensors({str(tmp_path / "a.safetensors")!r}).values())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 / 240e6 * 2**20)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.2


# --- mistakes ---


def test_all_tensors_that_do_not_fit_are_listed(tmp_path, model):
    model.save(tmp_path)
    weights = read_weights(tmp_path)
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["model.layers.9.odd"] = torch.zeros(3)
    weights["model.embed_tokens.weight"] = torch.zeros(3, 32)
    save_safetensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(ValueError) as caught:
        Transformer.load(tmp_path)
    for part in (str(tmp_path), "layers.0.mlp.up_proj", "model.norm", "layers.9.odd", "[3, 32]", "[320, 32]"):
        assert part in str(caught.value)


def test_mistakes_are_named(tmp_path, model):
    with pytest.raises(ValueError, match="config.json"):
        Transformer.load(tmp_path)
    model.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors"):
        Transformer.load(tmp_path)
    for text in ("", "[1]", "{}", '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=str(tmp_path)):
            Transformer.load(tmp_path)
    with pytest.raises(ValueError, match="n_head 4 is not divisible by n_kv_head 3"):
        Config(vocab_size=10, n_head=4, n_kv_head=3)
    with pytest.raises(ValueError, match="qkv_bias .Qwen2. and qk_norm .Qwen3."):
        Config(vocab_size=10, qkv_bias=True, qk_norm=True)
    with pytest.raises(ValueError, match="rope_scaling {'factor': 8} needs rope_type, factor, low_freq"):
        Config(vocab_size=10, rope_scaling={"factor": 8})
    with pytest.raises(ValueError, match="n_embd 30 is not divisible by n_head 4"):
        Config(vocab_size=10, n_embd=30)
    with pytest.raises(ValueError, match="ids are from 3 to 320, but the vocabulary has 320"):
        model(torch.tensor([[3, 320]]))


def test_a_sequence_longer_than_in_training_is_allowed_and_said(model):
    with pytest.warns(UserWarning, match="more than 32 tokens"):
        model(ids_of(model, 1, 40))


# --- where tensors are created ---


class OnDevice(TorchDispatchMode):
    """Stands in for a GPU: a tensor on the device "meta" has a shape and no data.

    created: the functions of ours that create a tensor elsewhere, as "file: function"; waits: those that read
    one from the device, which gives ones (numbers) or zeros (tensors). Mixing the devices is an error.
    """

    def __init__(self):
        super().__init__()
        self.created, self.waits = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().split(".")[0]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x.is_meta for x in given]
        if any(on_device) and name in ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero"):
            self.waits.add(self.caller())
            return 0 if given[0].dtype == torch.bool else 1
        if name in ("aten::to", "aten::_to_copy"):
            if any(on_device) and str(kwargs.get("device")) == "cpu":
                self.waits.add(self.caller())
                return torch.zeros(given[0].shape, dtype=kwargs.get("dtype", given[0].dtype))
        elif name != "aten::copy_":
            assert all(on_device) or not any(on_device), f"{self.caller()}: {name} mixes devices"
        result = function(*args, **kwargs)
        created = not given or name == "aten::lift_fresh"  # from numbers, or from a numpy array
        if created and not all(x.is_meta for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            self.created.add(self.caller())
        return result

    def caller(self):
        """The innermost function of a stage."""
        frame = sys._getframe()
        while Path(frame.f_code.co_filename).parent not in (ROOT, ROOT / "data"):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}"


@pytest.fixture
def on_device(monkeypatch):
    """An OnDevice to be entered, and a model on its device in which every branch of model.py is taken."""
    make_generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: make_generator())
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    scaling = {name: LLAMA3[name] for name in ("rope_type", *stage.LLAMA3_SCALING)}
    special = dict(qk_norm=True, tie_embeddings=False, rope_scaling=scaling, dropout=0.1)
    config = Config(320, 32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64, **special)
    return OnDevice(), Transformer(config).to("meta")


def test_the_loss_and_its_gradients_create_tensors_on_the_models_device_alone(on_device):
    mode, model = on_device
    ids = torch.zeros(160, 32, dtype=torch.long, device="meta")  # more than 4,096 tokens: two pieces
    with mode:
        model.loss(ids, ids).backward()
    assert not mode.created and not mode.waits
    assert all(p.grad.is_meta for p in model.parameters())


def test_a_training_step_creates_tensors_on_the_models_device_alone_and_never_waits_for_it(on_device):
    mode, model = on_device
    batch = torch.zeros(4, 32, dtype=torch.long), torch.zeros(4, 32, dtype=torch.long)
    with mode:
        optimizers = make_optimizers(model, 0.03, 0.1, torch.float32)
        for _ in range(2):
            training_step(NextTokenLoss(model), optimizers, batch, 128, 1.0, make_settings(micro_batch=2))
    assert not mode.created and not mode.waits
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    assert states and all(tensor.is_meta for state in states for tensor in state.values())


def test_an_evaluation_creates_only_what_it_reads_and_its_sums_on_the_host(on_device):
    mode, model = on_device
    with mode:
        bits_per_byte(model, np.arange(320), np.ones(320, dtype=np.int64))
    assert mode.created == {"loader.py: validation_batches", "train.py: bits_per_byte"}


@pytest.mark.parametrize(
    "sampling",
    [dict(temperature=0), dict(top_k=9, top_p=0.5, unused_ids=[300, 301])],
)
def test_generate_creates_tensors_on_the_models_device_alone(on_device, sampling):
    mode, model = on_device
    prompts = [[1, 2, 3], [4]]
    with mode:
        steps = list(generate(model.eval(), prompts, 40, **sampling))  # past the context
        cache = make_cache(model, 2, 8)
        list(generate(model, prompts, 4, cache=cache, **sampling))
    assert len(steps) == 40 and len(steps[0]) == 2
    assert not mode.created


def test_a_tensor_that_is_created_on_the_host_is_noticed(on_device, monkeypatch):
    mode, model = on_device
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    arange = torch.arange
    for broken in (
        lambda *args, **kwargs: arange(*args),
        lambda *args, **kwargs: torch.from_numpy(np.arange(*args)),
        lambda *args, **kwargs: torch.tensor(list(range(*args))),
    ):
        monkeypatch.setattr(stage.torch, "arange", broken)
        with mode, pytest.raises(AssertionError, match="model.py: .* mixes devices"):
            model(ids)
        assert mode.created == {"model.py: hidden", "model.py: rope"}
