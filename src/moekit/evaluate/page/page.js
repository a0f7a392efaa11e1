"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = () =>
    (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  name();

  // The hover texts of the charts, shown at once instead of after the browser's delay.
  const tip = document.getElementById("tip");
  for (const title of document.querySelectorAll("svg.mk * > title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const { clientWidth, clientHeight } = root;
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 14 + box.width > clientWidth;
    const low = event.clientY + 14 + box.height > clientHeight;
    tip.style.left = Math.max(4, right ? event.clientX - box.width - 10 : event.clientX + 14) + "px";
    tip.style.top = Math.max(4, low ? event.clientY - box.height - 10 : event.clientY + 14) + "px";
  });
  document.addEventListener("pointerleave", () => { tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
