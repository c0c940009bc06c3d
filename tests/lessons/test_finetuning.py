"""Fine-tuning: what is learned of a conversation, thin updates, forgetting, preferences."""

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune import LoRALinear, RewardLoss, add_lora, advantages, log_probs, measure_preference, merge
from model import Config, KVCache, Transformer
from sample import generate

from .book import LLAMA_2_7B, LLAMA_3_8B, drawn_model, forward, largest, places, table, tiny_config, train


def test_lora_starts_as_the_base_model_and_merges_exactly():
    """What is LoRA, and does it cost anything afterwards?

    W x + (alpha/r) B A x, with W frozen, A (r, in) random and B (out, r) zero: at first the model is the
    base, and r (in + out) weights per matrix learn. Then B A is added to W, and nothing is left to pay.

    Often told: LoRA adds layers that slow down inference.
    Code: finetune.py LoRALinear
    Source: Hu et al. (2021, arXiv 2106.09685), sec. 4.1
    """
    base, ids = drawn_model(), torch.randint(64, (2, 10))
    before = base(ids)
    model = add_lora(base, rank=4, alpha=8)
    rows = [("before the first step", largest(model(ids) - before))]
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)  # as if it had learned
    learned = model(ids)
    merged = Transformer(model.config)
    merged.load_state_dict(merge(model.state_dict(), scale=8 / 4))
    rows += [
        ("after learning", largest(learned - before)),
        ("... and merged", largest(learned - merged(ids))),
    ]
    table("LoRA | difference, from the base and then from what was learned", *rows)
    assert rows[0][1] == 0 and rows[1][1] > 0.1 and rows[2][1] < 1e-4


