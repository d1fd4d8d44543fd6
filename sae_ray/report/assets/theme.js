"use strict";

// Light or dark: as the system is, until the reader says otherwise. It runs before the page is painted.

const dark = matchMedia("(prefers-color-scheme: dark)");
const KEPT = "sae-ray-theme";

function kept() {
  try {
    return localStorage.getItem(KEPT);
  } catch {
    return null; // a page from disk may have no storage
  }
}

function keepTheme(theme) {
  try {
    localStorage.setItem(KEPT, theme);
  } catch {
    // then it lasts as long as the page
  }
}

const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

if (["light", "dark"].includes(kept())) document.documentElement.dataset.theme = kept();

addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme");
  const name = () => (button.textContent = isDark() ? "Light" : "Dark");
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    keepTheme(document.documentElement.dataset.theme);
    name();
    dispatchEvent(new Event("themechange"));
  });
  dark.addEventListener("change", () => (name(), dispatchEvent(new Event("themechange"))));
  name();
});
