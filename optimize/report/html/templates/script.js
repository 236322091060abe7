(() => {
  "use strict";
  const form = document.getElementById("filters");
  if (!form) return;
  const body = document.querySelector("#changed tbody");
  const rows = Array.from(body.rows, (element, place) => ({
    element,
    place,
    number: Number(element.dataset.row),
    of: new Set(element.dataset.of.split(" ")),
    kind: new Set(element.dataset.kind.split(" ")),
    text: null,
  }));
  let order = "";
  const show = () => {
    const { text, of, kind } = form.elements;
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      if (wanted && row.text === null) row.text = row.element.textContent.toLowerCase();
      const fits =
        (!of.value || row.of.has(of.value)) &&
        (!kind.value || row.kind.has(kind.value)) &&
        (!wanted || row.text.includes(wanted));
      row.element.hidden = !fits;
      shown += fits;
    }
    document.getElementById("count").value = `${shown} of ${rows.length} rows`;
    if (form.elements.order.value !== order) {
      order = form.elements.order.value;
      const key = order === "row" ? "number" : "place";
      rows.sort((a, b) => a[key] - b[key] || a.place - b.place);
      body.append(...rows.map((row) => row.element));
    }
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
