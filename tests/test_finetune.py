"""What fine-tuning promises: only what the assistant says is learned, a merged update is the same model,
preferences start at ln 2, and a run that was stopped ends as if it had not been.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from conftest import FORKS, ROOT, WORDS, in_fork, make_settings, read_log, run_main
from hypothesis import example, given, settings
from hypothesis import strategies as st

import finetune as stage
import train
from data import examples, prepare, tasks
from data.examples import Example, Examples, hold_out, read_examples
from data.loader import IGNORED, Blocks
from finetune import (
    REWARD_MEASURES,
    PreferenceLoss,
    RewardLoss,
    TuneSettings,
    add_lora,
    advantages,
    answer,
    draw_answers,
    exact_match,
    log_probs,
    macro,
    measure_rewards,
    merge,
    merge_equal,
    save_adapter,
    yardsticks,
)
from model import Config, Transformer
from sample import end_ids, generate, load
from tokenizer import Tokenizer, render, with_chat_tokens

START, END = "<|im_start|>", "<|im_end|>"
DIALOGUE = [
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": "sat on"},
    {"role": "assistant", "content": "the mat"},
    {"role": "user", "content": "naïve café"},
    {"role": "assistant", "content": "and the dog"},
]


def turn(question, reply, channel="all"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return Example([messages], channel)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# --- conversations ---


def test_only_what_the_assistant_says_is_learned_and_all_of_it(tokenizer):
    part = Examples([Example([DIALOGUE], "all")], tokenizer, 128, 1)
    ids, targets, _ = part.batch(0)
    assert ids.shape == targets.shape and len(ids) == 1
    ids, targets = ids[0], targets[0]
    learned = [i for i in targets.tolist() if i != IGNORED]
    end = tokenizer.special_tokens[END]
    assert learned == [*tokenizer.encode("the mat"), end, *tokenizer.encode("and the dog"), end]
    whole, _ = render(tokenizer, DIALOGUE)
    n = len(whole) - 1
    assert ids[:n].tolist() == whole[:-1]
    kept = targets[:n] != IGNORED
    assert torch.equal(targets[:n][kept], torch.tensor(whole[1:])[kept])  # each at the place before it
    assert (targets[n:] == IGNORED).all()


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    config = Config(320, 64, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_hidden=32)
    Transformer(config).save(folder, tokenizer)
    return transformers.AutoTokenizer.from_pretrained(folder)


TEXT = st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda text: "<|" not in text)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
@example(["\n a", " \n\n b ", "\u3000c"])
def test_the_chat_template_of_transformers_renders_the_same_ids(tokenizer, theirs, texts):
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    for answering in (False, True):
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=answering, return_dict=False)
        assert rendered == render(tokenizer, messages, answering)[0]


def test_a_long_conversation_is_cut_and_one_without_an_answer_left_out_aloud(tokenizer):
    ids, mask = render(tokenizer, DIALOGUE)
    whole = len(ids)
    for room in (4, whole - 1, whole, whole + 1):
        cut_ids, cut_mask, is_cut = examples.encode_conversation(tokenizer, DIALOGUE, room)
        assert cut_ids.tolist() == ids[:room] and cut_mask.tolist() == mask[:room]
        assert is_cut == (room < whole)
    part = [Example([DIALOGUE], "all"), turn("x", "y"), turn("the cat " * 50, "never reached")]
    made = Examples(part, tokenizer, whole - 2, 2)
    assert (len(made.rows), made.n_cut, made.n_dropped) == (2, 1, 1)
    assert "1 are cut" in str(made) and "1 are left out" in str(made)
    with pytest.raises(ValueError, match="no example has an answer within the first 8 tokens"):
        Examples(part[2:], tokenizer, 8, 2)


def test_unusable_lines_are_named_and_counted(tmp_path, capsys):
    good = {"messages": DIALOGUE, "channel": "a"}
    user, said = DIALOGUE[1], DIALOGUE[2]
    bad = [
        '{"messages": ',
        json.dumps([1]),
        json.dumps({}),
        json.dumps({"messages": [said, user]}),
        json.dumps({"messages": [user]}),
        json.dumps({"messages": [user, {"role": "robot", "content": "x"}]}),
        json.dumps({"messages": [user, DIALOGUE[0], said]}),
        json.dumps({"messages": [user, {"role": "assistant", "content": "  "}]}),
        json.dumps({"messages": [{"role": "user", "content": 5}, said]}),
        json.dumps({"messages": [{"role": "user"}, said]}),
        json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"}),
        json.dumps({"messages": DIALOGUE, "conversations": DIALOGUE}),
        json.dumps({"messages": DIALOGUE, "completion": "another"}),
        '{"prompt": "x", "completion": "\\ud800"}',
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps(good), *bad, "", json.dumps({"prompt": "p", "completion": "c"})]))
    found = read_examples(path)
    assert [e.channel for e in found] == ["a", "all"] and found[1].answer == "c"
    printed = capsys.readouterr().out
    assert "14 lines of" in printed and "of 16" in printed
    for number, why in ((2, "Expecting value"), (3, "not a JSON object"), (4, '"messages" or "prompt"'),
                        (5, "no turn of the user at the beginning"), (6, "no turn of the assistant"),
                        (7, "robot"), (8, "system"), (9, "is empty"), (10, "is not a text"),
                        (11, "content")):  # fmt: skip
        line = next(line for line in printed.splitlines() if f"line {number}:" in line)
        assert why in line
    assert "line 13" not in printed  # ten are shown
    for lines, message in (
        (bad, "there is no example in"),
        (["[", *bad], "begins as a JSON array and is none: Expecting"),
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            read_examples(path)
    pairs = [
        {"prompt": "x", "chosen": "a", "rejected": " a"},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    ]
    write_lines(path, pairs)
    assert len(read_examples(path, pairs=True)) == 1
    assert "chosen and rejected are the same" in capsys.readouterr().out


FROM_OTHERS = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]  # ShareGPT
QUESTION, REPLY = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
OTHER = {"role": "assistant", "content": "on"}
SYSTEM = {"role": "system", "content": "the mat"}
LAYOUTS = {
    "ShareGPT": ({"conversations": FROM_OTHERS}, [[QUESTION, REPLY]]),
    "ShareGPT, system": ({"system": "the mat", "conversations": FROM_OTHERS}, [[SYSTEM, QUESTION, REPLY]]),
    "Alpaca": ({"instruction": "the cat", "input": "", "output": "sat"}, [[QUESTION, REPLY]]),
    "Alpaca, input": (
        {"instruction": "the", "input": "cat", "output": "sat"},
        [[{"role": "user", "content": "the\n\ncat"}, REPLY]],
    ),
    "TRL": ({"prompt": [SYSTEM, QUESTION], "completion": [REPLY]}, [[SYSTEM, QUESTION, REPLY]]),
    "TRL, a pair": (
        {"prompt": [QUESTION], "chosen": [REPLY], "rejected": [OTHER]},
        [[QUESTION, REPLY], [QUESTION, OTHER]],
    ),
    "TRL, the prompt within": (
        {"chosen": [QUESTION, REPLY], "rejected": [QUESTION, OTHER]},
        [[QUESTION, REPLY], [QUESTION, OTHER]],
    ),
    "UltraFeedback": (
        {"prompt": "the cat", "chosen": [QUESTION, REPLY], "rejected": [QUESTION, OTHER]},
        [[QUESTION, REPLY], [QUESTION, OTHER]],
    ),
    "OpenAI": ({"messages": [QUESTION, REPLY | {"weight": 1}]}, [[QUESTION, REPLY | {"weight": 1}]]),
    "UltraFeedback, a plain answer": (
        {"prompt": "the cat", "chosen": [QUESTION, REPLY], "rejected": "on"},
        [[QUESTION, REPLY], [QUESTION, OTHER]],
    ),
    "columns that are empty here": (
        {"messages": [QUESTION | {"weight": None}, REPLY | {"tool_calls": []}], "prompt": None,
         "output": None, "conversations": None, "channel": None},
        [[QUESTION, REPLY | {"tool_calls": []}]],
    ),
    "a system message beside": ({"system": "the mat", "prompt": "the cat", "completion": "sat"},
                                [[SYSTEM, QUESTION, REPLY]]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_array", [False, True])
def test_the_usual_layouts_of_lines_are_read(layout, as_array, tmp_path, capsys):
    record, expected = LAYOUTS[layout]
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps([record, record], indent=1) if as_array else json.dumps(record) + "\n")
    found = read_examples(path, pairs=len(expected) == 2)
    assert [e.conversations for e in found] == [expected] * (1 + as_array)
    assert capsys.readouterr().out == ""


def test_what_is_passed_over_in_a_file_is_named_once_with_the_number_of_lines(tmp_path, capsys):
    records = [
        {
            "messages": [QUESTION, REPLY | {"reasoning_content": "..."}],
            "tools": [{"name": "x"}],
            "prompt": "the",
        },
        {
            "messages": [QUESTION, REPLY | {"tool_calls": [1]}],
            "tools": [],
            "id": 5,
            "label": False,
        },
        {"messages": [QUESTION, REPLY], "tools": [{"name": "x"}], "input": "the cat", "weight": 1},
    ]
    assert len(read_examples(write_lines(tmp_path / "lines.jsonl", records))) == 3
    named = "id (1 lines), input (1 lines), label (1 lines), prompt (1 lines), reasoning_content (1 lines), "
    named += "tool_calls (1 lines), tools (2 lines), weight (1 lines)"
    assert capsys.readouterr().out == f"passed over in {tmp_path / 'lines.jsonl'}: {named}\n"


def test_an_answer_of_weight_0_is_context_and_not_learned(tokenizer, tmp_path, capsys):
    def learned(*weights):
        replies = [reply | {"weight": weight} for reply, weight in zip((REPLY, OTHER), weights)]
        path = write_lines(tmp_path / "w.jsonl", [{"messages": [QUESTION, replies[0], QUESTION, replies[1]]}])
        _, targets, _ = Examples(read_examples(path), tokenizer, 128, 1).batch(0)
        return tokenizer.decode([i for i in targets[0].tolist() if i != IGNORED])

    assert learned(1, 1) == f"sat{END}on{END}"
    assert learned(0, 1) == f"on{END}"
    assert learned(1, 0) == f"sat{END}"
    for weights, why in (
        ((0, 0), "no turn of the assistant to learn"),
        ((1, 0.5), "message 4 is not 0 or 1: 0.5"),
    ):
        with pytest.raises(ValueError, match="no example"):
            learned(*weights)
        assert why in capsys.readouterr().out


def test_of_a_pair_only_the_last_answer_counts_and_equal_ones_are_left_out(tokenizer):
    history, (question,) = DIALOGUE[1:3], [{"role": "user", "content": "sat on"}]
    both = [[*history, question, {"role": "assistant", "content": text}] for text in ("the mat", "the dog")]
    part = Examples([Example(both, "all")], tokenizer, 128, 1)
    _, targets, _ = part.batch(0)
    assert targets.shape[:2] == (1, 2)
    for k, text in enumerate(("the mat", "the dog")):
        learned = [i for i in targets[0, k].tolist() if i != IGNORED]
        assert learned == [*tokenizer.encode(text), tokenizer.special_tokens[END]]
    room = len(render(tokenizer, both[0][:-1], add_generation_prompt=True)[0])
    with pytest.raises(ValueError, match="no example has an answer"):
        Examples([Example(both, "all")], tokenizer, room, 1)  # cut where they are still the same


def test_what_follows_the_last_answer_teaches_nothing():
    found = examples.conversations_of({"messages": [*DIALOGUE[1:3], {"role": "user", "content": "and?"}]})
    assert found == [DIALOGUE[1:3]]


def test_a_twentieth_of_each_channel_is_held_out_whatever_the_order():
    many = [turn(f"question {i}", "x", "big" if i < 60 else "small" if i < 79 else "one") for i in range(80)]
    learned, held_out = hold_out(many)
    assert Counter(e.channel for e in held_out) == {"big": 3}
    assert len(learned) == 77
    again = hold_out(many[::-1])[1]
    assert sorted(e.question[0]["content"] for e in again) == sorted(
        e.question[0]["content"] for e in held_out
    )


@pytest.fixture
def several(tokenizer):
    """53 examples of 2 channels and several lengths, of up to 32 tokens."""
    return Examples(
        [turn("the cat " * (i % 4), "sat " * (1 + i % 5), "ab"[i % 2]) for i in range(53)],
        tokenizer,
        31,
        8,
        seed=3,
    )


def test_every_epoch_takes_every_example_once_and_in_a_new_order(several):
    epochs = [several.epoch(n) for n in range(2)]
    for batches in epochs:
        assert len(batches) == several.per_epoch == 7
        assert sorted(sum(batches, [])) == list(range(53))
    assert epochs[0] != epochs[1]
    padding = [several.tensors(batch)[1].shape[1] for batch in epochs[0]]
    rows = sum(len(batch) * T for batch, T in zip(epochs[0], padding))
    assert rows < 1.4 * sum(len(ids) - 1 for ((ids, _),) in several.rows)  # little of it is padding
    assert len(set(padding)) <= 4  # and there are few shapes


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_batch_and_have_as_many_rows(several, world):
    for step in range(several.per_epoch):
        whole = several.batch(step)
        parts = [several.batch(step, rank, world) for rank in range(world)]
        assert len({len(part[0]) for part in parts}) == 1
        kept = [row for _, targets, _ in parts for row in targets.tolist() if set(row) != {IGNORED}]
        assert sorted(kept) == sorted(whole[1].tolist())


def test_padding_changes_no_loss_and_no_gradient(several, model):
    """There is no mask for it: it comes after what counts, and attention looks back."""
    batch = several.epoch(0)[0]
    ids, targets, _ = several.tensors(batch)
    assert min(len(several.rows[i][0][0]) for i in batch) < ids.size(1)
    together, rows = model.summed_loss(ids, targets)
    together.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for k, i in enumerate(batch):
        ((text, mask),) = several.rows[i]
        targets = text[None, 1:].long().masked_fill(~mask[None, 1:], IGNORED)
        alone, _ = model.summed_loss(text[None, :-1].long(), targets)
        alone.backward()
        assert alone.item() == pytest.approx(rows[k].item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-4, rtol=1e-4)


def tune_settings(**changes):
    """The TuneSettings of a tiny run."""
    return TuneSettings(**asdict(make_settings()) | changes)


def test_losses_are_told_apart_by_channel_as_sums(several, model):
    """Means of means would be wrong: the channels have unlike numbers of targets."""
    objective = train.NextTokenLoss(model)
    values = stage.evaluate(objective, ("loss",), SimpleNamespace(dev=several), tune_settings())
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(53):
        ids, targets, channels = several.tensors([i])
        with torch.no_grad():
            loss, _ = model.summed_loss(ids, targets)
        expected[channels[0]] += torch.tensor([int((targets != IGNORED).sum()), loss])
    assert values.keys() == {"val_loss", "val_loss a", "val_loss b"}
    assert values["val_loss a"] == pytest.approx((expected[0, 1] / expected[0, 0]).item(), rel=1e-5)
    assert values["val_loss b"] == pytest.approx((expected[1, 1] / expected[1, 0]).item(), rel=1e-5)
    assert values["val_loss"] == pytest.approx((expected[:, 1].sum() / expected[:, 0].sum()).item(), rel=1e-5)


def test_replayed_text_has_a_loss_of_its_own_and_no_part_in_the_mean():
    sums = torch.tensor([[2.0, 3.0], [0.0, 0.0], [10.0, 50.0]])
    values = stage.averages("train", ("loss",), ["a", "b", stage.REPLAYED], sums)
    assert values == {
        "train_loss": 1.5, "train_loss a": 1.5, "train_loss b": None, f"train_loss {stage.REPLAYED}": 5.0,
    }  # fmt: skip


# --- low-rank updates ---


def with_update(model, rank=4, alpha=6.0):
    """The model with an update that does something."""
    add_lora(model, rank, alpha)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_an_update_starts_as_nothing_and_merges_into_the_same_model(model, tiny_config):
    ids = torch.randint(320, (2, 16))
    before = model(ids)
    assert torch.equal(add_lora(model, 4, 6.0)(ids), before)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    adapted = model(ids)
    assert (adapted - before).abs().max() > 0.1
    merged = Transformer(tiny_config)
    merged.load_state_dict(merge(model.state_dict(), 6.0 / 4))
    torch.testing.assert_close(merged(ids), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, dict(qkv_bias=True, tie_embeddings=False), dict(head_dim=10, n_kv_head=1)]
)
def test_only_the_update_learns(tiny_config, changes):
    """Two thin matrices for each of a block's seven; all else gets no gradient."""
    config = replace(tiny_config, **{"head_dim": 0} | changes)
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    add_lora(model, 3, 6.0)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == config.n_layer * len(stage.MATRICES) * 2
    assert all(name.endswith((".lora_A", ".lora_B")) for name in learning)
    ids = torch.randint(320, (2, 9))
    model.loss(ids, ids).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in learning), name
        if name.endswith("lora_B"):
            assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_does_not_suit_the_model_is_refused(model, rank):
    with pytest.raises(ValueError, match=f"--lora-rank {rank} must be from 1 to the model's width, 32"):
        add_lora(model, rank, 1.0)


