// The player: one or two clips in step, a slider, and a timeline to click. It serves every player of a page, also those
// that are added later, and creates no markup.
{
  const players = new Set(); // that are playing

  const videos = (player) => [...player.querySelectorAll("video")];
  const playerNear = (element) => element.closest(".player") ?? element.closest(".clip")?.querySelector(".player");
  const duration = (player) => Number(player.dataset.duration);

  function nearest(items, second, seconds) {
    const distance = (item) => Math.abs(second(item) - seconds);
    return items.reduce((best, item) => (distance(item) < distance(best) ? item : best), items[0]);
  }

  function show(player, seconds) {
    const score = nearest(JSON.parse(player.dataset.scores), ([second]) => second, seconds);
    const heard = `${seconds.toFixed(1)} s${score ? `, score ${score[1].toFixed(2)}` : ""}`;
    const seek = player.querySelector(".seek");
    player.style.setProperty("--now", `${100 * Math.min(1, seconds / duration(player))}%`);
    seek.value = seconds;
    seek.setAttribute("aria-valuetext", heard);
    player.querySelector(".second").value = seconds.toFixed(1);
    if (score) player.querySelector(".score-now").value = `score ${score[1].toFixed(2)}`;
    for (const box of player.querySelectorAll(".screen .box")) {
      const [, ...place] = nearest(JSON.parse(box.dataset.boxes), ([second]) => second, seconds);
      ["left", "top", "width", "height"].forEach((side, at) => { box.style[side] = `${place[at]}%`; });
    }
    for (const frames of player.querySelectorAll(".frames")) {
      const shown = nearest([...frames.children], (frame) => Number(frame.dataset.second), seconds);
      for (const frame of frames.children) frame.hidden = frame !== shown;
    }
  }

  function go(player, seconds) {
    for (const video of videos(player)) video.currentTime = seconds;
    show(player, seconds);
  }

  function step(player) {
    if (!players.has(player)) return;
    const [first, ...others] = videos(player);
    if (!first || !player.isConnected) return players.delete(player);
    if (first.ended || first.currentTime >= duration(player)) pause(player);
    for (const other of others) {
      if (Math.abs(other.currentTime - first.currentTime) > 0.08) other.currentTime = first.currentTime;
    }
    show(player, first.currentTime);
    requestAnimationFrame(() => step(player));
  }

  function play(player) {
    const [first] = videos(player);
    if (first.ended || first.currentTime >= duration(player) - 0.05) go(player, 0);
    players.add(player);
    player.classList.add("on");
    player.querySelector(".play").ariaLabel = "Pause";
    Promise.all(videos(player).map((video) => video.play())).catch(() => pause(player));
    step(player);
  }

  function pause(player) {
    players.delete(player);
    player.classList.remove("on");
    player.querySelector(".play").ariaLabel = "Play";
    for (const video of videos(player)) video.pause();
  }

  const toggle = (player) => (players.has(player) ? pause(player) : play(player));

  function switchSound(player, button) {
    const all = videos(player);
    if (all.length > 1) {
      for (const video of all) video.muted = !video.muted;
    } else {
      all[0].muted = !all[0].muted;
      button.ariaPressed = String(!all[0].muted);
    }
  }

  // The frames, or a note, take the place of a video that the browser cannot play.
  function replace(video) {
    const player = video.closest(".player");
    const stage = video.closest(".stage");
    if (!player || !stage) return;
    if (players.has(player)) pause(player);
    for (const each of videos(player)) {
      const place = each.closest(".stage");
      const still = place.querySelector(".frames");
      if (still) still.hidden = false;
      if (still || each === video) each.closest(".screen").remove();
    }
    stage.querySelector(".unplayable").hidden = stage.querySelector(".frames") !== null;
    for (const button of player.querySelectorAll(".transport button")) button.hidden = true;
  }

  function pointed(plot, event) {
    const { left, width } = plot.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - left) / width)) * duration(plot.closest(".player"));
  }

  document.addEventListener("click", ({ target }) => {
    const jump = target.closest("[data-at]");
    const player = jump ? playerNear(jump) : target.closest(".player");
    if (!player) return;
    if (jump) {
      go(player, Number(jump.dataset.at));
      player.scrollIntoView({ block: "nearest" });
    } else if (target.closest(".play") || target.matches("video")) toggle(player);
    else if (target.closest(".sound")) switchSound(player, target.closest(".sound"));
    else if (target.closest(".full")) videos(player)[0].requestFullscreen();
  });

  document.addEventListener("input", ({ target }) => {
    if (target.matches?.(".player .seek")) go(target.closest(".player"), target.valueAsNumber);
  });

  // Pressing or dragging on the timeline; marks on it are buttons of their own.
  let dragged = null;
  document.addEventListener("pointerdown", (event) => {
    const plot = event.target.closest?.(".player .plot");
    if (!plot || event.button || event.target.closest("[data-at], .seek")) return;
    dragged = plot;
    go(plot.closest(".player"), pointed(plot, event));
  });
  document.addEventListener("pointermove", (event) => {
    if (dragged) go(dragged.closest(".player"), pointed(dragged, event));
  });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { dragged = null; });

  // Events of media do not bubble.
  document.addEventListener("error", ({ target }) => {
    if (target.matches?.(".player video")) replace(target);
  }, true);
  // Full screen has the browser's own controls.
  const leads = (video) => video.closest?.(".player video") && video === videos(video.closest(".player"))[0];
  for (const change of ["play", "pause", "seeked"]) {
    document.addEventListener(change, ({ target }) => {
      if (!leads(target)) return;
      const player = target.closest(".player");
      if (change === "play" && !players.has(player)) play(player);
      else if (change === "pause" && players.has(player)) pause(player);
      else if (change === "seeked" && !players.has(player)) show(player, target.currentTime);
    }, true);
  }
  document.addEventListener("fullscreenchange", () => {
    for (const video of document.querySelectorAll(".player:not(.pair) video")) {
      video.controls = video === document.fullscreenElement;
    }
  });
  document.addEventListener("DOMContentLoaded", () => {
    for (const video of document.querySelectorAll(".player video")) if (video.error) replace(video);
  });
}
