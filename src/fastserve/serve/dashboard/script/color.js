// Colours: those of tenants, and those of the theme as a canvas takes them.

const NUM_SERIES = 8; // --tenant-1 to --tenant-8

const places = new Map(); // of tenants, in the order in which they were first seen

/** The custom property of a tenant's colour. */
export function colorOfTenant(name) {
  if (!places.has(name)) places.set(name, places.size);
  return colorOfIndex(places.get(name));
}

export const colorOfIndex = (index) => `--tenant-${(index % NUM_SERIES) + 1}`;

let resolved = new Map();

/** The theme has changed. */
export function forgetColors() {
  resolved = new Map();
}

/** A custom property's colour, resolved once for each theme. */
export function resolveColor(property) {
  if (!resolved.has(property)) {
    const probe = document.createElement("i");
    probe.hidden = true;
    probe.style.color = `var(${property})`;
    document.body.append(probe);
    resolved.set(property, getComputedStyle(probe).color);
    probe.remove();
  }
  return resolved.get(property);
}
