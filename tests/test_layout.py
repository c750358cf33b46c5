"""The project's shape: import order, homes of heavy libraries, the fixed top level, the tree in README.md."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crystallm_kit

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "crystallm_kit"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A room may import itself and the rooms above it; scores and text stand beside each other.
ORDER = (
    ("errors",), ("records",), ("recipes",), ("structures",), ("text",), ("scores",), ("scoring",),
    ("tokens",), ("models",), ("training",), ("engines",), ("generation",), ("results",), ("conditioned",),
    ("prediction",), ("benchmark",), ("benchmarks",),
    ("fine_tuning",), ("server",), ("screen",), ("verbs",), ("cli",), ("__main__",),
)  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Library -> where it may be imported, at the top of a module or inside a function.
HOMES = {
    "torch": (
        "models/", "training/", "engines/transformers_local.py", "engines/cache.py", "engines/stopping.py",
        "engines/continuous.py", "engines/slots.py", "engines/recording.py", "engines/slot_attention.py",
        "engines/drawing.py",
        "engines/vllm",
        "tokens/tokenizer.py", "tokens/masking.py", "structures/tensors.py", "structures/relaxation.py",
        "structures/chgnet_batches.py", "structures/chgnet_layers.py", "structures/relaxation_speed.py",
        "server/speed.py",
    ),
    "transformers": (
        "models/", "training/", "engines/transformers_local.py", "engines/cache.py", "engines/slots.py",
        "engines/slot_attention.py", "tokens/tokenizer.py",
    ),
    "tokenizers": ("tokens/tokenizer.py",),
    "datasets": ("tokens/corpus.py",),
    "accelerate": ("models/", "training/"),
    "peft": ("models/", "training/"),
    "bitsandbytes": ("models/", "training/"),
    "huggingface_hub": ("models/", "training/"),
    "tensorboard": ("training/curves.py",),
    "wandb": ("training/curves.py",),
    "vllm": ("engines/vllm",),
    "openai": ("engines/openai_endpoint.py",),
    "httpx": ("engines/openai_endpoint.py", "server/"),
    "fastapi": ("server/",),
    "uvicorn": ("server/",),
    "prometheus_client": ("server/",),
    "ase": ("structures/relaxation.py",),
    "chgnet": ("structures/relaxation.py", "structures/chgnet_", "structures/relaxation_speed.py"),
    "matplotlib": (),
    "jinja2": ("scoring/document.py",),
    "numba": ("scores/",),
    "ray": ("tokens/", "generation.py", "scoring/"),
    "pandas": (),
}  # fmt: skip
# Where a heavy library may be imported at the top of a module: what is only ever imported to compute with it.
AT_THE_TOP = (
    "scores/matcher/",
    "models/",
    "training/",
    "engines/transformers_local.py",
    "engines/cache.py",
    "engines/stopping.py",
    "engines/continuous.py",
    "engines/slots.py",
    "engines/recording.py",
    "engines/slot_attention.py",
    "engines/drawing.py",
    "engines/vllm",
    "tokens/masking.py",
    "structures/chgnet_batches.py",
    "structures/chgnet_layers.py",
)
# What the server's own modules load at the top: nothing imports them but the verb `serve`.
SERVER_LIBRARIES = {"fastapi", "uvicorn", "httpx", "prometheus_client"}
PUBLIC_NAMES_AT_MOST = 15


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_the_top: bool = False) -> Iterator[str]:
    """Yield the dotted names that a module imports: everywhere, or when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _run_on_import(tree) if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run_on_import(child)


def own_rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("crystallm_kit.")}


def test_every_module_is_in_a_room_of_the_picture():
    assert {room_of(path) for path in MODULES} <= {*RANK, "__init__"}


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) != "__init__"], ids=name_of)
def test_imports_point_only_towards_the_records(path):
    room = room_of(path)
    wrong = {other for other in own_rooms(path) if other != room and not RANK[other] < RANK[room]}
    assert not wrong, f"{name_of(path)} imports {wrong}"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) == "scores"], ids=name_of)
