"""The look of the Data step, beside `_style`."""

from __future__ import annotations

import ipywidgets as widgets

CSS = """
.nbtune .nt-tokens{max-height:300px;margin:6px 0}
.nbtune .nt-tokens i,.nbtune .nt-bars i{font-style:normal}
.nbtune .nt-tokens i:hover{outline:1px solid var(--nt-blue);outline-offset:-1px;border-radius:2px}
.nbtune .nt-tokens u{text-decoration:none;opacity:.45;user-select:none}
.nbtune .nt-tokens s{text-decoration:none;opacity:.42}
.nbtune .nt-tokens .nt-special{font-weight:600}
.nbtune .nt-tE{color:var(--nt-ink)}
.nbtune .nt-cut{display:block;font:600 11px/1.4 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--nt-red);
 border-top:1.5px dashed var(--nt-red);margin:8px 0 4px;padding-top:2px}
.nbtune .nt-part{display:block;font:11px/1.4 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--nt-soft);
 border-top:1px solid var(--nt-line);margin:8px 0 4px;padding-top:2px}
.nbtune .nt-lengths{padding:2px 0 0}
.nbtune .nt-bars{position:relative;display:flex;align-items:flex-end;gap:1px;height:128px;
 border-bottom:1px solid var(--nt-line)}
.nbtune .nt-bars i{flex:1 1 0;background:var(--nt-blue);opacity:.62;border-radius:2px 2px 0 0}
.nbtune .nt-bars i:hover{opacity:.9}
.nbtune .nt-bars i.nt-over{background:var(--nt-amber);opacity:.9}
.nbtune .nt-limit{position:absolute;top:0;bottom:0;width:0;border-left:1.5px dashed var(--nt-red)}
.nbtune .nt-limit em{position:absolute;left:5px;top:-3px;font:11px/1.3 var(--jp-ui-font-family,system-ui,sans-serif);
 color:var(--nt-red)}
.nbtune .nt-limit.nt-left em{left:auto;right:6px}
.nbtune .nt-axis{display:flex;justify-content:space-between;font-size:11px;color:var(--nt-soft);padding-top:2px}
.nbtune .nt-named{font-size:14px;font-weight:600;color:var(--nt-ink);overflow-wrap:anywhere}
.nbtune .nt-chips{display:flex;flex-wrap:wrap;gap:4px 6px;align-items:center;padding:4px 0}
.nbtune .nt-chips .nt-chip{white-space:normal}
.nbtune .nt-look{gap:2px 6px;align-items:center;min-height:28px}
.nbtune .nt-look button.jupyter-button{height:26px;line-height:24px;padding:0 10px;font-size:13px;margin:0}
.nbtune .nt-look input{height:26px}
.nbtune .nt-look button.jupyter-button.widget-toggle-button{margin-left:auto;font-size:12px}
.nbtune .nt-look .mod-active,.nbtune .nt-line button.jupyter-button.mod-active{background:var(--nt-tint);
 color:var(--nt-blue);box-shadow:none}
.nbtune .nt-line .widget-label{color:var(--nt-ink);font-weight:600;font-size:13px;text-align:left}
.nbtune .nt-sources{gap:0 4px;align-items:center;min-height:28px}
.nbtune .nt-sources .nt-of{margin-left:10px}
.nbtune .nt-sources button.jupyter-button{height:24px;line-height:22px;font-size:12px;padding:0 10px;border-radius:12px;
 margin:1px 0}
.nbtune .nt-sources button.jupyter-button.nt-on{border-color:var(--nt-blue);color:var(--nt-blue);
 box-shadow:0 0 0 1px var(--nt-blue)}
.nbtune details.nt-fold{border-top:1px solid var(--nt-line);padding:5px 2px}
.nbtune details.nt-fold:last-of-type{border-bottom:1px solid var(--nt-line)}
.nbtune details.nt-fold summary{cursor:pointer;color:var(--nt-ink)}
.nbtune details.nt-fold summary:focus-visible{outline:2px solid var(--nt-blue);outline-offset:1px}
.nbtune details.nt-fold pre{max-height:150px}
.nbtune .nt-warn{gap:2px 6px;align-items:center;border-left:3px solid var(--nt-amber);background:rgba(208,138,26,.10);
 border-radius:4px;padding:3px 8px 3px 12px;margin:6px 0}
.nbtune .nt-warn button.jupyter-button{height:26px;line-height:24px;font-size:12px;padding:0 10px;margin:1px 0}
.nbtune .nt-panel{border:1px solid var(--nt-line);border-radius:8px;padding:8px 12px;margin:2px 0 6px}
.nbtune .nt-doors{gap:0 2px;margin-top:8px}
.nbtune .nt-doors button.jupyter-button{font-size:12px;height:28px;line-height:26px;padding:0 12px;margin:2px 4px 2px 0}
.nbtune .nt-doors button.jupyter-button.mod-active{background:var(--nt-tint);color:var(--nt-blue);box-shadow:none}
.nbtune .nt-line{gap:2px 8px;align-items:center}
.nbtune .nt-line button.jupyter-button{height:26px;line-height:24px;padding:0 9px;font-size:12px;margin:0}
.nbtune .nt-steprow{border-top:1px solid var(--nt-line);padding:6px 0}
.nbtune .nt-steprow:first-child{border-top:0}
.nbtune textarea{font:12px/1.5 var(--jp-code-font-family,ui-monospace,monospace)!important;padding:6px 9px}
.nbtune .nt-ticks{display:flex;flex-wrap:wrap;gap:2px 16px;padding:4px 0}
.nbtune .nt-tick b{color:var(--nt-green);margin-right:5px} .nbtune .nt-tick.nt-no b{color:var(--nt-red)}
"""


def style() -> widgets.HTML:
    """The style block as a widget that takes no room."""
    return widgets.HTML(f"<style>{CSS}</style>", layout=widgets.Layout(display="none"))
