"""An app in the browser: what trained models do, to play with.

studio.py     the models and what the app does with them, as functions on arrays
page.py       the page, in Gradio
__main__.py   the command
"""
