// What charts draw: rates and quantiles, worked out of one status and an earlier one.

const MOST_POINTS = 2400;
const MOST_SECONDS = 900;
const QUANTILE_SECONDS = 10; // that a point's quantiles are taken over, at least
const RATE_SECONDS = 2; // and its rates: the tokens of a step come all at once

export class History {
  constructor() {
    this.points = [];
    this.statuses = []; // the few that rates and quantiles are reckoned from
  }

  add(status) {
    const last = this.statuses.at(-1);
    if (last !== undefined && status.time <= last.time) return;
    this.statuses.push(status);
    while (this.statuses.length > 2 && this.statuses[1].time < status.time - QUANTILE_SECONDS)
      this.statuses.shift();
    const recent =
      this.statuses.findLast(({ time }) => time <= status.time - RATE_SECONDS) ?? (last && this.statuses[0]);
    this.points.push(pointOf(status, recent, this.statuses[0]));
    const stale = this.points.findIndex((point) => point.time > status.time - MOST_SECONDS);
    this.points.splice(0, Math.max(stale, this.points.length - MOST_POINTS, 0));
  }
}

/** `recent` is what rates are reckoned from, undefined of the first status; `earlier` of quantiles. */
function pointOf(status, recent, earlier) {
  const total = (read) => status.engines.reduce((sum, engine) => sum + read(engine), 0);
  const share = (used, all) => (all ? used / all : null);
  const states = new Map();
  for (const engine of status.engines) {
    for (const { state } of engine.sequences) states.set(state, (states.get(state) ?? 0) + 1);
  }
  const running = states.get("running") ?? 0;
  const steps = status.engines
    .filter((engine) => engine.step_seconds > 0)
    .map((engine) => engine.step_seconds);
  const first = latencyOf("time_to_first_token_seconds", status, earlier);
  const each = latencyOf("time_per_output_token_seconds", status, earlier);
  return {
    time: status.time,
    prompt_rate: rateOf("prompt_tokens", status, recent),
    completion_rate: rateOf("completion_tokens", status, recent),
    preemption_rate:
      recent &&
      perSecond(status, recent, (engine) => Object.values(engine.preemptions).reduce((a, b) => a + b, 0)),
    running,
    not_running: total((engine) => engine.num_sequences) - running,
    first_p50: quantile(first, 0.5),
    first_p95: quantile(first, 0.95),
    each_p50: quantile(each, 0.5),
    each_p95: quantile(each, 0.95),
    step_seconds: steps.length ? Math.max(...steps) : null,
    fast_share: share(
      total((engine) => engine.blocks.fast.used),
      total((engine) => engine.blocks.fast.total),
    ),
    slow_share: share(
      total((engine) => engine.blocks.slow.used),
      total((engine) => engine.blocks.slow.total),
    ),
    resident_bytes: status.memory.resident_bytes,
    model_bytes: status.model_memory.used_bytes,
    watts: status.energy.watts,
  };
}

const rateOf = (name, status, recent) => recent && perSecond(status, recent, (engine) => engine.totals[name]);

/** How fast a counter of the engines grows. An engine that is new, or was loaded again, counts from its beginning. */
export function perSecond(status, last, read) {
  const before = new Map(last.engines.map((engine) => [engine.model, read(engine)]));
  const growth = status.engines.map((engine) => {
    const now = read(engine);
    const then = before.get(engine.model) ?? now;
    return now >= then ? now - then : now;
  });
  return growth.reduce((sum, number) => sum + number, 0) / (status.time - last.time);
}

/** A histogram, over all models, of what has been observed between two statuses; null: nothing. */
function latencyOf(name, status, earlier) {
  const before = new Map((earlier.latencies ?? []).map((latency) => [latency.model, latency[name].counts]));
  let sum = null;
  for (const latency of status.latencies ?? []) {
    const { bounds, counts } = latency[name];
    const then = before.get(latency.model) ?? counts.map(() => 0);
    sum ??= { bounds, counts: bounds.concat(Infinity).map(() => 0) };
    counts.forEach((number, index) => (sum.counts[index] += Math.max(0, number - then[index])));
  }
  return sum;
}

/**
 * A quantile of a histogram, evenly spread within a bucket; null where nothing was observed.
 *   quantile({ bounds: [1, 2], counts: [0, 2, 0] }, 0.5) is 1.5
 */
export function quantile(histogram, share) {
  const all = histogram?.counts.reduce((sum, number) => sum + number, 0);
  if (!all) return null;
  let wanted = share * all;
  for (const [index, number] of histogram.counts.entries()) {
    if (number >= wanted && number > 0) {
      const low = index ? histogram.bounds[index - 1] : 0;
      const high = histogram.bounds[index] ?? low;
      return low + ((high - low) * wanted) / number;
    }
    wanted -= number;
  }
  return histogram.bounds.at(-1);
}