def test_the_number_of_parameters_of_lora_follows_from_the_config():
    """How many parameters does LoRA train?

    r (in + out) for each matrix that it updates, in each layer: with all seven matrices of a block L r (2 (C
    + H D) + 2 (C + K D) + 3 (C + F)), F being the width of the MLP. With r = 8 that is 0.3 % of Llama 2 7B;
    with the matrices of q and v alone, as in the paper, 0.06 %.

    Code: finetune.py add_lora
    Source: Hu et al. (2021), sec. 4.2; the counts that PEFT prints for these settings
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


def test_lora_saves_gradients_and_moments_but_not_the_forward_pass():
    """Why does LoRA take less memory, and how much faster is it?

    The frozen matrices have no gradient and no moments. Of a layer's three products (forward, gradient of the
    input, gradient of the weight) one is saved: at most a third of the FLOPs. The forward pass grows a
    little, and activations must still be kept.

    Often told: LoRA is fast because few parameters are computed.
    Code: finetune.py add_lora
    Source: Hu et al. (2021), sec. 4.2, report 25 % more speed for GPT-3
    """

    def flops(lora):
        layers = [nn.Linear(256, 256, bias=False) for _ in range(8)]
        if lora:
            layers = [LoRALinear(layer.requires_grad_(False), rank=4, alpha=4) for layer in layers]
        with FlopCounterMode(display=False) as counter:
            x = torch.randn(64, 256)
            for layer in layers:
                x = F.relu(layer(x))
            forward = counter.get_total_flops()
            x.sum().backward()
        moments = 2 * sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
        return forward, counter.get_total_flops(), moments

    full, lora = flops(False), flops(True)
    share = [b / a for a, b in zip(full, lora)]
    heads = "training | FLOPs forward | forward and backward | numbers in Adam's moments"
    table(heads, ("all weights", *full), ("LoRA, rank 4", *lora), ("share", *share))
    assert share[0] > 1 and 2 / 3 < share[1] < 0.75 and share[2] < 0.04


def test_nf4_fits_normal_weights_better_than_even_levels():
    """What is QLoRA?

    LoRA on a frozen base in 4 bits: 16 levels at quantiles of the normal distribution (NF4), one scale for 64
    weights, and weights turned back into 16 bits for each product. Quantising the scales too lowers 4.5 bits
    per weight to 4.127. It saves memory, not time.

    Often told: QLoRA trains in 4 bits, and is faster.
    Code: finetune.py LoRALinear
    Source: Dettmers et al. (2023, arXiv 2305.14314), sec. 3 and app. E, for the levels
    """
    nf4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
    nf4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
    weights = torch.randn(4096, 64)
    scale = weights.abs().amax(1, keepdim=True)

    def error(levels):
        nearest = ((weights / scale)[..., None] - levels).abs().argmin(-1)
        return (levels[nearest] * scale - weights).pow(2).mean().item()

    rows = [("NF4", error(torch.tensor(nf4))), ("even", error(torch.linspace(-1, 1, 16)))]
    table("16 levels | mean squared error", *rows)
    bits, double = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)  # 256 scales of 8 bits share one of 32
    print(
        f"    bits per weight: {bits} with a scale of 32 bits for 64 of them, {double:.3f} with scales of 8"
    )
    assert rows[0][1] < 0.9 * rows[1][1]


def test_adalora_gives_ranks_to_the_matrices_that_need_them():
    """What is AdaLoRA?

    An update P diag(l) Q with P and Q kept nearly orthogonal by a penalty. Directions of least importance
    (weight times gradient, averaged) are set to zero, so that a budget of ranks goes to the matrices that
    need it. With orthonormal P and Q, to drop l_i costs exactly |l_i|; here that is the importance.

    Code: finetune.py add_lora
    Source: Zhang et al. (2023, arXiv 2303.10512), sec. 3
    """
    P, Q = torch.linalg.qr(torch.randn(32, 6)).Q, torch.linalg.qr(torch.randn(24, 6)).Q.T
    strengths = torch.tensor([5.0, 4, 2, 1, 0.5, 0.1])
    update, costs = P @ torch.diag(strengths) @ Q, []
    for i in range(6):
        without = strengths.where(torch.arange(6) != i, 0)
        costs.append((P @ torch.diag(without) @ Q - update).norm().item())
    table("strength of a direction | cost of dropping it", *zip(strengths, costs))
    assert torch.allclose(torch.tensor(costs), strengths, atol=1e-4)
    matrices = {"the first": strengths.tolist(), "the second": [3.0, 0.2, 0.1]}
    most = sorted(((s, name) for name, values in matrices.items() for s in values), reverse=True)[:5]
    ranks = Counter(name for _, name in most)
    print("    ranks of two matrices with a budget of 5:", dict(ranks))
    assert ranks == {"the first": 4, "the second": 1}


def test_every_prompt_is_a_soft_prompt_and_every_soft_prompt_is_a_prefix():
    """What are prompt tuning, P-tuning and prefix tuning?

    Prompt tuning learns n input vectors of a frozen model; P-tuning makes them by a small network. Prefix
    tuning and P-tuning v2 learn keys and values for n positions of each of L layers, 2 n L K D numbers with K
    heads of width D. Real tokens are a special case of learned vectors, their cache of a prefix; all of them
    take up context.

    Often told: P-tuning v2 is P-tuning with a longer prefix.
    Code: model.py KVCache
    Source: Lester et al. (2021, arXiv 2104.08691); Li & Liang (2021, arXiv 2101.00190); Liu et al. (2021,
    arXiv 2103.10385 and 2110.07602)
    """
    model, prompt, ids = drawn_model(), torch.randint(64, (1, 5)), torch.randint(64, (1, 7))
    wanted = model(torch.cat((prompt, ids), 1))[:, 5:]
    vectors = model.model.embed_tokens(prompt)  # what prompt tuning would learn
    soft = forward(model, torch.cat((vectors, model.model.embed_tokens(ids)), 1))[:, 5:]
    cache = KVCache(model.config, batch_size=1, max_len=12)
    model(prompt, cache)  # ... and prefix tuning: what the cache now holds
    n_prefix = 2 * cache.k[:, :, :, :5].numel()
    prefix = model(ids, cache)
    rows = [
        ("5 vectors", vectors.numel(), largest(soft - wanted)),
        ("prefix", n_prefix, largest(prefix - wanted)),
    ]
    table("instead of 5 tokens | numbers | difference in the scores", *rows)
    c = model.config
    assert n_prefix == 2 * 5 * c.n_layer * c.n_kv_head * c.head_dim
    assert max(row[2] for row in rows) < 1e-4


def test_adapters_begin_as_the_identity_and_cannot_be_merged():
    """What are adapters?

    x + up(f(down(x))) behind a sublayer, with `up` near zero: nearly the identity at first, 2 C r weights.
    What lies between, f, is not linear, so that they can't be merged as LoRA can, and cost time for good.
    AdapterDrop removes those of low layers, AdapterFusion mixes several.

    Code: finetune.py merge
    Source: Houlsby et al. (2019, arXiv 1902.00751), sec. 2; Pfeiffer et al. (2021, arXiv 2005.00247); Rücklé
    et al. (2021, arXiv 2010.11918)
    """
    C, r = 64, 8
    down, up = torch.randn(C, r) / 8, torch.randn(r, C)
    x, y = torch.randn(2000, C), torch.randn(30, C)

    def adapter(x, up):
        return x + F.relu(x @ down) @ up

    def lora(x, up):
        return x + (x @ down) @ up

    rows = []
    for name, f in (("adapter", adapter), ("LoRA", lora)):
        matrix = torch.linalg.lstsq(x, f(x, up)).solution  # the best single matrix in its place
        error = (y @ matrix - f(y, up)).norm() / f(y, up).norm()
        rows.append((name, largest(f(y, 0 * up) - y), error))
    table("update | change at first | error of the best single matrix in its place", *rows)
    assert rows[0][1] == rows[1][1] == 0
    assert rows[0][2] > 0.2 and rows[1][2] < 1e-4


def test_sft_learns_the_next_token_of_answers_only():
    """How does supervised fine-tuning differ from pretraining?

    Model and loss are the same. Usually the targets of the prompt are set to -100: the loss is the mean over
    the tokens of the answer, and the prompt is what they are predicted from.

    Often told: it is another kind of learning. Or the loss is divided by the padded length.
    Code: data/examples.py Examples.tensors
    Source: Ouyang et al. (2022, arXiv 2203.02155), sec. 3; `completion_only_loss` of TRL for the targets
    """
    model, ids, n_prompt = drawn_model(), torch.randint(64, (1, 12)), 6
    targets = ids[:, 1:].clone()
    targets[:, : n_prompt - 1] = -100
    streams = []

    def record(module, inputs, x):
        x.retain_grad()
        streams.append(x)

    model.model.norm.register_forward_hook(record)
    loss = model.loss(ids[:, :-1], targets)
    loss.backward()
    learning = places(streams[0].grad[0].abs().sum(-1) > 0)
    table("positions whose prediction is learned | targets", (learning, (targets != -100).sum()))
    assert learning == [5, 6, 7, 8, 9, 10]
    by_hand = F.cross_entropy(model(ids[:, :-1])[0, 5:], ids[0, 6:])
    assert abs(loss - by_hand) < 1e-5


def test_one_pass_trains_every_turn_of_a_conversation():
    """How is a conversation of several turns learned?

    As one sequence, with targets in all answers. As no position sees a later one, its loss in sum is that of
    one sample for each answer with all before it, for far fewer tokens: with k equal turns about 2/(k + 1).

    Often told: split it into k samples, or train on the last turn.
    Code: data/examples.py encode_conversation
    Source: it follows from the causal mask
    """
    model, turns = drawn_model(), [torch.randint(64, (n,)) for n in (4, 5, 3, 6, 4, 5)]  # the user begins
    ends = torch.tensor([len(turn) for turn in turns]).cumsum(0).tolist()

    def loss(ids, answers):
        targets = torch.full_like(ids, -100)
        for i in answers:
            targets[ends[i - 1] : ends[i]] = ids[ends[i - 1] : ends[i]]
        total, _ = model.summed_loss(ids[None, :-1], targets[None, 1:])
        return total.item()

    ids = torch.cat(turns)
    apart = [loss(ids[: ends[i]], [i]) for i in (1, 3, 5)]
    rows = [("one", loss(ids, (1, 3, 5)), len(ids)), ("three", sum(apart), ends[1] + ends[3] + ends[5])]
    table("samples | loss in sum | tokens read", *rows)
    assert abs(rows[0][1] - rows[1][1]) < 1e-3 and rows[1][2] == 2 * rows[0][2]


def test_fine_tuning_forgets_and_replay_prevents_most_of_it():
    """Why does a fine-tuned model get worse at what it could do?

    Nothing in the new loss holds the old behaviour in place. A share of old data in each batch (replay) keeps
    most of it, at little cost to the new.

    Code: finetune.py add_replay
    Source: McCloskey & Cohen (1989); Ibrahim et al. (2024, arXiv 2403.08763)
    """
    old, new = (torch.randn(2, 12, 12) * 2.5).softmax(-1)  # two languages: p(next | token)

    def sentences(language, n):
        ids = [torch.randint(12, (n,))]
        for _ in range(16):
            ids.append(torch.multinomial(language[ids[-1]], 1)[:, 0])
        return torch.stack(ids, 1)

    def batches(n_old):
        def batch(step):
            rows = torch.cat((sentences(old, n_old), sentences(new, 12 - n_old)))
            return rows[:, :-1], rows[:, 1:]

        return batch

    model = Transformer(tiny_config(vocab_size=12, n_layer=1, n_embd=32, n_head=2))
    train(model, batches(12), 100, 1e-2)
    base = {name: p.clone() for name, p in model.state_dict().items()}
    tests = [sentences(language, 64) for language in (old, new)]

    def losses():
        return [model.loss(ids[:, :-1], ids[:, 1:]).item() for ids in tests]

    rows = [("the base", *losses())]
    for name, n_old in (("the new alone", 0), ("3 old rows in 12", 3)):
        model.load_state_dict(base)
        train(model, batches(n_old), 100, 1e-2)
        rows.append((name, *losses()))
    table("trained on | loss on the old language | on the new", *rows)
    (_, before, _), (_, forgot, _), (_, kept, _) = rows
    assert forgot > before + 0.5
    assert forgot - kept > 0.5 * (forgot - before)
    assert rows[2][2] < rows[1][2] + 0.3


def test_dpo_starts_at_ln_2_and_learns_most_from_pairs_in_the_wrong_order():
    """What is DPO?

    Direct preference optimisation: -ln sigmoid(margin), margin = b (ln p/p0 of the chosen answer - ln p/p0 of
    the rejected one). At the start p = p0, and the loss is ln 2. The gradient of a pair is scaled by b
    sigmoid(-margin): those that moved the right way count little. There is no model of rewards, and nothing
    is drawn.

    Often told: it makes the chosen answer likelier. It raises its odds against the other; both may become
    less likely (Pang et al., 2024, arXiv 2404.19733).
    Code: finetune.py measure_preference
    Source: Rafailov et al. (2023, arXiv 2305.18290), sec. 4, eq. 7
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


