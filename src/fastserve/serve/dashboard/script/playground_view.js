// The chat playground: a conversation with a model that is served, streamed, stopped, and looked at token by token.

import { headersOf } from "./credential.js";
import { announce, byId, icon, make } from "./dom.js";
import { Completion } from "./completion.js";
import { count, duration, measure } from "./format.js";
import { renderMarkdown } from "./markdown.js";
import { explain, notify } from "./notice.js";
import { showTokens } from "./probability.js";
import { makeSampling } from "./sampling.js";
import { ask, askJson, readEvents } from "./server.js";
import { say, term } from "./text.js";

const SUGGESTIONS = ["suggestion_1", "suggestion_2", "suggestion_3"];
const NEAR_END_PX = 80; // who has scrolled up further than this reads, and is left there

export class PlaygroundView {
  constructor() {
    this.turns = []; // { role, content } or, of the model, { role, completion, request }
    this.models = [];
    this.running = null; // the AbortController of the answer that comes
    this.sampling = makeSampling();
    this.#listen();
  }

  /** Draw all again, in the page's language. */
  draw() {
    this.sampling.draw();
    this.#drawModels();
    byId("conversation").replaceChildren();
    if (!this.turns.length) this.#drawEmpty();
    for (const turn of this.turns) this.#drawTurn(turn);
  }

  /** Ask which models there are. */
  async load() {
    try {
      const { data } = await askJson("v1/models");
      this.models = data.filter((model) => model.task === "generate");
      this.trouble = null;
    } catch (error) {
      this.models = [];
      this.trouble = explain(error);
      this.needsKey = error.status === 401;
    }
    this.#drawModels();
    if (!this.turns.length) this.#drawEmpty();
  }

  show() {
    if (matchMedia("(hover: hover)").matches) byId("message").focus();
  }

