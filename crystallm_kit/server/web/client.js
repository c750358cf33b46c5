// What the page says to the server: the request, its stream of events, the same request for curl.
//
//   for await (const { event, data } of ask(body, { key, signal })) ...
//   curlOf(body, { withKey: true })
//
// Contract: every failure is a RequestFailed with words for a person; an abort is the browser's AbortError. The key
// travels in the Authorization header alone.

const ROUTE = new URL("v1/crystals", document.baseURI);
const MODELS = new URL("v1/models", document.baseURI);

/** A request that was refused or broke off: `message` says why, `param` what it is about, `retryAfter` seconds. */
export class RequestFailed extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

function headersOf(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function fetched(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestFailed("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const { message, param = null } = (await response.json().catch(() => ({}))).error ?? {};
  const after = parseFloat(response.headers.get("Retry-After"));
  throw new RequestFailed(message ?? `The server answered ${response.status} ${response.statusText}.`, {
    status: response.status,
    param,
    retryAfter: Number.isFinite(after) ? after : null,
  });
}

/** Return what can be asked for: the entries of /v1/models. */
export async function models(key) {
  return (await (await fetched(MODELS, { headers: headersOf(key) })).json()).data;
}

/** Yield {event, data} of the answer as they come. Raises RequestFailed, AbortError. */
export async function* ask(body, { key, signal }) {
  const response = await fetched(ROUTE, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headersOf(key) },
    body: JSON.stringify(body),
    signal,
  });
  let isWhole = false;
  try {
    for await (const { event, data } of eventsOf(response.body)) {
      if (data === "[DONE]") {
        isWhole = true;
        break;
      }
      const read = JSON.parse(data);
      if (event === "error" || read.error) {
        throw new RequestFailed(read.error?.message ?? "The server broke off.", read.error ?? {});
      }
      yield { event, data: read };
    }
  } catch (error) {
    if (error instanceof RequestFailed || error.name === "AbortError") throw error;
    throw new RequestFailed("The connection broke off before the answer was whole.");
  }
  if (!isWhole) throw new RequestFailed("The connection broke off before the answer was whole.");
}

/** Yield {event, data} of a stream of server-sent events (WHATWG HTML, section 9.2). */
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let [event, data] = ["message", []];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          [event, data] = ["message", []];
          continue;
        }
        const [, field, content] = line.match(/^([^:]*):? ?(.*)$/);
        if (field === "event") event = content;
        if (field === "data") data.push(content);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Return the shell command that sends the same request; the key is read from a variable. */
export function curlOf(body, { withKey = false } = {}) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl -sS -N ${quoted(ROUTE.href)}`, `-H 'Content-Type: application/json'`];
  if (withKey) lines.push('-H "Authorization: Bearer $API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}
