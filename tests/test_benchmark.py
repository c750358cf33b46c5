"""Benchmarks of the shipped model on a few crystals: counts hang together, and the command prints them."""

import json
from dataclasses import replace

import pytest
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit import benchmark
from crystallm_kit.engines.engine import Sampling
from crystallm_kit.errors import EmptyInput, ImpossibleRequest, UnknownName, UserError
from crystallm_kit.generation import candidates, load_model, ranked, stream
from crystallm_kit.records import Conditions, Crystal, Range
from crystallm_kit.scores.matching import match_rate, rms_distances
from crystallm_kit.structures.files import read, write
from crystallm_kit.tokens.corpus import CorpusRecipe, prepare


def rock_salt(a, cation, anion):
    basis = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    return Crystal(f"{cation}{anion}", Structure(basis, [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]]))


NACL, MGO = rock_salt(5.64, "Na", "Cl"), rock_salt(4.21, "Mg", "O")
RUTILE = Crystal(
    "TiO2",
    Structure.from_spacegroup(
        "P4_2/mnm", Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.3053, 0.3053, 0]]
    ),
)


@pytest.fixture(scope="module")
def model():
    return load_model(batch_size=16, device="cpu")


@pytest.fixture(scope="module")
def target_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    for crystal in (MGO, NACL, RUTILE):
        crystal.structure.to(str(folder / f"{crystal.id}.cif"))
    return folder


def test_a_composition_asks_for_the_atoms_of_the_cell_and_nothing_else():
    assert benchmark.composition_of(RUTILE) == Conditions(formula={"Ti": 2, "O": 4}, n_sites=6)


def test_prediction_is_what_drawing_ranking_and_matching_give_one_by_one(model):
    targets, n = [NACL, RUTILE], 6
    rates = benchmark.predict(targets, model, n_samples=n, seed=3)
    requests = [benchmark.composition_of(t) for t in targets for _ in range(n)]
    samples = list(stream(requests, seed=3, model=model))
    for order in ("as drawn", "ranked"):
        distances = []
        for i, target in enumerate(targets):
            of_target = samples[i * n : (i + 1) * n]
            of_target = ranked(of_target) if order == "ranked" else of_target
            distances.append(rms_distances([s.structure for s in of_target], target.structure))
        for found, k in zip(rates[order], (1, 5), strict=True):
            expected = match_rate(distances, k)
            # distances differ in their last digits from process to process
            assert found == replace(expected, rmse=pytest.approx(expected.rmse))
    assert rates["ranked"][1].matched >= 1  # the model knows rock salt, so the comparison is of something


def test_only_those_k_are_reported_that_the_samples_reach(model):
    rates = benchmark.predict([NACL], model, n_samples=1, sampling=Sampling(number_temperature=0.0))
    assert {order: [rate.k for rate in of] for order, of in rates.items()} == {"as drawn": [1], "ranked": [1]}


def test_a_property_is_asked_of_every_candidate(model, monkeypatch):
    """What `candidates` is handed, which still runs."""
    asked = []

    def recorded(requests, n, **settings):
        asked.extend([*requests] * n)
        return candidates(requests, n, **settings)

    monkeypatch.setattr(benchmark, "candidates", recorded)
    benchmark.predict([NACL], model, n_samples=2, properties={"hull_distance_ev_per_atom": Range.exactly(0)})
    [conditions] = {repr(c): c for c in asked}.values()
    assert len(asked) == 2
    assert conditions.formula == {"Na": 1, "Cl": 1}
    assert conditions.properties == {"hull_distance_ev_per_atom": Range(0, 0)}


def test_nothing_to_predict_is_refused(model):
    with pytest.raises(EmptyInput, match="0 targets, 5 samples each"):
        benchmark.predict([], model, n_samples=5)
    with pytest.raises(EmptyInput, match="1 targets, 0 samples each"):
        benchmark.predict([NACL], model, n_samples=0)
    with pytest.raises(EmptyInput, match="no targets"):
        benchmark.constrained_run([], model, n=1)


def test_constrained_samples_that_parse_have_the_composition_asked_for(model):
    counts = benchmark.constrained_run([NACL, RUTILE], model, n=5)
    assert counts["requested"] == 5
    assert 5 >= counts["finished"] >= counts["parsed"] == counts["composition as asked"] > 0


def test_composition_and_space_group_are_found_as_the_samples_verdicts_say(model):
    counts = benchmark.obeyed([NACL, MGO], model, seed=2)
    assert counts["requested"] == 2
    assert 2 >= counts["composition found"] >= counts["space group found"] >= counts["valid"]
    assert counts["composition found"] > 0


def test_a_molecule_has_no_space_group_to_obey(model):
    water = Crystal("water", Molecule(["O", "H", "H"], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]))
    with pytest.raises(ImpossibleRequest, match="water: a molecule"):
        benchmark.obeyed([water], model)


