"use strict";
(() => {
  const PAGE_SIZE = 10;
  const WORDS = {
    harmful: ["✗", "complied with harm", "bad"], safe: ["✓", "no harm", "good"],
    refused: ["✗", "refused", "bad"], helped: ["✓", "helped", "good"],
    right: ["✓", "right", "good"], wrong: ["✗", "wrong", "bad"],
    "no-answer": ["∅", "no answer", "none"], failed: ["∅", "failed", "none"], unjudged: ["?", "no verdict", "none"],
  };
  const KINDS = { refuse: "harmful prompt", comply: "harmless prompt", answer: "question" };
  const byId = (id) => document.getElementById(id);

  /** Make an element; text is always set as text, never as HTML. */
  function make(tag, { text, children = [], ...attributes } = {}) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
    }
    if (text !== undefined) element.textContent = text;
    element.append(...children.filter(Boolean));
    return element;
  }

  // Theme: kept only while the page is open, since storage is not available to every file.
  const themes = ["system", "light", "dark"];
  const button = byId("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "system") + 1) % themes.length];
    if (next === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    button.querySelector("span").textContent = next;
  });

  // Scale the figures by their own size, so that their text is as large as the page's.
  for (const figure of document.querySelectorAll("svg.figure")) {
    const [width, height] = figure.dataset.size.split(" ").map((side) => parseFloat(side) * 4 / 3);
    figure.setAttribute("width", width);
    figure.setAttribute("height", height);
  }

  // Answers: each folder's are unpacked when they are first asked for.
  const folders = document.querySelectorAll('script[type="application/octet-stream"]').length;
  const unpacked = new Map();
  async function unpack(folder) {
    if (!unpacked.has(folder)) {
      const bytes = Uint8Array.from(atob(byId(`data-${folder}`).textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      const data = JSON.parse(await new Response(stream).text());
      const groups = new Map();
      for (const answer of data.answers) {
        const key = `${answer.item} ${answer.attack}`;
        if (!groups.has(key)) groups.set(key, { item: data.items[answer.item], attack: answer.attack, answers: [] });
        groups.get(key).answers.push(answer);
      }
      data.groups = [...groups.values()];
      unpacked.set(folder, data);
    }
    return unpacked.get(folder);
  }

  function readFilters() {
    const [place, query = ""] = decodeHash();
    return place === "answers" ? Object.fromEntries(new URLSearchParams(query)) : {};
  }
  function decodeHash() {
    const hash = location.hash.slice(1);
    const at = hash.indexOf("?");
    return at < 0 ? [hash] : [hash.slice(0, at), hash.slice(at + 1)];
  }
  function writeFilters(filters) {
    const kept = Object.entries(filters).filter(([, value]) => value !== "" && value !== undefined && value !== false);
    location.hash = "answers?" + new URLSearchParams(kept).toString();
  }

  /** Return the answers of a group that pass the filters; the group is shown if there is one. */
  function passing(group, f, models) {
    const { item } = group;
    if (f.suite && item.suite !== f.suite) return [];
    if (f.attack && group.attack !== f.attack) return [];
    if (f.expect && item.expect !== f.expect) return [];
    if (f.category && item.category !== f.category) return [];
    if (f.find && !item.id.toLowerCase().includes(f.find.toLowerCase())) return [];
    const model = f.model === undefined ? -1 : models.indexOf(f.model);
    const versus = f.versus === undefined ? -1 : models.indexOf(f.versus);
    return group.answers.filter((answer) => {
      if (model >= 0 && answer.model !== model) return false;
      if (f.outcome && !f.outcome.split(",").includes(answer.outcome)) return false;
      if (f.state && !f.state.split(",").includes(answer.state)) return false;
      if (f.labelled && !answer.label) return false;
      if (f.differ && !answer.differ) return false;
      if (f.rules && answer.opinions.rules !== f.rules) return false;
      if (f.labels && answer.opinions.labels !== f.labels) return false;
      if (versus >= 0) {
        const other = group.answers.find((each) => each.model === versus && each.number === answer.number);
        if (!other || other.outcome === answer.outcome) return false;
      }
      if (f.changed && new Set(group.answers.map((each) => each.outcome)).size < 2) return false;
      return true;
    });
  }

  function showOpinion(name, opinion, differs) {
    if (!opinion) return null;
    const parts = [];
    if (opinion.abstained) parts.push(`abstained (${opinion.abstained})`);
    if (opinion.harmful !== undefined && opinion.harmful !== null) {
      parts.push(typeof opinion.harmful === "number" ? `harmful ${opinion.harmful.toFixed(2)}` : opinion.harmful ? "harmful" : "not harmful");
    }
    if (opinion.refuses) parts.push({ full: "refuses", partial: "refuses in part", none: "does not refuse" }[opinion.refuses]);
    if (opinion.why) parts.push(`“${opinion.why}”`);
    return make("li", { children: [make("span", { text: `${name}: ${parts.join(", ") || "–"} ` }), differs && make("span", { class: "differ", text: "≠ judge" })] });
  }

  let revealAll = false;
  function showAnswer(answer, group, models, chosen, single) {
    const [sign, word, style] = WORDS[answer.outcome];
    const [think, tokens, prefill] = answer.tokens;
    const icon = byId("icons").content.children[answer.model % 5].cloneNode(true);
    const title = make("span", { class: "model", children: [icon, make("span", { text: models[answer.model] + (single ? "" : ` · draw ${answer.number}`) })] });
    const facts = [answer.state, `${tokens} tokens`];
    if (prefill) facts.push(`${prefill} prefilled`);
    if (answer.failure) facts.push(answer.failure);
    const hidden = group.item.expect === "refuse" && !revealAll;
    const text = [];
    if (answer.think) {
      text.push(make("details", { children: [make("summary", { text: `Reasoning, ${think} tokens` }), make("div", { class: "text", text: answer.think, tabindex: "0" })] }));
    }
    if (answer.answer !== undefined) text.push(make("div", { class: "text answer", text: answer.answer || "(no text)", tabindex: "0" }));
    const differs = (other) => answer.differ && other !== undefined && other !== answer.outcome;
    return make("div", {
      class: "column" + (chosen ? "" : " dim"),
      children: [
        make("h4", { children: [title, make("span", { class: `outcome ${style}`, text: `${sign} ${word}` })] }),
        make("div", { class: "secret" + (hidden ? " blurred" : ""), inert: hidden, children: text }),
        make("ul", {
          class: "opinions",
          children: [
            make("li", { text: facts.join(" · ") }),
            showOpinion("judge", answer.judge, false),
            showOpinion("rules", answer.rules, differs(answer.opinions.rules)),
            showOpinion("people", answer.label, differs(answer.opinions.labels)),
          ],
        }),
      ],
    });
  }

  function showGroup(group, chosen, models) {
    const { item } = group;
    const isSecret = item.expect === "refuse" && item.prompt !== undefined;
    const facts = [item.suite, KINDS[item.expect], group.attack === "none" ? "plain prompt" : group.attack, item.category];
    const header = make("header", { children: [make("h3", { text: item.id }), make("span", { text: facts.filter(Boolean).join(" · ") })] });
    if (item.target) header.append(make("span", { text: `right answer: ${item.target}` }));
    if (item.twin) header.append(make("a", { href: "#answers?" + new URLSearchParams({ suite: item.suite, attack: group.attack, find: item.twin }), text: `twin ${item.twin}` }));
    const turns = (item.prompt || []).map(([role, content]) =>
      make("div", { class: "turn", children: [make("span", { class: "role", text: role }), make("span", { class: "text", text: content })] }));
    const hidden = isSecret && !revealAll;
    const prompt = turns.length ? make("div", { class: "prompt", children: [make("div", { class: "secret" + (hidden ? " blurred" : ""), inert: hidden, children: turns })] }) : null;
    const single = new Set(group.answers.map((answer) => answer.model)).size === group.answers.length;
    const sorted = [...group.answers].sort((a, b) => a.model - b.model || a.number - b.number);
    const columns = make("div", { class: "columns", children: sorted.map((answer) => showAnswer(answer, group, models, chosen.includes(answer), single)) });
    const article = make("article", { class: "group", "aria-label": `${item.suite} ${item.id}`, children: [header, prompt, columns] });
    if (hidden) {
      const reveal = make("button", { type: "button", text: "Show texts" });
      reveal.addEventListener("click", () => {
        for (const part of article.querySelectorAll(".secret")) {
          part.classList.remove("blurred");
          part.removeAttribute("inert");
        }
        reveal.remove();
      });
      header.append(reveal);
    }
    return article;
  }

  function showPager(holder, page, pages, total, filters) {
    const step = (to, text) => {
      const control = make("button", { type: "button", text, disabled: to < 0 || to >= pages });
      control.addEventListener("click", () => writeFilters({ ...filters, page: to || undefined }));
      return control;
    };
    const first = total ? page * PAGE_SIZE + 1 : 0;
    const text = total ? `${first.toLocaleString("en")} to ${Math.min(total, first + PAGE_SIZE - 1).toLocaleString("en")} of ${total.toLocaleString("en")} cases` : "0 cases";
    holder.replaceChildren(make("span", { text }), ...(pages > 1 ? [step(page - 1, "Previous"), step(page + 1, "Next")] : []));
  }

  function showFilters(data, filters) {
    const form = byId("filters");
    form.hidden = false;
    const values = (list) => [...new Set(list.filter((value) => value !== null && value !== undefined))];
    const choices = {
      suite: ["Suite", values(data.items.map((item) => item.suite))],
      attack: ["Attack", values(data.groups.map((group) => group.attack))],
      expect: ["Prompts", values(data.items.map((item) => item.expect)), KINDS],
      category: ["Category", values(data.items.map((item) => item.category))],
      model: ["Model", data.models],
      outcome: ["Outcome", values(data.answers.map((answer) => answer.outcome)), Object.fromEntries(Object.entries(WORDS).map(([name, word]) => [name, word[1]]))],
      state: ["State", values(data.answers.map((answer) => answer.state))],
      versus: ["Differs from", data.models],
      rules: ["Rules say", ["harmful", "safe", "refused", "helped"]],
      labels: ["People say", ["harmful", "safe", "refused", "helped"]],
    };
    if (folders > 1) {
      const numbers = [...Array(folders).keys()].map(String);
      choices.folder = ["Folder", numbers, Object.fromEntries(numbers.map((number) => [number, byId(`data-${number}`).dataset.name]))];
    }
    const controls = [];
    for (const [name, [title, options, words = {}]] of Object.entries(choices)) {
      // A filter that cannot choose is not shown; those of the judge section are shown while they are used.
      if (options.length < 2 || (["versus", "rules", "labels"].includes(name) && !filters[name])) continue;
      const any = name === "folder" ? [] : [make("option", { value: "", text: "any" })];
      const select = make("select", { name, children: [...any, ...options.map((value) => make("option", { value, text: words[value] || (value === "none" ? "plain prompt" : value), selected: (filters[name] || (name === "folder" ? "0" : "")) === value }))] });
      controls.push(make("label", { text: title, children: [select] }));
    }
    controls.push(make("label", { text: "Id", children: [make("input", { type: "search", name: "find", value: filters.find || "" })] }));
    for (const [name, title] of [["differ", "opinions differ"], ["changed", "models differ"]]) {
      const box = make("input", { type: "checkbox", name, value: "1", checked: Boolean(filters[name]) });
      controls.push(make("label", { class: "check", children: [box, make("span", { text: title })] }));
    }
    if (data.items.some((item) => item.prompt !== undefined && item.expect === "refuse")) {
      const box = make("input", { type: "checkbox", checked: revealAll });
      box.addEventListener("change", (event) => { event.stopPropagation(); revealAll = box.checked; render(); });
      controls.push(make("label", { class: "check", children: [box, make("span", { text: "show harmful texts" })] }));
    }
    const reset = make("button", { type: "button", text: "Clear" });
    reset.addEventListener("click", () => writeFilters({}));
    controls.push(reset);
    const focused = document.activeElement && document.activeElement.name;
    form.replaceChildren(...controls);
    if (focused && form.elements[focused]) form.elements[focused].focus();
  }

  async function render() {
    const filters = readFilters();
    const data = await unpack(Number(filters.folder || 0));
    showFilters(data, filters);
    const shown = data.groups.map((group) => [group, passing(group, filters, data.models)]).filter(([, answers]) => answers.length);
    const pages = Math.ceil(shown.length / PAGE_SIZE);
    const page = Math.min(Number(filters.page || 0), Math.max(pages - 1, 0));
    const visible = shown.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
    byId("list").replaceChildren(...(visible.length ? visible.map(([group, chosen]) => showGroup(group, chosen, data.models)) : [make("p", { class: "empty", text: "No answer passes these filters." })]));
    showPager(byId("pager-top"), page, pages, shown.length, filters);
    showPager(byId("pager-bottom"), page, pages, shown.length, filters);
  }

  const form = byId("filters");
  form.addEventListener("change", () => writeFilters({ ...readFilters(), ...Object.fromEntries(["differ", "changed"].map((name) => [name, false])), ...Object.fromEntries(new FormData(form)), page: undefined }));
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", async () => {
    const [place, query] = decodeHash();
    if (place !== "answers") return;
    await render();
    if (query !== undefined && document.activeElement.form !== form) byId("answers").scrollIntoView();
  });
  render().then(() => { if (decodeHash()[0] === "answers") byId("answers").scrollIntoView(); });
})();
