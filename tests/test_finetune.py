"""What fine-tuning promises: only what the assistant says is learned, a merged update is the same model,
preferences start at ln 2, and a run that was stopped ends as if it had not been.
"""

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, WORDS, make_run, read_log, run_main
from hypothesis import example, given, settings
from hypothesis import strategies as st

import finetune as stage
import loop
import machine
from data import examples, prepare
from data.examples import Example, Examples, hold_out, read_examples, with_chat_tokens
from data.loader import IGNORED
from lora import add_lora, load_adapter, merge, num_lora_params, put_adapter, save_adapter
from model import Config, Transformer
from preference import cache_references, dpo_loss, log_probs
from sample import end_ids, generate, load, render
from scoring import answer, exact_match, macro
from tokenizer import Tokenizer

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
    ids, targets, counts, _ = part.batch(0)
    learned = [i for i in targets[0].tolist() if i != IGNORED]
    end = tokenizer.special_tokens[END]
    assert learned == [*tokenizer.encode("the mat"), end, *tokenizer.encode("and the dog"), end]
    assert counts.tolist() == [len(learned)]
    whole, _ = render(tokenizer, DIALOGUE)
    n = len(whole) - 1
    assert ids[0, :n].tolist() == whole[:-1]
    kept = targets[0, :n] != IGNORED
    assert torch.equal(targets[0, :n][kept], torch.tensor(whole[1:])[kept])  # each at the place before it
    assert (targets[0, n:] == IGNORED).all()


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.sampled_from([START, END, "user", "assistant\n", "<|im", "_end|>", "\n", "x "]), max_size=8)
)
def test_text_never_becomes_a_role(tokenizer, pieces):
    text = "".join(pieces)
    ids, mask = render(tokenizer, [{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    counts = Counter(ids)
    assert counts[tokenizer.special_tokens[START]] == counts[tokenizer.special_tokens[END]] == 2
    said = [i for i, learned in zip(ids, mask) if learned]
    assert tokenizer.decode(said) == text.strip() + END


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


def test_a_long_conversation_is_cut_at_a_turn_or_else_within_the_answer(tokenizer):
    whole = len(render(tokenizer, DIALOGUE)[0])
    first = len(render(tokenizer, DIALOGUE[:3])[0])
    for room in range(4, whole + 2):
        ids, mask, is_cut = examples.fit(tokenizer, DIALOGUE, room)
        assert len(ids) <= room and is_cut == (len(ids) < whole)
        if first <= room < whole:  # the question after it may stay, a part of an answer may not
            second = len(render(tokenizer, DIALOGUE[:4])[0])
            assert len(ids) == (second if room >= second else first)
            assert int(mask.sum()) == len(tokenizer.encode("the mat")) + 1
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
        '{"prompt": "x", "completion": "\\ud800"}',
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps(good), *bad, "", json.dumps({"prompt": "p", "completion": "c"})]))
    found = read_examples(path)
    assert [e.channel for e in found] == ["a", "all"] and found[1].answer == "c"
    printed = capsys.readouterr().out
    assert "12 lines of" in printed and "of 14" in printed
    for number, why in ((2, "Expecting value"), (4, "prompt"), (5, "first turn must be the user's"),
                        (6, "no turn of the assistant"), (7, "robot"), (8, "system"), (9, "is empty"),
                        (10, "is no text"), (11, "content")):  # fmt: skip
        line = next(line for line in printed.splitlines() if f"line {number}:" in line)
        assert why in line
    assert "line 13" not in printed  # ten are shown
    path.write_text("\n".join(bad))
    with pytest.raises(ValueError, match="there is no example in"):
        read_examples(path)
    pairs = [
        {"prompt": "x", "chosen": "a", "rejected": " a"},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    ]
    write_lines(path, pairs)
    assert len(read_examples(path, pairs=True)) == 1
    assert "chosen and rejected are the same" in capsys.readouterr().out


