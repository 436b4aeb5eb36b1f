"use strict";performance.mark("start");
// Draws what the page's data block holds. Nothing is computed here but which points are shown and where they stand;
// text from records reaches the page as text nodes only.
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const MEANS = "means", RUNS = "runs", ALL = "all";
const PROMPTS_AT_ONCE = 4, ANSWERS_AT_ONCE = 12;
const state = {group: 0, off: new Set(), threshold: ALL, seed: MEANS, utility: "", course: "", prompts: PROMPTS_AT_ONCE};
const $ = (id) => document.getElementById(id);
const group = () => DATA.groups[state.group];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => {
    const option = make("option", {value}, text);
    option.selected = value === chosen;
    return option;
  }));
}

// ---------------------------------------------------------------- numbers

const digits = (x) => (Math.abs(x) < 5e-7 ? 0 : x).toFixed(Math.abs(x) >= 100 ? 0 : 2).replace(/^-(?=0\.00$)/, "").replace("-", "−");

function told(value) {
  if (!value || value[0] === null || value[0] === undefined) return "no number";
  if (value[1] === null || value[2] === null) return `${digits(value[0])}, no interval`;
  return `${digits(value[0])} [${digits(value[1])}, ${digits(value[2])}]`;
}

const shifted = (value, by) => value && value.map((x) => (x === null ? null : x + by));
const achieved = (point, utility) => {
  if (point.a) return point.a[utility];
  const requested = (point.q || {})[utility];
  return requested === undefined || requested === null ? null : shifted((point.d || {})[utility], requested);
};

// ---------------------------------------------------------------- what is shown

function byFilter(points) {
  return points.filter((p) => !state.off.has(p.s) && (state.threshold === ALL || p.t === -1 || String(p.t) === state.threshold));
}

function ofSeed(points) {
  return state.seed === MEANS || state.seed === RUNS ? points : points.filter((p) => String(p.seed) === state.seed);
}

function every() {
  return state.seed === MEANS ? group().means : ofSeed(group().runs);
}

const shown = () => byFilter(every());
const shownRuns = () => byFilter(ofSeed(group().runs));
const ink = (index) => (group().series[index].colour === "#000000" ? css("--ink") : group().series[index].colour);
const nameOf = (p) => group().series[p.s].name;
const askedOf = (p) => (p.t === -1 ? "" : group().thresholds[p.t]);
const seedsOf = (p) => (p.n !== undefined ? p.n : `seed ${p.seed}`);

function scales(indices) {
  const names = indices.map((i) => group().series[i].name);
  return {
    color: {field: "name", type: "nominal", legend: null, scale: {domain: names, range: indices.map(ink)}},
    shape: {field: "name", type: "nominal", legend: null,
            scale: {domain: names, range: indices.map((i) => group().series[i].shape)}},
  };
}

function config() {
  const text = css("--ink"), soft = css("--soft"), line = css("--line");
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: "transparent", font, view: {stroke: null},
    axis: {labelColor: soft, titleColor: text, gridColor: line, domainColor: soft, tickColor: soft, gridOpacity: .6,
           labelFontSize: 12, tickCount: narrow() ? 5 : 9, labelFlush: false, labelOverlap: true, titleFontSize: 13, titleFontWeight: "normal", titlePadding: 8},
    // a rim in the ground's colour keeps names legible on lines (page.css paints it first)
    text: {fill: text, fontSize: 12, stroke: css("--ground"), strokeWidth: 3}, rule: {stroke: soft},
  };
}

const narrow = () => innerWidth < 640;

// names are placed by Vega where they cover neither a point nor each other; one without room is left out
function placeLabels(spec) {
  spec.marks.forEach((mark, index) => {
    if (mark.type === "text") {
      const points = spec.marks.slice(0, index).filter((other) => other.type === "symbol").map((other) => other.name);
      mark.transform = [{type: "label", size: {signal: "[width + 60, height]"}, offset: [7, 13],
                         anchor: ["right", "left", "top", "bottom", "top-right", "bottom-right", "top-left", "bottom-left"],
                         avoidMarks: points}];
    }
  });
  return spec;
}

