"use strict";
// What follows from the data of an episode: tables, the ways of facts, and where to go next.

// A score is null where nobody knows what is right, as of questions that a person asked.
const isWrong = (e) => e.em !== null && e.em < 1;
const hasGold = (e) => e.questions.some((q) => q.em !== null);
const nameStage = (stage) => stage.replaceAll("_", " ");

const SNAPSHOT = 128; // turns between two tables that are kept
const snapshots = new WeakMap(); // episode -> tables before turns 0, SNAPSHOT, 2 * SNAPSHOT, ...

function applyChanges(table, changes) {
  for (const { slot, after } of changes) {
    if (after === null) table.delete(slot);
    else table.set(slot, after);
  }
}

/** The table after turn `last` of an episode: slot -> text. */
function foldTable(e, last) {
  if (!snapshots.has(e)) {
    snapshots.set(e, [new Map((e.start || []).map(({ slot, text }) => [slot, text]))]);
  }
  const kept = snapshots.get(e);
  const wanted = Math.floor(last / SNAPSHOT);
  while (kept.length <= wanted) {
    const next = new Map(kept[kept.length - 1]);
    const begin = (kept.length - 1) * SNAPSHOT;
    for (const { changes } of e.turns.slice(begin, begin + SNAPSHOT)) applyChanges(next, changes);
    kept.push(next);
  }
  const table = new Map(kept[wanted]);
  for (const { changes } of e.turns.slice(wanted * SNAPSHOT, last + 1)) {
    applyChanges(table, changes);
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

const hasChange = (one) =>
  one.changes.length > 0 || one.scratchpad.some(([what]) => what !== "same");

// ---------------------------------------------------------------------- the ways of facts

const KEPT = new Set(["seen", "stored", "carried", "shown"]); // any other event is a break
const paths = new WeakMap(); // question -> what `findPath` made of it

/** Of the facts of a question: turn -> what happened in it, as [number of the fact, what]. */
function findPath(q) {
  if (!paths.has(q)) {
    const happened = new Map();
    (q.facts || []).forEach(({ events }, f) => {
      for (const [turn, what] of events) {
        if (!happened.has(turn)) happened.set(turn, []);
        happened.get(turn).push([f, what]);
      }
    });
    paths.set(q, happened);
  }
  return paths.get(q);
}

/** The slots that hold a fact after turn `t`: the last entry of a list ordered by turn. */
function findHolders({ holders }, t) {
  let [low, high] = [0, holders.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (holders[middle][0] <= t) low = middle + 1;
    else high = middle;
  }
  return low ? holders[low - 1][1] : [];
}

/** slot -> numbers of the facts that it holds after turn `t`. */
function findHeld(q, t) {
  const held = new Map();
  ((q && q.facts) || []).forEach((fact, f) => {
    for (const slot of findHolders(fact, t)) held.set(slot, [...(held.get(slot) || []), f]);
  });
  return held;
}

/** Of a list ordered by turn the `most` nearest to turn `t`: [number before, these, number after]. */
function chooseEvents(events, t, most) {
  const at = events.findIndex(([turn]) => turn > t);
  const middle = at < 0 ? events.length : at;
  const first = Math.max(0, Math.min(middle - most / 2, events.length - most));
  const near = events.slice(first, first + most);
  return [first, near, events.length - first - near.length];
}

/** 'lost', 'kept' or null: what the timeline tells of a turn by its ground. */
function judgeTurn(q, t) {
  const events = findPath(q).get(t) || [];
  if (events.some(([, what]) => !KEPT.has(what))) return "lost";
  return ((q && q.facts) || []).some((fact) => findHolders(fact, t).length) ? "kept" : null;
}

/** The question to look at first: the first wrong one. */
function chooseQuestion(e) {
  const wrong = e.questions.findIndex((q) => q.em !== null && q.em < 1);
  return Math.max(0, wrong);
}

/** [stage, [episodes, questions]] of all wrong answers, the commonest first. */
function countStages(episodes) {
  const counts = new Map();
  for (const e of episodes) {
    const stages = e.questions.map((q) => q.stage).filter(Boolean);
    for (const stage of stages) {
      const [inEpisodes, inQuestions] = counts.get(stage) || [0, 0];
      counts.set(stage, [inEpisodes, inQuestions + 1]);
    }
    for (const stage of new Set(stages)) counts.get(stage)[0] += 1;
  }
  return [...counts].sort(([, [, a]], [, [, b]]) => b - a);
}

// ---------------------------------------------------------------------- searching and aligning

const contains = (text, wanted) => text !== null && text.toLowerCase().includes(wanted);

/** Whether a turn wrote an entry, or a scratchpad, with these words (in lower case). */
function turnWrote(one, wanted) {
  return (
    one.changes.some(({ after }) => contains(after, wanted)) ||
    one.scratchpad.some(([what, text]) => what === "added" && contains(text, wanted))
  );
}

/** Whether an entry with these words is in memory at any time. */
function episodeHolds(e, wanted) {
  return (
    (e.start || []).some(({ text }) => contains(text, wanted)) ||
    e.turns.some((one) => turnWrote(one, wanted))
  );
}

/** The next turn after `t` (before it, where by is -1) of which `test` is true, or null. */
function findTurn(e, t, by, test) {
  for (let i = t + by; i >= 0 && i < e.turns.length; i += by) {
    if (test(e.turns[i], i)) return i;
  }
  return null;
}

/** The turn of another play of the same episode that was shown the same: chunk, or question. */
function alignTurn(e, t, other) {
  const same = (a, b) => a.chunk === b.chunk && a.question === b.question;
  const wanted = e.turns[t];
  let before = 0;
  while (before < t && same(e.turns[t - before - 1], wanted)) before += 1;
  let place = other.turns.findIndex((one) => same(one, wanted));
  if (place < 0) return Math.min(t, other.turns.length - 1);
  while (before > 0 && other.turns[place + 1] && same(other.turns[place + 1], wanted)) {
    place += 1;
    before -= 1;
  }
  return place;
}
