// Requests to the server that this page came from: addresses are relative to the page, so that it works behind a
// proxy that puts the server under a path.

import { headersOf } from "./credential.js";

/** What the server refuses, with its error object. */
export class ServerError extends Error {
  constructor(status, error, retryAfterSeconds) {
    super(error?.message ?? `HTTP ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

/** There is no way to the server, or there is none any more. */
export class UnreachableError extends Error {}

/** What the network throws, by its own name; what was given up by the visitor stays as it is. */
function toUnreachable(error) {
  throw error.name === "AbortError" ? error : new UnreachableError(error.message);
}

/**
 * A response that is no refusal. `body` is sent as JSON, by POST unless `method` says otherwise; `requestId` is what
 * the request is called in the server's log, and its sequences in its status.
 * Throws ServerError, UnreachableError, or AbortError.
 */
export async function ask(path, { body, method, signal, requestId } = {}) {
  const headers = headersOf(path.startsWith("admin/") ? "admin" : "api");
  if (requestId) headers["x-request-id"] = requestId;
  if (body !== undefined) headers["content-type"] = "application/json";
  const response = await fetch(path, {
    method: method ?? (body === undefined ? "GET" : "POST"),
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
    signal,
  }).catch(toUnreachable);
  if (response.ok) return response;
  const document = await response.json().catch(() => null);
  const seconds = Number(response.headers.get("retry-after"));
  throw new ServerError(response.status, document?.error, seconds || null);
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/** The data of a response's server-sent events, as they come. Comments are left out. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(toUnreachable);
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
