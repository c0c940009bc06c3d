"""From scores to tokens: feed in the newest token, draw the next one from the scores, and so on.

    logits -> repetition penalty -> / temperature -> top-k, top-p, min-p -> probabilities -> one token

`generate` is the loop. Above it stand small functions on scores, and what makes a step of one token fast;
below it `speculate`, where a smaller model guesses ahead. All this is about ids; sample.py makes them text.
"""

import copy
import math
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import nn

from model import KVCache

SMALL = 2**18  # numbers in a matrix up to which, for one row, oneDNN takes longer to begin than it saves

# --- from scores to one token ---


@dataclass
class Sampling:
    """How tokens are drawn. ValueError: a value has no meaning."""

    temperature: float = 0.8  # scores are divided by it; 0: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    top_p: float = 0.9  # draw from the likeliest tokens that together reach this probability
    min_p: float = 0.0  # draw from tokens that have at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens that were read or drawn before become less likely

    def __post_init__(self):
        least = 1e-30  # below it a float32 may become zero
        if self.temperature != 0 and not least <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be 0, for the likeliest token, or above")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top-k {self.top_k} must be a number of tokens, or 0 for all")
        if not least <= self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is outside (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min-p {self.min_p} is outside [0, 1]")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition penalty {self.repetition_penalty} is outside [0.01, 100]")


def penalize(logits, seen, penalty):
    """Scores of tokens that were seen, a mask (B, V), are divided by it, those below zero multiplied."""
    # Keskar et al. (2019, CTRL, sec. 4.1) divide all; with negative scores that would be a reward
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep(logits, order, kept):
    """Everything becomes -inf but the tokens `order` (B, k) where `kept` (B, k)."""
    values = logits.gather(-1, order).masked_fill(~kept, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, order, values)


def keep_top_k(logits, k):
    """Keep the k likeliest tokens of each row (Fan et al., 2018), no more when some are equally likely."""
    order = logits.topk(min(k, logits.size(-1))).indices
    return keep(logits, order, torch.ones_like(order, dtype=torch.bool))


def keep_top_p(logits, top_p, k=1024):
    """Keep the likeliest tokens that together reach probability top_p (Holtzman et al., 2020)."""
    # On a CPU, to sort all takes as long as a small model; mostly the k likeliest suffice. A GPU sorts fast,
    # and should not have to wait for the host to ask.
    k = min(k, logits.size(-1)) if logits.device.type == "cpu" else logits.size(-1)
    values, order = logits.topk(k)
    probabilities = (values - logits.logsumexp(-1, keepdim=True)).exp()
    if k < logits.size(-1) and probabilities.sum(-1).min() < top_p:
        return keep_top_p(logits, top_p, logits.size(-1))
    before = probabilities.cumsum(-1) - probabilities  # what likelier tokens have in sum
    return keep(logits, order, before < top_p)


def keep_min_p(logits, min_p):
    """Keep tokens of at least min_p times the probability of the likeliest one (Nguyen et al., 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)


def probabilities_of(logits, sampling):
    """The distribution (B, V) from which a token is drawn, given scores (B, V)."""
    logits = logits.float()
    if sampling.temperature == 0:
        return nn.functional.one_hot(logits.argmax(-1), logits.size(-1)).float()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # no overflow, however cold
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(-1)


def draw(probabilities, generator):
    """One id per row of (B, V): the winner of a race in which token i takes an Exponential(p_i) time."""
    # P(i is first) = p_i. On a CPU four times as fast as torch.multinomial; on a GPU nothing waits.
    uniform = torch.rand(probabilities.shape, generator=generator, device=probabilities.device)
    return (probabilities / -uniform.log()).argmax(-1)


# --- one step of one token for every row ---


class PackedLinear(nn.Module):
    """A matrix in oneDNN's own order, which a CPU reads about twice as fast; for decoding only."""

    def __init__(self, weight, bias):
        super().__init__()
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach()), bias
        small = weight.dtype == torch.float32 and weight.numel() <= SMALL
        self.columns = weight.detach().T.contiguous().T if small else None

    def forward(self, x):
        if self.columns is not None and x.numel() == x.size(-1):  # one row
            return nn.functional.linear(x, self.columns, self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")


def pack(model):
    """Replace the matrices of a model on a CPU by packed ones. It can't learn any more."""
    weight = model.model.norm.weight
    native = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    usable = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if usable and (native or weight.dtype == torch.float32):
        if model.lm_head is None:
            model.lm_head = PackedLinear(model.model.embed_tokens.weight, None)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child.weight, child.bias))
    return model