def test_of_a_pair_only_the_last_answer_counts_and_equal_ones_are_left_out(tokenizer):
    history, (question,) = DIALOGUE[1:3], [{"role": "user", "content": "sat on"}]
    both = [[*history, question, {"role": "assistant", "content": text}] for text in ("the mat", "the dog")]
    part = Examples([Example(both, "all")], tokenizer, 128, 1)
    for k, text in enumerate(("the mat", "the dog")):
        learned = [i for i in part.batch(0)[1][0, k].tolist() if i != IGNORED]
        assert learned == [*tokenizer.encode(text), tokenizer.special_tokens[END]]
    room = len(render(tokenizer, both[0][:-1], answer=True)[0])
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
    assert several.mean_tokens() == rows / 7


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_batch_and_have_as_many_rows(several, world):
    for step in range(several.per_epoch):
        whole = several.batch(step)
        parts = [several.batch(step, rank, world) for rank in range(world)]
        assert len({len(part[0]) for part in parts}) == 1
        kept = [row for part in parts for row, n in zip(part[1].tolist(), part[2].tolist()) if n]
        assert sorted(kept) == sorted(whole[1].tolist())


def test_padding_changes_no_loss_and_no_gradient(several, model):
    """There is no mask for it: it stands behind what counts, and attention looks back."""
    batch = several.epoch(0)[0]
    ids, targets, *_ = several.tensors(batch)
    assert min(len(several.rows[i][0][0]) for i in batch) < ids.size(1)
    together, rows = model.loss(ids, targets, reduction="rows")
    together.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for k, i in enumerate(batch):
        ((text, mask),) = several.rows[i]
        targets = text[None, 1:].long().masked_fill(~mask[None, 1:], IGNORED)
        alone = model.loss(text[None, :-1].long(), targets, reduction="sum")
        alone.backward()
        assert alone.item() == pytest.approx(rows[k].item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_losses_are_told_apart_by_channel_as_sums(several, model):
    """Means of means would be wrong: the channels have unlike numbers of targets."""
    batches = [several.tensors(batch) for batch in several.by_length()]
    sums = loop.sum_losses(model, loop.next_token_loss, batches, 2)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(53):
        ids, targets, counts, channels = several.tensors([i])
        with torch.no_grad():
            loss = model.loss(ids, targets, reduction="sum").item()
        expected[channels[0]] += torch.tensor([counts[0], loss])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-3)
    values = loop.means(("loss",), several.channels, sums, "val")
    assert values["val_loss a"] == pytest.approx((expected[0, 1] / expected[0, 0]).item(), rel=1e-5)
    assert values["val_loss"] == pytest.approx((expected[:, 1].sum() / expected[:, 0].sum()).item(), rel=1e-5)


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
def test_as_many_parameters_learn_as_the_closed_form_says(tiny_config, changes):
    config = replace(tiny_config, **{"head_dim": 0} | changes)
    model = add_lora(Transformer(config), 3, 6.0)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in learning)
    assert sum(p.numel() for p in learning.values()) == num_lora_params(config, 3)
    optimizer = torch.optim.AdamW(learning.values())
    ids = torch.randint(320, (2, 9))
    model.loss(ids, ids).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learning)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    estimate = machine.training_memory(config, make_run(), num_lora_params(config, 3))
    assert estimate["moments"] == sum(t.nbytes for t in moments)
    assert estimate["gradients"] == sum(p.grad.nbytes for p in learning.values())


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_does_not_suit_the_model_is_refused(model, rank):
    with pytest.raises(ValueError, match=f"--lora-rank {rank} must be from 1 to the model's width, 32"):
        add_lora(model, rank, 1.0)


def test_peft_opens_an_update_and_we_open_what_peft_saves(model, tokenizer, tmp_path):
    model.save(tmp_path / "base", tokenizer)
    ids = torch.randint(320, (2, 16))
    adapted = with_update(model)
    save_adapter(tmp_path / "adapter", model.state_dict(), 4, 6.0, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, adapted(ids), atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    update, rank, alpha = load_adapter(tmp_path / "again")
    assert (rank, alpha) == (4, 6.0)
    ours = {name: p for name, p in model.state_dict().items() if ".lora_" in name}
    assert update.keys() == ours.keys()
    assert all(torch.equal(update[name], ours[name]) for name in ours)


def test_an_update_that_does_not_fit_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="is no adapter that fits here"):
        load_adapter(tmp_path)
    save_adapter(tmp_path, with_update(model).state_dict(), 4, 6.0, "base")
    settings_ = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"target_modules": ["q_proj"]}, {"use_dora": True}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings_ | change))
        with pytest.raises(ValueError, match="it adapts"):
            load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings_))
    other = add_lora(Transformer(replace(model.config, n_hidden=96)), 4, 6.0)
    with pytest.raises(ValueError, match="is an update of a model of another shape"):
        put_adapter(other, tmp_path)


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


