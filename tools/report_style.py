"""CSS and JavaScript of a report's page: light and dark mode, any width, no external resources."""

STYLE = """
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#1c1f24;--soft:#626a75;--edge:#e3e4e0;--grid:#ececea;
--c0:#2563c9;--c1:#d2462f;--c2:#2a8f57;--c3:#b3730b;--c4:#7a48c4;--c5:#0e8394;--c6:#bd3f77;--c7:#667085}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1b1e24;--ink:#e8eaee;--soft:#98a1ae;--edge:#2b3038;
--grid:#282c33;--c0:#6ea3ff;--c1:#ff8a73;--c2:#5ecb90;--c3:#e5b04e;--c4:#b794f6;--c5:#4cc3d4;--c6:#f58bb8;--c7:#a3adbb}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:2.2rem 1.2rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:2.4rem 0 .8rem;letter-spacing:-.005em}
p{margin:.4rem 0}.note,th,.unit{color:var(--soft)}.note{font-size:.86rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1rem 0 0;padding:0;list-style:none}
.swatch{display:inline-block;width:.72em;height:.72em;border-radius:50%;margin-right:.4em;background:currentColor}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin:1.4rem 0 0;
background:var(--card);border:1px solid var(--edge);border-radius:10px;overflow:hidden}
.figures div{padding:.7rem .9rem;box-shadow:1px 1px var(--edge)}.figures dt{font-size:.78rem;color:var(--soft)}
.figures dd{margin:.1rem 0 0;font-size:1.08rem;font-weight:600;font-variant-numeric:tabular-nums}
details{margin:0}summary{cursor:pointer;color:var(--soft);margin-bottom:.5rem}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.42rem .9rem;vertical-align:top;border-top:1px solid var(--edge)}
tr:first-child>*{border-top:0}th{font-weight:500}td{font-variant-numeric:tabular-nums}td.key{white-space:nowrap}td+td{min-width:6.5rem}
code{font:.86em/1.4 ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:.75rem .6rem .35rem}
figcaption{padding:0 .4rem .3rem;display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 .8rem;
min-height:2.9rem;align-content:flex-start}
figcaption b{font-weight:600;overflow-wrap:anywhere}.unit{font-size:.8rem;font-weight:400;margin-left:.4em}
output{display:flex;flex-wrap:wrap;gap:0 .7em;font-size:.82rem;font-variant-numeric:tabular-nums;color:var(--soft)}
svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{font:10.5px system-ui,sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--grid)}svg .cursor{stroke:var(--soft);stroke-dasharray:2 3;opacity:.8}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}.raw{stroke-width:1;opacity:.28}
polyline.validation{stroke-dasharray:5 3}rect{stroke:none}
.run0{stroke:var(--c0);color:var(--c0)}.run1{stroke:var(--c1);color:var(--c1)}.run2{stroke:var(--c2);color:var(--c2)}
.run3{stroke:var(--c3);color:var(--c3)}.run4{stroke:var(--c4);color:var(--c4)}.run5{stroke:var(--c5);color:var(--c5)}
.run6{stroke:var(--c6);color:var(--c6)}.run7{stroke:var(--c7);color:var(--c7)}circle,.column{fill:currentColor}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-width:48rem;min-width:14rem}
hr{border:0;border-top:1px solid var(--edge)}
.bars{display:grid;gap:.5rem .9rem;grid-template-columns:max-content 1fr;align-items:center;padding:.9rem}
.bar{display:flex;height:1.5rem;border-radius:5px;overflow:hidden}
.bar span{min-width:1px;font-size:.76rem;line-height:1.5rem;color:#fff;text-align:center;overflow:hidden}
.data{background:#7a48c4}.forward_backward{background:#2563c9}.wait{background:#d2462f}.optimizer{background:#2a8f57}
.keys{padding:0 .9rem .8rem;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.84rem;color:var(--soft)}
.keys i{display:inline-block;width:.8em;height:.8em;border-radius:3px;margin-right:.4em}
@media (max-width:620px){main{padding:1.3rem .8rem 3rem}h1{font-size:1.35rem}.bars{grid-template-columns:1fr}
th,td{padding:.4rem .6rem}}
@media print{body{background:#fff}figure{break-inside:avoid}}
"""

# Shows the values under the pointer; the page is complete without it.
SCRIPT = """
for (const svg of document.querySelectorAll('svg[data-points]')) {
  const lines = JSON.parse(svg.dataset.points), out = svg.parentNode.querySelector('output');
  const rest = out.innerHTML, cursor = svg.querySelector('.cursor'), width = svg.viewBox.baseVal.width;
  const digits = y => Math.abs(y) >= 1e4 ? Math.round(y).toLocaleString('en') : String(y);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    const near = lines.map(line => [line, line.at.reduce((a, b) => Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a)]);
    const best = near.reduce((a, b) => Math.abs(b[1][2] - x) < Math.abs(a[1][2] - x) ? b : a)[1];
    cursor.setAttribute('x1', best[2]); cursor.setAttribute('x2', best[2]);
    out.textContent = 'step ' + best[0].toLocaleString('en');
    for (const [line, point] of near) {
      if (Math.abs(point[2] - best[2]) > 6) continue;
      const span = document.createElement('span');
      span.className = 'run' + line.run; span.title = line.name; span.textContent = digits(point[1]);
      out.append(span);
    }
  });
  svg.addEventListener('pointerleave', () => {
    out.innerHTML = rest; cursor.setAttribute('x1', -9); cursor.setAttribute('x2', -9);
  });
}
"""
