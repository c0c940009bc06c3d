"""Stage 2: the Transformer. Token ids in, one row of scores ("logits") per position out.

    ids -> embed_tokens -> n_layer x [x += attention(norm(x)); x += mlp(norm(x))] -> norm -> lm_head -> logits

This is the Llama architecture (Touvron et al., 2023), with the names of Hugging Face's LlamaForCausalLM:
transformers and vLLM open its folders, and it opens those of Llama, Mistral, SmolLM, Yi, Qwen2 and Qwen3.

    python model.py DIR        say what a folder holds
"""

import argparse
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    """The shape of a model: it decides every tensor. Impossible shapes raise a ValueError."""

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
    # What checkpoints in the wild differ in; each acts in one place of the code below.
    tie_embeddings: bool = True  # one matrix for the embedding and the head
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    rope_scaling: dict | None = None  # Llama 3.1
    dropout: float = 0.0  # in training, on the two branches of a block: for data that is seen many times
    recompute: bool = False  # keep of each block only its input for the backward pass (Chen et al., 2016)

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} {value!r} must be a whole number from 1 on")
        if self.n_embd % self.n_head and not self.head_dim:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        if self.qkv_bias and self.qk_norm:
            raise ValueError("qkv_bias (Qwen2) and qk_norm (Qwen3) go into no folder together")
        if self.rope_scaling and set(self.rope_scaling) != {"rope_type", *LLAMA3_SCALING}:
            raise ValueError(f"rope_scaling {self.rope_scaling} needs rope_type, {', '.join(LLAMA3_SCALING)}")

    def num_params(self):
        """Number of trainable parameters, in closed form; a tied matrix counts once."""
        C, Q, KV = self.n_embd, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        block = 2 * C * (Q + KV) + 3 * C * self.n_hidden + 2 * C
        block += self.qkv_bias * (Q + 2 * KV) + self.qk_norm * 2 * self.head_dim
        return self.n_layer * block + C + self.vocab_size * C * (1 if self.tie_embeddings else 2)

    def flops_per_token(self, length):
        """FLOPs per token of `length` (Chowdhery et al., 2022, app. B), forward; training takes thrice."""
        multiplied = self.num_params() - (not self.tie_embeddings) * self.vocab_size * self.n_embd
        return 2 * multiplied + 4 * self.n_layer * self.n_head * self.head_dim * length


# Shapes without a vocabulary. Heads of 64 channels suit attention kernels. An MLP 8/3 as wide as the stream
# weighs in three matrices what 4 times weigh in two (Shazeer, 2020); medium and large, where shared key/value
# heads save, have more. nano is for 3 minutes of 2 CPU cores, micro for an hour; the rest are GPT-2's shapes.
PRESETS = {
    "nano": dict(n_layer=4, n_head=3, n_kv_head=3, n_embd=192, n_hidden=512),
    "micro": dict(n_layer=8, n_head=6, n_kv_head=3, n_embd=384, n_hidden=1024),
    "small": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_hidden=2048),
    "medium": dict(n_layer=24, n_head=16, n_kv_head=8, n_embd=1024, n_hidden=3072),
    "large": dict(n_layer=36, n_head=20, n_kv_head=10, n_embd=1280, n_hidden=4096),
}


