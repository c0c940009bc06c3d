"""Low-rank adaptation (Hu et al., 2021): to train a thin update of each matrix instead of the matrix.

    W x  ->  W x + (alpha / r) B (A x)        W (out, in) is frozen; A (r, in) and B (out, r) learn

B starts at zero, so the first step is the base model's. Afterwards W + (alpha / r) B A is a matrix like any
other: a merged model is as fast and as plain as its base. By itself, an update is saved as `peft` does it.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import load_safetensors, save_safetensors

PREFIX = "base_model.model."  # of PEFT's names, which also end in .weight
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """A linear layer whose weight is frozen, and its update of rank r."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        bound = 1 / math.sqrt(linear.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return super().forward(x) + self.scale * F.linear(F.linear(x, A), B)


def add_lora(model, rank, alpha):
    """Freeze a model and give all matrices of its blocks an update. ValueError: the rank does not suit it."""
    if not 1 <= rank <= model.config.n_embd:
        raise ValueError(f"--lora-rank {rank} must be from 1 to the model's width, {model.config.n_embd}")
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if name in MATRICES:
                    setattr(part, name, LoRALinear(child, rank, alpha))
    return model


def num_lora_params(config, rank):
    """Number of trained parameters, in closed form: r (in + out) for each matrix."""
    C, Q, KV = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    return config.n_layer * rank * (2 * (C + Q) + 2 * (C + KV) + 3 * (C + config.n_hidden))


def merge(weights, scale):
    """The weights of a model with LoRA -> those of a plain one."""
    merged = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name in (name for name in weights if name.endswith(".lora_A")):
        A, B = weights[name].float(), weights[name[:-1] + "B"].float()
        place = name.replace("lora_A", "weight")
        merged[place] = (merged[place].float() + scale * B @ A).to(merged[place].dtype)
    return merged


def save_adapter(folder, weights, rank, alpha, base):
    """Write the update alone, in the layout of PEFT. base: the folder of the model that it belongs to."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    settings |= {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    settings |= {"target_modules": list(MATRICES), "fan_in_fan_out": False, "modules_to_save": None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    update = {f"{PREFIX}{name}.weight": weight for name, weight in weights.items() if ".lora_" in name}
    save_safetensors(folder / "adapter_model.safetensors", update)


def load_adapter(folder):
    """Read what save_adapter or PEFT wrote -> (weights, rank, alpha). ValueError: it is something else."""
    folder, others = Path(folder), ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    try:
        settings = json.loads((folder / "adapter_config.json").read_bytes())
        rank, alpha, matrices = settings["r"], settings["lora_alpha"], settings["target_modules"]
        odd = [name for name in others if settings.get(name)]
        if odd or set(matrices) != set(MATRICES):
            raise ValueError(f"it adapts {matrices} {odd or ''}, not {MATRICES}")
        update = load_safetensors(folder / "adapter_model.safetensors")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no adapter that fits here: {error!r:.200}") from None
    return {n.removeprefix(PREFIX).removesuffix(".weight"): w for n, w in update.items()}, rank, alpha


def base_of(folder):
    """The folder of the model that an adapter says it belongs to. ValueError: it names none that is there."""
    load_adapter(folder)
    base = json.loads((Path(folder) / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    if not base or not (Path(base) / "config.json").exists():
        raise ValueError(f"{folder} belongs to the model {base!r}, which is not there: name it with --model")
    return Path(base)


def put_adapter(model, folder):
    """Give a model with LoRA the update that a folder holds. ValueError: it is that of another model."""
    update, _, _ = load_adapter(folder)
    own = {name: p.shape for name, p in model.named_parameters() if ".lora_" in name}
    if {name: weight.shape for name, weight in update.items()} != own:
        raise ValueError(f"{folder} is an update of a model of another shape")
    model.load_state_dict(update, strict=False)