  #listen() {
    const message = byId("message");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(message.value);
    });
    message.addEventListener("input", fitMessage);
    message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send(message.value);
    });
    byId("playground").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running) this.#stop();
    });
    byId("stop").addEventListener("click", () => this.#stop());
    byId("new-conversation").addEventListener("click", () => {
      this.#stop();
      this.turns = [];
      this.draw();
      message.focus();
    });
    byId("model").addEventListener("change", () => this.#limitTokens());
    byId("reset-sampling").addEventListener("click", () => this.sampling.reset());
    for (const id of ["show-sampling", "close-sampling"])
      byId(id).addEventListener("click", () => this.#toggleSampling());
  }

  #toggleSampling() {
    const isOpen = byId("playground").classList.toggle("with-sampling");
    byId("show-sampling").setAttribute("aria-expanded", isOpen);
    byId(isOpen ? "sampling-system" : "show-sampling").focus();
  }

  #drawModels() {
    const select = byId("model");
    const chosen = select.value;
    select.replaceChildren(...this.models.map(({ id }) => make("option", { value: id }, id)));
    if (this.models.some(({ id }) => id === chosen)) select.value = chosen;
    select.disabled = byId("send").disabled = !this.models.length;
    this.#limitTokens();
  }

  #limitTokens() {
    const model = this.models.find(({ id }) => id === byId("model").value);
    if (model?.context_length) this.sampling.limit(model.context_length);
  }

  #drawEmpty() {
    const suggestions = SUGGESTIONS.map((key) =>
      make("button", { type: "button", onclick: () => this.#send(say(key)) }, say(key)),
    );
    const openKeys = make(
      "button",
      { type: "button", class: "primary", onclick: () => byId("open-keys").click() },
      icon("key"),
      say("enter_key"),
    );
    byId("conversation").replaceChildren(
      make(
        "div",
        { class: "empty" },
        make("img", { src: "dashboard/icon.svg", alt: "", width: 56, height: 56 }),
        make("p", { class: "empty-title" }, say(this.trouble ? "no_models" : "say_something")),
        this.trouble ? make("p", { class: "trouble" }, this.trouble) : null,
        this.trouble
          ? this.needsKey
            ? openKeys
            : null
          : make("div", { class: "suggestions" }, ...suggestions),
      ),
    );
  }

  async #send(text) {
    if (!text.trim() || this.running || !this.models.length) return;
    byId("message").value = "";
    fitMessage();
    if (!this.turns.length) byId("conversation").replaceChildren();
    this.turns.push({ role: "user", content: text });
    this.#drawTurn(this.turns.at(-1));
    await this.#answer();
  }

  async #answer() {
    const turn = { role: "assistant", completion: new Completion(), request: this.#request() };
    const { completion, request } = turn;
    this.turns.push(turn);
    this.#drawTurn(turn);
    scrollToEnd();
    this.running = new AbortController();
    this.#showRunning();
    try {
      const response = await ask("v1/chat/completions", { body: request, signal: this.running.signal });
      for await (const data of readEvents(response)) {
        if (data === "[DONE]") break;
        completion.feed(JSON.parse(data));
        this.#drawSoon(turn);
      }
      if (completion.finishReason === null) completion.error = say("cut_short");
    } catch (error) {
      if (error.name === "AbortError") completion.finishReason = "stopped";
      else completion.error = explain(error);
    }
    this.running = null;
    this.#showRunning();
    this.#redraw(turn);
    announce(completion.error ?? say("answer_complete", { tokens: count(completion.numTokens) }));
  }

  #request() {
    const { system } = this.sampling.values;
    const messages = this.turns
      .map(({ role, content, completion }) => ({ role, content: content ?? completion.text }))
      .filter(({ content }) => content);
    if (system.trim()) messages.unshift({ role: "system", content: system });
    return {
      model: byId("model").value,
      messages,
      stream: true,
      stream_options: { include_usage: true },
      ...this.sampling.fields(),
    };
  }

  #stop() {
    this.running?.abort();
  }

  #showRunning() {
    const isRunning = this.running !== null;
    const hadFocus = document.activeElement === byId("stop");
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    byId("conversation").setAttribute("aria-busy", isRunning);
    if (hadFocus) byId("message").focus();
  }

  /** At most once a frame, however fast tokens come. */
  #drawSoon(turn) {
    if (turn.isWaiting) return;
    turn.isWaiting = true;
    requestAnimationFrame(() => {
      turn.isWaiting = false;
      this.#redraw(turn);
    });
  }

  #drawTurn(turn) {
    const label = make("p", { class: "unseen" }, say(turn.role === "user" ? "you" : "the_model"));
    if (turn.role === "user") {
      turn.element = make("article", { class: "turn user" }, label, make("p", {}, turn.content));
    } else {
      turn.body = make("div", { class: "answer" });
      turn.footer = make("footer", { class: "turn-footer" });
      turn.element = make("article", { class: "turn assistant" }, label, turn.body, turn.footer);
    }
    byId("conversation").append(turn.element);
    if (turn.completion) this.#redraw(turn);
  }

  #redraw(turn) {
    const { completion, body } = turn;
    const isAtEnd = isNearEnd();
    const isRunning = this.running !== null && turn === this.turns.at(-1);
    turn.element.classList.toggle("running", isRunning);
    turn.showsTokens ??= Boolean(turn.request.logprobs);
    if (turn.showsTokens) showTokens(body, completion.tokens);
    else body.replaceChildren(...renderMarkdown(completion.text));
    if (!isRunning) this.#drawFooter(turn);
    if (isAtEnd) scrollToEnd();
  }

  #drawFooter(turn) {
    const { completion } = turn;
    const facts = [
      completion.numTokens && say("tokens_count", { count: count(completion.numTokens) }),
      completion.firstSeconds && say("first_after", { time: duration(completion.firstSeconds) }),
      completion.tokensPerSecond && say("tokens_per_second", { rate: measure(completion.tokensPerSecond) }),
      completion.finishReason && term("finish", completion.finishReason),
    ];
    const button = (name, label, onclick, properties = {}) =>
      make(
        "button",
        { type: "button", class: "quiet", title: label, "aria-label": label, onclick, ...properties },
        icon(name),
      );
    turn.footer.replaceChildren(
      ...(completion.error
        ? [make("p", { class: "trouble", role: "alert" }, icon("alert"), completion.error)]
        : []),
      make("span", { class: "turn-facts" }, facts.filter(Boolean).join(" · ")),
      button("copy", say("copy"), () => copy(completion.text)),
      completion.tokens.length
        ? button("chart", say("sampling_probabilities"), () => this.#switchTokens(turn), {
            "aria-pressed": String(turn.showsTokens),
          })
        : "",
      make(
        "button",
        { type: "button", class: "quiet", onclick: () => copy(asCurl(turn.request)) },
        say("copy_curl"),
      ),
      button("retry", say("again"), () => this.#again(), { class: "quiet again" }),
    );
  }

  #switchTokens(turn) {
    turn.showsTokens = !turn.showsTokens;
    const body = make("div", { class: "answer" });
    turn.body.replaceWith(body);
    turn.body = body;
    this.#redraw(turn);
    turn.footer.querySelector("[aria-pressed]").focus();
  }

  #again() {
    if (this.running) return;
    this.turns.pop().element.remove();
    this.#answer();
  }
}

function fitMessage() {
  const message = byId("message");
  message.style.blockSize = "auto";
  message.style.blockSize = `${Math.min(message.scrollHeight, innerHeight / 3)}px`;
}

function isNearEnd() {
  const { scrollTop, scrollHeight, clientHeight } = byId("conversation");
  return scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
}

function scrollToEnd() {
  const conversation = byId("conversation");
  conversation.scrollTop = conversation.scrollHeight;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    notify(say("copied"));
  } catch {
    notify(say("not_copied"), "trouble"); // browsers allow it on HTTPS and localhost alone
  }
}

/** The request as a command; a key is named, not written. */
function asCurl(request) {
  const address = new URL("v1/chat/completions", document.baseURI).href;
  const key = headersOf("api").authorization ? ` -H "authorization: Bearer $FASTSERVE_API_KEY"` : "";
  const body = JSON.stringify(request, null, 2).replaceAll("'", `'\\''`);
  return `curl -N ${address} -H 'content-type: application/json'${key} -d '${body}'`;
}
