"""cli.py and verbs.py: each verb does its stage, says what it did, and refuses what is wrong in one line."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit import generation
from crystallm_kit.cli import main
from crystallm_kit.structures.files import read

ROOT = Path(__file__).parents[1]
PEROVSKITE = "four candidates for a cubic perovskite of barium, titanium and oxygen"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, and leaves the environment as it was."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "HF_HUB_OFFLINE",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TRANSFORMERS_VERBOSITY",
        "TOKENIZERS_PARALLELISM",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "1" if name.startswith("HF") else "error"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    return tmp_path


@pytest.fixture
def rock_salt(here):
    """NaCl, mp-22862 (https://next-gen.materialsproject.org/materials/mp-22862), conventional cell."""
    cell = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    cell.to(filename="NaCl.cif")
    return cell


@pytest.fixture
def perovskite(here):
    """Cubic BaTiO3, mp-2998 (https://next-gen.materialsproject.org/materials/mp-2998)."""
    sites = [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    cell = Structure(Lattice.cubic(4.03), ["Ba", "Ti", "O", "O", "O"], sites)
    cell.to(filename="BaTiO3.cif")
    return cell


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(capsys, *arguments: str) -> str:
    """Return the one line that a refused command says."""
    assert main(arguments) == 2
    # transformers reads the variable that silences its progress bar once: another test may have been first
    bar = "Loading weights"
    said = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith(bar)]
    assert len(said) == 1, said
    return said[0]


# ---------------------------------------------------------------- generate


def test_generate_writes_the_valid_crystals_and_a_line_for_every_request(here, capsys):
    assert main(["generate", "--formula", "NaCl", "-n", "6", "--seed", "4"]) == 0
    samples = lines_of(here / "crystals" / "samples.jsonl")
    assert len(samples) == 6
    for sample in samples:
        assert sample["formula"] == "NaCl"  # the composition is forced
        assert {"text", "reason", "log_probability", "seed", "model"} <= sample.keys()
        assert sample["seed"] == 4
        assert sample["log_probability"] < 0
    valid = [s for s in samples if s["valid"]]
    assert valid, "the shipped model knows rock salt"
    written = {c.id: c for c in read(here / "crystals" / "structures")}
    assert set(written) == {f"NaCl-{s['id']}" for s in valid}
    shown = capsys.readouterr().out
    for column in ("formula", "space group", "Å³/atom", "nearest Å", "verdict"):
        assert column in shown
    for stage in ("requested", "finished", "parsed", "formula", "symmetry", "distances", "charge", "unique"):
        assert stage in shown


def test_words_are_shown_as_understood_before_anything_is_generated(here, toy_model, capsys):
    assert main(["generate", PEROVSKITE, "--model", str(toy_model)]) == 0
    shown = capsys.readouterr().out
    assert "asked for: 4 x BaTiO3; cubic" in shown
    assert shown.index("asked for") < shown.index("verdict")
    samples = lines_of(here / "crystals" / "samples.jsonl")
    assert len(samples) == 4
    assert {s["formula"] for s in samples} == {"BaTiO3"}
    assert {s["conditions"]["crystal_system"] for s in samples} == {"cubic"}


def test_options_add_to_the_words_and_win_over_them(here, toy_model, capsys):
    command = [
        "generate",
        PEROVSKITE,
        "-n",
        "2",
        "--spacegroup",
        "Pm-3m",
        "--model",
        str(toy_model),
        "--json",
    ]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["requested"] == len(told["samples"]) == 2
    assert told["conditions"]["spacegroup_number"] == 221
    assert told["conditions"]["formula"] == {"Ba": 1, "Ti": 1, "O": 3}
    assert main([*command[:2], "--elements", "Pb", "--json", "--model", str(toy_model)]) == 2


def test_json_is_all_that_stands_on_standard_output(here, toy_model, capsys):
    assert main(["generate", PEROVSKITE, "--json", "--model", str(toy_model)]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert "asked for: 4 x BaTiO3" in captured.err
    assert told["funnel"]["requested"] == 4
    assert sum(told["funnel"]["reasons"].values()) == 4 - told["funnel"]["unique"]
    assert told["samples"] == lines_of(Path(told["files"]["samples"]))
    assert told["understood"]["phrases"][0] == ["four candidates", "4 candidates"]


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(here, toy_model):
    def texts(seed: int) -> list[str]:
        command = [
            "generate",
            "--elements",
            "Li-O",
            "-n",
            "5",
            "--model",
            str(toy_model),
            "--out",
            f"out{seed}",
        ]
        assert main([*command, "--seed", str(seed)]) == 0
        return [sample["text"] for sample in lines_of(here / f"out{seed}" / "samples.jsonl")]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_a_long_run_shows_twenty_samples_and_writes_all(here, toy_model, capsys):
    assert main(["generate", "-n", "25", "--model", str(toy_model), "--batch-size", "8"]) == 0
    shown = capsys.readouterr().out
    assert "0-19 " in shown
    assert "0-20 " not in shown
    assert "... and 5 more" in shown
    assert len(lines_of(here / "crystals" / "samples.jsonl")) == 25


def test_unconstrained_samples_are_all_accounted_for(here, toy_model, capsys):
    command = [
        "generate",
        "--formula",
        "NaCl",
        "-n",
        "6",
        "--unconstrained",
        "--json",
        "--model",
        str(toy_model),
    ]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["samples"]) == 6
    assert told["funnel"]["parsed"] < 6, "random weights do not write crystals unless they are held to it"


def test_structures_are_written_in_the_format_asked_for(here):
    command = ["generate", "--formula", "NaCl", "-n", "6", "--seed", "4"]
    assert main([*command, "--format-out", "extxyz", "--out", "out"]) == 0
    valid = [s for s in lines_of(here / "out" / "samples.jsonl") if s["valid"]]
    assert sum(1 for _ in read(here / "out" / "structures.extxyz")) == len(valid) > 0


def test_an_interrupted_run_keeps_what_is_finished(here, toy_model, capsys, monkeypatch):
    whole = generation.stream

    def interrupted(*arguments, **settings):
        for number, sample in enumerate(whole(*arguments, **settings)):
            if number == 3:
                raise KeyboardInterrupt
            yield sample

    monkeypatch.setattr(generation, "stream", interrupted)
    assert main(["generate", "--formula", "NaCl", "-n", "9", "--model", str(toy_model)]) == 130
    assert len(lines_of(here / "crystals" / "samples.jsonl")) == 3
    assert "3 of 9" in capsys.readouterr().err


def test_a_beginning_is_completed(here, toy_model):
    assert main(["complete", r"Ba1 Ti1 O3 221\nBa a\n", "-n", "3", "--model", str(toy_model)]) == 0
    samples = lines_of(here / "crystals" / "samples.jsonl")
    assert all(s["text"].startswith("Ba1 Ti1 O3 221\nBa a\n") and s["formula"] == "BaTiO3" for s in samples)


def test_infill_ranks_the_candidates(perovskite, toy_model, capsys):
    command = [
        "infill",
        "BaTiO3.cif",
        "--element",
        "Ti",
        "--candidates",
        "Ti,Zr,Na",
        "--model",
        str(toy_model),
    ]
    assert main([*command, "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)["probabilities"]
    assert set(ranked) == {"Ti", "Zr", "Na"}
    assert sum(ranked.values()) == pytest.approx(1)
    assert list(ranked.values()) == sorted(ranked.values(), reverse=True)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--formula", "Xx2"], "no element 'Xx'"),
        (["--elements", "Li,Qq"], "no element 'Qq'"),
        (["--spacegroup", "231"], "231"),
        (["--spacegroup", "Fm-3x"], "Fm-3x"),
        (["--condition", "bandgapp>2"], "did you mean 'bandgap'"),
        (["--condition", "band_gap>2 GPa"], "band_gap_ev is in eV"),
        (["--sites", "many"], "expected a whole number"),
        (["--formula", "NaCl", "--sites", "3"], "no multiple"),
        (["--protocol", "cdva"], "did you mean 'cdvae'"),
        (["--temperature", "-1"], "temperature -1.0: 0 or more expected"),
        (["-n", "0"], "1 or more expected"),
        (["--batch-size", "0"], "1 or more expected"),
        (["blorp the fnord"], "nothing of it was understood"),
        (["a cubic crystal in Pnma"], "orthorhombic, not cubic"),
        (["--model", "nowhere"], "nowhere: no such model folder"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(arguments, said, capsys):
    assert said in refusal(capsys, "generate", *arguments)


def test_a_composition_that_no_sites_add_up_to_is_refused_before_sampling(toy_model, capsys):
    """Fm-3m's positions hold 1, 1, 2, 6, ... atoms of the primitive cell: five of a kind do not add up."""
    arguments = ["--formula", "NaCl", "--spacegroup", "225", "--sites", "10", "--model", str(toy_model)]
    said = refusal(capsys, "generate", *arguments)
    assert "no assignment of Wyckoff positions adds up" in said


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "empty file"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "truncated",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)
def test_a_damaged_model_folder_is_named_with_what_is_wrong(here, toy_model, capsys, damage, said):
    folder = shutil.copytree(toy_model, here / "damaged")
    damage(folder)
    assert said in refusal(capsys, "generate", "--formula", "NaCl", "--model", str(folder)).replace(
        "asked", ""
    )


def test_files_of_others_are_not_written_over(here, toy_model, capsys):
    (here / "structures").mkdir()
    (here / "structures" / "mine.cif").write_text("data_mine")
    assert main(["generate", "--formula", "NaCl", "--model", str(toy_model), "--out", "."]) == 2
    assert "not written by a generation" in capsys.readouterr().err
    assert (here / "structures" / "mine.cif").read_text() == "data_mine"


# ---------------------------------------------------------------- files and texts


@pytest.mark.parametrize("form", ["cif", "compact", "wyckoff", "xyz"])
def test_a_crystal_survives_encode_and_decode(form, rock_salt, capsys):
    assert main(["encode", "NaCl.cif", "--format", form, "--out", "NaCl.txt"]) == 0
    assert main(["decode", "NaCl.txt", "--format", form, "--out", "again.cif"]) == 0
    assert next(read("again.cif")).structure.matches(rock_salt)


def test_texts_of_several_crystals_travel_as_json_lines(rock_salt, perovskite, capsys):
    assert main(["encode", "NaCl.cif", "BaTiO3.cif", "--json", "--out", "texts.jsonl"]) == 0
    assert main(["decode", "texts.jsonl", "--out", "again.extxyz"]) == 0
    assert [c.id for c in read("again.extxyz")] == ["NaCl", "BaTiO3"]


def test_a_text_that_is_no_crystal_is_refused(here, capsys):
    (here / "bad.txt").write_text("Na1 Cl1 225\nNa a\n")
    assert "not decoded: bad: parse:" in refusal_of_last(capsys, "decode", "bad.txt")


def refusal_of_last(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_convert_writes_what_it_reads_and_names_what_it_cannot(here, rock_salt, perovskite, capsys):
    (here / "zz.cif").write_text("data_broken\n_cell_length_a 1\n")
    assert main(["convert", ".", "--out", "all.json"]) == 0
    assert {c.structure.composition.reduced_formula for c in read("all.json")} == {"NaCl", "BaTiO3"}
    assert "not read: " in capsys.readouterr().err


def test_validate_judges_files_and_counts_a_copy_once(here, rock_salt, perovskite, capsys):
    crowded = rock_salt.copy()
    crowded.scale_lattice(crowded.volume / 8)
    crowded.to(filename="crowded.cif")
    rock_salt.make_supercell([2, 1, 1])
    rock_salt.to(filename="NaCl_2.cif")
    assert main(["validate", "NaCl.cif", "BaTiO3.cif", "NaCl_2.cif", "crowded.cif", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [s["reason"] for s in told["samples"]] == [None, None, "duplicate", "overlap"]
    assert told["protocol"] == "kit"
    assert main(["validate", "NaCl.cif", "BaTiO3.cif", "--formula", "NaCl", "--protocol", "cdvae"]) == 0
    assert "protocol cdvae: 1 of 2 are valid" in capsys.readouterr().out


# ---------------------------------------------------------------- the whole life


@pytest.mark.slow
def test_from_files_to_a_corpus_to_a_model_to_crystals(here, capsys):
    """Rock salts of six metals and four halogens: prepared, learned for a few steps, generated from."""
    (here / "data").mkdir()
    for metal in ("Li", "Na", "K", "Rb", "Cs", "Ag"):
        for halogen in ("F", "Cl", "Br", "I"):
            cell = Lattice.cubic(4.0 + 0.01 * (ord(metal[0]) + ord(halogen[0]) - 130))
            structure = Structure.from_spacegroup("Fm-3m", cell, [metal, halogen], [[0, 0, 0], [0.5] * 3])
            structure.to(filename=str(here / "data" / f"{metal}{halogen}.cif"))
    assert main(["prepare", "data", "--out", "corpus", "--set", "validation_fraction=0.2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_entries"] == 24
    assert report["n_rows"]["train"] + report["n_rows"]["validation"] == 24
    small = {
        "model.hidden_size": 64, "model.n_layers": 2, "model.n_heads": 2, "steps": 4, "epochs": "null",
        "batch_tokens": 512, "micro_tokens": 512, "eval_every": 4, "checkpoint_every": 4, "log_every": 2,
        "schedule.warmup_steps": 1, "data.corpus": "corpus",
        "model.intermediate_size": 128,
    }  # fmt: skip
    settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    recipe = str(ROOT / "finetune" / "llama-scratch-wyckoff-mp.yaml")
    assert main(["train", recipe, *settings, "--out", "run"]) == 0
    result = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert result["stopped"] == "done"
    assert main(["generate", "--formula", "NaCl", "-n", "2", "--model", result["model_folder"]]) == 0
    assert {s["formula"] for s in lines_of(here / "crystals" / "samples.jsonl")} == {"NaCl"}


def test_tokenizers_are_built_from_their_recipes(here):
    shutil.copytree(ROOT / "tokenizers" / "wyckoff", here / "tokenizers" / "wyckoff")
    (here / "tokenizers" / "wyckoff" / "tokenizer.json").unlink()
    assert main(["tokenizer", "wyckoff", "--build"]) == 0
    built = json.loads((here / "tokenizers" / "wyckoff" / "tokenizer.json").read_text())
    assert built == json.loads((ROOT / "tokenizers" / "wyckoff" / "tokenizer.json").read_text())


# ---------------------------------------------------------------- as a program


def command(*arguments: str, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "crystallm_kit", *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=False, env=environment, **settings)


def processor_seconds() -> float:
    """Return what programs that have ended took of the processor: what else runs here does not count."""
    taken = os.times()
    return taken.children_user + taken.children_system


def test_help_answers_within_a_second():
    before = processor_seconds()
    helped = command("--help")
    assert processor_seconds() - before < 1
    assert helped.returncode == 0
    for verb in (
        "generate",
        "prepare",
        "train",
        "validate",
        "encode",
        "decode",
        "convert",
        "infill",
        "complete",
    ):
        assert verb in helped.stdout


def test_a_reader_that_has_enough_is_no_error(rock_salt):
    run = f"{sys.executable} -m crystallm_kit encode {'NaCl.cif ' * 3000} | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    piped = subprocess.run(run, shell=True, capture_output=True, text=True, check=False, env=environment)
    assert piped.stdout == "Na1 Cl1 225\n"
    assert "Traceback" not in piped.stderr


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_training_by_lora_says_nothing_of_the_libraries():
    """bitsandbytes, which peft imports, told users of a CPU to install kernels that they do not need."""
    program = (
        "from crystallm_kit.training.progress import silence_libraries as s; s(); import peft.tuners.lora"
    )
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert imported.stderr == ""


@pytest.mark.slow
def test_twenty_crystals_of_rock_salt_take_less_than_twenty_seconds_from_a_cold_start(here):
    before = processor_seconds()
    generated = command("generate", "--formula", "NaCl", "-n", "20")
    assert processor_seconds() - before < 20
    assert generated.returncode == 0
    assert generated.stderr == ""  # no word of the libraries


def test_a_model_without_a_manifest_is_asked_as_the_options_say(tmp_path, capsys):
    """Adapters and models of other programs, such as Crystal-text-LLM's, say nothing of their template."""
    from crystallm_kit.models.folders import shipped_model_folder

    folder = tmp_path / "model"
    folder.mkdir()
    for file in shipped_model_folder().glob("*.*"):
        if file.name != "manifest.json":
            (folder / file.name).symlink_to(file)
    asked = ["generate", "--formula", "NaCl", "--model", str(folder), "--out", str(tmp_path / "out")]
    assert main(asked) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert main([*asked, "--template", "kit-1", "--text-format", "wyckoff"]) == 0
    assert "NaCl" in capsys.readouterr().out
