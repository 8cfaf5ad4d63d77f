"""The hits of a search as one HTML file that needs nothing else and runs nothing."""

import base64
import json
from collections.abc import Sequence
from html import escape

from vlm.config.find import counted
from vlm.retrieval.index import Hit

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
 body {{ font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem;
        max-width: 72rem }}
 ol {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr));
      list-style: none; padding: 0 }}
 img {{ width: 100%; height: 10rem; object-fit: contain; background: #eee }}
 small {{ color: #555; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<ol>
"""


def search_page(query: str, hits: Sequence[Hit], *, where: str | None = None) -> str:
    """A page with the thumbnail, caption, key and score of each hit, best first."""
    summary = counted(len(hits), "picture") + (f" where {where}" if where else "")
    head = _HEAD.format(title=escape(query), summary=escape(summary))
    return head + "\n".join(map(_item, hits)) + "\n</ol>\n</html>\n"


def _item(hit: Hit) -> str:
    data = base64.b64encode(hit.thumbnail).decode()
    meta = json.dumps(hit.meta, ensure_ascii=False)
    name = escape(hit.path or hit.key)
    return (
        f'<li title="{escape(meta)}">'
        f'<img src="data:image/webp;base64,{data}" alt="{escape(hit.caption) or name}">'
        f"<div>{escape(hit.caption)}</div><small>{hit.score:.3f} {name}</small></li>"
    )
