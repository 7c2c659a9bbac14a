// SPDX-License-Identifier: Apache-2.0
// Counts, and once enough images are marked, what the marks say of the threshold.

{
  const find = (id) => document.getElementById(id);
  const input = find("threshold-value");

  function count() {
    const flagged = countAbove(pool.scores, state.threshold);
    find("flagged").textContent = flagged.toLocaleString("en");
    find("unflagged").textContent = (pool.scores.length - flagged).toLocaleString("en");
    if (document.activeElement !== input) input.value = shortest(state.threshold);
    find("reset").disabled = state.threshold === pool.threshold;
    find("paste-present")?.replaceChildren(...paste(state.threshold));
  }

  function paste(threshold) {
    const code = element("code", { textContent: `${pool.argument}=${shortest(threshold, pool.argumentScale)}` });
    const button = element("button", { type: "button", textContent: "Copy", "aria-label": `Copy ${code.textContent}` });
    button.addEventListener("click", async () => {
      getSelection().selectAllChildren(code); // what is left to the person where the browser does not copy
      try {
        await navigator.clipboard.writeText(code.textContent);
        say("Copied");
      } catch {
        say(document.execCommand("copy") ? "Copied" : "Selected: copy it with the keyboard");
      }
    });
    return [code, button];
  }

  function tally() {
    const marks = Object.values(state.marks);
    const parts = MARKS.map((mark) =>
      element(
        "span",
        { className: mark },
        `${SYMBOLS[mark]} ${marks.filter((other) => other === mark).length} ${mark}`,
      ),
    );
    find("tally").replaceChildren(...parts);
    find("undo").disabled = !state.history.length;
    find("export-marks").disabled = find("export-list").disabled = !marks.length;
  }

  function fit() {
    const images = surelyMarked();
    const missing = ENOUGH_MARKS - images.length;
    const best = bestThreshold(images);
    if (missing > 0)
      return [
        element("p", {
          className: "dim",
          textContent: `Mark ${missing} more good or defect for precision and recall, best some on both sides of the threshold.`,
        }),
      ];
    const columns = [["Now", state.threshold]];
    if (best !== null) columns.push(["Best fit", best]);
    const measured = columns.map(([, threshold]) => agreement(images, threshold));
    const row = (name, values) =>
      element(
        "tr",
        {},
        element("th", { scope: "row", textContent: name }),
        ...values.map((value) => element("td", { textContent: value })),
      );
    const table = element(
      "table",
      {},
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          element("th", { scope: "col", textContent: `${images.length} marks` }),
          ...columns.map(([name]) => element("th", { scope: "col", textContent: name })),
        ),
      ),
      element(
        "tbody",
        {},
        row(
          "Threshold",
          columns.map(([, threshold]) => shortest(threshold)),
        ),
        row(
          "Precision",
          measured.map(({ precision }) => formatShare(precision)),
        ),
        row(
          "Recall",
          measured.map(({ recall }) => formatShare(recall)),
        ),
        row(
          "Flagged in all",
          columns.map(([, threshold]) => countAbove(pool.scores, threshold)),
        ),
      ),
    );
    return best === null
      ? [
          table,
          element("p", {
            className: "dim",
            textContent: "For a best fit, mark at least one good image and one defect.",
          }),
        ]
      : [table, ...advise(best, images)];
  }

  function advise(best, images) {
    const use = element("button", { type: "button", id: "use-best", textContent: "Use the best fit" });
    use.addEventListener("click", () => setThreshold(best));
    const below = images.filter(({ rank }) => !isFlagged(rank)).length;
    const caution = below ? "" : " No marked image lies below the threshold: recall cannot be told before some are.";
    const text = `Best fit: the highest F1 score over your marks, midway between the two neighbouring ones.${caution}`;
    return [
      ...(pool.argument ? [element("div", { className: "paste", id: "paste-best" }, ...paste(best))] : []),
      element("p", { className: "row" }, use),
      element("p", { className: "dim small", textContent: text }),
    ];
  }

  function update() {
    count();
    tally();
    find("fit").replaceChildren(...fit());
  }

  input.addEventListener("change", () =>
    setThreshold(input.value.trim() === "" ? pool.threshold : Number(input.value)),
  );
  input.addEventListener("blur", count);
  find("reset").addEventListener("click", () => setThreshold(pool.threshold));
  find("undo").addEventListener("click", undo);
  changes.addEventListener("threshold", update);
  changes.addEventListener("marks", update);
}
