"""The list of all lessons, made from their names and docstrings.

python tests/lessons/index.py > tests/lessons/README.md
"""

import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOPICS = ("attention", "positions", "norms", "activations", "tokenizers", "masks", "decoding", "training")
TOPICS += ("finetuning", "memory", "architectures", "inspection")
# names as they are written outside of a function's name
WORDS = (
    "Adam AdaLoRA ALiBi BatchNorm BERT BPE DeepNorm DPO FlashAttention FLOPs GEGLU GELU KV LayerNorm Llama "
    "LoRA MLP Muon NF4 Phi PPO ReLU RMSNorm RoPE SFT SGD SentencePiece SwiGLU V WordPiece YOCO byte-level "
    "fine-tuning grouped-query micro-batches multi-head position-wise post-norm pre-norm top-k top-p"
    " thirty-two"
)


PREFACE = """\
Letters: B texts at a time, T tokens in each, C channels of a token's vector (the width of the model), H heads
of width D, K heads of keys and values, L layers, V tokens in the vocabulary; W a matrix of weights, p a
probability, lr the learning rate; ln is the natural logarithm, a nat its unit. The stream is the vector of
each token on its way through the blocks; scores (logits) are what the softmax makes probabilities of.

"Often told" is an answer that goes round, and is wrong or half of the truth."""


def claim(name):
    """The name of a lesson as a sentence."""
    text = name.removeprefix("test_").replace("_", " ")
    for word in WORDS.split():
        text = re.sub(rf"\b{word.lower().replace('-', ' ')}\b", word, text)
    return f"{text[0].upper()}{text[1:]}."


def lessons(topic):
    """(question, name of the test, "FILE NAME" of the code that it is about) of each lesson."""
    tree = ast.parse((HERE / f"test_{topic}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            question, _, rest = ast.get_docstring(node).split("\n\n")
            code = re.search(r"^Code: (\S+ \S+)$", rest, re.MULTILINE)[1]
            yield " ".join(question.split()), node.name, code


def write():
    """The text of tests/lessons/README.md."""
    lines = [
        "# Questions and answers",
        "",
        "Each has a test that runs, prints its numbers, and fails if the claim in its name is false; what it",
        "says beyond that rests on the source that it names. `pytest tests/lessons -s` prints them all as a",
        "book, `pytest tests/lessons -s -k NAME` a page of it.",
        "",
        PREFACE,
    ]
    for topic in TOPICS:
        title = ast.get_docstring(ast.parse((HERE / f"test_{topic}.py").read_text(encoding="utf-8")))
        lines += ["", f"## {title.removesuffix('.')}", ""]
        for question, name, code in lessons(topic):
            file, _ = code.split()
            links = f"[{code}](../../{file}), [{name}](test_{topic}.py)"
            lines.append(f"- **{question}** {claim(name)} {links}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(write(), end="")
