"""Stage 4: a model at work. decoding.py draws token ids; here they become text.

    ids -> bytes -> characters -> what can be shown by now

as a stream, for a whole file of prompts, or in a conversation. Only text goes to stdout.

    python sample.py                            stream text from the newest model under out/
    python sample.py --model DIR --prompt "..." -n 4 --temperature 0.8 --top-p 0.9
    python sample.py --chat
    python sample.py --prompts FILE --output FILE.jsonl --batch-size 16
"""

import argparse
import codecs
import json
import os
import re
import select
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from decoding import Sampling, generate, make_cache, pack, speculate
from machine import choose_device
from model import Transformer
from tokenizer import Tokenizer

OUT = Path(__file__).resolve().parent / "out"
PROMPTS = {"pystdlib": "def ", "shakespeare": "ROMEO:\n", "tinystories": "Once upon a time"}  # by data
PLAIN = dict(encoding="utf-8-sig", errors="replace")  # stray bytes of a prompt are read as U+FFFD
PIPE_SECONDS = 3  # some programs give their children a pipe into which nothing ever comes


# --- from ids to text ---


class Text:
    """The text of one row as its ids come: never half a character, a stop string or the start of one."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops, self.ended = tokenizer, stops, False
        self.decoder, self.held = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""

    def add(self, new):
        """Take the next id, or None at the end; returns what can be shown by now."""
        if self.ended:
            return ""
        self.ended = new is None
        new_bytes = b"" if self.ended else self.tokenizer.decode_bytes([new])
        text = self.held + self.decoder.decode(new_bytes, self.ended)
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stops if stop in text]
        if found:  # the one that is complete first counts, however the text was cut into tokens
            text, self.ended = text[: min(found)[1]], True
        starts = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        n_held = 0 if self.ended else max((len(start) for start in starts if text.endswith(start)), default=0)
        shown, self.held = text[: len(text) - n_held], text[len(text) - n_held :]
        return shown


def write(tokenizer, steps, stops=()):
    """Turn what generate yields into text: a str per row at each step. Ends when every row has ended."""
    texts = []
    for step in steps:
        texts = texts or [Text(tokenizer, stops) for _ in step]
        yield [text.add(new) for text, new in zip(texts, step)]
        if all(text.ended for text in texts):
            return
    if texts:
        yield [text.add(None) for text in texts]


def to_prompt(tokenizer, text):
    """The ids of a text and, before it, what the tokenizer's model expects there; never none."""
    ids = tokenizer.encode(text)
    processor = tokenizer.document.get("post_processor") or {}
    for step in processor.get("processors", [processor]):  # Llama 3: <|begin_of_text|>
        for part in step.get("single", [])[:1]:
            if "SpecialToken" in part:
                ids.insert(0, tokenizer.special_tokens[part["SpecialToken"]["id"]])
    return ids or [tokenizer.special_tokens.get("<|endoftext|>", 0)]


# --- conversations ---


def render(tokenizer, messages, answer=False):
    """A conversation in the ChatML layout -> (ids, mask); mask: True for what the assistant says.

    messages: [{"role": ..., "content": ...}, ...], read without the space around texts. answer: the ids end
    where the assistant's turn begins. No text can become a special token. ValueError: without ChatML tokens.
    """
    if missing := {"<|im_start|>", "<|im_end|>"} - tokenizer.special_tokens.keys():
        raise ValueError(f"no {min(missing)} in the tokenizer: chat takes a model with the ChatML layout")
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    ids, mask = [], []
    for message in messages:
        head = [start, *tokenizer.encode(message["role"] + "\n")]
        said = [*tokenizer.encode(message["content"].strip()), end]
        gap = tokenizer.encode("\n")
        ids += head + said + gap
        mask += [False] * len(head) + [message["role"] == "assistant"] * len(said) + [False] * len(gap)
    if answer:
        ids += [start, *tokenizer.encode("assistant\n")]
    return ids, mask + [False] * (len(ids) - len(mask))


