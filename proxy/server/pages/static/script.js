// Improves the pages; each works without it. No code of others, no inline code, nothing from elsewhere.
"use strict";

document.documentElement.classList.add("js");

// Live figures: the server sends the block `live` of the page whenever it has changed.
(() => {
  const target = document.getElementById("live");
  const page = document.body.dataset.live;
  if (!target || !page || !window.EventSource) return;
  let source = null;
  const open = () => {
    if (source) return;
    source = new EventSource("/live?page=" + encodeURIComponent(page));
    source.addEventListener("message", (event) => {
      // A form that is being used must not vanish.
      if (target.contains(document.activeElement)) return;
      const parsed = new DOMParser().parseFromString(JSON.parse(event.data), "text/html");
      target.replaceChildren(...parsed.body.childNodes);
    });
    source.addEventListener("end", () => {
      close();
      location.reload();
    });
  };
  const close = () => {
    if (source) source.close();
    source = null;
  };
  // Browsers open six connections to a host: hidden pages must not hold them.
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  if (!document.hidden) open();
})();

// Copy buttons.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const text = button.dataset.copy;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS, off loopback, browsers have no clipboard: select the text instead.
    const shown = button.previousElementSibling;
    if (shown) getSelection().selectAllChildren(shown);
    return;
  }
  const before = button.textContent;
  button.textContent = "✓";
  button.classList.add("done");
  setTimeout(() => {
    button.textContent = before;
    button.classList.remove("done");
  }, 1500);
});

// Filter as you type: a form with `data-filter` shows its answer in the element of that id.
for (const form of document.querySelectorAll("form[data-filter]")) {
  let timer = 0;
  let running = null;
  const refresh = async () => {
    const query = new URLSearchParams(new FormData(form));
    for (const [name, value] of [...query]) if (!value) query.delete(name);
    const address = form.getAttribute("action") + (query.size ? "?" + query : "");
    if (running) running.abort();
    running = new AbortController();
    try {
      const answer = await fetch(address, { signal: running.signal, headers: { Accept: "text/html" } });
      if (!answer.ok || answer.redirected) {
        location.assign(address);
        return;
      }
      const parsed = new DOMParser().parseFromString(await answer.text(), "text/html");
      const found = parsed.getElementById(form.dataset.filter);
      const shown = document.getElementById(form.dataset.filter);
      if (found && shown) shown.replaceWith(found);
      history.replaceState(null, "", address);
    } catch (error) {
      if (error.name !== "AbortError") location.assign(address);
    }
  };
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 250);
  });
}

// `/` goes to the search field.
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select")) return;
  const field = document.querySelector("input[type=search]");
  if (!field) return;
  event.preventDefault();
  field.focus();
  field.select();
});

// A form is sent once, unless what it gets is a file (`data-again`).
document.addEventListener("submit", (event) => {
  if (event.target.method !== "post" || "again" in event.target.dataset) return;
  if (event.target.dataset.sent) event.preventDefault();
  event.target.dataset.sent = "yes";
});
addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("form[data-sent]")) delete form.dataset.sent;
});

// Files that are dropped on a form with `data-drop` become its file.
for (const form of document.querySelectorAll("form[data-drop]")) {
  const field = form.querySelector("input[type=file]");
  form.addEventListener("dragover", (event) => event.preventDefault());
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    field.files = event.dataTransfer.files;
    field.dispatchEvent(new Event("change", { bubbles: true }));
  });
}