def rope(positions, config, dtype):
    """cos and sin (..., T, D/2) of the angles by which the D/2 pairs of a head turn at positions (..., T)."""
    # Pair i turns by theta^(-2i/D) per position (Su et al., 2021, sec. 3.2.2), in float32.
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1 / config.rope_theta ** (pairs / config.head_dim)
    if scaling := config.rope_scaling:
        # Llama 3.1: pairs that turn slowly within the first training's context are slowed down by `factor`.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    angles = positions[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x, cos, sin):
    """Rotate each pair (i, i + D/2) of x by the angle of its position.

    x (B, H, T, D); cos, sin (T, D/2) or (B, 1, T, D/2). After it, q at position m and k at position n meet in
    a dot product that depends on m - n alone (Su et al., 2021, eq. 16). Half-split, as in transformers.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: softmax(q k^T / sqrt(D)) v over the positions up to and with its own."""

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

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache(k, v)  # this layer's KVCache.append: (B, K, S, D), with all that came before
        if mask is None:
            with torch.autocast("cpu", enabled=False):  # there, flash attention is far slower in bfloat16
                y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=True)
        else:
            # a group's heads become further query positions: CUDA is slow with both `enable_gqa` and a mask
            q = q.reshape(B, k.size(1), -1, self.head_dim)  # (B, K, G*T, D)
            mask = mask if T == 1 else mask.repeat(1, 1, q.size(2) // T, 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = y.view(B, -1, T, self.head_dim)
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

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class KVCache:
    """The keys and values of all that was read so far, so that a new token costs one position, not all.

    Allocated once; every row has its own length. To prefill prompts of different lengths, pad them on the
    right, then `truncate(lengths)`: what is written next overwrites the padding.
    """

    def __init__(self, config, batch_size, max_len, device=None, dtype=None):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.span = 0  # the longest row; known to the host, so that nothing waits for the device
        self.max_len = max_len

    def reserve(self, T):
        """Count T more tokens; returns `span`. ValueError: no room. Call it before each recorded step."""
        if self.span + T > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens, not for {self.span} + {T}")
        self.span += T
        return self.span

    def begin(self, T):
        """Count T more tokens; returns their positions (B, 1, T) and which they see (None: causal)."""
        # what torch.compile or a CUDA graph records once serves every position: it sees the whole cache
        capturing = self.k.is_cuda and torch.cuda.is_current_stream_capturing()
        S = self.max_len if torch.compiler.is_compiling() or capturing else self.reserve(T)
        positions = self.lengths[:, None, None] + torch.arange(T, device=self.lengths.device)
        self.lengths += T
        if S == T:  # nothing came before
            return positions, None
        return positions, torch.arange(S, device=positions.device) <= positions[..., None]  # (B, 1, T, S)

    def append(self, layer, positions, mask, k, v):
        """Write a layer's new k, v (B, K, T, D) to their positions; returns all S, (B, K, S, D)."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[layer][rows, :, positions[:, 0]] = k.transpose(1, 2)
        self.v[layer][rows, :, positions[:, 0]] = v.transpose(1, 2)
        S = k.size(2) if mask is None else mask.size(-1)
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def truncate(self, lengths):
        """Take tokens back: the rows keep their first `lengths`, a list of one int per row."""
        new = torch.tensor(lengths, device=self.lengths.device)
        if new.shape != self.lengths.shape or ((new < 0) | (new > self.lengths)).any():
            raise ValueError(f"rows of {self.lengths.tolist()} tokens cannot be truncated to {lengths}")
        self.lengths.copy_(new)
        self.span = max(lengths)


class Transformer(nn.Module):
    """The whole model: `model(ids)` gives logits, `model.loss(ids, targets)` what training minimises."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, V = config.n_embd, config.vocab_size
        self.model = nn.ModuleDict()
        self.model.embed_tokens = nn.Embedding(V, C)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.model.norm = nn.RMSNorm(C, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(C, V, bias=False)
        self.init_weights()

    def init_weights(self):
        """Draw fresh weights that start as an even guess over the vocabulary, a loss of ln V."""
        # What writes into the stream (o_proj, down_proj) starts at zero: a block is the identity at first. A
        # tied head then scores a token *itself*, behind the norm, with C * std: 1/C keeps that at 1 or below.
        C = self.config.n_embd
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(p)
            elif name.endswith("bias") or "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.5 / math.sqrt(C) if ".layers." in name else 1 / C)

    def hidden(self, ids, cache=None):
        """ids (B, T) -> the final, normalised stream (B, T, C). With a cache, ids continue what it holds."""
        T, V, longest = ids.size(1), self.config.vocab_size, self.config.block_size
        if not torch.compiler.is_compiling():
            if ids.device.type == "cpu" and not 0 <= ids.min() <= ids.max() < V:  # a GPU would have to wait
                raise ValueError(f"ids are from {ids.min()} to {ids.max()}, but the vocabulary has {V}")
            if T + (cache.span if cache else 0) > longest:
                warnings.warn(f"the model has not seen more than {longest} tokens in training", stacklevel=3)
        positions, mask = cache.begin(T) if cache else (torch.arange(T, device=ids.device), None)
        x = self.model.embed_tokens(ids)
        cos, sin = rope(positions, self.config, x.dtype)
        for i, block in enumerate(self.model.layers):
            run = partial(checkpoint, block, use_reentrant=False) if self.config.recompute else block
            x = run(x, cos, sin, mask, cache and partial(cache.append, i, positions, mask))
        return self.model.norm(x)

    def head(self, x):
        """x (..., C) -> logits (..., V)."""
        return self.lm_head(x) if self.lm_head else F.linear(x, self.model.embed_tokens.weight)

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V): at each position the scores of the token that comes next."""
        return self.head(self.hidden(ids, cache))

    def loss(self, ids, targets, reduction="mean"):
        """Cross-entropy in nats, "mean" or "sum", of targets (B, T) given ids (B, T); -100 is left out.

        "rows": the sum and, only to be looked at, what each row has in it, (B,).
        """
        # All float32 logits can outweigh the rest of a step. Here they exist for some rows at a time, and
        # d loss / d logits = softmax(logits) - onehot(target) is carried on to x and weight at once.
        x, flat = self.hidden(ids).flatten(0, 1), targets.flatten()
        weight = (self.lm_head or self.model.embed_tokens).weight
        dweight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        losses, dx, learning = [], [], torch.is_grad_enabled()
        size = 512 if x.device.type == "cpu" else 4096
        with torch.no_grad():
            for piece, target in zip(x.split(size), flat.split(size), strict=True):
                log_p = F.linear(piece, weight).float().log_softmax(dim=-1)  # (size, V)
                losses.append(F.nll_loss(log_p, target, reduction="none"))
                if learning:
                    kept = (target != -100)[:, None].float()
                    slope = log_p.exp_().mul_(kept).scatter_add_(1, target[:, None].clamp(min=0), -kept)
                    dx.append(slope.to(x.dtype) @ weight)
                    if weight.requires_grad:
                        dweight += slope.to(x.dtype).T @ piece
        rows = torch.cat(losses).view(targets.shape).sum(1)
        total, n = rows.sum(), {"mean": (flat != -100).sum().clamp(min=1), "sum": 1, "rows": 1}[reduction]
        if learning:  # add nothing but the gradients dx and dweight
            carrier = (x * torch.cat(dx)).sum(dtype=torch.float32)
            carrier += (weight * dweight).sum() if weight.requires_grad else 0
            total = total + (carrier - carrier.detach())
        return (total, rows) if reduction == "rows" else total / n

    def save(self, folder, tokenizer=None, weights=None, ends=None):
        """Write a model folder, of own weights or these. ends: ids that end a text (<|endoftext|>)."""
        folder, c, weights = Path(folder), self.config, weights or self.state_dict()
        kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
        settings = {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind}
        settings |= {"hidden_act": "silu", "torch_dtype": str(weights["model.norm.weight"].dtype)[6:]}
        settings |= {theirs: getattr(c, ours) for ours, theirs in JSON_NAMES.items()}
        specials = tokenizer.special_tokens if tokenizer else {}
        ends = ends or [specials[name] for name in ("<|endoftext|>",) if name in specials]
        generation = {"bos_token_id": ends[0], "pad_token_id": ends[0], "eos_token_id": ends} if ends else {}
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors(folder / "model.safetensors", weights)
        for name, value in (("config.json", settings | generation), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
        if tokenizer:
            tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        """Open a model folder, ours or Hugging Face's. dtype None: as in the file. ValueError: unusable."""
        folder, weights = Path(folder), {}
        try:
            config = config_from_json(json.loads((folder / "config.json").read_bytes()))
            names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
            if index.exists() and not (folder / names[0]).exists():
                names = set(json.loads(index.read_bytes())["weight_map"].values())
            for name in names:
                weights |= load_safetensors(folder / name, device, dtype)
            if config.tie_embeddings:
                weights.pop("lm_head.weight", None)
            with torch.device("meta"):  # shapes without memory
                model = cls(config)
            model.load_state_dict(weights, assign=True)  # its error lists all that does not fit
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} cannot be opened: {' '.join(str(error).split())}") from None
        return model.eval()