class Chat:
    """A conversation whose KV cache is kept, so that of each turn only what is new is read."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.turns, self.read = [], []  # the ids of each turn; the ids that the cache holds
        self.cache = make_cache(model, 1, model.config.block_size)

    def answer(self, text, stops=(), **settings):
        """Yield the answer to a text in pieces. Where the context is too short, says what it forgets."""
        tokenizer, room = self.tokenizer, self.cache.max_len * 3 // 4  # the rest is for the answer
        turns = self.turns + [render(tokenizer, [{"role": "user", "content": text}], answer=True)[0]]
        forgotten = 0
        while forgotten < len(turns) - 1 and sum(map(len, turns[forgotten:])) > room:
            forgotten += 2  # a question and its answer
        self.turns = turns[forgotten:]
        ids = sum(self.turns, [])
        if forgotten:
            print(f"(to make room, the oldest {forgotten} turns are forgotten)", file=sys.stderr)
        if len(ids) > room:
            print(f"(this is too long: only its last {room} tokens are read)", file=sys.stderr)
            ids = ids[-room:]
        n = min(len(ids) - 1, len(self.read))
        same = next((i for i in range(n) if ids[i] != self.read[i]), n)
        self.cache.truncate([same])
        said, self.read = [], ids[:same]

        def note(steps):
            for step in steps:
                said.extend(step)
                yield step

        try:
            steps = generate(self.model, [ids[same:]], cache=self.cache, **settings)
            for (piece,) in write(tokenizer, note(steps), stops):
                yield piece
            if self.cache.span == self.cache.max_len:
                print("(the context is full)", file=sys.stderr)
        finally:  # also when Ctrl-C cut the answer short
            self.turns.append([*said, tokenizer.special_tokens["<|im_end|>"], *tokenizer.encode("\n")])
            self.read = ids + said[:-1] if said else ids[:same]  # never more than all layers have read


def converse(model, tokenizer, folder, ends, seed, **settings):
    """Answer what is typed, line by line, until /quit or the end of the input; /reset forgets everything."""
    render(tokenizer, [])  # or there is no point in waiting for a question
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() its line editing and history
    if tokenizer.special_tokens.get("<|im_end|>") not in ends:
        print("this model was not taught to chat: it will go on with the text, not answer", file=sys.stderr)
    with suppress(OSError, ValueError, KeyError):  # finetune.py leaves some questions
        taught = json.loads((folder / "results.json").read_bytes())["questions"].values()
        if taught:
            print("it answers questions such as these, new to it:", *taught, sep="\n  ", file=sys.stderr)
    print("/reset starts anew, /quit ends; Ctrl-C cuts an answer short", file=sys.stderr)
    chat = Chat(model, tokenizer)
    stop_ids = ends | {tokenizer.special_tokens["<|im_end|>"]}
    while sys.stdin:  # a caller may have closed it
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if text.strip() == "/quit":
            return
        if text.strip() == "/reset":
            chat = Chat(model, tokenizer)
        elif text.strip():
            with suppress(KeyboardInterrupt):
                for piece in chat.answer(text, stop_ids=stop_ids, seed=seed + len(chat.turns), **settings):
                    print(piece, end="", flush=True)
            print(flush=True)


# --- a file of prompts ---


def read_records(path):
    """{line number: prompt} of a .txt, one a line, or of a .jsonl with `prompt` or `messages`.

    ValueError: names a line that is neither.
    """
    *lines, last = Path(path).read_text(**PLAIN).split("\n")
    numbered = enumerate(lines + [last] if last else lines, 1)
    if Path(path).suffix != ".jsonl":
        return {number: {"prompt": line} for number, line in numbered}
    records = {}
    for number, line in numbered:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = [record["prompt"]] if "prompt" in record else []
            texts += [message[key] for message in record.get("messages", []) for key in ("role", "content")]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError('it needs "prompt", a text, or "messages", each with "role" and "content"')
            if taken := {"line", "completion"} & record.keys():
                raise ValueError(f"{min(taken)!r} is what the answer will be called: leave it out")
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error!r:.150}") from None
        records[number] = record
    return records


def parts_of(output):
    """The files beside `output` in which processes keep answers until all are there."""
    name = re.compile(re.escape(output.name) + r"\.part\d+")
    return [path for path in output.parent.iterdir() if name.fullmatch(path.name)]


def read_answers(output):
    """{line number: answer} of all that was answered by now."""
    answers = {}
    for path in [output, *parts_of(output)]:
        with suppress(FileNotFoundError):  # there is none yet, or another process has just removed it
            for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
                try:
                    answer = json.loads(line)
                    answers[answer["line"]] = answer
                except (KeyError, TypeError, ValueError):  # cut off when the process was killed
                    if path == output:
                        raise ValueError(f"{output} holds something else than answers: {line:.60}") from None
    return answers


def answer_file(model, tokenizer, path, output, batch_size, go_on, seed, stops):
    """Answer a file of prompts; the answers get into `output` in the same order, once all are there.

    Until then each process of torchrun, or the only one, adds them to a part file of its own. What is there
    is not answered again.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if output.exists() and not output.is_file():
        raise ValueError(f"{output} is no file")
    records, answers, start = read_records(path), read_answers(output), time.perf_counter()
    for number, answer in answers.items():
        if number not in records or answer != answer | records[number]:
            raise ValueError(f"{output} answers other prompts than {path}: choose another --output")

    def to_ids(prompt=None, messages=(), **_):
        return to_prompt(tokenizer, prompt) if prompt is not None else render(tokenizer, messages, True)[0]

    prompts = {number: to_ids(**record) for number, record in records.items()}
    if too_long := sum(len(prompt) > model.config.block_size for prompt in prompts.values()):
        print(f"{too_long} prompts are cut to their last {model.config.block_size} tokens", file=sys.stderr)
    todo = [number for number in list(records)[rank::world] if number not in answers]
    said = f"{len(todo):,} prompts to answer, {len(answers):,} were answered before"
    print(f"{said}; after a stop the same command goes on", file=sys.stderr)
    with open(f"{output}.part{rank}", "a", encoding="utf-8") as part:
        part.write("\n" if part.tell() else "")  # after a line that was cut off
        for done in range(0, len(todo), batch_size):
            batch = todo[done : done + batch_size]
            steps = go_on([prompts[number] for number in batch], seed=seed + batch[0])
            rows = list(zip(*write(tokenizer, steps, stops))) or [""] * len(batch)  # each ended at once
            for number, pieces in zip(batch, rows):
                answer = records[number] | {"line": number, "completion": "".join(pieces)}
                part.write(json.dumps(answer, ensure_ascii=False) + "\n")
            part.flush()
            n, seconds = done + len(batch), time.perf_counter() - start
            left = timedelta(seconds=round(seconds / n * (len(todo) - n)))
            print(f"{n:,} of {len(todo):,}, {n / seconds:.1f} a second, {left} left", file=sys.stderr)
    answers = read_answers(output)
    if len(answers) == len(records):  # of several processes, the last one sees that
        unfinished = output.with_name(f"{output.name}.unfinished{rank}")
        lines = [json.dumps(answers[number], ensure_ascii=False) + "\n" for number in sorted(answers)]
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, output)
        for path in parts_of(output):
            path.unlink(missing_ok=True)
        print(f"{output}: {len(answers):,} answers", file=sys.stderr)


