"""Fine-tuning: what is learned of a conversation, thin updates, forgetting, preferences, rewards."""

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import finetune
from data.examples import Example, Examples, encode_conversation
from data.loader import Blocks
from finetune import (
    LoRALinear,
    PreferenceLoss,
    RewardLoss,
    add_lora,
    add_replay,
    advantages,
    count_targets,
    draw_answers,
    is_right,
    log_probs,
    measure_preference,
    measure_rewards,
    merge,
    merge_equal,
    save_adapter,
)
from model import Config, KVCache, Transformer, rope
from tokenizer import GPT4_PATTERN, SPECIAL_TOKENS, Tokenizer, learn_merges, tokenizer_json

from .book import (
    LLAMA_2_7B,
    LLAMA_3_8B,
    bars,
    drawn_model,
    forward,
    largest,
    lines,
    places,
    table,
    tiny_config,
    train,
)

# --- conversations ---


def tokenizer_of(characters):
    """A tokenizer for these characters, with "user", "assistant" and the marks of a chat as tokens."""
    merges = learn_merges({"user": 1, "assistant": 1}, 20)
    tokens = sorted({character.encode() for character in characters + "userassistant\n"})
    tokens += [left + right for left, right in merges]
    ids = {token: i for i, token in enumerate(tokens)}
    specials = {text: len(ids) + i for i, text in enumerate(SPECIAL_TOKENS)}
    return Tokenizer(tokenizer_json(ids, merges, GPT4_PATTERN, specials))


def talk(*texts):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


# --- two languages: one that the base knows, one that it shall learn ---


def sentences(language, n, length=17):
    """n sentences of a language, a matrix p(next | token), as ids (n, length)."""
    ids = [torch.randint(len(language), (n,))]
    for _ in range(length - 1):
        ids.append(torch.multinomial(language[ids[-1]], 1)[:, 0])
    return torch.stack(ids, 1)


def batches_of(language, n=12):
    def batch(step):
        ids = sentences(language, n)
        return ids[:, :-1], ids[:, 1:]

    return batch


def old_and_new():
    """Two languages, a model that has learned the old one, and a test of each."""
    old, new = (torch.randn(2, 12, 12) * 2.5).softmax(-1)
    model = Transformer(tiny_config(vocab_size=12, n_layer=1, n_embd=32, n_head=2, n_kv_head=2, n_hidden=96))
    train(model, batches_of(old), 120, 1e-2)
    return old, new, model, [sentences(language, 64) for language in (old, new)]


def loss_on(model, ids):
    """The mean loss of anything that gives logits."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


# --- ways to train few weights, besides finetune.py's LoRA ---

NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]


def round_to(levels, weight, block=64):
    """Weights rounded to levels between -1 and 1, times the largest of each block."""
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scales)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scales).view_as(weight)


def in_4_bits(model):
    """Round every matrix of a model's blocks to the 16 levels of NF4."""
    for p in model.model.layers.parameters():
        if p.ndim == 2:
            p.data = round_to(torch.tensor(NF4), p.data)
    return model


class Adapter(nn.Module):
    """A sublayer, and behind it y + up(relu(down(y))), where up is zero at first."""

    def __init__(self, sublayer, C, r):
        super().__init__()
        self.sublayer = sublayer
        self.down, self.up = nn.Linear(C, r, bias=False), nn.Linear(r, C, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, *args):
        y = self.sublayer(*args)
        return y + self.up(F.relu(self.down(y)))


def add_adapters(model, r):
    """Freeze a model and put an adapter behind both sublayers of each block."""
    model.requires_grad_(False)
    for block in model.model.layers:
        block.self_attn = Adapter(block.self_attn, model.config.n_embd, r)
        block.mlp = Adapter(block.mlp, model.config.n_embd, r)
    return model


class Prompt(nn.Module):
    """A frozen model that reads n learned vectors before each text."""

    def __init__(self, model, n):
        super().__init__()
        self.model = model.requires_grad_(False)
        drawn = torch.randint(model.config.vocab_size, (n,))  # start as tokens
        self.vectors = nn.Parameter(model.model.embed_tokens.weight[drawn].clone())

    def forward(self, ids):
        x = self.model.model.embed_tokens(ids)
        x = torch.cat((self.vectors.expand(len(x), -1, -1), x), 1)
        return forward(self.model, x)[:, len(self.vectors) :]


class Prefix(nn.Module):
    """A frozen model in which each layer sees n learned keys and values before those of the text."""

    def __init__(self, model, n):
        super().__init__()
        self.model, c = model.requires_grad_(False), model.config
        self.learned = nn.Parameter(0.5 * torch.randn(c.n_layer, 2, c.n_kv_head, n, c.head_dim))

    def forward(self, ids):
        B, T, n = len(ids), ids.size(1), self.learned.size(3)
        x = self.model.model.embed_tokens(ids)
        cos, sin = rope(torch.arange(n, n + T), self.model.config, x.dtype)
        mask = torch.ones(T, n + T, dtype=torch.bool).tril(n).expand(B, 1, T, n + T)
        for block, learned in zip(self.model.model.layers, self.learned):
            keys, values = learned[:, None].expand(-1, B, -1, -1, -1)  # (B, K, n, D) each

            def append(k, v, keys=keys, values=values):
                return torch.cat((keys, k), 2), torch.cat((values, v), 2)

            x = block(x, cos, sin, mask, append)
        return self.model.head(self.model.model.norm(x))


class AdaLoRALinear(nn.Module):
    """An update P diag(strengths) Q of a frozen matrix, whose directions are scored by importance."""

    def __init__(self, C, r):
        super().__init__()
        self.P, self.Q = (nn.Parameter(torch.randn(*shape) / C**0.5) for shape in ((C, r), (r, C)))
        self.strengths = nn.Parameter(torch.zeros(r))
        self.mean, self.deviation = ([torch.zeros_like(p) for p in self.parameters()] for _ in range(2))

    def forward(self, x):
        return (x @ self.Q.T * self.strengths) @ self.P.T

    def skew(self):
        """How far P and Q are from orthonormal directions."""
        eye = torch.eye(len(self.strengths))
        return (self.P.T @ self.P - eye).pow(2).sum() + (self.Q @ self.Q.T - eye).pow(2).sum()

    @torch.no_grad()
    def importance(self):
        """Of each direction (r,): |weight * gradient| and its variation, both averaged over steps."""
        scores = []
        for p, mean, deviation in zip(self.parameters(), self.mean, self.deviation):
            now = (p * p.grad).abs()
            mean.lerp_(now, 0.15)
            deviation.lerp_((now - mean).abs(), 0.15)
            scores.append(mean * deviation)
        of_P, of_Q, of_strengths = scores  # (C, r), (r, C), (r,)
        return of_strengths + of_P.mean(0) + of_Q.mean(1)


@torch.no_grad()
def keep_most_important(layers, n):
    """Set the strengths of all but the n most important directions of all layers to zero."""
    importance = torch.stack([layer.importance() for layer in layers])
    least = importance.flatten().topk(n).values[-1]
    for layer, scores in zip(layers, importance):
        layer.strengths *= scores >= least


# --- a policy that answers one question by one token, and ways to improve it ---


class RewardModel(nn.Module):
    """A language model with one output, read at the last token: ids (n, T) -> rewards (n,)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.output = model, nn.Linear(model.config.n_embd, 1)

    def forward(self, ids):
        return self.output(self.model.hidden(ids)[:, -1])[:, 0]


def adamw(*modules):
    return torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=3e-3, weight_decay=0)


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def draw_tokens(policy, n):
    """A question, of token 0, n times, and n answers to it: ids and targets (n, 1)."""
    ids = torch.zeros(n, 1, dtype=torch.long)
    return ids, torch.multinomial(policy(ids)[:, -1].softmax(-1), 1)


def clipped_gain(ratio, advantage):
    """What PPO maximises for each answer."""
    return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def reinforce(policy, rate, rounds, n):
    """-> the answers drawn, and the optimizer."""
    objective, optimizer = RewardLoss(policy), adamw(policy)
    for _ in range(rounds):
        ids, targets = draw_tokens(policy, n)
        loss, _ = objective(ids, targets, advantages(rate(ids, targets)[None])[0])
        update(optimizer, loss / n)
    return rounds * n, optimizer


def ppo(policy, critic, reference, rate, rounds, n, n_updates=4, beta=0.05):
    optimizer = adamw(policy, critic)
    for _ in range(rounds):
        ids, targets = draw_tokens(policy, n)
        with torch.no_grad():
            before = log_probs(policy, ids, targets)
            rewards = rate(ids, targets) - beta * (before - log_probs(reference, ids, targets))
            advantage = rewards - critic(ids)
        for _ in range(n_updates):
            ratio = (log_probs(policy, ids, targets) - before).exp()
            gain = clipped_gain(ratio, advantage).mean()
            update(optimizer, (critic(ids) - rewards).pow(2).mean() - gain)
    return rounds * n, optimizer


def dpo(objective, pairs, rounds):
    """pairs (n, 2, 1): the preferred answers, and those that were rejected."""
    optimizer = adamw(objective.model)
    for _ in range(rounds):
        loss, _ = objective(torch.zeros_like(pairs), pairs)
        update(optimizer, loss / len(pairs))
    return 0, optimizer


def numbers_held(optimizer, *models):
    """Weights and gradients of these models, and the optimizer's moments of them."""
    weights = {p for model in models for p in model.parameters()}
    n = sum(p.numel() for p in weights)
    n += sum(p.numel() for p in weights if p.grad is not None)
    for state in optimizer.state.values():
        n += state["exp_avg"].numel() + state["exp_avg_sq"].numel()
    return n


