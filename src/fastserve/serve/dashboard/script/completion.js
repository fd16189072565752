// A completion as it comes: its text, and its tokens with their probabilities where they were asked for.

import { ServerError } from "./server.js";

/** One token, or several that make a character only together. */
class Token {
  constructor(text, logprob, top) {
    this.text = text;
    this.probability = Math.exp(logprob);
    this.top = top.map(({ token, logprob: other }) => ({ text: token, probability: Math.exp(other) }));
  }
}

export class Completion {
  constructor() {
    this.text = "";
    this.tokens = [];
    this.finishReason = null; // "stopped" where the visitor has ended it
    this.usage = null;
    this.error = null;
    this.sentAt = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.decoder = new TextDecoder();
    this.isPartial = false; // the last token ends within a character
  }

  /** Take in an event of a chat's stream. */
  feed(event) {
    if (event.error) throw new ServerError(null, event.error, null);
    if (event.usage) this.usage = event.usage;
    const choice = event.choices[0];
    if (choice === undefined) return;
    const content = choice.delta.content ?? "";
    if (content || choice.logprobs?.content.length) {
      this.lastAt = performance.now();
      this.firstAt ??= this.lastAt;
    }
    this.text += content;
    for (const entry of choice.logprobs?.content ?? []) this.#addToken(entry);
    if (choice.finish_reason) this.#finish(choice.finish_reason);
  }

  /** The token that has ended the text is not in it. */
  #finish(reason) {
    this.finishReason = reason;
    const last = this.tokens.at(-1);
    if (last && reason === "stop" && !this.text.endsWith(last.text)) last.isEnd = true;
  }

  #addToken({ token, logprob, bytes, top_logprobs: top }) {
    const text = bytes ? this.decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
    if (this.isPartial) {
      const last = this.tokens.at(-1);
      last.text += text;
      last.probability *= Math.exp(logprob);
    } else {
      this.tokens.push(new Token(text, logprob, top));
    }
    // Of an incomplete character the decoder has written nothing yet.
    this.isPartial = Boolean(bytes?.length) && text === "";
  }

  get firstSeconds() {
    return this.firstAt === null ? null : (this.firstAt - this.sentAt) / 1000;
  }

  get numTokens() {
    return this.usage?.completion_tokens ?? (this.tokens.length || null);
  }

  /** After the first token. */
  get tokensPerSecond() {
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return this.numTokens > 1 && seconds > 0 ? (this.numTokens - 1) / seconds : null;
  }
}
