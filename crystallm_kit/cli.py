"""The command: `crystallm-kit`, a verb for each stage.

    crystallm-kit generate "LiFePO4 in Pnma" -n 20 --seed 1
    crystallm-kit prepare mp.parquet --out corpus
    crystallm-kit train finetune/llama-scratch-wyckoff-mp.yaml --set data.corpus=corpus
    crystallm-kit encode POSCAR | crystallm-kit decode - --out again.cif
    crystallm-kit serve --port 8000

Results go to standard output; progress, notes and errors to standard error. With --json, standard output
holds one JSON document and nothing else. Exit code 0: done; 2: the request or the input is wrong, said in one
line; 130: interrupted, what was finished is kept; 1: anything else.

Not here: what a verb does (verbs.py), which is loaded with its libraries once it is known, so that --help is
quick.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crystallm_kit.errors import MissingExtra, UserError
from crystallm_kit.training.progress import silence_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: As after the command's name; None: those of the process.
    """
    options = _parser().parse_args(arguments)
    silence_libraries()
    try:
        verb = "import_" if options.verb == "import" else options.verb  # a keyword is no function's name
        code: int = getattr(importlib.import_module("crystallm_kit.verbs"), verb)(options)
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return code
    except (UserError, MissingExtra) as error:
        if _is_first_to_tell():
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (head) has enough; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder without permission
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _is_first_to_tell() -> bool:
    """Tell whether no other process of a run on several GPUs has told of an error."""
    if "RANK" not in os.environ:  # the launcher sets it
        return True
    from crystallm_kit.training.distribution import is_first_to_tell

    return is_first_to_tell()


# ---------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crystallm-kit",
        description="Generate inorganic crystals with language models: data, text, model, verdicts.",
        epilog="crystallm-kit VERB --help explains a verb.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    _add_generation_verbs(verbs)
    _add_serve_verb(verbs)
    _add_structure_verbs(verbs)
    _add_scoring_verbs(verbs)
    _add_benchmark_verb(verbs)
    _add_model_verbs(verbs)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"crystallm-kit {version('crystallm-kit')}")
        parser.exit()


def _add_generation_verbs(verbs: Any) -> None:
    generate = _verb(verbs, "generate", "crystals from words and conditions, judged and written")
    generate.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help='plain words, such as "LiFePO4 in Pnma"'
    )
    _condition_options(generate)
    generate.add_argument(
        "--temperature", type=float, metavar="T", help="1 samples as trained, 0 takes the likeliest"
    )
    generate.add_argument(
        "--number-temperature",
        type=float,
        metavar="T",
        help="the same for the numbers (default: as --temperature)",
    )
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="keep the likeliest tokens with this probability"
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="keep this many of the likeliest tokens")
    generate.add_argument(
        "--unconstrained",
        action="store_true",
        help="draw freely; by default every sample parses and is as asked",
    )
    _run_options(generate)

    _add_predict_verb(verbs)

    complete = _verb(verbs, "complete", "go on with the beginning of a crystal's text")
    complete.add_argument(
        "text", metavar="TEXT", help=r'the beginning, such as "Ba1 Ti1 O3 221\nBa a\n", a file with it, or -'
    )
    _run_options(complete)

    infill = _verb(verbs, "infill", "rank the elements that could replace one element of a crystal")
    infill.add_argument("file", metavar="FILE", help="a file with one crystal")
    infill.add_argument("--element", required=True, metavar="EL", help="the element to replace")
    infill.add_argument(
        "--candidates", metavar="EL,EL", help="elements to try (default: all that the model knows)"
    )
    infill.add_argument("--top", type=int, default=10, metavar="N", help="show so many (default: 10)")
    _model_options(infill)
    infill.add_argument("--json", action="store_true", help="print one JSON document")


