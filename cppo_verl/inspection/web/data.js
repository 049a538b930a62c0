// From the page's blocks of data to rows: one response each, with views into the columns of its step.
const DATA = JSON.parse(document.getElementById("data").textContent);
for (const { settings } of DATA.methods)
  for (const [name, value] of Object.entries(settings)) if (value === "Infinity") settings[name] = Infinity;
const ARRAYS = { Float32Array, Int32Array, Uint16Array, Uint8Array };
const textOf = (id) => DATA.texts[id];

async function readStep(place) {
  const about = DATA.steps[place], binary = atob(document.getElementById(`blob-${place}`).textContent);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const columns = {};
  for (const [name, { type, offset, length }] of Object.entries(about.columns))
    columns[name] = new ARRAYS[type](buffer, offset, length);
  const firstCell = new Int32Array(columns.id.length + 1);
  for (let i = 0; i < columns.id.length; i++) firstCell[i + 1] = firstCell[i] + columns.cells[i];
  let start = 0;
  const rows = about.responses.map((response, index) => {
    const end = start + response.tokens, part = (name) => columns[name]?.subarray(start, end);
    const row = {
      ...response, index, n: response.tokens, id: part("id"), valid: part("valid"), divergence: part("divergence"),
      advantages: part("advantages"), logProb: part("log_prob"), rolloutLogProb: part("rollout_log_prob"),
      gate: part("gate"), tokenCause: part("token_cause"), positions: part("positions"),
      firstCell: firstCell.subarray(start, end + 1),
    };
    row.logRatio = row.logProb.map((value, t) => value - row.rolloutLogProb[t]); // float32, as the array is
    start = end;
    return row;
  });
  return { about, columns, rows, prompts: about.prompts.map((ids) => ids.map(textOf).join("")) };
}

const rowText = (row) => (row.text ??= Array.from(row.id, textOf).join(""));

// The mask that training used, over the numbers of the run's own method.
function trainedMask(row) {
  const mask = maskOf(row, DATA.methods[0]);
  mask.gate = row.gate;
  mask.cause = mask.cause.map((cause, t) => {
    if (!row.valid[t]) return NOT_TRAINED;
    if (row.gate[t] < 1) return row.tokenCause[t] ? BY_TOKEN : BY_PREFIX;
    return cause === RETURNS ? RETURNS : KEPT;
  });
  return mask;
}

// Tokens of which the mask recomputed at the run's settings is not training's: their number, and the first.
function differences(rows) {
  let tokens = 0, wrong = 0, first = null;
  for (const row of rows) {
    const { mask } = row;
    for (let t = 0; t < row.n; t++) {
      if (!row.valid[t]) continue;
      tokens++;
      const trained = row.gate[t], same = Math.abs(mask.gate[t] - trained) < 1e-6 && mask.gate[t] < 1 === trained < 1;
      const cause = mask.cause[t] === BY_TOKEN ? 1 : 0;
      if (same && (trained === 1 || cause === row.tokenCause[t])) continue;
      wrong++;
      first ??= [row, t];
    }
  }
  return { tokens, wrong, first };
}

// What the list says of a response.
function summary(row, mask) {
  const counts = [0, 0, 0, 0, 0];
  let worst = 0, highest = -1;
  for (let t = 0; t < row.n; t++) {
    counts[mask.cause[t]]++;
    if (!row.valid[t]) continue;
    const height = mask.excess[t] || row.divergence[t] / 1e9; // methods without a threshold: the largest divergence
    if (height > highest) [worst, highest] = [t, height];
  }
  const trained = row.n - counts[NOT_TRAINED];
  return { counts, worst, highest, trained, drift: mask.spent[row.n - 1] || 0 };
}
