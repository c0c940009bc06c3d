"""Stage 2: the Transformer. Token ids in, one row of scores ("logits") per position out.

    ids -> embed_tokens -> n_layer x [x += attention(norm(x)); x += mlp(norm(x))] -> norm -> lm_head -> logits

This is the Llama architecture (Touvron et al., 2023), and its parameters have the names that Hugging Face's
LlamaForCausalLM gives them: a saved folder opens in transformers and vLLM as it is, and their Llama, Mistral,
SmolLM, Qwen2 and Qwen3 folders open here.

    python model.py DIR        say what a folder holds
"""

import argparse
import json
import math
import mmap
import os
import shutil
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
    dropout: float = 0.0  # on the two branches of a block, for data that is seen many times
    # What checkpoints in the wild differ in; each acts in one line of the code below.
    tie_embeddings: bool = True  # one matrix for the embedding and the head
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    rope_scaling: dict | None = None  # Llama 3.1

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head and not self.head_dim:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
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


# Shapes without a vocabulary. Heads of 64 channels; the MLP is about 8/3 as wide as the stream, so that its
# three matrices cost what the two of a 4x MLP do (Shazeer, 2020), rounded to what matrix units like. small,
# medium and large have the depth and width of GPT-2's.
PRESETS = {
    "nano": dict(n_layer=4, n_head=3, n_kv_head=3, n_embd=192, n_hidden=512),
    "micro": dict(n_layer=8, n_head=6, n_kv_head=3, n_embd=384, n_hidden=1024),
    "small": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_hidden=2048),
    "medium": dict(n_layer=24, n_head=16, n_kv_head=8, n_embd=1024, n_hidden=2816),
    "large": dict(n_layer=36, n_head=20, n_kv_head=10, n_embd=1280, n_hidden=3456),
}


def rope_frequencies(config, device=None):
    """Angle per position of the D/2 rotating pairs, theta^(-2i/D) (Su et al., 2021, sec. 3.2.2), float32."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    if scaling := config.rope_scaling:
        # Llama 3.1 stretches the context: pairs that turn slowly within the first training's context are
        # slowed down by `factor`, fast ones are kept, those between are blended.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    return frequencies


def apply_rope(x, cos, sin):
    """Rotate each pair (i, i + D/2) of x by the angle of its position.

    x (B, H, T, D); cos, sin (T, D/2) or (B, 1, T, D/2). After it, q at position m and k at position n meet in
    a dot product that depends on m - n alone (Su et al., 2021, eq. 16). Half-split layout, as in Hugging
    Face's Llama.
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