def _add_predict_verb(verbs: Any) -> None:
    predict = _verb(verbs, "predict", "the polymorphs of a composition: generated, relaxed, ranked by energy")
    predict.add_argument(
        "prompt", nargs="?", metavar="FORMULA", help='Sn5S4Cl2, or words with a formula: "TiO2 in P4_2/mnm"'
    )
    _condition_options(predict)
    predict.add_argument("-n", type=int, metavar="N", help="samples (default: as said in words, else 50)")
    predict.add_argument(
        "--seed", type=int, default=0, metavar="S", help="same seed, same samples (default: 0)"
    )
    for name, unit in (("temperature", "T"), ("number-temperature", "T"), ("top-p", "P"), ("top-k", "K")):
        kind = int if name == "top-k" else float
        predict.add_argument(f"--{name}", type=kind, metavar=unit, help="as for generate")
    _model_options(predict)
    predict.add_argument("--protocol", default="kit", metavar="NAME", help="set of checks (default: kit)")
    group = predict.add_argument_group("energies")
    group.add_argument(
        "--potential", default="chgnet", metavar="NAME",
        help="chgnet, or an ASE calculator or torch-sim model as module:factory (default: chgnet)",
    )  # fmt: skip
    group.add_argument(
        "--max-steps", type=int, default=300, metavar="N", help="of a relaxation (default: 300)"
    )
    group.add_argument("--workers", type=int, metavar="N", help="processes that relax (default: all cores)")
    group.add_argument("--no-relax", action="store_true", help="rank by likelihood, as generated")
    group.add_argument(
        "--hull", metavar="FILE",
        help="energies to make the convex hull of (formula, formation_energy_per_atom; CSV, JSON, Parquet), "
        "or materials-project, with the key in MP_API_KEY",
    )  # fmt: skip
    group.add_argument(
        "--references", metavar="JSON", help="element references of another potential than chgnet"
    )
    predict.add_argument("--out", type=Path, metavar="DIR", help="(default: predictions/<formula>)")
    predict.add_argument(
        "--json", action="store_true", help="print one JSON document; notes go to standard error"
    )


def _add_serve_verb(verbs: Any) -> None:
    serve = _verb(verbs, "serve", "a model behind HTTP: OpenAI's routes, /v1/crystals, a page")
    model = serve.add_argument_group("what is served")
    model.add_argument(
        "--model", metavar="PATH",
        help="a model's or adapter's folder, or its Hugging Face id (default: the shipped model)",
    )  # fmt: skip
    model.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=PATH",
        help="an adapter's folder or Hugging Face id, asked for by NAME; or one of the shipped model's: "
        "bulk-modulus; may be repeated",
    )  # fmt: skip
    model.add_argument("--adapter-folder", type=Path, metavar="DIR", help="every adapter in it, by its name")
    model.add_argument("--name", metavar="NAME", help="the model's name in requests (default: its folder's)")
    model.add_argument("--template", metavar="NAME", help="prompt template of a model without manifest.json")
    model.add_argument("--text-format", metavar="NAME", help="text format of such a model")
    engine = serve.add_argument_group("where it runs (default: vllm with a GPU and vLLM, else transformers)")
    engine.add_argument(
        "--engine", metavar="NAME", help="transformers, in this process; vllm, in servers that are kept here"
    )
    engine.add_argument("--device", metavar="NAME", help="cuda or cpu, of transformers (default: the GPU)")
    engine.add_argument(
        "--engines", type=int, default=1, metavar="K",
        help="vLLM servers, spread over the GPUs; a small model is faster with several on each (default: 1)",
    )  # fmt: skip
    engine.add_argument(
        "--vllm-args", metavar="TEXT", help='for every vllm serve, such as "--tensor-parallel-size 2"'
    )
    engine.add_argument(
        "--kv-cache-gb", type=float, metavar="GB",
        help="memory of each engine for keys and values; with it they start at once, not one by one",
    )  # fmt: skip
    engine.add_argument("--vllm-python", metavar="PATH", help="the Python that has vLLM (default: this one)")
    engine.add_argument(
        "--state-folder", type=Path, metavar="DIR",
        help="for the engines' logs (default: crystallm-kit in XDG_STATE_HOME or ~/.local/state)",
    )  # fmt: skip
    engine.add_argument(
        "--upstream", action="append", default=[], metavar="URL",
        help="a vLLM server that runs elsewhere, in place of all these; may be repeated",
    )  # fmt: skip
    engine.add_argument("--upstream-key-file", type=Path, metavar="FILE", help="its first line is their key")
    door = serve.add_argument_group("who comes in, and how much they may ask")
    door.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="(default: 127.0.0.1, this machine)"
    )
    door.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (default: 8000)")
    door.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that are let in, one a line")
    door.add_argument(
        "--allow-public-without-key", action="store_true", help="listen for others without asking for a key"
    )
    for name, what, unit in (
        ("max-queue", "completions that may wait (4096); beyond, 429", "N"),
        ("max-n", "most completions of a prompt, and most crystals of a request (1000)", "N"),
        ("max-samples", "most samples that are drawn for one request's crystals (10000)", "N"),
        ("max-body-bytes", "longest request (1000000)", "N"),
        ("slots", "completions drawn at once in this process (64, on a GPU up to 4096)", "N"),
        ("judges", "processes that parse and validate samples (a quarter of the cores)", "N"),
    ):
        door.add_argument(f"--{name}", type=int, metavar=unit, help=what)
    door.add_argument(
        "--drain-seconds", type=float, metavar="S", help="how long requests may go on after SIGTERM (30)"
    )


