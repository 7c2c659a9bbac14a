// SPDX-License-Identifier: Apache-2.0
// Keys, menus, and the start.

const keys = (() => {
  const find = (id) => document.getElementById(id);

  function go(places) {
    setCurrent(cards.neighbour(places));
    if (!detail.isOpen()) cards.focus();
  }

  function mark(kind) {
    const next = cards.neighbour(1); // before a filter hides the image that is being marked
    if (setMark(state.current, kind)) setCurrent(next);
    if (!detail.isOpen()) cards.focus();
  }

  const ACTIONS = {
    g: () => mark("good"),
    d: () => mark("defect"),
    u: () => mark("unsure"),
    n: () => go(1),
    b: () => go(-1),
    z: undo,
    ArrowRight: () => go(1),
    ArrowLeft: () => go(-1),
    ArrowDown: () => go(detail.isOpen() ? 1 : cards.columns()),
    ArrowUp: () => go(detail.isOpen() ? -1 : -cards.columns()),
  };
  const IN_DETAIL = {
    "+": detail.zoomIn,
    "=": detail.zoomIn,
    "-": detail.zoomOut,
    0: detail.fit,
    h: detail.toggleHeat,
    o: detail.toggleOutline,
    1: () => detail.compare(0),
    2: () => detail.compare(1),
    3: () => detail.compare(2),
  };

  document.addEventListener("keydown", (event) => {
    const isUndo = event.key === "z" && (event.ctrlKey || event.metaKey);
    const isField = event.target.matches(
      event.key.startsWith("Arrow") ? "select, input" : "select, input[type=number]",
    );
    if (isField || event.altKey || ((event.ctrlKey || event.metaKey) && !isUndo)) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const action = ACTIONS[key] ?? (detail.isOpen() ? IN_DETAIL[key] : undefined);
    if (!action) return;
    event.preventDefault();
    action();
    if (key === "z" && !detail.isOpen()) cards.focus();
  });

  document.addEventListener("keyup", (event) => detail.isOpen() && "123".includes(event.key) && detail.compare(null));

  find("cards").addEventListener("focusin", (event) => {
    const rank = event.target.closest("li")?.dataset.rank;
    if (rank !== undefined && Number(rank) !== state.current) setCurrent(Number(rank));
  });
  for (const [id, redo] of [
    ["order", cards.arrange],
    ["filter", cards.filter],
  ]) {
    find(id).value = state[id];
    find(id).addEventListener("change", (event) => {
      state[id] = event.target.value;
      redo();
    });
  }
  for (const button of document.querySelectorAll("button.group"))
    button.addEventListener("click", () => {
      find("filter").value = button.value;
      find("filter").dispatchEvent(new Event("change"));
      find("cards").scrollIntoView();
    });
  const narrow = matchMedia("(max-width: 800px)"); // there, the images come before all this
  const fold = () => (find("more").open = !narrow.matches);
  narrow.addEventListener("change", fold);
  fold();
  // Another page of the same pool, in another tab.
  window.addEventListener("storage", (event) => {
    if (event.key !== storageKey) return;
    load();
    changed("marks");
    changed("threshold");
  });

  return { mark };
})();

load();
histogram.draw();
cards.start();
detail.start();
changed("threshold");
changed("marks");
