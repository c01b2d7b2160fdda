// The form of a model's page: fills in an example, sends it, shows the answer. Asks nothing but the gateway.
"use strict";

const ask = document.getElementById("ask");

if (ask) {
  const form = document.getElementById("form");
  const body = document.getElementById("body");
  const key = document.getElementById("key");
  const status = document.getElementById("status");
  const answer = document.getElementById("answer");

  form.addEventListener("change", () => {
    body.value = form.selectedOptions[0].dataset.body;
  });

  ask.addEventListener("submit", async (event) => {
    event.preventDefault();
    const headers = { "Content-Type": form.selectedOptions[0].dataset.type };
    if (key.value) headers.Authorization = `Bearer ${key.value}`;
    status.textContent = "Sent; waiting for the answer.";
    answer.textContent = "";
    const began = performance.now();
    try {
      const reply = await fetch(ask.dataset.target, { method: "POST", headers, body: body.value });
      const text = await reply.text();
      const took = Math.round(performance.now() - began);
      const version = reply.headers.get("X-Model-Version");
      status.textContent = `Status ${reply.status}, ${took} ms${version ? `, version ${version}` : ""}.`;
      try {
        answer.textContent = JSON.stringify(JSON.parse(text), null, 1);
      } catch {
        answer.textContent = text;
      }
    } catch (error) {
      status.textContent = `No answer: ${error.message}`;
    }
  });
}
