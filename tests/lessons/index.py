"""Publish the lessons as a book: run them all, then write README.md, README.zh.md and pictures/ beside it.

python tests/lessons/index.py

A lesson is a test. Its docstring is a page: the question, the answer, then lines that begin with these words:

    Often told: an answer that goes round, and is wrong or half of the truth (may be missing)
    Code: FILE NAME                        where the thing stands in this project, and with it
    Break: FILE NAME: `OLD` becomes `NEW`  a change that makes the lesson fail (mutants.py tries them all)
    Compare: FILE NAME: WORDS              instead of both: what stands there in place of the thing
    Source: where to read on
    问:  the question in Chinese, and 答: its answer in one or two sentences
"""

import ast
import contextlib
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PICTURES = HERE / "pictures"

# topic -> its name in English and in Chinese; the file is test_TOPIC.py
TOPICS = {
    "attention": ("Attention", "注意力"),
    "positions": ("Positions", "位置编码"),
    "norms": ("Norms and residual connections", "归一化与残差连接"),
    "activations": ("Activations and the MLP", "激活函数与前馈网络"),
    "tokenizers": ("Tokenizers and embeddings", "分词器与词嵌入"),
    "masks": ("Masks and padding", "掩码与填充"),
    "decoding": ("Decoding", "解码与采样"),
    "training": ("Training", "训练"),
    "finetuning": ("Fine-tuning", "微调与偏好学习"),
    "memory": ("Memory and speed", "显存与速度"),
    "architectures": ("Architectures", "模型结构"),
    "inspection": ("Inspection", "观察模型内部"),
}


@dataclass
class Sitting:
    """An hour: a command to begin with, and six lessons to read and to break."""

    title: str
    words: str
    command: str  # or several lines
    names: tuple[str, ...]  # of the lessons, without "test_"


SITTINGS = (
    Sitting(
        "Text",
        "How a text becomes numbers, and how losses compare if tokenizers differ.",
        "python tokenizer.py train model.py train.py --vocab-size 1024 --out out/tokenizer.json\n"
        'python tokenizer.py show out/tokenizer.json "def read(self, path):"',
        (
            "bpe_merges_the_most_frequent_pair_of_neighbours",
            "merges_stay_within_the_chunks_into_which_a_text_is_cut",
            "a_byte_level_vocabulary_has_no_unknown_token",
            "a_larger_vocabulary_shortens_the_text_by_less_and_less",
            "an_id_is_a_label_and_its_embedding_a_row",
            "models_with_different_tokenizers_compare_in_bits_per_byte",
        ),
    ),
    Sitting(
        "The block",
        "What one layer computes. The command takes 1/sqrt(D) out of attention: the lesson notices.",
        "python tests/lessons/mutants.py scaling_by_sqrt_d",
        (
            "scaling_by_sqrt_d_keeps_the_variance_of_scores_at_one",
            "masking_is_minus_infinity_before_the_softmax",
            "grouped_query_attention_is_multi_head_attention_with_shared_keys_and_values",
            "rope_scores_depend_only_on_the_offset",
            "residual_connections_keep_the_gradient_and_the_tokens_apart_at_any_depth",
            "swiglu_and_geglu_change_the_function_of_the_gate",
        ),
    ),
    Sitting(
        "Training",
        "How the weights are learned. The command trains for three minutes: read meanwhile.",
        "python train.py",
        (
            "cross_entropy_is_minus_log_probability_and_starts_at_ln_v",
            "one_pass_over_a_text_predicts_the_same_as_a_pass_for_each_of_its_beginnings",
            "the_first_steps_of_adam_ignore_the_size_of_the_gradient",
            "a_falling_rate_lowers_the_noise_floor",
            "muon_gives_every_direction_of_a_gradient_nearly_the_same_size",
            "micro_batches_must_be_weighted_by_their_tokens",
        ),
    ),
    Sitting(
        "Writing",
        "How scores become text. Open the page that the command writes, and type.",
        'python tests/lessons/xray.py --model out/pystdlib --prompt "def read(self, path):"',
        (
            "greedy_is_the_limit_of_temperature_and_of_top_k",
            "top_k_keeps_a_fixed_number_and_top_p_adapts",
            "greedy_decoding_ends_in_a_loop",
            "beam_search_finds_what_greedy_decoding_misses",
            "cached_decoding_gives_the_same_scores_for_far_fewer_flops",
            "running_beyond_the_trained_length_hurts",
        ),
    ),
    Sitting(
        "Teaching",
        "How a model that continues text becomes one that answers, and what it forgets.",
        "python finetune.py && python sample.py --chat",
        (
            "sft_learns_the_next_token_of_answers_only",
            "one_pass_trains_every_turn_of_a_conversation",
            "fine_tuning_forgets_and_replay_prevents_most_of_it",
            "lora_starts_as_the_base_model_and_merges_into_a_plain_one",
            "dpo_starts_at_ln_2_and_learns_most_from_pairs_in_the_wrong_order",
            "a_reward_that_can_be_gamed_is_gamed",
        ),
    ),
)

