// The reader: overview of a recording, and the labellers' view of ten seconds with their ten minutes.
// Everything is drawn on canvas from binary pieces; text from files only ever becomes textContent or fillText.
"use strict";
(() => {
const CHUNK = 10, MARGIN = 2, CENTRE = 10, TILE = 600, ABSENT = -32768, PX_PER_MM = 96 / 25.4;
const ROW = 11;  // bytes of a window: six votes, status, two of what was noticed, two of why the model was not asked
const token = location.hash.slice(1);
const $ = id => document.getElementById(id);
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const pad = n => String(n).padStart(2, "0");
const SENSITIVITIES = [2, 3, 5, 7, 10, 15, 20, 30, 50], LENGTHS = [5, 10, 15, 20, 30, 60];
const FILTERS = [["0.5–70 Hz", 0.5, 70], ["0.5–40 Hz", 0.5, 40], ["1–35 Hz", 1, 35], ["1–15 Hz", 1, 15], ["5–70 Hz", 5, 70], ["0.3–70 Hz", 0.3, 70], ["0.3 Hz up", 0.3, null], ["0.5 Hz up", 0.5, null], ["1 Hz up", 1, null], ["5 Hz up", 5, null], ["off", null, null]];
const MAINS = [["off", null], ["50 Hz", 50], ["60 Hz", 60]];
const MONTAGE_NAMES = { double_banana: "double banana", transverse: "transverse", average: "average", referential: "referential" };
const KEYS = [["Page Down, Page Up", "next page, page before"], ["→, ←", "one second on, back (with Shift: ten)"], ["Home, End", "beginning, end"], ["n, p", "next event; beginning of this one, event before"],
  ["m", "montage"], ["+, −", "sensitivity"], ["f", "filter"], ["1 – 6", "your label: Seizure, LPD, GPD, LRDA, GRDA, Other"], ["u, Ctrl+Z", "take the last label back; the one before it returns"],
  ["o", "explanation: what the answer rests on"], ["Enter, Esc", "page, overview"], ["c", "colours for colour-blind readers"], ["d", "dark, light"], ["?", "these keys"]];

const view = { about: null, mode: "overview", at: 0, seconds: 10, montage: 0, sensitivity: 4, filter: 0, mains: 0, safe: false, threshold: 0.5, hover: null, why: null };
const rows = { n: 0, total: 0, bytes: new Uint8Array(0), state: "waiting" };
const underway = () => rows.state === "running" || rows.state === "waiting";
const unread = () => rows.state !== "done";
const reach = () => rows.n ? Math.min(view.about.duration, view.about.scan.first + rows.n * view.about.scan.step) : 0;  // s that were looked at
let events = [], labels = [], past = [], marked = [], current = -1, ink = {}, palette = null, pending = false, turnedAt = 0;
const chunks = new Map(), tiles = new Map();
window.hmsReader = { view, rows, chunks, tiles, turns: [], get events() { return events; }, get labels() { return labels; } };

// ---- talking to the server ------------------------------------------------------------------------------------------
async function ask(path, options = {}) {
  const reply = await fetch(path, { ...options, headers: { "X-Session": token, ...(options.headers || {}) }, cache: "no-store" });
  if (reply.ok) return reply;
  const problem = await reply.json().catch(() => ({}));
  throw Object.assign(new Error(problem.detail || `the server answers ${reply.status}`), { status: reply.status });
}

function remember(map, key, load, limit) {
  if (map.has(key)) { const kept = map.get(key); map.delete(key); map.set(key, kept); return kept; }
  const entry = { data: null };
  map.set(key, entry);
  while (map.size > limit) map.delete(map.keys().next().value);
  load().then(x => { entry.data = x; redraw(); }, e => { map.delete(key); toast(e.message); });
  return entry;
}

function chunk(k) {
  const [, low, high] = FILTERS[view.filter], mains = MAINS[view.mains][1];
  const query = new URLSearchParams({ start: k * CHUNK, seconds: CHUNK });
  if (low !== null) query.set("low", low);
  if (high !== null) query.set("high", high);
  if (mains !== null) query.set("mains", mains);
  return remember(chunks, `${k}|${view.filter}|${view.mains}`, async () => {
    const buffer = await (await ask(`page?${query}`)).arrayBuffer(), head = new DataView(buffer);
    const n = head.getUint32(0, true), m = head.getUint32(4, true), step = head.getFloat32(8, true);
    return { step, n, m, rows: Array.from({ length: n }, (_, i) => new Int16Array(buffer, 12 + 2 * m * i, m)) };
  }, 80);
}

function tile(k) {
  return remember(tiles, k, async () => shade(new Uint8Array(await (await ask(`tile?k=${k}`)).arrayBuffer())), 24);
}

function shade(bytes) {  // (4, 100, 300) -> four canvases
  return [0, 1, 2, 3].map(r => {
    const c = new OffscreenCanvas(300, 100), g = c.getContext("2d"), image = g.createImageData(300, 100);
    for (let f = 0; f < 100; f++) for (let t = 0; t < 300; t++) {
      const v = bytes[(r * 100 + f) * 300 + t], to = ((99 - f) * 300 + t) * 4;
      if (v) { image.data[to] = palette[3 * v]; image.data[to + 1] = palette[3 * v + 1]; image.data[to + 2] = palette[3 * v + 2]; image.data[to + 3] = 255; }
    }
    g.putImageData(image, 0, 0);
    return c;
  });
}

async function follow() {  // new rows of the scan, until it ends
  for (;;) {
    try {
      const reply = await ask(`scan?from=${rows.n}`), about = JSON.parse(reply.headers.get("X-Scan")), more = new Uint8Array(await reply.arrayBuffer());
      if (more.length) { const all = new Uint8Array(rows.bytes.length + more.length); all.set(rows.bytes); all.set(more, rows.bytes.length); rows.bytes = all; rows.n = all.length / ROW; }
      rows.state = about.state; rows.total = about.total;
      showProgress(about);
      if (more.length || about.state !== "running") await findEvents();
      redraw();
      if (!underway()) return;
    } catch (e) { toast(e.message); if (e.status === 403) return; }
    await new Promise(go => setTimeout(go, 500));
  }
}

let search = 0;
async function findEvents() {  // an answer that a later one has overtaken is dropped
  const mine = ++search, found = (await (await ask(`events?threshold=${view.threshold}`)).json()).events;
  if (mine === search) { events = found; listEvents(); }
}

// ---- words ----------------------------------------------------------------------------------------------------------
const hms = s => { const t = Math.max(0, Math.round(s)); return `${Math.floor(t / 3600)}:${pad(Math.floor(t / 60) % 60)}:${pad(t % 60)}`; };
const span = s => s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
const classOf = key => view.about.classes.find(c => c.key === key);
const colourOf = c => view.safe ? c.safe : c.color;
const el = (name, text, attributes = {}) => { const e = document.createElement(name); if (text !== undefined) e.textContent = text; for (const [k, v] of Object.entries(attributes)) e[k] = v; return e; };
const dot = c => { const e = el("span", undefined, { className: "dot" }); e.style.background = colourOf(c); return e; };
let toastTimer = 0;
function toast(text) { $("toast").textContent = text; $("toast").classList.add("shown"); clearTimeout(toastTimer); toastTimer = setTimeout(() => $("toast").classList.remove("shown"), 2600); }

function showProgress({ state, done, total, left, error }) {  // how a scan ended stays on the screen, unless it is complete
  const where = `${hms(reach())} of ${hms(view.about.duration)}`;
  $("progress").hidden = state === "done"; $("bar").hidden = $("cancel").hidden = !underway(); $("progress").classList.toggle("ended", !underway());
  $("bar").value = total ? done / total : 0;
  $("left").textContent = state === "stopped" ? `Stopped at ${where}: what lies behind was not looked at.` : state === "failed" ? `Failed at ${where}: ${error || "the scan failed"}`
    : total ? `${done} of ${total} windows${left === null ? "" : `, ${span(left)} left`}` : "loading the model, reading the first minutes";
}

function listEvents() {
  const body = $("events"), near = $("events-near");
  body.replaceChildren(); near.replaceChildren(); marked = [];
  $("events-title").textContent = events.length ? `Events (${events.length})` : "Events";
  const shown = events.slice(0, 2000);
  shown.forEach(e => {
    const c = classOf(e.kind);
    const name = () => { const td = el("td"); td.append(dot(c), c.label); return td; };
    const full = el("tr"), brief = el("tr");
    full.append(el("td", hms(e.start)), name(), el("td", span(e.stop - e.start), { className: "n" }), el("td", e.peak.toFixed(2), { className: "n" }));
    brief.append(el("td", hms(e.start)), name(), el("td", span(e.stop - e.start), { className: "n" }));
    for (const tr of [full, brief]) tr.addEventListener("click", () => { toEvent(e); setMode("page"); });
    body.append(full); near.append(brief);
  });
  if (!shown.length) for (const b of [body, near]) { const tr = el("tr"); tr.append(el("td", unread() ? "nothing above the threshold so far" : "none above the threshold", { className: "empty", colSpan: 4 })); b.append(tr); }
  markEvent();
}

function markEvent() {  // only rows that change are touched: a day may have thousands
  const t = view.at + view.seconds / 2, now = [];
  for (let i = 0; i < Math.min(events.length, 2000); i++) if (events[i].start <= t && t < events[i].stop) now.push(i);
  for (const body of [$("events"), $("events-near")]) {
    for (const i of marked) if (!now.includes(i) && body.children[i]) body.children[i].removeAttribute("aria-current");
    for (const i of now) if (!marked.includes(i) && body.children[i]) { body.children[i].setAttribute("aria-current", "true"); if (view.mode === "page") body.children[i].scrollIntoView({ block: "nearest" }); }
  }
  marked = now;
}

function listLabels() {
  const list = $("labels");
  list.replaceChildren();
  if (!labels.length) list.append(el("li", "keys 1 to 6 label these ten seconds", { className: "empty" }));
  for (const l of [...labels].reverse()) {
    const li = el("li"), name = el("span");
    name.append(dot(classOf(l.label)), classOf(l.label).label);
    li.append(name, el("span", hms(l.at)));
    li.addEventListener("click", () => goto(l.at - view.seconds / 2));
    list.append(li);
  }
}

function rowAt(t) {  // index of the scan's row that covers second t; -1: none
  const { step, first } = view.about.scan, i = Math.floor((t - first) / step + 1e-6);
  return i >= 0 && i < rows.n ? i : -1;
}

const bits = (i, at) => rows.bytes[ROW * i + at] | rows.bytes[ROW * i + at + 1] << 8;
const wordsOf = mask => view.about.kinds.filter((_, k) => mask >> k & 1).join(", ");
function whyNot(i, status) {  // what is to be said of the signal around a window
  if (i < 0) return underway() ? "Not reached yet." : unread() && view.at + view.seconds / 2 >= reach() ? "Not looked at: the scan ended before." : "No window is centred here.";
  const why = wordsOf(bits(i, 9)), noticed = wordsOf(bits(i, 7) & ~bits(i, 9));
  const said = status === 1 ? "No data here: the model was not asked" : status === 2 ? "Poor signal: the model was not asked" : "";
  return [said && `${said}${why ? ` (${why})` : ""}.`, noticed && `Noticed: ${noticed}.`].filter(Boolean).join(" ");
}

function showVotes() {
  const box = $("votes"), i = rowAt(view.at + view.seconds / 2), status = i < 0 ? 9 : rows.bytes[ROW * i + 6];
  box.replaceChildren();
  const p = view.about.classes.map((_, k) => status === 0 ? rows.bytes[ROW * i + k] / 255 : 0), best = p.indexOf(Math.max(...p));
  view.about.classes.forEach((c, k) => {
    const track = el("div", undefined, { className: "track" }), fill = el("i"), first = status === 0 && k === best ? "first" : "";
    fill.style.width = `${100 * p[k]}%`; fill.style.background = colourOf(c);
    track.append(fill);
    box.append(el("span", c.label, { className: first }), track, el("output", status === 0 ? p[k].toFixed(2) : "–", { className: first }));
  });
  $("why").textContent = whyNot(i, status);
}

// ---- drawing --------------------------------------------------------------------------------------------------------
function readInk() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "ink", "soft", "faint", "line", "accent", "trace", "ekg", "margin", "box", "grid", "hatch", "poor"]) ink[name] = style.getPropertyValue(`--${name}`).trim();
}

