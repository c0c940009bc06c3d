"""What model.py promises: the arithmetic of Llama, an exact cache, files that the ecosystem opens."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from decoding import repeat
from model import PRESETS, Config, KVCache, Transformer, load_safetensors, rope, save_safetensors
from sample import generate
from train import make_optimizers

ROOT = Path(__file__).resolve().parent.parent
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=no_gpu)]


def ids_of(model, *shape, seed=0):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def deep(n_layer, **settings):
    """A fresh model, as training begins with it."""
    torch.manual_seed(0)
    return Transformer(Config(512, 64, n_layer, n_head=2, n_kv_head=1, n_embd=64, n_hidden=192, **settings))


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


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
        ("num_local_experts", 8), ("sliding_window", 4096), ("attention_multiplier", 0.5),
        ("quantization_config", {"bits": 4}), ("rope_type", "yarn"), ("partial_rotary_factor", 0.5),
        ("hidden_size", None), ("num_hidden_layers", "two"), ("num_key_value_heads", 3), ("factor", None),
    ],
)  # fmt: skip
def test_a_config_of_another_arithmetic_is_refused_by_the_name_of_the_field(tmp_path, field, value):
    peer("Llama 3.1").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"use_sliding_window": True}
    inside = settings["rope_parameters"] if field in settings["rope_parameters"] else settings
    inside[field] = value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ours = {"hidden_size": "hidden_size", "num_hidden_layers": "n_layer", "num_key_value_heads": "n_kv_head"}
    with pytest.raises(ValueError, match=ours.get(field, field)):
        Transformer.load(tmp_path)


def test_a_sliding_window_is_refused_only_where_it_is_active(tmp_path):
    for name, said, active in (
        ("Mistral", {"sliding_window": 16}, True),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": True}, True),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 2}, False),
    ):
        peer(name).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
        if active:
            with pytest.raises(ValueError, match="sliding_window 16 is not supported"):
                Transformer.load(tmp_path)
        else:
            Transformer.load(tmp_path)


def test_what_some_files_carry_along_is_passed_over(tmp_path):
    peer("Llama, tied").save_pretrained(tmp_path)
    ours, weights = Transformer.load(tmp_path), load_safetensors(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_safetensors(tmp_path / "model.safetensors", weights)
    ids = ids_of(ours, 1, 9)
    assert torch.equal(Transformer.load(tmp_path)(ids), ours(ids))


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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy(model, tied, recompute):
    model.config.recompute = recompute
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
        total = model.loss(ids, targets, reduction="sum")
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


def test_targets_of_another_length_and_unknown_reductions_are_refused(model):
    ids = ids_of(model, 8, 9)
    with pytest.raises((ValueError, RuntimeError)):
        model.loss(ids, ids_of(model, 90, 9))
    with pytest.raises(KeyError):
        model.loss(ids, ids, reduction="none")


def test_recomputing_keeps_less(model):
    kept = {}
    ids = ids_of(model, 8, 32)
    for recompute in (False, True):
        model.config.recompute, sizes = recompute, []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x
        ):
            model.loss(ids, ids)
        kept[recompute] = sum(sizes)
    assert kept[True] < kept[False] / 2


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
    for n_layer in (2, 48):
        model = deep(n_layer)
        optimizers = make_optimizers(model, lr=0.03, weight_decay=0.1)
        order = torch.randperm(512)
        with torch.no_grad():
            before[n_layer] = spread(model, ids_of(model, 4, 64))
        for step in range(20):
            ids = ids_of(model, 4, 65, seed=step)
            ids[:, 1::2] = order[ids[:, :-1:2]]  # half of the tokens can be learned
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            after[n_layer] = spread(model, ids)
    assert before[2] == pytest.approx(before[48], rel=0.05)
    assert 0.5 < after[48] / after[2] < 2 and after[2] > 10 * before[2]


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
    vocab_sizes = {"nano": 1024, "micro": 4096, "small": 50304, "medium": 50304, "large": 50304}
    sizes = [Config(V, **PRESETS[name]).num_params() for name, V in vocab_sizes.items()]
    assert [round(size / 1e6) for size in sizes] == [2, 15, 124, 354, 808]  # millions


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
        if n < 3 and data.draw(st.booleans()):
            cache, rows, n = repeat(cache, 2), [row for row in rows for _ in range(2)], 2 * n
    assert cache.lengths.tolist() == [len(row) for row in rows]


def test_a_full_cache_says_so_and_its_size_is_the_formula(model):
    c = model.config
    cache = KVCache(c, 2, 8)
    assert cache.k.nbytes == cache.v.nbytes == c.n_layer * c.n_kv_head * c.head_dim * 8 * 2 * 4
    assert repeat(cache, 3).k.nbytes == 3 * cache.k.nbytes
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


@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step_compiles_to_one_graph(model, recompute):
    model.config.recompute = recompute
    ids = ids_of(model, 40, 21)
    counter = CompileCounter()
    loss = torch.compile(model.loss, fullgraph=True, backend=counter)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert counter.frame_count == 1
    assert loss.item() == pytest.approx(model.loss(ids[:, :-1], ids[:, 1:]).item(), rel=1e-6)


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


@pytest.mark.parametrize("change", [{"shape": [-1]}, {"dtype": "I64"}, {"data_offsets": [0, 1000]}])
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


# --- mistakes, and `python model.py DIR` ---


def test_all_tensors_that_do_not_fit_are_listed(tmp_path, model):
    model.save(tmp_path)
    weights = load_safetensors(tmp_path / "model.safetensors")
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


def test_the_command_says_what_a_folder_holds(tmp_path, model):
    model.save(tmp_path)
    command = [sys.executable, ROOT / "model.py"]
    said = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=True).stdout
    assert f"{model.config.num_params():,}" in said and "torch.float32" in said
    assert "embed_tokens  10,240" in said and "256 bytes per token" in said
    result = subprocess.run([*command, tmp_path / "missing"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