# --- lessons ---


def test_sft_learns_the_next_token_of_answers_only():
    """How does supervised fine-tuning (SFT) differ from pretraining?

    Model and loss are the same; the text is a conversation. Usually all targets outside the answers are set
    to -100: the loss is the mean over the tokens of the answers, with the token that ends each, and the
    questions are what they are predicted from.

    Often told: it is another kind of learning. It is the cross-entropy of the next token, with fewer targets.
    Code: data/examples.py Examples.tensors
    Break: data/examples.py Examples.tensors: `text[1:].masked_fill(~mask[1:], IGNORED)` becomes `text[1:]`
    Source: Ouyang et al. (2022, arXiv 2203.02155), sec. 3; `assistant_only_loss` of TRL for the targets
    问: 监督微调 (SFT) 与预训练有什么区别？为什么只在回答上算损失？
    答: 模型和损失都不变，仍是预测下一个词元的交叉熵；通常把回答以外的目标设为 -100，
    损失只对回答（含结束符）的词元取平均，问题只作为条件，因为要学的是如何回答，而不是如何提问。
    """
    tokenizer = tokenizer_of("0123456789+=")
    examples = Examples([Example([talk("17+5", "22")], "sums")], tokenizer, 32, 1)
    ids, targets, _ = examples.batch(0)
    model, streams = drawn_model(vocab_size=tokenizer.vocab_size), []

    def record(module, inputs, x):
        x.retain_grad()
        streams.append(x)

    model.model.norm.register_forward_hook(record)
    loss = model.loss(ids, targets)
    loss.backward()
    is_learned = streams[0].grad[0].abs().sum(-1) > 0
    names = ["-100"] * len(is_learned)
    for i in places(targets[0] != -100):
        names[i] = repr(tokenizer.decode([targets[0, i].item()]))
    rows = []
    for i in range(9, 15):
        rows.append((i, repr(tokenizer.decode([ids[0, i].item()])), names[i], is_learned[i]))
    table("position | token | target | learns", *rows)
    answer = targets[0, is_learned]
    assert tokenizer.decode(answer.tolist()) == "22<|im_end|>"
    by_hand = F.cross_entropy(model(ids)[0, is_learned], answer)
    assert abs(loss - by_hand) < 1e-5


def test_one_pass_trains_every_turn_of_a_conversation():
    """How is a conversation of several turns learned?

    As one sequence, with targets in all answers. No position sees a later one, so its summed loss is that of
    k samples, one for each answer with all before it. But far fewer tokens are read: with k equal turns 2/(k
    + 1) of them.

    Often told: split it into k samples, or train on the last turn alone. The first is the same, but dearer;
    the second throws answers away.
    Code: data/examples.py encode_conversation
    Break: data/examples.py encode_conversation: `if last_only:` becomes `if not last_only:`
    Source: it follows from the causal mask
    问: 多轮对话数据怎么训练？要拆成多条样本吗？
    答: 不必拆分：整段对话作为一个序列，在所有回答上计算损失即可。由于因果掩码，它的总损失等于把 k 个回答拆成
    k 条样本的损失之和，而各轮等长时要处理的词元只有后者的 2/(k+1)。
    """
    tokenizer = tokenizer_of("0123456789+=")
    model = drawn_model(vocab_size=tokenizer.vocab_size)
    messages = talk("1+2", "3", "3+4", "7", "7+1", "8")
    one = [encode_conversation(tokenizer, messages, 99)]
    three = [encode_conversation(tokenizer, messages[:n], 99, last_only=True) for n in (2, 4, 6)]
    rows = []
    for name, samples in (("one", one), ("three", three)):
        loss, n_tokens, n_targets = 0, 0, 0
        for ids, mask, _ in samples:
            ids = ids.long()[None]
            targets = ids.masked_fill(~mask, -100)
            total, _ = model.summed_loss(ids[:, :-1], targets[:, 1:])
            loss += total.item()
            n_tokens += len(mask)
            n_targets += int(mask.sum())
        rows.append((name, loss, n_targets, n_tokens))
    table("samples | loss in sum | targets | tokens read", *rows)
    assert abs(rows[0][1] - rows[1][1]) < 1e-3 and rows[0][2] == rows[1][2]
    assert rows[0][3] * (3 + 1) == rows[1][3] * 2


def test_fine_tuning_forgets_and_replay_prevents_most_of_it():
    """Why does a fine-tuned model get worse at what it could do?

    Nothing in the new loss holds the old behaviour in place: weights that served it are put to new use. A
    share of old data in each batch (replay) keeps most of it, at little cost to the new.

    Code: finetune.py add_replay
    Break: finetune.py add_replay: `more_targets[:, :T]` becomes `more_targets[:, :T] * 0 - 100`
    Source: McCloskey & Cohen (1989); Ibrahim et al. (2024, arXiv 2403.08763)
    问: 微调后为什么会灾难性遗忘？怎样缓解？
    答: 新任务的损失中没有任何一项约束旧能力，原有的权重会被挪作他用；在每个批次里混入一部分旧数据
    （replay，数据回放），就能保住大部分旧能力，而对新任务的影响很小。
    """
    old, new, model, tests = old_and_new()
    base = copy.deepcopy(model.state_dict())
    blocks = Blocks(sentences(old, 100, length=64).flatten().numpy(), block_size=16, seed=0)

    def losses():
        with torch.no_grad():
            return [loss_on(model, ids).item() for ids in tests]

    def batch_of_both(step):
        ids, targets, _ = add_replay(step, *batches_of(new, 9)(step), blocks, SimpleNamespace(n_replay=3))
        return ids, targets

    rows = [("the base", *losses())]
    for name, batch in (("the new alone", batches_of(new)), ("3 old rows in 12", batch_of_both)):
        model.load_state_dict(base)
        train(model, batch, 100, 1e-2)
        rows.append((name, *losses()))
    table("trained on | loss on the old language | on the new", *rows)
    groups = {name: {"old language": before, "new language": after} for name, before, after in rows}
    bars("What fine-tuning forgets, with and without replay", "loss, nats per token", groups)
    (_, before, _), (_, forgot, learned), (_, kept, learned_too) = rows
    assert forgot > before + 0.5
    assert forgot - kept > 0.6 * (forgot - before)
    assert learned_too < learned + 0.4


def test_lora_starts_as_the_base_model_and_merges_into_a_plain_one():
    """What is LoRA, and does it cost anything afterwards?

    W x + (alpha/r) B A x, with W (out, in) frozen, A (r, in) random and B (out, r) zero: at first the model
    is the base, and r (in + out) weights per matrix learn. In the end (alpha/r) B A is added to W, and a
    plain model is left, of the same shape and speed as its base.

    Often told: LoRA adds layers that slow down inference. Merged, it adds nothing.
    Code: finetune.py merge
    Break: finetune.py merge: `scale * B @ A` becomes `B @ A`
    Source: Hu et al. (2021, arXiv 2106.09685), sec. 4.1
    问: LoRA 的原理是什么？推理时会变慢吗？
    答: 冻结权重 W，只训练低秩增量 (α/r)·B·A，其中 B 初始化为零，因此训练开始时模型与原模型相同；
    训练后把增量加到 W 上，模型的形状和速度都与原模型一样，没有额外的推理开销。
    """
    base, ids = drawn_model(), torch.randint(64, (2, 10))
    before = base(ids)
    model = add_lora(base, rank=4, alpha=8)
    rows = [("LoRA before the first step", largest(model(ids) - before), "")]
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)  # as if it had learned
    learned = model(ids)
    rows.append(("LoRA after learning", largest(learned - before), 0))
    plain = Transformer(model.config)
    plain.load_state_dict(merge(model.state_dict(), scale=8 / 4))
    rows.append(("merged, a plain model", largest(plain(ids) - before), largest(plain(ids) - learned)))
    table("model | largest difference from the base | from what LoRA learned", *rows)
    assert rows[0][1] == 0 and rows[1][1] > 0.1 and rows[2][2] < 1e-4


