"""failures.py: each real cause ends in a message that says what to change, and that the checkpoint stays."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crystallm_kit.errors import RecipeError, TrainingError
from crystallm_kit.models.bases import BaseRecipe
from crystallm_kit.models.checkpoints import ModelRecipe
from crystallm_kit.training.failures import GradientWatch, diverged, explain
from crystallm_kit.training.recipe import OptimizerRecipe, ScheduleRecipe, TrainingRecipe

ROOT = Path(__file__).parents[2]
RECIPE = TrainingRecipe(
    seed=1, steps=10, batch_tokens=65_536, micro_tokens=16_384, checkpoint_every=500,
    model=ModelRecipe(max_positions=512),
    optimizer=OptimizerRecipe(lr=3e-3, gradient_clip=1.0), schedule=ScheduleRecipe(warmup_steps=20),
)  # fmt: skip
LORA = TrainingRecipe(seed=1, steps=10, micro_tokens=16_384, base=BaseRecipe("x"))


def told(error: BaseException, recipe: TrainingRecipe = RECIPE, out="runs/a", last_step=4_000) -> str:
    found = explain(error, recipe, out, last_step=last_step)
    assert isinstance(found, TrainingError)
    text = str(found)
    assert text.startswith(f"{out}: ")
    assert "checkpoint" in text
    return text


def raised(action, *kinds: type[BaseException]) -> BaseException:
    with pytest.raises(kinds or BaseException) as caught:
        action()
    return caught.value


# ---------------------------------------------------------------- memory


def test_a_gpu_without_memory_is_told_with_smaller_passes():
    # as torch 2.13's CUDA allocator words it; without a GPU it cannot be provoked
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
        "1.10 GiB is free. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 6.20 GiB is "
        "reserved by PyTorch but unallocated."
    )
    text = told(error)
    assert "out of GPU memory (tried to allocate 2.50 GiB)" in text
    assert "The checkpoint of step 4,000 is whole and stays." in text
    assert "Lower micro_tokens (now 16,384) to 8,192" in text
    assert "run the same command: it resumes" in text
    assert "6.20 GiB were held in pieces: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in text
    assert "base." not in text
    lora = told(error, LORA)
    assert "base.gradient_checkpointing: true" in lora
    assert "base.quantisation: nf4" in lora
    full = TrainingRecipe(seed=1, steps=1, base=BaseRecipe("x", method="full", gradient_checkpointing=True))
    assert "gradient_checkpointing" not in told(error, full)
    assert "base.method: lora" in told(error, full)


def test_passes_of_one_example_are_made_smaller_by_shorter_examples():
    small = TrainingRecipe(seed=1, steps=1, micro_tokens=512, model=ModelRecipe(max_positions=512))
    text = told(torch.OutOfMemoryError("CUDA out of memory."), small)
    assert "Lower data.max_length (now 512) together with micro_tokens (now 512)" in text


def test_a_process_that_may_have_no_more_memory_is_told_so():
    """The limit is set on a process of its own, and the allocations fail there for real."""
    code = (
        "import resource, numpy, torch\n"
        "from tests.training.test_failures import RECIPE\n"
        "from crystallm_kit.training.failures import explain\n"
        "resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))\n"
        "for n in (lambda: torch.empty(10**10), lambda: numpy.ones(10**10), lambda: bytearray(10**11)):\n"
        "    try: n()\n"
        "    except Exception as error: print(explain(error, RECIPE, 'runs/a', last_step=None))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("runs/a: out of main memory")
        assert "There is no checkpoint yet (checkpoint_every: 500)" in line
        assert "micro_tokens (now 16,384) to 8,192" in line


# ---------------------------------------------------------------- disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte; /dev/full, which has none, where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        yield Path("/dev/full")
        return
    yield folder
    # lazily: the caught error's frames hold the half-written file open
    subprocess.run(["umount", "--lazy", folder], check=True)


def write_with_torch(path: Path) -> None:
    torch.save(torch.ones(10**6), path)


def write_with_old_torch(path: Path) -> None:
    torch.save(torch.ones(10**6), path, _use_new_zipfile_serialization=False)


def write_with_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(10**6)}, path)


def write_with_numpy(path: Path) -> None:
    np.save(path, np.ones(10**6))


def write_text(path: Path) -> None:
    path.write_text("x" * 2_000_000, encoding="utf-8")


def write_spread(path: Path) -> None:
    """As the processes of a sharded run do; torch's error is no Exception."""
    from torch.distributed import checkpoint

    checkpoint.save({"x": torch.ones(10**6)}, checkpoint_id=path, no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "write",
    [
        write_with_torch,
        write_with_old_torch,
        write_with_safetensors,
        write_with_numpy,
        write_text,
        write_spread,
    ],
)
def test_a_disk_that_fills_up_is_told_with_what_is_free(small_disk, write):
    is_device = small_disk.is_char_device()
    if is_device and write in (write_with_safetensors, write_spread):
        pytest.skip("it makes files beside the one named: needs a mounted disk")
    error = raised(lambda: write(small_disk if is_device else small_disk / "weights.npy"))
    out = Path("runs/a") if is_device else small_disk / "run"
    text = told(error, out=out)
    assert "the disk is full, or a quota is" in text
    assert re_free(text) < 0.01 or is_device
    assert "run the same command: it resumes" in text


