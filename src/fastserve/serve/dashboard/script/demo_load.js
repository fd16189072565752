// Sends the server a mix of short and long requests of three tenants, to watch how they are scheduled. They are
// responses in the background, so that a browser's few connections do not limit them. What has ended shows in the
// status, where sequences are named by their requests; it is deleted.

import { explain, notify } from "./notice.js";
import { ask, askJson } from "./server.js";
import { say } from "./text.js";

const KINDS = [
  { user: "chat", num: 10, tokens: [16, 48], words: 8 },
  { user: "search", num: 6, tokens: [24, 64], words: 20 },
  { user: "report", num: 5, tokens: [160, 320], words: 100 },
];
const SETTLING_SECONDS = 1; // until a request that was taken in shows in the status

export class DemoLoad {
  /** @param onChange called when it starts or ends. */
  constructor(onChange) {
    this.onChange = onChange;
    this.model = null; // that is asked; null: none is
    this.underWay = new Map(); // { kind, id, sentAt } by the request's name
    this.isSending = false;
    this.numSent = 0;
  }

  get isRunning() {
    return this.model !== null;
  }

  toggle(model) {
    if (this.isRunning) this.#stop();
    else {
      this.model = model;
      this.onChange();
    }
  }

  /** Let a new status make room for new requests. */
  async heed(status) {
    if (!this.isRunning || this.isSending) return;
    this.isSending = true;
    try {
      await this.#forgetEnded(status);
      for (const kind of KINDS) await this.#refill(kind, status.time);
    } catch (error) {
      notify(explain(error), "trouble");
      this.#stop();
    }
    this.isSending = false;
    if (!this.isRunning) await this.#clear(); // what was sent while it was stopped
  }

  #stop() {
    this.model = null;
    this.onChange();
    if (!this.isSending) this.#clear();
  }

  async #forgetEnded({ time, engines }) {
    const alive = new Set(
      engines.flatMap(({ sequences }) => sequences.map((sequence) => sequence.request_id)),
    );
    for (const [name, { id, sentAt }] of this.underWay) {
      if (alive.has(name) || time < sentAt + SETTLING_SECONDS) continue;
      this.underWay.delete(name);
      await remove(id);
    }
  }

  async #refill(kind, time) {
    let going = [...this.underWay.values()].filter((request) => request.kind === kind).length;
    for (; this.isRunning && going < kind.num; going += 1) {
      const name = `demo-${kind.user}-${(this.numSent += 1)}-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
      const { id } = await askJson("v1/responses", { body: bodyOf(kind, this.model), requestId: name });
      this.underWay.set(name, { kind, id, sentAt: time });
    }
  }

  async #clear() {
    const requests = [...this.underWay.values()];
    this.underWay.clear();
    for (const { id } of requests) {
      await askJson(`v1/responses/${id}/cancel`, { method: "POST" }).catch(() => {}); // it may have ended
      await remove(id);
    }
  }
}

function bodyOf({ user, tokens: [least, most], words }, model) {
  const known = say("demo_words").split(" ");
  const topic = Array.from({ length: words }, () => known[Math.floor(Math.random() * known.length)]);
  return {
    model,
    user,
    background: true,
    input: `${say("demo_prompt")} ${topic.join(" ")}`,
    max_output_tokens: least + Math.floor(Math.random() * (most - least)),
    ignore_eos: true,
  };
}

const remove = (id) => ask(`v1/responses/${id}`, { method: "DELETE" }).catch(() => {}); // the server forgets it some day
