// Blocks of keys and values: a square for each, or for several alike, in the colours of their tenants.

import { colorOfTenant, resolveColor } from "./color.js";
import { byId, keyed, make, setText } from "./dom.js";
import { count, percent } from "./format.js";
import { say } from "./text.js";

const MOST_CELLS = 480;
const CELL_PX = 13; // with the gap
const GAP_PX = 2;

export class BlockMap {
  constructor(element) {
    this.canvas = make("canvas", { role: "img", class: "blocks" });
    this.about = make("p", { class: "hint" });
    this.legend = make("ul", { class: "legend" });
    this.slow = make("div", { class: "meter" }, make("i"));
    this.slowText = make("p", { class: "hint" });
    element.append(this.canvas, this.legend, this.about, this.slow, this.slowText);
    this.last = null;
    new ResizeObserver(() => this.last && this.#paint(this.last)).observe(element);
  }

  update(engine) {
    const { fast, slow } = engine.blocks;
    const parts = partsOf(engine);
    this.last = { parts, total: fast.total };
    this.#paint(this.last);
    keyed(
      this.legend,
      parts,
      (part) => part.id,
      makeEntry,
      (entry, part) => {
        setText(entry.children[1], part.name);
        setText(entry.children[2], count(part.blocks));
      },
    );
    setText(
      this.about,
      say("fast_tier_about", {
        used: count(fast.used),
        total: count(fast.total),
        share: percent(fast.used / fast.total),
      }),
    );
    this.canvas.setAttribute(
      "aria-label",
      `${this.about.textContent} ${parts.map((part) => `${part.name} ${count(part.blocks)}`).join(", ")}`,
    );
    this.slow.hidden = this.slowText.hidden = !slow.total;
    if (slow.total) this.slow.firstChild.style.inlineSize = `${(100 * slow.used) / slow.total}%`;
    setText(this.slowText, say("slow_tier_about", { used: count(slow.used), total: count(slow.total) }));
  }

  #paint({ parts, total }) {
    const width = this.canvas.clientWidth;
    if (!width || !total) return;
    const num = Math.min(total, MOST_CELLS);
    const columns = Math.max(1, Math.floor((width + GAP_PX) / CELL_PX));
    const height = Math.ceil(num / columns) * CELL_PX - GAP_PX;
    const scale = devicePixelRatio;
    const [pixelWidth, pixelHeight] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== pixelWidth || this.canvas.height !== pixelHeight) {
      Object.assign(this.canvas, { width: pixelWidth, height: pixelHeight });
      this.canvas.style.blockSize = `${height}px`;
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    let blocks = 0;
    let cell = 0;
    for (const part of parts) {
      blocks += part.blocks;
      const end = Math.round((blocks / total) * num);
      for (; cell < end; cell += 1) {
        const [left, top] = [(cell % columns) * CELL_PX, Math.floor(cell / columns) * CELL_PX];
        context.fillStyle = context.strokeStyle = resolveColor(part.color);
        if (part.isHollow)
          context.strokeRect(left + 0.5, top + 0.5, CELL_PX - GAP_PX - 1, CELL_PX - GAP_PX - 1);
        else context.fillRect(left, top, CELL_PX - GAP_PX, CELL_PX - GAP_PX);
      }
    }
  }
}

/** Whose the blocks of the fast tier are. Those that sequences share are counted once: as of nobody in particular. */
function partsOf({ blocks: { fast }, sequences }) {
  const owned = new Map();
  for (const { tenant, blocks, state } of sequences) {
    if (blocks && state !== "slow") owned.set(tenant, (owned.get(tenant) ?? 0) + blocks);
  }
  const sum = [...owned.values()].reduce((all, blocks) => all + blocks, 0);
  const shrink = sum > fast.used ? fast.used / sum : 1;
  const parts = [...owned]
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([tenant, blocks]) => ({
      id: `tenant ${tenant}`,
      name: tenant || say("no_tenant"),
      blocks: Math.round(blocks * shrink),
      color: colorOfTenant(tenant),
    }));
  const others = fast.used - parts.reduce((all, part) => all + part.blocks, 0);
  if (others > 0) parts.push({ id: "others", name: say("blocks_others"), blocks: others, color: "--muted" });
  parts.push({ id: "cached", name: say("blocks_cached"), blocks: fast.cached, color: "--cached" });
  parts.push({
    id: "free",
    name: say("blocks_free"),
    blocks: Math.max(0, fast.total - fast.used - fast.cached),
    color: "--line-strong",
    isHollow: true,
  });
  return parts;
}

function makeEntry(part) {
  const swatch = make("i", { class: part.isHollow ? "swatch hollow" : "swatch" });
  swatch.style.setProperty("--color", `var(${part.color})`);
  return make("li", {}, swatch, make("span"), make("b"));
}

export const makeBlockMap = () => new BlockMap(byId("block-map"));
