"""What the README promises: its links lead somewhere, its lists are whole, and its commands work."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache

import bench
import pytest
from conftest import ROOT, WORDS, run_main
from lessons import index

PAGES = ("README.md", "tests/README.md", "tests/lessons/README.md", "tests/lessons/README.zh.md")
README, MEASURED, BOOK, CHINESE = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)


@cache
def names_in(path):
    """All classes, functions and methods of a Python file, such as {"Blocks", "Blocks.batch"}."""
    found, waiting = set(), [("", ast.parse(path.read_text(encoding="utf-8")))]
    while waiting:
        prefix, parent = waiting.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(prefix + node.name)
                waiting.append((f"{prefix}{node.name}.", node))
    return found


@cache
def anchors_of(path):
    """What a link into a page may name: its headings and its <a id="...">."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    names = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return names | set(re.findall(r'<a id="(\w+)">', text))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_functions(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\[([^\[\]]+)\]\(([^)\s]+)\)", text)
    named = 0
    for text, target in links:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{text} -> {target}"
        if anchor:
            assert anchor in anchors_of(path), f"{text} -> {target}"
            continue
        *file, name = text.strip("`").split(" ")
        if path.suffix == ".py" and re.fullmatch(r"[A-Za-z_][\w.]*", name) and not name.endswith(".py"):
            assert name in names_in(path), f"{target} has no {name}"
            assert not file or path.as_posix().endswith(file[0])
            named += 1
    assert named or page in ("tests/README.md", "tests/lessons/README.zh.md")


def test_the_front_page_has_twenty_questions_of_the_book():
    n = len(index.all_lessons())
    assert README.startswith("[中文](tests/lessons/README.zh.md)")
    assert f"[{n} questions]" in README and f"has all {n}" in README
    questions = README[README.index("## Questions and answers") : README.index("## Use it for real")]
    assert questions.count("\n- **") == questions.count("tests/lessons/README.md#test_") == 20


STAGES = ["tokenizer.py", "model.py", "train.py", "sample.py", "finetune.py"]
MAP_ROW = re.compile(r"^\| \[([\w/]+\.py)\]\(\1\) \| (\d+) \|", re.MULTILINE)


def count_lines(path):
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def first_hour():
    """The number of lines of the functions and classes that the README names for the first hour."""
    section = README[README.index("### The first hour") : README.index("## What each idea buys")]
    total = 0
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([\w/.]+)\)", section):
        node = ast.parse((ROOT / target).read_text(encoding="utf-8"))
        for part in name.split("."):
            node = next(child for child in ast.iter_child_nodes(node) if getattr(child, "name", "") == part)
        total += node.end_lineno - node.lineno + 1
    return total


def with_counts(page):
    """The README with the line counts as they are now."""
    page = MAP_ROW.sub(lambda row: f"| [{row[1]}]({row[1]}) | {count_lines(row[1])} |", page)
    return re.sub(r"(?<=^These )\d+(?= lines)", str(first_hour()), page, flags=re.MULTILINE)


def test_the_map_has_the_nine_files_and_their_length():
    """`python tests/test_readme.py` writes the numbers."""
    files = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]
    assert {path.name for path in ROOT.glob("*.py")} == set(STAGES)
    assert {name for name, _ in MAP_ROW.findall(README)} == {f.relative_to(ROOT).as_posix() for f in files}
    assert with_counts(README) == README and f"These {first_hour()} lines" in README


def test_the_first_hour_is_about_500_lines():
    assert 400 <= first_hour() <= 600


# --- the commands ---

# Runs one script after the other, each in a process forked from this one, since importing torch takes longer
# than most of them.
RUNNER = """
import os, runpy, shlex, sys
import finetune, train, torch._inductor.config
for line in sys.stdin:
    print("$ python", line, end="", flush=True)
    if not (process := os.fork()):
        sys.stdin = open(os.devnull)
        sys.argv = shlex.split(line)
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        sys.exit("this failed: " + line)
"""

SMALLER = {  # what stands for something else or takes long -> what is run instead
    "out/mine --examples chat.jsonl": "out/mine --examples chat.jsonl --steps 4",
    "PATH...": "text.txt",
    "FILE...": "text.txt",
    "--minutes 30": "--steps 12 --batch-size 4",
    "--steps 2000": "--steps 2",
    "--data tinystories --preset small --minutes 60": "--data mine --steps 2 --out out/small",
    "--max-new-tokens 1000": "--max-new-tokens 8",
    "out/pystdlib --lora-rank 8": "out/mine --lora-rank 8 --examples chat.jsonl --steps 2",
    "out/SmolLM2": "out/mine-chat",
    "--out out/tuned": "--steps 2 --out out/tuned",
    "out/pystdlib-chat --examples pairs.jsonl": "out/mine-chat --examples pairs.jsonl --steps 2",
    "--method rl": "--method rl --model out/mine-chat --examples chat.jsonl --steps 2 --out out/pystdlib-rl",
}
ELSEWHERE = {  # needs a server, several processes or one to kill -> the test that has them
    "python data/prepare.py shakespeare": "test_a_download_is_verified_before_it_gets_its_name",
    "torchrun --nproc-per-node 8 train.py": "test_two_processes_learn_what_one_learns_and_one_can_go_on",
    "python tests/lessons/index.py": "test_the_book_is_what_the_lessons_say",
    "python tests/lessons/mutants.py": "test_lessons_fail_when_what_they_teach_is_broken",
    "python tests/bench.py speedrun": "test_two_versions_run_in_turn_and_are_compared_seed_by_seed",
}