def test_lora_needs_exactly_one_zero_matrix():
    """Why does LoRA start with B at zero and A at random?

    One of them must be zero, or the start is not the base model. The other must not: the gradient of B is
    scaled by A, that of A by B, so if both are zero, neither ever moves. With B = 0, only B has a gradient at
    the first step, then A has one too. A at zero and B at random would learn as well, but only with smaller
    learning rates (Hayou et al.).

    Often told: both start at zero, so that nothing changes. Then nothing learns, either.
    Code: finetune.py LoRALinear.__init__
    Break: finetune.py LoRALinear.__init__: `torch.zeros(linear.out_features, rank, device=device)` becomes
    `torch.ones(linear.out_features, rank, device=device)`
    Source: Hu et al. (2021, arXiv 2106.09685), sec. 4.1; Hayou et al. (2024, arXiv 2406.08447)
    问: LoRA 为什么把 B 初始化为零、A 随机初始化？两个都为零行不行？
    答: 必须有一个为零，训练才从原模型开始；但不能都为零，因为 B 的梯度含因子 A，A 的梯度含因子 B，两者全为零
    时梯度也全为零，永远不会更新。反过来让 A 为零也能训练，但只能用较小的学习率。
    """
    linear, x, target = nn.Linear(16, 8), torch.randn(20, 16), torch.randn(20, 8)
    rows = []
    for zero in ("B, as in finetune.py", "A", "both", "none"):
        layer = LoRALinear(linear, rank=2, alpha=4)
        if zero in ("A", "both"):
            nn.init.zeros_(layer.lora_A)
        if zero in ("A", "none"):
            nn.init.normal_(layer.lora_B)
        F.mse_loss(layer(x), target).backward()
        slopes = layer.lora_A.grad.norm(), layer.lora_B.grad.norm()
        rows.append((zero, largest(layer(x) - linear(x)), *slopes))
    table("zero | difference from the base | gradient of A | of B", *rows)
    as_here, A, both, none = rows
    assert as_here[1] == as_here[2] == 0 and as_here[3] > 0.05
    assert A[1] == A[3] == 0 and A[2] > 0.05
    assert both[1] == both[2] == both[3] == 0
    assert none[1] > 0.1


def test_an_update_of_rank_r_reaches_exactly_the_part_of_rank_r():
    """What can LoRA not learn?

    B A has rank r at most. If the change that is needed has the singular values s_1 >= s_2 >= ..., the best
    update of rank r leaves the error sqrt(s_{r+1}^2 + s_{r+2}^2 + ...) (Eckart and Young), and here gradient
    descent finds it. An update that is merged makes room for another: two of rank 2, one after the other,
    reach rank 4.

    Often told: LoRA is full fine-tuning with less memory. It is, if the change that is needed has a low rank.
    Code: finetune.py LoRALinear.forward
    Break: finetune.py LoRALinear.forward: `F.linear(F.linear(x, A), B)` becomes `F.linear(F.relu(F.linear(x,
    A)), B)`
    Source: Eckart & Young (1936); Hu et al. (2021, arXiv 2106.09685), sec. 7.2; Lialin et al. (2023, arXiv
    2307.05695) merge again and again
    问: LoRA 的秩 r 限制了什么？
    答: B·A 的秩不超过 r：若所需的权重变化的奇异值为 s_1 ≥ s_2 ≥ …，秩 r 的最优更新仍剩误差
    √(s_{r+1}² + s_{r+2}² + …)；先合并，再训练一个新的 LoRA，秩可以相加。
    """
    change = torch.randn(32, 6) @ torch.randn(6, 32) / 32
    strengths = torch.linalg.svdvals(change)
    wanted = nn.Linear(32, 32, bias=False)
    wanted.weight.data += change
    start = wanted.weight.detach() - change

    def learn(weight, rank):
        """Teach a LoRALinear to be `wanted` -> its error, and the merged weight."""
        linear = nn.Linear(32, 32, bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        layer = LoRALinear(linear, rank, alpha=rank)
        optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.03)
        for _ in range(400):
            error = (layer(torch.eye(32)) - wanted.weight.T.detach()).pow(2).sum()
            update(optimizer, error)
        return error.item() ** 0.5, merge(nn.ModuleDict({"x": layer}).state_dict(), scale=1)["x.weight"]

    rows = []
    for rank in (2, 4, 6):
        error, merged = learn(start, rank)
        rows.append((rank, error, strengths[rank:].norm()))
        if rank == 2:
            after_2 = merged
    error, _ = learn(after_2, 2)
    rows.append(("2, merged, 2 more", error, strengths[4:].norm()))
    table("rank | error of what was learned | of the best update of this rank", *rows)
    for _, error, least in rows:
        assert abs(error - least) < 0.05 * strengths.norm()


def test_the_number_of_parameters_of_lora_follows_from_the_config():
    """How many parameters does LoRA train?

    r (in + out) for each matrix that it updates, in each layer: with all seven matrices of a block L r (2 (C
    + H D) + 2 (C + K D) + 3 (C + F)), F being the width of the MLP. With r = 8 that is 0.3 % of Llama 2 7B;
    with the matrices of q and v alone, as in the paper, 0.06 %.

    Code: finetune.py add_lora
    Break: finetune.py add_lora: `name.endswith(MATRICES)` becomes `name.endswith(MATRICES[:4])`
    Source: Hu et al. (2021, arXiv 2106.09685), sec. 4.2 and 5.1; PEFT prints the same counts
    问: LoRA 的可训练参数量怎么算？
    答: 每个被更新的矩阵增加 r·(in + out) 个参数；r = 8 时，对 Llama 2 7B 每层的七个矩阵都加 LoRA，
    约占总参数的 0.3%，只加在 q、v 上约占 0.06%。
    """

    def num_lora_params(config, rank):
        C, Q, KV = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        return config.n_layer * rank * (2 * (C + Q) + 2 * (C + KV) + 3 * (C + config.n_hidden))

    rows = []
    for name, shape in (("Llama 2 7B", LLAMA_2_7B), ("Llama 3 8B", LLAMA_3_8B)):
        config = Config(**shape, tie_embeddings=False)
        with torch.device("meta"):  # shapes without memory
            model = add_lora(Transformer(config), rank=8, alpha=16)
        sizes = {place: p.numel() for place, p in model.named_parameters() if p.requires_grad}
        n, q_and_v = sum(sizes.values()), 0
        for place, size in sizes.items():
            if "q_proj" in place or "v_proj" in place:
                q_and_v += size
        rows.append((name, num_lora_params(config, rank=8), n, n / config.num_params(), q_and_v))
    table("model | LoRA, r = 8, by the formula | by counting | share | q and v alone", *rows)
    assert all(row[1] == row[2] for row in rows)
    assert rows[0][2] == 19_988_480 and rows[0][4] == 4_194_304
    assert abs(rows[0][3] - 0.003) < 0.0005


