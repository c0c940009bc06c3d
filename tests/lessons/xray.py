"""One HTML file in which a model lives: type, and see it think. It needs no network.

python tests/lessons/xray.py [--model DIR] [--prompt TEXT] [--out xray.html]

The page, xray.html beside this file, computes the forward pass and the tokens by itself, in plain JavaScript.
This file computes the same with PyTorch, for the tests and for models too large for a page, and puts a model
into the page.
"""

import argparse
import base64
import inspect
import json
import math
import sys
import textwrap
from contextlib import suppress
from functools import cache
from pathlib import Path

import regex
import tiktoken
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

import model as model_file  # noqa: E402
import sample  # noqa: E402
from lessons import index  # noqa: E402
from model import Transformer, apply_rope, rope  # noqa: E402
from tokenizer import BYTES, CHAT_TOKENS, Tokenizer, read_patterns, render, steps_of  # noqa: E402

MAX_PARAMS = 30_000_000  # of a model that lives in its page
MAX_TOKENS = 256  # of the text on a page

# --- looking inside a model; ids are (1, T) ---


@torch.no_grad()
def record(model, ids, modules):
    """What each of these modules returns while the model reads ids, without the dimension of the batch."""
    found = {}
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_hook(lambda m, args, output: found.update({m: output[0]})))
    model(ids)
    for hook in hooks:
        hook.remove()
    return [found[module] for module in modules]


def streams(model, ids):
    """The stream (T, C) before the first block and after each: a list of L + 1."""
    return record(model, ids, [model.model.embed_tokens, *model.model.layers])


@torch.no_grad()
def logit_lens(model, ids):
    """Yield the logits (T, V) that head(norm(x)) gives for each of `streams` (nostalgebraist, 2020)."""
    for x in streams(model, ids):
        yield model.head(model.model.norm(x))


def cosine_distances(model, ids):
    """1 - cos(before, after) of each block at each position, (L, T) (Men et al., 2024)."""
    x = torch.stack(streams(model, ids))
    return 1 - F.cosine_similarity(x[:-1], x[1:], dim=-1)


@torch.no_grad()
def attention_weights(model, ids):
    """The weights (L, H, T, T) of all layers, computed again, and the outputs (L, T, C) that they give."""
    config, T = model.config, ids.size(1)
    cos, sin = rope(torch.arange(T), config, torch.float32)
    unseen = torch.ones(T, T, dtype=torch.bool).triu(1)
    attentions = [block.self_attn for block in model.model.layers]
    modules = [part for a in attentions for part in (a.q_norm, a.k_norm, a.v_proj)]
    found = record(model, ids, modules)
    group = config.n_head // config.n_kv_head  # query heads that share a head of keys and values
    all_weights, outputs = [], []
    for i, attention in enumerate(attentions):
        q, k, v = found[3 * i : 3 * i + 3]  # (T, H, D), (T, K, D), (T, K * D)
        q, k = apply_rope(q.transpose(0, 1), cos, sin), apply_rope(k.transpose(0, 1), cos, sin)
        v = v.view(T, -1, config.head_dim).transpose(0, 1)  # (K, T, D)
        k = k.repeat_interleave(group, dim=0)  # (H, T, D)
        v = v.repeat_interleave(group, dim=0)
        scores = q @ k.mT / math.sqrt(config.head_dim)  # (H, T, T)
        weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
        all_weights.append(weights)
        outputs.append(attention.o_proj((weights @ v).transpose(0, 1).reshape(T, -1)))
    return torch.stack(all_weights), torch.stack(outputs)


def additions(model, ids):
    """What the embedding and each sublayer add to the stream, (T, 1 + 2L, C)."""
    modules = [model.model.embed_tokens]
    for block in model.model.layers:
        modules += [block.self_attn, block.mlp]
    return torch.stack(record(model, ids, modules), 1)


@torch.no_grad()
def contributions(model, ids, tokens):
    """What the embedding and each sublayer add to the logits of `tokens` (T, n): (T, n, 1 + 2L).

    Direct logit attribution (Elhage et al., 2021). Their sum is the logit: the divisor of the final RMSNorm
    depends on the whole stream and is held fixed.
    """
    parts, norm = additions(model, ids), model.model.norm
    scale = (parts.sum(1).square().mean(-1) + model.config.norm_eps).rsqrt()
    rows = (model.lm_head or model.model.embed_tokens).weight[tokens]  # (T, n, C)
    return torch.einsum("tpc,c,t,tnc->tnp", parts, norm.weight, scale, rows)


