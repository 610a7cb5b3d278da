// Lines over time, by uPlot, in the page's colours.

import { html, useEffect, useRef, useState } from "./page.js";

const DARK = matchMedia("(prefers-color-scheme: dark)");
const COLOURS = ["--accent", "--c1", "--c2"];

/** `x` and each of `series` ({label, values, said}) are arrays of one length, with null where nothing is known; `label` says it all in words. */
export function Plot({ label, x, series, height = 190, time = false, spark = false }) {
  const box = useRef(null);
  const plot = useRef(null);
  const dark = useDark();
  useEffect(() => {
    plot.current = new uPlot(options(box.current, series, height, time, spark), null, box.current);
    const observer = new ResizeObserver(() => plot.current.setSize({ width: box.current.clientWidth, height }));
    observer.observe(box.current);
    return () => {
      observer.disconnect();
      plot.current.destroy();
    };
  }, [dark, series.length, height, time]);
  useEffect(() => plot.current.setData([x, ...series.map((one) => one.values)]), [x, series, dark]);
  return html`<figure class="plot">
    <figcaption>
      ${series.map((one, i) => html`<span class="key key${i}">${one.label}${one.said && html` <b class="number">${one.said}</b>`}</span>`)}
    </figcaption>
    <div ref=${box} role="img" aria-label=${label}></div>
  </figure>`;
}

function useDark() {
  const [dark, set] = useState(DARK.matches);
  useEffect(() => {
    const changed = () => set(DARK.matches);
    DARK.addEventListener("change", changed);
    return () => DARK.removeEventListener("change", changed);
  }, []);
  return dark;
}

/** From the first to the last; of a single point, of which uPlot would show years, the minute before it. */
const span = ({ data: [x] }, low, high) => (x?.length === 1 ? [low - 60, low] : [low, high]);

function options(box, series, height, time, spark) {
  const colour = (name) => getComputedStyle(box).getPropertyValue(name).trim();
  const axis = { stroke: colour("--faint"), grid: { stroke: colour("--rule"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  return {
    width: box.clientWidth,
    height,
    legend: { show: false },
    cursor: { show: !spark, drag: { x: false, y: false } },
    scales: { x: { time, range: time ? span : undefined }, y: { range: (_, low, high) => [Math.min(0, low ?? 0), (high || 1) * 1.08] } },
    axes: [
      { ...axis, grid: { show: false }, size: spark ? 22 : 30, space: 70 },
      { ...axis, size: 46, space: spark ? 26 : 40 },
    ],
    series: [
      {},
      ...series.map((one, i) => ({
        label: one.label,
        stroke: colour(COLOURS[i]),
        fill: spark && series.length === 1 ? `${colour(COLOURS[i])}22` : undefined,
        width: 2,
        spanGaps: true,
        points: { show: !spark, size: 5 },
      })),
    ],
  };
}