const drawn = {};
let turn = {};

async function draw(id, spec, described) {
  const host = $(id), mine = (turn[id] = (turn[id] || 0) + 1);
  if (drawn[id]) { drawn[id].finalize(); delete drawn[id]; }
  if (!spec) { host.replaceChildren(make("p", {class: "notice"}, described)); return; }
  const place = make("div");
  host.replaceChildren(place);
  const whole = {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", height: narrow() ? 300 : 400,
    autosize: {type: "fit-x", contains: "padding"}, description: described, config: config(), ...spec,
  };
  let made;
  try {
    made = await vegaEmbed(place, whole, {
      ast: true, renderer: "svg", patch: placeLabels, tooltip: {theme: dark.matches ? "dark" : "light"}, downloadFileName: id,
      actions: {export: true, source: false, compiled: false, editor: false}});
  } catch (error) {  // the rest of the page is of use without it
    console.error(error);
    host.replaceChildren(make("p", {class: "notice"}, `This plot cannot be drawn (${error.message}); its numbers are below.`));
    return;
  }
  if (turn[id] === mine) drawn[id] = made; else made.finalize();
}

function numbers(id, headings, lines) {
  const box = $(`${id}-numbers`);
  box.fill = () => {
    const head = make("tr", {}, ...headings.map((text) => make("th", {scope: "col"}, make("button", {type: "button"}, text))));
    const body = lines.map((line) => make("tr", {}, ...line.map((text, i) => make(i ? "td" : "th", i ? {} : {scope: "row"}, String(text)))));
    const table = make("table", {class: "sortable"}, make("thead", {}, head), make("tbody", {}, ...body));
    sortable(table);
    box.querySelector(".scroll").replaceChildren(table);
  };
  box.hidden = !lines.length;
  if (box.open) box.fill();
}

// a layer for those rows that it can draw; of none, no layer
const layerOf = (rows, drawable, layer) => (rows.some(drawable) ? [{data: {values: rows.filter(drawable)}, ...layer}] : []);
const sureX = (r) => r.x1 !== null && r.x2 !== null, sureY = (r) => r.y1 !== null && r.y2 !== null;
const foreseen = (r) => r.f !== null, sureF = (r) => r.f !== null && r.f1 !== null && r.f2 !== null;

const TOOLTIP = [{field: "who", title: "method"}, {field: "asked", title: "asked"}, {field: "seeds", title: "runs"}];
const QUANTITY = (field, title, more) => ({field, type: "quantitative", title, ...(more || {})});
const loose = {scale: {zero: false, nice: true, padding: 12}};

// ---------------------------------------------------------------- reward against safety

