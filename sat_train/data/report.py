"""Renders the report on a set as a page: numbers, histograms, thumbnails."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from sat_train.data.inspect import ClipFacts, SetReport
from sat_train.errors import printable

_BINS = 24
_MOST_CLIPS = 300  # of one set
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}
table{border-collapse:collapse}td{padding:.15em .8em .15em 0;vertical-align:top}td:first-child{color:#777}
svg{margin-right:2em}.clips{display:flex;flex-wrap:wrap;gap:10px}.clips figure{margin:0;width:170px}
figure img{height:90px;max-width:170px;object-fit:cover;display:block}
figcaption{font-size:12px;color:#555;overflow-wrap:anywhere}.bad img{outline:3px solid #c33}.bad b{color:#c33}
"""


def render_page(reports: Sequence[SetReport]) -> str:
    """Renders one self-contained HTML file about several sets."""
    sets = "".join(_render_set(report) for report in reports)
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>Data</title><style>{_STYLE}</style></head>"
        f"<body>{sets}</body></html>\n"
    )


def _render_set(report: SetReport) -> str:
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in report.lines()
    )
    infos = [clip.info for clip in report.readable() if clip.info is not None]
    words = [float(len(caption.split())) for clip in report.clips for caption in clip.record.captions]
    charts = "".join(
        _histogram(title, values)
        for title, values in (
            ("seconds", [info.duration for info in infos]),
            ("frames a second", [info.rate for info in infos]),
            ("width / height", [info.shown_size[1] / info.shown_size[0] for info in infos]),
            ("words of a caption", words),
        )
        if values
    )
    bad_first = sorted(report.clips, key=lambda clip: clip.problem is None)
    clips = "".join(_render_clip(clip) for clip in bad_first[:_MOST_CLIPS])
    return (
        f"<h1>{_text(report.name)}</h1><table>{rows}</table><p>{charts}</p><div class='clips'>{clips}</div>"
    )


def _render_clip(clip: ClipFacts) -> str:
    data = base64.b64encode(clip.thumbnail).decode()
    picture = f"<img src='data:image/jpeg;base64,{data}' alt=''>" if data else ""
    problem = f"<b>{_text(str(clip.problem))}</b><br>" if clip.problem else ""
    about = ""
    if clip.info:
        height, width = clip.info.shown_size
        about = f"{clip.info.duration:.1f} s, {height}x{width}<br>"
    return (
        f"<figure class='{'bad' if clip.problem else ''}'>{picture}<figcaption>{problem}"
        f"{_text(clip.record.captions[0][:200])}<br>{about}{_text(clip.record.clip_id)}</figcaption></figure>"
    )


def _histogram(title: str, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    width = (high - low) / _BINS or 1.0
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / width))] += 1
    bars = "".join(
        f"<rect x='{10 * i}' y='{70 - 70 * count / max(counts):.1f}' width='9' "
        f"height='{70 * count / max(counts):.1f}' fill='#47a'><title>{count}</title></rect>"
        for i, count in enumerate(counts)
    )
    extent = f"{low:.4g} to {high:.4g}" if high > low else f"{low:.4g}"
    return (
        f"<svg width='{10 * _BINS}' height='90' font-size='11' font-family='sans-serif'>{bars}"
        f"<text x='{5 * _BINS}' y='84' text-anchor='middle'>{_text(title)}: {extent}</text></svg>"
    )


def _text(words: str) -> str:
    return html.escape(printable(words))
