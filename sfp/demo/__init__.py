"""A page to try methods in: `sfp demo`.

`pictures` turns arrays into what is shown and `words` text into classes, pure functions; `desk` asks
the model and keeps what is slow; `page` is the layout, and the only module that needs gradio.
"""
