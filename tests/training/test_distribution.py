"""distribution.py: two processes are one run, whoever holds the weights; losing one ends it cleanly."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from crystallm_kit.errors import RecipeError
from crystallm_kit.models.bases import BaseRecipe, LoraRecipe, load_base
from crystallm_kit.models.checkpoints import ModelRecipe
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.tokens.drawing import Examples, StoredInfo, VocabularyInfo
from crystallm_kit.training.batches import write_arrays
from crystallm_kit.training.distribution import Distribution, full, is_first_to_tell, local
from crystallm_kit.training.learner import layout_of
from crystallm_kit.training.loop import train
from crystallm_kit.training.recipe import (
    DataRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    TrainingRecipe,
)

ROOT = Path(__file__).parents[2]
# 310 tokens of the base in 320 rows; 14 new ones need four rows more.
VOCABULARY = VocabularyInfo(324, 0, 1, None, {}, 310)
TRAINING = ["-m", "crystallm_kit.training.loop"]
# Runs several recipes one after another: starting Python twice takes longer than they do.
DRIVER = """
import sys
from crystallm_kit.training.loop import main
for job in sys.argv[1:]:
    recipe, out, *settings = job.split(",")
    assert main([recipe, "--out", out, *(f"--set={setting}" for setting in settings)]) == 0, job
