"""`report.html`: what a run decided and why, as one page without network, drawn from run.json and its sidecars alone.

`reading.py` asks a run, one file each draws a part (pure functions, held by properties in the tests), `svg.py` has
elements and axes, `page.py` puts the parts into `templates/`. Whatever comes from recipes, data or libraries is escaped
by the template engine or by `svg.tag`, and the page's own policy admits only the style and the script it was made with.
"""

from optimize.report.html.page import FILE, render, write
from optimize.report.html.reading import Result

__all__ = ["FILE", "Result", "render", "write"]
