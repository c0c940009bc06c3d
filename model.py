"""Stage 2: the Transformer. Token ids in, one row of scores ("logits") per position out.

    ids -> embed_tokens -> n_layer x [ x + attention(norm(x)), then x + mlp(norm(x)) ] -> norm -> lm_head -> logits

This is the Llama architecture (Touvron et al., 2023), and its parameters have the names that Hugging Face's LlamaForCausalLM
gives them: a saved folder opens in transformers and vLLM as it is, and their Llama, Mistral, SmolLM, Qwen2 and Qwen3 folders open
here. `python model.py DIR` says what a folder holds.
"""

import argparse
import json
import math
import mmap
import os
import struct
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """The shape of a model; with the vocabulary it decides every tensor. Heads must divide evenly into groups of n_kv_head."""

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
    dropout: float = 0.0  # on the two branches of a block, for data that is seen many times
    # What checkpoints in the wild differ in; each acts in one line of the code below.
    tie_embeddings: bool = True  # one matrix for the embedding and the head
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    rope_scaling: dict | None = None  # Llama 3.1

    def __post_init__(self):
        if self.head_dim == 0:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")

    def num_params(self):
        """Number of trainable parameters, in closed form; a tied matrix counts once."""
        C, H, K, D = self.n_embd, self.n_head, self.n_kv_head, self.head_dim
        attention = 2 * C * H * D + 2 * C * K * D + self.qkv_bias * (H + 2 * K) * D + self.qk_norm * 2 * D
        block = attention + 3 * C * self.n_hidden + 2 * C
        return self.n_layer * block + C + self.vocab_size * C * (1 if self.tie_embeddings else 2)


# Shapes without a vocabulary. Deeper rather than wider while heads stay at 32 to 64 channels; the MLP is about 8/3 as wide as the
# stream, so that its three matrices cost what the two of a 4x MLP do (Shazeer, 2020), rounded to what matrix units like.
PRESETS = {
    "nano": dict(n_layer=4, n_head=6, n_kv_head=3, n_embd=192, n_hidden=512),
    "micro": dict(n_layer=8, n_head=6, n_kv_head=3, n_embd=384, n_hidden=1024),
    "small": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_hidden=2048),
    "medium": dict(n_layer=24, n_head=16, n_kv_head=8, n_embd=1024, n_hidden=2816),
    "large": dict(n_layer=36, n_head=20, n_kv_head=10, n_embd=1280, n_hidden=3456),
}


