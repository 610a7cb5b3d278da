// Numbers as people read them, with their units on the same line.

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;
export const count = (number) => number.toLocaleString("en");
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export function bytes(size) {
  for (const unit of ["B", "KB", "MB"]) {
    if (size < 1024) return `${unit === "B" ? size : size.toFixed(size < 10 ? 1 : 0)}\u00a0${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)}\u00a0GB`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))}\u00a0s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes}\u00a0min` : `${Math.floor(minutes / 60)} h ${minutes % 60}\u00a0min`;
}

export const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)}\u00a0ms`;

export const moment = (iso) => new Date(iso).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

/** A model's accuracy in words, from its `metrics`: of the test part, else of validation, else as its publisher says. */
export function accuracy(metrics = {}) {
  const [part, found] = metrics.test ? ["test", metrics.test] : ["validation", metrics.val];
  if (found?.accuracy !== undefined) {
    const [low, high] = found.interval ?? [];
    const interval = low === undefined ? "" : ` (${percent(low)} to ${percent(high)})`;
    return `${percent(found.accuracy)}${interval} of ${count(found.images)} ${part} images`;
  }
  const published = metrics["acc@1"];
  return published === undefined ? "accuracy not known" : `${published.toFixed(1)} % on ImageNet, says its publisher`;
}
