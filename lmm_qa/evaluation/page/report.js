"use strict";
// Opens, sorts and filters the table of clips. All text is in the page already; nothing here makes markup.

const table = document.getElementById("clips");
const clips = table ? [...table.tBodies] : [];
const words = new Map(clips.map((clip) => [clip, clip.dataset.text.toLowerCase()]));
const filter = document.getElementById("filter");
const opener = (clip) => clip.querySelector("button");

function toggle(clip, open) {
  const template = document.getElementById("d" + clip.id.slice(1));
  if (!template || open === (opener(clip).ariaExpanded === "true")) return;
  opener(clip).ariaExpanded = String(open);
  if (open) {
    clip.append(template.content.cloneNode(true));
    clip.querySelector(".detail > td").colSpan = table.tHead.rows[0].cells.length;
  } else {
    clip.querySelector(".detail").remove();
  }
}

function reveal(clip) {
  if (clip.hidden) {
    filter.reset();
    narrow();
  }
  toggle(clip, true);
  clip.scrollIntoView({ block: "start" });
  opener(clip).focus({ preventScroll: true });
}

const byName = new Intl.Collator(undefined, { numeric: true }).compare;

function value(clip, column) {
  const { sort } = clip.rows[0].cells[column].dataset;
  return sort === undefined ? clip.rows[0].cells[column].textContent : sort === "" ? null : Number(sort);
}

function sort(header) {
  const column = header.cellIndex;
  const sign = header.ariaSort === "ascending" ? -1 : 1;
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.ariaSort = sign > 0 ? "ascending" : "descending";
  const keys = new Map(clips.map((clip) => [clip, value(clip, column)]));
  clips.sort((one, other) => {
    const [a, b] = [keys.get(one), keys.get(other)];
    if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last, either way
    return sign * (typeof a === "number" ? a - b : byName(a, b));
  });
  table.append(...clips);
}

function narrow() {
  const wanted = filter.text.value.toLowerCase().split(/\s+/);
  const defect = filter.defect?.value ?? "";
  let shown = 0;
  for (const clip of clips) {
    const has = wanted.every((word) => words.get(clip).includes(word));
    clip.hidden = !has || (defect !== "" && !clip.dataset.found.split(" ").includes(defect));
    shown += !clip.hidden;
  }
  filter.count.value = `${shown} of ${clips.length}`;
  document.getElementById("nothing").hidden = shown > 0;
  for (const button of document.querySelectorAll("#defects button")) button.ariaPressed = button.value === defect;
}

// A row shows the frame of its worst moment, or one of the middle, when it comes into view.
const thumbs = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) {
    if (!isIntersecting) continue;
    thumbs.unobserve(target);
    const { content } = document.getElementById("d" + target.closest("tbody").id.slice(1));
    const shots = content.querySelectorAll("img");
    const shot = content.querySelector(".worst img") ?? shots[shots.length >> 1];
    if (!shot) continue;
    const image = shot.cloneNode();
    image.alt = "";
    target.append(image);
  }
}, { rootMargin: "200px" });

function follow() {
  const clip = document.getElementById(location.hash.slice(1));
  if (clips.includes(clip)) reveal(clip);
}

if (table) {
  table.tHead.addEventListener("click", ({ target }) => {
    if (target.closest("button")) sort(target.closest("th"));
  });
  table.addEventListener("click", ({ target }) => {
    const clip = target.closest("tbody");
    if (clip && !target.closest(".detail") && getSelection().isCollapsed) {
      toggle(clip, opener(clip).ariaExpanded !== "true");
    }
  });
  filter.addEventListener("input", narrow);
  filter.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("defects")?.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    filter.defect.value = button.ariaPressed === "true" ? "" : button.value;
    narrow();
    document.getElementById("title").scrollIntoView();
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#c']");
    if (!link) return;
    event.preventDefault();
    history.replaceState(null, "", link.hash ?? link.getAttribute("href"));
    follow();
  });
  addEventListener("hashchange", follow);
  document.addEventListener("DOMContentLoaded", () => {
    narrow();
    for (const thumb of table.querySelectorAll(".thumb")) thumbs.observe(thumb);
    follow();
  });
}
