"use strict";

// Makes the columns of every table sortable; without it the tables are what they are.

function key(row, column) {
  const cell = row.cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
}

function compare(a, b) {
  if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b);
  return typeof a === "number" ? -1 : 1; // what has no number comes last
}

function sort(table, header) {
  const descending = header.getAttribute("aria-sort") === "ascending";
  const rows = Array.from(table.tBodies[0].rows);
  const column = header.cellIndex;
  rows.sort((one, other) => {
    const a = key(one, column), b = key(other, column);
    return typeof a === typeof b && descending ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...rows);
  for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table")) {
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sort(table, header));
    header.replaceChildren(button);
  }
}
