// The scheduler at work: who runs, who waits and where, who was preempted and why, and who has the memory.

import { makeBlockMap } from "./block_map.js";
import { byId, icon, keyed, make, setText } from "./dom.js";
import { DemoLoad } from "./demo_load.js";
import { count, duration, measure, percent, short } from "./format.js";
import { perSecond } from "./history.js";
import { hasLevels, makeLanes, STATES } from "./lanes.js";
import { PolicyDialog } from "./policy_dialog.js";
import { makeTable } from "./table.js";
import { say, term } from "./text.js";

const RATE_SECONDS = 2;

const FIGURES = [
  {
    key: "running_now",
    read: (engine) => count(engine.sequences.filter(({ state }) => state === "running").length),
  },
  { key: "sequences", read: (engine) => count(engine.num_sequences) },
  { key: "unstarted", read: (engine) => count(engine.num_unstarted) },
  { key: "step_time", read: (engine) => duration(engine.step_seconds || null) },
  { key: "tokens_now", read: (engine, rate) => measure(rate) },
  {
    key: "prefix_hits",
    read: ({ prefix_tokens: { hit, miss } }) => percent(hit + miss ? hit / (hit + miss) : null),
  },
  {
    key: "preemptions",
    read: (engine) => short(Object.values(engine.preemptions).reduce((sum, number) => sum + number, 0)),
  },
  {
    key: "swapped",
    read: ({ totals }) => `${short(totals.swapped_blocks_out)} / ${short(totals.swapped_blocks_in)}`,
  },
];

const COLUMNS = [
  { key: "sequence", read: (s) => `#${s.id}` },
  { key: "tenant", read: (s) => s.tenant || say("no_tenant") },
  { key: "state", read: (s) => term("state", s.state) },
  { key: "level_short", read: (s) => s.level, isShown: hasLevels },
  { key: "place", read: (s) => count(s.place) },
  { key: "prompt_tokens", read: (s) => count(s.prompt_tokens) },
  { key: "completion_tokens", read: (s) => `${count(s.completion_tokens)} / ${count(s.max_tokens)}` },
  { key: "age", read: (s) => duration(s.age_seconds) },
  { key: "attained", read: (s) => duration(s.attained_seconds) },
  { key: "preemptions", read: (s) => count(s.num_preemptions) },
  { key: "blocks", read: (s) => count(s.blocks) },
];

