"use strict";
// Opens, sorts and filters the table of clips. All text is already in the page; this script creates no markup.

const table = document.getElementById("clips");
const clips = table ? [...table.tBodies] : [];
const searchText = new Map(clips.map((clip) => [clip, clip.dataset.search.toLowerCase()]));
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
    applyFilter();
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
    if (a === null || b === null) return (a === null) - (b === null); // missing values come last in both directions
    return sign * (typeof a === "number" ? a - b : byName(a, b));
  });
  table.append(...clips);
}

function applyFilter() {
  const words = filter.text.value.toLowerCase().split(/\s+/);
  const defect = filter.defect?.value ?? "";
  let shown = 0;
  for (const clip of clips) {
    const has = words.every((word) => searchText.get(clip).includes(word));
    clip.hidden = !has || (defect !== "" && !clip.dataset.defects.split(" ").includes(defect));
    shown += !clip.hidden;
  }
  filter.count.value = `${shown} of ${clips.length}`;
  document.getElementById("nothing").hidden = shown > 0;
  for (const button of document.querySelectorAll("#defects button")) button.ariaPressed = button.value === defect;
}

// A row shows its worst moment, or its middle frame, once it is scrolled into view.
const observer = new IntersectionObserver((changes) => {
  for (const { isIntersecting, target } of changes) {
    if (!isIntersecting) continue;
    observer.unobserve(target);
    const { content } = document.getElementById("d" + target.closest("tbody").id.slice(1));
    const frames = content.querySelectorAll("img");
    const frame = content.querySelector(".worst img") ?? frames[frames.length >> 1];
    if (!frame) continue;
    const image = frame.cloneNode();
    image.alt = "";
    target.append(image);
  }
}, { rootMargin: "200px" });

function openLinkedClip() {
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
  filter.addEventListener("input", applyFilter);
  filter.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("defects")?.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    filter.defect.value = button.ariaPressed === "true" ? "" : button.value;
    applyFilter();
    document.getElementById("title").scrollIntoView();
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#c']");
    if (!link) return;
    event.preventDefault();
    history.replaceState(null, "", link.hash ?? link.getAttribute("href"));
    openLinkedClip();
  });
  addEventListener("hashchange", openLinkedClip);
  document.addEventListener("DOMContentLoaded", () => {
    applyFilter();
    for (const thumb of table.querySelectorAll(".thumb")) observer.observe(thumb);
    openLinkedClip();
  });
}
