"""What sample.py promises: whole characters, stop strings that are never seen, files of prompts that lose
nothing, conversations that read only what is new.
"""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import sample as stage
from sample import Chat, Text, generate, render, write
from tokenizer import SPECIAL_TOKENS, Tokenizer

START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    model.save(tmp_path / "model", tokenizer)
    return tmp_path / "model"


run = partial(run_script, "sample.py")


def text_of(ids, tokenizer, stops=()):
    return [piece for (piece,) in write(tokenizer, ([i] for i in ids), stops)]


# --- text ---


def test_a_stream_never_shows_half_a_character(tokenizer):
    text = "日本語 😀 e\u0301 👩‍👩‍👧 ❤️"
    ids = tokenizer.encode(text)
    pieces = text_of(ids, tokenizer)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(ids) + 1
    assert sum(map(bool, pieces)) > 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=30))
def test_all_pieces_together_are_the_decoded_text(tokenizer, ids):
    ids = [i % tokenizer.vocab_size for i in ids]
    assert "".join(text_of(ids, tokenizer)) == tokenizer.decode(ids)


LETTERS = st.text("ab日", max_size=20)


@settings(max_examples=500, deadline=None)
@given(LETTERS, st.lists(st.text("ab日", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_never_shows_its_beginning(tokenizer, text, stops):
    row, shown = Text(tokenizer, stops), ""
    for i in tokenizer.encode(text):  # bytes and pairs of them: every stop string crosses tokens
        shown += row.add(i)
        assert not row.held or any(stop.startswith(row.held) for stop in stops)  # nothing else waits
    shown += row.add(None)
    # the slow twin: one character after the other, until a stop string stands at the end
    expected = ""
    for character in text:
        expected += character
        ended = [stop for stop in stops if expected.endswith(stop)]
        if ended:
            expected = expected[: -max(map(len, ended))]
            break
    assert shown == expected


def test_a_stop_string_ends_one_row_and_the_last_one_ends_the_loop(tokenizer):
    asked = []

    def steps():
        for i in tokenizer.encode("the cat sat"):
            asked.append(i)
            yield [i, tokenizer.encode("x")[0]]

    pieces = list(write(tokenizer, steps(), ["at", "xx"]))
    assert ["".join(row) for row in zip(*pieces)] == ["the c", ""]
    assert len(asked) < len(tokenizer.encode("the cat sat"))


def test_a_text_begins_with_what_its_tokenizer_wants_there(tokenizer):
    assert stage.to_prompt(tokenizer, "") == [tokenizer.special_tokens["<|endoftext|>"]]
    assert stage.to_prompt(tokenizer, "the cat") == tokenizer.encode("the cat")
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}]}
    processor = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}  # as in Llama 3
    llama = Tokenizer(tokenizer.document | {"post_processor": processor})
    expected = [tokenizer.special_tokens["<|endoftext|>"], *tokenizer.encode("the cat")]
    assert stage.to_prompt(llama, "the cat") == expected


def test_the_ends_of_a_text_are_those_of_the_folder(folder, tokenizer, model):
    ends = [tokenizer.special_tokens[name] for name in ("<|endoftext|>", END)]
    assert stage.end_ids(folder, tokenizer) == {ends[0]}
    model.save(folder, tokenizer, ends=ends)
    assert stage.end_ids(folder, tokenizer) == set(ends)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert stage.end_ids(folder, tokenizer) == {7}
    (folder / "generation_config.json").unlink()
    assert stage.end_ids(folder, tokenizer) == set(ends)
    (folder / "config.json").write_text("{}")
    assert stage.end_ids(folder, tokenizer) == set(tokenizer.special_tokens.values())


# --- conversations ---


def test_a_model_that_was_taught_tasks_says_which(folder, model, tokenizer, monkeypatch, capsys):
    for results in ({}, {"questions": {}}, {"questions": {"args": "List the arguments of: def f(a):"}}):
        (folder / "results.json").write_text(json.dumps(results))
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        stage.converse(model, tokenizer, folder, set(), 0)
        greeting = capsys.readouterr().err
        assert ("questions such as these" in greeting) == bool(results.get("questions"))
    assert "\n  List the arguments of: def f(a):\n" in greeting


MESSAGES = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "the dog"},
]


def test_a_conversation_is_rendered_in_chatml_and_only_what_the_assistant_says_is_marked(tokenizer):
    ids, mask = render(tokenizer, MESSAGES, answer=True)
    turns = [f"{START}{m['role']}\n{m['content']}{END}\n" for m in MESSAGES]
    assert tokenizer.decode(ids) == "".join(turns) + f"{START}assistant\n"
    assert tokenizer.decode([i for i, marked in zip(ids, mask) if marked]) == f"sat on{END}"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([START, END, "<|endoftext|>", "user\n", "assistant\n", " ", "x"]), max_size=9)
)
def test_no_text_forges_a_role(tokenizer, parts):
    forged = [{"role": "user", "content": "".join(parts)}]
    ids, mask = render(tokenizer, forged, answer=True)
    assert [ids.count(tokenizer.special_tokens[name]) for name in SPECIAL_TOKENS] == [0, 2, 1]
    assert not any(mask)


