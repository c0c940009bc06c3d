"""Decoding: from scores to text."""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from model import Transformer, config_to_json
from sample import (
    Sampling,
    draw,
    generate,
    keep_top_k,
    keep_top_p,
    make_cache,
    next_tokens,
    one_token,
    prefill,
    probabilities_of,
)
from train import bits_per_byte

from .book import (
    CHARACTERS,
    SPEECH,
    bars,
    drawn_model,
    largest,
    lines,
    table,
    tiny_config,
    to_ids,
    to_text,
    train,
)


@torch.inference_mode()
def beam(model, ids, n_new, width, allowed=None, n_groups=1, penalty=0.0):
    """Continue ids by n_new tokens -> the best texts that were found (n, n_new), and the ln p of each (n,).

    allowed(text) -> the ids that may follow a text, the list of its new ids; None: all. Each of the groups
    keeps `width` texts, n in all; a token costs a group `penalty` for each beam of the groups before it that
    took this token at the same step.
    """
    n, V = n_groups * width, model.config.vocab_size
    cache = make_cache(model, n, len(ids) + n_new)
    logits = prefill(model, cache, [ids] * n)  # (n, V)
    texts = torch.empty(n, 0, dtype=torch.long)
    totals = torch.full((n_groups, width), -math.inf)
    totals[:, 0] = 0  # at first all beams of a group are equal: one of them counts
    for _ in range(n_new):
        log_p = logits.log_softmax(-1)
        if allowed is not None:
            for row, text in zip(log_p, texts.tolist()):
                forbidden = torch.ones(V, dtype=torch.bool)
                forbidden[allowed(text)] = False
                row[forbidden] = -math.inf
        candidates = (totals.view(n, 1) + log_p).view(n_groups, width * V)
        parents, new, taken = [], [], torch.zeros(V)
        for group in range(n_groups):
            scores = candidates[group] - penalty * taken.repeat(width)
            best = scores.topk(width).indices
            totals[group] = candidates[group, best]
            parents.append(group * width + best // V)
            new.append(best % V)
            taken += torch.bincount(best % V, minlength=V)
        parents, new = torch.cat(parents), torch.cat(new)
        texts = torch.cat((texts[parents], new[:, None]), dim=1)
        cache.k, cache.v = cache.k[:, parents], cache.v[:, parents]  # each goes on from what its parent read
        logits = one_token(model, cache, new)
    return texts, totals.flatten()


@torch.inference_mode()
def log_p_after(model, ids, texts):
    """ln p of every token of texts (n, T) that continue ids: (n, T), from one run without a cache."""
    rows = torch.cat((torch.tensor([ids] * len(texts)), texts), dim=1)
    logits = model(rows[:, :-1])[:, len(ids) - 1 :]  # (n, T, V)
    return logits.log_softmax(-1).gather(-1, texts[..., None]).squeeze(-1)


def in_transformers(model):
    """The same weights in transformers' own Llama."""
    settings = config_to_json(model.config, torch.float32)
    theirs = LlamaForCausalLM(LlamaConfig(**settings, eos_token_id=None))  # no id ends a text
    theirs.load_state_dict(model.state_dict(), strict=False)  # the head is tied to the embedding
    return theirs.eval()


def calibration(p, targets, n_bins=8):
    """How far the probabilities p (N, V) can be believed, where the right ids are targets (N,).

    -> the mean probability of the likeliest token and the share of right ones, in bins of equal size from the
    least sure to the surest, (n_bins,) each; and the loss.
    """
    confidence, guess = p.max(-1)
    right = (guess == targets).float()
    bins = confidence.argsort().chunk(n_bins)
    loss = -p.gather(-1, targets[:, None]).log().mean()
    means = [torch.stack([values[places].mean() for places in bins]) for values in (confidence, right)]
    return *means, loss.item()


def accept(p, q, proposed, generator):
    """Which of the proposed ids stand, and the one that follows them, as a list.

    proposed[i] was drawn from q[i] (V,), where the large model would have drawn from p[i]; p (n + 1, V).
    """
    for i, new in enumerate(proposed):
        if torch.rand((), generator=generator) * q[i][new] >= p[i][new]:
            rest = (p[i] - q[i]).clamp(min=0)
            return [*proposed[:i], *draw(rest[None], generator).tolist()]
    return [*proposed, *draw(p[-1:], generator).tolist()]


@torch.inference_mode()
def speculate(model, draft, ids, n_new, n_draft, sampling, generator):
    """Continue a list of ids by n_new -> (all ids, how often the large model ran)."""
    end, n_runs = len(ids) + n_new, 0
    caches = {reader: make_cache(reader, 1, end + n_draft) for reader in (model, draft)}

    def read(reader, ids, n):
        """Read the ids that the reader's cache lacks -> the distributions (n, V) behind the last n ids."""
        x = reader.hidden(torch.tensor([ids[caches[reader].span :]]), caches[reader])
        return probabilities_of(reader.head(x[0, -n:]), sampling)

    while len(ids) < end:
        proposed, q = [], []
        for _ in range(n_draft):
            q.append(read(draft, ids + proposed, 1)[0])
            proposed += draw(q[-1][None], generator).tolist()
        p = read(model, ids + proposed, n_draft + 1)  # all guesses in one run
        n_runs += 1
        ids = ids + accept(p, q, proposed, generator)
        for cache in caches.values():  # forget the rejected guesses
            cache.truncate([min(cache.span, len(ids) - 1)])
    return ids[:end], n_runs


def test_greedy_is_the_limit_of_temperature_and_of_top_k():
    """How are greedy decoding, temperature and top-k related?

    p is proportional to exp(z / temperature), with the scores z. A temperature near 0 gives the likeliest
    token, as k = 1 does; a temperature of 1 gives the model's own distribution, a high one an even
    distribution. The entropy grows with it; the order of the tokens stays.

    Code: sample.py probabilities_of
    Break: sample.py probabilities_of: `/ sampling.temperature` becomes `* sampling.temperature`
    Source: Holtzman et al. (2020, arXiv 1904.09751), sec. 3
    问: 贪心解码、温度和 top-k 之间是什么关系？
    答: 概率正比于 exp(z / 温度)：温度趋于 0 或 k = 1 时总是取概率最大的词元，即贪心解码；温度为 1 时就是模型
    本身的分布，温度越高越接近均匀分布，而词元的排序始终不变。
    """
    scores, rows = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), []
    for temperature in (1e-30, 0.05, 0.5, 1.0, 2.0, 1e4):
        p = probabilities_of(scores, Sampling(temperature=temperature, top_p=1.0))[0]
        rows.append((temperature, p, -torch.special.xlogy(p, p).sum()))
    table("temperature | probabilities | entropy", *rows)
    entropies = [row[2].item() for row in rows]
    assert entropies == sorted(entropies) and entropies[0] == 0
    assert abs(entropies[-1] - math.log(4)) < 1e-4
    assert torch.allclose(rows[1][1], rows[0][1], atol=1e-6)
    assert torch.allclose(rows[3][1], scores.softmax(-1)[0])
    assert torch.equal(keep_top_k(scores, 1).softmax(-1)[0], rows[0][1])
    assert next_tokens(scores, Sampling(temperature=0), None) == rows[0][1].argmax()
    assert all((p.diff() <= 0).all() for _, p, _ in rows)