function frontPlot() {
  const g = group(), u = state.utility;
  const all = shown(), able = all.filter((p) => p.v.reward && p.v[u]);
  const rows = able.map((p) => ({
    name: nameOf(p), who: nameOf(p), asked: askedOf(p) || "–", seeds: seedsOf(p), t: p.t,
    x: p.v.reward[0], x1: p.v.reward[1], x2: p.v.reward[2], y: p.v[u][0], y1: p.v[u][1], y2: p.v[u][2],
    reward: told(p.v.reward), utility: told(p.v[u]), feasible: p.f || "–",
  }));
  numbers("front", ["method", "asked", "runs", "reward", u, "feasible"],
          rows.map((r) => [r.who, r.asked, r.seeds, r.reward, r.utility, r.feasible]));
  const lacking = all.length - able.length;
  const steps = g.fronts[`${u}|${state.seed}|${state.threshold}`] || [];
  $("front-caption").textContent =
    `${state.seed === MEANS ? "Means over seeds and prompts" : "Single runs, means over prompts"} with ` +
    `${Math.round(g.level * 100)}% intervals in both directions; up and right is better. Grey steps: the front of all ` +
    `methods ${state.threshold === ALL ? "and thresholds" : "at this threshold"}, shown or not.` +
    `${state.seed === MEANS && state.threshold === ALL ? " Thin lines join a method's thresholds." : ""}` +
    `${lacking ? ` ${lacking} point(s) lack a number and are not drawn.` : ""}`;
  if (!rows.length) return draw("front", null, all.length ? "No run that is shown has scores." : "Nothing is shown: choose a method.");
  const indices = [...new Set(able.map((p) => p.s))];
  const look = scales(indices);
  // a name once per method, at its last threshold
  const last = new Map();
  able.forEach((p, i) => { if (!last.has(p.s) || p.t >= able[last.get(p.s)].t) last.set(p.s, i); });
  const names = [...last.values()].map((i) => rows[i]);
  const x = QUANTITY("x", "reward (larger is better)", loose), y = QUANTITY("y", `${u} (larger is better)`, loose);
  const layer = [
    {data: {values: steps.map(([a, b]) => ({x: a, y: b}))},
     mark: {type: "line", interpolate: "step-before", strokeWidth: 6, color: css("--front"), clip: true},
     encoding: {x, y, order: {field: "x", type: "quantitative"}}},
  ];
  if (state.seed === MEANS && state.threshold === ALL) {
    layer.push({mark: {type: "line", strokeWidth: 1.2, opacity: .55},
                encoding: {x, y, color: look.color, order: {field: "t", type: "quantitative"}}});
  }
  layer.push(
    ...layerOf(rows, sureX, {mark: {type: "rule", opacity: .75},
                             encoding: {x: QUANTITY("x1", x.title, loose), x2: {field: "x2"}, y, color: look.color}}),
    ...layerOf(rows, sureY, {mark: {type: "rule", opacity: .75},
                             encoding: {x, y: QUANTITY("y1", y.title, loose), y2: {field: "y2"}, color: look.color}}),
    {mark: {type: "point", size: 90, strokeWidth: 2, fill: css("--ground"), fillOpacity: .7},
     encoding: {x, y, color: look.color, shape: look.shape,
                tooltip: [...TOOLTIP, {field: "reward"}, {field: "utility", title: u}, {field: "feasible"}]}},
    {name: "labels", data: {values: names}, mark: {type: "text"}, encoding: {x, y, text: {field: "name"}}},
  );
  return draw("front", {data: {values: rows}, layer}, `Reward against ${u}: ${rows.length} points with intervals and their front.`);
}

// ---------------------------------------------------------------- requested against achieved

