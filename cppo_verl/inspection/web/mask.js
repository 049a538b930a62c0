// The methods of cppo_verl/methods/ on one response, in the dtypes and the order of operations of core/masks.py and
// core/weights.py: sums in float64 from the first token to the last, comparisons in float32 (Math.fround), inclusive.
const f32 = Math.fround;
const EPS = 2 ** -23; // of float32
// What became of a token.
const KEPT = 0, BY_TOKEN = 1, BY_PREFIX = 2, RETURNS = 3, NOT_TRAINED = 4;
const CAUSES = [
  "kept: within its threshold", "masked by the token threshold", "masked by the prefix or mean constraint",
  "kept: exceeds a threshold, but moves back to the rollout", "not trained: the model did not write it",
];

// Eq. 9. positions: the shuffled ones, or null.
function positionWeights(row, settings) {
  const { n, valid, positions } = row, w = new Float32Array(n);
  let count = 0;
  for (let t = 0; t < n; t++) count += valid[t];
  const last = settings.horizon == null ? count - 1 : settings.horizon - 1;
  const step = (1 - settings.w_min) / Math.max(last, 1);
  for (let t = 0, place = 0; t < n; t++) {
    if (!valid[t]) continue;
    const position = settings.weights === "shuffled" ? positions[t] : place;
    w[t] = settings.weights === "uniform" ? 1 : 1 - step * Math.min(position, last);
    place++;
  }
  return w;
}

// Eq. 22; null: no prefix constraint.
function prefixBudget(row, settings) {
  if (settings.delta_b == null) return null;
  const floor = f32(settings.delta_b), quantile = settings.delta_b_quantile;
  if (quantile == null) return floor;
  const values = (row.sorted ??= row.divergence.filter((_, t) => row.valid[t]).sort());
  if (!values.length) return floor;
  const place = (values.length - 1) * quantile, share = place - Math.floor(place);
  const below = values[Math.floor(place)], above = values[Math.ceil(place)];
  const between = below === above || share === 0 ? below : f32(below + share * (above - below));
  const value = f32(f32(settings.delta_b_scale ?? 1) * between);
  return Math.min(Math.max(value, floor), f32(settings.delta_b_max_factor * settings.delta_b));
}

// A_t (rho_t - 1) <= 0, by signs; torch takes the sign of NaN for 0.
const returns = (row, t) => !(Math.sign(row.advantages[t]) * Math.sign(row.logRatio[t]) > 0);

// What every method starts from: w = 1, everything the model wrote kept, no prefix constraint.
function untouched(row) {
  const { n, valid, divergence } = row;
  const result = {
    w: new Float32Array(valid), z: new Float64Array(n), spent: new Float64Array(n), bound: null,
    threshold: new Float32Array(n).fill(NaN), excess: new Float32Array(n), gate: new Float32Array(valid),
    cause: new Uint8Array(n), deltaB: null,
  };
  for (let t = 0, sum = 0; t < n; t++) {
    if (!valid[t]) result.cause[t] = NOT_TRAINED;
    else sum += result.z[t] = divergence[t];
    result.spent[t] = sum;
  }
  return result;
}

// Eq. 8-11, and with soft_gate Eq. 19-20.
function cppo(row, settings) {
  const { n, valid, divergence } = row, result = untouched(row), delta = settings.delta;
  const w = result.w = positionWeights(row, settings), deltaB = result.deltaB = prefixBudget(row, settings);
  if (deltaB != null) result.bound = new Float64Array(n);
  for (let t = 0, weight = 0, spent = 0; t < n; t++) {
    const z = valid[t] ? w[t] * divergence[t] : 0, before = spent;
    result.z[t] = z;
    result.spent[t] = spent += z;
    const bound = deltaB == null ? Infinity : delta + (weight > 0 ? deltaB * weight : 0);
    if (deltaB != null) result.bound[t] = bound;
    if (!valid[t]) continue;
    weight += w[t];
    const byToken = f32(z) > f32(delta), byPrefix = deltaB != null && f32(spent) > f32(bound);
    result.threshold[t] = deltaB == null ? delta : Math.min(bound - before, delta);
    const x = f32(deltaB == null ? z / delta : Math.max(z / delta, spent / bound));
    result.excess[t] = byToken || byPrefix ? Math.max(x, 1 + EPS) : Math.min(x, 1);
    if (!byToken && !byPrefix) continue;
    if (returns(row, t)) { result.cause[t] = RETURNS; continue; }
    result.gate[t] = settings.soft_gate ? 1 / result.excess[t] : 0;
    result.cause[t] = byToken ? BY_TOKEN : BY_PREFIX;
  }
  return result;
}

const dppo = (row, settings) =>
  cppo(row, { delta: settings.delta, weights: "uniform", w_min: 1, horizon: null, delta_b: null });

function trm(row, { delta_max, delta_avg }) {
  const { n, valid, divergence } = row, result = untouched(row);
  let count = 0, byMax = false;
  for (let t = 0; t < n; t++) {
    if (!valid[t]) continue;
    count++;
    byMax ||= delta_max != null && divergence[t] > f32(delta_max);
  }
  const mean = n ? f32(result.spent[n - 1] / Math.max(count, 1)) : 0;
  const byMean = delta_avg != null && mean > f32(delta_avg);
  for (let t = 0; t < n; t++) {
    if (!valid[t]) continue;
    result.threshold[t] = delta_max ?? delta_avg;
    const largest = delta_max == null ? 0 : divergence[t] / delta_max;
    result.excess[t] = Math.max(largest, delta_avg == null ? 0 : mean / delta_avg);
    if (!byMax && !byMean) continue;
    result.gate[t] = 0;
    result.cause[t] = byMax ? BY_TOKEN : BY_PREFIX;
  }
  return result;
}

function grpo(row, { eps_low, eps_high }) {
  const result = untouched(row), high = f32(1 + eps_high), low = f32(1 - eps_low);
  for (let t = 0; t < row.n; t++) {
    const rho = f32(Math.exp(row.logRatio[t])), advantage = row.advantages[t];
    const clipped = (advantage > 0 && rho > high) || (advantage < 0 && rho < low);
    if (!row.valid[t] || !clipped) continue;
    result.gate[t] = 0;
    result.cause[t] = BY_TOKEN;
  }
  return result;
}

// Of a method that the page cannot compute: what training made of each token.
function trained(row) {
  const result = untouched(row);
  for (let t = 0; t < row.n; t++) {
    if (!row.valid[t]) continue;
    result.gate[t] = row.gate[t];
    if (row.gate[t] < 1) result.cause[t] = row.tokenCause[t] ? BY_TOKEN : BY_PREFIX;
  }
  return result;
}

// By the last part of a method's _target_. CISPO and MinPRO mask nothing: what they clip is the weight of the loss.
const METHODS = { Cppo: cppo, Dppo: dppo, Trm: trm, Grpo: grpo, Cispo: untouched, MinPro: untouched, Trained: trained };

const maskOf = (row, method) => METHODS[method.kind](row, method.settings);
