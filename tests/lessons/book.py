"""What the lessons share: a text, tiny models, a training loop, tables and pictures."""

import copy

import torch
from torch import nn

from model import Config, Transformer, rope

# Abraham Lincoln's address at Gettysburg, 1863
SPEECH = """\
Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in \
Liberty, and dedicated to the proposition that all men are created equal.
Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so \
dedicated, can long endure. We are met on a great battle-field of that war. We have come to dedicate a \
portion of that field, as a final resting place for those who here gave their lives that that nation might \
live. It is altogether fitting and proper that we should do this.
But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. \
The brave men, living and dead, who struggled here, have consecrated it, far above our poor power to add or \
detract. The world will little note, nor long remember what we say here, but it can never forget what they \
did here. It is for us the living, rather, to be dedicated here to the unfinished work which they who \
fought here have thus far so nobly advanced. It is rather for us to be here dedicated to the great task \
remaining before us -- that from these honored dead we take increased devotion to that cause for which they \
gave the last full measure of devotion -- that we here highly resolve that these dead shall not have died \
in vain -- that this nation, under God, shall have a new birth of freedom -- and that government of the \
people, by the people, for the people, shall not perish from the earth.
"""
CHARACTERS = sorted(set(SPEECH))

LLAMA_2_7B = dict(vocab_size=32_000, n_embd=4096, n_layer=32, n_head=32, n_kv_head=32, n_hidden=11_008)
LLAMA_3_8B = dict(vocab_size=128_256, n_embd=4096, n_layer=32, n_head=32, n_kv_head=8, n_hidden=14_336)


def to_ids(text):
    """One id per character, (T,)."""
    return torch.tensor([CHARACTERS.index(character) for character in text])


def to_text(ids):
    return "".join(CHARACTERS[i] for i in ids)


def tiny_config(**changes):
    shape = dict(vocab_size=64, block_size=256, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=192)
    return Config(**shape | changes)


def drawn_model(**changes):
    """A tiny model whose every matrix is random; before training, the blocks of a new one do nothing."""
    model = Transformer(tiny_config(**changes))
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.size(1) ** -0.5)
    return model


def forward(model, inputs, mask=None, positions=None):
    """model(ids), spelled out, so that a lesson can change something on the way.

    inputs: ids (B, T) or vectors (B, T, C); mask: True where the query of a row sees the key of a column,
    (T, T) or (B, 1, T, T), None for causal; positions (T,).
    """
    x = inputs if inputs.is_floating_point() else model.model.embed_tokens(inputs)
    T = x.size(1)
    cos, sin = rope(torch.arange(T) if positions is None else positions, model.config, x.dtype)
    for block in model.model.layers:
        x = block(x, cos, sin, mask if mask is None else mask.expand(len(x), 1, T, T))
    return model.head(model.model.norm(x))


@torch.no_grad()
def weights_of(attention, x, positions=None, mask=None):
    """The weights (H, T, T) with which an Attention of model.py averages, for x (T, C); T <= head_dim.

    It is given values that are one-hot vectors, of the position: what comes out of each head are its weights.
    positions (T,): 0, 1, 2 ... if None. mask as in `forward`.
    """
    attention, (T, D) = copy.deepcopy(attention), (len(x), attention.head_dim)
    K, H = (linear.out_features // D for linear in (attention.k_proj, attention.q_proj))
    values = torch.eye(T, D).repeat(1, K)  # (T, K * D)
    attention.v_proj.register_forward_hook(lambda module, args, output: values[None])
    attention.o_proj = nn.Identity()
    shape = tiny_config(n_embd=H * D, n_head=H, n_kv_head=K)
    cos, sin = rope(torch.arange(T) if positions is None else positions, shape, x.dtype)
    y = attention(x[None], cos, sin, mask if mask is None else mask.expand(1, 1, T, T))  # (1, T, H * D)
    return y[0].view(T, H, D)[..., :T].transpose(0, 1)


def causal(T):
    """Which keys a query sees: those up to its own position."""
    return torch.ones(T, T, dtype=torch.bool).tril()


def train(model, batch, steps, lr, loss=None):
    """AdamW for some steps, 20 of them up to lr, then down to a tenth of it. batch(step) -> ids, targets."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        value = (loss or model.loss)(*batch(step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return value.item()


def table(heads, *rows):
    """Print rows in aligned columns under their heads."""
    lines = [heads.split("|"), *([show(value) for value in row] for row in rows)]
    widths = [max(len(line[column].strip()) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("    " + "   ".join(cell.strip().ljust(width) for cell, width in zip(line, widths)).rstrip())


pictures = []  # what the lesson that runs has drawn; conftest.py empties it before each, index.py makes SVGs


def lines(title, xlabel, ylabel, curves, log=""):
    """Draw curves {name: (xs, ys)}; log: "x", "y" or "xy" for logarithmic axes."""
    curves = {name: (numbers(xs), numbers(ys)) for name, (xs, ys) in curves.items()}
    pictures.append(dict(kind="lines", title=title, xlabel=xlabel, ylabel=ylabel, curves=curves, log=log))


def bars(title, ylabel, groups):
    """Draw bars {group: {name: height}}; each group has the same names."""
    pictures.append(dict(kind="bars", title=title, ylabel=ylabel, groups=groups))


def squares(title, matrices):
    """Draw matrices {name: (rows, columns)} as squares, dark where a value is 1, white where it is 0."""
    matrices = {name: [numbers(row) for row in matrix] for name, matrix in matrices.items()}
    pictures.append(dict(kind="squares", title=title, matrices=matrices))


def numbers(values):
    """A tensor or any sequence of numbers as a list of floats."""
    return [float(value) for value in values]


def show(value):
    """A value as people write it: 1,310,720, 0.235, 3e-07, yes."""
    value = value.item() if torch.is_tensor(value) and value.numel() == 1 else value
    value = value.tolist() if torch.is_tensor(value) else value
    match value:
        case bool():
            return "yes" if value else "no"
        case 0:  # -0.0, too
            return "0"
        case int():
            return f"{value:,}"
        case float() if value and abs(value) < 1e-3:
            return f"{value:.0e}"
        case float():
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case list() | tuple():
            return " ".join(show(part) for part in value)
    return str(value)


def moved_by(function, x, position):
    """By how much each output moves when x, ids (1, T) or vectors (1, T, C), changes at one place: (T,)."""
    changed = x.clone()
    changed[0, position] = x[0, position] + 1 if x.is_floating_point() else (x[0, position] + 1) % 64
    return (function(changed) - function(x))[0].abs().amax(-1)


def places(condition):
    """The positions at which a condition (T,) holds, as a list."""
    return condition.nonzero().flatten().tolist()


def largest(difference):
    """The largest absolute value in a tensor, as a float."""
    return difference.abs().max().item()
