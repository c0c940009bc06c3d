"""Stage 4: a model at work. Feed in the newest token, draw the next one from the scores, and so on.

python sample.py                                   stream text from the newest model under out/
python sample.py --model DIR --prompt "def " -n 4 --temperature 0.8 --top-p 0.9
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch

from model import KVCache, Transformer
from tokenizer import Tokenizer

OUT = Path(__file__).resolve().parent / "out"


def filter_top_p(logits, top_p):
    """Keep the likeliest tokens that together reach probability top_p (Holtzman et al., 2020); others: -inf.

    logits (B, V), already divided by the temperature.
    """
    values, order = logits.sort(dim=-1, descending=True)
    probabilities = values.softmax(dim=-1)
    above = probabilities.cumsum(dim=-1) - probabilities  # what the tokens before this one have in sum
    return logits.scatter(-1, order, values.masked_fill(above >= top_p, float("-inf")))


def choose(logits, temperature, top_p, generator):
    """Draw one id per row of logits (B, V); temperature 0 takes the most likely one."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature  # no overflow, however cold
    if top_p < 1:
        logits = filter_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(
    model, prompts, max_new_tokens=64, temperature=0.8, top_p=0.9, stop_ids=(), seed=0, vocab_size=None
):
    """Continue prompts, lists of ids of any lengths but zero; yield at each step one new id per row.

    A row that draws one of stop_ids has ended: it yields None from then on. Ids from vocab_size on are never
    drawn. A row that outgrows the context goes on from its last half. Unusable settings raise ValueError.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be 0, which takes the likeliest token, or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p {top_p} is outside (0, 1]")
    if not prompts or not all(prompts):
        raise ValueError("a prompt needs at least one token")
    device, dtype = model.model.norm.weight.device, model.model.norm.weight.dtype
    generator = torch.Generator(device).manual_seed(seed)
    context = model.config.block_size
    rows = [list(prompt[-context:]) for prompt in prompts]
    ended = [False] * len(rows)
    cache = None
    for _ in range(max_new_tokens):
        if cache is None or cache.span == cache.max_len:
            if cache is not None:
                rows = [row[-max(1, context // 2) :] for row in rows]
            lengths = [len(row) for row in rows]
            longest = max(lengths)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            room = min(max(context, longest), longest + max_new_tokens)
            cache = KVCache(model.config, len(rows), room, device, dtype)
            x = model.hidden(ids, cache)  # (B, longest, C)
            cache.truncate(lengths)
            x = x[torch.arange(len(rows)), [n - 1 for n in lengths]]  # at each row's last token
        else:
            x = model.hidden(torch.tensor([row[-1:] for row in rows], device=device), cache)[:, -1]
        logits = model.head(x)  # (B, V)
        drawn = choose(logits[:, :vocab_size], temperature, top_p, generator).tolist()
        for row, new in zip(rows, drawn):
            row.append(new)
        ended = [end or new in stop_ids for end, new in zip(ended, drawn)]
        if all(ended):
            return
        yield [None if end else new for end, new in zip(ended, drawn)]


def choose_device(name=None):
    """The device of that name or, without one, the fastest of this machine. ValueError: it is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from None
    return name


def newest_model():
    """The folder under out/ whose model was saved last."""
    found = sorted(OUT.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("there is no model under out/ yet: run `python train.py`, or name one with --model")
    return found[-1].parent


def load(folder, device="cpu"):
    """Open a folder's model and tokenizer."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    model = Transformer.load(folder, device=device)
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} has no tokenizer.json")
    return model, Tokenizer.load(folder / "tokenizer.json")


def stream(model, tokenizer, prompt, **settings):
    """Yield the continuation of a text as it is made, never half a character. No prompt: a new document."""
    end = tokenizer.special_tokens.get("<|endoftext|>")
    ids = tokenizer.encode(prompt) or ([] if end is None else [end])
    settings |= {"stop_ids": tokenizer.special_tokens.values(), "vocab_size": tokenizer.vocab_size}
    yield from tokenizer.decode_stream(new for (new,) in generate(model, [ids], **settings))


def main():
    parser = argparse.ArgumentParser(description="Stream text from a model.")
    add = parser.add_argument
    add("--model", metavar="DIR", help="model folder (the newest under out/)")
    add("--prompt", default="", help="text to continue (none: start a new document)")
    add("-n", type=int, default=1, help="number of samples (1)")
    add("--max-new-tokens", type=int, default=256, help="length of a sample (256)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    add("--top-p", type=float, default=0.9, help="draw from the likeliest tokens that reach this (0.9)")
    add("--seed", type=int, default=0, help="equal seeds draw equal samples (0)")
    add("--device", help="cpu, cuda or mps (the fastest that there is)")
    args = parser.parse_args()
    if args.n < 1 or args.max_new_tokens < 1 or not 0 <= args.seed < 2**63:
        raise ValueError("-n and --max-new-tokens must be at least 1, --seed from 0 to 2^63 - 1")
    folder = Path(args.model) if args.model else newest_model()
    model, tokenizer = load(folder, choose_device(args.device))
    print(f"{os.path.relpath(folder)}: {model.config.num_params():,} parameters", file=sys.stderr)
    if len(tokenizer.encode(args.prompt)) > model.config.block_size:
        print(f"the prompt is cut to its last {model.config.block_size} tokens", file=sys.stderr)
    settings = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
    for seed in range(args.seed, args.seed + args.n):
        start, made = time.time(), 0
        print(args.prompt, end="", flush=True)
        for piece in stream(model, tokenizer, args.prompt, seed=seed, **settings):
            print(piece, end="", flush=True)
            made += 1
        print(flush=True)
        print(f"{made / (time.time() - start):.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
