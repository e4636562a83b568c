"""How the page looks: one column at 360 pixels, as many as fit on a desk; light and dark."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --card: #f4f6f8; --rule: #d0d7de;
  --zero: #e4e8ec; --line: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --paper: #0d1117; --card: #161b22;
  --rule: #30363d; --zero: #d0d7de; --line: #56b4e9 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .25rem 0; color: var(--soft); max-width: 60rem }
.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .5rem; margin: 1rem 0 }
.totals div, figure { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .6rem }
.totals b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums }
.totals span { color: var(--soft); font-size: .85rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17.5rem, 100%), 1fr)); gap: .75rem;
  align-items: start; margin-top: .5rem }
figure { margin: 0; min-width: 0 } figcaption { font-size: .85rem; margin-bottom: .4rem }
svg { display: block; width: 100%; height: auto; max-height: 20rem }
.zero { fill: var(--zero); stroke: var(--rule); vector-effect: non-scaling-stroke }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem; font-size: .85rem; margin: .5rem 0 }
.legend svg { width: 1rem; border: 1px solid var(--rule) } .legend .ramp { width: 8rem }
details { margin: .75rem 0 } summary { cursor: pointer; font-size: .95rem } summary b { margin-right: .4rem }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .75rem; margin: .5rem 0 0; font-size: .8rem }
dt { color: var(--soft); white-space: nowrap } dd { margin: 0; text-align: right; text-wrap: balance;
  font-variant-numeric: tabular-nums }
.line { fill: none; stroke: var(--line); stroke-width: 1.8 } .dots { fill: var(--line) }
.axis { fill: none; stroke: var(--rule) } svg text { fill: var(--soft); font-size: 13px }
.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: .5rem }
table { border-collapse: collapse; font-size: .8rem; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: normal;
  min-width: 12rem; max-width: 52vw }
tbody th { font-weight: normal } tfoot th, tfoot td { font-weight: bold; border-bottom: 0 }
"""