def _add_structure_verbs(verbs: Any) -> None:
    validate = _verb(verbs, "validate", "judge crystals in files")
    _inputs(validate)
    _condition_options(validate)
    validate.add_argument("--protocol", default="kit", metavar="NAME", help="set of checks (default: kit)")
    validate.add_argument(
        "--keep-duplicates", action="store_true", help="let copies of earlier crystals count"
    )
    validate.add_argument("--json", action="store_true", help="print one JSON document")

    encode = _verb(verbs, "encode", "crystals in files -> their texts")
    _inputs(encode)
    _format_options(encode)
    encode.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to standard output")
    encode.add_argument("--json", action="store_true", help='a JSON line {"id", "text"} for each crystal')

    decode = _verb(verbs, "decode", "a crystal's text, or a file of them -> structures")
    decode.add_argument("input", metavar="FILE", help="a text, a .jsonl file with the key 'text', or -")
    _format_options(decode)
    decode.add_argument(
        "--out", type=Path, metavar="PATH", help="file, folder or .zip (default: print a CIF)"
    )

    convert = _verb(verbs, "convert", "crystal files of one kind -> another kind")
    _inputs(convert)
    convert.add_argument("--out", type=Path, required=True, metavar="PATH", help="file, folder or .zip")
    convert.add_argument(
        "--format-out", metavar="NAME", help="cif, extxyz, json, parquet, poscar (default: by suffix)"
    )
    convert.add_argument("--allow-disordered", action="store_true", help="take crystals with shared sites")


def _add_scoring_verbs(verbs: Any) -> None:
    score = _verb(verbs, "score", "every number of the field, of several sample sets side by side")
    score.add_argument(
        "samples", nargs="+", metavar="SAMPLES",
        help="a set each, NAME=PATH names it: a generation's folder or samples.jsonl, another system's .pt, "
        ".csv, .extxyz, .zip, a folder of CIFs, ...",
    )  # fmt: skip
    against = score.add_argument_group("what it is held against")
    against.add_argument(
        "--reference", nargs="+", default=[], metavar="FILE", help="known crystals: novelty, distributions"
    )
    against.add_argument("--targets", metavar="FILE", help="true structures, where the samples predict them")
    against.add_argument(
        "--pairing", default="auto", metavar="WAY",
        help="how samples pair with targets: id, index, composition (default: the first that fits); none: "
        "the targets are a test set, only to be covered",
    )  # fmt: skip
    against.add_argument(
        "--requested", action="append", default=[], metavar="N",
        help="samples that were asked for, where a set holds fewer; NAME=N for one set; may be repeated",
    )  # fmt: skip
    what = score.add_argument_group("what is worked out")
    what.add_argument(
        "--protocol", nargs="+", action="extend", metavar="NAME",
        help="kit, cdvae, diffcsp, ... (default: all that can be; what takes long only where it is named: "
        "bonds of crystallm and crystallm_pi, for the latter hashes, 0.03 s a crystal; alloys of mattergen)",
    )  # fmt: skip
    what.add_argument("--limit", type=int, metavar="N", help="look at the first N entries of each set")
    what.add_argument(
        "--fingerprints", action="store_true", help="for coverage and cdvae.valid; about 0.01 s a crystal"
    )
    what.add_argument(
        "--cutoffs", default="mp_20", metavar="SET", help="of coverage: mp_20 (default), perov_5, carbon_24"
    )
    what.add_argument(
        "--published", nargs="+", metavar="TABLE",
        help="published results for the report, such as csp_comp_mp20 (default: those that fit)",
    )  # fmt: skip
    what.add_argument("--relax", action="store_true", help="stability and S.U.N., with --hull")
    what.add_argument("--hull", type=Path, metavar="FILE", help="formation energies that the hull is made of")
    what.add_argument(
        "--potential", default="chgnet", metavar="P", help="that relaxes: chgnet (default), or module:factory"
    )
    what.add_argument(
        "--element-references", type=Path, metavar="JSON",
        help="its elements' energies, as scoring.potential_check writes them (default: those shipped)",
    )  # fmt: skip
    how = score.add_argument_group("how and where")
    how.add_argument(
        "--out", type=Path, default=Path("scores"), metavar="DIR",
        help="rows, report.json, report.html; the same one goes on with a run (default: scores)",
    )  # fmt: skip
    how.add_argument("--fresh", action="store_true", help="remove the run that the folder holds")
    how.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    how.add_argument(
        "--ray", default="", metavar="ADDRESS",
        help="a Ray cluster in their place, whose nodes see the same files; auto; local: a new one here",
    )  # fmt: skip
    how.add_argument("--json", action="store_true", help="print report.json")

    report = _verb(verbs, "report", "a scoring run's page again; or several runs compared")
    report.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="of runs; the first is the baseline"
    )
    report.add_argument(
        "--out", type=Path, metavar="PATH", help="of the comparison (default: comparison.html here)"
    )