# --- files: config.json in Hugging Face's words; safetensors: 8 bytes of header length, JSON, raw bytes ---
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# our fields and theirs, spelled as transformers 4 and 5 both read them
JSON_NAMES = dict(
    vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim", n_embd="hidden_size",
    n_hidden="intermediate_size", norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings",
    rope_theta="rope_theta", rope_scaling="rope_scaling",
)  # fmt: skip
# fields that change the arithmetic, and what they may say here; the first is taken where one is absent
SUPPORTED = dict(
    model_type=("llama", "mistral", "qwen2", "qwen3"), hidden_act=("silu",), rope_type=("default", "llama3"),
    sliding_window=(None,), attention_bias=(False,), mlp_bias=(False,), partial_rotary_factor=(1,),
    num_experts=(0,), num_local_experts=(0,), attention_multiplier=(1,), quantization_config=(None,),
)  # fmt: skip
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_json(settings):
    """The Config of a config.json. ValueError: it lacks a field or asks for arithmetic that is not here."""
    rope = (settings.get("rope_parameters") or {}) | (settings.get("rope_scaling") or {})
    found = {"rope_type": rope.get("type", "default"), "rope_theta": 10000.0, "rope_scaling": None}
    found |= {"model_type": None, "head_dim": 0, "num_key_value_heads": settings.get("num_attention_heads")}
    found |= {"tie_word_embeddings": False, "use_sliding_window": settings.get("model_type") == "mistral"}
    found |= {name: value for name, value in (settings | rope).items() if value is not None}
    found["sliding_window"] = found.get("sliding_window") if found["use_sliding_window"] else None
    for field, supported in SUPPORTED.items():
        if found.get(field, supported[0]) not in supported:
            raise ValueError(f"{field} {found[field]!r} is not supported, only {supported}")
    scaling = LLAMA3_SCALING if found["rope_type"] == "llama3" else ()
    if missing := [name for name in (*JSON_NAMES.values(), *scaling) if name not in found]:
        raise ValueError(f"{', '.join(missing)} missing")
    found["rope_scaling"] = {name: found[name] for name in ("rope_type", *scaling)} if scaling else None
    values = {ours: found[theirs] for ours, theirs in JSON_NAMES.items()}
    return Config(**values, qkv_bias=found["model_type"] == "qwen2", qk_norm=found["model_type"] == "qwen3")


