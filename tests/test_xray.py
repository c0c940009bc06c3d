"""The page of tests/lessons/xray.py: its JavaScript against PyTorch, with node; it itself, in a browser."""

import copy
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import WORDS, run_main
from lessons import xray
from torch import nn

from model import PRESETS, Config, Transformer
from sample import Sampling, probabilities_of, to_prompt
from tokenizer import GPT2_PATTERN, GPT4_PATTERN, WORDS_PATTERN, Tokenizer, compile_splitter, render

node = pytest.mark.skipif(not shutil.which("node"), reason="the page's JavaScript is run with node")

# What a page's script says, from outside: the answers of the worker to some requests, as JSON.
DRIVER = """
const fs = require("fs"), page = fs.readFileSync(process.argv[2], "utf8");
const part = id => page.match(new RegExp(`<script[^>]*id="${id}"[^>]*>([^]*?)</script>`))[1];
const engine = part("engine").replace('"use strict";', "");
const data = JSON.parse(part("data"));
const {requests, at_once, texts, samplings, p} = JSON.parse(fs.readFileSync(process.argv[3], "utf8"));
eval(engine + `
  const plain = (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value;
  const model = new Model(data.config, data.angles, data.max_len, data.weights, part("weights"));
  const answers = [], answer = makeWorker(model, message => answers.push(message));
  const tokenizer = new Tokenizer(data.tokenizer);
  (async () => {
    const all = [];
    for (const request of requests) {
      all.push(answer(request));
      if (!at_once) await all.at(-1);
    }
    await Promise.all(all);
    let n = 0;
    Math.random = () => (n++ % 1000 + 0.5) / 1000;
    const counts = p.map(() => 0);
    for (let i = 0; i < 1000; i++) counts[p.length ? draw(p) : 0]++;
    const encoded = texts.map(text => tokenizer.encode(text));
    const distribution = ([logits, sampling, unused]) => probabilities(logits, sampling, new Set(unused));
    const drawn = samplings.map(distribution);
    fs.writeFileSync(process.argv[4], JSON.stringify({answers, encoded, drawn, counts}, plain));
  })();
`);
"""


