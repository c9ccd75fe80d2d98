// Everything on the page is there without this script; it adds choosing, sorting, filtering, copying and the dark page.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  const root = document.documentElement;

  // Theme: follows the system until the reader decides.
  const theme = byId("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const nameTheme = () => { theme.textContent = isDark() ? "Light page" : "Dark page"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  dark.addEventListener("change", nameTheme);
  nameTheme();

  // Trade-off chart: one cost at a time; one tab stop in the chart, arrow keys move along the cost.
  const figures = all("figure[data-cost]");
  const panel = byId("selected");
  let chosen = null;
  const select = (index) => {
    chosen = index;
    for (const option of all('[role="option"]')) option.setAttribute("aria-selected", String(option.dataset.p === index));
    for (const row of all("#front tbody tr")) row.classList.toggle("on", row.id === `front-${index}`);
    const heads = all("#front thead th").map((head) => (head.querySelector("button") || head).textContent.trim());
    const list = document.createElement("dl");
    [...byId(`front-${index}`).cells].forEach((cell, i) => {
      const item = document.createElement("div");
      item.append(make("dt", heads[i]), make("dd", cell.textContent));
      list.append(item);
    });
    panel.replaceChildren(list);
  };
  const stop = (figure, option) => {
    for (const other of all('[role="option"]', figure)) other.setAttribute("tabindex", other === option ? "0" : "-1");
  };
  const show = (cost) => {
    for (const figure of figures) {
      figure.hidden = figure.dataset.cost !== cost;
      const same = all('[role="option"]', figure).find((option) => option.dataset.p === chosen);
      if (same) stop(figure, same);
    }
    for (const button of all("[data-axis]")) button.setAttribute("aria-pressed", String(button.dataset.axis === cost));
  };
  for (const figure of figures) {
    const options = all('[role="option"]', figure);
    options.forEach((option, i) => {
      const go = () => { stop(figure, option); select(option.dataset.p); };
      option.addEventListener("focus", go);
      option.addEventListener("click", () => option.focus());
      option.addEventListener("keydown", (event) => {
        const last = options.length - 1;
        const to = { ArrowRight: i + 1, ArrowUp: i + 1, ArrowLeft: i - 1, ArrowDown: i - 1, Home: 0, End: last }[event.key];
        if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        options[Math.min(Math.max(to, 0), last)].focus();
      });
    });
  }
  if (figures.length) {
    panel.hidden = false;
    for (const group of all(".switch")) group.hidden = false;
    for (const button of all("[data-axis]")) button.addEventListener("click", () => show(button.dataset.axis));
    show(figures[0].dataset.cost);
  }

  // Tables: every heading sorts; numbers by value, the rest by text; rows without a value stay last.
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    if ("v" in cell.dataset) return Number(cell.dataset.v);
    return cell.classList.contains("n") ? null : cell.textContent.trim();
  };
  const sort = (table, column, ascending) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
      return ascending ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  };
  for (const table of all("table")) {
    if (table.tBodies[0].rows.length < 6) continue;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = make("button", head.firstChild.textContent);
      button.type = "button";
      button.className = "sort";
      head.firstChild.replaceWith(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const numeric = head.classList.contains("n");
        const before = head.getAttribute("aria-sort");
        const ascending = before === "none" ? !numeric : before === "descending";
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sort(table, column, ascending);
      });
    });
  }

  // Long tables: a filter on the text of each row.
  for (const input of all("input[data-filter]")) {
    const rows = [...byId(input.dataset.filter).tBodies[0].rows];
    const said = input.parentElement.querySelector("output");
    input.parentElement.hidden = false;
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let left = 0;
      for (const row of rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        left += row.hidden ? 0 : 1;
      }
      said.textContent = wanted ? `${left} of ${rows.length} rows` : `${rows.length} rows`;
    });
  }

  // Recipe.
  const copy = byId("copy");
  if (copy) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      const said = byId("copied");
      try {
        await navigator.clipboard.writeText(byId("recipe").textContent);
        said.textContent = "Copied.";
      } catch {
        getSelection().selectAllChildren(byId("recipe"));
        said.textContent = "Selected: press Ctrl+C or \u2318C.";
      }
    });
  }
  root.dataset.ready = "true";
})();