function pen(canvas) {
  const w = canvas.clientWidth, h = canvas.clientHeight, scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(w * scale) || canvas.height !== Math.round(h * scale)) { canvas.width = Math.round(w * scale); canvas.height = Math.round(h * scale); }
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, w, h);
  g.font = '11px system-ui, "Segoe UI", Arial, sans-serif';
  g.textBaseline = "middle"; g.lineWidth = 1; g.setLineDash([]);
  return { g, w, h };
}

function hatch(g, x, y, w, h) {
  if (w <= 0) return;
  g.save(); g.beginPath(); g.rect(x, y, w, h); g.clip(); g.strokeStyle = ink.hatch; g.lineWidth = 1; g.beginPath();
  const from = Math.floor((x - h) / 7) * 7;
  for (let a = from; a < x + w + h; a += 7) { g.moveTo(a, y + h); g.lineTo(a + h, y); }
  g.stroke(); g.restore();
}

function niceStep(duration, most) { return [10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 14400, 21600].find(s => duration / s <= most) || 43200; }

function drawLanes(canvas, compact) {  // what a page turn does not change is drawn once and kept
  const { g, w, h } = pen(canvas), about = view.about, left = 74, right = w - 14, strip = compact ? 7 : 36, top = compact ? 5 : 14, bottom = h - (compact ? 18 : 26) - strip;
  const width = right - left, pxOf = t => left + width * t / about.duration;
  if (!canvas.width || !canvas.height) return;  // another tab is in front
  canvas.place = { left, width };
  const key = [rows.n, rows.state, canvas.width, canvas.height, view.safe, view.threshold, ink.paper].join();
  if (canvas.keptKey !== key) {
    canvas.kept = new OffscreenCanvas(canvas.width, canvas.height); canvas.keptKey = key;
    const kept = canvas.kept.getContext("2d"), scale = canvas.width / w;
    kept.setTransform(scale, 0, 0, scale, 0, 0); kept.font = g.font; kept.textBaseline = "middle"; kept.lineWidth = 1;
    paintLanes(kept, { compact, left, right, top, bottom, h, width, pxOf });
  }
  g.drawImage(canvas.kept, 0, 0, w, h);
  for (const l of labels) { g.fillStyle = colourOf(classOf(l.label)); const x = pxOf(l.at), y = bottom + strip; g.beginPath(); g.moveTo(x - 4, y + 5); g.lineTo(x + 4, y + 5); g.lineTo(x, y); g.fill(); }
  const x = pxOf(view.at + view.seconds / 2), wide = Math.max(2, width * view.seconds / about.duration);
  g.fillStyle = ink.ink; g.globalAlpha = 0.85; g.fillRect(x - 0.75, top - 3, 1.5, bottom - top + 6); g.globalAlpha = 0.12; g.fillRect(x - wide / 2, top, wide, bottom - top); g.globalAlpha = 1;
  if (view.hover !== null && !compact) readout(g, view.hover, pxOf(view.hover), top, w);
}

