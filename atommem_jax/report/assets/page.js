"use strict";
// The trace viewer: steps through the episodes in #data, and follows the facts behind each answer.
(() => {
  const { episodes, beside = [], names = [] } = JSON.parse(
    document.getElementById("data").textContent,
  );
  if (!episodes.length) return;

  const byId = (id) => document.getElementById(id);
  const LETTERS = { create: "C", read: "R", update: "U", delete: "D", scratchpad: "S", answer: "A" };
  const EVENTS = {
    added: ["+", "added"],
    updated: ["~", "updated"],
    deleted: ["\u2212", "deleted"],
    evicted: ["\u00d7", "evicted"],
  };
  const MOST_EVENTS = 40; // of a fact that are listed, those about the current turn
  const MOST_ROWS = 16; // of a larger table only entries and changes are listed

  let episode = 0; // index into episodes
  let turn = 0; // index into its turns
  let question = 0; // whose facts are followed
  let rows = []; // indices of the episodes that the filters leave
  let wanted = ""; // what is searched for in entries, in lower case
  let rawOpen = false; // stays as it was from turn to turn

  const verdict = (q) =>
    q.em === null ? null : q.em === 1 ? badge("right", "\u2713 right") : badge("wrong", "\u2717 wrong");
  const isBeside = () => beside.length > 0 && byId("side-by-side").checked;
  const followed = () => episodes[episode].questions[question];

  // ------------------------------------------------------------------ episodes

  const episodeList = new CellList(byId("episode-list"), 96, 34, makeEpisode, (button, place) => {
    if (rows[place] === episode) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });

  function isVisible(e) {
    if (byId("only-wrong").checked && !isWrong(e)) return false;
    const stage = byId("stage").value;
    if (stage && !e.questions.some((q) => q.stage === stage)) return false;
    return !wanted || episodeHolds(e, wanted);
  }

  function filterEpisodes() {
    rows = episodes.map((_, i) => i).filter((i) => isVisible(episodes[i]));
    episodeList.fill(rows.length);
    const none =
      wanted || byId("stage").value
        ? "No traced episode is left."
        : "No traced episode has a wrong answer.";
    byId("count").textContent = rows.length
      ? `${rows.length} of ${episodes.length} episodes`
      : none;
    byId("viewer").hidden = !rows.length;
    byId("only-wrong").closest("label").hidden = !episodes.some(hasGold);
  }

  function makeEpisode(place) {
    const i = rows[place];
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
    const button = makeButton(
      { class: name, "data-episode": i, "aria-label": `episode ${e.episode}: ${told}` },
      element("span", { class: "mark", "aria-hidden": "true" }, mark),
      () => show(i, 0),
    );
    button.append(` ${e.episode} `, element("small", {}, score));
    return button;
  }

  function listStages() {
    const stages = countStages(episodes);
    byId("stage").closest("label").hidden = !stages.length;
    for (const [stage, [inEpisodes, inQuestions]] of stages) {
      const told = `${nameStage(stage)}: ${inQuestions} answers in ${inEpisodes} episodes`;
      byId("stage").append(element("option", { value: stage }, told));
    }
  }

  // ------------------------------------------------------------------ questions and their facts

  function renderQuestions() {
    const e = episodes[episode];
    const other = isBeside() ? beside[episode] : null;
    const scored = hasGold(e);
    const lines = e.questions.map((q, i) => {
      const current = e.turns[turn].question === i;
      const choose = makeButton(
        { "aria-pressed": `${i === question}`, "aria-label": `follow the facts of question ${i + 1}` },
        `${i + 1}`,
        () => follow(i),
      );
      return element(
        "tr",
        { class: current ? "current" : null },
        element("th", { scope: "row" }, q.facts && q.facts.length ? choose : `${i + 1}`),
        element("td", {}, quote(q.text), current ? element("small", {}, " put in this turn") : null),
        element("td", { "data-title": other ? names[0] : "answer" }, ...renderGiven(q)),
        other ? element("td", { "data-title": names[1] }, ...renderGiven(other.questions[i])) : null,
        scored ? element("td", { "data-title": "gold" }, q.gold.join(" / ")) : null,
      );
    });
    const answers = other ? names : ["answer"];
    const titles = ["", "question", ...answers, ...(scored ? ["gold"] : [])];
    const head = titles.map((title) => element("th", { scope: "col" }, title));
    byId("questions").replaceChildren(
      element(
        "table",
        { class: "questions" },
        element("caption", {}, `Episode ${e.episode}, trajectory ${e.trajectory}`),
        element("thead", {}, element("tr", {}, ...head)),
        element("tbody", {}, ...lines),
      ),
    );
  }

  /** An answer, whether it is right, and where it broke. */
  function renderGiven(q) {
    const answer = q.answer ? quote(q.answer) : element("span", { class: "none" }, "no answer");
    const stage = q.stage ? badge("stage", nameStage(q.stage)) : null;
    return [answer, " ", verdict(q), " ", stage].filter((part) => part !== null);
  }

  function renderPath() {
    const q = followed();
    const other = isBeside() ? beside[episode].questions[question] : null;
    const parts = [q, other]
      .filter((one) => one && one.facts && one.facts.length)
      .map((one, i) => renderFacts(one, other ? names[i] : null, i === 0));
    byId("path").hidden = !parts.length;
    byId("path").replaceChildren(...parts);
  }

  function renderFacts(q, name, mine) {
    const facts = q.facts.map((fact, f) => {
      const [before, near, after] = chooseEvents(fact.events, turn, MOST_EVENTS);
      const events = near.map(([at, what]) => {
        const attributes = { class: `event ${what}`, "aria-current": mine && at === turn ? "step" : null };
        const text = `${at + 1} ${nameStage(what)}`;
        return mine
          ? makeButton(attributes, text, () => show(episode, at))
          : element("span", attributes, text);
      });
      const drift = fact.updates
        ? element("small", {}, ` ${Math.round(100 * fact.survived)}% left after Updates: ${fact.updates}`)
        : null;
      return element(
        "li",
        { "data-fact": f },
        element("p", {}, badge(`fact fact-${f % 6}`, `fact ${f + 1}`), " ", quote(fact.note || fact.text), " ",
          fact.stage ? badge("wrong", nameStage(fact.stage)) : badge("right", "there when needed"), drift),
        element(
          "p",
          { class: "events" },
          element("small", {}, before ? `${before} earlier, turn ` : "turn "),
          ...events,
          after ? element("small", {}, `${after} later`) : null,
        ),
      );
    });
    const title = `The facts behind question ${question + 1}` + (name ? `, ${name}` : "");
    return element("section", {}, element("h4", {}, title), element("ul", { class: "facts-path" }, ...facts));
  }

  // ------------------------------------------------------------------ turns

  const timeline = new CellList(byId("timeline"), 42, 30, makeTurn, (button, t) => {
    // One stop for the tab key: the arrows move within.
    button.tabIndex = t === turn ? 0 : -1;
    if (t === turn) button.setAttribute("aria-current", "step");
    else button.removeAttribute("aria-current");
  });

  function makeTurn(t) {
    const e = episodes[episode];
    const one = e.turns[t];
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
    const events = findPath(followed()).get(t) || [];
    const way = judgeTurn(followed(), t);
    if (way) classes.push(way);
    if (events.length) classes.push("event");
    const happened = events.map(([f, what]) => `; fact ${f + 1} ${nameStage(what)}`).join("");
    const label =
      `turn ${t + 1}, ${describePhase(e, one)}: ${told}` + (refused ? ", some refused" : "") + happened;
    return makeButton(
      { class: classes.join(" "), "aria-label": label, title: happened.slice(2) || null },
      (text || "\u00b7") + (refused ? "!" : ""),
      () => show(episode, t),
    );
  }

  function renderTurn() {
    const e = episodes[episode];
    const one = e.turns[turn];
    byId("turn-title").replaceChildren(...renderTitle(e, turn));
    byId("previous").disabled = turn === 0;
    byId("next").disabled = turn === e.turns.length - 1;
    renderPane("", e, turn, followed());
    byId("beside").hidden = !isBeside();
    byId("turn").classList.toggle("narrow", isBeside());
    if (isBeside()) {
      const other = beside[episode];
      const at = alignTurn(e, turn, other);
      byId("own-title").textContent = names[0];
      byId("beside-title").replaceChildren(`${names[1]}: `, ...renderTitle(other, at));
      renderPane("beside-", other, at, other.questions[question]);
    }
    byId("own-title").hidden = !isBeside();
    const events = findPath(followed()).get(turn) || [];
    byId("turn-events").replaceChildren(
      ...events.flatMap(([f, what]) => [
        badge(`fact fact-${f % 6}`, `fact ${f + 1} ${nameStage(what)}`),
        " ",
      ]),
    );
    episodeList.refresh();
    timeline.refresh();
    timeline.reveal(turn);
  }

  function renderTitle(e, t) {
    const one = e.turns[t];
    const author = one.scripted ? "written by program" : "written by the model";
    return [
      `Turn ${t + 1} of ${e.turns.length}: ${describePhase(e, one)} `,
      badge(one.scripted ? "program" : "model", author),
    ];
  }

  /** All that is told of a turn, into the elements whose ids begin so. */
  function renderPane(prefix, e, t, q) {
    const one = e.turns[t];
    byId(`${prefix}saw`).replaceChildren(...renderSaw(e, one, q, findHeld(q, t - 1)));
    byId(`${prefix}did`).replaceChildren(...renderDid(e, t));
    byId(`${prefix}table`).replaceChildren(...renderTable(e, t, findHeld(q, t)));
    byId(`${prefix}scratchpad`).replaceChildren(...renderScratchpad(one.scratchpad, findHeld(q, t)));
  }

  /** Which facts a slot holds, as badges. */
  const markFacts = (held, slot) =>
    (held.get(slot) || []).flatMap((f) => [" ", badge(`fact fact-${f % 6}`, `fact ${f + 1}`)]);

  /** A chunk in which the sentences of followed facts are marked. */
  function renderChunk(text, q, chunk) {
    let pieces = [text];
    ((q && q.facts) || []).forEach((fact, f) => {
      if (fact.chunk !== chunk) return;
      pieces = pieces.flatMap((piece) => {
        const at = typeof piece === "string" && fact.text ? piece.indexOf(fact.text) : -1;
        if (at < 0) return [piece];
        const marked = element("mark", { class: `fact-${f % 6}`, title: `fact ${f + 1}` }, fact.text);
        return [piece.slice(0, at), marked, piece.slice(at + fact.text.length)];
      });
    });
    return element("span", { class: "text" }, ...pieces);
  }

  function renderSaw(e, one, q, held) {
    const shown = one.shown.map(({ number, slot, text, cosine }) => {
      const bar = element("span", { class: "bar", "aria-hidden": "true" });
      bar.style.width = `${Math.max(0, Math.min(1, cosine)) * 100}%`;
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, `Memory ${number}`),
        element("td", {}, quote(text), element("small", {}, ` slot ${slot}`), ...markFacts(held, slot)),
        element("td", { class: "cosine" }, cosine.toFixed(3), element("span", { class: "track" }, bar)),
      );
    });
    const head = ["shown as", "entry", "similarity"].map((t) => element("th", { scope: "col" }, t));
    const parts = [
      one.chunk === null
        ? null
        : field("Chunk", element("p", {}, renderChunk(e.chunks[one.chunk], q, one.chunk))),
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
    return parts.filter((part) => part !== null);
  }

  function renderDid(e, t) {
    const one = e.turns[t];
    const parts = one.actions.length
      ? [element("ol", { class: "actions" }, ...one.actions.map(renderAction))]
      : [nothing("No action: the turn changed nothing.")];
    const ended = endedQuestion(e, t);
    if (ended !== null) parts.push(renderAnswer(e.questions[ended]));
    if (one.response) {
      const raw = element("pre", {}, element("code", {}, one.response));
      parts.push(element("details", { open: rawOpen }, element("summary", {}, "as generated"), raw));
      parts[parts.length - 1].addEventListener("toggle", (event) => {
        rawOpen = event.target.open;
      });
    }
    return parts;
  }

  function renderAnswer(q) {
    return element(
      "div",
      { class: "answer" },
      element("p", {}, element("b", {}, "answer "), ...renderGiven(q)),
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

  function renderTable(e, t, held) {
    const one = e.turns[t];
    const table = foldTable(e, t);
    const changes = new Map(one.changes.map((change) => [change.slot, change]));
    const numbers = new Map(one.shown.map(({ slot, number }) => [slot, number]));
    const all = e.slots <= MOST_ROWS;
    const lines = [];
    for (let slot = 0; slot < e.slots; slot++) {
      if (all || table.has(slot) || changes.has(slot)) {
        const told = [changes.get(slot), numbers.get(slot), markFacts(held, slot)];
        lines.push(renderRow(slot, table.get(slot), ...told));
      }
    }
    const head = ["slot", "entry", "in this turn"].map((title) => element("th", { scope: "col" }, title));
    const [before, after] = one.entries;
    return [
      element("p", { class: "note" }, `${before} entries before, ${after} of ${e.slots} after`),
      element(
        "table",
        { class: "slots" },
        element("thead", {}, element("tr", {}, ...head)),
        element("tbody", {}, ...lines),
      ),
    ];
  }

  function renderRow(slot, text, change, number, facts) {
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
    told.push(...facts);
    const found = wanted && text !== undefined && contains(text, wanted);
    const classes = [change && change.events[change.events.length - 1], found && "found"];
    return element(
      "tr",
      { class: classes.filter(Boolean).join(" ") || null },
      element("th", { scope: "row" }, `${slot}`),
      element("td", { class: "entry" }, ...entry),
      element("td", {}, ...told),
    );
  }

  function renderScratchpad(runs, held) {
    const tags = { same: "span", removed: "del", added: "ins" };
    const changed = runs.some(([what]) => what !== "same");
    return [
      runs.length
        ? element(
            "p",
            {},
            ...runs.map(([what, text]) => element(tags[what], { class: "text" }, text)),
            element("small", {}, changed ? "" : " unchanged"),
            ...markFacts(held, "scratchpad"),
          )
        : nothing("empty"),
    ];
  }

  // ------------------------------------------------------------------ moving

  function show(nextEpisode, nextTurn, nextQuestion = null) {
    const changed = nextEpisode !== episode;
    episode = nextEpisode;
    const e = episodes[episode];
    turn = Math.max(0, Math.min(nextTurn, e.turns.length - 1));
    const asked = question;
    if (nextQuestion !== null) question = Math.max(0, Math.min(nextQuestion, e.questions.length - 1));
    else if (changed) question = chooseBroken(e);
    if (changed || asked !== question) timeline.fill(e.turns.length);
    renderQuestions();
    renderPath();
    renderTurn();
    episodeList.reveal(Math.max(0, rows.indexOf(episode)));
    writeAddress();
  }

  /** The question to follow: the first that broke at the stage looked for, else a wrong one. */
  function chooseBroken(e) {
    const stage = byId("stage").value;
    const at = stage ? e.questions.findIndex((q) => q.stage === stage) : -1;
    return at < 0 ? chooseQuestion(e) : at;
  }

  function follow(i) {
    show(episode, turn, i);
    const pressed = byId("questions").querySelector("[aria-pressed=true]");
    if (pressed) pressed.focus({ preventScroll: true });
  }

  // Browsers refuse more than some 200 changes of the address in ten seconds.
  const MOST_CHANGES = 100;
  const SPAN = 10_000; // milliseconds
  let changes = []; // when the address was changed, of late
  let waiting = null;

  function writeAddress() {
    const now = performance.now();
    changes = changes.filter((time) => time > now - SPAN);
    clearTimeout(waiting);
    if (changes.length >= MOST_CHANGES) {
      waiting = setTimeout(writeAddress, changes[0] + SPAN - now);
      return;
    }
    changes.push(now);
    const told = question === chooseQuestion(episodes[episode]) ? "" : `&question=${question + 1}`;
    history.replaceState(null, "", `#episode=${episodes[episode].episode}&turn=${turn + 1}${told}`);
  }

  const step = (by) => show(episode, turn + by);

  function stepEpisode(by) {
    const next = rows[rows.indexOf(episode) + by];
    if (next === undefined) return;
    const inList = byId("episode-list").contains(document.activeElement);
    show(next, 0);
    if (inList) byId("episode-list").querySelector("[aria-current]").focus();
  }

  /** To the next turn, or the one before, of which a test is true; says so where there is none. */
  function jump(by, test, what) {
    const found = findTurn(episodes[episode], turn, by, test);
    byId("jumped").textContent = found === null ? `no ${by > 0 ? "later" : "earlier"} ${what}` : "";
    if (found !== null) show(episode, found);
  }

  const jumps = {
    c: (by) => jump(by, hasChange, "change"),
    f: (by) => jump(by, (_, t) => findPath(followed()).has(t), "step of these facts"),
    n: (by) => wanted && jump(by, (one) => turnWrote(one, wanted), "turn that wrote it"),
  };

  function followHash() {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (!asked.has("episode")) return false;
    const index = episodes.findIndex((e) => `${e.episode}` === asked.get("episode"));
    if (index < 0) return false;
    if (!rows.includes(index)) {
      byId("only-wrong").checked = false;
      byId("stage").value = "";
      byId("search").value = wanted = "";
      filterEpisodes();
    }
    const chosen = asked.has("question") ? Number(asked.get("question")) - 1 : null;
    show(index, (Number(asked.get("turn")) || 1) - 1, chosen);
    return true;
  }

  function refilter() {
    filterEpisodes();
    if (!rows.length) return;
    if (rows.includes(episode)) show(episode, turn, chooseBroken(episodes[episode]));
    else show(rows[0], 0);
  }

  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("only-wrong").addEventListener("change", refilter);
  byId("stage").addEventListener("change", refilter);
  byId("side-by-side").addEventListener("change", () => show(episode, turn));
  byId("next-change").addEventListener("click", () => jumps.c(1));
  byId("next-event").addEventListener("click", () => jumps.f(1));
  byId("next-found").addEventListener("click", () => jumps.n(1));
  let typing = null;
  byId("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(search, 150);
  });
  byId("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    if (wanted === byId("search").value.trim().toLowerCase()) jumps.n(event.shiftKey ? -1 : 1);
    else search();
  });
  window.addEventListener("hashchange", followHash);

  /** Leaves the episodes whose memory held the words, and goes to where they were first written. */
  function search() {
    clearTimeout(typing);
    wanted = byId("search").value.trim().toLowerCase();
    byId("next-found").hidden = !wanted;
    refilter();
    if (!wanted || !rows.length) return;
    const here = turnWrote(episodes[episode].turns[turn], wanted);
    const found = here ? turn : findTurn(episodes[episode], -1, 1, (one) => turnWrote(one, wanted));
    if (found !== null) show(episode, found);
  }

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const { target } = event;
    if (target.closest("input:not([type=checkbox]), textarea, select, [contenteditable], .scroll")) {
      return;
    }
    if (byId("viewer").hidden) return;
    const moves = event.shiftKey
      ? { C: () => jumps.c(-1), F: () => jumps.f(-1), N: () => jumps.n(-1) }
      : {
          ArrowLeft: () => step(-1),
          ArrowRight: () => step(1),
          j: () => stepEpisode(1),
          k: () => stepEpisode(-1),
          c: () => jumps.c(1),
          f: () => jumps.f(1),
          n: () => jumps.n(1),
        };
    if (target.closest("#traces") && !event.shiftKey) {
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

  listStages();
  filterEpisodes();
  byId("side-by-side").closest("label").hidden = !beside.length;
  byId("side-by-side").checked = beside.length > 0;
  if (beside.length) byId("side-by-side").nextSibling.textContent = ` beside it: ${names[1]}`;
  question = chooseQuestion(episodes[episode]);
  timeline.fill(episodes[episode].turns.length);
  if (!followHash()) {
    question = chooseQuestion(episodes[rows[0]]);
    renderQuestions();
    renderPath();
    renderTurn();
  }
})();
