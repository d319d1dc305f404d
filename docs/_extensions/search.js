// How the search ranks what it finds. Sphinx wants all numbers where one part is given; these are its own, of searchtools.js.
var Scorer = {
  // Pages about the project mention every topic, and answer none.
  score: ([page, , , , score]) => (["changelog", "design"].includes(page) ? score - 100 : score),

  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
