"""What people look at after a run: a table, plots and one self-contained HTML page."""
