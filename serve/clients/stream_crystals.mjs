// POST /v1/crystals with fetch, in Node 18 or later or in a browser: each crystal as it passes.
//   node serve/clients/stream_crystals.mjs BaTiO3 4
// CRYSTALLM_KIT_URL (default http://127.0.0.1:8000) says where, CRYSTALLM_KIT_KEY holds the key if one is asked for.

const url = process.env.CRYSTALLM_KIT_URL ?? "http://127.0.0.1:8000";
const key = process.env.CRYSTALLM_KIT_KEY ?? "";

/** Yield {kind, data} of server-sent events; an Error if the stream ends before it is whole. */
async function* events(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of body) {
    rest += decoder.decode(bytes, { stream: true });
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const kind = /^event: (.*)$/m.exec(block)?.[1] ?? "message";
      const text = /^data: (.*)$/m.exec(block)?.[1];
      if (text === undefined) continue; // a comment that keeps the connection open
      if (text === "[DONE]") return;
      const data = JSON.parse(text);
      if (data.error) throw new Error(data.error.message);
      yield { kind, data };
    }
  }
  throw new Error("the stream ended before it was whole");
}

const [formula = "BaTiO3", n = "4"] = process.argv.slice(2);
const response = await fetch(`${url}/v1/crystals`, {
  method: "POST",
  headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
  body: JSON.stringify({ conditions: { formula }, n: Number(n), stream: true }),
});
if (!response.ok) {
  const { error } = await response.json();
  throw new Error(`${response.status}: ${error.message}`);
}
for await (const { kind, data } of events(response.body)) {
  if (kind === "crystal") console.log(data.id, data.formula, data.spacegroup_number);
  if (kind === "funnel") console.log(`${data.finish_reason} after ${data.usage.n_samples} samples`);
}
