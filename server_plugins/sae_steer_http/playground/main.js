// The page: what the server is, what is asked, and when.

import { ask, describe, keys, recall } from "./api.js";
import * as bodies from "./bodies.js";
import { $, fill, el, later, number, options, showError, tabs } from "./dom.js";
import * as edits from "./edits.js";
import * as finder from "./finder.js";
import { Pane } from "./pane.js";
import * as profiles from "./profiles.js";
import { can, change, state, watch } from "./state.js";
import { lookAt } from "./token.js";

let language = "curl";
let due = false; // whether a run is about to begin
let knowing = Promise.resolve(); // what is known about the colour's feature is on its way
const paint = later(paintNow, 30);
const panes = ["plain", "steered"].map((name) => new Pane($(`pane-${name}`), name, { look: later(lookAt, 40), painted: paint }));
const [plain, steered] = panes;

function theme() {
  const choose = (value) => {
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
  };
  let stored = "auto";
  try {
    stored = localStorage.getItem("sae-steer-theme") ?? "auto";
  } catch {
    stored = "auto"; // storage may be switched off
  }
  $("theme").value = ["light", "dark"].includes(stored) ? stored : "auto";
  choose($("theme").value);
  $("theme").addEventListener("change", () => {
    choose($("theme").value);
    try {
      localStorage.setItem("sae-steer-theme", $("theme").value);
    } catch {
      // then it lasts as long as the page
    }
  });
}

function paintNow() {
  const { colour } = state;
  const most = Pane.most(panes, colour, colour ? recall(colour.sae, colour.feature)?.reference_max : null);
  $("scale-high").textContent = most > 0 ? number(most) : "–";
  for (const pane of panes) pane.paint(colour, most);
}

/** The features that can colour: the chosen one, and those of the edits. */
function listColours() {
  const wanted = new Map();
  const add = ({ sae, feature }) => wanted.set(`${sae}/${feature}`, { sae, feature });
  if (state.colour) add(state.colour);
  for (const edit of state.edits) if (!edit.raw) add(edit);
  const chosen = state.colour ? `${state.colour.sae}/${state.colour.feature}` : "";
  const entries = [...wanted].map(([key, { sae, feature }]) => [key, `#${feature} ${recall(sae, feature)?.label ?? ""}`.trim()]);
  options($("colour"), [["", can("readings") ? "no feature" : "not on this server"], ...entries], chosen);
  $("colour").disabled = !can("readings");
}

async function knowColour() {
  const { colour } = state;
  if (colour && !recall(colour.sae, colour.feature)) {
    try {
      await describe(colour.sae, [colour.feature]);
    } catch (error) {
      showError($("alert"), error);
    }
  }
  listColours();
  paint();
}

function showCode() {
  const make = language === "curl" ? bodies.curl : bodies.python;
  $("code").textContent = make(bodies.body(true), Boolean(keys.api));
  $("code").setAttribute("aria-labelledby", `tab-${language}`);
}

/** Runs both panes, or those whose request has changed. */
async function run({ force = false } = {}) {
  due = false;
  if (!state.model) return;
  showError($("alert"), null);
  $("answers-card").setAttribute("aria-busy", "true");
  $("run").textContent = "Stop";
  $("progress").textContent = "Running.";
  const jobs = [plain.run(bodies.body(false), { force })];
  if (bodies.interventions().length) jobs.push(steered.run(bodies.body(true), { force }));
  else steered.say("No edits yet, so this would be the plain answer.");
  await Promise.all(jobs);
  await knowing;
  if (panes.some((pane) => pane.busy)) return; // a newer run, which says itself when it is done
  $("progress").textContent = panes.some((pane) => !pane.error.hidden) ? "Failed." : summary();
  markDifference();
  paintNow();
  idle();
}

function idle() {
  $("run").textContent = "Run";
  $("answers-card").setAttribute("aria-busy", String(due));
}

function summary() {
  if (!steered.finished) return `The plain answer is there: ${plain.text}`;
  return plain.text === steered.text ? "Both answers are there, and are the same." : "Both answers are there, and differ.";
}

/** Marks where the steered answer leaves the plain one. */
function markDifference() {
  const words = plain.completion;
  let same = true;
  steered.spans.filter((span) => !span.prompt).forEach((span, i) => {
    const leaves = same && plain.finished && steered.finished && span.text !== words[i];
    if (leaves) same = false;
    span.node.classList.toggle("leaves", Boolean(leaves));
    if (leaves) span.node.title = "Here the steered answer leaves the plain one.";
  });
}