@torch.no_grad()
def analyse(model, ids):
    """Everything that the page shows of a text; the keys are the names in xray.html."""
    (logits,) = model(ids)
    log_p = logits.log_softmax(-1)
    p, likeliest = log_p.exp().topk(10)  # (T, 10)
    targets = ids[0, 1:]
    log_p_of_targets = log_p[:-1].gather(1, targets[:, None])
    guesses = [logits.softmax(-1).max(-1) for logits in logit_lens(model, ids)]
    weights, _ = attention_weights(model, ids)
    x = additions(model, ids).cumsum(1)  # (T, 1 + 2L, C)
    x = torch.cat((x, model.model.norm(x[:, -1:])), 1)
    # the tokens that can be chosen: the likeliest, and the one that comes next in the text
    next_ids = torch.cat((targets, likeliest[-1:, 0]))  # nothing comes after the last: its likeliest again
    chosen = torch.cat((likeliest, next_ids[:, None]), 1)  # (T, 11)
    return {
        "ids": ids[0].tolist(),
        "bits": [0, *rounded(-log_p_of_targets[:, 0] / math.log(2))],  # nothing predicts the first token
        "ranks": [0, *(1 + (log_p[:-1] > log_p_of_targets).sum(-1)).tolist()],
        "likeliest": [{"ids": top, "p": p_of_top} for top, p_of_top in zip(likeliest.tolist(), rounded(p))],
        "last": to_base64(logits[-1]),
        "distances": rounded(cosine_distances(model, ids)),
        "attention": [to_base64(layer) for layer in weights],
        "lens": {
            "ids": [guess.indices.tolist() for guess in guesses],
            "p": [rounded(guess.values) for guess in guesses],
        },
        "chosen": chosen.tolist(),
        "logits": rounded(logits.gather(1, chosen)),
        "p": rounded(log_p.gather(1, chosen).exp()),
        "contributions": rounded(contributions(model, ids, chosen)),
        "numbers": rounded(x[..., :4]),
        "lengths": rounded(x.norm(dim=-1)),
    }


def rounded(x):
    """A tensor as a list, with four digits."""
    return [rounded(row) if row.ndim else float(f"{row:.4g}") for row in x]


def to_base64(x):
    """A tensor as float16, least byte first, in base64. ValueError: a number is too large for float16."""
    half = x.detach().half()
    if not half.isfinite().all():
        raise ValueError(f"{x.abs().max():.0f} is too large for float16, as which the page holds numbers")
    return base64.b64encode(half.numpy().astype("<f2").tobytes()).decode()


# --- the tokenizer in JavaScript's words ---

EVERY_CHARACTER = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
ATOM = r"""
    \[ \^? \]? (?: \\. | [^\]\\] )* \]  # a set
    | \\[pP] (?: \w | \{\^?\w+\} )      # \p{L}, \pL
    | \\x.. | \\u.... | \\[sSdDwWrntfv] | \\\W
    | [^\\()|?*+{}$]                    # a character that stands for itself
"""
PART = regex.compile(
    rf"""
    (?P<open> \(\? (?: [:=!] | i: ) )
    | (?P<close> \) )
    | (?P<or> \| )
    | (?P<end> \$ )
    | (?P<quantifier> (?: [?*+] | \{{ \d+ (?: ,\d* )? \}} ) (?P<kind> [?+]? ) )
    | (?P<atom> {ATOM} )
    """,
    regex.DOTALL | regex.VERBOSE,
)


@cache
def spell_out(atom, by_tiktoken):
    """Write a one-character part of a pattern as a set that lists every character it matches.

    Every engine has its own version of Unicode, so the one is asked that cuts texts in Python: tiktoken's for
    the last step of a tokenizer, the library `regex` for those before it. ValueError: there is no character.
    """
    if by_tiktoken:
        ranks = {byte: i for i, byte in enumerate(BYTES)}
        encoding = tiktoken.Encoding("", pat_str=atom, mergeable_ranks=ranks, special_tokens={})
        found = bytes(encoding.encode(EVERY_CHARACTER, disallowed_special=())).decode()  # matches alone
    else:
        found = "".join(regex.findall(atom, EVERY_CHARACTER))
    ranges = []
    for code in map(ord, found):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    if not ranges:
        raise ValueError("it stands for no character")
    return "[" + "".join(rf"\u{{{first:x}}}-\u{{{last:x}}}" for first, last in ranges) + "]"