def save_safetensors(path, tensors):
    """Write {name: tensor}, down to the disk. Equal tensors make equal files."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # so that all are aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        span = [end, end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_suffix(".unfinished")  # a model opened from `path` still reads it
    try:
        with open(unfinished, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_safetensors(path, device="cpu", dtype=None):
    """Read {name: tensor}, mapped: a page is read when it is touched. ValueError: the file is damaged."""
    tensors = {}
    try:
        data = np.memmap(path, np.uint8, mode="c")  # private: what is written to it stays in memory
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        content = torch.from_numpy(data[start:])
        for name, entry in header.items():
            if name == "__metadata__" or name.endswith("rotary_emb.inv_freq"):
                continue
            kind, shape, (begin, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
            if not kind or begin < 0 or math.prod(shape) * kind.itemsize != end - begin:
                raise ValueError(f"{name}: {entry} does not fit the file, or is of a type unknown here")
            tensors[name] = content[begin:end].view(kind).view(shape).to(device, dtype)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {error!s:.200}") from None
    return tensors


def main():
    parser = argparse.ArgumentParser(description="Say what a model folder holds.")
    parser.add_argument("folder", metavar="DIR")
    model = Transformer.load(parser.parse_args().folder)
    c, dtype = model.config, model.model.embed_tokens.weight.dtype
    print(model)
    for part in ("embed_tokens", "self_attn", "mlp", "layernorm", "model.norm", "lm_head"):
        print(f"{part:14}{sum(p.numel() for name, p in model.named_parameters() if part in name):,}")
    print(f"{'parameters':14}{c.num_params():,}, {dtype.itemsize * c.num_params():,} bytes as {dtype}")
    print(f"{'FLOPs':14}{c.flops_per_token(c.block_size):,} per token of {c.block_size:,}")
    print(f"{'cache':14}{2 * KVCache(c, 1, 1, 'meta', dtype).k.nbytes:,} bytes per token")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
