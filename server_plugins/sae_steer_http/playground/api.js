// What is asked of the server. Keys live in this module's memory and nowhere else.

export const keys = { api: "", admin: "" };

/** Where a path of the server is: beside this page, also where a proxy serves both under a prefix. */
export const address = (path) => new URL(path.slice(1), location.href).href;

export class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = error?.code === undefined || error?.code === null ? `HTTP ${status}` : String(error.code);
    this.param = error?.param ?? null;
  }
}

function headers(admin, json) {
  const all = {};
  if (json) all["Content-Type"] = "application/json";
  if (keys.api) all.Authorization = `Bearer ${keys.api}`;
  if (admin && keys.admin) all["X-Steering-Admin-Key"] = keys.admin;
  return all;
}

async function send(path, { method = "GET", body, admin = false, signal } = {}) {
  const asked = { method, headers: headers(admin, body !== undefined), signal, redirect: "error" };
  if (body !== undefined) asked.body = JSON.stringify(body);
  let reply;
  try {
    reply = await fetch(address(path), asked);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { code: "no_answer", message: "The server does not answer. Is it still running?" });
  }
  if (reply.ok) return reply;
  let error = null;
  try {
    error = (await reply.json()).error;
  } catch {
    error = null; // a proxy's page, or nothing: the status says what there is to say
  }
  throw new ServerError(reply.status, error);
}

/** The JSON answer of a route. */
export async function ask(path, options) {
  return (await send(path, options)).json();
}

/** The events of a stream, parsed; an error event throws. */
export async function* events(path, body, signal) {
  const reply = await send(path, { method: "POST", body, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let done = false;
  try {
    for (;;) {
      const piece = await reader.read();
      if (piece.done) break;
      const lines = (rest + piece.value).split("\n\n");
      rest = lines.pop();
      for (const line of lines) {
        const data = line.replace(/^data: /, "");
        if (data === "[DONE]") done = true;
        else if (line.startsWith("data: ")) {
          const value = JSON.parse(data);
          if (value.error) throw new ServerError(reply.status, value.error);
          yield value;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!done) throw new ServerError(0, { code: "stream_cut", message: "The stream ended before the answer did." });
}

const search = (query) => ask(`/v1/steering/features?${new URLSearchParams(query)}`);

const MOST_IDS = 128; // of one search
const known = new Map();

/** Features by the words of their label. */
export async function findFeatures(sae, q, limit) {
  const { data } = await search({ sae, q, limit });
  for (const entry of data) known.set(`${entry.sae}/${entry.feature}`, entry);
  return data;
}

/** What is known about features of an SAE, by number; asked for once. */
export async function describe(sae, features) {
  const missing = [...new Set(features)].filter((feature) => !known.has(`${sae}/${feature}`));
  while (missing.length) {
    const ids = missing.splice(0, MOST_IDS).join(",");
    for (const entry of (await search({ sae, ids })).data) known.set(`${sae}/${entry.feature}`, entry);
  }
  return features.map((feature) => known.get(`${sae}/${feature}`));
}

/** What is known already, without asking. */
export const recall = (sae, feature) => known.get(`${sae}/${feature}`);