def one_token(model, cache, ids):
    """ids (B,), the newest of every row -> logits (B, V)."""
    return model.head(model.hidden(ids[:, None], cache)[:, -1])


def stepper(model, cache, mode):
    """one_token(model, cache, .) as a function of ids alone, made fast as generate's `mode` says."""
    step = partial(torch.compile(one_token) if mode == "compile" else one_token, model, cache)
    if mode != "eager" and cache.k.is_cuda:
        step = record(step, cache)
    elif mode != "compile":
        return step

    def run(ids):
        cache.reserve(1)  # a recorded step does not count
        return step(ids)

    return run


def record(step, cache):
    """The hundreds of kernels of a step as a CUDA graph: a step that one call launches as a whole."""
    ids, lengths, span = torch.zeros_like(cache.lengths), cache.lengths.clone(), cache.span
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # until all kernels are chosen and loaded; what they count is taken back
            step(ids)
            cache.lengths.copy_(lengths)
            cache.span = span
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(ids)

    def replay(new):
        ids.copy_(new)
        graph.replay()
        return logits

    return replay


def to_host(tensors):
    """Yield tensors as lists; from a GPU each one step late, so that the next is under way meanwhile."""
    copies = deque()
    for tensor in tensors:
        copies.append(start_copy(tensor))
        if len(copies) > tensor.is_cuda:
            yield copies.popleft()()
    for finish in copies:
        yield finish()


def start_copy(tensor):
    """Start to copy a tensor to the host. Returns a function that waits for it and returns a list."""
    on_host = tensor.to("cpu", non_blocking=tensor.is_cuda)
    if not tensor.is_cuda:
        return on_host.tolist
    copied = torch.cuda.Event()
    copied.record()
    return lambda: copied.synchronize() or on_host.tolist()


# --- the loop ---


def make_cache(model, batch_size, max_len):
    """An empty cache on the model's device, in its dtype."""
    weight = model.model.norm.weight
    return KVCache(model.config, batch_size, max_len, weight.device, weight.dtype)


def repeat(cache, n):
    """A cache with each row n times in a row, to continue one prompt in n ways."""
    other = copy.copy(cache)
    other.k, other.v = cache.k.repeat_interleave(n, dim=1), cache.v.repeat_interleave(n, dim=1)
    other.lengths = cache.lengths.repeat_interleave(n)
    return other


def draw_tokens(model, rows, room, n_samples, cache, mode, sampling, generator, vocab_size):
    """Yield the ids (B,) that are drawn, on the device. There is no end but that of a given cache.

    room: how many tokens besides the prompts a cache that is made here should hold, if the context allows.
    """
    device, context, given = model.model.norm.weight.device, model.config.block_size, cache
    penalty = sampling.repetition_penalty
    while True:
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        padded = [row + row[-1:] * (longest - len(row)) for row in rows]
        ids = torch.tensor(padded, device=device)  # (B, longest)
        if given is None:
            size = min(max(context, longest), longest + room)
            cache = make_cache(model, len(rows), size)
        held = cache.lengths.tolist()
        x = model.hidden(ids, cache)  # (B, longest, C)
        cache.truncate([h + n for h, n in zip(held, lengths)])
        x = x[range(len(rows)), [n - 1 for n in lengths]]  # (B, C), at each row's last token
        logits = model.head(x)[:, :vocab_size]
        if n_samples > 1:  # a single prefill serves them all
            cache, rows = repeat(cache, n_samples), [row for row in rows for _ in range(n_samples)]
            logits, ids = logits.repeat_interleave(n_samples, 0), ids.repeat_interleave(n_samples, 0)
            n_samples = 1
        seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
        step, drawn = None, []
        while True:
            if penalty != 1:
                seen.scatter_(1, ids, True)
                logits = penalize(logits, seen[:, :vocab_size], penalty)
            greedy = sampling.temperature == 0
            new = logits.argmax(-1) if greedy else draw(probabilities_of(logits, sampling), generator)
            ids = new[:, None]
            drawn.append(new)
            yield new
            if cache.span == cache.max_len:
                break
            step = step or stepper(model, cache, mode)
            logits = step(new)[:, :vocab_size]
        if given is not None:
            return
        half = max(1, context // 2)
        rows = [(row + new)[-half:] for row, new in zip(rows, torch.stack(drawn, 1).tolist())]


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_new_tokens=64,
    stop_ids=(),
    seed=0,
    n_samples=1,
    vocab_size=None,
    cache=None,
    mode=None,
    **sampling,
):
    """Continue prompts, lists of ids of any lengths but zero; yield at each step one new id per row.

    Rows are the n_samples of the first prompt, then those of the second ... A row that draws one of stop_ids
    has ended: from then on it yields None. Ids from vocab_size on are never drawn; sampling are the fields of
    Sampling. A row that outgrows the context goes on from its last half. With a cache, prompts continue what
    each row holds, until it is full. mode: "eager", "graph" (one CUDA graph a step, the default on a GPU) or
    "compile" (with fused kernels). Unusable settings raise ValueError.
    """
    sampling = Sampling(**sampling)
    if not prompts or not all(prompts) or n_samples < 1:
        raise ValueError("generate needs a prompt, of at least one token, and a sample")
    if cache is not None and len(cache.lengths) != len(prompts):
        raise ValueError(f"a cache of {len(cache.lengths)} rows does not go with {len(prompts)} prompts")
    device, context = model.model.norm.weight.device, model.config.block_size
    mode = mode or ("graph" if device.type == "cuda" else "eager")
    if mode not in ("eager", "graph", "compile"):
        raise ValueError(f"mode {mode!r} is none of eager, graph and compile")
    generator = torch.Generator(device).manual_seed(seed)
    rows, ended = [list(prompt[-context:]) for prompt in prompts], [False] * len(prompts) * n_samples
    tokens = draw_tokens(model, rows, max_new_tokens, n_samples, cache, mode, sampling, generator, vocab_size)
    for drawn in to_host(islice(tokens, max_new_tokens)):
        ended = [end or new in stop_ids for end, new in zip(ended, drawn)]
        if all(ended):
            return
        yield [None if end else new for end, new in zip(ended, drawn)]