def blocks(page, language):
    """The fenced parts of a page in that language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(page):
    """The commands that a page shows, in order, without comments."""
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?((?:python|torchrun|echo|pip|pytest)\b.*)", text, re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line) for line in lines]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's own files in a folder of their own, with what the commands of the README name."""
    folder = tmp_path_factory.mktemp("readme")
    files = [path for pattern in ("*.py", "data/*.py", "tests/[bp]*.py") for path in ROOT.glob(pattern)]
    for path in [*files, *ROOT.glob("tests/lessons/*.*")]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / "text.txt").write_text(WORDS * 200, encoding="utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "the dog"}\n')
    chat = [f'{{"prompt": "{i} cats?", "completion": "{i} cats."}}\n' for i in range(40)]
    (folder / "chat.jsonl").write_text("".join(chat))
    pairs = [f'{{"prompt": "{i} cats?", "chosen": "{i} cats.", "rejected": "dogs"}}\n' for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(pairs))
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forked processes")
def test_every_command_of_the_readme_is_run(copy):
    gate = re.sub(r" -q| --minutes 0.1| --steps 20| --max-new-tokens 64", "", (ROOT / ".ci/run").read_text())
    suite = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    scripts = ["data/prepare.py text.txt --name mine", "train.py --data mine --steps 2 --out out/pystdlib"]
    for command in dict.fromkeys(commands(README) + commands(MEASURED) + commands(BOOK) + commands(CHINESE)):
        tests = [name for start, name in ELSEWHERE.items() if command.startswith(start)]
        if tests:
            assert f"def {tests[0]}(" in suite
        elif command.startswith("pytest ") or all(part in gate for part in command.split(" && ")):
            continue
        else:
            for name, other in SMALLER.items():
                command = command.replace(name, other)
            scripts.append(command)
    for i, snippet in enumerate(blocks(README, "python")):
        (copy / f"snippet_{i}.py").write_text(snippet)
        scripts.append(f"snippet_{i}.py")
    through_a_shell = [command for command in scripts if ">" in command]
    lines = [command.removeprefix("python ") for command in scripts if ">" not in command]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    settings = dict(cwd=copy, env=environment, text=True, capture_output=True, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", RUNNER], input="\n".join(lines) + "\n", **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for command in through_a_shell:
        command = command.replace("python", shlex.quote(sys.executable))
        done = subprocess.run(command, shell=True, **settings)
        assert done.returncode == 0, done.stderr[-2000:]


def test_ideas_are_chosen_on_the_last_tenth_of_the_training_text(tmp_path):
    with bench.tiny_data() as name:
        whole = bench.load_data(bench.DATA / name)
        bench.copy_data(name, False, tmp_path / "choosing")
        bench.copy_data(name, True, tmp_path / "claiming")
        part, same = (bench.load_data(tmp_path / folder) for folder in ("choosing", "claiming"))
        n = int(0.9 * len(whole.train))
        assert part.train.tolist() == whole.train[:n].tolist()
        assert part.val.tolist() == whole.train[n:].tolist()
        assert same.val.tolist() == whole.val.tolist() and same.fingerprint == whole.fingerprint
        assert part.fingerprint != whole.fingerprint


def test_two_versions_run_in_turn_and_are_compared_seed_by_seed(monkeypatch, tmp_path):
    asked = []

    def run_version(version, data, budget, seed, options):
        asked.append((version.name, seed, *budget, *options))
        return 100, 2 + 0.1 * seed - 0.01 * (seed + 1) * len(options)

    monkeypatch.setattr(bench, "run_version", run_version)
    (tmp_path / "data").mkdir()
    with bench.tiny_data() as name:
        options = ["--data", name, "--steps", 7, "--seeds", 3, "--base", tmp_path, "--options=--compile"]
        output = run_main(bench.main, "bench.py", "speedrun", *options)
    base, change = (tmp_path.name, "--steps", 7), (ROOT.name, "--steps", 7, "--compile")
    assert asked == [(one[0], seed, *one[1:]) for seed in range(3) for one in (base, change)]
    printed = [line.split() for line in output.splitlines()]
    assert ["2", "2.2000", "(100)", "2.1700", "(100)", "-0.0300"] in printed
    assert ["mean", "2.1000", "2.0800", "-0.0200"] in printed
    assert ["spread", "0.1000", "0.0900", "0.0100"] in printed
    assert printed[-1][-1] == "-3.5"  # -0.02 / (0.01 / sqrt(3))
    assert not list((tmp_path / "data").iterdir())


def test_every_benchmark_that_is_named_is_offered(monkeypatch):
    called = []
    for name in [name for name in vars(bench) if name.startswith("bench_")]:
        monkeypatch.setattr(bench, name, called.append)
    named = set(re.findall(r"`python tests/bench.py (.+?)`", README + MEASURED)) - {"--help"}
    for arguments in named:
        run_main(bench.main, "bench.py", *arguments.split())
    assert len(called) == len(named) > 8


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_counts(README), encoding="utf-8")