# names as they are written outside of a function's name
WORDS = (
    "Adafactor Adam AdamW AdaLoRA ALiBi BatchNorm BERT BPE-dropout BPE DeepNorm DPO FlashAttention FLOPs "
    "GEGLU GELU GPT-1 GPT-2 KV L2 LayerNorm Llama LoRA MLP Muon NF4 NaN Phi PPO QLoRA Qwen2 ReLU RMSNorm RNN "
    "RoPE SFT SGD SentencePiece SiLU SwiGLU Transformer Unigram V WordPiece YOCO byte-level "
    "cross-attention fine-tuning grouped-query micro-batches multi-head position-wise post-norm pre-norm "
    "short-sighted top-k top-p two-way Gumbel n-grams"
)

PREFACE = """\
Letters: B texts at a time, T tokens in each, C channels of a token's vector (the width of the model), H heads
of width D, K heads of keys and values, L layers, V tokens in the vocabulary; W a matrix of weights, p a
probability, lr the learning rate; ln is the natural logarithm, a nat its unit. The stream is the vector of
each token on its way through the blocks; the softmax turns scores (logits) into probabilities. The code of
a page uses helpers from book.py and from the top of its own file.

"Often told" is a common answer that is wrong or half of the truth."""

# --- reading the lessons ---

FIELDS = ("Often told", "Code", "Break", "Compare", "Source", "问", "答")
BREAK = re.compile(r"(\S+) (\S+): `(.+?)` becomes `(.*?)`")
COMPARE = re.compile(r"(\S+) (\S+): (.+)")
MARKS = "[\u3000-\u303f\uff00-\uffef]"  # Chinese punctuation
WIDE = "[\u3000-\u9fff\uff00-\uffef]"  # and characters


@dataclass
class Lesson:
    """A test and its docstring."""

    topic: str
    number: int  # within its topic
    name: str  # of the test
    body: str  # of the test, without its docstring
    question: str
    answer: str
    fields: dict[str, str]

    @property
    def change(self):
        """(file, name in it, old text, new text) of the line Break, or None."""
        return BREAK.fullmatch(self.fields["Break"]).groups() if "Break" in self.fields else None


def join(text):
    """A paragraph on one line; Chinese has no spaces between its words, nor beside its punctuation."""
    text = " ".join(text.split())
    text = re.sub(rf"(?<={WIDE}) (?={WIDE})", "", text)
    return re.sub(rf"(?<={MARKS}) | (?={MARKS})", "", text)


def read_docstring(docstring):
    """-> question, answer, fields. ValueError says what is missing."""
    parts = docstring.split("\n\n")
    if len(parts) != 3:
        raise ValueError("a lesson has three paragraphs: question, answer, and lines such as Code and Source")
    words = "|".join(FIELDS)
    found = re.split(rf"^({words}): ?", parts[2], flags=re.MULTILINE)
    fields = {name: join(text) for name, text in zip(found[1::2], found[2::2])}
    if found[0].strip():
        raise ValueError(f"does not begin with one of {FIELDS}: {found[0].strip()!r}")
    if ("Compare" in fields) == ("Code" in fields) or ("Code" in fields) != ("Break" in fields):
        raise ValueError("a lesson has either Code and Break, or Compare")
    if "Break" in fields and not BREAK.fullmatch(fields["Break"]):
        raise ValueError(f"not FILE NAME: `OLD` becomes `NEW`: {fields['Break']}")
    if "Compare" in fields and not COMPARE.fullmatch(fields["Compare"]):
        raise ValueError(f"not FILE NAME: WORDS: {fields['Compare']}")
    missing = {"Source", "问", "答"} - fields.keys()
    if missing:
        raise ValueError(f"without {', '.join(sorted(missing))}")
    return join(parts[0]), join(parts[1]), fields