function laneColumns(columns) {  // per pixel: peak and mean of each class, how many windows are poor, what was noticed
  const { step, first } = view.about.scan, { duration, strips } = view.about;
  const peak = Array.from({ length: 6 }, () => new Float32Array(columns)), sum = peak.map(() => new Float32Array(columns)), count = new Uint16Array(columns), poor = new Uint16Array(columns), seen = new Uint16Array(columns);
  for (let i = 0; i < rows.n; i++) {
    const a = clamp(Math.floor((first + i * step) / duration * columns), 0, columns - 1), b = clamp(Math.ceil((first + (i + 1) * step) / duration * columns), a + 1, columns);
    const status = rows.bytes[ROW * i + 6];
    for (let x = a; x < b; x++) {
      seen[x] |= bits(i, 7);
      if (status === 2) poor[x]++;
      if (status !== 0) continue;
      count[x]++;
      for (let k = 0; k < 6; k++) { const p = rows.bytes[ROW * i + k] / 255; sum[k][x] += p; if (p > peak[k][x]) peak[k][x] = p; }
    }
  }
  return { peak, sum, count, poor, strips: strips.map(s => seen.map(v => v & s.mask)) };
}

function paintLanes(g, { compact, left, right, top, bottom, h, width, pxOf }) {
  const about = view.about, classes = about.classes, lane = (bottom - top) / classes.length, columns = Math.max(1, Math.floor(width)), { peak, sum, count, poor, strips } = laneColumns(columns);
  if (unread() && reach() < about.duration) {
    const x = pxOf(reach());
    g.fillStyle = ink.margin; g.fillRect(x, top, right - x, bottom - top);
    if (!underway() && right - x > 90) { g.fillStyle = ink.soft; g.textAlign = "center"; g.font = '11px system-ui, Arial, sans-serif'; g.fillText("not looked at", (x + right) / 2, (top + bottom) / 2); }
  }
  g.fillStyle = ink.poor;
  for (let x = 0; x < columns; x++) if (poor[x] && poor[x] > count[x]) g.fillRect(left + x, top, 1.2, bottom - top);
  for (const [a, b] of about.gaps) hatch(g, pxOf(a), top, Math.max(2, pxOf(b) - pxOf(a)), bottom - top);
  classes.forEach((c, k) => {
    const base = top + lane * (k + 1) - (compact ? 1 : 3), high = lane - (compact ? 2 : 10);
    g.strokeStyle = ink.faint; g.beginPath(); g.moveTo(left, base + 0.5); g.lineTo(right, base + 0.5); g.stroke();
    g.fillStyle = colourOf(c);
    for (const [series, alpha] of [[peak[k], 0.35], [sum[k], 1]]) {
      g.globalAlpha = alpha;
      for (let x = 0; x < columns; x++) { const v = series === sum[k] ? (count[x] ? sum[k][x] / count[x] : 0) : series[x]; if (v > 0.004) g.fillRect(left + x, base - v * high, 1.2, v * high); }
    }
    g.globalAlpha = 1;
    if (!compact && k < 5) { const y = Math.round(base - view.threshold * high) + 0.5; g.strokeStyle = ink.box; g.setLineDash([3, 4]); g.beginPath(); g.moveTo(left, y); g.lineTo(right, y); g.stroke(); g.setLineDash([]); }
    g.fillStyle = colourOf(c); g.fillRect(10, base - (compact ? lane / 2 + 2 : high / 2 + 4), compact ? 6 : 9, compact ? 6 : 9);
    g.fillStyle = ink.ink; g.textAlign = "left"; g.font = compact ? '10px system-ui, Arial, sans-serif' : '12px system-ui, Arial, sans-serif';
    g.fillText(c.label, compact ? 21 : 25, base - (compact ? lane / 2 - 1 : high / 2));
  });
  const each = compact ? 2 : 11;  // the quality strip: a row per fault, each at its own height
  strips.forEach((seen, k) => {
    const y = bottom + 2 + k * each;
    g.fillStyle = ink.soft;
    for (let x = 0; x < columns; x++) if (seen[x]) g.fillRect(left + x, y, 1.2, each - (compact ? 0.5 : 4));
    if (!compact) { g.font = '10px system-ui, Arial, sans-serif'; g.textAlign = "left"; g.fillText(about.strips[k].name, 25, y + 4); }
  });
  g.font = '11px system-ui, Arial, sans-serif';
  g.fillStyle = ink.soft; g.textAlign = "center";
  const tick = niceStep(about.duration, Math.max(2, width / 90));
  for (let t = 0; t <= about.duration; t += tick) { const x = pxOf(t); g.fillText(hms(t), clamp(x, left + 14, right - 14), h - (compact ? 8 : 12)); if (!compact) { g.strokeStyle = ink.faint; g.beginPath(); g.moveTo(x + 0.5, top); g.lineTo(x + 0.5, bottom); g.stroke(); } }
}