def run_node(tmp_path, page, requests=(), texts=(), samplings=(), at_once=False, p=()):
    """What the page's own script answers and computes. at_once: no request waits for the one before it."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "driver.js").write_text(DRIVER)
    asked = dict(requests=requests, at_once=at_once, texts=texts, samplings=samplings, p=p)
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
    with torch.no_grad():
        for p in model.model.embed_tokens.parameters():
            p *= 1e-3  # so that the eps of the norm counts
        for block in model.model.layers:
            block.self_attn.o_proj.weight *= 1e-4
            block.mlp.down_proj.weight *= 1e-4
        logits = model(ids)[0].gather(1, tokens)
    assert torch.allclose(xray.contributions(model, ids, tokens).sum(-1), logits, rtol=1e-3)


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
    reading, explained, lens = answers["reading"], answers["explained"], answers["lens"]
    assert reading["ids"] == expected["ids"] and reading["ranks"] == expected["ranks"]
    close(reading["bits"], expected["bits"])
    for ours, theirs in zip(reading["likeliest"], expected["likeliest"], strict=True):
        assert ours["ids"] == theirs["ids"]
        close(ours["p"], theirs["p"])
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
    first, edited = (
        to_prompt(tokenizer, text) for text in ("the cat sat on", "the cat and the dog sat on the mat")
    )
    off = ["1.2", "0.mlp"]
    request = dict(at=3, token=None, wantsLens=False)
    requests = [
        dict(request, ids=first, off=[]),
        dict(request, ids=edited, off=[]),
        dict(request, ids=edited, off=off),
    ]
    found = run_node(tmp_path, xray.make_page(folder, "the"), requests)
    _, whole, changed = [answer for answer in found["answers"] if answer["kind"] == "reading"]
    D = model.config.head_dim

    def without_head(module, args):
        return torch.cat(
            (args[0][..., : 2 * D], torch.zeros_like(args[0][..., :D]), args[0][..., 3 * D :]), -1
        )

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
def test_every_answer_is_that_of_the_newest_text_and_switches(tmp_path, tokenizer):
    model = make_model(tokenizer)
    model.save(tmp_path / "model", tokenizer=tokenizer)
    page = xray.make_page(tmp_path / "model", "the")
    one, other = (
        to_prompt(tokenizer, text) for text in ("the cat sat on", "the cat and the dog sat on the mat and on")
    )
    assert len(other) > 8  # read in more than one piece
    request = dict(at=3, token=None, wantsLens=True)
    asked = [(one, []), (other, []), (other, ["0.mlp"]), (other, ["1.mlp"]), (one, ["1.mlp"]), (one, [])]
    requests = [dict(request, ids=ids, off=off) for ids, off in asked]
    answers = run_node(tmp_path, page, requests)["answers"]
    readings, lenses = ([a for a in answers if a["kind"] == kind] for kind in ("reading", "lens"))
    for (ids, off), reading, lens in zip(asked, readings, lenses, strict=True):
        changed = copy.deepcopy(model)
        for name in off:
            nn.init.zeros_(changed.model.layers[int(name[0])].mlp.down_proj.weight)
        expected = xray.analyse(changed, torch.tensor([ids]))
        assert reading["ids"] == lens["read"] == ids and lens["ids"] == expected["lens"]["ids"]
        close(lens["p"], expected["lens"]["p"])
        close(reading["bits"], expected["bits"])
    answers = run_node(tmp_path, page, requests, at_once=True)["answers"]
    assert [a["ids"] for a in answers if a["kind"] == "reading"] == [one]  # the last one, alone
    closed_meanwhile = [requests[0], dict(requests[1], wantsLens=False), requests[0]]
    answers = run_node(tmp_path, page, closed_meanwhile)["answers"]
    assert [a["read"] for a in answers if a["kind"] == "lens"] == [one, one]


@node
def test_weights_that_are_rounded_to_float16_change_little(tmp_path, tokenizer):
    """float16 keeps 11 bits of a weight: logits of a few units change in the third digit after the point."""
    model = make_model(tokenizer)
    for p in model.parameters():
        p.data += 1e-4 * torch.randn_like(p)
    model.save(tmp_path / "model", tokenizer=tokenizer)
    ids = to_prompt(tokenizer, "the cat sat on the mat")
    request = dict(ids=ids, off=[], at=0, token=None, wantsLens=False)
    answers = run_node(tmp_path, xray.make_page(tmp_path / "model", "the"), [request])["answers"]
    (reading,) = [answer for answer in answers if answer["kind"] == "reading"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    error = (torch.tensor(reading["last"]) - logits).abs().max()
    assert 1e-5 < error < 0.02 * logits.std()


@node
def test_a_token_is_drawn_as_often_as_it_is_probable(tmp_path, page_of_model):
    found = run_node(tmp_path, page_of_model, p=[0.2, 0, 0.5, 0.3, 0])
    assert found["counts"] == [200, 0, 500, 300, 0]


@node
def test_sliders_give_the_distribution_that_sample_py_draws_from(tmp_path, page_of_model):
    settings, expected = [], []
    for temperature, top_k, top_p in ((1, 0, 1), (0.7, 5, 1), (1.5, 0, 0.8), (0.3, 40, 0.5), (0, 0, 0.9)):
        logits = 3 * torch.randn(320)
        logits[7:10] = logits.topk(5).values[-1]  # equal to the fifth: top-k keeps them all
        settings.append([logits.tolist(), dict(temperature=temperature, topK=top_k, topP=top_p), [0, 3]])
        logits[[0, 3]] = -torch.inf  # unused
        expected.append(nn.functional.one_hot(logits.argmax(), 320).float())
        if temperature:
            expected[-1] = probabilities_of(logits[None], Sampling(temperature, top_k, top_p))[0]
    found = run_node(tmp_path, page_of_model, samplings=settings)
    close(found["drawn"], torch.stack(expected), 1e-5)


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
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
            pieces.append(
                draw.choice((draw.choice(signs), chr(draw.randrange(0x250)), chr(draw.randrange(0x110000))))
            )
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
@pytest.mark.parametrize("kind", ["whole", "removed", "newer"])
def test_odd_tokenizers_give_the_same_ids(kind, tmp_path):
    """Chunks that are tokens without a merge; text between matches that is dropped; digits that tiktoken does
    not know, which is older than the library regex.
    """
    new_digits = "\U00011de0\U00011de1"
    document = Tokenizer.train([WORDS * 3, new_digits * 99], 320).document
    steps = document["pre_tokenizer"]["pretokenizers"]
    if kind == "whole":
        document["model"]["ignore_merges"] = True
        document["model"]["vocab"]["zxy"] = 400
    elif kind == "removed":
        steps[0] = dict(type="Split", pattern={"Regex": r"\p{L}+|\s"}, behavior="Removed", invert=True)
    else:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    changed = Tokenizer(document)
    make_model(changed).save(tmp_path / "model", tokenizer=changed)
    texts = [*any_texts(100), "zxy zxya", "the cat, the dog 12 on.", f"a{new_digits}"]
    found = run_node(tmp_path, xray.make_page(tmp_path / "model", "the"), texts=texts)
    assert found["encoded"] == [changed.encode(text) for text in texts]


NO_FORM = [
    r"\w+\b|[\s\S]",
    r"(?>\p{L}+)|[\s\S]",
    r"(?-i:ab)+|[\s\S]",
    r"\p{N}{,3}a|[\s\S]",
    r"\p{L}(?<=a)|[\s\S]",
]


@pytest.mark.parametrize("pattern", NO_FORM)
def test_a_pattern_that_has_no_form_in_javascript_is_refused_by_name(pattern):
    compile_splitter(pattern)  # it is usable in Python
    with pytest.raises(ValueError, match="has no form in JavaScript") as raised:
        xray.javascript_pattern(pattern, by_tiktoken=True)
    assert pattern in str(raised.value)


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
    document["model"]["vocab"]["zx"] = 330  # made by no merge: it never comes out of a text
    changed = Tokenizer(document)
    make_model(changed).save(tmp_path / "model", tokenizer=changed)
    texts = [*any_texts(200), "zxzx", "cat^cat <think>1234 e\u0301q naïve <|im_end|>", "qqq", "", "a" * 5000]
    found = run_node(tmp_path, xray.make_page(tmp_path / "model", "the"), texts=texts)
    assert found["encoded"] == [changed.encode(text) for text in texts]


# --- the page in a browser ---


@pytest.fixture(scope="module")
def browser():
    """Chromium, of the system or of `playwright install chromium`."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="drives the browser: pip install playwright"
    )
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as driver:
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no browser: install Debian's package chromium, or run `playwright install chromium`")
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def until(page, expression, arg=None):
    """Wait for something; playwright's own way needs what the page's security policy forbids."""
    for _ in range(250):
        if page.evaluate(expression, arg):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"{expression} does not come true")


