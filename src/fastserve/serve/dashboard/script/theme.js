// Colours and language as chosen before, set ahead of the first paint. Preferences only: keys are not kept here.
(() => {
  const root = document.documentElement;
  const theme = localStorage.getItem("fastserve.theme");
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  const language = localStorage.getItem("fastserve.language") ?? navigator.language;
  root.lang = language.startsWith("zh") ? "zh" : "en";
})();
