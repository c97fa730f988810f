"""How pages look and what their few lines of script do; nothing is loaded from elsewhere."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --quiet: #6b7280; --line: #d8dbe0; --soft: #f4f5f7;
  --right: #18794e; --wrong: #c62a2f; --a: #2563eb; --b: #c2410c; --c: #15803d; --d: #7e22ce; --e: #0e7490;
  --f: #a16207; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #16181c; --quiet: #9aa3af; --line: #363b43;
  --soft: #20242a; --right: #4cc38a; --wrong: #ff8589; --a: #7aa7ff; --b: #ff9e64; --c: #6ee7a0; --d: #d0a2ff;
  --e: #67d5e8; --f: #e6c05a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .2em 0; } h2 { font-size: 1.2rem; margin: 1.6em 0 .4em; }
h3 { font-size: .95rem; margin: 0; }
nav a { margin-right: 1em; } a { color: var(--a); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { min-width: 6em; text-align: left; padding: .3em .7em; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; white-space: nowrap; } .small { color: var(--quiet); font-size: .85em; }
.note { border-left: 4px solid var(--b); padding: .2em .8em; background: var(--soft); margin: .4em 0; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } .chart { margin: 0; flex: 1 1 320px; max-width: 480px; }
.chart figcaption { font-weight: 600; font-size: .9rem; } .chart svg { width: 100%; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
.query { border-top: 1px solid var(--line); padding: .6rem 0; break-inside: avoid; }
.query h3 { overflow-wrap: anywhere; } .query h3 .small { font-weight: 400; }
.strips { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; align-items: flex-start; }
.strip { display: flex; flex-wrap: wrap; gap: .3rem; align-items: flex-start; }
.strip > b { width: 0; min-width: 100%; font-weight: 600; font-size: .8rem; color: var(--quiet); }
.strip figure { margin: 0; width: 96px; overflow-wrap: anywhere; font-size: .75rem; line-height: 1.3; }
.strip img { width: 96px; height: 72px; object-fit: cover; border: 3px solid var(--line); border-radius: 3px;
  display: block; background: var(--soft); }
.yes img { border-color: var(--right); } .no img { border-color: var(--wrong); border-style: dashed; }
.yes .mark { color: var(--right); } .no .mark { color: var(--wrong); } .mark { font-weight: 700; }
fieldset { border: 1px solid var(--line); border-radius: 4px; margin: 1rem 0 .5rem; }
fieldset label { margin-right: 1em; white-space: nowrap; }
.pairs { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.pairs figure { margin: 0; break-inside: avoid; } .pairs svg { width: 100%; height: auto; background: var(--soft); }
.pairs figcaption { font-size: .85rem; overflow-wrap: anywhere; } [hidden] { display: none !important; }
:focus-visible { outline: 3px solid var(--a); outline-offset: 2px; }
pre { background: var(--soft); padding: .6em; overflow-x: auto; }
.results .about { max-width: min(70rem, calc(100vw - 4rem)); font-weight: 600; } .results .small { font-weight: 400; }
.made td { min-width: 0; overflow-wrap: anywhere; }
.results tbody tr:not(:first-child) th { font-weight: 400; }
.results tr:has(+ .cost) > * { border-bottom: 0; padding-bottom: 0; } .results .cost td { padding-top: 0; }
@media (max-width: 600px) { th, td { min-width: 0; padding: .3em .35em; }
  .results td.number { white-space: normal; min-width: 3.6em; } .pairs { grid-template-columns: minmax(0, 1fr); }
  .strip { width: 100%; } .strip + .strip figure { width: calc(20% - .24rem); font-size: .7rem; }
  .strip + .strip img { width: 100%; height: 3.4rem; } }
@media print { nav, fieldset { display: none; } :root { color-scheme: light; } body { max-width: none; } }
"""

SCRIPT = """
const thumbs = JSON.parse(document.getElementById("thumbs").textContent);
for (const picture of document.querySelectorAll("img[data-thumb]"))
  picture.src = "data:image/jpeg;base64," + thumbs[picture.dataset.thumb];
for (const filter of document.querySelectorAll("fieldset[data-filter]")) {
  const rows = document.querySelectorAll("#" + filter.dataset.filter + " .query");
  const count = filter.querySelector("output");
  const show = () => {
    const wanted = filter.querySelector("input:checked").value;
    let shown = 0;
    for (const row of rows) {
      row.hidden = wanted !== "all" && !row.dataset.outcome.split(" ").includes(wanted);
      shown += !row.hidden;
    }
    count.textContent = shown + " of " + rows.length + " shown";
  };
  filter.addEventListener("change", show);
  show();
}
"""
