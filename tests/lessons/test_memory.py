"""Memory: parameters, what training adds, many devices, caches, and what a machine can read in a second."""

import copy
import io
import json
import math
from contextlib import redirect_stderr
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from finetune import add_lora
from model import MLP, PRESETS, Attention, Config, KVCache, Transformer, rope
from sample import answer_file, generate, make_cache, one_token, prefill, read_answers
from tokenizer import BYTES, SPECIAL_TOKENS, Tokenizer
from train import NextTokenLoss, make_optimizers, training_step

from .book import (
    LLAMA_2_7B,
    LLAMA_3_8B,
    SPEECH,
    bars,
    causal,
    drawn_model,
    forward,
    largest,
    moved_by,
    places,
    table,
    tiny_config,
)

TINYLLAMA = dict(vocab_size=32_000, n_embd=2048, n_layer=22, n_head=32, n_kv_head=4, n_hidden=5632)
QWEN_2 = dict(
    vocab_size=151_936, n_embd=896, n_layer=24, n_head=14, n_kv_head=2, n_hidden=4864, qkv_bias=True
)


def on_meta(**shape):
    """A model of shapes without memory, with a head of its own."""
    with torch.device("meta"):
        return Transformer(Config(**shape, tie_embeddings=False))


def n_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def moments_of(optimizer, p):
    """The running means that an optimizer keeps of a parameter's gradient."""
    return [x for x in optimizer.state[p].values() if x.ndim]


