"""Direct preference optimisation (Rafailov et al., 2023): from pairs of answers, which one is wanted.

    loss = -log sigmoid(beta (log p(chosen) / p0(chosen) - log p(rejected) / p0(rejected)))

p is the model that learns, p0 the one that it began as. No reward is modelled and nothing is drawn: the odds
of the chosen answer against the rejected one are raised, and beta is what leaving p0 costs.
"""

import torch
import torch.nn.functional as F

import machine
from data.loader import IGNORED
from machine import over_processes, processes

MEASURES = ("loss", "margin", "accuracy", "log_p_chosen", "log_p_rejected")  # of a pair


def log_probs(model, ids, targets):
    """ids, targets (B, T) -> log p of each row's targets in sum, (B,)."""
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    logits = model.head(model.hidden(ids)[rows, columns]).float()  # only where there is a target
    log_p = logits.log_softmax(-1).gather(1, targets[rows, columns, None])[:, 0]
    return log_p.new_zeros(len(ids)).index_add(0, rows, log_p)


def dpo_loss(model, ids, targets, reference, beta, likelihood):
    """-log sigmoid(margin), with margin = beta (log-ratio of chosen - log-ratio of rejected), eq. 7.

    ids, targets (n, 2, T): chosen and rejected; reference (n, 2): their log p in the model at the start. A
    share of the chosen answer's loss per token can be added, or both answers may become unlikely (Pang et
    al., 2024). Returns the sum and, of each pair, what MEASURES names.
    """
    log_p = log_probs(model, ids.flatten(0, 1), targets.flatten(0, 1)).view(-1, 2)
    n_tokens = (targets[:, 0] != IGNORED).sum(1)
    chosen, rejected = (log_p - reference).unbind(1)
    margin = beta * (chosen - rejected)
    loss = -F.logsigmoid(margin) - likelihood * log_p[:, 0] / n_tokens.clamp(min=1)
    rows = torch.stack((loss, margin, (margin > 0).float(), *log_p.unbind(1)), 1) * (n_tokens > 0)[:, None]
    return rows[:, 0].sum(), rows.detach()


@torch.no_grad()
def cache_references(model, examples, run):
    """Keep log p of all answers before the first step in `examples`, instead of a second model in memory."""
    device, found, (rank, world) = (
        model.model.norm.weight.device,
        torch.zeros_like(examples.references),
        processes(),
    )
    for indices in examples.by_length(run.micro_batch * world):
        mine = indices[rank::world]
        ids, targets, *_ = examples.tensors(indices, rank, world)
        with machine.precision(device.type, run.dtype):  # as in training, or the loss would not start at ln 2
            log_p = log_probs(model, ids.flatten(0, 1).to(device), targets.flatten(0, 1).to(device))
        found[mine] = log_p.view(-1, 2)[: len(mine)].cpu()
    examples.references = over_processes(found).float()
