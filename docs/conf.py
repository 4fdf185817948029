"""Sphinx: how "make docs" builds the site from these pages. A link that leads nowhere is an error."""

project = "qmpballoon"
extensions = ["myst_parser"]
myst_heading_anchors = 3
nitpicky = True
smartquotes = False
html_theme = "furo"
html_title = "qmpballoon"
html_show_copyright = False
html_show_sphinx = False
highlight_language = "none"  # of indented blocks
