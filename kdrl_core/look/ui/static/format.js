// Numbers and names as people read them. Missing values are an en dash.

const NONE = "–";
const grouped = new Intl.NumberFormat("en-US");

/** A number with about four significant digits; text (inf, nan) as it is. */
export function number(value) {
  if (value === null || value === undefined) return NONE;
  return typeof value === "number" ? plain(value).replace(/^-/, "−") : String(value);
}

function plain(value) {
  if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? grouped.format(value) : String(value);
  const size = Math.abs(value);
  if (size >= 1000) return grouped.format(Math.round(value));
  return size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(size >= 1 ? 4 : 3)));
}

export const fixed = (value, digits) => (typeof value === "number" ? value.toFixed(digits).replace("-", "−") : value ?? NONE);
export const signed = (value, digits = 2) =>
  typeof value === "number" ? (value > 0 ? "+" : "") + value.toFixed(digits).replace("-", "−") : value ?? NONE;
export const percent = (value) =>
  typeof value === "number" ? `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %` : NONE;
export const count = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;

export const VERDICTS = ["correct", "wrong", "malformed", "no_answer", "timeout", "error"];
export const verdictClass = (verdict) => (VERDICTS.includes(verdict) ? `verdict ${verdict}` : "verdict");