function calibrationPlot() {
  const g = group(), u = state.utility;
  const able = shown().filter((p) => p.t !== -1 && typeof (p.q || {})[u] === "number" && achieved(p, u));
  const indices = [...new Set(able.map((p) => p.s))].sort((a, b) => a - b);
  const requested = able.map((p) => p.q[u]);
  const low = Math.min(...requested), high = Math.max(...requested), spread = high - low;
  const rows = able.map((p) => {
    const a = achieved(p, u), f = (p.p || {})[u];
    const aside = (indices.indexOf(p.s) - (indices.length - 1) / 2) * .012 * spread;
    return {
      name: nameOf(p), who: nameOf(p), asked: askedOf(p), seeds: seedsOf(p), x: p.q[u] + aside, requested: digits(p.q[u]),
      r: p.q[u], y: a[0], y1: a[1], y2: a[2], achieved: told(a), predicted: f ? told(f) : "–", f: f ? f[0] : null,
      f1: f ? f[1] : null, f2: f ? f[2] : null, row: state.seed === RUNS ? `${nameOf(p)}, seed ${p.seed}` : nameOf(p),
      gap: told(shifted(a, -p.q[u])),
    };
  });
  numbers("calibration", ["method", "asked", "runs", "requested", "achieved", "achieved − requested", "predicted"],
          rows.map((r) => [r.who, r.asked, r.seeds, r.requested, r.achieved, r.gap, r.predicted]));
  const lines = spread > 0 && state.threshold === ALL;
  $("calibration-caption").textContent = !rows.length ? "" :
    `Margin of ${u} over the reference with ${Math.round(g.level * 100)}% intervals` +
    `${state.seed === MEANS ? " (over seeds and prompts: those of achieved less requested)" : " (of a run's prompts)"}; ` +
    `${lines ? "on or above the dashed line the request is met; methods are set apart a little sideways." : "to the right of the dashed line the request is met."}` +
    `${rows.some(foreseen) ? " Hollow, with a dotted interval: what the dual predicted before training." : ""}`;
  if (!rows.length) return draw("calibration", null, `No run that is shown has a requested margin of ${u}.`);
  const look = scales(indices);
  const tooltip = [...TOOLTIP, {field: "requested"}, {field: "achieved"}, {field: "gap", title: "achieved − requested"}, {field: "predicted"}];
  const dashes = {type: "rule", strokeDash: [2, 3], opacity: .7};
  const hollow = {type: "point", size: 45, strokeWidth: 1.5, filled: false};
  const solid = {type: "point", size: 80, filled: true, opacity: 1};
  if (!lines) {
    // one choice of thresholds: a line for each method, with its name on the axis
    const y = {field: "row", type: "nominal", title: null, sort: null, scale: {domain: [...new Set(rows.map((r) => r.row))]}, axis: {labelLimit: narrow() ? 110 : 260, grid: true}};
    const x = QUANTITY("y", `achieved margin of ${u}`, loose);
    const layer = [
      {data: {values: [...new Set(requested)].map((r) => ({r}))}, mark: {type: "rule", strokeDash: [5, 4]}, encoding: {x: QUANTITY("r", x.title, loose)}},
      ...layerOf(rows, sureF, {mark: dashes, encoding: {y, x: QUANTITY("f1", x.title, loose), x2: {field: "f2"}, color: look.color}}),
      ...layerOf(rows, sureY, {mark: {type: "rule", strokeWidth: 1.5},
                               encoding: {y, x: QUANTITY("y1", x.title, loose), x2: {field: "y2"}, color: look.color}}),
      {mark: solid, encoding: {y, x, color: look.color, shape: look.shape, tooltip}},
      ...layerOf(rows, foreseen, {mark: hollow, encoding: {y, x: QUANTITY("f", x.title, loose), color: look.color, shape: look.shape, tooltip}}),
    ];
    const height = Math.max(120, 26 * new Set(rows.map((r) => r.row)).size);
    return draw("calibration", {data: {values: rows}, layer, height}, `Achieved margins of ${u} of ${rows.length} points, requested margin as a line.`);
  }
  const beyond = .08 * spread, ends = [low - beyond, high + beyond].map((r) => ({x: r, y: r}));
  const x = QUANTITY("x", `requested margin of ${u}`, {scale: {zero: false, nice: false, padding: 8}});
  const y = QUANTITY("y", `achieved margin of ${u}`, loose);
  const last = new Map();
  rows.forEach((r) => { if (!last.has(r.name) || r.r >= last.get(r.name).r) last.set(r.name, r); });
  const layer = [
    {data: {values: ends}, mark: {type: "line", strokeDash: [5, 4], color: css("--soft"), strokeWidth: 1.2}, encoding: {x, y}},
    ...(state.seed === RUNS ? [] : [{mark: {type: "line", strokeWidth: 1.2, opacity: .55}, encoding: {x, y, color: look.color}}]),
    ...layerOf(rows, sureF, {mark: dashes, encoding: {x, y: QUANTITY("f1", y.title, loose), y2: {field: "f2"}, color: look.color}}),
    ...layerOf(rows, sureY, {mark: {type: "rule"}, encoding: {x, y: QUANTITY("y1", y.title, loose), y2: {field: "y2"}, color: look.color}}),
    {mark: solid, encoding: {x, y, color: look.color, shape: look.shape, tooltip}},
    ...layerOf(rows, foreseen, {mark: {...hollow, fill: css("--ground")},
                                encoding: {x, y: QUANTITY("f", y.title, loose), color: look.color, shape: look.shape, tooltip}}),
    {name: "labels", data: {values: [...last.values()]}, mark: {type: "text"}, encoding: {x, y, text: {field: "name"}}},
  ];
  return draw("calibration", {data: {values: rows}, layer}, `Achieved against requested margins of ${u}: ${rows.length} points.`);
}