def test_the_file_of_an_adapter_holds_the_update_alone(tmp_path):
    """How large is the file of a LoRA adapter? Can it be used alone?

    The sum of r (in + out) weights, with 2 bytes each in 16 bits, and a short header. For ChatGLM-6B, with r
    = 8 on its 28 fused matrices of q, k and v, that is 28 * 8 * (4096 + 12288) weights or 7.3 MB; for q and v
    of Llama 2 7B it is 8.4 MB. The base is not in it, so it is of use only with the very base that it was
    trained on.

    Code: finetune.py save_adapter
    Break: finetune.py save_adapter: `if ".lora_" in name` becomes `if ".layers." in name`
    Source: Hu et al. (2021, arXiv 2106.09685), sec. 4.2; the counts that PEFT prints for these settings
    问: LoRA 的权重文件有多大？可以单独使用吗？
    答: 参数量等于各矩阵 r·(in + out) 之和，16 位时每个参数 2 字节，例如对 ChatGLM-6B 的 28 个 qkv 融合矩阵取
    r = 8，约 7.3 MB；文件里只有增量而没有基座模型，必须与训练时的同一个基座一起使用。
    """
    model = add_lora(drawn_model(), rank=8, alpha=16)
    n_learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    save_adapter(tmp_path / "adapter", model.state_dict(), 8, 16, base="base")
    content = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    n_bytes = len(content) - 8 - int.from_bytes(content[:8], "little")  # without the header
    rows = [("this tiny model, all seven", n_learned, 4, n_bytes)]
    for name, n_in, n_out, n_matrices in (
        ("ChatGLM-6B, q, k and v in one", 4096, 12_288, 28),
        ("Llama 2 7B, q and v", 4096, 4096, 2 * 32),
    ):
        layer = LoRALinear(nn.Linear(n_in, n_out, device="meta"), rank=8, alpha=16)
        n = n_matrices * (layer.lora_A.numel() + layer.lora_B.numel())
        rows.append((name, n, 2, 2 * n))
    table("adapter, r = 8 | weights | bytes of each | bytes, without the header", *rows)
    assert n_bytes == 4 * n_learned
    assert rows[1][1] == 3_670_016 and rows[2][1] == 4_194_304


def test_lora_saves_gradients_and_moments_but_not_the_forward_pass():
    """Why does LoRA take less memory, and how much faster is it?

    The frozen matrices have no gradients and no moments. Of a layer's three products (forward, gradient of
    the input, gradient of the weight) the last is saved: about a third of the FLOPs at most. The forward pass
    grows a little. Nearly all activations must still be kept: the gradient of A needs the same input as that
    of W.

    Often told: LoRA is fast because few parameters are computed. All of them are computed; few learn.
    Code: finetune.py LoRALinear.forward
    Break: finetune.py LoRALinear.forward: `F.linear(F.linear(x, A), B)` becomes `F.linear(x, B @ A)`
    Source: Hu et al. (2021, arXiv 2106.09685), sec. 4.2, report 25 % more speed for GPT-3
    问: LoRA 为什么省显存？训练会快多少？
    答: 冻结的矩阵没有梯度和优化器状态，所以省显存；但前向和对输入的反向都要照算，激活也几乎都要保留，
    只省掉对权重求梯度的那次乘法，计算量最多减少约三分之一。
    """
    shape, rows = dict(n_embd=128, n_hidden=384, n_layer=4), []
    ids, targets = torch.randint(64, (2, 2, 32))
    models = {"all weights": drawn_model(**shape), "LoRA, r = 4": add_lora(drawn_model(**shape), 4, 8)}
    for name, model in models.items():
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor, weights=weights, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, hooks:
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            forward_pass = counter.get_total_flops()
            loss.backward()
        moments = 2 * sum(p.numel() for p in model.parameters() if p.grad is not None)
        rows.append((name, forward_pass, counter.get_total_flops(), moments, sum(kept.values())))
    share = [b / a for a, b in zip(rows[0][1:], rows[1][1:])]
    heads = "training | FLOPs forward | and backward | numbers in Adam's moments | bytes of kept activations"
    table(heads, *rows, ("share", *share))
    assert 1 < share[0] < 1.1 and 0.6 < share[1] < 0.75 and share[2] < 0.06 and share[3] > 0.7


def test_nf4_fits_normal_weights_better_than_even_levels():
    """What is QLoRA?

    LoRA on a frozen base in 4 bits: 16 levels at quantiles of the normal distribution (NF4), one scale for 64
    weights; each product first turns its weights back into 16 bits. With the scales quantised too, it takes
    4.127 bits per weight instead of 4.5. The update stays in 16 or 32 bits.

    Often told: QLoRA trains in 4 bits, and is faster. Only the frozen weights are stored so; it saves memory,
    and turning them back takes time.
    Compare: finetune.py LoRALinear: its frozen weight keeps the dtype of the base
    Source: Dettmers et al. (2023, arXiv 2305.14314), sec. 3 and app. E, for the levels
    问: QLoRA 是什么？NF4 为什么好？
    答: QLoRA 把冻结的基座以 4 位存储，计算时再反量化为 16 位，LoRA 增量仍用高精度训练；NF4 的 16 个值取自正态
    分布的分位数，与近似正态分布的权重更匹配，误差比均匀量化更小；缩放系数也量化后，每个权重约占 4.127 比特。
    """
    weight = Transformer(tiny_config(n_embd=512, n_hidden=512)).model.layers[0].mlp.gate_proj.weight.detach()
    rows = []
    for name, levels in (("NF4", torch.tensor(NF4)), ("even", torch.linspace(-1, 1, 16))):
        error = (round_to(levels, weight) - weight).pow(2).mean().sqrt() / weight.std()
        rows.append((name, error))
    table("16 levels | error, in standard deviations of the weights", *rows)
    plain, double = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)  # 256 scales of 8 bits share one of 32
    table("scales of 64 weights | bits per weight", ("32 bits", plain), ("8 bits", double))
    assert rows[0][1] < 0.95 * rows[1][1]
    assert round(double, 3) == 4.127