def test_log_probabilities_are_those_of_the_answers_alone(pairs, model):
    cache_references(model, pairs, make_run())
    for i, row in enumerate(pairs.rows):
        for k, (ids, mask) in enumerate(row):
            with torch.no_grad():
                log_p = model(ids[None].long())[0].log_softmax(-1)
            expected = sum(log_p[j - 1, ids[j].item()].item() for j in range(1, len(ids)) if mask[j])
            assert pairs.references[i, k].item() == pytest.approx(expected, abs=1e-3)


def test_preferring_starts_at_ln_2_and_widens_the_margin(pairs, model):
    cache_references(model, pairs, make_run())
    loss_of = stage.partial(dpo_loss, beta=0.1, likelihood=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    given_ = SimpleNamespace(model=model, optimizers=[optimizer], loss_of=loss_of)
    for step in range(12):
        *batch, counts, _ = pairs.batch(step)
        rows, _ = loop.training_step(given_, batch, int(counts.sum()), 1.0, make_run(micro_batch=3))
        if step == 0:
            assert rows[:, 0].tolist() == pytest.approx([math.log(2)] * len(rows), abs=1e-4)
            assert rows[:, 1].abs().max() < 1e-3
    sums = loop.sum_losses(model, loss_of, [pairs.tensors(batch) for batch in pairs.by_length()], 1)
    values = loop.means(stage.MEASURES, pairs.channels, sums, "val")
    assert values["val_margin"] > 0.1 and values["val_accuracy"] == 1
    assert values["val_loss"] < math.log(2)


def test_the_loss_of_a_pair_is_that_of_the_paper(pairs, model):
    cache_references(model, pairs, make_run())
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    ids, targets, reference, counts, _ = pairs.batch(0)
    total, rows = dpo_loss(model, ids, targets, reference, beta=0.3, likelihood=0.5)
    expected = 0
    for i in range(len(ids)):
        chosen, rejected = log_probs(model, ids[i], targets[i])
        ratios = (chosen - reference[i, 0]) - (rejected - reference[i, 1])
        expected = expected - F.logsigmoid(0.3 * ratios) - 0.5 * chosen / (targets[i, 0] != IGNORED).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert rows[:, 0].sum().item() == pytest.approx(total.item(), rel=1e-5)
    # a row without targets, which a process may get, counts for nothing
    empty = torch.full_like(targets[:1], IGNORED)
    more = [torch.cat(part) for part in ((ids, ids[:1]), (targets, empty), (reference, reference[:1]))]
    assert dpo_loss(model, *more, beta=0.3, likelihood=0.5)[0].item() == pytest.approx(total.item(), rel=1e-5)


# --- tokens that a base model lacks ---


def test_missing_chat_tokens_are_added_at_the_mean(tmp_path, tiny_config):
    for tied, V, special in ((True, 300, "<|endoftext|>"), (False, 320, "<|begin_of_text|>")):
        plain = Tokenizer.train([WORDS * 3], vocab_size=300, special_tokens=(special,))
        model = Transformer(replace(tiny_config, vocab_size=V, tie_embeddings=tied))
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
    state = {"data": "test-finetune", "stage": "pretraining"}
    (folder / "base/checkpoints/step_000001").mkdir(parents=True)
    torch.save(state, folder / "base/checkpoints/step_000001/train_state.pt")
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
def preferred(tmp_path_factory):
    records = [{"prompt": f"say {i}", "chosen": "the cat", "rejected": "dog"} for i in range(45)]
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records)


def run_here(*arguments):
    return run_main(stage.main, "finetune.py", "--device", "cpu", *arguments)


SHORT = ("--batch-size", 8, "--dtype", "float32", "--eval-every", 5, "--save-every", 3)


