"use strict";
// Draws what the data element holds. Texts enter the page through textContent alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const coarse = matchMedia("(pointer: coarse)").matches;
  const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };
  const drawn = new Map(); // element -> function that draws it

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // What is remembered over a reload; nothing where the browser keeps no storage for files.
  const memory = {
    get(name, otherwise) {
      try { return sessionStorage.getItem(name) ?? otherwise; } catch { return otherwise; }
    },
    set(name, value) {
      try { sessionStorage.setItem(name, value); } catch { /* the choice lasts until a reload */ }
    },
  };

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  // Names come from files: Plotly would read tags in them as markup.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function layout(extra) {
    const axis = {
      gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"),
      automargin: true, tickfont: { size: 11 },
    };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("text"), size: 12, family: "system-ui, sans-serif" },
      margin: { l: 44, r: 10, t: 8, b: 30 }, hovermode: "x unified", showlegend: false,
      dragmode: coarse ? false : "zoom",
      hoverlabel: {
        bgcolor: colour("back"), bordercolor: colour("line"), font: { color: colour("text") },
      },
      ...extra, xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
    };
  }

  // Draw when it comes into view, and again when colours or settings change.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && drawn.has(entry.target) && !entry.target.dataset.drawn) {
        entry.target.dataset.drawn = "yes";
        drawn.get(entry.target)();
      }
    }
  }, { rootMargin: "300px" });

  function show(element, draw) {
    drawn.set(element, draw);
    watcher.observe(element);
  }

  function forget(parent) {
    for (const element of parent.querySelectorAll(".plot")) {
      watcher.unobserve(element);
      drawn.delete(element);
      if (element.dataset.drawn) Plotly.purge(element);
    }
    parent.replaceChildren();
  }

  function redraw() {
    for (const [element, draw] of drawn) if (element.dataset.drawn) draw();
  }

  // ---- curves

  function smoothed(values, weight) {
    let mean = 0, count = 0;
    return values.map((value) => {
      if (value === null) return null;
      count += 1;
      mean = weight * mean + (1 - weight) * value;
      return mean / (1 - weight ** count); // without the pull of the first zero
    });
  }

  function faint(hex, alpha) {
    const part = (from) => parseInt(hex.slice(from, from + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${alpha})`;
  }

  function traces(lines, weight) {
    const found = [];
    lines.forEach((line, index) => {
      const main = colour(`line-${index % 5}`), name = plain(line.run);
      const skip = { x: line.x, mode: "lines", hoverinfo: "skip" };
      if (line.low && !weight) {
        found.push({ ...skip, y: line.low, line: { width: 0 } });
        found.push({ ...skip, y: line.high, line: { width: 0 }, fill: "tonexty", fillcolor: faint(main, 0.22) });
      }
      if (weight) found.push({ ...skip, y: line.y, line: { width: 1, color: faint(main, 0.35) } });
      found.push({
        x: line.x, y: weight ? smoothed(line.y, weight) : line.y, name,
        mode: line.x.length < 40 ? "lines+markers" : "lines", marker: { size: 4 },
        line: { width: 1.8, color: main }, hovertemplate: "%{y:.5g}",
      });
    });
    return found;
  }

  function chart(item, several) {
    const figure = make("figure"), plot = make("div", "plot"), caption = make("figcaption");
    figure.append(make("h3", "", item.name), caption, plot);
    caption.textContent = item.lines.map((line) =>
      (several ? `${line.run}: ` : "") + line.summary +
      (line.each ? `; a point is the mean of ${line.each} steps, the band their range` : "")
    ).join(" · ");
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `${item.name} over steps: ${caption.textContent}`);
    show(plot, () => Plotly.react(
      plot, traces(item.lines, Number(at("smoothing").value)),
      layout({ xaxis: { title: { text: "step", standoff: 4 } } }), config,
    ));
    return figure;
  }

  function showStage(index) {
    const stage = data.charts[index];
    if (!stage) return;
    memory.set("stage", stage.stage);
    for (const id of ["charts", "more-charts"]) forget(at(id));
    const several = new Set(stage.first.concat(stage.more).flatMap((c) => c.lines.map((l) => l.run))).size > 1;
    at("charts").append(...stage.first.map((item) => chart(item, several)));
    at("more-charts").append(...stage.more.map((item) => chart(item, several)));
    at("more").hidden = !stage.more.length;
    at("left-out").textContent = stage.left_out ? `${stage.left_out} more are not shown.` : "";
    showHeat(stage);
  }

  function radio(parent, group, names, chosen, onChoice) {
    names.forEach((name, index) => {
      const label = make("label"), input = make("input");
      Object.assign(input, { type: "radio", name: group, value: index, checked: index === chosen });
      input.addEventListener("change", () => onChoice(index));
      label.append(input, make("span", "", name));
      parent.append(label);
    });
  }

  // ---- experts

  const measures = {
    load_max: "busiest expert, times its share", load_cv: "spread of the load (deviation / mean)",
    dead_experts: "experts without a token",
  };

  function showHeat(stage) {
    const heat = at("heat"), choice = at("measure"), before = choice.value;
    forget(heat);
    at("experts").hidden = at("to-experts").hidden = !stage.heat.length;
    if (!stage.heat.length) return;
    const names = Object.keys(stage.heat[0].measures);
    choice.replaceChildren(...names.map((name) => new Option(measures[name], name)));
    choice.value = names.includes(before) ? before : names[0];
    stage.heat.forEach((item) => {
      const plot = make("div", "plot");
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `Load of experts of ${item.run} by layer and step`);
      if (stage.heat.length > 1) heat.append(make("h3", "", item.run));
      heat.append(plot);
      show(plot, () => Plotly.react(plot, [{
        type: "heatmap", x: item.steps, y: item.layers, z: item.measures[choice.value],
        colorscale: "Viridis", hovertemplate: "layer %{y}, step %{x}: %{z:.3g}<extra></extra>",
        colorbar: { thickness: 12, outlinewidth: 0, tickfont: { color: colour("text") } },
      }], layout({
        hovermode: "closest", height: Math.min(700, 150 + 16 * item.layers.length),
        xaxis: { title: { text: "step" } },
        yaxis: { title: { text: "layer" }, dtick: Math.ceil(item.layers.length / 20) },
      }), config));
      plot.style.height = `${Math.min(700, 150 + 16 * item.layers.length)}px`;
    });
  }

  // ---- completions

  function turn(kind, title, text) {
    const box = make("div", `turn ${kind}`), body = make("pre");
    body.dir = "auto";
    const end = kind === "assistant" ? text.indexOf("</think>") : -1;
    if (end >= 0) body.append(make("span", "thinking", text.slice(0, end + 8)), text.slice(end + 8));
    else body.textContent = text;
    box.append(make("h4", "", title), body);
    return box;
  }

  function card(row) {
    const box = make("article", "card"), facts = make("div", "facts");
    const state = row.status || "";
    if (state) facts.append(make("span", `badge ${["correct", "wrong"].includes(state) ? state : ""}`, state));
    if (row.cut) facts.append(make("span", "badge cut", "cut off"));
    if (row.task) facts.append(make("strong", "", row.task));
    for (const [name, value] of Object.entries(row.numbers)) facts.append(make("span", "", `${name} ${value}`));
    for (const [name, value] of row.parts) facts.append(make("span", "muted", `${name}: ${value}`));
    if (row.tokens) facts.append(make("span", "muted", `${row.tokens} tokens`));
    box.append(facts, turn("prompt", "prompt", row.prompt));
    for (const said of row.turns) {
      const kind = said.tool ? (said.failed ? "tool failed" : "tool") : "assistant";
      box.append(turn(kind, said.role + (said.failed ? ", failed" : ""), said.text));
    }
    if (row.detail) box.append(make("p", "muted", row.detail));
    return box;
  }

  function showReading(index) {
    const list = data.readings[index];
    document.querySelectorAll(".side").forEach((side, place) => {
      const choice = side.querySelector(".column"), cards = side.querySelector(".cards");
      const previous = side.querySelector(".previous"), next = side.querySelector(".next");
      choice.replaceChildren(...list.columns.map((column, i) => new Option(column.label, i)));
      choice.value = place ? list.columns.length - 1 : 0;
      const fill = () => {
        const chosen = Number(choice.value);
        cards.replaceChildren(...list.columns[chosen].rows.map(card));
        previous.disabled = chosen === 0;
        next.disabled = chosen === list.columns.length - 1;
      };
      const move = (by) => { choice.value = Number(choice.value) + by; fill(); };
      choice.onchange = fill;
      previous.onclick = () => move(-1);
      next.onclick = () => move(1);
      fill();
    });
  }

  // ---- evaluation

  function showTasks() {
    const plot = at("tasks");
    if (!plot) return;
    plot.className = "plot";
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", "Share of problems solved, by task; the table below has the numbers");
    const count = new Set(data.tasks.flatMap((column) => column.tasks)).size;
    const height = 130 + Math.max(1, count) * 28;
    plot.style.height = `${height}px`;
    show(plot, () => Plotly.react(plot, data.tasks.map((column, index) => ({
      type: "scatter", mode: "markers", name: plain(column.name), x: column.values,
      y: column.tasks.map(plain),
      error_x: { type: "data", array: column.above, arrayminus: column.below, thickness: 1.2, width: 3 },
      marker: {
        size: 9, color: colour(`line-${index % 5}`),
        symbol: ["circle", "square", "diamond", "x", "triangle-up", "star"][index % 6],
      },
      hovertemplate: "%{x:.3f}",
    })), layout({
      hovermode: "y unified", height, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      margin: { l: 44, r: 10, t: 60, b: 40 }, scattermode: "group",
      xaxis: { range: [-0.02, 1.02], title: { text: "share solved" } },
      yaxis: { type: "category", autorange: "reversed" },
    }), config));
  }

  // ---- start

  const names = data.charts.map((stage) => stage.stage);
  const chosen = Math.max(0, names.indexOf(memory.get("stage", names[0])));
  radio(at("stage-choice"), "stage", names, chosen, showStage);
  at("smoothing").value = memory.get("smoothing", "0");
  const say = () => { at("smoothing-value").textContent = at("smoothing").value; };
  at("smoothing").addEventListener("input", () => { memory.set("smoothing", at("smoothing").value); say(); redraw(); });
  at("measure").addEventListener("change", redraw);
  say();
  if (names.length) showStage(chosen);
  else { at("charts").textContent = "No metrics were logged yet."; at("to-experts").hidden = true; }
  if (data.readings.length) {
    at("reading-list").replaceChildren(...data.readings.map((list, index) => new Option(list.name, index)));
    at("reading-list").onchange = (event) => showReading(Number(event.target.value));
    showReading(0);
  } else {
    at("reading").hidden = true;
    at("no-completions").hidden = false;
  }
  showTasks();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const reload = at("reload");
  reload.checked = memory.get("reload", "no") === "yes";
  reload.onchange = () => memory.set("reload", reload.checked ? "yes" : "no");
  setInterval(() => { if (reload.checked && !reload.closest("label").hidden) location.reload(); }, 15000);
  at("main").dataset.ready = "yes";
})();
