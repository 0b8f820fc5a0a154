"use strict";
// Data, colours, and the small controls. Text from a run is only ever set as text, never as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const whenRecoloured = []; // functions that draw again when light turns dark

function make(tag, options = {}, ...children) {
  const { dataset, style, attributes, ...own } = options;
  const element = Object.assign(document.createElement(tag), own);
  for (const [name, value] of Object.entries(dataset || {})) element.dataset[name] = value;
  for (const [name, value] of Object.entries(style || {})) element.style.setProperty(name, value);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const probe = make("span", { hidden: true });
document.body.append(probe);

/** The colour that a variable of the style sheet has now, as a canvas takes it. */
function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

// The theme: as the system has it, or what the button says.
{
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("simclr-report-theme", value);
      return localStorage.getItem("simclr-report-theme");
    } catch {
      return null; // a file's page may have no storage
    }
  };
  const apply = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    const isDark = theme ? theme === "dark" : dark.matches;
    button.textContent = isDark ? "Light" : "Dark";
    button.setAttribute("aria-label", `Use ${isDark ? "light" : "dark"} colours`);
    whenRecoloured.forEach((draw) => draw());
  };
  button.addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
    const other = theme === "dark" ? "light" : "dark";
    stored(other);
    apply(other);
  });
  dark.addEventListener("change", () => apply(document.documentElement.dataset.theme));
  const theme = stored();
  apply(theme === "dark" || theme === "light" ? theme : null);
}

// Pictures over the steps.
for (const figure of document.querySelectorAll("figure.picture")) {
  const slider = figure.querySelector("input");
  const plates = [...figure.querySelectorAll(".plate")];
  slider?.addEventListener("input", () => {
    plates.forEach((plate, i) => { plate.hidden = i !== Number(slider.value); });
    const step = Number(plates[slider.value].dataset.step).toLocaleString("en");
    slider.setAttribute("aria-valuetext", `step ${step}`);
    figure.querySelector("output").textContent = step;
  });
}

// The search in the configurations.
{
  const search = document.getElementById("search");
  const groups = [...document.querySelectorAll("#configurations details")];
  const pairs = groups.map((group) => [...group.querySelectorAll(".pairs > div")]);
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    groups.forEach((group, i) => {
      const found = pairs[i].filter((pair) => {
        const text = pair.textContent.toLowerCase();
        pair.hidden = !words.every((word) => text.includes(word));
        return !pair.hidden;
      });
      group.hidden = !found.length;
      group.open = words.length > 0 && found.length > 0;
      count += found.length;
    });
    document.getElementById("found").textContent = words.length ? `${count} found` : "";
  });
}

// The section that is being read.
{
  const links = [...document.querySelectorAll("nav a")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      for (const link of links) {
        const isHere = link.hash === `#${entry.target.id}`;
        if (isHere) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  }, { rootMargin: "-30% 0px -65% 0px" });
  document.querySelectorAll("main > section").forEach((section) => watcher.observe(section));
}

// On paper everything is open.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
});
