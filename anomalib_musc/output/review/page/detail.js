// SPDX-License-Identifier: Apache-2.0
// One image at a time: zoom, heatmap, outline, facts, and the images most like it.

const detail = (() => {
  const find = (id) => document.getElementById(id);
  const dialog = find("detail");
  const stage = find("stage");
  const layers = find("layers");
  const [image, heat, svg] = layers.children;
  const zoom = { factor: 1, x: 0.5, y: 0.5, aim: null }; // how far; which place is in the middle; which is to be
  const pointers = new Map(); // those that are down, for dragging and pinching
  let shape = [1, 1];
  let shownRank = null;

  function open() {
    if (!dialog.open) dialog.showModal();
    dialog.append(find("toast")); // what lies outside is neither seen nor read out now
    show();
  }

  function show() {
    if (!dialog.open) return;
    const rank = state.current;
    const slot = slotOf(rank);
    const [place, count] = cards.position();
    find("detail-title").textContent = nameOf(rank);
    find("detail-position").textContent = `${place} of ${count}`;
    if (!slot) return;
    stage.setAttribute("aria-label", `${nameOf(rank)}, ${isFlagged(rank) ? "flagged" : "not flagged"}`);
    if (rank !== shownRank) {
      shownRank = rank;
      shape = numbersOf(slot, "size");
      Object.assign(zoom, { factor: 1, x: 0.5, y: 0.5, aim: null });
      layers.classList.remove("compared");
      image.src = pictureOf(rank);
      drawHeatmap(heat, mapOf(rank), shape[0] / shape[1]);
      showSimilar(numbersOf(slot, "similar"));
    }
    showFacts(rank, slot);
    drawOutline(svg, rank, state.outline);
    heat.style.opacity = state.opacity;
    find("colour-here").style.left = `${100 * levelOf(mapOf(rank).high)}%`;
    for (const button of find("detail-marks").querySelectorAll("button"))
      button.setAttribute("aria-pressed", button.dataset.mark === state.marks[rank]);
    lay();
  }

  function showFacts(rank, slot) {
    const regions = numbersOf(slot, "regions");
    const facts = [
      ["Rank", `${rank + 1} of ${pool.scores.length}`],
      ["Score", `${formatScore(pool.scores[rank])}, ${isFlagged(rank) ? "flagged" : "not flagged"}`],
      ["Mark", state.marks[rank] ?? "none"],
      ["File", pathOf(rank) || "none"],
      ["Size", `${shape[0]} × ${shape[1]} pixels`],
    ];
    if (isFlagged(rank) && regions.length) {
      const [x, y, width, height, area] = regions;
      const others = regions.length > 5 ? `, and ${regions.length / 5 - 1} more` : "";
      facts.push(["Region", `${width} × ${height} at (${x}, ${y}), ${area} pixels${others}`]);
    }
    if (slot.dataset.note) facts.push(["Note", slot.dataset.note]);
    find("detail-facts").replaceChildren(
      ...facts.flatMap(([name, value]) => [
        element("dt", { textContent: name }),
        element("dd", { textContent: value }),
      ]),
    );
  }

  function showSimilar(ranks) {
    const entries = ranks.map((rank, place) => {
      const text = `rank ${rank + 1}, score ${formatScore(pool.scores[rank])}`;
      const button = element(
        "button",
        { type: "button", disabled: !isHere(rank), title: pathOf(rank) },
        element("img", { alt: "", src: pictureOf(rank) }),
        element("span", { textContent: text }),
        element("span", { className: "dim", textContent: nameOf(rank) }),
      );
      button.addEventListener("click", () => setCurrent(rank));
      button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && compare(place));
      button.addEventListener("pointerleave", () => compare(null));
      return element("li", {}, button);
    });
    find("similar").replaceChildren(...entries);
    find("similar").previousElementSibling.hidden = !entries.length;
  }

  // Lay the image so that it fits the stage at a zoom of 1, and never leaves it.
  function lay() {
    const fit = Math.min(stage.clientWidth / shape[0], stage.clientHeight / shape[1]);
    const sizes = shape.map((side) => side * fit * zoom.factor);
    const room = [stage.clientWidth, stage.clientHeight];
    const corner = ["x", "y"].map((axis, index) => {
      const half = Math.min(0.5, room[index] / 2 / sizes[index]);
      zoom[axis] = Math.max(half, Math.min(1 - half, zoom[axis]));
      return room[index] / 2 - zoom[axis] * sizes[index];
    });
    Object.assign(layers.style, {
      width: `${sizes[0]}px`,
      height: `${sizes[1]}px`,
      left: `${corner[0]}px`,
      top: `${corner[1]}px`,
    });
    stage.classList.toggle("zoomed", zoom.factor > 1);
  }

  // Zoom by a factor about a place on the screen, by default the stage's middle.
  function zoomBy(factor, clientX, clientY) {
    const box = stage.getBoundingClientRect();
    const away = [
      (clientX ?? box.left + box.width / 2) - box.left - box.width / 2,
      (clientY ?? box.top + box.height / 2) - box.top - box.height / 2,
    ];
    const before = zoom.factor;
    zoom.factor = Math.max(1, Math.min(32, before * factor));
    const sides = [layers.clientWidth, layers.clientHeight];
    zoom.x += away[0] / sides[0] - away[0] / (sides[0] * (zoom.factor / before));
    zoom.y += away[1] / sides[1] - away[1] / (sides[1] * (zoom.factor / before));
    lay();
    if (zoom.factor > 1) sharpen();
  }

  // From the whole image, to where it is most anomalous.
  function zoomIn() {
    if (zoom.factor === 1) {
      const { values, rows, columns, high } = mapOf(shownRank);
      const place = values.indexOf(high);
      zoom.aim = { x: (place % columns) / (columns - 1), y: Math.floor(place / columns) / (rows - 1) };
    }
    Object.assign(zoom, zoom.aim);
    zoomBy(2);
  }

  // Show a similar image in the place of this one, or this one again.
  function compare(which) {
    const rank = slotOf(shownRank) && which !== null ? numbersOf(slotOf(shownRank), "similar")[which] : undefined;
    layers.classList.toggle("compared", rank !== undefined);
    image.src = pictureOf(rank ?? shownRank);
    if (rank === undefined && zoom.factor > 1) sharpen();
  }

  // The original in the thumbnail's place, where the page is opened on the machine that has it.
  function sharpen() {
    const rank = shownRank;
    const { uri } = slotOf(rank).dataset;
    if (!uri || location.protocol !== "file:" || image.src === uri) return;
    const original = new Image();
    original.onload = () => {
      if (
        rank === shownRank &&
        !layers.classList.contains("compared") &&
        original.naturalWidth === shape[0] &&
        original.naturalHeight === shape[1]
      )
        image.src = uri;
    };
    original.src = uri;
  }

  const distance = () => {
    const [one, other] = [...pointers.values()];
    return Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
  };

  function move(event) {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const before = pointers.size === 2 ? distance() : 0;
    pointers.set(event.pointerId, event);
    if (pointers.size === 2) {
      const [one, other] = [...pointers.values()];
      zoomBy(distance() / (before || 1), (one.clientX + other.clientX) / 2, (one.clientY + other.clientY) / 2);
    } else {
      zoom.x -= (event.clientX - last.clientX) / layers.clientWidth;
      zoom.y -= (event.clientY - last.clientY) / layers.clientHeight;
      lay();
    }
  }

  stage.addEventListener("pointerdown", (event) => {
    if (event.button || event.target.closest("button")) return;
    zoom.aim = null;
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
  });
  stage.addEventListener("pointermove", move);
  for (const end of ["pointerup", "pointercancel"])
    stage.addEventListener(end, (event) => pointers.delete(event.pointerId));
  stage.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      zoom.aim = null;
      zoomBy(Math.exp(-event.deltaY / 400), event.clientX, event.clientY);
    },
    { passive: false },
  );
  stage.addEventListener(
    "dblclick",
    (event) =>
      !event.target.closest("button") && zoomBy(zoom.factor > 1 ? 1 / zoom.factor : 4, event.clientX, event.clientY),
  );
  new ResizeObserver(lay).observe(stage);

  function go(places) {
    setCurrent(cards.neighbour(places));
  }

  function setOpacity(value) {
    state.opacity = value;
    find("opacity").value = 100 * value;
    show();
  }

  function setOutline(value) {
    state.outline = value;
    find("outline").checked = value;
    show();
  }

  find("detail-marks").replaceWith(
    Object.assign(
      markButtons((mark) => keys.mark(mark)),
      { id: "detail-marks" },
    ),
  );
  find("detail-close").addEventListener("click", () => dialog.close());
  find("detail-back").addEventListener("click", () => go(-1));
  find("detail-next").addEventListener("click", () => go(1));
  find("detail-undo").addEventListener("click", undo);
  find("zoom-in").addEventListener("click", zoomIn);
  find("zoom-out").addEventListener("click", () => zoomBy(1 / 2));
  find("zoom-fit").addEventListener("click", () => zoomBy(1 / zoom.factor));
  find("opacity").addEventListener("input", (event) => setOpacity(event.target.value / 100));
  find("outline").addEventListener("change", (event) => setOutline(event.target.checked));
  dialog.addEventListener("close", () => {
    document.body.append(find("toast"));
    cards.focus();
  });
  for (const what of ["current", "marks", "threshold"]) changes.addEventListener(what, show);

  function start() {
    find("opacity").value = 100 * state.opacity;
    find("outline").checked = state.outline;
    [find("colour-low").textContent, find("colour-high").textContent] = pool.mapRange.map((value) =>
      Number(value.toPrecision(3)),
    );
    const context = document.querySelector(".colours canvas").getContext("2d");
    COLOURS.forEach(([red, green, blue, alpha], x) => {
      context.fillStyle = `rgb(${red} ${green} ${blue} / ${alpha / 255})`;
      context.fillRect(x, 0, 1, 1);
    });
  }

  return {
    start,
    open,
    zoomIn,
    compare,
    zoomOut: () => zoomBy(1 / 2),
    isOpen: () => dialog.open,
    fit: () => zoomBy(1 / zoom.factor),
    toggleHeat: () => setOpacity(state.opacity ? 0 : 0.4),
    toggleOutline: () => setOutline(!state.outline),
  };
})();
