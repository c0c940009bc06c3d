"""What optimizer.py promises: each weight in one optimizer, Muon as PyTorch computes it, a schedule."""

import pytest
import torch
from conftest import make_run

from optimizer import Muon, learning_rate, make_optimizers, orthogonalize


def test_every_parameter_has_one_optimizer_and_muon_takes_the_matrices_of_the_blocks(model):
    muon, adamw = make_optimizers(model, 0.01, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    of_muon, of_adamw = (
        {names[p] for group in o.param_groups for p in group["params"]} for o in (muon, adamw)
    )
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert all("_proj" in name for name in of_muon)
    assert "model.embed_tokens.weight" in of_adamw


def test_the_rate_warms_up_stays_and_falls_to_zero():
    run = make_run(steps=100, warmup=10)
    shares = [learning_rate(step, run) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1 and shares[39] == 1
    assert shares[70] == pytest.approx(0.5) and 0 < shares[99] < 0.02


def test_muon_computes_what_pytorch_s_muon_computes():
    """To the bit, though it takes matrices of one shape together."""
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (24, 8), (8, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        Muon([{"params": ours[:3]}, {"params": ours[3:], "lr": 0.1}], lr=0.02, weight_decay=0.1),
        torch.optim.Muon(
            [{"params": theirs[:3]}, {"params": theirs[3:], "lr": 0.1}], lr=0.02, weight_decay=0.1
        ),
    ]
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


def test_muon_leaves_a_weight_without_gradient_alone():
    frozen, p = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.eye(4)
    Muon([frozen, p], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(frozen, torch.ones(4, 4)) and not torch.equal(p, frozen)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape):
    torch.manual_seed(0)
    X = torch.randn(shape)
    result = orthogonalize(X).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3  # the smallest of 16 x 16 start near zero
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (U @ V).flatten(), dim=0) > 0.95