# --- the command line ---


def newest_model():
    """The folder under out/ whose model was saved last."""
    found = sorted(OUT.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("there is no model under out/ yet: run `python train.py`, or name one with --model")
    return found[-1].parent


def load(folder, device="cpu", dtype=None):
    """Open a folder's model, ready for decoding, and its tokenizer. dtype None: as in the file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    model = pack(Transformer.load(folder, device, dtype))
    return model, Tokenizer.load(folder / "tokenizer.json")


def end_ids(folder, tokenizer):
    """The ids that end a text: of generation_config.json or config.json, else all special tokens."""
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        try:
            ends = json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else None
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if ends is not None:
            return set(ends if isinstance(ends, list) else [ends])
    return set(tokenizer.special_tokens.values())


def show_samples(tokenizer, prompt, ids, go_on, stops):
    """Print the prompt and what follows: the first sample as it is made, then the others and the speed."""
    start, first, n_made, texts = time.perf_counter(), None, 0, []

    def count(steps):
        nonlocal first, n_made
        for step in steps:
            first = first or time.perf_counter()
            n_made += sum(new is not None for new in step)
            yield step

    print(prompt, end="", flush=True)
    try:
        for pieces in write(tokenizer, count(go_on([ids])), stops):
            print(pieces[0], end="", flush=True)
            texts = [text + piece for text, piece in zip(texts or [""] * len(pieces), pieces)]
    finally:  # also after Ctrl-C
        for text in texts[1:]:
            print(f"\n\n---\n\n{prompt}{text}", end="")
        print(flush=True)
        now, first = time.perf_counter(), first or time.perf_counter()
        read, made = len(ids) / (first - start), max(0, n_made - max(1, len(texts))) / max(1e-9, now - first)
        print(f"prompt: {len(ids):,} tokens, {read:,.0f} a second", end="; ", file=sys.stderr)
        print(f"new: {n_made:,} tokens, {made:,.0f} a second", file=sys.stderr)


def read_prompt(args, folder):
    """The prompt: as given, of a file or a pipe (without the last line end), or one that suits the data."""
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file:
        return Path(args.prompt_file).read_text(**PLAIN).removesuffix("\n")
    piped = ""
    if sys.stdin and not sys.stdin.isatty():
        if os.name == "nt" or select.select([sys.stdin], [], [], PIPE_SECONDS)[0]:
            piped = sys.stdin.read().removesuffix("\n")
        else:
            print(f"no prompt came in {PIPE_SECONDS} s; --prompt-file /dev/stdin waits", file=sys.stderr)
    suits = (prompt for name, prompt in PROMPTS.items() if folder.resolve().name.startswith(name))
    return piped or next(suits, "")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Text from a model.")
    add = parser.add_argument
    add("--model", metavar="DIR", help="model folder (the newest under out/)")
    add("-n", type=int, default=1, help="number of samples (1)")
    add("--max-new-tokens", type=int, default=256, help="length of a sample (256)")
    group = parser.add_argument_group("what to go on with")
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", help="a text; an empty one begins a new document (what suits the data)")
    add("--prompt-file", metavar="FILE", help="a file with the text; a text may also come from a pipe")
    add("--chat", action="store_true", help="what you type, in turns")
    add("--prompts", metavar="FILE", help="many: .txt, one a line, or .jsonl with `prompt` or `messages`")
    add = group.add_argument
    add("--output", metavar="FILE", help="the .jsonl for their answers; the same command again goes on")
    add("--batch-size", type=int, default=16, help="prompts at a time (16)")
    add = parser.add_argument_group("how a token is drawn").add_argument
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    add("--top-k", type=int, default=0, help="from the k likeliest tokens only (0: from all)")
    add("--top-p", type=float, default=0.9, help="from the likeliest tokens that reach this in sum (0.9)")
    add("--min-p", type=float, default=0.0, help="from those of this share of the likeliest one's (0)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: less of what was there (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    add("--seed", type=int, default=0, help="equal seeds draw equal samples (0)")
    add = parser.add_argument_group("speed").add_argument
    add("--draft", metavar="DIR", help="a smaller model with the same tokenizer, which guesses ahead")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (as in the file)")
    add("--compile", action="store_true", help="fuse kernels: a wait that pays in long runs on a GPU")
    add("--device", help="cpu, cuda or mps (the fastest that there is)")
    args = parser.parse_args()
    if args.n < 1 or args.max_new_tokens < 1 or args.batch_size < 1 or not 0 <= args.seed < 2**63:
        raise ValueError("-n, --max-new-tokens, --batch-size must be at least 1, --seed from 0 to 2^63 - 1")
    if "" in args.stop:
        raise ValueError("a --stop without text would end every text at once")
    if bool(args.prompts) != bool(args.output):
        raise ValueError("--prompts FILE and --output FILE go together")
    if (args.n > 1 or args.draft) and (args.prompts or args.chat):
        raise ValueError("-n and --draft are for one prompt, not for --prompts or --chat")
    if args.draft and (args.n > 1 or args.compile or args.repetition_penalty != 1):
        raise ValueError("--draft does not go with -n, --compile or --repetition-penalty")
    return args


def main():
    args = parse_arguments()
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")  # no odd character should end a text
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    sampling |= dict(repetition_penalty=args.repetition_penalty)
    Sampling(**sampling)  # a mistake should not have to wait for the model
    folder = Path(args.model) if args.model else newest_model()
    device = choose_device(args.device)
    if device == "cuda":  # of several processes, each takes its own
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # streams and graphs are those of the current one
    if args.compile and device == "cpu":
        raise ValueError("--compile makes decoding slower on a CPU: leave it out")
    dtype = args.dtype and getattr(torch, args.dtype)
    model, tokenizer = load(folder, device, dtype)
    ends, context = end_ids(folder, tokenizer), model.config.block_size
    print(f"{os.path.relpath(folder)}: {model.config.num_params():,} parameters", file=sys.stderr)
    settings = dict(max_new_tokens=args.max_new_tokens, seed=args.seed, vocab_size=tokenizer.vocab_size)
    settings |= sampling | (dict(mode="compile") if args.compile else {})
    if args.chat:
        return converse(model, tokenizer, folder, ends, stops=args.stop, **settings)
    go_on = partial(generate, model, stop_ids=ends, **settings)
    if args.prompts:
        file = Path(args.output).resolve()
        return answer_file(model, tokenizer, args.prompts, file, args.batch_size, go_on, args.seed, args.stop)
    if args.draft:
        draft, its_tokenizer = load(args.draft, device, dtype)
        if its_tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{args.draft} has another vocabulary than {folder}: its guesses are of no use")
        go_on = partial(speculate, model, draft=draft, stop_ids=ends, **settings)
    else:
        go_on = partial(go_on, n_samples=args.n)
    prompt = read_prompt(args, folder)
    ids = to_prompt(tokenizer, prompt)
    if len(ids) > context:
        print(f"the prompt has {len(ids):,} tokens: it is cut to its last {context:,}", file=sys.stderr)
    show_samples(tokenizer, prompt, ids[-context:], go_on, args.stop)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
