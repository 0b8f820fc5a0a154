"use strict";
// The map of images: points on a canvas, a thumbnail beside the pointer, neighbours in a list.
{
  // As in the drawn maps: Petroff 2021, arXiv:2107.02270, table 1; further classes by turns of the hue.
  const PALETTE = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"];
  const MOST_ZOOM = 60;

  const classColour = (place) => PALETTE[place] || `hsl(${(place * 137.5) % 360} 62% 52%)`;

  class ImageMap {
    constructor(element, data) {
      this.data = data;
      this.n = data.xy.length;
      this.chosen = null; // the point whose neighbours are shown
      this.at = null; // the point under the pointer or the keyboard
      this.zoom = 1;
      this.shift = [0, 0]; // pixels
      this.pointers = new Map();
      this.classes = [...new Set(data.label)].sort((a, b) => a - b);
      this.off = new Set();
      const labelled = this.classes.filter((label) => label >= 0);
      this.colours = new Map(labelled.map((label, place) => [label, classColour(place)]));
      this.colours.set(-1, PALETTE[8]);
      this.measure();
      this.build(element);
      new ResizeObserver(() => this.fit()).observe(this.box);
      whenRecoloured.push(() => this.draw());
      if (data.sheet) {
        this.sheet = new Image();
        this.sheet.onload = () => this.draw();
        this.sheet.src = data.sheet;
      }
    }

    measure() {
      const [xs, ys] = [0, 1].map((axis) => this.data.xy.map((point) => point[axis]));
      const ends = [xs, ys].map((v) => [Math.min(...v), Math.max(...v)]);
      this.middle = ends.map(([low, high]) => (low + high) / 2);
      this.spread = ends.map(([low, high]) => high - low || 1);
    }

    name(i) {
      const label = this.data.label[i];
      return label < 0 ? "no class" : this.data.classes[label];
    }

    pointColour(i) {
      return this.colours.get(this.data.label[i]);
    }

    build(element) {
      const { data } = this;
      const of = data.total > this.n ? ` of ${data.total.toLocaleString("en")}` : "";
      const text = `Map of ${this.n.toLocaleString("en")}${of} query samples, step ${data.step.toLocaleString("en")}`;
      this.canvas = make("canvas", {
        tabIndex: 0,
        attributes: { role: "application", "aria-label": text, "aria-describedby": "map-help" },
      });
      this.hover = make("div", { className: "hover", hidden: true, attributes: { role: "status" } });
      const zoom = make("div", { className: "zoom" });
      for (const [sign, label, act] of [
        ["+", "Zoom in", () => this.zoomBy(1.5)],
        ["−", "Zoom out", () => this.zoomBy(1 / 1.5)],
        ["⟲", "Show all", () => this.reset()],
      ]) {
        const button = make("button", { type: "button", textContent: sign, title: label, attributes: { "aria-label": label } });
        button.addEventListener("click", act);
        zoom.append(button);
      }
      this.box = make("div", { className: "plot" }, this.canvas, zoom, this.hover);
      const axes = make("p", { className: "axes" },
        make("span", { textContent: `→ ${data.axes[0]}` }), make("span", { textContent: `↑ ${data.axes[1]}` }));
      this.legend = make("div", { className: "legend classes", attributes: { role: "group", "aria-label": "Classes that are shown" } });
      for (const label of this.classes) this.legend.append(this.entry(label));
      this.side = make("div", { className: "side", attributes: { "aria-live": "polite" } });
      const left = make("div", {}, make("p", { className: "note", textContent: `${text}. Switch classes on and off:` }), this.legend, this.box, axes);
      element.append(make("div", { className: "stage" }, left, this.side));
      this.listen();
      this.tell();
    }

    entry(label) {
      const button = make("button", { type: "button", attributes: { "aria-pressed": "true" } },
        make("span", { className: "swatch", style: { background: this.colours.get(label) } }),
        label < 0 ? "no class" : this.data.classes[label]);
      button.addEventListener("click", () => {
        if (!this.off.delete(label)) this.off.add(label);
        button.setAttribute("aria-pressed", !this.off.has(label));
        this.draw();
      });
      return button;
    }

    listen() {
      const { canvas } = this;
      canvas.addEventListener("pointerdown", (event) => {
        this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
        canvas.setPointerCapture(event.pointerId);
        this.moved = 0;
      });
      canvas.addEventListener("pointermove", (event) => this.move(event));
      for (const name of ["pointerup", "pointercancel"]) {
        canvas.addEventListener(name, (event) => {
          const wasClick = name === "pointerup" && this.pointers.size === 1 && this.moved < 5;
          this.pointers.delete(event.pointerId);
          if (wasClick) this.choose(this.find(event.offsetX, event.offsetY));
        });
      }
      canvas.addEventListener("pointerleave", () => this.point(null));
      canvas.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && !event.metaKey) return; // else the page scrolls
        event.preventDefault();
        this.zoomBy(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
      }, { passive: false });
      canvas.addEventListener("dblclick", (event) => this.zoomBy(2, event.offsetX, event.offsetY));
      canvas.addEventListener("keydown", (event) => this.press(event));
      canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible") && this.at === null) this.point(this.chosen ?? this.central()); });
      canvas.addEventListener("blur", () => this.point(null));
    }

    move(event) {
      const { offsetX: x, offsetY: y, pointerId: id } = event;
      if (!this.pointers.has(id)) {
        this.point(this.find(x, y));
        return;
      }
      const before = this.pointers.get(id);
      this.moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
      if (this.pointers.size === 1) {
        this.shift = [this.shift[0] + x - before[0], this.shift[1] + y - before[1]];
      } else {
        const other = [...this.pointers].find(([name]) => name !== id)[1];
        const ratio = Math.hypot(x - other[0], y - other[1]) / Math.max(1, Math.hypot(before[0] - other[0], before[1] - other[1]));
        this.zoomBy(ratio, other[0], other[1]);
      }
      this.pointers.set(id, [x, y]);
      this.draw();
    }

    fit() {
      const width = this.box.clientWidth;
      if (!width || width === this.width) return;
      this.width = width;
      this.height = Math.round(Math.min(560, Math.max(320, width * 0.78)));
      const ratio = devicePixelRatio || 1;
      this.canvas.width = width * ratio;
      this.canvas.height = this.height * ratio;
      this.canvas.style.height = `${this.height}px`;
      this.context = this.canvas.getContext("2d");
      this.context.scale(ratio, ratio);
      this.scale = Math.min((width - 40) / this.spread[0], (this.height - 40) / this.spread[1]);
      this.draw();
    }

    place(i) {
      const [x, y] = this.data.xy[i];
      const by = this.scale * this.zoom;
      return [
        this.width / 2 + this.shift[0] + (x - this.middle[0]) * by,
        this.height / 2 + this.shift[1] - (y - this.middle[1]) * by,
      ];
    }

    isShown(i) {
      return !this.off.has(this.data.label[i]);
    }

    zoomBy(factor, x = this.width / 2, y = this.height / 2) {
      const zoom = Math.min(MOST_ZOOM, Math.max(0.5, this.zoom * factor));
      const by = zoom / this.zoom;
      const [u, v] = [x - this.width / 2, y - this.height / 2];
      this.shift = [u - (u - this.shift[0]) * by, v - (v - this.shift[1]) * by];
      this.zoom = zoom;
      this.draw();
    }

    reset() {
      this.zoom = 1;
      this.shift = [0, 0];
      this.draw();
    }

    find(x, y) {
      let best = null;
      let least = 18;
      for (let i = 0; i < this.n; i += 1) {
        if (!this.isShown(i)) continue;
        const [u, v] = this.place(i);
        const distance = Math.hypot(u - x, v - y);
        if (distance < least) [best, least] = [i, distance];
      }
      return best;
    }

    central() {
      let best = null;
      let least = Infinity;
      for (let i = 0; i < this.n; i += 1) {
        const [u, v] = this.place(i);
        const distance = Math.hypot(u - this.width / 2, v - this.height / 2);
        if (this.isShown(i) && distance < least) [best, least] = [i, distance];
      }
      return best;
    }

    /** The nearest point in a direction: what lies aside counts double. */
    towards(dx, dy) {
      const from = this.at ?? this.chosen;
      if (from === null) return this.central();
      const [x, y] = this.place(from);
      let best = from;
      let least = Infinity;
      for (let i = 0; i < this.n; i += 1) {
        if (i === from || !this.isShown(i)) continue;
        const [u, v] = this.place(i);
        const along = (u - x) * dx + (v - y) * dy;
        const aside = Math.abs((u - x) * dy - (v - y) * dx);
        if (along > 0.01 && along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
      }
      return best;
    }

    press(event) {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (event.key in steps) this.point(this.towards(...steps[event.key]));
      else if (event.key === "Enter" || event.key === " ") this.choose(this.at);
      else if (event.key === "+" || event.key === "=") this.zoomBy(1.5);
      else if (event.key === "-") this.zoomBy(1 / 1.5);
      else if (event.key === "0") this.reset();
      else if (event.key === "Escape") this.choose(null);
      else return;
      event.preventDefault();
    }

    point(i) {
      if (i === this.at) return;
      this.at = i;
      this.hover.hidden = i === null;
      if (i !== null) {
        const text = `sample ${this.data.image[i]}: ${this.name(i)}`;
        this.hover.replaceChildren(...[this.thumb(i, 72), make("div", { textContent: text })].filter(Boolean));
        const [x, y] = this.place(i);
        const { offsetWidth: w, offsetHeight: h } = this.hover;
        this.hover.style.left = `${Math.max(2, Math.min(this.width - w - 2, x + (x > this.width / 2 ? -w - 14 : 14)))}px`;
        this.hover.style.top = `${Math.max(2, Math.min(this.height - h - 2, y - h / 2))}px`;
      }
      this.draw();
    }

    choose(i) {
      this.chosen = i;
      this.draw();
      this.tell();
    }

    thumb(i, side) {
      const { sheet, columns } = this.data;
      if (!sheet) return null;
      const rows = Math.ceil(this.n / columns);
      const [x, y] = [i % columns, Math.floor(i / columns)];
      return make("div", {
        className: "thumb",
        style: {
          width: `${side}px`,
          height: `${side}px`,
          "background-image": `url(${sheet})`,
          "background-size": `${columns * side}px ${rows * side}px`,
          "background-position": `${-x * side}px ${-y * side}px`,
        },
        attributes: { role: "img", "aria-label": `sample ${this.data.image[i]}, ${this.name(i)}` },
      });
    }

    near(i) {
      return this.data.neighbours[i]
        .map((j, place) => [j, this.data.similarity[i][place]])
        .filter(([j]) => j >= 0);
    }

    /** The chosen sample and its neighbours, beside the map. */
    tell() {
      const i = this.chosen;
      if (i === null) {
        this.side.replaceChildren(make("p", { className: "empty", textContent: "Click a point, or press Enter on it, to see its nearest neighbours." }));
        return;
      }
      const near = this.near(i);
      const same = near.filter(([j]) => this.data.label[j] === this.data.label[i]).length;
      const about = make("div", {}, make("h4", { textContent: this.name(i) }),
        make("div", { className: "note", textContent: `sample ${this.data.image[i]}` }));
      const chosen = make("div", { className: "chosen" }, ...[this.thumb(i, 88), about].filter(Boolean));
      const text = near.length
        ? `Nearest by cosine${this.data.label[i] < 0 ? "" : `; ${same} of ${near.length} of the same class`}:`
        : "This map holds no neighbours; a newer run's does.";
      const list = make("ol", { className: "near" });
      for (const [j, cosine] of near) {
        const swatch = make("span", { className: "swatch", style: { background: this.pointColour(j), "margin-right": "0" } });
        const button = make("button", { type: "button" },
          ...[this.thumb(j, 40), swatch, this.name(j), make("span", { className: "cosine", textContent: cosine.toFixed(3) })].filter(Boolean));
        button.addEventListener("click", () => {
          this.choose(j);
          this.side.querySelector("button")?.focus();
        });
        list.append(make("li", {}, button));
      }
      this.side.replaceChildren(chosen, make("p", { className: "note", textContent: text }), list);
    }

    draw() {
      const pen = this.context;
      if (!pen) return;
      pen.clearRect(0, 0, this.width, this.height);
      const radius = Math.max(2.2, Math.min(5, 70 / Math.sqrt(this.n))) * Math.min(2, Math.sqrt(this.zoom));
      const near = this.chosen === null ? [] : this.near(this.chosen).map(([j]) => j);
      const isQuiet = near.length > 0;
      for (let i = 0; i < this.n; i += 1) {
        if (!this.isShown(i)) continue;
        pen.globalAlpha = isQuiet ? 0.3 : 0.82;
        pen.fillStyle = this.pointColour(i);
        pen.beginPath();
        pen.arc(...this.place(i), radius, 0, 7);
        pen.fill();
      }
      pen.globalAlpha = 1;
      if (this.chosen !== null) this.drawNear(pen, near);
      if (this.at !== null) this.ring(pen, this.at, radius + 4, colour("ink"));
    }

    drawNear(pen, near) {
      const from = this.place(this.chosen);
      pen.strokeStyle = colour("soft");
      pen.lineWidth = 1.2;
      for (const j of near) {
        pen.beginPath();
        pen.moveTo(...from);
        pen.lineTo(...this.place(j));
        pen.stroke();
      }
      for (const j of near) this.stamp(pen, j, 26);
      this.stamp(pen, this.chosen, 38);
    }

    ring(pen, i, radius, ink) {
      pen.strokeStyle = ink;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(...this.place(i), radius, 0, 7);
      pen.stroke();
    }

    /** The image itself, in a frame of its class's colour; a ring where samples have no pictures. */
    stamp(pen, i, side) {
      if (!this.data.sheet) {
        this.ring(pen, i, side / 4, this.pointColour(i));
        return;
      }
      const [x, y] = this.place(i);
      const { columns } = this.data;
      pen.fillStyle = this.pointColour(i);
      pen.fillRect(x - side / 2 - 2, y - side / 2 - 2, side + 4, side + 4);
      if (!this.sheet?.complete) return;
      const cell = this.sheet.naturalWidth / columns;
      pen.imageSmoothingEnabled = false;
      pen.drawImage(this.sheet, (i % columns) * cell, Math.floor(i / columns) * cell, cell, cell, x - side / 2, y - side / 2, side, side);
    }
  }

  for (const element of document.querySelectorAll(".card.map")) {
    const data = DATA.maps[element.dataset.run];
    if (data) new ImageMap(element, data);
  }
}