def test_a_model_learns_to_answer_and_it_is_measured(base, chat, tmp_path):
    test = write_lines(tmp_path / "test.jsonl", [{"prompt": "say cat 0", "completion": "cat"}] * 2)
    out = tmp_path / "out"
    options = ("--examples", chat, "--test", test, "--lr", 0.01, "--steps", 250, "--replay", 0.25)
    printed = run_here("--model", base, *options, *SHORT, "--out", out)
    assert "25% of the rows of a batch are from test-finetune" in printed and "held out" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["exact_match"]["all"] | {"most_frequent": 0} == {
        "base": 0.0, "tuned": 1.0, "most_frequent": 0, "n": 2,
    }  # fmt: skip
    assert results["macro"] == 1 and results["bpb"]["before"] > results["bpb"]["after"] > 0
    assert f"{results['bpb']['after']:.4f} now" in printed
    rows = read_log(out)
    assert float(rows[-1]["val_bpb"]) == pytest.approx(results["bpb"]["after"], abs=1e-4)
    for name in ("animal", "thing"):
        assert float(rows[-1][f"val_loss {name}"]) < 0.5
        assert any(row[f"train_loss {name}"] for row in rows)
    assert any(row["train_loss (replay)"] for row in rows)
    assert [name for name in rows[0] if "bpb" in name] == ["val_bpb"]
    model, tokenizer = load(out)
    assert end_ids(out, tokenizer) == {tokenizer.special_tokens[name] for name in ("<|endoftext|>", END)}
    prompt = render(tokenizer, [{"role": "user", "content": "say mat 3"}], answer=True)[0]
    ids = [i for (i,) in generate(model, [prompt], 8, end_ids(out, tokenizer), temperature=0)]
    assert tokenizer.decode(ids) == "mat"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    made = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert made.tolist() == [*ids, tokenizer.special_tokens[END]]
    assert "is finished: 250 steps" in run_here("--resume", "--out", out)