function readout(g, t, x, top, w) {
  const i = rowAt(t), status = i < 0 ? 9 : rows.bytes[ROW * i + 6];
  let text = hms(t);
  if (status === 0) { let best = 0; for (let k = 1; k < 6; k++) if (rows.bytes[ROW * i + k] > rows.bytes[ROW * i + best]) best = k; text += `  ${view.about.classes[best].label} ${(rows.bytes[ROW * i + best] / 255).toFixed(2)}`; }
  else if (status < 9) text += status === 1 ? "  no data" : `  poor signal: ${wordsOf(bits(i, 9))}`;
  const width = g.measureText(text).width + 14, at = clamp(x - width / 2, 2, w - width - 2);
  g.fillStyle = ink.ink; g.fillRect(at, top, width, 19);
  g.fillStyle = ink.paper; g.textAlign = "left"; g.fillText(text, at + 7, top + 10);
}

const regionStart = () => clamp(view.at + view.seconds / 2 - TILE / 2, 0, Math.max(0, view.about.duration - TILE));

function drawRegions() {
  const canvas = $("regions"), { g, w, h } = pen(canvas), left = 38, right = w - 8, top = 8, bottom = h - 22, width = right - left, gap = 8, high = (bottom - top - 3 * gap) / 4;
  const t0 = regionStart(), pxOf = t => left + width * (t - t0) / TILE;
  canvas.place = { left, width, t0 };
  const first = Math.floor(t0 / TILE), last = Math.floor((t0 + TILE - 1e-6) / TILE), there = [];
  for (let k = first; k <= last; k++) if (k * TILE < view.about.duration) there.push([k, tile(k)]);
  view.about.regions.forEach(([key, name], r) => {
    const y = top + r * (high + gap);
    g.save(); g.beginPath(); g.rect(left, y, width, high); g.clip();
    hatch(g, left, y, width, high);
    for (const [k, entry] of there) {
      const a = pxOf(k * TILE), b = pxOf((k + 1) * TILE);
      if (entry.data) g.drawImage(entry.data[r], a, y, b - a, high); else { g.fillStyle = ink.margin; g.fillRect(a, y, b - a, high); }
    }
    g.strokeStyle = "#ffffff"; g.lineWidth = 1.5; g.setLineDash([5, 4]);
    const middle = view.at + view.seconds / 2;
    for (const t of [middle - CENTRE / 2, middle + CENTRE / 2]) { const x = pxOf(t); g.strokeStyle = "rgba(0,0,0,.55)"; g.lineWidth = 3; g.beginPath(); g.moveTo(x, y); g.lineTo(x, y + high); g.stroke(); g.strokeStyle = "#fff"; g.lineWidth = 1.5; g.beginPath(); g.moveTo(x, y); g.lineTo(x, y + high); g.stroke(); }
    g.restore(); g.setLineDash([]);
    g.strokeStyle = ink.line; g.strokeRect(left + 0.5, y + 0.5, width - 1, high - 1);
    g.fillStyle = ink.soft; g.textAlign = "right";
    for (const f of [0, 5, 10, 15]) g.fillText(f, left - 4, clamp(y + high * (1 - f / 20), y + 5, y + high - 4));
    const text = `${key}  ${name}`, wide = g.measureText(text).width + 10;
    g.fillStyle = ink.paper; g.globalAlpha = 0.85; g.fillRect(left + 4, y + 4, wide, 17); g.globalAlpha = 1;
    g.fillStyle = ink.ink; g.textAlign = "left"; g.fillText(text, left + 9, y + 13);
  });
  g.save(); g.translate(9, (top + bottom) / 2); g.rotate(-Math.PI / 2); g.fillStyle = ink.soft; g.textAlign = "center"; g.fillText("Hz", 0, 0); g.restore();
  g.textAlign = "center"; g.fillStyle = ink.soft;
  const minutes = width > 330 ? 120 : 300;
  for (let t = Math.ceil(t0 / minutes) * minutes; t <= t0 + TILE; t += minutes) { const x = pxOf(t); g.fillText(hms(t), clamp(x, left + 20, right - 20), h - 10); }
}

