// Prometheus's text format, and what happened between two looks at it.

const LINE = /^(\w+)(?:\{(.*)\})? (\S+)$/;

/** The text of /metrics at a time in seconds -> what was counted until then. */
export function sample(text, at) {
  const series = text.split("\n").flatMap((line) => {
    const [, name, labels = "", value] = LINE.exec(line) ?? [];
    return name ? [{ name, labels, value: Number(value) }] : [];
  });
  /** The sum over all series of this name whose labels fit. */
  const sum = (name, labels = /(?:)/) =>
    series.reduce((total, one) => (one.name === name && labels.test(one.labels) ? total + one.value : total), 0);
  return { at, sum, started: sum("imago_process_start_time_seconds"), since: (before) => between(before, { at, sum }) };
}

/** Rates and means of the time between two samples; null where nothing happened of which a mean could be taken. */
function between(before, now) {
  const seconds = now.at - before.at;
  const more = (name, labels) => now.sum(name, labels) - before.sum(name, labels);
  const rate = (name, labels) => more(name, labels) / seconds;
  const mean = (name, labels) => {
    const count = more(`${name}_count`, labels);
    return count > 0 ? more(`${name}_sum`, labels) / count : null;
  };
  const stage = (name) => {
    const s = mean("imago_stage_seconds", new RegExp(`stage="${name}"`));
    return s === null ? null : 1000 * s;
  };
  return {
    at: now.at,
    images: rate("imago_images_total", /outcome="ok"/),
    waiting: now.sum("imago_waiting_images"),
    batch: mean("imago_batch_size"),
    stages: { decode: stage("decode"), queue: stage("queue"), compute: stage("compute") },
    requests: rate("imago_requests_total"),
    failed: rate("imago_requests_total", /status="[45]/),
    memory: now.sum("imago_process_resident_memory_bytes"),
    device: now.sum("imago_device_memory_total_bytes") ? now.sum("imago_device_memory_used_bytes") : null,
    cores: rate("imago_process_cpu_seconds_total"),
  };
}
