// Scatter plots on canvas: a density image, thinned points, axes, and a label for the point under the pointer.
(() => {
  "use strict";
  const source = document.getElementById("report-data");
  if (!source) return;
  const { structures, atoms, plots, errorColours } = JSON.parse(source.textContent);
  const INK = "#22303c", PALE = "#66737f", GRID = "#e3e8ec", ACCENT = "#d9480f";
  const TYPES = { "<u2": Uint16Array, u1: Uint8Array, "<f4": Float32Array, "<i4": Int32Array };
  const decode = (text, kind) => new TYPES[kind](Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const FONT = "12px system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif";
  const label = document.createElement("div");
  label.className = "pointer-label";
  label.hidden = true;
  document.body.append(label);
  const all = [];
  let chosenType = -1;
  let linked = null; // {structure, row} under the pointer, marked in every plot

  const show = (v) => {
    if (Number.isNaN(v)) return "–";
    if (!Number.isFinite(v)) return "∞";
    const size = Math.abs(v);
    const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : size >= 0.001 ? 3 : 2;
    const text = size > 0 && size < 0.0005 ? v.toExponential(1) : v.toFixed(digits);
    return text.replace("-", "−");
  };
  const ticks = (axis, pixels) => {
    const found = [];
    if (axis.log) {
      const low = Math.log10(axis.low), high = Math.log10(axis.high);
      const steps = high - low > 2.2 ? [1] : high - low > 1 ? [1, 3] : [1, 2, 3, 5, 7];
      for (let d = Math.floor(low); d <= high; d++)
        for (const s of steps) {
          const v = s * 10 ** d;
          if (v >= axis.low * 0.999 && v <= axis.high * 1.001) found.push(v);
        }
      return found;
    }
    const rough = (axis.high - axis.low) / Math.max(2, pixels / 55);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
    for (let v = Math.ceil(axis.low / step) * step; v <= axis.high + 1e-9 * step; v += step)
      found.push(Math.abs(v) < 1e-9 * step ? 0 : v);
    return found;
  };
  const tickText = (v) => {
    const size = Math.abs(v);
    if (size && (size >= 1e5 || size < 1e-3)) return v.toExponential(0).replace("-", "−").replace("e+", "e");
    return String(+v.toPrecision(4)).replace("-", "−");
  };
  const place = (axis, v) => axis.log
    ? (Math.log10(v) - Math.log10(axis.low)) / (Math.log10(axis.high) - Math.log10(axis.low))
    : (v - axis.low) / (axis.high - axis.low);

  function Plot(canvas, spec) {
    const p = spec.points;
    const x = decode(p.x, "<u2"), y = decode(p.y, "<u2");
    const structure = decode(p.structure, "<i4"), row = decode(p.row, "<i4");
    const component = p.component ? decode(p.component, "u1") : null;
    const value = p.value ? decode(p.value, "u1") : null;
    const columns = spec.columns.map((c) => ({ ...c, values: decode(c.values, "<f4") }));
    const context = canvas.getContext("2d");
    let box = { left: 56, top: 10, width: 1, height: 1 }, base = null, picture = null;
    const px = (k) => box.left + (x[k] / 65535) * box.width;
    const py = (k) => box.top + (1 - y[k] / 65535) * box.height;
    if (spec.image) {
      picture = new Image();
      picture.onload = () => this.draw();
      picture.src = spec.image;
    }
    const dot = (k, size) => { context.beginPath(); context.arc(px(k), py(k), size, 0, 7); };

    this.paint = () => {
      const ratio = window.devicePixelRatio || 1;
      const wide = canvas.clientWidth, high = canvas.clientHeight;
      if (!wide) return false;
      canvas.width = Math.round(wide * ratio);
      canvas.height = Math.round(high * ratio);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.font = FONT;
      const bar = spec.valueLabel ? 74 : 0;
      box = { left: 60, top: 12, width: wide - 60 - 16 - bar, height: high - 12 - 48 };
      context.fillStyle = "#fff";
      context.fillRect(0, 0, wide, high);
      context.lineWidth = 1;
      context.textBaseline = "middle";
      for (const v of ticks(spec.x, box.width)) {
        const at = Math.round(box.left + place(spec.x, v) * box.width) + 0.5;
        context.strokeStyle = GRID;
        context.beginPath(); context.moveTo(at, box.top); context.lineTo(at, box.top + box.height); context.stroke();
        context.fillStyle = INK; context.textAlign = "center";
        context.fillText(tickText(v), at, box.top + box.height + 13);
      }
      for (const v of ticks(spec.y, box.height)) {
        const at = Math.round(box.top + (1 - place(spec.y, v)) * box.height) + 0.5;
        context.strokeStyle = GRID;
        context.beginPath(); context.moveTo(box.left, at); context.lineTo(box.left + box.width, at); context.stroke();
        context.fillStyle = INK; context.textAlign = "right";
        context.fillText(tickText(v), box.left - 7, at);
      }
      context.save();
      context.beginPath();
      context.rect(box.left, box.top, box.width, box.height);
      context.clip();
      if (picture && picture.complete) {
        context.imageSmoothingEnabled = false;
        context.globalAlpha = chosenType < 0 ? 1 : 0.25;
        context.drawImage(picture, box.left, box.top, box.width, box.height);
      }
      for (let k = 0; k < p.n; k++) {
        if (chosenType >= 0 && structures.type[structure[k]] !== chosenType) continue;
        context.globalAlpha = chosenType >= 0 ? 0.75 : picture ? (value ? 0.5 : 0.28) : 0.7;
        context.fillStyle = value ? (value[k] > 63 ? PALE : errorColours[value[k]]) : spec.colour;
        dot(k, picture ? 1.7 : 2.6);
        context.fill();
      }
      context.globalAlpha = 1;
      for (const line of spec.lines) {
        context.strokeStyle = context.fillStyle = line.colour;
        context.lineWidth = line.dots ? 1.6 : 1.2;
        context.setLineDash(line.dashed ? [5, 4] : []);
        context.beginPath();
        line.x.forEach((v, k) => context.lineTo(box.left + place(spec.x, v) * box.width, box.top + (1 - place(spec.y, line.y[k])) * box.height));
        if (!line.bare) context.stroke();
        context.setLineDash([]);
        if (line.dots) line.x.forEach((v, k) => {
          context.beginPath();
          context.arc(box.left + place(spec.x, v) * box.width, box.top + (1 - place(spec.y, line.y[k])) * box.height, 3, 0, 7);
          context.fill();
        });
      }
      context.restore();
      context.strokeStyle = PALE; context.lineWidth = 1;
      context.beginPath();
      context.moveTo(box.left + 0.5, box.top);
      context.lineTo(box.left + 0.5, box.top + box.height + 0.5);
      context.lineTo(box.left + box.width, box.top + box.height + 0.5);
      context.stroke();
      context.fillStyle = INK; context.textAlign = "center";
      context.fillText(spec.x.label, box.left + box.width / 2, high - 12, box.width + 40);
      context.save();
      context.translate(12, box.top + box.height / 2); context.rotate(-Math.PI / 2);
      context.fillText(spec.y.label, 0, 0, box.height);
      context.restore();
      if (spec.valueLabel) this.bar(wide);
      base = context.getImageData(0, 0, canvas.width, canvas.height);
      return true;
    };

    this.bar = (wide) => {
      const left = wide - 66, n = errorColours.length, axis = { low: spec.valueRange[0], high: spec.valueRange[1], log: true };
      for (let k = 0; k < n; k++) {
        context.fillStyle = errorColours[k];
        context.fillRect(left, box.top + (1 - (k + 1) / n) * box.height, 10, box.height / n + 0.6);
      }
      context.fillStyle = INK; context.textAlign = "left";
      for (const v of ticks(axis)) context.fillText(tickText(v), left + 14, box.top + (1 - place(axis, v)) * box.height);
      context.save();
      context.translate(wide - 8, box.top + box.height / 2); context.rotate(-Math.PI / 2); context.textAlign = "center";
      context.fillText(spec.valueLabel, 0, 0);
      context.restore();
    };

    this.draw = () => { if (this.paint()) this.mark(); };

    this.mark = () => {
      if (!base) return;
      context.putImageData(base, 0, 0);
      if (!linked) return;
      for (let k = 0; k < p.n; k++) {
        const same = structure[k] === linked.structure && (row[k] === linked.row || row[k] < 0 || linked.row < 0);
        if (!same) continue;
        const under = linked.plot === this && linked.k === k;
        context.strokeStyle = ACCENT;
        context.lineWidth = under ? 2.4 : 1.4;
        dot(k, under ? 5.5 : 4);
        context.stroke();
      }
    };

    const find = (event) => {
      const frame = canvas.getBoundingClientRect();
      const mx = event.clientX - frame.left, my = event.clientY - frame.top;
      let best = -1, least = 14 * 14;
      for (let k = 0; k < p.n; k++) {
        if (chosenType >= 0 && structures.type[structure[k]] !== chosenType) continue;
        const d = (px(k) - mx) ** 2 + (py(k) - my) ** 2;
        if (d < least) { least = d; best = k; }
      }
      return best;
    };
    const tell = (k, event) => {
      const s = structure[k];
      const lines = [];
      const add = (name, text) => {
        const line = document.createElement("div"), key = document.createElement("span"), what = document.createElement("b");
        key.textContent = name; what.textContent = text;
        line.append(key, what);
        lines.push(line);
      };
      const head = document.createElement("strong");
      head.textContent = structures.name[s];
      const type = structures.types[structures.type[s]];
      const where = document.createElement("div");
      where.className = "where";
      const part = component ? ", " + spec.components[component[k]] : "";
      where.textContent = (row[k] >= 0 ? `${atoms.element[row[k]]} atom ${atoms.index[row[k]]}${part}` : structures.whole + part) + (type ? ` · ${type}` : "");
      for (const c of columns) add(c.label, show(c.values[k]) + (c.unit ? " " + c.unit : ""));
      label.replaceChildren(head, where, ...lines);
      label.hidden = false;
      const width = label.offsetWidth, height = label.offsetHeight;
      label.style.left = Math.max(6, Math.min(event.clientX + 16, innerWidth - width - 10)) + "px";
      label.style.top = Math.max(6, Math.min(event.clientY + 16, innerHeight - height - 10)) + "px";
    };
    const leave = () => { label.hidden = true; if (linked) { linked = null; all.forEach((plot) => plot.mark()); } };
    canvas.addEventListener("pointermove", (event) => {
      const k = find(event);
      if (k < 0) return leave();
      const before = linked;
      linked = { structure: structure[k], row: row[k], plot: this, k };
      if (!before || before.plot !== this || before.k !== k) all.forEach((plot) => plot.mark());
      tell(k, event);
    });
    canvas.addEventListener("pointerleave", leave);
    all.push(this);
  }

  document.documentElement.classList.add("live");
  for (const canvas of document.querySelectorAll("canvas[data-plot]")) {
    const spec = plots[canvas.dataset.plot];
    if (spec) new Plot(canvas, spec).draw();
  }
  if (structures.types.length > 1)
    for (const chooser of document.querySelectorAll("select.type-chooser")) {
      [["show all", -1], ...structures.types.map((t, k) => [t || "(no config_type)", k])].forEach(([text, k]) => chooser.add(new Option(text, k)));
      chooser.closest("label").hidden = false;
      chooser.addEventListener("change", () => {
        chosenType = +chooser.value;
        document.querySelectorAll("select.type-chooser").forEach((other) => { other.value = chooser.value; });
        all.forEach((plot) => plot.draw());
      });
    }
  const tables = document.querySelectorAll(".wide");
  const hint = () => tables.forEach((table) => {
    const scrolls = table.scrollWidth > table.clientWidth + 1;
    table.classList.toggle("scrolls", scrolls);
    if (scrolls) table.tabIndex = 0; else table.removeAttribute("tabindex");
  });
  hint();
  let waiting = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => { hint(); all.forEach((plot) => plot.draw()); });
  }).observe(document.querySelector("main"));
})();
