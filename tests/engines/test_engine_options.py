"""generate, complete and infill with --engine and --url: a server's crystals, and refusals in one line."""

import json

import pytest

from crystallm_kit.cli import main

SALT = """data_salt
_symmetry_space_group_name_H-M 'P 1'
_cell_length_a 3.988
_cell_length_b 3.988
_cell_length_c 3.988
_cell_angle_alpha 60
_cell_angle_beta 60
_cell_angle_gamma 60
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na Na 0.0 0.0 0.0
Cl Cl 0.5 0.5 0.5
"""


@pytest.fixture
def asked(toy_server, toy_model, tmp_path):
    """Return what names the server and the model whose manifest says how it is spoken to."""
    return ["--url", toy_server, "--model", str(toy_model), "--out", str(tmp_path / "out")]


def rows(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("named", [[], ["--engine", "openai", "--served-model", "toy"]])
def test_generate_takes_crystals_from_a_server(asked, named, tmp_path, toy_server, capsys):
    assert main(["generate", "NaCl", "-n", "5", *asked, *named]) == 0
    assert [row["formula"] for row in rows(tmp_path)] == ["NaCl"] * 5
    assert {row["model"] for row in rows(tmp_path)} == {f"toy at {toy_server}/v1"}
    assert "5 samples" in capsys.readouterr().out


def test_generate_asks_for_an_adapter_by_its_name_there(asked, tmp_path, toy_server):
    assert main(["generate", "NaCl", *asked, "--adapter", "toy.adapter"]) == 0
    assert rows(tmp_path)[0]["model"] == f"toy.adapter at {toy_server}/v1"


def test_complete_goes_on_at_a_server(asked, tmp_path):
    assert main(["complete", r"Na1 Cl1 225\nNa a\n", "-n", "2", *asked]) == 0
    assert all(row["text"].startswith("Na1 Cl1 225\nNa a\n") for row in rows(tmp_path))


def refused(arguments: list[str], capsys) -> str:
    """Return the one line that a refusal prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    line, *more = captured.err.splitlines()
    assert not more
    return line


def test_infill_refuses_a_server_in_words(asked, tmp_path, capsys):
    (tmp_path / "salt.cif").write_text(SALT)
    line = refused(["infill", str(tmp_path / "salt.cif"), "--element", "Na", *asked[:-2]], capsys)
    assert "a server does not say how probable a given answer is" in line


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--engine", "vlm"], "no engine 'vlm'; did you mean 'vllm'?"),
        (["--engine", "scripted"], "no engine 'scripted'"),
        (["--engine", "transformers", "--url", "http://localhost:1"], "goes with the engine 'openai'"),
        (["--served-model", "x"], "goes with the engine 'openai'"),
        (["--engine", "openai"], "needs the server's address: --url"),
        (["--url", "localhost:8000"], "no web address"),
        (["--url", "http://127.0.0.1:1"], "not reached"),
        (
            ["--url", "http://localhost", "--api-key-file", "nowhere"],
            "nowhere: cannot be read",
        ),
        (["--url", "http://localhost", "--template", "words-1"], "give the format"),
        (["--url", "http://localhost", "--model", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, wanted, tmp_path, capsys):
    asked = ["generate", "--formula", "NaCl", "--out", str(tmp_path / "out"), *options]
    assert wanted in refused(asked, capsys)
    assert not (tmp_path / "out").exists()


def test_without_vllm_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    line = refused(["generate", "--engine", "vllm", "--out", str(tmp_path / "out")], capsys)
    assert line.endswith("pip install 'crystallm-kit[vllm]'")


def test_a_key_comes_from_the_first_line_of_its_file(stand_in, tmp_path, capsys):
    peer = stand_in({"/v1/models": lambda _: (401, {}, {"error": {"message": "no: sk-mine"}})})
    (tmp_path / "key").write_text("sk-mine\nnotes\n")
    asked = ["generate", "--url", peer.url, "--api-key-file", str(tmp_path / "key")]
    assert "the API key is refused" in refused([*asked, "--out", str(tmp_path / "out")], capsys)
    assert peer.asked[-1][2]["authorization"] == "Bearer sk-mine"
    (tmp_path / "key").write_text("\n")
    assert "first line is empty" in refused([*asked, "--out", str(tmp_path / "out")], capsys)
