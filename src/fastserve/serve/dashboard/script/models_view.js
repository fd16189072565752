// Models: which are known and which are loaded, their share of the memory, and what can be done with them.

import { colorOfIndex } from "./color.js";
import { byId, icon, keyed, make, setText } from "./dom.js";
import { bytes, count, duration, percent } from "./format.js";
import { attempt } from "./notice.js";
import { askJson } from "./server.js";
import { say, term } from "./text.js";

export class ModelsView {
  constructor() {
    byId("drain").addEventListener("click", () => this.#drain());
  }

  draw() {
    for (const id of ["model-cards", "model-memory"]) {
      byId(id).replaceChildren();
      byId(id).keyedElements = undefined;
    }
    byId("model-memory").append(
      make("h2", {}, say("model_memory")),
      make("div", { class: "stack", role: "img" }),
      make("p", { class: "hint" }),
      make("ul", { class: "legend" }),
    );
    if (this.status) this.update(this.status);
  }

  update(status) {
    this.status = status;
    if (byId("models").hidden) return;
    this.#updateMemory(status);
    keyed(byId("model-cards"), status.models, (model) => model.name, makeCard, updateCard);
    const drain = byId("drain");
    setText(drain.lastElementChild, say(status.is_draining ? "end_drain" : "drain"));
    drain.title = say("drain_about");
    drain.setAttribute("aria-pressed", String(status.is_draining));
  }

  #updateMemory({ model_memory: { budget_bytes: budget, used_bytes: used }, models }) {
    const [, stack, about, legend] = byId("model-memory").children;
    const all = Math.max(budget ?? used, used, 1);
    const loaded = models.filter((model) => model.memory_bytes);
    const color = (model) => `var(${colorOfIndex(models.indexOf(model))})`;
    keyed(
      stack,
      loaded,
      (model) => model.name,
      () => make("i"),
      (part, model) => {
        part.style.inlineSize = `${(100 * model.memory_bytes) / all}%`;
        part.style.setProperty("--color", color(model));
      },
    );
    keyed(
      legend,
      loaded,
      (model) => model.name,
      ({ name }) => make("li", {}, make("i", { class: "swatch" }), make("span", {}, name), make("b")),
      (entry, model) => {
        entry.style.setProperty("--color", color(model));
        setText(entry.lastChild, bytes(model.memory_bytes));
      },
    );
    setText(
      about,
      budget === null
        ? say("no_budget", { used: bytes(used) })
        : say("budget", { used: bytes(used), budget: bytes(budget), share: percent(used / budget) }),
    );
    stack.setAttribute(
      "aria-label",
      `${about.textContent} ${loaded.map((model) => `${model.name} ${bytes(model.memory_bytes)}`).join(", ")}`,
    );
  }

  async #drain() {
    const isDraining = !this.status.is_draining;
    await attempt(
      () => askJson("admin/drain", { body: { is_draining: isDraining } }),
      say(isDraining ? "draining_begun" : "draining_ended"),
    );
  }
}

function makeCard({ name }) {
  const act = async (button, path, key) => {
    button.disabled = true;
    await attempt(() => askJson(path, { body: { model: name } }), say(key, { model: name }));
    button.disabled = false;
  };
  return make(
    "li",
    { class: "panel card" },
    make("div", { class: "card-head" }, make("h2", {}, name), make("span", { class: "badge" })),
    make("p", { class: "card-names" }),
    make("dl", { class: "facts" }),
    make("p", { class: "trouble" }),
    make(
      "div",
      { class: "card-actions" },
      make(
        "button",
        {
          type: "button",
          class: "load",
          onclick: ({ currentTarget }) => act(currentTarget, "admin/models/load", "model_loaded"),
        },
        say("load"),
      ),
      make(
        "button",
        {
          type: "button",
          class: "unload",
          onclick: ({ currentTarget }) => act(currentTarget, "admin/models/unload", "model_unloaded"),
        },
        say("unload"),
      ),
    ),
  );
}

function updateCard(card, model) {
  const badge = card.querySelector(".badge");
  setText(badge, term("residency", model.state));
  badge.dataset.state = model.state;
  const names = card.querySelector(".card-names");
  const labels = [
    ...model.aliases.map((alias) => say("alias", { alias })),
    model.version && say("version", { version: model.version }),
    model.task && term("task", model.task),
  ].filter(Boolean);
  const text = `${model.is_pinned} ${labels.join()}`;
  if (names.dataset.text !== text) {
    names.dataset.text = text;
    names.replaceChildren(
      ...(model.is_pinned ? [make("span", { class: "tag" }, icon("pin"), say("pinned"))] : []),
      ...labels.map((label) => make("span", { class: "tag" }, label)),
    );
  }
  const facts = [
    [say("memory"), bytes(model.memory_bytes)],
    [say("requests_now"), count(model.num_requests)],
    [say("idle"), model.idle_seconds === null ? "–" : duration(model.idle_seconds)],
  ];
  keyed(
    card.querySelector("dl"),
    facts,
    ([key]) => key,
    ([key]) => make("div", {}, make("dt", {}, key), make("dd")),
    (row, [, value]) => setText(row.lastChild, value),
  );
  setText(card.querySelector(".trouble"), model.error ?? "");
  card.querySelector(".load").hidden = model.state === "loaded" || model.state === "unloading";
  card.querySelector(".unload").hidden = model.state === "unloaded" || model.state === "loading";
}
