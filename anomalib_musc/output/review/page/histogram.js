// SPDX-License-Identifier: Apache-2.0
// The histogram of the pool's scores, and on it the threshold as a slider.

const histogram = (() => {
  const box = document.getElementById("histogram");
  const svg = box.querySelector("svg");
  const handle = document.getElementById("threshold");
  const [WIDTH, HEIGHT, BINS] = [320, 96, 64]; // of the drawing, whatever its size on the screen
  const cuts = cutsOf(pool.scores);
  const flaggedByCut = cuts.map((cut) => countAbove(pool.scores, cut));
  const [high, low] = [Math.max(cuts[0], pool.threshold), Math.min(cuts.at(-1), pool.threshold)];
  const place = (score) => Math.max(0, Math.min(1, (score - low) / (high - low)));

  function shape(tag, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function bars() {
    const counts = new Array(BINS).fill(0);
    for (const score of pool.scores) counts[Math.min(BINS - 1, Math.floor(place(score) * BINS))]++;
    const most = Math.max(...counts);
    const barWidth = WIDTH / BINS;
    return counts
      .map((count, bin) => {
        const height = count ? Math.max(2.5, (count / most) * (HEIGHT - 18)) : 0; // one image is to be seen
        return `M${bin * barWidth} ${HEIGHT - 8}v${-height}h${barWidth - 1}v${height}z`;
      })
      .join("");
  }

  const clip = shape("rect", { y: 0, height: HEIGHT });
  const ticks = shape("g", {});

  function draw() {
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    const above = shape("clipPath", { id: "above" });
    above.append(clip);
    const path = bars();
    svg.append(
      above,
      shape("path", { d: path, class: "bars" }),
      shape("path", { d: path, class: "bars above", "clip-path": "url(#above)" }),
      ticks,
    );
  }

  function follow() {
    const share = place(state.threshold);
    clip.setAttribute("x", share * WIDTH);
    clip.setAttribute("width", WIDTH);
    handle.style.left = `${100 * share}%`;
    const flagged = countAbove(pool.scores, state.threshold);
    handle.setAttribute("aria-valuemin", low);
    handle.setAttribute("aria-valuemax", high);
    handle.setAttribute("aria-valuenow", state.threshold);
    handle.setAttribute(
      "aria-valuetext",
      `${formatScore(state.threshold)}: ${flagged} of ${pool.scores.length} flagged`,
    );
  }

  // Below the bars, a tick for each image that is marked.
  function tick() {
    const marked = Object.entries(state.marks).filter(([, mark]) => mark !== "unsure");
    ticks.replaceChildren(
      ...marked.map(([rank, mark]) =>
        shape("rect", {
          x: place(pool.scores[rank]) * WIDTH - 1,
          y: mark === "good" ? HEIGHT - 3 : HEIGHT - 7,
          width: 2,
          height: 3,
          class: mark,
        }),
      ),
    );
  }

  function drag(event) {
    const { left, width } = box.getBoundingClientRect();
    setThreshold(low + Math.max(0, Math.min(1, (event.clientX - left) / width)) * (high - low));
  }

  // One cut further is one image (or several of equal scores) more or less.
  function step(count) {
    const present = flaggedByCut.indexOf(countAbove(pool.scores, state.threshold));
    setThreshold(cuts[Math.max(0, Math.min(cuts.length - 1, present + count))]);
  }

  const STEPS = {
    ArrowLeft: 1,
    ArrowDown: 1,
    ArrowRight: -1,
    ArrowUp: -1,
    PageDown: 10,
    PageUp: -10,
    Home: Infinity,
    End: -Infinity,
  };
  handle.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    event.stopPropagation();
    step(STEPS[event.key]);
  });
  box.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    box.setPointerCapture(event.pointerId);
    handle.focus({ preventScroll: true });
    drag(event);
  });
  box.addEventListener("pointermove", (event) => {
    if (box.hasPointerCapture(event.pointerId)) drag(event);
  });
  box.addEventListener("pointerup", () => changed("settled"));
  handle.addEventListener("keyup", () => changed("settled"));
  changes.addEventListener("threshold", follow);
  changes.addEventListener("marks", tick);
  return { draw };
})();
