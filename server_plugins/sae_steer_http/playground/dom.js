// Elements from data: text is always set as text, so that nothing from a model or a label can become markup.

export const $ = (id) => document.getElementById(id);

/** An element; of `props`, `on…` are listeners, names with a dash are attributes, and the rest are properties. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name.includes("-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Replaces what an element holds. */
export function fill(node, ...children) {
  node.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

export function options(select, entries, chosen) {
  fill(select, ...entries.map(([value, text]) => el("option", { value, textContent: text, selected: value === chosen })));
}

/** Calls `run` once nothing has been asked for `wait` milliseconds. */
export function later(run, wait) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...values), wait);
  };
}

/** A number as people read it. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(1);
  return value.toFixed(size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : 2);
}

/** Tabs of a tablist: arrow keys move, `show` is told which is chosen. */
export function tabs(buttons, show) {
  const choose = (button, focus) => {
    for (const each of buttons) {
      each.setAttribute("aria-selected", String(each === button));
      each.tabIndex = each === button ? 0 : -1;
    }
    if (focus) button.focus();
    show(button);
  };
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => choose(button, false));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      choose(buttons[(i + step + buttons.length) % buttons.length], true);
    });
  });
}

/** An error of the server as it is: code, field, message. */
export function showError(node, error) {
  if (error === null) {
    node.hidden = true;
    fill(node);
    return;
  }
  node.hidden = false;
  fill(
    node,
    el("strong", { textContent: error.code ?? "error" }),
    error.param ? el("code", { textContent: error.param }) : null,
    el("span", { textContent: error.message }),
  );
}
