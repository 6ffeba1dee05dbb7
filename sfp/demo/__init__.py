"""The demo page, `sfp demo`.

`pictures` has pure functions that draw arrays; `session` runs the model and caches slow results; `tabs`
and `page` are the layout and its events, and the only modules that need gradio.
"""
