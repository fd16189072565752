// Makes and updates elements. All text goes in as text: nothing here parses HTML, and the page's policy forbids it.

/**
 * An element.
 *   make("button", { type: "button", onclick: send }, icon("send"), "Send")
 * Properties: `class`, `on*` listeners, `data` (an object), those with a dash or `role` as attributes, others as
 * properties of the element. Children that are null or undefined are left out.
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.includes("-") || name === "role" || name === "for" || name === "scope")
      element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

export const byId = (id) => document.getElementById(id);

/** Write text only where it differs: what does not change is not laid out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Have a container's children be one for each item, in their order. An element is kept for as long as its item's key
 * is there.
 *   keyed(list, sequences, (s) => s.id, makeChip, updateChip)
 */
export function keyed(container, items, keyOf, create, update) {
  const known = (container.keyedElements ??= new Map());
  const present = new Set();
  let place = container.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    present.add(key);
    let element = known.get(key);
    if (element === undefined) {
      element = create(item);
      known.set(key, element);
    }
    update?.(element, item);
    if (element === place) place = place.nextElementSibling;
    else container.insertBefore(element, place);
  }
  for (const [key, element] of known) {
    if (present.has(key)) continue;
    element.remove();
    known.delete(key);
  }
}

/** Say something to who cannot see it. */
export function announce(text) {
  byId("announcement").textContent = text;
}
