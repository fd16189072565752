// A line chart on a canvas: axes with round numbers, a crosshair by pointer and arrow keys, and the same as a table.

import { resolveColor } from "./color.js";
import { announce, make, setText } from "./dom.js";
import { language, say } from "./text.js";

const HEIGHT_PX = 190;
const MARGIN = { top: 10, right: 10, bottom: 22, left: 52 };
const TABLE_ROWS = 10;
const GAP_SECONDS = 6; // longer without a status, and the line is broken

export class Chart {
  /**
   * @param title key of the chart's text.
   * @param lines what it draws: { field of a point, key of its text, color: a custom property, dash }.
   * @param format writes a value.
   * @param most the top of the axis where it is fixed, such as 1 of shares.
   * @param isBinary whether round numbers are those of bytes.
   */
  constructor({ title, lines, format, most = null, isBinary = false }) {
    Object.assign(this, { title, lines, format, most, isBinary });
    this.points = [];
    this.pointed = null; // index of the point under the crosshair
    this.canvas = make("canvas", { tabIndex: 0, role: "img" });
    this.readouts = new Map(lines.map((line) => [line.field, make("b")]));
    this.heading = make("h2");
    this.table = make("div", { class: "table-scroll", hidden: true, tabIndex: 0 });
    this.toggle = make("button", {
      type: "button",
      class: "quiet",
      "aria-pressed": "false",
      onclick: () => this.#toggleTable(),
    });
    this.labels = lines.map(() => make("span"));
    const legend = lines.map((line, index) => {
      const swatch = make("i", { class: "swatch" });
      swatch.style.setProperty("--color", `var(${line.color})`);
      swatch.classList.toggle("dashed", Boolean(line.dash));
      return make("li", {}, swatch, this.labels[index], this.readouts.get(line.field));
    });
    this.clock = make("span", { class: "chart-clock" });
    this.element = make(
      "article",
      { class: "panel chart" },
      make("div", { class: "panel-head" }, this.heading, this.clock, this.toggle),
      make("ul", { class: "legend" }, ...legend),
      this.canvas,
      this.table,
    );
    this.canvas.addEventListener("pointermove", (event) => this.#pointAt(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.#point(null));
    this.canvas.addEventListener("blur", () => this.#point(null));
    this.canvas.addEventListener("keydown", (event) => this.#heedKey(event));
  }

  write() {
    this.heading.textContent = say(this.title);
    this.toggle.textContent = say("as_table");
    this.lines.forEach((line, index) => (this.labels[index].textContent = say(line.key)));
  }

  /** Draw points of the last `span` seconds before `now`. */
  draw(points, now, span) {
    const from = points.findIndex((point) => point.time >= now - span);
    this.points = from < 0 ? [] : points.slice(from);
    Object.assign(this, { now, span });
    if (this.pointed !== null) this.pointed = Math.min(this.pointed, this.points.length - 1);
    this.#paint();
    if (!this.table.hidden) this.#fillTable();
  }

  #paint() {
    const width = this.canvas.clientWidth;
    if (!width) return;
    const scale = devicePixelRatio;
    if (this.canvas.width !== Math.round(width * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(HEIGHT_PX * scale);
    }
    const values = this.lines.flatMap((line) => this.points.map((point) => point[line.field]));
    const { top, ticks } = axisOf(this.most ?? Math.max(0, ...values.filter(Number.isFinite)), this);
    const x = (time) =>
      MARGIN.left + (1 - (this.now - time) / this.span) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => HEIGHT_PX - MARGIN.bottom - (value / top) * (HEIGHT_PX - MARGIN.top - MARGIN.bottom);
    this.x = x;
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, HEIGHT_PX);
    this.#paintAxes(context, width, ticks, y);
    for (const line of this.lines) this.#paintLine(context, line, x, y);
    this.#paintCrosshair(context, x, y);
    this.#writeReadouts();
  }

  #paintAxes(context, width, ticks, y) {
    context.font = "11px Inter, system-ui, sans-serif";
    context.lineWidth = 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const tick of ticks) {
      context.strokeStyle = resolveColor("--line");
      context.beginPath();
      context.moveTo(MARGIN.left, Math.round(y(tick)) + 0.5);
      context.lineTo(width - MARGIN.right, Math.round(y(tick)) + 0.5);
      context.stroke();
      context.fillStyle = resolveColor("--muted");
      context.fillText(this.format(tick), MARGIN.left - 8, y(tick));
    }
    context.textBaseline = "alphabetic";
    for (const [share, align] of [
      [1, "left"],
      [0.5, "center"],
      [0, "right"],
    ]) {
      context.textAlign = align;
      const seconds = share * this.span;
      const text = seconds
        ? seconds < 120
          ? `−${seconds} ${say("unit_s")}`
          : `−${seconds / 60} ${say("unit_min")}`
        : say("now");
      context.fillText(text, MARGIN.left + (1 - share) * (width - MARGIN.left - MARGIN.right), HEIGHT_PX - 5);
    }
  }

