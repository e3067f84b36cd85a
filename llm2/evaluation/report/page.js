// The list of problems and the details of the selected one. The data is described at `pack` in page.py.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const ROW = 58; // pixels, as in page.css
const SHORT = 300; // characters of a text in the list
const MODES = { // label, system
  plain_greedy: ["Plain, greedy", 1], guided_greedy: ["Guided, greedy", 2],
  plain_sampling: ["Plain, sampling", 1], guided_sampling: ["Guided, sampling", 2],
};
const KINDS = { fixed: "Fixed", broken: "Broken", wrong: "Both wrong", right: "Both right" };
const TAGS = { fixed: ["fixed", "✓ fixed"], broken: ["broken", "✗ broken"], wrong: ["both", "both wrong"], right: ["both", "both right"] };

// --- A problem's kind: by the greedy modes if both were evaluated, else by more than half of the samples ---
const solved = (samples) => samples.filter((sample) => sample[1]).length * 2 > samples.length;
const wordsOf = (body) => Array.isArray(body) ? body[0].map((t) => data.vocabulary[t]).join("") : body || "";

const problems = data.problems.map(([id, question, gold, modes]) => {
  const [plain, guided] = (data.compared ?? []).map((mode) => modes[mode] && solved(modes[mode]));
  let kind = "";
  if (plain !== undefined && guided !== undefined) kind = plain ? (guided ? "right" : "broken") : guided ? "fixed" : "wrong";
  return { id, question, gold, modes, kind, words: null };
});
const words = (problem) => (problem.words ??= [problem.id, problem.question, problem.gold,
  ...Object.values(problem.modes).flatMap((samples) => samples.flatMap((s) => [s[0] ?? "", wordsOf(s[4])]))].join("\n").toLowerCase());

// --- The list: only the rows in view are in the document ---
let kind = "", shown = problems, selected = null, linking = 0;

function filter() {
  const wanted = $("search").value.trim().toLowerCase();
  shown = problems.filter((p) => (!kind || p.kind === kind) && (!wanted || words(p).includes(wanted)));
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${problems.length.toLocaleString("en")} problems`;
  $("rows").style.height = `${shown.length * ROW}px`;
  $("list").scrollTop = 0;
  drawRows();
  if (!shown.includes(selected)) select(shown[0] ?? null);
}

function drawRows() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const rows = [];
  for (let i = first; i < last; i++) {
    const problem = shown[i], row = element("div", "row");
    row.id = `row-${i}`;
    row.style.top = `${i * ROW}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", problem === selected);
    row.setAttribute("aria-setsize", shown.length);
    row.setAttribute("aria-posinset", i + 1);
    if (problem.kind) row.append(element("span", `tag ${TAGS[problem.kind][0]}`, TAGS[problem.kind][1]));
    row.append(isolated("b", "", problem.id.slice(0, SHORT)), isolated("span", "q", problem.question.slice(0, SHORT)));
    row.addEventListener("click", () => select(problem));
    rows.push(row);
  }
  $("rows").replaceChildren(...rows);
  const at = shown.indexOf(selected), drawn = first <= at && at < last;
  drawn ? list.setAttribute("aria-activedescendant", `row-${at}`) : list.removeAttribute("aria-activedescendant");
}

function select(problem) {
  selected = problem;
  closeChoice();
  drawRows();
  drawDetail();
  clearTimeout(linking); // browsers refuse a hundred changes of the address in a row
  if (problem) linking = setTimeout(() => history.replaceState(null, "", `#${address(problem)}`), 300);
}

function step(by) {
  const at = Math.min(shown.length - 1, Math.max(0, shown.indexOf(selected) + by)), list = $("list");
  if (!shown.length) return;
  if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
  if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
  select(shown[at]);
}