def _add_benchmark_verb(verbs: Any) -> None:
    benchmark = _verb(verbs, "benchmark", "a table by a recipe: generate, score, published rows beside")
    benchmark.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="a recipe, as in eval/")
    benchmark.add_argument(
        "--out", type=Path, metavar="DIR", help="samples, scores, table (default: runs/RECIPE); resumes there"
    )
    benchmark.add_argument("--workers", type=int, metavar="N", help="scoring processes (default: all cores)")
    benchmark.add_argument("--batch-size", type=int, default=256, metavar="N", help="samples drawn together")
    _set_option(benchmark, "such as 'targets.files=[mp_test.parquet]' or targets.first=100")
    benchmark.add_argument("--json", action="store_true", help="print our rows as one JSON document")


def _add_model_verbs(verbs: Any) -> None:
    prepare = _verb(verbs, "prepare", "crystal files -> a tokenised corpus, split without leaks")
    _inputs(prepare)
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    prepare.add_argument("--format", metavar="NAME", help="text format (default: the recipe's, else wyckoff)")
    prepare.add_argument(
        "--tokenizer", metavar="BASE", help="of the base model to fine-tune: its folder or Hugging Face id"
    )
    prepare.add_argument("--validation", nargs="+", metavar="FILE", help="files that are the validation set")
    prepare.add_argument("--test", nargs="+", metavar="FILE", help="files that are the test set")
    prepare.add_argument("--recipe", type=Path, metavar="YAML", help="a corpus recipe")
    prepare.add_argument(
        "--seed", type=int, metavar="S", help="of split and augmentation (default: the recipe's, else 0)"
    )
    prepare.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes, or Ray tasks (default: 1)"
    )
    prepare.add_argument(
        "--executor", choices=("processes", "ray"), default="processes", help="who does the work"
    )
    prepare.add_argument("--json", action="store_true", help="print the report as JSON")
    _set_option(prepare, "a key of the recipe, such as validation_fraction=0.1")

    train = _verb(verbs, "train", "crystal files or a corpus -> a model, by a recipe; run again to resume")
    train.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="a recipe, as in finetune/")
    _set_option(train, "a key of the recipe, such as data.corpus=corpus")
    train.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (default: runs/<recipe's name>)"
    )
    train.add_argument(
        "--fresh", action="store_true", help="remove the run that the folder holds, and begin anew"
    )
    train.add_argument(
        "--preflight", action="store_true", help="check data and memory, say what is found, and stop there"
    )
    train.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that prepare data.inputs (default: 1)"
    )

    merge = _verb(verbs, "merge", "an adapter and its base -> one model folder")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="the adapter's folder")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model folder")
    merge.add_argument(
        "--base", metavar="BASE", help="its folder or Hugging Face id (default: as the adapter names it)"
    )
    merge.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
        help="of the weights on disk (default: bfloat16)",
    )  # fmt: skip

    push = _verb(verbs, "push", "a model folder -> Hugging Face, with a card made from its manifest")
    push.add_argument("folder", type=Path, metavar="FOLDER", help="a model or an adapter")
    push.add_argument("repository", metavar="ORG/NAME", help="made if it is not there")
    push.add_argument("--public", action="store_true", help="of a new repository (default: private)")
    push.add_argument("--revision", metavar="BRANCH", help="made if it is not there (default: main)")
    push.add_argument(
        "--license",
        default="other",
        metavar="NAME",
        help="for a new card: mit, cc-by-4.0 ... (default: other)",
    )

    import_ = _verb(verbs, "import", "another system's checkpoint -> a model folder to generate with")
    import_.add_argument("system", metavar="SYSTEM", help="crystallm or crystallm-pi")
    import_.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="CrystaLLM's ckpt.pt; CrystaLLM-pi's folder with config.json and its weights",
    )
    import_.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model folder, new")

    tokenizer = _verb(verbs, "tokenizer", "build tokenizers from their recipes")
    tokenizer.add_argument(
        "names", nargs="*", metavar="NAME", help="folders to build (default: every format)"
    )
    tokenizer.add_argument(
        "--build", action="store_true", required=True, help="write tokenizer.json beside the recipe"
    )
    tokenizer.add_argument(
        "--folder", type=Path, default=Path("tokenizers"), help="where the recipes are (default: tokenizers)"
    )


