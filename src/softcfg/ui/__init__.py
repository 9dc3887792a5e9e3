"""The web page of `softcfg ui`: draw, compare and look into images in a browser.

`studio` is what the page does, without the page; `page` and `fragments` are what it looks like; `guard` is what
the server lets through.
"""