def test_adalora_gives_ranks_to_the_matrices_that_need_them():
    """What is AdaLoRA?

    LoRA with a budget of ranks for the whole model. An update is P diag(s) Q, with P and Q kept nearly
    orthonormal by a penalty. Each direction is scored by its importance, |weight * gradient| averaged over
    steps, times its variation; s of the lowest is set to zero, more and more of them until the budget is met.
    Here three matrices need updates of rank 6, 2 and 1, and of 18 directions the right 9 are left; LoRA, with
    3 for each, cannot learn the first.

    Compare: finetune.py add_lora: the same rank for every matrix
    Source: Zhang et al. (2023, arXiv 2303.10512), sec. 3
    问: AdaLoRA 与 LoRA 有什么不同？
    答: LoRA 给每个矩阵相同的秩；AdaLoRA 把增量写成 P·diag(s)·Q，用 |权重 × 梯度| 的滑动平均乘以其波动给每个方
    向打分，逐步把不重要的 s 置零，从而把总的秩预算分给更需要的矩阵。
    """
    C, needs, wanted = 24, (6, 2, 1), []
    for rank in needs:
        left, right = torch.linalg.qr(torch.randn(2, C, rank)).Q
        wanted.append(left @ right.T)

    def learn(layers, adaptive):
        optimizer = torch.optim.Adam(nn.ModuleList(layers).parameters(), lr=0.02)
        for step in range(220):
            loss = 0.0
            for layer, change in zip(layers, wanted):
                x = torch.randn(32, C)
                loss = loss + F.mse_loss(layer(x), x @ change.T)
                if adaptive:
                    loss = loss + 0.01 * layer.skew()
            update(optimizer, loss)
            if adaptive:  # from 18 directions to 9, between step 40 and step 130
                keep_most_important(layers, 18 - min(max(step - 40, 0), 90) // 10)
        return [(layer(torch.eye(C)).T - change).norm() for layer, change in zip(layers, wanted)]

    layers = [AdaLoRALinear(C, max(needs)) for _ in needs]
    errors = learn(layers, adaptive=True)
    ranks = [int((layer.strengths != 0).sum()) for layer in layers]
    frozen = nn.Linear(C, C, bias=False).requires_grad_(False)
    nn.init.zeros_(frozen.weight)
    even = learn([LoRALinear(frozen, rank=3, alpha=3) for _ in needs], adaptive=False)
    table(
        "rank that is needed | AdaLoRA gives | its error | error of LoRA, r = 3",
        *zip(needs, ranks, errors, even),
    )
    assert ranks == list(needs)
    assert max(errors) < 0.1 and even[0] > 1


def test_every_prompt_is_a_soft_prompt_and_every_soft_prompt_is_a_prefix():
    """What are prompt tuning, P-tuning and prefix tuning?

    Prompt tuning learns n input vectors of a frozen model; P-tuning makes them by a small network. Prefix
    tuning and P-tuning v2 learn keys and values for n positions of each of L layers, 2 n L K D numbers with K
    heads of width D. The vectors of tokens are a special case of learned vectors; the keys and values that
    vectors leave in the cache are a special case of a prefix. So each gives the same scores in the next form.
    All take up context.

    Often told: P-tuning v2 is P-tuning with a longer prefix. It is prefix tuning: it acts in every layer.
    Code: model.py KVCache.begin
    Break: model.py KVCache.begin: `S = self.span` becomes `S = T`
    Source: Lester et al. (2021, arXiv 2104.08691); Li & Liang (2021, arXiv 2101.00190); Liu et al. (2021,
    arXiv 2103.10385 and 2110.07602)
    问: Prompt Tuning、P-Tuning 和 Prefix Tuning 有什么区别？
    答: Prompt Tuning 只学习 n 个输入向量，P-Tuning 用一个小网络生成这些向量，Prefix Tuning 和 P-Tuning v2
    则在每一层学习 n 个位置的 K 和 V；真实词元是软提示的特例，软提示算出的 KV 缓存是前缀的特例，
    它们都会占用上下文长度。
    """
    model, tokens, ids = drawn_model(), torch.randint(64, (1, 5)), torch.randint(64, (1, 7))
    soft = Prompt(model, 5)
    prefix = Prefix(model, 5)
    rows = []
    for name in ("5 tokens", "5 free vectors"):
        if name == "5 tokens":
            soft.vectors.data = model.model.embed_tokens(tokens)[0]
            wanted = model(torch.cat((tokens, ids), 1))[:, 5:]
        else:
            nn.init.normal_(soft.vectors)  # no token's
            wanted = soft(ids)
        cache = KVCache(model.config, batch_size=1, max_len=12)
        hook = model.model.embed_tokens.register_forward_hook(lambda *args: soft.vectors[None])
        model(tokens, cache)  # it reads the vectors in place of tokens
        hook.remove()
        n_cached = 2 * cache.k[..., :5, :].numel()
        prefix.learned.data = torch.stack((cache.k, cache.v), 1)[:, :, 0, :, :5].clone()
        as_cache = largest(model(ids, cache) - wanted)
        rows.append((name, largest(soft(ids) - wanted), as_cache, largest(prefix(ids) - wanted)))
    table("before the text | scores differ, as a soft prompt | as a cache | as a prefix", *rows)
    c = model.config
    sizes = soft.vectors.numel(), prefix.learned.numel()
    table("numbers to learn, as a soft prompt | as a prefix", sizes)
    assert max(max(row[1:]) for row in rows) < 1e-4
    assert sizes == (5 * c.n_embd, n_cached) and n_cached == 2 * 5 * c.n_layer * c.n_kv_head * c.head_dim


def test_adapters_begin_as_the_identity_and_cannot_be_merged():
    """What are adapters?

    A small network behind a sublayer: y + up(f(down(y))), with `up` near zero, so that it is nearly the
    identity at first; 2 C r weights. f is not linear, so no matrix can stand in its place: unlike LoRA, it
    can't be merged, and costs time for good. AdapterDrop removes those of low layers, AdapterFusion mixes
    several.

    Often told: LoRA is a kind of adapter, so it slows the model down, too. Without f between them, two thin
    matrices are one matrix.
    Compare: finetune.py merge: it adds B A to W, since nothing stands between B and A
    Source: Houlsby et al. (2019, arXiv 1902.00751), sec. 2; Pfeiffer et al. (2021, arXiv 2005.00247); Rücklé
    et al. (2021, arXiv 2010.11918)
    问: Adapter 是什么？为什么不能像 LoRA 那样合并？
    答: 在子层之后插入 y + up(f(down(y)))，up 初始接近零，开始时近似恒等映射；中间的 f 是非线性的，
    无法用一个矩阵代替，所以不能合并进原权重，推理时一直有额外开销。
    """
    C, r = 64, 8
    linear = nn.Linear(C, C, bias=False)
    adapter, lora = Adapter(linear, C, r), LoRALinear(linear, r, alpha=r)
    x, y = torch.randn(2000, C), torch.randn(30, C)
    rows = []
    for name, layer, last in (("adapter", adapter, adapter.up.weight), ("LoRA", lora, lora.lora_B)):
        at_first = largest(layer(y) - linear(y))
        nn.init.normal_(last)  # as if it had learned
        with torch.no_grad():
            matrix = torch.linalg.lstsq(x, layer(x)).solution  # the best single matrix in its place
            error = (y @ matrix - layer(y)).norm() / layer(y).norm()
        rows.append((name, at_first, error))
    table("update | change at first | error of the best single matrix in its place", *rows)
    assert rows[0][1] == rows[1][1] == 0
    assert rows[0][2] > 0.1 and rows[1][2] < 1e-4


def test_all_weights_learn_a_new_language_best_and_lora_forgets_the_old_one_too():
    """Which methods of fine-tuning train few weights, and what do they give up?

    LoRA learns updates of rank r, adapters small networks behind the sublayers, prefix tuning keys and values
    of each layer, prompt tuning input vectors; QLoRA is LoRA on a base in 4 bits. AdamW keeps 8 bytes for
    each weight that learns, and none for the others. Here a language must be learned that is unlike the old
    one: all weights learn it best, then LoRA and adapters, a prefix and a soft prompt least. What learns much
    forgets much. But what is frozen is still there: without its update, the model is the base again.

    Often told: LoRA cannot forget, since its base is frozen. With its update it does, though less than all
    weights do in large experiments (Biderman et al.). Or: few weights are as good as all. It depends on the
    task and the size; for 10 billion parameters a soft prompt comes close (Lester et al.).
    Code: finetune.py add_lora
    Break: finetune.py add_lora: `model.requires_grad_(False)` becomes `model.requires_grad_(True)`
    Source: Lester et al. (2021, arXiv 2104.08691), fig. 1; Biderman et al. (2024, arXiv 2405.09673);
    Houlsby et al. (2019, arXiv 1902.00751); Hu et al. (2021, arXiv 2106.09685)
    问: 常见的参数高效微调 (PEFT) 方法有哪些？与全参数微调相比有什么得失？
    答: LoRA、QLoRA、Adapter、Prefix Tuning 和 Prompt Tuning 都冻结基座，只训练很少的参数，优化器状态也相应
    减少；在本实验中，全参数微调学得最好，软提示学得最少，而学得多的遗忘也多，LoRA 也不例外，
    但去掉新增参数就能还原基座。
    """
    _, new, base, (old_test, new_test) = old_and_new()
    c, n_base = base.config, base.config.num_params()

    def fresh():
        return copy.deepcopy(base)

    methods = [
        ("all weights", 1e-2, fresh()),
        ("LoRA, r = 4", 2e-2, add_lora(fresh(), 4, 8)),
        ("LoRA on 4 bits", 2e-2, add_lora(in_4_bits(fresh()), 4, 8)),
        ("adapters, r = 8", 2e-2, add_adapters(fresh(), 8)),
        ("prefix of 8", 5e-2, Prefix(fresh(), 8)),
        ("soft prompt of 8", 5e-2, Prompt(fresh(), 8)),
    ]
    rows = [("none: the base", 0, 0, loss_on(base, new_test).item(), loss_on(base, old_test).item())]
    for name, lr, model in methods:
        learning = [p for p in model.parameters() if p.requires_grad]
        frozen = {p: p.clone() for p in model.parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW(learning, lr=lr, betas=(0.9, 0.95), weight_decay=0)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10) * (1 - 0.9 * step / 100)
            update(optimizer, loss_on(model, sentences(new, 12)))
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        n_bytes = sum(moment.nbytes for moment in moments)
        n = sum(p.numel() for p in learning)
        rows.append((name, n, n_bytes, loss_on(model, new_test).item(), loss_on(model, old_test).item()))
        assert all(torch.equal(p, before) for p, before in frozen.items())
    table("what learns | weights | bytes of AdamW's moments | loss on the new | on the old", *rows)
    n_lora = c.n_layer * 4 * (8 * c.n_embd + 3 * (c.n_embd + c.n_hidden))  # here H = K, so H D = K D = C
    n_adapters, n_prefix = c.n_layer * 2 * 2 * c.n_embd * 8, c.n_layer * 2 * c.n_kv_head * 8 * c.head_dim
    assert [row[1] for row in rows] == [0, n_base, n_lora, n_lora, n_adapters, n_prefix, 8 * c.n_embd]
    assert all(row[2] == 8 * row[1] for row in rows)
    start, full, *thin, prompt = rows
    lora, rounded, adapters, prefix = thin
    assert all(full[3] < row[3] < prompt[3] < start[3] for row in thin)
    assert max(row[3] for row in (lora, rounded, adapters)) < prefix[3]
    forgotten = full[4] - start[4]
    assert forgotten > 1 and prompt[4] - start[4] < 0.5 * forgotten
    assert all(row[4] - start[4] > 0.5 * forgotten for row in (lora, rounded, adapters))
    assert abs(rounded[3] - lora[3]) < 0.15  # rounding the base to 4 bits costs little


def test_dpo_starts_at_ln_2_and_learns_most_from_pairs_in_the_wrong_order():
    """What is DPO?

    Direct preference optimisation learns from pairs of answers, one chosen and one rejected. Its loss is -ln
    sigmoid(margin), margin = b (ln p/p0 of the chosen answer - ln p/p0 of the rejected one): p is the model's
    probability of an answer, p0 that of the model at the start (the reference), b a constant such as 0.1. At
    the start p = p0, and the loss is ln 2. The gradient of a pair is scaled by b sigmoid(-margin): those that
    moved the right way count little. No separate reward model is trained, and nothing is drawn.

    Code: finetune.py measure_preference
    Break: finetune.py measure_preference: `(log_p - references).unbind(1)` becomes `log_p.unbind(1)`
    Source: Rafailov et al. (2023, arXiv 2305.18290), sec. 4, eq. 7
    问: DPO 的损失是什么？训练开始时等于多少？
    答: 损失为 -ln σ(β·(chosen 的 ln p/p0 - rejected 的 ln p/p0))；p0 是参考模型（训练开始时的模型）给出的概
    率，开始时 p = p0，损失等于 ln 2 ≈ 0.693。每对样本的梯度乘以 β·σ(-margin)，顺序仍然颠倒的样本对梯度最大。
    """
    model, beta = drawn_model(), 0.5
    ids = torch.randint(64, (3, 2, 8))  # three pairs, chosen and rejected
    targets = ids.roll(-1, dims=2)
    targets[:, :, :3] = targets[:, :, -1] = -100
    with torch.no_grad():
        log_p = log_probs(model, ids.flatten(0, 1), targets.flatten(0, 1)).view(3, 2)
    moved = torch.tensor([[0.0, 0.0], [3.0, -1.0], [-3.0, 1.0]])  # what ln p/p0 of the answers has become
    log_p.requires_grad_()
    measured = measure_preference(log_p, log_p.detach() - moved, beta)
    measured[:, 0].sum().backward()
    measured = measured.detach()
    rows = [(pair[1], pair[0], abs(slope)) for pair, slope in zip(measured, log_p.grad[:, 0])]
    table("margin | loss | size of the gradient in ln p(chosen)", *rows)
    assert abs(measured[0, 0] - math.log(2)) < 1e-4
    assert torch.allclose(measured[:, 1], beta * (moved[:, 0] - moved[:, 1]), atol=1e-4)
    wanted = beta * torch.sigmoid(-measured[:, 1])
    assert torch.allclose(log_p.grad[:, 0].abs(), wanted, atol=1e-4)
    assert rows[1][2] < rows[0][2] < rows[2][2]


def test_dpo_can_make_the_chosen_answer_less_likely():
    """Does DPO make the chosen answers likelier?

    Not always. Its loss knows only the odds of the chosen answer against the rejected one. The tokens with
    which both begin cancel out of these odds, so nothing holds them. Here the two differ in the last token
    alone: the loss falls, and the right last token stays likely. But as the weights move, the tokens before
    it become less likely, and with them the whole answer.

    Often told: DPO raises the probability of the chosen answer and lowers that of the rejected one. It
    raises their ratio.
    Code: finetune.py measure_preference
    Break: finetune.py measure_preference: `beta * (chosen - rejected)` becomes `beta * chosen`
    Source: Razin et al. (2024, arXiv 2410.08847); Pal et al. (2024, arXiv 2402.13228)
    问: DPO 训练时 chosen 的概率为什么也会下降？
    答: DPO 的损失只看 chosen 与 rejected 的概率之比，两者开头相同的词元在比值中相消，没有任何一项约束它们；权
    重改变时，这些词元的概率可能下降，整个 chosen 的概率也随之下降，而损失仍在减小。
    """
    model = Transformer(tiny_config(vocab_size=16, n_layer=1, n_embd=32, n_head=2))
    chosen = torch.randint(16, (12, 8))
    chosen[:, 0] = torch.arange(12)  # the question
    rejected = chosen.clone()
    rejected[:, -1] = (chosen[:, -1] + torch.randint(1, 16, (12,))) % 16  # only the last token differs
    pairs = torch.stack((chosen, rejected), 1)
    ids, targets = pairs[:, :, :-1], pairs[:, :, 1:]
    train(model, lambda step: (ids[:, 0], targets[:, 0]), 50, 1e-2)  # it has learned the chosen answers
    objective, optimizer = PreferenceLoss(model, beta=0.1), adamw(model)
    shared = targets[:, 0].clone()
    shared[:, -1] = -100
    rows = []
    for step in range(31):
        loss, measured = objective(ids, targets)
        if step % 10 == 0:
            loss_of_pairs, _, accuracy, of_chosen, of_rejected = measured.mean(0)
            with torch.no_grad():
                of_shared = log_probs(model, ids[:, 0], shared).mean()
            rows.append((step, loss_of_pairs, of_chosen, of_shared, of_chosen - of_shared, of_rejected))
        update(optimizer, loss / len(pairs))
    table("step | loss | ln p(chosen) | of its shared tokens | of its last | ln p(rejected)", *rows)
    (_, loss, before, _, last, _), (_, lower, after, of_shared, still, _) = rows[0], rows[-1]
    assert lower < loss - 0.1 and accuracy == 1
    assert after < before - 2 and of_shared < before - 2 and still > last - 0.5


def test_dpo_recovers_the_reward_of_the_preferences():
    """Why does DPO need no reward model?

    Of all policies p (models that answer), the one with the largest mean of r - b ln p/p0, r being the reward
    of an answer, is p0 e^(r/b), divided by its sum. Turned round, b ln p/p0 is the reward, up to a constant
    that is the same for all answers to a question. So DPO fits it to preferences as a reward model would be
    fitted: here five answers have rewards, i is preferred to j with probability sigmoid(r_i - r_j), and b ln
    p/p0 comes out as r.

    Often told: DPO does without a reward. The policy is its reward model, as the paper's title says.
    Code: finetune.py measure_preference
    Break: finetune.py measure_preference: `beta * (chosen - rejected)` becomes `(chosen - rejected)`
    Source: Rafailov et al. (2023, arXiv 2305.18290), eq. 4 to 6
    问: DPO 为什么不需要奖励模型？
    答: 带 KL 约束的最优策略满足 p ∝ p0·e^(r/β)，反过来 β·ln(p/p0) 就是奖励（相差一个只与问题有关的常数）；
    代入 Bradley-Terry 偏好模型后常数抵消，于是可以直接用偏好数据训练策略。
    """
    beta, rewards = 0.5, torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
    preferred = torch.sigmoid(rewards[:, None] - rewards)  # p(i preferred to j): Bradley and Terry
    start = torch.randn(5).log_softmax(0)
    scores = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.05)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))  # (25, 2)
    for _ in range(300):
        measured = measure_preference(scores.log_softmax(0)[pairs], start[pairs], beta)
        update(optimizer, (preferred.flatten() * measured[:, 0]).sum())
    learned = scores.detach().log_softmax(0)
    implied = beta * (learned - start)
    implied -= implied.mean()
    best = (start + rewards / beta).softmax(0)
    table("reward | b ln p/p0 | p0 | p | best p", *zip(rewards, implied, start.exp(), learned.exp(), best))
    assert torch.allclose(implied, rewards, atol=0.02)
    assert torch.allclose(learned.exp(), best, atol=0.01)


