"use strict";
// The page of `mer-r1 serve`. Text of the model and of files is only ever set as text, never as HTML.

const RECORDED_SECONDS = 60;
const at = (id) => document.getElementById(id);
const PARTS = { face: "the face", voice: "the voice", subtitle: "the subtitle" };
let about = { model: "", wheels: [], question: "", threshold: null, max_mb: 200, max_characters: 2000 };
let clip = null; // { body: Blob, name, sound }
let recorder = null;
let asking = null; // AbortController of the question that is answered
let shown = {}; // first answer by what was hidden, to compare with

function made(tag, text = "", kind = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = kind;
  return element;
}

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").className = isError ? "error" : "";
}

async function begin() {
  try {
    about = await (await fetch("/about")).json();
  } catch {
    say("The program that opened this page does not answer; is it still running?", true);
    return;
  }
  at("model").textContent = `${about.model} answers about a clip.`;
  at("question").placeholder = about.question;
  at("auto").hidden = about.threshold === null;
  if (about.threshold !== null) at("auto").append(` (from ${about.threshold.toFixed(2)} on)`);
  for (const id of ["subtitle", "question"]) at(id).maxLength = about.max_characters;
  const canRecord = navigator.mediaDevices && window.MediaRecorder;
  for (const id of ["record-video", "record-sound"]) at(id).disabled = !canRecord;
}

// ---- the clip

function size(body) {
  return body.size < 1e5 ? `${Math.ceil(body.size / 1e3)} kB` : `${(body.size / 1e6).toFixed(1)} MB`;
}

function take(body, name, sound) {
  const player = at("player");
  if (player.src) URL.revokeObjectURL(player.src);
  player.srcObject = null;
  player.muted = false;
  player.hidden = true;
  clip = null;
  if (body.size > about.max_mb * 1e6) {
    note(`${name}: got ${size(body)}, expected at most ${about.max_mb} MB; choose or record a shorter one`, true);
  } else {
    clip = { body, name, sound };
    const chosen = clip;
    // A voice may come in a file of a video's type: what has no picture is asked about as sound.
    player.onloadedmetadata = () => { if (!player.srcObject && !player.videoWidth) chosen.sound = true; };
    player.src = URL.createObjectURL(body);
    player.hidden = false;
    note(`${name}, ${size(body)}`);
  }
  at("ask").disabled = clip === null || asking !== null;
}

function note(text, isError = false) {
  at("clip-note").textContent = text;
  at("clip-note").className = isError ? "error" : "note";
}

async function record(button, sound) {
  if (recorder) {
    recorder.stop();
    return;
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true, video: !sound });
  } catch (error) {
    note(`Nothing can be recorded (${error.name}): allow camera and microphone for this page, or choose a file.`, true);
    return;
  }
  const label = button.textContent, pieces = [], player = at("player");
  if (!sound) {
    player.srcObject = stream;
    player.muted = true;
    player.hidden = false;
    player.play().catch(() => {});
  }
  recorder = new MediaRecorder(stream);
  const stopped = setTimeout(() => recorder && recorder.stop(), RECORDED_SECONDS * 1000);
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.onstop = () => {
    clearTimeout(stopped);
    stream.getTracks().forEach((track) => track.stop());
    const type = recorder.mimeType, ending = /mp4/.test(type) ? "mp4" : /ogg/.test(type) ? "ogg" : "webm";
    recorder = null;
    button.textContent = label;
    button.classList.remove("recording");
    take(new Blob(pieces, { type }), `recording.${ending}`, sound);
  };
  recorder.start();
  button.textContent = "Stop recording";
  button.classList.add("recording");
  note(`Recording, ${RECORDED_SECONDS} seconds at most.`);
}

// ---- the question

