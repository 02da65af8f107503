// Hand-drawn SVG: small multiples of states and chunks, the ribbon of subtasks, the bars of latencies. Nothing here fetches or remembers.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}

/** Milliseconds for people. */
export function ms(value) {
  if (value == null) return "–";
  if (value >= 9995) return `${(value / 1000).toFixed(1)} s`;
  if (value >= 999.5) return `${(value / 1000).toFixed(2)} s`;
  return `${value.toFixed(value < 9.95 ? 1 : 0)} ms`;
}

/** Seconds for people. */
export function duration(seconds) {
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.round(minutes / 60)} h`;
}

/** Seconds from one chunk's step to the next, if the robot does a whole chunk between two requests; null where nobody can tell. */
export function stepSeconds(chunks) {
  const gaps = [];
  for (let i = 1; i < chunks.length; i += 1) gaps.push((chunks[i][0] - chunks[i - 1][0]) / chunks[i - 1][1].length);
  if (!gaps.length) return null;
  gaps.sort((a, b) => a - b);
  return Math.min(1, Math.max(1 / 500, gaps[Math.floor(gaps.length / 2)]));
}

function number(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

/**
 * One plot per dimension: what was commanded, and, where `states` are of the same width, what was observed.
 *
 * @param {HTMLElement} container
 * @param {{chunks: [number, number[][]][], states: [number, number[]][], step: number, shown: number}} data times in seconds; `step` between two
 *     commands of a chunk; `shown` how many dimensions to draw.
 */
export function drawDimensions(container, { chunks, states, step, shown }) {
  const [from, newest] = chunks[chunks.length - 1];
  const dims = newest[0]?.length ?? 0;
  const count = Math.min(dims, shown);
  const ahead = newest.length * step;
  const back = Math.min(30, Math.max(6 * ahead, 5));
  const start = from - back;
  const end = from + ahead;
  container.classList.toggle("few", count <= 4);
  while (container.children.length > count) container.lastChild.remove();
  while (container.children.length < count) {
    const plot = document.createElement("div");
    plot.className = "plot";
    const head = document.createElement("p");
    const name = document.createElement("b");
    name.textContent = `[${container.children.length}]`;
    const values = document.createElement("span");
    head.append(name, values);
    plot.append(head);
    container.append(plot);
  }
  const width = Math.max(120, container.firstChild?.clientWidth ?? 240);
  const height = count <= 4 ? 132 : 92;
  const pad = { left: 34, right: 4, top: 6, bottom: 18 };
  const x = (at) => pad.left + ((at - start) / (end - start)) * (width - pad.left - pad.right);
  // A chunk is drawn until the next one took its place.
  const lines = chunks.map(([at, rows], i) => {
    const until = chunks[i + 1]?.[0] ?? Infinity;
    return rows.map((row, k) => [at + k * step, row]).filter(([t]) => t >= start && t <= Math.max(until, at + step));
  });
  const seen = states.filter(([at]) => at >= start && at <= end);

  for (let d = 0; d < count; d += 1) {
    const plot = container.children[d];
    let low = Infinity;
    let high = -Infinity;
    const widen = (value) => {
      if (value == null) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    };
    for (const line of lines) for (const [, row] of line) widen(row[d]);
    for (const [, state] of seen) widen(state[d]);
    if (low > high) [low, high] = [-1, 1];
    const room = Math.max((high - low) * 0.08, Math.abs(high) * 0.02, 0.01);
    const bottom = low - room;
    const top = high + room;
    const y = (value) => pad.top + ((top - value) / (top - bottom)) * (height - pad.top - pad.bottom);
    const path = (points) => {
      let text = "";
      let pen = false;
      for (const [at, value] of points) {
        if (value == null) {
          pen = false;
          continue;
        }
        text += `${pen ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = true;
      }
      return text;
    };

    const last = seen.length ? seen[seen.length - 1][1][d] : null;
    const goal = newest[newest.length - 1][d];
    const values = plot.firstChild.lastChild;
    values.replaceChildren();
    if (last != null) values.append(span("at", number(last)), " → ");
    values.append(span("to", number(goal)));

    const label = `Dimension ${d}: ${last != null ? `now at ${number(last)}, ` : ""}the newest chunk goes from ${number(newest[0][d])} to ${number(goal)}`;
    const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
    image.append(svg("rect", { class: "future", x: x(from), y: pad.top, width: Math.max(0, x(end) - x(from)), height: height - pad.top - pad.bottom }));
    for (const value of [low, high]) {
      image.append(svg("line", { class: "axis", x1: pad.left, x2: width - pad.right, y1: y(value), y2: y(value) }));
      if (value === high || high - low > room) {
        image.append(svg("text", { x: pad.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, number(value)));
      }
    }
    image.append(svg("line", { class: "now-line", x1: x(from), x2: x(from), y1: pad.top, y2: height - pad.bottom }));
    image.append(svg("text", { x: pad.left, y: height - 5 }, `−${duration(back)}`));
    image.append(svg("text", { x: x(from), y: height - 5, "text-anchor": "middle" }, "now"));
    lines.forEach((line, i) => {
      image.append(svg("path", { class: i === lines.length - 1 ? "chunk newest" : "chunk", d: path(line.map(([at, row]) => [at, row[d]])) }));
    });
    image.append(svg("path", { class: "state-line", d: path(seen.map(([at, state]) => [at, state[d]])) }));
    for (const [at, state] of seen) {
      if (state[d] != null) image.append(svg("circle", { class: "state-dot", cx: x(at).toFixed(1), cy: y(state[d]).toFixed(1), r: seen.length > 60 ? 1.5 : 2.6 }));
    }
    if (plot.children.length > 1) plot.lastChild.replaceWith(image);
    else plot.append(image);
  }
}

