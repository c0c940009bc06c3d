"""Memory: parameters, what training adds, caches, and what a machine can read in a second."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from model import PRESETS, Config, KVCache, Transformer
from sample import generate, make_cache, prefill
from train import make_optimizers

from .book import LLAMA_2_7B, LLAMA_3_8B, causal, drawn_model, largest, moved_by, places, table

TINYLLAMA = dict(vocab_size=32_000, n_embd=2048, n_layer=22, n_head=32, n_kv_head=4, n_hidden=5632)
QWEN_2 = dict(
    vocab_size=151_936, n_embd=896, n_layer=24, n_head=14, n_kv_head=2, n_hidden=4864, qkv_bias=True
)


def saved_for_backward(model, ids):
    """Bytes that autograd saves in a forward pass for the backward pass, besides the model's weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def record(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # which several tensors may share
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model.hidden(ids)
    return sum(storage.nbytes() for storage in storages.values())


def training_memory(config, tokens, width=4):
    """{what: bytes} that train.py needs, with `tokens` in a micro-batch.

    width: bytes of a number that goes into a matrix product: 4, or 2 in bfloat16.
    """
    C, F, L = config.n_embd, config.n_hidden, config.n_layer
    Q, KV = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    n, matrices = config.num_params(), L * (2 * C * (Q + KV) + 3 * C * F)
    norms = 4 * (2 * C + 2 * C)  # of two norms: what enters, and the same normalised, before the gain
    attention = 4 * (2 * Q + 2 * KV)  # q, k, v and the result
    products = width * (2 * C + Q + 4 * F)  # what enters the matrices and the gate
    activations = L * tokens * (norms + attention + products)
    if width == 2:  # autocast copies every matrix, and what q, k, v, gate and up read for each of them
        activations += 2 * (3 * C * L * tokens + matrices)
    moments = 4 * matrices + 8 * (n - matrices)  # Muon keeps one for each weight, AdamW two
    return {"weights": 4 * n, "gradients": 4 * n, "moments": moments, "activations": activations}


def test_the_number_of_parameters_follows_from_the_config():
    """How many parameters has a model, given its config.json?

    V C (twice, if not tied) + L (2 C H D + 2 C K D + 3 C F + 2 C) + C, plus Qwen2's biases: with V tokens,
    width C, L layers, H heads, K heads of keys and values, both of width D, and an MLP of width F. Besides
    norms and biases all are matrices; RoPE adds none.

    Often told: 12 L C^2. That is GPT-2's: an MLP of two matrices of 4 C, and as many key as query heads.
    Code: model.py Config.num_params
    Source: the config.json and the published sizes of these models
    """
    known = {
        "Llama 2 7B": (LLAMA_2_7B, False, 6_738_415_616),
        "Llama 3 8B": (LLAMA_3_8B, False, 8_030_261_248),
        "TinyLlama 1.1B": (TINYLLAMA, False, 1_100_048_384),
        "Qwen2 0.5B": (QWEN_2, True, 494_032_768),
    }
    rows = []
    for name, (shape, tied, published) in known.items():
        config = Config(**shape, tie_embeddings=tied)
        with torch.device("meta"):  # shapes without memory
            model = Transformer(config)
        rows.append((name, published, config.num_params(), sum(p.numel() for p in model.parameters())))
    table("model | published | by the formula | by counting", *rows)
    assert all(row[1] == row[2] == row[3] for row in rows)