function montageRows() {
  const about = view.about, montage = about.montages[view.montage], at = name => about.channels.indexOf(name);
  const out = montage.pairs.map(([a, b]) => ({ label: b === "REF" ? a : `${a}-${b}`, plus: at(a), minus: b === "REF" ? -1 : b === "AVG" ? -2 : at(b) }));
  let y = 0;
  out.forEach((row, i) => { const joined = i && row.minus >= 0 && montage.pairs[i - 1][1] === montage.pairs[i][0]; const plain = i && row.minus < 0; y += i ? (joined || plain ? 1 : 1.55) : 0; row.y = y; });
  if (about.channels.includes("EKG")) out.push({ label: "EKG", plus: at("EKG"), minus: -1, ekg: true, y: y + 1.55 });
  return out;
}

function drawWhy(g, lines, yOf, unit, pxOf) {  // evidence of the chain that a row touches, over time
  const { why } = view, about = view.about, strongest = Math.max(0.02, ...why.lines.flatMap(l => l.evidence.map(Math.abs)));
  for (const row of lines) {
    if (row.ekg) continue;
    const near = why.lines.filter(l => [row.plus, row.minus].some(i => i >= 0 && l.electrodes.includes(about.channels[i])));
    if (!near.length) continue;
    near[0].evidence.forEach((_, i) => {
      const v = near.reduce((s, l) => s + l.evidence[i], 0) / near.length / strongest, x = pxOf(why.start + i * why.step), wide = pxOf(why.start + (i + 1) * why.step) - x;
      if (Math.abs(v) < 0.1) return;
      g.globalAlpha = 0.12 + 0.38 * Math.abs(v);
      if (v > 0) { g.fillStyle = colourOf(classOf(why.label)); g.fillRect(x, yOf(row) - unit / 2, wide, unit); } else hatch(g, x, yOf(row) - unit / 2, wide, unit);
      g.globalAlpha = 1;
    });
  }
}

