"""Pictures of an architecture, drawn from the modules that compute it: tables, masks, graphs and counts are read off the code."""
