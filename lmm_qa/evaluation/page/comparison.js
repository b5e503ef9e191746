"use strict";
// One slider moves both clips of a pair. All frames are already in the page.

for (const slider of document.querySelectorAll(".moment input")) {
  const sides = [...slider.closest(".pair").querySelectorAll(".frames")];
  const seconds = slider.dataset.seconds.trim().split(" ");
  slider.addEventListener("input", () => {
    for (const { children } of sides) {
      [...children].forEach((frame, index) => { frame.hidden = index !== slider.valueAsNumber; });
    }
    slider.parentNode.querySelector("output").value = `${seconds[slider.valueAsNumber]} s`;
  });
}
