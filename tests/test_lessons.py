"""The book of tests/lessons: it is whole, it says what the lessons print, and the lessons can fail."""

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


# --- broken on purpose; without fork, the lessons would have to import torch each ---

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="lessons run in forked processes")


@needs_fork
def test_lessons_fail_when_what_they_teach_is_broken():
    """A sample; .ci/more tries them all."""
    program = [sys.executable, str(index.HERE / "mutants.py"), *SAMPLE]
    done = subprocess.run(program, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SAMPLE)} fail as they should" in done.stdout


SAMPLE = (
    "scaling_by_sqrt_d_keeps",
    "rmsnorm_drops_the_mean",
)

HARMLESS = """
import sys
from dataclasses import replace
sys.path.insert(0, "tests/lessons")
import index, mutants
lesson = index.all_lessons()["test_rmsnorm_drops_the_mean_and_the_bias"]
changed = []
for line in ("`self, config` becomes `self, config, unused=None`",
             "`super().__init__()` becomes `raise KeyError(1)`",
             "`no such text` becomes `x`"):
    fields = lesson.fields | {"Break": f"model.py Block: {line}"}
    changed.append(replace(lesson, fields=fields))
for _, problem, _ in mutants.run_all(changed):
    print(problem)
"""


@needs_fork
def test_a_lesson_that_does_not_notice_is_reported():
    done = subprocess.run([sys.executable, "-c", HARMLESS], capture_output=True, text=True, cwd=ROOT)
    passes, crashes, not_found = done.stdout.splitlines()[-3:]
    assert passes == "passes all the same"
    assert crashes.startswith("fails by KeyError")
    assert not_found == "model.py Block has 0 times 'no such text', not once"