def test_a_reward_model_learns_differences_only():
    """What is a reward model?

    A language model with one output, read at the last token, trained on pairs with -ln sigmoid(r_chosen -
    r_rejected). A constant added to all rewards of a prompt changes nothing: they have no zero. It may be of
    another size than the policy, as in InstructGPT (6 and 175 billion parameters).

    Often told: it must be the policy's base model.
    Code: finetune.py PreferenceLoss
    Source: Ouyang et al. (2022, arXiv 2203.02155), sec. 3.5, eq. 1
    """
    model, output = Transformer(tiny_config(vocab_size=16, n_layer=1, n_embd=32, n_head=2)), nn.Linear(32, 1)
    both = nn.ModuleList((model, output))

    def reward(ids):
        return output(model.hidden(ids)[:, -1])[:, 0]

    def pairs(n):
        """Of two texts, the one with more 3s is preferred."""
        a, b = torch.randint(16, (2, n, 8))
        more, fewer = ((ids == 3).sum(1) for ids in (a, b))
        chosen = torch.where((more > fewer)[:, None], a, b)
        rejected = torch.where((more > fewer)[:, None], b, a)
        return chosen[more != fewer], rejected[more != fewer]

    def loss(chosen, rejected, constant=0):
        return -F.logsigmoid((reward(chosen) + constant) - (reward(rejected) + constant)).mean()

    train(both, lambda step: pairs(64), 80, 5e-3, loss)
    chosen, rejected = pairs(400)
    with torch.no_grad():
        accuracy = (reward(chosen) > reward(rejected)).float().mean()
        row = (accuracy, loss(chosen, rejected), loss(chosen, rejected, 100))
    table("pairs in the right order | loss | loss with 100 added to all rewards", row)
    assert row[0] > 0.9 and abs(row[1] - row[2]) < 1e-3


