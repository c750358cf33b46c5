"""How fast crystals come, from the client's side of the endpoint, beside what they are compared with.

    python -m crystallm_kit.server.speed --out speed              every row that runs here, and the table
    python -m crystallm_kit.server.speed --out speed --rows endpoint,slots --n 2000

Rows, all with one model, unconditional samples of one prompt unless said:
    generate        transformers' generate, unconstrained, batches that wait for their longest sample
    slots           ContinuousEngine in a program of its own, no HTTP: free, constrained, one composition
    endpoint        crystallm-kit serve --engine transformers; clients stream POST /v1/crystals
    vllm            one `vllm serve`: free and with our constraint by turns, samples as they come and all of
                    40 tokens; directly and through our app (/v1/completions) by turns
    engines         K of them side by side on the GPU, asked directly; then through our app (/v1/completions,
                    /v1/crystals)

Each server is a process of its own and each client another. A rate counts from the first request to the last
answer; of /v1/crystals it counts valid crystals, as they reach the client. The CPU seconds of every process
are read before and after, so that a row says where the time goes.

Not here: training speed (training/speed.py), how well samples do (eval/).
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson

from crystallm_kit.errors import UserError
from crystallm_kit.server.supervisor import Supervisor
from crystallm_kit.server.vllm_jobs import Served, find_vllm, free_ports, split_arguments, vllm_jobs

_SAME_TOKENS = 40
_TURNS = 4  # of each of two ways that are compared
PROMPT_N = 64  # completions asked for with one request
_COSTS = {
    "overhead": f"what the constraint costs, {_SAME_TOKENS} tokens each",
    "overhead_as_they_come": "what the constraint costs, samples as they come",
    "app_cost": "what our app costs",
}
_PUBLISHED = {
    "Crystalite (structures/s, published)": 195.0,
    "CrystaLLM's own sampler (structures/s, on an H200)": 1.5,
}


@dataclass(frozen=True)
class Place:
    """What a row needs to know.

    Attributes:
        out: Folder of results and logs.
        n: Crystals or samples of a row.
        clients: Streams at a time.
        engines: vLLM servers side by side.
        judges: Judging processes of a server.
        model: Model folder; None: the shipped one.
        vllm_python: The Python that has vLLM; None: this one.
        vllm_arguments: For every `vllm serve`.
        kv_cache_gb: Of each engine.
    """

    out: Path
    n: int
    clients: int
    engines: int
    judges: int | None
    model: str | None
    vllm_python: str | None
    vllm_arguments: tuple[str, ...]
    kv_cache_gb: float | None


# ---------------------------------------------------------------- clients


async def stream_crystals(url: str, body: dict[str, Any], n: int, clients: int) -> dict[str, Any]:
    """Return what came of n crystals wanted of POST /v1/crystals by several streams at a time."""
    shares = [n // clients + (i < n % clients) for i in range(clients)]
    arrivals: list[float] = []
    funnels: list[dict[str, Any]] = []
    ids: set[str] = set()
    started = time.perf_counter()

    async def one(seed: int, share: int) -> None:
        wanted = {**body, "n": share, "max_samples": 20 * share + 100, "seed": seed, "stream": True}
        async with client.stream("POST", f"{url}/v1/crystals", json=wanted) as answer:
            if answer.status_code != 200:
                raise UserError(f"{url}: {answer.status_code}: {(await answer.aread())[:300]!r}")
            async for name, data in _events(answer):
                if name == "crystal":
                    crystal = orjson.loads(data)
                    if not crystal["verdict"]["valid"] or not crystal["structure"]:
                        raise UserError(f"an invalid crystal was told: {data[:300]!r}")
                    ids.add(f"{seed}/{crystal['id']}")
                    arrivals.append(time.perf_counter() - started)
                elif name == "funnel":
                    funnels.append(orjson.loads(data))
                elif name == "error":
                    raise UserError(f"{url}: {data[:300]!r}")

    async with httpx.AsyncClient(timeout=None) as client:
        await asyncio.gather(*(one(1000 + i, share) for i, share in enumerate(shares)))
    seconds = time.perf_counter() - started
    per_second = [0] * (int(seconds) + 1)
    for at in arrivals:
        per_second[int(at)] += 1
    inner = per_second[1:-1] or per_second
    samples = sum(f["usage"]["n_samples"] for f in funnels)
    return {
        "valid": len(arrivals),
        "different_ids": len(ids),
        "seconds": seconds,
        "valid_per_second": len(arrivals) / seconds,
        "slowest_second": min(inner),
        "median_second": sorted(inner)[len(inner) // 2],
        "first_crystal_seconds": min(arrivals, default=None),
        "samples": samples,
        "samples_per_second": samples / seconds,
        "completion_tokens": sum(f["usage"]["completion_tokens"] for f in funnels),
        "finish_reasons": sorted({f["finish_reason"] for f in funnels}),
        "funnel": _summed([f["funnel"] for f in funnels]),
    }


async def _events(answer: httpx.Response) -> AsyncIterator[tuple[str, bytes]]:
    """Yield (name, data) of a stream of server-sent events."""
    rest = b""
    async for chunk in answer.aiter_raw():
        *whole, rest = (rest + chunk).split(b"\n\n")
        for event in whole:
            name, data = "", b""
            for line in event.split(b"\n"):
                if line.startswith(b"event: "):
                    name = line[7:].decode()
                elif line.startswith(b"data: "):
                    data = line[6:]
            yield name, data


def _summed(funnels: Sequence[dict[str, Any]]) -> dict[str, int]:
    keys = {k for f in funnels for k, v in f.items() if isinstance(v, int)}
    return {k: sum(int(f.get(k) or 0) for f in funnels) for k in sorted(keys)}


async def ask_completions(
    urls: Sequence[str], body: dict[str, Any], n: int, at_once: int, key: str = ""
) -> dict[str, Any]:
    """Return what came of n completions, PROMPT_N a request, so many requests at a time."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    todo = iter(range(-(-n // PROMPT_N)))
    turn = itertools.cycle(urls)
    n_done = n_tokens = 0
    started = time.perf_counter()

    async def worker() -> None:
        nonlocal n_done, n_tokens
        for _ in todo:
            answer = await client.post(f"{next(turn)}/v1/completions", json={**body, "n": PROMPT_N})
            if answer.status_code != 200:
                raise UserError(f"{answer.status_code}: {answer.text[:300]}")
            data = orjson.loads(answer.content)
            n_done += len(data["choices"])
            n_tokens += data["usage"]["completion_tokens"]

    limits = httpx.Limits(max_connections=at_once + 8)
    async with httpx.AsyncClient(timeout=None, headers=headers, limits=limits) as client:
        await asyncio.gather(*(worker() for _ in range(at_once)))
    seconds = time.perf_counter() - started
    return {
        "sequences": n_done,
        "seconds": seconds,
        "sequences_per_second": n_done / seconds,
        "tokens_per_second": n_tokens / seconds,
        "mean_tokens": n_tokens / max(1, n_done),
    }