function span(name, text) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = text;
  return element;
}

/** The last two minutes of subtasks as one strip; `end` is now or when the robot was last heard of. */
export function drawRibbon(container, subtasks, end) {
  const width = Math.max(120, container.clientWidth);
  const first = subtasks.length ? subtasks[0].began : end;
  const back = Math.min(120, Math.max(10, end - first));
  const start = end - back;
  const x = (at) => ((Math.max(at, start) - start) / back) * width;
  const image = svg("svg", { viewBox: `0 0 ${width} 34`, height: 34, role: "img", "aria-label": `Subtasks of the last ${duration(back)}` });
  subtasks.forEach((subtask, i) => {
    const until = subtasks[i + 1]?.began ?? end;
    if (until <= start) return;
    const left = x(subtask.began);
    const kind = subtask.failed ? "failed" : subtask.done ? "done" : subtask.id % 2 ? "odd" : "even";
    const current = i === subtasks.length - 1 ? " current" : "";
    const piece = svg("rect", { class: `segment ${kind}${current}`, x: left.toFixed(1), y: 2, width: Math.max(1.5, x(until) - left - 2).toFixed(1), height: 14, rx: 3 });
    piece.append(svg("title", {}, `${subtask.text || "no subtask"} (${duration(until - subtask.began)})`));
    image.append(piece);
  });
  image.append(svg("text", { x: 0, y: 30 }, `−${duration(back)}`), svg("text", { x: width, y: 30, "text-anchor": "end" }, "now"));
  container.replaceChildren(image);
}

/** The last requests' times as bars. */
export function drawSpark(container, values) {
  if (values.length < 2) {
    container.replaceChildren();
    return;
  }
  const width = Math.max(120, container.clientWidth);
  const most = Math.max(...values);
  const each = Math.min(6, width / values.length);
  const label = `The last ${values.length} requests, from ${ms(Math.min(...values))} to ${ms(most)}`;
  const image = svg("svg", { viewBox: `0 0 ${width} 52`, height: 52, role: "img", "aria-label": label });
  values.forEach((value, i) => {
    const tall = Math.max(1.5, (value / most) * 36);
    image.append(svg("rect", { class: "bar", x: (width - (values.length - i) * each).toFixed(1), y: (52 - tall).toFixed(1), width: Math.max(0.8, each - 1).toFixed(1), height: tall.toFixed(1), rx: 1 }));
  });
  image.append(svg("text", { x: width, y: 10, "text-anchor": "end" }, `up to ${ms(most)}`), svg("text", { x: 0, y: 10 }, `last ${values.length} requests`));
  container.replaceChildren(image);
}
