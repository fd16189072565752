// Puts the page together: views, navigation, theme, language, keys, and the feed that the views live on.

import { ChartsView } from "./charts_view.js";
import { forgetColors } from "./color.js";
import { keyOf } from "./credential.js";
import { byId, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { duration } from "./format.js";
import { History } from "./history.js";
import { KeyDialog, tryAdminKey } from "./key_dialog.js";
import { ModelsView } from "./models_view.js";
import { notify } from "./notice.js";
import { PlaygroundView } from "./playground_view.js";
import { SchedulerView } from "./scheduler_view.js";
import { TenantsView } from "./tenants_view.js";
import { language, nameOf, otherLanguage, rememberLanguage, say, useLanguage } from "./text.js";

const HOME = "playground";
const INTERVALS_SECONDS = { playground: 2, scheduler: 0.5, charts: 1, models: 1, tenants: 1 };
const THEMES = { system: "screen", light: "sun", dark: "moon" };

const history = new History();
const playground = new PlaygroundView();
const views = {
  playground,
  scheduler: new SchedulerView(),
  charts: new ChartsView(history),
  models: new ModelsView(),
  tenants: new TenantsView(),
};
let isAdmin = false;
let status = null;
const feed = new Feed(takeStatus, showFeed, loseAdminKey);
new KeyDialog((hasAdminKey) => {
  allowAdmin(hasAdminKey);
  playground.load();
});

function takeStatus(next) {
  status = next;
  history.add(next);
  for (const view of Object.values(views)) view.update?.(next);
  showFeed("live");
}

function showFeed(state) {
  const element = byId("server-state");
  const shown = state === "live" && status?.is_draining ? "draining" : state;
  element.dataset.state = shown;
  const uptime = shown === "live" && status ? ` · ${duration(Math.floor(status.uptime_seconds))}` : "";
  setText(element, say(`server_${shown}`, { count: status?.num_requests }) + uptime);
  element.title = status ? `FastServe ${status.version}` : "";
}

function allowAdmin(isAllowed) {
  isAdmin = isAllowed;
  document.body.classList.toggle("is-admin", isAdmin);
  navigate();
}

/** Another admin key has taken the place of the visitor's, or the server was started anew without one. */
function loseAdminKey() {
  allowAdmin(false);
  notify(say("admin_key_refused"), "trouble");
}

function navigate() {
  const wanted = location.hash.slice(1);
  if (wanted === "main") return;
  const name = wanted in views && (isAdmin || wanted === HOME) ? wanted : HOME;
  for (const section of document.querySelectorAll(".view")) section.hidden = section.id !== name;
  for (const link of document.querySelectorAll(".views a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${say(name)} · FastServe`;
  document.body.dataset.view = name;
  feed.follow(isAdmin ? INTERVALS_SECONDS[name] : null);
  if (status) views[name].update?.(status);
  views[name].show?.();
}

async function changeLanguage(code) {
  await useLanguage(code);
  byId("switch-language").lastElementChild.textContent = nameOf(otherLanguage());
  byId("switch-language").lang = otherLanguage();
  byId("switch-language").setAttribute("aria-label", nameOf(otherLanguage()));
  writeTheme();
  for (const view of Object.values(views)) view.draw();
  showFeed(byId("server-state").dataset.state ?? "off");
}

function changeTheme() {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(themeName()) + 1) % names.length];
  localStorage.setItem("fastserve.theme", next);
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  repaint();
  writeTheme();
}

const themeName = () => document.documentElement.dataset.theme ?? "system";

function writeTheme() {
  const button = byId("switch-theme");
  button.querySelector("use").setAttribute("href", `#icon-${THEMES[themeName()]}`);
  button.lastElementChild.textContent = say(`theme_${themeName()}`);
  button.title = say("theme");
  button.setAttribute("aria-label", `${say("theme")}: ${say(`theme_${themeName()}`)}`);
}

/** Canvases do not follow the theme by themselves. */
function repaint() {
  forgetColors();
  if (status) for (const view of Object.values(views)) view.update?.(status);
}

byId("switch-theme").addEventListener("click", changeTheme);
byId("switch-language").addEventListener("click", async () => {
  await changeLanguage(otherLanguage());
  rememberLanguage(language());
  navigate();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
document.querySelector(".skip-link").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
addEventListener("hashchange", () => {
  navigate();
  if (document.body.dataset.view !== HOME)
    document.querySelector(".view:not([hidden]) h1").focus({ preventScroll: true });
});

await changeLanguage(language());
document.querySelector(".shell").hidden = false;
navigate();
const [trouble] = await Promise.all([keyOf("admin") ? tryAdminKey() : "", playground.load()]);
allowAdmin(trouble === null);