def lessons(topic):
    """All lessons of a topic, in the order of their file."""
    path = HERE / f"test_{topic}.py"
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        try:
            question, answer, fields = read_docstring(ast.get_docstring(node))
        except ValueError as error:
            raise ValueError(f"{path.name} {node.name}: {error}") from None
        body = textwrap.dedent("\n".join(lines[node.body[0].end_lineno : node.end_lineno])).strip("\n")
        found.append(Lesson(topic, len(found) + 1, node.name, body, question, answer, fields))
    return found


def all_lessons():
    """{name of the test: lesson}, by topic."""
    return {lesson.name: lesson for topic in TOPICS for lesson in lessons(topic)}


def claim(name):
    """The name of a lesson as a sentence."""
    text = name.removeprefix("test_").replace("_", " ")
    text = re.sub(r"\bsqrt (\w)\b", r"sqrt(\1)", text)
    for word in WORDS.split():
        text = re.sub(rf"\b{word.lower().replace('-', ' ')}\b", word, text)
    return f"{text[0].upper()}{text[1:]}."


# --- writing the book ---


def link(file, name):
    return f"[{file} {name}](../../{file})"


def as_markdown(text):
    """Text that holds something like <unk>, which would be read as HTML."""
    return re.sub(r"<(?=[a-zA-Z/!])", r"\\<", text)


def exercise(lesson):
    """The line of a page that sends the reader to the code."""
    if lesson.change is None:
        file, name, words = COMPARE.fullmatch(lesson.fields["Compare"]).groups()
        return f"**Compare** with {link(file, name)}: {words.rstrip('.')}."
    file, name, old, new = lesson.change
    change = f"`{old}` becomes `{new}`" if new else f"`{old}` goes"
    run = f"`pytest tests/lessons -s -k {lesson.name.removeprefix('test_')}`"
    return f"**Break it.** In {link(file, name)}, {change}. Predict what the table will show, then run {run}."


def page(lesson, printed):
    """A lesson as Markdown. printed: what it prints."""
    title, _ = TOPICS[lesson.topic]
    parts = [
        f'<a id="{lesson.name}"></a>',
        f"### {title} {lesson.number}. {as_markdown(lesson.question)}",
        f"```text\n{textwrap.dedent(printed).strip()}\n```",
        f"**{claim(lesson.name)}** {as_markdown(lesson.answer)}",
    ]
    if (PICTURES / f"{lesson.name}.svg").exists():
        parts.insert(3, f"![{claim(lesson.name)}](pictures/{lesson.name}.svg)")
    if "Often told" in lesson.fields:
        parts.append(f"*Often told:* {as_markdown(lesson.fields['Often told'])}")
    parts += [
        f"<details><summary>The code</summary>\n\n```python\n{lesson.body}\n```\n\n</details>",
        exercise(lesson),
    ]
    source = f"Source: {lesson.fields['Source'].rstrip('.')}."
    if lesson.change and lesson.fields["Code"] != " ".join(lesson.change[:2]):
        source += f" See {link(*lesson.fields['Code'].split())}."
    parts.append(f"{source} This page is [{lesson.name}](test_{lesson.topic}.py).")
    return "\n\n".join(parts)


def write(printed):
    """The text of README.md. printed: {name of a lesson: what it prints}."""
    known = all_lessons()
    n_broken = sum(lesson.change is not None for lesson in known.values())
    parts = [
        "# Questions and answers",
        join(
            f"""{len(known)} questions about how language models work and why. Each has a test, which prints
            the numbers shown here and fails if the sentence in bold is false; what is said beyond that rests
            on the source that is named. {n_broken} are about a line of this project: predict, break it, see
            the lesson fail, and mend it with `git checkout FILE`. `python tests/lessons/mutants.py` breaks
            them all, one by one, in copies. All of it needs `pip install -e '.[test]'`.
            [中文](README.zh.md)"""
        ),
        PREFACE,
        "## Five sittings",
        join(
            """An hour each: run the command, read six pages, and break what they are about. The rest of the
            book is for looking up."""
        ),
    ]
    for number, sitting in enumerate(SITTINGS, 1):
        names = [f"test_{name}" for name in sitting.names]
        steps = "\n".join(f"{i}. [{known[name].question}](#{name})" for i, name in enumerate(names, 1))
        parts += [f"**{number}. {sitting.title}.** {sitting.words}", f"```\n{sitting.command}\n```", steps]
    topics = ", ".join(f"[{english}](#{topic})" for topic, (english, _) in TOPICS.items())
    parts.append(f"By topic: {topics}.")
    for topic, (english, _) in TOPICS.items():
        parts += [f'<a id="{topic}"></a>', f"## {english}"]
        parts += [page(lesson, printed[lesson.name]) for lesson in known.values() if lesson.topic == topic]
    return "\n\n".join(parts) + "\n"


