// The page: asks the server a few times a second what is new, and shows it. All text of robots and people goes into the document as text.

import { drawDimensions, drawRibbon, drawSpark, duration, ms, stepSeconds } from "./plots.js";

const POLL_MS = 220;
const POLL_HIDDEN_MS = 5000;
const RETRY_MS = 1500;
const PREVIEW_MS = 250;
const KEPT = { subtasks: 100, states: 240, chunks: 12 };
const SHOWN_DIMS = 16;
const FIELDS = ["generation_prompt_format", "action_prompt_template", "max_generation_tokens"];
const CAMERA_NAMES = { base_0_rgb: "base camera", left_wrist_0_rgb: "left wrist", right_wrist_0_rgb: "right wrist" };

const $ = (id) => document.getElementById(id);

function make(tag, { cls, text, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (cls) element.className = cls;
  if (text != null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Sets text only where it differs, so that a screen reader is told of changes alone and a selection survives. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function show(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

function problem(element, text, field) {
  say(element, text ?? "");
  show(element, Boolean(text));
  field?.setAttribute("aria-invalid", text ? "true" : "false");
}

// ---------------------------------------------------------------- the server

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

let key = sessionStorage.getItem("tandem.key");
let askingForKey = null;

async function ask(path, { method = "GET", headers = {}, body } = {}) {
  for (;;) {
    const sent = key;
    const response = await fetch(path, { method, body, cache: "no-store", headers: key == null ? headers : { ...headers, "X-API-Key": key } });
    if (response.status === 401) {
      await newKey(sent);
      continue;
    }
    if (!response.ok) {
      const text = await response.text();
      let detail = text;
      try {
        ({ detail } = JSON.parse(text));
      } catch {
        // a proxy's own words
      }
      throw new Refused(response.status, typeof detail === "string" && detail ? detail : `the server answered ${response.status}`);
    }
    return response;
  }
}

const json = (method, body, headers = {}) => ({ method, headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** Resolves once a person has given another key than `refused`. */
function newKey(refused) {
  if (key !== refused) return Promise.resolve();
  link("wait", "Waiting for the key");
  askingForKey ??= new Promise((resolve) => {
    const dialog = $("key");
    problem($("key-problem"), refused == null ? null : "That is not the key.", $("key-input"));
    $("key-input").value = "";
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    $("key-form").onsubmit = () => {
      key = $("key-input").value.trim();
      sessionStorage.setItem("tandem.key", key);
      askingForKey = null;
      resolve();
    };
    dialog.showModal();
  });
  return askingForKey;
}

function link(state, text) {
  $("link").dataset.state = state;
  say($("link"), text);
}

// ---------------------------------------------------------------- what is known

let newest = null; // the last state
let chosen = null; // the session's key
let known = null; // what is remembered of the chosen session
let offset = 0; // this clock minus the server's, in seconds

function forget() {
  known = { version: null, epoch: null, subtasks: new Map(), states: [], chunks: [], cameras: [] };
}

function learn(session) {
  if (known.epoch !== session.epoch) {
    known.epoch = session.epoch;
    known.states = [];
    known.chunks = [];
  }
  if (session.since < 0) {
    known.subtasks.clear();
    known.states = [];
    known.chunks = [];
  }
  for (const subtask of session.subtasks) known.subtasks.set(subtask.id, subtask);
  while (known.subtasks.size > KEPT.subtasks) known.subtasks.delete(known.subtasks.keys().next().value);
  known.states = [...known.states, ...session.states].slice(-KEPT.states);
  known.chunks = [...known.chunks, ...session.chunks].slice(-KEPT.chunks);
  known.cameras = session.cameras;
  known.dropped = session.images_dropped;
  const changed = known.version !== session.version;
  known.version = session.version;
  return changed;
}

async function poll() {
  const query = new URLSearchParams();
  const asked = chosen;
  if (asked != null) {
    query.set("session", asked);
    if (known.version != null) query.set("since", known.version);
  }
  const state = await (await ask(`page/state?${query}`)).json();
  const another = newest != null && newest.process !== state.process;
  if (another) {
    // Another process: its sessions are numbered anew.
    chosen = null;
    loadedRevision = null;
  }
  newest = state;
  offset = Date.now() / 1000 - state.now;
  link(state.ready ? "live" : "wait", state.ready ? "Live" : "Not ready");
  const there = state.sessions.some((session) => session.key === chosen);
  if (!there) choose(state.sessions[0]?.key ?? null);
  let changed = false;
  if (state.session && state.session.key === chosen && asked === chosen && !another) changed = learn(state.session);
  render(changed);
}

function choose(session) {
  if (session === chosen && known) return;
  chosen = session;
  forget();
  views.clear();
  problem($("instruct-status"), null);
  $("cameras").replaceChildren();
  $("timeline").replaceChildren();
  $("plots").replaceChildren();
}

async function run() {
  let wait = 0;
  for (;;) {
    try {
      await poll();
      wait = document.hidden ? POLL_HIDDEN_MS : POLL_MS;
    } catch (error) {
      link("lost", error instanceof Refused ? error.message : "No answer; trying again");
      wait = RETRY_MS;
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, wait);
    });
  }
}

let wake = () => {};
document.addEventListener("visibilitychange", () => wake());

// ---------------------------------------------------------------- showing it

function render(changed) {
  const state = newest;
  say($("mode"), { combined: "planner and action policy", action_only: "action policy", planner_only: "planner" }[state.mode] ?? state.mode);
  say($("version"), `Tandem ${state.version}`);
  show($("links"), key == null); // a browser cannot send the key with a plain link
  renderSlots(state.slots);
  renderSessions(state.sessions);
  const session = state.sessions.find((candidate) => candidate.key === chosen);
  show($("nobody"), !session);
  show($("board"), Boolean(session));
  show($("tools"), true);
  show($("plan-card"), true);
  renderAddresses(state.addresses);
  renderLatency(state.latency);
  if (session) {
    renderRobot(session);
    renderTimeline(session, changed);
    if (changed) {
      renderViews(session);
      renderActions();
    }
  }
  renderTools(state);
}

function renderSlots(slots) {
  const list = $("slots");
  const names = Object.keys(slots);
  if (list.children.length !== names.length) {
    list.replaceChildren(...names.map(() => make("li", {}, make("span", { cls: "dot" }), make("span"))));
  }
  names.forEach((name, i) => {
    const slot = slots[name];
    const item = list.children[i];
    item.dataset.state = slot.state;
    const busy = slot.running ? `, ${slot.running} running` : "";
    const queue = slot.queued ? `, ${slot.queued} waiting` : "";
    say(item.lastChild, `${name} ${slot.state}${slot.state === "ready" || slot.state === "stuck" ? busy + queue : ""}`);
  });
}

const nameOf = (session) => session.id ?? `connection ${session.key}`;

function renderSessions(sessions) {
  const nav = $("sessions");
  show(nav, sessions.length > 0);
  const there = new Map([...nav.children].map((button) => [Number(button.dataset.key), button]));
  sessions.forEach((session, i) => {
    let button = there.get(session.key);
    if (!button) {
      button = make("button", { type: "button", cls: "session", "data-key": session.key }, make("span", { cls: "dot" }), make("b"), make("small"));
      button.addEventListener("click", () => {
        choose(session.key);
        render(false);
        wake();
      });
    }
    there.delete(session.key);
    if (nav.children[i] !== button) nav.insertBefore(button, nav.children[i] ?? null);
    button.setAttribute("aria-current", session.key === chosen ? "true" : "false");
    button.dataset.live = session.idle_s < 5 && !session.ended ? "true" : "false";
    button.title = nameOf(session);
    say(button.children[1], nameOf(session));
    const when = session.ended ? "has left" : session.idle_s < 5 ? (session.subtask || (session.failed ? "the planner fails" : null) || `${session.hz ?? "–"} requests/s`) : `idle for ${duration(session.idle_s)}`;
    say(button.children[2], when);
  });
  for (const gone of there.values()) gone.remove();
}

function renderAddresses(addresses) {
  const list = $("addresses");
  const text = JSON.stringify(addresses);
  if (list.dataset.shown === text) return;
  list.dataset.shown = text;
  list.replaceChildren(...Object.entries(addresses).filter(([name]) => name !== "admin").flatMap(([name, address]) => [make("dt", { text: name }), make("dd", { text: address })]));
}

function renderLatency(latency) {
  const rows = [
    ["request", "Whole request", latency.request],
    ["planner", "Planner", latency.planner],
    ["action", "Action policy", latency.action],
    ["planner_wait", "Planner’s queue", latency.planner_wait],
    ["action_wait", "Policy’s queue", latency.action_wait],
  ].filter(([, , row]) => row);
  const body = $("latency");
  if (body.children.length !== rows.length) {
    body.replaceChildren(...rows.map(() => make("tr", {}, make("th", { scope: "row" }), make("td"), make("td"), make("td"))));
  }
  show($("latency").parentElement, rows.length > 0);
  rows.forEach(([name, label, row], i) => {
    const tr = body.children[i];
    tr.className = name === "request" ? "main" : "";
    say(tr.children[0], label);
    ["p50", "p95", "p99"].forEach((percentile, k) => say(tr.children[k + 1], ms(row[percentile])));
  });
  say($("latency-facts"), rows.length ? `${latency.rate.toFixed(latency.rate < 10 ? 1 : 0)} requests/s` : "");
  const failed = latency.failed ? ` ${latency.failed} of them failed.` : "";
  say($("latency-hint"), latency.window ? `Of the last ${latency.window} requests of all robots.${failed}` : "Nothing was asked yet.");
  const text = String(latency.recent);
  if ($("spark").dataset.shown !== text) {
    $("spark").dataset.shown = text;
    drawSpark($("spark"), latency.recent);
  }
}

function chips(element, entries) {
  const text = JSON.stringify(entries);
  if (element.dataset.shown === text) return;
  element.dataset.shown = text;
  element.replaceChildren(...entries.map(([label, kind]) => make("span", { cls: kind == null ? "" : `chip ${kind}`, text: label })));
}

function renderRobot(session) {
  say($("robot-name"), nameOf(session));
  const facts = [`${session.requests} requests`];
  if (session.hz) facts.push(`${session.hz.toFixed(1)}/s`);
  if (session.ms != null) facts.push(`last one ${ms(session.ms)}`);
  if (session.ended) facts.push("has left");
  else if (session.idle_s >= 5) facts.push(`idle for ${duration(session.idle_s)}`);
  say($("robot-facts"), facts.join(" · "));

  const refusal = session.refusal && newest.now - session.refusal.at < 10 ? session.refusal.text : null;
  problem($("refusal"), refusal && `Its last refused request: ${refusal}`);

  const subtask = [...known.subtasks.values()].at(-1);
  const words = $("subtask");
  words.dataset.kind = subtask?.failed ? "failed" : "";
  const itself = session.applied == null ? "Acting on its task" : "Acting on the operator’s instruction";
  if (subtask) say(words, subtask.text || (subtask.failed ? "No subtask: the planner failed" : itself));
  else say(words, newest.mode === "action_only" ? itself : "No subtask yet");
  words.dataset.long = words.textContent.length > 60;
  const about = [];
  if (subtask) {
    if (subtask.done) about.push(["done", "good"]);
    if (subtask.error) about.push([subtask.error, "bad"]);
    about.push([`for ${duration((session.idle_s < 5 ? newest.now : subtask.last) - subtask.began)}`]);
    if (subtask.age_ms != null) about.push([`· ${ms(subtask.age_ms)} old when used`]);
    if (subtask.waited) about.push(["· waited for"]);
  }
  chips($("subtask-facts"), about);

  say($("prompt"), session.prompt ?? "It sends none; the server's default applies.");
  const told = session.instruction;
  $("prompt").classList.toggle("replaced", told != null);
  show($("override"), told != null);
  if (told != null) {
    say($("instruction-text"), told);
    say($("applied"), session.applied === told ? "in force" : "from its next request");
    $("applied").className = session.applied === told ? "chip good" : "chip warn";
  }
  show($("instruct"), !session.ended);
}

function renderTimeline(session, changed) {
  const subtasks = [...known.subtasks.values()];
  const end = session.idle_s < 5 ? newest.now : Math.max(...subtasks.map((subtask) => subtask.last), newest.now - session.idle_s);
  const any = subtasks.length > 0;
  show($("ribbon"), any);
  show($("timeline"), any);
  show($("no-subtasks"), !any);
  say($("no-subtasks"), newest.mode === "action_only" ? "No planner is loaded, so there are no subtasks." : "None yet.");
  say($("subtasks-facts"), any ? `${subtasks.length} so far` : "");
  if (!any) return;
  drawRibbon($("ribbon"), subtasks, end);
  const list = $("timeline");
  const there = new Map([...list.children].map((item) => [Number(item.dataset.id), item]));
  subtasks.forEach((subtask, i) => {
    const next = subtasks[i + 1];
    const lasted = duration((next?.began ?? end) - subtask.began);
    const entry = there.get(subtask.id);
    const text = JSON.stringify([subtask, Boolean(next)]);
    there.delete(subtask.id);
    if (entry) {
      say(entry.querySelector(".lasted"), lasted);
      if (entry.dataset.shown === text || !changed) return;
    }
    const built = timelineEntry(subtask, subtasks[i - 1], !next, lasted);
    built.dataset.shown = text;
    if (entry) entry.replaceWith(built);
    else list.prepend(built);
  });
  for (const gone of there.values()) gone.remove();
}

function timelineEntry(subtask, before, current, lasted) {
  const began = new Date((subtask.began + offset) * 1000);
  const words = make("span", { cls: "words", text: subtask.text || (subtask.failed ? "no subtask" : "the task itself") });
  if (subtask.done) words.append(make("span", { cls: "chip good", text: "done" }));
  if (subtask.failed) words.append(make("span", { cls: "chip bad", text: "planner failed" }));
  if (subtask.instructed) words.append(make("span", { cls: "chip", text: "operator" }));
  const item = make(
    "li",
    { cls: current ? "entry current" : "entry", "data-id": subtask.id },
    make("time", { text: began.toLocaleTimeString([], { hour12: false }), datetime: began.toISOString() }),
    words,
    make("span", { cls: "lasted", text: lasted }),
  );
  const more = [];
  if (subtask.task && (!before || before.task !== subtask.task || before.epoch !== subtask.epoch)) more.push(`for “${subtask.task}”`);
  if (before && before.epoch !== subtask.epoch) more.push("a new episode");
  if (subtask.template_revision != null && before && before.template_revision !== subtask.template_revision) more.push(`prompts of revision ${subtask.template_revision}`);
  more.push(`${subtask.requests} request${subtask.requests === 1 ? "" : "s"}`);
  if (subtask.ms != null) more.push(`planned in ${ms(subtask.ms)}`);
  if (subtask.age_ms != null) more.push(`${ms(subtask.age_ms)} old when last used`);
  if (subtask.waited) more.push("waited for");
  item.append(make("span", { cls: "more", text: more.join(" · ") }));
  if (subtask.error) item.append(make("span", { cls: "more why", text: subtask.error }));
  return item;
}

const views = new Map(); // camera → {version, busy, url, figure}

function renderViews(session) {
  const cameras = known.cameras;
  const box = $("cameras");
  document.querySelector(".robot-body").classList.toggle("many", cameras.length > 1);
  for (const [name, view] of views) {
    if (cameras.some((camera) => camera.name === name)) continue;
    view.figure.remove();
    if (view.url) URL.revokeObjectURL(view.url);
    views.delete(name);
  }
  if (!cameras.length) {
    box.replaceChildren(make("p", { cls: "hint", text: known.dropped ? "Its pictures are too large to be kept for this page." : "It sends no pictures." }));
    return;
  }
  box.querySelector(".hint")?.remove();
  for (const camera of cameras) {
    let view = views.get(camera.name);
    if (!view) {
      const image = make("img", { alt: `What ${camera.name} of ${nameOf(session)} sees`, width: camera.width, height: camera.height });
      view = { version: null, busy: false, url: null, figure: make("figure", {}, image, make("figcaption", { text: camera.name })), image };
      views.set(camera.name, view);
      box.append(view.figure);
    }
    refreshView(session.key, camera, view);
  }
  show($("use-view"), true);
}

async function refreshView(session, camera, view) {
  if (view.busy || view.version === camera.version) return;
  view.busy = true;
  try {
    const response = await ask(`page/sessions/${session}/images/${encodeURIComponent(camera.name)}?v=${camera.version}`);
    view.blob = await response.blob();
    const url = URL.createObjectURL(view.blob);
    const old = view.url;
    view.image.src = url;
    view.url = url;
    view.version = camera.version;
    view.image.dataset.version = camera.version;
    await view.image.decode().catch(() => {});
    if (old) URL.revokeObjectURL(old);
  } catch {
    // It has none any more, or the connection broke; the next state says which.
  } finally {
    view.busy = false;
  }
}

let allDims = false;

function renderActions() {
  const { chunks, states } = known;
  show($("plots"), chunks.length > 0);
  show(document.querySelector(".legend"), chunks.length > 0);
  show($("rate").parentElement, chunks.length > 0);
  if (!chunks.length) {
    say($("actions-facts"), newest.mode === "planner_only" ? "No action policy is loaded." : "No chunk yet.");
    show($("more-plots"), false);
    show($("executed-key"), false);
    return;
  }
  const newestChunk = chunks.at(-1)[1];
  const dims = newestChunk[0].length;
  const alike = states.filter(([, state]) => state.length === dims);
  const rate = Number($("rate").value);
  const step = rate ? 1 / rate : stepSeconds(chunks) ?? 0.05;
  show($("executed-key"), alike.length > 0);
  const facts = [`${newestChunk.length} steps of ${dims} numbers`];
  facts.push(rate ? `drawn at ${rate} steps/s` : `drawn at ${(1 / step).toFixed(1)} steps/s, as if a whole chunk were done between two requests`);
  if (!alike.length && states.length) facts.push(`the state has ${states.at(-1)[1].length} numbers, so only the chunks are shown`);
  say($("actions-facts"), facts.join(" · "));
  show($("more-plots"), dims > SHOWN_DIMS);
  say($("more-plots"), allDims ? `Show the first ${SHOWN_DIMS}` : `Show all ${dims} dimensions`);
  drawDimensions($("plots"), { chunks: chunks.filter(([, rows]) => rows[0].length === dims), states: alike, step, shown: allDims ? dims : SHOWN_DIMS });
}

$("more-plots").addEventListener("click", () => {
  allDims = !allDims;
  renderActions();
});
$("rate").value = sessionStorage.getItem("tandem.rate") ?? "";
$("rate").addEventListener("change", () => {
  sessionStorage.setItem("tandem.rate", $("rate").value);
  renderActions();
});
new ResizeObserver(() => {
  if (known?.chunks.length) renderActions();
}).observe($("plots"));

// ---------------------------------------------------------------- an operator's instruction

async function instruct(method, text) {
  const outcome = $("instruct-status");
  outcome.classList.remove("bad");
  try {
    const path = `page/sessions/${chosen}/instruction`;
    await ask(path, method === "PUT" ? json("PUT", { text }) : { method });
    if (method === "PUT") $("instruction").value = "";
    say(outcome, method === "PUT" ? "It is told with its next request." : "Withdrawn; it follows its own task.");
    wake();
  } catch (error) {
    outcome.classList.add("bad");
    say(outcome, error instanceof Refused ? error.message : "No answer from the server; try again.");
  }
}

$("instruct").addEventListener("submit", (event) => {
  event.preventDefault();
  instruct("PUT", $("instruction").value);
});
$("instruction").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("instruct").requestSubmit();
  }
});
$("withdraw").addEventListener("click", () => instruct("DELETE"));

// ---------------------------------------------------------------- prompts

let loadedRevision = null; // of the settings in the form
let loading = false;
let inForce = null; // the settings in force, and their ETag
let previewTimer = 0;
let previewed = "";

const edited = () => inForce && FIELDS.some((field) => valueOf(field) !== inForce.values[field]);
const valueOf = (field) => (field === "max_generation_tokens" ? ($(field).value === "" ? null : Number($(field).value)) : $(field).value);
const changes = () => Object.fromEntries(FIELDS.filter((field) => !$(field).closest(".field").hidden && valueOf(field) !== inForce.values[field]).map((field) => [field, valueOf(field)]));

function renderTools(state) {
  const planner = state.settings != null;
  show($("no-prompts"), !planner);
  show($("prompts"), planner);
  show($("history"), planner);
  show($("no-planner"), !planner);
  show($("plan"), planner);
  if (!planner) return;
  show($("action_prompt_template").closest(".field"), state.mode === "combined");
  if (loadedRevision !== state.settings.revision && !loading) loadSettings();
  const session = state.sessions.find((candidate) => candidate.key === chosen);
  if (!$("plan-task").value && session?.prompt && document.activeElement !== $("plan-task")) $("plan-task").value = session.instruction ?? session.prompt;
}

async function loadSettings() {
  loading = true;
  try {
    const response = await ask("config");
    const values = await response.json();
    const untouched = !edited();
    inForce = { values, etag: response.headers.get("ETag") };
    loadedRevision = values.revision;
    say($("revision"), `revision ${values.revision} is in force`);
    if (untouched) fill();
    else say($("prompts-status"), `Somebody changed the prompts (revision ${values.revision}); yours are not applied yet.`);
    mark();
    if ($("history").open) await loadHistory();
  } catch {
    // The next state brings it up again.
  } finally {
    loading = false;
  }
}

function fill() {
  for (const field of FIELDS) {
    $(field).value = inForce.values[field];
    problem($(`${field}-problem`), null, $(field));
  }
  problem($("prompts-problem"), null);
  previewSoon();
}

function mark() {
  const dirty = Boolean(edited());
  $("apply").disabled = !dirty;
  $("revert").disabled = !dirty;
}

/** Puts each line of a refusal beside the field that it names. */
function refuse(detail) {
  const lines = Object.fromEntries(FIELDS.map((field) => [field, []]));
  const rest = [];
  for (const line of detail.split("\n")) {
    const field = FIELDS.find((name) => line.startsWith(`${name}:`));
    if (field) lines[field].push(line.slice(field.length + 1).trim());
    else rest.push(line);
  }
  for (const field of FIELDS) {
    problem($(`${field}-problem`), lines[field].join("\n") || null, $(field));
    if (lines[field].length) $(`${field}-preview`)?.replaceChildren();
  }
  problem($("prompts-problem"), rest.join("\n") || null);
}

function previewSoon() {
  clearTimeout(previewTimer);
  previewTimer = setTimeout(preview, PREVIEW_MS);
}

async function preview() {
  if (!inForce) return;
  const session = newest?.sessions.find((candidate) => candidate.key === chosen);
  const task = session?.instruction ?? session?.prompt ?? "tidy the table";
  const subtask = session?.subtask || "pick up the cup";
  const body = { task, ...changes(), ...(newest.mode === "combined" ? { subtask } : {}) };
  const text = JSON.stringify(body);
  previewed = text;
  try {
    const answer = await (await ask("config/preview", json("POST", body))).json();
    if (previewed !== text) return;
    refuse("");
    previewOf("generation_prompt_format", answer.planner);
    previewOf("action_prompt_template", answer.action);
  } catch (error) {
    if (previewed === text && error instanceof Refused && error.status === 422) refuse(error.message);
  }
}

function previewOf(field, slot) {
  const box = $(`${field}-preview`);
  if (!slot) {
    box.replaceChildren();
    return;
  }
  const whole = slot.text ?? slot.prompt ?? "";
  const said = make("p", { cls: "said", "aria-label": "What the model reads" });
  const cut = slot.not_fitting && whole.endsWith(slot.not_fitting) ? whole.length - slot.not_fitting.length : whole.length;
  said.append(whole.slice(0, cut));
  if (cut < whole.length) said.append(make("mark", { text: whole.slice(cut) }));
  const count = make("div", { cls: "gauge" });
  if (slot.tokens != null) {
    if (slot.max_tokens) count.append(make("meter", { min: 0, max: slot.max_tokens, high: slot.max_tokens * 0.9, value: Math.min(slot.tokens, slot.max_tokens), "aria-label": "tokens used" }));
    count.append(make("span", { text: `${slot.tokens} of ${slot.max_tokens} tokens${slot.not_fitting ? "; the end has no room" : ""}` }));
  } else if (slot.reason) count.append(make("span", { text: slot.reason }));
  box.replaceChildren(said, count);
}

for (const field of FIELDS) {
  $(field).addEventListener("input", () => {
    say($("prompts-status"), "");
    mark();
    previewSoon();
  });
}

$("prompts").addEventListener("submit", async (event) => {
  event.preventDefault();
  const outcome = $("prompts-status");
  outcome.classList.remove("bad");
  say(outcome, "");
  try {
    const response = await ask("config", json("PATCH", changes(), { "If-Match": inForce.etag }));
    inForce = { values: await response.json(), etag: response.headers.get("ETag") };
    loadedRevision = inForce.values.revision;
    say($("revision"), `revision ${loadedRevision} is in force`);
    fill();
    say(outcome, `Applied as revision ${loadedRevision}.`);
    if ($("history").open) await loadHistory();
  } catch (error) {
    if (error instanceof Refused && error.status === 412) {
      await loadSettings();
      refuse(`Somebody was faster: revision ${loadedRevision} is in force. Apply again to replace it, or discard your changes to see it.`);
    } else refuse(error instanceof Refused ? error.message : "No answer from the server; try again.");
  }
  mark();
});

$("revert").addEventListener("click", () => {
  fill();
  mark();
  say($("prompts-status"), "");
});

$("history").addEventListener("toggle", () => {
  if ($("history").open) loadHistory().catch(() => {});
});

async function loadHistory() {
  const { revisions } = await (await ask("config/history")).json();
  $("revisions").replaceChildren(
    ...revisions.map((revision, i) => {
      const before = revisions[i + 1];
      const changed = FIELDS.filter((field) => !before || before[field] !== revision[field]);
      const when = new Date(revision.changed_at);
      const item = make(
        "li",
        {},
        make("span", {}, make("b", { text: `${revision.revision}` }), make("span", { cls: "quiet", text: ` · ${when.toLocaleString([], { dateStyle: "medium", timeStyle: "short" })} · ${revision.source}` })),
      );
      if (i === 0) item.append(make("span", { cls: "chip good", text: "in force" }));
      else {
        const back = make("button", { type: "button", cls: "plain", text: "Go back to it", "aria-label": `Go back to revision ${revision.revision}` });
        back.addEventListener("click", () => rollback(revision.revision));
        item.append(back);
      }
      item.append(make("span", { cls: "what", text: changed.map((field) => `${field}: ${revision[field]}`).join("\n") }));
      return item;
    }),
  );
}

async function rollback(revision) {
  try {
    await ask(`config/rollback/${revision}`, { method: "POST", headers: { "If-Match": inForce.etag } });
    await loadSettings();
    fill();
    mark();
    say($("prompts-status"), `Back to the prompts of revision ${revision}, as revision ${loadedRevision}.`);
  } catch (error) {
    refuse(error instanceof Refused ? error.message : "No answer from the server; try again.");
    await loadSettings();
  }
}

// ---------------------------------------------------------------- a try-out of the planner

let picture = null; // a Blob

function take(blob) {
  if (!blob) return;
  if (!["image/jpeg", "image/png"].includes(blob.type)) {
    problem($("plan-problem"), `The picture is ${blob.type || "of an unknown type"}; choose a JPEG or PNG file.`);
    return;
  }
  problem($("plan-problem"), null);
  const image = $("plan-picture");
  if (image.src) URL.revokeObjectURL(image.src);
  picture = blob;
  image.src = URL.createObjectURL(blob);
  show(image, true);
}

$("plan-file").addEventListener("change", () => take($("plan-file").files[0]));
$("use-view").addEventListener("click", () => take([...views.values()].find((view) => view.blob)?.blob));
const drop = $("drop");
drop.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files[0]);
});

$("plan").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!picture) {
    problem($("plan-problem"), "Choose a picture first.");
    return;
  }
  problem($("plan-problem"), null);
  const button = $("plan-ask");
  button.disabled = true;
  say(button, "Asking…");
  const query = new URLSearchParams({ task: $("plan-task").value, camera: $("plan-camera").value });
  try {
    const answer = await (await ask(`page/plan?${query}`, { method: "POST", headers: { "Content-Type": picture.type }, body: picture })).json();
    show($("answer"), true);
    say($("answer-text"), answer.text || "(nothing: it ended at once)");
    const facts = [[`${ms(answer.planner_ms ?? answer.ms)} in the planner`], [`· ${ms(answer.ms)} with the wait`], [`· ${answer.width} × ${answer.height} as the ${CAMERA_NAMES[$("plan-camera").value]}`]];
    if (answer.done) facts.unshift(["done", "good"]);
    chips($("answer-facts"), facts);
  } catch (error) {
    show($("answer"), false);
    problem($("plan-problem"), error instanceof Refused ? error.message : "No answer from the server; try again.");
  }
  button.disabled = false;
  say(button, "Ask");
});

forget();
run();