def _verb(verbs: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary + ".")
    return parser


def _inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="a folder, .cif, .zip, .tar.gz, .extxyz, .xyz, POSCAR, .json, .csv, .parquet or .pt",
    )  # fmt: skip


def _condition_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conditions (any of them, or none)")
    group.add_argument("--formula", metavar="F", help="BaTiO3")
    group.add_argument("--elements", metavar="E", help="Li,O: among others; Li-O: no others")
    group.add_argument("--spacegroup", metavar="SG", help="number or symbol: 225, Fm-3m")
    group.add_argument("--sites", metavar="N", help="atoms in the primitive cell")
    group.add_argument(
        "--condition", action="append", default=[], metavar="NAME=VALUE",
        help='a property, "band_gap>2", "density=4..5", or crystal_system=cubic, n_elements=3, '
        "anonymous_formula=ABC3; may be repeated",
    )  # fmt: skip


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH",
        help="a model's or adapter's folder, or its Hugging Face id (default: the shipped model)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", metavar="NAME",
        help="an adapter's folder or Hugging Face id, or one of the shipped model's: bulk-modulus",
    )  # fmt: skip
    parser.add_argument(
        "--template", metavar="NAME",
        help="prompt template of a model that has no manifest.json, such as crystal-text-llm",
    )  # fmt: skip
    parser.add_argument("--text-format", metavar="NAME", help="text format of such a model, such as compact")
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="samples at a time (default: 256)"
    )
    group = parser.add_argument_group("where the model runs (default: here, with transformers)")
    group.add_argument(
        "--engine", metavar="NAME",
        help="transformers; vllm, in this program; openai, a server (with --url); template, no model but "
        "known crystals (with --library)",
    )  # fmt: skip
    group.add_argument(
        "--library", nargs="+", default=[], metavar="FILE", help="known crystals, for the engine template"
    )
    group.add_argument(
        "--url", metavar="URL", help="an OpenAI-compatible server's address: http://localhost:8000/v1"
    )
    group.add_argument(
        "--served-model", default="", metavar="NAME", help="the model's name there (default: the only one)"
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help="its first line is the server's API key (default: OPENAI_API_KEY in the environment)",
    )  # fmt: skip


def _run_options(parser: argparse.ArgumentParser) -> None:
    from crystallm_kit.results import FORMATS

    parser.add_argument("-n", type=int, metavar="N", help="how many (default: as said in words, else 1)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="same seed, same samples (default: 0)"
    )
    _model_options(parser)
    parser.add_argument("--protocol", default="kit", metavar="NAME", help="set of checks (default: kit)")
    parser.add_argument("--keep-duplicates", action="store_true", help="let copies of earlier samples count")
    parser.add_argument(
        "--out", type=Path, default=Path("crystals"), metavar="DIR", help="(default: crystals)"
    )
    parser.add_argument(
        "--format-out", choices=FORMATS, default="cif", help="of the structures (default: cif)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document; notes go to standard error"
    )


def _format_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", default="wyckoff", metavar="NAME", help="text format: cif, compact, wyckoff, xyz"
    )
    _set_option(parser, "a setting of the format, such as decimals=4")


def _set_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=what + "; may be repeated"
    )