def javascript_pattern(pattern, by_tiktoken):
    r"""A split pattern for JavaScript's flag "u". ValueError: a part of it cannot be written so.

    Classes such as \p{L} and \s are spelled out, letters under (?i:...) in both cases. A possessive X++
    becomes (?=(?<a>X+))\k<a>, since JavaScript never backtracks into a lookahead. One difference stays: in
    JavaScript, a round of a repeated group that matches nothing does not count.
    """
    out = []
    opened = []  # for each open group: where it begins in `out`, and whether case is ignored
    last = 0  # where the last complete part begins, to which a quantifier belongs
    position = 0
    while position < len(pattern):
        part = PART.match(pattern, position)
        text = pattern[position:] if part is None else part.group()
        ignore_case = bool(opened and opened[-1][1])
        try:
            if part is None:
                raise ValueError("it is not known here")
            if part["open"]:
                opened.append((len(out), ignore_case or text == "(?i:"))
                out.append(text.replace("?i:", "?:"))
            elif part["close"]:
                last, _ = opened.pop()
                out.append(text)
            elif part["quantifier"] and part["kind"] == "+":
                name = f"a{position}"
                whole = "".join(out[last:]) + text[:-1]
                out[last:] = [rf"(?:(?=(?<{name}>{whole}))\k<{name}>)"]
            elif part["atom"]:
                last = len(out)
                out.append(spell_out(f"(?i:{text})" if ignore_case else text, by_tiktoken))
            else:
                out.append(text)
        except ValueError as error:
            why = f"{text!r}: {error}"
            raise ValueError(f"the split pattern {pattern} has no form in JavaScript: {why}") from None
        position = part.end()
    return "".join(out)


def tokenizer_data(tokenizer, live):
    """What the page needs of a tokenizer; each token as a string with one character per byte."""
    data = {
        "tokens": [[i, token.decode("latin-1")] for i, token in tokenizer.tokens.items()],
        "special": sorted(tokenizer.special_tokens.values()),
    }
    if not live:
        return data
    ranks = zip(tokenizer.ranks, tokenizer._id_of_rank.tolist())
    data["ranks"] = [[token.decode("latin-1"), i] for token, i in ranks]
    data["literals"] = tokenizer._literals
    data["nfc"] = bool(steps_of(tokenizer.document.get("normalizer"), "normalizers"))
    *steps, (last, keep_rest) = read_patterns(tokenizer.document["pre_tokenizer"])
    data["patterns"] = [[javascript_pattern(step, by_tiktoken=False), keeps] for step, keeps in steps]
    data["patterns"].append([javascript_pattern(last, by_tiktoken=True), keep_rest])
    return data


# --- the page ---

# what each panel is about: a function and a lesson
PANELS = {
    "text": ("model.py", "Transformer.forward", "training", "cross_entropy_is_minus_log_probability"),
    "next": ("sample.py", "probabilities_of", "decoding", "top_k_keeps_a_fixed_number_and_top_p_adapts"),
    "lens": ("model.py", "Transformer.head", "inspection", "logit_lens"),
    "attention": ("model.py", "Attention.forward", "inspection", "attention_weights"),
    "blocks": ("model.py", "Block.forward", "inspection", "cosine_distance"),
    "path": ("model.py", "Transformer.hidden", "memory", "number_of_parameters_follows"),
}


def panel_texts(file, function, topic, part_of_name):
    """The source of a function, and a lesson, for a panel."""
    (lesson,) = [lesson for lesson in index.lessons(topic) if part_of_name in lesson.name]
    part = model_file if file == "model.py" else sample
    for word in function.split("."):
        part = getattr(part, word)
    paragraphs = [index.claim(lesson.name), lesson.answer]
    if "Often told" in lesson.fields:
        paragraphs.append(f"Often told: {lesson.fields['Often told']}")
    paragraphs.append(f"Source: {lesson.fields['Source']}")
    paragraphs.append(f"tests/lessons/test_{topic}.py {lesson.name}")
    return {
        "function": f"{file} {function}",
        "source": textwrap.dedent(inspect.getsource(part)),
        "question": lesson.question,
        "lesson": "\n\n".join(paragraphs),
    }


def frames(tokenizer):
    """The ids before and after what is typed: {"text": [before, after], "chat": [before, after]}."""
    content = tokenizer.encode("text")
    ids = sample.to_prompt(tokenizer, "text")
    found = {"text": [ids[: -len(content)], []]}
    if tokenizer.special_tokens.keys() >= set(CHAT_TOKENS):
        message = {"role": "user", "content": "text"}
        ids, _ = render(tokenizer, [message], add_generation_prompt=True)
        # the last place: a system message may hold the word, too
        places = [i for i in range(len(ids)) if ids[i : i + len(content)] == content]
        found["chat"] = [ids[: places[-1]], ids[places[-1] + len(content) :]]
    return found


