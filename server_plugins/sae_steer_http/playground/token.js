// The token that is looked at: what fires on it.

import { describe } from "./api.js";
import { $, el, fill, number } from "./dom.js";
import { addEdit } from "./edits.js";
import { can, change, saeNamed, state } from "./state.js";

let shown = 0;

/** Shows a token of a pane; null shows what to do. */
export async function lookAt(pane, index) {
  const body = $("token-body");
  const token = pane?.spans[index];
  if (!token) {
    fill(body, el("p", { class: "note", textContent: "Point at a token, or move to it with the arrow keys." }));
    return;
  }
  const mine = ++shown;
  const { position } = token;
  const read = position !== null && pane.reading.has(position);
  const top = read ? pane.reading.top(position) : [];
  const named = read ? pane.reading.named(position).filter(([sae, feature]) => !top.some(([s, f]) => s === sae && f === feature)) : [];
  const rows = [...top, ...named];
  const labels = await labelsOf(rows);
  if (mine !== shown) return; // another token was pointed at meanwhile
  fill(body,
    el("p", { class: "token-head" },
      el("span", { class: "token-text", textContent: token.text || "∅" }),
      el("span", { class: "note", textContent: `${pane.name}${position === null ? "" : `, position ${position}`}${token.prompt ? ", of the prompt" : ""}` })),
    rows.length ? el("ol", { class: "bars" }, ...rows.map((row, i) => bar(row, labels[i], rows[0][2]))) : why(read, token),
  );
}

async function labelsOf(rows) {
  const found = new Map();
  for (const sae of new Set(rows.map(([name]) => name))) {
    const features = rows.filter(([name]) => name === sae).map(([, feature]) => feature);
    try {
      (await describe(sae, features)).forEach((entry) => found.set(`${sae}/${entry.feature}`, entry));
    } catch {
      // Without labels the numbers still say which features these are; the search shows the server's error.
    }
  }
  return rows.map(([sae, feature]) => found.get(`${sae}/${feature}`) ?? { sae, feature, label: null, reference_max: null });
}

function why(read, token) {
  const row = state.can.get("readings");
  const text = !can("readings")
    ? `This server sends no readings back: ${row?.why ?? "it does not say why"}.`
    : !read && !token.prompt
      ? "Not read: the last token of an answer never goes through the model, and what was not asked for is not read."
      : saeNamed(state.sae)?.whole
        ? "Nothing fires here."
        : `Only named features were read: the whole dictionary of ${state.sae || "the SAE"} is not held (start with --whole).`;
  return el("p", { class: "note", textContent: text });
}

function bar([sae, feature, value], entry, most) {
  const node = el("li", {},
    el("span", { class: "bar-label", title: entry.label ?? "" }, entry.label ?? el("em", { textContent: "no label" })),
    el("span", { class: "bar-number", textContent: `#${feature}` }),
    el("span", { class: "bar-value", textContent: number(value) }),
    el("span", { class: "bar", "aria-hidden": "true" }, el("i")),
    el("span", { class: "bar-tools" },
      el("button", { type: "button", class: "quiet", textContent: "Colour", "aria-label": `Colour by feature ${feature}`, onclick: () => change({ colour: { sae, feature } }) }),
      el("button", { type: "button", class: "quiet", textContent: "Edit", "aria-label": `Edit feature ${feature}`, onclick: () => addEdit(entry) })),
  );
  node.style.setProperty("--part", String(most > 0 ? Math.max(value, 0) / most : 0));
  return node;
}