def test_scores_need_neither_torch_nor_token_ids(path):
    assert own_rooms(path) <= {"records", "errors", "recipes", "structures", "text", "scores"}
    assert "torch" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_stay_in_their_homes(path):
    for library in {name.split(".")[0] for name in imports(path)} & set(HOMES):
        assert name_of(path).startswith(HOMES[library] or ("nowhere",)), f"{name_of(path)} imports {library}"
    if not name_of(path).startswith(AT_THE_TOP):
        at_the_top = {name.split(".")[0] for name in imports(path, at_the_top=True)} & set(HOMES)
        if name_of(path).startswith("server/"):
            at_the_top -= SERVER_LIBRARIES
        assert not at_the_top, f"{name_of(path)} loads {at_the_top} when imported"


def test_the_top_level_is_fixed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: what belongs to the project cannot be told from what was built")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "crystallm_kit", "tests"}
    assert allowed <= visible
    assert visible <= allowed | {"tokenizers", "finetune", "serve", "eval"}


def test_tokenizers_holds_no_code():
    """With an __init__.py, the folder would shadow Hugging Face's tokenizers for scripts started here."""
    assert not list((ROOT / "tokenizers").rglob("*.py"))


def test_stage_folders_hold_no_code_that_shadows_a_library():
    for folder in ("tokenizers", "finetune", "serve", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.stem not in sys.stdlib_module_names, path
            assert path.stem not in {
                *HOMES,
                "numpy",
                "rich",
                "yaml",
                "pymatgen",
                "moyopy",
                "crystallm_kit",
            }, path


def test_every_module_says_what_it_is():
    for path in MODULES:
        document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert document, name_of(path)
        assert len(document.partition("\n\n")[0].split()) > 2, name_of(path)


def test_the_tree_in_the_readme_is_the_packages():
    run = [sys.executable, ROOT / ".ci" / "readme-tree", "--check"]
    checked = subprocess.run(run, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


# ---------------------------------------------------------------- the public names


def test_there_are_few_public_names_and_each_is_there():
    assert len(crystallm_kit.__all__) <= PUBLIC_NAMES_AT_MOST
    assert crystallm_kit.__all__ == sorted(crystallm_kit.__all__)
    for name in crystallm_kit.__all__:
        assert getattr(crystallm_kit, name).__doc__, name
        assert name in dir(crystallm_kit)


def test_type_checkers_see_the_names_where_they_are():
    """The block for type checkers and the table of homes say the same."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {
        alias.name: node.module.removeprefix("crystallm_kit.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("crystallm_kit.")
        for alias in node.names
    }
    assert seen == crystallm_kit._HOMES
    assert {*seen, "encode", "decode"} == set(crystallm_kit.__all__)
    for name, home in seen.items():
        found = getattr(importlib.import_module(f"crystallm_kit.{home}"), name)
        assert getattr(crystallm_kit, name) is found


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        crystallm_kit.genrate  # noqa: B018


def loaded_after(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(run.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import crystallm_kit",
        "import crystallm_kit; dir(crystallm_kit)",
        "import crystallm_kit.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass",
        "import crystallm_kit.cli as c\ntry: c.main(['generate', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_importing_the_package_and_asking_for_help_load_nothing_heavy(statement):
    heavy = {*HOMES, "numpy", "pymatgen", "moyopy", "pyarrow", "scipy", "yaml", "rich"}
    assert not loaded_after(statement) & heavy


def test_reading_writing_and_judging_load_no_torch():
    names = "read, write, encode, decode, augment, validate, understand, Conditions, generate"
    assert not loaded_after(f"from crystallm_kit import {names}") & {"torch", "transformers", "datasets"}


def test_encode_and_decode_are_inverse_for_a_pymatgen_structure():
    from pymatgen.core import Lattice, Structure

    nacl = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    text = crystallm_kit.encode(nacl)
    assert text == crystallm_kit.encode(crystallm_kit.Crystal("", nacl))
    assert crystallm_kit.encode(crystallm_kit.decode(text)) == text
    assert crystallm_kit.decode(
        crystallm_kit.encode(nacl, "compact", length_decimals=2), "compact"
    ).structure.matches(nacl)
