"""The default fine-tuning examples: small questions about Python whose answers can be checked.

    args   List the arguments of: def insort(a, x, lo=0, hi=None):      a, x, lo, hi
    call   Write a call of: def insort(a, x, lo=0, hi=None):            insort(a, x, lo, hi)
    init   Write the assignments of: def __init__(self, path, *, n=1):  self.path = path, and a line for n
    fix    Fix this line: for i in range(3)                             for i in range(3):

They are cut with `ast` from the functions and lines of the standard library, as data/prepare.py splits it:
what it holds out for validation gives dev.jsonl and test.jsonl. So a model that was trained on the rest has
seen none of their functions. finetune.py writes them if they are missing; its --dry-run shows one.
"""

import ast
import io
import json
import os
import platform
import random
import tokenize
import warnings
from collections import Counter, defaultdict
from contextlib import suppress

from data.prepare import DATA, Split, find_documents, stdlib_files

FOLDER = DATA / f"tasks-{platform.python_version()}"  # each version has another standard library
FEW, MANY = 4, ", many"  # parameters; questions about more are channels of their own, such as "args, many"
LONGEST = 60  # characters of a line or a signature; of many parameters, twice as many
SIZES = {"train": 16_000, "dev": 200, "test": 250}  # examples of a channel at most
FIX = "Fix this line: "
CLOSING = {"(": ")", "[": "]", "{": "}"}
KEYWORDS = ("if", "elif", "for", "while", "with", "def", "class", "except", "async", "case", "match")


# --- questions about a signature ---


def parameters(function):
    """The parameters of an ast.FunctionDef in their order, as a list of ast.arg."""
    a = function.args
    starred, starred_twice = filter(None, [a.vararg]), filter(None, [a.kwarg])
    return [*a.posonlyargs, *a.args, *starred, *a.kwonlyargs, *starred_twice]


def ask_about(function):
    """Yield (channel, question, answer) about the signature of an ast.FunctionDef."""
    a, found = function.args, parameters(function)
    signature = f"{function.name}({ast.unparse(a)})"
    if not found or len(signature) > LONGEST * (1 + (len(found) > FEW)):
        return
    stars = {a.vararg: "*", a.kwarg: "**"}
    names = [stars.get(arg, "") + arg.arg for arg in found]
    many = MANY if len(names) > FEW else ""
    passed = [f"{arg.arg}={arg.arg}" if arg in a.kwonlyargs else name for arg, name in zip(found, names)]
    bound = names[0] in ("self", "cls")
    call = f"{function.name}({', '.join(passed[bound:])})"
    if bound:
        call = f"{names[0]}.{call}"
    yield "call" + many, f"Write a call of: def {signature}:", call
    assigned = [arg.arg for arg in found[bound:]]
    if assigned:
        yield "args" + many, f"List the arguments of: def {signature}:", ", ".join(names)
    if assigned and names[0] != "cls":
        own = "" if bound else "self, "
        lines = "\n".join(f"self.{name} = {name}" for name in assigned)
        yield "init" + many, f"Write the assignments of: def __init__({own}{ast.unparse(a)}):", lines


def rename(function, names, dice):
    """Give a function and its parameters, but for self and cls, other names."""
    found = [arg for arg in parameters(function) if arg.arg not in ("self", "cls")]
    function.name, *others = dice.sample(names, 1 + len(found))
    for arg, name in zip(found, others):
        arg.arg = name


# --- lines with a mistake ---


def whole_lines(tree, text):
    """Yield the lines that are a simple statement, or the head of a compound one."""
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.ExceptHandler)):
            line = lines[node.lineno - 1].strip()
            whole = line.endswith(":") if hasattr(node, "body") else node.lineno == node.end_lineno
            if whole and len(line) <= LONGEST and line.isascii() and not {"#", ";"} & set(line):
                yield line


def damage(line, dice):
    """The line without its last colon or without a closing bracket; None: it has neither."""
    tokens, closing = tokenize.generate_tokens(io.StringIO(line).readline), []
    with suppress(tokenize.TokenError, SyntaxError):  # the block that a head begins does not come
        closing += [t.start[1] for t in tokens if t.type == tokenize.OP and t.string in ")]}"]
    if line.endswith(":") and (not closing or dice.random() < 0.3):
        return line[:-1]
    if not closing:
        return None
    at = dice.choice(closing)
    return line[:at] + line[at + 1 :]


