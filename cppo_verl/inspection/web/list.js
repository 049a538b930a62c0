// The list of responses: what it says of each, filters, orders, search.
const FILTERS = {
  all: () => true,
  "masked by token": (row) => row.about.counts[BY_TOKEN] > 0,
  "masked by prefix": (row) => row.about.counts[BY_PREFIX] > 0,
  "nothing masked": (row) => row.about.counts[BY_TOKEN] + row.about.counts[BY_PREFIX] === 0,
  right: (row) => row.right === true,
  wrong: (row) => row.right === false,
};
const ORDERS = {
  "prompt group": (a, b) => a.index - b.index,
  "drift S": (a, b) => b.about.drift - a.about.drift,
  "drift per token": (a, b) => b.about.drift / b.about.trained - a.about.drift / a.about.trained,
  "worst token": (a, b) => b.about.highest - a.about.highest,
  "share masked": (a, b) => share(b) - share(a),
  length: (a, b) => b.n - a.n,
};
const masked = (row) => row.about.counts[BY_TOKEN] + row.about.counts[BY_PREFIX];
const share = (row) => masked(row) / row.about.trained;

// The line of a response in the list.
function describe(row) {
  const { about, button } = row, { counts } = about, sign = { true: "✓", false: "✗" }[row.right] ?? "·";
  const text = `${sign} A ${row.advantages[row.valid.indexOf(1)].toPrecision(2)} · ${row.n} tokens · S ${about.drift.toPrecision(2)}`;
  const more = masked(row) ? `masked ${percent(masked(row), about.trained)}: ${counts[BY_TOKEN]} token, ${counts[BY_PREFIX]} prefix`
    : "nothing masked";
  if (button.lastChild.textContent !== more) button.lastChild.textContent = more;
  if (button.firstChild.textContent !== text) button.firstChild.textContent = text;
}

// Order and filter of the list.
function arrange() {
  const { step } = state, order = $("sort").value, query = state.query.toLowerCase(), shown = [];
  for (const row of [...step.rows].sort(ORDERS[order])) {
    const found = !query || rowText(row).toLowerCase().includes(query) || step.prompts[row.prompt].toLowerCase().includes(query);
    if (found && FILTERS[$("filter").value](row)) shown.push(row);
  }
  const lines = [];
  shown.forEach((row, at) => {
    if (order === "prompt group" && row.prompt !== shown[at - 1]?.prompt)
      lines.push(make("h3", `${row.prompt + 1}. ${step.prompts[row.prompt].slice(-300)}`));
    lines.push(row.button);
  });
  $("list").replaceChildren(...lines);
  const left = step.about.left_out ? `, ${step.about.left_out} more of the step were left out of the page` : "";
  $("count").textContent = `${shown.length} of ${step.rows.length} responses${left}`;
  state.shown = shown;
}

// The tokens that a searched text lies in.
function found(row, query) {
  const hits = new Set();
  if (!query) return hits;
  const text = rowText(row).toLowerCase();
  let from = text.indexOf(query), t = 0, end = 0;
  while (from >= 0 && t < row.n) {
    const length = textOf(row.id[t]).length;
    end += length;
    while (from >= 0 && end - length >= from + query.length) from = text.indexOf(query, from + query.length);
    if (from >= 0 && end > from) hits.add(t);
    t++;
  }
  return hits;
}
