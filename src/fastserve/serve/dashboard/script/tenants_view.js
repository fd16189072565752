// Tenants: what each has had of the service, beside what its weight entitles it to.

import { colorOfTenant } from "./color.js";
import { byId, keyed, make, setText } from "./dom.js";
import { count, duration, measure, percent } from "./format.js";
import { attempt } from "./notice.js";
import { ask, askJson } from "./server.js";
import { makeTable } from "./table.js";
import { say } from "./text.js";

const RECENT_SECONDS = 60; // that shares are taken over

const COLUMNS = [
  { key: "tenant", read: (tenant) => tenant.name || say("no_tenant") },
  { key: "weight", read: (tenant) => measure(tenant.weight) },
  { key: "running_now", read: (tenant) => count(tenant.num_running) },
  { key: "requests", read: (tenant) => count(tenant.requests) },
  { key: "refused", read: (tenant) => count(tenant.refused) },
  { key: "prompt_tokens", read: (tenant) => count(tenant.prompt_tokens) },
  { key: "completion_tokens", read: (tenant) => count(tenant.completion_tokens) },
  { key: "service", read: (tenant) => duration(tenant.service_seconds) },
  {
    key: "joules",
    read: (tenant) => measure(tenant.joules),
    isShown: (tenants) => tenants.some(({ joules }) => joules !== null),
  },
];

export class TenantsView {
  constructor() {
    this.past = []; // service by tenant, a status a second
    byId("reload-tenants").addEventListener("click", () => this.#reload());
    byId("download-usage").addEventListener("click", () => attempt(downloadUsage));
  }

  draw() {
    byId("tenant-shares").replaceChildren(
      make("h2", {}, say("shares")),
      make("p", { class: "hint" }, say("shares_about")),
      make("ul", { class: "shares" }),
    );
    if (this.status) this.update(this.status);
  }

  update(status) {
    this.status = status;
    this.#remember(status);
    if (byId("tenants").hidden) return;
    keyed(
      byId("tenant-shares").lastChild,
      this.#shares(status),
      (share) => share.name,
      makeShare,
      updateShare,
    );
    this.#fillTable(status.tenants);
  }

  #remember({ time, tenants }) {
    if (this.past.length && time < this.past.at(-1).time + 1) return;
    this.past.push({
      time,
      service: new Map(tenants.map((tenant) => [tenant.name, tenant.service_seconds])),
    });
    while (this.past[0].time < time - RECENT_SECONDS) this.past.shift();
  }

  /** Of the last minute. What a weight entitles to is among those that had any. */
  #shares({ tenants }) {
    const { service } = this.past[0];
    const recent = tenants.map((tenant) => ({
      ...tenant,
      seconds: Math.max(0, tenant.service_seconds - (service.get(tenant.name) ?? 0)),
    }));
    const sum = recent.reduce((all, { seconds }) => all + seconds, 0);
    const weights = recent.reduce((all, { seconds, weight }) => all + (seconds > 0 ? weight : 0), 0);
    return recent.map(({ name, seconds, weight }) => ({
      name,
      share: sum ? seconds / sum : 0,
      entitled: weights && seconds > 0 ? weight / weights : 0,
    }));
  }

  #fillTable(tenants) {
    const columns = COLUMNS.filter(({ isShown }) => !isShown || isShown(tenants));
    byId("tenant-table").replaceChildren(makeTable(columns, tenants));
  }

  async #reload() {
    await attempt(() => askJson("admin/tenants/reload", { method: "POST" }), say("keys_reloaded"));
  }
}

function makeShare({ name }) {
  const item = make(
    "li",
    {},
    make("span", { class: "share-name" }, name || say("no_tenant")),
    make("span", { class: "share-bar" }, make("i"), make("b")),
    make("span", { class: "share-text" }),
  );
  item.style.setProperty("--color", `var(${colorOfTenant(name)})`);
  return item;
}

function updateShare(item, { share, entitled }) {
  const [, bar, text] = item.children;
  bar.firstChild.style.inlineSize = `${100 * share}%`;
  bar.lastChild.hidden = !entitled;
  bar.lastChild.style.insetInlineStart = `${100 * entitled}%`;
  setText(
    text,
    entitled ? say("share_of", { share: percent(share), entitled: percent(entitled) }) : percent(share),
  );
}

async function downloadUsage() {
  const response = await ask("admin/usage.csv");
  const link = make("a", { href: URL.createObjectURL(await response.blob()), download: "usage.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}