def answer_by_rule(question):
    """What a simple rule answers to "fix", the yardstick for a model; nothing to other questions."""
    line = question.removeprefix(FIX)
    if line == question:
        return ""
    if line.split(" ")[0] in KEYWORDS:
        return line + ":"
    missing = []
    for c in line:
        if c in CLOSING:
            missing.append(CLOSING[c])
        elif missing and c == missing[-1]:
            missing.pop()
    return line + (missing or ")")[-1]


# --- files of examples ---


def split_files():
    """{"train", "dev", "test": paths}: the files that pretraining holds out are for dev and test."""
    files, split = list(stdlib_files()), Split(find_documents(["pystdlib"], None, Counter())())
    held_out = sorted((b, path) for b, path in zip(split.buckets, files) if b in split.held_out)
    dev = [path for _, path in held_out[::3]]
    test = [path for _, path in held_out if path not in dev]
    train = [path for path in files if path not in dev + test]
    return {"train": train, "dev": dev, "test": test}


def cut_examples(paths, dice, n_lines, renamed):
    """Yield (channel, question, answer) of files, of n_lines lines; renamed: with other names, too."""
    functions, lines = [], {}
    for path in paths:
        text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            tree = ast.parse(text)
        functions += [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        lines |= dict.fromkeys(whole_lines(tree, text))
    dice.shuffle(functions)
    for arg in (arg for function in functions for arg in parameters(function)):
        arg.annotation = None
    for function in functions:
        yield from ask_about(function)
    if renamed:
        names = {arg.arg for function in functions for arg in parameters(function)}
        names = sorted((names | {function.name for function in functions}) - {"self", "cls"})
        for function in functions:
            rename(function, names, dice)
            yield from ask_about(function)
    heads, statements = ([line for line in lines if line.endswith(":") == head] for head in (True, False))
    lines = dice.sample(heads, min(2 * n_lines // 3, len(heads)))
    lines += dice.sample(statements, min(n_lines // 3, len(statements)))
    for line in dice.sample(lines, len(lines)):
        if damaged := damage(line, dice):
            yield "fix", FIX + damaged, line


def converse(*examples):
    """Examples as one conversation, as they follow each other in a chat."""
    turns = [(("user", example["prompt"]), ("assistant", example["completion"])) for example in examples]
    messages = [{"role": role, "content": content} for turn in turns for role, content in turn]
    return {"messages": messages, "channel": "dialogue"}


def size(*examples):
    """Characters of some examples."""
    return sum(len(example["prompt"] + example["completion"]) for example in examples)


def write_tasks(folder=FOLDER):
    """Write the three files and return their folder. No question is in two of them, or twice in one."""
    dice, asked = random.Random(0), set()
    folder.mkdir(parents=True, exist_ok=True)
    for split, paths in split_files().items():
        found, limit = defaultdict(list), SIZES[split]
        for channel, question, answer in cut_examples(paths, dice, 2 * limit, split == "train"):
            unique = answer if channel == "fix" else question  # a line is damaged in one way only
            if unique not in asked and len(found[channel]) < limit:
                asked.add(unique)
                found[channel].append({"prompt": question, "completion": answer, "channel": channel})
        examples = sum(found.values(), [])
        dice.shuffle(examples)
        if split == "train":
            pairs = [pair for pair in zip(examples, examples[1:]) if size(*pair) < 4 * LONGEST]
            found["dialogue"] = [converse(*pair) for pair in pairs[: SIZES["train"]]]
            examples += found["dialogue"]
            dice.shuffle(examples)
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        unfinished = folder / f"{split}.unfinished"
        unfinished.write_text(lines, encoding="utf-8")
        os.replace(unfinished, folder / f"{split}.jsonl")
        counts = ", ".join(f"{channel} {len(found[channel]):,}" for channel in sorted(found))
        print(f"{os.path.relpath(folder)}/{split}.jsonl: {len(examples):,} examples ({counts})")
    return folder


def find_tasks():
    """Write the tasks if they are missing; warn if a model may have seen the test."""
    if not (FOLDER / "test.jsonl").exists():  # which is written last
        write_tasks()
    with suppress(FileNotFoundError):
        trained_on = json.loads((DATA / "pystdlib/meta.json").read_bytes())
        if trained_on.get("python") != platform.python_version():
            print(f"data/pystdlib is of another Python than {FOLDER.name}: a model of it may know the test")
