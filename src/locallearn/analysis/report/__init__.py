"""Runs side by side on one page of HTML that needs nothing else.

`collect` reads run directories, `compare` groups them, `charts` draws, `page` puts it together
with `page.html`, `style.css` and `script.js`.
"""

from locallearn.analysis.report.collect import RecordedRun, collect_runs
from locallearn.analysis.report.page import render_report

__all__ = ["RecordedRun", "collect_runs", "render_report"]
