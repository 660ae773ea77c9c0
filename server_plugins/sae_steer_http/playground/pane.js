// One answer: it streams in, its tokens are coloured, and one of them can be looked at.

import { events } from "./api.js";
import { path, streamed } from "./bodies.js";
import { el, fill, number, showError } from "./dom.js";
import { Reading } from "./reading.js";
import { saeNamed, state } from "./state.js";

const UNKNOWN = "\ufffd";

export class Pane {
  /** `look(pane, index)` is told which token is looked at; `painted()` that there is something new to colour. */
  constructor(node, name, { look, painted }) {
    this.name = name;
    this.node = node;
    this.look = look;
    this.painted = painted;
    this.state = el("span", { class: "pane-state" });
    node.querySelector("h3").append(this.state);
    this.tokens = el("div", {
      class: "tokens", role: "listbox", tabIndex: 0, "aria-label": `Tokens of the ${name} answer`, "aria-orientation": "horizontal",
    });
    this.error = el("div", { class: "error", role: "alert", hidden: true });
    this.measure = el("p", { class: "measure" });
    this.foot = el("div", { class: "foot" });
    node.append(this.error, this.tokens, this.measure, this.foot);
    this.asked = null; // the body that the screen shows the answer of, as text
    this.listen();
    this.clear();
  }

  clear() {
    this.reading = new Reading();
    this.spans = []; // {node, position or null, text}
    this.text = "";
    this.pending = { tokens: [], text: "" };
    this.blocks = null;
    this.active = -1;
    fill(this.tokens);
    fill(this.foot);
    this.measure.textContent = "";
    showError(this.error, null);
    this.tokens.removeAttribute("aria-activedescendant");
  }

  say(text) {
    this.clear();
    this.asked = null;
    this.finished = null;
    this.controller?.abort();
    this.controller = null;
    this.node.classList.remove("busy");
    this.state.textContent = "";
    fill(this.tokens, el("span", { class: "note", textContent: text }));
  }

  get busy() {
    return this.controller !== null && this.controller !== undefined;
  }

  /** Asks again, unless the answer to just this is there or on its way. */
  async run(asked, { force = false } = {}) {
    const text = JSON.stringify([path(), asked]);
    if (!force && text === this.asked && (this.busy || this.finished)) return;
    this.controller?.abort();
    const controller = new AbortController();
    this.controller = controller;
    this.asked = text;
    this.finished = null;
    this.node.classList.add("busy");
    this.state.textContent = "…";
    this.fresh = true; // the old answer stays until the first of the new one is there
    try {
      for await (const event of events(path(), streamed(asked), controller.signal)) this.take(event);
      this.flush(true);
      this.finish();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.restart();
      showError(this.error, error);
      this.state.textContent = "failed";
      this.finished = null;
    } finally {
      if (this.controller === controller) {
        this.controller = null;
        this.node.classList.remove("busy");
      }
    }
  }

  stop() {
    this.controller?.abort();
    this.controller = null;
    this.asked = null;
    this.node.classList.remove("busy");
    this.state.textContent = this.finished ? "" : "stopped";
  }

  restart() {
    if (this.fresh) this.clear();
    this.fresh = false;
  }

  take(event) {
    this.restart();
    if (event.usage) this.place(event.usage.prompt_tokens);
    const choice = event.choices[0];
    if (!choice) return;
    const text = choice.delta ? (choice.delta.content ?? "") : (choice.text ?? "");
    const tokens = choice.logprobs?.content?.map((entry) => entry.token) ?? choice.logprobs?.tokens ?? (text ? [text] : []);
    this.text += text;
    this.pending.text += text;
    const before = this.reading.completion;
    tokens.forEach((token, i) => this.pending.tokens.push([token, before + i]));
    const knew = this.reading.prompt;
    this.reading.take(choice.steering?.readings, tokens.length);
    if (knew === null && this.reading.prompt !== null) this.showPrompt();
    this.flush(false);
    if (choice.finish_reason) {
      this.finished = choice.finish_reason;
      this.blocks = choice.steering ?? null;
    }
    this.painted(this);
  }

  /** Shows the tokens whose text is known: a character may be several tokens, which are one span then. */
  flush(end) {
    const { tokens, text } = this.pending;
    if (tokens.map(([token]) => token).join("") === text) {
      for (const [token, number] of tokens) this.add(token, number);
    } else if (text && (end || !text.endsWith(UNKNOWN))) {
      this.add(text, tokens.at(-1)?.[1] ?? null);
    } else if (!end) return; // the rest of the character is still to come
    this.pending = { tokens: [], text: "" };
  }

  add(text, number) {
    const prompt = this.reading.prompt;
    const position = number === null || prompt === null ? null : prompt + number;
    this.tokens.append(this.span(text, position, number, false));
  }

