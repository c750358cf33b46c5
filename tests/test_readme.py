"""README.md is run, not copied: its commands and its Python, in a fresh folder, with the shipped model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from crystallm_kit.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, *, marked: bool | None = None) -> list[str]:
    """Return the code blocks of a language; marked: those after the comment that says to run them, or not."""
    found = re.findall(rf"(<!-- run -->\n)?```{language}\n(.*?)```", README, flags=re.DOTALL)
    return [code for mark, code in found if marked is None or bool(mark) == marked]


COMMANDS = [line for block in blocks("sh", marked=True) for line in block.splitlines()]


@pytest.fixture
def fresh_folder(tmp_path, monkeypatch):
    """Work in a fresh folder."""
    monkeypatch.chdir(tmp_path)


def test_there_are_commands_to_run():
    assert len(COMMANDS) >= 4
    assert len(blocks("python", marked=True)) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_does_what_it_says(command, fresh_folder):
    program, *arguments = shlex.split(command)
    assert program == "crystallm-kit"
    assert main(arguments) == 0


def test_the_python_of_the_readme_runs(fresh_folder, capsys):
    exec(compile(blocks("python", marked=True)[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Verdict(valid=True" in printed
    assert "['Na4 Cl4']" in printed or "['Na1 Cl1']" in printed


def test_the_first_screen_installs_and_generates_in_one_line_and_tests_in_another():
    first, second = blocks("sh", marked=False)[:2]
    assert re.fullmatch(
        r"python3 -m venv \.venv && \.venv/bin/pip install -q \. && "
        r"\.venv/bin/crystallm-kit generate \"[^\"]+\"\n",
        first,
    )
    assert re.fullmatch(
        r"\.venv/bin/pip install -q '\.\[test\]' && \.venv/bin/python -m pytest[^\n]*\n", second
    )
    assert README.index(second) < 1500, "both stand on the first screen"


def test_ci_runs_the_commands_of_the_readme():
    """The patterns by which .ci/run finds the two commands match these lines, and no line before them."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for pattern, block in zip(
        re.findall(r"readme_command '([^']+)'", ci), blocks("sh", marked=False), strict=False
    ):
        found = next(line for line in README.splitlines() if pattern in line)
        assert found == block.strip()


@pytest.mark.parametrize(
    "verb",
    sorted(
        set(re.findall(r"crystallm-kit (\w+)", "\n".join(blocks("sh")))) | {"convert", "infill", "validate"}
    ),
)
def test_every_verb_of_the_readme_exists(verb):
    run = [sys.executable, "-m", "crystallm_kit", verb, "--help"]
    assert subprocess.run(run, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_every_path_of_the_readme_exists():
    package = ROOT / "crystallm_kit"
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for name in re.findall(r"`((?:\w+/)*\w+(?:/|\.py|\.yaml))`", text):
        if name in ("crystals/", "structures/") and not (package / name).exists():
            continue
        made = name in ("crystals/",)  # what the commands make
        assert made or (ROOT / name).exists() or (package / name).exists(), name


def test_the_readme_names_nothing_outside_the_project():
    for outside in ("../", "/work", "/home", "http://localhost", "pypi.org", "conda"):
        assert outside not in README