function drawPage() {
  const canvas = $("page"), { g, w, h } = pen(canvas), about = view.about, left = 62, right = w - 10, top = 12, bottom = h - 62, width = right - left;
  const margin = view.seconds === 10 ? MARGIN : 0, t0 = view.at - margin, t1 = view.at + view.seconds + margin, pxOf = t => left + width * (t - t0) / (t1 - t0);
  const lines = montageRows(), unit = (bottom - top) / (lines[lines.length - 1].y + 1.6);
  const pxPerUv = PX_PER_MM / SENSITIVITIES[view.sensitivity];
  if (margin) { g.fillStyle = ink.margin; g.fillRect(left, top, pxOf(view.at) - left, bottom - top); g.fillRect(pxOf(view.at + view.seconds), top, right - pxOf(view.at + view.seconds), bottom - top); }
  g.strokeStyle = ink.grid; g.setLineDash([2, 4]);
  const every = view.seconds > 30 ? 5 : 1;
  g.beginPath();
  for (let t = Math.ceil(t0 / every) * every; t <= t1; t += every) { const x = Math.round(pxOf(t)) + 0.5; g.moveTo(x, top); g.lineTo(x, bottom); }
  g.stroke(); g.setLineDash([]);
  const wanted = [];
  for (let k = Math.floor(Math.max(0, t0) / CHUNK); k * CHUNK < Math.min(t1, about.duration); k++) wanted.push([k, chunk(k)]);
  for (const t of [[t0, 0], [about.duration, t1]]) if (t[0] < t[1]) { g.globalAlpha = 0.5; hatch(g, pxOf(t[0]), top, pxOf(t[1]) - pxOf(t[0]), bottom - top); g.globalAlpha = 1; }
  g.save(); g.beginPath(); g.rect(left, top, width, bottom - top); g.clip();
  let complete = true;
  if (view.why) drawWhy(g, lines, row => top + (row.y + 0.8) * unit, unit, pxOf);
  for (const [k, entry] of wanted) {
    const x0 = pxOf(k * CHUNK), x1 = pxOf((k + 1) * CHUNK);
    if (!entry.data) { complete = false; continue; }
    hatchMissing(g, entry.data, lines, x0, x1, top, bottom);
    for (const line of lines) trace(g, entry.data, line, x0, x1, top + (line.y + 0.8) * unit, line.ekg ? about.ekg_gain * unit : pxPerUv, 4 * unit);
  }
  g.restore();
  g.textAlign = "right";
  for (const line of lines) { g.fillStyle = line.ekg ? ink.ekg : ink.ink; g.fillText(line.label, left - 7, top + (line.y + 0.8) * unit); }
  const middle = view.at + view.seconds / 2, from = pxOf(middle - CENTRE / 2), to = pxOf(middle + CENTRE / 2);
  g.strokeStyle = ink.box; g.setLineDash([6, 4]); g.lineWidth = 1.2;
  g.strokeRect(Math.max(from, left), top, Math.min(to, right) - Math.max(from, left), bottom - top); g.setLineDash([]);
  g.fillStyle = ink.soft; g.textAlign = "center";
  const said = niceTicks(view.seconds);
  for (let t = Math.ceil(t0 / said) * said; t <= t1; t += said) if (t >= 0 && t <= about.duration) { const x = pxOf(t); if (x > left + 12 && x < right - 150) g.fillText(hms(t), x, bottom + 13); }
  scaleBar(g, pxOf(t1), bottom, pxPerUv, width / (t1 - t0));
  const mine = [...labels].reverse().find(l => Math.abs(l.at - middle) < CENTRE / 2);
  if (mine) { const c = classOf(mine.label), text = c.label; g.font = '600 12px system-ui, Arial, sans-serif'; const wide = g.measureText(text).width + 26; g.fillStyle = ink.paper; g.fillRect(from + 6, top + 5, wide, 20); g.strokeStyle = colourOf(c); g.strokeRect(from + 6.5, top + 5.5, wide, 20); g.fillStyle = colourOf(c); g.fillRect(from + 12, top + 11, 9, 9); g.fillStyle = ink.ink; g.textAlign = "left"; g.fillText(text, from + 26, top + 16); }
  if (!complete && !wanted.some(([, e]) => e.data)) { g.fillStyle = ink.soft; g.textAlign = "center"; g.font = '13px system-ui, Arial, sans-serif'; g.fillText("reading", (left + right) / 2, (top + bottom) / 2); }
  if (complete && turnedAt) { window.hmsReader.turns.push(performance.now() - turnedAt); turnedAt = 0; }
  if (complete) prefetch();
}

const niceTicks = s => s <= 15 ? 2 : s <= 30 ? 5 : 10;

function hatchMissing(g, data, lines, x0, x1, top, bottom) {  // where no row of the montage has data
  const { m } = data, per = (x1 - x0) / m, eeg = data.rows[0];
  let from = -1;
  for (let i = 0; i <= m; i++) {
    const gone = i < m && eeg[i] === ABSENT && lines.every(l => data.rows[l.plus][i] === ABSENT);
    if (gone && from < 0) from = i;
    if (!gone && from >= 0) { hatch(g, x0 + from * per, top, (i - from) * per, bottom - top); from = -1; }
  }
}

function averages(data) {
  if (data.mean) return data.mean;
  const mean = new Float32Array(data.m);
  for (let i = 0; i < data.m; i++) { let s = 0, n = 0; for (let k = 0; k < 19; k++) { const v = data.rows[k][i]; if (v !== ABSENT) { s += v; n++; } } mean[i] = n ? s / n : 0; }
  return data.mean = mean;
}

function trace(g, data, line, x0, x1, y0, gain, limit) {
  const plus = data.rows[line.plus], minus = line.minus >= 0 ? data.rows[line.minus] : null, mean = line.minus === -2 ? averages(data) : null;
  const { m, step } = data, per = (x1 - x0) / m, scale = (line.ekg ? -gain : gain) * step;  // EEG: negative is up
  g.strokeStyle = line.ekg ? ink.ekg : ink.trace; g.lineWidth = 0.9; g.beginPath();
  let down = false;
  for (let i = 0; i < m; i++) {
    const a = plus[i], b = minus ? minus[i] : 0;
    if (a === ABSENT || b === ABSENT) { down = false; continue; }
    const dy = (mean ? a - mean[i] : a - b) * scale, y = y0 + (dy > limit ? limit : dy < -limit ? -limit : dy), x = x0 + i * per;
    if (down) g.lineTo(x, y); else { g.moveTo(x, y); down = true; }
  }
  g.stroke();
}

