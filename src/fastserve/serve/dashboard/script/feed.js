// The server's status as it changes: /admin/events while somebody looks, and again after it was lost.

import { ask, readEvents, ServerError } from "./server.js";

const PATIENCE_MS = [500, 1000, 2000, 5000]; // between attempts
const HIDDEN_MS = 15000; // a page in the background is updated for so long, then costs the server nothing

/** Of the key. What others refuse on the way to the server, such as 502, passes. */
const isRefusal = (error) => error instanceof ServerError && [401, 404].includes(error.status);

export class Feed {
  /**
   * @param onStatus called with each status. @param onState called with "lost" or "off".
   * @param onRefused called when the server knows the admin key no more: it is not asked again.
   */
  constructor(onStatus, onState, onRefused) {
    this.onStatus = onStatus;
    this.onState = onState;
    this.onRefused = onRefused;
    this.intervalSeconds = null;
    this.connection = null;
    this.hiding = null;
    document.addEventListener("visibilitychange", () => this.#heedVisibility());
  }

  /** Have a status each so many seconds; null: none any more. */
  follow(intervalSeconds) {
    if (intervalSeconds === this.intervalSeconds) return;
    this.intervalSeconds = intervalSeconds;
    this.#disconnect();
    if (intervalSeconds === null) this.onState("off");
    else if (!document.hidden) this.#connect();
  }

  #heedVisibility() {
    clearTimeout(this.hiding);
    if (document.hidden) this.hiding = setTimeout(() => this.#disconnect(), HIDDEN_MS);
    else if (this.intervalSeconds !== null && this.connection === null) this.#connect();
  }

  #disconnect() {
    this.connection?.abort();
    this.connection = null;
  }

  async #connect() {
    const { signal } = (this.connection = new AbortController());
    const path = `admin/events?interval_seconds=${this.intervalSeconds}`;
    let failures = 0;
    while (!signal.aborted) {
      try {
        for await (const data of readEvents(await ask(path, { signal }))) {
          if (signal.aborted) return;
          failures = 0;
          this.#give(data);
        }
      } catch (error) {
        if (!signal.aborted && isRefusal(error)) {
          this.onRefused();
          return;
        }
        // It is tried again: what it was shows in the state, and in the server's log.
      }
      if (signal.aborted) return;
      this.onState("lost");
      await new Promise((resolve) =>
        setTimeout(resolve, PATIENCE_MS[Math.min(failures, PATIENCE_MS.length - 1)]),
      );
      failures += 1;
    }
  }

  /** A defect of a view is reported, and ends no connection. */
  #give(data) {
    try {
      this.onStatus(JSON.parse(data));
    } catch (error) {
      reportError(error);
    }
  }
}
