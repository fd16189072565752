// The keys that the visitor has typed. They stay in this tab's session storage, and go to this server alone.

const NAMES = { api: "fastserve.api-key", admin: "fastserve.admin-key" };

export const keyOf = (kind) => sessionStorage.getItem(NAMES[kind]) ?? "";

export function keepKey(kind, key) {
  if (key) sessionStorage.setItem(NAMES[kind], key);
  else sessionStorage.removeItem(NAMES[kind]);
}

/** Headers of a request to the API, or to /admin. */
export function headersOf(kind) {
  const key = keyOf(kind);
  return key ? { authorization: `Bearer ${key}` } : {};
}
