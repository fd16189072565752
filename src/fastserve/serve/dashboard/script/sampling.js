// The form of a request's parameters: rows of data, a number and a slider each.

import { byId, make } from "./dom.js";
import { say } from "./text.js";

// `off`: the value that the server takes by itself; it is not sent. Null is an empty field.
const NUMBERS = [
  { name: "temperature", low: 0, high: 2, step: 0.05, off: 1, start: 0.7 },
  { name: "max_completion_tokens", low: 1, high: 4096, step: 1, off: null, start: 512 },
  { name: "top_p", low: 0.01, high: 1, step: 0.01, off: 1, start: 1 },
  { name: "top_k", low: 0, high: 200, step: 1, off: 0, start: 0 },
  { name: "min_p", low: 0, high: 1, step: 0.01, off: 0, start: 0 },
  { name: "presence_penalty", low: -2, high: 2, step: 0.1, off: 0, start: 0 },
  { name: "frequency_penalty", low: -2, high: 2, step: 0.1, off: 0, start: 0 },
  { name: "repetition_penalty", low: 0.5, high: 2, step: 0.05, off: 1, start: 1 },
];
const TOP_LOGPROBS = 5;

export class Sampling {
  constructor(form) {
    this.form = form;
    this.values = { system: "", stop: "", seed: "", probabilities: true };
    for (const { name, start } of NUMBERS) this.values[name] = start;
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Draw the form, in the page's language. What was chosen stays. */
  draw() {
    this.form.replaceChildren(
      this.#textRow("system", { rows: 4, placeholder: say("system_placeholder") }),
      this.#checkRow("probabilities"),
      ...NUMBERS.slice(0, 2).map((row) => this.#numberRow(row)),
      make(
        "details",
        { open: this.isOpen ?? innerWidth > 1200, ontoggle: (event) => (this.isOpen = event.target.open) },
        make("summary", {}, say("more_sampling")),
        ...NUMBERS.slice(2).map((row) => this.#numberRow(row)),
        this.#seedRow(),
        this.#textRow("stop", { rows: 2, placeholder: say("stop_placeholder") }),
      ),
    );
  }

  reset() {
    for (const { name, start } of NUMBERS) this.values[name] = start;
    Object.assign(this.values, { system: "", stop: "", seed: "", probabilities: true });
    this.draw();
  }

  /** The most tokens that a completion may have, by the model's context. */
  limit(contextLength) {
    const row = NUMBERS.find(({ name }) => name === "max_completion_tokens");
    row.high = contextLength;
    if (this.values[row.name] >= contextLength) this.values[row.name] = Math.ceil(contextLength / 2); // a prompt needs some too
    this.draw();
  }

  /** Fields of a chat request. */
  fields() {
    const fields = {};
    for (const { name, off } of NUMBERS) if (this.values[name] !== off) fields[name] = this.values[name];
    if (this.values.seed !== "") fields.seed = Number(this.values.seed);
    const stops = this.values.stop.split("\n").filter(Boolean);
    if (stops.length) fields.stop = stops;
    if (this.values.probabilities) Object.assign(fields, { logprobs: true, top_logprobs: TOP_LOGPROBS });
    return fields;
  }

  #numberRow({ name, low, high, step, off }) {
    const value = this.values[name];
    const [range, required] = [{ min: low, max: high }, off !== null];
    const placeholder = required ? "" : say("unlimited");
    const number = make("input", {
      type: "number",
      id: `sampling-${name}`,
      ...range,
      step: "any",
      value: value ?? "",
      required,
      placeholder,
    });
    const slider = make("input", {
      type: "range",
      ...range,
      step,
      value: value ?? high,
      "aria-label": say(`sampling_${name}`),
    });
    slider.addEventListener("input", () => this.#setNumber(name, number, slider.value));
    number.addEventListener("input", () => {
      if (!number.validity.valid) return;
      slider.value = number.value || high;
      this.values[name] = number.value === "" ? null : Number(number.value);
    });
    number.addEventListener("change", () => this.#setNumber(name, number, this.values[name])); // back to what counts
    return make(
      "div",
      { class: "row number-row" },
      make("label", { for: number.id, title: name }, say(`sampling_${name}`)),
      number,
      slider,
    );
  }

  #setNumber(name, number, value) {
    number.value = value ?? "";
    this.values[name] = value === null ? null : Number(value);
  }

  #seedRow() {
    const name = "seed";
    const input = make("input", {
      type: "number",
      id: `sampling-${name}`,
      min: 0,
      step: 1,
      value: this.values.seed,
      placeholder: say("seed_placeholder"),
    });
    input.addEventListener("input", () => {
      if (input.validity.valid) this.values.seed = input.value;
    });
    return make(
      "div",
      { class: "row number-row" },
      make("label", { for: input.id, title: name }, say("sampling_seed")),
      input,
    );
  }

  #textRow(name, properties) {
    const area = make("textarea", { id: `sampling-${name}`, value: this.values[name], ...properties });
    area.addEventListener("input", () => (this.values[name] = area.value));
    return make(
      "div",
      { class: "row" },
      make("label", { for: area.id, title: name }, say(`sampling_${name}`)),
      area,
    );
  }

  #checkRow(name) {
    const box = make("input", {
      type: "checkbox",
      id: `sampling-${name}`,
      checked: this.values[name],
      class: "switch",
    });
    box.addEventListener("change", () => (this.values[name] = box.checked));
    return make(
      "div",
      { class: "row check-row" },
      make("label", { for: box.id }, say(`sampling_${name}`)),
      box,
    );
  }
}

export const makeSampling = () => new Sampling(byId("sampling-form"));
