"use strict";
// Sliders and numbers beside them say what is asked; the newest request alone is shown.
const token = new URLSearchParams(location.search).get("token");
const at = (id) => document.getElementById(id);
const numbers = [...document.querySelectorAll("input[data-of]")];
let own = false; // whether the user has set λ
let newest = 0, timer = 0;
let writing = 0, written = false; // the newest request for texts, and whether any are shown

async function ask(path, more) {
  const weights = numbers.filter((x) => x.dataset.of !== "scale").map((x) => Number(x.value));
  const scale = own ? Number(document.querySelector("[data-of=scale]").value) : null;
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Authorization": `Bearer ${token}`, "Content-Type": "application/json" },
    body: JSON.stringify({ method: at("method").value, weights, scale, ...more }),
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function put(key, value) {
  at(key).value = value;
  document.querySelector(`[data-of="${key}"]`).value = value;
}

async function show(number, path, into) {
  try {
    const found = await ask(path);
    if (number !== newest) return false;
    if (found.preparing) {
      at("state").textContent = found.preparing;
      setTimeout(() => show(number, path, into), 300);
      return false;
    }
    const open = [...at(into).querySelectorAll("details[open]")].map((x) => x.closest("figure").id);
    at(into).innerHTML = found.html;
    for (const id of open) at(id)?.querySelector("details")?.setAttribute("open", "");
    makeSortable(at(into));
    at("state").textContent = "";
    if (path === "figures" && !own) put("scale", Number(found.scale.toPrecision(4)));
    if (path === "figures" && at("losses")) {
      timer = setTimeout(() => show(number, "loss", "losses"), 250);
    }
  } catch (error) {
    if (number === newest) at("state").textContent = error.message;
  }
}

function refresh() {
  clearTimeout(timer);
  newest += 1;
  writing += 1;
  if (written) at("wrote").textContent = "The merge was another one: generate again.";
  show(newest, "figures", "figures");
}

for (const number of numbers) {
  const slider = at(number.dataset.of);
  const changed = (from, to) => () => {
    to.value = from.value;
    own ||= number.dataset.of === "scale";
    refresh();
  };
  slider.addEventListener("input", changed(slider, number));
  number.addEventListener("change", changed(number, slider));
}
at("write")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const number = ++writing, places = [...document.querySelectorAll("#texts dd")];
  const prompt = at("prompt").value, tokens = Number(at("tokens").value);
  for (const place of places) place.textContent = "";
  written = true;
  try {
    for (const place of places) {
      at("wrote").textContent = `${place.previousElementSibling.textContent} is writing …`;
      const of = Number.isNaN(Number(place.dataset.of)) ? place.dataset.of : Number(place.dataset.of);
      const found = await ask("text", { prompt, tokens, of });
      if (number !== writing) return;
      place.textContent = found.text;
    }
    at("wrote").textContent = "";
  } catch (error) {
    if (number === writing) at("wrote").textContent = error.message;
  }
});
at("method").addEventListener("change", () => { own = false; refresh(); });
at("found").addEventListener("click", () => { own = false; refresh(); });
at("merge").addEventListener("submit", (event) => event.preventDefault());
at("save").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("saved").textContent = "Writing …";
  try {
    const found = await ask("save", { name: at("name").value, form: event.submitter.value });
    at("saved").textContent = `written to ${found.written}`;
  } catch (error) {
    at("saved").textContent = error.message;
  }
});
refresh();
