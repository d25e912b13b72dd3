// Everything that comes from files, classes and runs is set as text, never as markup.
const NAMES = { distilled: "Student", teacher: "Teacher", baseline: "Baseline", model: "Model" };
const MOST = 10_000_000; // bytes, as the server allows
const at = (id) => document.getElementById(id);
const state = { entries: [], queue: Promise.resolve() };

function make(tag, about = {}, ...children) {
  const { text, ...rest } = about;
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(rest)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = visible(text);
  element.append(...children);
  return element;
}

// Control and direction-changing characters would hide what a name really is.
function visible(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => /[\u200c\u200d]/.test(c) ? c : `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
}
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const named = (stage) => NAMES[stage] || stage.charAt(0).toUpperCase() + stage.slice(1);

async function ask(path, options) {
  let answer;
  try { answer = await fetch(path, options); } catch { throw new Error("The server does not answer. Is potstill serve still running?"); }
  const body = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function notice(message) { at("notice").hidden = !message; at("notice").textContent = message ? visible(message) : ""; }

// ---- images

function add(files) {
  const images = [...files];
  if (!images.length) return;
  notice("");
  for (const file of images) {
    const entry = { file, name: file.name || "pasted image", card: make("article", { class: "card", tabindex: "-1" }) };
    state.entries.unshift(entry);
    at("results").prepend(entry.card);
    look(entry);
  }
}

function look(entry) {
  entry.answer = entry.error = null;
  show(entry);
  state.queue = state.queue.then(async () => {
    if (!state.entries.includes(entry)) return;
    try {
      if (entry.file.size > MOST) throw new Error(`${(entry.file.size / 1e6).toFixed(1)} MB are too much: an image may have 10 MB.`);
      const query = `top=${at("top").value}&gradcam=${at("gradcam").checked}`;
      entry.answer = await ask(`/predict?${query}`, {
        method: "POST", body: entry.file, headers: { "X-Potstill": "1", "Content-Type": "application/octet-stream" },
      });
    } catch (error) { entry.error = error.message; }
    show(entry);
  });
  summarise();
}

function show(entry) {
  const head = make("div", { class: "head" }, make("h2", { text: entry.name }));
  if (entry.error) entry.card.replaceChildren(head, make("p", { class: "problem", text: entry.error.replace(/^image: /, "") }));
  else if (!entry.answer) entry.card.replaceChildren(head, make("p", { class: "waiting", text: "Looking …" }));
  else {
    const { agreement, models, width, height } = entry.answer;
    if (agreement !== undefined) head.append(make("span", { class: agreement ? "tag" : "tag differ", text: agreement ? "✓ Student and teacher agree" : "≠ Student and teacher differ" }));
    const canvas = make("canvas", { role: "img", "aria-label": visible(entry.name) });
    const side = make("figure", { class: "picture" }, canvas, make("figcaption", { class: "faint", text: `${width} × ${height} pixels` }));
    const boxes = models.map((model) => box(model, entry.answer));
    entry.card.replaceChildren(head, side, make("div", { class: "models" }, ...boxes));
    paint(canvas, entry.answer.preview);
  }
  summarise();
}

function box(model, answer) {
  const rows = model.predictions.map((each) => {
    const fill = make("div", { class: "fill" });
    fill.style.width = `${Math.max(0.4, 100 * each.probability)}%`;
    const name = make("span", { text: each.class, title: visible(each.class) });
    return make("li", {}, make("div", { class: "row" }, name, make("span", { class: "number", text: percent(each.probability) })), make("div", { class: "track", "aria-hidden": "true" }, fill));
  });
  const title = make("h3", {}, make("span", {}, make("span", { class: "dot" }), named(model.stage)), make("span", { class: "faint number", text: `${model.milliseconds.toFixed(1)} ms` }));
  const found = make("div", { class: `model ${model.stage}` }, title, make("ol", {}, ...rows));
  if (model.gradcam) {
    if (model.gradcam.error) found.append(make("p", { class: "faint look", text: model.gradcam.error }));
    else {
      const canvas = make("canvas", { role: "img", "aria-label": `Where the ${named(model.stage).toLowerCase()} looks for ${visible(model.predictions[0].class)}` });
      found.append(make("div", { class: "look" }, canvas));
      paint(canvas, answer.preview, model.gradcam);
    }
  }
  return found;
}

async function paint(canvas, source, cam) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const scale = Math.max(1, Math.round(240 / Math.max(image.width, image.height)));
  [canvas.width, canvas.height] = [image.width * scale, image.height * scale];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale === 1;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (!cam) return;
  const [height, width] = [cam.rows.length, cam.rows[0].length];
  const heat = new ImageData(width, height);
  cam.rows.flat().forEach((value, i) => heat.data.set(colour(value), 4 * i));
  const small = make("canvas");
  [small.width, small.height] = [width, height];
  small.getContext("2d").putImageData(heat, 0, 0);
  const [left, top, across, down] = cam.region;
  context.imageSmoothingEnabled = true;
  context.fillStyle = "rgba(0, 0, 0, .35)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(small, left * canvas.width, top * canvas.height, across * canvas.width, down * canvas.height);
}

// From nothing over orange to light yellow: lighter is more, for colour-blind readers too.
const colour = (value) => [255, 80 + 160 * value, 30 + 120 * value * value, 215 * value];

function summarise() {
  const done = state.entries.filter((each) => each.answer);
  const judged = done.filter((each) => each.answer.agreement !== undefined);
  const failed = state.entries.filter((each) => each.error).length;
  const waiting = state.entries.length - done.length - failed;
  const agreed = judged.filter((each) => each.answer.agreement).length;
  const parts = [`${done.length} ${done.length === 1 ? "image" : "images"}`];
  if (judged.length) parts.push(`student and teacher agree on ${agreed} of ${judged.length}`);
  if (failed) parts.push(`${failed} could not be used`);
  if (waiting) parts.push(`${waiting} to go`);
  at("summary").textContent = parts.join(" · ");
  at("bar").hidden = !state.entries.length;
  at("csv").disabled = !done.length;
  at("drop").classList.toggle("small", state.entries.length > 0);
}

function csv() {
  // A cell that begins like a formula would be run by spreadsheets.
  const cell = (value) => { const text = visible(value); return `"${(/^[=+\-@]/.test(text) ? "'" + text : text).replaceAll('"', '""')}"`; };
  const lines = [["file", "model", "rank", "class", "probability", "milliseconds", "agreement"].join(",")];
  for (const entry of [...state.entries].reverse()) {
    for (const model of entry.answer ? entry.answer.models : []) {
      model.predictions.forEach((each, i) => lines.push([cell(entry.name), cell(model.stage), i + 1, cell(each.class), each.probability, model.milliseconds, entry.answer.agreement ?? ""].join(",")));
    }
  }
  const link = make("a", { download: "predictions.csv", href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- camera

async function camera() {
  try {
    at("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    at("shooting").hidden = false;
    at("shoot").focus();
  } catch { notice("No camera could be opened. Allow it for this page in the browser, or choose an image instead."); }
}
function shoot() {
  const video = at("video"), canvas = make("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => blob && add([new File([blob], `camera ${new Date().toLocaleTimeString()}.jpg`)]), "image/jpeg", 0.92);
}
function stopCamera() {
  for (const track of at("video").srcObject?.getTracks() ?? []) track.stop();
  at("shooting").hidden = true;
  at("camera").focus();
}

// ---- runs

async function listRuns() {
  let body;
  try { body = await ask("/runs"); } catch (error) { at("list").replaceChildren(make("p", { class: "problem", text: error.message })); return; }
  if (!body.runs.length) { at("list").replaceChildren(make("p", { class: "empty", text: "No runs here yet. Start one with: potstill run quickstart" })); return; }
  const rows = body.runs.map((run) => {
    const top1 = (stage) => { const found = run.stages.find((each) => each.stage === stage); return found && found.test_top1 !== null ? percent(found.test_top1) : "–"; };
    return make("tr", {}, make("td", { text: run.id }), make("td", {}, make("span", { class: `state ${run.state}`, text: run.state })), make("td", { text: run.method ?? "–" }),
      ...["teacher", "baseline", "distilled"].map((stage) => make("td", { class: "right", text: top1(stage) })), make("td", {}, run.report ? reportLink(run.id, "Report") : "–"));
  });
  const heads = [["Run"], ["State"], ["Method"], ["Teacher", 1], ["Baseline", 1], ["Student", 1], ["Report"]];
  const head = make("tr", {}, ...heads.map(([text, right]) => make("th", { scope: "col", text, ...(right ? { class: "right" } : {}) })));
  at("list").replaceChildren(make("p", { class: "faint", text: "Top-1 on the test images." }), make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
}
const reportLink = (id, text) => make("a", { href: `/runs/${encodeURIComponent(id)}/report`, target: "_blank", rel: "noopener", text });

// ---- the rest

function choose(which) {
  for (const name of ["try", "runs"]) {
    const tab = at(`tab-${name}`), chosen = name === which;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    at(name).hidden = !chosen;
  }
  if (which === "runs") listRuns();
}

async function begin() {
  try {
    const { run, models } = await ask("/models");
    at("run").textContent = visible(run);
    document.title = `${visible(run)} · potstill`;
    const rows = models.map((each) => make("tr", {}, make("td", { class: `key ${each.stage}` }, make("span", { class: "dot" }), named(each.stage)), make("td", { text: each.architecture }),
      make("td", { class: "right", text: each.parameters.toLocaleString("en") }), make("td", { class: "right", text: each.classes.length }), make("td", { class: "right", text: `${each.size} × ${each.size}` })));
    const heads = [["Model"], ["Architecture"], ["Parameters", 1], ["Classes", 1], ["Input", 1]].map(([text, right]) => make("th", { scope: "col", text, ...(right ? { class: "right" } : {}) }));
    at("networks").append(make("h2", { text: "Networks" }), make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows))));
  } catch (error) { notice(error.message); }
}

at("pick").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", () => { add(at("files").files); at("files").value = ""; });
at("camera").addEventListener("click", camera);
at("shoot").addEventListener("click", shoot);
at("stop").addEventListener("click", stopCamera);
at("csv").addEventListener("click", csv);
at("clear").addEventListener("click", () => { state.entries = []; at("results").replaceChildren(); notice(""); summarise(); at("pick").focus(); });
for (const id of ["top", "gradcam"]) at(id).addEventListener("change", () => state.entries.forEach(look));
for (const name of ["try", "runs"]) {
  at(`tab-${name}`).addEventListener("click", () => choose(name));
  at(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const other = name === "try" ? "runs" : "try";
    choose(other);
    at(`tab-${other}`).focus();
  });
}
addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("drop").classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  choose("try");
  add(event.dataTransfer.files);
});
addEventListener("paste", (event) => add(event.clipboardData.files));
begin();
