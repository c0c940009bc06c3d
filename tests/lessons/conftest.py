"""Lessons are printed as pages of a book, `pytest tests/lessons -s`."""

import inspect
import textwrap

import pytest
import torch

from model import Transformer

from . import book, index


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
    """Print the question, then what the lesson prints, then what that shows."""
    question, answer, rest = inspect.getdoc(item.function).split("\n\n")
    number = [other for other in item.session.items if other.path == item.path].index(item) + 1
    topic = item.path.stem.removeprefix("test_")
    print(f"\n\n{topic} {number}. {' '.join(question.split())}\n")
    torch.manual_seed(0)
    result = yield
    print(f"\n  = {index.claim(item.name)}")
    for text in (answer, rest.partition("Code: ")[0]):  # and what is often told instead
        print(textwrap.indent(textwrap.fill(" ".join(text.split()), 100), "    "))
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
    """A model that read the speech, a character at a time, 120 batches long: it knows hardly more than which
    letter follows which.
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
