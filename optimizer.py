"""From gradients to new weights: Muon for the matrices inside the blocks, AdamW for the rest.

weights <- weights - rate * direction          AdamW: each weight by itself, gradient / its usual size
                                               Muon: a matrix as a whole, the nearest orthogonal matrix
"""

import math

import torch
from torch.distributed.tensor import DTensor, Shard

from model import PRESETS


def learning_rate(step, run):
    """The share of the full rate at a step: linear warm-up, constant, the last 60 % linearly to zero."""
    return min(1, (step + 1) / run.warmup, (run.steps - step) / (0.6 * run.steps))


def orthogonalize(X):
    """The orthogonal matrices nearest to X (n, rows, columns), roughly: singular values from 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration, which needs nothing but matrix products and bears bfloat16. Its
    polynomial rises steeply at zero (Jordan et al., 2024, "Muon").
    """
    tall = X.size(-2) > X.size(-1)
    X = X.mT.bfloat16() if tall else X.bfloat16()
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the momentum: a matrix learns all directions at one pace.

    The same numbers as torch.optim.Muon, which takes one matrix at a time; here those of one shape go
    together. When many processes share the matrices by rows, each gets whole ones to orthogonalize.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alike = {}
            for p in (p for p in group["params"] if p.grad is not None):
                alike.setdefault(p.shape, []).append(p)
            for (rows, columns), params in alike.items():
                update = torch.stack([self.momentum(p, group["momentum"]) for p in params])
                if isinstance(update, DTensor):
                    update = orthogonalize(update.redistribute(placements=[Shard(0)]))
                    update = update.redistribute(placements=[Shard(1)])
                else:
                    update = orthogonalize(update)
                rate = group["lr"] * math.sqrt(max(1, rows / columns))  # equal steps whatever the shape
                for p, u in zip(params, update.unbind()):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-rate)

    def momentum(self, p, share):
        """Nesterov's: the running mean of the gradients, looking one step ahead."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - share)
        return p.grad.lerp(mean, share)


def make_optimizers(model, lr, weight_decay):
    """Muon for the matrices inside the blocks, AdamW for the rest.

    Muon's authors leave embedding and head to AdamW, and so do we. What the blocks write into the stream adds
    up over the depth, so those matrices go slower in a deeper model than nano.
    """
    readers, writers, tables, vectors = [], [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif ".layers." not in name:
            tables.append(p)
        elif "o_proj" in name or "down_proj" in name:
            writers.append(p)
        else:
            readers.append(p)
    slower = lr * PRESETS["nano"]["n_layer"] / model.config.n_layer
    matrices = [{"params": readers}, {"params": writers, "lr": slower}]
    others = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [
        Muon(matrices, lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=lr / 10, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]  # which the schedule multiplies
    return optimizers