// --- One problem ---
function drawDetail() {
  const detail = $("detail");
  detail.replaceChildren();
  if (!selected) return void detail.append(element("p", "muted", problems.length ? "No problem matches." : "This folder holds no predictions.jsonl."));
  const head = element("p", "muted");
  head.append(isolated("span", "", selected.id), " · right answer ", isolated("b", "", selected.gold));
  if (selected.kind) head.append(element("span", `tag ${TAGS[selected.kind][0]}`, TAGS[selected.kind][1]));
  detail.append(head, isolated("p", "question", selected.question));
  for (const mode of data.modes) if (selected.modes[mode]) detail.append(drawMode(mode, selected.modes[mode]));
  detail.scrollTop = 0;
}

function drawMode(mode, samples) {
  const section = element("section", "mode"), heading = element("h3"), dot = element("span", "dot");
  const [label, system] = MODES[mode];
  dot.style.background = `var(--system${system})`;
  heading.append(dot, label);
  section.append(heading);
  if (samples.length > 1) section.append(drawVotes(samples));
  for (const [index, sample] of samples.entries()) if (sample[4] !== null) section.append(...drawSample(sample, samples.length > 1 ? index + 1 : 0));
  return section;
}

function drawVotes(samples) {
  const votes = new Map(), box = element("div", "votes");
  for (const [answer, right] of samples) {
    const vote = votes.get(answer) ?? { right, count: 0 };
    vote.count += 1;
    votes.set(answer, vote);
  }
  for (const [answer, vote] of [...votes].sort((a, b) => b[1].count - a[1].count))
    box.append(isolated("span", vote.right ? "right" : "", `${answer ?? "unreadable"} × ${vote.count}${vote.right ? " ✓" : ""}`));
  return box;
}

function drawSample([answer, right, tokens, score, body], index) {
  const line = element("p", "muted");
  if (index) line.append(`sample ${index}: `);
  line.append(isolated("b", right ? "right" : "wrong", `${right ? "✓" : "✗"} ${answer ?? "no answer"}`), ` · ${tokens} tokens`);
  if (score !== null && score !== undefined) line.append(` · System 2's score ${score.toFixed(2)}`);
  const text = isolated("div", "text");
  if (Array.isArray(body)) text.append(...drawTokens(body));
  else text.textContent = body;
  return [line, text];
}

function drawTokens([tokens, scores, choices]) {
  const choiceAt = new Map(choices.map((choice) => [choice[0], choice]));
  return tokens.map((token, at) => {
    const choice = choiceAt.get(at), piece = data.vocabulary[token], span = element("span", "token", piece);
    if (/^<\|.*\|>$/.test(piece)) span.classList.add("special");
    if (scores) tint(span, scores[at] / 100);
    if (choice) {
      span.tabIndex = 0;
      span.setAttribute("role", "button"); // a <button> would be a box of its own in the line
      span.classList.add("choice");
      if (choice[5]) span.classList.add("changed");
      span.setAttribute("aria-label", `${piece.trim() || "space"}, one of ${choice[1].length} candidates${choice[5] ? ", changed by System 2" : ""}`);
      span.addEventListener("mouseenter", () => { if (!pinned) openChoice(span, choice); });
      span.addEventListener("mouseleave", () => { if (!pinned) closeChoice(); });
      const pin = () => { openChoice(span, choice); pinned = true; };
      span.addEventListener("click", pin);
      span.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(); } });
    }
    return span;
  });
}

function tint(span, score) {
  const [low, middle, high] = data.scale, up = score >= middle, reach = up ? high - middle : middle - low;
  const share = reach > 0 ? Math.min(1, Math.abs(score - middle) / reach) : 0;
  span.classList.add(up ? "high" : "low");
  span.style.setProperty("--tint", (0.5 * share).toFixed(2));
  span.title = `System 2: ${score.toFixed(2)}`;
}

// --- The candidates of one token: shown while the pointer is over it, pinned by a click ---
let pinned = false, opener = null;