def test_the_clip_of_ppo_stops_the_gradient_outside_the_trusted_region():
    """What does PPO optimise, and what is in memory?

    PPO draws texts, has them rated, and makes the better ones likelier: it maximises min(r A, clip(r, 1 - e,
    1 + e) A). A, the advantage, is how much better a token did than expected; r = p / p_old is how much
    likelier it has become since it was drawn; e is about 0.2. Once r is beyond 1 +- e in the direction that A
    favours, there is no gradient. Four models are held: the policy, which writes, and the critic, which says
    what to expect, both learn; the reward model and the reference, the policy as it began, do not.

    Code: finetune.py RewardLoss
    Source: Schulman et al. (2017, arXiv 1707.06347), eq. 7; Ouyang et al. (2022), sec. 3.5
    """
    rows = []
    for advantage in (1.0, -1.0):
        ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5], requires_grad=True)
        torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum().backward()
        rows.append((advantage, *ratio.grad))
    table("A | gradient at r = 0.5 | 0.9 | 1.0 | 1.1 | 1.5", *rows)
    assert [row[1:] for row in rows] == [(1, 1, 1, 1, 0), (0, -1, -1, -1, -1)]
    learns, frozen = 16, 2  # bytes per parameter: see the lesson on full fine-tuning
    sizes = {"PPO": 2 * learns + 2 * frozen, "DPO": learns + frozen, "DPO, log p of the start kept": learns}
    table("method | bytes per parameter, if all models are of one size", *sizes.items())