def test_temperature_before_top_p_changes_which_tokens_are_kept():
    """In which order do temperature, top-k and top-p act, and does it matter?

    Here, as in transformers, the order is temperature, top-k, top-p. A temperature moves probability between
    the tokens, so the smallest set that reaches p has another size after it: top-p first would keep the same
    tokens at every temperature. Top-k looks at the order of the tokens only, which a temperature leaves as it
    is, so it keeps the same ones before and after. By default llama.cpp divides by the temperature last.

    Code: sample.py probabilities_of
    Break: sample.py probabilities_of: `keep_top_p(logits, sampling.top_p)` becomes
    `keep_top_p(logits * sampling.temperature, sampling.top_p) / sampling.temperature`
    Source: _get_logits_processor in transformers' generation/utils.py; --samplers in the help of llama.cpp
    问: 温度、top-k、top-p 按什么顺序起作用？顺序不同会影响结果吗？
    答: 这里与 transformers 一样，依次是温度、top-k、top-p。温度会改变累积概率，所以先后顺序会改变 top-p 的候
    选集合；top-k 只看排序，温度不改变排序，因此不受影响。llama.cpp 默认最后才除以温度。
    """
    scores, rows = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]]), []
    for temperature in (0.5, 1.0, 2.0):
        top_p, top_k = Sampling(temperature, top_p=0.9), Sampling(temperature, top_k=2, top_p=1.0)
        after = [(probabilities_of(scores, way) > 0).sum().item() for way in (top_p, top_k)]
        before = [kept.isfinite().sum().item() for kept in (keep_top_p(scores, 0.9), keep_top_k(scores, 2))]
        rows.append((temperature, after[0], before[0], after[1], before[1]))
    table("temperature | top-p 0.9 after it keeps | before it | top-k 2 after it | before it", *rows)
    assert [row[1] for row in rows] == [2, 3, 4]
    assert [row[2] for row in rows] == [3, 3, 3]
    assert all(row[3:] == (2, 2) for row in rows)


def test_top_k_keeps_a_fixed_number_and_top_p_adapts(reader_of_the_speech):
    """Top-k or top-p?

    Top-k keeps k tokens, whatever the distribution. Top-p keeps the smallest set that together reaches p: one
    token where the model is sure, many where it is not. The token that crosses p is in, so that at least one
    always is.

    Code: sample.py keep_top_p
    Break: sample.py keep_top_p: `probabilities.cumsum(-1) - probabilities` becomes `probabilities.cumsum(-1)`
    Source: Fan et al. (2018, arXiv 1805.04833) on top-k; Holtzman et al. (2020, arXiv 1904.09751) on top-p
    问: top-k 和 top-p 采样有什么区别？
    答: top-k 总是保留概率最高的 k 个词元；top-p 保留累积概率达到 p 的最小集合，模型有把握时可能只剩一个词元，
    没把握时会保留很多。
    """
    contexts = to_ids(SPEECH).unfold(0, 8, 1)  # (N, 8)
    with torch.inference_mode():
        logits = reader_of_the_speech(contexts)[:, -1]  # (N, V)
    p = logits.softmax(-1)
    kept_k, kept_p = keep_top_k(logits, 10).isfinite(), keep_top_p(logits, 0.9).isfinite()
    entropy = -torch.special.xlogy(p, p).sum(-1)
    rows, groups = [], {f"{i}": {} for i in range(1, 13)}
    for name, n in (("sure", entropy.argmin()), ("not sure", entropy.argmax())):
        context, likeliest = repr(to_text(contexts[n])), p[n].topk(12).values.tolist()
        rows.append((name, context, likeliest[0], kept_k[n].sum(), kept_p[n].sum()))
        for rank, height in zip(groups.values(), likeliest):
            rank[f"{name}, after {context}"] = height
    table("the model is | after | p of its guess | kept by top-k 10 | by top-p 0.9", *rows)
    bars("The probabilities of the 12 likeliest characters", "probability", groups)
    assert (kept_k.sum(-1) == 10).all()
    assert kept_p.sum(-1).min() == rows[0][4] == 1
    assert rows[1][4] > 12
    reached = (p * kept_p).sum(-1)
    last = p.masked_fill(~kept_p, 1).amin(-1)
    assert (reached > 0.9 - 1e-5).all() and (reached - last < 0.9 + 1e-5).all()  # no smaller set reaches it


def test_drawing_is_a_race_and_adding_gumbel_noise_is_the_same_race(reader_of_the_speech):
    """How is a token drawn from a distribution?

    Let token i arrive after a random time, exponentially distributed with rate p_i, and take the first to
    arrive: it is token i with probability p_i (multinomial sampling). Minus the logarithm of such a time is
    ln p_i plus Gumbel noise, -ln(-ln u) with u uniform between 0 and 1. So the argmax of scores plus Gumbel
    noise is the same draw, and needs no normaliser. The first k to arrive are k tokens drawn without
    replacement.

    Code: sample.py draw
    Break: sample.py draw: `-uniform.log()` becomes `uniform`
    Source: Maddison et al. (2014, arXiv 1411.0030); Kool et al. (2019, arXiv 1903.06059) on the first k
    问: 从概率分布中抽取词元（multinomial sampling）是怎么实现的？Gumbel-max 技巧是什么？
    答: 给每个 logit 加上独立的 Gumbel 噪声 -ln(-ln u) 再取 argmax，得到词元 i 的概率恰好是 p_i，不需要归一
    化；这等价于速率为 p_i 的指数时钟谁先响，取前 k 个就是不放回地抽 k 个词元。
    """
    with torch.inference_mode():
        logits = reader_of_the_speech(to_ids("that t")[None])[0, -1]  # (V,)
    p, n = logits.softmax(-1), 20_000
    drawn = draw(p.expand(n, -1), torch.Generator().manual_seed(0))
    u = torch.rand(n, len(p), generator=torch.Generator().manual_seed(0))
    order = (logits - (-u.log()).log()).topk(2).indices  # (n, 2), by scores with Gumbel noise
    pairs = p[:, None] * p / (1 - p[:, None])  # the second is j after i was drawn and put aside
    of_second = pairs.sum(0) - pairs.diagonal()
    by_race, by_noise, seconds = (torch.bincount(ids, minlength=len(p)) / n for ids in (drawn, *order.T))
    columns = (p, by_race, by_noise, of_second, seconds)
    rows = [(repr(CHARACTERS[i]), *(column[i] for column in columns)) for i in p.topk(3).indices]
    heads = "token | p | share of 20,000 draws | by Gumbel noise | p of coming second | share of seconds"
    table(heads, *rows)
    assert (drawn == order[:, 0]).float().mean() > 0.999
    assert largest(by_race - p) < 0.015 and largest(seconds - of_second) < 0.015