# ---------------------------------------------------------------- processes


@contextlib.contextmanager
def server(place: Place, name: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Run `crystallm-kit serve` as a process of its own; give (address, process id) when it is ready."""
    port = free_ports(1)[0]
    judges = ("--judges", str(place.judges)) if place.judges else ()
    model = ("--model", place.model) if place.model else ()
    command = [
        *(sys.executable, "-m", "crystallm_kit", "serve", "--port", str(port), *model, *judges),
        *("--max-n", str(10**6), "--max-samples", str(10**8), "--max-queue", str(10**6), *arguments),
        *("--state-folder", str(place.out / f"{name}-state")),
    ]
    log = (place.out / f"{name}.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _until_ready(url, process, place.out / f"{name}.log")
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path, seconds: float = 600.0) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise UserError(f"the server ended: {log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        time.sleep(0.25)
    raise UserError(f"{url}: not ready after {seconds:.0f} s; see {log}")


def cpu_seconds(root: int) -> dict[str, float]:
    """Return the CPU seconds that a process, its threads and its children have used, by what they are."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int(_stat(entry / "stat")[1])
    children = [root]
    for pid in children:
        children += [p for p, parent in parents.items() if parent == pid]
    found: dict[str, float] = {}
    for pid in children:
        folder = Path("/proc") / str(pid)
        with contextlib.suppress(OSError):
            if pid != root:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                kind = (
                    "judges"
                    if "judge_worker" in words
                    else "engine cores"
                    if "EngineCore" in words or "Worker" in words
                    else "engine servers"
                )
                found[kind] = found.get(kind, 0.0) + _used(folder / "stat")
                continue
            for task in (folder / "task").iterdir():
                kind = "HTTP and bookkeeping" if task.name == str(root) else "engine thread and others"
                found[kind] = found.get(kind, 0.0) + _used(task / "stat")
    return found


def _stat(path: Path) -> list[str]:
    return path.read_text().rpartition(")")[2].split()


def _used(path: Path) -> float:
    fields = _stat(path)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _client(place: Place, name: str, **job: Any) -> dict[str, Any]:
    """Run a client as a process of its own, and return what it found."""
    file = place.out / f"{name}.client.json"
    file.write_text(json.dumps(job))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "crystallm_kit.server.speed", "--client", str(file)],
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise UserError(f"the client of {name} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    rate = found.get("valid_per_second") or found.get("sequences_per_second") or 0.0
    print(f"{name}: {rate:.0f}/s, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def _with_cpu(pid: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    before = cpu_seconds(pid)
    found = work()
    after = cpu_seconds(pid)
    spent = {kind: round(after[kind] - before.get(kind, 0.0), 2) for kind in after}
    return {**found, "cpu_seconds": spent}


# ---------------------------------------------------------------- rows


def generate_row(place: Place) -> dict[str, Any]:
    """transformers' own generate: 1,024 samples at a time, unconstrained."""
    import torch

    from crystallm_kit.generation import load_model
    from crystallm_kit.records import Conditions

    model = load_model(place.model)
    network: Any = model.engine.model  # type: ignore[attr-defined]
    tokenizer: Any = model.engine.tokenizer  # type: ignore[attr-defined]
    on_gpu = network.device.type == "cuda"
    network = network.to(torch.bfloat16) if on_gpu else network
    size = min(1024 if on_gpu else 8, place.n)
    ids = tokenizer(model.template.render(Conditions()), add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([ids] * size, device=network.device)

    def once() -> int:
        with torch.inference_mode():
            out = network.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0, max_new_tokens=400,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        return int((out[:, len(ids) :] != tokenizer.pad_token_id).sum())

    once()
    started, n_tokens, n = time.perf_counter(), 0, 0
    while n < min(place.n, 8 * size):
        n_tokens += once()
        n += size
    seconds = time.perf_counter() - started
    return {
        "batch": size,
        "sequences": n,
        "seconds": seconds,
        "sequences_per_second": n / seconds,
        "tokens_per_second": n_tokens / seconds,
    }


def slots_row(place: Place) -> dict[str, Any]:
    """The engine of this process, without HTTP and without verdicts: free, constrained, one composition."""
    from crystallm_kit.engines.continuous import ContinuousEngine
    from crystallm_kit.engines.engine import Prompt, Sampling
    from crystallm_kit.engines.transformers_local import TransformersEngine
    from crystallm_kit.generation import compiler, load_model
    from crystallm_kit.records import Conditions

    model = load_model(place.model)
    local = model.engine
    if not isinstance(local, TransformersEngine):
        raise UserError("the slots row needs the transformers engine")
    engine = ContinuousEngine.over(local, dtype="bfloat16" if local.device.type == "cuda" else None)
    request = compiler(model)
    anything, oxide = Conditions(), Conditions(formula={"Sr": 1, "Ti": 1, "O": 3})
    prompts = {
        "free": Prompt(model.template.render(anything)),
        "constrained": Prompt(model.template.render(anything), request=request(anything)),
        "SrTiO3": Prompt(model.template.render(oxide), request=request(oxide)),
    }
    found: dict[str, Any] = {"slots": engine.n_slots}
    for name in (
        "free",
        "constrained",
        "SrTiO3",
        "free",
        "constrained",
        "SrTiO3",
    ):  # the first round warms up
        started = time.perf_counter()
        done = list(engine.complete([prompts[name]] * place.n, Sampling(seed=1)))
        seconds = time.perf_counter() - started
        n_tokens = sum(len(c.token_ids) for c in done)
        found[name] = {
            "sequences_per_second": len(done) / seconds,
            "tokens_per_second": n_tokens / seconds,
            "finished": sum(c.stop_reason == "stop" for c in done) / len(done),
        }
    engine.close()
    return found


def endpoint_row(place: Place) -> dict[str, Any]:
    """crystallm-kit serve with the model in its own process; valid crystals at the client."""
    with server(place, "endpoint", "--engine", "transformers") as (url, pid):
        return {name: _crystals(place, f"endpoint-{name}", url, pid, body) for name, body in _BODIES.items()}


# What is asked of POST /v1/crystals. The first also warms the server up, with a tenth of the crystals.
_BODIES: dict[str, dict[str, Any]] = {
    "anything": {"conditions": {}},
    "copies counted, no redraws": {"conditions": {}, "unique": False, "redraws": 0, "log_probability": False},
    "oxides with 3 elements": {"conditions": {"elements": ["O"], "n_elements": 3}},
}


def _crystals(place: Place, name: str, url: str, pid: int, body: dict[str, Any]) -> dict[str, Any]:
    job = {"kind": "crystals", "url": url, "body": body, "clients": place.clients}
    _client(place, name, **{**job, "n": max(place.clients, place.n // 10)})
    return _with_cpu(pid, lambda: _client(place, name, **{**job, "n": place.n}))


def vllm_row(place: Place) -> dict[str, Any]:
    """One `vllm serve`: free and constrained by turns; directly and through our app by turns."""
    return asyncio.run(_vllm(place, 1, _one_engine))


def engines_row(place: Place) -> dict[str, Any]:
    """K of them, asked directly and through our app, by turns; then crystals."""
    return asyncio.run(_vllm(place, place.engines, _engines))


async def _vllm(place: Place, n_engines: int, work: Any) -> dict[str, Any]:
    from crystallm_kit.models.folders import shipped_model_folder

    vllm = find_vllm(place.vllm_python)
    if vllm is None:
        return {"skipped": "vllm is not installed"}
    folder = Path(place.model) if place.model else shipped_model_folder()
    key = secrets.token_urlsafe(16)
    jobs = vllm_jobs(
        vllm, Served(folder, "model", max_positions=512), folder=place.out / "state", engines=n_engines,
        arguments=place.vllm_arguments, kv_cache_gb=place.kv_cache_gb, key=key,
    )  # fmt: skip
    logs = place.out / f"logs-{n_engines}"
    supervisor = Supervisor(jobs, folder=logs, side_by_side=place.kv_cache_gb is not None)
    started = time.perf_counter()
    await supervisor.start()
    try:
        await _all_healthy([job.url for job in jobs], key)
        ready = time.perf_counter() - started
        found = await work(place, [job.url for job in jobs], key)
        return {"engines": n_engines, "start_seconds": ready, **found}
    finally:
        await supervisor.close()


async def _all_healthy(urls: Sequence[str], key: str) -> None:
    limit = time.monotonic() + 420
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=5) as client:
        for url in urls:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{url}/health")).status_code == 200:
                        break
                if time.monotonic() > limit:
                    raise UserError(f"{url}: no engine after 420 s")
                await asyncio.sleep(0.5)


def _completion_bodies(place: Place) -> dict[str, dict[str, Any]]:
    """Return the bodies of unconditional completions: free, and constrained."""
    from crystallm_kit.models.folders import shipped_model_folder
    from crystallm_kit.records import Conditions
    from crystallm_kit.text.prompts import template_named
    from crystallm_kit.tokens.requests import compile_request, request_to_json

    folder = Path(place.model) if place.model else shipped_model_folder()
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["results"]
    text = template_named(manifest["template"], manifest["template_sha256"]).render(Conditions())
    request = compile_request(
        Conditions(), known_elements=facts["elements"], max_sites=facts.get("max_sites", 24)
    )
    free: dict[str, Any] = {"model": "model", "prompt": text, "max_tokens": 400, "temperature": 1.0}
    return {"free": free, "constrained": {**free, "vllm_xargs": {"crystal": request_to_json(request)}}}


async def _one_engine(place: Place, urls: Sequence[str], key: str) -> dict[str, Any]:
    """What the constraint costs, and what our app does, with one engine."""
    bodies = _completion_bodies(place)
    # constrained samples are shorter than free ones: what the constraint costs shows where all are as long
    same = {"max_tokens": _SAME_TOKENS, "ignore_eos": True}
    as_long = {f"{name}, {_SAME_TOKENS} tokens each": {**body, **same} for name, body in bodies.items()}
    n, ways = max(PROMPT_N, place.n // 10), {name: (list(urls), body) for name, body in bodies.items()}
    ways_as_long = {name: (list(urls), body) for name, body in as_long.items()}
    found = await asyncio.to_thread(_by_turns, place, "vllm", ways, n, key)
    found |= await asyncio.to_thread(_by_turns, place, "vllm", ways_as_long, n, key)
    app = await asyncio.to_thread(_through_app, place, "vllm", urls, key, with_crystals=False)
    return {
        **found, **app,
        "overhead": _cost(*(found[name] for name in ways_as_long)),
        "overhead_as_they_come": _cost(*(found[name] for name in ways)),
    }  # fmt: skip


async def _engines(place: Place, urls: Sequence[str], key: str) -> dict[str, Any]:
    return await asyncio.to_thread(_through_app, place, "engines", urls, key, with_crystals=True)


def _by_turns(
    place: Place, name: str, ways: dict[str, tuple[list[str], dict[str, Any]]], n: int, key: str
) -> dict[str, Any]:
    """Ask for n completions in each of two ways (servers, body), again and again: A, B, B, A, A, B ..."""
    found: dict[str, Any] = {way: [] for way in ways}
    for turn in range(_TURNS + 1):  # the first warms up
        for way, (urls, body) in list(ways.items())[:: -1 if turn % 2 else 1]:
            got = _client(
                place, f"{name}, {way}", kind="completions", urls=urls, body=body, n=n,
                at_once=24 * max(len(urls) for urls, _ in ways.values()), key=key,
            )  # fmt: skip
            if turn:
                found[way].append(got)
    return found


def _rate(turns: list[dict[str, Any]]) -> float:
    """Return samples a second over all turns."""
    return float(sum(turn["sequences"] for turn in turns) / sum(turn["seconds"] for turn in turns))


def _cost(plain: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Return which share of the plain way's samples a second the other way loses."""
    return 1 - _rate(other) / _rate(plain)


def _through_app(
    place: Place, row: str, urls: Sequence[str], key: str, *, with_crystals: bool
) -> dict[str, Any]:
    """What our app in front of the engines costs, and the crystals that it then gives."""
    body = _completion_bodies(place)["constrained"]
    key_file = place.out / "upstream.key"
    key_file.write_text(key)
    key_file.chmod(0o600)
    upstream = [word for url in urls for word in ("--upstream", url)]
    options = (*upstream, "--name", "model", "--upstream-key-file", str(key_file))
    with server(place, f"{row}-app", *options) as (url, pid):
        ways = {"directly": (list(urls), body), "through the app": ([url], body)}
        found = _by_turns(place, row, ways, max(PROMPT_N, place.n * len(urls) // 10), key)
        found["app_cost"] = _cost(found["directly"], found["through the app"])
        if with_crystals:
            for label, wanted in list(_BODIES.items())[:2]:
                found[label] = _crystals(place, row, url, pid, wanted)
    return found


ROWS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "generate": generate_row,
    "slots": slots_row,
    "endpoint": endpoint_row,
    "vllm": vllm_row,
    "engines": engines_row,
}


# ---------------------------------------------------------------- the command


def table(found: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | sequences/s | valid crystals/s |", "| --- | --- | --- |"]

    def line(what: str, sequences: float | None, valid: float | None) -> None:
        shown = ["" if v is None else f"{v:,.0f}" if v >= 10 else f"{v:.1f}" for v in (sequences, valid)]
        lines.append(f"| {what} | {shown[0]} | {shown[1]} |")

    rows = found["rows"]
    for name, rate in _PUBLISHED.items():
        line(name, rate, None)
    if "sequences_per_second" in rows.get("generate", {}):
        line("transformers' generate", rows["generate"]["sequences_per_second"], None)
    for name in ("free", "constrained", "SrTiO3"):
        if name in rows.get("slots", {}):
            line(f"the engine in process, {name}", rows["slots"][name]["sequences_per_second"], None)
    for row, what in (("vllm", "vLLM, one engine"), ("engines", f"vLLM, {_n_engines(rows)} engines")):
        for name, turns in rows.get(row, {}).items():
            if isinstance(turns, list):
                line(f"{what}, {name}", _rate(turns), None)
    for row, what in (("endpoint", "transformers"), ("engines", f"{_n_engines(rows)} vLLM engines")):
        for name in _BODIES:
            if name in rows.get(row, {}):
                got = rows[row][name]
                line(f"POST /v1/crystals, {what}, {name}", got["samples_per_second"], got["valid_per_second"])
    for row in ("vllm", "engines"):
        for cost, what in _COSTS.items():
            if cost in rows.get(row, {}):
                lines.append(f"| {row}: {what} | {100 * rows[row][cost]:.1f} % | |")
    return "\n".join(lines)


def _n_engines(rows: dict[str, Any]) -> int:
    return int(rows.get("engines", {}).get("engines", 0))


def options_of_speed() -> argparse.ArgumentParser:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(prog="python -m crystallm_kit.server.speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("speed"), metavar="DIR")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="A,B")
    parser.add_argument("--n", type=int, default=50_000, help="crystals of a row (default: 50,000)")
    parser.add_argument("--clients", type=int, default=8, help="streams at a time (default: 8)")
    parser.add_argument("--engines", type=int, default=8, help="vLLM engines side by side (default: 8)")
    parser.add_argument("--judges", type=int, help="judging processes (default: the server's)")
    parser.add_argument("--model", metavar="PATH", help="model folder (default: the shipped one)")
    parser.add_argument("--vllm-python", metavar="PATH")
    parser.add_argument("--vllm-args", default="", metavar="TEXT")
    parser.add_argument("--kv-cache-gb", type=float, metavar="GB")
    parser.add_argument(
        "--row-seconds", type=float, default=1800, metavar="S", help="a row is ended after it"
    )
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the rows, one process each, and print the table. Results are written as they come."""
    options = options_of_speed().parse_args(arguments)
    if options.client is not None:
        return _be_client(json.loads(options.client.read_text()))
    place = Place(
        options.out, options.n, options.clients, options.engines, options.judges, options.model,
        options.vllm_python, tuple(split_arguments(options.vllm_args)), options.kv_cache_gb,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    if options.inside:
        (options.out / f"{options.inside}.json").write_text(json.dumps(ROWS[options.inside](place)))
        return 0
    return _all(options, place, list(arguments if arguments is not None else sys.argv[1:]))


def _be_client(job: dict[str, Any]) -> int:
    kind = job.pop("kind")
    work: Any = {"crystals": stream_crystals, "completions": ask_completions}[kind]
    print(json.dumps(asyncio.run(work(**job))))
    return 0


def _all(options: argparse.Namespace, place: Place, arguments: list[str]) -> int:
    from crystallm_kit.models.checkpoints import git_commit, library_versions  # with torch: not in clients

    names = options.rows.split(",")
    for name in names:
        if name not in ROWS:
            raise UserError(f"no row '{name}'. Known: {', '.join(ROWS)}")
    found: dict[str, Any] = {
        "command": "python -m crystallm_kit.server.speed " + " ".join(arguments),
        "git_commit": git_commit(),
        "versions": library_versions(),
        "n": place.n,
        "rows": {},
    }
    for name in names:
        started = time.perf_counter()
        command = [sys.executable, "-m", "crystallm_kit.server.speed", *arguments, "--inside", name]
        code = _within(command, options.row_seconds)
        file = place.out / f"{name}.json"
        row = json.loads(file.read_text()) if code == 0 and file.is_file() else {}
        row = row or {
            "failed": f"not done in {options.row_seconds} s" if code is None else f"exit code {code}"
        }
        found["rows"][name] = {**row, "row_seconds": time.perf_counter() - started}
        (place.out / "results.json").write_text(json.dumps(found, indent=1))
        print(name, json.dumps(found["rows"][name]), flush=True)
    text = table(found)
    (place.out / "table.md").write_text(text + "\n")
    print(text)
    return 0


def _within(command: Sequence[str], seconds: float) -> int | None:
    """Run a command and all that it starts for so long; return its exit code, None if it had to be ended."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


if __name__ == "__main__":
    sys.exit(main())
