"""The style of the page. The colours of the parts are those of Okabe and Ito, which colour-blind people tell apart;
each has a text colour that can be read on it."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f9; --paper: #ffffff; --ink: #1b1f24; --dim: #59636e; --line: #d8dee4; --accent: #0a7f62;
  --tee: #0072b2; --serialization: #e69f00; --network: #d55e00; --server: #cc79a7; --gpu: #009e73; --other: #9aa1a9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0d1117; --paper: #151b23; --ink: #e6edf3; --dim: #9198a1; --line: #30363d; --accent: #4cc9a4;
    --tee: #4ba3e3; --serialization: #e6ab2f; --network: #e0763a; --server: #d58fb8; --gpu: #24b38a; --other: #7d858e;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { margin: 0; font-size: 1.75rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 1.15rem; overflow-wrap: anywhere; }
p { margin: 4px 0; overflow-wrap: anywhere; }
.dim, footer { color: var(--dim); font-size: .875rem; }
.setup { font-size: 1.05rem; }
.status { display: inline-block; margin: 8px 8px 0 0; padding: 2px 10px; border: 1px solid var(--network);
  border-left-width: 6px; border-radius: 4px; }
.note { border-left: 3px solid var(--line); padding-left: 12px; font-style: italic; }
section { margin: 20px 0; padding: 20px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 10px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0; }
.cards div { padding: 12px 16px; background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.cards dt { color: var(--dim); font-size: .8125rem; }
.cards dd { margin: 2px 0 0; font-size: 1.375rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.cards small { display: block; min-height: 1.3em; color: var(--dim); font-size: .8125rem; font-weight: 400; }
.advice { border-left: 6px solid var(--accent); }
.advice ol { margin: 0; padding-left: 22px; }
.advice li { margin: 8px 0; }
code { padding: 1px 6px; background: var(--ground); border: 1px solid var(--line); border-radius: 4px;
  font: .875em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.saving { color: var(--accent); font-weight: 650; font-size: .9375rem; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 12px; padding: 0; list-style: none;
  font-size: .875rem; }
.key { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 3px; }
figure { margin: 0 0 18px; }
figcaption { margin-bottom: 4px; color: var(--dim); font-size: .8125rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: inherit; font-size: 14px; }
svg.shares text { text-anchor: middle; font-weight: 600; }
.label { fill: var(--dim); }
svg text.label { font-size: 12px; font-variant-numeric: tabular-nums; }
.label.strong { fill: var(--ink); font-weight: 600; }
.mark { fill: var(--ink); }
.axis { stroke: var(--line); }
.tee { fill: var(--tee); background: var(--tee); }
.serialization { fill: var(--serialization); background: var(--serialization); }
.network { fill: var(--network); background: var(--network); }
.server { fill: var(--server); background: var(--server); }
.gpu { fill: var(--gpu); background: var(--gpu); }
.other { fill: var(--other); background: var(--other); }
.on-tee { fill: #ffffff; }
.on-serialization, .on-network, .on-server, .on-gpu, .on-other { fill: #111111; }
@media (prefers-color-scheme: dark) { .on-tee { fill: #0b0f14; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 60%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child { padding-left: 0; text-align: left; }
td { border-bottom: 1px solid var(--line); }
th[scope="row"] { border-bottom: 1px solid var(--line); }
.head th { padding-top: 14px; color: var(--dim); font-size: .8125rem; }
.head th:first-child { color: var(--ink); font-size: .9375rem; font-weight: 650; }
.total th, .total td { font-weight: 650; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 600px) { main { padding: 16px 10px; } section { padding: 14px; } svg text.label { font-size: 18px; }
  svg text { font-size: 16px; } th, td { padding: 4px 5px; font-size: .8125rem; } }
@media print { body { background: none; } section, .cards div { break-inside: avoid; } }
"""
