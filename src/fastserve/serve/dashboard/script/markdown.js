// The part of Markdown that models write, as elements: headings, lists, quotes, code, tables, emphasis, links.
// What it does not know stays as it was written.

import { make } from "./dom.js";

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^>\s?(.*)$/;
const RULE = /^\s*([-*_])\s*(?:\1\s*){2,}$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;
const INLINE =
  /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(\S(?:[\s\S]*?\S)?)\*\*|\*(\S(?:[^*]*?\S)?)\*|(?<!\w)_(\S(?:[^_]*?\S)?)_(?!\w)|~~(\S(?:[\s\S]*?\S)?)~~|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/;

/** A text as blocks. */
export function renderMarkdown(text) {
  return blocksOf(text.split("\n"), 0);
}

function blocksOf(lines, depth) {
  const blocks = [];
  let index = 0;
  const takeWhile = (test) => {
    const taken = [];
    while (index < lines.length && test(lines[index])) taken.push(lines[index++]);
    return taken;
  };
  while (index < lines.length) {
    const line = lines[index];
    const fence = line.match(FENCE);
    const heading = line.match(HEADING);
    if (line.trim() === "") {
      index += 1;
    } else if (fence) {
      index += 1;
      const code = takeWhile((other) => !other.trim().startsWith(fence[1]));
      index += 1; // the closing fence, or the end of what has come so far
      blocks.push(
        make("pre", { tabIndex: 0, data: { language: fence[2] } }, make("code", {}, code.join("\n"))),
      );
    } else if (heading) {
      index += 1;
      blocks.push(make("p", { class: `heading heading-${heading[1].length}` }, ...inlineOf(heading[2])));
    } else if (RULE.test(line)) {
      index += 1;
      blocks.push(make("hr"));
    } else if (QUOTE.test(line) && depth < 8) {
      const quoted = takeWhile((other) => QUOTE.test(other)).map((other) => other.match(QUOTE)[1]);
      blocks.push(make("blockquote", {}, ...blocksOf(quoted, depth + 1)));
    } else if (ITEM.test(line) && depth < 8) {
      blocks.push(
        listOf(
          takeWhile((other) => ITEM.test(other) || /^\s+\S/.test(other)),
          depth,
        ),
      );
    } else if (line.includes("|") && TABLE_RULE.test(lines[index + 1] ?? "")) {
      blocks.push(tableOf(takeWhile((other) => other.includes("|"))));
    } else {
      const isText = (other) =>
        other.trim() && ![FENCE, HEADING, ITEM, QUOTE].some((pattern) => pattern.test(other));
      const paragraph = takeWhile(isText);
      if (!paragraph.length) paragraph.push(lines[index++]); // nested deeper than we follow
      blocks.push(make("p", {}, ...inlineOf(paragraph.join("\n"))));
    }
  }
  return blocks;
}

function listOf(lines, depth) {
  const [, indent, , number] = lines[0].match(ITEM);
  const list = make(
    number === undefined ? "ul" : "ol",
    Number(number ?? 1) === 1 ? {} : { start: Number(number) },
  );
  let item = [];
  const close = () => item.length && list.append(make("li", {}, ...itemOf(item, depth)));
  for (const line of lines) {
    const match = line.match(ITEM);
    if (match && match[1].length <= indent.length) {
      close();
      item = [match[4]];
    } else {
      item.push(line.slice(Math.min(indent.length + 2, line.length - line.trimStart().length)));
    }
  }
  close();
  return list;
}

function itemOf(lines, depth) {
  const rest = lines.slice(1);
  return rest.some((line) => line.trim())
    ? [...inlineOf(lines[0]), ...blocksOf(rest, depth + 1)]
    : inlineOf(lines[0]);
}

function tableOf(lines) {
  const cellsOf = (line) =>
    line
      .trim()
      .replace(/^\||\|$/g, "")
      .split("|")
      .map((cell) => cell.trim());
  const head = make(
    "tr",
    {},
    ...cellsOf(lines[0]).map((cell) => make("th", { scope: "col" }, ...inlineOf(cell))),
  );
  const rows = lines
    .slice(2)
    .map((line) => make("tr", {}, ...cellsOf(line).map((cell) => make("td", {}, ...inlineOf(cell)))));
  return make(
    "div",
    { class: "table-scroll", tabIndex: 0 },
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
  );
}

function inlineOf(text) {
  const nodes = [];
  let rest = text;
  for (let match = rest.match(INLINE); match; match = rest.match(INLINE)) {
    if (match.index) nodes.push(rest.slice(0, match.index));
    nodes.push(spanOf(match));
    rest = rest.slice(match.index + match[0].length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function spanOf([, , code, strong, star, underscore, struck, label, address]) {
  if (code !== undefined) return make("code", {}, code.trim() || code);
  if (strong !== undefined) return make("strong", {}, ...inlineOf(strong));
  if (struck !== undefined) return make("s", {}, ...inlineOf(struck));
  if (label !== undefined)
    return make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, label);
  return make("em", {}, ...inlineOf(star ?? underscore));
}