def test_peft_opens_an_update_and_computes_the_same(model, tokenizer, tmp_path):
    model.save(tmp_path / "base", tokenizer)
    ids = torch.randint(320, (2, 16))
    adapted = with_update(model)
    save_adapter(tmp_path / "adapter", model.state_dict(), 4, 6.0, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, adapted(ids), atol=1e-4, rtol=1e-4)


# --- preferences ---


@pytest.fixture
def pairs(tokenizer):
    found = []
    for i in range(9):
        question = {"role": "user", "content": "the cat " * (1 + i % 3)}
        answers = (
            {"role": "assistant", "content": text} for text in ("sat on the mat", "dog " * (1 + i % 4))
        )
        found.append(Example([[question, said] for said in answers], "all"))
    return Examples(found, tokenizer, 64, 4)


@torch.no_grad()
def test_log_probabilities_are_those_of_the_answers_alone(pairs, model):
    for i, row in enumerate(pairs.rows):
        (ids,), (targets,), _ = pairs.tensors([i])
        ours = log_probs(model, ids, targets)
        for k, (ids, mask) in enumerate(row):
            log_p = model(ids[None].long())[0].log_softmax(-1)
            expected = sum(log_p[j - 1, ids[j].item()].item() for j in range(1, len(ids)) if mask[j])
            assert ours[k].item() == pytest.approx(expected, abs=1e-3)