def rope_frequencies(config, device=None):
    """Angle per position of each of the head_dim/2 rotating pairs: theta^(-2i/D) (Su et al., 2021, sec. 3.2.2)."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    if config.rope_scaling:  # Llama 3.1: slow rotations are slowed by `factor`, fast ones kept, those between blended
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the first training's context
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        keep = keep.clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / s["factor"]
    return frequencies


def apply_rope(x, cos, sin):
    """Rotate each pair (i, i + D/2) of x by the angle of its position.

    x (B, H, T, D); cos, sin (T, D/2) or (B, 1, T, D/2). After it, q at position m and k at position n meet in a dot product
    that depends on m - n alone (Su et al., 2021, eq. 16). Half-split layout, as in Hugging Face's Llama.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, 2019)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention: softmax(q k^T / sqrt(D)) v, each position seeing itself and what came before."""

    def __init__(self, config):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache(k, v)  # (B, K, S, D): with all that was there before
        if mask is None:
            # Under autocast a CPU stays in float32 here: its flash kernel is several times slower in bfloat16.
            on_cpu = q.device.type == "cpu"
            with torch.autocast(q.device.type, enabled=not on_cpu and torch.is_autocast_enabled("cuda")):
                v = v.to(q.dtype)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # The query heads of a group become further query positions of their one key/value head: with `enable_gqa` and a
            # mask, CUDA would fall back to the slow math kernel.
            K = k.size(1)
            q = q.reshape(B, K, -1, self.head_dim)  # (B, K, G*T, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, q.size(2) // T, 1))
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
    """One layer. Each sublayer reads a normalised copy of the stream and adds to the stream itself ("pre-norm")."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class KVCache:
    """The keys and values of what was read so far, so that the next token costs one position and not all of them.

    Allocated once; every row has its own length. To prefill prompts of different lengths, pad them on the right, then
    `truncate(lengths)`: what is written next overwrites the padding.
    """

    def __init__(self, config, batch_size, max_len, device=None, dtype=None):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.span = 0  # the longest row; known to the host, so that nothing waits for the device
        self.max_len = max_len

    @property
    def nbytes(self):
        """2 x layers x rows x kv heads x length x head_dim x bytes of the dtype."""
        return self.k.nbytes + self.v.nbytes

    def begin(self, T):
        """Positions of the next T tokens of each row, and which positions each may see (None: causal among themselves)."""
        if self.span + T > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens, not for {self.span} + {T}")
        new = torch.arange(T, device=self.lengths.device)
        if self.span == 0:
            return new, None
        positions = self.lengths[:, None, None] + new  # (B, 1, T)
        return positions, torch.arange(self.span + T, device=new.device) <= positions[..., None]  # (B, 1, T, S)

    def append(self, layer, positions, k, v):
        """Keep k and v (B, K, T, D) of a layer at `positions`; returns all of its keys and values, (B, K, S, D)."""
        T = k.size(2)
        if self.span == 0:
            self.k[layer, :, :, :T], self.v[layer, :, :, :T] = k, v
            return k, v
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[layer][rows, :, positions[:, 0]] = k.transpose(1, 2)
        self.v[layer][rows, :, positions[:, 0]] = v.transpose(1, 2)
        return self.k[layer, :, :, : self.span + T], self.v[layer, :, :, : self.span + T]

    def advance(self, T):
        """Count T more tokens in every row."""
        self.lengths += T
        self.span += T

    def truncate(self, lengths):
        """Shorten the rows to `lengths`, a list of one int per row."""
        self.lengths.copy_(torch.tensor(lengths))
        self.span = max(lengths)

    def repeat(self, n):
        """A cache with each row n times in a row, to continue one prompt in n ways."""
        copy = KVCache.__new__(KVCache)
        copy.k, copy.v = self.k.repeat_interleave(n, dim=1), self.v.repeat_interleave(n, dim=1)
        copy.lengths, copy.span, copy.max_len = self.lengths.repeat_interleave(n), self.span, self.max_len
        return copy


LOGITS_AT_A_TIME = {"cpu": 2**19}  # what fits into a processor's cache; other devices want 2**24


class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of x (N, C) @ weight.T against targets (N,), in nats; targets of -100 are left out.

    All logits in float32, with their gradients, can outweigh the rest of a training step. Here they exist for a few rows at a
    time: the gradient of a row's loss is known as soon as its logits are, softmax(logits) - onehot(target), so it is carried to
    x and weight at once and the logits are dropped.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        total = torch.zeros((), device=x.device)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        rows = max(1, LOGITS_AT_A_TIME.get(x.device.type, 2**24) // len(weight))
        for i in range(0, len(x), rows):
            target = targets[i : i + rows, None]
            kept = target != -100
            log_p = F.log_softmax(F.linear(x[i : i + rows], weight), dim=-1, dtype=torch.float32)
            target = target.clamp(min=0)
            total -= (log_p.gather(1, target) * kept).sum()
            gradient = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_p.dtype))
            gradient = (gradient * kept).to(x.dtype)
            dx[i : i + rows] = gradient @ weight
            dweight += gradient.T @ x[i : i + rows]
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx, scale):
        dx, dweight = ctx.saved_tensors
        return dx * scale, dweight * scale, None


class Transformer(nn.Module):
    """The whole model: `model(ids)` gives logits, `model.loss(ids, targets)` what training minimises."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
                layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                norm=RMSNorm(config.n_embd, config.norm_eps),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw fresh weights, so that training starts as an even guess over the vocabulary, a loss of ln V.

        The matrices that write into the stream (o_proj, down_proj) start at zero: every block is the identity at first, at any
        depth. The stream is then the bare embedding, and with a tied head a token scores *itself* sqrt(n_embd) * std_embd *
        sqrt(n_embd) after the norm: std 1/n_embd keeps that at 1, where the usual 0.02 would bet on repetition.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias") or "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.ones_(p)
            elif "embed_tokens" in name or "lm_head" in name:
                nn.init.normal_(p, std=1 / self.config.n_embd)
            else:
                nn.init.normal_(p, std=0.5 / math.sqrt(self.config.n_embd))

    def hidden(self, ids, cache=None):
        """ids (B, T) -> the final, normalised stream (B, T, C). With a cache, ids continue what it holds."""
        if cache is None:
            positions, mask = torch.arange(ids.size(1), device=ids.device), None
        else:
            positions, mask = cache.begin(ids.size(1))
        angles = positions[..., None] * self.frequencies  # (T, D/2) or (B, 1, T, D/2)
        x = self.model.embed_tokens(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, mask, cache and partial(cache.append, i, positions))
        if cache is not None:
            cache.advance(ids.size(1))
        return self.model.norm(x)

    def head(self, x):
        """x (..., C) -> logits (..., V)."""
        return self.lm_head(x)

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V): at each position the scores of the token that comes next."""
        return self.head(self.hidden(ids, cache))

    def loss(self, ids, targets, reduction="mean"):
        """Cross-entropy in nats of targets (B, T) given ids (B, T); targets of -100 are left out. reduction: "mean" or "sum"."""
        x, targets = self.hidden(ids).flatten(0, 1), targets.flatten()
        total = HeadLoss.apply(x, self.lm_head.weight, targets)
        return total / (targets != -100).sum() if reduction == "mean" else total

    def save(self, folder, tokenizer=None):
        """Write config.json, model.safetensors, generation_config.json and, with a tokenizer, its files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict()
        if self.config.tie_embeddings:
            del weights["lm_head.weight"]
        settings = config_to_json(self.config)
        generation = {}
        if tokenizer is not None:
            specials = tokenizer.special_tokens
            ends = [specials[name] for name in ("<|endoftext|>", "<|im_end|>") if name in specials]
            generation = {"eos_token_id": ends, "bos_token_id": ends[0], "pad_token_id": ends[0]} if ends else {}
            settings |= generation
            tokenizer.save_pretrained(folder)
        save_safetensors(folder / "model.safetensors", weights)
        (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        """Open a model folder, ours or Hugging Face's. dtype: None keeps what the files hold.

        Raises ValueError, naming what is wrong, for a folder that is no such model or whose settings this code doesn't know.
        """
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} is no model folder: it has no config.json")
        config = config_from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        weights = {}
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            weights |= load_safetensors(folder / name)
        if config.tie_embeddings:
            weights["lm_head.weight"] = weights.get("model.embed_tokens.weight")
        with torch.device("meta"):  # the shapes, without memory
            model = cls(config)
        expected = model.state_dict()
        problems = [f"{name} is missing" for name in expected if weights.get(name) is None]
        problems += [f"{name} is not part of this model" for name in weights if name not in expected]
        problems += [
            f"{name} has shape {tuple(w.shape)}, expected {tuple(expected[name].shape)}"
            for name, w in weights.items()
            if name in expected and w is not None and w.shape != expected[name].shape
        ]
        if problems:
            raise ValueError(f"the weights in {folder} don't fit its config.json: {'; '.join(problems)}")
        model.load_state_dict({name: w.to(device, dtype) for name, w in weights.items()}, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.frequencies = rope_frequencies(config, device)
        return model.eval().requires_grad_(True)


# --- files: config.json in Hugging Face's words, and the safetensors format (8 bytes of header length, JSON, raw bytes) ---

# our field -> theirs, where they are the same number
JSON_NAMES = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
ARCHITECTURES |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def config_to_json(config):
    """The dict that config.json holds, with the spellings that transformers 4 and 5 both read."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    settings = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "hidden_act": "silu", "dtype": "float32"}
    return settings | {theirs: getattr(config, ours) for ours, theirs in JSON_NAMES.items()}


def config_from_json(settings):
    """Read the dict of a config.json. Raises ValueError for whatever would change the arithmetic and is unknown here."""
    kind = settings.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {settings['hidden_act']!r} is not supported, only 'silu'")
    if settings.get("use_sliding_window", kind == "mistral") and settings.get("sliding_window"):
        raise ValueError(f"sliding_window {settings['sliding_window']} is not supported")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type {rope_type!r} is not supported, only 'default' and 'llama3'")
    if settings.get("attention_bias") and kind != "qwen2":
        raise ValueError("attention_bias is not supported: it puts a bias on o_proj too")
    values = {ours: settings[theirs] for ours, theirs in JSON_NAMES.items() if settings.get(theirs) is not None}
    values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    values["rope_scaling"] = rope if rope_type == "llama3" else None
    values.setdefault("n_kv_head", values["n_head"])
    values.setdefault("tie_embeddings", False)  # what transformers takes for granted
    return Config(**values, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def save_safetensors(path, tensors):
    """Write {name: tensor} to a file that appears only when it is complete."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = Path(f"{path}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_safetensors(path):
    """Read {name: tensor}. The tensors lie in the mapped file: pages are read when they are touched."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        flat = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=8 + length + begin)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def main():
    parser = argparse.ArgumentParser(description="Say what a model folder holds.")
    parser.add_argument("folder", metavar="DIR")
    model = Transformer.load(parser.parse_args().folder)
    for name, value in asdict(model.config).items():
        print(f"{name:16} {value}")
    print(f"{'parameters':16} {model.config.num_params():,}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
