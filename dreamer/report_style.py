"""How a report looks: one typeface, few colours, for light and dark screens, phones and paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c1f23; --muted: #6b7177; --line: #e3e3de; --tint:
  #f4f4f1; --c0: #2b6a9e; --c1: #c2571a; --c2: #3d8361; --c3: #8a5a9c; --c4: #a3842a; --c5: #5d6b78; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --ink: #e4e5e2; --muted: #969ca2; --line:
  #2d3237; --tint: #1d2125; --c0: #74b0de; --c1: #ec935f; --c2: #7cc3a0; --c3: #c39ad3; --c4: #d9bb62; --c5:
  #9fb0bf; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere; font: 15px/1.5
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 44px 28px 64px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 600; letter-spacing: -0.01em; margin: 0 0 6px; }
h2 { font-size: 18px; font-weight: 600; margin: 40px 0 14px; padding-top: 18px; border-top: 1px solid
  var(--line); }
h3 { font-size: 14px; font-weight: 600; margin: 26px 0 8px; }
p { margin: 0 0 10px; max-width: 75ch; }
a { color: var(--c0); text-decoration: none; }
a:hover { text-decoration: underline; }
.muted, .note, figcaption, th { color: var(--muted); }
.note { font-size: 13px; }
nav { font-size: 13px; margin: 22px 0 0; }
nav a { margin-right: 16px; white-space: nowrap; }
.status { font-weight: 600; }
.finished, .running { color: var(--c2); }
.interrupted, .unfinished { color: var(--c4); }
.failed { color: var(--c1); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(104px, 1fr)); margin: 28px 0 0; border: solid
  var(--line); border-width: 1px 0; padding: 16px 0; gap: 16px 20px; }
dt { font-size: 13px; color: var(--muted); }
dd { margin: 0; font-size: 21px; font-weight: 600; line-height: 1.3; }
dd small { display: block; font-size: 13px; font-weight: 400; color: var(--muted); }
.plain { grid-template-columns: 90px 1fr; gap: 4px 12px; margin: 0; border: 0; padding: 0; }
.plain dd { font-size: 14px; font-weight: 400; }
figure { margin: 0; }
figcaption { font-size: 13px; line-height: 1.35; display: flex; justify-content: space-between; gap: 10px; }
figcaption b { font-weight: 400; color: var(--ink); white-space: nowrap; }
svg { display: block; width: 100%; height: auto; font-size: 10px; }
.large { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.grid svg { font-size: 13px; }
.large svg { font-size: 10px; }
.wide svg { font-size: 11px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 22px 26px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 13px; color: var(--muted); margin: 0 0 8px;
  padding: 0; list-style: none; }
.legend i { display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: 3px; }
.media { display: flex; flex-wrap: wrap; gap: 26px; align-items: flex-start; }
.media figure { flex: 0 1 auto; max-width: 100%; }
.media figcaption { margin-top: 6px; max-width: 62ch; display: block; }
.media b { display: block; font-weight: 600; }
video, .media img { display: block; height: 124px; max-width: 100%; object-fit: contain; image-rendering: pixelated;
  background: var(--tint); border-radius: 3px; }
.media img { height: 200px; }
.media .main video { height: 300px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 22px 6px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 400; font-size: 13px; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
td { max-width: 60ch; overflow-wrap: break-word; }
td:last-child, th:last-child { padding-right: 0; }
details { margin: 14px 0; }
summary { cursor: pointer; color: var(--c0); font-size: 14px; }
.bar { display: flex; height: 18px; border-radius: 3px; overflow: hidden; gap: 1px; margin: 8px 0 10px; }
.command { background: var(--tint); border-radius: 3px; padding: 9px 12px; font-size: 13.5px; margin: 8px 0;
  max-width: none; }
footer { margin-top: 60px; font-size: 13px; color: var(--muted); }
@media (max-width: 640px) { main { padding: 26px 16px 40px; }
h1 { font-size: 24px; }
.wide svg { font-size: 19px; }
.grid { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 18px 14px; }
.grid svg { font-size: 15px; }
}
@media print { :root { --paper: #fff; --ink: #000; --muted: #555; --line: #ccc; --tint: #f4f4f4; --c0: #2b6a9e;
  --c1: #c2571a; --c2: #3d8361; --c3: #8a5a9c; --c4: #a3842a; --c5: #5d6b78; }
main { max-width: none; padding: 0; }
nav { display: none; }
figure, tr, dl { break-inside: avoid; }
h2, h3 { break-after: avoid; }
body { font-size: 12px; }
}
"""