function scaleBar(g, right, bottom, pxPerUv, pxPerS) {
  const uv = [1000, 500, 200, 100, 50, 20, 10].find(u => u * pxPerUv <= 42) || 10, high = uv * pxPerUv, wide = Math.min(pxPerS, 90), x = right - 8, y = bottom + 44;  // below the page, over nothing
  g.strokeStyle = ink.ink; g.lineWidth = 1.6; g.beginPath(); g.moveTo(x - wide, y - high); g.lineTo(x - wide, y); g.lineTo(x, y); g.stroke();
  g.fillStyle = ink.ink; g.textAlign = "right"; g.fillText(`${uv} µV`, x - wide - 5, y - high / 2); g.textAlign = "center";
  g.fillText(wide < pxPerS ? `${(wide / pxPerS).toFixed(1)} s` : "1 s", x - wide / 2, y + 8);
}

function prefetch() {
  const k0 = Math.floor(view.at / CHUNK), n = Math.ceil(view.seconds / CHUNK), last = Math.floor((view.about.duration - 0.01) / CHUNK);
  for (const k of [k0 + n, k0 + n + 1, k0 - 1, k0 - n]) if (k >= 0 && k <= last) chunk(k);
  const edge = regionStart() + TILE * 1.25;
  if (edge < view.about.duration) tile(Math.floor(edge / TILE));
}

function redraw() {
  if (pending || !view.about) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    if (view.mode === "overview") drawLanes($("lanes"), false);
    else { drawLanes($("strip"), true); drawRegions(); drawPage(); showVotes(); }
    $("clock").replaceChildren(hms(view.at), el("small", ` of ${hms(view.about.duration)}`));
  });
}

// ---- doing ----------------------------------------------------------------------------------------------------------
function goto(t) {
  view.at = clamp(t, 0, Math.max(0, view.about.duration - view.seconds));
  turnedAt = performance.now();
  markEvent(); redraw();
}
function setMode(mode) {
  view.mode = mode; marked = [];
  $("overview").hidden = mode !== "overview"; $("reading").hidden = mode !== "page"; $("tools").style.visibility = mode === "page" ? "visible" : "hidden";
  $("to-overview").setAttribute("aria-pressed", String(mode === "overview")); $("to-page").setAttribute("aria-pressed", String(mode === "page"));
  markEvent(); redraw();
}
function choose(name, i, n) { view[name] = clamp(i, 0, n - 1); $(name).value = view[name]; redraw(); }
const placeOf = e => clamp((e.start + Math.min(e.stop, e.start + CENTRE)) / 2 - view.seconds / 2, 0, Math.max(0, view.about.duration - view.seconds));
const toEvent = e => { current = events.indexOf(e); goto(placeOf(e)); };
function step(direction) {  // from the event one is at, by its number: two may begin at the same time; from elsewhere, by time
  const here = events[current] && Math.abs(placeOf(events[current]) - view.at) < 0.01;
  const i = here ? current + direction : direction > 0 ? events.findIndex(e => placeOf(e) > view.at + 0.01) : events.findLastIndex(e => placeOf(e) < view.at - 0.01);
  if (!events[i]) return toast(events.length ? (direction > 0 ? "no later event" : "no earlier event") : "no events above the threshold");
  setMode("page"); toEvent(events[i]);
}
let sending = Promise.resolve();
function sendLabels() {  // one after the other: what was sent last is what is kept
  listLabels(); redraw();
  sending = sending.then(() => ask("labels", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(labels) })).catch(e => toast(e.message));
}
function label(k) {
  if (view.mode !== "page") return toast("labels belong to a page: press Enter");
  const at = Math.round(10 * (view.at + view.seconds / 2)) / 10;
  past.push(labels);
  labels = [...labels.filter(l => Math.abs(l.at - at) > 0.05), { at, label: view.about.classes[k].key }];
  sendLabels();
}
function undo() {  // what was there before the last key; of labels from an earlier look, the last goes
  if (!past.length && !labels.length) return toast("there is no label to take back");
  labels = past.length ? past.pop() : labels.slice(0, -1);
  sendLabels();
}
async function explain() {  // once more: off; elsewhere: anew
  if (view.mode !== "page") return toast("an explanation belongs to a page: press Enter");
  const at = view.at + view.seconds / 2;
  if (view.why && Math.abs(view.why.at - at) < 0.5) { view.why = null; return redraw(); }
  toast("hiding one part after the other");
  try { view.why = { at, ...(await (await ask(`explain?at=${at}`)).json()) }; toast(`shaded: speaks for ${classOf(view.why.label).label}; hatched: speaks against`); }
  catch (e) { view.why = null; toast(e.message); }
  redraw();
}
function dark(on) {
  document.documentElement.dataset.theme = on ? "dark" : "light";
  $("dark").textContent = on ? "Light" : "Dark";
  readInk(); redraw();
}
function tellTheme() { if (parent !== window) parent.postMessage({ hms: "theme", dark: document.documentElement.dataset.theme === "dark" }, location.origin); }
function turnDark() { dark(document.documentElement.dataset.theme !== "dark"); tellTheme(); }
function turnColours() { view.safe = !view.safe; listEvents(); listLabels(); redraw(); toast(view.safe ? "colours for colour-blind readers" : "usual colours"); }

