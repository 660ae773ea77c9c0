// The edits: a card for each, with its operation, a slider, its units and its positions.

import { describe, recall } from "./api.js";
import { $, el, fill, number } from "./dom.js";
import { can, change, state, watch } from "./state.js";

const OPS = ["clamp", "add", "scale", "ablate", "floor", "cap", "mask_range", "gain"];
const VALUED = ["clamp", "add", "floor", "cap"];
const UNITS = [["reference_max", "× max"], ["raw", "raw"], ["residual_norm", "× length"]];
const POSITIONS = [["all", "all tokens"], ["prompt", "prompt"], ["completion", "completion"]];

let count = 0;

/** A new edit of a feature that the search or a token gave, unless it is there. */
export function addEdit({ sae, feature, label, reference_max: maximum }) {
  const there = state.edits.find((edit) => edit.sae === sae && edit.feature === feature && !edit.raw);
  if (there) {
    $(`edit-${there.id}-value`)?.focus();
    return;
  }
  const edit = {
    id: ++count, sae, feature, label, maximum, op: "clamp", units: maximum ? "reference_max" : "raw",
    value: maximum ? 0.8 : 8, lo: 0, hi: maximum ?? 8, positions: "all", on: true, more: {},
  };
  change({ edits: [...state.edits, edit], colour: { sae, feature } });
  $(`edit-${edit.id}-value`)?.focus();
}

/** Edits from stored interventions. What a card cannot show, such as a plain vector, is kept as it is. */
export async function loadEdits(interventions) {
  const edits = interventions.flatMap((asked) => {
    const { sae, features, op, value, lo, hi, units, positions, ...more } = asked;
    if (!features || !OPS.includes(op)) return [{ id: ++count, raw: asked, on: true }];
    const plain = positions === undefined || typeof positions === "string";
    return features.map((feature, i) => ({
      id: ++count, sae, feature, label: null, maximum: null, op, units: units ?? "raw",
      value: (Array.isArray(value) ? value[i] : value) ?? 1, lo: lo ?? 0, hi: hi ?? 1,
      positions: plain ? (positions ?? "all") : "all", on: true, more: plain ? more : { ...more, positions },
    }));
  });
  for (const sae of new Set(edits.filter((edit) => !edit.raw).map((edit) => edit.sae))) {
    const mine = edits.filter((edit) => edit.sae === sae);
    const known = await describe(sae, mine.map((edit) => edit.feature));
    mine.forEach((edit, i) => Object.assign(edit, { label: known[i].label, maximum: known[i].reference_max }));
  }
  const first = edits.find((edit) => !edit.raw);
  change({ edits, colour: first ? { sae: first.sae, feature: first.feature } : state.colour });
}

function update(edit, values) {
  Object.assign(edit, values);
  change({ edits: [...state.edits] });
}

/** Least, most and step of a slider; a number outside can be typed. */
function range(edit) {
  if (["scale", "gain"].includes(edit.op)) return [-1, 4, 0.05];
  if (edit.op !== "mask_range" && edit.units === "reference_max") return [-1, 2, 0.05];
  if (edit.op !== "mask_range" && edit.units === "residual_norm") return [-1, 1, 0.01];
  const most = 10 ** Math.ceil(Math.log10((edit.maximum ?? recall(edit.sae, edit.feature)?.reference_max ?? 25) * 1.2));
  const nice = [0.2, 0.5, 1].map((part) => part * most).find((each) => each >= (edit.maximum ?? 25) * 1.2) ?? most;
  return [edit.op === "mask_range" ? 0 : -nice / 2, nice, nice / 100];
}

function startOf(op, edit) {
  if (["scale", "gain"].includes(op)) return { value: 1 };
  if (op === "mask_range") return { lo: 0, hi: edit.maximum ?? 8 };
  if (VALUED.includes(op) && !VALUED.includes(edit.op)) {
    return { value: edit.maximum ? 0.8 : 8, units: edit.maximum ? "reference_max" : "raw" };
  }
  return {};
}

function converted(edit, units) {
  if (edit.maximum && edit.units === "reference_max" && units === "raw") return edit.value * edit.maximum;
  if (edit.maximum && edit.units === "raw" && units === "reference_max") return edit.value / edit.maximum;
  return units === "residual_norm" ? 0.2 : 1;
}

const rounded = (value) => Number(value.toPrecision(4));

/** A slider and a box for one number of an edit, which keep each other. */
function slider(edit, name, text) {
  const [min, max, step] = range(edit);
  const id = `edit-${edit.id}-${name}`;
  const bar = el("input", { type: "range", id, min, max, step, value: edit[name], "aria-label": `${text} of feature ${edit.feature}` });
  const box = el("input", { type: "number", step: "any", value: edit[name], "aria-label": `${text} of feature ${edit.feature}, as a number` });
  bar.addEventListener("input", () => {
    box.value = bar.value;
    update(edit, { [name]: Number(bar.value) });
  });
  box.addEventListener("input", () => {
    if (!box.validity.valid || box.value === "") return;
    bar.value = box.value;
    update(edit, { [name]: Number(box.value) });
  });
  return el("div", { class: "slide" }, el("span", { class: "slide-name", textContent: text }), bar, box);
}