def test_forbidding_tokens_does_not_condition_the_model_on_the_rule(reader_of_the_speech):
    """How is a format enforced, and what does that do to the probabilities?

    The scores of forbidden tokens become minus infinity before the softmax, at each step. Among the allowed
    tokens the ratios stay. But a step does not look ahead: a beginning, such as the first in the table, keeps
    its full share even if most of what would follow it is forbidden. The model given the rule, that is its
    texts drawn freely and thrown away unless they obey, begins less often that way.

    Often told: a mask gives the model's distribution over valid outputs. It does so for one token, not for a
    text.
    Code: sample.py generate
    Break: sample.py generate: `logits[:, unused] = -math.inf` becomes `logits[:, unused] -= 1.0`
    Source: Willard and Louf (2023, arXiv 2307.09702); Park et al. (2024, arXiv 2405.21047)
    问: 如何强制模型按指定格式输出？这会改变概率分布吗？
    答: 每一步在 softmax 之前把不允许的词元的 logit 设为负无穷，允许的词元之间的比例不变；但每一步只在局部重新
    归一化，不会预见后文，所以整段文本的分布并不等于模型在该约束下的条件分布。
    """
    model, ids, n, V = reader_of_the_speech, to_ids("we c").tolist(), 2000, len(CHARACTERS)
    with torch.inference_mode():
        rows = torch.tensor([[*ids, first] for first in range(V)])
        of_first, of_second = model(rows)[:, -2:].softmax(-1).unbind(1)  # (V, V) each
    p = of_first[0]
    # a rule is a letter that may not be among the next two: all V rules, then the one that changes most
    allowed = p.expand(V, V).masked_fill(torch.eye(V, dtype=torch.bool), 0)  # (rules, first letters)
    masked = allowed / allowed.sum(-1, keepdim=True)
    obeying = allowed * (1 - of_second.T)
    given_the_rule = obeying / obeying.sum(-1, keepdim=True)
    forbidden, letter = divmod((masked - given_the_rule).argmax().item(), V)
    masked, given_the_rule = masked[forbidden], given_the_rule[forbidden]

    def drawn(unused_ids):
        """n texts of two tokens (n, 2)."""
        steps = generate(model, [ids] * n, 2, temperature=1.0, top_p=1.0, unused_ids=unused_ids)
        return torch.tensor(list(steps)).T

    by_mask, free = drawn([forbidden]), drawn([])
    kept = free[(free != forbidden).all(-1)]
    shares = [torch.bincount(texts[:, 0], minlength=V) / len(texts) for texts in (by_mask, kept)]
    columns = (p, masked, shares[0], given_the_rule, shares[1])
    shown = [letter, *(i for i in p.topk(3).indices.tolist() if i != letter)]
    print(f"    after 'we c', no {CHARACTERS[forbidden]!r} may be among the next two letters")
    heads = "first letter | p | masked | of 2,000 draws | given the rule | of the draws that obey it"
    table(heads, *((repr(CHARACTERS[i]), *(column[i] for column in columns)) for i in shown))
    assert (by_mask != forbidden).all()
    assert largest(shares[0] - masked) < 0.04 and largest(shares[1] - given_the_rule) < 0.04
    assert masked[letter] - given_the_rule[letter] > 0.05


def test_greedy_decoding_ends_in_a_loop(reader_of_the_speech):
    """Why do language models repeat themselves?

    Greedy decoding is a function from context to token. With a context of at most T tokens it has a finite
    number of states, so it must come back to one of them, and from there it repeats itself for ever; with 8
    tokens, as here, it soon does. Large models often loop long before they must, since each repetition makes
    the next one likelier. Here the same weights do not loop when tokens are drawn.

    Often told: only duplicates in the data cause it. With a limited context, greedy decoding has to loop
    whatever the data was.
    Code: sample.py generate
    Break: sample.py next_tokens: `return logits.argmax(-1)` becomes
    `return draw(logits.softmax(-1), generator)`
    Source: Holtzman et al. (2020, arXiv 1904.09751), fig. 4; Xu et al. (2022, arXiv 2206.02369)
    问: 大语言模型为什么会复读（重复生成）？
    答: 贪心解码是从上下文到下一个词元的确定函数，上下文长度有限，状态就有限，迟早会回到出现过的状态，从此无限
    循环；大模型往往更早陷入循环，因为每重复一次，下一次重复的概率就更高。同样的权重改用采样就不会这样循环。
    """
    model = Transformer(replace(reader_of_the_speech.config, block_size=8)).eval()
    model.load_state_dict(reader_of_the_speech.state_dict())
    rows = []
    for temperature in (0.0, 1.0):
        steps = generate(model, [to_ids("Four").tolist()], 300, temperature=temperature, top_p=1.0)
        text = to_text([i for (i,) in steps])
        pieces = [text[i : i + 8] for i in range(len(text) - 7)]
        # after how many characters the second half of the text comes again
        period = next((n for n in range(1, 100) if text[150:] == text[150 - n : -n]), "never")
        rows.append((temperature, repr(text[-40:]), len(set(pieces)) / len(pieces), period))
    table("temperature | the end of 300 characters | share of distinct pieces of 8 | period", *rows)
    assert rows[0][3] != "never" and rows[0][2] < 0.5
    assert rows[1][3] == "never" and rows[1][2] > 0.9


