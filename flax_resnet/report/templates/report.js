// Draws the curves from the numbers in the page: values where one points, zoom by dragging, and
// lines that a tick turns off. Enlarges pictures.
"use strict";

const {charts, runs, markers} = JSON.parse(document.getElementById("drawn").textContent);
const MARGIN = {left: 52, right: 10, top: 8, bottom: 36};
const MOST_MARKERS = 12; // on a line; more would hide it
const views = {}; // by what x is, "epoch" or "step": [first, last] where zoomed

function isShown(line) {
  return [`run="${line.run}"`, `split="${line.split}"`].every((name) => {
    const box = document.querySelector(`input[data-${name}]`);
    return !box || box.checked;
  });
}

function format(value, digits = 4) {
  return value.toLocaleString("en", {maximumSignificantDigits: digits});
}

function makeScale([low, high], from, to, log) {
  const f = log ? Math.log10 : Number;
  const span = f(high) - f(low) || 1;
  return (value) => from + ((f(value) - f(low)) / span) * (to - from);
}

// Round numbers in a range: 1, 2 or 5 times a power of ten apart, or on a logarithmic axis.
function ticks([low, high], count, log, least = 0) {
  if (log && high / low > 4) {
    const factors = high / low > 100 ? [1] : [1, 2, 5];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      found.push(...factors.map((factor) => factor * 10 ** power));
    }
    return found.filter((tick) => tick >= low && tick <= high);
  }
  const rough = Math.max((high - low) / count, least);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({length: last - first + 1}, (_, i) => (first + i) * step);
}

// The smallest range with all values, and with some air where it is `wide`.
function rangeOf(values, log, wide) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low === high) return log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  if (!wide) return [low, high];
  const air = log ? (high / low) ** 0.05 : (high - low) * 0.05;
  return log ? [low / air, high * air] : [low - air, high + air];
}

function draw(chart) {
  const {svg, x} = chart;
  const width = svg.clientWidth;
  const height = svg.clientHeight;
  const log = chart.box.checked;
  const [first, last] = views[x] || rangeOf(chart.lines.flatMap((line) => line.x));
  chart.points = chart.lines.filter(isShown).map((line) => ({
    ...line,
    at: line.x.flatMap((at, i) =>
      at >= first && at <= last && (!log || line.y[i] > 0) ? [[at, line.y[i]]] : []),
  })).filter((line) => line.at.length);
  const values = chart.points.flatMap((line) => line.at.map((point) => point[1]));
  if (!values.length) {
    svg.innerHTML = `<text x="${width / 2}" y="${height / 2}" text-anchor="middle">nothing to show</text>`;
    return;
  }
  const yRange = rangeOf(values, log, true);
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  chart.toX = makeScale([first, last], MARGIN.left + 6, right - 6, false);
  chart.toY = makeScale(yRange, bottom, MARGIN.top, log);
  chart.toValue = (px) => first + ((px - MARGIN.left - 6) / (right - MARGIN.left - 12)) * (last - first);

  let drawn = "";
  for (const tick of ticks(yRange, 5, log)) {
    const y = chart.toY(tick);
    drawn += `<path class="grid" d="M${MARGIN.left},${y}H${right}"/>`
      + `<text x="${MARGIN.left - 6}" y="${y + 4}" text-anchor="end">${format(tick, 9)}</text>`;
  }
  for (const tick of ticks([first, last], Math.max(2, width / 70), false, 1)) {
    drawn += `<text x="${chart.toX(tick)}" y="${bottom + 17}" text-anchor="middle">${format(tick, 9)}</text>`;
  }
  drawn += `<text x="${(MARGIN.left + right) / 2}" y="${height - 3}" text-anchor="middle">${x}</text>`;
  for (const line of chart.points) {
    const at = line.at.map(([px, py]) => `${chart.toX(px).toFixed(1)},${chart.toY(py).toFixed(1)}`);
    const {color, marker} = runs[line.run];
    const every = Math.ceil(at.length / MOST_MARKERS);
    const marks = at.filter((_, i) => i % every === 0).map((one) => "M" + one + markers[marker]);
    const style = `style="color: var(--run${color})" stroke="currentColor"`;
    const dashed = line.split === "train";
    drawn += `<path class="line${dashed ? " dashed" : ""}" ${style} d="M${at.join("L")}"/>`;
    if (!dashed || at.length === 1) {
      drawn += `<path class="marks" ${style} fill="currentColor" d="${marks.join("")}"/>`;
    }
  }
  svg.innerHTML = drawn + '<path class="cross"/><rect class="chosen" height="0"/>';
}