def test_a_baseline_without_the_answer_itself_changes_the_variance_and_not_the_mean():
    """Why is the mean reward of the other answers subtracted?

    A reward times the gradient of the answer's ln p is right on average. What does not depend on the answer,
    such as the mean reward of the other G - 1, can be subtracted: the average stays, and it no longer matters
    whether rewards are 0 and 1 or 10 and 11. The mean of all G holds the answer's own reward, and with it the
    gradient is (G - 1)/G of what it should be.

    Often told: a baseline always lowers the variance. Not where rewards are 0 and 1 and the model is mostly
    right: without it, wrong answers push nothing.
    Code: finetune.py advantages
    Source: Williams (1992), sec. 6; Kool et al. (2019, "Buy 4 REINFORCE samples, get a baseline for free!");
    Ahmadian et al. (2024, arXiv 2402.14740)
    """
    G = 4

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
    for name, subtract in (
        ("nothing", lambda rewards: rewards),
        ("mean of the others", advantages),
        ("mean of the group", lambda rewards: rewards - rewards.mean(1, keepdim=True)),
    ):
        share, mostly_right = estimate([0.7, 0.15, 0.1, 0.05], 0.0, subtract)
        _, mostly_wrong = estimate([0.3, 0.7], 0.0, subtract)
        _, shifted = estimate([0.3, 0.7], 10.0, subtract)
        rows.append((name, share, mostly_right, mostly_wrong, shifted))
    heads = "gradient, share of the exact one | variance, if mostly right | mostly wrong | rewards 10 and 11"
    table(f"subtracted | {heads}", *rows)
    nothing, others, group = rows
    assert abs(nothing[1] - 1) < 0.02 and abs(others[1] - 1) < 0.02 and abs(group[1] - (G - 1) / G) < 0.02
    assert nothing[2] < 0.5 * others[2] and others[3] < 0.8 * nothing[3]
    assert abs(others[4] / others[3] - 1) < 0.05 and nothing[4] > 50 * others[4]