// ---------------------------------------------------------------- multipliers

function courses() {
  const found = new Map();
  shownRuns().forEach((p) => {
    if (!p.course) return;
    const key = `${p.s}|${p.t}`;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(p);
  });
  return found;
}

const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];  // of seeds
const LIGHT = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442"];  // on a dark ground

function dualPlots() {
  const found = courses(), u = state.utility, keys = [...found.keys()].sort((a, b) => a.localeCompare(b, "en", {numeric: true}));
  const select = $("course");
  if (!found.has(state.course)) state.course = keys[0] || "";
  options(select, keys.map((key) => [key, `${nameOf(found.get(key)[0])}${askedOf(found.get(key)[0]) ? " @ " + askedOf(found.get(key)[0]) : ""}`]), state.course);
  select.parentElement.hidden = !keys.length;
  const runs = found.get(state.course) || [];
  if (!runs.length) {
    numbers("dual", [], []);
    $("dual-caption").textContent = "";
    draw("dual-gap", null, "No run that is shown steps its multiplier more than once.");
    return $("dual-multiplier").replaceChildren();
  }
  const seeds = runs.map((p) => `seed ${p.seed}`);
  const rows = runs.flatMap((p) => p.course.steps.map((step) => {
    const s = (step.s || {})[u] || [null, null, null], bound = ((step.b || {})[u]) || null;
    const m = (step.m || {})[u];
    return {seed: `seed ${p.seed}`, i: step.i, m: m === undefined ? null : m, s: s[0], s1: s[1], s2: s[2], bound,
            slack: told(s), multiplier: m === undefined || m === null ? "no number" : m.toPrecision(4), here: step.i === p.course.reported ? "reported" : ""};
  }));
  numbers("dual", ["run", "iteration", `multiplier of ${u}`, "achieved − requested", "at a bound", ""],
          rows.map((r) => [r.seed, r.i, r.multiplier, r.slack, r.bound || "–", r.here]));
  $("dual-caption").textContent =
    `Multiplier of ${u} (a setting, so without interval) and, below, achieved less requested margin on the prompts of the ` +
    "dual step with its interval: under the dashed line the multiplier must grow. " +
    `${rows.some((r) => r.here) ? "A ring marks the iteration that is reported. " : ""}` +
    `${rows.some((r) => r.bound) ? "Triangles: the multiplier is at a bound. " : ""}`;
  const color = {field: "seed", type: "nominal", legend: null,
                 scale: {domain: seeds, range: seeds.map((_, i) => (dark.matches ? LIGHT : COLOURS)[i % COLOURS.length])}};
  const first = Math.min(...rows.map((r) => r.i)), most = Math.max(...rows.map((r) => r.i));
  const i = {field: "i", type: "quantitative", title: "iteration", 
             axis: {format: "d", values: [...new Set(rows.map((r) => r.i))].sort((a, b) => a - b)}, scale: {domain: [first, most + (most - first) * (narrow() ? .22 : .09)], nice: false, padding: 10}};
  const last = new Map(rows.map((r) => [r.seed, r]));
  const base = (field, title) => {
    const y = QUANTITY(field, title, {axis: {tickCount: 5, minExtent: 44}, scale: {zero: field === "s", nice: true, padding: 8}});
    return {i, y, layers: [
      {mark: {type: "line", strokeWidth: 1.8}, encoding: {x: i, y, color}},
      {mark: {type: "point", filled: true, size: 36, opacity: 1},
       encoding: {x: i, y, color, tooltip: [{field: "seed"}, {field: "i", title: "iteration"}, {field: "multiplier"}, {field: "slack", title: "achieved − requested"}, {field: "bound", title: "at bound"}]}},
      ...layerOf(rows, (r) => r.here && r[field] !== null,
                 {mark: {type: "point", filled: false, size: 220, strokeWidth: 2}, encoding: {x: i, y, color}}),
      {name: "labels", data: {values: [...last.values()].filter((r) => r[field] !== null)}, mark: {type: "text"}, encoding: {x: i, y, text: {field: "seed"}}},
    ]};
  };
  const multiplier = base("m", "multiplier"), gap = base("s", "constraint gap");
  const bound = {field: "bound", type: "nominal", legend: null, scale: {domain: ["lower", "upper"], range: ["triangle-down", "triangle-up"]}};
  multiplier.layers.push(...layerOf(rows, (r) => r.bound !== null && r.m !== null,
    {mark: {type: "point", filled: false, size: 200, strokeWidth: 1.6}, encoding: {x: i, y: multiplier.y, color, shape: bound}}));
  gap.layers.unshift(
    {data: {values: [{}]}, mark: {type: "rule", strokeDash: [5, 4]}, encoding: {y: {datum: 0}}},
    ...layerOf(rows, (r) => r.s1 !== null && r.s2 !== null,
               {mark: {type: "area", opacity: .16}, encoding: {x: i, y: QUANTITY("s1", gap.y.title), y2: {field: "s2"}, color}}));
  const height = narrow() ? 170 : 190;
  draw("dual-multiplier", {data: {values: rows}, layer: multiplier.layers, height}, `Multiplier of ${u} by iteration, ${runs.length} run(s).`);
  draw("dual-gap", {data: {values: rows}, layer: gap.layers, height}, `Achieved less requested margin of ${u} by iteration, with intervals.`);
}