"""


def sequences(n: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    texts = []
    for length in random.integers(8, 24, n):
        first, step = random.integers(0, 30), random.integers(1, 4)
        texts.append(np.append((first + step * np.arange(length)) * 10 % 320 + 2, 1))
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in texts])))
    return Examples(np.concatenate(texts), offsets, np.full(n, 2))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> TrainingRecipe:
    """A recipe without a model; what is new to a base model is among its 324 tokens."""
    path = tmp_path_factory.mktemp("corpus") / "toy.npz"
    info = StoredInfo(VOCABULARY, "wyckoff", {}, "kit-1", "ab" * 32)
    write_arrays(path, [sequences(80, seed) for seed in range(2)], sequences(20, 9), info)
    return TrainingRecipe(
        seed=1,
        steps=8,
        batch_tokens=512,
        micro_tokens=300,  # several passes for each step
        eval_every=3,
        checkpoint_every=4,
        log_every=2,
        ema_decay=0.9,
        export_dtype="float32",
        model=ModelRecipe(hidden_size=64, n_layers=2, n_heads=2, max_positions=64),
        data=DataRecipe(corpus=path),
        optimizer=OptimizerRecipe(lr=5e-3),
        schedule=ScheduleRecipe("constant", warmup_steps=2),
    )


@pytest.fixture(scope="module")
def kinds(recipe, base_folder) -> dict[str, TrainingRecipe]:
    """What two processes have to train as one does."""

    def based(family: str, **settings) -> TrainingRecipe:
        base = BaseRecipe(str(base_folder(family)), **settings)
        return dataclasses.replace(recipe, model=None, base=base)

    lora, dora = LoraRecipe(rank=4, dropout=0.0), LoraRecipe(rank=4, dropout=0.0, dora=True)
    return {
        "scratch": recipe,
        "lora": based("llama", lora=lora),
        "lora-tied": based("qwen3", lora=lora),
        "dora": based("llama", lora=dora, gradient_checkpointing=True),
        "full": based("llama", method="full"),
        "full-tied": based("qwen3", method="full"),
    }


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(recipe: TrainingRecipe, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    return path


def losses(out: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def exported(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (path,) = (out / "model").glob("*.safetensors")
    return load_file(path)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(command: list[str], **environment: str) -> subprocess.Popen:
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.Popen(
        command, env={**os.environ, **given}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def torchrun(*arguments: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return start([*launcher, f"--master-port={free_port()}", *arguments])


def ranks(*arguments: str, **environment: str) -> list[subprocess.Popen]:
    """Start two processes as `srun` does: each by itself."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", **environment}
    return [start([sys.executable, *arguments], **place, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Return exit code, output and errors; a process that hangs is killed."""
    try:
        output, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output, errors


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def children(process: subprocess.Popen) -> list[int]:
    """Return the ids of a launcher's ranks."""
    return [int(i) for i in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


# ---------------------------------------------------------------- one process


def test_one_process_is_never_sharded():
    distribution = Distribution("fsdp")
    assert (distribution.world, distribution.rank, distribution.is_main) == (1, 0, True)
    assert not distribution.is_sharded
    module = torch.nn.Linear(2, 2)
    assert distribution.spread(module, [], bfloat16=False) is module
    assert distribution.gather("a") == ["a"]
    assert distribution.any(True)
    assert not distribution.any(False)
    assert is_first_to_tell()


def test_the_gradient_of_a_step_is_its_mean_over_targets_however_many_passes_it_has():
    distribution = Distribution()
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    module = torch.nn.Module()
    for is_last in (False, True):
        distribution.backward((weight * 5).sum(), module, 10, is_last=is_last)
    assert weight.grad.tolist() == [1.0, 1.0]
    norm = distribution.update(torch.optim.SGD([weight], lr=1.0), [weight], 0.5)
    assert norm.item() == pytest.approx(2**0.5)
    step = 0.5 * 2**-0.5  # of a gradient of norm 0.5
    assert weight.tolist() == pytest.approx([3 - step, 4 - step])
    assert weight.grad is None


def test_a_tensor_that_is_not_spread_is_itself():
    tensor = torch.zeros(2)
    assert full(tensor) is tensor
    assert local({"a": tensor})[0] is tensor


def test_quantised_weights_are_not_sharded(recipe, base_folder):
    base = BaseRecipe(str(base_folder("llama")), quantisation="nf4")
    distribution = Distribution()
    distribution.is_sharded = True
    with pytest.raises(RecipeError, match="quantisation nf4: quantised weights cannot be sharded"):
        layout_of(dataclasses.replace(recipe, model=None, base=base), distribution)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("settings", [{"method": "full"}, {"lora": LoraRecipe(dora=True)}])
def test_a_model_of_shapes_alone_is_the_one_that_is_read(base_folder, family, settings):
    """What processes other than the first begin with has to fit what the first sends them."""
    recipe = BaseRecipe(str(base_folder(family)), **settings)
    before = torch.get_rng_state()

    def shapes(device: str, runs_on: str | None = None) -> list:
        model = load_base(recipe, VOCABULARY, device=device, seed=1, runs_on=runs_on)
        named = [*model.named_parameters(), *model.named_buffers()]
        assert {tensor.device.type for _, tensor in named} == {device}
        return [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in named]

    assert shapes("meta") == shapes("cpu")
    assert torch.equal(before, torch.get_rng_state())
    on_gpus = shapes("cpu", "cuda")
    assert on_gpus == shapes("meta", "cuda")
    frozen = {dtype for name, _, dtype, trains in on_gpus if "weight" in name and not trains}
    assert frozen <= {torch.bfloat16}, "frozen weights are loaded on the CPU as the GPUs will hold them"
    assert {dtype for _, _, dtype, trains in on_gpus if trains} == {torch.float32}


# ---------------------------------------------------------------- two processes


KINDS = ("scratch", "lora", "lora-tied", "dora", "full", "full-tied")
SHARDINGS = ("none", "fsdp")


@pytest.fixture(scope="module")
def trained(kinds, tmp_path_factory) -> Path:
    """Return the folder of <kind>-one, run by one process, and of <kind>-none and <kind>-fsdp, run by two.

    lora-<sharding>-shrunk has its first four steps by two processes, lora-<sharding>-grown its last four.
    """
    home = tmp_path_factory.mktemp("trained")
    jobs = []
    for kind in KINDS:
        path = write(kinds[kind], home / f"{kind}.yaml")
        train(kinds[kind], home / f"{kind}-one")
        jobs += [f"{path},{home}/{kind}-{sharding},sharding={sharding}" for sharding in SHARDINGS]
    first = dataclasses.replace(kinds["lora"], steps=4)
    for sharding in SHARDINGS:
        train(first, home / f"lora-{sharding}-grown")
        jobs.append(f"{home}/lora.yaml,{home}/lora-{sharding}-grown,sharding={sharding}")
        jobs.append(f"{home}/lora.yaml,{home}/lora-{sharding}-shrunk,sharding={sharding},steps=4")
    (home / "driver.py").write_text(DRIVER)
    code, _, errors = ended(torchrun(str(home / "driver.py"), *jobs))
    assert code == 0, errors
    for sharding in SHARDINGS:
        train(kinds["lora"], home / f"lora-{sharding}-shrunk")
    return home


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(trained, kind, sharding):
    """FSDP2 used weights that it had gathered for a validation on the running mean: 4e-3 from step 4 on."""
    one, two = losses(trained / f"{kind}-one"), losses(trained / f"{kind}-{sharding}")
    assert sorted(two) == list(range(1, 9))
    assert two == pytest.approx(one, rel=5e-6)
    whole, shared = exported(trained / f"{kind}-one"), exported(trained / f"{kind}-{sharding}")
    assert whole.keys() == shared.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(shared[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("change", ["shrunk", "grown"])
def test_a_checkpoint_of_one_number_of_processes_is_read_by_another(trained, sharding, change):
    out = trained / f"lora-{sharding}-{change}"
    assert losses(out) == pytest.approx(losses(trained / "lora-one"), rel=5e-6)
    state = {path.name for path in (out / "checkpoints" / "00000008").iterdir()}
    is_spread = sharding == "fsdp" and change == "grown"
    assert state == ({"state.pt", ".metadata", "__0_0.distcp", "__1_0.distcp"} if is_spread else {"state.pt"})


@pytest.fixture
def long(kinds, tmp_path) -> Path:
    recipe = dataclasses.replace(kinds["lora"], steps=100_000, eval_every=100_000, checkpoint_every=10)
    return write(recipe, tmp_path / "long.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "lost"), [("fsdp", 1), ("none", 0)])
def test_a_killed_process_ends_the_others_with_one_message_and_a_whole_checkpoint(
    long, kinds, tmp_path, sharding, lost
):
    out = tmp_path / "run"
    process = torchrun(*TRAINING, str(long), "--out", str(out), "--set", f"sharding={sharding}")
    wait_for(out / "checkpoints" / "00000020", process)
    os.kill(children(process)[lost], signal.SIGKILL)
    code, _, errors = ended(process)
    assert code != 0
    assert errors.count("TrainingError: ") == 1
    assert "another process of the run is gone or does not answer" in errors
    last = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())
    assert f"The checkpoint of step {last} is whole and stays" in errors
    train(dataclasses.replace(kinds["lora"], steps=last + 1, eval_every=100_000), out)
    assert sorted(losses(out)) == list(range(1, last + 2))


@pytest.mark.slow
def test_sigterm_to_each_process_saves_and_exits_with_zero(long, tmp_path):
    """As Slurm does under `srun`; one process alone is enough, since they agree on where to stop."""
    out = tmp_path / "run"
    processes = ranks(*TRAINING, str(long), "--out", str(out), "--set", "sharding=fsdp")
    wait_for(out / "checkpoints" / "00000010", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    results = [ended(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    result = json.loads(results[0][1])
    assert result["stopped"] == "signal"
    assert results[1][1] == ""
    assert (out / "checkpoints" / f"{result['steps']:08d}" / ".metadata").exists()
    assert not (out / "model").exists()


@pytest.mark.slow
def test_accelerates_config_file_shards_as_the_recipes_key_does(kinds, trained, tmp_path):
    """The launcher's settings reach its processes as environment variables; on a CPU it starts no others."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = str(ROOT / "finetune" / "accelerate-fsdp2.yaml")
    given = launch_command_parser().parse_args(["--config_file", config, "--num_processes", "2", "-m", "x"])
    told = prepare_multi_gpu_env(_validate_launch_command(given)[0])
    environment = {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    path = write(kinds["lora"], tmp_path / "lora.yaml")
    processes = ranks(*TRAINING, str(path), "--out", str(tmp_path / "run"), **environment)
    results = [ended(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert (tmp_path / "run" / "checkpoints" / "00000008" / ".metadata").exists()
    assert losses(tmp_path / "run") == pytest.approx(losses(trained / "lora-one"), rel=5e-6)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_though_torchrun_itself_exits_with_one(long, tmp_path):
    out = tmp_path / "run"
    process = torchrun(*TRAINING, str(long), "--out", str(out))
    wait_for(out / "checkpoints" / "00000010", process)
    process.send_signal(signal.SIGTERM)
    code, output, errors = ended(process)
    result = json.loads(output)
    assert result["stopped"] == "signal"
    assert (out / "checkpoints" / f"{result['steps']:08d}" / "state.pt").exists()
    assert "TrainingError" not in errors
    assert code == 1  # if torchrun learns to exit with 0, finetune/README.md can be shorter


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'lrr' under 'optimizer'"),  # before the processes have met
        ("base.lora.target_modules=[x]", "is called 'x'"),  # after
    ],
)
def test_a_mistake_is_told_once(long, tmp_path, setting, message):
    command = [*TRAINING, str(long), "--out", str(tmp_path / "run"), "--set", setting]
    processes = ranks(*command)
    results = [ended(process) for process in processes]
    assert [code for code, _, _ in results] == [2, 2]
    assert sum(errors.count(message) for _, _, errors in results) == 1
