"""Stage 2: the Transformer. Token ids in, one row of scores ("logits") per position out.

    ids -> embed_tokens -> n_layer x [x += attention(norm(x)); x += mlp(norm(x))] -> norm -> lm_head -> logits

This is the Llama architecture (Touvron et al., 2023) with the names of Hugging Face's LlamaForCausalLM, so
transformers and vLLM open its folders, and it opens those of Llama, Mistral, SmolLM, Yi, Qwen2 and Qwen3.
On a first reading, read from `Config` to `Transformer.loss`. Letters in the comments on shapes: B texts of T
tokens, C channels (n_embd), H query heads, K key/value heads, D channels of a head, V tokens in the
vocabulary, S tokens that attention sees, with those in the cache.
"""

import json
import math
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --- the device ---


def choose_device(name=None):
    """The named device or, without a name, the fastest of this machine. ValueError: it is not there."""
    if name is None and torch.cuda.is_available():
        return "cuda"
    if name is None and torch.backends.mps.is_available():
        return "mps"
    if name is None:
        return "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from None
    return name


def time_product(a):
    """Seconds that the product of a matrix with itself takes on its device."""
    start = time.perf_counter()
    (a @ a)[0, 0].item()  # .item() waits for the device
    return time.perf_counter() - start


@cache
def fast_dtype(device):
    """The dtype in which this type of device multiplies matrices fastest: torch.bfloat16 or torch.float32.

    A CPU without bfloat16 units emulates them, 7 and more times slower than float32. No API tells this on
    every system, so both products are timed, in turn and often, which is robust on a busy machine, too.
    """
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device == "cpu":
        a = torch.randn(256, 256)
        b = a.bfloat16()
        times = [(time_product(a), time_product(b)) for _ in range(20)]
        float32, bfloat16 = (min(column) for column in zip(*times))
        if bfloat16 < float32:
            return torch.bfloat16
    return torch.float32


def is_fast(dtype, device):
    """Whether products in a dtype are fast on a device; if not, float32 is better."""
    kind = torch.device(device).type
    if dtype == torch.bfloat16 and kind in ("cpu", "cuda"):
        return fast_dtype(kind) == torch.bfloat16
    return not (dtype == torch.float16 and kind == "cpu")


def is_out_of_memory(error):
    """Whether a RuntimeError says that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)  # on a Mac's GPU; on a CPU


@cache
def matmul_rate(device, dtype):
    """FLOPs per second of large matrix products, the most that a device gives."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(time_product(a) for _ in range(20))


# --- the shape of a model ---


@dataclass
class Config:
    """The shape of a model, from which every tensor follows. ValueError: an impossible shape."""

    vocab_size: int
    block_size: int = 256  # the longest sequence that training shows the model, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2  # query heads share key/value heads in groups (Ainslie et al., 2023)
    n_embd: int = 256
    n_hidden: int = 704  # width inside the MLP
    head_dim: int = 0  # 0: n_embd / n_head
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    # Published checkpoints differ in these; each acts in one place of the code below.
    tie_embeddings: bool = True  # one matrix for the embedding and the head
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    rope_scaling: dict | None = None  # Llama 3.1
    dropout: float = 0.0  # on the two branches of a block, in training

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} must be a positive whole number")
        if not isinstance(self.norm_eps, float) or not isinstance(self.rope_theta, int | float):
            raise ValueError(f"norm_eps {self.norm_eps!r} and rope_theta {self.rope_theta!r} must be numbers")
        if not self.head_dim:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but RoPE rotates pairs")
        if self.qkv_bias and self.qk_norm:
            raise ValueError("no model folder has both qkv_bias (Qwen2) and qk_norm (Qwen3)")
        if self.rope_scaling and set(self.rope_scaling) != {"rope_type", *LLAMA3_SCALING}:
            raise ValueError(f"rope_scaling {self.rope_scaling} needs rope_type, {', '.join(LLAMA3_SCALING)}")

    def num_params(self):
        """Number of parameters, in closed form; a tied matrix counts once."""
        C, Q, KV = self.n_embd, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        block = 2 * C * (Q + KV) + 3 * C * self.n_hidden + 2 * C
        if self.qkv_bias:
            block += Q + 2 * KV
        if self.qk_norm:
            block += 2 * self.head_dim
        tables = 1 if self.tie_embeddings else 2
        return self.n_layer * block + C + tables * self.vocab_size * C

    def flops_per_token(self, length):
        """FLOPs per token of the forward pass over `length` tokens (Chowdhery et al., 2022, app. B).

        Training takes three times as many.
        """
        n_multiplied = self.num_params()
        if not self.tie_embeddings:  # looking up a row of the embedding multiplies nothing
            n_multiplied -= self.vocab_size * self.n_embd
        return 2 * n_multiplied + 4 * self.n_layer * self.n_head * self.head_dim * length