// ---------------------------------------------------------------- at a glance, tables

function swatch(index) {
  const look = group().series[index], space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg"), path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "-1.6 -1.6 3.2 3.2");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("aria-hidden", "true");
  const known = {
    circle: "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z", square: "M-.9,-.9H.9V.9H-.9Z", diamond: "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
    "triangle-up": "M0,-1L1,.8H-1Z", "triangle-down": "M0,1L1,-.8H-1Z",
    cross: "M-1,-.35H-.35V-1H.35V-.35H1V.35H.35V1H-.35V.35H-1Z",
  };
  path.setAttribute("d", known[look.shape] || look.shape);
  path.setAttribute("fill", "none");
  path.setAttribute("stroke", ink(index));
  path.setAttribute("stroke-width", ".35");
  svg.append(path);
  return svg;
}

const estimate = (name, found) => make("p", {}, `${name} `, make("span", {class: "number"}, told(found)));

function glance() {
  const g = group();
  const cards = g.best.filter((b) => state.threshold === ALL || String(b.t) === state.threshold).map((b) => {
    const card = make("div", {class: "card"}, make("p", {class: "what"}, `Asked ${g.thresholds[b.t]}: constrained best`));
    if (!b.series) {
      card.append(make("p", {class: "who"}, "no method is feasible"));
      return card;
    }
    const index = g.series.findIndex((s) => s.name === b.series);
    const sure = {yes: "feasible with confidence", likely: "likely feasible: point estimates only"}[b.feasible] || b.feasible;
    card.append(make("p", {class: "who"}, swatch(index), b.series), make("p", {}, sure), estimate("reward", b.reward));
    Object.entries(b.slack).forEach(([u, value]) => card.append(estimate(`${u} slack`, value)));
    return card;
  });
  $("best").replaceChildren(...(cards.length ? cards : [make("p", {}, "None of these runs is called the best: that takes scores, and values per prompt to compare on (see the notes above).")]));
}

function value(cell) {
  if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
  const text = cell.textContent.trim().replace(/−/g, "-");
  const number = /^[<]?-?[\d,]*\.?\d+(e[-+]?\d+)?/.exec(text);
  return number ? Number(number[0].replace(/[<,]/g, "")) : text === "-" || text === "–" || text === "" ? NaN : text.toLowerCase();
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const lines = [...table.tBodies[0].rows].map((row) => [value(row.cells[column]), row]);
    const missing = ([v]) => typeof v === "number" && Number.isNaN(v);
    lines.sort((a, b) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);  // what has no number stays last
      const order = typeof a[0] === "number" && typeof b[0] === "number" ? a[0] - b[0] : String(a[0]).localeCompare(String(b[0]), "en", {numeric: true});
      return down ? -order : order;
    });
    table.tBodies[0].append(...lines.map(([, row]) => row));
  }));
}