def test_unconditional_samples_are_counted_down_a_funnel(model):
    counts, seconds = benchmark.unconditional(model, n=4, seed=1)
    stages = [
        counts.requested, counts.finished, counts.parsed, counts.formula, counts.symmetry, counts.distances,
        counts.charge, counts.unique,
    ]  # fmt: skip
    assert stages[0] == 4
    assert stages == sorted(stages, reverse=True)
    assert seconds > 0


def test_the_command_prints_rates_of_both_orders(target_file, capsys):
    status = benchmark.main(
        ["predict", str(target_file), "--targets", "2", "--samples", "5", "--condition", "e_above_hull=0"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert [line[:14].split() for line in lines] == [
        ["n=1", "as", "drawn"], ["n=5", "as", "drawn"], ["n=1", "ranked"], ["n=5", "ranked"],
    ]  # fmt: skip
    assert all("/2), RMSE" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["constrained", "-n", "3"], "requested finished parsed"),
        (["obeyed", "--targets", "2"], "requested valid"),
    ],
)
def test_the_command_prints_counts(target_file, capsys, arguments, keys):
    assert benchmark.main([arguments[0], str(target_file), *arguments[1:]]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert set(keys.split()) <= set(counts)
    assert counts["requested"] == int(arguments[2])


def test_the_command_prints_the_funnel_and_speed(capsys):
    assert benchmark.main(["unconditional", "-n", "2", "--redraws", "0"]) == 0
    out = capsys.readouterr().out
    assert "samples/s" in out.splitlines()[-1]
    assert "2" in out.splitlines()[0]


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ("hull_distence=0", UnknownName, "no property 'hull_distence'; did you mean"),
        ("e_above_hull", UserError, "expected name=value"),
        ("n_elements=3", UserError, "only properties can be asked of every target"),
    ],
)
def test_the_command_refuses_what_is_no_property(target_file, entry, kind, message):
    with pytest.raises(kind, match=message):
        benchmark.main(["predict", str(target_file), "--condition", entry])


def test_facts_are_the_elements_and_largest_cell_of_the_training_crystals(target_file, tmp_path):
    """Counted by hand: MgO and NaCl have 2 atoms in the primitive cell, rutile 6."""
    prepare({"train": [target_file]}, CorpusRecipe(seed=1), tmp_path / "corpus")
    assert len(list(read(target_file))) == 3
    (tmp_path / "manifest.json").write_text('{"results": {"val_loss": 1.5}, "seed": 1}')
    assert benchmark.write_facts(tmp_path / "corpus", tmp_path) == {"elements": 5, "max_sites": 6}
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "results": {"elements": ["Cl", "Mg", "Na", "O", "Ti"], "max_sites": 6, "val_loss": 1.5},
        "seed": 1,
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyInput, match="no training crystals"):
        benchmark.write_facts(tmp_path / "empty", tmp_path)


# ---------------------------------------------------------------- bulk moduli (see test_conditioned.py too)

EMT = "ase.calculators.emt:EMT"


def test_the_command_prints_how_measured_bulk_moduli_agree_with_known_ones(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    metals = {
        "Cu": (3.61, 140.0),
        "Al": (4.05, 76.0),
        "Ag": (4.09, 101.0),
        "Au": (4.08, 173.0),
    }  # Kittel, GPa
    cifs = [
        Structure.from_spacegroup(225, Lattice.cubic(a), [e], [[0, 0, 0]]) for e, (a, _) in metals.items()
    ]
    table = {"cif": [s.to(fmt="cif") for s in cifs], "bulk_modulus_gpa": [k for _, k in metals.values()]}
    pq.write_table(pa.table(table), tmp_path / "metals.parquet")
    assert benchmark.main(["bulk-modulus", str(tmp_path / "metals.parquet"), "--potential", EMT]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["potential"], found["crystals"], found["measured"]) == (EMT, 4, 4)
    assert found["spearman"] > 0.7


def test_targets_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="--targets '50,stiff': expected numbers"):
        benchmark.main(
            ["conditioned", "--adapter", "bulk-modulus", "--targets", "50,stiff", "--out", str(tmp_path)]
        )


def test_templates_are_measured_as_a_model_is_and_beside_one(target_file, tmp_path, monkeypatch, capsys):
    """The targets are the library: each is its own template, so every one is matched by the first answer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = tmp_path / "known.extxyz"
    write(read(target_file), known)
    given = ["predict", str(target_file), "--library", str(known)]
    assert benchmark.main([*given, "--samples", "2", "--engine", "template"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0].split() for line in found] == [["n=1", "as", "drawn", "100.0%"]]
    assert benchmark.main([*given, "--samples", "1", "--with-template", "--batch-size", "16"]) == 0
    found = [line.split(" (")[0].split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:-1] for line in found] == [
        ["as", "drawn"],
        ["ranked"],
        ["template"],
        ["template", "+", "model"],
    ]
    assert found[2][-1] == "100.0%"
    assert found[3][-1] == "100.0%"
