// Chooses an engine's policy and its knobs, while it runs.

import { byId, make } from "./dom.js";
import { measure } from "./format.js";
import { explain, notify } from "./notice.js";
import { askJson } from "./server.js";
import { say, term } from "./text.js";

export class PolicyDialog {
  constructor() {
    this.policies = [];
    this.engine = null;
    byId("policy-choice").addEventListener("change", () => this.#drawKnobs());
    byId("cancel-policy").addEventListener("click", () => byId("policy-dialog").close());
    byId("policy-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#apply();
    });
  }

  async open(engine) {
    this.engine = engine;
    byId("policy-trouble").textContent = "";
    try {
      ({ policies: this.policies } = await askJson("admin/policies"));
    } catch (error) {
      notify(explain(error), "trouble");
      return;
    }
    const choice = byId("policy-choice");
    choice.replaceChildren(...this.policies.map(({ name }) => make("option", { value: name }, name)));
    choice.value = engine.policy;
    this.#drawKnobs();
    byId("policy-dialog").showModal();
  }

  #drawKnobs() {
    const chosen = this.policies.find(({ name }) => name === byId("policy-choice").value);
    byId("policy-about").textContent = term("policy", chosen.name, chosen.meaning);
    const set = knobsOf(this.engine.policy_spec, chosen.name);
    byId("knobs").replaceChildren(...chosen.knobs.map((knob) => this.#knobRow(knob, set[knob.name])));
  }

  #knobRow({ name, meaning, low, high, default: usual, is_integer: isInteger }, value) {
    const input = make("input", {
      type: "number",
      id: `knob-${name}`,
      name,
      min: low,
      max: high,
      step: isInteger ? 1 : "any",
      value: value ?? "",
      placeholder: usual === null || usual === undefined ? say("automatic") : String(usual),
      "aria-describedby": `knob-${name}-range`,
    });
    const about = `${term("knob", name, meaning)} (${say("range", { low: measure(low), high: measure(high) })})`;
    const range = make("span", { id: `knob-${name}-range`, class: "hint" }, about);
    return make(
      "div",
      { class: "row knob-row" },
      make("label", { for: input.id }, make("code", {}, name)),
      input,
      range,
    );
  }

  async #apply() {
    const name = byId("policy-choice").value;
    const set = [...byId("knobs").querySelectorAll("input")].filter(({ value }) => value !== "");
    const knobs = set.map((input) => `${input.name}=${input.value}`).join(",");
    try {
      await askJson("admin/policy", {
        body: { model: this.engine.model, policy: knobs ? `${name}:${knobs}` : name },
      });
    } catch (error) {
      byId("policy-trouble").textContent = explain(error);
      return;
    }
    byId("policy-dialog").close();
    notify(say("policy_set", { policy: name }));
  }
}

/** Knobs that a specification such as `mlfq:growth=4` sets, where it is of that policy. */
function knobsOf(spec, name) {
  const [policy, knobs = ""] = spec.split(":");
  if (policy !== name) return {};
  return Object.fromEntries(
    knobs
      .split(",")
      .filter(Boolean)
      .map((knob) => knob.split("=")),
  );
}
