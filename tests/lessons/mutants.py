"""Does each lesson fail when what it teaches is broken? Apply its line `Break:` to a copy, and run it there.

python tests/lessons/mutants.py              all of them
python tests/lessons/mutants.py WORD...      those whose names contain one of the words

A lesson that still passes, or that fails by anything but its own assertion, is an error.
"""

import ast
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401, imported once: every lesson runs in a process forked from this one
import transformers  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent))
import index  # noqa: E402

ROOT = index.HERE.parent.parent
COPIED = ("*.py", "data/*.py", "tests/conftest.py", "tests/lessons/*.py", "pyproject.toml")
LIMIT = 120  # seconds for one lesson
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # lessons need none, and some take seconds to load


def break_line(folder, change):
    """Make the change in the copy of the project."""
    file, name, old, new = change
    path = folder / file
    source = path.read_text(encoding="utf-8")
    node = ast.parse(source)
    for part in name.split("."):
        found = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
        if not found:
            raise ValueError(f"{file} has no {name}")
        node = found[0]
    lines = source.splitlines(keepends=True)
    text = "".join(lines[node.lineno - 1 : node.end_lineno])
    if text.count(old) != 1:
        raise ValueError(f"{file} {name} has {text.count(old)} times {old!r}, not once")
    before, after = "".join(lines[: node.lineno - 1]), "".join(lines[node.end_lineno :])
    path.write_text(before + text.replace(old, new) + after, encoding="utf-8")


class Outcome:
    """A plugin of pytest: how the only test ended."""

    def __init__(self):
        self.error = None
        self.ran = False

    def pytest_runtest_makereport(self, item, call):
        if call.when == "call":
            self.ran = True
        if call.excinfo and self.error is None:
            self.error = call.excinfo.value


def too_slow(number, frame):
    raise TimeoutError(f"still running after {LIMIT} seconds")


def run(lesson):
    """-> (name, None if the lesson failed as it should, else what is wrong, seconds)."""
    started = time.monotonic()
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(LIMIT)
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        folder = Path(folder)
        for pattern in COPIED:
            for path in ROOT.glob(pattern):
                copy = folder / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        try:
            break_line(folder, lesson.change)
        except ValueError as error:
            return lesson.name, str(error), time.monotonic() - started
        os.chdir(folder)
        sys.dont_write_bytecode = True
        test = f"tests/lessons/test_{lesson.topic}.py::{lesson.name}"
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            # with -s a lesson prints its page, and what it prints is not compared with the book
            pytest.main(["-s", "-p", "no:cacheprovider", test], plugins=[outcome])
        os.chdir(ROOT)
    error = outcome.error
    if not outcome.ran:
        problem = f"does not run: {error}"
    elif error is None:
        problem = "passes all the same"
    elif not isinstance(error, AssertionError | pytest.fail.Exception):
        problem = f"fails by {type(error).__name__}: {error}"
    else:
        problem = None
    return lesson.name, problem, time.monotonic() - started


def run_all(lessons):
    """Yield what `run` returns for each, in a process of its own."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        yield from pool.imap(run, lessons, chunksize=1)


def main():
    words = sys.argv[1:]
    chosen = [lesson for topic in index.TOPICS for lesson in index.lessons(topic) if lesson.change]
    if words:
        chosen = [lesson for lesson in chosen if any(word in lesson.name for word in words)]
    if not chosen:
        sys.exit(f"no lesson with a line Break has {' or '.join(words)} in its name")
    wrong = 0
    for name, problem, seconds in run_all(chosen):
        if problem is None:
            print(f"{seconds:4.1f} s  fails, as it should  {name}", flush=True)
        else:
            print(f"{seconds:4.1f} s  WRONG                {name}\n        {problem}", flush=True)
            wrong += 1
    print(f"{len(chosen)} lessons with a broken line: {len(chosen) - wrong} fail as they should")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
