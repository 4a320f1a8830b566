// Axes: where a value lies, which ticks are round, how a long line is thinned without losing its peaks.

/** About `wanted` round numbers between low and high. */
export function ticks(low, high, wanted = 4) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((each) => each * power >= rough * 0.999) * power;
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-6);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** [low, high] around the values, from 0 where that does not squeeze them. */
export function extent(values, { log = false } = {}) {
  let low = Infinity, high = -Infinity;
  for (const value of values)
    if (typeof value === "number" && (!log || value > 0)) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  const isOne = high - low <= Math.max(Math.abs(low), Math.abs(high)) * 1e-9; // but for rounding
  if (log) return isOne ? [low / 2, high * 2] : [low / 1.2, high * 1.2];
  if (low >= 0 && low <= high * 0.6) low = 0;
  if (high <= 0 && high >= low * 0.6) high = 0;
  if (isOne) return low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const room = (high - low) * 0.06;
  return [low === 0 ? 0 : low - room, high === 0 ? 0 : high + room];
}

export function scale([low, high], [from, to], log = false) {
  const bend = log ? Math.log10 : (value) => value;
  const start = bend(low), span = bend(high) - start || 1;
  return (value) => from + ((bend(value) - start) / span) * (to - from);
}

export function logTicks(low, high) {
  const found = [];
  for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power++) found.push(10 ** power);
  return found.length > 4 ? found.filter((_, i) => i % Math.ceil(found.length / 4) === 0) : found;
}

/** Index of the value in ascending `xs` that is nearest to x. */
export function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

/** Indices to draw so that at most four points fall on a pixel: first, least, greatest, last of each. */
export function thinned(xs, ys, start, end, pixels) {
  const all = end - start;
  if (all <= pixels * 4) return Array.from({ length: all }, (_, i) => start + i);
  const kept = new Set();
  for (let pixel = 0; pixel < pixels; pixel++) {
    const a = start + Math.floor((all * pixel) / pixels), b = start + Math.floor((all * (pixel + 1)) / pixels);
    let least = a, most = a;
    for (let i = a; i < b; i++) {
      if (ys[i] < ys[least] || typeof ys[least] !== "number") least = i;
      if (ys[i] > ys[most] || typeof ys[most] !== "number") most = i;
    }
    for (const i of [a, least, most, b - 1]) kept.add(i);
  }
  return [...kept].sort((a, b) => a - b);
}

/** Exponential moving average, debiased at its start; gaps stay gaps. */
export function smoothed(values, weight = 0.8) {
  let total = 0, norm = 0;
  return values.map((value) => {
    if (typeof value !== "number") return null;
    total = weight * total + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return total / norm;
  });
}
