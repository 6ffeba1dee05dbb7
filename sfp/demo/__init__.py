"""A page to try methods in: `sfp demo`.

`pictures` draws arrays, as pure functions; `session` runs the model and caches what is slow; `tabs`
and `page` are the layout and its events, and the only modules that need gradio.
"""
