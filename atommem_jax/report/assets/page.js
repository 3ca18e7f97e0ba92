"use strict";
// The trace viewer: steps through the episodes in #data. All text enters the page by textContent.
(() => {
  const { episodes } = JSON.parse(document.getElementById("data").textContent);
  if (!episodes.length) return;

  const byId = (id) => document.getElementById(id);
  const LETTERS = { create: "C", read: "R", update: "U", delete: "D", scratchpad: "S", answer: "A" };
  const EVENTS = {
    added: ["+", "added"],
    updated: ["~", "updated"],
    deleted: ["\u2212", "deleted"],
    evicted: ["\u00d7", "evicted"],
  };
  const MOST_ROWS = 16; // of a larger table only entries and changes are listed

  let episode = 0; // index into episodes
  let turn = 0; // index into its turns

  // ------------------------------------------------------------------ elements

  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  const quote = (text) => element("span", { class: "text" }, text);
  const nothing = (text) => element("p", { class: "none" }, text);
  const field = (name, ...children) =>
    element("div", { class: "field" }, element("h5", {}, name), ...children);
  const badge = (kind, text) => element("span", { class: `badge ${kind}` }, text);
  // A score is null where nobody knows what is right, as of questions that a person asked.
  const isWrong = (e) => e.em !== null && e.em < 1;
  const hasGold = (e) => e.questions.some((q) => q.em !== null);

  // ------------------------------------------------------------------ what follows from the data

  /** The table after turn `last` of an episode: slot -> text. */
  function foldTable(e, last) {
    const table = new Map((e.start || []).map(({ slot, text }) => [slot, text]));
    for (const { changes } of e.turns.slice(0, last + 1)) {
      for (const { slot, after } of changes) {
        if (after === null) table.delete(slot);
        else table.set(slot, after);
      }
    }
    return table;
  }

  /** The question that ends with this turn, or null. */
  function endedQuestion(e, t) {
    const { question } = e.turns[t];
    const next = e.turns[t + 1];
    if (question === null || (next && next.question === question)) return null;
    return question;
  }

  function describePhase(e, { phase, chunk, question }) {
    if (phase === "reading") return `reading chunk ${chunk + 1} of ${e.chunks.length}`;
    const last = phase === "final" ? ", last turn for it" : "";
    return `question ${question + 1} of ${e.questions.length}${last}`;
  }

  // ------------------------------------------------------------------ episodes

  const visible = () =>
    episodes.map((_, i) => i).filter((i) => !byId("only-wrong").checked || isWrong(episodes[i]));

  function renderEpisodes() {
    const rows = visible();
    byId("episode-list").replaceChildren(
      ...rows.map((i) => {
        const e = episodes[i];
        const count = e.questions.length;
        const right = e.questions.filter((q) => q.em === 1).length;
        const [name, mark, told, score] = !hasGold(e)
          ? ["unscored", "\u00b7", `${count} asked`, `${count}`]
          : [
              ...(isWrong(e) ? ["wrong", "\u2717"] : ["right", "\u2713"]),
              `${right} of ${count} answers right`,
              `${right}/${count}`,
            ];
        const button = element(
          "button",
          {
            type: "button",
            class: name,
            "data-episode": i,
            "aria-label": `episode ${e.episode}: ${told}`,
          },
          element("span", { class: "mark", "aria-hidden": "true" }, mark),
          ` ${e.episode} `,
          element("small", {}, score),
        );
        button.addEventListener("click", () => show(i, 0));
        return element("li", {}, button);
      }),
    );
    byId("count").textContent = rows.length
      ? `${rows.length} of ${episodes.length} episodes`
      : "No traced episode has a wrong answer.";
    byId("viewer").hidden = !rows.length;
    byId("only-wrong").closest("label").hidden = !episodes.some(hasGold);
  }

  function renderQuestions() {
    const e = episodes[episode];
    const scored = hasGold(e);
    const rows = e.questions.map((q, i) => {
      const current = e.turns[turn].question === i;
      const answer = q.answer ? quote(q.answer) : element("span", { class: "none" }, "no answer");
      return element(
        "tr",
        { class: current ? "current" : null },
        element("th", { scope: "row" }, `${i + 1}`),
        element("td", {}, quote(q.text), current ? element("small", {}, " put in this turn") : null),
        element("td", { "data-title": "answer" }, answer),
        scored ? element("td", { "data-title": "gold" }, q.gold.join(" / ")) : null,
        scored ? element("td", {}, verdict(q)) : null,
      );
    });
    const titles = ["", "question", "answer", ...(scored ? ["gold", ""] : [])];
    const head = titles.map((title) => element("th", { scope: "col" }, title));
    byId("questions").replaceChildren(
      element(
        "table",
        { class: scored ? "questions" : "questions unscored" },
        element("caption", {}, `Episode ${e.episode}, trajectory ${e.trajectory}`),
        element("thead", {}, element("tr", {}, ...head)),
        element("tbody", {}, ...rows),
      ),
    );
  }

  const verdict = (q) =>
    q.em === null ? null : q.em === 1 ? badge("right", "\u2713 right") : badge("wrong", "\u2717 wrong");

  // ------------------------------------------------------------------ turns

  function renderTimeline() {
    const e = episodes[episode];
    byId("timeline").replaceChildren(
      ...e.turns.map((one, t) => {
        const applied = one.actions.filter((a) => a.fates.includes("applied"));
        const ended = endedQuestion(e, t);
        const em = ended === null ? null : e.questions[ended].em;
        let text = applied.map((a) => LETTERS[a.kind]).join("");
        if (em !== null) text = em === 1 ? "\u2713" : "\u2717";
        const refused = one.actions.length > applied.length;
        const told = applied.map((a) => a.kind).join(", ") || "nothing applied";
        const classes = [one.phase === "reading" ? "reading" : "answering"];
        if (em !== null) classes.push(em === 1 ? "right" : "wrong");
        if (refused) classes.push("refused");
        if (one.scripted) classes.push("scripted");
        const button = element(
          "button",
          {
            type: "button",
            class: classes.join(" "),
            "aria-label":
              `turn ${t + 1}, ${describePhase(e, one)}: ${told}` + (refused ? ", some refused" : ""),
          },
          (text || "\u00b7") + (refused ? "!" : ""),
        );
        button.addEventListener("click", () => show(episode, t));
        return element("li", {}, button);
      }),
    );
  }

  function renderTurn() {
    const e = episodes[episode];
    const one = e.turns[turn];
    const author = one.scripted ? "written by program" : "written by the model";
    byId("turn-title").replaceChildren(
      `Turn ${turn + 1} of ${e.turns.length}: ${describePhase(e, one)} `,
      badge(one.scripted ? "program" : "model", author),
    );
    byId("previous").disabled = turn === 0;
    byId("next").disabled = turn === e.turns.length - 1;
    renderSaw(e, one);
    renderDid(e, one);
    renderTable(e, one);
    renderScratchpad(one.scratchpad);
    markCurrent();
  }

  function markCurrent() {
    for (const button of byId("episode-list").querySelectorAll("button")) {
      const current = Number(button.dataset.episode) === episode;
      if (current) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    byId("timeline").querySelectorAll("button").forEach((button, t) => {
      // One stop for the tab key: the arrows move within.
      button.tabIndex = t === turn ? 0 : -1;
      if (t === turn) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
    });
  }

  function renderSaw(e, one) {
    const shown = one.shown.map(({ number, slot, text, cosine }) => {
      const bar = element("span", { class: "bar", "aria-hidden": "true" });
      bar.style.width = `${Math.max(0, Math.min(1, cosine)) * 100}%`;
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, `Memory ${number}`),
        element("td", {}, quote(text), element("small", {}, ` slot ${slot}`)),
        element("td", { class: "cosine" }, cosine.toFixed(3), element("span", { class: "track" }, bar)),
      );
    });
    const head = ["shown as", "entry", "similarity"].map((t) => element("th", { scope: "col" }, t));
    const parts = [
      one.chunk === null ? null : field("Chunk", element("p", {}, quote(e.chunks[one.chunk]))),
      one.question === null
        ? null
        : field("Question put", element("p", {}, quote(e.questions[one.question].text))),
      field(
        "Standing query",
        one.query ? element("p", {}, quote(one.query)) : nothing("none: so nothing is shown"),
      ),
      field(
        "Entries shown, by similarity to the query",
        shown.length
          ? element(
              "table",
              { class: "shown" },
              element("thead", {}, element("tr", {}, ...head)),
              element("tbody", {}, ...shown),
            )
          : nothing(one.query ? "none: the table is empty" : "none"),
      ),
    ];
    byId("saw").replaceChildren(...parts.filter((part) => part !== null));
  }

  function renderDid(e, one) {
    const parts = one.actions.length
      ? [element("ol", { class: "actions" }, ...one.actions.map(renderAction))]
      : [nothing("No action: the turn changed nothing.")];
    const ended = endedQuestion(e, turn);
    if (ended !== null) parts.push(renderAnswer(e.questions[ended]));
    if (one.response) {
      const raw = element("pre", {}, element("code", {}, one.response));
      parts.push(element("details", { open: rawOpen }, element("summary", {}, "as generated"), raw));
      parts[parts.length - 1].addEventListener("toggle", (event) => {
        rawOpen = event.target.open;
      });
    }
    byId("did").replaceChildren(...parts);
  }

  let rawOpen = false; // stays as it was from turn to turn

  function renderAnswer(q) {
    const given = q.answer ? quote(q.answer) : element("span", { class: "none" }, "no answer");
    return element(
      "div",
      { class: "answer" },
      element("p", {}, element("b", {}, "answer "), given, " ", verdict(q)),
      q.em === null ? null : element("p", {}, element("b", {}, "gold "), q.gold.join(" / ")),
    );
  }

  function renderAction(action) {
    const target = action.target === null ? "" : ` Memory ${action.target || "?"}`;
    const line = [element("b", {}, action.kind + target + (action.text ? ": " : ""))];
    if (action.kept !== undefined && action.text.startsWith(action.kept)) {
      line.push(quote(action.kept), element("del", {}, action.text.slice(action.kept.length)));
    } else {
      line.push(quote(action.text));
    }
    const notes = [];
    if (action.kept_tokens !== undefined) {
      notes.push(`cut to ${action.kept_tokens} of ${action.tokens} tokens`);
    }
    if (action.why) notes.push(action.why);
    if (action.slot !== null) {
      notes.push(`slot ${action.slot}`);
      const was = { create: "evicted ", update: "was ", delete: "removed " }[action.kind];
      if (action.was) notes.push([was, element("del", {}, action.was)]);
    }
    const told = notes.flatMap((note, i) => (i ? ["; ", note].flat() : [note].flat()));
    return element(
      "li",
      {},
      element("p", {}, ...line),
      element(
        "p",
        { class: "fates" },
        ...action.fates.flatMap((fate) => [badge(fate, fate), " "]),
        element("small", {}, ...told),
      ),
    );
  }

  function renderTable(e, one) {
    const table = foldTable(e, turn);
    const changes = new Map(one.changes.map((change) => [change.slot, change]));
    const numbers = new Map(one.shown.map(({ slot, number }) => [slot, number]));
    const all = e.slots <= MOST_ROWS;
    const rows = [];
    for (let slot = 0; slot < e.slots; slot++) {
      if (all || table.has(slot) || changes.has(slot)) {
        rows.push(renderRow(slot, table.get(slot), changes.get(slot), numbers.get(slot)));
      }
    }
    const head = ["slot", "entry", "in this turn"].map((t) => element("th", { scope: "col" }, t));
    const [before, after] = one.entries;
    byId("table").replaceChildren(
      element("p", { class: "note" }, `${before} entries before, ${after} of ${e.slots} after`),
      element(
        "table",
        { class: "slots" },
        element("thead", {}, element("tr", {}, ...head)),
        element("tbody", {}, ...rows),
      ),
    );
  }

  function renderRow(slot, text, change, number) {
    const told = [];
    const entry = [];
    if (change) {
      if (change.before !== null) entry.push(element("del", {}, change.before));
      if (change.after !== null) entry.push(element("ins", {}, change.after));
      for (const event of change.events) {
        const [symbol, word] = EVENTS[event];
        told.push(badge(event, `${symbol} ${word}`), " ");
      }
    } else if (text !== undefined) {
      entry.push(quote(text));
    }
    if (!entry.length) entry.push(element("span", { class: "none" }, "free"));
    if (number !== undefined) told.push(element("small", {}, `shown as ${number}`));
    return element(
      "tr",
      { class: change ? change.events[change.events.length - 1] : null },
      element("th", { scope: "row" }, `${slot}`),
      element("td", { class: "entry" }, ...entry),
      element("td", {}, ...told),
    );
  }

  function renderScratchpad(runs) {
    const tags = { same: "span", removed: "del", added: "ins" };
    const changed = runs.some(([what]) => what !== "same");
    byId("scratchpad").replaceChildren(
      runs.length
        ? element(
            "p",
            {},
            ...runs.map(([what, text]) => element(tags[what], { class: "text" }, text)),
            element("small", {}, changed ? "" : " unchanged"),
          )
        : nothing("empty"),
    );
  }

  // ------------------------------------------------------------------ moving

  function show(nextEpisode, nextTurn) {
    const changed = nextEpisode !== episode;
    episode = nextEpisode;
    turn = Math.max(0, Math.min(nextTurn, episodes[episode].turns.length - 1));
    if (changed) renderTimeline();
    renderQuestions();
    renderTurn();
    const hash = `#episode=${episodes[episode].episode}&turn=${turn + 1}`;
    history.replaceState(null, "", hash);
  }

  const step = (by) => show(episode, turn + by);

  function stepEpisode(by) {
    const rows = visible();
    const next = rows[rows.indexOf(episode) + by];
    if (next === undefined) return;
    const inList = byId("episode-list").contains(document.activeElement);
    show(next, 0);
    if (inList) byId("episode-list").querySelector("[aria-current]").focus();
  }

  function followHash() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (!wanted.has("episode")) return false;
    const index = episodes.findIndex((e) => `${e.episode}` === wanted.get("episode"));
    if (index < 0) return false;
    if (!visible().includes(index)) {
      byId("only-wrong").checked = false;
      renderEpisodes();
    }
    show(index, (Number(wanted.get("turn")) || 1) - 1);
    return true;
  }

  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("only-wrong").addEventListener("change", () => {
    renderEpisodes();
    const rows = visible();
    if (rows.length && !rows.includes(episode)) show(rows[0], 0);
    else markCurrent();
  });
  window.addEventListener("hashchange", followHash);

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const { target } = event;
    if (target.closest("input:not([type=checkbox]), textarea, select, [contenteditable], .scroll")) {
      return;
    }
    if (byId("viewer").hidden) return;
    const moves = {
      ArrowLeft: () => step(-1),
      ArrowRight: () => step(1),
      j: () => stepEpisode(1),
      k: () => stepEpisode(-1),
    };
    if (target.closest("#traces")) {
      // Elsewhere these scroll the page.
      moves.ArrowDown = () => stepEpisode(1);
      moves.ArrowUp = () => stepEpisode(-1);
    }
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    move();
    if (byId("timeline").contains(target)) byId("timeline").querySelector("[aria-current]").focus();
  });

  renderEpisodes();
  renderTimeline();
  if (!followHash()) {
    const rows = visible();
    episode = rows[0];
    renderQuestions();
    renderTurn();
  }
})();