def re_free(text: str) -> float:
    return float(text.split("There are ")[1].split(" GB")[0].replace(",", ""))


def test_room_for_checkpoints_is_told_by_the_last_one(tmp_path):
    folder = tmp_path / "checkpoints" / "00000500"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(bytes(30_000_000))
    text = told(OSError(errno.EDQUOT, "Disk quota exceeded"), out=tmp_path)
    assert "three checkpoints of 0.03 GB" in text


def test_a_checkpoint_that_cannot_be_read_is_no_full_disk(tmp_path):
    path = tmp_path / "state.pt"
    torch.save(torch.ones(1_000), path)
    path.write_bytes(path.read_bytes()[:500])
    error = raised(lambda: torch.load(path, weights_only=True))
    assert explain(error, RECIPE, "runs/a", last_step=1) is None


# ---------------------------------------------------------------- other processes

SURVIVOR = """
import datetime, os, signal, sys, time
import torch.distributed as distributed, torch
from tests.training.test_failures import RECIPE
from crystallm_kit.training.failures import explain

rank = int(os.environ["RANK"])
distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))
numbers = torch.ones(1000)
distributed.all_reduce(numbers)
if rank == 1:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))  # SIGSTOP: there, and silent
try:
    for _ in range(3):
        distributed.all_reduce(numbers)
except Exception as error:
    print(explain(error, RECIPE, "runs/a", last_step=500), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGKILL", "closed by peer|reset by peer"),
        pytest.param("SIGSTOP", "Timed out waiting", marks=pytest.mark.slow),
    ],
)
def test_the_survivor_of_two_processes_says_that_the_other_is_gone(how, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SURVIVOR, how],
            cwd=ROOT,
            env={**os.environ, **variables, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        shown, _ = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert "another process of the run is gone or does not answer" in shown
    assert any(part in shown for part in said.split("|"))
    assert "The checkpoint of step 500 is whole and stays." in shown


def test_nccls_words_for_a_lost_process_are_known():
    # ProcessGroupNCCL.cpp of torch 2.13
    for text in (
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE) ran for "
        "1800011 milliseconds before timing out.",
        "NCCL error: remote process exited or there was a network error",
    ):
        assert "another process of the run is gone" in told(torch.distributed.DistBackendError(text))


def test_processes_that_do_not_find_each_other_are_told_the_port():
    from datetime import timedelta

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = raised(
        lambda: torch.distributed.TCPStore(
            "127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=1)
        )
    )
    assert "MASTER_PORT" in told(error, last_step=None)


def test_a_closed_pipe_is_a_lost_process_only_where_there_are_several(monkeypatch):
    error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert explain(error, RECIPE, "runs/a", last_step=1) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another process" in told(error)


# ---------------------------------------------------------------- the rest


def test_a_token_outside_the_embedding_is_told_as_that():
    embedding = torch.nn.Embedding(10, 4)
    error = raised(lambda: embedding(torch.tensor([10])), IndexError)
    assert "a token id lies outside the model's embedding" in told(error)
    on_gpu = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")
    assert "prepared with another tokenizer" in told(on_gpu)


def test_broken_bitsandbytes_and_gpus_are_told():
    quantised = TrainingRecipe(seed=1, steps=1, base=BaseRecipe("x", quantisation="nf4"))
    error = RuntimeError("CUDA Setup failed despite GPU being available.")
    assert "base.quantisation: nf4 needs" in told_without_checkpoint(error, quantised)
    assert "CUDA_VISIBLE_DEVICES" in told(
        RuntimeError("CUDA error: an illegal memory access was encountered")
    )


def told_without_checkpoint(error: BaseException, recipe: TrainingRecipe) -> str:
    found = explain(error, recipe, "runs/a", last_step=None)
    assert found is not None
    return str(found)


def test_the_cause_of_an_error_is_looked_at_too():
    outer = RuntimeError("the checkpoint was not written")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk is full" in told(outer)


def test_what_is_not_known_or_says_itself_what_to_do_stays_as_it_is():
    assert explain(ValueError("x must be 1"), RECIPE, "runs/a", last_step=1) is None
    assert explain(KeyboardInterrupt(), RECIPE, "runs/a", last_step=1) is None
    told_already = RecipeError("recipe: unknown key")
    told_already.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert explain(told_already, RECIPE, "runs/a", last_step=1) is None
    own = TrainingError("runs/a: the loss is nan")
    assert explain(own, RECIPE, "runs/a", last_step=1) is own


# ---------------------------------------------------------------- gradients


def norms_of_training(lr: float, n: int = 400) -> list[float]:
    """Return the gradient norms of a deep linear network; with a large rate it runs away."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(4)]
    network = torch.nn.Sequential(*layers)
    inputs = torch.randn(32, 8)
    labels = inputs @ torch.randn(8, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    norms = []
    for step in range(n):
        if step == 50:
            optimizer.param_groups[0]["lr"] = lr
        elif step == 0:
            optimizer.param_groups[0]["lr"] = 0.01
        optimizer.zero_grad()
        (network(inputs) - labels).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), float("inf"))))
        optimizer.step()
    return norms