function tables() {
  document.querySelectorAll(".group").forEach((box) => { box.hidden = box.dataset.group !== String(state.group); });
  document.querySelectorAll(`.group[data-group="${state.group}"] tbody tr`).forEach((row) => {
    const hidden = (row.dataset.s || "").split(" ").some((s) => s !== "" && state.off.has(Number(s)));
    const elsewhere = state.threshold !== ALL && row.dataset.t !== undefined && row.dataset.t !== "-1" && row.dataset.t !== state.threshold;
    const another = row.dataset.seed !== undefined && state.seed !== MEANS && state.seed !== RUNS && row.dataset.seed !== state.seed;
    row.hidden = hidden || elsewhere || another;
  });
}

// ---------------------------------------------------------------- responses

function answersByPrompt() {
  const found = new Map();
  shownRuns().forEach((p) => (p.g || []).forEach(([prompt, response, scores]) => {
    if (!found.has(prompt)) found.set(prompt, []);
    found.get(prompt).push({p, response, scores});
  }));
  found.forEach((answers) => answers.sort((a, b) => a.p.t - b.p.t || a.p.s - b.p.s || a.p.seed - b.p.seed));
  return found;
}

const has = (text, query) => text.toLowerCase().includes(query);

// the response with the words that were searched for marked
function paragraph(text, query) {
  const found = make("p", {class: "text"}, ...(text === "" ? ["(an empty response)"] : []));
  const low = text.toLowerCase();
  // a letter whose lower case is longer would shift what follows
  const step = query.length && low.length === text.length ? query.length : 0;
  let at = 0;
  for (let next = step ? low.indexOf(query) : -1; next !== -1; next = low.indexOf(query, at)) {
    found.append(text.slice(at, next), make("mark", {}, text.slice(next, next + step)));
    at = next + step;
  }
  found.append(text.slice(at));
  return found;
}

function answerCard(answer, query) {
  const g = group(), text = DATA.texts[answer.response];
  const name = `${nameOf(answer.p)}${askedOf(answer.p) ? " @ " + askedOf(answer.p) : ""}`;
  const scores = answer.scores.map((s, i) => (s === null ? null : `${g.objectives[i]} ${digits(s)}`)).filter((s) => s);
  const box = make("div", {});
  const card = make("div", {class: `card answer${query && has(text, query) ? " hit" : ""}`},
    make("h4", {}, swatch(answer.p.s), name), make("p", {class: "what"}, `seed ${answer.p.seed}${scores.length ? "; this answer: " + scores.join(", ") : ""}`), box);
  if ($("reveal").checked) box.append(paragraph(text, query));
  else {
    const button = make("button", {type: "button", "aria-expanded": "false", onclick: () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      button.firstChild.textContent = open ? "Show response" : "Hide response";
      if (open) box.lastChild.remove(); else box.append(paragraph(text, query));
    }}, "Show response");
    button.setAttribute("aria-label", `Response of ${name}, seed ${answer.p.seed}`);
    box.append(button);
  }
  return card;
}

