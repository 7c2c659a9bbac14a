// SPDX-License-Identifier: Apache-2.0
// Counts, precision and recall of the marks, and the threshold that fits them best.

const ENOUGH_MARKS = 20;

// How many scores of a descending list lie above a threshold.
function countAbove(scores, threshold) {
  let [low, high] = [0, scores.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (scores[middle] > threshold) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Thresholds midway between neighbouring scores, descending, with one above all and one below.
function cutsOf(scores) {
  const margin = (scores[0] - scores.at(-1)) / 50 || Math.abs(scores[0]) / 50 || 0.5;
  const cuts = [scores[0] + margin];
  for (let rank = 1; rank < scores.length; rank++) {
    if (scores[rank - 1] > scores[rank]) cuts.push(midway(scores[rank], scores[rank - 1]));
  }
  return [...cuts, scores.at(-1) - margin];
}

// Not below the lower one and below the upper one, whatever the rounding.
function midway(lower, upper) {
  const middle = lower + (upper - lower) / 2;
  return middle < upper ? middle : lower;
}

// Images marked good or defect, by descending score.
function surelyMarked() {
  return Object.entries(state.marks)
    .filter(([, mark]) => mark !== "unsure")
    .map(([rank, mark]) => ({ rank: Number(rank), score: pool.scores[rank], isDefect: mark === "defect" }))
    .sort((one, other) => other.score - one.score);
}

// Precision is NaN where nothing is flagged, recall where there is no defect.
function agreement(images, threshold) {
  const flagged = images.filter(({ score }) => score > threshold);
  const found = flagged.filter(({ isDefect }) => isDefect).length;
  const defects = images.filter(({ isDefect }) => isDefect).length;
  return { precision: found / flagged.length, recall: found / defects, f1: (2 * found) / (flagged.length + defects) };
}

// The threshold of the highest F1 score, midway between neighbouring marked images; of equals that in the widest gap.
// null unless there are images of both kinds.
function bestThreshold(images) {
  const defects = images.filter(({ isDefect }) => isDefect).length;
  if (!defects || defects === images.length) return null;
  let best = { f1: -1, gap: 0 };
  let found = 0;
  images.forEach(({ score, isDefect }, index) => {
    found += isDefect;
    const next = images[index + 1]?.score;
    if (next === score) return; // equal scores stay together
    const f1 = (2 * found) / (index + 1 + defects);
    const gap = score - (next ?? score);
    const below = next ?? pool.scores.find((other) => other < score) ?? score - 1e-6 * Math.max(Math.abs(score), 1);
    if (f1 > best.f1 || (f1 === best.f1 && gap > best.gap)) best = { f1, gap, threshold: midway(below, score) };
  });
  return best.threshold;
}

// A threshold, times the slope plus the offset, in as few digits as leave every image of the pool on its side.
function shortest(threshold, [slope, offset] = [1, 0]) {
  const count = countAbove(pool.scores, threshold);
  const [above, below] = [pool.scores[count - 1] ?? Infinity, pool.scores[count] ?? -Infinity];
  for (let digits = 3; digits < 17; digits++) {
    const value = Number((slope * threshold + offset).toPrecision(digits));
    if (value < slope * above + offset && value >= slope * below + offset) return String(value);
  }
  return String(slope * threshold + offset);
}

// As many decimals as tell scores apart that differ by a five-hundredth of the pool's range.
const decimals = (() => {
  const range = pool.scores[0] - pool.scores.at(-1) || Math.abs(pool.scores[0]) || 1;
  return Math.min(9, Math.max(0, 2 - Math.floor(Math.log10(range))));
})();
const formatScore = (score) => score.toFixed(decimals);
const formatShare = (share) => (Number.isNaN(share) ? "–" : `${Math.round(100 * share)} %`);
