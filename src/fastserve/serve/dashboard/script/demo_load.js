// Sends the server a mix of short and long requests of three tenants, to watch how they are scheduled. They are
// responses in the background, so that a browser's few connections do not limit them; what is left is deleted.

import { notify, explain } from "./notice.js";
import { ask, askJson } from "./server.js";
import { say } from "./text.js";

const KINDS = [
  { user: "chat", num: 10, tokens: [16, 48] },
  { user: "search", num: 6, tokens: [24, 64] },
  { user: "report", num: 5, tokens: [160, 320] },
];
const LONG_PROMPT_WORDS = 120; // of reports
const REFILL_MS = 1500;

export class DemoLoad {
  /** @param getModel the model that is asked where the engine's is unknown. @param onChange called when it starts or ends. */
  constructor(getModel, onChange) {
    this.getModel = getModel;
    this.onChange = onChange;
    this.isRunning = false;
    this.ids = new Map(); // of responses under way, by their kind
  }

  toggle(model) {
    if (this.isRunning) this.stop();
    else this.#run(model ?? this.getModel());
  }

  async #run(model) {
    this.isRunning = true;
    this.onChange();
    try {
      while (this.isRunning) {
        for (const kind of KINDS) await this.#refill(kind, model);
        await new Promise((resolve) => setTimeout(resolve, REFILL_MS));
      }
    } catch (error) {
      notify(explain(error), "trouble");
      this.isRunning = false;
    }
    this.onChange();
    await this.#clear();
  }

  stop() {
    this.isRunning = false;
    this.onChange();
  }

  /** As many of a kind as there are to be; those that have ended are forgotten. */
  async #refill(kind, model) {
    const ids = this.ids.get(kind.user) ?? [];
    const going = [];
    for (const id of ids) {
      const { status } = await askJson(`v1/responses/${id}`);
      if (status === "in_progress") going.push(id);
      else await forget(id);
    }
    this.ids.set(kind.user, going);
    while (this.isRunning && going.length < kind.num) {
      const { id } = await askJson("v1/responses", { body: requestOf(kind, model) });
      going.push(id);
    }
  }

  async #clear() {
    const ids = [...this.ids.values()].flat();
    this.ids.clear();
    for (const id of ids) {
      await askJson(`v1/responses/${id}/cancel`, { method: "POST" }).catch(() => {});
      await forget(id);
    }
  }
}

function requestOf({ user, tokens: [least, most] }, model) {
  const words = user === "report" ? LONG_PROMPT_WORDS : 8;
  const topic = Array.from({ length: words }, () => say("demo_words").split(" ")[Math.floor(Math.random() * 12)]);
  return {
    model, user, background: true,
    input: `${say("demo_prompt")} ${topic.join(" ")}`,
    max_output_tokens: least + Math.floor(Math.random() * (most - least)),
    ignore_eos: true,
  };
}

const forget = (id) => ask(`v1/responses/${id}`, { method: "DELETE" }).catch(() => {});