def test_a_reward_model_learns_differences_only():
    """What is a reward model?

    A language model with one output, read at the last token, trained on pairs with -ln sigmoid(r_chosen -
    r_rejected): the loss of DPO, whose b ln p/p0 stands in the place of r. A constant added to all rewards
    changes nothing: they have no zero. It may be of another size than the policy, as in InstructGPT (6 and
    175 billion parameters).

    Often told: it must be the policy's base model. It only has to judge the same texts.
    Code: finetune.py measure_preference
    Break: finetune.py measure_preference: `beta * (chosen - rejected)` becomes `beta * chosen`
    Source: Ouyang et al. (2022, arXiv 2203.02155), sec. 3.5, eq. 1
    问: 奖励模型是怎么训练的？它给出的分数有绝对意义吗？
    答: 在语言模型的最后一个词元上接一个标量输出，用成对偏好训练，损失为 -ln σ(r_chosen - r_rejected)；
    损失只取决于奖励之差，所有奖励加同一个常数不变，所以分数没有绝对的零点。
    """
    reward = RewardModel(Transformer(tiny_config(vocab_size=16, n_layer=1, n_embd=32, n_head=2)))

    def pairs(n):
        """Of two texts, the one with more 3s is preferred."""
        a, b = torch.randint(16, (2, n, 8))
        more, fewer = ((ids == 3).sum(1) for ids in (a, b))
        chosen = torch.where((more > fewer)[:, None], a, b)
        rejected = torch.where((more > fewer)[:, None], b, a)
        return chosen[more != fewer], rejected[more != fewer]

    def measure(chosen, rejected, constant=0):
        rewards = torch.stack((reward(chosen), reward(rejected)), 1) + constant
        return measure_preference(rewards, torch.zeros_like(rewards), beta=1).mean(0)

    def loss(chosen, rejected):
        return measure(chosen, rejected)[0]

    train(reward, lambda step: pairs(64), 80, 5e-3, loss)
    chosen, rejected = pairs(400)
    with torch.no_grad():
        rows = [(constant, *measure(chosen, rejected, constant)[:3]) for constant in (0, 100)]
    table("added to all rewards | loss | margin | share of pairs in the right order", *rows)
    assert rows[0][3] > 0.9 and abs(rows[0][1] - rows[1][1]) < 1e-3


