"""What data/tasks.py promises: right answers, and questions that no model can have seen."""

import ast
import json
import random
import re
from types import MethodType, SimpleNamespace

import pytest

from data import tasks
from data.prepare import Split, find_documents
from tokenizer import WORDS_PATTERN, compile_splitter


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tasks.write_tasks(tmp_path_factory.mktemp("tasks"))
    return {path.stem: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}


def test_there_are_enough_questions_of_every_kind(written):
    assert set(written) == {"train", "dev", "test"}
    for split, least in (("train", 5000), ("dev", 50), ("test", 50)):
        for channel in ("args", "call", "init", "fix"):
            assert sum(e["channel"] == channel for e in written[split]) >= least
    few = [e for e in written["test"] if not e["channel"].endswith(", many")]
    assert len(few) >= 500


def test_no_question_of_the_test_was_seen(written):
    single = {split: [e for e in found if "prompt" in e] for split, found in written.items()}
    asked = {split: {e["prompt"] for e in found} for split, found in single.items()}
    assert all(len(asked[split]) == len(found) for split, found in single.items())
    mended = {
        split: {e["completion"] for e in found if e["channel"] == "fix"} for split, found in single.items()
    }
    assert not mended["train"] & mended["test"]
    for dialogue in (e["messages"] for e in written["train"] if "prompt" not in e):
        assert {message["content"] for message in dialogue[::2]} <= asked["train"]
    assert not asked["train"] & asked["dev"] and not (asked["train"] | asked["dev"]) & asked["test"]


def test_test_and_dev_come_from_the_files_that_pretraining_holds_out():
    files = tasks.split_files()
    split = Split(find_documents(["pystdlib"], None, tasks.Counter())())
    paths = list(tasks.stdlib_files())
    held_out = {path for b, path in zip(split.buckets, paths) if b in split.held_out}
    assert set(files["dev"]) | set(files["test"]) == held_out
    assert not set(files["dev"]) & set(files["test"])
    assert set(files["train"]) == set(paths) - held_out


def test_the_answers_are_right(written):
    """Each is checked in another way than it was made."""
    for e in written["test"] + written["dev"] + random.Random(0).sample(written["train"], 2000):
        if e["channel"] == "dialogue":
            continue
        question, answer, channel = e["prompt"], e["completion"], e["channel"].removesuffix(", many")
        if channel == "fix":
            damaged = question.removeprefix(tasks.FIX)
            assert len(damaged) == len(answer) - 1
            assert any(answer[:i] + answer[i + 1 :] == damaged for i in range(len(answer)))
            continue
        signature = question.split(": ", 1)[1]
        space = {"calls": [], "self": SimpleNamespace(), "cls": SimpleNamespace()}
        name = re.match(r"def (\w+)", signature)[1]
        names = [arg.arg for arg in ast.walk(ast.parse(signature + " pass")) if isinstance(arg, ast.arg)]
        a = ast.parse(signature + " pass").body[0].args
        starred = {arg.arg: stars for arg, stars in ((a.vararg, "*"), (a.kwarg, "**")) if arg}
        in_order = [arg.arg for arg in (*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs)]
        in_order += [a.kwarg.arg] if a.kwarg else []
        assert sorted(in_order) == sorted(names)
        if channel == "args":
            assert answer == ", ".join(starred.get(name, "") + name for name in in_order)
            assert (len(names) <= tasks.FEW) == ("many" not in e["channel"])
        elif channel == "init":
            space |= {name: name for name in names if name != "self"}
            exec(answer, space)
            assert vars(space["self"]) == {name: name for name in names if name != "self"}
        else:  # the call, made for real, passes each parameter what bears its name
            bound = in_order[0] in ("self", "cls")
            space |= {name: name for name in names if name not in ("self", "cls")}
            space |= {name: (name,) if stars == "*" else {"more": name} for name, stars in starred.items()}
            plain = re.sub(r"=[^,()]*(\([^()]*\))?", "=None", signature)
            exec(f"{plain} return locals()", space)
            if bound:
                setattr(space[in_order[0]], name, MethodType(space[name], space[in_order[0]]))
            made = eval(answer, space)
            assert {n: made[n] for n in in_order[bound:]} == {n: space[n] for n in in_order[bound:]}


def test_the_rule_is_a_yardstick_that_mends_about_two_thirds(written):
    fixes = [e for e in written["test"] if e["channel"] == "fix"]
    share = sum(tasks.answer_by_rule(e["prompt"]) == e["completion"] for e in fixes) / len(fixes)
    assert 0.5 < share < 0.75
    assert tasks.answer_by_rule("Fix this line: if x in (1, 2)") == "if x in (1, 2):"
    assert tasks.answer_by_rule("Fix this line: f([1, 2") == "f([1, 2]"
    assert tasks.answer_by_rule("List the arguments of: def f(a):") == ""


def test_equal_files_give_equal_examples(tmp_path, monkeypatch):
    few = {split: paths[:8] for split, paths in tasks.split_files().items()}
    monkeypatch.setattr(tasks, "split_files", lambda: few)
    first, second = (tasks.write_tasks(tmp_path / name) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_missing_tasks_are_written_and_data_of_another_python_is_reported(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(tasks, "DATA", tmp_path)
    monkeypatch.setattr(tasks, "FOLDER", tmp_path / "tasks")
    monkeypatch.setattr(tasks, "write_tasks", lambda: written.append(True))
    (tmp_path / "pystdlib").mkdir()
    for version, warned in ((tasks.platform.python_version(), False), ("3.0.0", True)):
        (tmp_path / "pystdlib/meta.json").write_text(f'{{"python": "{version}"}}')
        tasks.find_tasks()
        assert ("of another Python" in capsys.readouterr().out) == warned
    assert written == [True, True]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/test.jsonl").touch()
    tasks.find_tasks()
    assert len(written) == 2


def test_a_name_has_the_same_pieces_wherever_it_stands():
    split = compile_splitter(WORDS_PATTERN)
    for text in ("(name, name):", "x = name", "def name(", "\n\nname\n", "self.name=name", '"name"'):
        assert "name" in split(text) and "".join(split(text)) == text