  span(text, position, number, prompt) {
    const index = this.spans.length;
    const shown = text.replaceAll("\n", "⏎\n");
    const node = el("span", {
      class: prompt ? "token prompt" : "token", role: "option", id: `${this.name}-token-${index}`, textContent: shown || "∅", "aria-selected": "false",
    });
    node.dataset.index = index;
    this.spans.push({ node, position, number, text, prompt });
    return node;
  }

  showPrompt() {
    if (!state.withPrompt) return;
    const nodes = this.reading.promptPositions().map((position) => this.span(this.reading.texts.get(position), position, null, true));
    if (nodes.length) this.tokens.prepend(...nodes, el("span", { class: "turn", role: "presentation" }));
  }

  /** Where the completion begins, as the server counts. */
  place(prompt) {
    this.reading.prompt = prompt;
    for (const span of this.spans) if (span.number !== null) span.position = prompt + span.number;
  }

  /** The tokens' texts from the beginning, for what differs between two answers. */
  get completion() {
    return this.spans.filter((span) => !span.prompt).map((span) => span.text);
  }

  finish() {
    const count = this.reading.completion;
    this.state.textContent = `${count} token${count === 1 ? "" : "s"}${this.finished === "length" ? ", cut there" : ""}`;
    this.tokens.classList.toggle("empty", this.spans.length === 0);
    const applied = this.blocks?.applied;
    const rows = (applied?.features ?? []).map((entry) => {
      const name = entry.vector ? `vector ${entry.vector}` : `#${entry.feature}`;
      return el("tr", {},
        el("th", { scope: "row", textContent: name, title: entry.sae ?? "" }),
        el("td", { textContent: entry.op }),
        el("td", { textContent: `${entry.fired} of ${entry.tokens}` }),
        el("td", { textContent: `${number(entry.mean_before)} → ${number(entry.mean_after)}` }),
      );
    });
    fill(this.foot,
      rows.length ? el("table", {},
        el("caption", { textContent: `Applied at ${applied.sites.join(", ")}; dose at most ${number(applied.dose.max)}` }),
        el("thead", {}, el("tr", {}, ...["Feature", "Op", "Tokens changed", "Mean"].map((head) => el("th", { scope: "col", textContent: head })))),
        el("tbody", {}, ...rows)) : null,
    );
  }

  /** Colours every token by a feature; `most` is the value of the full colour. */
  paint(colour, most) {
    for (const { node, position } of this.spans) {
      const value = colour && position !== null ? this.reading.value(colour.sae, colour.feature, position) : null;
      const heat = value === null || !(most > 0) ? 0 : Math.min(Math.max(value / most, 0), 1);
      node.style.setProperty("--heat", heat.toFixed(3));
      node.classList.toggle("hot", heat > 0);
    }
    const values = colour ? this.reading.valuesOf(colour.sae, colour.feature) : [];
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    this.measure.textContent = values.length
      ? `#${colour.feature}: max ${number(Math.max(...values))}, mean ${number(mean)}, on ${values.filter((value) => value > 0).length} of ${values.length} tokens`
      : "";
  }

  listen() {
    const indexOf = (event) => Number(event.target.closest?.(".token")?.dataset.index ?? -1);
    this.tokens.addEventListener("pointerover", (event) => {
      if (indexOf(event) >= 0) this.activate(indexOf(event));
    });
    this.tokens.addEventListener("click", (event) => {
      if (indexOf(event) >= 0) this.activate(indexOf(event));
    });
    this.tokens.addEventListener("focus", () => {
      if (this.spans.length) this.activate(this.active >= 0 ? this.active : 0);
    });
    this.tokens.addEventListener("keydown", (event) => {
      const last = this.spans.length - 1;
      const to = { ArrowRight: this.active + 1, ArrowLeft: this.active - 1, ArrowDown: this.active + 1, ArrowUp: this.active - 1, Home: 0, End: last }[event.key];
      if (to === undefined || last < 0 || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.activate(Math.min(Math.max(to, 0), last));
      this.spans[this.active].node.scrollIntoView({ block: "nearest" });
    });
  }

  activate(index) {
    this.spans[this.active]?.node.setAttribute("aria-selected", "false");
    this.active = index;
    const { node } = this.spans[index];
    node.setAttribute("aria-selected", "true");
    this.tokens.setAttribute("aria-activedescendant", node.id);
    this.look(this, index);
  }

  /** The value of the full colour: the recorded maximum of the feature, or the largest that was read. */
  static most(panes, colour, recorded) {
    if (!colour) return 0;
    const read = Math.max(...panes.map((pane) => pane.reading.largest(colour.sae, colour.feature)));
    return saeNamed(colour.sae) && recorded ? Math.max(recorded, read) : read;
  }
}