def test_a_repetition_penalty_must_treat_negative_scores_differently(reader_of_the_speech):
    """How does the repetition penalty work?

    Scores of tokens that were there are divided by the penalty (above 1) if positive, and multiplied by it if
    negative, since to divide a negative score would be a reward. A softmax does not notice if 10 is added to
    all scores, but this penalty does: its effect depends on where zero happens to be. To subtract a constant
    would not have this flaw.

    Often told: scores are divided. So says the paper; the rule for negative ones came with the libraries.
    Compare: sample.py probabilities_of: has temperature, top-k and top-p, but no penalty
    Source: Keskar et al. (2019, arXiv 1909.05858), sec. 4.1; RepetitionPenaltyLogitsProcessor in transformers
    问: 重复惩罚（repetition penalty）是怎么起作用的？
    答: 对已出现过的词元，正的 logit 除以惩罚系数，负的则乘以它，因为负数除以大于 1 的系数反而变大、成了奖励；
    由于 logits 没有天然的零点，惩罚的效果还取决于零点恰好在哪里。
    """
    ids = to_ids("that we here highly resolve")
    with torch.inference_mode():
        scores = reader_of_the_speech(ids[None])[:, -1]  # (1, V)
    seen = torch.zeros_like(scores, dtype=torch.bool)
    seen[0, ids] = True

    def penalise(scores):
        return torch.where(seen, torch.where(scores > 0, scores / 1.5, scores * 1.5), scores)

    def odds(scores):
        """p of each token / p of all that were not there."""
        p = scores.softmax(-1)
        return (p / p[~seen].sum())[0]

    high, low = (scores.where(seen, worst).flatten() for worst in (-math.inf, math.inf))
    high, low = high.argmax(), low.argmin()
    ways = {
        "as they are": scores,
        "divided by 1.5": torch.where(seen, scores / 1.5, scores),
        "divided or multiplied": penalise(scores),
        "10 added to all": scores + 10,
        "the same, divided or multiplied": penalise(scores + 10),
    }
    rows = [(way, z[0, high], odds(z)[high], z[0, low], odds(z)[low]) for way, z in ways.items()]
    names = [repr(CHARACTERS[i]) for i in (high, low)]
    table(f"scores | of {names[0]} | its odds against new tokens | of {names[1]} | its odds", *rows)
    assert torch.equal(penalise(scores), RepetitionPenaltyLogitsProcessor(1.5)(ids[None], scores.clone()))
    assert scores[0, high] > 0 > scores[0, low]
    assert odds(penalise(scores))[high] < odds(scores)[high]
    assert odds(ways["divided by 1.5"])[low] > odds(scores)[low] > odds(penalise(scores))[low]
    assert torch.allclose(odds(scores + 10), odds(scores), rtol=1e-3)
    assert odds(penalise(scores + 10))[low] < 0.5 * odds(penalise(scores))[low]


def test_banning_repeated_n_grams_is_a_hard_ban(reader_of_the_speech):
    """What does no_repeat_ngram_size do?

    It sets to minus infinity the score of every token that would complete an n-gram which is there already,
    in the prompt or after it. So no n-gram can come twice, and no loop can close. But much that should come
    again is forbidden as well, a name or a date for instance: of the speech itself, more than a third of the
    4-grams of characters are old ones.

    Compare: sample.py generate: forbids the same ids, unused_ids, at every step
    Source: Paulus et al. (2017, arXiv 1705.04304), sec. 2.5; NoRepeatNGramLogitsProcessor in transformers
    问: no_repeat_ngram_size 参数有什么作用，有什么副作用？
    答: 凡是会凑成已出现过的 n-gram 的词元，logit 一律设为负无穷，因此任何 n-gram 都不会出现第二次；副作用是本
    应重复的人名、日期等也被禁止。
    """

    def banned(ids, n):
        """The tokens that would complete an n-gram that is in ids already."""
        beginning = ids[len(ids) - n + 1 :]
        return [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == beginning]

    def repeated(ids):
        """How often the most frequent 4-gram is there, and the share of 4-grams that came before."""
        counts = Counter(zip(ids, ids[1:], ids[2:], ids[3:]))
        return max(counts.values()), 1 - len(counts) / counts.total()

    rows = []
    for ban in (False, True):
        ids = to_ids("Four score").tolist()
        for _ in range(70):
            with torch.no_grad():
                scores = reader_of_the_speech(torch.tensor([ids[-32:]]))[:, -1]
            if ban:
                theirs = NoRepeatNGramLogitsProcessor(4)(torch.tensor([ids]), scores.clone())
                scores[0, banned(ids, 4)] = -math.inf
                assert torch.equal(scores, theirs)
            ids.append(scores.argmax().item())
        name = "no 4-gram twice" if ban else "no ban"
        rows.append((name, repr(to_text(ids)[-40:]), *repeated(ids)))
    rows.append(("the speech", repr(SPEECH[-41:-1]), *repeated(to_ids(SPEECH).tolist())))
    table("80 characters with | their end | times the most frequent 4-gram | share of old 4-grams", *rows)
    assert rows[0][2] > 1 and rows[1][2:] == (1, 0)
    assert rows[2][3] > 1 / 3


def test_contrastive_search_prefers_tokens_unlike_the_context(reader_of_the_speech):
    """What is contrastive search?

    Of the k likeliest tokens it takes the one of largest (1 - a) p(v) - a max_j cos(h_v, h_j): what the model
    is sure of, less its similarity to the hidden states of the context. Nothing is drawn. With a = 0 it is
    greedy decoding; a larger a makes the tokens less similar, and here it breaks the loop. For each token the
    model must read k candidates, to know their hidden states.

    Often told: it penalises tokens that are similar to earlier ones. The similarity is of hidden states, and
    the model's own opinion counts, too.
    Compare: sample.py next_tokens: takes the likeliest token or draws one, and sees no hidden states
    Source: Su et al. (2022, arXiv 2202.06417)
    问: 对比搜索（contrastive search）是什么？
    答: 在概率最高的 k 个候选中，选 (1 - a)·p(v) - a·max cos(h_v, h_j) 最大者，即既要模型有把握，又要其隐状态
    与上文不太相似；a = 0 就是贪心解码，全程没有随机性。
    """
    model, prompt = reader_of_the_speech, to_ids("Four score").tolist()

    @torch.inference_mode()
    def write(a, k=4):
        """All ids, and the mean similarity of the new ones to their context."""
        ids, similarities = list(prompt), []
        for _ in range(50):
            context = ids[-31:]
            hidden = model.hidden(torch.tensor([context]))[0]  # (T, C)
            p, candidates = model.head(hidden[-1]).softmax(-1).topk(k)
            longer = torch.tensor([[*context, new] for new in candidates.tolist()])
            new_hidden = model.hidden(longer)[:, -1]  # (k, C)
            similarity = F.cosine_similarity(new_hidden[:, None], hidden, dim=-1).amax(-1)  # (k,)
            best = ((1 - a) * p - a * similarity).argmax()
            similarities.append(similarity[best].item())
            ids.append(candidates[best].item())
        return ids, sum(similarities) / len(similarities)

    rows = []
    for a in (0.0, 0.3, 0.6):
        ids, similarity = write(a)
        pieces = list(zip(ids, ids[1:], ids[2:], ids[3:]))
        rows.append((a, repr(to_text(ids[-40:])), similarity, len(set(pieces)) / len(pieces)))
        if a == 0:
            greedy = [new for (new,) in generate(model, [prompt], 22, temperature=0)]
            assert ids[10:32] == greedy
    table("a | the end of 60 characters | mean similarity | share of distinct pieces of 4", *rows)
    assert rows[0][2] > rows[1][2] > rows[2][2]
    assert rows[2][3] > rows[0][3] + 0.1


