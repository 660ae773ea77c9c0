// What was read of one answer's tokens: by position, as the chunks of a stream bring it.

export class Reading {
  constructor() {
    this.saes = new Map(); // name -> {features, values, top}
    this.texts = new Map(); // position -> text of the token there
    this.prompt = null; // P, the number of prompt tokens
    this.completion = 0; // completion tokens so far
  }

  /** Takes over the readings of a chunk that brought `tokens` new ones. */
  take(entries, tokens) {
    this.completion += tokens;
    for (const entry of entries ?? []) {
      const sae = this.saes.get(entry.sae) ?? { values: new Map(), top: new Map() };
      sae.features = entry.features;
      this.saes.set(entry.sae, sae);
      (entry.positions ?? []).forEach((position, j) => {
        if (entry.values) sae.values.set(position, entry.values[j]);
        if (entry.top) sae.top.set(position, entry.top[j]);
        this.texts.set(position, entry.text[j]);
      });
      sae.summary = entry.summary ?? sae.summary;
    }
    // The newest token has not been through the model: what was read ends one before it.
    if (this.prompt === null && this.texts.size && this.completion) {
      this.prompt = Math.max(...this.texts.keys()) + 2 - this.completion;
    }
  }

  /** Positions of the prompt that were read. */
  promptPositions() {
    return [...this.texts.keys()].filter((position) => position < this.prompt).sort((a, b) => a - b);
  }

  /** The value of a feature at a position; null where it was not read. */
  value(sae, feature, position) {
    const read = this.saes.get(sae);
    const at = read?.features?.indexOf(feature) ?? -1;
    if (at >= 0) return read.values.get(position)?.[at] ?? null;
    return read?.top.get(position)?.find(([other]) => other === feature)?.[1] ?? null;
  }

  /** The largest features at a position, of every SAE that was read whole: [sae, feature, value]. */
  top(position) {
    const all = [...this.saes].flatMap(([sae, read]) =>
      (read.top.get(position) ?? []).map(([feature, value]) => [sae, feature, value]),
    );
    return all.sort((a, b) => b[2] - a[2]);
  }

  /** The named features at a position: [sae, feature, value]. */
  named(position) {
    return [...this.saes].flatMap(([sae, read]) =>
      (read.values.get(position) ?? []).map((value, i) => [sae, read.features[i], value]),
    );
  }

  /** The values of a feature on all tokens, where it was read by name. */
  valuesOf(sae, feature) {
    const read = this.saes.get(sae);
    const at = read?.features?.indexOf(feature) ?? -1;
    return at < 0 ? [] : [...read.values.values()].map((values) => values[at]);
  }

  /** The largest value of a feature that was read. */
  largest(sae, feature) {
    return Math.max(0, ...[...this.texts.keys()].map((position) => this.value(sae, feature, position) ?? 0));
  }

  has(position) {
    return this.texts.has(position);
  }
}
