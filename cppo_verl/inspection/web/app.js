// State, controls, what is open, keys.
const $ = (id) => document.getElementById(id);
const state = { step: null, row: null, at: 0, colour: "mask cause", method: null, other: null, query: "" };
const TRAINED = "training's mask", NONE = "nothing";

const reader = new Reader((t) => point(t), (t, scroll) => choose(t, scroll));
const second = new Reader((t) => point(t), (t, scroll) => choose(t, scroll));

// Settings with a slider: logarithmic around the run's value, or over (0, 1].
const LOGARITHMIC = ["delta", "delta_b", "delta_max", "delta_avg", "eps_low", "eps_high"];
const SHARES = ["w_min"];

function options(select, names, chosen) {
  select.replaceChildren(...names.map((name) => make("option", name)));
  select.selectedIndex = Math.max(names.indexOf(chosen), 0);
}

function useMethod(preset) {
  state.method = { ...preset, settings: { ...preset.settings } };
  const sliders = [...LOGARITHMIC, ...SHARES].filter((name) => Number.isFinite(preset.settings[name]));
  $("sliders").replaceChildren(...sliders.map((name) => slider(name, preset.settings[name])));
}

function slider(name, value) {
  const label = make("label", `${name} `), range = make("input"), number = make("input");
  const middle = Math.log10(value || 0.01), exact = SHARES.includes(name);
  Object.assign(range, exact ? { type: "range", min: 0.01, max: 1, step: 0.01 }
    : { type: "range", min: middle - 2, max: middle + 2, step: 0.01 });
  Object.assign(number, { type: "number", min: 0, step: "any", value });
  range.value = exact ? value : Math.log10(value || 1e-9);
  range.setAttribute("aria-label", `${name}, slider`);
  number.setAttribute("aria-label", name);
  const use = (chosen) => {
    if (!(chosen >= 0) || (chosen === 0 && name !== "delta_b" && !name.startsWith("eps"))) return;
    if (exact && chosen > 1) return;
    state.method.settings[name] = chosen;
    later(recompute);
  };
  range.addEventListener("input", () => {
    number.value = exact ? +range.value : +(10 ** range.value).toPrecision(3);
    use(+number.value);
  });
  number.addEventListener("input", () => {
    range.value = exact ? number.value : Math.log10(number.value || 1e-9);
    use(number.value === "" ? NaN : +number.value);
  });
  for (const input of [range, number]) input.addEventListener("change", () => later(arrange));
  label.append(range, number);
  return label;
}

// At most once a frame, however fast a slider moves.
const waiting = new Set();
function later(action) {
  if (!waiting.size) requestAnimationFrame(() => { const due = [...waiting]; waiting.clear(); due.forEach((run) => run()); });
  waiting.add(action);
}

function recompute() {
  const totals = [0, 0, 0, 0, 0];
  for (const row of state.step.rows) {
    row.mask = maskOf(row, state.method);
    row.about = summary(row, row.mask);
    row.about.counts.forEach((count, cause) => { totals[cause] += count; });
    describe(row);
  }
  const tokens = state.step.columns.id.length - totals[NOT_TRAINED], all = totals[BY_TOKEN] + totals[BY_PREFIX];
  $("effect").textContent = `masked ${percent(all, tokens)} (token ${percent(totals[BY_TOKEN], tokens)}, ` +
    `prefix ${percent(totals[BY_PREFIX], tokens)}); in training ${percent(state.step.trained, tokens)}`;
  paint();
}

function open(row, at = null) {
  state.row?.button.removeAttribute("aria-current");
  Object.assign(state, { row, at: at ?? row.about.worst });
  row.button.setAttribute("aria-current", "true");
  const list = $("list"), above = row.button.offsetTop - list.scrollTop;
  if (above < 0 || above > list.clientHeight - 50) list.scrollTop = row.button.offsetTop - list.clientHeight / 2;
  const prompt = state.step.prompts[row.prompt];
  $("title").textContent = `response ${row.index + 1}, prompt ${row.prompt + 1}, minibatch ${row.minibatch}`;
  $("prompt").firstElementChild.textContent = `prompt: ${prompt.slice(-100)}`;
  $("prompt").lastElementChild.textContent = prompt;
  reader.open(row);
  if (state.other) second.open(row);
  paint();
  choose(state.at, at != null);
}

function paint() {
  const { row, other } = state;
  if (!row) return;
  const hits = found(row, state.query.toLowerCase());
  const beside = other && (other === TRAINED ? trainedMask(row) : maskOf(row, other));
  state.beside = beside;
  reader.heading.textContent = named(state.method);
  reader.paint(row.mask, beside, state.colour, hits);
  second.element.hidden = !other;
  if (other) {
    second.heading.textContent = other === TRAINED ? TRAINED : named(other);
    second.paint(beside, row.mask, state.colour, hits);
  }
  point(state.at);
}

function named({ name, settings }) {
  const shown = [...LOGARITHMIC, ...SHARES].filter((key) => typeof settings[key] === "number");
  return `${name}  ${shown.map((key) => `${key} ${short(settings[key])}`).join(", ")}`;
}

