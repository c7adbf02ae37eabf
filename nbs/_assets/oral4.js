/* What the theme leaves out, and the filter of the scoreboard. Every page is complete without this file. */
"use strict";

addEventListener("DOMContentLoaded", () => {
  // The arrows of the sidebar have no name of their own.
  for (const summary of document.querySelectorAll(".bd-sidebar-primary summary")) {
    const page = summary.closest("li")?.querySelector("a")?.textContent.trim();
    summary.setAttribute("aria-label", `Pages below ${page}`);
  }
  // An output or a table that is wider than the screen scrolls, so the keyboard must reach it.
  for (const box of document.querySelectorAll(".cell_output pre, .pst-scrollable-table-container")) if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;

  // An equation that is a little wider than its column is set smaller. A wider one scrolls, also by the keyboard.
  addEventListener("load", () => window.MathJax?.startup?.promise?.then(() => {
    for (const box of document.querySelectorAll('mjx-container[display="true"]')) {
      const room = box.clientWidth / box.scrollWidth;
      if (room < 1) box.style.fontSize = `${parseFloat(getComputedStyle(box).fontSize) * Math.max(0.98 * room, 0.78)}px`;
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    }
  }));

  // docutils gives an entry of the bibliography a role that ARIA has given up.
  for (const entry of document.querySelectorAll(".citation-list > [role=doc-biblioentry]")) entry.setAttribute("role", "listitem");

  // Filter of the scoreboard by paper and verdict. A link from the picture to a row that is hidden shows all rows again.
  const board = document.querySelector("table.oral4-claims");
  if (board && document.querySelector(".oral4-glance")) {
    const rows = [...board.querySelectorAll("tbody tr")];
    const box = document.createElement("form");
    box.className = "oral4-filter";
    box.setAttribute("role", "search");
    box.setAttribute("aria-label", "Filter the claims");
    const told = document.createElement("output");
    const choices = { chapter: ["Paper", "All papers"], verdict: ["Verdict", "All verdicts"] };
    const selects = Object.entries(choices).map(([key, [label, all]]) => {
      const select = document.createElement("select");
      select.add(new Option(all, ""));
      for (const value of new Set(rows.map(row => row.dataset[key]))) {
        const name = document.querySelector(`.oral4-glance [data-chapter="${value}"] span`)?.textContent;
        select.add(new Option(name || value.replaceAll("-", " "), value));
      }
      const field = document.createElement("label");
      field.append(label, " ", select);
      box.append(field);
      select.dataset.key = key;
      return select;
    });
    const show = () => {
      for (const row of rows) row.hidden = selects.some(s => s.value && row.dataset[s.dataset.key] !== s.value);
      const left = rows.filter(row => !row.hidden).length;
      told.textContent = left === rows.length ? `${left} claims` : `${left} of ${rows.length} claims`;
    };
    const showTarget = () => {
      const row = location.hash && document.getElementById(location.hash.slice(1));
      if (row?.hidden) {
        for (const select of selects) select.value = "";
        show();
        row.scrollIntoView();
      }
    };
    box.append(told);
    box.addEventListener("input", show);
    box.addEventListener("submit", event => event.preventDefault());
    addEventListener("hashchange", showTarget);
    board.parentElement.before(box);
    show();
    showTarget();
  }
});

// After the scripts of the theme, which name some controls themselves.
addEventListener("load", () => {
  // A fold is named by the words in it ("Show how this figure is drawn"), and the search button by what it shows.
  for (const summary of document.querySelectorAll("details.hide > summary[aria-label]")) summary.removeAttribute("aria-label");
  for (const button of document.querySelectorAll("button.search-button-field[aria-label]")) button.removeAttribute("aria-label");
});