# Shapes without a vocabulary. Heads of 64 channels suit attention kernels. Three matrices of an MLP 8/3 as
# wide as the stream have as many weights as two of 4 times its width (Shazeer, 2020); medium and large are
# wider, since they have fewer key/value heads. small, medium and large have the depth and width of GPT-2's
# models; for what budget the others are, see train.py.
PRESETS = {
    "pico": dict(n_layer=4, n_head=2, n_kv_head=2, n_embd=128, n_hidden=352),
    "nano": dict(n_layer=4, n_head=3, n_kv_head=3, n_embd=192, n_hidden=512),
    "micro": dict(n_layer=6, n_head=4, n_kv_head=2, n_embd=256, n_hidden=704),
    "mini": dict(n_layer=8, n_head=6, n_kv_head=3, n_embd=384, n_hidden=1024),
    "small": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_hidden=2048),
    "medium": dict(n_layer=24, n_head=16, n_kv_head=8, n_embd=1024, n_hidden=3072),
    "large": dict(n_layer=36, n_head=20, n_kv_head=10, n_embd=1280, n_hidden=4096),
}

# --- positions ---


def rope(positions, config, dtype):
    """cos and sin (..., T, D/2) of the angles by which the D/2 pairs of a head turn at positions (..., T)."""
    # Pair i turns by theta^(-2i/D) per position (Su et al., 2021, sec. 3.2.2), in float32.
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1 / config.rope_theta ** (pairs / config.head_dim)
    if config.rope_scaling:
        # Llama 3.1: pairs that turn slowly within the original context are slowed down by `factor`.
        scaling = config.rope_scaling
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    angles = positions[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x, cos, sin):
    """Rotate each pair (i, i + D/2) of x by the angle of its position.

    x (B, H, T, D); cos, sin (T, D/2) or (B, 1, T, D/2). After it, the dot product of q at position m and k at
    position n knows the positions only as m - n (Su et al., 2021, eq. 16). Half-split layout, as in Llama.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


# --- a block: attention and MLP ---


class Attention(nn.Module):
    """Grouped-query attention: softmax(q k^T / sqrt(D)) v over each position and those before it."""

    def __init__(self, config):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask=None, append=None):
        """x (B, T, C) -> (B, T, C). mask: which keys are seen, None: causal. append: KVCache.append."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if append is not None:
            k, v = append(k, v)  # (B, K, S, D), with all positions before
        # What follows is softmax(q @ k.mT / sqrt(D), masked) @ v; H / K query heads share one k and v.
        if mask is None:
            with torch.autocast("cpu", enabled=False):  # on a CPU, attention is far slower in bfloat16
                y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=True)
        else:
            # The heads of a group become further query positions: CUDA is slow with enable_gqa and a mask.
            q = q.reshape(B, k.size(1), -1, self.head_dim)  # (B, K, H/K * T, D)
            if T > 1:
                mask = mask.repeat(1, 1, q.size(2) // T, 1)  # (B, 1, H/K * T, S)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = y.view(B, -1, T, self.head_dim)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: each sublayer reads a normalised copy of the stream and adds its result to the stream."""

    def __init__(self, config):
        super().__init__()
        # RMSNorm is x / sqrt(mean(x^2) + eps) * weight over the channels (Zhang & Sennrich, 2019).
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, mask=None, append=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, append))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


# --- the KV cache ---


