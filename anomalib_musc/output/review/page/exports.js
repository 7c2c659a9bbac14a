// SPDX-License-Identifier: Apache-2.0
// The marks as files.

{
  const field = (value) => (/[",\r\n]|^\s|\s$/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const table = (rows) => rows.map((row) => `${row.map((value) => field(String(value))).join(",")}\r\n`).join("");
  const marked = () =>
    Object.keys(state.marks)
      .map(Number)
      .sort((one, other) => one - other);
  const stem =
    pool.name
      .replace(/[^\p{L}\p{N}._-]+/gu, "_")
      .replace(/^[._]+/, "")
      .slice(0, 80) || "review";

  function download(name, text) {
    const url = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    element("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }

  // Begins with a byte-order mark, as spreadsheets need it.
  function exportMarks() {
    const rows = marked().map((rank) => [
      pathOf(rank),
      rank + 1,
      pool.scores[rank],
      isFlagged(rank) ? "anomalous" : "normal",
      state.marks[rank],
    ]);
    download(`${stem}_marks.csv`, `\ufeff${table([["path", "rank", "score", "label", "mark"], ...rows])}`);
    say(`${rows.length} marks exported`);
  }

  // As anomalib's Tabular reads it: 0 is normal, 1 anomalous; who is unsure trains on nothing.
  function exportList() {
    const unlisted = new Set(pool.unlisted);
    const sure = marked().filter((rank) => state.marks[rank] !== "unsure");
    const listed = sure.filter((rank) => !unlisted.has(rank));
    const rows = listed.map((rank) => [
      pool.absoluteRoot + pool.names[rank],
      ...(state.marks[rank] === "good" ? [0, "train"] : [1, "test"]),
    ]);
    download(`${stem}_anomalib.csv`, table([["image_path", "label_index", "split"], ...rows]));
    const left = sure.length - listed.length;
    say(`${rows.length} images listed${left ? `, ${left} left out: no text holds their names` : ""}`);
  }

  document.getElementById("export-marks").addEventListener("click", exportMarks);
  document.getElementById("export-list").addEventListener("click", exportList);
}