def saved_for_backward(model, function, *args):
    """Bytes that autograd saves in function(*args) for the backward pass, besides the model's weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def record(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # which several tensors may share
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        function(*args)
    return sum(storage.nbytes() for storage in storages.values())


def training_memory(config, n_tokens):
    """{what: bytes} that train.py needs in float32, with n_tokens in a micro-batch."""
    C, F, L = config.n_embd, config.n_hidden, config.n_layer
    Q, KV = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    n, matrices = config.num_params(), L * (2 * C * (Q + KV) + 3 * C * F)
    moments = 4 * matrices + 8 * (n - matrices)  # Muon keeps one for each weight, AdamW two
    activations = L * n_tokens * (24 * C + 12 * Q + 8 * KV + 16 * F)
    return {"weights": 4 * n, "gradients": 4 * n, "moments": moments, "activations": activations}


class PagedCache(KVCache):
    """A KV cache in blocks of `size` tokens: a pool shared by all rows, and a table of each row's blocks."""

    def __init__(self, config, lengths, size, n_blocks):
        super().__init__(config, batch_size=n_blocks, max_len=size)  # k, v (L, n_blocks, K, size, D)
        self.size, self.max_len = size, max(lengths)
        self.lengths = torch.zeros(len(lengths), dtype=torch.long)
        self.table = torch.zeros(len(lengths), math.ceil(max(lengths) / size), dtype=torch.long)
        free = (1 + torch.randperm(n_blocks - 1)).tolist()  # block 0 takes what pads the shorter rows
        for row, length in enumerate(lengths):
            for i in range(math.ceil(length / size)):
                self.table[row, i] = free.pop()

    def append(self, layer, positions, mask, k, v):
        blocks = self.table.gather(1, positions[:, 0] // self.size)[:, None]  # (B, 1, T)
        heads = torch.arange(k.size(1))[:, None]
        self.k[layer][blocks, heads, positions % self.size] = k
        self.v[layer][blocks, heads, positions % self.size] = v
        S = k.size(2) if mask is None else mask.size(-1)
        rows = [pool[layer][self.table].transpose(1, 2).flatten(2, 3) for pool in (self.k, self.v)]
        return rows[0][:, :, :S], rows[1][:, :, :S]


def in_int8(x, dim):
    """x, rounded to 8 bits: 255 levels with one scale for all numbers along `dim`."""
    scale = x.abs().amax(dim, keepdim=True) / 127
    return (x / scale).round() * scale


def test_the_number_of_parameters_follows_from_the_config():
    """How many parameters does a model have, given its config.json?

    V C (twice, if not tied) + L (2 C H D + 2 C K D + 3 C F + 2 C) + C, plus Qwen2's biases: with V tokens,
    width C, L layers, H heads, K heads of keys and values, both of width D, and an MLP of width F. Besides
    norms and biases all are matrices; RoPE adds none.

    Often told: 12 L C^2. That is for GPT-2: an MLP of two matrices, C by 4 C, as many key as query heads, and
    no embedding counted. It fits Llama 2 7B to 5 %, but Qwen2 0.5B has twice as many.
    Code: model.py Config.num_params
    Break: model.py Config.num_params: `3 * C * self.n_hidden` becomes `2 * C * self.n_hidden`
    Source: the config.json and the published sizes of these models
    问: 给定 config.json，如何算出模型的参数量？
    答: 参数量为 VC（不共享输入输出词嵌入时乘以 2）+ L(2CHD + 2CKD + 3CF + 2C) + C，Qwen2 还要加上 q、k、v 的
    偏置；除归一化权重和偏置外全是矩阵，RoPE 没有参数。常说的 12LC² 只适用于 GPT-2 的结构，而且没有计入词嵌
    入。
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
        counted = sum(p.numel() for p in model.parameters())
        rows.append((name, published, config.num_params(), counted, 12 * config.n_layer * config.n_embd**2))
    table("model | published | by the formula | by counting | 12 L C^2", *rows)
    assert all(row[1] == row[2] == row[3] for row in rows)
    assert abs(rows[0][4] / rows[0][1] - 1) < 0.05 and rows[3][1] > 2 * rows[3][4]


def test_training_with_adamw_takes_sixteen_bytes_per_parameter_and_with_muon_twelve():
    """How much memory does training all weights take?

    With AdamW in float32: weights 4, gradients 4, two moments 8, together 16 bytes per parameter. In mixed
    precision with 16-bit weights it is 2 + 2 + 4 (a float32 copy of the weights) + 8, which is 16 again.
    Muon, for the matrices of the blocks, keeps one moment, so 12 in float32. Activations come on top.

    Often told: four times the model. Four times its size in float32 is eight times its size in 16 bits.
    Code: train.py make_optimizers
    Break: train.py make_optimizers: `elif ".layers." not in name:` becomes `elif p.ndim == 2:`
    Source: Rajbhandari et al. (2020, arXiv 1910.02054), sec. 3.1; Jordan et al. (2024), "Muon"
    问: 全参数训练需要多少显存？
    答: float32 下用 AdamW，每个参数需要权重 4 字节、梯度 4 字节、一阶和二阶动量共 8 字节，合计 16 字节；混合
    精度是 2 + 2 + 4（float32 主权重）+ 8，同样是 16 字节。Muon（用于各块的矩阵）只有一个动量，float32 下是 12
    字节。激活值另算。
    """
    model, ids = drawn_model(), torch.randint(64, (2, 9))
    muon, adamw = make_optimizers(model, 0.01, 0.1, torch.float32)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    muon.step()
    adamw.step()
    embedding, matrix = model.model.embed_tokens.weight, model.model.layers[0].mlp.up_proj.weight

    in_16_bits = drawn_model().bfloat16()
    in_16_bits.loss(ids[:, :-1], ids[:, 1:]).backward()
    weight = in_16_bits.model.embed_tokens.weight
    float32_copy = weight.detach().float().requires_grad_()
    float32_copy.grad = weight.grad.float()  # only for as long as the step takes
    mixed = torch.optim.AdamW([float32_copy])
    mixed.step()

    ways = {
        "AdamW, float32: the embedding": (embedding, [], moments_of(adamw, embedding)),
        "AdamW, weights in 16 bits": (weight, [float32_copy], moments_of(mixed, float32_copy)),
        "Muon, float32: a matrix of the MLP": (matrix, [], moments_of(muon, matrix)),
    }
    rows = []
    for way, (p, copies, moments) in ways.items():
        sizes = [size / p.numel() for size in (p.nbytes, p.grad.nbytes, n_bytes(copies), n_bytes(moments))]
        rows.append((way, *sizes, sum(sizes)))
    table("bytes per parameter | weights | gradients | float32 copy | moments | sum", *rows)
    n = Config(**LLAMA_2_7B, tie_embeddings=False).num_params()
    print(f"    Llama 2 7B: {16 * n / 1e9:.0f} GB to train it, {2 * n / 1e9:.1f} GB to run it in 16 bits")
    assert [row[-1] for row in rows] == [16, 16, 12]


def test_activations_follow_from_the_config_and_the_number_of_tokens():
    """What else does training keep in memory, and how much of it?

    The tensors saved for the backward pass, called activations: what enters each norm, each matrix, SiLU and
    each elementwise product; and q, k, v and the output of attention. In float32 these are 24 C + 12 H D + 8
    K D + 16 F bytes for each token and layer, F being the width of the MLP. They grow with the batch, and
    soon they are most of the memory. Products in 16 bits save less than half of them: norms stay in float32,
    and casts leave copies. Without attention in tiles and a loss in pieces, T x T weights of each head and T
    x V scores come on top.

    Often told: the memory of training is a multiple of the parameters. That leaves out the activations.
    Code: model.py MLP.forward
    Break: model.py MLP.forward: `F.silu(self.gate_proj(x))` becomes `self.gate_proj(x).relu()`
    Source: Korthikanti et al. (2022, arXiv 2205.05198), sec. 4, count them for GPT-2's block
    问: 除了权重、梯度和优化器状态，训练时显存里还有什么？占多少？
    答: 还有为反向传播保存的激活值（归一化、矩阵、SiLU 和逐元素乘法的输入，以及注意力的 q、k、v 和输
    出）：float32 下每个词元、每层约 24C + 12HD + 8KD + 16F 字节。它不是参数量的固定倍数，而是随批大小、序列长
    度和层数增长，往往很快成为显存的大头。
    """
    model, ids = drawn_model(n_layer=4), torch.randint(64, (4, 33))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    activations = saved_for_backward(model, model.hidden, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        in_16_bits = saved_for_backward(model, model.hidden, inputs)
    with sdpa_kernel(SDPBackend.MATH):
        not_in_tiles = saved_for_backward(model, model.hidden, inputs)

    def plain_loss():
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    optimizers = make_optimizers(model, 0.01, 0.1, torch.float32)
    model.loss(inputs, targets).backward()
    for optimizer in optimizers:
        optimizer.step()
    measured = {
        "weights": n_bytes(model.parameters()),
        "gradients": n_bytes(p.grad for p in model.parameters()),
        "moments": sum(n_bytes(moments_of(opt, p)) for opt in optimizers for p in opt.state),
        "activations": activations,
    }
    formula = training_memory(model.config, n_tokens=128)
    whole_loss = saved_for_backward(model, plain_loss)
    rows = [(name, formula[name], measured[name]) for name in measured]
    rows += [("... products in 16 bits", "", in_16_bits), ("... attention not in tiles", "", not_in_tiles)]
    rows.append(("... with the loss in one piece", "", whole_loss))
    table("bytes of a tiny model and 128 tokens | by the formula | measured", *rows)
    small = Config(50_304, 1024, **PRESETS["small"])
    in_gb = {}
    for n in (1, 4, 8):
        name = "1 block" if n == 1 else f"{n} blocks"
        in_gb[name] = {what: size / 1e9 for what, size in training_memory(small, 1024 * n).items()}
    heads = "preset small, blocks of 1,024 tokens; GB of | weights | gradients | moments | activations"
    table(heads, *((name, *sizes.values()) for name, sizes in in_gb.items()))
    bars("Memory of training preset small, by blocks of 1,024 tokens in a micro-batch", "GB", in_gb)
    for name in ("weights", "gradients", "moments"):
        assert formula[name] == measured[name]
    assert formula["activations"] == pytest.approx(activations, rel=0.05)
    assert in_gb["8 blocks"]["activations"] > 5 * in_gb["8 blocks"]["weights"]
    assert activations / 2 < in_16_bits < activations
    B, T, H, L = 4, 32, model.config.n_head, model.config.n_layer
    assert not_in_tiles - activations > 0.9 * (4 * L * B * H * T * T)  # less what tiles keep
    assert whole_loss - activations > 4 * B * T * model.config.vocab_size


def test_micro_batches_and_recomputing_cut_activations_but_not_weights():
    """Training runs out of memory. What helps, and what does it cost?

    Activations grow with the micro-batch. Half the micro-batch and twice the accumulation gives the same
    gradient for the same arithmetic. Gradient checkpointing keeps only what enters a block and runs the block
    again in the backward pass: up to a third more arithmetic, and the same gradient. Weights, gradients and
    moments don't depend on the batch.

    Often told: make the batch smaller. That is another optimisation; accumulation is not.
    Code: train.py training_step
    Break: train.py training_step: `world / n_targets` becomes `world / n_targets / len(pieces)`
    Source: Chen et al. (2016, arXiv 1604.06174)
    问: 训练时显存不足怎么办？代价是什么？
    答: 减小 micro-batch 并增加梯度累积步数，梯度和计算量都不变；梯度检查点只保存每个块的输入，反向传播时重算
    该块，计算量最多增加三分之一。两者都只省激活值，不省权重、梯度和优化器状态。
    """
    model, ids = drawn_model(n_layer=4), torch.randint(64, (8, 33))
    recomputing = copy.deepcopy(model)
    for block in recomputing.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def measure(model, micro_batch):
        """Bytes saved in one micro-batch; FLOPs, norm and gradient of a step with 8 texts."""
        settings = SimpleNamespace(micro_batch=micro_batch, device="cpu", dtype="float32")
        saved = saved_for_backward(model, model.hidden, ids[:micro_batch, :-1])
        batch = ids[:, :-1], ids[:, 1:]
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            _, norm = training_step(NextTokenLoss(model), [], batch, batch[1].numel(), 1.0, settings)
        return saved, counter.get_total_flops(), norm, model.model.embed_tokens.weight.grad.clone()

    ways = {
        "8": measure(model, 8),
        "4, twice": measure(model, 4),
        "8, blocks recomputed": measure(recomputing, 8),
    }
    whole, halves, recomputed = ways.values()
    rows = [(way, *found[:3]) for way, found in ways.items()]
    table("micro-batch | bytes saved for backward | FLOPs of the matrices | norm of the gradient", *rows)
    assert 1.8 < whole[0] / halves[0] < 2.1 and halves[1] == whole[1]
    assert whole[0] / recomputed[0] > 5 and 1.2 < recomputed[1] / whole[1] < 4 / 3
    for found in (halves, recomputed):
        assert abs(found[2] / whole[2] - 1) < 1e-4
        assert torch.allclose(found[3], whole[3], atol=1e-5)


def test_frozen_weights_cost_two_bytes_and_in_qlora_about_half_a_byte():
    """What does it take to fine-tune a model of 7 billion parameters with LoRA or QLoRA?

    The frozen weights of LoRA cost 2 bytes each in 16 bits. Only the updates, at rank 16 with 0.6 % as many
    weights, cost the full 16 bytes. QLoRA holds the frozen matrices of the blocks in 4 bits and their scales
    in 8, which is 4.127 bits per weight; embedding and head keep their 16. For Llama 2 7B: 108, 14 and 4.5
    GB. Activations come on top in all three.

    Often told: LoRA needs less memory because its matrices are small. They come on top; what is saved is
    gradients and moments of the frozen weights.
    Code: finetune.py add_lora
    Break: finetune.py add_lora: `model.requires_grad_(False)` becomes `model.requires_grad_(True)`
    Source: Hu et al. (2021, arXiv 2106.09685), sec. 4.2; Dettmers et al. (2023, arXiv 2305.14314), sec. 3
    问: 微调 7B 模型，全参数、LoRA、QLoRA 各需要多少显存？
    答: 以 Llama 2 7B 为例，不计激活值：全参数每个参数 16 字节，约 108 GB；LoRA 的冻结权重每个 2 字节，只有适
    配器（r = 16 时约占 0.6%）需要 16 字节，约 14 GB；QLoRA 把各层的冻结矩阵压到每个权重约 4.127 比特，约 4.5
    GB。
    """

    def in_nf4(n):
        """Bytes of n weights: 4 bits each, 8 for the scale of 64 of them, 32 for the scale of 256 scales."""
        return n / 2 + n / 64 + 4 * n / (64 * 256)

    def memory(model, quantised):
        """Bytes of the frozen weights, and of those that learn with their gradients and moments."""
        frozen = learned = 0
        for name, p in model.named_parameters():
            if p.requires_grad:
                learned += 16 * p.numel()
            elif quantised and ".layers." in name and p.ndim == 2:
                frozen += in_nf4(p.numel())
            else:
                frozen += p.nbytes
        return frozen, learned

    full = on_meta(**LLAMA_2_7B).bfloat16()
    n = full.config.num_params()
    ways = {"all weights": memory(full, False)}
    lora = add_lora(full, rank=16, alpha=16)
    ways |= {"LoRA, rank 16": memory(lora, False), "QLoRA, rank 16": memory(lora, True)}
    rows = [(way, frozen / n or "none", (frozen + learned) / 1e9) for way, (frozen, learned) in ways.items()]
    table("Llama 2 7B learns | bytes per frozen weight | GB in all", *rows)
    print(f"    updates of rank 16 have {ways['LoRA, rank 16'][1] / 16 / n:.2%} as many weights as the model")
    assert ways["all weights"] == (0, 16 * n)
    assert ways["LoRA, rank 16"] == (2 * n, 16 * 39_976_960)
    assert in_nf4(1) * 8 == pytest.approx(4.127, abs=1e-3) and 0.5 < rows[2][1] < 0.6
    assert [row[2] for row in rows] == pytest.approx([107.8, 14.1, 4.5], abs=0.06)


def test_sharding_divides_what_every_process_would_hold_alike():
    """What are ZeRO and FSDP?

    N processes that train copies of one model all hold the same weights, gradients and moments. ZeRO 1 shards
    the moments (in mixed precision with the float32 copy): each process updates its share of the weights and
    sends it to the others. ZeRO 2 also shards the gradients, and ZeRO 3, which is FSDP, the weights: those of
    a layer are gathered when it is computed. Of 16 bytes per parameter 8 + 8/N, 4 + 12/N and 16/N are left in
    float32, and 4 + 12/N, 2 + 14/N and 16/N in mixed precision. The result is the same with AdamW, which
    looks at each weight by itself; Muon needs whole matrices. ZeRO 1 and 2 send as much as plain data
    parallelism (DDP), ZeRO 3 half as much again; activations are not sharded.

    Often told: ZeRO shards the optimizer's state alone. That is stage 1. Or: it splits the computation of a
    layer. That is tensor parallelism.
    Compare: train.py parallel: data parallelism, where every process holds everything
    Source: Rajbhandari et al. (2020, arXiv 1910.02054), fig. 1, sec. 5 and 7
    问: ZeRO 和 FSDP 是什么？三个阶段各省多少？
    答: 数据并行中 N 个进程各存一份相同的权重、梯度和优化器状态，ZeRO 把它们分片：阶段 1 分优化器状态，阶段 2
    再分梯度，阶段 3（即 FSDP）连权重也分，用到某层时再收集。混合精度下每个参数的 16 字节依次降为 4 + 12/N、2
    + 14/N、16/N；激活值不分片。
    """
    N, texts = 4, torch.randint(64, (3, 4, 2, 17))  # 3 steps, each with 2 texts for each of 4 processes
    model = drawn_model()
    start = parameters_to_vector(model.parameters()).detach()

    def gradient_of_process(ids):
        gradients = torch.autograd.grad(model.loss(ids[:, :-1], ids[:, 1:]), list(model.parameters()))
        return parameters_to_vector(gradients)

    def train_shards(n):
        """Train all weights as n shards, each with a gradient and an AdamW of its own."""
        shards = [shard.clone() for shard in start.chunk(n)]
        optimizers = [torch.optim.AdamW([shard], lr=0.01, weight_decay=0.1) for shard in shards]
        for step in texts:
            vector_to_parameters(torch.cat(shards), model.parameters())  # all-gather
            mean = torch.stack([gradient_of_process(ids) for ids in step]).mean(0)
            for shard, gradient, optimizer in zip(shards, mean.chunk(n), optimizers):  # reduce-scatter
                shard.grad = gradient
                optimizer.step()
        moments = n_bytes(moments_of(optimizers[0], shards[0]))
        sizes = (shards[0].nbytes, shards[0].grad.nbytes, moments)
        return torch.cat(shards), [size / len(start) for size in sizes]

    def stages(whole, shard):
        """What a process holds of weights, gradients and moments, given the sizes of all and of a shard."""
        return {
            "none (DDP)": whole,
            "ZeRO 1": (*whole[:2], shard[2]),
            "ZeRO 2": (whole[0], *shard[1:]),
            "ZeRO 3 (FSDP)": shard,
        }

    (weights, whole), (sharded, shard) = train_shards(1), train_shards(N)
    rows = [(name, *sizes, sum(sizes)) for name, sizes in stages(whole, shard).items()]
    table(f"{N} processes, bytes per parameter | weights | gradients | moments | sum", *rows)
    of_paper = stages((15, 15, 90), (15 / 64, 15 / 64, 90 / 64))  # GB; the 90 are moments and float32 copy
    in_gb = [(name, sum(sizes)) for name, sizes in of_paper.items()]
    table("7.5 billion parameters in 16 bits, 64 GPUs | GB for each", *in_gb)
    assert largest(sharded - weights) < 1e-5 < 1e-3 < largest(weights - start)
    wanted = [16, 8 + 8 / N, 4 + 12 / N, 16 / N]
    assert [row[-1] for row in rows] == pytest.approx(wanted, rel=1e-3)
    assert [gb for _, gb in in_gb] == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_matrices_split_by_columns_then_rows_need_one_sum():
    """How is a block computed by several devices at once (tensor parallelism)?

    The first matrix of a pair is split by its outputs (the columns, in x W), the second by its inputs (rows).
    Between them nothing mixes the parts: SiLU and the gate act on each channel by itself, attention on each
    head. So each device computes its share alone, and one sum over the devices (all-reduce) gives the result:
    two sums for a block going forward. A query head must stay with the keys and values of its group.

    Often told: cut every matrix into equal halves. A fused matrix of q, k and v, cut in the middle, may leave
    one device with nothing but queries.
    Code: model.py MLP.forward
    Break: model.py MLP.forward: `F.silu(self.gate_proj(x))` becomes `self.gate_proj(x).softmax(-1)`
    Source: Shoeybi et al. (2019, arXiv 1909.08053), sec. 3
    问: 张量并行如何切分一个 Transformer 块？GQA 有什么陷阱？
    答: 成对的两个矩阵中，第一个按输出（列）切，第二个按输入（行）切，各设备独立计算，最后一次 all-reduce 求和
    即与不切分时完全相同，每个块前向只需两次。注意力按头切，查询头必须与它所在组的键值头分到同一设备。
    """
    config = tiny_config()  # 4 query heads of width 16, two for each head of keys and values
    block = drawn_model().model.layers[0]
    x, (cos, sin) = torch.randn(1, 10, 64), rope(torch.arange(10), config, torch.float32)

    def half_of_mlp(rows):
        half = MLP(tiny_config(n_hidden=len(rows)))
        half.gate_proj.weight.data = block.mlp.gate_proj.weight[rows]
        half.up_proj.weight.data = block.mlp.up_proj.weight[rows]
        half.down_proj.weight.data = block.mlp.down_proj.weight[:, rows]
        return half(x)

    def half_of_attention(query_heads, kv_head):
        half, whole = Attention(tiny_config(n_head=2, n_kv_head=1, head_dim=16)), block.self_attn
        rows = torch.arange(64).view(4, 16)[query_heads].flatten()
        half.q_proj.weight.data = whole.q_proj.weight[rows]
        half.k_proj.weight.data = whole.k_proj.weight.view(2, 16, 64)[kv_head]
        half.v_proj.weight.data = whole.v_proj.weight.view(2, 16, 64)[kv_head]
        half.o_proj.weight.data = whole.o_proj.weight[:, rows]
        return half(x, cos, sin)

    mlp = half_of_mlp(range(96)) + half_of_mlp(range(96, 192))
    groups = half_of_attention([0, 1], 0) + half_of_attention([2, 3], 1)
    in_turn = half_of_attention([0, 2], 0) + half_of_attention([1, 3], 1)
    attention = block.self_attn
    whole = attention(x, cos, sin)
    errors = [largest(mlp - block.mlp(x)), largest(groups - whole), largest(in_turn - whole)]
    names = ("MLP, halves of its width", "attention, by groups", "attention, heads dealt in turn")
    table("split in two | the sum differs by", *((name, round(e, 4)) for name, e in zip(names, errors)))
    assert errors[0] < 1e-4 and errors[1] < 1e-4 and errors[2] > 0.1
    fused = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
    assert torch.equal(fused.chunk(2)[0], attention.q_proj.weight)  # half of it has no key and no value


def test_copies_keep_every_device_busy_and_a_model_split_by_layers_keeps_one(tmp_path, monkeypatch):
    """Eight devices: eight copies of a model, or one model split by layers?

    Copies, if the model fits into one device: each answers its share of the prompts, and none waits. Split by
    layers, a batch goes from device to device, so that one of the n devices works at a time. A pipeline of m
    micro-batches keeps m / (m + n - 1) of them busy. Splitting by layers is for models that are too large for
    one device.

    Often told: a model spread over eight devices is eight times as fast. Split by layers, it has eight times
    the room.
    Code: sample.py answer_file
    Break: sample.py answer_file: `list(records)[rank::world]` becomes `list(records)[rank:]`
    Source: Huang et al. (2019, arXiv 1811.06965), on the bubble of a pipeline
    问: 有八张卡，是部署八份完整模型，还是把一个模型按层切到八张卡上？
    答: 只要单卡放得下，就部署八份，各处理一部分数据，没有卡空等。按层切分时一个批次逐卡传递，同一时刻只有 1/n
    的卡在工作；用 m 个 micro-batch 做流水线，利用率为 m/(m + n − 1)。按层切分解决的是放不下的问题，而不是速度
    问题。
    """
    n, n_prompts = 8, 24
    model = drawn_model(n_layer=n, vocab_size=len(BYTES) + len(SPECIAL_TOKENS))
    ids = torch.randint(64, (n_prompts, 12))

    def pipeline(m):
        """The share of busy devices, if each has one block and takes one micro-batch in a slot of time."""
        cos, sin = rope(torch.arange(12), model.config, torch.float32)
        x = list(model.model.embed_tokens(ids).chunk(m))
        slot = busy = done = 0
        while done < m:
            for device, block in enumerate(model.model.layers):
                i = slot - device  # the micro-batch that the device before had in the slot before
                if 0 <= i < m:
                    x[i] = block(x[i], cos, sin)
                    busy += 1
                    if device == n - 1:
                        done += 1
            slot += 1
        assert torch.allclose(model.head(model.model.norm(torch.cat(x))), model(ids), atol=1e-4)
        return busy / (n * slot)

    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(n_prompts)))
    tokenizer = Tokenizer.train([SPEECH], vocab_size=model.config.vocab_size)
    monkeypatch.setenv("WORLD_SIZE", str(n))
    n_answered = [0]
    for rank in range(n):  # what torchrun starts at the same time
        monkeypatch.setenv("RANK", str(rank))
        with redirect_stderr(io.StringIO()):
            answer_file(model, tokenizer, prompts, output, 16, (), seed=0, max_new_tokens=2)
        n_answered.append(len(read_answers(output)))
    shares = torch.tensor(n_answered).diff()
    copies = shares.sum().item() / (n * shares.max().item())
    rows = [(f"split by layers, m = {m}", pipeline(m), m / (m + n - 1)) for m in (1, 8, 24)]
    table("8 devices, 24 prompts | share of busy devices | m / (m + n - 1)", ("8 copies", copies, ""), *rows)
    assert shares.tolist() == [n_prompts // n] * n and copies == 1
    lines = output.read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == list(range(1, n_prompts + 1))
    for _, busy, formula in rows:
        assert busy == pytest.approx(formula)
    assert rows[0][1] == 1 / n


def test_training_costs_six_flops_per_parameter_and_token():
    """How much arithmetic does it take to train a model?

    Forward, each weight of a matrix costs 2 FLOPs per token, a product and a sum. Backward costs twice as
    much: the gradient of a matrix's input and that of the matrix. So N parameters and n tokens take 6 N n
    FLOPs, where N leaves out an embedding that is only looked up. Scores and averages of attention add 12 L H
    D T per token of a text of T tokens, if masked scores count, too.

    Often told: a product and a sum are one operation. Then all is half as much; data sheets count two.
    Code: model.py Config.flops_per_token
    Break: model.py Config.flops_per_token: `return 2 * n_multiplied` becomes `return n_multiplied`
    Source: Kaplan et al. (2020, arXiv 2001.08361), sec. 2.1; Chowdhery et al. (2022), app. B
    问: 训练一个模型需要多少计算量？6ND 是怎么来的？
    答: 前向时每个参数对每个词元做一次乘法和一次加法，共 2 FLOPs；反向要算对输入和对权重的两个梯度，是前向的两
    倍，合计 6 FLOPs，因此 N 个参数、D 个词元约需 6ND（N 不含只做查表的词嵌入）。注意力分数每个词元另加
    12·L·H·d·T（d 为每个头的宽度，含被掩码的部分）。
    """
    T, model = 32, Transformer(tiny_config(n_layer=4, tie_embeddings=False))
    ids = torch.randint(64, (2, T + 1))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    N = sum(p.numel() for p in matrices)

    def flops_per_token(learning):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learning):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            if learning:
                loss.backward()
        return counter.get_total_flops() / (2 * T)

    config = model.config
    rows = [("forward", flops_per_token(False), config.flops_per_token(0))]
    rows.append(("forward and backward", flops_per_token(True), 3 * config.flops_per_token(0)))
    with sdpa_kernel(SDPBackend.MATH):  # as plain products, since fused attention is counted as nothing
        rows.append(("... with attention's scores", flops_per_token(True), 3 * config.flops_per_token(T)))
    rows = [(name, counted, counted / N, formula) for name, counted, formula in rows]
    table("FLOPs per token | counted | per weight | by Config.flops_per_token, norms included", *rows)
    L, H, D = config.n_layer, config.n_head, config.head_dim
    assert [row[1] for row in rows] == [2 * N, 6 * N, 6 * N + 12 * L * H * D * T]
    for _, counted, _, formula in rows:
        assert formula == pytest.approx(counted, rel=0.01)


def test_the_bytes_of_a_kv_cache_follow_from_the_config():
    """How large is a KV cache, and why does memory grow while a model writes?

    Each token leaves a key and a value in every layer: 2 L K D numbers. With 16 bits that is 512 KiB a token
    for Llama 2 7B, 2 GiB for 4,096 tokens; 128 KiB for Llama 3 8B with its 8 heads of keys and values. With
    one head it would be 16 KiB. Programs that do not reserve the cache at once grow with the text, and on a
    GPU PyTorch keeps freed memory for later, so that tools show it as used.

    Often told: it is a leak.
    Code: model.py KVCache
    Break: model.py KVCache.__init__: `config.n_kv_head` becomes `config.n_head`
    Source: Shazeer (2019, arXiv 1911.02150); Pope et al. (2022, arXiv 2211.05102)
    问: KV 缓存占多少显存？为什么生成时显存不断增长？
    答: 每个词元在每层留下一个 K 和一个 V，共 2LKD 个数：16 位时 Llama 2 7B 每个词元 512 KiB，4096 个词元 2
    GiB；Llama 3 8B 用 GQA（8 个键值头），降到 128 KiB。增长的是缓存，不是内存泄漏；PyTorch 还会留着已释放的显
    存，工具显示的数值因此偏大。
    """
    shapes = {
        "Llama 2 7B": LLAMA_2_7B,
        "Llama 3 8B": LLAMA_3_8B,
        "the same with 1": LLAMA_3_8B | {"n_kv_head": 1},
    }
    rows = []
    for name, shape in shapes.items():
        config = Config(**shape)
        cache = KVCache(config, batch_size=1, max_len=4096, device="meta", dtype=torch.bfloat16)
        size = n_bytes((cache.k, cache.v))
        rows.append((name, config.n_kv_head, size / 4096 / 2**10, size / 2**30))
        assert size == 4096 * 2 * config.n_layer * config.n_kv_head * config.head_dim * 2
    table("model | heads of keys and values | KiB per token | GiB for 4,096 tokens", *rows)
    names = ("multi-head", "grouped-query", "multi-query")
    groups = {f"{name} (K = {row[1]})": {"KiB": row[2]} for name, row in zip(names, rows)}
    bars("KV cache per token: 32 layers, 32 query heads of width 128, 16 bits", "KiB", groups)
    assert [row[2:] for row in rows] == [(512, 2), (128, 0.5), (16, 0.0625)]


def test_cached_decoding_gives_the_same_scores_for_far_fewer_flops():
    """What does the KV cache save?

    Without it, T tokens cost 1 + 2 + ... + T token passes, with it T. Under a causal mask old keys and values
    never change, so that the scores are the same but for rounding. Old queries are not kept: no one needs
    them again. (The products of queries and keys are not counted here; they shrink even more.)

    Code: model.py KVCache.begin
    Break: model.py KVCache.begin: `self.lengths += T` becomes `self.lengths += 0`
    Source: Vaswani et al. (2017), sec. 3.2.3, for the mask; measured
    问: KV 缓存省了什么？为什么不缓存 Q？
    答: 没有缓存时生成 T 个词元要计算 1 + 2 + … + T 次词元前向，有缓存时只要 T 次；因果掩码保证旧的 K、V 不再
    变化，所以结果相同。旧的 Q 以后不会再用到，不必缓存。
    """
    model, ids, T = drawn_model(), torch.randint(64, (1, 16)), 16
    cache = KVCache(model.config, batch_size=1, max_len=T)
    with torch.no_grad(), FlopCounterMode(display=False) as with_cache:
        cached = torch.cat([model(ids[:, t : t + 1], cache)[:, -1] for t in range(T)])
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        again = torch.cat([model(ids[:, : t + 1])[:, -1] for t in range(T)])
    rows = [("no", T * (T + 1) // 2, without.get_total_flops()), ("yes", T, with_cache.get_total_flops())]
    table("cache | token passes | FLOPs of the weight matrices", *rows)
    ratio = rows[0][2] / rows[1][2]
    print(f"    {ratio:.1f} times; the scores differ by {largest(cached - again):.4f}")
    assert largest(cached - again) < 1e-4
    assert ratio == (T + 1) / 2


def test_a_sliding_window_bounds_the_cache_and_depth_widens_the_view():
    """What does a sliding window do?

    Each token sees the last W tokens, itself included, so that a cache of W tokens suffices, however long the
    text. Through L layers the view reaches L (W - 1) tokens back, since each layer reads what the one below
    has gathered. What is further away cannot change the scores at all.

    Often told: W tokens are all that the model can know. That is one layer.
    Code: model.py Attention.forward
    Break: model.py Attention.forward: `attn_mask=mask` becomes `attn_mask=None`
    Source: Beltagy et al. (2020, arXiv 2004.05150), sec. 3.1; Jiang et al. (2023, arXiv 2310.06825), sec. 2
    问: 滑动窗口注意力有什么用？信息能传多远？
    答: 每个词元只看包括自己在内的最近 W 个词元，所以缓存只需 W 个位置，与文本长度无关；信息可以逐层传递，L 层
    最远能看到前面 L(W − 1) 个词元，更远的内容完全看不到。
    """
    T, W, ids = 24, 4, torch.randint(64, (1, 24))
    window = causal(T) & ~causal(T).tril(-W)

    def rolling(model):
        """Logits, token by token, with the last W keys and values of each layer; how many are kept."""
        kept, logits = {}, []

        def append(layer, k, v):
            if layer in kept:
                old_k, old_v = kept[layer]
                k, v = torch.cat((old_k, k), 2)[:, :, -W:], torch.cat((old_v, v), 2)[:, :, -W:]
            kept[layer] = k, v
            return k, v

        for t in range(T):
            cos, sin = rope(torch.tensor([t]), model.config, torch.float32)
            x = model.model.embed_tokens(ids[:, t : t + 1])
            all_kept = torch.ones(1, 1, 1, min(t + 1, W), dtype=torch.bool)
            for layer, block in enumerate(model.model.layers):
                x = block(x, cos, sin, all_kept, partial(append, layer))
            logits.append(model.head(model.model.norm(x)))
        return torch.cat(logits, 1), kept[0][0].size(2)

    rows = []
    for L in (1, 2, 3):
        model = drawn_model(n_layer=L)
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        logits = forward(model, x, window)
        logits[0, -1].sum().backward()
        first = places(x.grad[0].abs().sum(-1) > 0)[0]
        of_rolling, n_cached = rolling(model)
        rows.append((L, T - 1 - first, n_cached, round(largest(of_rolling - logits), 4)))
        assert largest(of_rolling - logits) < 1e-4
    table(f"layers, W = {W} | tokens back | tokens in the cache | scores differ by", *rows)
    assert [row[1] for row in rows] == [L * (W - 1) for L in (1, 2, 3)]
    assert all(row[2] == W for row in rows)


def test_yoco_caches_keys_and_values_once():
    """What is YOCO?

    The lower half of the layers has a window or a state of constant size; its output gives one set of keys
    and values, to which all upper layers attend. The part of the cache that grows is one layer instead of L.
    When a prompt is read, only its last position needs the upper half.

    Often told: a "decoder-decoder" is an encoder-decoder. All of it is causal.
    Compare: model.py KVCache.append: every layer has keys and values of its own
    Source: Sun et al. (2024, arXiv 2405.05254)
    问: YOCO 是什么？为什么省 KV 缓存？
    答: YOCO 的下半部分用滑动窗口等缓存大小固定的注意力，其输出只生成一组 K、V，供上半部分所有层共用，因此随长
    度增长的缓存从 L 层变成 1 层；预填充时除最后一个位置外，提示词只需经过下半部分。整个模型都是因果的。
    """
    T, window = 12, causal(12) & ~causal(12).tril(-4)
    model = drawn_model(n_layer=4)
    cos, sin = rope(torch.arange(T), model.config, torch.float32)
    lower, upper = model.model.layers[:2], model.model.layers[2:]

    def read(x, last_alone=False):
        """x (1, T, C) -> the stream after the upper half, at all positions or at the last."""
        for block in lower:
            x = block(x, cos, sin, window[None, None])
        shared = {}  # the keys and values of the first upper layer, for all of them

        def append(k, v):
            return shared.setdefault("k and v", (k, v))

        upper[0].self_attn(upper[0].input_layernorm(x), cos, sin, None, append)
        begin = T - 1 if last_alone else 0
        x = x[:, begin:]
        for block in upper:
            x = block(x, cos[begin:], sin[begin:], causal(T)[None, None, begin:], append)
        return x

    x = torch.randn(1, T, 64)
    assert places(moved_by(read, x, T - 1) > 1e-6) == [T - 1]  # no position sees a later one
    assert torch.allclose(read(x, last_alone=True), read(x)[:, -1:], atol=1e-5)

    def gib(n_layer, n_tokens):
        config = Config(**LLAMA_3_8B | {"n_layer": n_layer})
        cache = KVCache(config, batch_size=1, max_len=n_tokens, device="meta", dtype=torch.bfloat16)
        return n_bytes((cache.k, cache.v)) / 2**30

    rows = []
    for n in (1024, 32_768, 524_288):
        usual, with_yoco = gib(32, n), gib(16, min(n, 1024)) + gib(1, n)
        rows.append((n, usual, with_yoco, usual / with_yoco))
    table("tokens | GiB of Llama 3 8B's cache | with YOCO and a window of 1,024 | ratio", *rows)
    assert rows[-1][3] > 30


def test_paged_attention_is_a_way_to_allocate():
    """What is PagedAttention?

    The cache lies in blocks of a fixed number of slots, one for each token, and a table for each sequence
    says which blocks are its own. Attention computes what it always does. What is wasted falls from (reserved
    - used) to less than a block for each sequence, and sequences with the same beginning can share blocks.

    Often told: only the scores of the current page are computed; it handles sequences larger than memory.
    Compare: model.py KVCache: reserves the full length of every row at once
    Source: Kwon et al. (2023, arXiv 2309.06180), sec. 4
    问: PagedAttention 是什么？
    答: 它是 KV 缓存的分配方式：缓存分成固定大小的块，用块表记录每个序列用了哪些块，计算结果与普通注意力完全相
    同；每个序列的浪费不到一个块，相同前缀还可以共享块。
    """
    size, n_new, context = 16, 8, 256
    model = drawn_model(block_size=context)
    prompts = [torch.randint(64, (n,)).tolist() for n in (37, 5, 150)]
    prompts[2][:32] = prompts[0][:32]  # they begin alike
    lengths = [len(prompt) + n_new for prompt in prompts]
    written = list(generate(model, prompts, max_new_tokens=n_new))
    assert len(written) == n_new
    slots = {"the whole context for each": context * len(lengths)}
    for way in ("blocks of 16", "... and the same 2 for the same beginning"):
        paged = PagedCache(model.config, lengths, size, n_blocks=32)
        if "same" in way:
            paged.table[2, :2] = paged.table[0, :2]
        assert list(generate(model, prompts, max_new_tokens=n_new, cache=paged)) == written
        slots[way] = size * len(paged.table[paged.table > 0].unique())
    rows = [(way, n, sum(lengths) / n) for way, n in slots.items()]
    table(f"3 sequences of {', '.join(map(str, lengths))} tokens have | slots | tokens per slot", *rows)
    print(f"    the blocks of the first: {' '.join(map(str, paged.table[0, :3].tolist()))}")
    assert 0 <= rows[1][1] - sum(lengths) < size * len(lengths)
    assert rows[2][1] == rows[1][1] - 2 * size


def test_several_samples_of_one_prompt_share_its_reading():
    """Four samples of one prompt, or four requests: is there a difference?

    The keys and values of a prompt depend on nothing but the prompt. They are computed once and copied for
    each sample, so that only what is new is paid for four times. Serving programs share them between requests
    that begin alike.

    Code: sample.py prefill
    Break: sample.py prefill: `[b + n for b, n in zip(before, lengths)]` becomes `lengths`
    Source: Kwon et al. (2023, arXiv 2309.06180), sec. 4.4
    问: 同一提示词采样四次，和发四个请求有区别吗？
    答: 有。提示词的 K、V 只取决于提示词本身，只需预填充一次，再由四个样本共用，只有新生成的部分才要算四次；推
    理服务的前缀缓存也是同样的道理。
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


def test_decoding_reads_every_weight_for_two_flops_per_stream():
    """Is int8 faster than float16?

    A step of decoding reads every matrix and does two FLOPs with each weight for every stream. For one stream
    in 16 bits that is one FLOP per byte, where processors could do tens (CPUs) or hundreds (GPUs). So a token
    takes at least the time to read all weights, and fewer bytes help, if a kernel reads them as they are.
    With many streams arithmetic decides, and int8 helps only if it is multiplied faster, too.

    Often told: int8 is always faster. LLM.int8() saves memory and may be slower than float16.
    Code: sample.py one_token
    Break: sample.py one_token: `ids[:, None]` becomes `ids[:, None].expand(-1, 2)`
    Source: Williams et al. (2009) on the roofline; Pope et al. (2022, arXiv 2211.05102), sec. 2; Dettmers et
    al. (2022, arXiv 2208.07339) on the speed of LLM.int8()
    问: int8 量化一定比 float16 快吗？
    答: 不一定。单路解码每步要读一遍全部权重，而每个权重只做 2 FLOPs，瓶颈是显存带宽，因此内核若能直接读取
    int8，字节减半就能更快；并发量大时瓶颈变成算力，这个好处就没有了，除非乘法本身也用更快的 int8。LLM.int8()
    省显存，但可能比 float16 慢。
    """
    model = drawn_model()

    def flops_of_step(n_streams):
        cache = make_cache(model, n_streams, 4)
        ids = torch.zeros(n_streams, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            one_token(model, cache, ids)
        return counter.get_total_flops()

    def bytes_read(model, dtype):
        """The bytes of all matrices but an embedding that is only looked up."""
        matrices = [(model.lm_head or model.model.embed_tokens).weight]
        matrices += [p for p in model.model.layers.parameters() if p.ndim == 2]
        size = n_bytes(p.to(dtype) for p in matrices)
        if dtype == torch.int8:
            size += sum(4 * len(p) for p in matrices)  # a scale for each row
        return size

    llama = on_meta(**LLAMA_2_7B)
    one, many = flops_of_step(1), flops_of_step(256)
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        size, ms = bytes_read(model, dtype), 1e3 * bytes_read(llama, dtype) / 2.0e12
        rows.append((str(dtype).removeprefix("torch."), one / size, many / size, ms))
    table("weights | FLOPs per byte, 1 stream | 256 streams | Llama 2 7B at 2 TB/s, ms per token", *rows)
    print("    an A100 could do 312e12 / 2.0e12 = 156 FLOPs in 16 bits for each byte that it reads")
    assert rows[1][1] == 1 and many == 256 * one and rows[1][2] > 156
    assert rows[0][3] == 2 * rows[1][3] and 1.9 < rows[1][3] / rows[2][3] < 2


def test_one_large_number_ruins_the_one_scale_of_int8():
    """What goes wrong if numbers are rounded to 8 bits, and what helps?

    A scale maps the largest number of its group to 127. If one number of a matrix is a hundred times as large
    as the others, one scale for all leaves most of them at 0. A scale for each row confines the damage to its
    row. Large numbers in the activations of large models are worse: they stand in the same few channels of
    most tokens, so that a scale for each token does not help. LLM.int8() multiplies these channels in 16
    bits.

    Often told: a scale for each token is enough for activations.
    Compare: sample.py PackedLinear: changes the order of the weights in memory and not one bit of them
    Source: Dettmers et al. (2022, arXiv 2208.07339), sec. 3 and 4
    问: int8 量化为什么怕离群值？怎么解决？
    答: 缩放系数由组内最大值决定，若整个矩阵共用一个系数，一个离群值就会让其余大多数数被舍入为 0；权重改为每行
    一个系数即可。激活的离群值集中在少数固定通道，多数词元都有，逐词元缩放无济于事，LLM.int8() 的办法是把这些
    通道留在 16 位计算。
    """
    block = drawn_model().model.layers[0]
    weight = block.mlp.up_proj.weight.detach().clone()
    weight[5, 7] = 100 * weight.abs().max()
    stream = torch.randn(32, 64)
    stream[:, 7] = 100 * stream.abs().max()  # in every token
    x = block.post_attention_layernorm(stream).detach()  # what up_proj multiplies

    rows = []
    for name, tensor in (("weights, one number large", weight), ("activations, one channel large", x)):
        apart = tensor.clone()
        apart[:, 7] = 0  # column 7 is multiplied in 16 bits
        ways = in_int8(tensor, (0, 1)), in_int8(tensor, 1), in_int8(apart, 1)
        others = torch.ones_like(tensor, dtype=torch.bool)
        others[5], others[:, 7] = False, False
        size = tensor[others].abs().mean()
        errors = [((rounded - tensor)[others].abs().mean() / size).item() for rounded in ways]
        rows.append((name, *errors, (ways[0][others] == 0).float().mean()))
    heads = "one scale | one for each row | ... and column 7 apart | made 0 by one scale"
    table(f"mean error of the others | {heads}", *rows)
    assert rows[0][1] > 0.5 and rows[0][2] < 0.02 and rows[0][4] > 0.5
    assert rows[1][1] > 0.5 and rows[1][2] > 0.5 and rows[1][3] < 0.02
