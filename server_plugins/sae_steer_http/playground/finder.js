// Finding features: by the words of a label, by what fires on a text, by what differs between two.

import { ask, findFeatures } from "./api.js";
import { $, el, fill, later, number, showError, tabs } from "./dom.js";
import { addEdit } from "./edits.js";
import { can, change, saeNamed, state, watch } from "./state.js";

const LIMIT = 30;
let last = 0;

function item(entry, extra) {
  const about = `feature ${entry.feature}${entry.label ? `, ${entry.label}` : ""}`;
  return el("li", {},
    el("span", { class: "found-text" },
      el("span", { class: "found-label" }, entry.label ?? el("em", { textContent: "no label" })),
      el("small", { textContent: `#${entry.feature}${entry.reference_max ? ` · max ${number(entry.reference_max)}` : ""}` }),
      extra ?? null),
    el("button", { type: "button", class: "quiet", textContent: "Colour", "aria-label": `Colour by ${about}`, onclick: () => change({ colour: { sae: entry.sae, feature: entry.feature } }) }),
    el("button", { type: "button", textContent: "Edit", "aria-label": `Edit ${about}`, onclick: () => addEdit(entry) }),
  );
}

function show(entries, note) {
  fill($("found"), ...entries);
  $("found-note").textContent = note;
}

/** Shows what a search finds, or the server's error; what an older one finds is dropped. */
async function search(find) {
  const mine = ++last;
  try {
    const [entries, note] = await find();
    if (mine === last) {
      showError($("alert"), null);
      show(entries, note);
    }
  } catch (error) {
    if (mine === last) {
      show([], "");
      showError($("alert"), error);
    }
  }
}

function byLabel() {
  const q = $("query").value;
  if (!state.sae) return;
  search(async () => {
    const found = await findFeatures(state.sae, q, LIMIT);
    const note = found.length === 0 ? (q ? "No label has these words." : "This SAE has no labels; a number finds a feature.")
      : found.length === LIMIT ? `The first ${LIMIT}.` : "";
    return [found.map((entry) => item(entry)), q ? note : found.length ? "" : note];
  });
}

function onTokens(entry, texts, most) {
  const parts = entry.on.map((on, i) => {
    const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("i"));
    bar.style.setProperty("--part", String(most > 0 ? on.max / most : 0));
    const token = (texts[i].tokens[on.token] ?? "").trim();
    return el("span", { class: "on" },
      entry.on.length > 1 ? el("b", { textContent: "AB"[i] }) : null, bar,
      el("span", { class: "bar-value", textContent: number(on.max) }),
      el("code", { textContent: on.max > 0 ? token || "␣" : "" }));
  });
  return el("span", { class: "ons" }, ...parts);
}

function byText(asked) {
  $("found-note").textContent = "Reading…";
  search(async () => {
    const answer = await ask("/v1/steering/activations", { method: "POST", body: { sae: state.sae, ...asked } });
    const most = Math.max(0, ...answer.data.flatMap((entry) => entry.on.map((on) => on.max)));
    const entries = answer.data.map((entry) => item({ ...entry, sae: answer.sae }, onTokens(entry, answer.texts, most)));
    const note = entries.length === 0 ? "Nothing fires." : asked.texts ? "By how far their maxima are apart." : "By their maximum, with the token that has it.";
    return [entries, note];
  });
}

function canRead() {
  const row = state.can.get("readings");
  const why = !can("readings") ? `This server cannot: ${row?.why ?? "it sends no readings back"}.`
    : state.sae && !saeNamed(state.sae)?.whole ? `This needs the whole dictionary of ${state.sae}: start the server with it held whole.` : "";
  for (const id of ["panel-text", "panel-pair"]) {
    for (const control of $(id).querySelectorAll("textarea, button")) control.disabled = Boolean(why);
  }
  return why;
}

export function setUp() {
  const panels = { "tab-label": "panel-label", "tab-text": "panel-text", "tab-pair": "panel-pair" };
  tabs(Object.keys(panels).map($), (button) => {
    for (const [tab, panel] of Object.entries(panels)) $(panel).hidden = tab !== button.id;
    last += 1;
    if (button.id === "tab-label") byLabel();
    else show([], canRead());
  });
  $("query").addEventListener("input", later(byLabel, 150));
  $("panel-text").addEventListener("submit", (event) => {
    event.preventDefault();
    byText({ text: $("text").value });
  });
  $("panel-pair").addEventListener("submit", (event) => {
    event.preventDefault();
    byText({ texts: [$("text-a").value, $("text-b").value], top_k: 30 });
  });
  $("sae").addEventListener("change", () => change({ sae: $("sae").value }));
  watch((changed) => {
    if (!changed.has("sae") && !changed.has("can")) return;
    canRead();
    if ($("panel-label").hidden) show([], canRead());
    else byLabel();
  });
}
