// What is on the screen, as one value; whoever shows a part of it is told of every change.

export const state = {
  model: "",
  mode: "chat",
  prompt: "",
  maxTokens: 40,
  temperature: 0,
  seed: 0,
  live: true,
  edits: [],
  colour: null, // {sae, feature}
  at: "before",
  withPrompt: true,
  sae: "",
  saes: [],
  limits: {},
  can: new Map(), // capability key -> row
};

const watchers = [];

/** `watcher(changed)` is called after every change with the names of what changed. */
export function watch(watcher) {
  watchers.push(watcher);
}

export function change(values) {
  Object.assign(state, values);
  const changed = new Set(Object.keys(values));
  for (const watcher of watchers) watcher(changed);
}

/** Whether the server can honour something. */
export const can = (key) => state.can.get(key)?.supported ?? false;

export const saeNamed = (name) => state.saes.find((sae) => sae.id === name);