export class SchedulerView {
  constructor() {
    this.engine = null; // as drawn last
    this.isFrozen = false;
    this.isTable = false;
    this.openId = null;
    this.lanes = makeLanes((id) => this.#open(id));
    this.blocks = makeBlockMap();
    this.policy = new PolicyDialog();
    this.demo = new DemoLoad(() => this.#drawDemo());
    byId("engine").addEventListener("change", () => this.status && this.update(this.status));
    byId("pause-feed").addEventListener("click", () => this.#freeze());
    byId("as-table").addEventListener("click", () => this.#switchTable());
    byId("open-policy").addEventListener("click", () => this.engine && this.policy.open(this.engine));
    byId("toggle-demo").addEventListener("click", () => this.engine && this.demo.toggle(this.engine.model));
    byId("sequence-dialog").addEventListener("close", () => (this.openId = null));
  }

  draw() {
    byId("scheduler-figures").replaceChildren(
      ...FIGURES.map(({ key }) => make("div", {}, make("dt", {}, say(key)), make("dd"))),
    );
    byId("state-legend").replaceChildren(
      ...STATES.map((state) =>
        make("li", { class: "state", data: { state } }, icon(state), term("state", state)),
      ),
    );
    for (const id of ["lanes", "preemptions", "preemption-reasons"]) {
      byId(id).replaceChildren();
      byId(id).keyedElements = undefined;
    }
    this.#drawDemo();
    if (this.status) this.update(this.status, { isForced: true });
  }

  update(status, { isForced = false } = {}) {
    this.status = status;
    this.demo.heed(status);
    if (byId("scheduler").hidden || (this.isFrozen && !isForced)) return;
    const engine = this.#choose(status.engines);
    byId("scheduler").classList.toggle("without-engine", !engine);
    if (!engine) return;
    this.engine = engine;
    setText(byId("policy-name"), `${say("policy")}: ${engine.policy}`);
    const rate = this.#completionRate(engine, status.time);
    [...byId("scheduler-figures").children].forEach((figure, index) =>
      setText(figure.lastChild, FIGURES[index].read(engine, rate)),
    );
    if (this.isTable) this.#fillTable(engine);
    else this.lanes.update(engine);
    this.blocks.update(engine);
    this.#updatePreemptions(engine, status.time);
    this.#updateOpen(engine);
  }

  /** Over the last second or so: a step's tokens come all at once. */
  #completionRate(engine, time) {
    const past = (this.past ??= []);
    if (past[0]?.engine.model !== engine.model) past.length = 0;
    if (past.at(-1)?.time !== time) past.push({ engine, time });
    while (past.length > 2 && past[1].time <= time - RATE_SECONDS) past.shift();
    if (past.length < 2) return null;
    return perSecond(
      { engines: [engine], time },
      { engines: [past[0].engine], time: past[0].time },
      ({ totals }) => totals.completion_tokens,
    );
  }

  #choose(engines) {
    const select = byId("engine");
    const names = engines.map(({ model }) => model);
    if (names.join() !== [...select.options].map(({ value }) => value).join()) {
      const chosen = select.value;
      select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
      if (names.includes(chosen)) select.value = chosen;
    }
    return engines.find(({ model }) => model === select.value) ?? engines[0];
  }

  #updatePreemptions(engine, now) {
    const reasons = Object.entries(engine.preemptions);
    keyed(
      byId("preemption-reasons"),
      reasons,
      ([reason]) => reason,
      ([reason]) => make("li", {}, term("reason", reason), " ", make("b")),
      (item, [, number]) => setText(item.lastChild, count(number)),
    );
    const recent = engine.recent_preemptions.toReversed();
    keyed(
      byId("preemptions"),
      recent,
      (p) => `${p.time} ${p.sequence_id} ${p.reason}`,
      makePreemption,
      (item, p) =>
        setText(item.firstChild, say("ago", { time: duration(Math.max(1, Math.round(now - p.time))) })),
    );
    byId("preemptions").classList.toggle("none", !recent.length);
    byId("preemptions").dataset.none = say("no_preemptions");
  }

  #fillTable(engine) {
    const columns = COLUMNS.filter(({ isShown }) => !isShown || isShown(engine));
    const rows = engine.sequences.toSorted((a, b) => a.place - b.place);
    byId("sequence-table").replaceChildren(makeTable(columns, rows));
  }

  #freeze() {
    this.isFrozen = !this.isFrozen;
    byId("pause-feed").setAttribute("aria-pressed", String(this.isFrozen));
    if (this.status) this.update(this.status);
  }

  #switchTable() {
    this.isTable = !this.isTable;
    byId("as-table").setAttribute("aria-pressed", String(this.isTable));
    byId("sequence-table").hidden = !this.isTable;
    byId("lanes").hidden = this.isTable;
    if (this.status) this.update(this.status, { isForced: true });
  }

  #drawDemo() {
    const button = byId("toggle-demo");
    button.setAttribute("aria-pressed", String(this.demo.isRunning));
    button.querySelector("span").textContent = say(this.demo.isRunning ? "stop_demo" : "start_demo");
    button.title = say("demo_about");
  }

  #open(id) {
    this.openId = id;
    this.#updateOpen(this.engine);
    byId("sequence-dialog").showModal();
  }

  #updateOpen(engine) {
    if (this.openId === null) return;
    const sequence = engine.sequences.find(({ id }) => id === this.openId);
    byId("sequence-title").textContent = say("sequence_number", { id: this.openId });
    const facts = sequence
      ? [
          ...COLUMNS.slice(1).map(({ key, read }) => [say(key), read(sequence)]),
          [say("priority_class"), sequence.priority_class || "–"],
          [say("request"), sequence.request_id || "–"],
        ]
      : [[say("state"), say("sequence_ended")]];
    byId("sequence-facts").replaceChildren(
      ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))),
    );
  }
}

function makePreemption({ sequence_id: id, tenant, reason, by }) {
  return make(
    "li",
    {},
    make("span", { class: "ago" }),
    make("b", {}, `#${id}`),
    tenant ? make("span", { class: "chip-tenant" }, tenant) : "",
    make("span", { class: "reason" }, icon("preempted"), term("reason", reason)),
    by === null || by === undefined ? "" : make("span", {}, say("for_sequence", { id: by })),
  );
}