  #paintLine(context, line, x, y) {
    context.strokeStyle = resolveColor(line.color);
    context.lineWidth = 1.8;
    context.lineJoin = "round";
    context.setLineDash(line.dash ? [5, 3] : []);
    context.beginPath();
    let before = null; // when the last point that has a value was
    for (const point of this.points) {
      const value = point[line.field];
      if (value === null || value === undefined) continue;
      if (before === null || point.time - before > GAP_SECONDS) context.moveTo(x(point.time), y(value));
      else context.lineTo(x(point.time), y(value));
      before = point.time;
    }
    context.stroke();
    context.setLineDash([]);
  }

  #paintCrosshair(context, x, y) {
    const point = this.points[this.pointed];
    if (!point) return;
    context.strokeStyle = resolveColor("--muted");
    context.beginPath();
    context.moveTo(x(point.time), MARGIN.top);
    context.lineTo(x(point.time), HEIGHT_PX - MARGIN.bottom);
    context.stroke();
    for (const line of this.lines) {
      const value = point[line.field];
      if (value === null || value === undefined) continue;
      context.fillStyle = resolveColor(line.color);
      context.beginPath();
      context.arc(x(point.time), y(value), 3.5, 0, 2 * Math.PI);
      context.fill();
    }
  }

  #writeReadouts() {
    const point = this.points[this.pointed ?? this.points.length - 1];
    for (const [field, readout] of this.readouts) setText(readout, this.format(point?.[field] ?? null));
    setText(this.clock, this.pointed === null || !point ? "" : clock(point.time));
    const label = `${say(this.title)}. ${point ? this.#describe(point) : say("no_data")}`;
    if (this.pointed === null) this.canvas.setAttribute("aria-label", label);
  }

  #describe(point) {
    return this.lines.map((line) => `${say(line.key)} ${this.format(point[line.field] ?? null)}`).join(", ");
  }

  #pointAt(offset) {
    if (!this.x || !this.points.length) return;
    const distances = this.points.map((point) => Math.abs(this.x(point.time) - offset));
    this.#point(distances.indexOf(Math.min(...distances)));
  }

  #point(index) {
    if (index === this.pointed) return;
    this.pointed = index;
    this.#paint();
  }

  #heedKey(event) {
    const last = this.points.length - 1;
    const at = this.pointed ?? last;
    const step = event.shiftKey ? 10 : 1;
    const next = { ArrowLeft: at - step, ArrowRight: at + step, Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.#point(Math.max(0, Math.min(last, next)));
    const point = this.points[this.pointed];
    announce(`${clock(point.time)}: ${this.#describe(point)}`);
  }

  #toggleTable() {
    this.table.hidden = !this.table.hidden;
    this.canvas.hidden = !this.table.hidden;
    this.toggle.setAttribute("aria-pressed", String(!this.table.hidden));
    this.table.setAttribute("aria-label", say(this.title));
    this.table.setAttribute("role", "region");
    if (this.table.hidden) this.#paint();
    else this.#fillTable();
  }

  #fillTable() {
    const step = Math.max(1, Math.floor(this.points.length / TABLE_ROWS));
    const rows = this.points.toReversed().filter((_, index) => index % step === 0);
    const head = [say("time"), ...this.lines.map((line) => say(line.key))];
    this.table.replaceChildren(
      make(
        "table",
        {},
        make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
        make(
          "tbody",
          {},
          ...rows.map((point) =>
            make(
              "tr",
              {},
              make("th", { scope: "row" }, clock(point.time)),
              ...this.lines.map((line) => make("td", {}, this.format(point[line.field] ?? null))),
            ),
          ),
        ),
      ),
    );
  }
}

/** The top of an axis and its ticks: 1, 2, 2.5 or 5 times a power of ten apart. */
export function axisOf(most, { isBinary = false } = {}) {
  if (!(most > 0)) return { top: 1, ticks: [0, 1] };
  const unit = isBinary ? 1024 ** Math.floor(Math.log2(most) / 10) : 1;
  const rough = most / unit / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step =
    [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999) * unit;
  const num = Math.ceil(most / step - 1e-9);
  const ticks = Array.from({ length: num + 1 }, (_, index) => index * step);
  return { top: ticks.at(-1), ticks };
}

const clock = (time) => new Date(time * 1000).toLocaleTimeString(language());