class KVCache:
    """Keys and values of all positions read so far, so that a new token costs one position instead of all.

    Allocated once; every row has its own length. To prefill prompts of different lengths, pad them on the
    right, then `truncate(lengths)`: the next tokens overwrite the padding.
    """

    def __init__(self, config, batch_size, max_len, device=None, dtype=None):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.max_len = max_len
        self.span = 0  # length of the longest row, known without asking the device

    def reserve(self, T):
        """Count T more tokens per row in `span`. ValueError: there is no room for them."""
        if self.span + T > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens, not for {self.span} + {T}")
        self.span += T

    def begin(self, T):
        """Count T new tokens -> their positions (B, 1, T), and the mask (B, 1, T, S) or None for causal.

        Called once in a forward pass; `append` follows in each layer. A compiled step attends to the whole
        cache, so that one graph serves every position; its caller calls `reserve`, since a graph runs no
        Python.
        """
        if torch.compiler.is_compiling():
            S = self.max_len
        else:
            self.reserve(T)
            S = self.span
        positions = self.lengths[:, None, None] + torch.arange(T, device=self.lengths.device)
        self.lengths += T
        if S == T:  # nothing came before
            return positions, None
        return positions, torch.arange(S, device=positions.device) <= positions[..., None]

    def append(self, layer, positions, mask, k, v):
        """Write a layer's new k, v (B, K, T, D) at their positions; return those of all S, (B, K, S, D)."""
        rows = torch.arange(k.size(0), device=k.device)[:, None, None]  # (B, 1, 1)
        heads = torch.arange(k.size(1), device=k.device)[:, None]  # (K, 1)
        self.k[layer][rows, heads, positions] = k
        self.v[layer][rows, heads, positions] = v
        S = k.size(2) if mask is None else mask.size(-1)
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def truncate(self, lengths):
        """Keep the first `lengths` tokens of each row (a list of one int per row) and drop the rest."""
        new = torch.tensor(lengths, device=self.lengths.device)
        if new.shape != self.lengths.shape or ((new < 0) | (new > self.lengths)).any():
            raise ValueError(f"rows of {self.lengths.tolist()} tokens cannot be truncated to {lengths}")
        self.lengths.copy_(new)
        self.span = max(lengths)


# --- the whole model ---


class Transformer(nn.Module):
    """The whole model: `model(ids)` gives logits, `model.loss(ids, targets)` what training minimises."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, V = config.n_embd, config.vocab_size
        self.model = nn.ModuleDict()  # for Hugging Face's names, such as "model.layers.0.mlp.up_proj.weight"
        self.model.embed_tokens = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.model.norm = nn.RMSNorm(C, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(C, V, bias=False)
        if not self.model.norm.weight.is_meta:  # `load` puts its own weights there
            self.init_weights()

    def init_weights(self):
        """Draw fresh weights that start as an even guess over the vocabulary, a loss of ln V."""
        # What writes into the stream (o_proj, down_proj) starts at zero, so each block is the identity. With
        # a tied head, the input token itself then scores C * std or less as the next one: std = 1/C makes
        # that 1, near an even guess.
        C = self.config.n_embd
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(p)
            elif name.endswith("bias") or "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(p)
            elif ".layers." in name:
                nn.init.normal_(p, std=0.5 / math.sqrt(C))
            else:
                nn.init.normal_(p, std=1 / C)

    def hidden(self, ids, cache=None):
        """ids (B, T) -> the final, normalised stream (B, T, C). With a cache, ids continue what it holds."""
        T, V, longest = ids.size(1), self.config.vocab_size, self.config.block_size
        if not torch.compiler.is_compiling():
            if ids.device.type == "cpu" and not 0 <= ids.min() <= ids.max() < V:  # a GPU would have to wait
                raise ValueError(f"ids are from {ids.min()} to {ids.max()}, but the vocabulary has {V}")
            if T + (cache.span if cache else 0) > longest:
                warnings.warn(f"the model has not seen more than {longest} tokens in training", stacklevel=3)
        if cache is None:
            positions, mask = torch.arange(T, device=ids.device), None
        else:
            positions, mask = cache.begin(T)
        x = self.model.embed_tokens(ids)  # (B, T, C)
        cos, sin = rope(positions, self.config, x.dtype)
        for i, block in enumerate(self.model.layers):
            append = partial(cache.append, i, positions, mask) if cache else None
            x = block(x, cos, sin, mask, append)
        return self.model.norm(x)

    def head(self, x):
        """x (..., C) -> logits (..., V)."""
        return self.lm_head(x) if self.lm_head else F.linear(x, self.model.embed_tokens.weight)

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V): at each position the scores of the token that comes next."""
        return self.head(self.hidden(ids, cache))

    def loss(self, ids, targets):
        """The mean cross-entropy in nats of targets (B, T) given ids (B, T); a target of -100 is left out."""
        total, _ = self.summed_loss(ids, targets)
        return total / (targets != -100).sum().clamp(min=1)

    def summed_loss(self, ids, targets):
        """The sum over all targets, see `loss`, and the sums of the rows (B,), these without a gradient."""
        x = self.hidden(ids).flatten(0, 1)  # (B*T, C)
        weight = (self.lm_head or self.model.embed_tokens).weight
        # F.cross_entropy(self.head(x), targets) without ever holding all logits
        total, losses = LossInPieces.apply(x, weight, targets.flatten(), torch.is_grad_enabled())
        return total, losses.view(targets.shape).sum(1)

    def save(self, folder, tokenizer=None, weights=None, end_ids=None):
        """Write a model folder that `load` and transformers open.

        weights: others instead of the model's own; end_ids: ids that end a text (that of <|endoftext|>).
        RuntimeError: the weights do not fit the config. ValueError: the tokenizer has more ids than rows.
        """
        weights = weights or self.state_dict()
        assemble(self.config, weights)
        if tokenizer and tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(f"{self.config.vocab_size} rows are too few for {tokenizer.vocab_size} tokens")
        if end_ids is None and tokenizer and "<|endoftext|>" in tokenizer.special_tokens:
            end_ids = [tokenizer.special_tokens["<|endoftext|>"]]
        generation = {}
        if end_ids:
            generation = {"bos_token_id": end_ids[0], "pad_token_id": end_ids[0], "eos_token_id": end_ids}
        settings = config_to_json(self.config, weights["model.norm.weight"].dtype)
        settings.update(generation)
        with replace_files(folder) as unfinished:
            save_safetensors(unfinished / "model.safetensors", weights)
            for name, value in (("config.json", settings), ("generation_config.json", generation)):
                (unfinished / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
            if tokenizer:
                tokenizer.save_pretrained(unfinished)

    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        """Open a model folder, ours or Hugging Face's, for inference. dtype None: the widest in the file.

        ValueError: the folder is damaged, or needs arithmetic that is not here.
        """
        folder = Path(folder)
        try:
            config = config_from_json(json.loads((folder / "config.json").read_bytes()))
            index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
            if index.exists() and not (folder / "model.safetensors").exists():
                names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            weights = {}
            for name in names:
                weights.update(load_safetensors(folder / name, device, dtype))
            widest = reduce(torch.promote_types, [weight.dtype for weight in weights.values()])
            weights = {name: weight.to(widest) for name, weight in weights.items()}
            if config.tie_embeddings and "lm_head.weight" in weights:
                head = weights.pop("lm_head.weight")
                embedding = weights.setdefault("model.embed_tokens.weight", head)
                if not torch.equal(head, embedding):  # as in transformers 5, the file decides
                    config.tie_embeddings = False
                    weights["lm_head.weight"] = head
            model = assemble(config, weights)
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} cannot be opened: {' '.join(str(error).split())}") from None
        return model.eval()


