// One method's view of one response: its tokens, and the curves of Z_t, c_t, S_t and the bound.
const make = (tag, text = "", className = "") => {
  const element = document.createElement(tag);
  element.textContent = text; // never markup
  element.className = className;
  return element;
};
const short = (x) => x == null || Number.isNaN(x) ? "–" : x === 0 ? "0" : Math.abs(x) >= 1e-3 && Math.abs(x) < 1e4
  ? String(+x.toPrecision(4)) : x.toExponential(2);
const percent = (part, whole) => `${(100 * part / Math.max(whole, 1)).toFixed(2)}%`;

const level = (x, steps) => steps.reduce((count, step) => count + (x >= step), 0);
const RATIO_STEPS = [0.01, 0.05, 0.2, 1], D_STEPS = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3];
const signed = (x, count) => count ? (x > 0 ? "p" : "n") + count : "z";
// What a token's colour tells -> its class, and the legend: [class, label].
const COLOURS = {
  "mask cause": {
    of: (row, mask, t) => `c${mask.cause[t]}`,
    legend: () => [["c1", "token threshold"], ["c2", "prefix"], ["c3", "moves back, kept"], ["c4", "not trained"]],
  },
  divergence: {
    of: (row, mask, t) => `s${level(row.divergence[t], D_STEPS)}`,
    legend: () => D_STEPS.map((step, at) => [`s${at + 1}`, `≥ ${step}`]),
  },
  "log ratio": {
    of: (row, mask, t) => signed(row.logRatio[t], level(Math.abs(row.logRatio[t]), RATIO_STEPS)),
    legend: () => [4, 3, 2, 1].map((at) => [`n${at}`, `≤ −${RATIO_STEPS[at - 1]}`])
      .concat([1, 2, 3, 4].map((at) => [`p${at}`, `≥ ${RATIO_STEPS[at - 1]}`])),
  },
  advantage: {
    of: (row, mask, t) => signed(row.advantages[t], Math.ceil(4 * Math.abs(row.advantages[t]) / row.largestAdvantage)),
    legend: () => [["n4", "worse than the group"], ["z", "0"], ["p4", "better"]],
  },
};

class Reader {
  constructor(onPoint, onChoose) {
    this.element = make("section", "", "reader");
    this.heading = make("h2");
    this.tokens = make("div", "", "tokens text");
    this.tokens.dir = "ltr";
    this.tokens.tabIndex = 0;
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    this.marker = make("div", "", "marker");
    const plot = make("div", "", "plot");
    plot.append(this.canvas, this.marker);
    this.element.append(this.heading, plot, this.tokens);
    const at = (event) => event.target.place;
    this.tokens.addEventListener("mouseover", (event) => at(event) != null && onPoint(at(event)));
    this.tokens.addEventListener("mouseleave", () => onPoint(null));
    this.tokens.addEventListener("click", (event) => at(event) != null && onChoose(at(event)));
    const under = (event) => Math.min(Math.floor(event.offsetX / this.canvas.clientWidth * this.row.n), this.row.n - 1);
    this.canvas.addEventListener("mousemove", (event) => onPoint(under(event)));
    this.canvas.addEventListener("mouseleave", () => onPoint(null));
    this.canvas.addEventListener("click", (event) => onChoose(under(event), true));
  }

  // Makes the tokens; in blocks, so that what is out of sight of a long response is not laid out.
  open(row) {
    this.row = row;
    this.spans = [];
    this.classes = [];
    const blocks = [], size = row.n > 2000 ? 150 : row.n;
    for (let t = 0; t < row.n; t++) {
      const text = textOf(row.id[t]).replaceAll("\n", "↵\n");
      const span = make(/[^\0-\u058f\u2000-\u2bff]/.test(text) ? "bdi" : "span", text); // what may run right to left
      span.place = t;
      if (t % size === 0) blocks.push(make("div", "", row.n > 2000 ? "block" : ""));
      blocks.at(-1).append(span);
      this.spans.push(span);
    }
    this.tokens.replaceChildren(...blocks);
  }

  paint(mask, beside, colour, hits) {
    this.mask = mask;
    const { row } = this, { of } = COLOURS[colour];
    for (let t = 0; t < row.n; t++) {
      const differs = beside && mask.gate[t] < 1 !== beside.gate[t] < 1;
      const name = `${of(row, mask, t)} m${mask.cause[t]}${differs ? " x" : ""}${hits.has(t) ? " hit" : ""}`;
      if (this.classes[t] === name) continue;
      this.classes[t] = this.spans[t].className = name;
    }
    this.draw();
  }

  mark(t, scroll) {
    this.chosen?.classList.remove("chosen");
    this.at = t;
    this.chosen = this.spans[t];
    this.chosen?.classList.add("chosen");
    if (scroll) this.chosen?.scrollIntoView({ block: "center" });
    this.marker.style.left = `${100 * (t + 0.5) / this.row.n}%`;
  }

