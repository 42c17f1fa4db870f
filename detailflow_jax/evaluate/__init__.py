"""Figures about trained models, and the page that shows them."""