def assemble(config, weights):
    """A Transformer with these weights. RuntimeError: lists all that does not fit."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    return model


# --- the loss in pieces ---


class LossInPieces(torch.autograd.Function):
    """Cross-entropy of F.linear(x, weight) without ever holding all logits.

    The float32 logits of a batch can outweigh everything else in a training step. Here they exist for a few
    rows at a time: d loss / d logits = softmax(logits) - onehot(target) is multiplied into the gradients of x
    and weight at once, and then the piece is freed.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, learning):
        """x (N, C), weight (V, C), targets (N,) -> the sum of the losses, and each of them (N,)."""
        learns_weight = learning and weight.requires_grad
        dweight = torch.zeros_like(weight, dtype=torch.float32) if learns_weight else None
        losses, dx = [], []
        size = 512 if x.device.type == "cpu" else 4096
        for piece, target in zip(x.split(size), targets.split(size), strict=True):
            log_p = F.linear(piece, weight).float().log_softmax(dim=-1)  # (size, V)
            losses.append(F.nll_loss(log_p, target, reduction="none"))
            if learning:
                counted = (target != -100)[:, None].float()
                dlogits = log_p.exp_().mul_(counted)
                dlogits = dlogits.scatter_add_(1, target[:, None].clamp(min=0), -counted).to(x.dtype)
                dx.append((dlogits @ weight).to(x.dtype))
                if learns_weight:
                    dweight += dlogits.T @ piece
        losses = torch.cat(losses)
        if learning:
            ctx.dx, ctx.dweight, ctx.dtype = torch.cat(dx), dweight, weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, dtotal, _):
        dweight = None if ctx.dweight is None else (dtotal * ctx.dweight).to(ctx.dtype)
        return (dtotal * ctx.dx).to(ctx.dx.dtype), dweight, None, None


