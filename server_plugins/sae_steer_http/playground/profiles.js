// Stored profiles: loaded into the edits, and saved from them by who has the admin key.

import { ask, keys } from "./api.js";
import { interventions } from "./bodies.js";
import { $, el, options, showError } from "./dom.js";
import { loadEdits } from "./edits.js";
import { state } from "./state.js";

/** Lists the stored profiles; `chosen` is selected. */
export async function listProfiles(chosen) {
  const { data } = await ask("/v1/steering/profiles");
  options($("profile"), data.map(({ name, error }) => [name, error ? `${name} (broken)` : name]), chosen);
  $("profile-load").querySelector("button").disabled = data.length === 0;
  return data.map(({ name }) => name);
}

async function load(event) {
  event.preventDefault();
  const name = $("profile").value;
  if (!name) return;
  await reported(async () => {
    const profile = await ask(`/v1/steering/profiles/${encodeURIComponent(name)}`);
    await loadEdits(profile.interventions);
    $("profile-name").value = profile.name;
    $("profile-text").value = profile.description ?? "";
    $("profile-note").textContent = `Loaded ${name}.`;
  });
}

async function save(event) {
  event.preventDefault();
  const name = $("profile-name").value;
  if (!keys.admin) {
    $("keys").hidden = false;
    $("keys-toggle").setAttribute("aria-expanded", "true");
    $("profile-note").textContent = "Saving needs the admin key: give it above, and save again.";
    $("admin-key").focus();
    return;
  }
  const used = new Set(state.edits.filter((edit) => edit.on).map((edit) => edit.raw?.sae ?? edit.sae));
  const body = {
    name,
    ...($("profile-text").value ? { description: $("profile-text").value } : {}),
    interventions: interventions(),
    saes: Object.fromEntries(state.saes.filter((sae) => used.has(sae.id)).map((sae) => [sae.id, sae.fingerprint])),
  };
  await reported(async () => {
    await ask(`/v1/steering/profiles/${encodeURIComponent(name)}`, { method: "PUT", body, admin: true });
    await listProfiles(name);
    $("profile-note").textContent = `Saved ${name}. Requests can use it as the model “${state.model}:${name}”.`;
  });
}

/** Runs something, and shows the server's error where it fails. */
async function reported(work) {
  const old = $("profile-load").parentElement.querySelector(".error");
  old?.remove();
  $("profile-note").textContent = "";
  try {
    await work();
  } catch (error) {
    const node = el("div", { class: "error", role: "alert" });
    $("profile-note").after(node);
    showError(node, error);
  }
}

export function setUp() {
  $("profile-load").addEventListener("submit", load);
  $("profile-save").addEventListener("submit", save);
}