// The values nearest to x, beside the pointer in the chart that it is in.
function point(chart, value, isHere) {
  if (!chart.points.length) return;
  let nearest = Infinity;
  for (const line of chart.points) {
    for (const [at] of line.at) {
      if (Math.abs(at - value) < Math.abs(nearest - value)) nearest = at;
    }
  }
  const px = chart.toX(nearest);
  chart.svg.querySelector(".cross").setAttribute(
    "d", `M${px},${MARGIN.top}V${chart.svg.clientHeight - MARGIN.bottom}`);
  chart.tip.hidden = !isHere;
  if (!isHere) return;
  chart.at = nearest;
  const table = document.createElement("table");
  table.createCaption().textContent = `${chart.x} ${format(nearest, 9)}`;
  for (const line of chart.points) {
    const found = line.at.find(([at]) => at === nearest);
    if (!found) continue;
    const row = table.insertRow();
    const sign = row.insertCell();
    sign.textContent = line.split === "train" ? "╌" : "━";
    sign.style.color = `var(--run${runs[line.run].color})`;
    row.insertCell().textContent = [runs.length > 1 ? runs[line.run].name : "", line.split]
      .filter(Boolean).join(", ");
    row.insertCell().textContent = format(found[1]);
  }
  chart.tip.replaceChildren(table);
  const isLeft = px > chart.svg.clientWidth / 2;
  chart.tip.style.left = isLeft ? "auto" : `${px + 12}px`;
  chart.tip.style.right = isLeft ? `${chart.svg.clientWidth - px + 12}px` : "auto";
}

function pointAll(chart, value) {
  for (const other of charts) {
    if (other.x === chart.x) point(other, value, other === chart);
  }
}

function leave() {
  for (const {svg, tip} of charts) {
    tip.hidden = true;
    svg.querySelector(".cross")?.setAttribute("d", "");
  }
}

function zoom(x, view) {
  views[x] = view;
  document.getElementById("all").hidden = !Object.values(views).some(Boolean);
  leave();
  charts.forEach(draw);
}

function zoomOut() {
  Object.keys(views).forEach((x) => zoom(x, null));
}

function watch(chart) {
  const {svg} = chart;
  let start = null;
  const place = (event) => event.clientX - svg.getBoundingClientRect().left;
  svg.addEventListener("pointerdown", (event) => {
    start = place(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!chart.points.length) return;
    const here = place(event);
    pointAll(chart, chart.toValue(here));
    if (start === null) return;
    const chosen = svg.querySelector(".chosen");
    const sides = {x: Math.min(start, here), width: Math.abs(here - start), y: MARGIN.top,
      height: svg.clientHeight - MARGIN.top - MARGIN.bottom};
    Object.entries(sides).forEach(([name, value]) => chosen.setAttribute(name, value));
  });
  svg.addEventListener("pointerup", (event) => {
    const sides = [start ?? place(event), place(event)].sort((a, b) => a - b);
    start = null;
    if (sides[1] - sides[0] > 8) zoom(chart.x, sides.map(chart.toValue));
  });
  svg.addEventListener("pointercancel", () => { start = null; });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("dblclick", zoomOut);
  svg.addEventListener("keydown", ({key}) => {
    const steps = {ArrowLeft: -1, ArrowRight: 1};
    if (key === "Escape") zoomOut();
    if (!(key in steps) || !chart.points.length) return;
    const places = [...new Set(chart.points.flatMap((line) => line.at.map(([at]) => at)))];
    places.sort((a, b) => a - b);
    const now = places.indexOf(chart.at);
    pointAll(chart, places[Math.min(Math.max(now + steps[key], 0), places.length - 1)]);
  });
}

for (const chart of charts) {
  const figure = document.createElement("figure");
  figure.className = "chart";
  figure.innerHTML = '<label><input type="checkbox"> logarithmic</label><figcaption></figcaption>'
    + '<svg class="plot" tabindex="0" role="img"></svg><div class="tip" hidden></div>';
  figure.querySelector("figcaption").textContent = chart.name;
  chart.svg = figure.querySelector("svg");
  chart.svg.setAttribute("aria-label", `${chart.name} by ${chart.x}; arrow keys go along it`);
  chart.tip = figure.querySelector(".tip");
  chart.box = figure.querySelector("input");
  chart.box.checked = chart.log;
  document.getElementById("charts").append(figure);
  watch(chart);
  new ResizeObserver(() => draw(chart)).observe(chart.svg);
}
document.addEventListener("change", () => charts.forEach(draw));
document.getElementById("all")?.addEventListener("click", zoomOut);

const large = document.getElementById("large");
for (const button of document.querySelectorAll("button.picture")) {
  button.addEventListener("click", () => {
    large.replaceChildren(button.parentElement.cloneNode(true));
    large.showModal();
  });
}
large.addEventListener("click", () => large.close());