/** A choice of an edit. The element stays, so that the keyboard can go on in it; `after` draws what depends on it. */
function select(edit, name, entries, text, { apply = (value) => ({ [name]: value }), after = () => {} } = {}) {
  const node = el("select", { "aria-label": `${text} of feature ${edit.feature}` },
    ...entries.map(([value, label]) => el("option", { value, textContent: label, selected: value === edit[name] })));
  node.addEventListener("change", () => {
    update(edit, apply(node.value));
    after();
  });
  return node;
}

function controls(edit) {
  const sliders = el("div");
  const slide = () => fill(sliders, ...(edit.op === "mask_range"
    ? [slider(edit, "lo", "from"), slider(edit, "hi", "to")]
    : edit.op === "ablate" ? [] : [slider(edit, "value", "value")]));
  const unit = el("span", { class: "unit" });
  const measure = () => {
    const units = UNITS.filter(([name]) => name !== "reference_max" || edit.maximum || edit.units === name);
    const apply = (name) => ({ units: name, value: rounded(converted(edit, name)) });
    unit.hidden = !VALUED.includes(edit.op);
    fill(unit, unit.hidden ? null : select(edit, "units", units, "Units", { apply, after: slide }));
  };
  const redraw = () => {
    measure();
    slide();
  };
  redraw();
  const ops = OPS.filter((op) => can(`op.${op}`) || op === edit.op).map((op) => [op, op.replace("_", " ")]);
  const apply = (op) => ({ op, ...startOf(op, edit) });
  return [
    el("div", { class: "row tight" },
      select(edit, "op", ops, "Operation", { apply, after: redraw }), unit,
      edit.more.positions ? null : select(edit, "positions", POSITIONS, "Positions")),
    sliders,
    Object.keys(edit.more).length ? el("p", { class: "note" }, "and ", el("code", { textContent: JSON.stringify(edit.more) })) : null,
  ];
}

function card(edit) {
  const chosen = state.colour && state.colour.sae === edit.sae && state.colour.feature === edit.feature;
  const name = edit.raw ? `${edit.raw.op} ${edit.raw.vector ? `vector ${edit.raw.vector}` : (edit.raw.concept ?? "")}` : `feature ${edit.feature}`;
  const on = el("input", { type: "checkbox", checked: edit.on, "aria-label": `Apply the edit of ${name}`, onchange: () => update(edit, { on: on.checked }) });
  const title = edit.raw
    ? el("span", { class: "edit-title" }, el("strong", { textContent: name }))
    : el("span", { class: "edit-title", title: edit.label ?? "" },
        edit.label ? el("strong", { textContent: edit.label }) : el("strong", {}, el("em", { textContent: "no label" })),
        el("small", { textContent: `${edit.sae} #${edit.feature}${edit.maximum ? ` · max ${number(edit.maximum)}` : ""}` }));
  return el("li", { class: edit.on ? "edit" : "edit off" },
    el("div", { class: "edit-head" }, on, title,
      edit.raw ? null : el("button", {
        type: "button", class: "quiet swatch", textContent: "Colour", "aria-pressed": String(Boolean(chosen)), "aria-label": `Colour by ${name}`,
        onclick: () => change({ colour: { sae: edit.sae, feature: edit.feature } }),
      }),
      el("button", { type: "button", class: "quiet", textContent: "Remove", "aria-label": `Remove the edit of ${name}`, onclick: () => remove(edit) })),
    ...(edit.raw ? [el("pre", { class: "raw", textContent: JSON.stringify(edit.raw) })] : controls(edit)),
  );
}

function remove(edit) {
  change({ edits: state.edits.filter((other) => other !== edit) });
  ($("edit-list").querySelector("button") ?? $("query")).focus();
}

/** Draws the cards anew; what had the focus has it again. */
function render() {
  const focused = $("edit-list").contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  $("edits-clear").hidden = state.edits.length === 0;
  fill($("edit-list"), ...(state.edits.length
    ? state.edits.map(card)
    : [el("li", { class: "note", textContent: "No edits yet. Find a feature below and choose “Edit”, or load a profile." })]));
  if (focused) [...$("edit-list").querySelectorAll("[aria-label]")].find((node) => node.getAttribute("aria-label") === focused)?.focus();
}

export function setUp() {
  $("edits-clear").addEventListener("click", () => {
    change({ edits: [] });
    $("query").focus();
  });
  let drawn = null;
  watch((changed) => {
    // A card that is being slid must not be replaced: only another set of cards is drawn anew.
    const now = JSON.stringify([state.edits.map((edit) => [edit.id, edit.on]), state.colour, state.can.size]);
    if ((changed.has("edits") || changed.has("colour") || changed.has("can")) && now !== drawn) {
      drawn = now;
      render();
    }
  });
  render();
}