def test_the_clip_of_ppo_stops_an_answer_that_has_moved_far_enough():
    """What does PPO optimise?

    It maximises min(r A, clip(r, 1 - e, 1 + e) A). A, the advantage, is how much better an answer (or each of
    its tokens) did than expected; r = p / p_old is how much likelier it has become since it was drawn; e is
    about 0.2. At the first update r = 1, and the gradient is that of REINFORCE. Once r is beyond 1 + e with A
    above 0, or below 1 - e with A below 0, there is none. An answer that moved the wrong way is not stopped.

    Often told: the clip keeps r between 1 - e and 1 + e. It only takes away the gradient that would push r
    further out.
    Code: finetune.py RewardLoss.forward
    Break: finetune.py RewardLoss.forward: `(weights * nats).sum()` becomes `nats.sum()`
    Source: Schulman et al. (2017, arXiv 1707.06347), sec. 3, eq. 7
    问: PPO 的 clip 起什么作用？
    答: PPO 最大化 min(r·A, clip(r, 1-ε, 1+ε)·A)：当 r 已朝优势 A 所指的方向超出 1±ε 时梯度为零，
    不再继续推动；若朝错误方向移动则不截断。第一次更新时 r = 1，梯度与 REINFORCE 相同。
    """
    rows = []
    for advantage in (1.0, -1.0):
        log_ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5]).log().requires_grad_()
        clipped_gain(log_ratio.exp(), advantage).sum().backward()
        rows.append((advantage, *log_ratio.grad))
    table("A | gradient in ln p, at r = 0.5 | 0.9 | 1.0 | 1.1 | 1.5", *rows)
    slopes = torch.tensor(rows)[:, 1:]
    wanted = torch.tensor([[0.5, 0.9, 1.0, 1.1, 0], [0, -0.9, -1.0, -1.1, -1.5]])
    assert torch.allclose(slopes, wanted, atol=1e-5)

    policy, weights = drawn_model(), torch.tensor([1.0, -0.5, 0.25])
    ids, targets = torch.randint(64, (2, 3, 6))
    loss, _ = RewardLoss(policy)(ids, targets, weights)
    of_reinforce = torch.autograd.grad(loss, policy.model.layers[0].mlp.up_proj.weight)[0]
    log_p = log_probs(policy, ids, targets)
    gain = clipped_gain((log_p - log_p.detach()).exp(), weights).sum()
    of_ppo = torch.autograd.grad(-gain, policy.model.layers[0].mlp.up_proj.weight)[0]
    assert torch.allclose(of_ppo, of_reinforce, atol=1e-4) and largest(of_ppo) > 0.01


def test_ppo_reuses_its_answers_and_holds_four_models():
    """How do PPO, REINFORCE and DPO differ in what they draw, keep and update?

    REINFORCE draws answers, lets a reward model rate them, and makes one update with them. PPO makes several
    and keeps the old ln p of the answers for them; a critic learns what reward to expect, and a reference
    (the policy as it began) holds the policy back. So it has four models; policy and critic learn. DPO draws
    nothing: its pairs were judged before, and it has a policy and a reference. With AdamW, a model that
    learns takes four numbers for each weight (itself, its gradient, two moments), a frozen one takes one.

    Often told: PPO needs four times the memory of SFT. Of its four models two learn: 10 numbers per weight
    against 4, if all are of one size and precision.
    Code: finetune.py PreferenceLoss.__init__
    Break: finetune.py PreferenceLoss.__init__: `copy.deepcopy(model).requires_grad_(False)` becomes `model`
    Source: Williams (1992); Schulman et al. (2017, arXiv 1707.06347), alg. 1; Ouyang et al. (2022, arXiv
    2203.02155), sec. 3.5; Rafailov et al. (2023, arXiv 2305.18290)
    问: PPO、REINFORCE 和 DPO 在采样、显存和更新上有什么区别？
    答: REINFORCE 每批采样只更新一次；PPO 用同一批采样更新多次，需要策略、评论家 (critic)、奖励模型和参考模型
    四个模型，其中前两个要训练；DPO 不采样，只需策略和参考模型，直接用标注好的偏好对训练。
    """
    shape = dict(vocab_size=8, n_layer=1, n_embd=32, n_head=2)
    start = Transformer(tiny_config(**shape))
    reward_model = RewardModel(drawn_model(**shape)).requires_grad_(False)
    question = torch.zeros(1, 1, dtype=torch.long)
    scale = reward_model(torch.stack((torch.zeros(8), torch.arange(8)), 1).long()).std()

    def rate(ids, targets):
        return reward_model(torch.cat((ids, targets), 1)) / scale

    def mean_reward(policy):
        with torch.no_grad():
            return policy(question)[0, 0].softmax(-1) @ rate(question.expand(8, 1), torch.arange(8)[:, None])

    def row_of(name, outcome, policy, *others):
        n_drawn, optimizer = outcome
        n_updates = int(optimizer.state[policy.model.norm.weight]["step"])
        held = numbers_held(optimizer, policy, *others) / start.config.num_params()
        return name, n_drawn, n_updates, 1 + len(others), held, mean_reward(policy)

    rows, policy = [("at the start", 0, 0, 1, 1, mean_reward(start))], copy.deepcopy(start)
    rows.append(row_of("REINFORCE", reinforce(policy, rate, 15, 32), policy, reward_model))

    policy, critic, reference = copy.deepcopy(start), RewardModel(copy.deepcopy(start)), copy.deepcopy(start)
    outcome = ppo(policy, critic, reference.requires_grad_(False), rate, 15, 32)
    rows.append(row_of("PPO", outcome, policy, critic, reward_model, reference))

    objective = PreferenceLoss(copy.deepcopy(start), beta=0.1)
    ids, pairs = draw_tokens(start, 64)  # judged once by the reward model, which is not held later
    order = rate(ids, pairs).view(32, 2).argsort(1, descending=True)
    outcome = dpo(objective, pairs.view(32, 2, 1).gather(1, order[..., None]), 15)
    rows.append(row_of("DPO", outcome, objective.model, objective.reference))
    table("method | draws | updates | models | numbers held per weight | mean reward", *rows)
    begin, one, many, none = rows
    assert one[1:4] == (480, 15, 2) and many[1:4] == (480, 60, 4) and none[1:4] == (0, 15, 2)
    assert [round(row[4], 1) for row in rows[1:]] == [5.0, 10.0, 5.0]
    assert all(row[5] > begin[5] + 0.3 for row in rows[1:]) and many[5] > one[5] + 0.1