def test_a_tokenizer_without_chatml_tokens_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no <\|im_end\|> in the tokenizer"):
        render(Tokenizer.train(["the cat"], 260, special_tokens=("<|im_start|>",)), MESSAGES)


@pytest.fixture
def long_model(model):
    """The tiny model, with a context in which a conversation has room."""
    model.config.block_size = 200
    return model


def test_a_conversation_reads_only_what_is_new(long_model, tokenizer):
    reads, hidden = [], long_model.hidden
    long_model.hidden = lambda ids, cache=None: reads.append(ids.numel()) or hidden(ids, cache)
    chat, settings = Chat(long_model, tokenizer), dict(max_new_tokens=10, vocab_size=tokenizer.vocab_size)
    for text in ("the cat sat", "on the mat", "and"):
        question = len(render(tokenizer, [{"role": "user", "content": text}], answer=True)[0])
        before = len(chat.read)
        del reads[:]
        answer = "".join(chat.answer(text, **settings))
        assert answer
        unread = 0 if not before else len(chat.turns[-3]) - 9  # the answer's last token, its end, a line end
        assert reads == [unread + question] + [1] * 9
    # the slow twin: all turns at once
    ids = sum(chat.turns[:-1], [])
    whole = "".join(text_of((i for (i,) in generate(long_model, [ids], **settings)), tokenizer))
    assert answer == whole


def test_the_oldest_turns_are_forgotten_aloud(long_model, tokenizer, capsys):
    chat = Chat(long_model, tokenizer)
    for _ in range(6):
        assert len(list(chat.answer("the cat sat on the mat", max_new_tokens=30, vocab_size=256))) > 5
    assert "forgotten" in capsys.readouterr().err
    assert len(chat.turns) % 2 == 0 and 2 <= len(chat.turns) < 12
    assert list(chat.answer("日本語" * 200, max_new_tokens=30, vocab_size=256))
    assert "only its last 150 tokens" in capsys.readouterr().err


def test_an_answer_cut_short_in_the_middle_of_a_step_leaves_no_trace_in_the_cache(long_model, tokenizer):
    def interrupt(*_):
        raise KeyboardInterrupt

    chat, settings = Chat(long_model, tokenizer), dict(max_new_tokens=20, temperature=0, vocab_size=256)
    pieces = chat.answer("the cat", **settings)
    for _ in range(4):
        next(pieces)
    hook = long_model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    hook.remove()
    answer = "".join(chat.answer("sat", **settings))
    ids = sum(chat.turns[:-1], [])
    assert answer == "".join(text_of((i for (i,) in generate(long_model, [ids], **settings)), tokenizer))


def test_an_answer_that_is_cut_short_stays_in_the_conversation(long_model, tokenizer):
    chat = Chat(long_model, tokenizer)
    pieces = chat.answer("the cat", max_new_tokens=30, vocab_size=256)
    for _ in range(4):
        next(pieces)
    pieces.close()  # as Ctrl-C does
    end = [tokenizer.special_tokens[END], *tokenizer.encode("\n")]
    assert len(chat.turns) == 2 and chat.turns[-1][-2:] == end
    assert list(chat.answer("sat", max_new_tokens=5, vocab_size=256))


def test_chat_answers_line_by_line_and_a_base_model_says_what_it_is(folder, tokenizer, model):
    result = run(
        "--model", folder, "--chat", "--max-new-tokens", 4, input="hello\n\n/reset\n你好\n/quit\nno\n"
    )
    assert result.returncode == 0, result.stderr
    assert "not taught to chat" in result.stderr
    assert result.stdout.count("\n") >= 2
    model.save(folder, tokenizer, ends=[tokenizer.special_tokens[END]])
    assert "not taught" not in run("--model", folder, "--chat", input="").stderr


# --- a file of prompts ---