def test_beam_search_finds_what_greedy_decoding_misses(reader_of_the_speech):
    """What does beam search do?

    It keeps the b texts of highest probability so far: each is continued by every token, and the b best of
    all these stay. Greedy decoding is b = 1, and can take a likely token that leads nowhere likely. A larger
    b mostly finds a likelier text; with V tokens and texts of T, b = V^(T-1) keeps every beginning, and so
    tries everything. The beams share a KV cache, a row each; after a step each row is that of the parent.

    Often told: it picks several candidates per step. What it looks for is the text of highest probability.
    Code: model.py KVCache.append
    Break: model.py KVCache.append: `self.k[layer][rows, heads, positions] = k` becomes
    `self.k[layer][rows, heads, positions] = k[:1]`
    Source: Graves (2012, arXiv 1211.3711); Sutskever et al. (2014, arXiv 1409.3215), sec. 3.2
    问: 束搜索（beam search）是怎么做的？和贪心解码有什么区别？
    答: 每一步保留累计概率最高的 b 条序列，各自用所有词元扩展，再从全部候选中选出最好的 b 条；贪心解码就是 b =
    1，可能选了眼前概率高、后面却走不通的词元，b 更大通常能找到整体概率更高的序列。
    """
    model, rows, gains = reader_of_the_speech, [], []
    theirs = in_transformers(model)
    for prompt in ("Four score", "The world ", "that nation"):
        ids = to_ids(prompt).tolist()
        greedy = [new for (new,) in generate(model, [ids], 16, temperature=0)]
        assert beam(model, ids, 16, width=1)[0].tolist() == [greedy]
        for width in (1, 4, 16):
            texts, log_p = beam(model, ids, 16, width)
            rows.append((repr(prompt), width, repr(to_text(texts[0])), log_p[0]))
            assert torch.allclose(log_p, log_p_after(model, ids, texts).sum(-1), atol=1e-3)
        gains.append(rows[-1][3] - rows[-3][3])
        settings = dict(num_beams=4, num_return_sequences=4, do_sample=False, max_new_tokens=16)
        found = theirs.generate(torch.tensor([ids]), **settings)
        assert torch.equal(found[:, len(ids) :], beam(model, ids, 16, 4)[0])
    table("prompt | beams | the likeliest text of 16 that it finds | its ln p", *rows)
    assert min(gains) > -0.001 and max(gains) > 0.3
    everything = torch.cartesian_prod(*[torch.arange(len(CHARACTERS))] * 2)  # all texts of two tokens
    best = log_p_after(model, ids, everything).sum(-1).max()
    assert abs(beam(model, ids, 2, width=len(CHARACTERS))[1][0] - best) < 1e-4


def test_summed_log_probabilities_favour_short_texts(reader_of_the_speech):
    """Why does beam search normalise by length?

    Each further token multiplies the probability by less than 1, so of the texts that end, the likeliest tend
    to be short. A narrow beam does not notice, as a text that ends at once is not among its best beginnings;
    a wider one finds it. Sums of ln p are therefore divided by the length to a power a: with 0 the sum stays,
    with 1 it becomes the mean per token. transformers calls a length_penalty, but more of it favours longer
    texts.

    Often told: more beams give better text. They give likelier text, which from some width on is worse.
    Compare: sample.py generate: ends a text when it draws one of stop_ids, and compares no texts
    Source: Wu et al. (2016, arXiv 1609.08144), eq. 14; Stahlberg and Byrne (2019, arXiv 1908.10090)
    问: 束搜索为什么要做长度归一化（length penalty）？
    答: 每多一个词元就要再乘一个小于 1 的概率，累加的对数概率天然偏向短序列，束越宽越容易找到过短的结果；因此
    用对数概率之和除以长度的 a 次方来比较，a = 1 就是平均每个词元的对数概率。
    """
    ids, end, rows = to_ids("Four score").tolist(), CHARACTERS.index("."), []
    others = [i for i in range(len(CHARACTERS)) if i != end]
    for n in (0, 4, 8, 16):

        def allowed(text, n=n):
            """The end comes after n tokens, and not before."""
            return [end] if len(text) == n else others

        texts, log_p = beam(reader_of_the_speech, ids, n + 1, 16, allowed)
        rows.append((n, repr(to_text(texts[0])), log_p[0], log_p[0] / (n + 1)))
    table("tokens before the end | the likeliest text found | ln p | ln p per token", *rows)
    shortest, *_, longest = rows
    assert all(shortest[2] > row[2] for row in rows[1:]) and all(longest[2] < row[2] for row in rows[:-1])
    assert shortest[3] < longest[3]

    theirs, rows = in_transformers(reader_of_the_speech), []
    for length_penalty in (0.0, 1.0):
        settings = dict(eos_token_id=end, pad_token_id=end, length_penalty=length_penalty, max_new_tokens=16)
        for width in (2, 32):
            found = theirs.generate(torch.tensor([ids]), num_beams=width, do_sample=False, **settings)
            text = to_text(found[0, len(ids) :])
            rows.append((length_penalty, width, repr(text), len(text)))
    table("length_penalty of transformers | beams | text | tokens", *rows)
    narrow, wide, *normalised = [row[3] for row in rows]
    assert wide < narrow - 8 and wide < min(normalised) - 8