# --- model folders: config.json in Hugging Face's words, weights in safetensors ---

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Our fields and theirs, spelled as transformers 4 and 5 both read them.
JSON_NAMES = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
}
# Fields that change the arithmetic and the values implemented here; an absent field has the first one.
SUPPORTED = {
    "model_type": ("llama", "mistral", "qwen2", "qwen3"),
    "hidden_act": ("silu",),
    "rope_type": ("default", "llama3"),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1,),
    "sliding_window": (None,),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "is_causal": (True,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}
# Fields that change no logit here, or that config_from_json looks at. Any other is named in a warning.
HARMLESS = """
    _model_name_or_path _name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward
    dtype eos_token_id id2label initializer_range is_encoder_decoder is_llama_config label2id
    max_window_layers output_attentions output_hidden_states pad_token_id pretraining_tp problem_type
    return_dict rope_parameters torch_dtype transformers.js_config transformers_version type unk_token_id
    use_cache use_sliding_window
""".split()  # noqa: SIM905
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_to_json(config, dtype):
    """The content of config.json for a Config and the dtype of its weights."""
    kind = "qwen3" if config.qk_norm else "llama"
    if config.qkv_bias:
        kind = "qwen2"
    settings = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
    }
    settings["torch_dtype"] = str(dtype).removeprefix("torch.")
    for ours, theirs in JSON_NAMES.items():
        settings[theirs] = getattr(config, ours)
    return settings


def config_from_json(settings):
    """The Config of a config.json. ValueError: it lacks a field or asks for arithmetic that is not here."""
    rope_settings = (settings.get("rope_parameters") or {}) | (settings.get("rope_scaling") or {})
    kind = settings.get("model_type")
    found = {
        "model_type": None,
        "head_dim": 128 if kind == "qwen3" else 0,
        "num_key_value_heads": settings.get("num_attention_heads"),
        "tie_word_embeddings": False,
        "rope_type": rope_settings.get("type", "default"),
        "rope_theta": 10000.0,
        "rope_scaling": None,
    }
    for name, value in (settings | rope_settings).items():
        if value is not None:
            found[name] = value
    has_window = kind == "mistral" or settings.get("use_sliding_window")
    found["sliding_window"] = settings.get("sliding_window", 4096) if has_window else None
    if set(found.get("layer_types", ())) == {"full_attention"}:
        del found["layer_types"]
    known = (*JSON_NAMES.values(), *SUPPORTED, *LLAMA3_SCALING, *HARMLESS)
    if unknown := found.keys() - known:
        warnings.warn(f"config.json: passed over, not known here: {', '.join(sorted(unknown))}", stacklevel=3)
    for field, supported in SUPPORTED.items():
        if found.get(field, supported[0]) not in supported:
            raise ValueError(f"{field} {found[field]!r} is not supported, only {supported}")
    scaling = LLAMA3_SCALING if found["rope_type"] == "llama3" else ()
    if missing := [name for name in (*JSON_NAMES.values(), *scaling) if name not in found]:
        raise ValueError(f"{', '.join(missing)} missing")
    found["rope_scaling"] = {name: found[name] for name in ("rope_type", *scaling)} if scaling else None
    fields = {ours: found[theirs] for ours, theirs in JSON_NAMES.items()}
    return Config(**fields, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")


@contextmanager
def replace_files(folder):
    """Yield an empty folder; the files written there are moved into `folder` once all are complete."""
    unfinished = Path(folder) / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.iterdir():
            os.replace(path, Path(folder) / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_safetensors(path, tensors):
    """Write {name: tensor}: the header's length in 8 bytes, the header as JSON, the bytes of all tensors.

    The path must not be a file from which one of these tensors is mapped: see replace_files.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # keeps all of them aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        span = [end, end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def load_safetensors(path, device="cpu", dtype=None):
    """Read {name: tensor}, memory-mapped: a page is read when it is touched. ValueError: it is damaged."""
    tensors = {}
    try:
        data = np.memmap(path, np.uint8, mode="c")  # copy on write: the file is never changed
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        content = torch.from_numpy(data[start:])
        for name, entry in header.items():
            if name == "__metadata__" or name.endswith("rotary_emb.inv_freq"):
                continue
            kind, shape, (begin, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
            whole = all(isinstance(n, int) for n in shape)
            if not kind or not whole or begin < 0 or math.prod(shape) * kind.itemsize != end - begin:
                raise ValueError(f"{name}: {entry} does not fit the file or has an unknown dtype")
            tensors[name] = content[begin:end].view(kind).view(shape).to(device, dtype)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an intact safetensors file: {error!s:.200}") from None
    return tensors