def answers_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path):
    records = [{"prompt": "the cat " * n, "id": n} for n in range(5)]
    records += [{"messages": MESSAGES, "source": "x"}, {"prompt": "日本語"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


GREEDY = ("--temperature", 0, "--max-new-tokens", 8)


def test_a_file_of_prompts_is_answered_in_its_order(folder, prompts, tmp_path, model, tokenizer):
    output = tmp_path / "answers.jsonl"
    result = run("--model", folder, "--prompts", prompts, "--output", output, "--batch-size", 3, *GREEDY)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and "0:00:00 left" in result.stderr
    answers = answers_in(output)
    for i, (record, answer) in enumerate(zip(answers_in(prompts), answers, strict=True)):
        assert answer == record | {"line": i + 1, "completion": answer["completion"]}
        if "prompt" in record:
            ids = stage.to_prompt(tokenizer, record["prompt"])
        else:
            ids = render(tokenizer, record["messages"], answer=True)[0]
        ends = stage.end_ids(folder, tokenizer)
        settings = dict(max_new_tokens=8, temperature=0, vocab_size=tokenizer.vocab_size, stop_ids=ends)
        alone = text_of((new for (new,) in generate(model, [ids], **settings)), tokenizer)
        assert answer["completion"] == "".join(alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "model", "prompts.jsonl"]
    again = run("--model", folder, "--prompts", prompts, "--output", output, *GREEDY)
    assert again.returncode == 0 and "0 prompts to answer, 7 were answered before" in again.stderr
    assert answers_in(output) == answers


def test_what_was_answered_before_a_kill_is_kept(folder, prompts, tmp_path):
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part0"
    records = answers_in(prompts)
    kept = records[1] | {"line": 2, "completion": "kept"}
    part.write_text(json.dumps(kept) + '\n{"line": 3, "prompt": "日', encoding="utf-8")
    part.write_bytes(part.read_bytes()[:-1])  # a kill in the middle of a character
    result = run("--model", folder, "--prompts", prompts, "--output", output, *GREEDY)
    assert result.returncode == 0, result.stderr
    assert "6 prompts to answer, 1 were answered before" in result.stderr
    assert [answer["line"] for answer in answers_in(output)] == list(range(1, 8))
    assert answers_in(output)[1] == kept
    assert not part.exists()


def test_two_processes_share_the_prompts(folder, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    arguments = ["--model", folder, "--prompts", prompts, "--output", output, "--batch-size", 2, *GREEDY]
    program = [sys.executable, ROOT / "sample.py", *map(str, arguments)]
    processes = [
        subprocess.Popen(program, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert [answer["line"] for answer in answers_in(output)] == list(range(1, 8))
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob("*.unfinished*"))


def test_equal_prompts_in_different_batches_get_answers_of_their_own(folder, tmp_path):
    (tmp_path / "p.txt").write_text("the\n" * 6)
    output = tmp_path / "a.jsonl"
    result = run("--model", folder, "--prompts", tmp_path / "p.txt", "--output", output, "--batch-size", 2)
    assert result.returncode == 0, result.stderr
    assert len({answer["completion"] for answer in answers_in(output)}) == 6


def test_prompts_that_end_at_once_are_answered_too(folder, prompts, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(320))}))
    output = tmp_path / "a.jsonl"
    assert run("--model", folder, "--prompts", prompts, "--output", output).returncode == 0
    assert [answer["completion"] for answer in answers_in(output)] == [""] * 7


def test_only_parts_of_the_same_output_are_read_and_removed(folder, prompts, tmp_path):
    for name in ("a[4].jsonl", "a*.jsonl"):
        notes = tmp_path / f"{name}.part_of_my_notes"
        notes.write_text("mine")
        result = run("--model", folder, "--prompts", prompts, "--output", tmp_path / name, *GREEDY)
        assert result.returncode == 0 and len(answers_in(tmp_path / name)) == 7
        assert notes.read_text() == "mine" and not (tmp_path / f"{name}.part0").exists()


def test_a_file_that_holds_something_else_is_not_overwritten(folder, prompts):
    before = prompts.read_text()
    result = run("--model", folder, "--prompts", prompts, "--output", prompts)
    assert result.returncode == 2 and "holds something else than answers" in result.stderr
    assert prompts.read_text() == before


def test_lines_of_a_text_file_are_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\nthree\u2028\n".encode())
    expected = {1: {"prompt": "one"}, 2: {"prompt": ""}, 3: {"prompt": "three\u2028"}}
    assert stage.read_records(tmp_path / "a.txt") == expected
    (tmp_path / "a.jsonl").write_text('\ufeff{"prompt": "one"}\n\n{"prompt": "three"}', encoding="utf-8")
    assert stage.read_records(tmp_path / "a.jsonl") == {1: {"prompt": "one"}, 3: {"prompt": "three"}}


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", "{}", '{"prompt": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}']
    + ['{"prompt": "half a pair \\ud83d"}', '{"prompt": "x", "completion": "mine"}'],
)
def test_a_bad_line_is_named_before_anything_is_answered(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 2: "):
        stage.read_records(tmp_path / "bad.jsonl")


def test_answers_to_other_prompts_are_not_mixed_in(folder, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text('{"line": 1, "prompt": "another", "completion": "x"}\n')
    result = run("--model", folder, "--prompts", prompts, "--output", output)
    assert result.returncode == 2 and "answers other prompts" in result.stderr
    assert "another" in output.read_text()


# --- the face ---


@pytest.mark.parametrize("prompt", ["", "the cat", "你好"])
def test_only_the_text_goes_to_stdout(folder, prompt):
    result = run("--model", folder, "--prompt", prompt, "--max-new-tokens", 5)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(prompt)
    assert "a second" in result.stderr and "a second" not in result.stdout


def test_a_prompt_may_come_from_a_file_or_a_pipe(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("the dog\n", encoding="utf-8")
    shown = run("--model", folder, "--prompt-file", tmp_path / "prompt.txt", *GREEDY).stdout
    assert shown.startswith("the dog") and not shown.startswith("the dog\n\n")
    assert run("--model", folder, *GREEDY, input="the dog\n").stdout == shown


@pytest.mark.skipif(os.name != "posix", reason="Windows has no select for pipes")
def test_a_pipe_into_which_nothing_comes_does_not_hold_up_the_text(folder):
    result = run("--model", folder, *GREEDY, input=None)
    assert result.returncode == 0 and result.stdout
    assert "no prompt came in 3 s" in result.stderr


def test_several_samples_are_set_apart_and_stop_strings_not_shown(folder):
    result = run("--model", folder, "--prompt", "the", "-n", 3, "--max-new-tokens", 5, "--stop", "\n---\n")
    assert result.stdout.count("\n---\n") == 2
    assert len({text.strip() for text in result.stdout.split("\n---\n")}) == 3


def test_a_draft_writes_the_same_greedy_text(folder):
    plain = run("--model", folder, "--prompt", "the", *GREEDY).stdout
    assert run("--model", folder, "--prompt", "the", "--draft", folder, *GREEDY).stdout == plain


def test_a_draft_with_another_vocabulary_is_refused(folder, tmp_path, model):
    model.save(tmp_path / "draft", Tokenizer.train(["another text"], 320))
    result = run("--model", folder, "--draft", tmp_path / "draft", "--prompt", "x")
    assert result.returncode == 2 and "has another vocabulary" in result.stderr


def test_a_prompt_longer_than_the_context_says_so(folder):
    result = run("--model", folder, "--prompt", "x" * 100, "--max-new-tokens", 3)
    assert result.returncode == 0 and "cut to its last 32" in result.stderr


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    program = [
        sys.executable,
        ROOT / "sample.py",
        "--model",
        folder,
        "--prompt",
        "x",
        "--max-new-tokens",
        "3000",
    ]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    assert "rror" not in process.stderr.read()
    assert process.wait() == 0


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_the_text_without_a_traceback(folder):
    program = [sys.executable, ROOT / "sample.py", "--model", folder, "--prompt", "x"]
    process = subprocess.Popen(
        [*program, "--max-new-tokens", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.read(20)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "a second" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "there is no folder no/such/folder"),
        (["--model", ROOT / "tests"], "config.json"),
        (["--temperature", "-1"], "temperature -1.0 must be 0"),
        (["--top-p", "0"], "top-p 0.0 is outside (0, 1]"),
        (["--stop", ""], "--stop without text"),
        (["--prompts", "x.txt"], "go together"),
        (["--prompts", "no.jsonl", "--output", "x"], "no.jsonl"),
        (["--prompt-file", "no.txt"], "no.txt"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--compile", "--device", "cpu"], "--compile makes decoding slower"),
        (["-n", "0"], "-n"),
        (["-n", "2", "--chat"], "-n and --draft are for one prompt"),
        (["--prompt", "x", "--chat"], "not allowed with argument"),
        (["--draft", "x", "--repetition-penalty", "1.1"], "does not go with"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(folder, arguments, message, monkeypatch, capsys):
    if "--model" not in arguments:
        arguments = ["--model", folder, *arguments]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as end:  # as a script, but without importing torch again
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_a_model_the_command_that_makes_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "OUT", tmp_path)
    with pytest.raises(ValueError, match="run `python train.py`"):
        stage.newest_model()


def test_the_newest_model_is_the_one_saved_last(tmp_path, monkeypatch, model):
    monkeypatch.setattr(stage, "OUT", tmp_path)
    for name in ("b", "a"):
        model.save(tmp_path / name)
    assert stage.newest_model() == tmp_path / "a"


def test_a_model_is_loaded_in_the_dtype_of_its_file_or_in_that_asked_for(folder):
    assert stage.load(folder)[0].model.norm.weight.dtype == torch.float32
    assert stage.load(folder, dtype=torch.bfloat16)[0].model.norm.weight.dtype == torch.bfloat16
