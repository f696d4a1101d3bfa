"use strict";
// Every table can be sorted: a press on a column's name sorts by it, another one the other way round.
function makeSortable(root) {
  for (const table of root.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const first = table.tBodies[0].rows[0];
        const numeric = first && first.cells[column].dataset.value !== undefined;
        const before = head.getAttribute("aria-sort");
        const order = before ? (before === "descending" ? "ascending" : "descending")
          : numeric ? "descending" : "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        sort(table.tBodies[0], column, order === "ascending" ? 1 : -1);
      });
    });
  }
}

function sort(body, column, sign) {
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (x, y) => typeof x === "number" && typeof y === "number"
    ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
  const rows = [...body.rows].sort((x, y) => sign * compare(key(x), key(y)));
  body.append(...rows);
}

makeSortable(document);