def default_prompt(folder, model, tokenizer, mode, max_len):
    """A question that the model was taught to answer, or what it writes by itself."""
    if mode == "chat":
        with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):  # not one of finetune.py
            for question in json.loads((folder / "results.json").read_bytes())["questions"].values():
                if len(tokenizer.encode(question)) < max_len // 2:
                    return question
        return "Hello!"
    ids = sample.to_prompt(tokenizer, "\n")
    unused = sample.find_unused_ids(model, tokenizer)
    ends = sample.end_ids(folder, tokenizer)
    steps = sample.generate(
        model, [ids], max_new_tokens=min(32, max_len // 4), stop_ids=ends, unused_ids=unused
    )
    return tokenizer.decode([new for (new,) in steps])


# what the page needs of a Config
FIELDS = """
    vocab_size block_size n_layer n_head n_kv_head head_dim n_embd n_hidden norm_eps
    tie_embeddings qkv_bias qk_norm
""".split()  # noqa: SIM905


def make_page(folder, prompt=None):
    """The page of a model folder, as a str. ValueError: the folder or the prompt does not fit."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    model = Transformer.load(folder, dtype=torch.float32)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    config, ends = model.config, sample.end_ids(folder, tokenizer)
    max_len = min(MAX_TOKENS, config.block_size)
    around, mode = frames(tokenizer), "text"
    if tokenizer.special_tokens.get(CHAT_TOKENS[1]) in ends:
        mode = "chat"
    if prompt is None:
        prompt = default_prompt(folder, model, tokenizer, mode, max_len)
    before, after = around[mode]
    ids = before + tokenizer.encode(prompt.strip() if mode == "chat" else prompt) + after
    ids = ids or sample.to_prompt(tokenizer, "")
    if len(ids) > max_len:
        raise ValueError(f"the prompt has {len(ids)} tokens, but this model's page reads {max_len} at most")
    if max(ids) >= config.vocab_size:
        raise ValueError(f"the prompt has the id {max(ids)}, but the model {config.vocab_size} rows")
    live = config.num_params() <= MAX_PARAMS
    cos, sin = rope(torch.ones(1), config, torch.float32)  # at position 1, so the angle is that of one step
    data = {
        "name": folder.resolve().name,
        "n_params": config.num_params(),
        "config": {name: getattr(config, name) for name in FIELDS},
        "angles": torch.atan2(sin, cos)[0].tolist(),
        "max_len": max_len,
        "tokenizer": tokenizer_data(tokenizer, live),
        "ends": sorted(ends),
        "frames": around,
        "empty": sample.to_prompt(tokenizer, ""),
        "mode": mode,
        "prompt": prompt,
        "panels": {name: panel_texts(*about) for name, about in PANELS.items()},
    }
    weights = ""
    if live:
        data["weights"] = [[name, *weight.shape] for name, weight in model.state_dict().items()]
        weights = to_base64(torch.cat([weight.flatten() for weight in model.state_dict().values()]))
    else:
        size = f"{folder} has {config.num_params():,} parameters, more than {MAX_PARAMS:,}"
        print(f"{size}: its page shows this prompt alone, computed beforehand", file=sys.stderr)
        data["analysis"] = analyse(model, torch.tensor([ids]))
    # "<" could end the script that holds the data
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
    page = (HERE / "xray.html").read_text(encoding="utf-8")
    for name, content in (("data", text), ("weights", weights)):
        page = page.replace(f'id="{name}"></script>', f'id="{name}">{content}</script>', 1)
    return page


def main():
    parser = argparse.ArgumentParser(description="An HTML file in which a model lives.", exit_on_error=False)
    parser.add_argument("--model", metavar="DIR", help="model folder (the newest under out/)")
    about_prompt = "where to begin (what the model writes by itself; for a chat model a question)"
    parser.add_argument("--prompt", metavar="TEXT", help=about_prompt)
    parser.add_argument("--out", metavar="FILE", default="xray.html", help="the file to write (xray.html)")
    args = parser.parse_args()
    out = Path(args.out)
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"--out {args.out!r} must be a file in a folder that is there")
    page = make_page(args.model or sample.newest_model(), args.prompt)
    out.write_text(page, encoding="utf-8")
    print(f"{out}: {len(page) / 2**20:.1f} MB; open it in a browser")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