function choose(t, scroll = false) {
  state.at = t;
  reader.mark(t, scroll);
  if (state.other) second.mark(t, false);
  point(t);
}

// Shows the token under the pointer; null: the chosen one again.
function point(t) {
  const masks = [[state.method.name, state.row.mask]];
  if (state.beside) masks.push([state.other === TRAINED ? "training" : `beside: ${state.other.name}`, state.beside]);
  $("detail").replaceChildren(...detail(state.step, state.row, masks, t ?? state.at));
}

function nextMasked(step) {
  const { row, at } = state;
  for (let t = at + step; t >= 0 && t < row.n; t += step)
    if (row.mask.cause[t] === BY_TOKEN || row.mask.cause[t] === BY_PREFIX) return choose(t, true);
}

function neighbour(step) {
  const row = state.shown[state.shown.indexOf(state.row) + step];
  if (row) open(row);
}

function worstOfStep() {
  const row = state.step.rows.reduce((best, one) => one.about.highest > best.about.highest ? one : best);
  open(row, row.about.worst);
}

function colourBy(name) {
  state.colour = $("colour").value = name;
  $("legend").replaceChildren(...COLOURS[name].legend().map(([swatch, text]) => {
    const one = make("span", "", "key");
    one.append(make("span", "", `swatch ${swatch}`), text);
    return one;
  }));
  paint();
}

async function openStep(place) {
  const step = await readStep(place);
  if ($("step").selectedIndex !== place) return; // another one has been asked for since
  for (const row of step.rows) row.mask = maskOf(row, DATA.methods[0]);
  const { tokens, wrong, first } = differences(step.rows);
  Object.assign(state, { step, row: null });
  let largest = 0;
  for (const value of step.columns.advantages) largest = Math.max(largest, Math.abs(value));
  step.trained = step.columns.gate.reduce((sum, gate, i) => sum + (step.columns.valid[i] && gate < 1 ? 1 : 0), 0);
  for (const row of step.rows) {
    row.largestAdvantage = largest || 1;
    row.button = make("button", "", "response");
    row.button.append(make("span"), make("small"));
    row.button.addEventListener("click", () => open(row));
  }
  recompute();
  arrange();
  open(step.rows[0]);
  $("parity").textContent = wrong ? `⚠ differs from training's mask on ${wrong} of ${tokens} tokens, first at response ` +
    `${first[0].index + 1}, token ${first[1] + 1}` : `✓ the mask computed here is training's on all ${tokens} tokens`;
  $("parity").className = wrong ? "bad" : "good";
  document.body.dataset.ready = String(place);
}

const KEYS = {
  ArrowLeft: () => choose(Math.max(state.at - 1, 0), true),
  ArrowRight: () => choose(Math.min(state.at + 1, state.row.n - 1), true),
  j: () => neighbour(1), k: () => neighbour(-1), n: () => nextMasked(1), p: () => nextMasked(-1),
  w: () => choose(state.row.about.worst, true), W: worstOfStep,
  c: () => { const names = Object.keys(COLOURS); colourBy(names[(names.indexOf(state.colour) + 1) % names.length]); },
  "/": () => $("query").focus(), "?": () => $("help").showModal(),
};

function start() {
  const names = DATA.methods.map(({ name }) => name);
  $("run").textContent = DATA.run;
  $("notes").textContent = `${DATA.notes} Top-K cells below ${DATA.smallest} under both policies have no bar.`;
  options($("step"), DATA.steps.map(({ number }) => String(number)));
  options($("method"), names);
  options($("other"), [NONE, TRAINED, ...names]);
  options($("filter"), Object.keys(FILTERS));
  options($("sort"), Object.keys(ORDERS));
  options($("colour"), Object.keys(COLOURS));
  useMethod(DATA.methods[0]);
  const on = (id, event, action) => $(id).addEventListener(event, action);
  on("step", "change", () => openStep($("step").selectedIndex));
  on("method", "change", () => { useMethod(DATA.methods[$("method").selectedIndex]); recompute(); arrange(); });
  on("reset", "click", () => { $("method").selectedIndex = 0; useMethod(DATA.methods[0]); recompute(); arrange(); });
  on("other", "change", () => {
    const place = $("other").selectedIndex;
    state.other = [null, TRAINED][place] ?? DATA.methods[place - 2] ?? null;
    second.element.hidden = !state.other;
    if (state.other) second.open(state.row);
    paint();
    choose(state.at);
  });
  on("filter", "change", arrange);
  on("sort", "change", arrange);
  on("query", "input", () => { state.query = $("query").value; arrange(); paint(); });
  on("colour", "change", () => colourBy($("colour").value));
  for (const [id, key] of [["masked-before", "p"], ["masked-after", "n"], ["worst", "w"], ["worst-of-all", "W"], ["help-button", "?"]])
    on(id, "click", KEYS[key]);
  on("theme", "click", () => {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    root.style.colorScheme = (root.style.colorScheme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
    paint();
  });
  second.element.hidden = true;
  $("readers").append(reader.element, second.element);
  new ResizeObserver(() => { reader.draw(); second.draw(); }).observe($("readers"));
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !state.row || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  colourBy(state.colour);
  openStep(0);
}

start();
