"use strict";
(() => {
  const announce = document.getElementById("announce");
  const collator = new Intl.Collator("en", { numeric: true });

  // Dashes stay below in both orders: they are not the smallest numbers.
  function compareCells(a, b, isNumber, sign) {
    if (!isNumber) return sign * collator.compare(a.textContent.trim(), b.textContent.trim());
    const [x, y] = [a, b].map((cell) => (cell.dataset.v === undefined ? null : Number(cell.dataset.v)));
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  }

  function sort(table, heads, idx) {
    const head = heads[idx];
    const before = head.getAttribute("aria-sort");
    const first = "highFirst" in head.dataset ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = before === first ? other : first;
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);

    const body = table.tBodies[0];
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows];
    rows.sort((a, b) => compareCells(a.cells[idx], b.cells[idx], "number" in head.dataset, sign));
    body.append(...rows);
    announce.textContent = `Sorted by ${head.textContent}, ${order}`;
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.querySelectorAll(".heads th")];
    heads.forEach((head, idx) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, heads, idx));
    });
  }

  function pickGroup(select) {
    for (const cell of document.querySelectorAll(`#${select.dataset.table} [data-group]`)) {
      cell.hidden = select.value !== "" && cell.dataset.group !== select.value;
    }
  }

  function filterPairs(form) {
    const metric = form.querySelector(".pick-metric");
    const system = form.querySelector(".pick-system").value;
    const rows = [...document.getElementById(metric.dataset.table).tBodies[0].rows];
    for (const row of rows) {
      const { metric: key, first, second } = row.dataset;
      row.hidden = (metric.value !== "" && key !== metric.value) || (system !== "" && first !== system && second !== system);
    }
    const shown = rows.filter((row) => !row.hidden).length;
    form.querySelector("output").textContent = `${shown} of ${rows.length} pairs`;
  }

  for (const form of document.querySelectorAll("form.controls")) {
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    const group = form.querySelector(".pick-group");
    if (group) {
      group.addEventListener("change", () => pickGroup(group));
    } else {
      form.addEventListener("change", () => filterPairs(form));
      form.querySelector(".pick-metric").selectedIndex = 1;
      filterPairs(form);
    }
  }

  // Paper cannot be opened by a click.
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
