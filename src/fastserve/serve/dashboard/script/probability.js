// Token probabilities: how sure the model was of each token, and what else it had in mind. By pointer, touch and keyboard.

import { announce, byId, make } from "./dom.js";
import { percent } from "./format.js";
import { say } from "./text.js";

const LEVELS = [0.5, 0.2, 0.05]; // below each, a token is marked more

/** Have an element show a completion's tokens; those that it shows already stay. */
export function showTokens(element, tokens) {
  if (!element.isTokenView) prepare(element);
  const shown = element.children.length;
  if (shown) fill(element.lastElementChild, tokens[shown - 1]); // it may have grown by a byte
  element.append(...tokens.slice(shown).map((token) => fill(make("span", { class: "token" }), token)));
}

function fill(span, token) {
  const level = LEVELS.filter((bound) => token.probability < bound).length;
  span.token = token;
  span.textContent = token.text || "·";
  span.dataset.doubt = level;
  span.classList.toggle("end", Boolean(token.isEnd));
  return span;
}

function prepare(element) {
  element.isTokenView = true;
  element.replaceChildren();
  element.classList.add("tokens");
  element.tabIndex = 0;
  element.setAttribute("role", "group");
  element.setAttribute("aria-label", say("tokens_label"));
  element.addEventListener("pointerover", ({ target }) => target.token && point(element, target));
  element.addEventListener("click", ({ target }) => target.token && point(element, target));
  element.addEventListener("pointerleave", ({ pointerType }) => pointerType === "mouse" && leave(element));
  element.addEventListener("blur", () => leave(element));
  element.addEventListener("keydown", (event) => heedKey(element, event));
}

function heedKey(element, event) {
  const spans = element.children;
  const at = [...spans].indexOf(element.querySelector(".pointed"));
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
  if (event.key === "Escape") leave(element);
  else if (next !== undefined && spans[next]) {
    point(element, spans[next]);
    announce(describe(spans[next].token));
  } else return;
  event.preventDefault();
}

function describe(token) {
  const others = token.top.filter((other) => other.text !== token.text).slice(0, 3);
  const list = others.map((other) => `${shown(other.text)} ${percent(other.probability)}`).join(", ");
  return `${shown(token.text)} ${percent(token.probability)}. ${others.length ? say("instead", { list }) : ""}`;
}

const shown = (text) => text.replaceAll("\n", "↵").replace(/^ /, "␣") || "∅";

function point(element, span) {
  element.querySelector(".pointed")?.classList.remove("pointed");
  span.classList.add("pointed");
  const card = byId("probability-card");
  const { token } = span;
  const rows = token.top.some((other) => other.text === token.text) ? token.top : [token, ...token.top];
  card.replaceChildren(
    make(
      "p",
      { class: "probability-title" },
      make("strong", {}, shown(token.text)),
      " ",
      percent(token.probability),
    ),
    make("ul", {}, ...rows.map((other) => row(other, other.text === token.text))),
  );
  card.hidden = false;
  place(card, span);
}

function row({ text, probability }, isChosen) {
  const bar = make("i");
  bar.style.inlineSize = `${100 * probability}%`;
  return make(
    "li",
    { class: isChosen ? "chosen" : "" },
    make("code", {}, shown(text)),
    make("span", { class: "bar" }, bar),
    make("span", {}, percent(probability)),
  );
}

function place(card, span) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { width, height } = card.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - width - 8);
  const below = box.bottom + 8;
  const top = below + height > innerHeight ? Math.max(8, box.top - height - 8) : below;
  card.style.translate = `${left}px ${top}px`;
}

function leave(element) {
  element.querySelector(".pointed")?.classList.remove("pointed");
  byId("probability-card").hidden = true;
}
