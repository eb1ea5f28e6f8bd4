// What the page does besides being read: sorts its table, hides series, shows values under the
// pointer, changes the horizontal axis and the theme, copies commands. Text from runs only ever
// becomes textContent.
"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const values = JSON.parse(byId("values").textContent);
  const MOST_ROWS = 16; // of values under the pointer
  root.classList.add("js");

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // theme
  const themes = ["auto", "light", "dark"];
  byId("theme").addEventListener("click", (event) => {
    const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length];
    root.dataset.theme = next;
    event.target.textContent = `theme: ${next}`;
  });

  // table: a heading sorts the groups, and once more turns them round; what has no value is last
  const table = byId("table");
  const headings = all("th[data-sort]", table);
  headings.forEach((heading, column) => {
    const button = element("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const isNumber = heading.classList.contains("number");
      const before = heading.getAttribute("aria-sort");
      // Numbers begin with the highest.
      const order = before ? (before === "ascending" ? -1 : 1) : isNumber ? -1 : 1;
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      const keyed = [...table.tBodies].map((body) => [body.rows[0].cells[column].dataset.value, body]);
      keyed.sort(([a], [b]) => {
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return order * (isNumber ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      table.append(...keyed.map(([, body]) => body));
    });
  });
  const singles = byId("singles");
  if (singles) {
    const show = () => table.classList.toggle("grouped", !singles.checked);
    if (table.rows.length > 40) singles.checked = false;
    singles.addEventListener("change", show);
    show();
  }

  // legend: a series is shown or not in every chart
  const hidden = new Set();
  function showSeries() {
    all(".chart .series").forEach((series) => {
      series.classList.toggle("off", hidden.has(series.dataset.series));
    });
    all(".legend li[data-series] button").forEach((button) => {
      button.setAttribute("aria-pressed", !hidden.has(button.parentNode.dataset.series));
    });
  }
  const items = all(".legend li[data-series]");
  items.forEach((item) => {
    const button = element("button");
    button.type = "button";
    button.append(...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      const label = item.dataset.series;
      if (!hidden.delete(label)) hidden.add(label);
      showSeries();
    });
  });
  if (items.length > 3) {
    const item = element("li", "control");
    const button = element("button", "", "all / none");
    button.type = "button";
    button.addEventListener("click", () => {
      if (hidden.size) hidden.clear();
      else items.forEach((each) => hidden.add(each.dataset.series));
      showSeries();
    });
    item.append(button);
    items[0].parentNode.append(item);
  }
  if (items.length) showSeries();

  // horizontal axis
  all("[data-axis]").forEach((button, _, buttons) => {
    button.addEventListener("click", () => {
      const axis = button.dataset.axis;
      buttons.forEach((each) => each.setAttribute("aria-pressed", each === button));
      all("#curves figure").forEach((figure) => {
        const timed = figure.querySelector(".by-seconds");
        if (!timed) return;
        timed.hidden = axis !== "seconds";
        figure.querySelector(".by-epochs").hidden = axis === "seconds";
      });
    });
  });

  // values under the pointer
  const tip = byId("tip");
  const spoken = byId("spoken");

  // The last point at or before a place; in a chart by epochs or blocks, the point there.
  function valueAt(series, place, isExact) {
    for (let i = series.x.length - 1; i >= 0; i--) {
      if (series.x[i] === null || series.x[i] > place + 1e-9) continue;
      if ((isExact && series.x[i] < place - 1e-9) || series.y[i] === null) return null;
      return { series, y: series.y[i], std: series.std[i] };
    }
    return null;
  }

  function heading(chart, place) {
    if (chart.unit === "block") return chart.names[place - 1];
    return chart.unit === "epoch" ? `epoch ${place}` : `${Number(place.toPrecision(3))} s of training`;
  }

  all(".chart").forEach((svg) => {
    const chart = values[svg.dataset.chart];
    const [left, right, low, high] = ["left", "right", "low", "high"].map((n) => Number(svg.dataset[n]));
    const places = [...new Set(chart.series.flatMap((series) => series.x))]
      .filter((x) => x !== null)
      .sort((a, b) => a - b);
    const isExact = chart.unit !== "seconds";
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    line.setAttribute("class", "cross off");
    line.setAttribute("y1", svg.dataset.top);
    line.setAttribute("y2", svg.dataset.bottom);
    svg.prepend(line);
    svg.setAttribute("tabindex", "0");
    let current = null;

    function show(place, speak) {
      current = place;
      const found = chart.series
        .filter((series) => !hidden.has(series.label))
        .map((series) => valueAt(series, place, isExact))
        .filter((each) => each !== null);
      if (!found.length) return hide();
      found.sort((a, b) => b.y - a.y);
      const x = left + ((place - low) / (high - low)) * (right - left);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.classList.remove("off");
      const rows = element("table");
      found.slice(0, MOST_ROWS).forEach(({ series, y, std }) => {
        const row = rows.insertRow();
        const name = row.insertCell();
        const key = element("span", `key ${series.look}`);
        if (series.shade !== null) key.style.setProperty("--shade", `${100 * series.shade}%`);
        name.append(key, series.label);
        const spread = std === undefined || std === null ? "" : ` ± ${std.toFixed(chart.digits)}`;
        row.insertCell().textContent = y.toFixed(chart.digits) + spread;
      });
      tip.replaceChildren(element("p", "", heading(chart, place)), rows);
      if (found.length > MOST_ROWS) tip.append(element("p", "", `and ${found.length - MOST_ROWS} more`));
      tip.hidden = false;
      // Beside the line, on the side with more room, and within the window.
      const box = svg.getBoundingClientRect();
      const at = box.left + (x / svg.viewBox.baseVal.width) * box.width;
      const isLeft = at > root.clientWidth / 2;
      const wanted = isLeft ? at - tip.offsetWidth - 12 : at + 12;
      const most = root.clientWidth - tip.offsetWidth - 4;
      tip.style.left = `${window.scrollX + Math.min(Math.max(4, wanted), most)}px`;
      const top = Math.min(box.top + 8, window.innerHeight - tip.offsetHeight - 8);
      tip.style.top = `${window.scrollY + Math.max(4, top)}px`;
      if (speak) {
        const texts = found.map(({ series, y }) => `${series.label} ${y.toFixed(chart.digits)}`);
        spoken.textContent = `${heading(chart, place)}: ${texts.join(", ")}`;
      }
    }

    function hide() {
      current = null;
      tip.hidden = true;
      line.classList.add("off");
    }

    function follow(event) {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const place = low + ((x - left) / (right - left)) * (high - low);
      const nearest = places.reduce((a, b) => (Math.abs(b - place) < Math.abs(a - place) ? b : a));
      show(isExact ? nearest : Math.min(Math.max(place, places[0]), places[places.length - 1]));
    }

    if (!places.length) return;
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    // A finger leaves as soon as it is lifted: what it touched stays until it touches another place.
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
    svg.addEventListener("blur", hide);
    addEventListener("pointerdown", (event) => { if (current !== null && !svg.contains(event.target)) hide(); });
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const last = places.length - 1;
      let i = places.findIndex((x) => x >= (current ?? Infinity) - 1e-9);
      i = i < 0 ? last : Math.min(Math.max(i + step, 0), last);
      show(places[i], true);
    });
  });

  // commands
  all(".copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const code = button.parentNode.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        // Where a page may not write to the clipboard, the text is left selected.
        getSelection().selectAllChildren(code);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  });

  // On paper nothing can be opened.
  const opened = [];
  addEventListener("beforeprint", () => {
    opened.push(...all("details:not([open])"));
    opened.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => {
    opened.splice(0).forEach((each) => { each.open = false; });
  });
})();