def test_preferring_starts_at_ln_2_and_widens_the_margin(pairs, model):
    objective = PreferenceLoss(model, beta=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    for step in range(12):
        ids, targets, _ = pairs.batch(step)
        tuning = make_settings(micro_batch=3)
        rows, _ = train.training_step(objective, [optimizer], (ids, targets), len(ids), 1.0, tuning)
        if step == 0:
            assert rows[:, 0].tolist() == pytest.approx([math.log(2)] * len(rows), abs=1e-4)
            assert rows[:, 1].abs().max() < 1e-3
    tuning = tune_settings(method="dpo")
    values = stage.evaluate(objective, stage.PAIR_MEASURES, SimpleNamespace(dev=pairs), tuning)
    assert values["val_margin"] > 0.1 and values["val_accuracy"] == 1
    assert values["val_loss"] < math.log(2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_preferring_starts_at_ln_2_whatever_the_dtype(pairs, model, dtype):
    tuning = tune_settings(dtype=dtype, method="dpo")
    objective = PreferenceLoss(model, beta=1.0)
    values = stage.evaluate(objective, stage.PAIR_MEASURES, SimpleNamespace(dev=pairs), tuning)
    assert values["val_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_loss_of_a_pair_is_that_of_the_paper(pairs, model):
    ids, targets, _ = pairs.batch(0)
    with torch.no_grad():
        references = torch.stack([log_probs(model, ids[i], targets[i]) for i in range(len(ids))])
    objective = PreferenceLoss(model, beta=0.3)
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    total, rows = objective(ids, targets)
    expected = 0
    for i in range(len(ids)):
        chosen, rejected = log_probs(model, ids[i], targets[i])
        ratios = (chosen - references[i, 0]) - (rejected - references[i, 1])
        expected = expected - F.logsigmoid(0.3 * ratios)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert rows[:, 0].sum().item() == pytest.approx(total.item(), rel=1e-5)
    # a row without targets, which a process may get, counts for nothing
    empty = torch.full_like(targets[:1], IGNORED)
    again, rows = objective(torch.cat((ids, ids[:1])), torch.cat((targets, empty)))
    assert again.item() == pytest.approx(total.item(), rel=1e-5)
    assert not rows[-1].any()


# --- tokens that a base model lacks ---


def test_missing_chat_tokens_are_added_at_the_mean(tmp_path, tiny_config):
    for tied, V, special in ((True, 300, "<|endoftext|>"), (False, 320, "<|begin_of_text|>")):
        plain = Tokenizer.train([WORDS * 3], vocab_size=300, special_tokens=(special,))
        model = Transformer(replace(tiny_config, vocab_size=V, tie_embeddings=tied))
        torch.nn.init.normal_(model.model.embed_tokens.weight, mean=0.5, std=0.02)
        before = model.model.embed_tokens.weight.detach().clone()
        tokenizer = with_chat_tokens(plain)
        stage.add_rows(model, plain.vocab_size, tokenizer.vocab_size)
        assert model.config.vocab_size == 320
        after = model.model.embed_tokens.weight
        assert torch.equal(after[:300], before[:300])
        torch.testing.assert_close(after[300], before[:300].mean(0), atol=0.01, rtol=0)
        assert not torch.equal(after[300], after[301])
        model.save(tmp_path / str(V), tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(V))
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / str(V))
        ids = their_tokenizer.apply_chat_template(DIALOGUE, return_dict=False)
        assert ids == render(tokenizer, DIALOGUE)[0]
        ids = torch.tensor([ids])
        torch.testing.assert_close(theirs(ids).logits, model.eval()(ids), atol=1e-4, rtol=1e-4)


# --- exact match ---


def test_macros_are_means_over_kinds_without_long_questions():
    kinds = ["args", "args, many", "fix", "fix"]
    shares = exact_match([turn("q", "a", kind) for kind in kinds], ["a ", "b", "a", "b"])
    assert shares == {"args": 1, "args, many": 0, "fix": 0.5}
    assert macro(shares) == (1 + 0.5) / 2
    assert macro({}) is None


def test_yardsticks_are_the_most_frequent_answer_and_the_rule():
    learned = [turn("p", "a", "args"), turn("q", "b", "args"), turn("r", "b", "args")]
    test = [turn("s", "b", "args"), turn("t", "a", "args"), turn("u", "a", "unseen")]
    test.append(turn(f"{tasks.FIX}if x", "if x:", "fix"))
    measured = yardsticks(learned, test)
    assert measured == {"most_frequent": {"args": 0.5, "fix": 0, "unseen": 0}, "rule": {"fix": 1}}


def test_batched_answers_are_those_of_one_after_the_other(model, tokenizer):
    model.config.block_size = 128
    asked = [turn("the cat " * (i % 5), "the mat") for i in range(9)]
    together = answer(model, tokenizer, asked, batch_size=4)
    assert together == [answer(model, tokenizer, [one])[0] for one in asked]


# --- the script ---


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A base model that says what it was trained on; the data under data/ is removed afterwards."""
    folder = tmp_path_factory.mktemp("base")
    text = folder / "a.txt"
    text.write_text("".join(f"{WORDS}line {i} of the text\n" for i in range(200)), encoding="utf-8")
    prepare.prepare([str(text)], name="test-finetune", tokenizer=tokenizer)
    config = Config(320, 64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_hidden=64)
    torch.manual_seed(0)
    Transformer(config).save(folder / "base", tokenizer)
    torch.save({"script": "train.py", "data": "test-finetune"}, folder / "base/train_state.pt")
    yield folder / "base"
    shutil.rmtree(prepare.DATA / "test-finetune")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """48 different questions of two channels; of each, one is held out."""
    words = [("cat", "animal"), ("mat", "thing"), ("dog", "animal"), ("mat", "thing")] * 12
    records = [
        {"prompt": f"say {word} {i}", "completion": word, "channel": kind}
        for i, (word, kind) in enumerate(words)
    ]
    return write_lines(tmp_path_factory.mktemp("chat") / "chat.jsonl", records)


@pytest.fixture(scope="module")
def chatting(base, chat, tmp_path_factory):
    """A chat model that is sometimes right, with the answers to a test in its results.json."""
    folder = tmp_path_factory.mktemp("chatting")
    words = ["cat", "mat", "dog", "mat"] * 4
    records = [{"prompt": f"say {word} {i}", "completion": word} for i, word in enumerate(words)]
    test = write_lines(folder / "test.jsonl", records)
    options = ("--examples", chat, "--test", test, "--lr", 0.01, "--steps", 60, *SHORT[:4], "--evals", 1)
    run_here("--model", base, *options, "--out", folder / "say-chat")
    return folder / "say-chat"


@pytest.fixture(scope="module")
def preferred(tmp_path_factory):
    records = [{"prompt": f"say {i}", "chosen": "the cat", "rejected": "dog"} for i in range(45)]
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records)


def run_here(*arguments):
    return run_main(stage.main, "finetune.py", "--device", "cpu", *arguments)


def start_process(folder, *arguments):
    """finetune.py in a process that a test may kill; what it prints goes to files in the folder."""
    folder.mkdir()
    arguments = ["--device", "cpu", *map(str, arguments)]
    process = FORKS.Process(target=in_fork, args=("finetune.py", arguments, "", str(folder)), daemon=True)
    process.start()
    return process


def wait_for_save(out, process):
    """Return as soon as a run has saved its state once more, or has ended."""

    def newest():
        path = out / "train_state.pt"
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None

    before, deadline = newest(), time.monotonic() + 60
    while newest() == before and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def read_state(out):
    return torch.load(out / "train_state.pt", weights_only=True)


SHORT = ("--batch-size", 8, "--dtype", "float32", "--evals", 3, "--save-every", 3)
KINDS = ("full", "lora", "dpo", "rl")


def test_a_model_learns_to_answer_and_it_is_measured(base, chat, tmp_path):
    test = write_lines(tmp_path / "test.jsonl", [{"prompt": "say cat 0", "completion": "cat"}] * 2)
    out = tmp_path / "out"
    options = ("--examples", chat, "--test", test, "--lr", 0.01, "--steps", 250, "--replay", 0.25)
    printed = run_here("--model", base, *options, *SHORT[:4], "--evals", 5, "--out", out)
    assert "25% of each batch from test-finetune" in printed and "held out" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["exact_match"] == {"all": {"base": 0, "tuned": 1, "most_frequent": 0, "n": 2}}
    assert results["macro"] == 1 and results["questions"] == {"all": "say cat 0"}
    assert results["bpb"]["before"] > results["bpb"]["after"] > 0
    assert f"{results['bpb']['after']:.4f} now" in printed
    rows = read_log(out)
    assert float(rows[-1]["val_bpb"]) == pytest.approx(results["bpb"]["after"], rel=0.1)  # of a part
    for name in ("animal", "thing"):
        assert float(rows[-1][f"val_loss {name}"]) < 0.5
        assert any(row[f"train_loss {name}"] for row in rows)
    assert any(row["train_loss (replay)"] for row in rows)
    model, tokenizer = load(out)
    assert end_ids(out, tokenizer) == {tokenizer.special_tokens[name] for name in ("<|endoftext|>", END)}
    prompt, _ = render(tokenizer, [{"role": "user", "content": "say mat 3"}], add_generation_prompt=True)
    steps = generate(model, [prompt], 8, stop_ids=end_ids(out, tokenizer), temperature=0)
    ids = [new for (new,) in steps]
    assert tokenizer.decode(ids) == "mat"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    made = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert made.tolist() == [*ids, tokenizer.special_tokens[END]]
    assert "is finished: 250 steps" in run_here("--resume", "--out", out)


@pytest.fixture(scope="module")
def undisturbed(base, chat, preferred, chatting, tmp_path_factory):
    """A function: the folder of a short run of each kind, and the options of that run.

    Beside the folder stand copies of it, made at each save.
    """
    options = {
        "full": ("--examples", chat, "--replay", 0.25),
        "lora": ("--examples", chat, "--lora-rank", 2),
        "dpo": ("--examples", preferred, "--method", "dpo", "--lora-rank", 2),
        "rl": ("--examples", chat, "--method", "rl", "--answers", 4, "--replay", 0.25),
    }

    @cache
    def run(kind):
        folder = tmp_path_factory.mktemp(kind)

        def save_and_copy(out, state, *learning):
            train.save_state(out, state, *learning)
            shutil.copytree(out, folder / f"killed_at_{state['step']}")

        model = chatting if kind == "rl" else base
        arguments = ("--model", model, *options[kind], "--steps", 12, *SHORT, "--lr", 0.001)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "save_state", save_and_copy)
            run_here(*arguments, "--out", folder / "whole")
        return folder / "whole", arguments

    return run


def assert_same_run(out, other):
    names = ["model.safetensors", "best/model.safetensors", "samples.txt", "results.json"]
    if (other / "adapter").exists():
        names.append("adapter/adapter_model.safetensors")
    for name in names:
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert read_log(out) == read_log(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_right_after_any_save_goes_on_to_the_same_bits(undisturbed, kind):
    whole, _ = undisturbed(kind)
    copies = sorted(whole.parent.glob("killed_at_*"))
    assert {path.name for path in copies} == {f"killed_at_{step}" for step in (3, 4, 6, 8, 9, 12)}
    for out in copies:
        step = out.name.removeprefix("killed_at_")
        for name in ("log.csv", "samples.txt"):
            with open(out / name, "a") as file:
                file.write("what came after the save")
        assert f"after step {step}\n" in run_here("--resume", "--out", out)
        assert_same_run(out, whole)
        losses = [float(row["val_loss"]) for row in read_log(out) if row["val_loss"]]
        assert read_state(out)["best"] == pytest.approx(min(losses), abs=1e-4)
        shutil.rmtree(out)


def test_a_run_killed_between_two_lines_of_its_log_loses_no_loss(base, chat, tmp_path, monkeypatch):
    """The log has a hundred lines at most, so some of more steps have none."""
    out, copy = tmp_path / "out", tmp_path / "copy"

    def save_and_copy(out, state, *learning):
        train.save_state(out, state, *learning)
        if state["step"] == 100:
            shutil.copytree(out, copy)

    monkeypatch.setattr(stage, "save_state", save_and_copy)
    options = ("--steps", 110, *SHORT[:4], "--save-every", 100, "--evals", 1, "--lr", 0.001)
    run_here("--model", base, "--examples", chat, *options, "--out", out)
    assert "100" not in {row["step"] for row in read_log(out)}
    run_here("--resume", "--out", copy)
    assert_same_run(copy, out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_killed_twice_goes_on_to_the_same_bits(undisturbed, tmp_path, kind):
    whole, arguments = undisturbed(kind)
    out = tmp_path / "out"
    for saves in (1, 2):
        process = start_process(tmp_path / f"printed{saves}", *arguments, "--out", out)
        for _ in range(saves):
            wait_for_save(out, process)
        process.kill()
        process.join()
        assert (tmp_path / f"printed{saves}/stderr").read_text() == ""
        arguments = ("--resume",)
    run_here("--resume", "--out", out)
    assert_same_run(out, whole)


def test_the_merged_model_is_the_base_plus_the_update(undisturbed, base):
    whole, _ = undisturbed("lora")
    update = safetensors.torch.load_file(whole / "adapter/adapter_model.safetensors")
    merged = safetensors.torch.load_file(whole / "model.safetensors")
    begun = safetensors.torch.load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    A, B = (update[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert B.abs().max() > 0
    torch.testing.assert_close(merged[f"{name}.weight"], begun[f"{name}.weight"] + 2 * B @ A)
    assert torch.equal(merged["model.embed_tokens.weight"], begun["model.embed_tokens.weight"])


def test_preferring_lowers_the_loss_from_ln_2_and_says_how(undisturbed):
    whole, _ = undisturbed("dpo")
    first, *_, last = read_log(whole)
    assert float(first["train_loss"]) == pytest.approx(math.log(2), abs=1e-3)
    assert float(last["val_loss"]) < math.log(2)
    assert float(last["val_margin"]) > 0 and float(last["val_accuracy"]) == 1
    assert float(last["val_log_p_chosen"]) < 0 and float(last["train_log_p_rejected"]) < 0


def test_while_a_run_goes_on_no_other_takes_its_folder_and_ctrl_c_saves_it(base, chat, tmp_path):
    out = tmp_path / "out"
    options = ("--model", base, "--examples", chat, *SHORT, "--out", out)
    process = start_process(tmp_path / "printed", *options, "--steps", 100_000)
    wait_for_save(out, process)
    for arguments in (("--resume", "--out", out), (*options, "--steps", 1)):
        with pytest.raises(ValueError, match="another process is training in .*out: choose another --out"):
            run_here(*arguments)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    printed = (tmp_path / "printed/stdout").read_text()
    state = read_state(out)
    assert f"stopped after step {state['step']:,}; to go on: python finetune.py --resume --out" in printed
    saved = safetensors.torch.load_file(out / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"], state["weights"]["model.norm.weight"])


def run_two_processes(*arguments):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*program, ROOT / "finetune.py", "--device", "cpu", *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["full", "lora", "dpo"])
def test_two_processes_learn_what_one_learns(undisturbed, tmp_path, kind):
    """But for rounding: Adam's first steps go by the sign of a gradient, even of one that is nearly zero."""
    whole, arguments = undisturbed(kind)
    run_two_processes(*arguments, "--out", tmp_path / "two")
    for row, expected in zip(read_log(tmp_path / "two"), read_log(whole), strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"tokens"}:  # which count the row that fills up an uneven batch
            value = expected[name]
            assert float(row[name] or 0) == pytest.approx(float(value or 0), rel=0.02, abs=0.01), name


def test_a_run_goes_on_with_what_it_began_with_or_not_at_all(base, chat, tmp_path):
    mine, out = tmp_path / "mine.jsonl", tmp_path / "out"
    shutil.copy(chat, mine)
    run_here("--model", base, "--examples", mine, "--steps", 1, *SHORT, "--out", out)
    with pytest.raises(ValueError, match="--lr: a resumed run keeps its settings"):
        run_here("--resume", "--out", out, "--lr", 1)
    with open(mine, "a") as file:
        file.write('{"prompt": "more", "completion": "more"}\n')
    with pytest.raises(ValueError, match="mine.jsonl has changed since the run began"):
        run_here("--resume", "--out", out)
    shutil.copy(chat, mine)
    shutil.copy(base / "model.safetensors", base / "another.safetensors")
    try:
        with pytest.raises(ValueError, match="another.safetensors has changed since the run began"):
            run_here("--resume", "--out", out)
    finally:
        (base / "another.safetensors").unlink()
    assert "is finished: 1 steps" in run_here("--resume", "--out", out)


def test_a_qwen_like_folder_in_bfloat16_can_be_tuned_both_ways(tokenizer, base, chat, tmp_path, monkeypatch):
    """Also where it lacks the tokens of a chat, and its own text is unknown or of another tokenizer."""
    shape = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_hidden=64, head_dim=32, tie_embeddings=False)
    plain = Tokenizer.train([WORDS * 3], vocab_size=300, special_tokens=("<|endoftext|>",))
    qwen = Transformer(Config(304, 64, qk_norm=True, **shape)).to(torch.bfloat16)
    qwen.save(tmp_path / "base", plain)
    qwen.save(tmp_path / "with chat tokens", with_chat_tokens(plain))
    lora, other = ("--lora-rank", 4), ("--data", "test-finetune")
    cases = [
        ("base", (), True, torch.float32, "the text of the base model is not known (--data)"),
        ("with chat tokens", (*lora, *other), True, torch.bfloat16, "with another tokenizer"),
        ("with chat tokens", lora, False, torch.float32, "the text of the base model is not known (--data)"),
    ]
    for folder, options, has_units, dtype, replay in cases:
        monkeypatch.setattr(stage, "is_fast", lambda dtype, device, fast=has_units: fast)
        printed = run_here("--model", tmp_path / folder, "--examples", chat, "--steps", 3, *SHORT, *options,
                           "--out", tmp_path / "out")  # fmt: skip
        assert ("no tokens for the layout of a chat: they are added" in printed) == (folder == "base")
        assert replay in printed
        assert json.loads((tmp_path / "out/results.json").read_text())["bpb"]["after"] is None
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(theirs).__name__ == "Qwen3ForCausalLM"
        assert theirs.config.vocab_size == (320 if folder == "base" else 304)
        assert Transformer.load(tmp_path / "out").model.norm.weight.dtype == dtype
    with pytest.raises(ValueError, match="base lacks embeddings for the tokens of a chat"):
        run_here("--model", tmp_path / "base", "--examples", chat, *lora, "--out", tmp_path / "out")


def test_a_folder_whose_tokenizer_has_more_ids_than_the_model_has_rows_grows(tokenizer, chat, tmp_path):
    """As where somebody has added a token to a file. What is written is what transformers opens."""
    shape = dict(block_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_hidden=64)
    plain = Tokenizer.train([WORDS * 3], vocab_size=300, special_tokens=("<|endoftext|>",))
    for known, n_missing in ((plain, 1), (tokenizer, 2)):
        folder = tmp_path / str(n_missing)
        Transformer(Config(known.vocab_size - n_missing, **shape)).save(folder)
        known.save_pretrained(folder)
        run_here("--model", folder, "--examples", chat, "--steps", 2, *SHORT, "--out", tmp_path / "out")
        tuned, its_tokenizer = load(tmp_path / "out")
        assert tuned.config.vocab_size == 320 >= its_tokenizer.vocab_size
        ids = torch.tensor([render(its_tokenizer, DIALOGUE)[0]])
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(
            theirs(ids).logits, Transformer.load(tmp_path / "out")(ids), atol=1e-4, rtol=0
        )


def test_a_damaged_end_of_text_is_refused_before_training(base, chat, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(ValueError, match="generation_config.json is damaged"):
        run_here("--model", tmp_path / "base", "--examples", chat, *SHORT, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_saved_folder_makes_batches_in_transformers(tokenizer, base):
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    texts = ["the cat", "the cat sat on the mat"]
    batch = theirs(texts, padding=True)
    assert [sum(row) for row in batch.attention_mask] == [len(tokenizer.encode(text)) for text in texts]


def test_a_dry_run_shows_what_is_learned(base, chat, tmp_path):
    printed = run_here("--model", base, "--examples", chat, "--dry-run", "--out", tmp_path / "out")
    assert "<|im_start|>user\nsay " in printed and "⟦" in printed
    learned = printed.split("⟦")[1].split("⟧")[0]
    assert learned in ("cat<|im_end|>", "dog<|im_end|>", "mat<|im_end|>")
    assert not (tmp_path / "out").exists()


def test_without_options_the_newest_base_model_is_taught_the_small_tasks(
    base, tokenizer, tmp_path, monkeypatch
):
    out, folder = tmp_path / "out", tmp_path / "tasks"
    out.mkdir()
    folder.mkdir()
    monkeypatch.setattr(stage, "OUT", out)
    monkeypatch.setattr(train, "OUT", out)
    monkeypatch.setattr(tasks, "FOLDER", folder)
    for split, n in (("train", 40), ("dev", 4), ("test", 2)):
        lines = [f"x = f({split}{i}" for i in range(n)]
        records = [{"prompt": tasks.FIX + x, "completion": x + ")", "channel": "fix"} for x in lines]
        write_lines(folder / f"{split}.jsonl", records)
    with pytest.raises(ValueError, match="no base model under out/ yet: run `python train.py`"):
        run_here("--steps", 1)
    shutil.copytree(base, out / "newest")
    shutil.copytree(base, out / "of another program")  # newer, but with a tokenizer of another kind
    (out / "of another program/tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    ends = [tokenizer.special_tokens[END]]
    Transformer.load(base).save(out / "speaks", tokenizer, end_ids=ends)  # newer, but not a base model
    printed = run_here("--steps", 2, *SHORT[:4])
    assert "40: fix 40" in printed and "4: fix 4" in printed
    results = json.loads((out / "newest-chat/results.json").read_text())
    assert results["exact_match"]["fix"].keys() == {"base", "tuned", "most_frequent", "rule", "n"}
    assert results["exact_match"]["fix"]["rule"] == 1
    assert "newest-chat is finished: 2 steps" in run_here("--resume")


def test_learning_from_rewards_starts_from_the_newest_chat_model(
    base, chat, chatting, tokenizer, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(stage, "OUT", out)
    monkeypatch.setattr(train, "OUT", out)
    shutil.copytree(base, out / "base")
    options = ("--method", "rl", "--examples", chat, "--steps", 1, *SHORT[:4], "--answers", 2)
    with pytest.raises(ValueError, match="no chat model under out/ yet: run `python finetune.py`"):
        run_here(*options)
    ends = [tokenizer.special_tokens[END]]
    Transformer.load(base).save(out / "older", tokenizer, end_ids=ends)
    shutil.copytree(chatting, out / "say-chat")
    os.utime(out / "say-chat/model.safetensors")
    for _ in range(2):  # and not from what it wrote the first time
        printed = run_here(*options)
        assert "out/say-rl" in printed and f"{os.path.relpath(out / 'say-chat')}:" in printed
    assert {path.name for path in out.iterdir()} == {"base", "older", "say-chat", "say-rl", "say-rl.1"}


# --- rewards ---


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4), min_size=1, max_size=3))
def test_an_advantage_is_a_reward_less_the_mean_of_the_other_rewards_of_its_group(rows):
    found = advantages(torch.tensor(rows)).tolist()
    for row, values in zip(rows, found):
        for i, value in enumerate(values):
            others = row[:i] + row[i + 1 :]
            assert value == pytest.approx(row[i] - sum(others) / len(others), abs=1e-4)


@pytest.fixture
def asked(tokenizer):
    said = ("the cat", "the dog and the cat", "12345", "on")
    turns = [turn(f"say {text}", text, text[:2]) for text in said]
    turns[2] = Example([DIALOGUE[1:]], "th")  # its question follows another answer
    return Examples(turns, tokenizer, 96, 2)


def test_answers_are_drawn_as_generate_draws_them_and_end_with_im_end(asked, tokenizer, chatting):
    """The slow twin reads every question G times, and remembers nothing."""
    model, G, end = Transformer.load(chatting).eval(), 5, tokenizer.special_tokens[END]
    model.config = replace(model.config, block_size=96)
    ids, targets, channels, rewards = draw_answers(model, tokenizer, asked, [0, 2, 3], G, seed=7)
    chosen = [asked.examples[i] for i in (0, 2, 3) for _ in range(G)]
    prompts = [render(tokenizer, e.question, add_generation_prompt=True)[0] for e in chosen]
    longest = len(tokenizer.encode("and the dog")) + len(tokenizer.encode("the mat")) + 2
    sampling = dict(temperature=1.0, top_p=1.0, seed=7, stop_ids={end})
    steps = list(generate(model, prompts, longest, **sampling))
    assert rewards.shape == (3, G) and ids.shape == targets.shape and ids.size(1) % 8 == 0
    assert [asked.channels[i] for i in channels] == [one.channel for one in chosen]
    n_ended = 0
    for row, (prompt, one) in enumerate(zip(prompts, chosen)):
        said = [step[row] for step in steps if step[row] is not None]
        n_ended += len(said) < longest
        if len(said) < longest:
            said = [*said, end]
        whole = prompt + said
        assert ids[row, : len(whole) - 1].tolist() == whole[:-1]
        learned = targets[row] != IGNORED
        assert targets[row][learned].tolist() == said
        assert learned.nonzero().flatten().tolist() == list(range(len(prompt) - 1, len(whole) - 1))
        text = tokenizer.decode(said).removesuffix(END)
        assert rewards[row // G, row % G] == float(said[-1] == end and text.strip() == one.answer)
    assert n_ended  # of answers that were all cut off, nothing would be learned


def test_each_answer_may_fill_the_context_behind_its_own_question(tokenizer, model, monkeypatch):
    """Though a batch may hold a long question with a short answer and a short one with a long answer."""
    long, short = turn("the cat sat on the mat and " * 5, "x"), turn("x", "12345" * 6)
    lengths = [len(render(tokenizer, one.conversations[0])[0]) for one in (long, short)]
    part = Examples([long, short], tokenizer, max(lengths) - 1, 2, whole=True)
    monkeypatch.setattr(stage, "complete", lambda model, tokenizer, last, most, **settings: [[65] * most] * 4)
    ids, targets, _, _ = draw_answers(model, tokenizer, part, [0, 1], 2, seed=0)
    answered = (targets != IGNORED).sum(1).tolist()
    asked = [len(stage.question_ids(tokenizer, one)) for one in (long, short)]
    longest = len(tokenizer.encode(short.answer)) + 1
    expected = [min(longest, part.block_size + 1 - n) for n in asked]
    assert answered == [expected[0]] * 2 + [expected[1]] * 2 and expected[1] == longest > expected[0]


def test_an_answer_that_was_cut_off_earns_nothing(asked, tokenizer, model, monkeypatch):
    monkeypatch.setattr(stage, "reward", lambda example, text: 1.0)
    monkeypatch.setitem(model.config.__dict__, "block_size", 96)
    end = tokenizer.special_tokens[END]
    _, targets, _, rewards = draw_answers(model, tokenizer, asked, [0, 1, 3], 40, seed=0)
    ended = (targets == end).any(1)
    assert 0 < ended.sum() < len(ended)
    assert torch.equal(rewards.flatten(), ended.float())


def test_equal_answers_are_learned_as_one_and_the_gradient_is_the_same(model):
    torch.manual_seed(0)
    ids = torch.randint(300, (4, 16))[torch.tensor([0, 0, 1, 0, 2, 1, 3, 3])]
    targets = ids.roll(-1, dims=1)
    targets[:, :9] = IGNORED
    ids[4], targets[4] = ids[0], targets[1].clone()
    targets[4, 12] = 5  # the same inputs and another target: another answer
    weights = torch.tensor([0.5, 0.25, 1.0, -0.5, 2.0, -1.0, 0.5, -0.125])
    found = []
    for batch in ((ids, targets, weights), merge_equal(ids, targets, weights)):
        model.zero_grad()
        loss, nats = RewardLoss(model)(*batch)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    for p, q in zip(*(gradients for _, gradients in found)):
        assert torch.allclose(p, q, atol=1e-4)
    many = ids.repeat(5, 1), targets.repeat(5, 1), torch.zeros(40)
    assert len(merge_equal(*many)[0]) == 4  # all that differ, fewer than 8
    drawn = torch.arange(40 * 16).view(40, 16), torch.arange(40 * 16).view(40, 16)
    for n, n_rows in ((0, 8), (1, 8), (8, 8), (9, 16), (40, 40)):
        weights = (torch.arange(40) < n).float()
        *_, kept = merge_equal(*drawn, weights)
        assert len(kept) == n_rows and kept.sum() == n


def test_replay_adds_its_share_of_the_batch_times_its_mean_loss(asked, tokenizer, model, monkeypatch):
    monkeypatch.setattr(stage, "reward", lambda example, text: 1.0)  # but 0 for those that are cut off
    monkeypatch.setitem(model.config.__dict__, "block_size", 96)
    blocks = Blocks(torch.arange(40 * 97).numpy() % 256, 96, 0)
    tuning = tune_settings(batch_size=5, n_replay=3, n_answers=4)
    losses = {}
    for some in (None, blocks):
        batch, measures, _ = stage.draw_batch(1, asked, some, model, tokenizer, tuning)
        losses[some], _ = RewardLoss(model)(*batch)
        assert len(measures) == 2 * 4
    ids, targets = blocks.batch(1, 3)
    T = batch[0].size(1)
    with torch.no_grad():
        replayed = model.loss(ids[:, :T].contiguous(), targets[:, :T].contiguous())
    assert (losses[blocks] - losses[None]).item() / 8 == pytest.approx(3 / 5 * replayed.item(), rel=1e-3)


def test_rewards_are_measured_by_answer_and_by_group():
    rewards, targets = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.full((4, 5), IGNORED)
    for row, n in enumerate((1, 2, 3, 4)):
        targets[row, :n] = 7
    measures = measure_rewards(rewards, targets)
    expected = {
        "loss": [0, 1, 0.5, 0.5],
        "reward": [1, 0, 0.5, 0.5],
        "best": [1, 1, 0.5, 0.5],
        "signal": [1, 1, 0, 0],
        "length": [1, 2, 3, 4],
    }
    assert dict(zip(REWARD_MEASURES, measures.T.tolist())) == expected


def test_a_chat_model_that_is_sometimes_right_becomes_right_more_often(chatting, chat, tmp_path):
    out, test = tmp_path / "out", chatting.parent / "test.jsonl"
    options = ("--method", "rl", "--examples", chat, "--test", test, *SHORT[:4], "--evals", 4)
    printed = run_here("--model", chatting, *options, "--lr", 0.003, "--steps", 100, "--out", out)
    assert "6 questions a step, 8 answers drawn to each" in printed
    assert "25% of each batch from test-finetune" in printed
    rows = read_log(out)
    early, late = ([float(row["train_reward"]) for row in part] for part in (rows[:15], rows[-15:]))
    assert sum(late) > sum(early) + 15 * 0.1
    for row in rows:
        assert 0 <= float(row["train_reward"]) <= float(row["train_best"]) <= 1
        assert float(row["train_loss"]) == pytest.approx(1 - float(row["train_reward"]), abs=1e-5)
        assert 0 <= float(row["train_signal"]) <= 1 and float(row["train_length"]) > 1
    evaluated = [row for row in rows if row["val_reward"]]
    assert len(evaluated) == 4 and all(row["val_bpb"] for row in evaluated)
    assert 0 < float(evaluated[-1]["val_entropy"]) < float(evaluated[0]["val_entropy"])
    before = json.loads((chatting / "results.json").read_text())["exact_match"]["all"]
    found = json.loads((out / "results.json").read_text())["exact_match"]["all"]
    assert found.keys() == {"base", "tuned", "rewarded", "most_frequent", "n"}
    assert (found["base"], found["tuned"], found["n"]) == (before["base"], before["tuned"], 16)
    assert found["rewarded"] >= found["tuned"]
    assert "base          tuned       rewarded" in printed


def test_an_update_alone_learns_from_rewards_too(chatting, chat, tmp_path):
    out = tmp_path / "out"
    options = ("--method", "rl", "--examples", chat, *SHORT[:4], "--lora-rank", 2, "--steps", 2)
    run_here("--model", chatting, *options, "--out", out)
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (chatting, out))
    same = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert same == {name for name in before if not name.endswith("_proj.weight")}
    assert (out / "adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("question", [0, 1])
def test_the_base_has_no_column_where_its_answers_are_of_another_test(chatting, chat, tmp_path, question):
    """Of another number of questions, or of others."""
    lines = [{"prompt": f"say cat {question}", "completion": "cat"}] * (1 + 15 * question)
    test = write_lines(tmp_path / "test.jsonl", lines)
    options = ("--method", "rl", "--examples", chat, "--test", test, *SHORT[:4], "--steps", 1)
    printed = run_here("--model", chatting, *options, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/results.json").read_text())["exact_match"]["all"]
    assert found.keys() == {"tuned", "rewarded", "most_frequent", "n"}
    assert "questions          tuned       rewarded" in printed


def test_the_entropy_is_that_of_a_drawn_token(asked, tokenizer, model, monkeypatch):
    """ln V, where every token is as likely as any other."""
    monkeypatch.setitem(model.config.__dict__, "block_size", 96)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    tuning = tune_settings(batch_size=2, micro_batch=3, n_answers=4)
    material = SimpleNamespace(dev=asked, tokenizer=tokenizer)
    values = stage.evaluate_rewards(RewardLoss(model), REWARD_MEASURES, material, tuning)
    assert values["val_entropy"] == pytest.approx(math.log(320), rel=1e-4)
    assert values["val_length"] > 1


def test_two_processes_share_the_questions_of_a_step(asked, chatting, tokenizer, monkeypatch):
    model, found = Transformer.load(chatting), []
    tuning = tune_settings(batch_size=2, n_answers=3)

    def draw_and_record(model, tokenizer, examples, indices, *others):
        found.append(indices)
        return draw_answers(model, tokenizer, examples, indices, *others)

    monkeypatch.setattr(stage, "draw_answers", draw_and_record)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(stage, "rank_and_world", lambda rank=rank, world=world: (rank, world))
        stage.draw_batch(1, asked, None, model, tokenizer, tuning)
    both, first, second = found
    assert both == first + second == asked.epoch(0)[1]


def test_two_processes_draw_the_same_answers_to_held_out_questions_as_one(chatting, chat, tmp_path):
    """With hardly any learning, since to training questions each process draws answers of its own."""
    options = ("--method", "rl", "--examples", chat, *SHORT[:4], "--lr", 1e-9, "--steps", 2, "--evals", 1)
    run_here("--model", chatting, *options, "--out", tmp_path / "one")
    run_two_processes("--model", chatting, *options, "--out", tmp_path / "two")
    *_, row = read_log(tmp_path / "two")
    *_, expected = read_log(tmp_path / "one")
    assert row.keys() == expected.keys() and 0 < float(row["val_reward"]) < 1
    for name in [name for name in row if name.startswith("val_")]:
        assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-3), name


def test_the_reward_is_a_function_to_edit(chatting, chat, tmp_path, monkeypatch):
    """Here what is shorter is better."""
    monkeypatch.setattr(stage, "reward", lambda example, text: 1 / (1 + len(text)))
    options = ("--method", "rl", "--examples", chat, *SHORT[:4], "--lr", 0.01, "--steps", 40, "--evals", 1)
    run_here("--model", chatting, *options, "--replay", 0, "--out", tmp_path / "out")
    rows = read_log(tmp_path / "out")
    assert float(rows[-1]["train_length"]) < 0.6 * float(rows[0]["train_length"])
    assert float(rows[-1]["train_reward"]) > float(rows[0]["train_reward"])


def test_questions_without_room_for_their_answer_are_left_out(tokenizer):
    length = len(render(tokenizer, DIALOGUE)[0])
    part = [Example([DIALOGUE], "all"), turn("x", "y")]
    for block_size, n in ((length - 2, 1), (length - 1, 2)):
        assert len(Examples(part, tokenizer, block_size, 1, whole=True).rows) == n
        assert len(Examples(part, tokenizer, block_size, 1).rows) == 2


# --- how long a run is ---


def test_epochs_give_the_number_of_steps(base, chat, tmp_path):
    out = tmp_path / "out"
    printed = run_here(
        "--model", base, "--examples", chat, "--epochs", 2, *SHORT[:4], "--replay", 0, "--out", out
    )
    learned = 48 - 2  # one of each channel is held out
    steps = 2 * math.ceil(learned / 8)
    assert int(read_log(out)[-1]["step"]) == steps
    assert f"{steps}: each example 2 times" in printed
    assert "these are few and teach little: --epochs 17 makes 100 steps" in printed


@pytest.fixture
def slow_steps(monkeypatch):
    """Make each step of training last two seconds more, by the clock of the run."""
    clock = SimpleNamespace(ahead=0, monotonic=time.monotonic)
    clock.perf_counter = lambda: time.perf_counter() + clock.ahead

    def slow_step(*arguments):
        clock.ahead += 2
        return train.training_step(*arguments)

    monkeypatch.setattr(stage, "training_step", slow_step)
    monkeypatch.setattr(train, "time", clock)


@pytest.mark.parametrize(("batch_size", "ends_with"), [(8, "epochs"), (1, "minutes")])
def test_without_a_limit_a_run_has_3_minutes_or_3_epochs_and_falls_from_40_percent_of_either(
    base, chat, tmp_path, slow_steps, batch_size, ends_with
):
    out, most = tmp_path / "out", 3 * math.ceil(46 / batch_size)
    options = ("--batch-size", batch_size, "--dtype", "float32", "--replay", 0, "--lr", 0.001, "--out", out)
    printed = run_here("--model", base, "--examples", chat, *options)
    assert f"3 minutes, or {most} steps if that is less" in printed
    steps, fall = (read_state(out)["settings"][name] for name in ("steps", "fall"))
    with open(out / "log.csv", newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    seconds = {step: float(row["seconds"]) for step, row in rows.items()}
    assert max(rows) == steps and fall in rows
    if ends_with == "epochs":
        assert steps == most and seconds[steps] < 60
        assert fall == math.ceil(0.4 * steps)
    else:
        assert steps < most and seconds[steps] == pytest.approx(180, rel=0.1)
        assert min(step for step in rows if seconds[step] >= 0.4 * 180) == fall
    rates = [float(rows[step]["lr"]) for step in sorted(rows)]
    at_fall = sorted(rows).index(fall)
    assert rates[at_fall] == 0.001 == max(rates)
    assert rates[at_fall + 1 :] == sorted(rates[at_fall + 1 :], reverse=True) and rates[-1] < 0.0002


@pytest.mark.parametrize(
    ("method", "objective", "said"),
    [
        ("sft", train.NextTokenLoss, {"completion": "cat"}),
        ("dpo", PreferenceLoss, {"chosen": "cat", "rejected": "dog"}),
    ],
)
def test_the_longest_batch_is_tried_first_and_halved_until_it_fits(
    base, tmp_path, monkeypatch, method, objective, said
):
    """Or a run would end in the middle, where the longest examples come."""
    forward, shapes = objective.forward, []

    def forward_in_little_memory(self, ids, *others):
        if torch.is_grad_enabled():
            shapes.append(ids.shape)
            if ids.numel() > 4 * 64 * len(said):  # of tokens; all other batches of 8 fit
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, *others)

    monkeypatch.setattr(objective, "forward", forward_in_little_memory)
    records = [{"prompt": f"say {i}", **said} for i in range(40)]
    records.append({"prompt": "the cat sat on the mat and " * 5, **said})
    file, out = write_lines(tmp_path / "long.jsonl", records), tmp_path / "out"
    options = ("--examples", file, "--method", method, "--epochs", 1, *SHORT[:4], "--out", out)
    printed = run_here("--model", base, *options)
    first, second, *others = shapes
    assert (first[0], second[0]) == (8, 4) and first[-1] == second[-1] == 64
    assert 64 in {shape[-1] for shape in others} and {shape[0] for shape in others} <= {1, 2, 3, 4}
    assert "out of memory: trying 4 rows at a time" in printed.split("tokens/s")[0]
    assert read_state(out)["settings"]["micro_batch"] == 4


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "nowhere is not a model folder"),
        (["--lora-rank", "0"], "0 must be positive"),
        (["--lora-rank", "33"], "--lora-rank 33 must be from 1 to the model's width, 32"),
        (["--lora-alpha", "2"], "--lora-alpha goes with --lora-rank"),
        (["--replay", "1"], "1 must be at least 0 and below 1"),
        (["--steps", "1", "--epochs", "1"], "not allowed with argument"),
        (["--examples", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "nowhere"], "no data named 'nowhere'"),
        (["--block-size", "4096"], "--block-size 4096 is above the model's, 64"),
        (["--batch-size", "2", "--replay", "0.8"], "leaves no room for examples"),
        (["--beta", "0.2"], "--beta is of no use with --method sft"),
        (["--method", "dpo", "--replay", "0.2"], "--replay is of no use with --method dpo"),
        (["--method", "dpo"], 'a line needs "prompt", "chosen" and "rejected"'),
        (["--answers", "4"], "--answers is of no use with --method sft"),
        (["--method", "rl", "--answers", "1"], "--answers 1 leaves nothing to compare an answer with"),
        (["--method", "rl", "--beta", "0.2"], "--beta is of no use with --method rl"),
        (["--method", "rl"], "was not taught to chat: first run `python finetune.py --model "),
    ],
)
def test_a_mistake_is_named(base, chat, tmp_path, arguments, message):
    defaults = {"--model": base, "--examples": chat, "--out": tmp_path / "out", "--steps": 1}
    others = [part for name, value in defaults.items() if name not in arguments for part in (name, value)]
    with pytest.raises((ValueError, OSError, argparse.ArgumentError)) as error:
        run_here(*others, *arguments)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--method", "dpo"], ["--test", "test.jsonl"]])
def test_what_goes_with_examples_asks_for_them(base, tmp_path, arguments):
    with pytest.raises(ValueError, match=f"{arguments[0]}.* --examples"):
        run_here("--model", base, *arguments, "--out", tmp_path / "out")


def test_no_run_moves_away_what_it_reads(base, chat, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    with pytest.raises(ValueError, match="holds what is read, .*model: choose another --out"):
        run_here("--model", tmp_path / "model", "--examples", chat, "--steps", 1, "--out", tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").exists()
