// The page's words in the visitor's language: `text/en.json` and `text/zh.json` have the same keys.

const LANGUAGES = { en: "English", zh: "中文" };
let words = {};

export const language = () => document.documentElement.lang;

export const otherLanguage = () => (language() === "en" ? "zh" : "en");

export const nameOf = (code) => LANGUAGES[code];

/** Load a language, and write it wherever the page says what belongs there. */
export async function useLanguage(code) {
  const response = await fetch(`dashboard/text/${code}.json`);
  words = await response.json();
  document.documentElement.lang = code;
  for (const element of document.querySelectorAll("[data-text]"))
    element.textContent = say(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", say(element.dataset.label));
    if (element.matches("button")) element.title = say(element.dataset.label);
  }
  for (const element of document.querySelectorAll("[data-placeholder]"))
    element.placeholder = say(element.dataset.placeholder);
}

export function rememberLanguage(code) {
  localStorage.setItem("fastserve.language", code);
}

/**
 * The text of a key, with its {names} filled in.
 *   say("ago", { time: "3 s" })
 */
export function say(key, values = {}) {
  const text = words[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** What the server calls something, in the visitor's language where we know it: `term("state", "running")`. */
export function term(kind, name, usual = name) {
  return words[`${kind}.${name}`] ?? usual;
}