def test_the_likeliest_text_is_not_a_typical_one(reader_of_the_speech):
    """Is the likeliest text the best one?

    Not where many texts would do. With a coin that shows heads in 60 % of the tosses, the likeliest row of
    100 is all heads, and nobody will ever see it: unlikely rows are so many that together they are nearly
    certain. In the same way the text that beam search finds is far likelier than what the model mostly draws,
    and than what people write; often it is dull and repeats itself. The ln p per token of drawn texts is on
    average minus the entropy.

    Often told: beam search writes better than sampling. In translation, where few answers are right, it
    often does; in open text it does not.
    Code: sample.py next_tokens
    Break: sample.py next_tokens: `draw(probabilities_of(logits, sampling), generator)` becomes
    `logits.argmax(-1)`
    Source: Holtzman et al. (2020, arXiv 1904.09751), sec. 1 and fig. 2
    问: 概率最高的文本就是最好的文本吗？
    答: 不是：开放式生成中，概率最高的文本往往单调重复，它的概率远高于人写的或采样得到的文本，却几乎不会出现；
    典型文本每个词元的平均对数概率约等于负熵，正如 100 次抛掷正面概率为 60% 的硬币，全是正面的结果最可能，却从
    不会遇到。
    """
    model, n = reader_of_the_speech, 300
    ids = to_ids("Four score").tolist()
    steps = generate(model, [ids] * n, 16, temperature=1.0, top_p=1.0)
    drawn = torch.tensor(list(steps)).T  # (n, 16)
    rows = torch.cat((torch.tensor([ids] * n), drawn), dim=1)
    with torch.inference_mode():
        p = model(rows[:, :-1])[:, len(ids) - 1 :].softmax(-1)  # (n, 16, V)
        blocks = to_ids(SPEECH)[:1473].unfold(0, 33, 32)
        of_people = -model.loss(blocks[:, :-1], blocks[:, 1:])
    entropy = -torch.special.xlogy(p, p).sum(-1).mean()
    of_drawn = log_p_after(model, ids, drawn).mean(-1)  # (n,)
    texts, log_p = beam(model, ids, 16, width=16)
    likeliest = of_drawn.argmax()
    table(
        "a text | for example | ln p per token",
        ("found by 16 beams", repr(to_text(texts[0])), log_p[0] / 16),
        ("the likeliest of 300 drawn", repr(to_text(drawn[likeliest])), of_drawn[likeliest]),
        ("drawn, the mean of 300", repr(to_text(drawn[0])), of_drawn.mean()),
        ("minus the entropy", "", -entropy),
        ("the speech", repr(SPEECH[10:26]), of_people),
    )
    assert log_p[0] / 16 > of_drawn.max() - 0.001
    assert log_p[0] / 16 > max(of_drawn.mean(), of_people) + 0.2
    assert abs(of_drawn.mean() + entropy) < 0.1


def test_constrained_beams_rank_the_allowed_texts_only(reader_of_the_speech):
    """How does a model choose from a list of answers?

    At each step only tokens that continue an answer of the list are allowed; all others get the score minus
    infinity. One beam takes the likeliest beginning, whose rest may be unlikely; more beams compare whole
    answers. The ln p of the allowed tokens stays as it was, so what is compared is the model's own
    probability of an answer, and with as many beams as answers the ranking is exact.

    Compare: sample.py generate: forbids the same ids, unused_ids, at every step
    Source: De Cao et al. (2021, arXiv 2010.00904); prefix_allowed_tokens_fn in transformers
    问: 如何让模型只在给定的候选答案中选择（受限束搜索）？
    答: 每一步只允许能接成某个候选答案的词元，其余词元的分数设为负无穷；单条束只会顺着最可能的开头走，多条束才
    比较整个答案的概率，束宽达到候选数时就是按模型概率的精确排序。
    """
    model = reader_of_the_speech
    words = sorted({word for word in re.findall("[a-z]+", SPEECH) if len(word) == 6})
    answers = torch.stack([to_ids(word) for word in words])  # (n, 6)

    def allowed(text):
        """The next tokens of the answers that begin with this text."""
        return [ids[len(text)] for ids in answers.tolist() if ids[: len(text)] == text]

    theirs = in_transformers(model)
    prompts = [to_ids(text).tolist() for text in ("that the ", "we can not ", "a new ", "the ", "of ", "in ")]
    scores = [log_p_after(model, ids, answers).sum(-1) for ids in prompts]
    rankings = [answers[of_prompt.argsort(descending=True)] for of_prompt in scores]
    rows = []
    for width in (1, 4, len(words)):
        texts, log_p = zip(*(beam(model, ids, 6, width, allowed) for ids in prompts))
        n_best = sum(torch.equal(found[0], ranking[0]) for found, ranking in zip(texts, rankings))
        rows.append(
            (width, n_best, sum(found[0] for found in log_p) / len(prompts), repr(to_text(texts[0][0])))
        )
    heads = f"beams | best of {len(words)} words found, for {len(prompts)} prompts | mean ln p"
    table(f"{heads} | after 'that the '", *rows)
    assert all(torch.equal(found, ranking) for found, ranking in zip(texts, rankings))  # as many as words
    assert rows[0][1] < rows[2][1] == len(prompts) and rows[0][2] < rows[2][2] - 0.3

    for ids in prompts[:2]:
        n_prompt = len(ids)
        settings = dict(num_beams=4, num_return_sequences=4, do_sample=False, max_new_tokens=6)

        def rule(row, text, n_prompt=n_prompt):
            return allowed(text[n_prompt:].tolist())

        found = theirs.generate(torch.tensor([ids]), prefix_allowed_tokens_fn=rule, **settings)
        assert torch.equal(found[:, len(ids) :], beam(model, ids, 6, 4, allowed)[0])


