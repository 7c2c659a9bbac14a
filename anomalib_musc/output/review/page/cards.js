// SPDX-License-Identifier: Apache-2.0
// One card an image. All are in the document, for screen readers and the browser's own search; pictures and outlines
// only of those near the screen.

const cards = (() => {
  const main = document.getElementById("cards");
  const items = new Map(); // rank: <li>
  const near = new Set(); // ranks of cards near the screen
  let shown = []; // ranks in the order of the page, without those that the filter hides
  let flaggedBefore = countAbove(pool.scores, state.threshold);

  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        const rank = Number(target.dataset.rank);
        if (isIntersecting) near.add(rank);
        else near.delete(rank);
        if (isIntersecting) fill(rank);
        else target.querySelector("img").removeAttribute("src");
      }
    },
    { rootMargin: "800px 0px" },
  );

  function build(rank) {
    const [folder, name] = folderOf(rank);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("preserveAspectRatio", "none");
    for (const kind of ["halo", "line"]) {
      svg.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
      svg.lastChild.setAttribute("class", kind);
    }
    const hidden = (text) => element("span", { className: "hidden", textContent: text });
    const open = element(
      "button",
      { type: "button", className: "open", tabIndex: -1, "aria-keyshortcuts": "g d u n b z" },
      element(
        "span",
        { className: "frame" },
        element("span", { className: "picture" }, element("img", { alt: "", draggable: false }), svg),
      ),
      element(
        "span",
        { className: "caption" },
        element(
          "span",
          { className: "figures" },
          hidden(`Rank ${rank + 1}, score ${formatScore(pool.scores[rank])}`),
          element("b", { textContent: rank + 1, "aria-hidden": true }),
          element("span", { className: "score", textContent: formatScore(pool.scores[rank]), "aria-hidden": true }),
          element(
            "span",
            { className: "status" },
            element("span", { className: "flag" }),
            " ",
            element("span", { className: "mark" }),
          ),
        ),
        element("span", { className: "name", textContent: name, title: pathOf(rank) }),
        element("span", { className: "folder dim", textContent: folder }),
      ),
    );
    open.addEventListener("click", () => {
      setCurrent(rank);
      detail.open();
    });
    const item = element(
      "li",
      { className: "card", "data-rank": rank },
      open,
      markButtons((mark) => setMark(rank, mark)),
    );
    items.set(rank, item);
    watcher.observe(item);
  }

  // Picture and outline, once the browser has read that far in the file.
  function fill(rank) {
    const slot = slotOf(rank);
    const item = items.get(rank);
    if (!slot) return;
    const [width, height] = numbersOf(slot, "size");
    const picture = item.querySelector(".picture");
    const image = item.querySelector("img");
    picture.style.aspectRatio = `${width} / ${height}`;
    picture.classList.toggle("wide", width / height >= pool.box);
    const source = pictureOf(rank);
    picture.classList.toggle("missing", !source);
    if (source) image.src = source;
    drawOutline(item.querySelector("svg"), rank);
  }

  function label(rank) {
    const item = items.get(rank);
    const mark = state.marks[rank];
    const flagged = isFlagged(rank);
    item.classList.toggle("flagged", flagged);
    item.dataset.mark = mark ?? "";
    item.querySelector(".flag").textContent = flagged ? "flagged" : "";
    item.querySelector(".mark").textContent = mark ? `${SYMBOLS[mark]} ${mark}` : "";
    for (const button of item.querySelectorAll(".marks button"))
      button.setAttribute("aria-pressed", button.dataset.mark === mark);
  }

  const TESTS = {
    all: () => true,
    flagged: isFlagged,
    unflagged: (rank) => !isFlagged(rank),
    unmarked: (rank) => !state.marks[rank],
  };
  for (const [index, [, ranks]] of pool.groups.entries()) {
    const members = new Set(ranks);
    TESTS[`group-${index}`] = (rank) => members.has(rank);
  }

  function filter() {
    const isWanted = TESTS[state.filter] ?? ((rank) => state.marks[rank] === state.filter);
    shown = [];
    for (const section of main.querySelectorAll("section")) {
      const ranks = [...section.querySelectorAll("li")].map((item) => Number(item.dataset.rank));
      for (const rank of ranks) items.get(rank).hidden = !isWanted(rank);
      const wanted = ranks.filter(isWanted);
      section.hidden = !wanted.length;
      shown.push(...wanted);
      const title = section.querySelector(".dim");
      if (title?.parentElement.tagName === "H2")
        title.textContent = `${ranks.length} images, ${ranks.filter(isFlagged).length} flagged`;
    }
    main.classList.toggle("empty", !shown.length);
    follow();
  }

  function arrange() {
    const ranks = [...items.keys()];
    const groups = new Map();
    if (state.order === "threshold")
      ranks.sort(
        (one, other) => Math.abs(pool.scores[one] - state.threshold) - Math.abs(pool.scores[other] - state.threshold),
      );
    for (const rank of ranks) {
      const group = state.order === "folder" ? folderOf(rank)[0] || "./" : "";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(rank);
    }
    const names = [...groups.keys()].sort((one, other) => one.localeCompare(other, undefined, { numeric: true }));
    main.replaceChildren(
      ...names.map((name) => {
        const list = element("ul", { className: "grid" }, ...groups.get(name).map((rank) => items.get(rank)));
        const title = name ? [element("h2", {}, `${name} `, element("span", { className: "dim" }))] : [];
        return element("section", { "aria-label": name || "Images" }, ...title, list);
      }),
    );
    filter();
  }

  // Only the images between the old threshold and the new one change.
  function rethreshold() {
    const flagged = countAbove(pool.scores, state.threshold);
    for (let rank = Math.min(flagged, flaggedBefore); rank < Math.max(flagged, flaggedBefore); rank++) {
      if (!items.has(rank)) continue;
      label(rank);
      if (near.has(rank) && slotOf(rank)) drawOutline(items.get(rank).querySelector("svg"), rank);
    }
    const isOther = flagged !== flaggedBefore;
    flaggedBefore = flagged;
    if (isOther && (state.order === "folder" || state.filter.endsWith("flagged"))) filter();
  }

  function follow() {
    for (const open of main.querySelectorAll('.open[tabindex="0"]')) open.tabIndex = -1;
    const current = shown.includes(state.current) ? state.current : shown[0];
    if (current !== undefined) items.get(current).querySelector(".open").tabIndex = 0;
  }

  function focus() {
    items.get(state.current)?.querySelector(".open").focus();
  }

  // The image so many places further, or the one at that end.
  function neighbour(places) {
    const place = shown.indexOf(state.current);
    return shown[Math.max(0, Math.min(shown.length - 1, place + places))] ?? state.current;
  }

  function columns() {
    const boxes = shown.slice(0, 50).map((rank) => items.get(rank).offsetTop);
    return Math.max(1, boxes.filter((top) => top === boxes[0]).length);
  }

  function start() {
    main.replaceChildren();
    document.documentElement.style.setProperty("--box", pool.box);
    for (let rank = pool.first; rank <= pool.last; rank++) build(rank);
    for (const rank of items.keys()) label(rank);
    arrange();
    document.addEventListener("DOMContentLoaded", () => near.forEach(fill));
  }

  changes.addEventListener("threshold", rethreshold);
  changes.addEventListener("settled", () => state.order === "threshold" && arrange());
  changes.addEventListener("current", follow);
  changes.addEventListener("marks", () => {
    for (const rank of items.keys()) if ((state.marks[rank] ?? "") !== items.get(rank).dataset.mark) label(rank);
    if (state.filter !== "all" && !state.filter.endsWith("flagged")) filter();
  });
  return {
    start,
    arrange,
    filter,
    focus,
    neighbour,
    columns,
    position: () => [shown.indexOf(state.current) + 1, shown.length],
  };
})();

// Three buttons, and what each does.
function markButtons(action) {
  const buttons = MARKS.map((mark) => {
    const button = element("button", {
      type: "button",
      "data-mark": mark,
      "aria-pressed": false,
      "aria-keyshortcuts": mark[0],
      title: `${mark} (${mark[0]})`,
    });
    button.append(
      element("span", { "aria-hidden": true, textContent: SYMBOLS[mark] }),
      element("span", { className: "word", textContent: mark }),
    );
    button.addEventListener("click", () => action(mark));
    return button;
  });
  return element("div", { className: "marks", role: "group", "aria-label": "Mark" }, ...buttons);
}