WHAT_IT_IS = """
五个 Python 脚本，从原始文本到会对话的语言模型，每个阶段一个文件，都能从头读到尾：手写的字节级 BPE 分词器
（tokenizer.py）、Llama 结构的 Transformer（model.py）、预训练（train.py，笔记本的 CPU 就够；GPU 的路径已经写
好，但还没有实测过）、生成与对话（sample.py）、微调（finetune.py）。代码写给学习者看，但不是玩具：词表的训练比
Hugging Face 的 Rust 实现更快；训练随时可以中断，在同一台机器上续跑，结果与不中断时逐位相同；保存的文件夹
可以直接用 transformers 打开。
[English](../../README.md)
"""
COMMANDS = """\
```
pip install -e . && python train.py
python sample.py
python finetune.py
python sample.py --chat
```"""
WHAT_THEY_DO = """
第一条从 Python 标准库的源代码学出词表，训练三分钟，得到一个一百万到五百万参数的模型，并展示它写的文字；第二条
让它继续写；第三条再用三分钟教它回答关于 Python 的问题，并统计答对了多少；第四条让你自己提问。
"""
HOW_TO_READ = """
每个问题都是一个可以运行的测试：它打印出数字作为证据，结论不成立时测试就会失败。“实验”链接到完整的英文页面，那
里有表格、代码和练习：先预测，再改坏一行代码，然后运行（需要先 `pip install -e '.[test]'`）。五个小时的学习路
线见[英文版开头](README.md#five-sittings)。
"""


def write_chinese():
    """The text of README.zh.md."""
    parts = [
        "# 一个读得懂的 GPT",
        join(WHAT_IT_IS),
        "## 四条命令",
        "在本仓库的克隆里运行（Python 3.10 或更新，不需要 GPU；先装 CPU 版 PyTorch 可以少下载几 GB）：",
        COMMANDS,
        join(WHAT_THEY_DO),
        f"## {len(all_lessons())} 个问题",
        join(HOW_TO_READ),
    ]
    for topic, (_, chinese) in TOPICS.items():
        lines = []
        for lesson in lessons(topic):
            question, answer = as_markdown(lesson.fields["问"]), as_markdown(lesson.fields["答"])
            lines.append(f"- **问：{question}** 答：{answer}[实验](README.md#{lesson.name})")
        parts += [f"### {chinese}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


# --- what the lessons print ---


def read_printed():
    """{name of a lesson: what it printed when the book was made}, from README.md."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    page = r'^<a id="(test_\w+)"></a>\n\n### [^\n]*\n\n```text\n(.*?)\n```$'
    return dict(re.findall(page, text, re.MULTILINE | re.DOTALL))


def without_numbers(printed):
    """What must be the same on every machine: all but numbers, and texts in quotes, which models write."""
    text = re.sub(r"(?<!\w)('[^'\n]*'|\"[^\"\n]*\")(?!\w)", "''", printed)  # not from Adam's to Muon's
    text = re.sub(r"[-+]?(\d[\d,]*(\.\d+)?(e[-+]?\d+)?|inf|nan)\b", "0", text)
    return re.sub(r"\b0( 0)+\b", "0", " ".join(text.split()))


class Recorder:
    """A plugin of pytest: what the lessons print and draw."""

    def __init__(self):
        self.printed, self.pictures, self.failed = {}, {}, []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        for name, value in report.user_properties:
            if name == "page":
                lesson = report.nodeid.rpartition("::")[2]
                self.printed[lesson], self.pictures[lesson] = value


def main():
    import pytest
    from pictures import draw

    recorder = Recorder()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = pytest.main(["-s", "-p", "no:cacheprovider", str(HERE)], plugins=[recorder])
    if status:
        sys.exit(f"nothing is written, since lessons fail: {' '.join(recorder.failed) or status!r}")
    PICTURES.mkdir(exist_ok=True)
    for path in PICTURES.iterdir():
        path.unlink()
    for name, pictures in recorder.pictures.items():
        for picture in pictures:
            draw(picture, PICTURES / f"{name}.svg")
    (HERE / "README.md").write_text(write(recorder.printed), encoding="utf-8")
    (HERE / "README.zh.md").write_text(write_chinese(), encoding="utf-8")


if __name__ == "__main__":
    main()