function openChoice(span, [, candidates, logprobs, scores, chosen, changed]) {
  closeChoice();
  opener = span;
  span.setAttribute("aria-expanded", "true");
  const guided = logprobs.map((value, i) => value / 100 + (data.beta ?? 0) * scores[i] / 100), top = Math.max(...guided);
  const total = guided.reduce((sum, value) => sum + Math.exp(value - top), 0);
  const table = element("table"), header = element("tr");
  for (const name of ["candidate", "System 1", "System 2's score", "together"]) header.append(element("th", "", name));
  header.append(element("td"));
  table.append(header);
  candidates.forEach((token, i) => {
    const row = element("tr", i === chosen ? "picked" : ""), cell = element("td");
    cell.append(isolated("code", "", JSON.stringify(data.vocabulary[token]).slice(1, -1).replace(/^ /, "␣")));
    row.append(cell, share(Math.exp(logprobs[i] / 100), 1), element("td", "", (scores[i] / 100).toFixed(2)));
    row.append(share(Math.exp(guided[i] - top) / total, 2));
    row.append(element("td", "", [i === 0 ? "System 1's best" : "", i === chosen ? "✓ written" : ""].filter(Boolean).join(", ")));
    table.append(row);
  });
  const box = $("choice");
  box.replaceChildren(element("b", "", changed ? "▲ System 2 changed this choice" : "System 2 left this choice as it was"), table);
  box.hidden = false;
  const place = span.getBoundingClientRect(), width = box.offsetWidth, below = place.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - width - 12)) + scrollX}px`;
  box.style.top = `${(below ? place.bottom + 6 : place.top - box.offsetHeight - 6) + scrollY}px`;
}

function share(value, system) {
  const cell = element("td", "", `${(100 * value).toFixed(1)} %`), bar = element("span", "bar");
  bar.style.cssText = `width:${(60 * value).toFixed(0)}px;background:var(--system${system})`;
  cell.append(bar);
  return cell;
}

function closeChoice() {
  opener?.removeAttribute("aria-expanded");
  [opener, pinned] = [null, false];
  $("choice").hidden = true;
}

function element(name, classes = "", text) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** An element for text of models and tasks: marks of writing direction in it reach no further. */
function isolated(name, classes, text) {
  const made = element(name, classes, text);
  made.dir = "auto";
  return made;
}

// --- Begin ---
for (const [value, name] of [["", "All"], ...Object.entries(KINDS)]) {
  const count = value ? problems.filter((problem) => problem.kind === value).length : problems.length;
  const button = element("button", "", `${name} ${count.toLocaleString("en")}`);
  button.type = "button";
  button.dataset.kind = value;
  button.setAttribute("aria-pressed", value === "");
  button.addEventListener("click", () => {
    kind = value;
    for (const other of $("filters").children) other.setAttribute("aria-pressed", other === button);
    filter();
  });
  $("filters").append(button);
}
$("search").addEventListener("input", filter);
$("list").addEventListener("scroll", drawRows, { passive: true });
$("list").addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -problems.length, End: problems.length }[event.key];
  if (by) { event.preventDefault(); step(by); }
});
$("detail").addEventListener("scroll", closeChoice, { passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { const back = opener; closeChoice(); back?.focus(); } });
document.addEventListener("click", (event) => { if (!event.target.closest("#choice, .choice")) closeChoice(); });
$("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
addEventListener("resize", drawRows);
let searchable = 0; // the texts to search are built in idle time
const prepare = (idle) => {
  while (searchable < problems.length && idle.timeRemaining() > 2) words(problems[searchable++]);
  if (searchable < problems.length) requestIdleCallback(prepare);
};
window.requestIdleCallback?.(prepare);
const [low, middle, high] = data.scale.map((score) => Number(score.toFixed(1)) || 0); // 0 for -0
$("ramp-label").textContent = low === high ? "" : `${low} to ${high}, pale at the median ${middle}`;
filter();
const address = (problem) => encodeURIComponent(problem.id.toWellFormed());
const target = location.hash && problems.find((problem) => address(problem) === location.hash.slice(1));
if (target) { select(target); $("list").scrollTop = Math.max(0, problems.indexOf(target) - 2) * ROW; }