function stop() {
  for (const pane of panes) if (pane.busy) pane.stop();
  idle();
  $("progress").textContent = "Stopped.";
}

const soon = later(() => run(), 250);

/** Runs in a moment, unless something else changes before. */
function again() {
  due = true;
  $("answers-card").setAttribute("aria-busy", "true");
  soon();
}

function asked() {
  const read = (id, fallback) => ($(id).validity.valid && $(id).value !== "" ? Number($(id).value) : fallback);
  change({
    prompt: $("prompt").value,
    model: $("model").value,
    mode: $("mode").value,
    maxTokens: read("max-tokens", state.maxTokens),
    temperature: read("temperature", state.temperature),
    seed: read("seed", state.seed),
    live: $("live").checked,
    at: $("at").value,
    withPrompt: $("with-prompt").checked,
  });
}

function listen() {
  $("ask-form").addEventListener("input", asked);
  $("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (panes.some((pane) => pane.busy)) stop();
    else run({ force: true });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run({ force: true });
    }
  });
  for (const id of ["at", "with-prompt"]) $(id).addEventListener("change", asked);
  $("colour").addEventListener("change", () => {
    const [, sae, feature] = /^(.*)\/(\d+)$/.exec($("colour").value) ?? [];
    change({ colour: sae ? { sae, feature: Number(feature) } : null });
  });
  tabs([$("tab-curl"), $("tab-python")], (button) => {
    language = button.id.replace("tab-", "");
    showCode();
  });
  $("copy").addEventListener("click", copy);
  $("keys-toggle").addEventListener("click", () => showKeys($("keys").hidden));
  $("keys").addEventListener("submit", (event) => {
    event.preventDefault();
    keys.api = $("api-key").value;
    keys.admin = $("admin-key").value;
    showKeys(false);
    $("keys-toggle").focus();
    showCode();
    connect();
  });
}

function showKeys(shown) {
  $("keys").hidden = !shown;
  $("keys-toggle").setAttribute("aria-expanded", String(shown));
  if (shown) $("api-key").focus();
}

async function copy() {
  const text = $("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that are not on localhost or HTTPS have no clipboard; a selection can be copied everywhere.
    getSelection().selectAllChildren($("code"));
    if (!document.execCommand("copy")) {
      $("progress").textContent = "Selected. Copy it with your browser.";
      return;
    }
  }
  $("copy").textContent = "Copied";
  $("progress").textContent = "Copied.";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

/** Asks the server what it is; shows why where it does not say. */
async function connect() {
  try {
    const [models, saes, capabilities, stored] = await Promise.all([
      ask("/v1/models"), ask("/v1/steering/saes"), ask("/v1/steering/capabilities"), profiles.listProfiles(),
    ]);
    showError($("alert"), null);
    const names = models.data.map(({ id }) => id);
    const bases = names.filter((id) => !stored.some((profile) => id.endsWith(`:${profile}`) && names.includes(id.slice(0, -profile.length - 1))));
    options($("model"), bases.map((id) => [id, id]), bases[0]);
    options($("sae"), saes.data.map(({ id, site }) => [id, `${id} (${site})`]), saes.data[0]?.id);
    fill($("server"), el("span", { textContent: `${capabilities.host} · ${saes.data.map((sae) => `${sae.id}: ${sae.features} features at ${sae.site}`).join(" · ") || "no SAE"}` }));
    change({
      saes: saes.data, sae: saes.data[0]?.id ?? "", limits: capabilities.limits, model: bases[0],
      can: new Map(capabilities.data.map((row) => [row.key, row])),
    });
    asked();
  } catch (error) {
    showError($("alert"), error);
    if (error.status === 401) showKeys(true);
  }
}

const REQUESTED = ["prompt", "model", "mode", "maxTokens", "temperature", "seed", "at", "withPrompt", "edits", "colour", "sae", "saes", "can"];

theme();
edits.setUp();
finder.setUp();
profiles.setUp();
listen();
lookAt(null);
for (const pane of panes) pane.say(pane.name === "plain" ? "Run the prompt to see the answer." : "Edit a feature to see the answer change.");
let last = "";
watch((changed) => {
  if (!REQUESTED.some((name) => changed.has(name))) return;
  showCode();
  if (changed.has("colour") || changed.has("edits") || changed.has("can")) knowing = knowColour();
  const now = JSON.stringify([bodies.path(), bodies.body(true)]);
  if (now !== last && state.live && (plain.asked || bodies.interventions().length)) again();
  last = now;
});
connect();