HTML = "<b>bold</b> <script>alert(1)</script> <img src=x onerror=alert(1)> &amp; </script>"
SHOWN = "document.querySelector('#distribution').textContent"


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page; at the end it must have said nothing on the console and asked for nothing elsewhere."""
    said, asked, pages = [], [], []

    def open_page(content, fragment="", width=1440):
        path = tmp_path / "x-ray of a model.html"
        path.write_text(content, encoding="utf-8")
        pages.append(browser.new_page(viewport={"width": width, "height": 900}))
        pages[-1].on("console", lambda message: said.append(message.text))
        pages[-1].on("pageerror", lambda error: said.append(str(error)))
        pages[-1].on("dialog", lambda dialog: said.append(dialog.message))
        pages[-1].on("request", lambda request: asked.append(request.url))
        pages[-1].goto(path.as_uri() + fragment)
        pages[-1].wait_for_selector("#expected .row")
        return pages[-1]

    yield open_page
    for page in pages:
        page.wait_for_timeout(50)
        page.close()
    assert not said
    assert asked and all(url.startswith(("file:", "blob:")) for url in asked)


@pytest.fixture(scope="module")
def page_of_model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("xray") / "tiny"
    make_model(tokenizer).save(folder, tokenizer=tokenizer)
    return xray.make_page(folder, "the cat sat")


def tokens_shown(page):
    """What the strip of tokens shows, without the place for the next one."""
    return page.locator("#strip .token:not(.next)").all_text_contents()


def test_typing_changes_the_tokens_and_html_is_shown_as_text(opened, page_of_model, tokenizer):
    page = opened(page_of_model)
    assert "".join(tokens_shown(page)) == "the cat sat"
    for text in (HTML, "naïve 日本語\n", "the dog"):
        page.fill("#input", text[:60])
        until(
            page,
            "n => document.querySelectorAll('#strip .token').length === n + 1",
            arg=len(tokenizer.encode(text[:60])),
        )
    page.fill("#input", HTML)
    until(page, "document.querySelectorAll('#strip .token').length === 65")
    assert f"Only the first 64 of its {len(tokenizer.encode(HTML))} tokens" in page.text_content("#notes")
    assert HTML.startswith("".join(tokens_shown(page)).replace("↵", ""))
    assert page.locator("#strip b, #strip img, .lens b, .arcs img").count() == 0


def test_a_prompt_that_looks_like_html_stays_text_within_the_data(opened, tmp_path, tokenizer):
    make_model(tokenizer, block_size=256).save(tmp_path / "model", tokenizer=tokenizer)
    page = opened(xray.make_page(tmp_path / "model", HTML))
    assert "".join(tokens_shown(page)) == HTML == page.input_value("#input")
    assert page.locator("#strip b, #strip img").count() == 0


def test_sliders_redraw_the_distribution_and_a_drawn_token_is_written(opened, page_of_model):
    page = opened(page_of_model)
    before = page.evaluate(SHOWN)
    page.locator("#sliders input").nth(0).fill("2")
    assert page.evaluate(SHOWN) != before
    page.locator("#sliders input").nth(1).fill("3")
    assert page.locator("#distribution .row.cut").count() == 9
    assert "3 of 302" in page.text_content("#kept")
    page.locator("#sliders input").nth(0).fill("0")
    likeliest = page.text_content("#distribution .row >> nth=0").replace("␣", " ").replace("↵", "↵\n")
    page.click("#step")
    page.wait_for_selector("#distribution .row.drawn")
    page.wait_for_selector("#strip .written")
    assert likeliest.startswith(page.text_content("#strip .written"))
    page.click("#step")
    page.wait_for_selector("#distribution .row.drawn")
    page.click("#clear")  # before it is written
    assert page.locator("#distribution .row.drawn").count() == 0
    page.locator("#sliders input").nth(0).fill("1.5")
    page.click("#play")
    until(page, "document.querySelectorAll('#strip .written').length > 3")
    page.click("#play")
    page.wait_for_timeout(300)
    count = page.locator("#strip .written").count()
    page.wait_for_timeout(400)
    assert page.locator("#strip .written").count() == count  # it has stopped
    until(
        page,
        "n => new URLSearchParams(location.hash.slice(1)).get('written')?.split(' ').length === n",
        count,
    )
    page.reload()
    page.wait_for_selector("#expected .row")
    assert page.locator("#strip .written").count() == count  # the address holds it
    page.click("#clear")
    until(page, "document.querySelectorAll('#strip .written').length === 0")


def test_switching_a_head_off_changes_the_logits(opened, page_of_model):
    page = opened(page_of_model)
    effect, shown = page.text_content("#effect"), page.evaluate(SHOWN)
    page.click('[data-switch="1.2"]')
    until(page, "before => document.querySelector('#distribution').textContent !== before", shown)
    assert "without what is switched off" in page.text_content("#effect") != effect
    page.click("text=Switch all on")
    until(page, "before => document.querySelector('#distribution').textContent === before", shown)
    assert page.text_content("#effect") == effect


def test_a_place_is_chosen_with_the_mouse_and_with_the_keys(opened, page_of_model):
    page = opened(page_of_model)
    expected = page.text_content("#expected")
    page.locator("#strip .token").nth(2).click()
    until(page, "before => document.querySelector('#expected').textContent !== before", expected)
    assert page.locator("#strip .chosen").get_attribute("data-place") == "2"
    until(page, "location.hash.includes('place=2')")
    page.keyboard.press("ArrowLeft")
    until(page, "location.hash.includes('place=1')")
    page.locator(".maps button").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    until(page, "location.hash.includes('layer=1&head=1')")
    assert page.evaluate("document.activeElement.dataset.head") == "1.1"
    page.locator("#expected .row").nth(3).click()
    until(page, "document.querySelectorAll('#expected .row')[3].classList.contains('picked')")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    page.locator(".about button").nth(0).click()
    assert "def forward(self, ids, cache=None)" in page.text_content("#source")
    page.keyboard.press("Escape")
    assert not page.locator("#source").is_visible()


def test_two_switches_in_a_row_count_both_and_the_focus_stays(opened, page_of_model):
    page = opened(page_of_model)
    page.evaluate("for (const n of ['0.1', '0.2']) document.querySelector(`[data-switch='${n}']`).click()")
    until(page, "location.hash.includes('off=0.1+0.2')")
    assert page.text_content("#notes") == "Switched off in panel 5: head 1 of block 0, head 2 of block 0."
    page.focus('[data-switch="1.mlp"]')
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#effect').textContent.includes('without')")
    until(page, "location.hash.includes('off=0.1+0.2+1.mlp')")
    assert page.evaluate("document.activeElement.dataset.switch") == "1.mlp"
    page.click("#blocks summary")  # what is off is off only while its panel is open
    until(page, "document.querySelector('#notes').textContent === ''")


def test_a_click_in_the_arcs_chooses_what_was_clicked(opened, page_of_model):
    page = opened(page_of_model)
    for _ in range(2):
        page.locator(".arcs .token").nth(1).click()
        assert page.locator("#strip .chosen").get_attribute("data-place") == "2"
        chosen = (
            "[...document.querySelectorAll('.arcs .token')].findIndex(e => e.classList.contains('chosen'))"
        )
        assert page.evaluate(chosen) == 1


def test_an_edit_that_changes_no_token_moves_the_marks(opened, page_of_model):
    page = opened(page_of_model, "#mode=chat")
    page.locator("#strip .token").nth(3).click()
    page.type("#input", " ")  # a chat turn is trimmed
    assert page.locator("#strip .chosen").text_content() == "next"
    until(page, "document.querySelector('.lens .chosen:last-child') !== null")


def test_a_step_waits_until_the_text_is_read(opened, page_of_model):
    page = opened(page_of_model)
    page.evaluate("const at_once = ask; ask = request => setTimeout(at_once, 500, request)")  # a slow model
    page.fill("#input", "the dog")
    page.click("#step")
    assert page.locator("#distribution .drawn").count() == 0
    until(page, "document.querySelectorAll('#strip .written').length === 1")


def test_play_ends_with_the_text_and_with_the_page(opened, page_of_model):
    page = opened(page_of_model)
    page.evaluate("data.ends.push(...Array(config.vocab_size).keys())")  # every token is an end
    page.click("#play")
    until(page, "document.querySelector('#note').textContent.startsWith('The model has ended the text')")
    assert page.text_content("#play") == "Play" and page.locator("#strip .written").count() == 1
    page.evaluate("data.ends.length = 0; data.max_len = ids.length + 2")
    page.click("#play")
    until(page, "document.querySelector('#note').textContent.startsWith('The page is full')")
    assert page.locator("#strip .written").count() == 3


def test_the_words_of_the_page_are_what_was_computed(opened, tmp_path, tokenizer):
    model = make_model(tokenizer)
    model.save(tmp_path / "model", tokenizer=tokenizer)
    ids = tokenizer.encode("the cat ☃")
    found = xray.analyse(model, torch.tensor([ids]))
    lens = torch.tensor(found["lens"]["ids"])
    place = 1 + (lens[2] == lens[3]).nonzero()[0].item()  # where the answer is there before the last block
    page = opened(xray.make_page(tmp_path / "model", "the cat ☃"), f"#place={place}")
    page.wait_for_selector(".lens td")
    assert f"{sum(found['bits']) / (len(ids) - 1):.2f} bits of surprise" in page.text_content("#summary")
    assert tokens_shown(page)[-2:] == ["\\x98", "\\x83"]  # the bytes of a character
    column = lens[:, place - 1].tolist()
    since = next(i for i in range(len(column)) if set(column[i:]) == {column[-1]})
    assert page.text_content("#when").endswith(
        f"from block {since - 1} on." if since else "the embedding on."
    )
    weights, _ = xray.attention_weights(model, torch.tensor([ids]))
    shares = [f"{100 * share:.0f} %" for share in weights[:, :, 1:, 0].mean(-1).T.flatten()]
    assert page.locator(".maps button small").all_text_contents() == shares
    rank = f"number {found['ranks'][place]} of the model's {tokenizer.vocab_size} guesses"
    assert f"{rank} ({found['bits'][place]:.1f} bits)" in page.text_content("#expected")


def test_tokens_that_the_model_does_not_know_are_left_out_aloud(opened, tmp_path, tokenizer):
    """A folder whose tokenizer has more tokens than the model has rows."""
    make_model(tokenizer).save(tmp_path / "model", tokenizer=tokenizer)
    larger = Tokenizer.train([WORDS * 3, "xylophone " * 9], 330)
    larger.save_pretrained(tmp_path / "model")
    page = opened(xray.make_page(tmp_path / "model", "the"))
    text = larger.decode([i for i in larger.tokens if 280 < i < larger.vocab_size - 3])
    with pytest.raises(ValueError, match="the prompt has the id 306, but the model 302 rows"):
        xray.make_page(tmp_path / "model", text)
    known = [i for i in larger.encode(text) if i < tokenizer.vocab_size]
    page.fill("#input", text)
    until(page, "n => document.querySelectorAll('#strip .token').length === n + 1", len(known))
    assert f"{len(larger.encode(text)) - len(known)} tokens are unknown" in page.text_content("#notes")


def test_what_was_drawn_for_one_text_is_not_written_behind_another(opened, page_of_model):
    page = opened(page_of_model)
    page.click("#step")
    page.evaluate("location.hash = '#text=the'")
    until(page, "document.querySelector('#strip').textContent === 'thenext'")
    page.wait_for_timeout(600)
    assert page.locator("#strip .written").count() == page.locator("#distribution .drawn").count() == 0


def test_the_coldest_temperature_shows_the_same_tokens(opened, page_of_model):
    names = "[...document.querySelectorAll('#distribution .row :first-child')].map(e => e.textContent)"
    shares = "[...document.querySelectorAll('#distribution .row > :last-child')].map(e => e.textContent)"
    page = opened(page_of_model)
    before = page.evaluate(names)
    page.locator("#sliders input").nth(0).fill("0")
    assert page.evaluate(names) == before and page.evaluate(shares) == ["1.00"] + ["0"] * 11


def test_a_model_that_fails_says_so(browser, page_of_model, tmp_path):
    (tmp_path / "page.html").write_text(page_of_model, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("#expected .row")
    page.evaluate("ask({ids: null, off: []})")
    until(page, "document.querySelector('#notes').textContent.includes('The model failed: ')")
    page.close()


def test_what_is_closed_is_not_computed(opened, page_of_model):
    page = opened(page_of_model, "#open=")
    page.wait_for_timeout(300)
    assert page.locator(".lens td").count() == page.locator(".maps canvas").count() == 0
    page.click("#lens summary")
    page.wait_for_selector(".lens td")
    page.click("#attention summary")
    page.wait_for_selector(".maps canvas")
    assert page.locator(".maps canvas").count() == 12
    until(page, "location.hash.includes('open=lens+attention')")


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_on_the_path_are_all_weights(kind, opened, tmp_path, tokenizer):
    model = make_model(tokenizer, **KINDS[kind])
    model.save(tmp_path / "model", tokenizer=tokenizer)
    page = opened(xray.make_page(tmp_path / "model", "the"), "#open=path&layer=1")
    counts = page.locator(".path td:nth-child(3)").all_text_contents()
    assert sum(int(text.replace(",", "") or 0) for text in counts) == model.config.num_params()


@pytest.mark.parametrize(
    "fragment",
    [
        "#place=-3&layer=9&head=x&temperature=1e9&off=7.9+x&written=5+99999+x&mode=y",
        "#text=%ff%00&token=abc&topK=-4&open=zzz&place=999999",
        "#%%%",
        "#toString=1&__proto__=2",
        "#mode=toString&off=0.9+length.mlp+0.mlp.1",
    ],
)
def test_an_address_that_makes_no_sense_does_no_harm(fragment, opened, page_of_model):
    page = opened(page_of_model, fragment)
    assert page.locator("#distribution .row").count() == 12


def test_a_large_model_is_shown_without_living_in_the_page(opened, tmp_path, tokenizer, monkeypatch):
    make_model(tokenizer).save(tmp_path / "model", tokenizer=tokenizer)
    everything = "#open=lens+attention+blocks+path&place=2"
    elsewhere = "&text=other&mode=chat&written=5+6&off=0.1"  # of no use where nothing can be computed
    live = opened(xray.make_page(tmp_path / "model", "the cat sat"), everything)
    live.wait_for_selector(".lens td")
    monkeypatch.setattr(xray, "MAX_PARAMS", 1000)
    content = xray.make_page(tmp_path / "model", "the cat sat")
    assert 'id="weights"></script>' in content
    page = opened(content, everything + elsewhere)
    assert page.input_value("#input") == "the cat sat" and page.text_content("#notes") == ""
    for panel in (
        "#strip",
        "#expected",
        "#distribution",
        ".lens",
        "#when",
        ".maps",
        "#looks",
        "#effect",
        ".path",
    ):
        assert page.text_content(panel) == live.text_content(panel), panel
    assert "too large for a page" in page.text_content("#facts")
    assert (
        not page.locator("#step").is_visible()
        and page.locator("#input").get_attribute("readonly") is not None
    )


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_is_not_wider_than_the_screen(width, opened, page_of_model):
    page = opened(page_of_model, "#open=lens+attention+blocks+path", width)
    page.wait_for_selector(".lens td")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_chat_model_gets_a_question_and_answers_it(opened, tmp_path, tokenizer):
    model = make_model(tokenizer)
    ends = [tokenizer.special_tokens["<|im_end|>"]]
    model.save(tmp_path / "model", tokenizer=tokenizer, end_ids=ends)
    page = opened(xray.make_page(tmp_path / "model", " the cat "))
    ids, _ = render(tokenizer, [{"role": "user", "content": "the cat"}], add_generation_prompt=True)
    assert [text.replace("↵\n", "\n") for text in tokens_shown(page)] == [tokenizer.decode([i]) for i in ids]
    page.click("text=A text")
    until(page, "document.querySelectorAll('#strip .special').length === 0")
    assert "".join(tokens_shown(page)) == " the cat "


# --- the command ---


def test_nanos_page_is_below_8_mb(tmp_path, tokenizer):
    shape = PRESETS["nano"] | dict(vocab_size=4096)
    Transformer(Config(**shape)).save(tmp_path / "model", tokenizer=tokenizer)
    assert len(xray.make_page(tmp_path / "model", "the").encode()) < 8 * 2**20


def test_without_a_prompt_the_page_begins_with_a_question_or_the_models_own_text(tmp_path, tokenizer):
    model = make_model(tokenizer)
    model.save(tmp_path / "base", tokenizer=tokenizer)
    model.save(tmp_path / "chat", tokenizer=tokenizer, end_ids=[tokenizer.special_tokens["<|im_end|>"]])
    for name in ("base", "chat"):
        data = re.search(r'id="data">(.*?)</script>', xray.make_page(tmp_path / name))[1]
        assert json.loads(data)["mode"] == {"base": "text", "chat": "chat"}[name]
    (tmp_path / "chat" / "results.json").write_text('{"questions": {"count": "how many?"}}')
    data = re.search(r'id="data">(.*?)</script>', xray.make_page(tmp_path / "chat"))[1]
    assert json.loads(data)["prompt"] == "how many?"
    (tmp_path / "chat" / "results.json").write_text(json.dumps({"questions": {"count": "how many? " * 50}}))
    xray.make_page(tmp_path / "chat")  # a question that does not fit is not asked
    (tmp_path / "chat" / "results.json").write_text('{"questions": {"count": 5}}')  # another program's
    xray.make_page(tmp_path / "chat")
    make_model(tokenizer, block_size=16).save(tmp_path / "short", tokenizer=tokenizer)
    xray.make_page(tmp_path / "short")


def test_mistakes_are_one_clear_line(tmp_path, tokenizer):
    def run(*options):
        return run_main(xray.main, "xray.py", "--out", tmp_path / "page.html", *options)

    with pytest.raises(ValueError, match="there is no folder nowhere"):
        run("--model", "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be opened"):
        run("--model", tmp_path / "empty")
    model = make_model(tokenizer)
    model.save(tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the prompt has 200 tokens, but this model's page reads 64 at most"):
        run("--model", tmp_path / "model", "--prompt", "é" * 200)
    with pytest.raises(ValueError, match="must be a file in a folder that is there"):
        run("--model", tmp_path / "model", "--out", tmp_path / "nowhere" / "page.html")
    assert not (tmp_path / "page.html").exists()
    assert "page.html: " in run("--model", tmp_path / "model", "--prompt", "the \ud800 \0 \r\n")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    model.save(tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="1000000 is too large for float16"):
        run("--model", tmp_path / "model", "--prompt", "the")
    odd = Tokenizer.train([WORDS], 300, pattern=r"\w+\b|[\s\S]")
    make_model(odd).save(tmp_path / "odd", tokenizer=odd)
    with pytest.raises(
        ValueError, match="split pattern .* has no form in JavaScript: .* it is not known here"
    ):
        run("--model", tmp_path / "odd", "--prompt", "the")