def first_problem(watch: GradientWatch, norms: list[float]) -> tuple[int, str] | None:
    for step, norm in enumerate(norms, 1):
        if problem := watch.see(step, norm):
            return step, problem
    return None


def test_a_run_that_learns_is_left_alone():
    assert first_problem(GradientWatch(), norms_of_training(0.05)) is None


def test_a_run_that_runs_away_is_stopped_and_told_its_learning_rate():
    step, problem = first_problem(GradientWatch(patience=2), norms_of_training(5.0))
    assert 50 < step < 70
    error = diverged(problem, RECIPE, "runs/a", last_step=40)
    assert isinstance(error, TrainingError)
    for part in (
        "step 40 is whole",
        "optimizer.lr (now 0.003)",
        "gradient_clip (now 1)",
        "warmup_steps (now 20)",
    ):
        assert part in str(error)


def test_one_large_norm_passes_and_several_in_a_row_do_not():
    usual = [1.0] * 30
    assert first_problem(GradientWatch(), [*usual, *([1e4, 1.0] * 20)]) is None
    assert first_problem(GradientWatch(), [*usual, *[150.0] * 5]) == (
        35,
        "gradients explode: their norm is 150 at step 35, 150 times what it was (median 1), for 5 steps",
    )
    assert first_problem(GradientWatch(), [*usual, *[99.0] * 50]) is None


def test_large_norms_at_the_start_are_no_explosion():
    assert first_problem(GradientWatch(), [1e3, 1e5, 1.0] * 6 + [1.0] * 100) is None


def test_a_norm_that_is_no_number_is_told_at_once():
    assert GradientWatch().see(3, float("nan")) == "the gradient is nan at step 3"
    assert GradientWatch().see(3, float("inf")) == "the gradient is inf at step 3"
