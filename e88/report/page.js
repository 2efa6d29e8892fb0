// Without this script the page shows the same; it adds sorting and opens the run that a link points at.
"use strict";
for (const table of document.querySelectorAll(".results")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const numeric = head.classList.contains("number");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[index].dataset.value;
      const order = (a, b) => {
        // What is not known stays last in either direction.
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        const less = numeric ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, { numeric: true });
        return down ? -less : less;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
const open = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", open);
open();