async function ask(event) {
  event.preventDefault();
  if (!clip || asking) return;
  asking = new AbortController();
  shown = {};
  at("answers").replaceChildren();
  at("ask").disabled = true;
  at("stop").hidden = false;
  say("The clip is on its way.");
  const query = new URLSearchParams({
    mode: document.querySelector("input[name=mode]:checked").value,
    name: clip.name,
    sound: clip.sound ? "1" : "0",
    subtitle: at("subtitle").value,
    question: at("question").value,
    hide: at("hide").checked ? "1" : "0",
  });
  try {
    const answer = await fetch(`/answer?${query}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: clip.body,
      signal: asking.signal,
    });
    if (!answer.ok) {
      const refused = await answer.json().catch(() => ({ error: `the server refused it (${answer.status})` }));
      say(refused.error, true);
    } else {
      await follow(answer.body.getReader());
    }
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say("The program that opened this page does not answer; is it still running?", true);
  }
  document.querySelectorAll(".writing").forEach((one) => one.classList.remove("writing"));
  asking = null;
  at("ask").disabled = clip === null;
  at("stop").hidden = true;
}

async function follow(reader) {
  const decoder = new TextDecoder();
  let rest = "", ended = false;
  for (;;) {
    const { done, value } = await reader.read();
    rest += done ? "" : decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      ended = ended || event.kind === "done" || event.kind === "error";
      show(event);
    }
    if (done) break;
  }
  if (!ended) say("The answer broke off; ask again.", true);
}

function show(event) {
  if (event.kind === "queued") say(`${event.before} ${event.before === 1 ? "question is" : "questions are"} answered before yours.`);
  else if (event.kind === "started") say("The clip is being read. The first clip of its length takes longer: programs are compiled.");
  else if (event.kind === "clip")
    say(`The model is shown ${event.frames} frames and ${event.seconds_of_sound.toFixed(1)} s of sound, ${event.tokens} tokens in all.`);
  else if (event.kind === "begins") box(event);
  else if (event.kind === "text") written(event);
  else if (event.kind === "answer") answered(event);
  else if (event.kind === "taken") taken(event);
  else if (event.kind === "left_out") at("answers").append(made("p", `Without ${PARTS[event.hidden]}: not asked, ${event.why}.`, "note"));
  else if (event.kind === "error") say(event.text, true);
  else if (event.kind === "done") say("Answered.");
}

const nameOf = (event) => `answer-${event.hidden || "all"}-${event.mode}`;

function box(event) {
  const section = made("section", "", "answer");
  section.id = nameOf(event);
  const hidden = event.hidden ? `, without ${PARTS[event.hidden]}` : "";
  section.append(made("h2", event.mode + hidden, event.mode), made("p", "", "reasoning writing"));
  at("answers").append(section);
  return section;
}

function written(event) {
  // The tags of the answer's form, also one that is not whole yet.
  const text = event.text.replace(/<\/?(think|answer)>/g, " ").replace(/<\/?[a-z]*$/, "").trim();
  at(nameOf(event)).querySelector(".reasoning").textContent = text;
}

function answered(event) {
  const section = at(nameOf(event)) || box(event), reasoning = section.querySelector(".reasoning");
  reasoning.classList.remove("writing");
  reasoning.textContent = event.answer.length || event.reasoning ? event.reasoning || "" : `No answer; the model wrote: ${event.text}`;
  if (event.truncated) section.append(made("p", "Cut at the longest an answer may be.", "note"));
  if (event.hidden) section.append(compared(event));
  else shown[event.mode] = event;
  if (event.answer.length) section.append(table(event));
}

function taken(event) {
  at(nameOf(event)).append(made("p", `Taken: ${event.why}.`, "why"));
  if (event.mode === "slow") at(nameOf({ mode: "fast" })).append(made("p", "Not taken: answered again, slowly.", "note"));
}

function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(0)}%`;
}

function compared(event) {
  // What hiding a part did: words that went, came and stayed, against the answer in the same mode to the whole clip.
  const before = shown[event.mode], words = made("ul", "", "words");
  if (!before) return words;
  for (const word of before.answer) {
    const stays = event.answer.includes(word);
    const change = stays ? ` ${percent(before.confidences[word])} → ${percent(event.confidences[word])}` : " gone";
    words.append(made("li", word + change, stays ? "" : "gone"));
  }
  for (const word of event.answer) if (!before.answer.includes(word)) words.append(made("li", `${word} new`, "new"));
  return words;
}

function table(event) {
  const frame = made("div", "", "scroll"), grid = made("table"), head = made("tr"), top = made("thead"), body = made("tbody");
  head.append(made("th", "emotion"), made("th", "confidence"));
  about.wheels.forEach((wheel) => head.append(made("th", wheel)));
  top.append(head);
  for (const word of event.answer) {
    const row = made("tr"), sure = event.confidences[word], cell = made("td", percent(sure));
    const name = made("td");
    name.append(made("b", word));
    cell.dataset.head = "confidence";
    if (sure !== null) {
      const meter = document.createElement("meter");
      meter.value = sure;
      cell.append(" ", meter);
    }
    row.append(name, cell);
    about.wheels.forEach((wheel, place) => {
      const category = event.categories[word][place];
      const own = (event.wheel_confidences[word] || [])[place];
      const one = made("td", category === null ? "–" : `${category} ${percent(own)}`);
      one.dataset.head = wheel;
      row.append(one);
    });
    body.append(row);
  }
  grid.append(top, body);
  frame.append(grid);
  return frame;
}

at("file").addEventListener("change", () => {
  const file = at("file").files[0];
  if (file) take(file, file.name, file.type.startsWith("audio/"));
});
at("record-video").addEventListener("click", () => record(at("record-video"), false));
at("record-sound").addEventListener("click", () => record(at("record-sound"), true));
at("form").addEventListener("submit", ask);
at("stop").addEventListener("click", () => asking && asking.abort());
begin();
