"""Other systems' checkpoints: the same logits, nothing executed, and what is wrong with a file said."""

import gzip
import json
import math
import os
import pickle
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from crystallm_kit.cli import main
from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.errors import ModelError, ParseError, UnknownName
from crystallm_kit.generation import complete_crystal, generate, infill, judge, load_model
from crystallm_kit.models.checkpoints import read_manifest
from crystallm_kit.models.importing import (
    crystallm_config,
    import_crystallm,
    import_crystallm_pi,
    import_model,
    read_checkpoint,
)
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.records import Completion, Conditions
from crystallm_kit.text.cif_tables import vocabulary
from crystallm_kit.tokens.tokenizer import encode_strict

ARGUMENTS = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 320, "bias": False, "vocab_size": 371,
    "dropout": 0.1,
}  # fmt: skip
NEWLINE = 142


def golden_file(name: str) -> Path:
    folder = os.environ.get("CRYSTALLM_KIT_GOLDEN")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_GOLDEN is not set: no golden checkpoints of CrystaLLM")
    return Path(folder) / name


@cache
def golden_rows() -> list[dict[str, Any]]:
    with gzip.open(golden_file("crystallm_cif_golden.json.gz"), "rt") as file:
        return json.load(file)


def shapes(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what CrystaLLM's training loop saves, written down from its model."""
    width, with_bias = arguments["n_embd"], arguments["bias"]
    found = {
        "transformer.wte.weight": (arguments["vocab_size"], width),
        "transformer.wpe.weight": (arguments["block_size"], width),
    }
    for i in range(arguments["n_layer"]):
        layer = {
            "ln_1": (width,), "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width),
            "ln_2": (width,), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width),
        }  # fmt: skip
        for name, shape in layer.items():
            found[f"transformer.h.{i}.{name}.weight"] = shape
            if with_bias:
                found[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    found["transformer.ln_f.weight"] = (width,)
    if with_bias:
        found["transformer.ln_f.bias"] = (width,)
    return found | {"lm_head.weight": (arguments["vocab_size"], width)}


def checkpoint(**arguments: Any) -> dict[str, Any]:
    """Return a random checkpoint of a small CrystaLLM."""
    arguments = ARGUMENTS | arguments
    generator = torch.Generator().manual_seed(0)
    model = {name: torch.randn(s, generator=generator) * 0.2 for name, s in shapes(arguments).items()}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    return {
        "model": model, "optimizer": {"state": {}}, "model_args": arguments, "iter_num": 250,
        "best_val_loss": torch.tensor(0.75),
        "config": {"learning_rate": 1e-3, "dataset": "cifs", "validate": True},
    }  # fmt: skip


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "ckpt.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of an imported random model of 320 positions, enough for the shorter golden texts."""
    where = tmp_path_factory.mktemp("imported")
    torch.save(checkpoint(), where / "ckpt.pt")
    return import_crystallm(where / "ckpt.pt", where / "model").folder


@pytest.fixture(scope="module")
def model(folder):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(folder, device="cpu")
    torch.set_num_threads(before)


# The same model


@pytest.mark.parametrize("name", ["crystallm_ckpt_nobias", "crystallm_ckpt_bias_compiled"])
def test_last_token_logits_are_those_of_crystallm(name, tmp_path):
    made = import_crystallm(golden_file(f"{name}.pt"), tmp_path / "model")
    network, _, _ = load_model_folder(made.folder)
    golden = json.loads(golden_file(f"{name}.logits.json").read_text())
    for ids, wanted in zip(golden["prompts"], golden["last_token_logits"], strict=True):
        with torch.inference_mode():
            found = network(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)


def forward(weights: dict[str, torch.Tensor], arguments: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """Return the logits (T, V) of a nanoGPT without biases, written out."""
    norm, gelu = torch.nn.functional.layer_norm, torch.nn.functional.gelu
    width, heads = arguments["n_embd"], arguments["n_head"]
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: len(ids)]
    for i in range(arguments["n_layer"]):
        w = {k.removeprefix(f"transformer.h.{i}."): v for k, v in weights.items()}
        qkv = norm(x, (width,), w["ln_1.weight"]) @ w["attn.c_attn.weight"].T
        q, k, v = (part.view(len(ids), heads, -1).transpose(0, 1) for part in qkv.split(width, dim=1))
        scores = q @ k.transpose(1, 2) / math.sqrt(width // heads)
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        attended = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1)
        x = x + attended.reshape(len(ids), width) @ w["attn.c_proj.weight"].T
        hidden = gelu(norm(x, (width,), w["ln_2.weight"]) @ w["mlp.c_fc.weight"].T, approximate="tanh")
        x = x + hidden @ w["mlp.c_proj.weight"].T
    return norm(x, (width,), weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("untied", [False, True])
def test_logits_are_those_of_the_written_out_model(file, tmp_path, prefix, untied):
    """Compiled or not, with masks of old torch, with an output embedding of its own."""
    saved = checkpoint()
    if untied:
        saved["model"]["lm_head.weight"] = saved["model"]["lm_head.weight"].flip(0)
    weights = dict(saved["model"])
    saved["model"] = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    for i in range(2):
        saved["model"][f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 320, 320).tril()
    torch.save(saved, file)
    made = import_crystallm(file, tmp_path / "model")
    network, _, _ = load_model_folder(made.folder)
    ids = [124, 54, 93, 5, 93, NEWLINE, 123, NEWLINE]
    with torch.inference_mode():
        found = network(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, forward(weights, ARGUMENTS, ids), atol=1e-5, rtol=1e-5)
    assert network.config.tie_word_embeddings is not untied
    assert bool(made.notes) is untied


def test_checkpoints_of_torch_before_its_zip_files_are_read(file, tmp_path):
    torch.save(checkpoint() | {"config": None}, file, _use_new_zipfile_serialization=False)
    made = import_crystallm(file, tmp_path / "model")
    assert made.facts["val_loss"] == 0.75
    network, _, _ = load_model_folder(made.folder)
    assert network.transformer.wpe.weight.equal(checkpoint()["model"]["transformer.wpe.weight"])


def test_half_precision_weights_are_kept_to_the_last_bit(file, tmp_path):
    saved = checkpoint()
    saved["model"] = {name: tensor.bfloat16() for name, tensor in saved["model"].items()}
    torch.save(saved, file)
    network, _, _ = load_model_folder(import_crystallm(file, tmp_path / "model").folder)
    found = network.transformer.h[1].attn.c_proj.weight
    assert found.dtype == torch.float32
    assert found.equal(saved["model"]["transformer.h.1.attn.c_proj.weight"].float().T)


@pytest.mark.parametrize(
    ("n_layer", "width", "block", "millions"), [(8, 512, 1024, 25.9), (16, 1024, 2048, 203.8)]
)
def test_the_released_sizes_have_the_known_number_of_parameters(n_layer, width, block, millions):
    """CrystaLLM's small and large model, biases left out; shapes alone, nothing is allocated."""
    arguments = ARGUMENTS | {"n_layer": n_layer, "n_head": n_layer, "n_embd": width, "block_size": block}
    config = crystallm_config(arguments)
    with torch.device("meta"):
        network = GPT2LMHeadModel(config)
    weights = {name: p for name, p in network.named_parameters() if not name.endswith(".bias")}
    assert round(sum(p.numel() for p in weights.values()) / 1e6, 1) == millions
    stored = shapes(arguments)
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for name, p in weights.items():
        assert stored[name] == (tuple(p.shape)[::-1] if name.endswith(turned) else tuple(p.shape))


# What the folder says


def test_the_folder_says_where_it_came_from_and_how_it_is_asked(folder):
    manifest = read_manifest(folder)
    assert (manifest.format, manifest.template) == ("cif", "cif-crystallm")
    base = manifest.base
    assert (base["name"], base["iter_num"], base["val_loss"]) == ("CrystaLLM", 250, 0.75)
    assert len(base["source_sha256"]) == 64
    assert manifest.recipe["config"] == {"learning_rate": 1e-3, "dataset": "cifs", "validate": True}
    config = json.loads((folder / "config.json").read_text())
    assert config["bos_token_id"] is config["eos_token_id"] is None
    assert (config["activation_function"], config["attn_pdrop"]) == ("gelu_new", 0.1)
    sampling = json.loads((folder / "generation_config.json").read_text())
    assert sampling.get("bos_token_id") is sampling.get("eos_token_id") is None
    assert sampling["top_k"] == 10


def test_a_loss_that_was_never_measured_is_left_out(file, tmp_path):
    torch.save(checkpoint() | {"best_val_loss": 1e9}, file)
    assert "val_loss" not in import_crystallm(file, tmp_path / "model").facts


def test_the_model_samples_as_its_authors_do_and_stops_where_they_do(model):
    assert (model.sampling.top_k, model.sampling.temperature) == (10, 1.0)
    assert model.sampling.max_new_tokens == 319
    assert model.engine.stop == "\n\n"
    assert model.engine.tokenizer.eos_token_id is None


def test_the_tokenizer_has_crystallms_ids(model):
    tokenizer = model.engine.tokenizer
    keys = [t if t == "Pm_sg" else t.removesuffix("_sg") for t in vocabulary()]
    assert tokenizer.convert_ids_to_tokens(range(371)) == keys
    assert len(tokenizer) == 371


# Generating with it


def test_prompts_have_the_ids_with_which_golden_texts_begin(model):
    """Unconditional, composition, composition and space group: what CrystaLLM's own tokenizer gives."""
    rows = golden_rows()[:40]
    for row in rows:
        for end in (5, row["text"].index("\n") + 1, row["text"].index("\n_cell_length_a") + 1):
            ids = encode_strict(model.engine.tokenizer, row["text"][:end])
            assert ids == row["ids"][: len(ids)]
    assert encode_strict(model.engine.tokenizer, "data_Na4Cl4\n") == [124, 54, 93, 5, 93, NEWLINE]


def test_golden_texts_come_back_from_ids_as_they_were_and_parse(model):
    """Forced as beginnings: the engine ends them at the two newlines, and decodes what CrystaLLM wrote."""
    rows = sorted(golden_rows(), key=lambda row: len(row["ids"]))[:12]
    prompts = [Prompt("data_", row["text"].removeprefix("data_") + "Na Na0 4") for row in rows]
    for row, completion in zip(
        rows, model.engine.complete(prompts, Sampling(max_new_tokens=319)), strict=True
    ):
        assert completion.stop_reason == "stop"
        assert [124, *completion.token_ids] == row["ids"]
        crystal = model.representation.decode("data_" + completion.text)
        assert crystal.id == row["text"].split("\n")[0].removeprefix("data_")


def test_every_sample_is_judged_and_what_was_cut_is_said_to_be(model):
    samples = generate(Conditions(formula={"Na": 4, "Cl": 4}, spacegroup_number=225), n=4, model=model)
    for sample in samples:
        assert sample.text.startswith("data_Na4Cl4\nloop_\n")
        assert (sample.verdict.reason == "truncated") is not sample.text.endswith("\n\n")


def test_prompt_and_completion_together_are_bound_by_the_models_positions(model):
    """320 here; CrystaLLM's own loop slides its window instead, and loses the composition."""
    asked = Conditions(formula={"Na": 4, "Cl": 4}, spacegroup_number=225)
    text = model.template.render(asked)
    quiet = Sampling(temperature=0.0, max_new_tokens=10_000)  # repeats itself, and never ends
    [completion] = model.engine.complete([Prompt(text)], quiet)
    assert completion.stop_reason == "length"
    assert len(encode_strict(model.engine.tokenizer, text)) + len(completion.token_ids) == 320
    assert judge(completion, asked, model, index=0, seed=0).verdict.reason == "truncated"


def test_two_newlines_of_which_one_ends_the_prompt_are_no_end(model):
    """The text was parsed as if it were whole, and "truncated" was never said."""
    cut = Completion("data_Na4Cl4\n", "\nloop_", (NEWLINE, 123), "length", -1.0, 0, 0)
    assert judge(cut, Conditions(), model, index=0, seed=0).verdict.reason == "truncated"


@pytest.mark.parametrize("prompt", ["data_", "data_Na4Cl4\n", "data_Na4Cl4\nloop_\n_atom_type_symbol"])
def test_crystallms_prompts_are_completed_as_they_are(model, prompt):
    [sample] = complete_crystal(prompt, model=model)
    assert sample.text.startswith(prompt)
    assert not sample.text.startswith("data_data_")


def test_a_prompt_that_crystallms_tokens_cannot_say_is_refused(model):
    """A space group that no newline follows: its letters would become unknown tokens."""
    head = model.template.render(Conditions(formula={"Na": 4, "Cl": 4}, spacegroup_number=225))
    with pytest.raises(ParseError, match="no token for 'm-3m'"):
        complete_crystal(head.rstrip("\n"), model=model)


def test_infill_scores_whole_texts_of_the_format(model):
    shortest = min(golden_rows(), key=lambda row: len(row["ids"]))
    crystal = model.representation.decode(shortest["text"])
    element = str(crystal.structure.composition.elements[0])
    ranked = infill(crystal, element, model=model, candidates=["Si", "Ge", element])
    assert {symbol for symbol, _ in ranked} == {"Si", "Ge", element}
    assert math.isclose(sum(p for _, p in ranked), 1)


# Nothing is executed


class WritesAFile:
    """Unpickled without care, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["model", "config", "whole"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_checkpoint_that_would_run_something_is_refused_by_the_name_of_it(file, tmp_path, where, as_zip):
    mark = tmp_path / "mark"
    evil = WritesAFile(mark)
    torch.save(
        evil if where == "whole" else checkpoint() | {where: {"x": evil}}, file,
        _use_new_zipfile_serialization=as_zip,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"wants posix\.mkdir executed .* refused"):
        import_crystallm(file, tmp_path / "model")
    assert not mark.exists()
    assert not (tmp_path / "model").exists()
    torch.load(file, weights_only=False)  # the test's own file does what it says
    assert mark.exists()


def test_a_foreign_class_is_refused_by_its_name(file, tmp_path):
    torch.save(checkpoint() | {"config": Path("x")}, file)
    with pytest.raises(ModelError, match=r"wants pathlib\.\S*Path executed"):
        import_crystallm(file, tmp_path / "model")


def test_a_plain_pickle_is_no_checkpoint_and_is_not_executed(file, tmp_path):
    file.write_bytes(pickle.dumps(WritesAFile(tmp_path / "mark")))
    with pytest.raises(ModelError, match=r"no file of torch.save"):
        read_checkpoint(file)
    assert not (tmp_path / "mark").exists()


# What is wrong with a file


def changed(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in (checkpoint() | changes).items() if v is not None}


def with_weights(change) -> dict[str, Any]:
    saved = checkpoint()
    change(saved["model"])
    return saved


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (changed(model=None), "no model; it holds optimizer, model_args, iter_num, best_val_loss and"),
        (changed(model_args=None), "no model_args; it holds model"),
        ({"state_dict": {}}, "no model and no model_args; it holds state_dict"),
        ([1, 2], "holds a list; a dict with model and model_args expected"),
        (changed(model_args={"n_layer": 2}), "model_args has no n_head, n_embd, block_size, vocab_size"),
        (changed(model_args=ARGUMENTS | {"n_head": 3}), "n_embd 16 is no multiple of n_head 3"),
        (changed(model_args=ARGUMENTS | {"n_layer": 3}), "weights of 2 layers, 3 expected from model_args"),
        (changed(model_args=ARGUMENTS | {"n_layer": 10**9}), "weights of 2 layers, 1000000000 expected"),
        (changed(model_args=ARGUMENTS | {"n_embd": "16"}), "n_embd is '16', a whole number expected"),
        (changed(model_args=ARGUMENTS | {"block_size": 0}), "block_size is 0, a whole number expected"),
        (changed(model_args=ARGUMENTS | {"vocab_size": None}), "vocab_size is None"),
        (changed(model_args=ARGUMENTS | {"dropout": "high"}), "dropout is 'high', a share from 0 to 1"),
        (changed(model_args=ARGUMENTS | {"vocab_size": 50304}), "50304 tokens, CrystaLLM's has 371"),
        (
            changed(model_args=ARGUMENTS | {"block_size": 1024}),
            r"tensor transformer.wpe.weight has shape \(320, 16\), \(1024, 16\) expected",
        ),
        (
            with_weights(lambda w: w.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(16, 64)})),
            r"tensor transformer.h.1.mlp.c_fc.weight has shape \(16, 64\), \(64, 16\) expected",
        ),
        (
            with_weights(lambda w: w.pop("transformer.h.1.ln_2.weight")),
            "1 tensors are missing: transformer.h.1.ln_2.weight",
        ),
        (
            with_weights(lambda w: w.update({"transformer.h.0.attn.rotary": torch.zeros(2)})),
            "1 tensors that no GPT-2 of its settings has: transformer.h.0.attn.rotary",
        ),
        (
            with_weights(lambda w: w.update({"transformer.ln_f.bias": torch.zeros(16)})),
            "no GPT-2 of its settings has: transformer.ln_f.bias",
        ),
        (
            with_weights(lambda w: w.update({"transformer.ln_f.weight": "x"})),
            r"model\['transformer.ln_f.weight'\] is a str, a tensor expected",
        ),
        (
            with_weights(lambda w: w["transformer.h.0.ln_1.weight"].fill_(torch.nan)),
            "tensor transformer.h.0.ln_1.weight holds NaN",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_said(file, tmp_path, saved, said):
    torch.save(saved, file)
    with pytest.raises(ModelError, match=said):
        import_crystallm(file, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"empty file \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"\x1f\x8b\x08\x00 a tar.gz of Zenodo", r"compressed archive. Unpack it \(tar xf\)"),
        (b"<!doctype html><title>404</title>", "no file of torch.save"),
        (b"PK\x03\x04 the beginning of a zip", "truncated or damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_is(file, tmp_path, content, said):
    file.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        import_crystallm(file, tmp_path / "model")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(file, tmp_path, share):
    torch.save(checkpoint(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"truncated or damaged \([0-9,]+ bytes\)"):
        import_crystallm(file, tmp_path / "model")


def test_a_folder_is_no_checkpoint_and_the_file_in_it_is_named(file, tmp_path):
    with pytest.raises(ModelError, match=r"a folder, .* Name the checkpoint file"):
        import_crystallm(tmp_path, tmp_path / "model")
    torch.save(checkpoint(), file)
    with pytest.raises(ModelError, match=rf"Name the file in it: {file}"):
        import_crystallm(tmp_path, tmp_path / "model")
    with pytest.raises(ModelError, match="no such file"):
        import_crystallm(tmp_path / "none.pt", tmp_path / "model")


def test_a_folder_that_holds_something_is_left_alone(file, tmp_path):
    torch.save(checkpoint(), file)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("x")
    with pytest.raises(ModelError, match=r"exists already\. Name a new folder"):
        import_crystallm(file, tmp_path / "model")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "x"


def test_an_unknown_system_is_refused_with_the_nearest(file, tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'crystallm'"):
        import_model("crystalm", file, tmp_path / "model")


def test_the_command_imports_and_says_what_it_made(file, tmp_path, capsys):
    saved = checkpoint()
    saved["model"]["lm_head.weight"] = saved["model"]["lm_head.weight"].flip(0)
    torch.save(saved, file)
    out = tmp_path / "model"
    assert main(["import", "crystallm", str(file), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: 23,584 parameters; iter_num 250; val_loss 0.75"
    assert said[1:] == [
        "note: lm_head differs from wte: both are kept, untied",
        f"crystallm-kit generate --model {out}",
    ]
    assert main(["import", "crystallm", str(file), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


# CrystaLLM-pi


@pytest.fixture(scope="module")
def pi_original(tmp_path_factory) -> Path:
    """A random model as CrystaLLM-pi saves its unconditional ones."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=377, n_positions=256, n_embd=16, n_layer=2, n_head=2, bos_token_id=372, eos_token_id=373,
        pad_token_id=371, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pi") / "CrystaLLM-pi_base"
    GPT2LMHeadModel(config).eval().save_pretrained(folder)
    (folder / "added_tokens.json").write_text('{"<unk>": 371}')
    return folder


@pytest.fixture
def pi(pi_original, tmp_path) -> Path:
    return Path(shutil.copytree(pi_original, tmp_path / "pi"))


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", ["folder", "file", "bin"])
def test_an_unconditional_pi_model_keeps_its_logits_and_gets_its_tokenizer(pi, tmp_path, kind):
    original = GPT2LMHeadModel.from_pretrained(pi).eval()
    if kind == "bin":
        torch.save(original.state_dict(), pi / "pytorch_model.bin")
        (pi / "model.safetensors").unlink()
    made = import_crystallm_pi(pi / "model.safetensors" if kind == "file" else pi, tmp_path / "model")
    network, tokenizer, manifest = load_model_folder(made.folder)
    ids = tokenizer("<bos>\ndata_[Na4Cl4]\n")["input_ids"]
    assert ids == [372, NEWLINE, 124, 374, 54, 93, 5, 93, 375, NEWLINE]
    with torch.inference_mode():
        torch.testing.assert_close(
            network(torch.tensor([ids])).logits, original(torch.tensor([ids])).logits, atol=0, rtol=0
        )
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (377, 373, 371)
    assert (manifest.template, manifest.base["name"]) == ("cif-crystallm-pi", "CrystaLLM-pi")


def test_a_pi_model_generates_in_the_funnel(pi, tmp_path):
    asked = load_model(import_crystallm_pi(pi, tmp_path / "model").folder, device="cpu")
    assert (asked.sampling.top_k, asked.sampling.top_p, asked.engine.stop) == (15, 0.95, "")
    for sample in generate(Conditions(formula={"Na": 4, "Cl": 4}), n=4, model=asked):
        assert sample.text.startswith("<bos>\ndata_[Na4Cl4]\n")
        assert sample.verdict.reason == "truncated" or sample.text.endswith("<eos>")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["SliderGPT"]}, "SliderGPT of CrystaLLM-pi, its slider variant"),
        ({"architectures": None, "slider_on": True}, "SliderGPT of CrystaLLM-pi"),
        ({"architectures": ["PKVGPT"], "n_prefix_tokens": 2}, r"PKVGPT of CrystaLLM-pi, its prefix \(PKV\)"),
        ({"architectures": ["PrefixGPT"]}, "its prefix variant"),
        ({"n_prefix_tokens": 2}, "PrefixGPT of CrystaLLM-pi"),
        ({"architectures": ["PrependGPT"]}, "its prepend variant"),
        ({"architectures": ["ResidualGPT"]}, "its residual variant"),
        ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM, GPT2LMHeadModel expected"),
        ({"vocab_size": 371}, "gpt2' with 371 tokens; CrystaLLM-pi's is gpt2 with 377"),
        ({"model_type": "llama"}, "'llama' with 377 tokens"),
        ({"n_layer": None}, "n_layer is None, a whole number expected"),
        ({"n_positions": 512}, r"transformer.wpe.weight has shape \(256, 16\), \(512, 16\) expected"),
        ({"n_layer": 3}, "12 tensors are missing: transformer.h.2.ln_1.weight"),
    ],
)  # fmt: skip
def test_pi_models_that_are_not_plain_are_refused_by_name(pi, tmp_path, changes, said):
    set_config(pi, **changes)
    with pytest.raises(ModelError, match=said):
        import_crystallm_pi(pi, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_pi_weights_of_a_slider_are_refused_although_the_config_hides_it(pi, tmp_path):
    weights = GPT2LMHeadModel.from_pretrained(pi).state_dict()
    (pi / "model.safetensors").unlink()
    torch.save(weights | {"transformer.slider_encoder.weight": torch.zeros(2)}, pi / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights of a conditional variant of CrystaLLM-pi \(encoder\)"):
        import_crystallm_pi(pi, tmp_path / "model")


def test_pi_folders_that_lack_something_say_what(pi, tmp_path):
    content = (pi / "model.safetensors").read_bytes()
    (pi / "model.safetensors").write_bytes(content[:5000])
    with pytest.raises(ModelError, match="truncated: 5,000 bytes"):
        import_crystallm_pi(pi, tmp_path / "model")
    (pi / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        import_crystallm_pi(pi, tmp_path / "model")
    (pi / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json; found added_tokens\.json"):
        import_crystallm_pi(pi, tmp_path / "model")
    with pytest.raises(ModelError, match="no such file or folder"):
        import_crystallm_pi(tmp_path / "none", tmp_path / "model")


def test_a_pi_vocabulary_in_another_order_is_refused(pi, tmp_path):
    ids = {token: i for i, token in enumerate(("C", "Si", *vocabulary()[2:]))}
    (pi / "vocabulary.json").write_text(json.dumps(ids))
    with pytest.raises(ModelError, match="'Si' has id 1, CrystaLLM-pi's is 0"):
        import_crystallm_pi(pi, tmp_path / "model")
