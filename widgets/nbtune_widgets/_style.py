"""One look for everything that nbtune shows: a scoped style block and a few pieces of HTML.

Colours are JupyterLab's CSS variables with fallbacks, so that a dark theme, Notebook 7, VS Code and Colab fit too.
"""

from __future__ import annotations

from html import escape

import ipywidgets as widgets

CSS = """
.nbtune{--nt-ink:var(--jp-ui-font-color1,var(--vscode-foreground,#1f2933));
 --nt-soft:var(--jp-ui-font-color2,var(--vscode-descriptionForeground,#667085));
 --nt-line:var(--jp-border-color2,var(--vscode-widget-border,#dfe3ea));
 --nt-card:var(--jp-layout-color1,var(--vscode-editor-background,#fff));
 --nt-wash:var(--jp-layout-color2,var(--vscode-editorWidget-background,#f3f5f8));
 --nt-blue:#4878d8;--nt-tint:rgba(72,120,216,.16);--nt-green:#2f9461;--nt-amber:#d08a1a;--nt-red:#d9534f;
 color:var(--nt-ink);font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif)}
.nbtune,.nbtune .widget-html-content,.nbtune .jupyter-widget-html-content{line-height:1.45}
.nbtune.nt-card{border:1px solid var(--nt-line);border-radius:10px;background:var(--nt-card);padding:14px 18px;
 margin:4px 2px;overflow:hidden}
.nbtune .nt-name{font-size:15px;font-weight:600;color:var(--nt-ink)}
.nbtune .nt-row{display:flex;align-items:center;flex-wrap:wrap;gap:2px 10px}
.nbtune .nt-controls{gap:2px 8px}
.nbtune .nt-soft{color:var(--nt-soft)} .nbtune .nt-small{font-size:12px}
.nbtune .nt-b{font-weight:600;color:var(--nt-ink)}
.nbtune .nt-chip{display:inline-block;border:1px solid var(--nt-line);border-radius:12px;padding:1px 10px;
 color:var(--nt-soft);font-size:12px;white-space:nowrap;max-width:100%;overflow:hidden;text-overflow:ellipsis}
.nbtune .nt-right{text-align:right}
.nbtune .nt-problem{border-left:3px solid var(--nt-amber);background:rgba(208,138,26,.10);padding:7px 12px;
 border-radius:4px;margin:3px 0;overflow-wrap:anywhere}
.nbtune .nt-problem.nt-error{border-color:var(--nt-red);background:rgba(217,83,79,.10)}
.nbtune .nt-problem.nt-info{border-color:var(--nt-blue);background:var(--nt-tint)}
.nbtune pre{margin:4px 0;padding:10px 12px;border:1px solid var(--nt-line);border-radius:8px;background:var(--nt-wash);
 color:var(--nt-ink);font:12px/1.5 var(--jp-code-font-family,ui-monospace,monospace);white-space:pre-wrap;
 overflow-wrap:anywhere;max-height:260px;overflow-y:auto}
.nbtune button.jupyter-button{border:1px solid var(--nt-line);border-radius:7px;background:var(--nt-card);
 color:var(--nt-ink);height:30px;line-height:28px;padding:0 14px;width:auto;box-shadow:none;font-size:13px}
.nbtune button.jupyter-button:hover:enabled{border-color:var(--nt-blue)}
.nbtune button.jupyter-button:focus-visible,.nbtune input:focus-visible,.nbtune select:focus-visible{
 outline:2px solid var(--nt-blue);outline-offset:1px}
.nbtune button.jupyter-button:disabled{opacity:.45}
.nbtune button.jupyter-button.nt-primary{background:var(--nt-blue);border-color:var(--nt-blue);color:#fff;
 font-weight:600}
.nbtune button.jupyter-button.nt-link{border-color:transparent;width:auto;align-self:flex-start;
 background:transparent;color:var(--nt-soft);
 font-size:12px;padding:0 6px}
.nbtune button.jupyter-button.nt-link.mod-active{color:var(--nt-blue)}
.nbtune .nt-bar .progress,.nbtune.nt-bar .progress{border:0;border-radius:4px;height:8px;background:var(--nt-wash)}
.nbtune .nt-bar .progress-bar{background:var(--nt-blue);border-radius:4px;transition:width .3s}
.nbtune .widget-label,.nbtune .widget-checkbox label,.nbtune .jupyter-widget-label{color:var(--nt-soft);font-size:12px}
.nbtune .widget-checkbox label,.nbtune .jupyter-widget-checkbox label{display:flex;align-items:center;gap:5px}
.nbtune .widget-checkbox input{margin:0}
.nbtune select,.nbtune input[type=text],.nbtune textarea{color:var(--nt-ink)!important;
 background-color:var(--nt-card)!important;border:1px solid var(--nt-line)!important;border-radius:6px;font-size:13px}
.nbtune select{appearance:none;padding:0 22px 0 8px;background-image:linear-gradient(45deg,transparent 50%,
 var(--nt-soft) 50%),linear-gradient(135deg,var(--nt-soft) 50%,transparent 50%)!important;
 background-position:right 12px center,right 8px center!important;background-size:4px 4px!important;
 background-repeat:no-repeat!important}
.nbtune .widget-readout,.nbtune .jupyter-widget-readout{min-width:32px;width:32px}
.nbtune .widget-readout,.nbtune .jupyter-widget-readout{color:var(--nt-soft);font-size:12px}
.nbtune .nt-head .widget-html,.nbtune .nt-head .widget-html-content{height:auto;line-height:1.45}
.nbtune .nt-head{border-bottom:1px solid var(--nt-line);padding-bottom:8px;gap:2px}
.nbtune button.jupyter-button.nt-step{border-color:transparent;background:transparent;border-radius:16px;
 color:var(--nt-soft);padding:0 9px;margin:2px 0}
.nbtune button.jupyter-button.nt-step.nt-here{background:var(--nt-tint);color:var(--nt-blue);font-weight:600}
.nbtune button.jupyter-button.nt-step.nt-wrong{color:var(--nt-red)}
.nbtune .nt-heading{font-weight:600;color:var(--nt-ink);margin:4px 0}
.nbtune .nt-field{gap:0 12px;min-height:32px}
.nbtune .nt-field .widget-label{color:var(--nt-ink);font-weight:600;font-size:13px;text-align:left}
.nbtune .nt-help{color:var(--nt-soft);font-size:12px;line-height:1.35}
.nbtune .nt-invalid{color:var(--nt-red);font-size:12px}
.nbtune .nt-bad input,.nbtune .nt-bad select{border-color:var(--nt-red)!important}
.nbtune .nt-facts{display:grid;grid-template-columns:128px 1fr;gap:2px 12px;margin-top:10px;padding:10px 0 0;
 border-top:1px solid var(--nt-line);overflow-wrap:anywhere}
.nbtune .nt-columns{gap:8px 28px;align-items:flex-start}
.nbtune button.jupyter-button.nt-method{height:auto;min-height:52px;width:150px;text-align:left;white-space:pre-line;
 line-height:1.35;padding:8px 12px;font-size:12px;color:var(--nt-soft);margin:0 8px 8px 0}
.nbtune button.jupyter-button.nt-method::first-line{font-weight:600;font-size:13px;color:var(--nt-ink)}
.nbtune button.jupyter-button.nt-method.nt-on{border-color:var(--nt-blue);box-shadow:0 0 0 1px var(--nt-blue)}
.nbtune .nt-presets{gap:4px 6px;align-items:center;margin-bottom:4px}
.nbtune .nt-presets button.jupyter-button{font-size:12px;padding:0 10px;height:28px;line-height:26px;margin:0}
.nbtune .nt-kinds{min-height:20px}
.nbtune .nt-kinds button.jupyter-button.nt-kind{border-color:transparent;background:transparent;text-align:left;
 font-weight:600;font-size:12px;height:20px;line-height:18px;padding:0 2px;margin:0;color:var(--nt-soft)}
.nbtune .nt-kinds button.jupyter-button.nt-kind.nt-on{color:var(--nt-ink)}
.nbtune .nt-kinds .widget-html{margin:0 2px}
.nbtune .nt-cells{display:flex;gap:2px;height:16px;align-items:center}
.nbtune .nt-cells i{flex:1 1 0;height:14px;border-radius:3px;background:var(--nt-wash);
 box-shadow:inset 0 0 0 1px var(--nt-line)}
.nbtune .nt-cells i.nt-on{background:var(--nt-blue);box-shadow:none}
.nbtune .nt-cells b{flex:1 1 0;font-weight:400;font-size:9px;color:var(--nt-soft);text-align:center;overflow:visible;
 width:0}
.nbtune .nt-tokens{border:1px solid var(--nt-line);border-radius:8px;padding:10px 14px;margin:4px 0;
 font:12px/1.6 var(--jp-code-font-family,ui-monospace,monospace);white-space:pre-wrap;overflow-wrap:anywhere;
 max-height:260px;overflow-y:auto}
.nbtune .nt-t0{color:var(--nt-soft)} .nbtune .nt-t1{background:rgba(47,148,97,.20);border-radius:2px}
.nbtune .nt-tE{background:rgba(47,148,97,.48);border-radius:2px}
.nbtune .nt-layers .widget-readout{min-width:60px;width:60px}
.nbtune .nt-foot{border-top:1px solid var(--nt-line);padding-top:12px;gap:8px 20px}
.nbtune .nt-info a{color:var(--nt-blue);text-decoration:underline}
.nbtune .nt-buttons{margin-left:auto;gap:2px}
.nbtune .nt-parts{display:flex;height:20px;border-radius:5px;overflow:hidden;background:var(--nt-wash)}
.nbtune .nt-parts div{color:#fff;font-size:11px;line-height:20px;text-align:center;overflow:hidden;white-space:nowrap}
.nbtune .nt-gauge{height:3px;border-radius:2px;background:var(--nt-wash);margin:3px 0}
.nbtune .nt-gauge div{height:3px;border-radius:2px}
.nbtune .nt-keys{display:flex;flex-wrap:wrap;gap:0 14px;font-size:12px;color:var(--nt-soft)}
.nbtune .nt-keys i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px}
.nbtune .nt-problem.nt-good{border-color:var(--nt-green);background:rgba(47,148,97,.10)}
.nbtune .nt-tabs button.jupyter-button{height:26px;line-height:24px;font-size:12px;padding:0 10px}
.nbtune .nt-tabs button.jupyter-button.mod-active{background:var(--nt-tint);color:var(--nt-blue);box-shadow:none}
.nbtune button.jupyter-button.nt-reset{border-color:transparent;background:transparent;padding:0;width:24px;
 min-width:24px;color:var(--nt-blue);font-size:15px}
.nbtune .nt-picked .nt-field .widget-text{width:calc(100% - 48px)!important}
.nbtune .nt-known{gap:2px 6px;align-items:center;min-height:32px}
.nbtune button.jupyter-button.nt-chipped{height:26px;line-height:24px;border-radius:13px;font-size:12px;padding:0 12px;
 margin:0}
.nbtune button.jupyter-button.nt-chipped.nt-on{background:var(--nt-tint);border-color:var(--nt-blue);
 color:var(--nt-blue)}
.nbtune .nt-wide button.jupyter-button.nt-method{width:208px}
.nbtune .nt-precisions button.jupyter-button.nt-method{width:176px}
.nbtune button.jupyter-button.nt-method.nt-fits{border-left:3px solid var(--nt-green)}
.nbtune button.jupyter-button.nt-method.nt-tight{border-left:3px solid var(--nt-amber)}
.nbtune button.jupyter-button.nt-method.nt-no{border-left:3px solid var(--nt-red)}
.nbtune .nt-fit{margin-left:8px;font-weight:600} .nbtune .nt-fit.nt-fits{color:var(--nt-green)}
.nbtune .nt-fit.nt-tight{color:var(--nt-amber)} .nbtune .nt-fit.nt-no{color:var(--nt-red)}
.nbtune .nt-scale{position:relative;height:22px;margin:6px 0 7px}
.nbtune .nt-scale div{line-height:22px}
.nbtune .nt-scale .nt-limit{position:absolute;top:0;bottom:0;width:2px;background:var(--nt-red)}
.nbtune .nt-time{color:var(--nt-ink);margin-top:2px}
.nbtune .nt-review .nt-heading{margin:10px 0 4px}
.nbtune .nt-remedies{gap:4px 6px}
.nbtune .nt-cells i.nt-none{background:transparent;box-shadow:none}
.nbtune .nt-map{display:grid;gap:3px 2px;align-items:center;margin:2px 0 6px;user-select:none;
 grid-template-columns:max-content repeat(var(--layers),minmax(0,1fr)) max-content}
.nbtune .nt-map [role=row]{display:contents}
.nbtune .nt-map button{all:unset;box-sizing:border-box;cursor:pointer;border-radius:3px}
.nbtune .nt-map button:focus-visible{outline:2px solid var(--nt-ink);outline-offset:1px}
.nbtune .nt-map [data-at]{height:15px;background:var(--nt-wash);box-shadow:inset 0 0 0 1px var(--nt-line);
 touch-action:none}
.nbtune .nt-map [data-at]:hover{box-shadow:inset 0 0 0 1.5px var(--nt-blue)}
.nbtune .nt-map [data-at][aria-selected=true]{background:var(--nt-blue);box-shadow:none}
.nbtune .nt-map [data-at][aria-selected=true]:hover{opacity:.75}
.nbtune .nt-map [role=rowheader] button{font-size:12px;font-weight:600;color:var(--nt-ink);padding-right:10px}
.nbtune .nt-map [role=rowheader] button:hover,.nbtune .nt-map [role=columnheader] button:hover{color:var(--nt-blue)}
.nbtune .nt-map [role=columnheader]{display:flex;justify-content:center;min-width:0}
.nbtune .nt-map [role=columnheader] button{font-size:9px;line-height:14px;color:var(--nt-soft);text-align:center}
.nbtune .nt-map .nt-shape{font-size:12px;color:var(--nt-soft);padding-left:10px}
"""


def style() -> widgets.HTML:
    """The style block as a widget that takes no room."""
    return widgets.HTML(f"<style>{CSS}</style>", layout=widgets.Layout(display="none"))


def chip(text: str) -> str:
    return f'<span class="nt-chip">{escape(text)}</span>' if text else ""


def notice(text: str, kind: str = "") -> str:
    """Lines of text in a box with a coloured edge: amber for a warning, `error` red, `info` blue. First line bold."""
    if not text:
        return ""
    first, *rest = text.strip().splitlines() or [""]
    lines = "".join(f"<div>{escape(line)}</div>" for line in rest if line.strip())
    return f'<div class="nt-problem nt-{kind}" role="status"><span class="nt-b">{escape(first)}</span>{lines}</div>'


def duration(seconds: float) -> str:
    """48 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def gigabytes(size: float) -> str:
    """Bytes as GB of 10^9, or MB below a tenth of that."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
