"use strict";
(() => {
  const make = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });
  const numbers = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });

  // Pictures: click or Enter enlarges one, what the model saw next to the original; arrows go to the next
  const dialog = document.body.appendChild(make("dialog"));
  const pictures = () => [...document.querySelectorAll(".picture")];
  let shown = 0;
  const side = (node, name) => { const figure = make("figure"); figure.append(node, make("figcaption", name)); return figure; };
  const enlarge = (number) => {
    const all = pictures(), one = all[shown = (number + all.length) % all.length], sides = make("div", "", "sides");
    const frames = one.querySelector(".frames");
    if (one.dataset.original) sides.append(side(Object.assign(make("img"), { src: one.dataset.original, alt: "original" }), "original"));
    sides.append(side((frames || one.querySelector("img")).cloneNode(true), one.dataset.original ? "what the model saw" : one.dataset.name || ""));
    const close = make("button", "close");
    close.onclick = () => dialog.close();
    dialog.replaceChildren(sides, make("p", `${shown + 1} of ${all.length}; arrows: the others, Esc: back `, "soft"), close);
    if (!dialog.open) dialog.showModal();
  };
  document.addEventListener("click", (event) => {
    const picture = event.target.closest(".picture");
    if (picture) enlarge(pictures().indexOf(picture));
    else if (event.target === dialog) dialog.close();
  });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (dialog.open) { if (step) { event.preventDefault(); enlarge(shown + step); } return; }
    const picture = event.target.closest && event.target.closest(".picture");
    if (picture && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); enlarge(pictures().indexOf(picture)); }
  });

  // Charts: the values at a step, by pointer or arrow keys; a button between logarithmic and linear
  const chart = (figure) => {
    const svgs = [...figure.querySelectorAll("svg")], box = figure.appendChild(make("div", "", "values"));
    let lines = JSON.parse(figure.dataset.lines), at = -1;
    box.hidden = true;
    const places = [...new Map(lines.flatMap((line) => line.points.map((point) => [point[0], point[2]]))).entries()].sort((a, b) => a[0] - b[0]);
    const current = () => svgs.find((svg) => !svg.hasAttribute("hidden"));
    const rule = (svg) => svg.querySelector(".at");
    const hide = () => { box.hidden = true; svgs.forEach((svg) => rule(svg).setAttribute("visibility", "hidden")); at = -1; };
    const show = (index) => {
      at = Math.max(0, Math.min(places.length - 1, index));
      const [x, px] = places[at], svg = current(), width = svg.viewBox.baseVal.width, found = [];
      for (const line of lines) {
        const point = line.points.reduce((best, one) => (Math.abs(one[0] - x) < Math.abs(best[0] - x) ? one : best));
        if (Math.abs(point[2] - px) < 8) found.push([line, point]);
      }
      box.replaceChildren(make("div", `${figure.dataset.x} ${numbers.format(x)}`));
      for (const [line, point] of found) {
        const row = make("div"), mark = make("i");
        mark.style.background = line.colour;
        row.append(mark, `${line.name}: ${numbers.format(point[1])}`);
        box.append(row);
      }
      box.hidden = false;
      box.style.left = px > width / 2 ? "" : `${(100 * (px + 12)) / width}%`;
      box.style.right = px > width / 2 ? `${100 - (100 * (px - 12)) / width}%` : "";
      for (const name of ["x1", "x2"]) rule(svg).setAttribute(name, px);
      rule(svg).setAttribute("visibility", "visible");
    };
    const nearest = (event) => {
      const frame = current().getBoundingClientRect(), px = ((event.clientX - frame.left) / frame.width) * current().viewBox.baseVal.width;
      return places.reduce((best, place, index) => (Math.abs(place[1] - px) < Math.abs(places[best][1] - px) ? index : best), 0);
    };
    figure.addEventListener("pointermove", (event) => show(nearest(event)));
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key];
      if (step) { event.preventDefault(); show(at < 0 ? (step > 0 ? 0 : places.length - 1) : at + step); } else if (event.key === "Escape") hide();
    });
    const button = figure.querySelector("button");
    if (button) button.onclick = () => { hide(); svgs.forEach((svg) => svg.toggleAttribute("hidden")); button.textContent = current().dataset.scale; };
  };

  // Documents in another order
  const sortable = (button) => {
    button.onclick = () => {
      const list = [...document.querySelectorAll(".document")], by = (button.dataset.sort = button.dataset.sort === "loss" ? "place" : "loss");
      const value = (one) => (by === "loss" ? -Number(one.dataset.loss || -1) : Number(one.dataset.place));
      const marks = list.map((one) => { const mark = document.createComment(""); one.replaceWith(mark); return mark; });
      list.sort((a, b) => value(a) - value(b)).forEach((one, index) => marks[index].replaceWith(one));
      button.textContent = by === "loss" ? "in the order of the packs" : "by loss";
    };
  };
  const enhance = (root) => {
    root.querySelectorAll(".chart").forEach(chart);
    root.querySelectorAll(".picture").forEach((one) => { one.tabIndex = 0; one.setAttribute("role", "button"); });
    root.querySelectorAll("button[data-sort]").forEach(sortable);
  };
  const main = document.querySelector("main");
  enhance(main);

  // A page that is served: when the run has gone on, its new contents take the place of these
  if (main.dataset.live !== undefined) {
    setInterval(async () => {
      try {
        const state = await (await fetch("state")).text();
        if (state === main.dataset.live || dialog.open) return;
        const next = new DOMParser().parseFromString(await (await fetch("page")).text(), "text/html").querySelector("main");
        main.replaceChildren(...next.childNodes);
        main.dataset.live = next.dataset.live;
        enhance(main);
      } catch { /* the server is gone, or comes back */ }
    }, 2000);
  }
})();