def test_diverse_beams_pay_for_tokens_that_other_groups_took(reader_of_the_speech):
    """What is diverse beam search?

    The texts of a plain beam search are mostly variants of one another. Here the beams are split into groups,
    which choose in turn: a token costs a group a penalty for each beam of the groups before it that took it
    at this step (Hamming diversity). The first group searches as if it were alone. Without a penalty all
    groups are equal. With it the texts differ at more places, but are less likely than those of one plain
    search with as many beams.

    Compare: sample.py generate: texts of one prompt differ since they are drawn
    Source: Vijayakumar et al. (2018, arXiv 1610.02424)
    问: 多样化束搜索（diverse beam search）是什么？
    答: 把束分成若干组依次选词，某个词元若在同一步已被前面的组选过，后面的组再选它就要扣分（汉明多样性）；第一
    组等同于普通束搜索，加上惩罚后各组文本差别变大，但概率低于总束数相同的普通束搜索。
    """
    ids, rows = to_ids("Four score").tolist(), []

    def differing(texts):
        """The share of places at which two of the texts have different tokens, the mean over all pairs."""
        n = len(texts)
        return (texts[:, None] != texts).float().mean(-1).sum() / (n * (n - 1))

    searches = {
        "6 beams": dict(width=6),
        "3 groups of 2, penalty 0": dict(width=2, n_groups=3),
        "3 groups of 2, penalty 2": dict(width=2, n_groups=3, penalty=2.0),
    }
    found = []
    for name, settings in searches.items():
        texts, log_p = beam(reader_of_the_speech, ids, 12, **settings)
        found.append(texts)
        examples = " ".join(repr(to_text(text)) for text in texts[::2])
        rows.append((name, examples, differing(texts), log_p.mean()))
    table("search | three of its six texts | share of different places | mean ln p", *rows)
    plain, equal, diverse = found
    alone, _ = beam(reader_of_the_speech, ids, 12, width=2)
    assert all(torch.equal(group, alone) for group in equal.split(2))
    assert torch.equal(diverse[:2], alone)
    assert rows[2][2] > rows[0][2] + 0.1
    assert rows[2][3] < rows[0][3]


def test_speculative_decoding_keeps_the_distribution_of_the_large_model():
    """What is speculative (assisted) decoding?

    A small model, whose probabilities are q, proposes a token x. The large one, whose are p, accepts it with
    probability min(1, p(x)/q(x)), and otherwise draws from max(0, p - q), scaled to sum to one. What comes
    out has exactly the distribution p; the share accepted is sum min(p, q).

    Often told: the small model writes, so that quality suffers.
    Code: sample.py draw
    Break: sample.py draw: `(probabilities / -uniform.log())` becomes
    `(probabilities.sqrt() / -uniform.log())`
    Source: Leviathan et al. (2023, arXiv 2211.17192), algorithm 1 and appendix A.1
    问: 投机解码（speculative decoding）会影响生成质量吗？
    答: 不会：小模型按 q 提出词元 x，大模型以 min(1, p(x)/q(x)) 的概率接受，否则从归一化的 max(0, p - q) 中重
    新采样，输出的分布严格等于大模型的 p，接受率为 Σ min(p, q)。
    """
    p, q = torch.randn(2, 8).softmax(-1)
    accepted = torch.minimum(p, q)  # q min(1, p/q)
    rest = (p - q).clamp(min=0)
    exact = accepted + (1 - accepted.sum()) * rest / rest.sum()
    generator, n = torch.Generator().manual_seed(0), 4000
    proposals = draw(q.expand(n, -1), generator).tolist()
    tokens = [accept(p.expand(2, -1), q[None], [x], generator) for x in proposals]
    drawn = torch.bincount(torch.tensor([new[0] for new in tokens]), minlength=8) / n
    share = sum(len(new) == 2 for new in tokens) / n  # an accepted token is followed by another
    heads = "error of the formula | of 4,000 draws | share accepted | sum min(p, q)"
    table(heads, (largest(exact - p), largest(drawn - p), share, accepted.sum()))
    assert torch.allclose(exact, p, atol=1e-6)
    assert largest(drawn - p) < 0.03 and abs(share - accepted.sum()) < 0.03

    # the same for texts of two tokens that a whole loop writes
    shape = dict(vocab_size=3, n_layer=1, n_embd=8, n_head=1, n_kv_head=1, n_hidden=8)
    model, draft, n = drawn_model(**shape), drawn_model(**shape), 300
    counts = torch.zeros(3, 3)
    for _ in range(n):
        (*_, a, b), _ = speculate(model, draft, [0, 1], 2, 2, Sampling(1.0, top_p=1.0), generator)
        counts[a, b] += 1 / n

    def of_texts(reader):
        """p(a) p(b | a) of all texts, (3, 3)."""
        texts = torch.tensor([[0, 1, a] for a in range(3)])
        p = reader(texts).softmax(-1)
        return p[0, 1, :, None] * p[:, 2]

    errors = [largest(counts - of_texts(reader)) for reader in (model, draft)]
    table("300 texts of two tokens differ from the large model's distribution by | from the draft's", errors)
    assert errors[0] < 0.08 and errors[1] > 2 * errors[0]


def test_greedy_speculation_writes_the_same_text_in_fewer_runs(reader_of_the_speech):
    """What does speculation save?

    Runs of the large model, each of which reads all its weights. A run checks n guesses at once and gains 1
    to n + 1 tokens; where decoding waits for memory, it takes hardly longer than a run for one token. But the
    work grows: rejected guesses are computed for nothing, and the draft runs n times. So it pays with a draft
    that is much cheaper and often right. Here the draft is the model's own first block.

    Often told: a draft makes decoding faster. A bad one makes it slower.
    Code: model.py KVCache.begin
    Break: model.py KVCache.begin: `<= positions[..., None]` becomes `<= positions[..., None] + 1`
    Source: Leviathan et al. (2023, arXiv 2211.17192), sec. 3; Elhoushi et al. (2024, arXiv 2404.16710) on the
    first layers as the draft
    问: 投机解码为什么能加速？什么情况下反而更慢？
    答: 大模型一次前向就能验证 n 个草稿词元，而解码受限于读取权重的带宽，验证 n 个几乎和生成 1 个一样快，每次
    可前进 1 到 n + 1 个；若草稿模型不够便宜或经常猜错，额外的计算得不偿失，反而更慢。
    """
    model, greedy, rows = reader_of_the_speech, Sampling(temperature=1e-30), []
    first_block = Transformer(replace(model.config, n_layer=1)).eval()
    first_block.load_state_dict(model.state_dict(), strict=False)
    by_chance = drawn_model(vocab_size=model.config.vocab_size, n_layer=1)
    beginnings = [to_ids(SPEECH[i : i + 8]).tolist() for i in range(0, 1200, 240)]
    alone = [[new for (new,) in generate(model, [ids], 20, temperature=0)] for ids in beginnings]
    for name, draft in (("random weights", by_chance), ("the first block", first_block)):
        for n_draft in (1, 4):
            found = [speculate(model, draft, ids, 20, n_draft, greedy, None) for ids in beginnings]
            n_runs = sum(n for _, n in found)
            rows.append((name, n_draft, [ids[8:] for ids, _ in found] == alone, n_runs, 100 / n_runs))
    table("draft | guesses at a time | the same text | runs for 100 tokens | tokens per run", *rows)
    print(f"    one of the texts: {to_text(beginnings[0])!r} + {to_text(alone[0])!r}")
    assert all(row[2] for row in rows)
    assert rows[1][3] > 75 and rows[3][3] < 45


