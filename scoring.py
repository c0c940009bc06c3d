"""What fine-tuning taught: questions with one right answer, answered freely and compared by the character.

A loss would flatter: it is measured along the right answer. Here a model hears nothing but itself, takes the
likeliest token each time, and one wrong character makes an answer wrong.
"""

import json
from collections import Counter, defaultdict
from dataclasses import replace

from data.tasks import MANY, answer_by_rule
from decoding import generate
from machine import processes
from sample import render

N_SHOWN = 5  # examples of each channel


def answer(model, tokenizer, questions, longest, batch_size=64):
    """The likeliest answers to conversations, at most `longest` tokens each, as a list of str."""
    prompts = [render(tokenizer, question, answer=True)[0] for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, stop_ids = {}, set(tokenizer.special_tokens.values())
    greedy = dict(temperature=0, stop_ids=stop_ids, vocab_size=tokenizer.vocab_size)
    greedy["mode"] = "eager" if processes()[1] > 1 else None  # no CUDA graph of what passes between processes
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        steps = list(generate(model, [prompts[i] for i in batch], longest, **greedy))
        for row, i in enumerate(batch):
            answers[i] = tokenizer.decode([step[row] for step in steps if step[row] is not None])
    return [answers[i] for i in range(len(questions))]


def exact_match(examples, answers):
    """{channel: share of the answers that are right}."""
    right = defaultdict(list)
    for example, said in zip(examples, answers):
        right[example.channel].append(said.strip() == example.answer.strip())
    return {channel: sum(found) / len(found) for channel, found in sorted(right.items())}


def macro(examples, answers, all_lengths=False):
    """The mean over kinds of questions, without or with the longer ones ("args, many"); None: of none."""
    pairs = [(e, said) for e, said in zip(examples, answers) if all_lengths or not e.channel.endswith(MANY)]
    kinds = [replace(example, channel=example.channel.removesuffix(MANY)) for example, _ in pairs]
    shares = exact_match(kinds, [said for _, said in pairs]).values()
    return sum(shares) / len(shares) if shares else None


def yardsticks(examples, test):
    """What needs no model, {name: exact match}: the most frequent answer of a channel; a rule in one line."""
    seen = defaultdict(Counter)
    for example in examples:
        seen[example.channel][example.answer] += 1
    frequent = [max(seen[e.channel] or [""], key=seen[e.channel].get) for e in test]
    ruled = {i: said for i, e in enumerate(test) if (said := answer_by_rule(e.question[-1]["content"]))}
    by_rule = exact_match([test[i] for i in ruled], ruled.values())
    return {"most_frequent": exact_match(test, frequent), "rule": by_rule}


def report(test, answers, others, bpb, out):
    """Print what share of the test was answered rightly, and examples; write the figures to results.json.

    answers: {"base": ..., "tuned": ...}; others: of yardsticks; bpb: {"before": ..., "after": ...} or Nones.
    """
    shares = {name: exact_match(test, said) for name, said in answers.items()} | others
    counts = Counter(example.channel for example in test)
    rows = {channel: {name: shares[name].get(channel) for name in shares} for channel in shares["tuned"]}
    if test:
        names = (f"{name.replace('_', ' '):>15}" for name in shares)
        print(f"\n{'exact match':16}{'questions':>10}{''.join(names)}")
    for channel, row in rows.items():
        values = (" " * 15 if value is None else f"{value:15.3f}" for value in row.values())
        print(f"{channel:16}{counts[channel]:10,}{''.join(values)}")
    macros = {every: [macro(test, said, every) for said in answers.values()] for every in (False, True)}
    for name, every in (("macro", False), ("macro of all", True)):
        if len(rows) > 1 and None not in macros[every]:
            print(f"{name:26}" + "".join(f"{value:15.3f}" for value in macros[every]))
    for channel in rows:
        for i in [i for i, example in enumerate(test) if example.channel == channel][:N_SHOWN]:
            print(f"\n  {test[i].question[-1]['content']}")
            for name, said in answers.items():
                verdict = "right" if said[i].strip() == test[i].answer.strip() else "wrong"
                print(f"    {name:6} {verdict}  {said[i][:90]!r}")
    figures = {
        channel: {name: value for name, value in row.items() if value is not None} | {"n": counts[channel]}
        for channel, row in rows.items()
    }
    questions = {example.channel: example.question[-1]["content"] for example in reversed(test)}
    results = {"exact_match": figures, "macro": macros[False][-1], "macro_of_all": macros[True][-1]}
    results |= {"bpb": bpb, "questions": questions}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
