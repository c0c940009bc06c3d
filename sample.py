"""Stage 4: a model at work. Feed in the newest token, draw the next one from the scores, and so on.

    logits -> / temperature -> top-k, top-p -> probabilities -> one token -> text

`generate` is the loop. It serves a stream of text, a conversation and a file of prompts; only text goes to
stdout. On a first reading, read up to `generate`, then `TextStream`.

    python sample.py                            stream text from the newest model under out/
    python sample.py --model DIR --prompt "..." -n 4 --temperature 0.8 --top-p 0.9
    python sample.py --chat
    python sample.py --prompts FILE --output FILE.jsonl --batch-size 16
"""

import argparse
import codecs
import json
import math
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from model import KVCache, Transformer, choose_device, fast_dtype, is_fast, is_out_of_memory
from tokenizer import Tokenizer, check_messages, render, steps_of

OUT = Path(__file__).resolve().parent / "out"


# --- from scores to a token ---


@dataclass
class Sampling:
    """How tokens are drawn. ValueError: a value makes no sense."""

    temperature: float = 0.8  # scores are divided by it; 0: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    top_p: float = 0.9  # draw from the likeliest tokens that together reach this probability

    def __post_init__(self):
        least = 1e-30  # below it a float32 may become zero
        if self.temperature != 0 and not least <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be positive, or 0 for the likeliest token")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top-k {self.top_k} must be a number of tokens, or 0 for all")
        if not least <= self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is outside (0, 1]")


def keep_top_k(logits, k):
    """Set all scores of a row to -inf but the k highest, and those equal to the last (Fan et al., 2018)."""
    highest = logits.topk(min(k, logits.size(-1))).values  # (B, k), falling
    return logits.masked_fill(logits < highest[:, -1:], -math.inf)


def keep_top_p(logits, top_p, k=1024):
    """Keep the scores of the likeliest tokens that together reach top_p (Holtzman et al., 2020)."""
    # On a CPU, sorting a large vocabulary takes as long as a small model; mostly the k likeliest suffice.
    # A GPU sorts fast, and asking whether they suffice would make it wait.
    V = logits.size(-1)
    k = min(k, V) if logits.device.type == "cpu" else V
    values, order = logits.topk(k)
    probabilities = (values - logits.logsumexp(-1, keepdim=True)).exp()
    if k < V and probabilities.sum(-1).min() < top_p:
        return keep_top_p(logits, top_p, V)
    before = probabilities.cumsum(-1) - probabilities  # the sum over likelier tokens
    values = values.masked_fill(before >= top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, order, values)


def probabilities_of(logits, sampling):
    """The distribution (B, V) from which a token is drawn, given scores (B, V), at a temperature above 0."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # no overflow, however cold
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return logits.softmax(-1)


def draw(probabilities, generator):
    """One id per row of (B, V): the winner of a race in which token i arrives after an Exp(p_i) time."""
    # -log(uniform) is Exp(1), divided by p_i it is Exp(p_i), and P(i arrives first) = p_i. On a CPU this is
    # four times as fast as torch.multinomial.
    uniform = torch.rand(probabilities.shape, generator=generator, device=probabilities.device)
    return (probabilities / -uniform.log()).argmax(-1)


def next_tokens(logits, sampling, generator):
    """One id per row (B,), given scores (B, V)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities_of(logits, sampling), generator)


# --- generate ---


def make_cache(model, batch_size, max_len):
    """An empty cache on the model's device, in its dtype."""
    weight = model.model.norm.weight
    return KVCache(model.config, batch_size, max_len, weight.device, weight.dtype)


def prefill(model, cache, rows):
    """Read rows, lists of ids of any lengths, into the cache -> the logits (B, V) after the end of each."""
    lengths = [len(row) for row in rows]
    padded = [row + row[-1:] * (max(lengths) - len(row)) for row in rows]
    before = cache.lengths.tolist()
    x = model.hidden(torch.tensor(padded, device=cache.k.device), cache)  # (B, T, C)
    cache.truncate([b + n for b, n in zip(before, lengths)])
    return model.head(x[range(len(rows)), [n - 1 for n in lengths]])


def one_token(model, cache, ids):
    """ids (B,), the newest token of every row -> logits (B, V)."""
    return model.head(model.hidden(ids[:, None], cache)[:, -1])