def test_a_model_that_knows_its_text_is_too_sure_of_new_text():
    """Are a model's probabilities to be believed?

    They are calibrated if, of all tokens to which it gives 70 %, 70 % are right; the mean gap between the
    two, over bins of tokens, is the expected calibration error. Cross-entropy rewards honest probabilities,
    but only on the text that is trained on: this model, which has read its text many times, is too sure of
    new text, though not of its own. A temperature above 1 helps, chosen by the loss on text that was not
    trained on. It changes no guess, only how sure the model is.

    Often told: language models are overconfident. Not all: on questions of MMLU, the error of GPT-4 was 0.007
    after pretraining, and 0.074 only after it had been made an assistant.
    Code: model.py LossInPieces.forward
    Break: model.py LossInPieces.forward: `F.linear(piece, weight).float()` becomes
    `(2 * F.linear(piece, weight)).float()`
    Source: Guo et al. (2017, arXiv 1706.04599), sec. 2 and 4.2; OpenAI (2023, arXiv 2303.08774), fig. 8
    问: 模型给出的概率可信吗？什么是校准（calibration）？
    答: 若模型给出 70% 概率的词元中恰有 70% 是对的，就是校准良好，按置信度分箱后两者差距的平均就是期望校准误差
    (ECE)；反复读过同一段文本的模型对新文本过于自信，用训练集之外的文本按损失选一个大于 1 的温度可以纠正，而且
    不改变预测结果。
    """
    ids = to_ids(SPEECH)
    read, new = ids[:1000], ids[1000:]

    def batch(step):
        starts = torch.randint(len(read) - 32, (16,))
        blocks = torch.stack([read[start : start + 33] for start in starts])
        return blocks[:, :-1], blocks[:, 1:]

    model = Transformer(tiny_config(vocab_size=len(CHARACTERS), block_size=32))
    train(model, batch, 100, 1e-2)
    rows, curves = [], {}
    for name, text, temperature in (
        ("read", read, 1.0),
        ("new", new, 0.5),
        ("new", new, 1.0),
        ("new", new, 1.5),
        ("new", new, 2.0),
    ):
        blocks = text.unfold(0, 33, 16)  # the second half of each is measured, which has a context
        with torch.inference_mode():
            logits = model(blocks[:, :-1])[:, 16:].flatten(0, 1)
        p = probabilities_of(logits, Sampling(temperature, top_p=1.0))
        confidence, right, loss = calibration(p, blocks[:, 17:].flatten())
        error = (confidence - right).abs().mean().item()
        rows.append((name, temperature, confidence.mean().item(), right.mean().item(), error, loss))
        if temperature in (1.0, 1.5):
            curves[f"{name} text, temperature {temperature:g}"] = (confidence, right)
    table("text | temperature | mean p of the guess | share right | calibration error | loss", *rows)
    curves["calibrated"] = ([0, 1], [0, 1])
    lines("Confidence and accuracy", "mean probability of the guess", "share of right guesses", curves)
    known, _, plain, *_ = rows
    losses = [row[5] for row in rows]
    best = rows[losses.index(min(losses[1:]))]
    assert known[3] - known[2] > 0.03 and plain[2] - plain[3] > 0.08
    assert max(row[3] for row in rows[1:]) - min(row[3] for row in rows[1:]) < 1e-6
    assert best[1] > 1 and best[4] < 0.7 * plain[4]


def test_disjoint_chunks_overstate_the_loss_of_a_long_text(reader_of_the_speech):
    """How is a model evaluated on a text that is longer than its context?

    Cut into chunks of T tokens, each chunk begins with next to no context, and its first tokens are guessed
    badly. Windows that overlap, and of which only the last s tokens count, give every token behind the first
    window more than T - s tokens of context. The loss is lower, and it is nearer to what the model does in
    use; the model reads about T / s times as many tokens for it. Numbers can be compared only if they were
    measured the same way.

    Often told: truncate, or cut into chunks, as if the loss were the same.
    Code: train.py bits_per_byte
    Break: model.py Transformer.loss: `total / (targets != -100).sum().clamp(min=1)` becomes
    `total / targets.numel()`
    Source: Press et al. (2022, arXiv 2108.12409), app. B; transformers' documentation on perplexity of
    fixed-length models
    问: 文本比上下文窗口长时，困惑度应该怎么算？
    答: 切成互不重叠的块，每块开头的词元几乎没有上文，损失会偏高；用滑动窗口，每次只计最后 s 个词元的损失，这
    些词元的上文都超过 T - s 个词元，结果更低也更接近实际使用，代价是约 T / s 倍的计算。
    """
    model, T = reader_of_the_speech, 32
    ids = to_ids(SPEECH)[: 46 * T + 1]

    @torch.inference_mode()
    def loss(stride):
        """The mean loss of all tokens but the first, and how many windows were read for it."""
        inputs, targets = [], []
        for end in range(T, len(ids), stride):
            inputs.append(ids[end - T : end])
            targets.append(ids[end - T + 1 : end + 1].clone())
            if end > T:
                targets[-1][: T - stride] = -100  # counted by the window before
        return model.loss(torch.stack(inputs), torch.stack(targets)).item(), len(inputs)

    rows = []
    for stride in (32, 24, 16):
        value, n_windows = loss(stride)
        rows.append((stride, T - stride + 1, n_windows * T / len(ids), value))
    table("stride | least context | tokens read per token of the text | loss", *rows)
    blocks = ids.unfold(0, T + 1, 4)
    with torch.inference_mode():
        losses = F.cross_entropy(model(blocks[:, :-1]).mT, blocks[:, 1:], reduction="none").mean(0)  # (T,)
    by_place = [losses[:1].mean(), losses[1:4].mean(), losses[4:16].mean(), losses[16:].mean()]
    table("mean loss of the first token of a window | 2 to 4 | 5 to 16 | 17 to 32", by_place)
    disjoint = bits_per_byte(model, ids.numpy(), np.ones(len(CHARACTERS))) * math.log(2)
    assert abs(disjoint - rows[0][3]) < 1e-4
    assert all(0.7 < row[3] / rows[0][3] < 0.99 for row in rows[1:])
    assert by_place[0] > by_place[3] + 0.3