def test_full_fine_tuning_needs_sixteen_bytes_per_parameter():
    """How much memory does training all weights take?

    With AdamW in float32: weights 4, gradients 4, two moments 8, together 16 bytes per parameter (Muon has
    one moment); in mixed precision with 16-bit weights 2 + 2 + 4 (their float32 copy) + 8, which is 16 again.
    Activations come on top.

    Often told: four times the model. Four times its size in float32, eight times its size in 16 bits.
    Code: train.py make_optimizers
    Source: Rajbhandari et al. (2020, arXiv 1910.02054), sec. 3.1
    """
    model, ids = drawn_model(), torch.randint(64, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters())
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()

    def n_bytes(tensors):
        return sum(tensor.nbytes for tensor in tensors) / model.config.num_params()

    parameters = list(model.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    row = [n_bytes(parameters), n_bytes(p.grad for p in parameters), n_bytes(moments)]
    table("bytes per parameter: weights | gradients | moments | sum", (*row, sum(row)))
    n = Config(**LLAMA_2_7B, tie_embeddings=False).num_params()
    print(f"    Llama 2 7B: {16 * n / 1e9:.0f} GB to train it, {2 * n / 1e9:.1f} GB to run it in 16 bits")
    assert row == [4, 4, 8]


def test_activations_follow_from_the_config_and_the_number_of_tokens():
    """What else does training keep in memory, and how much of it?

    The tensors saved for the backward pass, called activations: what enters each norm and each matrix, and q,
    k and v. In float32 these are 24 C + 12 H D + 8 K D + 16 F bytes for each token and layer, F being the
    width of the MLP. They grow with the batch, and soon they are most of the memory. Products in 16 bits
    shrink them by less than half: norms and attention stay in float32, and casts leave copies. (T x T weights
    of attention and T x V scores of the vocabulary would come on top; attention in tiles and a loss in pieces
    avoid them.)

    Often told: memory is a multiple of the parameters.
    Code: train.py fit_micro_batch
    Source: Korthikanti et al. (2022, arXiv 2205.05198), sec. 4, count them for GPT-2's block
    """
    model = drawn_model(n_layer=4)
    ids, optimizers = torch.randint(64, (4, 33)), make_optimizers(model, 0.01, 0.1, torch.float32)
    activations = saved_for_backward(model, ids[:, :-1])
    with torch.autocast("cpu", torch.bfloat16):
        in_16_bits = saved_for_backward(model, ids[:, :-1])
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    measured = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "moments": sum(x.nbytes for state in states for x in state.values() if x.ndim),
        "activations": activations,
    }
    formula = training_memory(model.config, tokens=128)
    formula["activations in 16 bits"] = training_memory(model.config, tokens=128, width=2)["activations"]
    measured["activations in 16 bits"] = in_16_bits
    table("bytes of a tiny model and 128 tokens | by the formula | measured",
          *((name, formula[name], measured[name]) for name in measured))  # fmt: skip
    small = training_memory(Config(50_304, 1024, **PRESETS["small"]), tokens=8 * 1024)
    table("preset small, 8 blocks of 1,024 tokens | GB", *((name, n / 1e9) for name, n in small.items()))
    for name in ("weights", "gradients", "moments"):
        assert formula[name] == measured[name]
    for name in ("activations", "activations in 16 bits"):
        assert formula[name] == pytest.approx(measured[name], rel=0.1)
    assert small["activations"] > 5 * small["weights"]