def compile_step(cache):
    """one_token as fused kernels and, on a GPU, one recorded CUDA graph that reads this cache."""
    for tensor in (cache.k, cache.v, cache.lengths):
        torch._dynamo.mark_static_address(tensor)
    return torch.compile(one_token, mode="reduce-overhead")


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_new_tokens=64,
    stop_ids=(),
    seed=0,
    unused_ids=(),
    cache=None,
    compiled=False,
    **sampling,
):
    """Continue prompts, lists of ids of any lengths but zero; yield at each step one new id per prompt.

    A row that draws one of stop_ids has ended and yields None from then on. unused_ids are never drawn;
    sampling: the fields of Sampling. When the longest row has filled the context, all rows continue from
    their last half of it. With a given cache, prompts continue what each row holds, until it is full.
    ValueError: unusable settings, or scores that are not numbers.
    """
    sampling = Sampling(**sampling)
    if not prompts or not all(prompts):
        raise ValueError("generate needs a prompt, of at least one token")
    if cache is not None and len(cache.lengths) != len(prompts):
        raise ValueError(f"a cache of {len(cache.lengths)} rows does not go with {len(prompts)} prompts")
    largest = max(map(max, prompts))
    if largest >= model.config.vocab_size:  # a GPU would fail without a reason
        raise ValueError(f"id {largest} has no row in a model of {model.config.vocab_size}")
    device, context = model.model.norm.weight.device, model.config.block_size
    generator = torch.Generator(device).manual_seed(seed)
    rows = [list(prompt[-context:]) for prompt in prompts]
    slides = cache is None  # whether to go on when the context is full
    if slides:
        longest = max(len(row) for row in rows)
        cache = make_cache(model, len(rows), min(context, longest + max_new_tokens))
    logits = prefill(model, cache, rows)
    step = compile_step(cache) if compiled else one_token
    ended = [False] * len(rows)
    unused = torch.tensor(unused_ids, device=device, dtype=torch.long)
    for n_made in range(1, max_new_tokens + 1):
        logits[:, unused] = -math.inf
        new = next_tokens(logits, sampling, generator)  # (B,)
        is_sound = logits.amax(-1).isfinite()  # NaN and +inf come through amax
        ids = torch.where(is_sound, new, -1).tolist()  # one copy to the host, not two
        if -1 in ids:
            raise ValueError(f"scores are not finite: damaged weights, or too large for {logits.dtype}")
        ended = [end or i in stop_ids for end, i in zip(ended, ids)]
        if all(ended):
            return
        yield [None if end else i for end, i in zip(ended, ids)]
        for row, i in zip(rows, ids):
            row.append(i)
        if n_made == max_new_tokens or (cache.span == cache.max_len and not slides):
            return
        if cache.span < cache.max_len:
            if compiled:
                cache.reserve(1)  # a recorded step cannot count
            logits = step(model, cache, new).clone()  # the next recorded step overwrites its result
        else:
            rows = [row[-max(1, context // 2) :] for row in rows]
            cache.truncate([0] * len(rows))
            logits = prefill(model, cache, rows)


# --- the layout of the weights ---
#
# To draw one token, a CPU multiplies one row by every matrix, so it mostly waits for memory, and the order in
# which a matrix lies there decides. `pack` chooses it by the kind of processor and not by what is fastest at
# the moment: a product in another order is rounded otherwise, and equal seeds must write equal texts.

SMALL = 2**18  # weights of a matrix; a product of one row with fewer is over before oneDNN has begun it


def by_columns(weight):
    """The same matrix, with its columns instead of its rows one after the other in memory."""
    return weight.detach().T.contiguous().T


class PackedLinear(nn.Module):
    """A matrix in oneDNN's own order, for decoding only."""

    def __init__(self, weight, bias):
        super().__init__()
        weight = weight.detach()
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight), bias
        self.small = None
        if weight.dtype == torch.float32 and weight.numel() <= SMALL:
            self.small = by_columns(weight)

    def forward(self, x):
        is_one_row = x.numel() == x.size(-1)
        if self.small is not None and is_one_row:
            return nn.functional.linear(x, self.small, self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")

    def _save_to_state_dict(self, *args):
        raise ValueError("packed weights cannot be saved: open the folder with Transformer.load instead")


def packed_is_faster(dtype):
    """Whether this CPU multiplies one row faster by packed matrices than by columns (tests/README.md)."""
    if not torch.backends.mkldnn.is_available() or fast_dtype("cpu") != torch.bfloat16:
        return False
    has_amx = torch.cpu.get_capabilities().get("amx_tile", False)  # processors of Intel with bfloat16 units
    return dtype == torch.bfloat16 or not has_amx


def pack(model):
    """Lay out a model's matrices for decoding on this CPU, packed or by columns. It cannot learn any more.

    On another device or in another dtype nothing changes.
    """
    weight = model.model.norm.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return model
    packed = packed_is_faster(weight.dtype)
    if model.lm_head is None:  # the head gets a copy of the embedding, from which rows are taken as they are
        V, C = model.model.embed_tokens.weight.shape
        model.lm_head = nn.Linear(C, V, bias=False, device="meta")
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if packed:
            model.set_submodule(name, PackedLinear(module.weight, module.bias))
        else:
            module.weight = nn.Parameter(by_columns(module.weight), requires_grad=False)
    return model


# --- bytes to text ---


class TextStream:
    """The text of one row as its ids come: never half a character, a stop string or the start of one."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # may be the start of a stop string
        self.ended = False

    def add(self, new):
        """Take the next id, or None at the end; return what can be shown now."""
        if self.ended:
            return ""
        self.ended = new is None
        new_bytes = b"" if self.ended else self.tokenizer.decode_bytes([new])
        text = self.held + self.decoder.decode(new_bytes, self.ended)
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stops if stop in text]
        if found:  # the stop string that is complete first counts, wherever the tokens end
            _, begin = min(found)
            text, self.ended = text[:begin], True
        n_held = 0 if self.ended else self.length_of_start(text)
        shown, self.held = text[: len(text) - n_held], text[len(text) - n_held :]
        return shown

    def length_of_start(self, text):
        """The length of the longest start of a stop string with which a text ends."""
        starts = [stop[:n] for stop in self.stops for n in range(1, len(stop))]
        return max((len(start) for start in starts if text.endswith(start)), default=0)


def stream_text(tokenizer, steps, stops=()):
    """What generate yields -> a str per row at each step; ends when every row has ended."""
    streams = []
    for step in steps:
        if not streams:
            streams = [TextStream(tokenizer, stops) for _ in step]
        yield [stream.add(new) for stream, new in zip(streams, step)]
        if all(stream.ended for stream in streams):
            return
    if streams:
        yield [stream.add(None) for stream in streams]


def to_prompt(tokenizer, text):
    """The ids of a text and, before it, what the tokenizer's model expects there; never none at all."""
    ids = tokenizer.encode(text)
    for step in steps_of(tokenizer.document.get("post_processor"), "processors"):
        for part in step.get("single", [])[:1]:
            if "SpecialToken" in part:  # <|begin_of_text|> of Llama 3
                ids = step["special_tokens"][part["SpecialToken"]["id"]]["ids"] + ids
    return ids or [tokenizer.special_tokens.get("<|endoftext|>", 0)]


def stream_samples(model, tokenizer, prompt, stops, n_samples, **settings):
    """Print the prompt and what follows: the first sample as it is drawn, then the others and the speed."""
    ids, context = to_prompt(tokenizer, prompt), model.config.block_size
    if len(ids) > context:
        print(f"the prompt has {len(ids):,} tokens: it is cut to its last {context:,}", file=sys.stderr)
        ids = ids[-context:]
    texts, n_steps, start = [""] * n_samples, 0, time.perf_counter()
    print(prompt, end="", flush=True)
    try:
        steps = generate(model, [ids] * n_samples, **settings)
        for pieces in stream_text(tokenizer, steps, stops):
            print(pieces[0], end="", flush=True)
            texts = [text + piece for text, piece in zip(texts, pieces)]
            n_steps += 1
    finally:  # also after Ctrl-C
        for text in texts[1:]:
            print(f"\n\n---\n\n{prompt}{text}", end="")
        print(flush=True)
        speed = n_samples * n_steps / (time.perf_counter() - start)
        print(f"{len(ids):,} tokens read; {speed:,.0f} a second written", file=sys.stderr)


# --- chat ---


CHAT_CONTEXT = 8192  # tokens; the cache of a large model with all its context may not fit into memory


class Chat:
    """A conversation whose KV cache is kept, so that each turn reads only what is new."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.opening, _ = render(tokenizer, [])
        self.turns = []  # the ids of each turn
        self.read = []  # the ids that the cache holds
        self.cache = make_cache(model, 1, min(CHAT_CONTEXT, model.config.block_size))

    def answer(self, text, stops=(), **settings):
        """Yield the answer to a text in pieces. Where the context is too short, say what is forgotten."""
        room = max(1, self.cache.max_len * 3 // 4 - len(self.opening))  # the rest is for the answer
        message = {"role": "user", "content": text}
        question, _ = render(self.tokenizer, [message], add_generation_prompt=True, opening=False)
        turns, n_forgotten = [*self.turns, question], 0
        while n_forgotten < len(turns) - 1 and sum(map(len, turns[n_forgotten:])) > room:
            n_forgotten += 2  # a question and its answer
        turns = turns[n_forgotten:]
        ids = sum(turns, [])
        if n_forgotten:
            print(f"(to make room, the oldest {n_forgotten} turns are forgotten)", file=sys.stderr)
        if len(ids) > room:
            print(f"(this is too long: only its last {room} tokens are read)", file=sys.stderr)
            ids = ids[-room:]
        ids = self.opening + ids
        same = 0  # the ids that the cache holds already; at least one is left to read
        while same < min(len(ids) - 1, len(self.read)) and ids[same] == self.read[same]:
            same += 1
        said, self.read = [], ids[:same]
        stream = TextStream(self.tokenizer, stops)
        try:
            self.cache.truncate([same])
            for (new,) in generate(self.model, [ids[same:]], cache=self.cache, **settings):
                said.append(new)
                yield stream.add(new)
                if stream.ended:
                    break
            yield stream.add(None)
            if self.cache.span == self.cache.max_len:
                print("(the context is full)", file=sys.stderr)
        finally:  # also when Ctrl-C cut the answer short
            end = self.tokenizer.special_tokens["<|im_end|>"]
            self.turns = [*turns, [*said, end, *self.tokenizer.encode("\n")]]
            if said:
                self.read = ids + said[:-1]  # the last one was drawn but perhaps not read


def converse(model, tokenizer, folder, stops, stop_ids, seed, **settings):
    """Answer what is typed, line by line, until /quit or the end of the input; /reset forgets everything."""
    chat = Chat(model, tokenizer)  # refuses a tokenizer without the ChatML layout before anybody types
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() its line editing and history
    end = tokenizer.special_tokens["<|im_end|>"]
    if end not in stop_ids:
        print("this model was not taught to chat: it continues the text, it answers nothing", file=sys.stderr)
    # finetune.py leaves questions in this file; with another program's, there is nothing to show.
    with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
        questions = json.loads((folder / "results.json").read_bytes())["questions"].values()
        if questions:
            print("it answers questions like these, new to it:", *questions, sep="\n  ", file=sys.stderr)
    print("/reset starts anew, /quit ends; Ctrl-C cuts an answer short", file=sys.stderr)
    settings["stop_ids"] = stop_ids | {end}
    while sys.stdin:  # a caller may have closed it
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            chat.turns.clear()
        elif text:
            with suppress(KeyboardInterrupt):
                for piece in chat.answer(text, stops, seed=seed + len(chat.turns), **settings):
                    print(piece, end="", flush=True)
            print(flush=True)


# --- a file of prompts ---


def read_prompts(path):
    """{line number: record} of a .txt, one prompt per line, or of a .jsonl with `prompt` or `messages`.

    ValueError: names a line that is neither.
    """
    lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    if Path(path).suffix.lower() not in (".jsonl", ".json"):
        return {number: {"prompt": line} for number, line in enumerate(lines, 1)}
    records = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or ("prompt" in record) == bool(record.get("messages")):
                raise ValueError('a line needs {"prompt": a text} or {"messages": a list}')
            check_messages(record.get("messages") or [{"role": "user", "content": record["prompt"]}])
            if taken := {"line", "completion", "system", "tools"} & record.keys():
                raise ValueError(f"{min(taken)!r} is a field of the answer, or not read here: leave it out")
            # Half a surrogate pair cannot be written, and NaN is not JSON.
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error!s:.150}") from None
        records[number] = record
    return records


def prompt_of(record, tokenizer):
    """The ids of a record of read_prompts."""
    if "prompt" in record:
        return to_prompt(tokenizer, record["prompt"])
    ids, _ = render(tokenizer, record["messages"], add_generation_prompt=True)
    return ids


def part_files(output):
    """The files beside `output` in which processes keep their answers until all are there."""
    name = re.compile(re.escape(output.name) + r"\.part\d+")
    return [path for path in output.parent.iterdir() if name.fullmatch(path.name)]


def read_answers(output):
    """{line number: answer} of everything that was answered so far."""
    answers = {}
    for path in [output, *part_files(output)]:
        with suppress(FileNotFoundError):  # not there yet, or just removed by another process
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                if not line:
                    continue
                try:
                    answer = json.loads(line)
                    answers[answer["line"]] = answer
                except (KeyError, TypeError, ValueError):  # cut off when the process was killed
                    if path == output:
                        raise ValueError(f"{output} does not hold answers: {line:.60}") from None
    return answers


def answer_file(model, tokenizer, path, output, batch_size, stops, seed, **settings):
    """Answer a file of prompts; the answers get into `output` in the same order, once all are there.

    Until then each process of torchrun, or the only one, adds its answers to a part file. What was answered
    before, by a run that was stopped, is kept.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    context = model.config.block_size
    if output.exists() and not output.is_file():
        raise ValueError(f"{output} is not a file")
    records, answers, start = read_prompts(path), read_answers(output), time.perf_counter()
    for number, answer in answers.items():
        if number not in records or answer != answer | records[number]:
            raise ValueError(f"{output} (or a .part file) answers other prompts than {path}: choose another")
    prompts = {number: prompt_of(record, tokenizer) for number, record in records.items()}
    if too_long := sum(len(prompt) > context for prompt in prompts.values()):
        print(f"{too_long} prompts are cut to their last {context} tokens", file=sys.stderr)
    todo = [number for number in list(records)[rank::world] if number not in answers]
    counts = f"{len(todo):,} prompts to answer, {len(answers):,} were answered before"
    print(f"{counts}; after a stop, repeat the command to go on", file=sys.stderr)
    with open(f"{output}.part{rank}", "a", encoding="utf-8") as part:
        if part.tell():
            part.write("\n")  # the last line may have been cut off
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            steps = generate(model, [prompts[number] for number in batch], seed=seed + batch[0], **settings)
            texts = [""] * len(batch)
            for pieces in stream_text(tokenizer, steps, stops):
                texts = [text + piece for text, piece in zip(texts, pieces)]
            for number, text in zip(batch, texts):
                answer = records[number] | {"line": number, "completion": text}
                part.write(json.dumps(answer, ensure_ascii=False) + "\n")
            part.flush()
            n, seconds = first + len(batch), time.perf_counter() - start
            left = timedelta(seconds=round(seconds / n * (len(todo) - n)))
            print(f"{n:,} of {len(todo):,}, {n / seconds:.1f} a second, {left} left", file=sys.stderr)
    answers = read_answers(output)
    if len(answers) == len(records):  # of several processes, the last one sees that
        unfinished = output.with_name(f"{output.name}.unfinished{rank}")
        lines = [json.dumps(answers[number], ensure_ascii=False) + "\n" for number in sorted(answers)]
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, output)
        for path in part_files(output):
            path.unlink(missing_ok=True)
        print(f"{output}: {len(answers):,} answers", file=sys.stderr)


# --- command line ---


def newest_model():
    """The folder under out/ whose model was saved last."""
    found = sorted(OUT.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("there is no model under out/ yet: run `python train.py`, or name one with --model")
    return found[-1].parent


def load(folder, device="cpu", dtype=None):
    """Open a folder's model, ready for decoding, and its tokenizer.

    dtype None: as in the file, or float32 where the processor has no units for that.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    model = Transformer.load(folder, device, dtype)
    stored = model.model.norm.weight.dtype
    if dtype is None and not is_fast(stored, device):
        print(f"{stored} is slow on this device: converted to float32 (--dtype keeps it)", file=sys.stderr)
        model.float()
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} tokens, its model {model.config.vocab_size:,}"
        print(f"the tokenizer of {folder} has {sizes}: the last ones cannot be read", file=sys.stderr)
    return pack(model), tokenizer


def find_unused_ids(model, tokenizer):
    """The ids of a model that stand for no token: its matrices may be larger than the vocabulary."""
    return [i for i in range(model.config.vocab_size) if i not in tokenizer.tokens]


def end_ids(folder, tokenizer):
    """The ids that end a text: of generation_config.json or config.json, else all special tokens."""
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        try:
            ends = json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else None
            if ends is None:
                continue
            ends = set(ends) if isinstance(ends, list) else {ends}
            if unknown := ends - tokenizer.tokens.keys():
                raise ValueError(f"eos_token_id {unknown} is not in the vocabulary")
            return ends
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    return set(tokenizer.special_tokens.values())


def read_prompt(text):
    """The prompt: as given or, for "-", from stdin without its last line end."""
    if text != "-":
        return text
    if sys.stdin is None:
        raise ValueError("--prompt - reads stdin, which is closed")
    return sys.stdin.read().removesuffix("\n")


def positive_int(text):
    """A whole number above 0, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return int(text)


def positive_float(text):
    """A finite number above 0, for argparse."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return float(text)


def seed_number(text):
    """A whole number that every generator takes, for argparse."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 2^32")
    return int(text)


def parse_arguments():
    """What was typed. ValueError: options that do not go together."""
    parser = argparse.ArgumentParser(description="Text from a model.", exit_on_error=False)
    add = parser.add_argument
    add("--model", metavar="DIR", help="model folder (the newest under out/)")
    add("-n", type=positive_int, default=1, help="number of samples (1)")
    add("--max-new-tokens", type=positive_int, default=256, help="length of a sample (256)")
    group = parser.add_argument_group("what to continue")
    add = group.add_mutually_exclusive_group().add_argument
    prompt_help = 'a text; "-" reads stdin, "" starts a new document (an empty line)'
    add("--prompt", metavar="TEXT", default="\n", help=prompt_help)
    add("--chat", action="store_true", help="what you type, in turns")
    add("--prompts", metavar="FILE", help="many: .txt, one a line, or .jsonl with `prompt` or `messages`")
    add = group.add_argument
    add("--output", metavar="FILE", help="the .jsonl for their answers; repeat the command after a stop")
    add("--batch-size", type=positive_int, default=16, help="prompts at a time (16)")
    add = parser.add_argument_group("how a token is drawn").add_argument
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    add("--top-k", type=int, default=0, help="from the k likeliest tokens only (0: from all)")
    add("--top-p", type=float, default=0.9, help="from the likeliest tokens that reach this in sum (0.9)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    add("--seed", type=seed_number, default=0, help="equal seeds draw equal samples (0)")
    add = parser.add_argument_group("speed").add_argument
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (as in the file, if that is fast)",
    )
    add("--compile", action="store_true", help="on a GPU: fuse kernels, which pays in long runs")
    add("--device", help="cpu, cuda or mps (the fastest of this machine)")
    args = parser.parse_args()
    if "" in args.stop:
        raise ValueError("an empty --stop would end every text at once")
    if bool(args.prompts) != bool(args.output):
        raise ValueError("--prompts FILE and --output FILE go together")
    if args.n > 1 and (args.prompts or args.chat):
        raise ValueError("-n is for one prompt, not for --prompts or --chat")
    return args


def main():
    args = parse_arguments()
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")  # a strange character must not end a text
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    Sampling(**sampling)  # refuses a mistake before the model is read
    folder = Path(args.model) if args.model else newest_model()
    device = choose_device(args.device)
    if device == "cuda":  # under torchrun, each process has its own
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if args.compile and not device.startswith("cuda"):
        raise ValueError("--compile makes decoding faster on CUDA only: leave it out")
    model, tokenizer = load(folder, device, args.dtype and getattr(torch, args.dtype))
    print(f"{os.path.relpath(folder)}: {model.config.num_params():,} parameters", file=sys.stderr)
    settings = dict(sampling, max_new_tokens=args.max_new_tokens, seed=args.seed, compiled=args.compile)
    settings.update(unused_ids=find_unused_ids(model, tokenizer), stop_ids=end_ids(folder, tokenizer))
    if args.chat:
        converse(model, tokenizer, folder, args.stop, **settings)
    elif args.prompts:
        output = Path(args.output).resolve()
        answer_file(model, tokenizer, args.prompts, output, args.batch_size, args.stop, **settings)
    else:
        stream_samples(model, tokenizer, read_prompt(args.prompt), args.stop, args.n, **settings)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, argparse.ArgumentError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
