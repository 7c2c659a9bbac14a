// SPDX-License-Identifier: Apache-2.0
// Heatmaps and outlines, from grids whose first and last values lie on the image's edges.

// Colours of the scale from its low end to its high one; low values are transparent.
const STOPS = [
  [0, 0, 4],
  [31, 12, 72],
  [85, 15, 109],
  [136, 34, 106],
  [186, 54, 85],
  [227, 89, 51],
  [249, 140, 10],
  [249, 201, 50],
  [252, 255, 164],
];
const COLOURS = Array.from({ length: 256 }, (_, level) => {
  const place = (level / 255) * (STOPS.length - 1);
  const first = Math.min(Math.floor(place), STOPS.length - 2);
  const mixed = STOPS[first].map((value, channel) => value + (place - first) * (STOPS[first + 1][channel] - value));
  return [...mixed, Math.min(255, 1.6 * level)];
});

const levelOf = (value) => {
  const [low, high] = pool.mapRange;
  return Math.max(0, Math.min(1, (value - low) / (high - low || 1)));
};

// Bilinear, onto a canvas in the image's proportions.
function drawHeatmap(canvas, map, ratio) {
  [canvas.width, canvas.height] =
    ratio > 1 ? [256, Math.max(2, Math.round(256 / ratio))] : [Math.max(2, Math.round(256 * ratio)), 256];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  for (let y = 0, pixel = 0; y < canvas.height; y++) {
    const row = (y / (canvas.height - 1)) * (map.rows - 1);
    for (let x = 0; x < canvas.width; x++, pixel += 4) {
      const value = interpolate(map, row, (x / (canvas.width - 1)) * (map.columns - 1));
      pixels.data.set(COLOURS[Math.round(255 * levelOf(value))], pixel);
    }
  }
  context.putImageData(pixels, 0, 0);
}

function interpolate({ values, rows, columns }, row, column) {
  const [top, left] = [Math.min(Math.floor(row), rows - 2), Math.min(Math.floor(column), columns - 2)];
  const [down, right] = [row - top, column - left];
  const start = top * columns + left;
  const upper = values[start] + right * (values[start + 1] - values[start]);
  const lower = values[start + columns] + right * (values[start + columns + 1] - values[start + columns]);
  return upper + down * (lower - upper);
}

// Between which sides of a cell (0 above, 1 right, 2 below, 3 left) the outline runs, by which corners lie above the
// level: 8 upper left, 4 upper right, 2 lower right, 1 lower left. 5 and 10 are saddles, see below.
const SIDES = [
  [],
  [[3, 2]],
  [[2, 1]],
  [[3, 1]],
  [[0, 1]],
  [
    [3, 0],
    [2, 1],
  ],
  [[0, 2]],
  [[3, 0]],
  [[3, 0]],
  [[0, 2]],
  [
    [0, 1],
    [3, 2],
  ],
  [[0, 1]],
  [[3, 1]],
  [[2, 1]],
  [[3, 2]],
  [],
];

// An SVG path around what lies above a level, closed along the image's edges (marching squares).
function outline({ rows, columns, values }, level, width, height) {
  const inside = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns;
  const value = (row, column) => (inside(row, column) ? values[row * columns + column] : level - 1);
  const x = (column) => (Math.max(0, Math.min(columns - 1, column)) / (columns - 1)) * width;
  const y = (row) => (Math.max(0, Math.min(rows - 1, row)) / (rows - 1)) * height;
  const between = (one, other, a, b) => one + ((level - a) / (b - a)) * (other - one);
  let path = "";
  for (let row = -1; row < rows; row++) {
    for (let column = -1; column < columns; column++) {
      const [a, b, c, d] = [
        value(row, column),
        value(row, column + 1),
        value(row + 1, column + 1),
        value(row + 1, column),
      ];
      let corners = 8 * (a > level) + 4 * (b > level) + 2 * (c > level) + (d > level);
      if ((corners === 5 || corners === 10) && (a + b + c + d) / 4 <= level) corners = 15 - corners;
      const crossing = (side) =>
        [
          () => [between(x(column), x(column + 1), a, b), y(row)],
          () => [x(column + 1), between(y(row), y(row + 1), b, c)],
          () => [between(x(column), x(column + 1), d, c), y(row + 1)],
          () => [x(column), between(y(row), y(row + 1), a, d)],
        ]
          [side]()
          .map((number) => number.toFixed(2));
      for (const [from, to] of SIDES[corners]) path += `M${crossing(from)}L${crossing(to)}`;
    }
  }
  return path;
}

// Put the outline of a flagged image into an <svg> with two paths, a dark one below a bright one; of others, none.
function drawOutline(svg, rank, isShown = true) {
  const [width, height] = numbersOf(slotOf(rank), "size");
  const map = mapOf(rank);
  const level = pool.pixelThreshold ?? pool.regionFraction * map.high;
  const path = isShown && isFlagged(rank) ? outline(map, level, width, height) : "";
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const line of svg.children) line.setAttribute("d", path);
}
