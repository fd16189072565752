// Numbers as people read them, in the page's language.

import { language, say } from "./text.js";

const formats = new Map();

function formatOf(options) {
  const key = language() + JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(language(), options));
  return formats.get(key);
}

/** 1,234; 12.3K where it is long. */
export function count(number) {
  if (number === null || number === undefined) return "–";
  const long = Math.abs(number) >= 1e5;
  return formatOf(
    long ? { notation: "compact", maximumSignificantDigits: 3 } : { maximumFractionDigits: 0 },
  ).format(number);
}

/** 1.23K: where there is little room. */
export function short(number) {
  return formatOf({ notation: "compact", maximumSignificantDigits: 3 }).format(number);
}

/** Three digits that matter: 0.123, 1.23, 12.3, 123. */
export function measure(number) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "–";
  if (Math.abs(number) >= 1e5) return count(number);
  return formatOf(
    Math.abs(number) >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 },
  ).format(number);
}

export function percent(share) {
  if (share === null || share === undefined || !Number.isFinite(share)) return "–";
  if (share > 0 && share < 0.001) return `<${percent(0.001)}`;
  return formatOf({ style: "percent", maximumFractionDigits: share > 0 && share < 0.1 ? 1 : 0 }).format(
    share,
  );
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(number) {
  if (number === null || number === undefined) return "–";
  const power = Math.min(UNITS.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(1, number)) / 10)));
  return `${measure(number / 1024 ** power)} ${UNITS[power]}`;
}

/** 85 ms, 3.2 s, 4 min, 2 h, 3 d. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 1) return `${measure(seconds * 1000)} ${say("unit_ms")}`;
  if (seconds < 60) return `${measure(seconds)} ${say("unit_s")}`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} ${say("unit_min")}`;
  if (seconds < 86400) return `${measure(Math.floor(seconds / 360) / 10)} ${say("unit_h")}`;
  return `${measure(Math.floor(seconds / 8640) / 10)} ${say("unit_d")}`;
}
