"""Pictures of an architecture, drawn from the modules that compute it: tables, masks, graphs and counts are read off the code."""

from scratchlm.model.draw.page import draw_model, pictures_of

__all__ = ["draw_model", "pictures_of"]
