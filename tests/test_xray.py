"""The page of tests/lessons/xray.py: its JavaScript against PyTorch (with node), and it itself in a browser."""

import json
import random
import re
import shutil
import subprocess

import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from lessons import xray
from torch import nn

from model import Config, Transformer
from sample import Sampling, probabilities_of, to_prompt
from tokenizer import GPT2_PATTERN, GPT4_PATTERN, WORDS_PATTERN, Tokenizer, render

node = pytest.mark.skipif(not shutil.which("node"), reason="the page's JavaScript is run with node")

# What a page's script says, from outside: the answers of the worker to some requests, as JSON.
DRIVER = """
const fs = require("fs"), page = fs.readFileSync(process.argv[2], "utf8");
const part = id => page.match(new RegExp(`<script[^>]*id="${id}"[^>]*>([^]*?)</script>`))[1];
const engine = part("engine").replace('"use strict";', "");
const data = JSON.parse(part("data")), {requests, texts, samplings} = JSON.parse(fs.readFileSync(process.argv[3], "utf8"));
eval(engine + `
  const plain = (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value;
  const model = new Model(data.config, data.angles, data.room, data.weights, part("weights"));
  const answers = [], answer = makeWorker(model, message => answers.push(message));
  const tokenizer = new Tokenizer(data.tokenizer);
  (async () => {
    for (const request of requests) await answer(request);
    const encoded = texts.map(text => tokenizer.encode(text));
    const drawn = samplings.map(([logits, sampling]) => probabilities(logits, sampling, new Set()));
    fs.writeFileSync(process.argv[4], JSON.stringify({answers, encoded, drawn}, plain));
  })();
`);
"""


