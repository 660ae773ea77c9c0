// From what is on the screen to the bodies of requests, and to the same request in curl and Python.

import { address } from "./api.js";
import { can, saeNamed, state } from "./state.js";

const TOP = 8;

/** What the schema calls an intervention. */
export function intervention(edit) {
  if (edit.raw) return edit.raw;
  const asked = { sae: edit.sae, features: [edit.feature], op: edit.op };
  if (edit.op === "mask_range") Object.assign(asked, { lo: edit.lo, hi: edit.hi });
  else if (edit.op !== "ablate") asked.value = edit.value;
  if (["clamp", "add", "floor", "cap"].includes(edit.op) && edit.units !== "raw") asked.units = edit.units;
  if (edit.positions !== "all") asked.positions = edit.positions;
  return { ...asked, ...edit.more };
}

export const interventions = () => state.edits.filter((edit) => edit.on).map(intervention);

/** Features that are read on every token: the one that colours, and those that are edited. */
function readings() {
  if (!can("readings")) return [];
  const wanted = new Map();
  const add = (sae, feature) => {
    if (sae === undefined || feature === undefined) return;
    if (!wanted.has(sae)) wanted.set(sae, new Set());
    wanted.get(sae).add(feature);
  };
  if (state.colour) add(state.colour.sae, state.colour.feature);
  for (const edit of state.edits) if (edit.on && !edit.raw) add(edit.sae, edit.feature);
  if (state.sae && saeNamed(state.sae)?.whole && !wanted.has(state.sae)) wanted.set(state.sae, new Set());
  return [...wanted].slice(0, 8).map(([sae, features]) => ({
    sae,
    ...(features.size ? { features: [...features].sort((a, b) => a - b) } : {}),
    ...(saeNamed(sae)?.whole ? { top_k: Math.min(TOP, saeNamed(sae).features) } : {}),
    positions: state.withPrompt ? "all" : "completion",
    ...(state.at === "after" ? { at: "after" } : {}),
  }));
}

export const path = () => (state.mode === "chat" ? "/v1/chat/completions" : "/v1/completions");

/** The body of a request, steered or plain. */
export function body(steered) {
  const steering = {};
  const edits = steered ? interventions() : [];
  if (edits.length) steering.interventions = edits;
  const read = readings();
  if (read.length) steering.readings = read.length === 1 ? read[0] : read;
  return {
    model: state.model,
    ...(state.mode === "chat"
      ? { messages: [{ role: "user", content: state.prompt }] }
      : { prompt: state.prompt }),
    max_tokens: state.maxTokens,
    temperature: state.temperature,
    ...(state.temperature > 0 ? { seed: state.seed } : {}),
    ...(Object.keys(steering).length ? { steering } : {}),
  };
}

/** The same as a stream that says where its tokens begin and end. */
export function streamed(asked) {
  return {
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: state.mode === "chat" ? true : 1,
  };
}

const KEY = "SAE_STEER_API_KEY";

/** Values as JSON or as Python, short ones on one line. */
function written(value, words, step, indent = "") {
  if (value === null || typeof value === "boolean") return words[String(value)];
  if (typeof value !== "object") return JSON.stringify(value); // also a Python string, escapes and all
  const inner = indent + step;
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const entries = Array.isArray(value)
    ? value.map((each) => written(each, words, step, inner))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${written(each, words, step, inner)}`);
  const flat = open + entries.join(", ") + close;
  if (flat.length + indent.length < 72 && !flat.includes("\n")) return flat;
  return `${open}\n${entries.map((entry) => inner + entry).join(",\n")}\n${indent}${close}`;
}

const JSON_WORDS = { null: "null", true: "true", false: "false" };
const PYTHON_WORDS = { null: "None", true: "True", false: "False" };

export function curl(asked, withKey) {
  const quoted = written(asked, JSON_WORDS, "  ").replaceAll("'", "'\\''");
  return [
    `curl -sS '${address(path())}' \\`,
    "  -H 'Content-Type: application/json' \\",
    ...(withKey ? [`  -H "Authorization: Bearer $${KEY}" \\`] : []),
    `  -d '${quoted}'`,
  ].join("\n");
}

export function python(asked, withKey) {
  const { steering, ...rest } = asked;
  const chat = state.mode === "chat";
  const given = Object.entries(rest).map(([name, value]) => `    ${name}=${written(value, PYTHON_WORDS, "    ", "    ")},`);
  if (steering) given.push(`    extra_body=${written({ steering }, PYTHON_WORDS, "    ", "    ")},`);
  const key = withKey ? `os.environ["${KEY}"]` : '"unused"';
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(address("/v1"))}, api_key=${key})`,
    `answer = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...given,
    ")",
    chat ? "print(answer.choices[0].message.content)" : "print(answer.choices[0].text)",
    ...(steering ? ["print(answer.choices[0].steering)"] : []),
  ].join("\n");
}