  draw() {
    const { canvas, row, mask } = this, width = canvas.clientWidth, height = canvas.clientHeight;
    if (!mask || !width) return;
    const scale = window.devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d"), style = getComputedStyle(canvas);
    const ink = (name) => { // resolved for light or dark, as a property's own value is not
      canvas.style.color = `var(${name})`;
      return style.color;
    };
    pen.scale(scale, scale);
    pen.font = "11px system-ui, sans-serif";
    const { n, points } = curve(row, mask, 2 * width), middle = height * 0.55, x = (i) => i / n * width;
    const delta = mask.threshold.find(Number.isFinite) ?? 0;
    const barTop = Math.max(...points.z, delta) || 1, spentTop = Math.max(...points.spent, ...points.bound) || 1;
    const upper = (value) => middle - 4 - Math.min(Math.max(value, 0) / barTop, 1) * (middle - 20);
    const lower = (value) => height - 4 - value / spentTop * (height - middle - 24);
    const inks = ["--bar", "--token", "--prefix", "--back", "--faint"].map(ink);
    const bar = Math.max(width / n - (width / n > 4 ? 1 : 0), 1);
    for (let i = 0; i < n; i++) {
      const cause = points.cause[i];
      if (cause === NOT_TRAINED) continue;
      pen.fillStyle = inks[cause];
      if (cause === BY_TOKEN || cause === BY_PREFIX) { // seen however small the token's own divergence is
        pen.globalAlpha = 0.15;
        pen.fillRect(x(i), 16, bar, middle - 20);
        pen.globalAlpha = 1;
      }
      pen.fillRect(x(i), upper(points.z[i]), bar, middle - 4 - upper(points.z[i]));
    }
    line(pen, x, points.threshold.map(upper), ink("--line"), []);
    line(pen, x, points.spent.map(lower), ink("--spent"), []);
    if (mask.bound) line(pen, x, points.bound.map(lower), ink("--line"), [5, 3]);
    pen.fillStyle = ink("--text");
    pen.fillText(`Z = w·D (bars) and c (line), to ${short(barTop)}`, 2, 11);
    pen.fillText(`S${mask.bound ? " and its bound (dashed)" : ""}, to ${short(spentTop)}`, 2, middle + 12);
    canvas.setAttribute("aria-label", `Z up to ${short(barTop)}, S up to ${short(spentTop)} over ${row.n} tokens`);
  }
}

// At most `columns` points: of tokens that share one the largest Z and what masked it, the lowest c, the last S and bound.
function curve(row, mask, columns) {
  const n = Math.min(row.n, Math.max(Math.floor(columns), 1)), points = {};
  for (const name of ["z", "threshold", "spent", "bound", "cause"]) points[name] = new Array(n).fill(NaN);
  points.bound.fill(0);
  for (let t = 0; t < row.n; t++) {
    const i = Math.floor(t * n / row.n), cause = mask.cause[t], first = Number.isNaN(points.cause[i]);
    points.spent[i] = mask.spent[t];
    if (mask.bound && Number.isFinite(mask.bound[t])) points.bound[i] = mask.bound[t];
    if (first || mask.z[t] > points.z[i]) points.z[i] = mask.z[t];
    if (!(points.threshold[i] <= mask.threshold[t])) points.threshold[i] = mask.threshold[t];
    if (first || RANK[cause] > RANK[points.cause[i]]) points.cause[i] = cause;
  }
  return { n, points };
}
const RANK = { [NOT_TRAINED]: 0, [KEPT]: 1, [RETURNS]: 2, [BY_PREFIX]: 3, [BY_TOKEN]: 4 };

function line(pen, x, heights, colour, dash) {
  pen.beginPath();
  pen.strokeStyle = colour;
  pen.lineWidth = 1.5;
  pen.setLineDash(dash);
  heights.forEach((y, i) => { if (!Number.isNaN(y)) { pen.lineTo(x(i), y); pen.lineTo(x(i + 1), y); } });
  pen.stroke();
  pen.setLineDash([]);
}

const visible = (id) => textOf(id).replaceAll("\n", "↵").replaceAll(" ", "␣").replaceAll("\t", "⇥");

// The numbers of one token, and its Top-K cells as bars.
function detail(step, row, masks, t) {
  const parts = [make("h2", `token ${t + 1} of ${row.n}`), make("code", visible(row.id[t]))];
  const pi = Math.exp(row.logProb[t]), mu = Math.exp(row.rolloutLogProb[t]);
  const both = { "π": pi, "μ": mu, "log ρ": row.logRatio[t], A: row.advantages[t], D: row.divergence[t] };
  const keys = { w: "w", "Z = w D": "z", c: "threshold", S: "spent", "its bound": "bound", gate: "gate" };
  if (row.valid[t]) parts.push(table([
    ["", ...masks.map(([name]) => name)], ...Object.entries(both).map(([name, value]) => [name, short(value)]),
    ...Object.entries(keys).map(([name, key]) => [name, ...masks.map(([, mask]) => short(mask[key]?.[t]))]),
  ]));
  for (const [name, mask] of masks) parts.push(make("p", `${name}: ${CAUSES[mask.cause[t]]}`, `cause m${mask.cause[t]}`));
  const { columns } = step, cells = [];
  for (let c = row.firstCell[t]; c < row.firstCell[t + 1]; c++)
    cells.push([columns.cell_id[c], columns.cell_pi[c] / DATA.unit, columns.cell_mu[c] / DATA.unit]);
  if (row.valid[t] && !cells.some(([id]) => id === row.id[t])) cells.push([row.id[t], pi, mu]);
  cells.sort((a, b) => b[2] - a[2]);
  const bars = make("div", "", "bars");
  for (const [id, p, m] of cells) {
    const pair = make("span", "", "pair");
    for (const [name, share] of [["pi", p], ["mu", m]]) {
      const bar = make("span", "", `of-${name}`);
      bar.style.width = `${100 * share}%`;
      pair.append(bar);
    }
    bars.append(make("code", visible(id), id === row.id[t] ? "sampled" : ""), pair,
      make("span", `${(100 * p).toFixed(1)} / ${(100 * m).toFixed(1)}%`));
  }
  if (row.valid[t]) parts.push(make("p", "π (upper, filled) and μ (lower, outlined); the sampled token is bold", "faint"), bars);
  return parts;
}

function table(lines) {
  const element = make("table");
  for (const [at, [name, ...cells]] of lines.entries()) {
    const line = make("tr");
    line.append(make("th", name), ...cells.map((cell) => make(at ? "td" : "th", cell)));
    element.append(line);
  }
  return element;
}
