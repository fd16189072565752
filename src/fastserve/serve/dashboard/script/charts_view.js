// Throughput, latency and memory over the last minutes.

import { Chart } from "./chart.js";
import { byId, make } from "./dom.js";
import { bytes, count, duration, measure, percent } from "./format.js";
import { say } from "./text.js";

const SPANS_SECONDS = [60, 300, 900];

const CHARTS = [
  {
    title: "throughput",
    format: measure,
    lines: [
      { field: "completion_rate", key: "completion_tokens_per_second", color: "--series-1" },
      { field: "prompt_rate", key: "prompt_tokens_per_second", color: "--series-2", dash: true },
    ],
  },
  {
    title: "sequences",
    format: count,
    lines: [
      { field: "running", key: "state.running", color: "--series-1" },
      { field: "not_running", key: "not_running", color: "--series-3", dash: true },
    ],
  },
  {
    title: "first_token",
    format: duration,
    lines: [
      { field: "first_p50", key: "median", color: "--series-1" },
      { field: "first_p95", key: "p95", color: "--series-4", dash: true },
    ],
  },
  {
    title: "per_token",
    format: duration,
    lines: [
      { field: "each_p50", key: "median", color: "--series-1" },
      { field: "each_p95", key: "p95", color: "--series-4", dash: true },
    ],
  },
  {
    title: "steps",
    format: duration,
    lines: [{ field: "step_seconds", key: "step_mean", color: "--series-1" }],
  },
  {
    title: "preemptions",
    format: measure,
    lines: [{ field: "preemption_rate", key: "per_second", color: "--series-4" }],
  },
  {
    title: "kv_blocks",
    format: percent,
    most: 1,
    lines: [
      { field: "fast_share", key: "fast_tier", color: "--series-1" },
      { field: "slow_share", key: "slow_tier", color: "--series-5", dash: true },
    ],
  },
  {
    title: "memory",
    format: bytes,
    isBinary: true,
    lines: [
      { field: "resident_bytes", key: "resident_memory", color: "--series-1" },
      { field: "model_bytes", key: "models", color: "--series-3", dash: true },
    ],
  },
  {
    title: "power",
    format: (watts) => `${measure(watts)} W`,
    isShown: (points) => points.some((point) => point.watts !== null),
    lines: [{ field: "watts", key: "watts", color: "--series-2" }],
  },
];

export class ChartsView {
  constructor(history) {
    this.history = history;
    this.charts = CHARTS.map((definition) => ({ ...definition, chart: new Chart(definition) }));
    byId("chart-grid").append(...this.charts.map(({ chart }) => chart.element));
    byId("time-span").addEventListener("change", () => this.update());
    new ResizeObserver(() => this.update()).observe(byId("chart-grid"));
  }

  draw() {
    const select = byId("time-span");
    const chosen = select.value || String(SPANS_SECONDS[1]);
    select.replaceChildren(
      ...SPANS_SECONDS.map((span) =>
        make("option", { value: span }, say("last_minutes", { minutes: span / 60 })),
      ),
    );
    select.value = chosen;
    for (const { chart } of this.charts) chart.write();
    this.update();
  }

  update() {
    if (byId("charts").hidden) return;
    const { points } = this.history;
    const now = points.at(-1)?.time ?? Date.now() / 1000;
    const minutes = Math.ceil((now - (points[0]?.time ?? now)) / 60);
    const span = Math.min(Number(byId("time-span").value), 60 * Math.max(1, minutes)); // what there is fills the chart
    for (const { chart, isShown } of this.charts) {
      chart.element.hidden = Boolean(isShown) && !isShown(points);
      if (!chart.element.hidden) chart.draw(points, now, span);
    }
  }
}