def causal_attention(q, k, v):
    """Each position attends to itself and those before. q (B, H, T, D); k, v (B, K, T, D); K divides H."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # on a CPU, flash attention is far slower in bfloat16
            return causal_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention: softmax(q k^T / sqrt(D)) v over the positions up to and with its own.

    n_head query heads share n_kv_head heads of keys and values (Ainslie et al., 2023).
    """

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
            y = causal_attention(q, k, v)
        else:
            # The query heads of a group become further query positions of their one key/value head: with
            # `enable_gqa` and a mask, CUDA would fall back to the slow math kernel.
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
    """One layer: each sublayer reads a normalised copy of the stream and adds its result to the stream."""

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

    @property
    def nbytes(self):
        """2 x layers x rows x kv heads x length x head_dim x bytes of the dtype."""
        return self.k.nbytes + self.v.nbytes

    def begin(self, T):
        """Positions of the next T tokens of each row, and which positions each may see (None: causal)."""
        if self.span + T > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens, not for {self.span} + {T}")
        new = torch.arange(T, device=self.lengths.device)
        if self.span == 0:
            return new, None
        positions = self.lengths[:, None, None] + new  # (B, 1, T)
        everything = torch.arange(self.span + T, device=new.device)
        return positions, everything <= positions[..., None]  # (B, 1, T, S)

    def append(self, layer, positions, k, v):
        """Keep a layer's k, v (B, K, T, D) of new positions; returns all that it has now, (B, K, S, D)."""
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
    """The sum of the cross-entropies of x (N, C) @ weight.T against targets (N,), in nats; -100 is left out.

    All logits in float32, with their gradients, can outweigh the rest of a training step. Here they exist for
    a few rows at a time: the gradient of a row's loss is known as soon as its logits are, softmax(logits) -
    onehot(target), so it is carried on to x and weight at once and the logits are dropped.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        total = torch.zeros((), device=x.device)
        training = any(ctx.needs_input_grad)
        if training:
            dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        rows = max(1, LOGITS_AT_A_TIME.get(x.device.type, 2**24) // len(weight))
        for i in range(0, len(x), rows):
            piece, target = x[i : i + rows], targets[i : i + rows, None]
            kept, target = target != -100, target.clamp(min=0)
            log_p = F.log_softmax(F.linear(piece, weight), dim=-1, dtype=torch.float32)
            total -= (log_p.gather(1, target) * kept).sum()
            if training:
                gradient = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
                gradient = (gradient * kept).to(x.dtype)
                dx[i : i + rows] = gradient @ weight
                dweight += gradient.T @ piece
        if training:
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
        self.model = nn.ModuleDict()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.model.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw fresh weights that start as an even guess over the vocabulary, a loss of ln V.

        The matrices that write into the stream (o_proj, down_proj) start at zero: every block is the identity
        at first, at any depth. The stream is then the bare embedding, brought to length sqrt(n_embd) by the
        norm, and with a tied head a token scores *itself* n_embd * std: a std of 1/n_embd keeps that at 1,
        where the usual 0.02 would bet on repetition.
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
        angles = positions[..., None] * rope_frequencies(self.config, ids.device)  # (..., T, D/2)
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
        """Cross-entropy in nats, "mean" or "sum", of targets (B, T) given ids (B, T); -100 is left out."""
        x, targets = self.hidden(ids).flatten(0, 1), targets.flatten()
        weight = self.lm_head.weight
        total = HeadLoss.apply(x, weight if torch.is_grad_enabled() else weight.detach(), targets)
        return total / (targets != -100).sum() if reduction == "mean" else total

    def save(self, folder, tokenizer=None):
        """Write config.json, generation_config.json, model.safetensors and, with a tokenizer, its files.

        They are written to a folder inside and then put in place one by one, so that all of them are whole.
        """
        specials = tokenizer.special_tokens if tokenizer else {}
        ends = [specials[name] for name in ("<|endoftext|>", "<|im_end|>") if name in specials]
        generation = {"bos_token_id": ends[0], "pad_token_id": ends[0], "eos_token_id": ends} if ends else {}
        weights = self.state_dict()
        if self.config.tie_embeddings:
            del weights["lm_head.weight"]
        unfinished = Path(folder) / "unfinished"
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            settings = {"config.json": config_to_json(self.config) | generation}
            settings["generation_config.json"] = generation
            for name, value in settings.items():
                (unfinished / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
            save_safetensors(unfinished / "model.safetensors", weights)
            if tokenizer:
                tokenizer.save_pretrained(unfinished)
            for path in sorted(unfinished.iterdir()):
                os.replace(path, unfinished.parent / path.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        """Open a model folder, ours or Hugging Face's. dtype None: as in the file. Unusable: ValueError."""
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} is no model folder: it has no config.json")
        config = config_from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        names = ["model.safetensors"]
        if (index := folder / "model.safetensors.index.json").exists():  # large models come in several files
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        weights = {}
        for name in names:
            weights |= load_safetensors(folder / name)
        if config.tie_embeddings and "model.embed_tokens.weight" in weights:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        try:
            model.load_state_dict({name: w.to(device, dtype) for name, w in weights.items()}, assign=True)
        except RuntimeError as mismatch:  # it lists all that is missing, unexpected or of another shape
            raise ValueError(f"{folder} is inconsistent: {' '.join(str(mismatch).split())}") from None
        if config.tie_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval().requires_grad_()


# --- files: config.json in Hugging Face's words; safetensors: 8 bytes of header length, JSON, raw bytes ---

# our fields and theirs, where they hold the same value
JSON_NAMES = dict(
    vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size",
    n_hidden="intermediate_size", head_dim="head_dim", norm_eps="rms_norm_eps",
    rope_theta="rope_theta", rope_scaling="rope_scaling", tie_embeddings="tie_word_embeddings",
)  # fmt: skip
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def config_to_json(config):
    """What config.json holds, in the spellings that transformers 4 and 5 both read."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    fixed = {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"]}
    fixed |= {"hidden_act": "silu", "dtype": "float32"}
    return fixed | {theirs: getattr(config, ours) for ours, theirs in JSON_NAMES.items()}


def config_from_json(settings):
    """Read what config.json holds. Whatever would change the arithmetic and is unknown here: ValueError."""
    kind = settings.get("model_type")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    sliding = settings.get("use_sliding_window", kind == "mistral") and settings.get("sliding_window")
    for field, value, supported in (
        ("model_type", kind, MODEL_TYPES),
        ("hidden_act", settings.get("hidden_act", "silu"), ("silu",)),
        ("sliding_window", sliding, (None, False)),
        ("rope_type", rope_type, ("default", "llama3")),
        ("attention_bias", settings.get("attention_bias", False), (False, kind == "qwen2")),
    ):
        if value not in supported:
            raise ValueError(f"{field} {value!r} in config.json is not supported, only {supported}")
    values = {ours: settings[theirs] for ours, theirs in JSON_NAMES.items() if theirs in settings}
    needed = ("vocab_size", "n_layer", "n_head", "n_embd", "n_hidden")
    if missing := [JSON_NAMES[name] for name in needed if name not in values]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    values["rope_theta"] = rope.get("rope_theta") or values.get("rope_theta") or 10000.0
    values["rope_scaling"] = rope if rope_type == "llama3" else None
    values["head_dim"] = values.get("head_dim") or 0
    values.setdefault("n_kv_head", values["n_head"])
    values.setdefault("tie_embeddings", False)  # what transformers takes for granted
    return Config(**values, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def save_safetensors(path, tensors):
    """Write {name: tensor} to a file, down to the disk."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def load_safetensors(path):
    """Read {name: tensor}. The tensors lie in the mapped file: pages are read when they are touched."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError):
        raise ValueError(f"{path} is no safetensors file") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + begin)
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
