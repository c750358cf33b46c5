"""The speed table: how fast the kit trains, beside how others train, on the machine at hand.

    python -m crystallm_kit.training.speed --build-data mp_train.parquet --out data        # any machine
    python -m crystallm_kit.training.speed lora crystal-text-llm --data data --out speed   # one GPU
    python -m crystallm_kit.training.speed --list

Weights are random and architectures real; texts are real (speed_data.py). Each row runs in a process of its
own, in two under torchrun where two GPUs are measured, is ended after `--seconds` of timed steps, and adds
one line to OUT/rows.jsonl; what it printed is in OUT/ROW.log. The table of all rows in OUT is printed last.
`--toy` runs the same rows on two layers, on a CPU too.

Steps are timed after a warm-up, in which layers are compiled, from one wait for the GPU to another. Tokens
are those of prompts and texts, padding left out. FLOPs of a token:

    4 x frozen + 6 x trained weights of the matrices that it meets: 2 forward, 2 backward through them, 2 more
    for the gradient of a weight that trains. An embedding that is looked up counts nothing; a base model's
    output head, computed at labelled positions alone, counts by their share.

Attention (a few per cent at these lengths) and what gradient checkpointing computes again are left out. MFU
is tokens/s x that over 989 TFLOP/s a GPU. "6N" counts 6 for every weight, frozen or not, the head everywhere.

Not here: what rows are (speed_rows.py), the loops (loop.py, peer_loops.py), texts (speed_data.py).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from crystallm_kit.errors import UserError
from crystallm_kit.models.checkpoints import git_commit, library_versions
from crystallm_kit.training.progress import is_first_process
from crystallm_kit.training.speed_rows import RATIOS, ROWS, Place, environment, launcher

_SHORTEST_SECONDS = 30.0


def measure_row(name: str, place: Place) -> dict[str, Any]:
    """Measure one row in this process; return its numbers and what they depend on."""
    place.out.mkdir(parents=True, exist_ok=True)
    numbers = ROWS[name].measure(name, place)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "row": name,
        "what": ROWS[name].what,
        **numbers,
        "device": f"{ROWS[name].n_gpus} x {device}",
        "is_toy": place.is_toy,
        "versions": library_versions(),
        "commit": git_commit(),
    }


def run_row(name: str, place: Place, timeout_seconds: float) -> dict[str, Any]:
    """Measure one row in processes of its own; a failure is its result, with the end of what it printed.

    Args:
        name: Of the row.
        place: Where.
        timeout_seconds: Its processes are killed after this time.
    """
    row = ROWS[name]
    log, result = place.out / f"{name}.log", place.out / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [*launcher(row.n_processes), "-m", "crystallm_kit.training.speed", name, "--inside"]
    command += ["--data", str(place.data), "--out", str(place.out), "--seconds", str(place.seconds)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *["--toy"] * place.is_toy],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(row.n_gpus),
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_seconds)
            problem = f"exit code {code}"
        except subprocess.TimeoutExpired:
            problem = f"no end within {timeout_seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found if problem == "exit code 0" else {**found, "ended_with": problem}
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
    return {"row": name, "what": row.what, "error": problem, "log": tail}


def run_rows(
    names: Iterable[str], place: Place, timeout_seconds: float, *, minutes: float = 600.0
) -> list[dict[str, Any]]:
    """Measure rows one after the other; print and keep each when it ends.

    Args:
        names: Of the rows.
        place: Where.
        timeout_seconds: Of a row.
        minutes: Of all rows; those that find less than half a minute left are not begun.
    """
    place.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    records = []
    for name in names:
        left = end - time.monotonic()
        if left < _SHORTEST_SECONDS:
            print(f"{name}: not begun, {left:.0f} s are left", flush=True)
            continue
        print(f"{name}: {ROWS[name].what}", flush=True)
        record = run_row(name, place, min(timeout_seconds, left))
        records.append(record)
        with (place.out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        numbers = [f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, float)]
        print("  " + ("\n  ".join(record["log"]) if "error" in record else ", ".join(numbers)), flush=True)
    return records


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """Return results as a Markdown table, the last of each row, and the ratios of rows with each other."""
    last = {record["row"]: record for record in records}
    lines = [
        "| row | what | tokens/s | crystals/s | MFU | 6N | peak GB | timed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {record['what']} | {' | '.join(_cells(record))} |" for name, record in last.items()
    ]
    for name, other, rate in RATIOS:
        if all(rate in last.get(row, {}) for row in (name, other)):
            ratio = last[name][rate] / last[other][rate]
            lines.append(f"\n{name} / {other}, {rate.replace('_per_second', '/s')}: {ratio:.2f}")
    return "\n".join(lines)


def _cells(record: Mapping[str, Any]) -> list[str]:
    if "error" in record:
        return [f"failed: {record['error']}", *[""] * 5]
    if "largest_relative_difference" in record:
        difference = record["largest_relative_difference"]
        return [f"losses within {difference:.0e} of each other, relatively", *[""] * 5]
    if "tokens_per_second" not in record:
        return ["no step was timed", *[""] * 5]
    return [
        f"{record['tokens_per_second']:,.0f}",
        f"{record['crystals_per_second']:,.1f}",
        *(f"{record[key]:.1%}" if key in record else "" for key in ("mfu", "mfu_6n")),
        f"{record['peak_memory_gb']:.1f}" if "peak_memory_gb" in record else "",
        f"{record['timed_steps']} steps, {record['timed_seconds']:.0f} s",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure rows from the command line; return the exit code (1: a row failed; 2: a user's mistake)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:24}{row.what}" for name, row in ROWS.items()))
        return 0
    if options.out is None:
        parser.error("--out is needed")
    try:
        if options.build_data:
            return _build(options)
        unknown = [row for row in options.rows if row not in ROWS]
        if unknown or not options.rows or options.data is None:
            parser.error(
                f"give --data, and rows of {', '.join(ROWS)}; got {' '.join(unknown or options.rows)}"
            )
        place = Place(options.data, options.out, options.seconds, options.toy)
        if options.inside:
            return _inside(options.rows[0], place)
        records = run_rows(options.rows, place, options.timeout, minutes=options.minutes)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    kept = place.out / "rows.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    print(table(map(json.loads, lines)))
    return int(any("error" in record for record in records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crystallm_kit.training.speed", description="Measure how fast models train."
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--list", action="store_true", help="say what the rows are")
    parser.add_argument("--build-data", nargs="+", type=Path, metavar="FILE", help="make OUT from crystals")
    parser.add_argument("--crystals", type=int, default=10_000, help="with --build-data: at most")
    parser.add_argument("--data", type=Path, help="folder that --build-data made")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed steps a row")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds of a row in all")
    parser.add_argument("--minutes", type=float, default=600.0, help="of all rows")
    parser.add_argument("--toy", action="store_true", help="two layers, to try everything out")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


def _build(options: argparse.Namespace) -> int:
    from crystallm_kit.training.speed_data import BASE_VOCABULARY, build

    vocabulary = 4_096 if options.toy else BASE_VOCABULARY
    means = build(options.build_data, options.out, n_crystals=options.crystals, base_vocabulary=vocabulary)
    print(json.dumps({f"{name}_tokens_per_crystal": round(mean, 1) for name, mean in means.items()}))
    return 0


def _inside(name: str, place: Place) -> int:
    found = measure_row(name, place)
    if is_first_process():
        (place.out / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