def run_node(tmp_path, page, requests=(), texts=(), samplings=()):
    """What the page's own script answers."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "driver.js").write_text(DRIVER)
    asked = {"requests": list(requests), "texts": list(texts), "samplings": list(samplings)}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    names = [tmp_path / name for name in ("driver.js", "page.html", "asked.json", "answers.json")]
    done = subprocess.run(["node", *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(names[-1].read_text())


KINDS = {
    "tied": {},
    "untied": dict(tie_embeddings=False),
    "qwen2": dict(qkv_bias=True, n_head=6, n_kv_head=2),
    "qwen3": dict(qk_norm=True, head_dim=16, n_kv_head=1),
    "llama3": dict(
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
}


def make_model(tokenizer, **changes):
    """A tiny model whose every weight is drawn and is a float16 number."""
    shape = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=48, n_hidden=80, block_size=64)
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=tokenizer.vocab_size, **shape | changes))
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
        p.data = p.data.half().float()
    return model.eval()


@pytest.fixture(params=KINDS)
def folder(request, tmp_path, tokenizer):
    model = make_model(tokenizer, **KINDS[request.param])
    model.save(tmp_path / "model", tokenizer=tokenizer)
    return tmp_path / "model"


def close(ours, theirs, tolerance=1e-3):
    ours, theirs = torch.tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance), (ours - theirs).abs().max()


# --- looking inside ---


@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_values_are_the_output_of_every_attention(kind, tokenizer):
    """Grouped heads, biases and norms of q and k included; as without them the weights would be others."""
    model = make_model(tokenizer, **KINDS[kind])
    ids = torch.randint(model.config.vocab_size, (1, 20))
    outputs = torch.stack(xray.record(model, ids, [block.self_attn for block in model.model.layers]))
    weights, again = xray.attention_weights(model, ids)
    assert (outputs - again).abs().max() < 1e-4
    assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_sublayers_add_is_in_sum_the_logit(kind, tokenizer):
    model = make_model(tokenizer, **KINDS[kind])
    ids = torch.randint(model.config.vocab_size, (1, 20))
    tokens = torch.randint(model.config.vocab_size, (20, 3))
    with torch.no_grad():
        logits = model(ids)[0].gather(1, tokens)
    parts = xray.contributions(model, ids, tokens)
    assert parts.shape == (20, 3, 7)
    assert torch.allclose(parts.sum(-1), logits, atol=1e-4)


# --- the page's JavaScript ---


@node
def test_the_page_computes_what_pytorch_computes(folder, tmp_path):
    text = "the cat naïve 日 x12"
    model, tokenizer = Transformer.load(folder), Tokenizer.load(folder / "tokenizer.json")
    ids = to_prompt(tokenizer, text)
    expected = xray.analyse(model, torch.tensor([ids]))
    at, token = 4, expected["chosen"][4][2]
    request = dict(ids=ids, off=[], at=at, token=token, wantsLens=True)
    found = run_node(tmp_path, xray.make_page(folder, text), [request], [text])
    answers = {answer["kind"]: answer for answer in found["answers"]}
    assert found["encoded"] == [ids]
    reading, explained, lens = answers["reading"], answers["explained"], answers["lens"]["lens"]
    assert reading["ids"] == expected["ids"] and reading["ranks"] == expected["ranks"]
    close(reading["bits"], expected["bits"])
    close(reading["likeliest"]["p"], expected["likeliest"]["p"])
    close(reading["distances"], expected["distances"])
    with torch.no_grad():
        close(reading["last"], model(torch.tensor([ids]))[0, -1])
    weights, _ = xray.attention_weights(model, torch.tensor([ids]))
    close(reading["attention"], weights.flatten(1))
    close(lens["p"], expected["lens"]["p"])
    assert lens["ids"] == expected["lens"]["ids"]
    for name, shown in (("contributions", "contributions"), ("p", "p"), ("logit", "logits")):
        close(explained[name], expected[shown][at][2])
    close(explained["numbers"], expected["numbers"][at])
    close(explained["lengths"], expected["lengths"][at])


@node
def test_an_edit_is_read_from_its_place_on_and_off_parts_are_left_out(folder, tmp_path):
    model, tokenizer = Transformer.load(folder), Tokenizer.load(folder / "tokenizer.json")
    first, edited = (to_prompt(tokenizer, text) for text in ("the cat sat on", "the cat and the dog sat on the mat"))
    off = ["1.2", "0.mlp"]
    request = dict(at=3, token=None, wantsLens=False)
    requests = [dict(request, ids=first, off=[]), dict(request, ids=edited, off=[]), dict(request, ids=edited, off=off)]
    found = run_node(tmp_path, xray.make_page(folder, "the"), requests)
    _, whole, changed = [answer for answer in found["answers"] if answer["kind"] == "reading"]
    D = model.config.head_dim

    def without_head(module, args):
        return torch.cat((args[0][..., : 2 * D], torch.zeros_like(args[0][..., :D]), args[0][..., 3 * D :]), -1)

    with torch.no_grad():
        close(whole["last"], model(torch.tensor([edited]))[0, -1])
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(without_head)
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 0 * output)
        close(changed["last"], model(torch.tensor([edited]))[0, -1])
    assert changed["bitsOfWhole"] == whole["bits"] != changed["bits"]
    explained = [answer for answer in found["answers"] if answer["kind"] == "explained"]
    assert explained[1]["pOfWhole"] == explained[1]["p"] == explained[2]["pOfWhole"] != explained[2]["p"]
    assert explained[1]["token"] == edited[4]  # the text's own


@node
def test_sliders_give_the_distribution_that_sample_py_draws_from(tmp_path, tokenizer):
    make_model(tokenizer).save(tmp_path / "model", tokenizer=tokenizer)
    settings, expected = [], []
    for temperature, top_k, top_p in ((1, 0, 1), (0.7, 5, 1), (1.5, 0, 0.8), (0.3, 40, 0.5), (0, 0, 0.9)):
        logits = 3 * torch.randn(320)
        settings.append([logits.tolist(), dict(temperature=temperature, topK=top_k, topP=top_p)])
        expected.append(nn.functional.one_hot(logits.argmax(), 320).float())
        if temperature:
            expected[-1] = probabilities_of(logits[None], Sampling(temperature, top_k, top_p))[0]
    found = run_node(tmp_path, xray.make_page(tmp_path / "model", "the"), samplings=settings)
    close(found["drawn"], torch.stack(expected), 1e-5)


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = dict(
    words=WORDS_PATTERN,
    gpt2=GPT2_PATTERN,
    gpt4=GPT4_PATTERN,
    llama3=LLAMA3_PATTERN,
    cl100k=CL100K_PATTERN,
    o200k=O200K_PATTERN,
    nested=r"(?:(?:ab)++|[^\s]){1,3}+|\s",
)


def any_texts(n):
    """Texts of all sorts of characters: of all Unicode, of its first rows, and of what patterns look for."""
    draw = random.Random(0)
    signs = "  \n\r\t'\"sStTdDmMllveRE.,!aAbB09é日½ſK\u0301\u00a0\u2028\u3000\x00\x85\ufeff\ud800\udc00😀"
    texts = []
    for _ in range(n):
        pieces = []
        for _ in range(draw.randrange(30)):
            pieces.append(draw.choice((draw.choice(signs), chr(draw.randrange(0x250)), chr(draw.randrange(0x110000)))))
        texts.append("".join(pieces))
    return texts


@node
@pytest.mark.parametrize("name", PATTERNS)
def test_500_texts_of_any_unicode_have_the_same_ids(name, tmp_path):
    texts = any_texts(500)
    tokenizer = Tokenizer.train([WORDS * 3, *texts], 400, pattern=PATTERNS[name])
    make_model(tokenizer).save(tmp_path / "model", tokenizer=tokenizer)
    found = run_node(tmp_path, xray.make_page(tmp_path / "model", "the"), texts=texts)
    assert found["encoded"] == [tokenizer.encode(text) for text in texts]


@node
def test_steps_added_tokens_and_missing_bytes_give_the_same_ids(tmp_path, tokenizer):
    """As Qwen's (NFC, added tokens that are not special), SmolLM's (digits first), or with bytes left out."""
    document = json.loads(json.dumps(tokenizer.document))
    digits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    document["normalizer"] = {"type": "NFC"}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    for i, text in enumerate(("cat^", "cat", "<think>")):
        document["added_tokens"].append(dict(id=320 + i, content=text, **flags))
    del document["model"]["vocab"]["q"]
    changed = Tokenizer(document)
    make_model(changed).save(tmp_path / "model", tokenizer=changed)
    texts = [*any_texts(200), "cat^cat <think>1234 e\u0301q naïve <|im_end|>", "qqq", "", "a" * 5000]
    found = run_node(tmp_path, xray.make_page(tmp_path / "model", "the"), texts=texts)
    assert found["encoded"] == [changed.encode(text) for text in texts]
