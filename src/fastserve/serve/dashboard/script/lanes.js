// Sequences as chips in lanes: the policy's levels where it has several, else by what they are doing.

import { colorOfTenant } from "./color.js";
import { byId, icon, keyed, make, setText } from "./dom.js";
import { count, duration } from "./format.js";
import { say, term } from "./text.js";

export const STATES = ["running", "paused", "waiting", "moving", "slow", "held"];
const COMPACT = 24; // a lane with more chips draws them small
const MOST_GLIDING = 6; // more at once, and they jump: frames that are drawn in between are what a page costs
const GLIDE_MS = 200;
const MARK_MS = 1200; // a preemption is seen for so long

export class Lanes {
  /** @param onOpen called with a sequence's id that is to be shown. */
  constructor(onOpen) {
    this.onOpen = onOpen;
    this.lanes = byId("lanes");
    this.counts = new Map(); // preemptions by sequence, as last seen
    this.laneOf = new Map();
    this.model = null;
  }

  update(engine) {
    if (engine.model !== this.model) {
      this.model = engine.model;
      this.counts.clear();
      this.laneOf.clear();
    }
    const lanes = lanesOf(engine);
    const moved = this.#noteMoves(lanes);
    const before = this.#places(moved);
    keyed(
      this.lanes,
      lanes,
      (lane) => lane.key,
      makeLane,
      (element, lane) => this.#updateLane(element, lane),
    );
    this.#glide(before);
    for (const sequence of engine.sequences) this.#markPreempted(sequence);
    this.counts = new Map(engine.sequences.map(({ id, num_preemptions: num }) => [id, num]));
  }

  #updateLane(element, lane) {
    setText(element.querySelector("h3"), lane.name);
    setText(element.querySelector(".lane-count"), count(lane.sequences.length));
    const list = element.querySelector("ul");
    list.classList.toggle("compact", lane.sequences.length > COMPACT);
    keyed(
      list,
      lane.sequences,
      (sequence) => sequence.id,
      (sequence) => makeChip(sequence, this.onOpen),
      updateChip,
    );
  }

  #noteMoves(lanes) {
    const next = new Map(lanes.flatMap((lane) => lane.sequences.map(({ id }) => [id, lane.key])));
    const moved = [...next].filter(([id, key]) => this.laneOf.has(id) && this.laneOf.get(id) !== key);
    this.laneOf = next;
    return moved.map(([id]) => id);
  }

  /** Where the chips are that will go to another lane. */
  #places(ids) {
    if (ids.length > MOST_GLIDING || matchMedia("(prefers-reduced-motion: reduce)").matches) return new Map();
    const chips = ids.map((id) => [id, this.#chip(id)]).filter(([, chip]) => chip !== null);
    return new Map(chips.map(([id, chip]) => [id, chip.getBoundingClientRect()]));
  }

  /** A chip in another lane is a new element; it sets out from where the old one was. */
  #glide(before) {
    for (const [id, from] of before) {
      const chip = this.#chip(id);
      const to = chip.getBoundingClientRect();
      const start = { transform: `translate(${from.left - to.left}px, ${from.top - to.top}px)` };
      chip.animate([start, { transform: "none" }], { duration: GLIDE_MS, easing: "ease-out" });
    }
  }

  #chip(id) {
    return this.lanes.querySelector(`[data-id="${id}"]`);
  }

  #markPreempted({ id, state, num_preemptions: num }) {
    const chip = this.#chip(id);
    if (!(num > this.counts.get(id)) || state === "running" || chip === null) return;
    chip.classList.add("just-preempted");
    clearTimeout(chip.marking);
    chip.marking = setTimeout(() => chip.classList.remove("just-preempted"), MARK_MS);
  }
}

export const hasLevels = (engine) =>
  engine.policy.startsWith("mlfq") || engine.sequences.some(({ level }) => level > 0);

function lanesOf(engine) {
  const sequences = engine.sequences.toSorted((a, b) => a.place - b.place);
  if (!hasLevels(engine)) {
    const states = STATES.filter(
      (state) => ["running", "paused", "waiting"].includes(state) || sequences.some((s) => s.state === state),
    );
    return states.map((state) => ({
      key: state,
      name: term("lane", state),
      sequences: sequences.filter((s) => s.state === state),
    }));
  }
  const most = Math.max(3, ...sequences.map(({ level }) => level));
  return Array.from({ length: most + 1 }, (_, level) => ({
    key: `level ${level}`,
    name: say("level", { level }),
    sequences: sequences.filter((sequence) => sequence.level === level),
  }));
}

function makeLane() {
  return make("section", { class: "lane" }, make("h3"), make("span", { class: "lane-count" }), make("ul"));
}

function makeChip({ id, tenant }, onOpen) {
  const button = make(
    "button",
    { type: "button", class: "chip", data: { id }, onclick: () => onOpen(id) },
    make(
      "span",
      { class: "chip-head" },
      icon("running"),
      make("b", {}, `#${id}`),
      make("span", { class: "chip-tenant" }, tenant || ""),
      make("span", { class: "chip-preempted" }, icon("preempted"), make("span")),
    ),
    make("span", { class: "chip-bar" }, make("i", { class: "prompt" }), make("i", { class: "completion" })),
    make("span", { class: "chip-tokens" }),
  );
  button.style.setProperty("--tenant", `var(${colorOfTenant(tenant)})`);
  return make("li", {}, button);
}

function updateChip(item, sequence) {
  const chip = item.firstElementChild;
  if (chip.dataset.state !== sequence.state) {
    chip.dataset.state = sequence.state;
    chip.querySelector(".chip-head use").setAttribute("href", `#icon-${sequence.state}`);
  }
  const {
    prompt_tokens: prompt,
    computed_tokens: computed,
    completion_tokens: done,
    max_tokens: most,
  } = sequence;
  const all = prompt + Math.max(most, 1);
  chip.querySelector(".prompt").style.inlineSize = `${(100 * Math.min(computed, prompt)) / all}%`;
  chip.querySelector(".completion").style.inlineSize = `${(100 * done) / all}%`;
  setText(
    chip.querySelector(".chip-tokens"),
    computed < prompt && !done
      ? say("reads_prompt", { done: count(computed), all: count(prompt) })
      : `${count(done)} / ${count(most)}`,
  );
  const badge = chip.querySelector(".chip-preempted");
  badge.hidden = !sequence.num_preemptions;
  setText(badge.lastElementChild, count(sequence.num_preemptions));
  chip.setAttribute("aria-label", describe(sequence));
}

export function describe(sequence) {
  return say("sequence_label", {
    id: sequence.id,
    tenant: sequence.tenant || say("no_tenant"),
    state: term("state", sequence.state),
    done: count(sequence.completion_tokens),
    most: count(sequence.max_tokens),
    preemptions: count(sequence.num_preemptions),
    age: duration(sequence.age_seconds),
  });
}

export const makeLanes = (onOpen) => new Lanes(onOpen);