const ACTIONS = {
  PageDown: () => goto(view.at + view.seconds), PageUp: () => goto(view.at - view.seconds), ArrowRight: e => goto(view.at + (e.shiftKey ? 10 : 1)), ArrowLeft: e => goto(view.at - (e.shiftKey ? 10 : 1)),
  Home: () => goto(0), End: () => goto(Infinity), n: () => step(1), p: () => step(-1), m: () => choose("montage", (view.montage + 1) % view.about.montages.length, 9),
  "+": () => choose("sensitivity", view.sensitivity - 1, SENSITIVITIES.length), "=": () => choose("sensitivity", view.sensitivity - 1, SENSITIVITIES.length), "-": () => choose("sensitivity", view.sensitivity + 1, SENSITIVITIES.length),
  f: () => choose("filter", (view.filter + 1) % FILTERS.length, FILTERS.length), o: explain, u: undo, d: turnDark, c: turnColours, "?": () => $("keys").open ? $("keys").close() : $("keys").showModal(),
  Enter: () => setMode("page"), Escape: () => setMode("overview"),
};
for (let k = 0; k < 6; k++) ACTIONS[String(k + 1)] = () => label(k);

function onKey(e) {
  if (!view.about || e.altKey || e.metaKey) return;
  if (e.ctrlKey) { if (e.key === "z") { e.preventDefault(); undo(); } return; }
  if ($("keys").open && e.key !== "?") return;
  const own = { BUTTON: ["Enter"], SELECT: ["Enter", "ArrowLeft", "ArrowRight", "Home", "End", "PageUp", "PageDown"], INPUT: ["ArrowLeft", "ArrowRight", "Home", "End", "PageUp", "PageDown"] };
  if ((own[e.target.tagName] || []).includes(e.key)) return;
  const act = ACTIONS[e.key];
  if (act) { e.preventDefault(); act(e); }
}

function timeAt(canvas, e, total) { const { left, width, t0 = 0 } = canvas.place, box = canvas.getBoundingClientRect(); return t0 + total * clamp((e.clientX - box.left - left) / width, 0, 1); }
function wire() {
  const fill = (id, names, value, act) => { names.forEach((n, i) => $(id).append(el("option", n, { value: i }))); $(id).value = value; $(id).addEventListener("change", () => { act(Number($(id).value)); $(id).blur(); }); };
  fill("montage", view.about.montages.map(m => MONTAGE_NAMES[m.name] || m.name), view.montage, i => choose("montage", i, 9));
  fill("sensitivity", SENSITIVITIES.map(String), view.sensitivity, i => choose("sensitivity", i, SENSITIVITIES.length));
  fill("filter", FILTERS.map(f => f[0]), view.filter, i => choose("filter", i, FILTERS.length));
  fill("mains", MAINS.map(f => f[0]), view.mains, i => choose("mains", i, MAINS.length));
  fill("seconds", LENGTHS.map(s => `${s} s`), LENGTHS.indexOf(view.seconds), i => { const middle = view.at + view.seconds / 2; view.seconds = LENGTHS[i]; goto(middle - view.seconds / 2); });
  $("to-overview").addEventListener("click", () => setMode("overview")); $("to-page").addEventListener("click", () => setMode("page"));
  $("dark").addEventListener("click", turnDark); $("colours").addEventListener("click", turnColours); $("help").addEventListener("click", () => $("keys").showModal());
  $("cancel").addEventListener("click", () => ask("cancel", { method: "POST" }).then(() => toast("stopped; what was read stays"), e => toast(e.message)));
  let timer = 0;
  const slide = () => { view.threshold = Number($("threshold").value); $("threshold-value").textContent = view.threshold.toFixed(2); clearTimeout(timer); timer = setTimeout(() => findEvents().catch(e => toast(e.message)), 60); redraw(); };
  $("threshold").addEventListener("input", slide);
  $("threshold").addEventListener("pointerup", () => $("threshold").blur());
  $("threshold").value = view.threshold; $("threshold-value").textContent = view.threshold.toFixed(2);
  const whole = view.about.duration;
  $("lanes").addEventListener("mousemove", e => { view.hover = timeAt($("lanes"), e, whole); redraw(); });
  $("lanes").addEventListener("mouseleave", () => { view.hover = null; redraw(); });
  $("lanes").addEventListener("click", e => { goto(timeAt($("lanes"), e, whole) - view.seconds / 2); setMode("page"); });
  $("strip").addEventListener("click", e => goto(timeAt($("strip"), e, whole) - view.seconds / 2));
  $("regions").addEventListener("click", e => goto(timeAt($("regions"), e, TILE) - view.seconds / 2));
  $("page").addEventListener("wheel", e => { e.preventDefault(); goto(view.at + Math.sign(e.deltaY) * view.seconds); }, { passive: false });
  for (const [keys, meaning] of KEYS) $("key-list").append(el("dt", keys), el("dd", meaning));
  document.addEventListener("keydown", onKey);
  window.addEventListener("message", e => { if (e.origin === location.origin && e.data && e.data.hms === "set-theme") dark(Boolean(e.data.dark)); });
  new ResizeObserver(redraw).observe(document.body);
  window.addEventListener("resize", redraw);
}

async function begin() {
  const stored = new URLSearchParams(location.search).get("theme");
  dark(stored ? stored === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  try {
    view.about = await (await ask("about")).json();
    palette = Uint8Array.from(view.about.palette);
    labels = await (await ask("labels")).json();
  } catch (e) { $("notice").textContent = e.message; toast(e.message); return; }
  view.threshold = view.about.threshold;
  view.at = clamp(view.about.duration / 2 - view.seconds / 2, 0, Math.max(0, view.about.duration - view.seconds));
  $("notice").textContent = view.about.notice;
  $("ident").textContent = `recording ${view.about.id}, bundle ${view.about.bundle}`;
  wire(); listEvents(); listLabels(); setMode("overview"); window.focus();
  follow();
}
begin();
})();