function responses() {
  const query = $("search").value.trim().toLowerCase(), found = answersByPrompt();
  const matching = [...found].filter(([prompt, answers]) =>
    !query || has(DATA.texts[prompt], query) || answers.some((a) => has(DATA.texts[a.response], query)));
  const hits = !query ? 0 : matching.reduce((n, [, answers]) => n + answers.filter((a) => has(DATA.texts[a.response], query)).length, 0);
  const first = matching.slice(0, state.prompts);
  $("responses").replaceChildren(...first.map(([prompt, answers]) => {
    const grid = make("div", {class: "answers"});
    const ordered = query ? [...answers].sort((a, b) => has(DATA.texts[b.response], query) - has(DATA.texts[a.response], query)) : answers;
    const article = make("article", {}, make("h3", {}, DATA.texts[prompt]), grid);
    let at = 0;
    const further = make("button", {type: "button", onclick: () => add()}, "");
    const add = () => {
      grid.append(...ordered.slice(at, at + ANSWERS_AT_ONCE).map((a) => answerCard(a, query)));
      at += ANSWERS_AT_ONCE;
      further.textContent = `More answers (${ordered.length - at})`;
      if (at >= ordered.length) further.remove();
    };
    if (ordered.length > ANSWERS_AT_ONCE) article.append(make("p", {}, further));
    add();
    return article;
  }));
  $("matches").textContent = !found.size ? "No responses of the runs that are shown are in this page." :
    `${matching.length} of ${found.size} prompts${query ? ` match; ${hits} responses contain the words (marked)` : ""}; ` +
    `${first.length} shown, each with the answers of the methods, thresholds and seeds chosen in the filters.`;
  $("more").hidden = matching.length <= first.length;
}

// ---------------------------------------------------------------- filters

function redraw() {
  const points = shown(), all = every();
  const methods = group().series.length;
  $("shown").textContent = `${methods - state.off.size} of ${methods} methods, ${points.length} of ${all.length} ${state.seed === MEANS ? "means" : "runs"}`;
  glance();
  tables();
  responses();
  return Promise.all([frontPlot(), calibrationPlot(), dualPlots()]);
}

function controls() {
  const g = group();
  state.off = new Set();
  state.threshold = ALL;
  state.seed = g.means.length ? MEANS : RUNS;
  state.utility = g.objectives[1] || "";
  options($("threshold"), [[ALL, "all"], ...g.thresholds.map((text, i) => [String(i), text])], ALL);
  options($("seed"), [...(g.means.length ? [[MEANS, "all, as means"]] : []), [RUNS, "all, each run by itself"], ...g.seeds.map((s) => [String(s), `seed ${s} alone`])], state.seed);
  options($("utility"), g.objectives.slice(1).map((u) => [u, u]), state.utility);
  $("utility-row").hidden = g.objectives.length < 3;
  $("methods").replaceChildren(...g.series.map((series, index) => {
    const box = make("input", {type: "checkbox", checked: true});
    box.addEventListener("change", () => { if (box.checked) state.off.delete(index); else state.off.add(index); redraw(); });
    return make("label", {class: "method"}, box, swatch(index), series.name);
  }));
}

function choose(every_) {
  state.off = new Set(every_ ? [] : group().series.keys());
  $("methods").querySelectorAll("input").forEach((box) => { box.checked = every_; });
  redraw();
}

function start() {
  options($("group"), DATA.groups.map((g, i) => [String(i), g.title]), "0");
  $("group-row").hidden = DATA.groups.length < 2;
  $("group").addEventListener("change", () => { state.group = Number($("group").value); controls(); redraw(); });
  for (const name of ["threshold", "seed", "utility", "course"]) {
    $(name).addEventListener("change", () => { state[name] = $(name).value; if (name === "course") dualPlots(); else redraw(); });
  }
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("all").addEventListener("click", () => choose(true));
  $("none").addEventListener("click", () => choose(false));
  $("search").addEventListener("input", () => { state.prompts = PROMPTS_AT_ONCE; responses(); });
  $("reveal").addEventListener("change", responses);
  $("more").addEventListener("click", () => { state.prompts += PROMPTS_AT_ONCE; responses(); });
  document.querySelectorAll("details.numbers").forEach((box) => box.addEventListener("toggle", () => { if (box.open && box.fill) box.fill(); }));
  document.querySelectorAll("main table.sortable").forEach(sortable);
  dark.addEventListener("change", () => { controls(); redraw(); });
  let was = narrow();
  addEventListener("resize", () => { if (narrow() !== was) { was = narrow(); redraw(); } });
  if (narrow()) $("filters-box").open = false;
  controls();
  redraw().then(() => { performance.mark("ready"); document.documentElement.dataset.ready = "yes"; });
}

start();
})();