def test_a_baseline_without_the_answer_itself_changes_the_variance_and_not_the_mean():
    """Why is the mean reward of the other answers subtracted?

    Of G answers to a question, each gives its reward times the gradient of its ln p: on average that is the
    gradient of the mean reward. What does not depend on the answer can be subtracted, and the average stays.
    With the mean reward of the other G - 1 it no longer matters whether rewards are 0 and 1 or 10 and 11. The
    mean of all G holds the answer's own reward, and with it the gradient is (G - 1)/G of what it should be.

    Often told: a baseline always lowers the variance. Not where rewards are 0 and 1 and the model is mostly
    right: without it, wrong answers push nothing.
    Code: finetune.py advantages
    Break: finetune.py advantages: `rewards - others / (rewards.size(1) - 1)` becomes `rewards -
    rewards.mean(1, keepdim=True)`
    Source: Williams (1992), sec. 4; Kool et al. (2019, "Buy 4 REINFORCE samples, get a baseline for free!");
    Ahmadian et al. (2024, arXiv 2402.14740)
    问: 策略梯度为什么要减去基线？用组内均值和用其他样本的均值有什么不同？
    答: 减去与该回答无关的基线不改变梯度的期望，只改变方差；减去均值后，奖励是 0/1 还是 10/11 不再有影响。减去
    其余 G-1 个回答的均值是无偏的，用全组均值则包含自身，梯度会缩小到 (G-1)/G。
    """
    G = 4

    def nothing(rewards):
        return rewards

    def mean_of_group(rewards):
        return rewards - rewards.mean(1, keepdim=True)

    def estimate(p, lowest, subtract):
        """The gradient of the mean reward in the scores of the answers, as a mean over groups: (share of the
        exact one, variance).
        """
        p, rewards = torch.tensor(p), torch.full([len(p)], lowest)
        rewards[0] += 1  # the first answer is right
        exact = p * (rewards - (p * rewards).sum())
        drawn = torch.multinomial(p, 100_000 * G, replacement=True)
        slopes = (F.one_hot(drawn, len(p)) - p).view(-1, G, len(p))  # of ln p of each answer that was drawn
        gradients = (subtract(rewards[drawn].view(-1, G))[..., None] * slopes).mean(1)  # of each group
        return (gradients.mean(0) @ exact / (exact @ exact)).item(), gradients.var(0).sum().item()

    rows = []
    baselines = {"nothing": nothing, "mean of the others": advantages, "mean of the group": mean_of_group}
    for name, subtract in baselines.items():
        share, mostly_right = estimate([0.7, 0.15, 0.1, 0.05], 0.0, subtract)
        _, mostly_wrong = estimate([0.3, 0.7], 0.0, subtract)
        _, shifted = estimate([0.3, 0.7], 10.0, subtract)
        rows.append((name, share, mostly_right, mostly_wrong, shifted))
    heads = "gradient, share of the exact one | variance, if mostly right | mostly wrong | rewards 10 and 11"
    table(f"subtracted | {heads}", *rows)
    plain, others, group = rows
    assert abs(plain[1] - 1) < 0.02 and abs(others[1] - 1) < 0.02 and abs(group[1] - (G - 1) / G) < 0.02
    assert plain[2] < 0.5 * others[2] and others[3] < 0.8 * plain[3]
    assert abs(others[4] / others[3] - 1) < 0.05 and plain[4] > 50 * others[4]


def test_a_reward_that_can_be_gamed_is_gamed(monkeypatch):
    """What is reward hacking?

    The model learns what is rewarded, not what was meant. Here it is asked to answer a letter with the next
    one. If the right answer alone earns 1, it learns that. If a rater gives a third of a point for an answer
    that contains the right letter, and up to two thirds for its length, answers grow long: the reward rises,
    and right answers become rare.

    Often told: it takes a clever model. It takes a gradient.
    Code: finetune.py reward
    Break: finetune.py reward: `float(is_right(example, text))` becomes `len(text) / 6`
    Source: Skalse et al. (2022, arXiv 2209.13085); Gao et al. (2023, arXiv 2210.10760); Singhal et al. (2023,
    arXiv 2310.03716) for length
    问: 什么是奖励黑客 (reward hacking)？
    答: 模型优化的是奖励本身而不是人的本意：例如打分者偏爱长回答时，模型的回答会越来越长，奖励上升，
    正确率下降；这不需要模型有多聪明，只要有梯度就会发生。
    """
    G, letters = 10, "abcdef"
    asked = [*zip(letters, letters[1:] + letters[:1]), ("all", letters)]  # the longest answer that is known
    tokenizer = tokenizer_of(letters + "l")
    questions = Examples([Example([talk(*pair)], "letters") for pair in asked], tokenizer, 32, 7)
    shape = dict(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_embd=32, n_head=2)
    pupil = Transformer(tiny_config(**shape))
    train(pupil, lambda step: questions.tensors(range(7))[:2], 40, 1e-2)  # it knows some of it
    start = copy.deepcopy(pupil.state_dict())

    def by_a_rater(example, text):
        return (example.answer in text) / 3 + min(len(text), 6) / 6 * 2 / 3

    def only_right(example, text):
        return float(is_right(example, text))

    def draw(rated, seed):
        monkeypatch.setattr(finetune, "reward", rated)
        ids, targets, _, rewards = draw_answers(pupil, tokenizer, questions, range(7), G, seed)
        return ids, targets, rewards

    def row_of(name, rated):
        _, targets, rewards = draw(rated, seed=100)
        _, _, right = draw(only_right, seed=100)
        return name, rewards.mean(), right.mean(), count_targets(targets).float().mean()

    rows = []
    for name, rated in (("the right answer", finetune.reward), ("by a rater", by_a_rater)):
        pupil.load_state_dict(start)
        rows.append(row_of(f"{name}: before", rated))
        objective, optimizer = RewardLoss(pupil), torch.optim.AdamW(pupil.parameters(), 3e-3, weight_decay=0)
        for step in range(30):
            ids, targets, rewards = draw(rated, seed=step)
            loss, _ = objective(*merge_equal(ids, targets, advantages(rewards).flatten()))
            update(optimizer, loss / rewards.numel())
        rows.append(row_of("... after", rated))
    table("what is rewarded | mean reward | right answers | tokens of an answer", *rows)
    (_, _, right, _), (_, _, learned, _), (_, low, _, short), (_, high, gamed, long) = rows
    assert learned > right + 0.1  # what was meant is rewarded, and learned
    assert high > low + 0.1 and gamed < 0.5 * right and long > short + 1


def test_pass_at_1_rises_while_pass_at_8_falls():
    """Does learning from rewards teach something new?

    Mostly it makes likelier what the model already draws at times. pass@k, the chance that at least one of k
    answers is right, is 1 - (1 - p)^k for one question. Here two methods suit different questions, which the
    model cannot tell apart: first it tries both, and one of 8 answers is nearly always right. It learns to
    use the better one nearly always: pass@1 rises, the questions of the other are lost, and pass@8 falls.

    Often told: a higher score means that the model solves more. It may solve fewer, more often.
    Code: finetune.py measure_rewards
    Break: finetune.py measure_rewards: `rewards.amax(1, keepdim=True)` becomes `rewards.mean(1,
    keepdim=True)`
    Source: Chen et al. (2021, arXiv 2107.03374), sec. 2.1, for pass@k; Yue et al. (2025, arXiv 2504.13837)
    问: 强化学习能让模型学会新能力吗？为什么 pass@1 上升而 pass@k 下降？
    答: 它主要提高模型本来就能采样到的答案的概率：策略集中到平均最好的解法上，pass@1 上升，
    但只能用其他解法做对的题再也采样不到，pass@8 反而下降。
    """
    G, suits = 8, (torch.arange(100) >= 60).long()  # the method, 0 or 1, that suits each of 100 questions
    model = Transformer(tiny_config(vocab_size=2, n_layer=1, n_embd=32, n_head=2, tie_embeddings=False))
    objective, optimizer = RewardLoss(model), torch.optim.SGD(model.parameters(), lr=0.05)
    rows = []
    for step in range(61):
        ids, drawn = draw_tokens(model, 100 * G)  # all questions look alike
        rewards = (drawn.view(100, G) == suits[:, None]).float()
        if step % 4 == 0:
            _, pass_1, pass_8, *_ = measure_rewards(rewards, drawn).mean(0)
            log_p = model(ids[:1])[0, 0].log_softmax(-1)
            rows.append((step, pass_1, pass_8, -(log_p.exp() * log_p).sum()))
        loss, _ = objective(ids, drawn, advantages(rewards).flatten())
        update(optimizer, loss / len(ids))
    table("step | pass@1 | pass@8 | entropy, nats", *rows[::3])
    steps, pass_1, pass_8, _ = zip(*rows)
    lines(
        "What learning from rewards does to pass@1 and pass@8",
        "step",
        "share of questions solved",
        {"pass@1": (steps, pass_1), "pass@8": (steps, pass_8)},
    )
    assert rows[0][1] < 0.56 and rows[0][2] > 0.95
    assert rows[-1][1] > 0.56 and rows[-1][2] < 0.8 and rows[-1][3] < 0.25
