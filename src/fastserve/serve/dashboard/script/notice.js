// Short messages at the edge of the page, and what went wrong in words.

import { byId, icon, make } from "./dom.js";
import { duration } from "./format.js";
import { ServerError, UnreachableError } from "./server.js";
import { say } from "./text.js";

const SHOWN_MS = 7000;

export function notify(text, kind = "done") {
  const notice = make(
    "div",
    { class: `notice ${kind}` },
    icon(kind === "trouble" ? "alert" : "chart"),
    make("span", {}, text),
  );
  notice.append(
    make(
      "button",
      { type: "button", class: "quiet", "aria-label": say("close"), onclick: () => notice.remove() },
      icon("close"),
    ),
  );
  byId("notices").append(notice);
  setTimeout(() => notice.remove(), SHOWN_MS);
}

/** An error in words: the server's own, or that it cannot be reached. What is a defect of the page is reported too. */
export function explain(error) {
  if (!(error instanceof ServerError || error instanceof UnreachableError)) reportError(error);
  if (error instanceof UnreachableError) return say("unreachable");
  if (error.status === 401) return `${error.message}. ${say("needs_api_key")}`;
  if (error.retryAfterSeconds)
    return `${error.message} (${say("retry_after", { time: duration(error.retryAfterSeconds) })})`;
  return error.message;
}

/** Do something, and say what went wrong with it, if anything. Whether it went well. */
export async function attempt(action, success) {
  try {
    await action();
  } catch (error) {
    notify(explain(error), "trouble");
    return false;
  }
  if (success) notify(success);
  return true;
}