def assert_same_run(out, other):
    names = ["model.safetensors", "samples.txt", "results.json"]
    names += ["adapter/adapter_model.safetensors"] * (out / "adapter").exists()
    for name in names:
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert read_log(out) == read_log(other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_starts_at_ln_2_whatever_the_dtype(pairs, model, dtype):
    run = make_run(dtype=dtype, micro_batch=4)
    cache_references(model, pairs, run)
    with machine.precision("cpu", dtype):
        batches = [pairs.tensors(indices) for indices in pairs.by_length(4)]
        sums = loop.sum_losses(model, stage.partial(dpo_loss, beta=1.0, likelihood=0.0), batches, 1)
    assert (sums[0, 1] / sums[0, 0]).item() == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora", "dpo"])
def test_a_run_killed_at_any_checkpoint_goes_on_to_the_same_bits(base, chat, preferred, tmp_path, kind):
    options = {
        "full": ("--examples", chat),
        "lora": ("--examples", chat, "--lora-rank", 2),
        "dpo": ("--examples", preferred, "--method", "dpo", "--lora-rank", 2),
    }[kind]
    whole = tmp_path / "whole"
    printed = run_here("--model", base, *options, "--steps", 12, *SHORT, "--out", whole)
    assert "MB with LoRA of rank" in printed
    steps = sorted(path.name for path in whole.glob("checkpoints/step_*"))
    assert steps == ["step_000010", "step_000012"]
    shutil.copytree(whole, tmp_path / "killed")
    (tmp_path / "killed/results.json").unlink()
    assert "after step 12 of 12" in run_here(
        "--resume", "--out", tmp_path / "killed"
    )  # killed while it counted
    assert_same_run(tmp_path / "killed", whole)
    shutil.rmtree(tmp_path / "killed/checkpoints/step_000012")
    (tmp_path / "killed/results.json").unlink()
    assert "after step 10 of 12" in run_here("--resume", "--out", tmp_path / "killed")
    assert_same_run(tmp_path / "killed", whole)
    with pytest.raises(ValueError, match="--lr: a resumed run keeps its settings"):
        run_here("--resume", "--out", whole, "--lr", 1)
    if kind == "lora":
        update, _, _ = load_adapter(whole / "adapter")
        merged = safetensors.torch.load_file(whole / "model.safetensors")
        begun = safetensors.torch.load_file(base / "model.safetensors")
        name = "model.layers.0.mlp.up_proj"
        delta = 2 * update[f"{name}.lora_B"] @ update[f"{name}.lora_A"]
        assert delta.abs().max() > 0
        torch.testing.assert_close(merged[f"{name}.weight"], begun[f"{name}.weight"] + delta)
        assert torch.equal(merged["model.embed_tokens.weight"], begun["model.embed_tokens.weight"])
    if kind == "dpo":
        rows = read_log(whole)
        assert float(rows[0]["train_loss"]) == pytest.approx(math.log(2), abs=1e-3)
        assert float(rows[-1]["val_margin"]) > 0 and float(rows[-1]["val_accuracy"]) == 1
        assert float(rows[-1]["val_log_p_chosen"]) < 0 and float(rows[-1]["train_log_p_rejected"]) < 0


def test_a_run_goes_on_with_the_examples_that_it_began_with_or_not_at_all(base, chat, tmp_path):
    mine = tmp_path / "mine.jsonl"
    shutil.copy(chat, mine)
    run_here("--model", base, "--examples", mine, "--steps", 1, *SHORT, "--out", tmp_path / "out")
    with open(mine, "a") as file:
        file.write('{"prompt": "more", "completion": "more"}\n')
    with pytest.raises(ValueError, match="mine.jsonl has changed since the run began"):
        run_here("--resume", "--out", tmp_path / "out")
    shutil.copy(chat, mine)
    shutil.copy(base / "model.safetensors", base / "another.safetensors")
    try:
        with pytest.raises(ValueError, match="another.safetensors has changed since the run began"):
            run_here("--resume", "--out", tmp_path / "out")
    finally:
        (base / "another.safetensors").unlink()


def test_an_update_can_be_trained_further(base, chat, tmp_path):
    """And it is that of the model that it names."""
    options = ("--examples", chat, "--steps", 5, *SHORT)
    run_here("--model", base, *options, "--lora-rank", 2, "--lora-alpha", 3, "--out", tmp_path / "a")
    run_here(*options, "--adapter", tmp_path / "a/adapter", "--out", tmp_path / "b")
    first, second = read_log(tmp_path / "a"), read_log(tmp_path / "b")
    assert float(second[0]["train_loss animal"]) < float(first[0]["train_loss animal"])
    assert load_adapter(tmp_path / "b/adapter")[1:] == (2, 3.0)
    begun = torch.load(tmp_path / "b/checkpoints/step_000003/train_state.pt", weights_only=True)
    assert begun["sources"]["adapter"] == str(tmp_path / "a/adapter")
    assert begun["sources"]["base"] == str(base)
    save_adapter(tmp_path / "a/adapter", {}, 2, 3.0, tmp_path / "gone")
    with pytest.raises(ValueError, match="belongs to the model '.*gone', which is not there"):
        run_here(*options, "--adapter", tmp_path / "a/adapter")


def test_a_qwen_like_folder_in_bfloat16_can_be_tuned_both_ways(tokenizer, chat, tmp_path):
    shape = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_hidden=64, head_dim=32, tie_embeddings=False)
    plain = Tokenizer.train([WORDS * 3], vocab_size=300, special_tokens=("<|endoftext|>",))
    Transformer(Config(304, 64, qk_norm=True, **shape)).to(torch.bfloat16).save(tmp_path / "qwen", plain)
    for options, dtype in (((), torch.float32), (("--lora-rank", 4), torch.bfloat16)):
        printed = run_here("--model", tmp_path / "qwen", "--examples", chat, "--steps", 3, *SHORT, *options,
                           "--out", tmp_path / "out")  # fmt: skip
        assert "no tokens for the layout of a chat: they are added" in printed
        assert "its text is unknown (--data)" in printed
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.config.vocab_size == 320
        assert Transformer.load(tmp_path / "out").model.norm.weight.dtype == dtype


def test_a_dry_run_shows_what_is_learned(base, chat, tmp_path):
    printed = run_here("--model", base, "--examples", chat, "--dry-run", "--out", tmp_path / "out")
    assert "<|im_start|>user\nsay " in printed and "⟦" in printed
    learned = printed.split("⟦")[1].split("⟧")[0]
    assert learned in ("cat<|im_end|>", "dog<|im_end|>", "mat<|im_end|>")
    assert not (tmp_path / "out").exists()


def test_the_newest_base_model_is_taken(base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "OUT", tmp_path)
    with pytest.raises(ValueError, match="no base model under out/ yet: run `python train.py`"):
        stage.newest_base()
    shutil.copytree(base, tmp_path / "a")
    model = Transformer.load(base)
    model.save(tmp_path / "a-chat", tokenizer, ends=[tokenizer.special_tokens[END]])
    assert stage.newest_base() == tmp_path / "a"


