"""Lessons are printed as pages of a book, `pytest tests/lessons -s`."""

import io
import textwrap
from contextlib import redirect_stdout
from functools import cache

import pytest
import torch

from model import Transformer

from . import book, index

lessons, printed_in_the_book = cache(index.lessons), cache(index.read_printed)


def pytest_sessionstart(session):
    if session.config.getoption("capture") == "no":
        print(f"\n{index.PREFACE}")


def pytest_collection_modifyitems(items):
    """As the index has them: attention first."""
    pages = {index.HERE / f"test_{topic}.py": i for i, topic in enumerate(index.TOPICS)}
    items.sort(key=lambda item: pages.get(item.path, -1))


def pytest_report_teststatus(report, config):
    """A page needs no dot."""
    if (
        report.when == "call"
        and report.passed
        and "lessons/" in report.nodeid
        and config.getoption("capture") == "no"
    ):
        return "passed", "", ""


@pytest.hookimpl(wrapper=True, trylast=True)  # within what captures the output
def pytest_runtest_call(item):
    """With -s: print the question, then what the lesson prints, then what that shows.

    Without -s: compare what it prints with its page in the book, but for the numbers.
    """
    topic = item.path.stem.removeprefix("test_")
    lesson = next(lesson for lesson in lessons(topic) if lesson.name == item.name)
    with_page = item.config.getoption("capture") == "no"
    if with_page:
        print(f"\n\n{topic} {lesson.number}. {lesson.question}\n")
    torch.manual_seed(0)
    book.pictures.clear()
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            result = yield
    finally:
        print(printed.getvalue())
    if not with_page:
        shown = index.without_numbers(printed_in_the_book().get(item.name, ""))
        assert index.without_numbers(printed.getvalue()) == shown, "run python tests/lessons/index.py"
    else:
        item.user_properties.append(("page", (printed.getvalue(), list(book.pictures))))  # for index.py
        print(f"  = {index.claim(item.name)}")
        print(textwrap.indent(textwrap.fill(lesson.answer, 100), "    "))
        if "Often told" in lesson.fields:
            told = f"Often told: {lesson.fields['Often told']}"
            print(textwrap.indent(textwrap.fill(told, 100), "    "))
    return result


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Small tensors gain nothing from a second thread, and numbers are the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def reader_of_the_speech(one_thread):
    """A model that read the speech, a character at a time, 120 batches long: it knows which letters follow
    each other, and some of the words. Another processor makes another model of the same kind.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = book.to_ids(book.SPEECH)

        def batch(step):
            starts = torch.randint(len(ids) - 32, (16,))
            blocks = torch.stack([ids[start : start + 33] for start in starts])
            return blocks[:, :-1], blocks[:, 1:]

        shape = dict(vocab_size=len(book.CHARACTERS), block_size=32)
        model = Transformer(book.tiny_config(**shape))
        book.train(model, batch, 120, 1e-2)
    return model.eval()
