"""A program that speaks vLLM's HTTP without a model: for tests of what stands in front of it.

    python vllm_stand_in.py --port 8001 --served-model-name toy [--lora-modules a=DIR ...] [--no-tokens-route]

Token number t of a completion with seed s is 2 + (7 s + t) % 40, ten tokens and the end token 1. What is in
the environment makes it misbehave at the start: STAND_IN_START=die|hang|deaf|barren (deaf: alive, never
healthy; barren: healthy by its own words, but every token asked for gets a 500).
While it runs, the prompt's second token id does: 101 dies, 102 never answers, 103 answers 500, 104 is slow
(0.05 s a token), 105 says 400, 106 dies within a stream. GET /seen gives what it was asked and how many
requests were given up.
"""

import argparse
import asyncio
import json
import os
import sys
import time

SEEN = {"requests": [], "aborted": 0, "running": 0}
END = 1


def tokens_of(seed: int, n: int = 10) -> list[int]:
    return [2 + (7 * seed + t) % 40 for t in range(n)] + [END]


async def serve_one(reader, writer, options) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            line, *headers = head.decode().split("\r\n")
            lengths = [h.split(":")[1] for h in headers if h.lower().startswith("content-length:")]
            body = await reader.readexactly(int(lengths[0])) if lengths else b""
            _, path, _ = line.split(" ")
            keys = [h.split(": ")[1] for h in headers if h.lower().startswith("authorization:")]
            await answer(reader, writer, options, path, body, keys[0] if keys else "")
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def send(writer, status: int, data: dict) -> None:
    body = json.dumps(data).encode()
    kind = "content-type: application/json"
    writer.write(f"HTTP/1.1 {status} X\r\n{kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


async def answer(reader, writer, options, path, body, key) -> None:
    names = [options.served_model_name, *(m.split("=")[0] for m in options.lora_modules)]
    if path == "/health":
        if os.environ.get("STAND_IN_START") == "deaf":
            await asyncio.sleep(3600)
        send(writer, 200, {})
        return
    if path == "/seen":
        send(writer, 200, SEEN | {"pid": os.getpid()})
        return
    if os.environ.get("VLLM_API_KEY") and key != f"Bearer {os.environ['VLLM_API_KEY']}":
        send(writer, 401, {"error": "Unauthorized"})
        return
    if path == "/v1/models":
        cards = [
            {"id": n, "parent": None if n == names[0] else names[0], "max_model_len": 256} for n in names
        ]
        send(writer, 200, {"data": cards})
        return
    asked = json.loads(body or b"{}")
    if path == "/inference/v1/generate" and not options.no_tokens_route:
        if not asked:
            send(writer, 400, {"error": {"message": "token_ids: field required", "code": 400}})
            return
        sampling, ids = asked["sampling_params"], asked["token_ids"]
    elif path == "/v1/completions":
        sampling, ids = asked, asked["prompt"]
    else:
        send(writer, 404, {"detail": "Not Found"})
        return
    if asked["model"] not in names:
        send(writer, 404, {"error": {"message": f"The model `{asked['model']}` does not exist."}})
        return
    xargs = asked.get("vllm_xargs") or {}
    if xargs.get("crystal") == "?":
        send(writer, 200 if options.without_constraint else 400, {"error": {"message": "crystal: no JSON"}})
        return
    if os.environ.get("STAND_IN_START") == "barren":
        send(writer, 500, {"error": {"message": "EngineCore encountered an issue."}})
        return
    if ids == [1] and sampling.get("max_tokens") == 1:  # is a token made?
        send(writer, 200, {"model": asked["model"], "choices": [{"index": 0, "text": ""}]})
        return
    SEEN["requests"].append(asked | {"path": path})
    SEEN["running"] += 1
    work = asyncio.create_task(draw(writer, path, asked, sampling, ids, options))
    gone = asyncio.create_task(wait_for_end(reader))  # our client never sends ahead
    try:
        done, _ = await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work not in done:
            SEEN["aborted"] += 1
            work.cancel()
            raise ConnectionError
        work.result()
    finally:
        SEEN["running"] -= 1
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


async def wait_for_end(reader) -> None:
    while not reader.at_eof():
        await asyncio.sleep(0.01)


async def draw(writer, path, asked, sampling, ids, options) -> None:
    code = ids[1] if len(ids) > 1 else 0
    if code == 101:
        os._exit(3)
    if code == 102:
        await asyncio.sleep(3600)
    if code == 103:
        send(writer, 500, {"error": {"message": "EngineCore died"}})
        return
    if code == 105:
        send(writer, 400, {"error": {"message": "crystal: no such thing", "code": 400}})
        return
    if sampling.get("temperature") == 0 and sampling.get("n", 1) > 1:
        send(writer, 400, {"error": {"message": "n must be 1 when using greedy sampling"}})
        return
    seed = sampling.get("seed") or 0
    is_text, n = path == "/v1/completions", sampling.get("n", 1)
    arguments = asked.get("vllm_xargs") if is_text else sampling.get("extra_args")
    given = list((arguments or {}).get("crystal_beginning", []))
    choices = []
    for i in range(n):
        drawn = (given + tokens_of(seed + i))[: sampling["max_tokens"]]
        reason = "stop" if drawn[-1] == END else "length"
        choices.append({"index": i, "token_ids": drawn, "finish_reason": reason})
        if sampling.get("logprobs") is not None:
            choices[-1]["logprobs"] = logprobs_of(drawn, sampling["logprobs"], is_text)
        if is_text:
            choices[-1]["text"] = "".join(map(str, drawn))
    if not asked.get("stream"):
        if code == 104:
            await asyncio.sleep(0.05 * len(choices[0]["token_ids"]))
        send(writer, 200, {"model": asked["model"], "choices": choices})
        return
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for t in range(max(len(c["token_ids"]) for c in choices)):
        for choice in choices:
            if t >= len(choice["token_ids"]):
                continue
            is_last = t + 1 == len(choice["token_ids"])
            part = {"index": choice["index"], "token_ids": choice["token_ids"][t : t + 1]}
            part["finish_reason"] = choice["finish_reason"] if is_last else None
            if "logprobs" in choice:
                part["logprobs"] = logprobs_of(part["token_ids"], sampling["logprobs"], is_text)
            chunk(writer, f"data: {json.dumps({'choices': [part]})}\n\n")
        await writer.drain()
        await asyncio.sleep(0.05 if code == 104 else 0)
        if code == 106 and t == 3:
            os._exit(3)
    chunk(writer, "data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")


def chunk(writer, text: str) -> None:
    data = text.encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def logprobs_of(ids: list[int], n_top: int, is_text: bool) -> dict:
    """Log-probability -0.1 of each token; alternatives -0.1, -0.2 ..., in the shape of the route."""
    names = [f"token_id:{i}" for i in ids]
    tops = [[(f"token_id:{i + k}", -0.1 * (k + 1)) for k in range(max(n_top, 1))] for i in ids]
    if is_text:
        return {"tokens": names, "token_logprobs": [-0.1] * len(ids), "top_logprobs": [dict(t) for t in tops]}
    return {
        "content": [
            {"token": name, "logprob": -0.1, "top_logprobs": [{"token": a, "logprob": v} for a, v in top]}
            for name, top in zip(names, tops, strict=True)
        ]
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", default="toy")
    parser.add_argument("--lora-modules", nargs="*", default=[])
    parser.add_argument("--no-tokens-route", action="store_true")
    parser.add_argument("--without-constraint", action="store_true")
    options, _ = parser.parse_known_args()
    print(f"stand-in {os.getpid()} {sys.argv[1:]}", flush=True)
    start = os.environ.get("STAND_IN_START")
    if start == "die":
        print("ValueError: no memory for the key-value cache", flush=True)
        sys.exit(1)
    if start == "hang":
        time.sleep(3600)

    async def run() -> None:
        server = await asyncio.start_server(
            lambda r, w: serve_one(r, w, options), "127.0.0.1", options.port, backlog=1024
        )
        async with server:
            await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