def test_steps_follow_from_epochs_or_minutes(base, chat, tmp_path):
    out = tmp_path / "out"
    run_here("--model", base, "--examples", chat, "--epochs", 2, *SHORT[:4], "--replay", 0, "--out", out)
    learned = 48 - 2  # one of each channel is held out
    assert int(read_log(out)[-1]["step"]) == 2 * math.ceil(learned / 8)
    printed = run_here("--model", base, "--examples", chat, *SHORT[:4], "--replay", 0, "--out", out)
    assert "each example 3 times" in printed and "--epochs 17 makes 100" in printed


def test_two_processes_learn_what_one_learns(base, chat, tmp_path):
    """But for rounding: Adam's first steps go by the sign of a gradient, even of one that is nearly zero."""
    options = ["--model", base, "--examples", chat, "--steps", 8, *SHORT, "--replay", 0.25, "--lr", 0.001]
    run_here(*options, "--out", tmp_path / "one")
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*program, ROOT / "finetune.py", "--device", "cpu", *options, "--out", tmp_path / "two"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for row, expected in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert float(row[name] or 0) == pytest.approx(float(value or 0), rel=0.02, abs=0.01), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "nowhere is no model folder"),
        (["--lora-rank", "0"], "--lora-rank 0 must be above 0"),
        (["--lora-rank", "33"], "--lora-rank 33 must be from 1 to the model's width, 32"),
        (["--lora-alpha", "2"], "--lora-alpha goes with --lora-rank"),
        (["--adapter", "nowhere"], "nowhere is no adapter that fits here"),
        (["--replay", "1"], "--replay 1.0 must be at least 0 and below 1"),
        (["--steps", "1", "--epochs", "1"], "--minutes, --epochs and --steps exclude each other"),
        (["--examples", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "nowhere"], "no data named 'nowhere'"),
        (["--block-size", "4096"], "--block-size 4096 is above the model's, 64"),
        (["--batch-size", "2", "--replay", "0.8"], "leaves no room for examples"),
        (["--beta", "0.2"], "--beta is of no use with --method sft"),
    ],
)
def test_a_mistake_is_named(base, chat, tmp_path, arguments, message):
    defaults = {"--model": base, "--examples": chat, "--out": tmp_path / "out", "--steps": 1}
    given_ = [part for name, value in defaults.items() if name not in arguments for part in (name, value)]
    if "--epochs" in arguments:
        given_ = [part for part in given_ if part not in ("--steps", 1)]
    with pytest.raises((ValueError, OSError)) as error:
        run_here(*given_, *arguments)
    assert message in str(error.value)


def test_no_run_moves_away_what_it_reads(base, chat, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    with pytest.raises(ValueError, match="holds what is read, .*model: choose another --out"):
        run_here("--model", tmp_path / "model", "--examples", chat, "--steps", 1, "--out", tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").exists()


def test_dpo_wants_pairs(base, chat):
    with pytest.raises(ValueError, match="--method dpo needs --examples"):
        run_here("--model", base, "--method", "dpo")
    with pytest.raises(ValueError, match='a line needs "prompt", "chosen" and "rejected"'):
        run_here("--model", base, "--method", "dpo", "--examples", chat)


def test_macros_are_means_over_kinds_with_and_without_long_questions():
    test = [
        turn("q", "a", "args"),
        turn("q", "a", "args, many"),
        turn("q", "a", "fix"),
        turn("q", "a", "fix"),
    ]
    answers = ["a ", "b", "a", "b"]
    assert macro(test, answers) == (1 + 0.5) / 2
    assert macro(test, answers, all_lengths=True) == (0.5 + 0.5) / 2
    assert macro([], []) is None
    assert exact_match(test, answers) == {"args": 1, "args, many": 0, "fix": 0.5}


def test_batched_answers_are_those_of_one_after_the_other(model, tokenizer):
    model.config.block_size = 128
    questions = [[{"role": "user", "content": "the cat " * (i % 5)}] for i in range(9)]
    together = answer(model, tokenizer, questions, 12, batch_size=4)
    assert together == [answer(model, tokenizer, [question], 12)[0] for question in questions]
