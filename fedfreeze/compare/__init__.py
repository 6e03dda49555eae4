"""`fedfreeze compare`: finished and unfinished runs beside each other, as tables, pictures and a page."""
