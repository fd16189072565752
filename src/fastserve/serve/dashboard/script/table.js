// Tables of what else is drawn: for who reads rather than looks.

import { make } from "./dom.js";
import { say } from "./text.js";

/** A row for each item; the first of its cells names it. Columns have the `key` of a text, and what they `read`. */
export function makeTable(columns, items) {
  const head = columns.map(({ key }) => make("th", { scope: "col" }, say(key)));
  return make(
    "table",
    {},
    make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...items.map((item) => makeRow(columns, item))),
  );
}

function makeRow([first, ...others], item) {
  const cells = others.map(({ read }) => make("td", {}, read(item)));
  return make("tr", {}, make("th", { scope: "row" }, first.read(item)), ...cells);
}
