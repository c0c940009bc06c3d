"""The book of tests/lessons: it is whole, it says what the lessons print, and the lessons can fail."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from lessons import index

KNOWN = index.all_lessons()
BOOK = index.HERE / "README.md"
MEND = "run python tests/lessons/index.py"


def test_the_book_is_what_the_lessons_say():
    """That the tables are what the lessons print, each lesson compares as it runs."""
    printed = index.read_printed()
    assert printed.keys() == KNOWN.keys(), MEND
    assert BOOK.read_text(encoding="utf-8") == index.write(printed), MEND
    assert (index.HERE / "README.zh.md").read_text(encoding="utf-8") == index.write_chinese(), MEND


def test_the_book_is_short_enough_to_be_shown_whole():
    assert BOOK.stat().st_size < 500 * 1024, "GitHub cuts a README there"


def test_every_file_of_lessons_is_a_topic():
    assert {f"test_{topic}.py" for topic in index.TOPICS} == {p.name for p in index.HERE.glob("test_*.py")}


def test_the_path_has_five_sittings_of_six_lessons():
    names = [name for sitting in index.SITTINGS for name in sitting.names]
    assert [len(sitting.names) for sitting in index.SITTINGS] == 5 * [6]
    assert len(set(names)) == 30 and {f"test_{name}" for name in names} <= KNOWN.keys()


def test_every_picture_is_of_a_lesson_that_draws():
    drawing = set()
    for lesson in KNOWN.values():
        if any(f"\n{kind}(" in f"\n{lesson.body}" for kind in ("lines", "bars", "squares")):
            drawing.add(f"{lesson.name}.svg")
    assert {path.name for path in index.PICTURES.iterdir()} == drawing, MEND
    assert len(drawing) >= 12


def test_numbers_and_what_models_write_may_differ_between_machines():
    same = index.without_numbers("a  0.25   1 2 3\n'der Text' yes")
    assert same == index.without_numbers("a 3e-07 7 8\n'text' yes")
    assert same != index.without_numbers("a 0.25 1 2 3\n'text' no")
    assert index.without_numbers("Adam's step is Muon's") == "Adam's step is Muon's"


DOCSTRING = """\
Why?

Because.

Code: model.py MLP
Break: model.py MLP: `a` becomes `b`
Source: B
问: 为何？
答: 因此。"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("Because.\n\n", "", "three paragraphs"),
        ("Code: model.py MLP\n", "", "either Code and Break, or Compare"),
        ("Break: model.py MLP: `a` becomes `b`\n", "", "either Code and Break, or Compare"),
        ("`a` becomes `b`", "`a` -> `b`", "not FILE NAME: `OLD` becomes `NEW`"),
        ("Source: B\n", "", "without Source"),
        ("\n答: 因此。", "", "without 答"),
    ],
)
def test_what_a_docstring_lacks_is_named(old, new, problem):
    assert index.read_docstring(DOCSTRING)[2]["答"] == "因此。"
    assert old in DOCSTRING
    with pytest.raises(ValueError, match=problem):
        index.read_docstring(DOCSTRING.replace(old, new))


def test_chinese_lines_are_joined_without_a_space():
    joined = index.join("注意力中的\n    点积除以\n    sqrt(D)，\n    D 是宽度")
    assert joined == "注意力中的点积除以 sqrt(D)，D 是宽度"


def test_a_lesson_alone_is_printed_as_its_page_of_the_book():
    lesson = KNOWN["test_masking_is_minus_infinity_before_the_softmax"]
    program = [sys.executable, "-m", "pytest", "-s", "tests/lessons/test_masks.py", "-k", lesson.name]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    settings = dict(capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env=environment)
    printed = subprocess.run(program, **settings).stdout
    before, table, after = printed.partition(index.read_printed()[lesson.name].splitlines()[0])
    assert table and before.rstrip().endswith(f"masks {lesson.number}. {lesson.question}")
    assert f"= {index.claim(lesson.name)}" in after and lesson.answer[:40] in after


def test_what_looks_like_html_stays_text():
    assert index.as_markdown("<unk> a < b <|im_end|> x <- y") == r"\<unk> a < b <|im_end|> x <- y"


# --- broken on purpose ---

SAMPLE = (  # one for each file that lessons break
    "scaling_by_sqrt_d_keeps_the_variance_of_scores_at_one",
    "bpe_merges_the_most_frequent_pair_of_neighbours",
    "n_small_steps_of_sgd_are_nearly_one_step_of_n_times_the_rate",
    "greedy_is_the_limit_of_temperature_and_of_top_k",
    "lora_starts_as_the_base_model_and_merges_into_a_plain_one",
    "sft_learns_the_next_token_of_answers_only",
)
USELESS = (  # changes in model.py Block that do not break the lesson on RMSNorm, or not as they should
    "`self, config` becomes `self, config, unused=None`",
    "`super().__init__()` becomes `raise KeyError(1)`",
    "`no such text` becomes `x`",
)
PROGRAM = """
import json, sys
from dataclasses import replace
sys.path.insert(0, "tests/lessons")
import index, mutants
sample, useless = json.loads(sys.argv[1])
known = index.all_lessons()
lessons = [known[f"test_{name}"] for name in sample]
norm = known["test_rmsnorm_drops_the_mean_and_the_bias"]
for line in useless:
    lessons.append(replace(norm, fields=norm.fields | {"Break": f"model.py Block: {line}"}))
print(json.dumps([problem for _, problem, _ in mutants.run_all(lessons)]))
"""


@pytest.fixture(scope="module")
def problems():
    """What mutants.py says of SAMPLE, and of USELESS."""
    if not hasattr(os, "fork"):
        pytest.skip("lessons run in forked processes")
    program = [sys.executable, "-c", PROGRAM, json.dumps((SAMPLE, USELESS))]
    done = subprocess.run(program, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found[: len(SAMPLE)], found[len(SAMPLE) :]


def test_lessons_fail_when_what_they_teach_is_broken(problems):
    """A sample; .ci/more tries them all."""
    assert problems[0] == len(SAMPLE) * [None]


def test_a_lesson_that_does_not_notice_is_reported(problems):
    passes, crashes, not_found = problems[1]
    assert passes == "passes all the same"
    assert crashes.startswith("fails by KeyError")
    assert not_found == "model.py Block has 0 times 'no such text', not once"