def test_sharding_divides_what_every_process_would_hold_alike():
    """What are ZeRO and FSDP?

    N processes that train copies of one model all hold the same weights, gradients and moments. ZeRO 1 shards
    the moments: each process updates its share of the weights and sends it to the others. ZeRO 2 shards the
    gradients, too. ZeRO 3, which is FSDP, also shards the weights, and gathers those of a layer when it is
    computed. Of 16 bytes per parameter 8 + 8/N, 4 + 12/N and 16/N are left (here in float32; the paper has 16
    bits). The result is the same, since AdamW looks at each weight by itself; Muon needs whole matrices. ZeRO
    1 and 2 send as much as plain data parallelism, ZeRO 3 half as much again. Activations are not sharded.

    Often told: it splits the computation of a layer. That is tensor parallelism.
    Code: train.py parallel
    Source: Rajbhandari et al. (2020, arXiv 1910.02054), sec. 5 and 7
    """
    N, steps, texts = 4, 3, torch.randint(64, (3, 4, 2, 17))  # a step has 2 texts for each of 4 processes

    def mean_gradient(model, step):
        """The mean over all processes, as one vector."""
        gradients = []
        for ids in texts[step]:
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            of_process = torch.autograd.grad(loss, list(model.parameters()))
            gradients.append(parameters_to_vector(of_process))
        return torch.stack(gradients).mean(0)

    def adamw(weights):
        return torch.optim.AdamW([weights], lr=0.01, weight_decay=0.1)

    model = drawn_model()
    whole = parameters_to_vector(model.parameters()).detach()
    shards = [shard.clone() for shard in whole.chunk(N)]

    one = adamw(whole)
    for step in range(steps):
        vector_to_parameters(whole.clone(), model.parameters())
        whole.grad = mean_gradient(model, step)
        one.step()

    each = [adamw(shard) for shard in shards]
    for step in range(steps):
        vector_to_parameters(torch.cat(shards), model.parameters())  # all-gather
        gradients = mean_gradient(model, step).chunk(N)  # reduce-scatter: a process gets that of its shard
        for shard, gradient, optimizer in zip(shards, gradients, each):
            shard.grad = gradient
            optimizer.step()

    def per_parameter(weights, optimizer):
        moments = sum(x.nbytes for x in optimizer.state[weights].values() if x.ndim)
        return torch.tensor([weights.nbytes, weights.grad.nbytes, moments]) / len(whole)

    (w, g, m), (w_shard, g_shard, m_shard) = per_parameter(whole, one), per_parameter(shards[0], each[0])
    stages = {
        "0, which is DDP": (w, g, m),
        "1": (w, g, m_shard),
        "2": (w, g_shard, m_shard),
        "3, which is FSDP": (w_shard, g_shard, m_shard),
    }
    rows = [(name, *sizes, sum(sizes)) for name, sizes in stages.items()]
    table(f"ZeRO, {N} processes | bytes per parameter: weights | gradients | moments | sum", *rows)
    error = largest(torch.cat(shards) - whole)
    print(f"    largest difference of the weights after {steps} steps: {error:.0e}")
    assert error < 1e-6
    wanted = [16, 8 + 8 / N, 4 + 12 / N, 16 / N]
    assert [row[-1].item() for row in rows] == pytest.approx(wanted, rel=1e-3)


