for (const table of document.querySelectorAll("table.sort"))
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th"), rows = [...table.tBodies[0].rows];
    if (!head) return;
    const up = head.ariaSort !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
    head.ariaSort = up ? "ascending" : "descending";
    const key = (row) => { const cell = row.cells[head.cellIndex]; return cell.dataset.v ?? cell.textContent.trim() };
    const sign = up ? 1 : -1, value = (text) => text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number(text);
    rows.sort((a, b) => {
      const x = key(a), y = key(b), m = x === "" ? NaN : value(x), n = y === "" ? NaN : value(y);
      if (isNaN(m) !== isNaN(n)) return isNaN(m) ? 1 : -1;
      return sign * (isNaN(m) ? x.localeCompare(y) : m < n ? -1 : m > n ? 1 : 0);
    });
    table.tBodies[0].append(...rows);
  });