def test_a_reward_that_can_be_gamed_is_gamed():
    """What is reward hacking?

    The model learns what is rewarded, not what was meant. It shall answer a number with the next one, and
    end. Where an answer earns 1 as soon as it contains the right number, it learns to name number after
    number; where length is paid, never to end. Both rewards rise, and right answers become rare.

    Often told: it takes a clever model. It takes a gradient.
    Code: finetune.py reward
    Source: Skalse et al. (2022, arXiv 2209.13085); Gao et al. (2023, arXiv 2210.10760)
    """
    END, QUESTION, G = 14, 15, 8
    config = tiny_config(vocab_size=16, block_size=16, n_layer=1, n_embd=32, n_head=2)
    pupil, numbers = Transformer(config), torch.arange(12)
    lessons = torch.stack(
        (torch.full((12,), QUESTION), numbers, (numbers + 1) % 12, torch.full((12,), END)), 1
    )
    train(pupil, lambda step: (lessons[:, :-1], lessons[:, 1:]), 25, 1e-2)  # it knows some of it
    start = {name: p.clone() for name, p in pupil.state_dict().items()}

    def exact(number, said):
        return float(said == [(number + 1) % 12, END])

    def contains(number, said):
        return float((number + 1) % 12 in said)

    def length(number, said):
        return len(said) / 8

    def draw(seed):
        """G answers of 8 tokens at most to each number, each up to its END."""
        prompts = [[QUESTION, n] for n in range(12) for _ in range(G)]
        steps = list(generate(pupil, prompts, 8, stop_ids={END}, seed=seed, temperature=1.0, top_p=1.0))
        answers = [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]
        return [said + [END] if len(said) < 8 else said for said in answers]

    def scores(reward, answers):
        return torch.tensor([reward(row // G, said) for row, said in enumerate(answers)])

    def row_of(name, reward):
        answers = draw(seed=0)
        mean_length = sum(map(len, answers)) / len(answers)
        return name, scores(reward, answers).mean(), scores(exact, answers).mean(), mean_length

    rows = []
    for reward in (exact, contains, length):
        pupil.load_state_dict(start)
        rows.append(row_of(f"{reward.__name__}: before", reward))
        objective, optimizer = RewardLoss(pupil), torch.optim.AdamW(pupil.parameters(), lr=5e-3)
        for step in range(60):
            answers = draw(seed=1 + step)
            weights = advantages(scores(reward, answers).view(-1, G)).flatten()
            ids, targets = torch.zeros(len(answers), 9, dtype=torch.long), torch.full((len(answers), 9), -100)
            for row, said in enumerate(answers):
                ids[row, : len(said) + 1] = torch.tensor([QUESTION, row // G, *said[:-1]])
                targets[row, 1 : len(said) + 1] = torch.tensor(said)
            loss, _ = objective(ids, targets, weights)
            (loss / len(answers)).backward()
            optimizer.step()
            optimizer.zero_grad()
        rows.append(row_of("... after", reward))
    table("what is rewarded | its mean | exact answers | tokens of an answer", *rows)
    assert rows[1][2] > rows[0][2] + 0.2  # what was meant is rewarded, and learned
    for before, after in (rows[2:4], rows[4:6]):
        assert after[1] > before[1] + 0.1 and after[2] < 0.5 * before[2] and after[3] > before[3]


def test_pass_at_1_rises_while_pass_at_8_falls():
    """Does learning from rewards teach something new?

    It makes likelier what the model already draws at times. pass@k, the chance that one of k answers is
    right, is 1 - (1 - p)^k for one question. Here two methods suit different questions, which the model
    cannot tell apart: first it tries both, and one of 8 answers is nearly always right. It learns to use the
    better one always: pass@1 rises, and the questions of the other are lost, however often it tries.

    Often told: a higher score means that the model solves more.
    Code: finetune.py measure_rewards
    Source: Chen et al. (2021, arXiv 2107.03374), sec. 2.1, for pass@k; Yue et al. (2025, arXiv 2504.13837)
    """
    G, suits = 8, (torch.arange(100) >= 60).long()  # the method that suits each of 100 questions
    logits = torch.zeros(2, requires_grad=True)  # the model: how likely it takes one or the other
    optimizer, rows = torch.optim.SGD([logits], lr=1.0), []
    for step in range(121):
        log_p = logits.log_softmax(0)
        if step % 40 == 0:
            p = log_p.detach().exp()[suits]  # that an answer to the question is right
            entropy = -(log_p * log_p.exp()).sum()
            rows.append((step, p.mean(), (1 - (1 - p) ** G).mean(), entropy))
        drawn = torch.multinomial(log_p.detach().exp().expand(100, 2), G, replacement=True)
        rewards = (drawn == suits[:, None]).float()
        loss = -(advantages(rewards) * log_p[drawn]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    table("step | pass@1 | pass@8 | entropy, nats", *rows)
    assert rows[0][1] < 0.51 and rows[0][2] > 0.99
    assert rows[-1][1] > 0.58 and rows[-1][2] < 0.75 and rows[-1][3] < 0.2