def accept(p, q, proposed, generator):
    """Which of the proposed ids stand, and the one that follows them, as a list (Leviathan et al., 2023).

    proposed[i] was drawn from q[i] (V,); the model itself would have drawn from p[i]; p (n + 1, V). An id
    stands with probability min(1, p/q), else one is drawn from what p has more than q: the result follows p.
    """
    for i, new in enumerate(proposed):
        if torch.rand((), generator=generator, device=p.device) * q[i][new] >= p[i][new]:
            rest = (p[i] - q[i]).clamp(min=0)
            return [*proposed[:i], *draw(rest[None], generator).tolist()]
    return [*proposed, *draw(p[-1:], generator).tolist()]


@torch.inference_mode()
def speculate(
    model, prompts, draft, max_new_tokens=64, stop_ids=(), seed=0, vocab_size=None, n_draft=4, **sampling
):
    """generate for one prompt, in fewer steps of the model: a smaller draft guesses n_draft tokens ahead.

    The model reads all guesses at once, which takes hardly longer than one, and keeps those that `accept`
    lets stand. The tokens have the model's own distribution; greedy ones are the same (but for a draft of a
    shorter context, which shortens the model's).
    """
    sampling, (prompt,) = Sampling(**sampling), prompts
    if sampling.repetition_penalty != 1:
        raise ValueError("a draft does not go with a repetition penalty")
    device, context = model.model.norm.weight.device, min(model.config.block_size, draft.config.block_size)
    generator, made, caches = torch.Generator(device).manual_seed(seed), 0, None

    def read(reader, cache, ids, n):
        """Read what of ids the cache lacks; returns the distributions (n, V) after the last n of them."""
        x = reader.hidden(torch.tensor([ids[cache.span :]], device=device), cache)
        return probabilities_of(reader.head(x[0, -n:])[:, :vocab_size], sampling)

    ids = list(prompt[-context:])
    while made < max_new_tokens:
        if not caches or len(ids) > context:  # as in draw_tokens
            ids = ids[-max(1, context // 2) :] if len(ids) > context else ids
            caches = [make_cache(reader, 1, context) for reader in (model, draft)]
        proposed, q = [], []
        for _ in range(min(n_draft, context - len(ids))):
            q.append(read(draft, caches[1], ids + proposed, 1)[0])
            proposed += draw(q[-1][None], generator).tolist()
        p = read(model, caches[0], ids + proposed, len(proposed) + 1)
        for new in accept(p, q, proposed, generator)[: max_new_tokens - made]:
            if new in stop_ids:
                return
            ids.append(new)
            made += 1
            yield [new]
        for cache in caches:  # of the rejected guesses nothing is kept
            cache.truncate([min(cache.span, len(ids) - 1)])
