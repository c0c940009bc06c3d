"""A real model through all stages: SmolLM2-135M-Instruct, against transformers and peft.

The variable SMOLLM2 names its folder, which `python tests/smollm2.py` makes and prints. Without it, these
tests are skipped.
"""

import json
import os
import random
import sys
import unicodedata
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, read_log, run_main

import finetune
import sample
from model import Transformer
from sample import Chat, generate, load
from tokenizer import Tokenizer, render

USER = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = {"role": "system", "content": "You are a pirate. Answer in one short sentence."}
GREEDY = ("--temperature", 0, "--max-new-tokens", 16, "--device", "cpu")


@pytest.fixture(scope="module")
def folder():
    if not os.environ.get("SMOLLM2"):
        pytest.skip("SMOLLM2 does not name the folder of the model")
    return Path(os.environ["SMOLLM2"])


@pytest.fixture(scope="module")
def theirs(folder):
    """Model and tokenizer in transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder):
    """Model and tokenizer here."""
    return Transformer.load(folder), Tokenizer.load(folder / "tokenizer.json")


def continued_by_theirs(theirs, ids, n):
    model, tokenizer = theirs
    written = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n)
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


# --- tokens ---


def texts_of_every_kind():
    """A few thousand: lines of this project, characters of every script and category, random bytes."""
    rng = random.Random(0)
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("tests/*.py")]):
        yield from path.read_text(encoding="utf-8").split("\n")[::9]
    assigned = [chr(i) for i in range(0x30000) if unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs")]
    for _ in range(1000):
        yield "".join(rng.choices(assigned, k=rng.randrange(1, 20)))
        yield "".join(
            rng.choices([*map(chr, range(128)), *"<|im_start|>'\u2019 éñ中文日本\U00040000😀"], k=30)
        )
        yield str(rng.randrange(10**9)) + rng.choice([" ", "", "\n", ",000.5"]) * rng.randrange(4)


def test_ids_of_thousands_of_texts_are_those_of_tokenizers(folder, ours):
    _, tokenizer = ours
    peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    peer.encode_special_tokens = True  # like here: special tokens are never found in text
    texts = list(texts_of_every_kind())
    assert len(texts) > 3000
    for text in texts:
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False).ids, text
    without = [text for text in texts if set(text.encode()) & set(tokenizer.missing_bytes)]
    assert len(without) > 100 and len(tokenizer.missing_bytes) == 21


# --- the model ---


def test_every_logit_is_that_of_transformers(ours, theirs):
    (model, tokenizer), (peer, _) = ours, theirs
    ids = tokenizer.encode(Path(ROOT, "README.md").read_text(encoding="utf-8"))[:400]
    ids = torch.tensor([ids[:200], ids[200:]])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), peer(ids).logits, rtol=0, atol=1e-3)


def test_greedy_text_is_that_of_transformers_also_in_a_ragged_batch(ours, theirs):
    model, tokenizer = ours
    texts = ["The capital of France is", "def fibonacci(n):\n", "Once", "日本の首都は", "1, 2, 3, 4," * 9]
    prompts = [tokenizer.encode(text) for text in texts]
    rows = list(zip(*generate(model, prompts, max_new_tokens=24, temperature=0)))
    for ids, row in zip(prompts, rows):
        settings = dict(do_sample=False, max_new_tokens=24, eos_token_id=None)
        assert list(row) == theirs[0].generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER]], ids=["its own system message", "another"])
def test_a_chat_is_that_of_transformers(ours, theirs, messages):
    model, tokenizer = ours
    ids = theirs[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert render(tokenizer, messages, add_generation_prompt=True)[0] == ids
    end = tokenizer.special_tokens["<|im_end|>"]
    steps = generate(model, [ids], max_new_tokens=32, temperature=0, stop_ids={end})
    assert tokenizer.decode([new for (new,) in steps]) == continued_by_theirs(theirs, ids, 32)


def test_a_conversation_of_several_turns_is_that_of_transformers(folder, theirs):
    model, tokenizer = load(folder)
    chat, messages = Chat(model, tokenizer), []
    settings = dict(max_new_tokens=24, temperature=0, stop_ids={tokenizer.special_tokens["<|im_end|>"]})
    for question in (USER["content"], "And of Italy?", "Which one is larger?"):
        messages.append({"role": "user", "content": question})
        ids = theirs[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = "".join(chat.answer(question, **settings))
        assert answer == continued_by_theirs(theirs, ids, 24)
        messages.append({"role": "assistant", "content": answer})
    assert "Paris" in messages[1]["content"]


def test_a_file_of_prompts_is_answered_as_by_transformers(folder, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    records = [{"messages": [USER]}, {"prompt": "The sun is"}, {"messages": [SYSTEM, USER]}]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    run_main(sample.main, "sample.py", "--model", folder, "--prompts", prompts, "--output", output, *GREEDY)
    answers = [json.loads(line)["completion"] for line in output.read_text(encoding="utf-8").splitlines()]
    for record, answer in zip(records, answers, strict=True):
        if "prompt" in record:
            ids = theirs[1](record["prompt"]).input_ids
        else:
            messages = record["messages"]
            ids = theirs[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert answer == continued_by_theirs(theirs, ids, 16)


# --- fine-tuning ---


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """200 of them, in which the model learns a habit that it has not."""
    path = tmp_path_factory.mktemp("examples") / "chat.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(200):
            question, answer = f"What is {i % 20} plus {i // 20}?", f"Arr, {i % 20 + i // 20}, matey!"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_it_learns_and_opens_again_in_transformers_and_peft(folder, conversations, lora, dtype, tmp_path):
    base, out = folder, tmp_path / "out"
    if dtype == "bfloat16":
        base = tmp_path / "base"
        model = Transformer.load(folder, dtype=torch.bfloat16)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        model.save(base, tokenizer, end_ids=[2])
    options = ["--steps", 5, "--evals", 1, "--batch-size", 8, "--device", "cpu"]
    if lora:
        options += ["--lora-rank", 4, "--lr", 0.003]
    printed = run_main(finetune.main, "finetune.py", "--model", base, "--examples", conversations, *options,
                       "--out", out)  # fmt: skip
    assert "the text of the base model is not known" in printed
    losses = [float(row["train_loss"]) for row in read_log(out)]
    assert losses[-1] < losses[0] - 0.5
    model, tokenizer = load(out)
    assert tokenizer.config == Tokenizer.load(folder / "tokenizer.json").config
    again = transformers.AutoTokenizer.from_pretrained(out)
    ids = again.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert ids == render(tokenizer, [USER], add_generation_prompt=True)[0]
    stored = Transformer.load(out, dtype=torch.float32)
    peer = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = stored(torch.tensor([ids]))
        torch.testing.assert_close(logits, peer(torch.tensor([ids])).logits, rtol=0, atol=1e-3)
        if lora:
            plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            adapted = peft.PeftModel.from_pretrained(plain, out / "adapter").eval()
            difference = (logits - adapted(torch.tensor([ids])).logits).abs()
            assert difference.max() < 2e-3 if dtype == "float32" else difference.mean() < 0.15