def test_the_bytes_of_a_kv_cache_follow_from_the_config():
    """Why does memory grow while a model writes?

    Each token leaves a key and a value in every layer: 2 L K D numbers. With 16 bits that is 512 KiB a token
    for Llama 2 7B, 2 GiB for 4,096 tokens; 128 KiB for Llama 3 8B with its 8 heads of keys and values.
    PyTorch keeps what is freed for later, so that tools still show it as used.

    Often told: it is a leak.
    Code: model.py KVCache
    Source: Shazeer (2019, arXiv 1911.02150); Pope et al. (2022, arXiv 2211.05102)
    """
    rows = []
    for name, shape in (("Llama 2 7B", LLAMA_2_7B), ("Llama 3 8B", LLAMA_3_8B)):
        config = Config(**shape, tie_embeddings=False)
        cache = KVCache(config, batch_size=1, max_len=4096, device="meta", dtype=torch.bfloat16)
        size = cache.k.nbytes + cache.v.nbytes
        per_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * 2
        rows.append((name, per_token // 1024, size / 2**30))
        assert size == 4096 * per_token
    table("model | KiB per token | GiB for 4,096 tokens", *rows)
    assert [row[1:] for row in rows] == [(512, 2), (128, 0.5)]


def test_cached_decoding_gives_the_same_scores_for_far_fewer_flops():
    """What does the KV cache save?

    Without it, T tokens cost 1 + 2 + ... + T token passes, with it T. Under a causal mask old keys and values
    never change, so that the scores are the same but for rounding. Old queries are not kept: no one needs
    them again. (The products of queries and keys are not counted below; they shrink even more.)

    Code: model.py KVCache.append
    Source: Vaswani et al. (2017), sec. 3.2.3, for the mask; measured
    """
    model, ids, T = drawn_model(), torch.randint(64, (1, 32)), 32
    cache = KVCache(model.config, batch_size=1, max_len=T)
    with torch.no_grad(), FlopCounterMode(display=False) as with_cache:
        cached = torch.cat([model(ids[:, t : t + 1], cache)[:, -1] for t in range(T)])
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        again = torch.cat([model(ids[:, : t + 1])[:, -1] for t in range(T)])
    rows = [("no", T * (T + 1) // 2, without.get_total_flops()), ("yes", T, with_cache.get_total_flops())]
    table("cache | token passes | FLOPs of the weight matrices", *rows)
    ratio = rows[0][2] / rows[1][2]
    print(f"    {ratio:.1f} times; largest difference in the scores: {largest(cached - again):.0e}")
    assert largest(cached - again) < 1e-4
    assert ratio == (T + 1) / 2


def test_fewer_bytes_help_because_decoding_waits_for_memory():
    """Is int8 faster than float16?

    For one stream, each weight is read for two FLOPs: one FLOP per byte in 16 bits, where processors could do
    tens (CPUs) or hundreds (GPUs). So time is bytes of weights over bandwidth, and fewer bytes help, if a
    kernel reads them as they are. LLM.int8 saves memory and may be slower. With large batches arithmetic
    decides. (This is computed, not timed; `python tests/bench.py sample` times it.)

    Often told: int8 is faster than float16.
    Code: sample.py PackedLinear
    Source: Pope et al. (2022), sec. 2; Williams et al. (2009) on the roofline; Dettmers et al. (2022, arXiv
    2208.07339) on the speed of LLM.int8
    """
    C, rows = 4096, []
    for B in (1, 8, 256, 2048):
        read = 2 * C * C + 2 * B * 2 * C  # a matrix, its input and output, in 16 bits
        rows.append((B, 2 * B * C * C / read))
    table("streams | FLOPs per byte read", *rows)
    bandwidth, flops, n = 2.0e12, 312e12, 6.74e9  # an A100, and a model of 7 billion parameters
    times = [(bits, 1e3 * max(bits / 8 * n / bandwidth, 2 * n / flops)) for bits in (16, 8, 4)]
    table("bits per weight | least time per token, ms", *times)
    assert rows[0][1] < 1.01 and rows[1][1] < flops / bandwidth < rows[2][1]
    assert times[0][1] == 2 * times[1][1] == 4 * times[2][1]


def test_micro_batches_and_recomputing_cut_activations_but_not_weights():
    """Training runs out of memory. What helps, and what does it cost?

    Activations grow with micro-batch, length and depth. Half the micro-batch and twice the accumulation gives
    the same gradient for the same arithmetic. Gradient checkpointing keeps only what enters a block and runs
    the block again in the backward pass: up to a third more arithmetic. Weights, gradients and moments don't
    depend on the batch.

    Often told: make the batch smaller. That is another optimisation; accumulation is not.
    Code: train.py fit_micro_batch
    Source: Chen et al. (2016, arXiv 1604.06174)
    """

    model, ids = drawn_model(n_layer=4), torch.randint(64, (8, 32))
    recomputing = copy.deepcopy(model)
    for block in recomputing.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def measure(model, B):
        """Bytes saved for the backward pass of B texts; FLOPs and the gradient of the embedding for all 8."""
        saved = saved_for_backward(model, ids[:B])
        with FlopCounterMode(display=False) as counter:
            for micro_batch in ids.split(B):
                model.hidden(micro_batch).sum().backward()
        weight = model.model.embed_tokens.weight
        gradient, weight.grad = weight.grad, None
        return saved, counter.get_total_flops(), gradient

    ways = {
        "8": measure(model, 8),
        "4, twice": measure(model, 4),
        "8, blocks recomputed": measure(recomputing, 8),
    }
    whole, halves, recomputed = ways.values()
    rows = [(way, *found[:2], largest(found[2] - whole[2])) for way, found in ways.items()]
    heads = "micro-batch | bytes saved for backward | FLOPs of the weight matrices | gradient differs by"
    table(heads, *rows)
    assert 1.8 < whole[0] / halves[0] < 2.1 and halves[1] == whole[1]
    assert whole[0] / recomputed[0] > 5 and 1.2 < recomputed[1] / whole[1] < 1.34
    assert max(row[3] for row in rows) < 1e-4 * largest(whole[2])


def test_paged_attention_is_a_way_to_allocate():
    """What is PagedAttention?

    The cache lies in blocks of fixed size, and a table for each sequence says which. Attention computes what
    it always does. What is wasted falls from (reserved - used) to less than a block for each sequence, and
    sequences with the same beginning can share blocks.

    Often told: only the scores of the current page are computed; it handles sequences larger than memory.
    Code: model.py KVCache
    Source: Kwon et al. (2023, arXiv 2309.06180), sec. 4
    """
    size, D, lengths = 16, 8, (37, 5, 150)
    pool, free, used = torch.zeros(2, 32, size, D), torch.randperm(32).tolist(), 0
    q = torch.randn(1, D)
    for length in lengths:
        k, v = torch.randn(2, length, D)
        blocks = [free.pop() for _ in range(math.ceil(length / size))]
        for i, block in enumerate(blocks):
            part = slice(i * size, min((i + 1) * size, length))
            pool[:, block, : part.stop - part.start] = torch.stack((k[part], v[part]))
        paged_k, paged_v = pool[:, blocks].flatten(1, 2)[:, :length]
        found = F.scaled_dot_product_attention(q, paged_k, paged_v)
        assert torch.equal(found, F.scaled_dot_product_attention(q, k, v))
        used += len(blocks) * size
    rows = [("pages of 16", used), ("256 reserved for each", 256 * len(lengths))]
    table("allocation | slots | share in use", *((name, slots, sum(lengths) / slots) for name, slots in rows))
    assert used - sum(lengths) < size * len(lengths)


def test_yoco_caches_keys_and_values_once():
    """What is YOCO?

    The lower half of the layers has a window or a state of constant size; its output gives one set of keys
    and values to which all upper layers attend. The part of the cache that grows is one layer instead of L.

    Often told: a "decoder-decoder" is an encoder-decoder. All of it is causal.
    Code: model.py KVCache.append
    Source: Sun et al. (2024, arXiv 2405.05254)
    """
    rows, L, window = [], 32, 1024
    for T in (1024, 32_768, 524_288):
        rows.append((T, L * T, L // 2 * min(window, T) + T, L * T / (L // 2 * min(window, T) + T)))
    table("tokens | positions cached by 32 layers | by YOCO | ratio", *rows)
    assert rows[-1][3] > 30
    to_k, to_v, *to_q = torch.randn(5, 64, 64) / 8

    def upper_layers(x):
        k, v, y = x @ to_k, x @ to_v, x  # once, for all of them
        for w in to_q:
            y = y + F.scaled_dot_product_attention(y @ w, k, v, attn_mask=causal(9))
        return y

    assert places(moved_by(upper_layers, torch.randn(1, 9, 64), 8) > 0) == [8]  # all of it is causal


def test_several_samples_of_one_prompt_share_its_reading():
    """Four samples of one prompt, or four requests: is there a difference?

    The keys and values of a prompt depend on nothing but the prompt. They are computed once and copied for
    each sample, so that only what is new is paid for four times. Serving programs share them between requests
    that begin alike.

    Code: sample.py prefill
    Source: Kwon et al. (2023, arXiv 2309.06180), sec. 4.4
    """
    model, prompt = drawn_model(), torch.randint(64, (200,)).tolist()
    with FlopCounterMode(display=False) as four_times:
        apart = list(generate(model, [prompt] * 4, max_new_tokens=8))
    with FlopCounterMode(display=False) as once, torch.inference_mode():
        read, cache = make_cache(model, 1, 208), make_cache(model, 4, 208)
        prefill(model, read, [prompt[:-1]])
        cache.k.copy_(read.k)
        cache.v.copy_(read.v)
        cache.lengths.copy_(read.lengths)
        cache.span = read.span
        shared = list(generate(model, [prompt[-1:]] * 4, max_new_tokens=8, cache=cache))
    flops = [counter.get_total_flops() for counter in (four_times, once)]
    head = "the prompt is read | FLOPs of the weight matrices, for 4 samples of 8 tokens"
    table(head, ("4 times", flops[0]), ("once", flops[1]))
    assert apart == shared
    assert flops[0] > 3 * flops[1]
